"""Pixel networks: a Bayesian network on the grid of a binary image, each pixel the child of near pixels before it.

    p(x) = prod_ij p(x_ij | c_ij),   c_ij = the pixels (i - a, j - b), 0 <= a, b < k, without (i, j): a Markov mesh [1]
    p(x_ij = 1 | c) = sigmoid(w . c + w_y y + w_x x + b),   or an MLP of (c, y, x);   y, x in [0, 1]; one w everywhere

k = 2, 3, 4 gives 3, 8, 15 parents; beyond the border all is 0. The likelihood is exact, and depends on the data through
counts alone: how often each context came, and how often with a 1. So a model is trained on the distinct contexts, not
on pixels, and the counted table n_1 / n is the optimum that no model of the same contexts passes on the training set.
On other images each count starts at 1/2 [2]. `--model`, all of 3, 8 and 15 parents, with and without the position:
  linear   solved by Newton's method    mlp-1, mlp-2   one and two hidden layers    all   the table of the 18

Sampling. A pixel whose parents are drawn can be drawn. With t = s i + j every parent (a, b) lies s a + b waves back, so
all pixels of a wave are drawn at once if s a + b >= 1 [3]. Parents above and to the left need s = 1, anti-diagonals:
H + W - 1 waves, 55 of a 28 x 28 image against 784 pixels. A parent one up and r to the right, b = -r, needs s = r + 1,
s (H - 1) + W waves: 82 for PixelCNN's neighbourhood [4] of reach 1 (`--nearest`: the nearest pixels before, as there).

References
  [1] Abend, Harley, Kanal, Classification of Binary Random Patterns, IEEE Trans. on Information Theory 11(4), 1965
  [2] Krichevsky, Trofimov, The performance of universal encoding, IEEE Trans. on Information Theory 27(2), 1981
  [3] Lamport, The parallel execution of DO loops, Communications of the ACM 17(2), 1974
  [4] van den Oord, Kalchbrenner, Kavukcuoglu, Pixel Recurrent Neural Networks, arXiv 1601.06759

Glossary
  code     (..)         a context: bit m is the parent offsets[m]     place   i W + j
  n        (R, 2)       how often a 0, a 1, came in each of R contexts
  first    (2^K, F)     what the first layer makes of each context; places (H W, F): what it adds at each place

Use
  python pixels.py --dataset persian                   the table, and counted tables; or hoda
  python pixels.py --model linear --dataset hoda --nearest

Not included: grey levels, classes, parents that are learned, hidden pixels. Samples are texture, for 15 pixels see no
digit.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- maths: parents, contexts, waves


def block(k: int) -> tuple:
    """The k^2 - 1 offsets (a, b) of k x k pixels above and to the left; those of a smaller k come first."""
    return tuple((a, b) for m in range(1, k) for a in range(m + 1) for b in range(m + 1) if max(a, b) == m)


def nearest(count: int) -> tuple:
    """The `count` nearest pixels before, also those above and to the right; those of a smaller count come first."""
    before = [(a, b) for a in range(5) for b in range(-4, 5) if a > 0 or b > 0]
    return tuple(sorted(before, key=lambda o: (o[0] ** 2 + o[1] ** 2, o))[:count])


def slope(offsets) -> int:
    """The least s >= 0 with s a + b >= 1 for all parents (a, b)."""
    if any(a < 0 or a == 0 and b < 1 for a, b in offsets):
        raise ValueError(f"a parent must come before its pixel: above, or left in the same row; got {offsets}")
    return max([0, *(-((b - 1) // a) for a, b in offsets if a)])


def waves(H: int, W: int, offsets) -> list[Tensor]:
    """The places of each wave t = s i + j, ascending; together they are all places."""
    t = slope(offsets) * torch.arange(H)[:, None] + torch.arange(W)
    order, sizes = t.flatten().sort(stable=True)[1], torch.bincount(t.flatten())
    return [w for w in order.split(sizes.tolist()) if len(w)]


def padding(offsets) -> tuple[int, int, int]:
    """Rows above, columns to the left and to the right that parents reach."""
    return max(a for a, _ in offsets), max(0, *(b for _, b in offsets)), max(0, *(-b for _, b in offsets))


def contexts(x: Tensor, offsets) -> Tensor:
    """The codes, int32, of all pixels of 0 and 1 in x (B, H, W)."""
    (top, left, right), (H, W) = padding(offsets), x.shape[1:]
    padded = F.pad(x.int(), (left, right, top, 0))
    code = torch.zeros_like(x, dtype=torch.int32)
    for m, (a, b) in enumerate(offsets):
        code.add_(padded[:, top - a : top - a + H, left - b : left - b + W], alpha=1 << m)
    return code


def bits(code: Tensor, K: int) -> Tensor:
    """(R,) -> (R, K) of 0. and 1."""
    return (code[:, None] >> torch.arange(K, device=code.device) & 1).to(torch.get_default_dtype())


# ---- maths: counts and likelihoods


def count(x: Tensor, offsets, rows: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """code (R,), place (R,), n (R, 2) of the distinct pairs of place and context in x (B, H, W), places ascending."""
    K, place = len(offsets), torch.arange(x[0].numel(), device=x.device).view(x.shape[1:])
    if x[0].numel() << K + 1 >= 2**63:
        raise ValueError(f"{K} parents at {x[0].numel()} places are too many contexts to be numbered")
    keys = [(contexts(part, offsets) + (place << K)) * 2 + part for part in x.split(rows)]
    keys, times = zip(*(key.unique(return_counts=True) for key in keys))
    return merge(torch.cat(keys) >> 1 & (1 << K) - 1, torch.cat(keys) >> K + 1,
                 torch.cat(times)[:, None] * F.one_hot(torch.cat(keys) & 1, 2), K)


def merge(code: Tensor, place: Tensor | None, n: Tensor, K: int):
    """The same counts for the first K parents alone, and for all places together if place is None."""
    code = code & (1 << K) - 1
    key, at = (code if place is None else (place << K) + code).unique(return_inverse=True)
    n = n.new_zeros(len(key), 2).index_add_(0, at, n)
    return key & (1 << K) - 1, None if place is None else key >> K, n


def nll_of_counts(logits: Tensor, n: Tensor) -> Tensor:
    """-log likelihood in nats of n (R, 2) zeros and ones under logits (R,)."""
    return (n[:, 1] * F.softplus(-logits) + n[:, 0] * F.softplus(logits)).sum()


def optimum(n: Tensor) -> Tensor:
    """The least nll_of_counts for any logits: n_1 log(n / n_1) + n_0 log(n / n_0), for counts that may be 0."""
    return -(torch.special.xlogy(n, n / n.sum(1, keepdim=True).clamp(min=1))).sum()


def krichevsky_trofimov(n: Tensor) -> Tensor:
    """Logits (R,) of p = (n_1 + 1/2) / (n + 1). [2]"""
    return (n[:, 1] + 0.5).log() - (n[:, 0] + 0.5).log()


def newton(features: Tensor, n: Tensor, steps: int = 50, rows: int = 2**18) -> Tensor:
    """The weights (D,) of the logistic regression on features (R, D) that counts n (R, 2) like best, float64.

    A step is halved until the likelihood rises; 1e-9 |w|^2 bounds weights that data would send to infinity."""
    w = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    parts = list(zip(features.double().split(rows), n.double().split(rows)))
    value = lambda w: sum(nll_of_counts(f @ w, m) for f, m in parts) + 1e-9 * w.square().sum()
    best = value(w)
    for _ in range(steps):
        slope_, curvature = 2e-9 * w, 2e-9 * torch.eye(len(w), dtype=w.dtype, device=w.device)
        for f, m in parts:
            p, total = torch.sigmoid(f @ w), m.sum(1)
            slope_ = slope_ + f.T @ (total * p - m[:, 1])
            curvature = curvature + f.T @ (f * (total * p * (1 - p))[:, None])
        step, size = torch.linalg.solve(curvature, slope_), 1.0
        while not (now := value(w - size * step)) <= best and size > 1e-6:
            size /= 2
        if not now < best - 1e-12 * best.abs():
            return w
        w, best = w - size * step, now
    return w


# ---- maths: sampling


def ancestral(probability, u: Tensor, offsets, order) -> Tensor:
    """x (N, H, W) uint8, drawn in the order of lists of places: x_ij = [u_ij < p(1 | c_ij)] for uniform u (N, H, W).

    probability(code, place): (P, N) and (P,) int64 -> (P, N). No place may come before its parents, or with them."""
    (N, H, W), (top, left, right) = u.shape, padding(offsets)
    wide = left + W + right
    drawn = u.new_zeros((top + H) * wide, N)                            # a pixel of all images lies together
    u = u.permute(1, 2, 0).reshape(H * W, N).contiguous()
    here = ((top + torch.arange(H)[:, None]) * wide + left + torch.arange(W)).flatten().to(u.device)
    back = torch.tensor([a * wide + b for a, b in offsets], device=u.device)
    powers = 2.0 ** torch.arange(len(offsets), dtype=u.dtype, device=u.device)
    for place in order:
        at = here[place.to(u.device)]
        code = torch.einsum("k,pkn->pn", powers, drawn[at[:, None] - back]).long()
        drawn[at] = (u[place] < probability(code, place)).to(u.dtype)
    return drawn[here].to(torch.uint8).T.reshape(N, H, W)


def head(z: Tensor, layers) -> Tensor:
    """(.., F) -> (..) logits: hidden units relu(z) through layers of pairs (W, b), or z itself if there are none."""
    for w, b in layers:
        z = F.linear(z.relu(), w, b)
    return z[..., 0]


def wavefront_sample_plain(n: int, shape, offsets, first: Tensor, places: Tensor | None, layers, seed: int,
                           rows: int = 500) -> Tensor:
    """n images (n, H, W) uint8 of the CPD head(first[code] + places[place], layers); kernels/ holds the fused one."""
    generator, order = torch.Generator(first.device).manual_seed(seed % 2**63), waves(*shape, offsets)

    def probability(code, place):
        z = first[code]
        return torch.sigmoid(head(z if places is None else z + places[place, None], layers))

    u = (torch.rand(min(rows, n - k), *shape, generator=generator, device=first.device) for k in range(0, n, rows))
    return torch.cat([ancestral(probability, part, offsets, order) for part in u])


def fused(name, plain):
    """kernels.<name> where this repository's kernels/ is importable, else `plain`; a broken kernels/ raises."""
    try:
        import kernels
    except ModuleNotFoundError as e:
        if e.name != "kernels":
            raise
        return plain
    return getattr(kernels, name, plain)


