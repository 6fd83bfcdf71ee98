# %% [markdown]
# # Exercise 7: inpainting
#
# A score can do something that nobody trained it for: fill in the hidden part of an image. The
# paper uses this as a third test of forgetting (Table 3): hide the upper half of a forgotten image,
# and see what the model puts there. This is section 6 of `sgu.py`. 4 questions, 11 points, about
# 60 minutes.

# %%
import math
import sys

sys.path[:0] = ["../..", ".."]                 # sgu.py is two folders up, style.py one
import torch

import sgu
import checks
import marking
from checks import F64, SDES, Mixture, seeded

# %% [markdown]
# ## Question 7.1 (2 points, 10 minutes)
#
# The sampler walks an image $y$ from noise to data. We know some pixels of the result, so at every
# time $t$ we force them in, at the noise level of that time:
#
# $$y_i \leftarrow a(t) x_i + s(t) z_i \quad \text{for known pixels } i,
# \qquad y_i \text{ stays for hidden ones},$$
#
# with new noise $z$ at every call. `torch.where(known, this, that)` picks from two tensors;
# `sgu.noise_like(x, generator)` draws $z$.
#
# **Marked by** `check_pin`: mean and spread of the known pixels, hidden ones bit for bit.

# %% student 7.1
def pin(y, x, known, sde, t, generator):
    """y, x: (B, C, H, W), known: the same shape, bool, t: a 0-d tensor -> (B, C, H, W)."""
    raise NotImplementedError("question 7.1")

# %% solution 7.1
def pin(y, x, known, sde, t, generator):
    """y, x: (B, C, H, W), known: the same shape, bool, t: a 0-d tensor -> (B, C, H, W)."""
    a, s = map(float, sde.marginal(t))
    return torch.where(known, a * x + s * sgu.noise_like(x, generator), y)

# %% check 7.1 (2 points)
checks.check_pin(pin, SDES["VE"])
checks.check_pin(pin, SDES["VP"])

# %% [markdown]
# ## Question 7.2 (3 points, 15 minutes): find the bug
#
# This inpainting gives wonderful results; the test images that it restores are almost perfect. They
# are too good: somewhere the answer leaks, and $y$ holds what it must not know. Fix the function,
# and give the number of the line that you had to change.
#
# **Marked by** `check_inpaint_keeps`: known pixels come back bit for bit, and garbage in the hidden
# pixels must not change the result (2 points); and by your line number (1 point).

# %% student 7.2 bug: the answer leaks
def inpaint_once(score, sde, x, mask, steps=40, generator=None):                     # line 1
    known = mask.bool().expand_as(x)                                                 # line 2
    noised = lambda t: sde.at(t)[0] * x + sde.at(t)[1] * sgu.noise_like(x, generator)     # line 3
    grid = sgu.time_grid(sde, steps)                                                 # line 4
    y = noised(grid[0])                                                              # line 5
    for t, t_next in zip(grid, grid[1:]):                                            # line 6
        y = sgu.reverse_step(score, sde, y, t, t_next, generator)                    # line 7
        y = torch.where(known, noised(t_next), y)                                    # line 8
    return torch.where(known, x, sgu.denoise(score, sde, y, grid[-1]))               # line 9

line_7_2 = 0

# %% solution 7.2
def inpaint_once(score, sde, x, mask, steps=40, generator=None):                     # line 1
    known = mask.bool().expand_as(x)                                                 # line 2
    noised = lambda t: sde.at(t)[0] * x + sde.at(t)[1] * sgu.noise_like(x, generator)     # line 3
    grid = sgu.time_grid(sde, steps)                                                 # line 4
    y = torch.where(known, noised(grid[0]), sde.prior_sample(x.shape, generator))    # line 5
    for t, t_next in zip(grid, grid[1:]):                                            # line 6
        y = sgu.reverse_step(score, sde, y, t, t_next, generator)                    # line 7
        y = torch.where(known, noised(t_next), y)                                    # line 8
    return torch.where(known, x, sgu.denoise(score, sde, y, grid[-1]))               # line 9

line_7_2 = 5

# %% check 7.2 (3 points)
with marking.planted_bug(globals().get("line_7_2"), "7.2"):
    checks.check_inpaint_keeps(inpaint_once, SDES["VE"], nan=False)

# %% [markdown]
# ## Question 7.3 (2 points, 10 minutes): predict, then run
#
# Two pixels, each with mean 0, vary together (correlation 0.8). One of them is known to be 0.5, so
# the right answer for the other is 0.4 on average; without its neighbour it would be 0. Where does
# the mean of many fillings end up if the corrected `inpaint_once` makes them? (The check uses
# `sgu.inpaint` with `repeats=1`, which is the same.)
#
# - **a** between 0 and 0.4: it listens to the known pixel, but not closely enough
# - **b** at 0.4: replacing the known pixel at every level is exact
# - **c** beyond 0.4: replacing it again and again exaggerates
#
# Write down the letter, and one sentence saying why. **Marked by** the run: the mean of 5,000
# fillings.

# %% student 7.3
choice_7_3 = ""                                # your prediction: a, b or c
why_7_3 = ""                                   # and why, in a sentence

