"""The course problems: each derivation agrees with its check, and the closed forms hold beyond the sheets' numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pgm
import problems


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_derivations_agree_with_their_checks(name):  # any closed form
    title, rows = problems.solve(name, pgm)
    assert title and len(rows) > 3
    assert [row.what for row in rows if not row.agrees] == []
    assert "DISAGREE" not in problems.listing(rows)


def test_the_mistakes_of_the_solved_sheets_are_found():  # sheet= left out
    rows = [row for name in problems.PROBLEMS for row in problems.solve(name, pgm)[1] if row.sheet is not None]
    assert all(row.sheet != row.derived for row in rows) and {row.what.split("   ")[0] for row in rows} == {
        "M _|_ T | D, I", "maximal cliques of the graph whose cliques the sheet lists",
        "moral cliques of O -> S, T; A -> T; S -> B; A, B, T -> M"}


def test_a_row_that_does_not_agree_says_so():  # agrees always true
    rows = [problems.Row("x", 1.0, 1.1), problems.Row("y", True, False), problems.Row("z", 1.0, 1.1, 0.2)]
    assert [r.agrees for r in rows] == [False, False, True] and problems.listing(rows).count("DISAGREE") == 2
    with pytest.raises(ValueError, match="the examples are server"):
        problems.solve("nothing", pgm)


@given(st.floats(-1 / math.e, 50))
def test_lambert(x):  # the correction of second order
    w = float(problems.lambert_w(x))
    assert w * math.exp(w) == pytest.approx(x, abs=1e-12 * (1 + abs(x))) and w >= -1


@given(st.floats(0.2, 3), st.one_of(st.floats(-3, 3), st.floats(-1e-3, 1e-3)))
def test_stone_density_integrates_to_one(radius, rate):  # r left out of the Jacobian
    mass = problems.quadrature(lambda r: 2 * math.pi * r * np.exp(rate * r), 0, radius) * problems.stone_density(radius, rate)
    assert mass == pytest.approx(1, abs=1e-7)


def test_stone_sampler_has_the_density():  # Kolmogorov-Smirnov, 1 in 10^6; u instead of u - 1
    rng = np.random.default_rng(1)
    n = 100_000
    r, angle = problems.stone_sample(rng.random(n), rng.random(n))
    for x, cdf in ((np.sort(r), problems.stone_cdf), (np.sort(angle), lambda t: (t + math.pi) / (2 * math.pi))):
        assert abs(cdf(x) - (np.arange(n) + 0.5) / n).max() < math.sqrt(math.log(2e6) / 2 / n)
    u = np.linspace(0, 1, 1001)
    np.testing.assert_allclose(problems.stone_cdf(problems.stone_sample(u, u)[0]), u, atol=1e-12)


@given(st.integers(2, 60), st.integers(50, 2000))
def test_zeta_within_its_bound(n, terms):  # the tail's half term
    value, bound = problems.zeta(n, terms)
    truth = torch.special.zeta(torch.tensor(float(n)), torch.tensor(1.0)).item()
    assert abs(value - truth) <= bound + 4e-16 * terms**0.5


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2), st.floats(0.1, 2), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_two_latent_bound_is_pgms(v, w1, w2, s2, q1, q2):  # q (1 - q) left out; w1 / 2 left out
    w = (0.3, w1, w2)
    h = [[math.exp(-((v - 0.3 - w1 * a - w2 * b) ** 2) / (2 * s2)) / math.sqrt(2 * math.pi * s2) / 4 for b in (0, 1)] for a in (0, 1)]
    logs = [pgm.Factor(("h1", "h2"), np.log(np.maximum(h, 1e-300)))]
    q = {"h1": np.array([1 - q1, q1]), "h2": np.array([1 - q2, q2])}
    bound = problems.two_latent_elbo(v, w, s2, q1, q2)
    if np.min(h) > 1e-290:
        assert bound == pytest.approx(pgm.elbo(logs, q), abs=1e-9)
        assert problems.two_latent_update(v, w, s2, q2) == pytest.approx(pgm.mean_field_update(logs, q, "h1")[1], abs=1e-9)
    assert bound <= math.log(np.sum(h)) + 1e-12
