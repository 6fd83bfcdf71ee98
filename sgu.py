"""Score-based Generative Unlearning (SGU) in one file: make a diffusion model forget a class.

    python sgu.py                                    digits drawn from fonts, nothing to download
    python sgu.py --dataset mnist --forget 3,7       the paper's first experiment (--help: options)

Part one is the method of the paper "Unlearning is better than unseen": 1 schedules, 2 network,
3 losses, 4 samplers, 5 likelihood, 6 inpainting, 7 training; part two the experiment: 8 data,
9 judge, 10 the command.

    D, D_g, D_f   all images; those to keep (the paper's SFG); those to forget (NSFG)
    p_g, p_f      the densities of D_g and D_f
    Standard      the model trained on D: it draws everything
    Unseen        trained on D_g alone, as if D_f had never been collected: the yardstick
    SGU           trained, from nothing or on from Standard, with two losses at once: the usual one
                  on D_g (keep) and one on D_f that spoils the score there (forget)
    x_t           a(t) x0 + s(t) z, z ~ N(0, I), t in [0, 1]: p(x_t | x0) = N(a x0, s^2 I)
    sigma         s/a, the noise level of the image x_t/a
    score         grad_x log p_t(x). Any function score(x, t) of x: (B, ...) and t: (B,) will do
    e, u          the noise that a score predicts, e = -s score(x_t, t), whose target is z; and the
                  target of the score itself, u = -z/s
    e_g, e_f      e after perfect training on D_g or D_f alone: E[z | x_t] under p_g or p_f
    B, D          images in a batch; in a formula D is the number of pixels (dimensions)
    e.z           the inner product over all pixels; losses divide it by D, so that they mean the
                  same for 2 and for 12,288 dimensions
"""
import argparse, contextlib, copy, functools, inspect, io, json, math, os, pathlib, platform, re
import shlex, sys, time, zlib
from typing import Any, NamedTuple
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

class UsageError(ValueError):
    """Something the user can mend; the command prints it as one line and exits with 2."""

def need(ok, message, error=UsageError):                          # raise error(message) unless ok
    if not ok:
        raise error(message)
def per_sample(v, x):                                             # (B,) -> (B, 1, ..., 1) to fit x
    return v.reshape(-1, *[1] * (x.dim() - 1))

# ==== 1. Noise schedules.  Eq. 3:  dx = f(x, t) dt + g(t) dw,  data (t = 0) to noise (t = 1) ======
# f = -beta(t) x / 2 is linear in x, so x_t = a x0 + s z with a' = -beta a / 2 and d(s^2)/dt =
# -beta s^2 + g^2. The noise level sigma = s/a is the clock that all schedules share.
class Schedule:
    """A schedule defines marginal(t) -> a, s; diffusion(t) -> g; time(sigma) -> t; and, unless a is
    1, beta(t) with a' = -beta a/2, all for t of any shape. a(1) and s(t_min) stay above 0."""
    t_min = 0.0                                # the smallest t that training and samplers visit
    def beta(self, t):
        return torch.zeros_like(t)

    def at(self, t):                                              # a, s at one t, as plain floats
        return tuple(map(float, self.marginal(torch.as_tensor(t, dtype=torch.float64))))

    def sigma(self, t):
        a, s = self.marginal(t)
        return s / a

    def drift(self, x, t):
        return -0.5 * per_sample(self.beta(t), x) * x

    def prior_sample(self, shape, generator=None, device=None):   # sigma(1) must drown every x0
        return self.at(1)[1] * torch.randn(shape, generator=generator, device=device)

    def prior_log_prob(self, x):                                  # (B, ...) -> (B,) nats, float64
        x, s = x.double().flatten(1), self.at(1)[1]
        return -0.5 * (x / s).square().sum(1) - x.shape[1] * math.log(s * math.sqrt(2 * math.pi))

class VE(Schedule):
    """Variance exploding: a = 1, s = sigma_min (sigma_max/sigma_min)^t (Song et al. 2021)."""
    def __init__(self, sigma_min=0.01, sigma_max=50.0):    # the usual ones; the paper names none
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def marginal(self, t):
        return torch.ones_like(t), self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def diffusion(self, t):
        return self.marginal(t)[1] * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def time(self, sigma):
        return (sigma / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)

class VP(Schedule):
    """Variance preserving: beta linear in t, g = sqrt(beta), s^2 = 1 - a^2 (Song et al. 2021)."""
    t_min = 1e-4                               # s(0) = 0, where a score -z/s has no meaning
    def __init__(self, beta_min=0.1, beta_max=20.0):
        self.beta_min, self.slope = beta_min, beta_max - beta_min

    def beta(self, t):
        return self.beta_min + self.slope * t

    def log_a(self, t):                        # -1/2 int_0^t beta
        return -self.slope * t ** 2 / 4 - self.beta_min * t / 2

    def marginal(self, t):
        log_a = self.log_a(t)
        return log_a.exp(), (-torch.expm1(2 * log_a)).sqrt()      # expm1: exact where s is small

    def diffusion(self, t):
        return self.beta(t).sqrt()

    def time(self, sigma):                     # log a = -log(1 + sigma^2)/2 is quadratic in t
        c = torch.log1p(sigma ** 2)
        return 2 * c / (self.beta_min + (self.beta_min ** 2 + 2 * self.slope * c).sqrt())

class DDPM(VP):
    """The chain x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) z, k = 1..n_steps (Appendix B), with
    a^2 = prod_{j<=k} (1 - beta_j) at t = k/n_steps. Between, beta is constant: a VP process."""
    def __init__(self, n_steps=1000, beta_min=1e-4, beta_max=0.02):
        self.n_steps, self.t_min = n_steps, 1 / n_steps
        self.betas = torch.linspace(beta_min, beta_max, n_steps, dtype=torch.float64)
        self.knots = F.pad(torch.log1p(-self.betas).cumsum(0) / 2, (1, 0))  # log a, k = 0..n_steps

    def step(self, t):                                            # the k that ends at or after t
        return (t * self.n_steps - 1e-4).ceil().long().clamp(1, self.n_steps)

    def beta(self, t):
        return -self.n_steps * torch.log1p(-self.betas.to(t))[self.step(t) - 1]

    def log_a(self, t):
        k, knots = self.step(t), self.knots.to(t)
        return knots[k] + (knots[k] - knots[k - 1]) * (t * self.n_steps - k)

    def time(self, sigma):
        log_a, knots = -torch.log1p(sigma ** 2) / 2, self.knots.to(sigma)
        k = torch.searchsorted(-knots, -log_a).clamp(1, self.n_steps)
        return (k - (log_a - knots[k]) / (knots[k - 1] - knots[k])) / self.n_steps

SCHEDULES = dict(ve=VE, vp=VP, ddpm=DDPM)

# ==== 2. The network: a small U-Net, and the score made from it ===================================
class Block(nn.Module):
    """Residual block: two 3x3 convolutions; the noise level scales and shifts between them."""
    def __init__(self, c, c_emb):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, c), nn.GroupNorm(1, c)     # more groups: slower
        self.conv1 = nn.Conv2d(c, c, 3, padding=1)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.film = nn.Linear(c_emb, 2 * c)
        nn.init.zeros_(self.conv2.weight)                         # it starts as the identity
    def forward(self, x, emb):                                    # (B, c, h, w), (B, c_emb)
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)     # each (B, c, 1, 1)
        return x + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))

