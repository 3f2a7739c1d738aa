"""What came out: how far samples are from the truth, each number beside its floor, and pictures of both.

    two_dimensional(samples, truth) -> {name: metric}   points (N, 2) against a density that is known exactly
    nll, exact_kl, bits_per_dim                         for models with a density
    table(metrics) -> str                               what a run prints last
    samples_picture, grid_picture, clouds_picture, strip_picture, gif, landscape_picture,
    curves_picture                  files; each is written aside and renamed into place

A metric is {value, floor, unit, better}. Its floor is the same number for a second true sample of the same size: at
the floor, nothing tells the model from the truth at this sample size. Far above it something is wrong; far below it
too (the cross-entropy of over-sharp samples falls below the entropy).

The headline in 2-D is `klh`, the KL divergence between the truth smoothed by N(0, h^2 I), which is analytic, and the
kernel density estimate of the samples with the same h [1]: no bias, only a variance of about 16/N nats. A Frechet
distance on raw points is no headline: it sees two moments, so a blob with the right covariance scores the floor while
it misses every mode. Samples that are NaN or far away never raise: they are lost mass, or make a distance infinite.

Conventions: 2-D data has unit variance a coordinate, so [-3, 3]^2 holds it. Images are uint8 with values
0 .. levels - 1 (2 levels: binary); the pictures also take floats in [-1, 1]. Nothing here touches a global generator.

References
  [1] Silverman, Density Estimation for Statistics and Data Analysis, 1986, section 4.2 (kernel estimates)
  [2] Rabin, Peyre, Delon, Bernot, Wasserstein barycenter and its application to texture mixing, 2011 (sliced W2)
  [3] Szekely, Rizzo, Energy statistics: a class of statistics based on distances, 2013
  [4] Dowson, Landau, The Frechet distance between multivariate normal distributions, 1982
"""

import math
import os
import pathlib

import torch
from torch import Tensor

# ratios to the floor mean nothing here: zero is not a perfect score, or the floor itself scatters about zero
OFFSETS = {"cross_entropy", "nll", "bits_per_dim", "elbo", "energy_distance", "log_z", "calibration_error"}


def metric(value, floor=None, unit: str = "", better: str = "lower") -> dict:
    """One entry of metrics.json. `better` is "lower" or "higher"; `floor` None where there is none."""
    if better not in ("lower", "higher"):
        raise ValueError(f'better must be "lower" or "higher", got {better!r}')
    return {"value": float(value), "floor": None if floor is None else float(floor), "unit": unit, "better": better}


# ---- 2-D: samples against a density that is known


def _points(x) -> Tensor:
    x = torch.as_tensor(x).detach().to("cpu", torch.float64)
    if x.dim() != 2 or not x.numel():
        raise ValueError(f"expected points of shape (N, D) with N > 0, got {tuple(x.shape)}")
    return x


def _axis(cells: int, half_width: float) -> Tensor:
    """Midpoints of the cells, (cells,)."""
    return (torch.arange(cells, dtype=torch.float64) + 0.5) * (2 * half_width / cells) - half_width


def kde(x: Tensor, axis: Tensor, h: float) -> Tensor:
    """Gaussian kernel density of x (N, 2) on the grid axis x axis, (G, G), first coordinate first. [1] (4.5)

    The kernel is separable, so the sum over samples is one (G, N) x (N, G) product: exact, no histogram. Points that
    are not finite add nothing but still count in N, so they are mass lost."""
    density = torch.zeros(len(axis), len(axis), dtype=torch.float64)
    for part in x[x.isfinite().all(-1)].split(16384):
        first, second = ((-0.5 * ((axis[:, None] - c) / h).square()).exp() for c in part.T)    # (G, n) each
        density += first @ second.T
    return density / (len(x) * 2 * math.pi * h**2)


def klh(samples, truth, h: float = 0.1, cells: int = 200, half_width: float = 3.0) -> float:
    """KL(p * N(0, h^2 I) || KDE_h(samples)) in nats on a grid. The floor is about 16/N for unit variance data.

    The density of the samples is floored at 1e-12, so a missed mode of weight w costs about 26 w, not infinity."""
    axis = _axis(cells, half_width)
    p = truth.log_prob(torch.cartesian_prod(axis, axis), 1.0, h).double().exp()
    q = kde(_points(samples), axis, h).flatten().clamp_min(1e-12)
    return (torch.xlogy(p, p / q).sum() * (axis[1] - axis[0]) ** 2).item()


