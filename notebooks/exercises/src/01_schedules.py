# %% [markdown]
# # Exercise 1: schedules and marginals
#
# Every image in this course is spoiled in the same way: it is shrunk a little, and Gaussian noise
# is added,
#
# $$x_t = a(t) x_0 + s(t) z, \qquad z \sim N(0, I), \qquad t \in [0, 1].$$
#
# A *schedule* says how $a$ and $s$ change with $t$. Here you write three of them. Read section 1 of
# `sgu.py` after you have tried, not before. 5 questions, 11 points, about 40 minutes.
#
# Below each question stands a check. It says in one line how many points your answer earns and what
# is missing, so that you can run the whole notebook at any time.

# %%
import math
import sys

sys.path[:0] = ["../..", ".."]                 # sgu.py is two folders up, style.py one
import torch

import sgu
import checks
import marking
from checks import F64, SDES

# %% look
from style import plt

digit = sgu.draw_glyphs(3, seed=0)[0][:1] / 127.5 - 1
times = torch.linspace(0.05, 0.95, 8)
figure, axes = plt.subplots(2, 8, figsize=(10, 2.7))
for row, name in zip(axes, ("VE", "VP")):
    for ax, t in zip(row, times):
        a, s = SDES[name].marginal(t.reshape(1))
        z = torch.randn(digit.shape, generator=checks.seeded(0))
        shown = (a * digit + s * z) / (a ** 2 * 0.25 + s ** 2).sqrt()
        ax.imshow(shown[0, 0], cmap="gray", vmin=-2, vmax=2)
        ax.axis("off")
        ax.set_title(f"{name}, t = {float(t):.2f}", fontsize=8)

# %% [markdown]
# ## Question 1.1 (2 points, 5 minutes)
#
# *Variance exploding* leaves the image alone and lets the noise grow so that $\log s$ is a straight
# line in $t$:
#
# $$a(t) = 1, \qquad s(t) = s_{\min} \left( \frac{s_{\max}}{s_{\min}} \right)^{t}.$$
#
# In the code $s_{\min}$ and $s_{\max}$ are called `sigma_min` and `sigma_max`. Write the function
# for a whole batch of times.
#
# **Marked by** `check_ve_marginal`: your $a$ and $s$ at $t = 0, 1/2, 1$ and at other times, for two
# pairs of ends.

# %% student 1.1
def ve_marginal(t, sigma_min=0.01, sigma_max=20.):
    """t: (B,) in [0, 1] -> a: (B,), s: (B,)."""
    raise NotImplementedError("question 1.1")

# %% solution 1.1
def ve_marginal(t, sigma_min=0.01, sigma_max=20.):
    """t: (B,) in [0, 1] -> a: (B,), s: (B,)."""
    return torch.ones_like(t), sigma_min * (sigma_max / sigma_min) ** t

# %% check 1.1 (2 points)
checks.check_ve_marginal(ve_marginal)
checks.check_ve_marginal(lambda t: ve_marginal(t, 0.1, 5.), 0.1, 5.)

# %% [markdown]
# ## Question 1.2 (3 points, 10 minutes)
#
# *Variance preserving* shrinks the image as the noise comes in, so that data of variance 1 keep
# variance 1. With $\beta(t) = \beta_0 + t (\beta_1 - \beta_0)$,
#
# $$a(t) = \exp\left( -\frac{1}{2} \int_0^t \beta(r) dr \right), \qquad s(t)^2 = 1 - a(t)^2.$$
#
# Do the integral on paper. Near $t = 0$ the two terms of $1 - a^2$ are almost equal, and in float32
# their difference loses all its digits; `torch.expm1(y)` computes $e^y - 1$ without that loss.
#
# **Marked by** `check_vp_marginal`: values at $t = 0, 1/2, 1$ and at other times for two pairs of
# ends, and float32 against float64 at $t = 10^{-4}$ and $10^{-3}$.

# %% student 1.2
def vp_marginal(t, beta_0=0.1, beta_1=20.):
    """t: (B,) in [0, 1] -> a: (B,), s: (B,)."""
    raise NotImplementedError("question 1.2")

# %% solution 1.2
def vp_marginal(t, beta_0=0.1, beta_1=20.):
    """t: (B,) in [0, 1] -> a: (B,), s: (B,)."""
    log_a = -0.5 * (t * beta_0 + t ** 2 / 2 * (beta_1 - beta_0))
    return log_a.exp(), (-torch.expm1(2 * log_a)).sqrt()

# %% check 1.2 (3 points)
checks.check_vp_marginal(vp_marginal)
checks.check_vp_marginal(lambda t: vp_marginal(t, 0.2, 8.), 0.2, 8.)

