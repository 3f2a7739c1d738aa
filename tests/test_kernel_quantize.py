"""The nearest code against its definition in float64: the PyTorch path, and the kernel in Triton's interpreter."""

import importlib.util
import math
import pathlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import DEVICE, GPU, ROOT, alone, has_compiler, needs_gpu, needs_triton

import kernels
from kernels import quantize
from kernels.quantize import nearest_code_reference

PATHS = ["torch", pytest.param("triton", marks=needs_triton)]
GENEROUS = 1e30                                                         # a slack with which no row is sure


def draw(N, K, D, seed=0, offset=0.0, scale=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x, codes = (torch.randn(n, D, generator=g, dtype=torch.float64) for n in (N, K))
    return (scale * x + offset).to(dtype), (scale * codes + offset).to(dtype)


def exact(x, codes):
    return nearest_code_reference(x.double(), codes.double())


def find(path, x, codes, **options):
    if path == "torch":
        return quantize._nearest_torch(x, codes)
    return quantize._nearest_triton(x.to(DEVICE), codes.to(DEVICE), **options).cpu()


def halfway(seed=0, N=100, K=40, D=24, shift=3e-8, dtype=torch.float32):
    """Rows halfway between two codes that have no third so near, but for a step of `shift` towards one of them."""
    g = torch.Generator().manual_seed(seed)
    codes = (4 * torch.randn(K, D, generator=g, dtype=torch.float64)).to(dtype)
    pair = torch.rand(N, K, generator=g).argsort(1)[:, :2]
    a, b = codes.double()[pair].unbind(1)
    return ((a + b) / 2 + shift * torch.randn(N, 1, generator=g, dtype=torch.float64) * (a - b)).to(dtype), codes


# ---- the definition


def test_kernel_nearest_reference_is_the_definition():                  # argmax; the sum over codes
    x, codes = draw(5, 7, 3)
    for n, index in enumerate(exact(x, codes).tolist()):
        distances = [math.dist(x[n].tolist(), e.tolist()) for e in codes]
        assert distances[index] == min(distances)


# ---- the index is float64's


sizes = dict(N=st.sampled_from([1, 3, 63, 64, 65, 131, 200]), K=st.sampled_from([1, 2, 31, 64, 65, 130]),
             D=st.sampled_from([1, 2, 7, 16, 33, 64, 70]), seed=st.integers(0, 2**32))


@pytest.mark.parametrize("path", PATHS)
@given(offset=st.sampled_from([0.0, 100.0]), scale=st.sampled_from([1.0, 1e-6, 1e9]), **sizes)
@settings(max_examples=12)
def test_kernel_nearest_is_the_argmin_of_float64(path, N, K, D, seed, offset, scale):  # "+ half"; a mask short by one; start + 1
    x, codes = draw(N, K, D, seed, offset, scale)
    index = find(path, x, codes)
    assert index.dtype == torch.int64 and index.shape == (N,)
    assert torch.equal(index, exact(x, codes))


@pytest.mark.parametrize("path", PATHS)
@given(values=st.sampled_from([1, 2, 5]), **sizes)
@settings(max_examples=12)
def test_kernel_nearest_of_integers_is_exact_and_the_lowest_of_ties(path, values, N, K, D, seed):  # ">=" for ">" in index
    N = N if path == "torch" else min(N, 7)                             # each tie takes milliseconds to interpret
    g = torch.Generator().manual_seed(seed)
    x, codes = (torch.randint(-values, values + 1, (n, D), generator=g).float() for n in (N, K))
    codes[K // 2 :] = codes[: K - K // 2].clone()                       # each twice, in another tile if there is one
    assert torch.equal(find(path, x, codes), exact(x, codes))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shift", [0, 1e-8, 1e-7])
def test_kernel_nearest_between_two_codes(path, shift):                 # slack 0: rounding decides
    x, codes = halfway(N=500 if path == "torch" or GPU else 20, shift=shift)
    truth = exact(x, codes)
    naive = torch.addmm(codes.square().sum(1), x, codes.T, alpha=-2).argmin(1)
    assert (naive != truth).any()                                       # float32 alone is wrong here
    assert torch.equal(find(path, x, codes), truth)


def test_kernel_nearest_in_float64_goes_beyond_its_scores():            # `_measure` left out
    x, codes = halfway(N=1000, shift=1e-15, dtype=torch.float64)
    naive = torch.addmm(codes.square().sum(1), x, codes.T, alpha=-2).argmin(1)
    assert (naive != exact(x, codes)).any()
    assert torch.equal(kernels.nearest_code(x, codes), exact(x, codes))


@pytest.mark.parametrize("path", PATHS)
def test_kernel_nearest_takes_half_precisions_as_they_are(path, monkeypatch):  # a sum in half precision
    monkeypatch.setenv("KERNELS", path)
    for dtype in (torch.float16, torch.bfloat16):
        x, codes = draw(150, 70, 20, dtype=dtype)
        assert torch.equal(kernels.nearest_code(x.to(DEVICE), codes.to(DEVICE)).cpu(), exact(x, codes))
        assert torch.equal(kernels.nearest_code(x.float().to(DEVICE), codes.to(DEVICE)).cpu(), exact(x, codes))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")                   # the interpreter is NumPy
def test_kernel_nearest_with_a_nan_or_an_infinity(path):                # NaN taken for sure; the check for NaN left out
    x, codes = draw(9, 66, 20)
    x[3, 5], x[4, 0], x[5, 19], x[6] = math.nan, math.inf, -math.inf, 1e30
    assert torch.equal(find(path, x, codes), exact(x, codes)) and find(path, x, codes)[3] == 0
    for k in (0, 65):
        broken = codes.clone()
        broken[k, 2] = math.nan
        assert find(path, x, broken)[0] == k
        assert torch.equal(find(path, x, broken), exact(x, broken))
        broken[k, 2] = math.inf
        assert torch.equal(find(path, x, broken), exact(x, broken))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [1e-24, 1e-22, 1e-20])
def test_kernel_nearest_of_what_is_very_small(path, scale):             # `least`, or `tiny`, without what underflows
    x, codes = draw(300 if path == "torch" else 10, 30, 5, scale=scale)
    assert torch.equal(find(path, x, codes), exact(x, codes))
    same = torch.ones(10, 9, dtype=torch.float32)
    assert not find(path, torch.zeros_like(same), same).any()           # all codes equal: the first


@pytest.mark.parametrize("path", PATHS)
def test_kernel_nearest_of_views_and_of_nothing(path, monkeypatch):     # stride_d taken for 1
    monkeypatch.setenv("KERNELS", path)
    x, codes = draw(140, 80, 12)
    for some, of in ((x[::2, ::3], codes[::3, ::3]), (x[:, :9].flip(0), codes[:, 3:]), (x[:12].T[:, :9], codes[:9].T[:, :9]),
                     (x[:1].expand(7, 12), codes), (x[:0], codes), (x[:5], codes[:1])):
        before = some.clone(), of.clone()
        index = kernels.nearest_code(some.to(DEVICE), of.to(DEVICE)).cpu()
        assert torch.equal(index, exact(some, of)) and index.dtype == torch.int64
        assert torch.equal(some, before[0]) and torch.equal(of, before[1])


# ---- its parts


@given(seed=st.integers(0, 2**32), D=st.sampled_from([4, 24, 64, 300]), offset=st.sampled_from([0.0, 30.0]))
@settings(max_examples=20)
def test_kernel_nearest_scores_are_within_their_bound(seed, D, offset):  # slack / 30; R left out of `least`
    x, codes = halfway(seed, N=200, D=D, shift=2e-7 * (D + 16))         # gaps of the bound's size
    x, codes = x + offset, codes + offset
    scores = quantize._Scores(codes)
    s = -(x.double()[:, None] - codes.double()).square().sum(-1) / 2
    length = (x - codes[0]).double().norm(dim=1)
    bound = (D + 16) * 2.0**-23 * scores.radius * (scores.radius + length)
    error = torch.addmm(scores.half, x - codes[0], scores.codes).double() - s
    spread = error.amax(1) - error.amin(1)
    assert (spread <= bound).all()
    gap, near = s.amax(1, keepdim=True) - s, scores.near(x).bool()
    assert near[gap <= 0.99 * (bound - spread)[:, None]].all()
    assert not near[gap > 1.01 * (bound + spread)[:, None]].any()
    assert 1.05 < near.sum(1).double().mean() < 1.95 or D == 4          # both cases are there


def test_kernel_nearest_measures_few_rows_again(monkeypatch):           # slack * 100; an offset left in the scores
    calls, measure = [], quantize._measure
    monkeypatch.setattr(quantize, "_measure", lambda x, *rest: calls.append(len(x)) or measure(x, *rest))
    for offset in (0, 100):
        x, codes = draw(20_000, 300, 64, offset=offset)
        quantize._nearest_torch(x, codes)
        assert 0 < sum(calls) < (60 if offset == 0 else 200)
        calls.clear()


@needs_triton
@given(**sizes)
@settings(max_examples=10)
def test_kernel_nearest_finds_by_either_of_its_loops(N, K, D, seed):    # in `measured_again`: a wrong tile; -1.0 for NaN
    x, codes = draw(N, K, D, seed)
    assert torch.equal(find("triton", x[-5:], codes, slack=GENEROUS), exact(x[-5:], codes))
    whole = (4 * x).round(), (4 * codes).round()
    assert torch.equal(find("triton", *whole, slack=-1.0), exact(*whole))  # float32 scores alone: lowest of ties


@needs_triton
def test_kernel_nearest_measures_again_within_the_bound_only(monkeypatch):  # `square =` for "+="; `second` too large or small
    N, K, D, slack = 70, 34, 40, 144 * 2.0**-23
    x, codes = halfway(N=N, K=K, D=D, shift=8e-5)
    other = torch.cat([codes[:1], codes[1:].flip(0)])                   # what is measured again is found among these
    on, e, half = codes.to(DEVICE), torch.empty_like(codes).to(DEVICE), torch.empty(K, dtype=torch.float32, device=DEVICE)
    quantize.centre_kernel[(2,)](on, e, half, K, D=D, BK=32, BD=16)
    torch.testing.assert_close(e.cpu(), codes - codes[0])
    torch.testing.assert_close(half.cpu(), (codes - codes[0]).square().sum(1) / 2)
    index = torch.full((N,), -1, device=DEVICE)
    quantize.nearest_kernel[(2,)](x.to(DEVICE), other.to(DEVICE), e, half, index, N, K, D, 1, slack, 0.0, D=D,
                                  **quantize.nearest_config(D, 8, False))
    best, second = (-(x.double()[:, None] - codes.double()).square().sum(-1) / 2).topk(2, 1)[0].unbind(1)
    radius = (2 * half.max().cpu()).sqrt()
    gap = (best - second) / (slack * radius * (radius + (x - codes[0]).norm(dim=1)))
    again = index.cpu() == torch.where((truth := exact(x, codes)) > 0, K - truth, 0)
    kept, clear = index.cpu() == truth, (truth > 0) & (truth != K - truth)
    assert again[clear & (gap < 0.9)].all() and kept[clear & (gap > 1.1)].all()
    assert (gap < 0.9).sum() > 10 and (gap > 1.1).sum() > 10

    class Spy:
        def __getitem__(self, grid):
            return lambda *arguments, **rest: seen.append(arguments)

    seen = []
    monkeypatch.setattr(quantize, "nearest_kernel", Spy())
    find("triton", x, codes)
    assert seen[0][9] == slack                                          # (2 D + 64) eps


@needs_triton
def test_kernel_nearest_writes_all_of_its_output_and_no_more(monkeypatch):  # the last mask left out
    x, codes = draw(131, 70, 9)
    guarded = torch.full((131 + 300,), -7, device=DEVICE)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, shape, **k: guarded[:131] if shape == 131 else empty(t, shape, **k))
    assert torch.equal(find("triton", x, codes), exact(x, codes))
    assert (guarded[131:] == -7).all()


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_kernel_nearest_in_tiles_is_the_whole(rows, monkeypatch):       # a tile's rows; the chunks of `unsure`
    x, codes = halfway(N=131)
    monkeypatch.setattr(quantize, "max", lambda a, b: rows if a == 64 else 7, raising=False)
    assert torch.equal(quantize._nearest_torch(x, codes), exact(x, codes))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_kernel_nearest_shares_its_tiles_among_threads(threads, monkeypatch):  # a queue for each thread; the count not put back
    x, codes = draw(5000, 300, 20)
    x[::50] = codes[torch.arange(100) % 300] / 2 + codes[torch.arange(100) % 299 + 1] / 2
    before, seen, near = torch.get_num_threads(), [], quantize._Scores.near
    torch.set_num_threads(threads)
    try:
        monkeypatch.setattr(quantize._Scores, "near", lambda *a: seen.append(torch.get_num_threads()) or near(*a))
        assert torch.equal(kernels.nearest_code(x, codes), exact(x, codes))
        assert torch.get_num_threads() == threads and set(seen) == {1} and 12 <= len(seen) <= 14
        assert not kernels.nearest_code(x, codes).is_inference()

        def broken(*a):
            raise KeyboardInterrupt

        monkeypatch.setattr(quantize._Scores, "near", broken)
        with pytest.raises(KeyboardInterrupt):
            kernels.nearest_code(x, codes)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


