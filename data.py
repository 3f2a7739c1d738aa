"""What goes in: 2-D densities with exact mathematics, and images, drawn (shapes.py) or loaded as published.

    truth = load("gmm")                     a Density: sample, log_prob, score, denoise, batches, ... all exact
    truth = load("mnist", data_dir)         an Images: train, test (uint8), scale, unscale, sample, batches
    truth = load("dsprites")                the same, and its factors; load("faces"), load("celeba"): its attributes

Each density has zero mean and unit variance a coordinate by construction. All but `checkerboard` are mixtures of equal
isotropic Gaussians, so that x_t = a x_0 + b eps is a mixture too; the curves (moons, spirals, rings) are *defined* as
many Gaussians side by side. With C = a^2 s^2 + b^2 and r_k = softmax_k(-|x - a mu_k|^2 / 2C):

    score(x_t) = (a sum_k r_k mu_k - x_t) / C,    E[x_0 | x_t] = (x_t + b^2 score) / a                       [1] (1.4)
    E|eps - E[eps | x_t]|^2 / d = 1 - b^2 E|score|^2 / d,    the floor of every noise-prediction loss

(a, b) is (sqrt(alphas_cumprod), sqrt(1 - alphas_cumprod)) in DDPM, (1, sigma) in EDM, (t, 1 - t) in flow matching.

Files lie in `data_dir` (default ~/.cache/dgm) under the names of their publishers; the formats are read in formats.py.
Batches are fresh draws from torch's global generator with nothing buffered: to save its state is to save the stream.

References
  [1] Efron, Tweedie's formula and selection bias, JASA 106, 2011     [2] Vincent, A connection between score matching
  and denoising autoencoders, Neural Computation 23, 2011             [3] Khosravi, Kabir, Pattern Recognition Letters
  28(10), 2007 (HODA)
"""

import functools
import hashlib
import importlib
import itertools
import math
import pathlib
import tempfile
import urllib.parse

import numpy as np
import torch
from torch import Tensor

import formats
import shapes

# ---- 2-D densities: one interface, exact


