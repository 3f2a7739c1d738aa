"""Variational autoencoders: an encoder, a decoder and a bound on log p(x).

    log p(x) >= L(x) = E_q(z|x) log p(x|z) - KL(q(z|x) || p(z))                          [1] (3)
    log p(x) >= L_k(x) = E log 1/k sum_i p(x, z_i) / q(z_i|x) >= L(x)                    [2] theorem 1
    q(z|x) = N(mu(x), diag exp(logvar(x))),   z = mu + exp(logvar / 2) eps

`--model`: vae [1]; beta, whose KL weighs beta or is held at a rising capacity [3, 4]; iwae, trained on L_k [2]; vamp,
whose prior is the mixture of q at learned pseudo-inputs [5]: these four report the same likelihood, L_k with k = 1000.
vq, whose z is a grid of codes from a book [6]: q is one point, so -L is the length of a code for x. sc, whose z is a
grid of sparse combinations of cosines [7]: no bound; a prior is fitted to its codes afterwards.

Everything is in nats, summed over pixels and latents and averaged over examples: with means over pixels instead beta
would silently be multiplied by their number.

References
  [1] Kingma, Welling, Auto-Encoding Variational Bayes, arXiv 1312.6114
  [2] Burda, Grosse, Salakhutdinov, Importance Weighted Autoencoders, arXiv 1509.00519
  [3] Higgins et al., beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework, ICLR 2017
  [4] Burgess et al., Understanding disentangling in beta-VAE, arXiv 1804.03599
  [5] Tomczak, Welling, VAE with a VampPrior, arXiv 1705.07120
  [6] van den Oord, Vinyals, Kavukcuoglu, Neural Discrete Representation Learning, arXiv 1711.00937
  [7] Xiao et al., Sparse Coding-based Variational Autoencoder, arXiv 2303.16666; LISTA: Gregor, LeCun, ICML 2010

Glossary
  paper        code          shape        meaning
  phi          encode(x)     2 x (B, Z)   mu and logvar of q(z|x)
  theta        decode(z)     as x         logits of pixels, or the mean of x; with its log variance
  w_i          log_weights   (k, B)       log p(x, z_i) - log q(z_i|x)
  u_k          pseudo        (K, *shape)  pseudo-inputs of the VampPrior
  C            capacity      ()           nats at which the KL is held [4]
  e, N, m      codes, count, total        the book of vq (K, D) and its moving sums [6]
  D            dictionary    (dim, A)     the atoms of sc as columns

Use
  python vae.py --dataset gmm                         2-D, beside its exact entropy
  python vae.py --dataset mnist --data-dir DIR        dynamic binarisation; test log-likelihood by L_1000
  python vae.py --model beta --beta 4 --dataset dsprites        disentanglement beside reconstruction

Not included: hierarchies of latents, normalising-flow posteriors, Gumbel-softmax.
"""

import inspect
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ---- maths


