"""What several notebooks share: pictures, tables of committed results, the digit models. Nothing of
the method: that is sgu.py."""
import functools, inspect, json, os, pathlib, textwrap, types

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown, display

import sgu
from make import PAPER, interval, results_table
from style import COLOUR, FORGET, MARKER, TITLE, frame

RESULTS, DATA = pathlib.Path("results"), pathlib.Path(os.environ.get("SGU_DATA_ROOT", "../data"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORDER = tuple(PAPER["columns"])                                   # as in the paper's tables
ALL = (*ORDER[:3], "relative", "unseen")                          # with ours


def say(text):
    """Show Markdown."""
    display(Markdown(text))


def source(*functions):
    """Show functions as they stand in the file; lines are wrapped at 100 columns."""
    lines = "\n\n".join(inspect.getsource(f).rstrip() for f in functions).splitlines()
    say("```python\n" + "\n".join(wrapped(line) for line in lines) + "\n```")


def wrapped(line, width=100):
    """A line of code in pieces of at most width columns, the later ones further in."""
    inner = " " * (len(line) - len(line.lstrip()) + 8)
    parts = textwrap.wrap(line, width, subsequent_indent=inner, break_long_words=False,
                          break_on_hyphens=False)
    return "\n".join(parts)


def read(path):
    """The content of a results file."""
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


def show(rows, titles, framed=None, columns=None, size=0.62):
    """rows: lists of images (C, H, W) uint8, one title each; framed[r][c]: an image to forget gets
    a frame; columns: text above."""
    n = max(map(len, rows))
    fig, axes = plt.subplots(len(rows), n, figsize=(size * n + 1.2, size * len(rows)),
                             squeeze=False, gridspec_kw=dict(wspace=0.06, hspace=0.06))
    for r, row in enumerate(rows):
        for c, ax in enumerate(axes[r]):
            ax.set_visible(c < len(row))
            if c < len(row):
                image = np.moveaxis(np.asarray(row[c]), 0, 2)
                ax.imshow(image[:, :, 0] if image.shape[2] == 1 else image, vmin=0, vmax=255)
                to_forget = framed is not None and framed[r][c]
                frame(ax, *((FORGET, 2.5) if to_forget else ("0.75", 0.7)))
            if r == 0 and columns:
                ax.set_title(columns[c], fontsize=7.5, fontweight="normal", loc="center", pad=3)
        axes[r][0].set_ylabel(titles[r], rotation=0, ha="right", va="center", fontsize=8.5)
    plt.show()


def percent(k, n):
    """k of n in per cent with its 95% interval, for a table."""
    lo, hi = sgu.wilson(k, n)
    return f"{100 * k / n:.1f} [{100 * lo:.1f}, {100 * hi:.1f}]"


def without_repeats(paper):
    """The paper's rows; with one class alone its total says the same again, so it is left out."""
    classes = set(paper) - {"total", "D_g", "D_f"}
    return {k: row for k, row in paper.items() if k != "total" or len(classes) > 1}


def task_table(task, table, found):
    """One table of a task (inpaint or reconstruct) over all data sets: the paper's rows (table 3 or
    4) and ours, found: {path: content}. Below it the strips of every run, as links."""
    names = [*ORDER[:3], "relative", ORDER[3]]
    lines = ["| accuracy, % [95%]; distance | " + " | ".join(TITLE[m] for m in names) + " |",
             "|---|" + "---:|" * len(names)]
    for data, rows in PAPER[table].items():
        for key in ("D_g", "D_f"):
            cells = dict(zip(ORDER, map(str, rows[key])))
            for m, distance in zip(ORDER, rows.get(f"distance {key}", ())):
                cells[m] += f"; {distance:.2f}"
            lines.append(f"| the paper: {data}, {key} | "
                         + " | ".join(cells.get(m, "") for m in names) + " |")
    for path, results in found.items():
        for key in ("D_g", "D_f"):
            cells = []
            for m in names:
                entry = results["methods"].get(m, {}).get(task, {}).get(key)
                cells.append("" if entry is None else interval(entry["accuracy"], entry["ci95"])
                             + f"; {entry['distance']:.2f}")
            lines.append(f"| {path.stem}, {key} | " + " | ".join(cells) + " |")
    say("\n".join(lines) + "\n\nDistance: of the features of the restored image from those of the "
        "original, in CLIP (the paper) or in our judge of that run. Images restored: " + ", ".join(
            f"[{path.stem}](<{path.with_name(path.stem + f'-{task}.png')}>)" for path in found
            if path.with_name(path.stem + f"-{task}.png").exists()) + ".")


def paper_rows(paper):
    """The paper's numbers alone, as a table."""
    lines = ["| the paper | " + " | ".join(TITLE[m] for m in ORDER) + " |", "|---|" + "---:|" * 4]
    for key, row in without_repeats(paper).items():
        digits = 2 if key in ("D_g", "D_f") or "distance" in key else 1
        row = row if isinstance(row, list) else [row]
        lines.append(f"| {key} | " + " | ".join(f"{v:.{digits}f}" for v in row) + " |")
    say("\n".join(lines))


def beside(results, paper, title):
    """Ours (filled, 95% interval or standard error) beside the paper's numbers (open). results: of
    sgu.run, or None."""
    paper, bits = without_repeats(paper), ("D_g", "D_f")
    groups = [("unlearning ratio, %", [k for k in paper if k not in bits]),
              ("NLL, bits/dim", [k for k in paper if k in bits])]
    groups = [group for group in groups if group[1]]
    methods = results["methods"] if results else {}
    shown = (*ORDER, "relative") if "relative" in methods else ORDER
    fig, axes = plt.subplots(1, len(groups), figsize=(4.6 * len(groups), 2.8), squeeze=False)
    for ax, (label, keys) in zip(axes[0], groups):
        for i, j in [(i, j) for i in range(len(keys)) for j in range(len(shown))]:
            key, m, x = keys[i], shown[j], i + 0.17 * (j - 1.5)
            if m in ORDER:
                ax.plot(x - 0.03, paper[key][j], MARKER[m], mfc="none", mec=COLOUR[m], ms=6)
            look = dict(fmt=MARKER[m], color=COLOUR[m], ms=5, lw=1)
            ratio = methods.get(m, {}).get("unlearning_ratio", {})
            nll = methods.get(m, {}).get("nll_bits_per_dim", {})
            if key in bits and key in nll:
                ax.errorbar(x + 0.03, nll[key], nll["se"][key] or 0, **look)
            elif key in ratio:
                value, n = ratio[key], ratio["n"]
                lo, hi = sgu.wilson(round(value * n), n)
                ends = [[max(0, 100 * (value - lo))], [max(0, 100 * (hi - value))]]
                ax.errorbar(x + 0.03, 100 * value, ends, **look)
        ax.set_xticks(range(len(keys)), labels=keys)
        ax.set_title(label)
        ax.grid(axis="y")
        if label.startswith("unl"):
            ax.set_ylim(bottom=-0.5)                              # a ratio of nothing is at nothing
    for m in shown:
        axes[0][0].plot([], [], MARKER[m], color=COLOUR[m], label=TITLE[m])
    axes[0][0].plot([], [], "o", mfc="none", mec="0.4", label="open: the paper")
    fig.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7.5)
    if len(groups) > 1 and max(paper["D_f"]) > 3 * min(paper["D_g"]):
        axes[0][1].set_yscale("log")
        axes[0][1].set_yticks((2, 3, 5, 10, 15), labels=("2", "3", "5", "10", "15"))
        axes[0][1].minorticks_off()
    title += "" if results else ": the paper's row; no row of ours is committed"
    fig.suptitle(title, x=0.02, ha="left", fontsize=10)
    fig.tight_layout()
    plt.show()


def measured(path, table=None, title="Measured"):
    """Show a results file: its table beside the paper's (2 or 5), without the tasks of notebooks 05
    and 06, and the run's picture of samples where it is committed. Returns its content."""
    results = read(path)
    say(f"**{title}** (`notebooks/results/{path.name}`):\n\n" + results_table(results, table, ()))
    picture, what = path.with_suffix(".png"), "Samples; framed: what the judge calls forgotten"
    if picture.exists():
        say(f"![{what}](<{picture}>)\n\n*{what}.*")              # a link: it is stored once
    return results


def results_with(task):
    """The committed results files in which a method did the task: path -> its content."""
    found = {path: read(path) for path in sorted(RESULTS.glob("*.json"))}
    return {path: r for path, r in found.items()
            if any(task in m for m in r.get("methods", {}).values() if isinstance(m, dict))}


def committed(dataset, sde, table, title, command):
    """Show our committed results of this data set and schedule beside the paper's Table 2 or 5, or
    say that there are none. Returns them or None."""
    paper = PAPER[str(table)][f"{dataset},{sde}"]
    files, wanted = [], set(paper) - {"total", "D_g", "D_f"}
    for path in sorted(RESULTS.glob("*.json"), key=lambda path: (len(path.name), path.name)):
        config = read(path).get("config", {})
        same = (pathlib.Path(str(config.get("dataset"))).stem, config.get("sde")) == (dataset, sde)
        if same and set(str(config.get("forget")).split(",")) == wanted:
            files.append(path)
    results = measured(files[0], table) if files else None
    if files[1:]:
        say(f"Also there: {', '.join(f'`{f.name}`' for f in files[1:])}.")
    if not files:
        say(f"**No result of ours for {title} is committed.** `{command}` makes it. The paper's:")
        paper_rows(paper)
    beside(results, paper, title)
    return results


def digit_models(methods=ALL):
    """The committed networks of MNIST, by method, and images: MNIST where it is in DATA, else the
    2,000 of its test digits that come with this repository, half of them in the place of its
    training images.

    Returns a namespace: data (of sgu.choose), networks, scores, sde, judge, the test images kept
    and gone with kept_labels and gone_labels, and forgotten(images) -> bool, what the judge calls a
    3 or a 7.
    """
    if any(DATA.glob("MNIST/raw/t10k-labels*")):
        data, words = sgu.load_data("mnist", DATA), "MNIST"
    else:
        data, words = sgu.load_data(str(RESULTS / "mnist_digits.npz")), "2,000 test digits of MNIST"
    data = sgu.choose(data, "3,7")
    paths = {m: RESULTS / f"mnist_{m}.pt" for m in methods}
    loaded = {m: sgu.load_model(path, DEVICE) for m, path in paths.items()}
    judge = sgu.load_judge(RESULTS / "mnist_judge.pt", DEVICE)
    right = sgu.opinions(judge, data["test"][:1000])[0].argmax(1) == data["test_labels"][:1000]
    say(f"**Models:** the MNIST networks in `notebooks/results`; **images:** {words}. The judge "
        f"names {100 * float(right.float().mean()):.1f}% of {len(right)} test images rightly.")
    is_gone = sgu.is_forgotten(data, "test")
    images = {name: (data["test"][mask], data["test_labels"][mask])
              for name, mask in (("kept", ~is_gone), ("gone", is_gone))}
    return types.SimpleNamespace(
        data=data, judge=judge, sde=loaded[methods[0]][1],
        forgotten=functools.partial(forgotten, judge, data),
        networks={m: model for m, (model, _) in loaded.items()},
        scores={m: sgu.make_score(*pair) for m, pair in loaded.items()},
        kept=images["kept"][0], gone=images["gone"][0],
        kept_labels=images["kept"][1], gone_labels=images["gone"][1])


def forgotten(judge, data, images):
    """(N,) bool: which images (N, C, H, W) uint8 the judge calls one of the classes to forget."""
    return torch.isin(sgu.opinions(judge, images)[0].argmax(1), torch.tensor(data["forget"]))


def coloured(n, side, seed=0):
    """The embedded glyphs, each in a colour of its own on a dark ground: images (n, 3, side, side)
    uint8, labels (n,)."""
    x, y = sgu.draw_glyphs(n, seed, side)
    colour = 0.35 + 0.65 * torch.rand(n, 3, 1, 1, generator=torch.Generator().manual_seed(seed))
    return (x * colour + 12).clamp(0, 255).byte(), y
