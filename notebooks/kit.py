"""What several notebooks share: pictures, the tables of committed results, the digit models and a live run at tiny size. Nothing of the method: that is sgu.py."""
import contextlib, functools, inspect, io, json, os, pathlib, tempfile, types

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image, Markdown, display

import sgu
from style import COLOUR, FORGET, MARKER, QUICK, TITLE, frame

RESULTS, DATA = pathlib.Path("results"), pathlib.Path(os.environ.get("SGU_DATA_ROOT", "../data"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORDER = ("standard", "orthogonal", "obtuse", "unseen")            # as in the paper's tables
ALL = (*ORDER[:3], "relative", "unseen")                          # with ours


def say(text):
    """Show Markdown."""
    display(Markdown(text))


def source(*functions):
    """Show functions as they stand in the file."""
    say("```python\n" + "\n\n".join(inspect.getsource(f).rstrip() for f in functions) + "\n```")


def show(rows, titles, framed=None, columns=None, size=0.62):
    """rows: lists of images (C, H, W) uint8, one title each; framed[r][c]: an image to forget gets a frame; columns: text above."""
    n = max(map(len, rows))
    fig, axes = plt.subplots(len(rows), n, figsize=(size * n + 1.2, size * len(rows)), squeeze=False,
                             gridspec_kw=dict(wspace=0.06, hspace=0.06))
    for r, row in enumerate(rows):
        for c, ax in enumerate(axes[r]):
            ax.set_visible(c < len(row))
            if c < len(row):
                ax.imshow(row[c][0] if len(row[c]) == 1 else np.moveaxis(np.asarray(row[c]), 0, 2), vmin=0, vmax=255)
                frame(ax, *((FORGET, 2.5) if framed is not None and framed[r][c] else ("0.75", 0.7)))
            if r == 0 and columns:
                ax.set_title(columns[c], fontsize=7.5, fontweight="normal", loc="center", pad=3)
        axes[r][0].set_ylabel(titles[r], rotation=0, ha="right", va="center", fontsize=8.5)
    plt.show()


def without_repeats(paper):
    """The paper's rows; with one class alone its total says the same again, so it is left out."""
    return {k: row for k, row in paper.items() if k != "total" or len(set(paper) - {"total", "D_g", "D_f"}) > 1}


def beside(results, paper, title):
    """Ours (filled, 95% interval or standard error) beside the paper's numbers (open). results: of sgu.run, or None."""
    paper = without_repeats(paper)
    groups = [("unlearning ratio, %", [k for k in paper if k not in ("D_g", "D_f")]), ("NLL, bits/dim", [k for k in paper if k in ("D_g", "D_f")])]
    groups = [g for g in groups if g[1]]
    shown = (*ORDER, "relative") if results and "relative" in results["methods"] else ORDER
    fig, axes = plt.subplots(1, len(groups), figsize=(4.6 * len(groups), 2.8), squeeze=False)
    for ax, (label, keys) in zip(axes[0], groups):
        for i, key in enumerate(keys):
            for j, m in enumerate(shown):
                x = i + 0.17 * (j - 1.5)
                if m in ORDER:
                    ax.plot(x - 0.03, paper[key][j], MARKER[m], mfc="none", mec=COLOUR[m], ms=6)
                mine = results and results["methods"].get(m, {})
                if mine and label.startswith("unl") and key in mine.get("unlearning_ratio", {}):
                    value, n = mine["unlearning_ratio"][key], mine["unlearning_ratio"]["n"]
                    lo, hi = sgu.wilson(round(value * n), n)
                    ax.errorbar(x + 0.03, 100 * value, [[max(0, 100 * (value - lo))], [max(0, 100 * (hi - value))]],
                                fmt=MARKER[m], color=COLOUR[m], ms=5, lw=1)
                if mine and label.startswith("NLL") and "nll_bits_per_dim" in mine:
                    nll = mine["nll_bits_per_dim"]
                    ax.errorbar(x + 0.03, nll[key], nll["se"][key] or 0, fmt=MARKER[m], color=COLOUR[m], ms=5, lw=1)
        ax.set_xticks(range(len(keys)), labels=keys)
        ax.set_title(label)
        ax.grid(axis="y")
        if label.startswith("unl"):
            ax.set_ylim(bottom=-0.5)                                       # a ratio of nothing is at nothing
    for m in shown:
        axes[0][0].plot([], [], MARKER[m], color=COLOUR[m], label=TITLE[m])
    axes[0][0].plot([], [], "o", mfc="none", mec="0.4", label="open: the paper")
    fig.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7.5)
    if len(groups) > 1 and max(paper["D_f"]) > 3 * min(paper["D_g"]):
        axes[0][1].set_yscale("log")
        axes[0][1].set_yticks((2, 3, 5, 10, 15), labels=("2", "3", "5", "10", "15"))
        axes[0][1].minorticks_off()
    fig.suptitle(title + ("" if results else ": the paper's row; no row of ours is committed"), x=0.02, ha="left", fontsize=10)
    fig.tight_layout()
    plt.show()


def paper_rows(paper):
    """The paper's numbers alone, as a table."""
    say("| the paper | " + " | ".join(TITLE[m] for m in ORDER) + " |\n|---|" + "---:|" * 4 + "\n" + "\n".join(
        f"| {k} | " + " | ".join(f"{v:.{2 if k in ('D_g', 'D_f') else 1}f}" for v in row) + " |" for k, row in without_repeats(paper).items()))


def measured(path, table=None, task="", title="Measured"):
    """Show a results file: its table beside the paper's (2 or 5), and the run's picture where it is committed: samples of every method from the
    same noise, or the strips of task inpaint or reconstruct. Returns its content."""
    results = json.loads(path.read_text())
    say(f"**{title}** (`notebooks/results/{path.name}`):\n\n" + sgu.make_table(results, table))
    if (picture := path.with_name(path.stem + (f"-{task}" if task else "") + ".png")).exists():
        what = "test images, then what every method makes of them; framed: images to forget" if task else "samples of every method; framed: what the judge calls forgotten"
        display(Image(filename=str(picture), alt=what))
    return results


def results_with(task):
    """The committed results files in which a method did the task: path -> its content."""
    found = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    return {path: r for path, r in found.items() if any(task in m for m in r.get("methods", {}).values() if isinstance(m, dict))}


def committed(dataset, sde, table, title, command):
    """Show our committed results of this data set and schedule beside the paper's Table 2 or 5, or say that there are none. Returns them or None."""
    paper = sgu.PAPER[table][dataset, sde]
    files, wanted = [], set(paper) - {"total", "D_g", "D_f"}
    for path in sorted(RESULTS.glob("*.json"), key=lambda p: (len(p.name), p.name)):
        config = json.loads(path.read_text()).get("config", {})
        same = (pathlib.Path(str(config.get("dataset"))).stem, config.get("sde")) == (dataset, sde)
        if same and set(str(config.get("forget")).split(",")) == wanted:
            files.append(path)
    results = measured(files[0], table) if files else None
    if results:
        if files[1:]:
            say(f"Also there: {', '.join(f'`{f.name}`' for f in files[1:])}.")
    else:
        say(f"**No result of ours for {title} is committed.** `{command}` makes it. The paper's row alone:")
        paper_rows(paper)
    beside(results, paper, title)
    return results


def digit_models(methods=ALL):
    """Networks of the digits, by method: the committed ones and MNIST where it is in DATA, else small ones made here on digits drawn from fonts.

    Returns a namespace: data (of sgu.choose), networks, scores, sde, judge, losses (method -> rows of step, keep, forget), the test images
    kept and gone with kept_labels and gone_labels, and forgotten(images) -> bool, what the judge calls a 3 or a 7.
    """
    paths, judge_path = {m: RESULTS / f"mnist_{m}.pt" for m in methods}, RESULTS / "mnist_judge.pt"
    with tempfile.TemporaryDirectory() as folder:
        if any(DATA.glob("MNIST/raw/t10k-labels*")) and all(path.exists() for path in paths.values()):
            data = sgu.choose(sgu.load_data("mnist", DATA), "3,7")
            say("**Models:** the MNIST checkpoints in `notebooks/results`; **images:** MNIST.")
        else:
            size = dict(steps=60, unlearn_steps=10) if QUICK else dict(steps=500, unlearn_steps=60)
            images, labels = sgu.draw_glyphs(1200 if QUICK else 6000, seed=0)
            np.savez(folder + "/glyphs.npz", images=images[:, 0].numpy(), labels=labels.numpy())
            sgu.PRESETS["glyphs", "cpu"].update(channels=(16, 32), judge=(8, 10 if QUICK else 8))              # smaller than small
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                sgu.run(sgu.Options(dataset=folder + "/glyphs.npz", forget="3,7", sde="ve", batch_size=32, samples=10, sampler_steps=4,
                                    tasks="sample", methods=",".join(methods), device="cpu", out=folder + "/run", **size))
            data = sgu.choose(sgu.load_data(folder + "/glyphs.npz"), "3,7")
            paths, judge_path = {m: pathlib.Path(folder, "run", f"{m}.pt") for m in methods}, pathlib.Path(folder, "run/judge.pt")
            say(f"**A demonstration, not a result:** networks made here in {size['steps']} steps on digits drawn from fonts. For the MNIST models, "
                "get the images: `python -c \"import sgu; sgu.load_data('mnist', 'data')\"` in the repository's top folder.")
        loaded, judge = {m: sgu.load_model(path, DEVICE) for m, path in paths.items()}, sgu.load_judge(judge_path, DEVICE)
        losses = {m: sgu.read_checkpoint(path)["losses"] for m, path in paths.items()}
    sde, is_gone = loaded[methods[0]][1], sgu.is_forgotten(data, "test")
    kept, gone, kept_labels, gone_labels = (data[key][mask] for key in ("test", "test_labels") for mask in (~is_gone, is_gone))
    checked = sgu.opinions(judge, data["test"][:2000])[0].argmax(1) == data["test_labels"][:2000]
    say(f"The judge of this notebook is right on {100 * float(checked.float().mean()):.1f}% of {len(checked)} test images.")
    return types.SimpleNamespace(data=data, networks={m: model for m, (model, _) in loaded.items()}, scores={m: sgu.make_score(model, sde) for m, (model, _) in loaded.items()},
                                 sde=sde, judge=judge, losses=losses, kept=kept, gone=gone, kept_labels=kept_labels, gone_labels=gone_labels,
                                 forgotten=functools.partial(sgu.shows_forgotten, judge, data))


def demonstrate(images, labels, names, forget, attributes=False, **options):
    """sgu.run at tiny size on some images (N, H, W, 3) uint8 -> results, samples, restored pictures, losses. Nothing of it is a result."""
    with tempfile.TemporaryDirectory() as folder:
        kind = "attribute" if attributes else "class"
        np.savez(folder + "/demo.npz", images=images, **{"attributes" if attributes else "labels": labels, f"{kind}_names": names})
        for side in (32, 64):
            sgu.PRESETS[side, "cpu"].update(channels=(16, 32) if side == 32 else (16, 32, 48), judge=(8, 2 if QUICK else 10))
        size = dict(steps=10, unlearn_steps=3, batch_size=16, samples=10, sampler_steps=4, likelihood_samples=2) if QUICK else \
               dict(steps=300, unlearn_steps=40, batch_size=32, lr=4e-3, samples=24, sampler_steps=25, likelihood_samples=4)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            results = sgu.run(sgu.Options(dataset=folder + "/demo.npz", forget=forget, methods="standard,unseen,orthogonal,obtuse",
                                          device="cpu", out=folder + "/run", **{**size, **options}))
        load = lambda kind: {m: dict(np.load(path)) for m in ORDER if os.path.exists(path := f"{folder}/run/{kind}_{m}.npz")}
        samples = {m: torch.from_numpy(z["images"]) for m, z in load("samples").items()}
        judge = sgu.load_judge(folder + "/run/judge.pt")
        data = sgu.choose(sgu.load_data(folder + "/demo.npz"), forget)
        framed = {m: sgu.shows_forgotten(judge, data, x) for m, x in samples.items()}
        losses = {m: np.array(sgu.read_checkpoint(path)["losses"]) for m in ORDER if os.path.exists(path := f"{folder}/run/{m}.pt")}
        strips = {}
        for m, z in load("inpaint").items():
            gone = sgu.is_forgotten(data, "test")
            originals = [data["test"][mask][:len(z[key])] for key, mask in (("D_g", ~gone), ("D_f", gone))]
            strips["original"] = torch.cat(originals)
            strips["masked"] = (strips["original"] * sgu.upper_half_hidden(data["test"])).byte()
            strips[m] = torch.from_numpy(np.concatenate([z["D_g"], z["D_f"]]))
            strips["framed"] = [False] * len(originals[0]) + [True] * len(originals[1])
        return results, samples, framed, strips, losses


def demo_table(results):
    """sgu.make_table without its first line, which names a temporary file."""
    say("**A demonstration at tiny size, not a result:**\n\n" + sgu.make_table(results).split("\n", 1)[1])


def draw_losses(losses):
    fig, axes = plt.subplots(1, 2, figsize=(7.6, 2.5))
    for m, l in losses.items():
        axes[0].plot(l[:, 0], l[:, 1], color=COLOUR[m], marker=MARKER[m], ms=3, label=TITLE[m])
        if sgu.METHODS[m][1]:
            axes[1].plot(l[:, 0], l[:, 2], color=COLOUR[m], marker=MARKER[m], ms=3)
    axes[0].set(yscale="log", xlabel="step", title="keep loss (Eq. 8), weighted")
    axes[1].set(xlabel="step of the fine-tuning", title="forget loss (Eq. 9, 10), weighted")
    axes[1].axhline(0, color="0.7", lw=0.7)
    axes[0].set_yticks((0.4, 0.6, 0.8, 1, 2), labels=("0.4", "0.6", "0.8", "1", "2"))
    axes[0].minorticks_off()
    axes[0].legend()
    fig.tight_layout()
    plt.show()


def coloured(n, side, seed=0):
    """The embedded glyphs, each in a colour of its own on a dark ground: images (n, side, side, 3) uint8, labels (n,)."""
    x, y = sgu.draw_glyphs(n, seed, side)
    colour = 0.35 + 0.65 * torch.rand(n, 1, 1, 3, generator=torch.Generator().manual_seed(seed))
    return (x.permute(0, 2, 3, 1) * colour + 12).clamp(0, 255).byte().numpy(), y.numpy()
