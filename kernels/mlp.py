"""The residual MLP of the diffusion scripts, forward and backward in one autograd node on the CPU.

    h = silu(x W_in^T + b_0),   h <- h + silu(h W_l^T + b_l) for l = 1..L,   out = h W_out^T + b_out
    b_l = features W_time[l]^T + b_time[l]     the time embedding enters as a bias of each layer

Shapes: x (B, D), features (B, E), w_in (H, D), w_time ((L + 1) H, E), b_time ((L + 1) H,), w_hidden L times (H, H),
w_out (O, H), b_out (O,) -> (B, O).

Eager autograd makes some 45 operators and as many nodes of a training step; at batch 512 and width 128 they cost as
much as the arithmetic. Here the gradient is written by hand: one workspace for all states, products that add in place,
one node. On other devices it is the plain function: a GPU's time goes elsewhere, see diffusion.py.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor


def residual_mlp_reference(x, features, w_in, w_time, b_time, w_out, b_out, *w_hidden) -> Tensor:
    biases = F.linear(features, w_time, b_time).chunk(len(w_hidden) + 1, 1)
    h = F.silu(F.linear(x, w_in) + biases[0])
    for w, b in zip(w_hidden, biases[1:]):
        h = h + F.silu(F.linear(h, w) + b)
    return F.linear(h, w_out, b_out)


class ResidualMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, features, w_in, w_time, b_time, w_out, b_out, *w_hidden):
        layers = len(w_hidden) + 1
        before, h = x.new_empty(2, layers, len(x), len(w_in))               # what silu is applied to; the states
        for i, (w, b) in enumerate(zip(w_time.chunk(layers), b_time.chunk(layers))):
            torch.addmm(b, features, w.t(), out=before[i])
            before[i].addmm_(h[i - 1] if i else x, (w_hidden[i - 1] if i else w_in).t())
            torch.ops.aten.silu.out(before[i], out=h[i])
            if i:
                h[i].add_(h[i - 1])
        ctx.save_for_backward(x, features, w_in, w_time, w_out, before, h, *w_hidden)
        return torch.addmm(b_out, h[-1], w_out.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_out):
        x, features, w_in, w_time, w_out, before, h, *w_hidden = ctx.saved_tensors
        layers, g_h = len(before), g_out.mm(w_out)
        g, g_time, g_bias, g_hidden = torch.empty_like(g_h), torch.empty_like(w_time), x.new_empty(len(w_time)), []
        g_features = torch.zeros_like(features) if ctx.needs_input_grad[1] else None
        for i in reversed(range(layers)):
            torch.ops.aten.silu_backward.grad_input(g_h, before[i], grad_input=g)
            torch.mm(g.t(), features, out=g_time.chunk(layers)[i])
            torch.sum(g, 0, out=g_bias.chunk(layers)[i])
            if g_features is not None:
                g_features.addmm_(g, w_time.chunk(layers)[i])
            if i:
                g_hidden.insert(0, g.t().mm(h[i - 1]))
                g_h.addmm_(g, w_hidden[i - 1])                              # the skip keeps g_h
        g_x = g.mm(w_in) if ctx.needs_input_grad[0] else None
        return g_x, g_features, g.t().mm(x), g_time, g_bias, g_out.t().mm(h[-1]), g_out.sum(0), *g_hidden


def residual_mlp(x, features, w_in, w_time, b_time, w_out, b_out, *w_hidden) -> Tensor:
    """The same numbers as `residual_mlp_reference`, up to rounding; differentiable once."""
    plain = x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or os.environ.get("KERNELS") == "torch"
    function = residual_mlp_reference if plain else ResidualMLP.apply
    return function(x, features, w_in, w_time, b_time, w_out, b_out, *w_hidden)
