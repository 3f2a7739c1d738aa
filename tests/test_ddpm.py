"""Properties of ddpm.py. The comment behind a test names a line that was broken to see it fail."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import ddpm
import metrics

lengths = st.integers(21, 300)
names = st.sampled_from(["linear", "cosine"])
predictions = st.sampled_from(ddpm.PREDICTIONS)
variances = st.sampled_from(["small", "large", "learned"])


def close(a, b, **kw):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), **kw)


def tensors(*shape, seed=0, n=1):
    g = torch.Generator().manual_seed(seed)
    out = [torch.randn(*shape, generator=g) for _ in range(n)]
    return out if n > 1 else out[0]


class Exact(torch.nn.Module):
    """The optimal predictor of a 2-D set, from its exact denoiser."""

    def __init__(self, truth, alphas_cumprod, prediction):
        super().__init__()
        self.truth, self.alphas_cumprod, self.prediction = truth, alphas_cumprod, prediction

    def forward(self, x, t):
        abar = self.alphas_cumprod[t[:1]]
        a, b = abar.sqrt(), (1 - abar).sqrt()
        x_0 = self.truth.denoise(x, a, b)
        return ddpm.target(self.prediction, x_0, (x - a * x_0) / b, a, b)


class Gaussian:
    """N(0, s^2) in one dimension, as a truth for `Exact`."""

    def __init__(self, s):
        self.s = s

    def denoise(self, x, a, b):
        return a * self.s**2 / (a**2 * self.s**2 + b**2) * x


class Says(torch.nn.Module):
    """A network that is a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t):
        return self.function(x, t)


def exact_model(truth, alphas_cumprod, prediction="eps", variance="small", dim=2):
    model = ddpm.Diffusion((dim,), alphas_cumprod, prediction, variance)
    model.network = Exact(truth, alphas_cumprod, prediction)
    return model


def rough_model(prediction="eps", variance="small", seed=0, shape=(2,), T=25, **kw):
    """A model with every weight drawn at random, so that no zero at the start hides anything."""
    torch.manual_seed(seed)
    model = ddpm.Diffusion(shape, ddpm.make_schedule("linear", T), prediction, variance, width=16, **kw)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


# ---- schedules


@given(names, lengths, st.booleans())
def test_schedule_falls_from_one(name, T, zero_snr):                    # cumprod -> cumsum; new_ones left out
    abar = ddpm.make_schedule(name, T, zero_snr)
    assert abar.shape == (T + 1,) and abar.dtype == torch.float64 and abar[0] == 1
    assert (abar.diff() < 0).all() and (abar[-1] == 0 if zero_snr else abar[-1] > 0)


@pytest.mark.parametrize("T, expected", [(50, -11.77), (100, -10.80), (200, -10.40), (1000, -10.12), (4000, -10.07)])
def test_linear_ends_at_the_same_noise_for_any_length(T, expected):     # 1000 / T left out
    abar = ddpm.make_schedule("linear", T)
    close(abar[-1].log(), expected, atol=0.01, rtol=0)
    close(1 - abar[1], 1e-4 * 1000 / T, rtol=1e-9, atol=0)


def test_linear_is_the_paper_at_1000():
    betas = ddpm.linear_betas(1000)
    close(betas[[0, 999]], [1e-4, 0.02])
    close(betas.diff(), torch.full((999,), (0.02 - 1e-4) / 999))


@given(lengths)
def test_cosine_is_its_formula_before_the_clip(T):                      # + s left out; square left out
    abar = ddpm.make_schedule("cosine", T)
    t = torch.arange(T + 1)
    f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
    inside = torch.cat([torch.ones(1, dtype=torch.bool), 1 - f[1:] / f[:-1] <= 0.999])
    close(abar[inside], (f / f[0])[inside])
    assert (1 - abar[1:] / abar[:-1] <= 0.999 + 1e-12).all() and abar[-1] < 1e-5


@given(names, lengths)
def test_zero_terminal_snr_keeps_the_first_and_shifts_the_last(name, T):        # r[0] instead of r[0] - r[-1]
    before = ddpm.make_schedule(name, T)
    after = ddpm.zero_terminal_snr(before)
    close(after[1], before[1])
    r, q = before[1:].sqrt(), after[1:].sqrt()
    close((r - r[-1]) * q[0], q * (r[0] - r[-1]))                               # affine in sqrt(abar)


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match="more than 20 steps"):
        ddpm.linear_betas(20)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        ddpm.Diffusion((2,), ddpm.make_schedule("linear", 50, zero_snr=True), "eps")


