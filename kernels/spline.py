"""Monotone rational-quadratic splines [1], both ways, with the logarithm of the slope, in one pass, and their gradient.

    y = y_k + h (s xi^2 + d_k xi (1 - xi)) / beta,   beta = s + (d_k + d_k+1 - 2 s) xi (1 - xi),   xi = (x - x_k) / w
    dy/dx = s^2 n / beta^2,   n = d_k+1 xi^2 + 2 s xi (1 - xi) + d_k (1 - xi)^2,   s = h / w          [1] (4), (5)

Shapes: x (...), theta (..., 3 K - 1) -> y, log dy/dx (...). theta: K widths and K heights before their softmax, K - 1
inner slopes before their softplus; a bin is 1e-3 of the box at least, a slope 1e-3; zeros give the identity, and so
does everything outside [-bound, bound]. Inverse: y -> x, log dx/dy, by the stable root 2 c / (-b - sqrt(b^2 - 4 a c)).

What it saves. Eager autograd launches about 60 operations and twice that backward, a third of them on (N, K) matrices.
The kernel reads theta once and writes two numbers a row; backward it reads theta again and writes its gradient: nothing
of size N K is kept between them. On a CPU at the sizes of a flow in the plane an operation of PyTorch costs 4 to 11 us,
most of it dispatch, and NumPy's on the same memory 2 us: there the arithmetic of a row runs in NumPy, while softmax and
cumulative sums are one exponential and one product with a triangular matrix, along rows of N.

The gradient. With g = dL/dy, m = dL/dlog dy/dx, all partial derivatives are rational in xi, s, h, d_k, d_k+1. The left
knot is a sum of the bins before: softmax logits j < k share one number, bin k has its own, j > k a third. Inverse, by
dx = (dy - df/dtheta dtheta) / f': the same gradient, from other g and m. (No second derivatives.)

References: [1] Durkan et al., Neural Spline Flows, arXiv 1906.04032
"""

import functools
import math

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from ._runtime import backend, jit, tl, triton

LEAST = 1e-3                                                            # share of a bin, slope of a knot
UNIT = math.log(math.expm1(1 - LEAST))                                  # its softplus and LEAST are 1
SMALL = 8192                                                            # rows up to which NumPy is faster


# ---- definition


def rational_quadratic_reference(x, theta, bound, inverse=False) -> tuple[Tensor, Tensor]:
    """The definition, in any dtype, differentiable."""
    K = (theta.shape[-1] + 1) // 3
    sizes = 2 * bound * (LEAST + (1 - K * LEAST) * theta[..., : 2 * K].unflatten(-1, (2, K)).softmax(-1))
    knots = F.pad(sizes.cumsum(-1), (1, 0)) - bound
    slopes = F.pad(LEAST + F.softplus(theta[..., 2 * K :] + UNIT), (1, 1), value=1.0)
    inside = x.clamp(-bound, bound)
    k = (knots[..., int(inverse), 1:-1] <= inside[..., None]).sum(-1, keepdim=True)
    at = lambda table, k: table.gather(-1, k)[..., 0]
    x_k, y_k = at(knots[..., 0, :], k), at(knots[..., 1, :], k)
    w, h = at(sizes[..., 0, :], k), at(sizes[..., 1, :], k)
    d0, d1, s = at(slopes, k), at(slopes, k + 1), h / w
    bend = d0 + d1 - 2 * s
    if inverse:
        rise = inside - y_k
        a, b, c = h * (s - d0) + rise * bend, h * d0 - rise * bend, -s * rise
        xi = 2 * c / (-b - (b * b - 4 * a * c).clamp_min(0).sqrt())
    else:
        xi = (inside - x_k) / w
    t = xi * (1 - xi)
    beta = s + bend * t
    out = x_k + xi * w if inverse else y_k + h * (s * xi**2 + d0 * t) / beta
    log_slope = 2 * s.log() + (d1 * xi**2 + 2 * s * t + d0 * (1 - xi) ** 2).log() - 2 * beta.log()
    return torch.where(x == inside, out, x), torch.where(x == inside, -log_slope if inverse else log_slope, 0.0)


