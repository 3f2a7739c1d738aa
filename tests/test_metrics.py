"""Properties of the metrics. Each was seen to fail with the guarded line broken (the comment says which)."""

import json
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import metrics

seeds = st.integers(0, 2**31)
TWO_DIMENSIONAL = ["klh", "cross_entropy", "modes", "within_3_sigma", "mode_kl", "sliced_w2", "energy_distance"]


def rng(seed):
    return torch.Generator().manual_seed(seed)


def randn(seed, *shape):
    return torch.randn(*shape, generator=rng(seed))


class Mixture:
    """Equal round Gaussians: everything of the 2-D interface in closed form."""

    name, dim, classes = "ring", 2, None

    def __init__(self, modes, std):
        self.modes, self.mode_std = torch.as_tensor(modes, dtype=torch.float64), std
        self.entropy = math.log(len(self.modes)) + math.log(2 * math.pi * math.e * std**2)      # modes far apart

    def sample(self, n, generator=None):
        k = torch.randint(len(self.modes), (n,), generator=generator)
        return (self.modes[k] + self.mode_std * torch.randn(n, 2, generator=generator, dtype=torch.float64)).float()

    def log_prob(self, x, a=1.0, b=0.0):
        variance = (a * self.mode_std) ** 2 + b**2
        square = (x[:, None].double() - a * self.modes).square().sum(-1)
        return (-0.5 * square / variance).logsumexp(-1) - math.log(len(self.modes) * 2 * math.pi * variance)


class Square:
    """Uniform on [-1, 1]^2: a density with an edge and no modes."""

    name, dim, classes, modes, mode_std, entropy = "square", 2, None, None, None, math.log(4)

    def sample(self, n, generator=None):
        return 2 * torch.rand(n, 2, generator=generator, dtype=torch.float32) - 1

    def log_prob(self, x, a=1.0, b=0.0):
        if b:                                                           # a normal distribution function a side
            cdf = torch.special.ndtr((x + a) / b) - torch.special.ndtr((x - a) / b)
            return (cdf / (2 * a)).log().sum(-1)
        return torch.where((x.abs() <= a).all(-1), -math.log(4 * a * a), -math.inf).to(x.dtype)


ANGLES = torch.arange(8) * math.pi / 4
RING = Mixture(1.4 * torch.stack([ANGLES.cos(), ANGLES.sin()], -1), 0.1)
NOT_FINITE = torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [0.0, -math.inf]])


# ---- the grid KL


@given(seeds, st.integers(1, 9), st.floats(0.2, 1.0))
@settings(max_examples=8)
def test_kde_equals_brute_force(seed, n, h):                            # h for h**2 in the norm; the axes swapped
    x, axis = randn(seed, n, 2), metrics._axis(7, 2.0)
    got = metrics.kde(x, axis, h)
    for i in range(7):
        for j in range(7):
            point = torch.stack([axis[i], axis[j]])
            kernels = (-(x - point).square().sum(-1) / (2 * h * h)).exp() / (2 * math.pi * h * h)
            torch.testing.assert_close(got[i, j], kernels.mean())


def test_axis_holds_the_midpoints_of_the_cells():                       # drop the 0.5
    torch.testing.assert_close(metrics._axis(4, 2.0), torch.tensor([-1.5, -0.5, 0.5, 1.5]))


def test_kde_has_mass_one_over_more_samples_than_one_part():            # `density =` for `density +=`
    axis = metrics._axis(100, 6.0)
    mass = metrics.kde(randn(0, 17_000, 2), axis, 0.2).sum() * (axis[1] - axis[0]) ** 2
    assert math.isclose(mass, 1.0, abs_tol=1e-5)


@given(st.floats(-0.4, 0.4), st.floats(0.2, 0.5), st.floats(0.25, 0.5))
@settings(max_examples=10)
def test_klh_of_one_point_is_the_kl_between_two_gaussians(shift, std, h):   # p / q turned; b = 0 in log_prob; the area
    got = metrics.klh([[shift, 0.0]] * 3, Mixture([[0.0, 0.0]], std), h=h)
    ratio = (std**2 + h**2) / h**2
    assert math.isclose(got, ratio - 1 - math.log(ratio) + shift**2 / (2 * h**2), rel_tol=1e-3, abs_tol=1e-6)