# ---- networks


class CPD(nn.Module):
    """(R, K) parents, and (R, 2) positions if it is told them -> logits (R,). hidden: width of each hidden layer."""

    def __init__(self, K: int, hidden=(), position: bool = False):
        super().__init__()
        self.K, self.position, sizes = K, position, [K + 2 * position, *hidden, 1]
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in zip(sizes, sizes[1:]))

    def forward(self, parents: Tensor, yx: Tensor | None = None) -> Tensor:
        z = self.layers[0](torch.cat([parents, yx], 1) if self.position else parents)
        return head(z, [(layer.weight, layer.bias) for layer in self.layers[1:]])


# ---- the family: parents, and one CPD for all places


class PixelNetwork(nn.Module):
    """`logits(code, place)`, `log_prob(x)` of x (B, H, W) in {0, 1}, `sample(n)`."""

    def __init__(self, shape, offsets, hidden=(), position: bool = False):
        super().__init__()
        self.shape, self.offsets, self.K, self.position = tuple(shape), offsets, len(offsets), position
        self.cpd = CPD(self.K, hidden, position)

    def yx(self, place: Tensor) -> Tensor:
        """(R,) -> (R, 2): row and column in [0, 1]."""
        H, W = self.shape
        scale = torch.tensor([max(H - 1, 1), max(W - 1, 1)], device=place.device)
        return torch.stack([place // W, place % W], 1) / scale

    def inputs(self, code: Tensor, place: Tensor | None):
        return bits(code, self.K), self.yx(place) if self.position else None

    def logits(self, code: Tensor, place: Tensor | None = None) -> Tensor:
        return self.cpd(*self.inputs(code, place))

    def log_prob(self, x: Tensor) -> Tensor:
        """Nats, (B,)."""
        code, place = contexts(x, self.offsets), torch.arange(x[0].numel(), device=x.device).repeat(len(x))
        logits = self.logits(code.flatten(), place).view(len(x), -1)
        return -F.softplus(torch.where(x.flatten(1) == 1, -logits, logits)).sum(1)

    def lookup(self):
        """(first, places, layers) for wavefront_sample: the first layer is a table of contexts plus a map of places;
        without position all of the CPD is a table."""
        code, layers = torch.arange(2**self.K, device=next(self.parameters()).device), self.cpd.layers
        if not self.position:
            return self.logits(code)[:, None], None, []
        weight, rest = layers[0].weight, [(layer.weight, layer.bias) for layer in layers[1:]]
        place = torch.arange(math.prod(self.shape), device=code.device)
        return bits(code, self.K) @ weight[:, :-2].T + layers[0].bias, self.yx(place) @ weight[:, -2:].T, rest

    @torch.inference_mode()
    def sample(self, n: int, seed: int) -> Tensor:
        """(n, H, W) uint8."""
        return fused("wavefront_sample", wavefront_sample_plain)(n, self.shape, self.offsets, *self.lookup(), seed)


class Counted(PixelNetwork):
    """The table of all contexts, without position: the optimum of its counts. p = (n_1 + 1/2) / (n + 1)."""

    def __init__(self, shape, offsets, code: Tensor, n: Tensor):
        super().__init__(shape, offsets)
        self.cpd = None
        table = torch.zeros(2**self.K, 2, dtype=n.dtype, device=n.device).index_add_(0, code.long(), n)
        self.register_buffer("table", krichevsky_trofimov(table).to(torch.get_default_dtype()))

    def logits(self, code, place=None):
        return self.table[code.long()]

    def lookup(self):
        return self.table[:, None], None, []


HIDDEN = {"linear": 0, "mlp-1": 1, "mlp-2": 2}
MODELS = {"all": tuple(HIDDEN)} | {kind: (kind,) for kind in HIDDEN}
PARENTS = {False: [block(k) for k in (2, 3, 4)], True: [nearest(count) for count in (3, 8, 15)]}


def build(kinds, shape, parents, width: int) -> nn.ModuleDict:
    """The networks of these kinds with each of the tuples of parents, without and with position."""
    return nn.ModuleDict({f"{kind} {len(offsets)}{' yx' * position}":
                          PixelNetwork(shape, offsets, [width] * HIDDEN[kind], position)
                          for kind in kinds for offsets in parents for position in (False, True)})


class Counts:
    """Distinct contexts (code, place or None, n) of N images: `nll(model)`, `optimum()`, nats an image."""

    def __init__(self, code, place, n, images: int):
        self.code, self.place, self.n, self.images = code, place, n, images
        self.total = n.sum(1).cumsum(0)

    def nll(self, model: PixelNetwork, rows: int = 2**17) -> float:
        parts = zip(self.code.split(rows), (self.place if self.place is not None else self.code).split(rows),
                    self.n.split(rows))
        return sum(nll_of_counts(model.logits(c, p).double(), n).item() for c, p, n in parts) / self.images

    def optimum(self) -> float:
        return optimum(self.n.double()).item() / self.images

    def draw(self, batch: int):
        """(code, place, weight (R, 2)): all rows, or those of `batch` pixels a constant count apart, with the mean of
        what stands there. The weights sum to 1 and in the mean are n / total."""
        if len(self.code) <= batch:
            return self.code, self.place, self.n / self.total[-1]
        at = (torch.arange(batch, device=self.code.device) + torch.rand((), device=self.code.device).double()) / batch
        row = torch.searchsorted(self.total, (at * self.total[-1]).long(), right=True)
        row, times = row.unique_consecutive(return_counts=True)
        n = self.n[row]
        return (self.code[row], None if self.place is None else self.place[row],
                n / n.sum(1, keepdim=True) * (times / batch)[:, None])


def counted_nll(seen: Counts, asked: Counts, K: int) -> float:
    """Nats an image of `asked` under the table counted on `seen`, with or without position; a context never seen has
    p = 1/2."""
    key = lambda c: c.code.long() if c.place is None else (c.place.long() << K) + c.code
    known, wanted = key(seen), key(asked)
    at = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    n = torch.where((known[at] == wanted)[:, None], seen.n[at], 0)
    return nll_of_counts(krichevsky_trofimov(n.double()), asked.n.double()).item() / asked.images


def train(models: nn.ModuleDict, counts: dict, optimizer, steps: int, batch: int, lr: float, start: int = 0):
    """Linear models by Newton's method, in the first step; the others by Adam on the nats an image, all in one pass:
    they share no weight. counts: {(K, position): Counts}. Yields the mean nats an image of each kind."""
    solved = {}
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        drawn, losses = {key: c.draw(batch) for key, c in counts.items()}, {}
        for name, model in models.items():
            code, place, n = drawn[model.K, model.position]
            kind, pixels = name.split()[0], math.prod(model.shape)
            if kind == "linear":
                if step == 0:
                    solve(model, counts[model.K, model.position])
                if name not in solved:
                    solved[name] = torch.tensor(counts[model.K, model.position].nll(model))
                loss = solved[name]
            else:
                loss = pixels * nll_of_counts(model.logits(code, place), n)
            losses.setdefault(kind, []).append(loss)
        total = sum(sum(some) for some in losses.values())
        if total.requires_grad:
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        yield {kind: (sum(some) / len(some)).detach() for kind, some in losses.items()}


@torch.no_grad()
def solve(model: PixelNetwork, counts: Counts):
    parents, yx = model.inputs(counts.code, counts.place)
    features = torch.cat([parents, *([yx] if model.position else []), torch.ones_like(parents[:, :1])], 1)
    *w, b = newton(features, counts.n)
    layer = model.cpd.layers[0]
    layer.weight.copy_(torch.stack(w))
    layer.bias.fill_(b)


def main():
    import time

    import data
    import metrics
    import run

    args = run.parse(
        __doc__, MODELS, dataset="persian", steps=1500, batch=16384, lr=1e-2, reads=("pixels", "pgm"),
        training={"width": (64, "of hidden layers"), "nearest": (False, "parents: the nearest pixels before"),
                  "images": (60_000, "training images counted, at most")})
    with run.Run(args) as job:
        truth = data.load(args.dataset, args.data_dir, download=args.download, skip_bad=args.skip_bad)
        if getattr(truth, "levels", 0) != 2 or truth.shape[0] != 1:
            raise ValueError(f"{args.dataset} is no set of binary images: take persian, latin, hoda or dsprites")
        shape, pixels, parents = truth.shape[1:], math.prod(truth.shape), PARENTS[args.nearest]
        splits = {}
        for split in ("train", "test"):
            most = min(args.images, len(getattr(truth, split)))
            x = truth.sample(most, torch.Generator().manual_seed(args.seed), split=split)[:, 0] > 0
            code, place, n = count(x.to(job.device, torch.uint8), parents[-1])
            for K in map(len, parents):
                for position in (False, True):
                    rows = merge(code, place if position else None, n, K)
                    splits[split, K, position] = Counts(*rows, len(x))
        seen, asked = ({key[1:]: c for key, c in splits.items() if key[0] == split} for split in ("train", "test"))

        models = build(MODELS[args.model], shape, parents, args.width).to(job.device)
        frames, name = {}, list(models)[-1]
        if args.ckpt:
            job.restore(model=models)
        else:
            optimizer = torch.optim.Adam(models.parameters(), args.lr, betas=(0.9, 0.99))
            start = job.keep(model=models, optimizer=optimizer)
            rows = train(models, seen, optimizer, args.steps, args.batch, args.lr, start)
            for step, _ in enumerate(job.track(rows), start + 1):
                if step % max(1, args.steps // 8) == 0:                 # the same noise each time
                    frames[f"step {step}"] = 2.0 * models[name].sample(64, args.seed)[:, None].cpu() - 1

        counted = {f"counted {len(offsets)}": Counted(shape, offsets, c.code, c.n).to(job.device)
                   for offsets in parents for c in [seen[len(offsets), False]]}
        table = []
        with torch.no_grad():
            for name, model in models.items():
                own, other = seen[model.K, model.position], asked[model.K, model.position]
                size, nll = sum(p.numel() for p in model.parameters()), own.nll(model)
                table.append((name, size, nll, nll / own.optimum() - 1, other.nll(model)))
            for K, position in seen:
                best = seen[K, position].optimum()
                table.append((f"counted {K}{' yx' * position}", len(seen[K, position].code), best, 0.0,
                              counted_nll(seen[K, position], asked[K, position], K)))
        print(f"{'':14s}parameters  train nats  over the optimum  test nats  bits a pixel")
        for name, size, ours, over, nll in table:
            print(f"{name:14s}{size:10d}{ours:12.3f}{100 * over:17.2f}%{nll:11.3f}"
                  f"{metrics.bits_per_dim(nll, pixels):14.5f}")

        best = min(table[: len(models)], key=lambda row: row[2])        # chosen on the training set
        began = time.perf_counter()
        samples = models[best[0]].sample(args.samples, args.seed)[:, None].cpu()
        seconds = time.perf_counter() - began
        shown = [model.sample(12, args.seed + 1)[:, None].cpu() for model in (*models.values(), *counted.values())]
        metrics.grid_picture(job.folder / "grid.png", 2.0 * torch.stack(shown) - 1, [*models, *counted], None, 2)
        results = {"nll": metrics.metric(best[-1], None, f"nats, of {best[0]}"),
                   "bits_per_dim": metrics.metric(metrics.bits_per_dim(best[-1], pixels), None, "bits")}
        for name, *_, nll in table:
            if name.startswith("counted"):
                results[f"bits_per_dim_{name.replace(' ', '_')}"] = metrics.metric(
                    metrics.bits_per_dim(nll, pixels), None, "bits")
        columns = "name", "parameters", "train_nats", "over_optimum", "test_nats"
        job.report(results, samples, truth, sum(row[1] for row in table[: len(models)]), seconds, frames or None,
                   best=best[0], table=[dict(zip(columns, row)) for row in table])


if __name__ == "__main__":
    main()
