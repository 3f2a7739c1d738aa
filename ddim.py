"""Denoising diffusion implicit models: one trained network, a family of samplers from random to deterministic.

    x_s = sqrt(abar_s) x_0(x_t) + sqrt(1 - abar_s - sigma^2) eps(x_t) + sigma z                    [1] (12)
    sigma = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s)                        [1] (16)

eta = 1 is the ancestral sampler of DDPM, eta = 0 is deterministic: Euler's method for the ODE
d(x / sqrt(abar)) = eps(x, t) d sqrt(1 / abar - 1), [1] (14), which also runs backwards (`encode`), so x_T is a code.
Training does not know the sampler: `--ckpt` takes what ddpm.py trained; without it this file trains its own.
Times run t = 0..T with t = 0 the data (abar_0 = 1), so t = 1..T is the paper's; a step goes from t to s < t.

References
  [1] Song, Meng, Ermon, Denoising Diffusion Implicit Models, arXiv 2010.02502 (its alpha_t is DDPM's abar_t)
  [2] Ho, Jain, Abbeel, Denoising Diffusion Probabilistic Models, arXiv 2006.11239
  [3] Salimans, Ho, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512

Glossary
  paper       code                 shape     meaning
  alpha_t     alphas_cumprod[t]    (T + 1,)  share of the data's variance left at t
  tau         times                (S,)      the times visited, falling
  eta         eta                  scalar    0 deterministic, 1 as random as DDPM
  sigma-hat   sigma_hat=True                 the larger variance 1 - abar_t / abar_s of [1] Table 1, last row
  x_T         z                    as x      latent code, N(0, I)

Use
  python ddim.py --dataset gmm                                          train, sample, print Table 1 on this data
  python ddim.py --ckpt results/ddpm-eps-gmm/model.pt                   sample what ddpm.py trained
  python ddim.py --ckpt results/ddpm-v-persian/model.pt --sample-steps 20

Not included: higher-order solvers, guidance.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- maths: schedule and times


def linear_schedule(T: int) -> Tensor:
    """alphas_cumprod (T + 1,) float64 of the betas 1e-4 to 0.02, scaled by 1000 / T. [2] section 4"""
    if T <= 20:
        raise ValueError(f"the linear schedule needs more than 20 steps (its last beta is 20 / T); got T = {T}")
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
    return torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])


def timesteps(T: int, S: int, spacing: str = "trailing") -> list[int]:
    """S of the times 1..T, falling; each is followed by the next one and the last by 0.

    leading: 1 + floor(i T / S); trailing: T - floor(i T / S), so it starts at T; quadratic: dense near 0, as the
    tau_i = floor(c i^2) of [1] D.2 for CIFAR-10, made distinct."""
    if not 1 <= S <= T:
        raise ValueError(f"cannot choose {S} of {T} time steps: the number must be between 1 and {T}")
    if spacing == "leading":
        rising = [1 + i * T // S for i in range(S)]
    elif spacing == "trailing":
        rising = [T - i * T // S for i in range(S)][::-1]
    elif spacing == "quadratic":
        rising = [max(i, 1 + int((T - 1) * (i / S) ** 2)) for i in range(1, S + 1)]
        for i in reversed(range(S - 1)):                    # distinct: each below its follower
            rising[i] = min(rising[i], rising[i + 1] - 1)
    else:
        raise ValueError(f"unknown spacing {spacing!r}; the names are leading, trailing, quadratic")
    return rising[::-1]


def pairs(alphas_cumprod: Tensor, times: list[int]) -> tuple[Tensor, Tensor]:
    """(abar_t, abar_s), (S,) each: where every step starts and ends; the last one ends at abar_0 = 1."""
    abar = alphas_cumprod[torch.tensor([*times, 0], device=alphas_cumprod.device)]
    return abar[:-1], abar[1:]


# ---- maths: what the network says


def like(value: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) in x's type, so that it multiplies x row by row."""
    return value.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def target(prediction: str, x_0: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What the network should say: eps [2], x_0, or v = a eps - b x_0 [3], with a = sqrt(abar), b = sqrt(1 - abar)."""
    if prediction == "v":
        return like(a, eps) * eps - like(b, x_0) * x_0
    return {"eps": eps, "x0": x_0}[prediction]


def x0_weights(prediction: str, abar: Tensor) -> tuple[Tensor, Tensor]:
    """(P, Q), shaped as abar, with x_0 = P x_t + Q out."""
    a, b = abar.sqrt(), (1 - abar).sqrt()
    return {"eps": (1 / a, -b / a), "x0": (0 * a, 0 * a + 1), "v": (a, -b)}[prediction]


def x0_emphasis(a: Tensor, b: Tensor) -> Tensor:
    """What the error of x_0 weighs in the loss: sqrt(SNR), halfway from 1 to the SNR that makes it the error of eps. At
    1 the error under heavy noise, which nobody can avoid, drowns that of the times when digits take shape."""
    return (a / b).clamp(max=10)


def eps_weights(prediction: str, abar: Tensor) -> tuple[Tensor, Tensor]:
    """(U, V), shaped as abar, with eps = U x_t + V out."""
    a, b = abar.sqrt(), (1 - abar).sqrt()
    return {"eps": (0 * a, 0 * a + 1), "x0": (1 / b, -a / b), "v": (b, a)}[prediction]


# ---- maths: samplers as tables of coefficients


def sigmas(abar_t: Tensor, abar_s: Tensor, eta: float) -> Tensor:
    return eta * ((1 - abar_s) / (1 - abar_t)).sqrt() * (1 - abar_t / abar_s).sqrt()           # [1] (16)


def ddim_coefficients(alphas_cumprod: Tensor, times: list[int], prediction: str = "eps", eta: float = 0.0,
                      sigma_hat: bool = False) -> Tensor:
    """(S, 5) rows (P, Q, A, B, C): x_0 = P x_t + Q out, clipped if asked; x_s = A x_0 + B x_t + C z. [1] (12)

    eps is taken again from the clipped x_0, so that x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps still holds.
    0 <= eta <= 1; `sigma_hat` adds the larger noise of [1] Table 1 to the mean of eta = 1, none into the data."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 (deterministic) and 1 (DDPM); got {eta}")
    abar_t, abar_s = pairs(alphas_cumprod, times)
    sigma = sigmas(abar_t, abar_s, 1.0 if sigma_hat else eta)
    towards = (1 - abar_s - sigma.square()).clamp(min=0).sqrt() / (1 - abar_t).sqrt()         # of the direction to x_t
    A = abar_s.sqrt() - towards * abar_t.sqrt()
    if sigma_hat:
        sigma = torch.where(abar_s < 1, (1 - abar_t / abar_s).sqrt(), 0.0)
    return torch.stack([*x0_weights(prediction, abar_t), A, towards, sigma], 1)


