"""Variational autoencoders: an encoder, a decoder and a bound on log p(x).

    log p(x) >= L(x) = E_q(z|x) log p(x|z) - KL(q(z|x) || p(z))                          [1] (3)
    log p(x) >= L_k(x) = E log 1/k sum_i p(x, z_i) / q(z_i|x) >= L(x)                    [2] theorem 1
    q(z|x) = N(mu(x), diag exp(logvar(x))),   z = mu + exp(logvar / 2) eps

`--model`: vae [1]; beta, whose KL weighs beta or is held at a rising capacity [3, 4]; iwae, trained on L_k [2]; vamp,
whose prior is the mixture of q at learned pseudo-inputs [5]. All four report the same likelihood, L_k with k = 1000.

Everything is in nats, summed over pixels and latents and averaged over examples: with means over pixels instead beta
would silently be multiplied by their number.

References
  [1] Kingma, Welling, Auto-Encoding Variational Bayes, arXiv 1312.6114
  [2] Burda, Grosse, Salakhutdinov, Importance Weighted Autoencoders, arXiv 1509.00519
  [3] Higgins et al., beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework, ICLR 2017
  [4] Burgess et al., Understanding disentangling in beta-VAE, arXiv 1804.03599
  [5] Tomczak, Welling, VAE with a VampPrior, arXiv 1705.07120

Glossary
  paper        code          shape        meaning
  phi          encode(x)     2 x (B, Z)   mu and logvar of q(z|x)
  theta        decode(z)     as x         logits of pixels, or the mean of x; with its log variance
  w_i          log_weights   (k, B)       log p(x, z_i) - log q(z_i|x)
  u_k          pseudo        (K, *shape)  pseudo-inputs of the VampPrior
  C            capacity      ()           nats at which the KL is held [4]

Use
  python vae.py --dataset gmm                         2-D, beside its exact entropy
  python vae.py --dataset mnist --data-dir DIR        dynamic binarisation; test log-likelihood by L_1000
  python vae.py --model vamp --dataset persian

Not included: hierarchies of latents, normalising-flow posteriors, discrete latents.
"""

import math

import torch
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
    """x log p + (1 - x) log(1 - p) with p = sigmoid(logits), elementwise; a log-probability for x in {0, 1}."""
    return x * logits - F.softplus(logits)


