"""Normalising flows: bijections f between data and noise, and the exact density that the change of variables gives.

    z = f(x),  z ~ N(0, I):    log p(x) = log N(f(x); 0, I) + log |det df/dx|                        [1] (3)
    dx/dt = v(x, t):           log p_1(x_1) = log p_0(x_0) - int_0^1 tr dv/dx dt                     [5] (8)

`forward(x) -> z, log_det` and `inverse(z) -> x, log_det`, log_det (B,) that of the direction taken. Images are cut into
levels: y = (x + u) / n - 1/2 with x in 0 .. n - 1, u uniform, and bits/dim = (D log n - log p(y)) / (D log 2).

`--model`
  realnvp    affine couplings [1]: half the coordinates are scaled and shifted by what a network says of the others
  spline     couplings with monotone rational-quadratic splines [2]: the default in the plane
  glow       actnorm, 1x1 convolution, affine coupling, and learned priors of what each scale splits off [3]
  matching   a velocity field that carries noise to data along straight lines [4]; --reflow: straightens the ways [6]

References
  [1] Dinh et al., Density estimation using Real NVP, arXiv 1605.08803
  [2] Durkan et al., Neural Spline Flows, arXiv 1906.04032
  [3] Kingma, Dhariwal, Glow: Generative Flow with Invertible 1x1 Convolutions, arXiv 1807.03039
  [4] Lipman et al., Flow Matching for Generative Modeling, arXiv 2210.02747, with sigma_min = 0
  [5] Chen et al., Neural Ordinary Differential Equations, arXiv 1806.07366
  [6] Liu et al., Flow Straight and Fast: Rectified Flow, arXiv 2209.03003

Glossary
  paper        code             shape              meaning
  theta        theta            (..., 3 K - 1)     widths, heights and inner slopes of a spline of K bins, unconstrained
  W = PLU      InvertibleLinear (C, C)             1x1 convolution; on points a matrix
  z_i          parts of z       (B, D)             one Gaussian vector: the coarsest scale first
  v            velocity         as x               at time t: 0 noise, 1 data

Use
  python flows.py --dataset gmm                    a minute: exact KL by quadrature; --model realnvp, glow, matching
  python flows.py --model glow --dataset persian   bits/dim; --dataset faces: attributes, noise and zeros in z

Not included: autoregressive and residual flows, variational dequantisation; `--model points` is pointflows.py.
"""

import copy
import inspect
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# ---- maths: one number to one number, monotone


def standard_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) of each row, (B,)."""
    z = z.flatten(1)
    return -z.square().sum(1) / 2 - z.shape[1] / 2 * math.log(2 * math.pi)


def affine(x: Tensor, theta: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """x e^s + t and s, for theta (..., 2) = (raw s, t): s = 2 tanh(raw / 2) bounds each scale to e^2. Inverse: -s."""
    s, t = 2 * torch.tanh(theta[..., 0] / 2), theta[..., 1]
    return ((x - t) * (-s).exp(), -s) if inverse else (x * s.exp() + t, s)


def rational_quadratic_plain(x, theta, bound, inverse=False):
    """x (...), theta (..., 3 K - 1) -> y and log dy/dx, (...); the identity outside [-bound, bound]. [2] (4), (5)

    Bins and slopes have a floor of 1e-3; zero theta is the identity. Inverse: y -> x and log dx/dy. [2] (6) - (8)"""
    K, least = (theta.shape[-1] + 1) // 3, 1e-3
    sizes = 2 * bound * (least + (1 - K * least) * theta[..., : 2 * K].unflatten(-1, (2, K)).softmax(-1))
    knots = F.pad(sizes.cumsum(-1), (1, 0)) - bound                     # (..., 2, K + 1)
    slopes = least + F.softplus(theta[..., 2 * K :] + math.log(math.expm1(1 - least)))
    slopes = F.pad(slopes, (1, 1), value=1.0)                           # (..., K + 1)
    inside = x.clamp(-bound, bound)                                     # outside, a root would have a NaN for slope
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
    within = x == inside
    return torch.where(within, out, x), torch.where(within, -log_slope if inverse else log_slope, 0.0)


def fused(name, plain):
    """kernels.<name> where this repository's kernels/ is importable, else `plain`; a broken kernels/ raises."""
    try:
        import kernels
    except ModuleNotFoundError as e:
        if e.name != "kernels":
            raise
        return plain
    return getattr(kernels, name, plain)


