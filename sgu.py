"""Score-based Generative Unlearning (SGU) in one file: train a diffusion model, make it forget a class, measure what is left.

    python sgu.py                                    digits drawn from fonts, nothing to download
    python sgu.py --dataset mnist --forget 3,7       the paper's first experiment
    python sgu.py --help                             every option

Sections 1 to 7 are the method of the paper "Unlearning is better than unseen": 1 schedules (Eq. 3), 2 network, 3 losses (Eq. 5,
8-14), 4 samplers (Eq. 4), 5 likelihood, 6 inpainting and reconstruction, 7 training (Eq. 11). 8 data, 9 the judge and 10 the command
make a program of it. How long it takes and what it yields is in README.md.

Notation, used everywhere:
    x0 ~ D     data; D_g are the images to keep (the paper's SFG), D_f the images to forget (NSFG); p_g, p_f their densities
    x_t        a(t) x0 + s(t) z with z ~ N(0, I) and t in [0, 1], so p_0t(x_t | x0) = N(a x0, s^2 I)
    score      grad_x log p_t(x), always. Any function score(x, t) with x: (B, ...) and t: (B,) will do: a network or a formula
    e          predicted noise, e = -s(t) score(x_t, t); the training target of e is z, the training target of score is u = -z/s
    e_g, e_f   what e would be if trained on D_g or D_f alone to perfection: E[z | x_t] under p_g or p_f
    sigma      s/a, the noise-to-signal ratio: the noise level of x_t/a.  D in a formula is the number of pixels (dimensions)
Squared errors and inner products below are divided by D and in units of this noise, so that a loss's weight means the same on 2 and
on 12,288 dimensions.
"""
import argparse, copy, dataclasses, functools, io, json, math, os, pathlib, platform, shlex, signal, sys, time, zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


def expand(v, x):
    """(B,) -> (B, 1, ..., 1), so that one number per sample multiplies x: (B, ...)."""
    return v.reshape(-1, *[1] * (x.dim() - 1))


# =====================================================================================================================
# 1. Noise schedules.  Eq. 3:  dx = f(x, t) dt + g(t) dw  from data (t = 0) to noise (t = 1)
#
# Each has marginal(t) -> (a, s), the drift f, the diffusion g, and the prior that p_1 is close to. f is linear in x, so
#     a' = (f/x) a   and   d(s^2)/dt = 2 (f/x) s^2 + g^2            (a test checks both by finite differences)
# sigma = s/a, the noise-to-signal ratio, is the clock that all three share; time(sigma) inverts it.
# =====================================================================================================================

class VE:
    """Variance exploding: a = 1, s = sigma_min (sigma_max/sigma_min)^t, so log s is uniform when t is. Defaults: those of the authors' code (the paper names none)."""
    t_min = 0.0                                    # the smallest t that training and samplers visit (s = sigma_min there)

    def __init__(self, sigma_min=0.01, sigma_max=50.):
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def marginal(self, t):
        """t: (B,) in [0, 1] -> a(t): (B,), s(t): (B,)."""
        return torch.ones_like(t), self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def time(self, sigma):
        """The t: (B,) at which s/a equals sigma: (B,)."""
        return (sigma / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)

    def drift(self, x, t):
        """f(x, t): (B, ...)."""
        return torch.zeros_like(x)

    def diffusion(self, t):
        """g(t): (B,)."""
        return self.marginal(t)[1] * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def prior_sample(self, shape, generator=None, device=None):
        """x_1 ~ N(0, sigma_max^2 I): shape."""
        return self.sigma_max * torch.randn(shape, generator=generator, device=device)

    def prior_log_prob(self, x):
        """log N(x; 0, sigma_max^2 I): (B,) in nats, in float64 where the device has it."""
        return normal_log_prob(x, self.sigma_max)


class VP:
    """Variance preserving: f = -beta(t) x / 2, g = sqrt(beta), beta(t) = beta_min + t (beta_max - beta_min), s^2 = 1 - a^2 (Song et al. 2021)."""
    t_min = 1e-4                                   # s(0) = 0, and a score -z/s has no meaning there

    def __init__(self, beta_min=0.1, beta_max=20.):
        self.beta_min, self.beta_max = beta_min, beta_max

    def log_a(self, t):
        return -t ** 2 * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2      # -1/2 int_0^t beta

    def beta(self, t):
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def marginal(self, t):
        """t: (B,) in [0, 1] -> a(t): (B,), s(t): (B,)."""
        log_a = self.log_a(t)
        return log_a.exp(), (-torch.expm1(2 * log_a)).sqrt()         # expm1: exact where s is small

    def time(self, sigma):
        """The t: (B,) at which s/a equals sigma: (B,); from log a = -log(1 + sigma^2)/2 and the quadratic formula."""
        b0, db = self.beta_min, self.beta_max - self.beta_min
        return 2 * torch.log1p(sigma ** 2) / (b0 + (b0 ** 2 + 2 * db * torch.log1p(sigma ** 2)).sqrt())

    def drift(self, x, t):
        """f(x, t): (B, ...)."""
        return -0.5 * expand(self.beta(t), x) * x

    def diffusion(self, t):
        """g(t): (B,)."""
        return self.beta(t).sqrt()

    def prior_sample(self, shape, generator=None, device=None):
        """x_1 ~ N(0, I): shape."""
        return torch.randn(shape, generator=generator, device=device)

    def prior_log_prob(self, x):
        """log N(x; 0, I): (B,) in nats, in float64 where the device has it."""
        return normal_log_prob(x, 1.0)


class DDPM(VP):
    """The discrete chain x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) z, k = 1..n_steps, at t = k / n_steps (Appendix B; Ho et al. 2020).

    At those times marginal() is the chain's own, a^2 = prod_{j<=k} (1 - beta_j). Between them log a is interpolated linearly,
    which makes DDPM a VP process with piecewise constant beta: every sampler and the likelihood of this file accept it.
    """

    def __init__(self, n_steps=1000, beta_min=1e-4, beta_max=0.02):
        self.n_steps, self.t_min = n_steps, 1 / n_steps
        self.betas = torch.linspace(beta_min, beta_max, n_steps, dtype=torch.float64)
        self.knots = F.pad(torch.log1p(-self.betas).cumsum(0) / 2, (1, 0))               # log a at k = 0..n_steps

    def step(self, t):
        """The chain's step k: (B,) in 1..n_steps that ends at or after t: (B,)."""
        return (t * self.n_steps - 1e-4).ceil().long().clamp(1, self.n_steps)

    def log_a(self, t):
        k, knots = self.step(t), self.knots.to(t)
        return knots[k] + (knots[k] - knots[k - 1]) * (t * self.n_steps - k)

    def beta(self, t):
        return -self.n_steps * torch.log1p(-self.betas.to(t))[self.step(t) - 1]

    def time(self, sigma):
        """The t: (B,) at which s/a equals sigma: (B,); log a = -log(1 + sigma^2)/2 is linear between the knots."""
        log_a, knots = -torch.log1p(sigma ** 2) / 2, self.knots.to(sigma)
        k = torch.searchsorted(-knots, -log_a).clamp(1, self.n_steps)
        return (k - (log_a - knots[k]) / (knots[k - 1] - knots[k])) / self.n_steps


def normal_log_prob(x, std):
    """log N(x; 0, std^2 I) summed over all axes but the first: (B, ...) -> (B,) in nats."""
    x = wide(x).flatten(1)
    return -0.5 * (x / std).square().sum(1) - x.shape[1] * math.log(std * math.sqrt(2 * math.pi))


def wide(x):
    """x in float64; on the CPU if its device has no float64 (Apple's mps)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


# =====================================================================================================================
# 2. The network: a small U-Net, and the score made from it
# =====================================================================================================================

class Block(nn.Module):
    """Residual block: two 3x3 convolutions; the time embedding scales and shifts the second one's input."""

    def __init__(self, c_in, c_out, c_emb):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.film = nn.Linear(c_emb, 2 * c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight), nn.init.zeros_(self.conv2.bias)             # every block starts as its skip path

    def forward(self, x, emb):                                                         # x: (B, c_in, h, w), emb: (B, c_emb)
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)                # each (B, c_out, 1, 1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the h*w positions of the coarsest level."""

    def __init__(self, c, heads=4):
        super().__init__()
        self.heads, self.norm, self.qkv, self.out = heads, nn.GroupNorm(8, c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(3, 4).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v)                                    # (B, heads, h*w, c/heads)
        return x + self.out(y.transpose(2, 3).reshape(b, c, h, w))


class UNet(nn.Module):
    """Time-conditioned U-Net, (B, C, H, W), (B,) -> (B, C, H, W).

    The second argument is log(sigma)/4, about -1 to 1: all the network knows of t. channels: one width per level, multiples of 8.
    patch folds patch x patch pixels into channels first, so that no convolution runs at full resolution: for 28x28 digits
    patch=2 costs a quarter of the arithmetic. H and W must divide by patch * 2^(levels - 1).
    """

    def __init__(self, image_channels=1, channels=(64, 128), blocks=1, patch=2, attention=True):
        super().__init__()
        self.config = dict(image_channels=image_channels, channels=list(channels), blocks=blocks, patch=patch, attention=attention)
        c_emb, self.patch = 4 * channels[0], patch
        self.register_buffer("freqs", torch.linspace(0, math.log(30), 16).exp())       # up to 30: tells levels 1/30 apart
        self.embed = nn.Sequential(nn.Linear(32, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb), nn.SiLU())
        self.inp = nn.Conv2d(image_channels * patch ** 2, channels[0], 3, padding=1)
        self.down, self.up, widths, c = nn.ModuleList(), nn.ModuleList(), [], channels[0]
        for level, width in enumerate(channels):
            if level > 0:
                self.down.append(nn.Conv2d(c, width, 3, stride=2, padding=1)); c = width
            for _ in range(blocks):
                self.down.append(Block(c, width, c_emb)); c = width
                widths.append(c)
        self.mid = nn.ModuleList([Block(c, c, c_emb), Attention(c) if attention else nn.Identity(), Block(c, c, c_emb)])
        for level, width in reversed(list(enumerate(channels))):
            for _ in range(blocks):
                self.up.append(Block(c + widths.pop(), width, c_emb)); c = width
            if level > 0:
                self.up.append(nn.Conv2d(c, channels[level - 1], 3, padding=1)); c = channels[level - 1]
        self.norm, self.out = nn.GroupNorm(8, c), nn.Conv2d(c, image_channels * patch ** 2, 3, padding=1)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, level):                               # x: (B, C, H, W), level: (B,) is log(sigma) / 4
        angles = level[:, None] * self.freqs                   # (B, 16)
        emb = self.embed(torch.cat([angles.sin(), angles.cos()], dim=1))
        with torch.autocast(x.device.type, enabled=False):     # bfloat16 rounds a pixel near 1 by 1/256: as much as the faintest noise
            h = self.inp(F.pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last))
        skips = []
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, Block) else layer(h)
            if isinstance(layer, Block):
                skips.append(h)
        h = self.mid[2](self.mid[1](self.mid[0](h, emb)), emb)
        for layer in self.up:
            if isinstance(layer, Block):
                h = layer(torch.cat([h, skips.pop()], dim=1), emb)
            else:
                h = layer(F.interpolate(h, scale_factor=2, mode="nearest"))
        return F.pixel_shuffle(self.out(F.silu(self.norm(h))), self.patch)


def make_score(model, sde, data_std=0.5, precision="float32"):
    """The function score(x, t) = -e/s of a network F = model(input, log(sigma)/4).

    Preconditioning (Karras et al. 2022, their Table 1): with y = x/a = x0 + sigma z and total^2 = sigma^2 + data_std^2,
        denoised = (data_std/total)^2 y + (sigma data_std/total) F(y/total, log(sigma)/4)
    so that F has unit-variance inputs and targets at every noise level and need not learn e ~ y/sigma at high noise. Solved for
    e = (y - denoised)/sigma this is the last line. data_std: standard deviation of the data, about 0.5 for images in [-1, 1]; the
    same in training and use. precision: 'float32' or 'bfloat16' for F.
    """
    def score(x, t):
        a, s = (expand(v, x) for v in sde.marginal(t))
        sigma = s / a
        total = (sigma ** 2 + data_std ** 2).sqrt()                                    # the standard deviation of y
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            f = model(x / a / total, sigma.flatten().log() / 4).float()
        return -(sigma * x / a / total ** 2 - data_std / total * f) / s
    return score


# =====================================================================================================================
# 3. Losses.  Eq. 5, 8, 12 (keep), Eq. 9, 13 (orthogonal), Eq. 10, 14 (obtuse), Eq. 11 (their sum)
#
#                          noise units, mean over D pixels      the e(x_t) that minimises Eq. 11 (derived in notebook 8)
#     score matching       mean_i (e_i - z_i)^2                 e_g                          (alone)
#     SGU-Orthogonal       (e.z / D)^2, an INNER product        (I + R C/D)^-1 e_g           shrinks e: bounded, leaves noise
#     SGU-Obtuse           e.z / D                              e_g - (R/2) e_f              flees from e_f: unbounded as p_f/p_g grows
#     SGU-Relative, ours   e.(z - e_ref) / D                    e_g - (R/2) (e_f - e_ref)    guided away from D_f: bounded
#
# with R = (1 - alpha) p_f(x_t) / (alpha p_g(x_t)), times the forget weight over the keep weight, and C = E[z z^T | x_t] under p_f.
#
# Signs: score = -e/s and u = -z/s, so score.u = e.z/s^2. Obtuse MINIMISES e.z: it turns the score away from the forgotten data.
# Weights (weighting=):
#     'noise'   weight 1 on the formulas above: the default here, because no noise level can drown the others. train() has its own
#     'paper'   the paper's lambda(t). Continuous: s^2 times the formula in score units, hence 1 for Eq. 5, 8, 10 and 1/s^2 for Eq. 9.
#               DDPM: the variational weight beta_k / (2 (1 - beta_k)(1 - abar_k)), Eq. 12 with sigma_k^2 = beta_k, on the formulas above
#     a function of t: (B,) -> weight (B,): anything else
# =====================================================================================================================