def reparameterize(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    return mu + (0.5 * logvar).exp() * eps


def log_mean_exp(x: Tensor, dim: int = 0) -> Tensor:
    return x.logsumexp(dim) - math.log(x.shape[dim])


def log_mixture(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log 1/K sum_k N(z; mu_k, diag exp(logvar_k)) for z (..., Z) and K components (K, Z), shape (...). [5]

    The square is multiplied out, so that the distances are two matrix products and never (..., K, Z)."""
    precision = (-logvar).exp()                                                                # (K, Z)
    constant = (logvar + mu.square() * precision).sum(-1) + z.shape[-1] * math.log(2 * math.pi)
    distance = z.square() @ precision.T - 2 * z @ (mu * precision).T                           # (..., K)
    return log_mean_exp(-0.5 * (distance + constant), -1)


def square(half_width: float, cells: int) -> tuple[Tensor, float]:
    """Midpoints (cells^2, 2) of a grid on [-half_width, half_width]^2, and the log of a cell's area."""
    axis = ((torch.arange(cells) + 0.5) / cells * 2 - 1) * half_width
    return torch.cartesian_prod(axis, axis), 2 * math.log(2 * half_width / cells)


# ---- networks


def mlp(d_in: int, d_out: int, width: int, depth: int = 2) -> nn.Sequential:
    """(B, d_in) -> (B, d_out) through `depth` layers of `width`."""
    sizes = [d_in, *[width] * depth]
    hidden = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*hidden, nn.Linear(width, d_out))


def halvings(shape) -> list[tuple[int, int]]:
    """Sizes (H, W) from the image, halved once at least, down to a grid of at most 8 on a side for the dense layer."""
    sizes = [tuple(shape[1:])]
    while len(sizes) < 2 or max(sizes[-1]) > 8:
        sizes.append(tuple(-(-s // 2) for s in sizes[-1]))
    return sizes


class ConvEncoder(nn.Sequential):
    """(B, C, H, W) -> (B, d_out): a stride-2 convolution a halving, then one hidden layer."""

    def __init__(self, shape, d_out: int, width: int):
        sizes = halvings(shape)
        channels = [shape[0], *(width * 2 ** min(i, 1) for i in range(len(sizes) - 1))]
        halves = [layer for a, b in zip(channels, channels[1:]) for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.SiLU())]
        flat = channels[-1] * math.prod(sizes[-1])
        super().__init__(*halves, nn.Flatten(), nn.Linear(flat, 8 * width), nn.SiLU(), nn.Linear(8 * width, d_out))


class ConvDecoder(nn.Module):
    """(B, Z) -> (B, *shape): the encoder's mirror, with transposed convolutions."""

    def __init__(self, shape, latent: int, width: int):
        super().__init__()
        sizes = halvings(shape)[::-1]
        channels = [shape[0], *(width * 2 ** min(i, 1) for i in range(len(sizes) - 1))][::-1]
        self.start, flat = (channels[0], *sizes[0]), channels[0] * math.prod(sizes[0])
        self.dense = nn.Sequential(nn.Linear(latent, 8 * width), nn.SiLU(), nn.Linear(8 * width, flat), nn.SiLU())
        layers = []
        for a, b, size in zip(channels, channels[1:], sizes[1:]):
            layers += [nn.ConvTranspose2d(a, b, 4, 2, 1), nn.SiLU(), Crop(*size)]
        layers.pop(-2)                                      # the last is linear
        self.grow = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.grow(self.dense(z).view(-1, *self.start))


class Crop(nn.Module):
    def __init__(self, H: int, W: int):
        super().__init__()
        self.H, self.W = H, W

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.H, : self.W]


# ---- the family: an encoder, a decoder and a bound


class VAE(nn.Module):
    """`loss(x, progress)`, `elbo(x)`, `bound(x, k)`, `reconstruct(x)`, `sample(n)`. x (B, *shape), pixels in [-1, 1].

    likelihood: 'bernoulli', one bit a pixel: grey levels are probabilities and are drawn anew at each use (dynamic
    binarisation); 'gaussian', a density: a variance for each coordinate of vectors, one in all for images."""

    def __init__(self, shape, latent: int, likelihood: str = "gaussian", width: int = 128, network: str = "mlp"):
        super().__init__()
        if latent < 1:
            raise ValueError(f"the latent needs at least one dimension; got {latent}")
        if width < 1:
            raise ValueError(f"the networks need a width of at least 1; got {width}")
        self.shape, self.latent, self.likelihood = tuple(shape), latent, likelihood
        dim, self.variances = math.prod(shape), len(shape) == 1 and likelihood == "gaussian"
        if network == "conv":
            self.encoder, self.decoder = ConvEncoder(shape, 2 * latent, width), ConvDecoder(shape, latent, width)
        else:
            self.encoder = nn.Sequential(nn.Flatten(), mlp(dim, 2 * latent, width))
            self.decoder = mlp(latent, dim * (2 if self.variances else 1), width)
            if self.variances:                              # started at 1, it explains all and z is never used
                nn.init.constant_(self.decoder[-1].bias[dim:], -4.0)
        if likelihood == "gaussian" and not self.variances:
            self.logvar = nn.Parameter(torch.tensor(-1.0))

    # -- p and q

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, 1)
        return mu, logvar.clamp(-12, 8)                     # a variance of 0 or infinity has no logarithm

    def decode(self, z: Tensor) -> tuple[Tensor, ...]:
        """(logits,), or (mean, logvar): what log_likelihood and draw take, (B, *shape)."""
        out = self.decoder(z)
        if self.variances:
            mean, logvar = out.chunk(2, 1)
            return mean, logvar.clamp(-12, 8)
        out = out.view(len(z), *self.shape)
        return (out,) if self.likelihood == "bernoulli" else (out, self.logvar.clamp(-12, 8))

    def binarize(self, x: Tensor) -> Tensor:
        """What the likelihood is of: for bernoulli -1 or 1, drawn with the grey level as probability of 1; else x."""
        return 2 * torch.bernoulli((x + 1) / 2) - 1 if self.likelihood == "bernoulli" else x

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) in nats, (B,)."""
        terms = (log_bernoulli((x + 1) / 2, *self.decode(z)) if self.likelihood == "bernoulli"
                 else log_normal(x, *self.decode(z)))
        return terms.flatten(1).sum(1)

    def log_prior(self, z: Tensor) -> Tensor:
        """log p(z) for z (..., Z), shape (...)."""
        return log_normal(z, torch.zeros_like(z), torch.zeros_like(z)).sum(-1)

    def sample_prior(self, n: int) -> Tensor:
        return torch.randn(n, self.latent, device=next(self.parameters()).device)

    def kl(self, mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
        """KL(q(z|x) || p(z)) in nats, (B,): exact, or its estimate at z ~ q."""
        return kl_to_standard(mu, logvar).sum(1)

    # -- bounds

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(-log p(x|z), KL), (B,) each, at one z ~ q(z|x) a row."""
        x = self.binarize(x)
        mu, logvar = self.encode(x)
        z = reparameterize(mu, logvar, torch.randn_like(mu))
        return -self.log_likelihood(x, z), self.kl(mu, logvar, z)

    def loss(self, x: Tensor, progress: float = 1.0) -> dict[str, Tensor]:
        """{loss, nll, kl}; progress runs from 0 to 1 in training."""
        nll, kl = (term.mean() for term in self.terms(x))
        return {"loss": nll + kl, "nll": nll, "kl": kl}

    def elbo(self, x: Tensor) -> Tensor:
        """(B,) nats."""
        nll, kl = self.terms(x)
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
        """z (n, 2) and log(p(z) dz) (n,): the prior of a latent of two dimensions as a sum."""
        z, log_cell = square(5.0, 160)
        return z, self.log_prior(z) + log_cell

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), (B,) nats, by quadrature over a latent of two dimensions."""
        if self.latent != 2 or not self.variances:
            raise ValueError("log p(x) by quadrature wants vectors and a latent of two dimensions")
        z, log_weight = self.nodes()
        mean, logvar = self.decode(z)
        precision = (-logvar).exp()
        constant = -0.5 * (logvar + mean.square() * precision + math.log(2 * math.pi)).sum(1)
        # log p(z) p(x|z) dz is linear in (x^2, x, 1): one product for all pairs
        columns = torch.cat([-0.5 * precision, mean * precision, (log_weight + constant)[:, None]], 1)
        rows = torch.cat([x.square(), x, torch.ones_like(x[:, :1])], 1)
        return torch.cat([(part @ columns.T).logsumexp(1) for part in rows.split(64)])

    # -- what comes out

    def mean(self, z: Tensor) -> Tensor:
        """E[x|z], (B, *shape)."""
        out = self.decode(z)[0]
        return 2 * out.sigmoid() - 1 if self.likelihood == "bernoulli" else out

    @torch.inference_mode()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.mean(self.encode(x)[0])

    @torch.inference_mode()
    def sample(self, n: int) -> Tensor:
        """(n, *shape): z from the prior, then x from p(x|z) for vectors and its mean, which is what people show, for
        images."""
        z = self.sample_prior(n)
        if not self.variances:
            return self.mean(z)
        return reparameterize(*self.decode(z), torch.randn(n, *self.shape, device=z.device))


class BetaVAE(VAE):
    """nll + beta KL [3]; with a capacity, nll + beta |KL - C| while C rises to it [4]."""

    def __init__(self, *args, beta: float = 4.0, capacity: float = 0.0, **options):
        super().__init__(*args, **options)
        if not (beta >= 0 and capacity >= 0):
            raise ValueError(f"beta and the capacity cannot be negative; got {beta} and {capacity}")
        self.beta, self.capacity = beta, capacity

    def loss(self, x, progress=1.0):
        row = super().loss(x)
        kl = (row["kl"] - self.capacity * progress).abs() if self.capacity else row["kl"]
        return {**row, "loss": row["nll"] + self.beta * kl}


class IWAE(VAE):
    """Trained on L_k itself: the gradient weighs each z_i by its softmax(log w_i). [2] section 3"""

    def __init__(self, *args, k: int = 8, **options):
        super().__init__(*args, **options)
        if k < 1:
            raise ValueError(f"the bound needs at least one sample; got k = {k}")
        self.k = k

    def loss(self, x, progress=1.0):
        return {"loss": -log_mean_exp(self.log_weights(self.binarize(x), self.k)).mean()}


class VampVAE(VAE):
    """The prior is the aggregate posterior's stand-in: 1/K sum_k q(z|u_k) with learned u_k. [5]"""

    def __init__(self, *args, pseudo: int = 100, **options):
        super().__init__(*args, **options)
        if pseudo < 1:
            raise ValueError(f"the VampPrior needs at least one pseudo-input; got {pseudo}")
        self.pseudo = nn.Parameter(0.5 * torch.randn(pseudo, *self.shape))

    def components(self) -> tuple[Tensor, Tensor]:
        """mu and logvar of the prior, (K, Z) each; pseudo-images are kept in [-1, 1]."""
        return self.encode(self.pseudo.clamp(-1, 1) if len(self.shape) > 1 else self.pseudo)

    def log_prior(self, z):
        return log_mixture(z, *self.components())

    def sample_prior(self, n):
        mu, logvar = self.components()
        k = torch.randint(len(mu), (n,), device=mu.device)
        return reparameterize(mu[k], logvar[k], torch.randn(n, self.latent, device=mu.device))

    def kl(self, mu, logvar, z):
        return log_normal(z, mu, logvar).sum(1) - self.log_prior(z)

    def nodes(self):                                        # a grid on each component: they may be narrow
        mu, logvar = self.components()
        e, log_cell = square(4.0, 20)
        log_p = log_normal(e, torch.zeros(()), torch.zeros(())).sum(1) + log_cell - math.log(len(mu))
        return reparameterize(mu[:, None], logvar[:, None], e).flatten(0, 1), log_p.repeat(len(mu))


