# %% [markdown]
# # Exercise 4: likelihood
#
# The probability flow $dx/dt = f - g^2 \cdot \mathrm{score}/2$ moves points without noise, so a
# density can be followed along it: where the flow spreads points out, the density falls. That gives
# $\log p(x)$ of a single image, and with it the paper's second measure of forgetting, the negative
# log-likelihood (NLL) of the data to forget.
#
# Read section 5 of `sgu.py` after you have tried, not before. 5 questions, 12 points, about
# 65 minutes. Whether such a number can be trusted is the subject of exercise 9.

# %%
import math
import sys

sys.path[:0] = ["../..", ".."]                 # sgu.py is two folders up, style.py one
import torch

import sgu
import checks
import marking
from checks import F64, SDES, seeded

# %% [markdown]
# ## Question 4.1 (2 points, 10 minutes)
#
# How fast a flow $v(x)$ spreads points out is its divergence, the trace of its Jacobian:
#
# $$\mathrm{div}\thinspace v = \sum_{i=1}^{D} \frac{\partial v_i}{\partial x_i}.$$
#
# Compute it exactly, for every point of a batch, with $D$ calls of `torch.autograd.grad`. The trick
# with batches: point $b$ of the output depends on point $b$ of the input alone, so the gradient of
# $\sum_b v_{bi}$ holds row $i$ of the Jacobian of every point.
#
# **Marked by** `check_divergence`: a field whose divergence you could work out by hand.

# %% student 4.1
def divergence(field, x):
    """field: (B, D) -> (B, D), x: (B, D) -> the divergence at each point: (B,)."""
    raise NotImplementedError("question 4.1")

# %% solution 4.1
def divergence(field, x):
    """field: (B, D) -> (B, D), x: (B, D) -> the divergence at each point: (B,)."""
    x, total = x.detach().requires_grad_(), 0
    v = field(x)
    for i in range(x.shape[1]):
        row, = torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)
        total = total + row[:, i]
    return total

# %% check 4.1 (2 points)
checks.check_divergence(divergence)

# %% [markdown]
# ## Question 4.2 (2 points, 10 minutes)
#
# For images, $D$ gradients are too many. Hutchinson's trick needs only one: for random signs $r$
# with independent entries $\pm 1$,
#
# $$\mathrm{div}\thinspace v = E\left[ r^T J r \right], \qquad
# J_{ij} = \frac{\partial v_i}{\partial x_j}.$$
#
# Write $r^T J r$ with a single call of `torch.autograd.grad`. ($D$ calls give the same value, which
# the check accepts, at $D$ times the cost.)
#
# **Marked by** `check_hutchinson_probe`: every value, and the mean over all eight vectors of signs.

# %% student 4.2
def hutchinson(field, x, r):
    """field: (B, D) -> (B, D), x: (B, D), r: (B, D) of signs -> r^T J r: (B,)."""
    raise NotImplementedError("question 4.2")

# %% solution 4.2
def hutchinson(field, x, r):
    """field: (B, D) -> (B, D), x: (B, D), r: (B, D) of signs -> r^T J r: (B,)."""
    x = x.detach().requires_grad_()
    row, = torch.autograd.grad((field(x) * r).sum(), x)
    return (row * r).sum(1)

# %% check 4.2 (2 points)
checks.check_hutchinson_probe(hutchinson)

# %% [markdown]
# ## Question 4.3 (4 points, 25 minutes)
#
# Now the likelihood itself. In $y = x/a$ and $u = \log \sigma$, with $\sigma = s/a$, the flow is
# short: with $e = -s \cdot \mathrm{score}(a y, t)$,
#
# $$\frac{dy}{du} = \sigma e, \qquad \frac{d \log p}{du} = -\sigma \cdot \mathrm{div}_y e.$$
#
# Walk from the data ($t = t_{\min}$) to the noise ($t = 1$) with Heun's method, adding up
# $\sigma \cdot \mathrm{div}_y e$ as you go, and finish with
#
# $$\log p(x) = \log \pi(a_1 y_1) + D \log \frac{a_1}{a_0} + \int \sigma \cdot \mathrm{div}_y e
# \cdot du.$$
#
# The grid is given; index $i$ of `grid`, `a` and `s` belongs to the same time.
# `sde.prior_log_prob(x)` is $\log \pi$. Use your `divergence` of question 4.1, which must have
# passed.
#
# **Marked by** `check_heun_likelihood`: an independent Heun's method, on a coarse grid; and by
# `check_likelihood`: 300 points of a mixture whose density is known, mean error below 0.02 nats.