@pytest.mark.parametrize("n", [1000, 4000])
def test_klh_of_the_truth_is_its_floor(n):                              # h**2 in the smoothing of one side only
    value = metrics.klh(RING.sample(n, rng(1)), RING)
    assert 8 / n < value < 32 / n


def test_klh_sees_every_defect():                                       # half_width=1; clamp_min(1e-2)
    n = 4000
    x = RING.sample(n, rng(2)).double()
    nearest = torch.cdist(x, RING.modes).argmin(-1)
    defects = {"blob": x.std() * randn(3, n, 2), "dropped mode": x[nearest != 5],
               "over-sharp": RING.modes[nearest] + 0.8 * (x - RING.modes[nearest])}
    floor = metrics.klh(RING.sample(n, rng(4)), RING)
    values = {name: metrics.klh(y, RING) for name, y in defects.items()}
    assert all(value > 5 * floor for value in values.values()), values
    # a missed mode of weight 1/8 costs (1/8) log(1/8 of what was there / the floor of the density): far from infinite
    assert 2.5 < values["dropped mode"] < 4 and 1.5 < values["blob"] < 2.2
    assert metrics.frechet(defects["blob"], x) < 0.01                   # why the Frechet distance is no headline


@given(seeds, st.integers(1, 40), st.floats(0.01, 3.0))
@settings(max_examples=15)
def test_klh_is_not_negative_and_the_order_does_not_matter(seed, n, scale):     # p / q turned: negative for a few points
    x = scale * randn(seed, n, 2)
    value = metrics.klh(x, RING, cells=100)
    assert value > -1e-6
    assert math.isclose(value, metrics.klh(x.flip(0), RING, cells=100), rel_tol=1e-9)


@pytest.mark.parametrize("lost", [*NOT_FINITE, torch.tensor([9.0, 9.0])], ids=["nan", "inf", "-inf", "far"])
def test_samples_outside_the_grid_are_lost_mass(lost):                  # len(part) for len(x) in kde
    x = 0.3 * randn(0, 300, 2)
    inside = metrics.klh(x, Mixture([[0.0, 0.0]], 0.3), h=0.3)
    both = metrics.klh(torch.cat([x, lost.expand(100, 2)]), Mixture([[0.0, 0.0]], 0.3), h=0.3)
    assert math.isclose(both - inside, math.log(4 / 3), rel_tol=1e-6)


def test_klh_of_nothing_finite_is_finite():                             # clamp_min dropped: infinite
    entropy = math.log(8) + math.log(2 * math.pi * math.e * 0.02)       # of the smoothed ring
    assert math.isclose(metrics.klh(NOT_FINITE, RING), 12 * math.log(10) - entropy, rel_tol=1e-3)


# ---- likelihood and modes


def test_cross_entropy_is_the_entropy_for_the_truth_and_moves_both_ways():      # the sign
    x = RING.sample(20_000, rng(0)).double()
    value = metrics.cross_entropy(x, RING)
    assert value == pytest.approx(-RING.log_prob(x).mean().item())
    assert abs(value - RING.entropy) < 5 / math.sqrt(20_000)            # log p has standard deviation 1
    assert metrics.cross_entropy(RING.modes, RING) == pytest.approx(RING.entropy - 1)          # over-sharp
    assert metrics.cross_entropy(RING.modes + 0.3, RING) > RING.entropy + 1
    assert metrics.cross_entropy(torch.cat([x, NOT_FINITE]), RING) == math.inf
    assert metrics.cross_entropy([[0.0, 0.0], [2.0, 0.0]], Square()) == math.inf


