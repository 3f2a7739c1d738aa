"""Denoising diffusion probabilistic models: learn to undo a little Gaussian noise, T times.

    q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)                                            [1] (4)
    p(x_{t-1} | x_t) = N(mean(x_t, t), sigma_t^2 I),   mean from a network that predicts eps, x_0 or v   [1] (11)
    L_simple = E |eps - eps_theta(x_t, t)|^2                                                      [1] (14)
    -log p(x_0) <= L_T + sum_t KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) - log p(x_0 | x_1)   [1] (5)

`--model` is what the network predicts: eps [1], x0, or v [3]. Times run t = 0..T with t = 0 the data (abar_0 = 1), so
t = 1..T is the paper's. A strided chain visits a subset of the times; every formula takes a pair s < t.

References
  [1] Ho, Jain, Abbeel, Denoising Diffusion Probabilistic Models, arXiv 2006.11239
  [2] Nichol, Dhariwal, Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672
  [3] Salimans, Ho, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512
  [4] Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv 2305.08891

Glossary
  paper             code                     shape     meaning
  beta_t            betas[t - 1]             (T,)      variance added by step t
  abar_t            alphas_cumprod[t]        (T + 1,)  share of the data's variance left at t; abar_0 = 1
  beta~_t           posterior_variance       (S,)      variance of q(x_s | x_t, x_0)
  eps               eps                      as x      noise;  x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps
  v                 v                        as x      sqrt(abar) eps - sqrt(1 - abar) x_0

Use
  python ddpm.py --dataset gmm                        the 2-D ring, beside its exact optimum
  python ddpm.py --dataset persian                    binary Persian digits with a small U-Net
  python ddpm.py --dataset gmm --variance learned     learned variances, hybrid loss [2]

Not included: class conditioning and guidance, continuous time, importance-sampled t.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- maths: schedules


def linear_betas(T: int) -> Tensor:
    """(T,) float64: 1e-4 to 0.02 for T = 1000 [1], scaled by 1000 / T so that abar_T stays near 4e-5 for any T."""
    if T <= 20:
        raise ValueError(f"the linear schedule needs more than 20 steps (its last beta is 20 / T); got T = {T}")
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)


def cosine_betas(T: int, s: float = 0.008) -> Tensor:
    """(T,) float64, betas of abar_t = f(t) / f(0), f(t) = cos^2(pi/2 (t/T + s) / (1 + s)), at most 0.999. [2] (17)"""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s) * math.pi / 2).square()
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def cumulate(betas: Tensor) -> Tensor:
    """alphas_cumprod (T + 1,), with abar_0 = 1."""
    return torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) so that abar_T = 0 and abar_1 is kept. [4] Algorithm 1"""
    r = alphas_cumprod[1:].sqrt()
    r = (r - r[-1]) * r[0] / (r[0] - r[-1])
    return torch.cat([alphas_cumprod[:1], r.square()])


def make_schedule(name: str, T: int, zero_snr: bool = False) -> Tensor:
    alphas_cumprod = cumulate({"linear": linear_betas, "cosine": cosine_betas}[name](T))
    return zero_terminal_snr(alphas_cumprod) if zero_snr else alphas_cumprod


def timesteps(T: int, S: int, spacing: str = "trailing") -> list[int]:
    """S of the times 1..T, falling; each is followed by the next one and the last by 0.

    leading: 1 + floor(i T / S); trailing: T - floor(i T / S), so it starts at T; quadratic: dense near 0, as the
    tau_i = floor(c i^2) of DDIM for CIFAR-10 (arXiv 2010.02502, D.2), made distinct."""
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


# ---- maths: the forward process and its posterior


