"""Tests of sgu.py: values against closed forms, finite differences or a second algorithm. No network, no data, under a minute.

    python -m pytest -q test_sgu.py

Every check_<name>(fn, ...) takes the function under test as its first argument, by default sgu.py's own, and raises AssertionError
with the likely mistake in words; the exercises call the same checks on a student's function. Tolerances of random quantities
are 4 to 5 standard errors, with n stated; seeds are fixed, so a test that passes keeps passing.
"""
import copy, functools, inspect, io, math, re

import numpy as np
import pytest
import torch
import torch.nn as nn

import sgu

F64 = torch.float64
SDES = {"VE": sgu.VE(0.01, 20.), "VP": sgu.VP(), "DDPM": sgu.DDPM()}
every_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
ve_and_vp = pytest.mark.parametrize("sde", [SDES["VE"], SDES["VP"]], ids=["VE", "VP"])


# =====================================================================================================================
# Oracles
# =====================================================================================================================

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def expect(got, want, what, tol=1e-5, mistakes=None):
    """Assert |got - want| <= tol max(1, |want|) everywhere. mistakes: {explanation: the value that this mistake would give}."""
    got, want = torch.as_tensor(got).detach().to(F64), torch.as_tensor(want).detach().to(F64)
    assert got.shape == want.shape or got.numel() == want.numel() == 1, \
        f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    def equals(v, tol):
        v = torch.as_tensor(v).detach().to(F64)
        return bool(((got - v).abs() <= tol * v.abs().clamp(min=1)).all())
    if equals(want, tol):
        return
    why = next((text for text, value in (mistakes or {}).items() if equals(value, min(tol, 0.02))), None)
    worst = (got - want).abs().nan_to_num(math.inf).flatten().argmax()
    value, target = (v.expand(got.shape).flatten()[worst].item() for v in (got, want))
    raise AssertionError(f"{what}: {value:.6g}, not {target:.6g}" + (f": {why}" if why else ""))


class Mixture:
    """Gaussian mixture with full covariances: log p_t and score in closed form in float64, at x_t = a x0 + s z."""

    def __init__(self, weights, means, covs):
        self.weights, self.means, self.covs = (torch.tensor(v, dtype=F64) for v in (weights, means, covs))
        self.eig, self.axes = torch.linalg.eigh(self.covs)                             # (K, D), (K, D, D)

    def terms(self, x, a, s):
        """log w_k N_k(x): (B, K), and N_k's precision times (x - a m_k) along its axes: (B, K, D). a, s: numbers or (B,)."""
        a, s = (torch.as_tensor(v, dtype=F64).reshape(-1, 1, 1) for v in (a, s))
        r = torch.einsum("bkd,kde->bke", x.to(F64)[:, None] - a * self.means, self.axes)
        var = a ** 2 * self.eig + s ** 2
        return self.weights.log() - 0.5 * (r ** 2 / var + (2 * math.pi * var).log()).sum(2), r / var

    def log_prob(self, x, a=1., s=0.):
        return self.terms(x, a, s)[0].logsumexp(1)

    def score(self, sde):
        def score(x, t):
            log_w, pull = self.terms(x.flatten(1), *sde.marginal(t.to(F64)))
            return -torch.einsum("bk,bke,kde->bd", log_w.softmax(1), pull, self.axes).to(x.dtype).reshape(x.shape)
        return score

    def sample(self, n, generator):
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=F64)
        return (self.means[k] + torch.einsum("bde,be->bd", self.axes[k], self.eig[k].sqrt() * z)).float()

    def expect_samples(self, x, what, bias=0.01):
        """Weights, means and covariances of x, by the exact responsibilities (unbiased under the exact law), within 4.5
        standard errors + bias."""
        assert torch.isfinite(x).all(), f"{what}: samples are not finite"
        x, r = x.to(F64), self.terms(x, 1., 0.)[0].softmax(1)
        n = r.sum(0)
        mean = r.T @ x / n[:, None]
        d = x[:, None] - mean
        cov = torch.einsum("bk,bkd,bke->kde", r, d, d) / n[:, None, None]
        var = self.covs.diagonal(dim1=1, dim2=2)
        for name, got, want, se in (("weight", n / len(x), self.weights, (self.weights * (1 - self.weights) / len(x)).sqrt()),
                                    ("mean", mean, self.means, (var / n[:, None]).sqrt()),
                                    ("covariance", cov, self.covs, (2 * var[:, :, None] * var[:, None] / n[:, None, None]).sqrt())):
            off = ((got - want).abs() / (4.5 * se + bias)).max()
            assert off < 1, \
                f"{what}: a component's {name} is off by {off:.1f} times the tolerance; got {got.tolist()}, want {want.tolist()}"


TOY = Mixture([.4, .2, .4], [[-2, -2], [0, 0], [2, 2]], [[[1, 0], [0, 1]]] * 3)        # the paper's toy example
TILTED = Mixture([.5, .3, .2], [[-1.5, -1], [1.5, -.5], [.3, 1.5]],
        # correlated: the score's Jacobian has off-diagonals
                 [[[.3, .15], [.15, .2]], [[.2, -.1], [-.1, .4]], [[.1, 0], [0, .15]]])
GAUSS = Mixture([1.], [[.5, -.3]], [[[.3, .2], [.2, .25]]])


def planted(sde, e, calls=None):
    """A score that predicts the noise e whatever it sees, and notes what it saw in calls."""
    def score(x, t):
        if calls is not None:
            calls.append((x.clone(), t.clone()))
        return -(e / sgu.expand(sde.marginal(t)[1], x)).to(x.dtype)
    return score


def loss_example(sde):
    """x0, t, z and e for the loss checks: 3 images of 2x2x2 with different times. t lies on the DDPM chain."""
    g = seeded(7)
    x0, z, e = (torch.randn(3, 2, 2, 2, generator=g, dtype=F64) for _ in range(3))
    return x0, torch.tensor([0.1, 0.45, 0.9], dtype=F64), z, e


def test_the_oracle_itself():
    """The closed-form score is the gradient of the closed-form log p_t, and that density integrates to 1."""
    for a, s in ((1., 0.3), (0.4, 0.9)):
        x = (2 * torch.randn(50, 2, generator=seeded(), dtype=F64)).requires_grad_()
        grad, = torch.autograd.grad(TILTED.log_prob(x, a, s).sum(), x)
        fixed = type("Fixed", (), {"marginal": lambda self, t: (a * torch.ones_like(t), s * torch.ones_like(t))})()
        expect(TILTED.score(fixed)(x.detach(), torch.zeros(50)), grad, "mixture score", 1e-10)
        u = torch.linspace(-8, 8, 401, dtype=F64)
        expect(TILTED.log_prob(torch.cartesian_prod(u, u), a, s).exp().sum() * (u[1] - u[0]) ** 2, 1., "integral of p_t", 1e-8)


# =====================================================================================================================
# 1. Schedules
# =====================================================================================================================

def check_schedule(sde=SDES["VP"], marginal=None, drift=None, diffusion=None):
    """a' = (f/x) a and (s^2)' = 2 (f/x) s^2 + g^2 by central differences, inside the intervals of a DDPM. Parts may be replaced."""
    marginal, drift, diffusion = marginal or sde.marginal, drift or sde.drift, diffusion or sde.diffusion
    t, h = (torch.arange(5, 996, 10, dtype=F64) - 0.5) / 1000, 1e-5
    (a, s), (a_lo, s_lo), (a_hi, s_hi) = (marginal(t + d) for d in (0, -h, h))
    x = torch.tensor([[1., -2.]], dtype=F64)
    f = drift(x.expand(len(t), 2), t)
    expect(f[:, 1], -2 * f[:, 0], "the drift at x = -2 against x = 1 (f is linear in x)")
    f, g2 = f[:, 0], diffusion(t) ** 2
    da, ds2 = (a_hi - a_lo) / (2 * h), (s_hi ** 2 - s_lo ** 2) / (2 * h)
    expect(f * a, da, "f a/x against da/dt", 1e-5, {
        "your drift's sign is flipped": -da, "the drift is -beta x/2: the 1/2 is missing": 2 * da,
        "the drift is zero: only VE has no drift": 0 * da, "a variance exploding chain has a = 1 and f = 0": -g2 / 2 * a})
    true_g2 = ds2 - 2 * f * s ** 2
    expect(g2, true_g2, "g^2 against d(s^2)/dt - 2 (f/x) s^2", 1e-5, {
        "diffusion returns g^2: take the square root": true_g2 ** 2, "g^2 is twice too large": 2 * true_g2,
        "g^2 is half of what it should be": true_g2 / 2,
        "this is ds/dt: g^2 is the rate of the VARIANCE s^2": (s_hi - s_lo) / (2 * h)})


