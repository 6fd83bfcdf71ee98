"""Tests of sgu.py and toy_gmm.py: values against closed forms, differences or a second algorithm.

    python -m pytest -q        these and the notebooks'; no network, no data, under four minutes

Oracles and checks that exercises share are those of notebooks/exercises/checks.py, small runs those
of notebooks/testkit.py. Tolerances of random quantities are 4 to 5 standard errors, seeds fixed.
"""
import copy, functools, io, json, math, multiprocessing, os, pathlib, shlex, shutil, signal
import subprocess, sys, types
import numpy as np
import pytest
import torch
import torch.nn as nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "notebooks"))

from testkit import (
    NAMES, QUICK, Recorded, check_refused, command, copied, die_at, equal_weights, fingerprint,
    finished, forbid, narrow_gaussian, offline, results_of, same_weights, shaken_unet, small,
    tiny_presets, weights_of, write_mnist, write_npz, write_shapes)
import sgu
import toy_gmm as toy
from checks import (
    F64, GAUSS, SDES, TILTED, TOY, Mixture, check_bits_per_dim, check_ddpm_chain, check_denoise,
    check_ema, check_frechet, check_inpaint_conditional, check_inpaint_keeps, check_inpaint_walk,
    check_langevin, check_likelihood, check_loss_draws, check_make_score, check_noising,
    check_obtuse_sign, check_obtuse_turns, check_ode_map, check_orthogonal, check_reverse_step,
    check_sampler, check_schedule, check_score_matching_value, check_seeded, check_ve_marginal,
    check_vp_marginal, check_wilson, counting, expect, inner, loss_example, planted,
    score_of_one_image, seeded, tiny_data, tiny_net, uniform_score, with_moments)

every_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
ve_and_vp = pytest.mark.parametrize("sde", [SDES["VE"], SDES["VP"]], ids=["VE", "VP"])

# ==== 1. Schedules ================================================================================

@every_sde
def test_schedule(sde):
    check_schedule(sde)
    t = torch.cat([torch.arange(1, 11), torch.arange(20, 1001, 20)]).to(F64) / 1000   # on the chain
    for dtype, tol in ((F64, 1e-9), (torch.float32, 1e-5)):
        a, s = sde.marginal(t.to(dtype))
        expect(sde.sigma(t.to(dtype)), s / a, "sigma", 1e-12)
        expect(sde.time(s / a), t, f"time(s/a) against t in {dtype}", tol)
    expect(sde.at(0.3), [float(v) for v in sde.marginal(torch.tensor(0.3, dtype=F64))], "at", 1e-12)

def test_marginals_and_chain():
    check_ve_marginal()
    check_vp_marginal()
    check_ddpm_chain()
    check_ddpm_chain(sgu.DDPM(20, 0.01, 0.3).marginal, 20, 0.01, 0.3)
    ends = torch.tensor([0., 1.], dtype=F64)
    expect(sgu.VE().sigma(ends), [0.01, 50.], "the default ends of VE", 1e-6)
    expect(sgu.VP().beta(ends), [0.1, 20.], "the default ends of VP", 1e-6)
    assert [sde.t_min for sde in (sgu.VE(), sgu.VP(), sgu.DDPM(500))] == [0., 1e-4, 1 / 500]

