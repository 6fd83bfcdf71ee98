"""Three Gaussians, forget the middle one: unlearning where everything can be written down.

    python toy_gmm.py            the paper's Figure 1, Table 1 and Figure 2, within a minute
    python toy_gmm.py --quick    the same in seconds, hardly trained: does everything run?

The mixture has a known density and score at every noise level, and each loss of the paper a known
exact minimiser. So every trained network stands beside what it should have become, and all of them
beside a limit that no method can pass. Notation and the names of the methods are those of sgu.py.
"""
import argparse, collections, copy, math, os, platform, sys, tempfile, time
import matplotlib
import torch
import torch.nn as nn
from matplotlib.figure import Figure
import sgu

# ==== 1. The mixture p(x0) = sum_k w_k N(m_k, v_k I), so p_t(x) = sum_k w_k N(a m_k, var_k I) =====
# with var_k = a^2 v_k + s^2. In the code: a tuple of (weight, mean) or (weight, mean, variance).
# One fact carries this file: if x0 is of component k, then the noise z in x_t = a x0 + s z has
#     E[z | x_t, k] = s (x_t - a m_k) / var_k   and   Cov[z | x_t, k] = I a^2 v_k / var_k

DATA = ((2 / 5, (-2., -2.)), (1 / 5, (0., 0.)), (2 / 5, (2., 2.)))          # D
KEEP = ((1 / 2, (-2., -2.)), (1 / 2, (2., 2.)))                             # D_g
FORGET = ((1., (0., 0.)),)                                                  # D_f
SDE = sgu.VE(0.01, 20.)                            # the data are 10 wide: noise of 20 covers them

def parameters(components, like):
    """Weights (K,), means (K, D) and variances (K,), of the type of the tensor like."""
    full = [(*c, 1.)[:3] for c in components]
    return [torch.tensor(p, dtype=like.dtype, device=like.device) for p in zip(*full)]

def joint(components, x, a, s):
    """log p(k, x_t): (B, K), var: (B, K), x_t - a m_k: (B, K, D). x: (B, D), a, s: (B, 1)."""
    w, m, v = parameters(components, x)
    var = a ** 2 * v + s ** 2
    gap = x[:, None] - a[:, :, None] * m
    log_normal = -gap.square().sum(2) / (2 * var) - x.shape[1] / 2 * (2 * math.pi * var).log()
    return w.log() + log_normal, var, gap

def posterior(components, sde, x, t):
    """What x = x_t (B, D) says of z: log p_t(x) (B,), E[z | x] (B, D), E[z z^T | x] (B, D, D)."""
    a, s = (v[:, None] for v in sde.marginal(t))
    log_p, var, gap = joint(components, x, a, s)
    r = log_p.softmax(1)                           # p(k | x): (B, K)
    mean = (s / var)[:, :, None] * gap             # E[z | x, k]: (B, K, D)
    variance = (r * (1 - s ** 2 / var)).sum(1)     # Cov[z | x, k] averaged over k: (B,)
    C = torch.einsum("bk,bki,bkj->bij", r, mean, mean)
    C = C + variance[:, None, None] * torch.eye(x.shape[1]).to(x)
    return log_p.logsumexp(1), (r[:, :, None] * mean).sum(1), C

def exact_log_prob(components, sde, x, t):
    """log p_t(x) in nats: (B,)."""
    return posterior(components, sde, x, t)[0]

def exact_score(components, sde=SDE):
    """The function score(x, t) = grad_x log p_t(x) = -E[z | x]/s, for samplers and likelihood."""
    return lambda x, t: -posterior(components, sde, x, t)[1] / sde.marginal(t)[1][:, None]

def log_density(components, x):
    """log p(x) without any noise: (B,). x: (B, D)."""
    return joint(components, x, x.new_ones(1, 1), x.new_zeros(1, 1))[0].logsumexp(1)

def sample_mixture(components, n, generator=None):
    """n draws: (n, D) float32."""
    w, m, v = parameters(components, torch.empty(0))
    k = torch.multinomial(w, n, replacement=True, generator=generator)
    return m[k] + v[k].sqrt()[:, None] * torch.randn(n, m.shape[1], generator=generator)

def nearest_forgotten(x, keep=KEEP, forget=FORGET):
    """Which of x: (B, D) lie nearer to a mean of forget than to all of keep: (B,) bool."""
    to_keep, to_forget = (torch.cdist(x, parameters(c, x)[1]).amin(1) for c in (keep, forget))
    return to_forget < to_keep

