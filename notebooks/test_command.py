"""More of the command: what its results, tables and pictures say, on what its files depend, and odd
surroundings. What it hands to each stage is tested in test_sgu.py, whose small runs are used here.

    python -m pytest -q notebooks/test_command.py
"""
import copy, functools, inspect, io, math, os, pathlib, shutil, subprocess, sys, threading, types
import numpy as np
import pytest
import torch
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "exercises")]

import make
import photos
import sgu
import toy_gmm
from checks import F64, TOY, check_ode_map, counting, expect, seeded, tiny_net
from test_sgu import OK, WORK, Scalar, every_sde, learn, pushing, recorded, train_scalar
from testkit import (
    QUICK, always_late, check_refused, command, copied, finished, forbid, offline, results_of,
    small, tiny_presets, write_mnist, write_npz, write_shapes)

# ==== What the results say ========================================================================

def test_judge_looks_at_real_images(recorded):
    """The distance of real images is of the first of D_g in training; none of these, of all tests.
    """
    judge = sgu.load_judge(recorded.out / "judge.pt")
    real = sgu.opinions(judge, recorded.images("train", False)[:150])[1]
    expect(recorded.of("judged", "unseen")[0].real, real, "features of real images to keep", 1e-4)
    probs = sgu.opinions(judge, recorded.data["test"])[0]
    none = (probs.argmax(1) == len(recorded.data["classes"])).float().mean()
    expect(recorded.results["judge"]["none"], none, "real images called none of these", 1e-6)

def test_differences(recorded, tmp_path):
    """Minus Unseen and minus Standard are the differences of the two entries' own numbers, and
    nothing else in the results changes."""
    shutil.copytree(recorded.out, tmp_path / "copy")
    make.main(["pairs", str(tmp_path / "copy")])
    results, gaps = results_of(tmp_path / "copy"), []
    entries = results["methods"]
    for other in ("unseen", "standard"):
        for method in [m for m in entries if m != other]:
            got = entries[method][f"minus {other}"]
            for part in ("D_g", "D_f"):
                a, b = (entries[m]["nll_bits_per_dim"][part] for m in (method, other))
                expect(got[part]["mean"], a - b, f"NLL of {part} minus {other}", 1e-6)
            a, b = (entries[m]["unlearning_ratio"]["total"] for m in (method, other))
            expect(got["ratio"]["mean"], a - b, f"ratio minus {other}", 1e-6)
            gaps.append(a - b)
    assert any(gaps), "this test tells nothing"
    for entry in entries.values():
        entry.pop("minus unseen", None)
        entry.pop("minus standard", None)
    assert results == results_of(recorded.out)

def test_paired():
    """The mean difference of pairs -+ 1.96 of its standard errors, by n - 1."""
    a, b = torch.randn(2, 50, generator=seeded(), dtype=F64)
    mean, half = float((a - b).mean()), 1.959964 * np.std((a - b).numpy(), ddof=1) / math.sqrt(50)
    got = make.paired(a, b)
    expect([got["mean"], *got["ci95"]], [mean, mean - half, mean + half], "difference", 1e-6)
    assert make.paired(a[:1], b[:1])["ci95"] is None

def test_restored(monkeypatch):
    """Of four images the judge names three rightly before and one after; features are 5 apart."""
    said = ((torch.eye(3)[[0, 1, 2, 2]], torch.zeros(4, 2)),
            (torch.eye(3)[[0, 0, 0, 0]], torch.tensor([3., 4.]).expand(4, 2)))
    monkeypatch.setattr(sgu, "opinions", lambda judge, i: said[i])
    assert sgu.restored(0, 1, torch.tensor([0, 1, 2, 1]), None) == dict(
        accuracy=1 / 4, ci95=sgu.wilson(1, 4), n=4, clean=3 / 4, distance=5.)

def test_restorations_in_the_results(recorded):
    judge, data = sgu.load_judge(recorded.out / "judge.pt"), recorded.data
    for task in ("inpaint", "reconstruct"):
        for key, forgotten in (("D_g", False), ("D_f", True)):
            rows = sgu.is_forgotten(data, "test") == forgotten
            x, y = (data[k][rows][:4] for k in ("test", "test_labels"))
            after = sgu.read_file(recorded.out / f"{task}_{key}_unseen.pt")["state"]["values"]
            got = recorded.results["methods"]["unseen"][task][key]
            assert got == sgu.restored(x, after, y, judge), (task, key)

