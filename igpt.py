"""Image GPT: an autoregressive model, that is the chain rule and a sequence mixer.

    log p(x) = sum_t log p(x_t | x_1 .. x_t-1),    p(x_t | .) = softmax(lm_head(ln_f(h_t)))                   [1] (1)
    h <- h + mixer(ln_1(h)),    h <- h + mlp(ln_2(h)),    h_t = sum_l wte_l(x_t-l) + wpe_t, 0 < l                [2]

GPT-2 and [1] read l = 1, the token before. Here a place is told those around it (`--no-near`: as there), which
attention finds by itself, but late. An image is written as tokens in raster order and read as a sentence. Where these
keep all of it (bits, exact 2 x 2 patches of bits, grey levels) the likelihood is that of the image, a sum over all of
them would be 1, and it is given in nats an image and bits/dim. A palette of colours loses something: then it is
bits/token, and the distortion is named. A point of the plane is two tokens, its coordinates in cells: a density.

`--mixer` (or --model): attention [2, 3], whose memory is every token before, or mamba [4], whose memory is one state:

    h_t = exp(Delta_t A) h_t-1 + Delta_t B_t u_t,    y_t = C_t . h_t + D u_t            [4] section 3, as in its code

References
  [1] Chen et al., Generative Pretraining from Pixels, ICML 2020
  [2] Radford et al., Language Models are Unsupervised Multitask Learners (GPT-2), 2019
  [3] Vaswani et al., Attention Is All You Need, arXiv 1706.03762
  [4] Gu, Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, arXiv 2312.00752
  [5] Holtzman et al., The Curious Case of Neural Text Degeneration (top-p), arXiv 1904.09751

Glossary
  paper        code             shape             meaning
  x            tokens           (B, T)            of K kinds; inputs (B, T, lags): those before each, or a start token
  n^l          features         (B, width)        mean over t of ln_1(h) in layer l, read by the linear probe [1]
  Q, K, V      c_attn           (B, heads, T, D)
  A            -exp(A_log)      (E, N)            decay of the N states of each of E channels
  Delta, B, C  dt, B, C         (B, T, E | N | N) chosen by the input: what is kept, written and read
  h_t          h                (B, E, N)         Mamba's memory, the same size at any t

Use
  python igpt.py --dataset gmm                             points as two tokens of 256 cells, beside the exact entropy
  python igpt.py --dataset persian                         14 x 14 tokens of 16 patches; bits/dim, completions, probe
  python igpt.py --mixer mamba --dataset mnist --data-dir DIR         dynamic binarisation, nats an image

Not included: BERT-style pretraining, fine-tuning, other orders than raster, beam search.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# ---- maths: tokens


def patches(bits: Tensor, side: int = 2) -> Tensor:
    """(B, 1, H, W) of 0 and 1 -> (B, H W / side^2): a patch is a binary number, its first pixel the highest digit."""
    rows = rearrange(bits, "b 1 (h p) (w q) -> b (h w) (p q)", p=side, q=side)
    return (rows << torch.arange(side**2 - 1, -1, -1, device=bits.device)).sum(2)


def unpatch(tokens: Tensor, height: int, width: int, side: int = 2) -> Tensor:
    """The bits (B, 1, height, width) again."""
    rows = tokens[..., None] >> torch.arange(side**2 - 1, -1, -1, device=tokens.device) & 1
    return rearrange(rows, "b (h w) (p q) -> b 1 (h p) (w q)", h=height // side, p=side, q=side)


def nearest_code_plain(z, codes):
    """(N, D), (K, D) -> (N,): the index of the nearest code, the lowest of equals."""
    return (codes.square().sum(1) - 2 * z @ codes.T).argmin(1)


def k_means(x: Tensor, k: int, steps: int = 20) -> Tensor:
    """(k, D) means of Lloyd's algorithm on x (N, D), from distinct rows; a mean that nothing chooses stays."""
    distinct = x.unique(dim=0)
    if len(distinct) < k:
        raise ValueError(f"{k} clusters are wanted of {len(distinct)} distinct values")
    means = distinct[torch.randperm(len(distinct))[:k]]
    for _ in range(steps):
        index = fused("nearest_code", nearest_code_plain)(x, means)
        count = torch.bincount(index, minlength=k)[:, None]
        means = torch.where(count > 0, torch.zeros_like(means).index_add_(0, index, x) / count.clamp(min=1), means)
    return means


