"""How long the kernels take, beside what PyTorch takes for the same in the same run.

    python -m kernels.bench [--write]

Correctness first: nothing is timed before the kernel agrees with the reference. Then, on a GPU: whole chains of 1000
steps against the eager loop as one writes it, the smallest eager loop (biases folded, addmm, in place), torch.compile
of that step and a CUDA graph of it, and the image update against eager and torch.compile; beside them the physical
floor, from a copy bandwidth and an fp16 matrix rate measured on the spot. The nearest code of 65,536 vectors among
1,024 stands beside eager cdist and argmin, the fewest eager operations, torch.compile and a CUDA graph of both. On a
CPU: the tiled paths against eager. Medians of a few runs, and rows where the kernel loses stay in. --write puts the
table into kernels/RESULTS.md.
"""

import argparse
import datetime
import pathlib
import platform
import statistics
import time

import torch
import torch.nn.functional as F

from . import _runtime, diffusion, quantize

RESULTS = pathlib.Path(__file__).with_name("RESULTS.md")
L = 3


def problem(N, H, S, D=2, device="cpu"):
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    table = torch.stack([torch.full((S,), 0.99), 0.05 * rand(S), torch.full((S,), 0.1)], 1)
    arguments = rand(N, D), rand(H, D), rand(L, H, H) / H**0.5, rand(D, H) / H**0.5, rand(D), rand(S, L + 1, H), table
    return tuple(t.to(device) for t in arguments)


# ---- the baselines


