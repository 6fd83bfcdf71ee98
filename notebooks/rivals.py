"""Experiments of notebooks 03, 07, 09 and 10 that take longer than a notebook should. Run from the repository's top folder.

    python notebooks/rivals.py toy                      all methods on the three Gaussians     -> results/rivals-toy.json
    python notebooks/rivals.py mnist --data-root data   all methods on MNIST, forget 3 and 7   -> results/rivals-mnist-3,7.json
    python notebooks/rivals.py relearn                  how fast do 100 images bring 3 and 7 back?    -> results/relearn-mnist-3,7.json
    python notebooks/rivals.py samplers                 the ratio by sampler and number of steps      -> results/samplers-mnist-3,7.json
    python notebooks/rivals.py seeds                    VE and VP, fine-tuned and re-trained, three seeds    -> results/seeds-mnist-3,7.json
    python notebooks/rivals.py noise                    which noise should CIFAR-10 train at?         -> results/noise-cifar10.json

Every trial is a file in --out (default runs/rivals); a run that was stopped goes on. relearn needs the networks of mnist in --out.

The rules of the comparison. All methods start from one Standard network and get the same number of gradients of a batch (plain
fine-tuning, which needs no forget gradient, takes twice the steps; what SalUn and Fisher look at first and the forward pass of the
reference in SGU-Relative come on top). Each is tried in the three settings of SETTINGS with one seed, on the validation half of the
test images; the setting whose samples come closest to the real kept data (distance of all samples: what is
left of the forgotten classes counts, and so does damage) is run with three other seeds and measured on the other half. The distance is
Frechet's on the judge's features; on the three Gaussians, whose mean and covariance hardly feel the middle one, the energy distance.
"""
import argparse, concurrent.futures, contextlib, copy, functools, io, json, math, multiprocessing, os, pathlib, platform, shutil, sys, time

here = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))

import numpy as np
import torch

import sgu, toy_gmm

WIDE, NARROW = (0., 6.), (0.2, 3.)                                      # windows in sigma: sgu.py's own, and that of SGU-Relative
MILD, STRONG = ((0.95, 0.5, WIDE), (0.8, 0.5, WIDE), (0.8, 0.5, NARROW)), ((0.9, 0.5, WIDE), (0.7, 0.5, WIDE), (0.7, 0.5, NARROW))
OBTUSE = ((0.85, 0.5, WIDE), (0.75, 0.5, WIDE), (0.75, 0.5, NARROW))
ALL = (0., 20.)                                                         # every noise level of the toy's schedule
SETTINGS = dict(            # domain: method: three of (alpha, share of Standard's learning rate, window of the forget loss)
    mnist=dict(finetune=((1., 0.25, WIDE), (1., 0.5, WIDE), (1., 1., WIDE)), orthogonal=((0.8, 0.5, WIDE), (0.6, 0.5, WIDE), (0.6, 0.5, NARROW)), obtuse=OBTUSE,
               relative=((0.55, 0.5, NARROW), (0.55, 1., NARROW), (0.55, 0.5, WIDE)), neggrad=MILD, siss=STRONG, erasediff=STRONG, erasediff_zero=STRONG,
               salun=OBTUSE, fisher=MILD),
    toy={method: tuple((alpha, 0.5, ALL) for alpha in alphas) for method, alphas in dict(
        orthogonal=(0.95, 0.9, 0.8), obtuse=(0.92, 0.85, 0.7), relative=(0.9, 0.75, 0.55), neggrad=(0.99, 0.985, 0.97), siss=(0.97, 0.9, 0.7),
        erasediff=(0.97, 0.9, 0.7), erasediff_zero=(0.97, 0.9, 0.7), salun=(0.92, 0.85, 0.7), fisher=(0.99, 0.985, 0.97)).items()},
)
SETTINGS["toy"] = dict(finetune=tuple((1., pace, ALL) for pace in (0.25, 0.5, 1.)), **SETTINGS["toy"])
TUNING_SEED, SEEDS = 100, (0, 1, 2)
SIZE = dict(mnist=dict(steps=200, batch_size=64, lr=5e-3, tuning_samples=300, samples=500, likelihood_samples=50),
            toy=dict(steps=500, batch_size=512, lr=6e-3, tuning_samples=10000, samples=5000, likelihood_samples=1000))
