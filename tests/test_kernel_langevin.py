"""kernels/langevin.py: the chain against autograd, the CPU path and the kernel against the definition. Behind each `def`:
a line that must not break. Without a GPU the kernels run in Triton's interpreter; see test_kernels.py."""

import math
import os
import pathlib
import subprocess
import sys

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import langevin, rng
from kernels._runtime import INTERPRET, triton

ROOT = pathlib.Path(__file__).parents[1]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
OLD = triton is not None and triton.__version__.startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
needs_triton = pytest.mark.skipif(triton is None or not (GPU or INTERPRET and not OLD), reason="no Triton to run or interpret")
needs_gpu = pytest.mark.skipif(not GPU or triton is None, reason="no GPU")
seeds = st.integers(0, 2**64 - 1)


def problem(N, D=2, E=8, H=64, L=2, C=1, S=3, seed=0, labels="none", dtype=torch.float32):
    """(x, network, coefficients), y: of the size that a trained network has."""
    g = torch.Generator().manual_seed(1000 * seed + 100 * D + 10 * C + S)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    network = [2 * rand(D, E), rand(E), rand(H, D + E) / 3, rand(H) / 3, rand(L, H, H) * (1.5 / H**0.5), rand(L, H) / 3,
               rand(C, H) / H**0.5 * 3, rand(C)]
    table = torch.stack([0.02 + 0.02 * torch.rand(S, generator=g, dtype=dtype), 0.3 * rand(S).abs()], 1)
    y = {"none": None, "all": torch.randint(C, (N,), generator=g), "some": torch.randint(-1, C, (N,), generator=g)}[labels]
    return (rand(N, D), network, table), y


def exact(arguments, *rest, **options):
    x, network, table = arguments
    return langevin.langevin_chain_reference(x.double(), [w.double() for w in network], table.double(), *rest, **options)


def interpreted(arguments, seed, y=None, first=0, base=0.0, clip=None, bound=None, **options):
    x, network, table = arguments
    y = None if y is None else y.to(DEVICE)
    on = x.to(DEVICE), [w.to(DEVICE) for w in network], table.to(DEVICE)
    return langevin._chain_triton(*on, seed, y, first, base, clip, bound, **options).cpu()


def close(a, b, tolerance):
    error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1)
    assert error <= tolerance, f"{error:.2e} > {tolerance:.0e}"         # a NaN fails too


sizes = dict(N=st.sampled_from([1, 17, 63, 130]), D=st.sampled_from([1, 2, 3, 4]), L=st.integers(0, 2), C=st.sampled_from([1, 2, 7]),
             S=st.integers(1, 3), seed=seeds, first=st.integers(0, 2**33), labels=st.sampled_from(["none", "all", "some"]),
             clip=st.sampled_from([None, 0.7]), bound=st.sampled_from([None, 1.0]), base=st.sampled_from([0.0, 0.5]))


# ---- the definition


def test_kernel_langevin_energy_is_the_network_written_out():           # sin for cos; the sign; base; a bias
    (x, network, _), y = problem(5, D=3, E=4, H=6, L=1, C=3, labels="some", dtype=torch.float64)
    F, phase, w0, b0, w1, b1, w2, b2 = network
    silu = lambda a: a / (1 + math.exp(-a))
    for i in range(5):
        phi = [*x[i].tolist(), *[math.sin(sum(x[i, d] * F[d, e] for d in range(3)) + phase[e]) for e in range(4)]]
        h = [silu(sum(w0[j, k] * phi[k] for k in range(7)) + b0[j]) for j in range(6)]
        h = [silu(sum(w1[0, j, k] * h[k] for k in range(6)) + b1[0, j]) for j in range(6)]
        f = [float(sum(w2[c, k] * h[k] for k in range(6)) + b2[c]) for c in range(3)]
        quadratic = 0.7 / 2 * float((x[i] ** 2).sum())
        total = quadratic - math.log(sum(map(math.exp, f)))
        assert langevin.energy_reference(x[i:i + 1], network, None, 0.7).item() == pytest.approx(total)
        known = total if y[i] < 0 else quadratic - f[y[i]]
        assert langevin.energy_reference(x[i:i + 1], network, y[i:i + 1], 0.7).item() == pytest.approx(known)