@every_sde
def test_prior(sde, n=100_000):
    """n draws: the standard deviation has the relative standard error 0.0022."""
    std = 20. if isinstance(sde, sgu.VE) else 1.
    x = std * torch.randn(5, 3, 4, generator=seeded(), dtype=F64)
    want = torch.distributions.Normal(0., std).log_prob(x).sum((1, 2))
    expect(sde.prior_log_prob(x), want, "log of the prior", 1e-4)
    x = sde.prior_sample((n // 2, 2), seeded(3))
    expect(x.std() / std, 1., "the prior's standard deviation over s(1)", 0.01)
    expect(x.mean() / std, 0., "the prior's mean over s(1)", 0.015)

# ==== 2. Network ==================================================================================

@every_sde
def test_make_score(sde):
    check_make_score(sgu.make_score, sde)

def test_data_std_is_stated_once():
    """The network carries it; make_score and train take it from there unless told otherwise."""
    x, t, sde = torch.randn(3, 1, 8, 8, generator=seeded()), torch.full((3,), 0.5), SDES["VE"]
    net, bare = shaken_unet(data_std=1.5), lambda x, level: 0.3 * x
    score = sgu.make_score(net, sde)(x, t)
    expect(score, sgu.make_score(net, sde, 1.5)(x, t), "score by the network's own data_std", 1e-6)
    assert not torch.allclose(score, sgu.make_score(net, sde, 0.5)(x, t))
    half = sgu.make_score(bare, sde, 0.5)(x, t)
    expect(sgu.make_score(bare, sde)(x, t), half, "score of a network without data_std", 1e-6)
    assert sgu.UNet(**net.config).data_std == 1.5
    for wrong in (dict(precision="bf16"), dict(precision="float16"), dict(data_std=0.)):
        with pytest.raises(ValueError):
            sgu.make_score(net, sde, **wrong)

def test_weights_balance_the_network():
    """Weighted by balanced_weight, the squared error of e is that of F; its root (power 1/2) makes
    the slope of e, hence that of e.z, equally large at every noise level."""
    data_std = 0.7
    for sde in SDES.values():
        x0, t, z, f = loss_example(sde)
        a, s = (sgu.per_sample(v, x0) for v in sde.marginal(t))
        e = [-s * sgu.make_score(lambda x, level: out, sde, data_std)(a * x0 + s * z, t)
             for out in (f, torch.zeros_like(f))]
        gap = (e[0] - e[1]).square().mean((1, 2, 3)) / f.square().mean((1, 2, 3))
        expect(sgu.balanced_weight(sde, data_std)(t) * gap, [1.] * 3, "error of e over that of F")
        root = sgu.balanced_weight(sde, data_std, 0.5)(t)
        expect(root * gap.sqrt(), [1.] * 3, "slope of e over that of F")

def test_unet_depends_on_time_and_on_its_own_image_alone():
    net, x = shaken_unet(), torch.randn(4, 1, 8, 8, generator=seeded())
    level = torch.tensor([-1., -0.3, 0.2, 0.9])
    y = net(x, level)
    for i in range(4):
        alone = net(x[i:i + 1], level[i:i + 1])
        expect(alone, y[i:i + 1], "an image alone against in its batch", 1e-4)
    same = net(x[:1].expand(4, -1, -1, -1), level)
    gaps = torch.cdist(same.flatten(1), same.flatten(1)) + torch.eye(4)
    assert gaps.min() > 0.02 * same.norm() / 2, "the answer does not depend on the noise level"
    assert not sgu.UNet(channels=(8, 16))(x, level).any(), \
        "an untrained U-Net must answer 0, the Gaussian's score"

@pytest.mark.parametrize("kw", [dict(channels=(16, 32)),
                                dict(image_channels=3, channels=(16, 16, 32), blocks=2, patch=1),
                                dict(channels=(16, 32), blocks=(0, 2))], ids=str)
def test_every_parameter_learns(kw):
    """16 channels and more: in front of a norm with one channel a group a bias has no effect."""
    net = shaken_unet(**kw)
    x = torch.rand(4, kw.get("image_channels", 1), 8, 8, generator=seeded()) * 2 - 1
    score = sgu.make_score(net, SDES["VE"])
    sgu.score_matching_loss(score, SDES["VE"], x, generator=seeded()).backward()
    dead = [name for name, p in net.named_parameters()
            if p.grad is None or p.grad.abs().max() < 1e-8 or (p.grad == 0).float().mean() > 0.05]
    assert not dead, f"no gradient reaches (all of) {dead}"

def test_bfloat16_is_close_to_float32():
    """And its first convolution is exact: rounding a pixel near 1 would drown a noise of 0.003."""
    net, t = shaken_unet(), torch.linspace(0.05, 1, 16)
    x = torch.randn(16, 1, 8, 8, generator=seeded())
    x *= 1 + sgu.per_sample(SDES["VE"].marginal(t)[1], x)
    with torch.no_grad():
        full, half = (sgu.make_score(net, SDES["VE"], precision=p)(x, t)
                      for p in ("float32", "bfloat16"))
        bare = sgu.make_score(lambda x, level: 0 * x, SDES["VE"])(x, t)
    off = (half - full).flatten(1).norm(dim=1) / (full - bare).flatten(1).norm(dim=1)
    assert half.dtype == torch.float32 and 1e-5 < off.max() < 0.04, f"differs by {off.max():.2g}"
    seen, conv = [], next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    conv.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    x = 1 + 0.003 * torch.randn(4, 1, 8, 8, generator=seeded())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        net(x, torch.full((4,), -1.4))
    folded = nn.functional.pixel_unshuffle(x.to(F64), net.patch)
    want = nn.functional.conv2d(folded, conv.weight.to(F64), conv.bias.to(F64), padding=1)
    expect(seen[0], want, "features of the first convolution under bfloat16", 1e-5)

# ==== 3. Losses ===================================================================================

def check_weighting(loss, sde, power):
    """'noise', 'paper' and a function of t, image by image. power: of 1/s under the paper's
    lambda(t); a DDPM has the variational weight in its place."""
    x0, t, z, e = loss_example(sde)
    def one(i, weighting):
        row = slice(i, i + 1)
        score = planted(sde, e[row])
        return float(loss(score, sde, x0[row], t=t[row], z=z[row], weighting=weighting))
    want = sde.marginal(t)[1] ** -power
    if isinstance(sde, sgu.DDPM):              # beta_k^2 / (2 sigma_k^2 alpha_k (1 - abar_k))
        betas = np.linspace(1e-4, 0.02, 1000)
        k = (t * 1000).round().long().numpy() - 1
        abar = np.cumprod(1 - betas)[k]
        want = torch.tensor(betas[k] / (2 * (1 - betas[k]) * (1 - abar)))     # sigma_k^2 = beta_k
    ratio = torch.tensor([one(i, "paper") / one(i, "noise") for i in range(3)], dtype=F64)
    expect(ratio / want, [1.] * 3, "weight 'paper' over weight 'noise', over its formula")
    got = loss(planted(sde, e), sde, x0, t=t, z=z, weighting=lambda t: 3 * t)
    want = np.mean([3 * float(t[i]) * one(i, "noise") for i in range(3)])
    expect(got, want, "a weight given as a function of t", 1e-6)
    for typo in ("papre", "balanced", None):
        with pytest.raises(ValueError, match="weighting"):
            loss(planted(sde, e), sde, x0, t=t, z=z, weighting=typo)

@every_sde
def test_losses(sde):
    check_noising(sgu.score_matching_loss, sde)
    check_score_matching_value(sgu.score_matching_loss, sde)
    check_orthogonal(sgu.orthogonal_loss, sde)
    check_obtuse_sign(sgu.obtuse_loss, sde)
    check_obtuse_turns(sgu.obtuse_loss, sde)

def still(loss):
    """A loss that needs a reference, with one that stands still: e_ref = 1/4 whatever it sees."""
    def call(score, sde, *args, **kw):
        return loss(score, sde, *args, reference=planted(sde, torch.tensor(0.25)), **kw)
    return call

LOSSES = {"keep": (sgu.score_matching_loss, 0), "orthogonal": (sgu.orthogonal_loss, 2),
          "obtuse": (sgu.obtuse_loss, 0), "relative": (still(sgu.relative_loss), 0)}

@pytest.mark.parametrize("name", LOSSES)
def test_weights_and_draws(name):
    loss, power = LOSSES[name]
    for sde in SDES.values():
        check_weighting(loss, sde, power)
    for sde in (SDES["VE"], SDES["VP"], sgu.DDPM(n_steps=10)):
        check_loss_draws(loss, sde)

@every_sde
def test_relative_loss(sde):
    """e.(z - e_ref)/D, the reference asked at the same x_t and without a gradient; obtuse for 0."""
    x0, t, z, e = loss_example(sde)
    e_ref = torch.randn(e.shape, generator=seeded(8), dtype=F64).requires_grad_()
    asked, mine = [], []
    got = sgu.relative_loss(planted(sde, e.requires_grad_(), mine), sde, x0, t=t, z=z,
                            reference=planted(sde, e_ref, asked))
    expect(got, inner(e, z - e_ref).mean(), "relative loss", 1e-6)
    expect(asked[0][0], mine[0][0], "the noisy image given to the reference", 1e-12)
    expect(asked[0][1], t, "the time given to the reference", 1e-12)
    assert torch.autograd.grad(got, e_ref, allow_unused=True)[0] is None, "the reference is frozen"
    zero = sgu.relative_loss(planted(sde, e), sde, x0, t=t, z=z, reference=lambda x, t: 0 * x)
    expect(zero, sgu.obtuse_loss(planted(sde, e), sde, x0, t=t, z=z), "relative to 0", 1e-12)

# ==== 4. Samplers =================================================================================

@ve_and_vp
def test_time_grid(sde):
    for t_max in (1., 0.5):
        t = sgu.time_grid(sde, 20, t_max)
        assert t.dtype == F64 and (float(t[0]), float(t[-1])) == (t_max, sde.t_min), \
            "the grid runs from t_max to t_min exactly, in float64"
        gaps = (sde.sigma(t) ** (1 / 7)).diff()
        expect(gaps / gaps.mean(), torch.ones(20), "steps in sigma^(1/7) over their mean", 1e-6)

@every_sde
def test_steps(sde):
    check_denoise(sgu.denoise, sde)
    check_langevin(sgu.langevin_step, sde)
    if not isinstance(sde, sgu.DDPM):                                # beta jumps in a step
        check_reverse_step(sgu.reverse_step, sde)

@every_sde
def test_add_noise(sde, n=100_000):
    """From a clean image, and from t = 0.2 on to 0.6, it is the forward process."""
    (a1, s1), (a2, s2), one = sde.at(0.2), sde.at(0.6), torch.ones(n, 1)
    x1 = sgu.add_noise(sde, one, 0.2, seeded(1))
    x2 = sgu.add_noise(sde, x1, 0.6, seeded(2), start=0.2)
    for x, a, s in ((x1, a1, s1), (x2, a2, s2)):
        expect(x.mean() / s, a / s, "mean of the noised image over s", 5 / math.sqrt(n))
        expect(x.std() / s, 1., "its spread over s", 5 / math.sqrt(2 * n))
    both = torch.corrcoef(torch.cat([x1, x2], dim=1).T)[0, 1]
    expect(both, a2 / a1 * s1 / s2, "correlation of the noise at the two times", 5 / math.sqrt(n))
    check_seeded(lambda g: sgu.add_noise(sde, one[:5], 0.6, g, start=0.2))

@every_sde
@pytest.mark.parametrize("name, kw", [("em", {}), ("pc", {}), ("ode", dict(steps=50)),
                                      ("ancestral", dict(steps=200)),
                                      ("multistep", dict(steps=50))])
def test_samplers(name, kw, sde):
    sampler = sgu.SAMPLERS[name]
    check_sampler(sampler, sde, **kw)
    check_seeded(lambda g: sampler(TILTED.score(sde), sde, (5, 2), steps=4, generator=g))
    x = sampler(score_of_one_image(sde), sde, (500, 2), steps=20, generator=seeded())
    expect(x, torch.full((500, 2), 0.5), "samples of one image: the last step is the mean", 1e-4)

@every_sde
def test_samplers_ask_where_they_stand(sde):
    """Every step asks the score once, at the time at which x stands, and the corrector at the end
    of the predictor's step; the last evaluation is at the end of the grid."""
    grid = sgu.time_grid(sde, 5).tolist()
    for name, sampler in sgu.SAMPLERS.items():
        calls = []
        sampler(counting(TILTED.score(sde), calls), sde, (2, 2), steps=5, generator=seeded())
        want = grid
        if name == "pc":
            want = [t for step in zip(grid, grid[1:]) for t in step] + grid[-1:]
        if name == "ancestral" and isinstance(sde, sgu.DDPM):        # steps of the chain, down to 0
            want = [1., 0.8, 0.6, 0.4, 0.2]
        expect(torch.tensor(calls), want, f"times at which {name} asks", 1e-6)
    chain, calls = sgu.DDPM(40), []
    sgu.ancestral_sample(counting(TILTED.score(chain), calls), chain, (2, 2), steps=None)
    expect(torch.tensor(calls) * 40, torch.arange(40, 0, -1), "all steps of a chain", 1e-4)
    with pytest.raises(ValueError, match="40"):
        sgu.ancestral_sample(TILTED.score(chain), chain, (2, 2), steps=41)

@every_sde
def test_ode_map(sde):
    """And it is of second order: twice the steps, at most a third of the error."""
    check_ode_map(sgu.ode_sample, sde)
    coarse, fine = (check_ode_map(sgu.ode_sample, sde, n, 0.02) for n in (60, 120))
    assert fine < coarse / 3, (coarse, fine)

@every_sde
def test_ancestral_step(sde, n=100_000):
    """For data that are one image, x_t given x_{t_next} is Gaussian and Bayes' rule says what
    x_{t_next} given x_t is: one long step must draw from that."""
    image, point = torch.tensor([0.5, -0.25]), torch.tensor([1.5, -1.])
    t, t_next = torch.tensor([0.6, 0.4], dtype=F64)
    (a, s), (a_next, s_next) = sde.at(t), sde.at(t_next)
    def score(x, t):
        return -(x - a * image) / s ** 2
    along = a / a_next                        # x_t = along x_{t_next} + noise of this variance
    noise = s ** 2 - (along * s_next) ** 2
    precision = 1 / s_next ** 2 + along ** 2 / noise
    mean = (a_next * image / s_next ** 2 + along * point / noise) / precision
    std = precision ** -0.5
    for step in (sgu.ancestral_step, lambda *args: sgu.multistep(True)(*args)):
        x = step(score, sde, point.expand(n, 2), t, t_next, seeded(12))
        expect((x.mean(0) - mean) / std, [0., 0.], "mean of a step, in std", 5 / math.sqrt(n))
        expect(x.std(0) / std, [1., 1.], "std of a step over the exact one", 5 / math.sqrt(2 * n), {
            "this is beta, the larger of a DDPM's two variances":
                [math.sqrt(noise) / along / std] * 2})
        check_seeded(lambda g: step(score, sde, point.expand(5, 2), t, t_next, g))

# ==== 5. Likelihood ===============================================================================

@pytest.mark.parametrize("sde, mismatch", [(SDES["VP"], 0.006), (SDES["VE"], 0.012),
                                           (SDES["DDPM"], 0.006)], ids=["VP", "VE", "DDPM"])
def test_likelihood(sde, mismatch):
    check_likelihood(sgu.log_likelihood, sde, mismatch)

@every_sde
@pytest.mark.parametrize("mixture", [TOY, TILTED, GAUSS], ids=["toy", "tilted", "gauss"])
def test_default_accuracy_of_the_likelihood(mixture, sde):
    """On smooth mixtures, beyond what the prior's mismatch costs: 256 points in float64."""
    x, score = mixture.sample(256, seeded(22)).double(), mixture.score(sde)
    fine = sgu.log_likelihood(score, sde, x, steps=256, exact=True)
    got, error = sgu.log_likelihood(score, sde, x, exact=True, error=True)
    off = (got - fine).abs()
    assert off.mean() < 2e-3 and off.max() < 0.03, (float(off.mean()), float(off.max()))
    assert error.shape == (256,) and off.mean() / 5 < error.mean() < 10 * off.mean() + 1e-9

@every_sde
@pytest.mark.parametrize("std", [0.01, 0.02, 0.1])
def test_error_estimate_of_the_likelihood(sde, std):
    """Within a factor of 5 of the true error while steps are too long and when they are short
    enough. (One probe is exact here.)"""
    (score, exact), seen = narrow_gaussian(sde, std), []
    x = std * torch.randn(5, 3, generator=seeded(24), dtype=F64)
    for steps in (8, 15, 32, 64, 128):
        got, error = sgu.log_likelihood(score, sde, x, steps=steps, error=True)
        off = (got - exact(x)).abs()
        seen.append((steps, float(off.mean()), float(error.mean())))
        assert off.mean() / 5 < error.mean() < 5 * off.mean(), seen
    assert seen[0][1] > 5e-3 and seen[-1][1] < 1e-5, seen

def test_hutchinson(sde=SDES["VP"], repeats=50):
    """Random signs against the exact trace on the same coarse grid: unbiased, and four probes have
    half the error of one."""
    x, score, spread = TILTED.sample(6, seeded(22)), TILTED.score(sde), {}
    exact = sgu.log_likelihood(score, sde, x, steps=4, exact=True)
    for probes in (1, 4):
        draws = torch.stack([sgu.log_likelihood(score, sde, x, steps=4, probes=probes,
                                                generator=seeded(i)) for i in range(repeats)])
        spread[probes] = draws.std(0)
        off = (draws.mean(0) - exact).abs() / (draws.std(0) / math.sqrt(repeats))
        assert (spread[probes] > 1e-3).all(), "the signs do not depend on the generator"
        assert (off < 4.5).all(), f"{probes} probes: {off.max():.1f} standard errors off"
    ratio = (spread[1].square().mean() / spread[4].square().mean()).sqrt()
    assert 1.5 < ratio < 2.7, f"four probes must halve the standard error; it fell by {ratio:.2f}"

@every_sde
def test_likelihood_alone(sde):
    """A sample's value depends neither on its batch nor on its place there, random signs too."""
    x, other, score = TILTED.sample(6, seeded(23)), 30 * torch.ones(3, 2), TILTED.score(sde)
    for kw in (dict(exact=True), dict(probes=2)):
        def run(x):
            return sgu.log_likelihood(score, sde, x, steps=6, generator=seeded(9), **kw)
        whole = run(x)
        expect(torch.cat([run(x[i:i + 1]) for i in range(6)]), whole, f"samples alone, {kw}")
        expect(run(x.flip(0)).flip(0), whole, f"samples in reverse order, {kw}")
        expect(run(torch.cat([other, x]))[3:], whole, f"beside very different samples, {kw}")
    check_seeded(lambda g: sgu.log_likelihood(score, sde, x[:3], steps=3, generator=g))

def test_bits_per_dim():
    check_bits_per_dim()
    check_bits_per_dim(sde=SDES["DDPM"], tol=0.08)                   # more blur

def test_bits_per_dim_dequantises():
    """Under pixels of N(m, v) narrow beside a level's cell, the place in the cell decides: the mean
    of (y - m)^2/(2 v) over the cell, not its value in the middle. n = 20,000 pixels."""
    sde, v, width = SDES["VP"], 0.004 ** 2, 1 / 128
    middle = sgu.from_levels(torch.tensor(200.))
    def score(x, t):
        a, s = (sgu.per_sample(r, x) for r in sde.marginal(t))
        return -(x - a * middle) / (v * a ** 2 + s ** 2)
    x = middle.expand(50, 1, 20, 20)
    got = sgu.bits_per_dim(score, sde, x, steps=64, generator=seeded()).mean()
    var = v + sde.at(sde.t_min)[1] ** 2
    nats = width ** 2 / 12 / (2 * var) + math.log(2 * math.pi * var) / 2
    expect(got, nats / math.log(2) + 7, "bits/dim of a narrow Gaussian", 0.01, {
        "pixels stay in the middle of their cells": math.log2(2 * math.pi * var) / 2 + 7})
    check_seeded(lambda g: sgu.bits_per_dim(score, sde, x[:3], steps=2, generator=g))

def test_dequantise():
    """Level k becomes uniform on [2k/256 - 1, 2(k + 1)/256 - 1): n = 256 x 2,000."""
    levels = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 2000)
    u = (sgu.dequantise(levels, seeded()).to(F64) + 1) * 128 - levels
    assert u.min() >= -1e-4 and u.max() <= 1 + 1e-4, "level k must stay in its own cell"
    expect(u.mean(), 0.5, "mean place in the cell", 0.002)
    expect(u.var(), 1 / 12, "variance of the place in the cell", 0.001)
    check_seeded(lambda g: sgu.dequantise(levels[:, :5], g))
    back = sgu.to_levels(sgu.from_levels(levels))
    assert torch.equal(back, levels) and back.dtype == torch.uint8
    assert sgu.to_levels(torch.tensor([-3., 3.])).tolist() == [0, 255]
    with pytest.raises(FloatingPointError, match="NaN"):
        sgu.to_levels(torch.tensor([0.5, math.nan]))

def test_likelihoods_of_what_is_no_image_are_refused():
    """NaN would be scored as black, no probe would give a number without a divergence."""
    sde = SDES["VP"]
    for x in (torch.full((1, 1, 2, 2), 1.5), torch.full((1, 1, 2, 2), math.nan),
              torch.zeros(1, 1, 2, 2, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"\[-1, 1\]"):
            sgu.bits_per_dim(uniform_score(sde), sde, x)
    x = torch.zeros(2, 2)
    for kw in (dict(probes=0), dict(steps=0), dict(probes=-1)):
        with pytest.raises(ValueError):
            sgu.log_likelihood(TOY.score(sde), sde, x, **kw)
    for x in (x * math.nan, x.byte()):
        with pytest.raises(ValueError, match="NaN"):
            sgu.log_likelihood(TOY.score(sde), sde, x)
    for kw in (dict(x0=x), dict(t=torch.ones(2, 1))):
        with pytest.raises(ValueError, match="losses take"):
            sgu.obtuse_loss(TOY.score(sde), sde, **(dict(x0=torch.zeros(2, 2)) | kw))

# ==== 6. Inpainting and reconstruction ============================================================

@every_sde
def test_inpaint_keeps_known_and_never_reads_hidden(sde):
    check_inpaint_keeps(sgu.inpaint, sde)

@ve_and_vp
def test_inpaint(sde):
    check_inpaint_conditional(sgu.inpaint, sde)
    check_inpaint_walk(sgu.inpaint, sde)
    with pytest.raises(ValueError, match="repeats"):
        sgu.inpaint(uniform_score(sde), sde, torch.zeros(1, 1, 2, 2), torch.ones(1), repeats=0)

@ve_and_vp
@pytest.mark.parametrize("steps, repeats", [(200, 1), (200, 4)])
def test_inpainting_stays_on_the_forward_law(sde, steps, repeats, n=4000):
    """Whenever the score is asked at t, hidden pixels of N(0, 1/4) data have the variance
    a^2/4 + s^2 and known ones, however far off the model wants them, are a x + s z: going up adds
    the right noise. n pixels of each; 5 standard errors + 2.5% for the steps."""
    x, off = torch.full((1, 1, 2, n), 0.8), []
    mask = torch.tensor([1., 0.]).reshape(1, 1, 2, 1)
    def score(x, t):
        a, s = sde.at(t[0].double())
        hidden, z = x[0, 0, 1].double(), (x[0, 0, 0].double() - 0.8 * a) / s
        off.append([hidden.var() / (a ** 2 / 4 + s ** 2) - 1, z.mean(), z.var() - 1])
        mean = torch.tensor([-3., 0.]).reshape(1, 1, 2, 1)           # far from the known pixels
        return -(x - a * mean) / (a ** 2 / 4 + s ** 2)
    sgu.inpaint(score, sde, x, mask, steps=steps, repeats=repeats, generator=seeded(3))
    off = torch.tensor(off).abs().amax(0)
    assert off[0] < 0.025 + 5 * math.sqrt(2 / n), f"variance of hidden pixels off by {off[0]:.3f}"
    assert off[1] < 5 / math.sqrt(n) and off[2] < 5 * math.sqrt(2 / n), f"known pixels: {off}"

def test_inpainting_pins_after_every_move(monkeypatch, sde=SDES["VP"]):
    """Known pixels get new noise wherever a step or going up has led to."""
    moves, add_noise, image = [], sgu.add_noise, torch.zeros(1, 1, 2, 2)
    def watched(sde, x, t, generator, start=None):
        moves.append((float(t), "pin" if start is None else "up"))
        return add_noise(sde, x, t, generator, start)
    monkeypatch.setattr(sgu, "add_noise", watched)
    sgu.inpaint(lambda x, t: -x, sde, image, image, steps=2, repeats=2, generator=seeded())
    a, b, c = sgu.time_grid(sde, 2).tolist()
    assert moves == [(a, "pin"), (b, "pin"), (a, "up"), (a, "pin"), (b, "pin"),
                     (c, "pin"), (b, "up"), (b, "pin"), (c, "pin")]

@every_sde
def test_reconstruct(sde, n=10_000):
    """At t -> 0 x comes back; from a larger t the exact score gives other samples of the same law,
    without any noise left."""
    x, score = TILTED.sample(n, seeded(51)), TILTED.score(sde)
    assert torch.equal(sgu.reconstruct(score, sde, x[:5], t=0., generator=seeded()), x[:5])
    for t in (sde.t_min * 1.5 + 1e-3, 0.02):
        a, s = sde.at(t)
        gap = (sgu.reconstruct(score, sde, x, t=t, generator=seeded()) - x).square().mean().sqrt()
        assert gap < 2 * s / a, f"from t = {t:.3g}, noise {s / a:.3g}, x comes back {gap:.3g} away"
    y = sgu.reconstruct(score, sde, x, t=0.6, steps=100, generator=seeded(52))
    TILTED.expect_samples(y, "reconstruction from t = 0.6")
    assert (y - x).square().mean().sqrt() > 0.3, "from t = 0.6 nothing was noised"
    one = torch.full((50, 2), 0.5)
    back = sgu.reconstruct(score_of_one_image(sde), sde, one, t=0.3, steps=10, generator=seeded())
    expect(back, one, "reconstruction of the only image: it ends at the mean, without noise", 1e-4)
    calls = []
    sgu.reconstruct(counting(score, calls), sde, x[:5], t=0.3, steps=4, generator=seeded())
    expect(torch.tensor(calls), sgu.time_grid(sde, 4, 0.3), "times of a reconstruction", 1e-6)
    check_seeded(lambda g: sgu.reconstruct(score, sde, x[:5], t=0.3, steps=3, generator=g))
    for t in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="t in"):
            sgu.reconstruct(score, sde, x[:5], t=t)

# ==== 7. Training =================================================================================

def run_training(forget=None, loss=None, alpha=None, steps=4, nets=(0, 1), **kw):
    """Train a tiny U-Net. -> model, its average and the list of what was yielded."""
    model, ema = map(tiny_net, nets)
    kw = dict(batch_size=8, seed=3) | kw
    return model, ema, list(sgu.train(model, ema, SDES["VE"], tiny_data(), forget, loss, alpha,
                                      steps=steps, **kw))

class Scalar(nn.Module):
    """The network F = 0.01 w, whose gradient is too small to be clipped."""
    def __init__(self):
        super().__init__()
        self.w, self.calls, self.halved = nn.Parameter(torch.tensor(0.5)), 0, False

    def forward(self, x, level):
        self.calls += 1
        self.halved = torch.is_autocast_enabled("cpu")
        return 0.01 * self.w * torch.ones_like(x)

OK = torch.rand(9, 1, 2, 2, generator=seeded())

def train_scalar(net, loss, alpha=0.5, steps=1, keep=OK, forget=OK, **kw):
    """Train a Scalar. -> the list of what was yielded"""
    return list(sgu.train(net, Scalar(), SDES["VE"], keep, forget, loss, alpha, steps=steps, **kw))

def pushing(net, slopes, seen=None):
    """A forget loss that does not ask the score: in step i its gradient in net.w is slopes[i]. seen
    gets what train hands to it, (x0, t, weighting, generator)."""
    left = list(slopes)
    def push(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
        if seen is not None:
            seen.append((x0, t, weighting, generator))
        return left.pop(0) * net.w
    return push

@ve_and_vp
def test_sample_times(sde, n=4000):
    """log sigma is normal, every k-th uniform, within a window in sigma; None: t is uniform. Draws
    are stratified, hence closer than random ones: Kolmogorov's distance, P(> 1.6) = 0.01."""
    for window in ((0., math.inf), (0.2, 3.), (0.5, 1e9)):
        for law in (None, (0., 1.5, 2), (-1.2, 1.2, 32), (0.5, 0.8, 5)):
            t = sgu.sample_times(sde, n, seeded(61), window=window, noise_law=law).to(F64)
            ends = sde.sigma(torch.tensor([sde.t_min, 1.], dtype=F64)).tolist()
            lo, hi, sigma = max(window[0], ends[0]), min(window[1], ends[1]), sde.sigma(t)
            assert lo * (1 - 1e-4) <= sigma.min() and sigma.max() <= hi * (1 + 1e-4), window
            if law is None:
                t_lo, t_hi = sde.time(torch.tensor([lo, hi], dtype=F64))
                cdf = (t - t_lo) / (t_hi - t_lo)
            else:
                even, k = (sigma.log() - math.log(lo)) / math.log(hi / lo), law[2]
                normal = torch.distributions.Normal(*law[:2])
                p = normal.cdf(torch.tensor([lo, hi]).log())
                cdf = even / k + (1 - 1 / k) * (normal.cdf(sigma.log()) - p[0]) / (p[1] - p[0])
            off = (cdf.sort()[0] - (torch.arange(n) + 0.5) / n).abs().max() * n ** 0.5
            assert off < 1.6, f"window {window}, law {law}: distance {off:.2f}"
    with pytest.raises(ValueError, match="window"):
        sgu.sample_times(sde, 4, window=(1e4, 1e5))

def test_a_batch_of_one_meets_the_noise_law(n=2000):
    """Which draw is the uniform one changes, so that small batches see both laws; a chain trains at
    its own times. 5 standard errors."""
    g, sde = seeded(5), SDES["VE"]
    t = torch.cat([sgu.sample_times(sde, 1, g, noise_law=(0., 0.1, 2)) for _ in range(n)])
    near = float((sde.sigma(t).log().abs() < 0.5).float().mean())
    assert abs(near - (0.5 + 0.5 / math.log(2000))) < 5 * 0.5 / math.sqrt(n), near
    k = sgu.sample_times(SDES["DDPM"], n, g).double() * 1000
    assert (k - k.round()).abs().max() < 1e-3

def test_training_is_seeded_and_keep_batches_are_those_of_plain_training():
    """The forget data draw from random numbers of their own."""
    keeps = [[row["keep"] for row in run_training(*forgetting, lr=0.)[2]]
             for forgetting in ((), (tiny_data(1), sgu.obtuse_loss, 0.5))]
    assert keeps[0] == keeps[1]
    a, b, c = (run_training(tiny_data(1), sgu.obtuse_loss, 0.9, seed=seed) for seed in (3, 3, 4))
    assert same_weights(a[0], b[0]) and same_weights(a[1], b[1]) and not same_weights(a[0], c[0])

def test_a_step_of_training(monkeypatch):
    """Eq. 11's gradient; each loss sees its own data, dequantised, with its balanced weight, at its
    times: the forget loss at those of its window alone, the keep loss at all."""
    forget, kept, grads = torch.full((4, 1, 2, 2), 200, dtype=torch.uint8), [], []
    data, keep_loss = torch.full((64, 1, 2, 2), 20, dtype=torch.uint8), sgu.score_matching_loss
    def watched(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
        kept.append((x0, t, weighting, generator))
        return keep_loss(score, sde, x0, t, z, weighting, generator)
    monkeypatch.setattr(sgu, "score_matching_loss", watched)
    for alpha in (None, 0.7):
        net, seen = Scalar(), []
        args = dict(loss=None, forget=None) if alpha is None else dict(
            loss=pushing(net, [0.3], seen), forget=forget)
        row, = train_scalar(net, keep=data, alpha=alpha, batch_size=256, window=(0.5, 2.),
                            data_std=0.8, seed=1, **args)
        grads.append(float(net.w.grad))
    assert row["forget"] == pytest.approx(0.3 * 0.5) and row["keep"] > 0
    expect(grads[1], 0.7 * grads[0] + 0.3 * 0.3, "gradient of a step at alpha = 0.7", 1e-5, {
        "alpha weighs the KEEP loss": 0.3 * grads[0] + 0.7 * 0.3,
        "the forget loss is not weighted": 0.7 * grads[0] + 0.3})
    for (x0, t, weight, g), level, power in ((kept[1], 20, 1.), (seen[0], 200, 0.5)):
        cell, sigma = (x0 + 1) * 128 - level, SDES["VE"].sigma(t)
        assert 0 <= cell.min() < 0.05 and 0.95 < cell.max() <= 1, "images are not dequantised"
        expect(weight(t), (1 + (sigma / 0.8) ** 2) ** power, f"weight of power {power}")
        in_window = 0.5 <= sigma.min() and sigma.max() <= 2
        assert in_window if level == 200 else sigma.min() < 0.1 and sigma.max() > 6
    assert seen[0][3] is not kept[1][3] and len(seen) == 1 and len(kept) == 2

@pytest.mark.parametrize("recipe, weights", [
    (sgu.RECIPES["paper"], ("paper", "paper")), (sgu.Recipe(None, "noise"), ("noise", "noise")),
    (sgu.Recipe(None, (abs, "paper"), "bfloat16"), (abs, "paper"))], ids=["paper", "noise", "pair"])
def test_recipes(recipe, weights, monkeypatch):
    """Weights by name, or a pair of them, or functions of t; without a noise law t is uniform; the
    network is asked in the recipe's precision."""
    net, seen, kept = Scalar(), [], []
    monkeypatch.setattr(sgu, "score_matching_loss", pushing(net, [1.], kept))
    row, = train_scalar(net, pushing(net, [1.], seen), batch_size=500, recipe=recipe)
    assert (kept[0][2], seen[0][2]) == weights
    for (_, t, _, _) in (*kept, *seen):
        even = (torch.arange(500) + 0.5) / 500
        assert (t.sort()[0] - even).abs().max() < 0.01, "t is not uniform"
    sgu.make_score(net, SDES["VE"], precision=recipe.precision)(OK, torch.full((9,), 0.5))
    assert net.halved == (recipe.precision == "bfloat16")

def test_backward_of_ones_own():
    """It gets the network, both losses and alpha, and alone fills the gradients."""
    net, got = Scalar(), []
    def backward(model, keep_loss, forget_loss, alpha):
        got.append((model, keep_loss.item(), forget_loss.item(), alpha))
        model.w.grad = torch.tensor(0.125)
    row, = train_scalar(net, pushing(net, [3.]), 0.25, backward=backward)
    assert float(net.w.grad) == 0.125
    assert got == [(net, row["keep"], row["forget"], 0.25)] and got[0][2] == 1.5

def test_adam_by_hand(steps=60, lr=0.01):
    """w follows Adam with betas 0.9 and 0.99 on gradients clipped to norm 1, at a rate that warms
    up over 5% of the steps and decays like a cosine to 0."""
    slopes = [300., 0.02, -0.5, 0.3, 5., -0.1, *torch.randn(54, generator=seeded(3)).tolist()]
    net, path, want, w, m, v = Scalar(), [], [], 0.5, 0., 0.
    for row in sgu.train(net, Scalar(), SDES["VE"], OK, OK, pushing(net, slopes), 0., steps=steps,
                         lr=lr):
        path.append(float(net.w.detach()))
    for n, slope in enumerate(slopes):
        grad = max(-1., min(1., slope))
        m, v = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad ** 2
        rate = lr * min((n + 1) / (1 + 0.05 * steps), 1) * (1 + math.cos(math.pi * n / steps)) / 2
        w -= rate * m / (1 - 0.9 ** (n + 1)) / (math.sqrt(v / (1 - 0.99 ** (n + 1))) + 1e-8)
        want.append(w)
    expect(torch.tensor(path), want, "w after every step", 1e-4)

class Three(nn.Module):
    """Three convolutions, of which the middle one is inner, and a batch norm."""
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.inner, self.last = (nn.Conv2d(c, d, 3, padding=1)
                                             for c, d in ((1, 6), (6, 4), (4, 1)))
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x, level):
        return self.last(self.inner(self.norm(self.first(x))))

def test_muon_by_svd(lr=0.01):
    """Two steps of an inner convolution: U V^T of the Nesterov momentum, singular values near 1,
    times 0.2 sqrt(54) lr; of the others Adam's, lr along every sign. The average takes the buffers
    of the batch norm along."""
    net, ema, before = Three(), Three(1), Three()
    rows = torch.randn(2, 4, 6, 3, 3, generator=seeded(1)) * 0.01
    momenta = [0.05 * rows[0] + 0.95 * 0.05 * rows[0],
               0.05 * rows[1] + 0.95 * (0.95 * 0.05 * rows[0] + 0.05 * rows[1])]
    left, data = list(rows), torch.rand(9, 1, 4, 4)
    def pull(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
        return (left.pop(0) * net.inner.weight).sum() + 1e-3 * net.last.weight.sum()
    for row in sgu.train(net, ema, SDES["VE"], data, data, pull, 0., steps=2, lr=lr):
        rate = lr * (1, 0.5)[row["step"] - 1]
        u, _, vh = torch.linalg.svd(momenta[row["step"] - 1].flatten(1), full_matrices=False)
        moved = (before.inner.weight - net.inner.weight).detach().flatten(1)
        moved = moved / (0.2 * math.sqrt(54) * rate)
        values = (u.T @ moved @ vh.T).diagonal()
        assert ((values > 0.6) & (values < 1.3)).all(), f"singular values {values.tolist()}"
        assert (moved - u @ values.diag() @ vh).norm() < 0.02, "not the momentum's axes"
        moved = (before.last.weight - net.last.weight).detach()
        expect(moved, torch.full_like(moved, rate), "Adam's step of the last convolution", 1e-4)
        before = copy.deepcopy(net)
    assert net.norm.running_mean.any() and net.norm.num_batches_tracked > 0
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), ema.buffers())), "not the buffers"

