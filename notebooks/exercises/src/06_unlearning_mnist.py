# %% [markdown]
# # Exercise 6: unlearning a class of digits
#
# Now for the real thing: a network that draws all ten digits is to forget 3 and 7. It starts from
# the small MNIST model that comes with this repository (`notebooks/results/mnist_standard.pt`). If
# you have MNIST, that is used, otherwise the 2,000 digits supplied with the model. If these
# files are missing, a tiny model of digits drawn from fonts is trained instead, which takes about a
# minute.
#
# This exercise goes with section 7 of `sgu.py`. 4 questions, 11 points, about 65 minutes.

# %%
import copy
import math
import os
import pathlib
import sys

sys.path[:0] = ["../..", ".."]                 # sgu.py is two folders up, style.py one
import torch

import sgu
import checks
import marking
from checks import seeded

quick = os.environ.get("SGU_QUICK", "0") != "0"     # tiny sizes, to see that everything runs

def get_standard():
    """-> the Standard network (averaged weights), its schedule, the data set."""
    results, root = pathlib.Path("../results"), pathlib.Path("../../data")
    if (results / "mnist_standard.pt").exists() and not quick:
        here = any(root.glob("MNIST/raw/*"))
        try:
            data = sgu.load_data("mnist" if here else str(results / "mnist_digits.npz"), root)
            return *sgu.load_model(results / "mnist_standard.pt"), sgu.choose(data, "3,7")
        except sgu.UsageError as error:
            print(error)
    x, y = sgu.draw_glyphs(800 if quick else 4000, seed=0, side=16 if quick else 28)
    data = sgu.choose(dict(name="glyphs", train=x[100:], train_labels=y[100:], test=x[:100],
                           test_labels=y[:100], classes=sgu.DIGITS), "3,7")
    torch.manual_seed(0)
    model, sde = sgu.UNet(channels=(8, 16) if quick else (16, 32)), sgu.VE()
    ema = copy.deepcopy(model)
    for info in sgu.train(model, ema, sde, data["train"], steps=100 if quick else 400,
                          batch_size=32 if quick else 64, lr=5e-3 if quick else 3e-3):
        pass
    return ema.eval().requires_grad_(False), sde, data

def draw(images, n, generator):
    """n random ones of images; uint8 levels become numbers in [-1, 1]."""
    x = images[torch.randint(len(images), (n,), generator=generator)]
    return sgu.dequantise(x, generator) if x.dtype == torch.uint8 else x

standard, sde, data = get_standard()
forgotten = sgu.is_forgotten(data, "train")
keep, forget = data["train"][~forgotten], data["train"][forgotten]
print(f"{data['name']}: {len(keep)} images to keep, {len(forget)} to forget; the network has",
      f"{sum(p.numel() for p in standard.parameters()):,} weights")

# %% [markdown]
# ## Question 6.1 (2 points, 5 minutes): predict, then run
#
# Take an image to forget, add so much noise that it can hardly be seen ($\sigma = 10$), and let
# Standard, which still knows everything, guess the noise. How large is the agreement
# $e \cdot z / D$, averaged over images? ($e = z$ would give about 1; a model that knows nothing and
# answers 0 gives 0.) Write down a number, and one sentence saying why.
#
# **Marked by** the run: within 0.15.

# %% student 6.1
guess_6_1 = None                               # your prediction: a number
why_6_1 = ""                                   # and why, in a sentence

# %% solution 6.1
guess_6_1 = 1.0
why_6_1 = "In so much noise nearly everything one sees is the noise, so it can be read off."

# %% check 6.1 (2 points)
said = marking.record("6.1", guess_6_1, why_6_1, number=True)
x0 = forget[:64] / 127.5 - 1
z, t = torch.randn(x0.shape, generator=seeded(1)), sde.time(torch.full((len(x0),), 10.))
with torch.no_grad():
    _, e, z = sgu.predict_noise(sgu.make_score(standard, sde), sde, x0, t, z, None)
marking.compare("6.1", said, float((e * z).mean()), 0.15)

