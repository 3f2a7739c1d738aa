"""What a latent space tells: disentanglement, clusters, maps in the plane, directions, and pictures of them.

    disentanglement(mu, logvar, factors, ...) -> {name: metric}     the mutual information gap both ways [1, 2]
    clustering(z, labels) -> {name: metric}, confusion matrix       k-means against the classes, silhouette
    pca, tsne                                                       maps in the plane [7]
    attribute_vectors, traversals                                   directions, and walks along them
    codebook                                                        what a quantiser uses of its entries
    scatter_picture, confusion_picture                              files, in the style of metrics.py
    report(model, truth, folder) -> {name: metric}                  all of it for an autoencoder, with its pictures

Metrics are those of metrics.py, {value, floor, unit, better}. A floor is the same number where the latents know
nothing: for shuffled factors or labels; or for other points, such as the data itself, where they are given.

Information is in nats. A latent that carries much of the data is narrow, so its information about a factor rises with
the resolution: sigma in `mig_chen`, the bins in `mig_bins`. They differ by some hundredths: say which.

References
  [1] Chen, Li, Grosse, Duvenaud, Isolating Sources of Disentanglement in VAEs, arXiv 1802.04942, section 4
  [2] Locatello et al., Challenging Common Assumptions in the Unsupervised Learning of Disentangled Representations,
      arXiv 1811.12359
  [3] Arthur, Vassilvitskii, k-means++: the advantages of careful seeding, 2007
  [4] Rousseeuw, Silhouettes: a graphical aid to the interpretation and validation of cluster analysis, 1987
  [5] Crouse, On implementing 2D rectangular assignment algorithms, 2016 (shortest augmenting paths)
  [6] Larsen et al., Autoencoding beyond pixels using a learned similarity metric, arXiv 1512.09300 (attribute vectors)
  [7] van der Maaten, Hinton, Visualizing data using t-SNE, 2008
"""

import math

import torch
from torch import Tensor

import judges
from metrics import ACCENT, INK, MUTED, PAPER, _figure, _points, _rgb, _title, _write, grid_picture, metric

# ---- disentanglement: the mutual information gap


def _varying(mu: Tensor, factors, sizes) -> tuple[Tensor, Tensor]:
    """mu (N, Z) and the factors (N, F) of more than one value, both checked."""
    mu, factors = mu.detach(), torch.as_tensor(factors).to(mu.device, torch.int64)
    if mu.dim() != 2 or factors.dim() != 2 or len(mu) != len(factors) or not len(mu):
        shapes = f"{tuple(mu.shape)} and {tuple(factors.shape)}"
        raise ValueError(f"expected latents (N, Z) and factors (N, F), got {shapes}")
    if not mu.isfinite().all():
        raise ValueError("some latents are not finite")
    if sizes is None:
        kept = (factors != factors[0]).any(0)
    else:
        sizes = torch.as_tensor(sizes, device=mu.device)
        if len(sizes) != factors.shape[1] or (factors < 0).any() or (factors >= sizes).any():
            raise ValueError(f"the factors do not lie on a grid of {sizes.tolist()} values, 0 to size - 1")
        kept = sizes > 1
    factors = factors[:, kept]
    if not factors.numel() or (factors == factors[0]).all(0).any():
        raise ValueError("each factor needs two values at least among the points: take more of them")
    return mu, factors