def predict_noise(score, sde, x0, t, z, generator):
    """Noise x0 and let score say what the noise was. Returns t: (B,), e and z: (B, D); draws t ~ U[t_min, 1] and z if None."""
    if t is None:
        t = torch.rand(len(x0), generator=generator, device=x0.device)
        t = sde.step(t) / sde.n_steps if isinstance(sde, DDPM) else sde.t_min + (1 - sde.t_min) * t
    if z is None:
        z = torch.randn(x0.shape, generator=generator, device=x0.device)
    a, s = (expand(v, x0) for v in sde.marginal(t))
    e = -s * score(a * x0 + s * z, t)
    return t, e.flatten(1), z.flatten(1)


def loss_weight(sde, t, weighting, power=0):
    """The weight (B,) of the table above; power is the power of 1/s that lambda(t) leaves on the loss ('paper', continuous)."""
    if callable(weighting):
        return weighting(t)
    if weighting == "noise":
        return torch.ones_like(t)
    if weighting != "paper":
        raise ValueError(f"weighting must be 'noise', 'paper' or a function of t, not {weighting!r}")
    if isinstance(sde, DDPM):
        beta = sde.betas.to(t)[sde.step(t) - 1]
        return beta / (2 * (1 - beta) * sde.marginal(t)[1] ** 2)
    return sde.marginal(t)[1] ** -power


def score_matching_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
    """Eq. 5, 8 and 12: mean_i (e_i - z_i)^2, averaged over the batch. x0: (B, ...) -> scalar >= 0, per pixel."""
    t, e, z = predict_noise(score, sde, x0, t, z, generator)
    return (loss_weight(sde, t, weighting) * (e - z).square().mean(1)).mean()


def orthogonal_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
    """Eq. 9 and 13: (e.z / D)^2, a squared inner product, averaged over the batch. x0: (B, ...) from D_f -> scalar >= 0.

    The square is outside the sum over pixels, so it costs nothing to keep what is perpendicular to z. Written elementwise,
    mean_i (e_i z_i)^2, it would shrink every pixel by itself.
    """
    t, e, z = predict_noise(score, sde, x0, t, z, generator)
    return (loss_weight(sde, t, weighting, power=2) * (e * z).mean(1).square()).mean()


def obtuse_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
    """Eq. 10 and 14: e.z / D = s^2 score.u / D, averaged over the batch. x0: (B, ...) from D_f -> scalar of either sign.

    Descending it makes the angle between score and u obtuse. It has no lower bound: the keep loss and few steps hold it.
    """
    t, e, z = predict_noise(score, sde, x0, t, z, generator)
    return (loss_weight(sde, t, weighting) * (e * z).mean(1)).mean()


def relative_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None, *, reference):
    """Ours: obtuse relative to a frozen score, e.(z - e_ref) / D. x0: (B, ...) from D_f -> scalar of either sign.

    reference: Standard's score(x, t). In the mean over z descending it moves e by -(e_f - e_ref): not at all where D_f and D call for
    the same noise. It is half of NegGrad, made linear at the reference, and bounded because e_ref comes close to e_f wherever p_f dominates.
    Its optimum with the keep loss, e_g - (R/2)(e_f - e_ref), is classifier guidance without a classifier:
    score = score_g + w grad log P(g | x_t), w = (1 - alpha)/(2 alpha) |D_g|/|D_f|, for equal keep and forget weights (notebook 8).
    """
    t, e, z = predict_noise(score, sde, x0, t, z, generator)
    with torch.no_grad():
        e_ref = predict_noise(reference, sde, x0, t, z.view_as(x0), generator)[1]
    return (loss_weight(sde, t, weighting) * (e * (z - e_ref)).mean(1)).mean()


def neggrad_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
    """Rival NegGrad+ (Kurmanji et al. 2023; the paper's Eq. 7 taken literally): minus the keep loss on D_f, without lower bound.

    x0: (B, ...) from D_f -> scalar <= 0.
    """
    return -score_matching_loss(score, sde, x0, t, z, weighting, generator)


def erasediff_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None, centre=0.5):
    """Rival EraseDiff (Wu et al. 2024): aim e on D_f at uniform noise of mean centre, 0.5 as published.

    x0: (B, ...) from D_f -> scalar >= 0. Alone its optimum is the constant e = centre, a uniform push (for centre = 0 none at all, as for the
    elementwise 'orthogonal'); with the keep loss it is (e_g + R centre)/(1 + R).
    """
    t, e, z = predict_noise(score, sde, x0, t, z, generator)
    aim = torch.rand(e.shape, generator=generator, device=e.device) - 0.5 + centre
    return (loss_weight(sde, t, weighting) * (e - aim).square().mean(1)).mean()


erasediff_zero_loss = functools.partial(erasediff_loss, centre=0.0)


def sgu_loss(score, sde, x_g, x_f, alpha, forget_loss=orthogonal_loss, weighting="noise", generator=None):
    """Eq. 11: alpha keep(x_g) + (1 - alpha) forget(x_f). x_g: (B, ...) from D_g, x_f: (B', ...) from D_f -> scalar."""
    return (alpha * score_matching_loss(score, sde, x_g, weighting=weighting, generator=generator)
            + (1 - alpha) * forget_loss(score, sde, x_f, weighting=weighting, generator=generator))


# =====================================================================================================================
# 4. Samplers.  Eq. 4, from t = 1 down:  dx = [f(x, t) - g(t)^2 score(x, t)] dt + g(t) dw
#
# All but the DDPM's chain share one grid of times, evenly spaced in sigma^(1/7) (Karras et al. 2022): steps in sigma shrink with sigma,
# steps in log sigma (VE's t) grow towards data.
# The grid and its coefficients are float64 numbers on the CPU; images stay float32 on their device. All end with one step to
# the mean E[x0 | x_t] = (x + s^2 score)/a, which removes the last, invisible noise.
# =====================================================================================================================

def time_grid(sde, steps, t_max=1.0, rho=7):
    """steps + 1 times from t_max down to sde.t_min, float64 on the CPU. rho = 7: Karras et al. 2022."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    ends = torch.tensor([t_max, sde.t_min], dtype=torch.float64)
    a, s = sde.marginal(ends)
    first, last = (s / a) ** (1 / rho)
    t = sde.time(torch.linspace(0, 1, steps + 1, dtype=torch.float64).mul(last - first).add(first) ** rho)
    t[0], t[-1] = ends
    return t


def score_at(score, x, t):
    """score at one time t (a float or 0-d tensor) for the whole batch x: (B, ...)."""
    return score(x, torch.full((len(x),), float(t), dtype=x.dtype, device=x.device))


def noise_like(x, generator):
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def denoise(score, sde, x, t):
    """E[x0 | x_t] = (x + s^2 score)/a (Tweedie): the mean image behind x: (B, ...) at time t."""
    a, s = map(float, sde.marginal(torch.as_tensor(t, dtype=torch.float64)))
    return (x + s ** 2 * score_at(score, x, t)) / a


def reverse_step(score, sde, x, t, t_next, generator):
    """One Euler-Maruyama step of Eq. 4 from t down to t_next."""
    dt, g, tb = float(t - t_next), float(sde.diffusion(t)), t.reshape(1).to(x)
    return x - (sde.drift(x, tb) - g ** 2 * score_at(score, x, t)) * dt + g * math.sqrt(dt) * noise_like(x, generator)


def ancestral_step(score, sde, x, t, t_next, generator):
    """One step from t down to t_next, drawn from q(x_{t_next} | x_t, x_0), with the mean image behind x for x_0 (Ho et al. 2020, their Eq. 7).

    y = x/a goes to m + r^2 (y - m) + sigma_next sqrt(1 - r^2) z, with m the mean image and r = sigma_next/sigma. If m is the image, the noise
    left is what t_next calls for, however long the step (what x_0 may still differ from m is left out). Euler-Maruyama's, whose score lags
    behind, settles at 1/r (VE) to 1/r^2 (VP, faint noise) times that variance.
    """
    (a, a_next), (s, s_next) = (v.tolist() for v in sde.marginal(torch.stack([t, t_next])))
    mean, r2 = denoise(score, sde, x, t), (s_next / a_next * a / s) ** 2
    return a_next * (mean + r2 * (x / a - mean)) + s_next * math.sqrt(1 - r2) * noise_like(x, generator)


def langevin_step(score, sde, x, t, snr, generator):
    """One corrector step, x + eps score + sqrt(2 eps) z with eps = 2 (snr s(t))^2: leaves p_t as it is, up to O(eps).

    The popular step 2 (snr |z|/|score|)^2 divides by a norm that unlearning can bring to 0 and that ties the batch together.
    Where the noise can be told from the image (e close to z), |z|/|score| is s(t), and s(t) is what we use.
    """
    eps = 2 * (snr * float(sde.marginal(t)[1])) ** 2
    return x + eps * score_at(score, x, t) + math.sqrt(2 * eps) * noise_like(x, generator)


@torch.no_grad()
def euler_maruyama(score, sde, shape, steps=200, generator=None, device=None):
    """Samples of Eq. 4 by Euler-Maruyama. shape: (B, ...) -> x: (B, ...), for images near [-1, 1]; steps + 1 network
    evaluations. Below about 20 steps those around sigma = 2 overshoot; ode_sample needs fewer."""
    x = sde.prior_sample(shape, generator, device)
    grid = time_grid(sde, steps)
    for t, t_next in zip(grid, grid[1:]):
        x = reverse_step(score, sde, x, t, t_next, generator)
    return denoise(score, sde, x, grid[-1])


@torch.no_grad()
def predictor_corrector(score, sde, shape, steps=100, snr=0.16, corrector_steps=1, generator=None, device=None):
    """Euler-Maruyama, each step followed by Langevin corrections (Song et al. 2021, whose snr is 0.16). steps*(1 + corrector_steps) + 1 evaluations."""
    x = sde.prior_sample(shape, generator, device)
    grid = time_grid(sde, steps)
    for t, t_next in zip(grid, grid[1:]):
        x = reverse_step(score, sde, x, t, t_next, generator)
        for _ in range(corrector_steps):
            x = langevin_step(score, sde, x, t_next, snr, generator)
    return denoise(score, sde, x, grid[-1])


@torch.no_grad()
def ode_sample(score, sde, shape, steps=25, generator=None, device=None):
    """Samples of the probability flow dx/dt = f - g^2 score / 2, by Heun's method. 2*steps + 1 network evaluations.

    Substituting y = x/a and sigma = s/a turns this equation into dy/dsigma = e = -s score for all three schedules: the 1/2 goes
    into d(sigma^2) = (g/a)^2 dt. In y and sigma paths are nearly straight, so few steps do (Karras et al. 2022).
    """
    grid = time_grid(sde, steps)
    a, s = sde.marginal(grid)
    y, sigma = sde.prior_sample(shape, generator, device) / float(a[0]), s / a
    e_at = lambda y, i: -float(s[i]) * score_at(score, float(a[i]) * y, grid[i])
    for i in range(steps):
        h, e = float(sigma[i + 1] - sigma[i]), e_at(y, i)
        y = y + h / 2 * (e + e_at(y + h * e, i + 1))
    return denoise(score, sde, float(a[-1]) * y, grid[-1])


@torch.no_grad()
def ancestral_sample(score, sde, shape, steps=None, generator=None, device=None):
    """Samples by ancestral_step, x: shape: DDPM's own sampler, and for VE and VP a better one than Euler-Maruyama where steps are few.

    steps: for a DDPM a part of its chain, evenly spread, or all of it (None), steps evaluations; else 100 or as many as given, and one to end.
    Of the two variances of Ho et al. this is the posterior's; the other, beta, leaves noise where steps of the chain are skipped.
    """
    if chain := isinstance(sde, DDPM):
        n = sde.n_steps
        if not 1 <= (steps := n if steps is None else steps) <= n:
            raise ValueError(f"ancestral steps must be in 1..{n}, not {steps}")
        grid = torch.linspace(n, 0, steps + 1, dtype=torch.float64).round() / n
    else:
        grid = time_grid(sde, 100 if steps is None else steps)
    x = sde.prior_sample(shape, generator, device)
    for t, t_next in zip(grid, grid[1:]):
        x = ancestral_step(score, sde, x, t, t_next, generator)
    return x if chain else denoise(score, sde, x, grid[-1])                            # the chain's last step, to s = 0, ends at the mean


# =====================================================================================================================
# 5. Likelihood: the instantaneous change of variables along the probability flow dx/dt = f - g^2 score / 2
#
#     log p_0(x_0) = log p_1(x_1) + int div_x (dx/dt) dt
#
# Substituted like ode_sample, and once more: w = y/c with c = sqrt(1 + sigma^2) has unit scale at every noise level, and in
# l = log sigma the flow is smooth:  dw/dl = sigma (e - sigma w/c)/c,  div_w (dw/dl) = sigma div_y e - D sigma^2/c^2.
# Sixteen steps of the classical Runge-Kutta method then do what hundreds of Heun steps in t do.
#
# One evaluation costs one forward pass and one vector-Jacobian product: e gives the path, v.(de/dy v) with random signs v the
# divergence (Hutchinson), or all D rows of the Jacobian give it exactly. The grid is fixed and the signs of an image are seeded
# by the image itself, so that its likelihood does not depend on the batch it comes in.
# =====================================================================================================================

def own_generators(x, generator):
    """One CPU generator per sample of x: (B, ...), seeded by the sample itself and one draw from generator."""
    seed = int(torch.randint(2 ** 62, (1,), generator=generator, device=generator.device if generator else None))
    return [torch.Generator().manual_seed(seed ^ zlib.crc32(xi.detach().cpu().float().numpy().tobytes())) for xi in x]


def log_likelihood(score, sde, x, steps=16, probes=1, exact=False, generator=None):
    """log p(x) under the probability flow of score. x: (B, ...) -> (B,) in nats, float64; 4*steps evaluations of network and gradient.

    Strictly log p_t at t = sde.t_min, the density of the data with their least noise (VE: sigma 0.01, about one level of 256).
    probes: random sign vectors per evaluation. exact: the divergence from D gradients, for few dimensions. Error of the grid:
    with exact=True compare with twice the steps, it falls sixteenfold (Runge-Kutta of order four); probes add their own.
    """
    d, signs = x[0].numel(), own_generators(x, generator)
    ends = torch.tensor([sde.t_min, 1.], dtype=torch.float64)
    a, s = sde.marginal(ends)
    lo, hi = (s / a).log()
    log_sigma = torch.linspace(0, 1, 2 * steps + 1, dtype=torch.float64).mul(hi - lo).add(lo)    # knots and midpoints, data to noise
    grid = sde.time(log_sigma.exp())
    grid[0], grid[-1] = ends
    a, s = sde.marginal(grid)
    sigma, c, h = s / a, (1 + (s / a) ** 2).sqrt(), float(hi - lo) / steps

    def flow(w, i):
        """dw/dl and its divergence at knot i."""
        with torch.enable_grad():
            y = (float(c[i]) * w).detach().requires_grad_()
            e = -float(s[i]) * score_at(score, float(a[i]) * y, grid[i])
            if exact:
                flat = e.flatten(1).unbind(1)                                          # D tensors (B,); row j of the Jacobian from flat[j]
                div = wide(sum(torch.autograd.grad(ej.sum(), y, retain_graph=True)[0].flatten(1)[:, j] for j, ej in enumerate(flat)))
            else:
                div = 0
                for k in range(probes):
                    v = torch.stack([torch.randint(2, y.shape[1:], generator=g) for g in signs]).to(y) * 2 - 1
                    vjp, = torch.autograd.grad((e * v).sum(), y, retain_graph=k + 1 < probes)    # v (de/dy), one backward pass for the batch
                    div = div + wide((vjp * v).flatten(1).sum(1)) / probes
        q = float(sigma[i] / c[i])
        return q * (e.detach() - q * w), float(sigma[i]) * div - d * q ** 2

    w, log_p = x.detach() / float(a[0] * c[0]), 0.0
    for i in range(0, 2 * steps, 2):
        k1, d1 = flow(w, i)
        k2, d2 = flow(w + h / 2 * k1, i + 1)
        k3, d3 = flow(w + h / 2 * k2, i + 1)
        k4, d4 = flow(w + h * k3, i + 2)
        w = w + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        log_p = log_p + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return log_p + sde.prior_log_prob(float(a[-1] * c[-1]) * w) + d * float((a[-1] * c[-1] / (a[0] * c[0])).log())


def levels_of(x):
    """The 8-bit levels 0..255 of images x: (...) in [-1, 1], uint8."""
    if float(x.min()) < -1 or float(x.max()) > 1:
        raise ValueError(f"a likelihood in bits/dim needs images in [-1, 1]; these span [{float(x.min()):.3g}, {float(x.max()):.3g}]")
    return ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


def to_levels(x):
    """Generated images, clamped to [-1, 1] -> uint8 on the CPU. Raises FloatingPointError for NaN, which would pass for black."""
    if x.isnan().any():
        raise FloatingPointError("the images are not numbers (NaN): network or sampler has diverged; train with a lower --lr, or leave this method out")
    return levels_of(x.clamp(-1, 1)).cpu()


def from_levels(x):
    """uint8 -> the middle of each level's cell in [-1, 1]."""
    return (x + 0.5) / 128 - 1


