"""The residual MLP of the diffusion scripts, forward and backward in one autograd node on the CPU.

    h = silu(x W_in^T + b_0),   h <- h + silu(h W_l^T + b_l) for l = 1..L,   out = h W_out^T + b_out
    b_l = features W_time[l]^T + b_time[l]     the time embedding enters as a bias of each layer

Shapes: x (B, D), features (B, E), w_in (H, D), w_time ((L + 1) H, E), b_time ((L + 1) H,), w_hidden L times (H, H),
w_out (O, H), b_out (O,) -> (B, O).

Eager autograd runs some 45 operators and as many nodes a training step; at batch 512 and width 128 they cost more than
the arithmetic. Here the gradient is written by hand, 5 + 4 L operators, all time embeddings in one product whose result
the layers add to in place. On other devices, and for any other type of input, it is the plain function: a GPU's time
goes elsewhere, see diffusion.py.
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
        before = torch.addmm(b_time, features, w_time.t())                  # (B, (L + 1) H), what silu is applied to
        layers = before.chunk(len(w_hidden) + 1, 1)
        h = F.silu(layers[0].addmm_(x, w_in.t()))
        states = [h]                                                        # h after each layer, (B, H)
        for w, a in zip(w_hidden, layers[1:]):
            h = F.silu(a.addmm_(h, w.t())).add_(h)
            states.append(h)
        ctx.save_for_backward(x, features, w_in, w_time, w_out, before, *w_hidden, *states)
        return torch.addmm(b_out, h, w_out.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_out):
        x, features, w_in, w_time, w_out, before, *rest = ctx.saved_tensors
        w_hidden, states = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        g_before = torch.empty_like(before)
        layers, g_layers = before.chunk(len(states), 1), g_before.chunk(len(states), 1)
        g_h, g_hidden = g_out.mm(w_out), [None] * len(w_hidden)
        for i in reversed(range(len(states))):
            torch.ops.aten.silu_backward.grad_input(g_h, layers[i], grad_input=g_layers[i])
            if i:
                g_hidden[i - 1] = g_layers[i].t().mm(states[i - 1])
                g_h.addmm_(g_layers[i], w_hidden[i - 1])                    # the skip keeps g_h
        return (g_layers[0].mm(w_in) if ctx.needs_input_grad[0] else None,
                g_before.mm(w_time) if ctx.needs_input_grad[1] else None,
                g_layers[0].t().mm(x), g_before.t().mm(features), g_before.sum(0),
                g_out.t().mm(states[-1]), g_out.sum(0), *g_hidden)


def residual_mlp(x, features, w_in, w_time, b_time, w_out, b_out, *w_hidden) -> Tensor:
    """The same numbers as `residual_mlp_reference`, up to rounding; differentiable once."""
    plain = x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or os.environ.get("KERNELS") == "torch"
    function = residual_mlp_reference if plain else ResidualMLP.apply
    return function(x, features, w_in, w_time, b_time, w_out, b_out, *w_hidden)
