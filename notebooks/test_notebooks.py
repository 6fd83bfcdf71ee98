"""Tests of what lies in notebooks/: rivals, CLIP, results files, README, exercises and the grader.

    python -m pytest -q                               these and those of sgu.py
    python -m pytest -q notebooks/test_notebooks.py   these alone; -k exercise: the exercises
"""
import contextlib
import copy
import functools
import importlib.machinery
import inspect
import io
import json
import math
import os
import pathlib
import re
import shlex
import statistics
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn as nn

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "exercises")]

import sgu

PLAIN = dict(sgu.METHODS)                      # before rivals.py adds its own

import checks
import clip_judge
import grade
import make
import marking
import rivals
import stale
import toy_gmm
from checks import F64, SDES, TILTED, expect, loss_example, planted, seeded
from testkit import (
    QUICK, always_late, command, equal_weights, finished, results_of, small, tiny_presets,
    write_shapes)

# ==== Rivals ======================================================================================

class Affine(nn.Module):
    """A network of three numbers, F = w x + v level + b: its loss is a quadratic in them."""

    def __init__(self):
        super().__init__()
        self.w, self.v, self.b = (nn.Parameter(torch.tensor(value, dtype=F64))
                                  for value in (0.3, -0.2, 0.1))

    def forward(self, x, level):
        return self.w * x + self.v * sgu.per_sample(level, x) + self.b

def example(**changes):
    """Arguments of train as the command hands them to a rival's prepare, for an Affine."""
    data = torch.randn(50, 1, 2, 2, generator=seeded(3), dtype=F64)
    return dict(model=Affine(), sde=SDES["VE"], keep=data, forget=data + 1, seed=5, alpha=0.7,
                forget_loss=sgu.obtuse_loss, window=(0.5, 3.), data_std=0.8,
                recipe=sgu.Recipe()) | changes

def by_differences(arguments, loss, data, weight, window, batches, size, h=0.5):
    """(batches, 3): the gradient of every batch's loss by central differences, exact for a
    quadratic, on batches drawn as training draws them."""
    model, sde, values = arguments["model"], arguments["sde"], []
    score = sgu.make_score(model, sde, arguments["data_std"])
    for sign in (1, -1):
        for p in model.parameters():
            with torch.no_grad():
                p += sign * h
                g = seeded(arguments["seed"])
                for _ in range(batches):
                    x = data[torch.randint(len(data), (size,), generator=g)]
                    t = sgu.sample_times(sde, size, g, window=window)
                    values.append(float(loss(score, sde, x, t=t, weighting=weight, generator=g)))
                p -= sign * h
    up, down = torch.tensor(values, dtype=F64).view(2, 3, batches)
    return ((up - down) / (2 * h)).T

def slopes(model, backward, keep_slopes, forget_slopes, alpha):
    """The gradients that backward leaves for two losses of known slopes in the three numbers."""
    for p in model.parameters():
        p.grad = None
    numbers = list(model.parameters())
    losses = (sum(s * p for s, p in zip(each, numbers)) for each in (keep_slopes, forget_slopes))
    backward(model, *losses, alpha)
    return torch.stack([p.grad for p in numbers])

def test_neggrad_and_erasediff():
    """Minus the keep loss; and the mean of (e - aim)^2 over aims uniform around 1/2 or 0, which
    adds their variance 1/12. n = 200,000."""
    sde = SDES["VP"]
    x0, t, z, e = loss_example(sde)
    keep = sgu.score_matching_loss(planted(sde, e), sde, x0, t=t, z=z)
    expect(rivals.neggrad_loss(planted(sde, e), sde, x0, t=t, z=z), -keep, "NegGrad", 1e-9)
    many = torch.zeros(2000, 1, 10, 10)
    score = planted(sde, torch.tensor(0.8))
    for loss, centre in ((rivals.erasediff_loss, 0.5), (rivals.erasediff_zero_loss, 0.)):
        got = loss(score, sde, many, generator=seeded(1))
        expect(got, (0.8 - centre) ** 2 + 1 / 12, f"EraseDiff around {centre}", 0.005)

def test_siss_scales_by_the_keep_norm():
    """The keep gradient, plus the forget gradient brought to 1 - alpha times its norm."""
    keep, forget = torch.tensor([3., 0., 4.], dtype=F64), torch.tensor([0., 200., 0.], dtype=F64)
    backward = rivals.siss(None, example())["backward"]
    got = slopes(Affine(), backward, keep, forget, 0.9)
    expect(got, keep + 0.1 * 5 / 200 * forget, "gradient of SISS", 1e-9, {
        "not scaled by the keep gradient's norm": keep + 0.1 / 200 * forget,
        "not scaled at all": keep + 0.1 * forget})

@pytest.mark.parametrize("data_std", [0.5, 2.0])
def test_fisher_penalty(data_std):
    """It adds the gradient of strength sum F (w - w0)^2, F the mean squared gradient of small
    batches of D_g, weighted and timed as the keep loss is."""
    given = example(data_std=data_std)
    weight = sgu.balanced_weight(given["sde"], data_std)
    fisher = by_differences(given, sgu.score_matching_loss, given["keep"], weight, (0., math.inf),
                            6, 3).square().mean(0)
    backward = rivals.fisher(None, given, strength=7., batches=6, batch_size=3)["backward"]
    moved = torch.tensor([0.5, -0.25, 1.], dtype=F64)
    for p, by in zip(given["model"].parameters(), moved):
        p.data += by
    got = slopes(given["model"], backward, (1., 2., 3.), (4., 5., 6.), 0.7)
    plain = torch.tensor([0.7 * k + 0.3 * f for k, f in ((1., 4.), (2., 5.), (3., 6.))], dtype=F64)
    expect(got, plain + 2 * 7 * fisher * moved, "gradient with the penalty", 1e-5, {
        "the 2 of the square's derivative is missing": plain + 7 * fisher * moved})

def test_vdu_needs_no_kept_images():
    """The forget gradient and a pull to Standard's weights by the variance of their layer."""
    given = example()
    start = torch.stack([p.detach().clone().view(()) for p in given["model"].parameters()])
    backward, moved = rivals.vdu(None, given, strength=3.)["backward"], torch.tensor([0.5, -2., 1.])
    for p, by in zip(given["model"].parameters(), moved):
        p.data += by
    got = slopes(given["model"], backward, (1., 2., 3.), (4., 5., 6.), 0.7)
    pull = 0.7 * 3 * moved / start.square().clamp(min=1e-8)
    expect(got, 0.3 * torch.tensor([4., 5., 6.]) + pull, "gradient of VDU", 1e-5, {
        "the kept images count": 0.3 * torch.tensor([4., 5., 6.]) + 0.7 * torch.tensor(
            [1., 2., 3.]) + pull, "twice the pull": 0.3 * torch.tensor([4., 5., 6.]) + 2 * pull})

@pytest.mark.parametrize("data_std", [0.5, 2.0])
def test_saliency_mask(data_std):
    """A third of three weights is trained: that of the largest summed forget gradient, in the
    window and with the weight of the forget loss; the others get no gradient and are put back."""
    given = example(data_std=data_std)
    weight = sgu.balanced_weight(given["sde"], data_std, 0.5)
    saliency = by_differences(given, sgu.obtuse_loss, given["forget"], weight, given["window"],
                              4, 5).sum(0).abs()
    backward = rivals.salun(None, given, share=1 / 3, batches=4, batch_size=5)["backward"]
    free = [bool(s == saliency.max()) for s in saliency]
    got = slopes(given["model"], backward, (1., 1., 1.), (1., 1., 1.), 0.7)
    assert got.tolist() == [float(f) for f in free], (got, saliency)
    numbers = list(given["model"].parameters())
    before = [float(p.detach()) for p in numbers]
    for p in numbers:
        p.grad = torch.ones_like(p)
    torch.optim.SGD(numbers, lr=1.).step()
    assert [float(p.detach()) == b for p, b in zip(numbers, before)] == [not f for f in free]

@pytest.mark.parametrize("prepare", [rivals.siss, rivals.fisher, rivals.salun, rivals.vdu])
def test_a_frozen_layer_stays_frozen(prepare):
    given = example()
    given["model"].b.requires_grad_(False)
    backward, model = prepare(None, given)["backward"], given["model"]
    backward(model, (model.w + model.v) ** 2, model.w - 2 * model.v, 0.7)
    assert model.b.grad is None and (model.w.grad != 0 or model.v.grad != 0)

RIVALS = [name for name in sgu.METHODS if name not in PLAIN]

@pytest.mark.parametrize("method", RIVALS)
def test_rivals_through_the_command(method, finished, tmp_path, small, capsys, monkeypatch):
    """Each runs as a method of the command and starts from Standard; stopped on the way it ends at
    the same weights, since what it looks at is Standard, whenever it goes on."""
    argv = [*finished[1], "--methods", method, "--pretrained", finished[0] / "standard.pt"]
    assert command(capsys, *argv, "--out", tmp_path / "whole")[0] == 0
    files = [tmp_path / out / f"{method}.pt" for out in ("whole", "parts")]
    assert not equal_weights(files[0], finished[0] / "standard.pt"), "nothing was trained"
    entry = results_of(tmp_path / "whole")["methods"][method]
    assert entry["recipe"]["alpha"] == sgu.METHODS[method].alpha
    replace, saves = os.replace, []
    def stop(source, target):
        replace(source, target)
        saves.append(pathlib.Path(target).name)
        if saves.count(f"{method}.pt") == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        patch.setattr(sgu, "time", always_late())
        assert command(capsys, *argv, "--out", tmp_path / "parts")[0] == 130
    assert command(capsys, *argv, "--out", tmp_path / "parts")[0] == 0
    assert equal_weights(*files), f"{method}: stopped and gone on, other weights"

def test_energy_distance():
    """Of N(0, 1) and N(m, 1) it is 2 (2/sqrt(pi) e^(-m^2/4) + m erf(m/2)) - 4/sqrt(pi)."""
    x, y = (torch.randn(n, 1, generator=seeded(i), dtype=F64) for i, n in enumerate((4000, 3000)))
    for m in (0., 1., 3.):
        apart = 2 / math.sqrt(math.pi) * math.exp(-m ** 2 / 4) + m * math.erf(m / 2)
        got = rivals.energy_distance(x, y + m)
        assert abs(got - 2 * apart + 4 / math.sqrt(math.pi)) < 0.005 + 0.03 * m, f"m = {m}: {got}"


def test_halves_of_mnist(tmp_path, monkeypatch):
    """Tuning and the final figures see different test images and the same training images."""
    x = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 1, 8, 8)
    label = torch.arange(10) % 3
    data = dict(train=x + 100, test=x, train_labels=label, test_labels=label)
    monkeypatch.setattr(sgu, "load_data", lambda name, root: data)
    opt = types.SimpleNamespace(out=tmp_path, quick=False, data_root="")
    opt.halves = rivals.halves(opt)
    jobs = [rivals.mnist_job(opt, "obtuse", None, 0, i, rivals.SIZE["mnist"]) for i in (0, 1)]
    files = [np.load(job["dataset"]) for job in jobs]
    tests, trains = ([[int(v) for v in f["images"][f["split"] == i, 0, 0]] for f in files]
                     for i in (1, 0))
    assert sorted(tests[0] + tests[1]) == list(range(10))
    assert trains == [list(range(100, 110))] * 2


def test_how_rivals_are_chosen(monkeypatch, tmp_path):
    """By the distance of all samples, with a seed of its own; final runs are of the full size."""
    asked = []

    def figures(how):
        far = how["setting"][0] if how["setting"] else 0
        return {how["method"]: dict(unlearning_ratio=dict(total=0.5, n=10), energy_kept=far,
                                    energy_all=1 - far)}

    def trials(trial, jobs, out):
        asked.extend(jobs.values())
        return {key: dict(methods=figures(how)) for key, how in jobs.items()}

    names = ("method", "setting", "seed", "final", "size")
    monkeypatch.setattr(rivals, "attempt_all", trials)
    monkeypatch.setattr(rivals, "toy_job", lambda opt, *how: dict(zip(names, how)))
    monkeypatch.setitem(rivals.SETTINGS, "toy", dict(obtuse=[(v, 1, 1) for v in (0.2, 0.9, 0.5)]))
    opt = types.SimpleNamespace(out=tmp_path, quick=False, seeds=[0, 1, 2])
    assert rivals.compare("toy", opt)["methods"]["obtuse"]["setting"] == 1
    for how in asked:
        n = rivals.SIZE["toy"]["samples" if how["final"] else "tuning_samples"]
        assert how["size"]["samples"] == n and (how["seed"] in (0, 1, 2)) == how["final"]


def test_recipes_of_rivals():
    """What is a square of e - z has the weight of squares; all have a brief training."""
    for name in rivals.TITLES.keys() - PLAIN.keys():
        how = sgu.METHODS[name]
        assert how.power == (1.0 if how.loss is rivals.neggrad_loss else 0.5), name
        assert (how.share, how.pace, how.window) == (0.09, 0.5, (0.0, 6.0)), name
    for prepare, name, value in (("salun", "share", 0.5), ("fisher", "strength", 100.0),
                                 ("vdu", "strength", 10.0)):
        default = inspect.signature(getattr(rivals, prepare)).parameters[name].default
        assert default == value, prepare
    assert rivals.CHANGES["Adam for all weights"][1] is rivals.adam
    assert rivals.steps_of("finetune", dict(steps=5)) == 10 == 2 * rivals.steps_of("salun",
                                                                                  dict(steps=5))


