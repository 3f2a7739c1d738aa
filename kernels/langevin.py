"""A whole Langevin chain of an MLP energy in one launch, and one fused update for the energies of images.

`langevin_chain`: S steps under the energy of a classifier's logits, its gradient derived by hand,

    phi = [x, sin(x F + phase)];   h_0 = silu(phi W_in^T + b_in);   h_l = silu(h_{l-1} W_l^T + b_l);   f = h_L W_out^T + b_out
    E(x) = base |x|^2 / 2 - log sum_y exp f_y,   or - f_y in the place of the sum for chains of a class y >= 0
    dE/dh_L = - softmax(f) W_out,   g_l = silu'(a_l) dE/dh_l,   dE/dh_{l-1} = g_l W_l,   ..., down to phi and x
    x <- clamp(x - A_s clip(dE/dx, -c, c) + B_s z, -bound, bound),       z ~ N(0, I): rng.normal at step first + s

One logit is an energy without classes. A = step, B = sqrt(2 step T) is Langevin dynamics at temperature T; a table (S, 2)
of [A, B] anneals either; `clip` is the proximal step. Shapes: x (N, D), frequencies F (D, E), phases (E,), w_in (H, D + E),
b_in (H,), w_hidden (L, H, H), b_hidden (L, H), w_out (C, H), b_out (C,), y (N,) int64 or None.

What it saves. An eager step runs the network, records it, walks it back and updates: some 60 launches, and each hidden
activation goes through memory a dozen times. The kernel is one launch for all steps: weights in shared memory (W^T for
the way back is a view of the same copy), x, the activations and their slopes in registers. Products take fp16 operands and
fp32 accumulators; x and phi stay fp32, phi enters the first layer as a sum of two fp16 parts. On a CPU a tile of rows goes
through all steps in preallocated buffers, without an autograd graph: silu's slope is read from the pre-activations.

`langevin_step`: x <- clamp(x - A clip(g) + B z) for a gradient g that a convolutional network gave: 12 bytes an fp32 element
(eager: 8 to 12 an operation, and the noise once more). The network's two passes dominate an image's step: this saves the rest.

Limits. No gradients through a chain. The kernel: H = 64 or 128 (16 and 32 too when interpreted), D = 1..4, D + E <= 16,
C <= 16, L H <= 256, activations within fp16's 65504. The CPU path takes any size.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from . import rng
from ._runtime import AMD, INTERPRET, backend, int32, jit, refuse_gradients, tl, triton

NAMES = ("frequencies", "phases", "w_in", "b_in", "w_hidden", "b_hidden", "w_out", "b_out")

# ---- definitions


def energy_reference(x, network, y=None, base=0.0) -> Tensor:
    """E (N,) of the docstring, in any dtype, for autograd."""
    frequencies, phases, w_in, b_in, w_hidden, b_hidden, w_out, b_out = network
    h = F.silu(torch.cat([x, torch.sin(x @ frequencies + phases)], 1) @ w_in.T + b_in)
    for w, b in zip(w_hidden, b_hidden):
        h = F.silu(h @ w.T + b)
    f = h @ w_out.T + b_out
    value = f.logsumexp(1)
    if y is not None:
        value = torch.where(y >= 0, f.gather(1, y.clamp(min=0)[:, None])[:, 0], value)
    return base / 2 * x.square().sum(1) - value


def langevin_chain_reference(x, network, coefficients, seed, y=None, first=0, base=0.0, clip=None, bound=None) -> Tensor:
    """The definition, in any dtype, by autograd. The noise is rng's float32 stream, cast."""
    for s, (A, B) in enumerate(coefficients.tolist()):
        with torch.enable_grad():
            here = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(energy_reference(here, [w.detach() for w in network], y, base).sum(), here)
        g = g if clip is None else g.clamp(-clip, clip)
        x = x - A * g + B * rng.normal(*x.shape, seed, first + s, device=x.device).to(x.dtype)
        x = x if bound is None else x.clamp(-bound, bound)
    return x