@given(st.lists(st.integers(0, 40), min_size=8, max_size=8).filter(any), st.integers(0, 30))
@example([1, 39, 0, 0, 0, 0, 0, 0], 0)                                  # 1 is 0.2 N/K exactly: not found
def test_modes_are_counted(counts, lost):                               # 0.2 -> 0.3; > -> >=; the 0.5 in mode_kl
    x = torch.cat([mode.expand(n, 2) for mode, n in zip(RING.modes, counts)] + [NOT_FINITE[:1].expand(lost, 2)])
    n = sum(counts) + lost
    assert metrics.mode_recall(x, RING) == sum(40 * count > n for count in counts)
    assert metrics.within_3_sigma(x, RING) == pytest.approx(sum(counts) / n)
    share = [(count + 0.5) / (n + 4) for count in counts]
    assert metrics.mode_kl(x, RING) == pytest.approx(sum(math.log(1 / 8 / s) / 8 for s in share))


def test_a_mode_is_found_by_points_near_it_only():                      # 3 -> 4, or nearest without near
    outward = RING.modes / RING.modes.norm(dim=-1, keepdim=True)
    inside, outside = (RING.modes + d * outward for d in (0.299, 0.301))
    assert metrics.mode_recall(inside, RING) == 8 and metrics.within_3_sigma(inside, RING) == 1
    assert metrics.mode_recall(outside, RING) == 0 and metrics.within_3_sigma(outside, RING) == 0
    assert metrics.mode_kl(outside, RING) == pytest.approx(0, abs=1e-12)        # the nearest mode is all that it asks
    assert metrics.mode_kl(RING.modes[:4].repeat(25, 1), RING) > 0.5


def test_within_3_sigma_of_the_truth():
    assert abs(metrics.within_3_sigma(RING.sample(20_000, rng(0)), RING) - (1 - math.exp(-4.5))) < 5 * math.sqrt(0.011 / 2e4)


# ---- samples against samples


@given(seeds, st.integers(2, 12), st.floats(0.1, 5))
def test_sliced_w2_is_a_distance(seed, n, scale):                       # square for abs; mean over points left out
    x, y, v = randn(seed, n, 2), randn(seed + 1, n, 2), randn(seed + 2, 2)
    assert metrics.sliced_w2(x, x.flip(0)) == 0
    value = metrics.sliced_w2(x, y)
    assert value == pytest.approx(metrics.sliced_w2(y, x))
    assert metrics.sliced_w2(scale * x + v, scale * y + v) == pytest.approx(scale * value)
    # equispaced angles average cos^2 to 1/2 exactly
    assert metrics.sliced_w2(x, x + v) == pytest.approx(v.norm().item() / math.sqrt(2))
    c, s = math.cos(math.pi / 64), math.sin(math.pi / 64)               # turned by one step: the same directions
    turn = torch.tensor([[c, s], [-s, c]])
    assert metrics.sliced_w2(x @ turn, y @ turn) == pytest.approx(value)


@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_sliced_w2_of_different_sizes_repeats_the_points(seed, n, m):   # a quantile index that is off by one
    x, y = randn(seed, n, 2), randn(seed + 1, m, 2)
    assert metrics.sliced_w2(x, y) == pytest.approx(metrics.sliced_w2(x.repeat(m, 1), y.repeat(n, 1)))


def test_sliced_w2_in_more_dimensions():                                # directions not normalised
    x, v = randn(0, 50, 5), randn(1, 5)
    assert metrics.sliced_w2(x, x + v, angles=20_000) == pytest.approx(v.norm().item() / math.sqrt(5), rel=0.03)
    assert metrics.sliced_w2(x[:, :1], x[:, :1] + 2) == pytest.approx(2)
    assert metrics.sliced_w2(x, x + v) == metrics.sliced_w2(x, x + v)   # deterministic


@given(seeds, st.integers(2, 6), st.integers(2, 6))
def test_energy_distance_equals_the_sums(seed, n, m):                   # the factor 2; pairs (i, i) counted
    x, y = randn(seed, n, 2), randn(seed + 1, m, 2)
    mean = lambda a, b, skip: sum((p - q).norm() for i, p in enumerate(a) for j, q in enumerate(b)
                                  if not (skip and i == j)) / (len(a) * (len(b) - skip))
    expected = 2 * mean(x, y, 0) - mean(x, x, 1) - mean(y, y, 1)
    assert metrics.energy_distance(x, y) == pytest.approx(expected.item(), abs=1e-12)
    longer = torch.cat([x, x + 9])
    assert metrics.energy_distance(longer, y, most=n) == pytest.approx(metrics.energy_distance(x, y[:n], most=n))


