# %% [markdown]
# # Exercise 3: samplers
#
# Now the way back: from noise to data. Every sampler starts from $x_1 \sim$ prior and walks from $t = 1$ down to $t = 0$ with the score in its hand.
# This is section 4 of `sgu.py`. 4 questions, 10 points, about 45 minutes.

# %%
import math, sys
sys.path[:0] = ["../..", ".."]                     # sgu.py lies two folders up, style.py one
import torch
import sgu, checks
from checks import F64, SDES, TILTED, seeded

# %% [markdown]
# ## Question 3.1 (3 points, 15 minutes)
#
# The reverse of the noising process is (Eq. 4 of the paper)
#
# $$dx = \left[ f(x, t) - g(t)^2 \cdot \mathrm{score}(x, t) \right] dt + g(t) dw, \qquad dt \lt 0.$$
#
# Write one Euler-Maruyama step from $t$ down to $t_{next}$. With the positive length $h = t - t_{next}$ the noise of the step is
# $g \sqrt{h} z$. `sde.drift(x, t)` and the score take $t$ of shape (B,); `sde.diffusion(t)` takes any shape; `sgu.score_at` asks the score at one time.
# Draw $z$ from the generator: `sgu.noise_like(x, generator)`.
# **Marked by** `check_reverse_step` (mean and variance of one step) and `check_sampler` (your step 200 times, on a known mixture).

# %% student 3.1
def reverse_step(score, sde, x, t, t_next, generator):
    """x: (B, ...) at time t -> (B, ...) at time t_next < t. t, t_next: 0-d float64 tensors."""
    raise NotImplementedError("question 3.1")

