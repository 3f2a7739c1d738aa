"""Properties of ddim.py. The comment behind a test names a line that was broken to see it fail."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import ddim
import ddpm
import metrics

names = st.sampled_from(["linear", "cosine"])
predictions = st.sampled_from(ddim.PREDICTIONS)
etas = st.sampled_from([0.0, 0.2, 0.5, 1.0])


def close(a, b, **kw):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), **kw)


class Exact(torch.nn.Module):
    """The optimal predictor for a set with an exact denoiser."""

    def __init__(self, denoise, alphas_cumprod, prediction):
        super().__init__()
        self.denoise, self.alphas_cumprod, self.prediction = denoise, alphas_cumprod, prediction

    def forward(self, x, t):
        abar = self.alphas_cumprod[t[:1]]
        a, b = abar.sqrt(), (1 - abar).sqrt()
        x_0 = self.denoise(x, a, b)
        return ddim.target(self.prediction, x_0, (x - a * x_0) / b, a, b)


def gaussian(s, m=0.0):
    return lambda x, a, b: m + a * s**2 / (a**2 * s**2 + b**2) * (x - a * m)


def exact(denoise, abar, prediction="eps", dim=2, clip=None):
    return ddim.DDIM((dim,), abar, Exact(denoise, abar, prediction), prediction, clip)


def rough(prediction="eps", seed=0):
    torch.manual_seed(seed)
    schedule = ddim.linear_schedule(25)
    model = ddim.DDIM((2,), schedule, ddim.MLP(2, 2, schedule, 16), prediction)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


# ---- the table of coefficients


@given(names, st.integers(2, 40), st.data(), etas)
def test_any_eta_keeps_the_marginals(name, T, draw, eta):               # sigma^2 left out of the direction
    """The kernel applied to q(x_t | x_0) gives q(x_s | x_0), for every eta: [1] Lemma 1."""
    abar = ddpm.make_schedule(name, T + 20)
    times = ddim.timesteps(T + 20, draw.draw(st.integers(1, T)))
    rows = ddim.ddim_coefficients(abar, times, "x0", eta)
    abar_t, abar_s = ddim.pairs(abar, times)
    P, Q, A, B, C = rows.unbind(1)                                      # with the true x_0 as `out`
    assert (P == 0).all() and (Q == 1).all()
    close(A + B * abar_t.sqrt(), abar_s.sqrt())                         # mean, in units of x_0
    close(B.square() * (1 - abar_t) + C.square(), 1 - abar_s)           # variance
    assert (C.square() <= 1 - abar_s + 1e-12).all()


@given(names, st.integers(21, 60), st.data(), predictions)
def test_eta_one_is_ancestral_sampling_step_for_step(name, T, draw, prediction):        # 1 - abar_t / abar_s -> abar_t
    abar = ddpm.make_schedule(name, T)
    times = ddim.timesteps(T, draw.draw(st.integers(1, T)))
    ancestral = ddpm.ancestral_coefficients(ddpm.reverse_table(abar, times, "small"), prediction)
    close(ddim.ddim_coefficients(abar, times, prediction, 1.0), ancestral)


@given(names, st.integers(21, 60), st.data())
def test_sigma_hat_is_the_large_variance(name, T, draw):                        # noise into the data
    abar = ddpm.make_schedule(name, T)
    times = ddim.timesteps(T, draw.draw(st.integers(1, T)))
    large = ddpm.ancestral_coefficients(ddpm.reverse_table(abar, times, "large"), "eps")
    close(ddim.ddim_coefficients(abar, times, "eps", sigma_hat=True), large)


@given(st.floats(0, 1), st.integers(1, 30))
def test_noise_grows_with_eta_and_ends_at_none(eta, S):
    abar = ddim.linear_schedule(30)
    C = ddim.ddim_coefficients(abar, ddim.timesteps(30, S), "eps", eta)[:, 4]
    full = ddim.ddim_coefficients(abar, ddim.timesteps(30, S), "eps", 1.0)[:, 4]
    close(C, eta * full)
    assert C[-1] == 0


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_impossible_eta_is_refused(eta):
    with pytest.raises(ValueError, match="between 0"):
        ddim.ddim_coefficients(ddim.linear_schedule(30), [30], "eps", eta)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        ddim.DDIM((2,), ddpm.make_schedule("linear", 50, zero_snr=True), torch.nn.Identity())
    with pytest.raises(ValueError, match="more than 20"):
        ddim.linear_schedule(20)


@given(st.floats(1e-4, 1 - 1e-4), predictions, st.integers(0, 99))
def test_predictions_give_back_data_and_noise(abar, prediction, seed):          # a sign in eps_weights
    g = torch.Generator().manual_seed(seed)
    x_0, eps = torch.randn(1, 2, generator=g), torch.randn(1, 2, generator=g)
    abar = torch.tensor([abar])
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
    out = ddim.target(prediction, x_0, eps, abar.sqrt(), (1 - abar).sqrt())
    for weights, wanted in ((ddim.x0_weights, x_0), (ddim.eps_weights, eps)):
        P, Q = weights(prediction, abar)
        close(P * x_t + Q * out, wanted)


def test_schedule_is_ddpms():
    for T in (21, 100, 1000):
        close(ddim.linear_schedule(T), ddpm.make_schedule("linear", T))


def test_clipping_takes_eps_again_from_the_clipped_data():                      # B x_t -> B eps of the network
    """x_0 clipped: x_s = sqrt(abar_s) clip(x_0) + sqrt(1 - abar_s) (x_t - sqrt(abar_t) clip(x_0)) / sqrt(1 - abar_t)."""
    abar = ddim.linear_schedule(30)
    row = ddim.ddim_coefficients(abar, [20, 10], "eps")[0]
    x_t, out = torch.tensor([3.0, -0.2]), torch.tensor([-1.0, 0.3])
    x_0 = ((x_t - (1 - abar[20]).sqrt() * out) / abar[20].sqrt()).clamp(-1, 1)
    wanted = abar[10].sqrt() * x_0 + (1 - abar[10]).sqrt() * (x_t - abar[20].sqrt() * x_0) / (1 - abar[20]).sqrt()
    close(ddim.diffusion_step_plain(x_t, out, row.tolist(), 0, 0, clip=1.0), wanted)


# ---- chains with an exact predictor


@given(st.floats(0.1, 2), st.integers(1, 40), predictions, st.floats(-1, 1))
@settings(max_examples=15)
def test_deterministic_chain_on_gaussian_data_is_its_closed_form(s, S, prediction, m):  # any coefficient, any index
    """Data N(m, s^2): x_s - sqrt(abar_s) m = k (x_t - sqrt(abar_t) m), k = [sqrt(abar_s abar_t) s^2
    + sqrt((1 - abar_s)(1 - abar_t))] / V_t, and by Cauchy-Schwarz the variance can only shrink."""
    abar = ddpm.make_schedule("cosine", 40)
    times = ddim.timesteps(40, S)
    z = torch.linspace(-2, 2, 5)[:, None]
    x = z
    V = lambda a: a * s**2 + 1 - a
    for a_t, a_s in zip(*ddim.pairs(abar, times)):
        k = ((a_s * a_t).sqrt() * s**2 + ((1 - a_s) * (1 - a_t)).sqrt()) / V(a_t)
        assert k**2 * V(a_t) <= V(a_s) + 1e-9
        x = a_s.sqrt() * m + k * (x - a_t.sqrt() * m)
    *_, y = exact(gaussian(s, m), abar, prediction, 1).decode(z, times)
    close(y, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("N, variance", [(5, 0.605), (10, 0.781), (50, 0.952)])
def test_unit_gaussian_at_uniform_angles_shrinks_as_known(N, variance):         # Var = cos^2N(pi / 2N)
    abar = torch.cos(torch.arange(N + 1) / N * math.pi / 2).square()
    rows = ddim.fold(ddim.ddim_coefficients(abar.clamp(min=1e-12), list(range(N, 0, -1)), "x0"))
    k = torch.ones(())
    for (A, B, _), a in zip(rows, abar.flip(0)):
        k = A * k + B * a.sqrt() * k                                            # out = E[x_0 | x_t] = sqrt(abar) x_t
    close(k.square(), variance, atol=1e-3, rtol=0)
    close(k.square(), math.cos(math.pi / 2 / N) ** (2 * N), atol=1e-5, rtol=0)


@pytest.mark.parametrize("S, eta, spacing, most", [
    (50, 0.0, "trailing", 0.035), (200, 0.0, "trailing", 0.014), (50, 0.0, "leading", 0.03), (50, 1.0, "trailing", 0.055)])
def test_exact_score_reaches_the_table_of_floors(S, eta, spacing, most):        # the last step left out: 0.055
    """N = 3,000, whose own floor is 0.005, added to the discretisation floors 0.022, 0.003, 0.015, 0.036."""
    truth, abar = data.load("gmm"), ddim.linear_schedule(1000)
    torch.manual_seed(0)
    *_, x = exact(truth.denoise, abar).sample(3000, ddim.timesteps(1000, S, spacing), eta)
    assert metrics.klh(x, truth) < most
    assert metrics.mode_recall(x, truth) == 8


@pytest.mark.parametrize("prediction", ddim.PREDICTIONS)
def test_decoding_undoes_encoding_to_first_order(prediction):                   # stretch or M wrong; times shifted
    truth, abar = data.load("gmm"), ddim.linear_schedule(1600)
    model = exact(truth.denoise, abar, prediction)
    x = truth.sample(200, torch.Generator().manual_seed(0)).double()
    errors = []
    for S in (100, 200, 400, 800):
        times = ddim.timesteps(1600, S)
        *_, z = model.encode(x, times)
        *_, back = model.decode(z, times)
        errors.append((back - x).square().mean().sqrt())
    assert errors[-1] < 0.02
    assert all(1.5 < a / b < 2.7 for a, b in zip(errors, errors[1:]))          # halves as S doubles: O(1 / S)


@pytest.mark.parametrize("prediction", ddim.PREDICTIONS)
def test_encoding_is_eulers_method_from_where_it_stands(prediction):            # asked at the end of the step
    """d(x / sqrt(abar)) = eps d sqrt(1 / abar - 1), [1] (14), eps at the start of each step; at t = 1 for the first."""
    abar = ddim.linear_schedule(30)
    model = exact(gaussian(0.5, 0.3), abar, prediction, 1)
    x = z = torch.tensor([[0.7], [-1.2]])
    for begin, end, asked in ((0, 10, 1), (10, 30, 10)):
        a = abar[asked]
        x_0 = gaussian(0.5, 0.3)(z, a.sqrt(), (1 - a).sqrt())
        eps = (z - a.sqrt() * x_0) / (1 - a).sqrt()
        time = lambda t: (1 / abar[t] - 1).sqrt()
        z = abar[end].sqrt() * (z / abar[begin].sqrt() + (time(end) - time(begin)) * eps)
    *_, code = model.encode(x, [30, 10])
    close(code, z, atol=1e-5, rtol=1e-5)


def test_codes_of_gaussian_data_are_standard_normal_at_any_S():                 # the last step of encoding left out
    """For N(0, 1) the ODE is a rotation of nothing: x_T = x_0 up to the error of Euler's method."""
    abar = ddim.linear_schedule(1000)
    x = torch.linspace(-2, 2, 9)[:, None]
    *_, z = exact(gaussian(1.0), abar, dim=1).encode(x, ddim.timesteps(1000, 500))
    close(z, x, atol=0.02, rtol=0)