# ==== 2. The exact minimisers: at one (x_t, t), Eq. 11 is a quadratic function of the vector e ====
#     alpha w_g q_g p_g E_g|e - z|^2 / D  +  (1 - alpha) w_f q_f p_f E_f[forget loss of e and z]
#
# p_g, p_f are the densities of x_t, w the weights of the two losses and q the densities from which
# they draw t. Its minimum depends on R = (1 - alpha) w_f q_f p_f / (alpha w_g q_g p_g) alone:
#     orthogonal    (e.z / D)^2         (e - e_g) + (R/D) C e = 0        e = (I + R C/D)^-1 e_g
#     elementwise   mean_i (e_i z_i)^2  (e - e_g) + R diag(C) e = 0      e = (I + R diag C)^-1 e_g
#     obtuse        e.z / D             2 (e - e_g) + R e_f = 0          e = e_g - (R/2) e_f
#     relative      e.(z - e_r) / D     2 (e - e_g) + R (e_f - e_r) = 0  e = e_g - (R/2)(e_f - e_r)
#     neggrad       -|e - z|^2 / D      (e - e_g) - R (e - e_f) = 0      e = (e_g - R e_f)/(1 - R)
# with C = E[z z^T | x_t] under p_f, and e_r Standard's e. The first two shrink e_g (the first turns
# it too), the others flee from e_f. In this file both losses draw t by one law, so q_f/q_g = 1, and
# w_g = 1. Elementwise and neggrad are rivals; neggrad's optimum, the score of the density
# (p_g - mu p_f)/(1 - mu) with mu = R p_g/p_f, attains the limit of section 3.

def exact_unlearned_score(method, alpha, sde=SDE, keep=KEEP, forget=FORGET, weighting="noise"):
    """The function score(x, t) = -e/s that minimises Eq. 11; method: one of those above.
    alpha: that of Eq. 11, in (0, 1]; for neggrad instead mu, in [0, 1). relative: to DATA's score.
    weighting: w_f as in sgu.py, 'noise', 'paper' or a function of t; or '1/s^2', score units."""
    methods = ("orthogonal", "elementwise", "obtuse", "relative", "neggrad")
    sgu.need(method in methods, f"there is no method {method!r}")
    sgu.need(0 <= alpha < 1 if method == "neggrad" else 0 < alpha <= 1, f"alpha cannot be {alpha}")
    odds = alpha if method == "neggrad" else (1 - alpha) / alpha
    power = 2 if method in ("orthogonal", "elementwise") else 0
    def score(x, t):
        s = sde.marginal(t)[1][:, None]
        log_g, e_g, _ = posterior(keep, sde, x, t)
        log_f, e_f, C = posterior(forget, sde, x, t)
        w = s ** -2 if weighting == "1/s^2" else sgu.loss_weight(sde, t, weighting, power)[:, None]
        R = odds * w * (log_f - log_g).clamp(max=44).exp()[:, None]         # float32 ends at e^88
        if method == "orthogonal":
            matrix = torch.eye(x.shape[1]).to(x) + R[:, :, None] * C / x.shape[1]
            e = torch.linalg.solve(matrix, e_g)
        elif method == "elementwise":
            e = e_g / (1 + R * C.diagonal(dim1=1, dim2=2))
        elif method == "obtuse":
            e = e_g - R / 2 * e_f
        elif method == "relative":
            e = e_g - R / 2 * (e_f - posterior(DATA, sde, x, t)[1])
        else:
            e = (e_g - R * e_f) / (1 - R)
        return -e / s
    return score

# ==== 3. The limit of unlearning: for ANY density q and any mu from 0 to min p_g/p_f ==============
#     E_g[-log q]  =  mu E_f[-log q] + int (p_g - mu p_f) (-log q)
#                 >=  mu E_f[-log q] + (1 - mu) H(r),   r = (p_g - mu p_f)/(1 - mu), H its entropy
# because r is a density too and, by Gibbs' inequality, no q codes it shorter than r itself does.
# The best mu gives the bound; q = r attains it. What codes D_f long cannot code D_g shortest.