class Density:
    """Points in the plane with a known law. x is (n, 2); a and b are numbers or (n,) tensors; results have x's dtype.

    Everywhere x_t = a x_0 + b eps with eps ~ N(0, I); a = 1, b = 0 is the data itself. Logarithms are natural.
    `classes` is the number of labels or None; `modes` (K, 2) and `mode_std` are None where no modes lie apart.
    """

    dim, shape, name, classes, modes, mode_std = 2, (2,), "", None, None, None
    components = 1                                                      # terms of the sum at one point

    def log_prob(self, x: Tensor, a=1.0, b=0.0) -> Tensor:
        """log density of x_t at x in nats, (n,)."""
        return self._rows(lambda *row: self._log_joint(*row).logsumexp(-1), x, a, b)

    def score(self, x: Tensor, a=1.0, b=0.0) -> Tensor:
        """Gradient of log_prob, (n, 2)."""
        return self._rows(self._score, x, a, b)

    def denoise(self, x: Tensor, a=1.0, b=0.0) -> Tensor:
        """E[x_0 | x_t = x], the optimal denoiser, (n, 2)."""
        return self._rows(self._denoise, x, a, b)

    def sample(self, n: int, generator=None, device="cpu", labels=False):
        """n points (n, 2) float32, with labels (n,) int64 if asked; from torch's global generator if none is given."""
        raise NotImplementedError

    def batches(self, batch: int, device="cpu", labels=False):
        """Endless fresh batches (batch, 2), or pairs (points, labels)."""
        self._check_labels(labels)
        return (self.sample(batch, device=device, labels=labels) for _ in itertools.count())

    @functools.cached_property
    def entropy(self) -> float:
        """-E log p(x_0) in nats, by quadrature."""
        p, _, _, weight = self._grid(1.0, 0.0)
        return -(weight * torch.special.xlogy(p, p)).sum().item()

    def bayes_loss(self, a, b) -> Tensor:
        """E|eps - E[eps | x_t]|^2 / d, what no noise predictor can beat, for one noise level or a sequence of them.

        float64, of the shape of a and b together; by quadrature, 1 where b = 0.
        """
        a, b = torch.broadcast_tensors(*(torch.as_tensor(v, dtype=torch.float64).cpu() for v in (a, b)))
        levels = zip(a.flatten().tolist(), b.flatten().tolist())
        return torch.tensor([self._bayes_loss(*level) for level in levels], dtype=torch.float64).reshape(a.shape)

    def _bayes_loss(self, a, b):
        p, p_x, p_y, weight = self._grid(a, b)
        squares = torch.where(p > 1e-150, (p_x.square() + p_y.square()) / p, 0)   # p |score|^2
        return 1 - b**2 * (weight * squares).sum().item() / self.dim

    def _grid(self, a, b):
        """Density, partial derivatives and quadrature weight on a product grid: each component is a product."""
        (w_x, X, dX), (w_y, Y, dY) = self._axis(0, a, b), self._axis(1, a, b)
        return X @ Y.T, dX @ Y.T, X @ dY.T, w_x[:, None] * w_y

    def _rows(self, function, x, a, b):
        """function(x, a, b) in float64 on blocks of rows that fit in memory; back to x's dtype and shape."""
        rows = x.reshape(-1, 2).double()
        a, b = (torch.as_tensor(v, dtype=torch.float64, device=x.device).reshape(-1, 1) for v in (a, b))
        block = max(1, 2**21 // self.components)
        parts = zip(*(v.expand(len(rows), -1).split(block) for v in (rows, a, b)))
        out = torch.cat([function(*part) for part in parts])
        return out.to(x.dtype).reshape(x.shape[:-1] + out.shape[1:])

    def _check_labels(self, labels):
        if labels and self.classes is None:
            raise ValueError(f"{self.name} has no labels; gmm, grid, moons, spirals and rings have")


class Mixture(Density):
    """mean_k N(means[k], std^2 I): equal weights, equal isotropic covariance. targets (K,) labels the components."""

    def __init__(self, name, means, std, targets, modes=False):
        self.name, self.std, self.targets = name, std, torch.as_tensor(targets)
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.components, self.classes = len(self.means), int(self.targets.max()) + 1
        self.modes, self.mode_std = (self.means, std) if modes else (None, None)

    def sample(self, n, generator=None, device="cpu", labels=False):
        source = {"generator": generator, "device": generator.device if generator else device}
        k = torch.randint(self.components, (n,), **source).to(device)
        noise = torch.randn(n, 2, **source, dtype=torch.float32).to(device)
        x = self.means.to(device, torch.float32)[k] + self.std * noise
        return (x, self.targets.to(device)[k]) if labels else x

    def posterior_variance(self, x: Tensor, a=1.0, b=0.0) -> Tensor:
        """tr Cov[x_0 | x_t = x] / d, (n,): within a component b^2 s^2 / C, between them the spread of their means."""
        return self._rows(self._posterior_variance, x, a, b)

    def label_log_prob(self, x: Tensor, a=1.0, b=0.0) -> Tensor:
        """log p(label | x_t = x), (n, classes): the best classifier there is."""
        def rows(x, a, b):
            joint = self._log_joint(x, a, b)
            classes = [joint[:, self.targets.to(x.device) == c].logsumexp(-1) for c in range(self.classes)]
            return torch.stack(classes, -1).log_softmax(-1)
        return self._rows(rows, x, a, b)

    def condition(self, label: int) -> "Mixture":
        """p(x_0 | label) as a mixture of its own (its mean and variance are no longer 0 and 1)."""
        kept = self.targets == label
        if not kept.any():
            raise ValueError(f"{self.name} has the labels 0 to {self.classes - 1}; got {label}")
        name, targets = f"{self.name}[{label}]", 0 * self.targets[kept]
        return Mixture(name, self.means[kept], self.std, targets, self.modes is not None)

    def _log_joint(self, x, a, b):                                      # log w_k N(x; a mu_k, C), (n, K)
        C = (a * self.std).square() + b.square()
        square = sum((x[:, c:c + 1] - a * self.means[:, c].to(x.device)).square() for c in (0, 1))
        return -square / (2 * C) - torch.log(2 * math.pi * C) - math.log(self.components)

    def _mean(self, x, a, b):                                           # sum_k r_k (mu_k, |mu_k|^2), C
        moments = torch.cat([self.means, self.means.square().sum(-1, keepdim=True)], -1).to(x.device)
        mean = self._log_joint(x, a, b).softmax(-1) @ moments
        return mean[:, :2], mean[:, 2:], (a * self.std).square() + b.square()

    def _score(self, x, a, b):
        mean, _, C = self._mean(x, a, b)
        return (a * mean - x) / C

    def _denoise(self, x, a, b):                                        # no division by a: holds at a = 0 too
        mean, _, C = self._mean(x, a, b)
        return mean + a * self.std**2 / C * (x - a * mean)

    def _posterior_variance(self, x, a, b):
        mean, square, C = self._mean(x, a, b)
        spread = (square - mean.square().sum(-1, keepdim=True)).clamp(min=0) / self.dim
        return ((b * self.std).square() / C + (b.square() / C).square() * spread).squeeze(-1)

    def _axis(self, c, a, b):
        """Trapezoids 0.4 standard deviations of a component apart: the loss is off by less than 1e-4 of itself."""
        C = (a * self.std) ** 2 + b**2
        mu = a * self.means[:, c]
        low, high = mu.min().item() - 8 * C**0.5, mu.max().item() + 8 * C**0.5
        t = torch.linspace(low, high, math.ceil((high - low) / (0.4 * C**0.5)), dtype=torch.float64)[:, None]
        value = torch.exp(-(t - mu).square() / (2 * C)) / (2 * math.pi * C) ** 0.5 / self.components**0.5
        return (t[1] - t[0]).expand(len(t)), value, -(t - mu) / C * value


class Checkerboard(Density):
    """Uniform on the dark squares of a 4 x 4 board of half-width sqrt(3): closed form through the normal CDF."""

    name, components = "checkerboard", 8

    def __init__(self):
        self.edges = math.sqrt(3) * torch.linspace(-1, 1, 5, dtype=torch.float64)
        self.width = math.sqrt(3) / 2
        self.cells = torch.tensor([(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0])   # (8, 2)
        self.entropy = math.log(8 * self.width**2)                      # log of the dark area

    def sample(self, n, generator=None, device="cpu", labels=False):
        self._check_labels(labels)
        source = {"generator": generator, "device": generator.device if generator else device}
        k = torch.randint(8, (n,), **source).to(device)
        u = torch.rand(n, 2, **source, dtype=torch.float32).to(device)
        return self.width * (self.cells.to(device)[k] + u) - math.sqrt(3)

    def _intervals(self, x, a, b):
        """log density of x_t, and its slope, for x_0 uniform on each interval of an axis: x (..., 1) -> (..., 4) both.

        Below a = 1e-4 b differences of CDFs would cancel; x_t is N(0, b^2 I) there up to a^2, so that a may stop.
        """
        edges = self.edges.to(x.device)
        safe = torch.where(b > 0, b, 1)
        a = torch.maximum(a, 1e-4 * b)
        high, low = (x - a * edges[:-1]) / safe, (x - a * edges[1:]) / safe             # high > low
        flip = low > 0                                                  # Phi(-low) - Phi(-high): no 1 - 1 in the tail
        tail, head = torch.where(flip, -high, low), torch.where(flip, -low, high)
        log_head = torch.special.log_ndtr(head)
        log_mass = log_head + torch.log(-torch.expm1(torch.special.log_ndtr(tail) - log_head))
        log_phi = lambda z: -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
        slope = (torch.exp(log_phi(high) - log_mass) - torch.exp(log_phi(low) - log_mass)) / safe
        inside = (x >= a * edges[:-1]) & (x < a * edges[1:])
        log_mass = torch.where(b > 0, log_mass, torch.where(inside, 0.0, -torch.inf))
        return log_mass - torch.log(a * self.width), torch.where(b > 0, slope, 0.0)

    def _pieces(self, x, a, b):
        cells = self.cells.to(x.device)
        (X, dX), (Y, dY) = (self._intervals(x[:, c:c + 1], a, b) for c in (0, 1))
        joint = X[:, cells[:, 0]] + Y[:, cells[:, 1]] - math.log(8)     # (n, 8)
        return joint, torch.stack([dX[:, cells[:, 0]], dY[:, cells[:, 1]]], -1)

    def _log_joint(self, x, a, b):
        return self._pieces(x, a, b)[0]

    def _score(self, x, a, b):
        joint, slopes = self._pieces(x, a, b)
        score = (joint.softmax(-1)[..., None] * slopes).sum(1)
        return torch.where(b > 0, score, 0.0)                           # flat inside, and nowhere defined outside

    def _denoise(self, x, a, b):                                        # Tweedie, [1] (1.4)
        floor = torch.maximum(a, 1e-4 * b)                              # below it E[x_0 | x_t] is linear in a
        return (x + b.square() * self._score(x, floor, b)) * a / floor.square()

    def _axis(self, c, a, b):
        """Gauss-Legendre panels, short near the edges where the density bends at the scale of b."""
        a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
        steps = b * torch.tensor([-8.0, -4, -2, 0, 2, 4, 8])
        bends = (a * self.edges[:, None] + steps).flatten().sort()[0]
        node, weight = (torch.as_tensor(v) for v in np.polynomial.legendre.leggauss(8))
        half = bends.diff()[:, None] / 2
        t, weight = (bends[:-1, None] + half * (1 + node)).reshape(-1, 1), (half * weight).flatten()
        log_value, slope = self._intervals(t, a, b)
        value = log_value.exp()[:, self.cells[:, c]] / 8**0.5
        return weight, value, value * slope[:, self.cells[:, c]]


def _unit(name, points, std, targets, modes=False):
    """The mixture around these points, moved and stretched a coordinate so that mean = 0, variance = 1 exactly."""
    points = points - np.mean(points, 0)
    points *= np.sqrt((1 - std**2) / points.var(0))
    return Mixture(name, points, std, np.asarray(targets), modes)


def _arc(radius, angle):
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)


def _moons():
    upper = _arc(1, np.pi * (np.arange(64) + 0.5) / 64)
    return _unit("moons", np.concatenate([upper, [1, 0.5] - upper]), 0.08, np.repeat([0, 1], 64))


def _spirals():                                                         # r = angle: length grows as its square
    arm = _arc(angle := np.sqrt(np.linspace(1, (3 * np.pi) ** 2, 128)), angle)
    return _unit("spirals", np.concatenate([arm, -arm]), 0.08, np.repeat([0, 1], 128))


def _rings():                                                           # as many points as the radius asks for
    circles = np.concatenate([_arc(r, 2 * np.pi * np.arange(40 * r) / (40 * r)) for r in (1, 2, 3)])
    return _unit("rings", circles, 0.08, np.repeat([0, 1, 2], [40, 80, 120]))


DENSITIES = {                                                           # gmm: radius sqrt(2 (1 - 0.1^2)) after scaling
    "gmm": lambda: _unit("gmm", _arc(1, 2 * np.pi * np.arange(8) / 8), 0.1, np.arange(8), modes=True),
    "grid": lambda: _unit("grid", list(itertools.product(range(5), repeat=2)), 0.05 / math.sqrt(2 + 0.05**2),
                          np.arange(25), modes=True),                   # spacing 1, std 0.05 before scaling
    "moons": _moons, "spirals": _spirals, "checkerboard": Checkerboard, "rings": _rings,
}

# ---- images


class Images:
    """Pictures held as uint8 0 .. levels - 1 of shape (N, C, H, W), given out as float32 in [-1, 1].

    `train`, `test` and `train_labels`, `test_labels` (int64 or None) are CPU tensors; `class_names` is a tuple or None.
    A set with known factors brings fields of its own, listed in shapes.py; images drawn on demand are a shapes.Drawn.
    """

    def __init__(self, name, train, train_labels, test, test_labels, levels=256, class_names=None, **fields):
        self.name, self.levels, self.class_names = name, levels, class_names
        self.train, self.test = (x if isinstance(x, shapes.Drawn) else torch.as_tensor(x) for x in (train, test))
        self.__dict__.update(fields)
        self.train_labels = None if train_labels is None else torch.as_tensor(train_labels)
        self.test_labels = None if test_labels is None else torch.as_tensor(test_labels)
        self.classes = len(class_names) if class_names else None
        self.shape, self.dim = tuple(self.train.shape[1:]), self.train[0].numel()

    def scale(self, x: Tensor) -> Tensor:
        """uint8 0 .. levels - 1 -> float32 in [-1, 1]."""
        return x.to(torch.float32) * (2 / (self.levels - 1)) - 1

    def unscale(self, x: Tensor) -> Tensor:
        """float in [-1, 1] -> the nearest uint8 level; what lies outside is clamped."""
        return ((x + 1) * ((self.levels - 1) / 2)).round().clamp(0, self.levels - 1).to(torch.uint8)

    def batches(self, batch: int, device="cpu", labels=False, split="train"):
        """Endless batches (batch, C, H, W), or pairs with labels (batch,): index draws from a tensor on the device."""
        images, targets = (None if v is None else v.to(device) for v in self._split(split, labels))
        draws = (torch.randint(len(images), (batch,), device=device) for _ in itertools.count())
        rows = ((i, self.scale(images.index_select(0, i))) for i in draws)      # 15 times as fast as images[i]
        return ((x, targets[i]) if labels else x for i, x in rows)

    def sample(self, n: int, generator=None, split="test", labels=False):
        """n images (n, C, H, W) float32, none twice unless n exceeds the split, and their labels if asked."""
        images, targets = self._split(split, labels)
        rounds = math.ceil(n / len(images))
        i = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(rounds)])[:n]
        return (self.scale(images[i]), targets[i]) if labels else self.scale(images[i])

    def _split(self, split, labels):
        if split not in ("train", "test"):
            raise ValueError(f"the split is train or test; got {split}")
        if labels and not self.classes:
            raise ValueError(f"{self.name} has no labels")
        return (self.train, self.train_labels) if split == "train" else (self.test, self.test_labels)


