"""Energy-based models: an energy, low where data is likely, and a sampler that walks downhill with noise.

    p(x) = exp(-E(x)) / Z,    d/dtheta E_data[-log p] = E_data[dE/dtheta] - E_p[dE/dtheta]        [1] (1), (2)
    x' = x - eta grad E(x) + sqrt(2 eta T) z,   z ~ N(0, I):   p^(1/T) as eta -> 0                 Langevin, [2]

Chains are kept from step to step [3] in a replay buffer [4], and some start anew. In the plane a start is a Metropolis
proposal: uniform noise takes a chain's place with probability min(1, exp(E(x) - E(noise))), so that each mode gets its
due share of the chains. Images have too many dimensions for that: a share of them is replaced outright [4].

`--model`, all around one network of logits f(x):
  ebm        E(x) = -f(x), one logit [4]
  cond       E(x, y) = -f_y(x): a density of x for each class, chains that keep their class [4]
  jem        E(x) = -log sum_y exp f_y(x), so p(y | x) is the softmax: a classifier that is a density too [1]
  jem++      jem; chains start from Gaussians fitted to the classes, take clipped steps, and use the gradient behind the
             first layer for several of them [5]

References
  [1] Grathwohl et al., Your Classifier is Secretly an Energy Based Model, arXiv 1912.03263
  [2] Welling, Teh, Bayesian Learning via Stochastic Gradient Langevin Dynamics, ICML 2011, whose epsilon is 2 eta
  [3] Tieleman, Training Restricted Boltzmann Machines using Approximations to the Likelihood Gradient, ICML 2008
  [4] Du, Mordatch, Implicit Generation and Generalization in Energy-Based Models, arXiv 1903.08689
  [5] Yang, Ji, JEM++: Improved Techniques for Training JEM, arXiv 2109.09032
  [6] Neal, MCMC using Hamiltonian dynamics, arXiv 1206.1901     [7] Neal, Annealed Importance Sampling, physics/9803008

Glossary
  paper        code            shape        meaning
  f(x)[y]      logits          (B, C)       -E(x, y);  E(x) = -logsumexp over y
  eta, T       step, temperature            of Langevin; noise = sqrt(2 eta T), unless --noise says otherwise
  B, rho       buffer, reinit  (M, *shape)  the chains that are kept; share started anew
  M, N         chain, inner                 gradients of the whole network a draw; steps taken with each [5]

Use
  python ebm.py --dataset gmm                          exact KL by quadrature; --model jem: and a classifier
  python ebm.py --model jem --dataset mnist            or persian, hoda; --model cond, jem++

Not included: score matching, noise-contrastive estimation, batch normalisation, chains spread over processes.
"""

import copy
import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- maths: energies


def energy_of(logits: Tensor, y: Tensor | None = None) -> Tensor:
    """(B, C) -> E(x) = -log sum_y exp f_y (B,), or E(x, y) = -f_y for classes y (B,). [1] (5), (7)"""
    return -logits.logsumexp(1) if y is None else -logits.gather(1, y[:, None])[:, 0]


def log_z(energy, half_width: float = 6.0, cells: int = 480, device="cpu") -> float:
    """log of the integral of exp(-E) over [-half_width, half_width]^2 by the midpoint rule; energy: (N, 2) -> (N,)."""
    axis = (torch.arange(cells, device=device) + 0.5) * (2 * half_width / cells) - half_width
    rows = torch.cartesian_prod(axis, axis).split(2**15)
    values = torch.cat([-energy(part).double() for part in rows])
    return float(values.logsumexp(0)) + 2 * math.log(2 * half_width / cells)


def gradient(energy, x: Tensor) -> Tensor:
    """dE/dx, as x. No parameter's .grad is touched."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(energy(x).sum(), x)[0]


# ---- maths: one step of a chain


def sgld_step(x: Tensor, g: Tensor, step: float, noise: float, z: Tensor, clip=None, bound=None) -> Tensor:
    """x - step g + noise z, with g clipped to [-clip, clip] (proximal: no coordinate descends more than step clip, [5])
    and the result kept in [-bound, bound]."""
    x = torch.sub(x, g if clip is None else g.clamp(-clip, clip), alpha=step).add_(z, alpha=noise)
    return x if bound is None else x.clamp_(-bound, bound)


def effective_temperature(step: float, noise: float) -> float:
    """T of x' = x - step grad E + noise z: such a chain samples exp(-E / T), whatever it was called."""
    return noise**2 / (2 * step)


