"""ebm.py: energies and their normaliser, chains with a known law, buffers, the gradient of the likelihood. Behind each
`def`: a line that must not break."""

import copy
import functools
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
import ebm
import judges
from kernels import langevin

seeds = st.integers(0, 999)
close = torch.testing.assert_close
positive = st.floats(0.1, 4)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def make(name="ebm", shape=(2,), classes=3, seed=0, **options):
    torch.manual_seed(seed)
    small = dict(width=12, waves=1, channels=4, buffer=60) | options
    return ebm.MODELS[name](shape, classes, **small)


def normal_energy(mean, s):
    return lambda x: ((x - mean) / s).square().flatten(1).sum(1) / 2


# ---- energies


@given(seeds, st.integers(1, 6))
def test_logits_are_energies_of_the_pair_and_of_the_point(seed, classes):           # a sign; a sum for the log of one
    f, shift = 3 * torch.randn(5, classes, generator=rng(seed)), torch.randn(5, 1, generator=rng(seed))
    each = torch.stack([ebm.energy_of(f, torch.full((5,), y)) for y in range(classes)], 1)
    close((-each).exp().sum(1), (-ebm.energy_of(f)).exp())
    close(ebm.energy_of(f)[:, None] - each, f.log_softmax(1))           # log p(y | x)
    close(ebm.energy_of(f + shift), ebm.energy_of(f) - shift[:, 0])


@given(seeds)
def test_the_slope_of_a_point_is_the_mean_slope_of_its_pairs(seed):     # the gradient of something else
    model = make("jem", seed=seed)
    x = torch.randn(4, 2, generator=rng(seed))
    p = model.network(x).softmax(1)
    each = [ebm.gradient(lambda x, y=y: model.energy(x, torch.full((4,), y)), x) for y in range(3)]
    close(ebm.gradient(model.energy, x), sum(p[:, y:y + 1] * g for y, g in enumerate(each)))


@given(st.floats(-1, 1), st.floats(0.2, 1), st.floats(-50, 50))
def test_the_normaliser_of_a_gaussian(mean, s, shift):                  # the area of a cell, once; midpoints; the sign of E
    found = ebm.log_z(lambda x: normal_energy(mean, s)(x) + shift)
    assert found == pytest.approx(math.log(2 * math.pi * s**2) - shift, abs=1e-6)
    assert ebm.log_z(lambda x: 0 * x[:, 0], 2.0, 10) == pytest.approx(math.log(16))
    inside = ebm.log_z(lambda x: torch.where((x < 0).all(1), x.sum(1), torch.inf), 1.0, 400)
    assert inside == pytest.approx(2 * math.log(math.e - 1), abs=1e-4)  # of exp(-x - y) over [-1, 0]^2


def test_points_are_held_by_their_base_and_images_are_not():            # base / 2
    model = make(base=0.6)
    x = torch.randn(5, 2)
    close(model.energy(x) - ebm.energy_of(model.network(x)), 0.3 * x.square().sum(1))
    model, x = make(shape=(1, 8, 8)), torch.rand(3, 1, 8, 8)
    close(model.energy(x), ebm.energy_of(model.network(x)))


# ---- steps


@given(positive, st.floats(0.05, 1.9), positive)
def test_langevin_has_the_variance_of_the_discrete_chain(s, share, T):  # 2 eta T; its root; eta / 2 for eta
    """x' = (1 - eta / s^2) x + sqrt(2 eta T) z is stationary at T s^2 / (1 - eta / (2 s^2)), for eta < 2 s^2."""
    eta = share * s**2
    noise = make(step=eta, temperature=T).noise
    one, zero = torch.ones(1), torch.zeros(1)
    shrink = ebm.sgld_step(one, one / s**2, eta, noise, zero).item()
    spread = ebm.sgld_step(zero, zero, eta, noise, one).item()
    assert spread**2 / (1 - shrink**2) == pytest.approx(T * s**2 / (1 - eta / (2 * s**2)))
    assert ebm.effective_temperature(eta, noise) == pytest.approx(T)
    assert make(step=eta, temperature=T, noise=0.3).temperature == pytest.approx(0.045 / eta)


def test_the_usual_recipes_are_cold():                                  # noise for its square
    assert ebm.effective_temperature(1.0, 0.01) == pytest.approx(5e-5)  # JEM
    assert ebm.effective_temperature(10.0, 0.005) == pytest.approx(1.25e-6)                   # the UvA tutorial


@given(seeds, st.floats(0.01, 1), st.floats(0.01, 2))
def test_a_proximal_step_stays_near_and_a_bound_holds(seed, step, clip):          # one side of a clamp
    x, g, z = (3 * torch.randn(50, generator=rng(seed + k)) for k in range(3))
    moved = ebm.sgld_step(x, g, step, 0.0, z, clip)
    assert (moved - x).abs().max() <= step * clip + 1e-12
    close(moved[g.abs() < clip], (x - step * g)[g.abs() < clip])
    close(ebm.sgld_step(x, g, step, 0.5, z, bound=1.0), (x - step * g + 0.5 * z).clamp(-1, 1))