FORGET = "3,7"
DISTANCE = dict(mnist="frechet", toy="energy")
QUIET = lambda *_: None                                                 # for the command's callbacks: stage times, interruptions


# ---- one trial on each domain: a method, a setting, a seed -> a dict of figures -----------------------------------------------------

def steps_of(method, size):
    """Every step of the others is two gradients, one of D_g and one of D_f."""
    return size["steps"] * (2 if method == "finetune" else 1)


def judge_and_halves(data):
    """The judge that lies with the committed networks, and the test images of MNIST: (for tuning, for the final figures)."""
    return sgu.load_judge(here / "results/mnist_judge.pt"), [dict(data, test=data["test"][i::2], test_labels=data["test_labels"][i::2]) for i in (0, 1)]


def judge_facts(judge, data):
    """What the judge is worth on the test images of data: its accuracy, and its floor, the forgotten classes it sees in real D_g images."""
    label, gone = sgu.opinions(judge, data["test"])[0].argmax(1), sgu.is_forgotten(data, "test")
    return dict(test_accuracy=float((label == data["test_labels"]).float().mean()), floor=float(torch.isin(label[~gone], torch.tensor(data["forget"])).float().mean()))


def measure_images(images, judge, data):
    """What sgu.judged says, and frechet_all: the distance of all samples, forgotten ones among them, to real images to keep."""
    probs, features = sgu.opinions(judge, images)
    reference = sgu.opinions(judge, data["test"][~sgu.is_forgotten(data, "test")])[1]
    return dict(sgu.judged(probs, features, data, reference), frechet_all=sgu.frechet(features, reference))


def measure_network(method, model, sde, folder, judge, data, opt, likelihood):
    """Sample, judge and, if asked, compute likelihoods, as the command does."""
    score, cpu = sgu.make_score(model, sde), torch.device("cpu")
    entry = measure_images(sgu.get_samples(method, score, sde, folder, data, opt, cpu, QUIET, QUIET), judge, data)
    return dict(entry, nll_bits_per_dim=sgu.measure_likelihood(method, score, sde, folder, data, opt, cpu, QUIET, QUIET)) if likelihood else entry


def mnist_trial(method, setting, seed, final, size, name, out, data_root):
    """Unlearn, sample, judge; likelihoods only for the final figures. standard and unseen are the committed networks as they are."""
    folder, ready = out / name, setting is None
    shutil.rmtree(folder, ignore_errors=True)                               # what another setting may have left
    alpha, pace, sigmas = setting or (None, 1.0, WIDE)
    window = sgu.window_times(sgu.VE(), sigmas)
    opt, device, data = sgu.resolve(sgu.Options(
        dataset="mnist", forget=FORGET, methods="standard" if ready else f"standard,{method}", pretrained=str(here / "results/mnist_standard.pt"), alpha=alpha, forget_window=f"{window[0]},{window[1]}",
        unlearn_steps=steps_of(method, size), unlearn_lr=pace * size["lr"], batch_size=size["batch_size"], samples=size["samples" if final else "tuning_samples"],
        likelihood_samples=size["likelihood_samples"], seed=seed, device="cpu", sampler="em", data_root=data_root, out=str(folder)))
    judge, halves = judge_and_halves(data)
    sde, start = sgu.make_sde(opt.sde), time.time()
    if ready:
        model = sgu.load_model(here / f"results/mnist_{method}.pt")[0]
    else:
        config = dict(seed=seed, network=data["network"])
        for stage in ("standard", method):
            model, how = sgu.get_model(stage, folder, data, opt, config, device, QUIET, QUIET)
    trained = time.time()
    entry = measure_network(method, model, sde, folder, judge, halves[final], opt, likelihood=final)
    return dict(entry, recipe=None if ready else how, seconds=dict(train=round(trained - start, 1), measure=round(time.time() - trained, 1)))


