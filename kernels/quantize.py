"""The nearest code of vector quantisation, without the matrix of distances.

    index_n = argmin_k |x_n - e_k|^2 = argmax_k s_nk,    s_nk = (x_n - e_0) . (e_k - e_0) - |e_k - e_0|^2 / 2

Shapes: x (N, D), codes e (K, D) -> index (N,) int64. Ties go to the lowest index. Any point near the codes can stand
for e_0: measuring from it keeps an offset that all share out of the rounding, and integers stay integers.

Exactness. Two float32 scores of a row differ from their true difference by at most c eps R (R + |x - e_0|), with
R = max_k |e_k - e_0|, eps = 2^-23 and c = D + 16 (2 D + 64 on a GPU: TF32 products in three parts, truncated sums).
Where best and second are farther apart, the best is the nearest. The other rows, one in a thousand or less of ordinary
data, are measured again in float64 as sum_d (x_nd - e_kd)^2: the index is that of the definition in float64.

What it saves. Eager cdist and argmin write and read the N x K matrix several times (29 kB a row at K = 1024, nine
launches). The kernel is one launch after a small one for the codes: a tile of rows stays, tiles of codes pass, and of
the scores only the best, its index and the second are kept. On a CPU a tile of scores stays in L2, and argmin, slow in
PyTorch there, becomes three fast operations: the maximum, a comparison with it, a product with a vector.

Limits. No gradient: indices have none. K up to 2^22. A NaN distance counts as the smallest, as in torch.argmin, so a
row with a NaN gets 0. Codes that coincide, and rows very far from the codes, cost float64 arithmetic. float64 inputs
run in PyTorch, where sums of squares decide between codes that float64 scores cannot tell apart.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ._runtime import AMD, backend, jit, tl, triton

# ---- definition


def nearest_code_reference(x, codes) -> Tensor:
    """The definition, in any dtype; N x K x D numbers in memory."""
    return (x[:, None] - codes).square().sum(-1).argmin(1)


# ---- PyTorch: a tile of rows against all codes


class _Scores:
    """Which codes may be the nearest of a tile of rows, as far as rounded scores can tell."""

    def __init__(self, codes):
        info, D = torch.finfo(codes.dtype), codes.shape[1]
        self.centre = codes[0]
        e = codes - self.centre
        self.codes, self.half = e.T.contiguous(), e.square().sum(1).div_(-2)
        self.radius = (-2 * self.half.min()).sqrt()
        self.slack = (D + 16) * info.eps * self.radius                  # eps = 2 u
        self.least = self.slack * self.radius + 4 * D * info.tiny       # products that underflow

    def near(self, x, tile=None) -> Tensor:
        """(rows, K) of 0 and 1, in `tile`: within the rounding bound of the row's best. No 1 in a row with a NaN."""
        y = x - self.centre
        s = torch.addmm(self.half, y, self.codes, out=None if tile is None else tile[: len(x)])
        threshold = s.amax(1).sub_(self.slack * torch.linalg.vector_norm(y, dim=1)).sub_(self.least)
        return s.ge_(threshold[:, None])


def _measure(x, codes, near) -> Tensor:
    """The nearest of the codes that `near` (rows, K) names, by float64 distances."""
    near = near.bool()
    near |= ~near.any(1, keepdim=True)
    row, code = near.nonzero(as_tuple=True)
    distance = (x.double()[row] - codes.double()[code]).square_().sum(1)
    distance = distance.masked_fill_(distance.isnan(), -1)
    least = distance.new_full((len(x),), torch.inf).scatter_reduce_(0, row, distance, "amin")
    tied = distance == least[row]
    return code.new_full((len(x),), len(codes)).scatter_reduce_(0, row[tied], code[tied], "amin")


def _share(work, items, threads) -> None:
    """work(queue) on each of some threads; all of them take their items from the one queue."""
    queue = iter(items)

    def worker():
        with torch.inference_mode():
            work(queue)

    if threads == 1 or len(items) < 2:
        return worker()
    pool = ThreadPoolExecutor(threads)
    try:
        for done in [pool.submit(worker) for _ in range(threads)]:
            done.result()
    finally:
        for _ in queue:                                                 # Ctrl-C: the threads end at their next item
            pass
        pool.shutdown()


