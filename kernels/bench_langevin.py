"""How long Langevin chains take, beside eager autograd in the same run.

    python -m kernels.bench_langevin

Correctness first, as in bench.py, whose clocks these are. On a GPU: 8,192 chains of 1,000 steps against the eager loop
and a CUDA graph of its step, and the image update beside its floor of 12 bytes an element. On a CPU: 512 chains of the
tiled path. An eager loop is timed over a tenth of the steps, for it is slow.
"""

import torch

from . import langevin
from .bench import event_ms, median_ms, rates


def problem(N, H, S, device="cpu"):
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(device)
    network = [rand(2, 12), rand(12), rand(H, 14) / 4, rand(H), rand(2, H, H) / H**0.5, rand(2, H),
               rand(1, H) / H**0.5, rand(1)]
    return rand(N, 2), network, torch.tensor([[1e-3, 0.045]], device=device).repeat(S, 1)


def eager(x, network, table):
    for row in table.unbind():
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(langevin.energy_reference(x, network, None, 0.25).sum(), x)
        x = (x.detach() - row[0] * g + row[1] * torch.randn_like(g)).clamp(-3, 3)
    return x


def gate(H, device):
    x, network, table = problem(777, H, 10, device)
    exact = x.double(), [w.double() for w in network], table.double()
    truth = langevin.langevin_chain_reference(*exact, 3, base=0.25, bound=3.0)
    error = (langevin.langevin_chain(x, network, table, 3, base=0.25, bound=3.0) - truth).abs().max().item()
    print(f"gate: langevin_chain, width {H}, 10 steps: error {error:.1e}")
    if not error < (3e-2 if device == "cuda" else 1e-5):
        raise SystemExit("the kernel disagrees with the reference: nothing is timed")


def graph_of(x, network, table):
    """One eager step captured; a function that replays it as often as the table is long."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        eager(x, network, table[:1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.copy_(eager(x, network, table[:1]))
    return lambda: [graph.replay() for _ in table]


@torch.no_grad()
def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    N, S = (8192, 1000) if device == "cuda" else (512, 100)
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, {torch.get_num_threads()} CPU threads, "
          f"torch {torch.__version__}")
    for H in (64, 128):
        gate(H, device)
    print("| case | what | ms, median | of ours |\n|---|---|---:|---:|")
    for H in (64, 128):
        x, network, table = problem(N, H, S, device)
        title = f"Langevin {N:,} x {S}, width {H}"
        ours = lambda a=(x, network, table): langevin.langevin_chain(*a, 1, base=0.25, bound=3.0)
        ms = {"langevin_chain": median_ms(ours, 5, device),
              "eager autograd": 10 * median_ms(lambda a=(x, network, table[: S // 10]): eager(*a), 5, device)}
        if device == "cuda":
            ms["CUDA graph of eager"] = median_ms(graph_of(x.clone(), network, table), 3, device)
        for name, value in ms.items():
            print(f"| {title} | {name} | {value:.3g} | {value / ms['langevin_chain']:.2f}x |", flush=True)
    if device == "cuda":
        x, g = torch.randn(2, 256, 3, 128, 128, device=device).unbind()
        value = event_ms(lambda: langevin.langevin_step(x, g, 1.0, 0.01, 1, 1, 0.03, 1.0))
        floor = 3 * x.nbytes / rates()[0]
        print(f"| update of 256x3x128x128 | langevin_step | {value:.3g} | floor {floor:.3g} ms |")


if __name__ == "__main__":
    main()