def kl_to_standard(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) in nats, elementwise. [1] appendix B"""
    return 0.5 * (mu.square() + logvar.expm1() - logvar)


def log_normal(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log N(x; mean, exp(logvar)), elementwise."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mean).square() * (-logvar).exp())


def log_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """log-probability of bits x in {-1, 1} with p(1) = sigmoid(logits), elementwise."""
    return F.logsigmoid(x * logits)


def reparameterize(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    return mu + (0.5 * logvar).exp() * eps


def log_mean_exp(x: Tensor, dim: int = 0) -> Tensor:
    return x.logsumexp(dim) - math.log(x.shape[dim])


def log_mixture(z: Tensor, mu: Tensor, logvar: Tensor, log_weight) -> Tensor:
    """log sum_k exp(log_weight_k) N(z; mu_k, diag exp(logvar_k)) of z (..., Z) and K components (K, Z), shape (...)."""
    precision = (-logvar).exp()                                                                # (K, Z)
    constant = (logvar + mu.square() * precision).sum(-1) + z.shape[-1] * math.log(2 * math.pi)
    distance = z.square() @ precision.T - 2 * z @ (mu * precision).T                           # never (..., K, Z)
    return (log_weight - 0.5 * (distance + constant)).logsumexp(-1)


def soft_threshold(v: Tensor, theta) -> Tensor:
    """argmin_z (z - v)^2 / 2 + theta |z|, elementwise."""
    return v.sign() * (v.abs() - theta).clamp(min=0)


def dct_dictionary(dim: int, atoms: int) -> Tensor:
    """(dim, atoms): cosines of rising frequency with unit norm; orthonormal for atoms = dim (the DCT-II)."""
    D = torch.cos(math.pi / atoms * (torch.arange(dim)[:, None] + 0.5) * torch.arange(atoms))
    return D / D.norm(dim=0)


def sparse_objective(h: Tensor, z: Tensor, D: Tensor, sparsity: float) -> Tensor:
    """|h - D z|^2 / 2 + sparsity |z|_1 for h (..., dim) and z (..., atoms), shape (...)."""
    return 0.5 * (h - z @ D.T).square().sum(-1) + sparsity * z.abs().sum(-1)


def nearest_code_plain(z, codes):
    """(N, D), (K, D) -> (N,): the index of the nearest code, the lowest of equals."""
    return (codes.square().sum(1) - 2 * z @ codes.T).argmin(1)


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


def mlp(d_in: int, d_out: int, width: int, depth: int = 2) -> nn.Sequential:
    """(B, d_in) -> (B, d_out) through `depth` layers of `width`."""
    sizes = [d_in, *[width] * depth]
    hidden = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*hidden, nn.Linear(width, d_out))


def pyramid(shape, width: int) -> tuple[nn.Sequential, nn.Sequential, tuple[int, int, int]]:
    """Strided convolutions from an image to a grid of at most 8 on a side, the way back, and the grid (c, h, w). Sides
    above 32 shrink by 4 at once: few wide pixels are cheaper than many narrow ones."""
    down, up, size = [], [], tuple(shape)
    while not down or max(size[1:]) > 8:
        s = 4 if max(size[1:]) > 32 else 2
        grid = width * (2 if down else 1), *(-(-n // s) for n in size[1:])
        crop = nn.ZeroPad2d((0, size[2] - s * grid[2], 0, size[1] - s * grid[1]))             # back to just this size
        down += [nn.Conv2d(size[0], grid[0], s + 1, s, s // 2), nn.SiLU()]
        up = [nn.Conv2d(grid[0], size[0] * s**2, 3, padding=1), nn.PixelShuffle(s), crop, nn.SiLU(), *up]
        size = grid
    return nn.Sequential(*down), nn.Sequential(*up[:-1]), grid


class CodePrior(nn.Module):
    """log p(k_1 .. k_P) of codes in raster order, index (B, P): a GRU that reads the last code and the one above."""

    def __init__(self, codes: int, grid: tuple[int, int], width: int = 64):
        super().__init__()
        self.positions, self.row, self.nothing = math.prod(grid), grid[1], codes
        self.embed, self.head = nn.Embedding(codes + 1, width), nn.Linear(width, codes)
        self.gru = nn.GRU(2 * width, width, batch_first=True)

    def forward(self, index: Tensor, state: Tensor | None = None, start: int = 0) -> tuple[Tensor, Tensor]:
        """Logits (B, P - start, codes) from position `start` on, each from the codes before it, and the GRU's state."""
        before, n = F.pad(index, (self.row, 0), value=self.nothing), index.shape[1]
        above, left = before[:, start:n], before[:, start + self.row - 1 : n + self.row - 1]
        h, state = self.gru(self.embed(torch.stack([left, above], 2)).flatten(2), state)
        return self.head(h), state

    def log_prob(self, index: Tensor) -> Tensor:
        """(B,) nats."""
        return -F.cross_entropy(self(index)[0].mT, index, reduction="none").sum(1)

    def sample(self, n: int) -> Tensor:
        index, state = torch.full((n, 0), self.nothing, device=self.head.weight.device), None
        for i in range(self.positions):
            logits, state = self(F.pad(index, (0, 1)), state, i)
            index = torch.cat([index, logits[:, 0].softmax(1).multinomial(1)], 1)
        return index


