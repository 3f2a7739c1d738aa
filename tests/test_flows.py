"""flows.py and edits.py: bijections against autograd's Jacobian, densities against quadrature and entropies, ODEs against
closed forms. Parameters are perturbed first: where all starts at zero, a wrong log-determinant is right. Behind each
`def`: a line that must not break."""

import copy
import json
import math
import pathlib
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import data
import edits
import flows
import judges
import metrics

close = torch.testing.assert_close
seeds = st.integers(0, 999)
LAYERED = ("realnvp", "spline", "glow")


def rng(seed):
    return torch.Generator().manual_seed(seed)


def make(name="spline", shape=(2,), levels=None, seed=0, scale=0.3, **options):
    """A small model, every parameter off its start."""
    torch.manual_seed(seed)
    small = {"width": 8, "waves": 2} if name == "matching" else {"width": 8, "depth": 2, "waves": 2}
    small |= {"bins": 5} if name == "spline" else {}
    model = flows.MODELS[name](shape, levels, **small | options)
    x = torch.randn(16, *shape, generator=rng(seed)) / (3 if len(shape) == 3 else 1)
    with torch.no_grad():
        if name != "matching":
            model(x)                                                    # actnorm
        for p in model.parameters():
            p += scale * torch.randn(p.shape, generator=rng(seed + 1))
    return model


def log_det_by_autograd(f, x):
    """(B,) log |det| of the whole Jacobian of f at each row, alone."""
    jacobian = lambda row: torch.autograd.functional.jacobian(lambda v: f(v.view(1, *x.shape[1:])).flatten(), row.flatten())
    return torch.stack([torch.linalg.slogdet(jacobian(row))[1] for row in x])


# ---- splines and scales


def theta(n, K, seed, scale=1.5):
    return scale * torch.randn(n, 3 * K - 1, generator=rng(seed))


@given(seeds, st.integers(1, 9), st.floats(0.5, 5))
def test_a_spline_is_a_monotone_bijection_with_that_slope(seed, K, bound):          # beta; the root's sign; h for w
    x, th = 1.5 * bound * torch.randn(40, generator=rng(seed)), theta(40, K, seed + 1)
    x.requires_grad_()
    y, log_slope = flows.rational_quadratic_plain(x, th, bound)
    slope = torch.autograd.grad(y.sum(), x)[0]
    assert (slope > 0).all()
    close(log_slope, slope.log())
    back, log_back = flows.rational_quadratic_plain(y.detach(), th, bound, inverse=True)
    close(back, x.detach(), rtol=1e-8, atol=1e-9)
    close(log_back, -log_slope, rtol=1e-6, atol=1e-7)


@given(seeds, st.integers(2, 8))
def test_a_spline_meets_itself_at_its_knots_and_the_identity_at_its_ends(seed, K):  # slopes k, k + 1; value=1.0; least
    th, bound = theta(1, K, seed), 3.0
    sizes = 2 * bound * (1e-3 + (1 - K * 1e-3) * th[:, : 2 * K].view(2, K).softmax(1))
    x_k, y_k = sizes.cumsum(1)[:, :-1] - bound
    at = lambda x: flows.rational_quadratic_plain(x, th.expand(len(x), -1), bound)
    y, l = at(x_k)
    close(y, y_k)
    close(l.exp(), 1e-3 + torch.nn.functional.softplus(th[0, 2 * K :] + math.log(math.expm1(1 - 1e-3))))
    for e in (-1e-10, 1e-10):                                             # C1: both sides agree
        close(at(x_k + e)[1], l, rtol=1e-4, atol=1e-4)
    ends = torch.tensor([-bound, bound, -bound - 1, 1e6, -1e6])
    y, l = at(ends)
    close(y, ends)
    close(l, torch.zeros(5), rtol=0, atol=1e-8)


def test_a_spline_of_zeros_is_the_identity():                           # UNIT left out
    x = torch.linspace(-7, 7, 99)
    y, l = flows.rational_quadratic_plain(x, torch.zeros(99, 17), 5.0)
    close(y, x)
    close(l, torch.zeros(99), atol=1e-12, rtol=0)