def test_kernel_langevin_reference_goes_downhill():                     # the sign of A; noise of another step; clamp before
    arguments, _ = problem(50, S=1, dtype=torch.float64)
    x, network, _ = arguments
    energy = lambda x: langevin.energy_reference(x, network, None, 0.5)
    y = langevin.langevin_chain_reference(x, network, torch.tensor([[1e-4, 0.0]]), 1, base=0.5)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(energy(leaf).sum(), leaf)
    torch.testing.assert_close(energy(x) - energy(y), 1e-4 * g.square().sum(1), rtol=0.02, atol=1e-9)
    z = rng.normal(50, 2, 7, 12).double()
    flat = [torch.zeros_like(w) for w in network]
    moved = langevin.langevin_chain_reference(x, flat, torch.tensor([[0.1, 2.0]]), 7, first=12, base=0.5, clip=0.2, bound=1.5)
    torch.testing.assert_close(moved, (x - 0.1 * (0.5 * x).clamp(-0.2, 0.2) + 2 * z).clamp(-1.5, 1.5))


# ---- the CPU path


@given(H=st.sampled_from([16, 40]), E=st.sampled_from([0, 5, 12]), **sizes)
@settings(max_examples=40)
def test_kernel_langevin_on_the_cpu_equals_the_reference(H, E, N, D, L, C, S, seed, first, labels, clip, bound, base):
    """silu's slope, W for W^T, cos for sin in the way back; base; clip after the step; the row number of a tile"""
    arguments, y = problem(N, D, E, H, L, C, S, labels=labels)
    options = dict(y=y, first=first, base=base, clip=clip, bound=bound)
    found = kernels.langevin_chain(*arguments, seed, **options)
    assert found.dtype == torch.float32 and found.shape == (N, D)
    close(found, exact(arguments, seed, **options), 1e-5)


def test_kernel_langevin_in_float64_is_exact():                         # float32 in between
    arguments, y = problem(40, C=4, S=6, labels="some", dtype=torch.float64)
    close(kernels.langevin_chain(*arguments, 3, y, clip=0.5), exact(arguments, 3, y, clip=0.5), 1e-13)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_kernel_langevin_joins_its_tiles_and_leaves_its_surroundings_alone(threads, monkeypatch):
    """a tile's rows or classes; the count of threads not put back; x overwritten"""
    before, change, calls = torch.get_num_threads(), torch.set_num_threads, []
    (x, network, table), y = problem(2 * 4096 + 77, H=16, L=1, C=3, S=9, labels="some")
    copies = [t.clone() for t in (x, *network, table, y)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: calls.append(n) or change(n))
    found = kernels.langevin_chain(x, network, table, 3, y)
    monkeypatch.undo()
    torch.set_num_threads(before)
    close(found, exact((x, network, table), 3, y), 1e-5)
    assert calls == [] if threads == 1 else calls[-1] == threads and set(calls[:-1]) == {1}
    assert all(torch.equal(a, b) for a, b in zip((x, *network, table, y), copies))
    (found * torch.ones(2, requires_grad=True, dtype=torch.float32)).sum().backward()         # not an inference tensor


def test_kernel_langevin_generates_no_noise_where_none_is_used(monkeypatch):      # any(B)
    (x, network, table), _ = problem(20, H=16)
    table[:, 1] = 0
    monkeypatch.setattr(rng, "normal_block", None)
    assert kernels.langevin_chain(x, network, table, 1).isfinite().all()


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_kernel_langevin_of_a_quadratic_has_the_variance_of_the_discrete_chain(temperature):  # sqrt(2); A for A / 2
    """x' = x - eta x / s^2 + sqrt(2 eta T) z is stationary at variance T s^2 / (1 - eta / (2 s^2))."""
    s, eta, n = 0.7, 0.2, 40_000
    network = [torch.zeros(shape, dtype=torch.float32) for shape in ((2, 0), (0,), (16, 2), (16,), (0, 16, 16), (0, 16), (1, 16), (1,))]
    table = torch.tensor([[eta, math.sqrt(2 * eta * temperature)]], dtype=torch.float32).repeat(40, 1)
    x = kernels.langevin_chain(torch.zeros(n, 2, dtype=torch.float32), network, table, 5, base=1 / s**2).double()
    variance = temperature * s**2 / (1 - eta / (2 * s**2))
    assert (x.var(0) - variance).abs().max() < 5 * variance * (2 / n) ** 0.5
    assert x.mean(0).abs().max() < 5 * (variance / n) ** 0.5


