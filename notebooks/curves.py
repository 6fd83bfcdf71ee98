"""What notebooks 01, 06 and 08 quote from longer runs than their own.

    python notebooks/curves.py limit   how near exact minimisers and trained networks come to the
                                       limit of unlearning on the toy mixture: results/limit.json,
                                       ten minutes on one core
    python notebooks/curves.py sigma   test digits noised to a level sigma and walked back, by the
                                       shipped networks: results/sigma-mnist-3,7.json, five minutes
"""
import functools, math, os, pathlib, sys, time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch

import sgu
import toy_gmm as toy

# ==== 1. Reconstruction over sigma (notebook 06) ==================================================
PAPER_SIGMA = (lambda a, s: s / a)(*sgu.VP().at(0.02))             # of Table 4: VP at t = 0.02
SIGMAS = (PAPER_SIGMA, 0.2, 0.4, 0.7, 1.0, 1.5, 2.5, 5.0)


def there_and_back(digits, x8, sigma, steps=12):
    """Images x8 (N, C, H, W) uint8 noised to sigma and walked back by every network, from the same
    noise: {method: images}. digits: of kit.digit_models."""
    device = next(digits.networks["standard"].parameters()).device
    t = float(digits.sde.time(torch.tensor([sigma], dtype=torch.float64)))
    x, back = sgu.from_levels(x8.to(device)), {}
    for m, score in digits.scores.items():
        generator = torch.Generator(device).manual_seed(0)
        back[m] = sgu.to_levels(sgu.reconstruct(score, digits.sde, x, t, steps, generator))
    return back


def run_sigma(n=200):
    """The share of n digits each of D_g and D_f that come back as what they were, or as nothing."""
    from kit import digit_models, verdicts
    digits = digit_models(shipped=True)
    sets = dict(D_g=(digits.kept[:n], digits.kept_labels[:n]),
                D_f=(digits.gone[:n], digits.gone_labels[:n]))
    levels = {}
    for sigma in SIGMAS:
        level = levels["paper" if sigma == PAPER_SIGMA else f"{sigma:g}"] = dict(sigma=sigma)
        for key, (x8, truth) in sets.items():
            for m, images in there_and_back(digits, x8, sigma).items():
                right, none = (int(v.sum()) for v in verdicts(digits.judge, images, truth))
                level.setdefault(m, {})[key] = dict(
                    accuracy=right / len(x8), ci95=sgu.wilson(right, len(x8)),
                    none=none / len(x8), n=len(x8))
        sgu.say(f"sigma = {sigma:.3g}")
    same = float(digits.sde.time(torch.tensor([PAPER_SIGMA], dtype=torch.float64)))
    schedules = {name: (lambda a, s: s / a)(*kind().at(0.02)) for name, kind in
                 sgu.SCHEDULES.items()}
    return dict(levels=levels, sigma_at_2_percent=schedules, paper_t_of_ve=same, steps=12, seed=0)


