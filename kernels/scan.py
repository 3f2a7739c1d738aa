"""The selective scan of Mamba, forward and backward, with one state in registers.

    h_t = exp(dt_t A) h_t-1 + dt_t x_t B_t,    y_t = C_t . h_t   (Gu, Dao, arXiv 2312.00752, section 3.2, as its code)

Shapes: x, dt (n, T, E), A (E, N), B, C (n, T, N), h (n, E, N) the state before, or None for zero: y (n, T, E) and the
last state (n, E, N). With g_t the gradient of h_t and a_t = exp(dt_t A):

    g_t = dy_t C_t + a_t+1 g_t+1,   dC_t = sum_e dy_t h_t,   dB_t = sum_e dt_t x_t g_t,   w_t = g_t h_t-1 a_t
    dA = sum_t dt_t w_t,   dx_t = dt_t (g_t . B_t),   d dt_t = x_t (g_t . B_t) + sum_n A w_t

What it saves. Eager, a step is five operations, and all T states of E x N numbers go through memory; here a program
keeps the state of a block of channels and walks through time: x, dt, B, C are read and y is written, nothing else. For
the backward pass the state before every chunk of steps is kept, T / chunk of them; the chunk is walked again, its
states left in a scratch that stays in cache, and then walked backwards. Time is turned by the index, not by a reverse
associative scan (triton#4362), and no product of decays is ever divided by: it is 0 in float32 after a hundred steps.

On a CPU: one operation a step over all of n x E x N, in place, and a backward pass written by hand in the same way. A
scan that is parallel over chunks, igpt.py's when it stands alone, does twice the work and takes 1.4 to 2 times as long.

Limits. float32 inside; half precisions are widened on the way in. The sums over channels of dB and dC are left by block
and added in PyTorch, so that a run repeats to the bit. Differentiable once; float64 runs in PyTorch.
"""

import torch
from torch import Tensor

from ._runtime import backend, jit, tl, triton

# ---- definition


def selective_scan_reference(x, dt, A, B, C, h=None) -> tuple[Tensor, Tensor]:
    h = x.new_zeros(len(x), *A.shape) if h is None else h
    out = []
    for t in range(x.shape[1]):
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        out.append((h * C[:, t, None]).sum(-1))
    return torch.stack(out, 1), h


# ---- PyTorch: a step is one operation


class ScanTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, h):
        x, dt, B, C = (v.transpose(0, 1) for v in (x, dt, B, C))        # time first
        a = (dt[..., None] * A).exp_()                                  # (T, n, E, N)
        states = (dt * x)[..., None] * B[:, :, None]
        states[0].addcmul_(a[0], h)
        decay, state = a.unbind(), states.unbind()
        for t in range(1, len(state)):
            state[t].addcmul_(decay[t], state[t - 1])
        ctx.save_for_backward(x, dt, A, B, C, h, a, states)
        y = (states @ C[..., None])[..., 0]
        return y.transpose(0, 1).contiguous(), states[-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh):
        x, dt, A, B, C, h, a, states = ctx.saved_tensors
        dy = dy.transpose(0, 1)
        g = dy[..., None] * C[:, :, None]                               # (T, n, E, N)
        g[-1].add_(dh)
        decay, pull = a.unbind(), g.unbind()
        for t in range(len(pull) - 2, -1, -1):
            pull[t].addcmul_(decay[t + 1], pull[t + 1])
        dC = (dy[:, :, None] @ states)[:, :, 0]
        dB = ((dt * x)[:, :, None] @ g)[:, :, 0]
        gB = (g @ B[..., None])[..., 0]
        dh_0 = a[0] * g[0]
        g[1:].mul_(states[:-1])
        g[0].mul_(h)
        w = g.mul_(a)                                                   # g_t h_t-1 a_t
        dA = (w * dt[..., None]).sum((0, 1))
        back = (v.transpose(0, 1) for v in (dt * gB, x * gB + (w * A).sum(-1)))
        return *back, dA, dB.transpose(0, 1), dC.transpose(0, 1), dh_0


# ---- Triton


@jit()
def scan_step(h, decay, x_ptr, dt_ptr, B_ptr, t, T, e, n, E: tl.constexpr, N: tl.constexpr):
    """The state [BE, BN] after step t, and what it read. Beyond T dt is 0: nothing changes."""
    here = (e < E) & (t + 0 * e < T)                                 # a scalar t < T is no mask in the interpreter
    x = tl.load(x_ptr + t * E + e, mask=here, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + t * E + e, mask=here, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + t * N + n, mask=(n < N) & (t + 0 * n < T), other=0.0).to(tl.float32)
    a = tl.exp2(dt[:, None] * decay)
    return a * h + (dt * x)[:, None] * B[None, :], a, x, dt, B


