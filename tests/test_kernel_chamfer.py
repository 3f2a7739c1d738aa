"""The nearest point and the Chamfer distance against their definition in float64: PyTorch path, and interpreted kernel."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import DEVICE, GPU, ROOT, alone, has_compiler, needs_gpu, needs_triton

import kernels
from kernels import chamfer
from kernels.chamfer import nearest_point_reference

PATHS = ["torch", "loop", pytest.param("triton", marks=needs_triton)]
sizes = dict(B=st.integers(1, 3), N=st.sampled_from([1, 5, 63, 64, 65, 131]), M=st.sampled_from([1, 2, 31, 32, 33, 70]),
             D=st.sampled_from([1, 2, 3]), seed=st.integers(0, 2**32))


def draw(B, N, M, D=3, seed=0, dtype=torch.float32, ragged=False):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(B, n, D, generator=g, dtype=torch.float64).to(dtype) for n in (N, M))
    lengths = [torch.randint(low, n + 1, (B,), generator=g) for low, n in ((0, N), (1, M))] if ragged else [None, None]
    return x, y, *lengths


def find(path, x, y, *lengths):
    if path != "triton":                                                # loop: a cloud at a time, as if it were large
        return chamfer._nearest_torch(x, y, *lengths, **(dict(most=0) if path == "loop" else {}))
    return chamfer._nearest_triton(x.to(DEVICE), y.to(DEVICE), *lengths).cpu()


def exact(x, y, *lengths):
    return nearest_point_reference(x.double(), y.double(), *lengths)


# ---- the index and the distance


def test_kernel_chamfer_reference_is_the_definition():                  # max; the sum over points; "+" in the gap
    x, y, *_ = draw(2, 4, 5, dtype=torch.float64)
    for b in range(2):
        for n in range(4):
            each = [((x[b, n] - p) ** 2).sum().item() for p in y[b]]
            distance, index = (t[b, n].item() for t in exact(x, y))
            assert distance == min(each) and each[index] == distance


@pytest.mark.parametrize("path", PATHS)
@given(ragged=st.booleans(), **sizes)
@settings(max_examples=20)
def test_kernel_chamfer_index_is_that_of_float64(path, B, N, M, D, seed, ragged):   # a mask short by one; `start` left out
    x, y, *lengths = draw(B, N, M, D, seed, ragged=ragged)
    index = find(path, x, y, *lengths)
    assert index.dtype == torch.int64 and torch.equal(index, exact(x, y, *lengths)[1])


@pytest.mark.parametrize("path", PATHS)
@given(**sizes)
@settings(max_examples=8)
def test_kernel_chamfer_of_integers_is_exact_and_the_lowest_of_ties(path, B, N, M, D, seed):  # "<=" for "<" in closer
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(-1, 2, (B, n, D), generator=g).float() for n in (N, M))
    assert torch.equal(find(path, x, y, None, None), exact(x, y)[1])


@pytest.mark.parametrize("path", PATHS)
@given(offset=st.sampled_from([0.0, 1000.0]), ragged=st.booleans(), **sizes)
@settings(max_examples=12)
def test_kernel_chamfer_distance_has_no_cancellation(path, B, N, M, D, seed, offset, ragged):   # x^2 - 2xy + y^2
    x, y, *lengths = draw(B, N, M, D, seed, ragged=ragged)
    x, y = x + offset, y + offset
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELS", path.replace("loop", "torch"))
        distance = kernels.nearest_point(x.to(DEVICE), y.to(DEVICE), *lengths)[0].cpu()
    torch.testing.assert_close(distance.double(), exact(x, y, *lengths)[0], rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("most", [0, 2000, 6000, 2**17])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_kernel_chamfer_shares_its_clouds_among_threads(threads, most, monkeypatch):   # the count not put back
    x, y, *lengths = draw(9, 40, 50, ragged=True)
    whole = chamfer._nearest_torch
    monkeypatch.setattr(chamfer, "_nearest_torch", lambda *a: whole(*a, most=most))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        distance, index = kernels.nearest_point(x, y, *lengths)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(index, exact(x, y, *lengths)[1]) and not index.is_inference()


def test_kernel_chamfer_of_points_apart_wants_no_float64(monkeypatch):  # a radius that is nan; index 0 taken for none
    g, whole = torch.Generator().manual_seed(0), torch.Tensor.double
    y = torch.randperm(40, generator=g).float()[None, :, None] * torch.ones(3)
    x, calls = y + 0.2, []
    monkeypatch.setattr(torch.Tensor, "double", lambda t: calls.append(1) or whole(t))
    index = chamfer._nearest_torch(x, y, None, None)
    assert not calls and torch.equal(index[0], torch.arange(40))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shift", [0, 1e-8, 1e-7])
def test_kernel_chamfer_between_two_points(path, shift):                # slack 0: rounding decides
    g = torch.Generator().manual_seed(1)
    y = (4 * torch.randn(2, 30, 3, generator=g, dtype=torch.float64)).float()
    a, b = y[:, :29].double(), y[:, 1:].double()
    x = ((a + b) / 2 + shift * torch.randn(2, 29, 1, generator=g, dtype=torch.float64) * (a - b)).float()
    distance, index = exact(x, y)
    found = find(path, x, y, None, None)
    if path != "triton":
        assert torch.equal(found, index)
    again = (x.double() - y.double().gather(1, found[..., None].expand(-1, -1, 3))).square().sum(-1)
    torch.testing.assert_close(again, distance, rtol=1e-6, atol=0)


@needs_triton
def test_kernel_chamfer_writes_all_of_its_output_and_no_more(monkeypatch):  # the last mask left out
    x, y, *_ = draw(2, 70, 40)
    guarded = torch.full((2 * 70 + 100,), -7, device=DEVICE)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, shape, **k: (
        guarded[:140].view(2, 70) if shape == (2, 70) else empty(t, shape, **k)))
    assert torch.equal(find("triton", x, y, None, None), exact(x, y)[1])
    assert (guarded[140:] == -7).all()


@pytest.mark.parametrize("path", PATHS)
def test_kernel_chamfer_of_views_halves_and_other_dimensions(path, monkeypatch):    # .contiguous() left out
    monkeypatch.setenv("KERNELS", path.replace("loop", "torch"))
    x, y, *_ = draw(2, 60, 50)
    for a, b in ((x[:, ::2], y.flip(1)), (x.mT[:, :3].contiguous().mT, y), (x[:, :, :2], y[:, :, 1:]),
                 (x[:1].expand(2, -1, -1), y), (x.half(), y.half()), (x[:, :0], y)):
        distance, index = kernels.nearest_point(a.to(DEVICE), b.to(DEVICE))
        assert torch.equal(index.cpu(), exact(a, b)[1]) and distance.shape == a.shape[:2]
    monkeypatch.delenv("KERNELS")
    x, y, *_ = draw(2, 30, 20, D=7, dtype=torch.float64)
    assert torch.equal(kernels.nearest_point(x, y)[1], exact(x, y)[1])


# ---- gradient


@pytest.mark.parametrize("ragged", [False, True])
@given(B=st.integers(1, 3), N=st.integers(1, 9), M=st.integers(1, 9), D=st.sampled_from([1, 3, 5]), seed=st.integers(0, 999))
@settings(max_examples=15)
def test_kernel_chamfer_gradient_is_that_of_autograd(ragged, B, N, M, D, seed):     # 2 g; the sign of `into`; M for N
    x, y, *lengths = draw(B, N, M, D, seed, torch.float64, ragged)
    weights = torch.randn(B, N, generator=torch.Generator().manual_seed(seed))
    slopes = []
    for function in (kernels.nearest_point, nearest_point_reference):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        (weights * function(a, b, *lengths)[0]).sum().backward()
        slopes.append((a.grad, b.grad))
    for mine, truth in zip(*slopes):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)


@needs_triton
def test_kernel_chamfer_gradient_of_the_kernel(monkeypatch):            # the index of the kernel not saved
    x, y, *lengths = draw(2, 70, 40, ragged=True)
    slopes = []
    for path in ("triton", "torch"):
        monkeypatch.setenv("KERNELS", path)
        a, b = (t.to(DEVICE).requires_grad_() for t in (x, y))
        kernels.nearest_point(a, b, *lengths)[0].sum().backward()
        slopes.append((a.grad, b.grad))
    for mine, other in zip(*slopes):
        torch.testing.assert_close(mine, other)


def test_kernel_chamfer_gradient_for_one_side_only():                   # needs_input_grad
    x, y, *_ = draw(1, 5, 4, dtype=torch.float64)
    a = x.clone().requires_grad_()
    kernels.chamfer_distance(a, y).sum().backward()
    both = [t.clone().requires_grad_() for t in (x, y)]
    kernels.chamfer_distance(*both).sum().backward()
    assert a.grad.abs().sum() > 0 and y.grad is None and torch.equal(a.grad, both[0].grad)
    assert not kernels.nearest_point(a, y)[1].requires_grad


# ---- Chamfer


@given(B=st.integers(1, 3), N=st.integers(1, 20), M=st.integers(1, 20), seed=st.integers(0, 999), ragged=st.booleans())
def test_kernel_chamfer_is_brute_force_symmetric_and_blind_to_order(B, N, M, seed, ragged):    # sizes swapped; back left out
    x, y, *lengths = draw(B, N, M, 3, seed, torch.float64)
    if ragged:
        lengths = [torch.randint(1, n + 1, (B,), generator=torch.Generator().manual_seed(seed)) for n in (N, M)]
    found = kernels.chamfer_distance(x, y, *lengths)
    for b in range(B):
        p, q = (t[b] if size is None else t[b, : size[b]] for t, size in zip((x, y), lengths))
        squares = (p[:, None] - q).square().sum(-1)
        torch.testing.assert_close(found[b], squares.amin(1).mean() + squares.amin(0).mean())
    torch.testing.assert_close(found, kernels.chamfer_distance(y, x, *lengths[::-1]))
    if not ragged:
        torch.testing.assert_close(found, kernels.chamfer_distance(x[:, torch.randperm(N)], y[:, torch.randperm(M)]))


def test_kernel_chamfer_is_zero_only_for_equal_sets():                  # one direction only
    x, y, *_ = draw(2, 9, 9, dtype=torch.float64)
    assert kernels.chamfer_distance(x, x.flip(1)).tolist() == [0, 0]
    assert kernels.chamfer_distance(torch.cat([x, x], 1), x).tolist() == [0, 0]            # sets, not lists
    assert (kernels.chamfer_distance(x[:, :8], x) > 0).all() and (kernels.chamfer_distance(x, x[:, :8]) > 0).all()


# ---- dispatch and errors


@needs_triton
def test_kernel_chamfer_dispatch(monkeypatch):
    calls = []
    for name in ("triton", "torch"):
        monkeypatch.setattr(chamfer, f"_nearest_{name}", lambda x, y, *rest, name=name: (
            calls.append(name) or x.new_zeros(x.shape[:2], dtype=torch.int64)))
    x, y = (t.to(DEVICE) for t in draw(1, 3, 2)[:2])
    for choice, name in (("auto", "triton" if GPU else "torch"), ("torch", "torch"), ("triton", "triton")):
        monkeypatch.setenv("KERNELS", choice)
        kernels.nearest_point(x, y)
        assert calls.pop() == name
    with pytest.raises(RuntimeError, match="float64, and the kernel takes float32"):
        kernels.nearest_point(x.double(), y)
    with pytest.raises(RuntimeError, match="D = 4, and the kernel takes up to 3"):
        kernels.nearest_point(*draw(1, 3, 2, D=4)[:2])


def test_kernel_chamfer_errors_say_what_was_wanted():
    x, y, *_ = draw(2, 4, 5)
    for a, b in ((x[0], y), (x, y[:1]), (x, y[:, :0]), (x, y[..., :2])):
        with pytest.raises(ValueError, match=r"x \(B, N, D\) and y \(B, M, D\) with M, D > 0 are wanted; got"):
            kernels.nearest_point(a, b)
    with pytest.raises(ValueError, match="are wanted; got"):
        kernels.chamfer_distance(x[:, :0], y)
    with pytest.raises(ValueError, match="floating-point"):
        kernels.nearest_point(x, y.long())
    two = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="lengths of both"):
        kernels.nearest_point(x, y, two)
    for bad in (torch.tensor([1, 5]), torch.tensor([-1, 2])):
        with pytest.raises(ValueError, match=r"x_length must lie in 0 .. 4; got"):
            kernels.nearest_point(x, y, bad, two)
    with pytest.raises(ValueError, match=r"y_length must lie in 1 .. 5; got \[0, 2\]"):
        kernels.nearest_point(x, y, two, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="x_length must be 2 integers"):
        kernels.nearest_point(x, y, torch.ones(3, dtype=torch.int64), two)


def test_kernel_chamfer_without_triton():
    done = alone("import sys; sys.modules['triton'] = None\n"
                 "import torch, kernels; x = torch.eye(3)[None]; assert kernels.chamfer_distance(x, x).item() == 0")
    assert done.returncode == 0, done.stderr


# ---- machine code and clocks


@pytest.mark.skipif(not has_compiler(), reason="Triton, or its nvdisasm, is not here")
def test_kernel_chamfer_machine_code_is_within_limits_and_budget():     # BM = 256
    done = subprocess.run([sys.executable, "-m", "kernels.compile", "--only", "nearest point"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 programs, 0 over a limit" in done.stdout
    for line in done.stdout.splitlines():
        if line.startswith("nearest"):
            assert line.split()[4:6] == ["0", "0"], line                # stack, spilled


@pytest.mark.parametrize("argv", [[], ["--gradient"]])
def test_kernel_chamfer_bench_runs(capsys, monkeypatch, argv):
    spec = importlib.util.spec_from_file_location("bench_chamfer", pathlib.Path(ROOT, "bench", "chamfer.py"))
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(sys, "argv", ["chamfer.py", "--sizes", "2x30", "--repeats", "1", *argv])
    bench.main()
    assert "cdist" in capsys.readouterr().out


def test_kernel_chamfer_bench_of_the_kernels():
    from kernels import bench_flows

    torch.set_default_dtype(torch.float32)
    rows = []
    with torch.no_grad():
        bench_flows.bench_chamfer(rows, print, "cpu", sizes=((2, 40),))
    assert {row[1] for row in rows} == {"chamfer_distance", "eager cdist, min"} and len(rows) == 4


# ---- a GPU, where there is one


@needs_gpu
@pytest.mark.parametrize("B, N, M", [(1, 1, 1), (3, 1000, 513), (32, 2048, 2048), (1, 20_000, 16_384)])
def test_kernel_chamfer_on_the_gpu(B, N, M):
    x, y, *lengths = (t.cuda() for t in draw(B, N, M, ragged=True))
    distance, index = kernels.nearest_point(x, y, *lengths)
    assert all(torch.equal(kernels.nearest_point(x, y, *lengths)[1], index) for _ in range(10))     # a race would show
    for b in range(B):
        n, m = lengths[0][b], lengths[1][b]
        d = torch.cdist(x[b, :n].double(), y[b, :m].double(), compute_mode="donot_use_mm_for_euclid_dist").square()
        torch.testing.assert_close(distance[b, :n].double(), d.amin(1), rtol=1e-6, atol=1e-30)
        assert (distance[b, n:] == 0).all() and (index[b, n:] == -1).all()


@needs_gpu
def test_kernel_chamfer_on_the_gpu_goes_into_a_cuda_graph():
    x, y = (t.cuda() for t in draw(2, 300, 200)[:2])
    eager = kernels.nearest_point(x, y)[1]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.nearest_point(x, y)[1]
    graph.replay()
    assert torch.equal(captured, eager)