# ==== 2. The limit, and how near methods come to it (notebooks 01 and 08) =========================
SETTINGS = dict(         # alpha of the exact minimisers; for NegGrad mu, as a share of min p_g/p_f
    orthogonal=(0.99, 0.97, 0.95, 0.9, 0.85, 0.8, 0.67, 0.5),
    obtuse=(0.95, 0.93, 0.9, 0.88, 0.85, 0.82, 0.8, 0.75, 0.7),
    obtuse_score=(0.97, 0.95, 0.92, 0.9, 0.88, 0.85, 0.82, 0.78),
    relative=(0.97, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
    neggrad=(0.2, 0.4, 0.6, 0.8, 0.9, 0.97))
TRAINED = dict(orthogonal=(0.9, 0.67), obtuse=(0.9, 0.8), obtuse_score=(0.92, 0.85),
               relative=(0.8, 0.6))
LEVELS, SHARES = (12, 12.5, 13, 14, 15), (0.06, 0.04, 0.03)         # where frontiers are compared
RELATIVE = functools.partial(sgu.relative_loss, reference=toy.exact_score(toy.DATA))


def elementwise_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
    """mean_i (e_i z_i)^2: what 'orthogonal' becomes if the square is taken before the sum."""
    t, e, z = sgu.predict_noise(score, sde, x0, t, z, generator)
    return (sgu.loss_weight(sde, t, weighting, power=2) * (e * z).square().mean(1)).mean()


def minus(t):
    """The weight of a forget loss with the wrong sign."""
    return -torch.ones_like(t)


def exact(name, setting):
    """The exact minimiser of a method at a setting, as a function score(x, t)."""
    if name == "neggrad":
        setting *= math.exp(-4)                        # min p_g/p_f of this mixture
    kind, weighting = dict(obtuse_score=("obtuse", toy.capped), wrong_sign=("obtuse", minus)).get(
        name, (name, "noise"))
    return toy.exact_unlearned_score(kind, setting, weighting=weighting)


def learn(name, alpha, training, steps=3600):
    """The score of a network trained by a method of toy_gmm.py, or by SGU-Relative."""
    how = toy.METHODS.get(name, toy.ToyMethod("SGU-Relative", RELATIVE))
    toy.METHODS[name] = how._replace(alpha=alpha)
    *_, last = toy.train_toy(name, *training, steps=steps, seed=0)
    return last["score"]


def measure(score, steps=32, step=0.4):
    """NLLs in nats, and by the probability flow the mass nearest the forgotten mode and in all (1
    but for what lies outside the grid). The border of the region passes between two grid points."""
    x, cell = toy.quadrature(toy.KEEP, step=step, reach=5.5)
    q = sgu.log_likelihood(score, toy.SDE, x, steps=steps, exact=True)
    nll = {key: -float((toy.log_density(p, x).exp() * q).sum() * cell)
           for key, p in (("D_g", toy.KEEP), ("D_f", toy.FORGET))}
    near = toy.nearest_forgotten(x.float())
    return dict(nll, share=float(q.exp()[near].sum() * cell), mass=float(q.exp().sum() * cell))


def share_limit(share):
    """The least E_g[-log q] of all densities with this share nearest the forgotten mode, nats: the
    entropy of p_g and the divergence of two coins, since p_g itself has the share pi there."""
    x, cell = toy.quadrature(toy.KEEP, step=0.4, reach=5.5)           # as measure
    p = toy.log_density(toy.KEEP, x).exp() * cell
    pi = float(p[toy.nearest_forgotten(x.float())].sum())
    entropy = -float((p * toy.log_density(toy.KEEP, x)).sum())
    return entropy + pi * math.log(pi / share) + (1 - pi) * math.log((1 - pi) / (1 - share))


def at(points, key, value, gap):
    """The gap to the limit in bits/dim where a frontier passes value, between two of its settings;
    None if it does not get there."""
    for a, b in zip(points, points[1:]):
        if min(a[key], b[key]) <= value <= max(a[key], b[key]):
            w = (value - a[key]) / (b[key] - a[key])
            return toy.bits((1 - w) * a[gap] + w * b[gap])
    return None


def field_error(learned, wanted, s=1.0):
    """Over noised points of both sets at noise s, root mean squares per coordinate of e: what a
    network still misses, what unlearning changed, and their ratio."""
    g, t = torch.Generator().manual_seed(5), toy.SDE.time(torch.full((4000,), s))
    x = torch.cat([toy.sample_mixture(p, 2000, g) for p in (toy.KEEP, toy.FORGET)])
    x = x + s * torch.randn(x.shape, generator=g)
    def apart(a, b):
        return float((s * (a(x, t) - b(x, t))).detach().square().mean().sqrt())
    error, change = apart(learned, wanted), apart(wanted, toy.exact_score(toy.KEEP))
    return dict(error=error, change=change, ratio=error / change)


def run_limit():
    """Exact minimisers and trained networks against both limits."""
    g = torch.Generator().manual_seed(0)
    training = toy.sample_mixture(toy.KEEP, 40000, g), toy.sample_mixture(toy.FORGET, 10000, g)
    found, fields = dict(exact={}, trained={}), {}
    fine = dict(steps=64, step=4 / 18)                 # NegGrad's density nearly vanishes at 0
    for name, settings in SETTINGS.items():
        found["exact"][name] = [
            dict(measure(exact(name, a), **(fine if name == "neggrad" else {})), setting=a)
            for a in settings]
        sgu.say(f"exact: {name}")
    for name, settings in TRAINED.items():
        found["trained"][name] = []
        for a in settings:
            score = learn(name, a, training)
            wide = lambda x, t: score(x.float(), t.float()).double()      # the grid is float64
            found["trained"][name].append(dict(measure(wide), setting=a))
            fields[name] = field_error(score, exact(name, a))
        sgu.say(f"trained: {name}")
    slips = dict(elementwise=measure(exact("elementwise", 0.67)),
                 wrong_sign=measure(exact("wrong_sign", 0.8)))
    for points in [p for group in found.values() for p in group.values()]:
        bounds = toy.limit(torch.tensor([p["D_f"] for p in points], dtype=torch.float64))
        for p, bound in zip(points, bounds):
            p.update(gap=p["D_g"] - float(bound), share_gap=p["D_g"] - share_limit(p["share"]))
    gaps = {name: dict(D_f={str(v): at(p, "D_f", toy.from_paper_unit(v), "gap") for v in LEVELS},
                       share={str(v): at(p, "share", v, "share_gap") for v in SHARES})
            for name, p in found["exact"].items()}
    inverse = found["exact"]["neggrad"]
    paper_g, paper_f = toy.PAPER_UNLEARNING
    quoted = dict(                                     # in the unit of the paper's Table 1
        least_at_the_papers_D_f=toy.paper_unit(toy.limit(toy.from_paper_unit(paper_f))),
        the_papers=dict(D_g=paper_g, D_f=paper_f), ratio_min=math.exp(-4),
        neggrad=dict(D_f=toy.paper_unit(inverse[-1]["D_f"]),
                     gap=max(toy.bits(p["gap"]) for p in inverse)),
        slips={name: dict(p, D_g=toy.paper_unit(p["D_g"]), D_f=toy.paper_unit(p["D_f"]))
               for name, p in slips.items()})
    return dict(found, fields=fields, gaps_bits=gaps, quoted=quoted, seed=0,
                unit="nats; share and mass: of the probability flow on the grid",
                training=dict(steps=3600, points=[40000, 10000]),
                quadrature=dict(step=0.4, likelihood_steps=32, neggrad=fine),
                markdown=gap_table(gaps))


def gap_table(gaps):
    """Where the frontiers of the exact minimisers pass, in Markdown."""
    from style import TITLE
    def row(name, gap):
        cells = ["-" if v is None else f"{v:+.3f}" for v in (*gap["D_f"].values(),
                                                             *gap["share"].values())]
        return f"| {TITLE[name]} | " + " | ".join(cells) + " |"
    head = [f"D_f at {v:g}" for v in LEVELS] + [f"{v:.0%} in the middle" for v in SHARES]
    return "\n".join(["| exact minimiser | " + " | ".join(head) + " |",
                      "|---|" + "---:|" * len(head), *(row(*item) for item in gaps.items()), "",
                      "NLL of D_g above the limit, bits/dim, at equal NLL of D_f (bits/dim + 8) or "
                      "at equal mass of the probability flow nearest the forgotten mode. -: its "
                      "settings do not get there.\n"])


def main(words):
    jobs = dict(limit=("limit", run_limit), sigma=("sigma-mnist-3,7", run_sigma))
    if len(words) != 1 or words[0] not in jobs:
        sys.exit(__doc__)
    os.chdir(HERE)                                     # kit.py looks for results/ here
    torch.set_num_threads(1)
    name, job = jobs[words[0]]
    start = time.time()
    sgu.save_json(HERE / "results" / f"{name}.json", dict(
        command=f"python notebooks/curves.py {words[0]}", device=sgu.describe("cpu"), **job()))
    import stale
    stale.sign(pathlib.Path(__file__).resolve(), start)            # which code made it


if __name__ == "__main__":
    main(sys.argv[1:])
