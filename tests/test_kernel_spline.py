"""The spline kernel against its definition: values, slopes and gradients, in PyTorch, NumPy and Triton's interpreter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import DEVICE, needs_triton

import kernels
from kernels import spline
from kernels.spline import rational_quadratic_reference

PATHS = ["numpy", "torch", pytest.param("triton", marks=needs_triton)]
close = torch.testing.assert_close


def draw(N, K, seed=0, bound=3.0, scale=1.5):
    g = torch.Generator().manual_seed(seed)
    x = 1.3 * bound * (2 * torch.rand(N, generator=g, dtype=torch.float64) - 1)
    return x, scale * torch.randn(N, 3 * K - 1, generator=g, dtype=torch.float64)


def through(f, x, theta, bound, inverse):
    """[y, log slope, dL/dx, dL/dtheta] for an L that is no function of one of them alone."""
    x, theta = x.detach().requires_grad_(), theta.detach().requires_grad_()
    y, l = f(x, theta, bound, inverse)
    a, b = (torch.linspace(-1, 2, x.numel(), device=x.device, dtype=x.dtype).view(x.shape).roll(k) for k in (0, 1))
    return [y, l, *torch.autograd.grad((a * y + b * l).sum(), (x, theta))]


@pytest.mark.parametrize("path", PATHS)
@given(N=st.sampled_from([1, 3, 64, 129]), K=st.sampled_from([1, 2, 5, 8, 17, 32]), inverse=st.booleans(),
       bound=st.sampled_from([0.5, 3.0]), seed=st.integers(0, 999))
@settings(max_examples=15)
def test_kernel_spline_is_its_definition(path, N, K, inverse, bound, seed):         # any sign or factor; a mask short by one
    x, theta = draw(N, K, seed, bound)
    truth = through(rational_quadratic_reference, x, theta, bound, inverse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELS", "triton" if path == "triton" else "torch")
        patch.setattr(spline, "SMALL", 10**9 if path == "numpy" else 0)
        if path == "triton":
            x, theta = x.float().to(DEVICE), theta.float().to(DEVICE)
            truth = through(rational_quadratic_reference, x.double(), theta.double(), bound, inverse)
        found = through(kernels.rational_quadratic, x, theta, bound, inverse)
    tolerance = dict(rtol=2e-3, atol=2e-3) if path == "triton" else dict(rtol=1e-7, atol=1e-8)
    for a, b in zip(found, truth):
        close(a.to(b), b, **tolerance)


@pytest.mark.parametrize("path", PATHS)
def test_kernel_spline_at_knots_and_outside(path, monkeypatch):         # outside: gradient 0 of theta, 1 of x
    monkeypatch.setenv("KERNELS", "triton" if path == "triton" else "torch")
    monkeypatch.setattr(spline, "SMALL", 10**9 if path == "numpy" else 0)
    x = torch.tensor([-1e6, -3.0, 3.0, 1e6, -3.0001, 0.0]).float().to(DEVICE)
    for inverse in (False, True):
        y, l, g_x, g_theta = through(kernels.rational_quadratic, x, 30 * draw(6, 4)[1].float().to(DEVICE), 3.0, inverse)
        assert all(v.isfinite().all() for v in (y, l, g_x, g_theta))
        close(y[:5], x[:5], rtol=1e-5, atol=1e-5)
        assert not l[[0, 3, 4]].any() and not g_theta[[0, 3, 4]].any()
        close(g_x[[0, 3, 4]], torch.linspace(-1, 2, 6).to(x)[[0, 3, 4]])


@pytest.mark.parametrize("path", PATHS)
def test_kernel_spline_keeps_shapes_and_comes_back(path, monkeypatch):  # a view taken for contiguous
    monkeypatch.setenv("KERNELS", "triton" if path == "triton" else "torch")
    x, theta = draw(60, 6)
    x, theta = x.float().view(4, 3, 5).to(DEVICE), theta.float().view(5, 4, 3, 17).movedim(0, 2).to(DEVICE)
    y, l = kernels.rational_quadratic(x, theta, 3.0)
    assert y.shape == l.shape == x.shape
    back, minus = kernels.rational_quadratic(y, theta, 3.0, inverse=True)
    close(back, x, rtol=1e-3, atol=1e-3)
    close(minus, -l, rtol=1e-2, atol=1e-2)
    for part, th in ((x[:, ::2], theta[:, ::2]), (x[:0], theta[:0])):
        close(kernels.rational_quadratic(part, th, 3.0)[0], y[: len(part), ::2] if len(part) else part)


def test_kernel_spline_gradients_are_those_of_differences():            # gradcheck of the hand-written one
    for inverse in (False, True):
        x, theta = draw(7, 4, 3)
        f = lambda x, theta, inverse=inverse: spline._Spline.apply(x, theta, 3.0, inverse)
        assert torch.autograd.gradcheck(f, (x.requires_grad_(), theta.requires_grad_()))


@pytest.mark.parametrize("x, theta, bound", [((3,), (3, 6), 1.0), ((3,), (2, 5), 1.0), ((3,), (3, 5), 0.0),
                                             ((3,), (3, 5), math.inf)])
def test_kernel_spline_refuses_what_does_not_fit(x, theta, bound):      # the check
    with pytest.raises(ValueError, match="3 K - 1"):
        kernels.rational_quadratic(torch.zeros(x), torch.zeros(theta), bound)


@pytest.mark.parametrize("of_x, of_theta, wide", [("float64", "float32", "float64"), ("bfloat16", "bfloat16", "bfloat16")])
def test_numbers_of_two_widths_are_promoted_as_torch_does(of_x, of_theta, wide):    # NumPy has no bfloat16
    g = torch.Generator().manual_seed(0)
    x, theta = torch.randn(9, generator=g).to(getattr(torch, of_x)), torch.randn(9, 14, generator=g).to(getattr(torch, of_theta))
    for found, wanted in zip(spline.rational_quadratic(x, theta, 3.0),
                             spline.rational_quadratic_reference(x.double(), theta.double(), 3.0)):
        assert found.dtype == getattr(torch, wide)
        torch.testing.assert_close(found.double(), wanted, atol=1e-6 if wide == "float64" else 0.2, rtol=0)