def check_ve_marginal(marginal=SDES["VE"].marginal, sigma_min=0.01, sigma_max=20.):
    t = torch.tensor([0., 0.5, 1.], dtype=F64)
    a, s = marginal(t)
    expect(a, [1.] * 3, "a of VE", 1e-12, {"a variance exploding chain keeps the image: a = 1": (1 - s ** 2).clamp(min=0).sqrt()})
    want = torch.tensor([sigma_min, math.sqrt(sigma_min * sigma_max), sigma_max], dtype=F64)
    expect(s / want, [1.] * 3, "s of VE at t = 0, 1/2, 1 over sigma_min, the geometric mean, sigma_max", 1e-9, {
        "you returned the variance s^2": want, "log s, not s, is linear in t": torch.lerp(want[0], want[2], t) / want})


def check_vp_marginal(marginal=SDES["VP"].marginal):
    """beta from 0.1 to 20: a(1) = exp(-5.025), a(1/2) = exp(-1.26875), s^2 = 1 - a^2."""
    t = torch.tensor([0., 0.5, 1.], dtype=F64)
    a, s = marginal(t)
    want = torch.tensor([0., -1.26875, -5.025], dtype=F64).exp()
    expect(a, want, "a of VP at t = 0, 1/2, 1", 1e-9, {
        "this is a^2: a is exp(-1/2 int beta), the 1/2 is missing": want ** 2,
        "a is the square root of what you returned": want.sqrt()})
    expect(s, (1 - want ** 2).sqrt(), "s of VP", 1e-9, {"you returned s^2": 1 - want ** 2,
            "a^2 + s^2 = 1, not a + s = 1": 1 - want})
    t32 = torch.tensor([1e-4, 1e-3])
    expect(marginal(t32)[1] / marginal(t32.to(F64))[1], [1., 1.], "s in float32 over s in float64 at small t: use expm1", 2e-6)


def check_ddpm_chain(marginal=SDES["DDPM"].marginal, n_steps=1000, beta_min=1e-4, beta_max=0.02):
    """Walk x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) z: its factor and its variance are a and s^2 at t = k/n."""
    factor, var, chain = 1., 0., []
    for beta in np.linspace(beta_min, beta_max, n_steps):
        factor, var = factor * math.sqrt(1 - beta), var * (1 - beta) + beta
        chain.append((factor, math.sqrt(var)))
    factor, std = torch.tensor(chain, dtype=F64).T
    for dtype, tol in ((F64, 1e-9), (torch.float32, 2e-5)):
        a, s = marginal((torch.arange(1, n_steps + 1, dtype=F64) / n_steps).to(dtype))
        expect(a, factor, f"a of the chain in {dtype}", tol, {"this is abar = a^2: take the square root": factor ** 2})
        expect(s, std, f"s of the chain in {dtype}", tol, {"you returned s^2": std ** 2})
    expect(s[0] / std[0], 1., "s after the first step, relative", 1e-3)


def check_time(time, sde):
    t = torch.cat([torch.arange(1, 11), torch.arange(20, 1001, 20)]).to(F64) / 1000        # on the DDPM chain, too
    for dtype, tol in ((F64, 1e-9), (torch.float32, 1e-5)):
        a, s = sde.marginal(t.to(dtype))
        expect(time(s / a), t, f"time(s/a) against t in {dtype}", tol)


def check_prior_log_prob(prior_log_prob, std):
    x = std * torch.randn(5, 3, 4, generator=seeded())
    normal = torch.distributions.Normal(0., std)
    terms, squares = normal.log_prob(x).to(F64).sum((1, 2)), -(x.to(F64) / std).square().sum((1, 2)) / 2
    expect(prior_log_prob(x), terms, "log of the prior", 1e-5, {
        "this is the mean over pixels: the log-density of an image is the sum": terms / 12,
        "the 1/2 of the exponent is missing": terms + squares, "the normalisation of the Gaussian is missing": squares,
        "the normalisation is D log(std sqrt(2 pi)), once per pixel": squares - math.log(std * math.sqrt(2 * math.pi)),
        "this is the log of a unit Gaussian: divide by sigma_max": torch.distributions.Normal(0., 1.).log_prob(x).sum((1, 2))})


def check_prior_sample(prior_sample, std):
    """n = 100,000: the standard deviation has relative standard error 0.0022."""
    x = prior_sample((50_000, 2), seeded(3))
    expect(x.std() / std, 1., "the prior's standard deviation over s(1)", 0.01, {"s^2 was used where s belongs": std})
    expect(x.mean() / std, 0., "the prior's mean over s(1)", 0.015)


@every_sde
def test_schedule(sde):
    check_schedule(sde)


def test_marginals_and_chain():
    check_ve_marginal(), check_vp_marginal(), check_ddpm_chain()
    assert (sgu.VE().sigma_min, sgu.VE().sigma_max, sgu.VP().beta_min, sgu.VP().beta_max) == (0.01, 50., 0.1, 20.)
    small = sgu.DDPM(20, 0.01, 0.3)
    check_ddpm_chain(small.marginal, 20, 0.01, 0.3)


@every_sde
def test_time_inverts_marginal(sde):
    check_time(sde.time, sde)


@every_sde
def test_prior(sde):
    std = 20. if isinstance(sde, sgu.VE) else 1.
    check_prior_log_prob(sde.prior_log_prob, std)
    check_prior_sample(sde.prior_sample, std)
    a, s = sde.marginal(torch.ones(1, dtype=F64))
    expect((a ** 2 * 0.25 + s ** 2).sqrt() / std, [1.], "the law of x_1 for data of std 1/2 against the prior", 1e-3)


# =====================================================================================================================
# 2. Network
# =====================================================================================================================

def check_make_score(make_score=sgu.make_score, sde=SDES["VE"], data_std=0.7):
    """A network that answers 0 leaves the score of N(0, data_std^2 I); one that answers the ideal target leaves e = z."""
    x0, t, z, _ = loss_example(sde)
    a, s = (sgu.expand(v, x0) for v in sde.marginal(t))
    x = a * x0 + s * z
    seen = []
    zero = make_score(lambda inp, noise: seen.append((inp, noise)) or torch.zeros_like(inp), sde, data_std)(x, t)
    want = -x / (a ** 2 * data_std ** 2 + s ** 2)
    expect(zero / want, torch.ones_like(x), "score of a zero network over the Gaussian's score", 1e-5, {
        "this is e (noise), not the score: divide by -s": -s * torch.ones_like(x),
        "the sign is flipped: score = -e/s": -torch.ones_like(x),
        "sigma must be s/a, and x must be divided by a": -x / (data_std ** 2 + s ** 2) / want})
    inp, noise = seen[0]
    expect(inp, x / (a ** 2 * data_std ** 2 + s ** 2).sqrt(), "the network's input, of unit variance", 1e-5)
    expect(noise, (s / a).flatten().log() / 4, "the network's noise input log(sigma)/4", 1e-5)
    sigma = s / a
    ideal = (sigma / data_std * x0 - data_std * z) / (sigma ** 2 + data_std ** 2).sqrt()
    score = make_score(lambda inp, noise: ideal, sde, data_std)(x, t)
    expect(-s * score, z, "e of an ideal network", 1e-5, {"the network's part has the wrong sign": 2 * (-s * zero) - z})


def check_keep_weight(keep_weight=sgu.keep_weight, data_std=0.7):
    """Weighted by keep_weight, the squared error of e is the squared error of F: e depends on F through make_score."""
    for sde in SDES.values():
        x0, t, z, f = loss_example(sde)
        a, s = (sgu.expand(v, x0) for v in sde.marginal(t))
        e = [-s * sgu.make_score(lambda inp, noise: out, sde, data_std)(a * x0 + s * z, t) for out in (f, torch.zeros_like(f))]
        got = keep_weight(sde, data_std)(t) * (e[0] - e[1]).square().mean((1, 2, 3))
        expect(got / f.square().mean((1, 2, 3)), [1.] * 3, "weighted error of e over the error of the network", 1e-5)


def shaken_unet(seed=0, **kw):
    """A small U-Net whose zero-initialised layers are filled, as after training."""
    torch.manual_seed(seed)
    net = sgu.UNet(**(dict(channels=(8, 16), patch=2) | kw))
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return net


@every_sde
def test_make_score(sde):
    check_make_score(sgu.make_score, sde)