def test_resume(steps=6, stop=3):
    """Stopped, saved by torch.save, loaded with weights_only=True into other networks: the same
    result, bit for bit; a snapshot does not change while training goes on."""
    args, rest, files = (tiny_data(1), sgu.orthogonal_loss, 0.8), [], [io.BytesIO(), io.BytesIO()]
    model, ema = tiny_net(), tiny_net(1)
    for row in sgu.train(model, ema, SDES["VE"], tiny_data(), *args, steps=steps, batch_size=8,
                         seed=3):
        if row["step"] == stop:
            kept = row["snapshot"]()
            torch.save(kept, files[0])
        if row["step"] > stop:
            rest.append((row["step"], row["keep"], row["forget"]))
    torch.save(kept, files[1])
    _, ema_again, log = run_training(*args, steps, (5, 6), state=row["snapshot"]())
    assert not log and same_weights(ema, ema_again), "a finished training has its average"
    pytest.raises(ValueError, run_training, *args, 9, state=row["snapshot"]())     # KeyError: no
    for file in files:
        state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        again, ema_again, log = run_training(*args, steps, (5, 6), state=state)
        assert [(r["step"], r["keep"], r["forget"]) for r in log] == rest, "other losses"
        assert same_weights(model, again), "other weights: the optimiser or the random numbers"
        assert same_weights(ema, ema_again), "another average"

