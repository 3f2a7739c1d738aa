"""Drawn sets with known factors: Persian digits, dSprites and faces, made by formulas and without a download.

    persian(seed)              binary 28 x 28 digits with labels: the glyphs of matplotlib's fonts, jittered
    dsprites(folder, size)     737,280 binary images, one for each row of a grid of six factors            [1]
    faces(seed, size)          colour faces: ATTRIBUTES are fair coins, NUISANCES uniform, all independent
    pictures(folder, ...)      real faces with attributes: CelebA [2], or one folder of pictures a class

All but the first return the arguments of data.Images as a dict. dSprites is never held as pixels: `Drawn` stands where
a uint8 tensor would, and makes the images that are asked for. A pixel is ink if its middle lies in the shape; with p
the middle, c the sprite's place, s its scale, R(t) the turn by its orientation and q = R(t) (p - c) / s,

    square max |q| < 9.6    ellipse (q_x / 12.765)^2 + (q_y / 7.215)^2 < 1   c = 16 + 32 (posX, posY)    in pixels of 64
    heart  (9.595 sin^3 t, d - k (13 cos t - 5 cos 2t - 2 cos 3t - cos 4t)) is its edge, k = 0.6622, d = -1.437

These lengths were fitted to published rows: 94 images of 100 are theirs to the pixel, the rest mostly miss by one.

References
  [1] Matthey, Higgins, Hassabis, Lerchner, dSprites, https://github.com/deepmind/dsprites-dataset, 2017
  [2] Liu, Luo, Wang, Tang, Deep Learning Face Attributes in the Wild, 2015, arXiv:1411.7766
"""

import functools
import itertools
import math
import pathlib

import numpy as np
import torch
from torch import Tensor

import formats