@jit(do_not_specialize=["T", "chunks"])
def scan_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, h_ptr, y_ptr, last_ptr, kept_ptr, T, chunks, E: tl.constexpr,
                N: tl.constexpr, CT: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, KEEP: tl.constexpr):
    """One program: BE channels of one example through all of time; KEEP: the state before every CT steps is stored."""
    b = tl.program_id(1).to(tl.int64)
    e, n = tl.program_id(0) * BE + tl.arange(0, BE), tl.arange(0, BN)
    inside = (e < E)[:, None] & (n < N)[None, :]
    at = e[:, None] * N + n[None, :]                                    # [BE, BN]
    decay = tl.load(A_ptr + at, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
    h = tl.load(h_ptr + b * (E * N) + at, mask=inside, other=0.0).to(tl.float32)
    x_ptr += b * T * E
    dt_ptr += b * T * E
    y_ptr += b * T * E
    B_ptr += b * T * N
    C_ptr += b * T * N
    for c in range(chunks):
        if KEEP:
            tl.store(kept_ptr + (b * chunks + c) * (E * N) + at, h, mask=inside)
        for i in range(CT):
            t = c * CT + i
            h, a, x, dt, B = scan_step(h, decay, x_ptr, dt_ptr, B_ptr, t, T, e, n, E, N)
            C = tl.load(C_ptr + t * N + n, mask=(n < N) & (t + 0 * n < T), other=0.0).to(tl.float32)
            tl.store(y_ptr + t * E + e, tl.sum(h * C[None, :], 1), mask=(e < E) & (t + 0 * e < T))
    tl.store(last_ptr + b * (E * N) + at, h, mask=inside)


@jit(do_not_specialize=["T", "chunks"])
def scan_back_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, dy_ptr, dlast_ptr, kept_ptr, walk_ptr, dx_ptr, ddt_ptr, dA_ptr,
                     dB_ptr, dC_ptr, dh_ptr, T, chunks, E: tl.constexpr, N: tl.constexpr, CT: tl.constexpr,
                     BE: tl.constexpr, BN: tl.constexpr):
    """One program: BE channels of one example, chunk by chunk from the end: forward from the kept state, then back."""
    b = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    e, n = block * BE + tl.arange(0, BE), tl.arange(0, BN)
    inside = (e < E)[:, None] & (n < N)[None, :]
    at = e[:, None] * N + n[None, :]                                    # [BE, BN]
    A = tl.load(A_ptr + at, mask=inside, other=0.0).to(tl.float32)
    decay = A * 1.4426950408889634
    g = tl.load(dlast_ptr + b * (E * N) + at, mask=inside, other=0.0).to(tl.float32)
    dA = tl.zeros((BE, BN), tl.float32)
    x_ptr += b * T * E
    dt_ptr += b * T * E
    dy_ptr += b * T * E
    dx_ptr += b * T * E
    ddt_ptr += b * T * E
    B_ptr += b * T * N
    C_ptr += b * T * N
    dB_ptr += (block * tl.num_programs(1) + b) * T * N                  # a sum over channels: each block its own
    dC_ptr += (block * tl.num_programs(1) + b) * T * N
    walk_ptr += b * CT * (E * N)
    for k in range(chunks):
        c = chunks - 1 - k
        h = tl.load(kept_ptr + (b * chunks + c) * (E * N) + at, mask=inside, other=0.0)
        for i in range(CT):
            tl.store(walk_ptr + i * (E * N) + at, h, mask=inside)       # the state before step i
            h, a, x, dt, B = scan_step(h, decay, x_ptr, dt_ptr, B_ptr, c * CT + i, T, e, n, E, N)
        tl.debug_barrier()
        for back in range(CT):
            i = CT - 1 - back
            t = c * CT + i
            before = tl.load(walk_ptr + i * (E * N) + at, mask=inside, other=0.0)
            h, a, x, dt, B = scan_step(before, decay, x_ptr, dt_ptr, B_ptr, t, T, e, n, E, N)
            rows, columns = (e < E) & (t + 0 * e < T), (n < N) & (t + 0 * n < T)
            C = tl.load(C_ptr + t * N + n, mask=columns, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + t * E + e, mask=rows, other=0.0).to(tl.float32)
            g += dy[:, None] * C[None, :]
            gB = tl.sum(g * B[None, :], 1)
            w = g * before * a
            dA += dt[:, None] * w
            tl.store(dx_ptr + t * E + e, dt * gB, mask=rows)
            tl.store(ddt_ptr + t * E + e, x * gB + tl.sum(w * A, 1), mask=rows)
            tl.store(dB_ptr + t * N + n, tl.sum((dt * x)[:, None] * g, 0), mask=columns)
            tl.store(dC_ptr + t * N + n, tl.sum(dy[:, None] * h, 0), mask=columns)
            g = g * a
        tl.debug_barrier()
    tl.store(dA_ptr + b * (E * N) + at, dA, mask=inside)
    tl.store(dh_ptr + b * (E * N) + at, g, mask=inside)