MODELS = {"vae": VAE, "beta": BetaVAE, "iwae": IWAE, "vamp": VampVAE}


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
    own = {"beta": {"beta": config["beta"], "capacity": config["capacity"]}, "iwae": {"k": config["k"]},
           "vamp": {"pseudo": config["pseudo"]}}.get(config["model"], {})
    likelihood = config["likelihood"]
    if likelihood == "auto":
        likelihood = "bernoulli" if levels and shape[0] == 1 else "gaussian"
    if likelihood == "bernoulli" and not levels:
        raise ValueError("points have no bits: --likelihood bernoulli is for images")
    if config["network"] == "conv" and not levels:
        raise ValueError("points have no pixels to convolve: --network conv is for images")
    return MODELS[config["model"]](shape, config["latent"], likelihood=likelihood, width=config["width"],
                                   network=config["network"], **own)


@torch.inference_mode()
def evaluate(model: VAE, x: Tensor, k: int, rows: int = 50) -> tuple[Tensor, Tensor]:
    """(ELBO, L_k), (N,) nats each."""
    parts = x.split(rows)
    return torch.cat([model.elbo(p) for p in parts]), torch.cat([model.bound(p, k) for p in parts])


def main():
    import time

    import data
    import metrics
    import run

    args = run.parse(
        __doc__, MODELS, model="vamp", steps=6000, batch=512, lr=2e-3,
        training={"latent": (2, "dimensions of z"), "width": (128, "of the networks"),
                  "network": ("mlp", "encoder and decoder", ["mlp", "conv"]),
                  "likelihood": ("auto", "of x given z", ["auto", "bernoulli", "gaussian"]),
                  "beta": (4.0, "weight of the KL (model beta)"),
                  "capacity": (0.0, "nats at which the KL is held in the end; 0 does not hold it (model beta)"),
                  "k": (8, "samples of the bound in training (model iwae)"),
                  "pseudo": (200, "pseudo-inputs (model vamp)"),
                  "size": (0, "resize images to this many pixels; 0 keeps them")},
        sampling={"bound_samples": (1000, "k of the reported likelihood"),
                  "bound_rows": (500, "held-out examples it is measured on")},
        images={"model": "vae", "steps": 10_000, "batch": 128, "lr": 1e-3, "latent": 40, "width": 400, "samples": 1000})
    with run.Run(args) as job:
        truth = data.load(args.dataset, args.data_dir, size=args.size or None, download=args.download)
        density = hasattr(truth, "log_prob")
        model = build(vars(args), truth.shape, None if density else truth.levels).to(job.device)
        frames, fixed = {}, model.sample_prior(256 if density else 64)
        if args.ckpt:
            job.restore(model=model)
        else:
            if args.model == "vamp":                        # start among the data
                start = truth.sample(args.pseudo) if density else truth.sample(args.pseudo, split="train")
                model.pseudo.data.copy_(start)
            optimizer = torch.optim.Adam(model.parameters(), args.lr, betas=(0.9, 0.99), fused=True)
            start = job.keep(model=model, optimizer=optimizer)
            rows = train(model, optimizer, truth.batches(args.batch, job.device), args.steps, args.lr, start, job.share)
            floors = {"loss": truth.entropy} if density else {}
            for step, _ in enumerate(job.track(rows, floors=floors), start + 1):
                if step % max(1, args.steps // 40) == 0:
                    frames[f"step {step}"] = model.mean(fixed).detach().cpu()

        began = time.perf_counter()
        samples = torch.cat([model.sample(min(1000, args.samples - i)).cpu() for i in range(0, args.samples, 1000)])
        seconds = time.perf_counter() - began
        held_out = truth.sample(args.bound_rows).to(job.device)
        with job.bar(1, f"L_{args.bound_samples}") as bar:
            elbo, bound = evaluate(model, held_out, args.bound_samples)
            bar.update()
        if density:
            results = metrics.two_dimensional(samples, truth)
            if args.latent == 2:
                kl = metrics.exact_kl(model.log_prob, truth, 200, device=job.device)
                results["kl"] = metrics.metric(kl, 0.0, "nats")
        else:
            samples = truth.unscale(samples)
            results = metrics.images(samples, truth)
        entropy = truth.entropy if density else None
        results["elbo"] = metrics.metric(elbo.mean(), -entropy if density else None, "nats", "higher")
        results["nll"] = metrics.metric(-bound.mean(), entropy, "nats")
        error = float(bound.std() / len(bound) ** 0.5)
        job.report(results, samples, truth, sum(p.numel() for p in model.parameters()), seconds, frames=frames,
                   nll_standard_error=error)


if __name__ == "__main__":
    main()