def annealed(first: float, last: float, n: int) -> Tensor:
    """(n,) float64 from first to last, each a constant ratio to the one before; one value is the last."""
    return last * (first / last) ** torch.linspace(1 if n > 1 else 0, 0, n, dtype=torch.float64)


def metropolis(x: Tensor, e: Tensor, proposal: Tensor, e_new: Tensor, u: Tensor, log_ratio=0.0):
    """(x, E, accepted): each proposal is taken with probability min(1, exp(E(x) - E(proposal) + log_ratio)); u uniform
    (B,); log_ratio: log q(x | proposal) - log q(proposal | x)."""
    take = u.log() < e - e_new + log_ratio
    return torch.where(take.view(-1, *[1] * (x.ndim - 1)), proposal, x), torch.where(take, e_new, e), take


def mala_step(energy, x: Tensor, step: float, z: Tensor, u: Tensor):
    """A Langevin step, accepted or refused: exact for any step. Returns x and who moved (B,). Roberts, Tweedie 1996"""
    g = gradient(energy, x)
    y = x - step * g + math.sqrt(2 * step) * z
    back = x - y + step * gradient(energy, y)               # what the noise of the way back would have to be
    log_ratio = (2 * step * z.square() - back.square()).flatten(1).sum(1) / (4 * step)
    x, _, moved = metropolis(x, energy(x), y, energy(y), u, log_ratio)
    return x, moved


def leapfrog(energy, x: Tensor, p: Tensor, step: float, leaps: int) -> tuple[Tensor, Tensor]:
    """Hamiltonian dynamics of E(x) + |p|^2 / 2: reversible, keeps volume, and the sum to second order. [6] 2.3"""
    p = p - step / 2 * gradient(energy, x)
    for k in range(leaps):
        x = x + step * p
        p = p - (step if k < leaps - 1 else step / 2) * gradient(energy, x)
    return x, p


def hmc_step(energy, x: Tensor, step: float, leaps: int, p: Tensor, u: Tensor):
    """Leaps with a fresh momentum p ~ N(0, I), accepted or refused. Returns x and who moved (B,). [6] 3.2"""
    y, q = leapfrog(energy, x, p, step, leaps)
    kinetic = (p.square() - q.square()).flatten(1).sum(1) / 2
    x, _, moved = metropolis(x, energy(x), y, energy(y), u, kinetic)
    return x, moved


def ais(energy, n: int, shape, betas: Tensor, scale: float = 1.0, step: float = 0.1, leaps: int = 5, device="cpu"):
    """(n,) log weights whose mean exponential is Z without bias: from N(0, scale^2 I), energy E_0, over the energies
    (1 - b) E_0 + b E for b in betas (0 .. 1), an HMC step at each. [7]"""
    x, dims = scale * torch.randn(n, *shape, device=device), math.prod(shape)
    prior = lambda x: (x / scale).square().flatten(1).sum(1) / 2
    log_w = torch.full((n,), dims / 2 * math.log(2 * math.pi * scale**2), dtype=torch.float64, device=device)
    for b_0, b in zip(betas.tolist(), betas[1:].tolist()):
        log_w += (b - b_0) * (prior(x) - energy(x)).double()
        between = lambda x, b=b: (1 - b) * prior(x) + b * energy(x)
        x, _ = hmc_step(between, x, step, leaps, torch.randn_like(x), torch.rand(n, device=device))
    return log_w


def fit_gaussians(x: Tensor, y: Tensor, classes: int, rank: int = 64, rows: int = 1000) -> tuple[Tensor, Tensor]:
    """Mean (C, d) and factor (C, r, d) of each class: its covariance is factor^T factor in the r widest directions, and
    1e-4 I for the rest. [5] keeps whole covariances."""
    means, factors = [], []
    for k in range(classes):
        part = x[y == k][:rows].flatten(1)
        if len(part) < 2:
            raise ValueError(f"class {k} has {len(part)} examples: a Gaussian needs two")
        _, s, v = torch.linalg.svd(part - part.mean(0), full_matrices=False)
        factor = (s[:, None] * v)[:rank] / math.sqrt(len(part) - 1)
        means.append(part.mean(0))
        factors.append(F.pad(factor, (0, 0, 0, min(rank, part.shape[1]) - len(factor))))
    return torch.stack(means), torch.stack(factors)


