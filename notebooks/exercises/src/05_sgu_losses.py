# %% [markdown]
# # Exercise 5: the two SGU losses
#
# A model has learned from $D_g$ (to keep) and $D_f$ (to forget) together. Score-based Generative
# Unlearning continues training it on a weighted sum of two losses (Eq. 11): the keep loss on $D_g$,
# and a *forget loss* on $D_f$. On an image to forget, noised by $z$, the score should no longer
# point to the image: $u = -z/s$ is the direction to it, and
# $\mathrm{score} \cdot u = e \cdot z / s^2$ says how far the score agrees.
#
# Read section 3 of `sgu.py` after you have tried, not before. 6 questions, 14 points, about
# 65 minutes.

# %%
import math
import sys

sys.path[:0] = ["../..", ".."]                 # sgu.py is two folders up, style.py one
import torch

import sgu
import checks
import marking
import toy_gmm
from checks import F64, SDES

# %% [markdown]
# ## Question 5.1 (2 points, 10 minutes)
#
# Begin with what the two losses have in common: how far each image's predicted noise agrees with
# its true noise, per pixel,
#
# $$c_b = \frac{e_b \cdot z_b}{D} = \frac{1}{D} \sum_{i} e_{bi} z_{bi}.$$
#
# As in exercise 2, $e = -s \cdot \mathrm{score}(a x_0 + s z, t)$ with $a, s$ from
# `sde.marginal(t)`; images have any shape (B, ...), to which `sgu.per_sample` fits a number each.
#
# **Marked by** `check_agreement`: against plain loops, on images of 2x2x2.

# %% student 5.1
def agreement(score, sde, x0, t, z):
    """x0: (B, ...), t: (B,), z: (B, ...) -> e.z / D of every image: (B,)."""
    raise NotImplementedError("question 5.1")

# %% solution 5.1
def agreement(score, sde, x0, t, z):
    """x0: (B, ...), t: (B,), z: (B, ...) -> e.z / D of every image: (B,)."""
    a, s = (sgu.per_sample(v, x0) for v in sde.marginal(t))
    e = -s * score(a * x0 + s * z, t)
    return (e * z).flatten(1).mean(1)

# %% check 5.1 (2 points)
checks.check_agreement(agreement, SDES["VE"])
checks.check_agreement(agreement, SDES["VP"])

# %% [markdown]
# ## Question 5.2 (3 points, 10 minutes): find the bug
#
# SGU-Obtuse (Eq. 10) wants the angle between the score and $u = -z/s$ to be larger than 90 degrees.
# A classmate wrote the function below, in terms of scores rather than noises, and wonders why the
# model now draws *more* of the forgotten class. Fix the function, and give the number of the line
# that is wrong.
#
# $$L_{\mathrm{obtuse}} = \frac{1}{B} \sum_b s_b^2 \frac{\mathrm{score}_b \cdot u_b}{D}$$
#
# **Marked by** `check_obtuse_sign` (values) and `check_obtuse_turns` (one step of gradient descent
# must widen the angle), 2 points; and by your line number (1 point).

# %% student 5.2 bug: your sign is flipped: the score turns toward the forgotten data
def obtuse_loss(score, sde, x0, t, z):                               # line 1
    a, s = (sgu.per_sample(v, x0) for v in sde.marginal(t))          # line 2
    x_t = a * x0 + s * z                                             # line 3
    u = (x_t - a * x0) / s ** 2                                      # line 4
    product = s ** 2 * score(x_t, t) * u                             # line 5
    return product.flatten(1).mean(1).mean()                         # line 6

line_5_2 = 0

# %% solution 5.2
def obtuse_loss(score, sde, x0, t, z):                               # line 1
    a, s = (sgu.per_sample(v, x0) for v in sde.marginal(t))          # line 2
    x_t = a * x0 + s * z                                             # line 3
    u = -(x_t - a * x0) / s ** 2                                     # line 4
    product = s ** 2 * score(x_t, t) * u                             # line 5
    return product.flatten(1).mean(1).mean()                         # line 6