def test_deterministic_sampling_takes_no_randomness():                          # C z with C = 0 drawn all the same
    torch.set_default_dtype(torch.float32)
    model, z = rough(), torch.randn(5, 2)
    times = ddim.timesteps(25, 10)
    with torch.no_grad():
        *_, a = model.decode(z, times, 0.0, seed=1)
        before = torch.get_rng_state()
        *_, b = model.decode(z, times, 0.0, seed=2)
        assert torch.equal(before, torch.get_rng_state())
        *_, c = model.decode(z, times, 0.5, seed=1)
        *_, d = model.decode(z, times, 0.5, seed=2)
    assert torch.equal(a, b) and not torch.equal(c, d) and not torch.equal(a, c)


# ---- latents


@given(st.integers(2, 50), st.integers(0, 99))
def test_slerp_walks_the_great_circle(d, seed):                                 # sin(theta) left out
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(2, 3, d, generator=g)
    share = torch.linspace(0, 1, 7)
    path = ddim.slerp(z[0], z[1], share)
    assert path.shape == (7, 3, d)
    close(path[0], z[0])
    close(path[-1], z[1])
    u = ddim.slerp(*(v / v.norm(dim=1, keepdim=True) for v in z), share)
    close(u.norm(dim=-1), torch.ones(7, 3))
    steps = (u[1:] - u[:-1]).norm(dim=-1)
    close(steps, steps[:1].expand_as(steps), atol=1e-6, rtol=0)                 # at an even pace
    close(ddim.slerp(z[0], z[0], share), z[0].expand(7, 3, d))                  # equal ends: no division by 0