def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| from samples x: (n, d), y: (m, d), unbiased; 0 for equal laws (Szekely and Rizzo)."""
    within = lambda a: float(torch.cdist(a, a).sum(dtype=torch.float64)) / (len(a) * (len(a) - 1))
    return 2 * float(torch.cdist(x, y).mean(dtype=torch.float64)) - within(x) - within(y)


def toy_training():
    """x_g: (40000, 2), x_f: (10000, 2), the same for Standard and for whatever starts from it."""
    g = torch.Generator().manual_seed(0)
    return toy_gmm.sample_mixture(toy_gmm.KEEP, 40000, g), toy_gmm.sample_mixture(toy_gmm.FORGET, 10000, g)


def toy_trial(method, setting, seed, final, size, name, out, data_root):
    """The same on the three Gaussians, where likelihoods are exact and the share of the middle mode needs no judge."""
    sde, std = toy_gmm.SDE, toy_gmm.DATA_STD
    base = "unseen" if method == "unseen" else "standard"
    model = toy_gmm.ToyNet()
    model.load_state_dict(torch.load(out / f"toy-{base}.pt", weights_only=True))
    start, alpha, how = time.time(), 1.0, None
    if setting:
        (alpha, pace, _), loss = setting, sgu.METHODS[method][1]
        ema, (keep, forget) = copy.deepcopy(model).requires_grad_(False), toy_training()
        if method == "relative":
            loss = functools.partial(loss, reference=sgu.make_score(copy.deepcopy(ema), sde, std))
        # the same weight on both losses, as in toy_gmm.py; EraseDiff, whose loss is no smaller in noise, gets the root (section 7 of sgu.py)
        weight = (sgu.forget_weight if method.startswith("erasediff") else sgu.keep_weight)(sde, std)
        edit = (sgu.saliency_mask(model, sde, forget, loss, weighting=weight, seed=seed, data_std=std) if method == "salun" else
                sgu.fisher_penalty(model, sde, keep, seed=seed, data_std=std) if method == "fisher" else None)
        how = dict(alpha=alpha, steps=steps_of(method, size), lr=pace * size["lr"])
        for info in sgu.train(model, ema, sde, keep, forget if loss else None, loss, alpha, steps=how["steps"], lr=how["lr"], batch_size=size["batch_size"], warmup=how["steps"] // 20 + 1,
                              ema_decay=0.99, data_std=std, forget_weighting=weight, seed=seed, forget_ratio=1 - alpha if method == "siss" else None, edit_gradient=edit):
            pass
        model = ema
    score, trained = sgu.make_score(model.requires_grad_(False), sde, std), time.time()
    n, g = size["samples" if final else "tuning_samples"], torch.Generator().manual_seed(1000 + 2 * seed + final)
    x = sgu.euler_maruyama(score, sde, (n, 2), steps=100, generator=g)
    real, gone = toy_gmm.sample_mixture(toy_gmm.KEEP, 5000, g), toy_gmm.nearest_forgotten(x).bool()
    k = int(gone.sum())
    entry = dict(unlearning_ratio=dict(total=k / n, n=n, ci95=sgu.wilson(k, n)), energy_kept=energy_distance(x[~gone], real), energy_all=energy_distance(x, real))
    if final:
        nats = {key: -sgu.log_likelihood(score, sde, toy_gmm.sample_mixture(c, size["likelihood_samples"], g), steps=64, exact=True)
                for key, c in (("D_g", toy_gmm.KEEP), ("D_f", toy_gmm.FORGET))}
        entry["nll_bits_per_dim"] = {key: toy_gmm.bits(float(v.mean())) for key, v in nats.items()}
    return dict(entry, recipe=how, seconds=dict(train=round(trained - start, 1), measure=round(time.time() - trained, 1)))


# ---- all trials, several at once ----------------------------------------------------------------------------------------------------

def attempt(trial, name, arguments, out, data_root):
    """The figures of a trial, from out/<name>.json or computed now; a trial that blows up is a result too."""
    path, asked = out / f"{name}.json", repr(arguments)
    entry = json.loads(path.read_text()) if path.exists() else {}
    if entry.get("asked") != asked:                                       # what is there, if anything, answers another question
        try:
            with contextlib.redirect_stderr(io.StringIO()):            # one bar for all trials is enough
                entry = trial(*arguments, name, out, data_root)
        except FloatingPointError as error:
            entry = dict(error=str(error))
        entry["asked"] = asked
        sgu.save_json(path, entry)
    return {key: value for key, value in entry.items() if key != "asked"}


def attempt_all(trial, jobs, out, data_root):
    """jobs: {name: arguments} -> {name: figures}, one process of one thread per core: small networks gain little from more threads."""
    results, bar = {}, sgu.Progress(trial.__name__, len(jobs))
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        tasks = {pool.submit(attempt, trial, name, arguments, out, data_root): name for name, arguments in jobs.items()}
        for task in concurrent.futures.as_completed(tasks):
            results[tasks[task]] = entry = task.result()
            bar(len(results))
            share = entry.get("unlearning_ratio", {}).get("total")
            print(f"{time.strftime('%H:%M:%S')} {tasks[task]}: " + entry.get("error", f"{100 * (share or 0):.1f}%, " + ", ".join(f"{k} {v:.4g}" for k, v in entry.items() if "all" in k)), flush=True)
    return results


def mean_and_spread(values):
    """{mean, sd} over seeds (sd: of one seed, n - 1)."""
    v = torch.tensor(values, dtype=torch.float64)
    return dict(mean=float(v.mean()), sd=float(v.std()) if len(v) > 1 else None, values=values)


def spreads(runs, keys):
    """Figures of a method under several seeds -> mean and spread of the ratio, of keys and of both likelihoods; the pooled interval."""
    k, n = (sum(round(run["unlearning_ratio"][key] * (run["unlearning_ratio"]["n"] if key == "total" else 1)) for run in runs) for key in ("total", "n"))
    return dict(ratio=mean_and_spread([run["unlearning_ratio"]["total"] for run in runs]), pooled=dict(n=n, ci95=sgu.wilson(k, n)),
                **{key: mean_and_spread([run[key] for run in runs]) for key in keys if runs[0].get(key) is not None},
                **{key: mean_and_spread([run["nll_bits_per_dim"][key] for run in runs]) for key in ("D_g", "D_f")})


def spread_cell(entry, key):
    """mean ± sd of one figure, for a table."""
    if key not in entry:
        return "-"
    scale, digits = (100, 1) if key in ("ratio", "unsure") else (1, 4 if "energy" in key else 2)
    return f"{scale * entry[key]['mean']:.{digits}f} ± {scale * entry[key]['sd']:.{digits}f}"


def compare(domain, out, data_root):
    """Tuning, then three seeds of the chosen settings; writes and returns the results."""
    trial, settings = dict(mnist=mnist_trial, toy=toy_trial)[domain], SETTINGS[domain]
    name = lambda method, i, seed, final: f"{domain}-{'final' if final else 'tune'}-{method}-{i}-{seed}"
    job = lambda method, i, seed, final: (name(method, i, seed, final), (method, settings[method][i] if method in settings else None, seed, final, SIZE[domain]))
    if domain == "toy":
        for base in ("standard", "unseen"):
            if not (out / f"toy-{base}.pt").exists():
                for info in toy_gmm.train_toy(base, *toy_training()):
                    pass
                sgu.replace_file(out / f"toy-{base}.pt", lambda p: torch.save(info["snapshot"]()["ema"], p))
    tuning = attempt_all(trial, dict(job(m, i, TUNING_SEED, False) for i in range(3) for m in settings), out, data_root)
    tuned = {m: [dict(alpha=a, lr=pace * SIZE[domain]["lr"], sigmas=sigmas, **tuning[name(m, i, TUNING_SEED, False)]) for i, (a, pace, sigmas) in enumerate(rows)]
             for m, rows in settings.items()}
    chosen = {m: min(range(3), key=lambda i: rows[i].get(DISTANCE[domain] + "_all", math.inf)) for m, rows in tuned.items()}
    final = attempt_all(trial, dict(job(m, chosen.get(m, 0), seed, True) for seed in SEEDS for m in ("standard", *settings, "unseen")), out, data_root)
    methods = {}
    for m in ("standard", *settings, "unseen"):
        runs = [final[name(m, chosen.get(m, 0), seed, True)] for seed in SEEDS]
        methods[m] = dict(setting=chosen.get(m), sigmas=settings[m][chosen[m]][2] if m in settings else None, recipe=runs[0].get("recipe"), runs=runs)
        if not any("error" in run for run in runs):
            methods[m].update(spreads(runs, ("unsure", DISTANCE[domain] + "_kept", DISTANCE[domain] + "_all")))
    return dict(config=dict(domain=domain, forget=FORGET if domain == "mnist" else "middle", settings=settings, tuning_seed=TUNING_SEED, seeds=SEEDS, **SIZE[domain]),
                tuning=tuned, methods=methods,
                seconds={key: round(sum(e["seconds"][key] for e in (*tuning.values(), *final.values()) if "seconds" in e), 1) for key in ("train", "measure")})


def make_table(results):
    """The content of rivals-*.json -> Markdown: mean ± standard deviation over seeds."""
    config, keys = results["config"], ["ratio", "unsure", "frechet_kept", "frechet_all", "energy_kept", "energy_all", "D_g", "D_f"]
    titles = dict(ratio="ratio, %", unsure="unsure, %", frechet_kept="Fréchet, kept", frechet_all="Fréchet, all", energy_kept="energy, kept", energy_all="energy, all", D_g="NLL D_g", D_f="NLL D_f")
    keys = [k for k in keys if k in results["methods"]["standard"]]
    lines = ["| method | alpha, rate, window σ | " + " | ".join(titles[k] for k in keys) + " |", "|---|---|" + "---:|" * len(keys)]
    for m, entry in results["methods"].items():
        how = entry["recipe"]
        lines.append(f"| {sgu.TITLES[m]} | {'' if how is None else format(how['lr'], '.2g') if m == 'finetune' else '{}, {:.2g}, {:g} to {:g}'.format(how['alpha'], how['lr'], *entry['sigmas'])} | "
                     + " | ".join(spread_cell(entry, k) for k in keys) + " |")
    return "\n".join(lines) + (f"\n\n{results['device']}; `{results['command']}`. Mean ± standard deviation of seeds {', '.join(map(str, config['seeds']))} of fine-tuning and sampling (Standard and Unseen, one network "
                               f"each: of sampling); n = {config['samples']} samples and {config['likelihood_samples']} + {config['likelihood_samples']} likelihoods (bits/dim) a seed; "
                               f"{2 * config['steps']} gradients of a batch of {config['batch_size']} each. Chosen from three settings with seed {config['tuning_seed']}, n = {config['tuning_samples']}, "
                               f"by {'the distance to other test images' if config['domain'] == 'mnist' else 'the distance to other draws'}."
                               + (" " + judge_words(results["judge"]) if "judge" in results else "") + "\n")


# ---- fine-tuned or re-trained, VE or VP, by seed ------------------------------------------------------------------------------------

SEED_SIZE = dict(steps=1200, batch_size=64, samples=500, sampler_steps=120, likelihood_samples=50)
SEED_ROWS = dict(finetune=("standard", "unseen", "orthogonal", "obtuse", "relative"), retrain=("orthogonal", "obtuse"))


def seeds_trial(sde, training, seed, size, name, out, data_root):
    """Everything with its own seed, from the first random weight: {"methods": {name: figures}} by sgu.py's own recipes."""
    folder, methods = out / name, SEED_ROWS[training]
    opt, device, data = sgu.resolve(sgu.Options(dataset="mnist", forget=FORGET, methods=",".join(methods), training=training, sde=sde, seed=seed, device="cpu", sampler="em",
                                                data_root=data_root, out=str(folder), **size))
    (judge, (_, half)), config, entries = judge_and_halves(data), dict(seed=seed, network=data["network"], **size), {}
    for method in methods:
        start = time.time()
        model, how = sgu.get_model(method, folder, data, opt, config, device, QUIET, QUIET)
        trained = time.time()
        entries[method] = dict(measure_network(method, model, sgu.make_sde(sde), folder, judge, half, opt, likelihood=True), recipe=how,
                               seconds=dict(train=round(trained - start, 1), measure=round(time.time() - trained, 1)))
    return dict(methods=entries, unlearning_ratio=entries[methods[-1]]["unlearning_ratio"])


