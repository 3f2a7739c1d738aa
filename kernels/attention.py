"""Causal attention, forward and backward, without the matrix of weights; and one query against a cache.

    o_i = sum_j p_ij v_j,   p_ij = exp(q_i . k_j / sqrt(D) - lse_i),   j <= i + T - S
    dv_j = sum_i p_ij do_i,   ds_ij = p_ij (do_i . v_j - do_i . o_i),   dq = ds k / sqrt(D),   dk = ds^T q / sqrt(D)

Shapes: q (B, H, S, D), k and v (B, H, T, D), S <= T: the queries are the last S of T places. D from 16 to 128.
Decoding: q (B, H, D), k (B, H, D, T) transposed, v (B, H, T, D), and how many places are filled: (B, H, D).

What it saves. Eager attention writes and reads S x T weights about five times; here a tile of queries stays and tiles
of keys pass, with a running maximum and sum (Milakov, Gimelshein, arXiv 1805.02867; Dao, arXiv 2307.08691), and half of
the tiles, those of the future, are never visited. The backward pass makes the weights again from q, k and lse: one
kernel keeps a tile of keys and sums dk and dv, one keeps a tile of queries and sums dq, so there are no atomics and a
run repeats to the bit. A single query has no tile to fill: there the cache is cut into splits, one program each, and a
second kernel merges them. It reads what is filled and no more, where a masked static cache is read whole, and takes the
length from device memory, so that a token's step can be a CUDA graph.

Limits. No dropout, no other mask, no second derivative. float32, float16, bfloat16; float64 and other shapes run in
PyTorch. On a CPU PyTorch's own attention is used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._runtime import AMD, backend, jit, refuse_gradients, tl, triton

LOG2E = 1.4426950408889634

# ---- definition


def causal_attention_reference(q, k, v) -> Tensor:
    S, T, D = q.shape[2], k.shape[2], q.shape[3]
    future = torch.ones(S, T, dtype=torch.bool, device=q.device).triu(T - S + 1)
    return (q @ k.mT * D**-0.5).masked_fill(future, -torch.inf).softmax(-1) @ v


def decode_attention_reference(q, k, v, length) -> Tensor:
    k, v = k[..., : int(length)], v[:, :, : int(length)]
    return ((q[:, :, None] @ k * q.shape[-1] ** -0.5).softmax(-1) @ v)[:, :, 0]


# ---- PyTorch


def _attention_torch(q, k, v) -> Tensor:
    S, T = q.shape[2], k.shape[2]
    if S == T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(T - S)
    return F.scaled_dot_product_attention(q, k, v, mask)


def _decode_torch(q, k, v, length) -> Tensor:
    B, H, D = q.shape
    k, v = k.flatten(0, 1)[..., : int(length)], v.flatten(0, 1)[:, : int(length)]
    weights = torch.bmm(q.reshape(B * H, 1, D) * D**-0.5, k).softmax(-1)
    return torch.bmm(weights, v).view(B, H, D)


# ---- Triton


@jit()
def rows_of(ptr, rows, here, d, stride, D: tl.constexpr):
    """[rows, BD] of a matrix with contiguous rows, zero outside."""
    at = rows.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(ptr + at, mask=here[:, None] & (d < D)[None, :], other=0.0)


@jit()
def attend(acc, m, l, q, k_ptr, v_ptr, place, start, stop, T, stride_k, stride_v, scale, D: tl.constexpr,
           BN: tl.constexpr, BD: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """Keys start .. stop pass by a tile of queries; MASK where some of them are in the future of some query."""
    d = tl.arange(0, BD)
    for at in range(start, stop, BN):
        j = at + tl.arange(0, BN)                                       # [BN]
        k = rows_of(k_ptr, j, j < T, d, stride_k, D)                    # [BN, BD]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale   # [BM, BN], base 2
        if MASK:
            s = tl.where(j[None, :] <= place[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        l = l * shrink + tl.sum(p, 1)
        v = rows_of(v_ptr, j, j < T, d, stride_v, D)
        acc = tl.dot(p.to(v.dtype), v, acc=acc * shrink[:, None], input_precision=PRECISION)
        m = m_new
    return acc, m, l


@jit(do_not_specialize=["S", "T"])
def attention_kernel(q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, S, T, heads, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
                     scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                     PRECISION: tl.constexpr):
    """One program: BM queries of one head against all keys up to the last of them."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM            # the longest first
    i, d = first + tl.arange(0, BM), tl.arange(0, BD)
    q = rows_of(q_ptr + b * q_b + h * q_h, i, i < S, d, q_t, D)         # [BM, BD]
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    past = T - S
    acc = tl.zeros((BM, BD), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    clear = (first + past + 1) // BN * BN                               # keys that every query of the tile sees
    stop = tl.minimum(first + BM + past, T)
    acc, m, l = attend(acc, m, l, q, k_ptr, v_ptr, i + past, 0, clear, T, k_t, v_t, scale, D, BN, BD, False, PRECISION)
    acc, m, l = attend(acc, m, l, q, k_ptr, v_ptr, i + past, clear, stop, T, k_t, v_t, scale, D, BN, BD, True,
                       PRECISION)
    at = bh * S + i
    tl.store(lse_ptr + at, m + tl.log2(l), mask=i < S)                  # base 2
    o = acc / l[:, None]
    tl.store(o_ptr + at[:, None] * D + d[None, :], o.to(o_ptr.dtype.element_ty),
             mask=(i < S)[:, None] & (d < D)[None, :])


@jit()
def pull_keys(dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, j, start, stop, S, past, stride_q, stride_do, scale,
              D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """Queries start .. stop pass by a tile of keys. All is transposed: [BN, BM]."""
    d = tl.arange(0, BD)
    for at in range(start, stop, BM):
        i = at + tl.arange(0, BM)
        q = rows_of(q_ptr, i, i < S, d, stride_q, D)                    # [BM, BD]
        do = rows_of(do_ptr, i, i < S, d, stride_do, D)
        lse = tl.load(lse_ptr + i, mask=i < S, other=float("inf"))      # no query: p = 0
        delta = tl.load(delta_ptr + i, mask=i < S, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])
        if MASK:
            p = tl.where(j[:, None] <= i[None, :] + past, p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, acc=dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, acc=dk, input_precision=PRECISION)
    return dk, dv


@jit(do_not_specialize=["S", "T"])
def keys_kernel(q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, S, T, heads, q_b, q_h, q_t,
                k_b, k_h, k_t, v_b, v_h, v_t, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                BD: tl.constexpr, PRECISION: tl.constexpr):
    """One program: dk and dv of BN keys of one head, from all queries that see them."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    first, past = tl.program_id(0) * BN, T - S
    j, d = first + tl.arange(0, BN), tl.arange(0, BD)
    k = rows_of(k_ptr + b * k_b + h * k_h, j, j < T, d, k_t, D)         # [BN, BD]
    v = rows_of(v_ptr + b * v_b + h * v_h, j, j < T, d, v_t, D)
    q_ptr += b * q_b + h * q_h
    do_ptr += bh * S * D
    lse_ptr += bh * S
    delta_ptr += bh * S
    dk, dv = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BD), tl.float32)
    start = tl.maximum(first - past, 0) // BM * BM                      # earlier queries see none of these keys
    clear = (tl.maximum(first + BN - 1 - past, 0) + BM - 1) // BM * BM  # from here on each sees all of them
    clear = tl.minimum(clear, (S + BM - 1) // BM * BM)
    dk, dv = pull_keys(dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, j, start, clear, S, past, q_t, D, scale,
                       D, BM, BD, True, PRECISION)
    dk, dv = pull_keys(dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, j, clear, S, S, past, q_t, D, scale,
                       D, BM, BD, False, PRECISION)
    at = (bh * T + j)[:, None] * D + d[None, :]
    here = (j < T)[:, None] & (d < D)[None, :]
    tl.store(dk_ptr + at, (dk * (scale / 1.4426950408889634)).to(dk_ptr.dtype.element_ty), mask=here)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=here)


@jit()
def pull_queries(dq, q, do, lse, delta, k_ptr, v_ptr, place, start, stop, T, stride_k, stride_v, scale,
                 D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr):
    d = tl.arange(0, BD)
    for at in range(start, stop, BN):
        j = at + tl.arange(0, BN)
        k = rows_of(k_ptr, j, j < T, d, stride_k, D)                    # [BN, BD]
        v = rows_of(v_ptr, j, j < T, d, stride_v, D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None]
        if MASK:
            s = tl.where(j[None, :] <= place[:, None], s, float("-inf"))
        ds = tl.exp2(s) * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, acc=dq, input_precision=PRECISION)
    return dq


@jit(do_not_specialize=["S", "T"])
def queries_kernel(q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, S, T, heads, q_b, q_h, q_t, k_b, k_h, k_t,
                   v_b, v_h, v_t, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                   PRECISION: tl.constexpr):
    """One program: dq of BM queries of one head."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    first, past = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM, T - S
    i, d = first + tl.arange(0, BM), tl.arange(0, BD)
    q = rows_of(q_ptr + b * q_b + h * q_h, i, i < S, d, q_t, D)         # [BM, BD]
    do = rows_of(do_ptr + bh * S * D, i, i < S, d, D, D)
    lse = tl.load(lse_ptr + bh * S + i, mask=i < S, other=float("inf"))
    delta = tl.load(delta_ptr + bh * S + i, mask=i < S, other=0.0)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    dq = tl.zeros((BM, BD), tl.float32)
    clear, stop = (first + past + 1) // BN * BN, tl.minimum(first + BM + past, T)
    dq = pull_queries(dq, q, do, lse, delta, k_ptr, v_ptr, i + past, 0, clear, T, k_t, v_t, scale, D, BN, BD, False,
                      PRECISION)
    dq = pull_queries(dq, q, do, lse, delta, k_ptr, v_ptr, i + past, clear, stop, T, k_t, v_t, scale, D, BN, BD, True,
                      PRECISION)
    at = (bh * S + i)[:, None] * D + d[None, :]
    tl.store(dq_ptr + at, (dq * (scale / 1.4426950408889634)).to(dq_ptr.dtype.element_ty),
             mask=(i < S)[:, None] & (d < D)[None, :])


@jit()
def decode_kernel(q_ptr, k_ptr, v_ptr, length_ptr, part_ptr, top_ptr, sum_ptr, T, scale, D: tl.constexpr,
                  BT: tl.constexpr, BD: tl.constexpr, SPAN: tl.constexpr):
    """One program: one query against SPAN places of one head's cache, BT at a time; what is not filled is not read."""
    bh, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BD)
    length = tl.load(length_ptr)
    q = tl.load(q_ptr + bh * D + d, mask=d < D, other=0.0).to(tl.float32) * scale
    acc = tl.zeros((BD,), tl.float32)
    m, l = float("-inf"), 0.0
    for at in range(split * SPAN, tl.minimum(split * SPAN + SPAN, length), BT):
        j = at + tl.arange(0, BT)                                       # [BT]
        here = j < length
        k = tl.load(k_ptr + (bh * D + d)[:, None] * T + j[None, :], mask=(d < D)[:, None] & here[None, :], other=0.0)
        s = tl.where(here, tl.sum(q[:, None] * k.to(tl.float32), 0), float("-inf"))             # [BT], base 2
        m_new = tl.maximum(m, tl.max(s, 0))
        p = tl.exp2(s - m_new)
        shrink = tl.exp2(m - m_new)
        v = rows_of(v_ptr + bh * T * D, j, here, d, D, D)               # [BT, BD]
        acc = acc * shrink + tl.sum(p[:, None] * v.to(tl.float32), 0)
        l = l * shrink + tl.sum(p, 0)
        m = m_new
    at = bh * tl.num_programs(1) + split
    tl.store(part_ptr + at * D + d, acc, mask=d < D)
    tl.store(top_ptr + at, m)
    tl.store(sum_ptr + at, l)


