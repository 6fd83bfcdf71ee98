"""What a training step, samples and a likelihood cost beside others, in one run on the same cores.

    pip install denoising-diffusion-pytorch diffusers scipy
    python notebooks/peers.py [--threads 1] [--rounds 3]       from the repository's top folder

A step: batches of 64 random images of 32x32 in three colours, our network of the CIFAR-10 preset
beside lucidrains' Unet and diffusers' UNet2DModel of as many floating point operations a forward
pass, each trained in the way of its own project; contenders take turns, the median round counts.
Samples: one network, the shipped MNIST Standard, drawn by our samplers and by diffusers'; it knows
the noise level alone, so it serves their chain of 1,000 steps as it serves our schedule.
A likelihood: the shipped MNIST networks, the same digits and random signs, our fixed steps in
log sigma beside SciPy's RK45 in t (Song et al. 2021), both against 512 of our steps.
Writes results/peers.json.
"""
import argparse, copy, os, pathlib, platform, sys, time

here = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent), str(here)]

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import sgu
import stale
from make import table_text

SIDE, BATCH = 32, 64

def gflop(model, *inputs):
    """Floating point operations of one forward pass of one image, in 1e9 (a product and its sum
    are two)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() / 1e9

def widest(make, inputs, target, widths):
    """make(width) whose forward pass costs nearest to target -> (model, GFLOP)."""
    costs = {width: gflop(make(width), *inputs) for width in widths}
    width = min(costs, key=lambda w: abs(costs[w] - target))
    return make(width), costs[width]

def ours(precision):
    """-> (step(): one training step, GFLOP, weights)."""
    preset = dict(zip(sgu.COLUMNS, sgu.PRESETS[SIDE, "cpu"]))
    model = sgu.UNet(3, *(preset[key] for key in sgu.COLUMNS[:4]))
    images = torch.randint(0, 256, (2000, 3, SIDE, SIDE), dtype=torch.uint8)
    recipe = sgu.Recipe(preset["noise_law"], precision=precision)
    job = sgu.train(model, copy.deepcopy(model), sgu.VP(), images, steps=10**6, recipe=recipe,
                    batch_size=BATCH)
    cost = gflop(model, torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1))
    return lambda: next(job), cost, model

def lucidrains(target):
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA
    inputs = torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1)
    model, cost = widest(lambda w: Unet(dim=w, dim_mults=(1, 2, 4)), inputs, target,
                         range(8, 65, 8))
    diffusion = GaussianDiffusion(model, image_size=SIDE, timesteps=1000)
    optimiser = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = EMA(diffusion, beta=0.995, update_every=10)
    def step():
        optimiser.zero_grad()
        diffusion(torch.rand(BATCH, 3, SIDE, SIDE)).backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimiser.step()
        average.update()
    return step, cost, model

def diffusers_unet(target):
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel
    def make(width):
        return UNet2DModel(sample_size=SIDE, layers_per_block=1, norm_num_groups=8,
                           block_out_channels=(width, 2 * width, 4 * width),
                           down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
                           up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
    inputs = torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1)
    model, cost = widest(make, inputs, target, range(8, 65, 8))
    noise = DDPMScheduler(1000)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    average = EMAModel(model.parameters())
    def step():
        x, z = torch.rand(BATCH, 3, SIDE, SIDE) * 2 - 1, torch.randn(BATCH, 3, SIDE, SIDE)
        t = torch.randint(1000, (BATCH,))
        F.mse_loss(model(noise.add_noise(x, z, t), t).sample, z).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        average.step(model.parameters())
    return step, cost, model

def matrix_rate(dtype, n=1024, tries=5):
    """GFLOP/s of a product of two n x n matrices, the best of some tries."""
    a, seconds = torch.randn(n, n).to(dtype), []
    for _ in range(tries + 1):
        begin = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begin)
    return 2 * n ** 3 / 1e9 / min(seconds[1:])

def training_costs(rounds, steps=3):
    """-> {name: dict(ms, gflop, weights, share)}: the contenders take turns. share: of the matrix
    rate of this machine in the step's precision, a step being three forward passes of a batch."""
    fast = "bfloat16" in sgu.describe("cpu")
    contenders = {"sgu.py, float32": ours("float32")}
    target = contenders["sgu.py, float32"][1]
    if fast:
        contenders["sgu.py, bfloat16"] = ours("bfloat16")
    contenders["denoising-diffusion-pytorch"] = lucidrains(target)
    contenders["diffusers UNet2DModel"] = diffusers_unet(target)
    seconds = {name: [] for name in contenders}
    for turn in range(rounds + 1):                             # the first turn warms up
        for name, (step, *_) in contenders.items():
            begin = time.perf_counter()
            for _ in range(steps):
                step()
            if turn:
                seconds[name].append((time.perf_counter() - begin) / steps)
    rates, found = {}, {}
    for name, (_, cost, model) in contenders.items():
        dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
        rates.setdefault(dtype, matrix_rate(dtype))
        median = float(np.median(seconds[name]))
        found[name] = dict(ms=1e3 * median, gflop=cost, rate=rates[dtype],
                           weights=sum(p.numel() for p in model.parameters()),
                           share=3 * BATCH * cost / median / rates[dtype])
    return found

