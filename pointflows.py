"""Point clouds denoised by a normalising flow: noise is some channels of a latent, which are set to zero.

    y = [x - c, a],  z = f(y; G, h),  z = [z_c, z_n]:    denoise(x) = c + xyz of f^-1([z_c, 0]; G, h)    [1], [2]

Each point carries three coordinates and nine channels a of its neighbourhood: how far it stands from a plane through
its neighbours, at three sizes of neighbourhood. f is a flow over these channels, the same for all points, its couplings
fed by the neighbours of a point in a graph G that the noisy cloud fixes. A coupling sees the kept half of *all* points
and changes the other half of each, so the Jacobian of the whole cloud is triangular in blocks and log|det df/dy| is a
sum over points, exact for given G and h. It is the density of y given them, not of x: a adds no density of its own, as
in [2] (in [1] it is drawn, and the bound on log p(x) holds).

Planes. A network of this size, trained for minutes, does not find the direction of a surface from coordinates, so it is
given: the axis of least variance n of the k nearest points [5], for three k. Along it a point is moved by a weighted
mean of heights, a = n sum_j w_j n.(x_j - x_i) / k, where w_j is learned from place and height (with w = 1 it is moved
onto the plane) as a bilateral filter's is set by hand [6]. Which of the three to trust where, the flow says. Lengths
are in units of the cloud's own spacing, so clouds of 1,000 and of 10,000 points look alike.

References
  [1] Mao et al., PD-Flow: A Point Cloud Denoising Framework with Normalizing Flows, arXiv 2203.05940
  [2] Mao, Yan, He, Denoising Point Clouds in Latent Space via Graph Convolution and INN, CVPR 2024
  [3] Kingma, Dhariwal, Glow: Generative Flow with Invertible 1x1 Convolutions, arXiv 1807.03039
  [4] Wang et al., Dynamic Graph CNN for Learning on Point Clouds, arXiv 1801.07829 (edge convolution)
  [5] Hoppe et al., Surface Reconstruction from Unorganized Points, SIGGRAPH 1992 (tangent planes)
  [6] Fleishman, Drori, Cohen-Or, Bilateral Mesh Denoising, SIGGRAPH 2003

Glossary
  paper   code           shape              meaning
  x       noisy          (B, N, 3)          in the box [-1, 1]^3
  c       centre         (B, N, 3)          mean of the widest neighbourhood
  y, z    y, z           (B, 12, N)         channels first, as an image of N places
  G       graph          (B, N, k)          indices of the nearest others of each point in the noisy cloud
  z_n     noise          the last channels  of z, given to noise
  h       condition      (B, W, N)          features of neighbourhoods, from the noisy cloud alone

Use
  python pointflows.py                              shapes3d; Chamfer and the distance to the exact surface
  python pointflows.py --latent left                or random, zero; --zeroed 3: fewer channels; --corruptions all
  python pointflows.py --test-points 10000 --passes 2

Not included: farthest points, the Earth mover's distance, densities of clouds without a condition.
"""

import copy
import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- maths


def standard_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) of each row, (B,)."""
    z = z.flatten(1)
    return -z.square().sum(1) / 2 - z.shape[1] / 2 * math.log(2 * math.pi)


def affine(x: Tensor, theta: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """x e^s + t and s, for theta (..., 2) = (raw s, t): s = 2 tanh(raw / 2) bounds each scale to e^2. Inverse: -s."""
    s, t = 2 * torch.tanh(theta[..., 0] / 2), theta[..., 1]
    return ((x - t) * (-s).exp(), -s) if inverse else (x * s.exp() + t, s)


def neighbours(x: Tensor, k: int, rows: int = 1024) -> Tensor:
    """(B, N, k): the nearest other points of each point of x (B, N, 3), nearest first; distances of `rows` at once."""
    if not 1 <= k < x.shape[1]:
        raise ValueError(f"{k} neighbours of each point want {k + 1} points or more; got {x.shape[1]}")
    found = []
    for start in range(0, x.shape[1], rows):
        d = torch.cdist(x[:, start : start + rows], x)
        d.diagonal(start, 1, 2).fill_(math.inf)
        found.append(d.topk(k, largest=False).indices)
    return torch.cat(found, 1)


def gathered(h: Tensor, graph: Tensor) -> Tensor:
    """(B, C, N, k): the columns of h (B, C, N) that the graph names."""
    B, N, k = graph.shape
    return h.gather(2, graph.reshape(B, 1, N * k).expand(-1, h.shape[1], -1)).view(B, -1, N, k)


def plane(near: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Unit normal (..., 3) of the plane that fits points (..., k, 3) best, towards `up`, and the standard deviations
    (..., 3) of the points along their principal axes, the normal's first. [5] 3.1"""
    centred = near - near.mean(-2, keepdim=True)
    variances, axes = torch.linalg.eigh(centred.mT @ centred / near.shape[-2])
    normal = axes[..., 0]
    return normal.where((normal * up).sum(-1, keepdim=True) >= 0, -normal), variances.clamp_min(1e-6).sqrt()