# ---- times


@given(st.integers(1, 120), st.data(), st.sampled_from(["leading", "trailing", "quadratic"]))
@settings(max_examples=200)
def test_times_are_exactly_S_falling_and_distinct(T, draw, spacing):    # min(...) of the quadratic left out
    S = draw.draw(st.integers(1, T))
    times = ddpm.timesteps(T, S, spacing)
    assert len(times) == S and all(isinstance(t, int) for t in times)
    assert all(a > b for a, b in zip(times, times[1:])) and 1 <= times[-1] and times[0] <= T
    if S == T:
        assert times == list(range(T, 0, -1))
    if spacing == "trailing":
        assert times[0] == T and max(-np.diff([*times, 0])) - min(-np.diff([*times, 0])) <= 1
    if spacing == "leading":
        assert times[-1] == 1
    if spacing == "quadratic" and S > 1:
        assert times[0] == T


def test_quadratic_times_are_dense_near_the_data():                     # ** 2 left out
    times = ddpm.timesteps(1000, 10, "quadratic")
    close(torch.tensor(times), 1 + (999 * torch.arange(10, 0, -1) ** 2 / 100).long())


@pytest.mark.parametrize("S", [0, 11, -1])
def test_more_times_than_there_are_is_refused(S):
    with pytest.raises(ValueError, match="between 1 and 10"):
        ddpm.timesteps(10, S)
    with pytest.raises(ValueError, match="unknown spacing"):
        ddpm.timesteps(10, 5, "cubic")


# ---- forward and posterior


@given(names, lengths, st.data())
def test_two_noisings_compose_and_the_posterior_is_bayes(name, T, draw):        # abar_s for abar_t in either coefficient
    t = draw.draw(st.integers(2, T))
    s = draw.draw(st.integers(1, t - 1))
    abar = ddpm.make_schedule(name, T)
    abar_t, abar_s = abar[t : t + 1], abar[s : s + 1]
    alpha, beta = abar_t / abar_s, 1 - abar_t / abar_s
    close(alpha * (1 - abar_s) + beta, 1 - abar_t)                              # q(x_t | x_s) of q(x_s | x_0)
    x_0, x_t = tensors(1, 3, n=2, seed=t)
    precision = 1 / (1 - abar_s) + alpha / beta                                 # two Gaussians in x_s, multiplied
    mean, variance = ddpm.q_posterior(x_0, x_t, abar_t, abar_s)
    close(variance, 1 / precision)
    close(mean, (abar_s.sqrt() * x_0 / (1 - abar_s) + alpha.sqrt() * x_t / beta) / precision)
    close(ddpm.q_posterior(x_0, abar_t.sqrt() * x_0, abar_t, abar_s)[0], abar_s.sqrt() * x_0)   # no noise, no change
    assert 0 < variance <= beta


@given(st.floats(1e-4, 1 - 1e-4), predictions, st.integers(0, 99))
def test_every_prediction_gives_back_the_data(abar, prediction, seed):          # a sign in x0_weights or target
    abar = torch.tensor([abar])
    x_0, eps = tensors(1, 2, n=2, seed=seed)
    a, b = abar.sqrt(), (1 - abar).sqrt()
    x_t = ddpm.q_sample(x_0, eps, a, b)
    close(x_t, abar.sqrt() * x_0 + (1 - abar).sqrt() * eps)
    P, Q = ddpm.x0_weights(prediction, abar)
    close(P * x_t + Q * ddpm.target(prediction, x_0, eps, a, b), x_0)


@given(st.floats(1e-3, 1 - 1e-3), predictions, st.integers(0, 99))
def test_loss_weight_is_the_ratio_of_losses(abar, prediction, seed):            # 1 / abar -> abar; x0_emphasis left out
    abar = torch.tensor([abar])
    a, b = abar.sqrt(), (1 - abar).sqrt()
    x_t, x_0, other = tensors(1, 2, n=3, seed=seed)

    def said(x_0, prediction):
        return ddpm.target(prediction, x_0, (x_t - a * x_0) / b, a, b)

    error = lambda p: (said(x_0, p) - said(other, p)).square().sum()
    weight = min((a / b).item(), 10) if prediction == "x0" else 1
    close(weight * error(prediction), ddpm.loss_weight(prediction, abar)[0] * error("eps"))