def test_average():
    """Its warm-up, its decay late in a long training, and the score that training hands out: the
    average's, with the data_std of training."""
    check_ema()
    model, ema = tiny_net(), tiny_net()
    args, kw = (model, ema, SDES["VE"], tiny_data()), dict(steps=30_000, batch_size=8, lr=1.)
    state = next(sgu.train(*args, **kw))["snapshot"]() | dict(step=20_000)    # its warm-up is over
    before = [p.detach().clone() for p in ema.parameters()]
    next(sgu.train(*args, **kw, state=state))
    for w, p, q in zip(before, ema.parameters(), model.parameters()):
        expect(p, 0.999 * w + 0.001 * q, "average after a late step", 1e-6)
    model, ema, log = run_training(steps=3, lr=0.05, data_std=1.5)
    x, t = torch.randn(2, 1, 8, 8, generator=seeded()), torch.tensor([0.3, 0.8])
    want, live = (sgu.make_score(net, SDES["VE"], 1.5)(x, t) for net in (ema, model))
    got = log[-1]["score"](x, t)
    expect(got, want, "the score handed out", 1e-6)
    assert not torch.allclose(got, live, rtol=1e-3)
    row = next(sgu.train(model, None, *args[2:], steps=1, batch_size=8, data_std=1.5))
    expect(row["score"](x, t), sgu.make_score(model, SDES["VE"], 1.5)(x, t), "without an average")

@pytest.mark.parametrize("limit", [5, 6, None])
def test_nonfinite(limit):
    """A network that breaks at the third step (of two calls each), or a loss that is finite where
    its slope is not (the root of 0): the error names the step, which is not taken."""
    class Breaks(Scalar):
        def forward(self, x, level):
            out = super().forward(x, level)
            return out * math.nan if limit and self.calls >= limit else out
    net = Breaks()
    def root(*args, **kw):
        return (0 * net.w).sqrt()
    with pytest.raises(FloatingPointError, match=rf"step {3 if limit else 1}\b"):
        train_scalar(net, sgu.obtuse_loss if limit else root, steps=5)
    assert torch.isfinite(net.w), "a step was taken"

@pytest.mark.parametrize("change", [
    dict(loss=None), dict(forget=None), dict(alpha=None), *(dict(keep=keep) for keep in (
        (OK * 255).long(), OK > 0.5, OK * math.nan, OK[:0])), dict(forget=OK * math.nan),
    *(dict(alpha=alpha) for alpha in (1., 1.5, -0.1, math.nan)), dict(forget=(OK * 255).int()),
    *(dict(window=window) for window in ((3., 0.2), (1., 1.), (math.nan, 1.))),
    dict(recipe=sgu.Recipe(weighting="papre")), dict(recipe=sgu.Recipe(precision="half")),
    dict(steps=0), dict(data_std=0.)], ids=lambda d: " ".join(d))
def test_training_refuses_what_was_not_meant(change):
    net = Scalar()
    with pytest.raises(ValueError):
        train_scalar(net, **(dict(loss=sgu.obtuse_loss) | change))
    assert net.w.item() == 0.5, "a step was taken first"

def test_loss_with_another_signature_is_named():
    def only_scores(score, sde, x0):
        return score(x0, torch.ones(len(x0))).mean()
    for loss, word in ((only_scores, "only_scores"), (sgu.relative_loss, "relative_loss")):
        with pytest.raises(TypeError, match=word):
            train_scalar(Scalar(), loss)

def test_unusual_surroundings():
    """float64 images for a float32 network, float64 as the default type, inference_mode: right
    numbers."""
    x, sde = torch.rand(3, 1, 8, 8, generator=seeded(), dtype=F64), SDES["VE"]
    def check(x, net=tiny_net()):
        score = sgu.make_score(net, sde)
        got = sgu.log_likelihood(score, sde, x, steps=2, generator=seeded())
        y = sgu.ode_sample(score, sde, (2, 1, 8, 8), steps=2, generator=seeded())
        assert got.dtype == F64 and torch.isfinite(got).all() and torch.isfinite(y).all()
        return got
    want = check(x.float())
    expect(check(x), want, "log-likelihood of float64 images", 1e-3)
    with torch.inference_mode():
        expect(check(x.float()), want, "log-likelihood in inference_mode", 1e-6)
    list(sgu.train(tiny_net(), tiny_net(), sde, x, steps=2, batch_size=2))
    torch.set_default_dtype(F64)
    try:
        check(x.float(), tiny_net())
        run_training(tiny_data(1), sgu.obtuse_loss, 0.5, steps=2)
    finally:
        torch.set_default_dtype(torch.float32)

# ==== 8. Data =====================================================================================

def refuses(function, *args):
    """function(*args) raises a UsageError of one line. -> what it says"""
    with pytest.raises(sgu.UsageError) as error:
        function(*args)
    assert "\n" not in str(error.value) and "delete" not in str(error.value)
    return str(error.value)

def test_glyphs():
    """Shapes, seeds, white ink inside the frame; the same under any matplotlibrc. Each of 300 looks
    most like one of the same label among 3,000 others."""
    import matplotlib
    x, y = sgu.draw_glyphs(3000, 0)
    assert x.dtype == torch.uint8 and x.shape == (3000, 1, 28, 28) and y.dtype == torch.int64
    with matplotlib.rc_context({"text.hinting": "none", "font.size": 30, "figure.dpi": 50,
                                "text.antialiased": False, "text.usetex": True}):
        again = sgu.draw_glyphs(3000, 0)
    assert torch.equal(again[0], x) and torch.equal(again[1], y)
    ink = x.float().flatten(1).mean(1) / 255
    assert 0.02 < ink.min() and ink.max() < 0.6, f"{ink.min()} to {ink.max()} of a glyph is ink"
    edge = torch.cat([x[:, 0, 0], x[:, 0, -1], x[:, 0, :, 0], x[:, 0, :, -1]], 1).float().mean()
    assert edge / 255 < 0.03, f"glyphs are cut off at the border: {edge / 255:.3f} of it is ink"
    new, label = sgu.draw_glyphs(300, 4)
    assert not torch.equal(new, x[:300]) and sgu.draw_glyphs(3, 0, side=32)[0].shape[-1] == 32
    small = [nn.functional.avg_pool2d(v.float(), 2).flatten(1) for v in (new, x)]
    right = (y[torch.cdist(*small).argmin(1)] == label).float()
    assert min(right[label == digit].mean() for digit in range(10)) > 0.6 and right.mean() > 0.85

def test_npz_round_trip(tmp_path):
    path, test = str(tmp_path / "mine.npz"), np.arange(24) % 4 == 3
    for split in (test, test.astype(int), np.where(test, 2, np.arange(24) % 2)):       # 2: CelebA's
        z = write_npz(path, channels=3, class_names=["Cat", "dog", "a bird"], split=split)
        data = sgu.load_data(path)
        assert data["name"] == "mine" and data["classes"] == ["Cat", "dog", "a bird"]
        for key, mask in (("train", ~test), ("test", test)):
            assert np.array_equal(data[key].permute(0, 2, 3, 1).numpy(), z["images"][mask])
            assert data[key + "_labels"].tolist() == z["labels"][mask].tolist()
            assert data[key].dtype == torch.uint8
    z = write_npz(path, labels=np.arange(24))          # gray, no names; a random sixth for testing
    data = sgu.load_data(path)
    train, test = data["train_labels"], data["test_labels"]
    assert data["classes"] == [str(i) for i in range(24)]
    assert data["train"].shape == (20, 1, 8, 8) and data["test"].shape == (4, 1, 8, 8)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(24))
    assert torch.equal(sgu.load_data(path)["test_labels"], test), "the split must not change"
    assert np.array_equal(data["test"][:, 0].numpy(), z["images"][test.numpy()]), "come apart"
    has = np.random.default_rng(1).integers(0, 2, (24, 2))
    for attributes in (has, 2 * has - 1):              # -1 and 1: CelebA's own
        write_npz(path, labels=None, attributes=attributes, attribute_names=["Bangs", "Hat"])
        data = sgu.load_data(path)
        assert data["classes"] == ["Bangs", "Hat"] and data["train_labels"].dtype == torch.bool
        assert data["test_labels"].tolist() == has[test.numpy()].astype(bool).tolist()
    z = write_npz(path, n=80, labels=np.repeat([2, 0, 1, 3], 20))      # sorted by class: mixed
    data, label = sgu.load_data(path), {x.tobytes(): y for x, y in zip(z["images"], z["labels"])}
    for half in ("train", "test"):
        y = data[half + "_labels"].tolist()
        assert len(set(y[:9])) > 2 and [label[x.numpy().tobytes()] for x in data[half]] == y
    write_npz(path, images=np.full((24, 100, 100, 3), 77, dtype=np.uint8))
    assert (sgu.load_data(path)["train"] == torch.full((20, 3, 64, 64), 77)).all()

def test_npz_that_will_not_do(tmp_path):
    path = tmp_path / "mine.npz"
    assert "mine.npz" in refuses(sgu.load_data, str(path))
    for content in (b"", b"not an archive", b"PK\x03\x04 cut off"):
        path.write_bytes(content)
        assert "mine.npz" in refuses(sgu.load_data, str(path))
    images, no = np.zeros((24, 8, 8), dtype=np.uint8), dict(labels=None)
    for words, kw in (("'labels", no), ("'images", dict(images=None)),
                      ("images float32", dict(images=images.astype(np.float32))),
                      ("(24, 4, 8)", dict(images=images[:, :4])),
                      ("images bool", dict(images=images > 0)),
                      ("zero-size", dict(images=images[:0], labels=np.zeros(0, int))),
                      ("is 23", dict(labels=np.arange(23) % 3)),
                      ("labels int64 (24, 2)", dict(labels=np.zeros((24, 2), int))),
                      ("", dict(labels=np.array(["x"] * 24))),
                      ("labels float64", dict(labels=np.arange(24) % 3 + 0.5)),
                      ("labels int64", dict(labels=np.arange(24) % 3 - 1)),
                      ("class_names <U1 (3,)", dict(class_names=list("abc"),
                                                    labels=np.arange(24) % 4)),
                      ("attribute_names <U3 (1,)", no | dict(attributes=np.zeros((24, 2), int),
                                                             attribute_names=["Hat"])),
                      ("", no | dict(attributes=np.zeros(24, int))),
                      ("is 5", dict(split=np.arange(5) % 2)),
                      ("", dict(split=np.array(["train"] * 24)))):
        write_npz(path, **kw)
        said = refuses(sgu.load_data, str(path))
        assert words in said and "mine" in said and "read_npz" in said, f"{kw.keys()}: {said}"

def class_data(names="zero one two".split(), n=30):
    y, x = torch.arange(n) % len(names), torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    return dict(name="mine", train=x, train_labels=y, test=x, test_labels=y, classes=list(names))

def test_choose():
    data = class_data()
    for forget, want, chosen in (("one", [1], "one"), ("ONE, zero", [1, 0], "one,zero"),
                                 (" 2", [2], "two"), ("0,two", [0, 2], "zero,two")):
        got = sgu.choose(data, forget)
        assert (got["forget"], got["chosen"], got["classes"]) == (want, chosen, data["classes"])
        gone = sum(data["train_labels"] == c for c in want).bool()
        assert torch.equal(sgu.is_forgotten(got, "train"), gone), f"--forget {forget}"
    assert "forget" not in data, "choose must leave its argument alone"
    assert sgu.choose(class_data(["7", "1", "4"]), "1")["forget"] == [1], "a name before a number"
    assert sgu.choose(data, "one,1")["forget"] == [1]
    for forget, words in (("three", "zero, one, two"), ("3", "numbers"), ("-1", "numbers"),
                          ("²", "numbers"), ("", "numbers"), ("one,", "numbers"),
                          ("zero,one,two", "none, or all")):
        said = refuses(sgu.choose, data, forget)
        assert forget in said and words in said, f"--forget {forget!r}: {said}"
    assert sgu.choose(data, "one")["checksum"] != sgu.choose(data, "two")["checksum"], "by number"
    data["test_labels"] = data["test_labels"] * 0
    assert "test images" in refuses(sgu.choose, data, "one")
    data, has = class_data(["Bangs", "Hat", "Smile"]), torch.rand(30, 3, generator=seeded()) < 0.4
    data.update(train_labels=has, test_labels=has)     # attributes become two classes
    got = sgu.choose(data, "hat")
    assert got["classes"] == ["no Hat", "Hat"] and got["forget"] == [1]
    assert torch.equal(got["train_labels"], has[:, 1].long())
    got = sgu.choose(data, "Smile,0")
    assert got["classes"] == ["no Smile+Bangs", "Smile+Bangs"]
    assert torch.equal(sgu.is_forgotten(got, "test"), has[:, 0] | has[:, 2])