def split(count: int, seed: int, part: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """The numbers below count shuffled by the seed, and the last of `part` parts (one at least) held out."""
    if count < 2:
        raise ValueError("one image cannot be split into train and test; at least two are needed")
    order = np.random.default_rng(seed).permutation(count)
    cut = count - max(1, count // part)
    return order[:cut], order[cut:]


# ---- drawn digits, Persian and Latin

PERSIAN_DIGITS, LATIN_DIGITS = tuple(chr(0x06F0 + k) for k in range(10)), tuple("0123456789")
FONTS = "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"


def _distance(mask):
    """Euclidean distance of each pixel to the nearest set one, (H, W) float32; exact, one axis after the other."""
    offset = np.arange(len(mask))
    square = np.square(offset[:, None] - offset).astype(np.float32)     # (64, 64): masks are square
    along = np.where(mask, 0, np.float32(1e6))
    along = (along[:, None, :] + square).min(-1)
    return np.sqrt((along.T[:, None, :] + square).min(-1).T)


def _glyphs(digits, side=64):
    """Signed distance to the stroke's edge (inside > 0) in 28ths of the picture, (4 fonts, 10 digits, side, side)."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder, fields = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf", []
    for font, digit in itertools.product(FONTS, digits):
        face = ImageFont.truetype(str(folder / font), 72, layout_engine=ImageFont.Layout.BASIC)
        left, top, right, bottom = face.getbbox(digit)
        canvas = Image.new("L", (side, side))
        ImageDraw.Draw(canvas).text(((side - left - right) / 2, (side - top - bottom) / 2), digit, 255, face)
        ink = np.asarray(canvas) > 127
        fields.append((_distance(~ink) - _distance(ink)) * 28 / side)
    return np.stack(fields).reshape(len(FONTS), 10, side, side)


def digits(seed, characters=PERSIAN_DIGITS, train=10_000, test=2_000):
    """Binary 28 x 28 digits, balanced: glyphs turned, slanted, scaled, bent, moved, thickened, thinned."""
    rng, glyphs = np.random.default_rng(seed), _glyphs(characters)
    count = (train + test) * 11 // 100 * 10                             # a tenth more, for the doubles that are dropped
    labels = np.arange(count) % 10
    draw = lambda low, high: rng.uniform(low, high, (count, 1, 1)).astype(np.float32)
    font = rng.integers(len(FONTS), size=count)
    angle, slant, bend_x, bend_y = draw(-0.2, 0.2), draw(-0.3, 0.3), draw(-1.5, 1.5), draw(-1.5, 1.5)
    width, height, move_x, move_y = draw(0.75, 1.15), draw(0.75, 1.1), draw(-2.5, 2.5), draw(-2.5, 2.5)
    thick, phase_x, phase_y = draw(-0.6, 0.9), draw(0, 2 * math.pi), draw(0, 2 * math.pi)
    grid = np.arange(28, dtype=np.float32) - 13.5
    y, x = grid[:, None] - move_y, grid - move_x                        # from the middle of the digit, in pixels
    x, y = (np.cos(angle) * x + np.sin(angle) * y) / width, (np.cos(angle) * y - np.sin(angle) * x) / height
    x = x + slant * y
    x, y = x + bend_x * np.sin(y / 5 + phase_x), y + bend_y * np.sin(x / 5 + phase_y)
    ink = _bilinear(glyphs, font, labels, (x + 14) * 64 / 28 - 0.5, (y + 14) * 64 / 28 - 0.5) + thick > 0
    images = ink.astype(np.uint8)[:, None]
    _, first = np.unique(np.packbits(images.reshape(count, -1), axis=1), axis=0, return_index=True)
    kept = np.stack([np.sort(first[labels[first] == digit])[:(train + test) // 10] for digit in range(10)], 1)
    one, two = kept[:train // 10].flatten(), kept[train // 10:].flatten()
    return images[one], labels[one], images[two], labels[two]


def _bilinear(fields, font, label, x, y):
    """fields[font, label] read at (x, y) pixels, clamped at the border; elementwise: threads change nothing."""
    side = fields.shape[-1]
    flat, base = fields.reshape(-1), ((font * 10 + label) * side * side).astype(np.int32)[:, None, None]
    x, y = np.clip(x, 0, side - 1.001), np.clip(y, 0, side - 1.001)
    i, j = y.astype(np.int32), x.astype(np.int32)
    y, x = y - i, x - j
    at = base + i * side + j
    upper = flat[at] * (1 - x) + flat[at + 1] * x
    return upper * (1 - y) + (flat[at + side] * (1 - x) + flat[at + side + 1] * x) * y


# ---- dSprites: a grid of six factors


class Drawn:
    """uint8 images that are made when they are asked for: stands where a tensor (N, C, H, W) of them would.

    index (N,) int64 names them and draw(index) makes them; [i] takes what a tensor takes along its first axis.
    """

    dtype = torch.uint8

    def __init__(self, draw, index: Tensor, shape, levels: int):
        self.draw, self.index, self.levels, self.device = draw, index, levels, index.device
        self.shape = torch.Size([len(index), *shape])

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i) -> Tensor:
        index = self.index[i]
        blocks = [self.draw(block) for block in index.reshape(-1).split(1024)]
        return torch.cat(blocks).reshape(*index.shape, *self.shape[1:])

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """For dim 0 alone, as data.Images.batches asks."""
        return self[index]

    def to(self, device) -> "Drawn":
        """The same images, made on that device."""
        return Drawn(self.draw, self.index.to(device), self.shape[1:], self.levels)

    def dim(self) -> int:
        return len(self.shape)

    def max(self) -> Tensor:
        """The highest level that there can be."""
        return torch.tensor(self.levels - 1, dtype=torch.uint8)


class Sprites:
    """The whole grid, drawn. An index is mixed radix over the six classes of its image, the last factor fastest. [1]"""

    names = "color", "shape", "scale", "orientation", "posX", "posY"
    values = (np.ones(1), np.arange(1.0, 4.0), np.linspace(0.5, 1, 6), np.linspace(0, 2 * np.pi, 40),
              np.linspace(0, 1, 32), np.linspace(0, 1, 32))

    def __init__(self, size: int = 64):
        self.size, self.sizes = size, tuple(len(v) for v in self.values)
        self.count = math.prod(self.sizes)

    def factors(self, index) -> Tensor:
        """Classes (..., 6) int64 of color, shape, scale, orientation, posX and posY of the images index (...)."""
        index = torch.as_tensor(index)
        if index.numel() and not 0 <= index.min() <= index.max() < self.count:
            raise ValueError(f"dsprites has the images 0 to {self.count - 1}; got {_short(index)}")
        return self._factors(index)

    def index(self, factors) -> Tensor:
        """Index (...) int64 of the images of classes (..., 6)."""
        factors = torch.as_tensor(factors)
        sizes = torch.tensor(self.sizes, device=factors.device)
        if factors.dtype.is_floating_point or factors.shape[-1:] != (6,) or ((factors < 0) | (factors >= sizes)).any():
            raise ValueError(f"dsprites has the classes (..., 6) below {self.sizes}; got {_short(factors)}")
        return (factors * torch.tensor(self._strides(), device=factors.device)).sum(-1)

    def draw(self, factors) -> Tensor:
        """Images (B, 1, size, size) uint8 of {0, 1} from classes (B, 6), on their device."""
        return self.images(self.index(factors))

    def images(self, index: Tensor) -> Tensor:
        """Images (B, 1, size, size) of index (B,), unchecked: nothing waits for a device."""
        values = [_table(k, index.device)[v] for k, v in enumerate(self._factors(index).unbind(-1))]
        return draw_sprites(*values[1:], self.size)

    def _strides(self):
        return [math.prod(self.sizes[k + 1:]) for k in range(6)]

    def _factors(self, index):
        return torch.stack([index // stride % n for stride, n in zip(self._strides(), self.sizes)], -1)


@functools.cache
def _table(k, device):
    """Values of factor k, float32; of orientation cosine and sine."""
    values = torch.as_tensor(Sprites.values[k], device=device)
    return (torch.stack([values.cos(), values.sin()], -1) if k == 3 else values).to(torch.float32)


def _short(x):
    return x.tolist() if x.numel() <= 12 else f"others among {tuple(x.shape)}"


def draw_sprites(shape, scale, turn, x, y, size: int = 64) -> Tensor:
    """Images (B, 1, size, size) uint8 of {0, 1}: the formulas at the top, in a window that no sprite leaves.

    shape (B,) 1 square, 2 ellipse, 3 heart; scale (B,) at most 1; turn (B, 2) cosine and sine; x, y (B,) from 0 to 1.
    """
    unit = size / 64
    reach = 13.6 * unit                                                 # the corner of a square of scale 1
    side = min(size, math.ceil(2 * reach) + 1)
    offset, places, pixels = torch.arange(side, device=x.device), [], []
    for v in (x, y):
        middle = size * (0.25 + 0.5 * v)[:, None]
        first = (middle - reach).floor().long().clamp(max=size - side)
        pixels.append(first + offset)                                   # (B, side)
        places.append((first + offset + 0.5 - middle) / (unit * scale[:, None]))
    p_x, p_y, (cos, sin) = places[0][:, None], places[1][:, :, None], turn[:, :, None, None].unbind(1)
    q_x, q_y = cos * p_x - sin * p_y, sin * p_x + cos * p_y             # (B, side, side)
    square = torch.maximum(q_x.abs(), q_y.abs()) - 9.6                  # each is below 0 inside
    ellipse = (q_x / 12.765).square() + (q_y / 7.215).square() - 1
    a = ((q_x.abs() / 9.595).clamp(max=1).log() * (2 / 3)).exp()          # sin^2 t at this q_x: edge at t and pi - t
    m = 1 - 2 * a                                                       # cos 2t
    heart = ((q_y + 1.437) / 0.6622 + 1 - 5 * m - 2 * m * m).abs() - (1 - a).sqrt() * (11 + 8 * a)
    is_square, is_ellipse, is_heart = ((shape == k).to(torch.float32)[:, None, None] for k in (1, 2, 3))
    ink = is_square * square + is_ellipse * ellipse + is_heart * heart < 0      # torch.where takes as long as all this
    at = pixels[1][:, :, None] * size + pixels[0][:, None]
    out = torch.zeros(len(x), size * size, dtype=torch.uint8, device=x.device)
    return out.scatter_(1, at.flatten(1), ink.flatten(1).to(torch.uint8)).reshape(-1, 1, size, size)


class PublishedSprites(Sprites):
    """Rows of a published file: packed bits, 378 MB for all; classes as the file counts them."""

    def __init__(self, path, size: int = 64):
        packed, shape = formats.read_npz(path, "imgs", bits=True)
        classes, values = (formats.read_npz(path, f"latents_{what}") for what in ("classes", "values"))
        if (len(shape) != 3 or shape[1:] != (64, 64) or classes.dtype.kind not in "iu" or classes.ndim != 2
                or classes.shape[1] not in (5, 6) or values.shape != classes.shape or len(classes) != shape[0]
                or classes.min() < 0 or classes.max() > 63):
            raise ValueError(f"{path}: expected imgs (N, 64, 64), latents_classes and latents_values (N, 5 or 6), "
                             f"found {shape}, {classes.shape} and {values.shape}")
        if classes.shape[1] == 5:                                       # without the one colour
            classes, values = (np.pad(v, ((0, 0), (1, 0)), constant_values=c) for v, c in ((classes, 0), (values, 1)))
        self.classes, self.size, self.count = torch.as_tensor(classes.astype(np.int8)), size, len(classes)
        self.sizes = tuple(int(c) + 1 for c in classes.max(0))
        self.values = tuple(np.full(n, np.nan) for n in self.sizes)
        for table, c, v in zip(self.values, classes.T, values.T):
            table[c] = v
        self.packed = {torch.device("cpu"): torch.as_tensor(packed)}
        self.row = torch.full([math.prod(self.sizes)], -1, dtype=torch.int32)
        self.row[super().index(self.classes.long())] = torch.arange(self.count, dtype=torch.int32)

    def index(self, factors) -> Tensor:
        row = self.row.to(torch.as_tensor(factors).device)[super().index(factors)].long()
        if (row < 0).any():
            raise ValueError(f"this file of dsprites lacks {int((row < 0).sum())} of the images: {_short(factors)}")
        return row

    def images(self, index: Tensor) -> Tensor:
        if index.device not in self.packed:                             # a batch is made where its index lies
            self.packed[index.device] = self.packed[torch.device("cpu")].to(index.device)
        shift = torch.arange(7, -1, -1, dtype=torch.uint8, device=index.device)
        x = (self.packed[index.device][index][..., None] >> shift & 1).reshape(-1, 1, 64, 64)
        if self.size == 64:
            return x
        return (torch.nn.functional.adaptive_avg_pool2d(x.float(), self.size) >= 0.5).to(torch.uint8)

    def _factors(self, index):
        return self.classes.to(index.device)[index].long()


def dsprites(folder, size: int | None = None, seed: int = 0) -> dict:
    """A published file dsprites*.npz of the folder (the largest), else the whole grid drawn; shape is the label.

    A sixth, drawn by the seed, is held out. Beside what data.Images holds: factors(index), index(factors) and
    draw(factors) as in Sprites, factor_names, factor_sizes, factor_values; train.index and test.index say which.
    """
    files = sorted(pathlib.Path(folder).glob("dsprites*.npz"), key=lambda path: (path.stat().st_size, path.name))
    full = [path for path in files if path.name.startswith("dsprites_ndarray")] or files
    grid = PublishedSprites(full[-1], size or 64) if full else Sprites(size or 64)
    parts = [torch.as_tensor(part) for part in split(grid.count, seed)]
    train, test = (Drawn(grid.images, part, (1, grid.size, grid.size), 2) for part in parts)
    train_labels, test_labels = (grid._factors(part)[:, 1] for part in parts)
    return dict(train=train, train_labels=train_labels, test=test, test_labels=test_labels, levels=2,
                class_names=("square", "ellipse", "heart"), factors=grid.factors, index=grid.index, draw=grid.draw,
                factor_names=grid.names, factor_sizes=grid.sizes, factor_values=grid.values,
                source=str(full[-1]) if full else "drawn")


# ---- faces: flat shapes painted one over the other, each a signed distance

ATTRIBUTES = "smile", "open_mouth", "closed_eyes", "glasses", "beard", "hat", "long_hair", "fair_hair"
NUISANCES = ("skin", "hair_tone", "iris", "clothes", "background", "turn", "tilt", "move_x", "move_y", "zoom", "width",
             "eye_size", "eye_gap", "brow", "nose", "mouth_width", "light")
SKIN = (1.0, 0.87, 0.75), (0.95, 0.76, 0.60), (0.84, 0.62, 0.45), (0.64, 0.43, 0.30), (0.43, 0.28, 0.21)
DARK_HAIR = (0.11, 0.09, 0.10), (0.22, 0.13, 0.10), (0.36, 0.21, 0.14)
FAIR_HAIR = (0.88, 0.52, 0.24), (0.93, 0.73, 0.38), (0.97, 0.86, 0.62)
IRIS = (0.25, 0.15, 0.10), (0.45, 0.30, 0.14), (0.24, 0.46, 0.28), (0.22, 0.42, 0.68)


def _colour(stops, t):
    """Colour (B, 3, 1, 1) at t (B, 1, 1) of [0, 1] along evenly spaced stops, each r, g, b."""
    stops = torch.tensor(stops, dtype=torch.float32)
    i = (t.flatten() * (len(stops) - 1)).clamp(0, len(stops) - 1 - 1e-4)
    return torch.lerp(stops[i.long()], stops[i.long() + 1], i.frac()[:, None])[..., None, None]


def _hue(t, mean, swing):
    """Colour (B, 3, 1, 1) at t (B, 1, 1) of [0, 1] around a wheel."""
    return mean + swing * torch.cos(2 * math.pi * (t[:, None] + _rgb(0, 1 / 3, 2 / 3)))


class _Canvas:
    """Colours rgb (B, 3, H, W) of a window, and the face's own coordinates there: half-width 1, y down.

    With X along a row of pixels, x = cos X + row_x and y = row_y - sin X: what is quadratic in them costs three passes.
    """

    def __init__(self, rgb, X, cos, sin, row_x, row_y, edge):
        self.rgb, self.X, self.cos, self.sin, self.row_x, self.row_y = rgb, X, cos, sin, row_x, row_y
        self.edge = edge                                                # pixels to a unit

    @classmethod
    def blank(cls, size, turn, x_0, y_0, zoom):
        """Turned by `turn` radians, its middle at (x_0, y_0) of a picture from -1 to 1."""
        at = (torch.arange(size, dtype=torch.float32) + 0.5) * (2 / size) - 1
        X, Y, cos, sin = at - x_0, at[:, None] - y_0, turn.cos() / zoom, turn.sin() / zoom
        rgb = torch.empty(len(X), 3, size, size, dtype=torch.float32)
        return cls(rgb, X, cos, sin, sin * Y, cos * Y, zoom * (size / 2))

    def window(self, left, top, right, bottom):
        """The part of the picture between these places, in units of the face."""
        size = self.rgb.shape[-1]
        cut = lambda low, high: slice(*(min(max(round((1.2 * v + 1) * size / 2), 0), size) for v in (low, high)))
        rows, columns = cut(top, bottom), cut(left, right)
        return _Canvas(self.rgb[:, :, rows, columns], self.X[:, :, columns], self.cos, self.sin, self.row_x[:, rows],
                       self.row_y[:, rows], self.edge)

    def xy(self):
        return self.cos * self.X + self.row_x, self.row_y - self.sin * self.X

    def ellipse(self, x_0, y_0, r_x, r_y):
        """Signed distance to an ellipse, below 0 inside; right to first order where it is 0."""
        a, b, c, d = self.cos / r_x, (self.row_x - x_0) / r_x, -self.sin / r_y, (self.row_y - y_0) / r_y
        r = r_x * r_y / (r_x + r_y)                                     # r_x/2 of a circle
        return (r * (a * a + c * c) * self.X + 2 * r * (a * b + c * d)).mul_(self.X).add_(r * (b * b + d * d - 1))

    def above(self, y_0, slope=0.0):
        """Signed distance to the half-plane y < y_0 + slope x."""
        return (-self.sin - slope * self.cos) * self.X + (self.row_y - y_0 - slope * self.row_x)

    def paint(self, colour, distance, opacity=None):
        """Lay a colour where distance < 0, with an edge one pixel wide."""
        cover = (distance * -self.edge).add_(0.5).clamp_(0, 1)
        self.rgb.lerp_(colour, (cover if opacity is None else cover.mul_(opacity))[:, None])


def _arc(x, y, half, rise, thick):
    """Signed distance to a stroke of the parabola y = rise (1 - (x / half)^2), |x| < half, of half-width thick."""
    half = torch.as_tensor(half, dtype=torch.float32)
    u = torch.minimum(torch.maximum(x, -half), half)
    v = y - rise * (1 - (u / half).square())
    return torch.sqrt((x - u).square() + v.square() / (1 + (2 * rise / half.square() * u).square())) - thick


def draw_faces(factors, size: int = 128, grey: bool = False) -> Tensor:
    """uint8 faces (B, 3 or 1, size, size) from factors (B, 25) in [0, 1]: ATTRIBUTES, then NUISANCES.

    An attribute between 0 and 1 is half there. Elementwise throughout: the same bits on any number of threads.
    """
    factors = torch.as_tensor(factors, dtype=torch.float32)
    many = len(ATTRIBUTES) + len(NUISANCES)
    if factors.dim() != 2 or factors.shape[1] != many or not ((factors >= 0) & (factors <= 1)).all():
        raise ValueError(f"expected factors (B, {many}) from 0 to 1, got {tuple(factors.shape)} or others among them")
    if size < 1:
        raise ValueError(f"faces of {size} x {size} pixels are impossible; the size must be at least 1")
    out = torch.empty(len(factors), 1 if grey else 3, size, size, dtype=torch.uint8)
    block = max(1, 2**18 // size**2)                                    # a layer of them fits in a cache
    shown = (factors[:, :len(ATTRIBUTES)] > 0).long() << torch.arange(len(ATTRIBUTES))
    for rows in shown.sum(1).argsort(stable=True).split(block):         # alike together: what none has is not painted
        rgb = _face(factors[rows], size)
        if grey:                                                        # luma of ITU-R BT.601
            rgb = (rgb * _rgb(0.299, 0.587, 0.114)).sum(1, keepdim=True)
        out[rows] = rgb.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8)
    return out


def _face(factors, size):
    """Colours (B, 3, size, size) of [0, 1]: layer upon layer, from the background to the hat."""
    f = dict(zip(ATTRIBUTES + NUISANCES, factors.T.reshape(-1, len(factors), 1, 1)))
    span = lambda name, low, high: low + (high - low) * f[name]
    half, turn = span("width", 0.42, 0.49), span("turn", -0.075, 0.075)  # of the head; how far the features move aside
    skin = _colour(SKIN, f["skin"])
    shade = skin * _rgb(0.82, 0.72, 0.70)
    hair = torch.lerp(_colour(DARK_HAIR, f["hair_tone"]), _colour(FAIR_HAIR, f["hair_tone"]), f["fair_hair"][:, None])
    dark_hair, cloth, back = hair * 0.72, _hue(f["clothes"], 0.50, 0.22), _hue(f["background"], 0.78, 0.12)
    canvas = _Canvas.blank(size, span("tilt", -0.03, 0.03), span("move_x", -0.02, 0.02), span("move_y", 0.07, 0.09),
                           span("zoom", 1.20, 1.26))

    canvas.rgb.copy_((back - 0.06 * canvas.row_y[:, None]).expand_as(canvas.rgb))
    canvas.paint(back * 0.35 + 0.65, canvas.ellipse(0.0, -0.05, 0.80, 0.80), 0.55)
    if f["long_hair"].any():
        part = canvas.window(-0.9, 0.1, 0.9, 1.0)                       # behind the neck; its top is hidden
        mane = torch.maximum(part.ellipse(0.0, 0.04, half + 0.12, 0.74), part.above(0.70))
        part.paint(dark_hair, mane, f["long_hair"])
    part = canvas.window(-1.0, 0.4, 1.0, 1.0)                           # shoulders, collar, neck and its shadow
    part.paint(cloth, part.ellipse(0.0, 1.18, 0.76, 0.52))
    part = canvas.window(-0.45, 0.2, 0.45, 1.0)
    part.paint(cloth * 0.82, part.ellipse(0.0, 0.67, 0.27, 0.20))
    throat = torch.maximum(part.xy()[0].abs() - 0.17, (part.xy()[1] - 0.46).abs() - 0.21)
    part.paint(skin * _rgb(0.9, 0.84, 0.82), torch.minimum(throat, part.ellipse(0.0, 0.67, 0.21, 0.15)))
    part.paint(shade * 0.92, torch.maximum(throat, part.ellipse(0.0, 0.20, 0.42, 0.46)), 0.6)

    for side in (-1, 1):
        part = canvas.window(-0.75, -0.2, -0.25, 0.4) if side < 0 else canvas.window(0.25, -0.2, 0.75, 0.4)
        x_0 = side * half * 0.98 - 0.4 * turn
        part.paint(shade, part.ellipse(x_0, 0.03, 0.085, 0.125))
        part.paint(skin, part.ellipse(x_0, 0.02, 0.075, 0.11))
    part = canvas.window(-0.7, -0.75, 0.7, 0.95)                        # the head, the light on it
    head = torch.minimum(part.ellipse(0.0, -0.06, half, 0.54), part.ellipse(0.0, 0.16, half * 0.80, 0.42))
    part.paint(skin, head)
    lit = part.ellipse(span("light", -0.14, 0.14), -0.05, half * 1.06, 0.64)
    part.paint(shade, torch.maximum(head, -lit), 0.5)
    for side in (-1, 1):
        part = canvas.window(-0.55, 0.05, 0.1, 0.5) if side < 0 else canvas.window(-0.1, 0.05, 0.55, 0.5)
        glow = (-10 * part.ellipse(side * 0.22 + turn, 0.16, 0.14, 0.10)).clamp_(0, 0.4)
        part.paint(torch.lerp(skin, _rgb(0.93, 0.36, 0.36), 0.5), torch.full_like(glow, -1), glow)
    if f["beard"].any():
        part = canvas.window(-0.7, -0.2, 0.7, 0.95)
        bare = part.ellipse(0.7 * turn, -0.02, half * 0.84, 0.38)
        beard = torch.minimum(part.ellipse(0.0, -0.06, half, 0.54), part.ellipse(0.0, 0.16, half * 0.80, 0.42)) - 0.012
        part.paint(dark_hair, torch.maximum(torch.maximum(beard, -bare), -part.above(-0.01)), f["beard"])
    part = canvas.window(-0.45, 0.0, 0.45, 0.75)
    x, y = part.xy()
    part.paint(shade * 0.94, _arc(x - 1.35 * turn, y - 0.155, span("nose", 0.04, 0.07), 0.03, 0.013))
    _mouth(part, f, x - turn, y - 0.36, skin, dark_hair, span("mouth_width", 0.17, 0.21))
    gap = span("eye_gap", 0.175, 0.21)
    for side in (-1, 1):
        part = canvas.window(-0.6, -0.4, 0.15, 0.35) if side < 0 else canvas.window(-0.15, -0.4, 0.6, 0.35)
        _eye(part, f, turn, side, gap, span("eye_size", 0.9, 1.15), hair * 0.6)

    part = canvas.window(-0.75, -0.75, 0.75, 0.3)                       # hair in front, if long beside the face
    open_face = part.ellipse(0.5 * turn, 0.17, half * 0.91, 0.56)
    fringe = torch.maximum(part.ellipse(0.0, -0.04, half + 0.06, 0.65), -open_face)
    part.paint(hair, torch.maximum(fringe, part.above(0.02)))
    if f["long_hair"].any():
        part = canvas.window(-0.9, -0.9, 0.9, 1.0)
        lock = torch.maximum(part.ellipse(0.0, 0.04, half + 0.14, 0.76), part.above(0.58))
        part.paint(hair, torch.maximum(lock, -part.ellipse(0.3 * turn, 0.14, half * 0.95, 0.62)), f["long_hair"])
    part = canvas.window(-0.5, -0.75, 0.5, -0.1)
    x, y = part.xy()
    part.paint(hair * 0.8 + 0.2, _arc(x + 0.05 - 0.5 * turn, y + 0.47, 0.22, -0.08, 0.018), 0.7)
    if f["glasses"].any():
        _glasses(canvas.window(-0.85, -0.4, 0.85, 0.4), f, turn, gap, half)
    if f["hat"].any():
        _hat(canvas.window(-0.9, -1.0, 0.9, 0.05), f, half, _hue(f["clothes"] + 0.4, 0.55, 0.26))
    return canvas.rgb


def _rgb(*colour):
    return torch.tensor(colour, dtype=torch.float32)[:, None, None]


def _mouth(part, f, x, y, skin, hair, half):
    """The moustache of a beard, and the mouth: both shapes of it, of which one is seen."""
    if f["beard"].any():
        part.paint(hair, _arc(x.abs() - 0.085, y + 0.075, 0.10, -0.045, 0.030), f["beard"])
    lips, bend, shut = torch.lerp(skin, _rgb(0.66, 0.16, 0.20), 0.65), -0.004 + 0.12 * f["smile"], 1 - f["open_mouth"]
    half, depth = half + 0.025 * f["smile"], 0.105                      # how far the lower lip hangs
    y = y + 0.6 * bend
    arch = 1 - (x / half).clamp_(-1, 1).square_()
    upper, lower = _arc(x, y, half, bend, 0.014), _arc(x, y, half, bend + depth, 0.014)
    if f["open_mouth"].any():
        inside = torch.maximum(torch.maximum(bend * arch - y, y - (bend + depth) * arch) * 0.8, x.abs() - half)
        tongue = torch.maximum(inside, bend + depth - 0.035 + 0.5 * x * x / half - y)
        part.paint(_rgb(0.34, 0.06, 0.10), inside, f["open_mouth"])
        part.paint(_rgb(0.98, 0.97, 0.95), torch.maximum(inside, y - bend * arch - 0.042), f["open_mouth"])
        part.paint(_rgb(0.86, 0.38, 0.40), tongue, f["open_mouth"])
        part.paint(lips, torch.minimum(upper, lower), f["open_mouth"])
    if shut.any():
        part.paint(lips, _arc(x, y - 0.51 * bend - 0.010, 0.7 * half, 0.49 * bend + 0.006, 0.028), shut)
        part.paint(lips * 0.55, upper + 0.004, shut)


def _eye(part, f, turn, side, gap, large, brow):
    """Open: white, iris, pupil, light, lid. Closed: a line. Above either a brow."""
    x_0, y_0, opened, ink = turn + side * gap, -0.045, 1 - f["closed_eyes"], _rgb(0.15, 0.10, 0.12)
    x, y = part.xy()
    x, y, lift = x - x_0, y - y_0, 0.03 * (f["brow"] - 0.5)
    if opened.any():
        white, middle = part.ellipse(x_0, y_0, 0.10 * large, 0.068 * large), x_0 + 0.35 * turn
        part.paint(_rgb(0.99, 0.98, 0.97), white, opened)
        for colour, r in ((_colour(IRIS, f["iris"]), 0.055 * large), (ink * 0.5, 0.028 * large)):
            part.paint(colour, torch.maximum(part.ellipse(middle, y_0, r, r), white), opened)
        part.paint(_rgb(1, 1, 1), part.ellipse(middle + 0.018, y_0 - 0.02, 0.014, 0.014), opened)
        part.paint(ink, _arc(x, y + 0.006, 0.10 * large, -0.068 * large, 0.013), opened)
    part.paint(ink, _arc(x, y, 0.095 * large, 0.042 * large, 0.013), f["closed_eyes"])
    part.paint(brow, _arc(x - side * 0.01, y + 0.145 + lift + side * 12 * lift * x, 0.105, -0.03, 0.019))


def _glasses(part, f, turn, gap, half):
    ink, (x, y) = _rgb(0.15, 0.10, 0.12), part.xy()
    rims = torch.minimum(*(part.ellipse(turn + side * (gap + 0.005), -0.035, 0.16, 0.14) for side in (-1, 1)))
    part.paint(_rgb(0.85, 0.93, 1.0), rims, 0.15 * f["glasses"])
    temple = torch.maximum((y + 0.05).abs() - 0.012, torch.maximum(gap + 0.16 - (x - turn).abs(), x.abs() - half))
    bridge = torch.maximum((y + 0.05).abs() - 0.012, (x - turn).abs() - gap + 0.15)
    part.paint(ink, torch.minimum(torch.minimum(rims.abs() - 0.014, bridge), temple), f["glasses"])


def _hat(part, f, half, wool):
    under, over = (part.ellipse(0.0, y, half + 0.75, 0.60) for y in (-0.84, -1.01))      # the two sides of the brim
    part.paint(wool * 0.5 + 0.5, part.ellipse(0.0, -0.80, 0.10, 0.09), f["hat"])
    part.paint(wool, torch.maximum(part.ellipse(0.0, -0.30, half + 0.145, 0.49), under), f["hat"])
    brim = torch.maximum(torch.maximum(under, -over), part.ellipse(0.0, -0.36, half + 0.165, 0.6))
    part.paint(wool * 0.78, brim, f["hat"])


def faces(seed: int = 0, size: int = 128, grey: bool = False, train: int = 4096, test: int = 768) -> dict:
    """Drawn faces with all that is known of them; smile is the label. 240 MB at 128 pixels in colour.

    Each of the 256 rows of attributes comes equally often in either split: their correlations are exactly 0. Beside
    what data.Images holds: train_attributes, test_attributes (N, 8) bool, attribute_names; train_factors, test_factors
    (N, 25) float32, factor_names; draw(factors).
    """
    rng, out = np.random.default_rng(seed), {}
    for name, count in (("train", train), ("test", test)):
        rows = rng.permutation(np.arange(count) % 2 ** len(ATTRIBUTES))
        attributes = rows[:, None] >> np.arange(len(ATTRIBUTES)) & 1
        nuisances = rng.random((count, len(NUISANCES)), np.float32)
        factors = torch.as_tensor(np.concatenate([attributes.astype(np.float32), nuisances], 1))
        out |= {name: draw_faces(factors, size, grey), f"{name}_labels": torch.as_tensor(attributes[:, 0]),
                f"{name}_attributes": torch.as_tensor(attributes == 1), f"{name}_factors": factors}
    return dict(out, class_names=("neutral", "smile"), attribute_names=ATTRIBUTES, factor_names=ATTRIBUTES + NUISANCES,
                draw=functools.partial(draw_faces, size=size, grey=grey))


# ---- real faces with attributes

FOLDERS = "celeba", "lfw-smiles", "pokesprite"


def pictures(folder, size: int = 128, grey: bool = False, seed: int = 0, skip_bad: bool = False) -> dict:
    """Real faces cut to their centre square, a fifth held out by the seed: 49 kB each at 128 pixels in colour.

    A CelebA folder holds list_attr_celeba.txt and the pictures, img_align_celeba/ or img_align_celeba.zip; Smiling is
    the label. Any other holds a folder of pictures for each class. Both give train_attributes and test_attributes
    (N, A) bool, attribute_names and source. A folder celeba that is not there stands for the longest celeba-...
    """
    folder = pathlib.Path(folder)
    listed = "list_attr_celeba.txt"
    if folder.name == "celeba" and not folder.exists():
        others = sorted(folder.parent.glob(f"celeba-*/{listed}"), key=lambda path: path.stat().st_size)
        folder = others[-1].parent if others else folder
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; say where {folder.name} lies with --data-dir")
    if folder.name.startswith("celeba"):
        images, attributes, names = _celeba(folder, folder / listed, size, grey, skip_bad)
        smiling = attributes[:, names.index("Smiling")].astype(np.int64) if "Smiling" in names else None
        labels, classes = smiling, None if smiling is None else ("neutral", "smile")
    else:
        classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        if len(classes) < 2:
            raise ValueError(f"{folder}: expected a folder of images for each of two classes, found {len(classes)}")
        parts = [formats.read_images(folder / name, size, grey, skip_bad) for name in classes]
        images, labels = np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        attributes, names = labels[:, None] == np.arange(len(classes)), classes
    out = {"class_names": classes, "attribute_names": names, "source": str(folder)}
    for name, rows in zip(("train", "test"), split(len(images), seed, 5)):
        out |= {name: images[rows], f"{name}_labels": None if labels is None else labels[rows],
                f"{name}_attributes": torch.as_tensor(attributes[rows])}
    return out


def _celeba(folder, listed, size, grey, skip_bad):
    files, attributes, names = formats.read_attributes(listed)
    where = folder / "img_align_celeba"
    where = where if where.is_dir() else where.with_suffix(".zip")
    found, images = formats.read_named_images(where, size, grey, skip_bad)
    row = {file: i for i, file in enumerate(files)}
    unknown = [file for file in found if file not in row]
    if unknown:
        raise ValueError(f"{listed}: expected a row for each picture, found none for {len(unknown)}: {unknown[0]} ...")
    return images, attributes[[row[file] for file in found]], names