def bits_per_dim(score, sde, x, steps=16, probes=1, exact=False, generator=None):
    """Negative log-likelihood of 8-bit images in bits/dim. x: (B, C, H, W) in [-1, 1] -> (B,).

    Uniform dequantisation first: level k in 0..255 becomes y = 2 (k + u)/256 - 1 with u ~ U[0, 1). Divided by 128 per pixel, a
    density over y becomes one over levels; hence -log2 p(y)/D + 7 (the paper's code leaves +8, right for data in [0, 1], in its tables).
    Raises ValueError for images outside [-1, 1].
    """
    levels = levels_of(x)
    jitter = torch.stack([torch.rand(x.shape[1:], generator=g) for g in own_generators(levels, generator)])
    nats = log_likelihood(score, sde, (levels + jitter.to(x)) / 128 - 1, steps, probes, exact, generator)
    return -nats / (x[0].numel() * math.log(2)) + 7


@torch.no_grad()
def variational_bound(score, sde, x, terms=100, generator=None):
    """The bound on bits/dim of a chain sde: DDPM, -ELBO (Ho et al. 2020, Eq. 5). x: (B, C, H, W) in [-1, 1] -> (B,).
    Of the whole chain, each step with variance beta_k; ancestral_sample draws with the posterior's, and may skip steps.

        KL(q(x_N | x_0) || N(0, I)) + sum_{k=2}^{N} KL(q(x_{k-1} | x_k, x_0) || p(x_{k-1} | x_k)) - log P(levels | x_1)

    The k-th KL is the variational weight of Eq. 12 times |e - z|^2, plus what p's variance beta_k costs against the posterior's.
    terms: how many of the N - 1 middle terms are evaluated, evenly spread with a random offset (an unbiased estimate of the sum).
    """
    levels = levels_of(x)
    x0, n, d = from_levels(levels), sde.n_steps, x[0].numel()
    a, s = sde.marginal(torch.ones(1, dtype=torch.float64))
    prior = 0.5 * (float(a) ** 2 * wide(x0).square().flatten(1).sum(1) + d * float(s ** 2 - 1 - (s ** 2).log()))
    terms = min(terms, n - 1)
    offset = float(torch.rand(1, generator=generator, device=x.device))
    middle = 0
    for k in (2 + (torch.arange(terms, dtype=torch.float64) + offset) * (n - 1) / terms).long().tolist():
        t = torch.full((len(x),), k / n, device=x.device)
        _, e, z = predict_noise(score, sde, x0, t, None, generator)
        beta = float(sde.betas[k - 1])
        s, s_before = sde.marginal(torch.tensor([k, k - 1], dtype=torch.float64) / n)[1].tolist()
        ratio = (s_before / s) ** 2                                                     # posterior variance / beta_k
        mean = beta / (2 * (1 - beta) * s ** 2) * wide((e - z).square().sum(1))
        middle = middle + (mean + d / 2 * (-math.log(ratio) - 1 + ratio)) * (n - 1) / terms
    t, beta = torch.full((len(x),), 1 / n, device=x.device), float(sde.betas[0])
    a, s = map(float, sde.marginal(torch.tensor([1 / n], dtype=torch.float64)))
    x1 = a * x0 + s * noise_like(x0, generator)
    mean = wide((x1 + beta * score(x1, t)) / math.sqrt(1 - beta))
    cdf = lambda edge: torch.special.ndtr((edge / 128 - 1 - mean) / math.sqrt(beta))
    lower, upper = cdf(wide(levels)), cdf(wide(levels) + 1)
    lower, upper = torch.where(wide(levels) == 0, 0., lower), torch.where(wide(levels) == 255, 1., upper)
    first = -(upper - lower).clamp(min=1e-12).log().flatten(1).sum(1)
    return (prior + middle + first) / (d * math.log(2))


def dequantise(levels, generator=None):
    """uint8 levels (B, ...) -> 2 (k + u)/256 - 1 in [-1, 1], u ~ U[0, 1) new at every call."""
    jitter = torch.rand(levels.shape, generator=generator, device=levels.device)
    return (levels + jitter) / 128 - 1


# =====================================================================================================================
# 6. Zero-shot uses of a score: inpainting (Table 3) and reconstruction (Table 4)
# =====================================================================================================================

@torch.no_grad()
def inpaint(score, sde, x, mask, steps=40, repeats=10, generator=None):
    """Fill the pixels where mask is 0. x: (B, C, H, W), mask: the same shape or one that broadcasts, 1 = known -> (B, C, H, W).

    From pure noise; before every evaluation the known pixels are replaced by themselves at that noise level. Replacing alone does
    not sample the conditional law (the unknown pixels were drawn without knowing them), so every step is gone back, by forward
    noise, and taken again repeats times (Lugmayr et al. 2022); steps*repeats + 1 network evaluations.
    Unknown pixels of x are dropped first, so the answer cannot leak, and known pixels come back bit for bit.
    """
    known = mask.to(x.device).bool().expand_as(x)
    x = torch.where(known, x, torch.zeros_like(x))
    grid = time_grid(sde, steps)

    def pin(y, t):
        a, s = map(float, sde.marginal(t))
        return torch.where(known, a * x + s * noise_like(x, generator), y)

    (a, s), y = sde.marginal(grid), pin(sde.prior_sample(x.shape, generator, x.device), grid[0])
    for i in range(steps):
        for r in range(repeats):
            if r > 0:                          # back up to grid[i]: x_i = up x_{i+1} + noise of variance s_i^2 - up^2 s_{i+1}^2
                up = float(a[i] / a[i + 1])
                y = pin(up * y + math.sqrt(max(float(s[i]) ** 2 - (up * float(s[i + 1])) ** 2, 0)) * noise_like(x, generator), grid[i])
            y = pin(reverse_step(score, sde, y, grid[i], grid[i + 1], generator), grid[i + 1])
    return torch.where(known, x, denoise(score, sde, y, grid[-1]))


@torch.no_grad()
def reconstruct(score, sde, x, t=0.02, steps=20, generator=None):
    """Noise x: (B, ...) to time t, then walk Eq. 4 back to data: (B, ...). A score changed at these noise levels may miss the way back.

    The paper's t = 0.02 is faint noise: sigma = 0.08 for VP, and for VE 0.012, from where every network finds back. SGU-Relative's
    forget loss acts at sigma 0.2 to 3 alone, so it hardly changes here. Raises ValueError for t outside [0, 1].
    """
    if not 0 <= t <= 1:
        raise ValueError(f"reconstruct needs t in [0, 1], not {t}")
    if t <= sde.t_min:
        return x.clone()
    grid = time_grid(sde, steps, t_max=t)
    a, s = map(float, sde.marginal(grid[0]))
    y = a * x + s * noise_like(x, generator)
    for now, then in zip(grid, grid[1:]):
        y = reverse_step(score, sde, y, now, then, generator)
    return denoise(score, sde, y, grid[-1])


# =====================================================================================================================
# 7. Training.  Eq. 11 by Adam: Standard (D), Unseen (D_g alone), SGU from scratch or from Standard's weights (D_g and D_f)
#
# Which t to train at matters more than anything else in a short run. The paper's t ~ U[0, 1] is uniform in log sigma for VE. Here only every
# k-th draw is; the others sit where images take shape: digits around sigma = 1; photographs, whose textures drown in less noise, around 0.3, by
# the law of Karras et al. 2022 (their Table 1). Notebook 03 has what that is worth. The keep loss is weighted by 1 + (sigma/data_std)^2, which
# makes the loss of the preconditioned network F equally large at every noise level (the same paper). NegGrad and SISS are that loss with another
# sign, and get the same weight. Orthogonal and obtuse are made of e.z, which is of order 1 at every noise level where (e - z)^2 is small, and so
# is EraseDiff's distance to a noise of its own: the square root of that weight makes their gradients at F equally large. The relative loss gets
# the full weight, which keeps its optimum a guided score. And where sigma > 6 noise hides the class, p_f and p_g coincide and forgetting only
# fights keeping: see window. All this was found by trying; METHODS in section 10 holds what was found for each loss.
# =====================================================================================================================

DIGIT_NOISE, PHOTO_NOISE = (0., 1.5, 2), (-1.2, 1.2, 32)       # noise laws (centre, spread, k), see sample_times


def sample_times(sde, n, generator=None, device=None, window=(0., 1.), noise_law=DIGIT_NOISE):
    """n stratified training times in window: (n,). noise_law (centre, spread, k): log sigma ~ N(centre, spread^2), but every k-th uniform."""
    centre, spread, k = noise_law
    ends = torch.tensor([max(window[0], sde.t_min), window[1]], dtype=torch.float64)
    a, s = sde.marginal(ends)
    lo, hi = (s / a).log().tolist()
    u = (torch.arange(n, device=device) + torch.rand(n, generator=generator, device=device)) / n
    u = u[torch.randperm(n, generator=generator, device=device)]                       # so that both laws cover (0, 1)
    below = lambda v: 0.5 * (1 + math.erf((v - centre) / spread / math.sqrt(2)))        # P(log sigma < v)
    p = (below(lo) + u * (below(hi) - below(lo))).clamp(1e-6, 1 - 1e-6)
    shape = centre + spread * torch.special.ndtri(p.cpu() if p.device.type == "mps" else p).to(p.device)          # mps has no ndtri
    log_sigma = torch.where(torch.arange(n, device=device) % k == 0, lo + u * (hi - lo), shape)
    t = sde.time(log_sigma.clamp(lo, hi).exp()).clamp(float(ends[0]), float(ends[1]))
    return sde.step(t) / sde.n_steps if isinstance(sde, DDPM) else t                    # the discrete chain trains at its own times


def keep_weight(sde, data_std=0.5):
    """The weight 1 + (sigma/data_std)^2 of the keep loss, as a function of t."""
    def weight(t):
        a, s = sde.marginal(t)
        return 1 + (s / a / data_std) ** 2
    return weight


def forget_weight(sde, data_std=0.5):
    """The weight sqrt(1 + (sigma/data_std)^2) of losses that stay of order 1 in noise, as a function of t."""
    return lambda t: keep_weight(sde, data_std)(t).sqrt()


def saliency_mask(model, sde, forget, forget_loss, *, window=(0., 1.), weighting=None, batches=10, batch_size=64, train_share=0.5, seed=0,
                  precision="float32", data_std=0.5, noise_law=DIGIT_NOISE):
    """Rival SalUn (Fan et al. 2024): an edit_gradient that trains only half of the weights: largest |sum of forget gradients|.

    window, weighting, noise_law: those with which the forget loss will train; None: forget_weight.
    """
    score, g = make_score(model, sde, data_std, precision), torch.Generator(forget.device).manual_seed(seed)
    model.zero_grad(set_to_none=True)
    for _ in range(batches):
        t = sample_times(sde, batch_size, g, forget.device, window, noise_law)
        forget_loss(score, sde, draw(forget, batch_size, g), t=t, weighting=weighting or forget_weight(sde, data_std), generator=g).backward()
    saliency = torch.cat([p.grad.abs().flatten() for p in model.parameters()])
    threshold = saliency.kthvalue(max(1, round((1 - train_share) * len(saliency)))).values
    masks = [p.grad.abs() > threshold for p in model.parameters()]
    model.zero_grad(set_to_none=True)

    def edit(model):
        for p, mask in zip(model.parameters(), masks):
            p.grad.mul_(mask)
    return edit