def information_gap(information: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean gap, gap of each factor (F,), information) for information (Z, F) and H(v_k) (F,). [1] section 4

    The gap of a factor is what its best latent knows of it beyond the second best, over H(v_k): in [0, 1]."""
    alone = torch.zeros_like(information[:1])                                   # a second latent that knows nothing
    best, second = torch.cat([information, alone]).topk(2, 0).values
    gaps = (best - second) / entropy
    return gaps.mean(), gaps, information


def _log_density(z: Tensor, mu: Tensor, scale: Tensor, block: int = 2**16) -> Tensor:
    """log 1/N sum_n N(z_s; mu_n, 1 / scale_n^2) for one latent: z (S,), mu and scale (N,) -> (S,), in blocks.

    Each z is drawn from one of the components: its term is there, and e^-80 beside it is nothing; but smaller ones
    would be denormal, which makes processors 20 times slower."""
    half = scale * math.sqrt(0.5)
    parts = [(part[:, None] - mu).mul_(half).square_().clamp_max_(80).neg_().exp_() @ scale
             for part in z.split(max(1, block // len(mu)))]
    return torch.cat(parts).log() - math.log(len(mu) * math.sqrt(2 * math.pi))


@torch.no_grad()
def mig_chen(mu: Tensor, logvar: Tensor, factors, sizes=None, samples: int = 10_000, seed: int = 0):
    """(MIG, gap of each factor (F,), I(z_j; v_k) (Z, F) in nats) from q(z|x_n), mu and logvar (N, Z). [1] section 4

    factors (N, F) are indices. Those of one value (colour in dSprites) are left out of F; with `sizes`, the values each
    has on the grid, one that varies there but not here is an error. With q(z_j) the mixture of all q(z_j|x_n), and
    q(z_j|v) of those with v_k(n) = v,

        I(z_j; v_k) = mean of log q(z_j | v_k(n)) - log q(z_j)  over z ~ q(z|x_n), one for each of `samples` points n,

    clamped at 0 and never above H(v_k). On the whole grid this is the estimator of [1], but that one draw serves both
    entropies, whose noise then cancels in part. On N points drawn from the grid the mixtures hold those alone: it is
    the information in *these* points, with H(v_k) from their counts instead of log |V_k|. It exceeds that of the grid
    by about (cells - 1)(|V_k| - 1) / 2N nats, `cells` = the range of z_j / 3.5 sigma: for 10,000 points, 40 values and
    unit variance 0.018 was measured at sigma = 0.1, 0.063 at 0.03. The information of shuffled factors tells it.

    A symmetric shape shows some orientations twice or more: the information about them cannot reach H(v_k).
    Cost: samples x N x Z exponentials, in blocks; 10,000 points and 10 latents take about 4 s on one core."""
    mu, factors = _varying(mu, factors, sizes)
    g = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(mu), generator=g)[:samples].to(mu.device)
    noise = torch.randn(mu.shape, generator=g, dtype=mu.dtype).to(mu.device)
    z = (mu + (0.5 * logvar).exp() * noise).T.contiguous()                      # (Z, N)
    mu, scale = mu.T.contiguous(), (-0.5 * logvar).exp().T.contiguous()
    N, S, latents = mu.shape[1], len(rows), range(len(mu))
    marginal = torch.stack([_log_density(z[j, rows], mu[j], scale[j]) for j in latents])    # (Z, S)
    information, entropy = mu.new_zeros(len(mu), factors.shape[1]), mu.new_zeros(factors.shape[1])
    for k, values in enumerate(factors.T):
        for v in values[rows].unique():
            members, at = (values == v).nonzero()[:, 0], (values[rows] == v).nonzero()[:, 0]
            entropy[k] -= len(at) / S * math.log(len(members) / N)
            for j in latents:
                given = _log_density(z[j, rows[at]], mu[j, members], scale[j, members])
                information[j, k] += (given - marginal[j, at]).sum() / S
    return information_gap(information.clamp_min(0), entropy)


@torch.no_grad()
def mig_bins(mu: Tensor, factors, bins: int = 20, sizes=None):
    """As mig_chen, from the means alone: each latent is cut into `bins` of equal width between its extremes. [2]"""
    mu, factors = _varying(mu, factors, sizes)
    information, entropy = mu.new_zeros(mu.shape[1], factors.shape[1]), mu.new_zeros(factors.shape[1])
    H = lambda p: -torch.special.xlogy(p, p).sum()
    for k, values in enumerate(factors.T):
        V = int(values.max()) + 1
        entropy[k] = H(values.bincount() / len(mu))
        for j, z in enumerate(mu.T):
            edges = torch.linspace(z.min(), z.max(), bins + 1, dtype=z.dtype, device=z.device)[1:-1]
            cell = torch.bucketize(z.contiguous(), edges, right=True)
            joint = (cell * V + values).bincount(minlength=bins * V).view(bins, V) / len(mu)
            information[j, k] = H(joint.sum(1)) + entropy[k] - H(joint)
    return information_gap(information.clamp_min(0), entropy)


def disentanglement(mu: Tensor, logvar: Tensor, factors, sizes, names, seed: int = 0) -> dict[str, dict]:
    """Metrics: `mig_chen` and `mig_bins`, and `mig_chen_NAME` for each factor that varies; in [0, 1].

    The floor is the same for factors shuffled against the latents: what latents score that know nothing."""
    factors, sizes = torch.as_tensor(factors), list(sizes)
    shuffled = factors[torch.randperm(len(factors), generator=torch.Generator().manual_seed(seed))]
    pair, out = torch.cat([factors, shuffled], 1), {}
    kept = [name for name, size in zip(names, sizes) if size > 1]
    gaps = {"mig_chen": mig_chen(mu, logvar, pair, 2 * sizes, seed=seed)[1],
            "mig_bins": mig_bins(mu, pair, sizes=2 * sizes)[1]}
    for name, both in gaps.items():
        value, floor = both.chunk(2)
        out[name] = metric(value.mean(), floor.mean(), "", "higher")
    value, floor = gaps["mig_chen"].chunk(2)
    out |= {f"mig_chen_{name}": metric(a, b, "", "higher") for name, a, b in zip(kept, value, floor)}
    return out


# ---- clusters


def lloyd(x: Tensor, centres: Tensor, steps: int = 100):
    """Yields (labels (N,), centres (K, D), inertia): the nearest centres and the sum of squares to them, which never
    rises, until no label changes. The centre of an empty cluster is put on a point far from its own."""
    previous = None
    for _ in range(steps):
        distance, labels = torch.cdist(x, centres, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        yield labels, centres, distance.square().sum().item()
        if previous is not None and labels.equal(previous):
            return
        counts, previous = labels.bincount(minlength=len(centres)), labels
        centres = torch.zeros_like(centres).index_add(0, labels, x) / counts.clamp_min(1)[:, None]
        empty = (counts == 0).nonzero()[:, 0]
        centres[empty] = x[distance.topk(len(empty)).indices]


def _spread(x: Tensor, k: int, g) -> Tensor:
    """k of the points x, each drawn in proportion to its square distance from those before. [3]"""
    chosen = [torch.randint(len(x), (), generator=g)]
    distance = torch.full((len(x),), math.inf, dtype=x.dtype)
    for _ in range(k - 1):
        distance = torch.minimum(distance, (x - x[chosen[-1]]).square().sum(1))
        weight = distance if distance.sum() > 0 else torch.ones_like(distance)  # fewer than k distinct points
        chosen.append(torch.multinomial(weight, 1, generator=g)[0])
    return x[torch.stack(chosen)]


def kmeans(x, k: int, restarts: int = 8, steps: int = 100, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """(labels (N,), centres (k, D) float64, inertia) for points x (N, D): the best of `restarts` k-means++ starts."""
    x, g = _points(x), torch.Generator().manual_seed(seed)
    if not 1 <= k <= len(x):
        raise ValueError(f"k-means wants 1 to {len(x)} clusters for as many points; got {k}")
    best = None
    for _ in range(restarts):
        *_, last = lloyd(x, _spread(x, k, g), steps)
        best = last if best is None or last[2] < best[2] else best
    return best


def silhouette(x, labels, block: int = 512) -> float:
    """Mean of (b - a) / max(a, b) in [-1, 1]: a is the mean distance of a point to the others of its cluster, b to
    those of the nearest other one; a cluster of one counts 0. Exact. [4]"""
    x, (names, own) = _points(x), torch.as_tensor(labels).cpu().unique(return_inverse=True)
    if len(names) < 2:
        raise ValueError("the silhouette needs two clusters at least")
    member = torch.nn.functional.one_hot(own).to(x.dtype)                       # (N, K)
    counts, total = member.sum(0), 0.0
    for rows, mine in zip(x.split(block), own.split(block)):
        sums = torch.cdist(rows, x, compute_mode="donot_use_mm_for_euclid_dist") @ member   # (n, K)
        a = sums.gather(1, mine[:, None])[:, 0] / (counts[mine] - 1).clamp_min(1)
        b = (sums / counts).scatter(1, mine[:, None], math.inf).amin(1)
        s = (b - a) / torch.maximum(a, b).clamp_min(1e-300)
        total += s[counts[mine] > 1].sum().item()
    return total / len(x)


def assignment(cost) -> Tensor:
    """The column of each row, (n,) int64, that makes the sum of cost (n, m), n <= m, least. O(n^2 m). [5]

    Rows enter one by one, each along the cheapest path of exchanges; u and v are the prices that keep reduced costs
    cost - u - v at 0 on what is assigned and above elsewhere, so that Dijkstra's algorithm finds the path."""
    cost = torch.as_tensor(cost).to("cpu", torch.float64)
    n, m = cost.shape
    if n > m or not cost.isfinite().all():
        raise ValueError(f"expected finite costs (n, m) with n <= m, got {tuple(cost.shape)}")
    u, v, row_of = cost.new_zeros(n), cost.new_zeros(m), [-1] * m
    for i in range(n):
        distance, before, done = cost.new_full((m,), math.inf), [-1] * m, torch.zeros(m, dtype=torch.bool)
        row, column, length = i, -1, 0.0
        while row >= 0:                                                         # until a free column
            through = length + cost[row] - u[row] - v
            for c in (~done & (through < distance)).nonzero()[:, 0].tolist():
                distance[c], before[c] = through[c], column
            column = int(distance.masked_fill(done, math.inf).argmin())
            length, row, done[column] = distance[column].item(), row_of[column], True
        u[i] += length
        for c in done.nonzero()[:, 0].tolist():
            v[c] -= length - distance[c]
            if row_of[c] >= 0:
                u[row_of[c]] += length - distance[c]
        while column >= 0:                                                      # exchange along the path
            row_of[column] = row_of[before[column]] if before[column] >= 0 else i
            column = before[column]
    columns = torch.tensor(row_of)
    taken = (columns >= 0).nonzero()[:, 0]
    return taken[columns[taken].argsort()]


