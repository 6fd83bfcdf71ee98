"""What the tests of sgu.py and those of notebooks/ share: small data, small runs of the command.

Runs are small by their data, four classes of 8x8 images, by their network and judge, and by few
steps; nothing else is changed.
"""
import contextlib
import copy
import inspect
import io
import os
import pathlib
import shutil
import signal
import sys
import types
import urllib.error

import numpy as np
import pytest
import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "exercises")]

import sgu
from make import results_of

torch.set_num_threads(1)                       # on tensors this small a second thread only costs

QUICK = ("--forget two --steps 8 --unlearn-steps 4 --batch-size 16 --lr 0.02 --samples 12 "
         "--device cpu --sampler ode --sampler-steps 2 --likelihood-samples 4 --tasks sample "
         "--precision float32").split()
NAMES = ["one", "two", "three", "four"]        # of the classes in write_shapes


def tiny_presets(**changes):
    """PRESETS with a network and a judge for tests."""
    tiny = dict(channels=(8, 16), blocks=1, patch=2, judge_width=2, judge_steps=8) | changes
    rows = {}
    for key, row in sgu.PRESETS.items():
        preset = dict(zip(sgu.COLUMNS, row)) | tiny
        rows[key] = tuple(preset[column] for column in sgu.COLUMNS)
    return rows


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(sgu, "PRESETS", tiny_presets())


