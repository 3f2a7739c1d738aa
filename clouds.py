"""Point clouds: surfaces known exactly, the corruptions of ModelNet40-C, classical denoisers, distances and pictures.

    truth = data.load("shapes3d")           a Clouds: drawn spheres, tori, boxes, cylinders, cones and unions of them
    truth = data.load("modelnet", folder)   the same of OFF or PLY meshes
    next(truth.batches(16, 512, "cuda"))    noisy, clean (B, N, 3), paired point by point, for ever
    truth.test(32, 1024, "background", 5)   noisy, clean of held-out surfaces; truth.distance(noisy) to those surfaces
    report(denoise, truth, folder)          {name: metric}: a denoiser beside no denoiser and two classical ones

A Surface is sampled uniformly by area and knows its unsigned distance d(x) exactly. A union is one of surfaces: what
lies inside another part stays, as in the meshes of ModelNet. Clouds fill the box [-1, 1]^3: its centre is 0 and the
longest edge 2, so "gaussian 2%" is a standard deviation of 0.02.

Corruptions [1]. The 13 of 15 that need no renderer (occlusion and lidar do), with the constants of the published
generator, severities 1 to 5; 0 leaves a cloud as it is. N is the number of points given, N // k a count:
    uniform      + U(-c, c)^3                                 c = .01 .02 .03 .04 .05
    gaussian     + c N(0, I), clipped to [-1, 1]              c = .01 .015 .02 .025 .03
    impulse      N // k points + (+-0.1, +-0.1, +-0.1)        k = 30 25 20 15 10
    upsampling   N // k copies + U(-.05, .05)^3 appended      k = 5 4 3 2 1
    background   N // k of U(-1, 1)^3 appended                k = 45 40 35 30 20
    cutout       m times the 30 nearest of a point deleted    m = 2 3 5 7 10
    density      m times 75 of the 100 nearest deleted        m = 1 2 3 4 5
    density_inc  of 2 N points m times the 100 nearest of a point, taken out, then filled to N from the rest; same m
    rotation     about x, y, z by +- U(c - 2.5, c + 2.5) deg  c = 2.5 5 7.5 10 15
    shear        x @ [[1,0,b],[d,1,e],[f,0,1]], each +- U(c - .05, c + .05)          c = .05 .1 .15 .2 .25
    distortion   free-form [2]: 5^3 Bernstein control points moved by U(-c, c) box edges, so up to 2 c; c = .1 to .5
    distortion_rbf, _inv   5^3 control points on [-1, 1]^3 moved by c, interpolated with an affine part by the
                 basis sqrt(r^2 + 1/4), or its inverse;       c = .025 .05 .075 .1 .125
The balls of 30 and 100 are those of N = 1024 and grow in proportion. All but gaussian, cutout and the densities are
brought back to the box afterwards, as published; `scaled=False`, which `Clouds` uses, leaves that out, for no denoiser
can know the frame before. The two RBF rows take the default radius 1/2 of the library that the generator calls.

What a denoiser can reach. Chamfer distance here is mean squared distance to the nearest point, both directions summed
[3]. Two thirds of isotropic noise lie along the surface, where no denoiser can see them: as long as the noise is below
the gaps of the sampling, moving each point exactly onto its surface lowers Chamfer by a third (37% at noise 0.02 and
1,024 points, 48% at 4,096), and a second true sample of the surface scores *worse* than the noisy cloud, 46e-4 where
that has 19e-4: `python bench/cloud_floors.py`. So the projection is the floor in `report`, and the distance to the
surface, which can fall to 0, stands beside it.

References
  [1] Sun et al., Benchmarking robustness of 3D point cloud recognition against common corruptions, arXiv 2201.12296
  [2] Sederberg, Parry, Free-form deformation of solid geometric models, SIGGRAPH 1986     [3] Luo, Hu, Score-based
  point cloud denoising, ICCV 2021, arXiv 2107.10981      [4] Rusu et al., Towards 3D point cloud based object maps for
  household environments, Robotics and Autonomous Systems 56, 2008 (statistical outlier removal)
"""

import functools
import math
import pathlib

import torch
from torch import Tensor

import formats

# ---- surfaces: uniform by area, exact distance