def test_how_stages_are_run(recorded):
    """The first network is seeded; how the judge is trained; the steps of restorations."""
    torch.manual_seed(7)
    fresh = sgu.UNet(**recorded.results["config"]["network"]).state_dict()
    start = recorded.train("standard").start
    assert all(torch.equal(start[k], fresh[k]) for k in fresh), "--seed does not decide"
    judge, = recorded.calls["train_judge"]
    assert (judge.width, judge.steps, judge.precision, judge.seed) == (4, 40, "bfloat16", 7)
    assert all((c.steps, c.repeats) == (40, 10) for c in recorded.calls["inpaint"])
    assert all((c.t, c.steps) == (0.02, 20) for c in recorded.calls["reconstruct"])

# ==== Table and pictures ==========================================================================

def test_flat():
    """Every number of a method's column in its own row."""
    part = dict(accuracy=0.5, ci95=[0.4, 0.6], n=50, clean=0.9, distance=3.)
    got = sgu.flat({
        "recipe": dict(lr=0.5), "class_histogram": dict(a=0.5), "unsure": 0.25, "kept": 7,
        "unlearning_ratio": dict(a=0.1, total=0.3, n=10, ci95=[0.25, 0.5]), "frechet_kept": None,
        "inpaint": dict(D_g=part),
        "nll_bits_per_dim": dict(
            n=dict(D_g=4, D_f=4), se=dict(D_g=0.25, D_f=None), steps=dict(D_g=32, D_f=512),
            error=dict(D_g=0.1, D_f=0.1), converged=dict(D_g=True, D_f=False), D_g=2., D_f=3.)})
    assert got == {
        "unsure": "0.250", "kept": "7", "unlearning_ratio a": "0.100",
        "unlearning_ratio total": "0.300", "unlearning_ratio ci95": "0.250 to 0.500",
        "frechet_kept": "None", "inpaint D_g accuracy": "0.500",
        "inpaint D_g ci95": "0.400 to 0.600", "inpaint D_g clean": "0.900",
        "inpaint D_g distance": "3.000",
        "nll_bits_per_dim se D_g": "0.250", "nll_bits_per_dim se D_f": "None",
        "nll_bits_per_dim converged D_g": "True", "nll_bits_per_dim converged D_f": "False",
        "nll_bits_per_dim D_g": "2.000", "nll_bits_per_dim D_f": "3.000"}

@pytest.mark.parametrize("forget, training, number, total", [
    ("automobile,dog", "finetune", 5, "24.6 | 9.5 |"),
    ("automobile,dog", "retrain", 2, "24.6 | 12.4 |"), ("dog", "finetune", None, None)])
