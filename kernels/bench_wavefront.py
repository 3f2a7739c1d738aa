"""How long a batch of pictures takes, beside the same waves, and the same raster, in eager PyTorch.

    python -m kernels.bench_wavefront [--images 4096] [--side 28]

Correctness first: nothing is timed before it agrees with the reference. 15 parents in a 4 x 4 block; the tables are
random. Rows: a counted table, and a network with two hidden layers of 64 that is told the position. The raster is a
loop over pixels with all images at once, timed over as many images; on a GPU its CUDA graph stands beside. The floor is
the bytes of the pictures over a measured copy bandwidth on a GPU; on a CPU none is given.
"""

import argparse

import torch

from . import wavefront
from ._runtime import backend
from .bench import attempt, median_ms, rates

OFFSETS = tuple((a, b) for a in range(4) for b in range(4) if a + b)


def network(side, hidden, device):
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(device)
    if not hidden:
        return rand(2**15, 1) - 1.5, None, []
    layers = [(rand(hidden, hidden) / hidden**0.5, rand(hidden)), (rand(1, hidden) / hidden**0.5, rand(1))]
    return rand(2**15, hidden), rand(side * side, hidden), layers


def raster(u, first, places, layers):
    """u (H, W, n), pixel by pixel: contexts by slices of a padded picture."""
    H, W, n = u.shape
    x = torch.zeros(H + 3, W + 3, n, dtype=torch.int32, device=u.device)
    for i in range(H):
        for j in range(W):
            code = torch.zeros(n, dtype=torch.int32, device=u.device)
            for m, (a, b) in enumerate(OFFSETS):
                code.add_(x[3 + i - a, 3 + j - b], alpha=1 << m)
            z = first.index_select(0, code)
            z = z if places is None else z + places[i * W + j]
            x[3 + i, 3 + j] = u[i, j] < torch.sigmoid(wavefront.head(z, layers))
    return x[3:, 3:].permute(2, 0, 1).to(torch.uint8)


def gate(side, arguments, device):
    mine = wavefront.wavefront_sample(9, (side, side), OFFSETS, *arguments, 3)
    truth = wavefront.wavefront_sample_reference(9, (side, side), OFFSETS, *arguments, 3)
    u = wavefront.uniform(9, side, side, 1, 3, device)
    u = u.as_strided((side, side, 9), (side * 9 + 9, side * 9, 1)).contiguous()      # u[i + j, i]
    wrong = [(x != truth).flatten(1).any(1).sum().item() for x in (mine, raster(u, *arguments))]
    print(f"gate: of 9 pictures {wrong[0]} differ from the reference, {wrong[1]} of the raster")
    if max(wrong) > (1 if arguments[2] else 0):
        raise SystemExit("the sampler disagrees with the reference: nothing is timed")


def graph_of(function):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("images", 4096 if torch.cuda.is_available() else 512), ("side", 28), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    device, n, side = "cuda" if torch.cuda.is_available() else "cpu", args.images, args.side
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, {torch.get_num_threads()} CPU threads, "
          f"torch {torch.__version__}")
    print("| case | what | ms, median | of ours |\n|---|---|---:|---:|")
    for hidden, title in ((0, "counted table"), (64, "two layers of 64, position")):
        arguments = network(side, hidden, device)
        gate(side, arguments, device)
        case = f"{title}, {n:,} x {side} x {side}"
        ours = lambda a=arguments: wavefront.wavefront_sample(n, (side, side), OFFSETS, *a, 1)
        waves = lambda a=arguments: wavefront._sample_torch(n, (side, side), OFFSETS, *a, 1)
        by_pixel = lambda a=arguments: raster(torch.rand(side, side, n, device=device), *a)
        cases = {f"wavefront_sample ({backend(arguments[0])})": lambda f=ours: f,
                 "waves, eager": lambda f=waves: f, "raster, eager": lambda f=by_pixel: f}
        if device == "cuda":
            cases["raster, CUDA graph"] = lambda f=by_pixel: graph_of(f)
        ms = {k: attempt(lambda make=make: median_ms(make(), args.repeats, device), f"{case}, {k}", print)
              for k, make in cases.items()}
        first = next(iter(ms.values()))
        for name, value in ms.items():
            if value is not None:
                print(f"| {case} | {name} | {value:.3g} | {value / first:.2f}x |", flush=True)
        if device == "cuda":
            print(f"| {case} | floor: the pictures' bytes | {n * side * side / rates()[0]:.3g} | |")


if __name__ == "__main__":
    main()
