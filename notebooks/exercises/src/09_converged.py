# %% [markdown]
# # Exercise 9: is this integral converged?
#
# The likelihood of exercise 4 is an integral along a flow, and a computer takes it in steps. How
# many are enough? A table of results looks just as tidy if they are too few. Here you learn to
# tell.
#
# This exercise goes with section 5 of `sgu.py`; read `flow_error` there after you have tried
# question 9.3, not before. 5 questions, 13 points, about 60 minutes.

# %%
import functools
import math
import os
import sys

sys.path[:0] = ["../..", ".."]                 # sgu.py is two folders up, style.py one
import torch

import sgu
import checks
import marking
from checks import F64, SDES, seeded

quick = os.environ.get("SGU_QUICK", "0") != "0"     # tiny sizes, to see that everything runs

# %% [markdown]
# ## Question 9.1 (3 points, 15 minutes): a case with a known answer
#
# Nothing tests a numerical method like a case that can be solved by hand. Take the schedule VE with
# $\sigma$ from 0.01 to 20 (so $a = 1$ and $s = \sigma$), and data $N(0, v I)$ with $v = 1/4$. In
# $l = \log \sigma$ the probability flow is $dx/dl = r(l) x$ with the rate
# $r(l) = \sigma^2 / (\sigma^2 + v)$. Now let somebody turn the score round in a narrow window of
# noise levels around $\sigma = 1$, with strength $k$:
#
# $$\frac{dx}{dl} = r(l) x, \qquad \frac{d \log p}{dl} = -D r(l), \qquad
# r(l) = \frac{\sigma^2}{\sigma^2 + v} - \frac{k}{\cosh^2(l / w)}, \qquad w = 0.3.$$
#
# If $Q$ is the integral of $r$ from $l_0 = \log 0.01$ to $l_1 = \log 20$, a point $x$ ends at
# $e^Q x$, and with the prior $\pi = N(0, 20^2 I)$
#
# $$\log p(x) = \log \pi(e^Q x) + D Q.$$
#
# Work out $Q$ on paper (the derivative of $\tanh$ is $1/\cosh^2$), and write this log-likelihood.
# `SDES["VE"].prior_log_prob(x)` is $\log \pi$.
#
# **Marked by** `check_turned_log_p`: against the trapezium rule with 100,000 steps, for three
# strengths, in two and three dimensions.

# %% student 9.1
def exact_log_p(x, strength):
    """x: (B, D), strength: k, a number -> log p(x) in nats: (B,)."""
    raise NotImplementedError("question 9.1")

# %% solution 9.1
def exact_log_p(x, strength):
    """x: (B, D), strength: k, a number -> log p(x) in nats: (B,)."""
    v, w, lo, hi = 0.25, 0.3, math.log(0.01), math.log(20)
    plain = 0.5 * math.log((20 ** 2 + v) / (0.01 ** 2 + v))
    Q = plain - strength * w * (math.tanh(hi / w) - math.tanh(lo / w))
    return SDES["VE"].prior_log_prob(math.exp(Q) * x) + x.shape[1] * Q

# %% check 9.1 (3 points)
checks.check_turned_log_p(exact_log_p)

# %% [markdown]
# ## Question 9.2 (2 points, 5 minutes): predict, then run
#
# `sgu.log_likelihood` takes the integral by Runge-Kutta steps of order four. For the plain Gaussian
# ($k = 0$), 16 steps bring $\log p$ to within 0.0001 nats. Now take the same 16 steps for the
# turned score with $k = 20$, whose $-\log p$ is about 24 nats in two dimensions. How large is the
# error?
#
# - **a** about as small as before: the method and its steps are the same
# - **b** larger, but less than 1 nat
# - **c** more than 5 nats
#
# Write down the letter, and one sentence saying why. **Marked by** the run, against the exact
# value.

# %% student 9.2
choice_9_2 = ""                                # your prediction: a, b or c
why_9_2 = ""                                   # and why, in a sentence

# %% solution 9.2
choice_9_2 = "c"
why_9_2 = ("A step covers half a unit of l, in which the rate of -20 would shrink x by a factor of "
           "e^10; four evaluations a step cannot follow that.")

# %%
points = 0.5 * torch.randn(64, 2, generator=seeded(0), dtype=F64)

def by_steps(strength, steps):
    """log p of the points, (64,), by Runge-Kutta steps."""
    return sgu.log_likelihood(checks.turned_score(strength), SDES["VE"], points, steps, exact=True)

# %% check 9.2 (2 points)
said = marking.record("9.2", choice_9_2, why_9_2)
# 128 steps stand for the exact value, so that this does not need question 9.1
plain, turned = (float((by_steps(k, 16) - by_steps(k, 128)).abs().mean()) for k in (0., 20.))
answer = "a" if turned < 10 * plain else "c" if turned > 5 else "b"
marking.compare("9.2", said, answer, plain=plain, turned=turned)

# %% [markdown]
# ## Question 9.3 (2 points, 10 minutes): an error bar without the answer
#
# For a network nobody knows the exact value. But one can take the integral twice, with steps of
# length $h$ and of length $2h$. As long as the steps are short, a method of order $n$ has an error
# of $C h^n$, with a constant $C$ that nobody knows but that is the same both times. Two values, two
# unknowns: how large is the error of the *finer* value?
#
# **Marked by** `check_error_estimate`: on values whose error is exactly $C h^n$, for $n = 4$ and
# $n = 2$.

# %% student 9.3
def estimated_error(fine, coarse, order=4):
    """fine, coarse: (B,), by steps h and 2 h -> the size of the error of fine: (B,)."""
    raise NotImplementedError("question 9.3")