def test_the_papers_row(forget, training, number, total, tmp_path, capsys):
    """Under ours, of its Table 5 or 2, where it forgot the same; not in the table of the command,
    which says how good the judge is."""
    ratio = dict(unlearning_ratio=dict(total=0.5, n=10, ci95=[0.2, 0.8], automobile=0.2, dog=0.3),
                 unsure=0., none=0., kept=5, frechet_kept=1., frechet_real=2.)
    results = dict(
        config=dict(sde="vp", training=training, forget=forget, seed=0, sampler="ode",
                    sampler_steps=2), data="cifar10", device="a CPU",
        command="x", judge=dict(test_accuracy=0.9, floor=0.125, none=0.25),
        methods=dict(standard=ratio, relative=ratio, obtuse=ratio))
    sgu.save_table(results, tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "floor 12.50%" in text and "none 25.00%" in text and "paper" not in text
    sgu.save_json(tmp_path / "results.json", results)
    capsys.readouterr()
    make.main(["table", str(tmp_path)])
    text = capsys.readouterr().out
    assert "its floor" in text and "12.50%" in text
    assert (f"Table {number}" in text) if number else "paper's" not in text
    assert not number or total in text, text

def test_forgotten_samples_are_framed(tmp_path, monkeypatch):
    monkeypatch.setattr(sgu, "opinions", lambda judge, x: (torch.eye(3)[[0, 1]], None))
    x = torch.zeros(2, 1, 56, 56, dtype=torch.uint8)
    sgu.draw_picture(tmp_path / "p.png", dict(title=x), None, [1])
    frames = np.asarray(Image.open(tmp_path / "p.png"))[30, [131, 131 + 62]]
    assert frames.tolist() == [[255, 255, 255], [230, 159, 0]]

# ==== On what a file depends ======================================================================

@pytest.mark.parametrize("change, word", [
    (dict(power=1.0), "power 0.5 -> 1.0"), (dict(loss=sgu.orthogonal_loss), "loss"),
    (dict(prepare=lambda score, arguments: arguments), "prepare"),
    (dict(window=(0.1, 6.0)), "window"), (dict(alpha=0.75), "alpha 0.95 -> 0.75"),
    (dict(keep="D"), "D_g -> D")], ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_an_edited_method_is_another(change, word, copied, capsys, monkeypatch):
    monkeypatch.setitem(sgu.METHODS, "obtuse", sgu.METHODS["obtuse"]._replace(**change))
    check_refused(capsys, copied[1], "obtuse.pt", word)

def test_an_edited_schedule_is_another(copied, capsys, monkeypatch):
    monkeypatch.setitem(sgu.SCHEDULES, "vp", functools.partial(sgu.VP, beta_max=10.0))
    check_refused(capsys, copied[1], "standard.pt", "schedule")

def test_another_noise_law_is_refused(copied, capsys, monkeypatch):
    monkeypatch.setattr(sgu, "PRESETS", tiny_presets(noise_law=(0.5, 0.8, 5)))
    check_refused(capsys, copied[1], "noise_law")

def test_samples_of_something_else_are_refused(copied, capsys, tmp_path):
    """Of another sampler, schedule or network; and half a network is none."""
    (out, argv), new = copied, tmp_path / "new"
    check_refused(capsys, [*argv, "--sampler", "em"], "sampler ode -> em")
    pre = [*argv, "--methods", "standard", "--pretrained", out / "standard.pt", "--out", new]
    assert command(capsys, *pre)[0] == 0
    check_refused(capsys, [*pre, "--sde", "ve"], "samples_standard.pt", "sde vp -> ve")
    saved = sgu.read_file(out / "obtuse.pt")
    saved["state"]["weights"]["last.weight"] += 1
    torch.save(saved, out / "obtuse.pt")
    check_refused(capsys, argv, "samples_obtuse.pt", "network")
    saved["state"]["parts"] = []
    torch.save(saved, tmp_path / "half.pt")
    half = [*argv, "--pretrained", tmp_path / "half.pt", "--out", tmp_path / "b"]
    check_refused(capsys, half, "half.pt", "finished")

def test_levels_of_refinement_share_their_signs(copied, monkeypatch):
    """However many images are taken at once."""
    opt, seeds = sgu.resolve(sgu.parse_options(list(map(str, copied[1]))))[0], []
    monkeypatch.setattr(sgu, "bits_per_dim", lambda score, sde, x, steps, generator: seeds.append(
        generator.initial_seed()) or torch.zeros(len(x)))
    opt.seconds, x = {}, torch.zeros(60, 1, 8, 8, dtype=torch.uint8)
    for steps in (64, 128):
        sgu.values_of("m", tiny_net(), opt, f"likelihood D_g {steps}", x, steps)
    assert len(seeds) > 3 and len(set(seeds)) == 1, seeds

def test_what_pictures_show(copied, capsys, monkeypatch):
    """The first samples; of inpainting, test images of D_g, then of D_f, above what became of them.
    """
    drawn = {}
    monkeypatch.setattr(sgu, "draw_picture",
                        lambda path, rows, *rest: drawn.update({pathlib.Path(path).stem: rows}))
    assert command(capsys, *copied[1], "--tasks", "sample,inpaint")[0] == 0
    titles = [sgu.METHODS[m].title for m in ("standard", "obtuse")]
    assert list(drawn["samples"]) == titles and list(drawn["inpaint"]) == ["test images", *titles]
    state = sgu.read_file(copied[0] / "samples_obtuse.pt")["state"]
    assert torch.equal(drawn["samples"]["SGU-Obtuse"], state["values"][:16])
    data = sgu.choose(sgu.load_data(copied[1][1]), "two")
    gone = sgu.is_forgotten(data, "test")
    shown, after = drawn["inpaint"]["test images"], drawn["inpaint"]["SGU-Obtuse"]
    assert torch.equal(shown, torch.cat([data["test"][rows][:4] for rows in (~gone, gone)]))
    assert torch.equal(after[:, :, 4:], shown[:, :, 4:]), "each below its own image"

def test_seconds_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sgu, "time", always_late())
    opt = types.SimpleNamespace(out=tmp_path, fresh=False, checksum=0, forget="", seed=0,
                                precision="", seconds={})
    for n in (2, 5):
        def job(state):
            for step in range(state["step"] if state else 0, n):
                yield dict(step=step + 1, steps=n, snapshot=lambda: dict(step=step + 1))
        sgu.finish("x", opt, job)
    assert opt.seconds["x"] == 5 * 31

def test_folders(tmp_path, small):
    argv = ["--dataset", write_shapes(tmp_path / "s.npz"), "--forget", "two"]
    outs = {sgu.resolve(sgu.parse_options([*argv, *more.split()]))[0].out for more in (
        "", "--recipe paper", "--training retrain", "--sde ve", "--forget one")}
    assert len(outs) == 5, outs

# ==== Defaults, data and judge ====================================================================

@pytest.mark.parametrize("name, evaluations", [("em", 121), ("pc", 201), ("ancestral", 101),
                                               ("multistep", 21), ("ode", 19)])
def test_sampler_steps_of_all(name, evaluations, small, tmp_path):
    path, calls = write_shapes(tmp_path / "s.npz"), []
    opt = sgu.resolve(sgu.Options(dataset=path, forget="two", sampler=name))[0]
    score = counting(lambda x, t: -x, calls)
    sgu.SAMPLERS[name](score, sgu.VE(), (1, 2), steps=opt.sampler_steps, generator=seeded())
    assert len(calls) == evaluations
    assert inspect.signature(sgu.predictor_corrector).parameters["snr"].default == 0.16

@every_sde
def test_of_two_samplers_only_ode_is_a_map(sde):
    check_ode_map(sgu.SAMPLERS["ode"], sde)
    with pytest.raises(AssertionError):
        check_ode_map(sgu.SAMPLERS["multistep"], sde)

@pytest.mark.parametrize("flags, fast", [("amx_bf16", True), ("avx512_bf16", True),
                                         ("avx2", False)])
def test_fast_machines(flags, fast, monkeypatch):
    text = f"model name\t: A CPU\nflags\t\t: sse {flags} avx\n"
    monkeypatch.setattr(pathlib.Path, "exists", lambda self: True)
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self, **kw: text)
    assert sgu.describe("cpu").startswith("A CPU (bfloat16), " if fast else "A CPU, ")