def confusion(labels, predicted) -> Tensor:
    """Counts (K, K): rows are the classes, columns what was said; K holds the values of both, 0 .. K - 1."""
    labels, predicted = (torch.as_tensor(y).flatten().to("cpu", torch.int64) for y in (labels, predicted))
    if len(labels) != len(predicted) or not len(labels) or min(labels.min(), predicted.min()) < 0:
        lengths = f"{len(labels)} and {len(predicted)}"
        raise ValueError(f"expected two lists of classes 0, 1, .. of one length, got {lengths}")
    K = int(max(labels.max(), predicted.max())) + 1
    return (labels * K + predicted).bincount(minlength=K * K).view(K, K)


def matched(labels, clusters) -> tuple[float, Tensor]:
    """(accuracy, confusion (K, K)) after clusters are named by the classes so that most points agree (Hungarian)."""
    matrix = confusion(labels, clusters)
    matrix = matrix[:, assignment(-matrix)]
    return (matrix.trace() / matrix.sum()).item(), matrix


def clustering(z, labels, other=None, seed: int = 0) -> tuple[dict[str, dict], Tensor]:
    """Metrics `cluster_accuracy` (k-means with as many clusters as classes, best naming) and `silhouette` (of the true
    classes), and the confusion matrix of the first.

    The floor is the same for the points `other` (N, D'), such as the data itself, else for shuffled labels."""
    labels = torch.as_tensor(labels).cpu()
    K, order = len(labels.unique()), torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    clusters = kmeans(z, K, seed=seed)[0]
    accuracy, matrix = matched(labels, clusters)
    if other is None:
        floors = matched(labels[order], clusters)[0], silhouette(z, labels[order])
    else:
        floors = matched(labels, kmeans(other, K, seed=seed)[0])[0], silhouette(other, labels)
    return {"cluster_accuracy": metric(accuracy, floors[0], "share", "higher"),
            "silhouette": metric(silhouette(z, labels), floors[1], "", "higher")}, matrix


