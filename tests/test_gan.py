"""gan.py: losses at their optima, penalties in closed form, who trains whom, pools, styles. Behind each `def`: a line that
must not break."""

import copy
import functools
import json
import math
import pathlib
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import data
import gan
import judges
import metrics

seeds = st.integers(0, 999)
close = torch.testing.assert_close
SMALL = {"latent": 5, "width": 8}
SHAPES = [(1, 28, 28), (3, 32, 32), (1, 9, 11), (2, 17, 16)]


def rng(seed):
    return torch.Generator().manual_seed(seed)


def make(name, shape=(1, 9, 11), network="conv", **options):
    torch.manual_seed(0)
    return gan.MODELS[name](shape, SMALL["latent"], SMALL["width"], network, **options)


def d_loss(model, batch, step=0):
    return model.d_loss(*model.examples(batch), step)


def g_loss(model, batch, step=0):
    return model.g_loss(*model.examples(batch), step)


def batch_of(model, n=6, seed=0):
    x = torch.rand(n, *model.shape, generator=rng(seed)) * 2 - 1
    if model.labels:
        return x, torch.randint(model.classes, (n,), generator=rng(seed))
    return (x, -x.flip(0)) if isinstance(model, gan.CycleGAN) else (x,)


# ---- losses


counts = st.lists(st.integers(1, 9), min_size=2, max_size=6)


@given(counts, seeds)
def test_the_best_discriminator_of_a_table_has_the_value_of_the_paper(p, seed):     # a sign of softplus; real for fake
    q = torch.tensor(p)[torch.randperm(len(p), generator=rng(seed))]
    p = torch.tensor(p)
    loss, _ = gan.LOSSES["log"]
    best = (p.double() / q).log().requires_grad_()          # logit of p / (p + q)
    value = -loss(best.repeat_interleave(p), best.repeat_interleave(q))
    P, Q = p / p.sum(), q / q.sum()
    jsd = 0.5 * (P * (2 * P / (P + Q)).log() + Q * (2 * Q / (P + Q)).log()).sum()
    close(value, 2 * jsd - math.log(4))
    (gradient,) = torch.autograd.grad(value, best)
    close(gradient, torch.zeros_like(gradient))
    other = best.detach() + 0.3 * torch.randn(len(p), generator=rng(seed))
    assert -loss(other.repeat_interleave(p), other.repeat_interleave(q)) < value


@given(st.floats(-8, 8))
def test_the_generator_maximises_log_d_and_never_stalls(score):         # softplus(fake); log(1 - D)
    s = torch.tensor([score], requires_grad=True)
    loss = gan.LOSSES["log"][1](s)
    close(loss, -torch.sigmoid(s).log().sum())
    (gradient,) = torch.autograd.grad(loss, s)
    close(gradient, torch.sigmoid(s.detach()) - 1)          # where D rejects a fake the slope is -1, not 0


@given(seeds)
def test_a_critic_of_slope_one_is_below_w1(seed):           # fake - real swapped; a sum for the mean
    g = rng(seed)
    x, y = torch.randn(40, generator=g), 2 * torch.randn(40, generator=g) + 0.5
    w1 = (x.sort().values - y.sort().values).abs().mean()
    knots = torch.randn(6, generator=g).sort().values
    signs = torch.randint(2, (7,), generator=g) * 2.0 - 1   # any function of slopes -1 and 1

    def f(v):
        ends = torch.cat([torch.tensor([-100.0]), knots, torch.tensor([100.0])])
        return sum(s * (v.clamp(a, b) - a) for s, a, b in zip(signs, ends, ends[1:]))

    d_law, g_law = gan.LOSSES["wasserstein"]
    assert -d_law(f(x), f(y)) <= w1 + 1e-9
    close(-d_law(x - 5, y - 5), x.mean() - y.mean())
    close(g_law(y), -y.mean())
    shifted = x + 3
    close(-d_law(shifted, x), (shifted.sort().values - x.sort().values).abs().mean())      # slope 1 attains it


@given(counts, seeds)
def test_least_squares_at_its_optimum(p, seed):             # the target 1; the half
    q = torch.tensor(p)[torch.randperm(len(p), generator=rng(seed))]
    p = torch.tensor(p)
    P, Q = p / p.sum(), q / q.sum()
    best = (P / (P + Q)).requires_grad_()
    loss = gan.LOSSES["squares"][0](best.repeat_interleave(p), best.repeat_interleave(q))
    close(loss, 0.5 * (P * Q / (P + Q)).sum())
    close(torch.autograd.grad(loss, best)[0], torch.zeros(len(p)))
    close(gan.LOSSES["squares"][1](best), (best - 1).square().mean())


# ---- penalties