# ---- maths: an ODE that carries noise to data


def euler(f, x: Tensor, t: float, h: float) -> Tensor:
    return x + h * f(x, t)


def heun(f, x: Tensor, t: float, h: float) -> Tensor:
    """The trapezoid rule with Euler's guess of its end: second order."""
    k = f(x, t)
    return x + h / 2 * (k + f(x + h * k, t + h))


def rk4(f, x: Tensor, t: float, h: float) -> Tensor:
    """Runge and Kutta's: fourth order."""
    a = f(x, t)
    b = f(x + h / 2 * a, t + h / 2)
    c = f(x + h / 2 * b, t + h / 2)
    return x + h / 6 * (a + 2 * b + 2 * c + f(x + h * c, t + h))


SOLVERS = {"heun": heun, "euler": euler, "rk4": rk4}


def ode(f, x: Tensor, start: float, stop: float, steps: int, step=heun):
    """States of dx/dt = f(x, t) at steps + 1 times from start to stop."""
    h = (stop - start) / steps
    yield x
    for k in range(steps):
        x = step(f, x, start + k * h, h)
        yield x


def divergence(f, x: Tensor, e: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """f(x) (B, D) and tr df/dx (B,): exactly, by D gradients, or from e (B, D) as e . (df/dx) e, whose mean is the
    trace for any e of mean 0 and covariance I (Hutchinson)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = f(x)
        units = torch.eye(x.shape[1]).to(x)[:, None].expand(-1, len(x), -1) if e is None else [e]
        return v.detach(), sum((torch.autograd.grad(v, x, u, retain_graph=True)[0] * u).sum(1) for u in units)


def straight(z: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = (1 - t) z + t x and its velocity x - z, t (B,). [4] (22), [6] (1)"""
    t = t.view(-1, *[1] * (x.ndim - 1))
    return (1 - t) * z + t * x, x - z


# ---- maths: pixels


def squeeze(x: Tensor) -> Tensor:
    """(B, C, 2 H, 2 W) -> (B, 4 C, H, W): a permutation. [1] 3.6"""
    return rearrange(x, "b c (h i) (w j) -> b (c i j) h w", i=2, j=2)


def unsqueeze(x: Tensor) -> Tensor:
    return rearrange(x, "b (c i j) h w -> b c (h i) (w j)", i=2, j=2)


def bits_per_dim(log_prob: Tensor, dims: int, n: int) -> Tensor:
    """Of n-level integers, from log p(y) in nats, y = (x + u) / n + const: log2 n for the uniform density."""
    return (dims * math.log(n) - log_prob) / (dims * math.log(2))


# ---- networks


class PointNet(nn.Module):
    """Points (B, D) -> (B, out). Beside x stand sines and cosines of x/2, x, 2x, ..; zero at first."""

    def __init__(self, dim: int, out: int, width: int = 64, depth: int = 2, waves: int = 5):
        super().__init__()
        self.register_buffer("frequencies", 0.5 * 2.0 ** torch.arange(waves))
        sizes = [dim * (1 + 2 * waves)] + depth * [width]
        layers = [m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], out))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        angles = (x[..., None] * self.frequencies).flatten(1)
        return self.net(torch.cat([x, angles.sin(), angles.cos()], 1))


class ConvNet(nn.Sequential):
    """Images (B, C, H, W) -> (B, out, H, W), zero at first. [3] 3.3"""

    def __init__(self, channels: int, out: int, width: int):
        super().__init__(nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(),
                         nn.Conv2d(width, out, 3, 1, 1))
        nn.init.zeros_(self[-1].weight)
        nn.init.zeros_(self[-1].bias)