# ---- the kernel


@needs_triton
@given(H=st.sampled_from([16, 32, 64]), **sizes)
@settings(max_examples=15)
def test_kernel_langevin_equals_the_reference(H, N, D, L, C, S, seed, first, labels, clip, bound, base):
    """a transposed W; slopes of another layer; cos without its sign; the mask of the classes; clip; bound"""
    arguments, y = problem(N, D, min(8, 16 - D), H, L, C, S, labels=labels)
    options = dict(y=y, first=first, base=base, clip=clip, bound=bound)
    truth = exact(arguments, seed, **options)
    close(interpreted(arguments, seed, precision=torch.float32, **options), truth, 1e-5)
    close(interpreted(arguments, seed, **options), truth, 1e-2)


@needs_triton
def test_kernel_langevin_that_reads_its_weights_again_is_the_same():    # RELOAD
    arguments, y = problem(70, C=3, labels="all")
    assert torch.equal(interpreted(arguments, 1, y, reload=True), interpreted(arguments, 1, y, reload=False))


@needs_triton
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_kernel_langevin_cut_in_two_equals_the_whole(path, monkeypatch):          # `first` ignored
    monkeypatch.setenv("KERNELS", path)
    (x, network, table), _ = problem(33, S=5)
    x, network, table = x.to(DEVICE), [w.to(DEVICE) for w in network], table.to(DEVICE)
    whole = kernels.langevin_chain(x, network, table, 2**40 + 3, first=10)
    half = kernels.langevin_chain(x, network, table[:2], 2**40 + 3, first=10)
    assert torch.equal(kernels.langevin_chain(half, network, table[2:], 2**40 + 3, first=12), whole)
    assert not torch.equal(kernels.langevin_chain(x, network, table, 3, first=10), whole)


@needs_triton
@given(shape=st.sampled_from([(1,), (3, 5), (2, 3, 7, 5), (1031,)]), clip=st.sampled_from([None, 0.5]), bound=st.sampled_from([None, 0.8]),
       seed=seeds, step=st.integers(0, 1000), noisy=st.booleans(), half=st.booleans())
@settings(max_examples=15)
def test_kernel_langevin_step_equals_the_reference(shape, clip, bound, seed, step, noisy, half):
    """the sign of A; clip of x; clamp before the noise; a lost tail"""
    g = torch.Generator().manual_seed(step)
    x, slope = (torch.randn(shape, generator=g, dtype=torch.float32) for _ in range(2))
    rest = 0.3, 0.4 if noisy else 0.0, seed, step, clip, bound
    truth = langevin.langevin_step_reference(x.double(), slope.double(), *rest)
    close(kernels.langevin_step(x, slope, *rest), truth, 2e-6)
    on = x.to(DEVICE), slope.to(DEVICE)
    close(langevin._step_triton(*on, *rest).cpu(), truth, 2e-6)
    if half:
        found = langevin._step_triton(*[t.half() for t in on], *rest)
        assert found.dtype == torch.float16
        close(found.cpu(), truth, 3e-3)


@needs_triton
def test_kernel_langevin_writes_all_of_its_output_and_no_more(monkeypatch):       # a mask too small or too large
    arguments, _ = problem(67, D=3, H=16 if not GPU else 64, S=1)
    x = torch.zeros(1031, dtype=torch.float32, device=DEVICE)
    guarded = torch.full((1031 + 64,), math.nan, dtype=torch.float32, device=DEVICE)
    monkeypatch.setattr(torch, "empty_like", lambda t: guarded[: t.numel()].view(t.shape))
    langevin._step_triton(x, x, 1.0, 1.0, 1, 1, None, None)
    assert guarded[:1031].isfinite().all() and guarded[1031:].isnan().all()
    guarded.fill_(math.nan)
    interpreted(arguments, 1)
    assert guarded[:201].isfinite().all() and guarded[201:].isnan().all()