def _held_out(images, labels, seed, part=6):
    """A set that comes as one: shuffled by the seed, the last sixth (of a folder, fifth) held out."""
    train, test = shapes.split(len(images), seed, part)
    pick = lambda i: (images[i], None if labels is None else labels[i])
    return *pick(train), *pick(test)


@functools.cache
def _area_weights(n, m):
    """(m, n) float32: how much of each of n pixels lies under each of m, rows sum to 1."""
    edge, pixel = np.arange(m + 1)[:, None] * n / m, np.arange(n)
    overlap = np.minimum(edge[1:], pixel + 1) - np.maximum(edge[:-1], pixel)
    return (np.clip(overlap, 0, None) * m / n).astype(np.float32)


def _resize(images, height, width, levels):
    """Area average of (..., H, W) uint8 images, rounded to the nearest level."""
    rows, columns = _area_weights(images.shape[-2], height), _area_weights(images.shape[-1], width)
    return np.clip(np.floor(rows @ images.astype(np.float32) @ columns.T + 0.5), 0, levels - 1).astype(np.uint8)


def _fit(images, side=28, most=24):
    """Binary (H, W) images amid (N, 1, side, side), shrunk where a dimension exceeds `most` (aspect kept)."""
    out, alike = np.zeros((len(images), 1, side, side), np.uint8), {}
    for i, image in enumerate(images):
        alike.setdefault(image.shape, []).append(i)
    for shape, i in alike.items():                                      # all of one shape at once
        shrink = min(1, most / max(shape))
        H, W = (max(1, round(v * shrink)) for v in shape)
        top, left = (side - H) // 2, (side - W) // 2
        out[i, 0, top:top + H, left:left + W] = _resize(np.stack([images[k] for k in i]), H, W, 2)
    return out