# ---- layers: forward(x) -> y, log_det (B,), and inverse; x (B, C) or (B, C, H, W)


def spread(per_channel: Tensor, x: Tensor) -> Tensor:
    return per_channel.view(-1, *[1] * (x.ndim - 2))


def times_places(per_place: Tensor, x: Tensor) -> Tensor:
    """A log-determinant that each of the H W places of x has, (B,)."""
    return (per_place * math.prod(x.shape[2:])).expand(len(x))


class ActNorm(nn.Module):
    """(x + b) e^s a channel, mean 0 and variance 1 on the first batch; that it was seen is in the state. [3] 3.1"""

    def __init__(self, channels: int):
        super().__init__()
        self.b, self.s = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def initialize(self, x: Tensor):
        std, mean = torch.std_mean(x.transpose(0, 1).flatten(1), 1, correction=0)
        self.b.copy_(-mean)
        self.s.copy_(-(std + 1e-6).log())
        self.initialized.fill_(True)

    def forward(self, x):
        if not self.initialized:
            self.initialize(x)
        return (x + spread(self.b, x)) * spread(self.s, x).exp(), times_places(self.s.sum(), x)

    def inverse(self, y):
        return y * spread(-self.s, y).exp() - spread(self.b, y), times_places(-self.s.sum(), y)


class InvertibleLinear(nn.Module):
    """W x at each place, W = P L (U + diag(sign e^s)): P fixed, L unit lower, U strictly upper triangular. [3] (10)"""

    def __init__(self, channels: int):
        super().__init__()
        P, L, U = torch.linalg.lu(torch.linalg.qr(torch.randn(channels, channels))[0])
        self.register_buffer("P", P)
        self.register_buffer("sign", U.diagonal().sign())
        self.L, self.U, self.s = (nn.Parameter(v.clone()) for v in (L.tril(-1), U.triu(1), U.diagonal().abs().log()))

    def factors(self) -> tuple[Tensor, Tensor]:
        eye = torch.eye(len(self.s), dtype=self.s.dtype, device=self.s.device)
        return self.L.tril(-1) + eye, self.U.triu(1) + torch.diag(self.sign * self.s.exp())

    def forward(self, x):
        L, U = self.factors()
        return torch.einsum("ij,bj...->bi...", self.P @ L @ U, x), times_places(self.s.sum(), x)

    def inverse(self, y):
        L, U = self.factors()
        columns = self.P.T @ y.transpose(0, 1).flatten(1)               # (C, B H W)
        columns = torch.linalg.solve_triangular(L, columns, upper=False, unitriangular=True)
        columns = torch.linalg.solve_triangular(U, columns, upper=True)
        return columns.unflatten(1, (len(y), *y.shape[2:])).transpose(0, 1), times_places(-self.s.sum(), y)


class Flip(nn.Module):
    """Channels in the opposite order."""

    def forward(self, x):
        return x.flip(1), x.new_zeros(len(x))

    inverse = forward


class Coupling(nn.Module):
    """The first channels as they are, the others by splines (bins > 0) or scale and shift, as a network of the first
    says: the Jacobian is triangular. [1] (4), [2] 2.1"""

    def __init__(self, channels: int, network, bins: int = 0, bound: float = 5.0):
        super().__init__()
        self.kept, self.bins, self.bound = channels // 2, bins, bound     # of an odd number the middle one moves
        self.numbers = 3 * bins - 1 if bins else 2
        self.network = network(self.kept, (channels - self.kept) * self.numbers)

    def forward(self, x, inverse=False):
        a, b = x[:, : self.kept], x[:, self.kept :]
        theta = self.network(a).unflatten(1, (-1, self.numbers)).movedim(2, -1)
        spline = fused("rational_quadratic", rational_quadratic_plain)
        b, log_slope = spline(b, theta, self.bound, inverse) if self.bins else affine(b, theta, inverse)
        return torch.cat([a, b], 1), log_slope.flatten(1).sum(1)

    def inverse(self, y):
        return self(y, inverse=True)