# ---- the family: an encoder, a decoder and a bound


class VAE(nn.Module):
    """`loss(x)`, `elbo(x)`, `bound(x, k)`, `code(x)`, `reconstruct(x)`, `sample(n)`; x (B, *shape), pixels in [-1, 1].

    likelihood: 'bernoulli', one bit a pixel: grey levels are probabilities and are drawn anew at each use (dynamic
    binarisation); 'gaussian', a density: a variance for each coordinate of vectors, one in all for images."""

    bounded, rate = True, "kl"                              # elbo and bound are there; the second term's name

    def __init__(self, shape, latent: int, likelihood: str = "gaussian", width: int = 128, network: str = "mlp"):
        super().__init__()
        self.shape, self.latent, self.likelihood = tuple(shape), latent, likelihood
        dim, self.variances = math.prod(shape), len(shape) == 1 and likelihood == "gaussian"
        self.networks(dim, dim * (2 if self.variances else 1), width, network)
        if self.variances:                                  # started at 1, it explains all and z is never used
            nn.init.constant_(self.decoder[-1].bias[dim:], -4.0)
        elif likelihood == "gaussian":
            self.logvar = nn.Parameter(torch.tensor(-4.0))

    def networks(self, dim: int, out: int, width: int, network: str):
        if network == "mlp":
            self.encoder = nn.Sequential(nn.Flatten(), mlp(dim, 2 * self.latent, width))
            self.decoder = mlp(self.latent, out, width)
        else:                                               # with one hidden layer between grid and z
            down, up, grid = pyramid(self.shape, width)
            flat = math.prod(grid)
            self.encoder = nn.Sequential(down, nn.Flatten(), mlp(flat, 2 * self.latent, 8 * width, 1))
            self.decoder = nn.Sequential(mlp(self.latent, flat, 8 * width, 1), nn.SiLU(), nn.Unflatten(1, grid), up)

    # -- p and q

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, 1)
        return mu, logvar.clamp(-12, 8)                     # a variance of 0 or infinity has no logarithm

    def decode(self, z: Tensor) -> tuple[Tensor, ...]:
        """(logits,), or (mean, logvar): what log_likelihood takes, (B, *shape)."""
        out = self.decoder(z)
        if self.variances:
            mean, logvar = out.chunk(2, 1)
            return mean, logvar.clamp(-12, 8)
        out = out.view(len(z), *self.shape)
        return (out,) if self.likelihood == "bernoulli" else (out, self.logvar.clamp(-12, 8))

    def binarize(self, x: Tensor) -> Tensor:
        """What the likelihood is of: for bernoulli -1 or 1, drawn with the grey level as probability of 1; else x."""
        if self.likelihood != "bernoulli":
            return x
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-2**63, None)
        u = words.view(torch.int16)[: x.numel()].view(x.shape) + 0.5            # 16 bits a pixel, on (-2^15, 2^15)
        return torch.copysign(torch.ones_like(x), 2**15 * x - u)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) in nats, (B,)."""
        law = log_bernoulli if self.likelihood == "bernoulli" else log_normal
        return law(x, *self.decode(z)).flatten(1).sum(1)

    def components(self) -> tuple[Tensor, Tensor]:
        """mu and logvar, (K, Z) each, of the Gaussians whose even mixture is the prior: N(0, I) alone."""
        zero = torch.zeros(1, self.latent, device=next(self.parameters()).device)
        return zero, zero

    def log_prior(self, z: Tensor) -> Tensor:
        """log p(z) for z (..., Z), shape (...)."""
        mu, logvar = self.components()
        return log_mixture(z, mu, logvar, -math.log(len(mu)))

    def sample_prior(self, n: int) -> Tensor:
        mu, logvar = self.components()
        k = torch.randint(len(mu), (n,), device=mu.device)
        return reparameterize(mu[k], logvar[k], torch.randn(n, self.latent, device=mu.device))

    def kl(self, mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
        """KL(q(z|x) || p(z)) in nats, (B,): exact, or its estimate at z ~ q."""
        return kl_to_standard(mu, logvar).sum(1)

    # -- bounds

    def terms(self, x: Tensor, learn: bool = False) -> tuple[Tensor, ...]:
        """-log p(x|z) and the KL, (B,) each, at one z ~ q(z|x) a row; what follows them is of the loss alone."""
        x = self.binarize(x)
        mu, logvar = self.encode(x)
        z = reparameterize(mu, logvar, torch.randn_like(mu))
        return -self.log_likelihood(x, z), self.kl(mu, logvar, z)

    def loss(self, x: Tensor, progress: float = 1.0) -> dict[str, Tensor]:
        """{loss, nll, kl}; progress runs from 0 to 1 in training."""
        terms = [term.mean() for term in self.terms(x, learn=self.training)]
        return {"loss": sum(terms), "nll": terms[0], self.rate: terms[1]}

    def elbo(self, x: Tensor) -> Tensor:
        """(B,) nats."""
        nll, kl, *_ = self.terms(x)
        return -nll - kl

    def log_weights(self, x: Tensor, k: int) -> Tensor:
        """(k, B): log p(x, z_i) - log q(z_i|x) at z_i ~ q, for x as binarize gives it."""
        mu, logvar = self.encode(x)
        z = reparameterize(mu, logvar, torch.randn(k, *mu.shape, dtype=mu.dtype, device=mu.device))
        log_p = self.log_likelihood(x.repeat(k, *[1] * len(self.shape)), z.flatten(0, 1)).view(k, -1)
        return log_p + self.log_prior(z) - log_normal(z, mu, logvar).sum(-1)

    def bound(self, x: Tensor, k: int, block: int = 50) -> Tensor:
        """L_k, (B,) nats: a lower bound on log p(x) that rises with k. [2] theorem 1"""
        x = self.binarize(x)
        return log_mean_exp(torch.cat([self.log_weights(x, min(block, k - i)) for i in range(0, k, block)]))

    def nodes(self) -> tuple[Tensor, Tensor]:
        """z (n, 2) and log(p(z) dz) (n,): the prior of a latent of two dimensions as a sum, a grid a component."""
        if self.latent != 2:
            raise ValueError(f"log p(x) as a sum over z wants a latent of two dimensions; this has {self.latent}")
        mu, logvar = self.components()
        cells = max(6, round(100 / len(mu) ** 0.5))
        axis = ((torch.arange(cells, device=mu.device) + 0.5) / cells - 0.5) * 9              # midpoints
        e, zero = torch.cartesian_prod(axis, axis), torch.zeros(())
        log_p = log_normal(e, zero, zero).sum(1) + 2 * math.log(9 / cells) - math.log(len(mu))
        return reparameterize(mu[:, None], logvar[:, None], e).flatten(0, 1), log_p.repeat(len(mu))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), (B,) nats, for vectors: the sum over nodes()."""
        z, log_weight = self.nodes()
        p_x = self.decode(z)
        return torch.cat([log_mixture(part, *p_x, log_weight) for part in x.split(64)])

    # -- what comes out

    def mean(self, z: Tensor) -> Tensor:
        """E[x|z], (B, *shape)."""
        out = self.decode(z)[0]
        return 2 * out.sigmoid() - 1 if self.likelihood == "bernoulli" else out

    def code(self, x: Tensor) -> Tensor:
        """The z that stands for x."""
        return self.encode(x)[0]

    @torch.inference_mode()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.mean(self.code(x))

    @torch.inference_mode()
    def sample(self, n: int) -> Tensor:
        """(n, *shape): z from the prior; of p(x|z) a draw for vectors and the mean for images, as is the custom."""
        z = self.sample_prior(n)
        if not self.variances:
            return self.mean(z)
        return reparameterize(*self.decode(z), torch.randn(n, *self.shape, device=z.device))


