"""Properties of the kernels. Each was seen to fail with the guarded line broken (the comment says which).

Without a GPU the kernels run in Triton's interpreter. The public functions take the PyTorch path on a CPU unless a test
sets KERNELS; `interpreted` below is the launcher itself.
"""

import importlib.util
import math
import os
import pathlib
import subprocess
import sys
import types

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import _runtime, diffusion, rng
from kernels._runtime import INTERPRET, tl, triton

ROOT = pathlib.Path(__file__).parents[1]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Triton 3.6 interprets a run-time range with NumPy below 2.4 only (triton#9171); compiled, it has no such limit
OLD = triton is not None and triton.__version__.startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
needs_triton = pytest.mark.skipif(triton is None or not (GPU or INTERPRET and not OLD), reason="no Triton to run or interpret")
needs_gpu = pytest.mark.skipif(not GPU or triton is None, reason="no GPU")
seeds = st.integers(0, 2**64 - 1)


def problem(N, D, H, L, S, seed=0, device="cpu"):
    """Arguments of sample_chain before the seed, float32, of the size a trained network has."""
    g = torch.Generator().manual_seed(1000 * seed + 100 * D + S)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float32)
    table = torch.stack([0.9 + 0.1 * rand(S).tanh(), 0.3 * rand(S), 0.5 * rand(S).abs()], 1)
    arguments = rand(N, D), rand(H, D), rand(L, H, H) / H**0.5, rand(D, H) / H**0.5, rand(D), rand(S, L + 1, H), table
    return tuple(t.to(device) for t in arguments)


def exact(arguments, *rest, **options):
    return diffusion.sample_chain_reference(*(t.double() for t in arguments), *rest, **options)


def interpreted(arguments, seed, first=0, noise="philox", **options):
    return diffusion._chain_triton(*(t.to(DEVICE) for t in arguments), seed, first, noise, **options).cpu()


def close(a, b, tolerance):
    error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1)
    assert error <= tolerance, f"{error:.2e} > {tolerance:.0e}"         # a NaN fails too


# ---- noise