def test_keep_weight():
    check_keep_weight()


def test_unet_depends_on_time_and_on_its_own_image_alone():
    net, x = shaken_unet(), torch.randn(4, 1, 8, 8, generator=seeded())
    noise = torch.tensor([-1., -0.3, 0.2, 0.9])
    y = net(x, noise)
    for i in range(4):
        expect(net(x[i:i + 1], noise[i:i + 1]), y[i:i + 1], "an image alone against in its batch", 1e-4)
    same = net(x[:1].expand(4, -1, -1, -1), noise)
    gaps = torch.cdist(same.flatten(1), same.flatten(1)) + torch.eye(4)
    assert gaps.min() > 0.02 * same.norm() / 2, "the U-Net's output does not depend on the noise level"
    assert not sgu.UNet(channels=(8, 16))(x, noise).any(), "an untrained U-Net must answer 0, the Gaussian's score"


def test_every_parameter_learns():
    """16 channels and more: in front of a GroupNorm with one channel a group a bias has no effect."""
    for kw in (dict(channels=(16, 32)), dict(image_channels=3, channels=(16, 16, 32), blocks=2, patch=1)):
        net = shaken_unet(**kw)
        x = torch.rand(4, kw.get("image_channels", 1), 8, 8, generator=seeded()) * 2 - 1
        sgu.score_matching_loss(sgu.make_score(net, SDES["VE"]), SDES["VE"], x, generator=seeded()).backward()
        dead = [name for name, p in net.named_parameters()
                if p.grad is None or p.grad.abs().max() < 1e-8 or (p.grad == 0).sum() > 0.05 * p.numel()]
        assert not dead, f"no gradient reaches (all of) {dead}"


def test_attention_against_loops():
    torch.manual_seed(0)
    att, (b, c, h, w) = sgu.Attention(8, heads=2).double(), (2, 8, 3, 2)
    nn.init.normal_(att.out.weight), nn.init.normal_(att.out.bias)
    x = torch.randn(b, c, h, w, dtype=F64)
    q, k, v = att.qkv(att.norm(x)).flatten(2).reshape(b, 3, c, h * w).unbind(1)
    y = torch.zeros(b, c, h * w, dtype=F64)
    for head in (slice(0, 4), slice(4, 8)):
        for i in range(b):
            for at in range(h * w):
                p = torch.stack([(q[i, head, at] * k[i, head, to]).sum() / 2. for to in range(h * w)]).softmax(0)   # 2 = sqrt(4)
                y[i, head, at] = (v[i, head] * p).sum(1)
    expect(att(x), x + att.out(y.reshape(b, c, h, w)), "attention", 1e-9)


def test_bfloat16_is_close_to_float32():
    net, x, t = shaken_unet(), torch.randn(16, 1, 8, 8, generator=seeded()), torch.linspace(0.05, 1, 16)
    x *= 1 + sgu.expand(SDES["VE"].marginal(t)[1], x)
    with torch.no_grad():
        full, half, bare = (sgu.make_score(model, SDES["VE"], precision=p)(x, t) for model, p in (
            (net, "float32"), (net, "bfloat16"), (lambda inp, noise: 0 * inp, "float32")))
    off = (half - full).flatten(1).norm(dim=1) / (full - bare).flatten(1).norm(dim=1)
    assert half.dtype == torch.float32 and 1e-5 < off.max() < 0.04, f"relative difference of the network's part: {off.max():.2g}"


# =====================================================================================================================
# 3. Losses
# =====================================================================================================================

def check_noising(loss=sgu.score_matching_loss, sde=SDES["VP"]):
    """The score is asked at x_t = a x0 + s z and at the given t."""
    x0, t, z, e = loss_example(sde)
    calls = []
    loss(planted(sde, e, calls), sde, x0, t=t, z=z)
    a, s = (sgu.expand(v, x0) for v in sde.marginal(t))
    assert calls, "your loss never asks the score"
    expect(calls[0][1], t, "the time given to the score")
    expect(calls[0][0], a * x0 + s * z, "the noisy image given to the score", 1e-6, {
        "x0 is not scaled: x_t = a x0 + s z": x0 + s * z, "you used s^2 in place of s": a * x0 + s ** 2 * z,
        "no noise was added": a * x0, "z was subtracted": a * x0 - s * z})


def check_score_matching_value(score_matching_loss=sgu.score_matching_loss, sde=SDES["VE"]):
    x0, t, z, e = loss_example(sde)
    s = sgu.expand(sde.marginal(t)[1], e)
    want = np.mean([(float(ei) - float(zi)) ** 2 for ei, zi in zip(e.flatten(), z.flatten())])
    expect(score_matching_loss(planted(sde, e), sde, x0, t=t, z=z), want, "keep loss", 1e-6, {
        "you summed over the pixels: take the mean": want * 8, "you summed over the batch: take the mean": want * 3,
        "there is a 1/2 too many": want / 2, "the sign of e is flipped: e = -s score": (e + z).square().mean(),
        "you compared the score with z: e = -s score": (-e / s - z).square().mean(),
        "you compared scores: in noise units the weight s^2 belongs in front": ((e - z) / s).square().mean()})
    expect(score_matching_loss(planted(sde, z), sde, x0, t=t, z=z), 0., "keep loss of a score that knows the noise")


def check_gaussian_optimum(score_matching_loss=sgu.score_matching_loss, sde=SDES["VP"]):
    """Data and noise with exactly the moments of N(0, C) and N(0, I): the exact score is the stationary point, to rounding.

    Every score -M x has a loss quadratic in (x0, z), so these moments are all that matters: no sampling error.
    """
    raw = torch.randn(400, 4, generator=seeded(), dtype=F64)
    raw = raw - raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(raw.T @ raw / 400).T)
    cov = torch.tensor([[.5, .3], [.3, .4]], dtype=F64)
    x0, z = white[:, :2] @ torch.linalg.cholesky(cov).T, white[:, 2:]
    for time in (0.05, 0.3, 0.8):
        t = torch.full((400,), time, dtype=F64)
        a, s = (float(v[0]) for v in sde.marginal(t))
        precision = torch.linalg.inv(a ** 2 * cov + s ** 2 * torch.eye(2, dtype=F64))
        loss = lambda m: score_matching_loss(lambda x, t: -x @ m.T, sde, x0, t=t, z=z)
        m = precision.clone().requires_grad_()
        grad, = torch.autograd.grad(loss(m), m)
        twice, = torch.autograd.grad(loss(2 * m), m)
        assert grad.norm() < 1e-8 * twice.norm(), \
            f"the exact Gaussian score is not a stationary point of your keep loss at t = {time}"
        expect(loss(precision), 1 - s ** 2 * precision.trace() / 2, "keep loss of the exact score, 1 - s^2 tr(C_t^-1)/D", 1e-9)


def inner(e, z):
    """e.z / D per image by plain loops."""
    return torch.tensor([sum(float(ei) * float(zi) for ei, zi in zip(a.flatten(), b.flatten())) / a.numel() for a, b in zip(e,
            z)], dtype=F64)


def check_orthogonal(orthogonal_loss=sgu.orthogonal_loss, sde=SDES["VE"]):
    """Zero for a perpendicular score, even in the score, equal to the hand-computed inner product."""
    x0, t, z, e = loss_example(sde)
    value = lambda e, **kw: orthogonal_loss(planted(sde, e), sde, x0, t=t, z=z, **kw)
    perpendicular = e - sgu.expand((e * z).sum((1, 2, 3)) / z.square().sum((1, 2, 3)), z) * z
    elementwise = (perpendicular * z).square().mean()
    expect(value(perpendicular), 0., "orthogonal loss of a perpendicular score", 1e-9, {
        "you squared element by element: square the INNER product, after the sum over pixels": elementwise,
        "you squared element by element and summed": 8 * elementwise})
    d = inner(e, z)
    s2, batch = sde.marginal(t)[1] ** 2, torch.tensor([1., -1., 1.], dtype=F64).reshape(3, 1, 1, 1)
    flat = lambda v: v.flatten(1).norm(dim=1)
    expect(value(e), (d ** 2).mean(), "orthogonal loss", 1e-6, {
        "you squared element by element: square the INNER product, after the sum over pixels": (e * z).square().mean(),
        "you summed over the pixels: (e.z / D)^2 divides by D": (64 * d ** 2).mean(), "the square is missing": d.mean(),
        "you took the absolute value in place of the square": d.abs().mean(),
        "you divided by D once: (e.z / D)^2 divides by D^2": (8 * d ** 2).mean(),
        "you averaged over the batch before squaring": d.mean() ** 2, "this is the squared cosine: do not divide by the norms":
        ((8 * d / flat(e) / flat(z)) ** 2).mean(),
                "this is in score units: (s^2 score.u / D)^2 lacks s^2": (d ** 2 / s2 ** 2).mean(),
        "this is the 'paper' weight 1/s^2": (d ** 2 / s2).mean(),
        "this is the squared cosine with the batch's norms": ((8 * d / e.norm() / z.norm()) ** 2).mean()})
    expect(value(-e), value(e), "orthogonal loss of -score against score (it is even)", 1e-9)
    expect(value(batch * e), value(e), "orthogonal loss with the sign of one image's score flipped", 1e-9)


