"""The residual MLP with its hand-written gradient, against autograd of the plain definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ddpm
from kernels import mlp

sizes = st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))


def draw(B, D, H, L, O, E=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, D), (B, E), (D + E, H), (L, H + E, H), (H, O), (O,)]
    return [torch.randn(s, generator=g).requires_grad_() for s in shapes]


@given(sizes)
@settings(max_examples=25)
def test_kernel_mlp_and_all_its_gradients_are_autograds(s):             # the skip of g_h left out; an index of states
    tensors = draw(*s)
    g = torch.linspace(-1, 1, s[0] * s[4]).view(s[0], s[4])
    wanted, got = mlp.residual_mlp_reference(*tensors), mlp.ResidualMLP.apply(*tensors)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(torch.autograd.grad(got, tensors, g), torch.autograd.grad(wanted, tensors, g)):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ddpm.residual_mlp_plain(*tensors), wanted)


def test_kernel_mlp_gradient_by_finite_differences():
    assert torch.autograd.gradcheck(mlp.ResidualMLP.apply, draw(3, 2, 4, 2, 2))


def test_kernel_mlp_two_forwards_before_a_backward():                   # buffers shared between calls
    a, b = draw(4, 2, 3, 2, 2, seed=1), draw(4, 2, 3, 2, 2, seed=2)
    first, second = mlp.ResidualMLP.apply(*a), mlp.ResidualMLP.apply(*b)
    got = torch.autograd.grad(first.sum() + second.sum(), [*a, *b])
    wanted = torch.autograd.grad(mlp.residual_mlp_reference(*a).sum() + mlp.residual_mlp_reference(*b).sum(), [*a, *b])
    for x, y in zip(got, wanted):
        torch.testing.assert_close(x, y)


def test_kernel_mlp_dispatch(monkeypatch):
    tensors = draw(3, 2, 4, 2, 2)
    assert type(mlp.residual_mlp(*tensors).grad_fn).__name__ == "ResidualMLPBackward"
    monkeypatch.setenv("KERNELS", "torch")
    assert type(mlp.residual_mlp(*tensors).grad_fn).__name__ != "ResidualMLPBackward"
    monkeypatch.delenv("KERNELS")
    with pytest.raises(RuntimeError, match="does not require grad|differentiate"):
        (g,) = torch.autograd.grad(mlp.residual_mlp(*tensors).sum(), tensors[0], create_graph=True)
        torch.autograd.grad(g.sum(), tensors[2])