def test_images_and_vectors_broadcast_row_by_row():                             # view(-1) in like
    abar = torch.tensor([0.9, 0.5, 0.1])
    for shape in ((3, 3), (3, 3, 4, 4)):
        x_0, eps = tensors(*shape, n=2)
        rows = [ddpm.q_sample(*(v[i : i + 1] for v in (x_0, eps, abar, 1 - abar))) for i in range(3)]
        close(ddpm.q_sample(x_0, eps, abar, 1 - abar), torch.cat(rows))


# ---- the reverse process


@given(names, st.integers(21, 60), st.data(), st.sampled_from(["small", "large"]), predictions)
def test_coefficients_are_the_posterior_mean_and_fold_to_one_line(name, T, draw, variance, prediction):
    S = draw.draw(st.integers(2, T))                                            # A P + B -> A P; s > 0 -> s >= 0
    abar = ddpm.make_schedule(name, T)
    table = ddpm.reverse_table(abar, ddpm.timesteps(T, S), variance)
    rows = ddpm.ancestral_coefficients(table, prediction)
    x_t, out = tensors(S, 2, n=2)
    P, Q, A, B, C = (v[:, None] for v in rows.unbind(1))
    x_0 = P * x_t + Q * out
    mean, beta_tilde = ddpm.q_posterior(x_0, x_t, table["abar_t"], table["abar_s"])
    close(A * x_0 + B * x_t, mean)
    close(ddpm.fold(rows)[:, :1] * x_t + ddpm.fold(rows)[:, 1:2] * out, mean)
    close(ddpm.fold(rows)[:, 2:], C)
    wanted = beta_tilde if variance == "small" else table["betas"]
    close(C[:-1, 0].square(), wanted[:-1])
    assert C[-1] == 0 and table["s"][-1] == 0 and table["abar_s"][-1] == 1


@given(names, st.integers(21, 60))
def test_eps_form_of_the_mean_is_the_papers(name, T):                           # sqrt(alpha) on the wrong side
    table = ddpm.reverse_table(ddpm.make_schedule(name, T), list(range(T, 0, -1)))
    linear = ddpm.fold(ddpm.ancestral_coefficients(table, "eps"))
    alphas = 1 - table["betas"]
    close(linear[:, 0], 1 / alphas.sqrt())                                      # [1] (11)
    close(linear[:, 1], -table["betas"] / ((1 - table["abar_t"]) * alphas).sqrt())


def test_log_variances_at_the_data_end_are_finite():                            # small[-2:-1] -> small[-1:]
    table = ddpm.reverse_table(ddpm.make_schedule("linear", 30), list(range(30, 0, -1)))
    close(table["posterior_variance"][-1], 0.0)
    close(table["log_small"][-1], table["posterior_variance"][-2].log())
    close(table["log_small"][:-1].exp(), table["posterior_variance"][:-1])
    one = ddpm.reverse_table(ddpm.make_schedule("linear", 30), [30])
    close(one["log_small"], one["betas"].log())


@given(st.floats(0.05, 3), st.integers(1, 40), st.sampled_from(["small", "large"]))
def test_variance_of_the_chain_on_gaussian_data(s, S, variance):                # C -> C^2; A and B exchanged
    """With the exact denoiser of N(0, s^2) a chain of linear steps has a closed form. 'large' is exact for s = 1 and
    'small' for s = 0, at any number of steps; else the optimum beta V_s / V_t lies between them."""
    abar = ddpm.make_schedule("cosine", 40)
    table = ddpm.reverse_table(abar, ddpm.timesteps(40, S), variance)
    rows = ddpm.ancestral_coefficients(table, "x0")
    gain = Gaussian(s).denoise(torch.ones(()), table["abar_t"].sqrt(), (1 - table["abar_t"]).sqrt())
    V = lambda abar: abar * s**2 + 1 - abar
    v = V(abar[table["t"][0]])
    for (_, _, A, B, C), g, a_t, a_s, beta in zip(rows, gain, table["abar_t"], table["abar_s"], table["betas"]):
        optimal = beta * V(a_s) / V(a_t)
        close((A * g + B) ** 2 * V(a_t) + optimal, V(a_s))                      # exact at every step
        v = (A * g + B) ** 2 * v + C**2
    under = table["posterior_variance"] <= table["betas"] * V(table["abar_s"]) / V(table["abar_t"]) + 1e-12
    assert under.all()
    if variance == "small":
        assert v <= s**2 + 1e-9
    elif S == 40 and abs(s - 1) < 1e-9:
        close(v, 1.0)