@given(st.integers(1, 7), st.sampled_from([(2,), (1, 3, 4), (3, 2, 2)]), st.floats(0.1, 3), seeds)
def test_penalties_of_a_linear_critic_are_closed(n, shape, size, seed):
    """flatten left out; norm over the batch; the square; the 1; the half of R1"""
    g = rng(seed)
    w = torch.randn(shape, generator=g)
    w = (w * size / w.norm()).requires_grad_()
    critic = lambda x: (x * w).flatten(1).sum(1) + 3
    real, fake = torch.randn(n, *shape, generator=g), torch.randn(n, *shape, generator=g)
    u = torch.rand(n, generator=g)
    penalty = gan.gradient_penalty(critic, real, fake, u)
    close(penalty, torch.tensor((size - 1) ** 2))
    (gradient,) = torch.autograd.grad(penalty, w)
    close(gradient, (2 * (1 - 1 / size) * w).detach())
    r1 = gan.r1_penalty(critic, real)
    close(r1, torch.tensor(size**2 / 2))
    close(torch.autograd.grad(r1, w)[0], w.detach())
    unit = lambda x: (x * (w / size).detach()).flatten(1).sum(1)
    assert gan.gradient_penalty(unit, real, fake, u) < 1e-28


@given(st.integers(1, 5), seeds)
def test_the_penalty_is_taken_at_a_point_of_its_own_for_each_example(n, seed):      # one u; real and fake swapped
    g = rng(seed)
    real, fake, u = torch.randn(n, 1, 2, 2, generator=g), torch.randn(n, 1, 2, 2, generator=g), torch.rand(n, generator=g)
    between = u.view(n, 1, 1, 1) * real + (1 - u.view(n, 1, 1, 1)) * fake
    critic = lambda x: x.square().flatten(1).sum(1) / 2     # its slope is |x|
    close(gan.gradient_penalty(critic, real, fake, u), (between.flatten(1).norm(dim=1) - 1).square().mean())
    close(gan.r1_penalty(critic, real), real.flatten(1).square().sum(1).mean() / 2)
    assert not real.requires_grad
    flat = lambda x: 0 * x.flatten(1).sum(1)
    close(gan.gradient_penalty(flat, real, fake, u), torch.ones(()))    # no NaN where there is no slope


# ---- styles