line_5_2 = 4

# %% check 5.2 (3 points)
with marking.planted_bug(globals().get("line_5_2"), "5.2"):
    for sde in (SDES["VE"], SDES["VP"]):
        checks.check_obtuse_sign(obtuse_loss, sde)
        checks.check_obtuse_turns(obtuse_loss, sde)

# %% [markdown]
# ## Question 5.3 (3 points, 15 minutes): find the bug
#
# SGU-Orthogonal (Eq. 9) wants the score to be perpendicular to $u$: it squares an *inner product*.
# The code below makes an easy slip. It trains, the loss falls, the class disappears; but a score
# that is already perpendicular to $u$ still pays, and every pixel of it is pushed to zero on its
# own. Fix the function, and give the number of the line that is wrong.
#
# $$L_{\mathrm{orthogonal}} =
# \frac{1}{B} \sum_b \left( \frac{s_b^2 \cdot \mathrm{score}_b \cdot u_b}{D} \right)^2 =
# \frac{1}{B} \sum_b \left( \frac{e_b \cdot z_b}{D} \right)^2$$
#
# **Marked by** `check_orthogonal`: a perpendicular score must cost nothing (2 points); and by your
# line number (1 point).

# %% student 5.3 bug: you squared element by element, not the inner product
def orthogonal_loss(score, sde, x0, t, z):                           # line 1
    a, s = (sgu.per_sample(v, x0) for v in sde.marginal(t))          # line 2
    u = -z / s                                                       # line 3
    value = score(a * x0 + s * z, t)                                 # line 4
    product = s ** 2 * value * u                                     # line 5
    return product.square().flatten(1).mean(1).mean()                # line 6

line_5_3 = 0

# %% solution 5.3
def orthogonal_loss(score, sde, x0, t, z):                           # line 1
    a, s = (sgu.per_sample(v, x0) for v in sde.marginal(t))          # line 2
    u = -z / s                                                       # line 3
    value = score(a * x0 + s * z, t)                                 # line 4
    product = s ** 2 * value * u                                     # line 5
    return product.flatten(1).mean(1).square().mean()                # line 6

line_5_3 = 6

# %% check 5.3 (3 points)
with marking.planted_bug(globals().get("line_5_3"), "5.3"):
    checks.check_orthogonal(orthogonal_loss, SDES["VE"])
    checks.check_orthogonal(orthogonal_loss, SDES["VP"])

# %% [markdown]
# ## Question 5.4 (2 points, 10 minutes)
#
# Put the two together (Eq. 11). Call `sgu.score_matching_loss(score, sde, x_g, generator=...)` and
# `forget_loss(score, sde, x_f, generator=...)`; each draws its own $t$ and $z$.
#
# $$L = \alpha L_{\mathrm{keep}}(D_g) + (1 - \alpha) L_{\mathrm{forget}}(D_f)$$
#
# **Marked by** `check_sgu_loss`: at $\alpha = 0, 0.3, 1$, with a forget loss that records its
# arguments.

# %% student 5.4
def sgu_loss(score, sde, x_g, x_f, alpha, forget_loss=sgu.orthogonal_loss, generator=None):
    """x_g: (B, ...) from D_g, x_f: (B', ...) from D_f -> one number."""
    raise NotImplementedError("question 5.4")

# %% solution 5.4
def sgu_loss(score, sde, x_g, x_f, alpha, forget_loss=sgu.orthogonal_loss, generator=None):
    """x_g: (B, ...) from D_g, x_f: (B', ...) from D_f -> one number."""
    keep = sgu.score_matching_loss(score, sde, x_g, generator=generator)
    return alpha * keep + (1 - alpha) * forget_loss(score, sde, x_f, generator=generator)

# %% check 5.4 (2 points)
checks.check_sgu_loss(sgu_loss)