# %% solution 7.3
choice_7_3 = "a"
why_7_3 = ("At each level the hidden pixel was drawn before it could see the known one, and there "
           "is no way back to change it.")

# %%
def fill(inpaint, repeats, n=5000):
    """n fillings of the second pixel, (n,); the first one is known to be 0.5."""
    pair = Mixture([1.], [[0., 0.]], [[[.25, .2], [.2, .25]]])
    x = torch.tensor([0.5, 0.]).reshape(1, 1, 1, 2).expand(n, 1, 1, 2)
    mask = torch.tensor([1., 0.]).reshape(1, 1, 1, 2)
    score = pair.score(SDES["VE"])
    filled = inpaint(score, SDES["VE"], x, mask, repeats=repeats, generator=seeded(5))
    return filled[:, 0, 0, 1]

# %% check 7.3 (2 points)
said = marking.record("7.3", choice_7_3, why_7_3)
mean = float(fill(sgu.inpaint, 1).mean())
marking.compare("7.3", said, "a" if mean < 0.36 else "c" if mean > 0.44 else "b", mean=mean)

# %% [markdown]
# ## Question 7.4 (4 points, 25 minutes)
#
# The remedy (Lugmayr et al. 2022): after a step from $t_i$ down to $t_{i+1}$, go *back up* by
# adding noise and take the step again, `repeats` times in all. This lets the hidden pixels come to
# terms with the known ones at each level. Going up from $t_{i+1}$ to $t_i$ is
#
# $$y \leftarrow \frac{a_i}{a_{i+1}} y +
# \sqrt{s_i^2 - \left( \frac{a_i}{a_{i+1}} s_{i+1} \right)^2} z .$$
#
# Write this move first, as `back_up`. Then start from your corrected function, and `pin` after
# every move, up or down. Replace the hidden pixels of $x$ by 0 at the beginning, so that nothing
# can leak, not even NaN (so use `torch.where`: 0 times NaN is NaN). At the end, the known pixels
# are exactly those of $x$.
#
# **Marked by** `check_back_up` (mean and spread of the move, under VP), `check_inpaint_walk` (which
# times, how often), `check_inpaint_keeps`, and `check_inpaint_conditional`: mean and variance of
# the filled pixel, against the conditional law.

# %% student 7.4
def back_up(y, sde, t, t_next, generator):
    """y: (B, C, H, W) at time t_next -> at time t > t_next. t, t_next: 0-d tensors."""
    raise NotImplementedError("question 7.4")

def inpaint(score, sde, x, mask, steps=40, repeats=10, generator=None):
    """x: (B, C, H, W), mask: 1 = known, broadcasts to x -> (B, C, H, W)."""
    raise NotImplementedError("question 7.4")

# %% solution 7.4
def back_up(y, sde, t, t_next, generator):
    """y: (B, C, H, W) at time t_next -> at time t > t_next. t, t_next: 0-d tensors."""
    (a, s), (a_next, s_next) = sde.at(t), sde.at(t_next)
    up = a / a_next
    return up * y + math.sqrt(s ** 2 - (up * s_next) ** 2) * sgu.noise_like(y, generator)

def inpaint(score, sde, x, mask, steps=40, repeats=10, generator=None):
    """x: (B, C, H, W), mask: 1 = known, broadcasts to x -> (B, C, H, W)."""
    known = mask.bool().expand_as(x)
    x = torch.where(known, x, torch.zeros_like(x))
    grid = sgu.time_grid(sde, steps)
    y = pin(sde.prior_sample(x.shape, generator), x, known, sde, grid[0], generator)
    for t, t_next in zip(grid, grid[1:]):
        for r in range(repeats):
            if r > 0:
                y = back_up(y, sde, t, t_next, generator)
                y = pin(y, x, known, sde, t, generator)
            y = sgu.reverse_step(score, sde, y, t, t_next, generator)
            y = pin(y, x, known, sde, t_next, generator)
    return torch.where(known, x, sgu.denoise(score, sde, y, grid[-1]))

# %% check 7.4 (4 points)
checks.check_back_up(back_up)
for sde in (SDES["VE"], SDES["VP"]):
    checks.check_inpaint_keeps(inpaint, sde)
    checks.check_inpaint_walk(inpaint, sde)
checks.check_inpaint_conditional(inpaint, SDES["VE"])

# %% look
# The filled pixel against the law that it should follow, with one repeat and with ten.
from style import FORGET, KEEP, plt

with marking.picture():
    figure, ax = plt.subplots(figsize=(6, 3))
    for repeats, colour in ((1, FORGET), (10, KEEP)):
        ax.hist(fill(inpaint, repeats), bins=40, density=True, histtype="step", color=colour,
                lw=1.5, label=f"repeats = {repeats}")
    u = torch.linspace(-1, 1.8, 200)
    law = torch.exp(-(u - 0.4) ** 2 / 0.18) / math.sqrt(math.pi * 0.18)
    ax.plot(u, law, "k--", label="conditional law")
    ax.set(xlabel="the filled pixel; its known neighbour is 0.5")
    ax.legend(frameon=False)