def test_large_variance_is_exact_for_unit_gaussian_data():                      # log_large for log_small
    table = ddpm.reverse_table(ddpm.make_schedule("cosine", 40), ddpm.timesteps(40, 7), "large")
    rows = ddpm.ancestral_coefficients(table, "x0")
    v = torch.ones(())
    for (_, _, A, B, C), a in zip(rows[:-1], table["abar_t"]):
        v = (A * a.sqrt() + B) ** 2 * v + C**2
        close(v, 1.0)


# ---- the bound


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-2, 2), st.floats(-2, 2))
def test_gaussian_kl_is_the_library(m1, m2, l1, l2):                            # 0.5 -> 1; -1 left out
    m1, m2, l1, l2 = map(torch.tensor, (m1, m2, l1, l2))
    p, q = (torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((m1, l1), (m2, l2)))
    close(ddpm.gaussian_kl(m1, l1, m2, l2), torch.distributions.kl_divergence(p, q))
    close(ddpm.gaussian_log_prob(m2, m1, l1), p.log_prob(m2))


@given(st.sampled_from([2, 3, 16, 256]), st.floats(-1.5, 1.5), st.floats(-8, 3))
def test_discretized_decoder_is_a_distribution_of_bins(levels, mean, logvar):   # an open end closed; half -> 2 half
    x = torch.linspace(-1, 1, levels)
    mean, logvar = torch.tensor(mean).expand(levels), torch.tensor(logvar).expand(levels)
    log_prob = ddpm.discretized_log_prob(x, mean, logvar, levels)
    close(log_prob.exp().sum(), 1.0, atol=1e-9, rtol=0)
    normal, half = torch.distributions.Normal(mean, (0.5 * logvar).exp()), 1 / (levels - 1)
    inner = slice(1, levels - 1)
    close(log_prob[inner].exp().clamp(min=2e-12), (normal.cdf(x + half) - normal.cdf(x - half))[inner].clamp(min=2e-12),
          atol=1e-9, rtol=0)


def test_discretized_decoder_keeps_its_digits_in_both_tails():                  # the mirror left out
    x = torch.linspace(-1, 1, 256)
    for mean in (-1.0, 1.0):
        forward = ddpm.discretized_log_prob(x, torch.full((256,), mean), torch.tensor(-4.0), 256)
        mirrored = ddpm.discretized_log_prob(-x, torch.full((256,), -mean), torch.tensor(-4.0), 256)
        close(forward, mirrored)
    low = ddpm.discretized_log_prob(x.float(), torch.full((256,), -0.5, dtype=torch.float32), torch.tensor(-5.0).float(), 256)
    high = ddpm.discretized_log_prob(x, torch.full((256,), -0.5), torch.tensor(-5.0), 256)
    kept = high > math.log(1e-9)
    close(low[kept], high[kept].float(), atol=0.02, rtol=0)


@pytest.mark.parametrize("prediction", ddpm.PREDICTIONS)
def test_bound_is_tight_where_the_reverse_process_is_exact(prediction):         # any factor, sign or index in the bound
    """Data N(0, 1), the exact predictor and variance beta: p(x_s | x_t) = q(x_s | x_t), so that the bound equals
    -log p(x_0) for every x_0. A term is quadratic in the noise: three Gauss-Hermite points give its mean exactly."""
    abar = ddpm.make_schedule("linear", 30)
    model = exact_model(Gaussian(1.0), abar, prediction, "large", dim=1)
    nodes, weights = map(torch.as_tensor, np.polynomial.hermite_e.hermegauss(3))
    for x_0 in (-1.7, 0.0, 0.4, 3.0):
        x = torch.full((3, 1), x_0)
        total = model.prior_kl(x)[0]
        for t in range(1, 31):
            total = total + (weights * model.bound(x, torch.full((3,), t), nodes[:, None])).sum() / weights.sum()
        close(total, 0.5 * math.log(2 * math.pi) + 0.5 * x_0**2, rtol=1e-9, atol=1e-9)