def test_energy_distance_of_the_truth_scatters_about_zero():            # a V-statistic: above zero
    values = torch.tensor([metrics.energy_distance(randn(2 * i, 20, 2), randn(2 * i + 1, 20, 2)) for i in range(200)])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(200)
    assert metrics.energy_distance(randn(0, 200, 2), randn(1, 200, 2) + 1) > 0.2


def covariance(seed, D):
    root = randn(seed, D, D)
    return root @ root.T


@given(seeds)
def test_frechet_in_the_plane(seed):                                    # clamp_min, 2 *, or sqrt dropped
    A, B, m = covariance(seed, 2), covariance(seed + 1, 2), randn(seed + 2, 2)
    cross = (torch.trace(A @ B) + 2 * (torch.det(A) * torch.det(B)).sqrt()).sqrt()
    expected = m.square().sum() + A.trace() + B.trace() - 2 * cross
    torch.testing.assert_close(metrics.frechet_gaussian(m, A, 0 * m, B), expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(metrics.frechet_gaussian(0 * m, B, m, A), expected, atol=1e-8, rtol=1e-8)


@given(seeds, st.integers(1, 6))
def test_frechet_of_covariances_that_commute(seed, D):                  # eigvalsh of A B without the roots
    Q = torch.linalg.qr(randn(seed, D, D))[0]
    a, b = randn(seed + 1, D).square(), randn(seed + 2, D).square()
    b[0] = 0                                                            # a singular covariance is allowed
    zero = torch.zeros(D)
    got = metrics.frechet_gaussian(zero, Q * a @ Q.T, zero, Q * b @ Q.T)
    torch.testing.assert_close(got, (a.sqrt() - b.sqrt()).square().sum(), atol=1e-6, rtol=1e-6)


@given(seeds, st.integers(1, 4))
def test_frechet_of_samples(seed, D):                                   # x.std for x.mean
    x, y, v = randn(seed, 9, D), randn(seed + 1, 7, D) @ randn(seed + 2, D, D), randn(seed + 3, D)
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(x, x + v) == pytest.approx(v.square().sum().item())
    assert metrics.frechet(x, 3 * x) == pytest.approx(4 * x.mean(0).square().sum().item() + 4 * x.var(0).sum().item())
    assert metrics.frechet(x, y) == pytest.approx(metrics.frechet(y, x))


@pytest.mark.parametrize("distance", [metrics.sliced_w2, metrics.energy_distance, metrics.frechet])
def test_distances_of_what_is_not_finite_or_does_not_fit(distance):     # `finite` of x only
    x = randn(0, 5, 2)
    for bad in NOT_FINITE:
        broken = torch.cat([x, bad[None]])
        assert distance(broken, x) == math.inf and distance(x, broken) == math.inf
    with pytest.raises(ValueError, match="dimension: 2 and 3"):
        distance(x, randn(0, 5, 3))
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        distance(x[:0], x)
    if distance is not metrics.sliced_w2:
        with pytest.raises(ValueError, match="two points"):
            distance(x[:1], x)
        assert math.isfinite(distance(x[:2], x[:2] + 1))


def test_two_dimensional_has_every_number_beside_its_floor():           # the reference in the place of the second
    before = torch.get_rng_state()
    result = metrics.two_dimensional(RING.sample(2000, rng(1)), RING)
    assert list(result) == TWO_DIMENSIONAL
    assert torch.equal(before, torch.get_rng_state())
    assert result["cross_entropy"]["floor"] == RING.entropy
    assert result["modes"] == metrics.metric(8, 8, "of 8", "higher")
    assert result["within_3_sigma"]["better"] == "higher" and result["mode_kl"]["better"] == "lower"
    for name in ("klh", "sliced_w2"):
        assert 0.4 < result[name]["value"] / result[name]["floor"] < 2.5
    off = metrics.two_dimensional(RING.sample(2000, rng(2)) + 1, RING)
    assert all(off[name]["floor"] == result[name]["floor"] for name in TWO_DIMENSIONAL)        # a property of the size
    assert metrics.two_dimensional(RING.sample(2000, rng(1)), RING, seed=1)["klh"]["floor"] != result["klh"]["floor"]
    assert off["sliced_w2"]["value"] == pytest.approx(1.0, rel=0.1) and off["modes"]["value"] == 0
    assert list(metrics.two_dimensional(Square().sample(500, rng(0)), Square())) == \
        ["klh", "cross_entropy", "sliced_w2", "energy_distance"]


def test_two_dimensional_survives_what_is_not_finite():
    result = metrics.two_dimensional(NOT_FINITE, RING)
    assert list(result) == TWO_DIMENSIONAL and result["modes"]["value"] == 0 and result["sliced_w2"]["value"] == math.inf
    assert metrics.table(result)
    with pytest.raises(ValueError, match="N > 0"):
        metrics.two_dimensional(torch.zeros(0, 2), RING)


# ---- models with a density


@given(st.floats(-0.5, 0.5), st.floats(0.2, 0.8), st.floats(0.2, 0.8))
@settings(max_examples=10)
def test_exact_kl_between_two_gaussians(shift, s, t):                   # log_q - log_p; sum over q
    truth, model = Mixture([[0.0, 0.0]], s), Mixture([[shift, 0.0]], t)
    ratio = s**2 / t**2
    got = metrics.exact_kl(model.log_prob, truth, cells=100, half_width=5)
    assert got == pytest.approx(ratio - 1 - math.log(ratio) + shift**2 / (2 * t**2), abs=1e-5)
    assert metrics.exact_kl(truth.log_prob, truth, cells=100) == pytest.approx(0, abs=1e-12)


def test_exact_kl_of_an_edge_and_of_a_density_that_misses_it():         # p log p = nan outside; divide by p.sum()
    normal = Mixture([[0.0, 0.0]], 0.5)
    expected = -math.log(4) + math.log(2 * math.pi * 0.25) + (2 / 3) / (2 * 0.25)
    assert metrics.exact_kl(normal.log_prob, Square(), cells=401) == pytest.approx(expected, abs=0.02)
    assert metrics.exact_kl(Square().log_prob, normal) == math.inf


def test_exact_kl_refuses_what_is_not_normalised():                     # 1e-2 -> 1e-1, abs dropped
    for factor in (1.02, 0.98, math.nan):
        with pytest.raises(ValueError, match="the model's mass"):
            metrics.exact_kl(lambda x, c=factor: RING.log_prob(x) + math.log(c), RING, cells=150)
    with pytest.raises(ValueError, match=r"\[-0.5, 0.5\]"):
        metrics.exact_kl(RING.log_prob, RING, half_width=0.5)
    assert abs(metrics.exact_kl(lambda x: RING.log_prob(x) + math.log(1.009), RING, cells=150) + math.log(1.009)) < 1e-6


def test_nll_is_exact_at_true_points():                                 # the sign, log_prob at other points
    calls = []
    result = metrics.nll(lambda x: calls.append(x) or RING.log_prob(x) - 0.25, RING, n=20_000, seed=3)
    assert result["value"] - result["floor"] == pytest.approx(0.25)
    x = torch.cat(calls)
    assert len(x) == 20_000 and torch.equal(x.float(), RING.sample(20_000, rng(3)))
    assert result["floor"] == pytest.approx(-RING.log_prob(x).mean().item())
    assert result["unit"] == "nats" and result["better"] == "lower"
    assert abs(result["floor"] - RING.entropy) < 5 / math.sqrt(20_000)


@given(st.integers(1, 4000), st.integers(1, 8))
def test_bits_per_dim_of_the_uniform_distribution(dims, bits):          # log 2 left out
    assert metrics.bits_per_dim(dims * math.log(2**bits), dims) == pytest.approx(bits, rel=1e-12)
    assert metrics.bits_per_dim(dims * math.log(256), dims) == pytest.approx(8, rel=1e-12)


# ---- the table and the pictures


def test_metric_has_exactly_the_keys_of_metrics_json():
    m = metrics.metric(torch.tensor(0.5), None, "nats")
    assert m == {"value": 0.5, "floor": None, "unit": "nats", "better": "lower"} and json.loads(json.dumps(m)) == m
    assert metrics.metric(1, torch.tensor(2.0))["floor"] == 2
    with pytest.raises(ValueError, match='"lower" or "higher"'):
        metrics.metric(1, better="equal")


def test_table_holds_every_name_aligned_and_what_it_says_of_the_floor():        # value / floor turned, floor - value
    text = metrics.table({
        "klh": metrics.metric(0.0123456, 0.002, "nats"), "cross_entropy": metrics.metric(0.3, 0.25, "nats"),
        "modes": metrics.metric(7, 8, "of 8", "higher"), "odd": metrics.metric(math.inf, 1.0),
        "alone": metrics.metric(3), "signed": metrics.metric(0.5, -0.25), "zero": metrics.metric(0.5, 0.0)})
    lines = text.splitlines()
    assert [line.split()[0] for line in lines if line[0] != "-"] == \
        ["metric", "klh", "cross_entropy", "modes", "odd", "alone", "signed", "zero"]
    row = {line.split()[0]: line.split() for line in lines}
    assert row["klh"] == ["klh", "0.01235", "0.002", "6.17x", "nats", "lower"]
    assert row["cross_entropy"][3] == "+0.05" and row["modes"][1:4] == ["7", "8", "-1"]
    assert row["odd"] == ["odd", "inf", "1", "lower"] and row["alone"] == ["alone", "3", "-", "lower"]
    assert row["signed"][3] == "+0.75" and row["zero"][3] == "+0.5"
    column = lines[0].index("better")
    assert all(line[column:] in ("better", "lower", "higher") for line in lines if line[0] != "-")
    assert len(lines[1]) == max(map(len, lines)) and set(lines[1]) == {"-"}


def picture(path):
    Image.open(path).verify()
    image = Image.open(path)
    assert len(image.convert("RGB").getcolors(1 << 24)) > 1             # something is drawn
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")]     # nothing is left beside it
    return image


def test_pictures_of_points(tmp_path):
    x = RING.sample(800, rng(0))
    broken = torch.cat([x, NOT_FINITE])
    metrics.samples_picture(tmp_path / "new" / "a.png", x, broken, RING)
    wide = picture(tmp_path / "new" / "a.png")
    metrics.samples_picture(tmp_path / "b.png", x.numpy(), broken.numpy())
    assert wide.width > 1.3 * picture(tmp_path / "b.png").width         # the density has a panel of its own
    metrics.strip_picture(tmp_path / "c.png", [x, broken, x], ["t = 1", 0.5, "0"])
    strip = picture(tmp_path / "c.png")
    assert strip.width > 2 * strip.height
    metrics.samples_picture(tmp_path / "d.png", x, NOT_FINITE)
    picture(tmp_path / "d.png")


@pytest.mark.parametrize("shape,levels", [((1, 28, 28), 2), ((3, 9, 7), 256), ((1, 128, 128), 256)])
def test_pictures_of_images(tmp_path, shape, levels):
    x = torch.randint(levels, (70, *shape), generator=rng(0), dtype=torch.uint8)
    truth = type("Truth", (), {"levels": levels})
    metrics.samples_picture(tmp_path / "a.png", x, x[:5], truth)
    picture(tmp_path / "a.png")
    floats = x.float() * (2 / (levels - 1)) - 1
    floats[0] = math.nan
    metrics.strip_picture(tmp_path / "b.png", [3 * floats, x], ["noise", "data"], levels)
    picture(tmp_path / "b.png")
    metrics.gif(tmp_path / "c.gif", [3 * floats, floats, x], levels=levels)
    film = picture(tmp_path / "c.gif")
    assert film.n_frames in (2, 3) and max(film.size) <= 320              # PIL joins frames that are equal


@given(seeds, st.sampled_from([2, 256]), st.integers(1, 3))
def test_tiles_show_the_images_in_their_places(seed, levels, side):     # // and % turned; rows for columns
    x = torch.randint(levels, (side * side, 3, 5, 4), generator=rng(seed), dtype=torch.uint8)
    sheet = torch.from_numpy(metrics._tile(x, side, levels)).permute(2, 0, 1)
    assert sheet.shape == (3, side * 6 - 1, side * 5 - 1)               # the gap only between
    for k, image in enumerate(x):
        top, left = k // side * 6, k % side * 5
        assert torch.equal(sheet[:, top:top + 5, left:left + 4], image * (255 // (levels - 1)))
    floats = x.float() * (2 / (levels - 1)) - 1
    assert torch.equal(metrics._bytes(floats, levels), metrics._bytes(x, levels))      # one meaning, two dtypes
    assert metrics._bytes(torch.tensor([math.nan, -7.0, 7.0, 0.0]), 256).tolist() == [0, 0, 255, 128]


def test_gif_stays_small_and_holds_the_last_frame(tmp_path):            # frames[::2] loses the last one
    frames = [randn(i, 20_000, 2) for i in range(31)] + [torch.zeros(500, 2)]
    metrics.gif(tmp_path / "a.gif", frames, most_bytes=150_000)
    film = picture(tmp_path / "a.gif")
    assert (tmp_path / "a.gif").stat().st_size <= 150_000 and 4 <= film.n_frames <= 31
    film.seek(film.n_frames - 1)
    assert film.info["duration"] == 1500
    dark = torch.tensor(list(film.convert("L").tobytes())).view(film.size[::-1]) < 128
    assert 0 < dark.sum() < 30                                          # one dot, in the middle
    assert (dark.nonzero().double().mean(0) - torch.tensor(film.size) / 2).abs().max() < 2
    metrics.gif(tmp_path / "b.gif", [randn(0, 100, 2)])
    assert getattr(picture(tmp_path / "b.gif"), "n_frames", 1) == 1
    metrics.gif(tmp_path / "c.gif", iter([randn(0, 100, 2), NOT_FINITE]))
    picture(tmp_path / "c.gif")


def test_shade_puts_a_point_where_it_is():                              # row upside down, x and y swapped
    row, column = torch.from_numpy(metrics._shade([[2.005, -1.005]], 270)).double().nonzero().double().mean(0)
    assert abs(column - (2.005 + 2.7) / 5.4 * 270) < 1 and abs(row - (1.005 + 2.7) / 5.4 * 270) < 1


def test_curves(tmp_path):
    rows = [{"step": i, "loss": 2 / (i + 1), "tensor": torch.tensor(float(i)), "flat": 1e-3} for i in range(200)]
    rows += [{"step": 200, "loss": math.nan, "rare": 3.0}, {"step": 201, "none": math.inf}]
    metrics.curves_picture(tmp_path / "a.png", rows, {"loss": 0.1, "absent": 3})
    picture(tmp_path / "a.png")
    metrics.curves_picture(tmp_path / "b.png", [{"step": 0, "loss": 1.0}], {"loss": torch.tensor(1.0)})
    picture(tmp_path / "b.png")
    metrics.curves_picture(tmp_path / "c.png", [])
    assert (tmp_path / "c.png").exists()


@given(seeds, st.integers(1, 200))
def test_smoothing_keeps_constants_and_stays_between_the_extremes(seed, n):     # right for right - left
    raw = randn(seed, n).numpy()
    smooth = metrics._smooth(raw)
    assert smooth.shape == raw.shape and smooth.min() >= raw.min() - 1e-9 and smooth.max() <= raw.max() + 1e-9
    assert abs(metrics._smooth(0 * raw + 3) - 3).max() < 1e-12
    middle = n // 2
    reach = min(n // 40, middle // 3)
    assert smooth[middle] == pytest.approx(raw[middle - reach:middle + reach + 1].mean())


def test_a_picture_that_fails_leaves_the_old_one(tmp_path):             # write straight to the path
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def save(handle):
        handle.write(b"half of the new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        metrics._write(path, save)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    metrics._write(path, lambda handle: handle.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
