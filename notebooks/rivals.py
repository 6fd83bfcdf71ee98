"""Rivals of SGU as methods of sgu.py, and the comparisons that take longer than a notebook should.

    python notebooks/rivals.py run --methods siss    the command of sgu.py, with the rivals' methods
    python notebooks/rivals.py toy          every method on the three Gaussians
    python notebooks/rivals.py mnist        every method on MNIST, forget 3 and 7
    python notebooks/rivals.py relearn      how fast do 100 images bring 3 and 7 back?
    python notebooks/rivals.py samplers     the ratio by sampler and number of steps
    python notebooks/rivals.py recipe       what each part of our training recipe is worth
    python notebooks/rivals.py flips        what mirrored images buy a model of STL-10

Run it from the repository's top folder. A comparison writes one file of notebooks/results. Its
trials are files in --out, so one that was stopped goes on; relearn needs mnist's networks there.

The rules of toy and mnist. All methods start from one Standard network and get the same number of
gradients of a batch (plain fine-tuning, which has no forget gradient, takes twice the steps; what
SalUn and Fisher look at first and the forward pass of SGU-Relative's reference come on top). Each
is tried in the three settings of SETTINGS with one seed, on one half of the test images. The one
whose samples come closest to real kept data wins, by the distance of all samples: what is left of
the forgotten classes counts, and so does damage. It is run with three other seeds and measured on
the other half. The distance is Frechet's of the judge's features; on the Gaussians, whose mean and
covariance hardly feel the middle one, it is the energy distance.
"""
import argparse, concurrent.futures, contextlib, copy, functools, io, json, math, multiprocessing
import os, pathlib, platform, sys, time
from unittest import mock

here = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import sgu
from make import table_text

# ==== 1. The rivals. Importing this file adds them to sgu.METHODS ================================

def neggrad_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None):
    """NegGrad+ (Kurmanji et al. 2023; Eq. 7 taken literally): minus the keep loss, on D_f.
    x0: (B, ...) from D_f -> scalar <= 0. It has no lower bound."""
    return -sgu.score_matching_loss(score, sde, x0, t, z, weighting, generator)

def erasediff_loss(score, sde, x0, t=None, z=None, weighting="noise", generator=None, centre=0.5):
    """EraseDiff (Wu et al. 2024): aim e on D_f at uniform noise of mean centre, 0.5 as published.
    x0: (B, ...) from D_f -> scalar >= 0. Alone its optimum is the constant e = centre, a uniform
    push (none for 0); with the keep loss it is (e_g + R centre)/(1 + R)."""
    t, e, z = sgu.predict_noise(score, sde, x0, t, z, generator)
    aim = torch.rand(e.shape, generator=generator, device=e.device) - 0.5 + centre
    return (sgu.loss_weight(sde, t, weighting) * (e - aim).square().mean(1)).mean()

erasediff_zero_loss = functools.partial(erasediff_loss, centre=0.0)

def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]

def siss_backward(model, keep_loss, forget_loss, alpha):
    """The step of SISS (Alberti et al. 2025) without its importance sampling: the keep gradient,
    and the forget gradient scaled to 1 - alpha times its norm."""
    weights, norm = trainable(model), torch.nn.utils.get_total_norm
    away = torch.autograd.grad(forget_loss, weights, materialize_grads=True)
    keep_loss.backward()
    scale = (1 - alpha) * norm([p.grad for p in weights]) / norm(away).clamp(min=1e-12)
    for p, g in zip(weights, away):
        p.grad.add_(scale * g)

def siss(standard_score, arguments):
    return dict(arguments, backward=siss_backward)

def weighting_of(arguments, i):
    """The weight of the keep (0) or of the forget loss (1) that train will use."""
    weighting, std = arguments["recipe"].weighting, arguments.get("data_std")
    if weighting == "balanced":
        std = getattr(arguments["model"], "data_std", 0.5) if std is None else std
        return sgu.balanced_weight(arguments["sde"], std, (1.0, 0.5)[i])
    return weighting[i] if isinstance(weighting, tuple) else weighting

def gradients(arguments, loss, data, weighting, window, batches, batch_size):
    """The gradients of loss on random batches of data at the model's weights, one list a batch."""
    model, sde, recipe = (arguments[key] for key in ("model", "sde", "recipe"))
    score = sgu.make_score(model, sde, arguments.get("data_std"), recipe.precision)
    g = torch.Generator(data.device).manual_seed(arguments["seed"])
    for _ in range(batches):
        x0 = data[torch.randint(len(data), (batch_size,), generator=g, device=data.device)]
        x0 = sgu.dequantise(x0, g) if x0.dtype == torch.uint8 else x0
        t = sgu.sample_times(sde, batch_size, g, data.device, window, recipe.noise_law)
        value = loss(score, sde, x0, t=t, weighting=weighting, generator=g)
        yield torch.autograd.grad(value, trainable(model), materialize_grads=True)