PUBLISHED = [                                                           # Random123, kat_vectors: counter, key, words
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("counter, key, words", PUBLISHED)
def test_kernel_noise_words_are_the_published_ones(counter, key, words):  # 9 rounds, or M0 and M1 swapped
    found = rng.philox([torch.tensor([c]) for c in counter], key[0] | key[1] << 32)
    assert " ".join(f"{w.item():08x}" for w in found) == words


if triton is not None:

    @triton.jit
    def words_kernel(counter_ptr, words_ptr, normal_ptr, k0, k1, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        c0, c1 = tl.load(counter_ptr + i).to(tl.uint32), tl.load(counter_ptr + n + i).to(tl.uint32)
        c2, c3 = tl.load(counter_ptr + 2 * n + i).to(tl.uint32), tl.load(counter_ptr + 3 * n + i).to(tl.uint32)
        w0, w1, w2, w3 = rng.philox_words(k0, k1, c0, c1, c2, c3)
        tl.store(words_ptr + i, w0.to(tl.int64))
        tl.store(words_ptr + n + i, w1.to(tl.int64))
        tl.store(words_ptr + 2 * n + i, w2.to(tl.int64))
        tl.store(words_ptr + 3 * n + i, w3.to(tl.int64))
        z0, z1, z2, z3 = rng.philox_normal4(k0, k1, c0, c1, c2, c3)
        tl.store(normal_ptr + i, z0)
        tl.store(normal_ptr + n + i, z1)
        tl.store(normal_ptr + 2 * n + i, z2)
        tl.store(normal_ptr + 3 * n + i, z3)


@needs_triton
@given(seeds)
@settings(max_examples=5)
def test_kernel_noise_twin_has_the_same_bits_and_the_same_normals(seed):  # the sign of r; a constant of sin
    n = 512
    counter = torch.randint(0, 2**32, (4, n), generator=torch.Generator().manual_seed(seed % 2**32), device="cpu")
    counter[:, 0], counter[:, 1] = 0, 2**32 - 1
    words, normals = torch.full((4, n), -1), torch.full((4, n), math.nan, dtype=torch.float32)
    c, words, normals = counter.to(DEVICE), words.to(DEVICE), normals.to(DEVICE)
    words_kernel[(1,)](c, words, normals, _runtime.int32(seed), _runtime.int32(seed >> 32), n, BLOCK=n)
    twin = rng.philox(counter, seed)
    assert torch.equal(words.cpu(), torch.stack(twin))
    z = torch.stack(rng.box_muller(*twin[:2]) + rng.box_muller(*twin[2:]))
    torch.testing.assert_close(normals.cpu(), z, atol=1e-6, rtol=1e-6)


def test_kernel_noise_is_box_muller_of_the_words():  # 2^-32 for 2^-31 in the angle: every angle halved
    w = [torch.randint(0, 2**32, (1000,), generator=torch.Generator().manual_seed(k)) for k in range(2)]
    r, angle = (-2 * ((w[0] + 0.5) / 2**32).log()).sqrt(), 2 * math.pi * w[1].double() / 2**32 - math.pi / 2
    z = rng.box_muller(w[0].clone(), w[1].clone())
    torch.testing.assert_close(z[0].double(), r * angle.cos(), atol=2e-6, rtol=0)
    torch.testing.assert_close(z[1].double(), r * angle.sin(), atol=2e-6, rtol=0)


def test_kernel_noise_is_normal_and_independent():  # the same word for both of a pair; steps sharing a counter
    n = 100_000
    rows, steps = torch.arange(n), torch.arange(3)
    z = torch.cat([rng.normal_block(rows, 6, steps, 11),
                   rng.normal_block(rows, 6, steps[:1], 11, rng.STEP),
                   rng.normal_block(rows, 6, steps[:1], 11 + 2**32)]).double()               # 5 x n x 6: 30 columns
    z = z.permute(1, 0, 2).reshape(n, 30)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert ((z**power).mean(0) - moment).abs().max() < 5 * (variance / n) ** 0.5
    for f in (lambda v: v, torch.square):                               # squares see a radius shared within a pair
        correlation = torch.corrcoef(f(z).T) - torch.eye(30)
        assert correlation.abs().max() < 5.5 / n**0.5                   # 435 pairs
        lagged = (f(z)[1:] * f(z)[:-1]).mean(0) - f(z).mean(0) ** 2     # neighbouring rows
        assert lagged.abs().max() < 5 * (1 if f(z).min() < 0 else 3) / n**0.5
    cdf = torch.special.ndtr(z.flatten().sort()[0])                     # Kolmogorov-Smirnov, p = 1e-6 at 2.69
    assert (cdf - (torch.arange(30 * n) + 0.5) / (30 * n)).abs().max() < 2.7 / (30 * n) ** 0.5
    tail = (z.abs() > 4).sum().item()                                   # Poisson about 190
    assert abs(tail - 30 * n * 6.334e-5) < 5 * (30 * n * 6.334e-5) ** 0.5
    assert 4.7 < z.abs().max() < 6.8


def test_kernel_noise_depends_on_the_position_alone():                  # the block's own index as the row
    whole = rng.normal_block(torch.arange(40), 7, torch.arange(5), 3)
    part = rng.normal_block(torch.arange(13, 20), 3, torch.arange(2, 4), 3)
    assert torch.equal(part, whole[2:4, 13:20, :3])
    assert torch.equal(rng.normal(40, 7, 3, step=4), whole[4])


# ---- the chain: definition, CPU path, kernel


def test_kernel_chain_reference_is_the_network_written_with_nn():       # the residual; the bias; the order of A, B, C
    N, D, H, L, S = 9, 3, 16, 2, 4
    x, w_in, w_hidden, w_out, b_out, biases, table = (t.double() for t in problem(N, D, H, L, S))
    y = x
    for s in range(S):
        h = F.silu(F.linear(y, w_in, biases[s, 0]))
        for l in range(L):
            h = h + F.silu(F.linear(h, w_hidden[l], biases[s, l + 1]))
        z = rng.normal(N, D, 5, 2 + s).double()
        y = table[s, 0] * y + table[s, 1] * F.linear(h, w_out, b_out) + table[s, 2] * z
    found = diffusion.sample_chain_reference(x, w_in, w_hidden, w_out, b_out, biases, table, 5, first=2)
    torch.testing.assert_close(found, y)


sizes = dict(N=st.sampled_from([1, 17, 63, 130]), D=st.sampled_from([1, 2, 3, 5, 16]), L=st.integers(0, 3),
             S=st.integers(1, 4), seed=seeds, first=st.integers(0, 2**33))


@given(H=st.sampled_from([16, 40, 64, 256]), **sizes)
@settings(max_examples=15)
def test_kernel_chain_on_the_cpu_equals_the_reference(N, D, H, L, S, seed, first):           # a tile's row number
    arguments = problem(N, D, H, L, S)
    y = kernels.sample_chain(*arguments, seed, first)
    assert y.dtype == torch.float32 and y.shape == (N, D)
    close(y, exact(arguments, seed, first), 3e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_kernel_chain_on_the_cpu_joins_its_tiles(threads, monkeypatch):  # a tile's rows
    before = torch.get_num_threads()
    arguments = problem(2 * 4096 + 77, 2, 32, 1, 11)                   # two blocks of noise a tile
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    y = kernels.sample_chain(*arguments, 3)
    monkeypatch.undo()
    torch.set_num_threads(before)
    close(y, exact(arguments, 3), 3e-6)


def test_kernel_chain_leaves_its_surroundings_alone(monkeypatch):       # the count of threads not put back
    arguments = problem(9000, 2, 64, 1, 2)
    copies, calls = [t.clone() for t in arguments], []
    before, change = torch.get_num_threads(), torch.set_num_threads
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: calls.append(n) or change(n))
    y = kernels.sample_chain(*arguments, 3)
    monkeypatch.undo()
    torch.set_num_threads(before)
    assert calls[-1] == 2 and set(calls[:-1]) == {1}
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies))
    (y * torch.ones(2, requires_grad=True, dtype=torch.float32)).sum().backward()            # not an inference tensor


