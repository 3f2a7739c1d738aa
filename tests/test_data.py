"""Exact densities, the images' interface, loaders. The comment at a test says which broken line it was seen to catch."""

import functools
import gzip
import hashlib
import http.server
import io
import math
import struct
import tarfile
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data

MIXTURES = [name for name in data.DENSITIES if name != "checkerboard"]
load = functools.cache(data.load)
noise_levels = st.tuples(st.floats(0.1, 1.0), st.floats(0.05, 2.0))     # a, b
seeds = st.integers(0, 2**31)
names = st.sampled_from(list(data.DENSITIES))


def points(truth, a, b, seed, n=20):
    g = torch.Generator().manual_seed(seed)
    return a * truth.sample(n, g).double() + b * torch.randn(n, 2, generator=g)


# ---- densities


@pytest.mark.parametrize("name", data.DENSITIES)
@pytest.mark.parametrize("a, b", [(1.0, 0.0), (0.9, 0.2), (0.3, 1.5), (0.0, 1.0)])
def test_density_integrates_to_one(name, a, b):                         # no 2 pi; no log K; no width; no floor
    truth = load(name)
    side = 2.7 * a + 6 * b
    t = (torch.arange(200) + 0.5) / 100 * side - side                  # no node on an edge of the board
    mass = truth.log_prob(torch.cartesian_prod(t, t), a, b).exp().sum() * (side / 100) ** 2
    assert abs(mass - 1) < (0.03 if (name, b) == ("checkerboard", 0) else 1e-6)      # cells cut at the edges