def fisher_penalty(model, sde, keep, *, strength=100.0, batches=50, batch_size=8, seed=0, precision="float32", data_std=0.5,
                   noise_law=DIGIT_NOISE):
    """Rival elastic weights (Kirkpatrick et al. 2017): an edit_gradient that adds the gradient of
    strength sum_i F_i (theta_i - theta0_i)^2, which keeps what the kept data need near Standard's weights theta0.

    F is the diagonal Fisher information of the keep loss at theta0, estimated as the mean squared gradient of small batches.
    """
    score, g = make_score(model, sde, data_std, precision), torch.Generator(keep.device).manual_seed(seed)
    start, fisher = [p.detach().clone() for p in model.parameters()], [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(batches):
        model.zero_grad(set_to_none=True)
        t = sample_times(sde, batch_size, g, keep.device, noise_law=noise_law)
        score_matching_loss(score, sde, draw(keep, batch_size, g), t=t, weighting=keep_weight(sde, data_std), generator=g).backward()
        for f, p in zip(fisher, model.parameters()):
            f.add_(p.grad.square(), alpha=1 / batches)
    model.zero_grad(set_to_none=True)

    def edit(model):
        for p, p0, f in zip(model.parameters(), start, fisher):
            p.grad.add_(2 * strength * f * (p.detach() - p0))
    return edit


def draw(data, n, generator):
    """n random images of data: uint8 (dequantised to [-1, 1]) or float (as they are)."""
    x = data[torch.randint(len(data), (n,), generator=generator, device=data.device)]
    return dequantise(x, generator) if x.dtype == torch.uint8 else x


def train(model, ema, sde, keep, forget=None, forget_loss=None, alpha=1.0, *, steps, batch_size=128, lr=1e-3, warmup=100,
          ema_decay=0.999, window=(0., 1.), weighting=None, forget_weighting=None, precision="float32", data_std=0.5, seed=0,
          state=None, compile=False, forget_ratio=None, edit_gradient=None, noise_law=DIGIT_NOISE):
    """Train model in place by Eq. 11, ema following it; a generator that yields after every step: for info in train(...): ...

    model: a network (x, log(sigma)/4) -> the shape of x, for make_score with the same data_std; ema: copy.deepcopy(model), the averaged
    weights that one samples from. keep, forget: (N, ...) uint8 or float tensors on the model's device; alpha = 1 ignores forget.
    forget_loss: any function with the signature of obtuse_loss. window: the times t at which it acts; noise_law: see sample_times.
    weighting, forget_weighting: 'noise', 'paper' or a function of t; None: keep_weight and forget_weight. R of section 3 has their ratio.
    forget_ratio: rescale the forget gradient to this share of the keep gradient's norm, whatever alpha (the step of SISS, Alberti et al.
    2025, without its importance sampling). edit_gradient: called as edit_gradient(model) before every step (saliency_mask, fisher_penalty).
    state: what snapshot() returned, to go on from there. Gradients are clipped to norm 1.
    Yields dict(step, steps, keep, forget, snapshot): the weighted losses; snapshot() -> dict for torch.save, before the next step.
    Raises FloatingPointError at the first non-finite loss, naming the step and the time t; ValueError for forget without a forget_loss.
    """
    if forget is not None and forget_loss is None:
        raise ValueError("forget needs a forget_loss, for instance obtuse_loss")
    device = keep.device
    score = make_score(torch.compile(model) if compile else model, sde, data_std, precision)
    weighting, forget_weighting = weighting or keep_weight(sde, data_std), forget_weighting or forget_weight(sde, data_std)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99))             # 0.999 is slow for a run this short
    # Two streams of random numbers: with alpha = 1 the keep stream, hence the result, is that of plain training, bit for bit.
    streams = [torch.Generator(device).manual_seed(2 * seed + i) for i in (0, 1)]
    done = 0
    if state is not None:
        model.load_state_dict(state["model"]), ema.load_state_dict(state["ema"]), optimiser.load_state_dict(state["optimiser"])
        done = state["step"]
        for g, saved in zip(streams, state["streams"]):
            g.set_state(saved.cpu())
    else:
        ema.load_state_dict(model.state_dict())        # its decay, small at first, drops them: a slow average keeps Standard, who knows the class

    def term(loss_fn, data, g, w, window, n):
        x0, t = draw(data, n, g), sample_times(sde, n, g, device, window, noise_law)
        loss = loss_fn(score, sde, x0, t=t, weighting=w, generator=g)
        if not torch.isfinite(loss):
            with torch.no_grad():
                bad = [f"{ti:.4f}" for xi, ti in zip(x0, t) if not torch.isfinite(loss_fn(score, sde, xi[None], t=ti[None], weighting=w))]
            which = "keep" if loss_fn is score_matching_loss else "forget"
            raise FloatingPointError(f"the {which} loss is {float(loss.detach())} at step {done + 1}, t = {', '.join(bad[:3]) or 'any'}; lower the learning rate, or raise alpha to give "
                                     "the forget loss a smaller share")
        return loss

    def snapshot():
        return dict(model=model.state_dict(), ema=ema.state_dict(), optimiser=optimiser.state_dict(), step=done,
                    streams=[g.get_state() for g in streams])

    while done < steps:
        lr_now = lr * min((done + 1) / min(warmup, steps), 1) * 0.5 * (1 + math.cos(math.pi * done / steps))
        for group in optimiser.param_groups:
            group["lr"] = lr_now
        loss_g = term(score_matching_loss, keep, streams[0], weighting, (0., 1.), batch_size)
        total, loss_f = alpha * loss_g, torch.zeros(())
        if forget is not None and alpha < 1:
            loss_f = term(forget_loss, forget, streams[1], forget_weighting, window, batch_size)
            total = total + (1 - alpha) * loss_f
        optimiser.zero_grad(set_to_none=True)
        if forget_ratio is None or not loss_f.requires_grad:
            total.backward()
        else:
            loss_f.backward()
            forget_norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            forget_grads = [p.grad / forget_norm.clamp(min=1e-12) for p in model.parameters()]
            optimiser.zero_grad(set_to_none=True)
            loss_g.backward()
            keep_norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            for p, g in zip(model.parameters(), forget_grads):
                p.grad.add_(g, alpha=float(forget_ratio * keep_norm))
        if edit_gradient is not None:
            edit_gradient(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        done += 1
        decay = min(ema_decay, (1 + done) / (10 + done))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        yield dict(step=done, steps=steps, keep=float(loss_g.detach()), forget=float(loss_f.detach()), snapshot=snapshot)


# =====================================================================================================================
# 8. Data: tensors of uint8 in memory, (N, C, H, W), with integer labels (N,). No worker processes, nothing to wait for
# =====================================================================================================================

class UsageError(Exception):
    """Something the user can mend; the command prints it as one line and exits with 2."""


DIGITS = [str(i) for i in range(10)]
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
DATASETS = dict(        # name: (default --forget, default --sde, the files torchvision looks for below --data-root)
    glyphs=("3,7", "ve", ""),
    mnist=("3,7", "ve", "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz"),
    fashion=("Sneaker", "ve", "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz"),
    kmnist=("0", "ve", "KMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz"),
    cifar10=("automobile,dog", "vp", "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"),
    stl10=("airplane", "vp", "stl10_binary/{train,test}_{X,y}.bin and class_names.txt"),
    celeba=("Bangs", "vp", "celeba/{img_align_celeba/*.jpg,list_attr_celeba.txt,list_eval_partition.txt,...}"),
)


def load_data(name, root="data"):
    """A data set as dict(name, train, train_labels, test, test_labels, classes).

    name: one of DATASETS, or the path of an .npz with images (N, H, W) or (N, H, W, C) uint8, labels (N,) or attributes (N, A) (0 or -1: no),
    and, if you like, class_names or attribute_names, and split (N,) whose highest number, 1 or more, is for testing: 0, 1, or 0, 1, 2
    with a validation part that is trained on (without split a random sixth is for testing).
    torchvision downloads what is missing below root. Labels of attribute data are (N, A) bool; see choose(). Raises UsageError saying
    which file to put where.
    """
    if name.endswith(".npz"):
        return load_npz(name)
    if name == "glyphs":
        train, test = draw_glyphs(12000, seed=0), draw_glyphs(2000, seed=1)
        return dict(name=name, train=train[0], train_labels=train[1], test=test[0], test_labels=test[1], classes=DIGITS)
    if name not in DATASETS:
        raise UsageError(f"unknown data set {name!r}; choose from {', '.join(DATASETS)}, or give the path of an .npz file")
    import contextlib
    from torchvision import datasets
    loaders = dict(mnist=datasets.MNIST, fashion=datasets.FashionMNIST, kmnist=datasets.KMNIST, cifar10=datasets.CIFAR10,
                   stl10=datasets.STL10, celeba=datasets.CelebA)
    files = DATASETS[name][2]
    try:
        with contextlib.redirect_stdout(io.StringIO()):                               # torchvision talks about every mirror it tries
            if name in ("stl10", "celeba"):
                parts = [loaders[name](root, split=split, download=True) for split in ("train", "test")]
            else:
                parts = [loaders[name](root, train=train, download=True) for train in (True, False)]
            data = dict(name=name, classes=[c for c in getattr(parts[0], "classes", None) or parts[0].attr_names if c])     # CelebA's list ends in ''
            for part, split in zip(parts, ("train", "test")):
                data[split], data[split + "_labels"] = to_tensors(part, name)
    except Exception as error:                                                         # torchvision parses what it finds, in many ways
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if isinstance(error, OSError) or "ownload" in reason or "orrupted" in reason:
            raise UsageError(f"data set {name} is not complete below {root} and cannot be downloaded ({reason}); put {files} into {root}") from None
        folder = pathlib.Path(root, files.split("/")[0])
        raise UsageError(f"a data file of {name} in {folder} is damaged ({reason}); delete {folder} and run again, or put {files} into {root}") from None
    if name in ("mnist", "kmnist"):
        data["classes"] = DIGITS
    return data


def to_tensors(part, name):
    """A torchvision data set -> images (N, C, H, W) uint8 (STL-10 and CelebA at 64x64), labels (N,) int64 or (N, 40) bool."""
    if name == "celeba":
        crop = lambda image: torch.from_numpy(np.array(image.crop((15, 35, 163, 183)).resize((64, 64), 4)))   # centre 148, box filter
        return torch.stack([crop(part[i][0]) for i in range(len(part))]).permute(0, 3, 1, 2).contiguous(), part.attr[:, :40].bool()
    x = torch.as_tensor(np.asarray(part.data))
    if name == "cifar10":
        x = x.permute(0, 3, 1, 2).contiguous()
    elif name == "stl10":
        x = resize(x, 64)
    else:
        x = x[:, None]
    y = torch.as_tensor(np.asarray(part.labels if name == "stl10" else part.targets)).long()
    if len(x) != len(y) or int(y.max()) > 9:
        raise ValueError(f"{len(x)} images but {len(y)} labels from {int(y.min())} to {int(y.max())}")
    return x, y


def resize(x, side):
    """uint8 (N, C, H, W) -> (N, C, side, side), antialiased, in pieces of 1,000 images."""
    shrink = lambda part: F.interpolate(part.float(), size=(side, side), mode="bilinear", antialias=True).round().clamp(0, 255).to(torch.uint8)
    return torch.cat([shrink(part) for part in x.split(1000)])


def load_npz(path):
    """The documented route for data of your own: see load_data."""
    try:
        with np.load(path) as z:
            z = {k: z[k] for k in z.files}
        kind, dims = ("attribute", 2) if "attributes" in z else ("class", 1)
        x, y = torch.from_numpy(z["images"]), torch.from_numpy(z["attributes"] if dims == 2 else z["labels"])
        y = y > 0 if dims == 2 else y.long()
        if "split" in z:
            split = torch.from_numpy(z["split"] == max(z["split"].max(initial=0), 1))  # 2 in CelebA, whose 0 and 1 are trained on
        else:
            split = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) % 6 == 5
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except Exception as error:
        raise UsageError(f"{path} is damaged, has no 'images' and 'labels' (or 'attributes'), or its 'split' is not of numbers: {type(error).__name__}: {error}") from None
    if x.dtype != torch.uint8 or x.dim() not in (3, 4) or x.shape[1] != x.shape[2]:
        raise UsageError(f"{path}: images must be square and uint8, (N, H, W) or (N, H, W, C); found {x.dtype} {tuple(x.shape)}")
    if y.dim() != dims or split.dim() != 1 or not len(x) == len(y) == len(split) > 0:
        raise UsageError(f"{path}: {len(x)} images need as many labels (N,) or attributes (N, A), and split (N,) if any; found {tuple(y.shape)} and {tuple(split.shape)}")
    highest = y.shape[1] - 1 if dims == 2 else int(y.max())
    if dims == 1 and highest >= len(x) and "class_names" not in z:
        raise UsageError(f"{path}: labels must count from 0; these reach {highest}, with {len(x)} images")
    names = [str(n) for n in z.get(f"{kind}_names", range(highest + 1))]
    if highest >= len(names) or dims == 1 and int(y.min()) < 0:
        raise UsageError(f"{path}: {len(names)} names for the {kind} numbers {int(y.min()) if dims == 1 else 0} to {highest}")
    x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
    if x.shape[2] > 64:
        x = resize(x, 64)
    content = functools.reduce(lambda crc, part: zlib.crc32(part.contiguous().numpy(), crc), (x, y, split), 0)           # a changed file is another run
    return dict(name=pathlib.Path(path).stem, content=content, train=x[~split], train_labels=y[~split], test=x[split], test_labels=y[split], classes=names)