def check_obtuse_sign(obtuse_loss=sgu.obtuse_loss, sde=SDES["VE"]):
    """e.z / D: positive when the score points at the forgotten image, negative when it points away."""
    x0, t, z, e = loss_example(sde)
    value = lambda e: obtuse_loss(planted(sde, e), sde, x0, t=t, z=z)
    d, s2, flat = inner(e, z), sde.marginal(t)[1] ** 2, lambda v: v.flatten(1).norm(dim=1)
    toward = z.square().mean()
    expect(value(z), toward, "obtuse loss of the score that points at the forgotten image", 1e-6, {
        "your sign is flipped: the score turns toward the forgotten data": -toward})
    expect(value(e), d.mean(), "obtuse loss", 1e-6, {
        "your sign is flipped: the score turns toward the forgotten data": -d.mean(),
        "you summed over the pixels: divide by D": 8 * d.mean(),
        "this is the cosine: do not divide by the norms": (8 * d / flat(e) / flat(z)).mean(),
        "you squared: that is the orthogonal loss": (d ** 2).mean(),
        "this is score.u / D: lambda(t) = s^2 is missing": (d / s2).mean(), "you used s where s^2 belongs": (d / s2.sqrt()).mean(),
        "you divided by the norms of the whole batch": (8 * d).sum() / e.norm() / z.norm(),
        "you took the absolute value": d.abs().mean()})


def check_obtuse_turns(obtuse_loss=sgu.obtuse_loss, sde=SDES["VE"]):
    """One gradient step on a free score lowers cos(score, u), u = -z/s, for every image."""
    x0, t, z, e = loss_example(sde)
    s = sgu.expand(sde.marginal(t)[1], z)
    free, u = (-e / s).requires_grad_(), -z / s
    grad, = torch.autograd.grad(obtuse_loss(lambda x, t: free, sde, x0, t=t, z=z), free)
    cos = lambda v: torch.cosine_similarity(v.flatten(1), u.flatten(1))
    turn = cos(free - 0.1 * free.norm() / grad.norm() * grad) - cos(free)
    assert (turn < 0).all(), f"a step of your obtuse loss changes cos(score, u) by {turn.tolist()}: " + (
        "your sign is flipped: the score turns toward the forgotten data" if (turn > 0).all() else "it must fall for every image")


def check_weighting(loss, sde, power):
    """'noise', 'paper' and a function of t, image by image. power: of 1/s under the paper's lambda(t), or 'chain' for DDPM."""
    x0, t, z, e = loss_example(sde)
    one = lambda i, w: float(loss(planted(sde, e[i:i + 1]), sde, x0[i:i + 1], t=t[i:i + 1], z=z[i:i + 1], weighting=w))
    if power == "chain":           # beta_k^2 / (2 sigma_k^2 alpha_k (1 - abar_k)) with sigma_k^2 = beta_k, alpha = 1 - beta, k = 1000 t
        betas = np.linspace(1e-4, 0.02, 1000)
        abar = np.cumprod(1 - betas)
        k = (t * 1000).round().long().numpy() - 1
        want = torch.tensor(betas[k] ** 2 / (2 * betas[k] * (1 - betas[k]) * (1 - abar[k])))
    else:
        want = sde.marginal(t)[1] ** -power
    s = sde.marginal(t)[1]
    ratio = torch.tensor([one(i, "paper") / one(i, "noise") for i in range(3)], dtype=F64)
    expect(ratio / want, [1.] * 3, "weight 'paper' over weight 'noise', over its formula", 1e-5, {
        "lambda(t) = s^2 times (score.u)^2 leaves 1/s^2, not 1/s": s, "you multiply by s^2 where 1/s^2 belongs": s ** 4,
        "'paper' does nothing for this loss": 1 / want, "the 1/2 is missing": torch.full((3,), 2.)})
    expect(loss(planted(sde, e), sde, x0, t=t, z=z, weighting=lambda t: 3 * t), np.mean([3 * float(t[i]) * one(i, "noise")
            for i in range(3)]),
           "a weight given as a function of t", 1e-6)
    with pytest.raises(ValueError, match="weighting"):
        loss(planted(sde, e), sde, x0, t=t, z=z, weighting="papre")


def check_loss_draws(loss=sgu.score_matching_loss, sde=SDES["VP"]):
    """Without t and z: t uniform on [t_min, 1] (DDPM: on the chain 1..n), z standard normal. n = 20,000."""
    calls, n = [], 20_000
    values = [float(loss(planted(sde, torch.ones(n, 1), calls), sde, torch.zeros(n, 1), generator=seeded(5))) for _ in range(2)]
    assert values[0] == values[1], "the same generator must give the same loss: pass it to every draw"
    x, t = calls[0]
    if isinstance(sde, sgu.DDPM):
        k = t.to(F64) * sde.n_steps
        assert (k - k.round()).abs().max() < 1e-3, "DDPM is trained at the chain's times k/n"
        counts = torch.bincount(k.round().long(), minlength=sde.n_steps + 1).to(F64)
        expected = n / sde.n_steps
        off = (counts[1:] - expected).abs().max() / math.sqrt(expected)
        assert counts[0] == 0 and off < 5, \
            f"k must be uniform on 1..{sde.n_steps}; counts of k = 1, 2, ...: {counts[1:6].long().tolist()}"
    else:
        u = ((t - sde.t_min) / (1 - sde.t_min)).sort()[0].to(F64)
        assert u[0] >= 0 and u[-1] <= 1 and (u - torch.arange(n) / n).abs().max() < 0.014, "t must be uniform on [t_min, 1]"
    z = (x / sde.marginal(t)[1][:, None]).flatten().to(F64)
    normal = torch.special.ndtr(z.sort()[0])
    assert (normal - torch.arange(n) / n).abs().max() < 0.014, "z must be standard normal"       # Kolmogorov: P(> 0.014) = 7e-4
    assert abs(torch.corrcoef(torch.stack([z ** 2, t.to(F64)]))[0, 1]) < 0.03, "z must be independent of t"


