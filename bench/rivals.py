"""Training steps a second and sampling seconds of ddpm.py beside diffusers, azula and a bare loop, in one run.

    bash bench/rivals.sh                a throw-away environment with the rivals, then this file

One network for all: 2 -> 128, three residual layers of 128, 2, the time as 32 features into a bias of each layer, batch
512; 66,562 parameters, and 66,050 in ours, where one of the features is the constant. The rivals and the bare loop get
it as a plain module (what their users write) and the optimiser that makes them fastest, fused Adam; `(Adam)` rows use
PyTorch's default. Ours is `ddpm.train`, which also keeps the EMA, and `Diffusion.sample`. The measurements take turns,
so that a busy machine slows all alike; medians, and the ratio of ours to each.
"""

import argparse
import copy
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import ddpm  # noqa: E402

T, BATCH, LR = 1000, 512, 1e-3


class PlainMLP(nn.Module):
    """ddpm.MLP as a user of a library writes it; `t` is an index, or azula's log(sigma / alpha)."""

    def __init__(self, width=128, depth=3):
        super().__init__()
        schedule = ddpm.make_schedule("linear", T)
        self.register_buffer("features", ddpm.time_features(schedule)[1:])
        self.register_buffer("frequencies", torch.logspace(-0.5229, 0.9031, 16))
        self.time, self.inner = nn.Linear(32, (depth + 1) * width), nn.Linear(2, width, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.outer = nn.Linear(width, 2)

    def forward(self, x, t):
        if t.is_floating_point():
            angles = (-0.2 * t).reshape(-1, 1) * self.frequencies
            features = torch.cat([angles.sin(), angles.cos()], 1)
        else:
            features = self.features[t]
        biases = self.time(features).chunk(len(self.hidden) + 1, -1)
        h = F.silu(self.inner(x) + biases[0])
        for layer, b in zip(self.hidden, biases[1:]):
            h = h + F.silu(layer(h) + b)
        return self.outer(h)


def optimiser(net, fused):
    return torch.optim.Adam(net.parameters(), LR, fused=fused)


def step(loss, opt):
    opt.zero_grad()
    loss.backward()
    opt.step()


# ---- each rival: train(fused) -> a function of one step; sample(n) -> the samples


def bare():
    net = PlainMLP()
    betas = torch.linspace(1e-4, 0.02, T)
    abar = (1 - betas).cumprod(0)

    def train(fused):
        opt = optimiser(net, fused)

        def one():
            x, t, eps = torch.randn(BATCH, 2), torch.randint(T, (BATCH,)), torch.randn(BATCH, 2)
            a = abar[t][:, None]
            step(F.mse_loss(net(a.sqrt() * x + (1 - a).sqrt() * eps, t), eps), opt)
        return one

    @torch.inference_mode()
    def sample(n, steps):
        x = torch.randn(n, 2)
        for t in reversed(range(T - steps, T)):
            eps = net(x, torch.full((n,), t))
            x = (x - betas[t] / (1 - abar[t]).sqrt() * eps) / (1 - betas[t]).sqrt()
            if t:
                x = x + betas[t].sqrt() * torch.randn_like(x)
        return x
    return train, sample


def diffusers():
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    net, scheduler = PlainMLP(), DDPMScheduler(T, beta_schedule="linear", clip_sample=False)

    def train(fused):
        opt = optimiser(net, fused)

        def one():
            x, eps, t = torch.randn(BATCH, 2), torch.randn(BATCH, 2), torch.randint(0, T, (BATCH,))
            step(F.mse_loss(net(scheduler.add_noise(x, eps, t), t), eps), opt)
        return one

    @torch.inference_mode()
    def sample(n, steps):
        x = torch.randn(n, 2)
        scheduler.set_timesteps(T)
        for t in scheduler.timesteps[:steps]:
            x = scheduler.step(net(x, t.expand(n)), t, x).prev_sample
        return x
    return train, sample


def azula():
    from azula.denoise import KarrasDenoiser
    from azula.noise import VPSchedule
    from azula.sample import DDPMSampler

    denoiser = KarrasDenoiser(PlainMLP(), VPSchedule())

    def train(fused):
        opt = optimiser(denoiser, fused)

        def one():
            x = torch.randn(BATCH, 2)
            step(denoiser.loss(x, torch.rand(BATCH)), opt)
        return one

    @torch.inference_mode()
    def sample(n, steps):
        sampler = DDPMSampler(denoiser, steps=steps, silent=True)
        return sampler(sampler.init((n, 2)))
    return train, sample


def ours():
    model = ddpm.Diffusion((2,), ddpm.make_schedule("linear", T))

    def train(fused):
        def batches():
            while True:
                yield torch.randn(BATCH, 2)
        average = copy.deepcopy(model).requires_grad_(False)
        generator = ddpm.train(model, average, optimiser(model, True), batches(), 10**9, LR)
        return lambda: next(generator)

    def sample(n, steps):
        *_, x = model.sample(n, ddpm.timesteps(T, T)[:steps])
        return x
    return train, sample


def turns(tasks, repeats):
    """{name: median seconds} of functions that take turns."""
    seconds = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(s) for name, s in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--sample-steps", type=int, default=1000)
    parser.add_argument("--sample-repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    people = {"ours": ours(), "bare loop": bare(), "diffusers": diffusers(), "azula": azula()}

    def many(one, n=200):
        return lambda: [one() for _ in range(n)] and None

    tasks = {}
    for name, (train, _) in people.items():
        tasks[name] = many(train(True))
        if name != "ours":
            tasks[f"{name} (Adam)"] = many(train(False))
    turns(tasks, 1)                                         # warm
    seconds = turns(tasks, args.repeats)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(f"| training, batch {BATCH} | steps/s | ours is |\n|---|---|---|")
    for name, s in seconds.items():
        print(f"| {name} | {200 / s:.0f} | {s / seconds['ours']:.2f}x |")

    tasks = {name: (lambda f=sample: f(args.samples, args.sample_steps)) for name, (_, sample) in people.items()}
    for _, sample in people.values():
        sample(args.samples, 5)
    seconds = turns(tasks, args.sample_repeats)
    print(f"\n| {args.samples:,} samples x {args.sample_steps} steps | seconds | ours is |\n|---|---|---|")
    for name, s in seconds.items():
        print(f"| {name} | {s:.2f} | {s / seconds['ours']:.2f}x |")


if __name__ == "__main__":
    main()