# ---- the family: bijections with a log-determinant


class Flow(nn.Module):
    """`forward(x) -> z, log_det` and `inverse(z) -> x, log_det`, and what follows from them.

    Points x (B, D); of images (B, C, H, W) y in [-1/2, 1/2) takes the place of x. z (B, D). `levels` are those of the
    data (None for points), of which `bits` at most are kept."""

    def __init__(self, shape, levels=None, bits: int = 8):
        super().__init__()
        self.shape, self.levels, self.images, self.dims = tuple(shape), levels, len(shape) == 3, math.prod(shape)
        self.n = min(levels, 2**bits) if self.images else 0

    def log_prob(self, x: Tensor) -> Tensor:
        """log p in nats, (B,)."""
        z, log_det = self(x)
        return standard_log_prob(z) + log_det

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0) -> Tensor:
        """(n, *shape) from z ~ N(0, temperature^2 I); images in [-1, 1]."""
        return self.decode(temperature * torch.randn(n, self.dims, device=next(self.parameters()).device))

    def loss(self, x: Tensor, share: slice = slice(None)) -> dict[str, Tensor]:
        """Points: nats; images: bits/dim of one dequantised copy, a bound on that of the integers. Of x[share], with
        the noise that it has in the whole batch."""
        return {"loss": self.bits(x, share).mean() if self.images else -self.log_prob(x[share]).mean()}

    def bits(self, x: Tensor, share: slice = slice(None)) -> Tensor:
        return bits_per_dim(self.log_prob(self.dequantize(x, torch.rand_like(x))[share]), self.dims, self.n)

    def dequantize(self, x: Tensor, u: Tensor | float = 0.5) -> Tensor:
        """y in [-1/2, 1/2), for u in [0, 1)."""
        if not (x.abs() <= 1).all():
            raise ValueError(f"images lie in [-1, 1]; got {float(x.min()):g} .. {float(x.max()):g}")
        level = ((x + 1) * ((self.levels - 1) / 2)).round()             # before the floor: 254.99 is 255
        return ((level * (self.n / self.levels)).floor() + u) / self.n - 0.5

    def quantize(self, y: Tensor) -> Tensor:
        return ((y + 0.5) * self.n).floor().clamp(0, self.n - 1) * (2 / (self.n - 1)) - 1

    def encode(self, x: Tensor) -> Tensor:
        """z of x, or of the middle of its levels."""
        return self(self.dequantize(x) if self.images else x)[0]

    def decode(self, z: Tensor) -> Tensor:
        x = self.inverse(z)[0]
        return self.quantize(x) if self.images else x