class BetaVAE(VAE):
    """nll + beta KL [3]; with a capacity, nll + beta |KL - C| while C rises to it [4]."""

    def __init__(self, *args, beta: float = 4.0, capacity: float = 0.0, **options):
        super().__init__(*args, **options)
        self.beta, self.capacity = beta, capacity

    def loss(self, x, progress=1.0):
        row = super().loss(x)
        kl = (row["kl"] - self.capacity * progress).abs() if self.capacity else row["kl"]
        return {**row, "loss": row["nll"] + self.beta * kl}


class IWAE(VAE):
    """Trained on L_k itself: the gradient weighs each z_i by its softmax(log w_i). [2] section 3"""

    def __init__(self, *args, k: int = 8, **options):
        super().__init__(*args, **options)
        self.k = k

    def loss(self, x, progress=1.0):
        return {"loss": -log_mean_exp(self.log_weights(self.binarize(x), self.k)).mean()}


class VampVAE(VAE):
    """The prior is the aggregate posterior's stand-in: 1/K sum_k q(z|u_k) with learned u_k. [5]"""

    def __init__(self, *args, pseudo: int = 100, **options):
        super().__init__(*args, **options)
        self.pseudo = nn.Parameter(0.5 * torch.randn(pseudo, *self.shape))

    def components(self):                                   # pseudo-images are kept in [-1, 1]
        return self.encode(self.pseudo.clamp(-1, 1) if len(self.shape) > 1 else self.pseudo)

    def kl(self, mu, logvar, z):
        return log_normal(z, mu, logvar).sum(1) - self.log_prior(z)