def langevin_step_reference(x, g, A, B, seed, step, clip=None, bound=None) -> Tensor:
    """The definition, in any dtype. Element i of the flattened x takes normal [i // 4, i % 4] of stream rng.STEP."""
    g = g if clip is None else g.clamp(-clip, clip)
    z = rng.normal((x.numel() + 3) // 4, 4, seed, step, rng.STEP, x.device).flatten()[: x.numel()].view(x.shape)
    x = x - A * g + B * z.to(x.dtype)
    return x if bound is None else x.clamp(-bound, bound)


# ---- CPU: a tile of rows through all steps, one tile a thread


def _chain_tile(x, row, network, y, table, seed, first, base, clip, bound, stop):
    """x (R, D) in place; y (R,) or None."""
    frequencies, phases, w_in, b_in, w_hidden, b_hidden, w_out, b_out = network
    (R, D), H, L, K = x.shape, len(b_in), len(w_hidden), w_in.shape[1]
    rows = torch.arange(row, row + R, device=x.device)
    phi, slope, g_phi = x.new_empty(R, K), x.new_empty(R, K - D), x.new_empty(R, K)
    a, h, g = x.new_empty(L + 1, R, H).unbind(), x.new_empty(R, H), x.new_empty(R, H)
    weights = [(w_in.T, b_in), *zip(w_hidden.mT.unbind(), b_hidden.unbind())]
    back = [w_in, *w_hidden.unbind()]
    fixed = -w_out.expand(R, H) if len(w_out) == 1 else None            # dE/dh_L where it is the same at each step
    some = None
    if y is not None and fixed is None:
        some = (y < 0)[:, None] if (y < 0).any() else None
        chosen = -w_out[y.clamp(min=0)]
        fixed = chosen if some is None else None
    block = max(1, 32768 // (R * ((D + 3) // 4)))                       # the generator's words stay in L2
    for start in range(0, len(table), block):
        part = table[start : start + block]
        if any(B for _, B in part):
            steps = torch.arange(first + start, first + start + len(part), device=x.device).bitwise_and_(rng.MASK)
            z = rng.normal_block(rows, D, steps, seed)
        for k, (A, B) in enumerate(part):
            phi[:, :D] = x
            angle = torch.addmm(phases, x, frequencies)
            torch.sin(angle, out=phi[:, D:])
            torch.cos(angle, out=slope)
            for l, (w, b) in enumerate(weights):
                torch.addmm(b, h if l else phi, w, out=a[l])
                torch.ops.aten.silu.out(a[l], out=h)
            if fixed is None:
                g_h = torch.addmm(b_out, h, w_out.T).softmax(1).neg_() @ w_out
                g_h = g_h if some is None else torch.where(some, g_h, chosen)
            else:
                g_h = fixed
            for l in range(L, -1, -1):
                torch.ops.aten.silu_backward.grad_input(g_h, a[l], grad_input=g)
                g_h = torch.mm(g, back[l], out=h if l else g_phi)
            g_x = torch.addmm(g_phi[:, :D], slope.mul_(g_phi[:, D:]), frequencies.T).add_(x, alpha=base)
            if clip is not None:
                g_x.clamp_(-clip, clip)
            x.sub_(g_x, alpha=A)
            if B:
                x.add_(z[k], alpha=B)
            if bound is not None:
                x.clamp_(-bound, bound)
        if stop.is_set():
            return


def _chain_torch(x, network, coefficients, seed, y, first, base, clip, bound) -> Tensor:
    N, H = len(x), len(network[3])
    out = x.clone(memory_format=torch.contiguous_format)
    stop, threads = threading.Event(), torch.get_num_threads()
    tile = max(1, N) if x.is_cuda else max(64, 65536 // H)              # five buffers of 0.25 MB: a core's L2
    if N <= tile * threads and not x.is_cuda:
        tile = max(1, -(-N // threads))
    table, starts = coefficients.tolist(), range(0, N, tile)
    # one thread a tile, as in diffusion.py: nobody waits at a barrier twenty times a step
    pool = None if x.is_cuda or threads == 1 or len(starts) == 1 else ThreadPoolExecutor(threads)

    def work(row):
        with torch.inference_mode():
            if pool:
                torch.set_num_threads(1)
            labels = None if y is None else y[row : row + tile]
            _chain_tile(out[row : row + tile], row, network, labels, table, seed, first, base, clip, bound, stop)

    if pool is None:
        for row in starts:
            work(row)
        return out
    try:
        for done in [pool.submit(work, row) for row in starts]:
            done.result()
    finally:
        stop.set()                                                      # Ctrl-C: the tiles end at their next block
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    return out


def _step_torch(x, g, A, B, seed, step, clip, bound) -> Tensor:
    new = torch.sub(x, g if clip is None else g.clamp(-clip, clip), alpha=A).contiguous()
    if B:
        flat, block = new.view(-1), 65536
        step = torch.tensor([step & rng.MASK], device=x.device)
        for i in range(0, len(flat), block):
            part = flat[i : i + block]
            groups = torch.arange(i // 4, (i + len(part) + 3) // 4, device=x.device)
            z = rng.normal_block(groups, 4, step, seed, rng.STEP).flatten()[: len(part)]
            part.add_(z.to(x.dtype), alpha=B)
    return new if bound is None else new.clamp_(-bound, bound)


# ---- public


def _check_chain(x, network, coefficients, y):
    if x.ndim != 2 or len(network) != 8 or network[0].ndim != 2 or network[2].ndim != 2 or network[6].ndim != 2:
        raise ValueError(f"x (N, D) and a network of {', '.join(NAMES)} are wanted; got x {tuple(x.shape)} and "
                         f"{[tuple(w.shape) for w in network]}")
    (N, D), E, H, L, C = x.shape, network[0].shape[1], network[2].shape[0], len(network[4]), network[6].shape[0]
    want = ((D, E), (E,), (H, D + E), (H,), (L, H, H), (L, H), (C, H), (C,), (len(coefficients), 2), (N,))
    have = (*network, coefficients, y if y is not None else torch.empty(N))
    for name, shape, tensor in zip((*NAMES, "coefficients", "y"), want, have):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} for x {(N, D)}, {E} waves, {H} units, {L} hidden layers and {C} logits; "
                             f"got {tuple(tensor.shape)}")
    if y is not None and N and not -1 <= int(y.min()) <= int(y.max()) < C:
        raise ValueError(f"classes must be -1 (the sum over all) or 0 .. {C - 1}; got {int(y.min())} .. {int(y.max())}")


def langevin_chain(x, network, coefficients, seed, y=None, first=0, base=0.0, clip=None, bound=None) -> Tensor:
    """x (N, D) after S steps, from x; `network`: the eight tensors of NAMES; `seed`: an integer of up to 64 bits.

    `first` is the number of the first step in the noise stream: a chain cut in two, the second with first + S_1, equals
    the whole chain exactly. No gradients: call it under torch.no_grad(). On the CPU in the dtype of x."""
    refuse_gradients("langevin_chain", x, *network, coefficients)
    _check_chain(x, network, coefficients, y)
    return _chain_torch(x, network, coefficients, seed, y, first, base, clip, bound)


def langevin_step(x, g, A, B, seed, step, clip=None, bound=None) -> Tensor:
    """clamp(x - A clip(g) + B z), in the shape and dtype of x; noise of step `step`. No gradients."""
    refuse_gradients("langevin_step", x, g)
    if x.shape != g.shape:
        raise ValueError(f"x {tuple(x.shape)} and g {tuple(g.shape)} must have one shape")
    return _step_torch(x, g, float(A), float(B), seed, step, clip, bound)