@needs_triton
@given(H=st.sampled_from([16, 32, 64]), **sizes)
@settings(max_examples=12)
def test_kernel_chain_equals_the_reference(N, D, H, L, S, seed, first):  # x_lo with w_lo; a transposed W
    arguments = problem(N, D, H, L, S)
    truth = exact(arguments, seed, first)
    close(interpreted(arguments, seed, first, precision=torch.float32), truth, 3e-6)
    close(interpreted(arguments, seed, first), truth, 2e-3)


@needs_triton
def test_kernel_chain_splits_the_first_layer_in_two_parts():            # drop the product with x_lo, or that with w_lo
    x, w_in, *rest, biases, table = problem(40, 2, 64, 0, 1)
    w_in[:, 1] = w_in[:, 1] / 100 - w_in[:, 0]                          # large numbers that cancel: fp16 alone rounds
    table[:] = torch.tensor([0.0, 1.0, 0.0])                            # x by 0.03
    arguments = x + 100, w_in, *rest, biases, table
    close(interpreted(arguments, 1), exact(arguments, 1), 1e-3)


@needs_triton
def test_kernel_chain_that_reads_its_weights_again_is_the_same():       # RELOAD
    arguments = problem(70, 2, 64, 2, 3)
    assert torch.equal(interpreted(arguments, 1, reload=True), interpreted(arguments, 1, reload=False))


@needs_triton
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_kernel_chain_cut_in_two_equals_the_whole(path, monkeypatch):   # `first` ignored
    monkeypatch.setenv("KERNELS", path)
    arguments = problem(33, 2, 64, 1, 5, device=DEVICE)
    whole = kernels.sample_chain(*arguments, 2**40 + 3, first=10)
    x, *network, biases, table = arguments
    half = kernels.sample_chain(x, *network, biases[:2], table[:2], 2**40 + 3, first=10)
    assert torch.equal(kernels.sample_chain(half, *network, biases[2:], table[2:], 2**40 + 3, first=12), whole)
    assert not torch.equal(kernels.sample_chain(*arguments, 3, first=10), whole)  # the seed's upper half counts