def test_a_proximal_chain_has_the_law_of_the_clipped_slope():           # clip of the step for clip of the slope
    """U' = clip(x, -1, 1): exp(-U) is normal within 1 and exponential beyond; its variance is 2.24 by quadrature."""
    x = torch.linspace(-30, 30, 60_001)
    u = torch.where(x.abs() < 1, x.square() / 2, x.abs() - 0.5)
    p = (-u).exp() / (-u).exp().sum()
    g, y, step = rng(0), torch.zeros(40_000), 0.05
    for _ in range(400):
        y = ebm.sgld_step(y, y, step, math.sqrt(2 * step), torch.randn(40_000, generator=g), clip=1.0)
    assert y.var().item() == pytest.approx((p * x.square()).sum().item(), rel=0.05)


@given(positive, positive, st.integers(1, 30))
def test_annealed_noise_keeps_its_ratio(first, last, n):                # ends swapped
    values = ebm.annealed(first, last, n)
    assert len(values) == n and values[-1].item() == pytest.approx(last)
    if n > 1:
        assert values[0].item() == pytest.approx(first)
        close(values[1:] / values[:-1], torch.full((n - 1,), (last / first) ** (1 / (n - 1))))


even = (torch.arange(4000) + 0.5) / 4000                                # a uniform number for each of as many chains


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-2, 2))
def test_metropolis_accepts_as_often_as_it_ought_to(e, e_new, log_ratio):         # the sign of the energies, of the ratio
    ones = torch.ones(4000)
    x, energy, taken = ebm.metropolis(0 * ones[:, None], e * ones, ones[:, None], e_new * ones, even, log_ratio)
    assert taken.double().mean().item() == pytest.approx(min(1, math.exp(e - e_new + log_ratio)), abs=1e-3)
    assert torch.equal(x[:, 0] == 1, taken) and torch.equal(energy, torch.where(taken, e_new * ones, e * ones))


@given(seeds, st.floats(0.01, 0.8))
def test_mala_is_in_detailed_balance(seed, step):                       # the way back; 4 step; the root of 2 step
    energy = lambda x: normal_energy(0.3, 0.8)(x) + 0.2 * x.pow(4).sum(1)
    x, z = torch.randn(2, 1, 3, generator=rng(seed)).expand(2, 4000, 3)
    y = x - step * ebm.gradient(energy, x) + math.sqrt(2 * step) * z
    log_q = lambda a, b: -(b - a + step * ebm.gradient(energy, a)).square().sum(1) / (4 * step)        # of a -> b
    ratio = (energy(x) - energy(y) + log_q(y, x) - log_q(x, y)).exp()[0]
    new, moved = ebm.mala_step(energy, x, step, z, even)
    assert moved.double().mean().item() == pytest.approx(min(1, ratio.item()), abs=1e-3)
    close(new, torch.where(moved[:, None], y, x))


def test_mala_is_exact_where_langevin_is_not():                         # nobody refused
    g, s, x = rng(1), 0.5, torch.zeros(20_000, 1)
    for _ in range(60):
        x, moved = ebm.mala_step(normal_energy(0, s), x, 0.2, torch.randn(20_000, 1, generator=g), torch.rand(20_000, generator=g))
    assert x.var().item() == pytest.approx(s**2, rel=0.04)              # Langevin at this step: 1.67 s^2
    assert 0.5 < moved.double().mean() < 0.99
    _, moved = ebm.mala_step(normal_energy(0, s), x, 1e-5, torch.randn(20_000, 1, generator=g), torch.rand(20_000, generator=g))
    assert moved.double().mean() > 0.999


@given(seeds, st.integers(1, 6))
def test_leapfrog_is_reversible_and_keeps_volume(seed, leaps):          # a half step at the end; x before p
    energy = lambda x: normal_energy(0.3, 0.8)(x) + 0.2 * x.pow(4).sum(1)
    x, p = torch.randn(2, 1, 2, generator=rng(seed))
    y, q = ebm.leapfrog(energy, x, p, 0.1, leaps)
    back, negated = ebm.leapfrog(energy, y, -q, 0.1, leaps)
    close(back, x)
    close(negated, -p)
    flow = lambda v: torch.cat(ebm.leapfrog(energy, v[:2][None], v[2:][None], 0.1, leaps), 1)[0]
    v, eps = torch.cat([x, p], 1)[0], 1e-5
    jacobian = torch.stack([(flow(v + eps * e) - flow(v - eps * e)) / (2 * eps) for e in torch.eye(4)])
    assert jacobian.det().item() == pytest.approx(1, abs=1e-6)


def test_leapfrog_errs_by_the_square_of_its_step():                     # Euler's first order
    energy, (x, p) = normal_energy(0, 1), torch.randn(2, 50, 2, generator=rng(0))
    total = lambda x, p: energy(x) + p.square().sum(1) / 2
    error = [(total(*ebm.leapfrog(energy, x, p, 0.8 / n, n)) - total(x, p)).abs().mean() for n in (8, 16, 32)]
    assert all(3.7 < a / b < 4.3 for a, b in zip(error, error[1:]))
    exact = x * math.cos(0.8) + p * math.sin(0.8)                       # a circle
    close(ebm.leapfrog(energy, x, p, 0.001, 800)[0], exact, atol=1e-5, rtol=0)