# ---- published sets: files, addresses, digests

CIFAR_NAMES = "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
FASHION_NAMES = tuple("t-shirt/top trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split())
IDX = tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
SOURCES = {                                                             # set: address, then file and digest in turn
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", {
        IDX[0]: "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        IDX[1]: "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        IDX[2]: "md5:9fb629c4189551a2d022fa330f9573f3", IDX[3]: "md5:ec29112dd5afa0611ce80d1b7f02629c"}),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", {
        IDX[0]: "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d", IDX[1]: "md5:25c81989df183df01b3e8a0aad5dffbe",
        IDX[2]: "md5:bef4ecab320f06d8554ea6380940ec79", IDX[3]: "md5:bb300cfdad3c16e7a12a480ee83cd310"}),
    "hoda": ("https://raw.githubusercontent.com/amir-saniyan/HodaDatasetReader/master/DigitDB/", {
        "Train 60000.cdb": "git:a87ae8c4b1a9e9227f600194ae82a8af3d0e08ec",
        "Test 20000.cdb": "sha256:f947c38071c886677ec212fe5000863fafae0b4ed349d97d51c33abe3c8e2b07"}),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", {
        "cifar-10-binary.tar.gz": "md5:c32a1d4ab5d03f1284b67883e8d87530"}),
    "dsprites": ("https://github.com/deepmind/dsprites-dataset/raw/master/", {
        "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz": "git:d98996d3f8ee1550e06b9d4ed78d0beb478910d5"}),
}