def salun(standard_score, arguments, share=0.5, batches=10, batch_size=64):
    """SalUn's mask (Fan et al. 2024): train only that half of the weights whose summed gradient of
    the forget loss is largest in Standard. The others get no gradient; and since Muon mixes all
    weights of a layer, they are also put back after its step."""
    model, weights = arguments["model"], trainable(arguments["model"])
    batch = gradients(arguments, arguments["forget_loss"], arguments["forget"],
                      weighting_of(arguments, 1), arguments["window"], batches, batch_size)
    total = [sum(same) for same in zip(*batch)]
    saliency = torch.cat([g.abs().flatten() for g in total])
    threshold = saliency.kthvalue(max(1, round((1 - share) * len(saliency)))).values
    frozen = {p: (g.abs() <= threshold, p.detach().clone()) for p, g in zip(weights, total)}

    def backward(model, keep_loss, forget_loss, alpha):
        sgu.sgu_loss(keep_loss, forget_loss, alpha).backward()
        for p, (mask, _) in frozen.items():
            p.grad.masked_fill_(mask, 0)

    @torch.no_grad()
    def put_back(optimiser, args, kwargs):
        for group in optimiser.param_groups:
            for p in group["params"]:
                if p in frozen:
                    mask, start = frozen[p]
                    p.copy_(torch.where(mask, start, p))

    register_optimizer_step_post_hook(put_back)
    return dict(arguments, backward=backward)

def fisher(standard_score, arguments, strength=100.0, batches=50, batch_size=8):
    """Elastic weights (Kirkpatrick et al. 2017): NegGrad+ with strength sum_i F_i (w_i - w0_i)^2,
    which holds near Standard's weights w0 what the kept data need. F, the diagonal Fisher
    information of the keep loss at w0, is the mean squared gradient of small batches."""
    weights = trainable(arguments["model"])
    start = [p.detach().clone() for p in weights]
    batch = gradients(arguments, sgu.score_matching_loss, arguments["keep"],
                      weighting_of(arguments, 0), sgu.EVERY_SIGMA, batches, batch_size)
    information = [sum(g.square() for g in same) / batches for same in zip(*batch)]

    def backward(model, keep_loss, forget_loss, alpha):
        sgu.sgu_loss(keep_loss, forget_loss, alpha).backward()
        for p, p0, f in zip(weights, start, information):
            p.grad.add_(2 * strength * f * (p.detach() - p0))
    return dict(arguments, backward=backward)

def vdu(standard_score, arguments, strength=10.0):
    """Variational unlearning (VDU, Panda et al. 2025), which needs no D_g: NegGrad on D_f with
    weight 1 - alpha, and with weight alpha strength sum_i (w_i - w0_i)^2 / (2 v), which holds the
    weights near Standard's w0. v, the variance of a weight, comes from several trainings as
    published; we have one Standard, and take the mean square of its layer."""
    weights = trainable(arguments["model"])
    start = [p.detach().clone() for p in weights]
    variance = [p0.square().mean().clamp(min=1e-8) for p0 in start]

    def backward(model, keep_loss, forget_loss, alpha):
        ((1 - alpha) * forget_loss).backward()
        for p, p0, v in zip(weights, start, variance):
            pull = alpha * strength * (p.detach() - p0) / v
            p.grad = pull if p.grad is None else p.grad.add_(pull)
    return dict(arguments, backward=backward)

# What is a square of e - z gets the weight of squares, power 1; see balanced_weight in sgu.py.
brief = functools.partial(sgu.Method, share=0.09, pace=0.5, window=(0.0, 6.0))
sgu.METHODS.update(
    neggrad=brief("NegGrad+", neggrad_loss, 0.95, power=1.0),
    siss=brief("SISS", neggrad_loss, 0.9, power=1.0, prepare=siss),
    erasediff=brief("EraseDiff", erasediff_loss, 0.9),
    erasediff_zero=brief("EraseDiff, mean 0", erasediff_zero_loss, 0.9),
    salun=brief("SalUn mask, obtuse", sgu.obtuse_loss, 0.85, start="standard", prepare=salun),
    fisher=brief("NegGrad+, Fisher", neggrad_loss, 0.95, start="standard", power=1.0,
                 prepare=fisher),
    vdu=brief("VDU, without D_g", neggrad_loss, 0.9, start="standard", power=1.0, prepare=vdu),
)
TITLES = {name: method.title for name, method in sgu.METHODS.items()}