@given(seeds)
def test_hmc_accepts_by_the_total_energy(seed):                         # the kinetic part, its sign, its half
    energy = normal_energy(0.3, 0.4)
    x, p = torch.randn(2, 1, 2, generator=rng(seed)).expand(2, 4000, 2)
    y, q = ebm.leapfrog(energy, x, p, 0.6, 3)
    ratio = (energy(x) - energy(y) + (p.square() - q.square()).sum(1) / 2).exp()[0].item()
    new, moved = ebm.hmc_step(energy, x, 0.6, 3, p, even)
    assert moved.double().mean().item() == pytest.approx(min(1, ratio), abs=1e-3)
    close(new, torch.where(moved[:, None], y, x))


@given(st.floats(0.3, 2), st.floats(-5, 5))
def test_ais_of_its_own_prior_is_exact(scale, shift):                   # the constant of the prior; 2 pi; the dimension
    torch.manual_seed(0)
    betas = torch.linspace(0, 1, 4)
    log_w = ebm.ais(lambda x: normal_energy(0, scale)(x) + shift, 20, (3,), betas, scale)
    close(log_w, torch.full((20,), 1.5 * math.log(2 * math.pi * scale**2) - shift))


def test_ais_finds_the_normaliser():                                    # the sign of the weight; b for 1 - b; no steps
    torch.manual_seed(0)
    energy = lambda x: -torch.stack([-normal_energy(m, 0.4)(x) for m in (-1.0, 1.5)]).logsumexp(0)
    betas = torch.cat([torch.zeros(1), ebm.annealed(1e-3, 1, 60)])
    log_w = ebm.ais(energy, 2000, (2,), betas, 2.0, 0.15)
    assert (log_w.logsumexp(0) - math.log(2000)).item() == pytest.approx(ebm.log_z(energy), abs=0.1)
    assert log_w.std() < 1                                              # at rest in between: no steps would give 3


@settings(max_examples=5)
@given(seeds)
def test_gaussians_have_the_moments_of_their_classes(seed):             # n for n - 1; classes mixed up; no mean
    g = rng(seed)
    y = torch.arange(300) % 3
    mix = torch.randn(3, 4, 4, generator=g)
    x = torch.einsum("ni,nij->nj", torch.randn(300, 4, generator=g), mix[y]) + y[:, None]
    means, factors = ebm.fit_gaussians(x.view(300, 1, 2, 2), y, 3)
    for k in range(3):
        close(means[k], x[y == k].mean(0))
        close(factors[k].T @ factors[k], torch.cov(x[y == k].T))
    same = torch.full((40_000,), 1)
    drawn = ebm.draw_gaussians(means, factors, same, torch.randn(40_000, 4, generator=g), torch.randn(40_000, 4, generator=g))
    cov = torch.cov(x[y == 1].T) + 1e-4 * torch.eye(4)
    assert (drawn.mean(0) - means[1]).abs().max() < 5 * (cov.diag().max() / 40_000).sqrt()
    assert (torch.cov(drawn.T) - cov).abs().max() < 0.05 * cov.diag().max() + 1e-6
    low = ebm.fit_gaussians(x, y, 3, rank=2)[1]
    assert low.shape == (3, 2, 4) and torch.linalg.eigvalsh(cov - low[1].T @ low[1]).min() > 0
    close(ebm.fit_gaussians(x, y, 3, rows=50)[0][0], x[y == 0][:50].mean(0))
    few = ebm.fit_gaussians(x[:6], y[:6], 3)[1]                         # two of each
    assert few.shape == (3, 4, 4) and torch.linalg.matrix_rank(few[0]) == 1
    with pytest.raises(ValueError, match="class 2 has 1 examples"):
        ebm.fit_gaussians(x[:5], y[:5], 3)


@pytest.mark.parametrize("arguments, word", [
    ((0.1, 1.0), ""), ((0.1, 1.0, 0.02, 3.0), ""), ((5.9, 1.0), ""), ((6.1, 1.0), "diverged"), ((-6.1, 1.0), "diverged"),
    ((-85.0, 1.0, 35.0, 3.0), "diverged"), ((0.1, 1.0, 3.1, 3.0), "diverged"), ((math.nan, 1.0), "diverged"), ((0.1, 1.0, math.nan, 3.0), "diverged"),
    ((0.01, 1.0, 0.32, 3.0), "stuck"), ((0.6, 1.0, 0.32, 3.0), ""), ((0.4, 1.0, 0.11, 3.0), "stuck"), ((0.0, 1.0, 0.1, 3.0), ""),
    ((0.0, 1.0, math.inf), "diverged"), ((0.7, 2.0, 0.32, 3.0), "stuck"), ((0.3, 0.5, 0.32, 3.0), "")])
def test_trouble_is_told_apart(arguments, word):                        # kl of a good run; a gap that lies; an infinite kl
    assert ebm.trouble(*arguments).partition(":")[0] == word


# ---- networks and the plain loops