@given(st.integers(1, 4), st.sampled_from([1, 3, 5]), seeds)
def test_modulation_of_images_is_modulation_of_weights(n, k, seed):     # rsqrt -> sqrt; the padding; style on the outputs
    g = rng(seed)
    x, weight = torch.randn(n, 3, 5, 6, generator=g), torch.randn(4, 3, k, k, generator=g)
    style = torch.randn(n, 3, generator=g)
    out, plain = gan.modulated_conv(x, weight, style), gan.modulated_conv(x, weight, style, demodulate=False)
    for i in range(n):
        scaled = weight * style[i, None, :, None, None]
        close(plain[i : i + 1], F.conv2d(x[i : i + 1], scaled, padding=k // 2))
        scaled = scaled / (scaled.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        close(scaled.square().sum((1, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
        close(out[i : i + 1], F.conv2d(x[i : i + 1], scaled, padding=k // 2))


@given(st.integers(1, 4), st.integers(1, 3), seeds)
def test_path_lengths_of_a_linear_map(n, layers, seed):     # sum over layers; the root of H W
    g = rng(seed)
    J = torch.randn(layers, 4, 2 * 3 * 5, generator=g)
    w = torch.randn(n, layers, 4, generator=g, requires_grad=True)
    noise = torch.randn(n, 2, 3, 5, generator=g)
    images = torch.einsum("blw,lwp->bp", w, J).view(n, 2, 3, 5)
    found = gan.path_lengths(images, w, noise)
    products = torch.einsum("lwp,bp->blw", J, noise.flatten(1)) / math.sqrt(15)
    close(found, products.square().sum(2).mean(1).sqrt())
    images = torch.einsum("blw,lwp->bp", w.tanh(), J).view(n, 2, 3, 5)
    assert gan.path_lengths(images, w, noise).requires_grad


@given(st.integers(1, 12), st.integers(1, 5), seeds)
def test_minibatch_stddev_by_hand(n, group, seed):          # dim of var; unbiased; the order of repeat
    x = torch.randn(n, 2, 3, 4, generator=rng(seed))
    out = gan.minibatch_stddev(x, group)
    size = math.gcd(n, group)
    assert out.shape == (n, 3, 3, 4)
    close(out[:, :2], x)
    for i in range(n):
        members = x[i % (n // size) :: n // size]
        assert len(members) == size
        spread = ((members - members.mean(0)).square().mean(0) + 1e-8).sqrt().mean()
        close(out[i, 2], spread.expand(3, 4))
    same = gan.minibatch_stddev(x[:1].repeat(8, 1, 1, 1))
    close(same[:, 2], torch.full((8, 3, 4), 1e-4))


def test_equalised_layers_keep_the_scale_and_slow_ones_move_less():     # scale without slow; fan-in without k^2
    torch.manual_seed(0)
    x = torch.randn(4000, 30)
    for slow in (1.0, 0.01):
        layer = gan.Equal(30, 50, slow=slow)
        assert layer(x).var().item() == pytest.approx(1, rel=0.1)
        before, optimizer = layer(x).detach(), torch.optim.Adam(layer.parameters(), 1e-3)
        layer(x).sum().backward()
        optimizer.step()
        moved = (layer(x) - before).abs().mean()
        assert 5e-4 < moved / slow < 3e-3                   # a rate of 1e-3
    close(gan.Equal(3, 2, bias=1.0, slow=0.01)(torch.zeros(1, 3)), torch.ones(1, 2))
    assert gan.Equal(30, 50).weight.std().item() == pytest.approx(1, rel=0.05)                # not slow unless asked
    conv = gan.Equal(5, 40, 3)
    out = conv(torch.randn(50, 5, 12, 12))
    assert out.shape == (50, 40, 12, 12) and out[:, :, 1:-1, 1:-1].var().item() == pytest.approx(1, rel=0.15)
    v = torch.randn(10**6)
    assert gan.lrelu(v).square().mean().item() == pytest.approx(1, rel=0.01)


@pytest.fixture(scope="module")
def style():
    torch.set_default_dtype(torch.float64)
    model = make("stylegan", (3, 16, 16))
    with torch.no_grad():
        for conv in model.generator.convs:
            conv.strength.fill_(0.1)
            conv.bias.normal_(0, 0.1)
        model.generator.mean_w.normal_()
    return model.eval()


def silent(law, *shape):
    return torch.zeros(shape)


def test_truncation_keeps_at_one_and_is_constant_at_zero(style):        # lerp the other way round
    style.psi = 0.0
    images = style.sample(3)
    style.draw, draw = (lambda law, *shape: law(*shape, generator=rng(1)) if len(shape) == 2 else silent(law, *shape)), style.draw
    try:
        z = torch.randn(3, 5, generator=rng(1))
        w = style.generator.styles(z)
        for psi, want in ((0.0, style.generator.mean_w.expand(3, -1)), (1.0, w), (0.5, (w + style.generator.mean_w) / 2)):
            style.psi = psi
            close(style.sample(3), style.generator(want[:, None].expand(-1, 6, -1), silent))
    finally:
        style.draw, style.psi = draw, 1.0
    assert images.shape == (3, 3, 16, 16) and not torch.equal(images[0], images[1])         # the noise differs


@given(st.integers(0, 4), seeds)
def test_mixing_takes_the_first_layers_of_one_style(cut, seed):         # < for <=; w_1 and w_2 swapped
    model = make("stylegan", (1, 8, 8))
    L = len(model.generator.convs)
    w_1, w_2 = torch.randn(3, 5, generator=rng(seed)), torch.randn(3, 5, generator=rng(seed + 1))
    mixed = model.mix(w_1, w_2, torch.full((3,), min(cut, L)))
    assert mixed.shape == (3, L, 5)
    for layer in range(L):
        close(mixed[:, layer], w_1 if layer < cut else w_2)


def test_mixed_styles_are_mixed_as_often_as_asked_at_any_cut():         # u[:, 0] > mixing; cuts from 0; both the same z
    model = make("stylegan", (1, 28, 28))
    L = len(model.generator.convs)
    assert L == 6
    torch.manual_seed(0)
    model.mixing = 0.7
    with torch.no_grad():
        w = model.mixed_styles(4000)
    changes = (w[:, 1:] != w[:, :-1]).any(2)
    assert changes.sum(1).max() == 1                        # two styles at most
    share = changes.any(1).double().mean().item()
    assert share == pytest.approx(0.7, abs=0.03)
    at = changes[changes.any(1)].double().argmax(1).bincount(minlength=L - 1) / changes.any(1).sum()
    close(at, torch.full((L - 1,), 1 / (L - 1)), atol=0.03, rtol=0)
    model.mixing = 0.0
    w = model.mixed_styles(50)
    close(w, w[:, :1].expand_as(w))


def test_the_mean_style_is_a_moving_mean_in_training_alone():           # 0.005; eval moves it
    model = make("stylegan", (1, 8, 8))
    seen, styles = [], model.generator.styles
    model.generator.styles = lambda z: seen.append(styles(z)) or seen[-1]
    want = torch.zeros(5)
    for _ in range(5):
        model.fake(7)
        want = 0.995 * want + 0.005 * seen[-1].mean((0, 1))
    close(model.generator.mean_w, want.detach())
    model.eval().fake(7)
    close(model.generator.mean_w, want.detach())


def test_blocks_of_the_style_discriminator_are_residual():   # the skip left out; the root of 2
    D, x = gan.StyleDiscriminator((1, 16, 16), 8), torch.randn(3, 1, 16, 16)
    for layer in D.wider:
        torch.nn.init.zeros_(layer.weight)
    h = gan.lrelu(D.first(x))
    for skip in D.skips:
        h = F.avg_pool2d(skip(h), 2) / math.sqrt(2)
    h = gan.lrelu(D.last(gan.minibatch_stddev(h)))
    close(D(x), D.head(gan.lrelu(D.hidden(h.flatten(1))))[:, 0])
    assert D(x).std() > 0


def test_styles_do_not_know_the_size_of_z(style):           # rms_norm left out
    z = torch.randn(4, 5)
    close(style.generator.styles(z), style.generator.styles(7 * z))
    assert not torch.allclose(style.generator.styles(z)[0], style.generator.styles(z)[1])


def test_each_layer_has_noise_of_its_own_and_each_resolution_its_colours(style):
    """one noise for both layers; strength left out; colours of the last resolution alone; the style of another layer"""
    G, asked = style.generator, []
    w = torch.randn(2, 6, 5)

    def draw(law, *shape):
        asked.append(shape)
        return torch.zeros(shape)

    quiet = G(w, draw)
    assert asked == [(2, 1, n, n) for n in (4, 4, 8, 8, 16, 16)]
    for layer in range(len(G.convs)):
        calls = []
        one = lambda law, *shape, layer=layer, calls=calls: torch.full(shape, 1.0 * (calls.append(0) or len(calls) == layer + 1))
        assert not torch.allclose(G(w, one), quiet)
        other = w.clone()
        other[:, layer] += 1
        assert not torch.allclose(G(other, silent), quiet)
    with torch.no_grad():
        kept = copy.deepcopy(G)
        for k in range(len(G.sides)):
            changed = copy.deepcopy(kept)
            changed.colours[k].bias += 1
            close(changed(w, silent).atanh(), quiet.atanh() + 1)        # upsampling keeps constants
        kept.convs[0].strength.zero_()
        first = lambda law, *shape: torch.randn(shape) if shape[2:] == kept.sides[0] else torch.zeros(shape)
        kept.convs[1].strength.zero_()
        close(kept(w, first), kept(w, silent))


def test_lazy_r1_is_r1_on_average(monkeypatch):             # not multiplied by lazy; the penalty; step % lazy
    model = make("stylegan", (1, 8, 8), lazy=4, penalty=3.0)
    batch = batch_of(model)
    monkeypatch.setattr(model, "fake", lambda n: torch.zeros(n, 1, 8, 8))
    losses = torch.stack([d_loss(model, batch, step)["d_loss"] for step in range(8)]).detach()
    real, fake = model.discriminator(batch[0]), model.discriminator(torch.zeros_like(batch[0]))
    plain = gan.LOSSES["log"][0](real, fake)
    close(losses.mean(), (plain + 3.0 * gan.r1_penalty(model.discriminator, batch[0])).detach())
    close(losses[[1, 2, 3, 5, 6, 7]], plain.detach().expand(6))
    model.penalty = 0.0
    close(d_loss(model, batch, 0)["d_loss"], plain)


def test_path_lengths_are_pulled_to_their_moving_mean(monkeypatch):     # 4 times; the mean moved after; 0.01
    model = make("stylegan", (1, 8, 8), path=2.0)
    lengths = torch.tensor([1.0, 3.0])
    monkeypatch.setattr(gan, "path_lengths", lambda images, w, noise: lengths)
    torch.manual_seed(0)
    plain = gan.GAN.g_loss(model, *model.examples(batch_of(model, 2)))["g_loss"]
    torch.manual_seed(0)
    row = g_loss(model, batch_of(model, 2), 4)
    close(model.mean_length, torch.tensor(0.02))
    close(row["g_loss"], plain + 4 * 2 * ((1 - 0.02) ** 2 + (3 - 0.02) ** 2) / 2)
    torch.manual_seed(0)
    close(g_loss(model, batch_of(model, 2), 5)["g_loss"], plain)


def test_the_mean_length_keeps_no_graph():                  # detach left out
    torch.set_default_dtype(torch.float32)
    model = make("stylegan", (1, 8, 8), path=2.0)
    batches = iter([batch_of(model, 4, k)[0] for k in range(5)])
    rows = list(gan.train(model, copy.deepcopy(model), model.optimizers(1e-3), batches, 5, 1e-3))
    assert len(rows) == 5 and not model.mean_length.requires_grad and model.mean_length > 0


# ---- networks


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", gan.MODELS)
def test_any_shape_goes_through(name, shape):               # output_padding; a side that is no multiple of 2
    model = make(name, shape)
    if name == "cyclegan":
        model.source = batch_of(model)[0]
    x = model.eval().sample(4)
    assert x.shape == (4, *shape) and x.isfinite().all()
    if name != "stylegan":
        assert x.abs().max() <= 1
    for loss in (d_loss, g_loss):
        row = loss(model, batch_of(model))
        assert all(v.dim() == 0 and v.isfinite() for v in row.values())


@pytest.mark.parametrize("name", ["gan", "wgan", "wgan-gp", "bigan", "cgan"])
def test_points_go_through_and_are_not_bounded(name):       # tanh on points
    model = make(name, (2,), "mlp")
    with torch.no_grad():
        [p for n, p in model.generator.named_parameters() if n.endswith("bias")][-1].fill_(5.0)
    assert (model.sample(4) > 1).all() and model.sample(4).shape == (4, 2)
    assert g_loss(model, batch_of(model))["g_loss"].isfinite()


def test_ladder_halves_and_doubles():                       # > for >=; 2 ** k without its bound
    assert gan.ladder((3, 28, 28), 10, 8) == ([(28, 28), (14, 14), (7, 7)], [3, 10, 20])
    assert gan.ladder((1, 128, 64), 4, 8) == ([(128, 64), (64, 32), (32, 16), (16, 8), (8, 4)], [1, 4, 8, 16, 16])
    assert gan.ladder((1, 8, 8), 4, 8) == ([(8, 8)], [1])
    assert gan.ladder((1, 30, 1), 4, 8)[0][-1] == (7, 1)


def test_images_grow_from_sides_of_at_most_four():          # most of 5
    assert make("gan", (1, 10, 10)).generator[1].unflattened_size[1:] == (2, 2)


def test_waves_keep_the_points():                           # cos for sin; frequencies
    x = torch.randn(4, 2)
    waves = [x, torch.sin(2 * x), torch.cos(2 * x), torch.sin(4 * x), torch.cos(4 * x),
             torch.sin(8 * x), torch.cos(8 * x), torch.sin(16 * x), torch.cos(16 * x)]
    close(gan.Waves()(x), torch.cat(waves, 1))


def test_dcgan_normalises_all_but_the_first_and_the_last_layer():       # norm at k = 0; at the image; N(0, 0.02^2)
    model = make("dcgan", (1, 28, 28))
    kinds = lambda net: [type(m).__name__ for m in net.modules() if not list(m.children())]
    drawn = ["Linear", "Unflatten", *["BatchNorm2d", "ReLU", "ConvTranspose2d"] * 3, "Tanh"]
    assert kinds(model.generator) == drawn
    assert kinds(model.discriminator.body) == ["Conv2d", "LeakyReLU", *["Conv2d", "BatchNorm2d", "LeakyReLU"] * 2, "Flatten"]
    plain = make("gan", (1, 28, 28))
    assert kinds(plain.generator) == drawn and "BatchNorm2d" not in kinds(plain.discriminator)
    critics = {name: kinds(make(name, (1, 28, 28)).discriminator) for name in ("wgan", "wgan-gp")}
    assert [name for name, found in critics.items() if "BatchNorm2d" in found] == ["wgan"]      # [4] section 4
    weights = torch.cat([p.flatten() for p in model.parameters() if p.dim() > 1])
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 5 and all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)
    calls = []
    model.discriminator.register_forward_hook(lambda m, x, out: calls.append(len(out)))
    d_loss(model, batch_of(model))
    assert calls == [6, 6]                                  # real and fake apart


def test_projection_is_the_product_of_features_with_the_class():        # sum left out; on the scores alone
    model = make("cgan", (2,), "mlp", classes=3)
    D, x, y = model.discriminator, torch.randn(5, 2), torch.tensor([0, 2, 1, 1, 0])
    h = D.body(x)
    close(D(x, y), (h @ D.head.weight.T + D.head.bias)[:, 0] + (h * D.classes.weight[y]).sum(1))


@pytest.mark.parametrize("condition", ["projection", "planes"])
@pytest.mark.parametrize("shape, network", [((2,), "mlp"), ((1, 9, 11), "conv")])
def test_labels_are_heard_on_both_sides(condition, shape, network):     # y of one side dropped; planes not beside x
    model = make("cgan", shape, network, classes=4, condition=condition)
    seen = []
    model.discriminator.register_forward_pre_hook(lambda m, args: seen.append(args))
    x, y = batch_of(model)
    loss = d_loss(model, (x, y))["d_loss"]
    if condition == "planes":
        (both,) = seen[0]
        assert both.shape == (12, shape[0] + 4, *shape[1:])
        close(both[:6, : shape[0]], x)
        close(both[:, shape[0] :].flatten(2).amax(2) if len(shape) > 1 else both[:, shape[0] :], F.one_hot(y, 4).double().repeat(2, 1))
    else:
        close(seen[0][1], torch.cat([y, y]))
        loss.backward()
        assert (model.discriminator.classes.weight.grad[y.unique()] != 0).any(1).all()
    torch.manual_seed(1)
    one = model.of_class(y)
    torch.manual_seed(1)
    assert not torch.allclose(model.of_class((y + 1) % 4), one)
    model.zero_grad()
    g_loss(model, (x, y))["g_loss"].backward()
    first = next(p for p in model.generator.parameters() if p.dim() == 2)
    assert (first.grad[:, 5:][:, y.unique()] != 0).any(0).all()
    z = torch.zeros(6, 5)
    model.draw = lambda law, n, *shape: z
    close(model.fake(6), model.of_class(torch.tensor([0, 1, 2, 3, 0, 1])))


# ---- who trains whom


@pytest.mark.parametrize("name", gan.MODELS)
def test_no_gradient_crosses(name):                         # no_grad left out of d_loss; parts with one more
    model = make(name)
    d, g = model.parts()
    assert {id(p) for p in d} | {id(p) for p in g} == {id(p) for p in model.parameters()}
    assert {id(p) for p in d} == {id(p) for p in model.discriminator.parameters()}
    next(iter(d_loss(model, batch_of(model)).values())).backward()
    assert all(p.grad is None for p in g)
    assert sum(p.grad is not None and bool((p.grad != 0).any()) for p in d) >= len(d) - 2
    model.zero_grad()
    next(iter(g_loss(model, batch_of(model)).values())).backward(inputs=g)
    assert all(p.grad is None for p in d)
    still = [p for p in g if p.grad is None or not (p.grad != 0).any()]
    assert len(still) <= (len(g) // 2 if name == "cyclegan" else 2)     # biases before instance normalisation


class Recorder(torch.nn.Module):
    """A discriminator that keeps what it reads and scores by a mean."""

    def __init__(self):
        super().__init__()
        self.scale, self.read = torch.nn.Parameter(torch.tensor(0.7)), []

    def forward(self, *args):
        self.read.append(args)
        return self.scale * sum(a.flatten(1).mean(1) for a in args)


def test_a_style_scales_by_one_before_it_has_learned():     # bias=1.0; slow biases of the others are 0
    conv = gan.StyleConv(5, 4, 6)
    close(conv.style(torch.zeros(2, 6)), torch.ones(2, 5))


@pytest.mark.parametrize("name", ["gan", "wgan", "wgan-gp"])
def test_real_first_and_fake_second(name):                  # d_loss and g_loss with the other law
    model = make(name)
    model.discriminator = Recorder()
    fake = torch.randn(6, *model.shape)
    model.fake = lambda n: fake[:n]
    (x,) = batch_of(model)
    score = lambda v: 0.7 * v.flatten(1).mean(1)
    d_law, g_law = gan.LOSSES["log" if name == "gan" else "wasserstein"]
    row = d_loss(model, (x,))
    want = d_law(score(x), score(fake))
    if name == "wgan-gp":
        slope = (0.7 / math.sqrt(99) - 1) ** 2
        close(row["penalty"], torch.tensor(slope))
        want = want + 10 * slope
    close(row["d_loss"], want)
    read = model.discriminator.read[-2:] if model.norm else model.discriminator.read[-1:]          # normalised apart
    close(torch.cat([part for (part,) in read]), torch.cat([x, fake]))
    close(g_loss(model, (x,))["g_loss"], g_law(score(fake)))


def test_bigan_reads_pairs_and_both_sides_swap_the_labels():            # z of another draw; one label swapped alone; R1 of x alone
    model = make("bigan", penalty=3.0)
    model.discriminator = Recorder()
    (x,) = batch_of(model)
    torch.manual_seed(3)
    loss = d_loss(model, (x,))["d_loss"]
    (images, z), (x_alone, code) = model.discriminator.read
    close(x_alone, x), close(code, model.encoder(x))
    torch.manual_seed(3)
    drawn = torch.randn(6, 5)
    close(images, torch.cat([x, model.generator(drawn)]))
    close(z, torch.cat([model.encoder(x), drawn]))
    scores = 0.7 * (images.flatten(1).mean(1) + z.mean(1))
    r1 = 3 / 2 * 0.49 * (1 / 99 + 1 / 5)
    close(loss, F.softplus(-scores[:6]).mean() + F.softplus(scores[6:]).mean() + r1)
    torch.manual_seed(3)
    swapped = g_loss(model, (x,))["g_loss"]
    close(swapped, F.softplus(scores[:6]).mean() + F.softplus(-scores[6:]).mean())
    swapped.backward()
    assert all(p.grad is not None for p in model.encoder.parameters())


@pytest.mark.parametrize("shape, network", [((2,), "mlp"), ((1, 9, 11), "conv")])
def test_codes_of_bigan_are_normalised_as_the_prior_is(shape, network):      # without its last layer; affine
    model = make("bigan", shape, network)
    z = model.encoder(5 + 3 * torch.randn(50, *shape))
    close(z.mean(0), torch.zeros(5))
    close(z.var(0, unbiased=False), torch.ones(5), rtol=0, atol=0.05)
    assert not list(model.encoder[-1].parameters())


def test_clipping_holds_after_each_step():                  # the hook; min without max
    torch.set_default_dtype(torch.float32)
    model = make("wgan", clip=0.013)
    d, g = model.optimizers(1.0)
    assert isinstance(d, torch.optim.RMSprop) and isinstance(g, torch.optim.RMSprop)
    d_loss(model, batch_of(model))["d_loss"].backward()
    d.step()
    weights = torch.cat([p.flatten() for p in model.parts()[0]])
    assert weights.max().item() == pytest.approx(0.013) and weights.min().item() == pytest.approx(-0.013)
    assert max(p.abs().max() for p in model.parts()[1]) > 0.05


@pytest.mark.parametrize("name, steps, betas", [("gan", 1, (0.5, 0.999)), ("dcgan", 1, (0.5, 0.999)), ("wgan", 5, None),
                                                ("wgan-gp", 5, (0.0, 0.9)), ("stylegan", 1, (0.0, 0.99))])
def test_train_takes_turns_as_the_papers_do(name, steps, betas):
    """the rate; critic_steps; the average's decay; buffers left behind; both sides' gradients mixed"""
    torch.set_default_dtype(torch.float32)
    model = make(name, (1, 8, 8))
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = model.optimizers(1e-3)
    if betas:
        assert all(o.defaults["betas"] == betas for o in optimizers)
    turns, want, rates = [], [p.detach().clone() for p in model.parts()[1]], []
    statistics = [b.clone() for b in model.buffers()]
    for side, optimizer in zip("dg", optimizers):
        optimizer.register_step_post_hook(lambda *_, side=side: turns.append(side))
    batches = iter([batch_of(model, 4, k)[0] for k in range(40)])
    d_before = [p.detach().clone() for p in model.parts()[0]]
    for k, row in enumerate(gan.train(model, average, optimizers, batches, 4, 1e-3, decay=0.6)):
        keep = min(0.6, (1 + k) / (10 + k))
        want = [keep * a + (1 - keep) * p.detach() for a, p in zip(want, model.parts()[1])]
        for a, b in zip(average.parts()[1], want):
            close(a, b)
        statistics = [keep * a + (1 - keep) * b for a, b in zip(statistics, model.buffers())]
        for a, b in zip(average.buffers(), statistics):     # or averaged weights do not fit them
            assert not a.is_floating_point() or torch.allclose(a, b, rtol=1e-4, atol=1e-7)
        rates.append(optimizers[1].param_groups[0]["lr"])
        assert {"d_loss", "g_loss", "d_slope", "g_slope"} <= row.keys() and not any(v.requires_grad for v in row.values())
    assert turns == (["d"] * steps + ["g"]) * 4
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 0.5e-3])
    assert any(not torch.equal(a, b) for a, b in zip(d_before, model.parts()[0]))
    norm = torch.cat([p.grad.flatten() for p in model.parts()[1] if p.grad is not None]).norm()
    close(row["g_slope"], norm)


def test_several_processes_draw_one_batch():                # world left out; the same rows everywhere
    models = [make("gan", (2,), "mlp") for _ in range(3)]
    rows = []
    for model, world, share in zip(models, (1, 2, 2), (slice(None), slice(0, 3), slice(3, 6))):
        model.world, model.share = world, share
        torch.manual_seed(0)
        rows.append(model.draw(torch.randn, 6 // world, 4))
    close(rows[0], torch.cat(rows[1:]))
    x = torch.randn(6, 2)
    gradients = []
    for model in models:
        torch.manual_seed(0)
        d_loss(model, (x[model.share],))["d_loss"].backward()
        gradients.append(model.parts()[0][0].grad)
    close(gradients[0], (gradients[1] + gradients[2]) / 2)


# ---- translation


def test_identity_translators_lose_nothing_but_the_game():  # x and y swapped; a weight; the wrong discriminator
    model = make("cyclegan", (1, 8, 8))
    a, b = batch_of(model)
    model.generator = torch.nn.ModuleDict({"ab": torch.nn.Identity(), "ba": torch.nn.Identity()})
    score = {"a": 0.3, "b": 0.8}
    model.discriminator = torch.nn.ModuleDict()
    for side in "ab":
        model.discriminator[side] = torch.nn.Identity()
        model.discriminator[side].forward = lambda x, side=side: score[side] * x.mean((1, 2, 3), keepdim=True)
    row = g_loss(model, (a, b))
    mean = lambda v: v.mean((1, 2, 3))
    fooled = (0.8 * mean(a) - 1).square().mean() + (0.3 * mean(b) - 1).square().mean()     # a's fake is judged by b's
    close(row["cycle"], torch.tensor(0.0))
    close(row["identity"], torch.tensor(0.0))
    close(row["g_loss"], fooled)
    want = 0.5 * ((0.3 * mean(a) - 1).square() + (0.3 * mean(b)).square() + (0.8 * mean(b) - 1).square() + (0.8 * mean(a)).square())
    close(d_loss(model, (a, b))["d_loss"], want.mean())


def test_patches_have_a_score_each():                       # two scores; a border of two
    model = make("cyclegan", (1, 16, 16))
    assert all(D(torch.randn(2, 1, 16, 16)).shape == (2, 1, 8, 8) for D in model.discriminator.values())


def test_cycles_and_identities_are_weighed():               # ab for ba; the weights swapped
    model = make("cyclegan", (1, 8, 8))
    a, b = batch_of(model)
    ab, ba = model.generator["ab"], model.generator["ba"]
    row = g_loss(model, (a, b))
    close(row["cycle"], (ba(ab(a)) - a).abs().mean() + (ab(ba(b)) - b).abs().mean())
    close(row["identity"], (ab(b) - b).abs().mean() + (ba(a) - a).abs().mean())
    score = lambda side, x: (model.discriminator[side](x) - 1).square().mean()
    close(row["g_loss"], score("b", ab(a)) + score("a", ba(b)) + 10 * row["cycle"] + 5 * row["identity"])
    model.source = a
    close(model.sample(8), ab(torch.cat([a, a[:2]])))
    close(model.translate("ba", b), ba(b))


@given(st.integers(0, 6), st.integers(1, 5), seeds)
def test_the_pool_returns_first_what_it_is_given_and_later_what_it_had(size, batches, seed):
    """p of 1/2; not a copy; the new one returned and kept; more than its size"""
    torch.manual_seed(seed)
    pool, given_before = gan.Pool((1, 2, 2), size), []
    for k in range(batches):
        x = (torch.arange(3.0) + 3 * k)[:, None, None, None].expand(3, 1, 2, 2).clone()
        out = pool(x)
        for i in range(3):
            value = out[i, 0, 0, 0].item()
            place = 3 * k + i
            assert value <= place
            if size == 0 or place < size:
                assert value == place
        given_before += out[:, 0, 0, 0].tolist()
        assert pool.filled == min(size, 3 * (k + 1))
    held = pool.images[: int(pool.filled), 0, 0, 0].tolist()
    assert len(set(held)) == len(held) and set(held) <= set(range(3 * batches))
    assert not pool(x.requires_grad_()).requires_grad


def test_the_pool_exchanges_half():                         # 0.5
    torch.manual_seed(0)
    pool = gan.Pool((1,), 50)
    pool(torch.zeros(50, 1))
    out = pool(torch.arange(1.0, 2001.0)[:, None])[:, 0]
    assert (out == torch.arange(1.0, 2001.0)).double().mean().item() == pytest.approx(0.5, abs=0.04)
    kept = out[out != torch.arange(1.0, 2001.0)]
    assert len(set(kept[kept > 0].tolist())) == (kept > 0).sum()        # each leaves once


# ---- runs


LOAD = functools.cache(data.load)


@pytest.fixture
def quick(monkeypatch):
    """Sets are drawn once, and the readers that judge are not trained."""
    monkeypatch.setattr(data, "load", LOAD)
    monkeypatch.setattr(judges, "train_classifier",
                        lambda x, labels, classes, levels, *rest, **more:
                        judges.Classifier(x.shape[1], classes, levels).eval())


RUNS = [("gan", "gmm", []), ("wgan", "gmm", []), ("wgan-gp", "grid", []), ("cgan", "gmm", []), ("bigan", "gmm", []),
        ("dcgan", "persian", []), ("cgan", "persian", ["--condition", "planes"]), ("bigan", "persian", []),
        ("cyclegan", "persian", []), ("stylegan", "persian", ["--path", 2, "--psi", 0.7])]


@pytest.mark.parametrize("name, dataset, options", RUNS)
def test_a_run_leaves_its_numbers(cli, quick, name, dataset, options):
    small = ["--steps", 3, "--batch", 4, "--width", 8, "--channels", 4, "--samples", 60, *options]
    status, error, out = cli(gan, "--model", name, "--dataset", dataset, *small)
    assert status == 0, error
    (folder,) = out.iterdir()
    result = json.loads((folder / "metrics.json").read_text())
    extra = {"cgan": {"label_agreement"}, "cyclegan": {"transferred", "cycle", "identity"},
             "bigan": {"code_accuracy", "reconstruction"} if dataset == "persian" else set()}.get(name, set())
    assert extra | {"klh" if dataset != "persian" else "recall"} <= result["metrics"].keys()
    assert (folder / "curves.png").is_file() and (folder / "process.gif").is_file()
    pictures = {"bigan": ["reconstructions.png"], "cyclegan": ["translations.png"], "stylegan": ["mixing.png", "truncation.png"]}
    assert dataset != "persian" or all((folder / p).is_file() for p in pictures.get(name, []))
    status, error, _ = cli(gan, "--ckpt", folder / "model.pt", "--samples", 60)
    assert status == 0, error


@pytest.mark.parametrize("name, dataset", [("wgan-gp", "gmm"), ("cyclegan", "persian"), ("stylegan", "persian")])
def test_resume_is_bit_for_bit(resumed, quick, name, dataset):          # the pool, mean_w, optimisers not kept
    whole, broken = resumed(gan, "--model", name, "--dataset", dataset, "--batch", 4, "--width", 8, "--channels", 4, "--samples", 60)
    assert whole.keys() == broken.keys() and all(torch.equal(whole[key], broken[key]) for key in whole)


@pytest.mark.parametrize("options, words", [
    (["--model", "dcgan"], "points have no pixels"), (["--network", "conv"], "points have no pixels"),
    (["--model", "cyclegan"], "not two sets"), (["--model", "cyclegan", "--dataset", "folder:/nowhere"], "folder:A,B"),
    (["--model", "cyclegan", "--dataset", "faces", "--size", "8", "--attribute", "wings"], "no attribute 'wings'; it knows smile"),
    (["--model", "cgan", "--dataset", "checkerboard"], "no labels"), (["--penalty", "-1"], "0 or more"),
    (["--model", "biggan"], "biggan"), (["--latent", "0"], "at least 1"), (["--psi", "nan"], "0 or more"),
    (["--fid"], "--fid needs"), (["--decay", "inf"], "0 or more")])
def test_bad_input_gets_a_sentence(cli, monkeypatch, options, words):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    status, error, _ = cli(gan, *options)
    assert status == 2 and words in error and "Traceback" not in error


def test_an_option_of_another_member_is_refused():
    with pytest.raises(TypeError, match="GAN has no option clip"):
        gan.GAN((2,), network="mlp", clip=1)


def test_training_finds_the_modes_of_a_mixture():           # a loss that nothing learns from
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    truth = data.load("gmm")
    model = gan.WGANGP((2,), 8, 64, "mlp", penalty=0.1, critic_steps=1)
    average = copy.deepcopy(model)
    for _ in gan.train(model, average, model.optimizers(2e-3), truth.batches(128), 600, 2e-3, decay=0.99):
        pass
    x = average.sample(2000)
    assert x.std().item() == pytest.approx(1, abs=0.25)
    assert (torch.cdist(x, truth.modes.float()).amin(1) < 0.4).double().mean() > 0.5 and metrics.mode_recall(x, truth) >= 6
