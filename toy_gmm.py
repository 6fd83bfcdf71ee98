"""Unlearning where everything can be written down: two of three Gaussians are kept, the one between them is forgotten.

    python toy_gmm.py              the paper's Figure 1, Table 1 and Figure 2, in runs/toy, in about two minutes on a laptop
    python toy_gmm.py --quick      the same in seconds with hardly any training, to see that it runs

For this mixture p_t and its score have closed forms, and so has the exact minimiser of every loss of the paper. So each trained
network stands beside what it should have become, and both beside a limit that no method whatsoever can pass.
1 the mixture, 2 the exact optimum of each loss, 3 the limit of unlearning, 4 units, 5 training, 6 figures, 7 the command.
Notation as in sgu.py; components are tuples of (weight, mean) or (weight, mean, variance), the variance being 1 if left out.
"""
import argparse, copy, dataclasses, math, pathlib, platform, sys, time

import numpy as np
import torch
import torch.nn as nn

import sgu
from sgu import VE, expand

SDE = VE(0.01, 20.)                                # the data span about 10 units: sigma_max 20 covers them


# =====================================================================================================================
# 1. The mixture.  p(x0) = sum_k w_k N(m_k, v_k I), hence  p_t(x) = sum_k w_k N(x; a m_k, (a^2 v_k + s^2) I)
#
# Everything below follows from one fact about Gaussians: if x0 came from component k, then the noise z in x_t = a x0 + s z has
#     E[z | x_t, k] = s (x_t - a m_k) / (a^2 v_k + s^2)   and   Cov[z | x_t, k] = I a^2 v_k / (a^2 v_k + s^2)
# =====================================================================================================================

DATA = ((2 / 5, (-2., -2.)), (1 / 5, (0., 0.)), (2 / 5, (2., 2.)))                     # D
KEEP = ((1 / 2, (-2., -2.)), (1 / 2, (2., 2.)))                                        # D_g
FORGET = ((1., (0., 0.)),)                                                             # D_f


def parameters(components, like):
    """components -> weights (K,), means (K, D), variances (K,), of the type and on the device of the tensor like."""
    w, m, v = zip(*((*c, 1.)[:3] for c in components))
    return tuple(torch.tensor(p, dtype=like.dtype, device=like.device) for p in (w, m, v))


def posterior(components, sde, x, t):
    """What x = x_t says of its noise: log p_t(x): (B,), e = E[z | x]: (B, D), C = E[z z^T | x]: (B, D, D). x: (B, D), t: (B,)."""
    w, m, v = parameters(components, x)
    a, s = sde.marginal(t)
    var = a[:, None] ** 2 * v + s[:, None] ** 2                                        # (B, K)
    gap = x[:, None] - a[:, None, None] * m                                            # (B, K, D)
    log_joint = w.log() - gap.square().sum(2) / (2 * var) - x.shape[1] / 2 * (2 * math.pi * var).log()
    r = log_joint.softmax(1)                                                           # p(k | x), (B, K)
    mean = s[:, None, None] * gap / var[:, :, None]                                    # E[z | x, k], (B, K, D)
    spread = (r * (1 - s[:, None] ** 2 / var)).sum(1)                                  # the covariances' share of C, (B,)
    C = torch.einsum("bk,bki,bkj->bij", r, mean, mean) + spread[:, None, None] * torch.eye(x.shape[1]).to(x)
    return log_joint.logsumexp(1), (r[:, :, None] * mean).sum(1), C


def exact_log_prob(components, sde, x, t):
    """log p_t(x) in nats: (B,). x: (B, D), t: (B,)."""
    return posterior(components, sde, x, t)[0]


def exact_score(components, sde=SDE):
    """The function score(x, t) = grad_x log p_t(x) = -E[z | x_t = x]/s, for the samplers and the likelihood of sgu.py."""
    return lambda x, t: -posterior(components, sde, x, t)[1] / expand(sde.marginal(t)[1], x)


def log_density(components, x):
    """log p(x) without any noise: (B,). x: (B, D)."""
    w, m, v = parameters(components, x)
    return (w.log() - (x[:, None] - m).square().sum(2) / (2 * v) - x.shape[1] / 2 * (2 * math.pi * v).log()).logsumexp(1)


def sample_mixture(components, n, generator=None):
    """n draws: (n, D) float32."""
    w, m, v = parameters(components, torch.empty(0))
    k = torch.multinomial(w, n, replacement=True, generator=generator)
    return m[k] + v[k].sqrt()[:, None] * torch.randn(n, m.shape[1], generator=generator)