def quadrature(components, step=0.2, reach=8):
    """A grid (N, 2) float64, reach standard deviations around all means, and the area of its cell.
    A plain sum over it converges very fast for smooth functions that vanish at its edge."""
    _, m, v = parameters(components, torch.empty(0, dtype=torch.float64))
    margin = reach * v.sqrt()[:, None]
    ends = zip((m - margin).amin(0).tolist(), (m + margin).amax(0).tolist())
    axes = [torch.arange(lo, hi + step, step, dtype=torch.float64) for lo, hi in ends]
    return torch.cartesian_prod(*axes), step ** len(axes)

def expected_nll(log_q, components, step=0.2, reach=8):
    """E[-log q] over a mixture in nats, without sampling. log_q: a function (N, 2) -> (N,)."""
    x, cell = quadrature(components, step, reach)
    return float(-(log_density(components, x).exp() * log_q(x)).sum() * cell)

def limit(nll_f, keep=KEEP, forget=FORGET, points=201):
    """The least E_g[-log q] of all densities q with E_f[-log q] = nll_f: a float or (N,), nats."""
    x, cell = quadrature((*keep, *forget))
    p_g = log_density(keep, x).exp()
    ratio = (log_density(forget, x) - log_density(keep, x)).exp()
    mu = torch.linspace(0, min(1 / float(ratio.max()), 1 - 1e-9), points, dtype=torch.float64)
    rest = p_g * (1 - mu[:, None] * ratio).clamp(min=0)                     # p_g - mu p_f
    entropy = torch.special.xlogy(1 - mu, 1 - mu) - torch.special.xlogy(rest, rest).sum(1) * cell
    best = (mu * torch.as_tensor(nll_f, dtype=mu.dtype)[..., None] + entropy).amax(-1)
    return best if isinstance(nll_f, torch.Tensor) else float(best)

# ==== 4. Units: nats / ln 2 are bits, / D bits per dimension. The paper's Table 1: bits/dim + 8 ===

def bits(nats, d=2):
    """nats of a d-dimensional point -> bits per dimension."""
    return nats / (d * math.log(2))

def paper_unit(nats, d=2):
    """nats of a d-dimensional point -> the unit of the paper's Table 1."""
    return bits(nats, d) + 8

def from_paper_unit(value, d=2):
    """The inverse of paper_unit."""
    return (value - 8) * d * math.log(2)

# ==== 5. Training: a small network for each method, from scratch, by sgu.train ====================
DATA_STD = 2.                                      # of a coordinate of D: sqrt(1 + 4/5 2^2) = 2.05
NOISE_LAW = (-0.7, 1., 4)                          # see sgu.Recipe; came nearest to section 2

class ToyNet(nn.Module):
    """A perceptron to be called as sgu's U-Net: (B, 2) and level (B,) = log(sigma)/4 -> (B, 2)."""
    data_std = DATA_STD
    def __init__(self, width=64):
        super().__init__()
        self.register_buffer("freqs", torch.tensor([1., 2., 4.]))
        hidden = [(nn.Linear(n, width), nn.SiLU()) for n in (9, width, width)]
        self.layers = nn.Sequential(*sum(hidden, ()), nn.Linear(width, 2))

    def forward(self, x, level):
        angles = level[:, None] * self.freqs
        h = self.layers(torch.cat([x, level[:, None], angles.sin(), angles.cos()], 1))
        sigma = (4 * level[:, None]).exp()
        return h * sigma / (1 + sigma ** 2).sqrt()     # near data e = -s score is as small as s

def capped(t):
    """Weight 1/(s^2 + 0.3^2): 1/s^2, score units, but where s is far below the data's width 1."""
    return 1 / (SDE.marginal(t)[1] ** 2 + 0.3 ** 2)

# Fields: title, forget loss, its alpha in Eq. 11, its weight w_f, its name in section 2
ToyMethod = collections.namedtuple("ToyMethod", "title loss alpha weighting exact",
                                   defaults=(None, None, "noise", None))
METHODS = dict(
    standard=ToyMethod("Standard"), unseen=ToyMethod("Unseen"),
    orthogonal=ToyMethod("SGU-Orthogonal", sgu.orthogonal_loss, 0.67, exact="orthogonal"),
    obtuse=ToyMethod("SGU-Obtuse", sgu.obtuse_loss, 0.8, exact="obtuse"),
    obtuse_score=ToyMethod("SGU-Obtuse, score units", sgu.obtuse_loss, 0.85, capped, "obtuse"))

def optimum(name):
    """The exact score that the network of METHODS[name] would have after infinite training."""
    method = METHODS[name]
    if method.exact:
        return exact_unlearned_score(method.exact, method.alpha, weighting=method.weighting)
    return exact_score(DATA if name == "standard" else KEEP)

