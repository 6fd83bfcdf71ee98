# %% [markdown]
# # Exercise 10: can your judge say "none of these"?
#
# A judge that was trained on digits alone has to name a digit, whatever you show it. A model that
# answers with noise in place of a 3 then counts as one that has forgotten the 3. Here you teach a
# judge one more class, *none of these*, and measure what that gains and what it costs.
#
# This exercise goes with section 9 of `sgu.py`; read it after you have tried, not before.
# 5 questions, 13 points, about 60 minutes.

# %%
import math
import os
import sys

sys.path[:0] = ["../..", ".."]                 # sgu.py is two folders up, style.py one
import torch
import torch.nn.functional as F

import sgu
import checks
import marking
from checks import seeded

quick = os.environ.get("SGU_QUICK", "0") != "0"     # tiny sizes, to see that everything runs
data = sgu.choose(sgu.load_data("../results/mnist_digits.npz"), "3,7")

def fit(batch_of, classes):
    """A judge of so many classes, trained on batch_of(images, labels, generator)."""
    g, steps = seeded(0), 150 if quick else 300
    torch.manual_seed(0)
    judge = sgu.Judge(1, classes, 8).train()
    optimiser = torch.optim.Adam(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, steps)
    for step in range(steps):
        rows = torch.randint(len(data["train"]), (100,), generator=g)
        x, y = batch_of(data["train"][rows] / 127.5 - 1, data["train_labels"][rows], g)
        optimiser.zero_grad()
        F.cross_entropy(judge(x), y).backward()
        optimiser.step()
        schedule.step()
    return judge.eval()

plain_judge = fit(lambda x, y, generator: (x, y), 10)
verdict = sgu.opinions(plain_judge, data["test"])[0].argmax(1)
right = float((verdict == data["test_labels"]).float().mean())
print(f"A judge of ten digits, trained on 1,000 images: right on {right:.1%} of 1,000 others")

# %% [markdown]
# ## Question 10.1 (2 points, 5 minutes): predict, then run
#
# Show this judge 500 images of uniform noise: every pixel is a grey level drawn at random,
# independently of the others. For how many of them is it *sure* that they show a certain digit,
# that is, gives one digit a probability of more than one half?
#
# - **a** for hardly any: it has never seen such a thing, so its probabilities are spread out
# - **b** for about half of them
# - **c** for nearly all of them
#
# Write down the letter, and one sentence saying why. **Marked by** the run.

# %% student 10.1
choice_10_1 = ""                               # your prediction: a, b or c
why_10_1 = ""                                  # and why, in a sentence

# %% solution 10.1
choice_10_1 = "c"
why_10_1 = ("Training rewarded it for being sure of some digit on everything it saw, and nothing "
            "ever told it what to say of something else.")

# %% check 10.1 (2 points)
said = marking.record("10.1", choice_10_1, why_10_1)
uniform = torch.randint(256, (500, 1, 28, 28), generator=seeded(1), dtype=torch.uint8)
share = float((sgu.opinions(plain_judge, uniform)[0].amax(1) > 0.5).float().mean())
answer = "a" if share < 0.2 else "c" if share > 0.8 else "b"
marking.compare("10.1", said, answer, share=share)

# %% [markdown]
# ## Question 10.2 (4 points, 20 minutes): what is not a digit?
#
# Write three kinds of images that show no digit. Each function gets a batch of digits,
# (B, 1, 28, 28) with numbers in [-1, 1] (-1 is black), and returns as many images of the same shape
# and range.
#
# - `noise` ignores the digits: $m + s z$, clamped to [-1, 1], with independent $z \sim N(0, 1)$ in
#   every pixel. Draw a shade $m$ from [-1, 1] and a strength $s$ from [0, 2] for every image, else
#   the judge learns one kind of noise only.
# - `blend` lays every image over *another* one of the batch; both must show, by a fifth or more.
# - `shuffled` cuts every image into 4 x 4 patches of 7 x 7 pixels, and puts them together in
#   another order.
#
# Draw random numbers from the generator. **Marked by** `check_noise`, `check_blend` and
# `check_shuffled`: what each kind must and must not have in common with the images that it was made
# from.