# ---- maths: choosing a token


def restrict(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (..., K) over `temperature`; -inf but for the top_k highest (0: all), and but for the fewest of the
    highest whose probabilities reach top_p [5]. The most likely token always stays; temperature 0 leaves it alone."""
    if temperature == 0:
        top_k, temperature = 1, 1.0
    logits = logits if temperature == 1 else logits / temperature
    if 0 < top_k < logits.shape[-1]:
        highest, index = logits.topk(top_k)
        logits = torch.full_like(logits, -math.inf).scatter(-1, index, highest)
    if top_p < 1:
        p, index = logits.softmax(-1).sort(-1, descending=True)
        out = p.cumsum(-1) - p >= top_p                     # what stands before it is enough
        out[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, index, out), -math.inf)
    return logits


# ---- maths: the mixers


def causal_attention_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q (B, H, S, D), k and v (B, H, T, D); the queries are the last S of T places."""
    S, T = q.shape[2], k.shape[2]
    if S == T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(T - S)
    return F.scaled_dot_product_attention(q, k, v, mask)


def decode_attention_plain(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """One query q (B, H, D) against the first `length` of k (B, H, D, T), transposed, and v (B, H, T, D): (B, H, D)."""
    B, H, D = q.shape
    k, v = k.flatten(0, 1)[..., :length], v.flatten(0, 1)[:, :length]
    weights = torch.bmm(q.reshape(B * H, 1, D) * D**-0.5, k).softmax(-1)
    return torch.bmm(weights, v).view(B, H, D)


def scan_step(h, x, dt, A, B, C):
    """One step for x, dt (B, E), A (E, N), B, C (B, N), h (B, E, N): y (B, E) and the new h. [4] (2a), (2b)"""
    h = (dt[..., None] * A).exp() * h + (dt * x)[..., None] * B[:, None]
    return (h @ C[..., None])[..., 0], h


def scan_sequential(x, dt, A, B, C, h=None):
    """The definition: y (B, T, E) and the last h (B, E, N) from x, dt (B, T, E), B, C (B, T, N), a state at a time."""
    h = x.new_zeros(len(x), *A.shape) if h is None else h
    steps = []
    for x_t, dt_t, B_t, C_t in zip(*(v.unbind(1) for v in (x, dt, B, C))):
        y, h = scan_step(h, x_t, dt_t, A, B_t, C_t)
        steps.append(y)
    return torch.stack(steps, 1), h


def selective_scan_plain(x, dt, A, B, C, h=None):
    """The same numbers, parallel over chunks: the pairs (a, u) of h -> a h + u compose to (a_2 a_1, a_2 u_1 + u_2), so
    all chunks start from 0 at once and the state before each is brought in afterwards. Nothing is divided."""
    (n, T, E), N = x.shape, A.shape[1]
    L = math.isqrt(T - 1) + 1                               # L steps, then T / L carries
    cut = lambda v: F.pad(v, (0, 0, 0, -T % L)).unflatten(1, (-1, L))
    x, dt, B, C = map(cut, (x, dt, B, C))                   # (n, G, L, .); steps of dt = 0 change nothing
    a = (dt[..., None] * A).exp().unbind(2)                 # L times (n, G, E, N)
    u = ((dt * x)[..., None] * B[..., None, :]).unbind(2)
    decays, states = [a[0]], [u[0]]
    for a_t, u_t in zip(a[1:], u[1:]):
        states.append(torch.addcmul(u_t, a_t, states[-1]))
        decays.append(a_t * decays[-1])
    h, before = x.new_zeros(n, E, N) if h is None else h, []
    for decay, state in zip(decays[-1].unbind(1), states[-1].unbind(1)):
        before.append(h)
        h = torch.addcmul(state, decay, h)
    before = torch.stack(before, 1)
    y = [(torch.addcmul(s, d, before) @ c[..., None])[..., 0] for s, d, c in zip(states, decays, C.unbind(2))]
    return torch.stack(y, 2).flatten(1, 2)[:, :T], h


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


class Conv1D(nn.Module):
    """x W + b with W (in, out), as GPT-2 keeps it: one product in sampling, without a transposition."""

    def __init__(self, d_in: int, d_out: int, std: float = 0.02):
        super().__init__()
        self.weight, self.bias = nn.Parameter(std * torch.randn(d_in, d_out)), nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() > 2:
            return self(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return torch.addmm(self.bias, x, self.weight)


class CausalSelfAttention(nn.Module):
    """All tokens before, weighed by query and key. Memory: k transposed (n, H, D, T) and v (n, H, T, D)."""

    def __init__(self, width: int, heads: int, layers: int, **options):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads")
        self.heads, self.c_attn = heads, Conv1D(width, 3 * width)
        self.c_proj = Conv1D(width, width, 0.02 / (2 * layers) ** 0.5)

    def memory(self, n: int, T: int):
        D = self.c_proj.weight.shape[0] // self.heads
        return [self.c_proj.weight.new_empty(n, self.heads, *shape) for shape in ((D, T), (T, D))]

    def forward(self, x: Tensor, memory=None, start: int = 0) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()    # (B, H, S, D)
        if memory is not None:
            end = start + x.shape[1]
            memory[0][..., start:end], memory[1][:, :, start:end] = k.mT, v
            k, v = memory[0][..., :end].mT, memory[1][:, :, :end]
        y = fused("causal_attention", causal_attention_plain)(q, k, v)
        return self.c_proj(y.transpose(1, 2).flatten(2))

    def step(self, x: Tensor, memory, t: int) -> Tensor:
        """(B, width) of place t alone."""
        q, k, v = self.c_attn(x).view(len(x), 3, self.heads, -1).unbind(1)
        memory[0][..., t], memory[1][:, :, t] = k, v
        y = fused("decode_attention", decode_attention_plain)(q, *memory, t + 1)
        return self.c_proj(y.view(len(x), -1))


class Mamba(nn.Module):
    """A selective state space behind a causal convolution of 4. Memory: its last 3 inputs and h, at any length. [4]"""

    def __init__(self, width: int, layers: int, states: int = 16, expand: int = 2, **options):
        super().__init__()
        E, rank = expand * width, -(-width // 16)
        self.in_proj, self.x_proj = Conv1D(width, 2 * E), Conv1D(E, rank + 2 * states, E**-0.5)
        self.conv, self.conv_bias = nn.Parameter(0.5 * torch.randn(4, E)), nn.Parameter(torch.zeros(E))
        self.dt_proj = Conv1D(rank, E, rank**-0.5)
        dt = torch.exp(torch.rand(E) * math.log(100) + math.log(1e-3))                        # 1e-3 to 0.1, section 3.6
        self.dt_proj.bias.data = dt + (-(-dt).expm1()).log()                                  # softplus^-1
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(E, 1))
        self.D, self.out_proj = nn.Parameter(torch.ones(E)), Conv1D(E, width, 0.02 / (2 * layers) ** 0.5)
        self.sizes = rank, states, states

    def memory(self, n: int, T: int):
        E, N = self.A_log.shape
        return self.D.new_zeros(n, 3, E), self.D.new_zeros(n, E, N)

    def select(self, u: Tensor):
        """dt, A, B, C of inputs u (..., E); A and dt in float32 or more, where exp(dt A) is near 1."""
        dt, B, C = self.x_proj(u).split(self.sizes, -1)
        wide = torch.promote_types(u.dtype, torch.float32)
        return F.softplus(self.dt_proj(dt).to(wide)), -self.A_log.to(wide).exp(), B, C

    def forward(self, x: Tensor, memory=None, start: int = 0) -> Tensor:
        u, z = self.in_proj(x).chunk(2, 2)
        past = F.pad(u, (0, 0, 3, 0)) if memory is None else torch.cat([memory[0], u], 1)
        T = x.shape[1]
        u = F.silu(sum(past[:, i : i + T] * self.conv[i] for i in range(4)) + self.conv_bias)
        y, h = fused("selective_scan", selective_scan_plain)(u, *self.select(u), None if memory is None else memory[1])
        if memory is not None:
            memory[0].copy_(past[:, T:])
            memory[1].copy_(h)
        return self.out_proj((y + self.D * u) * F.silu(z))

    def step(self, x: Tensor, memory, t: int) -> Tensor:
        (past, h), (u, z) = memory, self.in_proj(x).chunk(2, 1)
        out = F.silu(torch.addcmul(self.conv_bias, u, self.conv[3]) + (past * self.conv[:3]).sum(1))
        past.copy_(torch.cat([past[:, 1:], u[:, None]], 1))
        dt, A, B, C = self.select(out)
        h.mul_((dt[..., None] * A).exp_()).addcmul_((dt * out)[..., None], B[:, None])
        y = (h @ C[..., None])[..., 0]
        return self.out_proj(torch.addcmul(y, self.D, out) * F.silu(z))


class Layer(nn.Module):
    """A mixer between tokens, then a network at each of them; both read what is normalised and add to the stream."""

    def __init__(self, width: int, mixer: str, dropout: float = 0.0, **options):
        super().__init__()
        self.ln_1, self.ln_2, self.drop = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(dropout)
        self.mixer, self.c_fc = MIXERS[mixer](width, **options), Conv1D(width, 4 * width)
        self.c_proj = Conv1D(4 * width, width, 0.02 / (2 * options["layers"]) ** 0.5)

    def mlp(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))

    def forward(self, x: Tensor, memory=None, start: int = 0) -> Tensor:
        x = x + self.drop(self.mixer(self.ln_1(x), memory, start))
        return x + self.drop(self.mlp(self.ln_2(x)))

    def step(self, x: Tensor, memory, t: int) -> Tensor:
        x = x + self.mixer.step(self.ln_1(x), memory, t)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """p(x_t | x_<t) over sentences of T tokens of K kinds. Inputs (B, S, lags) hold what stands `lags` before each
    place; where no token does, the start token of the class, K + class."""

    def __init__(self, K: int, T: int, width: int = 128, layers: int = 4, heads: int = 4, mixer: str = "attention",
                 classes: int = 1, dropout: float = 0.0, lags=(1,)):
        super().__init__()
        self.K, self.T, self.classes, self.lags = K, T, classes, lags
        self.wte, self.wpe = nn.Embedding(len(lags) * (K + classes), width), nn.Embedding(T, width)
        self.register_buffer("table", torch.arange(len(lags)) * (K + classes), persistent=False)
        for table in (self.wte, self.wpe):
            nn.init.normal_(table.weight, std=0.02)
        options = dict(mixer=mixer, heads=heads, layers=layers, dropout=dropout)
        self.h = nn.ModuleList(Layer(width, **options) for _ in range(layers))
        self.drop, self.ln_f, self.lm_head = nn.Dropout(dropout), nn.LayerNorm(width), nn.Linear(width, K, bias=False)
        nn.init.zeros_(self.lm_head.weight)                 # it starts as the uniform model

    def begin(self, n: int, labels: Tensor | None = None) -> Tensor:
        """(n, reach): the start token, of class 0 where none is named, as often as the longest lag asks for."""
        labels = self.wte.weight.new_zeros(n, dtype=torch.long) if labels is None else labels
        return (self.K + labels)[:, None].expand(-1, max(self.lags))

    def inputs(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, S, lags) of the first S places from their tokens (B, S)."""
        reach, past = max(self.lags), torch.cat([self.begin(len(tokens), labels), tokens], 1)
        return torch.stack([past[:, reach - lag : past.shape[1] - lag] for lag in self.lags], 2)

    def embed(self, inputs: Tensor) -> Tensor:
        """(..., lags) -> (..., width): each lag has a table of its own in wte."""
        x = F.embedding_bag((inputs + self.table).view(-1, len(self.lags)), self.wte.weight, mode="sum")
        return x.view(*inputs.shape[:-1], -1)

    def forward(self, inputs: Tensor, memory=None, start: int = 0) -> Tensor:
        """Logits (B, S, K) of the places from `start` on; memory: of what was read before, and is to be remembered."""
        x = self.drop(self.embed(inputs) + self.wpe.weight[start : start + inputs.shape[1]])
        for layer, kept in zip(self.h, memory or [None] * len(self.h)):
            x = layer(x, kept, start)
        return self.lm_head(self.ln_f(x))

    def step(self, inputs: Tensor, memory, t: int) -> Tensor:
        """Logits (B, K) of place t from its inputs (B, lags) and the memory."""
        x = self.wte(inputs + self.table).sum(1) + self.wpe.weight[t]
        for layer, kept in zip(self.h, memory):
            x = layer.step(x, kept, t)
        return F.linear(self.ln_f(x), self.lm_head.weight)

    def memory(self, n: int):
        return [layer.mixer.memory(n, self.T) for layer in self.h]

    def nll(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """-log p(x_t | x_<t) in nats, (B, T)."""
        logits = self(self.inputs(tokens, labels))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)

    def features(self, tokens: Tensor, parts: int = 1) -> list[Tensor]:
        """(B, parts width) a layer: means of ln_1(h), last of ln_f(h), over parts of the sentence; one in [1] 2.4."""
        x, out = self.embed(self.inputs(tokens)) + self.wpe.weight, []
        means = lambda h: torch.cat([part.mean(1) for part in h.tensor_split(parts, 1)], 1)
        for layer in self.h:
            out.append(means(layer.ln_1(x)))
            x = layer(x)
        return [*out, means(self.ln_f(x))]

    @torch.inference_mode()
    def generate(self, n: int, prompt: Tensor | None = None, labels: Tensor | None = None, **limits) -> Tensor:
        """(n, T) tokens after those of prompt (n, s); limits: temperature, top_k, top_p of `restrict`.

        log p + Gumbel noise is the largest with probability p, so a token is drawn by one argmax."""
        begin, memory, s = self.begin(n, labels), self.memory(n), 0
        past = torch.cat([begin, begin.new_empty(n, self.T)], 1)
        if prompt is not None and (s := prompt.shape[1]):
            self(self.inputs(prompt, labels), memory)
            past[:, begin.shape[1] : begin.shape[1] + s] = prompt
        before = begin.shape[1] - torch.tensor(self.lags, device=past.device)
        noise = torch.empty(self.T, n, self.K, device=past.device).exponential_().log_()
        for t in range(s, self.T):
            logits = restrict(self.step(past.index_select(1, before + t), memory, t), **limits)
            torch.argmax(logits.sub(noise[t]), 1, out=past[:, begin.shape[1] + t])
        return past[:, begin.shape[1] :]


# ---- the family: what a token is


class Language(nn.Module):
    """K kinds of tokens, T of them an example of `shape`: tokens(x), decode(tokens). pixels(tokens): symbols (B, H, W)
    of `kinds` kinds, for tables. exact: nothing is lost. side: of a token, in pixels. lags: how far behind a place lie
    those around it, two on its left, three above it, one above them."""

    exact, side = True, 1

    def __init__(self, shape, K: int, kinds: int = 2):
        super().__init__()
        self.shape, self.K, self.kinds = tuple(shape), K, kinds
        self.T, row = math.prod(shape[1:]) // self.side**2, shape[2] // self.side
        self.lags = tuple(sorted({1, 2, row - 1, row, row + 1, 2 * row} - {0}))

    def pixels(self, tokens: Tensor) -> Tensor:
        return tokens.view(len(tokens), *self.shape[1:])


def draw_bits(x: Tensor) -> Tensor:
    """0 and 1 of x in [-1, 1], drawn with the grey level as probability of 1: dynamic binarisation."""
    return (2 * torch.rand_like(x) - 1 < x).long()


class Grey(Language):
    """One token a pixel, its level."""

    def __init__(self, shape, levels: int):
        super().__init__(shape, levels, levels)

    def tokens(self, x):
        return ((x + 1) * ((self.K - 1) / 2)).round().long().flatten(1)

    def decode(self, tokens):
        return tokens.view(-1, *self.shape) * (2 / (self.K - 1)) - 1


class Bits(Grey):
    """One token a pixel of a binary image."""

    def tokens(self, x):
        return draw_bits(x).flatten(1)


class Patches(Language):
    """One of 16 tokens for 2 x 2 pixels of a binary image: a quarter of the places for the same likelihood."""

    side = 2

    def __init__(self, shape, levels: int = 2):
        super().__init__(shape, 16)
        if shape[1] % 2 or shape[2] % 2:
            raise ValueError(f"2 x 2 patches need even sides, not {shape[1]} x {shape[2]}: --tokens pixel, or --size")

    def tokens(self, x):
        return patches(draw_bits(x))

    def decode(self, tokens):
        return 2.0 * unpatch(tokens, *self.shape[1:]) - 1

    def pixels(self, tokens):
        return unpatch(tokens, *self.shape[1:])[:, 0]


class Palette(Language):
    """One token a pixel, the nearest of K colours: `palette` (K, channels), means of the training set's. [1] 3.2"""

    exact = False

    def __init__(self, shape, K: int):
        super().__init__(shape, K, K)
        self.register_buffer("palette", torch.zeros(K, shape[0]))

    def fit(self, x: Tensor):
        self.palette.copy_(k_means(rearrange(x, "b c h w -> (b h w) c"), self.K))

    def tokens(self, x):
        flat = rearrange(x, "b c h w -> (b h w) c")
        return fused("nearest_code", nearest_code_plain)(flat, self.palette).view(len(x), -1)

    def decode(self, tokens):
        return rearrange(self.palette[tokens], "b (h w) c -> b c h w", h=self.shape[1])


class Cells(Language):
    """Each coordinate of a point in one of K equal cells of [-reach, reach], uniform inside: a density."""

    def __init__(self, shape, K: int, reach: float = 3.0):
        nn.Module.__init__(self)
        self.shape, self.K, self.T, self.lags = tuple(shape), K, shape[0], (1,)
        self.reach, self.log_volume = reach, shape[0] * math.log(2 * reach / K)

    def tokens(self, x):
        return ((x + self.reach) * (self.K / (2 * self.reach))).floor().long().clamp(0, self.K - 1)

    def decode(self, tokens):
        return (tokens + torch.rand(tokens.shape, device=tokens.device)) * (2 * self.reach / self.K) - self.reach


MIXERS = {"attention": CausalSelfAttention, "mamba": Mamba}
LANGUAGES = {"pixel": Bits, "patch": Patches, "grey": Grey, "palette": Palette, "cells": Cells}


class IGPT(nn.Module):
    """A language and the model of its sentences; x (B, *shape), pixels in [-1, 1]."""

    def __init__(self, language: Language, near: bool = True, **options):
        super().__init__()
        lags = language.lags if near else (1,)
        self.language, self.gpt = language, GPT(language.K, language.T, lags=lags, **options)

    def loss(self, x: Tensor, labels: Tensor | None = None, share: slice = slice(None)) -> Tensor:
        """Nats a token of the examples `share`, with the bits that are drawn for all."""
        return self.gpt.nll(self.language.tokens(x)[share], labels if labels is None else labels[share]).mean()

    def log_prob(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B,) nats: log p(tokens of x), for points a log density, 0 outside the cells."""
        log_p = -self.gpt.nll(self.language.tokens(x), labels).sum(1)
        if isinstance(self.language, Cells):
            log_p = log_p - self.language.log_volume
            log_p = log_p.masked_fill((x.abs() > self.language.reach).any(1), -math.inf)
        return log_p

    @torch.inference_mode()
    def sample(self, n: int, labels: Tensor | None = None, rows: int = 0, **limits) -> Tensor:
        """(n, *shape), `rows` at a time; of even classes where there are some and none are named."""
        rows = rows or max(1, min(2**15 // self.language.T, 4096))
        if labels is None and self.gpt.classes > 1:
            labels = torch.arange(n, device=self.gpt.wte.weight.device) % self.gpt.classes
        named = lambda i: None if labels is None else labels[i : i + rows]
        drawn = [self.gpt.generate(min(rows, n - i), labels=named(i), **limits) for i in range(0, n, rows)]
        return torch.cat([self.language.decode(tokens) for tokens in drawn])

    def of_class(self, labels: Tensor) -> Tensor:
        return self.sample(len(labels), labels)

    @torch.inference_mode()
    def complete(self, x: Tensor, rows: int, labels: Tensor | None = None, **limits) -> Tensor:
        """x with all below its first `rows` rows of pixels drawn anew, a multiple of the side of a token."""
        tokens, side = self.language.tokens(x), self.language.side
        known = tokens[:, : rows // side * (self.language.shape[2] // side)]
        return self.language.decode(self.gpt.generate(len(x), known, labels, **limits))


def train(model: IGPT, optimizer, batches, steps: int, lr: float, start: int = 0, share: slice = slice(None)):
    """Descent on the nats a token, with a warm-up, a cosine to zero and slopes of at most 1."""
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = next(batches)
        loss = model.loss(*(batch if isinstance(batch, tuple) else (batch,)), share=share)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield {"loss": loss.detach()}


def build(config: dict, shape, levels, classes=None) -> IGPT:
    """The model that the options of a run, or of a checkpoint, describe; levels None for points."""
    name = config["tokens"]
    if name == "auto":
        odd = levels and (shape[1] % 2 or shape[2] % 2)
        name = "cells" if not levels else "palette" if shape[0] > 1 else "pixel" if odd else "patch"
    if (name == "cells") == bool(levels):
        raise ValueError(f"--tokens {name} is for {'points' if levels else 'images'}")
    if name in ("pixel", "patch", "grey") and shape[0] > 1:
        raise ValueError(f"--tokens {name} is for one channel; {shape[0]} want --tokens palette")
    if config["conditional"] and not classes:
        raise ValueError("--conditional wants a set with classes")
    kinds = {"pixel": 2, "cells": config["cells"], "palette": config["colours"]}.get(name, levels)
    language = LANGUAGES[name](shape, kinds)
    sizes = {name: config[name] for name in ("near", "width", "layers", "heads", "dropout")}
    return IGPT(language, mixer=config["model"], classes=classes if config["conditional"] else 1, **sizes)


@torch.inference_mode()
def evaluate(model: IGPT, x: Tensor, labels: Tensor | None = None, rows: int = 50) -> Tensor:
    """-log p(x) in nats, (N,)."""
    parts = [v.split(rows) for v in (x, labels) if v is not None]
    return -torch.cat([model.log_prob(*part) for part in zip(*parts)])


def main():
    import baselines
    import data
    import run

    args = run.parse(
        __doc__, MIXERS, alias={"model": "--mixer"}, steps=4000, batch=512, lr=2e-3,
        training={"tokens": ("auto", "of an example", ["auto", *LANGUAGES]), "cells": (256, "of a coordinate"),
                  "colours": (32, "of the palette"), "width": (64, "of the stream"), "layers": (2, "of them"),
                  "heads": (2, "of attention"), "dropout": (0.0, "share of the stream dropped in training"),
                  "near": (True, "a place is told the tokens around it, not the last alone"),
                  "conditional": (False, "a start token for each class"), "size": (0, "of images; 0 keeps theirs")},
        sampling={"temperature": (1.0, "of sampling; 0: the most likely"), "top_k": (0, "likeliest tokens; 0: all"),
                  "top_p": (1.0, "least probability of those kept"), "nll_rows": (2000, "held-out examples measured"),
                  "probe_rows": (5000, "training images of the linear probe; 0: no probe")},
        images={"steps": 4000, "batch": 16, "lr": 3e-3, "layers": 4, "samples": 500, "mnist": {"steps": 6000},
                "hoda": {"steps": 6000}})
    with run.Run(args) as job:
        if args.top_p > 1 or args.dropout >= 1 or min(args.cells, args.colours) < 2:
            raise ValueError("--top-p is a probability, --dropout below 1, --cells and --colours 2 or more")
        truth = data.load(args.dataset, args.data_dir, size=args.size or None, download=args.download,
                          skip_bad=args.skip_bad)
        points = hasattr(truth, "log_prob")
        model = build(vars(args), truth.shape, None if points else truth.levels, truth.classes).to(job.device)
        language = model.language
        if args.ckpt:
            job.restore(model=model)
        else:
            if not language.exact and not args.resume:
                language.fit(truth.sample(500, split="train").to(job.device))
            optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), fused=True)
            start = job.keep(model=model, optimizer=optimizer)
            batches = truth.batches(args.batch, job.device, labels=args.conditional)
            rows = train(model, optimizer, batches, args.steps, args.lr, start, job.share)
            floor = points and not args.conditional and {"loss": (truth.entropy - language.log_volume) / language.T}
            for _ in job.track(rows, floors=floor):
                pass
        model.eval()

        limits = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
        with job.bar(args.samples, "sampling") as bar:
            samples = []
            while (left := args.samples - bar.n) > 0:
                samples.append(model.sample(min(left, 4096 if points else 128), **limits).cpu())
                bar.update(len(samples[-1]))
            seconds = bar.format_dict["elapsed"]
        results, samples = job.judge(torch.cat(samples), truth)
        results |= baselines.report(model, evaluate, truth, job, args, seconds)
        job.report(results, samples, truth, sum(p.numel() for p in model.parameters()), seconds)


if __name__ == "__main__":
    main()