@given(predictions, st.integers(0, 20))
@settings(max_examples=8)
def test_bound_is_a_bound_for_a_wrong_model(prediction, seed):                  # KL turned round
    """For data N(0, 1) and any network, the mean of the bound is at least the entropy."""
    model = rough_model(prediction, "small", seed, shape=(1,))
    for w in model.network.parameters():
        w.data *= 0.1
    x = tensors(25 * 400, 1, seed=seed)
    t = 1 + torch.arange(len(x)) % 25
    terms = 25 * model.bound(x, t, tensors(len(x), 1, seed=seed + 1)) + model.prior_kl(x)
    error = terms.view(-1, 25).mean(1).std() / 20
    assert terms.mean() > 0.5 * math.log(2 * math.pi * math.e) - 5 * error


def test_prior_kl_is_the_terminal_mismatch():                                   # mean or variance at the wrong t
    abar = ddpm.make_schedule("linear", 25)
    x_0 = tensors(4, 2)
    a = abar[-1]
    wanted = 0.5 * (a * x_0.square().sum(1) - 2 * (1 - a).log() - 2 * a)
    close(rough_model().prior_kl(x_0), wanted)


@pytest.mark.parametrize("v, variance", [(1.0, "large"), (-1.0, "small")])
@pytest.mark.parametrize("levels", [None, 2, 256])
def test_learned_variance_runs_from_small_to_large(v, variance, levels):        # fraction -> 1 - fraction
    shape = (1,)
    learned, fixed = (ddpm.Diffusion(shape, ddpm.make_schedule("linear", 25), "eps", kind, levels)
                      for kind in ("learned", variance))
    fixed.network = Says(lambda x, t: x.sin())
    learned.network = Says(lambda x, t: torch.cat([x.sin(), torch.full_like(x, v)], 1))
    x, eps = tensors(25, 1, n=2)
    t = torch.arange(1, 26)
    close(learned.bound(x.clamp(-1, 1), t, eps), fixed.bound(x.clamp(-1, 1), t, eps))


def test_hybrid_loss_trains_the_mean_by_the_simple_loss_only():                 # detach left out; 1e-3 T left out
    model = rough_model("eps", "learned")
    x_0, eps = tensors(50, 2, n=2)
    t = 1 + torch.arange(50) % 25
    losses = model.loss(x_0, t, eps)
    grads = torch.autograd.grad(losses["bound"], model.network.w_out, retain_graph=True)[0]
    assert (grads[:, :2] == 0).all() and (grads[:, 2:] != 0).any()
    grads = torch.autograd.grad(losses["loss"], model.network.w_out)[0]
    assert (grads[:, 2:] == 0).all() and (grads[:, :2] != 0).any()
    close(losses["bound"], 1e-3 * 25 * model.bound(x_0, t, eps).mean() / 2 / math.log(2))


# ---- against the exact optimum


@pytest.mark.parametrize("prediction", ddpm.PREDICTIONS)
def test_loss_of_the_optimal_denoiser_is_the_bayes_loss(prediction):            # x_0 fed in place of x_t, any weight
    truth, abar = data.load("gmm"), ddpm.make_schedule("linear", 100)
    model = exact_model(truth, abar, prediction)
    torch.manual_seed(0)
    for t in (1, 2, 30, 70):
        x_0 = truth.sample(20_000).double()
        eps = torch.randn_like(x_0)
        loss = model.loss(x_0, torch.full((len(x_0),), t), eps)["loss"]
        a = abar[t]
        floor = truth.bayes_loss(a.sqrt(), (1 - a).sqrt()) * ddpm.loss_weight(prediction, a)
        close(loss, floor, rtol=0.05, atol=0)


@pytest.mark.parametrize("prediction, variance, S, most", [
    ("eps", "small", 200, 0.012), ("v", "large", 200, 0.012), ("x0", "small", 100, 0.02), ("v", "small", 50, 0.045)])