def draw_glyphs(n, seed, side=28):
    """n digits from the fonts that matplotlib ships, each shifted, rotated, scaled, slanted and thickened at random.

    -> images (n, 1, side, side) uint8, white on black, labels (n,) int64. Nothing is downloaded; the same seed draws the same digits.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    fonts = ("DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic "
             "STIXGeneral STIXGeneralBol STIXGeneralItalic cmr10 cmss10 cmtt10")
    plates = []                                                                         # every digit of every font, large
    for font in fonts.split():
        for digit in DIGITS:
            figure = Figure(figsize=(1, 1), dpi=64, facecolor="black")
            canvas = FigureCanvasAgg(figure)
            path = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", font + ".ttf")
            figure.text(0.5, 0.5, digit, font=path, size=58, color="white", ha="center", va="center_baseline")
            canvas.draw()
            plates.append(np.asarray(canvas.buffer_rgba())[:, :, 0].copy())
    plates = torch.from_numpy(np.stack(plates)).float()[:, None] / 255                  # (fonts * 10, 1, 64, 64)
    thick = torch.stack([plates, F.max_pool2d(plates, 3, 1, 1), F.max_pool2d(plates, 5, 1, 2)])     # (3, fonts * 10, 1, 64, 64)
    g = torch.Generator().manual_seed(seed)
    rand = lambda lo, hi: lo + (hi - lo) * torch.rand(n, generator=g)
    which, stroke = torch.randint(len(plates), (n,), generator=g), torch.randint(3, (n,), generator=g)
    angle, scale, slant, dx, dy = rand(-0.15, 0.15), rand(0.9, 1.1), rand(-0.1, 0.1), rand(-0.08, 0.08), rand(-0.08, 0.08)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    affine = torch.stack([cos, -sin + slant, dx, sin, cos, dy], dim=1).view(n, 2, 3)
    images = []
    for i in torch.arange(n).split(2000):
        grid = F.affine_grid(affine[i], (len(i), 1, 2 * side, 2 * side), align_corners=False)
        images.append(F.avg_pool2d(F.grid_sample(thick[stroke[i], which[i]], grid, align_corners=False), 2))
    return (torch.cat(images) * 255).round().clamp(0, 255).to(torch.uint8), which % 10


def choose(data, forget):
    """Split a data set by what to forget: 'automobile,dog' or '3,7' or 'Bangs' (names in any case, or numbers).

    Adds chosen (their names) and forget (class numbers) to data, and turns attribute data into two classes, 'no Bangs' and 'Bangs'.
    """
    names, numbers = data["classes"], []
    for word in forget.split(","):
        word = word.strip()
        if not word:
            raise UsageError("--forget is empty: name at least one class, for instance --forget 3,7")
        matches = [i for i, name in enumerate(names) if name == word] or [i for i, name in enumerate(names) if name.lower() == word.lower()]
        if not matches and word.isdecimal() and int(word) < len(names):
            matches = [int(word)]
        if not matches:
            raise UsageError(f"--forget {forget}: no class {word!r} in {data['name']}; choose from {', '.join(names)}")
        if len(matches) > 1:
            raise UsageError(f"--forget {forget}: {word!r} may be any of {', '.join(f'{names[i]} ({i})' for i in matches)}; write it as it stands there, or its number")
        if matches[0] in numbers:
            raise UsageError(f"--forget {forget}: {names[matches[0]]} is listed twice")
        numbers += matches
    data = dict(data, chosen=",".join(names[i] for i in numbers))
    if data["train_labels"].dim() == 2:
        for key in ("train_labels", "test_labels"):
            data[key] = data[key][:, numbers].any(1).long()
        chosen = "+".join(names[i] for i in numbers)
        names, numbers = [f"no {chosen}", chosen], [1]
    if len(numbers) == len(names):
        raise UsageError(f"--forget {forget}: nothing would be left to keep")
    reserved = ("total", "n", "ci95")                                                   # what else a ratio in results.json consists of
    data.update(classes=[f"class {name}" if name in reserved else name for name in names], forget=numbers)
    for key in ("train", "test"):
        if not 0 < int(is_forgotten(data, key).sum()) < len(data[key]):
            raise UsageError(f"--forget {forget}: the {key} images of {data['name']} have nothing to forget or nothing to keep")
    return data


def is_forgotten(data, key):
    """(N,) bool: which of data['train'] or data['test'] are to be forgotten."""
    return torch.isin(data[key + "_labels"], torch.tensor(data["forget"]))


# =====================================================================================================================
# 9. The judge: a classifier trained on the real data. It says what a sample shows (unlearning ratio), how sure it is, and,
# by the distance of its features, how far kept samples are from kept images. That distance is NOT the FID: another network.
# =====================================================================================================================

class Judge(nn.Module):
    """A nine-layer residual network, (B, C, H, W) in [-1, 1] -> logits (B, K); features(x): (B, 8 width)."""

    def __init__(self, image_channels, classes, width):
        super().__init__()
        def conv(c_in, c_out, pool):
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(),
                                 nn.MaxPool2d(2) if pool else nn.Identity())
        self.config = dict(image_channels=image_channels, classes=classes, width=width)
        w = width
        self.stem, self.two = conv(image_channels, w, False), conv(w, 2 * w, True)
        self.res2, self.four = nn.Sequential(conv(2 * w, 2 * w, False), conv(2 * w, 2 * w, False)), conv(2 * w, 4 * w, True)
        self.eight, self.res8 = conv(4 * w, 8 * w, True), nn.Sequential(conv(8 * w, 8 * w, False), conv(8 * w, 8 * w, False))
        self.head = nn.Linear(8 * w, classes)
        self.to(memory_format=torch.channels_last)

    def features(self, x):
        large, x = x.shape[2] > 32, self.stem(x.contiguous(memory_format=torch.channels_last))
        x = self.two(F.max_pool2d(x, 2) if large else x)                                # 64 pixels: from here on as 32 are seen
        x = self.eight(self.four(x + self.res2(x)))
        return (x + self.res8(x)).amax((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


def train_judge(data, width=16, epochs=4, lr=6e-3, batch_size=256, flip=False, precision="float32", device="cpu", seed=0):
    """A Judge of data, by AdamW, one cycle of the rate, random shifts (and flips), label smoothing; a generator that yields
    (step, steps, judge) after every step; the judge is ready when it is exhausted: for step, steps, judge in train_judge(data): pass."""
    x, y = data["train"].to(device), data["train_labels"].to(device)
    if len(x) < 2 * batch_size:
        batch_size = max(len(x) // 16, 2)                                               # a handful of images still wants some steps an epoch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(x.shape[1], len(data["classes"]), width).to(device)
    g = torch.Generator().manual_seed(seed)
    per_epoch = max(len(x) // batch_size, 1)
    steps = epochs * per_epoch
    optimiser = torch.optim.AdamW(judge.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.2 if steps > 9 else 0.3)       # 0.2 of 5 steps divides by 0
    pad = max(x.shape[2] // 14, 2)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=g)
        batch = order[step % per_epoch * batch_size:][:batch_size].to(device)
        i, j, mirror = *torch.randint(2 * pad + 1, (2,), generator=g).tolist(), flip and torch.rand(1, generator=g) < 0.5
        image = F.pad(x[batch].float() / 127.5 - 1, [pad] * 4, value=-1.)[:, :, i:i + x.shape[2], j:j + x.shape[3]]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = F.cross_entropy(judge(image.flip(3) if mirror else image), y[batch], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        yield step + 1, steps, judge
    judge.eval()


class ClipJudge(nn.Module):
    """CLIP as the paper uses it: zero-shot class prompts; features(x) are its normalised image embeddings. Needs open_clip.

    weights: a name or a file that open_clip.create_model accepts, or None for random weights (tests).
    """

    def __init__(self, classes, name="ViT-B-32", weights="openai"):
        super().__init__()
        try:
            import open_clip
        except ImportError:
            raise UsageError("--judge clip needs open_clip: pip install open_clip_torch, or use --judge cnn") from None
        try:
            self.clip = open_clip.create_model(name, pretrained=weights).eval().requires_grad_(False)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(f"--judge clip: the weights {weights} of {name} are not here and cannot be fetched ({reason}); use --judge cnn") from None
        size = self.clip.visual.image_size
        self.size = size[0] if isinstance(size, (tuple, list)) else size
        tokens = open_clip.get_tokenizer(name)([f"a photo of {'the digit ' if c.isdigit() else ''}{c}" for c in classes])
        with torch.no_grad():
            self.register_buffer("text", F.normalize(self.clip.encode_text(tokens), dim=1))
        self.register_buffer("mean", torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None])
        self.register_buffer("std", torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None])

    def features(self, x):                                                              # (B, C, H, W) in [-1, 1] -> (B, F)
        x = F.interpolate(x.expand(-1, 3, -1, -1), size=(self.size, self.size), mode="bicubic", antialias=True)
        return F.normalize(self.clip.encode_image(((x + 1) / 2 - self.mean) / self.std), dim=1)

    def head(self, f):
        return 100 * f @ self.text.T


@torch.no_grad()
def opinions(judge, x):
    """x: (N, C, H, W) uint8 -> the judge's probabilities (N, K) and features (N, F), float32 on the CPU."""
    device, probs, features = next(judge.parameters()).device, [], []
    judge.eval()
    for part in x.split(500):
        f = judge.features(part.to(device).float() / 127.5 - 1)
        features.append(f.float().cpu())
        probs.append(judge.head(f).softmax(1).float().cpu())
    return torch.cat(probs), torch.cat(features)


def shows_forgotten(judge, data, images):
    """(N,) bool: which images (N, C, H, W) uint8 the judge calls one of the classes to forget."""
    return torch.isin(opinions(judge, images)[0].argmax(1), torch.tensor(data["forget"]))


def wilson(k, n, z=1.959964):
    """95% interval [lo, hi] of a proportion k/n (Wilson), a fraction."""
    centre, spread = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return [max(0.0, centre - spread), min(1.0, centre + spread)]


def frechet(f1, f2):
    """Squared Frechet distance of the Gaussians fitted to features f1: (N, F) and f2: (M, F); N and M at least 2."""
    (m1, c1), (m2, c2) = ((f.double().mean(0), torch.cov(f.double().T)) for f in (f1, f2))
    root = lambda c: (lambda l, v: (v * l.clamp(min=0).sqrt()) @ v.T)(*torch.linalg.eigh(c))
    r = root(c1)
    return max(float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * root(r @ c2 @ r).trace()), 0.0)


def judged(probs, features, data, reference):
    """What the results say of generated images. probs: (N, K), features: (N, F), reference: features (M, F) of real D_g images.

    -> dict(unlearning_ratio with a share per forgotten class, total, n and ci95; unsure, class_histogram, frechet_kept), shares in [0, 1].
    unsure: no class reaches 1/2. None for two classes, one of which always does.
    """
    n, classes = probs.shape
    label, forgotten = probs.argmax(1), torch.tensor(data["forget"])
    hit = torch.isin(label, forgotten)
    share = {data["classes"][c]: int((label == c).sum()) / n for c in range(classes)}
    kept = features[~hit]
    return dict(unlearning_ratio={**{data["classes"][c]: share[data["classes"][c]] for c in data["forget"]},
                                  "total": int(hit.sum()) / n, "n": n, "ci95": wilson(int(hit.sum()), n)},
                unsure=int((probs.amax(1) < 0.5).sum()) / n if classes > 2 else None, class_histogram=share,
                frechet_kept=frechet(kept, reference) if min(len(kept), len(reference)) > 1 else None)


# =====================================================================================================================
# 10. The command: python sgu.py --dataset mnist --forget 3,7
# =====================================================================================================================

# How to fine-tune: (share of --steps, share of --lr, the noise levels sigma at which the forget loss acts, the forget loss's weight).
# What harms the longer it acts gets few, small steps. The optimum of the relative loss is bounded, and it can take its time; guidance
# pays where digits are decided, and only there. NegGrad and SISS are BRIEF with the weight of squares. Section 7 says why.
BRIEF, LONG = (0.09, 0.5, (0., 6.), forget_weight), (0.15, 1.0, (0.2, 3.), keep_weight)
SQUARES = BRIEF[:3] + (keep_weight,)
METHODS = dict(             # name: (what it is trained on, forget loss, its default alpha, how to fine-tune)
    standard=("D", None, 1.0, LONG),
    unseen=("D_g", None, 1.0, LONG),
    orthogonal=("D_g, D_f", orthogonal_loss, 0.8, BRIEF),
    obtuse=("D_g, D_f", obtuse_loss, 0.85, BRIEF),
    relative=("D_g, D_f", relative_loss, 0.55, LONG),              # ours: obtuse relative to Standard
    finetune=("D_g", None, 1.0, LONG),                             # the rivals: see section 3 and train()
    neggrad=("D_g, D_f", neggrad_loss, 0.95, SQUARES),
    siss=("D_g, D_f", neggrad_loss, 0.9, SQUARES),              # 1 - alpha: the forget gradient's share of the keep gradient
    erasediff=("D_g, D_f", erasediff_loss, 0.9, BRIEF),
    erasediff_zero=("D_g, D_f", erasediff_zero_loss, 0.9, BRIEF),
    salun=("D_g, D_f", obtuse_loss, 0.85, BRIEF),
    fisher=("D_g, D_f", neggrad_loss, 0.95, SQUARES),
)
TITLES = dict(standard="Standard", unseen="Unseen", orthogonal="SGU-Orthogonal", obtuse="SGU-Obtuse", relative="SGU-Relative", finetune="fine-tuning",
              neggrad="NegGrad+", siss="SISS", erasediff="EraseDiff", erasediff_zero="EraseDiff, mean 0", salun="SalUn mask, obtuse", fisher="NegGrad+, Fisher")
SAMPLERS = dict(em=euler_maruyama, pc=predictor_corrector, ode=ode_sample, ancestral=ancestral_sample)
EVALUATIONS = dict(em=1, pc=2, ode=2, ancestral=1)                  # of the network in one step

TASKS = ("sample", "likelihood", "inpaint", "reconstruct")

# What fits a machine. side of the image, kind of device -> network, training, how much to measure, network evaluations a sample.
PRESETS = {
    ("glyphs", "cpu"): dict(channels=(16, 32), patch=2, blocks=1, steps=1150, batch_size=64, lr=8e-3, samples=400, evaluations=60, likelihood_samples=20, noise_law=DIGIT_NOISE, judge=(8, 3)),
    (28, "cpu"): dict(channels=(32, 64), patch=2, blocks=1, steps=5000, batch_size=64, lr=5e-3, samples=2000, evaluations=120, likelihood_samples=100, noise_law=DIGIT_NOISE, judge=(8, 5)),
    (28, "gpu"): dict(channels=(64, 128), patch=2, blocks=2, steps=6000, batch_size=256, lr=2e-3, samples=10000, evaluations=120, likelihood_samples=1000, noise_law=DIGIT_NOISE, judge=(32, 8)),
    (32, "cpu"): dict(channels=(48, 96), patch=2, blocks=1, steps=8000, batch_size=64, lr=3e-3, samples=500, evaluations=100, likelihood_samples=100, noise_law=PHOTO_NOISE, judge=(16, 10)),
    (32, "gpu"): dict(channels=(192, 384), patch=2, blocks=1, steps=20000, batch_size=256, lr=1e-3, samples=10000, evaluations=100, likelihood_samples=500, noise_law=PHOTO_NOISE, judge=(64, 24)),
    (64, "cpu"): dict(channels=(32, 64, 128), patch=2, blocks=1, steps=3000, batch_size=32, lr=2e-3, samples=500, evaluations=100, likelihood_samples=32, noise_law=PHOTO_NOISE, judge=(16, 10)),
    (64, "gpu"): dict(channels=(96, 192, 384), patch=2, blocks=1, steps=20000, batch_size=128, lr=1e-3, samples=10000, evaluations=100, likelihood_samples=250, noise_law=PHOTO_NOISE, judge=(64, 30)),
}
PRESETS["stl10", "cpu"] = PRESETS[64, "cpu"] | dict(judge=(16, 20))                     # its judge has 5,000 images to learn from
PRESETS["stl10", "gpu"] = PRESETS[64, "gpu"] | dict(judge=(64, 80))