# ---- PyTorch and NumPy; all of it in the unit square, where xi and slopes are the same


@functools.cache
def _tables(K, dtype, device):
    """Cumulative sums with the floor of the bins as floor + before @ p, and the rows of what a bin needs."""
    before = torch.ones(K + 1, K, dtype=dtype, device=device).tril(-1) * (1 - K * LEAST)
    floor = torch.arange(K + 1, dtype=dtype, device=device)[:, None] * LEAST
    rows = torch.tensor([[0], [1], [K + 1], [K + 2], [2 * K - 1], [2 * K]], device=device)
    return before.expand(2, K + 1, K), floor, rows


def _arrays(*tensors):
    """NumPy and arrays of the same memory for few rows on a CPU, else torch and the tensors."""
    x = tensors[0]
    small = x.device.type == "cpu" and x.shape[-1] <= SMALL and x.dtype in (torch.float32, torch.float64)
    return (numpy, [t.numpy() for t in tensors]) if small else (torch, tensors)


class _Spline(torch.autograd.Function):
    """Of x (N,) and theta (N, 3 K - 1)."""

    @staticmethod
    def forward(ctx, x, theta, bound, inverse):
        N, K = len(x), (theta.shape[1] + 1) // 3
        before, floor, rows = _tables(K, x.dtype, x.device)
        theta = theta.t().contiguous()                                  # (3 K - 1, N): operations run along N
        logits = theta[: 2 * K].view(2, K, N)
        p = (logits - logits.amax(1, keepdim=True)).exp_()
        p /= p.sum(1, keepdim=True)
        knots = torch.baddbmm(floor, before, p)                         # (2, K + 1, N)
        u = torch.add(x, bound).mul_(0.5 / bound)
        v = u.clamp(0, 1)
        passed = torch.le(knots[int(inverse), 1:-1], v).to(x.dtype)     # (K - 1, N): the bins before that of x
        index = passed.sum(0).long() + rows                             # (6, N)
        ends = knots.view(2 * K + 2, N).gather(0, index[:4])
        raw = theta.gather(0, index[4:].clamp_(max=3 * K - 2)).add_(UNIT) if K > 1 else x.new_zeros(2, N)
        d, k, l = F.softplus(raw).add_(LEAST), index[0], x
        f, (x, u, v, (x_k, x_1, y_k, y_1), (d0, d1), k) = _arrays(x, u, v, ends, d, k)
        d0[k == 0], d1[k == K - 1] = 1.0, 1.0
        w, h = x_1 - x_k, y_1 - y_k
        s = h / w
        bend = d0 + d1 - (s + s)                                        # sums, where a scalar would cost more
        if inverse:
            rise = v - y_k
            fall, up = rise * bend, s * rise
            b = h * d0 - fall
            square = b * b + 4 * (h * (s - d0) + fall) * up
            square[square < 0] = 0
            xi = (up + up) / (b + f.sqrt(square))
        else:
            xi = (v - x_k) / w
        rest = 1 - xi
        t = xi * rest
        st = s * t
        alpha, beta, n = s * xi * xi + d0 * t, s + bend * t, d1 * xi * xi + (st + st) + d0 * rest * rest
        ratio = s / beta
        slope = ratio * ratio * n
        out, l = (x_k + xi * w if inverse else y_k + h * alpha / beta) * (2 * bound) - bound, f.log(slope)
        l = -l if inverse else l
        outside = u != v
        out[outside], l[outside] = x[outside], 0
        ctx.rows = w, h, d0, d1, xi, rest, t, alpha, beta, n, s, bend, slope, outside, x_k, y_k, k
        ctx.save_for_backward(p, passed, index, raw)
        ctx.bound, ctx.inverse = bound, inverse
        return (torch.from_numpy(out), torch.from_numpy(l)) if f is numpy else (out, l)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_out, g_l):
        p, passed, index, raw = ctx.saved_tensors
        w, h, d0, d1, xi, rest, t, alpha, beta, n, s, bend, slope, outside, x_k, y_k, k = ctx.rows
        (_, K, N), bound, c = p.shape, ctx.bound, 1 - p.shape[1] * LEAST
        g_theta, table = p.new_zeros(3 * K - 1, N), p.new_empty(8, N)
        f, (g_out, m, rows) = _arrays(g_out.contiguous(), g_l.contiguous(), table)
        turn = rest - xi
        half = (d1 * xi - d0 * rest + s * turn) / n - bend * turn / beta    # d (log slope) / d xi, halved
        g = g_out * (2 * bound)
        if ctx.inverse:
            g_in = (g - (m + m) * half / w) / slope
            g, m = -g_in, -m
        q, b, gh, ratio, two = m / n, m / beta, g * h / beta, alpha / beta, 1 - (t + t)
        g_s = gh * (xi * xi - ratio * two) + 2 * (m / s + q * t - b * two)
        gr, bt = gh * ratio, 2 * b * t
        g_d0, g_d1 = q * rest * rest + (gh - gr) * t - bt, q * xi * xi - gr * t - bt
        g_d0[k == 0], g_d1[k == K - 1] = 0, 0
        g_x, g_s = g * slope + (m + m) * half / w, g_s / w
        g_in = g_in if ctx.inverse else g_x
        g_w, g_h = -(g_x * xi + g_s * s), g_s + g * ratio
        mean_w = g_w * (w - LEAST) - g_x * (x_k - k * LEAST)            # c sum_j p_j g_j: of the softmax's gradient
        mean_h = g_h * (h - LEAST) + g * (y_k - k * LEAST)
        rows[0], rows[1], rows[2], rows[3] = -c * g_x - mean_w, c * g - mean_h, -mean_w, -mean_h
        rows[4], rows[5] = (w - LEAST) * (g_w - mean_w / c), (h - LEAST) * (g_h - mean_h / c)
        rows[6], rows[7] = g_d0, g_d1
        rows[:, outside] = 0
        logits = g_theta[: 2 * K].view(2, K, N)
        torch.addcmul(table[2:4, None], passed, (table[:2] - table[2:4])[:, None], out=logits[:, : K - 1])
        logits[:, K - 1] = table[2:4]
        logits *= p
        g_theta.scatter_(0, torch.stack([index[0], index[0] + K]), table[4:6])
        if K > 1:
            g_theta.scatter_add_(0, index[4:], table[6:] * raw.sigmoid())
        g_in = g_in * (0.5 / bound)
        g_in[outside] = g_out[outside]
        return torch.from_numpy(g_in) if f is numpy else g_in, g_theta.t(), None, None