def test_ancestral_sampling_with_the_exact_score_reaches_the_floor(prediction, variance, S, most):
    """N = 3,000, whose floor is 0.005; [notes] floors of a strided chain added."""
    truth, abar = data.load("gmm"), ddpm.make_schedule("cosine", 200)
    torch.manual_seed(0)
    *_, x = exact_model(truth, abar, prediction, variance).sample(3000, ddpm.timesteps(200, S))
    assert metrics.klh(x, truth) < most
    assert metrics.mode_recall(x, truth) == 8


# ---- networks


@pytest.mark.parametrize("shape, out", [((1, 28, 28), 1), ((3, 32, 32), 6), ((1, 7, 9), 1), ((2, 30, 27), 2)])
def test_unet_keeps_any_size_and_treats_rows_alone(shape, out):                 # the crop left out
    torch.manual_seed(0)
    net = ddpm.UNet(shape[0], out, ddpm.make_schedule("cosine", 25), width=16)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t = tensors(3, *shape), torch.tensor([1, 12, 25])
    y = net(x, t)
    assert y.shape == (3, out, *shape[1:])
    close(net(x.flip(0), t.flip(0)).flip(0), y)
    close(net(x[1:2], t[1:2]), y[1:2])
    assert not torch.allclose(net(x, t.flip(0)), y)                             # it listens to t
    x[0, 0, 0, 0] += 1
    assert (net(x, t)[0] != y[0])[..., -1, -1].all()                            # and sees the whole image


def test_unet_hears_the_mean_that_its_norms_hide():                             # the mean left out
    net = ddpm.UNet(2, 2, ddpm.make_schedule("cosine", 25), width=16)
    heard = []
    net.time.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0]))
    x, t = tensors(3, 2, 8, 12), torch.tensor([1, 9, 25])
    net(x, t)
    close(heard[0], torch.cat([net.features[t], 10 * x.flatten(2).mean(2)], 1))


def test_mlp_listens_to_time_and_to_each_row_alone():
    model = rough_model()
    x, t = tensors(4, 2), torch.tensor([1, 5, 9, 25])
    y = model.network(x, t)
    close(model.network(x.flip(0), t.flip(0)).flip(0), y)
    assert not torch.allclose(model.network(x, t.flip(0)), y)
    (w_in, w_hidden, w_out, b_out), biases = model.network.chain(t)             # the same as weights and biases of a chain
    h = torch.nn.functional.silu(x @ w_in.T + biases[:, 0])
    for i, w in enumerate(w_hidden):
        h = h + torch.nn.functional.silu(h @ w.T + biases[:, i + 1])
    close(y, h @ w_out.T + b_out)


def test_time_features_depend_on_the_noise_level_only():                        # / 10 -> by T
    linear, cosine = (ddpm.make_schedule(n, 60) for n in ("linear", "cosine"))
    both = ddpm.time_features(torch.cat([linear, cosine]))
    close(both[:61], ddpm.time_features(linear))
    close(both[61:], ddpm.time_features(cosine))
    assert ddpm.time_features(ddpm.make_schedule("linear", 60, True)).isfinite().all()
    log_snr = torch.tensor([1e-3, 0.5, 0.9])
    line = torch.special.logit(log_snr)[:, None] / 10
    wanted = line * torch.logspace(math.log10(0.3), math.log10(8), 15)
    close(ddpm.time_features(log_snr), torch.cat([torch.ones(3, 1), line, wanted.sin(), wanted.cos()], 1))


def test_block_is_two_convolutions_moved_by_the_time():                         # 1 + scale -> scale
    block = ddpm.Block(8, 16, 4)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, e, silu = tensors(2, 8, 5, 5), tensors(2, 4), torch.nn.functional.silu
    scale, shift = block.time(e)[..., None, None].chunk(2, 1)
    h = block.norm2(block.conv1(silu(block.norm1(x))))
    close(block(x, e), block.skip(x) + block.conv2(silu(h + scale * h + shift)))


def test_plain_loops_are_the_kernels(monkeypatch):                              # h @ w_out left out; clamp(clip, clip)
    model = rough_model()
    x, t = tensors(6, 2), torch.tensor([1, 3, 5, 9, 20, 25])
    wanted = model.network(x, t)
    row = (1.1, -0.7, 0.6, 0.3, 0.0)
    wanted_step = ddpm.fused("diffusion_step", None)(x, wanted.detach(), row, 3, 1, clip=0.4)
    monkeypatch.setattr(ddpm, "fused", lambda name, plain: plain)
    close(model.network(x, t), wanted)
    close(ddpm.diffusion_step_plain(x, wanted, row, 3, 1, clip=0.4), wanted_step)