@needs_triton
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_kernel_chain_without_noise_is_deterministic(path, monkeypatch):
    monkeypatch.setenv("KERNELS", path)
    arguments = problem(20, 2, 64, 1, 3, device=DEVICE)
    y = kernels.sample_chain(*arguments, 1, noise="none")
    assert torch.equal(y, kernels.sample_chain(*arguments, 2, noise="none"))
    close(y.cpu(), exact([t.cpu() for t in arguments], 1, noise="none"), 3e-6 if path == "torch" else 2e-3)


def test_kernel_chain_generates_no_noise_where_none_is_used(monkeypatch):
    arguments = problem(20, 2, 16, 1, 3)
    arguments[-1][:, 2] = 0
    monkeypatch.setattr(rng, "normal_block", None)
    assert kernels.sample_chain(*arguments, 1).isfinite().all()


@needs_triton
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_kernel_chain_with_a_zero_network_is_the_exact_autoregression(path, monkeypatch):  # sqrt of C; noise reused
    monkeypatch.setenv("KERNELS", path)
    N, S = (20_000, 6) if path == "torch" or GPU else (2_000, 4)
    x, *network, table = problem(N, 2, 16 if not GPU else 64, 0, S, device=DEVICE)
    x = torch.ones_like(x)
    y = kernels.sample_chain(x, *(torch.zeros_like(t) for t in network), table, 8).double().cpu()
    A, C = table[:, 0].double().cpu(), table[:, 2].double().cpu()
    mean, variance = A.prod(), sum((A[s + 1 :].prod() * C[s]) ** 2 for s in range(S))
    assert ((y.mean(0) - mean).abs() < 5 * (variance / N).sqrt()).all()
    assert ((y.var(0) - variance).abs() < 5 * variance * (2 / N) ** 0.5).all()


# ---- the image update


@needs_triton
@given(shape=st.sampled_from([(1,), (3, 5), (2, 3, 7, 5), (1031,)]), clip=st.sampled_from([None, 0.5]), seed=seeds,
       step=st.integers(0, 1000), noisy=st.booleans(), half=st.booleans())
@settings(max_examples=12)
def test_kernel_step_equals_the_reference(shape, clip, seed, step, noisy, half):  # clamp after the update; a lost tail
    g = torch.Generator().manual_seed(step)
    x, out = (torch.randn(shape, generator=g, dtype=torch.float32) for _ in range(2))
    coefficients = (1.1, -0.4, 0.8, 0.3, 0.2 if noisy else 0.0)
    truth = diffusion.diffusion_step_reference(x.double(), out.double(), coefficients, seed, step, clip)
    close(kernels.diffusion_step(x, out, coefficients, seed, step, clip), truth, 2e-6)
    on = x.to(DEVICE), out.to(DEVICE)
    close(diffusion._step_triton(*on, coefficients, seed, step, clip).cpu(), truth, 2e-6)
    if half:
        on = [t.half() for t in on]
        y = diffusion._step_triton(*on, coefficients, seed, step, clip)
        assert y.dtype == torch.float16
        close(y.cpu(), truth, 3e-3)


def test_kernel_step_in_blocks_is_the_definition():                     # the first group of the second block
    x, out = torch.randn(2, 70_001, dtype=torch.float32), torch.randn(2, 70_001, dtype=torch.float32)
    coefficients = (1.0, 0.2, 0.5, 0.5, 1.0)
    y = kernels.diffusion_step(x, out, coefficients, 3, 9)
    close(y, diffusion.diffusion_step_reference(x.double(), out.double(), coefficients, 3, 9), 2e-6)
    view = kernels.diffusion_step(x.T, out.T, coefficients, 3, 9)       # noise follows the logical order
    close(view, diffusion.diffusion_step_reference(x.T.double(), out.T.double(), coefficients, 3, 9), 2e-6)