def fetch(url: str, path, digest: str) -> None:
    """Download url to path with a progress bar; the file appears only when whole and of that digest.

    digest: "md5:", "sha256:" or "git:" (sha1 of a blob) and hexadecimals. Raises FileNotFoundError where the address
    does not answer, ValueError where the content is another.
    """
    import http.client
    import urllib.request

    from tqdm import tqdm

    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    algorithm, expected = digest.split(":")
    part = tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name + ".", suffix=".part", delete=False)
    try:
        with part, urllib.request.urlopen(url, timeout=60) as answer:
            size = int(answer.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, leave=False) as bar:
                while block := answer.read(1 << 16):
                    part.write(block)
                    bar.update(len(block))
        content = pathlib.Path(part.name).read_bytes()
        if algorithm == "git":                                          # the id of a git blob
            content = b"blob %d\0" % len(content) + content
        found = hashlib.new("sha1" if algorithm == "git" else algorithm, content).hexdigest()
        if found != expected:
            raise ValueError(f"{url}: expected {algorithm} {expected}, found {found}; nothing was kept")
        pathlib.Path(part.name).replace(path)
    except (OSError, http.client.HTTPException) as e:
        raise FileNotFoundError(f"{path} could not be fetched from {url}: {e}") from None
    finally:
        pathlib.Path(part.name).unlink(missing_ok=True)