@needs_triton
def test_kernel_langevin_dispatch_follows_the_environment(monkeypatch):           # a limit of the kernel
    calls = []
    monkeypatch.setattr(langevin, "_chain_triton", lambda x, *rest: calls.append("triton") or x)
    monkeypatch.setattr(langevin, "_chain_torch", lambda x, *rest: calls.append("torch") or x)
    run = lambda **sizes: kernels.langevin_chain(*[t.to(DEVICE) if torch.is_tensor(t) else [w.to(DEVICE) for w in t]
                                                   for t in problem(3, S=1, **sizes)[0]], 1)
    for choice, name in (("auto", "triton" if GPU else "torch"), ("torch", "torch"), ("triton", "triton")):
        monkeypatch.setenv("KERNELS", choice)
        run()
        assert calls.pop() == name
    monkeypatch.setenv("KERNELS", "triton")
    for odd, words in ((dict(H=48), "H = 48"), (dict(D=5), "D = 5"), (dict(E=15), "E = 15"), (dict(C=17), "C = 17"), (dict(L=5), "L = 5")):
        with pytest.raises(RuntimeError, match=words):
            run(**odd)
    run(E=14, C=16, L=4)
    assert calls.pop() == "triton"


def test_kernel_langevin_errors_say_what_was_wanted():
    (x, network, table), _ = problem(3, H=16, C=3)
    with pytest.raises(RuntimeError, match="no gradient"):
        kernels.langevin_chain(x, [*network[:7], network[7].clone().requires_grad_()], table, 1)
    with pytest.raises(ValueError, match=r"w_in must be \(16, 10\)"):
        kernels.langevin_chain(x, [*network[:2], torch.zeros(16, 9), *network[3:]], table, 1)
    with pytest.raises(ValueError, match="coefficients must be"):
        kernels.langevin_chain(x, network, table[:, :1], 1)
    with pytest.raises(ValueError, match="network of frequencies, phases"):
        kernels.langevin_chain(x, network[:7], table, 1)
    for y in (torch.tensor([0, 1, 3]), torch.tensor([0, 1, -2])):
        with pytest.raises(ValueError, match="classes are 0 .. 2"):
            kernels.langevin_chain(x, network, table, 1, y)
    with pytest.raises(ValueError, match="one shape"):
        kernels.langevin_step(x, x[0], 1, 1, 1, 1)


def has_compiler():
    found = triton and pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    return bool(found) and found.exists()


@pytest.mark.skipif(not has_compiler(), reason="Triton, or its nvdisasm, is not here")
def test_kernel_langevin_machine_code_spills_nothing_in_its_loop():     # a tile of 128 rows on four warps
    keep = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KERNELS")}
    done = subprocess.run([sys.executable, "-m", "kernels.compile", "--targets", "sm_90", "--only", "langevin"], cwd=ROOT, env=keep,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "langevin 128" in done.stdout and " 0 over a limit" in done.stdout


# ---- a GPU, where there is one


@needs_gpu
@pytest.mark.parametrize("C, labels", [(1, "none"), (10, "none"), (10, "some")])
@pytest.mark.parametrize("H", [64, 128])
def test_kernel_langevin_on_the_gpu_equals_the_reference(H, C, labels):
    arguments, y = problem(1000, E=12, H=H, C=C, S=30, labels=labels)
    options = dict(y=y, base=0.3, clip=2.0, bound=2.0)
    truth = exact(arguments, 5, **options)
    for fast in (False, True):
        assert (interpreted(arguments, 5, fast=fast, **options) - truth).abs().quantile(0.99) < 2e-2


def test_kernel_langevin_takes_fewer_rows_where_tensor_memory_is_short():         # 64 rows at width 128 on Blackwell
    rows = lambda H, blackwell: langevin.langevin_config(H, 2, 232_448, False, blackwell)["BN"]
    assert (rows(128, True), rows(128, False), rows(64, True)) == (32, 64, 64)
