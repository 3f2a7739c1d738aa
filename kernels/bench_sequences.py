"""How long attention, decoding and the selective scan take, beside what PyTorch takes for the same in the same run.

    python -m kernels.bench_sequences

Correctness first: nothing is timed before it agrees with the reference. On a GPU: causal attention in bfloat16, forward
and backward, against each backend of scaled_dot_product_attention; a decoded token at batch 256 against
scaled_dot_product_attention over the whole cache with a mask; the scan against the sequential loop and a compiled
associative scan by doubling. On a CPU: the scan's hand-written gradient against autograd through the loop. Medians; the
floor is operations over a measured bfloat16 product rate, or bytes over a measured copy bandwidth.
"""

import argparse

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import attention, scan
from .bench import attempt, event_ms, interleaved_ms, rates

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}


def scan_arguments(n, T, E, N, device):
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    out = rand(n, T, E), rand(n, T, E).exp() / 10, -rand(E, N).exp(), rand(n, T, N), rand(n, T, N), rand(n, E, N)
    return [v.to(device) for v in out]


def by_doubling(x, dt, A, B, C, h):
    """An associative scan in log2 T whole operations: what one writes for torch.compile."""
    a, u = (dt[..., None] * A).exp(), (dt * x)[..., None] * B[:, :, None]
    u = torch.cat([(u[:, 0] + a[:, 0] * h)[:, None], u[:, 1:]], 1)
    step = 1
    while step < x.shape[1]:
        u = torch.cat([u[:, :step], u[:, step:] + a[:, step:] * u[:, :-step]], 1)
        a = torch.cat([a[:, :step], a[:, step:] * a[:, :-step]], 1)
        step *= 2
    return (u * C[:, :, None]).sum(-1), u[:, -1]


def gate(device):
    q, k, v = torch.randn(3, 2, 4, 197, 64, device=device).unbind()
    arguments = scan_arguments(2, 77, 40, 16, device)
    wanted = {"causal_attention": attention.causal_attention_reference(q.double(), k.double(), v.double()),
              "decode_attention": attention.decode_attention_reference(q[:, :, 0].double(), k.double().mT, v.double(),
                                                                       150),
              "selective_scan": scan.selective_scan_reference(*(t.double() for t in arguments))[0],
              "the scan by doubling": scan.selective_scan_reference(*(t.double() for t in arguments))[0]}
    with torch.no_grad():
        found = {"causal_attention": attention.causal_attention(q, k, v),
                 "decode_attention": attention.decode_attention(q[:, :, 0], k.mT, v, 150),
                 "selective_scan": scan.selective_scan(*arguments)[0],
                 "the scan by doubling": by_doubling(*arguments)[0]}
    for name, truth in wanted.items():
        error = ((found[name] - truth).abs().max() / truth.abs().max()).item()
        print(f"gate: {name}: largest error {error:.1e} of the largest number")
        if not error < 5e-3:
            raise SystemExit("a kernel disagrees with its reference: nothing is timed")


def pair(function, tensors):
    """Forward alone, and backward alone, as functions without arguments."""
    tensors = [t.detach().requires_grad_() for t in tensors]

    def forward():
        with torch.no_grad():
            return function(*tensors)

    out = function(*tensors)
    out = out[0] if isinstance(out, tuple) else out
    weight = torch.randn_like(out)
    return forward, lambda: torch.autograd.grad(out, tensors, weight, retain_graph=True)


def timed(cases, tensors, i, title, note, repeats=30):
    """Forward (i = 0) or backward (1) of each case in ms; None for one that cannot run here."""
    return {name: attempt(lambda f=f: event_ms(pair(f, tensors)[i], repeats), f"{title}, {name}", note)
            for name, f in cases.items()}


def sdpa(backend):
    def function(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return function


def add(rows, title, ms, ours, floor):
    for label, value in ms.items():
        if value is not None and ms[ours]:
            rows.append((title, label, value, value / ms[ours], floor))


def bench_gpu(rows, note):
    bandwidth, rate = rates()
    for T, D in ((784, 64), (1024, 64), (784, 128), (784, 32)):
        q, k, v = torch.randn(3, 32, 8, T, D, device="cuda", dtype=torch.bfloat16).unbind()
        cases = {"causal_attention": attention.causal_attention}
        cases |= {f"SDPA, {name}": sdpa(backend) for name, backend in BACKENDS.items()}
        for i, (kind, products) in enumerate((("forward", 2), ("backward", 5))):
            title = f"attention {kind}, {T} x {D}"
            ms = timed(cases, (q, k, v), i, title, note)
            add(rows, title, ms, "causal_attention", products * 32 * 8 * T * T * D / rate)
    B, H, T, D, length = 256, 8, 784, 64, 392
    q, v = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((B, H, D), (B, H, T, D)))
    k = torch.randn_like(v)
    k_t, filled = k.mT.contiguous(), torch.tensor([length], dtype=torch.int32, device="cuda")
    mask = (torch.arange(T, device="cuda") < length)[None]
    with torch.no_grad():
        ms = {"decode_attention": event_ms(lambda: attention.decode_attention(q, k_t, v, filled)),
              "SDPA, whole cache, mask": event_ms(lambda: F.scaled_dot_product_attention(q[:, :, None], k, v, mask)),
              "SDPA, cache cut": event_ms(lambda: F.scaled_dot_product_attention(
                  q[:, :, None], k[:, :, :length], v[:, :, :length]))}
    add(rows, f"decode, batch {B}, {length} of {T}", ms, "decode_attention", 4 * B * H * length * D / bandwidth)
    arguments = scan_arguments(64, 784, 256, 16, "cuda")
    cases = {"selective_scan": scan.selective_scan, "sequential": scan.selective_scan_reference,
             "torch.compile of doubling": torch.compile(by_doubling, dynamic=False)}
    for i, kind in enumerate(("forward", "backward")):
        ms = timed(cases, arguments, i, f"scan {kind}", note, 5)
        add(rows, f"scan {kind}, 64 x 784 x 256 x 16", ms, "selective_scan", 4 * 3 * 64 * 784 * 256 / bandwidth)


def bench_cpu(rows, note, n=8, T=196, E=256, N=16, repeats=3):
    arguments = scan_arguments(n, T, E, N, "cpu")
    cases = {"selective_scan": scan.selective_scan, "sequential": scan.selective_scan_reference,
             "doubling": by_doubling}
    made = {name: pair(f, arguments) for name, f in cases.items()}
    for i, kind in enumerate(("forward", "backward")):
        ms = interleaved_ms({name: functions[i] for name, functions in made.items()}, repeats)
        add(rows, f"scan {kind}, {n} x {T} x {E} x {N}", ms, "selective_scan", float("nan"))


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, notes = [], []
    gate(device)
    (bench_gpu if device == "cuda" else bench_cpu)(rows, notes.append)
    print("| case | what | ms, median | of ours | floor, ms |\n|---|---|---:|---:|---:|")
    for case, what, ms, ratio, low in rows:
        print(f"| {case} | {what} | {ms:.3g} | {ratio:.2f}x | {low:.3g} |")
    print("\n".join(f"- {line}" for line in notes))


if __name__ == "__main__":
    main()