def test_command_of_rivals(finished, tmp_path, small, monkeypatch):
    """The distance of all samples to D_g of the test images; by another optimiser where asked; a
    setting reaches the training."""
    (folder, argv), made = finished, []
    monkeypatch.setitem(rivals.CHANGES, "x", (
        sgu.Recipe(), lambda *how: made.append(how) or rivals.adam(*how), "float32", 0.5))
    how = dict(forget="two", samples=20, tasks="sample", sampler_steps=2)
    found = rivals.command(tmp_path, argv[1], folder / "judge.pt", change="x", methods="unseen",
                           steps=8, **how)
    judge = sgu.load_judge(folder / "judge.pt")
    data, saved = sgu.load_data(argv[1]), sgu.read_file(tmp_path / "samples_unseen.pt")
    features = [sgu.opinions(judge, x)[1] for x in (
        saved["state"]["values"], data["test"][data["test_labels"] != 1])]
    entry = found["methods"]["unseen"]
    assert entry["recipe"]["steps"] == 4 and made
    assert entry["frechet_all"] == pytest.approx(sgu.frechet(*features))
    monkeypatch.setitem(sgu.METHODS, "obtuse", sgu.METHODS["obtuse"])
    found = rivals.command(tmp_path, argv[1], folder / "judge.pt", (0.3, 0.5, (0.1, 2.0)),
                           methods="obtuse", pretrained=folder / "standard.pt", unlearn_steps=2,
                           lr=0.02, **how)
    assert found["methods"]["obtuse"]["recipe"] == dict(alpha=0.3, steps=2, lr=0.01,
                                                        window=(0.1, 2.0))


def test_spreads():
    runs = [dict(unlearning_ratio=dict(total=v, n=10), unsure=v) for v in (0.1, 0.2, 0.3)]
    got = rivals.spreads(runs)["unsure"]
    assert got["sd"] == pytest.approx(0.1) and got["mean"] == pytest.approx(0.2)
    entry = dict(unsure=dict(mean=0.5, sd=0.25), D_g=dict(mean=2.5, sd=0.125),
                 energy_all=dict(mean=0.5, sd=0.0625))
    cells = [rivals.spread_cell(entry, key) for key in ("unsure", "D_g", "energy_all", "D_f")]
    assert cells == ["50.0 ± 25.0", "2.50 ± 0.12", "0.5000 ± 0.0625", "-"]


def test_toy_trial(monkeypatch, tmp_path):
    """Kept samples of D are like D_g, all of them are not; what a trial trains with."""
    start, got = tmp_path / "start.pt", []
    torch.save(toy_gmm.ToyNet().state_dict(), start)
    with monkeypatch.context() as patch:
        patch.setattr(sgu, "euler_maruyama", lambda score, sde, shape, steps, generator:
                      toy_gmm.sample_mixture(toy_gmm.DATA, shape[0], generator))
        found = rivals.toy_trial(None, "obtuse", start, None, 0, 0, rivals.SIZE["toy"])
    g = seeded(3)
    x, real = (toy_gmm.sample_mixture(c, 5000, g) for c in (toy_gmm.DATA, toy_gmm.KEEP))
    kept = x[~toy_gmm.nearest_forgotten(x).bool()]
    for key, points in (("energy_kept", kept), ("energy_all", x)):
        want = rivals.energy_distance(points, real)
        assert found["methods"]["obtuse"][key] == pytest.approx(want, abs=0.01)
    score = toy_gmm.exact_score(toy_gmm.KEEP)
    monkeypatch.setattr(sgu, "train", lambda **how: got.append(how) or [dict(score=score)])
    size = dict(rivals.SIZE["toy"], samples=10)
    rivals.toy_trial(None, "finetune", start, (0.3, 0.5, rivals.ALL), 7, 0, size)
    asked = [got[0][key] for key in ("alpha", "steps", "lr", "seed", "forget")]
    assert asked == [0.3, 1000, 0.003, 7, None]
    assert toy_gmm.nearest_forgotten(got[0]["keep"]).float().mean() < 0.1


def test_flips_compare_like_with_like(monkeypatch, tmp_path):
    """The same images, tests and judge; only the first ones are few enough to be mirrored."""
    names, seen = ["airplane", "b", "c", "d"], []
    write_shapes(tmp_path / "stl10.npz", n=60, channels=3, class_names=names)
    def run(opt, judge):
        seen.append((sgu.load_data(opt.dataset), judge, opt))
        return dict(methods=dict(standard=dict(recipe=dict())), judge={})
    monkeypatch.setattr(sgu, "run", run)
    monkeypatch.setattr(sgu, "load_judge", lambda path: f"the judge of {path.parent.name}")
    made = rivals.flips(types.SimpleNamespace(out=tmp_path, data_root=str(tmp_path),
                                              quick=False))
    (once, none, first), (often, judge, last) = seen
    assert (none, judge) == (None, "the judge of flips-0")
    assert len(once["train"]) < 10_000 <= len(often["train"]) < 10_000 + len(once["train"])
    for key in ("train", "train_labels"):
        times = len(often[key]) // len(once[key])
        assert torch.equal(often[key], torch.cat([once[key]] * times))
    assert torch.equal(once["test"], often["test"]) and once["classes"] == often["classes"] == names
    assert (first.samples, first.forget, first.methods) == (2000, "airplane", "standard")
    same = {k: v for k, v in vars(first).items() if k not in ("dataset", "out")}
    assert all(getattr(last, k) == v for k, v in same.items())
    assert [row["change"] for row in made["rows"]] == ["mirrored too", "as they are"]

def test_relearning_sees_forgotten_images_alone(monkeypatch, finished, tmp_path):
    kept, (folder, argv) = [], finished
    monkeypatch.setattr(sgu, "train", lambda model, ema, sde, keep, **kw: kept.append(keep) or [])
    how = dict(images=5, samples=4, looks=(0,), lr=1, batch_size=1)
    rivals.relearn_trial(None, folder / "standard.pt", how, argv[1], folder / "judge.pt", "two")
    data = sgu.load_data(argv[1])
    assert torch.equal(kept[0], data["train"][data["train_labels"] == 1][:5])


def test_evaluations_are_counted_in_calls(monkeypatch, tmp_path):
    monkeypatch.setattr(rivals, "halves", lambda opt: [{}, {}])
    monkeypatch.setattr(rivals, "attempt_all", lambda trial, jobs, out: {
        key: dict(methods=dict(standard={})) for key in jobs})
    for row in rivals.samplers(types.SimpleNamespace(quick=False, out=tmp_path))["rows"]:
        calls = []

        def score(x, t):
            calls.append(t)
            return -x
        sgu.SAMPLERS[row["sampler"]](score, sgu.VE(), (1, 2), steps=row["steps"])
        assert len(calls) == row["evaluations"], row


def test_a_trial_is_kept_for_the_same_question_alone(tmp_path):
    calls = []
    for v in (1, 1, 2):
        found = rivals.attempt(lambda folder, v: calls.append(v) or dict(v=v), tmp_path, "x",
                               dict(v=v))
        assert found["v"] == v
    assert calls == [1, 2]


def test_shipped_networks():
    """The U-Net and the judge of today's sgu.py are those whose weights are committed."""
    data = sgu.load_data(str(HERE / "results" / "mnist_digits.npz"))
    (net, sde), x = sgu.load_model(rivals.committed("standard")), data["test"][:200]
    with torch.no_grad():
        loss = sgu.score_matching_loss(sgu.make_score(net, sde), sde, sgu.from_levels(x),
                                       t=sde.time(torch.ones(200)), generator=seeded())
    sure = sgu.opinions(sgu.load_judge(rivals.committed("judge")), x)[0].amax(1).mean()
    assert (float(loss), float(sure)) == pytest.approx((0.0320, 0.948), rel=0.01)


@pytest.mark.parametrize("name", ["glyphs-3,7", "mnist-3,7"])
def test_committed_runs_are_todays(name):
    assert stale.why_stale(make.read_results(name), name) == ""


def test_committed_tables_are_todays():
    for name, table in (("toy", toy_gmm.make_table), ("recipe-mnist-3,7", rivals.recipe_table)):
        results = make.read_results(name)
        assert table(results) == results["markdown"], name


def test_defaults_of_data_sets():
    """What the paper forgot, under its schedule."""
    for name, (forget, sde, *_) in sgu.DATASETS.items():
        rows = make.PAPER["2"].get(f"{name},{sde}")
        assert (rows is not None) == (name in ("mnist", "cifar10", "stl10", "celeba")), name
        assert not rows or set(rows) - {"total", "D_g", "D_f"} == set(forget.split(",")), name


def test_toy_measures(tmp_path):
    """By the exact score of D_g; and what stands beside networks that are hardly trained."""
    exact = toy_gmm.exact_score(toy_gmm.KEEP)
    nll = toy_gmm.measure_nll(exact, 16, 0.5)
    assert nll["D_g"] == pytest.approx(3.524, abs=0.02)
    assert nll["D_f"] == pytest.approx(5.162, abs=0.05)
    shares, x = toy_gmm.measure_share(exact, 500, 3)
    assert [shares[key]["steps"] for key in ("ode", "em")] == [40, 100]
    want = sgu.euler_maruyama(exact, toy_gmm.SDE, (500, 2), steps=100, generator=seeded(3))
    assert torch.equal(x, want)
    assert shares["em"]["share"] == int(toy_gmm.nearest_forgotten(want).sum()) / 500
    for name, pair in toy_gmm.PAPER.items():
        i = make.PAPER["1"]["columns"].index(name)
        assert pair == tuple(make.PAPER["1"][part][i] for part in ("D_g", "D_f"))
    quick = toy_gmm.run(toy_gmm.Options(str(tmp_path), True))
    methods = quick["methods"]
    assert methods["standard"]["exact_nats"]["D_g"] == pytest.approx(3.628, abs=0.1)
    assert methods["unseen"]["exact_nats"]["D_f"] == pytest.approx(5.162, abs=0.1)
    assert quick["share_real"]["D_g"] == pytest.approx(0.079, abs=0.03)


# ==== CLIP as the judge ===========================================================================

class FakeClip(nn.Module):
    """Embeds an image as its mean colour, and a text as what the prompt says."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.visual = types.SimpleNamespace(image_size=(16, 16))

    def encode_image(self, x):
        assert x.shape[1:] == (3, 16, 16)
        self.seen = x
        return self.scale * x.mean((2, 3))

    def encode_text(self, tokens):
        means = dict(bright=[1., 1., 1.], dark=[-1., -1., -1.])
        words = [next((w for w in means if w in token), None) for token in tokens]
        return torch.tensor([means.get(word, [3., 0., -3.]) for word in words])

def fake_open_clip(monkeypatch, create_model):
    """A module open_clip that makes its models by create_model. -> the prompts it was given"""
    prompts, module = [], types.ModuleType("open_clip")
    module.__spec__ = importlib.machinery.ModuleSpec("open_clip", None)
    module.create_model = create_model
    module.get_tokenizer = lambda name: lambda texts: prompts.extend(texts) or texts
    monkeypatch.setitem(sys.modules, "open_clip", module)
    return prompts

def test_clip_judge(monkeypatch, finished, tmp_path, small):
    """Its prompts, its pixels, what it says where it is not installed; it judges a whole run."""
    asked = []
    def create_model(name, pretrained):
        asked.append((name, pretrained))
        return FakeClip()
    prompts = fake_open_clip(monkeypatch, create_model)
    judge = clip_judge.ClipJudge(["bright", "dark", "3"])
    assert asked == [("ViT-B-32", "openai")]
    assert prompts == ["a photo of bright", "a photo of dark", "a photo of the digit 3"]
    x = torch.tensor([250, 3], dtype=torch.uint8)[:, None, None, None].expand(2, 1, 28, 28)
    probs, features = sgu.opinions(judge, x)
    assert probs.argmax(1).tolist() == [0, 1] and probs.amax() > 0.99 and probs.shape == (2, 4)
    assert not probs[:, 3].any(), "CLIP never says none of these"
    expect(features.norm(dim=1), [1., 1.], "length of CLIP's embedding", 1e-5)
    mean, std = torch.tensor([[0.4815, 0.4578, 0.4082], [0.2686, 0.2613, 0.2758]])
    want = (250 / 255 - mean) / std
    expect(judge.clip.seen[0, :, 0, 0], want, "a pixel as CLIP wants it", 2e-3)
    names = ["one", "bright", "dark", "four"]
    path = write_shapes(tmp_path / "s.npz", class_names=names)
    opt = sgu.parse_options(["--dataset", path, *QUICK, "--forget", "dark", "--methods", "standard",
                             "--out", str(tmp_path / "run")])
    r = sgu.run(opt, judge=clip_judge.ClipJudge(names))
    assert not (tmp_path / "run" / "judge.pt").exists(), "our own judge was trained all the same"
    assert set(r["methods"]["standard"]["class_histogram"]) == set(names)
    def no_weights(name, pretrained):
        raise RuntimeError("cannot reach the hub\nat all")
    fake_open_clip(monkeypatch, no_weights)
    with pytest.raises(sgu.UsageError, match="openai"):
        clip_judge.ClipJudge(["a", "b"])
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(sgu.UsageError, match="pip install open_clip_torch"):
        clip_judge.ClipJudge(["a", "b"])

def test_real_open_clip():
    """A random CLIP of open_clip, where it is installed: shapes and ranges."""
    pytest.importorskip("open_clip")
    judge = clip_judge.ClipJudge(["cat", "3"], name="RN50", weights=None)
    probs, features = sgu.opinions(judge, sgu.draw_glyphs(2, 0)[0])
    assert probs.shape == (2, 3) and torch.isfinite(probs).all()
    expect(features.norm(dim=1), [1., 1.], "length of CLIP's embedding", 1e-4)

# ==== Results files, the paper's tables, README ===================================================

def test_table_of_readme_is_short():
    """Eight rows of ours; the results page has them all."""
    def titles(path):
        text = path.read_text(encoding="utf-8").partition("<!-- results: mnist-3,7 ")[2]
        lines = [line for line in text.partition("<!-- end")[0].splitlines() if line[:2] == "| "]
        return [line.split(" | ")[0][2:] for line in lines if not line.startswith("| the paper's")]
    shown, full = titles(HERE.parent / "README.md")[2:], titles(HERE / "results/README.md")[2:]
    assert len(shown) == 8 and [row for row in full if row not in shown] == ["none of these, %"]

def test_paper_tables_add_up():
    """The total is the sum of the classes, every row has the four columns, and the table of the
    command quotes them where it forgot the same."""
    paper = json.loads((HERE / "paper.json").read_text(encoding="utf-8"))
    for number in ("2", "5"):
        for key, rows in paper[number].items():
            assert all(len(row) == len(paper["columns"]) for row in rows.values()), (number, key)
            names = set(rows) - {"total", "D_g", "D_f"}
            total = np.sum([rows[name] for name in names], axis=0)
            assert np.allclose(total, rows["total"], atol=0.11), (number, key)
    assert paper["2"]["mnist,ve"]["total"] == [26.8, 1.2, 5.1, 4.1]

@pytest.mark.parametrize("name", [p.stem for p in (HERE / "results").glob("rivals-*.json")])
def test_rivals_results_add_up(name):
    """The committed comparison: the summary is that of its runs, the chosen setting is the best of
    its three, everyone paid the same."""
    results = make.read_results(name)
    assert not stale.why_stale(results, name)
    config = results["config"]
    distance = rivals.DISTANCE[config["domain"]] + "_all"
    settings = rivals.SETTINGS[config["domain"]]
    assert set(results["tuning"]) == set(settings)
    assert set(results["methods"]) == {"standard", "unseen", *settings}
    for method, entry in results["methods"].items():
        runs = entry["runs"]
        shares = [run["unlearning_ratio"]["total"] for run in runs]
        bits = [run["nll_bits_per_dim"]["D_g"] for run in runs]
        assert len(runs) == len(config["seeds"]) == 3
        assert math.isclose(entry["ratio"]["mean"], statistics.mean(shares)), method
        assert math.isclose(entry["ratio"]["sd"], statistics.stdev(shares), abs_tol=1e-12), method
        assert math.isclose(entry["D_g"]["mean"], statistics.mean(bits)), method
        lo, hi = entry["pooled"]["ci95"]
        assert entry["pooled"]["n"] == 3 * config["samples"] and lo <= entry["ratio"]["mean"] <= hi
        if method in results["tuning"]:
            tried = [trial.get(distance, math.inf) for trial in results["tuning"][method]]
            assert len(tried) == 3 and tried[entry["setting"]] == min(tried), method
            paid = entry["recipe"]["steps"] * (1 if method == "finetune" else 2)
            assert paid == 2 * config["steps"], f"{method}: {paid} gradients"

@pytest.mark.parametrize("page", make.PAGES, ids=[page.name for page in make.PAGES])
def test_pages_agree_with_the_results_files(page):
    older, problems = f"{page.name} is older than results/: run python notebooks/make.py fill", []
    assert make.filled_page(page, problems).encode() == page.read_bytes(), older
    assert not problems

FOUND = {"all": {"k.1": [0.25, {"y z": 90}], "k": {"1": "the shorter key"}, "a,b": 5000,
                 "rows": [dict(by="em", n=20, v=1), dict(by="em", n=120, v=2), dict(by="pc", n=0)]},
         "command": "python x.py", "device": "a CPU", "markdown": "| a table |\n\nof its own"}

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in place of notebooks/, with one results file and nothing to fill."""
    top = tmp_path / "notebooks"
    (top / "results").mkdir(parents=True)
    for module in (make, stale):
        monkeypatch.setattr(module, "here", top)
        monkeypatch.setattr(module, "PAGES", [])
    (top / "paper.json").write_text(json.dumps(make.PAPER), encoding="utf-8")
    write_results(top, "a,b.c", FOUND)
    return top