@given(seeds, st.sampled_from(["none", "all"]), st.sampled_from([None, 0.3]))
def test_the_plain_chain_is_the_one_of_the_kernels(seed, labels, clip):  # base / 2; a sine; the class; the bound
    model = make("jem", seed=seed, waves=2, depth=1)
    g = rng(seed)
    x, y = torch.randn(20, 2, generator=g), torch.randint(3, (20,), generator=g) if labels == "all" else None
    table = torch.tensor([[0.1, 0.0], [0.05, 0.0]])
    plain = ebm.langevin_chain_plain(x, model.network.weights(), table, 1, y, base=0.4, clip=clip, bound=1.5)
    close(plain, langevin.langevin_chain_reference(x, model.network.weights(), table, 1, y, base=0.4, clip=clip, bound=1.5))
    close(model.network(x).logsumexp(1), -langevin.energy_reference(x, model.network.weights()))


def test_the_plain_loops_draw_anew_at_each_step():                      # one seed for all; noise of another size
    network = [torch.zeros(shape) for shape in ((2, 0), (0,), (4, 2), (4,), (0, 4, 4), (0, 4), (1, 4), (1,))]
    chain = lambda table, **more: ebm.langevin_chain_plain(torch.zeros(5000, 2), network, torch.tensor(table), 3, **more)
    z = chain([[0.1, 1.0]])
    assert z.std().item() == pytest.approx(1, abs=0.05)
    assert (chain([[0.1, 1.0], [0.1, 1.0]]) - z).std().item() == pytest.approx(1, abs=0.05)
    assert not torch.equal(chain([[0.1, 1.0]], first=1), z)
    x, g = torch.zeros(5000), torch.ones(5000)
    a, b = (ebm.langevin_step_plain(x, g, 0.5, 2.0, 3, k) for k in (0, 1))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.1
    assert a.mean().item() == pytest.approx(-0.5, abs=0.2) and a.std().item() == pytest.approx(2, abs=0.1)
    close(ebm.langevin_step_plain(x, g, 0.5, 0.0, 3, 0, 0.4, 0.1), x - 0.1)


def test_the_plain_loops_follow_their_seed():                           # the seed left out; few of them
    network = [torch.zeros(shape) for shape in ((2, 0), (0,), (4, 2), (4,), (0, 4, 4), (0, 4), (1, 4), (1,))]
    x, table = torch.zeros(50, 2), torch.tensor([[0.1, 1.0]])
    for draw in (lambda seed: ebm.langevin_chain_plain(x, network, table, seed), lambda seed: ebm.langevin_step_plain(x, x, 0.1, 1.0, seed, 0)):
        seen = [draw(seed) for seed in (3, 4, 3 + 2 * 63)]
        assert torch.equal(draw(3), seen[0])
        assert all((a != b).all() for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("options, steps", [({}, 5), ({"chain": 3}, 3), ({"chain": 3, "inner": 2}, 6)])
def test_a_draw_takes_as_many_steps_as_asked(options, steps, monkeypatch):          # another default; inner left out
    model, taken = make(jumps=0, **options), []
    monkeypatch.setattr(model, "walk", lambda x, y, noises: taken.append(noises) or x)
    model.negatives(4, torch.zeros(4, dtype=torch.long), None)
    close(taken[0], torch.full((steps,), model.noise))


def test_starts_and_schedules_are_told_apart():                         # the first state for the last; one noise for both
    torch.set_default_dtype(torch.float32)
    model, truth = make("jem", step=1e-3, jumps=0, init="gaussians", base=0.0, buffer=1000), data.load("gmm")
    model.means.copy_(torch.randn(3, 2))
    for p in model.network.parameters():
        torch.nn.init.zeros_(p)                                         # noise alone moves the chains
    found = ebm.compare(model, truth, 1000, 4)
    starts = ("noise", "data", "buffer", "gaussians")
    assert set(found) == {f"{s}, {r}" for s in starts for r in ("as it is", "hot 1", "hot 10")}
    for s in starts:
        inside = (found[f"{s}, as it is"].abs() < 2).all(1)
        moved = [(found[f"{s}, {r}"] - found[f"{s}, as it is"])[inside].std().item() for r in ("hot 1", "hot 10")]
        assert moved[0] == pytest.approx(2 * model.noise, rel=0.1) and 5 < moved[1] / moved[0] < 6.3      # 5.65: the root of (1 + 10^(2/3) + 10^(4/3) + 100) / 4


def test_the_waves_are_sines_and_cosines_of_each_coordinate():          # repeat for repeat_interleave; another period
    network = make(waves=3).network
    assert network.frequencies.shape == (2, 12)
    found = set()
    for column, phase in zip(network.frequencies.T, network.phases):
        (d,) = column.nonzero().flatten().tolist()
        found.add((d, column[d].item(), round(phase.item(), 3)))
    assert found == {(d, k, p) for d in (0, 1) for k in (0.5, 1.5, 4.5) for p in (0, 1.571)}


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 9, 11), (2, 17, 16), (1, 8, 8), (1, 64, 48)])
def test_images_of_any_side_have_logits(shape):                         # odd sides not padded
    model = make("jem", shape)
    x = torch.rand(3, *shape)
    assert model.network(x).shape == (3, 3)
    close(model.network(x), model.network.rest(model.network.first(x)))
    g = ebm.gradient(model.energy, x)
    assert g.shape == x.shape and (g != 0).flatten(1).double().mean(1).min() > 0.9            # each pixel counts
    one = ebm.gradient(model.energy, x[:1])
    close(one, g[:1])                                                   # and no other image does