def test_slow_machines_take_fewer_steps_but_of_glyphs(monkeypatch, tmp_path):
    path, presets = write_shapes(tmp_path / "s.npz"), sgu.PRESETS
    kinds = [("A CPU (bfloat16)", "bfloat16", 10), ("A CPU", "float32", 6)]
    for machine, precision, tenths in kinds:
        monkeypatch.setattr(sgu, "describe", lambda device: f"{machine}, 1 thread")
        own = sgu.resolve(sgu.Options(dataset=path, forget="two", device="cpu"))[0]
        glyphs = sgu.resolve(sgu.Options(device="cpu"))[0]
        assert own.precision == glyphs.precision == precision
        assert own.steps == presets[28, "cpu"][6] * tenths // 10
        assert glyphs.steps == presets["glyphs", "cpu"][6]         # fewer would draw broken digits

@pytest.mark.parametrize("side, size", [(16, 28), (28, 28), (32, 32), (64, 64)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_preset_is_of_the_size_and_the_device(side, size, device, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(sgu, "describe", lambda device: "A CPU (bfloat16), 1 thread")
    opt = sgu.resolve(sgu.Options(dataset=write_shapes(tmp_path / "s.npz", n=64, side=side),
                                  forget="two"))[0]
    preset = dict(zip(sgu.COLUMNS, sgu.PRESETS[size, device]))
    assert opt.device == device and opt.network["channels"] == list(preset["channels"])
    for key in ("patch", "data_std"):
        assert opt.network[key] == preset[key]
    assert {key: getattr(opt, key) for key in sgu.COLUMNS[4:]} == {
        key: preset[key] for key in sgu.COLUMNS[4:]}

def test_judge_trains_with_smoothed_labels_and_doubts_none(monkeypatch):
    """Its loss is -sum_k q_k w_k log p_k / sum w_y, where q is 0.95 on the label and 0.05 even."""
    seen, cross_entropy = [], torch.nn.functional.cross_entropy
    def recorded_loss(logits, label, *args, **kw):
        value = cross_entropy(logits, label, *args, **kw)
        seen.append((logits.detach().double(), label, value.detach()))
        return value
    monkeypatch.setattr(sgu.F, "cross_entropy", recorded_loss)
    learn(*sgu.draw_glyphs(60, 0, side=16), width=2, steps=1, batch_size=20)
    (logits, label, value), = seen
    w = torch.cat([torch.ones(10), torch.tensor([1 / 8])]).double()
    q = 0.05 / 11 + 0.95 * torch.nn.functional.one_hot(label, 11)
    mine = -(q * w * logits.log_softmax(1)).sum() / w[label].sum()
    assert abs(float(mine - value)) < 1e-5 and (label == 10).sum() == 4

@pytest.mark.parametrize("right, warned", [(89, True), (91, False)])
def test_a_poor_judge_is_said(right, warned, small, monkeypatch, tmp_path, capsys):
    class Fixed(torch.nn.Module):
        """Right on the first images of a hundred: the label is their first pixel."""
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
        def features(self, x):
            return ((x[:, 0, 0] + 1) * 127.5).round()
        def head(self, f):
            return 20 * torch.nn.functional.one_hot(f[:, 0].long(), 5).float()
    x = np.random.default_rng(0).integers(9, 99, (200, 8, 8), dtype=np.uint8)
    y = np.arange(200) % 4
    x[:, 0, 0] = np.where(np.arange(200) % 100 < right, y, (y + 1) % 4)
    path, split = str(tmp_path / "s.npz"), np.arange(200) // 100
    np.savez(path, images=x, labels=y, split=split)
    sgu.run(sgu.Options(dataset=path, forget="2", methods="unseen", tasks="reconstruct",
                        steps=2, likelihood_samples=2, out=str(tmp_path / "out")), judge=Fixed())
    assert ("the judge is right on" in capsys.readouterr().err) == warned

def test_forget_images_draw_numbers_of_their_own():
    net, seen = Scalar(), []
    train_scalar(net, pushing(net, [0.3], seen))
    assert seen[0][3].initial_seed() % 2 == 1
    with pytest.raises(ValueError, match="uint8"):
        train_scalar(net, keep=OK * 255, loss=sgu.obtuse_loss)

def test_halves_and_orientation(monkeypatch):
    """Rows get brighter downwards; the half for training is the one called so."""
    from torchvision import datasets
    rows = np.arange(32, dtype=np.uint8)[:, None, None]
    picture = np.broadcast_to(rows, (32, 32, 3))
    def part(root, train, download):
        n = 5 if train else 3
        return types.SimpleNamespace(data=np.stack([picture] * n), classes=["a", "b"],
                                     targets=[i % 2 for i in range(n)])
    monkeypatch.setattr(datasets, "CIFAR10", part)
    data = sgu.load_data("cifar10", "nowhere")
    assert (len(data["train"]), len(data["test"])) == (5, 3)
    assert data["train"][0, 0, :, 3].tolist() == list(range(32))

def test_photos_writes_what_the_command_reads(tmp_path, offline, monkeypatch):
    """Images, labels or attributes, names and the halves of torchvision's own files (gray) and of
    stand-ins (STL-10 and CelebA)."""
    for name, folder, last in (("fashion", "FashionMNIST", "Ankle boot"),
                               ("kmnist", "KMNIST", "wo")):
        made = write_mnist(tmp_path / folder / "raw")
        photos.main(name, str(tmp_path))
        data = sgu.load_data(str(tmp_path / f"{name}.npz"))
        assert data["classes"][9] == last and sgu.choose(data, last)["forget"] == [9]
        for key, half in (("train", "train"), ("test", "t10k")):
            assert np.array_equal(data[key][:, 0].numpy(), made[half][0]), name
            assert data[key + "_labels"].tolist() == made[half][1].tolist()
    rng = np.random.default_rng(0)
    pixels, has = rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8), rng.integers(0, 2, (8, 40))
    def stl10(root, half, download):
        rows = slice(0, 5) if half == "train" else slice(5, 8)
        return types.SimpleNamespace(data=pixels[rows].transpose(0, 3, 1, 2), classes=["a", "b"],
                                     labels=np.arange(8)[rows] % 2)
    class CelebA(list):
        attr_names = [f"a{i}" for i in range(40)] + [""]
        def __init__(self, root, half, transform, download):
            rows = dict(train=[0, 1, 2, 3], valid=[4], test=[5, 6, 7])[half]
            whole = [np.pad(pixels[i], ((35, 119), (15, 99), (0, 0))) for i in rows]
            super().__init__((transform(Image.fromarray(x)), None) for x in whole)
            self.attr = has[rows]
    monkeypatch.setattr(photos.datasets, "STL10", stl10)
    monkeypatch.setattr(photos.datasets, "CelebA", CelebA)
    for name in ("stl10", "celeba"):
        photos.main(name, str(tmp_path))
    data = sgu.load_data(str(tmp_path / "stl10.npz"))
    assert data["classes"] == ["a", "b"] and data["test_labels"].tolist() == [1, 0, 1]
    assert np.array_equal(data["train"].permute(0, 2, 3, 1).numpy(), pixels[:5])
    data = sgu.load_data(str(tmp_path / "celeba.npz"))
    assert data["classes"] == CelebA.attr_names[:40] and data["train"].shape == (5, 3, 64, 64)
    assert np.array_equal(data["train_labels"].numpy(), has[:5] > 0)
    assert np.array_equal(data["test_labels"].numpy(), has[5:] > 0)
    assert not data["test"][..., 28:, :].any() and (data["test"][..., :27, :27] > 0).all()

def test_glyphs_for_training_and_testing(monkeypatch):
    draws, draw = [], sgu.draw_glyphs
    monkeypatch.setattr(sgu, "draw_glyphs", lambda n, seed: draws.append((n, seed)) or [
        v.repeat_interleave(n // 200, 0) for v in draw(200, seed)])
    data = sgu.load_data("glyphs")
    assert draws == [(12000, 0), (2000, 1)]
    assert (len(data["train"]), len(data["test"])) == (12000, 2000)

def test_judge_sees_digits_the_right_way_round(monkeypatch):
    """Shifted on black and never mirrored; colour images half of the time, and half of them under
    noise of strength 0 to 0.2 (which moves a black or white pixel inward by 0.4 of that)."""
    seen, features = [], sgu.Judge.features
    monkeypatch.setattr(sgu.Judge, "features",
                        lambda self, x: seen.append(x) or features(self, x))
    for channels in (1, 3):
        x = torch.zeros(40, channels, 16, 16, dtype=torch.uint8)
        x[..., 2:5] = 255                              # left of the middle
        learn(x, torch.arange(40) % 2, width=2, steps=12, batch_size=10)
    left = [bool((v[1:5, ..., :8].mean((1, 2, 3)) > v[1:5, ..., 8:].mean((1, 2, 3))).all())
            for v in seen]
    assert all(left[:12]) and 0 < sum(left[12:]) < 12
    off = torch.stack([(1 - v[1:5].abs()).mean((1, 2, 3)) for v in seen])
    assert not off[:12].any(), "on another ground"
    assert 12 < (off[12:] > 0).sum() < 36 and 0.06 < off[12:].max() < 0.09

def test_judge_of_colours_reads_through_faint_noise():
    """Coloured glyphs under noise of strength 0.3 keep their labels; without noise in training a
    third of them would not."""
    x, y = sgu.draw_glyphs(2500, 3, side=16)
    x = x * torch.rand(2500, 3, 1, 1, generator=seeded()).add(0.5).clamp(max=1)
    judge = learn(x[:2000].byte(), y[:2000], width=6, steps=200, batch_size=64)
    clean = sgu.from_levels(x[2000:].byte())
    noisy = clean + 0.3 * torch.randn(clean.shape, generator=seeded(1))
    for images in (clean, noisy):
        right = sgu.opinions(judge, sgu.to_levels(images))[0].argmax(1) == y[2000:]
        assert right.float().mean() > 0.9, f"{right.float().mean():.0%} right"

@pytest.mark.parametrize("channels, n, times", [(3, 9_999, 2), (3, 10_000, 1), (1, 9_999, 1)])
def test_few_photographs_are_mirrored(channels, n, times, tmp_path, small, monkeypatch):
    """Less than 10,000 images in colour train as they are and mirrored; digits never do."""
    split = np.arange(n + 9) >= n
    write_npz(tmp_path / "x.npz", n + 9, channels=channels, split=split)
    opt, data = sgu.resolve(sgu.Options(dataset=str(tmp_path / "x.npz"), forget="1",
                                        training="retrain", out=str(tmp_path)))
    monkeypatch.setattr(sgu, "finish", lambda label, opt, job, kind, **config: job.keywords)
    gone = sgu.is_forgotten(data, "train")
    for method, kept in (("standard", data["train"]), ("obtuse", data["train"][~gone])):
        given = sgu.get_model(method, opt, data)
        assert torch.equal(given["keep"], torch.cat([kept, kept.flip(3)][:times])), method
    lost = data["train"][gone]
    assert torch.equal(given["forget"], torch.cat([lost, lost.flip(3)][:times]))

def test_resize_averages(tmp_path):
    stripes = np.tile(np.array([0, 160, 160, 0], np.uint8), 64)[None, None]
    write_npz(tmp_path / "s.npz", images=stripes.repeat(24, 0).repeat(256, 1))
    x = sgu.load_data(str(tmp_path / "s.npz"))["train"][..., 1:-1].float()
    assert (x - 80).abs().max() < 2

# ==== Surroundings ================================================================================

def test_hostile_surroundings(tmp_path):
    """A real process in the C locale, without a standard error, with LaTeX in matplotlibrc and odd
    class names: done, and all files are in UTF-8."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    names = np.array(["gr\xfcn", "\u65e5\u672c|\udcff", "three", "four"])
    path = write_shapes(tmp_path / "odd.npz", class_names=names)
    script = ("import sys; sys.path.insert(0, sys.argv.pop(1)); import testkit, sgu; "
              "sgu.PRESETS = testkit.tiny_presets(); sys.exit(sgu.main(sys.argv[1:]))")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    env |= dict(LC_ALL="C", MPLCONFIGDIR=str(tmp_path), PYTHONCOERCECLOCALE="0")
    argv = ["--dataset", path, *QUICK, "--forget", "0", "--methods", "standard", "--out", "out"]
    python = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-X", "utf8=0", "-c", script]
    python += [str(pathlib.Path(sgu.__file__).parent / "notebooks"), *argv]
    child = subprocess.run(python, cwd=tmp_path, env=env, stdout=subprocess.PIPE)
    assert child.returncode == 0, child.stdout[-2000:]
    r = results_of(tmp_path / "out")
    ratio, classes = (r["methods"]["standard"][k] for k in ("unlearning_ratio", "class_histogram"))
    assert r["config"]["forget"] == "gr\xfcn" and "gr\xfcn" in ratio
    assert "gr\xfcn" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert len(classes) == 4 and not any("|" in name for name in classes)

def test_thread_closed_pipe_and_no_standard_error(copied, monkeypatch):
    """Where Ctrl-C cannot be caught, and where nobody reads: the work is done, exit code 0."""
    argv, codes = [str(word) for word in copied[1]], []
    thread = threading.Thread(target=lambda: codes.append(sgu.main(argv)))
    thread.start()
    thread.join()
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")
    for name, stream in (("stderr", None), ("stdout", Closed())):
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, stream)
            codes.append(sgu.main(argv))
    with torch.inference_mode():
        codes.append(sgu.main(argv))
    assert codes == [0, 0, 0, 0]

def test_toy_into_a_closed_pipe(tmp_path):
    """A reader that leaves at once, as head does: exit code 0, and no word about the pipe."""
    end, out = os.pipe()
    os.close(end)
    code = ("import sys, toy_gmm as toy\n"
            "toy.QUICK.update(train=99, steps=1, samples=9, nll=(2, 4.))\n"
            "sys.exit(toy.main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", code, "--quick", "--out", str(tmp_path)],
                          cwd=pathlib.Path(toy_gmm.__file__).parent, stdout=out,
                          stderr=subprocess.PIPE, text=True,
                          env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"})
    os.close(out)
    assert done.returncode == 0 and "pipe" not in done.stderr, done.stderr
    assert (tmp_path / "figure2.png").exists()

# ==== What would be misread is refused, or read rightly ===========================================

def test_the_average_is_asked_as_for_samples():
    """Dropout off: the score of the average is a function of (x, t) alone."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4), torch.nn.Dropout(0.5),
                              torch.nn.Unflatten(1, (1, 2, 2)))
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, x, level):
            return self.net(x)
    torch.manual_seed(0)
    model = Model()
    *_, last = sgu.train(model, copy.deepcopy(model), sgu.VP(), OK, steps=2)
    x, t = OK, torch.full((len(OK),), 0.5)
    assert torch.equal(last["score"](x, t), last["score"](x, t))

def test_shapes_and_times_that_would_broadcast():
    """A score of one channel in place of three, and the number of a step in place of a time."""
    x = torch.rand(4, 3, 2, 2, generator=seeded())
    with pytest.raises(RuntimeError, match="shape"):
        sgu.score_matching_loss(lambda x, t: -x[:, :1], sgu.VP(), x, generator=seeded())
    with pytest.raises(ValueError, match="t: .B,. in .0, 1."):
        sgu.obtuse_loss(lambda x, t: -x, sgu.DDPM(), x, t=torch.full((4,), 500))
    with pytest.raises(ValueError, match="must grow"):
        sgu.log_likelihood(lambda x, t: -x, sgu.VE(20.0, 0.01), x)

def test_a_schedule_that_will_not_do_is_refused_first(finished, tmp_path, small, capsys,
                                                      monkeypatch):
    """No noise at t_min, or no signal at t = 1: before anything is trained."""
    class Silent(sgu.VE):
        def marginal(self, t):
            return torch.ones_like(t), t
    class Deaf(sgu.VE):
        def marginal(self, t):
            return 1 - t, 0.01 + t
    forbid(monkeypatch, *WORK)
    for schedule in (Silent, Deaf):
        monkeypatch.setitem(sgu.SCHEDULES, "ve", schedule)
        check_refused(capsys, [*finished[1], "--sde", "ve", "--out", tmp_path / "x"], "sigma(t)")

def test_training_under_no_grad_is_refused():
    with torch.no_grad(), pytest.raises(TypeError, match="differentiable"):
        train_scalar(Scalar(), sgu.obtuse_loss)

def test_pictures_of_two_channels(tmp_path, monkeypatch):
    """They show the first one in grey."""
    monkeypatch.setattr(sgu, "opinions", lambda judge, x: (torch.eye(3)[[0]], None))
    x = torch.tensor([200, 10], dtype=torch.uint8).view(1, 2, 1, 1).expand(1, 2, 64, 64)
    sgu.draw_picture(tmp_path / "p.png", dict(title=x), None, [1])
    assert np.asarray(Image.open(tmp_path / "p.png"))[30, 160].tolist() == [200, 200, 200]

def test_the_error_of_few_steps_is_no_zero():
    score, x = TOY.score(sgu.VP()), torch.randn(5, 2, generator=seeded(), dtype=F64)
    fine = sgu.log_likelihood(score, sgu.VP(), x, steps=200, exact=True)
    for steps in (2, 3):
        got, error = sgu.log_likelihood(score, sgu.VP(), x, steps=steps, exact=True, error=True)
        assert error.mean() > (got - fine).abs().mean() / 5, steps
    with pytest.raises(ValueError, match="steps >= 2"):
        sgu.log_likelihood(score, sgu.VP(), x, steps=1, error=True)

def test_a_loss_is_known_by_its_name_and_by_what_is_bound_to_it(copied, capsys, monkeypatch):
    """Not by where it lies in memory, which changes from run to run, nor by its text."""
    def use(loss):
        monkeypatch.setitem(sgu.METHODS, "obtuse", sgu.METHODS["obtuse"]._replace(loss=loss))
        return loss
    def obtuse_loss(*args, **kw):
        raise AssertionError("all is done")
    obtuse_loss.__qualname__ = "obtuse_loss"           # as if it were written in sgu.py
    use(obtuse_loss)
    assert command(capsys, *copied[1])[0] == 0
    use(functools.partial(obtuse_loss, weighting="paper"))
    check_refused(capsys, copied[1], "obtuse.pt", "loss <function", "weighting='paper'")

@pytest.mark.parametrize("labels", [np.repeat([0, 1, 2], 80), np.tile(np.repeat([0, 1], 60), 2),
                                    np.r_[0, 1, np.repeat([0, 1], 119)]])
def test_nearly_sorted_files_are_mixed(labels, tmp_path):
    """Sorted by class, two sorted halves one after the other, and but for a pair."""
    write_npz(tmp_path / "x.npz", n=243, labels=np.r_[labels, 0, 1, 0], split=np.arange(243) // 240)
    mixed = sgu.load_data(str(tmp_path / "x.npz"))["train_labels"]
    assert len(mixed.unique_consecutive()) > 60

def test_attributes_that_nobody_knows(tmp_path, capsys):
    y = np.arange(24.)[:, None] % 2
    y[3] = math.nan
    write_npz(tmp_path / "x.npz", labels=None, attributes=y)
    check_refused(capsys, ["--dataset", tmp_path / "x.npz", *QUICK, "--forget", "0", "--out",
                           tmp_path / "new"], "attributes")

def test_glyphs_under_another_default_type():
    want = sgu.draw_glyphs(20, 0)[0]
    torch.set_default_dtype(F64)
    try:
        assert torch.equal(sgu.draw_glyphs(20, 0)[0], want)
    finally:
        torch.set_default_dtype(torch.float32)