def like(value: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) in x's type, so that it multiplies x row by row."""
    return value.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def q_sample(x_0: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x_t of a = sqrt(abar_t) and b = sqrt(1 - abar_t), (B,) each."""
    return like(a, x_0) * x_0 + like(b, x_0) * eps                                            # [1] (4)


def q_posterior(x_0: Tensor, x_t: Tensor, abar_t: Tensor, abar_s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, as x, and variance (B,) of q(x_s | x_t, x_0) for s < t. [1] (6), (7)"""
    alpha, beta = abar_t / abar_s, 1 - abar_t / abar_s
    mean = (like(abar_s.sqrt() * beta / (1 - abar_t), x_0) * x_0
            + like(alpha.sqrt() * (1 - abar_s) / (1 - abar_t), x_t) * x_t)
    return mean, beta * (1 - abar_s) / (1 - abar_t)


def target(prediction: str, x_0: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What the network should say."""
    if prediction == "v":
        return like(a, eps) * eps - like(b, x_0) * x_0                                        # [3] section 4
    return {"eps": eps, "x0": x_0}[prediction]


def x0_weights(prediction: str, abar: Tensor) -> tuple[Tensor, Tensor]:
    """(P, Q), shaped as abar, with x_0 = P x_t + Q out."""
    a, b = abar.sqrt(), (1 - abar).sqrt()
    return {"eps": (1 / a, -b / a), "x0": (0 * a, 0 * a + 1), "v": (a, -b)}[prediction]       # [1] (15), [3]


def x0_emphasis(a: Tensor, b: Tensor) -> Tensor:
    """What the error of x_0 weighs in the loss: sqrt(SNR), halfway from 1 to the SNR that makes it the error of eps. At
    1 the error under heavy noise, which nobody can avoid, drowns that of the times when digits take shape."""
    return (a / b).clamp(max=10)


def loss_weight(prediction: str, abar: Tensor) -> Tensor:
    """The loss of `prediction` over that of eps, for the same denoiser."""
    x0 = x0_emphasis(abar.sqrt(), (1 - abar).sqrt()) * (1 - abar) / abar
    return {"eps": torch.ones_like(abar), "x0": x0, "v": 1 / abar}[prediction]


# ---- maths: the bound


def gaussian_kl(mean_1: Tensor, logvar_1: Tensor, mean_2: Tensor, logvar_2: Tensor) -> Tensor:
    """KL(N(mean_1, var_1) || N(mean_2, var_2)) in nats, elementwise."""
    distance = (mean_1 - mean_2).square() * (-logvar_2).exp()
    return 0.5 * (logvar_2 - logvar_1 - 1 + (logvar_1 - logvar_2).exp() + distance)


def gaussian_log_prob(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mean).square() * (-logvar).exp())


def discretized_log_prob(x: Tensor, mean: Tensor, logvar: Tensor, levels: int) -> Tensor:
    """log of the mass that N(mean, var) puts on the bin of x: `levels` values evenly spaced on [-1, 1], the outer
    bins open. Elementwise, nats. [1] (13)"""
    side = torch.where(x > mean, -1, 1)                     # mirrored so that x <= mean: lower tails keep their digits
    x, mean, half = side * x, side * mean, 1 / (levels - 1)
    cdf = lambda y: 0.5 * torch.erfc((mean - y) * (-0.5 * logvar).exp() * math.sqrt(0.5))
    high = torch.where(x > 1 - half, 1.0, cdf(x + half))
    low = torch.where(x < -1 + half, 0.0, cdf(x - half))
    return (high - low).clamp(min=1e-12).log()


# ---- maths: the reverse process as tables


def reverse_table(alphas_cumprod: Tensor, times: list[int], variance: str = "small") -> dict[str, Tensor]:
    """What each step t -> s of a chain needs: abar_t, abar_s, betas, posterior_variance, and the variance of p with its
    log, all (S,) in the order of `times`.

    The last step, s = 0, has posterior variance 0; its log is that of the step before it [2]. 'large' on a strided
    chain is the sigma-hat of DDIM: beta of the whole stride."""
    t = torch.tensor(times)
    s = torch.cat([t[1:], t.new_zeros(1)])
    abar_t, abar_s = alphas_cumprod[t], alphas_cumprod[s]
    betas = 1 - abar_t / abar_s
    small = betas * (1 - abar_s) / (1 - abar_t)
    floor = torch.cat([small[:-1], small[-2:-1] if len(times) > 1 else betas])
    chosen = betas if variance == "large" else floor        # 'learned' lies between the two
    return {"t": t, "s": s, "abar_t": abar_t, "abar_s": abar_s, "betas": betas, "posterior_variance": small,
            "log_small": floor.log(), "log_large": betas.log(), "log_variance": chosen.log()}


def ancestral_coefficients(table: dict[str, Tensor], prediction: str) -> Tensor:
    """(S, 5) rows (P, Q, A, B, C): x_0 = P x_t + Q out, clipped if asked; x_s = A x_0 + B x_t + C z, and no noise into
    s = 0. [1] Algorithm 2 with (7)"""
    abar_t, abar_s, betas = table["abar_t"], table["abar_s"], table["betas"]
    A = abar_s.sqrt() * betas / (1 - abar_t)
    B = (1 - betas).sqrt() * (1 - abar_s) / (1 - abar_t)
    C = torch.where(table["s"] > 0, (0.5 * table["log_variance"]).exp(), 0.0)
    return torch.stack([*x0_weights(prediction, abar_t), A, B, C], 1)


def fold(coefficients: Tensor) -> Tensor:
    """(S, 5) -> (S, 3): without clipping a step is one linear update x_s = (A P + B) x_t + A Q out + C z."""
    P, Q, A, B, C = coefficients.unbind(1)
    return torch.stack([A * P + B, A * Q, C], 1)


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


# ---- networks


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


class Block(nn.Module):
    """GroupNorm-SiLU-convolution twice, the time as scale and shift in between, and a skip."""

    def __init__(self, c_in: int, c_out: int, embedding: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(embedding, 2 * c_out)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.time(e)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the pixels of the coarsest grid, one head of 32 channels each."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(8, channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, 3, -1, 32, H * W).transpose(-1, -2).unbind(1)   # (B, heads, HW, 32)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(B, C, H, W))


class UNet(nn.Module):
    """A small U-Net for images: (B, C, H, W), t (B,) -> (B, out, H, W). H and W are padded to a multiple of 4. Pixels
    are folded 2x2 into channels first: on a CPU wide and coarse beats narrow and fine."""

    def __init__(self, channels: int, out: int, alphas_cumprod: Tensor, width: int = 32):
        super().__init__()
        if width < 16 or width % 16:
            raise ValueError(f"the width of the U-Net must be a multiple of 16; got {width}")
        c, e = width, 4 * width
        self.register_buffer("features", time_features(alphas_cumprod, 64), persistent=False)
        # GroupNorm hides the mean of an image, which tells most of it under heavy noise: it comes in beside the time
        self.time = nn.Sequential(nn.Linear(64 + channels, e), nn.SiLU(), nn.Linear(e, e), nn.SiLU())
        self.stem = nn.Conv2d(4 * channels, c, 3, padding=1)
        self.down1, self.down2 = Block(c, c, e), Block(c, c, e)
        self.shrink = nn.Conv2d(c, 2 * c, 3, stride=2, padding=1)
        self.middle1, self.attention, self.middle2 = Block(2 * c, 2 * c, e), Attention(2 * c), Block(2 * c, 2 * c, e)
        self.grow = nn.Conv2d(2 * c, c, 3, padding=1)
        self.up1, self.up2 = Block(2 * c, c, e), Block(2 * c, c, e)
        self.norm, self.outer = nn.GroupNorm(8, c), nn.Conv2d(c, 4 * out, 3, padding=1)
        nn.init.zeros_(self.outer.weight)
        self.to(memory_format=torch.channels_last)          # 15 to 25% faster on a CPU

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        e = self.time(torch.cat([self.features[t], 10 * x.mean((2, 3))], 1))
        x = F.pixel_unshuffle(F.pad(x, (0, -W % 4, 0, -H % 4), mode="replicate"), 2)
        h_0 = self.stem(x.contiguous(memory_format=torch.channels_last))                      # (B, c, H/2, W/2)
        h_1 = self.down1(h_0, e)
        h_2 = self.down2(h_1, e)
        h = self.middle2(self.attention(self.middle1(self.shrink(h_2), e)), e)                # (B, 2c, H/4, W/4)
        h = self.grow(F.interpolate(h, scale_factor=2.0))
        h = self.up2(torch.cat([self.up1(torch.cat([h, h_2], 1), e), h_1], 1), e)
        return F.pixel_shuffle(self.outer(F.silu(self.norm(h))), 2)[..., :H, :W]


# ---- the family: a schedule, a predictor, a reverse process


class Diffusion(nn.Module):
    """`loss(x_0, t, eps)`, `bound(x_0, t, eps)`, `sample(n, times)` around a network(x_t, t).

    shape: of one example; prediction: eps, x0 or v; variance: small (beta~), large (beta) or learned; levels: of a
    pixel on [-1, 1], None for continuous data (no clipping, density instead of mass)."""

    def __init__(self, shape, alphas_cumprod: Tensor, prediction: str = "eps", variance: str = "small",
                 levels: int | None = None, width: int = 128, depth: int = 3):
        super().__init__()
        if prediction == "eps" and alphas_cumprod[-1] == 0:
            raise ValueError("eps-prediction cannot start from zero terminal SNR, where x_T says nothing of x_0; "
                             "use --model v or x0")
        self.shape, self.prediction, self.variance, self.levels = tuple(shape), prediction, variance, levels
        self.T = len(alphas_cumprod) - 1
        self.register_buffer("alphas_cumprod", alphas_cumprod)          # float64: 1 - abar_1 = 1e-4 wants the digits
        scales = torch.stack([alphas_cumprod, 1 - alphas_cumprod]).sqrt().to(torch.get_default_dtype())
        self.register_buffer("scales", scales, persistent=False)        # (2, T + 1): of x_0 and of eps in x_t
        out = shape[0] * (2 if variance == "learned" else 1)
        self.network = (MLP(shape[0], out, alphas_cumprod, width, depth) if len(shape) == 1
                        else UNet(shape[0], out, alphas_cumprod, width))

    def loss(self, x_0: Tensor, t: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """L_simple, weighed for x0; with learned variance 0.001 T times the bound too, its mean held fixed. [2] (16)"""
        a, b = self.scales[:, t]
        x_t = q_sample(x_0, eps, a, b)
        out, wanted = self.network(x_t, t), target(self.prediction, x_0, eps, a, b)
        guess, fraction = out.chunk(2, 1) if self.variance == "learned" else (out, None)
        if self.prediction == "x0":
            simple = (like(x0_emphasis(a, b), x_0) * (guess - wanted).square()).mean()
        else:
            simple = F.mse_loss(guess, wanted)
        if fraction is None:
            return {"loss": simple}
        term = self._bound_term(x_0, x_t, torch.cat([guess.detach(), fraction], 1), t)
        return {"loss": simple, "bound": 1e-3 * self.T * term.mean() / math.log(2)}

    def p_mean_logvar(self, x_t: Tensor, out: Tensor, table: dict[str, Tensor], i) -> tuple[Tensor, Tensor]:
        """Mean and log variance of p(x_s | x_t), both as x_t; row(s) i of a reverse_table. [1] (11), [2] (15)"""
        abar_t, abar_s = table["abar_t"][i], table["abar_s"][i]
        logvar = like(table["log_variance"][i], x_t)
        if self.variance == "learned":
            out, v = out.chunk(2, 1)
            fraction = (v + 1) / 2
            logvar = fraction * like(table["log_large"][i], x_t) + (1 - fraction) * like(table["log_small"][i], x_t)
        P, Q = x0_weights(self.prediction, abar_t)
        x_0 = like(P, x_t) * x_t + like(Q, x_t) * out
        if self.levels:
            x_0 = x_0.clamp(-1, 1)
        return q_posterior(x_0, x_t, abar_t, abar_s)[0], logvar.expand_as(x_t)

    def _bound_term(self, x_0: Tensor, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """The bound's term of time t in nats, elementwise: KL of the posterior for t > 1, the decoder for t = 1."""
        table = self._table(list(range(self.T, 0, -1)))
        i = self.T - t
        mean, logvar = self.p_mean_logvar(x_t, out, table, i)
        true_mean, _ = q_posterior(x_0, x_t, table["abar_t"][i], table["abar_s"][i])
        kl = gaussian_kl(true_mean, like(table["log_small"][i], x_0).expand_as(x_0), mean, logvar)
        decoder = (discretized_log_prob(x_0, mean, logvar, self.levels) if self.levels
                   else gaussian_log_prob(x_0, mean, logvar))
        return torch.where(like(t, x_0) == 1, -decoder, kl)

    def bound(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """(B,) nats an example: the term of time t of -log p(x_0) <= L_T + sum of the terms. [1] (5)"""
        x_t = q_sample(x_0, eps, *self.scales[:, t])
        return self._bound_term(x_0, x_t, self.network(x_t, t), t).flatten(1).sum(1)

    def prior_kl(self, x_0: Tensor) -> Tensor:
        """(B,) nats an example: L_T = KL(q(x_T | x_0) || N(0, I))."""
        abar = self.alphas_cumprod[-1]
        mean, logvar = abar.sqrt().to(x_0.dtype) * x_0, torch.log1p(-abar).to(x_0.dtype)
        return gaussian_kl(mean, logvar, torch.zeros_like(x_0), torch.zeros_like(x_0)).flatten(1).sum(1)

    def _table(self, times: list[int]) -> dict[str, Tensor]:
        key = (tuple(times), self.alphas_cumprod.device)
        if getattr(self, "_cached", (None,))[0] != key:     # one chain at a time is in use: training's or a sampler's
            table = reverse_table(self.alphas_cumprod.cpu(), times, self.variance)
            self._cached = key, {name: value.to(self.alphas_cumprod.device) for name, value in table.items()}
        return self._cached[1]

    @torch.inference_mode()
    def sample(self, n: int, times: list[int], parts: int = 1):
        """A generator of `parts` + 1 states x, (n, *shape), from x_T to x_0: the last of them are the samples."""
        x, seed = torch.randn(n, *self.shape, device=self.alphas_cumprod.device), int(torch.randint(2**62, ()))
        table = self._table(times)
        yield from self.run_chain(x, table, ancestral_coefficients(table, self.prediction).cpu(), seed, parts)

    def run_chain(self, x, table, coefficients, seed, parts=1):
        """Any sampler that is a (S, 5) table of coefficients, through the fused loop where it applies."""
        cuts = [round(k * len(coefficients) / parts) for k in range(parts + 1)]
        yield x
        if isinstance(self.network, MLP) and self.variance != "learned" and not self.levels:
            chain, (weights, biases) = fused("sample_chain", sample_chain_plain), self.network.chain(table["t"])
            linear = fold(coefficients).to(x.device)
            for a, b in zip(cuts, cuts[1:]):
                x = chain(x, *weights, biases[a:b], linear[a:b], seed, first=a)
                yield x
            return
        step, generator = fused("diffusion_step", diffusion_step_plain), torch.Generator(x.device).manual_seed(seed)
        for i, row in enumerate(coefficients.tolist()):
            out = self.network(x, table["t"][i].expand(len(x)))
            if self.variance == "learned":
                mean, logvar = self.p_mean_logvar(x, out, table, torch.full((len(x),), i, device=x.device))
                z = torch.empty_like(x).normal_(generator=generator)
                x = mean + (0.5 * logvar).exp() * z if row[-1] else mean
            else:
                x = step(x, out, row, seed, i, clip=1.0 if self.levels else None)
            if i + 1 in cuts:
                yield x


PREDICTIONS = ("eps", "x0", "v")


def train(model: Diffusion, average: nn.Module, optimizer, batches, steps: int, lr: float, start: int = 0,
          decay: float = 0.999, share: slice = slice(None)):
    """[1] Algorithm 1 with a warm-up, a cosine to zero and an exponential moving average of the weights."""
    weights, averages = list(model.parameters()), list(average.parameters())
    for step in range(start, steps):
        x_0 = next(batches)
        eps, t = torch.randn_like(x_0), torch.randint(1, model.T + 1, (len(x_0),), device=x_0.device)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        losses = model.loss(x_0[share], t[share], eps[share])
        for w in weights:                                   # optimizer.zero_grad, without its 0.1 ms
            w.grad = None
        sum(losses.values()).backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + step) / (10 + step)))
        yield {name: value.detach() for name, value in losses.items()}