def test_class_names_that_would_break_something(tmp_path):
    """Commas and bars become spaces. Names that are equal, in any case, or words that results.json
    needs are refused: every class has a name of its own, by which it can be asked for."""
    path = str(tmp_path / "odd.npz")
    for names, want in (((b"hen", b"a|b", b"x, y"), ["hen", "a b", "x y"]),
                        (("totals", "N.", "gr\xfcn"), ["totals", "N.", "gr\xfcn"])):
        write_npz(path, class_names=np.array(names), split=np.arange(24) < 9)
        data = sgu.load_data(path)
        assert data["classes"] == want
        for i, name in enumerate(want):
            assert sgu.choose(data, name)["forget"] == sgu.choose(data, str(i))["forget"] == [i]
    for names in (("a", "A", "b"), ("hen", "crane", "hen"), ("a|b", "c", "A, b"),
                  ("x", "TOTAL", "y"), ("x", "y", "n"), ("ci95", "x", "y"), ("x", " |", "y")):
        write_npz(path, class_names=np.array(names))
        assert "equal or reserved names: [" in refuses(sgu.load_data, path), names
        write_npz(path, labels=None, attributes=np.arange(72).reshape(24, 3) % 2,
                  attribute_names=np.array(names))
        assert "equal or reserved names: [" in refuses(sgu.load_data, path), names

def test_data_are_known_by_their_content(tmp_path):
    """The checksum is that of images and labels, whatever the file is called."""
    def checksum(**kw):
        write_npz(tmp_path / f"{len(kw)}.npz", **kw)
        return sgu.choose(sgu.load_data(str(tmp_path / f"{len(kw)}.npz")), "1")["checksum"]
    z = write_npz(tmp_path / "a.npz")
    changed = z["images"].copy()
    changed[0, 0, 0] ^= 1
    assert checksum() == checksum(**z) != checksum(images=changed)
    assert checksum(labels=np.roll(z["labels"], 1)) != checksum()

def test_idx_files(tmp_path, offline, name="mnist", folder="MNIST"):
    """torchvision's own files load; damaged, missing and blank ones are named, with their place."""
    raw, root = tmp_path / folder / "raw", str(tmp_path)
    made = write_mnist(raw)
    data = sgu.load_data(name, root)
    for key, split in (("train", "train"), ("test", "t10k")):
        assert np.array_equal(data[key][:, 0].numpy(), made[split][0])
        assert data[key + "_labels"].tolist() == made[split][1].tolist()
    assert data["classes"] == sgu.DIGITS
    images, labels = raw / "train-images-idx3-ubyte", raw / "t10k-labels-idx1-ubyte"
    cut, wrong = images.read_bytes()[:-500], labels.read_bytes()[:-1] + b"\xc8"
    dull = labels.read_bytes()[:8] + bytes(20)
    for file, content in ((images, cut), (images, b"<html>not found</html>"), (images, b""),
                          (labels, wrong), (labels, dull), (labels, None)):
        whole = file.read_bytes()
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        said = refuses(sgu.load_data, name, root)
        assert name in said and f"{folder}/raw/" in said and root in said, said
        file.write_bytes(whole)
    write_mnist(raw, black=10)
    assert name in refuses(sgu.load_data, name, root), "a zero tail is no real copy"

@pytest.mark.parametrize("name", [n for n in sgu.DATASETS if n != "glyphs"])
def test_no_data_and_no_network(name, tmp_path, offline):
    said = refuses(sgu.load_data, name, str(tmp_path))
    assert name in said and str(tmp_path) in said
    assert f"put {sgu.DATASETS[name][2]}" in said, said

def test_cifar10_comes_as_an_array_and_large_images_are_seen_at_64(monkeypatch, tmp_path):
    from torchvision import datasets
    pixels = np.random.default_rng(0).integers(60, 90, (6, 96, 96, 3), dtype=np.uint8)
    pixels[..., 1] = 7
    part = types.SimpleNamespace(data=pixels[:, :32, :32], targets=[0, 1] * 3, classes=["a", "b"])
    monkeypatch.setattr(datasets, "CIFAR10", lambda root, train, download: part)
    write_npz(tmp_path / "x.npz", images=pixels, labels=[0, 1] * 3, class_names=["a", "b"],
              split=[0, 0, 0, 0, 1, 1])
    for name, n, side in (("cifar10", 6, 32), (str(tmp_path / "x.npz"), 4, 64)):
        data = sgu.load_data(name, "nowhere")
        assert data["train"].shape == (n, 3, side, side)
        assert data["test_labels"].tolist()[:2] == [0, 1]
        assert (data["train"][:, 1] == 7).all() and data["train"][:, 0].float().std() > 1

# ==== 9. The judge ================================================================================

def test_wilson_and_frechet():
    """And 5 of 10 in closed form, 1/2 -+ z/2 / sqrt(n + z^2); fewer points than dimensions."""
    check_wilson()
    check_frechet()
    half = 1.959964 / 2 / math.sqrt(10 + 1.959964 ** 2)
    expect(torch.tensor(sgu.wilson(5, 10)), [0.5 - half, 0.5 + half], "interval of 5 of 10", 1e-6)
    a, b = (torch.randn(n, 5, generator=seeded(n)) for n in (4, 30))
    assert math.isfinite(sgu.frechet(a, b)) and sgu.frechet(a, b) > 0
    expect(sgu.frechet(b, a), sgu.frechet(a, b), "Frechet distance, the other way round", 1e-6)

def test_judged():
    """Eight images by hand; the last column is "none of these": 2 of class c and 1 of class a, both
    forgotten, 3 of b, two of them below one half, and 2 none of these, one for sure."""
    probs = torch.tensor([[.1, .2, .7, 0], [.2, .1, .7, 0], [.9, .05, .05, 0], [.1, .8, .1, 0],
                          [.3, .4, .3, 0], [.26, .48, .26, 0], [.1, .1, .1, .7], [.3, .2, .1, .4]])
    features, reference, real = (torch.randn(n, 2, generator=seeded(n)) for n in (8, 9, 20))
    data = dict(classes=["a", "b", "c"], forget=[2, 0])
    got = sgu.judged(probs, features, data, reference, real)
    ratio = got["unlearning_ratio"]
    expect([ratio[k] for k in ("c", "a", "total")], [2 / 8, 1 / 8, 3 / 8], "unlearning ratio", 1e-9)
    assert list(ratio) == ["c", "a", "total", "n", "ci95"] and ratio["n"] == 8
    assert ratio["ci95"] == sgu.wilson(3, 8) and got["kept"] == 5
    shares = [got["class_histogram"][k] for k in "abc"]
    expect(shares, [1 / 8, 3 / 8, 2 / 8], "class histogram", 1e-9)
    expect(got["none"], 2 / 8, "none of these", 1e-9)
    expect(got["unsure"], 4 / 8, "none of these, or below one half", 1e-9)
    distance = sgu.frechet(features[3:], reference)
    expect(got["frechet_kept"], distance, "distance of the kept images", 1e-9)
    expect(got["frechet_real"], sgu.frechet(real[:5], reference), "of as many real ones", 1e-9)
    assert sgu.judged(probs[:3], features[:3], data, reference, real)["frechet_kept"] is None
    assert sgu.judged(probs, features, data, reference, real[:4])["frechet_real"] is None, "too few"

def learn(x, y, classes=sgu.DIGITS, **kw):
    """A trained judge."""
    log = list(sgu.train_judge(dict(train=x, train_labels=y, classes=list(classes)), **kw))
    assert [row["step"] for row in log] == list(range(1, log[-1]["steps"] + 1))
    return log[-1]["judge"]

@pytest.fixture(scope="module")
def glyph_judge():
    """A judge of small glyphs, trained for a few seconds, and glyphs that it has not seen."""
    judge = learn(*sgu.draw_glyphs(3000, 3, side=16), width=6, steps=200, batch_size=64)
    return judge, *sgu.draw_glyphs(500, 4, side=16)

def test_judge_learns_glyphs(glyph_judge):
    judge, x, y = glyph_judge
    probs, features = sgu.opinions(judge, x)
    assert probs.shape == (500, 11) and probs.dtype == features.dtype == torch.float32
    expect(probs.sum(1), torch.ones(500), "sum of the probabilities", 1e-5)
    expect(sgu.opinions(judge, x[:3])[0], probs[:3], "an image alone and in its batch", 1e-4)
    accuracy = (probs.argmax(1) == y).float().mean()
    assert accuracy > 0.8, f"the judge reads {accuracy:.0%} of the glyphs"
    none = (probs.argmax(1) == 10).float().mean()
    assert none < 0.02, f"{none:.1%} of real glyphs are none of these"
    for wrong in (x.float() / 127.5 - 1, x.float(), x.long(), x.double(), x > 0):
        with pytest.raises(ValueError, match="uint8"):
            sgu.opinions(judge, wrong)

def test_judge_says_none_of_these(glyph_judge):
    """Noise of several kinds and shuffled images are no class, but for 2%; and Standard with its
    forgotten samples replaced by noise shows in "none" and "unsure"."""
    judge, x, y = glyph_judge
    g = seeded(9)
    z, u, mix = (f(x.shape, generator=g) for f in (torch.randn, torch.rand, torch.rand))
    smooth = nn.functional.avg_pool2d(3 * z, 5, 1, 2)
    kinds = dict(uniform=2 * u - 1, gauss=0.5 * z, faint=0.2 * z - 0.9, strong=2 * z,
                 smooth=smooth, salt=torch.where(mix < 0.1, 1., -1.),
                 shuffled=sgu.from_levels(x.flatten(1)[:, torch.randperm(256)].view_as(x)))
    for name, images in kinds.items():
        label = sgu.opinions(judge, sgu.to_levels(images))[0].argmax(1)
        called = (label < 10).float().mean()
        assert called < 0.02, f"{called:.1%} of {name} noise is called a class"
    gone, data = torch.isin(y, torch.tensor([3, 7])), dict(classes=sgu.DIGITS, forget=[3, 7])
    destroyed = torch.where(gone[:, None, None, None], sgu.to_levels(kinds["gauss"]), x)
    reference, share = sgu.opinions(judge, x)[1], float(gone.float().mean())
    before, after = (sgu.judged(*sgu.opinions(judge, images), data, reference)
                     for images in (x, destroyed))
    assert after["unlearning_ratio"]["total"] < 0.05 < before["unlearning_ratio"]["total"]
    assert after["unsure"] > before["unsure"] + 0.8 * share and after["none"] > 0.8 * share

def test_judge_is_a_seeded_job():
    """It depends on its seed alone; stopped, saved and gone on with it is the same, bit for bit."""
    x, y = sgu.draw_glyphs(100, 1)
    kw = dict(width=2, steps=4, batch_size=20)
    torch.manual_seed(1)
    judge = learn(x, y, **kw)
    torch.manual_seed(2)
    assert same_weights(judge, learn(x, y, **kw)), "not by its seed alone"
    assert not same_weights(judge, learn(x, y, **kw, seed=1))
    data, kept = dict(train=x, train_labels=y, classes=sgu.DIGITS), io.BytesIO()
    for row in sgu.train_judge(data, **kw):
        if row["step"] == 2:
            torch.save(row["snapshot"](), kept)
            break
    state = torch.load(io.BytesIO(kept.getvalue()), weights_only=True)
    for row in sgu.train_judge(data, **kw, state=state):
        pass
    assert row["step"] == 4 and same_weights(judge, row["judge"])

# ==== 10. The command: what it hands to each stage ================================================

SIX = "standard,unseen,orthogonal,obtuse,relative,finetune"
MEASURES = ("sampler", "bits_per_dim", "inpaint", "reconstruct")

@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Every method and task, in bfloat16."""
    return Recorded(tmp_path_factory.mktemp("recorded"), "--methods", SIX, "--samples", "150",
                    "--precision", "bfloat16", "--seed", "7", "--tasks",
                    "sample,likelihood,inpaint,reconstruct")

@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """The paper's own recipe: re-trained, in the chain of a DDPM."""
    return Recorded(tmp_path_factory.mktemp("paper"), "--methods", "orthogonal,relative", "--sde",
                    "ddpm", "--recipe", "paper", "--training", "retrain", "--alpha", "0.3")

def test_which_images_each_stage_sees(recorded):
    """Standard trains on D, all others keep D_g; what is forgotten is D_f; the judge learns all
    training images; likelihoods and restorations are of the first test images."""
    d_g, d_f = (recorded.images("train", forgotten) for forgotten in (False, True))
    for method in recorded.methods:
        given = recorded.train(method)
        keep = recorded.data["train"] if method == "standard" else d_g
        assert torch.equal(given.keep, keep), f"{method} keeps other images"
        if method in ("orthogonal", "obtuse", "relative"):
            assert torch.equal(given.forget, d_f), f"{method} forgets other images"
        else:
            assert given.forget is None and given.forget_loss is None
        for stage in MEASURES[1:]:
            seen = torch.cat([call.x for call in recorded.of(stage, method)])
            for forgotten in (False, True):
                first = sgu.from_levels(recorded.images("test", forgotten)[:4])
                mine = (seen[:, None] == first).flatten(2).all(2)
                assert mine.any(0).all(), f"{stage} of {method} leaves out a first test image"
                seen = seen[~mine.any(1)]
            assert not len(seen), f"{stage} of {method} sees other images"
    judge, = recorded.calls["train_judge"]
    assert all(torch.equal(judge.data[k], recorded.data[k]) for k in ("train", "train_labels"))
    mask = recorded.calls["inpaint"][0].mask.expand(8, 8)
    assert not mask[:4].any() and mask[4:].all(), "the upper half is hidden"
    assert all(call.t == 0.02 for call in recorded.calls["reconstruct"]), "the paper's t"

def test_where_each_method_starts(recorded, paper):
    """From the same random weights, or from Standard's averaged ones; re-trained is from nothing,
    but for a method that has no meaning without Standard."""
    for run, scratch in ((recorded, ("standard", "unseen")), (paper, ("standard", "orthogonal"))):
        standard, random = weights_of(run.out / "standard.pt"), run.train("standard").start
        assert any(not torch.equal(standard[k], random[k]) for k in random)
        for method in run.methods:
            start, want = run.train(method).start, random if method in scratch else standard
            assert all(torch.equal(start[k], want[k]) for k in want), f"{method} starts elsewhere"

@pytest.mark.parametrize("method, alpha, steps, lr, window, power", [
    ("standard", None, 8, 0.02, None, None), ("unseen", None, 8, 0.02, None, None),
    ("orthogonal", 0.95, 4, 0.02, (0.2, 6.), 0.5), ("obtuse", 0.95, 4, 0.02, (0.2, 6.), 0.5),
    ("relative", 0.55, 4, 0.02, (0.2, 3.), 1.), ("finetune", None, 4, 0.02, None, None)])