def seeds(out, data_root):
    jobs = {f"seeds-{sde}-{training}-{seed}": (sde, training, seed, SEED_SIZE) for seed in SEEDS for sde in ("ve", "vp") for training in ("retrain", "finetune")}
    done, rows = attempt_all(seeds_trial, jobs, out, data_root), []
    for sde in ("ve", "vp"):
        for training, methods in SEED_ROWS.items():
            for m in methods:
                runs = [done[f"seeds-{sde}-{training}-{seed}"] for seed in SEEDS]
                if errors := [run["error"] for run in runs if "error" in run]:
                    rows.append(dict(sde=sde, training=training, method=m, errors=errors))
                    continue
                runs = [run["methods"][m] for run in runs]
                rows.append(dict(sde=sde, training=training if sgu.METHODS[m][1] else "-", method=m, runs=runs, **spreads(runs, ("unsure", "frechet_kept"))))
    return dict(config=dict(SEED_SIZE, seeds=SEEDS, forget=FORGET), rows=rows)


def seeds_table(results):
    """The rows of seeds-mnist-3,7.json -> Markdown, the paper's Table 2 and Table 5 by seeds."""
    config, keys = results["config"], dict(ratio="ratio, %", unsure="unsure, %", frechet_kept="Fréchet, kept", D_g="NLL D_g", D_f="NLL D_f")
    lines = ["| schedule | method | made by | training steps | " + " | ".join(keys.values()) + " |", "|---|---|---|---:|" + "---:|" * len(keys)]
    for row in results["rows"]:
        if "errors" in row:
            lines.append(f"| {row['sde'].upper()} | {sgu.TITLES[row['method']]} | {row['training']} | stopped: {row['errors'][0]} |")
            continue
        how = {"-": "training", "retrain": "re-training", "finetune": "fine-tuning"}[row["training"]]
        lines.append(f"| {row['sde'].upper()} | {sgu.TITLES[row['method']]} | {how} | {row['runs'][0]['recipe']['steps']} | " + " | ".join(spread_cell(row, k) for k in keys) + " |")
    return "\n".join(lines) + (f"\n\n{results['device']}; `{results['command']}`. Mean ± standard deviation of seeds {', '.join(map(str, config['seeds']))}, each from its own first weights; "
                               f"n = {config['samples']} samples (em, {config['sampler_steps']} steps) and {config['likelihood_samples']} + {config['likelihood_samples']} likelihoods (bits/dim) a seed. "
                               f"Standard and Unseen have {config['steps']} steps of {config['batch_size']}, fewer than the command's. " + judge_words(results["judge"]) + "\n")