def _uniform(shape, g, low=0.0, high=1.0) -> Tensor:
    return torch.rand(shape, generator=g, dtype=torch.float64) * (high - low) + low


def _pick(weights, n, g) -> Tensor:
    """n indices with probability in proportion to the weights (no limit on their number, as multinomial has)."""
    ends = weights.double().cumsum(0)
    return torch.searchsorted(ends, _uniform(n, g) * ends[-1]).clamp_max(len(ends) - 1)


def _segment(p, a, b) -> Tensor:
    """Distance from points p (.., D) to the segment from a to b."""
    along = b - a
    t = ((p - a) * along).sum(-1) / along.square().sum(-1).clamp_min(1e-300)
    return torch.linalg.vector_norm(p - a - t.clamp(0, 1)[..., None] * along, dim=-1)


class Surface:
    """`area`; sample(n, generator) -> (n, 3) float64, uniform by area; distance(x (.., 3)) -> (..), unsigned, exact."""


class Sphere(Surface):
    def __init__(self, radius=1.0):
        self.radius, self.area = radius, 4 * math.pi * radius**2

    def sample(self, n, generator=None):
        x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        return self.radius * x / x.norm(dim=-1, keepdim=True)

    def distance(self, x):
        return (torch.linalg.vector_norm(x, dim=-1) - self.radius).abs()


class Torus(Surface):
    """Around the z axis: a circle of radius `tube` whose centre runs on one of radius `ring` > tube."""
    def __init__(self, ring=1.0, tube=0.3):
        self.ring, self.tube, self.area = ring, tube, 4 * math.pi**2 * ring * tube

    def sample(self, n, generator=None):
        u, v = _uniform((2, n), generator, 0, 2 * math.pi)
        # area element ring + tube cos v: of v and pi - v, whose elements sum to 2 ring, keep one by its share
        keep = _uniform(n, generator) < (1 + self.tube / self.ring * v.cos()) / 2
        v = torch.where(keep, v, math.pi - v)
        rho = self.ring + self.tube * v.cos()
        return torch.stack([rho * u.cos(), rho * u.sin(), self.tube * v.sin()], -1)

    def distance(self, x):
        rho = torch.linalg.vector_norm(x[..., :2], dim=-1)
        return (torch.hypot(rho - self.ring, x[..., 2]) - self.tube).abs()


class Box(Surface):
    def __init__(self, half=(1.0, 1.0, 1.0)):
        self.half = torch.as_tensor(half, dtype=torch.float64)
        a, b, c = self.half.tolist()
        self.faces = torch.tensor([b * c, a * c, a * b], dtype=torch.float64)      # a quarter of each, by its normal
        self.area = 8 * self.faces.sum().item()

    def sample(self, n, generator=None):
        x = _uniform((n, 3), generator, -1, 1)
        normal = _pick(self.faces, n, generator)[:, None]
        return self.half * x.scatter(1, normal, x.gather(1, normal).sign())

    def distance(self, x):
        q = x.abs() - self.half.to(x)                                   # norm outside, the nearest face inside
        return torch.linalg.vector_norm(q.clamp_min(0), dim=-1) + q.amax(-1).clamp_max(0).abs()


class Revolution(Surface):
    """A polyline (K, 2) of (rho >= 0, z) turned about the z axis: cylinders, cones, discs and what they make up."""
    def __init__(self, profile):
        p = torch.as_tensor(profile, dtype=torch.float64)
        self.a, self.b = p[:-1], p[1:]
        self.parts = math.pi * (self.a + self.b)[:, 0] * (self.b - self.a).norm(dim=-1)     # of frusta
        self.area = self.parts.sum().item()

    def sample(self, n, generator=None):
        part = _pick(self.parts, n, generator)
        (r1, z1), (r2, z2) = self.a[part].T, self.b[part].T
        u, turn = _uniform(n, generator), _uniform(n, generator, 0, 2 * math.pi)
        rho = (r1.square() + u * (r2.square() - r1.square())).sqrt()                # density in proportion to rho
        t = torch.where(r1 == r2, u, (rho - r1) / torch.where(r1 == r2, 1.0, r2 - r1))
        return torch.stack([rho * turn.cos(), rho * turn.sin(), z1 + t * (z2 - z1)], -1)

    def distance(self, x):
        p = torch.stack([torch.linalg.vector_norm(x[..., :2], dim=-1), x[..., 2]], -1)      # the half-plane of x
        return torch.stack([_segment(p, a, b) for a, b in zip(self.a.to(x), self.b.to(x))]).amin(0)


