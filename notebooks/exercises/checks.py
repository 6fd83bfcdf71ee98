"""Oracles, and a check of every function that an exercise asks for, in the order of sgu.py.

Every check_<name>(fn, ...) takes the function under test as its first argument and raises
AssertionError with the likely mistake in words, which are never the answer. ../../test_sgu.py calls
the same checks on sgu.py's own functions, the defaults. Tolerances of random quantities are 4 to 5
standard errors, with n stated; seeds are fixed, so a check that passes keeps passing.
"""
import copy
import functools
import inspect
import math
import pathlib
import sys

import numpy as np
import torch
import torch.nn as nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import sgu

F64 = torch.float64
SDES = {"VE": sgu.VE(0.01, 20.0), "VP": sgu.VP(), "DDPM": sgu.DDPM()}

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

def expect(got, want, what, tol=1e-5, mistakes=None):
    """Assert |got - want| <= tol max(1, |want|). mistakes: {explanation: value it would give}."""
    assert got is not None, f"{what}: your function returned None; is its return missing?"
    got, want = (torch.as_tensor(v).detach().to(F64) for v in (got, want))
    assert got.shape == want.shape or got.numel() == want.numel() == 1, \
        f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    def equals(v, tol):
        v = torch.as_tensor(v).detach().to(F64)
        return bool(((got - v).abs() <= tol * v.abs().clamp(min=1)).all())
    if equals(want, tol):
        return
    named = (text for text, value in (mistakes or {}).items() if equals(value, min(tol, 0.02)))
    why = next(named, None)
    worst = (got - want).abs().nan_to_num(math.inf).flatten().argmax()
    value, target = (v.expand(got.shape).flatten()[worst].item() for v in (got, want))
    digits = ".6g" if f"{value:.6g}" != f"{target:.6g}" else ".12g"
    symptom = f"{what}: {value:{digits}}, not {target:{digits}}"
    error = AssertionError(symptom + (f": {why}" if why else ""))
    error.symptom = symptom
    raise error

def as_tensor(got):
    """got, if it is a list of numbers or an array, as a tensor of all its digits."""
    return torch.as_tensor(np.asarray(got)) if isinstance(got, (list, tuple, np.ndarray)) else got

def two(got, what):
    """got, which must be two of what: numbers, lists, arrays or tensors."""
    got = as_tensor(got) if isinstance(got, np.ndarray) else got
    assert isinstance(got, (tuple, list)) or torch.is_tensor(got) and got.shape[:1] == (2,), \
        f"return two things, {what}, not {type(got).__name__}"
    assert len(got) == 2, f"return two things, {what}, not {len(got)}"
    return [torch.as_tensor(as_tensor(v)) for v in got]

def keys_of(got, *keys):
    assert isinstance(got, dict) and set(keys) <= got.keys(), \
        f"return dict({', '.join(f'{key}=...' for key in keys)})"
    return [got[key] for key in keys]

def with_one_time_each(score, at=None):
    """The same score, which insists on one time per point, and on the time at where it is given."""
    def asked(x, t):
        assert t.shape == (len(x),), \
            "the score takes one time per point, t: (B,); yours has the shape " \
            f"{tuple(t.shape)} (sgu.score_at fills it up)"
        assert at is None or (t - at).abs().max() < 1e-6, \
            f"x is at time t = {float(at):.3g}, so ask the score at that time, not at " \
            f"{float(t[0]):.3g}"
        return score(x, t)
    return asked

def check_trainable(loss):
    assert torch.is_tensor(loss) and loss.requires_grad, \
        "the loss has no gradient, so nothing could be trained by it: return a tensor, without " \
        "detach, item or float"

def check_seeded(sample):
    """sample(generator) twice with one seed is the same, bit for bit; with another it is not."""
    torch.manual_seed(1)
    first = sample(seeded(3))
    torch.manual_seed(2)
    assert torch.equal(first, sample(seeded(3))), \
        "the same generator seed must give the same result: pass the generator to every draw"
    assert not torch.equal(first, sample(seeded(4))), "another seed must give another result"

class Mixture:
    """Gaussian mixture with full covariances: log p_t and score at x_t = a x0 + s z, in float64."""

    def __init__(self, weights, means, covs):
        self.weights, self.means, self.covs = (torch.tensor(v, dtype=F64)
                                               for v in (weights, means, covs))
        self.eig, self.axes = torch.linalg.eigh(self.covs)           # (K, D), (K, D, D)

    def terms(self, x, a, s):
        """log w_k N_k(x): (B, K), and N_k's precision times x - a m_k along its axes: (B, K, D)."""
        a, s = (torch.as_tensor(v, dtype=F64).reshape(-1, 1, 1) for v in (a, s))
        r = torch.einsum("bkd,kde->bke", x.to(F64)[:, None] - a * self.means, self.axes)
        var = a ** 2 * self.eig + s ** 2
        log_n = -0.5 * (r ** 2 / var + (2 * math.pi * var).log()).sum(2)
        return self.weights.log() + log_n, r / var

    def log_prob(self, x, a=1.0, s=0.0):
        return self.terms(x, a, s)[0].logsumexp(1)

    def score(self, sde):
        def score(x, t):
            log_w, pull = self.terms(x.flatten(1), *sde.marginal(t.to(F64)))
            back = torch.einsum("bk,bke,kde->bd", log_w.softmax(1), pull, self.axes)
            return -back.to(x.dtype).reshape(x.shape)
        return score

    def sample(self, n, generator):
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=F64)
        step = torch.einsum("bde,be->bd", self.axes[k], self.eig[k].sqrt() * z)
        return (self.means[k] + step).float()

    def expect_samples(self, x, what, bias=0.01):
        """Weights, means and covariances of x, by the exact responsibilities (unbiased under the
        exact law), within 4.5 standard errors + bias."""
        assert torch.isfinite(x).all(), f"{what}: samples are not finite"
        x, r = x.to(F64), self.terms(x, 1.0, 0.0)[0].softmax(1)
        n, w = r.sum(0), self.weights
        mean = r.T @ x / n[:, None]
        d = x[:, None] - mean
        cov = torch.einsum("bk,bkd,bke->kde", r, d, d) / n[:, None, None]
        var = self.covs.diagonal(dim1=1, dim2=2)
        cov_se = (2 * var[:, :, None] * var[:, None] / n[:, None, None]).sqrt()
        for name, got, want, se in (("weight", n / len(x), w, (w * (1 - w) / len(x)).sqrt()),
                                    ("mean", mean, self.means, (var / n[:, None]).sqrt()),
                                    ("covariance", cov, self.covs, cov_se)):
            off = ((got - want).abs() / (4.5 * se + bias)).max()
            assert off < 1, f"{what}: a component's {name} is off by {off:.1f} times the " \
                            f"tolerance; got {got.tolist()}, want {want.tolist()}"

UNIT, WIDE = [[1, 0], [0, 1]], [[.3, .2], [.2, .25]]
TOY = Mixture([.4, .2, .4], [[-2, -2], [0, 0], [2, 2]], [UNIT] * 3)  # the paper's toy example
TILTED = Mixture([.5, .3, .2], [[-1.5, -1], [1.5, -.5], [.3, 1.5]],  # its Jacobian is not diagonal
                 [[[.3, .15], [.15, .2]], [[.2, -.1], [-.1, .4]], [[.1, 0], [0, .15]]])
GAUSS = Mixture([1.], [[.5, -.3]], [WIDE])

def planted(sde, e, calls=None, times=None):
    """A score that predicts the noise e whatever it sees, and notes what it saw in calls. Asked
    about some of the images it knows them by their times, if these are given."""
    def score(x, t):
        if calls is not None:
            calls.append((x.clone(), t.clone()))
        mine = e if e.dim() else e.expand_as(x)
        if times is not None and len(x) < len(e):
            mine = e[(t.to(F64)[:, None] - times).abs().argmin(1)]
        return -(mine / sgu.per_sample(sde.marginal(t)[1], x)).to(x.dtype)
    return score

def score_of_one_image(sde, image=0.5):
    """The exact score of data that are one single image."""
    def score(x, t):
        a, s = (sgu.per_sample(v, x) for v in sde.marginal(t.to(F64)))
        return -(x - image * a) / s ** 2
    return score

def counting(score, calls):
    """The same score; calls gets the time of every evaluation."""
    def counted(x, t):
        calls.append(float(t[0]))
        return score(x, t)
    return counted

def loss_example(sde):
    """x0, t, z and e for the loss checks: 3 images of 2x2x2, different times on the DDPM chain."""
    g = seeded(7)
    x0, z, e = (torch.randn(3, 2, 2, 2, generator=g, dtype=F64) for _ in range(3))
    return x0, torch.tensor([0.1, 0.45, 0.9], dtype=F64), z, e

def with_moments(mean, cov, n, seed, ddof=1):
    """(n, D) points whose sample mean and covariance are exactly mean and cov."""
    raw = torch.randn(n, len(mean), generator=seeded(seed), dtype=F64)
    raw = raw - raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T, correction=ddof)).T)
    return white @ torch.linalg.cholesky(cov).T + mean

# ==== 1. Schedules ================================================================================

def check_schedule(sde=SDES["VP"], marginal=None, drift=None, diffusion=None):
    """a' = (f/x) a and (s^2)' = 2 (f/x) s^2 + g^2 by central differences, between the times of a
    DDPM. Parts may be replaced."""
    marginal = marginal or sde.marginal
    drift, diffusion = drift or sde.drift, diffusion or sde.diffusion
    t, h = (torch.arange(5, 996, 10, dtype=F64) - 0.5) / 1000, 1e-5
    (a, s), (a_lo, s_lo), (a_hi, s_hi) = (marginal(t + d) for d in (0, -h, h))
    x = torch.tensor([[1., -2.]], dtype=F64)
    f, g = as_tensor(drift(x.expand(len(t), 2), t)), as_tensor(diffusion(t))
    for name, value, shape in (("drift", f, (len(t), 2)), ("diffusion", g, (len(t),))):
        assert torch.is_tensor(value), \
            f"your {name} returned {type(value).__name__}, not a tensor; is its return missing?"
        assert value.shape == shape, \
            f"your {name} has the shape {tuple(value.shape)}, not {shape}"
    expect(f[:, 1], -2 * f[:, 0], "the drift at x = -2 against x = 1 (f is linear in x)")
    f, g2 = f[:, 0], g ** 2
    da, ds2 = (a_hi - a_lo) / (2 * h), (s_hi ** 2 - s_lo ** 2) / (2 * h)
    other = ("f and g belong together, but to another beta(t): beta itself, not its integral, runs "
             "from beta_0 to beta_1")
    if (a == 1).all():
        other = "a variance exploding chain has a = 1 and f = 0"
    expect(f * a, da, "f a/x against da/dt", 1e-5, {
        "your drift's sign is flipped": -da,
        "your drift is twice too large": 2 * da,
        "your drift is half of what it should be": da / 2,
        "the drift is zero: only VE has no drift": 0 * da,
        other: -g2 / 2 * a})
    true_g2 = ds2 - 2 * f * s ** 2
    expect(g2, true_g2, "g^2 against d(s^2)/dt - 2 (f/x) s^2", 1e-5, {
        "diffusion returns g^2: take the square root": true_g2 ** 2,
        "g^2 is twice too large": 2 * true_g2,
        "g^2 is half of what it should be": true_g2 / 2,
        "this is ds/dt: g^2 is the rate of the VARIANCE s^2": (s_hi - s_lo) / (2 * h)})

