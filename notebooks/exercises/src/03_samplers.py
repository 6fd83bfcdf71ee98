# %% [markdown]
# # Exercise 3: samplers
#
# Now for the way back, from noise to data. Every sampler starts from $x_1 \sim$ prior and walks
# down from $t = 1$ to $t = 0$, asking the score for directions. This is section 4 of `sgu.py`.
# 4 questions, 10 points, about 45 minutes.

# %%
import math
import sys

sys.path[:0] = ["../..", ".."]                 # sgu.py is two folders up, style.py one
import torch

import sgu
import checks
import marking
from checks import F64, SDES, TILTED, seeded

# %% [markdown]
# ## Question 3.1 (3 points, 15 minutes)
#
# The noising process run backwards is (Eq. 4 of the paper)
#
# $$dx = \left[ f(x, t) - g(t)^2 \cdot \mathrm{score}(x, t) \right] dt + g(t) dw, \qquad dt \lt 0.$$
#
# Write one Euler-Maruyama step from $t$ down to $t_{next}$. If $h = t - t_{next}$ is its length, a
# positive number, the noise of the step is $g \sqrt{h} z$. `sde.drift(x, t)` and the score take $t$
# of shape (B,); `sde.diffusion(t)` takes any shape; `sgu.score_at` asks the score at one time.
# Draw $z$ from the generator: `sgu.noise_like(x, generator)`.
#
# **Marked by** `check_reverse_step` (mean and variance of one step) and `check_sampler` (200 of
# your steps, on a mixture that is known).

# %% student 3.1
def reverse_step(score, sde, x, t, t_next, generator):
    """x: (B, ...) at time t -> (B, ...) at time t_next < t. t, t_next: 0-d float64 tensors."""
    raise NotImplementedError("question 3.1")

# %% solution 3.1
def reverse_step(score, sde, x, t, t_next, generator):
    """x: (B, ...) at time t -> (B, ...) at time t_next < t. t, t_next: 0-d float64 tensors."""
    h, g = float(t - t_next), float(sde.diffusion(t))
    drift = sde.drift(x, torch.full((len(x),), float(t)))
    z = sgu.noise_like(x, generator)
    return x - (drift - g ** 2 * sgu.score_at(score, x, t)) * h + g * math.sqrt(h) * z

# %% check 3.1 (3 points)
def sampler(score, sde, shape, generator):
    x, grid = sde.prior_sample(shape, generator), sgu.time_grid(sde, 200)
    for t, t_next in zip(grid, grid[1:]):
        x = reverse_step(score, sde, x, t, t_next, generator)
    return sgu.denoise(score, sde, x, grid[-1])

for sde in (SDES["VP"], SDES["VE"]):
    checks.check_reverse_step(reverse_step, sde)
checks.check_sampler(sampler, SDES["VP"], n=5000)

# %% look
# Your own sampler at work: 400 points at six times.
from style import KEEP, plt