def test_recipe_of_each_method(recorded, method, alpha, steps, lr, window, power):
    """Alpha, rate, window and the power of the forget weight as they were found by trying."""
    given = recorded.train(method)
    assert (given.alpha, given.steps, given.batch_size, given.lr) == (alpha, steps, 16, lr)
    assert given.seed == 7 and given.recipe[::2] == ((0.5, 0.8, 5), "bfloat16"), "the preset's law"
    t, std, weights = torch.linspace(0.05, 1, 9), given.model.data_std, given.recipe.weighting
    sigma = given.sde.sigma(t)
    expect(weights[0](t), 1 + (sigma / std) ** 2, "keep weight", 1e-4)
    if power:
        assert tuple(given.window) == window
        expect(weights[1](t), (1 + (sigma / std) ** 2) ** power, "forget weight", 1e-4)
    said = recorded.results["methods"][method]["recipe"]
    assert (said["alpha"], said["steps"], said["lr"]) == (alpha, steps, lr)

def test_share_and_pace(finished, tmp_path, small, monkeypatch):
    """Of Standard's steps, unless --unlearn-steps says otherwise, and of its learning rate."""
    standard, argv, configs = finished[0] / "standard.pt", list(map(str, finished[1])), []
    at = argv.index("--unlearn-steps")
    del argv[at:at + 2]
    opt, data = sgu.resolve(sgu.parse_options([*argv, "--out", str(tmp_path), "--pretrained",
                                               str(standard)]))
    saved, brief = sgu.read_file(standard, sgu.UNet), sgu.METHODS["finetune"]
    monkeypatch.setattr(sgu, "finish", lambda *_, **how: configs.append(how) or saved)
    monkeypatch.setitem(sgu.METHODS, "brief", brief._replace(share=0.3, pace=0.25))
    for opt.unlearn_steps in (None, 5):
        sgu.get_model("brief", opt, data)
    assert [how["steps"] for how in configs] == [round(0.3 * opt.steps), 5]
    assert [how["lr"] for how in configs] == [0.25 * opt.lr] * 2

def test_recipe_of_the_paper(paper):
    """t uniform, lambda(t) on both losses, every sigma; --alpha is for methods that forget."""
    how = dict(standard=(None, 8), orthogonal=(0.3, 8), relative=(0.3, 4))
    for method, (alpha, steps) in how.items():
        given = paper.train(method)
        assert (given.alpha, given.steps, given.seed) == (alpha, steps, 0), method
        assert given.recipe == sgu.RECIPES["paper"] == sgu.Recipe(None, "paper")
        assert tuple(given.window) == sgu.EVERY_SIGMA and type(given.sde) is sgu.DDPM
    assert type(sgu.load_model(paper.out / "orthogonal.pt")[1]) is sgu.DDPM

def test_noise_laws():
    """32 and 64 pixels train around sigma 0.3, digits around 1."""
    for (size, device), row in sgu.PRESETS.items():
        law = dict(zip(sgu.COLUMNS, row))["noise_law"]
        want = sgu.PHOTO_NOISE if size in (32, 64) else sgu.DIGIT_NOISE
        assert law == want, (size, device)
    assert sgu.PHOTO_NOISE == (-1.2, 1.2, 32) and sgu.Recipe().noise_law == sgu.DIGIT_NOISE

def test_relative_refers_to_standard(recorded):
    """Not to the network being trained, nor to its average: e_ref asked after training, when all
    three differ. The loss is linear in e: e.(z - e_ref)/D."""
    given, t = recorded.train("relative"), torch.tensor([0.3, 0.5, 0.7])
    x0, z, e = (torch.randn(3, 1, 8, 8, generator=seeded(i)) for i in range(3))
    a, s = (sgu.per_sample(v, x0) for v in given.sde.marginal(t))
    standard = sgu.load_model(recorded.out / "standard.pt")[0]
    loss = given.forget_loss(planted(given.sde, e), given.sde, x0, t=t, z=z)
    e_ref, *others = (-s * sgu.make_score(net, given.sde, precision="bfloat16")(a * x0 + s * z, t)
                      for net in (standard, given.model, given.ema))
    expect(loss, (e * (z - e_ref)).mean(), "relative loss by Standard's saved network", 1e-5)
    for other in others:
        assert (e * (other - e_ref)).mean().abs() > 1e-4, "this test tells nothing"

def test_which_network_is_measured_and_how(recorded):
    """The averaged weights, which differ from the live ones; samples and restorations in the
    precision asked for, likelihoods in float32; with the preset's data_std."""
    x, t = torch.randn(3, 1, 8, 8, generator=seeded()), torch.tensor([0.2, 0.5, 0.8])
    for method in recorded.methods:
        given, (model, sde) = recorded.train(method), sgu.load_model(recorded.out / f"{method}.pt")
        assert same_weights(model, given.ema), f"{method}: saved weights are not the average"
        assert not same_weights(model, given.model)
        half, full = (sgu.make_score(model, sde, precision=precision)(x, t)
                      for precision in ("bfloat16", "float32"))
        assert not torch.equal(half, full)
        for stage, want in zip(MEASURES, (half, full, half, half)):
            for call in recorded.of(stage, method):
                assert torch.equal(call.score(x, t), want), f"{stage} of {method}: another score"
                assert type(call.sde) is sgu.VP, "the default schedule of one's own data"
    assert given.model.data_std == model.data_std == 0.8

def test_samples_and_their_random_numbers(recorded):
    """150 of each method, by the sampler and steps asked for; every method meets the same noise,
    every chunk its own, and so do the other stages. --seed decides."""
    first = recorded.of("sampler", "standard")
    assert sum(call.shape[0] for call in first) == 150 and len(first) > 1
    assert all(tuple(call.shape[1:]) == (1, 8, 8) and call.steps == 2 for call in first)
    states = [call.random for call in first]
    assert len(set(map(tuple, states))) == len(states), "two chunks meet the same noise"
    for method in recorded.methods:
        for stage in MEASURES:
            mine, theirs = (recorded.of(stage, m)[0].random for m in (method, "standard"))
            assert mine == theirs, f"{stage}: {method} meets other random numbers than Standard"
    assert torch.Generator().manual_seed(0).get_state().tolist() not in states
    assert recorded.calls["train_judge"][0].seed == 7

def test_what_is_judged(recorded):
    """The samples of the file, by the distance of their features to real images of D_g alone."""
    judge = sgu.load_judge(recorded.out / "judge.pt")
    real, facts = sgu.opinions(judge, recorded.images("test", False)), recorded.results["judge"]
    for method in recorded.methods:
        call, = recorded.of("judged", method)
        expect(call.reference, real[1], "features that the distance is measured from", 1e-4)
        images = sgu.read_file(recorded.out / f"samples_{method}.pt")["state"]["values"]
        assert images.shape == (150, 1, 8, 8) and images.dtype == torch.uint8
        want = sgu.judged(*sgu.opinions(judge, images), recorded.data, real[1])
        got = recorded.results["methods"][method]
        assert got["unlearning_ratio"] == want["unlearning_ratio"] and got["none"] == want["none"]
        expect(got["frechet_kept"], want["frechet_kept"], "distance of the kept samples", 1e-4)
    probs = sgu.opinions(judge, recorded.data["test"])[0]
    right = (probs.argmax(1) == recorded.data["test_labels"]).float().mean()
    expect(facts["test_accuracy"], right, "accuracy", 1e-6)
    expect(facts["floor"], (real[0].argmax(1) == 1).float().mean(), "floor", 1e-6)

def test_likelihood_of_the_last_level(recorded):
    """What stands in the results is the mean of the finest integration."""
    nll = {m: entry["nll_bits_per_dim"] for m, entry in recorded.results["methods"].items()}
    last, g = recorded.of("bits_per_dim", "finetune")[-1], torch.Generator()
    g.set_state(torch.tensor(last.random, dtype=torch.uint8))
    score = sgu.make_score(recorded.train("finetune").ema, last.sde)
    bits = sgu.bits_per_dim(score, last.sde, last.x, steps=128, generator=g)
    expect(nll["finetune"]["D_f"], bits.mean(), "bits/dim of D_f", 1e-3)

def test_likelihoods_are_refined(copied, capsys, monkeypatch):
    """Until the estimated error is below a tenth of the standard error; what has not converged in
    512 steps is marked. D_f, whose upper right is bright, converges more slowly here."""
    def slow(score, sde, x, steps, **kw):
        speed = torch.where(x[:, 0, :4, 4:].mean((1, 2)) > 0, 1e4, 40.)
        return torch.arange(4.).double() + speed / steps
    monkeypatch.setattr(sgu, "bits_per_dim", slow)
    assert command(capsys, *copied[1], "--methods", "standard", "--tasks", "likelihood")[0] == 0
    nll = results_of(copied[0])["methods"]["standard"]["nll_bits_per_dim"]
    se = float(torch.arange(4.).std()) / 2
    assert nll["error"]["D_g"] < 0.1 * se <= 2 * nll["error"]["D_g"] and nll["n"]["D_g"] == 4
    assert 32 < nll["steps"]["D_g"] < nll["steps"]["D_f"] == 512 and nll["error"]["D_f"] > se
    assert nll["converged"] == dict(D_g=True, D_f=False) and nll["se"]["D_g"] == pytest.approx(se)
    expect(nll["D_g"], 1.5 + 40 / nll["steps"]["D_g"], "the mean of the last level", 1e-6)
    rows = (copied[0] / "table.md").read_text(encoding="utf-8").splitlines()
    shown = [row.split("|")[1:3] for row in rows if "converged" in row]
    assert [[word.strip() for word in row] for row in shown] == [
        ["nll_bits_per_dim converged D_g", "True"], ["nll_bits_per_dim converged D_f", "False"]]

def test_results_and_files(recorded):
    """Every field of results.json; a file per job, the table and pictures, and no more."""
    from PIL import Image
    r = recorded.results
    assert set(r) >= {"config", "command", "device", "seconds", "judge", "methods"}
    for name, value in dict(forget="two", sde="vp", seed=7, steps=8, batch_size=16, lr=0.02,
                            samples=150, sampler="ode", sampler_steps=2, precision="bfloat16",
                            likelihood_samples=4, recipe="balanced", training="finetune").items():
        assert r["config"][name] == value, name
    assert recorded.methods == SIX.split(",") and r["command"].startswith("python sgu.py")
    *each, total = r["seconds"].values()
    assert total == pytest.approx(sum(each)) and len(each) > 30
    for m in r["methods"].values():
        ratio = m["unlearning_ratio"]
        assert set(ratio) == {"two", "total", "n", "ci95"} and ratio["n"] == 150
        assert 0 <= m["none"] <= m["unsure"] <= 1 and m["kept"] == 150 - round(150 * ratio["total"])
        assert {"frechet_kept", "frechet_real", "class_histogram"} <= set(m)
        for part in (m[task][key] for task in ("inpaint", "reconstruct") for key in ("D_g", "D_f")):
            assert part["n"] == 4 and part["distance"] >= 0
            lo, hi = part["ci95"]
            assert 0 <= lo <= part["accuracy"] + 1e-9 and part["accuracy"] <= hi + 1e-9 <= 1 + 1e-9
    assert "NaN" not in json.dumps(r) and "Infinity" not in json.dumps(r)
    names = {p.name for p in recorded.out.iterdir()}
    pictures = {name for name in names if name.endswith(".png")}
    assert names >= {"results.json", "table.md", "judge.pt", *(f"{m}.pt" for m in recorded.methods)}
    jobs = names - pictures - {"results.json", "table.md"}
    assert all(name.endswith(".pt") and name[0] != "." for name in jobs) and len(pictures) >= 3
    for name in pictures:
        picture = np.asarray(Image.open(recorded.out / name))
        assert picture.shape[0] > 50 and picture.std() > 5, f"{name} is empty"
    table = (recorded.out / "table.md").read_text(encoding="utf-8")
    assert all(sgu.METHODS[m].title in table for m in recorded.methods)

@pytest.mark.parametrize("argv, steps, per_step", [
    ("", 20, 1), ("--sampler pc", 100, 2), ("--sampler em --sampler-steps 5", 5, 1)])
def test_sampler_steps(argv, steps, per_step, tmp_path, small):
    """Those asked for, or the sampler's own default, counted in evaluations of a real call."""
    path, calls = write_shapes(tmp_path / "s.npz"), []
    opt, _ = sgu.resolve(sgu.parse_options(["--dataset", path, "--forget", "two",
                                                *argv.split()]))
    score = counting(lambda x, t: -x, calls)
    sgu.SAMPLERS[opt.sampler](score, sgu.VE(), (1, 2), steps=opt.sampler_steps, generator=seeded())
    assert opt.sampler_steps == steps and len(calls) == steps * per_step + 1

# ==== 10. The command: going on, starting over, refusing ==========================================

WORK = ("score_matching_loss", "none_of_these", "walk", "bits_per_dim", "inpaint", "reconstruct")

def test_finished_run_repeats_nothing(copied, capsys, monkeypatch):
    """Nor with another spelling; lost results come back from the files of the jobs."""
    out, argv = copied
    want, before = results_of(out)["methods"], fingerprint(out, ".pt")
    (out / "results.json").write_text("{ damaged")     # is output and never read
    forbid(monkeypatch, *WORK)
    code, printed, _ = command(capsys, *argv, "--forget", " TWO", "--methods", "obtuse")
    assert code == 0 and str(out) in printed
    assert results_of(out)["methods"] == want and fingerprint(out, ".pt") == before

def test_fresh_starts_over_and_gives_the_same_numbers(copied, capsys, monkeypatch):
    """And leaves the user's own files in the folder alone, and a file that it is to start from."""
    out, argv = copied
    want, own = results_of(out)["methods"], ("notes.md", "mine.npz", "mine.pt", "data.json")
    for name in own:
        (out / name).write_text("mine")
    old = fingerprint(out)
    assert command(capsys, *argv, "--fresh")[0] == 0
    new = fingerprint(out)
    assert all(new[name] == old[name] for name in own), "--fresh touched a file that is not ours"
    assert all(new[f"{m}.pt"][0] > old[f"{m}.pt"][0] for m in ("judge", "standard", "obtuse"))
    assert results_of(out)["methods"] == want, "the same seed gives other numbers"
    again = [*argv, "--pretrained", out / "standard.pt", "--fresh"]
    assert command(capsys, *again)[0] == 0 and (out / "standard.pt").exists()