# ---- layers and networks; h (B, C, N)


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


class Edges(nn.Module):
    """Edge convolution: SiLU of the max over neighbours of a linear layer of (h_i, h_j - h_i). [4] (8)"""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.own, self.other = nn.Conv1d(channels, out, 1), nn.Conv1d(channels, out, 1, bias=False)

    def forward(self, h: Tensor, graph: Tensor) -> Tensor:
        far = self.other(h)                                             # linear, so it may come before the neighbours
        return F.silu(self.own(h) - far + gathered(far, graph).amax(3))


class Heights(nn.Module):
    """a, (B, N, 3): n sum_j w_j n.(x_j - x_i) / k, the weights of a point's neighbours said by the place and height of
    each, and by the condition. w = 1 at the start: onto the plane. [6] has two gaussians as w."""

    def __init__(self, condition: int, width: int = 16):
        super().__init__()
        self.point, self.edge, self.last = nn.Linear(condition, width), nn.Linear(3, width), nn.Linear(width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.ones_(self.last.bias)

    def forward(self, normal: Tensor, heights: Tensor, places: Tensor, h: Tensor) -> Tensor:
        w = self.last(F.silu(self.point(h.transpose(1, 2))[:, :, None] + self.edge(places)))[..., 0]
        return normal * (w * heights).mean(2, keepdim=True)


class GraphCoupling(nn.Module):
    """The first channels of all points as they are; the others scaled and shifted as those of a point and of its
    neighbours, and the condition, say."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.kept = channels - channels // 2
        self.edges, self.mix = Edges(self.kept, width), nn.Conv1d(2 * width, width, 1)
        self.last = nn.Conv1d(width, 2 * (channels - self.kept), 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, y, graph, condition, inverse=False):
        a, b = y[:, : self.kept], y[:, self.kept :]
        h = F.silu(self.mix(torch.cat([self.edges(a, graph), condition], 1)))
        b, log_slope = affine(b, self.last(h).unflatten(1, (-1, 2)).movedim(2, -1), inverse)
        return torch.cat([a, b], 1), log_slope.flatten(1).sum(1)

    def inverse(self, y, graph, condition):
        return self(y, graph, condition, inverse=True)


# ---- the family: a bijection of the channels of a cloud, and what is done to its latent

LATENTS = ("zero", "left", "random")
CHANNELS = 12                                               # three coordinates, and one vector for each of three planes
NEAR = 8                                                    # neighbours in the graph of the networks


class PointFlow(nn.Module):
    """`forward(y, graph, condition) -> z, log_det` and its inverse; `denoise(noisy) -> clean`."""

    shape = (3,)

    def __init__(self, width: int = 48, depth: int = 2, k: int = 64, noise: int = 9):
        super().__init__()
        if not 0 < noise < CHANNELS or k < 3:
            raise ValueError(f"of {CHANNELS} channels 1 to {CHANNELS - 1} can hold noise, and a plane 3 neighbours "
                             f"or more; got {noise} and {k}")
        self.sizes, self.noise = [max(3, k // 5), max(3, k // 2), k], noise
        self.measured, self.whole = nn.Conv1d(6 * len(self.sizes), width, 1), nn.Conv1d(width, width, 1)
        self.first, self.second = Edges(width, width), Edges(width, width)
        self.heights = nn.ModuleList(Heights(width) for _ in self.sizes)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            linear = InvertibleLinear(CHANNELS)
            linear.load_state_dict(linear.state_dict() | {             # the identity: the cloud as it is
                "P": torch.eye(CHANNELS), "sign": torch.ones(CHANNELS),
                **{name: torch.zeros_like(p) for name, p in linear.named_parameters()}})
            self.layers += [ActNorm(CHANNELS), linear, GraphCoupling(CHANNELS, width)]

    @torch.no_grad()
    def planes(self, noisy: Tensor):
        """graph, unit (B, 1, 1), centre / unit, what is measured at each point (B, 18, N), and the normal, heights and
        places of neighbours of each size: distance along the plane, height beside that of the others, its size."""
        graph = neighbours(noisy, self.sizes[-1])
        near = (gathered(noisy.transpose(1, 2), graph) - noisy.transpose(1, 2)[..., None]).permute(0, 2, 3, 1)
        unit = near[:, :, :NEAR].norm(dim=3).mean(2).median(1).values.clamp_min(1e-6)[:, None, None]
        near = torch.cat([torch.zeros_like(near[:, :, :1]), near / unit[..., None]], 2)      # the point is one of them
        centre, measured, planes = near.mean(2), [], []
        for k in self.sizes:
            some = near[:, :, : k + 1]
            normal, spreads = plane(some, centre)
            heights = (some @ normal[..., None])[..., 0]
            along = (some.square().sum(3) - heights.square()).clamp_min(0).sqrt()
            height = heights.mean(2, keepdim=True)
            away = (some.mean(2) - normal * height).norm(dim=2, keepdim=True)
            odd = (heights - height) / spreads[..., :1]
            measured += [spreads, height, away, height / spreads[..., :1]]
            places = torch.stack([along / along.mean(2, keepdim=True).clamp_min(1e-6), odd, odd.abs()], 3)
            planes.append((normal, heights, places))
        return graph[:, :, :NEAR], unit, centre, torch.cat(measured, 2).transpose(1, 2), planes

    def condition(self, noisy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, graph and condition of a cloud (B, N, 3), and its unit of length: a median distance to near points."""
        if noisy.ndim != 3 or noisy.shape[2] != 3 or not noisy.isfinite().all():
            raise ValueError(f"clouds (B, N, 3) of finite points are wanted; got {tuple(noisy.shape)}")
        graph, unit, centre, measured, planes = self.planes(noisy)
        h = F.silu(self.measured(measured))
        h = h + self.first(h, graph)
        h = h + self.whole(h.mean(2, keepdim=True))                     # how much noise there is, all points tell
        h = h + self.second(h, graph)
        a = [heights(*plane, h) for heights, plane in zip(self.heights, planes)]
        return torch.cat([-centre, *a], 2).transpose(1, 2), graph, h, unit

    def forward(self, y, graph, condition):
        log_det = y.new_zeros(len(y))
        for layer in self.layers:
            y, change = layer(y, graph, condition) if isinstance(layer, GraphCoupling) else layer(y)
            log_det = log_det + change
        return y, log_det

    def inverse(self, z, graph, condition):
        log_det = z.new_zeros(len(z))
        for layer in reversed(self.layers):
            z, change = layer.inverse(z, graph, condition) if isinstance(layer, GraphCoupling) else layer.inverse(z)
            log_det = log_det + change
        return z, log_det

    def edit(self, z: Tensor, latent: str = "zero", zeroed: int | None = None) -> Tensor:
        """z with its last `zeroed` channels (all of the noise's) zero, left as they are, or random normals."""
        n = self.noise if zeroed is None else zeroed
        if latent not in LATENTS or not 0 <= n < z.shape[1]:
            raise ValueError(f"the noise of z is one of {', '.join(LATENTS)}, in 0 to {z.shape[1] - 1} channels; got "
                             f"{latent}, {n}")
        if latent == "left" or not n:
            return z
        part = z[:, -n:]
        return torch.cat([z[:, :-n], torch.zeros_like(part) if latent == "zero" else torch.randn_like(part)], 1)

    def moves(self, noisy: Tensor, latent: str = "zero", zeroed: int | None = None) -> tuple[Tensor, ...]:
        """How each point is moved (B, N, 3) in units of length, those, and the negative log-likelihood of y."""
        y, graph, h, unit = self.condition(noisy)
        z, log_det = self(y, graph, h)
        nll = -(standard_log_prob(z) + log_det).mean() / z[0].numel()
        moved = self.inverse(self.edit(z, latent, zeroed), graph, h)[0] - y
        return moved[:, :3].transpose(1, 2), unit, nll

    def denoise(self, noisy: Tensor, latent: str = "zero", zeroed: int | None = None) -> Tensor:
        """(B, N, 3) -> (B, N, 3)."""
        moves, unit, _ = self.moves(noisy, latent, zeroed)
        return noisy + unit * moves

    def loss(self, noisy: Tensor, clean: Tensor, weight: float = 1e-5) -> dict[str, Tensor]:
        """Squared distance to the clean partner as a part of what it was, and a little of the likelihood of y given G
        and h, in nats a channel."""
        moves, unit, nll = self.moves(noisy)
        far = ((noisy - clean) / unit).square().sum(2).mean(1).clamp_min(1e-6)
        error = (((noisy - clean) / unit + moves).square().sum(2).mean(1) / far).mean()
        return {"loss": error + weight * nll, "error": error, "nll": nll}


MODELS = {"points": PointFlow}


def pieces(clouds, points: int, fewest: int = 1024):
    """Of each pair of clouds, thinned to `fewest` points or more, those nearest to one of them: every density at the
    price of `points`."""
    for noisy, clean in clouds:
        N = noisy.shape[1]
        left = int(fewest * (N / fewest) ** float(torch.rand(()))) if N > fewest else N
        rows = torch.randperm(N, device=noisy.device)[:left]
        noisy, clean = noisy[:, rows], clean[:, rows]
        near = (noisy - noisy[:, :1]).norm(dim=2).topk(min(points, left), largest=False).indices[..., None]
        yield tuple(x.gather(1, near.expand(-1, -1, 3)) for x in (noisy, clean))


def train(model: PointFlow, average: PointFlow, optimizer, batches, steps: int, lr: float, start: int = 0,
          decay: float = 0.99, share: slice = slice(None)):
    """Pairs (noisy, clean), with a warm-up, a cosine to zero and a moving average of the weights to be judged."""
    weights, averages = list(model.parameters()), list(average.parameters())
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        noisy, clean = next(batches)
        if not step:                                        # actnorm sees its first batch, whole
            with torch.no_grad():
                model.loss(noisy, clean)
            average.load_state_dict(model.state_dict())
        row = model.loss(noisy[share], clean[share])
        optimizer.zero_grad()
        row["loss"].backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + step) / (10 + step)))
        yield {name: value.detach() for name, value in row.items()}