# ---- the buffer


@given(seeds, st.integers(1, 4))
def test_slots_are_drawn_once_and_from_their_class(seed, classes):      # with replacement; another class's block
    torch.manual_seed(seed)
    chains = torch.arange(61.0)[:, None]
    buffer = ebm.ReplayBuffer(chains, classes)
    assert buffer.size == 61 // classes and len(buffer.chains) == classes * buffer.size
    y = torch.randint(classes, (15,))
    slots = buffer.draw(y)
    assert len(set(slots.tolist())) == 15
    assert torch.equal(slots // buffer.size, y)
    full = torch.arange(classes).repeat(buffer.size)
    assert sorted(buffer.draw(full).tolist()) == list(range(classes * buffer.size))
    with pytest.raises(ValueError, match=f"{buffer.size + 1} chains of a class and the buffer has {buffer.size}"):
        buffer.draw(torch.zeros(buffer.size + 1, dtype=torch.long))


def test_slots_are_drawn_evenly():                                      # the first ones alone
    torch.manual_seed(0)
    buffer = ebm.ReplayBuffer(torch.zeros(40, 1), 2)
    y = torch.tensor([0, 1, 1, 0, 0])
    counts = torch.stack([buffer.draw(y) for _ in range(4000)]).flatten().bincount(minlength=40)
    expected = torch.tensor([600.0] * 20 + [400.0] * 20)
    assert ((counts - expected).square() / expected).sum() < 80         # chi^2 of 38: 4e-5


@pytest.mark.parametrize("name, shape", [("ebm", (2,)), ("cond", (2,)), ("jem", (1, 8, 8)), ("cond", (1, 8, 8))])
def test_only_the_chains_that_were_walked_change(name, shape, monkeypatch):       # written to other slots; not written
    model = make(name, shape, reinit=0.0, jumps=0, chain=2)
    drawn, before = [], model.buffer.chains.clone()
    monkeypatch.setattr(model.buffer, "draw", lambda y, f=model.buffer.draw: drawn.append(f(y)) or drawn[-1])
    y = torch.arange(12) % (3 if name == "cond" else 1)
    x = model.negatives(12, y, None)
    assert torch.equal(model.buffer.chains[drawn[0]], x)
    rest = torch.ones(len(before), dtype=torch.bool)
    rest[drawn[0]] = False
    assert torch.equal(model.buffer.chains[rest], before[rest])
    assert (x != before[drawn[0]]).flatten(1).any(1).all()
    assert not x.requires_grad and x.abs().max() <= model.bound


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_a_share_of_the_chains_starts_anew(rho, monkeypatch):           # 1 - rho; the data's own place
    model = make(reinit=rho, jumps=0, buffer=4000, init="data", base=0.0)
    monkeypatch.setattr(model, "walk", lambda x, y, noises: x)
    model.buffer.chains.zero_()
    data = 1.0 + torch.rand(50, 2)
    x = model.negatives(4000, torch.zeros(4000, dtype=torch.long), data)
    anew = x[:, 0] > 0
    assert anew.double().mean().item() == pytest.approx(rho, abs=0.04)
    assert len(x[anew].unique(dim=0)) == (50 if rho else 0)             # contrastive divergence: starts are data


def test_where_chains_start():                                          # a class's own Gaussian; the range of noise
    torch.manual_seed(0)
    model = make("cond", buffer=6000, init="gaussians")
    model.means.copy_(torch.tensor([[-2.0, 0], [0, 2], [2, 0]]))
    model.factors.copy_(0.1 * torch.eye(2).expand(3, 2, 2))
    y = torch.arange(6000) % 3
    assert torch.cdist(model.fresh(y), model.means).argmin(1).eq(y).all()
    model.conditional = False
    counts = torch.cdist(model.fresh(0 * y), model.means).argmin(1).bincount(minlength=3)
    assert (counts - 2000).abs().max() < 5 * 2000**0.5
    for model, bound in ((make(buffer=3000), 3.0), (make(shape=(1, 8, 8)), 1.0)):
        chains = model.buffer.chains
        assert model.bound == bound and chains.abs().max() <= bound
        assert chains.mean().abs() < 0.06 * bound and chains.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_sampling_leaves_nothing_behind():                              # .grad filled; train mode; requires_grad
    for shape in ((2,), (1, 8, 8)):
        for inner in (1, 2):
            model = make("jem", shape, inner=inner).train()
            model.network.requires_grad_(True)
            *_, x = model.sample(5, 4)
            model.negatives(5, torch.zeros(5, dtype=torch.long), None)
            assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
            assert not x.requires_grad and not model.buffer.chains.requires_grad and torch.is_grad_enabled()
            with pytest.raises(Exception, match=r".+"):                 # a chain that fails
                model.walk(torch.full((5, 1), 1.0), None, torch.ones(2))
            assert torch.is_grad_enabled() and all(p.requires_grad for p in model.parameters())


# ---- the sampler


def test_jumps_give_each_mode_its_due():                                # E for E / T; a sign; e not renewed
    """Two wells, 5 apart and one deeper by log 3 T: all chains begin in the other one."""
    for T in (1.0, 0.5):
        torch.manual_seed(0)
        model = make(buffer=10, temperature=T, jumps=100)
        model.energy = lambda x, y=None, T=T: -T * torch.stack([math.log(3) - 20 * (x - 2).square().sum(1), -20 * (x + 1.5).square().sum(1)]).logsumexp(0)
        x = torch.full((4000, 2), -1.5)
        for _ in range(12):
            x = model.jump(x)
        near = torch.stack([(x - 2).norm(dim=1) < 1, (x + 1.5).norm(dim=1) < 1]).double().mean(1)
        assert near[0].item() == pytest.approx(0.75, abs=5 * (0.1875 / 4000) ** 0.5) and near.sum() == 1
        assert (x[(x > 0).all(1)].var(0) * 40).mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", ["ebm", "cond"])
def test_chains_of_points_sample_the_model(name):                       # the class not passed on; jumps of another law
    torch.manual_seed(0)
    model = make(name, width=16, waves=1, step=0.01, base=0.5, classes=2)
    with torch.no_grad():
        model.network.w_out.mul_(8)
    y = torch.ones(4000, dtype=torch.long) if name == "cond" else None
    *_, x = model.sample(4000, 60, y)
    energy = lambda x: model.energy(x, None if y is None else torch.ones(len(x), dtype=torch.long))
    axis = (torch.arange(200) + 0.5) * 0.03 - 3
    grid = torch.cartesian_prod(axis, axis)
    p = (-energy(grid)).softmax(0)
    for f in (lambda x: x, lambda x: x.square(), lambda x: x.prod(1, keepdim=True)):
        mean = (p[:, None] * f(grid)).sum(0)
        sd = ((p[:, None] * f(grid).square()).sum(0) - mean**2).sqrt()
        assert ((f(x).mean(0) - mean).abs() < 5 * sd / 4000**0.5 + 0.02 * sd).all()


def test_a_sampling_process_is_shown_in_parts(monkeypatch):             # a step lost between parts; the noise's order
    model, walks = make(chain=4, jumps=0), []
    monkeypatch.setattr(model, "walk", lambda x, y, noises: walks.append(noises) or x + 1)
    states = list(model.sample(3, 10, x=torch.zeros(3, 2), hot=8.0, parts=3))
    assert [len(w) for w in walks] == [3, 4, 3] and len(states) == 4
    close(torch.cat(walks), ebm.annealed(8 * model.noise, model.noise, 10))
    assert [s[0, 0].item() for s in states] == [0, 1, 2, 3]


def test_images_walk_downhill_by_the_gradient(monkeypatch):             # the clip; the bound; the same gradient twice
    for inner in (1, 3):
        model = make("jem", (1, 8, 8), step=0.5, inner=inner, clip=0.01)
        x = torch.rand(4, 1, 8, 8) - 0.5
        found = model.walk(x, None, torch.zeros(3))
        y = x
        for k in range(3):
            if k % inner == 0:
                h = model.network.first(y).detach().requires_grad_()
                (behind,) = torch.autograd.grad(ebm.energy_of(model.network.rest(h)).sum(), h)
            leaf = y.clone().requires_grad_()
            (g,) = torch.autograd.grad((model.network.first(leaf) * behind).sum(), leaf)
            y = (y - 0.5 * g.clamp(-0.01, 0.01)).clamp(-1, 1)
        close(found, y)
        assert (model.energy(found) < model.energy(x)).all()


# ---- the loss


@pytest.mark.parametrize("name", ["ebm", "jem", "cond"])
def test_the_gradient_is_that_of_the_likelihood(name, monkeypatch):     # real for fake; cross-entropy lost or doubled
    """Chains that are exact samples (each cell of a grid as often as its mass says): then d loss = d (-log p), of x, of
    (x, y), or of x given y."""
    model = make(name, classes=2, base=0.5, seed=1)
    axis = (torch.arange(40) + 0.5) * 0.2 - 4
    grid, n, g = torch.cartesian_prod(axis, axis), 40_000, rng(0)
    x, y = torch.randn(n, 2, generator=g), torch.randint(2, (n,), generator=g)
    log_p = lambda k: (-model.energy(grid, None if k is None else torch.full((len(grid),), k))).log_softmax(0)

    def exact(n, slots, data):
        fakes = torch.zeros(n, 2)
        for k in (0, 1) if name == "cond" else (None,):
            rows = slots == (k or 0)
            cdf = log_p(k).exp().cumsum(0).detach()
            at = (torch.arange(int(rows.sum())) + 0.5) / int(rows.sum())
            fakes[rows] = grid[torch.searchsorted(cdf, at).clamp(max=len(grid) - 1)]
        return fakes

    monkeypatch.setattr(model, "negatives", exact)
    loss = model.loss((x, y) if model.labels else (x,))["loss"]
    found = torch.autograd.grad(loss, model.network.parameters())
    if name == "cond":
        z = torch.stack([(-model.energy(grid, torch.full((len(grid),), k))).logsumexp(0) for k in (0, 1)])
        nll = (model.energy(x, y) + z[y]).mean()
    else:                                                               # CE + NLL(x) is the joint NLL
        nll = (model.energy(x, y if name == "jem" else None)).mean() + (-model.energy(grid)).logsumexp(0)
    for a, b in zip(found, torch.autograd.grad(nll, model.network.parameters())):
        assert (a - b).abs().max() < 2e-3 + 0.01 * b.abs().max()


def test_a_constant_in_the_energy_is_seen_by_the_penalty_alone(monkeypatch):      # mean for square; one side only
    for l2 in (0.0, 0.3):
        model = make(l2=l2)
        fake = torch.randn(7, 2)
        monkeypatch.setattr(model, "negatives", lambda n, y, x, fake=fake: fake)
        x = torch.randn(7, 2)
        row = model.loss((x,))
        with torch.no_grad():
            model.network.b_out.sub_(2.0)
        after = model.loss((x,))
        e, e_fake = (model.energy(v) - 2 for v in (x, fake))
        squares = [sum((v + shift).square().mean() for v in (e, e_fake)) for shift in (0, 2)]
        close(after["loss"] - row["loss"], l2 * (squares[1] - squares[0]))
        close(after["gap"], row["gap"])
        close(row["gap"], e.mean() - e_fake.mean())
        close(row["spread"], e.std())
        close(row["energy"], e.mean())


def test_noise_on_the_data_and_the_share_of_a_process(monkeypatch):     # noise on the chains; rows of another process
    model = make("jem", data_noise=0.0)
    fake, x, y = torch.randn(8, 2), torch.randn(8, 2), torch.arange(8) % 3
    monkeypatch.setattr(model, "negatives", lambda n, slots, data: fake[:n])
    whole = model.loss((x, y))["loss"]
    parts = [model.loss((x, y), slice(k, k + 4))["loss"] for k in (0, 4)]
    close(sum(parts) / 2, whole)
    noisy, seen = make("jem", data_noise=0.5), []
    monkeypatch.setattr(noisy, "negatives", lambda n, slots, data: fake[:n])
    noisy.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    noisy.loss((torch.zeros(8, 2), y))
    assert 0.2 < seen[0][:8].std() < 0.9 and torch.equal(seen[0][8:], fake)


def test_training_follows_its_schedule():                               # the warm-up; half a cosine; the average; the limit
    torch.manual_seed(0)
    model = make("jem", seed=0)
    average = copy.deepcopy(model)
    average.buffer = model.buffer
    start = [p.clone() for p in average.network.parameters()]
    optimizer, rates = torch.optim.SGD(model.parameters(), 1.0), []
    model.limit = 0.5
    batches = iter([(torch.randn(6, 2), torch.arange(6) % 3)] * 300)
    rows = ebm.train(model, average, optimizer, batches, 300, 0.1)
    first = next(rows)
    rates.append(optimizer.param_groups[0]["lr"])
    move = sum((p - s).square().sum() for p, s in zip(model.network.parameters(), start)).sqrt().item()
    assert 0 < move <= 0.5 * rates[0] * 1.001
    for p, a, s in zip(model.network.parameters(), average.network.parameters(), start):
        close(a, s + 0.9 * (p - s))                                     # 1 - 1 / 10
    assert {"loss", "gap", "spread", "energy", "cross_entropy", "train_accuracy"} == first.keys()
    rates += [optimizer.param_groups[0]["lr"] for _ in rows]
    expected = [0.1 * min(1, (k + 1) / 100) * 0.5 * (1 + math.cos(math.pi * k / 300)) for k in range(300)]
    close(torch.tensor(rates), torch.tensor(expected))
    close(first["loss"], first["gap"] + first["cross_entropy"])


def test_the_watch_takes_its_number_now_and_then():                     # at each step; a row lost
    taken = iter(range(100))
    rows = ebm.watch(iter([{"loss": torch.tensor(k)} for k in range(7)]), lambda: next(taken), 2, 3)
    assert [(int(r["loss"]), int(r["kl"])) for r in rows] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3)]