def test_part_by_part_and_more_of_the_same(finished, tmp_path, small, capsys, monkeypatch):
    """Obtuse alone makes Standard first; tasks, samples and test images may be added, with the
    numbers of one run; then fewer are asked for, of what is there."""
    (folder, argv), parts, whole = finished, tmp_path / "parts", tmp_path / "whole"
    assert command(capsys, *argv, "--methods", "obtuse", "--out", parts)[0] == 0
    assert results_of(parts)["methods"] == results_of(folder)["methods"]
    assert equal_weights(parts / "obtuse.pt", folder / "obtuse.pt")
    argv = [*argv, "--methods", "standard"]
    more = [*argv, "--samples", "130", "--likelihood-samples", "6", "--tasks", "sample,likelihood"]
    assert command(capsys, *argv, "--tasks", "likelihood", "--out", parts)[0] == 0
    whole.mkdir()
    for name in ("standard", "judge"):                 # a run of more from the start, but for these
        shutil.copy(folder / f"{name}.pt", whole)
    forbid(monkeypatch, "score_matching_loss", "none_of_these")
    for out in (parts, whole):
        assert command(capsys, *more, "--out", out)[0] == 0
    grown = results_of(parts)["methods"]["standard"]
    assert grown == results_of(whole)["methods"]["standard"], "grown is not what one run gives"
    assert grown["unlearning_ratio"]["n"] == 130 and grown["nll_bits_per_dim"]["n"]["D_f"] == 6
    forbid(monkeypatch, *WORK)
    assert command(capsys, *argv, "--samples", "5", "--out", parts)[0] == 0
    assert results_of(parts)["methods"]["standard"]["unlearning_ratio"]["n"] == 5

def test_six_kills(finished, tmp_path, small, capsys, monkeypatch):
    """SIGKILL in the judge, in training and in sampling, between two saves and in the midst of one:
    the same command goes on from the last whole file and ends with the same numbers."""
    more, processes = [*finished[1], "--samples", "130"], multiprocessing.get_context("forkserver")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    processes.set_forkserver_preload(["testkit"])     # torch is imported once
    for name, save, half in (("judge.pt", 3, False), ("judge.pt", 2, True),
                             ("standard.pt", 3, True), ("samples_standard.pt", 1, False),
                             ("obtuse.pt", 2, False), ("samples_obtuse.pt", 2, True)):
        argv = [*more, "--out", str(tmp_path / "killed")]
        child = processes.Process(target=die_at, args=(argv, name, save, half))
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL, f"{name}, save {save}: exit code {child.exitcode}"
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for out in (killed, whole):
        assert command(capsys, *more, "--out", out)[0] == 0
    assert fingerprint(killed).keys() == fingerprint(whole).keys(), "something stays behind"
    assert all(equal_weights(killed / name, whole / name) for name in ("standard.pt", "obtuse.pt"))
    assert results_of(killed)["methods"] == results_of(whole)["methods"]

def test_ctrl_c_says_how_to_go_on(finished, tmp_path, small, capsys, monkeypatch):
    """A real SIGINT in the fifth step of Standard; the same command then gives the same numbers."""
    loss, calls = sgu.score_matching_loss, []
    signal.signal(signal.SIGINT, signal.default_int_handler)           # a shell's & ignores it
    def pressed(*args, **kw):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return loss(*args, **kw)
    with monkeypatch.context() as patch:
        patch.setattr(sgu, "score_matching_loss", pressed)
        code, _, said = command(capsys, *finished[1], "--out", tmp_path / "new")
    assert code == 130 and "goes on" in said.strip().splitlines()[-1]
    assert command(capsys, *finished[1], "--out", tmp_path / "new")[0] == 0
    assert results_of(tmp_path / "new")["methods"] == results_of(finished[0])["methods"]

@pytest.mark.parametrize("line", [
    "--dataset imagenet: 'imagenet' glyphs", "--dataset no/such.npz --forget 1: no/such.npz",
    "--forget three: 'three'", "--forget 12: '12' 1,", "--forget 3,,7: '3,,7'",
    "--forget 0,1,2,3,4,5,6,7,8,9: none", "--methods standard,magic: magic obtuse",
    "--tasks sing: sing likelihood", "--sde edm: edm vp",
    "--sampler leap: leap ode", "--device tpu: tpu cuda", "--precision float16: float16 bfloat16",
    "--recipe mine: mine paper", "--training none: none finetune", "--nonsense: --nonsense",
    "--steps 1.5: --steps 1.5", "--steps many: --steps many", "--alpha -0.1: --alpha -0.1",
    "--alpha 1.5: --alpha 1.5", "--alpha nan: --alpha nan", "--alpha 1: alpha 1.0",
    "--seed -1: --seed -1", "--lr inf: --lr inf", "--lr 0: --lr 0", "--pretrained no.pt: no.pt",
    "--forget: --forget",
    *(f"--{name} {value}: --{name} {value}" for value in ("0", "-3") for name in (
        "steps", "unlearn-steps", "batch-size", "sampler-steps", "samples", "likelihood-samples"))])