class UNet(nn.Module):
    """Images (B, C, H, W), log(sigma)/4 (B,), not t itself -> (B, C, H, W). channels: a width
    per level; blocks: how many a level, one number or a list; patch x patch pixels are folded into
    channels first (2: a quarter of the cost). H, W: multiples of patch * 2^(levels - 1)."""
    def __init__(self, image_channels=1, channels=(32, 64), blocks=1, patch=2, data_std=0.5):
        super().__init__()
        blocks = [blocks] * len(channels) if isinstance(blocks, int) else list(blocks)
        self.config = dict(image_channels=image_channels, channels=list(channels), blocks=blocks,
                           patch=patch, data_std=data_std)
        self.patch, self.data_std, c_emb = patch, data_std, 4 * channels[0]
        pixels, pairs = image_channels * patch ** 2, list(zip(channels, channels[1:]))
        row = lambda c, n: nn.ModuleList([Block(c, c_emb) for _ in range(n)])
        self.register_buffer("freqs", torch.linspace(0, math.log(30), 16).exp())
        self.embed = nn.Sequential(nn.Linear(32, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.first = nn.Conv2d(pixels, channels[0], 3, padding=1)
        self.down = nn.ModuleList([row(c, n) for c, n in zip(channels, blocks)])
        self.shrink = nn.ModuleList([nn.Conv2d(c, d, 3, stride=2, padding=1) for c, d in pairs])
        self.middle = row(channels[-1], 2)
        self.grow = nn.ModuleList([nn.Conv2d(d, c, 3, padding=1) for c, d in pairs])
        self.up = nn.ModuleList([row(c, n) for c, n in zip(channels, blocks)])
        self.norm = nn.GroupNorm(math.gcd(8, channels[0]), channels[0])
        self.last = nn.Conv2d(channels[0], pixels, 3, padding=1, bias=False)
        nn.init.zeros_(self.last.weight)
        self.to(memory_format=torch.channels_last)
    def forward(self, x, level):                                  # (B, C, H, W), (B,)
        angles = level[:, None] * self.freqs                      # (B, 16)
        emb = F.silu(self.embed(torch.cat([angles.sin(), angles.cos()], dim=1)))  # (B, c_emb)
        with torch.autocast(x.device.type, enabled=False):        # bfloat16 rounds a pixel near 1
            h = F.pixel_unshuffle(x, self.patch)                  # by as much as the faintest noise
            h = self.first(h.contiguous(memory_format=torch.channels_last))
        skips = []
        for i, blocks in enumerate(self.down):
            h = self.shrink[i - 1](h) if i > 0 else h             # half the side
            for block in blocks:
                h = block(h, emb)
                skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for i in reversed(range(len(self.up))):
            for block in self.up[i]:
                h = block(h + skips.pop(), emb)
            h = self.grow[i - 1](F.interpolate(h, scale_factor=2)) if i > 0 else h
        return F.pixel_shuffle(self.last(F.silu(self.norm(h))), self.patch)

def make_score(model, sde, data_std=None, precision="float32"):
    """The function score(x, t) = -e/s of a network F = model(input, log(sigma)/4).
    y = x/a = x0 + sigma z has the standard deviation total = sqrt(sigma^2 + data_std^2), and
        denoised = (data_std/total)^2 y + (sigma data_std/total) F(y/total, log(sigma)/4)
    gives F inputs and targets of unit variance at every noise level (Karras et al. 2022, Table 1).
    The bracket is e = (y - denoised)/sigma. data_std: as in training (None: model's or 0.5)."""
    std = getattr(model, "data_std", 0.5) if data_std is None else data_std
    need(precision in ("float32", "bfloat16"), f"precision is float32 or bfloat16, not {precision}")
    need(0 < std < math.inf, f"data_std must be positive, not {std}")
    def score(x, t):
        a, s = (per_sample(v, x) for v in sde.marginal(t))
        sigma = s / a
        total = (sigma ** 2 + std ** 2).sqrt()
        dtype = next(model.parameters(), x).dtype if isinstance(model, nn.Module) else x.dtype
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            f = model((x / a / total).to(dtype), (sigma.flatten().log() / 4).to(dtype)).to(x.dtype)
        return -(sigma * x / a / total ** 2 - std / total * f) / s
    return score

# ==== 3. Losses.  Eq. 5, 8, 12 (keep), 9, 13 (orthogonal), 10, 14 (obtuse), 11 (their sum) ========
#                         formula             the e that minimises Eq. 11  what that does
#    score matching       |e - z|^2 / D       e_g (alone)                  predicts noise on D_g
#    SGU-Orthogonal       (e.z / D)^2         (I + R C/D)^-1 e_g           shrinks e: leaves noise
#    SGU-Obtuse           e.z / D             e_g - (R/2) e_f              flees e_f without bound
#    SGU-Relative, ours   e.(z - e_ref) / D   e_g - (R/2) (e_f - e_ref)    guides away from D_f
# R = (1 - alpha) w_f q_f(t) p_f(x_t) / (alpha w_g q_g(t) p_g(x_t)) says how far forgetting prevails
# at (x_t, t): w are the weights of the two losses, q the densities from which they draw t; and
# C = E[z z^T | x_t] under p_f. Notebook 8 derives all this, toy_gmm.py has it in numbers.
# Signs: score.u = e.z/s^2, so descending e.z turns the score away from where D_f lies. The network
# sees x_t, not z, so Orthogonal takes from e what is along e_f, the mean z; e_g points nearly the
# same way, so little is left. Obtuse and Relative, linear in e, have no minimum without keeping.
#
# The weight w(t) of a loss (weighting=):
#    'noise'      1, on the formulas above: no noise level drowns the others
#    'paper'      lambda(t) = s^2 on formulas in score units: 1 on these, and 1/s^2 for Eq. 9, whose
#                 product is squared. For a DDPM the variational weight of Eq. 12, beta_k /
#                 (2 (1 - beta_k) (1 - abar_k)) with abar_k = a^2, sigma_k^2 = beta_k, on every loss
#    a function   of t: (B,) -> (B,). balanced_weight is (total/data_std)^(2 power), as F enters e
#                 with the factor data_std/total (make_score): gradients of F are then equally large
#                 at every noise level. e - z and z - e_ref shrink by that factor too: power 1 for
#                 their losses; e.z does not, squared or not: power 1/2

def predict_noise(score, sde, x0, t, z, generator):
    """Noise x0: (B, ...) and let score say what the noise was -> t: (B,), e and z: (B, D).
    t ~ U[t_min, 1] (for a DDPM among its own times) and z ~ N(0, I) are drawn where None."""
    if t is None:
        t = torch.rand(len(x0), generator=generator, device=x0.device)
        t = sde.step(t) / sde.n_steps if isinstance(sde, DDPM) else sde.t_min + (1 - sde.t_min) * t
    z = torch.randn(x0.shape, generator=generator, device=x0.device) if z is None else z
    need(x0.is_floating_point() and t.is_floating_point() and t.dim() == 1,
         "losses take images in [-1, 1] and t: (B,) in [0, 1], both floats")
    a, s = (per_sample(v, x0) for v in sde.marginal(t))
    e = (-s * score(a * x0 + s * z, t)).view_as(z)
    return t, e.flatten(1), z.flatten(1)

def loss_weight(sde, t, weighting, power=0):
    """The weight (B,) of the table above. 'paper' is 1/s^power; a DDPM's is its own."""
    if callable(weighting):
        return weighting(t)
    need(weighting in ("noise", "paper"), f"weighting: noise, paper or a function, not {weighting}")
    s = sde.marginal(t)[1]
    if weighting == "paper" and isinstance(sde, DDPM):
        beta = sde.betas.to(t)[sde.step(t) - 1]
        return beta / (2 * (1 - beta) * s ** 2)
    return s ** -power if weighting == "paper" else torch.ones_like(t)

def balanced_weight(sde, data_std=0.5, power=1.0):                # a function of t: (B,) -> (B,)
    return lambda t: (1 + (sde.sigma(t) / data_std) ** 2) ** power

def score_matching_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
    """Eq. 5, 8, 12: |e - z|^2 / D, averaged over the batch. x0: (B, ...) -> scalar >= 0."""
    t, e, z = predict_noise(score, sde, x0, t, z, generator)
    return (loss_weight(sde, t, weighting) * (e - z).square().mean(1)).mean()

def orthogonal_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
    """Eq. 9, 13: (e.z / D)^2, averaged over the batch. x0: (B, ...) from D_f -> scalar >= 0.
    A right angle to z costs nothing; with mean_i (e_i z_i)^2, a square per pixel, it would."""
    t, e, z = predict_noise(score, sde, x0, t, z, generator)
    return (loss_weight(sde, t, weighting, power=2) * (e * z).mean(1).square()).mean()

def obtuse_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
    """Eq. 10, 14: e.z / D = s^2 score.u / D, the batch's mean. x0: (B, ...) of D_f -> scalar.
    It makes the angle of score and u obtuse, without bound: the keep loss and few steps hold it."""
    t, e, z = predict_noise(score, sde, x0, t, z, generator)
    return (loss_weight(sde, t, weighting) * (e * z).mean(1)).mean()

def relative_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None, *, reference):
    """Ours: obtuse relative to a frozen score, e.(z - e_ref) / D. x0: (B, ...) of D_f -> scalar.
    reference: Standard's score, and e_ref its e. On average descending moves e by e_ref - e_f: not
    at all where D_f and D call for the same noise, nor where p_f prevails: e_ref is near e_f. With
    the keep loss its optimum is therefore bounded, and guided away from D_f without a classifier:
        score_g + k grad log P(g | x_t),   k = (1 - alpha) w_f q_f |D_g| / (2 alpha w_g q_g |D_f|)
    with P(g | x_t) the probability that x_t came from D_g (cf. ESD, Gandikota et al. 2023)."""
    t, e, z = predict_noise(score, sde, x0, t, z, generator)
    with torch.no_grad():
        e_ref = predict_noise(reference, sde, x0, t, z.view_as(x0), generator)[1]
    return (loss_weight(sde, t, weighting) * (e * (z - e_ref)).mean(1)).mean()

def sgu_loss(keep_loss, forget_loss, alpha):                      # Eq. 11, of two loss values
    return alpha * keep_loss + (1 - alpha) * forget_loss

# ==== 4. Samplers.  Eq. 4, from t = 1 down:  dx = [f(x, t) - g(t)^2 score(x, t)] dt + g(t) dw =====
# A sampler steps from t down to t_next along a grid of times, and at its end takes the mean image
# E[x0 | x_t], which removes the last, invisible noise. Times are float64, on the CPU.
def time_grid(sde, steps, t_max=1.0, rho=7):
    """steps + 1 times, t_max to t_min, even in sigma^(1/rho) (Karras): fine at small sigma."""
    need(steps >= 1, f"steps must be at least 1, not {steps}")
    ends = torch.tensor([t_max, sde.t_min], dtype=torch.float64)
    first, last = sde.sigma(ends) ** (1 / rho)
    need(0 < float(last) < float(first) < 1e3, "sigma must grow with t, from above 0 to a number")
    even = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    t = sde.time((first + (last - first) * even) ** rho)
    t[0], t[-1] = ends                                            # without rounding
    return t

def score_at(score, x, t):                                        # at one t for the whole batch x
    return score(x, torch.full((len(x),), float(t), dtype=x.dtype, device=x.device))
def noise_like(x, generator):                                     # z ~ N(0, I) of the shape of x
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)

def denoise(score, sde, x, t):
    """E[x0 | x_t] = (x + s^2 score)/a (Tweedie): the mean image behind x: (B, ...) at time t."""
    a, s = sde.at(t)
    return (x + s ** 2 * score_at(score, x, t)) / a

def reverse_step(score, sde, x, t, t_next, generator):            # Euler-Maruyama for Eq. 4
    dt, g = float(t - t_next), float(sde.diffusion(t))
    drift = sde.drift(x, t.reshape(1).to(x)) - g ** 2 * score_at(score, x, t)
    return x - drift * dt + g * math.sqrt(dt) * noise_like(x, generator)

def langevin_step(score, sde, x, t, snr, generator):              # a corrector: p_t nearly stays
    eps = 2 * (snr * sde.at(t)[1]) ** 2       # not 2 (snr |z|/|score|)^2: unlearned scores reach 0
    return x + eps * score_at(score, x, t) + math.sqrt(2 * eps) * noise_like(x, generator)

def move(mean, sde, x, t, t_next, generator, noisy=True):
    """x: (B, ...) from t to t_next if mean is the image behind it. noisy: a draw from q(x_next |
    x_t, x_0 = mean) (Ho et al. 2020, Eq. 7); else straight, by the probability flow (section 5)."""
    (a, s), (a_next, s_next) = sde.at(t), sde.at(t_next)
    r = s_next / a_next * a / s                                   # sigma_next/sigma
    if not noisy:
        return a_next * (mean + r * (x / a - mean))
    z = noise_like(x, generator)
    return a_next * (mean + r ** 2 * (x / a - mean)) + s_next * math.sqrt(1 - r ** 2) * z

def ancestral_step(score, sde, x, t, t_next, generator):
    """One step of DDPM's own sampler, for every schedule. After a step of any length x has the
    noise of t_next; Euler-Maruyama leaves more, and the more, the longer its steps are."""
    return move(denoise(score, sde, x, t), sde, x, t, t_next, generator)

def multistep(noisy):
    """A new step for one walk: it extrapolates the mean image from its last two to half way, h/2
    further in log sigma. Second order at the same price (DPM-Solver++(2M), Lu et al. 2022)."""
    last = {}
    def step(score, sde, x, t, t_next, generator):
        mean, h = denoise(score, sde, x, t), float((sde.sigma(t) / sde.sigma(t_next)).log())
        ahead = mean + h / 2 * (mean - last["mean"]) / last["h"] if last else mean
        last.update(mean=mean, h=h)
        return move(ahead, sde, x, t, t_next, generator, noisy)
    return step

@torch.no_grad()
def walk(step, score, sde, x, grid, generator):
    """Take step along the times of grid, from x: (B, ...) at grid[0] to the last mean image."""
    for t, t_next in zip(grid, grid[1:]):
        x = step(score, sde, x, t, t_next, generator)
    return denoise(score, sde, x, grid[-1])

def euler_maruyama(score, sde, shape, steps=120, generator=None, device=None):
    """Samples of Eq. 4. shape: (B, ...) -> x: (B, ...), images near [-1, 1]; steps + 1 evaluations
    of the score. The fewer the steps, the further they overshoot."""
    x = sde.prior_sample(shape, generator, device)
    return walk(reverse_step, score, sde, x, time_grid(sde, steps), generator)

def predictor_corrector(score, sde, shape, steps=100, snr=0.16, corrector_steps=1, generator=None,
                        device=None):
    """Euler-Maruyama, each step followed by Langevin's at its end (Song et al. 2021)."""
    def step(score, sde, x, t, t_next, generator):
        x = reverse_step(score, sde, x, t, t_next, generator)
        for _ in range(corrector_steps):
            x = langevin_step(score, sde, x, t_next, snr, generator)
        return x
    x = sde.prior_sample(shape, generator, device)
    return walk(step, score, sde, x, time_grid(sde, steps), generator)