def encode_coefficients(alphas_cumprod: Tensor, times: list[int], prediction: str = "eps") -> Tensor:
    """(S, 5) rows, for x_0 = out, of the ODE run backwards from abar_0 = 1 up to times[0]: Euler's method for [1] (14).

    Row i starts where a decoding step ends; its network is asked at max(t, 1), as t = 0 is never trained."""
    end, begin = (abar.flip(0) for abar in pairs(alphas_cumprod, times))
    U, V = eps_weights(prediction, alphas_cumprod[torch.tensor(encode_times(times))])
    stretch = (end / begin).sqrt()
    M = (1 - end).sqrt() - stretch * (1 - begin).sqrt()
    zero = torch.zeros_like(M)
    return torch.stack([zero, zero + 1, M * V, stretch + M * U, zero], 1)


def encode_times(times: list[int]) -> list[int]:
    """Where the network is asked at each step of encoding."""
    return [1, *times[:0:-1]]


def fold(coefficients: Tensor) -> Tensor:
    """(S, 5) -> (S, 3): without clipping a step is one linear update x_s = (A P + B) x_t + A Q out + C z."""
    P, Q, A, B, C = coefficients.unbind(1)
    return torch.stack([A * P + B, A * Q, C], 1)


def slerp(z_1: Tensor, z_2: Tensor, share: Tensor) -> Tensor:
    """Great-circle path between latents of shape (B, ...), at `share` (K,) in [0, 1]: (K, B, ...). [1] (67)"""
    a, b = z_1.flatten(1), z_2.flatten(1)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    theta = cosine.clamp(-1, 1).acos()
    share = share.view(-1, 1)
    parallel = theta.sin() < 1e-4
    first = torch.where(parallel, 1 - share, ((1 - share) * theta).sin() / theta.sin())       # (K, B)
    second = torch.where(parallel, share.expand_as(first), (share * theta).sin() / theta.sin())
    return (first[..., None] * a + second[..., None] * b).view(-1, *z_1.shape)


