"""The residual MLP of the diffusion scripts, forward and backward in one autograd node on the CPU.

    h = silu([x, e] W_in),   h <- h + silu([h, e] W_l) for l = 1..L,   out = h W_out + b_out
    e = features of the time: [h, e] W is h W_h plus a bias that depends on the time alone

Shapes: x (B, D), features (B, E), w_in (D + E, H), w_hidden (L, H + E, H), w_out (H, O), b_out (O,) -> (B, O).

Eager autograd makes some 45 operators and as many nodes of a training step; at batch 512 and width 128 they cost as
much as the arithmetic. Here the gradient is written by hand: the states lie beside the features, so that a layer is one
product forward and two backward, and all of it is one node. On other devices it is the plain function: a GPU's time
goes elsewhere, see diffusion.py.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor


def residual_mlp_reference(x, features, w_in, w_hidden, w_out, b_out) -> Tensor:
    h = F.silu(torch.cat([x, features], 1) @ w_in)
    for w in w_hidden:
        h = h + F.silu(torch.cat([h, features], 1) @ w)
    return h @ w_out + b_out


class ResidualMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, features, w_in, w_hidden, w_out, b_out):
        L, K, H = w_hidden.shape
        before, after = x.new_empty(L + 1, len(x), H), x.new_empty(L + 1, len(x), K)
        after[..., H:] = features
        layer_in, states = (torch.cat([x, features], 1), *after.unbind()), after[..., :H].unbind()
        for i, (w, z) in enumerate(zip((w_in, *w_hidden.unbind()), before.unbind())):
            torch.mm(layer_in[i], w, out=z)                                 # what silu is applied to
            torch.ops.aten.silu.out(z, out=states[i])
            if i:
                states[i].add_(states[i - 1])
        ctx.save_for_backward(w_in, w_hidden, w_out, before, after, layer_in[0])
        return torch.addmm(b_out, states[-1], w_out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_out):
        w_in, w_hidden, w_out, before, after, first = ctx.saved_tensors
        L, K, H = w_hidden.shape
        E, g_h = K - H, g_out.mm(w_out.t())
        g, g_hidden = torch.empty_like(g_h), torch.empty_like(w_hidden)
        g_features = g.new_zeros(len(g), E) if ctx.needs_input_grad[1] else None
        before, back, read, g_w = before.unbind(), w_hidden[:, :H].mT.unbind(), after.mT.unbind(), g_hidden.unbind()
        for i in reversed(range(L + 1)):
            torch.ops.aten.silu_backward.grad_input(g_h, before[i], grad_input=g)
            if g_features is not None:
                g_features.addmm_(g, (w_hidden[i - 1] if i else w_in)[-E:].t())
            if i:
                torch.mm(read[i - 1], g, out=g_w[i - 1])
                g_h.addmm_(g, back[i - 1])                                  # the skip keeps g_h
        g_x = g.mm(w_in[:-E].t()) if ctx.needs_input_grad[0] else None
        return g_x, g_features, first.t().mm(g), g_hidden, read[L][:H].mm(g_out), g_out.sum(0)


def residual_mlp(x, features, w_in, w_hidden, w_out, b_out) -> Tensor:
    """The same numbers as `residual_mlp_reference`, up to rounding; differentiable once."""
    plain = x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or os.environ.get("KERNELS") == "torch"
    function = residual_mlp_reference if plain else ResidualMLP.apply
    return function(x, features, w_in, w_hidden, w_out, b_out)
