# %% [markdown]
# # Exercise 2: score matching
#
# The score $\nabla_x \log p_t(x)$ points to where the data are denser. Nobody can compute it for
# real images, but a network can learn it, because guessing the noise in a noisy image and knowing
# the score amount to the same thing:
#
# $$e(x_t, t) = -s(t) \nabla \log p_t(x_t) \qquad \text{is the best guess of} \qquad z.$$
#
# Here $x_t = a(t) x_0 + s(t) z$ is an image $x_0$ with noise $z \sim N(0, I)$, $p_t$ is the density
# of all such $x_t$, and `a, s = sde.marginal(t)` (exercise 1). Data come in batches of $B$ images
# with $D$ pixels each. In all exercises `score(x, t)` is the score, and $e = -s \cdot$ `score` is
# the noise that it predicts.
#
# This exercise goes with sections 2 and 3 of `sgu.py`. 5 questions, 11 points, about 55 minutes.

# %%
import math
import sys

sys.path[:0] = ["../..", ".."]                 # sgu.py is two folders up, style.py one
import torch

import sgu
import checks
import marking
from checks import F64, SDES

# %% [markdown]
# ## Question 2.1 (2 points, 10 minutes)
#
# Write the loss that trains every model of the paper (Eq. 5), in units of the noise:
#
# $$L = \frac{1}{B} \sum_{b} \frac{1}{D} \sum_{i} (e_{bi} - z_{bi})^2, \qquad
# e = -s(t) \cdot \mathrm{score}(x_t, t), \qquad x_t = a(t) x_0 + s(t) z.$$
#
# `sgu.per_sample(s, x0)` turns numbers of shape (B,) into the shape (B, 1, ..., 1), so that they
# multiply images. $t$ and $z$ are given.
#
# **Marked by** `check_noising` (is the score asked at the right point?) and
# `check_score_matching_value` (the value, against plain loops).

# %% student 2.1
def keep_loss(score, sde, x0, t, z):
    """x0: (B, ...), t: (B,), z: (B, ...) -> one number >= 0."""
    raise NotImplementedError("question 2.1")

# %% solution 2.1
def keep_loss(score, sde, x0, t, z):
    """x0: (B, ...), t: (B,), z: (B, ...) -> one number >= 0."""
    a, s = (sgu.per_sample(v, x0) for v in sde.marginal(t))
    e = -s * score(a * x0 + s * z, t)
    return (e - z).square().mean()

# %% check 2.1 (2 points)
for sde in (SDES["VE"], SDES["VP"]):
    checks.check_noising(keep_loss, sde)
    checks.check_score_matching_value(keep_loss, sde)

# %% [markdown]
# ## Question 2.2 (2 points, 10 minutes)
#
# For simple data the score has a formula. If $x_0 \sim N(m, v I)$, then
# $x_t \sim N(a m, (a^2 v + s^2) I)$. Write the score of this law.
#
# **Marked by** `check_gaussian_score`: against automatic differentiation of the log-density.

# %% student 2.2
def gaussian_score(m, v, sde):
    """m: (D,), v: a number -> the function score(x, t), x: (B, D), t: (B,) -> (B, D)."""
    def score(x, t):
        raise NotImplementedError("question 2.2")
    return score

# %% solution 2.2
def gaussian_score(m, v, sde):
    """m: (D,), v: a number -> the function score(x, t), x: (B, D), t: (B,) -> (B, D)."""
    def score(x, t):
        a, s = (sgu.per_sample(r, x) for r in sde.marginal(t))
        return -(x - a * m) / (a ** 2 * v + s ** 2)
    return score

# %% check 2.2 (2 points)
checks.check_gaussian_score(gaussian_score, SDES["VE"])
checks.check_gaussian_score(gaussian_score, SDES["VP"])

# %% [markdown]
# ## Question 2.3 (2 points, 10 minutes)
#
# If you know the noise, you know the image. Solve $x_t = a x_0 + s z$ for $x_0$, and replace $z$ by
# its best guess (Tweedie's formula):
#
# $$E[x_0 | x_t] = \frac{x_t + s^2 \cdot \mathrm{score}(x_t, t)}{a}.$$
#
# Here $t$ is one number for the whole batch (a tensor with no axes, which `sde.marginal` accepts as
# well); `sgu.score_at(score, x, t)` asks the score at one time.
#
# **Marked by** `check_denoise`: against the posterior mean of Gaussian data.

# %% student 2.3
def denoise(score, sde, x, t):
    """x: (B, ...), t: a 0-d tensor -> the mean of the images behind x: (B, ...)."""
    raise NotImplementedError("question 2.3")