# ==== 2. Trials: each is a file in --out, several run at once =====================================

FORGET = "3,7"
DIGITS = ("standard", "orthogonal", "obtuse", "relative", "unseen")    # the committed networks
TUNING_SEED = 100
TINY = dict(steps=4, batch_size=8, samples=20, tuning_samples=20, likelihood_samples=2, images=20,
            looks=(0, 2), sampler_steps=3)                             # for --quick

def committed(name):
    """A network of notebooks/results by the name of its method; 'judge': that goes with them."""
    return str(here / f"results/mnist_{name}.pt")

def adam(params, lr):
    return torch.optim.Adam(params, lr, betas=(0.9, 0.99))

# Section 7 of sgu.py with one part taken back: {title: (recipe, optimiser of the inner
# convolutions, precision, share of the steps)}. float32 gets as many as fit the time of bfloat16.
CHANGES = {"ours": (sgu.Recipe(), sgu.Muon, "bfloat16", 1.0),
           "t uniform": (sgu.Recipe(None), sgu.Muon, "bfloat16", 1.0),
           "the paper's weights": (sgu.Recipe(weighting="paper"), sgu.Muon, "bfloat16", 1.0),
           "Adam for all weights": (sgu.Recipe(), adam, "bfloat16", 1.0),
           "float32, same time": (sgu.Recipe(), sgu.Muon, "float32", 0.6)}

def command(folder, dataset, judge, setting=None, change="", **options):
    """What sgu.py finds, given its options. setting: (alpha, share of the learning rate, window in
    sigma) of the only method; change: one of CHANGES. frechet_all is the distance of all samples,
    forgotten ones among them, to real images to keep."""
    muon = sgu.Muon
    if setting:
        how = dict(zip(("alpha", "pace", "window"), setting))
        sgu.METHODS[options["methods"]] = sgu.METHODS[options["methods"]]._replace(**how)
    if change:
        sgu.RECIPES["changed"], muon, precision, share = CHANGES[change]
        options.update(recipe="changed", precision=precision, steps=round(share * options["steps"]))
    opt = sgu.Options(dataset=dataset, device="cpu", out=str(folder), fresh=True, **options)
    judge = sgu.load_judge(judge)
    with mock.patch.object(sgu, "Muon", muon):
        results = sgu.run(opt, judge=judge)
    data = sgu.choose(sgu.load_data(dataset, opt.data_root), opt.forget)
    real = sgu.opinions(judge, data["test"][~sgu.is_forgotten(data, "test")])[1]
    for method, entry in results["methods"].items():
        saved = torch.load(folder / f"samples_{method}.pt", weights_only=True)
        features = sgu.opinions(judge, saved["state"]["values"])[1]
        entry["frechet_all"] = sgu.frechet(features, real)
    facts = {key: results["judge"][key] for key in ("test_accuracy", "floor")}
    return dict(methods=results["methods"], judge=facts)

def last_entry(found):
    """The figures of the last method of a trial, its error if it diverged."""
    if "error" in found:
        return found
    return dict(list(found["methods"].values())[-1], judge=found.get("judge"))

def attempt(trial, out, name, arguments):
    """The figures of a trial, from out/<name>.json or computed now. To diverge is a result too."""
    path, asked = out / f"{name}.json", json.loads(json.dumps(arguments))
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.get("asked") != asked:                      # what is there answers another question
        quiet = io.StringIO()
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                found = trial(out / name, **arguments)
        except FloatingPointError as error:
            found = dict(error=str(error))
        found["asked"] = asked
        sgu.save_json(path, found)
    return found

def attempt_all(trial, jobs, out):
    """jobs: {name: arguments} -> {name: figures}. A process of one thread per core: small networks
    gain little from more threads."""
    found, begin, spawn = {}, time.time(), multiprocessing.get_context("spawn")
    workers = concurrent.futures.ProcessPoolExecutor(
        os.cpu_count(), spawn, torch.set_num_threads, (1,))
    with workers as pool:
        tasks = {pool.submit(attempt, trial, out, name, how): name for name, how in jobs.items()}
        for task in concurrent.futures.as_completed(tasks):
            found[tasks[task]] = task.result()
            left = (time.time() - begin) / len(found) * (len(jobs) - len(found)) / 60
            words = f"{tasks[task]} {task.result().get('error', '')}"
            print(f"{len(found)}/{len(jobs)}, {left:.0f} min left: {words}", flush=True)
    return found

