"""Chamfer distances a second: kernels.chamfer_distance beside torch.cdist and two minima, in one run.

    python bench/chamfer.py [--sizes 32x256 8x1024 2x4096 1x16384] [--gradient]

BxN: B pairs of clouds of N points in space, float32, the second the first with gaussian noise. What is timed:
  ours                 kernels.chamfer_distance(x, y)
  cdist + min          d = torch.cdist(x, y); squares of d.min(2) and d.min(1), means
  product + min        |x|^2 + |y|^2 - 2 x y by baddbmm, amin both ways: the fewest eager operations, and it cancels
With --gradient, forward and backward to both clouds. The measurements take turns; medians, and what ours is of each.
The last column is the largest relative error of a cloud's distance against float64.
"""

import argparse
import pathlib
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import kernels  # noqa: E402


def by_cdist(x, y):
    d = torch.cdist(x, y)
    return d.min(2)[0].square().mean(1) + d.min(1)[0].square().mean(1)


def by_product(x, y):
    d = torch.baddbmm(y.square().sum(2)[:, None], x, y.mT, alpha=-2) + x.square().sum(2)[..., None]
    return d.amin(2).mean(1) + d.amin(1).mean(1)


TASKS = {"ours": kernels.chamfer_distance, "cdist + min": by_cdist, "product + min": by_product}


def call(task, x, y):
    return torch.autograd.grad(task(x, y).sum(), (x, y)) if x.requires_grad else task(x, y)


def turns(tasks, repeats):
    """{name: seconds of each call} of functions that take turns, after one warm round."""
    seconds = {name: [] for name in tasks}
    for k in range(repeats + 1):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            if k:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["32x256", "8x1024", "2x4096", "1x16384"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--gradient", action="store_true", help="time forward and backward")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {args.repeats} repeats; "
          f"{'forward and backward' if args.gradient else 'forward'}\n")
    print("| clouds | Chamfer | ms, median | fastest quarter | ours is | error |\n|---|---|---:|---:|---:|---:|")
    for size in args.sizes:
        B, N = map(int, size.split("x"))
        g = torch.Generator().manual_seed(0)
        x = torch.nn.functional.normalize(torch.randn(B, N, 3, generator=g), dim=-1)
        y = (x + 0.02 * torch.randn(x.shape, generator=g)).requires_grad_(args.gradient)
        x.requires_grad_(args.gradient)
        with torch.no_grad():
            truth = kernels.chamfer_distance(x.double(), y.double())
            error = {name: ((task(x, y) - truth).abs() / truth).max().item() for name, task in TASKS.items()}
        seconds = turns({name: lambda t=task, x=x, y=y: call(t, x, y) for name, task in TASKS.items()}, args.repeats)
        middle = {name: statistics.median(s) for name, s in seconds.items()}
        for name, s in seconds.items():
            print(f"| {size} | {name} | {1e3 * middle[name]:.1f} | {1e3 * sorted(s)[len(s) // 4]:.1f} | "
                  f"{middle[name] / middle['ours']:.2f}x | {error[name]:.0e} |", flush=True)


if __name__ == "__main__":
    main()
