"""Score-based Generative Unlearning (SGU): make a diffusion model forget a class.
Part one is the method of the paper "Unlearning is better than unseen", part two its experiment.

    python sgu.py                                digits drawn from fonts, nothing to download
    python sgu.py --dataset mnist --forget 3,7   the paper's first experiment (--help: options)

    D, D_g, D_f   all images; those to keep (the paper's SFG), of density p_g; those to forget, p_f
    Standard      the model trained on D: it draws everything
    Unseen        trained on D_g alone, as if D_f had never been collected: the yardstick
    SGU           trained by two losses: keep, the usual one, on D_g; forget, to spoil it, on D_f
    x_t           a(t) x0 + s(t) z, z ~ N(0, I), t in [0, 1]; its noise level is sigma = s/a
    score         grad_x log p_t(x). Any function score(x, t) of x: (B, ...) and t: (B,) will do
    e, u          e = -s score(x_t, t), what a score says z is; u = -z/s, the target of the score
    e_g, e_f      e after perfect training on D_g or D_f alone: E[z | x_t] under p_g or p_f
    B, D          images in a batch; in a formula D is the number of pixels, over which e.z sums
"""
import argparse, contextlib, copy, io, json, math, os, platform, re, shlex, sys, time, zlib
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

class UsageError(ValueError):
    """What the user can mend: the command prints it as one line and exits with 2."""
def need(ok, message, error=UsageError):
    if not ok:
        raise error(message)
def per_sample(v, x):  # (B,) -> (B, 1, ..., 1) to fit x
    return v.reshape(-1, *[1] * (x.dim() - 1))

# ==== 1. Noise schedules.  Eq. 3:  dx = f(x, t) dt + g(t) dw,  data (t = 0) to noise (t = 1)
# f = -beta(t) x / 2 is linear, so x_t = a x0 + s z with a' = -beta a / 2, (s^2)' = g^2 - beta s^2.
class Schedule:
    """Subclass: marginal(t) -> a, s; diffusion(t) -> g; time(sigma) -> t; beta(t) -> -2 a'/a."""
    t_min = 0.0  # the least t in use; s(t_min) > 0
    def beta(self, t):
        return torch.zeros_like(t)
    def at(self, t):  # a, s as floats
        return tuple(map(float, self.marginal(torch.as_tensor(t, dtype=torch.float64))))
    def sigma(self, t):
        a, s = self.marginal(t)
        return s / a
    def drift(self, x, t):
        return -0.5 * per_sample(self.beta(t), x) * x
    def prior_sample(self, shape, generator=None, device=None):  # sigma(1) must drown every x0
        return self.at(1)[1] * torch.randn(shape, generator=generator, device=device)
    def prior_log_prob(self, x):  # (B, ...) -> (B,) nats, float64
        x, s = x.double().flatten(1), self.at(1)[1]
        return -0.5 * (x / s).square().sum(1) - x.shape[1] * math.log(s * math.sqrt(2 * math.pi))

class VE(Schedule):
    """Variance exploding: a = 1, s = sigma_min (sigma_max/sigma_min)^t (Song et al. 2021)."""
    def __init__(self, sigma_min=0.01, sigma_max=50.0):  # usual; the paper names none
        self.sigma_min, self.sigma_max, self.ratio = sigma_min, sigma_max, sigma_max / sigma_min
    def marginal(self, t):
        return torch.ones_like(t), self.sigma_min * self.ratio ** t
    def diffusion(self, t):
        return self.marginal(t)[1] * math.sqrt(2 * math.log(self.ratio))
    def time(self, sigma):
        return (sigma / self.sigma_min).log() / math.log(self.ratio)

class VP(Schedule):
    """Variance preserving: beta linear in t, g = sqrt(beta), s^2 = 1 - a^2."""
    t_min = 1e-4  # s(0) = 0, where a score -z/s has no meaning
    def __init__(self, beta_min=0.1, beta_max=20.0):
        self.beta_min, self.slope = beta_min, beta_max - beta_min
    def beta(self, t):
        return self.beta_min + self.slope * t
    def log_a(self, t):  # -1/2 int_0^t beta
        return -self.slope * t ** 2 / 4 - self.beta_min * t / 2
    def marginal(self, t):
        log_a = self.log_a(t)
        return log_a.exp(), (-torch.expm1(2 * log_a)).sqrt()  # expm1: exact for small s
    def diffusion(self, t):
        return self.beta(t).sqrt()
    def time(self, sigma):  # log a = -log(1 + sigma^2)/2 is quadratic in t
        c = torch.log1p(sigma ** 2)
        return 2 * c / (self.beta_min + (self.beta_min ** 2 + 2 * self.slope * c).sqrt())

class DDPM(VP):
    """The chain x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) z, k = 1..n_steps (Appendix B), with
    a^2 = prod_{j<=k} (1 - beta_j) at t = k/n_steps. Between, beta is constant: a VP process."""
    def __init__(self, n_steps=1000, beta_min=1e-4, beta_max=0.02):
        self.n_steps, self.t_min = n_steps, 1 / n_steps
        self.betas = torch.linspace(beta_min, beta_max, n_steps, dtype=torch.float64)
        self.knots = F.pad(torch.log1p(-self.betas).cumsum(0) / 2, (1, 0))  # log a, k = 0..n_steps
    def step(self, t):  # the k whose step has t; 1e-4: rounding
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
SCHEDULES = dict(ve=VE, vp=VP, ddpm=DDPM)  # --sde; add your own, made without arguments

# ==== 2. The network: a small U-Net, and the score made from it
conv3 = partial(nn.Conv2d, kernel_size=3, padding=1)
class Block(nn.Module):
    """Residual block: two 3x3 convolutions; the noise level scales and shifts between them."""
    def __init__(self, c, c_emb):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, c), nn.GroupNorm(1, c)  # more groups: slower
        self.conv1, self.conv2 = conv3(c, c), conv3(c, c, bias=False)
        self.film = nn.Linear(c_emb, 2 * c)
        nn.init.zeros_(self.conv2.weight)  # it starts as the identity
    def forward(self, x, emb):  # (B, c, h, w), (B, c_emb)
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)  # each (B, c, 1, 1)
        return x + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))