def train_toy(name, x_g, x_f, steps=1200, batch_size=1024, lr=1e-2, seed=0):
    """Train METHODS[name] on x_g: (N, 2) from D_g and x_f: (M, 2) from D_f; yields as sgu.train."""
    method = ToyMethod(*METHODS[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ToyNet()
    even = sgu.balanced_weight(SDE, DATA_STD)          # a factor on both losses leaves R as it is
    weights = even, lambda t: even(t) * sgu.loss_weight(SDE, t, method.weighting)
    keep = torch.cat([x_g, x_f]) if name == "standard" else x_g
    return sgu.train(model, copy.deepcopy(model), SDE, keep, x_f if method.loss else None,
                     method.loss, method.alpha, steps=steps, batch_size=batch_size, lr=lr,
                     recipe=sgu.Recipe(NOISE_LAW, weights), seed=seed)

# ==== 6. The table and the figures, in colours of Okabe and Ito that every eye can tell apart =====
BLUE, ORANGE = "#0072B2", "#E69F00"                # kept, forgotten
LOOK = dict(standard=("#000000", "o"), unseen=("#009E73", "s"), orthogonal=("#0072B2", "^"),
            obtuse=("#D55E00", "v"), obtuse_score=("#CC79A7", "D"))
PAPER = dict(standard=(10.91, 10.73), unseen=(10.63, 11.59))                # Table 1: D_g, D_f
PAPER_UNLEARNING = (10.64, 39.01)                  # the paper does not say by which loss
STYLE = {"font.size": 8, "legend.fontsize": 6.5, "legend.frameon": False, "text.usetex": False}

def in_paper_unit(nats):
    """dict(D_g, D_f) of nats -> a pair as in PAPER."""
    return paper_unit(nats["D_g"]), paper_unit(nats["D_f"])

def make_table(results):
    """What results.json holds -> Markdown: Table 1, the limit and the samples."""
    rows = [["NLL, bits/dim + 8", "D_g", "D_f", "least D_g at this D_f", "above it",
             "% in the middle, Euler-Maruyama", "flow"], ["---"] + ["---:"] * 6]
    def add(title, g, f, *shares):
        least = paper_unit(limit(from_paper_unit(f)))
        percents = [[100 * p for p in (v["share"], *v["ci95"])] for v in shares]
        cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*p) for p in percents] or ["", ""]
        rows.append([title, f"{g:.3f}", f"{f:.2f}", f"{least:.3f}", f"{g - least:+.3f}", *cells])
    for name, m in results["methods"].items():
        share = m["share"]
        add(m["title"], *in_paper_unit(m["nll_nats"]), share["em"], share["ode"])
        add("exact optimum", *in_paper_unit(m["exact_nats"]), share["exact_em"], share["exact_ode"])
        if name in PAPER:
            add("the paper", *PAPER[name])
    add("Unlearning (the paper)", *PAPER_UNLEARNING)
    return "\n".join([
        f"{results['device']}; seed {results['config']['seed']}; `{results['command']}`\n",
        *("| " + " | ".join(row) + " |" for row in rows),
        "\nThe paper's row Unlearning is impossible: at 39.01 on D_f a density has at least 11.04 "
        "on D_g (section 3 of toy_gmm.py). In the middle: nearest the mean of D_f, of "
        f"{share['em']['n']} samples, 95% intervals; of real D_g "
        f"{100 * results['share_real']['D_g']:.1f}%. Unlearned scores "
        "need not be those of one density: then the two samplers draw from different laws.\n"])

def limit_panel(ax, methods):
    """All methods by their two likelihoods, and the region that no density can reach."""
    f = torch.linspace(10, 41, 160, dtype=torch.float64)
    g = paper_unit(limit(from_paper_unit(f)))
    ax.fill_between(f, 10.4, g, color="0.85", lw=0, label="no density can be here")
    for name, m in methods.items():
        colour, marker = LOOK[name]
        ax.plot(*in_paper_unit(m["nll_nats"])[::-1], marker, color=colour, label=m["title"])
        ax.plot(*in_paper_unit(m["exact_nats"])[::-1], marker, color=colour, ms=10, mfc="none")
        ax.plot(*PAPER.get(name, (0, 0))[::-1], "x", color=colour, ms=7, mew=2)
    ax.plot(*PAPER_UNLEARNING[::-1], "x", color="red", ms=7, mew=2, label="Unlearning (paper)")
    ax.set(xlim=(10.2, 41), ylim=(10.44, 11.15), xlabel="NLL of D_f (bits/dim + 8): high forgets",
           ylabel="NLL of D_g: low keeps", title="The limit of unlearning")
    ax.legend(loc="upper center", ncol=2, title="filled: trained, open: exact optimum, x: paper")

