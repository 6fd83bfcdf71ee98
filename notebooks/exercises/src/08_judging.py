# %% [markdown]
# # Exercise 8: judging forgetting honestly
#
# "The model forgot the class" is a claim, and claims want evidence: how many samples, which judge, how sure, and at what price. Read section 9 of `sgu.py`
# and section 3 of `toy_gmm.py` after you have tried, not before. 6 questions, 14 points, about 70 minutes.

# %%
import math, sys
sys.path[:0] = ["../..", ".."]                     # sgu.py lies two folders up, style.py one
import torch
import sgu, checks, toy_gmm
from checks import F64, seeded

# %% [markdown]
# ## Question 8.1 (3 points, 15 minutes)
#
# A judge finds the forgotten class in $k$ of $n$ samples. The *unlearning ratio* $k/n$ alone says nothing about chance: 0 of 20 is no proof. Report an interval. Wilson's 95% interval
# holds every $p$ for which $k$ is not surprising, that is, $|k/n - p| \le z_0 \sqrt{p (1 - p) / n}$ with $z_0 = 1.959964$; solved for $p$,
#
# $$\frac{k + z_0^2 / 2}{n + z_0^2} \pm \frac{z_0}{n + z_0^2} \sqrt{\frac{k (n - k)}{n} + \frac{z_0^2}{4}} .$$
#
# **Marked by** `check_wilson`: the ends must just satisfy the inequality, also at $k = 0$ and $k = n$.

# %% student 8.1
def wilson(k, n):
    """k of n -> [lo, hi], fractions in [0, 1]."""
    raise NotImplementedError("question 8.1")

# %% solution 8.1
def wilson(k, n):
    """k of n -> [lo, hi], fractions in [0, 1]."""
    z = 1.959964
    centre, spread = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return [max(0.0, centre - spread), min(1.0, centre + spread)]

# %% check 8.1 (3 points)
checks.check_wilson(wilson)

# %% [markdown]
# ## Question 8.2 (1 point, 5 minutes): predict, then run
#
# You draw 20 samples and the judge finds no forgotten class among them. Up to which ratio must you still reckon? Guess the upper end of the 95% interval.
# **Marked by** `check_prediction`: within 0.05.

# %% student 8.2
raise NotImplementedError("question 8.2")          # delete this line and write your guess below
guess_8_2 = 0.0

# %% solution 8.2
guess_8_2 = 0.16

# %% check 8.2 (1 point)
checks.check_prediction(guess_8_2, sgu.wilson(0, 20)[1], 0.05, "to be sure of less than 1% you need some 400 samples without a single hit")

# %% [markdown]
# ## Question 8.3 (3 points, 15 minutes): find the bug
#
# This judge's report made headlines: a model that produces nothing but noise scores "100% kept". Noise images are also "not a 3". An honest report has three numbers: the share of samples
# of a forgotten class (`ratio`, by the most probable class, as in the paper), the share that the judge is unsure of (`unsure`, no class reaches 0.5), and the share that is surely a kept class (`kept`).
# Give the number of the wrong line, and mend it.
# **Marked by** `check_report`: clear digits, forgotten digits and noise, mixed; and by your line number.

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
with checks.planted_bug(line_8_3, "8.3"):
    checks.check_report(report)

# %% [markdown]
# ## Question 8.4 (2 points, 10 minutes): predict, then run
#
# A judge is right on 98% of the real images of each of ten digits; when it errs, all other digits are equally likely. A perfectly unlearned model draws eight digits flawlessly and never a 3 or a 7.
# Which unlearning ratio (3 and 7 together) does the judge report? Write a number. **Marked by** `check_prediction`: within 0.0003, against a table of verdicts in which every error occurs as often as it should.

# %% student 8.4
raise NotImplementedError("question 8.4")          # delete this line and write your guess below
guess_8_4 = 0.0
why_8_4 = ""

# %% solution 8.4
guess_8_4 = 0.02 * 2 / 9
why_8_4 = "It errs on 2% and names one of nine other digits, two of which are forgotten. This floor belongs beside every ratio."

