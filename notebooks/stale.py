"""Which of results/*.json would today's presets, recipes and stated commands not make?

    python notebooks/make.py stale

A results file says what made it: the command, the machine, and what the command filled in for the
options that it does not state. Here the same is derived from today's code, without any data, and
compared. What a notebook writes bears a number of its code (sign).
"""
import functools, json, pathlib, re, shlex, zlib

import rivals                                                  # adds its methods to sgu.METHODS
import sgu
import toy_gmm
from make import PAGES, here, read_results

IMAGES = dict(glyphs=(1, 28), mnist=(1, 28), fashion=(1, 28), kmnist=(1, 28), cifar10=(3, 32),
              stl10=(3, 64), celeba=(3, 64))                   # channels, side


def preset_of(size, device="cpu"):
    return dict(zip(sgu.COLUMNS, sgu.PRESETS[size, device]))


def recipe_of(method, opt, steps, lr):
    """What the command notes of a method's training; see get_model of sgu.py."""
    how = sgu.METHODS[method]
    if sgu.from_standard(method, opt):
        steps, lr = opt.unlearn_steps or max(1, round(how.share * steps)), lr * how.pace
    alpha = how.alpha if opt.alpha is None else opt.alpha
    window = how.window if opt.recipe == "balanced" else sgu.EVERY_SIGMA
    return dict(alpha=alpha if how.loss else None, steps=steps, lr=lr, window=window)


def of_command(results, words):
    """What a results file of python sgu.py says today; see resolve there, which loads the data.
    What the command states is taken as it is, and so is the machine."""
    opt = sgu.parse_options(words)
    name, device = pathlib.Path(opt.dataset).stem, results["config"]["device"]
    if name not in IMAGES:
        raise ValueError(f"the size of the images of {name} is not known")
    (channels, side), (forget, sde, *_) = IMAGES[name], sgu.DATASETS.get(opt.dataset, ("", "vp"))
    opt.device = device if opt.device == "auto" else opt.device
    sgu.fill_in(opt, channels, side, results["device"])
    config = dict(vars(opt), sde=opt.sde or sde, forget=forget)
    methods = opt.methods.split(",")
    if "standard" in methods or any(sgu.from_standard(m, opt) for m in methods):
        methods = [*dict.fromkeys(["standard", *methods])]
    config["methods"] = ",".join(methods)
    recipes = {m: dict(recipe=recipe_of(m, opt, config["steps"], config["lr"])) for m in methods}
    for key in ("out", "data_root", "fresh"):                  # where files lie
        del config[key]
    if opt.forget:
        del config["forget"]                                   # classes may be noted by their names
    if opt.pretrained:
        del config["network"], recipes["standard"]             # another run's
    return dict(data=name, config=config, methods=recipes)


def of_toy(results, words):
    """What a results file of python toy_gmm.py says today."""
    opt = toy_gmm.parse_options(words)
    size = toy_gmm.QUICK if opt.quick else toy_gmm.FULL
    config = dict(size, seed=opt.seed, quick=opt.quick, data_std=toy_gmm.DATA_STD)
    methods = {m: dict(title=how.title, alpha=how.alpha) for m, how in toy_gmm.METHODS.items()}
    return dict(config=config, methods=methods)


def of_rivals(results, words):
    """What a results file of python notebooks/rivals.py says today."""
    name, = words
    shipped = {m: dict(recipe=entry["recipe"])                 # the networks that some start from
               for m, entry in read_results("mnist-3,7")["methods"].items()}
    if name in rivals.SIZE:
        size, settings = rivals.SIZE[name], rivals.SETTINGS[name]
        tuning = {m: [dict(alpha=alpha, lr=pace * size["lr"], steps=rivals.steps_of(m, size),
                           sigmas=window) for alpha, pace, window in rows]
                  for m, rows in settings.items()}
        methods = {m: dict(runs=[shipped[m] if name == "mnist" else {}] * 3)
                   for m in ("standard", "unseen")}
        return dict(config=dict(size, tuning_seed=rivals.TUNING_SEED, seeds=[0, 1, 2]),
                    tuning=tuning, methods=methods | {m: {} for m in settings})
    if name == "relearn":
        methods = ("unseen", "standard", *rivals.SETTINGS["mnist"])
        return dict(config=rivals.RELEARN, methods={m: {} for m in methods})
    if name == "samplers":
        return dict(config=dict(samplers=rivals.WALKS),
                    rows=[dict(shipped[m], method=m, sampler=sampler, steps=steps)
                          for sampler, steps in rivals.WALKS for m in rivals.DIGITS])
    if name == "flips":
        preset = preset_of(64)
        recipe = recipe_of("standard", sgu.Options(), preset["steps"], preset["lr"])
        return dict(config=rivals.FLIPS, rows=[dict(recipe=recipe)] * 2)
    opt, size = sgu.Options(), rivals.RECIPE
    lr = preset_of(28)["lr"]
    steps = {change: round(how[3] * size["steps"]) for change, how in rivals.CHANGES.items()}
    return dict(config=size, rows=[dict(change=change, recipe=recipe_of("unseen", opt, n, lr))
                                   for change, n in steps.items()])