def test_options_that_will_not_do(line, tmp_path, small, capsys, monkeypatch):
    """Refused before any work, in words that name the option and what it may be."""
    draw, (argv, words) = sgu.draw_glyphs, line.split(": ")
    monkeypatch.setattr(sgu, "draw_glyphs", lambda n, seed: [v.repeat_interleave(n // 200, 0)
                                                             for v in draw(200, seed)])
    argv = argv.replace(" -0", "=-0").replace(" -1", "=-1").replace(" -3", "=-3").split()
    check_refused(capsys, [*argv, "--out", tmp_path / "new"], *words.split())
    assert not (tmp_path / "new").exists(), "a refused command must not leave a folder behind"

def test_options_are_checked_in_python_too(tmp_path):
    for kw in (dict(training="fine-tune"), dict(precision="bf16"), dict(alpha=2), dict(steps=2.5),
               dict(sede=3), dict(batch_size=True), dict(alpha=math.nan), dict(methods=3)):
        with pytest.raises((sgu.UsageError, TypeError)):
            sgu.run(sgu.Options(**kw, out=str(tmp_path / "new")))
    opt = sgu.Options()
    opt.training = "fine-tune"                         # set later: run looks again
    with pytest.raises(sgu.UsageError, match="training"):
        sgu.run(opt)

def test_machines_and_folders_that_will_not_do(finished, tmp_path, small, capsys, monkeypatch,
                                               offline):
    argv, new = finished[1], tmp_path / "new"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_refused(capsys, [*argv, "--device", "cuda"], "--device cuda")
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):     # works for root too
        check_refused(capsys, [*argv, "--out", out], tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    for root in (tmp_path / "empty", tmp_path / "file"):
        check_refused(capsys, ["--dataset", "mnist", "--data-root", root, "--out", new],
                      "MNIST/raw", root)
    for side in (30, 4):
        write_npz(tmp_path / "odd.npz", side=side)
        odd = ["--dataset", tmp_path / "odd.npz", "--out", new]
        check_refused(capsys, [*odd, "--forget", "1"], f"{side} pixels")
    check_refused(capsys, odd, "--forget")
    write_npz(tmp_path / "glyphs.npz", side=16)        # its name is not its size
    opt = sgu.resolve(sgu.Options(dataset=str(tmp_path / "glyphs.npz"), forget="1"))[0]
    assert opt.likelihood_samples == sgu.PRESETS[28, "cpu"][10] != sgu.PRESETS["glyphs", "cpu"][10]

def test_full_disk_and_memory(copied, capsys, monkeypatch):
    """One line, nothing half-written takes a place, and what was there is whole. What nobody
    foresaw keeps its traceback."""
    out, argv = copied
    before, argv = fingerprint(out), [*argv, "--methods", "standard,unseen"]
    def full(*args):
        raise OSError(28, "No space left on device", str(args[0]))
    for owner, name in ((os, "replace"), (torch, "save")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            check_refused(capsys, argv, "No space left")
        assert {k: v for k, v in fingerprint(out).items() if k[0] != "."} == before  # drafts
    for error in (MemoryError("Unable to allocate memory"), RuntimeError("else"),
                  torch.OutOfMemoryError("CUDA out of memory. Tried")):
        def fail(*args, **kw):
            raise error
        monkeypatch.setattr(sgu, "train", fail)
        if "else" not in str(error):
            check_refused(capsys, argv, "memory")
        else:
            with pytest.raises(RuntimeError, match="else"):
                command(capsys, *argv)

def test_networks_that_diverged_are_not_scored(copied, finished, tmp_path, capsys, monkeypatch):
    """A loss that is not finite ends the method in one line; NaN is no likelihood."""
    out, argv = copied
    def nan_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
        return sgu.obtuse_loss(score, sde, x0, t, z, weighting, generator) * math.nan
    with monkeypatch.context() as patch:
        patch.setitem(sgu.METHODS, "obtuse", sgu.METHODS["obtuse"]._replace(loss=nan_loss))
        new = tmp_path / "new"
        check_refused(capsys, [*finished[1], "--out", new], "gradient in step 1", "lr")
    assert equal_weights(new / "standard.pt", out / "standard.pt")
    assert not (new / "obtuse.pt").exists()
    monkeypatch.setattr(sgu, "bits_per_dim", lambda *args, **kw: torch.full((4,), math.nan))
    check_refused(capsys, [*argv, "--tasks", "likelihood"], "diverged")

@pytest.mark.parametrize("argv, words", [
    ("--seed 1", "seed 0 -> 1"), ("--steps 9", "steps 8 -> 9"), ("--sde ve", "sde vp -> ve"),
    ("--alpha 0.5", "obtuse.pt"), ("--alpha 0.5", "alpha 0.95 -> 0.5"), ("--lr 0.01", "lr 0.02 ->"),
    ("--sampler-steps 3", "samples_standard.pt"), ("--sampler-steps 3", "2 -> 3"),
    ("--recipe paper", "recipe balanced -> paper"), ("--forget one", "forget two -> one"),
    ("--precision bfloat16", "precision float32 -> bfloat16")])
def test_changed_options_are_refused(argv, words, copied, capsys):
    """In one line that names the option and the file; what is there stays as it is."""
    out, before = copied[0], fingerprint(copied[0])
    check_refused(capsys, [*copied[1], *argv.split()], words, out, "--fresh")
    assert fingerprint(out) == before

def test_changed_data_are_refused_and_moved_ones_are_not(copied, finished, tmp_path, capsys,
                                                         monkeypatch):
    """A data set is known by its content."""
    out, argv = copied
    moved = shutil.copy(finished[1][1], tmp_path / "elsewhere.npz")
    with monkeypatch.context() as patch:
        forbid(patch, *WORK)
        assert command(capsys, *argv, "--dataset", moved)[0] == 0
    write_shapes(moved, labels=np.roll(np.arange(240) % 4, 1))
    check_refused(capsys, [*argv, "--dataset", moved], "judge.pt", "data")

@pytest.mark.parametrize("how", "cut empty text foreign code other_method no_state".split())
def test_damaged_files(how, copied, capsys, monkeypatch):
    """One line names the file, and nothing else is touched."""
    out, argv = copied
    forbid(monkeypatch, *WORK)
    for path in (out / "obtuse.pt", out / "judge.pt", out / "samples_obtuse.pt"):
        whole, saved = path.read_bytes(), sgu.read_file(path)
        if how in ("cut", "empty", "text"):
            path.write_bytes(dict(cut=whole[:len(whole) // 2], empty=b"", text=b"not ours")[how])
        elif how == "other_method":
            shutil.copy(out / "standard.pt", path)
        else:
            del saved["state"]
            torch.save(dict(foreign=tiny_net().state_dict(), code=pathlib.PurePosixPath("x"),
                            no_state=saved)[how], path)
        before = fingerprint(out)
        check_refused(capsys, argv, path)
        assert fingerprint(out) == before
        path.write_bytes(whole)

def test_pretrained(copied, tmp_path, capsys, monkeypatch):
    """An earlier standard.pt gives the fine-tuning of that run, also under another schedule; a file
    of something else and other images will not do."""
    out, argv = copied
    monkeypatch.setattr(sgu, "PRESETS", tiny_presets(channels=(16, 16)))
    pre, new = [*argv, "--pretrained", out / "standard.pt"], tmp_path / "new"
    assert command(capsys, *pre, "--out", new)[0] == 0
    assert equal_weights(new / "obtuse.pt", out / "obtuse.pt")
    for path in (out / "judge.pt", out / "samples_obtuse.pt"):
        check_refused(capsys, [*argv, "--pretrained", path, "--out", tmp_path / "b"], path)
    check_refused(capsys, [*argv, "--pretrained", out, "--out", tmp_path / "b"], out)
    rgb = ["--dataset", write_shapes(tmp_path / "rgb.npz", channels=3), *pre[2:]]
    check_refused(capsys, [*rgb, "--out", tmp_path / "b"], "images with 3 channels")
    assert command(capsys, *pre, "--sde", "ve", "--out", new / "ve")[0] == 0
    first, last = (sgu.read_file(f / "obtuse.pt")["config"] for f in (out, new / "ve"))
    assert (first["sde"], last["sde"]) == ("vp", "ve") and last["start"] == first["start"]

@pytest.mark.parametrize("side", [16, 64])
def test_colour_and_attributes(side, tmp_path, small, capsys):
    """Data of one's own: RGBA, by attribute (16 pixels), and RGB, by class (64, a DDPM); in a
    folder with a space; one image alone has no standard error."""
    own = dict(labels=None, class_names=None, attributes=np.arange(240)[:, None] // [1, 2] % 2,
               attribute_names=["Bangs", "Hat"]) if side == 16 else {}
    path = write_shapes(tmp_path / "mine.npz", side=side, channels=4 if side == 16 else 3, **own)
    out, forget = tmp_path / "with a space", "bangs" if side == 16 else "TWO"
    code, _, said = command(
        capsys, "--dataset", path, *QUICK, "--forget", forget, "--methods", "obtuse", "--out",
        out, "--samples", "3", "--likelihood-samples", "1", "--tasks", "sample,likelihood",
        *(["--sde", "ddpm"] if side == 64 else []))
    assert code == 0, said
    r, name = results_of(out), "Bangs" if side == 16 else "two"
    m, classes = r["methods"]["obtuse"], ["no Bangs", "Bangs"] if side == 16 else NAMES
    assert r["config"]["sde"] == ("vp" if side == 16 else "ddpm") and r["config"]["forget"] == name
    assert list(m["unlearning_ratio"]) == [name, "total", "n", "ci95"]
    assert m["nll_bits_per_dim"]["se"] == {"D_g": None, "D_f": None}
    assert list(m["class_histogram"]) == classes
    opt = sgu.parse_options(shlex.split(r["command"])[2:])
    assert (opt.forget, opt.samples, opt.methods) == (forget, 3, "obtuse"), "the command recorded"
    assert "NaN" not in json.dumps(r)

def test_command_as_a_newcomer_types_it(tmp_path):
    """Real processes: --help names every option; a mistake ends in one line and exit code 2."""
    def run(*argv):
        return subprocess.run([sys.executable, sgu.__file__, *argv], cwd=tmp_path, text=True,
                              capture_output=True)
    shown = run("--help")
    assert shown.returncode == 0 and not shown.stderr
    for name in vars(sgu.Options()):
        assert f"--{name.replace('_', '-')}" in shown.stdout, f"--help does not mention {name}"
    said = run("--dataset", "nope", "--out", "x")
    assert said.returncode == 2 and len(said.stderr.strip().splitlines()) == 1, said.stderr
    assert said.stderr.startswith("sgu: ") and "'nope'" in said.stderr
    assert not list(tmp_path.iterdir()), "a refused command must not leave anything behind"

# ==== toy_gmm.py: closed forms, the limit of unlearning, learned scores, the command ==============

ODD = ((0.3, (-1., 0.5), 0.4), (0.7, (1.5, 1.), 2.0))  # a mixture without any symmetry

def mixture_of(components):
    """The oracle for toy_gmm.py's components (weight, mean) or (weight, mean, variance)."""
    full = [(*c, 1.)[:3] for c in components]
    return Mixture([c[0] for c in full], [list(c[1]) for c in full],
                   [[[c[2], 0], [0, c[2]]] for c in full])

def points(n):
    return 2.5 * torch.randn(n, 2, generator=seeded(), dtype=F64)

@every_sde
def test_toy_posterior(sde):
    """E[z | x] = -s score and E[z z^T | x] = I + s^2 hessian log p + E[z] E[z]^T (Tweedie), by
    automatic differentiation of the oracle's density."""
    for t in (0.05, 0.4, 0.9):
        x, (a, s), tb = points(9), sde.at(t), torch.full((9,), t, dtype=F64)
        log_p, e, C = toy.posterior(ODD, sde, x, tb)
        expect(log_p, mixture_of(ODD).log_prob(x, a, s), "log p_t", 1e-9)
        expect(toy.exact_log_prob(ODD, sde, x, tb), log_p, "log p_t", 1e-12)
        def one(x):
            return mixture_of(ODD).log_prob(x[None], a, s)[0]
        grad = torch.stack([torch.autograd.functional.jacobian(one, xi) for xi in x])
        hessian = torch.stack([torch.autograd.functional.hessian(one, xi) for xi in x])
        expect(e, -s * grad, "E[z | x]", 1e-9)
        expect(toy.exact_score(ODD, sde)(x.float(), tb.float()), grad, "score in float32", 2e-3)
        want = torch.eye(2) + s ** 2 * hessian + e[:, :, None] * e[:, None]
        expect(C, want, "E[z z^T | x]", 1e-8)

def test_toy_samples_and_units():
    """Samples have the mixture's law. Nearest to the middle means within sqrt(2) of it along the
    diagonal: two differences of the normal distribution function. n: 5 standard errors."""
    n, root = 100_000, math.sqrt(2)
    mixture_of(ODD).expect_samples(toy.sample_mixture(ODD, n, seeded()), "sample_mixture", 0.003)
    check_seeded(lambda g: toy.sample_mixture(ODD, 5, g))
    def below(z):
        return 0.5 * (1 + math.erf(z / root))
    for components, share in ((toy.KEEP, below(-root) - below(-3 * root)),
                              (toy.FORGET, 2 * below(root) - 1)):
        x = toy.sample_mixture(components, n, seeded(1))
        got = float(toy.nearest_forgotten(x).float().mean())
        assert abs(got - share) < 5 * math.sqrt(share / n), (got, share)
    assert toy.paper_unit(3.628) == pytest.approx(3.628 / (2 * math.log(2)) + 8)
    assert toy.from_paper_unit(toy.paper_unit(1.234)) == pytest.approx(1.234)

def elementwise(score, sde, x0, t, z, weighting):
    """The rival that squares pixel by pixel."""
    t, e, z = sgu.predict_noise(score, sde, x0, t, z, None)
    return (sgu.loss_weight(sde, t, weighting, 2) * (e * z).square().mean(1)).mean()

@pytest.mark.parametrize("method, alpha, weighting", [
    ("orthogonal", 0.5, "noise"), ("orthogonal", 0.9, "paper"), ("elementwise", 0.5, "noise"),
    ("obtuse", 0.8, "noise"), ("obtuse", 0.85, toy.capped), ("obtuse", 1., "noise"),
    ("relative", 0.7, "noise"), ("neggrad", 0.01, "noise")])
def test_closed_forms_minimise_the_losses_of_sgu_py(method, alpha, weighting):
    """At one (x_t, t) losses depend on the moments of z alone: on batches of z that have exactly
    those of p_g and p_f, Eq. 11 has the gradient 0 at the closed form, and not beside it."""
    sde, n = toy.SDE, 8
    def relative(score, *args, **kw):
        return sgu.relative_loss(score, *args, reference=toy.exact_score(toy.DATA), **kw)
    loss = dict(orthogonal=sgu.orthogonal_loss, obtuse=sgu.obtuse_loss, elementwise=elementwise,
                relative=relative, neggrad=sgu.score_matching_loss)[method]
    for x, t in ((torch.tensor([0.7, -0.4]), 0.55), (torch.tensor([-1.5, 0.8]), 0.65)):
        x, t, batches = x.double()[None], torch.tensor([t], dtype=F64), []
        (a, s), tb = sde.at(t), t.expand(n)
        for i, part in enumerate((toy.KEEP, toy.FORGET)):
            log_p, e, C = toy.posterior(part, sde, x, t)
            z = with_moments(e[0], C[0] - torch.outer(e[0], e[0]), n, i, ddof=0)
            batches.append((log_p.exp(), (x - s * z) / a, z))
        (p_g, x_g, z_g), (p_f, x_f, z_f) = batches
        def slope(e):
            e = e.clone().requires_grad_()
            def score(x, t):
                return (-e / s).expand(len(x), 2)
            keep = sgu.score_matching_loss(score, sde, x_g, t=tb, z=z_g)
            forget = loss(score, sde, x_f, t=tb, z=z_f, weighting=weighting) * (p_f / p_g)
            total = sgu.sgu_loss(keep, forget, alpha)
            if method == "neggrad":
                total = keep - alpha * forget
            return torch.autograd.grad(total.sum(), e)[0].norm()
        best = -s * toy.exact_unlearned_score(method, alpha, weighting=weighting)(x, t)
        assert slope(best) < 1e-6 * slope(best + 1), f"{method}: slope {slope(best)} at the optimum"
    for wrong in (("sideways", 0.5), ("obtuse", 0.), ("orthogonal", 1.5), ("neggrad", 1.)):
        with pytest.raises(ValueError):
            toy.exact_unlearned_score(*wrong)

def test_relative_optimum_is_guidance_by_the_exact_classifier():
    """score_g + v grad log P(g | x_t) by automatic differentiation, v = (1 - alpha)/(2 alpha)
    0.8/0.2."""
    alpha, t, (a, s) = 0.6, torch.full((40,), 0.5, dtype=F64), toy.SDE.at(0.5)
    x = points(40).requires_grad_()
    log_g, log_p = (mixture_of(c).log_prob(x, a, s) for c in (toy.KEEP, toy.DATA))
    guide, = torch.autograd.grad((log_g - log_p).sum(), x)
    want = toy.exact_score(toy.KEEP)(x.detach(), t) + (1 - alpha) / (2 * alpha) * 4 * guide
    got = toy.exact_unlearned_score("relative", alpha)(x.detach(), t)
    assert float(guide.abs().max()) > 0.1
    expect(got, want, "the optimum of the relative loss", 1e-9)

def test_table_1_and_the_likelihood_of_optima():
    """Exact values, measured with 2 million samples: 3.628, 3.872 nats (Standard), 3.524, 5.162
    (Unseen); and of obtuse and orthogonal optima in the paper's unit."""
    for part, nats in ((toy.DATA, (3.628, 3.872)), (toy.KEEP, (3.524, 5.162))):
        for test, want in zip((toy.KEEP, toy.FORGET), nats):
            value = toy.expected_nll(mixture_of(part).log_prob, test)
            assert value == pytest.approx(want, abs=1e-3)
            theirs = toy.expected_nll(lambda x: toy.log_density(part, x), test)
            assert value == pytest.approx(theirs, abs=1e-9)
    for method, alpha, nll in (("obtuse", 0.85, (10.60, 12.52)), ("obtuse", 0.7, (10.92, 14.07)),
                               ("orthogonal", 1 / 3, (11.65, 11.95))):
        score = toy.exact_unlearned_score(method, alpha)
        def log_q(x):
            return sgu.log_likelihood(score, toy.SDE, x, exact=True)
        for part, want in zip((toy.KEEP, toy.FORGET), nll):
            got = toy.paper_unit(toy.expected_nll(log_q, part, step=0.6, reach=5))
            assert got == pytest.approx(want, abs=0.025), (method, alpha)     # they were rounded

def test_limit():
    """The measured table; random densities keep to it; (p_g - mu p_f)/(1 - mu) attains it."""
    f = torch.tensor([11.72, 12.5, 13, 13.84, 15, 18, 22.95, 30, 39.01], dtype=F64)
    g = [10.542, 10.553, 10.562, 10.577, 10.599, 10.654, 10.744, 10.873, 11.038]
    bound = toy.paper_unit(toy.limit(toy.from_paper_unit(f)))
    expect(bound, torch.tensor(g, dtype=F64), "the limit", 3e-4)
    other = ((0.6, (-1., 0.), 1.5), (0.4, (2., 1.), 1.)), ((1., (0., 0.), 4.),)     # p_g/p_f -> 0
    for trial in range(20):
        k, random = 1 + trial % 4, seeded(trial)
        w, v = torch.rand(k, generator=random), 0.2 + 3 * torch.rand(k, generator=random)
        m = 3 * torch.randn(k, 2, generator=random)
        q = tuple(zip((w / w.sum()).tolist(), map(tuple, m.tolist()), v.tolist()))
        for keep, forget in ((toy.KEEP, toy.FORGET), other):
            nll_g, nll_f = (toy.expected_nll(lambda x: toy.log_density(q, x), part, step=0.25)
                            for part in (keep, forget))
            assert nll_g >= toy.limit(nll_f, keep, forget, points=41) - 1e-3, q
    p_g, p_f = mixture_of(toy.KEEP), mixture_of(toy.FORGET)
    for mu in (0.0, 0.005, 0.018):
        def log_q(x):
            return ((p_g.log_prob(x).exp() - mu * p_f.log_prob(x).exp()) / (1 - mu)).log()
        nll_g, nll_f = (toy.expected_nll(log_q, part, step=0.1) for part in (toy.KEEP, toy.FORGET))
        assert nll_g == pytest.approx(toy.limit(nll_f), abs=1e-4)

# How far from the optimum, in nats on D_g and D_f; untrained for forgetting D_f is 1.7 away.
LEARNED = dict(standard=(0.06, 0.2), unseen=(0.08, 0.8), orthogonal=(0.35, 0.3), obtuse=(0.08, 1.4))

@pytest.mark.parametrize("name", LEARNED)
def test_learned_toy_lands_near_the_closed_form(name):
    """A short training against section 2 of toy_gmm.py."""
    g = seeded()
    parts = toy.sample_mixture(toy.KEEP, 16_000, g), toy.sample_mixture(toy.FORGET, 4_000, g)
    for info in toy.train_toy(name, *parts, steps=600, batch_size=256, lr=8e-3):
        pass
    for part, tol in zip((toy.KEEP, toy.FORGET), LEARNED[name]):
        learned, exact = (toy.expected_nll(
            lambda x: sgu.log_likelihood(score, toy.SDE, x.float(), steps=16, exact=True), part,
            step=0.7, reach=4.5) for score in (info["score"], toy.optimum(name)))
        assert abs(learned - exact) < tol, (learned, exact)

def test_toy_command(tmp_path, capsys):
    """It leaves its files, whatever matplotlibrc says, and refuses in one line."""
    import matplotlib
    with matplotlib.rc_context({"text.usetex": True}):
        assert toy.main(["--quick", "--out", str(tmp_path / "toy")]) == 0
    assert {p.name for p in (tmp_path / "toy").iterdir()} == {
        "figure1.png", "figure2.png", "results.json", "table1.md"}
    results, printed = results_of(tmp_path / "toy"), capsys.readouterr().out
    assert set(results["methods"]) == set(toy.METHODS) and "10.64" in printed
    assert (tmp_path / "toy" / "table1.md").read_text(encoding="utf-8") in printed
    (tmp_path / "file").write_text("")
    for argv in (["--out", str(tmp_path / "file")], ["--out", str(tmp_path / "file" / "below")],
                 ["--seed", "x"], ["--seed", "-1"], ["--nonsense"]):
        try:
            code = toy.main(["--quick", *argv])
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr().err
        assert code == 2 and len(said.strip().splitlines()) == 1, (argv, said)
        assert said.startswith("toy_gmm: "), said
