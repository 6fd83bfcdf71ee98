# %% [markdown]
# # Exercise 8: judging forgetting honestly
#
# "The model has forgotten the class" is a claim, and claims need evidence: how many samples, which
# judge, how sure, and at what price? Read section 9 of `sgu.py`, section 3 of `toy_gmm.py` and
# notebook 01 after you have tried, not before. 6 questions, 14 points, about 70 minutes. What a
# judge should do with an image that shows no digit at all is the subject of exercise 10.

# %%
import math
import sys

sys.path[:0] = ["../..", ".."]                 # sgu.py is two folders up, style.py one
import torch

import sgu
import checks
import marking
import toy_gmm
from checks import F64, seeded

# %% [markdown]
# ## Question 8.1 (1 point, 5 minutes): predict, then run
#
# You draw 20 samples, and a judge, a classifier, finds the forgotten class in none of them. How
# large might the true share, the *unlearning ratio*, still be? Guess the upper end of its 95%
# interval, as a fraction, and say in a sentence why.
#
# **Marked by** the formula: within 0.05.

# %% student 8.1
guess_8_1 = None                               # your prediction: a fraction
why_8_1 = ""                                   # and why, in a sentence

# %% solution 8.1
guess_8_1 = 0.16
why_8_1 = "A ratio of one in six leaves 20 samples without a hit in (5/6)^20 = 2.6% of all cases."

# %% check 8.1 (1 point)
said = marking.record("8.1", guess_8_1, why_8_1, number=True)
marking.compare("8.1", said, sgu.wilson(0, 20)[1], 0.05)

# %% [markdown]
# ## Question 8.2 (3 points, 15 minutes)
#
# The judge finds the forgotten class in $k$ of $n$ samples. The ratio $k/n$ on its own says nothing
# about chance: 0 of 20 proves little. Report an interval. Wilson's 95% interval holds
# every $p$ for which $k$ is no surprise, that is, $|k/n - p| \le z_0 \sqrt{p (1 - p) / n}$ with
# $z_0 = 1.959964$; solved for $p$,
#
# $$\frac{k + z_0^2 / 2}{n + z_0^2}
# \pm \frac{z_0}{n + z_0^2} \sqrt{\frac{k (n - k)}{n} + \frac{z_0^2}{4}} .$$
#
# **Marked by** `check_wilson`: the ends must only just satisfy the inequality, also at $k = 0$ and
# $k = n$.

# %% student 8.2
def wilson(k, n):
    """k of n -> [lo, hi], fractions in [0, 1]."""
    raise NotImplementedError("question 8.2")

# %% solution 8.2
def wilson(k, n):
    """k of n -> [lo, hi], fractions in [0, 1]."""
    z = 1.959964
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return [max(0.0, centre - half), min(1.0, centre + half)]

# %% check 8.2 (3 points)
checks.check_wilson(wilson)

# %% [markdown]
# ## Question 8.3 (3 points, 15 minutes): find the bug
#
# The report of this judge made headlines: a model that produces nothing but noise scores "100%
# kept". Indeed, noise is "not a 3". An honest report has three numbers: the share of samples that
# show a forgotten class (`ratio`, by the most probable class, as in the paper), the share of which
# the judge is unsure (`unsure`, no class reaches 0.5), and the share that surely shows a class to
# keep (`kept`). Fix the function, and give the number of the line that is wrong.
#
# **Marked by** `check_report`: clear digits, forgotten digits and noise, mixed (2 points); and by
# your line number (1 point).

# %% student 8.3 bug: your judge counts noise as kept
def report(probs, forget):                                                       # line 1
    """probs: (N, K), forget: a list of class numbers -> dict(ratio, unsure, kept)."""
    label, sure = probs.argmax(1), probs.amax(1) >= 0.5                          # line 3
    hit = torch.isin(label, torch.tensor(forget))                                # line 4
    share = lambda which: float(which.float().mean())                            # line 5
    kept = ~hit                                                                  # line 6
    return dict(ratio=share(hit), unsure=share(~sure), kept=share(kept))         # line 7

line_8_3 = 0

# %% solution 8.3
def report(probs, forget):                                                       # line 1
    """probs: (N, K), forget: a list of class numbers -> dict(ratio, unsure, kept)."""
    label, sure = probs.argmax(1), probs.amax(1) >= 0.5                          # line 3
    hit = torch.isin(label, torch.tensor(forget))                                # line 4
    share = lambda which: float(which.float().mean())                            # line 5
    kept = ~hit & sure                                                           # line 6
    return dict(ratio=share(hit), unsure=share(~sure), kept=share(kept))         # line 7

line_8_3 = 6

# %% check 8.3 (3 points)
with marking.planted_bug(globals().get("line_8_3"), "8.3"):
    checks.check_report(report)

# %% [markdown]
# ## Question 8.4 (2 points, 10 minutes): predict, then run
#
# A judge reads 98% of the real images of each of ten digits correctly; when it errs, all other
# digits are equally likely. A perfectly unlearned model draws eight digits flawlessly, and never a
# 3 or a 7. Which unlearning ratio (3 and 7 together) does the judge report? Write down a number
# between 0 and 1, and one sentence saying why.
#
# **Marked by** a table of verdicts in which every error occurs as often as it should: within
# 0.0003.

# %% student 8.4
guess_8_4 = None                               # your prediction: a fraction
why_8_4 = ""                                   # and why, in a sentence