def test_plain_noise_is_new_at_each_step():                                     # seed + first -> seed
    weights, biases = rough_model().network.chain(torch.tensor([3, 2]))
    x, only_noise = torch.zeros(500, 2), torch.tensor([[0.0, 0.0, 1.0]])
    draws = [ddpm.sample_chain_plain(x, *weights, biases[:1], only_noise, 7, first=k) for k in (0, 1, 0)]
    close(draws[0], draws[2])
    assert (draws[0] != draws[1]).all() and abs(draws[0].std() - 1) < 0.1
    both = ddpm.sample_chain_plain(x, *weights, biases, torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 1.0]]), 7)
    assert abs(both.var() - 2) < 0.3                                            # two independent draws, not one twice


# ---- sampling and training


@given(predictions, st.sampled_from(["small", "large"]), st.integers(1, 25), st.integers(1, 5))
@settings(max_examples=10)
def test_one_call_and_the_step_by_step_loop_agree(prediction, variance, S, parts):      # fold or biases misaligned
    torch.set_default_dtype(torch.float32)
    model = rough_model(prediction, variance)
    parts = min(parts, S)
    table = model._table(ddpm.timesteps(25, S))
    rows = ddpm.ancestral_coefficients(table, prediction)
    rows[:, -1] = 0                                                             # the two draw noise in different orders
    x = torch.randn(9, 2)
    with torch.no_grad():
        whole = list(model.run_chain(x, table, rows, 0, parts))
        loop = copy.deepcopy(model)
        loop.network = Says(model.network)
        steps = list(loop.run_chain(x, table, rows, 0, parts))
    assert len(whole) == len(steps) == parts + 1
    for a, b in zip(whole, steps):
        close(a, b, atol=1e-4, rtol=1e-3)


def test_plain_and_fused_loops_agree(monkeypatch):                              # a bias or a residual left out
    torch.set_default_dtype(torch.float32)
    model = rough_model()
    table = model._table(ddpm.timesteps(25, 25))
    rows = ddpm.ancestral_coefficients(table, "eps")
    rows[:, -1] = 0
    x = torch.randn(9, 2)
    with torch.no_grad():
        *_, fast = model.run_chain(x, table, rows, 0)
        monkeypatch.setattr(ddpm, "fused", lambda name, plain: plain)
        *_, plain = model.run_chain(x, table, rows, 0)
    close(fast, plain, atol=1e-4, rtol=1e-3)


def test_plain_noise_has_the_right_size():                                      # C * z -> z; the same z at each step
    x = ddpm.diffusion_step_plain(torch.zeros(20_000), torch.zeros(20_000), (1, 0, 0.5, 0.5, 0.3), 1, 0)
    y = ddpm.diffusion_step_plain(torch.zeros(20_000), torch.zeros(20_000), (1, 0, 0.5, 0.5, 0.3), 1, 1)
    close(x.std(), 0.3, atol=0.01, rtol=0)
    assert abs((x * y).mean()) < 0.01
    clipped = ddpm.diffusion_step_plain(torch.ones(3), torch.ones(3), (2.0, 3.0, 0.5, 0.25, 0.0), 0, 0, clip=1.0)
    close(clipped, torch.full((3,), 0.75))
    w = torch.zeros(4, 1), torch.zeros(1, 4, 4), torch.zeros(1, 4), torch.zeros(1)
    chain = ddpm.sample_chain_plain(torch.ones(20_000, 1), *w, torch.zeros(2, 2, 4), torch.tensor([[0.5, 0, 0.3]] * 2), 7)
    close(chain.mean(), 0.25, atol=0.01, rtol=0)
    close(chain.var(), 0.3**2 * (1 + 0.25), atol=0.005, rtol=0)