def test_options_that_cannot_be():
    config = {"model": "jem", "dataset": "checkerboard", "init": "", "step": 0.1, "temperature": 1.0, "noise": 0.0}
    with pytest.raises(ValueError, match="checkerboard has none"):
        ebm.build(config, (2,), None)
    with pytest.raises(ValueError, match="Gaussians are fitted to classes"):
        ebm.build(config | {"model": "ebm", "init": "gaussians"}, (2,), 3)
    model = ebm.build(config | {"dataset": "gmm", "chain": 7, "buffer": 90}, (2,), 8)
    assert model.chain == 7 and model.classes == 8 and len(model.buffer.chains) == 90


# ---- judges


@given(seeds)
def test_the_area_under_the_curve_counts_pairs(seed):                   # ties; the other way round
    a, b = (torch.randint(6, (n,), generator=rng(seed)) for n in (20, 30))
    pairs = (a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()
    close(judges.auroc(a, b), pairs.mean())
    close(judges.auroc(a, b) + judges.auroc(b, a), torch.tensor(1.0))


def test_calibration_is_measured_in_bins():                             # the mean of signed errors over all; 1 / n
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.0, 1.0]])
    close(judges.calibration_error(p, torch.tensor([0, 1, 1, 1])), torch.tensor((2 * 0.4 + 0.4 + 0.0) / 4))
    close(judges.calibration_error(p[2:], torch.tensor([0, 0]), 1), torch.tensor(0.8))