def check_ve_marginal(marginal=SDES["VE"].marginal, sigma_min=0.01, sigma_max=20.):
    """marginal(t) for these ends: a = 1, and s is a geometric mean of its ends. The other times are
    in no order, for whoever ignores t."""
    for t, where in (((0., 0.5, 1.), "0, 1/2, 1"), ((0.75, 0.25, 0.875), "3/4, 1/4, 7/8")):
        t = torch.tensor(t, dtype=F64)
        a, s = two(marginal(t), "a and s")
        expect(a, [1.] * 3, "a of VE", 1e-12, {
            "a variance exploding chain keeps the image: a = 1": (1 - s ** 2).clamp(min=0).sqrt()})
        want, usual = (torch.tensor([lo ** (1 - r) * hi ** r for r in t.tolist()], dtype=F64)
                       for lo, hi in ((sigma_min, sigma_max), (0.01, 20.)))
        what = f"s of VE at t = {where} over the geometric mean of {sigma_min:g} and {sigma_max:g}"
        expect(s / want, [1.] * 3, what, 1e-6, {
            "the arguments sigma_min and sigma_max are not used": usual / want,
            "you returned the variance s^2": want,
            "log s, not s, is linear in t": (sigma_min + t * (sigma_max - sigma_min)) / want})

def check_vp_marginal(marginal=SDES["VP"].marginal, beta_0=0.1, beta_1=20.):
    """marginal(t) for these ends: beta is a straight line, so the trapezium rule integrates it. The
    other times are in no order, for whoever ignores t."""
    for t, where in (((0., 0.5, 1.), "0, 1/2, 1"), ((0.75, 0.25, 0.875), "3/4, 1/4, 7/8")):
        t = torch.tensor(t, dtype=F64)
        a, s = two(marginal(t), "a and s")
        def factor(lo, hi, t=t):
            halves = [r * (lo + (lo + r * (hi - lo))) / 4 for r in t.tolist()]
            return torch.tensor([math.exp(-half) for half in halves], dtype=F64)
        want = factor(beta_0, beta_1)
        expect(a, want, f"a of VP at t = {where}, beta from {beta_0:g} to {beta_1:g}", 1e-6, {
            "the arguments beta_0 and beta_1 are not used": factor(0.1, 20.),
            "this is a^2: the 1/2 in front of the integral is missing": want ** 2,
            "a is the square of what you returned: there is a 1/2 too many": want.sqrt(),
            "this is exp(-beta(t)/2), without the integral":
                (-0.5 * (beta_0 + t * (beta_1 - beta_0))).exp(),
            "the sign is flipped: a falls from 1 to nearly 0": 1 / want,
            "the integral of r from 0 to t is t^2/2, not t^2":
                (-0.5 * (t * beta_0 + t ** 2 * (beta_1 - beta_0))).exp()})
        expect(s, (1 - want ** 2).sqrt(), "s of VP", 1e-6, {
            "you returned s^2": 1 - want ** 2,
            "a^2 + s^2 = 1, not a + s = 1": 1 - want,
            "s^2 = 1 - a^2: expm1 needs 2 log a": (1 - want).sqrt()})
    t = torch.tensor([1e-4, 1e-3])
    (a, s), (_, exact) = two(marginal(t), "a and s"), two(marginal(t.to(F64)), "a and s")
    what = "s in float32 over s in float64 at small t (a difference of almost equal numbers " \
           "loses its digits)"
    expect(s / exact, [1., 1.], what, 2e-6, {
        "1 - a^2 is such a difference: use expm1": (1 - a ** 2).sqrt() / exact,
        "1 - a is such a difference: use expm1": ((1 - a) * (1 + a)).sqrt() / exact})

def check_ddpm_chain(marginal=SDES["DDPM"].marginal, n_steps=1000, beta_min=1e-4, beta_max=0.02):
    """Walk x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) z: its factor is a, its variance s^2."""
    factor, var, chain = 1., 0., []
    for beta in np.linspace(beta_min, beta_max, n_steps):
        factor, var = factor * math.sqrt(1 - beta), var * (1 - beta) + beta
        chain.append((factor, math.sqrt(var)))
    order = torch.randperm(n_steps, generator=seeded())              # for whoever ignores t
    factor, std = torch.tensor(chain, dtype=F64)[order].T
    for dtype, tol in ((F64, 1e-9), (torch.float32, 2e-5)):
        t = ((order + 1).to(F64) / n_steps).to(dtype)
        a, s = two(marginal(t), "a and s")
        expect(a, factor, f"a of the chain in {dtype}", tol, {
            "this is a^2": factor ** 2})
        expect(s, std, f"s of the chain in {dtype}", tol, {"you returned s^2": std ** 2})
    first = order.argmin()
    expect(s[first] / std[first], 1., "s after the first step, relative", 1e-3)

# ==== 2. Network ==================================================================================

