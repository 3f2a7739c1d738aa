"""Nearest codes a second: kernels.nearest_code beside torch.cdist + argmin and vector-quantize-pytorch, in one run.

    python bench/quantize.py            without the rival
    bash bench/rivals.sh quantize       a throw-away environment with it

What is timed, on float32 rows x (N, D) and codes (K, D), under torch.inference_mode():
  ours                 kernels.nearest_code(x, codes): indices
  cdist + argmin       torch.cdist(x, codes).argmin(1): indices
  product + argmax     torch.addmm(-|e|^2 / 2, x, codes.T).argmax(1): indices, the fewest eager operations
  VQ lookup            (-cdist(x, codes)).argmax(-1) with vector-quantize-pytorch's own cdist: what its Codebook
                       (Euclidean, eval mode) does to get indices, and nothing else of it
  VQ codebook          Codebook.forward in eval mode, the library's own call: that, a one-hot matrix that it throws away
                       and the quantised vectors
The measurements take turns, so that a busy machine slows all alike; medians, and the ratio of ours to each.
"""

import argparse
import pathlib
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import kernels  # noqa: E402


def rivals(x, codes):
    """{name: function} of vector-quantize-pytorch, or {} where it is not installed."""
    try:
        from vector_quantize_pytorch import vector_quantize_pytorch as library
    except ModuleNotFoundError as error:
        if error.name != "vector_quantize_pytorch":
            raise
        return {}
    codebook = library.Codebook(codes.shape[1], len(codes)).eval()
    codebook.embed.data.copy_(codes[None])

    return {"VQ lookup": lambda: (-library.cdist(x[None], codebook.embed)).argmax(-1)[0],
            "VQ codebook": lambda: codebook(x[None])[1][0]}


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


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--codes", type=int, default=512)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()
    g = torch.Generator().manual_seed(0)
    x, codes = (torch.randn(n, args.dim, generator=g) for n in (args.rows, args.codes))
    tasks = {
        "ours": lambda: kernels.nearest_code(x, codes),
        "cdist + argmin": lambda: torch.cdist(x, codes).argmin(1),
        "product + argmax": lambda: torch.addmm(codes.square().sum(1).div_(-2), x, codes.T).argmax(1),
        **rivals(x, codes),
    }
    truth = kernels.nearest_code(x.double(), codes.double())
    wrong = {name: (task() != truth).sum().item() for name, task in tasks.items()}
    seconds = {name: sorted(s) for name, s in turns(tasks, args.repeats).items()}
    middle = {name: statistics.median(s) for name, s in seconds.items()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {args.rows:,} rows, {args.codes:,} codes, "
          f"dimension {args.dim}, {args.repeats} repeats\n")
    print("| nearest code | ms, median | fastest quarter | ours is | differ from float64 |\n|---|---:|---:|---:|---:|")
    for name, s in seconds.items():
        print(f"| {name} | {1e3 * middle[name]:.1f} | {1e3 * s[len(s) // 4]:.1f} | "
              f"{middle[name] / middle['ours']:.2f}x | {wrong[name]} |")


if __name__ == "__main__":
    main()