# %% solution 9.3
def estimated_error(fine, coarse, order=4):
    """fine, coarse: (B,), by steps h and 2 h -> the size of the error of fine: (B,)."""
    return (fine - coarse).abs() / (2 ** order - 1)

# %% check 9.3 (2 points)
checks.check_error_estimate(estimated_error)

# %% look
# Estimated and true error at k = 20. Where do the steps become short enough to trust the estimate?
with marking.picture():
    for steps in (32, 64, 128):
        fine, coarse = by_steps(20., steps), by_steps(20., steps // 2)
        estimate = float(estimated_error(fine, coarse).mean())
        true = float((fine - exact_log_p(points, 20.)).abs().mean())
        print(f"{steps:4d} steps: estimated {estimate:.2g} nats, true {true:.2g}")

# %% [markdown]
# Since the estimate assumes short steps, it can be wrong where they are long, in either direction.
# `sgu.flow_error` is more careful: it divides by 8.
#
# ## Question 9.4 (4 points, 20 minutes): refine until it is good enough
#
# Write the loop that doubles the number of steps until the error is small enough.
# `values_at(steps)` computes the values of a batch, (B,), and is expensive: never ask twice for the
# same number of steps. Start with `first` steps and twice as many; the error is the mean of your
# `estimated_error` over the batch. Stop when it is at most `tolerance`, or when doubling once more
# would take more than `most` steps; in that case say honestly that the values have not converged.
# Beware of values that are not numbers: comparing anything with NaN gives False.
#
# **Marked by** `check_refine`: values whose errors are known, values that never settle, and NaN.

# %% student 9.4
def refine(values_at, tolerance, first=16, most=512):
    """-> dict(values=(B,) of the finest grid, steps=of it, error=a number, converged=bool)."""
    raise NotImplementedError("question 9.4")

# %% solution 9.4
def refine(values_at, tolerance, first=16, most=512):
    """-> dict(values=(B,) of the finest grid, steps=of it, error=a number, converged=bool)."""
    steps, fine, converged = first, values_at(first), False
    while not converged and 2 * steps <= most:
        steps, coarse = 2 * steps, fine
        fine = values_at(steps)
        error = float(estimated_error(fine, coarse).mean())
        converged = error <= tolerance
    return dict(values=fine, steps=steps, error=error, converged=converged)

# %% check 9.4 (4 points)
checks.check_refine(refine)

# %% [markdown]
# ## Question 9.5 (2 points, 10 minutes): predict, then run
#
# Now the real thing: the networks that come with this repository, and eight test images of 3 and 7.
# The paper's measure is bits per dimension, and `sgu.bits_per_dim` computes it. With 16 steps,
# SGU-Obtuse needs several times as many bits for most of these images as Standard does, and a
# careful author would print a standard error over images beside the mean. What becomes of that mean
# when the steps are refined?
#
# - **a** it stays within its standard error, which is there to say how far off it may be
# - **b** it falls by more than that: coarse steps exaggerate
# - **c** it rises by more than that: coarse steps miss a large part of it
#
# Write down the letter, and one sentence saying why. **Marked by** the run: 16 steps against 64
# (this takes about a quarter of a minute).

# %% student 9.5
choice_9_5 = ""                                # your prediction: a, b or c
why_9_5 = ""                                   # and why, in a sentence

# %% solution 9.5
choice_9_5 = "c"
why_9_5 = ("The standard error over images knows nothing of the grid, which is the same for all of "
           "them; and Obtuse bends the score sharply just where its forget loss acted.")

# %%
data = sgu.choose(sgu.load_data("../results/mnist_digits.npz"), "3,7")
digits = sgu.from_levels(data["test"][sgu.is_forgotten(data, "test")][:3 if quick else 8])

@functools.lru_cache
def bits(method, steps):
    """Bits/dim of the digits, (8,), under a network that comes with this repository."""
    model, sde = sgu.load_model(f"../results/mnist_{method}.pt")
    score = sgu.make_score(model, sde)
    return sgu.bits_per_dim(score, sde, digits, steps, generator=seeded(0))

# %% check 9.5 (2 points)
said = marking.record("9.5", choice_9_5, why_9_5)
coarse, fine = bits("obtuse", 16), bits("obtuse", 64)
error = float(coarse.std()) / math.sqrt(len(coarse))
coarse, fine = float(coarse.mean()), float(fine.mean())
answer = "c" if fine > coarse + error else "b" if fine < coarse - error else "a"
marking.compare("9.5", said, answer, coarse=coarse, error=error, fine=fine)

# %% look
# Your refine on Standard and on Obtuse: which of the two numbers would you print in a table?
from style import COLOUR, MARKER, TITLE, plt

with marking.picture():
    figure, ax = plt.subplots(figsize=(6, 3))
    for method, most in (("standard", 32), ("obtuse", 64 if quick else 256)):
        found = refine(functools.partial(bits, method), 0.1, most=most)
        steps = [16 * 2 ** i for i in range(10) if 16 * 2 ** i <= found["steps"]]
        ax.plot(steps, [float(bits(method, n).mean()) for n in steps], MARKER[method] + "-",
                color=COLOUR[method], label=TITLE[method])
        print(f"{TITLE[method]}: {float(found['values'].mean()):.2f} bits/dim at {found['steps']} "
              f"steps, error {found['error']:.2g}, converged: {found['converged']}")
    ax.set(xscale="log", xlabel="Runge-Kutta steps", ylabel="bits/dim of forgotten digits")
    ax.set_xticks(steps, labels=steps)
    ax.minorticks_off()
    ax.legend(frameon=False)

# %% [markdown]
# Look at the values one by one, too: `bits("obtuse", 128)`. One of the eight digits costs no more
# than under Standard. Which digit is it, and what does that say about the mean?