def cylinder(radius=0.5, half=1.0) -> Revolution:
    """Closed, from z = -half to half."""
    return Revolution([(0, -half), (radius, -half), (radius, half), (0, half)])


def cone(radius=0.5, half=1.0) -> Revolution:
    """Closed, base at z = -half, apex at half."""
    return Revolution([(0, -half), (radius, -half), (0, half)])


class Mesh(Surface):
    """Triangles: vertices (V, 3), faces (F, 3). ValueError where no triangle has an area."""
    def __init__(self, vertices, faces):
        self.corners = torch.as_tensor(vertices, dtype=torch.float64)[torch.as_tensor(faces)]       # (F, 3, 3)
        a, b, c = self.corners.unbind(1)
        self.normals = torch.linalg.cross(b - a, c - a)
        self.parts = self.normals.norm(dim=-1) / 2
        self.area, self.centres = self.parts.sum().item(), self.corners.mean(1)
        self.radii = (self.corners - self.centres[:, None]).norm(dim=-1).amax(1)
        if not 0 < self.area < math.inf:
            raise ValueError(f"a surface is wanted, and the area of this mesh of {len(self.corners)} faces is "
                             f"{self.area:g}")

    def sample(self, n, generator=None):
        a, b, c = self.corners[_pick(self.parts, n, generator)].unbind(1)
        root, v = _uniform((n, 1), generator).sqrt(), _uniform((n, 1), generator)
        return (1 - root) * a + root * (1 - v) * b + root * v * c

    def distance(self, x):
        parts = x.reshape(-1, 3).split(max(1, 2**21 // len(self.corners)))
        return torch.cat([self._distance(part) for part in parts]).view(x.shape[:-1])

    def _distance(self, x):
        away = torch.cdist(x.detach(), self.centres.to(x), compute_mode="donot_use_mm_for_euclid_dist")       # (n, F)
        least = away - self.radii.to(x)                                   # no face is nearer
        k = int((least <= away.amin(1, keepdim=True)).sum(1).max())     # none is farther than its centre
        near = least.topk(k, largest=False).indices
        return torch.cat([self._among(*rows) for rows in zip(*(t.split(max(1, 2**19 // k)) for t in (x, near)))])

    def _among(self, x, near):
        corners, normal, p = self.corners.to(x)[near], self.normals.to(x)[near], x[:, None]         # (n, 1, 3)
        edges = [(corners[:, :, i], corners[:, :, (i + 1) % 3]) for i in range(3)]
        best = torch.stack([_segment(p, a, b).amin(1) for a, b in edges]).amin(0)
        inside = torch.stack([(torch.linalg.cross(b - a, normal) * (p - a)).sum(-1) <= 0 for a, b in edges]).all(0)
        length = normal.norm(dim=-1)
        height = ((p - corners[:, :, 0]) * normal).sum(-1).abs() / length.clamp_min(1e-300)         # (n, k)
        return torch.minimum(best, height.masked_fill(~inside | (length == 0), math.inf).amin(1))


class Placed(Surface):
    """scale * rotation @ surface + shift."""
    def __init__(self, surface, rotation=None, shift=(0.0, 0.0, 0.0), scale=1.0):
        self.surface, self.scale, self.area = surface, scale, surface.area * scale**2
        self.rotation = torch.eye(3, dtype=torch.float64) if rotation is None else rotation
        self.shift = torch.as_tensor(shift, dtype=torch.float64)

    def sample(self, n, generator=None):
        return self.scale * self.surface.sample(n, generator) @ self.rotation.T + self.shift

    def distance(self, x):
        return self.scale * self.surface.distance((x - self.shift.to(x)) @ self.rotation.to(x) / self.scale)


class Union(Surface):
    def __init__(self, *parts):
        self.parts, self.areas = parts, torch.tensor([p.area for p in parts], dtype=torch.float64)
        self.area = self.areas.sum().item()

    def sample(self, n, generator=None):
        counts = _pick(self.areas, n, generator).bincount(minlength=len(self.parts)).tolist()
        x = torch.cat([part.sample(count, generator) for part, count in zip(self.parts, counts)])
        return x[torch.randperm(n, generator=generator)]

    def distance(self, x):
        return torch.stack([part.distance(x) for part in self.parts]).amin(0)


def project(x: Tensor, surface: Surface) -> Tensor:
    """The nearest point of the surface, x - d grad d: exact where the distance is. x (N, 3)."""
    with torch.enable_grad():
        y = x.detach().double().requires_grad_()
        (slope,) = torch.autograd.grad((d := surface.distance(y)).sum(), y)
    return (y.detach() - d.detach()[:, None] * slope.nan_to_num()).to(x.dtype)


# ---- shapes to draw


def _rotation(g) -> Tensor:
    """Uniform over the rotations: the orthogonal factor of a normal matrix, its signs made unique."""
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))
    q = q * r.diagonal().sign()
    return q * q.det()


def _table(u):
    w, d, leg = u(0.6, 1), u(0.5, 1), u(0.04, 0.1)
    legs = [Placed(cylinder(leg, 0.5), shift=(s * (w - leg), t * (d - leg), -0.5)) for s in (-1, 1) for t in (-1, 1)]
    return Union(Box((w, d, u(0.04, 0.1))), *legs)


def _plane(u):
    wing, tail = u(0.6, 1), u(0.2, 0.4)
    turn = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]], dtype=torch.float64)
    flat = lambda half, x, z: Placed(Box(half), shift=(x, 0, z))
    return Union(Placed(cylinder(0.12, 0.7), turn), Placed(cone(0.12, 0.15), turn, (0.85, 0, 0)),
                 flat((0.15, wing, 0.02), 0.1, 0), flat((0.08, tail, 0.02), -0.6, 0.1),
                 flat((0.08, 0.02, 0.2), -0.6, 0.2))


SHAPES = {
    "sphere": lambda u: Sphere(1.0),
    "torus": lambda u: Torus(1.0, u(0.2, 0.5)),
    "box": lambda u: Box((u(0.3, 1), u(0.3, 1), u(0.3, 1))),
    "cylinder": lambda u: cylinder(u(0.3, 1), u(0.4, 1)),
    "cone": lambda u: cone(u(0.4, 1), u(0.4, 1)),
    "lamp": lambda u: Union(Placed(cone(u(0.3, 0.5), 0.25), shift=(0, 0, 0.75)), cylinder(0.04, 0.6),
                            Placed(cylinder(u(0.3, 0.5), 0.04), shift=(0, 0, -0.6))),
    "dumbbell": lambda u: Union(cylinder(0.1, 0.7), Placed(Sphere(u(0.25, 0.4)), shift=(0, 0, -0.7)),
                                Placed(Sphere(u(0.25, 0.4)), shift=(0, 0, 0.7))),
    "table": _table,
    "plane": _plane,
}


def fitted(surface: Surface, rotation=None) -> Surface:
    """The surface, turned, in the box: longest edge 2, centre 0, by the bounding box of 4096 of its points."""
    x = Placed(surface, rotation).sample(4096, torch.Generator().manual_seed(0))
    low, high = x.aminmax(dim=0)
    scale = 2 / (high - low).max().item()
    return Placed(surface, rotation, -scale * (low + high) / 2, scale)


def draw(name: str, generator) -> Surface:
    """A surface of that name (of SHAPES) with random proportions and pose, in the box."""
    u = lambda low, high: _uniform((), generator, low, high).item()
    return fitted(SHAPES[name](u), _rotation(generator))


# ---- corruptions


def check(x: Tensor, least: int = 2) -> Tensor:
    """x itself. ValueError unless it is (.., N, 3) with N >= 2 and finite."""
    if x.ndim < 2 or x.shape[-1] != 3 or x.shape[-2] < least:
        raise ValueError(f"a cloud (N, 3) of {least} or more points is wanted; got {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError(f"finite points are wanted; {(~x.isfinite().all(-1)).sum()} are NaN or infinite")
    return x


def normalize(x: Tensor) -> Tensor:
    """Centre of the bounding box to 0, its longest edge to 2; (.., N, 3)."""
    low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    return (x - (low + high) / 2) * (2 / (high - low).amax(-1, keepdim=True).clamp_min(1e-12))


def _signed(c, width, n, g):
    """n numbers of U(c - width, c + width), each with a random sign."""
    return _uniform(n, g, c - width, c + width) * (2.0 * torch.randint(2, (n,), generator=g) - 1)


def _ball(x, size, g):
    """Of the cloud as it is now: which points are the `size` nearest of a random one, itself included (N,) bool."""
    middle = x[torch.randint(len(x), (), generator=g)]
    near = (x - middle).square().sum(-1).topk(min(max(1, size), len(x)), largest=False).indices
    return torch.zeros(len(x), dtype=torch.bool).index_fill_(0, near, True)


def _some(n, count, g):
    return torch.randperm(n, generator=g)[:count]


def _cutout(x, m, g):
    size = 30 * len(x) // 1024
    for _ in range(m):
        x = x[~_ball(x, size, g)] if len(x) > size + 1 else x
    return x


def _density(x, m, g):
    size = 100 * len(x) // 1024
    for _ in range(m):
        near = _ball(x, size, g).nonzero()[:, 0]
        gone = near[_some(len(near), 3 * len(near) // 4, g)]
        x = x[torch.ones(len(x), dtype=torch.bool).index_fill_(0, gone, False)]
    return x


def _density_inc(x, m, g):
    n, kept = len(x) // 2, []
    for _ in range(m):
        near = _ball(x, 100 * n // 1024, g)
        kept.append(x[near])
        x = x[~near]
    return torch.cat([*kept, x[torch.randint(len(x), (n - sum(map(len, kept)),), generator=g)]])


def _rotate(x, c, g):
    for axis, angle in enumerate(_signed(c, 2.5, 3, g) * math.pi / 180):
        sine, turn = angle.sin() * (-1) ** axis, torch.eye(3, dtype=torch.float64)
        i, j = [k for k in range(3) if k != axis]
        turn[i, i] = turn[j, j] = angle.cos()
        turn[i, j], turn[j, i] = -sine, sine
        x = x @ turn
    return x


def _shear(x, c, g):
    b, d, e, f = _signed(c, 0.05, 4, g)
    return x @ torch.tensor([[1, 0, b], [d, 1, e], [f, 0, 1]], dtype=torch.float64)


def bernstein(t: Tensor, degree: int) -> Tensor:
    """(.., degree + 1): binom(degree, i) t^i (1 - t)^(degree - i); they sum to 1."""
    i = torch.arange(degree + 1, dtype=t.dtype)
    choose = torch.tensor([math.comb(degree, k) for k in range(degree + 1)], dtype=t.dtype)
    return choose * t[..., None] ** i * (1 - t[..., None]) ** (degree - i)


def _distortion(x, c, g):
    move = _uniform((5, 5, 5, 3), g, -c, c)
    a, b, d = bernstein((x + 1) / 2, 4).unbind(-2)                      # (N, 5) an axis
    inside = (x.abs() <= 1).all(-1, keepdim=True)                       # outside the lattice nothing moves
    return x + 2 * torch.einsum("ni,nj,nk,ijkc->nc", a, b, d, move) * inside


def rbf(x, control, moved, basis) -> Tensor:
    """The map w . basis(|x - control|) + affine that takes each control point to where it is moved."""
    n, ones = len(control), torch.ones(len(control), 1, dtype=x.dtype)
    affine, zero = torch.cat([ones, control], 1), torch.zeros(4, 4, dtype=x.dtype)
    exact = dict(compute_mode="donot_use_mm_for_euclid_dist")
    system = torch.cat([torch.cat([basis(torch.cdist(control, control, **exact)), affine], 1),
                        torch.cat([affine.T, zero], 1)])
    w = torch.linalg.solve(system, torch.cat([moved, torch.zeros(4, 3, dtype=x.dtype)]))
    return basis(torch.cdist(x, control, **exact)) @ w[:n] + w[n] + x @ w[n + 1:]


def _rbf(x, c, g, power):
    axis = torch.linspace(-1, 1, 5, dtype=torch.float64)
    control = torch.cartesian_prod(axis, axis, axis)
    alpha, gamma = _uniform((2, 125), g, -math.pi, math.pi)
    step = c * torch.stack([alpha.cos() * gamma.sin(), alpha.sin() * gamma.sin(), gamma.cos()], -1)
    return rbf(x, control, control + step, lambda r: (r.square() + 0.25) ** power)


CORRUPTIONS = {                                                         # five constants, and what is done with one
    "uniform": ((0.01, 0.02, 0.03, 0.04, 0.05), lambda x, c, g: x + _uniform(x.shape, g, -c, c)),
    "gaussian": ((0.01, 0.015, 0.02, 0.025, 0.03), lambda x, c, g: (
        x + c * torch.randn(x.shape, generator=g, dtype=x.dtype)).clamp(-1, 1)),
    "impulse": ((30, 25, 20, 15, 10), lambda x, k, g: x.index_add(
        0, _some(len(x), len(x) // k, g), 0.1 - 0.2 * torch.randint(2, (len(x) // k, 3), generator=g).to(x.dtype))),
    "upsampling": ((5, 4, 3, 2, 1), lambda x, k, g: torch.cat(
        [x, x[_some(len(x), len(x) // k, g)] + _uniform((len(x) // k, 3), g, -0.05, 0.05)])),
    "background": ((45, 40, 35, 30, 20), lambda x, k, g: torch.cat([x, _uniform((len(x) // k, 3), g, -1, 1)])),
    "cutout": ((2, 3, 5, 7, 10), _cutout),
    "density": ((1, 2, 3, 4, 5), _density),
    "density_inc": ((1, 2, 3, 4, 5), _density_inc),
    "rotation": ((2.5, 5, 7.5, 10, 15), _rotate),
    "shear": ((0.05, 0.1, 0.15, 0.2, 0.25), _shear),
    "distortion": ((0.1, 0.2, 0.3, 0.4, 0.5), _distortion),
    "distortion_rbf": ((0.025, 0.05, 0.075, 0.1, 0.125), lambda x, c, g: _rbf(x, c, g, 0.5)),
    "distortion_rbf_inv": ((0.025, 0.05, 0.075, 0.1, 0.125), lambda x, c, g: _rbf(x, c, g, -0.5)),
}


def corrupt(x: Tensor, name: str, severity: int, generator=None, scaled: bool = True) -> Tensor:
    """A new cloud: x (N, 3) in the box, corrupted; of x's dtype, drawn in float64. density_inc halves the points.

    scaled: then brought back to the box, where the published generator does so. ValueError for what it cannot take.
    """
    if name not in CORRUPTIONS or severity not in range(6):
        raise ValueError(f"corruptions are {', '.join(CORRUPTIONS)}, severities 0 to 5; got {name} {severity}")
    check(x)
    if severity == 0:
        return x.clone()
    constants, function = CORRUPTIONS[name]
    out = function(x.detach().cpu().double(), constants[severity - 1], generator)
    return (out if not scaled or name in ("gaussian", "cutout", "density", "density_inc") else normalize(out)).to(x)


# ---- the data set

class Clouds:
    """Clouds of training and held-out surfaces. Test clouds come from `seed` alone, batches from the global generator.

    POOL points of each training surface are drawn once; a batch takes some of them, turns them and scales them."""
    shape, classes, POOL = (3,), None, 8192

    def __init__(self, name: str, train: list[Surface], test: list[Surface], seed: int = 0):
        self.name, self.train, self.surfaces, self.seed = name, train, test, seed

    @functools.cached_property
    def pool(self) -> Tensor:
        g = torch.Generator().manual_seed(self.seed)
        return torch.stack([surface.sample(self.POOL, g).float() for surface in self.train])

    def batches(self, batch: int, points: int, device="cpu", noise: str = "gaussian"):
        """Endless (noisy, clean), each (batch, points, 3) float32, point by point.

        gaussian: a standard deviation of U(0.005, 0.03) a cloud. background: the same, and up to points // 20 points
        anywhere in the box, whose clean partner is the nearest clean point. ValueError for another name."""
        if noise not in ("gaussian", "background") or not 2 <= points <= self.POOL:
            raise ValueError(f"pairs are of gaussian or background noise on 2 to {self.POOL} points; got {noise}, "
                             f"{points}")
        pool = self.pool.to(device)
        draw, normal = (functools.partial(f, dtype=pool.dtype, device=device) for f in (torch.rand, torch.randn))
        while True:
            which = torch.randint(len(pool), (batch, 1), device=device)
            first, stride = torch.randint(self.POOL, (2, batch, 1), device=device)
            at = first + (2 * stride + 1) * torch.arange(points, device=device)     # an odd stride: all are distinct
            q, r = torch.linalg.qr(normal(batch, 3, 3))
            q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]                          # mirrored ones too
            clean = normalize(pool[which, at % self.POOL] @ q)
            noisy = clean + (0.005 + 0.025 * draw(batch, 1, 1)) * normal(clean.shape)
            if noise == "background" and (most := points // 20):
                stray = 2 * draw(batch, most, 3) - 1                                    # rows are in random order
                stray = stray.where(draw(batch, most, 1) < draw(batch, 1, 1), noisy[:, :most])
                partner = torch.cdist(stray, clean).argmin(-1)
                moved = (stray != noisy[:, :most]).any(-1, keepdim=True)
                target = clean.gather(1, partner[..., None].expand(-1, -1, 3)).where(moved, clean[:, :most])
                noisy, clean = torch.cat([stray, noisy[:, most:]], 1), torch.cat([target, clean[:, most:]], 1)
            yield noisy, clean

    def clean(self, n: int, points: int, seed: int = 0) -> Tensor:
        """(n, points, 3) float32: clouds of the held-out surfaces, the k-th of surface k modulo their number."""
        if n < 1 or points < 2:
            raise ValueError(f"one cloud or more of two points or more is wanted; got {n} of {points}")
        g = torch.Generator().manual_seed(1_000_003 * self.seed + seed + 1)
        return torch.stack([self.surfaces[k % len(self.surfaces)].sample(points, g).float() for k in range(n)])

    def test(self, n: int, points: int, corruption: str, severity: int) -> tuple[Tensor, Tensor]:
        """(noisy (n, M, 3), clean (n, points, 3)), float32, in the frame of the surfaces (scaled=False)."""
        pool = self.clean(n, 2 * points)
        g = torch.Generator().manual_seed(1_000_003 * self.seed)
        given = pool if corruption == "density_inc" and severity else pool[:, :points]
        return torch.stack([corrupt(x, corruption, severity, g, scaled=False) for x in given]), pool[:, :points]

    def distance(self, x) -> list[Tensor]:
        """For each cloud of x, (n, M, 3) or a list of (M, 3): distances (M,) to the held-out surface it came from."""
        return [self.surfaces[k % len(self.surfaces)].distance(cloud.detach().cpu().double())
                for k, cloud in enumerate(x)]


def load(name: str, data_dir=None, seed: int = 0, train: int = 240, test: int = 40) -> Clouds:
    """`shapes3d`, drawn, each kind as often; or `modelnet`: every .off and .ply under data_dir/modelnet.

    Meshes in a folder called test are held out, or the last sixth after a seeded shuffle if there is no such folder.
    ValueError or FileNotFoundError in one sentence for meshes that are missing, corrupt or without an area.
    """
    g, names = torch.Generator().manual_seed(seed), list(SHAPES)
    if name == "shapes3d":
        drawn = [draw(names[k % len(names)], g) for k in range(train + test)]
        return Clouds(name, drawn[:train], drawn[train:], seed)
    folder = pathlib.Path(data_dir or "~/.cache/dgm").expanduser() / name
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".off", ".ply"))
    if len(paths) < 2:
        raise FileNotFoundError(f"{folder}: two meshes (.off, .ply) or more are wanted, found {len(paths)}; say where "
                                f"{name} lies with --data-dir")
    held = [p for p in paths if "test" in p.relative_to(folder).parts]
    if not held or len(held) == len(paths):
        order = [paths[k] for k in torch.randperm(len(paths), generator=g)]
        held = order[-max(1, len(paths) // 6):]
    return Clouds(name, [read(p) for p in paths if p not in {*held}], [read(p) for p in held], seed)


def read(path) -> Surface:
    """The mesh of a file as a surface in the box."""
    mesh = formats.read_mesh(path)
    try:
        return fitted(Mesh(*mesh))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


# ---- classical denoisers


def _neighbours(x, k) -> tuple[Tensor, Tensor]:
    """Distances and indices (N, k) of the k nearest others of each point, fewer if there are fewer."""
    k = min(k, len(x) - 1)
    parts = [torch.cdist(rows, x).topk(k + 1, largest=False) for rows in x.split(max(1, 2**22 // len(x)))]
    return tuple(torch.cat([part[i] for part in parts])[:, 1:] for i in (0, 1))


def smooth(x, k: int = 8) -> list[Tensor]:
    """Each point becomes the mean of itself and its k nearest others."""
    return [(cloud + cloud[_neighbours(check(cloud), k)[1]].sum(1)) / (1 + min(k, len(cloud) - 1)) for cloud in x]


def flatten(x, k: int = 16) -> list[Tensor]:
    """Each point moved straight onto the plane that fits itself and its k nearest others best."""
    out = []
    for cloud in x:
        near = torch.cat([cloud[:, None], cloud[_neighbours(check(cloud), k)[1]]], 1)
        mean = near.mean(1, keepdim=True)
        normal = torch.linalg.eigh((near - mean).mT @ (near - mean))[1][..., :1]
        out.append(cloud + ((mean - cloud[:, None]) @ normal @ normal.mT)[:, 0])
    return out


def remove_outliers(x, k: int = 16, ratio: float = 2.0) -> list[Tensor]:
    """Without the points whose mean distance to their k nearest others is above mean + ratio std of the cloud. [4]"""
    spread = [_neighbours(check(cloud), k)[0].mean(1) for cloud in x]
    return [cloud[s <= s.mean() + ratio * s.std(correction=0)] for cloud, s in zip(x, spread)]


# ---- how far


def chamfer(x, y) -> Tensor:
    """(B,): mean squared distance to the nearest point, both directions summed. x, y: (B, N, 3), or lists of (N, 3)."""
    import kernels

    if len(x) != len(y):
        raise ValueError(f"as many clouds are wanted on both sides; got {len(x)} and {len(y)}")
    lengths = [torch.tensor([len(check(cloud, 1)) for cloud in clouds]) for clouds in (x, y)]
    x, y = (torch.nn.utils.rnn.pad_sequence(list(clouds), batch_first=True) for clouds in (x, y))
    return kernels.chamfer_distance(x, y, *lengths)


def report(denoise, truth: Clouds, folder=None, corruptions=("gaussian", "background"), severities=(1, 3, 5),
           n: int = 16, points: int = 1024, device="cpu", shown: int = 4) -> dict[str, dict]:
    """{name: metric} of a denoiser, (B, N, 3) -> (B, N, 3), for each corruption and severity; clouds-*.png in folder.

    chamfer_NAME_SEVERITY is the denoiser's, with _noisy, _knn (smooth), _plane (flatten) and _outliers
    (remove_outliers) beside it: to the clean cloud, mean over clouds, in squared units of half the box. Its floor is
    that of the noisy cloud moved exactly onto its surface. surface_... is the mean distance to the surface, floor 0.
    """
    from metrics import clouds_picture, metric

    out = {}
    for corruption in corruptions:
        for severity in severities:
            noisy, clean = truth.test(n, points, corruption, severity)
            with torch.no_grad():
                ours = torch.cat([denoise(part.to(device)).cpu() for part in noisy.split(8)])
            ways = {"": ours, "_noisy": noisy, "_knn": smooth(noisy), "_plane": flatten(noisy),
                    "_outliers": remove_outliers(noisy)}
            best = [project(x, truth.surfaces[k % len(truth.surfaces)]) for k, x in enumerate(noisy)]
            floor, key = chamfer(best, clean).mean(), f"{corruption}_{severity}"
            far = {way: truth.distance(clouds) for way, clouds in ways.items()}
            for way, clouds in ways.items():
                out[f"chamfer_{key}{way}"] = metric(chamfer(clouds, clean).mean(), floor, "squared")
                out[f"surface_{key}{way}"] = metric(sum(d.mean() for d in far[way]) / n, 0.0, "half box")
            if folder is not None:
                rows = [("clean", clean, [torch.zeros(points)] * n)] + [
                    (title, ways[way], far[way]) for title, way in
                    (("noisy", "_noisy"), ("denoised", ""), ("kNN mean", "_knn"), ("onto planes", "_plane"),
                     ("outliers removed", "_outliers"))]
                clouds_picture(pathlib.Path(folder) / f"clouds-{corruption}-{severity}.png", rows, min(shown, n))
    return out