# ---- the model


def test_chain_in_parts_is_the_whole_chain():                                   # first=a -> first=0
    torch.set_default_dtype(torch.float32)
    model, z = rough(), torch.randn(7, 2)
    times = ddim.timesteps(25, 20)
    with torch.no_grad():
        whole = list(model.decode(z, times, 1.0, seed=3))
        parts = list(model.decode(z, times, 1.0, seed=3, parts=6))
    assert len(whole) == 2 and len(parts) == 7 and torch.equal(whole[0], z)
    close(parts[-1], whole[-1], atol=1e-6, rtol=1e-5)


@given(predictions, st.integers(1, 25))
@settings(max_examples=8)
def test_one_call_and_the_step_by_step_loop_agree(prediction, S):
    torch.set_default_dtype(torch.float32)
    model = rough(prediction)
    loop = copy.deepcopy(model)
    loop.network = type("Plain", (torch.nn.Module,), {"forward": lambda self, x, t: model.network(x, t)})()
    z, times = torch.randn(6, 2), ddim.timesteps(25, S)
    with torch.no_grad():
        for run in ("decode", "encode"):
            whole, steps = (list(getattr(m, run)(z, times)) for m in (model, loop))
            close(whole[-1], steps[-1], atol=1e-3, rtol=1e-3)