@pytest.mark.parametrize("name", data.DENSITIES)
@given(noise_levels, seeds)
@settings(max_examples=10)
def test_score_is_the_gradient_of_log_prob(name, level, seed):          # a mean + x; no / safe; slope of wrong sign
    truth, (a, b) = load(name), level
    x = points(truth, a, b, seed).requires_grad_()
    gradient, = torch.autograd.grad(truth.log_prob(x, a, b).sum(), x)
    torch.testing.assert_close(truth.score(x, a, b), gradient, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("name", data.DENSITIES)
@given(noise_levels, seeds)
@settings(max_examples=10)
def test_tweedie(name, level, seed):                                    # std for std**2 in _denoise; b for b^2
    truth, (a, b) = load(name), level
    x = points(truth, a, b, seed)
    torch.testing.assert_close(truth.denoise(x, a, b), (x + b**2 * truth.score(x, a, b)) / a, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", data.DENSITIES)
@pytest.mark.parametrize("a, b", [(1.0, 0.3), (0.5, 0.8), (0.2, 1.0), (1e-6, 1.0), (0.0, 1.0)])
def test_denoiser_and_its_variance_by_brute_force(name, a, b):          # b.square() for its square; no spread; / d
    truth, t = load(name), torch.linspace(-2.6, 2.6, 201)
    if name == "checkerboard":                                          # midpoints, none on an edge
        t = math.sqrt(3) * ((torch.arange(600) + 0.5) / 300 - 1)
    x_0, x = torch.cartesian_prod(t, t), points(truth, a, b, 0, 4)
    log_weight = truth.log_prob(x_0) - (x[:, None] - a * x_0).square().sum(-1) / (2 * b**2)
    weight = log_weight.softmax(-1)
    mean = weight @ x_0
    torch.testing.assert_close(truth.denoise(x, a, b), mean, atol=3e-5, rtol=0)
    if name in MIXTURES:
        variance = (weight @ x_0.square().sum(-1) - mean.square().sum(-1)) / 2
        torch.testing.assert_close(truth.posterior_variance(x, a, b), variance, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", data.DENSITIES)
def test_samples_have_mean_0_variance_1_and_the_entropy(name):          # entropy's sign; 2 * std * noise
    truth, n = load(name), 30_000
    g = torch.Generator().manual_seed(0)
    x = truth.sample(n, g)
    assert x.dtype == torch.float32 and x.shape == (n, 2)
    x = x.double()
    assert (x.mean(0).abs() < 5 / n**0.5).all()                         # 5 standard errors
    fourth = x.pow(4).mean(0)
    assert ((x.square().mean(0) - 1).abs() < 5 * ((fourth - 1) / n).sqrt()).all()
    surprise = -truth.log_prob(x)
    inside = surprise.isfinite()                                        # float32 may step over an edge of the board
    assert inside.float().mean() > 0.9999
    assert (surprise[inside].mean() - truth.entropy).abs() < 5 * surprise[inside].std() / n**0.5 + 1e-9


@pytest.mark.parametrize("name", MIXTURES)
def test_moments_are_exact_by_construction(name):                       # 1 + std^2; no mean; std for var
    truth = load(name)
    torch.testing.assert_close(truth.means.mean(0), torch.zeros(2), atol=1e-12, rtol=0)
    torch.testing.assert_close(truth.means.var(0, unbiased=False) + truth.std**2, torch.ones(2))


def test_modes_and_classes():                                           # cos(angle + 1); 39 for 40 points
    assert {name: load(name).classes for name in data.DENSITIES} == {
        "gmm": 8, "grid": 25, "moons": 2, "spirals": 2, "rings": 3, "checkerboard": None}
    gmm, grid = load("gmm"), load("grid")
    torch.testing.assert_close(gmm.modes.norm(dim=-1), torch.full((8,), math.sqrt(2 * 0.99)))
    assert gmm.mode_std == gmm.std == 0.1 and torch.equal(grid.modes, grid.means)
    for truth in (gmm, grid):
        apart = torch.cdist(truth.modes, truth.modes).fill_diagonal_(9).min(1)[0]
        assert (apart / truth.mode_std > 10).all() and apart.max() - apart.min() < 1e-9
    assert abs(apart.min() / grid.mode_std - 20) < 1e-9                 # spacing 1, std 0.05
    assert all(load(name).modes is None and load(name).mode_std is None for name in data.DENSITIES if name[0] != "g")


def test_curves_are_smooth_and_lie_where_they_should():                 # too few components; the wrong angles
    rings, moons, spirals = load("rings"), load("moons"), load("spirals")
    radius = rings.means.norm(dim=-1)
    torch.testing.assert_close(radius / radius[0], rings.targets.double() + 1)
    assert torch.bincount(rings.targets).tolist() == [40, 80, 120]
    angle = spirals.means[:128].norm(dim=-1)
    assert ((angle[1:] - angle[:-1]) > 0).all() and angle[-1] / angle[0] > 6
    torch.testing.assert_close(spirals.means[:128], -spirals.means[128:])
    upper, lower = moons.means[:64], moons.means[64:]
    torch.testing.assert_close(upper, -lower)                           # point symmetry about the middle
    assert upper[31, 1] > upper[0, 1] and upper[0, 0] > upper[-1, 0] and lower[0, 1] > lower[31, 1]
    raw = (upper[0, 0] - upper[-1, 0]) / 2 / math.cos(math.pi / 128)    # a radius in the scaled picture
    torch.testing.assert_close(lower[:, 0].mean() - upper[:, 0].mean(), raw)             # centres one radius apart
    for truth in (rings, moons, spirals):                               # closer than a ripple of 1 % needs
        nearest = torch.cdist(truth.means, truth.means).fill_diagonal_(9).min(1)[0]
        assert nearest.max() < 1.7 * truth.std
    other = torch.cdist(spirals.means[:128], spirals.means[128:]).min(1)[0]
    assert other[10:].min() > 5 * spirals.std                           # the arms lie apart


@given(noise_levels, seeds)
@settings(max_examples=15)
def test_checkerboard_noise_is_a_convolution(level, seed):              # edges[1:] for edges[:-1]; parity of the cells
    truth, (a, b) = load("checkerboard"), level
    x = points(truth, a, b, seed, 5)
    edge, node, width = math.sqrt(3), (torch.arange(400) + 0.5) / 400, math.sqrt(3) / 2
    total = torch.zeros(5)
    for i, j in [(0, 0), (0, 2), (1, 1), (1, 3), (2, 0), (2, 2), (3, 1), (3, 3)]:
        sides = [width * (k + node) - edge for k in (i, j)]
        pieces = [torch.exp(-(x[:, c, None] - a * s).square() / (2 * b**2)).mean(-1) for c, s in enumerate(sides)]
        total += pieces[0] * pieces[1] / (2 * math.pi * b**2) / 8
    torch.testing.assert_close(truth.log_prob(x, a, b).exp(), total, rtol=1e-3, atol=1e-9)


def test_checkerboard_without_noise():                                  # < for <=; inf outside
    truth = load("checkerboard")
    x = torch.tensor([[-1.7, -1.7], [-0.8, -1.7], [-0.8, -0.8], [0.1, -0.1], [1.74, 1.7], [0.1, 0.1]])
    dark = torch.tensor([True, False, True, False, False, True])
    torch.testing.assert_close(truth.log_prob(x), torch.where(dark, -math.log(6), -torch.inf))
    torch.testing.assert_close(truth.log_prob(0.5 * x, 0.5), torch.where(dark, -math.log(1.5), -torch.inf))
    assert (truth.score(x) == 0).all() and torch.allclose(truth.denoise(x, 0.5), 2 * x)


@pytest.mark.parametrize("a", [1e-3, 1e-4, 1e-5, 1e-6, 1e-8])
def test_checkerboard_keeps_its_accuracy_when_almost_all_is_noise(a):   # no floor; no a / floor
    truth, x = load("checkerboard"), 3 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    # to second order in a: mean a Cov x, with Cov the data's own covariance
    u = (truth.cells + 0.5) * truth.width - math.sqrt(3)
    cov = u.T @ u / 8 + torch.eye(2) * truth.width**2 / 12
    torch.testing.assert_close(truth.denoise(x, a, 1.0), a * x @ cov, atol=1e-6 + 20 * a**2, rtol=0)
    normal = -x.square().sum(-1) / 2 - math.log(2 * math.pi)
    torch.testing.assert_close(truth.log_prob(x, a, 1.0), normal, atol=1e-6 + 60 * a**2, rtol=0)


def test_far_away_and_at_little_noise_everything_is_finite():           # no flip; mass without log_ndtr
    for name in data.DENSITIES:
        truth, x = load(name), torch.tensor([[30.0, -40.0], [0.0, 25.0], [1e-9, 0.0]])
        for a, b in ((1.0, 1e-3), (1.0, 0.5), (1e-2, 1e-2)):
            assert truth.log_prob(x, a, b).isfinite().all()
            assert truth.score(x, a, b).isfinite().all()
            assert (truth.denoise(x, a, b).abs() < 100 / a).all()
    board = load("checkerboard")                                        # beyond the corner E[x_0] tends to the corner
    far = board.denoise(torch.tensor([[5.0, 5.0], [-5.0, -5.0]]), 1.0, 0.05)
    torch.testing.assert_close(far, math.sqrt(3) * torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", data.DENSITIES)
def test_bayes_loss_is_what_the_optimal_predictor_loses(name):          # b for b**2; no / dim; + for - ; exp(-t^2/C)
    truth, n = load(name), 5_000
    g = torch.Generator().manual_seed(1)
    for a, b in ((0.999, 0.04), (0.95, 0.3), (0.6, 0.8), (0.1, 0.995), (1.0, 2.0)):
        x_0, eps = truth.sample(n, g).double(), torch.randn(n, 2, generator=g)
        x = a * x_0 + b * eps
        loss = (eps + b * truth.score(x, a, b)).square().mean(-1)       # E[eps | x] = -b score
        assert (loss.mean() - truth.bayes_loss(a, b)).abs() < 5 * loss.std() / n**0.5


def test_bayes_loss_of_the_ring_against_independent_numbers():          # notes/diffusion_ebm.md 3.2; wrong grid step
    ring = data.Mixture("ring", data._arc(1.4, 2 * np.pi * np.arange(8) / 8), 0.1, np.arange(8))
    linear = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)[4::10]
    f = torch.cos((torch.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2).square()
    cosine = (f / f[0])[5::10]
    loss = lambda alphas: ring.bayes_loss(alphas.sqrt(), (1 - alphas).sqrt()).mean().item()
    assert abs(loss(linear) - 0.1995) < 1e-3 and abs(loss(cosine) - 0.346) < 1e-3
    assert abs(ring.entropy - 0.3121) < 1e-4 and abs(ring.entropy - math.log(8 * 2 * math.pi * math.e * 0.01)) < 1e-4


@pytest.mark.parametrize("name", data.DENSITIES)
def test_bayes_loss_takes_a_sequence_and_tends_to_1_and_0(name):
    truth = load(name)
    a, b = torch.tensor([1.0, 1.0, 0.6, 1e-3]), torch.tensor([0.0, 1e-4, 0.8, 1.0])
    loss = truth.bayes_loss(a, b)
    assert loss.shape == (4,) and loss.dtype == torch.float64 and loss[0] == 1 and truth.bayes_loss(0.6, 0.8) == loss[2]
    assert truth.bayes_loss(1.0, b).shape == (4,)
    assert 0.99 < loss[1] < 1 and abs(loss[3] - 1e-6) < 1e-8            # a^2 Var / b^2 with unit variance
    if name in MIXTURES:                                                # across a mode 1 - b^2 / std^2, along a curve 1
        part = (1 - loss[1]) / (1e-8 / truth.std**2)
        assert abs(part - (1 if truth.modes is not None else 0.5)) < 0.02


@pytest.mark.parametrize("name", MIXTURES)
def test_labels_agree_with_their_posterior(name):                       # targets[k + 1]; no log_softmax; == for !=
    truth, g = load(name), torch.Generator().manual_seed(0)
    n, a, b = 2000, 0.8, 0.3
    x, labels = truth.sample(n, g, labels=True)
    assert labels.dtype == torch.int64 and set(labels.tolist()) == set(range(truth.classes))
    clean = truth.label_log_prob(x.double(), 1.0, 1e-3)
    assert (clean.argmax(-1) == labels).float().mean() > 0.995
    posterior = truth.label_log_prob(a * x.double() + b * torch.randn(n, 2, generator=g), a, b)
    assert posterior.shape == (n, truth.classes)
    torch.testing.assert_close(posterior.logsumexp(-1), torch.zeros(n), atol=1e-12, rtol=0)
    # calibrated: the expected log-likelihood of the true label is minus the posterior's own entropy
    gap = posterior.gather(1, labels[:, None])[:, 0] - (posterior.exp() * posterior).sum(-1)
    assert gap.mean().abs() < 5 * gap.std() / n**0.5 and gap.std() > 0


@given(st.sampled_from(MIXTURES), noise_levels, seeds)
def test_conditions_add_up_to_the_whole(name, level, seed):             # targets != label
    truth, (a, b) = load(name), level
    x = points(truth, a, b, seed, 5)
    prior = torch.bincount(truth.targets) / len(truth.targets)
    joint = torch.stack([truth.condition(c).log_prob(x, a, b) for c in range(truth.classes)], -1) + prior.log()
    torch.testing.assert_close(joint.logsumexp(-1), truth.log_prob(x, a, b))
    torch.testing.assert_close(joint.log_softmax(-1), truth.label_log_prob(x, a, b), atol=1e-9, rtol=1e-9)


def test_conditions_that_do_not_exist_and_labels_of_the_board():
    with pytest.raises(ValueError, match="0 to 7; got 8"):
        load("gmm").condition(8)
    assert load("gmm").condition(3).modes.shape == (1, 2) and load("moons").condition(0).modes is None
    for ask in (lambda t: t.sample(3, labels=True), lambda t: t.batches(3, labels=True)):
        with pytest.raises(ValueError, match="checkerboard has no labels"):
            ask(load("checkerboard"))


@given(names, seeds)
@settings(max_examples=10)
def test_levels_a_row_dtype_shape_and_blocks(name, seed):               # blocks of the wrong rows; x.dtype dropped
    truth, n = load(name), 12
    g = torch.Generator().manual_seed(seed)
    x, a, b = torch.randn(n, 2, generator=g), torch.rand(n, generator=g) + 0.1, torch.rand(n, generator=g) + 0.1
    for function in (truth.log_prob, truth.score, truth.denoise):
        whole = function(x, a, b)
        rows = torch.stack([function(x[i], a[i], b[i]) for i in range(n)])
        torch.testing.assert_close(whole, rows)
        torch.testing.assert_close(function(x.reshape(3, 4, 2), a, b).reshape(whole.shape), whole)
        single = function(x.float(), a.float(), b.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), whole, rtol=1e-3, atol=1e-3)
    many = x.repeat(800, 1)
    torch.testing.assert_close(truth.log_prob(many, 0.7, 0.5), truth.log_prob(x, 0.7, 0.5).repeat(800))


@pytest.mark.parametrize("name", ["gmm", "checkerboard", "persian"])
def test_batches_are_the_global_generators_and_nothing_is_buffered(name):
    batches = load(name).batches(8)
    torch.manual_seed(5)
    next(batches)
    state = torch.get_rng_state()
    first = [next(batches) for _ in range(2)]
    torch.set_rng_state(state)
    again = load(name).batches(8)
    assert all(torch.equal(a, next(again)) for a in first) and not torch.equal(*first)
    assert first[0].shape == (8, *load(name).shape) and first[0].dtype == torch.float32
    g = torch.Generator().manual_seed(3)
    x = load(name).sample(8, g)
    assert not torch.equal(x, load(name).sample(8, g)) and torch.equal(x, load(name).sample(8, g.manual_seed(3)))


def test_batches_with_labels():
    x, labels = next(load("gmm").batches(64, labels=True))
    assert (torch.cdist(x.double(), load("gmm").modes).argmin(1) == labels).all()


# ---- the images' interface


@given(st.sampled_from([2, 256]), seeds)
def test_unscale_undoes_scale(levels, seed):                            # levels for levels - 1; no round
    images = data.Images("x", np.zeros((2, 1, 2, 2), np.uint8), None, np.zeros((1, 1, 2, 2), np.uint8), None, levels)
    x = torch.arange(levels, dtype=torch.uint8)
    scaled = images.scale(x)
    assert scaled.dtype == torch.float32 and scaled[0] == -1 and abs(scaled[-1] - 1) < 1e-6
    torch.testing.assert_close(scaled.diff(), torch.full((levels - 1,), 2 / (levels - 1), dtype=torch.float32))
    for off in (-0.9, 0.9):                                             # almost half a level
        back = images.unscale(scaled + off / (levels - 1))
        assert back.dtype == torch.uint8 and torch.equal(back, x)
    assert images.unscale(torch.tensor([-7.0, 7.0])).tolist() == [0, levels - 1]


def tiny(n=30, labels=True):
    x = np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 2), np.uint8)
    y = np.arange(n) % 3 if labels else None
    return data.Images("tiny", x, y, x + 100, y, 256, ("a", "b", "c") if labels else None)


def test_images_sample_without_replacement_and_with_matching_labels():  # randint for randperm; labels of another split
    images = tiny()
    x, y = images.sample(30, labels=True)
    values = images.unscale(x)[:, 0, 0, 0].long() - 100
    assert values.sort()[0].tolist() == list(range(30)) and torch.equal(values % 3, y)
    x = images.unscale(images.sample(75, split="train"))[:, 0, 0, 0]
    assert torch.bincount(x.long(), minlength=30).sort()[0].tolist() == [2] * 15 + [3] * 15
    x, y = next(images.batches(500, labels=True))
    values = images.unscale(x)[:, 0, 0, 0].long()
    assert torch.equal(values % 3, y) and set(values.tolist()) == set(range(30))
    assert images.unscale(next(images.batches(5, split="test"))).min() >= 100


def test_images_carry_the_fields_of_a_set_with_known_factors():         # update dropped
    x = data.Images("x", *[np.zeros((2, 1, 2, 2), np.uint8), None] * 2, attribute_names=("a",))
    assert x.attribute_names == ("a",) and x.dim == 4 and x.classes is None


def test_images_refuse_what_they_lack():
    for ask in (lambda i: i.sample(3, labels=True), lambda i: i.batches(3, labels=True)):
        with pytest.raises(ValueError, match="tiny has no labels"):
            ask(tiny(labels=False))
    with pytest.raises(ValueError, match="train or test; got valid"):
        tiny().sample(3, split="valid")


# ---- resizing and fitting


@given(st.integers(1, 12), st.integers(1, 12))
def test_area_weights_keep_the_mass(n, m):                              # * n / m for * m / n; n and m exchanged
    weights = data._area_weights(n, m)
    assert weights.shape == (m, n) and (weights >= 0).all()
    assert np.allclose(weights.sum(1), 1, atol=1e-6) and np.allclose(weights.sum(0), m / n, atol=1e-5)
    under = (np.arange(1000 * m).reshape(m, 1000) + 0.5) * n / m // 1000  # the pixel under each of 1000 points
    assert np.allclose(weights @ np.arange(n), under.mean(1), atol=0.02)


def test_resize_averages_rounds_and_keeps_binary_binary():
    x = np.array([[[[0, 3, 255, 255], [0, 3, 255, 250]]]], np.uint8)
    assert data._resize(x, 1, 2, 256).tolist() == [[[[2, 254]]]]        # 1.5 and 253.75
    ink = np.array([[[1, 0, 0, 0], [1, 0, 1, 0]]], np.uint8)
    assert data._resize(ink, 1, 2, 2).tolist() == [[[1, 0]]]            # half the area is ink


@given(st.integers(1, 60), st.integers(1, 60))
def test_fit_centres_and_shrinks(height, width):                        # no centring; min for max
    out = data._fit([np.ones((height, width), np.uint8)])
    assert out.shape == (1, 1, 28, 28)
    rows, columns = (np.flatnonzero(out[0, 0].any(axis)) for axis in (1, 0))
    shrink = min(1, 24 / max(height, width))
    assert abs(len(rows) - max(1, height * shrink)) <= 0.5 and abs(len(columns) - max(1, width * shrink)) <= 0.5
    assert abs(rows[0] - (27 - rows[-1])) <= 1 and abs(columns[0] - (27 - columns[-1])) <= 1
    assert out.sum() == len(rows) * len(columns)


def test_fit_keeps_the_order_of_mixed_shapes():
    shapes = [(3, 3), (5, 5), (3, 3), (40, 20), (5, 5)]
    images = [np.full(shape, i % 2, np.uint8) for i, shape in enumerate(shapes)]
    assert data._fit(images).sum((1, 2, 3)).tolist() == [0, 25, 0, 24 * 12, 0]


# ---- load: splits, files, refusals


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


def write_mnist(folder, part, n, first=0):
    values = np.arange(first, first + n, dtype=np.uint8)
    write_idx(folder / f"{part}-images-idx3-ubyte.gz", values[:, None, None] * np.ones((1, 4, 4)))
    write_idx(folder / f"{part}-labels-idx1-ubyte.gz", values % 10)


def test_one_file_is_split_and_two_are_not(tmp_path):                   # the train set as test; 1/5 held out
    write_mnist(tmp_path / "mnist", "train", 60)
    half = data.load("mnist", tmp_path)
    assert half.train.shape == (50, 1, 4, 4) and half.test.shape == (10, 1, 4, 4) and half.levels == 256
    seen, held = (set(x[:, 0, 0, 0].tolist()) for x in (half.train, half.test))
    assert seen | held == set(range(60)) and not seen & held and held != set(range(50, 60))
    assert torch.equal(half.train[:, 0, 0, 0] % 10, half.train_labels) and half.train_labels.dtype == torch.int64
    assert torch.equal(half.test[:, 0, 0, 0] % 10, half.test_labels)
    assert torch.equal(half.test, data.load("mnist", tmp_path).test)
    assert not torch.equal(half.test, data.load("mnist", tmp_path, seed=1).test)
    write_mnist(tmp_path / "mnist", "t10k", 7, first=100)
    whole = data.load("mnist", str(tmp_path), size=2)
    assert whole.train[:, 0, 0, 0].tolist() == list(range(60))
    assert whole.test[:, 0, 1, 1].tolist() == list(range(100, 107))
    assert whole.shape == (1, 2, 2) and whole.class_names == tuple("0123456789")


def test_two_images_can_be_split_and_one_cannot():
    one, _, two, _ = data._held_out(np.arange(2), None, 0)
    assert len(one) == len(two) == 1 and one != two
    with pytest.raises(ValueError, match="at least two"):
        data._held_out(np.arange(1), None, 0)


def test_labels_that_do_not_match_are_refused(tmp_path):
    write_mnist(tmp_path / "mnist", "train", 12)
    path = tmp_path / "mnist" / "train-labels-idx1-ubyte.gz"
    write_idx(path, np.zeros(11))
    with pytest.raises(ValueError, match=r"\(12, 4, 4\) and \(11,\)"):
        data.load("mnist", tmp_path)
    write_idx(path, np.full(12, 10))
    with pytest.raises(ValueError, match="labels 0 to 9"):
        data.load("mnist", tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="train-labels.*--data-dir.*--download"):
        data.load("mnist", tmp_path)


def test_cifar_batches_are_joined_in_order_and_grey_is_luma(tmp_path):  # sorted dropped; weights exchanged
    folder = tmp_path / "cifar10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    record = lambda label, r, g, b: bytes([label]) + bytes([r]) * 1024 + bytes([g]) * 1024 + bytes([b]) * 1024
    (folder / "data_batch_2.bin").write_bytes(record(2, 0, 0, 255) * 2)
    (folder / "data_batch_1.bin").write_bytes(record(1, 255, 0, 0))
    (folder / "test_batch.bin").write_bytes(record(9, 0, 255, 0))
    x = data.load("cifar10", tmp_path)
    assert x.train_labels.tolist() == [1, 2, 2] and x.test_labels.tolist() == [9] and x.class_names[9] == "truck"
    assert x.train[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255], [0, 0, 255]]
    grey = data.load("cifar10", tmp_path, grey=True, size=16)
    assert grey.shape == (1, 16, 16)
    assert grey.train[:, 0, 0, 0].tolist() == [76, 29, 29] and grey.test[0, 0, 0, 0] == 150