@torch.no_grad()
def round_trip(model: PointFlow, noisy: Tensor) -> float:
    """max |f^-1(f(y)) - y| / max(1, |y|), at the precision of the cloud."""
    y, graph, h, _ = model.condition(noisy)
    again = model.inverse(model(y, graph, h)[0], graph, h)[0]
    return float(((again - y).abs() / y.abs().clamp_min(1)).max())


def build(config: dict) -> PointFlow:
    names = inspect.signature(PointFlow).parameters
    return PointFlow(**{name: config[name] for name in names if name in config})


def main():
    import clouds
    import data
    import metrics
    import run

    args = run.parse(
        __doc__, MODELS, dataset="shapes3d", steps=1500, batch=4, lr=6e-3, others=data.CLOUDS,
        training={"width": (48, "of the networks"), "depth": (2, "steps of flow"),
                  "k": (64, "neighbours of the widest plane"), "noise": (9, "channels of z that hold noise"),
                  "points": (512, "of a training patch"),
                  "pairs": ("background", "noise of training: with strays, or none", ["background", "gaussian"])},
        sampling={"latent": ("zero", "what is done to the noise of z", list(LATENTS)),
                  "zeroed": (0, "channels it is done to; 0: all that hold noise"),
                  "passes": (1, "times a cloud is denoised"), "test_points": (1024, "of a test cloud"),
                  "corruptions": ("gaussian,background", "of test clouds, names of clouds.py, or all")})
    with run.Run(args) as job:
        if args.dataset not in data.CLOUDS:
            raise ValueError(f"pointflows wants clouds, {' or '.join(data.CLOUDS)}; got {args.dataset}")
        if args.zeroed >= CHANNELS or args.k >= min(args.points, args.test_points):
            raise ValueError(f"--zeroed must be below {CHANNELS}, the channels, and --k below the points of a "
                             f"cloud, {min(args.points, args.test_points)}; got {args.zeroed} and {args.k}")
        corruptions = list(clouds.CORRUPTIONS) if args.corruptions == "all" else args.corruptions.split(",")
        if unknown := {*corruptions} - clouds.CORRUPTIONS.keys():
            raise ValueError(f"--corruptions takes {', '.join(clouds.CORRUPTIONS)}; got {', '.join(sorted(unknown))}")
        truth = data.load(args.dataset, args.data_dir)
        model = build(vars(args)).to(job.device)
        average = copy.deepcopy(model).requires_grad_(False)
        if args.ckpt:
            job.restore(average=average)
        else:
            optimizer = torch.optim.Adam(model.parameters(), args.lr, betas=(0.9, 0.99), fused=True)
            start = job.keep(model=model, average=average, optimizer=optimizer)
            batches = pieces(truth.batches(args.batch, truth.POOL, job.device, args.pairs), args.points)
            for _ in job.track(train(model, average, optimizer, batches, args.steps, args.lr, start, share=job.share)):
                pass

        def ours(noisy):
            for _ in range(args.passes):
                noisy = average.denoise(noisy, args.latent, args.zeroed or None)
            return noisy

        results = clouds.report(ours, truth, job.folder, corruptions, points=args.test_points, device=job.device)
        noisy = truth.test(4, args.test_points, "gaussian", 3)[0].to(job.device)
        results["inverse_error"] = metrics.metric(round_trip(average, noisy), 0, "relative")
        job.report(results, parameters=sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main()