def _download(name, folder):
    address, files = SOURCES[name]
    for file, digest in files.items():
        if not (folder / file).exists() and not any(folder.glob("cifar-10-batches-bin/*.bin")):
            fetch(address + urllib.parse.quote(file), folder / file, digest)
        if file.endswith(".tar.gz") and (folder / file).exists():       # there until all of it is unpacked
            _unpack(folder / file)


def _unpack(path):
    """The .bin files of the CIFAR-10 archive into cifar-10-batches-bin beside it, each renamed when whole."""
    import tarfile

    out = path.parent / "cifar-10-batches-bin"
    out.mkdir(exist_ok=True)
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".bin"):
                file = out / pathlib.PurePosixPath(member.name).name    # the name alone: nothing is written elsewhere
                file.with_suffix(".part").write_bytes(archive.extractfile(member).read())
                file.with_suffix(".part").replace(file)
    path.unlink()


# ---- from a folder to (train, train_labels, test, test_labels); half a set is split


def _either(train, test, seed):
    """Both splits, or the only one with its last sixth held out."""
    return (*train, *test) if train and test else _held_out(*(train or test), seed)


def _idx_set(folder, seed):
    def pair(images, labels):
        if not (folder / images).exists():
            return None
        images, labels = formats.read_idx(folder / images)[:, None], formats.read_idx(folder / labels).astype(np.int64)
        if images.ndim != 4 or labels.shape != images.shape[:1]:
            raise ValueError(f"{folder}: expected images and labels, found {images[:, 0].shape} and {labels.shape}")
        return images, labels
    return _either(pair(*IDX[:2]), pair(*IDX[2:]), seed)