def by_rk45(score, sde, x, tolerance, generator):
    """log p(x): (B,) in nats and the evaluations, by SciPy's RK45 over all of the batch at once."""
    from scipy.integrate import solve_ivp
    draws = sgu.own_generators(x, generator)
    signs = torch.stack([torch.randint(2, x.shape[1:], generator=g) for g in draws])
    v, shape = (2 * signs - 1).to(x), x.shape
    def flow(t, state):
        y = torch.from_numpy(state[:x.numel()]).to(x).view(shape).requires_grad_()
        at = torch.full((len(x),), float(t))
        with torch.enable_grad():
            g2 = float(sde.diffusion(at[:1].double())) ** 2
            dy = sde.drift(y, at) - g2 * score(y, at) / 2
            product, = torch.autograd.grad((dy * v).sum(), y)
        div = (product * v).flatten(1).sum(1)
        return torch.cat([dy.detach().flatten(), div]).double().numpy()
    start = np.concatenate([x.double().numpy().ravel(), np.zeros(len(x))])
    found = solve_ivp(flow, (sde.t_min, 1.0), start, rtol=tolerance, atol=tolerance)
    end = torch.from_numpy(found.y[:, -1])
    log_p = sde.prior_log_prob(end[:x.numel()].view(shape)) + end[x.numel():]
    return log_p, found.nfev

def real_digits():                                             # the shipped ones: (N, 1, 28, 28)
    return torch.from_numpy(np.load(here / "results" / "mnist_digits.npz")["images"])[:, None]

def likelihood_costs(n):
    """-> rows of (network, solver, evaluations, seconds an image, error in bits/dim)."""
    rows, digits = [], real_digits()[:n]
    for name in ("standard", "orthogonal"):
        model, sde = sgu.load_model(here / "results" / f"mnist_{name}.pt")
        score, x = sgu.make_score(model, sde), sgu.from_levels(digits.float())
        unit = x[0].numel() * np.log(2)
        def seeded():
            return torch.Generator().manual_seed(0)
        exact = sgu.log_likelihood(score, sde, x, 512, generator=seeded())
        for label, solve in [(f"sgu.py, {k} steps", lambda k=k: (
                sgu.log_likelihood(score, sde, x, k, generator=seeded()), 4 * k))
                for k in (8, 16, 32, 64)] + [(f"RK45, tolerance {tol:g}", lambda tol=tol: by_rk45(
                    score, sde, x, tol, seeded())) for tol in (1e-3, 1e-5)]:
            begin = time.perf_counter()
            log_p, evaluations = solve()
            rows.append(dict(network=name, solver=label, evaluations=evaluations,
                             seconds=(time.perf_counter() - begin) / n,
                             error=float((log_p - exact).abs().mean()) / unit))
    return rows

def by_sgu(network, sde, sampler, steps):
    """draw(n, generator) -> n digits (n, 1, 28, 28), by a sampler of ours."""
    score = sgu.make_score(network, sde)
    return lambda n, generator: sgu.SAMPLERS[sampler](score, sde, (n, 1, 28, 28), steps,
                                                      generator=generator)