class Natural:
    """The loop as one writes it: a sinusoidal embedding and its projections inside the step."""

    def __init__(self, arguments):
        self.x, self.w_in, self.w_hidden, self.w_out, self.b_out, biases, self.table = arguments
        H, device = self.w_in.shape[0], self.x.device
        g = torch.Generator().manual_seed(1)
        self.w_time = (torch.randn(L + 1, H, H, generator=g) / H**0.5).to(device)
        self.bias = biases[0]
        self.frequencies = torch.exp(-9.2 * torch.arange(H // 2, device=device) / (H // 2))

    def __call__(self):
        x = self.x
        for s in range(len(self.table)):
            t = torch.full((len(x),), float(s), device=x.device)
            angle = t[:, None] * self.frequencies
            features = torch.cat([angle.sin(), angle.cos()], 1)
            h = F.silu(F.linear(x, self.w_in) + F.linear(features, self.w_time[0], self.bias[0]))
            for l in range(L):
                h = h + F.silu(F.linear(h, self.w_hidden[l]) + F.linear(features, self.w_time[l + 1], self.bias[l + 1]))
            A, B, C = self.table[s]
            x = A * x + B * F.linear(h, self.w_out, self.b_out) + C * torch.randn_like(x)
        return x


class Smallest:
    """The fewest eager operations: biases from a table, addmm, in-place activations. `step` is what is compiled."""

    def __init__(self, arguments):
        self.x, self.w_in, self.w_hidden, self.w_out, self.b_out, self.biases, self.table = arguments
        self.rows = self.table.unbind()

    def step(self, x, bias, row):
        h = F.silu(torch.addmm(bias[0], x, self.w_in.T), inplace=True)
        for l in range(L):
            h = h + F.silu(torch.addmm(bias[l + 1], h, self.w_hidden[l].T), inplace=True)
        return row[0] * x + row[1] * torch.addmm(self.b_out, h, self.w_out.T) + row[2] * torch.randn_like(x)

    def __call__(self, step=None):
        x, step = self.x, step or self.step
        for bias, row in zip(self.biases, self.rows):
            x = step(x, bias, row)
        return x

    def graph(self):
        """One step captured, replayed S times: the tables are read through a step counter on the device."""
        x, s = self.x.clone(), torch.zeros(1, dtype=torch.long, device=self.x.device)

        def body():
            x.copy_(self.step(x, self.biases.index_select(0, s)[0], self.table.index_select(0, s)[0]))
            s.add_(1)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                body()
                s.zero_()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            body()

        def replay():
            x.copy_(self.x)
            s.zero_()
            for _ in range(len(self.table)):
                graph.replay()
            return x

        return replay


# ---- clocks


def median_ms(function, repeats, device):
    """Median wall time of whole calls, the device idle before and after; one call to warm up."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    function()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def interleaved_ms(cases, repeats):
    """Medians with the cases taken in turns, so that what else the machine does falls on all of them."""
    times = {name: [] for name in cases}
    for k in range(repeats + 1):
        for name, function in cases.items():
            start = time.perf_counter()
            function()
            if k:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def event_ms(function, repeats=30):
    """Median time of one short launch on the device."""
    for _ in range(5):
        function()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def attempt(function, title, note):
    """None, and the reason in the notes, where a baseline cannot run here (no C compiler for torch.compile, memory)."""
    try:
        return function()
    except Exception as error:
        note(f"{title}: not run. {type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:100]}")
        return None


# ---- the nearest code: eager as one writes it, and in the fewest operations


def by_cdist(x, codes):
    return torch.cdist(x, codes).argmin(1)


def by_product(x, codes):
    return torch.addmm(codes.square().sum(1), x, codes.T, alpha=-2).argmin(1)


def vectors(N, K, D, device="cpu"):
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, D, generator=g).to(device) for n in (N, K))


def gate_nearest(device):
    x, codes = vectors(777, 300, 64, device)
    truth = quantize.nearest_code_reference(x.double(), codes.double())
    wrong = (quantize.nearest_code(x, codes) != truth).sum().item()
    print(f"gate: nearest_code: {wrong} of 777 indices differ from float64")
    if wrong:
        raise SystemExit("the kernel disagrees with the reference: nothing is timed")


def bench_nearest_cpu(rows, note, N=16_384, K=512, D=64, repeats=9):
    x, codes = vectors(N, K, D)
    a = x[:4096]
    ms = interleaved_ms({
        "nearest_code": lambda: quantize.nearest_code(x, codes), "eager cdist, argmin": lambda: by_cdist(x, codes),
        "eager product, argmin": lambda: by_product(x, codes), "product": lambda: a @ codes.T,
    }, repeats)
    floor = ms.pop("product") * N / len(a)
    for label, value in ms.items():
        rows.append((f"nearest of {K}, {N:,} x {D}", label, value, value / ms["nearest_code"], floor))


def bench_nearest_gpu(rows, note, bandwidth, N=65_536, K=1024, D=64):
    x, codes = vectors(N, K, D, "cuda")
    a, b = torch.randn(2, 8192, 8192, device="cuda").unbind()
    rate = 2 * 8192**3 / event_ms(lambda: a @ b, 10)                    # fp32 without TF32, as cdist's own product
    note(f"measured here: fp32 product {rate / 1e9:.0f} TFLOP/s")
    title = f"nearest of {K:,}, {N:,} x {D}"
    found = quantize.nearest_code(x, codes)
    for label, function in (("cdist", by_cdist), ("product", by_product)):
        wrong = (function(x, codes) != found).sum().item()
        note(f"{title}: eager {label} and argmin give another index in {wrong} rows")

    def graph(function):
        function(x, codes)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            function(x, codes)
        return captured.replay

    cases = {"nearest_code": lambda: lambda: quantize.nearest_code(x, codes)}
    for label, function in (("cdist, argmin", by_cdist), ("product, argmin", by_product)):
        cases[f"eager {label}"] = lambda f=function: lambda: f(x, codes)
        cases[f"torch.compile of {label}"] = lambda f=function: (lambda c: lambda: c(x, codes))(
            torch.compile(f, dynamic=False))
        cases[f"CUDA graph of {label}"] = lambda f=function: graph(f)
    cases["CUDA graph of nearest_code"] = lambda: graph(quantize.nearest_code)
    ms = {k: attempt(lambda make=make: event_ms(make()), f"{title}, {k}", note) for k, make in cases.items()}
    floor = max((x.nbytes + 8 * N) / bandwidth, 2 * N * K * D / rate)
    for label, value in ms.items():
        if value is not None:
            rows.append((title, label, value, value / ms["nearest_code"], floor))


# ---- the two benches


def gate(device):
    """Raises unless the timed functions agree with the reference."""
    for H in (64, 128):
        arguments = problem(777, H, 20, device=device)
        truth = diffusion.sample_chain_reference(*(t.double() for t in arguments), 3)
        found = diffusion.sample_chain(*arguments, 3)
        error = ((found - truth).abs().max() / truth.abs().max()).item()
        print(f"gate: sample_chain, width {H}, 20 steps: relative error {error:.1e}")
        if not error < (1e-2 if device == "cuda" else 1e-5):
            raise SystemExit("the kernel disagrees with the reference: nothing is timed")
    x, out = (torch.randn(3, 5, 7, 11, device=device) for _ in range(2))
    rest = (1.1, -0.4, 0.8, 0.3, 0.2), 3, 4, 0.5
    truth = diffusion.diffusion_step_reference(x, out, *rest)
    error = (diffusion.diffusion_step(x, out, *rest) - truth).abs().max().item()
    print(f"gate: diffusion_step: error {error:.1e}")
    if not error < 1e-5:
        raise SystemExit("the kernel disagrees with the reference: nothing is timed")


def flop(N, H, S, D):
    return 2 * N * S * (L * H * H + 2 * D * H)


def bench_cpu(rows, note, N=10_000, S=200, repeats=3):
    for H in (64, 128):
        arguments = problem(N, H, S)
        smallest, few = Smallest(arguments), problem(N, H, S // 10)
        ms = interleaved_ms({
            "smallest": smallest, "ours": lambda a=arguments: diffusion.sample_chain(*a, 1),
            "no noise": lambda a=arguments: diffusion.sample_chain(*a, 1, noise="none"),
        }, repeats)
        ms["natural"] = 10 * median_ms(Natural(few), repeats, "cpu")    # of a tenth of the steps: it is slow
        a, b = torch.randn(4096, H), torch.randn(H, H)
        product = median_ms(lambda a=a, b=b: a @ b, 20, "cpu")
        floor = flop(N, H, S, 2) / (2 * 4096 * H * H / product)
        for name, label in (("natural", "eager, natural"), ("smallest", "eager, smallest"), ("ours", "sample_chain")):
            rows.append((f"chain {N:,} x {S}, width {H}", label, ms[name], ms[name] / ms["ours"], floor))
        noise = 100 * (1 - ms["no noise"] / ms["ours"])
        note(f"width {H}: {ms['ours'] / S:.2f} ms a step; its noise is {noise:.0f}% of it")
    bench_nearest_cpu(rows, note)


def rates():
    """Measured here: bytes a ms of a copy, floating-point operations a ms of an fp16 product."""
    source, target = torch.empty(2, 2**27, device="cuda").unbind()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    return 2 * source.nbytes / event_ms(lambda: target.copy_(source)), 2 * 8192**3 / event_ms(lambda: a @ b)


def bench_gpu(rows, note):
    bandwidth, rate = rates()
    note(f"measured here: copy {bandwidth / 1e9:.2f} TB/s, fp16 product {rate / 1e9:.0f} TFLOP/s")
    S = 1000
    for H in (64, 128, 256):
        for N in (8_192, 65_536):
            arguments = problem(N, H, S, device="cuda")
            title, smallest = f"chain {N:,} x {S}, width {H}", Smallest(arguments)
            torch._dynamo.reset()
            compiled = torch.compile(smallest.step, dynamic=False)
            cases = {
                "sample_chain": lambda a=arguments: diffusion.sample_chain(*a, 1),
                "eager, natural": Natural(arguments),
                "eager, smallest": smallest,
                "torch.compile of the smallest": lambda f=smallest, c=compiled: f(c),
            }
            ms = {k: attempt(lambda f=f: median_ms(f, 3, "cuda"), f"{title}, {k}", note) for k, f in cases.items()}
            label = "CUDA graph of the smallest"
            ms[label] = attempt(lambda f=smallest: median_ms(f.graph(), 3, "cuda"), f"{title}, {label}", note)
            which = _runtime.backend(arguments[0], "" if H < 256 else "width")
            for label, value in ms.items():
                if value is not None:
                    shown = f"{label} ({which})" if label == "sample_chain" else label
                    rows.append((title, shown, value, value / ms["sample_chain"], flop(N, H, S, 2) / rate))
    for shape in ((64, 3, 64, 64), (256, 3, 128, 128)):
        x, out = torch.randn(shape, device="cuda"), torch.randn(shape, device="cuda")

        def eager(x, out):
            x_0 = (1.1 * x - 0.4 * out).clamp(-1, 1)
            return 0.8 * x_0 + 0.3 * x + 0.2 * torch.randn_like(x)

        title, compiled = f"update of {'x'.join(map(str, shape))}", torch.compile(eager, dynamic=False)
        cases = {
            "diffusion_step": lambda x=x, o=out: diffusion.diffusion_step(x, o, (1.1, -0.4, 0.8, 0.3, 0.2), 1, 1, 1.0),
            "eager": lambda f=eager, x=x, o=out: f(x, o),
            "torch.compile": lambda f=compiled, x=x, o=out: f(x, o),
        }
        ms = {k: attempt(lambda f=f: event_ms(f), f"{title}, {k}", note) for k, f in cases.items()}
        for label, value in ms.items():
            if value is not None:
                rows.append((title, label, value, value / ms["diffusion_step"], 3 * x.nbytes / bandwidth))
    bench_nearest_gpu(rows, note, bandwidth)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put the table into {RESULTS.name}")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, notes = [], []

    def note(text):
        notes.append(text)
        print(text, flush=True)

    version = _runtime.triton.__version__ if _runtime.triton else "absent"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    head = (f"{name}, {torch.get_num_threads()} CPU threads; torch {torch.__version__}, Triton {version}, "
            f"Python {platform.python_version()}; {datetime.date.today()}")
    print(head)
    if device == "cpu":
        note("No GPU here: this is the PyTorch path on the CPU alone, and nothing below says how fast a kernel is.")
    with torch.no_grad():
        gate(device)
        gate_nearest(device)
        (bench_gpu if device == "cuda" else bench_cpu)(rows, note)
    table = ["| case | what | ms, median | of ours | floor, ms |", "|---|---|---:|---:|---:|"]
    table += [f"| {case} | {what} | {ms:.3g} | {ratio:.2f}x | {low:.3g} |" for case, what, ms, ratio, low in rows]
    floor = "operations of the products over the measured product rate" + (
        " (fp32 for the nearest code); for the update, bytes over the measured copy bandwidth"
        if device == "cuda" else " of a 4096-row product")
    table += ["", f"Floor: {floor}.", "", *(f"- {n}" for n in notes)]
    print("\n".join(["", *table]))
    if args.write:
        lines = ["# Measured", "", "`python -m kernels.bench --write`", "", head, "", *table, ""]
        RESULTS.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