# %% [markdown]
# ## Question 1.3 (2 points, 10 minutes)
#
# The same process can be written as a stochastic differential equation,
# $dx = f(x, t) dt + g(t) dw$ (Eq. 3 of the paper). If the drift is linear in $x$, the mean and the
# variance of $x_t$ obey
#
# $$\frac{da}{dt} = \frac{f}{x} a, \qquad \frac{d(s^2)}{dt} = 2 \frac{f}{x} s^2 + g^2.$$
#
# Use these two equations to find $f$ and $g$ of the variance preserving schedule with
# $\beta_0 = 0.1$ and $\beta_1 = 20$. (`t[:, None]` has the shape that multiplies `x`.)
#
# **Marked by** `check_schedule`: both equations, by finite differences.

# %% student 1.3
def vp_drift(x, t):
    """x: (B, D), t: (B,) -> f(x, t): (B, D)."""
    raise NotImplementedError("question 1.3")

def vp_diffusion(t):
    """t: (B,) -> g(t): (B,)."""
    raise NotImplementedError("question 1.3")

# %% solution 1.3
def vp_drift(x, t):
    """x: (B, D), t: (B,) -> f(x, t): (B, D)."""
    return -0.5 * (0.1 + 19.9 * t)[:, None] * x

def vp_diffusion(t):
    """t: (B,) -> g(t): (B,)."""
    return (0.1 + 19.9 * t).sqrt()

# %% check 1.3 (2 points)
checks.check_schedule(SDES["VP"], drift=vp_drift, diffusion=vp_diffusion)

# %% [markdown]
# ## Question 1.4 (1 point, 5 minutes): predict, then run
#
# $\sigma = s/a$ is the ratio of noise to signal. Look at the lower row of pictures: at which $t$
# does $\sigma$ reach 1 for the variance preserving schedule? Write down a number, and in a sentence
# why you think so, *before* you compute anything.
#
# In all questions of this kind the check puts your prediction on record and only then runs the
# experiment. If you were wrong it does not tell you the answer. A prediction without a reason earns
# nothing; the reason itself is read by your teacher, not by the machine.
#
# **Marked by** the formula: within 0.1.

# %% student 1.4
guess_1_4 = None                               # your prediction: a number
why_1_4 = ""                                   # and why, in a sentence

# %% solution 1.4
guess_1_4 = 0.26
why_1_4 = "In the third picture the digit can only just be made out, so noise and signal are equal."

# %% check 1.4 (1 point)
said = marking.record("1.4", guess_1_4, why_1_4, number=True)
marking.compare("1.4", said, float(SDES["VP"].time(torch.ones(1, dtype=F64))), 0.1)

# %% [markdown]
# ## Question 1.5 (3 points, 10 minutes): find the bug
#
# A DDPM is a chain of $n = 1000$ small steps,
# $x_k = \sqrt{1 - \beta_k} x_{k-1} + \sqrt{\beta_k} z$, at the times $t = k/n$. The usual
# abbreviation is $\bar\alpha_k = \prod_{j \le k} (1 - \beta_j)$. One line below is wrong. Fix
# the function, and put the number of the line into `line_1_5`.
#
# **Marked by** `check_ddpm_chain`, which walks the chain step by step (2 points), and by your line
# number (1 point). Until you have found the line, the check says what goes wrong but not why.

# %% student 1.5 bug: this is a^2
def ddpm_marginal(t):                                            # line 1
    """t: (B,), multiples of 1/1000 -> a: (B,), s: (B,)."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=F64)          # line 3
    abar = (1 - betas).cumprod(0)                                # line 4
    k = (t * 1000).round().long()                                # line 5
    a = abar[k - 1]                                              # line 6
    s = (1 - abar[k - 1]).sqrt()                                 # line 7
    return a.to(t), s.to(t)                                      # line 8

line_1_5 = 0

# %% solution 1.5
def ddpm_marginal(t):                                            # line 1
    """t: (B,), multiples of 1/1000 -> a: (B,), s: (B,)."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=F64)          # line 3
    abar = (1 - betas).cumprod(0)                                # line 4
    k = (t * 1000).round().long()                                # line 5
    a = abar[k - 1].sqrt()                                       # line 6
    s = (1 - abar[k - 1]).sqrt()                                 # line 7
    return a.to(t), s.to(t)                                      # line 8

line_1_5 = 6

# %% check 1.5 (3 points)
with marking.planted_bug(globals().get("line_1_5"), "1.5"):
    checks.check_ddpm_chain(ddpm_marginal)

# %% look
# Your three schedules on top of those of sgu.py, in grey.
t = torch.linspace(0.001, 1, 1000, dtype=F64)
with marking.picture():
    figure, ax = plt.subplots(figsize=(6, 3))
    for name, marginal, style in (("VE", ve_marginal, "-"), ("VP", vp_marginal, "--"),
                                  ("DDPM", ddpm_marginal, ":")):
        ax.semilogy(t, SDES[name].sigma(t), color="0.8", lw=6)
        a, s = marginal(t)
        ax.semilogy(t, s / a, style, lw=2, label=name)
    ax.set(xlabel="t", ylabel="noise over signal, s/a", title="Your schedules (grey: sgu.py's)")
    ax.legend(frameon=False)