def figure1(results, training, samples, n=1600):
    """Figure 1: the training data, what each method generates from them, and the limit."""
    figure = Figure(figsize=(9.6, 9.2), layout="constrained")
    axes = figure.subplot_mosaic([["data", "standard", "unseen"],
                                  ["orthogonal", "obtuse", "obtuse_score"], ["limit"] * 3])
    clouds = [("data", "D_g and D_f (orange)", training[0][:n * 4 // 5], training[1][:n // 5])]
    for name, m in results["methods"].items():
        x, share = samples[name][:n], m["share"]["em"]["share"]
        far = nearest_forgotten(x)
        clouds.append((name, f"{m['title']}\n{100 * share:.1f}% in the middle", x[~far], x[far]))
    for name, title, kept, forgotten in clouds:
        axes[name].scatter(*kept.T, s=4, c=BLUE, alpha=0.45, lw=0)
        axes[name].scatter(*forgotten.T, s=8, c=ORANGE, alpha=0.8, lw=0, marker="^")
        axes[name].set(xlim=(-5.6, 5.6), ylim=(-5.6, 5.6), aspect="equal", title=title)
    limit_panel(axes["limit"], results["methods"])
    return figure

@torch.no_grad()
def figure2(scores, t=0.08):
    """Figure 2: the learned scores over the density of D at the paper's t, where s = 0.018. There a
    score wrong by 1 moves e by 0.018 only: the losses hardly see it, so training is rough."""
    figure = Figure(figsize=(9.6, 6.8), layout="constrained")
    *axes, line = figure.subplots(2, 3).flat
    fine, side, r = (torch.linspace(-end, end, n) for end, n in ((5.2, 121), (4.8, 21), (4.5, 301)))
    density = log_density(DATA, torch.cartesian_prod(fine, fine)).exp().reshape(121, 121).T
    x = torch.cartesian_prod(side, side)
    x = x[log_density(DATA, x).exp() > 3e-4]           # farther out there were no data to learn
    colours = [ORANGE if f else BLUE for f in log_density(FORGET, x) > log_density(KEEP, x)]
    diagonal = r[:, None].expand(-1, 2) / math.sqrt(2)
    for ax, (name, method) in zip(axes, METHODS.items()):
        ax.set(xlim=(-5.2, 5.2), ylim=(-5.2, 5.2), aspect="equal", title=method.title)
        ax.contourf(fine, fine, density, levels=10, cmap="Greys", vmin=0, vmax=0.15)
        for score, colour in ((scores["standard"], "0.7"), (scores[name], colours)):
            v = sgu.score_at(score, x, t)
            v = v / (1 + v.norm(dim=1, keepdim=True) / 4)      # long arrows would cross
            ax.quiver(*x.T, *v.T, color=colour, angles="xy", scale_units="xy", scale=3.6)
        for score, style in ((scores[name], "-"), (optimum(name), "--")):
            along = sgu.score_at(score, diagonal, t).sum(1) / math.sqrt(2)
            line.plot(r, along, style, color=LOOK[name][0])
    line.set(xlim=(-4.5, 4.5), ylim=(-4.2, 4.2), box_aspect=1, title="Along the diagonal",
             xlabel="towards (2, 2); dashed: exact optimum")
    line.legend(line.lines[::2], [method.title for method in METHODS.values()], loc="upper left")
    figure.suptitle(f"Scores at t = {t:g}; grey: Standard's; orange: where D_f is denser than D_g")
    return figure

# ==== 7. The command: python toy_gmm.py ===========================================================
FULL = dict(train=200_000, steps=1200, samples=10_000, nll=(32, 0.5))       # nll: see measure_nll
QUICK = dict(train=2000, steps=60, samples=200, nll=(8, 1.))
Options = collections.namedtuple("Options", "out quick seed", defaults=("runs/toy", False, 0))

def parse_options(argv=None):
    """argv -> Options; one line and exit code 2 for what cannot be understood."""
    parser = argparse.ArgumentParser(prog="toy_gmm.py", description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"toy_gmm: {message}\n")
    parser.add_argument("--out", default="runs/toy", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="hardly any training, few samples")
    parser.add_argument("--seed", default=0, type=int, help="default: %(default)s")
    opt = Options(**vars(parser.parse_args(argv)))
    if not 0 <= opt.seed < 2 ** 31:
        parser.error(f"--seed must be in 0..{2 ** 31 - 1}, not {opt.seed}")
    return opt

def measure_nll(score, steps, spacing):
    """The expected NLL of D_g and D_f under the flow of score, in nats, and its numerical error.
    That the flow starts from N(0, 20^2 I) instead of p_1 costs another 0.01 at most."""
    nll = dict(error=0.)
    for key, components in (("D_g", KEEP), ("D_f", FORGET)):
        x, cell = quadrature(components, spacing, reach=5)
        log_q, error = sgu.log_likelihood(score, SDE, x.float(), steps, exact=True, error=True)
        p = log_density(components, x).exp() * cell
        nll[key] = -float(p @ log_q)
        nll["error"] = max(nll["error"], float(p @ error))
    return nll

def measure_share(score, n, seed):
    """The share of n samples nearest D_f's mean, by sampler, ode or em; and the samples of em."""
    shares = {}
    for key, sampler, steps in (("ode", sgu.ode_sample, 40), ("em", sgu.euler_maruyama, 100)):
        x = sampler(score, SDE, (n, 2), steps=steps, generator=torch.Generator().manual_seed(seed))
        k = int(nearest_forgotten(x).sum())
        shares[key] = dict(share=k / n, n=n, ci95=sgu.wilson(k, n), steps=steps)
    return shares, x

def run(opt):
    """Train, measure, draw. Returns what results.json holds."""
    os.makedirs(opt.out, exist_ok=True)
    tempfile.TemporaryFile(dir=opt.out).close()        # an OSError now rather than after the work
    begin = time.time()
    size = QUICK if opt.quick else FULL
    n, g = size["train"] // 5, torch.Generator().manual_seed(opt.seed)
    training = sample_mixture(KEEP, 4 * n, g), sample_mixture(FORGET, n, g)
    methods, scores, samples = {}, {}, {}
    for name, method in METHODS.items():
        sgu.say(f"{time.time() - begin:3.0f} s: {method.title}")
        *_, last = train_toy(name, *training, steps=size["steps"], seed=opt.seed)
        scores[name] = last["score"]
        share, samples[name] = measure_share(scores[name], size["samples"], opt.seed)
        exact, _ = measure_share(optimum(name), size["samples"], opt.seed)
        share.update({f"exact_{key}": value for key, value in exact.items()})
        methods[name] = dict(title=method.title, alpha=method.alpha, share=share,
                             nll_nats=measure_nll(scores[name], *size["nll"]),
                             exact_nats=measure_nll(optimum(name), *size["nll"]))
    results = dict(
        command="python toy_gmm.py" + " --quick" * opt.quick + f" --seed {opt.seed}",
        config=dict(opt._asdict(), sde="VE(0.01, 20)", data_std=DATA_STD, **size),
        device=sgu.describe("cpu"), seconds=round(time.time() - begin, 1), methods=methods,
        versions=dict(python=platform.python_version(), torch=torch.__version__),
        share_real=dict(D_g=float(nearest_forgotten(training[0]).float().mean())))
    results["markdown"] = make_table(results)
    sgu.save_json(f"{opt.out}/results.json", results)
    sgu.replace_file(f"{opt.out}/table1.md", results["markdown"])
    with matplotlib.rc_context(STYLE):
        figure1(results, training, samples).savefig(f"{opt.out}/figure1.png", dpi=160)
        figure2(scores).savefig(f"{opt.out}/figure2.png", dpi=160)
    print(f"{results['markdown']}\nFigures and numbers are in {opt.out!a}", flush=True)
    return results

def main(argv=None):
    """The command line. Exit codes: 0 done, 2 something to mend (one line says it), 130 Ctrl-C."""
    try:
        run(parse_options(argv))
        return 0
    except BrokenPipeError:                            # all is saved; nobody reads on
        sys.stdout = open(os.devnull, "w")
        return 0
    except (OSError, FloatingPointError) as error:
        sgu.say(f"toy_gmm: {error}")
        return 2
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    torch.set_num_threads(1)                           # tensors this small are slower on several
    sys.exit(main())