@jit(do_not_specialize=["splits"])
def merge_kernel(part_ptr, top_ptr, sum_ptr, o_ptr, splits, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr):
    """One program: the splits of one head, each with its own maximum; one that saw nothing has maximum -inf."""
    bh = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, BS), tl.arange(0, BD)
    top = tl.load(top_ptr + bh * splits + s, mask=s < splits, other=float("-inf"))
    weight = tl.exp2(top - tl.max(top, 0))                              # [BS]
    total = tl.sum(weight * tl.load(sum_ptr + bh * splits + s, mask=s < splits, other=0.0), 0)
    part = rows_of(part_ptr + bh * splits * D, s, s < splits, d, D, D)  # [BS, BD]
    o = tl.sum(weight[:, None] * part, 0) / total
    tl.store(o_ptr + bh * D + d, o.to(o_ptr.dtype.element_ty), mask=d < D)


# ---- launchers: a static table, no autotune


def attention_config(which: str, D: int, size: int, amd: bool) -> dict:
    """How to launch a kernel for heads of D numbers of `size` bytes: which of forward, keys, queries."""
    BD = max(16, 1 << (D - 1).bit_length())
    if size == 4:                                                       # float32: half the tile, for shared memory
        return dict(BM=64, BN=32, BD=BD, num_warps=4, num_stages=1 if amd else 2)
    if amd:
        return dict(BM=64, BN=64, BD=BD, num_warps=4, num_stages=1)
    if which == "forward":
        return dict(BM=128, BN=64, BD=BD, num_warps=4 if BD <= 64 else 8, num_stages=3)
    if which == "keys":
        BN, warps = (64, 4) if BD <= 32 else (128, 8)
        return dict(BM=64 if BD <= 64 else 32, BN=BN, BD=BD, num_warps=warps, num_stages=2)     # 64 x 128 spills
    return dict(BM=128, BN=64, BD=BD, num_warps=8, num_stages=2)