def codebook(counts) -> tuple[float, float]:
    """(share of the K entries in use, perplexity exp(-sum p log p) in [1, K]) from how often each was chosen, (K,)."""
    counts = torch.as_tensor(counts).to("cpu", torch.float64)
    if counts.dim() != 1 or (counts < 0).any() or not counts.sum() > 0:
        raise ValueError("expected counts (K,), none negative and not all zero")
    p = counts / counts.sum()
    return (counts > 0).double().mean().item(), (-torch.special.xlogy(p, p).sum()).exp().item()


# ---- maps in the plane


def pca(x, k: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scores (N, k), mean (D,), components (k, D), variances (k,)) in float64, by SVD, the largest variance first.

    x is mean + scores @ components where k = min(N, D). The largest entry of a component is positive."""
    x = _points(x)
    if not 1 <= k <= min(x.shape):
        raise ValueError(f"{tuple(x.shape)} points have 1 to {min(x.shape)} components; got {k}")
    mean = x.mean(0)
    components = torch.linalg.svd(x - mean, full_matrices=False)[2][:k]
    components = components * components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
    scores = (x - mean) @ components.T
    return scores, mean, components, scores.square().mean(0)


def neighbours(x: Tensor, perplexity: float) -> Tensor:
    """p(j|i), (N, N), rows of sum 1: over j != i a softmax of -beta_i |x_i - x_j|^2, beta_i such that its entropy is
    log(perplexity). [7] By bisection, since the entropy falls as beta rises."""
    if not 1 <= perplexity < len(x) - 1:
        raise ValueError(f"the perplexity of {len(x)} points lies in [1, {len(x) - 1}); got {perplexity:g}")
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    d -= d.fill_diagonal_(math.inf).amin(1, keepdim=True)                       # the same softmax
    d /= d.fill_diagonal_(0).mean(1, keepdim=True).clamp_min(1e-30)             # beta about 1
    low, high = d.new_full((len(d), 1), -30.0), d.new_full((len(d), 1), 30.0)   # of log beta
    for _ in range(50):
        middle = (low + high) / 2
        u = (d * middle.exp()).clamp_max_(60)                                   # no denormals
        p = u.neg().exp_().fill_diagonal_(0)
        total = p.sum(1, keepdim=True)
        flat = total.log() + (p * u).sum(1, keepdim=True) / total > math.log(perplexity)
        low, high = middle.where(flat, low), high.where(flat, middle)
    return p / total


def affinities(x: Tensor, perplexity: float) -> Tensor:
    """P = (p(j|i) + p(i|j)) / 2N, (N, N): symmetric, of sum 1, its diagonal 0. [7]"""
    p = neighbours(x, perplexity)
    return (p + p.T) / (2 * len(x))


def _student(y: Tensor) -> Tensor:
    """1 / (1 + |y_i - y_j|^2), (N, N), its diagonal 0."""
    return (1 + sum((c[:, None] - c).square_() for c in y.T)).reciprocal_().fill_diagonal_(0)


def tsne_kl(P: Tensor, y: Tensor) -> float:
    """KL(P || Q) in nats, Q the Student affinities of y normalised to sum 1. [7]"""
    w = _student(y)
    return (torch.special.xlogy(P, P) - torch.special.xlogy(P, w / w.sum())).sum().item()


def tsne_gradient(P: Tensor, y: Tensor) -> Tensor:
    """d KL / d y_i = 4 sum_j (p_ij - q_ij) (y_i - y_j) / (1 + |y_i - y_j|^2), (N, 2). [7]"""
    w = _student(y)
    pull = (P - w / w.sum()).mul_(w)
    return 4 * (pull.sum(1, keepdim=True) * y - pull @ y)


@torch.no_grad()
def tsne(x, perplexity: float = 30.0, steps: int = 500, seed: int = 0) -> tuple[Tensor, float]:
    """(y (N, 2), KL(P || Q)): exact t-SNE with early exaggeration, momentum and gains [7], started on the first two
    principal components. N x N memory and time: 1,500 points take 12 s on one core."""
    x = torch.as_tensor(x).detach().cpu()
    P, scores = affinities(x, perplexity), pca(x, min(2, *x.shape))[0]
    y = torch.randn(len(x), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y[:, : scores.shape[1]] *= 0.01                                             # equal points part
    y[:, : scores.shape[1]] += scores / scores.std(0)[:1].clamp_min(1e-300)
    y = (1e-4 * y).to(P.dtype)
    velocity, gains, rate = torch.zeros_like(y), torch.ones_like(y), max(20.0, len(x) / 10)
    for step in range(steps):
        early = step < steps // 10
        gradient = tsne_gradient(4 * P if early else P, y)
        gains = torch.where(gradient * velocity < 0, gains + 0.2, gains * 0.8).clamp_min_(0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gains * gradient
        y = y + velocity
    return y - y.mean(0), tsne_kl(P, y)


# ---- directions


def attribute_vectors(z, attributes, partial: bool = True) -> Tensor:
    """(A, Z): how the mean of z (N, Z) moves when an attribute goes from 0 to 1, for attributes (N, A) in {0, 1}. [6]

    `partial` (the default): the coefficients of the regression of z on all attributes, so what comes with another
    attribute (beards with men) is that one's. Otherwise the difference of means, mean(z | 1) - mean(z | 0), which [6]
    has. Both are the same for one attribute, and in expectation for independent ones. A discriminant direction would
    be whitened by the covariance: it tells the classes apart but does not lead from one to the other."""
    z, a = _points(z), _points(attributes)
    if len(z) != len(a) or not ((a == 0) | (a == 1)).all():
        raise ValueError(f"expected attributes 0 or 1 for each of {len(z)} points, got {tuple(a.shape)}")
    if (a == a[0]).all(0).any():
        raise ValueError("an attribute is the same for all points: it has no direction")
    if not partial:
        return (a.T @ z) / a.sum(0)[:, None] - ((1 - a).T @ z) / (1 - a).sum(0)[:, None]
    a = a - a.mean(0)
    if torch.linalg.matrix_rank(a) < a.shape[1]:
        raise ValueError("some attributes determine another one: leave it out, or use partial=False")
    return torch.linalg.solve(a.T @ a, a.T @ z)


def traversals(z: Tensor, latents, values) -> Tensor:
    """(R, C, Z): copies of z (Z,) where one of R latents, a row each, takes one of C values."""
    values = torch.as_tensor(values, dtype=z.dtype, device=z.device)
    out = z.repeat(len(latents), len(values), 1)
    for row, j in zip(out, latents):
        row[:, j] = values
    return out


# ---- pictures

# ten that stay apart for red-, green- and blue-blind eyes too, and on paper
COLOURS = (ACCENT, "#1d4488", "#cbab3a", "#0e7868", "#7a66c5", "#4fb9ea", "#5f3019", "#b27a98", INK, "#8b9c7c")


def scatter_picture(path, points, labels=None, names=None, title: str = ""):
    """Points (N, 2) of a map, a colour for each class of labels (N,), its name (default: its number) amid its points.

    Scale and place mean nothing in such a map, so there are no axes. Points that are not finite are left out."""
    from matplotlib.patheffects import withStroke

    points = torch.as_tensor(points).detach().float().cpu()
    labels = torch.zeros(len(points), dtype=torch.long) if labels is None else torch.as_tensor(labels).cpu()
    shown = points.isfinite().all(1).nonzero()[:, 0]
    shown = shown[torch.randperm(len(shown), generator=torch.Generator().manual_seed(0))]   # no class lies on top
    points, labels = points[shown], labels[shown]
    figure, axes = _figure(1, 1, 5.2, 5.4)
    ax = axes[0, 0]
    colors = [COLOURS[int(c) % len(COLOURS)] for c in labels]
    size = min(30.0, max(2.0, 14000 / max(1, len(points))))
    ax.scatter(*points.T.numpy(), s=size, c=colors, alpha=0.8, linewidths=0)
    classes = labels.unique().tolist()
    for c in classes if len(classes) > 1 else ():
        own = points[labels == c][:1000]
        x, y = own[torch.cdist(own, own).sum(1).argmin()].tolist()              # a point, not between two parts
        ax.text(x, y, str(c) if names is None else str(names[c]), fontsize=12, fontweight="bold", color=INK,
                ha="center", va="center", path_effects=[withStroke(linewidth=3, foreground=PAPER)])
    ax.set(xticks=[], yticks=[])
    ax.set_aspect("equal", "datalim")
    ax.margins(0.04)
    ax.spines[:].set_visible(False)
    _title(ax, title)
    _write(path, lambda handle: figure.savefig(handle, format="png"))


def confusion_picture(path, matrix, names=None, title: str = "", said: str = "said"):
    """Counts (K, K) as shares of each row in per cent: what is right in ink, what is wrong in the accent."""
    matrix = torch.as_tensor(matrix).double().cpu()
    share = matrix / matrix.sum(1, keepdim=True).clamp_min(1)
    K = len(share)
    names = [str(k) for k in range(K)] if names is None else [str(name) for name in names]
    paper, ink, accent = (torch.tensor(_rgb(c)) / 255 for c in (PAPER, INK, ACCENT))
    goal = torch.where(torch.eye(K, dtype=torch.bool)[..., None], ink, accent)
    weight = share[..., None].sqrt()                                            # small errors are seen too
    side = max(3.2, 0.42 * K + 1.0)
    figure, axes = _figure(1, 1, side, side + 0.3)
    ax = axes[0, 0]
    ax.imshow(((1 - weight) * paper + weight * goal).numpy(), interpolation="nearest")
    for i in range(K if K <= 20 else 0):
        for j in range(K):
            if share[i, j] >= 0.005:
                ax.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=8,
                        color=PAPER if share[i, j] > 0.2 else INK)
    ax.set_xticks(range(K), names, color=INK, rotation=90 if max(map(len, names)) > 3 else 0)
    ax.set_yticks(range(K), names, color=INK)
    ax.set_xlabel(f"{said}, % of the row", fontsize=8, color=MUTED)
    ax.set_ylabel("true", fontsize=8, color=MUTED)
    ax.spines[:].set_visible(False)
    _title(ax, title)
    _write(path, lambda handle: figure.savefig(handle, format="png"))


# ---- all of it for one autoencoder


def report(model, truth, folder, seed: int = 0) -> dict[str, dict]:
    """Metrics and pictures, into `folder`, of what a trained autoencoder knows of the held-out images of a data.Images.

    The model has code(x) -> z, mean(z) -> x, and either encode(x) -> (mu, logvar) or, with a book of codes, quantize.
    Factors that are known: `disentanglement` at 10,000 images. Labels: `clustering` of 1,500 beside that of their
    pixels, maps, confusions. Attributes: `attribute_added`, the share of the faces without a smile in which a
    classifier of real images sees one when the smile's vector is added; its floor is the share of decoded smiles in
    which it sees one. A book: the share of it in use and its perplexity."""
    pick = torch.randperm(len(truth.test), generator=torch.Generator().manual_seed(seed))
    device, out, levels = next(model.parameters()).device, {}, truth.levels
    scaled = lambda images, rows: truth.scale(images[rows]).to(device)
    with torch.inference_mode():
        q = lambda x: [torch.cat(parts) for parts in zip(*[model.encode(part) for part in x.split(500)])]
        code = lambda x: torch.cat([model.code(part) for part in x.split(500)])
        half = min(6, len(pick) // 2)
        few = scaled(truth.test, pick[: 2 * half])
        z, gaussian = code(few), isinstance(model.encode(few), tuple)
        walk = torch.linspace(0, 1, 9, device=device).view(9, *[1] * z.dim())
        between = model.mean((z[:half] + walk * (z[half:] - z[:half])).flatten(0, 1))
        grid_picture(folder / "interpolation.png", between.unflatten(0, (9, half)).transpose(0, 1).cpu(), levels=levels)
        if hasattr(model, "quantize"):
            index = model.quantize(model.encode(scaled(truth.test, pick[:1000])))[1]
            used, perplexity = codebook(index.flatten().bincount(minlength=len(model.codes)))
            out |= {"codes_used": metric(used, 1, "share", "higher"),
                    "perplexity": metric(perplexity, len(model.codes), "codes", "higher")}
        if gaussian:
            mu, logvar = q(scaled(truth.test, pick[:1000]))
            told = (mu.square() + logvar.expm1() - logvar).mean(0)              # twice the KL of each latent
            rows = told.argsort(descending=True)[:10].tolist()
            shown = model.mean(traversals(z[0], rows, torch.linspace(-2.5, 2.5, 9)).flatten(0, 1))
            grid_picture(folder / "traversals.png", shown.unflatten(0, (len(rows), 9)).cpu(),
                         [f"{told[j] / 2:.1f} nats" for j in rows], levels=levels)
        if gaussian and hasattr(truth, "factor_sizes"):
            rows = pick[:10_000]
            mu, logvar = q(scaled(truth.test, rows))
            factors = truth.factors(truth.test.index[rows])
            out |= disentanglement(mu.cpu(), logvar.cpu(), factors, truth.factor_sizes, truth.factor_names, seed)
        if truth.test_labels is not None and not {"factor_sizes", "train_attributes"} & vars(truth).keys():
            x, labels = scaled(truth.test, pick[:1500]), truth.test_labels[pick[:1500]]
            z, names = code(x).flatten(1).cpu(), truth.class_names
            numbers, matrix = clustering(z, labels, x.flatten(1).cpu(), seed)
            out |= numbers
            scatter_picture(folder / "latents-pca.png", pca(z)[0], labels, names, "two principal components")
            scatter_picture(folder / "latents-tsne.png", tsne(z, seed=seed)[0], labels, names, "t-SNE")
            confusion_picture(folder / "latents-clusters.png", matrix, names, "k-means against the classes")
    if hasattr(truth, "train_attributes"):
        out |= _attributes(model, truth, folder, pick, code, scaled)
    return out


def _attributes(model, truth, folder, pick, code, scaled, asked=""):
    names = truth.attribute_names
    smile = next((k for k, name in enumerate(names) if name.lower().startswith(asked or "smil")), 0)
    has = truth.test_attributes[pick, smile]
    reader = judges.train_classifier(truth.train, truth.train_attributes[:, smile].long(), 2, truth.levels, steps=500,
                                     batch=64, lr=3e-3, most=64)
    with torch.inference_mode():
        z, known = code(scaled(truth.train, slice(4000))), truth.train_attributes[:4000].double()
        varied = ((known != known[0]).any(0)).nonzero()[:, 0].tolist()
        partial = torch.linalg.matrix_rank(known[:, varied] - known[:, varied].mean(0)) == len(varied)
        vectors = dict(zip(varied, attribute_vectors(z.flatten(1), known[:, varied], bool(partial)).to(z)))
        add = lambda z, k: z + vectors[k].view(z.shape[1:])
        seen = lambda z: (judges.judge(reader, truth.unscale(model.mean(z)))[0].argmax(1) == 1).double().mean()
        without, there = (code(scaled(truth.test, pick[has == v][:500])) for v in (False, True))
        right = (judges.judge(reader, truth.test[pick[:500]])[0].argmax(1) == 1) == has[:500]
        out = {"judge_accuracy": metric(right.double().mean(), None, "share", "higher"),
               "attribute_added": metric(seen(add(without, smile)), seen(there), "share", "higher"),
               "attribute_unasked": metric(seen(without), 0, "share", "lower")}
        shown, few = [smile, *[k for k in varied if k != smile]][:8], without[:6]
        columns = [scaled(truth.test, pick[~has][:6]), model.mean(few), *[model.mean(add(few, k)) for k in shown]]
        grid_picture(folder / "attributes.png", torch.stack(columns, 1).cpu(), None,
                     ["held out", "decoded", *[f"+ {names[k].replace('_', ' ')}" for k in shown]], truth.levels)
    return out