# %% student 10.2
def noise(x, generator):
    """x: (B, 1, 28, 28) -> (B, 1, 28, 28)."""
    raise NotImplementedError("question 10.2")

def blend(x, generator):
    """x: (B, 1, 28, 28) -> (B, 1, 28, 28)."""
    raise NotImplementedError("question 10.2")

def shuffled(x, generator):
    """x: (B, 1, 28, 28) -> (B, 1, 28, 28)."""
    raise NotImplementedError("question 10.2")

# %% solution 10.2
def noise(x, generator):
    """x: (B, 1, 28, 28) -> (B, 1, 28, 28)."""
    shade, strength = torch.rand(2, len(x), 1, 1, 1, generator=generator)
    z = torch.randn(x.shape, generator=generator)
    return (2 * shade - 1 + 2 * strength * z).clamp(-1, 1)

def blend(x, generator):
    """x: (B, 1, 28, 28) -> (B, 1, 28, 28)."""
    return torch.maximum(x, x.roll(1, dims=0))

def shuffled(x, generator):
    """x: (B, 1, 28, 28) -> (B, 1, 28, 28)."""
    patches = x.reshape(-1, 4, 7, 4, 7).transpose(2, 3).reshape(-1, 16, 7, 7)
    patches = patches[:, torch.randperm(16, generator=generator)]
    return patches.reshape(-1, 4, 4, 7, 7).transpose(2, 3).reshape(x.shape)

# %% check 10.2 (4 points)
checks.check_noise(noise)
checks.check_blend(blend)
checks.check_shuffled(shuffled)

# %% look
# What you made of eight digits.
from style import plt

x = data["test"][:8] / 127.5 - 1
with marking.picture():
    rows = [x, *(make(x, seeded(2)) for make in (noise, blend, shuffled))]
    figure, axes = plt.subplots(4, 8, figsize=(8, 4.2))
    for row, images in zip(axes, rows):
        for ax, image in zip(row, images):
            ax.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
            ax.axis("off")

# %% [markdown]
# ## Question 10.3 (3 points, 15 minutes): one more class
#
# Write the batches that teach the judge its eleventh class: about a fifth of the images becomes
# *none of these*, of all three kinds, and gets the label 10; the others stay as they are, and so
# does the size of the batch. The images and labels that you are given belong to somebody else: work
# on copies (`clone`).
#
# **Marked by** `check_with_none` (the batch), and by `check_none_judge`: a judge is trained on your
# batches, for about half a minute, and shown 1,000 digits that it has not seen, and images of all
# three kinds.

# %% student 10.3
def with_none(x, y, generator):
    """x: (B, 1, 28, 28) in [-1, 1], y: (B,) of 0..9 -> the same shapes, with labels 0..10."""
    raise NotImplementedError("question 10.3")

# %% solution 10.3
def with_none(x, y, generator):
    """x: (B, 1, 28, 28) in [-1, 1], y: (B,) of 0..9 -> the same shapes, with labels 0..10."""
    x, y = x.clone(), y.clone()
    kinds = torch.stack([make(x, generator) for make in (noise, blend, shuffled)])
    which = torch.randint(3, (len(x),), generator=generator)
    x[::5] = kinds[which, torch.arange(len(x))][::5]
    y[::5] = 10
    return x, y

# %% check 10.3 (3 points)
checks.check_with_none(with_none)
none_judge = fit(with_none, 11)
checks.check_none_judge(none_judge, plain_judge, data["test"], data["test_labels"])

# %% [markdown]
# ## Question 10.4 (2 points, 10 minutes): gain and price
#
# What does the new class gain, and what does it cost? Compute three shares: of the real digits that
# are read correctly (`accuracy`), of the real digits that are called none of these (`refused`), and
# of the other images that are called a digit (`false`). A verdict is the most probable class,
# however small its probability; classes 0 to 9 are digits, and class 10, if the judge has it, is
# none of these.
#
# **Marked by** `check_measure`: verdicts on 20 digits and 10 other images, by judges of eleven and
# of ten classes.

