"""What an invertible model's latent lets one do to an image, as pictures and as numbers.

    report(model, truth, folder, task) -> {name: metric}

`model` has encode(x) -> z (B, D) and decode(z) -> x in [-1, 1], exact inverses up to the levels of the data, and
`sizes()`: how many numbers of z each scale has, the coarsest first.

Tasks
  noise        decode(z + a eps) for growing a: how far z may move before the image does
  zero         parts of z set to 0, scale by scale and by the largest entries: what each part carries
  interpolate  decode((1 - a) z1 + a z2), a = 0, 0.05, .. 1 [2]; the straight middle has norm |z| / sqrt 2 in many
               dimensions, so the same on the sphere [1] stands below
  attributes   z_you + (z_with - z_without): of the means over images with and without it [2], judged by a classifier of
               real images

References
  [1] White, Sampling Generative Networks, arXiv 1609.04468     [2] Kingma, Dhariwal, Glow, arXiv 1807.03039, section 6
"""

from types import SimpleNamespace

import torch
from torch import Tensor

import latents
from metrics import grid_picture, metric

TASKS = ("noise", "zero", "interpolate", "attributes")
AMPLITUDES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)


def noised(z: Tensor, amplitudes, generator=None) -> Tensor:
    """(A, B, D): z + a eps with one eps (B, D)."""
    eps = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
    return torch.stack([z + a * eps for a in amplitudes])


def zeroed(z: Tensor, sizes) -> dict[str, Tensor]:
    """z (B, D) with parts set to 0: each scale of `sizes` (coarsest first), and the largest tenth of each row."""
    out, start = {"z": z}, 0
    for k, size in enumerate(sizes):
        part = z.clone()
        part[:, start : start + size] = 0
        out[f"scale {k + 1} of {len(sizes)} = 0"], start = part, start + size
    largest = z.abs().topk(max(1, z.shape[1] // 10), 1).indices
    return out | {"largest tenth = 0": z.scatter(1, largest, 0), "all = 0": torch.zeros_like(z)}


def linear(z1: Tensor, z2: Tensor, a: float) -> Tensor:
    return (1 - a) * z1 + a * z2


def spherical(z1: Tensor, z2: Tensor, a: float) -> Tensor:
    """Along the great circle: of equal lengths |z1| and |z2|, that length is kept. [1]"""
    cosine = torch.nn.functional.cosine_similarity(z1, z2, dim=1).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = cosine.acos()[:, None]
    return (((1 - a) * angle).sin() * z1 + (a * angle).sin() * z2) / angle.sin()


@torch.no_grad()
def report(model, truth, folder, task: str = "all", attribute: str = "", seed: int = 0) -> dict[str, dict]:
    """Metrics and pictures of the tasks named; {} for "none". Attributes where the set has some.

    reconstruction: share of pixels that decode(encode(x)) gives back. noise_A: mean |change| of a pixel, in levels,
    with noise of amplitude A. attribute_added and attribute_unasked: see latents.report."""
    if task == "none":
        return {}
    chosen = TASKS if task == "all" else (task,)
    device, levels, out = next(model.parameters()).device, truth.levels, {}
    pick = torch.randperm(len(truth.test), generator=torch.Generator().manual_seed(seed))
    scaled = lambda images, rows: truth.scale(images[rows]).to(device)
    decode = lambda z: torch.cat([model.decode(part) for part in z.split(100)])
    encode = lambda x: torch.cat([model.encode(part) for part in x.split(100)])
    x = scaled(truth.test, pick[:100])
    z = encode(x)
    again = decode(z)
    nearest = model.quantize(model.dequantize(x))                       # what is left of x at fewer bits
    out["reconstruction"] = metric((again - nearest).abs().lt(0.5 / levels).double().mean(), 1, "share", "higher")
    if "noise" in chosen:
        moved = noised(z, AMPLITUDES, torch.Generator().manual_seed(seed))
        shown = torch.stack([decode(row) for row in moved])             # (A, B, C, H, W)
        change = (shown - shown[0]).abs().flatten(1).mean(1) * (levels - 1) / 2
        out |= {f"noise_{a:g}": metric(c, 0, "levels") for a, c in zip(AMPLITUDES[1:], change[1:])}
        grid_picture(folder / "noise.png", shown[:, :6].transpose(0, 1).cpu(), None,
                     [f"{a:g}" for a in AMPLITUDES], levels, "z + a eps")
    if "zero" in chosen:
        parts = zeroed(z[:6], model.sizes())
        shown = torch.stack([decode(part) for part in parts.values()], 1)
        grid_picture(folder / "zero.png", shown.cpu(), None, list(parts), levels)
    if "interpolate" in chosen:
        way = [k / 20 for k in range(21)]
        rows = [torch.stack([f(z[:3], z[3:6], a) for a in way], 1) for f in (linear, spherical)]
        rows = torch.stack(rows, 1).flatten(0, 1)                       # straight, then round, for each pair
        shown = decode(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        grid_picture(folder / "interpolation.png", shown[:, ::2].cpu(), ["straight", "sphere"] * 3,
                     [f"{a:g}" for a in way[::2]], levels)
    if "attributes" in chosen and hasattr(truth, "train_attributes"):
        with torch.enable_grad():                                       # it trains a classifier
            decoder = SimpleNamespace(mean=model.decode)
            out |= latents._attributes(decoder, truth, folder, pick, encode, scaled, attribute)
    return out