def nearest_forgotten(x, keep=KEEP, forget=FORGET):
    """Which of x: (B, D) lie nearer to a mean of forget than to any of keep: (B,) bool. 'Unlearning ratio' of the toy."""
    return torch.cdist(x, parameters(forget, x)[1]).amin(1) < torch.cdist(x, parameters(keep, x)[1]).amin(1)


# =====================================================================================================================
# 2. The exact optimum.  Eq. 11 is quadratic in e at every (x, t), so its minimiser over all functions is found point by point:
#
#     minimise over e   alpha p_g E_g|e - z|^2 / D  +  (1 - alpha) w(t) p_f E_f[forget(e, z)]      with R = w (1 - alpha) p_f / (alpha p_g)
#
#     orthogonal    (e.z / D)^2        (e - e_g) + (R / D) C e = 0          e = (I + R C / D)^-1 e_g        turns and shrinks e
#     elementwise   mean_i (e_i z_i)^2 (e - e_g) + R diag(C) e = 0          e = (I + R diag C)^-1 e_g       shrinks e
#     obtuse        e.z / D            2 (e - e_g) + R e_f = 0              e = e_g - (R / 2) e_f           flees from e_f
#     relative      e.(z - e_r) / D    2 (e - e_g) + R (e_f - e_r) = 0      e = e_g - (R / 2) (e_f - e_r)   e_r: Standard's, see below
#     neggrad       -|e - z|^2 / D     (e - e_g) - R (e - e_f) = 0          e = (e_g - R e_f) / (1 - R)     needs R < 1
#
# with C = E[z z^T | x_t, forget]. Keep and forget losses are means over D pixels here as in sgu.py; with sums, R C / D becomes R C
# and the other rows stay. With e_r that of D = pi_g D_g + pi_f D_f, e_f - e_r = P(g | x_t) (e_f - e_g) and R P(g | x_t) is P(f | x_t) times
# a constant, so the relative optimum is score_g + v grad log P(g | x_t), v = w (1 - alpha) pi_g / (2 alpha pi_f): Unseen under a guidance
# whose classifier nobody trained. NegGrad with weight mu on the forget term (R = mu p_f / p_g) is the score of (p_g - mu p_f) / (1 - mu).
# =====================================================================================================================

def exact_unlearned_score(method, alpha, sde=SDE, keep=KEEP, forget=FORGET, weighting="noise"):
    """The function score(x, t) = -e/s that minimises Eq. 11 over all functions. method: orthogonal, elementwise, obtuse, relative, neggrad.

    alpha: that of Eq. 11, in (0, 1]; for neggrad instead the weight mu in [0, 1) of the negated keep loss on D_f.
    weighting: of the forget loss: 'noise', 'paper' or a function of t as in sgu.py, or '1/s^2', the forget loss in score units
    (which is what 'paper' means for orthogonal, while for obtuse 'paper' and 'noise' agree). The keep loss has weight 1: if both
    are multiplied by one function of t, nothing changes. relative: to the exact score of DATA.
    """
    if method not in ("orthogonal", "elementwise", "obtuse", "relative", "neggrad"):
        raise ValueError(f"method must be orthogonal, elementwise, obtuse, relative or neggrad, not {method!r}")
    if not (0 <= alpha < 1 if method == "neggrad" else 0 < alpha <= 1):
        raise ValueError(f"{method} needs {'mu in [0, 1)' if method == 'neggrad' else 'alpha in (0, 1]'}, not {alpha}")
    power = 2 if method in ("orthogonal", "elementwise") else 0
    odds = alpha if method == "neggrad" else (1 - alpha) / alpha

    def score(x, t):
        s = sde.marginal(t)[1]
        log_g, e_g, _ = posterior(keep, sde, x, t)
        log_f, e_f, C = posterior(forget, sde, x, t)
        weight = s ** -2 if weighting == "1/s^2" else sgu.loss_weight(sde, t, weighting, power)
        largest = math.log(torch.finfo(x.dtype).max) / 2                               # inf times 0 would be nan far from D_g
        R = (odds * weight * (log_f - log_g).clamp(max=largest).exp())[:, None]        # (B, 1)
        if method == "orthogonal":
            e = torch.linalg.solve(torch.eye(x.shape[1]).to(x) + R[:, :, None] * C / x.shape[1], e_g)
        elif method == "elementwise":
            e = e_g / (1 + R * C.diagonal(dim1=1, dim2=2))
        elif method == "obtuse":
            e = e_g - R / 2 * e_f
        elif method == "relative":
            e = e_g - R / 2 * (e_f - posterior(DATA, sde, x, t)[1])
        else:
            e = (e_g - R * e_f) / (1 - R)
        return -e / s[:, None]
    return score


