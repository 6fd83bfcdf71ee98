"""What several notebooks share: pictures, committed results as figures and tables, the MNIST models,
code in the text. Nothing of the method: that is sgu.py."""
import ast, functools, importlib, inspect, math, os, pathlib, re, textwrap, types

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown, display

import sgu
from make import DATA as NAMES, ORDER as SHOWN
from make import PAPER, interval, read_results as read, table_text
from style import COLOUR, FORGET, MARKER, TITLE, frame, plain_ticks

RESULTS, DATA = pathlib.Path("results"), pathlib.Path(os.environ.get("SGU_DATA_ROOT", "../data"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORDER = tuple(PAPER["columns"])                                   # what the paper has
ALL = SHOWN[:-1]                                                  # with ours: the shipped networks


def say(text):
    """Show Markdown."""
    display(Markdown(text))


def table(head, rows):
    """Show a table: the titles of its columns, and rows of cells, the first of them words."""
    say(table_text(head, rows))


def read_with(name, other, **methods):
    """A results file whose methods also have some of another: read_with("a", "b", unseen="standard")
    adds what b calls standard as unseen."""
    results, more = read(name), read(other)["methods"]
    results["methods"].update({ours: more[theirs] for ours, theirs in methods.items()})
    return results


def percent(k, n):
    """k of n in per cent with its 95% interval, for a table."""
    return interval(k / n, sgu.wilson(k, n))


# ==== 1. Code in the text of a notebook ===========================================================

def code(names):
    """The source of 'module.name module.name' as one block of Markdown, without docstrings: the
    text around it says what they say."""
    parts = []
    for word in names.split():
        module, name = word.split(".", 1)
        thing = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        lines = textwrap.dedent(inspect.getsource(thing)).rstrip().splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            first = node.body[0] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines[first.lineno - 1:first.end_lineno] = [None] * (
                    first.end_lineno - first.lineno + 1)
        parts.append("\n".join(line for line in lines if line is not None))
    return "```python\n" + "\n\n".join(parts) + "\n```"


def with_code(text):
    """The text of a Markdown cell, every block below a comment <!-- code: module.name ... -->
    written anew: make.py can call it, and a test compare."""
    def fresh(match):
        return f"{match[1]}\n{code(match[2])}"
    return re.sub(r"(<!-- code: ([\w. ]+) -->)\n```python\n.*?\n```", fresh, text, flags=re.S)


# ==== 2. Pictures =================================================================================

def show(rows, titles, framed=None, columns=None, size=0.58):
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


def legend(fig, methods, more=(), columns=8):
    """One legend below a figure of constrained layout: the methods, and more: (label, look)."""
    looks = [(TITLE[m], dict(marker=MARKER[m], color=COLOUR[m])) for m in methods] + list(more)
    handles = [plt.Line2D([], [], **dict(dict(ls="", ms=5), **look), label=label)
               for label, look in looks]
    fig.legend(handles=handles, loc="outside lower center", ncol=columns, fontsize=7.5,
               columnspacing=1.2, handletextpad=0.3)


OPEN = [("open: the paper", dict(marker="o", color="0.4", mfc="none")),
        ("full: ours, 95%", dict(marker="o", color="0.4"))]


def dodge(methods):
    """Where the methods of one tick stand: {method: shift}."""
    return {m: 0.13 * (j - (len(methods) - 1) / 2) for j, m in enumerate(methods)}


def point(ax, x, value, method, ends=None):
    """One measured share in per cent with its interval, or, without ends, the paper's, open."""
    if ends is None:
        ax.plot(x, value, MARKER[method], mfc="none", mec=COLOUR[method], ms=5.5)
    else:
        bars = [[max(0, value - ends[0])], [max(0, ends[1] - value)]]
        ax.errorbar(x, value, bars, fmt=MARKER[method], color=COLOUR[method], ms=5, lw=0.9)


def without_repeats(paper):
    """The paper's rows; with one class alone its total says the same again, so it is left out."""
    classes = set(paper) - {"total", "D_g", "D_f"}
    return {k: row for k, row in paper.items() if k != "total" or len(classes) > 1}


def beside(results, paper, title):
    """Ours (full, with 95% intervals, for the NLL two standard errors) beside the paper's numbers
    (open). results: of sgu.run; paper: rows of PAPER."""
    paper, bits = without_repeats(paper), ("D_g", "D_f")
    groups = [("unlearning ratio, %", [k for k in paper if k not in bits]),
              ("NLL, bits/dim", [k for k in paper if k in bits])]
    groups, methods = [group for group in groups if group[1]], results["methods"]
    shown = [m for m in SHOWN if m in methods or m in ORDER]
    at = dodge(shown)
    fig, axes = plt.subplots(1, len(groups), figsize=(4.6 * len(groups), 2.9), squeeze=False,
                             layout="constrained")
    for ax, (label, keys) in zip(axes[0], groups):
        for i, key in enumerate(keys):
            for m, value in zip(ORDER, paper[key]):
                point(ax, i + at[m] - 0.03, value, m)
            for m in methods:
                ratio, nll = (methods[m].get(k, {}) for k in ("unlearning_ratio",
                                                              "nll_bits_per_dim"))
                if key in nll:
                    error = 2 * (nll["se"][key] or 0)
                    point(ax, i + at[m] + 0.03, nll[key], m, (nll[key] - error, nll[key] + error))
                elif key in ratio:
                    ends = sgu.wilson(round(ratio[key] * ratio["n"]), ratio["n"])
                    point(ax, i + at[m] + 0.03, 100 * ratio[key], m, [100 * v for v in ends])
        names = dict(D_g="D_g, to keep", D_f="D_f, to forget", total="in all")
        ax.set_xticks(range(len(keys)), labels=[names.get(key, key) for key in keys])
        ax.set_title(label)
        ax.grid(axis="y")
        if label.startswith("unl"):
            ax.set_ylim(bottom=-0.5)                              # a ratio of nothing is at nothing
    if len(groups) > 1 and max(paper["D_f"]) > 3 * min(paper["D_g"]):
        axes[0][1].set_yscale("log")
        plain_ticks(axes[0][1].yaxis, (2, 3, 5, 10, 15, 25, 50, 100))
    title += "" if results else ": the paper's row alone"
    fig.suptitle(title, x=0.02, ha="left", fontsize=10)
    legend(fig, shown, OPEN, 4)
    plt.show()


def task_figure(task, table, names, columns=4):
    """The accuracy that is left after inpaint or reconstruct, on images to keep and to forget: a
    panel for every row of the paper's table (3 or 4) and one for each of our results files."""
    panels = []                                                   # title, {(method, set): share}
    for data, rows in PAPER[table].items():
        shares = {(m, key): (value, None) for key in ("D_g", "D_f")
                  for m, value in zip(ORDER, rows[key])}
        panels.append((f"the paper:\n{NAMES[data.split(',')[0]]}", shares))
    for name in names:
        found = {m: e[task] for m, e in read(name)["methods"].items() if task in e}
        shares = {(m, key): (100 * e[key]["accuracy"], [100 * v for v in e[key]["ci95"]])
                  for m, e in found.items() for key in ("D_g", "D_f")}
        data, n = name.partition("-")[0], next(iter(found.values()))["D_f"]["n"]
        panels.append((f"ours, n = {n}:\n{NAMES.get(data, data)}", shares))
    shown = [m for m in SHOWN if any((m, "D_f") in shares for _, shares in panels)]
    height, at = math.ceil(len(panels) / columns), dodge(shown)
    fig, axes = plt.subplots(height, columns, figsize=(9.4, 0.5 + 2.1 * height), sharey=True,
                             squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels):]:
        ax.set_visible(False)
    for ax, (title, shares) in zip(axes.flat, panels):
        for (m, key), (value, ends) in shares.items():
            point(ax, (key == "D_f") + at[m], value, m, ends)
        ax.set_xticks([0, 1], labels=["D_g", "D_f"])
        ax.set(xlim=(-0.5, 1.5), ylim=(-3, 103))
        ax.set_title(title, fontsize=8)
        ax.grid(axis="y")
        ax.axvline(0.5, color="0.85", lw=0.7)
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy, %")
    legend(fig, shown, OPEN)
    plt.show()


# ==== 3. The MNIST networks that come with this repository ========================================

def digit_models(methods=ALL, shipped=False):
    """The committed networks of MNIST, by method, and images: MNIST where it is in DATA, else (or
    with shipped) the 2,000 of its test digits that come with this repository, half of them in the
    place of its training images.

    Returns a namespace: data (of sgu.choose), networks, scores, sde, judge, the test images kept
    and gone with kept_labels and gone_labels, and forgotten(images) -> bool, what the judge calls a
    3 or a 7.
    """
    if any(DATA.glob("MNIST/raw/t10k-labels*")) and not shipped:
        data, words = sgu.load_data("mnist", DATA), "MNIST"
    else:
        data, words = sgu.load_data(str(RESULTS / "mnist_digits.npz")), "2,000 test digits of MNIST"
    data = sgu.choose(data, "3,7")
    paths = {m: RESULTS / f"mnist_{m}.pt" for m in methods}
    loaded = {m: sgu.load_model(path, DEVICE) for m, path in paths.items()}
    judge = sgu.load_judge(RESULTS / "mnist_judge.pt", DEVICE)
    right = sgu.opinions(judge, data["test"][:1000])[0].argmax(1) == data["test_labels"][:1000]
    say(f"**Models:** the MNIST networks in `notebooks/results`; **images:** {words}. The judge "
        f"names {100 * float(right.float().mean()):.1f}% of {len(right)} test images correctly.")
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


def verdicts(judge, images, truth):
    """What a judge says of images (N, C, H, W) uint8 -> two (N,) bool: it names them rightly (None
    without truth); it says none of these, which is the class after all real ones."""
    said = sgu.opinions(judge, images)[0].argmax(1)
    return None if truth is None else said == truth, said == judge.config["classes"] - 1