def write_shapes(path, n=240, side=8, channels=1, **kw):
    """An .npz of four classes that a judge can learn: a bright quarter, on noise. -> its path"""
    x = np.random.default_rng(1).integers(0, 100, (n, side, side, channels), dtype=np.uint8)
    for i, image in enumerate(x):
        r, c, half = i % 4 // 2, i % 2, side // 2
        image[r * half:(r + 1) * half, c * half:(c + 1) * half] += 130
    arrays = dict(images=x[..., 0] if channels == 1 else x, labels=np.arange(n) % 4,
                  class_names=NAMES, split=np.arange(n) // 4 % 4 == 3)
    np.savez(path, **{k: v for k, v in (arrays | kw).items() if v is not None})
    return str(path)


def write_npz(path, n=24, side=8, channels=1, **kw):
    """An .npz of random images with labels i % 3, unless kw says otherwise. -> what was written"""
    shape = (n, side, side) + ((channels,) if channels > 1 else ())
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    arrays = dict(images=images, labels=np.arange(n) % 3) | kw
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


def write_mnist(folder, black=0):
    """The four files of MNIST, unpacked, with 40 + 20 random images, the last ones black.
    -> {split: (images, labels)}"""
    folder.mkdir(parents=True, exist_ok=True)
    made, rng = {}, np.random.default_rng(0)
    for split, n in (("train", 40), ("t10k", 20)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        images[n - black:] = 0
        made[split] = images, (np.arange(n) % 10).astype(np.uint8)
        for kind, array in zip(("images-idx3", "labels-idx1"), made[split]):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
            (folder / f"{split}-{kind}-ubyte").write_bytes(head + array.tobytes())
    return made


@pytest.fixture
def offline(monkeypatch):
    """No way out: every attempt to open an address fails, as on a train."""
    def urlopen(*args, **kw):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setitem(sys.modules, "gdown", None)    # torchvision fetches CelebA with it


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of Standard and Obtuse, to be copied or gone on with: (folder, argv without --out)."""
    folder = tmp_path_factory.mktemp("finished")
    argv = ["--dataset", write_shapes(folder / "shapes.npz"), *QUICK]
    argv += ["--methods", "standard,obtuse"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sgu, "PRESETS", tiny_presets())
        assert sgu.main([*argv, "--out", str(folder / "run")]) == 0
    return folder / "run", argv


@pytest.fixture
def copied(finished, tmp_path, small):
    """A copy of the finished run, and the command that made it, now for the copy."""
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy", [*finished[1], "--out", tmp_path / "copy"]


def command(capsys, *argv):
    """sgu.main(argv) -> exit code, stdout, stderr."""
    try:
        code = sgu.main([str(word) for word in argv])
    except SystemExit as stop:                 # argparse leaves this way
        code = stop.code
    return code, *capsys.readouterr()


def check_refused(capsys, argv, *words):
    """Exit code 2, and as the last line on stderr the only one that starts with 'sgu: '."""
    code, _, said = command(capsys, *argv)
    lines = [line for line in said.strip().splitlines() if "warning: the judge" not in line]
    assert code == 2, f"{argv}: exit code {code}, {said}"
    assert [line[:5] for line in lines].count("sgu: ") == (lines[-1][:5] == "sgu: ") == 1, said
    assert all(str(word) in lines[-1] for word in words), f"{argv} must say {words}: {lines[-1]}"
    assert "delete" not in lines[-1], "nobody is told to delete a file"


def fingerprint(out, end=""):
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir()
            if p.name.endswith(end)}


def weights_of(path):
    """The averaged weights in a finished file."""
    return sgu.load_model(path)[0].state_dict()


def equal_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(weights_of(a).values(), weights_of(b).values()))


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def forbid(monkeypatch, *names):
    """Whoever calls one of these functions of sgu.py repeats work that is done."""
    for name in names:
        def again(*args, name=name, **kw):
            raise AssertionError(f"{name} was called again")
        monkeypatch.setattr(sgu, name, again)


def always_late():
    """A module time in which 31 seconds pass between two looks, so that every step is saved."""
    clock = iter(range(0, 10 ** 9, 31)).__next__
    return types.SimpleNamespace(time=clock, monotonic=clock, perf_counter=clock)


def die_at(argv, name, save, half):
    """In a process of its own: the command, saving after every step, and SIGKILL at a save of a
    file, before it is renamed (half) or after."""
    saves, replace = [], os.replace

    def watched(source, target):
        saves.append(pathlib.Path(target).name)
        last = saves.count(name) == save
        if last and half:
            pathlib.Path(source).write_bytes(pathlib.Path(source).read_bytes()[:1000])
        if not (last and half):
            replace(source, target)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace, sgu.PRESETS, sgu.time = watched, tiny_presets(), always_late()
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sgu.main(argv)


class Recorded:
    """One run of the command, and what it handed to each stage: calls[stage] has the arguments of
    every call by name."""

    def __init__(self, folder, *options):
        self.calls, self.out = {}, folder / "run"
        path = write_shapes(folder / "shapes.npz")
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.setattr(sgu, "PRESETS", tiny_presets(
                judge_width=4, judge_steps=40, noise_law=(0.5, 0.8, 5), data_std=0.8))
            for name in "train train_judge bits_per_dim inpaint reconstruct judged".split():
                patch.setattr(sgu, name, self.watched(name, getattr(sgu, name)))
            patch.setitem(sgu.SAMPLERS, "ode", self.watched("sampler", sgu.ode_sample))
            argv = ["--dataset", path, *QUICK, *options, "--out", str(self.out)]
            assert sgu.main(argv) == 0
        self.data, self.results = sgu.choose(sgu.load_data(path), "two"), results_of(self.out)
        self.methods = list(self.results["methods"])

    def watched(self, name, function):
        signature, log = inspect.signature(function), self.calls.setdefault(name, [])

        def call(*args, **kw):
            bound = signature.bind(*args, **kw)
            bound.apply_defaults()
            given = types.SimpleNamespace(**bound.arguments)
            if name == "train":
                given.start = copy.deepcopy(given.model.state_dict())
            if getattr(given, "generator", None) is not None:
                given.random = given.generator.get_state().tolist()
            if name == "inpaint":              # 400 evaluations as the command asks for it
                bound.arguments.update(steps=2, repeats=1)
            log.append(given)
            return function(*bound.args, **bound.kwargs)
        return call

    def train(self, method):
        return self.calls["train"][self.methods.index(method)]

    def of(self, stage, method):
        """The calls of a stage that belong to a method; every method has as many."""
        calls, n = self.calls[stage], len(self.methods)
        assert calls and len(calls) % n == 0
        each, i = len(calls) // n, self.methods.index(method)
        return calls[i * each:(i + 1) * each]

    def images(self, split, forgotten):
        return self.data[split][sgu.is_forgotten(self.data, split) == forgotten]


def shaken_unet(seed=0, **kw):
    """A small U-Net whose zero-initialised layers are filled, as after training."""
    torch.manual_seed(seed)
    net = sgu.UNet(**(dict(channels=(8, 16), patch=2) | kw))
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net


def narrow_gaussian(sde, std):
    """The score of N(0, std^2), steep at small noise, and the log p(x) that its flow gives: y = x/a
    grows by sqrt((std^2 + sigma_1^2)/(std^2 + sigma_0^2))."""
    def score(x, t):
        a, s = (sgu.per_sample(v, x) for v in sde.marginal(t.to(torch.float64)))
        return (-x / (a ** 2 * std ** 2 + s ** 2)).to(x.dtype)
    def log_p(x):
        ends = torch.tensor([sde.t_min, 1.], dtype=torch.float64)
        (a0, a1), (v0, v1) = sde.marginal(ends)[0], std ** 2 + sde.sigma(ends) ** 2
        grown = a1 / a0 * (v1 / v0).sqrt()
        return sde.prior_log_prob(x * grown) + x.shape[1] * grown.log()
    return score, log_p