# ---- Triton


@jit()
def softmax_tile(ptr, at, live, bins, K: tl.constexpr, FLOOR: tl.constexpr):
    """Probabilities and sizes of the bins, [BN, BK], in the unit square; 0 from column K on."""
    a = tl.load(ptr + at, mask=live & bins, other=0.0).to(tl.float32)
    a = tl.where(bins, a, float("-inf"))
    e = tl.exp(a - tl.max(a, 1)[:, None])
    p = e / tl.sum(e, 1)[:, None]
    return p, tl.where(bins, FLOOR + (1 - K * FLOOR) * p, 0.0)


@jit()
def slope_of(ptr, at, here, UNIT: tl.constexpr, FLOOR: tl.constexpr):
    """Slope of a knot and its derivative by the raw number; 1 and 0 at the ends."""
    r = tl.load(ptr + at, mask=here, other=0.0).to(tl.float32) + UNIT
    e = tl.exp(-tl.abs(r))
    d = tl.maximum(r, 0.0) + tl.log(1 + e) + FLOOR
    sigmoid = tl.where(r >= 0, 1 / (1 + e), e / (1 + e))
    return tl.where(here, d, 1.0), tl.where(here, sigmoid, 0.0)


@jit(do_not_specialize=["n"])
def spline_kernel(x_ptr, theta_ptr, out_ptr, log_ptr, g_ptr, m_ptr, g_x_ptr, g_theta_ptr, n, bound,
                  K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, INVERSE: tl.constexpr, BACK: tl.constexpr,
                  UNIT: tl.constexpr, FLOOR: tl.constexpr):
    """One program: BN rows. BACK: g_out and g_l in, gradients of x and theta out, all else computed again."""
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)        # [BN]
    j = tl.arange(0, BK)                                                # [BK]
    live = rows < n
    here = live[:, None] & (j < K)[None, :]
    at = rows[:, None] * (3 * K - 1) + j[None, :]
    p, width = softmax_tile(theta_ptr, at, live[:, None], (j < K)[None, :], K, FLOOR)
    q, height = softmax_tile(theta_ptr, at + K, live[:, None], (j < K)[None, :], K, FLOOR)      # [BN, BK]
    x_end, y_end = tl.cumsum(width, 1), tl.cumsum(height, 1)
    x = tl.load(x_ptr + rows, mask=live, other=0.0).to(tl.float32)
    u = (x + bound) * (0.5 / bound)
    v = tl.minimum(tl.maximum(u, 0.0), 1.0)
    ends = y_end if INVERSE else x_end
    before = (ends <= v[:, None]) & (j < K - 1)[None, :]
    k = tl.sum(before.to(tl.int32), 1)                                  # [BN]
    own = j[None, :] == k[:, None]
    w, h = tl.sum(tl.where(own, width, 0.0), 1), tl.sum(tl.where(own, height, 0.0), 1)
    x_k = tl.sum(tl.where(j[None, :] < k[:, None], width, 0.0), 1)
    y_k = tl.sum(tl.where(j[None, :] < k[:, None], height, 0.0), 1)
    knot = rows * (3 * K - 1) + 2 * K + k
    d0, t0 = slope_of(theta_ptr, knot - 1, live & (k > 0), UNIT, FLOOR)
    d1, t1 = slope_of(theta_ptr, knot, live & (k < K - 1), UNIT, FLOOR)
    s = h / w
    bend = d0 + d1 - 2 * s
    if INVERSE:
        rise = v - y_k
        b = h * d0 - rise * bend
        square = b * b + 4 * (h * (s - d0) + rise * bend) * s * rise
        xi = 2 * s * rise / (b + tl.sqrt(tl.maximum(square, 0.0)))
    else:
        xi = (v - x_k) / w
    rest = 1 - xi
    t = xi * rest
    alpha = s * xi * xi + d0 * t
    beta = s + bend * t
    top = d1 * xi * xi + 2 * s * t + d0 * rest * rest
    slope = s * s * top / (beta * beta)
    outside = u != v
    if BACK:
        g_out = tl.load(g_ptr + rows, mask=live, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + rows, mask=live, other=0.0).to(tl.float32)
        turn = rest - xi
        half = (d1 * xi - d0 * rest + s * turn) / top - bend * turn / beta
        g = g_out * (2 * bound)
        if INVERSE:
            g_in = (g - 2 * m * half / w) / slope
            g = -g_in
            m = -m
        two = 1 - 2 * t
        gh, ratio = g * h / beta, alpha / beta
        g_s = (gh * (xi * xi - ratio * two) + 2 * (m / s + m * t / top - m * two / beta)) / w
        bt = 2 * m * t / beta
        g_d0 = m * rest * rest / top + gh * (1 - ratio) * t - bt
        g_d1 = m * xi * xi / top - gh * ratio * t - bt
        g_x = g * slope + 2 * m * half / w
        if not INVERSE:
            g_in = g_x
        g_w, g_h = -(g_x * xi + g_s * s), g_s + g * ratio
        keep = tl.where(outside, 0.0, 1.0)
        a = tl.where(before, -g_x[:, None], tl.where(own, g_w[:, None], 0.0)) * keep[:, None]
        a = (1 - K * FLOOR) * p * (a - tl.sum(p * a, 1)[:, None])
        tl.store(g_theta_ptr + at, a, mask=here)
        a = tl.where(before, g[:, None], tl.where(own, g_h[:, None], 0.0)) * keep[:, None]
        a = (1 - K * FLOOR) * q * (a - tl.sum(q * a, 1)[:, None])
        tl.store(g_theta_ptr + at + K, a, mask=here)
        inner = live[:, None] & (j < K - 1)[None, :]
        a = tl.where(j[None, :] == k[:, None] - 1, (g_d0 * t0 * keep)[:, None], 0.0)
        a += tl.where(own, (g_d1 * t1 * keep)[:, None], 0.0)
        tl.store(g_theta_ptr + at + 2 * K, a, mask=inner)
        tl.store(g_x_ptr + rows, tl.where(outside, g_out, g_in * (0.5 / bound)), mask=live)
    else:
        out = x_k + xi * w if INVERSE else y_k + h * alpha / beta
        l = tl.log(slope)
        if INVERSE:
            l = -l
        tl.store(out_ptr + rows, tl.where(outside, x, out * (2 * bound) - bound), mask=live)
        tl.store(log_ptr + rows, tl.where(outside, 0.0, l), mask=live)