def _nearest_torch(x, codes) -> Tensor:
    (N, D), K, cpu = x.shape, len(codes), x.device.type == "cpu"
    rows = max(64, (131_072 if cpu else 2**25) // K)                    # scores: 0.5 MB, half of a core's L2
    total, index = x.new_empty(N), x.new_empty(N, dtype=torch.int64)
    weights = torch.arange(K, 2 * K, device=x.device).to(x.dtype)

    def first(queue):
        tile = x.new_empty(min(rows, N), K)
        for part, out in queue:
            torch.mv(scores.near(part, tile), weights, out=out)         # K + index of one, 2 K or more of several

    def again(queue):
        for some in queue:
            index[some] = _measure(x[some], codes, scores.near(x[some]))

    # One thread a tile, not all threads on each operation: on a shared machine their barriers, eight a tile, were
    # measured at 60 times the work. New threads take the count that is set here.
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        scores = _Scores(codes)
        _share(first, list(zip(x.split(rows), total.split(rows))), threads if cpu else 1)
        index.copy_(total.sub_(K))
        unsure = ((total < 0) | (total >= K)).nonzero()[:, 0]
        _share(again, unsure.split(min(rows, max(1, 2**22 // (K * D)))), threads if cpu else 1)
    finally:
        torch.set_num_threads(threads)
    return index


# ---- Triton


@jit(do_not_specialize=["K"])
def centre_kernel(codes_ptr, e_ptr, half_ptr, K, D: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    """One program: BK codes less the first, and half their squared lengths."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)                        # [BK]
    half = tl.zeros((BK,), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)                                    # [BD]
        here = (k < K)[:, None] & (d < D)[None, :]
        at = k.to(tl.int64)[:, None] * D + d[None, :]
        first = tl.load(codes_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        e = tl.load(codes_ptr + at, mask=here, other=0.0).to(tl.float32) - tl.where(here, first[None, :], 0.0)
        tl.store(e_ptr + at, e, mask=here)                              # [BK, BD]
        half += tl.sum(e * e, 1) / 2
    tl.store(half_ptr + k, half, mask=k < K)


@jit()
def centred_rows(x_ptr, codes_ptr, rows, here, d, stride_n, stride_d, D: tl.constexpr):
    """[BN, BD] of x - e_0, zero outside."""
    here = here[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d, mask=here, other=0.0)
    first = tl.load(codes_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    return x.to(tl.float32) - tl.where(here, first[None, :], 0.0)


@jit()
def measured_again(x_ptr, codes_ptr, row, stride_n, stride_d, K, D: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    """The nearest code of one row by float64 distances."""
    least, index = tl.full((), float("inf"), tl.float64), tl.full((), 0, tl.int32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)                                    # [BK]
        distance = tl.zeros((BK,), tl.float64)
        for at in range(0, D, BD):
            d = at + tl.arange(0, BD)                                   # [BD]
            here = (k < K)[:, None] & (d < D)[None, :]
            x = tl.load(x_ptr + row * stride_n + d.to(tl.int64) * stride_d, mask=d < D, other=0.0).to(tl.float64)
            e = tl.load(codes_ptr + k.to(tl.int64)[:, None] * D + d[None, :], mask=here, other=0.0).to(tl.float64)
            gap = tl.where(here, x[None, :] - e, 0.0)                   # [BK, BD]
            distance += tl.sum(gap * gap, 1)
        distance = tl.where(distance == distance, distance, -1.0)       # a NaN is the smallest
        distance = tl.where(k < K, distance, float("inf"))
        nearest = tl.min(distance, 0)
        at_nearest = tl.min(tl.where(distance == nearest, k, K), 0)
        index = tl.where(nearest < least, at_nearest, index)
        least = tl.minimum(least, nearest)
    return index


@jit(do_not_specialize=["n", "K"])
def nearest_kernel(x_ptr, codes_ptr, e_ptr, half_ptr, index_ptr, n, K, stride_n, stride_d, slack, tiny,
                   D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
                   PRECISION: tl.constexpr):
    """One program: BN rows against all codes, BK at a time, BD coordinates at a time."""
    local = tl.arange(0, BN)
    rows = tl.program_id(0).to(tl.int64) * BN + local                   # [BN]
    here = rows < n
    square = tl.zeros((BN,), tl.float32)
    for start in range(0, D, BD):
        y = centred_rows(x_ptr, codes_ptr, rows, here, start + tl.arange(0, BD), stride_n, stride_d, D)
        square += tl.sum(y * y, 1)
    best = tl.full((BN,), float("-inf"), tl.float32)
    second = best
    index = tl.zeros((BN,), tl.int32)
    widest = 0.0
    for start in range(0, K, BK):
        col = tl.arange(0, BK)
        k = start + col                                                 # [BK]
        s = tl.zeros((BN, BK), tl.float32)
        for at in range(0, D, BD):
            d = at + tl.arange(0, BD)                                   # [BD]
            y = centred_rows(x_ptr, codes_ptr, rows, here, d, stride_n, stride_d, D)
            inside = (d < D)[:, None] & (k < K)[None, :]
            e = tl.load(e_ptr + k.to(tl.int64)[None, :] * D + d[:, None], mask=inside, other=0.0)   # [BD, BK]
            s = tl.dot(y, e, acc=s, input_precision=PRECISION)
        half = tl.load(half_ptr + k, mask=k < K, other=float("inf"))
        s -= half[None, :]                                              # [BN, BK]
        size = tl.where(half == half, half, float("inf"))               # a code with a NaN: no row is sure
        widest = tl.maximum(widest, tl.max(tl.where(k < K, size, 0.0), 0))
        top = tl.max(s, 1)
        place = tl.min(tl.where(s == top[:, None], col[None, :], BK), 1)
        rest = tl.max(tl.where(col[None, :] == place[:, None], float("-inf"), s), 1)
        second = tl.maximum(tl.maximum(second, rest), tl.minimum(best, top))
        index = tl.where(top > best, start + place, index)
        best = tl.maximum(best, top)
    radius = tl.sqrt(2 * widest)
    sure = (best - second > slack * radius * (radius + tl.sqrt(square)) + tiny) & (square < float("inf"))
    unsure = (here & (sure == 0)).to(tl.int32)
    for _ in range(tl.sum(unsure, 0)):
        r = tl.min(tl.where(unsure > 0, local, BN), 0)
        row = tl.program_id(0).to(tl.int64) * BN + r
        found = measured_again(x_ptr, codes_ptr, row, stride_n, stride_d, K, D, BM, BD)
        index = tl.where(local == r, found, index)
        unsure = tl.where(local == r, 0, unsure)
    tl.store(index_ptr + rows, index.to(tl.int64), mask=here)


# ---- launcher: a static table, no autotune


def nearest_config(D: int, major: int, amd: bool) -> dict:
    """How to launch nearest_kernel on CUDA capability `major`, by what `kernels.compile` shows.

    From 9 on, two programs of 118 registers and 112 kB fit a multiprocessor at D <= 64, so that one's products cover
    the other's maxima; 128 codes at a time take twice that. Before 9, BD above 16 spills. AMD multiplies in fp32.
    """
    BD = max(16, min(64, 1 << (D - 1).bit_length()))
    if amd:
        return dict(BN=64, BK=64, BD=BD, BM=32, PRECISION="ieee", num_warps=4, num_stages=1)
    if major < 9:
        return dict(BN=64, BK=64, BD=16, BM=32, PRECISION="tf32x3", num_warps=4, num_stages=2)
    return dict(BN=128, BK=64, BD=BD, BM=32, PRECISION="tf32x3", num_warps=8, num_stages=2)


def _nearest_triton(x, codes, slack=None) -> Tensor:
    (N, D), K = x.shape, len(codes)
    config = nearest_config(D, torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9, AMD)
    codes = codes.contiguous()
    e, half = (codes.new_empty(shape, dtype=torch.float32) for shape in ((K, D), (K,)))
    index, info = x.new_empty(N, dtype=torch.int64), torch.finfo(torch.float32)
    slack = (2 * D + 64) * info.eps if slack is None else slack
    if N:
        centre_kernel[(triton.cdiv(K, 32),)](codes, e, half, K, D=D, BK=32, BD=config["BD"], num_warps=4,
                                             enable_fp_fusion=True)
        nearest_kernel[(triton.cdiv(N, config["BN"]),)](
            x, codes, e, half, index, N, K, *x.stride(), slack, 4 * D * info.tiny,
            D=D, enable_fp_fusion=True, **config)
    return index


# ---- public


@torch.no_grad()
def nearest_code(x, codes) -> Tensor:
    """(N,) int64: for each row of x (N, D) the number of the nearest row of codes (K, D), the lowest of equals.

    The same index as `nearest_code_reference` in float64. Half precisions are exact too: they are widened first.
    ValueError unless both are floating-point matrices of one width, with at least one code.
    """
    if x.ndim != 2 or codes.ndim != 2 or x.shape[1] != codes.shape[1] or 0 in codes.shape:
        raise ValueError(f"x (N, D) and codes (K, D) with K, D > 0 are wanted; got {tuple(x.shape)}, "
                         f"{tuple(codes.shape)}")
    if not (x.is_floating_point() and codes.is_floating_point()):
        raise ValueError(f"x and codes must be floating-point; got {x.dtype}, {codes.dtype}")
    x, codes = x.detach(), codes.detach().to(x.device)
    dtype = torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
    if backend(x, "" if dtype == torch.float32 else f"{dtype}, and the kernel takes float32 and less") == "triton":
        return _nearest_triton(x, codes)
    return _nearest_torch(x.to(dtype), codes.to(dtype))