def build(config: dict, shape, levels) -> Diffusion:
    """The model that the options of a run, or of a checkpoint, describe."""
    schedule = make_schedule(config["schedule"], config["T"], config["zero_snr"])
    return Diffusion(shape, schedule, config["model"], config["variance"], levels, config["width"], config["depth"])


@torch.inference_mode()
def evaluate(model: Diffusion, x_0: Tensor, batch: int = 2000) -> tuple[float, float]:
    """(loss, bound): the mean training loss, and -ELBO in nats an example; x_0 holds k T examples, k for each time."""
    t = 1 + torch.arange(len(x_0), device=x_0.device) % model.T
    losses, terms = [], []
    for x, s in zip(x_0.split(batch), t.split(batch)):
        eps = torch.randn_like(x)
        losses.append(model.loss(x, s, eps)["loss"] * len(x))
        terms.append(model.T * model.bound(x, s, eps) + model.prior_kl(x))
    return float(sum(losses) / len(x_0)), float(torch.cat(terms).mean())


def main():
    import time

    import data
    import metrics
    import run

    args = run.parse(
        __doc__, PREDICTIONS, steps=10_000, batch=512, lr=4e-3,
        training={"T": (1000, "diffusion steps"), "schedule": ("linear", "noise schedule", ["linear", "cosine"]),
                  "zero_snr": (False, "rescale to zero terminal SNR"),
                  "variance": ("small", "of the reverse process", ["small", "large", "learned"]),
                  "width": (128, "of the network"), "depth": (3, "residual layers of the MLP"),
                  "size": (0, "resize images to this many pixels; 0 keeps them")},
        sampling={"sample_steps": (0, "steps of the reverse process; 0 means all T"),
                  "spacing": ("trailing", "of a strided chain", ["leading", "trailing", "quadratic"])},
        images={"model": "x0", "schedule": "cosine", "variance": "large", "steps": 5000, "batch": 32, "lr": 2e-3,
                "width": 32, "samples": 1000, "sample_steps": 50})
    with run.Run(args) as job:
        truth = data.load(args.dataset, args.data_dir, size=args.size or None, download=args.download,
                          skip_bad=args.skip_bad)
        density = hasattr(truth, "log_prob")
        model = build(vars(args), truth.shape, None if density else truth.levels).to(job.device)
        times = timesteps(args.T, args.sample_steps or args.T, args.spacing)
        average = copy.deepcopy(model).requires_grad_(False)
        floor = None
        if density:                                         # what the best possible network would score
            t = torch.linspace(0.5, args.T - 0.5, 100).long() + 1
            abar = model.alphas_cumprod.cpu()[t]
            floor = float((truth.bayes_loss(abar.sqrt(), (1 - abar).sqrt()) * loss_weight(args.model, abar)).mean())
        if args.ckpt:
            job.restore(average=average)
        else:
            optimizer = torch.optim.Adam(model.parameters(), args.lr, betas=(0.9, 0.99), fused=True)
            start = job.keep(model=model, average=average, optimizer=optimizer)
            batches = truth.batches(args.batch, job.device)
            for _ in job.track(train(model, average, optimizer, batches, args.steps, args.lr, start, share=job.share),
                               floors={"loss": floor} if density else None):
                pass

        began, chunks, frames = time.perf_counter(), [], {}
        parts = min(48, len(times))
        shown = [[*times, 0][round(k * len(times) / parts)] for k in range(parts + 1)]
        rows = args.samples if density else 128             # images: what stays near the cache
        with job.bar(-(-args.samples // rows) * (parts + 1), "sampling") as bar:
            for start in range(0, args.samples, rows):
                for t, x in zip(shown, average.sample(min(rows, args.samples - start), times, parts)):
                    bar.update()
                    frames.setdefault(f"t = {t}", x.cpu())
                chunks.append(x.cpu())
        seconds = time.perf_counter() - began
        samples = torch.cat(chunks)

        dims = math.prod(truth.shape)
        held_out = truth.sample(args.T * (64 if density else 2))
        loss, bound = evaluate(average, held_out.to(job.device), 4000 if density else 128)
        results, samples = job.judge(samples, truth)
        if density:
            results["elbo"] = metrics.metric(-bound, -truth.entropy, "nats", "higher")
        else:
            results["bits_per_dim"] = metrics.metric(metrics.bits_per_dim(bound, dims), None, "bits (bound)")
        results["loss"] = metrics.metric(loss, floor)
        job.report(results, samples, truth, sum(p.numel() for p in model.parameters()), seconds, frames=frames)


if __name__ == "__main__":
    main()