def write_results(folder, name, content):
    (folder / "results" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")

@pytest.mark.parametrize("comment, wanted", [
    ("number: a,b.c all.k.1.0 .1%", "25.0%"), ("number: a,b.c all.k.1.0 +.2f", "+0.25"),
    ("number: a,b.c all.k.1.1.y z min", "1.5 min"), ("number: a,b.c all.a,b ,", "5,000"),
    ("number: a,b.c all.rows.120/em.v d", "2"), ("number: a,b.c all.rows.0.v d", "1"),
    ("number:\na,b.c\nall.k.1.1.y\nz d", "90"), ("number: paper 2.mnist,ve.total.0 .1f", "26.8"),
    ("results: a,b.c", "\n| a table |\n\nof its own\n\n`python x.py`; a CPU.\n")])
def test_fill(folder, comment, wanted):
    """A page, twice: what is filled is filled anew, and nothing else changes."""
    text = f"# A <!-- {comment} -->{{}}<!-- end -->.\n\n<!-- ci: start -->\n" * 2
    full, problems = text.format(wanted, wanted), []
    assert make.filled(text.format("old", "old -->\n\n|"), "page", problems) == full
    assert make.filled(full, "page", problems) == full and not problems

@pytest.mark.parametrize("text, words", [
    ("<!-- number: a,b.c all.k.2 .1f --><!-- end -->", "no 2 among 1"),
    ("<!-- number: a,b.c all.rows.em.v d --><!-- end -->", "no em.v among 0, 1, 2"),
    ("<!-- number: a,b.c all.k.1.2 .1f --><!-- end -->", "no 2 among 0, 1"),
    ("<!-- number: a,b.c every.k .1f --><!-- end -->", "no every.k among all, command, device,"),
    ("<!-- number: a,b.c all .1f --><!-- end -->", "all .1f -->: TypeError"),
    ("<!-- number: a,b.c command .1f --><!-- end -->", "ValueError"),
    ("<!-- number: nothing all .1f --><!-- end -->", "nothing.json"),
    ("<!-- number: a,b.c --><!-- end -->", "ValueError"),
    ("<!-- results: nothing --><!-- end -->", "nothing.json"),
    ("<!-- rows: inpaint a,b.c --><!-- end -->", "config"),
    ("<!-- rows: paint cifar10,vp --><!-- end -->", "paint"),
    ("<!-- rows: reconstruct stl10,vp --><!-- end -->", "stl10,vp has no reconstruct"),
    ("<!-- results: a,b.c --> <!-- number: a,b.c all.a,b d -->5000<!-- end -->", "without its end"),
    ("<!-- number: a,b.c all.k.1.0 .1f --> and no end", "without its end"),
    ("<!-- results: a,b.c short --><!-- end -->", "brief or nothing"),
    ("<!-- numbr: a,b.c all.k.1.0 .1f --><!-- end -->", "an end without one")])
def test_fill_refuses(folder, text, words):
    """One line says why; what cannot be filled stays, and all else is filled."""
    good = "<!-- number: a,b.c all.k.1.0 .0% -->{}<!-- end -->\n"
    problems, text = [], text.replace("--><!--", "-->old<!--")
    assert make.filled(good + text, "page", problems) == good.format("25%") + text
    assert len(problems) == 1 and problems[0].startswith("page: ") and words in problems[0]

def test_fill_changes_only_the_text_of_a_notebook(folder, monkeypatch, capsys):
    """Neither outputs nor code nor one byte more; a page that says the same is not written."""
    comment = "<!-- number: a,b.c all.a,b d -->{}<!-- end -->"
    def cell(kind, source, **more):
        return dict(cell_type=kind, source=source, **more)
    def page(first, second):
        cells = [cell("markdown", ["# ü\n", comment.format(first) + "\n", "end"]),
                 cell("markdown", comment.format(second)), cell("markdown", "plain"),
                 cell("code", [f'"""{comment.format("code")}"""'], execution_count=1,
                      outputs=[dict(text=[comment.format("output")], value=1e-7)])]
        return json.dumps(dict(cells=cells, nbformat=4), indent=1, ensure_ascii=False) + "\n"
    old, same, plain = (folder / name for name in ("1.ipynb", "2.ipynb", "README.md"))
    one_line = page("old", "").replace(f'"{comment.format("")}"', '[\n    "@"\n   ]')
    old.write_text(one_line.replace("@", comment.format("old")), encoding="utf-8")
    same.write_text(page("5000", "5000").replace("1e-07", "0.0000001"), encoding="utf-8")
    plain.write_text("nothing", encoding="utf-8")
    before = same.read_bytes(), same.stat().st_mtime_ns, plain.stat().st_mtime_ns
    monkeypatch.setattr(make, "PAGES", [old, same, plain])
    with pytest.raises(SystemExit) as stop:
        make.main(["fill"])
    assert stop.value.code == 0
    want = one_line.replace(comment.format("old"), comment.format("5000"))
    assert old.read_text(encoding="utf-8") == want.replace("@", comment.format("5000"))
    assert before == (same.read_bytes(), same.stat().st_mtime_ns, plain.stat().st_mtime_ns)
    assert capsys.readouterr().out == "filled notebooks/1.ipynb\n"
    other = page("old", "").replace("1e-07", "0.0000001")
    same.write_text(other, encoding="utf-8")
    with pytest.raises(SystemExit, match="2.ipynb is not as Jupyter writes it"):
        make.main(["fill"])
    assert same.read_text(encoding="utf-8") == other

def restored(accuracy, clean=0.9):
    return dict(accuracy=accuracy, ci95=[accuracy - 0.1, accuracy + 0.1], n=50, clean=clean,
                distance=10 * accuracy)

def test_rows_of_several_results_files(folder):
    """One table: a row per data set and part, a column per method, the paper's row under it where
    it forgot the same, and alone where a row of the paper is asked for."""
    both = dict(D_g=restored(0.5), D_f=restored(0.25, 0.8))
    nll = dict(D_g=2.5, D_f=9.0, n=dict(D_g=9, D_f=9), se=dict(D_g=0.1, D_f=0.5))
    config = dict(sde="vp", forget="automobile,dog", training="finetune", seed=3)
    methods = dict(mine=dict(inpaint=both, nll_bits_per_dim=nll), unseen=dict(inpaint=both),
                   standard=dict(nll_bits_per_dim=nll))
    common = dict(command="python sgu.py", device="a CPU", judge={}, config=config, data="cifar10")
    write_results(folder, "cifar", dict(common, methods=methods))
    other = dict(config, forget="dog", training="retrain")
    write_results(folder, "other", dict(common, methods=dict(unseen=methods["unseen"]),
                                        config=other))
    got = make.rows_table("inpaint", "cifar", "other", "stl10,vp")
    assert got.split("\n\n")[0].splitlines() == [
        "|  | Standard | SGU-Orthogonal | SGU-Obtuse | Unseen | mine |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| CIFAR-10, VP, D_g |  |  |  | 50.0 [40.0, 60.0] | 50.0 [40.0, 60.0] |",
        "| the paper's | 72.5 | 75.5 | 74.7 | 75.8 |  |",
        "| CIFAR-10, VP, D_f |  |  |  | 25.0 [15.0, 35.0] | 25.0 [15.0, 35.0] |",
        "| the paper's | 75.0 | 57.2 | 49.6 | 59.7 |  |",
        "| CIFAR-10, VP, re-trained, D_g |  |  |  | 50.0 [40.0, 60.0] |  |",
        "| CIFAR-10, VP, re-trained, D_f |  |  |  | 25.0 [15.0, 35.0] |  |",
        "| STL-10, VP, D_g, the paper's | 83.4 | 83.6 | 83.1 | 84.5 |  |",
        "| STL-10, VP, D_f, the paper's | 84.1 | 59.5 | 50.3 | 54.9 |  |"]
    for words in ("CIFAR-10, VP: `python sgu.py`; a CPU; seed 3. Inpaint: 50 and 50 test images of "
                  "D_g and D_f, of which the judge names 90.0% and 80.0% correctly when untouched;",
                  "The paper's: Table 3. In Tables 3 and 4"):
        assert words in got
    assert "CLIP, zero-shot" not in got and "NLL" not in got
    assert make.rows_table("inpaint-distance", "cifar").splitlines()[2:5] == [
        "| CIFAR-10, VP, D_g |  |  |  | 5.00 | 5.00 |",
        "| the paper's | 6.80 | 6.80 | 6.77 | 6.72 |  |",
        "| CIFAR-10, VP, D_f |  |  |  | 2.50 | 2.50 |"]
    nlls = make.rows_table("nll", "cifar")
    row = "| CIFAR-10, VP, D_f | 9.00 ± 0.50 |  |  |  | 9.00 ± 0.50 |"
    assert f"{row}\n| the paper's | 2.91 | 10.36 | 14.96 | 2.95 |  |" in nlls
    assert "The paper's: Table 5. The paper measured so" in nlls
    assert make.filled("<!-- rows: inpaint cifar other stl10,vp --><!-- end -->", "page", []) == (
        f"<!-- rows: inpaint cifar other stl10,vp -->\n{got}\n<!-- end -->")

# ==== Results files that today's code would not make ==============================================

@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("argv", [
    "", "--dataset mnist --sde ddpm --sampler ancestral", "--dataset mnist --methods relative",
    "--dataset cifar10 --training retrain --methods obtuse,unseen --steps 50 --precision float32",
    "--dataset cifar10 --forget 9,8 --likelihood-samples 3",
    "--dataset stl10.npz --forget airplane --samples 7 --lr 0.01 --batch-size 3 --seed 4",
    "--dataset celeba.npz --forget Bangs --device cuda --sampler em --alpha 0.5 --compile"])
def test_what_the_command_would_fill_in(argv, fast, monkeypatch):
    """Without any data: the same as resolve with data of the same name and size."""
    names = "0 1 2 3 4 5 6 7 automobile dog airplane Bangs".split()
    opt = sgu.parse_options(argv.split())
    channels, side = dict(glyphs=(1, 28), mnist=(1, 28), cifar10=(3, 32)).get(opt.dataset, (3, 64))
    images = torch.zeros(24, channels, side, side, dtype=torch.uint8)
    labels = torch.arange(24) % 12
    name = opt.dataset.removesuffix(".npz")
    data = dict(name=name, classes=names, train=images, train_labels=labels, test=images,
                test_labels=labels)
    machine = "a machine" + ", bfloat16" * fast
    monkeypatch.setattr(sgu, "load_data", lambda name, root: data)
    monkeypatch.setattr(sgu, "describe", lambda device: machine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: opt.device == "cuda")
    config = json.loads(json.dumps(vars(sgu.resolve(opt)[0])))
    results = dict(data=name, config=config, device=machine)
    want = json.loads(json.dumps(stale.of_command(results, argv.split())))
    methods = want.pop("methods")
    assert stale.differences(want, results) == []
    assert set(want["config"]) >= set(config) - {"out", "data_root", "fresh", "checksum", "forget"}
    assert list(methods) == config["methods"].split(",")

def test_a_finished_run_is_fresh(finished, small, monkeypatch):
    """Until a preset, a method, or what it says of itself changes."""
    monkeypatch.setitem(stale.IMAGES, "shapes", (1, 8))
    results = results_of(finished[0])
    assert stale.why_stale(results) == ""
    method, presets = sgu.METHODS["obtuse"], tiny_presets
    for words, change in (
            ("methods obtuse recipe alpha is 0.95, today 0.5", dict(alpha=0.5)),
            ("methods obtuse recipe lr is 0.02, today 0.01", dict(pace=0.5)),
            ("methods obtuse recipe window is [0.2, 6.0], today [0.0, 7.0]",
             dict(window=(0.0, 7.0)))):
        with monkeypatch.context() as patch:
            patch.setitem(sgu.METHODS, "obtuse", method._replace(**change))
            assert stale.why_stale(results) == words
    for words, change in (
            ("config judge_steps is 8, today 9", dict(judge_steps=9)),
            ("config network channels is [8, 16], today [8, 32]", dict(channels=(8, 32))),
            ("config noise_law is", dict(noise_law=(0.0, 2.0, 4)))):
        with monkeypatch.context() as patch:
            patch.setattr(sgu, "PRESETS", tiny_presets(**change))
            assert stale.why_stale(results).startswith(words)
    for words, change in (
            ("config precision is bfloat16, today float32", dict(precision="bfloat16")),
            ("config steps is 9, today 8", dict(steps=9)),
            ("config seed is not recorded", dict(seed="unknown")),
            ("config methods is standard, today standard,obtuse", dict(methods="standard"))):
        other = copy.deepcopy(results)
        other["config"].update(change)
        assert stale.why_stale(other) == words
    for words, change in (("a results file of old", dict(methods={})),
                          ("methods obtuse is not recorded", dict(methods=dict(standard={})))):
        assert "not recorded" in stale.why_stale(results | change), words
    command = results["command"]
    for words, change in (("UsageError: ", command + " --weighting paper"), ("StopIteration", ""),
                          ("images of other is not known", command.replace("shapes", "other"))):
        assert words in stale.why_stale(results | dict(command=change))

def test_shares_and_paces_are_of_the_preset(monkeypatch):
    """Nothing stated: 9% of 1000 steps at half the rate on the way from Standard; all of them from
    nothing; 600 on a machine without bfloat16."""
    row = dict(channels=(8, 16), blocks=1, patch=2, data_std=1.0, noise_law=(0.2, 1.1, 8),
               sampler="ode", steps=1000, lr=0.01)
    row = tuple(row.get(column, 5) for column in sgu.COLUMNS)
    monkeypatch.setattr(sgu, "PRESETS", {(28, "cpu"): row})
    monkeypatch.setitem(sgu.METHODS, "obtuse", sgu.Method(
        "mine", sgu.obtuse_loss, 0.7, share=0.09, pace=0.5, window=(0.1, 2.0)))
    def recipe(machine, *words):
        made = dict(config=dict(device="cpu"), device=machine)
        argv = ["--dataset", "mnist", "--methods", "obtuse", *words]
        return stale.of_command(made, argv)["methods"]["obtuse"]["recipe"]
    usual = dict(alpha=0.7, steps=90, lr=0.005, window=(0.1, 2.0))
    assert recipe("x, bfloat16") == usual and recipe("x") == usual | dict(steps=54)
    assert recipe("bfloat16", "--training", "retrain") == usual | dict(steps=1000, lr=0.01)
    assert recipe("bfloat16", "--recipe", "paper")["window"] == sgu.EVERY_SIGMA
    assert recipe("bfloat16", "--alpha", "0.3", "--unlearn-steps", "7") == usual | dict(
        alpha=0.3, steps=7)

def test_table_of_seeds(monkeypatch):
    """Mean and standard deviation (n - 1) over files that differ in their seed alone."""
    def made(seed, total, steps=5):
        nll = dict(D_g=2.0 + seed, D_f=3.0, se=dict(D_g=0.1, D_f=0.1))
        entry = dict(unlearning_ratio=dict(total=total, n=50), unsure=0.1, frechet_kept=4.0,
                     nll_bits_per_dim=nll)
        return dict(methods=dict(standard=entry),
                    config=dict(seed=seed, steps=steps, out=str(seed)),
                    command=f"python sgu.py --seed {seed}", device="a CPU")
    first = made(0, 0.1)
    first["methods"]["finetune"] = {}                          # the others lack it
    files = {"0": first, "1": made(1, 0.2), "2": made(2, 0.3), "3": made(3, 0.3, steps=6)}
    monkeypatch.setattr(make, "read_results", files.get)
    lines = make.seeds_table("0", "1", "2").splitlines()
    assert "| in all, % | 20.0 ± 10.0 |" in lines
    assert "| NLL D_g, bits/dim | 3.00 ± 1.00 |" in lines
    assert "| none of these or unsure, % | 10.0 ± 0.0 |" in lines
    assert "seeds 0, 1, 2" in lines[-1] and "n = 50" in lines[-1] and "--seed 2" in lines[-1]
    with pytest.raises(ValueError, match="steps"):
        make.seeds_table("0", "3")

def test_what_section_7_says_of_its_parts():
    """The distances in sgu.py are those of the results file."""
    rows = {row["change"]: row for row in make.read_results("recipe-mnist-3,7")["rows"]}
    header = inspect.getsource(sgu).split("# ==== 7.")[1].split("DIGIT_NOISE")[0]
    found = re.findall(r"\[([\d.]+)|it is ([\d.]+) \(", header)
    assert [a or b for a, b in found] == [f"{rows[change]['frechet_kept']:.1f}" for change in (
        "ours", "t uniform", "the paper's weights", "Adam for all weights", "float32, same time")]

@pytest.mark.parametrize("name", ["toy", "mnist", "recipe", "samplers"])
def test_a_comparison_is_fresh(name, monkeypatch, tmp_path):
    """The real layout of rivals.py's results, with trials that cost nothing."""
    shipped = make.read_results("mnist-3,7")["methods"]
    def entry(method, how):
        opt = sgu.Options(training=how.get("training", "finetune"))
        recipe = stale.recipe_of(method, opt, 1500 if how.get("change") != "float32, same time"
                                 else 900, 4e-3)
        if "pretrained" in how and method == "standard":       # then it is the shipped network
            recipe = shipped[pathlib.Path(how["pretrained"]).stem.removeprefix("mnist_")]["recipe"]
        return dict(unlearning_ratio=dict(total=0.5, n=10), frechet_all=1.0, energy_all=1.0,
                    recipe=recipe)
    def trials(trial, jobs, out):
        return {key: dict(judge={}, methods={m: entry(m, how) for m in (
            how.get("methods") or how["method"]).split(",")}) for key, how in jobs.items()}
    monkeypatch.setattr(rivals, "attempt_all", trials)
    monkeypatch.setattr(rivals, "halves", lambda opt: [{}, {}])
    monkeypatch.setattr(rivals, "toy_job", lambda opt, method, *how: dict(method=method))
    opt = types.SimpleNamespace(out=tmp_path, quick=False, seeds=[0, 1, 2])
    made = json.loads(json.dumps(rivals.EXPERIMENTS[name][0](opt)))
    made.update(command=f"python notebooks/rivals.py {name}", device="a CPU")
    assert stale.why_stale(made) == ""
    changes = dict(toy=("SIZE", dict(rivals.SIZE, toy=dict(rivals.SIZE["toy"], steps=499))),
                   mnist=("SETTINGS", dict(rivals.SETTINGS, mnist=dict(
                       rivals.SETTINGS["mnist"], fisher=((0.1, 0.5, (0, 6)),) * 3))),
                   recipe=("RECIPE", dict(rivals.RECIPE, samples=1)),
                   samplers=("WALKS", [("em", 7)]))
    words = dict(toy="config steps is 500, today 499", mnist="tuning fisher 0 alpha is 0.95, today",
                 recipe="config samples is 1000, today 1",
                 samplers="config samplers is [['em', 15]")
    with monkeypatch.context() as patch:
        patch.setattr(rivals, *changes[name])
        assert stale.why_stale(made).startswith(words[name])
    with monkeypatch.context() as patch:
        patch.setitem(sgu.METHODS, "unseen", sgu.METHODS["unseen"]._replace(window=(1.0, 2.0)))
        assert ("recipe window is" in stale.why_stale(made)) == (name == "recipe")
    other = dict(shipped, unseen=dict(recipe=dict(shipped["unseen"]["recipe"], steps=7)))
    monkeypatch.setattr(stale, "read_results", lambda name: dict(methods=other))
    assert (f"steps is {shipped['unseen']['recipe']['steps']}, today 7" in stale.why_stale(made)
            ) == (name in ("mnist", "samplers"))

def test_flips_are_fresh(monkeypatch):
    """The preset of 64 pixels trains Standard."""
    steps, lr = (dict(zip(sgu.COLUMNS, sgu.PRESETS[64, "cpu"]))[key] for key in ("steps", "lr"))
    recipe = dict(alpha=None, steps=steps, lr=lr, window=sgu.EVERY_SIGMA)
    made = json.loads(json.dumps(dict(
        command="python notebooks/rivals.py flips", config=rivals.FLIPS,
        rows=[dict(recipe=recipe, change=str(i)) for i in (0, 1)])))
    assert stale.why_stale(made) == ""
    monkeypatch.setattr(rivals, "FLIPS", dict(rivals.FLIPS, samples=7))
    assert stale.why_stale(made) == "config samples is 2000, today 7"

def test_the_toy_is_fresh(monkeypatch):
    made = make.read_results("toy")
    assert stale.why_stale(made) == ""
    monkeypatch.setitem(toy_gmm.METHODS, "obtuse", toy_gmm.METHODS["obtuse"]._replace(alpha=0.3))
    assert stale.why_stale(made) == "methods obtuse alpha is 0.8, today 0.3"

def test_what_a_notebook_wrote_bears_its_code(folder, monkeypatch):
    """And is stale when the code changes, but not when the text or an output does."""
    path = folder / "08_x.ipynb"
    def write(code, text="", output=""):
        cells = [dict(cell_type="markdown", source=[text]),
                 dict(cell_type="code", source=["a\n", code], outputs=[output])]
        path.write_text(json.dumps(dict(cells=cells)), encoding="utf-8")
    write("b")
    found = dict(command="notebooks/08_x.ipynb")
    write_results(folder, "new", found)
    write_results(folder, "x-mnist", found)
    write_results(folder, "old", found)
    os.utime(folder / "results/old.json", (1000, 1000))
    assert stale.why_stale(found) == "it does not say which code made it"
    stale.sign(path, 2000)
    new, old = make.read_results("new"), make.read_results("old")
    assert set(new) == {"command", "code"} and old == found
    assert make.read_results("a,b.c") == FOUND, "another file than the notebook's was signed"
    assert stale.why_stale(new) == ""
    write("b", "text", "output")
    assert stale.why_stale(new) == ""
    monkeypatch.setattr(sgu, "PRESETS", {})
    assert stale.why_stale(new) == ""
    write("c")
    changed = "notebooks/08_x.ipynb has changed since, or what it uses"
    assert stale.why_stale(new) == changed
    write("preset")
    with_presets = dict(found, code=stale.fingerprint(path, ""))
    monkeypatch.setattr(sgu, "PRESETS", {("glyphs", "cpu"): 2})        # no script trains on these
    assert stale.why_stale(with_presets) == ""
    monkeypatch.setattr(sgu, "PRESETS", {(28, "cpu"): 2})
    assert stale.why_stale(with_presets) == changed
    write("b")
    of_networks = make.read_results("x-mnist")
    assert stale.why_stale(new) == stale.why_stale(of_networks, "x-mnist") == ""
    (folder / "results/mnist_x.pt").write_bytes(b"another")
    assert stale.why_stale(new) == "" and stale.why_stale(of_networks, "x-mnist") == changed

@pytest.mark.parametrize("text, quoted", [
    ("see `results/a,b.json`", True), ("<!-- results: a,b --><!-- end -->", True),
    ("<!-- rows: inpaint x a,b y --><!-- end -->", True), ("![](<results/a,b-inpaint.png>)", True),
    ("<!-- number: a,b key.key .1f --><!-- end -->", True), ("![](results/a,b.png)", True),
    ("a,b-ddpm.json, c-a,b.json, x.a,b.json", False), ("a,b is a name, a,b.jsonl too", False),
    ("<!-- results: a,b-ddpm --><!-- end --> a,b", False), ("a,b-ddpm-inpaint.png", False)])
def test_stale_says_where_it_is_quoted(folder, monkeypatch, capsys, text, quoted):
    """A line for every stale file; exit code 1 if a page names it."""
    page = folder / "README.md"
    monkeypatch.setattr(stale, "PAGES", [page])
    page.write_text(f"# A page\n{text}\n", encoding="utf-8")
    (folder / "results/a,b.c.json").unlink()
    write_results(folder, "a,b", dict(command="python sgu.py --no-such-option"))
    with pytest.raises(SystemExit) as stop:
        make.main(["stale"])
    said = capsys.readouterr().out
    assert said.startswith("a,b.json: today's code cannot read how it was made (UsageError: ")
    assert (stop.value.code == 1) == ("[quoted in notebooks/README.md]" in said) == quoted

# ==== Exercises ===================================================================================

def test_the_oracle_itself():
    """The closed-form score is the gradient of the closed-form log p_t, which integrates to 1."""
    for a, s in ((1., 0.3), (0.4, 0.9)):
        x = (2 * torch.randn(50, 2, generator=seeded(), dtype=F64)).requires_grad_()
        grad, = torch.autograd.grad(TILTED.log_prob(x, a, s).sum(), x)
        fixed = types.SimpleNamespace(marginal=lambda t: (a * torch.ones_like(t),
                                                          s * torch.ones_like(t)))
        expect(TILTED.score(fixed)(x.detach(), torch.zeros(50)), grad, "mixture score", 1e-10)
        u = torch.linspace(-8, 8, 401, dtype=F64)
        total = TILTED.log_prob(torch.cartesian_prod(u, u), a, s).exp().sum() * (u[1] - u[0]) ** 2
        expect(total, 1., "integral of p_t", 1e-8)

needs_sources = pytest.mark.skipif(not grade.SOURCES, reason="exercises/src is not here")
of_every_exercise = pytest.mark.parametrize("source", grade.SOURCES,
                                            ids=[s.stem for s in grade.SOURCES])

@pytest.fixture
def no_record(monkeypatch):
    monkeypatch.setattr(marking, "RECORDED", {})

def test_predictions(no_record, capsys):
    """A prediction is on record, with a reason, before the run; who is wrong learns nothing."""
    reason = "since it grows with t"
    for said in ("b", " B.", "(b)", "b: it grows", "b) it grows", "b: it is a lot, as s/a is"):
        assert marking.record("3.4", said, reason) == "b"
    assert "3.4: on record before the run: b, because: since it grows" in capsys.readouterr().out
    for said in (1.04, torch.tensor(1.04), np.float32(1.04), np.array([1.04])):
        marking.RECORDED.clear()
        assert math.isclose(marking.record("1.4", said, reason, number=True), 1.04, rel_tol=1e-6)
    for said, why, number, words in (
            ("d", reason, False, "letters"), (3, reason, False, "letters"),
            ("a lot", reason, False, "letters"), ("ab", reason, False, "letters"),
            *((said, reason, False, "letters") for said in (
                "a, b or c", "a, c", "a) or b)", "b, a", "(a), (b)", "c: or a or b")),
            *(("b", why, False, "of three words or more") for why in (
                "because", "1234567", "xxxxxxx", "ha ha ha ha", "and why, in a sentence",
                "# and why, in a sentence or two", "why must a report have this column?")),
            ("b", "", False, "why_9_2"), ("b", " .... ", False, "why_9_2"),
            ("b", None, False, "why_9_2"), ("b", "?", False, "earns nothing"),
            ("1", reason, True, "a number"), (math.nan, reason, True, "a number"),
            (torch.ones(2), reason, True, "a number"), ((0, 16), reason, True, "not a comma")):
        with pytest.raises(AssertionError, match=words):
            marking.record("9.2", said, why, number)
    assert "9.2" not in marking.RECORDED
    for why in ("\u566a\u58f0\u5927\u65f6\u770b\u5230\u7684\u90fd\u662f\u566a\u58f0",
                "\u0448\u0443\u043c \u043e\u0447\u0435\u043d\u044c \u0441\u0438\u043b\u0435\u043d"):
        assert marking.record("2.4", "a", why) == "a"
    for said in ("", " ", None):
        with pytest.raises(NotImplementedError, match="question 9.2"):
            marking.record("9.2", said, reason)
    marking.record("3.4", "b", reason)
    with pytest.raises(AssertionError, match="predicted b before, now c: change .* in why_3_4"):
        marking.record("3.4", "c", reason)
    assert marking.record("3.4", "c", reason + "^2") == "c"
    marking.compare("8.4", 1.04, 1, 0.05)
    marking.compare("3.4", "b", "b", full=1, half=2)
    assert "Right: the spread is 1.00 with the score" in capsys.readouterr().out
    for said, measured, tol, percent in (
            ("a", "b", None, False), (1.06, 1, 0.05, False), (16, 0.16, 0.05, True),
            (0.44, 0.00444, 0.0003, True), (0.02, 0.00444, 0.0003, False)):
        with pytest.raises(AssertionError, match=f"you predicted {said}, and the run") as error:
            marking.compare("8.4", said, measured, tol)
        assert ("percentage" in str(error.value)) == percent
        assert str(measured) not in str(error.value).replace(f"predicted {said}", "").split()

def test_planted_bugs():
    """A point for the line, the others for the function; why it fails is for the finder."""
    def outcome(line, right):
        try:
            with marking.planted_bug(line, "3.3"):
                expect(2. if right else 1., 2., "what comes out", mistakes={"it is halved": 1.})
        except AssertionError as error:
            return marking.points(error, 3), str(error)
        return 3, "passed"
    for line in (4, "4", 4.0, "# line 4", 3):
        assert outcome(line, True) == (3, "passed")
    for line, words in ((5, "line 5 was not"), (0, "put the number"), ("", "put the number"),
                        ("4 or 5", "put the number")):
        earned, said = outcome(line, True)
        assert earned == 2 and words in said and "the function is right" in said
    assert outcome(0, False) == (0, "what comes out: 1, not 2; which line is to blame? put its "
                                    "number into line_3_3")
    assert outcome(1, False) == (0, "what comes out: 1, not 2; which line is to blame? line 1 is "
                                    "not")
    assert outcome(4, False) == (1, "what comes out: 1, not 2: it is halved")
    for line, earned in ((4, 1), (5, 0)):
        with pytest.raises(TypeError) as error, marking.planted_bug(line, "3.3"):
            raise TypeError
        assert marking.points(error.value, 3) == earned
    error = TypeError()
    for error.earned in (2, 1000, -1):         # an error of a student's own
        assert marking.points(error, 3) == 0

def test_a_check_has_torch_as_it_starts(capsys):
    """In Jupyter, too, what a student has set for all of torch is off during a check, and no more
    than that."""
    try:
        torch.set_default_dtype(F64)
        with torch.no_grad():
            with marking.marked("10.2", 4):
                assert torch.ones(1).dtype == torch.float32 and torch.is_grad_enabled()
            assert torch.ones(1).dtype == F64 and not torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
    assert capsys.readouterr().out == ""

@of_every_exercise
def test_exercise(source, monkeypatch, no_record):
    """Every unfilled cell and planted bug fails its check in the right words; solutions pass; a
    wrong prediction, or one without a reason, earns nothing and is told nothing."""
    monkeypatch.chdir(HERE / "exercises")
    monkeypatch.setenv("SGU_QUICK", "1")
    space, versions = {"__name__": "__main__"}, {}
    for cell in make.read_source(source):
        if cell["kind"] == "setup":
            grade.run_cell(cell["text"], space, source.name)
        elif cell["kind"] in ("student", "solution"):
            versions[cell["kind"]] = cell
        elif cell["kind"] == "check":
            question, check, worth = cell["question"], cell["text"], cell["points"]
            student, solution = versions.pop("student"), versions.pop("solution")
            assert student["question"] == solution["question"] == question
            name, bug = question.replace(".", "_"), student["words"]
            def run(text, more=""):
                return grade.run_step(question, [(True, text + more)], check, space, worth)
            got = run(student["text"])
            if bug:
                first = marking.BUG_LINES[question][0]
                blame = f"which line is to blame? put its number into line_{name}"
                assert got[0] == 0 and got[1].endswith(blame), f"{question}: {got}"
                got = run(student["text"], f"\nline_{name} = {first}")
                assert got[0] == 1 and bug in got[1], f"{question}, with its line: {got}"
                got = run(solution["text"], f"\nline_{name} = 0")
                assert got[0] == worth - 1 and "is right" in got[1], f"{question}: {got}"
                pairs = zip(student["text"].splitlines(), solution["text"].splitlines())
                changed = [a for a, b in pairs if a != b]
                assert len(changed) == 2 and changed[0].endswith(f"# line {first}"), changed
            else:
                assert got == (0, "not answered yet"), f"{question}, as handed out: {got}"
            if f"why_{name}" in solution["text"]:
                got = run(solution["text"], f"\nwhy_{name} = ''")
                assert got[0] == 0 and f"why_{name}" in got[1], f"{question}: {got}"
                kind = "choice" if f"choice_{name}" in solution["text"] else "guess"
                wrong, told = ("'a'", "'b'", "'c'") if kind == "choice" else ("-7.5", "1234"), []
                for said in wrong:
                    marking.RECORDED.clear()
                    got = run(solution["text"], f"\n{kind}_{name} = {said}")
                    told.append(got[1].replace(said.strip("'") + ",", ","))
                    assert got[0] == 0 or got == (worth, "passed"), f"{question}: {got}"
                assert len(set(told) - {"passed"}) == 1, f"{question} tells more: {told}"
                assert told.count("passed") == (kind == "choice"), f"{question}: {told}"
                marking.RECORDED.clear()
            got = run(solution["text"])
            assert got == (worth, "passed"), f"solution of question {question}: {got}"
    assert not versions, "a question has no check"

MENDS = [                                      # question, line, what stands there, what is right
    ("1.5", 6, "abar[k - 1]", "abar[k - 1].sqrt()"), ("1.5", 8, "a.to(t)", "a.sqrt().to(t)"),
    ("3.3", 4, "score(x, tb)", "score(x, tb) / 2"),
    ("3.3", 3, "sde.diffusion(t))", "sde.diffusion(t)) / 2 ** 0.5"),
    ("4.4", 6, "math.log(2))", "math.log(2)) + 7"),
    ("4.4", 5, "generator=generator)", "generator=generator) - y[0].numel() * math.log(128)"),
    ("5.2", 4, "u = (x_t - a * x0)", "u = (a * x0 - x_t)"),
    ("5.2", 5, "s ** 2 * score", "-s ** 2 * score"),
    ("5.2", 6, "return product", "return -product"),
    ("5.3", 6, "product.square().flatten(1).mean(1)", "product.flatten(1).mean(1).square()"),
    ("5.3", 5, "s ** 2 * value * u", "(s ** 2 * value * u).mean((1, 2, 3), keepdim=True)"),
    ("6.2", 15, "ema_decay", "min(ema_decay, (1 + n) / (10 + n))"),
    ("6.2", 18, "average.mul_(d).add_((1 - d) * p)",
     "average.lerp_(p, 1 - min(d, (1 + n) / (10 + n)))"),
    ("7.2", 5, "noised(grid[0])",
     "torch.where(known, noised(grid[0]), sde.prior_sample(x.shape, generator))"),
    ("7.2", 3, "sde.at(t)[0] * x", "sde.at(t)[0] * torch.where(known, x, torch.zeros_like(x))"),
    ("7.2", 2, "expand_as(x)", "expand_as(x); x = torch.where(known, x, torch.zeros_like(x))"),
    ("7.2", 4, "steps)", "steps); x = torch.where(known, x, torch.zeros_like(x))"),
    ("8.3", 6, "~hit", "~hit & sure"), ("8.3", 7, "share(kept)", "share(kept & sure)")]

@needs_sources
@pytest.mark.parametrize("question, line, old, new", MENDS,
                         ids=[f"{question} line {line}" for question, line, _, _ in MENDS])
def test_a_bug_mended_in_any_line(question, line, old, new, monkeypatch):
    """Each line that is accepted can be mended, alone, for full points."""
    monkeypatch.chdir(HERE / "exercises")
    monkeypatch.setenv("SGU_QUICK", "1")
    cells = make.read_source(grade.SOURCES[int(question[0]) - 1])
    student, check = (next(c for c in cells if c["question"] == question and c["kind"] == kind)
                      for kind in ("student", "check"))
    lines = student["text"].splitlines()
    place, = (i for i, text in enumerate(lines) if text.endswith(f"# line {line}"))
    code, comment = lines[place].rsplit("  #", 1)
    assert code.count(old) == 1
    lines[place] = code.replace(old, new) + "  #" + comment
    said = f"line_{question.replace('.', '_')} = {line}"
    setup = "import math\nimport torch\nimport sgu\nimport checks\nimport marking\n" \
            "from checks import F64, SDES\ndef draw(images, n, generator):\n" \
            "    return sgu.dequantise(images[torch.randint(len(images), (n,), " \
            "generator=generator)], generator)\n"
    answer = setup + "\n".join(lines) + "\n" + said
    got = grade.run_step(question, [(True, answer)], check["text"], {}, check["points"])
    assert got == (check["points"], "passed")

def test_every_accepted_line_is_mended_above():
    assert sorted((q, line) for q, lines in marking.BUG_LINES.items() for line in lines) == sorted(
        (q, line) for q, line, _, _ in MENDS)

def obtuse_of(mean, x_t=lambda a, s, x0, z: a * x0 + s * z):
    """A student's obtuse loss with another mean over pixels, or with another x_t."""
    def loss(score, sde, x0, t, z):
        a, s = (sgu.per_sample(v, x0) for v in sde.marginal(t))
        return mean(-s * score(x_t(a, s, x0, z), t) * z)
    return loss

def orthogonal_of(product, x_t=lambda a, s, x0, z: a * x0 + s * z):
    """A student's orthogonal loss."""
    return obtuse_of(lambda v: product(v.flatten(1).mean(1)).square().mean(), x_t)

def total(score, sde, x_g, x_f, alpha, forget_loss, generator):
    """A student's right answer to question 5.4."""
    keep = sgu.score_matching_loss(score, sde, x_g, generator=generator)
    return alpha * keep + (1 - alpha) * forget_loss(score, sde, x_f, generator=generator)

def swapped(score, sde, x_g, x_f, *args, **kw):
    return total(score, sde, x_f, x_g, *args, **kw)

def as_float(*args, **kw):
    return float(total(*args, **kw).detach())

def unseeded(score, sde, x_g, x_f, alpha, forget_loss, generator):
    keep = sgu.score_matching_loss(score, sde, x_g)
    return alpha * keep + (1 - alpha) * forget_loss(score, sde, x_f, generator=generator)

def keep_detached(score, sde, x_g, x_f, alpha, forget_loss, generator):
    keep = sgu.score_matching_loss(score, sde, x_g, generator=generator).detach()
    return alpha * keep + (1 - alpha) * forget_loss(score, sde, x_f, generator=generator)

def forgets_by(**given):
    """A student's sgu_loss that hands another score or schedule on to the forget loss."""
    def loss(score, sde, x_g, x_f, alpha, forget_loss, generator):
        keep = sgu.score_matching_loss(score, sde, x_g, generator=generator)
        score, sde = given.get("score", score), given.get("sde", sde)
        return alpha * keep + (1 - alpha) * forget_loss(score, sde, x_f, generator=generator)
    return loss

def vp_by_integral(t):
    """A student's marginal that knows expm1, and loses the digits before it."""
    def integral(t):                           # from some place to t
        return 1 + 0.1 * t + 9.95 * t ** 2
    log_a = -(integral(t) - integral(0 * t)) / 2
    return log_a.exp(), (-torch.expm1(2 * log_a)).sqrt()

def report_of(threshold, classes=None):
    """A student's judge report with another threshold, or that always forgets the same classes."""
    def report(probs, forget):
        hit = torch.isin(probs.argmax(1), torch.tensor(classes or forget))
        sure = probs.amax(1) >= threshold
        shares = dict(ratio=hit, unsure=~sure, kept=~hit & sure)
        return {name: float(share.float().mean()) for name, share in shares.items()}
    return report

def noise_is_kept(probs, forget):
    right = report_of(0.5)(probs, forget)
    return right | dict(kept=1 - right["ratio"])

def frechet_by(turn, dtype=F64):
    """A student's Frechet distance whose matrix roots are turn(V) diag turn(V)^T."""
    def root(c):
        values, axes = torch.linalg.eigh(c)
        return turn(axes) @ torch.diag(values.clamp(min=0).sqrt()) @ turn(axes).T
    def distance(f, h):
        c, d = torch.cov(f.to(dtype).T), torch.cov(h.to(dtype).T)
        cross = root(root(c) @ d @ root(c))
        between = (f.to(dtype).mean(0) - h.to(dtype).mean(0)).square().sum()
        return between + c.trace() + d.trace() - 2 * cross.trace()
    return distance

def heun_with(**mistake):
    """A student's log-likelihood by Heun's method with one of the mistakes of heun_likelihood."""
    return lambda score, sde, x, steps: checks.heun_likelihood(x, sde, steps, **mistake)

def wilson_of(spread=lambda root, m: root / m, unit=1., clip=True):
    """A student's interval whose 1.96 times the root is brought to size by spread, in a unit."""
    def wilson(k, n, z=1.959964):
        m = n + z * z
        half = spread(z * math.sqrt(k * (n - k) / n + z * z / 4), m)
        ends = [(k + z * z / 2) / m - half, (k + z * z / 2) / m + half]
        return [unit * min(max(end, 0.), 1.) if clip else unit * end for end in ends]
    return wilson

def inpaint_of(start=torch.zeros_like, go_on=1., generator=0):
    """A student's inpainting, which sees start of the hidden pixels and goes on with a share of
    those after a step."""
    def inpaint(score, sde, x, mask, steps, generator):
        g = generator if inpaint.seeded else None
        known, grid = mask.bool().expand_as(x), sgu.time_grid(sde, steps)
        x = torch.where(known, x, start(x))
        y = sgu.add_noise(sde, x, 1.0, g)
        for t, t_next in zip(grid, grid[1:]):
            y = go_on * sgu.reverse_step(score, sde, y, t, t_next, g)
            y = torch.where(known, sgu.add_noise(sde, x, t_next, g), y)
        return torch.where(known, x, sgu.denoise(score, sde, y, grid[-1]))
    inpaint.seeded = generator is not None
    return inpaint

def turned_of(half=0.5, rise=2., sign=1, dims=lambda d: d, width=0.3):
    """A student's log p of the turned Gaussian, with mistakes; tanh rises by 2 to nine digits."""
    def log_p(x, strength):
        Q = half * math.log(400.25 / 0.2501) - strength * rise * width
        return SDES["VE"].prior_log_prob(math.exp(Q) * x) + sign * dims(x.shape[1]) * Q
    return log_p

def refine_of(error=lambda fine, coarse: (fine - coarse).abs().mean() / 15, again=False,
              believe=lambda error, tolerance: error <= tolerance, limit=lambda most: most):
    """A student's refinement loop."""
    def refine(values_at, tolerance, first=16, most=512):
        steps, fine, found, converged = first, values_at(first), math.inf, False
        while not converged and 2 * steps <= limit(most):
            steps, coarse = 2 * steps, values_at(steps) if again else fine
            fine = values_at(steps)
            found = float(error(fine, coarse))
            converged = believe(found, tolerance)
        return dict(values=fine, steps=steps, error=found, converged=converged)
    return refine

def fine_first(values_at, tolerance, first=16, most=512):
    """A student's refinement that asks for the finer of its first two values first."""
    known = {2 * first: values_at(2 * first)}
    def look_up(steps):
        if steps not in known:
            known[steps] = values_at(steps)
        return known[steps]
    return refine_of()(look_up, tolerance, first, most)

def one_by_one(loss, together=lambda values: sum(values) / len(values)):
    """A student's loss that asks the score about each image by itself."""
    def by_image(score, sde, x0, t, z):
        return together([loss(score, sde, x0[i:i + 1], t=t[i:i + 1], z=z[i:i + 1])
                         for i in range(len(x0))])
    return by_image

def noise_of(z=lambda x, g: torch.randn(x.shape, generator=g), shape=lambda x: (len(x), 1, 1, 1),
             shades=1., strengths=2., limit=1.):
    """A student's images of noise."""
    def noise(x, g):
        shade, strength = torch.rand(2, *shape(x), generator=g)
        made = shades * (2 * shade - 1) + strengths * strength * z(x, g)
        return made.clamp(-limit, limit)
    return noise

def uniform(x, g):
    return 2 * torch.rand(x.shape, generator=g) - 1

def patched(order, turn=False):
    """A student's shuffled patches."""
    def shuffled(x, g):
        patches = x.reshape(-1, 4, 7, 4, 7).transpose(2, 3).reshape(-1, 16, 7, 7)[:, order(g)]
        patches = patches.transpose(2, 3) if turn else patches
        return patches.reshape(-1, 4, 4, 7, 7).transpose(2, 3).reshape(x.shape)
    return shuffled

def by_chance(g):
    return torch.randperm(16, generator=g)

def none_every(step, label=10, copies=True, images=uniform):
    """A student's batch in which every so many images are none of the digits."""
    def with_none(x, y, g):
        x, y = (x.clone(), y.clone()) if copies else (x, y)
        x[::step] = images(x[::step], g)
        y[::step] = label
        return x, y
    return with_none

def measure_of(digit=lambda p: p.argmax(1) < 10, right=lambda hit, refused: hit.mean()):
    """A student's shares of a judge."""
    def measure(real, labels, fake):
        hit, refused = (real.argmax(1) == labels).float(), (real.argmax(1) == 10).float()
        return dict(accuracy=float(right(hit, refused)), refused=float(refused.mean()),
                    false=float(digit(fake).float().mean()))
    return measure

VE, VP = SDES["VE"], SDES["VP"]
NOISY, CLEAN, BARE = (lambda a, s, x0, z: x0 + s * z), (lambda a, s, x0, z: a * x0), (
    lambda a, s, x0, z: x0)
WRONG = [                                      # handed in: the check, its arguments, what it says
    ("ve_marginal", (lambda t: None,), "two things, a and s, not NoneType"),
    ("ve_marginal", (lambda t: VE.marginal(t)[1],), "two things, a and s, not Tensor"),
    ("vp_marginal", (lambda t: (*VP.marginal(t), t),), "two things, a and s, not 3"),
    ("ve_marginal", (VE.marginal, 0.1, 5.), "sigma_min and sigma_max are not used"),
    ("vp_marginal", (VP.marginal, 0.2, 8.), "beta_0 and beta_1 are not used"),
    ("ve_marginal", (lambda t: VE.marginal(torch.linspace(0, 1, len(t), dtype=F64)),), "3/4, 1/4"),
    ("vp_marginal", (lambda t: VP.marginal(torch.linspace(0, 1, len(t), dtype=F64)),), "3/4, 1/4"),
    ("vp_marginal", (lambda t: (VP.marginal(t)[0], (1 - VP.marginal(t)[0] ** 2).sqrt()),),
     r"1: 1 - a\^2 is such a difference: use expm1"),
    ("vp_marginal", (vp_by_integral,), r"digits\): [\d.]+, not 1$"),
    ("ddpm_chain", (lambda t: SDES["DDPM"].marginal((torch.arange(1000) + 1).to(t) / 1000),),
     "a of the chain"),
    ("langevin", (lambda score, sde, x, t, *more: sgu.langevin_step(score, sde, x, t / 2, *more),),
     "x is at time t = 0.3"),
    ("schedule", (VP, None, sgu.VP(0.1, 30.).drift, sgu.VP(0.1, 30.).diffusion), "to another beta"),
    ("schedule", (VP, None, lambda x, t: None), "is its return missing"),
    ("schedule", (VP, None, lambda x, t: t[:, None]), "has the shape"),
    ("schedule", (VP, None, lambda x, t: 2 * VP.drift(x, t)), "drift is twice too large"),
    ("obtuse_sign", (obtuse_of(torch.mean, CLEAN),), "no noise was added"),
    ("obtuse_sign", (obtuse_of(torch.mean, BARE), VP), "given x0 itself"),
    ("obtuse_sign", (obtuse_of(torch.mean, NOISY), VP), "x0 is not scaled"),
    ("obtuse_sign", (obtuse_of(lambda v: v.detach().mean()),), "no gradient"),
    ("orthogonal", (orthogonal_of(lambda v: v, CLEAN),), "no noise was added"),
    ("orthogonal", (orthogonal_of(lambda v: v.detach()),), "no gradient"),
    ("agreement", (obtuse_of(lambda v: v.detach().flatten(1).mean(1)),), "no gradient"),
    ("sgu_loss", (as_float,), "no gradient"), ("sgu_loss", (swapped,), "must see x_f"),
    ("sgu_loss", (unseeded,), "hand it on to the keep loss"),
    ("sgu_loss", (keep_detached,), "the keep loss is detached"),
    ("sgu_loss", (forgets_by(sde=VP),), "the score and the schedule that you were given"),
    ("sgu_loss", (forgets_by(score=lambda x, t: x),), "the score and the schedule that you were"),
    ("report", (report_of(0.31),), "share that the judge is unsure of"),
    ("report", (report_of(0.75),), "share that the judge is unsure of"),
    ("report", (report_of(0.500001),), "share that the judge is unsure of"),
    ("report", (report_of(0.5, [3, 7]),), "argument forget is not used"),
    ("report", (noise_is_kept,), "counts noise as kept"),
    ("frechet", (frechet_by(lambda v: v.T),), "three dimensions"),
    ("frechet", (frechet_by(lambda v: v, torch.float32),), "use float64"),
    ("frechet", (lambda f, h: frechet_by(lambda v: v)(f, h * len(h) / len(f)),), "against 300"),
    ("wilson", (wilson_of(lambda root, m: root),), "not divided by n"),
    ("wilson", (wilson_of(lambda root, m: root, clip=False),), "not divided by n"),
    ("wilson", (wilson_of(lambda root, m: root / m / 1.959964),), "in front of the root"),
    ("wilson", (wilson_of(unit=100.),), "not percent"), ("wilson", (lambda k, n: 0.1,), "two th"),
    ("wilson", (wilson_of(lambda root, m: -root / m),), "the smaller end first"),
    ("wilson", (wilson_of(lambda root, m: 1.05 * root / m),), "lower end of the interval of 3"),
    ("wilson", (wilson_of(lambda root, m: root / m * m ** 0.5),), "lower end of the interval of 3"),
    ("heun_likelihood", (lambda score, sde, x, steps: score(x, torch.ones(())),), "one time per"),
    ("heun_likelihood", (heun_with(moved=0),), "predicted point"),
    ("heun_likelihood", (heun_with(sigma_there=0),), "missing in the integral"),
    ("heun_likelihood", (heun_with(div_sign=-1),), "sign of the divergence"),
    ("heun_likelihood", (heun_with(e_sign=-1),), "sign of e"),
    ("heun_likelihood", (heun_with(second=0),), "Euler"),
    ("heun_likelihood", (heun_with(log_term=0),), "is missing: y = x/a"),
    ("turned_log_p", (turned_of(sign=-1),), "its sign is flipped"),
    ("turned_log_p", (turned_of(sign=0),), "D Q is missing"),
    ("turned_log_p", (turned_of(dims=lambda d: 1),), "the D of D Q"),
    ("turned_log_p", (turned_of(half=1.),), "the 1/2 in front"),
    ("turned_log_p", (turned_of(rise=1.),), "rises by 2"),
    ("turned_log_p", (turned_of(rise=-2.),), "turned part has the wrong sign"),
    ("turned_log_p", (turned_of(width=1.),), "the width 0.3"),
    ("gaussian_score", (lambda m, v, sde: m,), "returns a function"),
    ("make_score", (lambda model, sde, std: None,), "returns a function"),
    ("denoise", (lambda score, sde, x, t: score(x, t),), "one time per point"),
    ("inpaint_keeps", (inpaint_of(start=lambda x: x),), "answer leaks"),
    ("inpaint_keeps", (inpaint_of(generator=None),), "pass the generator"),
    ("inpaint_keeps", (inpaint_of(go_on=0.),), "go on from where the last step"),
    ("error_estimate", (lambda f, c, n: (f - c).abs(),), "the difference, most of which"),
    ("error_estimate", (lambda f, c, n: (f - c) / (2 ** n - 1),), "an error has no sign"),
    ("error_estimate", (lambda f, c, n: (f - c).abs() / 2 ** n,), "Not 1/2"),
    ("error_estimate", (lambda f, c, n: (f - c).abs() / 15,), "order is not used"),
    ("error_estimate", (lambda f, c, n: sgu.flow_error(f, c),), "an eighth"),
    ("refine", (refine_of(again=True),), "fine values of one round are the coarse ones"),
    ("refine", (refine_of(lambda f, c: (f - c).mean().abs() / 15),), "first abs, then the mean"),
    ("refine", (refine_of(lambda f, c: (f - c).abs().max() / 15),), "on average over the batch"),
    ("refine", (refine_of(believe=lambda error, tolerance: True),), "on average over the batch"),
    ("refine", (refine_of(limit=lambda most: most * 1.3),), "more than 100 is too many"),
    ("refine", (refine_of(believe=lambda error, tolerance: not error > tolerance),), "NaN"),
    ("refine", (refine_of(limit=lambda most: 2 * most),), "and no further"),
    ("refine", (refine_of(limit=lambda most: 10 ** 9),), "stop doubling at most"),
    ("refine", (refine_of(limit=lambda most: 512),), "are the arguments used"),
    ("refine", (refine_of(believe=lambda error, tolerance: False),), "you asked for"),
    ("noise", (noise_of(lambda x, g: x + torch.randn(x.shape, generator=g)),), "must not depend"),
    ("noise", (noise_of(strengths=0.),), "all alike"), ("noise", (noise_of(limit=9.),), "clamp"),
    ("noise", (noise_of(lambda x, g: torch.randn(x[:1].shape, generator=g)),), "of two images"),
    ("noise", (noise_of(lambda x, g: torch.randn(40, 1, 28, 1, generator=g).expand_as(x)),),
     "neighbours"),
    ("noise", (noise_of(lambda x, g: torch.randn(x.shape)),), "pass the generator"),
    ("noise", (noise_of(shades=0.),), "a shade of its own"), ("noise", (uniform,), "of its own"),
    ("noise", (noise_of(shape=lambda x: (1, 1, 1, 1)),), "a shade of its own"),
    ("blend", (lambda x, g: x + x.roll(1, 0),), "clamp"),
    ("blend", (lambda x, g: (x + x[torch.randperm(len(x), generator=g)]) / 2,), "itself"),
    ("blend", (lambda x, g: 0.95 * x + 0.05 * x.roll(1, 0),), "a fifth"),
    ("blend", (lambda x, g: (x + x.roll(1, 0) + x.roll(2, 0)) / 3,), "more than two"),
    ("shuffled", (patched(lambda g: torch.arange(16)),), "no patch has moved"),
    ("shuffled", (patched(lambda g: torch.randint(16, (16,), generator=g)),), "lost, doubled"),
    ("shuffled", (patched(by_chance, turn=True),), "whole and upright"),
    ("shuffled", (lambda x, g: x.flatten(1)[:, torch.randperm(784, generator=g)].view_as(x),),
     "whole and upright"),
    ("with_none", (none_every(5, copies=False),), "clone it first"),
    ("with_none", (none_every(2),), "about a fifth"),
    ("with_none", (none_every(5, label=9),), "no image has the label 10"),
    ("with_none", (none_every(5, images=lambda x, g: x),), "still shows its digit"),
    ("with_none", (lambda x, y, g: (uniform(x, g), none_every(5)(x, y, g)[1]),), "must stay"),
    ("measure", (measure_of(lambda p: (p[:, :10] >= 0.5).any(1)),), "hesitantly"),
    ("measure", (measure_of(lambda p: p.argmax(1) == 10),), "called none of these"),
    ("measure", (measure_of(right=lambda hit, refused: hit.sum() / (1 - refused).sum()),),
     "divide by all 20")]

@pytest.mark.parametrize("name, arguments, words", WRONG,
                         ids=[f"{name}: {words}" for name, _, words in WRONG])
def test_wrong_answers_are_named(name, arguments, words):
    with pytest.raises(AssertionError, match=words):
        getattr(checks, f"check_{name}")(*arguments)

def test_right_answers_in_other_words_pass():
    checks.check_frechet(frechet_by(lambda v: v))
    checks.check_report(report_of(0.5))
    checks.check_obtuse_sign(obtuse_of(torch.mean))
    checks.check_orthogonal(orthogonal_of(lambda v: v))
    checks.check_agreement(obtuse_of(lambda v: v.flatten(1).mean(1)))
    checks.check_sgu_loss(total)
    checks.check_wilson(wilson_of())
    checks.check_wilson(wilson_of(clip=False))
    checks.check_turned_log_p(turned_of())
    checks.check_error_estimate(lambda f, c, n: torch.maximum(f - c, c - f) / (2 ** n - 1))
    checks.check_refine(refine_of())
    checks.check_refine(refine_of(lambda f, c: sgu.flow_error(f, c).mean()))
    checks.check_refine(fine_first)
    checks.check_noise(noise_of())
    checks.check_noise(noise_of(uniform))
    checks.check_blend(lambda x, g: torch.maximum(x, x.flip(0)))
    checks.check_blend(lambda x, g: 0.7 * x + 0.3 * x.roll(3, 0))
    checks.check_shuffled(patched(by_chance))
    checks.check_with_none(none_every(5))
    checks.check_with_none(none_every(4, images=lambda x, g: sgu.none_of_these(x, g)))
    checks.check_measure(measure_of())
    def diagonal(field, x):                    # adds up in float32
        rows = checks.jacobians(x)
        return sum((rows[:, i, i].float() for i in range(3)), torch.zeros(len(x)))
    checks.check_divergence(diagonal)
    def probe(field, x, r):
        return torch.einsum("bi,bij,bj->b", r, checks.jacobians(x), r)
    checks.check_hutchinson_probe(probe)
    checks.check_hutchinson_probe(lambda field, x, r: probe(field, x, r).float())
    checks.check_wilson(lambda k, n: np.array(wilson_of()(k, n)))
    checks.check_vp_marginal(lambda t: tuple(v.tolist() for v in VP.marginal(t)))
    checks.check_schedule(VP, None, lambda x, t: VP.drift(x, t).numpy(),
                          lambda t: VP.diffusion(t).numpy())
    for sde in (VE, VP):
        checks.check_noising(one_by_one(sgu.score_matching_loss), sde)
        checks.check_score_matching_value(one_by_one(sgu.score_matching_loss), sde)
        checks.check_agreement(one_by_one(obtuse_of(torch.mean), torch.stack), sde)
        checks.check_gaussian_score(lambda m, v, sde: checks.Mixture(
            [1.], [m.tolist()], [[[v, 0], [0, v]]]).score(sde), sde)
        checks.check_back_up(lambda y, sde, t, t_next, g: sgu.add_noise(sde, y, t, g, t_next), sde)
        checks.check_pin(lambda y, x, known, sde, t, g: torch.where(
            known, sgu.add_noise(sde, x, t, g), y), sde)

class Opinion(nn.Module):
    """A judge that knows the digits x by heart and says y of them, and other of all else."""

    def __init__(self, x, y, other, classes=11):
        super().__init__()
        self.known = {image.numpy().tobytes(): int(label) for image, label in zip(x, y)}
        self.other, self.head = other, nn.Identity()
        self.classes, self.weight = classes, nn.Parameter(torch.zeros(()))

    def features(self, x):
        levels = ((x + 1) * 127.5).round().to(torch.uint8)
        says = [self.known.get(image.numpy().tobytes(), self.other) for image in levels]
        return 9. * torch.nn.functional.one_hot(torch.tensor(says), self.classes)

def test_a_judge_with_none_of_these():
    """It may err on few digits, refuse few, and call few other images a digit."""
    x, y = sgu.draw_glyphs(200, seed=1)
    plain = Opinion(x, y, 8, 10)
    checks.check_none_judge(Opinion(x, y, 10), plain, x, y)
    refusing, wrong = y.clone(), y.clone()
    refusing[::5] = 10
    wrong[::5] = (y[::5] + 1) % 10
    for words, judge in (("refuses 20.0%", Opinion(x, refusing, 10)),
                         ("right on 80.0%", Opinion(x, wrong, 10)),
                         ("calls 100% of uniform noise a digit", Opinion(x, y, 8))):
        with pytest.raises(AssertionError, match=words):
            checks.check_none_judge(judge, plain, x, y)

def test_unlearning_is_told_from_its_imitations():
    """The checks of exercise 6 on bright and dark images: doing nothing, destroying everything, the
    wrong sign and the wrong data are told apart from unlearning."""
    def capped(score, sde, x0, t=None, z=None, weighting="noise", generator=None, cap=1.5):
        t, e, z = sgu.predict_noise(score, sde, x0, t, z, generator)
        return -torch.minimum((e - z).square().mean(1), torch.tensor(cap)).mean()
    checks.check_capped_neggrad(capped)
    sde = sgu.VE()
    keep, forget = (torch.randint(lo, lo + 60, (200, 1, 8, 8), generator=seeded(lo),
                                  dtype=torch.uint8) for lo in (10, 180))
    both = torch.cat([keep, forget])
    standard = checks.tiny_net()
    for _ in sgu.train(standard, checks.tiny_net(), sde, both, steps=60, batch_size=32, lr=5e-3):
        pass
    def unlearn(net, sde, keep, forget, loss=sgu.obtuse_loss, alpha=0.5, steps=90, lr=3e-3):
        net = copy.deepcopy(net)
        ema = copy.deepcopy(net)
        for _ in sgu.train(net, ema, sde, keep, forget, loss, alpha, steps=steps, batch_size=32,
                           lr=lr, window=(0.2, 4.)):
            pass
        return ema
    checks.check_unlearn(unlearn, standard, sde, keep, forget)
    class Shrunk(nn.Module):                   # e = (sigma x - F/2)/total, so this gives share e
        def __init__(self, share):
            super().__init__()
            self.share = share
        def forward(self, x, level):
            e = sgu.per_sample(torch.exp(4 * level), x) * x / 0.5
            return self.share * standard(x, level) + (1 - self.share) * e
    def toward(*args, **kw):
        return -sgu.obtuse_loss(*args, **kw)
    fails = "too little|all images alike|destroying|TOWARD"
    for words, wrong in (
            ("nothing changed", lambda net, *_: net), ("all images alike", lambda *_: Shrunk(0.9)),
            ("destroying", lambda *_: Shrunk(0.)),
            (fails, lambda net, sde, keep, forget: unlearn(net, sde, both, both)),
            (fails, lambda net, sde, keep, forget: unlearn(net, sde, forget, keep)),
            ("TOWARD", functools.partial(unlearn, loss=toward, alpha=0.2)),
            ("destroying", functools.partial(unlearn, alpha=0., lr=1e-2, steps=30))):
        with pytest.raises(AssertionError, match=words):
            checks.check_unlearn(wrong, standard, sde, keep, forget)

@needs_sources
def test_exercise_notebooks_are_up_to_date():
    """They hold what python notebooks/make.py exercises writes; outputs may differ."""
    def content(notebook):
        return [(c["cell_type"], "".join(c["source"])) for c in notebook["cells"]]
    made = make.exercise_notebooks()
    for path, notebook in made.items():
        stale = f"{path.name} is stale: run python notebooks/make.py exercises"
        assert path.exists(), stale
        assert content(json.loads(path.read_text(encoding="utf-8"))) == content(notebook), stale
    assert set(made) == set((HERE / "exercises").glob("*.ipynb")), "one has no source"
    cells = [c for s in grade.SOURCES for c in make.read_source(s) if c["kind"] == "check"]
    assert len(cells) >= 20 and min(c["points"] for c in cells) > 0

def in_jupyter(source, answers):
    """Run a notebook's code cells as Jupyter does, with answers in place of cells that raise
    NotImplementedError. -> [(tag of the cell, its error or None, what it printed)]"""
    ipython = pytest.importorskip("IPython.core.interactiveshell")
    config = pytest.importorskip("traitlets.config").Config()
    config.HistoryManager.enabled = False
    shell, ran = ipython.InteractiveShell(config=config), []
    for cell in make.exercise_notebook(source, solution=False)["cells"]:
        if cell["cell_type"] == "code":
            tag = cell["metadata"]["sgu"]
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                result = shell.run_cell(answers.get(tag, "".join(cell["source"])))
            ran.append((tag, result.error_before_exec or result.error_in_exec, printed.getvalue()))
    return ran

@of_every_exercise
def test_run_all_goes_on(source, monkeypatch, no_record):
    """As handed out a notebook runs to its end in Jupyter: a line for each question that is not
    answered, and no traceback."""
    monkeypatch.chdir(HERE / "exercises")
    monkeypatch.setenv("SGU_QUICK", "1")
    for tag, error, printed in in_jupyter(source, {}):
        assert error is None, f"{tag}: {error}"
        kind, _, question = tag.partition(" ")
        assert "Traceback" not in printed
        if kind == "check":
            assert re.fullmatch(rf"{question}: 0 of \d points: [^\n]+\n", printed), printed

@needs_sources
def test_what_students_read_in_jupyter(monkeypatch, no_record):
    """The line of a right answer, a wrong one, one that crashes, and of one with a point left."""
    monkeypatch.chdir(HERE / "exercises")
    solved = {c["question"]: c["text"] for c in make.read_source(grade.SOURCES[0])
              if c["kind"] == "solution"}
    crash = "def vp_drift(x, t):\n    return x[[1, 2],\n             999]\nvp_diffusion = vp_drift"
    said = {tag: printed for tag, error, printed in in_jupyter(grade.SOURCES[0], {
        "answer 1.1": solved["1.1"], "answer 1.2": solved["1.2"].replace("-0.5 *", "-1.0 *"),
        "answer 1.3": crash, "answer 1.4": solved["1.4"],
        "answer 1.5": solved["1.5"].replace("= 6", "= 7")})}
    assert said["check 1.1"] == "1.1: 2 of 2 points\n"
    assert said["check 1.2"].startswith("1.2: 0 of 3 points: a of VP at t = 0, 1/2, 1")
    assert said["check 1.2"].endswith("the 1/2 in front of the integral is missing\n") or (
        "this is a^2" in said["check 1.2"])
    assert said["check 1.3"].startswith("1.3: 0 of 2 points: IndexError: index 999 is out")
    assert said["check 1.3"].endswith(" (line 2 of the cell, in vp_drift)\n")
    assert said["check 1.4"].splitlines()[2] == "1.4: 1 of 1 points"
    assert said["check 1.5"] == (
        "1.5: 2 of 3 points: the function is right now; for the last point put the number of the "
        "line that was wrong into line_1_5; line 7 was not\n")

@needs_sources
def test_teachers_page_counts_rightly():
    """Questions, points and minutes on the teacher's page, at the head of an exercise and in its
    questions and checks agree."""
    page, totals = (HERE / "README.md").read_text(encoding="utf-8"), [0, 0]
    row = r"\| \[(\w+)\]\(exercises/\1.ipynb\) \|[^|]+\| (\d+) \| (\d+) \|[^|]*\| (\d+) \|"
    said = {name: tuple(map(int, numbers)) for name, *numbers in re.findall(row, page)}
    assert list(said) == [source.stem for source in grade.SOURCES]
    for source in grade.SOURCES:
        cells = make.read_source(source)
        text = "\n".join(cell["text"] for cell in cells if cell["kind"] == "markdown")
        heads = re.findall(r"## Question ([\d.]+) \((\d+) points?, (\d+) minutes\)", text)
        checked = {c["question"]: c["points"] for c in cells if c["kind"] == "check"}
        assert {q: int(points) for q, points, _ in heads} == checked
        counts = len(heads), sum(checked.values()), sum(int(minutes) for *_, minutes in heads)
        head, = re.findall(r"(\d+)\s+questions,\s+(\d+)\s+points,\s+about\s+(\d+)", text)
        assert said[source.stem] == tuple(map(int, head)) == counts, source.stem
        totals = [total + count for total, count in zip(totals, counts)]
    assert f"{totals[0]} questions, {totals[1]} points" in page

# ==== The grader ==================================================================================

def hand_in(folder, number, answers):
    """A student's notebook of exercise number with these answers: {question: code}, None: the cell
    is deleted. -> its path"""
    source = grade.SOURCES[number - 1]
    notebook, cells = make.exercise_notebook(source, solution=False), []
    for cell in notebook["cells"]:
        question = cell["metadata"].get("sgu", "").removeprefix("answer ")
        if answers.get(question, "") is not None:
            cells.append(cell)
        if answers.get(question):
            cell["source"] = answers[question]         # a string, not lines: notebooks have both
    path = folder / f"{source.stem}.ipynb"
    path.write_text(json.dumps(notebook | dict(cells=cells)), encoding="utf-8")
    return path

@needs_sources
def test_grader_survives(tmp_path):
    """Notebooks with everything that students do to a grader, and two files that are none."""
    solved = {c["question"]: c["text"] for s in grade.SOURCES for c in make.read_source(s)
              if c["kind"] == "solution"}
    evil = ("class Mine(Exception):\n    def __str__(self): raise self\n"
            "def gaussian_score(*args): raise Mine")
    second = hand_in(tmp_path, 2, {
        "2.1": solved["2.1"].replace(".mean()", ""), "2.2": evil,
        "2.3": "def denoise(*args):\n    pass",
        "2.4": "choice_2_4 = ['a']\nwhy_2_4 = 'all of a sudden'", "2.5": "import sys; sys.exit(0)"})
    loud = "print('\\0\\x1b[2J' * 10000)\nimport sys; sys.stdout.close()\n"
    fifth = hand_in(tmp_path, 5, {
        "5.1": "%matplotlib inline\n" + loud + solved["5.1"],
        "5.2": solved["5.2"].replace("line_5_2 = 4", "line_5_2 = 1"),
        "5.3": "while True:\n    __import__('time').sleep(1)", "5.4": None,
        "5.5": "import os; os._exit(3)", "5.6": solved["5.6"]})
    eighth = hand_in(tmp_path, 8, {"8.2": "def wilson(:", "8.4": "guess_8_4 = 0.44\nwhy_8_4 = ''"})
    (tmp_path / "bad.ipynb").write_text("{")
    (tmp_path / "07.ipynb").write_text('{"cells": []}')
    files = [second, fifth, eighth, tmp_path / "bad.ipynb", tmp_path / "07.ipynb"]
    run = subprocess.run([sys.executable, HERE / "exercises" / "grade.py", "--limit", "20", *files],
                         capture_output=True, text=True, timeout=900)
    lines = [line.strip() for line in run.stdout.splitlines() if line.startswith("  ")]
    lines = dict(line.split("  ", 1) for line in lines if line[0].isdigit())
    for question, points, words in (
            ("2.1", "0/2", "shape"), ("2.2", "0/2", "cannot even be printed"),
            ("2.3", "0/2", "returned None"), ("2.4", "0/2", "letters"), ("2.5", "0/3", "exit()"),
            ("5.1", "2/2", "passed"), ("5.2", "2/3", "the function is right now"),
            ("5.3", "0/3", "no result after 20 s"), ("5.4", "0/2", "is missing"),
            ("5.5", "0/2", "exit code 3"), ("5.6", "2/2", "passed; why: The obtuse loss is"),
            ("8.2", "0/3", "syntax error in line 1"), ("8.3", "0/3", "which line is to blame"),
            ("8.4", "0/2", "in why_8_4, in a sentence"), ("8.6", "0/2", "not answered yet")):
        said = lines[question]
        assert said.startswith(points) and words in said, f"{question}: {said}\n{run.stderr}"
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 2, run.stderr
    assert "bad.ipynb is not a notebook" in run.stderr and "none of our exercises" in run.stderr
    assert "total  0/11" in run.stdout and "total  6/14" in run.stdout

@pytest.mark.parametrize("extra", [
    "%matplotlib inline", "!ls", "!ls *.py | wc", "files = !ls", "a, *b = !ls", "checks.x = !ls",
    "files = !ls\nfirst = files[0]", "torch.randn?", "torch.randn??", "?torch.randn",
    "torch.*rand*?", "%cd ..", "%load_ext autoreload\n%autoreload 2", "x = %timeit -o 1 + 1",
    "if True:\n    %time 1 + 1\n    !ls", "%%time", "%%capture out", "%%prun -q",
    "get_ipython().run_line_magic('matplotlib', 'inline')", "get_ipython().kernel",
    "import asyncio\nawait asyncio.sleep(0)", "text = '''\n!ls\n%time\n'''\nassert '!ls' in text",
    "display(3)", ">>> 1 + 1", "%time answer = 3\nassert answer == 3",
    "x = %time 1 + 1\nassert x == 2",
    "def f(n):\n    x = %time n + 1\n    return x\nassert f(2) == 3",
    "from IPython import get_ipython\n%time 1 + 1\n%matplotlib inline",
    "import inspect\ndef f():\n    return 1\n%time y = f()\nassert '1' in inspect.getsource(f)",
    "%%time\nimport inspect\ndef f():\n    return 1\nassert '1' in inspect.getsource(f)"])
def test_grader_runs_what_jupyter_runs(extra):
    """Magics, commands, questions and await in a cell cost nothing."""
    pytest.importorskip("IPython")
    space = {"checks": types.SimpleNamespace(), "display": print}
    cell = f"{extra}\nimport torch\nanswer = 7 % 4 + (2 != 3)\n"
    got = grade.run_step("1.1", [(True, cell)], "assert answer == 4", space, 2)
    assert got == (2, "passed")

@needs_sources
def test_grader_reads_what_editors_write(tmp_path, capsys):
    """A byte order mark, UTF-16, or a byte that is no UTF-8: the answer is read all the same, and
    where a file is not in Unicode a line says so."""
    first, *_ = [c for c in make.read_source(grade.SOURCES[0]) if c["kind"] == "solution"]
    answer = first["text"] + "\n# \xe4"
    path = hand_in(tmp_path, 1, {first["question"]: answer})
    escaped = path.read_text(encoding="utf-8")
    text = escaped.replace("\\u00e4", "\xe4")
    for content, line in ((b"\xef\xbb\xbf" + escaped.encode(), ""), (text.encode("utf-16"), ""),
                          (text.encode(), ""), (text.encode("latin-1"), "is not UTF-8")):
        path.write_bytes(content)
        steps = {step.question: step for step in grade.grading_steps(path)}
        assert steps[first["question"]].cells[-1] == (True, answer)
        said = capsys.readouterr().out
        assert line in said and said.count("\n") == bool(line), said

def step(question, check, *cells, stub=""):
    """A step of the grader for 3 points. The last one of cells is the answer."""
    cells = [(i == len(cells) - 1, cell) for i, cell in enumerate(cells)]
    return grade.Step(question, cells, check, 3 if question else 0, stub)

STUB = "def divergence(x):\n    raise NotImplementedError('question 4.1')"
NEEDS = (0, "needs question 4.1, which has no answer that runs")

@pytest.mark.parametrize("steps, wanted", [
    ([step("1.1", "assert f() == 4", "while True: pass", "def f(): return 4")], (3, "passed")),
    ([step("1.1", "assert f() == 4", "__import__('os')._exit(1)", "def f(): return 4")],
     (3, "passed")),
    ([step("1.1", "", "a = 1", "while True: pass"), step("1.2", "assert a == 1", "")],
     (0, "NameError: name 'a' is not defined")),
    ([step("6.4", "", "import time\ntime.sleep(3)")], (3, "passed")),
    ([step(None, "", "quick = False\ndef size(): return 1 if quick else 2"),
      step("6.4", "assert not quick and size() == 2", "quick = True")], (3, "passed")),
    ([step(None, "", "quick = False"), step("1.1", "", "quick = True"),
      step("1.2", "assert f()", "def f(): return quick")], (3, "passed")),
    ([step("1.1", "f()", "n = 0\ndef f():\n    global n\n    n += 1"),
      step("1.2", "assert n == 1", "")], (3, "passed")),
    ([step("1.1", "made = 7", ""), step("1.2", "assert f() == 7", "def f(): return made")],
     (3, "passed")),
    ([step("1.1", "f()", "class E(Exception):\n    earned = 9\ndef f(): raise E")], (0, "E: ")),
    ([step("4.1", "", "def divergence(:", stub=STUB), step("4.3", "divergence(1)", "")], NEEDS),
    ([step("4.1", "", "while True: pass", stub=STUB), step("4.3", "divergence(1)", "")], NEEDS),
    ([step("4.1", "", stub=STUB), step("4.3", "divergence(1)", "")], NEEDS),
    ([step("4.1", "", "def divergence(x): pass", stub=STUB), step("4.3", "divergence(1)", "")],
     (3, "passed")),
    ([step("1.1", "assert checks.expect", "import checks\nchecks.expect = None")], (3, "passed")),
    ([step("1.1", "assert torch.ones(1).dtype == torch.float32 and torch.is_grad_enabled()",
           "import torch\ntorch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)")],
     (3, "passed")),
    ([step("1.1", "assert pickle.loads(pickle.dumps(f)) is f", "import pickle\ndef f(): pass")],
     (3, "passed")),
    ([step("8.2", "", "def wilson(:")], (0, f"(this is Python {sys.version_info.major}.")),
    ], ids=lambda value: "" if isinstance(value, tuple) else value[-1].question)
def test_what_the_grader_makes_of_cells(steps, wanted):
    """The last of some steps, under a limit of a second."""
    earned, said, _ = grade.outcomes(steps, 1.)[-1]
    assert earned == wanted[0] and wanted[1] in said, said

@needs_sources
def test_grader_takes_notebooks_as_they_come(tmp_path, capsys):
    """Renamed, without metadata, behind a file that is none; names of a picture in an answer, a
    picture that was changed, and a helper written over a check."""
    solved = {c["question"]: c["text"] for c in make.read_source(grade.SOURCES[0])
              if c["kind"] == "solution"}
    path = hand_in(tmp_path, 1, {
        "1.1": "# question 1.1\nplt.close()\nhelper(digit)\n" + solved["1.1"],
        "1.2": "# question 1.2\n" + solved["1.2"].replace("return ", "return twice(") + ")",
        "1.5": None})
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["metadata"].get("sgu") == "look":
            cell["source"] = ["def helper(image): pass\n", *cell["source"]]
    plain = copy.deepcopy(notebook) | dict(metadata=None)
    for cell in notebook["cells"]:
        if cell["metadata"].get("sgu") == "check 1.2":
            cell["source"] = "def twice(*values): return values"
    plain["cells"] = [dict(cell, metadata=None) for cell in plain["cells"]]
    plain["cells"] += [{"cell_type": "code", "metadata": {}}, {"cell_type": "code", "source": None}]
    (tmp_path / "deep.ipynb").write_text("[" * 100_000 + "]" * 100_000)
    files = [tmp_path / f"{name}.ipynb" for name in ("deep", "Copy of 01_schedules", "homework")]
    for file, content in zip(files[1:], (dict(notebook, metadata={}), plain)):
        file.write_text(json.dumps(content), encoding="utf-8")
    assert grade.main([str(file) for file in files]) == 2
    out, err = capsys.readouterr()
    assert "deep.ipynb is not a notebook (RecursionError" in err and len(err.splitlines()) == 1
    named, bare = re.findall(r"1\.1  (\d).*\n.*1\.2  (\d/3  .*)\n[^*]*?1\.5  (0/3  .*)\n", out)
    missing = "0/3  the cell with the answer is missing"
    assert named == ("2", "3/3  passed", missing)
    assert bare[0] == "2" and "twice" in bare[1] and bare[2] == missing
    steps = grade.grading_steps(hand_in(tmp_path, 1, {"1.1": None}))
    assert [which for which, _ in steps[1].cells] == [None]           # a picture is no answer
    assert grade.source_of([], ["", "Copy of 01_schedules.ipynb"]) == grade.SOURCES[0]

@pytest.mark.parametrize("limit", ["nan", "0", "-1", "inf", "1e10", "soon"])
def test_grader_refuses_limits_that_are_none(limit, capsys):
    with pytest.raises(SystemExit) as error:
        grade.main(["--limit", limit, "none.ipynb"])
    assert error.value.code == 2
    assert re.fullmatch(r"grade: argument --limit: .*\n", capsys.readouterr().err)

def test_grader_refuses_to_run_without_assert():
    command = [sys.executable, "-O", HERE / "exercises" / "grade.py", "none.ipynb"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == 2 and "removes what the checks assert" in run.stderr
    assert len(run.stderr.splitlines()) == 1