class Layered(Flow):
    """Layers at `scales` scales of an image, half of the channels leaving after each but the last; or of points. What
    leaves is scaled and shifted as the rest says: a learned Gaussian prior given the rest, [1] 3.6."""

    bins = 0

    def __init__(self, shape, levels=None, bits: int = 8, depth: int = 4, width: int = 64, scales: int = 2,
                 waves: int = 6):
        super().__init__(shape, levels, bits)
        if self.images and any(side % 2**scales for side in shape[1:]):
            raise ValueError(f"images of {shape[1]} x {shape[2]} cannot be halved {scales} times; choose --scales or "
                             "--size so that 2^scales divides the sides")
        if not self.images and shape[0] < 2:
            raise ValueError("a coupling needs two coordinates or more")
        network = (lambda i, o: ConvNet(i, o, width)) if self.images else lambda i, o: PointNet(i, o, width, 1, waves)
        channels, self.scales = shape[0], nn.ModuleList()
        for k in range(scales if self.images else 1):
            channels *= 4 if self.images else 1
            layers = [layer for _ in range(depth) for layer in self.step(channels, network)]
            if self.images and k < scales - 1:
                layers.append(Coupling(channels, network))              # the prior of what leaves
                channels -= channels // 2
            self.scales.append(nn.ModuleList(layers))

    def step(self, channels, network) -> list[nn.Module]:
        norm = [ActNorm(channels)] if self.images else []               # in the place of batch normalisation
        return [*norm, Coupling(channels, network, self.bins), Flip()]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts, log_det = [], x.new_zeros(len(x))
        for k, layers in enumerate(self.scales):
            x = squeeze(x) if self.images else x
            for layer in layers:
                x, change = layer(x)
                log_det = log_det + change
            if k < len(self.scales) - 1:
                kept = x.shape[1] - x.shape[1] // 2
                x, out = x[:, :kept], x[:, kept:]
                parts.append(out.flatten(1))
        return torch.cat([x.flatten(1), *reversed(parts)], 1), log_det

    def sizes(self) -> list[int]:
        """How many numbers of z each scale has, the coarsest first."""
        last = len(self.scales) - 1
        return [self.dims >> last, *(self.dims >> k for k in range(last, 0, -1))]

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, *parts = z.split(self.sizes(), 1)
        sides = [side >> len(self.scales) for side in self.shape[1:]]
        x, log_det = x.unflatten(1, (-1, *sides)) if self.images else x, z.new_zeros(len(z))
        for k, layers in enumerate(reversed(self.scales)):
            x = torch.cat([x, parts[k - 1].view_as(x)], 1) if k else x
            for layer in reversed(layers):
                x, change = layer.inverse(x)
                log_det = log_det + change
            x = unsqueeze(x) if self.images else x
        return x, log_det

    def states(self, z):
        """(label, x) on the way from z to points."""
        yield "z", z
        for k, layer in enumerate(reversed(self.scales[0])):
            z = layer.inverse(z)[0]
            yield f"layer {len(self.scales[0]) - k}", z


class RealNVP(Layered):
    """Affine couplings and nothing else."""


class Spline(Layered):
    def __init__(self, *args, bins: int = 32, **options):
        self.bins = bins
        super().__init__(*args, **options)


class Glow(Layered):
    def step(self, channels, network):
        return [ActNorm(channels), InvertibleLinear(channels), Coupling(channels, network)]