# %% [markdown]
# ## Question 6.2 (3 points, 15 minutes): find the bug
#
# One does not sample from the network itself but from an average of its weights over the last steps
# (EMA, exponential moving average). A student took the loop below from a long training run, used it
# for a few hundred steps of fine-tuning, and reports: "the loss falls, but the samples look the
# same as before". Fix the loop, and give the number of the line that is wrong.
#
# **Marked by** `check_ema`: the average after four steps must be that of `descend` in section 7 of
# `sgu.py`, with `ema_decay` in place of 0.999 (2 points); and by your line number (1 point).

# %% student 6.2 bug: the EMA remembers
def finetune(model, ema, sde, keep, forget=None, forget_loss=None, alpha=1.0, *, steps,  # line 1
             batch_size=64, lr=1e-3, ema_decay=0.9999, seed=0):
    score, g = sgu.make_score(model, sde), torch.Generator().manual_seed(seed)           # line 2
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)                              # line 3
    ema.load_state_dict(model.state_dict())                                              # line 4
    for n in range(1, steps + 1):                                                        # line 5
        x_g = draw(keep, batch_size, g)                                                  # line 6
        loss = alpha * sgu.score_matching_loss(score, sde, x_g, generator=g)             # line 7
        if forget is not None:                                                           # line 8
            x_f = draw(forget, batch_size, g)                                            # line 9
            loss = loss + (1 - alpha) * forget_loss(score, sde, x_f, generator=g)        # line 10
        optimiser.zero_grad()                                                            # line 11
        loss.backward()                                                                  # line 12
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)                          # line 13
        optimiser.step()                                                                 # line 14
        d = ema_decay                                                                    # line 15
        with torch.no_grad():                                                            # line 16
            for average, p in zip(ema.parameters(), model.parameters()):                 # line 17
                average.mul_(d).add_((1 - d) * p)                                        # line 18
        yield dict(step=n, loss=float(loss.detach()))                                    # line 19

line_6_2 = 0

# %% solution 6.2
def finetune(model, ema, sde, keep, forget=None, forget_loss=None, alpha=1.0, *, steps,  # line 1
             batch_size=64, lr=1e-3, ema_decay=0.9999, seed=0):
    score, g = sgu.make_score(model, sde), torch.Generator().manual_seed(seed)           # line 2
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)                              # line 3
    ema.load_state_dict(model.state_dict())                                              # line 4
    for n in range(1, steps + 1):                                                        # line 5
        x_g = draw(keep, batch_size, g)                                                  # line 6
        loss = alpha * sgu.score_matching_loss(score, sde, x_g, generator=g)             # line 7
        if forget is not None:                                                           # line 8
            x_f = draw(forget, batch_size, g)                                            # line 9
            loss = loss + (1 - alpha) * forget_loss(score, sde, x_f, generator=g)        # line 10
        optimiser.zero_grad()                                                            # line 11
        loss.backward()                                                                  # line 12
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)                          # line 13
        optimiser.step()                                                                 # line 14
        d = min(ema_decay, (1 + n) / (10 + n))                                           # line 15
        with torch.no_grad():                                                            # line 16
            for average, p in zip(ema.parameters(), model.parameters()):                 # line 17
                average.mul_(d).add_((1 - d) * p)                                        # line 18
        yield dict(step=n, loss=float(loss.detach()))                                    # line 19

line_6_2 = 15

# %% check 6.2 (3 points)
with marking.planted_bug(globals().get("line_6_2"), "6.2"):
    checks.check_ema(finetune)

# %% [markdown]
# ## Question 6.3 (2 points, 15 minutes): another forget loss
#
# Any function with the signature of `sgu.obtuse_loss` can be a forget loss. The simplest idea is to
# train *backwards*, towards a large error on $D_f$ (NegGrad). This error is unbounded, so cap it:
# for every image, with a cap $c$,
#
# $$L_b = -\min\left( c, \frac{1}{D} \sum_i (e_{bi} - z_{bi})^2 \right),$$
#
# averaged over the batch. `sgu.predict_noise(score, sde, x0, t, z, generator)` returns $t$, $e$ and
# $z$; it draws $t$ and $z$ where they are None, and flattens images to (B, D).
#
# **Marked by** `check_capped_neggrad`: values below and above the cap, image by image, and no
# gradient above it.