def _hoda(folder, seed):
    cdb = lambda file: formats.read_cdb(folder / file) if (folder / file).exists() else None
    train = cdb("Train 60000.cdb")
    if train is None and (folder / "Data_hoda_full.mat").exists():
        mat = formats.read_mat_cells(folder / "Data_hoda_full.mat")
        cells, labels = mat.get("Data"), mat.get("labels")
        if not isinstance(cells, list) or not isinstance(labels, np.ndarray) or len(cells) != labels.size or not cells:
            raise ValueError(f"{folder / 'Data_hoda_full.mat'}: expected cells Data and their labels, found {[*mat]}")
        train = [(image > 127).astype(np.uint8) for image in cells], labels.ravel().astype(np.int64)
    fitted = lambda pair: pair and (_fit(pair[0]), pair[1])
    return _either(fitted(train), fitted(cdb("Test 20000.cdb")), seed)


def _cifar10(folder, seed):
    def batches(pattern):
        read = [formats.read_cifar(path) for path in sorted(folder.glob(pattern))]
        return tuple(np.concatenate(parts) for parts in zip(*read)) or None
    return _either(*map(batches, PUBLISHED["cifar10"][1]), seed)


PUBLISHED = {                                                           # set: reader, files of which one is there, ...
    "mnist": (_idx_set, (IDX[0], IDX[2]), 256, tuple("0123456789")),    # ... levels, class names
    "fashion-mnist": (_idx_set, (IDX[0], IDX[2]), 256, FASHION_NAMES),
    "hoda": (_hoda, ("Train 60000.cdb", "Data_hoda_full.mat", "Test 20000.cdb"), 2, shapes.PERSIAN_DIGITS),
    "cifar10": (_cifar10, [f"cifar-10-batches-bin/{part}_batch*.bin" for part in ("data", "test")], 256, CIFAR_NAMES),
}
DIGITS = {"persian": shapes.PERSIAN_DIGITS, "latin": shapes.LATIN_DIGITS}   # drawn
CLOUDS = "shapes3d", "modelnet"                                         # point clouds: clouds.py, not in NAMES
NAMES = *DENSITIES, *DIGITS, "dsprites", "faces", *PUBLISHED, *shapes.FOLDERS