class Matching(Flow):
    """dx/dt = v(x, t), v fitted to the velocities of straight lines from noise to data: E |v(x_t, t) - (x - z)|^2. [4]

    `forward` solves from t = 1 to 0; log_det is exact up to three dimensions, above them an unbiased estimate. A batch
    may hold pairs (B, 2, D) of z and x that another model joins: reflow [6]."""

    def __init__(self, shape, levels=None, width: int = 64, waves: int = 6, ode_steps: int = 50, solver: str = "heun"):
        if len(shape) == 3:
            raise ValueError("matching is for points here; for images there are --model glow and ddpm.py")
        super().__init__(shape, levels)
        self.ode_steps, self.solver, self.density_steps = ode_steps, SOLVERS[solver], 64
        self.network = PointNet(self.dims + 1, self.dims, 2 * width, 3, waves)

    def velocity(self, x: Tensor, t: float | Tensor) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
        return self.network(torch.cat([x, t[:, None]], 1))

    def solve(self, x: Tensor, start: float, stop: float) -> tuple[Tensor, Tensor]:
        """x at `stop`, and the integral of tr dv/dx on the way: the field's own, however few steps draw samples."""
        e = torch.randint(2, x.shape, device=x.device).to(x.dtype) * 2 - 1

        def field(state, t):
            v, x = lambda x: self.velocity(x, t), state[:, :-1]
            v, trace = divergence(v, x, None if self.dims <= 3 else e)
            return torch.cat([v, trace[:, None]], 1)

        *_, state = ode(field, F.pad(x, (0, 1)), start, stop, self.density_steps, rk4)
        return state[:, :-1], state[:, -1]

    def forward(self, x):
        return self.solve(x, 1.0, 0.0)

    def inverse(self, z):
        return self.solve(z, 0.0, 1.0)

    def states(self, z):
        for k, x in enumerate(ode(self.velocity, z, 0.0, 1.0, self.ode_steps, self.solver)):
            yield f"t = {k / self.ode_steps:.2g}", x

    def decode(self, z):
        *_, (_, x) = self.states(z)
        return x

    def loss(self, x, share=slice(None)):
        z, x = x.unbind(1) if x.ndim == 3 else (torch.randn_like(x), x)
        t = (torch.rand(len(x), device=x.device) + torch.arange(len(x), device=x.device)) / len(x)
        x_t, v = straight(z, x, t)                          # one time in each part of [0, 1]: less variance
        return {"loss": (self.velocity(x_t[share], t[share]) - v[share]).square().mean()}

    @torch.no_grad()
    def pairs(self, n: int) -> Tensor:
        """(n, 2, D): noise, and where it is carried."""
        z = torch.randn(n, self.dims, device=next(self.parameters()).device)
        return torch.stack([z, self.decode(z)], 1)

    @torch.no_grad()
    def curvature(self, pairs: Tensor) -> Tensor:
        """E int |x - z - v(x_t, t)|^2 dt along the model's own ways, 0 where all are straight: [6] (5)."""
        z, x = pairs.unbind(1)
        h, total = 1 / self.ode_steps, 0.0
        for k, (_, x_t) in enumerate(self.states(z)):
            if k < self.ode_steps:
                total = total + h * (x - z - self.velocity(x_t, k * h)).square().flatten(1).sum(1).mean()
        return total


MODELS = {"spline": Spline, "realnvp": RealNVP, "glow": Glow, "matching": Matching}


def train(model: Flow, average: Flow, optimizer, batches, steps: int, lr: float, start: int = 0, decay: float = 0.998,
          share: slice = slice(None)):
    """Maximum likelihood, with a warm-up, a cosine to zero and a moving average of the weights to be judged."""
    weights, averages = list(model.parameters()), list(average.parameters())
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        x = next(batches)
        if not step:                                        # actnorm sees its first batch, whole
            with torch.no_grad():
                model.loss(x)
            average.load_state_dict(model.state_dict())
        row = model.loss(x, share)
        optimizer.zero_grad()
        row["loss"].backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + step) / (10 + step)))
        yield {name: value.detach() for name, value in row.items()}


def build(config: dict, shape, levels) -> Flow:
    """The model that the options of a run, or of a checkpoint, describe; levels None for points."""
    member = MODELS[config["model"]]
    owners = {member} if member == Matching else {member, Layered}
    names = {name for owner in owners for name in inspect.signature(owner).parameters}
    return member(shape, levels, **{name: config[name] for name in names if name in config})


@torch.no_grad()
def inverse_error(model: Flow, x: Tensor) -> float:
    """max |f^-1(f(x)) - x| / max(1, |x|), at the precision of x."""
    again = model.inverse(model(x)[0])[0]
    return float(((again - x).abs() / x.abs().clamp_min(1)).max())