def judge_words(judge):
    return f"Judge: our own CNN, test accuracy {100 * judge['test_accuracy']:.2f}%, floor {100 * judge['floor']:.2f}%."


def frontier(results):
    """Left: what is left against damage, small and pale for the settings that were tried; right: against the NLL of D_g. Bars: sd over seeds."""
    import matplotlib.pyplot as plt
    import style
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), sharey=True)
    distance = DISTANCE[results["config"]["domain"]] + "_kept"
    for m, entry in results["methods"].items():
        for tried in results["tuning"].get(m, ()):
            if tried.get(distance) is not None:
                axes[0].plot(tried[distance], 100 * tried["unlearning_ratio"]["total"], style.MARKER[m], color=style.COLOUR[m], alpha=0.3, ms=3.5)
        for ax, key in zip(axes, (distance, "D_g")):
            if "ratio" in entry:
                ax.errorbar(entry[key]["mean"], 100 * entry["ratio"]["mean"], 100 * entry["ratio"]["sd"], entry[key]["sd"], marker=style.MARKER[m], color=style.COLOUR[m],
                            ms=7, lw=0.8, ls="", label=sgu.TITLES[m], zorder=3)
    name = dict(frechet_kept="Fréchet distance of kept samples", energy_kept="energy distance of kept samples")[distance]
    axes[0].set(xlabel="damage: " + name, ylabel="left: unlearning ratio, %", title="down and to the left is better")
    axes[1].set(xlabel="NLL of D_g, bits/dim")
    if distance == "energy_kept":
        axes[0].set_xscale("symlog", linthresh=0.01)                        # an unbiased estimate of 0 may be negative
    else:
        axes[0].set_xscale("log")
        axes[0].set_xticks((10, 20, 50, 100), labels=("10", "20", "50", "100"))
        axes[0].minorticks_off()
    for ax in axes:
        ax.grid()
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