def halves(opt):
    """MNIST with one half of its test images, for tuning, and with the other, for the final
    figures: what sgu.py needs to know of both."""
    data, few = sgu.load_data("mnist", opt.data_root), 100 if opt.quick else None
    for i in (0, 1):
        parts = [[data[key + rest][first:few:step] for rest in ("", "_labels")]
                 for key, first, step in (("train", 0, 1), ("test", i, 2))]
        images, labels = (torch.cat(both).numpy() for both in zip(*parts))
        np.savez(opt.out / f"mnist-{i}.npz", images=images[:, 0], labels=labels,
                 split=np.repeat([0, 1], [len(part[0]) for part in parts]))
    return [dict(dataset=str(opt.out / f"mnist-{i}.npz"), judge=committed("judge"), forget=FORGET)
            for i in (0, 1)]

# ==== 3. Tables: mean and spread over seeds =======================================================

COLUMNS = dict(ratio="ratio, %", unsure="unsure, %", frechet_kept="Fréchet, kept",
               frechet_all="Fréchet, all", energy_kept="energy, kept", energy_all="energy, all",
               D_g="NLL D_g", D_f="NLL D_f")

def spreads(runs):
    """Figures of a method under several seeds -> mean, sd (of one seed, n - 1) and values of each
    column, and the interval of the pooled ratio."""
    found, ratios = {}, [run["unlearning_ratio"] for run in runs]
    for key in COLUMNS:
        flat = [dict(run, ratio=run["unlearning_ratio"]["total"], **run.get("nll_bits_per_dim", {}))
                for run in runs]
        values = [run.get(key) for run in flat]
        if None not in values:
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            found[key] = dict(mean=float(np.mean(values)), sd=sd, values=values)
    k, n = sum(round(r["total"] * r["n"]) for r in ratios), sum(r["n"] for r in ratios)
    return dict(found, pooled=dict(n=n, ci95=sgu.wilson(k, n)))

def spread_cell(entry, key):
    """mean ± sd of one figure, for a table."""
    if key not in entry:
        return "-"
    scale, digits = (100, 1) if key in ("ratio", "unsure") else (1, 4 if "energy" in key else 2)
    return " ± ".join(f"{scale * entry[key][part]:.{digits}f}" for part in ("mean", "sd"))

def judge_words(judge):
    return (f"Judge: our own CNN, test accuracy {100 * judge['test_accuracy']:.2f}%, "
            f"floor {100 * judge['floor']:.2f}%.")

def origin(results):
    """Where the numbers of a table come from, in words."""
    config = results["config"]
    return (f"{results['device']}; `{results['command']}`. Mean ± standard deviation of seeds "
            f"{', '.join(map(str, config['seeds']))}; n = {config['samples']} samples and "
            f"2 x {config['likelihood_samples']} likelihoods (bits/dim) a seed. "
            + (judge_words(results["judge"]) + " " if results.get("judge") else ""))

# ==== 4. All methods at equal cost: toy and mnist =================================================

WIDE, NARROW, ALL = (0.0, 6.0), (0.2, 3.0), (0.0, 20.0)                 # windows in sigma
ALPHAS = dict(      # method: two for MNIST, the second with both windows; three for the Gaussians
    orthogonal=(0.8, 0.95, 0.95, 0.9, 0.8), obtuse=(0.85, 0.95, 0.92, 0.85, 0.7),
    neggrad=(0.95, 0.98, 0.99, 0.985, 0.97), siss=(0.9, 0.95, 0.97, 0.9, 0.7),
    erasediff=(0.9, 0.97, 0.97, 0.9, 0.7), erasediff_zero=(0.9, 0.97, 0.97, 0.9, 0.7),
    salun=(0.85, 0.95, 0.92, 0.85, 0.7), fisher=(0.95, 0.98, 0.99, 0.985, 0.97),
    vdu=(0.5, 0.2, 0.99, 0.95, 0.9))
RATES = tuple((None, rate, WIDE) for rate in (0.25, 0.5, 1.0))
SETTINGS = dict(    # domain: method: three of (alpha, share of Standard's learning rate, window)
    mnist=dict(finetune=RATES,
               relative=((0.55, 0.5, NARROW), (0.55, 1.0, NARROW), (0.55, 0.5, WIDE)),
               **{m: ((a, 0.5, WIDE), (b, 0.5, WIDE), (b, 0.5, NARROW))
                  for m, (a, b, *_) in ALPHAS.items()}),
    toy=dict(finetune=RATES, relative=tuple((a, 0.5, ALL) for a in (0.9, 0.75, 0.55)),
             **{m: tuple((a, 0.5, ALL) for a in alphas[2:]) for m, alphas in ALPHAS.items()}))
SIZE = dict(toy=dict(steps=500, batch_size=512, lr=6e-3, tuning_samples=10000, samples=5000,
                     likelihood_samples=1000),
            mnist=dict(steps=200, batch_size=64, lr=4e-3, tuning_samples=300, samples=500,
                       likelihood_samples=50))