def main():
    import time

    import data
    import edits
    import metrics
    import run

    args = run.parse(
        __doc__, MODELS | {"points": "pointflows"}, steps=3000, batch=1024, lr=1e-2,
        training={"depth": (3, "steps of flow a scale"), "width": (64, "of the networks"),
                  "bins": (32, "of a spline"), "waves": (6, "frequencies of sines"), "scales": (2, "of images"),
                  "bits": (8, "of an image's levels that are kept"),
                  "reflow": ("", "a checkpoint of --model matching, whose ways are made straight"),
                  "decay": (0.998, "of the average of the weights"), "size": (0, "of images, in pixels; 0 keeps them")},
        sampling={"temperature": (1.0, "of z"), "solver": ("heun", "of the ODE", list(SOLVERS)),
                  "ode_steps": (50, "of the solver"), "attribute": ("", "that is added and judged; the smile if none"),
                  "task": ("all", "edits of z, of images", ["all", *edits.TASKS, "none"])},
        images={"model": "glow", "steps": 3000, "batch": 64, "lr": 1e-3, "depth": 4, "bins": 8, "samples": 500,
                **{name: {"size": 32, "scales": 3, "bits": 5, "batch": 32} for name in ("faces", "lfw-smiles")},
                "decay": 0.995,
                **{name: {"matching": {"steps": 8000, "batch": 512, "lr": 4e-3}} for name in data.DENSITIES}})
    with run.Run(args) as job:
        truth = data.load(args.dataset, args.data_dir, size=args.size or None, download=args.download,
                          skip_bad=args.skip_bad)
        density = hasattr(truth, "log_prob")
        attributes = ["", *getattr(truth, "attribute_names", ())]
        if args.attribute not in attributes or args.task == "attributes" and len(attributes) == 1:
            raise ValueError(f"the attributes of {args.dataset} are {', '.join(attributes[1:]) or 'none'}")
        model = build(vars(args), truth.shape, None if density else truth.levels).to(job.device)
        batches = truth.batches(args.batch, job.device)
        if args.reflow and not args.ckpt:
            if args.model != "matching":
                raise ValueError("--reflow straightens the ways of --model matching")
            checkpoint = run.read_checkpoint(args.reflow, "flows")
            if (what := [checkpoint["config"][name] for name in ("model", "dataset")]) != ["matching", args.dataset]:
                raise ValueError(f"{args.reflow} holds {what[0]} of {what[1]}; matching of {args.dataset} is wanted")
            run.restore(model, checkpoint["state"]["average"], args.reflow, "average")
            pool = torch.cat([model.pairs(1000) for _ in range(20)])
            batches = (pool[torch.randint(len(pool), (args.batch,), device=job.device)] for _ in iter(int, 1))
        average = copy.deepcopy(model).requires_grad_(False)
        if args.ckpt:
            job.restore(average=average)
        else:
            optimizer = torch.optim.Adam(model.parameters(), args.lr, betas=(0.9, 0.99), fused=True)
            start = job.keep(model=model, average=average, optimizer=optimizer)
            rows = train(model, average, optimizer, batches, args.steps, args.lr, start, args.decay, job.share)
            for _ in job.track(rows, {"loss": truth.entropy} if density and args.model != "matching" else None):
                pass
        began, rows = time.perf_counter(), 2000 if density else 100
        samples = torch.cat([average.sample(min(rows, args.samples - i), args.temperature).cpu()
                             for i in range(0, args.samples, rows)])
        seconds = time.perf_counter() - began
        z = torch.randn(2000, average.dims, device=job.device)
        frames = {label: x.detach().cpu() for label, x in average.states(z)} if density else None
        results, samples = job.judge(samples, truth)
        x = truth.sample(1000 if density else 200).to(job.device)
        if density:
            kl = metrics.exact_kl(average.log_prob, truth, 240 if args.model == "matching" else 600, device=job.device)
            results["kl"] = metrics.metric(kl, 0, "nats")
            results["nll"] = metrics.nll(average.log_prob, truth, device=job.device)
        else:
            bits = torch.cat([average.bits(part) for part in x.split(50)]).detach()
            results["bits_per_dim"] = metrics.metric(bits.mean(), None, f"bits (bound), {average.n} levels")
            x = average.dequantize(x[:64], torch.rand_like(x[:64]))
            results |= edits.report(average, truth, job.folder, args.task, args.attribute)
        results["inverse_error"] = metrics.metric(inverse_error(average, x), 0, "relative")
        if args.model == "matching":
            results["curvature"] = metrics.metric(average.curvature(average.pairs(1000)), 0)
        job.report(results, samples, truth, sum(p.numel() for p in model.parameters()), seconds, frames=frames)


if __name__ == "__main__":
    main()
