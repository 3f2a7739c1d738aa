"""The selective scan against its definition in float64: the PyTorch path, and the kernels in Triton's interpreter.
Behind each `def`: a line that must not break."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import DEVICE, ROOT, alone, close, has_compiler, needs_gpu, needs_triton

import kernels
from kernels import scan
from kernels.scan import selective_scan_reference

PATHS = ["torch", pytest.param("triton", marks=needs_triton)]
seeds = st.integers(0, 2**32)
SMALL = dict(CT=8, BE=4, BN=4, num_warps=1)                             # chunks that a short sequence has many of


def draw(n, T, E, N, seed=0, dtype=torch.float32, device=DEVICE):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    arguments = rand(n, T, E), rand(n, T, E).exp() / 3, -rand(E, N).exp(), rand(n, T, N), rand(n, T, N), rand(n, E, N)
    return [v.to(dtype).to(device) for v in arguments]


def gradients(function, arguments, seed=1):
    arguments = [v.detach().clone().requires_grad_() for v in arguments]
    y, h = function(*arguments)
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(v.shape, generator=g, dtype=torch.float64).to(v) for v in (y, h)]
    loss = (y * weights[0]).sum() + (h * weights[1]).sum()
    return y.detach(), h.detach(), *torch.autograd.grad(loss, arguments)


def all_close(mine, wanted, tolerance):
    assert len(mine) == len(wanted) == 8                                # y, h and the six gradients
    for a, b in zip(mine, wanted):
        close(a, b, tolerance)


@given(st.integers(1, 5), seeds)
@settings(max_examples=10)
def test_kernel_scan_reference_is_the_definition(T, seed):              # h * (dt A); C of the step before
    x, dt, A, B, C, h = draw(1, T, 2, 3, seed, torch.float64, "cpu")
    y, last = selective_scan_reference(x, dt, A, B, C, h)
    for e in range(2):
        state = h[0, e]
        for t in range(T):
            state = torch.stack([(dt[0, t, e] * A[e, n]).exp() * state[n] + dt[0, t, e] * x[0, t, e] * B[0, t, n]
                                 for n in range(3)])
            torch.testing.assert_close(y[0, t, e], (state * C[0, t]).sum())
        torch.testing.assert_close(last[0, e], state)


def test_kernel_scan_gradients_by_hand_are_those_of_differences():      # each line of ScanTorch.backward
    arguments = [v.requires_grad_() for v in draw(2, 4, 3, 2, dtype=torch.float64, device="cpu")]
    assert torch.autograd.gradcheck(scan.ScanTorch.apply, arguments)


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 17), seeds)
@settings(max_examples=10)
def test_kernel_scan_on_the_cpu_equals_the_reference(n, T, E, N, seed):  # decay[t] for decay[t + 1]
    arguments = draw(n, T, E, N, seed, torch.float64, "cpu")
    all_close(gradients(kernels.selective_scan, arguments), gradients(selective_scan_reference, arguments), 1e-12)


@needs_triton
@pytest.mark.parametrize("n, T, E, N", [(1, 1, 1, 1), (2, 33, 5, 3), (1, 32, 35, 16), (2, 7, 4, 5)])
def test_kernel_scan_equals_the_reference(n, T, E, N):
    """a mask of time; of channels; g * a before dA; the state after a step for the one before; one block for dB"""
    arguments = draw(n, T, E, N)
    all_close(gradients(scan.ScanTriton.apply, arguments),
              gradients(selective_scan_reference, [v.double() for v in arguments]), 5e-6)


@needs_triton
@given(st.integers(1, 25), st.integers(1, 9), st.integers(1, 4), seeds)
@settings(max_examples=8)
def test_kernel_scan_at_any_length_carries_its_state_over_chunks(T, E, N, seed):       # kept at c + 1; g set to 0 in a chunk
    before, scan.scan_config = scan.scan_config, lambda N: SMALL
    try:
        arguments = draw(1, T, E, N, seed)
        mine = gradients(scan.ScanTriton.apply, arguments)
    finally:
        scan.scan_config = before
    all_close(mine, gradients(selective_scan_reference, [v.double() for v in arguments]), 5e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cut", [1, 8, 13])
def test_kernel_scan_cut_in_two_is_the_whole(path, cut, monkeypatch):   # the state left out; the last but one given back
    monkeypatch.setenv("KERNELS", path)
    x, dt, A, B, C, h = draw(2, 19, 3, 4)
    whole, last = kernels.selective_scan(x, dt, A, B, C, h)
    one, middle = kernels.selective_scan(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], h)
    two, end = kernels.selective_scan(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], middle)
    close(torch.cat([one, two], 1), whole, 1e-6)
    close(end, last, 1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_kernel_scan_of_strong_decay_is_finite(path, monkeypatch):      # anything over a product of decays
    monkeypatch.setenv("KERNELS", path)
    x, dt, A, B, C, h = draw(1, 40, 3, 2)
    out = gradients(kernels.selective_scan, (x, 50 * dt, A, B, C, h))
    assert all(v.isfinite().all() for v in out)
    alone_t = kernels.selective_scan(x, 1e4 * torch.ones_like(dt), -torch.ones_like(A), B, C)[0]
    close(alone_t, 1e4 * x * (B * C).sum(-1, keepdim=True), 1e-6)       # all forgotten: each step by itself


@needs_triton
def test_kernel_scan_writes_all_of_its_output_and_no_more(guarded):  # the mask of a store
    arguments = draw(1, 35, 5, 3)
    wanted = gradients(selective_scan_reference, [v.double() for v in arguments])
    guards = guarded(500)
    all_close(gradients(scan.ScanTriton.apply, arguments), wanted, 5e-6)
    assert len(guards) >= 10 and all((guard == -7).all() for guard in guards)


def test_kernel_scan_errors_say_what_was_wanted(monkeypatch):
    x, dt, A, B, C, h = draw(1, 4, 3, 2)
    for bad in ((x[0], dt, A, B, C), (x, dt[:, 1:], A, B, C), (x, dt, A.T, B, C), (x, dt, A, B, C[:, 1:]), (x, dt, A, B, C, h[:, 1:]),
                (x[:, :0], dt[:, :0], A, B[:, :0], C[:, :0])):
        with pytest.raises(ValueError, match="with T > 0 are wanted; got"):
            kernels.selective_scan(*bad)


def test_kernel_scan_without_triton():
    done = alone("import sys; sys.modules['triton'] = None\n"
                 "import torch, kernels; x, A = torch.ones(1, 3, 2), -torch.ones(2, 1)\n"
                 "assert kernels.selective_scan(x, x, A, x[..., :1], x[..., :1])[0].shape == x.shape")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not has_compiler(), reason="Triton, or its nvdisasm, is not here")
def test_kernel_scan_machine_code_is_within_limits_and_budget():        # BE four times as large
    done = subprocess.run([sys.executable, "-m", "kernels.compile", "--targets", "sm_90", "--only", "scan"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 programs, 0 over a limit" in done.stdout


@needs_gpu
@pytest.mark.parametrize("n, T, E, N", [(4, 784, 256, 16), (2, 785, 100, 8)])
def test_kernel_scan_on_the_gpu(n, T, E, N):
    arguments = draw(n, T, E, N)
    mine = gradients(scan.ScanTriton.apply, arguments)
    all_close(mine, gradients(selective_scan_reference, [v.double() for v in arguments]), 1e-4)
    assert all(torch.equal(a, b) for a, b in zip(mine, gradients(scan.ScanTriton.apply, arguments)))


def test_kernel_scan_widens_half_precision_on_a_cpu():                  # matmul of two dtypes
    g = torch.Generator().manual_seed(0)
    x, dt, B, C = (torch.randn(2, 9, k, generator=g) for k in (5, 5, 3, 3))
    A, half = -torch.randn(5, 3, generator=g).exp(), [v.bfloat16() for v in (x, B, C)]
    y, h = scan.selective_scan(half[0], dt.exp().float(), A.float(), *half[1:])
    wanted, last = scan.selective_scan_reference(half[0].double(), dt.exp().float().double(), A.float().double(),
                                                 *(v.double() for v in half[1:]))
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    torch.testing.assert_close(y.double(), wanted, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(h.double(), last, rtol=1e-4, atol=1e-4)