def check_make_score(make_score=sgu.make_score, sde=SDES["VE"], data_std=0.7):
    """A network that answers 0 leaves the score of N(0, data_std^2 I); the ideal one, e = z."""
    x0, t, z, _ = loss_example(sde)
    a, s = (sgu.per_sample(v, x0) for v in sde.marginal(t))
    x, sigma, seen = a * x0 + s * z, s / a, []
    class Answers(nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.answer = answer
        def forward(self, x, level):
            seen.append((x, level))
            return self.answer
    score = make_score(Answers(torch.zeros_like(x)), sde, data_std)
    assert callable(score), "make_score returns a function, score(x, t)"
    zero = score(x, t)
    want, one = -x / (a ** 2 * data_std ** 2 + s ** 2), torch.ones_like(x)
    expect(zero / want, one, "score of a zero network over the Gaussian's score", 1e-5, {
        "this is e (noise), not the score: divide by -s": -s * one,
        "the sign is flipped: score = -e/s": -one,
        "the argument data_std is not used": -x / (a ** 2 * 0.25 + s ** 2) / want,
        "sigma must be s/a, and x must be divided by a": -x / (data_std ** 2 + s ** 2) / want})
    expect(seen[0][0], x / (a ** 2 * data_std ** 2 + s ** 2).sqrt(),
           "the network's input, of unit variance", 1e-5)
    expect(seen[0][1], sigma.flatten().log() / 4, "the network's noise input log(sigma)/4", 1e-5)
    ideal = (sigma / data_std * x0 - data_std * z) / (sigma ** 2 + data_std ** 2).sqrt()
    score = make_score(Answers(ideal), sde, data_std)(x, t)
    expect(-s * score, z, "e of an ideal network", 1e-5, {
        "the network's part has the wrong sign": 2 * (-s * zero) - z})

# ==== 3. Losses ===================================================================================

def check_noising(loss=sgu.score_matching_loss, sde=SDES["VP"]):
    """The score is asked at x_t = a x0 + s z and at the given t."""
    x0, t, z, e = loss_example(sde)
    calls = []
    loss(planted(sde, e, calls, t), sde, x0, t=t, z=z)
    a, s = (sgu.per_sample(v, x0) for v in sde.marginal(t))
    assert calls, "your loss never asks the score"
    x_t, asked = calls[0]
    if len(x_t) < len(x0):                     # image by image: t grows from one to the next
        x_t, asked = (torch.cat(parts) for parts in zip(*calls))
        x_t, asked = x_t[asked.argsort()], asked.sort()[0]
    assert x_t.shape == x0.shape, "ask the score once about every image of the batch"
    expect(asked, t, "the time given to the score")
    expect(x_t, a * x0 + s * z, "the noisy image given to the score", 1e-6, {
        "x0 is not scaled: x_t = a x0 + s z": x0 + s * z,
        "you used s^2 in place of s": a * x0 + s ** 2 * z,
        "no noise was added": a * x0,
        "the score was given x0 itself": x0,
        "z was subtracted": a * x0 - s * z})

def check_score_matching_value(score_matching_loss=sgu.score_matching_loss, sde=SDES["VE"]):
    x0, t, z, e = loss_example(sde)
    s = sgu.per_sample(sde.marginal(t)[1], e)
    want = np.mean([(float(ei) - float(zi)) ** 2 for ei, zi in zip(e.flatten(), z.flatten())])
    got = score_matching_loss(planted(sde, e, times=t), sde, x0, t=t, z=z)
    expect(got, want, "keep loss", 1e-6, {
        "you summed over the pixels: take the mean": want * 8,
        "you summed over the batch: take the mean": want * 3,
        "there is a 1/2 too many": want / 2,
        "the sign of e is flipped: e = -s score": (e + z).square().mean(),
        "you compared the score with z: e = -s score": (-e / s - z).square().mean(),
        "s is missing: e = -s score": (e / s - z).square().mean(),
        "this is |e - z|, not its square": (e - z).abs().mean(),
        "you compared scores: in noise units the weight s^2 belongs in front":
            ((e - z) / s).square().mean()})
    perfect = score_matching_loss(planted(sde, z, times=t), sde, x0, t=t, z=z)
    expect(perfect, 0., "keep loss of a score that knows the noise")
    free = planted(sde, e.requires_grad_(), times=t)
    check_trainable(score_matching_loss(free, sde, x0, t=t, z=z))

def inner(e, z):
    """e.z / D per image by plain loops."""
    rows = [zip(a.flatten().tolist(), b.flatten().tolist()) for a, b in zip(e, z)]
    return torch.tensor([sum(p * q for p, q in row) for row in rows], dtype=F64) / e[0].numel()

def check_orthogonal(orthogonal_loss=sgu.orthogonal_loss, sde=SDES["VE"]):
    """Zero for a perpendicular score, even in the score, equal to the inner product by hand."""
    x0, t, z, e = loss_example(sde)
    def value(e):
        return orthogonal_loss(planted(sde, e), sde, x0, t=t, z=z)
    along = (e * z).sum((1, 2, 3)) / z.square().sum((1, 2, 3))
    perpendicular = e - sgu.per_sample(along, z) * z
    elementwise = (perpendicular * z).square().mean()
    by_element = "you squared element by element, not the inner product"
    expect(value(perpendicular), 0., "orthogonal loss of a perpendicular score", 1e-9, {
        by_element: elementwise, "you squared element by element and summed": 8 * elementwise})
    d, s2 = inner(e, z), sde.marginal(t)[1] ** 2
    flip = torch.tensor([1., -1., 1.], dtype=F64).reshape(3, 1, 1, 1)
    norms = e.flatten(1).norm(dim=1) * z.flatten(1).norm(dim=1)
    expect(value(e), (d ** 2).mean(), "orthogonal loss", 1e-6, {
        by_element: (e * z).square().mean(),
        "you summed over the pixels: (e.z / D)^2 divides by D": (64 * d ** 2).mean(),
        "the square is missing": d.mean(),
        "there is a 1/2 too many": (d ** 2).mean() / 2,
        "you took the absolute value in place of the square": d.abs().mean(),
        "you divided by D once: (e.z / D)^2 divides by D^2": (8 * d ** 2).mean(),
        "you averaged over the batch before squaring": d.mean() ** 2,
        "this is the squared cosine: do not divide by the norms": ((8 * d / norms) ** 2).mean(),
        "this is in score units: (s^2 score.u / D)^2 lacks s^2": (d ** 2 / s2 ** 2).mean(),
        "this is the 'paper' weight 1/s^2": (d ** 2 / s2).mean(),
        "this is the squared cosine with the batch's norms":
            ((8 * d / e.norm() / z.norm()) ** 2).mean()})
    expect(value(-e), value(e), "orthogonal loss of -score against score (it is even)", 1e-9)
    expect(value(flip * e), value(e), "orthogonal loss with one image's score flipped", 1e-9)
    check_noising(orthogonal_loss, sde)
    check_trainable(orthogonal_loss(lambda x, t: (-e).requires_grad_(), sde, x0, t=t, z=z))

def check_obtuse_sign(obtuse_loss=sgu.obtuse_loss, sde=SDES["VE"]):
    """e.z / D: positive when the score points at the forgotten image, negative when away."""
    x0, t, z, e = loss_example(sde)
    def value(e):
        return obtuse_loss(planted(sde, e), sde, x0, t=t, z=z)
    d, s2, toward = inner(e, z), sde.marginal(t)[1] ** 2, z.square().flatten(1).mean(1)
    flipped = "your sign is flipped: the score turns toward the forgotten data"
    lacks, wrong = "this is score.u / D: lambda(t) = s^2 is missing", "a factor s is missing"
    what = "obtuse loss of the score that points at the forgotten image"
    expect(value(z), toward.mean(), what, 1e-6, {
        flipped: -toward.mean(), lacks: (toward / s2).mean(), wrong: (toward / s2.sqrt()).mean(),
        "you summed over the pixels: divide by D": 8 * toward.mean(),
        "there is a 1/2 too many": toward.mean() / 2})
    norms = e.flatten(1).norm(dim=1) * z.flatten(1).norm(dim=1)
    expect(value(e), d.mean(), "obtuse loss", 1e-6, {
        flipped: -d.mean(),
        lacks: (d / s2).mean(),
        wrong: (d / s2.sqrt()).mean(),
        "you summed over the pixels: divide by D": 8 * d.mean(),
        "this is the cosine: do not divide by the norms": (8 * d / norms).mean(),
        "you squared: that is the orthogonal loss": (d ** 2).mean(),
        "you divided by the norms of the whole batch": (8 * d).sum() / e.norm() / z.norm(),
        "you took the absolute value": d.abs().mean()})
    check_noising(obtuse_loss, sde)
    check_trainable(obtuse_loss(lambda x, t: (-e).requires_grad_(), sde, x0, t=t, z=z))

def check_obtuse_turns(obtuse_loss=sgu.obtuse_loss, sde=SDES["VE"]):
    """One gradient step on a free score lowers cos(score, u), u = -z/s, for every image."""
    x0, t, z, e = loss_example(sde)
    s = sgu.per_sample(sde.marginal(t)[1], z)
    free, u = (-e / s).requires_grad_(), -z / s
    grad, = torch.autograd.grad(obtuse_loss(lambda x, t: free, sde, x0, t=t, z=z), free)
    def cos(v):
        return torch.cosine_similarity(v.flatten(1), u.flatten(1))
    turn = cos(free - 0.1 * free.norm() / grad.norm() * grad) - cos(free)
    why = "your sign is flipped: the score turns toward the forgotten data" if (turn > 0).all() \
        else "it must fall for every image"
    assert (turn < 0).all(), f"a step of your obtuse loss changes cos(score, u) by {turn}: {why}"

def check_loss_draws(loss=sgu.score_matching_loss, sde=SDES["VP"], n=20_000):
    """Without t and z: t uniform on [t_min, 1] (DDPM: on the chain 1..n), z standard normal."""
    calls = []
    values = [float(loss(planted(sde, torch.ones(n, 1), calls), sde, torch.zeros(n, 1),
                         generator=seeded(5))) for _ in range(2)]
    assert values[0] == values[1], \
        "the same generator must give the same loss: pass it to every draw"
    x, t = calls[0]
    if isinstance(sde, sgu.DDPM):
        k = t.to(F64) * sde.n_steps
        assert (k - k.round()).abs().max() < 1e-3, "DDPM is trained at the chain's times k/n"
        counts = torch.bincount(k.round().long(), minlength=sde.n_steps + 1).to(F64)
        off = (counts[1:] - n / sde.n_steps).abs().max() / math.sqrt(n / sde.n_steps)
        assert counts[0] == 0 and off < 5, f"k must be uniform on 1..{sde.n_steps}: {counts[:6]}"
    else:
        u = ((t - sde.t_min) / (1 - sde.t_min)).sort()[0].to(F64)
        gap = (u - torch.arange(n) / n).abs().max()                  # Kolmogorov: P(> 0.014) = 7e-4
        assert u[0] >= 0 and u[-1] <= 1 and gap < 0.014, "t must be uniform on [t_min, 1]"
    z = (x / sde.marginal(t)[1][:, None]).flatten().to(F64)
    normal = torch.special.ndtr(z.sort()[0])
    assert (normal - torch.arange(n) / n).abs().max() < 0.014, "z must be standard normal"
    tied = torch.corrcoef(torch.stack([z ** 2, t.to(F64)]))[0, 1]
    assert abs(tied) < 0.03, "z must be independent of t"

# ==== 4. Samplers =================================================================================

def check_denoise(denoise=sgu.denoise, sde=SDES["VP"]):
    """The mean of x0 given x_t for Gaussian data: m + a C (a^2 C + s^2 I)^-1 (x - a m)."""
    x, m, cov = 2 * torch.randn(9, 2, generator=seeded(), dtype=F64), GAUSS.means[0], GAUSS.covs[0]
    for t in torch.tensor([0.02, 0.5], dtype=F64):
        a, s = map(float, sde.marginal(t))
        gain = a * cov @ torch.linalg.inv(a ** 2 * cov + s ** 2 * torch.eye(2, dtype=F64))
        want = m + (x - a * m) @ gain.T
        score = with_one_time_each(GAUSS.score(sde))
        expect(denoise(score, sde, x, t), want, "posterior mean", 1e-6, {
            "the division by a is missing": a * want,
            "the sign of the score is flipped": 2 * x / a - want})

def check_reverse_step(reverse_step=sgu.reverse_step, sde=SDES["VP"], n=100_000):
    """Mean and standard deviation of one step from t = 0.6 to 0.55, from one point, under a linear
    score. n draws: 5 standard errors."""
    t, t_next = torch.tensor([0.6, 0.55], dtype=F64)
    point = torch.tensor([2., -1.])
    score = with_one_time_each(lambda x, t: -x / 3, t)
    g, h = float(sde.diffusion(t.reshape(1))), 0.05
    f = sde.drift(point[None], t.reshape(1).float())[0]
    x = reverse_step(score, sde, point.expand(n, 2), t, t_next, seeded(12))
    assert torch.isfinite(x).all(), "your step is not finite"
    std = g * math.sqrt(h)
    what = "standard deviation of the noise of a step over g sqrt(h)"
    expect(x.std(0) / std, [1., 1.], what, 5 / math.sqrt(2 * n), {
        "noise grows with sqrt(h), not h": [math.sqrt(h)] * 2,
        "the noise is missing, or one z serves the whole batch": [0.] * 2,
        "the noise is g sqrt(h) z, not sqrt(h) z": [1 / g] * 2,
        "the noise has the factor g, not g^2": [g] * 2})
    def move(drift, pull):
        return (drift * f * h + pull * g ** 2 * -point / 3 * h) / std
    got = (x.mean(0) - point) / std
    expect(got, move(-1, 1), "mean movement of a step, in units of its noise", 5 / math.sqrt(n), {
        "the sign of the step is flipped: dt is negative": move(1, -1),
        "the sign of the score is flipped: it leads away from the data": move(-1, -1),
        "the 1/2 belongs to the probability flow, not here": move(-1, 0.5),
        "the drift f is missing": move(0, 1),
        "the sign of the drift is flipped": move(1, 1),
        "the score is multiplied by g^2, not g": move(-1, 1 / g),
        "the score is missing": move(-1, 0)})
    check_seeded(lambda g: reverse_step(score, sde, point.expand(5, 2), t, t_next, g))

def check_sampler(sampler=sgu.euler_maruyama, sde=SDES["VP"], n=10_000, **kw):
    """With the exact score of a mixture of three different, correlated components."""
    x = sampler(TILTED.score(sde), sde, (n, 2), generator=seeded(11), **kw)
    name = getattr(sampler, "__name__", "your sampler")
    TILTED.expect_samples(x, f"{name}, {type(sde).__name__}, n = {n}")

def check_langevin(langevin_step=sgu.langevin_step, sde=SDES["VE"], snr=0.16, n=200_000):
    """Along each axis of a Gaussian the variance goes V -> (1 - eps/v)^2 V + 2 eps with
    eps = 2 (snr s)^2: from the exact law and from a wrong one. n: 5 standard errors sqrt(2/n)."""
    t = torch.tensor(0.3, dtype=F64)
    a, s = map(float, sde.marginal(t))
    var, eps = torch.tensor([1., 4.], dtype=F64) * s ** 2, 2 * (snr * s) ** 2
    score = with_one_time_each(lambda x, t: -x / var.to(x.dtype), t)
    for start in (1., 9.):
        def recursion(drift, noise):
            v = start * var
            for _ in range(10):
                v = (1 + drift * eps / var) ** 2 * v + noise
            return v / recursion_wanted if recursion_wanted is not None else v
        recursion_wanted = None
        recursion_wanted = recursion(-1, 2 * eps)
        x, g = (start * var).sqrt().float() * torch.randn(n, 2, generator=seeded(1)), seeded(2)
        for _ in range(10):
            x = langevin_step(score, sde, x, t, snr, g)
        got = x.to(F64).var(0)
        what = f"variance after 10 corrections from {start:.0f} times the exact one, relative"
        expect(got / recursion_wanted, [1., 1.], what, 0.016, {
            "the noise is sqrt(2 eps) z, not sqrt(eps) z": recursion(-1, eps),
            "the noise is sqrt(2 eps) z, not 2 eps z": recursion(-1, 4 * eps ** 2),
            "the score is multiplied by eps, not eps/2": recursion(-0.5, 2 * eps),
            "eps = 2 (snr s)^2: its 2 is missing": recursion(-0.5, eps),
            "the sign of the score is flipped": recursion(1, 2 * eps),
            "the noise is missing, or one z serves the whole batch": recursion(-1, 0.)})
        if start == 1:
            assert ((got / var - 1).abs() < 0.03 + eps / var / 2).all(), \
                f"the corrector must leave the law as it is; variance ratio {(got / var).tolist()}"
    check_seeded(lambda g: langevin_step(score, sde, torch.ones(5, 2), t, snr, g))

def check_ode_map(ode_sample=sgu.ode_sample, sde=SDES["VP"], steps=25, tol=0.05):
    """The flow of a Gaussian is linear: along each axis y - m, y = x/a, shrinks by
    sqrt((v + sigma_0^2)/(v + sigma_1^2)). -> the worst distance."""
    x1 = sde.prior_sample((200, 2), seeded(6)).to(F64)
    (a1, s1), (a0, s0) = (map(float, sde.marginal(torch.tensor(t, dtype=F64)))
                          for t in (1., sde.t_min))
    m, v, axes = GAUSS.means[0], GAUSS.eig[0], GAUSS.axes[0]
    end = v + (s0 / a0) ** 2
    shrink = (end / (v + (s1 / a1) ** 2)).sqrt() * v / end           # and on to the posterior mean
    want = m + ((x1 / a1 - m) @ axes * shrink) @ axes.T
    x = ode_sample(GAUSS.score(sde), sde, (200, 2), steps=steps, generator=seeded(6))
    assert (x - m).norm() > 0.1 * (want - m).norm(), \
        "the samples collapse: the score pulls too hard"
    expect(x, want, f"probability flow, {steps} steps, against the Gaussian's flow", tol)
    return float((x - want).abs().max())

# ==== 5. Likelihood ===============================================================================

@functools.lru_cache
def toy_likelihood(log_likelihood, sde, steps=None, n=300):
    """The exact-divergence log-likelihood of n toy samples. steps None: the default."""
    x = TOY.sample(n, seeded(21))
    kw = {} if steps is None else {"steps": steps}
    return x, log_likelihood(TOY.score(sde), sde, x, exact=True, **kw).to(F64)

def check_likelihood(log_likelihood=sgu.log_likelihood, sde=SDES["VP"], prior_mismatch=0.006):
    """Against log p of the toy mixture. The flow ends in p_1, which the prior only approximates:
    0.0045 nats (VP), 0.01 (VE to 20)."""
    x, got = toy_likelihood(log_likelihood, sde)
    want = TOY.log_prob(x)
    a = float(sde.marginal(torch.tensor(1., dtype=F64))[0])
    expect(got, want, "log-likelihood of the toy mixture", 0.25, {
        "this is bits, not nats": want / math.log(2),
        "this is the negative log-likelihood": -want,
        "this is per dimension: the log-density of a point is the sum": want / 2,
        "D log(a_1/a_0) is missing: y = x/a stretches the space": want - 2 * math.log(a)})
    off = (got - want).abs().mean()
    assert off <= prior_mismatch, \
        f"log-likelihood: mean absolute error {off:.4f} nats, allowed {prior_mismatch}"
    if type(sde) is sgu.VP:                    # a schedule that starts where a is not 1
        class Late(sgu.VP):
            t_min = 0.2
        late = Late()
        a, s = (float(v) for v in late.marginal(torch.tensor(0.2, dtype=F64)))
        x, got = toy_likelihood(log_likelihood, late)
        off = (got - TOY.log_prob(x, a, s)).abs().mean()
        assert off <= prior_mismatch, \
            f"log p at t_min = 0.2: mean absolute error {off:.4f} nats: start at " \
            "y = x / a(t_min), and end with D log(a(1)/a(t_min))"

def uniform_score(sde):
    """Exact score of independent pixels, uniform on [-1, 1]:
    p_t(x) = (Phi(u) - Phi(l))/(2 a), u = (a - |x|)/s, l = (-a - |x|)/s."""
    def score(x, t):
        a, s = (sgu.per_sample(v, x) for v in sde.marginal(t.to(F64)))
        y, sign = x.to(F64).abs(), x.to(F64).sign()
        u, l = (a - y) / s, (-a - y) / s
        log_u, log_l = torch.special.log_ndtr(u), torch.special.log_ndtr(l)
        log_z = log_u + torch.log(-torch.expm1(log_l - log_u))
        def bell(v):
            return torch.exp(-v ** 2 / 2 - math.log(2 * math.pi) / 2 - log_z)
        return (sign * (bell(l) - bell(u)) / s).to(x.dtype)
    return score

def check_bits_per_dim(bits_per_dim=sgu.bits_per_dim, sde=SDES["VP"], tol=0.004, **kw):
    """Uniform 8-bit noise costs 8 bits a pixel, whatever the pixels: 64 images of 6x6. The score
    acts on pixels alone, so one probe is exact.

    The blur s(t_min) rounds the edges of the box off, which costs s int_0^inf -log2 Phi: 0.0016
    bits for VP. And pixels of N(0, 0.3^2) must cost what the Gaussian says.
    """
    levels = torch.randint(256, (64, 1, 6, 6), generator=seeded(31))
    bits = bits_per_dim(uniform_score(sde), sde, levels / 127.5 - 1, generator=seeded(1), **kw)
    assert bits.shape == (64,), f"one value per image, not shape {tuple(bits.shape)}"
    expect(bits.mean(), 8., "bits/dim of uniform 8-bit noise under its own density", tol, {
        "this is the density of y; the probability of a level is that of an interval": 1.,
        "the interval of a level is 1/128 wide here, not 1/256": 9.,
        "this is in nats: divide by log 2": 7 + math.log(2),
        "the sign is flipped: bits/dim is the NEGATIVE log-likelihood": 6.,
        "this is the sum over pixels: divide by D": 7 + 36.})
    x = 0.3 * torch.randn(64, 1, 6, 6, generator=seeded(32))
    x = ((x + 1) * 128).floor().clamp(0, 255).add(0.5) / 128 - 1
    def bell(x, t):
        a, s = (sgu.per_sample(v, x) for v in sde.marginal(t))
        return -x / ((0.3 * a) ** 2 + s ** 2)
    nats = (x.double() ** 2 / (2 * 0.3 ** 2) + math.log(0.3 * math.sqrt(2 * math.pi))).mean()
    want = nats / math.log(2) + 7
    got = bits_per_dim(bell, sde, x, generator=seeded(1), **kw).mean()
    expect(got, want, "bits/dim of pixels drawn from N(0, 0.3^2) under their own density", 0.005, {
        "the correction is added, not multiplied": (want - 7) * 8})

# ==== 6. Inpainting ===============================================================================

def check_inpaint_keeps(inpaint=sgu.inpaint, sde=SDES["VE"], nan=True):
    """Known pixels bit for bit; hidden ones never read: garbage, with nan even NaN, there changes
    nothing."""
    def score(x, t):
        pull = x - x.mean((2, 3), keepdim=True) / 2
        return -pull / (1 + sgu.per_sample(sde.marginal(t)[1], x) ** 2)
    g = seeded(41)
    x = torch.rand(3, 2, 4, 4, generator=g) * 2 - 1
    mask = (torch.rand(3, 1, 4, 4, generator=g) < 0.5).float()
    known = mask.bool().expand_as(x)
    def run(x):
        return inpaint(score, sde, x, mask, steps=5, generator=seeded(1))
    check_seeded(lambda g: inpaint(score, sde, x, mask, steps=3, generator=g))
    y = run(x)
    assert torch.equal(y[known], x[known]), \
        "known pixels must come back bit for bit: put them back at the end"
    assert torch.isfinite(y).all(), "the result is not finite"
    assert not (y[~known] == x[~known]).any(), \
        "hidden pixels must be filled by the sampler, not copied"
    for garbage, words in (
            (100., "the answer leaks: what stands in the hidden pixels changes the result"),
            (math.nan, "no answer leaks, but a NaN in a hidden pixel does: 0 * NaN is NaN, so drop "
                       "hidden pixels by torch.where, not by a product")):
        leak = torch.where(known, x, torch.full_like(x, garbage))
        assert not (nan or math.isfinite(garbage)) or torch.equal(run(leak), y), words
    seen, one = [], torch.ones(1, 1, 40, 40)
    half = torch.arange(40) % 2 * one
    def watch(x, t):
        seen.append((x.clone(), float(t[0])))
        return -x / (4 + 4 * sgu.per_sample(sde.marginal(t)[1], x) ** 2)     # a pull that is tame
    inpaint(watch, sde, one, half, steps=5, generator=seeded(2))
    for i, (x_t, t) in enumerate(seen):
        a, s = map(float, sde.marginal(torch.tensor(t, dtype=F64)))
        z = (x_t - a)[half.bool()] / s         # 800 known pixels: standard error 0.025 of their std
        what = f"noise on the known pixels when the score is asked at t = {t:.3g}, over s(t)"
        expect(z.std(), 1., what, 0.15, {
            "known pixels must be noised to a x + s z, with new z, before the score sees them": 0.})
        assert i == 0 or x_t[~half.bool()].std() > 0.01 * s, \
            "hidden pixels must go on from where the last step has left them"
    start = sde.prior_sample((20_000,), seeded(3)).std()
    spread = seen[0][0][~half.bool()].std() / start
    expect(spread, 1., "spread of the hidden pixels at the first step over the prior's", 0.15, {
        "hidden pixels must start from the prior, at t = 1": 0.,
        "the prior has the spread s(1), not 1": 1 / start})

def check_inpaint_conditional(inpaint=sgu.inpaint, sde=SDES["VE"], n=5000, **kw):
    """Two pixels with correlation 0.8, one known: the other follows
    N(m2 + C21/C11 (x1 - m1), C22 - C21^2/C11).

    Replacing known pixels level by level is exact only in the limit of many repetitions: 15% of
    tolerance, and 4.5 standard errors.
    """
    pair = Mixture([1.], [[.2, -.3]], [[[.25, .2], [.2, .25]]])
    x = torch.tensor([0.7, math.nan]).reshape(1, 1, 1, 2).expand(n, 1, 1, 2)
    mask = torch.tensor([1., 0.]).reshape(1, 1, 1, 2)
    got = inpaint(pair.score(sde), sde, x, mask, generator=seeded(42), **kw)[:, 0, 0, 1].to(F64)
    mean, var, shift = 0.1, 0.09, 0.4
    assert abs(got.mean() + 0.3) > 0.1, \
        "the filled pixel ignores the known one: it follows the unconditional law"
    assert abs(got.mean() - mean) < 0.15 * shift + 4.5 * math.sqrt(var / n), \
        f"filled pixel's mean {got.mean():.3f}, conditional mean {mean} (unconditional -0.3)"
    assert abs(got.var() / var - 1) < 0.15 + 4.5 * math.sqrt(2 / n), \
        f"filled pixel's variance {got.var():.3f}, conditional variance {var} (unconditional 0.25)"

def check_inpaint_walk(inpaint=sgu.inpaint, sde=SDES["VP"], steps=4):
    """Each step of the grid is taken repeats times; the last evaluation is at the grid's end."""
    x, mask = torch.zeros(1, 1, 4, 4), torch.arange(4.) % 2 * torch.ones(1, 1, 4, 4)
    grid = sgu.time_grid(sde, steps).tolist()
    for repeats in (1, 3):
        times = []
        inpaint(counting(lambda x, t: -x, times), sde, x, mask, steps=steps, repeats=repeats,
                generator=seeded(2))
        want = [t for t in grid[:-1] for _ in range(repeats)] + grid[-1:]
        assert len(times) == len(want), \
            f"with steps = {steps} and repeats = {repeats} the score must be asked {len(want)} " \
            f"times, not {len(times)}"
        what = f"times at which the score is asked, repeats = {repeats}: each step that often, " \
               "going up before every repeat and not after the last"
        expect(times, want, what)

# ==== 7. Training =================================================================================

def tiny_data(seed=0):
    return torch.randint(256, (40, 1, 8, 8), generator=seeded(seed), dtype=torch.uint8)

def tiny_net(seed=0):
    torch.manual_seed(seed)
    return sgu.UNet(channels=(8, 16), patch=2)

def check_ema(train=sgu.train):
    """The average starts from the network's weights, not from its own, and follows with the decay
    min(0.999, (1 + n)/(10 + n)), or with its argument ema_decay in place of 0.999."""
    has = "ema_decay" in inspect.signature(train).parameters
    for decay in (0.9999, 0.2) if has else (0.999,):
        model, ema = tiny_net(), tiny_net(1)
        for p in ema.parameters():
            nn.init.constant_(p, 100.)
        start = [p.detach().to(F64).clone() for p in model.parameters()]
        want, slow, fast = start, start, start                       # without warm-up, without d
        kw = dict(steps=4, batch_size=8, lr=1e-2) | (dict(ema_decay=decay) if has else {})
        for row in train(model, ema, SDES["VE"], tiny_data(), **kw):
            warm = (1 + row["step"]) / (10 + row["step"])
            want, slow, fast = (
                [d * w + (1 - d) * p.detach().to(F64) for w, p in zip(average, model.parameters())]
                for average, d in ((want, min(decay, warm)), (slow, decay), (fast, warm)))
        gap = max(float((p.detach() - 100).abs().min()) for p in ema.parameters())
        assert gap > 50, \
            "the average does not start from the network's weights: load them before fine-tuning"
        for w, p, q, r, f in zip(want, ema.parameters(), model.parameters(), slow, fast):
            expect(p, w, f"EMA after 4 steps at decay {decay}", 1e-5, {
                "there is no EMA: it copies the network": q,
                "the decay must not exceed ema_decay": f,
                "the EMA remembers: without the warm-up, decay min(d, (1 + n)/(10 + n)), it stays "
                "what it was before fine-tuning": r})

# ==== 9. The judge's numbers ======================================================================

def check_wilson(wilson=sgu.wilson):
    """At each end p of the interval, k/n is 1.96 standard errors sqrt(p (1 - p)/n) away from p."""
    z = 1.959964
    for k, n in ((3, 20), (0, 20), (20, 20), (50, 1000), (1, 1)):
        lo, hi = map(float, two(wilson(k, n), "the ends lo and hi"))
        p, m = k / n, n + z * z
        centre, half = (k + z * z / 2) / m, z / m * math.sqrt(k * (n - k) / n + z * z / 4)
        plain, narrow = z * math.sqrt(p * (1 - p) / n), z / m * math.sqrt(k * (n - k) / n)
        for words, (a, b) in {
                "this is p ± 1.96 sqrt(p (1 - p)/n), p = k/n, and no interval at all for k = 0":
                    (p - plain, p + plain),
                "give fractions, not percent": (100 * (centre - half), 100 * (centre + half)),
                "the root is not divided by n + z_0^2": (centre - half * m, centre + half * m),
                "z_0 in front of the root is missing": (centre - half / z, centre + half / z),
                "z_0^2/4 under the root is missing": (centre - narrow, centre + narrow),
                "the fraction in front is k/n here": (p - half, p + half),
                "give [lo, hi], the smaller end first": (centre + half, centre - half)}.items():
            for wrong in ((a, b), (max(a, 0.), min(b, 1.))):
                same = max(abs(lo - wrong[0]), abs(hi - wrong[1])) < 1e-5
                assert not same, f"interval of {k} of {n}: {words}"
        assert -1e-9 <= lo <= hi <= 1 + 1e-9, f"interval of {k} of {n}: [{lo:.4g}, {hi:.4g}] " \
            "does not lie in [0, 1]: compare each term with the formula"
        edges = {0: (0., z * z / m), n: (n / m, 1.)}.get(k)
        for i, q in enumerate((lo, hi)):
            if edges:
                expect(q, edges[i], f"end of the interval of {k} of {n}", 1e-5)
            else:
                distance = abs(p - q) / math.sqrt(max(q * (1 - q), 1e-12) / n) / z
                mistakes = {1 / z: "z_0 is 1.96 for 95%, not 1", 2.5758 / z: "this is a 99% one"}
                why = [words for far, words in mistakes.items() if abs(distance - far) < 0.01]
                assert abs(distance - 1) < 1e-4, \
                    f"the {('lower', 'upper')[i]} end of the interval of {k} of {n} is {q:.4g}, " \
                    f"not {centre + (2 * i - 1) * half:.4g}: {(why or ['compare each term'])[0]}"

def check_frechet(frechet=sgu.frechet):
    """Clouds with exactly known moments: shifted, stretched, with axes of their own."""
    white = with_moments(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64), 500, 81)
    shift, stretch = torch.tensor([3., -4.], dtype=F64), torch.tensor([2., 5.], dtype=F64)
    expect(frechet(white, white), 0., "distance of a set of features from itself", 1e-5, {
        "the factor 2 in front of the root is missing": 2.})
    what = "distance of a cloud from the same shifted by (3, -4)"
    fewer = with_moments(shift, torch.eye(2, dtype=F64), 300, 84)
    for other, many in ((white + shift, ""), (fewer, ", 500 points against 300")):
        expect(frechet(white, other), 25., what + many, 1e-5, {
            "a distance is not squared, that of the means or your result: the answer is d^2": 5.,
            "you took the mean over features: it is a sum": 12.5})
    what = "distance of a round cloud from one stretched by 2 and 5"
    expect(frechet(white, white * stretch), 17., what, 1e-5, {
        "the factor 2 in front of the root is missing": 24.,
        "the root of the matrix is missing": -27.})
    A, B = torch.tensor([[[2., 1.], [1., 1.]], [[1., -.5], [-.5, 3.]]], dtype=F64)
    det = math.sqrt(float(torch.linalg.det(A @ B)))                  # tr sqrt M is
    cross = math.sqrt(float((A @ B).trace()) + 2 * det)              # sqrt(tr M + 2 sqrt det M)
    clouds = [white @ torch.linalg.cholesky(c).T for c in (A, B)]
    by_element = A.trace() + B.trace() - 2 * (A @ B).diagonal().sqrt().sum()
    want = A.trace() + B.trace() - 2 * cross
    expect(frechet(*clouds), want, "distance of two clouds whose axes differ", 1e-5, {
        "an elementwise square root is not the root of a matrix": by_element})
    white = with_moments(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64), 500, 82)
    axes = torch.linalg.qr(torch.randn(3, 3, generator=seeded(83), dtype=F64))[0]
    stretch = torch.tensor([[1., 2., 4.], [3., 1., 2.]], dtype=F64)  # along these axes
    want, what = (stretch[0] - stretch[1]).square().sum(), \
        "distance of two clouds in three dimensions with the same slanted axes"
    expect(frechet(*(white * s @ axes.T for s in stretch)), want, what, 1e-5, {
        "the factor 2 in front of the root is missing":
            (stretch ** 2).sum() - stretch.prod(0).sum(),
        "the root of the matrix is missing":
            (stretch ** 2).sum() - 2 * stretch.prod(0).square().sum()})
    few = torch.randn(20, 64, generator=seeded(5), dtype=F64)        # a singular covariance
    try:
        got = float(frechet(few, few.flip(0)))
    except Exception as error:
        raise AssertionError("with fewer points than dimensions your function fails "
                             f"({type(error).__name__}): clamp negative eigenvalues to 0") from None
    why = "clamp negative eigenvalues to 0" if math.isnan(got) else \
        "use float64" if abs(got) < 0.1 else "is a root's V diag(l) V^T transposed?"
    assert abs(got) < 1e-4, \
        f"the distance of 20 points in 64 dimensions to themselves is {got:.3g}, not 0: {why}"