def cross_entropy(samples, truth) -> float:
    """-mean log p(samples) in nats, p exact. Equal to the entropy for the truth; below it the samples are over-sharp,
    above it they lie off the data. Infinite as soon as one sample is not finite or outside the support."""
    x = _points(samples)
    if not x.isfinite().all():
        return math.inf
    return -truth.log_prob(x).double().mean().item()


def _modes(samples, truth) -> tuple[Tensor, Tensor]:
    """The nearest mode of each finite sample (n,), and whether it is within 3 sigma of it (n,)."""
    x = _points(samples)
    distance, nearest = torch.cdist(x[x.isfinite().all(-1)], truth.modes.double().cpu()).min(-1)
    return nearest, distance <= 3 * truth.mode_std


def mode_recall(samples, truth) -> int:
    """How many of the K modes are found: it is the nearest, within 3 sigma, of more than 0.2 N/K samples."""
    nearest, near = _modes(samples, truth)
    K = len(truth.modes)
    return int((nearest[near].bincount(minlength=K) > 0.2 * len(samples) / K).sum())


def within_3_sigma(samples, truth) -> float:
    """Share of samples within 3 sigma of their nearest mode; 1 - exp(-4.5) = 0.9889 for round, separate modes."""
    return _modes(samples, truth)[1].sum().item() / len(samples)


def mode_kl(samples, truth) -> float:
    """KL(uniform || share of the samples nearest to each mode) in nats; (K - 1)/(2N) is expected of the truth.

    Half a sample is added to each count, so a dropped mode gives a finite number; samples not finite are lost mass."""
    K = len(truth.modes)
    share = (_modes(samples, truth)[0].bincount(minlength=K) + 0.5) / (len(samples) + 0.5 * K)
    return -(share * K).log().mean().item()


# ---- any dimension: samples against samples


def _pair(x, y) -> tuple[Tensor, Tensor, bool]:
    x, y = _points(x), _points(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"points of different dimension: {x.shape[1]} and {y.shape[1]}")
    return x, y, bool(x.isfinite().all() and y.isfinite().all())


def sliced_w2(x, y, angles: int = 64) -> float:
    """Root mean square, over directions, of the exact W2 between projections; in units of the data. [2]

    Sizes may differ. In the plane the directions are equispaced (no noise); else they are drawn from a fixed seed."""
    x, y, finite = _pair(x, y)
    if not finite:
        return math.inf
    if x.shape[1] == 2:
        theta = torch.arange(angles, dtype=torch.float64) * (math.pi / angles)
        directions = torch.stack([theta.cos(), theta.sin()])                    # (2, A)
    else:
        g = torch.Generator().manual_seed(0)
        directions = torch.randn(x.shape[1], angles, generator=g, dtype=torch.float64)
        directions /= directions.norm(dim=0)
    quantiles_x, quantiles_y = ((z @ directions).sort(0).values for z in (x, y))
    steps = [torch.arange(1, len(z) + 1, dtype=torch.float64) / len(z) for z in (x, y)]
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), *steps]).sort().values  # where a quantile function jumps
    middle = (edges[1:] + edges[:-1]) / 2
    i, j = ((middle * len(z)).long().clamp_max(len(z) - 1) for z in (x, y))
    return ((quantiles_x[i] - quantiles_y[j]).square() * edges.diff()[:, None]).sum(0).mean().sqrt().item()