def draw_gaussians(means: Tensor, factors: Tensor, y: Tensor, z: Tensor, e: Tensor) -> Tensor:
    """(B, d) from the Gaussians of the classes y (B,), for normals z (B, r) and e (B, d)."""
    return means[y] + torch.einsum("br,brd->bd", z, factors[y]) + 1e-2 * e


def trouble(gap: float, spread: float, kl: float | None = None, before: float = math.inf) -> str:
    """What is wrong with a model whose data and chains differ by `gap` = E(data) - E(chains) in the mean, where the
    energies of data have the standard deviation `spread`; kl: its exact KL(p || p_theta) where that is known, and
    `before` what it was untrained. "" if nothing is: a small gap alone does not say that a model is good."""
    if not (abs(gap) <= 5 * spread + 1 and (kl is None or kl <= before and kl < math.inf)):
        return (f"diverged: E(data) - E(chains) is {gap:.3g} where the energies of data spread by {spread:.3g}"
                + ("" if kl is None else f", and the exact KL is {kl:.3g} nats")
                + "; a lower --step or --lr, or a larger --l2, may help")
    if kl is not None and kl > 0.1 and abs(gap) < 0.5 * spread:
        return f"stuck: E(data) - E(chains) is {gap:.2g}, as if all were well, and the exact KL is {kl:.2g} nats"
    return ""


# ---- the hot loops in plain PyTorch; kernels/ holds the fused ones


def langevin_chain_plain(x, network, coefficients, seed, y=None, first=0, base=0.0, clip=None, bound=None):
    """Rows [step, noise] of coefficients (S, 2), under base |x|^2 / 2 + energy_of(mlp_plain(x, *network))."""
    generator = torch.Generator(x.device).manual_seed((seed + first) % 2**63)
    network = [w.detach() for w in network]
    energy = lambda x: base / 2 * x.square().sum(1) + energy_of(mlp_plain(x, *network), y)
    for step, noise in coefficients.tolist():
        z = torch.empty_like(x).normal_(generator=generator)
        x = sgld_step(x, gradient(energy, x), step, noise, z, clip, bound)
    return x


def langevin_step_plain(x, g, step, noise, seed, number, clip=None, bound=None):
    z = torch.empty_like(x).normal_(generator=torch.Generator(x.device).manual_seed((seed + number) % 2**63))
    return sgld_step(x, g, step, noise, z, clip, bound)


def fused(name, plain):
    """kernels.<name> where this repository's kernels/ is importable, else `plain`; a broken kernels/ raises."""
    try:
        import kernels
    except ModuleNotFoundError as e:
        if e.name != "kernels":
            raise
        return plain
    return getattr(kernels, name, plain)


# ---- networks: logits (B, C)


def mlp_plain(x, frequencies, phases, w_in, b_in, w_hidden, b_hidden, w_out, b_out):
    """Layers of silu over x (B, D) beside sines of it: sin(x F + phase), F (D, E)."""
    h = F.silu(F.linear(torch.cat([x, torch.sin(x @ frequencies + phases)], 1), w_in, b_in))
    for w, b in zip(w_hidden, b_hidden):
        h = F.silu(F.linear(h, w, b))
    return F.linear(h, w_out, b_out)


