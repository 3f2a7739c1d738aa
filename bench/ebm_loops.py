"""Langevin steps a second, ebm.py's chains against the loop that tutorials write, in turns in one run.

    python bench/ebm_loops.py [--seconds 3] [--turns 5] [--clock wall|cpu] [--torchebm]

The plain loop walks the same network: it freezes the weights, adds noise in place, calls backward on the summed
energies, clips the gradient, steps, empties the gradient and clamps, each an operation of its own. --torchebm adds
that library's Langevin sampler, where it is installed. Points: 512 chains under the MLP of ebm.py. Images: 64 chains of
28x28 under the network of ebm.py, and under one of the UvA tutorial's size. Most of an image's step is the
network's two passes, which both loops pay.
"""

import argparse
import pathlib
import statistics
import sys
import time

import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import ebm  # noqa: E402


def plain(energy, network, x, steps, step, noise, clip, bound):
    for p in network.parameters():
        p.requires_grad = False
    x = x.clone().requires_grad_()
    z = torch.empty_like(x)
    for _ in range(steps):
        z.normal_(0, noise)
        x.data.add_(z)
        energy(x).sum().backward()
        if clip:
            x.grad.data.clamp_(-clip, clip)
        x.data.add_(-step * x.grad.data)
        x.grad.detach_()
        x.grad.zero_()
        x.data.clamp_(-bound, bound)
    for p in network.parameters():
        p.requires_grad = True
    return x.detach()


def torchebm(energy, x, steps, step):
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    class Wrapped(BaseModel):
        def forward(self, x):
            return energy(x)

    sampler = LangevinDynamics(Wrapped(), step_size=step, noise_scale=1.0)
    return lambda: sampler.sample(x=x, n_steps=steps)


def tutorial():
    """Four convolutions of stride 2 and two layers on top, 16 to 64 channels, as ebm.py's network is given logits."""
    layers = []
    for i, o, k, pad in ((1, 16, 5, 4), (16, 32, 3, 1), (32, 64, 3, 1), (64, 64, 3, 1)):
        layers += [nn.Conv2d(i, o, k, 2, pad), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 64), nn.SiLU(), nn.Linear(64, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: on a shared machine")
    parser.add_argument("--torchebm", action="store_true")
    args = parser.parse_args()
    now = time.perf_counter if args.clock == "wall" else time.process_time
    torch.manual_seed(0)
    points = ebm.EBM((2,), jumps=0)
    images = ebm.EBM((1, 28, 28), step=10.0, temperature=5e-6, clip=0.03)
    other = ebm.EBM((1, 28, 28), step=10.0, temperature=5e-6, clip=0.03)
    other.network = tutorial()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}: steps a {args.clock} second, median")
    print("| chains | ours | plain loop | ours is |" + (" torchebm |" if args.torchebm else ""))
    print("|---|---|---|---|" + ("---|" if args.torchebm else ""))
    cases = (("512 points, MLP of 2 x 128", points, 512, 50), ("64 images, our network", images, 64, 5),
             ("64 images, the tutorial's network", other, 64, 5))
    for name, model, n, steps in cases:
        x, noises = model.uniform(n), torch.full((steps,), model.noise)
        loops = {"ours": lambda m=model, x=x, z=noises: m.walk(x, None, z),
                 "plain": lambda m=model, x=x, k=steps: plain(m.energy, m.network, x, k, m.step, m.noise, m.clip,
                                                              m.bound)}
        if args.torchebm:
            loops["torchebm"] = torchebm(model.energy, x, steps, model.step)
        rates = {k: [] for k in loops}
        for turn in range(args.turns + 1):                  # the first warms up
            for k, loop in loops.items():
                began, done = now(), 0
                while now() - began < args.seconds:
                    loop()
                    done += steps
                if turn:
                    rates[k].append(done / (now() - began))
        ratio = {k: statistics.median(a / b for a, b in zip(rates["ours"], rates[k])) for k in loops}
        shown = {k: statistics.median(v) for k, v in rates.items()}
        row = f"| {name} | {shown['ours']:.0f} | {shown['plain']:.0f} | {ratio['plain']:.2f}x |"
        print(row + (f" {shown['torchebm']:.0f}, {ratio['torchebm']:.2f}x |" if args.torchebm else ""), flush=True)


if __name__ == "__main__":
    main()