# ---- the hot loops in plain PyTorch; kernels/ holds the fused ones


def residual_mlp_plain(x, features, w_in, w_hidden, w_out, b_out):
    """(B, D), time features (B, E) -> (B, O): residual layers that read the features beside their state."""
    h = F.silu(torch.cat([x, features], 1) @ w_in)
    for w in w_hidden:
        h = h + F.silu(torch.cat([h, features], 1) @ w)
    return h @ w_out + b_out


def sample_chain_plain(x, w_in, w_hidden, w_out, b_out, biases, coefficients, seed, first=0, noise="philox"):
    """All steps of the MLP's reverse process, x <- A x + B f(x) + C z; biases (S, L + 1, H) hold the time embedding."""
    generator = torch.Generator(x.device).manual_seed((seed + first) % 2**63)
    for bias, (A, B, C) in zip(biases, coefficients.tolist()):
        h = F.silu(F.linear(x, w_in) + bias[0])
        for w, b in zip(w_hidden, bias[1:]):
            h = h + F.silu(F.linear(h, w) + b)
        x = A * x + B * (F.linear(h, w_out) + b_out)
        if C:
            x = x + C * torch.empty_like(x).normal_(generator=generator)
    return x


def diffusion_step_plain(x, out, coefficients, seed, step, clip=None):
    """x_0 = P x + Q out, clipped to [-clip, clip]; x <- A x_0 + B x + C z."""
    P, Q, A, B, C = coefficients
    x_0 = P * x + Q * out
    x = A * (x_0.clamp(-clip, clip) if clip else x_0) + B * x
    if C:
        x = x + C * torch.empty_like(x).normal_(generator=torch.Generator(x.device).manual_seed((seed + step) % 2**63))
    return x


def fused(name, plain):
    """kernels.<name> where this repository's kernels/ is importable, else `plain`; a broken kernels/ raises."""
    try:
        import kernels
    except ModuleNotFoundError as e:
        if e.name != "kernels":
            raise
        return plain
    return getattr(kernels, name, plain)


@torch.inference_mode()
def run_chain(network, x: Tensor, times: list[int], coefficients: Tensor, clip: float | None = None, seed: int = 0,
              parts: int = 1):
    """A generator of `parts` + 1 states, x first, along any sampler that is a (S, 5) table; the network is asked at
    `times`."""
    cuts = [round(k * len(times) / parts) for k in range(parts + 1)]
    yield x
    t = torch.tensor(times, device=x.device)
    if hasattr(network, "chain") and clip is None:          # an MLP: all steps in one call
        chain, (weights, biases) = fused("sample_chain", sample_chain_plain), network.chain(t)
        linear = fold(coefficients).to(x.device)
        for a, b in zip(cuts, cuts[1:]):
            x = chain(x, *weights, biases[a:b], linear[a:b], seed, first=a)
            yield x
        return
    step = fused("diffusion_step", diffusion_step_plain)
    for i, row in enumerate(coefficients.tolist()):
        x = step(x, network(x, t[i].expand(len(x))), row, seed, i, clip=clip)
        if i + 1 in cuts:
            yield x


