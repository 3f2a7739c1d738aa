"""Ancestral sampling of a pixel network, all images and all waves in one launch.

    x_ij = [u_ij < sigmoid(f(c_ij, i, j))],   c_ij = sum_m 2^m x_(i - a_m)(j - b_m), pixels beyond the border being 0
    f = head(first[c] + places[i W + j]):  itself where first has one column; else relu, and (w, b) of 1 or 2 layers,
    relu between them:  z w^T + b,  or  relu(z w_1^T + b_1) w_2^T + b_2

Shapes: first (2^K, F): what the first layer of a network makes of each context, a table of 2^K rows instead of a
product; places (H W, F) or None; layers [] (F = 1), [((1, F), (1,))] or [((G, F), (G,)), ((1, G), (1,))]. A counted
table, and any network that is not told the place, is one column of logits. Result (n, H, W) uint8.

Waves. With t = s i + j a parent (a, b) lies s a + b waves back: s is the least number with s a + b >= 1 for all, so
that what a wave needs is there (Lamport, CACM 17(2), 1974). Parents above and to the left: s = 1, T = s (H - 1) + W
waves, 55 of 28 x 28. A parent one up and r to the right: s = r + 1; with the left pixel a parent too, T is then the
length of the longest chain of parents, and no order takes fewer waves.

Noise. u_ij is word t mod 4 of Philox(counter = (image, t // 4, i, rng.PIXELS), key = seed) over 2^32, in float32 and
below 1: the picture depends on the seed and its number in the batch alone, never on the tile or the device.

What it saves. The eager loop launches some forty operations a wave, or a pixel. The kernel keeps the last 32 pixels of
row i as bits of one word in lane i: a context is bits of the own word and of those of the lanes above, which come by a
shuffle; nothing of an image is read back, and it is written once. A lane past the end of its row draws zeros, which is
what those to its right shall see beyond the border. On a CPU the images of a tile lie skewed, row i of wave t: parents
are views, and no index is computed.

Limits. No gradient. The kernel: H <= 128, s a + b <= 32, float32 networks, F and G <= 64, at most 2 layers; else it is
PyTorch. Where f is computed, not read (places, layers), a rounding may turn a pixel with |u - p| < 1e-6 another way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import rng
from ._runtime import AMD, backend, in_tiles, int32, jit, refuse_gradients, tl, triton

# ---- definition


def head(z: Tensor, layers) -> Tensor:
    """(.., F) -> (..)"""
    for w, b in layers:
        z = F.linear(z.relu(), w, b)
    return z[..., 0]


def slope(offsets) -> int:
    """The least s >= 0 with s a + b >= 1 for all parents (a, b)."""
    return max([0, *(-((b - 1) // a) for a, b in offsets if a)])


def uniform(n: int, H: int, W: int, s: int, seed: int, device=None, start: int = 0) -> Tensor:
    """u (T, H, n) float32 in [0, 1) of the images from `start` on: wave t, row i, whose pixel is (i, t - s i)."""
    images = torch.arange(start, start + n, device=device).bitwise_and_(rng.MASK)
    waves = torch.arange((s * (H - 1) + W + 3) // 4, device=device)[:, None, None]
    rows = torch.arange(H, device=device)[:, None]
    words = rng.philox([images, waves, rows, torch.tensor(rng.PIXELS, device=device)], seed)
    u = torch.stack(words, 1).flatten(0, 1)[: s * (H - 1) + W].float()
    return u.mul_(2.0**-32).clamp_(max=1 - 2.0**-24)


def wavefront_sample_reference(n, shape, offsets, first, places, layers, seed) -> Tensor:
    """The definition, pixel by pixel in raster order, in any dtype."""
    (H, W), s = shape, slope(offsets)
    u, x = uniform(n, H, W, s, seed, first.device), first.new_zeros(n, H, W, dtype=torch.uint8)
    for i in range(H):
        for j in range(W):
            code = x.new_zeros(n, dtype=torch.int64)
            for m, (a, b) in enumerate(offsets):
                if i - a >= 0 and 0 <= j - b < W:
                    code += x[:, i - a, j - b].long() << m
            z = first[code] + (0 if places is None else places[i * W + j])
            x[:, i, j] = u[s * i + j, i] < torch.sigmoid(head(z, layers))
    return x


# ---- PyTorch: a tile of images through all waves


def _sample_torch(n, shape, offsets, first, places, layers, seed) -> Tensor:
    (H, W), s, A = shape, slope(offsets), max(a for a, _ in offsets)
    D, out = max(s * a + b for a, b in offsets), torch.empty(n, H, W, dtype=torch.uint8, device=first.device)
    table = torch.sigmoid(first[:, 0]) if places is None and not layers else None

    def work(row, part, stop):
        N, R = len(part), (A + H) * len(part)
        u = uniform(N, H, W, s, seed, first.device, row)
        x = torch.zeros(D + len(u), A + H, N, dtype=torch.int32, device=first.device)
        for t in range(len(u)):
            low, high = (0, H) if not s else (max(0, -((W - 1 - t) // s)), min(H, t // s + 1))
            code = torch.zeros(high - low, N, dtype=torch.int32, device=first.device)
            for m, (a, b) in enumerate(offsets):
                code.add_(x[D + t - s * a - b, A + low - a : A + high - a], alpha=1 << m)
            if table is not None:
                p = table.index_select(0, code.view(-1)).view_as(code)
            else:
                z = first.index_select(0, code.view(-1)).view(high - low, N, first.shape[1])
                if places is not None:
                    place = torch.arange(low, high, device=first.device)
                    z += places[place * W + t - s * place, None]
                p = torch.sigmoid(head(z, layers))
            x[D + t, A + low : A + high] = u[t, low:high] < p
            if stop.is_set():
                return
        part.copy_(x.as_strided((N, H, W), (1, s * R + N, R), D * R + A * N))

    if n:
        in_tiles(work, out, 128)
    return out


# ---- Triton


@jit(do_not_specialize=["n", "k0", "k1", "H", "W"])
def wavefront_kernel(first_ptr, places_ptr, w_ptr, b_ptr, last_ptr, bias_ptr, picture_ptr, n, k0, k1, H, W,
                     OFFSETS: tl.constexpr, S: tl.constexpr, K: tl.constexpr, A: tl.constexpr, DF: tl.constexpr,
                     DG: tl.constexpr, PLACES: tl.constexpr, LAYERS: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
                     BF: tl.constexpr, BG: tl.constexpr, PRECISION: tl.constexpr):
    """One program: BN images, a lane for each of BH >= H rows. DF, DG columns of first and of the second layer."""
    image = tl.program_id(0) * BN + tl.arange(0, BN)                    # [BN]
    i = tl.arange(0, BH)                                                # [BH]
    here = (image < n)[:, None] & (i < H)[None, :]                      # [BN, BH]
    above = tl.zeros((BN, BH), tl.int32) + i[None, :]
    c0 = tl.zeros((BN, BH), tl.uint32) + image.to(tl.uint32)[:, None]
    c2 = tl.zeros((BN, BH), tl.uint32) + i.to(tl.uint32)[None, :]
    c3 = tl.full((BN, BH), 2, tl.uint32)                                # rng.PIXELS
    at = image.to(tl.int64)[:, None] * (H * W)
    f, g = tl.arange(0, BF), tl.arange(0, BG)
    if LAYERS > 0:
        last = tl.load(last_ptr + g, mask=g < DG, other=0.0)            # [BG]
        bias = tl.load(bias_ptr)
    if LAYERS > 1:
        inside = (f < DF)[:, None] & (g < DG)[None, :]
        w = tl.load(w_ptr + g[None, :] * DF + f[:, None], mask=inside, other=0.0)       # [BF, BG]
        b = tl.load(b_ptr + g, mask=g < DG, other=0.0)
    row = tl.zeros((BN, BH), tl.uint32)                                 # bit p: the pixel p + 1 to the left
    for block in range(0, (S * (H - 1) + W + 3) // 4):
        w0, w1, w2, w3 = rng.philox_words(k0, k1, c0, (above * 0 + block).to(tl.uint32), c2, c3)
        for q in range(4):
            word = tl.where(q < 2, tl.where(q == 0, w0, w1), tl.where(q == 2, w2, w3))
            u = tl.minimum(word.to(tl.float32) * 2.3283064365386963e-10, 1 - 5.9604644775390625e-8)
            j = block * 4 + q - S * i                                   # [BH]
            active = here & ((j >= 0) & (j < W))[None, :]
            code = tl.zeros((BN, BH), tl.int32)
            for a in tl.static_range(A + 1):
                if a == 0:
                    seen = row
                else:
                    seen = tl.gather(row, tl.maximum(above - a, 0), 1)
                    seen = tl.where(above >= a, seen, 0)
                for m in tl.static_range(K):
                    if OFFSETS[m][0] == a:
                        code |= (((seen >> (S * a - 1 + OFFSETS[m][1])) & 1) << m).to(tl.int32)
            place = i * W + j
            if LAYERS == 0:
                z = tl.load(first_ptr + code, mask=active, other=0.0)
                if PLACES:
                    z += tl.load(places_ptr + place, mask=(i < H) & (j >= 0) & (j < W), other=0.0)[None, :]
            else:
                rows = tl.reshape(code, (BN * BH,))
                live = tl.reshape(active, (BN * BH,))[:, None] & (f < DF)[None, :]
                h = tl.load(first_ptr + rows[:, None] * DF + f[None, :], mask=live, other=0.0)      # [BN BH, BF]
                if PLACES:
                    places = tl.reshape(tl.zeros((BN, BH), tl.int32) + place[None, :], (BN * BH,))
                    h += tl.load(places_ptr + places[:, None] * DF + f[None, :], mask=live, other=0.0)
                h = tl.maximum(h, 0.0)
                if LAYERS > 1:
                    h = tl.maximum(tl.dot(h, w, input_precision=PRECISION) + b[None, :], 0.0)      # [BN BH, BG]
                z = tl.reshape(tl.sum(h * last[None, :], 1), (BN, BH)) + bias
            if LAYERS == 0 and PLACES == 0:
                x = (u < z) & active                                    # a table of probabilities
            else:
                x = (u < 1 / (1 + tl.exp(-z))) & active
            tl.store(picture_ptr + at + place[None, :], x.to(tl.uint8), mask=active)
            row = (row << 1) | x.to(tl.uint32)


# ---- launcher


def wavefront_config(H: int, DF: int, DG: int, layers: int, major: int, amd: bool) -> dict:
    """How to launch on CUDA capability `major`: a warp for 32 rows of one image; with layers, four warps for 64 rows,
    of two images, but before 9 for 32 rows: 64 spill there. A wave's loads wait for the wave before, so that one stage
    is enough; where tensor memory holds the product, one spills and two do not."""
    BH = max(16, 1 << (H - 1).bit_length())
    block = lambda d: max(16, 1 << (d - 1).bit_length())
    if not layers:
        return dict(BN=1, BH=BH, BF=16, BG=16, PRECISION="ieee", num_stages=1,
                    num_warps=max(1, BH // (64 if amd else 32)))
    return dict(BN=max(1, (32 if major < 9 else 64) // BH), BH=BH, BF=block(DF), BG=block(DG),
                PRECISION="ieee" if amd else "tf32x3", num_warps=max(4, BH // 16), num_stages=2 if major > 9 else 1)


def _sample_triton(n, shape, offsets, first, places, layers, seed) -> Tensor:
    (H, W), (K, DF), s = shape, (len(offsets), first.shape[1]), slope(offsets)
    first = (first if layers or places is not None else torch.sigmoid(first)).contiguous()
    out = first.new_empty(n, H, W, dtype=torch.uint8)
    tensors = [t.contiguous() for layer in layers for t in layer]
    hidden, last = (tensors[:2] if len(layers) > 1 else [first, first]), tensors[-2:] or [first, first]
    DG = last[0].shape[1] if layers else 1
    major = torch.cuda.get_device_capability(first.device)[0] if first.is_cuda else 9
    config = wavefront_config(H, DF, DG, len(layers), major, AMD)
    if n:
        wavefront_kernel[(triton.cdiv(n, config["BN"]),)](
            first, first if places is None else places.contiguous(), *hidden, *last, out, n, int32(seed),
            int32(seed >> 32), H, W, OFFSETS=tuple(offsets), S=s, K=K, A=max(a for a, _ in offsets), DF=DF, DG=DG,
            PLACES=places is not None, LAYERS=len(layers), enable_fp_fusion=True, **config)
    return out


# ---- public


def wavefront_sample(n: int, shape, offsets, first: Tensor, places: Tensor | None, layers, seed: int) -> Tensor:
    """n images (n, H, W) uint8, on first's device, in that order for a seed of up to 64 bits.

    ValueError for parents that do not come before their pixel and for shapes other than the docstring's."""
    (H, W), (K, columns) = shape, (len(offsets), first.shape[-1])
    if not offsets or any(a < 0 or a == 0 and b < 1 for a, b in offsets):
        raise ValueError(f"a parent must come before its pixel: above, or left in the same row; got {offsets}")
    sizes = [columns, *(len(b) for _, b in layers)]
    if (n < 0 or min(H, W) < 1 or first.shape != (2**K, columns) or places is not None
            and places.shape != (H * W, columns) or sizes[-1] != 1
            or any(w.shape != (m, k) for (w, _), k, m in zip(layers, sizes, sizes[1:]))):
        raise ValueError(f"for {K} parents and {H} x {W} pixels: first (2^{K}, F), places ({H * W}, F) or None, layers "
                         f"(G, F), (G,) down to G = 1 are wanted; got {tuple(first.shape)}, "
                         f"{None if places is None else tuple(places.shape)}, {[tuple(w.shape) for w, _ in layers]}")
    tensors = [first, *([] if places is None else [places]), *(t for layer in layers for t in layer)]
    refuse_gradients("wavefront_sample", *tensors)
    s = slope(offsets)
    far, kinds = max(s * a + b for a, b in offsets), {t.dtype for t in tensors}
    why_not = ("" if H <= 128 and far <= 32 and len(layers) <= 2 and max(sizes) <= 64 and kinds == {torch.float32} else
               f"{H} rows, parents {far} waves back, {len(layers)} layers up to {max(sizes)} wide, {kinds}")
    sample = _sample_triton if backend(first, why_not) == "triton" else _sample_torch
    return sample(n, tuple(shape), tuple(offsets), first, places, list(layers), seed)