def _options(which, q):
    precision = "ieee" if AMD or torch.get_float32_matmul_precision() == "highest" else "tf32"
    return dict(attention_config(which, q.shape[-1], q.element_size(), AMD), D=q.shape[-1], PRECISION=precision,
                enable_fp_fusion=True)


class CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        (B, H, S, D), T = q.shape, k.shape[2]
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        o, lse = q.new_empty(B, H, S, D), q.new_empty(B, H, S, dtype=torch.float32)
        if o.numel():
            options = _options("forward", q)
            attention_kernel[(triton.cdiv(S, options["BM"]), B * H)](
                q, k, v, o, lse, S, T, H, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], D**-0.5 * LOG2E,
                **options)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        (B, H, S, D), T = q.shape, k.shape[2]
        do = do.to(o.dtype).contiguous()
        delta = (o.float() * do.float()).sum(-1)
        dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
        rest = S, T, H, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], D**-0.5 * LOG2E
        if o.numel():
            options = _options("keys", q)
            keys_kernel[(triton.cdiv(T, options["BN"]), B * H)](q, k, v, do, lse, delta, dk, dv, *rest, **options)
            options = _options("queries", q)
            queries_kernel[(triton.cdiv(S, options["BM"]), B * H)](q, k, v, do, lse, delta, dq, *rest, **options)
        return dq, dk, dv