# ---- dispatch and errors


@needs_triton
def test_kernel_nearest_dispatch(monkeypatch):
    calls = []
    for name in ("triton", "torch"):
        monkeypatch.setattr(quantize, f"_nearest_{name}", lambda x, codes, name=name: calls.append(name))
    x, codes = (t.to(DEVICE) for t in draw(3, 2, 4))
    for choice, name in (("auto", "triton" if GPU else "torch"), ("torch", "torch"), ("triton", "triton")):
        monkeypatch.setenv("KERNELS", choice)
        kernels.nearest_code(x, codes)
        assert calls.pop() == name
    with pytest.raises(RuntimeError, match="float64, and the kernel takes float32"):
        kernels.nearest_code(x, codes.double())
    monkeypatch.delenv("KERNELS")
    kernels.nearest_code(x.double(), codes)
    assert calls.pop() == "torch"


def test_kernel_nearest_needs_no_gradient():
    x, codes = draw(3, 2, 4)
    index = kernels.nearest_code(x.requires_grad_(), torch.nn.Parameter(codes))
    assert not index.requires_grad
    with torch.autocast("cpu"), torch.inference_mode():
        assert torch.equal(kernels.nearest_code(x, codes), index)


@pytest.mark.parametrize("x, codes", [((3,), (2, 3)), ((3, 2), (4, 3)), ((3, 2), (0, 2)), ((3, 0), (2, 0))])
def test_kernel_nearest_errors_say_what_was_wanted(x, codes):
    with pytest.raises(ValueError, match=r"x \(N, D\) and codes \(K, D\) with K, D > 0 are wanted; got"):
        kernels.nearest_code(torch.zeros(x), torch.zeros(codes))
    with pytest.raises(ValueError, match="floating-point; got torch.float64, torch.int64"):
        kernels.nearest_code(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64))