# %% solution 8.4
guess_8_4 = 0.02 * 2 / 9
why_8_4 = ("It errs on 2%, and then names one of nine other digits, two of which are forgotten. "
           "This floor belongs beside every ratio.")

# %% check 8.4 (2 points)
said = marking.record("8.4", guess_8_4, why_8_4, number=True)
true, case = torch.tensor([0, 1, 2, 4, 5, 6, 8, 9])[:, None], torch.arange(4500)
misread = (true + 1 + case % 9) % 10           # 90 of the 4,500 images of each digit
verdict = torch.where(case < 90, misread, true)
floor = float(torch.isin(verdict, torch.tensor([3, 7])).float().mean())
marking.compare("8.4", said, floor, 0.0003)

# %% [markdown]
# ## Question 8.5 (3 points, 15 minutes)
#
# A model that forgets by ruining everything must be caught, too. Compare the features of the
# kept samples with those of real images of $D_g$: fit a Gaussian to each set (means $m$,
# covariances $C$), and take the squared Fréchet distance
#
# $$d^2 = |m_1 - m_2|^2 + \mathrm{tr}\thinspace C_1 + \mathrm{tr}\thinspace C_2 -
# 2 \thinspace \mathrm{tr} \left[ \left( C_1^{1/2} C_2 C_1^{1/2} \right)^{1/2} \right] .$$
#
# The root of a symmetric matrix comes from `torch.linalg.eigh`. Rounding can make its smallest
# eigenvalues negative: clamp them to 0. Use float64 and `torch.cov(f.T)`.
#
# **Marked by** `check_frechet`: clouds that are shifted, stretched and rotated, whose distances
# have closed forms.

# %% student 8.5
def frechet(f1, f2):
    """f1: (N, F), f2: (M, F) -> a number >= 0."""
    raise NotImplementedError("question 8.5")

# %% solution 8.5
def frechet(f1, f2):
    """f1: (N, F), f2: (M, F) -> a number >= 0."""
    def root(c):
        values, vectors = torch.linalg.eigh(c)
        return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    f1, f2 = f1.double(), f2.double()
    c1, c2 = torch.cov(f1.T), torch.cov(f2.T)
    cross = root(root(c1) @ c2 @ root(c1))
    between = (f1.mean(0) - f2.mean(0)).square().sum()
    return float(between + c1.trace() + c2.trace() - 2 * cross.trace())

# %% check 8.5 (3 points)
checks.check_frechet(frechet)

# %% [markdown]
# ## Question 8.6 (2 points, 10 minutes): predict, then run
#
# The toy example of the paper lives in two dimensions:
# $p_g = \frac{1}{2} N((-2, -2), I) + \frac{1}{2} N((2, 2), I)$ is kept, and $p_f = N(0, I)$ is to
# be forgotten. Table 1 of the paper reports for its unlearned model an NLL of 10.64 on $D_g$ and of
# 39.01 on $D_f$ (in bits per dimension + 8, so nats are $(\mathrm{value} - 8) \cdot 2 \log 2$).
# For *any* probability density $q$, and any $\mu$ with $p_g - \mu p_f \ge 0$, Gibbs' inequality
# gives, with the entropy $H$,
#
# $$E_g[-\log q] \ge \mu E_f[-\log q] +
# (1 - \mu) H\left( \frac{p_g - \mu p_f}{1 - \mu} \right).$$
#
# Can a density have the paper's pair of values?
#
# - **a** yes, with room to spare
# - **b** only just: it lies on the limit
# - **c** no: a density with that value on $D_f$ must do worse on $D_g$
#
# **Marked by** the limit, found by numerical integration.

# %% student 8.6
choice_8_6 = ""                                # your prediction: a, b or c
why_8_6 = ""                                   # and why, in a sentence or two

# %% solution 8.6
choice_8_6 = "c"
why_8_6 = ("An unlearned score need not be the gradient of any log-density, and numerical "
           "likelihoods along its flow need not integrate to one.")

# %% check 8.6 (2 points)
said = marking.record("8.6", choice_8_6, why_8_6)
limit = toy_gmm.paper_unit(toy_gmm.limit(toy_gmm.from_paper_unit(39.01)))
answer = "c" if limit > 10.69 else "b" if limit > 10.59 else "a"
marking.compare("8.6", said, answer, limit=limit)

# %% look
# Your report, with intervals, on three models as one judge sees them.
g = seeded(3)

def verdicts(classes, sharpness):
    logits = sharpness * torch.nn.functional.one_hot(classes, 10)
    return (logits + torch.randn(len(classes), 10, generator=g)).softmax(1)

kept = torch.tensor([0, 1, 2, 4, 5, 6, 8, 9])
with marking.picture():
    for name, probs in (
            ("forgot 3 and 7", verdicts(kept[torch.randint(8, (1000,), generator=g)], 8.)),
            ("as before", verdicts(torch.randint(10, (1000,), generator=g), 8.)),
            ("only noise", verdicts(torch.randint(10, (1000,), generator=g), 0.))):
        shares = report(probs, [3, 7])
        interval = wilson(round(1000 * shares["ratio"]), 1000)
        print(f"{name:<16}", {key: round(share, 3) for key, share in shares.items()},
              "ratio between", " and ".join(f"{end:.3f}" for end in interval))