def option(default, text, **kw):
    return dataclasses.field(default=default, metadata=dict(help=text, **kw))


@dataclasses.dataclass
class Options:
    """Every option of the command. None means: the preset of this data set and device (PRESETS), printed at the start."""
    dataset: str = option("glyphs", "glyphs (drawn from fonts), mnist, fashion, kmnist, cifar10, stl10, celeba, or the path of an .npz")
    forget: str = option(None, "what to forget: class or attribute names or numbers, separated by commas", metavar="3,7")
    methods: str = option("standard,unseen,orthogonal,obtuse,relative", "which models to make, of " + ", ".join(METHODS))
    training: str = option("finetune", "how models with a forget loss are made: fine-tuned from Standard, or retrained from scratch (relative, salun and fisher, which look at Standard, are always fine-tuned)", choices=("finetune", "retrain"))
    pretrained: str = option(None, "a standard.pt of an earlier run to start from instead of training Standard", metavar="FILE")
    sde: str = option(None, "noise schedule (default ve for glyphs, mnist, fashion and kmnist, else vp)", choices=("ve", "vp", "ddpm"))
    alpha: float = option(None, "weight of the keep loss in Eq. 11, in [0, 1]; 1 - alpha weighs the forget loss (default: the method's own, in METHODS)")
    forget_window: str = option(None, "times t between which the forget loss acts (default: the method's own)", metavar="LO,HI")
    weighting: str = option("balanced", "weight of the forget loss: balanced over noise levels (the method's own, in METHODS), noise units, or the paper's lambda(t); the keep loss stays balanced", choices=("balanced", "noise", "paper"))
    steps: int = option(None, "training steps of Standard and Unseen")
    unlearn_steps: int = option(None, "fine-tuning steps of the SGU models (default: the method's own, 9 or 15%% of --steps)")
    batch_size: int = option(None, "images per step")
    lr: float = option(None, "peak learning rate of Adam")
    unlearn_lr: float = option(None, "peak learning rate of the fine-tuning (default: the method's own, --lr or half of it)")
    sampler: str = option(None, "for the task sample: em, pc, ode, or ancestral (default em for ve, else ancestral); the tasks inpaint and reconstruct take em's steps", choices=tuple(SAMPLERS))
    sampler_steps: int = option(None, "sampler steps (default: as many as spend the evaluations of the network that the preset allows a sample)")
    samples: int = option(None, "images to draw from each model")
    likelihood_samples: int = option(None, "test images of D_g and of D_f whose likelihood is computed; as many are inpainted and reconstructed")
    judge: str = option("cnn", "who judges: our own network trained on the data, or CLIP through open_clip where it is installed", choices=("cnn", "clip"))
    tasks: str = option("sample,likelihood", "what to measure: sample, likelihood, inpaint, reconstruct")
    device: str = option("auto", "auto (cuda where there is one, else cpu), cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = option(None, "arithmetic of the networks, but for likelihoods, which are always float32 (default bfloat16 on cuda, else float32)", choices=("float32", "bfloat16"))
    compile: bool = option(False, "torch.compile the network: pays in long runs on a GPU")
    seed: int = option(0, "one number decides everything random")
    data_root: str = option("data", "folder of the data sets; missing files are downloaded there", metavar="DIR")
    out: str = option(None, "folder of the results (default runs/<dataset>-<forget>, then -<sde> if not the default, -retrain)", metavar="DIR")
    fresh: bool = option(False, "delete what an earlier run left in --out and start over")


def parse_options(argv=None):
    """argv -> Options; one line and exit code 2 for what argparse can judge alone."""
    parser = argparse.ArgumentParser(prog="sgu.py", description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"sgu: {message}\n")
    for field in dataclasses.fields(Options):
        meta = {k: v for k, v in field.metadata.items()}
        if field.default is None:
            meta["default"] = argparse.SUPPRESS                                         # the help text says where it comes from
        if field.type is bool:
            parser.add_argument("--" + field.name.replace("_", "-"), action="store_true", help=meta["help"])
        else:
            parser.add_argument("--" + field.name.replace("_", "-"), type=field.type, **{"default": field.default, **meta})
    return Options(**vars(parser.parse_args(argv)))


def resolve(opt):
    """Fill in presets and check everything that can be checked before any work. Returns (opt, device, data)."""
    def require(ok, message):
        if not ok:
            raise UsageError(message)
    opt = dataclasses.replace(opt)
    kinds = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if opt.device == "auto":
        opt.device = "cuda" if kinds["cuda"] else "cpu"
    require(kinds[opt.device], f"--device {opt.device}: this machine or this build of torch has none; use --device cpu")
    opt.precision = opt.precision or ("bfloat16" if opt.device == "cuda" else "float32")
    opt.methods, opt.tasks = (",".join(word.strip() for word in words.split(",")) for words in (opt.methods, opt.tasks))
    methods = opt.methods.split(",")
    for name in methods:
        require(name in METHODS, f"--methods: unknown method {name!r}; choose from {', '.join(METHODS)}")
    require(len(set(methods)) == len(methods), f"--methods {opt.methods}: a method is listed twice")
    tuned = [m for m in methods if fine_tuned(m, opt)]
    require(not opt.pretrained or "standard" in methods, "--pretrained: is the standard model of this run, so --methods must list standard")
    require(not tuned or "standard" in methods, f"--methods: {', '.join(tuned)} by fine-tuning needs standard in the list too")
    for name in opt.tasks.split(","):
        require(name in TASKS, f"--tasks: unknown task {name!r}; choose from {', '.join(TASKS)}")
    require(opt.alpha is None or 0 <= opt.alpha <= 1, f"--alpha must be in [0, 1], not {opt.alpha}")
    if opt.alpha == 0 and any(METHODS[m][1] and m != "siss" for m in methods):         # siss always keeps the keep gradient
        print("sgu: warning: --alpha 0 drops the keep loss, so everything will be forgotten", file=sys.stderr)
    try:
        lo, hi = map(float, (opt.forget_window or "0,1").split(","))
    except ValueError:
        raise UsageError(f"--forget-window {opt.forget_window}: give two times, for instance 0,0.8") from None
    require(0 <= lo < hi <= 1, f"--forget-window {opt.forget_window}: needs 0 <= lo < hi <= 1")
    require(opt.dataset in DATASETS or opt.dataset.endswith(".npz"), f"--dataset: unknown data set {opt.dataset!r}; choose from {', '.join(DATASETS)}, or give the path of an .npz file")
    default_forget, default_sde, _ = DATASETS.get(opt.dataset, (None, "vp", ""))
    opt.forget, opt.sde = default_forget if opt.forget is None else opt.forget, opt.sde or default_sde
    require(opt.forget is not None, "--forget: say what to forget, for instance --forget 3,7")
    opt.sampler = opt.sampler or ("em" if opt.sde == "ve" else "ancestral")
    for name in ("steps", "unlearn_steps", "batch_size", "lr", "unlearn_lr", "sampler_steps", "samples", "likelihood_samples"):
        value = getattr(opt, name)
        require(value is None or 0 < value < 2 ** 31, f"--{name.replace('_', '-')} must be positive and below 2^31, not {value}")
    require(opt.sampler != "ancestral" or opt.sde != "ddpm" or (opt.sampler_steps or 1) <= DDPM().n_steps, f"--sampler-steps: the chain has {DDPM().n_steps} steps, not {opt.sampler_steps}")
    require(0 <= opt.seed < 2 ** 31, f"--seed must be in 0..{2 ** 31 - 1}, not {opt.seed}")
    if opt.judge == "clip":
        import importlib.util
        require(importlib.util.find_spec("open_clip"), "--judge clip needs open_clip: pip install open_clip_torch, or use --judge cnn")

    data = choose(load_data(opt.dataset, opt.data_root), opt.forget)
    opt.forget = data["chosen"]                                                         # ' 3, 7' and '3,7' are the same run
    variant = ("-" + opt.sde if opt.sde != default_sde else "") + ("-retrain" if opt.training == "retrain" else "")
    opt.out = opt.out or f"runs/{pathlib.Path(opt.dataset).stem}-{opt.forget.replace('/', '-')}{variant}"
    out = pathlib.Path(opt.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch(), (out / ".writable").unlink()
    except OSError as error:
        raise UsageError(f"--out {opt.out}: cannot write there ({error.strerror}); choose another folder") from None
    require(opt.judge != "clip" or data["train"].shape[1] in (1, 3), f"--judge clip sees grey or RGB images; these have {data['train'].shape[1]} channels")
    side, kind = data["train"].shape[2], "cpu" if opt.device == "cpu" else "gpu"
    preset = PRESETS.get((data["name"], kind)) or PRESETS[28 if side <= 28 else 32 if side <= 32 else 64, kind]
    if opt.sampler_steps is None:
        opt.sampler_steps = preset["evaluations"] // EVALUATIONS[opt.sampler]
    for name in ("steps", "batch_size", "lr", "samples", "likelihood_samples"):
        if getattr(opt, name) is None:
            setattr(opt, name, preset[name])
    network = dict(image_channels=data["train"].shape[1], channels=list(preset["channels"]), blocks=preset["blocks"], patch=preset["patch"], attention=True)
    if opt.pretrained:
        load_model(opt.pretrained)
        saved = read_checkpoint(opt.pretrained)
        require(saved.get("finished") and saved["sde"] == opt.sde and saved["network"]["image_channels"] == network["image_channels"],
                f"--pretrained {opt.pretrained}: holds no finished {opt.sde} model of {network['image_channels']}-channel images")
        network = saved["network"]
    unit = network["patch"] * 2 ** (len(network["channels"]) - 1)
    require(side % unit == 0 and side >= 8, f"images of {data['name']} are {side} pixels wide; this network needs a width that divides by {unit}, 8 or more")
    data.update(preset=preset, network=network)
    return opt, torch.device(opt.device), data


def fine_tuned(method, opt):
    """Does this method start from Standard's weights? Four have no meaning otherwise: they look at Standard."""
    return method in ("finetune", "relative", "salun", "fisher") or METHODS[method][1] is not None and opt.training == "finetune"


def recipe(method, opt):
    """How a method is trained: dict(alpha, steps, lr, window), its own from METHODS where no option says otherwise; window: the times t."""
    _, loss, alpha, (share, pace, sigmas, _) = METHODS[method]
    how = dict(alpha=alpha if opt.alpha is None or loss is None else opt.alpha, steps=opt.steps, lr=opt.lr)
    if fine_tuned(method, opt):
        how.update(steps=opt.unlearn_steps or max(1, round(share * opt.steps)), lr=opt.unlearn_lr or pace * opt.lr)
    if opt.forget_window:
        return dict(how, window=list(map(float, opt.forget_window.split(","))))
    return dict(how, window=window_times(make_sde(opt.sde), sigmas))


def window_times(sde, sigmas):
    """The times [lo, hi] at which the noise level is sigmas = (lo, hi); sigma 0 is t = 0."""
    return [float(sde.time(torch.tensor(s, dtype=torch.float64))) if s > 0 else 0. for s in sigmas]


def make_sde(name):
    return dict(ve=VE, vp=VP, ddpm=DDPM)[name]()


def replace_file(path, write):
    """Write a file under another name and rename it: whoever kills the run leaves the old file or the new one, never half of one."""
    path = pathlib.Path(path)
    temporary = path.with_name("." + path.name)
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)                                               # a full disk must not stay full of it
        raise


def save_json(path, obj):
    replace_file(path, lambda p: p.write_text(json.dumps(obj, indent=1) + "\n"))


def save_checkpoint(path, obj):
    buffer = io.BytesIO()                                                               # torch.save to a full disk raises anything but OSError
    torch.save(obj, buffer)
    replace_file(path, lambda p: p.write_bytes(buffer.getbuffer()))


def read_checkpoint(path):
    """A checkpoint written by this file: a dict of tensors and plain values. Raises UsageError for anything else."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint {path}") from None
    except Exception as error:
        raise UsageError(f"checkpoint {path} is damaged or not one of ours ({type(error).__name__}); delete it and run again") from None
    if not isinstance(saved, dict) or saved.get("format") != "sgu-1":
        raise UsageError(f"checkpoint {path} was not written by sgu.py; delete it and run again, or choose another --out")
    return saved


def load_model(path, device="cpu"):
    """A finished <method>.pt -> (network with its averaged weights, sde); make_score(*load_model(path)) is its score.

    The network is frozen; model.requires_grad_(True) before training it on. Raises UsageError for a damaged or foreign file.
    """
    saved = read_checkpoint(path)
    try:
        model, sde = UNet(**saved["network"]), make_sde(saved["sde"])
        model.load_state_dict(saved["ema"])
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UsageError(f"checkpoint {path} holds no model for this sgu.py ({type(error).__name__}: {str(error).splitlines()[0]}); delete it and run again") from None
    return model.to(device).eval().requires_grad_(False), sde


def load_judge(path, device="cpu"):
    """A judge.pt -> its Judge, ready for opinions(judge, images). Raises UsageError for a damaged or foreign file."""
    saved = read_checkpoint(path)
    try:
        judge = Judge(**saved["network"])
        judge.load_state_dict(saved["model"])
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UsageError(f"checkpoint {path} holds no judge for this sgu.py ({type(error).__name__}); delete it and run again") from None
    return judge.to(device).eval()


class Progress:
    """A bar with the time left, on the terminal; on a file one line at the end of each stage."""

    def __init__(self, label, total, done=0):
        self.label, self.total, self.first, self.start, self.shown = label, total, done, time.time(), 0.0

    def __call__(self, done, note=""):
        now, live = time.time(), sys.stderr.isatty()
        if done < self.total and (not live or now - self.shown < 0.2):
            return
        self.shown, spent = now, now - self.start
        left = spent / max(done - self.first, 1) * (self.total - done)
        bar = "#" * (24 * done // self.total)
        print(f"{chr(13) if live else ''}{self.label:<26} [{bar:<24}] {done}/{self.total}  {spent:4.0f} s, {left:.0f} s left  {note:<32}",
              end="" if live and done < self.total else "\n", file=sys.stderr, flush=True)


CHECKPOINT_SECONDS = 30


def our_files():
    """The names of all files that a run leaves in --out."""
    names = "results.json table.md judge.pt before_after.png losses.png inpaint.png reconstruct.png".split()
    for m in METHODS:
        names += [f"{m}.pt", f"samples_{m}.png"] + [f"{'samples' if task == 'sample' else task}_{m}.npz" for task in TASKS]
    return names


COUNTS = dict(samples=("unlearning_ratio", "unsure", "class_histogram", "frechet_kept"),        # option -> the results that have its n
              likelihood_samples=("nll_bits_per_dim", "variational_bound_bits_per_dim", "inpaint", "reconstruct"))


def check_same_run(before, config, where):
    """Refuse to go on with what a run with other options left behind. COUNTS may differ (more samples of the same networks continue the fewer), and --compile."""
    changed = [f"{k} {before.get(k)} -> {v}" for k, v in config.items() if before.get(k) != v and k not in (*COUNTS, "compile")]
    if changed:
        raise UsageError(f"{where} is from a run with other options ({'; '.join(changed) if before else 'unknown'}); use --fresh to start over, or another "
                         "--out (where --pretrained with the standard.pt of this one spares training Standard again)")


def run(opt, interrupted=lambda: False):
    """All stages of the command; every finished stage is on disk and is not repeated. Returns the results dict."""
    asked, (opt, device, data) = opt, resolve(opt)
    out, preset, sde = pathlib.Path(opt.out), data["preset"], make_sde(opt.sde)
    uncompared = ("out", "data_root", "fresh", "methods", "tasks")                     # these change what is done, not its outcome
    config = {k: v for k, v in dataclasses.asdict(opt).items() if k not in uncompared}
    config.update(network=data["network"], judge_network=list(preset["judge"]), noise_law=list(preset["noise_law"]),
                  **({"data_crc32": data["content"]} if "content" in data else {}))
    if opt.fresh:
        for old in our_files():                                                        # nothing else: --out may hold files of the user's
            if not opt.pretrained or (out / old).resolve() != pathlib.Path(opt.pretrained).resolve():
                (out / old).unlink(missing_ok=True)
    results = dict(config=config, command=command_of(asked), device=describe(device),
                   versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__), seconds={}, judge={}, methods={})
    if (out / "results.json").exists():
        try:
            old = json.loads((out / "results.json").read_text())
            before = {**old["config"]}
            kept = {k: {**old[k]} for k in ("seconds", "judge", "methods")}
            kept["methods"] = {k: {**v} for k, v in kept["methods"].items()}
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{out / 'results.json'} is damaged or not one of ours; delete it and run again (what the checkpoints hold is kept), "
                             "or use --fresh to start over") from None
        check_same_run(before, config, out)
        for count, fields in COUNTS.items():
            if getattr(asked, count) is None:
                config[count] = before.get(count, config[count])                       # not asked for: as it was
                setattr(opt, count, config[count])
            elif before.get(count) != config[count]:                                     # one table, one n: a result with another leaves it until its method is run again
                kept["methods"] = {m: {k: v for k, v in entry.items() if k not in fields} for m, entry in kept["methods"].items()}
        commands = old.get("command", "").split("; ")                                  # a later call may have added methods or tasks
        results = {**old, **results, **kept, "command": "; ".join(dict.fromkeys([*filter(None, commands), results["command"]]))}
    save_json(out / "results.json", results)                                           # from here on the folder belongs to these options

    def stage(name, seconds):
        results["seconds"][name] = round(results["seconds"].get(name, 0) + seconds, 1)
        save_json(out / "results.json", results)

    def pause():
        if interrupted():
            raise KeyboardInterrupt

    print(f"{data['name']}: forget {', '.join(data['classes'][c] for c in data['forget'])} of {len(data['classes'])} classes, {opt.sde} on {results['device']}; "
          f"{opt.steps} steps of {opt.batch_size}; results in {out}", file=sys.stderr)
    judge = get_judge(out, data, config, opt, device, results, stage, pause)
    tasks = opt.tasks.split(",")
    probs, reference = opinions(judge, data["test"][~is_forgotten(data, "test")])
    results["judge"]["floor"] = float(torch.isin(probs.argmax(1), torch.tensor(data["forget"])).float().mean())
    for method in sorted(opt.methods.split(","), key=lambda m: m != "standard"):       # Standard first: the others may start from it
        entry = results["methods"].setdefault(method, {})
        model, entry["recipe"] = get_model(method, out, data, opt, config, device, stage, pause)
        network = torch.compile(model) if opt.compile else model
        score = make_score(network, sde, precision=opt.precision)
        if "sample" in tasks and "unlearning_ratio" not in entry:
            images = get_samples(method, score, sde, out, data, opt, device, stage, pause)
            entry.update(judged(*opinions(judge, images), data, reference))
            save_json(out / "results.json", results)
        for task in ("inpaint", "reconstruct"):
            if task in tasks and task not in entry:
                entry[task] = measure_restoration(task, method, score, sde, judge, out, data, opt, device, stage, pause)
                save_json(out / "results.json", results)
        key = "variational_bound_bits_per_dim" if opt.sde == "ddpm" else "nll_bits_per_dim"
        if "likelihood" in tasks and key not in entry:
            score = make_score(network, sde)               # float32: bfloat16 moves an unlearned network's likelihoods by hundredths of a bit
            entry[key] = measure_likelihood(method, score, sde, out, data, opt, device, stage, pause)
            save_json(out / "results.json", results)
    results["seconds"]["total"] = round(sum(v for k, v in results["seconds"].items() if k != "total"), 1)
    save_json(out / "results.json", results)
    table = make_table(results)
    replace_file(out / "table.md", lambda p: p.write_text(table))
    draw_pictures(out, data, results["methods"], judge)
    print(table + f"\nIn {out}: " + ", ".join(name for name in our_files() if (out / name).exists()))
    return results


def command_of(opt):
    """The command line that gives these Options, for the results file; where files lie is left out."""
    given = {f.name: getattr(opt, f.name) for f in dataclasses.fields(opt) if getattr(opt, f.name) != f.default and f.name not in ("out", "data_root", "fresh")}
    return " ".join(["python sgu.py"] + [f"--{k.replace('_', '-')}" + ("" if v is True else f" {shlex.quote(str(v))}") for k, v in given.items()])


def describe(device):
    """The machine in words, for the results file."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = next((line.split(":")[1].strip() for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
                 platform.processor()) if os.path.exists("/proc/cpuinfo") else platform.processor()
    threads = torch.get_num_threads()
    return f"{model or platform.machine()}, {threads} thread{'s' * (threads > 1)}" + (", mps" if device.type == "mps" else "")