def test_kernel_nearest_without_triton():
    done = alone("import sys; sys.modules['triton'] = None\n"
                 "import torch, kernels; x = torch.eye(3); assert kernels.nearest_code(x, x).tolist() == [0, 1, 2]")
    assert done.returncode == 0, done.stderr


# ---- machine code and clocks


@pytest.mark.skipif(not has_compiler(), reason="Triton, or its nvdisasm, is not here")
def test_kernel_nearest_machine_code_is_within_limits_and_budget():     # BD = 64 before capability 9
    done = subprocess.run([sys.executable, "-m", "kernels.compile", "--targets", "sm_80", "sm_100", "--only",
                           "nearest D64"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 programs, 0 over a limit" in done.stdout
    for line in done.stdout.splitlines():
        if line.startswith("nearest"):
            assert line.split()[5:6] == ["0"], line                     # spilled


def test_kernel_nearest_bench_runs_where_the_rival_is_absent(capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_quantize", pathlib.Path(ROOT, "bench", "quantize.py"))
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(sys, "argv", ["quantize.py", "--rows", "500", "--codes", "20", "--dim", "8", "--repeats", "1"])
    bench.main()
    assert "cdist" in capsys.readouterr().out


def test_kernel_nearest_bench_of_the_kernels():
    from kernels import bench

    torch.set_default_dtype(torch.float32)
    bench.gate_nearest("cpu")
    rows = []
    bench.bench_nearest_cpu(rows, print, N=300, K=20, D=8, repeats=1)
    assert {row[1] for row in rows} >= {"nearest_code", "eager cdist, argmin"}


# ---- a GPU, where there is one


@needs_gpu
@pytest.mark.parametrize("N, K, D", [(1, 1, 1), (1000, 513, 64), (4097, 1000, 256), (300, 70, 33), (65_536, 1024, 64)])
def test_kernel_nearest_on_the_gpu(N, K, D):
    x, codes = (t.cuda() for t in draw(N, K, D))
    found = kernels.nearest_code(x, codes)
    assert torch.equal(found.cpu(), quantize._nearest_torch(x.double(), codes.double()).cpu())
    assert all(torch.equal(kernels.nearest_code(x, codes), found) for _ in range(10))       # a race would show
    x, codes = (t.cuda() for t in halfway(D=D))
    assert torch.equal(kernels.nearest_code(x, codes).cpu(), exact(x.cpu(), codes.cpu()))


@needs_gpu
def test_kernel_nearest_on_the_gpu_goes_into_a_cuda_graph():
    x, codes = (t.cuda() for t in draw(1000, 200, 64))
    eager = kernels.nearest_code(x, codes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.nearest_code(x, codes)
    graph.replay()
    assert torch.equal(captured, eager)
