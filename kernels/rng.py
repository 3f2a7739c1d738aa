"""Counter-based noise: Philox4x32-10 and four normals a call, the same stream in PyTorch, the interpreter and on a GPU.

    words = Philox(counter = (row, step, column // 4, stream), key = seed), four words of 32 bits                  [1]
    r = sqrt(-2 log((w_0 + 1/2) / 2^32)),   angle = 2 pi w_1 / 2^32 - pi/2,   normals r cos(angle), r sin(angle)

so the normal at (row, column) of a step depends on its position and the seed alone: never on the tile, the device, or
on where a chain was cut. Columns 4 g and 4 g + 1 come from words 0 and 1, the next two from words 2 and 3. A 32-bit u
reaches 6.7 sigma. `stream` keeps users apart (CHAIN, STEP, PIXELS). The words are equal to the bit everywhere, the
normals to rounding (about 1e-6). A kernel that makes its own noise saves the write and the read of an eager randn.

References
  [1] Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011 (Random123)
"""

import math

import torch
from torch import Tensor

from ._runtime import jit, tl

M0, M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)             # multipliers and Weyl constants of [1]
W0, W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
MASK = 0xFFFFFFFF
CHAIN, STEP, PIXELS = 0, 1, 2                                                    # streams
number = lambda c: getattr(c, "value", c)                               # a constexpr, seen from Python


# ---- PyTorch: 32-bit words in int64 tensors, in place, for blocks that stay in cache


def philox(counter, seed: int) -> list[Tensor]:
    """Philox4x32-10: four int64 tensors with values in [0, 2^32) for four broadcastable int64 `counter` tensors."""
    m0, m1, w0, w1 = map(number, (M0, M1, W0, W1))
    k0, k1 = seed & MASK, seed >> 32 & MASK
    shape = torch.broadcast_shapes(*(c.shape for c in counter))
    # products wrap in int64 and the shift drags the sign in: only the low 32 bits count, masked before they multiply
    c0, c1, c2, c3 = counter
    p, q = c0 * m0, c2 * m1
    c0, c2 = (q >> 32).bitwise_xor(c1 ^ k0).bitwise_and_(MASK), (p >> 32).bitwise_xor(c3 ^ k1).bitwise_and_(MASK)
    c0, c1, c2, c3 = (c.expand(shape).clone(memory_format=torch.contiguous_format) for c in (c0, q, c2, p))
    p, q = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(9):
        k0, k1 = (k0 + w0) & MASK, (k1 + w1) & MASK
        torch.mul(c0, m0, out=p)
        torch.mul(c2, m1, out=q)
        torch.bitwise_right_shift(q, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(MASK)
        torch.bitwise_right_shift(p, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(MASK)
        c1, c3, p, q = q, p, c3, c1
    return [c0, c1.bitwise_and_(MASK), c2, c3.bitwise_and_(MASK)]


def box_muller(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent float32 normals from two words (overwritten)."""
    r = w0.float().mul_(2.0**-32).add_(2.0**-33).log_().mul_(-2).sqrt_()
    r.mul_((w1 >> 31).float().mul_(-2).add_(1))                         # the upper half turn is the lower one, negated
    angle = w1.bitwise_and_(0x7FFFFFFF).sub_(0x40000000).float().mul_(math.pi * 2.0**-31)
    return angle.cos().mul_(r), angle.sin_().mul_(r)


def normal_block(rows: Tensor, columns: int, steps: Tensor, seed: int, stream: int = CHAIN) -> Tensor:
    """float32 normals (S, N, columns) for int64 row numbers (N,) and step numbers (S,). Work: 4 ceil(columns / 4)."""
    groups = torch.arange((columns + 3) // 4, device=rows.device)
    counter = (rows[None, :, None], steps[:, None, None], groups, torch.tensor(stream, device=rows.device))
    w = philox(counter, seed)
    z = torch.empty(*w[0].shape, min(columns, 4), device=rows.device, dtype=torch.float32)
    pairs = box_muller(w[0], w[1]) + (box_muller(w[2], w[3]) if columns > 2 else ())
    for k in range(z.shape[-1]):
        z[..., k] = pairs[k]
    return z.flatten(2)[..., :columns]


def normal(rows: int, columns: int, seed: int, step: int = 0, stream: int = CHAIN, device=None) -> Tensor:
    """The float32 normals (rows, columns) of one step."""
    index = torch.arange(rows, device=device)
    return normal_block(index, columns, torch.tensor([step & MASK], device=device), seed, stream)[0]


# ---- Triton


@jit()
def philox_words(k0, k1, c0, c1, c2, c3):
    """Philox4x32-10 on uint32 blocks of one shape; k0, k1: the low and the high half of the seed."""
    k0 = k0.to(tl.uint32)
    k1 = k1.to(tl.uint32)
    for _ in tl.static_range(10):
        a, b = c0, c2
        c0 = tl.umulhi(b, M1) ^ c1 ^ k0
        c2 = tl.umulhi(a, M0) ^ c3 ^ k1
        c1 = b * M1
        c3 = a * M0
        k0 = k0 + W0
        k1 = k1 + W1
    return c0, c1, c2, c3


@jit()
def box_muller_pair(w0, w1):
    r = tl.sqrt(-2 * tl.log(w0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10))
    r = tl.where(w1 >= 0x80000000, -r, r)
    y = ((w1 & 0x7FFFFFFF).to(tl.int32) - 0x40000000).to(tl.float32) * 1.4629180792671596e-09
    s = y * y                                                           # |y| <= pi/2: Taylor to 1e-8
    sin = y + y * s * (-1.6666667e-1 + s * (8.3333333e-3 + s * (-1.9841270e-4 + s * (2.7557319e-6 - s * 2.4767479e-8))))
    cos = 2.4801587e-5 + s * (-2.7557319e-7 + s * 2.0437326e-9)
    cos = 1 + s * (-0.5 + s * (4.1666667e-2 + s * (-1.3888889e-3 + s * cos)))
    return r * cos, r * sin


@jit()
def philox_normal4(k0, k1, c0, c1, c2, c3):
    """Four blocks of normals for uint32 counter blocks of one shape."""
    w0, w1, w2, w3 = philox_words(k0, k1, c0, c1, c2, c3)
    z0, z1 = box_muller_pair(w0, w1)
    z2, z3 = box_muller_pair(w2, w3)
    return z0, z1, z2, z3