# ---- launchers: a static table, no autotune


def spline_config(K: int) -> dict:
    """About 1,024 numbers of each matrix a program, 8 a thread: with 16 the gradient of 32 bins spills 2 kB."""
    BK = max(2, 1 << (K - 1).bit_length())
    return dict(BK=BK, BN=max(8, 1024 // BK), num_warps=4)


def _launch(x, theta, bound, inverse, grads=None):
    N, K = len(x), (theta.shape[1] + 1) // 3
    config, constants = spline_config(K), dict(K=K, INVERSE=inverse, BACK=grads is not None, UNIT=UNIT, FLOOR=LEAST)
    one, two = x.new_empty(N), theta.new_empty(N, 3 * K - 1) if grads else x.new_empty(N)
    g, m = grads or (x, x)
    if N:
        spline_kernel[(triton.cdiv(N, config["BN"]),)](x, theta, one, two, g, m, one, two, N, bound,
                                                       enable_fp_fusion=True, **config, **constants)
    return one, two


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, theta, bound, inverse):
        x, theta = x.contiguous(), theta.contiguous()
        ctx.save_for_backward(x, theta)
        ctx.bound, ctx.inverse = bound, inverse
        return _launch(x, theta, bound, inverse)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_out, g_l):
        g_x, g_theta = _launch(*ctx.saved_tensors, ctx.bound, ctx.inverse, (g_out.contiguous(), g_l.contiguous()))
        return g_x, g_theta, None, None


# ---- public


def rational_quadratic(x, theta, bound, inverse=False) -> tuple[Tensor, Tensor]:
    """y and log dy/dx of x (...) by theta (..., 3 K - 1); inverse: x and log dx/dy of y. First derivatives only."""
    K = (theta.shape[-1] + 1) // 3
    if theta.shape[:-1] != x.shape or theta.shape[-1] != 3 * K - 1 or not 1 <= K <= 500 or not 0 < bound < math.inf:
        raise ValueError(f"x (...) and theta (..., 3 K - 1) with K of 1 to 500 and a bound above 0 are wanted; got "
                         f"{tuple(x.shape)}, {tuple(theta.shape)}, {bound}")
    wide = torch.promote_types(x.dtype, theta.dtype)
    x, theta = x.to(wide), theta.to(wide)
    fits = wide == torch.float32 and K <= 64
    why_not = "" if fits else f"{x.dtype}, K = {K}; it takes float32 and K <= 64"
    function = _Fused if backend(x, why_not) == "triton" else _Spline
    out, log_slope = function.apply(x.reshape(-1), theta.reshape(-1, 3 * K - 1), float(bound), bool(inverse))
    return out.view(x.shape), log_slope.view(x.shape)