# =====================================================================================================================
# 3. The limit of unlearning.  For ANY density q and any 0 <= mu <= m = min p_g/p_f:
#
#     E_g[-log q]  =  mu E_f[-log q] + int (p_g - mu p_f) (-log q)  >=  mu E_f[-log q] + (1 - mu) H((p_g - mu p_f)/(1 - mu))
#
# because p_g - mu p_f is a non-negative measure of mass 1 - mu and, by Gibbs' inequality, no q codes it shorter than its own density.
# The best mu gives the bound. It is concave in mu, and attained by q = (p_g - mu p_f)/(1 - mu), which NegGrad's optimum samples from.
# =====================================================================================================================

def quadrature(components, step=0.1, reach=8):
    """A grid that holds reach standard deviations around every mean: points (N, 2) float64 and the area of a cell.

    For smooth integrands that vanish at the edge the plain sum over such a grid converges faster than any power of the step.
    """
    _, m, v = parameters(components, torch.empty(0, dtype=torch.float64))
    lo, hi = ((m.T + sign * reach * v.sqrt()).T for sign in (-1, 1))
    axes = [torch.arange(float(l), float(h) + step, step, dtype=torch.float64) for l, h in zip(lo.amin(0), hi.amax(0))]
    return torch.cartesian_prod(*axes), step ** 2


def expected_nll(log_q, components, step=0.1, reach=8):
    """E[-log q] over a mixture, without sampling, in nats. log_q: a function of x: (N, 2) float64 -> (N,)."""
    x, cell = quadrature(components, step, reach)
    return float(-(log_density(components, x).exp() * log_q(x)).sum() * cell)


def limit(nll_f, keep=KEEP, forget=FORGET, points=201):
    """The smallest E_g[-log q] that a density q with E_f[-log q] = nll_f can have. nll_f: a float or (N,), nats -> the same, nats."""
    x, cell = quadrature((*keep, *forget))
    log_g, log_f = log_density(keep, x), log_density(forget, x)
    ratio = (log_f - log_g).exp()
    mu = torch.linspace(0, min(1 / float(ratio.max()), 1 - 1e-9), points, dtype=torch.float64)
    entropy = torch.stack([-torch.special.xlogy(r, r).sum() * cell for r in (log_g.exp() * (1 - m * ratio).clamp(min=0) for m in mu)])
    entropy = entropy + torch.special.xlogy(1 - mu, 1 - mu)                            # (1 - mu) H((p_g - mu p_f)/(1 - mu))
    bound = (mu * torch.as_tensor(nll_f, dtype=torch.float64)[..., None] + entropy).amax(-1)
    return bound if isinstance(nll_f, torch.Tensor) else float(bound)


# =====================================================================================================================
# 4. Units.  Code lengths: nats -> bits (/ ln 2) -> per dimension (/ D) -> the paper's unit (+ 8)
#
# The paper's Table 1 lists bits/dim plus 8. The 8 belongs to 8-bit images scaled to [0, 1]: a density over [0, 1] is one over 256
# levels divided by 256 = 2^8 per pixel. The likelihood code that it used adds this to every data set, also to points in the plane,
# which have no levels. A constant does no harm to comparisons, so we print the paper's numbers as they are and ours in that unit too.
# =====================================================================================================================

def bits(nats, d=2):
    """nats of a d-dimensional point -> bits per dimension."""
    return nats / (d * math.log(2))


def paper_unit(nats, d=2):
    """nats of a d-dimensional point -> the unit of the paper's Table 1."""
    return bits(nats, d) + 8


def from_paper_unit(value, d=2):
    """The inverse of paper_unit."""
    return (value - 8) * d * math.log(2)


# =====================================================================================================================
# 5. Training: a small network, by sgu.train, from scratch on each method's data and loss
# =====================================================================================================================