# %%
def change(method, alpha):
    """Length of the minimiser over that of e_g, and the cosine between the two, near the middle."""
    x = torch.tensor([[0.3, 0.2], [-0.2, 0.4], [0.5, -0.1]], dtype=F64)
    t = torch.full((3,), 0.6, dtype=F64)
    e, e_g = (score(x, t) for score in (toy_gmm.exact_unlearned_score(method, alpha),
                                        toy_gmm.exact_score(toy_gmm.KEEP)))
    length = float((e.norm(dim=1) / e_g.norm(dim=1)).mean())
    return length, float(torch.cosine_similarity(e, e_g).mean())

# %% [markdown]
# ## Question 5.5 (2 points, 10 minutes): predict, then run
#
# The sum is quadratic in $e$ at every point, so its minimiser can be computed exactly
# (`toy_gmm.exact_unlearned_score`). Take a mixture of three Gaussians whose middle one is to be
# forgotten, and a point $x$ near that middle, where forgotten data are far denser than kept ones.
# What does the exact minimiser of SGU-**Orthogonal** do there as $\alpha \to 0$?
#
# - **a** it turns by 90 degrees and keeps its length
# - **b** it shrinks to zero
# - **c** it turns round and points away from the middle
#
# **Marked by** the run: length and direction of $e$ at $\alpha = 0.001$, against the $e$ of the
# kept data alone.

# %% student 5.5
choice_5_5 = ""                                # your prediction: a, b or c
why_5_5 = ""                                   # and why, in a sentence

# %% solution 5.5
choice_5_5 = "b"
why_5_5 = ("At one x_t the forgotten noise comes from many directions, and only e = 0 is "
           "perpendicular to all of them.")

# %% check 5.5 (2 points)
said = marking.record("5.5", choice_5_5, why_5_5)
length, cosine = change("orthogonal", 0.001)
answer = "b" if length < 0.1 else "c" if cosine < -0.5 else "a"
marking.compare("5.5", said, answer, length=length, cosine=cosine)

# %% [markdown]
# ## Question 5.6 (2 points, 10 minutes): predict, then run
#
# Now SGU-**Obtuse** in the same place. What happens to the *length* of its minimiser as $\alpha$
# goes from 0.1 to 0.001?
#
# - **a** it goes to zero
# - **b** it stays about the same
# - **c** it grows about a hundredfold, without limit
#
# **Marked by** the run: the ratio of the two lengths.

# %% student 5.6
choice_5_6 = ""                                # your prediction: a, b or c
why_5_6 = ""                                   # and why, in a sentence

# %% solution 5.6
choice_5_6 = "c"
why_5_6 = ("The obtuse loss is linear and has no lower bound; only the keep loss holds it, and "
           "that is weighted by alpha and hardly ever seen where p_g is small.")

# %% check 5.6 (2 points)
said = marking.record("5.6", choice_5_6, why_5_6)
growth = change("obtuse", 0.001)[0] / change("obtuse", 0.1)[0]
answer = "a" if growth < 0.1 else "b" if growth < 10 else "c"
marking.compare("5.6", said, answer, growth=growth)

# %% look
# The exact minimisers along the diagonal through all three Gaussians.
from style import plt

r = torch.linspace(-4, 4, 201, dtype=F64)
x, t = r[:, None].expand(-1, 2) / math.sqrt(2), torch.full((201,), 0.6, dtype=F64)
figure, ax = plt.subplots(figsize=(7, 3.4))
for name, score, style in (
        ("kept data alone", toy_gmm.exact_score(toy_gmm.KEEP), "k-"),
        ("orthogonal, alpha 0.5", toy_gmm.exact_unlearned_score("orthogonal", 0.5), "--"),
        ("obtuse, alpha 0.8", toy_gmm.exact_unlearned_score("obtuse", 0.8), ":")):
    ax.plot(r, score(x, t).sum(1) / math.sqrt(2), style, lw=2, label=name)
ax.axhline(0, color="0.7", lw=0.7)
ax.set(xlabel="place on the diagonal; the forgotten Gaussian is at 0",
       ylabel="score along the diagonal")
ax.legend(frameon=False);