# ---- launchers


def scan_config(N: int) -> dict:
    """16 states of 32 channels are 16 numbers a lane of one warp; more states, fewer channels."""
    BN = max(2, 1 << (N - 1).bit_length())
    return dict(CT=32, BE=max(4, 512 // BN), BN=BN, num_warps=1)


class ScanTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, h):
        (n, T, E), N, config = x.shape, A.shape[1], scan_config(A.shape[1])
        x, dt, A, B, C, h = (v.contiguous() for v in (x, dt, A, B, C, h))
        chunks, keep = triton.cdiv(T, config["CT"]), any(ctx.needs_input_grad)
        y, last = x.new_empty(n, T, E, dtype=torch.float32), x.new_empty(n, E, N, dtype=torch.float32)
        kept = x.new_empty(n, chunks if keep else 1, E, N, dtype=torch.float32)
        scan_kernel[(triton.cdiv(E, config["BE"]), n)](x, dt, A, B, C, h, y, last, kept, T, chunks, E=E, N=N, KEEP=keep,
                                                       enable_fp_fusion=True, **config)
        ctx.save_for_backward(x, dt, A, B, C, kept)
        ctx.state = h.dtype
        return y.to(x.dtype), last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, kept = ctx.saved_tensors
        (n, T, E), N, config = x.shape, A.shape[1], scan_config(A.shape[1])
        blocks, chunks = triton.cdiv(E, config["BE"]), kept.shape[1]
        empty = lambda *shape: x.new_empty(shape, dtype=torch.float32)
        walk, dx, ddt = empty(n, config["CT"], E, N), empty(n, T, E), empty(n, T, E)
        dA, dB, dC, dh = empty(n, E, N), empty(blocks, n, T, N), empty(blocks, n, T, N), empty(n, E, N)
        scan_back_kernel[(blocks, n)](x, dt, A, B, C, dy.contiguous(), dlast.contiguous(), kept, walk, dx, ddt, dA, dB,
                                      dC, dh, T, chunks, E=E, N=N, enable_fp_fusion=True, **config)
        grads = dx.to(x.dtype), ddt.to(dt.dtype), dA.sum(0).to(A.dtype), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)
        return *grads, dh.to(ctx.state)


# ---- public


def selective_scan(x, dt, A, B, C, h=None) -> tuple[Tensor, Tensor]:
    """y (n, T, E) and the state after the last step (n, E, N); differentiable once. ValueError for shapes that are not
    x, dt (n, T, E), A (E, N), B, C (n, T, N), h (n, E, N) with T > 0."""
    shapes = [tuple(v.shape) for v in (x, dt, A, B, C)]
    n, T, E = x.shape if x.ndim == 3 else (0, 0, 0)
    N = A.shape[-1]
    if not T or shapes != [(n, T, E), (n, T, E), (E, N), (n, T, N), (n, T, N)] \
            or h is not None and tuple(h.shape) != (n, E, N):
        raise ValueError("x, dt (n, T, E), A (E, N), B, C (n, T, N) and a state (n, E, N) with T > 0 are wanted; got "
                         + ", ".join(map(str, shapes + ([] if h is None else [tuple(h.shape)]))))
    h = x.new_zeros(n, E, N, dtype=dt.dtype) if h is None else h
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    why_not = "" if x.dtype in kinds and dt.dtype in kinds else f"{x.dtype}, and the kernel takes float32 and less"
    if backend(x, why_not) == "triton":
        return ScanTriton.apply(x, dt, A, B, C, h)
    wide = torch.promote_types(dt.dtype, torch.float32)
    y, h = ScanTorch.apply(*(v.to(wide) for v in (x, dt, A, B, C, h)))
    return y.to(x.dtype), h