@needs_triton
def test_kernel_writes_all_of_its_output_and_no_more(monkeypatch):      # a mask too small or too large
    poison = lambda t: torch.full(t.shape, math.nan, dtype=t.dtype, device=t.device)
    monkeypatch.setattr(torch, "empty_like", poison)
    x = out = torch.zeros(1031, dtype=torch.float32, device=DEVICE)
    assert diffusion._step_triton(x, out, (1, 1, 1, 1, 1), 1, 1, None).isfinite().all()
    assert interpreted(problem(67, 3, 16 if not GPU else 64, 1, 1), 1).isfinite().all()
    guarded = torch.full((1031 + 64,), math.nan, dtype=torch.float32, device=DEVICE)
    monkeypatch.setattr(torch, "empty_like", lambda t: guarded[: t.numel()].view(t.shape))
    diffusion._step_triton(x, out, (1, 1, 1, 1, 1), 1, 1, None)
    assert guarded[:1031].isfinite().all() and guarded[1031:].isnan().all()


# ---- dispatch and errors


@needs_triton
def test_kernel_dispatch_follows_the_environment(monkeypatch):
    calls = []
    monkeypatch.setattr(diffusion, "_chain_triton", lambda x, *rest: calls.append("triton") or x)
    monkeypatch.setattr(diffusion, "_chain_torch", lambda x, *rest: calls.append("torch") or x)
    arguments, odd = problem(3, 2, 64, 1, 1, device=DEVICE), problem(3, 2, 48, 1, 1, device=DEVICE)
    for choice, name in (("auto", "triton" if GPU else "torch"), ("torch", "torch"), ("triton", "triton")):
        monkeypatch.setenv("KERNELS", choice)
        assert kernels.backend(arguments[0]) == name
        kernels.sample_chain(*arguments, 1)
        assert calls.pop() == name
    with pytest.raises(RuntimeError, match="H = 48"):
        kernels.sample_chain(*odd, 1)
    monkeypatch.setenv("KERNELS", "auto")
    kernels.sample_chain(*odd, 1)
    assert calls.pop() == "torch"
    monkeypatch.setenv("KERNELS", "cuda")
    with pytest.raises(ValueError, match="KERNELS=cuda: it is torch, triton or auto"):
        kernels.backend(arguments[0])