with marking.picture():
    figure, axes = plt.subplots(1, 6, figsize=(11, 2.1))
    sde, grid, g = SDES["VP"], sgu.time_grid(SDES["VP"], 200), seeded(1)
    x = sde.prior_sample((400, 2), seeded(0))
    for i, (t, t_next) in enumerate(zip(grid, grid[1:])):
        if i % 40 == 0 or i == 199:
            ax = axes[-(-i // 40)]
            ax.scatter(*x.T, s=2, color=KEEP)
            ax.set_title(f"t = {float(t):.2f}", fontsize=8)
            ax.set(xlim=(-4, 4), ylim=(-4, 4), xticks=(), yticks=())
        x = reverse_step(TILTED.score(sde), sde, x, t, t_next, g)

# %% [markdown]
# ## Question 3.2 (2 points, 10 minutes)
#
# A *corrector* does not move in time. It stirs the points at time $t$ so that they follow $p_t$
# more closely (Langevin dynamics):
#
# $$x \leftarrow x + \varepsilon \cdot \mathrm{score}(x, t) + \sqrt{2 \varepsilon} z,
# \qquad \varepsilon = 2 (r s(t))^2 ,$$
#
# with a small number $r$ called `snr`.
#
# **Marked by** `check_langevin`: the variance after ten steps, against its recursion.

# %% student 3.2
def langevin_step(score, sde, x, t, snr, generator):
    """x: (B, ...), t: a 0-d tensor -> (B, ...)."""
    raise NotImplementedError("question 3.2")

# %% solution 3.2
def langevin_step(score, sde, x, t, snr, generator):
    """x: (B, ...), t: a 0-d tensor -> (B, ...)."""
    eps = 2 * (snr * float(sde.marginal(t)[1])) ** 2
    z = sgu.noise_like(x, generator)
    return x + eps * sgu.score_at(score, x, t) + math.sqrt(2 * eps) * z

# %% check 3.2 (2 points)
checks.check_langevin(langevin_step, SDES["VE"])
checks.check_langevin(langevin_step, SDES["VP"])

# %% [markdown]
# ## Question 3.3 (3 points, 10 minutes): find the bug
#
# The *probability flow* reaches the same distributions with no noise on the way. The sampler below
# takes Heun steps along it. Its samples are sharp, but far too much alike, and they sit near the
# middle of the data. One line is wrong. Fix the function, and give the number of the line.
#
# Hint: start from the reverse equation, and ask what the noise $g dw$ does to the density.
#
# **Marked by** `check_ode_map`: for Gaussian data the flow is a linear map, which is known exactly
# (2 points); and by your line number (1 point).

# %% student 3.3 bug: the score pulls too hard
def ode_sample(score, sde, shape, steps=100, generator=None):              # line 1
    def flow(x, t):                                                        # line 2
        g, tb = float(sde.diffusion(t)), torch.full((len(x),), float(t))   # line 3
        return sde.drift(x, tb) - g ** 2 * score(x, tb)                    # line 4
    x, grid = sde.prior_sample(shape, generator), sgu.time_grid(sde, steps)     # line 5
    for t, t_next in zip(grid, grid[1:]):                                  # line 6
        h, slope = float(t_next - t), flow(x, t)                           # line 7
        x = x + h / 2 * (slope + flow(x + h * slope, t_next))              # line 8
    return sgu.denoise(score, sde, x, grid[-1])                            # line 9

line_3_3 = 0

# %% solution 3.3
def ode_sample(score, sde, shape, steps=100, generator=None):              # line 1
    def flow(x, t):                                                        # line 2
        g, tb = float(sde.diffusion(t)), torch.full((len(x),), float(t))   # line 3
        return sde.drift(x, tb) - g ** 2 * score(x, tb) / 2                # line 4
    x, grid = sde.prior_sample(shape, generator), sgu.time_grid(sde, steps)     # line 5
    for t, t_next in zip(grid, grid[1:]):                                  # line 6
        h, slope = float(t_next - t), flow(x, t)                           # line 7
        x = x + h / 2 * (slope + flow(x + h * slope, t_next))              # line 8
    return sgu.denoise(score, sde, x, grid[-1])                            # line 9

line_3_3 = 4

# %% check 3.3 (3 points)
with marking.planted_bug(globals().get("line_3_3"), "3.3"):
    checks.check_ode_map(ode_sample, SDES["VP"], steps=100, tol=0.002)    # Euler is off by 0.005

# %% [markdown]
# ## Question 3.4 (2 points, 10 minutes): predict, then run
#
# Unlearning is going to *shrink* scores. So what happens to the samples if the exact score is
# multiplied by 1/2, at every $x$ and $t$, while the noise $g dw$ of Euler-Maruyama stays as it is?
# (The schedule is VE.)
#
# - **a** they crowd together: their spread becomes smaller
# - **b** nothing much: the sampler only takes longer to get to the same place
# - **c** they scatter: their spread becomes larger
#
# Write down the letter, and one sentence saying why. **Marked by** the run: the spread of 4,000
# samples with the score, and with half of it.

# %% student 3.4
choice_3_4 = ""                                # your prediction: a, b or c
why_3_4 = ""                                   # and why, in a sentence

# %% solution 3.4
choice_3_4 = "c"
why_3_4 = ("The noise of every step is as strong as before, but the pull back to the data is only "
           "half as strong.")

# %% check 3.4 (2 points)
said = marking.record("3.4", choice_3_4, why_3_4)

def spread(share):
    score = TILTED.score(SDES["VE"])
    x = sgu.euler_maruyama(lambda x, t: share * score(x, t), SDES["VE"], (4000, 2), steps=100,
                           generator=seeded(1))
    return float(x.std(0).mean())

full, half = spread(1), spread(1 / 2)
answer = "a" if half < 0.9 * full else "c" if half > 1.1 * full else "b"
marking.compare("3.4", said, answer, full=full, half=half)
