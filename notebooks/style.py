"""One look for all notebooks: thin lines, Okabe-Ito colours (safe for colour blindness), a marker
for every method (safe for black and white). Orange, FORGET, is for what is to be forgotten alone: no
method has it."""
import os

import matplotlib.pyplot as plt

QUICK = bool(int(os.environ.get("SGU_QUICK", "0")))    # SGU_QUICK=1: tiny, to see that all runs
KEEP, FORGET, GREY = "#0072B2", "#E69F00", "0.6"       # data to keep, to forget, what accompanies

METHODS = dict(             # name in results files: (title, colour, marker); their order in figures
    standard=("Standard", "#000000", "o"),
    orthogonal=("SGU-Orthogonal", "#0072B2", "^"),
    obtuse=("SGU-Obtuse", "#D55E00", "v"),
    obtuse_score=("SGU-Obtuse, score units", "#CC79A7", "D"),
    relative=("SGU-Relative", "#332288", "*"),
    unseen=("Unseen", "#009E73", "s"),
    finetune=("fine-tuning", "#999999", "P"),
    neggrad=("NegGrad+", "#DDCC77", ">"),
    siss=("SISS", "#F0E442", "p"),
    erasediff=("EraseDiff", "#882255", "X"),
    erasediff_zero=("EraseDiff, mean 0", "#661100", "x"),
    salun=("SalUn mask, obtuse", "#44AA99", "d"),
    fisher=("NegGrad+, Fisher", "#AA4499", "h"),
    vdu=("VDU, without D_g", "#117733", "1"),
    elementwise=("Elementwise", "#56B4E9", "<"),
    wrong_sign=("Obtuse, wrong sign", "#999933", "H"),
)
TITLE, COLOUR, MARKER = ({name: look[i] for name, look in METHODS.items()} for i in range(3))

plt.rcParams.update({
    "figure.dpi": 100, "savefig.dpi": 160, "savefig.bbox": "tight", "font.size": 9,
    "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.labelsize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7,
    "lines.linewidth": 1.3, "lines.markersize": 5, "legend.frameon": False, "legend.fontsize": 8,
    "grid.linewidth": 0.4, "grid.color": "0.88", "axes.axisbelow": True, "image.cmap": "gray",
    "image.interpolation": "nearest"})


def plain_ticks(axis, values):
    """Of a logarithmic axis: those of values that it shows, in plain numbers, and no others."""
    low, high = axis.get_view_interval()
    shown = [v for v in values if low <= v <= high]
    axis.set_ticks(shown, labels=[f"{v}" for v in shown])
    axis.set_minor_locator(plt.NullLocator())


def frame(ax, colour="0.75", width=0.7):
    """Turn an axes into a picture: no ticks, a thin frame; a forgotten image: (ax, FORGET, 2)."""
    ax.set(xticks=(), yticks=())
    for spine in ax.spines.values():
        spine.set(visible=True, color=colour, linewidth=width)