# ---- is it forgotten or hidden? -----------------------------------------------------------------------------------------------------

RELEARN = dict(images=100, steps=(0, 5, 10, 20, 40, 80), lr=1e-3, batch_size=64, samples=100, sampler_steps=60)


def relearn_trial(method, path, how, name, out, data_root):
    """Plain fine-tuning of a finished network on 100 forgotten images; the share of 3s and 7s after some numbers of steps."""
    data = sgu.choose(sgu.load_data("mnist", data_root), FORGET)
    judge, (_, half) = judge_and_halves(data)
    model, sde = sgu.load_model(path)
    ema, shares = copy.deepcopy(model), []
    few = data["train"][sgu.is_forgotten(data, "train")][:how["images"]]

    def look(step):
        x = sgu.euler_maruyama(sgu.make_score(ema, sde), sde, (how["samples"], 1, 28, 28), steps=how["sampler_steps"], generator=torch.Generator().manual_seed(7))
        shares.append(dict(step=step, **measure_images(sgu.to_levels(x), judge, half)["unlearning_ratio"]))

    look(0)
    model.requires_grad_(True)
    for info in sgu.train(model, ema, sde, few, steps=1000, batch_size=how["batch_size"], lr=how["lr"], warmup=1, ema_decay=0.5):
        if info["step"] in how["steps"]:                            # the first 80 of 1,000 steps: the rate is all but constant
            look(info["step"])
        if info["step"] == max(how["steps"]):
            return dict(shares=shares, unlearning_ratio=shares[-1])