def check_sgu_loss(sgu_loss=sgu.sgu_loss, sde=SDES["VE"]):
    """alpha keep(x_g) + (1 - alpha) forget(x_f), the forget loss a constant that notes what it was given."""
    x_g, _, _, _ = loss_example(sde)
    x_f, seen, score = x_g[:2] + 5, [], (lambda x, t: -x / 3)
    def constant(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
        seen.append((x0, weighting))
        return torch.tensor(7., dtype=F64)
    value = lambda alpha: sgu_loss(score, sde, x_g, x_f, alpha, forget_loss=constant, generator=seeded(2))
    keep = sgu.score_matching_loss(score, sde, x_g, generator=seeded(2))
    for alpha in (0., 0.3, 1.):
        expect(value(alpha), alpha * keep + (1 - alpha) * 7, f"sgu_loss at alpha = {alpha}", 1e-6, {
            "alpha weighs the KEEP loss": (1 - alpha) * keep + alpha * 7,
            "the forget loss is weighted by 1 - alpha": alpha * keep + 7,
            "the keep loss is weighted by alpha": keep + (1 - alpha) * 7,
            "the forget loss is subtracted: its sign is its own": alpha * keep - (1 - alpha) * 7})
    assert seen and all(x is x_f and w == "noise" for x, w in seen), "the forget loss must see x_f, the data to forget"


@every_sde
def test_losses(sde):
    check_noising(sgu.score_matching_loss, sde), check_noising(sgu.orthogonal_loss, sde), check_noising(sgu.obtuse_loss, sde)
    check_score_matching_value(sgu.score_matching_loss, sde)
    check_orthogonal(sgu.orthogonal_loss, sde)
    check_obtuse_sign(sgu.obtuse_loss, sde)
    check_obtuse_turns(sgu.obtuse_loss, sde)
    check_sgu_loss(sgu.sgu_loss, sde)


@every_sde
def test_gaussian_optimum(sde):
    check_gaussian_optimum(sgu.score_matching_loss, sde)


@pytest.mark.parametrize("loss, power", [(sgu.score_matching_loss, 0), (sgu.orthogonal_loss, 2), (sgu.obtuse_loss, 0)],
        ids=["keep", "orthogonal", "obtuse"])
def test_weights(loss, power):
    check_weighting(loss, SDES["VE"], power), check_weighting(loss, SDES["VP"], power)
    check_weighting(loss, SDES["DDPM"], "chain")


@pytest.mark.parametrize("loss", [sgu.score_matching_loss, sgu.orthogonal_loss, sgu.obtuse_loss], ids=["keep", "orthogonal",
        "obtuse"])
def test_loss_draws(loss):
    for sde in (SDES["VE"], SDES["VP"], sgu.DDPM(n_steps=10)):
        check_loss_draws(loss, sde)


# =====================================================================================================================
# 4. Samplers
# =====================================================================================================================

def check_time_grid(time_grid=sgu.time_grid, sde=SDES["VE"]):
    for t_max in (1., 0.5):
        t = time_grid(sde, 20, t_max)
        assert t.dtype == F64 and (float(t[0]), float(t[-1])) == (t_max,
                sde.t_min), "the grid runs from t_max to t_min exactly, in float64"
        a, s = sde.marginal(t)
        gaps = ((s / a) ** (1 / 7)).diff()
        expect(gaps / gaps.mean(), torch.ones(20), "steps in sigma^(1/7), relative to their mean", 1e-6)


def check_denoise(denoise=sgu.denoise, sde=SDES["VP"]):
    """The posterior mean of x0 given x_t for Gaussian data: m + a C (a^2 C + s^2 I)^-1 (x - a m)."""
    x, m, cov = 2 * torch.randn(9, 2, generator=seeded(), dtype=F64), GAUSS.means[0], GAUSS.covs[0]
    for t in (0.02, 0.5):
        a, s = map(float, sde.marginal(torch.tensor(t, dtype=F64)))
        gain = a * cov @ torch.linalg.inv(a ** 2 * cov + s ** 2 * torch.eye(2, dtype=F64))
        expect(denoise(GAUSS.score(sde), sde, x, t), m + (x - a * m) @ gain.T, "posterior mean", 1e-6, {
            "the division by a is missing": a * (m + (x - a * m) @ gain.T),
            "the sign of the score is flipped": 2 * x / a - m - (x - a * m) @ gain.T})


def check_sampler(sampler=sgu.euler_maruyama, sde=SDES["VP"], n=10_000, **kw):
    """With the exact score of a mixture with three different, correlated components."""
    x = sampler(TILTED.score(sde), sde, (n, 2), generator=seeded(11), **kw)
    TILTED.expect_samples(x, f"{getattr(sampler, '__name__', 'your sampler')}, {type(sde).__name__}, n = {n}")


def check_sampler_ends_clean(sampler=sgu.euler_maruyama, sde=SDES["VE"], **kw):
    """Data that are one single image: whatever the noise on the way, the last step must arrive at it."""
    x = sampler(lambda x, t: -(x - 0.5 * sgu.expand(sde.marginal(t.to(F64))[0], x)) / sgu.expand(sde.marginal(t.to(F64))[1],
            x) ** 2,
                sde, (500, 2), generator=seeded(), **kw)
    expect(x, torch.full((500, 2), 0.5), "samples of a single image: the last step goes to the mean, without noise", 1e-4)


def check_seeded(sample):
    """sample(generator) twice with one seed is bit-identical, whatever the global seed; another seed gives something else."""
    torch.manual_seed(1); first = sample(seeded(3))
    torch.manual_seed(2); second = sample(seeded(3))
    assert torch.equal(first, second), "the same generator seed must give the same result: pass the generator to every draw"
    assert not torch.equal(first, sample(seeded(4))), "another seed must give another result"


def check_langevin(langevin_step=sgu.langevin_step, sde=SDES["VE"], snr=0.16, n=200_000):
    """Along each axis of a Gaussian the variance goes V -> (1 - eps/v)^2 V + 2 eps, eps = 2 (snr s)^2:
    from the exact law and from a wrong one."""
    t = torch.tensor(0.3, dtype=F64)
    a, s = map(float, sde.marginal(t))
    var = torch.tensor([1., 4.], dtype=F64) * s ** 2
    score, eps = (lambda x, t: -x / var.to(x.dtype)), 2 * (snr * s) ** 2
    for start in (1., 9.):
        recursion = lambda drift, noise: functools.reduce(lambda v, _: (1 + drift * eps / var) ** 2 * v + noise, range(10),
                start * var)
        x, g = (start * var).sqrt().float() * torch.randn(n, 2, generator=seeded(1)), seeded(2)
        for _ in range(10):
            x = langevin_step(score, sde, x, t, snr, g)
        got, want = x.to(F64).var(0) / var, recursion(-1, 2 * eps) / var
        expect(got / want, [1., 1.], f"variance after 10 corrections from {start:.0f} times the exact one, over the recursion's", 0.016, {
            "the noise is sqrt(2 eps) z, not sqrt(eps) z": recursion(-1, eps) / var / want,
            # 0.016: 5 standard errors sqrt(2/n)
            "the sign of the score is flipped": recursion(1, 2 * eps) / var / want, "the noise is missing": recursion(-1,
            0.) / var / want})
        if start == 1:
            assert ((got - 1).abs() < 0.03 + eps / var / 2).all(), \
                f"the corrector must leave the law as it is; variance ratio {got.tolist()}"


def check_ode_map(ode_sample=sgu.ode_sample, sde=SDES["VP"], steps=25, tol=0.05):
    """The flow of a Gaussian is linear: along each axis y - m shrinks by sqrt((v + sigma_0^2)/(v + sigma_1^2)), y = x/a."""
    x1 = sde.prior_sample((200, 2), seeded(6)).to(F64)
    (a1, s1), (a0, s0) = (map(float, sde.marginal(torch.tensor(t, dtype=F64))) for t in (1., sde.t_min))
    m, v, axes = GAUSS.means[0], GAUSS.eig[0], GAUSS.axes[0]
    shrink = ((v + (s0 / a0) ** 2) / (v + (s1 / a1) ** 2)).sqrt()
    land = lambda factor: m + ((x1 / a1 - m) @ axes * factor * v / (v + (s0 / a0) ** 2)) @ axes.T        # ends at the posterior mean
    x = ode_sample(GAUSS.score(sde), sde, (200, 2), steps=steps, generator=seeded(6))
    want = land(shrink)
    assert (x - m).norm() > 0.1 * (want - m).norm(), \
        "the samples collapse: the 1/2 of the probability flow dx/dt = f - g^2 score / 2 is missing"
    expect(x, want, f"probability flow, {steps} steps, against the Gaussian's flow", tol)


def check_ancestral(ancestral_sample=sgu.ancestral_sample, n=50_000):
    """Gaussian data under a 40-step chain: mean and variance obey x_{k-1} = (x_k + beta score)/sqrt(1 - beta) + sqrt(beta) z
    exactly."""
    sde, m, v = sgu.DDPM(40, 0.002, 0.3), 0.4, torch.tensor([0.01, 0.09, 1.], dtype=F64)
    abar = np.concatenate([[1.], np.cumprod(1 - np.linspace(0.002, 0.3, 40))])
    def score(x, t):
        ab = torch.as_tensor(abar)[(t.to(F64) * 40).round().long()][:, None]
        return (-(x - ab.sqrt() * m) / (ab * v + 1 - ab)).to(x.dtype)
    for steps in (None, 40, 8):
        ks = np.linspace(40, 0, (steps or 40) + 1).round().astype(int)
        mean, var = torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)
        for k, k_next in zip(ks, ks[1:]):
            keep, total = abar[k] / abar[k_next], abar[k] * v + 1 - abar[k]
            gain = (1 - (1 - keep) / total) / math.sqrt(keep)
            mean = gain * mean + (1 - keep) * math.sqrt(abar[k]) * m / total / math.sqrt(keep)
            var = gain ** 2 * var + (1 - keep) * (k_next > 0)
        x = ancestral_sample(score, sde, (n, 3), steps, seeded(8)).to(F64)
        last = 1 - abar[ks[-2]]
        expect((x.mean(0) - mean) / var.sqrt(), [0.] * 3, f"mean of {steps} ancestral steps, in standard deviations",
                5 / math.sqrt(n))
        expect(x.var(0) / var, [1.] * 3, f"variance of {steps} ancestral steps over the recursion's", 5 * math.sqrt(2 / n), {
            "no noise belongs to the last step": 1 + last / var})