class ToyNet(nn.Module):
    """A perceptron with the U-Net's signature: (B, 2), (B,) -> (B, 2), with level: (B,) = log(sigma)/4."""

    def __init__(self, width=128):
        super().__init__()
        self.register_buffer("freqs", torch.tensor([1., 2., 4.]))
        self.layers = nn.Sequential(nn.Linear(9, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, 2))
        nn.init.zeros_(self.layers[-1].weight), nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x, level):
        angles = level[:, None] * self.freqs
        h = self.layers(torch.cat([x, level[:, None], angles.sin(), angles.cos()], 1))
        sigma = (4 * level[:, None]).exp()
        return h * sigma / (1 + sigma ** 2).sqrt()  # near the data e = -s score is O(sigma): with this factor h is of the score's size


DATA_STD = 2.                                       # of one coordinate of D: sqrt(1 + 4/5 * 2^2) = 2.05


def capped(t):
    """Weight 1/(s^2 + 0.3^2): score units, 1/s^2, where s is large, and noise units where the data's own width 1 blurs everything."""
    return 1 / (SDE.marginal(t)[1] ** 2 + 0.3 ** 2)


METHODS = dict(             # name: (title, forget loss, alpha, weighting of the forget loss, exact method)
    standard=("Standard", None, 1.0, "noise", None),
    unseen=("Unseen", None, 1.0, "noise", None),
    orthogonal=("SGU-Orthogonal", sgu.orthogonal_loss, 0.67, "noise", "orthogonal"),
    obtuse=("SGU-Obtuse", sgu.obtuse_loss, 0.8, "noise", "obtuse"),
    obtuse_score=("SGU-Obtuse, score units", sgu.obtuse_loss, 0.85, capped, "obtuse"),
)


def optimum(name):
    """The score that a method's network would have after infinite training: the exact minimiser of its loss."""
    _, _, alpha, weighting, method = METHODS[name]
    return exact_unlearned_score(method, alpha, weighting=weighting) if method else exact_score(DATA if name == "standard" else KEEP)


def train_toy(name, x_g, x_f, steps=2000, batch_size=512, lr=6e-3, seed=0):
    """Train a ToyNet by one of METHODS on x_g: (N, 2) from D_g and x_f: (M, 2) from D_f.

    A generator of sgu.train's reports, each with one more key, score: the averaged network's score(x, t).
    """
    _, forget_loss, alpha, weighting, _ = METHODS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ToyNet()
    ema = copy.deepcopy(model).requires_grad_(False)
    # The keep loss is weighted as sgu.train does, for an even fit at all noise levels, and the forget loss by the same factor:
    # what multiplies both does not move the optimum, so section 2 applies as it stands.
    even = sgu.keep_weight(SDE, DATA_STD)
    forget_weighting = lambda t: even(t) * sgu.loss_weight(SDE, t, weighting)
    score = sgu.make_score(ema, SDE, DATA_STD)
    keep, forget = torch.cat([x_g, x_f]) if name == "standard" else x_g, x_f if forget_loss else None
    for info in sgu.train(model, ema, SDE, keep, forget, forget_loss, alpha, steps=steps, batch_size=batch_size, lr=lr, warmup=100,
                          ema_decay=0.995, data_std=DATA_STD, forget_weighting=forget_weighting, seed=seed):
        yield dict(info, score=score)


# =====================================================================================================================
# 6. The table and the figures. Colours by Okabe and Ito: distinct to every eye, and light against dark when printed in grey
# =====================================================================================================================

BLUE, ORANGE = "#0072B2", "#E69F00"                                                     # kept, forgotten
COLOURS = dict(standard="#000000", unseen="#009E73", orthogonal="#0072B2", obtuse="#D55E00", obtuse_score="#CC79A7")   # as in the notebooks
MARKERS = dict(standard="o", unseen="s", orthogonal="^", obtuse="v", obtuse_score="D")
PAPER = dict(standard=(10.91, 10.73), unseen=(10.63, 11.59))                            # Table 1: D_g, D_f, in the paper's unit
PAPER_UNLEARNING = (10.64, 39.01)                                                       # it does not say by which loss