DISTANCE = dict(mnist="frechet", toy="energy")

def steps_of(method, size):
    """A step of the others is two gradients, one of D_g and one of D_f."""
    return size["steps"] * (2 if method == "finetune" else 1)

def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| from samples x: (n, d), y: (m, d), unbiased; 0 for equal
    laws (Szekely and Rizzo)."""
    def within(a):
        return float(torch.cdist(a, a).sum(dtype=torch.float64)) / (len(a) * (len(a) - 1))
    return 2 * float(torch.cdist(x, y).mean(dtype=torch.float64)) - within(x) - within(y)

def toy_data():
    """The same training points of D_g and D_f for Standard and for what starts from it."""
    import toy_gmm
    g, sets = torch.Generator().manual_seed(0), ((toy_gmm.KEEP, 40000), (toy_gmm.FORGET, 10000))
    return [toy_gmm.sample_mixture(components, n, g) for components, n in sets]

def toy_trial(folder, method, start, setting, seed, final, size):
    """The same on the three Gaussians, where likelihoods are exact and the share of the middle mode
    needs no judge. start: the weights to begin with. Both losses have one weight, as in toy_gmm.py;
    EraseDiff's, which is no smaller in noise, has its root."""
    import toy_gmm
    sde, std, model, rival = toy_gmm.SDE, toy_gmm.DATA_STD, toy_gmm.ToyNet(), sgu.METHODS[method]
    model.load_state_dict(torch.load(start, weights_only=True))
    score = sgu.make_score(copy.deepcopy(model).requires_grad_(False), sde)
    if setting:
        powers = (1.0, 0.5 if "erasediff" in method else 1.0)
        weights = tuple(sgu.balanced_weight(sde, std, power) for power in powers)
        keep, forget = toy_data()
        arguments = dict(
            model=model, ema=copy.deepcopy(model).requires_grad_(False), sde=sde, keep=keep,
            forget=forget if rival.loss else None, forget_loss=rival.loss, alpha=setting[0],
            steps=steps_of(method, size), lr=setting[1] * size["lr"], window=sgu.EVERY_SIGMA,
            batch_size=size["batch_size"], recipe=sgu.Recipe(toy_gmm.NOISE_LAW, weights), seed=seed)
        *_, last = sgu.train(**(rival.prepare(score, arguments) if rival.prepare else arguments))
        score = last["score"]
    n, g = size["samples"], torch.Generator().manual_seed(1000 + 2 * seed + final)
    x = sgu.euler_maruyama(score, sde, (n, 2), steps=100, generator=g)
    real, gone = toy_gmm.sample_mixture(toy_gmm.KEEP, 5000, g), toy_gmm.nearest_forgotten(x).bool()
    k, bits = int(gone.sum()), {}
    for key, components in (("D_g", toy_gmm.KEEP), ("D_f", toy_gmm.FORGET)) if final else ():
        points = toy_gmm.sample_mixture(components, size["likelihood_samples"], g)
        log_p = sgu.log_likelihood(score, sde, points, steps=64, exact=True)
        bits[key] = toy_gmm.bits(-float(log_p.mean()))
    return dict(methods={method: dict(
        unlearning_ratio=dict(total=k / n, n=n, ci95=sgu.wilson(k, n)), nll_bits_per_dim=bits,
        energy_kept=energy_distance(x[~gone], real), energy_all=energy_distance(x, real))})

def toy_job(opt, method, setting, seed, final, size):
    start = opt.out / f"toy-{'unseen' if method == 'unseen' else 'standard'}.pt"
    if not start.exists():
        import toy_gmm
        steps = dict(steps=20) if opt.quick else {}
        *_, last = toy_gmm.train_toy(start.stem[4:], *toy_data(), **steps)
        torch.save(last["snapshot"]()["weights"], start.with_suffix(".half"))
        os.replace(start.with_suffix(".half"), start)
    return dict(method=method, start=str(start), setting=setting, seed=seed, final=final, size=size)

def mnist_job(opt, method, setting, seed, final, size):
    """Without a setting the committed network as it is, which the command takes for Standard."""
    how = dict(methods=method, setting=setting, lr=size["lr"], batch_size=size["batch_size"],
               unlearn_steps=steps_of(method, size)) if setting else dict(methods="standard")
    start = committed("standard" if setting else method)
    return dict(opt.halves[final], sde="ve", pretrained=start, samples=size["samples"], seed=seed,
                likelihood_samples=size["likelihood_samples"],
                tasks="sample,likelihood" if final else "sample", **how)