# ---- runs


LOAD = functools.cache(data.load)


@pytest.fixture
def quick(monkeypatch):
    """Sets are drawn once, and the readers that judge are not trained."""
    monkeypatch.setattr(data, "load", lambda name, *rest, **more: LOAD(name))
    monkeypatch.setattr(judges, "train_classifier",
                        lambda x, labels, classes, levels, *rest, **more:
                        judges.Classifier(x.shape[1], classes, levels).eval())


RUNS = [("ebm", "checkerboard", ["--jumps", 0]), ("cond", "moons", []), ("jem", "gmm", ["--noise", 0.01]), ("jem++", "gmm", ["--compare"]),
        ("cond", "persian", ["--hot", 5]), ("jem++", "persian", ["--inner", 2, "--compare"])]


@pytest.mark.parametrize("name, dataset, options", RUNS)
def test_a_run_leaves_its_numbers(cli, quick, name, dataset, options):
    small = ["--steps", 3, "--batch", 8, "--width", 8, "--channels", 4, "--samples", 40, "--buffer", 400, "--chain", 2, "--sample-steps", 4]
    status, error, out = cli(ebm, "--model", name, "--dataset", dataset, *small, *options)
    assert status == 0, error
    (folder,) = out.iterdir()
    result = json.loads((folder / "metrics.json").read_text())
    wanted = {"kl", "klh", "buffer_klh"} if dataset != "persian" else {"recall", "buffer_recall", "auroc_noise", "auroc_set"}
    wanted |= {"accuracy", "calibration_error"} if name.startswith("jem") else set()
    wanted |= {"label_agreement"} if name != "ebm" and dataset != "moons" else set()
    assert wanted <= result["metrics"].keys()
    assert result["temperature"] == pytest.approx({"jem": 0.05}.get(name, 1.0) if dataset != "persian" else 5e-6, rel=1e-3)
    assert (folder / "compare.md").is_file() == ("--compare" in options)
    assert (folder / "curves.png").is_file() and (folder / "process.gif").is_file()
    assert dataset == "persian" or (folder / "landscape.png").is_file()
    if name.startswith("jem"):
        status, error, _ = cli(ebm, "--ckpt", folder / "model.pt", "--samples", 40, "--sample-steps", 4)
        assert status == 0, error