# %% solution 2.3
def denoise(score, sde, x, t):
    """x: (B, ...), t: a 0-d tensor -> the mean of the images behind x: (B, ...)."""
    a, s = sde.marginal(t)
    return (x + s ** 2 * sgu.score_at(score, x, t)) / a

# %% check 2.3 (2 points)
checks.check_denoise(denoise, SDES["VP"])

# %% [markdown]
# ## Question 2.4 (2 points, 10 minutes): predict, then run
#
# Even the exact score does not bring the keep loss down to 0, since the noise in a noisy image can
# never be known for certain. Where is the smallest possible loss close to 1, that is, no better
# than always answering $e = 0$?
#
# - **a** where there is little noise, near $t = 0$
# - **b** where there is a lot of noise, near $t = 1$
# - **c** it is about the same at all $t$
#
# Write down the letter, and one sentence saying why. **Marked by** the run: the keep loss of an
# exact score at $t = 0.05$ and at $t = 0.95$.

# %% student 2.4
choice_2_4 = ""                                # your prediction: a, b or c
why_2_4 = ""                                   # and why, in a sentence

# %% solution 2.4
choice_2_4 = "a"
why_2_4 = ("When the noise is faint, every small wrinkle might belong to the image; in strong "
           "noise, what you see is the noise.")

# %% check 2.4 (2 points)
said = marking.record("2.4", choice_2_4, why_2_4)

def smallest_loss(time, n=4000):
    x0 = checks.GAUSS.sample(n, checks.seeded(0))
    score, t = checks.GAUSS.score(SDES["VP"]), torch.full((n,), time)
    return float(sgu.score_matching_loss(score, SDES["VP"], x0, t=t, generator=checks.seeded(1)))

low, high = smallest_loss(0.05), smallest_loss(0.95)
answer = "a" if low > 2 * high else "b" if high > 2 * low else "c"
marking.compare("2.4", said, answer, low=low, high=high)

# %% [markdown]
# ## Question 2.5 (3 points, 15 minutes)
#
# A network works best if its input and its target have variance 1 at every noise level. So `sgu.py`
# does not let a network $F$ predict the score itself. With $y = x/a$ and $\sigma = s/a$ (so that
# $y = x_0 + \sigma z$), and with $\tau$ the standard deviation of the data, it uses
#
# $$e = \frac{\sigma y}{\sigma^2 + \tau^2} - \frac{\tau}{\sqrt{\sigma^2 + \tau^2}}
# F\left( \frac{y}{\sqrt{\sigma^2 + \tau^2}}, \frac{\log \sigma}{4} \right).$$
#
# An untrained network answers 0, and that is already the right score for Gaussian data. The second
# argument of $F$ has shape (B,).
#
# **Marked by** `check_make_score`: a network that answers 0, one that answers perfectly, and what
# they are given as inputs.

# %% student 2.5
def make_score(model, sde, data_std=0.5):
    """model(input, noise) with input: (B, ...), noise: (B,) -> the function score(x, t)."""
    def score(x, t):
        raise NotImplementedError("question 2.5")
    return score

# %% solution 2.5
def make_score(model, sde, data_std=0.5):
    """model(input, noise) with input: (B, ...), noise: (B,) -> the function score(x, t)."""
    def score(x, t):
        a, s = (sgu.per_sample(v, x) for v in sde.marginal(t))
        y, sigma = x / a, s / a
        total = (sigma ** 2 + data_std ** 2).sqrt()
        answer = model(y / total, sigma.flatten().log() / 4)
        e = sigma * y / total ** 2 - data_std / total * answer
        return -e / s
    return score

# %% check 2.5 (3 points)
checks.check_make_score(make_score, SDES["VE"])
checks.check_make_score(make_score, SDES["VP"])

# %% look
# The score of a mixture of three Gaussians at three noise levels: the arrows point to the data.
from style import KEEP, plt

side = torch.linspace(-4, 4, 17)
x = torch.cartesian_prod(side, side)
figure, axes = plt.subplots(1, 3, figsize=(10, 3.4))
for ax, t in zip(axes, (0.3, 0.6, 0.8)):
    arrow = checks.TOY.score(SDES["VE"])(x, torch.full((len(x),), t))
    ax.quiver(*x.T, *arrow.T, color=KEEP)
    ax.set_aspect("equal")
    ax.set_title(f"s = {SDES['VE'].at(t)[1]:.2f}", fontsize=10)