def energy_distance(x, y, most: int = 2000) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| from the first 2000 of each; unbiased, so it may be below zero. [3]"""
    x, y, finite = _pair(x, y)
    if not finite:
        return math.inf
    x, y = x[:most], y[:most]
    if min(len(x), len(y)) < 2:
        raise ValueError("the energy distance needs two points of each")
    across = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").mean()
    return (2 * across - torch.pdist(x).mean() - torch.pdist(y).mean()).item()


def frechet_gaussian(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> Tensor:
    """|m1 - m2|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), the squared W2 between two Gaussians. [4]"""
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T                     # A^1/2, symmetric
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp_min(0).sqrt().sum()
    return (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross


def frechet(x, y) -> float:
    """The distance between the Gaussians that match the moments of x (N, D) and y (M, D), in squared units. [4]

    On raw points no headline: it is blind to all but two moments, and a blob with the covariance of a ring of modes
    scores the floor (0.0009 where the floor is 0.0005, N = 10000). Use it in the features of a classifier."""
    x, y, finite = _pair(x, y)
    if not finite:
        return math.inf
    if min(len(x), len(y)) < 2:
        raise ValueError("a covariance needs two points")
    cov_x, cov_y = (torch.atleast_2d(torch.cov(z.T)) for z in (x, y))
    return frechet_gaussian(x.mean(0), cov_x, y.mean(0), cov_y).clamp_min(0).item()


def two_dimensional(samples, truth, seed: int = 0) -> dict[str, dict]:
    """All numbers for points (N, 2) against `truth` (see data.py), each with its floor; those of modes if it has any.

    Floors come from two true samples of size N drawn with `seed`: one in the place of the samples, one to compare
    with. The floor of `cross_entropy` is the entropy: below it is over-sharp, not better."""
    n = len(_points(samples))
    g = torch.Generator().manual_seed(seed)
    second, reference = truth.sample(n, generator=g), truth.sample(n, generator=g)
    both = lambda f, against, unit, better="lower": metric(f(samples, against), f(second, against), unit, better)
    out = {"klh": both(klh, truth, "nats"),
           "cross_entropy": metric(cross_entropy(samples, truth), truth.entropy, "nats")}
    if truth.modes is not None:
        out["modes"] = both(mode_recall, truth, f"of {len(truth.modes)}", "higher")
        out["within_3_sigma"] = both(within_3_sigma, truth, "share", "higher")
        out["mode_kl"] = both(mode_kl, truth, "nats")
    out["sliced_w2"] = both(sliced_w2, reference, "std")
    out["energy_distance"] = both(energy_distance, reference, "std")
    return out


# ---- models with a density


@torch.no_grad()
def _log_prob(log_prob_fn, x: Tensor, device) -> Tensor:
    x = x.to(device, torch.get_default_dtype())
    return torch.cat([log_prob_fn(part).detach().double().cpu() for part in x.split(8192)])


def nll(log_prob_fn, truth, n: int = 10_000, seed: int = 0, device="cpu") -> dict:
    """Metric: -mean log p_theta(x) in nats at n true points; the floor is the exact value at the same points.

    `log_prob_fn`: (B, D) -> (B,) in nats. value - floor estimates KL(p || p_theta)."""
    x = truth.sample(n, generator=torch.Generator().manual_seed(seed))
    return metric(-_log_prob(log_prob_fn, x, device).mean(), -truth.log_prob(x.double()).double().mean(), "nats")


def exact_kl(log_prob_fn, truth, cells: int = 400, half_width: float = 4.0, device="cpu") -> float:
    """KL(p || p_theta) in nats by quadrature on [-half_width, half_width]^2, for `log_prob_fn`: (B, 2) -> (B,).

    Raises ValueError where the model's mass on the grid is more than 1e-2 from 1: then log p_theta is no log density
    (not normalised, or on another scale), or the grid is too small or too coarse for it."""
    axis = _axis(cells, half_width)
    grid, area = torch.cartesian_prod(axis, axis), (axis[1] - axis[0]) ** 2
    log_q, log_p = _log_prob(log_prob_fn, grid, device), truth.log_prob(grid).double()
    mass = (log_q.exp().sum() * area).item()
    if not abs(mass - 1) <= 1e-2:                                               # also refuses NaN
        raise ValueError(f"the model's mass on [-{half_width:g}, {half_width:g}]^2 is {mass:.4g}, expected 1 within "
                         "0.01: its log density is not normalised, or the grid is too small or too coarse for it")
    inside = log_p > -math.inf                                                  # p log p = 0 outside the support
    p = log_p[inside].exp()
    return ((p * (log_p[inside] - log_q[inside])).sum() / p.sum()).item()       # hard edges make p.sum() * area inexact


def bits_per_dim(nll_nats: float, dims: int) -> float:
    """-log2 p(x) / dims from a negative log-likelihood in nats of *integer* data: 8 for uniform 256 levels.

    A density over data scaled by s a coordinate first needs nll - dims log s (s = 2/255 for [-1, 1]), and noise."""
    return nll_nats / (dims * math.log(2))


# ---- the table


def table(metrics: dict[str, dict]) -> str:
    """Aligned columns. The fourth is the ratio to the floor of a distance, the difference of anything else."""
    rows = [("metric", "value", "floor", "vs floor", "unit", "better")]
    for name, m in metrics.items():
        value, floor, against = m["value"], m["floor"], ""
        if floor is not None and math.isfinite(value) and math.isfinite(floor):
            ratio = m["better"] == "lower" and floor > 0 and name not in OFFSETS
            against = f"{value / floor:.3g}x" if ratio else f"{value - floor:+.2g}"
        rows.append((name, f"{value:.4g}", "-" if floor is None else f"{floor:.4g}", against, m["unit"], m["better"]))
    widths = [max(len(row[c]) for row in rows) for c in range(6)]
    align = (str.ljust, str.rjust, str.rjust, str.rjust, str.ljust, str.ljust)
    lines = ["  ".join(f(cell, w) for f, cell, w in zip(align, row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


# ---- pictures: one house style, ink on paper with one accent

PAPER, INK, MUTED, FAINT, ACCENT = "#fbfaf7", "#23262d", "#7d8590", "#dcdad3", "#c8452f"
EXTENT = 2.7                                                                    # half the side of a plot of points


def _write(path, save):
    """`save(handle)` into a file beside `path`, then rename: a reader sees the old picture or the new one, whole."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as handle:
            save(handle)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _figure(rows: int, columns: int, width: float, height: float):
    """A figure drawn by Agg, without pyplot and its global state, and its axes (rows, columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), dpi=120, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_facecolor(PAPER)
        ax.tick_params(which="both", colors=MUTED, labelsize=8, length=0)
        for spine in ax.spines.values():
            spine.set_color(FAINT)
    return figure, axes


def _title(ax, text: str, color=INK):
    ax.set_title(text, fontsize=10, color=color, loc="left", pad=6)


def _plane(ax):
    ax.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), aspect="equal", xticks=[], yticks=[])


def _rgb(color: str) -> list[int]:
    return [int(color[i:i + 2], 16) for i in (1, 3, 5)]


def _bytes(x, levels: int) -> Tensor:
    """uint8 0 .. levels - 1, or floats in [-1, 1] (clamped, NaN black), to uint8 0 .. 255 on the CPU."""
    x = torch.as_tensor(x).detach().cpu()
    if x.is_floating_point():
        return ((x.float().nan_to_num(-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return (x.float() * (255 / (levels - 1))).round().clamp(0, 255).to(torch.uint8)


def _tile(x, side: int, levels: int):
    """The first side^2 of images (N, C, H, W) as one array (height, width, 3), a gap of paper between them."""
    import numpy as np

    x = _bytes(x[: side * side], levels)
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    gap = max(1, x.shape[-1] // 14)
    paper = torch.tensor(_rgb(PAPER), dtype=torch.uint8)
    H, W = x.shape[2] + gap, x.shape[3] + gap
    rows = -(-len(x) // side)
    sheet = paper[:, None, None].repeat(1, rows * H - gap, side * W - gap)
    for i, image in enumerate(x):
        top, left = i // side * H, i % side * W
        sheet[:, top:top + x.shape[2], left:left + x.shape[3]] = image
    return np.ascontiguousarray(sheet.permute(1, 2, 0).numpy())


def _show_tile(ax, x, side: int, levels: int):
    sheet = _tile(x, side, levels)
    ax.imshow(sheet, interpolation="nearest" if sheet.shape[0] < 600 else "antialiased")
    ax.set_axis_off()


def _scatter(ax, x, color, size: float = 2.0, most: int = 5000):
    x = torch.as_tensor(x).detach().float().cpu()
    inside = (x.abs() <= EXTENT).all(-1)                                        # NaN is outside
    shown = x[inside][:most].numpy()
    alpha = min(1.0, 0.3 + 300 / max(1, len(shown)))
    ax.scatter(shown[:, 0], shown[:, 1], s=size, color=color, alpha=alpha, linewidths=0)
    _plane(ax)
    return int((~inside).sum())


def samples_picture(path, real, fake, truth=None, levels: int = 256):
    """Real beside generated: points (N, 2), with the true density first where `truth` is given; or uint8 images
    (N, C, H, W), 8 x 8 of each, with the levels of `truth` where it is given."""
    if real.ndim == 4:
        figure, axes = _figure(1, 2, 4.2, 4.5)
        for ax, x, name in zip(axes[0], (real, fake), ("real", "generated")):
            _show_tile(ax, x, 8, getattr(truth, "levels", levels))
            _title(ax, name, ACCENT if name == "generated" else INK)
    else:
        figure, axes = _figure(1, 2 if truth is None else 3, 3.6, 3.9)
        if truth is not None:
            from matplotlib.colors import LinearSegmentedColormap

            axis = _axis(300, EXTENT)
            density = truth.log_prob(torch.cartesian_prod(axis, axis), 1.0, 0.03).exp().view(300, 300)
            axes[0, 0].imshow(density.sqrt().T.cpu().numpy(), origin="lower", extent=(-EXTENT, EXTENT) * 2,
                              cmap=LinearSegmentedColormap.from_list("ink", [PAPER, INK]), interpolation="bilinear")
            _plane(axes[0, 0])
            _title(axes[0, 0], "true density")
        _scatter(axes[0, -2], real, INK)
        _title(axes[0, -2], "real")
        outside = _scatter(axes[0, -1], fake, ACCENT)
        _title(axes[0, -1], "generated" + (f"  ({outside} outside)" if outside else ""), ACCENT)
    _write(path, lambda handle: figure.savefig(handle, format="png"))


def landscape_picture(path, energy, truth, chains, device="cpu", shown: int = 6):
    """The true density, exp(-E) beside it, and E itself with the ways of a few of the chains, states (N, 2), on top."""
    from matplotlib.colors import LinearSegmentedColormap

    figure, axes = _figure(1, 3, 3.6, 3.9)
    axis = _axis(300, EXTENT)
    grid = torch.cartesian_prod(axis, axis)
    e = -_log_prob(lambda x: -energy(x), grid, device)
    ink = LinearSegmentedColormap.from_list("ink", [PAPER, INK])
    levels = (truth.log_prob(grid, 1.0, 0.03).exp().sqrt(), (e.min() - e).exp().sqrt(), (e.min() - e).clamp(min=-25))
    for ax, field, name in zip(axes[0], levels, ("true density", "exp(-E)", "E, and chains on their way")):
        ax.imshow(field.view(300, 300).T.numpy(), origin="lower", extent=(-EXTENT, EXTENT) * 2, cmap=ink,
                  interpolation="bilinear")
        _plane(ax)
        _title(ax, name, INK if name == "true density" else ACCENT)
    ways = torch.stack([torch.as_tensor(x)[:shown] for x in chains]).cpu()
    for way in ways.unbind(1):
        axes[0, 2].plot(*way.T.numpy(), color=ACCENT, linewidth=0.8, marker=".", markersize=2)
    _write(path, lambda handle: figure.savefig(handle, format="png"))


def grid_picture(path, images, row_labels=None, column_labels=None, levels: int = 256, title: str = ""):
    """Images (R, C, channels, H, W), uint8 or floats in [-1, 1], a label for each row and column: traversals,
    interpolations, edits, or the same examples epoch after epoch."""
    import numpy as np

    x = torch.as_tensor(images)
    R, C, channels, H, W = x.shape
    x = _bytes(x.flatten(0, 1), levels)
    x = x[:, :3] if channels >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    zoom = max(1, round(72 / max(H, W)))
    x = x.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    H, W, gap = H * zoom, W * zoom, 4
    sheet = torch.tensor(_rgb(PAPER), dtype=torch.uint8).repeat(R * (H + gap) - gap, C * (W + gap) - gap, 1)
    for i, image in enumerate(x):
        top, left = i // C * (H + gap), i % C * (W + gap)
        sheet[top:top + H, left:left + W] = image.permute(1, 2, 0)
    width, height = sheet.shape[1] / 120 + 3, sheet.shape[0] / 120 + 1          # room for labels, cut off below
    figure, axes = _figure(1, 1, width, height)
    ax = axes[0, 0]
    figure.set_layout_engine("none")
    ax.set_position((2.5 / width, 0.2 / height, 1 - 3 / width, 1 - 1 / height))     # a pixel is a pixel
    ax.imshow(np.ascontiguousarray(sheet.numpy()), interpolation="nearest")
    rows, columns = ([i * (side + gap) + side / 2 for i in range(n)] for n, side in ((R, H), (C, W)))
    ax.set_yticks(rows if row_labels else [], row_labels or [], color=INK, fontsize=9)
    ax.xaxis.tick_top()
    ax.set_xticks(columns if column_labels else [], column_labels or [], color=MUTED, fontsize=8)
    ax.spines[:].set_visible(False)
    if title:
        _title(ax, title)
    _write(path, lambda handle: figure.savefig(handle, format="png", bbox_inches="tight", pad_inches=0.1))


def clouds_picture(path, rows, shown: int = 4, far: float = 0.05) -> None:
    """Rows of (title, clouds, distances of their points), a column a cloud; red is `far` from the surface or more."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    colours = LinearSegmentedColormap.from_list("distance", [INK, ACCENT])
    figure = Figure(figsize=(2.2 * shown, 2.3 * len(rows)), dpi=110, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    for r, (title, clouds, distances) in enumerate(rows):
        for c in range(shown):
            ax = figure.add_subplot(len(rows), shown, r * shown + c + 1, projection="3d", facecolor=PAPER)
            x, d = (torch.as_tensor(t[c]).detach().cpu().float().nan_to_num() for t in (clouds, distances))
            size = min(2.5, 8000 / len(x))
            ax.scatter(*x.T.numpy(), s=size, c=d.numpy(), cmap=colours, vmin=0, vmax=far, linewidths=0)
            ax.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
            ax.set_box_aspect((1, 1, 1), zoom=1.5)
            ax.set_axis_off()
            ax.set_title("" if c else title, fontsize=10, color=INK, loc="left")
    _write(path, lambda handle: figure.savefig(handle, format="png", facecolor=PAPER))


def strip_picture(path, frames, labels, levels: int = 256):
    """K snapshots of a sampling process in a row, points (N, 2) or images (the first 4 x 4), with K labels."""
    figure, axes = _figure(1, len(frames), 1.9, 2.15)
    for i, (ax, x, label) in enumerate(zip(axes[0], frames, labels)):
        color = ACCENT if i == len(frames) - 1 else INK
        if x.ndim == 4:
            _show_tile(ax, x, 4, levels)
        else:
            _scatter(ax, x, color, size=1.2, most=3000)
        _title(ax, str(label), color)
    _write(path, lambda handle: figure.savefig(handle, format="png"))


def _shade(x, size: int):
    """Points (N, 2) as a palette image (size, size): how many fall on a pixel and its neighbours, in 16 shades."""
    x = torch.as_tensor(x).detach().float().cpu()
    x = x[(x.abs() < EXTENT).all(-1)]
    column, row = ((x / (2 * EXTENT) + 0.5) * size).long().clamp(0, size - 1).unbind(-1)
    counts = ((size - 1 - row) * size + column).bincount(minlength=size * size).view(1, 1, size, size).float()
    soft = torch.nn.functional.avg_pool2d(counts, 3, 1, 1)[0, 0] * (9 * (size / 320) ** 2)
    return (15 * (1 - (-soft / max(1.0, len(x) / 1500)).exp())).round().to(torch.uint8).numpy()


def gif(path, frames, fps: int = 12, levels: int = 256, most_bytes: int = 600_000):
    """A film of points (N, 2) or images (8 x 8 of them), at most 320 pixels wide, the last frame held for 1.5 s.

    Where the file would pass `most_bytes`, it is drawn smaller, then with every second frame, and so on."""
    import io

    from PIL import Image

    frames = list(frames)
    low, high, dark = map(_rgb, (PAPER, ACCENT, INK))
    shade = lambda k: (low, high, k / 11) if k < 12 else (high, dark, (k - 11) / 8)
    palette = [round(a + (b - a) * t) for low, high, t in map(shade, range(16)) for a, b in zip(low, high)]

    def draw(x, size):
        if x.ndim == 4:
            side = min(8, math.isqrt(max(1, len(x))))
            sheet = Image.fromarray(_tile(x, side, levels))
            scale = size / max(sheet.size)
            shape = [max(1, int(s * (int(scale) if scale >= 1 else scale))) for s in sheet.size]
            return sheet.resize(shape, Image.NEAREST if scale >= 1 else Image.BOX).quantize(64, dither=Image.NONE)
        image = Image.fromarray(_shade(x, size))
        image.putpalette(palette)
        return image

    for every, size in ((1, 320), (1, 240), (1, 180), (2, 240), (2, 180), (4, 180), (8, 128)):
        film, buffer = [draw(x, size) for x in frames[::-1][::every][::-1]], io.BytesIO()   # the last one stays
        durations = [round(1000 * every / fps)] * (len(film) - 1) + [1500]
        film[0].save(buffer, "GIF", save_all=True, append_images=film[1:], duration=durations, loop=0)
        if buffer.tell() <= most_bytes:
            break
    _write(path, lambda handle: handle.write(buffer.getvalue()))


def _smooth(raw):
    """Centred moving average over a twentieth of the curve, shorter at its beginning."""
    import numpy as np

    total, i = np.concatenate([[0.0], np.cumsum(raw)]), np.arange(len(raw))
    reach = np.minimum(len(raw) // 40, i // 3)                                  # short at first, where losses fall fast
    left, right = i - reach, np.minimum(len(raw), i + reach + 1)
    return (total[right] - total[left]) / (right - left)


def curves_picture(path, rows, floors: dict[str, float] | None = None):
    """One panel for each number of the log `rows` ({"step": .., name: ..}): raw faint, smoothed on top, and a dashed
    line at `floors[name]`. The steps are on a log axis where most of the change lies in the first tenth."""
    import numpy as np

    floors, series = floors or {}, {}
    for name in dict.fromkeys(k for row in rows for k in row if k != "step"):
        pairs = np.array([(row["step"], float(row[name])) for row in rows if name in row], dtype=float)
        if np.isfinite(pairs).all(1).any():
            series[name] = pairs[np.isfinite(pairs).all(1)]
    columns = min(3, max(1, len(series)))
    figure, axes = _figure(max(1, -(-len(series) // columns)), columns, 4.2, 2.7)
    for ax in axes.flat[len(series):]:
        ax.set_axis_off()
    for ax, (name, pairs) in zip(axes.flat, series.items()):
        step, raw = pairs.T
        smooth = _smooth(raw)
        ax.plot(step, raw, color=MUTED, alpha=0.35, linewidth=0.7)
        ax.plot(step, smooth, color=ACCENT, linewidth=1.6)
        low, high = min(np.quantile(raw, 0.002), smooth.min()), max(np.quantile(raw, 0.998), smooth.max())
        if name in floors:
            floor = float(floors[name])
            low, high = min(low, floor), max(high, floor)
            ax.axhline(floor, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            ax.annotate(f"floor {floor:.4g}", (0, floor), xycoords=("axes fraction", "data"), xytext=(4, 3),
                        textcoords="offset points", fontsize=8, color=INK)
        margin = 0.06 * (high - low) if high - low > 1e-9 * abs(high) else 0.5 * abs(high or 1)
        if low > 0 and high > 50 * low:
            ax.set_yscale("log")
        else:
            ax.set_ylim(low - margin, high + margin)
        early = len(raw) > 20 and abs(raw[0] - smooth[len(raw) // 10]) > 0.7 * np.ptp(smooth) > 0
        ax.set(xscale="log" if early else "linear", xlim=(max(int(early), step[0]), max(step[-1], step[0] + 1)))
        ax.grid(axis="y", color=FAINT, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.set_xlabel("step", fontsize=8, color=MUTED)
        _title(ax, name)
    _write(path, lambda handle: figure.savefig(handle, format="png"))