# ==== What only exercises ask for =================================================================

def check_agreement(agreement, sde=SDES["VE"]):
    """agreement(score, sde, x0, t, z) -> e.z / D of each image."""
    x0, t, z, e = loss_example(sde)
    d, s = inner(e, z), sde.marginal(t)[1]
    check_noising(agreement, sde)
    got = agreement(planted(sde, e, times=t), sde, x0, t, z)
    assert torch.as_tensor(got).numel() == 3, \
        f"one number per image, (B,): yours has the shape {tuple(torch.as_tensor(got).shape)}"
    expect(got, d, "e.z / D of three images", 1e-6, {
        "the sign of e is flipped: e = -s score": -d,
        "you summed over the pixels: divide by D": 8 * d,
        "you divided by B, too": d / 3,
        "this is score.z / D: e = -s score": -d / s,
        "s is missing: e = -s score": d / s,
        "this is score.u / D: multiply by s^2": d / s ** 2})
    check_trainable(agreement(planted(sde, e.requires_grad_(), times=t), sde, x0, t, z))

def check_sgu_loss(sgu_loss, sde=SDES["VE"]):
    """sgu_loss(score, sde, x_g, x_f, alpha, forget_loss=, generator=) -> alpha keep(x_g) +
    (1 - alpha) forget(x_f); the forget loss is a constant that notes what it was given."""
    x_g, _, _, _ = loss_example(sde)
    x_f, seen, generators = x_g[:2] + 5, [], []
    def score(x, t):
        return -x / 3
    given = score, sde
    def constant(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
        assert score is given[0] and sde is given[1], \
            "hand on to the forget loss the score and the schedule that you were given"
        seen.append((x0, weighting, generator))
        return torch.tensor(7., dtype=F64)
    def keep_of(x, score=score):
        return sgu.score_matching_loss(score, sde, x, generator=seeded(2))
    def value(alpha):
        generators.append(seeded(2))
        return sgu_loss(score, sde, x_g, x_f, alpha, forget_loss=constant, generator=generators[-1])
    assert float(value(0.3)) == float(value(0.3)), \
        "the same generator must give the same loss: hand it on to the keep loss"
    assert seen, "forget_loss was never called"
    assert all(x.shape == x_f.shape and torch.equal(x, x_f) and w == "noise" for x, w, _ in seen), \
        "the forget loss must see x_f, the data to forget"
    assert all(any(g is mine for mine in generators) for *_, g in seen), \
        "hand the generator on to the forget loss, too"
    keep = keep_of(x_g)
    for alpha in (0., 0.3, 1.):
        expect(value(alpha), alpha * keep + (1 - alpha) * 7, f"sgu_loss at alpha = {alpha}", 1e-6, {
            "the keep loss must see x_g, the data to keep": alpha * keep_of(x_f) + (1 - alpha) * 7,
            "both losses are weighted by alpha": alpha * keep + alpha * 7,
            "alpha weighs the KEEP loss": (1 - alpha) * keep + alpha * 7,
            "the forget loss is weighted by 1 - alpha": alpha * keep + 7,
            "the keep loss is weighted by alpha": keep + (1 - alpha) * 7,
            "the forget loss is subtracted: its sign is its own": alpha * keep - (1 - alpha) * 7})
    w = torch.ones((), dtype=F64, requires_grad=True)
    def scaled(x, t):
        return -w * x / 3
    keep_slope, = torch.autograd.grad(keep_of(x_g, scaled), w)
    loss = sgu_loss(scaled, sde, x_g, x_f, 0.3, forget_loss=lambda *args, **kw: 7 * w,
                    generator=seeded(2))
    check_trainable(loss)
    slope, = torch.autograd.grad(loss, w)
    expect(slope, 0.3 * keep_slope + 0.7 * 7, "gradient of sgu_loss at alpha = 0.3", 1e-6, {
        "the keep loss is detached": 0.7 * 7, "the forget loss is detached": 0.3 * keep_slope})

def check_gaussian_score(gaussian_score, sde=SDES["VP"]):
    """gaussian_score(m, v, sde) -> score(x, t): the gradient of log N(x; a m, a^2 v + s^2)."""
    m, v = torch.tensor([0.7, -0.4], dtype=F64), 0.3
    t = torch.tensor([0.1, 0.5, 0.8], dtype=F64)
    a, s = (r[:, None] for r in sde.marginal(t))
    x = (2 * torch.randn(3, 2, generator=seeded(), dtype=F64)).requires_grad_()
    law = torch.distributions.Normal(a * m, (a ** 2 * v + s ** 2).sqrt())
    want, = torch.autograd.grad(law.log_prob(x).sum(), x)
    x, var, one = x.detach(), a ** 2 * v + s ** 2, torch.ones(3, 2)
    score = gaussian_score(m, v, sde)
    assert callable(score), "gaussian_score returns a function, score(x, t)"
    got = score(x, t)
    has = tuple(got.shape) if torch.is_tensor(got) else type(got).__name__
    assert has == (3, 2), f"a score has the shape of x, (B, D), here (3, 2); yours is {has}"
    expect(got / want, one, "your score over the gradient of the log-density", 1e-6, {
        "the sign is flipped: the score points to the data": -one,
        "the mean of x_t is a m, not m": -(x - m) / var / want,
        "this is the score at t = 0: the variance of x_t is a^2 v + s^2": -(x - a * m) / v / want,
        "the variance of x_t is a^2 v + s^2: s must be squared":
            -(x - a * m) / (a ** 2 * v + s) / want,
        "the variance of x_t is a^2 v + s^2, not v + s^2": -(x - a * m) / (v + s ** 2) / want,
        "the variance of x_t is a^2 v + s^2: a must be squared":
            -(x - a * m) / (a * v + s ** 2) / want,
        "there is a 1/2 too many: (x - m)^2 has the derivative 2 (x - m)": one / 2,
        "divide by the variance, not by the standard deviation": -(x - a * m) / var.sqrt() / want})

def heun_likelihood(x, sde, steps, e_sign=1, div_sign=1, sigma_in=1, sigma_there=1, moved=1,
                    second=1, prior_a=1, log_term=2):
    """log p of points x: (B, 2) of the toy mixture by Heun's method in log sigma, as exercise 4.3
    asks for it; the options are mistakes."""
    a, s = sde.marginal(torch.tensor([sde.t_min, 1.], dtype=F64))
    lo, hi = (s / a).log().tolist()
    grid = sde.time(torch.linspace(lo, hi, steps + 1, dtype=F64).exp()).clamp(sde.t_min, 1)
    h, (a, s) = (hi - lo) / steps, sde.marginal(grid)
    score = TOY.score(sde)
    def flow(y, i):
        def e(y):
            return -e_sign * s[i] * score(a[i] * y, grid[i].expand(len(y)))
        jacobian = torch.func.vmap(torch.func.jacrev(lambda y: e(y[None])[0]))(y)
        factor = s[i] / a[i] if sigma_in else 1.
        there = div_sign * (factor if sigma_there else 1.)
        return factor * e(y), there * jacobian.diagonal(dim1=1, dim2=2).sum(1)
    y, total = x.to(F64) / a[0], 0
    for i in range(steps):
        k1, d1 = flow(y, i)
        k2, d2 = flow(y + h * k1, i + 1) if second else (k1, d1)
        d2 = d2 if moved else flow(y, i + 1)[1]
        y, total = y + h / 2 * (k1 + k2), total + h / 2 * (d1 + d2)
    end = sde.prior_log_prob(a[-1] * y if prior_a else y)
    return end + log_term * float((a[-1] / a[0]).log()) + total

def check_heun_likelihood(log_likelihood, sde=SDES["VP"], steps=20):
    """The method that is asked for, step by step: 40 points on a coarse grid against another
    implementation of it."""
    x, asked = TOY.sample(40, seeded(26)), []
    score = with_one_time_each(counting(TOY.score(sde), asked))
    def wrong(**kw):
        return heun_likelihood(x, sde, steps, **kw)
    got = log_likelihood(score, sde, x, steps=steps)
    expect(got, wrong(), f"log-likelihood by {steps} steps of Heun's method", 1e-3, {
        "D log(a_1/a_0) is missing: y = x/a stretches the space": wrong(log_term=0),
        "the sign of D log(a_1/a_0) is flipped": wrong(log_term=-2),
        "the D of D log(a_1/a_0) is missing": wrong(log_term=1),
        "the sign of the divergence is flipped: log p(x) is the prior's PLUS the integral of "
        "sigma div e": wrong(div_sign=-1),
        "the sign of e is flipped: e = -s score": wrong(e_sign=-1),
        "sigma is missing in dy/du and in the integral": wrong(sigma_in=0),
        "sigma is missing in the integral": wrong(sigma_there=0),
        "log pi is asked at a_1 y_1, not at y_1": wrong(prior_a=0),
        "this is Euler's method: average the two slopes, and the two divergences": wrong(second=0),
        "the second divergence belongs to the predicted point y + h k1": wrong(moved=0)})
    assert asked, "your likelihood never asks the score"

def bent_field(x):
    """A flow in three dimensions whose Jacobian is far from diagonal, and its divergence:
    (B, 3) -> (B, 3), (B,)."""
    p, q, r = x.unbind(1)
    flow = torch.stack([p ** 2 * q, (q * r).sin(), p * r + q], 1)
    return flow, 2 * p * q + r * (q * r).cos() + p

def jacobians(x):
    def field(x):
        return bent_field(x[None])[0][0]
    return torch.stack([torch.autograd.functional.jacobian(field, xi) for xi in x])

def check_divergence(divergence):
    """divergence(field, x) -> (B,), against the formula."""
    x = torch.randn(5, 3, generator=seeded(24), dtype=F64)
    want, J = bent_field(x)[1], jacobians(x)
    got = divergence(lambda x: bent_field(x)[0], x)
    expect(got, want, "divergence at five points", 1e-5, {
        "you summed over the batch, too": want.sum().expand(5),
        "you took the mean over the batch: sum over it, before the gradient": want / 5,
        "you summed the whole Jacobian: the divergence is its diagonal": J.sum((1, 2)),
        "this is the first diagonal entry alone: sum over all D": J[:, 0, 0],
        "this is the last diagonal entry alone: sum over all D": J[:, 2, 2],
        "you took the mean over the diagonal: the divergence is the sum": want / 3})

def check_hutchinson_probe(hutchinson):
    """hutchinson(field, x, r) -> r^T J r: (B,); its mean over all signs is the divergence."""
    x, total = torch.randn(5, 3, generator=seeded(25), dtype=F64), 0
    want, J = bent_field(x)[1], jacobians(x)
    vectors = torch.cartesian_prod(*[torch.tensor([-1., 1.], dtype=F64)] * 3)
    for signs in vectors[[1, 2, 3, 4, 5, 6, 0, 7]]:                  # mixed signs first
        r = signs.expand(5, 3)
        got = hutchinson(lambda x: bent_field(x)[0], x, r)
        row = torch.einsum("bi,bij->bj", r, J)
        expect(got, (row * r).sum(1), f"r^T J r at r = {signs.tolist()}", 1e-5, {
            "the last product with r is missing": row.sum(1),
            "you summed over the batch, too": (row * r).sum().expand(5),
            "the first product with r is missing: (v . r) is what to differentiate":
                (J.sum(1) * r).sum(1),
            "you divided by D": (row * r).mean(1)})
        total = total + got / 8
    expect(total, want, "mean over all sign vectors, the divergence", 1e-5)

def check_back_up(back_up, sde=SDES["VP"]):
    """back_up(y, sde, t, t_next, generator): y at t_next -> y at t > t_next, by forward noise.
    40,000 pixels: 5 standard errors."""
    t, t_next = torch.tensor([0.6, 0.3], dtype=F64)
    (a, s), (a_next, s_next) = (map(float, sde.marginal(v)) for v in (t, t_next))
    up = a / a_next
    got = back_up(3 * torch.ones(100, 1, 1, 400), sde, t, t_next, seeded(1)).to(F64)
    assert torch.isfinite(got).all(), \
        "y is not finite: is the ratio of the a's upside down, so that the variance is negative?"
    std = math.sqrt(s ** 2 - (up * s_next) ** 2)
    expect(got.std() / std, 1., "spread of the noise on the way up over its formula", 0.018, {
        "the ratio a_i / a_(i+1) is missing in the variance": math.sqrt(s ** 2 - s_next ** 2) / std,
        "the root is missing": std,
        "the noise is missing, or one z serves all pixels": 0.,
        "the variances differ, not the spreads": (s - up * s_next) / std})
    tol = 5 * std / 200 / (3 * up)
    expect(got.mean() / (3 * up), 1., "mean of y on the way up over its formula", tol, {
        "the factor a_i / a_(i+1) is missing": 1 / up,
        "the factor is a_i / a_(i+1), upside down": 1 / up ** 2})
    check_seeded(lambda g: back_up(torch.ones(5, 1, 2, 2), sde, t, t_next, g))

def check_pin(pin, sde=SDES["VE"]):
    """pin(y, x, known, sde, t, generator): known pixels of y become a x + s z, hidden ones stay.
    20,000 known pixels: 5 standard errors."""
    t = torch.tensor(0.4, dtype=F64)
    known = (torch.arange(400) % 2 == 0).expand(100, 1, 1, 400)
    a, s = map(float, sde.marginal(t))
    x, y = 3 * torch.ones(100, 1, 1, 400), torch.randn(100, 1, 1, 400, generator=seeded())
    before = y.clone()
    got = pin(y, x, known, sde, t, seeded(1))
    assert torch.equal(y, before), "pin must not write into the y that it was given"
    assert torch.equal(got[~known], y[~known]), "hidden pixels must stay as they are in y"
    z = (got[known].to(F64) - 3 * a) / s
    assert not z.std() or (got[0][known[0]] != got[1][known[1]]).any(), \
        "every image needs noise of its own; one z serves the whole batch"
    expect(z.std(), 1., "spread of the known pixels over s(t)", 0.025, {
        "no noise was added: a x + s z": 0., "you used s^2 in place of s": s})
    expect(z.mean(), 0., "mean of the known pixels minus a x, over s(t)", 0.036, {
        "x is not scaled: a x + s z": 3 * (1 - a) / s})
    assert not torch.equal(got[known], pin(y, x, known, sde, t, seeded(2))[known]), \
        "z must be drawn from the generator, new at every call"
    check_seeded(lambda g: pin(y, x, known, sde, t, g))

def check_capped_neggrad(loss, cap=1.5):
    """-min(cap, mean_i (e_i - z_i)^2) averaged over the batch: values, and gradients by image."""
    sde = SDES["VE"]
    x0, t, z, e = loss_example(sde)
    scale = torch.tensor([0.3, 1., 3.], dtype=F64).reshape(3, 1, 1, 1)
    gap = (e - z) / (e - z).square().mean((1, 2, 3), keepdim=True).sqrt()
    e = z + scale * gap                        # errors 0.09, 1 and 9: the last one above the cap
    s, each = sgu.per_sample(sde.marginal(t)[1], e), [0.09, 1., cap]
    free = (-e / s).requires_grad_()
    def score(x, t):
        return free
    got = loss(score, sde, x0, t=t, z=z)
    expect(got, -np.mean(each), "capped loss of errors 0.09, 1 and 9 at cap 1.5", 1e-6, {
        "the sign is flipped: a large error must give a low loss": np.mean(each),
        "the cap is missing": -10.09 / 3,
        "you summed over the batch: take the mean": -sum(each),
        "the cap belongs to each image's mean, not to each pixel":
            -(e - z).square().clamp(max=cap).mean(),
        "you summed over the pixels: take the mean": -(8 * 0.09 + cap + cap) / 3,
        "the cap belongs to each image, before the mean over the batch": -min(cap, 10.09 / 3)})
    grad, = torch.autograd.grad(got, free)
    assert grad[0].any() and grad[1].any(), "below the cap the loss must have a gradient"
    assert not grad[2].any(), "above the cap the gradient must be 0"
    lower = loss(score, sde, x0, t=t, z=z, cap=0.5)
    expect(lower, -1.09 / 3, "capped loss of errors 0.09, 1 and 9 at cap 0.5", 1e-6, {
        "the argument cap is not used": got})
    check_loss_draws(loss, sde)

def check_unlearn(unlearn, standard, sde, keep, forget, least=0.05, n=128):
    """unlearn(standard, sde, keep, forget) -> network. e.z / D on forget must fall by least, and
    further than on keep (e made smaller everywhere falls on both alike); the keep loss on keep may
    rise by at most half of that fall."""
    def measure(net, data):
        score, x0, rows = sgu.make_score(net, sde), data[:n] / 127.5 - 1, []
        for sigma in (0.5, 1., 2.):
            z, t = torch.randn(x0.shape, generator=seeded(1)), torch.full((len(x0),), sigma)
            with torch.no_grad():
                _, e, z = sgu.predict_noise(score, sde, x0, sde.time(t), z, None)
            rows.append([float((e * z).mean()), float((e - z).square().mean())])
        return np.mean(rows, 0)
    before = [measure(standard, d) for d in (keep, forget)]
    given = copy.deepcopy(standard)            # so that a mistake does not spoil the next try
    net = unlearn(given, sde, keep, forget)
    assert isinstance(net, nn.Module), f"unlearn must return a network, not {type(net).__name__}"
    now = given.state_dict()
    assert all(torch.equal(v, now[k]) for k, v in standard.state_dict().items()), \
        "the network that you were given has changed: work on a copy"
    after = [measure(net, d) for d in (keep, forget)]
    fall_g, fall = (b[0] - a[0] for b, a in zip(before, after))
    damage = after[0][1] - before[0][1]
    says = (f"e.z / D on the data to forget went from {before[1][0]:.3f} to {after[1][0]:.3f}, the "
            f"keep loss on D_g from {before[0][1]:.3f} to {after[0][1]:.3f}")
    assert np.isfinite(after).all(), f"the network is not finite any more: {says}"
    assert fall != 0, f"nothing changed: {says}; do the weights of your copy have requires_grad, " \
                      "and do you return the network that was trained?"
    assert damage <= max(fall, least) / 2, \
        f"{says}: it forgets by destroying; a larger alpha, fewer steps, or a smaller learning rate"
    assert fall > -0.02, f"{says}: it turned TOWARD the data to forget; is your sign flipped, or " \
                         "is your loss another one than orthogonal or obtuse?"
    assert fall >= least, \
        f"{says}: too little is forgotten; more steps, a larger learning rate, or a smaller alpha"
    assert fall - fall_g >= 0.06 * fall, \
        f"{says}, and e.z / D on D_g fell by {fall_g:.3f} too: the guess became smaller for all " \
        "images alike, which forgets no class; are keep and forget swapped, or the same?"

def check_report(report):
    """Of 100 images 40 surely show kept classes (six of them just so, with 0.5 or 0.6), 25 surely
    forgotten ones, 35 are noise to which the judge gives 0.45 at most: 30 of these look most like a
    kept class, 5 like a forgotten one."""
    def probs(label, p):
        rest = torch.full((10,), (1 - p) / 9)
        rest[label] = p
        return rest
    rows = [probs(i % 3, (0.5, 0.6)[i % 2] if i < 6 else 0.9) for i in range(40)]
    rows += [probs((3, 7)[i % 2], 0.8) for i in range(25)]
    rows += [probs((1, 5, 8)[i % 3], (0.3, 0.45)[i % 2]) for i in range(30)]
    rows = torch.stack(rows + [probs((3, 7)[i % 2], 0.3) for i in range(5)])
    ratio, unsure, kept = keys_of(report(rows, [3, 7]), "ratio", "unsure", "kept")
    expect(ratio, 0.30, "share of forgotten classes", 1e-6, {
        "unsure samples are counted as hits, whatever they look like": 0.6,
        "this is the share of what was NOT found": 0.7,
        "a sample that looks like a forgotten class counts even if the judge is unsure: be strict "
        "with yourself": 0.25})
    expect(unsure, 0.35, "share that the judge is unsure of", 1e-6, {
        "this is the share that it is sure of": 0.65})
    expect(kept, 0.40, "share of surely kept classes", 1e-6, {
        "your judge counts noise as kept": 0.70,
        "a forgotten class of which it is sure is not kept": 0.65,
        "these are samples of which it is NOT sure": 0.30,
        "an image may be forgotten and unsure at once: 1 - ratio - unsure counts it twice": 0.35})
    one = report(rows, [1])["ratio"]
    expect(one, 0.23, "share of class 1 when only 1 is to be forgotten", 1e-6, {
        "the argument forget is not used": 0.30})

# ---- Is this integral converged? -----------------------------------------------------------------

def turned_rate(log_sigma, strength):
    """The rate of dx/dl = rate x, l = log sigma, along the flow of data N(0, 1/4 I) whose score was
    turned round in a window of noise levels around sigma = 1."""
    sigma2 = (2 * log_sigma).exp()
    return sigma2 / (sigma2 + 0.25) - strength / (log_sigma / 0.3).cosh() ** 2

def turned_score(strength, sde=SDES["VE"]):
    """score(x, t) with that rate: sigma e = rate x and e = -s score, where a = 1."""
    def score(x, t):
        s = sgu.per_sample(sde.marginal(t)[1], x)
        return -turned_rate(s.log(), strength) * x / s ** 2
    return score

def check_turned_log_p(log_p):
    """log_p(x, strength) against the trapezium rule for the integral Q of the rate."""
    ends = torch.tensor([0.01, 20.], dtype=F64).log()
    grid = torch.linspace(*ends.tolist(), 100_001, dtype=F64)
    for strength, d in ((0., 2), (2., 3), (20., 2)):
        x = 0.5 * torch.randn(5, d, generator=seeded(51), dtype=F64)
        Q = torch.trapezoid(turned_rate(grid, strength), grid)
        plain = torch.trapezoid(turned_rate(grid, 0.), grid)
        def law(Q, sign=1, d=d, x=x):
            return torch.distributions.Normal(0., 20.).log_prob(Q.exp() * x).sum(1) + sign * d * Q
        there = torch.distributions.Normal(0., 20.).log_prob(x).sum(1)
        what = f"log p at strength {strength:g} in {d} dimensions"
        expect(log_p(x, strength), law(Q), what, 1e-6, {
            "D is not always 2": law(Q, 2 / d),
            "D Q is missing": law(Q, 0), "its sign is flipped: log p = log pi + D Q": law(Q, -1),
            "the D of D Q is missing": law(Q, 1 / d),
            "log pi is asked at x, not at the end e^Q x of its way": there + d * Q,
            "the turned part has the wrong sign": law(2 * plain - Q),
            "the argument strength is not used": law(plain),
            "tanh rises by 2 from one end to the other, not by 1": law((plain + Q) / 2),
            "the 1/2 in front of the logarithm is missing": law(Q + plain),
            "the width 0.3 of the window is missing": law(plain + (Q - plain) / 0.3)})

def check_error_estimate(estimate):
    """estimate(fine, coarse, order) of values with an error of exactly C h^order."""
    truth, C = torch.tensor([[5., 7., -3.], [2., -1., 3.]], dtype=F64)
    for order in (4, 2):
        coarse, fine = (truth + C * h ** order for h in (0.5, 0.25))
        want = C.abs() * 0.25 ** order
        parts = 2 ** order - 1
        expect(estimate(fine, coarse, order), want, f"error of the finer values at order {order}",
               1e-6, {"an error has no sign: take its absolute value": -C * 0.25 ** order,
                      "an error has no sign: take the absolute value": C * 0.25 ** order,
                      "this is the difference, most of which is the error of the coarser values":
                          parts * want,
                      "this is the error of the coarser values": (parts + 1) * want,
                      "how much of the difference is the error of the finer values? Not 1/2^order":
                          want * parts / (parts + 1),
                      "the argument order is not used": parts * want / 15,
                      "an eighth is the compromise of sgu.py; derive it for short steps":
                          want * parts / 8})

def check_refine(refine):
    """refine(values_at, tolerance, first, most) on values whose errors are known, on values that
    never settle, and on some that are not numbers."""
    truth = torch.arange(10, dtype=F64)
    side = torch.zeros(10, dtype=F64)          # errors that cancel, of mean size 1 and at most 5
    side[:2] = torch.tensor([5., -5.])
    def run(error, *arguments, **kw):
        asked = []
        def values_at(steps):
            asked.append(steps)
            assert steps <= 5000, "values that never settle: stop doubling at most steps"
            return truth + error(steps)
        found = keys_of(refine(values_at, *arguments, **kw),
                        "values", "steps", "error", "converged")
        return sorted(asked), *found           # in which order is nobody's business
    def smooth(steps):
        return side * (64 / steps) ** 4
    asked, values, steps, error, converged = run(smooth, 0.01)
    assert len(set(asked)) == len(asked), \
        f"you asked for {asked} steps: the fine values of one round are the coarse ones of the next"
    assert asked != [16, 32] or abs(float(error)) > 1e-6, \
        "the errors of two images that cancel do not make either right: first abs, then the mean"
    assert asked == [16, 32, 64, 128, 256], \
        "with errors of 256, 16, 1, 1/16 and 1/256, on average over the batch, at 16, 32, 64, " \
        f"128 and 256 steps, and the tolerance 0.01, you asked for {asked}"
    expect(values, truth + side / 256, "values of the finest grid", 1e-9)
    expect(steps, 256, "steps of the finest grid")
    assert 0.0038 <= float(error) <= 0.06, \
        f"the mean error at 256 steps is 1/256 = 0.0039; you report {float(error):.4g}"
    assert converged, "an error below the tolerance counts as converged"
    asked, _, steps, _, converged = run(lambda steps: (-1.) ** round(math.log2(steps)), 0.01)
    assert not converged, "values that jump by 2 with every doubling have not converged"
    assert asked == [16, 32, 64, 128, 256, 512] and steps == 512, \
        f"double the steps up to most = 512 and no further; you asked for {asked}"
    asked, *_, converged = run(smooth, 0.01, first=8, most=64)
    assert asked == [8, 16, 32, 64] and not converged, \
        f"with first = 8 and most = 64 you asked for {asked}; are the arguments used?"
    asked, *_, converged = run(smooth, 0.01, most=100)
    assert asked == [16, 32, 64] and not converged, \
        f"with most = 100 you asked for {asked}: more than 100 is too many"
    *_, converged = run(lambda steps: math.nan if steps > 20 else 0., 0.01)
    assert not converged, \
        "values that are not numbers (NaN) have not converged; NaN > tolerance is False"

# ---- Can your judge say "none of these"? ---------------------------------------------------------

def check_kind(make, x, name):
    """What all three kinds of images must be; -> the images."""
    before, got = x.clone(), make(x, seeded(1))
    assert torch.equal(x, before), f"{name} must not write into the images that it was given"
    assert torch.is_tensor(got) and got.shape == x.shape, \
        f"{name} returns as many images of the same shape, {tuple(x.shape)}"
    assert torch.isfinite(got).all() and got.abs().max() <= 1 + 1e-5, \
        f"{name}: pixels must stay in [-1, 1]; clamp them"
    return got

def check_noise(noise):
    """Independent pixels, other ones in every image, which say nothing of x."""
    x = sgu.draw_glyphs(40, seed=61)[0] / 127.5 - 1
    got = check_kind(noise, x, "noise")
    check_seeded(lambda g: noise(x, g))
    assert torch.equal(got, noise(-x, seeded(1))), "noise must not depend on the images"
    spread = got.flatten(1).std(1)
    assert spread.mean() > 0.1, "noise: the pixels of an image are all alike"
    assert got.flatten(1).mean(1).std() > 0.2, "noise: draw a shade of its own for every image"
    assert spread.std() > 0.1, "noise: draw a strength of its own for every image"
    pixels = (got - got.mean((1, 2, 3), keepdim=True)) / sgu.per_sample(spread.clamp(min=0.02), got)
    for a, b, words in ((pixels[..., 1:], pixels[..., :-1], "neighbours"),
                        (pixels[1:], pixels[:-1], "the same pixels of two images")):
        tied = float((a * b).mean())           # 40 x 784 pairs: standard error 0.006
        assert abs(tied) < 0.1, f"noise: {words} are alike (correlation {tied:.2f})"

def check_blend(blend):
    """Every image together with another one. Here each image has one bright pixel of its own."""
    x = -torch.ones(8, 1, 28, 28)
    for i in range(8):
        x[i, 0, 3 * i, 5] = 1.
    for seed in range(20):
        got = check_kind(lambda x, g: blend(x, seeded(seed)), x, "blend")
        seen = got[:, 0, 0:24:3, 5] > -0.7     # (8, 8): which images show in which
        assert seen.diagonal().all(), "in a blend an image must still show; give it a fifth or more"
        assert seen.sum(1).max() <= 2, "a blend of more than two images"
        assert seen.sum(1).min() == 2, \
            "an image blended with itself is a clear digit: its partner must be another one, " \
            "which shows by a fifth or more"
    rest = got.clone()
    rest[:, 0, 0:24:3, 5] = -1.
    assert (rest + 1).abs().max() < 1e-5, "where both images are black (-1), so is their blend"

def check_shuffled(shuffled):
    """The 4 x 4 patches of every image, each whole, in another order."""
    x = (torch.arange(3 * 784).reshape(3, 1, 28, 28) / (3 * 784)) * 2 - 1
    got = check_kind(shuffled, x, "shuffled")
    def patches(x):                            # -> (3, 16, 49)
        return x.reshape(3, 4, 7, 4, 7).transpose(2, 3).reshape(3, 16, 49)
    for now, was in zip(patches(got), patches(x)):
        assert torch.equal(now.flatten().sort()[0], was.flatten().sort()[0]), \
            "shuffled: some pixels of the image are lost, doubled or from elsewhere"
        order = [i for patch in now for i in range(16) if torch.equal(patch, was[i])]
        assert len(order) == 16, \
            "shuffled: the patches, 7 x 7 pixels each, must stay whole and upright"
        assert order != list(range(16)), "shuffled: no patch has moved"
    check_seeded(lambda g: shuffled(x, g))

def check_with_none(with_none):
    """A fifth of the batch has become none of the digits, the rest is untouched."""
    x, y = sgu.draw_glyphs(100, seed=62)
    x = x / 127.5 - 1
    given = x.clone(), y.clone()
    images, labels = two(with_none(x, y, seeded(1)), "images and labels")
    assert torch.equal(x, given[0]) and torch.equal(y, given[1]), \
        "with_none must not write into the batch that it was given: clone it first"
    assert images.shape == x.shape and labels.shape == y.shape, \
        f"the batch keeps its size; yours is of {tuple(images.shape)} and {tuple(labels.shape)}"
    none = labels == 10
    share = float(none.float().mean())
    assert none.any(), "no image has the label 10, none of these"
    assert 0.1 <= share <= 0.35, f"about a fifth of the batch, not {share:.0%}, has the label 10"
    assert torch.equal(labels[~none], y[~none]), "the other labels must stay as they are"
    assert torch.equal(images[~none], x[~none]), "an image that keeps its label must stay as it is"
    assert ((images - x)[none].abs().amax((1, 2, 3)) > 0.1).all(), \
        "an image with the label 10 still shows its digit"
    check_seeded(lambda g: with_none(x, y, g)[0])

def check_none_judge(judge, plain, x, y):
    """What a judge with the class 10 is worth on test images x with labels y, beside the judge
    plain without it, and on images that are none. Two sorts of blends: one will do."""
    def labels(judge, x):
        return sgu.opinions(judge, x)[0].argmax(1)
    right, before = (float((labels(j, x) == y).float().mean()) for j in (judge, plain))
    refused = float((labels(judge, x) == 10).float().mean())
    digit, shape = x / 127.5 - 1, x.shape
    other, order = digit.roll(7, 0), torch.randperm(16, generator=seeded(65))
    patches = digit.reshape(-1, 4, 7, 4, 7).transpose(2, 3).reshape(-1, 16, 7, 7)[:, order]
    fakes = {"uniform noise": [2 * torch.rand(shape, generator=seeded(63)) - 1],
             "faint noise": [0.2 * torch.randn(shape, generator=seeded(64)) - 0.5],
             "blends": [torch.maximum(digit, other), (digit + other) / 2],
             "shuffled digits": [patches.reshape(-1, 4, 4, 7, 7).transpose(2, 3).reshape(shape)]}
    for name, sorts in fakes.items():
        named = min(float((labels(judge, sgu.to_levels(z)) < 10).float().mean()) for z in sorts)
        assert named < 0.3, \
            f"the judge calls {named:.0%} of {name} a digit: does with_none use all three kinds?"
    assert refused < 0.1, f"the judge refuses {refused:.1%} of the real digits"
    assert right > before - 0.1, \
        f"the judge is right on {right:.1%} of the real digits, and was on {before:.1%}"

def check_measure(measure):
    """measure(real, labels, fake) of 20 real digits, of which 15 are read rightly and 3 refused,
    and 10 images that are none, of which 6 are called a digit, 3 of them hesitantly."""
    def verdicts(labels, sure):
        rest = ((1 - sure) / 10)[:, None].repeat(1, 11)
        return rest.scatter(1, labels[:, None], sure[:, None])
    labels = torch.arange(20) % 10
    said = labels.clone()
    said[[3, 8, 11, 14, 19]] = torch.tensor([5, 1, 10, 10, 10])
    real = verdicts(said, torch.full((20,), 0.9))
    fake = verdicts(torch.tensor([10, 8, 10, 8, 10, 1, 3, 8, 5, 10]),
                    torch.tensor([.9, .95, .6, .3, .4, .7, .3, .8, .3, .99]))
    accuracy, refused, false = keys_of(measure(real, labels, fake), "accuracy", "refused", "false")
    expect(accuracy, 0.75, "share of real digits read rightly", 1e-6, {
        "a digit that is refused is not read rightly: divide by all 20": 15 / 17,
        "this is the share of those that are read wrongly": 0.25})
    expect(refused, 0.15, "share of real digits called none of these", 1e-6, {
        "this is the share of the OTHER images called none of these": 0.4,
        "these are all errors, not only the refused": 0.25})
    expect(false, 0.6, "share of the other images that are called a digit", 1e-6, {
        "this is the share that is called none of these": 0.4,
        "a digit named hesitantly counts, too: take the most probable class": 0.3})
    ten = measure(real[:, :10], labels, fake[:, :10])
    expect(ten["refused"], 0., "share refused by a judge of ten classes, which cannot")
    expect(ten["false"], 1., "share of the other images called a digit by a judge of ten classes")