@needs_triton
def test_kernel_choice_on_a_gpu(monkeypatch):                           # a reason, or KERNELS=torch, ignored
    gpu = types.SimpleNamespace(device=torch.device("cuda"))            # no GPU is needed to ask
    monkeypatch.setattr(_runtime, "INTERPRET", False)
    for choice, why_not, name in (("auto", "", "triton"), ("auto", "odd", "torch"), ("torch", "", "torch"),
                                  ("triton", "", "triton")):
        monkeypatch.setenv("KERNELS", choice)
        assert kernels.backend(gpu, why_not) == name
    with pytest.raises(RuntimeError, match="cannot run: odd"):
        kernels.backend(gpu, "odd")
    monkeypatch.setattr(_runtime, "INTERPRET", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        kernels.backend(gpu)


def test_kernel_errors_say_what_was_wanted():
    arguments = list(problem(3, 2, 16, 1, 2))
    with pytest.raises(RuntimeError, match="no gradient"):
        kernels.sample_chain(arguments[0], arguments[1].requires_grad_(), *arguments[2:], 1)
    with torch.no_grad():
        kernels.sample_chain(*arguments, 1)
    arguments[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"w_out must be \(2, 16\)"):
        kernels.sample_chain(*arguments[:3], arguments[3].T, *arguments[4:], 1)
    with pytest.raises(ValueError, match="noise='gauss'"):
        kernels.sample_chain(*arguments, 1, noise="gauss")
    with pytest.raises(ValueError, match="one shape"):
        kernels.diffusion_step(arguments[0], arguments[1], (1, 1, 1, 1, 1), 1, 1)
    with pytest.raises(AttributeError, match="it has"):
        kernels.nothing  # noqa: B018


def alone(code, **environment):
    keep = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KERNELS")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=keep | environment, capture_output=True, text=True)


def test_kernel_package_imports_lazily_and_without_triton():
    code = ("import sys, kernels; assert 'triton' not in sys.modules and 'torch' not in sys.modules\n"
            "class Gone:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name.partition('.')[0] == 'triton': raise ModuleNotFoundError(name, name=WHICH)\n"
            "sys.meta_path.insert(0, Gone())\n"
            "import torch; x = torch.zeros(2, 1); z = torch.zeros\n"
            "y = kernels.sample_chain(x, z(8, 1), z(0, 8, 8), z(1, 8), z(1), z(1, 1, 8), z(1, 3), 0)\n"
            "assert kernels.backend(x) == 'torch'; print(y.shape)")
    gone = alone(code.replace("WHICH", "'triton'"))
    assert gone.returncode == 0, gone.stderr
    broken = alone(code.replace("WHICH", "'libtriton'"))                # there, but with a part missing: must be heard
    assert broken.returncode == 1 and "ModuleNotFoundError" in broken.stderr
    forced = alone(code.replace("WHICH", "'triton'"), KERNELS="triton")
    assert "Triton is not installed" in forced.stderr


def has_compiler():
    found = importlib.util.find_spec("triton")
    return bool(found) and (pathlib.Path(found.origin).parent / "backends/nvidia/bin/nvdisasm").exists()


@pytest.mark.skipif(not has_compiler(), reason="Triton, or its nvdisasm, is not here")
def test_kernel_machine_code_is_within_limits_and_budget():             # BN = 128 on four warps; a budget lowered
    done = subprocess.run([sys.executable, "-m", "kernels.compile", "--only", "chain", "--targets", "sm_90", "gfx942"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "chain 128" in done.stdout and " 0 over a limit" in done.stdout


def test_kernel_gate_sees_what_is_too_large():                          # each limit of `faults`
    code = ("from kernels.compile import faults, SLACK, LIMITS\n"
            "good = dict.fromkeys((*SLACK, 'loop'), 0) | dict(registers=200, loop=900, instructions=1000)\n"
            "assert not list(faults('chain', 'sm_90', good, good))\n"
            "over = dict(registers=256, shared=232449, tensor=1, in_loop=1, instructions=16, loop=0)\n"
            "for key, value in over.items():\n"
            "    assert list(faults('chain', 'sm_90', good | {key: value}, None)), key\n"
            "for key in SLACK:\n"
            "    assert list(faults('chain', 'sm_100', good | {key: good[key] + SLACK[key] + 1}, good)), key\n")
    done = alone(code)
    assert done.returncode == 0, done.stderr


# ---- a GPU, where there is one


@needs_gpu
@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("D", [2, 16])
def test_kernel_on_the_gpu_equals_the_reference(H, D):
    arguments = problem(1000, D, H, 3, 50)
    truth = exact(arguments, 5)
    scale = truth.abs().max()
    for options, tolerance in ((dict(fast=False), 5e-3), (dict(fast=True), 1e-2), (dict(fast=True, reload=True), 1e-2)):
        assert (interpreted(arguments, 5, **options) - truth).abs().max() < tolerance * scale
    fp32 = problem(100, D, 64, 1, 5)
    close(interpreted(fp32, 5, precision=torch.float32, fast=False), exact(fp32, 5), 1e-5)


@needs_gpu
def test_kernel_on_the_gpu_repeats_to_the_bit():                        # a race would show
    arguments = problem(5000, 2, 128, 3, 100, device="cuda")
    first = kernels.sample_chain(*arguments, 5)
    assert all(torch.equal(kernels.sample_chain(*arguments, 5), first) for _ in range(20))


@needs_gpu
def test_kernel_on_the_gpu_goes_into_a_cuda_graph():
    arguments = problem(500, 2, 64, 2, 10, device="cuda")
    eager = kernels.sample_chain(*arguments, 5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.sample_chain(*arguments, 5)
    graph.replay()
    assert torch.equal(captured, eager)


@needs_gpu
def test_kernel_on_the_gpu_takes_more_than_two_to_the_31_elements():    # offsets of 32 bits
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GB")
    n = 2**31 + 12
    x = torch.zeros(n, dtype=torch.float16, device="cuda")
    y = kernels.diffusion_step(x, x, (0, 0, 0, 0, 1.0), 1, 1)
    group = torch.arange(n // 4 - 8, n // 4, device="cuda")
    z = rng.normal_block(group, 4, torch.tensor([1], device="cuda"), 1, rng.STEP).flatten()
    torch.testing.assert_close(y[-32:], z.half(), atol=2e-3, rtol=1e-3)