@pytest.mark.parametrize("name, dataset", [("ebm", "gmm"), ("jem++", "persian")])
def test_resume_is_bit_for_bit(resumed, quick, name, dataset):          # the chains, the Gaussians not kept
    whole, broken = resumed(ebm, "--model", name, "--dataset", dataset, "--batch", 8, "--width", 8, "--channels", 4, "--samples", 40,
                            "--buffer", 400, "--chain", 2, "--sample-steps", 4)
    assert "model.buffer.chains" in whole and whole.keys() == broken.keys()
    assert all(torch.equal(whole[key], broken[key]) for key in whole)


@pytest.mark.parametrize("options, words", [
    (["--model", "jem", "--dataset", "checkerboard"], "checkerboard has none"), (["--init", "gaussians"], "Gaussians are fitted"),
    (["--batch", "2000"], "2000 chains of a class and the buffer has 1024"), (["--temperature", "-1"], "0 or more"),
    (["--model", "boltzmann"], "boltzmann"), (["--chain", "0"], "at least 1"), (["--step", "nan"], "0 or more"), (["--step", "0"], "must be above 0"),
    (["--temperature", "0"], "must be above 0")])
def test_bad_input_gets_a_sentence(cli, options, words):
    status, error, _ = cli(ebm, *options)
    assert status == 2 and words in error and "Traceback" not in error


def test_a_run_that_diverges_says_so(cli, quick, monkeypatch):               # the message of `trouble` thrown away
    small = ["--steps", 40, "--batch", 64, "--width", 8, "--samples", 40, "--sample-steps", 4, "--jumps", 1, "--lr", 1.0]
    printed = []
    monkeypatch.setattr("builtins.print", lambda *a, **k: printed.append(" ".join(map(str, a))))
    cli(ebm, *small)
    assert any("diverged: E(data) - E(chains) is" in line for line in printed)


def test_training_finds_the_modes_of_a_mixture():                       # a loss that nothing learns from
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    truth = data.load("gmm")
    model = ebm.EBM((2,), width=64)
    average = copy.deepcopy(model)
    average.buffer = model.buffer
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, betas=(0.0, 0.999))
    for _ in ebm.train(model, average, optimizer, truth.batches(256), 250, 1e-2):
        pass
    z = ebm.log_z(average.energy, 6.0, 200)
    import metrics

    assert metrics.exact_kl(lambda x: -average.energy(x) - z, truth, 200, 6.0) < 0.3