class UNet(nn.Module):
    """Images (B, C, H, W), log(sigma)/4 (B,) -> (B, C, H, W). channels, blocks: of every level;
    patch x patch pixels become channels first. H, W: multiples of patch * 2^(levels - 1)."""
    def __init__(self, image_channels=1, channels=(32, 64), blocks=1, patch=2, data_std=0.5):
        super().__init__()
        blocks = [blocks] * len(channels) if isinstance(blocks, int) else list(blocks)
        self.config = dict(image_channels=image_channels, channels=list(channels), blocks=blocks,
                           patch=patch, data_std=data_std)
        self.patch, self.data_std, c_emb = patch, data_std, 4 * channels[0]
        pixels = image_channels * patch ** 2
        row = lambda c, n: nn.ModuleList([Block(c, c_emb) for _ in range(n)])
        self.register_buffer("freqs", torch.linspace(0, math.log(30), 16).exp())
        self.embed = nn.Sequential(nn.Linear(32, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.first = conv3(pixels, channels[0])
        self.down = nn.ModuleList(map(row, channels, blocks))
        self.shrink = nn.ModuleList(map(partial(conv3, stride=2), channels, channels[1:]))
        self.middle = row(channels[-1], 2)
        self.grow = nn.ModuleList(map(conv3, channels[1:], channels))
        self.up = nn.ModuleList(map(row, channels, blocks))
        self.norm = nn.GroupNorm(math.gcd(8, channels[0]), channels[0])
        self.last = conv3(channels[0], pixels, bias=False)
        nn.init.zeros_(self.last.weight)
        self.to(memory_format=torch.channels_last)
    def forward(self, x, level):  # (B, C, H, W), (B,)
        angles = level[:, None] * self.freqs  # (B, 16)
        emb = F.silu(self.embed(torch.cat([angles.sin(), angles.cos()], dim=1)))  # (B, c_emb)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round faint noise off
            h = self.first(F.pixel_unshuffle(x, self.patch))
        skips = []
        for i, blocks in enumerate(self.down):
            h = self.shrink[i - 1](h) if i > 0 else h  # half the side
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
    """score(x, t) = -e/s by a network (Karras et al. 2022): e = (y - denoised)/sigma, y = x/a and
        denoised = (data_std/total)^2 y + (sigma data_std/total) model(y/total, log(sigma)/4),
    total = sqrt(sigma^2 + data_std^2), so that model's inputs and targets have unit variance."""
    std = getattr(model, "data_std", 0.5) if data_std is None else data_std
    need(std > 0 and precision in ("float32", "bfloat16"),
         f"data_std > 0, precision float32 or bfloat16: not {std}, {precision}")
    def score(x, t):
        a, s = (per_sample(v, x) for v in sde.marginal(t))
        sigma = s / a
        total = (sigma ** 2 + std ** 2).sqrt()
        dtype = next(model.parameters(), x).dtype if isinstance(model, nn.Module) else x.dtype
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            f = model((x / a / total).to(dtype), (sigma.flatten().log() / 4).to(dtype)).to(x.dtype)
        return -(sigma * x / a / total ** 2 - std / total * f) / s
    return score

# ==== 3. Losses.  Eq. 5, 8, 12 (keep), 9, 13 (orthogonal), 10, 14 (obtuse), 11 (their sum)
#                         formula             the e that minimises Eq. 11  what that does
#    score matching       |e - z|^2 / D       e_g (alone)                  predicts noise on D_g
#    SGU-Orthogonal       (e.z / D)^2         (I + R C/D)^-1 e_g           shrinks e: leaves noise
#    SGU-Obtuse           e.z / D             e_g - (R/2) e_f              flees e_f as R grows
#    SGU-Relative, ours   e.(z - e_ref) / D   e_g - (R/2) (e_f - e_ref)    guides away from D_f
# R = (1 - alpha) w_f q_f(t) p_f(x_t) / (alpha w_g q_g(t) p_g(x_t)), how far forgetting prevails: w
# weights the losses, q is the density of t. C = E[z z^T | x_t] under p_f. Notebook 8 derives this.
# Signs: score.u = e.z/s^2; lowering it turns the score away from u, the way to D_f. The network
# sees x_t, not z, so Orthogonal takes from e what is along e_f, the mean z; e_g points nearly the
# same way, so little is left. Obtuse and Relative, linear in e, have no minimum without keeping.
def predict_noise(score, sde, x0, t, z, rng):
    """Noise x0: (B, ...) and let score say what the noise was -> t: (B,), e and z: (B, D)."""
    if t is None:  # uniform; a DDPM's own times
        t = torch.rand(len(x0), generator=rng, device=x0.device)
        t = sde.step(t) / sde.n_steps if isinstance(sde, DDPM) else sde.t_min + (1 - sde.t_min) * t
    need(x0.is_floating_point() and t.is_floating_point() and t.dim() == 1,
         "losses take floats, t: (B,) in [0, 1]")
    z = noise_like(x0, rng) if z is None else z
    a, s = (per_sample(v, x0) for v in sde.marginal(t))
    e = (-s * score(a * x0 + s * z, t)).view_as(z)
    return t, e.flatten(1), z.flatten(1)

def loss_weight(sde, t, weighting, power=0):
    """w(t): (B,), or weighting(t). 'noise': 1. 'paper': s^2 on losses of score and u, so 1 on those
    of e and z, 1/s^2 (power 2) on Eq. 9, a square; for a DDPM Eq. 12's with sigma_k^2 = beta_k."""
    if callable(weighting):
        return weighting(t)
    need(weighting in ("noise", "paper"), f"weighting: noise, paper or a function, not {weighting}")
    s = sde.marginal(t)[1]
    if weighting == "paper" and isinstance(sde, DDPM):
        beta = sde.betas.to(t)[sde.step(t) - 1]
        return beta / (2 * (1 - beta) * s ** 2)
    return s ** -power if weighting == "paper" else torch.ones_like(t)
def balanced_weight(sde, data_std=0.5, power=1.0):
    """t -> (total/data_std)^(2 power): the network's gradients become as large at every t. power:
    1/2 for e.z, 1 for |e - z|^2 and e.(z - e_ref), products of two shrinking factors."""
    return lambda t: (1 + (sde.sigma(t) / data_std) ** 2) ** power

def score_matching_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
    """Eq. 5, 8, 12: |e - z|^2 / D, the batch's mean. x0: (B, ...) -> scalar >= 0."""
    t, e, z = predict_noise(score, sde, x0, t, z, generator)
    return (loss_weight(sde, t, weighting) * (e - z).square().mean(1)).mean()
def orthogonal_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
    """Eq. 9, 13: (e.z / D)^2, not mean_i (e_i z_i)^2; the batch's mean. x0: (B, ...) -> scalar."""
    t, e, z = predict_noise(score, sde, x0, t, z, generator)
    return (loss_weight(sde, t, weighting, power=2) * (e * z).mean(1).square()).mean()
def obtuse_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
    """Eq. 10, 14: e.z / D = s^2 score.u / D, the batch's mean. x0: (B, ...) of D_f -> scalar."""
    t, e, z = predict_noise(score, sde, x0, t, z, generator)
    return (loss_weight(sde, t, weighting) * (e * z).mean(1)).mean()

def relative_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None, *, reference):
    """Ours: e.(z - e_ref) / D, e_ref of Standard, the reference. x0: (B, ...) of D_f -> scalar. Its
    optimum is bounded: score_g + k grad log P(D_g | x_t) (cf. ESD, Gandikota et al. 2023),
    k = (1 - alpha) w_f q_f |D_g| / (2 alpha w_g q_g |D_f|)."""
    t, e, z = predict_noise(score, sde, x0, t, z, generator)
    with torch.no_grad():
        e_ref = predict_noise(reference, sde, x0, t, z.view_as(x0), generator)[1]
    return (loss_weight(sde, t, weighting) * (e * (z - e_ref)).mean(1)).mean()
def sgu_loss(keep_loss, forget_loss, alpha):  # Eq. 11
    return alpha * keep_loss + (1 - alpha) * forget_loss

# ==== 4. Samplers.  Eq. 4, from t = 1 down:  dx = [f(x, t) - g(t)^2 score(x, t)] dt + g(t) dw
# A sampler steps along a grid of times (float64, CPU) to the mean image, which has no noise.
def time_grid(sde, steps, t_max=1.0, rho=7):
    """steps + 1 times, t_max to t_min, even in sigma^(1/rho) (Karras): fine at small sigma."""
    ends = torch.tensor([t_max, sde.t_min], dtype=torch.float64)
    high, low = sde.sigma(ends) ** (1 / rho)
    need(steps >= 1 and 0 < low < high < 1e3, "steps start at 1; sigma(t) must grow, > 0, finite")
    t = sde.time((high + (low - high) * torch.linspace(0, 1, steps + 1, dtype=ends.dtype)) ** rho)
    t[0], t[-1] = ends  # without rounding
    return t

def score_at(score, x, t):  # at one t for the whole batch x
    return score(x, x.new_full((len(x),), float(t)))
def noise_like(x, rng):  # z ~ N(0, I) of the shape of x
    return torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
def denoise(score, sde, x, t):
    """E[x0 | x_t] = (x + s^2 score)/a (Tweedie): the mean image behind x: (B, ...) at time t."""
    a, s = sde.at(t)
    return (x + s ** 2 * score_at(score, x, t)) / a

def reverse_step(score, sde, x, t, t_next, rng):  # Euler-Maruyama for Eq. 4
    dt, g = float(t - t_next), float(sde.diffusion(t))
    drift = sde.drift(x, t.reshape(1).to(x)) - g ** 2 * score_at(score, x, t)
    return x - drift * dt + g * math.sqrt(dt) * noise_like(x, rng)
def langevin_step(score, sde, x, t, snr, rng):  # a corrector: keeps p_t, nearly
    eps = 2 * (snr * sde.at(t)[1]) ** 2  # not 2 (snr |z|/|score|)^2: unlearned scores reach 0
    return x + eps * score_at(score, x, t) + math.sqrt(2 * eps) * noise_like(x, rng)

def move(mean, sde, x, t, t_next, rng, noisy=True):
    """x: (B, ...) from t to t_next, given its mean image: drawn from q(x_next | x_t, mean) (Ho et
    al. 2020, Eq. 7) or, not noisy, moved by the flow of section 5."""
    (a, s), (a_next, s_next) = sde.at(t), sde.at(t_next)
    r = s_next / a_next * a / s  # sigma_next/sigma
    moved = a_next * (mean + r ** (2 if noisy else 1) * (x / a - mean))
    return moved + s_next * math.sqrt(1 - r ** 2) * noise_like(x, rng) if noisy else moved
def ancestral_step(score, sde, x, t, t_next, rng):  # DDPM's: long steps leave no excess noise
    return move(denoise(score, sde, x, t), sde, x, t, t_next, rng)

def multistep(noisy):
    """A step with a memory, for one walk: the mean image, extrapolated h/2 ahead in log sigma, is
    of second order at the same price (DPM-Solver++(2M), Lu et al. 2022)."""
    last = {}
    def step(score, sde, x, t, t_next, rng):
        mean, h = denoise(score, sde, x, t), float((sde.sigma(t) / sde.sigma(t_next)).log())
        ahead = mean + h / 2 * (mean - last["mean"]) / last["h"] if last else mean
        last.update(mean=mean, h=h)
        return move(ahead, sde, x, t, t_next, rng, noisy)
    return step

@torch.no_grad()
def walk(step, score, sde, x, grid, rng):  # from x at grid[0] to a mean image
    for t, t_next in zip(grid, grid[1:]):
        x = step(score, sde, x, t, t_next, rng)
    return denoise(score, sde, x, grid[-1])
def draw(step, score, sde, shape, grid, rng, device):  # a walk that starts from noise
    return walk(step, score, sde, sde.prior_sample(shape, rng, device), grid, rng)

def predictor_corrector(score, sde, shape, steps=100, snr=0.16, generator=None, device=None):
    """Euler-Maruyama, each step followed by Langevin's at its end (Song et al. 2021)."""
    def step(score, sde, x, t, t_next, rng):
        x = reverse_step(score, sde, x, t, t_next, rng)
        return langevin_step(score, sde, x, t_next, snr, rng)
    return draw(step, score, sde, shape, time_grid(sde, steps), generator, device)
def ancestral_sample(score, sde, shape, steps=None, generator=None, device=None):
    """steps=None: 100, or a DDPM's whole chain, whose last step, to s = 0, is the mean image."""
    n = steps or getattr(sde, "n_steps", 100)
    grid = time_grid(sde, n)
    if isinstance(sde, DDPM):
        need(n <= sde.n_steps, f"{n} steps in a chain of {sde.n_steps}")
        grid = torch.linspace(sde.n_steps, 0, n + 1, dtype=torch.float64).round()[:-1] / sde.n_steps
    return draw(ancestral_step, score, sde, shape, grid, generator, device)
def euler_maruyama(score, sde, shape, steps=120, generator=None, device=None):
    """Samples of Eq. 4: (B, ...) = shape, near [-1, 1]. Few steps overshoot."""
    return draw(reverse_step, score, sde, shape, time_grid(sde, steps), generator, device)
def multistep_sample(score, sde, shape, steps=20, generator=None, device=None, noisy=True):
    """Samples by the steps of multistep: (B, ...) = shape. noisy=False: of the flow below."""
    return draw(multistep(noisy), score, sde, shape, time_grid(sde, steps), generator, device)
def ode_sample(score, sde, shape, steps=18, generator=None, device=None):
    """Samples of the probability flow: only where it starts is random."""
    return multistep_sample(score, sde, shape, steps, generator, device, noisy=False)
SAMPLERS = dict(em=euler_maruyama, pc=predictor_corrector, ancestral=ancestral_sample,
                multistep=multistep_sample, ode=ode_sample)

# ==== 5. Likelihood: log p_0(x_0) = log p_1(x_1) + int div_x (dx/dt) dt along the flow
# The probability flow dx/dt = f - g^2 score / 2 carries p_0 to p_1 without noise. In y = x/a it is
# dy/dsigma = e for all schedules, and smooth in w = y/c, c = sqrt(1 + sigma^2), and l = log sigma:
#     dw/dl = b (e - b w),   div_w (dw/dl) = sigma div_y e - D b^2,   b = sigma/c
# div_y e is the mean of v.(de/dy v), a vector-Jacobian product, over random signs v (Hutchinson).
def own_generators(x, rng):
    """A CPU generator per sample of x: (B, ...), seeded by it and one draw, not by its batch."""
    seed = int(torch.randint(2 ** 62, (1,), generator=rng, device=rng.device if rng else None))
    rows = x.detach().cpu().float().numpy()
    return [torch.Generator().manual_seed(seed ^ zlib.crc32(row.tobytes())) for row in rows]

def integrate_flow(score, sde, x, vectors, n, steps):
    """log p(x): (B,) in nats, by Runge-Kutta; div_y e: the sum of v.(de/dy v) over vectors, / n."""
    d, ends = x[0].numel(), time_grid(sde, 1).flip(0)  # t_min, 1
    lo, hi = sde.sigma(ends).log().tolist()
    grid = sde.time(torch.linspace(lo, hi, 2 * steps + 1, dtype=ends.dtype).exp())
    grid[0], grid[-1] = ends
    def flow(w, i):  # dw/dl, its divergence at grid[i]
        a, s = sde.at(grid[i])
        sigma, c = s / a, math.hypot(1, s / a)
        y, b = (c * w).detach().requires_grad_(), sigma / c
        e = -s * score_at(score, a * y, grid[i])
        vjps = (torch.autograd.grad((e * v).sum(), y, retain_graph=True)[0] * v for v in vectors)
        divergence = sum(vjp.flatten(1).sum(1).double() / n for vjp in vjps)
        return b * (e.detach() - b * w), sigma * divergence - d * b ** 2
    first, last = (math.hypot(*sde.at(t)) for t in ends)  # a c, hence x = a c w
    w, log_p, h = x / first, 0.0, (hi - lo) / steps
    for i in range(0, 2 * steps, 2):
        k1, d1 = flow(w, i)
        k2, d2 = flow(w + h / 2 * k1, i + 1)
        k3, d3 = flow(w + h / 2 * k2, i + 1)
        k4, d4 = flow(w + h * k3, i + 2)
        w = w + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        log_p = log_p + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return log_p + sde.prior_log_prob(last * w) + d * math.log(last / first)

@torch.inference_mode(False)  # it ends no_grad, too
def log_likelihood(score, sde, x, steps=32, probes=1, exact=False, generator=None, error=False):
    """log p_t(x) at t = sde.t_min of x: (B, ...) -> (B,) in nats, float64; score has a gradient.
    probes: random signs per x; exact: D unit vectors. error: -> (log p, error of integrating)."""
    need(steps > int(error) and probes >= 1, "steps, probes >= 1; for an error steps >= 2")
    need(x.is_floating_point() and x.isfinite().all(), "finite floats only, no NaN")
    x, draws = x.detach().clone(), own_generators(x, generator)
    signs = [torch.randint(2, (probes, *x.shape[1:]), generator=g) for g in draws]
    vectors, n = (2 * torch.stack(signs, dim=1) - 1).to(x), probes  # (probes, B, ...)
    if exact:
        vectors, n = torch.eye(x[0].numel()).to(x).view(-1, 1, *x.shape[1:]), 1
    flow = partial(integrate_flow, score, sde, x, vectors, n)
    log_p = flow(steps)
    return (log_p, flow_error(log_p, flow(steps // 2))) if error else log_p
def flow_error(fine, coarse):  # of fine, by half the steps: 1/15 (short steps) to 1/2 of the gap
    return (fine - coarse).abs() / 8

def to_levels(x):
    """Floats, clamped to [-1, 1] -> their 8-bit levels 0..255, uint8 on the CPU."""
    need(not x.isnan().any(), "NaN images: train with a lower --lr", FloatingPointError)
    return ((x.clamp(-1, 1) + 1) * 128).floor().clamp(max=255).to(torch.uint8).cpu()
def from_levels(x, u=0.5):  # uint8 -> in [-1, 1]: the middle of the cell, or u
    return (x + u) / 128 - 1
def dequantise(levels, generator=None):  # uint8 -> anywhere in the cell
    return from_levels(levels, torch.rand(levels.shape, generator=generator, device=levels.device))

def bits_per_dim(score, sde, x, steps=32, probes=1, exact=False, generator=None):
    """-log2 p/D + 7: a level is 2^-7 wide in [-1, 1] (in [0, 1]: + 8). x: (B, C, H, W) -> (B,)."""
    need(x.is_floating_point() and x.abs().max() <= 1, "bits/dim need floats in [-1, 1], no NaN")
    levels = to_levels(x).to(x.device)
    u = [torch.rand(x.shape[1:], generator=g) for g in own_generators(levels, generator)]
    y = from_levels(levels, torch.stack(u).to(x))
    nats = log_likelihood(score, sde, y, steps, probes, exact, generator)
    return 7 - nats / (x[0].numel() * math.log(2))

# ==== 6. Zero-shot uses of a score: inpainting (Table 3) and reconstruction (Table 4)
def add_noise(sde, x, t, rng, start=None):
    """x: (B, ...) at time start (None: a clean image) -> at the later t: variances add up."""
    (a0, s0), (a, s) = (1.0, 0.0) if start is None else sde.at(start), sde.at(t)
    up = a / a0
    return up * x + math.sqrt(max(s ** 2 - (up * s0) ** 2, 0)) * noise_like(x, rng)

def inpaint(score, sde, x, mask, steps=40, repeats=10, generator=None):
    """Fill x: (B, C, H, W) where mask (broadcast) is 0 -> like x. A step noises known pixels
    anew; it is redone repeats - 1 times, so that the others fit (Lugmayr et al. 2022)."""
    need(repeats >= 1, f"repeats start at 1, not {repeats}")
    known = mask.to(x.device).bool().expand_as(x)
    x = torch.where(known, x, 0.0)
    def pinned(y, t):
        return torch.where(known, add_noise(sde, x, t, generator), y)
    def step(score, sde, y, t, t_next, rng):
        for repeat in range(repeats):
            y = pinned(add_noise(sde, y, t, rng, start=t_next), t) if repeat > 0 else y
            y = pinned(reverse_step(score, sde, y, t, t_next, rng), t_next)
        return y
    grid = time_grid(sde, steps)
    y = pinned(sde.prior_sample(x.shape, generator, x.device), grid[0])
    return torch.where(known, x, walk(step, score, sde, y, grid, generator))

def reconstruct(score, sde, x, t=0.02, steps=20, generator=None):
    """Noise x: (B, ...) to t in [0, 1], walk Eq. 4 back: (B, ...). The paper's t is faint."""
    need(0 <= t <= 1, f"t in [0, 1], not {t}")
    if t <= sde.t_min:
        return x.clone()
    y = add_noise(sde, x, t, generator)
    return walk(reverse_step, score, sde, y, time_grid(sde, steps, t_max=t), generator)

# ==== 7. Training by Eq. 11
# Five things make it fast; --recipe paper lacks the first three. In brackets: Unseen's distance
# (frechet_kept) after 1,500 MNIST steps without it; with all it is 11.9 (rivals.py).
# - Noise law: log sigma ~ N(centre, spread^2), where images take shape; every k-th is even. [15.9]
# - Weights: balanced_weight on both losses, in place of the paper's. [14.4]
# - Window (METHODS): forget where noise neither hides the class (sigma > 6) nor spares it (< 0.2).
# - Optimiser: Muon for the inner convolutions, Adam for the rest. [24.6]
# - Precision: bfloat16 where the processor multiplies it faster. [17.7 in the same time]
DIGIT_NOISE, PHOTO_NOISE = (0.2, 1.1, 8), (-1.2, 1.2, 32)  # (centre, spread, k)
EVERY_SIGMA = (0.0, 1e6)  # infinity is no JSON
class Recipe(NamedTuple):  # how to train, in the words above
    noise_law: Any = DIGIT_NOISE  # or None: t uniform
    weighting: Any = "balanced"  # 'noise', 'paper', a function of t; a pair: keep, forget
    precision: str = "float32"  # or 'bfloat16'
RECIPES = dict(balanced=Recipe(), paper=Recipe(None, "paper"))

def sample_times(sde, n, generator=None, device=None, window=EVERY_SIGMA, noise_law=DIGIT_NOISE):
    """n stratified training times: (n,), at sigma in window, by noise_law."""
    ends = sde.sigma(torch.tensor([sde.t_min, 1.0], dtype=torch.float64)).clamp(*window)
    (low, high), (first, last) = ends.log().tolist(), sde.time(ends).tolist()
    need(low < high, f"no sigma lies in the window {tuple(window)}")
    dice, i = dict(generator=generator, device=device), torch.arange(n, device=device)
    u = ((i + torch.rand(n, **dice)) / n)[torch.randperm(n, **dice)]  # even in (0, 1), shuffled
    t = first + (last - first) * u
    if noise_law is not None:
        law, k = torch.distributions.Normal(*noise_law[:2]), noise_law[2]
        p0, p1 = law.cdf(torch.tensor([low, high])).tolist()
        log_sigma = law.icdf((p0 + u * (p1 - p0)).clamp(1e-6, 1 - 1e-6))
        even = (i + torch.randint(k, (1,), **dice)) % k == 0
        t = sde.time(torch.where(even, low + u * (high - low), log_sigma).clamp(low, high).exp())
    return sde.step(t) / sde.n_steps if isinstance(sde, DDPM) else t.clamp(first, last)

class Muon(torch.optim.Optimizer):
    """Momentum, its step made orthogonal (Jordan et al. 2024) and of Adam's size (Liu 2025)."""
    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))
    @torch.no_grad()
    def step(self):
        group, = self.param_groups
        for p in [p for p in group["params"] if p.grad is not None]:
            velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
            velocity.lerp_(p.grad, 1 - 0.95)
            x = p.grad.lerp(velocity, 0.95).flatten(1)  # (c_out, 9 c_in)
            x = x / (x.norm() + 1e-12)
            for _ in range(5):  # Newton and Schulz
                y = x @ x.T
                x = 3.4445 * x + (2.0315 * y @ y - 4.7750 * y) @ x
            p.add_(x.view_as(p), alpha=-0.2 * math.sqrt(max(x.shape)) * group["lr"])

def descend(model, ema, steps, lr, gradients, state=None):
    """Train model; ema, or None, averages its weights. gradients(step) sets every p.grad -> report.
    Yields dict(report, step, steps, snapshot): snapshot() is a state to go on from, bit for bit."""
    need(steps >= 1, f"steps must be at least 1, not {steps}")
    state, ema = state or {}, model if ema is None else ema.eval()  # None: its own mean
    inner = [p for p in model.parameters() if p.dim() == 4][1:-1]  # all but first and last 3x3
    others = [p for p in model.parameters() if all(p is not q for q in inner)]
    parts = [model, ema, torch.optim.Adam(others, lr, betas=(0.9, 0.99))]
    parts += [Muon(inner, lr)] if inner else []
    done = state.get("step", 0)
    need(not 0 < done < steps or "parts" in state, "a finished state has no optimisers")
    ema.load_state_dict(state.get("weights", model.state_dict()))
    for part, saved in zip(parts, state.get("parts", ())):
        part.load_state_dict(copy.deepcopy(saved))
    def snapshot():  # finished: the average alone
        unfinished = dict(parts=[part.state_dict() for part in parts]) if done < steps else {}
        return copy.deepcopy(dict(step=done, weights=ema.state_dict(), **unfinished))
    for done in range(done + 1, steps + 1):
        model.zero_grad()
        report = gradients(done - 1)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        need(norm.isfinite(), f"infinite gradient in step {done}: lower lr", FloatingPointError)
        warm, cosine = min(done / (steps // 20 + 1), 1), math.cos(math.pi * (done - 1) / steps)
        for part in parts[2:]:
            part.param_groups[0]["lr"] = lr * warm * (1 + cosine) / 2
            part.step()
        decay = min(0.999, (1 + done) / (10 + done))
        for average, now in zip(ema.parameters(), model.parameters()):
            average.data.lerp_(now.data, 1 - decay)
        for average, now in zip(ema.buffers(), model.buffers()):
            average.copy_(now)  # batch norm's statistics, say
        yield dict(report, step=done, steps=steps, snapshot=snapshot)

def train(model, ema, sde, keep, forget=None, forget_loss=None, alpha=None, *, steps, batch_size=64,
          lr=4e-3, window=EVERY_SIGMA, recipe=Recipe(), data_std=None, seed=0, state=None,
          backward=lambda model, *terms: sgu_loss(*terms).backward()):
    """Train model in place by Eq. 11; ema, its copy or None, gets the average to sample with. keep,
    forget: (N, ...) uint8 or floats, on its device; forget_loss: like obtuse_loss, in window;
    backward: losses -> gradients. Yields descend's dict, losses keep, forget and score(x, t)."""
    for x in (keep,) if forget is None else (keep, forget):
        need(len(x) and (x.dtype == torch.uint8 or x.is_floating_point() and x.abs().max() < 99),
             "images are uint8 levels, or floats in [-1, 1], no NaN")
    need((forget is None) == (forget_loss is None), "forget and forget_loss belong together")
    need(forget is None or alpha is not None and 0 <= alpha < 1, f"alpha {alpha} is not in [0, 1)")
    std = getattr(model, "data_std", 0.5) if data_std is None else data_std
    score, average = (make_score(m, sde, std, recipe.precision) for m in (model, ema or model))
    both = recipe.weighting if isinstance(recipe.weighting, tuple) else [recipe.weighting] * 2
    both = [balanced_weight(sde, std, p) if w == "balanced" else w for w, p in zip(both, (1, 0.5))]
    def term(step, i, loss, data, sigmas):
        g = torch.Generator(data.device).manual_seed(2 * (seed * 1_000_003 + step) + i)
        x0 = data[torch.randint(len(data), (batch_size,), generator=g, device=data.device)]
        x0 = dequantise(x0, g) if x0.dtype == torch.uint8 else x0
        t = sample_times(sde, batch_size, g, data.device, sigmas, recipe.noise_law)
        value = loss(score, sde, x0, t=t, weighting=both[i], generator=g)
        need(torch.is_tensor(value) and value.dim() == 0 and value.requires_grad,
             "a loss must return one differentiable number", TypeError)
        return value
    def gradients(step):  # without forgetting: alpha = 1
        keeping = term(step, 0, score_matching_loss, keep, EVERY_SIGMA)
        forgetting = term(step, 1, forget_loss, forget, window) if forget_loss else torch.zeros(())
        backward(model, keeping, forgetting, alpha if forget_loss else 1)
        return dict(keep=keeping.item(), forget=forgetting.item(), score=average)
    return descend(model, ema, steps, lr, gradients, state)

# ======== PART TWO: THE EXPERIMENT ========
# ==== 8. Data: uint8 (N, C, H, W) in memory, with integer labels (N,)
DIGITS = [str(i) for i in range(10)]
DATASETS = dict(glyphs=("3,7", "ve", ""), mnist=("3,7", "ve", "MNIST/raw/*.gz"),  # --forget, --sde
                cifar10=("automobile,dog", "vp", "cifar-10-batches-py/*"))  # and files in root

def load_data(name, root="data"):
    """One of DATASETS, downloaded into root if need be, or an .npz, see read_npz -> dict(name,
    classes, train, train_labels, test, test_labels)."""
    own = name.endswith(".npz")
    need(own or name in DATASETS, f"--dataset: {name!r} is no .npz nor in {[*DATASETS]}")
    try:
        classes, *halves = read_npz(name) if own else read_standard(name, root)
        data = dict(name=Path(name).stem, classes=classes)
        for half, (x, y) in zip(("train", "test"), halves):
            side, y = x.shape[2], torch.as_tensor(y)
            x = torch.as_tensor(x).reshape(len(y), side, side, -1).permute(0, 3, 1, 2).contiguous()
            if side > 64:
                x = F.interpolate(x.float(), 64, mode="bilinear", antialias=True).round().byte()
            need(own or x.flatten(1).any(1).all() and 1 < len(y.unique()) <= len(classes),
                 "black images, or odd labels")
            if len(y.unique_consecutive()) <= max(len(y) // 10, len(classes)):  # sorted
                order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
                x, y = x[order], y[order]
            data.update({half: x, half + "_labels": y})
        return data
    except Exception as error:
        hint = "see read_npz in sgu.py" if own else f"put {DATASETS[name][2]} into {root}"
        raise UsageError(f"{name} is missing or damaged; {hint} ({error!r})") from None
def read_standard(name, root):  # -> classes, (images, labels) to train, to test
    if name == "glyphs":
        return DIGITS, draw_glyphs(12000, 0), draw_glyphs(2000, 1)
    from torchvision import datasets
    halves = [getattr(datasets, name.upper())(root, half, download=True) for half in (True, False)]
    classes = DIGITS if name == "mnist" else halves[0].classes
    return classes, *((half.data, half.targets) for half in halves)

def read_npz(path):
    """images: uint8 (N, H, H[, C]); labels: integers (N,) from 0, or attributes: integers (N, A),
    yes above 0; optional: class_names, attribute_names, split: (N,), the highest for testing."""
    arrays = dict(np.load(path))
    many = "attributes" in arrays
    x, y = arrays["images"], arrays["attributes" if many else "labels"]
    count = y.shape[1] if many else int(y.max()) + 1
    names = arrays.get("attribute_names" if many else "class_names", np.arange(count)).astype(str)
    need(x.dtype == np.uint8 and x.shape[1] == x.shape[2] and y.dtype.kind in "iub"
         and (many or y.ndim == 1 and y.min() >= 0) and count <= len(names),
         ", ".join(f"{k} {v.dtype} {v.shape}" for k, v in arrays.items()))
    names = [re.sub(r"[\s,|]+", " ", name).strip() for name in names]
    keys = {*map(str.lower, names)} - {"", "total", "n", "ci95"}
    need(len(keys) == len(names), f"equal or reserved names: {names}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).numpy()
    split = arrays.get("split", order % 6 == 5)
    y, test = y > 0 if many else y.astype(np.int64), split == split.max()
    return names, (x[~test], y[~test]), (x[test], y[test])

def draw_glyphs(n, seed, side=28):
    """n digits of two fonts, turned and moved at random: (n, 1, side, side) uint8, labels (n,)."""
    from matplotlib import get_data_path
    rng, plates, images = np.random.default_rng(seed), [], []
    for name in ("Sans", "Serif"):
        font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVu{name}.ttf", 50)
        for digit in DIGITS:
            plates.append(Image.new("L", (56, 56)))
            ImageDraw.Draw(plates[-1]).text((28, 28), digit, 255, font, anchor="mm")
    which = rng.integers(20, size=n)
    for i, angle, move in zip(which, rng.uniform(-3, 3, n), rng.uniform(-0.7, 0.7, (n, 2))):
        image = plates[i].rotate(angle, Image.BILINEAR, translate=tuple(move))
        images.append(np.array(image.resize((side, side), Image.BOX)))
    return torch.tensor(np.stack(images))[:, None], torch.tensor(which % 10)

def choose(data, forget):
    """forget: '3,7', 'Dog', names in any case or numbers -> data and chosen (names), forget
    (classes), checksum. Attributes become two classes, as in 'no Bangs' and 'Bangs'."""
    names = data["classes"]
    known = {str(i): i for i in range(len(names))} | {v.lower(): i for i, v in enumerate(names)}
    numbers = [*dict.fromkeys(known.get(word.strip().lower()) for word in forget.split(","))]
    need(None not in numbers, f"--forget {forget!r} is not of {', '.join(names)}, nor numbers")
    chosen = [names[i] for i in numbers]
    data = dict(data, chosen=",".join(chosen), forget=numbers)
    if data["train_labels"].dim() == 2:
        either = {k: data[k][:, numbers].any(1).long() for k in ("train_labels", "test_labels")}
        data.update(either, classes=["no " + "+".join(chosen), "+".join(chosen)], forget=[1])
    for half in ("train", "test"):
        gone = is_forgotten(data, half)
        need(gone.any() and not gone.all(), f"--forget {forget}: none, or all, of {half} images")
    tensors = filter(torch.is_tensor, [*data.values(), torch.tensor(data["forget"])])
    return dict(data, checksum=checksum(tensors))
def is_forgotten(data, half):  # (N,) bool
    return torch.isin(data[half + "_labels"], torch.tensor(data["forget"]))
def checksum(tensors):  # of their content
    return reduce(lambda crc, v: zlib.crc32(v.cpu().contiguous().numpy(), crc), tensors, 0)

# ==== 9. The judge: a classifier with one more class, "none of these"
class Judge(nn.Module):
    """A nine-layer residual network, (B, C, H, W) in [-1, 1] -> logits (B, classes)."""
    def __init__(self, image_channels, classes, width):
        super().__init__()
        self.config = dict(image_channels=image_channels, classes=classes, width=width)
        def conv(c, d):
            return nn.Sequential(conv3(c, d, bias=False), nn.BatchNorm2d(d), nn.ReLU())
        a, b, c, d = (k * width for k in (1, 2, 4, 8))
        self.stem = conv(image_channels, a)
        self.body = nn.ModuleList([conv(a, b), nn.Sequential(conv(b, b), conv(b, b)), conv(b, c),
                                   conv(c, d), nn.Sequential(conv(d, d), conv(d, d))])
        self.head = nn.Linear(d, classes)
        self.to(memory_format=torch.channels_last)
    def features(self, x):  # (B, C, H, W) -> (B, 8 width)
        x = F.max_pool2d(self.stem(x), 2 if x.shape[2] > 32 else 1)
        for part in self.body:  # two convolutions: residual; one: half the side
            x = x + part(x) if len(part) == 2 else F.max_pool2d(part(x), 2)
        return x.amax((2, 3))
    def forward(self, x):
        return self.head(self.features(x))

def none_of_these(x, g):
    """Images x: (B, C, H, W) in [-1, 1] -> as many that are none, of five kinds by chance."""
    (b, c, *size), p, other = x.shape, x.shape[2] // 4, x.roll(1, 0)
    strength, shade, coin = torch.rand(3, b, 1, 1, 1, generator=g)
    fine, coarse = noise_like(x, g), 2 * torch.randn(b, c, p, p, generator=g)
    z = torch.where(coin < 0.5, fine, F.interpolate(coarse, size, mode="bilinear"))
    patches = F.unfold(x, p, stride=p)[..., torch.randperm(16, generator=g)]
    kinds = [2 * shade - 1 + 2 * strength * z,  # noise
             x + (0.8 + 1.2 * strength) * z,  # an image under noise
             torch.where(coin < 0.5, torch.maximum(x, other), (x + other) / 2),  # two at once
             F.fold(patches, size, p, stride=p),  # shuffled patches
             torch.where(torch.rand(x.shape, generator=g) < 0.15 * strength, 1.0, -1.0)]  # dots
    return torch.stack(kinds)[torch.randint(5, (b,), generator=g), torch.arange(b)].clamp(-1, 1)

def train_judge(data, width=16, steps=1000, lr=4e-3, batch_size=256, precision="float32",
                device="cpu", seed=0, state=None):
    """A job (see finish) that reports judge. A fifth of a batch: none_of_these, the last class."""
    x, y, none = data["train"], data["train_labels"], len(data["classes"])
    pad = max(x.shape[2] // 14, 2)
    torch.manual_seed(seed)
    judge = Judge(x.shape[1], none + 1, width).to(device)
    weight = judge.head.weight.new_tensor([1.0] * none + [1 / 8])  # in doubt a real image
    def gradients(step):
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(x), (batch_size,), generator=g)
        i, j, flip = torch.randint(2 * pad + 1, (3,), generator=g).tolist()
        image, label = x[rows].float() / 127.5 - 1, y[rows]
        image = F.pad(image, [pad - j, j - pad, pad - i, i - pad], value=-1)
        if x.shape[1] == 3:  # half under faint noise, lest that decide
            image = image.flip(3) if flip % 2 else image
            faint = (0.4 * torch.rand(batch_size, 1, 1, 1, generator=g) - 0.2).clamp(min=0)
            image = (image + faint * noise_like(image, g)).clamp(-1, 1)
        image[::5], label[::5] = none_of_these(image[::5], g), none
        with torch.autocast(weight.device.type, torch.bfloat16, precision == "bfloat16"):
            logits = judge.train()(image.to(weight))
            F.cross_entropy(logits, label.to(device), weight, label_smoothing=0.05).backward()
        return dict(judge=judge)
    return descend(judge, None, steps, lr, gradients, state)

@torch.no_grad()
def opinions(judge, x):
    """x: (N, C, H, W) uint8 -> probabilities (N, classes), features (N, 8 width): float32, CPU."""
    need(x.dtype == torch.uint8, f"judge uint8 levels, not {x.dtype}; see to_levels")
    device = next(judge.eval().parameters()).device
    features = torch.cat([judge.features(v.to(device) / 127.5 - 1) for v in x.split(500)])
    return judge.head(features).softmax(1).cpu(), features.cpu()
def wilson(k, n, z=1.959964):
    """95% interval [low, high] of a proportion k/n (Wilson), fractions."""
    centre, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return [max(0.0, (centre - half) / (n + z * z)), min(1.0, (centre + half) / (n + z * z))]

def frechet(f1, f2):
    """Squared Frechet distance of Gaussians fitted to f1: (N, d), f2: (M, d), or None; no FID."""
    if min(len(f1), len(f2)) < 2:
        return None
    def root(c):
        values, axes = torch.linalg.eigh(c)
        return (axes * values.clamp(min=0).sqrt()) @ axes.T
    (m1, c1), (m2, c2) = ((f.double().mean(0), torch.cov(f.double().T)) for f in (f1, f2))
    cross = root(root(c1) @ c2 @ root(c1)).trace()
    return max(float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross), 0.0)

def judged(probs, features, data, reference, real=()):
    """What the results say of images; kept: all that are not called forgotten. probs, features:
    opinions; reference, real: features of real D_g, real cut to as many as are kept (bias)."""
    n, names, label = len(probs), data["classes"], probs.argmax(1)
    gone, none = torch.isin(label, torch.tensor(data["forget"])), label == len(names)
    shares = {name: int((label == i).sum()) / n for i, name in enumerate(names)}
    ratio = {names[i]: shares[names[i]] for i in data["forget"]}
    k, kept, unsure = int(gone.sum()), features[~gone], (probs.amax(1) < 0.5) | none
    real = real[:len(kept)] if len(real) >= len(kept) else ()
    return dict(unlearning_ratio=dict(ratio, total=k / n, n=n, ci95=wilson(k, n)), kept=n - k,
                unsure=int(unsure.sum()) / n, none=int(none.sum()) / n, class_histogram=shares,
                frechet_kept=frechet(kept, reference), frechet_real=frechet(real, reference))

# ==== 10. The command
class Method(NamedTuple):  # a way to make a model
    title: str
    loss: Any = None  # of D_f; None: the keep loss alone
    alpha: Any = None  # Eq. 11
    keep: str = "D_g"  # what the keep loss sees: D or D_g
    start: str = ""  # 'scratch' or 'standard'; '': as --training says
    share: float = 0.15  # of --steps, if it starts from Standard
    pace: float = 1.0  # of --lr, if it starts from Standard
    window: tuple = EVERY_SIGMA  # sigma where the loss of D_f acts; balanced only
    power: float = 0.5  # of its balanced_weight (train alone: 1/2)
    prepare: Any = None  # (Standard's score, arguments of train) -> arguments of train
def with_reference(score, arguments):  # for losses that compare with Standard's score
    return dict(arguments, forget_loss=partial(arguments["forget_loss"], reference=score))
METHODS = dict(
    standard=Method("Standard", keep="D", start="scratch"),
    unseen=Method("Unseen", start="scratch"),
    orthogonal=Method("SGU-Orthogonal", orthogonal_loss, 0.95, window=(0.2, 6.0)),
    obtuse=Method("SGU-Obtuse", obtuse_loss, 0.95, window=(0.2, 6.0)),
    relative=Method("SGU-Relative", relative_loss, 0.55, start="standard", power=1.0,
                    window=(0.2, 3.0), prepare=with_reference),
    finetune=Method("fine-tuning", start="standard"))
TASKS = ("sample", "likelihood", "inpaint", "reconstruct")
SAMPLER_STEPS = dict(em=120, pc=100, ancestral=100, multistep=20, ode=18)
COLUMNS = ("channels blocks patch data_std noise_law sampler steps batch_size lr samples "
           "likelihood_samples judge_width judge_steps").split()
DIGIT, PHOTO = (2, 1.0, DIGIT_NOISE, "multistep"), (0.5, PHOTO_NOISE, "ode")
PRESETS = {  # (data set or largest side of the image, device): COLUMNS
    ("glyphs", "cpu"): ((32, 64), 1, *DIGIT, 240, 64, 6e-3, 400, 8, 8, 100),
    (28, "cpu"): ((32, 64), 1, *DIGIT, 6000, 64, 4e-3, 2000, 100, 8, 1200),
    (28, "cuda"): ((64, 128), 2, *DIGIT, 8000, 256, 4e-3, 10000, 500, 32, 1900),
    (32, "cpu"): ((16, 48, 96), (1, 2, 1), 1, *PHOTO, 20000, 64, 4e-3, 2000, 100, 16, 2000),
    (32, "cuda"): ((64, 128, 256), 2, 1, *PHOTO, 20000, 256, 3e-3, 10000, 500, 64, 4700),
    (64, "cpu"): ((32, 64, 128), 1, 2, *PHOTO, 4000, 32, 4e-3, 500, 50, 16, 1500),
    (64, "cuda"): ((96, 192, 384), 1, 2, *PHOTO, 20000, 128, 3e-3, 10000, 250, 64, 4000)}

def parse_options(argv=None):
    """argv -> the options of the command, checked. Raises UsageError."""
    cli = argparse.ArgumentParser("sgu.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    cli.error, add = partial(need, False), cli.add_argument
    add("--dataset", default="glyphs", help=f"{', '.join(DATASETS)} or an .npz")
    add("--forget", help="classes or attributes")
    add("--methods", default="standard,unseen,orthogonal,obtuse,relative", help=",".join(METHODS))
    add("--tasks", default="sample,likelihood", help=",".join(TASKS))
    add("--training", choices=("finetune", "retrain"), default="finetune", help="from Standard?")
    add("--recipe", choices=RECIPES, default="balanced", help="ours or the paper's")
    add("--pretrained", help="an earlier standard.pt")
    add("--sde", choices=SCHEDULES, help="ve for digits, else vp")
    add("--sampler", choices=SAMPLERS)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--precision", choices=("float32", "bfloat16"))
    add("--alpha", type=float, help="of Eq. 11")
    add("--lr", type=float)
    for name in "steps unlearn-steps batch-size sampler-steps samples likelihood-samples".split():
        add(f"--{name}", type=int, help="default: see PRESETS")
    add("--seed", type=int, default=0)
    add("--data-root", default="data")
    add("--out", help="folder of the results")
    add("--fresh", action="store_true", help="overwrite what is in --out")
    add("--compile", action="store_true")
    opt = cli.parse_args(argv)
    ranges = dict(alpha=(0, 1), lr=(1e-9, 10), seed=(0, 2**31))
    for name, value in vars(opt).items():
        low, high = ranges.get(name, (1, 2**31))
        need(type(value) not in (int, float) or low <= value < high,
             f"--{name.replace('_', '-')} {value}: must be {low} or more, below {high}")
    for name, known in dict(methods=METHODS, tasks=TASKS).items():
        words = getattr(opt, name).replace(" ", "").split(",")
        need({*words} <= {*known}, f"--{name} {','.join(words)}: not of {','.join(known)}")
        setattr(opt, name, ",".join(dict.fromkeys(words)))
    return opt
def as_words(options, *hidden):  # dict(lr=0.1, fresh=True) -> --lr 0.1 --fresh
    usual = vars(parse_options([])) | {key: options.get(key) for key in hidden}
    given = {f"--{k.replace('_', '-')}": v for k, v in options.items() if v != usual.get(k)}
    return [str(word) for pair in given.items() for word in pair if word is not True]
def Options(**given):  # the same by name
    return parse_options(as_words(given))
def describe(device):  # the machine in words
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    path, n = Path("/proc/cpuinfo"), torch.get_num_threads()
    info = path.read_text(encoding="utf-8") if path.exists() else ""
    name = info.partition("model name\t: ")[2].partition("\n")[0] or platform.machine()
    return f"{name}{' (bfloat16)' * ('_bf16' in info)}, {n} thread{'s' * (n > 1)}"
def from_standard(method, opt):  # trained on from Standard?
    return (METHODS[method].start or opt.training) in ("standard", "finetune")

def fill_in(opt, channels, side, machine):  # open options, by PRESETS
    fast = opt.device == "cuda" or "bfloat16" in machine
    keys = [(size, opt.device) for size in (opt.dataset, *range(side, 65))]
    row = dict(zip(COLUMNS, next(PRESETS[key] for key in keys if key in PRESETS)))
    row["steps"] = row["steps"] * (10 if fast or opt.dataset == "glyphs" else 6) // 10  # same time
    row["sampler_steps"] = SAMPLER_STEPS[opt.sampler or row["sampler"]]
    row["precision"] = "bfloat16" if fast else "float32"
    opt.network = UNet(channels, *(row.pop(k) for k in COLUMNS[:4])).config
    vars(opt).update({k: getattr(opt, k, None) or v for k, v in row.items()})

def resolve(opt):
    """Options -> (opt, data), nothing left open. Raises UsageError."""
    opt, cuda = Options(**vars(opt)), torch.cuda.is_available()
    need(cuda or opt.device != "cuda", "--device cuda: torch finds none here")
    opt.device = "cuda" if cuda and opt.device != "cpu" else "cpu"
    methods = opt.methods.split(",")
    if "standard" in methods or any(from_standard(method, opt) for method in methods):
        opt.methods = ",".join(dict.fromkeys(["standard", *methods]))
    forget, sde, *_ = DATASETS.get(opt.dataset, ("", "vp"))
    data = choose(load_data(opt.dataset, opt.data_root), opt.forget or forget)
    opt.forget, opt.checksum = data["chosen"], data["checksum"]
    words = [data["name"], opt.forget, opt.sde, opt.training, opt.recipe]
    words = [word for word in words if word not in (None, sde, "finetune", "balanced")]
    opt.sde, opt.out = opt.sde or sde, opt.out or f"runs/{'-'.join(words)}"
    _, channels, side, _ = data["train"].shape
    fill_in(opt, channels, side, describe("cpu"))
    time_grid(SCHEDULES[opt.sde](), 1)  # refuses a bad one
    if opt.pretrained:
        opt.network = load_model(opt.pretrained)[0].config
    unit = opt.network["patch"] * 2 ** (len(opt.network["channels"]) - 1)
    need(channels == opt.network["image_channels"] and side % unit == 0 and side > 7,
         f"the network takes no images with {channels} channels, {side} pixels wide")
    return opt, data

def say(text, end="\n"):  # to stderr, if there is one
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=sys.stderr or io.StringIO(), flush=True)
def replace_file(path, content):  # text, or write(file); never half a file
    draft = Path(path).with_name(f".{Path(path).name}")
    draft.parent.mkdir(parents=True, exist_ok=True)
    with draft.open("wb") as file:
        content(file) if callable(content) else file.write(content.encode("utf-8", "replace"))
    os.replace(draft, path)
def save_json(path, content):
    replace_file(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

def read_file(path, kind=None):
    """What finish wrote: dict(config, state, seconds), with network if kind is UNet or Judge."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        need(saved["state"]["step"] > 0 and not (kind and "parts" in saved["state"]), "unfinished")
        if kind:
            saved["network"] = kind(**saved["config"]["network"]).eval().requires_grad_(False)
            saved["network"].load_state_dict(saved["state"]["weights"])
        return saved
    except Exception as error:
        raise UsageError(f"{path} is no whole file of sgu.py ({error!r:.99})") from None

def finish(label, opt, job, kind=None, **config):
    """Run job from where its file left it, saving every 30 s -> what read_file gives. job(state=)
    yields dict(step, steps, snapshot, ...); another config than the file's: a UsageError."""
    path = f"{opt.out}/{label.removeprefix('train ').replace(' ', '_')}.pt"
    config.update(data=opt.checksum, forget=opt.forget, seed=opt.seed, precision=opt.precision)
    saved, last = dict(config=config, state=None, seconds=0.0), time.time()
    if os.path.exists(path) and not opt.fresh:
        saved = read_file(path)
        old = saved["config"]
        new = "; ".join(f"{k} {old.get(k)} -> {v}" for k, v in config.items() if old.get(k) != v)
        need(not new, f"{path} was made with other options ({new}): use another --out, or --fresh")
    for info in job(state=saved["state"]):
        now, step, steps = time.time(), info["step"], info["steps"]
        spent, done = saved["seconds"] + now - last, step >= steps
        if done or now - last > 30:
            saved.update(state=info["snapshot"](), seconds=spent)
            replace_file(path, partial(torch.save, saved))
            last = now
        if done or sys.stderr and sys.stderr.isatty():
            left = spent / step * (steps - step)
            losses = " ".join(f"{k} {v:.4f}" for k, v in info.items() if isinstance(v, float))
            say(f"{label:<28} {step}/{steps} {spent:.0f} s, {left:.0f} s left {losses:<30}",
                end="\n" if done else "\r")
    opt.seconds[label] = saved["seconds"]
    return read_file(path, kind) if kind else saved
def load_model(path, device="cpu"):
    """A finished <method>.pt -> (network, schedule): make_score of these two is its score."""
    saved = read_file(path, UNet)
    return saved["network"].to(device), SCHEDULES[saved["config"]["sde"]]()
def load_judge(path, device="cpu"):  # a finished judge.pt -> its Judge
    return read_file(path, Judge)["network"].to(device)

def get_model(method, opt, data):  # trained now or earlier: what read_file gives
    if method == "standard" and opt.pretrained:
        return read_file(opt.pretrained, UNet)
    how, sde, gone = METHODS[method], SCHEDULES[opt.sde](), is_forgotten(data, "train")
    alpha = how.alpha if opt.alpha is None or not how.loss else opt.alpha
    recipe, window = RECIPES[opt.recipe]._replace(precision=opt.precision), EVERY_SIGMA
    if opt.recipe == "balanced":
        weights = tuple(balanced_weight(sde, opt.network["data_std"], p) for p in (1, how.power))
        recipe, window = recipe._replace(noise_law=opt.noise_law, weighting=weights), how.window
    given = dict(alpha=alpha, window=window, steps=opt.steps, lr=opt.lr, batch_size=opt.batch_size)
    torch.manual_seed(opt.seed)
    model, score = UNet(**opt.network).to(opt.device), None
    if from_standard(method, opt):
        reference = load_model(opt.pretrained or f"{opt.out}/standard.pt", opt.device)[0]
        model.load_state_dict(reference.state_dict())
        score = make_score(reference, sde, precision=opt.precision)
        given["steps"] = opt.unlearn_steps or max(1, round(how.share * opt.steps))
        given["lr"] *= how.pace
    by_name = {k: re.sub(" at 0x.*?>", ">", str(v)) for k, v in how._asdict().items()}
    config = dict(by_name, **given, sde=opt.sde, schedule=str(vars(sde)), recipe=opt.recipe,
                  network=opt.network, noise_law=recipe.noise_law,
                  start=checksum(model.state_dict().values()))
    x = data["train"].to(opt.device)
    if x.shape[1] == 3 and len(x) < 10_000:  # few: mirrored, too
        x, gone = torch.cat([x, x.flip(3)]), gone.repeat(2)
    given.update(model=model, ema=copy.deepcopy(model).requires_grad_(False), sde=sde,
                 keep=x if how.keep == "D" else x[~gone], forget=x[gone] if how.loss else None,
                 forget_loss=how.loss, recipe=recipe, seed=opt.seed)
    given = how.prepare(score, given) if how.prepare else given
    if opt.compile:
        model.compile()
    return finish(f"train {method}", opt, partial(train, **given), UNet, **config)

def values_of(method, network, opt, task, x, steps=None):
    """What a task makes of one network and x: (n, C, H, W) uint8, whose shape samples have -> as
    many images, or bits/dim (n,). Every method meets the same random numbers."""
    sde, nll = SCHEDULES[opt.sde](), "likelihood" in task
    score = make_score(network, sde, precision="float32" if nll else opt.precision)
    config = dict(sde=opt.sde, sampler=opt.sampler, sampler_steps=opt.sampler_steps,
                  network=checksum(network.state_dict().values()))
    size = 100 if task == "samples" else max(4, min(50, 3200 // (steps or 64)))
    def job(state):
        done = state["step"] if state else 0
        done -= done % size if done < len(x) else 0  # half a chunk is made anew
        values = [state["values"][:done]] if state else []
        while done < len(x):
            g = torch.Generator(opt.device).manual_seed(opt.seed * 1_000_003 + done * (not nll))
            clean = from_levels(x[done:done + size].to(opt.device))
            if nll:
                made = bits_per_dim(score, sde, clean, steps, generator=g).cpu()
            elif "inpaint" in task:
                made = to_levels(inpaint(score, sde, clean, upper_half_hidden(x), generator=g))
            elif "reconstruct" in task:
                made = to_levels(reconstruct(score, sde, clean, generator=g))
            else:
                made = to_levels(SAMPLERS[opt.sampler](score, sde, clean.shape, opt.sampler_steps,
                                                       generator=g, device=opt.device))
            need(made.isfinite().all(), "the network diverged; lower --lr", FloatingPointError)
            values, done = [*values, made], done + len(made)
            yield dict(step=done, steps=len(x),
                       snapshot=lambda: dict(step=done, values=torch.cat(values)))
    return finish(f"{task} {method}", opt, job, **config)["state"]["values"][:len(x)]
def upper_half_hidden(x):  # of (..., H, W): the mask, 0 above and 1 below
    return (torch.arange(x.shape[-2]) >= x.shape[-2] // 2).float()[:, None].expand(x.shape[-2:])

def likelihoods(parts, make):
    """Bits/dim of D_g and D_f, in ever finer steps (to 512), till the error is < se/10 -> entry."""
    entry = {}
    for part, (x, _) in parts.items():
        bits, steps, done = make(f"likelihood {part} 16", x, 16), 16, False
        while not done and steps < 512:
            steps, coarse = 2 * steps, bits
            bits = make(f"likelihood {part} {steps}", x, steps)
            error = float(flow_error(bits, coarse).mean())
            se = float(bits.std()) / math.sqrt(len(x)) if len(x) > 1 else None
            done = error < 0.1 * (se or 0.1)
        for name, value in dict(n=len(x), se=se, steps=steps, error=error, converged=done).items():
            entry.setdefault(name, {})[part] = value
        entry[part] = float(bits.mean())
    return entry
def restored(before, after, labels, judge):  # what the judge sees after inpaint or reconstruct
    (was, clean), (now, features) = opinions(judge, before), opinions(judge, after)
    right, n = int((now.argmax(1) == labels).sum()), len(labels)
    return dict(accuracy=right / n, ci95=wilson(right, n), n=n,
                clean=float((was.argmax(1) == labels).float().mean()),
                distance=float((features - clean).norm(dim=1).mean()))
def flat(value, row=""):  # an entry of the results -> {row: text}
    if not isinstance(value, dict):
        form = {float: "{:.3f}", list: "{0[0]:.3f} to {0[1]:.3f}"}.get(type(value), "{}")
        return {row.strip(): form.format(value)}
    hidden = ("recipe", "class_histogram", "n", "steps", "error")
    parts = [flat(value[key], f"{row} {key}") for key in value if key not in hidden]
    return {name: text for part in parts for name, text in part.items()}

def save_table(results, out):
    """results.json on its side, to table.md and terminal: a row per figure, a column per method."""
    columns = [flat(entry) for entry in results["methods"].values()]
    rows = [["", *(METHODS[method].title for method in results["methods"])]]
    for name in dict.fromkeys(name for column in columns for name in column):
        rows.append([name, *(column.get(name, "") for column in columns)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    judge = ", ".join(f"{name} {value:.2%}" for name, value in results["judge"].items())
    title = f"`{results['command']}`, {results['device']}. Of the judge: {judge}."
    text = "\n".join([title, "", *lines, ""])
    replace_file(f"{out}/table.md", text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text += f"\nPictures, table and all numbers are in {out}"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)

def draw_picture(path, rows, judge, forget):
    """rows: {title: images (n, C, H, W) uint8} -> a PNG; what the judge calls forgotten framed."""
    n, channels, side, _ = next(iter(rows.values())).shape
    size = side * max(1, 64 // side) + 6
    page = Image.new("RGB", (130 + n * size, len(rows) * size), "white")
    for y, (title, x) in zip(range(0, page.height, size), rows.items()):
        ImageDraw.Draw(page).text((4, y + size // 2), title, fill="black")
        hit = torch.isin(opinions(judge, x)[0].argmax(1), torch.tensor(forget))
        x = x[:, :3 if channels > 2 else 1].expand(-1, 3, -1, -1)
        for i, image in enumerate(x.permute(0, 2, 3, 1).numpy()):
            tile = Image.fromarray(image).resize((size - 6, size - 6), Image.NEAREST)
            tile = ImageOps.expand(tile, 3, "#e69f00" if hit[i] else "white")
            page.paste(tile, (130 + i * size, y))
    replace_file(path, partial(page.save, format="PNG"))

@torch.inference_mode(False)
def run(opt, judge=None):
    """The experiment -> the content of results.json. judge: a module like Judge, or None: ours."""
    words = as_words(vars(opt), "out", "data_root", "fresh")
    opt, data = resolve(opt)
    config, machine, opt.seconds = dict(vars(opt)), describe(opt.device), {}
    say(f"{data['name']}: forget {opt.forget} in {opt.steps} steps, {machine}, in {opt.out}")
    if judge is None:
        network = Judge(data["train"].shape[1], len(data["classes"]) + 1, opt.judge_width).config
        job = partial(train_judge, data, opt.judge_width, opt.judge_steps, device=opt.device,
                      precision=opt.precision, seed=opt.seed)
        saved = finish("judge", opt, job, Judge, steps=opt.judge_steps, network=network)
        judge = saved["network"].to(opt.device)
    gone = is_forgotten(data, "test")
    real = opinions(judge, data["train"][~is_forgotten(data, "train")][:opt.samples])[1]
    probs, features = opinions(judge, data["test"])
    label, reference = probs.argmax(1), features[~gone]
    facts = dict(test_accuracy=label == data["test_labels"], none=label >= len(data["classes"]),
                 floor=torch.isin(label[~gone], torch.tensor(data["forget"])))
    facts = {name: float(hits.float().mean()) for name, hits in facts.items()}
    if facts["test_accuracy"] < 0.9:
        say(f"sgu: warning: the judge is right on {facts['test_accuracy']:.1%} of test images only")
    parts = {part: [data[key][rows][:opt.likelihood_samples] for key in ("test", "test_labels")]
             for part, rows in (("D_g", ~gone), ("D_f", gone))}

    methods, pictures = {}, {}
    for method in opt.methods.split(","):
        model, title = get_model(method, opt, data), METHODS[method].title
        make = partial(values_of, method, model["network"].to(opt.device), opt)
        entry = dict(recipe={k: model["config"][k] for k in ("alpha", "steps", "lr", "window")})
        methods[method] = entry
        if "sample" in opt.tasks:
            images = make("samples", data["test"][:1].expand(opt.samples, -1, -1, -1))
            entry.update(judged(*opinions(judge, images), data, reference, real))
            pictures.setdefault("samples", {})[title] = images[:16]
        if "likelihood" in opt.tasks:
            entry["nll_bits_per_dim"] = likelihoods(parts, make)
        for task in [task for task in ("inpaint", "reconstruct") if task in opt.tasks]:
            images = {part: make(f"{task} {part}", x) for part, (x, _) in parts.items()}
            entry[task] = {k: restored(x, images[k], y, judge) for k, (x, y) in parts.items()}
            tests = torch.cat([x[:8] for x, _ in parts.values()])
            pictures.setdefault(task, {"test images": tests})
            pictures[task][title] = torch.cat([x[:8] for x in images.values()])

    results = dict(command=shlex.join(["python", "sgu.py", *words]), device=machine,
                   data=data["name"], config=config, judge=facts, methods=methods,
                   seconds=dict(opt.seconds, total=sum(opt.seconds.values())))
    save_json(f"{opt.out}/results.json", results)
    for task, rows in pictures.items():
        draw_picture(f"{opt.out}/{task}.png", rows, judge, data["forget"])
    save_table(results, opt.out)
    return results

def main(argv=None):  # exit codes: 0 done, 2 something to mend, 130 Ctrl-C
    try:
        run(parse_options(argv))
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
    except KeyboardInterrupt:
        say("\nsgu: stopped; the same command goes on from the last save (without --fresh)")
        return 130
    except (UsageError, FloatingPointError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        say(f"sgu: {' '.join(str(error).split())}")
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main())