@ve_and_vp
def test_time_grid(sde):
    check_time_grid(sgu.time_grid, sde)


@every_sde
def test_denoise(sde):
    check_denoise(sgu.denoise, sde)


@every_sde
@pytest.mark.parametrize("sampler, kw", [(sgu.euler_maruyama, {}), (sgu.predictor_corrector, {}), (sgu.ode_sample,
        {"steps": 50})], ids=["em", "pc", "ode"])
def test_samplers(sampler, kw, sde):
    check_sampler(sampler, sde, **kw)


@every_sde
def test_samplers_end_clean_and_are_seeded(sde):
    for sampler in (sgu.euler_maruyama, sgu.predictor_corrector, sgu.ode_sample) + ((sgu.ancestral_sample,) if isinstance(sde,
            sgu.DDPM) else ()):
        check_sampler_ends_clean(sampler, sde, steps=20)
        check_seeded(lambda g: sampler(TILTED.score(sde), sde, (5, 2), steps=4, generator=g))


@every_sde
def test_langevin(sde):
    check_langevin(sgu.langevin_step, sde)


@every_sde
def test_ode_map(sde):
    check_ode_map(sgu.ode_sample, sde)
    check_ode_map(sgu.ode_sample, sde, steps=200, tol=1e-3)


def test_ancestral():
    check_ancestral()
    check_sampler(sgu.ancestral_sample, SDES["DDPM"], n=5000)
    with pytest.raises(ValueError, match="1..40"):
        sgu.ancestral_sample(lambda x, t: x, sgu.DDPM(40), (1, 2), steps=41)


# =====================================================================================================================
# 5. Likelihood
# =====================================================================================================================

@functools.lru_cache
def toy_likelihood(log_likelihood, sde, steps=None, n=300):
    """The exact-divergence log-likelihood of n toy samples, computed once for the checks below. steps None: the default."""
    x = TOY.sample(n, seeded(21))
    return x, log_likelihood(TOY.score(sde), sde, x, exact=True, **({} if steps is None else {"steps": steps})).to(F64)


def check_likelihood(log_likelihood=sgu.log_likelihood, sde=SDES["VP"], prior_mismatch=0.006, steps=None):
    """Against log p of the toy mixture. The flow ends in p_1, which the prior only approximates: 0.0045 nats (VP), 0.01 (VE to 20)."""
    x, got = toy_likelihood(log_likelihood, sde, steps)
    want = TOY.log_prob(x)
    a, s = (float(v) for v in sde.marginal(torch.tensor(1., dtype=F64)))
    expect(got, want, "log-likelihood of the toy mixture", 0.25, {
        "this is bits, not nats": want / math.log(2), "this is the negative log-likelihood": -want,
        "this is per dimension: the log-density of a point is the sum": want / 2,
        "D log(a_1/a_0) is missing: y = x/a stretches the space": want - 2 * math.log(a)})
    off = (got - want).abs().mean()
    assert off <= prior_mismatch, f"log-likelihood: mean absolute error {off:.4f} nats, allowed {prior_mismatch}"


def check_likelihood_grid(log_likelihood=sgu.log_likelihood, sde=SDES["VP"], tol=1e-3):
    """The default steps against a grid eight times as fine."""
    steps = inspect.signature(log_likelihood).parameters["steps"].default
    (_, got), (_, fine) = toy_likelihood(log_likelihood, sde), toy_likelihood(log_likelihood, sde, 8 * steps)
    off = (got - fine).abs()
    assert off.mean() <= tol, \
        f"{steps} steps: mean {off.mean():.1e}, largest {off.max():.1e} nats from the fine grid, allowed {tol:.0e}"


def check_hutchinson(log_likelihood=sgu.log_likelihood, sde=SDES["VP"], repeats=100):
    """Random signs against the exact trace on the same coarse grid: unbiased, and four probes have half the error of one."""
    x = TILTED.sample(6, seeded(22))
    run = lambda seed, **kw: log_likelihood(TILTED.score(sde), sde, x, steps=5, generator=seeded(seed), **kw)
    exact, spread = run(0, exact=True), {}
    for probes in (1, 4):
        draws = torch.stack([run(seed, probes=probes) for seed in range(repeats)])
        spread[probes] = draws.std(0)
        off = (draws.mean(0) - exact).abs() / (draws.std(0) / math.sqrt(repeats))
        assert (spread[probes] > 1e-3).all(), "the probes never change: draw new signs at every evaluation"
        assert (off < 4.5).all(), \
            f"{probes} probe(s): the mean of {repeats} estimates is {off.max():.1f} standard errors from the exact divergence"
    ratio = (spread[1].square().mean() / spread[4].square().mean()).sqrt()
    assert 1.6 < ratio < 2.5, f"four probes must halve the standard error; it fell by {ratio:.2f}"


def check_likelihood_alone(log_likelihood=sgu.log_likelihood, sde=SDES["VE"]):
    """A sample's value does not depend on the batch it comes in, nor on its place there: also with random probes."""
    x, other = TILTED.sample(6, seeded(23)), 30 * torch.ones(3, 2)
    for kw in (dict(exact=True), dict(probes=1)):
        run = lambda x: log_likelihood(TILTED.score(sde), sde, x, steps=6, generator=seeded(9), **kw)
        whole = run(x)
        for what, got in (("alone", torch.cat([run(x[i:i + 1]) for i in range(6)])), ("in reverse order", run(x.flip(0)).flip(0)),
                          ("beside very different samples", run(torch.cat([other, x]))[3:])):
            expect(got, whole, f"likelihood of a sample {what} against in its batch ({kw})", 1e-5)


def uniform_score(sde):
    """Exact score of independent pixels, uniform on [-1, 1]: p_t(x) = (Phi(u) - Phi(l))/(2 a), u = (a - |x|)/s, l = (-a - |x|)/s."""
    def score(x, t):
        a, s = (sgu.expand(v, x) for v in sde.marginal(t.to(F64)))
        y, sign = x.to(F64).abs(), x.to(F64).sign()
        u, l = (a - y) / s, (-a - y) / s
        log_z = torch.special.log_ndtr(u) + torch.log(-torch.expm1(torch.special.log_ndtr(l) - torch.special.log_ndtr(u)))
        bell = lambda v: torch.exp(-v ** 2 / 2 - math.log(2 * math.pi) / 2 - log_z)
        return (sign * (bell(l) - bell(u)) / s).to(x.dtype)
    return score


def check_bits_per_dim(bits_per_dim=sgu.bits_per_dim, sde=SDES["VP"], tol=0.004, **kw):
    """Uniform 8-bit noise costs 8 bits a pixel, whatever the pixels: 64 images of 6x6. The score acts on pixels alone, so one
    probe is exact.

    The blur s(t_min) rounds the edges of the box off, which costs s int_0^inf -log2 Phi, 0.0016 bits for VP.
    """
    levels = torch.randint(256, (64, 1, 6, 6), generator=seeded(31))
    bits = bits_per_dim(uniform_score(sde), sde, levels / 127.5 - 1, generator=seeded(1), **kw)
    assert bits.shape == (64,), f"one value per image, not shape {tuple(bits.shape)}"
    expect(bits.mean(), 8., "bits/dim of uniform 8-bit noise under its own density", tol, {
        "the +7 is missing: a density over [-1, 1] is 128 times finer than one over levels": 1.,
        "+8 is for data in [0, 1]; [-1, 1] needs +7": 9.,
        "this is in nats: divide by log 2": 7 + math.log(2), "the sign is flipped: bits/dim is the NEGATIVE log-likelihood": 6.,
        "this is the sum over pixels: divide by D": 7 + 36.})


def check_dequantise(dequantise=sgu.dequantise):
    """Level k becomes uniform on [2k/256 - 1, 2(k + 1)/256 - 1): n = 256 x 2,000."""
    levels = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 2000)
    u = (dequantise(levels, seeded()).to(F64) + 1) * 128 - levels
    assert u.min() >= -1e-4 and u.max() <= 1 + 1e-4, \
        f"level k must stay in its own cell; it spans [{u.min():.3g}, {u.max():.3g}] of it"
    expect(u.mean(), 0.5, "mean place in the cell", 0.002)
    expect(u.var(), 1 / 12, "variance of the place in the cell", 0.001)
    check_seeded(lambda g: dequantise(levels[:, :5], g))


