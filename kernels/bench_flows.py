"""How long Chamfer distances and splines take, beside what PyTorch takes for the same in the same run.

    python -m kernels.bench_flows

Correctness first: nothing is timed before it agrees with the reference in float64. Forward, forward and backward, and
the inverse of splines, against eager and, on a GPU, torch.compile. Medians; on a GPU the floor is bytes over a measured
copy bandwidth.
"""

import argparse

import torch

from . import chamfer, spline
from .bench import attempt, event_ms, interleaved_ms, median_ms, rates, vectors

# ---- Chamfer: eager as one writes it, forward and backward


def eager_chamfer(x, y):
    d = torch.cdist(x, y)
    return d.min(2)[0].square().mean(1) + d.min(1)[0].square().mean(1)


def bench_chamfer(rows, note, device, bandwidth=None, sizes=((8, 1024), (32, 2048), (1, 16_384))):
    clock = event_ms if device == "cuda" else lambda f: median_ms(f, 9, device)
    for B, N in sizes if device == "cuda" else sizes[:1]:
        x, y = (torch.nn.functional.normalize(vectors(B * N, B * N, 3, device)[i], dim=1).view(B, N, 3) for i in (0, 1))
        truth = chamfer.chamfer_distance(x.double(), y.double())
        error = ((chamfer.chamfer_distance(x, y) - truth).abs() / truth).max().item()
        note(f"gate: chamfer_distance, {B} x {N:,} points: relative error {error:.1e}")
        if not error < 1e-5:
            raise SystemExit("the kernel disagrees with the reference: nothing is timed")

        def backward(function, x=x, y=y):
            with torch.enable_grad():
                a, b = (t.detach().requires_grad_() for t in (x, y))
                return torch.autograd.grad(function(a, b).sum(), (a, b))

        for what, of in (("", lambda f, x=x, y=y: f(x, y)), (", forward and backward", backward)):
            ms = {label: attempt(lambda f=f, of=of: clock(lambda: of(f)), f"Chamfer {B} x {N:,}, {label}", note)
                  for label, f in (("chamfer_distance", chamfer.chamfer_distance), ("eager cdist, min", eager_chamfer))}
            rows.extend((f"Chamfer {B} x {N:,}{what}", label, value, value / ms["chamfer_distance"],
                         4 * x.nbytes / bandwidth if bandwidth else 0.0) for label, value in ms.items() if value)


# ---- splines: eager is the definition


def bench_spline(rows, note, device, bandwidth=None, sizes=((1024, 32), (4096, 32), (65_536, 32), (1_048_576, 8))):
    for N, K in sizes if device == "cuda" else sizes[:2]:
        g = torch.Generator().manual_seed(0)
        x, theta = (2 * torch.randn(N, generator=g)).to(device), torch.randn(N, 3 * K - 1, generator=g).to(device)
        truth = spline.rational_quadratic_reference(x[:5000].double(), theta[:5000].double(), 5.0)
        found = spline.rational_quadratic(x[:5000], theta[:5000], 5.0)
        error = max((a - b).abs().max().item() for a, b in zip(found, truth))
        note(f"gate: rational_quadratic, {N:,} x {K} bins: largest error {error:.1e}")
        if not error < 1e-3:
            raise SystemExit("the kernel disagrees with the reference: nothing is timed")
        cases = {"rational_quadratic": spline.rational_quadratic, "eager": spline.rational_quadratic_reference}
        if device == "cuda":
            cases["torch.compile of eager"] = torch.compile(spline.rational_quadratic_reference, dynamic=False)

        def backward(function, x=x, theta=theta):
            with torch.enable_grad():
                a, b = (t.detach().requires_grad_() for t in (x, theta))
                y, log_slope = function(a, b, 5.0)
                return torch.autograd.grad((y + log_slope).sum(), (a, b))

        ways = {"": lambda f, x=x, theta=theta: f(x, theta, 5.0), ", forward and backward": backward,
                ", inverse": lambda f, x=x, theta=theta: f(x, theta, 5.0, True)}
        for i, (what, of) in enumerate(ways.items()):
            calls = {label: lambda f=f, of=of: of(f) for label, f in cases.items()}
            if device == "cuda":
                ms = {label: attempt(lambda f=f: event_ms(f), f"spline {N:,} x {K}, {label}", note)
                      for label, f in calls.items()}
            else:
                ms = interleaved_ms(calls, 30)
            floor = (1 + (i == 1)) * (theta.nbytes + 3 * x.nbytes) / bandwidth if bandwidth else 0.0
            rows.extend((f"spline {N:,} x {K}{what}", label, value, value / ms["rational_quadratic"], floor)
                        for label, value in ms.items() if value)


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, bandwidth = [], rates()[0] if device == "cuda" else None
    with torch.no_grad():
        bench_chamfer(rows, print, device, bandwidth)
        bench_spline(rows, print, device, bandwidth)
    print("| case | what | ms, median | of ours | floor, ms |\n|---|---|---:|---:|---:|")
    for case, what, ms, ratio, low in rows:
        print(f"| {case} | {what} | {ms:.3g} | {ratio:.2f}x | {low:.3g} |")


if __name__ == "__main__":
    main()