def compare(domain, opt):
    """Tuning, then the chosen settings with three seeds -> the content of rivals-*.json."""
    trial, job = (toy_trial, toy_job) if domain == "toy" else (command, mnist_job)
    size = {k: TINY.get(k, v) if opt.quick else v for k, v in SIZE[domain].items()}
    settings = {m: rows[:1] if opt.quick else rows for m, rows in SETTINGS[domain].items()}
    opt.halves = halves(opt) if domain == "mnist" else None

    def results_of(final, keys):
        """keys: (method, number of its setting, seed) -> {key: figures}."""
        how = size if final else dict(size, samples=size["tuning_samples"])
        names = {key: "-".join(map(str, (domain, ("tune", "final")[final], *key))) for key in keys}
        jobs = {names[m, i, seed]: job(opt, m, None if i is None else settings[m][i], seed,
                                       final, how) for m, i, seed in keys}
        found = attempt_all(trial, jobs, opt.out)
        return {key: last_entry(found[name]) for key, name in names.items()}

    def far(m, i):
        return tuning[m, i, TUNING_SEED].get(DISTANCE[domain] + "_all", math.inf)

    tuning = results_of(0, [(m, i, TUNING_SEED) for m in settings for i in range(len(settings[m]))])
    best = {m: min(range(len(rows)), key=functools.partial(far, m)) for m, rows in settings.items()}
    best = dict(standard=None, **best, unseen=None)
    final = results_of(1, [(m, i, seed) for m, i in best.items() for seed in opt.seeds])
    described = {m: [dict(alpha=alpha, lr=pace * size["lr"], steps=steps_of(m, size), sigmas=window)
                     for alpha, pace, window in rows] for m, rows in settings.items()}
    methods = {}
    for m, i in best.items():
        runs = [final[m, i, seed] for seed in opt.seeds]
        methods[m] = dict(setting=i, recipe=None if i is None else described[m][i], runs=runs)
        if not any("error" in run for run in runs):
            methods[m].update(spreads(runs))
    tried = {m: [dict(row, **tuning[m, i, TUNING_SEED]) for i, row in enumerate(rows)]
             for m, rows in described.items()}
    return dict(config=dict(size, domain=domain, tuning_seed=TUNING_SEED, seeds=opt.seeds),
                tuning=tried, methods=methods, judge=runs[0].get("judge"))

def make_table(results):
    """The content of rivals-*.json -> Markdown."""
    config, methods, rows = results["config"], results["methods"], []
    keys = [key for key in COLUMNS if key in methods["standard"]]
    for m, entry in methods.items():
        how = entry["recipe"]
        words = f"{how['lr']:.2g}" if how else ""
        if how and m != "finetune":
            low, high = how.get("sigmas") or entry["sigmas"]
            words = f"{how['alpha']}, {words}, {low:g} to {high:g}"
        rows.append([TITLES[m], words, *(spread_cell(entry, key) for key in keys)])
    notes = (f"{origin(results)}Seeds are of fine-tuning and sampling (Standard and Unseen, one "
             f"network each: of sampling). {2 * config['steps']} gradients of a batch of "
             f"{config['batch_size']} each. Chosen from three settings with seed "
             f"{config['tuning_seed']}, n = {config['tuning_samples']}, by the distance to other "
             f"{'test images' if config['domain'] == 'mnist' else 'draws'}.")
    head = ["method", "alpha, rate, window σ", *(COLUMNS[k] for k in keys)]
    return f"{table_text(head, rows, words=2)}\n\n{notes}\n"

def frontier(results):
    """Left: what is left against damage, small and pale for the settings that were tried; right:
    against the NLL of D_g. Bars: standard deviation over seeds."""
    import matplotlib.pyplot as plt
    import style
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), sharey=True)
    distance = DISTANCE[results["config"]["domain"]] + "_kept"
    for m, entry in results["methods"].items():
        look = dict(marker=style.MARKER[m], color=style.COLOUR[m], ls="")
        for tried in results["tuning"].get(m, ()):
            if tried.get(distance) is not None:
                ratio = 100 * tried["unlearning_ratio"]["total"]
                axes[0].plot(tried[distance], ratio, alpha=0.3, ms=3.5, **look)
        for ax, key in zip(axes, (distance, "D_g")):
            if key in entry:
                y, bar = (100 * entry["ratio"][part] for part in ("mean", "sd"))
                ax.errorbar(entry[key]["mean"], y, bar, entry[key]["sd"], ms=7, lw=0.8, zorder=3,
                            label=TITLES[m], **look)
    axes[0].set(xlabel=f"damage: {COLUMNS[distance]} samples", ylabel="left: unlearning ratio, %",
                title="down and to the left is better")
    axes[1].set(xlabel="NLL of D_g, bits/dim")
    if distance == "energy_kept":
        axes[0].set_xscale("symlog", linthresh=0.01)     # an unbiased estimate of 0 may be negative
    else:
        axes[0].set_xscale("log")
        style.plain_ticks(axes[0].xaxis, (5, 7, 10, 15, 20, 30, 50, 100))
    for ax in axes:
        ax.grid()
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure

# ==== 5. The other comparisons ====================================================================

RELEARN = dict(images=100, looks=(0, 5, 10, 20, 40, 80), lr=1e-3, batch_size=64, samples=100)

def relearn_trial(folder, path, how, dataset, judge, forget):
    """Plain fine-tuning of a finished network on forgotten images; the share of 3s and 7s that it
    draws after some numbers of steps."""
    data, judge = sgu.choose(sgu.load_data(dataset), forget), sgu.load_judge(judge)
    model, sde = sgu.load_model(path)
    few, shares = data["train"][sgu.is_forgotten(data, "train")][:how["images"]], []

    def look(step, score):
        x = sgu.multistep_sample(score, sde, (how["samples"], *few.shape[1:]),
                                 generator=torch.Generator().manual_seed(7))
        label = sgu.opinions(judge, sgu.to_levels(x))[0].argmax(1)
        k = int(torch.isin(label, torch.tensor(data["forget"])).sum())
        shares.append(dict(step=step, total=k / len(x), n=len(x), ci95=sgu.wilson(k, len(x))))

    look(0, sgu.make_score(model, sde))
    model.requires_grad_(True)
    ema = copy.deepcopy(model).requires_grad_(False)
    for info in sgu.train(model, ema, sde, few, steps=max(how["looks"]), lr=how["lr"],
                          batch_size=how["batch_size"]):
        if info["step"] in how["looks"]:
            look(info["step"], info["score"])
    return dict(shares=shares)

def relearn(opt):
    """How fast do 100 images bring 3 and 7 back? In Unseen, who never saw any, as a yardstick."""
    how, half = {k: TINY.get(k, v) if opt.quick else v for k, v in RELEARN.items()}, halves(opt)[1]
    paths = {m: committed(m) for m in ("unseen", "standard")}
    for m in SETTINGS["mnist"]:
        found = list(opt.out.glob(f"mnist-final-{m}-*-{opt.seeds[0]}/{m}.pt"))
        if not found:
            raise sgu.UsageError(f"no network of {m} in {opt.out}: run first  python "
                                 "notebooks/rivals.py mnist  with the same --out")
        paths[m] = str(max(found, key=os.path.getmtime))
    done = attempt_all(relearn_trial, {f"relearn-{m}": dict(half, path=path, how=how)
                                       for m, path in paths.items()}, opt.out)
    gone = sgu.is_forgotten(sgu.choose(sgu.load_data(half["dataset"]), FORGET), "train")
    return dict(config=dict(how, steps=how["looks"], share_of_data=float(gone.float().mean())),
                methods={m: dict(shares=done[f"relearn-{m}"]["shares"]) for m in paths})

WALKS = [(name, steps) for name, all_steps in dict(
    em=(15, 30, 60, 120), pc=(30, 60), ancestral=(15, 30, 60, 120), multistep=(10, 20, 40),
    ode=(10, 20, 40)).items() for steps in all_steps]

def samplers(opt):
    """The ratio of the committed networks by sampler and number of steps."""
    n, half, walks = 20 if opt.quick else 500, halves(opt)[1], WALKS[::5] if opt.quick else WALKS
    keys = [(m, s, k) for s, k in walks for m in DIGITS]
    jobs = {"sampler-{}-{}-{}".format(m, s, k): dict(
        half, methods="standard", pretrained=committed(m), sde="ve", sampler=s, sampler_steps=k,
        samples=n, tasks="sample", seed=11) for m, s, k in keys}
    done = attempt_all(command, jobs, opt.out)
    rows = [dict(last_entry(done[name]), method=m, sampler=s, steps=k,
                 evaluations=k * (2 if s == "pc" else 1) + 1)
            for name, (m, s, k) in zip(jobs, keys)]
    return dict(config=dict(samplers=walks, n=n), rows=rows, judge=rows[0]["judge"])

RECIPE = dict(steps=1500, batch_size=64, samples=1000)

def recipe(opt):
    """Unseen, trained for a quarter of the command's steps by our recipe and with one part of it
    taken back at a time: how far its samples are from real images."""
    how, half = {k: TINY.get(k, v) if opt.quick else v for k, v in RECIPE.items()}, halves(opt)[0]
    how.update(methods="unseen", tasks="sample", seed=3)
    jobs = {f"recipe-{i}": dict(half, change=change, **how) for i, change in enumerate(CHANGES)}
    done = attempt_all(command, jobs, opt.out)
    rows = [dict(last_entry(done[name]), change=job["change"]) for name, job in jobs.items()]
    return dict(config=how, rows=rows, judge=rows[0].get("judge"))