class PointLogits(nn.Module):
    """Points (B, D) -> (B, C). Sines and cosines of 1/2, 3/2, 9/2 times each coordinate: a well of width 0.1 wants the
    last; the first comes again 4 pi away, where `base` holds it: 2 pi away a copy of the data would hold mass."""

    def __init__(self, dim: int, classes: int, width: int = 128, depth: int = 2, waves: int = 3):
        super().__init__()
        k = 0.5 * 3.0 ** torch.arange(waves)
        self.register_buffer("frequencies", torch.kron(torch.eye(dim), k.repeat(2)[None]))        # (D, 2 D waves)
        self.register_buffer("phases", torch.tensor([0, math.pi / 2]).repeat_interleave(waves).repeat(dim))
        uniform = lambda *shape: nn.Parameter((2 * torch.rand(shape) - 1) / shape[-1] ** 0.5)
        zeros = lambda *shape: nn.Parameter(torch.zeros(shape))
        self.w_in, self.b_in = uniform(width, dim + len(self.phases)), zeros(width)
        self.w_hidden, self.b_hidden = uniform(depth, width, width), zeros(depth, width)
        self.w_out, self.b_out = uniform(classes, width), zeros(classes)

    def weights(self) -> list[Tensor]:
        """In the order of mlp_plain and of kernels.langevin_chain."""
        return [self.frequencies, self.phases, self.w_in, self.b_in, self.w_hidden, self.b_hidden, self.w_out,
                self.b_out]

    def forward(self, x: Tensor) -> Tensor:
        return mlp_plain(x, *self.weights())


class ImageLogits(nn.Module):
    """Images (B, C, H, W) -> (B, classes). Silu and no normalisation: a slope everywhere, and no chain feels another.
    Pixels are folded 2x2 into channels first: on a CPU half the time. `first` is one layer, `rest` all others."""

    def __init__(self, shape, classes: int, width: int = 16):
        super().__init__()
        half = lambda n: (n + 1) // 2
        sides, c, layers = [half(half(n)) for n in shape[1:]], 2 * width, []
        while min(sides) > 4:
            layers += [nn.Conv2d(c, 4 * width, 3, 2, 1), nn.SiLU()]
            sides, c = [half(n) for n in sides], 4 * width
        self.odd = [n % 2 for n in shape[1:]]
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * shape[0], 2 * width, 3, 2, 1), nn.SiLU())
        self.rest = nn.Sequential(*layers, nn.Flatten(), nn.Linear(c * math.prod(sides), 4 * width), nn.SiLU(),
                                  nn.Linear(4 * width, classes))

    def first(self, x: Tensor) -> Tensor:
        return self.stem(F.pad(x, (0, self.odd[1], 0, self.odd[0]), mode="replicate") if any(self.odd) else x)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))


# ---- the family: an energy and a sampler


class ReplayBuffer(nn.Module):
    """Chains (M, *shape) that go on where they were left; the slots of each class are a block of their own."""

    def __init__(self, chains: Tensor, classes: int = 1):
        super().__init__()
        self.classes, self.size = classes, len(chains) // classes
        self.register_buffer("chains", chains[: classes * self.size].clone())

    def draw(self, y: Tensor) -> Tensor:
        """Slots (B,) for chains of the classes y (B,), none twice."""
        order = torch.rand(self.classes, self.size, device=y.device).argsort(1)
        rank = (F.one_hot(y, self.classes).cumsum(0).gather(1, y[:, None]) - 1)[:, 0]     # the how-manieth of its class
        if int(rank.max()) >= self.size:
            raise ValueError(f"a batch wants {int(rank.max()) + 1} chains of a class and the buffer has {self.size}: "
                             "take a larger --buffer or a smaller --batch")
        return y * self.size + order[y, rank]