class GridVAE(VAE):
    """One with P codes of `latent` numbers each: a grid over an image, a single one for a point."""

    def networks(self, dim, out, width, network):
        if len(self.shape) == 1:
            self.grid, self.encoder, self.decoder = (1, 1), mlp(dim, self.latent, width), mlp(self.latent, out, width)
            return
        down, up, (c, *self.grid) = pyramid(self.shape, width)
        self.encoder = nn.Sequential(down, nn.Conv2d(c, self.latent, 3, padding=1))
        self.decoder = nn.Sequential(nn.Conv2d(self.latent, c, 3, padding=1), nn.SiLU(), up)

    def encode(self, x):
        """(B, P, latent)."""
        return self.encoder(x).view(len(x), self.latent, -1).mT

    def decode(self, z):
        return super().decode(z[:, 0] if len(self.shape) == 1 else z.mT.reshape(len(z), -1, *self.grid))


class VQVAE(GridVAE):
    """Each vector of the grid becomes the nearest code of a book. [6]

    q is a point, so L(x) = log p(x|z) + log p(k) is exact, and -L the bits that x costs as codes and what they leave
    open. The book follows its vectors as a moving mean ([6] appendix A.1); the prior p(k) is learned beside."""

    def __init__(self, *args, codes: int = 128, commitment: float = 0.25, decay: float = 0.99, **options):
        super().__init__(*args, **options)
        self.commitment, self.decay, self.prior = commitment, decay, CodePrior(codes, self.grid)
        self.register_buffer("codes", torch.randn(codes, self.latent))
        self.register_buffer("count", torch.zeros(codes))   # none in use: the first batch fills the book
        self.register_buffer("total", torch.zeros(codes, self.latent))

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P, D) -> the nearest codes, as z, and their index (B, P)."""
        index = fused("nearest_code", nearest_code_plain)(z.detach().flatten(0, 1), self.codes).view(z.shape[:2])
        return self.codes[index], index

    def code(self, x):
        return self.quantize(self.encode(x))[0]

    def terms(self, x, learn=False):
        """-log p(x|z), -log p(k) and the pull of the codes on the encoder, (B,) each; to learn moves the book."""
        x = self.binarize(x)
        z = self.encode(x)
        e, index = self.quantize(z)
        if learn:
            self.follow(z.detach().flatten(0, 1), index.flatten())
        straight = z + (e - z).detach()                     # the code, with the gradient of z: [6] section 3.2
        commitment = self.commitment * (z - e).square().sum((1, 2))                           # [6] (3)
        return -self.log_likelihood(x, straight), -self.prior.log_prob(index), commitment

    @torch.no_grad()
    def follow(self, z: Tensor, index: Tensor):
        """Move the book towards the means of the vectors z (M, D) that chose each code. A code that hardly any vector
        chooses starts again at one drawn from z."""
        sums = z.new_zeros(len(self.codes), z.shape[1] + 1)
        sums.index_add_(0, index, F.pad(z, (0, 1), value=1.0))
        drawn = z[torch.randint(len(z), (len(self.codes),), device=z.device)]
        if dist.is_available() and dist.is_initialized():   # all processes keep one book
            dist.all_reduce(sums)
            dist.broadcast(drawn, 0)
        self.total.lerp_(sums[:, :-1], 1 - self.decay)                                        # [6] (7)
        self.count.lerp_(sums[:, -1], 1 - self.decay)                                         # [6] (6)
        usual = self.count.mean()
        dead = self.count < 0.03 * usual
        self.total[dead], self.count[dead] = usual * drawn[dead], usual
        self.codes.copy_(self.total / self.count[:, None])                                    # [6] (8)

    def bound(self, x, k, block=50):
        return self.elbo(x)                                 # q is a point: all samples of z are the same

    def sample_prior(self, n):
        return self.codes[self.prior.sample(n)]

    def nodes(self):
        index = torch.arange(len(self.codes), device=self.codes.device)[:, None]
        return self.codes[index], self.prior.log_prob(index)


class SCVAE(GridVAE):
    """Each vector h of the grid becomes D z with a sparse z, by LISTA on a fixed dictionary of cosines. [7]

    There is no q and no bound. `fit` makes a prior of the codes of some data; `sample` wants it."""

    bounded, rate = False, "objective"

    def __init__(self, *args, codes: int = 128, sparsity: float = 0.1, unrolled: int = 8, **options):
        super().__init__(*args, **options)
        D = dct_dictionary(self.latent, codes)
        L = torch.linalg.matrix_norm(D, 2).item() ** 2
        self.sparsity, self.unrolled = sparsity, unrolled
        self.register_buffer("dictionary", D)
        self.forward_weight, self.lateral = nn.Parameter(D / L), nn.Parameter(torch.eye(codes) - D.T @ D / L)
        self.theta = nn.Parameter(torch.full((codes,), sparsity / L))

    def encode(self, x):                                    # of unit size: `sparsity` means the same everywhere
        return F.rms_norm(super().encode(x), (self.latent,))

    def lista(self, h: Tensor) -> Tensor:
        """(..., latent) -> sparse codes (..., codes). It starts as ISTA on sparse_objective, `unrolled` steps from 0 of
        z <- soft_threshold(z + D^T (h - D z) / L, sparsity / L)."""
        b, theta = h @ self.forward_weight, self.theta.clamp(min=0)
        z = soft_threshold(b, theta)
        for _ in range(self.unrolled - 1):
            z = soft_threshold(b + z @ self.lateral, theta)
        return z

    def code(self, x):
        return self.lista(self.encode(x))

    def decode(self, z):
        return super().decode(z @ self.dictionary.T)

    def terms(self, x, learn=False):
        """-log p(x|z) and the objective of the sparse codes, (B,) each."""
        x = self.binarize(x)
        h = self.encode(x)
        z = self.lista(h)
        return -self.log_likelihood(x, z), sparse_objective(h, z, self.dictionary, self.sparsity).sum(1)

    @torch.no_grad()
    def fit(self, x: Tensor):
        """A Gaussian copula of the codes of x: each coordinate keeps its values, each pair its rank correlation."""
        z = self.code(x).flatten(1)
        order = (z + 1e-6 * torch.randn_like(z)).argsort(0).argsort(0)                        # equal values: by lot
        self.values, self.scores = z.sort(0).values, torch.special.ndtri((order + 0.5) / len(z))

    def sample_prior(self, n):
        if not hasattr(self, "values"):
            raise ValueError("sparse codes have no prior of their own: call fit(x) with some data first")
        N = len(self.scores)
        u = torch.randn(n, N, device=self.scores.device) @ self.scores / N**0.5               # their correlation matrix
        rank = (torch.special.ndtr(u) * N).long().clamp(max=N - 1)
        return self.values.gather(0, rank).view(n, -1, self.dictionary.shape[1])


MODELS = {"vae": VAE, "beta": BetaVAE, "iwae": IWAE, "vamp": VampVAE, "vq": VQVAE, "sc": SCVAE}


def train(model: VAE, optimizer, batches, steps: int, lr: float, start: int = 0, share: slice = slice(None)):
    """Gradient ascent on a bound, with a warm-up and a cosine to zero."""
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        row = model.loss(next(batches)[share], (step + 1) / steps)
        optimizer.zero_grad()
        row["loss"].backward()
        optimizer.step()
        yield {name: value.detach() for name, value in row.items()}


def build(config: dict, shape, levels) -> VAE:
    """The model that the options of a run, or of a checkpoint, describe; levels None for points."""
    member, network, likelihood = MODELS[config["model"]], config["network"], config["likelihood"]
    if network == "auto":
        network = "conv" if levels and (issubclass(member, GridVAE) or math.prod(shape) > 1024) else "mlp"
    if likelihood == "auto":
        likelihood = "bernoulli" if levels and shape[0] == 1 else "gaussian"
    if not levels and (likelihood == "bernoulli" or network == "conv"):
        raise ValueError("points have no bits and no pixels: --likelihood bernoulli and --network conv are for images")
    options = {name: config[name] for name in inspect.signature(member).parameters if name in config}
    options |= {"latent": config["code_dim" if issubclass(member, GridVAE) else "latent"], "likelihood": likelihood,
                "width": config["channels" if network == "conv" else "width"], "network": network}
    return member(shape, **options)


@torch.inference_mode()
def evaluate(model: VAE, x: Tensor, k: int, rows: int = 50) -> dict[str, Tensor]:
    """reconstruction, -log p(x|z); with a bound rate, the KL, elbo and nll, -L_k; else objective: (N,) each."""
    nll, rate = (torch.cat(term) for term in zip(*[model.terms(part)[:2] for part in x.split(rows)]))
    out = {"reconstruction": nll, "rate" if model.bounded else model.rate: rate}
    bounds = lambda: {"elbo": -nll - rate, "nll": -torch.cat([model.bound(part, k) for part in x.split(rows)])}
    return out | bounds() if model.bounded else out


def main():
    import time

    import data
    import latents
    import metrics
    import run

    args = run.parse(
        __doc__, MODELS, model="vamp", steps=3000, batch=512, lr=2e-3,
        training={"latent": (2, "dimensions of z"), "width": (128, "of the MLPs"), "channels": (32, "of convolutions"),
                  "network": ("auto", "encoder and decoder", ["auto", "mlp", "conv"]),
                  "likelihood": ("auto", "of x given z", ["auto", "bernoulli", "gaussian"]),
                  "beta": (4.0, "weight of the KL (beta)"), "capacity": (0.0, "nats it is held at; 0: none (beta)"),
                  "k": (8, "samples of the bound in training (iwae)"), "pseudo": (200, "pseudo-inputs (vamp)"),
                  "codes": (128, "of the book (vq), atoms (sc)"), "code_dim": (8, "numbers in a code (vq, sc)"),
                  "sparsity": (0.1, "weight of |z|_1 (sc)"), "size": (0, "of images, in pixels; 0 keeps them")},
        sampling={"bound_samples": (1000, "k of the likelihood"), "bound_rows": (500, "examples it is measured on")},
        images={"model": "vae", "steps": 10_000, "batch": 128, "lr": 1e-3, "latent": 40, "width": 400, "samples": 1000,
                "mnist": {"steps": 36_000, "bound_rows": 1000}, "vq": {"steps": 2500, "batch": 64},
                "dsprites": {"model": "beta", "latent": 10, "batch": 32, "steps": 5000, "bound_samples": 20},
                "faces": {"latent": 64, "batch": 8, "lr": 2e-3, "steps": 18000, "bound_samples": 20, "bound_rows": 200},
                "sc": {"steps": 2500, "batch": 64}})
    with run.Run(args) as job:
        truth = data.load(args.dataset, args.data_dir, size=args.size or None, download=args.download,
                          skip_bad=args.skip_bad)
        density = hasattr(truth, "log_prob")
        learnt = lambda n: truth.sample(n, **{} if density else {"split": "train"}).to(job.device)
        if args.model == "vq" and not density and args.codes > len(truth.train):
            raise ValueError(f"a book of {args.codes} codes is larger than the {len(truth.train)} images to learn from")
        model = build(vars(args), truth.shape, None if density else truth.levels).to(job.device)
        frames, seen = {}, truth.sample(256 if density else 32).to(job.device)
        fixed = model.sample_prior(len(seen)) if model.bounded else model.code(seen)
        if args.ckpt:
            job.restore(model=model)
        else:
            if args.model == "vamp":                        # start among the data
                model.pseudo.data.copy_(learnt(args.pseudo))
            optimizer = torch.optim.Adam(model.parameters(), args.lr, betas=(0.9, 0.99), fused=True)
            start = job.keep(model=model, optimizer=optimizer)
            rows = train(model, optimizer, truth.batches(args.batch, job.device), args.steps, args.lr, start, job.share)
            floors = density and model.bounded and {"loss": truth.entropy}
            for step, _ in enumerate(job.track(rows, floors=floors), start + 1):
                if step % max(1, args.steps // 40) == 0:    # images: reconstructions above samples
                    shown = [model.mean(fixed)] if density else [model.reconstruct(seen), model.mean(fixed)]
                    frames[f"step {step}"] = torch.cat(shown).detach().cpu()
        if args.model == "sc":
            model.fit(learnt(1000))

        began = time.perf_counter()
        samples = torch.cat([model.sample(min(1000, args.samples - i)).cpu() for i in range(0, args.samples, 1000)])
        seconds = time.perf_counter() - began
        scores = evaluate(model, truth.sample(args.bound_rows).to(job.device), args.bound_samples)
        results, samples = job.judge(samples, truth)
        if not density:
            results |= latents.report(model, truth, job.folder)
        floors = {"elbo": -truth.entropy, "nll": truth.entropy} if density else {}
        for name, value in scores.items():
            better = "higher" if name == "elbo" else "lower"
            results[name] = metrics.metric(value.mean(), floors.get(name), "nats", better)
        if model.bounded:
            results["nll_standard_error"] = metrics.metric(scores["nll"].std() / args.bound_rows**0.5, None, "nats")
            if density and (args.model == "vq" or args.latent == 2):
                kl = metrics.exact_kl(model.log_prob, truth, 120, device=job.device)
                results["kl"] = metrics.metric(kl, 0, "nats")
        job.report(results, samples, truth, sum(p.numel() for p in model.parameters()), seconds, frames=frames)


if __name__ == "__main__":
    main()