# %% check 8.4 (2 points)
true, case = torch.tensor([0, 1, 2, 4, 5, 6, 8, 9])[:, None], torch.arange(4500)       # 90 of 4,500 images of each digit are misread
verdict = torch.where(case < 90, (true + 1 + case % 9) % 10, true)
floor = float(torch.isin(verdict, torch.tensor([3, 7])).float().mean())
checks.check_prediction(guess_8_4, floor, 0.0003, "the judge's own errors are a floor: no model can be reported below it, except by drawing easier digits")

# %% [markdown]
# ## Question 8.5 (3 points, 15 minutes)
#
# Forgetting by ruining everything must show, too. Compare the features of kept samples with those of real images of $D_g$: fit a Gaussian to each set (means $m$, covariances $C$) and take the squared
# Fréchet distance
#
# $$d^2 = |m_1 - m_2|^2 + \mathrm{tr}\thinspace C_1 + \mathrm{tr}\thinspace C_2 - 2 \thinspace \mathrm{tr} \left[ \left( C_1^{1/2} C_2 C_1^{1/2} \right)^{1/2} \right] .$$
#
# The root of a symmetric matrix comes from `torch.linalg.eigh`; rounding can make its smallest eigenvalues negative: clamp them to 0. Use float64 and `torch.cov(f.T)`.
# **Marked by** `check_frechet`: shifted, stretched and rotated clouds, whose distances have closed forms.

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
    return float((f1.mean(0) - f2.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * cross.trace())

# %% check 8.5 (3 points)
checks.check_frechet(frechet)

# %% [markdown]
# ## Question 8.6 (2 points, 10 minutes): predict, then run
#
# The toy example of the paper, in two dimensions: $p_g = \frac{1}{2} N((-2, -2), I) + \frac{1}{2} N((2, 2), I)$ is kept and $p_f = N(0, I)$ is to be forgotten. Its Table 1 reports, for the unlearned model, an NLL of 10.64 on $D_g$ and of 39.01 on $D_f$
# (bits per dimension + 8; so nats are $(\mathrm{value} - 8) \cdot 2 \log 2$). For *any* probability density $q$ and any $\mu$ with $p_g - \mu p_f \ge 0$, Gibbs' inequality gives, with the entropy $H$,
#
# $$E_g[-\log q] \ge \mu E_f[-\log q] + (1 - \mu) H\left( \frac{p_g - \mu p_f}{1 - \mu} \right).$$
#
# So whoever makes $D_f$ unlikely must pay on $D_g$. Is the paper's pair possible for a density?
#
# - **a** yes, there is room to spare
# - **b** just so: it lies on the limit
# - **c** no: a density with that value on $D_f$ must do worse on $D_g$
#
# **Marked by** `check_prediction`: the limit, by numerical integration. How can a paper print it, then? Write your idea down.

# %% student 8.6
raise NotImplementedError("question 8.6")          # delete this line and answer below
choice_8_6 = ""
why_8_6 = ""

# %% solution 8.6
choice_8_6 = "c"
why_8_6 = "An unlearned score need not be the gradient of any log-density, and numerical likelihoods along its flow need not integrate to one."

# %% check 8.6 (2 points)
limit = toy_gmm.paper_unit(toy_gmm.limit(toy_gmm.from_paper_unit(39.01)))
checks.check_prediction(choice_8_6, "c" if limit > 10.69 else "b" if limit > 10.59 else "a", None, f"the least NLL of D_g that a density can have is {limit:.2f}, not 10.64")

# %% look
# One judge's reports on three models: one that forgot, one that did nothing, one that draws only noise.
g = seeded(3)
def verdicts(classes, sharpness):
    return (sharpness * torch.nn.functional.one_hot(classes, 10) + torch.randn(len(classes), 10, generator=g)).softmax(1)
kept = torch.tensor([0, 1, 2, 4, 5, 6, 8, 9])
for name, probs in (("forgot 3 and 7", verdicts(kept[torch.randint(8, (1000,), generator=g)], 8.)), ("as before", verdicts(torch.randint(10, (1000,), generator=g), 8.)),
                    ("noise", verdicts(torch.randint(10, (1000,), generator=g), 0.))):
    print(f"{name:<16}", {k: round(v, 3) for k, v in report(probs, [3, 7]).items()}, "interval", [round(v, 3) for v in wilson(round(1000 * report(probs, [3, 7])["ratio"]), 1000)])