def fingerprint(path, name):
    """A number that changes with a script, or with the code of a notebook; with the presets if they
    occur in it; and, where the results file that it wrote is named after MNIST, with the shipped
    networks."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    presets = {key: row for key, row in sgu.PRESETS.items() if "glyphs" not in key}
    text += repr(presets) if "preset" in text.lower() else ""  # no script trains on glyphs
    networks = sorted((here / "results").glob("mnist_*.pt")) if "mnist" in name else []
    return functools.reduce(lambda crc, network: zlib.crc32(network.read_bytes(), crc), networks,
                            zlib.crc32(text.encode()))


def sign(path, start):
    """Note in the results files that a notebook or script has written since start which code made
    them."""
    for file in (here / "results").glob("*.json"):
        results = read_results(file.stem)
        if file.stat().st_mtime >= start and path.name in results.get("command", ""):
            sgu.save_json(file, dict(results, code=fingerprint(path, file.stem)))


def differences(want, found, path=""):
    """Where a results file says otherwise than it would today, one line each."""
    if isinstance(want, list) and want and isinstance(want[0], dict):
        if isinstance(found, list) and len(found) != len(want):
            return [f"{path[1:]} has {len(found)} entries, today {len(want)}"]
        if isinstance(found, list):
            want, found = dict(enumerate(want)), dict(enumerate(found))
    if isinstance(want, dict) and isinstance(found, dict):
        return [line for key, value in want.items()
                for line in differences(value, found.get(key, "unknown"), f"{path} {key}")]
    if isinstance(want, dict) or found == "unknown":
        return [f"{path[1:]} is not recorded"]
    words = f"{path[1:]} is {str(found):.40}, today {str(want):.40}"
    return [words] if want != found else []


def why_stale(results, name=""):
    """Why today's code would not make what the results file of this name holds; '' if it would."""
    words = shlex.split(results.get("command", ""))
    makers = {"sgu.py": of_command, "toy_gmm.py": of_toy, "notebooks/rivals.py": of_rivals}
    try:
        if words[:1] == ["python"] and words[1] in makers:
            want = makers[words[1]](results, words[2:])
        else:                                                  # a notebook, or a script of its own
            file = next(word for word in words if word.endswith((".ipynb", ".py")))
            if "code" not in results:
                return "it does not say which code made it"
            same = results["code"] == fingerprint(here.parent / file, name)
            return "" if same else f"{file} has changed since, or what it uses"
    except (Exception, SystemExit) as error:                   # a command or a layout of the past
        return f"today's code cannot read how it was made ({type(error).__name__}: {error})"
    lines = differences(json.loads(json.dumps(want)), results)
    lines.sort(key=lambda line: line.endswith("is not recorded"))
    return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")


def main():
    """Print which results files are stale, why, and where they are quoted. 1 if any is, else 0."""
    texts, code = {page: page.read_text(encoding="utf-8") for page in PAGES}, 0
    for path in sorted((here / "results").glob("*.json")):
        why, name = why_stale(read_results(path.stem), path.stem), re.escape(path.stem)
        quotes = re.compile(rf"(?<![\w,.-]){name}(\.json|(-inpaint|-reconstruct)?\.png)\b"
                            rf"|<!-- (results|rows|seeds|number):[^>]*\s{name}\s")
        where = [page for page in texts if quotes.search(texts[page])]
        if why:
            names = ", ".join(str(page.relative_to(here.parent)) for page in where)
            print(f"{path.name}: {why}" + (f" [quoted in {names}]" if where else ""))
            code = 1 if where else code
    return code