def recipe_table(results):
    """The content of recipe-mnist-3,7.json -> Markdown."""
    rows, config = [], results["config"]
    for row in results["rows"]:
        figures = [row["error"], "", ""] if "error" in row else [
            f"{100 * row['unsure']:.1f}", f"{row['frechet_kept']:.2f}",
            f"{100 * row['unlearning_ratio']['total']:.1f}"]
        rows.append([row["change"], *figures])
    notes = (f"Unseen, {config['steps']} steps of {config['batch_size']}, seed 3, n = "
             f"{config['samples']} samples. "
             f"{judge_words(results['judge'])} {results['device']}; `{results['command']}`.")
    head = ["recipe", COLUMNS["unsure"], COLUMNS["frechet_kept"], COLUMNS["ratio"]]
    return f"{table_text(head, rows)}\n\n{notes}\n"

FLIPS = dict(forget="airplane", samples=2000)

def flips(opt):
    """Standard of STL-10 as the command trains it, from 5,000 images and their mirror images, and
    from the images alone: repeated until they are 10,000, they are too many to be mirrored."""
    own = pathlib.Path(opt.data_root, "stl10.npz")
    whole, again = str(own) if own.exists() else "stl10", str(opt.out / "stl10-repeated.npz")
    data = sgu.load_data(whole, opt.data_root)
    times = -(-10_000 // len(data["train"]))
    x, y = (torch.cat([data["train" + rest]] * times + [data["test" + rest]])
            for rest in ("", "_labels"))
    np.savez(again, images=x.permute(0, 2, 3, 1).numpy(), labels=y.numpy(),
             class_names=data["classes"], split=torch.arange(len(x)) >= times * len(data["train"]))
    tiny = {k: TINY[k] for k in ("steps", "batch_size", "samples") if opt.quick}
    how, rows, judge = dict(FLIPS, methods="standard", tasks="sample") | tiny, [], None
    for change, dataset in (("mirrored too", whole), ("as they are", again)):
        folder = opt.out / f"flips-{len(rows)}"
        found = sgu.run(sgu.Options(dataset=dataset, out=str(folder), data_root=opt.data_root,
                                    **how), judge=judge)
        judge = judge or sgu.load_judge(folder / "judge.pt")   # one for both, of the images once
        rows.append(dict(found["methods"]["standard"], change=change, judge=found["judge"]))
    return dict(config=how, rows=rows, device=sgu.describe("cpu"))       # one after the other

# ==== 6. The command line =========================================================================

EXPERIMENTS = dict(     # name: (function, results file)
    toy=(functools.partial(compare, "toy"), "rivals-toy"),
    mnist=(functools.partial(compare, "mnist"), "rivals-mnist-3,7"),
    relearn=(relearn, "relearn-mnist-3,7"), samplers=(samplers, "samplers-mnist-3,7"),
    recipe=(recipe, "recipe-mnist-3,7"), flips=(flips, "flips-stl10"))

def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("run", *EXPERIMENTS))
    parser.add_argument("--data-root", default="data", metavar="DIR", help="data sets [data]")
    parser.add_argument("--out", default="runs/rivals", type=pathlib.Path, metavar="DIR",
                        help="where the trials are kept [runs/rivals]")
    parser.add_argument("--quick", action="store_true",
                        help="tiny sizes, to see that it runs; the results file goes into --out")
    opt = parser.parse_args(argv)
    opt.seeds = [0] if opt.quick else [0, 1, 2]
    return opt

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["run"]:
        sys.exit(sgu.main(argv[1:]))
    opt = parse(argv)
    experiment, name = EXPERIMENTS[opt.experiment]
    folder = opt.out if opt.quick else here / "results"
    opt.out.mkdir(parents=True, exist_ok=True)
    try:
        results = experiment(opt)
    except sgu.UsageError as error:
        sys.exit(f"rivals: {error}")
    usual = dict(device=f"{sgu.describe('cpu')}, {os.cpu_count()} processes of 1 thread")
    results = usual | results | dict(
        command=f"python notebooks/rivals.py {opt.experiment}",
        versions=dict(python=platform.python_version(), torch=torch.__version__))
    table = dict(toy=make_table, mnist=make_table, recipe=recipe_table).get(opt.experiment)
    if table:
        results["markdown"] = table(results)
        print(results["markdown"])
    if table is make_table:
        frontier(results).savefig(folder / f"{name}.png")
    sgu.save_json(folder / f"{name}.json", results)

if __name__ == "__main__":
    main()