def load(name: str, data_dir=None, *, size: int | None = None, grey=False, seed=0, download=False,
         skip_bad=False) -> Density | Images:
    """The data set of that name (one of NAMES, or folder:PATH, or celeba-...: the folder of that name in data_dir).

    size: side of square images in pixels (if not given, folder: 64, faces and pictures of faces 128, else their own).
    grey: one channel. seed: of the drawing and of the split of a set that comes as one. dsprites is drawn, unless
    data_dir/dsprites holds a published file. skip_bad: leave out, with a warning, pictures of a folder that cannot be
    read. Raises ValueError for an unknown name or option and for a corrupt file, FileNotFoundError for a missing one.
    """
    if size is not None and (name in DENSITIES or size < 1):
        raise ValueError(f"size {size} is impossible for {name}: it is the side of images in pixels, at least 1")
    if name in DENSITIES:
        return DENSITIES[name]()
    if name in CLOUDS:
        return importlib.import_module("clouds").load(name, data_dir, seed)
    if name.startswith("folder:") and len(name) > 7:
        path = pathlib.Path(name[7:]).expanduser()
        return Images(name, *_held_out(formats.read_images(path, size or 64, grey, skip_bad), None, seed, 5))
    folder = pathlib.Path(data_dir or "~/.cache/dgm").expanduser() / name
    if name in SOURCES and download:
        _download(name, folder)
    if name == "dsprites":
        return Images(name, **shapes.dsprites(folder, size, seed))
    if name == "faces":
        return Images(name, **shapes.faces(seed, size or 128, grey))
    if name.startswith(shapes.FOLDERS):
        return Images(name, **shapes.pictures(folder, size or 128, grey, seed, skip_bad))
    if name in DIGITS:
        arrays, levels, class_names = shapes.digits(seed, DIGITS[name]), 2, DIGITS[name]
    elif name in PUBLISHED:
        reader, files, levels, class_names = PUBLISHED[name]
        try:
            if not any(any(folder.glob(file)) for file in files):
                raise FileNotFoundError(f"{folder / files[0]}: there is no such file")
            arrays = reader(folder, seed)
        except FileNotFoundError as e:
            raise FileNotFoundError(f"{e}; say where {name} lies with --data-dir or fetch it with --download") from None
        if max(arrays[1].max(), arrays[3].max()) >= len(class_names):
            raise ValueError(f"{folder}: expected labels 0 to {len(class_names) - 1}, found one above")
    else:
        raise ValueError(f"there is no data set {name!r}; the names are {', '.join(NAMES)} and folder:PATH")
    train, train_labels, test, test_labels = arrays
    train, test = (_shaped(images, size, grey, levels) for images in (train, test))
    return Images(name, train, train_labels, test, test_labels, levels, class_names)


def domains(name: str, data_dir=None, attribute: str = "", **options) -> tuple[Images, Images]:
    """Two sets without pairs, (from, to), for translation; the options of load.

    folder:A,B are two folders of images, persian and latin the drawn digits of both. Any other set is cut in two by
    an attribute that it knows, without and with it: by its label where none is named.
    """
    if name.startswith("folder:"):
        paths = name[7:].split(",")
        if len(paths) != 2 or not all(paths):
            raise ValueError(f"two sets to translate between are folder:A,B; got {name}")
        return tuple(load(f"folder:{path}", **options) for path in paths)
    whole = load(name, data_dir, **options)
    if name in DIGITS:
        (other,) = DIGITS.keys() - {name}
        return whole, load(other, **options)
    if attribute:
        names = list(getattr(whole, "attribute_names", ()))
        if attribute not in names:
            known = f"it knows {', '.join(names)}" if names else "it knows none"
            raise ValueError(f"{name} has no attribute {attribute!r}; {known}")
        has = [getattr(whole, f"{part}_attributes")[:, names.index(attribute)] for part in ("train", "test")]
    elif getattr(whole, "classes", None) == 2:
        has = [labels == 1 for labels in (whole.train_labels, whole.test_labels)]
    else:
        raise ValueError(f"{name} is not two sets: name an attribute of a set that has some, or folder:A,B")
    return tuple(_part(whole, *(rows == side for rows in has)) for side in (False, True))


def _part(whole, train, test):
    """The images of a set in the rows (N,) bool of its training and of its test images."""
    if not train.any() or not test.any():
        raise ValueError(f"{whole.name} has no image on one side of this attribute")
    fields = {f"{part}_attributes": getattr(whole, f"{part}_attributes")[rows] for part, rows in
              (("train", train), ("test", test)) if hasattr(whole, f"{part}_attributes")}
    fields |= {name: getattr(whole, name) for name in ("attribute_names",) if hasattr(whole, name)}
    pick = lambda labels, rows: None if labels is None else labels[rows]
    return Images(whole.name, whole.train[train], pick(whole.train_labels, train), whole.test[test],
                  pick(whole.test_labels, test), whole.levels, whole.class_names, **fields)


def _shaped(images, size, grey, levels):
    if grey and images.shape[1] == 3:                                   # luma of ITU-R BT.601
        images = np.round(np.tensordot(images, [0.299, 0.587, 0.114], (1, 0))).astype(np.uint8)[:, None]
    return images if size in (None, images.shape[-1]) else _resize(images, size, size, levels)