def test_folder(tmp_path):
    from PIL import Image
    for i in range(12):
        Image.fromarray(np.full((5, 7, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    x = data.load(f"folder:{tmp_path}", size=4)
    assert x.train.shape == (10, 3, 4, 4) and x.test.shape == (2, 3, 4, 4) and x.train_labels is None     # 80 / 20
    assert sorted(torch.cat([x.train, x.test])[:, 0, 0, 0].tolist()) == list(range(12))
    assert data.load(f"folder:{tmp_path}", grey=True).shape == (1, 64, 64)


def test_folder_with_bad_unequal_and_transparent_pictures(tmp_path):    # skip_bad not handed on
    from PIL import Image
    for i, (shape, mode) in enumerate([((9, 5), "L"), ((3, 8), "RGBA"), ((4, 4), "RGB"), ((30, 31), "P"), ((5, 5), "LA")]):
        Image.new(mode, shape).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="1 of 6 images cannot be read: .*bad.png"):
        data.load(f"folder:{tmp_path}", size=4)
    with pytest.warns(UserWarning, match="bad.png.*left out"):
        x = data.load(f"folder:{tmp_path}", size=4, skip_bad=True)
    assert x.train.shape == (4, 3, 4, 4) and x.test.shape == (1, 3, 4, 4)
    assert sorted(torch.cat([x.train, x.test])[:, 0, 0, 0].tolist()) == [0, 0, 0, 255, 255]


def test_what_load_refuses(tmp_path):
    for name in ("nonsense", "folder:"):
        with pytest.raises(ValueError, match="gmm, grid, .*persian.* and folder:PATH"):
            data.load(name)
    for name, size in (("gmm", 28), ("persian", 0)):
        with pytest.raises(ValueError, match=f"size {size} is impossible for {name}"):
            data.load(name, size=size)
    for name, file in (("mnist", "train-images"), ("fashion-mnist", "train-images"), ("hoda", "Train 60000.cdb"),
                       ("cifar10", "data_batch")):
        with pytest.raises(FileNotFoundError, match=f"{name}/.*{file}.*--data-dir.*--download"):
            data.load(name, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.load(f"folder:{tmp_path}/nowhere")


# ---- download, from a server of our own


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

        def do_GET(self):
            if "short" in self.path:                                    # promises more than it sends
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"begin")
            else:
                super().do_GET()

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{httpd.server_port}/"
    httpd.shutdown()
    httpd.server_close()


def test_fetch_keeps_only_what_is_whole_and_right(server, tmp_path):    # no comparison; no unlink; part renamed at once
    folder, url = server
    content, out = b"x" * 200_000, tmp_path / "out" / "file"
    (folder / "file").write_bytes(content)
    git = hashlib.sha1(b"blob 200000\0" + content).hexdigest()
    sha256, md5 = hashlib.sha256(content).hexdigest(), hashlib.md5(content).hexdigest()
    for digest in (f"sha256:{sha256}", f"md5:{md5}", f"git:{git}"):
        data.fetch(url + "file", out, digest)
        assert out.read_bytes() == content
        out.unlink()
    with pytest.raises(ValueError, match="expected md5 00, found .*; nothing was kept"):
        data.fetch(url + "file", out, "md5:00")
    with pytest.raises(FileNotFoundError, match="absent.*404"):
        data.fetch(url + "absent", out, "md5:00")
    with pytest.raises((ValueError, FileNotFoundError)):
        data.fetch(url + "short", out, "md5:00")
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        data.fetch("http://127.0.0.1:9/file", out, "md5:00")
    assert list(out.parent.iterdir()) == []


def test_download_fetches_what_is_missing(server, tmp_path, monkeypatch):
    folder, url = server
    write_mnist(folder, "train", 60)
    write_mnist(folder, "t10k", 7)
    digest = lambda file: "md5:" + hashlib.md5((folder / file).read_bytes()).hexdigest()
    monkeypatch.setitem(data.SOURCES, "mnist", (url, {file: digest(file) for file in data.IDX}))
    assert len(data.load("mnist", tmp_path, download=True).train) == 60
    for file in data.IDX:
        (folder / file).unlink()
    assert len(data.load("mnist", tmp_path, download=True).test) == 7  # nothing is fetched twice


def test_download_quotes_blanks(server, tmp_path, monkeypatch):        # without quote()
    folder, url = server
    (folder / "a b.cdb").write_bytes(b"x")
    monkeypatch.setitem(data.SOURCES, "hoda", (url, {"a b.cdb": "md5:" + hashlib.md5(b"x").hexdigest()}))
    data._download("hoda", tmp_path)
    assert (tmp_path / "a b.cdb").read_bytes() == b"x"


def test_download_unpacks_cifar_and_picks_up_where_it_stopped(server, tmp_path, monkeypatch):
    folder, url = server
    with tarfile.open(folder / "c.tar.gz", "w:gz") as archive:
        for file in ("data_batch_1.bin", "../../test_batch.bin", "readme.html"):
            member, content = tarfile.TarInfo(f"cifar-10-batches-bin/{file}"), b"\3" + bytes(3072)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    digest = "md5:" + hashlib.md5((folder / "c.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setitem(data.SOURCES, "cifar10", (url, {"c.tar.gz": digest}))
    bins = tmp_path / "cifar10" / "cifar-10-batches-bin"
    for _ in range(2):
        assert data.load("cifar10", tmp_path, download=True).train_labels.tolist() == [3]
        assert sorted(p.name for p in bins.iterdir()) == ["data_batch_1.bin", "test_batch.bin"]
        assert [p.name for p in bins.parent.iterdir()] == ["cifar-10-batches-bin"]
    (bins / "test_batch.bin").unlink()                                  # as after a kill in the middle of unpacking
    (folder / "c.tar.gz").rename(bins.parent / "c.tar.gz")
    assert data.load("cifar10", tmp_path, download=True).test_labels.tolist() == [3]


# ---- the published files, where they lie here


def test_the_pinned_digests_are_those_of_the_originals(real_data):
    checked = 0
    for name, (address, files) in data.SOURCES.items():
        assert address.startswith("http") and address.endswith("/")
        for file, digest in files.items():
            algorithm, expected = digest.split(":")
            assert len(expected) == {"md5": 32, "sha256": 64, "git": 40}[algorithm]
            if algorithm == "sha256":
                assert hashlib.sha256((real_data / name / file).read_bytes()).hexdigest() == expected
                checked += 1
    assert checked == 3


@pytest.mark.parametrize("name, train, test, shape, levels", [
    ("mnist", 50_000, 10_000, (1, 28, 28), 256), ("fashion-mnist", 8_334, 1_666, (1, 28, 28), 256),
    ("cifar10", 3_000, 500, (3, 32, 32), 256), ("hoda", 60_000, 20_000, (1, 28, 28), 2)])
def test_published_sets(real_data, name, train, test, shape, levels):
    x = data.load(name, real_data)
    assert (len(x.train), len(x.test), x.shape, x.levels, x.classes) == (train, test, shape, levels, 10)
    assert x.train.max() == levels - 1 and len(x.train_labels) == train and len(x.test_labels) == test
    if name == "hoda":
        assert torch.bincount(x.train_labels).tolist() == [6000] * 10 and x.class_names[5] == "۵"
        assert 0.14 < x.train.double().mean() < 0.18 and 0.14 < x.test.double().mean() < 0.18
        assert (x.train.flatten(1).sum(1) > 0).all()
    if name == "fashion-mnist":
        both = torch.cat([x.train, x.test]).double() / 255
        assert abs(both.mean() - 0.2868) < 1e-4 and abs(both.std() - 0.3524) < 1e-3
        assert torch.bincount(torch.cat([x.train_labels, x.test_labels])).tolist() == [1000] * 10


# ---- two sets for translation


def test_domains_by_an_attribute_share_no_image_and_keep_the_rest(monkeypatch):     # side swapped; the label for the attribute
    small = data.shapes.faces(0, 16, train=512, test=256)
    monkeypatch.setattr(data.shapes, "faces", lambda *args: small)
    whole = data.load("faces")
    for attribute, k in (("", 0), ("smile", 0), ("glasses", data.shapes.ATTRIBUTES.index("glasses"))):
        without, having = data.domains("faces", attribute=attribute)
        for split in ("train", "test"):
            has = getattr(whole, f"{split}_attributes")[:, k]
            for part, rows in ((without, ~has), (having, has)):
                assert torch.equal(getattr(part, split), getattr(whole, split)[rows])
                assert torch.equal(getattr(part, f"{split}_attributes"), getattr(whole, f"{split}_attributes")[rows])
                assert torch.equal(getattr(part, f"{split}_labels"), getattr(whole, f"{split}_labels")[rows])
        assert without.attribute_names == whole.attribute_names and without.levels == 256
    with pytest.raises(ValueError, match="no attribute 'wings'; it knows smile, "):
        data.domains("faces", attribute="wings")


def test_domains_of_digits_and_folders(tmp_path):                       # the same set twice; B before A
    from PIL import Image
    a, b = data.domains("persian")
    assert (a.name, b.name) == ("persian", "latin") and a.shape == b.shape and a.levels == b.levels == 2
    assert b.class_names == tuple("0123456789") and torch.equal(a.train_labels.bincount(), b.train_labels.bincount())
    assert [v.name for v in data.domains("latin")] == ["latin", "persian"]
    for folder, shade in (("one", 10), ("two", 200)):
        (tmp_path / folder).mkdir()
        for k in range(10):
            Image.new("RGB", (8, 8), (shade + k,) * 3).save(tmp_path / folder / f"{k}.png")
    a, b = data.domains(f"folder:{tmp_path}/one,{tmp_path}/two", size=8)
    assert a.train.max() < 30 < 190 < b.train.min()
    for name in ("folder:a", "folder:a,", "folder:a,b,c"):
        with pytest.raises(ValueError, match="folder:A,B; got"):
            data.domains(name)
    for name in ("gmm", "checkerboard"):
        with pytest.raises(ValueError, match="not two sets"):
            data.domains(name)
    with pytest.raises(ValueError, match="knows none"):
        data.domains("gmm", attribute="smile")


def test_real_sprites_are_two_sets(real_data):
    regular, shiny = data.domains("pokesprite", real_data, size=32)
    assert regular.shape == shiny.shape == (3, 32, 32) and len(regular.train) > 350 < len(shiny.train)
    assert (regular.train_labels == 0).all() and (shiny.train_labels == 1).all()
