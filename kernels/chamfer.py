"""The nearest point of another cloud, without the N x M matrix of distances, and the Chamfer distance.

    index_bn = argmin_m |x_bn - y_bm|^2,    distance_bn = |x_bn - y_b,index_bn|^2
    Chamfer_b = mean_n distance_bn(x, y) + mean_m distance_bm(y, x)                squared, both directions summed

Shapes: x (B, N, D), y (B, M, D) -> distance (B, N), index (B, N) int64. Clouds of a batch may be ragged: of cloud b
the first x_length[b] and y_length[b] points count, the rest is padding and gets distance 0 and index -1. Ties go to
the lowest index.

Gradient. Where the nearest point is unique, d distance / d x_n = 2 (x_n - y_i) and the opposite falls on y_i: a gather
forward, a gather and an index_add backward; the matrix is not needed there either. On a GPU index_add adds in no fixed
order, so the gradient for y is exact to rounding and not bit for bit the same in each run.

Exactness. Differences are squared, never x^2 - 2xy + y^2, so a distance has a relative error of at most 4 eps with
eps = 2^-23. The kernel's index is that of float64 unless two distances agree to that; on a CPU it always is.

What it saves. Eager cdist and min write and read the N x M matrix, 1 GB for two clouds of 16,384 points, and autograd
keeps it. The kernel is one launch a direction: 64 points of x stay in registers, 32 of y pass at a time, every thread
keeps the best of the columns it sees and the threads compare once, at the end: ten instructions a pair, no shuffle in
the loop. On a CPU a tile of scores stays in L2 (quantize.py): of a large cloud, or of several small ones together.

Limits. D = 1, 2 or 3 and float32 or less in the kernel; the rest runs in PyTorch. A NaN is nobody's neighbour, and has
distance inf or NaN itself. Second derivatives: none.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import quantize
from ._runtime import AMD, backend, jit, tl, triton

# ---- definition


def nearest_point_reference(x, y, x_length=None, y_length=None) -> tuple[Tensor, Tensor]:
    """The definition, in any dtype and differentiable by autograd; B x N x M x D numbers in memory."""
    N, M = x.shape[1], y.shape[1]
    squares = (x[:, :, None] - y[:, None]).square().sum(-1)             # (B, N, M)
    if y_length is not None:
        squares = squares.masked_fill(torch.arange(M, device=x.device) >= y_length[:, None, None], torch.inf)
    distance, index = squares.min(-1)
    if x_length is None:
        return distance, index
    outside = torch.arange(N, device=x.device) >= x_length[:, None]     # (B, N)
    return distance.masked_fill(outside, 0), index.masked_fill(outside, -1)


# ---- PyTorch: a large cloud at a time, in tiles that stay in cache; small clouds together


def _small(x, y, n, m) -> Tensor:
    """Index (C, N) for clouds whose C x N x M scores fit a cache; n, m (C,): how many points of each count.

    As in quantize.py: scores (x - c) . (y - c) - |y - c|^2 / 2 with c = y_0, and where rounding could matter float64.
    """
    (_, N, D), M, info = x.shape, y.shape[1], torch.finfo(x.dtype)
    pad = torch.arange(M, device=y.device) >= m[:, None]                # (C, M)
    e = (y - y[:, :1]).masked_fill_(pad[..., None], 0)
    z, half = x - y[:, :1], e.square().sum(2).div_(-2)
    radius = (-2 * half.amin(1)).sqrt()
    slack = (D + 16) * info.eps * radius
    half.masked_fill_(pad, -torch.inf)
    s = torch.baddbmm(half[:, None], z, e.mT)                           # (C, N, M)
    reach = slack[:, None] * torch.linalg.vector_norm(z, dim=2) + (slack * radius + 4 * D * info.tiny)[:, None]
    near = s.ge_((s.amax(2) - reach)[..., None])
    total = near @ torch.arange(M, 2 * M, device=x.device).to(x.dtype)  # M + index of one, 2 M or more of several
    index = total.sub_(M).long()
    here = torch.arange(N, device=x.device) < n[:, None]
    cloud, row = (here & ((index < 0) | (index >= M))).nonzero(as_tuple=True)
    if len(cloud):
        squares = (x.double()[cloud, row, None] - y.double()[cloud]).square_().sum(2)
        index[cloud, row] = squares.masked_fill_(pad[cloud], torch.inf).argmin(1)
    return index.masked_fill_(~here, -1)


def _nearest_torch(x, y, x_length, y_length, most=2**19) -> Tensor:
    (B, N, _), M, index = x.shape, y.shape[1], x.new_full(x.shape[:2], -1, dtype=torch.int64)
    x, y = (t.to(torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)) for t in (x, y))
    n, m = (torch.full((B,), size, device=x.device) if length is None else length.to(x.device)
            for length, size in ((x_length, N), (y_length, M)))
    together = max(1, most // max(1, N * M)) if 2 * N * M <= most else 0

    def work(queue):
        for part in queue:
            if together:
                index[part] = _small(x[part], y[part], n[part], m[part])
            elif size := n[part].item():
                index[part, :size] = quantize._nearest_torch(x[part, :size], y[part, :m[part]])

    items = [slice(b, b + together) for b in range(0, B, together)] if together else range(B)
    threads = torch.get_num_threads()
    if x.is_cuda or threads == 1 or 2 * threads > len(items) and not together:      # the threads share a cloud's tiles
        work(items)
        return index
    try:
        torch.set_num_threads(1)                                        # of the threads that _share starts
        quantize._share(work, items, threads)
    finally:
        torch.set_num_threads(threads)
    return index


# ---- Triton


@jit(do_not_specialize=["N", "M"])
def nearest_point_kernel(points_ptr, others_ptr, n_ptr, m_ptr, index_ptr, N, M, D: tl.constexpr, BN: tl.constexpr,
                         BM: tl.constexpr):
    """One program: BN points of one cloud against all of the other, BM at a time."""
    b = tl.program_id(1).to(tl.int64)
    n, m = tl.load(n_ptr + b), tl.load(m_ptr + b)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)                     # [BN]
    here = rows < n
    x = points_ptr + (b * N + rows) * D
    x0 = tl.load(x, mask=here, other=0.0).to(tl.float32)
    x1 = tl.load(x + 1, mask=here & (D > 1), other=0.0).to(tl.float32)
    x2 = tl.load(x + 2, mask=here & (D > 2), other=0.0).to(tl.float32)
    col = tl.arange(0, BM)
    best = tl.full((BN, BM), float("inf"), tl.float32)                  # of the columns start + col so far
    at = tl.zeros((BN, BM), tl.int32)
    for start in range(0, m, BM):
        there = start + col < m                                         # [BM]
        y = others_ptr + (b * M + start + col) * D
        y0 = tl.load(y, mask=there, other=float("inf")).to(tl.float32)
        y1 = tl.load(y + 1, mask=there & (D > 1), other=0.0).to(tl.float32)
        y2 = tl.load(y + 2, mask=there & (D > 2), other=0.0).to(tl.float32)
        gap0, gap1, gap2 = x0[:, None] - y0[None, :], x1[:, None] - y1[None, :], x2[:, None] - y2[None, :]
        distance = gap0 * gap0 + gap1 * gap1 + gap2 * gap2              # [BN, BM]
        closer = distance < best
        best = tl.where(closer, distance, best)
        at = tl.where(closer, start, at)
    least = tl.min(best, 1)
    index = tl.min(tl.where(best == least[:, None], at + col[None, :], M), 1)
    tl.store(index_ptr + b * N + rows, tl.where(here, index, -1).to(tl.int64), mask=rows < N)


def nearest_point_config(amd: bool) -> dict:
    """How to launch nearest_point_kernel: 16 columns a thread, by what `kernels.compile` shows far from a spill."""
    return dict(BN=64, BM=32, num_warps=4, num_stages=1 if amd else 2)


def _nearest_triton(x, y, x_length, y_length) -> Tensor:
    (B, N, D), M = x.shape, y.shape[1]
    x, y, config = x.contiguous(), y.contiguous(), nearest_point_config(AMD)
    index = x.new_empty((B, N), dtype=torch.int64)
    lengths = (x.new_full((B,), size, dtype=torch.int32) if length is None else length.to(x.device, torch.int32)
               for length, size in ((x_length, N), (y_length, M)))
    if B * N:
        nearest_point_kernel[(triton.cdiv(N, config["BN"]), B)](x, y, *lengths, index, N, M, D=D,
                                                                enable_fp_fusion=True, **config)
    return index


# ---- gradient


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, x_length, y_length):
        why_not = "" if x.shape[-1] <= 3 else f"D = {x.shape[-1]}, and the kernel takes up to 3"
        if torch.float64 in (x.dtype, y.dtype):
            why_not = "float64, and the kernel takes float32 and less"
        find = _nearest_triton if backend(x, why_not) == "triton" else _nearest_torch
        index = find(x.detach(), y.detach(), x_length, y_length)
        gap = _gaps(x, y, index)
        ctx.save_for_backward(x, y, index)
        ctx.mark_non_differentiable(index)
        return gap.square().sum(-1), index

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        x, y, index = ctx.saved_tensors
        slope = 2 * g[..., None] * _gaps(x, y, index)                   # (B, N, D)
        into = None
        if ctx.needs_input_grad[1]:
            (B, M, D), rows = y.shape, index.clamp_min(0)
            rows = (rows + M * torch.arange(B, device=y.device)[:, None]).flatten()
            into = y.new_zeros(B * M, D).index_add_(0, rows, -slope.flatten(0, 1).to(y.dtype)).view_as(y)
        return slope.to(x.dtype) if ctx.needs_input_grad[0] else None, into, None, None


def _gaps(x, y, index):
    """x_n - y_i, 0 in the padding (B, N, D)."""
    chosen = y.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, y.shape[-1]))
    return (x - chosen).masked_fill_((index < 0)[..., None], 0)


# ---- public


def _check(x, y, x_length, y_length):
    if x.ndim != 3 or y.ndim != 3 or x.shape[::2] != y.shape[::2] or 0 in y.shape[1:]:
        raise ValueError(f"x (B, N, D) and y (B, M, D) with M, D > 0 are wanted; got {tuple(x.shape)}, "
                         f"{tuple(y.shape)}")
    if not (x.is_floating_point() and y.is_floating_point()) or x.device != y.device:
        raise ValueError(f"x and y must be floating-point on one device; got {x.dtype} on {x.device}, {y.dtype} on "
                         f"{y.device}")
    if (x_length is None) != (y_length is None):
        raise ValueError("lengths of both clouds are wanted, or of none")
    for name, length, least, most in (("x", x_length, 0, x.shape[1]), ("y", y_length, 1, y.shape[1])):
        if length is not None and (length.shape != x.shape[:1] or length.is_floating_point()):
            raise ValueError(f"{name}_length must be {len(x)} integers; got {tuple(length.shape)} of {length.dtype}")
        if length is not None and length.device.type == "cpu" and not ((length >= least) & (length <= most)).all():
            raise ValueError(f"{name}_length must lie in {least} .. {most}; got {length.tolist()}")


def nearest_point(x, y, x_length=None, y_length=None) -> tuple[Tensor, Tensor]:
    """Squared distance (B, N), differentiable, and index (B, N) int64 of the point of y nearest to each point of x.

    Lengths: (B,) integers, both or none; on the CPU they are checked, on a GPU that would wait for it. ValueError for
    wrong shapes, an empty y or lengths that do not fit.
    """
    _check(x, y, x_length, y_length)
    return _Nearest.apply(x, y, x_length, y_length)


def chamfer_distance(x, y, x_length=None, y_length=None) -> Tensor:
    """(B,): mean squared distance to the nearest point, from x to y plus from y to x. Differentiable in both."""
    _check(y, x, y_length, x_length)                                    # x is not empty either
    there, _ = nearest_point(x, y, x_length, y_length)
    back, _ = nearest_point(y, x, y_length, x_length)
    sizes = (x.shape[1], y.shape[1]) if x_length is None else (x_length.to(x.device), y_length.to(x.device))
    return there.sum(1) / sizes[0] + back.sum(1) / sizes[1]