def relearn(out, data_root):
    path = here / "results/rivals-mnist-3,7.json"
    chosen = json.loads(path.read_text())["methods"] if path.exists() else {}
    found = {m: out / f"mnist-final-{m}-{chosen.get(m, {}).get('setting')}-{SEEDS[0]}/{m}.pt" for m in SETTINGS["mnist"]}
    if missing := [m for m, file in found.items() if not file.exists()]:
        raise sgu.UsageError(f"no network of {', '.join(missing)} in {out}: run  python notebooks/rivals.py mnist  first, with the same --out")
    found.update(unseen=here / "results/mnist_unseen.pt", standard=here / "results/mnist_standard.pt")
    done = attempt_all(relearn_trial, {f"relearn-{m}": (m, str(file), RELEARN) for m, file in found.items()}, out, data_root)
    gone = sgu.is_forgotten(sgu.choose(sgu.load_data("mnist", data_root), FORGET), "train")
    return dict(config=dict(RELEARN, forget=FORGET, share_of_data=float(gone.float().mean())),
                methods={m: dict(shares=done[f"relearn-{m}"]["shares"]) for m in found})


# ---- the ratio by sampler -----------------------------------------------------------------------------------------------------------

SAMPLERS = [("em", 15), ("em", 30), ("em", 60), ("em", 120), ("pc", 30), ("pc", 60), ("ancestral", 15), ("ancestral", 30), ("ancestral", 60), ("ancestral", 120),
            ("ode", 10), ("ode", 20), ("ode", 40)]
SAMPLER_N = 500


