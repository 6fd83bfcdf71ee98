"""CLIP as the judge, as in the paper: zero-shot class prompts. Needs pip install open_clip_torch.

    python notebooks/clip_judge.py --dataset cifar10 --out runs/cifar10-clip     options: sgu.py's
"""
import logging
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch
import torch.nn as nn
import torch.nn.functional as F

import sgu

MEAN = 0.48145466, 0.4578275, 0.40821073           # of the images that CLIP was trained on
STD = 0.26862954, 0.26130258, 0.27577711


def prompts(classes):
    """One sentence for each class name, (K,)."""
    digit = {c: "the digit " if c.isdigit() else "" for c in classes}
    return [f"a photo of {digit[c]}{c}" for c in classes]


class ClipJudge(nn.Module):
    """For sgu.run(opt, judge=ClipJudge(classes)): features are CLIP's normalised image embeddings.

    It never says "none of these", whose logit is minus infinity: the paper's judge had no such
    answer. name and weights: whatever open_clip.create_model accepts; weights=None: random ones.
    """

    def __init__(self, classes, name="ViT-B-32", weights="openai"):
        super().__init__()
        try:
            import open_clip
        except ImportError:
            raise sgu.UsageError("the CLIP judge needs  pip install open_clip_torch") from None
        logging.disable(logging.ERROR)             # open_clip says the same on the root logger
        try:
            self.clip = open_clip.create_model(name, pretrained=weights).eval()
        except Exception as error:                 # no network, no such name, a damaged file
            reason = " ".join((str(error) or type(error).__name__).split())[:200]
            raise sgu.UsageError(f"the weights {weights} of {name} are not here and cannot be "
                                 f"fetched ({reason})") from None
        finally:
            logging.disable(logging.NOTSET)
        self.clip.requires_grad_(False)
        size = self.clip.visual.image_size
        self.size = size[0] if isinstance(size, (tuple, list)) else size
        tokens = open_clip.get_tokenizer(name)(prompts(classes))
        with torch.no_grad():
            text = F.normalize(self.clip.encode_text(tokens), dim=1)
        self.register_buffer("text", text)                                             # (K, F)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])

    def features(self, x):
        """(B, 1 or 3, H, W) in [-1, 1] -> (B, F)."""
        x = x.expand(-1, 3, -1, -1)
        x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True)
        return F.normalize(self.clip.encode_image(((x + 1) / 2 - self.mean) / self.std), dim=1)

    def head(self, features):
        """(B, F) -> logits (B, K + 1)."""
        return F.pad(100 * features @ self.text.T, (0, 1), value=-torch.inf)

    def forward(self, x):
        return self.head(self.features(x))


def main(argv=None):
    """sgu.py's command with this judge. Exit codes as there."""
    try:
        opt = sgu.parse_options(argv)
        data = sgu.load_data(opt.dataset, opt.data_root)
        forget = opt.forget or sgu.DATASETS.get(opt.dataset, ("",))[0]
        sgu.run(opt, judge=ClipJudge(sgu.choose(data, forget)["classes"]))
    except sgu.UsageError as error:
        print(f"clip_judge: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