# %% student 6.3
def capped_neggrad(score, sde, x0, t=None, z=None, weighting="noise", generator=None, cap=1.5):
    """x0: (B, ...) from D_f -> one number in [-cap, 0]. weighting is not used."""
    raise NotImplementedError("question 6.3")

# %% solution 6.3
def capped_neggrad(score, sde, x0, t=None, z=None, weighting="noise", generator=None, cap=1.5):
    """x0: (B, ...) from D_f -> one number in [-cap, 0]. weighting is not used."""
    t, e, z = sgu.predict_noise(score, sde, x0, t, z, generator)
    return -(e - z).square().mean(1).clamp(max=cap).mean()

# %% check 6.3 (2 points)
checks.check_capped_neggrad(capped_neggrad)

# %% [markdown]
# ## Question 6.4 (4 points, 30 minutes): make it forget
#
# Write `unlearn`: given the Standard network, return another one that has forgotten $D_f$. Use
# `sgu.train` (see `help(sgu.train)`) or a loop of your own, with `sgu.obtuse_loss` or
# `sgu.orthogonal_loss`. (The check measures what these two lower; NegGrad and its kin forget in
# another way, and 100 steps are too few to show it.) You choose $\alpha$, the number of steps, the
# learning rate, and the `window` of noise levels $\sigma$ in which the forget loss acts. Question
# 6.1 shows why the window matters; digits take shape between 0.2 and 3. 100 steps of 64 images take
# about a minute; the grader stops after ten minutes.
#
# Two things are easy to get wrong. Work on a *copy* of the network, and make its weights trainable
# (`requires_grad_(True)`). And return the average: the last step is noisier.
#
# **Marked by** `check_unlearn`, at $\sigma$ = 0.5, 1 and 2 on images of both sets:
# $e \cdot z / D$ on $D_f$ must fall by at least 0.05, on $D_g$ it may fall by at most 94% as much
# (else the guess has only become smaller for all images), and the keep loss on $D_g$ must not rise
# by more than half as much.

# %% student 6.4
def unlearn(standard, sde, keep, forget):
    """standard: a network; keep, forget: (N, 1, H, W) uint8 -> a network that has forgotten."""
    raise NotImplementedError("question 6.4")

# %% solution 6.4
def unlearn(standard, sde, keep, forget):
    """standard: a network; keep, forget: (N, 1, H, W) uint8 -> a network that has forgotten."""
    model = copy.deepcopy(standard).requires_grad_(True)
    ema = copy.deepcopy(model)
    sizes = dict(alpha=0.5, steps=80, batch_size=32, lr=3e-3) if quick else dict(
        alpha=0.8, steps=100, batch_size=64, lr=2e-3)
    for info in sgu.train(model, ema, sde, keep, forget, sgu.obtuse_loss, window=(0.2, 3.),
                          **sizes):
        pass
    return ema.eval().requires_grad_(False)

# %% check 6.4 (4 points)
checks.check_unlearn(unlearn, standard, sde, keep, forget, least=0.02 if quick else 0.05)

# %% look
# Samples from the same noise, before and after. Count the 3s and 7s.
from style import plt

with marking.picture():
    unlearned, n = unlearn(standard, sde, keep, forget), 16
    figure, axes = plt.subplots(2, n, figsize=(11, 1.7))
    for row, model in zip(axes, (standard, unlearned)):
        score, shape = sgu.make_score(model, sde), (n, *keep.shape[1:])
        x = sgu.ode_sample(score, sde, shape, steps=4 if quick else 18, generator=seeded(0))
        for ax, image in zip(row, x):
            ax.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
            ax.axis("off")
    figure.suptitle("above: Standard, below: yours", y=1.02)