def make_table(results):
    """results (the content of results.json) -> Markdown: Table 1, the distance to the limit, and the shares of samples."""
    row = lambda *cells: "| " + " | ".join(cells) + " |"
    plus = lambda value, se: f"{value:.3f} ± {se:.3f}"
    percent = lambda v: f"{100 * v['share']:.1f} [{100 * v['ci95'][0]:.1f}, {100 * v['ci95'][1]:.1f}]"
    methods, n = results["methods"], next(iter(results["methods"].values()))
    lines = [f"Three Gaussians, forget the middle one; {results['device']}; seed {results['config']['seed']}; `{results['command']}`", "",
             row("NLL", "test", "nats", "its exact optimum", "bits/dim", "paper's unit", "its exact optimum", "paper"), "|---|---|" + "---:|" * 6]
    for name, m in methods.items():
        for i, key in enumerate(("D_g", "D_f")):
            value, se, exact = m["nll_nats"][key], m["nll_nats"]["se"][key], m["exact_nats"][key]
            lines.append(row(m["title"] if i == 0 else "", key, plus(value, se), f"{exact:.3f}", plus(bits(value), bits(se)),
                             plus(paper_unit(value), bits(se)), f"{paper_unit(exact):.3f}", f"{PAPER[name][i]:.2f}" if name in PAPER else ""))
    for i, key in enumerate(("D_g", "D_f")):
        lines.append(row("Unlearning ¹" if i == 0 else "", key, "", "", "", "", "", f"{PAPER_UNLEARNING[i]:.2f}"))
    lines += ["", f"n = {n['nll_nats']['n']['D_g']} and {n['nll_nats']['n']['D_f']} test points, ± one standard error; the exact optimum by "
              "quadrature, without sampling. The paper's unit is bits/dim + 8 (the 8 is a correction for 8-bit images).", "",
              row("The limit (paper's unit)", "D_f", "D_g", "no density has a D_g below", "D_g above that", "its exact optimum"), "|---|" + "---:|" * 5]
    for m in methods.values():
        g, f, e = m["nll_nats"]["D_g"], m["nll_nats"]["D_f"], m["exact_nats"]
        lines.append(row(m["title"], f"{paper_unit(f):.2f}", f"{paper_unit(g):.3f}", f"{paper_unit(m['limit_nats']):.3f}",
                         f"{bits(g - m['limit_nats']):+.3f} ± {bits(m['nll_nats']['se']['D_g']):.3f}",
                         f"{round(bits(e['D_g'] - limit(e['D_f'])), 3) + 0:+.3f}"))
    (g, f), bound = PAPER_UNLEARNING, paper_unit(results["limit_nats_at_paper_unlearning"])
    lines += [row("Unlearning ¹ (paper)", f"{f:.2f}", f"{g:.2f}", f"{bound:.3f}", f"{g - bound:+.3f}", ""), "",
              f"¹ The paper's row Unlearning, {g:.2f} / {f:.2f}, stands {bound - g:.2f} below the limit: any density q with E_f[-log q] = {f:.2f} "
              f"on this mixture has E_g[-log q] >= {bound:.2f}, by Gibbs' inequality on p_g - e^-4 p_f (section 3 of toy_gmm.py). "
              "Perhaps it was measured on another mixture, or integrated too coarsely.", "",
              row("samples nearest the forgotten mode, %", "Euler-Maruyama", "probability flow", "exact optimum, Euler-Maruyama",
                  "exact optimum, probability flow"), "|---|" + "---:|" * 4]
    lines += [row(m["title"], *(percent(m["share"][k]) for k in ("em", "ode", "exact_em", "exact_ode"))) for m in methods.values()]
    real = results["share_real"]
    lines += ["", f"n = {n['share']['em']['n']} samples each, 95% Wilson intervals. Real data: {100 * real['D']:.1f} in D, {100 * real['D_g']:.1f} in "
              "D_g, whose components reach that far. An unlearned score is in general not that of one density at all noise levels, so the two samplers draw from different laws, "
              "and the NLL above belongs to the probability flow alone."]
    return "\n".join(lines) + "\n"