def test_learned_variance_samples_and_images_stay_in_range():                   # clamp left out
    torch.set_default_dtype(torch.float32)
    for variance in ("small", "learned"):
        model = rough_model("v", variance, shape=(1, 8, 8), levels=2)
        states = list(model.sample(3, ddpm.timesteps(25, 6), parts=3))
        assert len(states) == 4 and states[-1].shape == (3, 1, 8, 8)
        assert states[-1].abs().max() <= 1                                      # the last mean is the clipped x_0
    torch.manual_seed(1)
    a = [x for x in model.sample(3, ddpm.timesteps(25, 6))][-1]
    torch.manual_seed(1)
    b = [x for x in model.sample(3, ddpm.timesteps(25, 6))][-1]
    close(a, b, atol=0, rtol=0)


def test_learned_chain_has_the_variance_that_the_network_asks_for():            # 0.5 * logvar -> logvar; noise into s = 0
    model = ddpm.Diffusion((1,), ddpm.make_schedule("cosine", 40), "x0", "learned")
    for v, kind in ((1.0, "large"), (-1.0, "small")):
        model.network = Says(lambda x, t, v=v: torch.cat([0.5 * x, torch.full_like(x, v)], 1))
        times = ddpm.timesteps(40, 4)
        torch.manual_seed(0)
        *_, x = model.sample(40_000, times)
        table = ddpm.reverse_table(model.alphas_cumprod, times, kind)
        rows = ddpm.ancestral_coefficients(table, "x0")
        variance = torch.ones(())
        for _, _, A, B, C in rows:
            variance = (0.5 * A + B) ** 2 * variance + C**2
        close(x.var(), variance, rtol=0.04, atol=0)


def test_training_step_is_the_papers_and_ema_follows():                         # start + 1; min -> max; share ignored
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = rough_model(T=50)
    average = copy.deepcopy(model).requires_grad_(False)
    seen = []
    model.loss = lambda x, t, e: seen.append((x, t, e)) or ddpm.Diffusion.loss(model, x, t, e)
    optimizer = torch.optim.Adam(model.parameters(), 1.0)
    data_ = iter([torch.randn(100, 2) for _ in range(9)])
    steps, rates, expected = ddpm.train(model, average, optimizer, data_, 9, 1e-2, share=slice(0, 60)), [], None
    expected = [p.clone() for p in average.parameters()]
    for i, row in enumerate(steps):
        assert set(row) == {"loss"} and not row["loss"].requires_grad
        rates.append(optimizer.param_groups[0]["lr"])
        decay = min(0.999, (1 + i) / (10 + i))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, model.parameters())]
    for a, b in zip(average.parameters(), expected):
        close(a, b)
    close(torch.tensor(rates), torch.tensor([1e-2 * (i + 1) / 100 * 0.5 * (1 + math.cos(math.pi * i / 9)) for i in range(9)]))
    for x, t, e in seen:
        assert x.shape == e.shape == (60, 2) and t.shape == (60,)                   # rows 0..59 of 100


def test_every_time_is_trained_equally_often():                                 # clamp(max=T - 2); 1 + left out
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = rough_model(T=30)
    times = []
    model.loss = lambda x, t, e: times.append(t) or {"loss": sum(p.sum() for p in model.parameters()) * 0}
    batches = iter([torch.zeros(64, 2)] * 300)
    for _ in ddpm.train(model, copy.deepcopy(model), torch.optim.SGD(model.parameters(), 0.0), batches, 300, 0.0):
        pass
    counts = torch.cat(times).bincount(minlength=31)
    assert counts[0] == 0 and len(counts) == 31
    assert ((counts[1:] - 640).abs() < 5 * 640**0.5).all()


def test_training_approaches_the_bayes_loss_from_above():                       # eps, t or x_0 leaking into the network
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    truth = data.load("gmm")
    model = ddpm.Diffusion((2,), ddpm.make_schedule("linear", 100), width=64, depth=2)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3, betas=(0.9, 0.99), fused=True)
    for _ in ddpm.train(model, average, optimizer, truth.batches(256), 600, 4e-3, decay=0.99):
        pass
    loss, bound = ddpm.evaluate(average, truth.sample(100 * 200))
    abar = model.alphas_cumprod[1:].double()
    floor = truth.bayes_loss(abar.sqrt(), (1 - abar).sqrt()).mean()
    assert floor - 0.01 < loss < 1.4 * floor
    assert -0.05 < bound - truth.entropy < 10
    *_, x = average.sample(2000, ddpm.timesteps(100, 100))
    assert metrics.klh(x, truth) < 0.75 * metrics.klh(torch.randn(2000, 2), truth)