def test_loss_is_the_simple_loss_and_training_lowers_it():                      # target of another prediction
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    truth = data.load("gmm")
    schedule = ddim.linear_schedule(100)
    for prediction in ddim.PREDICTIONS:
        ours = ddim.DDIM((2,), schedule, ddim.MLP(2, 2, schedule, 16), prediction)
        theirs = ddpm.Diffusion((2,), schedule, prediction, width=16)
        theirs.network.load_state_dict(ours.network.state_dict())
        torch.nn.init.normal_(ours.network.w_out)
        theirs.network.w_out.data.copy_(ours.network.w_out)
        x_0, eps, t = truth.sample(50), torch.randn(50, 2), torch.randint(1, 101, (50,))
        close(ours.loss(x_0, t, eps), theirs.loss(x_0, t, eps)["loss"])
    model = ddim.DDIM((2,), schedule, ddim.MLP(2, 2, schedule, 64, 2))
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3, betas=(0.9, 0.99), fused=True)
    losses = [row["loss"].item() for row in ddim.train(model, average, optimizer, truth.batches(256), 500, 4e-3)]
    assert sum(losses[-50:]) / 50 < 0.5 * losses[0]
    *_, x = average.sample(2000, ddim.timesteps(100, 50))
    assert metrics.klh(x, truth) < 0.75 * metrics.klh(torch.randn(2000, 2), truth)