def by_diffusers(network, scheduler, steps):
    """The same by a scheduler of diffusers, whose chain has 1,000 steps as our DDPM has."""
    sde = sgu.DDPM()
    score = sgu.make_score(network, sde)
    def draw(n, generator):
        x = torch.randn(n, 1, 28, 28, generator=generator)
        scheduler.set_timesteps(steps)
        for k in scheduler.timesteps:
            t = (int(k) + 1) / sde.n_steps                     # they count from 0
            e = -sde.at(t)[1] * sgu.score_at(score, x, t)
            x = scheduler.step(e, k, x, generator=generator).prev_sample
        return x
    return draw

def sampling_costs(n, batch=100):
    """-> rows of (sampler, evaluations, images a second, distance of n samples to real digits)."""
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
    judge = sgu.load_judge(here / "results" / "mnist_judge.pt")
    network, sde = sgu.load_model(here / "results" / "mnist_standard.pt")
    draws = {f"sgu.py, {name}": (steps + 1, by_sgu(network, sde, name, steps))
             for name, steps in (("multistep", 20), ("ode", 18), ("ancestral", 100), ("em", 120))}
    for kind, steps in ((DPMSolverMultistepScheduler, 20), (DDIMScheduler, 50),
                        (DDPMScheduler, 1000)):
        draws[f"diffusers, {kind.__name__}"] = steps, by_diffusers(network, kind(), steps)
    rows, real = [], sgu.opinions(judge, real_digits())[1]
    for name, (evaluations, draw) in draws.items():
        g, begin = torch.Generator().manual_seed(0), time.perf_counter()
        with torch.no_grad():
            images = torch.cat([sgu.to_levels(draw(batch, g)) for _ in range(n // batch)])
        seconds = time.perf_counter() - begin
        rows.append(dict(sampler=name, evaluations=evaluations, rate=len(images) / seconds,
                         n=len(images), real=len(real),
                         distance=sgu.frechet(sgu.opinions(judge, images)[1], real)))
    return rows

def tables(training, samples, likelihoods):
    base = training["sgu.py, float32"]["ms"]
    return "\n\n".join([
        table_text(["a step of 64 images", "ms", "of ours in float32", "GFLOP an image, forward",
                    "weights", "of the machine's matrix rate"],
                   [[name, f"{v['ms']:.0f}", f"{v['ms'] / base:.2f}", f"{v['gflop']:.3f}",
                     f"{v['weights'] / 1e6:.2f} M", f"{v['share']:.0%} of {v['rate']:.0f} GFLOP/s"]
                    for name, v in training.items()]),
        table_text(["samples of one network", "evaluations", "images a second", "distance"],
                   [[v["sampler"], v["evaluations"], f"{v['rate']:.1f}", f"{v['distance']:.1f}"]
                    for v in samples]),
        table_text(["likelihood", "network", "evaluations", "ms an image", "error, bits/dim"],
                   [[v["solver"], v["network"], v["evaluations"], f"{1e3 * v['seconds']:.0f}",
                     f"{v['error']:.5f}"] for v in likelihoods], words=2)])

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--samples", type=int, default=500)
    opt = parser.parse_args()
    torch.set_num_threads(opt.threads)
    start = time.time()
    training, samples = training_costs(opt.rounds), sampling_costs(opt.samples)
    likelihoods = likelihood_costs(opt.images)
    markdown = tables(training, samples, likelihoods)
    device = sgu.describe("cpu")
    command = f"python notebooks/peers.py --threads {opt.threads}"
    words = (f"\n\n`{command}`; {device}. Steps: medians of {opt.rounds} rounds. Samples: "
             f"{samples[0]['n']}, in float32; distance: Fréchet's, of our judge's features, to "
             f"{samples[0]['real']} real digits. Likelihoods: {opt.images} digits; error: the mean "
             "distance from 512 steps.")
    sgu.save_json(here / "results" / "peers.json", dict(
        command=command, device=device, config=vars(opt), training=training, samples=samples,
        likelihoods=likelihoods, markdown=markdown + words,
        versions=dict(python=platform.python_version(), torch=torch.__version__)))
    stale.sign(pathlib.Path(__file__), start)
    print(markdown + words)

if __name__ == "__main__":
    main()