def ancestral_sample(score, sde, shape, steps=None, generator=None, device=None):
    """Samples by ancestral_step: 100 steps (None), or a DDPM's whole chain; fewer are spread evenly
    over it. The chain's last step, to s = 0, is the mean image. ValueError for more than it has."""
    n = getattr(sde, "n_steps", 100)
    steps = n if steps is None else steps
    grid = time_grid(sde, steps)
    if isinstance(sde, DDPM):
        need(steps <= n, f"ancestral steps must be in 1..{n}, not {steps}")
        grid = torch.linspace(n, 0, steps + 1, dtype=torch.float64).round()[:-1] / n
    x = sde.prior_sample(shape, generator, device)
    return walk(ancestral_step, score, sde, x, grid, generator)

def multistep_sample(score, sde, shape, steps=20, generator=None, device=None, noisy=True):
    """Samples by multistep; noisy=False: of the probability flow (section 5)."""
    x = sde.prior_sample(shape, generator, device)
    return walk(multistep(noisy), score, sde, x, time_grid(sde, steps), generator)

def ode_sample(score, sde, shape, steps=18, generator=None, device=None):
    """Samples of the probability flow (section 5): random is only where it starts."""
    return multistep_sample(score, sde, shape, steps, generator, device, noisy=False)

SAMPLERS = dict(em=euler_maruyama, pc=predictor_corrector, ancestral=ancestral_sample,
                multistep=multistep_sample, ode=ode_sample)

# ==== 5. Likelihood: log p_0(x_0) = log p_1(x_1) + int div_x (dx/dt) dt along the flow ============
# The probability flow dx/dt = f - g^2 score / 2 carries p_0 to p_1 without noise. In y = x/a and
# sigma it is dy/dsigma = e for all schedules; in w = y/c, c = sqrt(1 + sigma^2), of unit size, and
# l = log sigma it is smooth: some 32 steps of Runge-Kutta do (more for an unlearned network).
#     dw/dl = b (e - b w),   div_w (dw/dl) = sigma div_y e - D b^2,   b = sigma/c
# div_y e is the mean of v.(de/dy v), a vector-Jacobian product, over random signs v (Hutchinson).
# They are seeded by one draw from generator and by the image: no other image of the batch counts.
def own_generators(x, generator):
    """One CPU generator per sample of x: (B, ...), seeded by it and by one draw from generator."""
    device = generator.device if generator else None
    seed = int(torch.randint(2 ** 62, (1,), generator=generator, device=device))
    rows = x.detach().cpu().float().numpy()
    return [torch.Generator().manual_seed(seed ^ zlib.crc32(row.tobytes())) for row in rows]

def integrate_flow(score, sde, x, steps, vectors, n):
    """log p(x): (B,) in nats, by Runge-Kutta steps along the flow, evenly spaced in log sigma.
    div_y e is v.(de/dy v), summed over vectors: (B, ...) or (1, ...) each, and divided by n."""
    d, ends = x[0].numel(), time_grid(sde, 1).flip(0)  # t_min, 1
    lo, hi = sde.sigma(ends).log().tolist()
    grid = sde.time(torch.linspace(lo, hi, 2 * steps + 1, dtype=torch.float64).exp())
    grid[0], grid[-1] = ends                                      # knots and, between, midpoints
    def flow(w, i):                                               # dw/dl, its divergence at grid[i]
        a, s = sde.at(grid[i])
        sigma, c = s / a, math.hypot(1, s / a)
        y, b = (c * w).detach().requires_grad_(), sigma / c
        e = -s * score_at(score, a * y, grid[i])
        need(e.requires_grad, "a likelihood needs a score that is differentiable in x")
        divergence = 0
        for v in vectors:
            product, = torch.autograd.grad((e * v).sum(), y, retain_graph=True)     # v (de/dy)
            divergence = divergence + (product * v).flatten(1).sum(1).double() / n
        return b * (e.detach() - b * w), sigma * divergence - d * b ** 2
    first, last = (math.hypot(*sde.at(t)) for t in ends)          # a c, hence x = a c w
    w, log_p, h = x / first, 0.0, (hi - lo) / steps
    for i in range(0, 2 * steps, 2):
        k1, d1 = flow(w, i)
        k2, d2 = flow(w + h / 2 * k1, i + 1)
        k3, d3 = flow(w + h / 2 * k2, i + 1)
        k4, d4 = flow(w + h * k3, i + 2)
        w = w + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        log_p = log_p + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return log_p + sde.prior_log_prob(last * w) + d * math.log(last / first)