def figure1(results, training, samples):
    """Figure 1: for every method its training data (left) and what it generates (right), and all of them beside the limit."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    figure = Figure(figsize=(9.6, 8.8))
    grid = figure.add_gridspec(3, 5, width_ratios=(1, 1, 0.24, 1, 1), hspace=0.3, wspace=0.05, left=0.02, right=0.985, top=0.9, bottom=0.055)

    def cloud(ax, parts, title):
        for x, kept in parts:
            look = dict(s=4, marker="o", c=BLUE, alpha=0.45) if kept else dict(s=7, marker="^", c=ORANGE, alpha=0.8)
            ax.scatter(x[:, 0], x[:, 1], linewidths=0, **look)
        ax.set(xlim=(-5.6, 5.6), ylim=(-5.6, 5.6), xticks=(), yticks=(), aspect="equal")
        ax.set_title(title, fontsize=8.5, pad=3)
        ax.spines[:].set(color="0.75", visible=True)

    for i, (name, m) in enumerate(results["methods"].items()):
        r, c = divmod(i, 2)
        left, right = (figure.add_subplot(grid[r, 3 * c + k]) for k in (0, 1))
        x_g, x_f = training
        n = 1600
        use = dict(standard="D = D_g and D_f", unseen="D_g alone").get(name, "keep D_g, forget D_f")
        cloud(left, [(x_g[:n * 4 // 5], True)] + ([(x_f[:n // 5], False)] if name != "unseen" else []), "training: " + use)
        x = samples[name][:n]
        far = nearest_forgotten(x)
        cloud(right, [(x[~far], True), (x[far], False)], f"generated: {100 * m['share']['em']['share']:.1f}% in the middle")
        left.text(0, 1.14, f"({'abcde'[i]}) {m['title']}", transform=left.transAxes, fontsize=11, fontweight="bold")

    ax = figure.add_subplot(grid[2, 3:])
    f = torch.cat([torch.linspace(10.4, 16, 120), torch.linspace(16.2, 44, 120)]).double()
    g = paper_unit(limit(from_paper_unit(f)))
    ax.plot(f, g, color="0.2", lw=1.3)
    ax.fill_between(f, 10.4, g, color="0.88", lw=0)
    ax.text(15.5, 10.485, "no density can be here", fontsize=8.5, color="0.25")
    for name, m in results["methods"].items():
        nll, exact = m["nll_nats"], m["exact_nats"]
        for v, look in ((nll, dict(color=COLOURS[name], ms=6.5, mec="white", mew=0.5, zorder=4, label=m["title"])),
                        (exact, dict(mfc="none", mec=COLOURS[name], ms=10, zorder=3))):
            ax.plot(paper_unit(v["D_f"]), paper_unit(v["D_g"]), MARKERS[name], **look)
    points = [*PAPER.values(), PAPER_UNLEARNING]
    ax.plot([p[1] for p in points], [p[0] for p in points], "x", color="black", ms=6.5, mew=1.6, label="the paper's Table 1", zorder=5)
    for (pg, pf), text, offset, ha in zip(points, ("Standard", "Unseen", "Unlearning"), ((6, 3), (-2, 6), (-6, 3)), ("left", "center", "right")):
        ax.annotate(text, (pf, pg), xytext=offset, textcoords="offset points", fontsize=7.5, ha=ha)
    ax.set(xscale="log", xlim=(10.4, 44), ylim=(10.44, 11.45))
    ax.set_xticks((11, 12, 14, 18, 25, 39), labels=("11", "12", "14", "18", "25", "39")), ax.minorticks_off()
    ax.set_xlabel("NLL of D_f (bits/dim + 8), higher forgets more", fontsize=8.5, labelpad=2)
    ax.set_ylabel("NLL of D_g, lower is better", fontsize=8.5, labelpad=2)
    ax.tick_params(labelsize=8), ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7.2, frameon=False, loc="upper center", ncol=2, handletextpad=0.3, columnspacing=1.0,
              title="filled: trained, open: exact optimum", title_fontsize=7.5)
    ax.text(-0.09, 1.06, "(f) All of them, and the limit", transform=ax.transAxes, fontsize=11, fontweight="bold")
    for x, colour, marker, text in ((0.035, BLUE, "o", "to keep: D_g, or generated nearest to one of its means"),
                                    (0.5, ORANGE, "^", "to forget: D_f, or generated nearest to its mean")):
        figure.add_artist(Line2D([x - 0.012], [0.979], marker=marker, color=colour, ms=6, lw=0))
        figure.text(x, 0.979, text, va="center", fontsize=9.5)
    return figure


def figure2(scores, t=0.08):
    """Figure 2: the score fields at time t over the density of D, two of them compared, and all along the diagonal.

    At t = 0.08 (s = 0.018) the loss hardly sees the score: a score wrong by 1 moves e by 0.018, while its target z varies by 1. So a
    short training meets the exact optimum there only roughly; the samples and the likelihood are decided at higher noise.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10.6, 7.3))
    axes = figure.subplots(2, 3, gridspec_kw=dict(hspace=0.2, wspace=0.1, left=0.02, right=0.985, top=0.925, bottom=0.065)).flat
    side = torch.linspace(-4.8, 4.8, 21)
    x = torch.cartesian_prod(side, side)
    x = x[log_density(DATA, x).exp() > 3e-4]                                            # farther out there were no data to learn from
    fine = torch.linspace(-5.2, 5.2, 161)
    density = log_density(DATA, torch.cartesian_prod(fine, fine)).exp().reshape(161, 161).T
    forgotten = log_density(FORGET, x) > log_density(KEEP, x)

    @torch.no_grad()
    def at(score, x):
        return score(x, torch.full((len(x),), t))

    def background(ax, title):
        ax.contourf(fine, fine, density, levels=10, cmap="Greys", vmin=0, vmax=2.2 * float(density.max()))
        ax.set(xlim=(-5.2, 5.2), ylim=(-5.2, 5.2), xticks=(), yticks=(), aspect="equal")
        ax.spines[:].set(color="0.75", visible=True)
        ax.set_title(title, fontsize=10, loc="left", fontweight="bold", pad=4)

    def arrows(ax, score, colour):
        s = at(score, x)
        s = s / (1 + s.norm(dim=1, keepdim=True) / 4)                                   # long arrows are shortened: their tips would cross
        ax.quiver(x[:, 0], x[:, 1], s[:, 0], s[:, 1], color=colour, angles="xy", scale_units="xy", scale=3.6, width=0.0042,
                  headwidth=3.6, headlength=4.2)

    for ax, letter, name in zip(axes, "abcd", ("standard", "unseen", "orthogonal", "obtuse")):
        background(ax, f"({letter}) {METHODS[name][0]}")
        arrows(ax, scores[name], [ORANGE if f else BLUE for f in forgotten])
    ax = axes[4]
    background(ax, "(e) Standard; Obtuse, score units")
    arrows(ax, scores["standard"], COLOURS["standard"])
    arrows(ax, scores["obtuse_score"], COLOURS["obtuse_score"])
    ax = axes[5]
    r = torch.linspace(-4.5, 4.5, 301)
    along = lambda score: at(score, r[:, None].expand(-1, 2) / math.sqrt(2)).sum(1) / math.sqrt(2)
    for name in METHODS:
        ax.plot(r, along(optimum(name)), color=COLOURS[name], lw=1, ls=(0, (3, 2)))
        ax.plot(r, along(scores[name]), color=COLOURS[name], lw=1.7, alpha=0.9, label=METHODS[name][0])
    ax.axhline(0, color="0.7", lw=0.7, zorder=0)
    ax.set(xlim=(-4.5, 4.5), ylim=(-4.2, 4.2))
    ax.set_title("(f) Along the diagonal", fontsize=10, loc="left", fontweight="bold", pad=4)
    ax.set_xlabel("towards (2, 2); solid: trained, dashed: exact optimum", fontsize=8.5, labelpad=2), ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7.5, frameon=False, loc="upper left", borderaxespad=0.1, handlelength=1.4)
    figure.text(0.02, 0.988, f"Learned scores at t = {t:g} over the density of D. Arrows are |score|/(1 + |score|/4) long; "
                "orange: D_f is denser there than D_g. In (e) Standard is black.", va="top", fontsize=8.5)
    return figure