# ---- a small network for vectors, the same as in ddpm.py


def time_features(alphas_cumprod: Tensor, size: int = 32) -> Tensor:
    """(T + 1, size): 1, log SNR / 10, its sines and cosines. A noise level looks the same under any schedule."""
    log_snr = (alphas_cumprod.log() - (1 - alphas_cumprod).log()).clamp(-20, 20) / 10
    frequencies = torch.logspace(math.log10(0.3), math.log10(8), size // 2 - 1, dtype=alphas_cumprod.dtype)
    angles = log_snr[:, None] * frequencies
    constant, line = torch.ones_like(log_snr)[:, None], log_snr[:, None]
    return torch.cat([constant, line, angles.sin(), angles.cos()], 1).to(torch.get_default_dtype())


class MLP(nn.Module):
    """Residual MLP for vectors: (B, dim), t (B,) -> (B, out). Each layer reads [state, features of t]; in sampling,
    where all rows share t, the features' part is a table of biases."""

    def __init__(self, dim: int, out: int, alphas_cumprod: Tensor, width: int = 128, depth: int = 3):
        super().__init__()
        if width < 1 or depth < 1:
            raise ValueError(f"the network needs a width and a depth of at least 1; got {width} and {depth}")
        self.register_buffer("features", time_features(alphas_cumprod), persistent=False)
        E, block = self.features.shape[1], lambda *shape: (2 * torch.rand(shape) - 1) / shape[-2] ** 0.5
        self.w_in = nn.Parameter(torch.cat([block(dim, width), block(E, width)]))             # as nn.Linear starts
        self.w_hidden = nn.Parameter(torch.cat([block(depth, width, width), block(depth, E, width)], 1))
        self.w_out, self.b_out = nn.Parameter(torch.zeros(width, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        weights = self.w_in, self.w_hidden, self.w_out, self.b_out
        return fused("residual_mlp", residual_mlp_plain)(x, self.features[t], *weights)

    def chain(self, t: Tensor) -> tuple[list[Tensor], Tensor]:
        """The weights of sample_chain, and the features' part as biases (S, depth + 1, width) of the times t (S,)."""
        E, f = self.features.shape[1], self.features[t]
        biases = torch.stack([f @ w[-E:] for w in (self.w_in, *self.w_hidden)], 1)
        return [self.w_in[:-E].T, self.w_hidden[:, :-E].mT, self.w_out.T, self.b_out], biases


# ---- the family: a schedule, a predictor, and samplers that training does not know


class DDIM(nn.Module):
    """`loss(x_0, t, eps)`, `sample(n, times, eta)`, `decode(z, times)`, `encode(x_0, times)` around network(x_t, t).

    prediction: eps, x0 or v; clip: bound of |x_0|, None for data without one."""

    def __init__(self, shape, alphas_cumprod: Tensor, network: nn.Module, prediction: str = "eps",
                 clip: float | None = None):
        super().__init__()
        if prediction == "eps" and alphas_cumprod[-1] == 0:
            raise ValueError("eps-prediction cannot start from zero terminal SNR, where x_T says nothing of x_0")
        self.shape, self.prediction, self.clip, self.T = tuple(shape), prediction, clip, len(alphas_cumprod) - 1
        self.register_buffer("alphas_cumprod", alphas_cumprod)          # float64: 1 - abar_1 = 1e-4 wants the digits
        scales = torch.stack([alphas_cumprod, 1 - alphas_cumprod]).sqrt().to(torch.get_default_dtype())
        self.register_buffer("scales", scales, persistent=False)        # (2, T + 1): of x_0 and of eps in x_t
        self.network = network

    def loss(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        a, b = self.scales[:, t]
        x_t = like(a, x_0) * x_0 + like(b, eps) * eps                                         # [2] (4)
        out, wanted = self.network(x_t, t), target(self.prediction, x_0, eps, a, b)
        if self.prediction == "x0":
            return (like(x0_emphasis(a, b), x_0) * (out - wanted).square()).mean()
        return F.mse_loss(out, wanted)                                                        # [1] (5) with gamma = 1

    def sample(self, n: int, times: list[int], eta: float = 0.0, parts: int = 1, sigma_hat: bool = False):
        """A generator of `parts` + 1 states x, (n, *shape), the last of them the samples."""
        z, seed = torch.randn(n, *self.shape, device=self.alphas_cumprod.device), int(torch.randint(2**62, ()))
        return self.decode(z, times, eta, seed, parts, sigma_hat)

    def decode(self, z: Tensor, times: list[int], eta: float = 0.0, seed: int = 0, parts: int = 1,
               sigma_hat: bool = False):
        """x_T -> x_0, as `sample`; with eta = 0 the same z gives the same x_0."""
        table = ddim_coefficients(self.alphas_cumprod.cpu(), times, self.prediction, eta, sigma_hat)
        return run_chain(self.network, z, times, table, self.clip, seed, parts)

    def encode(self, x_0: Tensor, times: list[int], parts: int = 1):
        """x_0 -> x_T: the ODE backwards. decode(encode(x)) = x up to O(1 / S)."""
        table = encode_coefficients(self.alphas_cumprod.cpu(), times, self.prediction)
        return run_chain(self.network, x_0, encode_times(times), table, None, 0, parts)


PREDICTIONS = ("eps", "x0", "v")


def train(model: DDIM, average: nn.Module, optimizer, batches, steps: int, lr: float, start: int = 0,
          decay: float = 0.999, share: slice = slice(None)):
    """[2] Algorithm 1 with a warm-up, a cosine to zero and an exponential moving average of the weights."""
    weights, averages = list(model.parameters()), list(average.parameters())
    for step in range(start, steps):
        x_0 = next(batches)
        eps, t = torch.randn_like(x_0), torch.randint(1, model.T + 1, (len(x_0),), device=x_0.device)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = model.loss(x_0[share], t[share], eps[share])
        for w in weights:                                   # optimizer.zero_grad, without its 0.1 ms
            w.grad = None
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + step) / (10 + step)))
        yield {"loss": loss.detach()}


def main():
    import time

    import data
    import judges
    import metrics
    import run

    args = run.parse(
        __doc__, PREDICTIONS, steps=10_000, batch=512, lr=4e-3, reads=("ddpm",),
        training={"T": (1000, "diffusion steps"), "width": (128, "of the network"),
                  "depth": (3, "residual layers of the MLP"),
                  "size": (0, "resize images to this many pixels; 0 keeps them")},
        sampling={"sample_steps": (50, "S, the steps of the sampler"), "eta": (0.0, "0 deterministic ... 1 as DDPM"),
                  "spacing": ("quadratic", "of the times", ["leading", "trailing", "quadratic"]),
                  "table": (True, "print Table 1: S by eta on these data")},
        images={"model": "x0", "steps": 5000, "batch": 32, "lr": 2e-3, "width": 32, "samples": 500,
                "spacing": "trailing", "table": False})
    with run.Run(args) as job:
        times = timesteps(args.T, args.sample_steps, args.spacing)
        ddim_coefficients(linear_schedule(args.T), times, args.model, args.eta)           # an impossible eta ends here
        truth = data.load(args.dataset, args.data_dir, size=args.size or None, download=args.download,
                          skip_bad=args.skip_bad)
        density = hasattr(truth, "log_prob")
        clip = None if density else 1.0
        if args.ckpt and run.read_checkpoint(args.ckpt)["script"] == "ddpm":
            import ddpm

            config = run.read_checkpoint(args.ckpt)["config"]
            theirs = ddpm.build(config, truth.shape, None if density else truth.levels)
            job.restore(average=theirs)
            network = theirs.network if theirs.variance != "learned" else MeanOnly(theirs.network)
            average = DDIM(truth.shape, theirs.alphas_cumprod, network, args.model, clip).to(job.device)
        else:
            schedule = linear_schedule(args.T)
            if density:
                network = MLP(truth.dim, truth.dim, schedule, args.width, args.depth)
            else:
                import ddpm  # its U-Net

                network = ddpm.UNet(truth.shape[0], truth.shape[0], schedule, args.width)
            model = DDIM(truth.shape, schedule, network, args.model, clip).to(job.device)
            average = copy.deepcopy(model).requires_grad_(False)
            if args.ckpt:
                job.restore(average=average)
            else:
                optimizer = torch.optim.Adam(model.parameters(), args.lr, betas=(0.9, 0.99), fused=True)
                start = job.keep(model=model, average=average, optimizer=optimizer)
                batches = truth.batches(args.batch, job.device)
                steps = train(model, average, optimizer, batches, args.steps, args.lr, start, share=job.share)
                for _ in job.track(steps):
                    pass

        def draw(S, eta, parts=1, sigma_hat=False):
            """(samples, {label: state of the first rows}), in rows that stay near the cache."""
            times = timesteps(args.T, S, args.spacing)
            shown = [f"t = {[*times, 0][round(k * S / parts)]}" for k in range(parts + 1)]
            rows, chunks, frames = args.samples if density else 128, [], {}
            with job.bar(-(-args.samples // rows) * (parts + 1), f"S = {S}, eta = {eta}") as bar:
                for start in range(0, args.samples, rows):
                    n = min(rows, args.samples - start)
                    for label, x in zip(shown, average.sample(n, times, eta, parts, sigma_hat)):
                        bar.update()
                        frames.setdefault(label, x.cpu())
                    chunks.append(x.cpu())
            x = torch.cat(chunks)
            return (x if density else truth.unscale(x)), frames

        began = time.perf_counter()
        samples, frames = draw(args.sample_steps, args.eta, min(48, args.sample_steps))
        seconds = time.perf_counter() - began
        classifier = None
        if not density and truth.train_labels is not None:
            classifier = judges.train_classifier(truth.train, truth.train_labels, truth.classes, truth.levels)

        def score(x):
            return metrics.two_dimensional(x, truth) if density else judges.images(x, truth, classifier=classifier)

        results = score(samples)
        real = truth.sample(256 if density else 64).to(job.device)
        *_, z = average.encode(real, times)
        *_, back = average.decode(z, times)
        results["round_trip"] = metrics.metric((back - real).square().mean().sqrt(), 0.0, "rms")
        share = torch.linspace(0, 1, 9, device=z.device)
        *_, between = average.decode(slerp(z[:8], z[8:16], share).flatten(0, 1), times)
        metrics.strip_picture(job.folder / "interpolation.png", list(between.view(9, 8, *truth.shape).cpu()),
                              [f"{w:.3g}" for w in share.tolist()], getattr(truth, "levels", 256))

        table = {}
        if args.table:
            name = "klh" if density else "classifier_frechet"
            columns = [S for S in (10, 20, 50, 100, 200, args.T) if S <= args.T]
            rows = [(f"eta = {eta}", eta, False) for eta in (0.0, 0.2, 0.5, 1.0)] + [("sigma-hat", 1.0, True)]
            print(f"\n{name} by steps S and eta: [1] Table 1 on these data, {args.spacing} times")
            print(" " * 10 + "".join(f"{f'S = {S}':>10}" for S in columns))
            for label, eta, sigma_hat in rows:
                table[label] = {S: score(draw(S, eta, 1, sigma_hat)[0])[name]["value"] for S in columns}
                print(f"{label:10}" + "".join(f"{v:10.4f}" for v in table[label].values()))
            print()
        job.report(results, samples, truth, sum(p.numel() for p in average.parameters()), seconds, frames, table=table)


class MeanOnly(nn.Module):
    """A network with learned variances, without them."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.inner_network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner_network(x, t).chunk(2, 1)[0]


if __name__ == "__main__":
    main()