def log_likelihood(score, sde, x, steps=32, probes=1, exact=False, generator=None, error=False):
    """log p(x) of x: (B, ...), strictly log p_t at t = sde.t_min (VE: about one level of 256) ->
    (B,) in nats, float64. 4 * steps scores, each with its gradients. probes: signs per image, whose
    spread is part of every single value; exact: D unit vectors instead. error: -> (log p, the error
    of the integration, not of signs, judged by half the steps). Raises ValueError for NaN in x."""
    need(steps > error and probes >= 1, "steps and probes start at 1, with an error steps at 2")
    need(x.is_floating_point() and x.isfinite().all(), "a likelihood needs finite floats, no NaN")
    with torch.inference_mode(False):            # it ends no_grad, too
        x, draws = x.detach().clone(), own_generators(x, generator)
        signs = [torch.randint(2, (probes, *x.shape[1:]), generator=g) for g in draws]
        vectors, n = (2 * torch.stack(signs, dim=1) - 1).to(x), probes      # (probes, B, ...)
        if exact:
            vectors, n = torch.eye(x[0].numel()).to(x).view(-1, 1, *x.shape[1:]), 1
        log_p = integrate_flow(score, sde, x, steps, vectors, n)
        half = integrate_flow(score, sde, x, steps // 2, vectors, n) if error else None
    return (log_p, flow_error(log_p, half)) if error else log_p

def flow_error(fine, coarse):
    """The error of fine, estimated from coarse, of half as many steps: it is 1/15 of the difference
    where steps are short, and half of it or more where they are too long. An eighth is between."""
    return (fine - coarse).abs() / 8

def to_levels(x):
    """Images, clamped to [-1, 1] -> their 8-bit levels 0..255, uint8 on the CPU."""
    need(x.is_floating_point(), f"to_levels needs images in [-1, 1], not {x.dtype}")
    need(not x.isnan().any(), "NaN images: train with a lower --lr", FloatingPointError)
    return ((x.clamp(-1, 1) + 1) * 128).floor().clamp(max=255).to(torch.uint8).cpu()
def from_levels(x, u=0.5):                       # uint8 -> in [-1, 1]: the middle of the cell, or u
    return (x + u) / 128 - 1
def dequantise(levels, generator=None):                           # uint8 -> anywhere in the cell
    jitter = torch.rand(levels.shape, generator=generator, device=levels.device)
    return from_levels(levels, jitter)

def bits_per_dim(score, sde, x, steps=32, probes=1, exact=False, generator=None, error=False):
    """-log2 p/D of 8-bit images, dequantised, in bits/dim. x: (B, C, H, W) in [-1, 1] -> (B,).
    Divided by 128 per pixel a density over [-1, 1] is one over levels: hence + 7 (for [0, 1] + 8).
    Arguments as in log_likelihood. Raises ValueError for NaN and x outside [-1, 1]."""
    need(float(x.abs().max()) <= 1, "bits/dim need images in [-1, 1], without NaN")
    levels, unit = to_levels(x).to(x.device), x[0].numel() * math.log(2)
    u = [torch.rand(x.shape[1:], generator=g) for g in own_generators(levels, generator)]
    y = from_levels(levels, torch.stack(u).to(x))
    nats = log_likelihood(score, sde, y, steps, probes, exact, generator, error)
    return (7 - nats[0] / unit, nats[1] / unit) if error else 7 - nats / unit

# ==== 6. Zero-shot uses of a score: inpainting (Table 3) and reconstruction (Table 4) =============
def add_noise(sde, x, t, generator, start=None):
    """x: (B, ...) at time start (None: a clean image) -> x at the later time t:
    x_t = up x_start + noise of variance s_t^2 - (up s_start)^2, with up = a_t/a_start."""
    (a0, s0), (a, s) = (1.0, 0.0) if start is None else sde.at(start), sde.at(t)
    up = a / a0
    return up * x + math.sqrt(max(s ** 2 - (up * s0) ** 2, 0)) * noise_like(x, generator)

def inpaint(score, sde, x, mask, steps=40, repeats=10, generator=None):
    """Fill the pixels of x: (B, C, H, W) where mask, which broadcasts to it, is 0 -> like x.
    After every step the known pixels are replaced by themselves at that noise level. The others
    were drawn without knowing them, so forward noise undoes the step, and it is taken repeats times
    in all (Lugmayr et al. 2022). Known pixels come back bit for bit, unknown ones are not used."""
    need(repeats >= 1, f"repeats start at 1, not {repeats}")
    known = mask.to(x.device).bool().expand_as(x)
    x = torch.where(known, x, torch.zeros_like(x))
    def pinned(y, t):
        return torch.where(known, add_noise(sde, x, t, generator), y)
    def step(score, sde, y, t, t_next, generator):
        for repeat in range(repeats):
            if repeat > 0:
                y = pinned(add_noise(sde, y, t, generator, start=t_next), t)
            y = pinned(reverse_step(score, sde, y, t, t_next, generator), t_next)
        return y
    grid = time_grid(sde, steps)
    y = pinned(sde.prior_sample(x.shape, generator, x.device), grid[0])
    return torch.where(known, x, walk(step, score, sde, y, grid, generator))

def reconstruct(score, sde, x, t=0.02, steps=20, generator=None):
    """Noise x: (B, ...) to time t in [0, 1], then walk Eq. 4 back to data: (B, ...). The paper's
    t = 0.02 is faint, sigma = 0.08 for VP and 0.012 for VE; every network recovers from it."""
    need(0 <= t <= 1, f"reconstruct needs t in [0, 1], not {t}")
    if t <= sde.t_min:
        return x.clone()
    y = add_noise(sde, x, t, generator)
    return walk(reverse_step, score, sde, y, time_grid(sde, steps, t_max=t), generator)

# ==== 7. Training by Eq. 11 =======================================================================
# Five things make it fast; --recipe paper is without the first three: the paper's t and lambda(t).
# In brackets: the distance of Unseen's samples (section 9) after 1,500 steps on MNIST without it;
# with all of them it is 11.9 (notebooks/results/recipe-mnist-3,7.json).
# - The noise law. Of a uniform t few fall where images take shape: sigma around 1 for digits, 0.3
#   for photographs. So log sigma ~ N(centre, spread^2); every k-th draw is uniform in it. [15.9]
# - The weights: balanced_weight of section 3 on both losses, in place of the paper's. [14.4]
# - The window: forgetting draws sigma from 0.2 to 6 (Relative: to 3). Above, noise hides the class,
#   p_f and p_g coincide, and forgetting only fights keeping; below, the class is settled already.
# - The optimiser: Muon for the inner convolutions, Adam for all other weights. [24.6]
# - The precision: bfloat16 where the processor multiplies it faster. [17.7 in the same time]
DIGIT_NOISE, PHOTO_NOISE = (0.2, 1.1, 8), (-1.2, 1.2, 32)         # (centre, spread, k)
EVERY_SIGMA = (0.0, 1e6)  # JSON has no infinity

class Recipe(NamedTuple):
    """How to train: at which noise levels, with which weights, in which arithmetic."""
    noise_law: Any = DIGIT_NOISE     # (centre, spread, k), or None: t uniform
    weighting: Any = "balanced"      # or as in section 3; or a pair of these, for keep and forget
    precision: str = "float32"       # or 'bfloat16'
RECIPES = dict(balanced=Recipe(), paper=Recipe(None, "paper"))

def sample_times(sde, n, generator=None, device=None, window=EVERY_SIGMA, noise_law=DIGIT_NOISE):
    """n stratified training times: (n,), at noise levels sigma in window, by noise_law (Recipe)."""
    ends = sde.sigma(torch.tensor([sde.t_min, 1.0], dtype=torch.float64)).clamp(*window)
    (low, high), (first, last) = ends.log().tolist(), sde.time(ends).tolist()
    need(low < high, f"the schedule has no noise level sigma in the window {tuple(window)}")
    u = (torch.arange(n, device=device) + torch.rand(n, generator=generator, device=device)) / n
    u = u[torch.randperm(n, generator=generator, device=device)]  # covers (0, 1) evenly
    t = first + (last - first) * u
    if noise_law is not None:
        centre, spread, k = noise_law
        law = torch.distributions.Normal(centre, spread)
        p0, p1 = law.cdf(torch.tensor([low, high])).tolist()
        log_sigma = law.icdf((p0 + u * (p1 - p0)).clamp(1e-6, 1 - 1e-6))
        turn = torch.randint(k, (1,), generator=generator, device=device)
        even = (torch.arange(n, device=device) + turn) % k == 0
        t = sde.time(torch.where(even, low + u * (high - low), log_sigma).clamp(low, high).exp())
    return sde.step(t) / sde.n_steps if isinstance(sde, DDPM) else t.clamp(first, last)

class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose step, as a matrix, is made orthogonal: all singular values about 1
    (Jordan et al. 2024), scaled like Adam's steps, one rate for both (Liu et al. 2025)."""
    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(velocity, group["momentum"]).flatten(1)     # (c_out, 9 c_in)
                x = x / (x.norm() + 1e-12)
                for _ in range(5):  # Newton and Schulz
                    y = x @ x.T
                    x = 3.4445 * x + (2.0315 * y @ y - 4.7750 * y) @ x
                p.add_(x.view_as(p), alpha=-0.2 * math.sqrt(max(x.shape)) * group["lr"])

def descend(model, ema, steps, lr, gradients, state=None):
    """Train model; ema, or None, averages its weights. gradients(step) sets every p.grad -> report.
    The rate warms up for 5% of the steps and falls like a cosine. Yields dict(report, step, steps,
    snapshot): snapshot() is a state to go on from, bit for bit; the last has only the average."""
    ema = model if ema is None else ema.eval()                    # then averaging changes nothing
    inner = [p for p in model.parameters() if p.dim() == 4][1:-1] # all but first and last 3x3
    others = [p for p in model.parameters() if all(p is not q for q in inner)]
    parts = [model, ema, torch.optim.Adam(others, lr, betas=(0.9, 0.99))]
    parts += [Muon(inner, lr)] if inner else []
    done = state["step"] if state else 0
    need(not 0 < done < steps or "parts" in state, "a finished state has no optimisers to go on")
    ema.load_state_dict(state["weights"] if state else model.state_dict())
    for part, saved in zip(parts, state["parts"] if state and done < steps else ()):
        part.load_state_dict(copy.deepcopy(saved))
    def snapshot():
        unfinished = dict(parts=[part.state_dict() for part in parts]) if done < steps else {}
        return copy.deepcopy(dict(step=done, weights=ema.state_dict(), **unfinished))
    while done < steps:
        model.zero_grad(set_to_none=True)
        report = gradients(done)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        need(norm.isfinite(), f"infinite gradient in step {done + 1}: lower lr", FloatingPointError)
        warm = min((done + 1) / (steps // 20 + 1), 1)
        for optimiser in parts[2:]:
            optimiser.param_groups[0]["lr"] = lr * warm * (1 + math.cos(math.pi * done / steps)) / 2
            optimiser.step()
        done += 1
        decay = min(0.999, (1 + done) / (10 + done))              # a short memory at first
        for average, now in zip(ema.parameters(), model.parameters()):
            average.data.lerp_(now.data, 1 - decay)
        for average, now in zip(ema.buffers(), model.buffers()):
            average.copy_(now)  # batch norm's statistics, say
        yield dict(report, step=done, steps=steps, snapshot=snapshot)

def check_training(keep, forget, forget_loss, alpha, window, steps):
    """Refuse what would train, but not what was meant: ValueError or TypeError."""
    for x in (keep,) if forget is None else (keep, forget):
        levels = x.dtype == torch.uint8
        need(levels or x.is_floating_point(), f"images: uint8 levels or floats, not {x.dtype}")
        need(len(x) and x.isfinite().all(), "leave out images that contain NaN, but keep some")
        need(levels or x.abs().max() < 99, "levels 0..255 must be uint8; floats are in [-1, 1]")
    need((forget is None) == (forget_loss is None), "forget and forget_loss belong together")
    need(forget is None or alpha is not None and 0 <= alpha < 1,
         f"alpha {alpha} must be in [0, 1), the weight of the keep loss, else nothing is forgotten")
    need(0 <= window[0] < window[1], f"window must be 0 <= low < high in sigma, not {window}")
    need(steps >= 1, f"steps must be at least 1, not {steps}")
    need(torch.is_grad_enabled(), "leave torch.no_grad and torch.inference_mode to train")
    try:
        inspect.signature(forget_loss or obtuse_loss).bind(0, 0, 0, t=0, weighting=0, generator=0)
    except TypeError as error:
        raise TypeError(f"{forget_loss} needs the signature of obtuse_loss: {error}") from None

def eq_11(model, keep_loss, forget_loss, alpha):                  # its gradients, into model
    sgu_loss(keep_loss, forget_loss, alpha).backward()

def train(model, ema, sde, keep, forget=None, forget_loss=None, alpha=None, *, steps, batch_size=64,
          lr=4e-3, window=EVERY_SIGMA, recipe=Recipe(), data_std=None, seed=0, state=None,
          backward=eq_11):
    """Train model, a network for make_score, in place by Eq. 11: for info in train(...): ...
    ema: copy.deepcopy(model), whose averaged weights one samples with, or None. keep, forget:
    (N, ...) uint8 or floats on its device; forget_loss: of obtuse_loss's signature, at sigma in
    window; recipe: a Recipe, whose 'balanced' is power 1 for keep, 1/2 for forget (SGU-Relative: a
    pair of balanced_weight); backward: losses -> gradients. Yields dict(step, steps, keep, forget,
    score, snapshot): losses weighted by w(t), the average's score(x, t), and as in descend. Raises
    as check_training does, and FloatingPointError for a loss that is not finite."""
    check_training(keep, forget, forget_loss, alpha, window, steps)
    std = getattr(model, "data_std", 0.5) if data_std is None else data_std
    score, average = (make_score(m, sde, std, recipe.precision) for m in (model, ema or model))
    both = w if isinstance(w := recipe.weighting, (tuple, list)) else (w, w)  # keep, forget
    weights = [balanced_weight(sde, std, power) if weight == "balanced" else weight
               for weight, power in zip(both, (1.0, 0.5))]
    def term(step, i, loss, data, sigmas):
        g = torch.Generator(data.device).manual_seed(2 * (seed * 1_000_003 + step) + i)
        x0 = data[torch.randint(len(data), (batch_size,), generator=g, device=data.device)]
        x0 = dequantise(x0, g) if x0.dtype == torch.uint8 else x0
        t = sample_times(sde, batch_size, g, data.device, sigmas, recipe.noise_law)
        value = loss(score, sde, x0, t=t, weighting=weights[i], generator=g)
        need(torch.is_tensor(value) and value.dim() == 0 and value.requires_grad,
             "a loss must return one differentiable number, the mean over the batch", TypeError)
        need(value.isfinite(), f"the {('keep', 'forget')[i]} loss is {value.item()} at step "
             f"{step + 1}; lower the learning rate, or raise alpha", FloatingPointError)
        return value
    def gradients(step):
        kept, gone = term(step, 0, score_matching_loss, keep, EVERY_SIGMA), torch.zeros(())
        if forget is None:
            kept.backward()
        else:
            gone = term(step, 1, forget_loss, forget, window)
            backward(model, kept, gone, alpha)
        return dict(keep=kept.item(), forget=gone.item(), score=average)
    return descend(model, ema, steps, lr, gradients, state)

# ==================================== PART TWO: THE EXPERIMENT ====================================
# ==== 8. Data: uint8 tensors in memory, (N, C, H, W), with integer labels (N,) ====================
DIGITS = [str(i) for i in range(10)]
IDX = "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz"
DATASETS = dict(    # name: (default --forget, default --sde, files in --data-root, torchvision's)
    glyphs=("3,7", "ve", "", ""), mnist=("3,7", "ve", IDX, "MNIST"),
    fashion=("Sneaker", "ve", "Fashion" + IDX, "FashionMNIST"),
    kmnist=("0", "ve", "K" + IDX, "KMNIST"),
    cifar10=("automobile,dog", "vp", "cifar-10-batches-py/{data_batch_1..5,...}", "CIFAR10"),
    stl10=("airplane", "vp", "stl10_binary/{train,test}_{X,y}.bin and class_names.txt", "STL10"),
    celeba=("Bangs", "vp", "celeba/{img_align_celeba/*.jpg,list_attr_celeba.txt,...}", "CelebA"))

def load_data(name, root="data"):
    """One of DATASETS, downloaded below root if need be, or the path of an .npz (see as_data) ->
    dict(name, train, train_labels, test, test_labels, classes). Raises UsageError."""
    own = name.endswith(".npz") and os.path.exists(name)
    need(own or name in DATASETS, f"--dataset: {name!r} is no .npz file nor in {[*DATASETS]}")
    try:
        arrays = dict(np.load(name)) if own else arrays_of(name, root)
        data = as_data(pathlib.Path(name).stem, arrays)
        for half, y in [("train", data["train_labels"]), ("test", data["test_labels"])]:
            blank = data[half].amax((1, 2, 3)) == data[half].amin((1, 2, 3))
            damaged = blank.float().mean() > 0.01 or len(y.unique(dim=0)) < 2
            need(own or not damaged, "many images show nothing, or all labels are the same")
            if y.dim() == 1 and len(y.unique_consecutive()) <= max(len(y) // 10, len(y.unique())):
                order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
                data.update({half: data[half][order], half + "_labels": y[order]})   # was sorted
        return data
    except Exception as error:  # numpy, torchvision: in many ways
        hint = ("is not what as_data in sgu.py describes" if own else "is missing or damaged, and "
                f"cannot be downloaded; put {DATASETS[name][2]} into {root}")
        reason = " ".join(str(error).split())[:250]
        hint = "needs what requirements.txt names" if isinstance(error, ImportError) else hint
        raise UsageError(f"{name} {hint} ({type(error).__name__}: {reason})") from None

def arrays_of(name, root):
    """A data set of torchvision, or 12,000 + 2,000 glyphs, as the arrays of an .npz."""
    if name == "glyphs":
        images, labels = map(torch.cat, zip(draw_glyphs(12000, 0), draw_glyphs(2000, 1)))
        return dict(images=images[:, 0], labels=labels, split=np.repeat([0, 1], [12000, 2000]))
    from torchvision import datasets
    halves = [dict(split=half) if name in ("stl10", "celeba") else dict(train=half == "train")
              for half in ("train", "test")]
    with contextlib.redirect_stdout(io.StringIO()):               # it names every mirror it tries
        parts = [getattr(datasets, DATASETS[name][3])(root, download=True, **how) for how in halves]
    split = np.repeat([0, 1], [len(part) for part in parts])
    if name == "celeba":  # the face, by a box filter
        faces = [np.asarray(image.crop((15, 35, 163, 183)).resize((64, 64), 4))
                 for part in parts for image, _ in part]
        return dict(images=np.stack(faces), split=split, attribute_names=parts[0].attr_names[:40],
                    attributes=np.concatenate([part.attr[:, :40] for part in parts]))
    images = np.concatenate([part.data for part in parts])
    labels = [part.labels if name == "stl10" else part.targets for part in parts]
    return dict(images=images.transpose(0, 2, 3, 1) if name == "stl10" else images, split=split,
                labels=np.concatenate(labels),
                class_names=DIGITS if name in ("mnist", "kmnist") else parts[0].classes)

def as_data(source, arrays):
    """The arrays of an .npz -> what load_data returns. images: square uint8 (N, H, W[, C]), shrunk
    to 64 pixels; labels (N,) or attributes (N, A), yes above 0; optional: class_names or attribute_
    names; split (N,), whose highest number, 1 or more, is for testing (else a random sixth)."""
    many = "attributes" in arrays
    key, names = ("attributes", "attribute_names") if many else ("labels", "class_names")
    x, y = np.ascontiguousarray(arrays["images"]), np.asarray(arrays[key])
    need(x.dtype == np.uint8 and x.ndim in (3, 4) and x.shape[1] == x.shape[2],
         f"images must be uint8 and square, (N, H, W) or (N, H, W, C), not {x.dtype} {x.shape}")
    sixth = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).numpy() % 6 == 5
    split = np.asarray(arrays.get("split", sixth))
    for v, axes in ((y, 1 + many), (split, 1)):
        known = v.dtype.kind in "iub" or axes > 1 and (v == v).all()    # NaN says neither
        need(known and v.ndim == axes and len(v) == len(x) > 0,
             f"{len(x)} images need as many {key} and split, integers, not {v.dtype} {v.shape}")
    count = y.shape[1] if many else int(y.max()) + 1
    names = arrays.get(names, range(count if many else min(count, len(x))))
    names = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in names]
    need(count <= len(names) and (many or y.min() >= 0),
         f"{key} count from 0, and {len(names)} names do not fit {y.min()}..{count - 1}")
    names = [re.sub(r"[\s,|\0]+", " ", v).strip() for v in names]
    names = [f"class {v or i}" if v in ("", "total", "n", "ci95") else v
             for i, v in enumerate(names)]                        # the results have such keys
    stems = [re.sub(r"( \(\d+\))+$", "", v) for v in names]      # 'a (0)' must not meet another
    names = [f"{v} ({i})" if stems.count(stems[i]) > 1 else v for i, v in enumerate(names)]
    x = torch.from_numpy(x.reshape(*x.shape[:3], -1)).permute(0, 3, 1, 2).contiguous()
    y = torch.from_numpy(y > 0 if many else y.astype(np.int64))
    if x.shape[2] > 64:
        x = torch.cat([F.interpolate(part.float(), (64, 64), mode="bilinear", antialias=True)
                       for part in x.split(1000)]).round().clamp(0, 255).byte()
    test = torch.from_numpy(split.astype(np.int64)) == max(int(split.max()), 1)
    return dict(name=source, classes=names, train=x[~test], train_labels=y[~test], test=x[test],
                test_labels=y[test])

def draw_glyphs(n, seed, side=28):
    """n digits of matplotlib's fonts, moved at random: (n, 1, side, side) uint8, labels (n,)."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    plates, g = [], torch.Generator().manual_seed(seed)
    for name in ("Sans", "Serif"):
        path = pathlib.Path(matplotlib.get_data_path(), f"fonts/ttf/DejaVu{name}.ttf")
        font = ImageFont.truetype(str(path), 58, layout_engine=ImageFont.Layout.BASIC)
        for digit in DIGITS:
            plate = Image.new("L", (64, 64))
            ImageDraw.Draw(plate).text((32, 32), digit, fill=255, font=font, anchor="mm")
            plates.append(torch.from_numpy(np.array(plate)).float() / 255)
    which = torch.randint(len(plates), (n,), generator=g)
    plates, images = torch.stack(plates)[:, None], []             # (fonts * 10, 1, 64, 64)
    jitter = torch.rand(5, n, generator=g, dtype=torch.float32) - 0.5
    angle, scale, slant, dx, dy = jitter * jitter.new_tensor([0.1, 0.06, 0.06, 0.05, 0.05])[:, None]
    cos, sin = angle.cos() * (1 + scale), angle.sin() * (1 + scale)
    affine = torch.stack([cos, -sin + slant, dx, sin, cos, dy], dim=1).view(n, 2, 3)
    for i in torch.arange(n).split(2000):
        grid = F.affine_grid(affine[i], (len(i), 1, 2 * side, 2 * side), align_corners=False)
        images.append(F.avg_pool2d(F.grid_sample(plates[which[i]], grid, align_corners=False), 2))
    return (torch.cat(images) * 255).round().clamp(0, 255).byte(), which % 10

def choose(data, forget):
    """What to forget: '3,7', 'automobile,dog', 'Bangs' (names in any case, or numbers). Adds chosen
    (names), forget (classes), checksum; attributes become two classes, 'no Bangs' and 'Bangs'."""
    names, numbers, data = data["classes"], [], dict(data)
    for word in [word.strip() for word in forget.split(",")]:
        found = [i for i, name in enumerate(names) if name == word]
        found = found or [i for i, v in enumerate(names) if word.lower() in (v.lower(), str(i))]
        need(len(found) == 1 and found[0] not in numbers, f"--forget {forget}: {word!r} must be "
             f"one class, once, of {', '.join(names)}, or its number from 0")
        numbers += found
    data.update(chosen=",".join(names[i] for i in numbers), forget=numbers)
    if data["train_labels"].dim() == 2:
        yes = data["chosen"].replace(",", "+")
        data.update(classes=[f"no {yes}", yes], forget=[1])
        for key in ("train_labels", "test_labels"):
            data[key] = data[key][:, numbers].any(1).long()
    for key in ("train", "test"):
        need(0 < is_forgotten(data, key).sum() < len(data[key]),
             f"--forget {forget}: nothing to forget, or nothing else, among the {key} images")
    tensors = [v for v in data.values() if torch.is_tensor(v)]
    return dict(data, checksum=checksum([*tensors, torch.tensor(data["forget"])]))

def is_forgotten(data, key):  # which of data['train'] or data['test']: (N,) bool
    return torch.isin(data[key + "_labels"], torch.tensor(data["forget"]))
def checksum(tensors):  # one number for their content
    arrays = (tensor.detach().cpu().contiguous().numpy() for tensor in tensors)
    return functools.reduce(lambda crc, array: zlib.crc32(array, crc), arrays, 0)

# ==== 9. The judge: a classifier of the real images, with one more class, "none of these" =========
# It says what a sample shows (the unlearning ratio), whether it shows anything, and by its features
# how far samples are from real images: NOT the FID, which has another network.
class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)

class Judge(nn.Module):
    """A nine-layer residual network, (B, C, H, W) in [-1, 1] -> logits (B, classes)."""
    def __init__(self, image_channels, classes, width):
        super().__init__()
        self.config = dict(image_channels=image_channels, classes=classes, width=width)
        def conv(c, d, last=nn.Identity()):
            layer = nn.Conv2d(c, d, 3, padding=1, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(d), nn.ReLU(), last)
        w, half = width, nn.MaxPool2d(2)
        self.stem = conv(image_channels, w)
        self.body = nn.Sequential(
            conv(w, 2 * w, half), Residual(conv(2 * w, 2 * w), conv(2 * w, 2 * w)),
            conv(2 * w, 4 * w, half), conv(4 * w, 8 * w, half),
            Residual(conv(8 * w, 8 * w), conv(8 * w, 8 * w)))
        self.head = nn.Linear(8 * w, classes)
        self.to(memory_format=torch.channels_last)
    def features(self, x):                                        # (B, C, H, W) -> (B, 8 width)
        large, x = x.shape[2] > 32, self.stem(x.contiguous(memory_format=torch.channels_last))
        return self.body(F.max_pool2d(x, 2) if large else x).amax((2, 3))   # 64 pixels: then as 32
    def forward(self, x):
        return self.head(self.features(x))

def none_of_these(x, g):
    """Images x: (B, C, H, W) in [-1, 1] -> as many that are none, each of a random kind."""
    (b, c, h, w), p = x.shape, x.shape[2] // 4
    strength, shade, coin = torch.rand(3, b, 1, 1, 1, generator=g)
    z, other = noise_like(x, g), x.roll(1, 0)
    smooth = F.interpolate(2 * torch.randn(b, c, p, p, generator=g), size=(h, w), mode="bilinear")
    z = torch.where(coin < 0.5, z, smooth)
    both = torch.where(coin < 0.5, torch.maximum(x, other), (x + other) / 2)
    patches = x.reshape(b, c, 4, p, 4, p).permute(2, 4, 0, 1, 3, 5).flatten(0, 1)
    patches = patches[torch.randperm(16, generator=g)].view(4, 4, b, c, p, p)
    dots = torch.where(torch.rand(x.shape, generator=g) < 0.15 * strength, 1.0, -1.0)
    kinds = [2 * shade - 1 + 2 * strength * z,                    # noise of any shade and strength
             x + (0.8 + 1.2 * strength) * z, both,                # an image under it; two at once
             patches.permute(2, 3, 0, 4, 1, 5).reshape(x.shape), dots]      # shuffled patches
    which = torch.randint(5, (b,), generator=g)
    return torch.stack(kinds)[which, torch.arange(b)].clamp(-1, 1)

def train_judge(data, width=16, steps=1000, lr=4e-3, batch_size=256, precision="float32",
                device="cpu", seed=0, state=None):
    """A Judge of data, with label smoothing and, per batch, one shift and in colour one flip. A
    fifth of it is none_of_these, the last class. A job, see finish, that reports judge."""
    x, y, none = data["train"], data["train_labels"], len(data["classes"])
    side, pad, kind = x.shape[2], max(x.shape[2] // 14, 2), torch.device(device).type
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(x.shape[1], none + 1, width).to(device)
    weight = judge.head.weight.new_tensor([1.0] * none + [1 / 8])  # in doubt a real image, not none
    def gradients(step):
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(x), (batch_size,), generator=g)
        i, j, flip = torch.randint(2 * pad + 1, (3,), generator=g).tolist()
        image, label = F.pad(x[rows].float() / 127.5 - 1, [pad] * 4, value=-1.0), y[rows]
        image = image[:, :, i:i + side, j:j + side]
        if x.shape[1] == 3:                       # half under faint noise: it is no hair or fur
            image = image.flip(3) if flip % 2 else image
            faint = (0.4 * torch.rand(batch_size, 1, 1, 1, generator=g) - 0.2).clamp(min=0)
            image = (image + faint * noise_like(image, g)).clamp(-1, 1)
        image[::5], label[::5] = none_of_these(image[::5], g), none
        judge.train()
        with torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = judge(image.to(device, judge.head.weight.dtype))
            F.cross_entropy(logits, label.to(device), weight, label_smoothing=0.05).backward()
        return dict(judge=judge)
    return descend(judge, None, steps, lr, gradients, state)

@torch.no_grad()
def opinions(judge, x):
    """x: (N, C, H, W) uint8 -> probabilities (N, K) and features (N, F), float32 on the CPU."""
    need(x.dtype == torch.uint8, f"judge uint8 levels, not {x.dtype}; see to_levels")
    p, parts = next(judge.parameters()), []
    judge.eval()
    for part in x.split(500):
        features = judge.features(part.to(p.device, p.dtype) / 127.5 - 1)
        parts.append((judge.head(features).softmax(1).float().cpu(), features.float().cpu()))
    return tuple(map(torch.cat, zip(*parts)))

def wilson(k, n, z=1.959964):
    """95% interval [lo, hi] of a proportion k/n (Wilson), fractions."""
    centre, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return [max(0.0, (centre - half) / (n + z * z)), min(1.0, (centre + half) / (n + z * z))]

def paired(a, b):
    """a - b on the same n samples, (n,) each: its mean and 95% interval (normal; n = 1: None)."""
    d, mean = a.double() - b.double(), float((a.double() - b.double()).mean())
    half = 1.959964 * float(d.std(correction=min(1, len(d) - 1))) / math.sqrt(len(d))
    return dict(mean=mean, ci95=[mean - half, mean + half] if len(d) > 1 else None)

def frechet(f1, f2):
    """Squared Frechet distance of the Gaussians fitted to features f1: (N, F) and f2: (M, F)."""
    def root(c):
        values, axes = torch.linalg.eigh(c)
        return (axes * values.clamp(min=0).sqrt()) @ axes.T
    (m1, c1), (m2, c2) = ((f.double().mean(0), torch.cov(f.double().T)) for f in (f1, f2))
    cross = root(root(c1) @ c2 @ root(c1)).trace()
    return max(float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross), 0.0)

def judged(probs, features, data, reference, real=None):
    """What the results say of images, shares in [0, 1]; kept: all not called forgotten, noise too.
    probs: (N, K), features: (N, F); reference, real: of real D_g, real cut to as many (bias)."""
    n, names, label = len(probs), data["classes"], probs.argmax(1)
    hit, none = torch.isin(label, torch.tensor(data["forget"])), label >= len(names)
    share, k = {v: int((label == c).sum()) / n for c, v in enumerate(names)}, int(hit.sum())
    ratio = {names[c]: share[names[c]] for c in data["forget"]}
    real = () if real is None or len(real) < n - k else real[:n - k]
    def distance(f):
        return frechet(f, reference) if min(len(f), len(reference)) > 1 else None
    return dict(unlearning_ratio=dict(ratio, total=k / n, n=n, ci95=wilson(k, n)), kept=n - k,
                unsure=int((none | (probs.amax(1) < 0.5)).sum()) / n, none=int(none.sum()) / n,
                class_histogram=share, frechet_kept=distance(features[~hit]),
                frechet_real=distance(real))

# ==== 10. The command: python sgu.py --dataset mnist --forget 3,7 =================================
class Method(NamedTuple):
    """A way to make a model."""
    title: str
    loss: Any = None                 # of D_f; None: the keep loss alone
    alpha: Any = None                # Eq. 11
    keep: str = "D_g"                # what the keep loss sees: D or D_g
    start: str = ""                  # 'scratch'; 'standard', as prepare wants; '': as --training
    share: float = 0.15              # of --steps, if it starts from Standard
    pace: float = 1.0                # of --lr, if it starts from Standard
    window: tuple = EVERY_SIGMA      # the sigma at which the loss of D_f acts ('paper': at all)
    power: float = 0.5               # of its balanced_weight
    prepare: Any = None              # (Standard's score, arguments of train) -> arguments of train

def with_reference(score, arguments):  # for losses that compare with Standard's score
    return dict(arguments, forget_loss=functools.partial(arguments["forget_loss"], reference=score))

METHODS = dict(
    standard=Method("Standard", keep="D", start="scratch"),
    unseen=Method("Unseen", start="scratch"),
    orthogonal=Method("SGU-Orthogonal", orthogonal_loss, 0.95, window=(0.2, 6.0)),
    obtuse=Method("SGU-Obtuse", obtuse_loss, 0.95, window=(0.2, 6.0)),
    relative=Method("SGU-Relative", relative_loss, 0.55, start="standard", power=1.0,
                    window=(0.2, 3.0), prepare=with_reference),   # where digits take shape
    finetune=Method("fine-tuning", start="standard"))
TASKS = ("sample", "likelihood", "inpaint", "reconstruct")
SAMPLER_STEPS = dict(em=120, pc=100, ancestral=100, multistep=20, ode=18)
COLUMNS = ("channels blocks patch data_std noise_law sampler steps batch_size lr samples "
           "likelihood_samples judge_width judge_steps").split()
SMALL, LARGE = ((32, 64), 1, 2, 1.0, DIGIT_NOISE), ((64, 128), 2, 2, 1.0, DIGIT_NOISE)
PHOTO = (0.5, PHOTO_NOISE, "ode")
PRESETS = {         # (data set or largest side of the image, device): COLUMNS
    ("glyphs", "cpu"): (*SMALL, "multistep", 240, 64, 6e-3, 400, 8, 8, 100),
    (28, "cpu"): (*SMALL, "multistep", 6000, 64, 4e-3, 2000, 100, 8, 1200),
    (28, "cuda"): (*LARGE, "multistep", 8000, 256, 4e-3, 10000, 500, 32, 1900),
    (32, "cpu"): ((16, 48, 96), (1, 2, 1), 1, *PHOTO, 20000, 64, 4e-3, 2000, 100, 16, 2000),
    (32, "cuda"): ((64, 128, 256), 2, 1, *PHOTO, 20000, 256, 3e-3, 10000, 500, 64, 4700),
    (64, "cpu"): ((32, 64, 128), 1, 2, *PHOTO, 4000, 32, 4e-3, 500, 50, 16, 1500),
    (64, "cuda"): ((96, 192, 384), 1, 2, *PHOTO, 20000, 128, 3e-3, 10000, 250, 64, 4000)}

def within(kind, low, high=2**31 - 1):           # the type of an option: a number in [low, high]
    def number(text):
        need(low <= kind(text) <= high, f"{text} not in {low}..{high}", argparse.ArgumentTypeError)
        return kind(text)
    return number

def some_of(names):  # the type of an option: some of names, with commas
    def check(text):
        words = [word.strip() for word in text.split(",")]
        need({*words} <= {*names} and len({*words}) == len(words),
             f"{text!r} must be some of {','.join(names)}, each once", argparse.ArgumentTypeError)
        return ",".join(words)
    return check

def parse_options(argv=None):
    """argv -> the options of the command, checked. Raises UsageError."""
    cli = argparse.ArgumentParser("sgu.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    def refuse(message):
        raise UsageError(message.removeprefix("argument "))
    def add(name, kind, text, default=None):
        how = dict(choices=kind) if isinstance(kind, tuple) else dict(type=kind)
        how = dict(action="store_true") if kind is bool else dict(how, metavar="X", default=default)
        text += f" [{default}]" if default else ""
        cli.add_argument(f"--{name}", help=text.replace("%", "%%"), **how)
    cli.error, count = refuse, within(int, 1)
    add("dataset", str, ", ".join(DATASETS) + ", or the path of an .npz", "glyphs")
    add("forget", str, "names or numbers of classes or attributes, as in 3,7")
    default = "standard,unseen,orthogonal,obtuse,relative"
    add("methods", some_of(METHODS), ", ".join(METHODS), default)
    add("training", ("finetune", "retrain"), "SGU on from Standard, or from nothing", "finetune")
    add("recipe", tuple(RECIPES), "balanced (see section 7), or paper", "balanced")
    add("pretrained", str, "the standard.pt of an earlier run, under any --sde")
    add("sde", tuple(SCHEDULES), "ve, vp or ddpm (default: ve for digits, else vp)")
    add("alpha", within(float, 0, 1), "of Eq. 11 (default: the method's)")
    add("steps", count, "of Standard and Unseen (default, as below: see PRESETS)")
    add("unlearn-steps", count, "on from Standard (default: 15% of --steps)")
    add("batch-size", count, "images per step")
    add("lr", within(float, 1e-9, 10), "peak learning rate")
    add("sampler", tuple(SAMPLERS), ", ".join(SAMPLERS))
    add("sampler-steps", count, f"(default: {SAMPLER_STEPS})")
    add("samples", count, "images to draw from each model")
    add("likelihood-samples", count, "test images of D_g and of D_f, for the other tasks")
    add("tasks", some_of(TASKS), ",".join(TASKS), "sample,likelihood")
    add("device", ("auto", "cpu", "cuda"), "where to compute", "auto")
    add("precision", ("float32", "bfloat16"), "of training and sampling")
    add("compile", bool, "torch.compile the network: pays in long runs on a GPU")
    add("seed", within(int, 0), "one number decides everything random but the data", 0)
    add("data-root", str, "folder of the data sets", "data")
    add("out", str, "folder of the results (default: runs/<dataset>-<forget>...)")
    add("fresh", bool, "overwrite what is in --out instead of going on from it")
    return cli.parse_args(argv)

def as_arguments(options):                       # dict(lr=0.1, fresh=True) -> --lr=0.1 --fresh
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in options.items() if value is not None and value is not False]
def Options(**given):  # the same by name, checked in the same way
    return parse_options(as_arguments(given))

def describe(device):  # the machine in words, for the results
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    path = pathlib.Path("/proc/cpuinfo")
    info = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    name = info.partition("model name\t: ")[2].partition("\n")[0] or platform.machine()
    fast = " (bfloat16)" if "amx_bf16" in info or "avx512_bf16" in info else ""
    return f"{name}{fast}, {(n := torch.get_num_threads())} thread{'s' * (n > 1)}"
def from_standard(method, opt):  # is this method trained on from Standard?
    return (METHODS[method].start or {"finetune": "standard"}.get(opt.training)) == "standard"

def fill_in(opt, channels, side, machine):  # what is open; 6/10: in equal time
    fast = opt.device == "cuda" or "bfloat16" in machine
    row = dict(zip(COLUMNS, next(v for (size, kind), v in PRESETS.items() if (
        kind == opt.device and (size == opt.dataset or isinstance(size, int) and side <= size)))))
    row["steps"] = row["steps"] * (10 if fast or opt.dataset == "glyphs" else 6) // 10
    row["sampler_steps"] = SAMPLER_STEPS[opt.sampler or row["sampler"]]
    row["precision"] = "bfloat16" if fast else "float32"
    opt.network = UNet(channels, *(row.pop(k) for k in COLUMNS[:4])).config
    vars(opt).update({k: getattr(opt, k, None) or v for k, v in row.items()})

def resolve(opt):
    """Options with nothing left open -> (opt, data). Raises UsageError before any work is done."""
    opt, cuda = Options(**vars(opt)), torch.cuda.is_available()
    need(opt.device != "cuda" or cuda, "--device cuda: this machine or build of torch has none")
    opt.device = ("cuda" if cuda else "cpu") if opt.device == "auto" else opt.device
    methods = opt.methods.split(",")
    if any(m == "standard" or from_standard(m, opt) for m in methods):
        methods = dict.fromkeys(["standard", *methods])           # the first, and once
    opt.methods = ",".join(methods)
    need(len({METHODS[m].title for m in methods}) == len(methods), "--methods: titles must differ")
    for how in [METHODS[m] for m in methods if METHODS[m].loss]:  # what train would refuse too late
        alpha = how.alpha if opt.alpha is None else opt.alpha
        loss, image = obtuse_loss if how.prepare else how.loss, torch.zeros(1)
        try:
            check_training(image, image, loss, alpha, how.window, 1)
        except (ValueError, TypeError) as error:
            raise UsageError(f"--methods: {how.title}: {error}") from None
    data = load_data(opt.dataset, opt.data_root)
    forget, sde, *_ = DATASETS.get(opt.dataset, (None, "vp"))
    forget = forget if opt.forget is None else opt.forget
    need(forget is not None, "--forget: say what to forget, for instance --forget 3,7")
    data = choose(data, forget)
    opt.forget, opt.checksum = data["chosen"], data["checksum"]   # ' 3, 7' and '3,7' are one run
    name = [data["name"], opt.forget.replace("/", "-"), opt.sde, opt.training, opt.recipe]
    name = "-".join(v for v in name if v not in (None, sde, "finetune", "balanced"))
    opt.sde, opt.out = opt.sde or sde, opt.out or str(pathlib.Path("runs", name))
    _, channels, side, _ = data["train"].shape
    fill_in(opt, channels, side, describe("cpu"))
    need((opt.sampler, opt.sde) != ("ancestral", "ddpm") or opt.sampler_steps <= 1000,
         f"--sampler-steps: the chain has 1000 steps, not {opt.sampler_steps}")
    if opt.pretrained:
        opt.network = load_model(opt.pretrained)[0].config        # of any --sde: it knows sigma
        need(opt.network["image_channels"] == channels,
             f"--pretrained {opt.pretrained}: is no model of images with {channels} channels")
    unit = opt.network["patch"] * 2 ** (len(opt.network["channels"]) - 1)
    need(side % unit == 0 and side >= 8, f"{data['name']}: images are {side} pixels wide; "
         f"they must be 8 or more, a multiple of {unit}")
    return opt, data

def say(text, end="\n"):  # to standard error, if there is one
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=sys.stderr or io.StringIO(), flush=True)

def replace_file(path, content):                 # a kill leaves the old file or the new one
    path = pathlib.Path(path)
    content = content.encode("utf-8", "replace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}")                   # a kill may leave it: one name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk must not stay full
def save_json(path, content):
    replace_file(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

def read_file(path, kind=None, advice=""):
    """What finish wrote: dict(format, config, state, seconds); of a finished network of this kind
    also network: with the averaged weights, frozen. Raises UsageError for anything else."""
    need(os.path.exists(path), f"there is no file {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        need(saved["format"] == "sgu-2" and saved["state"]["step"] > 0, "")
        if kind:
            need("parts" not in saved["state"], "")               # else it is not finished
            saved["network"] = kind(**saved["config"]["network"]).eval().requires_grad_(False)
            saved["network"].load_state_dict(saved["state"]["weights"])
        return saved
    except (OSError, MemoryError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    except Exception:  # unpickling fails in many ways
        what = f"holds no finished {kind.__name__}" if kind else "is damaged or no file of sgu.py"
        raise UsageError(f"{path} {what}{advice}") from None

def finish(label, opt, job, kind=None, **config):
    """Run job from where its file in --out left it to its end, saving every 30 s -> what read_file
    gives. job(state=...) yields dict(step, steps, snapshot, ...); snapshot() is a state to go on
    from; config: what its numbers depend on."""
    path = f"{opt.out}/{label.removeprefix('train ').replace(' ', '_')}.pt"
    config.update(data=opt.checksum, forget=opt.forget, seed=opt.seed, precision=opt.precision)
    saved = dict(format="sgu-2", config=config, state=None, seconds=0.0)
    if os.path.exists(path) and not opt.fresh:
        saved = read_file(path, advice="; choose another --out, or --fresh to overwrite")
        old = saved["config"]
        new = "; ".join(f"{k} {old.get(k)} -> {v}" for k, v in config.items() if old.get(k) != v)
        need(not new, f"{path} was made with other options ({new}); use those, another --out, or "
             "--fresh to overwrite it")
    begin = last = time.time()
    first = saved["state"]["step"] if saved["state"] else 0
    for info in job(state=saved["state"]):
        now, step, steps = time.time(), info["step"], info["steps"]
        if step >= steps or now - last > 30:
            saved.update(state=info["snapshot"](), seconds=saved["seconds"] + now - last)
            buffer, last = io.BytesIO(), now                      # a full disk is then an OSError
            torch.save(saved, buffer)
            replace_file(path, buffer.getbuffer())
        if step >= steps or getattr(sys.stderr, "isatty", bool)():
            left = (now - begin) / (step - first) * (steps - step)
            note = " ".join(f"{k} {v:.4f}" for k, v in info.items() if isinstance(v, float))
            say(f"{label:<28} {step}/{steps} {now - begin:5.0f} s, {left:.0f} s left  {note:<30}",
                end="\r" if step < steps else "\n")
    opt.seconds[label] = saved["seconds"]
    return read_file(path, kind) if kind else saved

def remove_jobs(opt):  # of --fresh: a kill would mix old and new
    tasks = ("", "samples_", "likelihood_D_?_*_", "inpaint_D_?_", "reconstruct_D_?_")
    files = [f"{task}{m}.pt" for m in opt.methods.split(",") for task in tasks]
    files += "judge.pt results.json table.md samples.png inpaint.png reconstruct.png".split()
    for path in [path for name in files for path in pathlib.Path(opt.out).glob(name)]:
        if opt.fresh and not (opt.pretrained and path.samefile(opt.pretrained)):
            path.unlink()

def load_model(path, device="cpu"):
    """A finished <method>.pt -> (network, schedule): make_score of these two is its score."""
    saved = read_file(path, UNet)
    return saved["network"].to(device), SCHEDULES[saved["config"]["sde"]]()
def load_judge(path, device="cpu"):  # a finished judge.pt -> its Judge, for opinions
    return read_file(path, Judge)["network"].to(device)

def get_judge(opt, data):  # trained now or earlier: what read_file gives
    network = Judge(data["train"].shape[1], len(data["classes"]) + 1, opt.judge_width).config
    job = functools.partial(train_judge, data, opt.judge_width, opt.judge_steps, device=opt.device,
                            precision=opt.precision, seed=opt.seed)
    return finish("judge", opt, job, Judge, steps=opt.judge_steps, network=network)

def text_of(function):  # changes with its own lines, not its helpers'
    try:
        text = [inspect.getsource(getattr(function, "func", function))]     # of a partial: its own
        text += [getattr(function, key, "") for key in ("args", "keywords")]
        text += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        return zlib.crc32(re.sub(r" at 0x\w+", "", str(text)).encode())
    except (OSError, TypeError):             # None; or typed in at a prompt: edits go unseen
        return getattr(function, "__name__", None)

def get_model(method, opt, data):  # trained now or earlier: what read_file gives
    how, sde, gone = METHODS[method], SCHEDULES[opt.sde](), is_forgotten(data, "train")
    standard, standard_score = opt.pretrained or f"{opt.out}/standard.pt", None
    if method == "standard" and opt.pretrained:
        return read_file(standard, UNet)
    recipe, window = RECIPES[opt.recipe]._replace(precision=opt.precision), EVERY_SIGMA
    if opt.recipe == "balanced":
        std, window = opt.network["data_std"], how.window
        weights = balanced_weight(sde, std), balanced_weight(sde, std, how.power)
        recipe = recipe._replace(noise_law=opt.noise_law, weighting=weights)
    alpha = how.alpha if opt.alpha is None or not how.loss else opt.alpha
    given = dict(alpha=alpha, window=window, steps=opt.steps, lr=opt.lr, batch_size=opt.batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(opt.seed)
        model = UNet(**opt.network).to(opt.device)
    if from_standard(method, opt):
        reference = load_model(standard, opt.device)[0]
        model.load_state_dict(reference.state_dict())
        standard_score = make_score(reference, sde, precision=opt.precision)
        given["steps"] = opt.unlearn_steps or max(1, round(how.share * opt.steps))
        given["lr"] *= how.pace
    config = dict(given, method=method, keep=how.keep, power=how.power, sde=opt.sde,
                  recipe=opt.recipe, network=opt.network, schedule=text_of(SCHEDULES[opt.sde]),
                  training=("retrain", "finetune")[from_standard(method, opt)],
                  noise_law=recipe.noise_law, start=checksum(model.state_dict().values()),
                  loss=text_of(how.loss), prepare=text_of(how.prepare))
    keep, forget = data["train"] if how.keep == "D" else data["train"][~gone], data["train"][gone]
    if data["train"].shape[1] == 3 and len(gone) < 10_000:        # few photographs: mirrored, too
        keep, forget = (torch.cat([x, x.flip(3)]) for x in (keep, forget))
    arguments = dict(given, model=model, ema=copy.deepcopy(model).requires_grad_(False), sde=sde,
                     keep=keep.to(opt.device), forget=forget.to(opt.device) if how.loss else None,
                     forget_loss=how.loss, recipe=recipe, seed=opt.seed)
    if how.prepare:
        arguments = how.prepare(standard_score, arguments)
    if opt.compile:
        model.compile()
    return finish(f"train {method}", opt, functools.partial(train, **arguments), UNet, **config)

def chunks(n, size, compute, state=None):
    """A job: compute(rows) for slices of range(n), joined in state["values"]."""
    values = list(state["values"].split(size)) if state else []
    if state and state["step"] < n and len(values[-1]) < size:
        values.pop()  # as if n had always been so
    done = sum(map(len, values))
    while done < n:
        values.append(compute(slice(done, min(done + size, n))))
        need(values[-1].isfinite().all(), "the network diverged; lower --lr", FloatingPointError)
        done += len(values[-1])
        yield dict(step=done, steps=n, snapshot=lambda: dict(step=done, values=torch.cat(values)))

def upper_half_hidden(x):                        # of (..., H, W): the mask, 0 above and 1 below
    return (torch.arange(x.shape[-2]) >= x.shape[-2] // 2).float()[:, None].expand(x.shape[-2:])

def values_of(method, network, opt, task, x, steps=None):
    """What a task makes of one network, computed now or earlier: images (n, C, H, W) uint8, or for
    'likelihood' bits/dim (n,). x: test images, of whose shape samples are. Random numbers depend on
    --seed and the chunk and place (likelihood: the image) alone: the same for every method."""
    sde, nll, n, how = SCHEDULES[opt.sde](), "likelihood" in task, len(x), {}
    score = make_score(network, sde, precision="float32" if nll else opt.precision)
    size = max(4, min(50, 3200 // steps)) if nll else 50
    if task == "samples":
        n, size, how = opt.samples, 100, dict(sampler=opt.sampler, sampler_steps=opt.sampler_steps)
    def compute(rows):
        g = torch.Generator(opt.device).manual_seed(opt.seed * 1_000_003 + rows.start * (not nll))
        if task == "samples":
            shape = (rows.stop - rows.start, *x.shape[1:])
            return to_levels(SAMPLERS[opt.sampler](score, sde, shape, opt.sampler_steps,
                                                   generator=g, device=opt.device))
        clean = from_levels(x[rows].to(opt.device))
        if nll:
            return bits_per_dim(score, sde, clean, steps, generator=g).cpu()
        if "inpaint" in task:
            return to_levels(inpaint(score, sde, clean, upper_half_hidden(x), generator=g))
        return to_levels(reconstruct(score, sde, clean, generator=g))
    how.update(sde=opt.sde, network=checksum(network.state_dict().values()))
    job = functools.partial(chunks, n, size, compute)
    return finish(f"{task} {method}", opt, job, **how)["state"]["values"][:n]

def likelihoods(parts, make):
    """Bits/dim of parts D_g and D_f, in ever finer steps, to 512, until the error is below a tenth
    of the standard error -> their entry in the results, {D_g: (n,), D_f: (n,)}."""
    entry, values = dict(n={}, se={}, steps={}, error={}, converged={}), {}
    for key, (x, _) in parts.items():
        bits, steps, done = make(f"likelihood {key} 16", x, 16), 16, False
        while not done and steps < 512:
            steps, coarse = 2 * steps, bits
            bits = make(f"likelihood {key} {steps}", x, steps)
            error = float(flow_error(bits, coarse).mean())
            se = float(bits.std()) / math.sqrt(len(x)) if len(x) > 1 else None
            done = error < 0.1 * (se or 0.1)
        entry[key], values[key] = float(bits.mean()), bits
        for name, value in dict(n=len(x), se=se, steps=steps, error=error, converged=done).items():
            entry[name][key] = value
    return entry, values

def restored(before, after, labels, judge):      # what the judge sees after inpaint or reconstruct
    (was, clean), (now, features) = opinions(judge, before), opinions(judge, after)
    right, n = int((now.argmax(1) == labels).sum()), len(labels)
    return dict(accuracy=right / n, ci95=wilson(right, n), n=n,
                clean=float((was.argmax(1) == labels).float().mean()),
                distance=float((features - clean).norm(dim=1).mean()))

def cells(entry):  # a method's column: {(section, row): text}
    def interval(value, ends, unit=100, form=".1f"):
        low, high = (f"{unit * v:{form}}" for v in ends or (math.nan, math.nan))
        return f"{unit * value:{form}} [{low}, {high}]"
    found, ratio, nll = {}, entry.get("unlearning_ratio", {}), entry.get("nll_bits_per_dim")
    for row in [row for row in ratio if row not in ("n", "ci95")]:
        ends = wilson(round(ratio[row] * ratio["n"]), ratio["n"])
        found["unlearning ratio, %", row] = interval(ratio[row], ends)
    if ratio:
        found["none or unsure, %", ""] = f"{100 * entry['unsure']:.1f}"
        for row, key in (("of samples kept", "frechet_kept"), ("of real images", "frechet_real")):
            value = math.nan if entry[key] is None else entry[key]
            found["distance", row] = f"{value:.2f} (n = {entry['kept']})"
    for row in ("D_g", "D_f") if nll else ():
        error = "" if nll["se"][row] is None else f" ± {nll['se'][row]:.2f}"
        error += "" if nll["converged"][row] else " not converged"
        found["NLL, bits/dim", row] = f"{nll[row]:.2f}{error}"
    for task in ("inpaint", "reconstruct"):
        for row, v in entry.get(task, {}).items():
            found[f"{task}, % right", row] = interval(v["accuracy"], v["ci95"])
    for other in ("minus unseen", "minus standard"):
        for row, v in entry.get(other, {}).items():
            how = (100, "+.1f") if row == "ratio" else (1, "+.2f")
            found[other, row] = interval(v["mean"], v["ci95"], *how)
    return found

def save_table(results, out):
    """results.json turned on its side, into table.md and to standard output: a column per method,
    and under a row the paper's, where notebooks/paper.json is at hand and has it."""
    config, path = results["config"], pathlib.Path(__file__).with_name("notebooks") / "paper.json"
    tables = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    paper = {n: tables.get(n, {}).get(f"{results['data']},{config['sde']}", {}) for n in "2345"}
    first = "5" if config["training"] == "finetune" and paper["5"] else "2"
    numbers = {"unlearning ratio, %": first, "NLL, bits/dim": first, "inpaint, % right": "3",
               "reconstruct, % right": "4"}
    if {*paper[first]} - {"total", "D_g", "D_f"} != {*config["forget"].split(",")}:
        numbers = {}  # it forgot something else
    columns = {method: cells(entry) for method, entry in results["methods"].items()}
    rows = [["", *(METHODS[method].title for method in columns)]]
    for section, row in dict.fromkeys(key for column in columns.values() for key in column):
        rows.append([f"{section} {row}", *(v.get((section, row), "") for v in columns.values())])
        number = numbers.get(section)
        if number and row in paper[number]:
            theirs = dict(zip(tables["columns"], map(str, paper[number][row])))
            rows.append([f"  the paper, Table {number}", *(theirs.get(m, "") for m in columns)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    judge, lines = results["judge"], [" | ".join(map(str.ljust, row, widths)) for row in rows]
    title = (f"`{results['command']}`, {results['device']}. The judge is right on "
             f"{judge['test_accuracy']:.2%} of the test images; it sees {judge['floor']:.2%} "
             f"forgotten in those of D_g (its floor), none of these in {judge['none']:.2%} of all.")
    text = "\n".join([title, "", *(f"| {line} |" for line in lines), ""])
    replace_file(f"{out}/table.md", text)
    text += f"\nPictures, table and all numbers are in {out}"
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)

def draw_picture(path, rows, judge, forget):
    """rows: {title: images (n, C, H, W) uint8} -> a PNG; what the judge calls forgotten framed."""
    from PIL import Image, ImageDraw
    strips, buffer = [], io.BytesIO()
    for x in rows.values():
        hit = torch.isin(opinions(judge, x)[0].argmax(1), torch.tensor(forget))[:, None]
        x = x[:, :3] if x.shape[1] > 2 else x[:, :1].expand(-1, 3, -1, -1)
        x = F.interpolate(x, scale_factor=max(1, 56 // x.shape[2]))
        colour = torch.where(hit, torch.tensor([230, 159, 0]), 255).byte()[:, :, None, None]
        tiles = colour.repeat(1, 1, x.shape[2] + 6, x.shape[3] + 6)
        tiles[:, :, 3:-3, 3:-3] = x
        strips.append(F.pad(torch.cat(list(tiles), dim=2), (130, 0), value=255))
    page = Image.fromarray(torch.cat(strips, dim=1).permute(1, 2, 0).contiguous().numpy())
    for i, title in enumerate(rows):
        ImageDraw.Draw(page).text((4, (i + 0.4) * page.height // len(rows)), title, fill="black")
    page.save(buffer, "PNG")
    replace_file(path, buffer.getvalue())

@torch.inference_mode(False)
def run(opt, judge=None):
    """The experiment -> the content of results.json. What was finished earlier is read from --out.
    judge: instead of ours, a module with features and head."""
    usual, places = vars(Options()), ("out", "data_root", "fresh")        # these are left out
    asked = {k: v for k, v in vars(opt).items() if v != usual.get(k) and k not in places}
    words = [word for argument in as_arguments(asked) for word in argument.split("=", 1)]
    opt, data = resolve(opt)
    config, machine, opt.seconds = dict(vars(opt)), describe(opt.device), {}
    say(f"{data['name']}: forget {opt.forget} of {len(data['classes'])} classes, {opt.sde}, "
        f"{opt.steps} steps of {opt.batch_size}, {machine}, {opt.precision}; results in {opt.out}")

    remove_jobs(opt)
    judge = get_judge(opt, data)["network"].to(opt.device) if judge is None else judge
    gone, forget = is_forgotten(data, "test"), torch.tensor(data["forget"])
    real = opinions(judge, data["train"][~is_forgotten(data, "train")][:opt.samples])[1]
    probs, features = opinions(judge, data["test"])
    label, reference = probs.argmax(1), features[~gone]
    facts = dict(test_accuracy=float((label == data["test_labels"]).float().mean()),
                 floor=float(torch.isin(label[~gone], forget).float().mean()),
                 none=float((label >= len(data["classes"])).float().mean()))
    if facts["test_accuracy"] < 0.9:
        say(f"sgu: warning: the judge is right on {facts['test_accuracy']:.1%} of test images only")
    parts = {part: [data[key][rows][:opt.likelihood_samples] for key in ("test", "test_labels")]
             for part, rows in (("D_g", ~gone), ("D_f", gone))}

    methods, pairs, pictures = {}, {}, {}
    for method in opt.methods.split(","):
        model, title = get_model(method, opt, data), METHODS[method].title
        make = functools.partial(values_of, method, model["network"].to(opt.device), opt)
        entry = dict(recipe={k: model["config"][k] for k in ("alpha", "steps", "lr", "window")})
        methods[method], pairs[method] = entry, {}
        if "sample" in opt.tasks:
            images = make("samples", data["test"])
            probs, features = opinions(judge, images)
            entry.update(judged(probs, features, data, reference, real))
            pairs[method]["ratio"] = torch.isin(probs.argmax(1), forget)
            pictures.setdefault("samples", {})[title] = images[:16]
        if "likelihood" in opt.tasks:
            entry["nll_bits_per_dim"], bits = likelihoods(parts, make)
            pairs[method].update(bits)
        for task in [task for task in ("inpaint", "reconstruct") if task in opt.tasks]:
            images = {key: make(f"{task} {key}", x) for key, (x, _) in parts.items()}
            entry[task] = {key: restored(x, images[key], y, judge) for key, (x, y) in parts.items()}
            tests = torch.cat([x[:8] for x, _ in parts.values()])
            rows = pictures.setdefault(task, {"test images": tests})
            rows[title] = torch.cat([x[:8] for x in images.values()])
    for other in [other for other in ("unseen", "standard") if other in methods]:
        for method in [method for method in methods if method != other]:
            methods[method][f"minus {other}"] = {
                key: paired(v, pairs[other][key]) for key, v in pairs[method].items()}

    results = dict(command=shlex.join(["python", "sgu.py", *words]), device=machine,
                   data=data["name"], config=config, judge=facts,
                   seconds=dict(opt.seconds, total=sum(opt.seconds.values())), methods=methods,
                   versions=dict(python=platform.python_version(), torch=torch.__version__))
    save_json(f"{opt.out}/results.json", results)
    for task, rows in pictures.items():
        draw_picture(f"{opt.out}/{task}.png", rows, judge, data["forget"])
    save_table(results, opt.out)
    return results

def main(argv=None):
    """The command line. Exit codes: 0 done, 2 something to mend (a line says what), 130 Ctrl-C."""
    try:
        run(parse_options(argv))
        return 0
    except BrokenPipeError:  # all is saved; nobody reads on
        sys.stdout = open(os.devnull, "w")
        return 0
    except KeyboardInterrupt:
        say("\nsgu: stopped; the same command goes on from the last save (without --fresh)")
        return 130
    except (UsageError, FloatingPointError) as error:
        text = str(error)
    except OSError as error:
        text = f"cannot write {error.filename or 'the results'} ({error.strerror or error})"
    except RuntimeError as error:
        if "memory" not in str(error) and not type(error).__module__.startswith("torch._"):
            raise
        text = f"{str(error)[:200]}: more memory, a smaller --batch-size or no --compile is needed"
    say(f"sgu: {' '.join(text.split())}")
    return 2

if __name__ == "__main__":
    sys.exit(main())