@pytest.mark.parametrize("inverse", [False, True])
def test_a_spline_has_finite_gradients_everywhere(inverse):             # the clamp before the spline
    x = torch.tensor([-1e6, -5.0, -4.999999, 0.0, 5.0, 5.000001, 1e6], requires_grad=True)
    th = theta(7, 4, 0, 20.0).requires_grad_()
    y, l = flows.rational_quadratic_plain(x, th, 5.0, inverse)
    close(y[[0, 5, 6]], x[[0, 5, 6]])
    assert all(g.isfinite().all() for g in torch.autograd.grad((y + l).sum(), (x, th)))


@given(seeds)
def test_scale_and_shift(seed):                                         # s for -s; tanh without its 2
    x, th = torch.randn(20, generator=rng(seed)), 5 * torch.randn(20, 2, generator=rng(seed + 1))
    y, s = flows.affine(x, th)
    close((flows.affine(x + 1, th)[0] - y).log(), s)
    back, minus = flows.affine(y, th, inverse=True)
    close(back, x)
    close(minus, -s)
    assert s.abs().max() <= 2
    close(flows.affine(x, 1e-6 * th)[1], 1e-6 * th[:, 0], atol=1e-12, rtol=1e-6)


# ---- every model is a bijection with the log-determinant that it says


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("dim", [2, 3, 5, 7])
def test_log_det_of_points_is_that_of_the_jacobian(name, dim):          # the sign of a change; one coupling's log_slope
    model, x = make(name, (dim,), seed=dim), 2 * torch.randn(5, dim, generator=rng(dim))
    z, log_det = model(x)
    assert z.shape == (5, dim) and log_det.shape == (5,)
    assert log_det.abs().min() > 1e-3
    close(log_det, log_det_by_autograd(lambda v: model(v)[0], x))
    back, minus = model.inverse(z)
    close(back, x, rtol=1e-8, atol=1e-9)
    close(minus, -log_det, rtol=1e-6, atol=1e-8)
    close(minus, log_det_by_autograd(lambda v: model.inverse(v)[0], z), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("shape, scales", [((1, 4, 4), 1), ((1, 4, 4), 2), ((3, 4, 4), 2), ((1, 8, 8), 3)])
def test_log_det_of_images_is_that_of_the_jacobian(name, shape, scales):            # H W; the prior of what leaves
    model = make(name, shape, 256, scale=0.1, scales=scales, depth=1)
    x = torch.rand(3, *shape, generator=rng(1)) - 0.5
    z, log_det = model(x)
    assert z.shape == (3, math.prod(shape)) and sum(model.sizes()) == z.shape[1]
    close(log_det, log_det_by_autograd(lambda v: model(v)[0], x), rtol=1e-8, atol=1e-8)
    back, minus = model.inverse(z)
    close(back, x, rtol=1e-7, atol=1e-8)
    close(minus, -log_det, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("dim", [2, 3, 5])
def test_no_coordinate_is_left_as_it_is(name, dim):                     # kept: the larger half, and its middle stays
    model, x = make(name, (dim,)), torch.randn(9, dim, generator=rng(0))
    z = model(x)[0]
    assert not any(torch.allclose(z[:, i], x[:, j]) for i in range(dim) for j in range(dim))


@pytest.mark.parametrize("name", LAYERED)
def test_one_row_knows_nothing_of_another(name):                        # a mean over the batch in a layer
    model, x = make(name), torch.randn(6, 2, generator=rng(0))
    close(model.log_prob(x)[2:3], model.log_prob(x[2:3]))


def test_a_network_of_points_sees_sines_of_half_and_twice():            # x / frequency; a wave more
    net, x = flows.PointNet(2, 1, waves=3), torch.randn(4, 2, generator=rng(0))
    net.net = torch.nn.Identity()
    angles = [f * x[:, i] for i in range(2) for f in (0.5, 1.0, 2.0)]
    close(net(x), torch.stack([*x.T, *(a.sin() for a in angles), *(a.cos() for a in angles)], 1))



@pytest.mark.parametrize("name", LAYERED)
def test_every_parameter_learns(name):                                  # a layer left out of forward
    for shape, levels in (((2,), None), ((1, 4, 4), 256)):
        model = make(name, shape, levels)
        x = torch.rand(8, *shape, generator=rng(3)) * 2 - 1
        model.loss(x)["loss"].backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", LAYERED)
def test_the_density_integrates_to_one(name):                           # the normaliser 2 pi; log_det's sign
    model = make(name, scale=0.2, seed=4)
    axis = (torch.arange(300) + 0.5) * (24 / 300) - 12
    with torch.no_grad():
        total = model.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * (24 / 300) ** 2
    assert float(total) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("name", LAYERED)
def test_a_learned_density_nears_the_entropy_and_is_never_below(name):            # no log-determinant; twice
    truth = data.load("gmm")
    model = make(name, scale=0.01, depth=3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    average = copy.deepcopy(model)
    batches = (truth.sample(256, generator=rng(k)).double() for k in range(150))
    for _ in flows.train(model, average, optimizer, batches, 150, 1e-2, decay=0.9):
        pass
    with torch.no_grad():
        nll = -average.log_prob(truth.sample(4000, generator=rng(999)).double())
        before = -make(name, scale=0.01, depth=3).log_prob(truth.sample(4000, generator=rng(999)).double())
    assert truth.entropy - 3 * nll.std() / 4000**0.5 <= nll.mean() < before.mean() - 0.2


def test_samples_have_the_density_that_the_model_says():                # temperature; decode for encode
    model = make("glow", scale=0.2, seed=2)
    torch.manual_seed(0)
    x = model.sample(20_000)
    z, log_det = model(x)
    close(z.mean(0), torch.zeros(2), atol=0.03, rtol=0)
    close(torch.cov(z.T), torch.eye(2), atol=0.04, rtol=0)
    h = metrics.kde(x, torch.zeros(1), 0.15)                            # of samples at 0, beside the density smoothed
    with torch.no_grad():
        around = 0.15 * torch.randn(20_000, 2, generator=rng(5))
        assert h.item() == pytest.approx(model.log_prob(around).exp().mean().item(), rel=0.15)
    close(model.sample(3, temperature=0.0), model.decode(torch.zeros(3, 2)))


# ---- layers


def test_actnorm_is_of_mean_zero_and_variance_one_once(tmp_path):       # correction; initialized not a buffer
    for shape in ((3,), (3, 4, 5)):
        norm, x = flows.ActNorm(3), 5 + 3 * torch.randn(50, *shape, generator=rng(0))
        y, _ = norm(x)
        flat = y.detach().transpose(0, 1).flatten(1)
        close(flat.mean(1), torch.zeros(3), atol=1e-9, rtol=0)
        close(flat.var(1, correction=0), torch.ones(3), rtol=1e-5, atol=0)
        other = flows.ActNorm(3)
        other.load_state_dict(norm.state_dict())
        before = copy.deepcopy(other.state_dict())
        close(other(x[:1] * 7)[0], norm(x[:1] * 7)[0])                  # not seen again, and of a batch of one
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items()) and before["initialized"]


def test_actnorm_of_a_constant_channel_is_finite():                     # + 1e-6
    norm = flows.ActNorm(2)
    y, log_det = norm(torch.ones(4, 2))
    assert y.isfinite().all() and log_det.isfinite().all()


@given(seeds, st.integers(1, 7))
def test_the_1x1_convolution_is_its_factors(seed, C):                   # P left out; s for its exponential
    torch.manual_seed(seed)
    layer = flows.InvertibleLinear(C)
    x = torch.randn(2, C, 3, 2)
    close(layer(x)[1].detach(), torch.zeros(2), atol=1e-9, rtol=0)      # a rotation at first
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn(p.shape)
    L, U = layer.factors()
    W = layer.P @ L @ U
    y, log_det = layer(x)
    close(y, torch.nn.functional.conv2d(x, W[..., None, None]))
    close(log_det, 6 * torch.linalg.slogdet(W)[1].expand(2))
    close(layer.inverse(y)[0], x, rtol=1e-6, atol=1e-7)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_squeezing_is_a_permutation_of_neighbours(C, H, W):             # (c i j) in another order both ways
    x = torch.arange(2 * C * 4 * H * W).view(2, C, 2 * H, 2 * W)
    y = flows.squeeze(x)
    assert torch.equal(flows.unsqueeze(y), x)
    assert torch.equal(y[:, :4, 0, 0].sort().values, x[:, 0, :2, :2].flatten(1).sort().values)


def test_a_prior_of_what_leaves_is_a_gaussian_given_the_rest():         # standard_log_prob of all z
    model = make("glow", (1, 4, 4), 256, scales=2, depth=1, scale=0.1)
    x = torch.rand(4, 1, 4, 4, generator=rng(0)) - 0.5
    h, layers = flows.squeeze(x), model.scales[0]
    log_det = 0
    for layer in layers[:-1]:
        h, change = layer(h)
        log_det = log_det + change
    kept, out = h.chunk(2, 1)
    raw, shift = layers[-1].network(kept).unflatten(1, (2, 2)).unbind(2)
    s = 2 * torch.tanh(raw / 2)
    sigma, mu = (-s).exp(), -shift * (-s).exp()
    log_p = torch.distributions.Normal(mu, sigma).log_prob(out).flatten(1).sum(1)
    h = flows.squeeze(kept)
    for layer in model.scales[1]:
        h, change = layer(h)
        log_det = log_det + change
    close(model.log_prob(x), log_p + log_det + flows.standard_log_prob(h))


# ---- pixels


@given(st.sampled_from([2, 3, 256]), st.integers(1, 8))
def test_a_uniform_density_has_log2_levels_bits(levels, bits):          # D log n; log 2
    model = make("glow", (1, 4, 4), levels, bits=bits)
    assert model.n == min(levels, 2**bits)
    uniform = torch.zeros(3)                                            # of density 1 on the unit cube
    close(flows.bits_per_dim(uniform, 16, model.n), torch.full((3,), math.log2(model.n)))
    seen = []
    model.log_prob = lambda y: seen.append(y) or torch.zeros(len(y))
    x = 2.0 * torch.randint(levels, (3, 1, 4, 4), generator=rng(0)) / (levels - 1) - 1
    close(model.bits(x), torch.full((3,), math.log2(model.n)))          # of an image too; n for levels
    close(model.loss(x)["loss"], torch.tensor(math.log2(model.n)))
    assert not (seen[0] == seen[1]).any() and (seen[0] - seen[1]).abs().max() < 1 / model.n
    model.bits(x, slice(1, 3))
    assert seen[2].shape == (2, 1, 4, 4)


@given(st.sampled_from([2, 16, 256]), st.integers(1, 8), seeds)
def test_levels_come_back(levels, bits, seed):                          # round before floor; n - 1
    model = make("glow", (1, 4, 4), levels, bits=bits)
    level = torch.randint(levels, (2, 1, 4, 4), generator=rng(seed))
    x = (level * (2 / (levels - 1)) - 1).float()                        # as data.Images gives it
    u = (0.01 + 0.98 * torch.rand(x.shape, generator=rng(seed))).float()
    y = model.dequantize(x, u)
    assert y.min() >= -0.5 and y.max() < 0.5 + 1e-6
    kept = (level * model.n).div(levels, rounding_mode="floor")
    assert torch.equal(((model.quantize(y.double()) + 1) / 2 * (model.n - 1)).round().long(), kept)
    close(model.quantize(model.dequantize(x)), (kept * (2 / (model.n - 1)) - 1).float())


def test_pixels_outside_are_refused():                                  # the check
    model = make("glow", (1, 4, 4), 256)
    for bad in (1.5, -2.0, math.nan):
        with pytest.raises(ValueError, match=r"\[-1, 1\]"):
            model.loss(torch.full((2, 1, 4, 4), bad))


@pytest.mark.parametrize("name, shape, options, says", [
    ("glow", (1, 6, 6), {"scales": 2}, "halved"), ("realnvp", (1,), {}, "two coordinates"),
    ("matching", (1, 4, 4), {}, "points")])
def test_what_cannot_be_built_says_why(name, shape, options, says):     # the check
    with pytest.raises(ValueError, match=says):
        flows.MODELS[name](shape, 256 if len(shape) == 3 else None, **options)


@pytest.mark.parametrize("name, shape", [("glow", (1, 4, 4)), ("matching", (2,)), ("spline", (2,))])
def test_two_shares_of_a_batch_make_its_loss(name, shape):              # noise drawn for x[share] alone
    model = make(name, shape, 256 if len(shape) == 3 else None)
    x, losses = 2 * torch.rand(6, *shape, generator=rng(0)) - 1, []
    for share in (slice(None), slice(0, 3), slice(3, 6)):
        torch.manual_seed(5)
        losses.append(model.loss(x, share)["loss"].detach())
    close((losses[1] + losses[2]) / 2, losses[0])


# ---- flow matching


def gaussian_velocity(mean, s):
    """E[x - z | x_t] for x ~ N(mean, s^2 I): the field that matching would learn."""
    def v(x, t):
        C = (1 - t) ** 2 + (t * s) ** 2
        r = x - t * mean
        return mean + (t * s**2 - (1 - t)) / C * r
    return v


class Exact(flows.Matching):
    def velocity(self, x, t):
        return self.field(x, t)


def exact(mean, s, dim=2, steps=50, solver="heun"):
    model = Exact((dim,), ode_steps=steps, solver=solver, width=8, waves=1)
    model.field = gaussian_velocity(mean, s)
    return model


@given(st.floats(-1, 1), st.floats(0.3, 2), seeds)
@settings(max_examples=10)
def test_matching_a_gaussian_is_its_closed_form(mean, s, seed):         # start and stop; the trace's sign
    model, x = exact(mean, s), torch.randn(20, 2, generator=rng(seed))
    z, log_det = model(x)
    close(z, (x - mean) / s, rtol=0, atol=2e-4)
    close(log_det, torch.full((20,), -2 * math.log(s)), rtol=0, atol=2e-4)
    truth = torch.distributions.Normal(mean, s).log_prob(x).sum(1)
    close(model.log_prob(x), truth, rtol=0, atol=2e-3)
    back, minus = model.inverse(z)
    close(back, x, rtol=0, atol=1e-3)
    close(minus, -log_det, rtol=0, atol=4e-4)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_the_order_of_a_solver(solver, order):                          # h / 2 for h; t + h
    f, x = lambda x, t: math.cos(3 * t) * x, torch.ones(1, 1)
    truth, errors = math.exp(math.sin(2.1) / 3), []
    for steps in (50, 100, 200):
        *_, y = flows.ode(f, x, 0.0, 0.7, steps, flows.SOLVERS[solver])
        errors.append(abs(y.item() - truth))
    for a, b in zip(errors, errors[1:]):
        assert math.log2(a / b) == pytest.approx(order, abs=0.25)


def test_the_regression_target_is_the_velocity_of_the_path():           # (1 - t) for t
    z, x, t = (torch.randn(5, 3, generator=rng(k)) for k in (0, 1, 2))
    t = t[:, 0].sigmoid()
    x_t, v = flows.straight(z, x, t)
    ahead, _ = flows.straight(z, x, t + 1e-6)
    close((ahead - x_t) / 1e-6, v, rtol=1e-4, atol=1e-6)
    close(flows.straight(z, x, torch.zeros(5))[0], z)
    close(flows.straight(z, x, torch.ones(5))[0], x)


@given(seeds)
@settings(max_examples=10)
def test_divergences(seed):                                             # row i of another column; e twice
    A = torch.randn(4, 4, generator=rng(seed))
    f = lambda x: torch.tanh(x @ A.T)
    x = torch.randn(3, 4, generator=rng(seed + 1))
    v, trace = flows.divergence(f, x)
    close(v, f(x))
    close(trace, ((1 - v**2) * A.diagonal()).sum(1))
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)      # every e: the mean is exact
    each = torch.stack([flows.divergence(f, x, e.expand(3, 4))[1] for e in signs])
    close(each.mean(0), trace)
    assert each.std(0).min() > 0.1                                      # and each an estimate
    close(flows.divergence(f, x, signs[:3])[0], v)


def carried(model):
    """x at t = 1 to z at t = 0, with gradients."""
    return lambda x: list(flows.ode(model.velocity, x, 1.0, 0.0, model.density_steps, flows.rk4))[-1]


def test_matching_log_det_is_that_of_the_discrete_map():                # steps of one direction
    model = make("matching", ode_steps=100, solver="rk4")
    x = torch.randn(4, 2, generator=rng(0))
    close(model(x)[1].detach(), log_det_by_autograd(carried(model), x), rtol=0, atol=1e-4)
    close(model.decode(model.encode(x)), x, rtol=0, atol=1e-4)


def test_above_three_dimensions_the_log_det_is_an_estimate_without_bias():          # e of another shape
    model = make("matching", (5,), ode_steps=60)
    x = torch.randn(1, 5, generator=rng(0))
    torch.manual_seed(0)
    many = model(x.expand(4000, 5))[1].detach()
    truth = log_det_by_autograd(carried(model), x)
    assert abs(many.mean() - truth) < 4 * many.std() / 4000**0.5 + 2e-3


def test_straight_ways_have_no_curvature_and_pairs_are_kept():          # z and x exchanged
    model = exact(0.7, 1.0, steps=20)
    model.field = lambda x, t: torch.full_like(x, 0.7)
    pairs = model.pairs(50)
    close(pairs[:, 1], pairs[:, 0] + 0.7)
    assert float(model.curvature(pairs)) == pytest.approx(0, abs=1e-20)
    assert float(model.loss(pairs)["loss"]) == pytest.approx(0, abs=1e-20)
    torch.manual_seed(0)
    model = exact(0.0, 0.2, steps=200)                                  # x_t = sqrt((1 - t)^2 + (t s)^2) z
    t = (torch.arange(10_000) + 0.5) / 10_000
    speed = (0.04 * t - (1 - t)) / ((1 - t) ** 2 + 0.04 * t**2).sqrt()
    wanted = 2 * ((0.2 - 1 - speed) ** 2).mean()                        # E |z|^2 = 2
    assert float(model.curvature(model.pairs(20_000))) == pytest.approx(float(wanted), rel=0.02)


# ---- edits


def test_parts_of_z_are_set_to_zero_and_nothing_else():                 # the start of a scale
    z = torch.randn(3, 10, generator=rng(0))
    parts = edits.zeroed(z, [2, 3, 5])
    assert torch.equal(parts["scale 2 of 3 = 0"][:, 2:5], torch.zeros(3, 3))
    assert all(torch.equal(parts["scale 2 of 3 = 0"][:, k], z[:, k]) for k in (0, 1, 5, 9))
    assert torch.equal(sum(z - parts[f"scale {k} of 3 = 0"] for k in (1, 2, 3)), z)
    assert (parts["largest tenth = 0"] == 0).sum(1).tolist() == [1, 1, 1]
    assert torch.equal(edits.noised(z, (0.0, 1.0), rng(1))[0], z)


@given(seeds, st.floats(0.01, 0.99))
def test_ways_between_two_images(seed, a):                              # a and 1 - a exchanged
    z1, z2 = (torch.randn(4, 30, generator=rng(seed + k)) for k in (0, 1))
    for f in (edits.linear, edits.spherical):
        close(f(z1, z2, 0.0), z1)
        close(f(z1, z2, 1.0), z2)
    unit = lambda z: z / z.norm(dim=1, keepdim=True)
    close(edits.spherical(unit(z1), unit(z2), a).norm(dim=1), torch.ones(4))
    assert (edits.linear(unit(z1), unit(z2), a).norm(dim=1) < 1).all()


@pytest.mark.parametrize("task", ["all", "attributes", "none"])
def test_edits_are_reported(task, tmp_path, monkeypatch):               # a classifier trained without gradients
    fit = judges.train_classifier
    monkeypatch.setattr(judges, "train_classifier", lambda *a, **k: fit(*a, **k | {"steps": 2, "progress": False}))
    x = torch.randint(256, (24, 1, 8, 8), generator=rng(0)).to(torch.uint8)
    labels = torch.arange(24) % 2
    truth = data.Images("faces", x, labels, x, labels, 256, ("no", "yes"))
    truth.train_attributes = truth.test_attributes = torch.stack([labels == 1, torch.arange(24) % 3 == 1], 1)
    truth.attribute_names = ("smiling", "hat")
    torch.set_default_dtype(torch.float32)
    model = make("glow", (1, 8, 8), 256, scale=0.02, depth=1)
    out = edits.report(model, truth, tmp_path, task)
    if task == "none":
        assert out == {} and not any(tmp_path.iterdir())
        return
    assert out["reconstruction"]["value"] == 1 and {"judge_accuracy", "attribute_added"} <= out.keys()
    names = {"all": {"noise", "zero", "interpolation", "attributes"}, "attributes": {"attributes"}}[task]
    assert {p.stem for p in tmp_path.glob("*.png")} == names
    changes = [v["value"] for k, v in out.items() if k.startswith("noise_")]
    assert changes == sorted(changes)


# ---- runs


@pytest.mark.parametrize("args", [("--dataset", "gmm", "--bins", 5), ("--model", "glow"), ("--model", "matching"),
                                  ("--model", "glow", "--dataset", "persian", "--depth", 1, "--task", "none")])
def test_a_resumed_run_is_the_unbroken_one(resumed, monkeypatch, args):              # average not kept; initialised again
    small = ("--width", 8, "--batch", 16, "--samples", 20, "--waves", 2, "--ode-steps", 4)
    monkeypatch.setattr(judges, "images", lambda samples, truth: {})
    monkeypatch.setattr(metrics, "exact_kl", lambda *a, **k: 0.0)       # its grid takes long
    whole, broken = resumed(flows, *args, *small)
    assert whole.keys() == broken.keys()
    for name in whole:
        assert torch.equal(whole[name], broken[name]), name


def test_a_short_run_reports_what_it_says(cli):                         # a metric left out
    status, error, out = cli(flows, "--steps", 40, "--batch", 64, "--width", 8, "--samples", 200)
    assert status == 0, error
    found = json.loads((out / "flows-spline-gmm" / "metrics.json").read_text())["metrics"]
    assert {"kl", "klh", "nll", "inverse_error"} <= found.keys() and found["inverse_error"]["value"] < 1e-4
    assert found["nll"]["value"] > found["nll"]["floor"] - 0.05


def test_reflow_starts_from_its_teacher_and_refuses_others(cli, tmp_path, monkeypatch):         # the check of the model
    monkeypatch.setattr(metrics, "exact_kl", lambda *a, **k: 0.0)       # its grid takes long
    small = ("--steps", 4, "--batch", 16, "--width", 8, "--samples", 50, "--ode-steps", 4)
    for name in ("matching", "spline"):
        assert cli(flows, "--model", name, *small)[0] == 0
    teacher = tmp_path / "flows-matching-gmm" / "model.pt"
    assert cli(flows, "--model", "matching", "--reflow", teacher, *small, out=tmp_path / "again")[0] == 0
    status, error, _ = cli(flows, "--model", "matching", "--reflow", tmp_path / "flows-spline-gmm" / "model.pt", *small)
    assert status == 2 and "spline" in error and "Traceback" not in error
    status, error, _ = cli(flows, "--reflow", teacher, *small)
    assert status == 2 and "matching" in error
    status, error, _ = cli(flows, "--model", "matching", "--dataset", "moons", "--reflow", teacher, *small)
    assert status == 2 and "matching of gmm; matching of moons is wanted" in error
    assert cli(flows, "--ckpt", teacher, "--solver", "euler", "--ode-steps", 1, "--samples", 50, out=tmp_path / "few")[0] == 0


@pytest.mark.parametrize("args, says", [
    (("--task", "attributes"), "the attributes of gmm are none"), (("--attribute", "hat"), "are none"), (("--mod", "points"), "unrecognized"),
    (("--model", "matching", "--dataset", "persian"), "points"), (("--dataset", "persian", "--scales", 3), "halved"),
    (("--ckpt", "nowhere.pt"), "no checkpoint"), (("--dataset", "nothing"), "unknown dataset")])
def test_bad_input_is_one_sentence(cli, args, says):                    # the check
    status, error, _ = cli(flows, *args, "--steps", 2)
    assert status == 2 and says in error and error.count("\n") <= 2 and "Traceback" not in error