class EBM(nn.Module):
    """`energy(x, y)`, `loss(batch)`, `sample(n)`. A batch is (x, y), or (x,) without labels; x (B, *shape), images in
    [-1, 1]. The options are those of main()."""

    labels, conditional, start = False, False, "noise"
    share, limit, steps = slice(None), 0.0, 300             # rows that count here; of the gradient; of a fresh chain

    def __init__(self, shape, classes: int = 1, width: int = 128, depth: int = 2, waves: int = 3, channels: int = 16,
                 step: float = 1e-3, temperature: float = 1.0, noise: float = 0.0, chain: int = 5, inner: int = 1,
                 buffer: int = 1024, reinit: float = 0.0, jumps: int = 4, init: str = "", clip: float = 0.0,
                 base: float = 0.25, l2: float = 0.0, data_noise: float = 0.0):
        super().__init__()
        self.shape, self.points = tuple(shape), len(shape) == 1
        self.classes = classes if self.labels else 1
        self.step, self.noise = step, noise or math.sqrt(2 * step * temperature)
        self.temperature = effective_temperature(step, self.noise)
        self.chain, self.inner, self.reinit, self.jumps = chain, inner, reinit, jumps if self.points else 0
        self.init, self.clip, self.base = init or self.start, clip or None, base
        self.l2, self.data_noise = l2, data_noise
        self.bound = 3.0 if self.points else 1.0
        self.network = (PointLogits(shape[0], self.classes, width, depth, waves) if self.points
                        else ImageLogits(shape, self.classes, channels))
        if self.init == "gaussians":
            d = math.prod(shape)
            self.register_buffer("means", torch.zeros(self.classes, d))
            self.register_buffer("factors", torch.zeros(self.classes, min(64, d), d))
        self.buffer = ReplayBuffer(self.uniform(buffer), self.classes if self.conditional else 1)

    # -- the energy

    def energy(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """E(x) (B,), or E(x, y); points outside the data are held by base |x|^2 / 2."""
        e = energy_of(self.network(x), y)
        return e + self.base / 2 * x.square().sum(1) if self.points else e

    # -- the sampler

    def uniform(self, n: int, like: Tensor | None = None) -> Tensor:
        return (2 * torch.rand(n, *self.shape, device=None if like is None else like.device) - 1) * self.bound

    def fresh(self, y: Tensor, data: Tensor | None = None) -> Tensor:
        """Where chains of the classes y (B,) start: noise, data, or a Gaussian of their class."""
        if self.init == "data" and data is not None:
            return data[torch.randint(len(data), (len(y),), device=y.device)]
        if self.init == "gaussians":
            y = y if self.conditional else torch.randint(self.classes, (len(y),), device=y.device)
            z = [torch.randn(len(y), k, device=y.device) for k in self.factors.shape[1:]]
            x = draw_gaussians(self.means, self.factors, y, *z)
            return x.view(-1, *self.shape).clamp(-self.bound, self.bound)
        return self.uniform(len(y), y)

    @torch.no_grad()
    def jump(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Uniform proposals, each taken or refused by Metropolis at the temperature of the chain."""
        e = self.energy(x, y) / self.temperature
        for _ in range(self.jumps):
            proposal = self.uniform(len(x), x)
            e_new = self.energy(proposal, y) / self.temperature
            x, e, _ = metropolis(x, e, proposal, e_new, torch.rand(len(x), device=x.device))
        return x

    def walk(self, x: Tensor, y: Tensor | None, noises: Tensor) -> Tensor:
        """One Langevin step with each of the noises (S,)."""
        table = torch.stack([torch.full_like(noises, self.step), noises], 1).to(x.dtype)
        seed, limits = int(torch.randint(2**62, ())), {"clip": self.clip, "bound": self.bound}
        if self.points:
            chain = fused("langevin_chain", langevin_chain_plain)
            with torch.no_grad():
                return chain(x, self.network.weights(), table, seed, y, base=self.base, **limits)
        plain, x = langevin_step_plain, x.detach()
        update = fused("langevin_step", plain) if x.is_cuda else plain  # of normals: a CPU has torch's for less
        for k, (step, noise) in enumerate(table.tolist()):
            if k % self.inner == 0 and self.inner > 1:      # the gradient behind the first layer, for `inner` steps
                with torch.no_grad():
                    h = self.network.first(x)
                behind = gradient(lambda h: energy_of(self.network.rest(h), y), h)
            g = (gradient(lambda x: energy_of(self.network(x), y), x) if self.inner == 1
                 else gradient(lambda x, behind=behind: behind * self.network.first(x), x))
            with torch.no_grad():
                x = update(x, g, step, noise, seed, k, **limits)
        return x

    def negatives(self, n: int, y: Tensor, data: Tensor) -> Tensor:
        """n chains of the buffer, a share of them started anew, `chain` gradients further; written back."""
        slots = self.buffer.draw(y)
        x = self.buffer.chains[slots]
        anew = torch.rand(n, device=x.device) < self.reinit
        x = torch.where(anew.view(-1, *[1] * (x.ndim - 1)), self.fresh(y, data), x)
        labels = y if self.conditional else None
        x = self.jump(x, labels) if self.jumps else x
        x = self.walk(x, labels, torch.full((self.chain * self.inner,), self.noise))
        self.buffer.chains[slots] = x
        return x

    @torch.no_grad()
    def sample(self, n: int, steps: int, y=None, x=None, hot: float = 1.0, parts: int = 1):
        """A generator of parts + 1 states (n, *shape) of chains: fresh ones unless x is given, of the classes y (n,) if
        given. The noise falls exponentially from `hot` times its size. In the plane they jump, every `chain` steps."""
        start = torch.zeros(n, dtype=torch.long, device=self.buffer.chains.device) if y is None else y
        x = self.fresh(start) if x is None else x
        noises, k = annealed(hot * self.noise, self.noise, steps), 0
        yield x
        for part in range(1, parts + 1):
            while k < round(part * steps / parts):
                stop = min(k + self.chain * self.inner, round(part * steps / parts))
                x = self.jump(x, y) if self.jumps else x
                x, k = self.walk(x, y, noises[k:stop]), stop
            yield x

    # -- the loss

    def loss(self, batch, share: slice = slice(None)) -> dict[str, Tensor]:
        """Its gradient is that of -log p. The chains of all processes are walked by each, its `share` counted."""
        x, y = batch if self.labels else (*batch, None)
        slots = y if self.conditional else torch.zeros(len(x), dtype=torch.long, device=x.device)
        fake = self.negatives(len(x), slots, x)[share]
        x, y = x[share], None if y is None else y[share]
        x = x + self.data_noise * torch.randn_like(x) if self.data_noise else x
        logits = self.network(torch.cat([x, fake]))
        real_logits = logits[: len(x)]
        labels = y.repeat(2) if self.conditional else None
        held = self.base / 2 * torch.cat([x, fake]).square().sum(1) if self.points else 0
        e, e_fake = (energy_of(logits, labels) + held).chunk(2)
        gap, spread = e.mean() - e_fake.mean(), e.std()
        loss = gap + self.l2 * (e.square().mean() + e_fake.square().mean()) if self.l2 else gap         # [4]
        row = {"loss": loss, "gap": gap, "spread": spread, "energy": e.mean()}
        return self.extra(row, real_logits, y)

    def extra(self, row, logits, y):
        return row


class Conditional(EBM):
    labels, conditional = True, True

    def of_class(self, y: Tensor) -> Tensor:
        """Fresh chains of the classes y (B,)."""
        *_, x = self.sample(len(y), self.steps, y)
        return x


class JEM(Conditional):
    """log p(x, y) = log p(x) + log p(y | x): the second term is cross-entropy, and exact. [1] (8)"""

    conditional = False

    def extra(self, row, logits, y):
        entropy = F.cross_entropy(logits, y)
        right = (logits.argmax(1) == y).to(logits.dtype).mean()
        return row | {"loss": row["loss"] + entropy, "cross_entropy": entropy, "train_accuracy": right}


class JEMPlus(JEM):
    start = "gaussians"


MODELS = {"ebm": EBM, "cond": Conditional, "jem": JEM, "jem++": JEMPlus}


def train(model: EBM, average: EBM, optimizer, batches, steps: int, lr: float, start: int = 0, decay: float = 0.99):
    """Persistent contrastive divergence [3], with a warm-up, a cosine to zero and a moving average of the weights to be
    sampled; the chains follow the weights themselves."""
    weights, averages = list(model.network.parameters()), list(average.network.parameters())
    batches = (batch if isinstance(batch, (tuple, list)) else (batch,) for batch in batches)
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        row = model.loss(next(batches), model.share)
        optimizer.zero_grad()
        row["loss"].backward()
        if model.limit:
            nn.utils.clip_grad_norm_(weights, model.limit)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + step) / (10 + step)))
        yield {name: value.detach() for name, value in row.items()}


def watch(rows, number, start: int, every: int):
    """Rows with one more number: "kl", taken at first and at every so many steps."""
    value = torch.as_tensor(float(number()))
    for step, row in enumerate(rows, start + 1):
        if step % every == 0:
            value = torch.as_tensor(float(number()))
        yield row | {"kl": value}


def compare(model: EBM, truth, n: int, steps: int) -> dict[str, Tensor]:
    """Samples by where chains start and what noise they begin with: {"noise, hot 1": (n, *shape), ...}."""
    kept = model.buffer.chains[torch.randperm(len(model.buffer.chains))[:n]]
    starts = {"noise": model.uniform(n, kept), "data": truth.sample(n).to(kept.device), "buffer": kept}
    if model.init == "gaussians":
        y = torch.randint(model.classes, (n,), device=kept.device)
        starts["gaussians"] = model.fresh(y)
    runs = {f"{name}, hot {hot:g}": list(model.sample(len(x), steps, x=x, hot=hot))[-1].cpu()
            for name, x in starts.items() for hot in (1.0, 10.0)}
    return {f"{name}, as it is": x.cpu() for name, x in starts.items()} | runs


def build(config: dict, shape, classes) -> EBM:
    """The model that the options of a run, or of a checkpoint, describe."""
    member = MODELS[config["model"]]
    if member.labels and not classes:
        raise ValueError(f"{config['model']} learns from labels, and {config['dataset']} has none; use --model ebm")
    if config["init"] == "gaussians" and not member.labels:
        raise ValueError("Gaussians are fitted to classes: --init gaussians is for --model cond, jem and jem++")
    if not (config["step"] > 0 and config["noise"] + config["temperature"] > 0):
        raise ValueError("a chain needs a step and noise: --step, and --temperature or --noise, must be above 0")
    options = {name: config[name] for name in inspect.signature(member).parameters if name in config}
    return member(shape, classes or 1, **options)


def main():
    import time

    import data
    import judges
    import metrics
    import run

    args = run.parse(
        __doc__, MODELS, steps=2000, batch=512, lr=2e-3,
        training={"width": (128, "of the MLP"), "depth": (2, "its hidden layers"), "waves": (3, "frequencies of sines"),
                  "channels": (16, "of the convolutions"), "step": (1e-3, "eta of Langevin"),
                  "temperature": (1.0, "T of the chains: noise = sqrt(2 step T)"),
                  "noise": (0.0, "of a step, whatever T would say; 0: as T says"),
                  "chain": (5, "gradients of the whole network a draw"), "inner": (1, "steps with each, of images [5]"),
                  "buffer": (1024, "chains kept"), "reinit": (0.0, "share of the chains started anew"),
                  "jumps": (4, "Metropolis proposals of noise a draw, for points; 0: none"),
                  "init": ("", "where chains start; default: noise, jem++ gaussians",
                           ["", "noise", "data", "gaussians"]),
                  "clip": (0.0, "of each gradient's coordinate, 0: none"), "l2": (0.0, "weight of squared energies"),
                  "limit": (0.0, "of the norm of the weights' gradient, 0: none"),
                  "data_noise": (0.0, "added to the data"), "base": (0.25, "of base |x|^2 / 2, for points"),
                  "decay": (0.99, "of the average of the weights"), "size": (0, "of images; 0 keeps theirs")},
        sampling={"sample_steps": (300, "of fresh chains"), "hot": (1.0, "their first noise over their last"),
                  "compare": (False, "a table of starts and noise schedules")},
        images={"steps": 3000, "batch": 64, "lr": 2e-3, "step": 10.0, "temperature": 5e-6, "chain": 10, "buffer": 2000,
                "reinit": 0.05, "l2": 0.1, "clip": 0.03, "limit": 1.0, "data_noise": 0.03, "samples": 500,
                "decay": 0.995, "sample_steps": 500, "jem++": {"chain": 5, "inner": 2}})
    with run.Run(args) as job:
        truth = data.load(args.dataset, args.data_dir, size=args.size or None, download=args.download,
                          skip_bad=args.skip_bad)
        points = hasattr(truth, "log_prob")
        model = build(vars(args), truth.shape, truth.classes).to(job.device)
        model.share, model.limit = job.share, args.limit
        print(f"Langevin with step {model.step:g} and noise {model.noise:.3g}: the chains sample exp(-E / T), "
              f"T = {model.temperature:.3g}")
        average = copy.deepcopy(model).requires_grad_(False)
        average.buffer, average.steps, found = model.buffer, args.sample_steps, ""
        cells = math.ceil(12 / getattr(truth, "std", 0.08))

        def kl(energy, law, fine=1, half_width=6.0):        # of energies that are 0 at most 1 - 1e-2 outside: infinite
            z = log_z(energy, half_width + fine - 1, fine * cells, job.device)
            try:
                return metrics.exact_kl(lambda x: -energy(x) - z, law, fine * cells, half_width, job.device)
            except ValueError:
                return math.inf

        if args.ckpt:
            job.restore(average=average)
        else:
            if model.init == "gaussians" and not args.resume:
                source = {} if points else {"split": "train"}
                x, y = truth.sample(10_000, labels=True, **source)
                for name, value in zip(("means", "factors"), fit_gaussians(x, y, model.classes)):
                    getattr(model, name).copy_(value)
                    getattr(average, name).copy_(value)
                y = torch.arange(len(model.buffer.chains), device=job.device) // model.buffer.size
                model.buffer.chains.copy_(model.fresh(y))
            optimizer = torch.optim.Adam(model.parameters(), args.lr, betas=(0.0, 0.999), fused=True)
            start = job.keep(model=model, average=average, optimizer=optimizer)
            batches = truth.batches(args.batch, job.device, labels=model.labels)
            rows = train(model, average, optimizer, batches, args.steps, args.lr, start, args.decay)
            if points and not model.conditional:
                rows = watch(rows, lambda: kl(average.energy, truth), start, max(1, args.steps // 25))
            for step, row in enumerate(job.track(rows), start + 1):
                if step % max(1, args.steps // 20) == 0 and step > args.steps // 4:
                    values = [float(row[name]) for name in ("gap", "spread", "kl") if name in row]
                    now = trouble(*values, **({"before": job.rows[0]["kl"]} if "kl" in row else {}))
                    if now[:5] != found[:5]:
                        print(f"\nstep {step}: {now or 'back on course'}")
                    found = now

        began, seen, n = time.perf_counter(), [], args.samples
        rows, parts = (n, 24) if points else (100, 12)
        for y in (torch.arange(n, device=job.device) % model.classes).split(rows):            # all classes in turn
            states = average.sample(len(y), args.sample_steps, y if model.conditional else None, None, args.hot, parts)
            seen.append([x.cpu() for x in states])
        frames = {f"step {round(k * args.sample_steps / parts)}": x for k, x in enumerate(seen[0])}
        samples, seconds = torch.cat([states[-1] for states in seen]), time.perf_counter() - began
        kept = average.buffer.chains.cpu()
        if points:
            results, samples = job.judge(samples, truth)
            of_buffer = (metrics.klh(x, truth) for x in (kept, truth.sample(len(kept))))
            results["buffer_klh"] = metrics.metric(*of_buffer, "nats")
            if model.conditional:
                of_class = lambda k: lambda x: average.energy(x, torch.full((len(x),), k, device=x.device))
                each = [kl(of_class(k), truth.condition(k), 2) for k in range(truth.classes)]
                results["kl"] = metrics.metric(sum(each) / len(each), 0, "nats")
            else:
                results["kl"] = metrics.metric(kl(average.energy, truth, 2), 0, "nats")
                with torch.no_grad():
                    betas = torch.cat([torch.zeros(1), annealed(1e-3, 1, 99)])
                    weights = ais(average.energy, 1000, truth.shape, betas, 2.0, 0.05, device=job.device)
                exact = log_z(average.energy, 8.0, 2 * cells, job.device)
                results["log_z"] = metrics.metric(weights.logsumexp(0) - math.log(1000), exact, "nats")
            found = trouble(0.0, 1.0, results["kl"]["value"]) or found
            metrics.landscape_picture(job.folder / "landscape.png", average.energy, truth, seen[0], job.device)
        others, results = None, results if points else {}
        if truth.shape == (1, 28, 28):                      # another alphabet
            others = data.load("latin" if args.dataset in ("persian", "hoda") else "persian")
        compared = compare(average, truth, min(n, 2000), args.sample_steps) if args.compare else {}
        results, samples = judges.energies(average, truth, samples, kept, results, others, compared, job.folder)
        if found:
            print(found)
        job.report(results, samples, truth, sum(p.numel() for p in model.parameters()), seconds, frames=frames,
                   temperature=model.temperature, trouble=found)


if __name__ == "__main__":
    main()