@pytest.mark.parametrize("sde, mismatch", [(SDES["VP"], 0.006), (SDES["VE"], 0.012), (SDES["DDPM"], 0.006)], ids=["VP", "VE",
        "DDPM"])
def test_likelihood(sde, mismatch):
    check_likelihood(sgu.log_likelihood, sde, mismatch)


@pytest.mark.parametrize("sde, mismatch", [(SDES["VP"], 0.006), (SDES["VE"], 0.012)], ids=["VP", "VE"])
def test_likelihood_on_a_fine_grid(sde, mismatch):
    check_likelihood(sgu.log_likelihood, sde, mismatch, steps=256)


@every_sde
def test_likelihood_grid(sde):
    check_likelihood_grid(sgu.log_likelihood, sde)


def test_hutchinson():
    check_hutchinson()


@every_sde
def test_likelihood_alone(sde):
    check_likelihood_alone(sgu.log_likelihood, sde)
    check_seeded(lambda g: sgu.log_likelihood(TILTED.score(sde), sde, torch.ones(3, 2), steps=3, generator=g))


def test_bits_per_dim():
    check_bits_per_dim()
    check_dequantise()
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        sgu.bits_per_dim(uniform_score(SDES["VP"]), SDES["VP"], torch.full((1, 1, 2, 2), 1.5))


# =====================================================================================================================
# 6. Inpainting and reconstruction
# =====================================================================================================================

def check_inpaint_keeps(inpaint=sgu.inpaint, sde=SDES["VE"]):
    """Known pixels bit for bit; hidden pixels never read: garbage or NaN there gives the same answer, bit for bit."""
    score, g = (lambda x, t: -(x - x.mean((2, 3), keepdim=True) / 2) / (1 + sgu.expand(sde.marginal(t)[1], x) ** 2)), seeded(41)
    x, mask = torch.rand(3, 2, 4, 4, generator=g) * 2 - 1, (torch.rand(3, 1, 4, 4, generator=g) < 0.5).float()
    known = mask.bool().expand_as(x)
    run = lambda x: inpaint(score, sde, x, mask, steps=5, generator=seeded(1))
    y = run(x)
    assert torch.equal(y[known], x[known]), "known pixels must come back bit for bit: put them back at the end"
    assert torch.isfinite(y).all() and not (y[~known] == x[~known]).any(), \
        "hidden pixels must be filled by the sampler, not copied"
    for garbage in (100., math.nan):
        assert torch.equal(run(torch.where(known, x, torch.full_like(x, garbage))), y), \
            "the answer leaks: what stands in the hidden pixels must not change the result; drop it before the first step"
    seen, one = [], torch.ones(1, 1, 40, 40)
    half = torch.arange(40) % 2 * one
    inpaint(lambda x, t: seen.append((x.clone(), float(t[0]))) or -x, sde, one, half, steps=5, generator=seeded(2))
    for x_t, t in seen:
        a, s = map(float, sde.marginal(torch.tensor(t, dtype=F64)))
        z = (x_t - a)[half.bool()] / s                          # 800 known pixels: standard error 0.025 of their standard deviation
        expect(z.std(), 1., f"noise on the known pixels when the score is asked at t = {t:.3g}, over s(t)", 0.15, {
            "known pixels must be noised to a x + s z, with new z, before the score sees them": 0.})
    check_seeded(lambda g: inpaint(score, sde, x, mask, steps=3, generator=g))


def check_inpaint_conditional(inpaint=sgu.inpaint, sde=SDES["VE"], n=5000, **kw):
    """Two pixels with correlation 0.8, one known: the other follows N(m2 + C21/C11 (x1 - m1), C22 - C21^2/C11).

    Replacing known pixels level by level is exact only in the limit of many repetitions: 15% of tolerance, and 4.5 standard errors.
    """
    pair = Mixture([1.], [[.2, -.3]], [[[.25, .2], [.2, .25]]])
    x = torch.tensor([0.7, math.nan]).reshape(1, 1, 1, 2).expand(n, 1, 1, 2)
    got = inpaint(pair.score(sde), sde, x, torch.tensor([1., 0.]).reshape(1, 1, 1, 2), generator=seeded(42), **kw)[:, 0, 0,
            1].to(F64)
    mean, var, shift = 0.1, 0.09, 0.4
    assert abs(got.mean() + 0.3) > 0.1, "the filled pixel ignores the known one: it follows the unconditional law"
    assert abs(got.mean() - mean) < 0.15 * shift + 4.5 * math.sqrt(var / n), \
        f"filled pixel's mean {got.mean():.3f}, conditional mean {mean} (unconditional -0.3)"
    assert abs(got.var() / var - 1) < 0.15 + 4.5 * math.sqrt(2 / n), \
        f"filled pixel's variance {got.var():.3f}, conditional variance {var} (unconditional 0.25)"


def check_reconstruct(reconstruct=sgu.reconstruct, sde=SDES["VE"], n=10_000):
    """At t -> 0 x comes back; from a larger t the exact score gives other samples of the same law."""
    x, score = TILTED.sample(n, seeded(51)), TILTED.score(sde)
    assert torch.equal(reconstruct(score, sde, x[:5], t=0., generator=seeded()), x[:5]), "reconstruct(t = 0) must return x"
    for t in (sde.t_min * 1.5 + 1e-3, 0.02):
        a, s = map(float, sde.marginal(torch.tensor(t, dtype=F64)))
        gap = (reconstruct(score, sde, x, t=t, generator=seeded()) - x).square().mean().sqrt()
        assert gap < 2 * s / a, f"from t = {t:.3g}, noise {s / a:.3g}, x comes back {gap:.3g} away"
    y = reconstruct(score, sde, x, t=0.6, steps=100, generator=seeded(52))
    TILTED.expect_samples(y, "reconstruction from t = 0.6")
    assert (y - x).square().mean().sqrt() > 0.3, "from t = 0.6 nothing was noised"
    check_seeded(lambda g: reconstruct(score, sde, x[:5], t=0.3, steps=3, generator=g))
    with pytest.raises(ValueError, match="1.5"):
        reconstruct(score, sde, x, t=1.5)


@every_sde
def test_inpaint_keeps_known_and_never_reads_hidden(sde):
    check_inpaint_keeps(sgu.inpaint, sde)


@ve_and_vp
def test_inpaint_conditional(sde):
    check_inpaint_conditional(sgu.inpaint, sde)


@every_sde
def test_reconstruct(sde):
    check_reconstruct(sgu.reconstruct, sde)


# =====================================================================================================================
# 7. Training
# =====================================================================================================================

def tiny_data(seed=0):
    return torch.randint(256, (40, 1, 8, 8), generator=seeded(seed), dtype=torch.uint8)


def tiny_net(seed=0):
    torch.manual_seed(seed)
    return sgu.UNet(channels=(8, 16), patch=2)


def run_training(train, model=None, ema=None, forget=None, steps=4, **kw):
    """Train a tiny U-Net. -> model, ema and the list of what was yielded (without the snapshot functions)."""
    model, ema = model or tiny_net(), ema or tiny_net(1)
    kw = dict(batch_size=8, warmup=2, seed=3, forget_loss=sgu.obtuse_loss) | kw
    log = [{k: v for k, v in row.items() if k != "snapshot"} for row in train(model, ema, SDES["VE"], tiny_data(), forget,
            steps=steps, **kw)]
    return model, ema, log


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