# =====================================================================================================================
# 7. The command
# =====================================================================================================================

@dataclasses.dataclass
class Options:
    """Every option of the command."""
    out: str = "runs/toy"
    quick: bool = False
    seed: int = 0


def parse_options(argv=None):
    """argv -> Options; one line and exit code 2 for what cannot be understood."""
    parser = argparse.ArgumentParser(prog="toy_gmm.py", description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"toy_gmm: {message}\n")
    parser.add_argument("--out", default=Options.out, metavar="DIR", help="folder of the results (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="hardly any training and few samples: only to see that everything runs")
    parser.add_argument("--seed", type=int, default=Options.seed, help="one number decides everything random (default %(default)s)")
    opt = Options(**vars(parser.parse_args(argv)))
    if not 0 <= opt.seed < 2 ** 31:
        parser.error(f"--seed must be in 0..{2 ** 31 - 1}, not {opt.seed}")
    return opt


def measure_share(score, n, seed):
    """{em, ode}: the share of n samples of each sampler nearest the forgotten mode, with its interval; and the em samples."""
    share, draws = {}, {}
    for key, sampler, steps in (("em", sgu.euler_maruyama, 100), ("ode", sgu.ode_sample, 40)):
        draws[key] = sampler(score, SDE, (n, 2), steps=steps, generator=torch.Generator().manual_seed(seed))
        k = int(nearest_forgotten(draws[key]).sum())
        share[key] = dict(share=k / n, n=n, ci95=sgu.wilson(k, n), steps=steps)
    return share, draws["em"]


def run(opt):
    """Train, measure, draw. Returns the results dict."""
    out = pathlib.Path(opt.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch(), (out / ".writable").unlink()
    except OSError as error:
        raise sgu.UsageError(f"--out {opt.out}: cannot write there ({error.strerror}); choose another folder") from None
    import matplotlib
    size = (dict(train=2000, test=50, steps=60, samples=200, likelihood_steps=8, grid=1.0) if opt.quick else
            dict(train=50000, test=2000, steps=2000, samples=10000, likelihood_steps=64, grid=0.25))
    config = dict(seed=opt.seed, quick=opt.quick, **size, sde="VE(0.01, 20)", data_std=DATA_STD)
    command = "python toy_gmm.py" + " --quick" * opt.quick + (f" --seed {opt.seed}" if opt.seed else "")
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__, matplotlib=matplotlib.__version__)
    results = dict(config=config, command=command, device=sgu.describe(torch.device("cpu")), versions=versions, seconds={}, methods={},
                   limit_nats_at_paper_unlearning=limit(from_paper_unit(PAPER_UNLEARNING[1])))
    g = torch.Generator().manual_seed(opt.seed)
    training = sample_mixture(KEEP, size["train"] * 4 // 5, g), sample_mixture(FORGET, size["train"] // 5, g)
    test = dict(D_g=sample_mixture(KEEP, size["test"], g), D_f=sample_mixture(FORGET, size["test"], g))
    near = lambda components: expected_nll(lambda x: -nearest_forgotten(x).double(), components)     # E[1 if nearest]
    results["share_real"] = dict(D=near(DATA), D_g=near(KEEP), D_f=near(FORGET))
    scores, samples, begin = {}, {}, time.time()

    for name, (title, _, alpha, weighting, _) in METHODS.items():
        start, bar = time.time(), sgu.Progress(f"train {title}", size["steps"])
        for info in train_toy(name, *training, steps=size["steps"], seed=opt.seed):
            bar(info["step"], f"keep {info['keep']:.3f}  forget {info['forget']:+.3f}")
        score, results["seconds"][f"train {name}"] = info["score"], round(time.time() - start, 1)
        start = time.time()
        m = results["methods"][name] = dict(title=title, alpha=alpha, weighting=weighting if isinstance(weighting, str) else "1/(s^2 + 0.3^2)")
        nll = {k: -sgu.log_likelihood(score, SDE, x, steps=config["likelihood_steps"], exact=True) for k, x in test.items()}
        m["nll_nats"] = {k: float(v.mean()) for k, v in nll.items()}
        m["nll_nats"].update(n={k: len(v) for k, v in nll.items()}, se={k: float(v.std() / math.sqrt(len(v))) for k, v in nll.items()})
        exact = dict(standard=lambda x: log_density(DATA, x), unseen=lambda x: log_density(KEEP, x)).get(
            name, lambda x: sgu.log_likelihood(optimum(name), SDE, x, steps=config["likelihood_steps"], exact=True))
        m["exact_nats"] = {k: expected_nll(exact, c, step=size["grid"], reach=6) for k, c in (("D_g", KEEP), ("D_f", FORGET))}
        m["limit_nats"] = limit(m["nll_nats"]["D_f"])
        m["share"], samples[name] = measure_share(score, size["samples"], opt.seed)
        m["share"].update({f"exact_{k}": v for k, v in measure_share(optimum(name), size["samples"], opt.seed)[0].items()})
        scores[name], results["seconds"][f"measure {name}"] = score, round(time.time() - start, 1)

    start = time.time()
    for name, figure in (("figure1.png", figure1(results, training, samples)), ("figure2.png", figure2(scores))):
        sgu.replace_file(out / name, lambda p: figure.savefig(p, dpi=160, format="png"))
    results["seconds"].update(figures=round(time.time() - start, 1), total=round(time.time() - begin, 1))
    table = results["markdown"] = make_table(results)
    sgu.replace_file(out / "table1.md", lambda p: p.write_text(table))
    sgu.save_json(out / "results.json", results)
    print(table + f"\n{results['seconds']['total']:.0f} s. Pictures and numbers are in {out}: figure1.png, figure2.png, table1.md, results.json")
    return results


def main(argv=None):
    """The command line. Exit codes: 0 done, 2 something to mend (one line says what), 130 interrupted."""
    try:
        run(parse_options(argv))
    except (sgu.UsageError, FloatingPointError) as error:
        print(f"toy_gmm: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"toy_gmm: cannot write {error.filename or 'the results'} ({error.strerror or error})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntoy_gmm: stopped; files are written at the end, so none is half done", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