# %% student 4.3
def log_likelihood(score, sde, x, steps=100, exact=True):
    """x: (B, D) -> log p(x) in nats: (B,). exact: for the check, which always sets it to True."""
    a, s = sde.marginal(torch.tensor([sde.t_min, 1.], dtype=F64))
    lo, hi = (s / a).log().tolist()
    grid = sde.time(torch.linspace(lo, hi, steps + 1, dtype=F64).exp()).clamp(sde.t_min, 1)
    a, s = sde.marginal(grid)
    raise NotImplementedError("question 4.3")

# %% solution 4.3
def log_likelihood(score, sde, x, steps=100, exact=True):
    """x: (B, D) -> log p(x) in nats: (B,). exact: for the check, which always sets it to True."""
    a, s = sde.marginal(torch.tensor([sde.t_min, 1.], dtype=F64))
    lo, hi = (s / a).log().tolist()
    grid = sde.time(torch.linspace(lo, hi, steps + 1, dtype=F64).exp()).clamp(sde.t_min, 1)
    a, s = sde.marginal(grid)

    def flow(y, i):
        sigma = float(s[i] / a[i])
        def e(y):
            return -float(s[i]) * sgu.score_at(score, float(a[i]) * y, grid[i])
        return sigma * e(y).detach(), sigma * divergence(e, y)

    y, total, h = x / float(a[0]), 0, (hi - lo) / steps
    for i in range(steps):
        k1, d1 = flow(y, i)
        k2, d2 = flow(y + h * k1, i + 1)
        y = y + h / 2 * (k1 + k2)
        total = total + h / 2 * (d1 + d2)
    stretch = x.shape[1] * float((a[-1] / a[0]).log())
    return sde.prior_log_prob(float(a[-1]) * y) + stretch + total

# %% check 4.3 (4 points)
checks.check_heun_likelihood(log_likelihood, SDES["VP"])
checks.check_likelihood(log_likelihood, SDES["VP"], prior_mismatch=0.02)

# %% [markdown]
# ## Question 4.4 (2 points, 10 minutes): find the bug
#
# Papers report *bits per dimension* of 8-bit images. A grey level $k$ stands for a small interval
# of $[-1, 1]$, of width $1/128$, in which the pixel is placed at random (dequantisation). According
# to the function below, uniform 8-bit noise costs 1 bit per pixel; everyone knows that it costs 8.
# Which line is wrong? Fix the function, and give the number of the line.
#
# $$\mathrm{bits/dim} = -\frac{\log_2 P(\mathrm{levels})}{D}, \qquad
# P(\mathrm{levels}) \approx p(y) \left( \frac{1}{128} \right)^{D}.$$
#
# **Marked by** `check_bits_per_dim`: uniform noise under its own exact score must cost 8.00 bits
# (1 point); and by your line number (1 point).

# %% student 4.4 bug: the probability of a level is that of an interval
def bits_per_dim(score, sde, x, generator=None):                             # line 1
    levels = ((x + 1) * 128).floor().clamp(0, 255)                           # line 2
    u = torch.rand(x.shape, generator=generator)                             # line 3
    y = (levels + u) / 128 - 1                                               # line 4
    nats = sgu.log_likelihood(score, sde, y, generator=generator)            # line 5
    return -nats / (x[0].numel() * math.log(2))                              # line 6

line_4_4 = 0

# %% solution 4.4
def bits_per_dim(score, sde, x, generator=None):                             # line 1
    levels = ((x + 1) * 128).floor().clamp(0, 255)                           # line 2
    u = torch.rand(x.shape, generator=generator)                             # line 3
    y = (levels + u) / 128 - 1                                               # line 4
    nats = sgu.log_likelihood(score, sde, y, generator=generator)            # line 5
    return -nats / (x[0].numel() * math.log(2)) + 7                          # line 6

line_4_4 = 6

# %% check 4.4 (2 points)
with marking.planted_bug(globals().get("line_4_4"), "4.4"):
    checks.check_bits_per_dim(bits_per_dim, SDES["VP"])

# %% [markdown]
# ## Question 4.5 (2 points, 10 minutes): predict, then run
#
# A model believes that every pixel is uniform noise. It is shown an image that is one single grey
# all over, the simplest image there is. How many bits per dimension does this image cost under the
# model? Write down a number, and one sentence saying why.
#
# **Marked by** the run: within 0.2 of `sgu.bits_per_dim`.

# %% student 4.5
guess_4_5 = None                               # your prediction: a number
why_4_5 = ""                                   # and why, in a sentence

# %% solution 4.5
guess_4_5 = 8.0
why_4_5 = ("Under uniform noise every image has the same probability, 256^-D: likelihood says what "
           "the model expected, not what looks simple.")

# %% check 4.5 (2 points)
said = marking.record("4.5", guess_4_5, why_4_5, number=True)
grey, score = torch.full((4, 1, 6, 6), 0.2), checks.uniform_score(SDES["VP"])
bits = sgu.bits_per_dim(score, SDES["VP"], grey, generator=seeded(0))
marking.compare("4.5", said, float(bits.mean()), 0.2)