# %% solution 3.1
def reverse_step(score, sde, x, t, t_next, generator):
    """x: (B, ...) at time t -> (B, ...) at time t_next < t. t, t_next: 0-d float64 tensors."""
    h, g, tb = float(t - t_next), float(sde.diffusion(t)), torch.full((len(x),), float(t))
    return x - (sde.drift(x, tb) - g ** 2 * sgu.score_at(score, x, t)) * h + g * math.sqrt(h) * sgu.noise_like(x, generator)

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
# Your own sampler, on the way: 400 points at six times.
from style import KEEP, plt
figure, axes = plt.subplots(1, 6, figsize=(11, 2.1))
x, grid, g = SDES["VP"].prior_sample((400, 2), seeded(0)), sgu.time_grid(SDES["VP"], 200), seeded(1)
for i, (t, t_next) in enumerate(zip(grid, grid[1:])):
    if i % 40 == 0 or i == 199:
        ax = axes[-(-i // 40)]
        ax.scatter(*x.T, s=2, color=KEEP), ax.set_title(f"t = {float(t):.2f}", fontsize=8), ax.set(xlim=(-4, 4), ylim=(-4, 4), xticks=(), yticks=())
    x = reverse_step(TILTED.score(SDES["VP"]), SDES["VP"], x, t, t_next, g)

# %% [markdown]
# ## Question 3.2 (2 points, 10 minutes)
#
# A *corrector* does not move in time. It stirs the points at time $t$ so that they follow $p_t$ better (Langevin dynamics):
#
# $$x \leftarrow x + \varepsilon \cdot \mathrm{score}(x, t) + \sqrt{2 \varepsilon} z, \qquad \varepsilon = 2 (r s(t))^2 ,$$
#
# with a small number $r$ called `snr`. **Marked by** `check_langevin`: the variance after ten steps against its recursion.

# %% student 3.2
def langevin_step(score, sde, x, t, snr, generator):
    """x: (B, ...), t: a 0-d tensor -> (B, ...)."""
    raise NotImplementedError("question 3.2")

# %% solution 3.2
def langevin_step(score, sde, x, t, snr, generator):
    """x: (B, ...), t: a 0-d tensor -> (B, ...)."""
    eps = 2 * (snr * float(sde.marginal(t)[1])) ** 2
    return x + eps * sgu.score_at(score, x, t) + math.sqrt(2 * eps) * sgu.noise_like(x, generator)

# %% check 3.2 (2 points)
checks.check_langevin(langevin_step, SDES["VE"])
checks.check_langevin(langevin_step, SDES["VP"])

# %% [markdown]
# ## Question 3.3 (3 points, 10 minutes): find the bug
#
# The *probability flow* reaches the same distributions without any noise on the way. The sampler below takes Heun steps along it. Its samples are sharp,
# far too much alike, and sit near the middle of the data. One line is wrong: give its number, and mend it.
# Hint: derive the flow from the reverse equation by asking what the noise $g dw$ does to the density.
# **Marked by** `check_ode_map`: for Gaussian data the flow is a linear map, known exactly; and by your line number.

# %% student 3.3 bug: the 1/2 of the probability flow
def ode_sample(score, sde, shape, steps=100, generator=None):                              # line 1
    def flow(x, t):                                                                        # line 2
        g, tb = float(sde.diffusion(t)), torch.full((len(x),), float(t), dtype=x.dtype)    # line 3
        return sde.drift(x, tb) - g ** 2 * score(x, tb)                                    # line 4
    x, grid = sde.prior_sample(shape, generator), sgu.time_grid(sde, steps)                # line 5
    for t, t_next in zip(grid, grid[1:]):                                                  # line 6
        h, slope = float(t_next - t), flow(x, t)                                           # line 7
        x = x + h / 2 * (slope + flow(x + h * slope, t_next))                              # line 8
    return sgu.denoise(score, sde, x, grid[-1])                                            # line 9

line_3_3 = 0

# %% solution 3.3
def ode_sample(score, sde, shape, steps=100, generator=None):                              # line 1
    def flow(x, t):                                                                        # line 2
        g, tb = float(sde.diffusion(t)), torch.full((len(x),), float(t), dtype=x.dtype)    # line 3
        return sde.drift(x, tb) - g ** 2 * score(x, tb) / 2                                # line 4
    x, grid = sde.prior_sample(shape, generator), sgu.time_grid(sde, steps)                # line 5
    for t, t_next in zip(grid, grid[1:]):                                                  # line 6
        h, slope = float(t_next - t), flow(x, t)                                           # line 7
        x = x + h / 2 * (slope + flow(x + h * slope, t_next))                              # line 8
    return sgu.denoise(score, sde, x, grid[-1])                                            # line 9

line_3_3 = 4

# %% check 3.3 (3 points)
with checks.planted_bug(line_3_3, "3.3"):
    checks.check_ode_map(ode_sample, SDES["VP"], steps=100, tol=0.002)    # Euler is off by 0.005

# %% [markdown]
# ## Question 3.4 (2 points, 10 minutes): predict, then run
#
# Unlearning will *shrink* scores. So: what happens to the samples if the exact score is multiplied by 1/2 at every $x$ and $t$, while the noise $g dw$ of
# Euler-Maruyama stays as it is? (Schedule: VE.)
#
# - **a** they crowd together, their spread becomes smaller
# - **b** nothing: the sampler takes twice as many steps to the same place, so to say
# - **c** they scatter, their spread becomes larger
#
# **Marked by** `check_prediction`: the spread of 4,000 samples with the score and with half of it. One sentence why is read by your teacher.

# %% student 3.4
raise NotImplementedError("question 3.4")          # delete this line and answer below
choice_3_4 = ""
why_3_4 = ""

# %% solution 3.4
choice_3_4 = "c"
why_3_4 = "The noise of every step stays as strong as before, but the pull back to the data is only half as strong."

# %% check 3.4 (2 points)
score = TILTED.score(SDES["VE"])
spread = [float(sgu.euler_maruyama(s, SDES["VE"], (4000, 2), steps=100, generator=seeded(1)).std(0).mean()) for s in (score, lambda x, t: score(x, t) / 2)]
checks.check_prediction(choice_3_4, "a" if spread[1] < 0.9 * spread[0] else "c" if spread[1] > 1.1 * spread[0] else "b", None,
                          f"the spread is {spread[0]:.2f} with the score and {spread[1]:.2f} with half of it")
