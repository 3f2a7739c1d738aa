"""Generative adversarial networks: two losses and one loop.

    min_G max_D V = E log D(x) + E log(1 - D(G(z)));    at D = p / (p + q), V = 2 JSD(p, q) - log 4  [1] (1), theorem 1

`--model` and where it departs from the first, `gan`, whose generator maximises E log D(G(z)) [1]:
  dcgan      batch normalisation in D too (G has it in all that convolve), weights from N(0, 0.02^2) [2]
  wgan       a critic f in place of D: E f(x) - E f(G(z)) <= W1(p, q) for 1-Lipschitz f; clipped weights, RMSprop [3]
  wgan-gp    Lipschitz by a penalty on the critic's slope between real and fake points [4]
  bigan      an encoder E beside G: D judges the pairs (x, E(x)) and (G(z), z) [5]
  cgan       G and D know the class [6], D by projection [7] or by planes beside the image
  cyclegan   two translators between two sets without pairs: least squares, cycles, identity, a pool of old fakes [8]
  stylegan   a mapping of z to styles that modulate convolutions; noise, mixing, truncation, lazy R1 [9, 10]

References
  [1] Goodfellow et al., Generative Adversarial Networks, arXiv 1406.2661
  [2] Radford, Metz, Chintala, Unsupervised Representation Learning with DCGANs, arXiv 1511.06434
  [3] Arjovsky, Chintala, Bottou, Wasserstein GAN, arXiv 1701.07875
  [4] Gulrajani et al., Improved Training of Wasserstein GANs, arXiv 1704.00028
  [5] Donahue, Kraehenbuehl, Darrell, Adversarial Feature Learning, arXiv 1605.09782
  [6] Mirza, Osindero, Conditional Generative Adversarial Nets, arXiv 1411.1784
  [7] Miyato, Koyama, cGANs with Projection Discriminator, arXiv 1802.05637
  [8] Zhu et al., Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks, arXiv 1703.10593
  [9] Karras et al., Analyzing and Improving the Image Quality of StyleGAN, arXiv 1912.04958
  [10] Mescheder, Geiger, Nowozin, Which Training Methods for GANs do actually Converge?, arXiv 1801.04406 (R1)

Glossary
  paper        code                       shape         meaning
  G(z), D(x)   generator, discriminator   x, (B,)       images or points; logits of D, or scores of a critic
  epsilon      u                          (B,)          where on the line from fake to real, one for each example [4]
  w, psi       w, psi                     (B, L, W)     a style for each layer; how far it stays from the mean style

Use
  python gan.py --dataset gmm                               wgan-gp; or --dataset persian, --model dcgan ...
  python gan.py --model cyclegan --dataset faces --attribute glasses      or --dataset folder:A,B

Not included: adaptive augmentation, spectral normalisation, growing networks.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- maths: for scores (B,) of real and fake examples, what D minimises and what G does

LOSSES = {
    "log": (lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),             # -V. [1] (1)
            lambda fake: F.softplus(-fake).mean()),                                            # [1] section 3
    "wasserstein": (lambda real, fake: fake.mean() - real.mean(), lambda fake: -fake.mean()),  # [3] (2)
    "squares": (lambda real, fake: ((real - 1).square().mean() + fake.square().mean()) / 2,    # [8] section 4
                lambda fake: (fake - 1).square().mean())}
lrelu = lambda x: F.leaky_relu(x, 0.2) * math.sqrt(2 / 1.04)                                   # keeps E x^2 of N(0, 1)


def slopes(scores: Tensor, x: Tensor) -> Tensor:
    """|d scores_i / d x_i| over all of x_i, (B,), itself differentiable; score i may depend on x_i alone."""
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return gradient.flatten(1).norm(dim=1)


def gradient_penalty(critic, real: Tensor, fake: Tensor, u: Tensor) -> Tensor:
    """E (|grad f| - 1)^2 at u real + (1 - u) fake, with u (B,) uniform on [0, 1]. [4] (3)"""
    x = torch.lerp(fake, real, u.view(-1, *[1] * (real.dim() - 1))).requires_grad_()
    return (slopes(critic(x), x) - 1).square().mean()


def r1_penalty(discriminator, real: Tensor) -> Tensor:
    """E |grad D|^2 / 2 at real examples. [10] (9)"""
    x = real.detach().requires_grad_()
    return slopes(discriminator(x), x).square().mean() / 2


def modulated_conv(x: Tensor, weight: Tensor, style: Tensor, demodulate: bool = True) -> Tensor:
    """x (B, I, H, W) under weights (O, I, k, k) whose inputs style (B, I) scales, and whose outputs are brought back to
    norm 1. Images are scaled and not weights, so that the batch stays one convolution. [9] (1), (3)"""
    out = F.conv2d(x * style[:, :, None, None], weight, padding=weight.shape[-1] // 2)
    norm = (style.square() @ weight.square().sum((2, 3)).T + 1e-8).sqrt()[:, :, None, None]
    return out / norm if demodulate else out


def path_lengths(images: Tensor, w: Tensor, noise: Tensor) -> Tensor:
    """|J_w^T y| for y = noise / sqrt(H W), (B,): root mean square over the layers of w (B, L, W). [9] section 3.2"""
    (gradient,) = torch.autograd.grad((images * noise).sum(), w, create_graph=True)
    return gradient.square().sum(2).mean(1).sqrt() / math.sqrt(images.shape[2] * images.shape[3])


def minibatch_stddev(x: Tensor, group: int = 4) -> Tensor:
    """x (B, C, H, W) with one channel more: the standard deviation over groups of examples, averaged over all else."""
    size = math.gcd(len(x), group)
    groups = x.unflatten(0, (size, -1))
    spread = ((groups - groups.mean(0)).square().mean(0) + 1e-8).sqrt().mean((1, 2, 3)).repeat(size)            # (B,)
    return torch.cat([x, spread[:, None, None, None].expand(-1, 1, *x.shape[2:])], 1)


# ---- networks


def dense(d_in: int, d_out: int, width: int, depth: int = 2) -> nn.Sequential:
    """(B, d_in) -> (B, d_out) through `depth` layers of `width`."""
    sizes = [d_in, *[width] * depth]
    hidden = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.LeakyReLU(0.2))]
    return nn.Sequential(*hidden, nn.Linear(width, d_out))


class Waves(nn.Module):
    """Points (B, d) beside sines of them, (B, 9 d): what reads them sees more detail."""

    def forward(self, x):
        return torch.cat([x, *[wave(k * x) for k in (2, 4, 8, 16) for wave in (torch.sin, torch.cos)]], 1)


def ladder(shape, width: int, most: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Sides of an image, halved until none is above `most`; its channels, then width, 2 width, 4 width there."""
    sides = [tuple(shape[1:])]
    while max(sides[-1]) > most:
        sides.append(tuple(max(1, n // 2) for n in sides[-1]))
    return sides, [shape[0], *[width * 2 ** min(k, 2) for k in range(len(sides) - 1)]]


def draw_network(shape, latent: int, width: int, network: str) -> nn.Sequential:
    """The generator (B, latent) -> (B, *shape), images in [-1, 1]; convolutions with batch normalisation."""
    if network == "mlp":
        shaped = [nn.Unflatten(1, tuple(shape)), *[nn.Tanh()] * (len(shape) > 1)]
        return nn.Sequential(dense(latent, math.prod(shape), width, 3), *shaped)
    sides, channels = ladder(shape, width, 4)
    layers = [nn.Linear(latent, channels[-1] * math.prod(sides[-1])), nn.Unflatten(1, (channels[-1], *sides[-1]))]
    for k in range(len(sides) - 1, 0, -1):
        layers += [nn.BatchNorm2d(channels[k]), nn.ReLU(True)]
        layers += [nn.ConvTranspose2d(channels[k], channels[k - 1], 4, 2, 1, tuple(n % 2 for n in sides[k - 1]))]
    return nn.Sequential(*layers, nn.Tanh())


def read_network(shape, width: int, network: str, norm=None, most: int = 4) -> tuple[nn.Sequential, int]:
    """(B, *shape) -> features (B, n), and n; norm: a class of normalisation or None; most: of the last map's side."""
    if network == "mlp":
        first, n = (nn.Flatten(), math.prod(shape)) if len(shape) > 1 else (Waves(), 9 * shape[0])
        return nn.Sequential(first, dense(n, width, width), nn.LeakyReLU(0.2)), width
    sides, channels = ladder(shape, width, most)
    layers = []
    for k, (i, o) in enumerate(zip(channels, channels[1:])):
        layers += [nn.Conv2d(i, o, 4, 2, 1), *([norm(o)] if norm and k else []), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Flatten()), channels[-1] * math.prod(sides[-1])


class Discriminator(nn.Module):
    """Scores (B,) of x, linear in features of it. It may be given z (B, joint) too, to read with the features, or the
    class (B,), for the product of the features and a vector of the class. [7]"""

    def __init__(self, shape, width: int, network: str, norm=None, classes: int = 0, joint: int = 0):
        super().__init__()
        self.body, features = read_network(shape, width, network, norm)
        self.head = dense(features + joint, 1, min(features, 4 * width)) if joint else nn.Linear(features, 1)
        self.classes = nn.Embedding(classes, features) if classes else None

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        h = self.body(x)
        if self.classes is None:
            return self.head(h if extra is None else torch.cat([h, extra], 1))[:, 0]
        return self.head(h)[:, 0] + (self.classes(extra) * h).sum(1)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def translator(shape, width: int, blocks: int = 3) -> nn.Sequential:
    """(B, *shape) -> (B, *shape): half the side, residual blocks, and back. [8] section 7.2, smaller"""
    c, odd = 2 * width, tuple(n % 2 for n in shape[1:])
    norm = lambda c: [nn.InstanceNorm2d(c), nn.ReLU()]
    same = lambda i, o, k: nn.Conv2d(i, o, k, padding=k // 2, padding_mode="reflect")
    block = lambda: Residual(same(c, c, 3), *norm(c), same(c, c, 3), nn.InstanceNorm2d(c))
    return nn.Sequential(same(shape[0], width, 7), *norm(width), nn.Conv2d(width, c, 4, 2, 1), *norm(c),
                         *[block() for _ in range(blocks)], nn.ConvTranspose2d(c, width, 4, 2, 1, odd), *norm(width),
                         same(width, shape[0], 7), nn.Tanh())


class Equal(nn.Module):
    """Linear, or a k x k convolution. Weights start as N(0, 1), divided by sqrt(inputs) in use; slow: for Adam."""

    def __init__(self, i: int, o: int, k: int = 0, bias: float = 0.0, slow: float = 1.0):
        super().__init__()
        shape = (o, i, k, k) if k else (o, i)
        self.k, self.slow, self.scale = k, slow, slow / math.sqrt(math.prod(shape[1:]))
        self.weight, self.bias = nn.Parameter(torch.randn(shape) / slow), nn.Parameter(torch.full((o,), bias / slow))

    def forward(self, x):
        weight, bias = self.weight * self.scale, self.bias * self.slow
        return F.conv2d(x, weight, bias, padding=self.k // 2) if self.k else F.linear(x, weight, bias)


class StyleConv(nn.Module):
    def __init__(self, i: int, o: int, styles: int, last: bool = False):    # last: to colours, with modulation alone
        super().__init__()
        self.last, self.style = last, Equal(styles, i, bias=1.0)
        self.weight, self.bias = nn.Parameter(torch.randn(o, i, *[1 if last else 3] * 2)), nn.Parameter(torch.zeros(o))
        self.strength = None if last else nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, w: Tensor, draw=None) -> Tensor:
        weight = self.weight / math.sqrt(self.weight[0].numel())
        out = modulated_conv(x, weight, self.style(w), not self.last) + self.bias[:, None, None]
        return out if self.last else lrelu(out + self.strength * draw(torch.randn, len(x), 1, *x.shape[2:]))


class StyleGenerator(nn.Module):
    """z -> w by the mapping; a learned constant grows into the image under a style for each layer, and each resolution
    adds its colours. Two layers a resolution, with noise of their own. The mapping of [9] has 8. [9] figures 2, 7"""

    def __init__(self, shape, latent: int, width: int, mapping: int = 2, slow: float = 0.01):
        super().__init__()
        self.sides, channels = (v[::-1] for v in ladder((width // 2, *shape[1:]), width, 7))
        self.mapping = nn.ModuleList(Equal(latent, latent, slow=slow) for _ in range(mapping))
        self.start = nn.Parameter(torch.randn(channels[0], *self.sides[0]))
        pairs = [(i, o) for c, d in zip([channels[0], *channels], channels) for i, o in ((c, d), (d, d))]
        self.convs = nn.ModuleList(StyleConv(i, o, latent) for i, o in pairs)
        self.colours = nn.ModuleList(StyleConv(c, shape[0], latent, last=True) for c in channels)
        self.register_buffer("mean_w", torch.zeros(latent))

    def styles(self, z: Tensor) -> Tensor:
        w = F.rms_norm(z, (z.shape[-1],))
        for layer in self.mapping:
            w = lrelu(layer(w))
        return w

    def forward(self, w: Tensor, draw) -> Tensor:
        """Images of w (B, layers, W); draw(torch.randn, B, 1, h, w) gives the noise of a layer."""
        x, image = self.start.expand(len(w), -1, -1, -1), 0
        for k, side in enumerate(self.sides):
            if k:
                x, image = (F.interpolate(v, size=side, mode="bilinear") for v in (x, image))
            for j in (2 * k, 2 * k + 1):
                x = self.convs[j](x, w[:, j], draw)
            image = image + self.colours[k](x, w[:, 2 * k + 1])
        return image.tanh()                                 # not in [9]: D would see how far a pixel is from -1 and 1


class StyleDiscriminator(nn.Module):
    """Residual blocks that halve the side, the spread of the minibatch, two layers. [9] figure 7 (c)"""

    def __init__(self, shape, width: int):
        super().__init__()
        self.sides, channels = ladder((width // 2, *shape[1:]), width, 7)
        pairs, c = list(zip(channels, channels[1:])), channels[-1]
        self.first, self.last = Equal(shape[0], channels[0], 1), Equal(c + 1, c, 3)
        self.same = nn.ModuleList(Equal(i, i, 3) for i, _ in pairs)
        self.wider, self.skips = (nn.ModuleList(Equal(i, o, k) for i, o in pairs) for k in (3, 1))
        self.hidden, self.head = Equal(c * math.prod(self.sides[-1]), c), Equal(c, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = lrelu(self.first(x))
        for same, wider, skip in zip(self.same, self.wider, self.skips):
            less = lambda v: F.avg_pool2d(v, [min(2, n) for n in v.shape[2:]])
            x = (lrelu(wider(less(lrelu(same(x))))) + skip(less(x))) / math.sqrt(2)
        x = lrelu(self.last(minibatch_stddev(x)))
        return self.head(lrelu(self.hidden(x.flatten(1))))[:, 0]


# ---- the family: two losses


class GAN(nn.Module):
    """`examples(batch)`, real and fake; of these `d_loss` and `g_loss`, {name: number}, the first to be minimised;
    `sample(n)`. A batch is (x,), or (x, y) where `labels`; x (B, *shape), images in [-1, 1]. `discriminator` holds what
    d_loss trains, `options` what a member alone has, and the defaults."""

    betas, critic_steps, norm, labels, losses, options = (0.5, 0.999), 1, None, False, LOSSES["log"], {}
    share, world = slice(None), 1                           # rows of the global batch that this process keeps

    def __init__(self, shape, latent: int = 64, width: int = 32, network: str = "conv", **options):
        super().__init__()
        if unknown := options.keys() - self.options:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(unknown)}")
        self.__dict__.update(self.options | options, shape=tuple(shape), latent=latent)
        self.networks(width, network)
        self.to(memory_format=torch.channels_last)          # two thirds of the time on a CPU

    def networks(self, width: int, network: str):
        self.generator = draw_network(self.shape, self.latent, width, network)
        self.discriminator = Discriminator(self.shape, width, network, self.norm)

    def draw(self, law, n: int, *shape) -> Tensor:
        """Random numbers (n, *shape): this process's rows of those that all of them draw alike."""
        return law(n * self.world, *shape, device=next(self.parameters()).device)[self.share]

    def fake(self, n: int) -> Tensor:
        return self.generator(self.draw(torch.randn, n, self.latent))

    def examples(self, batch) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What D reads, real and fake."""
        return batch, (self.fake(len(batch[0])),)

    def judge(self, real, fake) -> tuple[Tensor, Tensor]:
        if self.norm:                                       # normalised apart
            return self.discriminator(*real), self.discriminator(*fake)
        return self.discriminator(*map(torch.cat, zip(real, fake))).chunk(2)

    def d_loss(self, real, fake, step: int = 0) -> dict[str, Tensor]:
        real, fake = ([v.detach() for v in side] for side in (real, fake))
        return {"d_loss": self.losses[0](*self.judge(real, fake))}

    def g_loss(self, real, fake, step: int = 0) -> dict[str, Tensor]:
        return {"g_loss": self.losses[1](self.discriminator(*fake))}

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that d_loss trains, and those that g_loss trains."""
        d = {id(p) for p in self.discriminator.parameters()}
        return tuple([p for p in self.parameters() if (id(p) in d) == side] for side in (True, False))

    def optimizers(self, lr: float):
        return tuple(torch.optim.Adam(part, lr, self.betas, fused=True) for part in self.parts())

    @torch.inference_mode()
    def sample(self, n: int) -> Tensor:
        return self.fake(n)


class DCGAN(GAN):
    """[2] section 3: batch normalisation but for the first layer of D and the last of G; weights from N(0, 0.02^2)."""

    norm = nn.BatchNorm2d

    def networks(self, width, network):
        super().networks(width, network)
        for p in self.parameters():
            if p.dim() > 1:                                 # what is no bias
                nn.init.normal_(p, 0, 0.02)


class WGAN(GAN):
    """[3] Algorithm 1: minus d_loss estimates K W1(p, q), K the slope of a critic normalised like DCGAN's."""

    norm, losses, options = nn.BatchNorm2d, LOSSES["wasserstein"], {"clip": 0.01, "critic_steps": 5}

    def optimizers(self, lr):
        d, g = (torch.optim.RMSprop(part, lr) for part in self.parts())
        d.register_step_post_hook(lambda *_: [p.data.clamp_(-self.clip, self.clip) for p in self.parts()[0]])
        return d, g


class WGANGP(GAN):
    """[4] Algorithm 1. A critic without batch normalisation: its slope at one example must not depend on the others."""

    betas, losses, options = (0.0, 0.9), LOSSES["wasserstein"], {"penalty": 10.0, "critic_steps": 5}

    def d_loss(self, real, fake, step=0):
        slope = gradient_penalty(self.discriminator, real[0], fake[0].detach(), self.draw(torch.rand, len(real[0])))
        return {"d_loss": super().d_loss(real, fake)["d_loss"] + self.penalty * slope, "penalty": slope}


class BiGAN(GAN):
    """[5]: at the optimum E inverts G. To D pairs with E are real; G and E want both judged the other way round.
    Not in [5]: codes are normalised as the prior is, and D has R1 [10]; without, codes go far away and D knows them."""

    options = {"penalty": 1.0}

    def networks(self, width, network):
        super().networks(width, network)
        body, features = read_network(self.shape, width, network)
        self.encoder = nn.Sequential(body, nn.Linear(features, self.latent), nn.BatchNorm1d(self.latent, affine=False))
        self.discriminator = Discriminator(self.shape, width, network, joint=self.latent)

    def examples(self, batch):
        z = self.draw(torch.randn, len(batch[0]), self.latent)
        return (*batch, self.encoder(*batch)), (self.generator(z), z)

    def d_loss(self, real, fake, step=0):
        row, pairs = super().d_loss(real, fake), torch.cat([v.flatten(1) for v in real], 1)
        score = lambda p: self.discriminator(p[:, :-self.latent].unflatten(1, self.shape), p[:, -self.latent:])
        return {"d_loss": row["d_loss"] + self.penalty * r1_penalty(score, pairs)}

    def g_loss(self, real, fake, step=0):
        return {"g_loss": self.losses[0](*self.judge(real, fake)[::-1])}


class CGAN(GAN):
    """[6]; what is generated has the classes of the batch."""

    labels, options = True, {"classes": 10, "condition": "projection"}

    def networks(self, width, network):
        self.generator = draw_network(self.shape, self.latent + self.classes, width, network)
        planes, project = (self.classes, 0) if self.condition == "planes" else (0, self.classes)
        self.discriminator = Discriminator((self.shape[0] + planes, *self.shape[1:]), width, network, classes=project)

    def of_class(self, y: Tensor) -> Tensor:
        z = self.draw(torch.randn, len(y), self.latent)
        return self.generator(torch.cat([z, F.one_hot(y, self.classes).to(z.dtype)], 1))

    def examples(self, batch):
        (x, y), fake = batch, self.of_class(batch[1])
        if self.condition == "projection":
            return batch, (fake, y)
        planes = F.one_hot(y, self.classes).to(x.dtype).view(len(x), -1, *[1] * (x.dim() - 2))
        return tuple((torch.cat([v, planes.expand(-1, -1, *x.shape[2:])], 1),) for v in (x, fake))

    def fake(self, n):                                      # all classes in turn
        return self.of_class(torch.arange(n, device=next(self.parameters()).device) % self.classes)


class Pool(nn.Module):
    """Gives back what it gets while it fills; later, with probability 1/2, an older image in exchange. [8] section 4"""

    def __init__(self, shape, size: int = 50):
        super().__init__()
        self.register_buffer("images", torch.zeros(size, *shape))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        out = x.clone()
        for i, image in enumerate(x):
            if self.filled < len(self.images):
                self.images[self.filled] = image
                self.filled += 1
            elif len(self.images) and torch.rand(()) < 0.5:
                k = int(torch.randint(len(self.images), ()))
                out[i], self.images[k] = self.images[k].clone(), image
        return out


class CycleGAN(GAN):
    """A batch is (a, b), of two sets; generator["ab"] and ["ba"] translate. [8] (3), with the identity loss of 5.2"""

    losses, options = LOSSES["squares"], {"cycle": 10.0, "identity": 5.0}

    def networks(self, width, network):
        self.generator = nn.ModuleDict({way: translator(self.shape, width) for way in ("ab", "ba")})
        patches = lambda: [*read_network(self.shape, width, "conv", nn.InstanceNorm2d, 8)[0][:-1],
                           nn.Conv2d(ladder(self.shape, width, 8)[1][-1], 1, 3, padding=1)]
        self.discriminator = nn.ModuleDict({side: nn.Sequential(*patches()) for side in "ab"})
        self.pools = nn.ModuleDict({side: Pool(self.shape) for side in "ab"})

    @torch.inference_mode()
    def translate(self, way: str, x: Tensor) -> Tensor:
        return torch.cat([self.generator[way](part) for part in x.split(100)])

    def sample(self, n):                                    # of the images `source` (N, *shape)
        return self.translate("ab", self.source[torch.arange(n) % len(self.source)])

    def examples(self, batch):
        return batch, (self.generator["ba"](batch[1]), self.generator["ab"](batch[0]))

    def d_loss(self, real, fake, step=0):
        pairs = [torch.cat([x, self.pools[side](made)]) for side, x, made in zip("ab", real, fake)]
        return {"d_loss": sum(self.losses[0](*self.discriminator[side](x).chunk(2)) for side, x in zip("ab", pairs))}

    def g_loss(self, real, fake, step=0):
        ab, ba = self.generator.values()
        fooled = sum(self.losses[1](self.discriminator[side](made)) for side, made in zip("ab", fake))
        cycle = F.l1_loss(ab(fake[0]), real[1]) + F.l1_loss(ba(fake[1]), real[0])
        identity = F.l1_loss(ba(real[0]), real[0]) + F.l1_loss(ab(real[1]), real[1])
        return {"g_loss": fooled + self.cycle * cycle + self.identity * identity, "cycle": cycle, "identity": identity}


class StyleGAN(GAN):
    """[9]: R1 every `lazy` steps, so many times as heavy, and the lengths of paths too where `path` weighs them."""

    betas, norm = (0.0, 0.99), True                         # D compares the examples of a batch: real and fake apart
    options = {"penalty": 10.0, "lazy": 16, "path": 0.0, "psi": 1.0, "mixing": 0.9}

    def networks(self, width, network):
        self.generator = StyleGenerator(self.shape, self.latent, width)
        self.discriminator = StyleDiscriminator(self.shape, width)
        self.register_buffer("mean_length", torch.zeros(()))

    def mix(self, w_1: Tensor, w_2: Tensor, cut: Tensor) -> Tensor:
        """(B, L, W): the style w_1 (B, W) in the first cut (B,) layers, w_2 in the others."""
        first = torch.arange(len(self.generator.convs), device=cut.device) < cut[:, None]
        return torch.where(first[..., None], w_1[:, None], w_2[:, None])

    def mixed_styles(self, n: int) -> Tensor:
        """(n, L, W): two styles and a random cut with probability `mixing`, else one; training follows their mean."""
        w, u = self.generator.styles(self.draw(torch.randn, n, 2, self.latent)), self.draw(torch.rand, n, 2)
        if self.training:
            self.generator.mean_w.lerp_(w.detach().mean((0, 1)), 0.005)
        L = len(self.generator.convs)
        return self.mix(w[:, 0], w[:, 1], torch.where(u[:, 0] < self.mixing, 1 + (u[:, 1] * (L - 1)).long(), L))

    def fake(self, n):
        return self.generator(self.mixed_styles(n), self.draw)

    def d_loss(self, real, fake, step=0):
        row = super().d_loss(real, fake)
        if self.penalty and step % self.lazy == 0:
            row["d_loss"] = row["d_loss"] + self.lazy * self.penalty * r1_penalty(self.discriminator, *real)
        return row

    def g_loss(self, real, fake, step=0):
        row = super().g_loss(real, fake)
        if self.path and step % 4 == 0:
            w = self.mixed_styles(len(real[0]))
            images = self.generator(w, self.draw)
            lengths = path_lengths(images, w, torch.randn_like(images))
            self.mean_length.lerp_(lengths.detach().mean(), 0.01)
            row["g_loss"] = row["g_loss"] + 4 * self.path * (lengths - self.mean_length).square().mean()
        return row

    @torch.inference_mode()
    def sample(self, n):
        w = torch.lerp(self.generator.mean_w, self.generator.styles(self.draw(torch.randn, n, self.latent)), self.psi)
        return self.generator(w[:, None].expand(-1, len(self.generator.convs), -1), self.draw)


MODELS = {"gan": GAN, "dcgan": DCGAN, "wgan": WGAN, "wgan-gp": WGANGP, "bigan": BiGAN, "cgan": CGAN,
          "cyclegan": CycleGAN, "stylegan": StyleGAN}


def train(model: GAN, average: GAN, optimizers, batches, steps: int, lr: float, start: int = 0, decay: float = 0.999):
    """[1] Algorithm 1, but G's step takes the fakes of D's last; the rate falls to zero over the second half."""
    batches = (tuple(part[model.share] for part in (b if isinstance(b, tuple) else (b,))) for b in batches)
    (d_weights, weights), row = model.parts(), {}
    moving = lambda gan: gan.parts()[1] + [b for b in gan.buffers() if b.is_floating_point()]     # statistics too
    averages, averaged = moving(average), moving(model)

    def descend(losses, optimizer, parameters, slope):
        optimizer.zero_grad()
        next(iter(losses.values())).backward(inputs=parameters)
        optimizer.step()
        row.update(losses, **{slope: nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])})

    for step in range(start, steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * min(1, 2 * (1 - step / steps))
        for k in range(model.critic_steps, 0, -1):
            with torch.set_grad_enabled(k == 1):
                real, fake = model.examples(next(batches))
            descend(model.d_loss(real, fake, step), optimizers[0], d_weights, "d_slope")
        descend(model.g_loss(real, fake, step), optimizers[1], weights, "g_slope")
        with torch.no_grad():
            torch._foreach_lerp_(averages, averaged, 1 - min(decay, (1 + step) / (10 + step)))
        yield {name: value.detach() for name, value in row.items()}


def build(config: dict, shape, classes, points: bool) -> GAN:
    """The model that the options of a run, or of a checkpoint, describe."""
    member, auto = MODELS[config["model"]], "mlp" if points else "conv"
    network = auto if config["network"] == "auto" else config["network"]
    if points and (network == "conv" or member in (DCGAN, CycleGAN, StyleGAN)):
        raise ValueError(f"points have no pixels: {config['model']} with --network {network} is for images")
    options = {name: value for name, value in (config | {"classes": classes or 1}).items() if name in member.options}
    return member(shape, config["latent"], config["channels" if network == "conv" else "width"], network, **options)


def main():
    import time

    import data
    import judges
    import run

    args = run.parse(
        __doc__, MODELS, model="wgan-gp", steps=5000, batch=256, lr=2e-3,
        training={"latent": (16, "dimensions of z"), "width": (128, "of MLPs"), "channels": (32, "of convolutions"),
                  "network": ("auto", "of both", ["auto", "mlp", "conv"]), "size": (0, "of images; 0 keeps theirs"),
                  "penalty": (0.1, "weight of the slope's penalty (wgan-gp), of R1 (bigan, stylegan)"),
                  "clip": (0.01, "bound of weights (wgan)"), "path": (0.0, "weight of path lengths (stylegan)"),
                  "condition": ("projection", "where D reads the class (cgan)", ["projection", "planes"]),
                  "attribute": ("", "that the second set has and the first has not (cyclegan); default: the label"),
                  "decay": (0.999, "of the moving average of G"), "critic_steps": (1, "for one of G (wgan, wgan-gp)")},
        sampling={"psi": (1.0, "truncation (stylegan)"), "fid": (False, "a Frechet distance by Inception as well")},
        images={"grid": {"latent": 2, "steps": 15_000}, "steps": 4000, "batch": 64, "lr": 1e-3, "latent": 64,
                "samples": 1000, "penalty": 10.0, "cyclegan": {"lr": 2e-4, "batch": 4, "channels": 16, "size": 32},
                "wgan": {"lr": 5e-4, "critic_steps": 2}, "bigan": {"steps": 2500, "decay": 0.99, "penalty": 1.0},
                "width": 400, "stylegan": {"lr": 4e-3, "batch": 32, "channels": 16, "penalty": 1.0, "steps": 8000}})
    with run.Run(args) as job:
        options = dict(size=args.size or None, download=args.download, skip_bad=args.skip_bad)
        source, truth = (data.domains(args.dataset, args.data_dir, args.attribute, **options)
                         if args.model == "cyclegan" else (None, data.load(args.dataset, args.data_dir, **options)))
        points = hasattr(truth, "log_prob")
        inception = judges.inception_features(job.device) if args.fid else None             # or says what is missing
        model = build(vars(args), truth.shape, truth.classes, points).to(job.device)
        average, frames, model.share, model.world = copy.deepcopy(model).eval(), {}, job.share, job.world
        if source:
            average.source = source.sample(min(args.samples, len(source.test))).to(job.device)
        draw = lambda n: torch.cat([average.sample(min(500, n - i)).cpu() for i in range(0, n, 500)])
        if args.ckpt:
            job.restore(average=average)
        else:
            optimizers = model.optimizers(args.lr)
            start = job.keep(model=model, average=average, d_optimizer=optimizers[0], g_optimizer=optimizers[1])
            batches = truth.batches(args.batch, job.device, labels=model.labels)
            batches = zip(source.batches(args.batch, job.device), batches) if source else batches
            rows = train(model, average, optimizers, batches, args.steps, args.lr, start, args.decay)
            for step, _ in enumerate(job.track(rows), start + 1):
                if step % max(1, args.steps // 40) == 0:    # the same z each time
                    with torch.random.fork_rng(devices=[]):
                        torch.random.default_generator.manual_seed(args.seed)
                        frames[f"step {step}"] = draw(2000 if points else 64)

        began = time.perf_counter()
        samples, seconds = draw(args.samples), time.perf_counter() - began
        results, samples = job.judge(samples, truth)
        results |= judges.report(args.model, average, source, truth, job.folder, samples, inception)
        job.report(results, samples, truth, sum(p.numel() for p in model.parameters()), seconds, frames=frames)


if __name__ == "__main__":
    main()