def _decode_triton(q, k, v, length, span: int = 128) -> Tensor:
    (B, H, D), T = q.shape, k.shape[3]
    splits, BD = triton.cdiv(T, span), max(16, 1 << (D - 1).bit_length())
    if not isinstance(length, Tensor):
        length = torch.full((1,), length, dtype=torch.int32, device=q.device)
    o, part = torch.empty_like(q), q.new_empty(B * H, splits, D, dtype=torch.float32)
    top, total = (q.new_empty(B * H, splits, dtype=torch.float32) for _ in range(2))
    decode_kernel[(B * H, splits)](q, k, v, length, part, top, total, T, D**-0.5 * LOG2E, D=D, BT=32, BD=BD,
                                   SPAN=span, num_warps=4, num_stages=2 if not AMD else 1, enable_fp_fusion=True)
    merge_kernel[(B * H,)](part, top, total, o, splits, D=D, BD=BD, BS=max(2, 1 << (splits - 1).bit_length()),
                           num_warps=1, enable_fp_fusion=True)
    return o


# ---- public


def _why_not(q, D) -> str:
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{q.dtype}, and the kernel takes float32, float16 and bfloat16"
    return "" if 16 <= D <= 128 else f"heads of {D}, and the kernel takes 16 to 128"


def causal_attention(q, k, v) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with the future left out, (B, H, S, D); differentiable once. ValueError for shapes
    that are not q (B, H, S, D), k and v (B, H, T, D) with S <= T."""
    if q.ndim != 4 or k.shape != v.shape or k.shape[:2] + k.shape[3:] != q.shape[:2] + q.shape[3:] \
            or not 0 < q.shape[2] <= k.shape[2]:
        raise ValueError(f"q (B, H, S, D), k and v (B, H, T, D) with 0 < S <= T are wanted; got {tuple(q.shape)}, "
                         f"{tuple(k.shape)}, {tuple(v.shape)}")
    if backend(q, _why_not(q, q.shape[3])) == "triton":
        return CausalAttention.apply(q, k, v)
    return _attention_torch(q, k, v)


def decode_attention(q, k, v, length) -> Tensor:
    """One query a head, q (B, H, D), against the first `length` places (an int, or an int32 tensor of one) of the cache
    k (B, H, D, T), transposed, and v (B, H, T, D), both contiguous: (B, H, D). No gradient."""
    if q.ndim != 3 or v.shape != (*q.shape[:2], k.shape[-1], q.shape[2]) or k.shape[:3] != q.shape:
        raise ValueError(f"q (B, H, D), k (B, H, D, T) and v (B, H, T, D) are wanted; got {tuple(q.shape)}, "
                         f"{tuple(k.shape)}, {tuple(v.shape)}")
    refuse_gradients("decode_attention", q, k, v)
    if backend(q, _why_not(q, q.shape[2])) == "triton":
        return _decode_triton(q.contiguous(), k.contiguous(), v.contiguous(), length)
    return _decode_torch(q, k, v, length)