def sampler_trial(method, sampler, steps, n, name, out, data_root):
    data = sgu.choose(sgu.load_data("mnist", data_root), FORGET)
    judge, (_, half) = judge_and_halves(data)
    (model, sde), calls, start = sgu.load_model(here / f"results/mnist_{method}.pt"), [], time.time()
    score = sgu.make_score(model, sde)

    def counted(x, t):
        calls.append(len(x))
        return score(x, t)
    draw = lambda seed: sgu.to_levels(sgu.SAMPLERS[sampler](counted, sde, (n // 2, 1, 28, 28), steps=steps, generator=torch.Generator().manual_seed(seed)))
    x = torch.cat([draw(11), draw(12)])
    return dict(measure_images(x, judge, half), method=method, sampler=sampler, steps=steps, evaluations=len(calls) // 2, seconds=round(time.time() - start, 1))


def samplers(out, data_root):
    jobs = {f"sampler-{m}-{s}-{n}": (m, s, n, SAMPLER_N) for s, n in SAMPLERS for m in ("standard", "orthogonal", "obtuse", "relative", "unseen")}
    done = attempt_all(sampler_trial, jobs, out, data_root)
    return dict(config=dict(samplers=SAMPLERS, n=SAMPLER_N, forget=FORGET), rows=[done[name] for name in jobs])


# ---- which noise to train at --------------------------------------------------------------------------------------------------------

NOISE = dict(steps=1200, batch_size=64, lr=3e-3, samples=500, sampler_steps=60, images=256, forget="automobile,dog",
             levels=(0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8))              # sigma at which the error of the guess in images is looked at
NOISE_LAWS = (sgu.DIGIT_NOISE, (-1.2, 1.2, 2), (-1.2, 1.2, 4), (-1.2, 1.2, 8), sgu.PHOTO_NOISE, (-0.6, 1.2, 32))
CIFAR = sgu.PRESETS[32, "cpu"]


def noise_network(law, how, data, sde):
    """Standard of the CPU preset, trained at the noise levels of law."""
    torch.manual_seed(0)
    model = sgu.UNet(3, CIFAR["channels"], CIFAR["blocks"], CIFAR["patch"])
    ema = copy.deepcopy(model).requires_grad_(False)
    for _ in sgu.train(model, ema, sde, data["train"], steps=how["steps"], batch_size=how["batch_size"], lr=how["lr"], warmup=how["steps"] // 20 + 1, noise_law=law):
        pass
    return ema.eval()


def noise_trial(law, how, name, out, data_root):
    """The mean square error of the guess of the noise in test images, (e - z)^2, at every sigma of levels; samples, judged."""
    data, sde = sgu.choose(sgu.load_data("cifar10", data_root), how["forget"]), sgu.VP()
    score, x0, error = sgu.make_score(noise_network(law, how, data, sde), sde), sgu.from_levels(data["test"][:how["images"]]), []
    for sigma in how["levels"]:
        with torch.no_grad():
            _, e, z = sgu.predict_noise(score, sde, x0, sde.time(torch.full((len(x0),), sigma)), None, torch.Generator().manual_seed(1))
        error.append(float((e - z).square().mean()))
    draw = lambda seed: sgu.to_levels(sgu.ancestral_sample(score, sde, (how["samples"] // 4, *x0.shape[1:]), how["sampler_steps"], torch.Generator().manual_seed(seed)))
    return dict(measure_images(torch.cat([draw(seed) for seed in range(4)]), sgu.load_judge(out / "noise-judge.pt"), data), noise_law=law, squared_error=error)


def noise(out, data_root):
    data, path = sgu.choose(sgu.load_data("cifar10", data_root), NOISE["forget"]), out / "noise-judge.pt"
    if not path.exists():
        for *_, judge in sgu.train_judge(data, *CIFAR["judge"], flip=True):
            pass
        sgu.save_checkpoint(path, dict(format="sgu-1", network=judge.config, model=judge.state_dict()))
    jobs = {f"noise-{'_'.join(map(str, law))}": (law, NOISE) for law in NOISE_LAWS}
    done = attempt_all(noise_trial, jobs, out, data_root)
    return dict(config=dict(NOISE, sde="vp", seed=0), rows=[done[name] for name in jobs], judge=judge_facts(sgu.load_judge(path), data))


FILES = dict(toy="rivals-toy", mnist="rivals-mnist-3,7", relearn="relearn-mnist-3,7", samplers="samplers-mnist-3,7", seeds="seeds-mnist-3,7", noise="noise-cifar10")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=tuple(FILES))
    parser.add_argument("--data-root", default="data", metavar="DIR", help="where the data sets are (default data)")
    parser.add_argument("--out", default="runs/rivals", metavar="DIR", help="where the trials are kept (default runs/rivals)")
    opt = parser.parse_args(argv)
    out = pathlib.Path(opt.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        experiments = dict(toy=functools.partial(compare, "toy"), mnist=functools.partial(compare, "mnist"), relearn=relearn, samplers=samplers, seeds=seeds, noise=noise)
        results = experiments[opt.experiment](out, opt.data_root)
    except sgu.UsageError as error:
        sys.exit(f"rivals: {error}")
    results.update(command=f"python notebooks/rivals.py {opt.experiment}", device=f"{sgu.describe(torch.device('cpu')).rsplit(',', 1)[0]}, {os.cpu_count()} processes of 1 thread",
                   versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))
    name = FILES[opt.experiment]
    if opt.experiment not in ("toy", "noise"):
        judge, (_, half) = judge_and_halves(sgu.choose(sgu.load_data("mnist", opt.data_root), FORGET))
        results["judge"] = judge_facts(judge, half)
    if opt.experiment in ("toy", "mnist"):
        results["markdown"] = make_table(results)
        print(results["markdown"])
        frontier(results).savefig(here / "results" / f"{name}.png")
    elif opt.experiment == "seeds":
        results["markdown"] = seeds_table(results)
        print(results["markdown"])
    sgu.save_json(here / "results" / f"{name}.json", results)


if __name__ == "__main__":
    main()