class Scalar(nn.Module):
    """The network F = 0.01 w, whose gradient is too small to be clipped: w.grad after a step is the gradient of the loss."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, noise):
        return 0.01 * self.w * torch.ones_like(x)


def check_alpha_one(train=sgu.train):
    plain, with_forget, below = (run_training(train, forget=f, alpha=alpha) for f, alpha in ((None, 1.), (tiny_data(1), 1.),
            (tiny_data(1), 0.9)))
    for i, name in enumerate(("model", "EMA")):
        assert same_weights(plain[i], with_forget[i]), \
            f"alpha = 1: the {name} differs from plain training; the forget data must not touch its random numbers"
        assert not same_weights(plain[i],
                below[i]), f"alpha = 0.9 leaves the {name} as plain training does: the forget loss is not used"
    assert [r["keep"] for r in plain[2]] == [r["keep"] for r in with_forget[2]]
    still = [[row["keep"] for row in run_training(train, forget=f, alpha=0.9, lr=0.)[2]] for f in (None, tiny_data(1))]
    assert still[0] == still[1], "the forget data must draw from random numbers of their own: the keep batches differ"


def check_training_mixes(train=sgu.train):
    """The gradient of a step is alpha times the keep loss's plus 1 - alpha times the forget loss's; the forget loss
    sees its window and data."""
    grads, seen, forget = {}, [], torch.full((4, 1, 2, 2), 0.25)
    for alpha in (1., 0.7):
        net = Scalar()
        def forget_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
            seen.append((x0, t, weighting))
            return 0.3 * net.w
        for row in train(net, copy.deepcopy(net), SDES["VP"], torch.rand(64, 1, 2, 2, generator=seeded()), forget, forget_loss,
                alpha, steps=1, window=(0.2, 0.4), seed=1):
            grads[alpha] = float(net.w.grad)
    keep = grads[1.]
    assert 1e-6 < abs(keep) < 0.9
    expect(grads[0.7], 0.7 * keep + 0.3 * 0.3, "gradient of a step at alpha = 0.7", 1e-5, {
        "alpha weighs the KEEP loss": 0.3 * keep + 0.7 * 0.3, "the forget loss must be weighted by 1 - alpha": 0.7 * keep + 0.3,
        "the forget loss is subtracted": 0.7 * keep - 0.3 * 0.3})
    assert len(seen) == 1 and torch.equal(seen[0][0], forget[:1].expand_as(seen[0][0])), \
        "the forget loss must see the forget data"
    assert 0.2 <= seen[0][1].min() and seen[0][1].max() <= 0.4 and seen[0][1].std() > 0.03, \
        "the forget loss must act in its window of t"


def check_resume(train=sgu.train, steps=6, stop=3):
    """Stopped, saved by torch.save, loaded with weights_only=True into other networks: the same result, bit for bit."""
    kw, file = dict(batch_size=8, warmup=2, seed=3, forget_loss=sgu.orthogonal_loss, alpha=0.8), io.BytesIO()
    data, forget = tiny_data(), tiny_data(1)
    model, ema, rest = tiny_net(), tiny_net(1), []
    for row in train(model, ema, SDES["VE"], data, forget, steps=steps, **kw):
        if row["step"] == stop:
            torch.save(row["snapshot"](), file)
        if row["step"] > stop:
            rest.append((row["step"], row["keep"], row["forget"]))
    again, ema_again, file = tiny_net(5), tiny_net(6), io.BytesIO(file.getvalue())
    state = torch.load(file, weights_only=True)
    resumed = [(r["step"], r["keep"], r["forget"]) for r in train(again, ema_again, SDES["VE"], data, forget, steps=steps,
            state=state, **kw)]
    assert resumed == rest, f"a resumed run gives other losses (step, keep, forget): {resumed[:2]}, uninterrupted {rest[:2]}"
    assert same_weights(model, again), "a resumed run ends at other weights: save the optimiser and the random numbers, too"
    assert same_weights(ema, ema_again), "a resumed run ends at another EMA"


def check_ema(train=sgu.train):
    """The EMA starts from the network's weights, not from its own, and follows with decay min(ema_decay, (1 + n)/(10 + n))."""
    for decay in (0.9999, 0.2):
        model, ema = tiny_net(), tiny_net(1)
        for p in ema.parameters():
            nn.init.constant_(p, 100.)
        want = [p.detach().to(F64).clone() for p in model.parameters()]
        for row in train(model, ema, SDES["VE"], tiny_data(), steps=4, batch_size=8, warmup=1, lr=1e-2, ema_decay=decay):
            d = min(decay, (1 + row["step"]) / (10 + row["step"]))
            want = [d * w + (1 - d) * p.detach().to(F64) for w, p in zip(want, model.parameters())]
        gap = max(float((p.detach() - 100).abs().min()) for p in ema.parameters())
        assert gap > 50, "the EMA remembers: restart it from the network's weights before fine-tuning"
        for w, p, q in zip(want, ema.parameters(), model.parameters()):
            expect(p, w, f"EMA after 4 steps at decay {decay}", 1e-5, {"there is no EMA: it copies the network": q})


def check_nonfinite(train=sgu.train):
    """A network that breaks at the third step and at high noise: the error names the loss, the step and such a time,
    and the weights stay finite."""
    class Breaks(Scalar):
        calls = 0
        def forward(self, x, noise):
            self.calls += 1
            out = super().forward(x, noise)
            return torch.where((noise * 4 > 0)[:, None, None, None], math.nan, out) if self.calls >= self.limit else out
    # With a forget loss there are two calls a step: call 5 is the keep loss of step 3, call 6 its forget loss.
    for limit, word in ((5, "keep"), (6, "forget")):
        net = Breaks()
        net.limit = limit
        with pytest.raises(FloatingPointError) as error:
            for _ in train(net, Scalar(), SDES["VE"], torch.rand(9, 1, 2, 2), torch.rand(9, 1, 2, 2), sgu.obtuse_loss, 0.5,
                    steps=5, batch_size=16, seed=0):
                pass
        message = str(error.value)
        assert word in message and re.search(r"step 3\b", message), f"the message must name the loss and the step: {message}"
        times = [float(v) for v in re.search(r"t = ([\d., ]+\d)", message).group(1).split(",")]
        sigma = SDES["VE"].marginal(torch.tensor(times))[1]
        assert (sigma > 0.99).all(), f"the message must name times at which the loss is not finite: {message}"
        assert torch.isfinite(net.w), "a step was taken on a non-finite loss"


def check_sample_times(sample_times=sgu.sample_times, sde=SDES["VE"], n=4000):
    """Even draws uniform in log sigma, odd ones normal around sigma = 1 cut to the window; stratified: even closer than random."""
    for window in ((0., 1.), (0.2, 0.7)):
        t = sample_times(sde, n, seeded(61), window=window).to(F64)
        lo_t, hi_t = max(window[0], sde.t_min), window[1]
        assert lo_t - 1e-6 <= t.min() and t.max() <= hi_t + 1e-6, "a time lies outside the window"
        a, s = sde.marginal(torch.cat([torch.tensor([lo_t, hi_t], dtype=F64), t]))
        log_sigma = (s / a).log()
        lo, hi = log_sigma[:2]
        phi = lambda v: torch.special.ndtr(v / 1.5)
        even, odd = log_sigma[2::2].sort()[0], log_sigma[3::2].sort()[0]
        rank = (torch.arange(n // 2) + 0.5) / (n // 2)
        off = [(v - rank).abs().max() for v in ((even - lo) / (hi - lo), (phi(odd) - phi(lo)) / (phi(hi) - phi(lo)))]
        assert max(off) < 0.036, \
            f"distance to the two laws: {[round(float(v), 3) for v in off]}"   # Kolmogorov: P = 0.01


def test_alpha_one_is_plain_training():
    check_alpha_one()


def test_training_mixes_losses():
    check_training_mixes()


def test_resume():
    check_resume()


def test_ema_restarts():
    check_ema()


def test_nonfinite_loss():
    check_nonfinite()


@ve_and_vp
def test_sample_times(sde):
    check_sample_times(sgu.sample_times, sde)


def test_training_is_seeded():
    a, b, c = (run_training(sgu.train, forget=tiny_data(1), alpha=0.9, seed=seed) for seed in (3, 3, 4))
    assert same_weights(a[0], b[0]) and same_weights(a[1], b[1]) and not same_weights(a[0], c[0])


def test_training_learns_a_gaussian():
    """Gaussian images under a linear network, 300 steps: the keep loss falls to the optimum 1 - s^2 tr(C_t^-1)/D, averaged over t."""
    torch.manual_seed(0)
    std, sde = 0.25, SDES["VP"]
    class Gain(nn.Module):                                     # F = w(noise) x with a table of 12 gains: contains the exact answer
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(13))
        def forward(self, x, noise):
            u = ((noise * 4 + 6) / 12 * 12).clamp(0, 11.999)
            i, f = u.long(), u - u.long()
            return sgu.expand(self.w[i] * (1 - f) + self.w[i + 1] * f, x) * x
    model, ema = Gain(), Gain()
    data = std * torch.randn(4000, 1, 2, 2, generator=seeded())
    for _ in sgu.train(model, ema, sde, data, steps=400, batch_size=256, lr=5e-2, ema_decay=0.95):
        pass
    t = torch.linspace(0.02, 1, 30)
    x = torch.ones(30, 1, 2, 2)
    a, s = (sgu.expand(v, x) for v in sde.marginal(t))
    with torch.no_grad():
        ratio = sgu.make_score(ema, sde)(x, t) / (-x / (a ** 2 * std ** 2 + s ** 2))
    assert (ratio - 1).abs().mean() < 0.05, f"learned score over exact score: {ratio[:, 0, 0, 0].tolist()}"
