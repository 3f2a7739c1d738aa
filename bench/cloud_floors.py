"""How far Chamfer distance can fall for gaussian noise: the noisy cloud, its exact projection and a second true sample.

    python bench/cloud_floors.py [--clouds 20]

Each row is a mean over held-out shapes of data.load("shapes3d"), in the box of edge 2; squared distances, both
directions summed, times 10^4. A perfect denoiser that knows the surface, but cannot know where on it the points were,
is the projection. `lower` is what it gains on the noisy cloud; `planes` is what moving each point onto the plane of its
k nearest gains, for the k of 8, 16, 24 or 32 that knows the answer best; `second` is an independent sample.
"""

import argparse
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import clouds  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clouds", type=int, default=20)
    parser.add_argument("--points", type=int, nargs="+", default=[256, 1024, 4096, 10_000])
    n, truth = (args := parser.parse_args()).clouds, clouds.load("shapes3d", train=1)
    print("| points | noise | noisy | projected | lower | planes (k) | second sample | noisy to surface |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for points in args.points:
        clean, second = truth.clean(n, points), truth.clean(n, points, seed=1)
        other = clouds.chamfer(second, clean).mean().item()
        for sigma in (0.01, 0.02, 0.03):
            g = torch.Generator().manual_seed(2)
            noisy = clean + sigma * torch.randn(clean.shape, generator=g)
            onto = [clouds.project(x, truth.surfaces[k % len(truth.surfaces)]) for k, x in enumerate(noisy)]
            near, best = (clouds.chamfer(x, clean).mean().item() for x in (noisy, onto))
            flat, k = min((clouds.chamfer(clouds.flatten(noisy, k), clean).mean().item(), k) for k in (8, 16, 24, 32))
            far = torch.stack([d.mean() for d in truth.distance(noisy)]).mean()
            print(f"| {points:,} | {sigma:.0%} | {1e4 * near:.2f} | {1e4 * best:.2f} | {1 - best / near:.0%} | "
                  f"{1 - flat / near:.0%} ({k}) | "
                  f"{1e4 * other:.2f} | {far:.4f} |", flush=True)


if __name__ == "__main__":
    main()