# %% student 10.4
def measure(real, labels, fake):
    """real: (N, K) probabilities of real digits, labels: (N,), fake: (M, K) of other images
    -> dict(accuracy, refused, false)."""
    raise NotImplementedError("question 10.4")

# %% solution 10.4
def measure(real, labels, fake):
    """real: (N, K) probabilities of real digits, labels: (N,), fake: (M, K) of other images
    -> dict(accuracy, refused, false)."""
    verdict, other = real.argmax(1), fake.argmax(1)
    shares = dict(accuracy=verdict == labels, refused=verdict == 10, false=other < 10)
    return {name: float(share.float().mean()) for name, share in shares.items()}

# %% check 10.4 (2 points)
checks.check_measure(measure)

# %% look
# Both judges. Is the price worth paying? And does the new one know the other kind of blend, the
# mean of two images or the brighter of the two, whichever you did not train it on?
with marking.picture():
    x = data["test"]
    for kind in (noise, blend, shuffled):
        other = sgu.to_levels(kind(x / 127.5 - 1, seeded(3)))
        for judge, title in ((plain_judge, "ten classes"), (none_judge, "with none of these")):
            real, fake = (sgu.opinions(judge, images)[0] for images in (x, other))
            shares = measure(real, data["test_labels"], fake)
            print(f"{kind.__name__:<9} {title:<19}",
                  ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))

# %% [markdown]
# ## Question 10.5 (2 points, 10 minutes): predict, then run
#
# Here is a cheap way to "forget" 3 and 7: let Standard draw, and whenever a 3 or a 7 comes out,
# replace it by noise. To a judge of ten digits the noise is some digit or other, mostly neither a 3
# nor a 7, so the unlearning ratio drops to almost nothing, and nothing else in the report looks
# amiss. Now the same 200 samples, noise included, go to a judge with one more class: the one that
# comes with this repository, which was trained on all of MNIST. What share of them does it call
# *none of these*? Write down a fraction, and one sentence on why every report of forgetting should
# have this column.
#
# **Marked by** the run: within 0.07 (it takes some ten seconds).

# %% student 10.5
guess_10_5 = None                              # your prediction: a fraction
why_10_5 = ""                                  # why must a report have this column?

# %% solution 10.5
guess_10_5 = 0.2
why_10_5 = ("Standard draws ten digits about equally often, and two of them were replaced by "
            "noise. Destruction has to show somewhere, or it passes for forgetting.")

# %%
def standard_with_noise(judge, n=200):
    """Samples of Standard, (n, 1, 28, 28) uint8, and the same with noise in place of 3 and 7."""
    model, sde = sgu.load_model("../results/mnist_standard.pt")
    x = sgu.multistep_sample(sgu.make_score(model, sde), sde, (n, 1, 28, 28), 10 if quick else 20,
                             generator=seeded(0))
    before = sgu.to_levels(x)
    gone = torch.isin(sgu.opinions(judge, before)[0].argmax(1), torch.tensor([3, 7]))
    after = before.clone()
    after[gone] = torch.randint(256, after[gone].shape, generator=seeded(5), dtype=torch.uint8)
    return before, after

# %% check 10.5 (2 points)
said = marking.record("10.5", guess_10_5, why_10_5, number=True)
shipped_judge = sgu.load_judge("../results/mnist_judge.pt")
before, after = standard_with_noise(shipped_judge)
none = sgu.opinions(shipped_judge, after)[0].argmax(1) == 10
marking.compare("10.5", said, float(none.float().mean()), 0.07)

# %% look
# Standard, and Standard with noise in place of 3 and 7, as both judges see them.
with marking.picture():
    for images, title in ((before, "Standard"), (after, "with noise")):
        for judge, name in ((plain_judge, "ten classes"), (shipped_judge, "with none of these")):
            probs = sgu.opinions(judge, images)[0]
            label = probs.argmax(1)
            ratio = float(torch.isin(label, torch.tensor([3, 7])).float().mean())
            unsure = float((probs.amax(1) < 0.5).float().mean())
            none = float((label == 10).float().mean())
            print(f"{title:<11} {name:<19} ratio {ratio:.1%}, unsure {unsure:.1%}, none {none:.1%}")