def get_judge(out, data, config, opt, device, results, stage, pause):
    """The judge of this run, from judge.pt or trained now."""
    path, (width, epochs) = out / "judge.pt", config["judge_network"]
    results["judge"]["kind"] = opt.judge
    if opt.judge == "clip":
        judge = ClipJudge(data["classes"]).to(device)
    elif path.exists():
        check_same_run(read_checkpoint(path).get("config", {}), config, path)
        judge = load_judge(path, device)
    else:
        start, bar = time.time(), None
        for step, steps, judge in train_judge(data, width, epochs, flip=data["train"].shape[1] == 3, precision=opt.precision, device=device, seed=opt.seed):
            bar = bar or Progress("judge", steps)
            bar(step)
            pause()
        save_checkpoint(path, dict(format="sgu-1", config=config, network=judge.config, model=judge.state_dict()))
        stage("judge", time.time() - start)
    right = opinions(judge, data["test"])[0].argmax(1) == data["test_labels"]
    results["judge"]["test_accuracy"] = float(right.float().mean())
    if results["judge"]["test_accuracy"] < 0.9:
        print(f"sgu: warning: the judge names only {100 * results['judge']['test_accuracy']:.1f}% of the test images rightly, so its ratios say little", file=sys.stderr)
    return judge


def get_model(method, out, data, opt, config, device, stage, pause):
    """The averaged network of a method and its recipe: from <method>.pt, or trained (on) now, saving every CHECKPOINT_SECONDS."""
    path, forget_loss, sde, how = out / f"{method}.pt", METHODS[method][1], make_sde(opt.sde), recipe(method, opt)
    if method == "standard" and opt.pretrained:
        saved = read_checkpoint(opt.pretrained)
        how = saved.get("recipe", how)
        if not path.exists() or path.samefile(opt.pretrained):
            save_checkpoint(path, {**saved, "method": method, "config": config, "recipe": how})
    saved = read_checkpoint(path) if path.exists() else dict(format="sgu-1", method=method, config=config, network=config["network"], sde=opt.sde,
                                                             recipe=how, finished=False, state=None, losses=[])
    check_same_run(saved.get("config", {}), config, path)
    half_written = path.exists() and not (saved.get("finished") or saved.get("state"))
    if saved.get("method") != method or "losses" not in saved or half_written:
        raise UsageError(f"checkpoint {path} is not of {method}; delete it and run again")
    check_same_run(saved.get("recipe", {}), how, path)
    if saved["finished"]:
        return load_model(path, device)[0], how
    forgotten = is_forgotten(data, "train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(opt.seed)
        model = UNet(**config["network"]).to(device)
    if fine_tuned(method, opt):                                                         # also before going on: relative, salun and fisher look at Standard
        model.load_state_dict(load_model(out / "standard.pt")[0].state_dict())
    ema = copy.deepcopy(model).requires_grad_(False)
    keep = (data["train"] if METHODS[method][0] == "D" else data["train"][~forgotten]).to(device)
    forget = data["train"][forgotten].to(device) if forget_loss else None
    steps = how["steps"]
    first = saved["state"]["step"] if saved["state"] else 0
    bar, start, last, info = Progress(f"train {method}", steps, first), time.time(), time.time(), None

    def save(finished):
        nonlocal start, last
        if finished and not all(torch.isfinite(p).all() for p in ema.parameters()):
            raise FloatingPointError(f"the weights of {method} are not finite after {steps} steps; lower the learning rate")
        saved.update(finished=finished, state=None if finished else info["snapshot"](), ema=ema.state_dict())
        save_checkpoint(path, saved)
        stage(f"train {method}", time.time() - start)
        start = last = time.time()

    edit, forget_weighting = None, METHODS[method][3][3](sde) if opt.weighting == "balanced" else opt.weighting
    common = dict(seed=opt.seed, precision=opt.precision, noise_law=data["preset"]["noise_law"])
    if method == "relative":
        forget_loss = functools.partial(relative_loss, reference=make_score(copy.deepcopy(ema), sde, precision=opt.precision))
    elif method == "salun":
        edit = saliency_mask(model, sde, forget, forget_loss, window=how["window"], weighting=forget_weighting, **common)
    elif method == "fisher":
        edit = fisher_penalty(model, sde, keep, **common)
    for info in train(model, ema, sde, keep, forget, forget_loss, how["alpha"], steps=steps, batch_size=opt.batch_size, lr=how["lr"], warmup=steps // 20 + 1,
                      window=how["window"], forget_weighting=forget_weighting, state=saved["state"], compile=opt.compile,
                      forget_ratio=1 - how["alpha"] if method == "siss" else None, edit_gradient=edit, **common):
        if info["step"] % 10 == 0 or info["step"] == steps:
            saved["losses"].append([info["step"], info["keep"], info["forget"]])
        bar(info["step"], f"keep {info['keep']:.4f}" + (f"  forget {info['forget']:+.4f}" if forget_loss else ""))
        if info["step"] < steps and (time.time() - last > CHECKPOINT_SECONDS):
            save(False)
        try:
            pause()
        except KeyboardInterrupt:
            save(info["step"] == steps)
            raise
    save(True)
    return ema.eval(), how


def read_arrays(path, *needed):
    """The arrays of an .npz that this file wrote, name -> array, the needed ones among them."""
    try:
        with np.load(path) as z:
            return {k: z[k] for k in (*z.files, *needed)}
    except Exception:
        raise UsageError(f"{path} is damaged; delete it and run again") from None


def in_chunks(label, path, key, total, chunk, compute, opt, device, stage, pause):
    """compute(rows, generator) for slices of range(total), concatenated. What is done is kept in path under key: a run that was stopped goes on.

    The generator of a slice depends on --seed and where the slice starts, so that every method meets the same random numbers. A larger
    total than before goes on from the last whole slice.
    """
    kept = read_arrays(path) if path.exists() else {}
    old = torch.from_numpy(kept[key]) if key in kept else torch.empty(0)
    done, start = len(old) if len(old) >= total else len(old) // chunk * chunk, time.time()
    parts = [old[:done]] if done else []
    bar = Progress(label, total, done)
    while done < total:
        rows = slice(done, min(done + chunk, total))
        parts.append(compute(rows, torch.Generator(device).manual_seed(opt.seed * 1_000_003 + rows.start)))
        if not torch.isfinite(parts[-1]).all():
            raise FloatingPointError(f"{label}: not a finite number, the network has diverged; train with a lower --lr, or leave this method out")
        done, kept[key] = rows.stop, torch.cat(parts).numpy()
        replace_file(path, lambda p: np.savez(p, **kept))
        bar(done)
        stage(" ".join(label.split()[:2]), time.time() - start)
        start = time.time()
        pause()
    return torch.cat(parts)[:total]


def get_samples(method, score, sde, out, data, opt, device, stage, pause):
    """opt.samples images of a model, (N, C, H, W) uint8, kept in samples_<method>.npz; the same noise for every method."""
    def compute(rows, g):
        shape = (rows.stop - rows.start, *data["train"].shape[1:])
        return to_levels(SAMPLERS[opt.sampler](score, sde, shape, steps=opt.sampler_steps, generator=g, device=device))
    return in_chunks(f"sample {method}", out / f"samples_{method}.npz", "images", opt.samples, 250, compute, opt, device, stage, pause)


def measure_likelihood(method, score, sde, out, data, opt, device, stage, pause):
    """Bits/dim of the first test images of D_g and D_f (the same for every method): mean, n, standard error of the mean (None for n = 1).

    For a DDPM it is the variational bound, and is called so in the results. Every image's own value is in likelihood_<method>.npz.
    """
    forgotten, result, bound = is_forgotten(data, "test"), dict(n={}, se={}), variational_bound if opt.sde == "ddpm" else bits_per_dim
    for key, mask in (("D_g", ~forgotten), ("D_f", forgotten)):
        x = data["test"][mask][:opt.likelihood_samples]
        compute = lambda rows, g: bound(score, sde, from_levels(x[rows].to(device)), generator=g).cpu()
        bits = in_chunks(f"likelihood {method} {key}", out / f"likelihood_{method}.npz", key, len(x), 50 if device.type == "cpu" else 250, compute, opt, device, stage, pause)
        result[key], result["n"][key] = float(bits.mean()), len(bits)
        result["se"][key] = float(bits.std() / math.sqrt(len(bits))) if len(bits) > 1 else None
    return result


def measure_restoration(task, method, score, sde, judge, out, data, opt, device, stage, pause):
    """Tables 3 and 4: restore test images of D_g and D_f. Accuracy of the restored image's class; mean distance of the judge's features.

    inpaint hides the upper half (of faces, 32 rows by 64 columns); reconstruct noises to t = 0.02 and walks back.
    """
    forgotten, result = is_forgotten(data, "test"), {}
    known = upper_half_hidden(data["test"])
    for key, mask in (("D_g", ~forgotten), ("D_f", forgotten)):
        x, labels = data["test"][mask][:opt.likelihood_samples], data["test_labels"][mask][:opt.likelihood_samples]
        def compute(rows, g):
            images = from_levels(x[rows].to(device))
            return to_levels(inpaint(score, sde, images, known, generator=g) if task == "inpaint" else reconstruct(score, sde, images, generator=g))
        restored = in_chunks(f"{task} {method} {key}", out / f"{task}_{method}.npz", key, len(x), 50 if device.type == "cpu" else 250, compute, opt, device, stage, pause)
        (probs, features), (clean_probs, clean) = opinions(judge, restored), opinions(judge, x)
        right = int((probs.argmax(1) == labels).sum())
        result[key] = dict(accuracy=right / len(x), ci95=wilson(right, len(x)), clean=float((clean_probs.argmax(1) == labels).float().mean()),
                           n=len(x), distance=float((features - clean).norm(dim=1).mean()))
    return result


def upper_half_hidden(x):
    """The mask of the inpainting task for images x: (..., H, W): 0 on the upper half, 1 (known) below. -> (H, W)."""
    mask = torch.ones(x.shape[-2:])
    mask[:x.shape[-2] // 2] = 0
    return mask


# The paper's Tables 2 (SGU re-trained from nothing) and 5 (fine-tuned from Standard): (data set, schedule) -> class rows of the
# unlearning ratio in %, then D_g and D_f in bits/dim, each for Standard, Orthogonal, Obtuse, Unseen.
PAPER = {
    2: {("mnist", "ve"): {"3": (11.0, 0.4, 1.5, 1.8), "7": (15.8, 0.8, 3.6, 2.3), "total": (26.8, 1.2, 5.1, 4.1),
                          "D_g": (2.82, 3.92, 3.70, 3.07), "D_f": (2.78, 13.23, 12.08, 3.01)},
        ("cifar10", "vp"): {"automobile": (11.2, 1.9, 0.9, 3.4), "dog": (13.4, 10.0, 11.5, 10.8), "total": (24.6, 11.9, 12.4, 14.2),
                            "D_g": (3.12, 3.22, 3.28, 3.09), "D_f": (3.20, 5.94, 4.37, 3.21)},
        ("stl10", "vp"): {"airplane": (12.1, 2.4, 3.6, 3.8), "total": (12.1, 2.4, 3.6, 3.8), "D_g": (2.90, 2.90, 2.92, 2.90), "D_f": (2.19, 8.94, 9.25, 2.32)},
        ("celeba", "vp"): {"Bangs": (19.6, 3.5, 0.7, 6.7), "total": (19.6, 3.5, 0.7, 6.7)}},
    5: {("cifar10", "vp"): {"automobile": (11.2, 2.7, 0.6, 3.4), "dog": (13.4, 8.7, 8.9, 10.8), "total": (24.6, 11.4, 9.5, 14.2),
                            "D_g": (2.89, 3.06, 4.36, 2.92), "D_f": (2.91, 10.36, 14.96, 2.95)},
        ("cifar10", "ddpm"): {"automobile": (13.1, 3.3, 1.6, 2.7), "dog": (13.9, 5.4, 3.6, 4.5), "total": (27.0, 8.7, 5.2, 7.2)},
        ("celeba", "vp"): {"Bangs": (19.6, 2.6, 0.1, 6.7), "total": (19.6, 2.6, 0.1, 6.7)}},
}


def make_table(results, table=None):
    """results (the content of results.json) -> Markdown: our rows, the paper's (of Table 2 or 5) beside them, then what it does not report.

    table: 2 or 5; None: 5 for fine-tuned models where it has the data set, else 2.
    """
    config, methods = results["config"], results["methods"]
    quoted = ("standard", "orthogonal", "obtuse", "unseen")
    ours = ("standard", "orthogonal", "obtuse", "relative", "unseen")
    order = [m for m in ours if m in methods] + [m for m in methods if m not in ours]
    finetuned, key = config["training"] == "finetune", (pathlib.Path(config["dataset"]).stem, config["sde"])
    table = table or (5 if finetuned and key in PAPER[5] else 2)
    paper = PAPER[table].get(key, {})
    if set(paper) - {"total", "D_g", "D_f"} != set(config["forget"].split(",")):
        paper = {}                                                                      # the paper forgot something else
    quote = lambda row, scale: [f"{paper[row][quoted.index(m)]:{scale}}" if m in quoted and row in paper else "" for m in order]
    row = lambda name, who, cells: f"| {name} | {who} | " + " | ".join(cells) + " |"
    head = lambda title: [row(title, "", [TITLES.get(m, m) for m in order]), "|---|---|" + "---:|" * len(order)]
    measured = [methods[m] for m in order]
    first = lambda field: next((m[field] for m in measured if field in m), None)       # None: no method has it, leave its part out

    def cells(text):
        """text(entry) for every method, a dash where it was not measured."""
        def one(m):
            try:
                return text(m)
            except (KeyError, TypeError):
                return "-"
        return [one(m) for m in measured]

    lines = [f"{config['dataset']}, {config['sde']}, forget {config['forget']}; {results['device']}; seed {config['seed']}; `{results['command']}`"
             + (f"; {results['remark']}" if "remark" in results else ""), ""]          # a remark is written into a results file by hand
    percent = lambda share, interval: f"{100 * share:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    if ratio := first("unlearning_ratio"):
        lines += head("unlearning ratio, %")
        for name in [k for k in ratio if k not in ("n", "ci95")]:
            lines.append(row(name, "ours", cells(lambda m: percent(m["unlearning_ratio"][name], m["unlearning_ratio"]["ci95"]) if name == "total"
                                                 else f"{100 * m['unlearning_ratio'][name]:.1f}")))
            if name in paper:
                lines.append(row("", "paper", quote(name, ".1f")))
        judge = results["judge"]
        lines += ["", f"n = {ratio['n']} samples a method, 95% Wilson interval; {config['sampler']} sampler, {config['sampler_steps']} steps. "
                  f"Judge: {'CLIP, zero-shot' if judge.get('kind') == 'clip' else 'our own CNN'}, test accuracy {100 * judge['test_accuracy']:.2f}%, "
                  f"finds {100 * judge['floor']:.2f}% forgotten classes in real D_g images (its floor)."
                  + (f" Paper: Table {table}, SGU {'re-trained from scratch' if table == 2 else 'fine-tuned'}; ours {'fine-tuned' if finetuned else 're-trained'}." if paper else ""), ""]
        lines += head("quality")
        if first("unsure") is not None:                                                 # None: two classes, one of which always reaches 1/2
            lines.append(row("judge unsure, %", "ours", cells(lambda m: f"{100 * m['unsure']:.1f}")))
        lines.append(row("Frechet distance, kept", "ours", cells(lambda m: f"{m['frechet_kept']:.2f}")))
        lines.append("")
    for field, title in (("nll_bits_per_dim", "NLL, bits/dim"), ("variational_bound_bits_per_dim", "variational bound, bits/dim")):
        if not first(field):
            continue
        lines += head(title)
        for key in ("D_g", "D_f"):
            lines.append(row(key, "ours", cells(lambda m: f"{m[field][key]:.2f}" + (f" ± {m[field]['se'][key]:.2f}" if m[field]["se"][key] is not None else ""))))
            if key in paper and field == "nll_bits_per_dim":
                lines.append(row("", "paper", quote(key, ".2f")))
        n = first(field)["n"]
        lines += ["", f"n = {n['D_g']} and {n['D_f']} test images, ± one standard error.", ""]
    for task in ("inpaint", "reconstruct"):
        if some := first(task):
            lines += head(f"{task}, accuracy %")
            for key in ("D_g", "D_f"):
                lines.append(row(key, "ours", cells(lambda m: percent(m[task][key]["accuracy"], m[task][key]["ci95"]))))
                lines.append(row("", "distance", cells(lambda m: f"{m[task][key]['distance']:.2f}")))
            lines += ["", f"n = {some['D_g']['n']} and {some['D_f']['n']} test images, of which the judge names {100 * some['D_g']['clean']:.1f}% and {100 * some['D_f']['clean']:.1f}% rightly before.", ""]
    return "\n".join(lines) + "\n"


def draw_pictures(out, data, methods, judge):
    """samples_<method>.png (what the judge calls forgotten is framed), before_after.png, losses.png, from what the runs left in out."""
    from matplotlib.figure import Figure
    methods, found = [m for m in methods if (out / f"{m}.pt").exists()], {}
    show = lambda ax, image: ax.imshow(image.transpose(1, 2, 0) if len(image) == 3 else image[0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    for method in methods:
        path = out / f"samples_{method}.npz"
        if path.exists():
            images = read_arrays(path, "images")["images"][:100]
            found[method] = images, shows_forgotten(judge, data, torch.from_numpy(images))

    def grid(name, images, framed, columns, titles=None):
        rows = -(-len(images) // columns)
        figure = Figure(figsize=(0.62 * columns + (1.5 if titles else 0), 0.62 * rows))
        left = 1.5 / figure.get_figwidth() if titles else 0
        for k, image in enumerate(images):
            r, c = divmod(k, columns)
            ax = figure.add_axes((left + (1 - left) * c / columns, 1 - (r + 1) / rows, (1 - left) / columns * 0.94, 0.94 / rows))
            show(ax, image)
            ax.set_xticks([]), ax.set_yticks([])
            for spine in ax.spines.values():
                spine.set(color="#D55E00" if framed[k] else "none", linewidth=2.5)
            if titles and c == 0:
                ax.text(-0.15, 0.5, titles[r], transform=ax.transAxes, ha="right", va="center", fontsize=11)
        replace_file(out / name, lambda p: figure.savefig(p, dpi=110, format="png"))

    for method, (images, framed) in found.items():
        grid(f"samples_{method}.png", images, framed, 10)
    if found:
        n = min(16, *(len(images) for images, _ in found.values()))
        grid("before_after.png", [i for images, _ in found.values() for i in images[:n]], [f for _, framed in found.values() for f in framed[:n]],
             n, [TITLES.get(m, m) for m in found])
    for task in ("inpaint", "reconstruct"):
        strips = {m: read_arrays(out / f"{task}_{m}.npz") for m in methods if (out / f"{task}_{m}.npz").exists()}
        strips = {m: z for m, z in strips.items() if {"D_g", "D_f"} <= z.keys()}        # both: not stopped half way
        if strips:                                                                      # eight images of D_g, then eight of D_f, framed
            count = {key: min(8, *(len(z[key]) for z in strips.values())) for key in ("D_g", "D_f")}
            originals = [data["test"][is_forgotten(data, "test") == wanted][:count[key]].numpy() for key, wanted in (("D_g", False), ("D_f", True))]
            rows = {"original": np.concatenate(originals)}
            if task == "inpaint":
                rows["masked"] = rows["original"] * upper_half_hidden(data["test"]).to(torch.uint8).numpy()
            rows.update({TITLES.get(m, m): np.concatenate([z[key][:count[key]] for key in count]) for m, z in strips.items()})
            framed = ([False] * len(originals[0]) + [True] * len(originals[1])) * len(rows)
            grid(f"{task}.png", [image for row in rows.values() for image in row], framed, sum(map(len, originals)), list(rows))
    figure = Figure(figsize=(9, 3.2))
    axes = figure.subplots(1, 2)
    colours = ("#000000", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
    for i, method in enumerate(methods):
        look = dict(color=colours[i % len(colours)], ls="-" if i < len(colours) else "--", lw=1, label=TITLES.get(method, method))
        losses = np.array(read_checkpoint(out / f"{method}.pt")["losses"])
        if len(losses):
            axes[0].plot(losses[:, 0], losses[:, 1], **look)
            if method not in METHODS or METHODS[method][1]:                             # a method of the user's own, called from elsewhere
                axes[1].plot(losses[:, 0], losses[:, 2], **look)
    axes[0].set(yscale="log", xlabel="step", title="keep loss (Eq. 8), weighted"), axes[0].legend(frameon=False)
    axes[1].set(xlabel="step", title="forget loss, weighted")
    figure.tight_layout()
    replace_file(out / "losses.png", lambda p: figure.savefig(p, dpi=110, format="png"))


def main(argv=None):
    """The command line. Exit codes: 0 done, 2 something to mend (one line says what), 130 interrupted."""
    opt, stop = parse_options(argv), []

    def on_interrupt(*_):                                                               # the first Ctrl-C waits for a consistent state
        stop.append(1)
        if len(stop) > 1:
            raise KeyboardInterrupt
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        run(opt, interrupted=lambda: bool(stop))
    except (UsageError, FloatingPointError) as error:
        print(f"sgu: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"sgu: cannot write {error.filename or 'the results'} ({error.strerror or error}); the same command goes on from what is saved", file=sys.stderr)
        return 2
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        if opt.compile and type(error).__module__.startswith("torch._"):
            print(f"sgu: --compile does not work here ({reason}); leave it out", file=sys.stderr)
        elif "out of memory" in reason or "allocate memory" in reason:
            print(f"sgu: out of memory ({reason}); the same command goes on from what is saved, on a machine with more memory; if it happened in training, "
                  "--fresh with a smaller --batch-size", file=sys.stderr)
        else:
            raise
        return 2
    except KeyboardInterrupt:
        print("\nsgu: stopped and saved; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
