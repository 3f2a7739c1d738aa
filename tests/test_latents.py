"""Properties of what is said of a latent space. Each was seen to fail with the guarded line broken (the comment says which)."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import latents

seeds = st.integers(0, 2**31)
close = torch.testing.assert_close


def rng(seed):
    return torch.Generator().manual_seed(seed)


def randn(seed, *shape):
    return torch.randn(*shape, generator=rng(seed))


def randint(seed, high, *shape):
    return torch.randint(high, shape, generator=rng(seed))


def grid(*sizes):
    return torch.cartesian_prod(*map(torch.arange, sizes))


def blobs(seed, classes, each, dim=3, apart=8.0):
    labels = torch.arange(classes).repeat_interleave(each)
    return apart * torch.eye(classes, dim)[labels] + randn(seed, classes * each, dim), labels


# ---- the mutual information gap


def log_normal(z, mu, logvar):
    return torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z)


@given(seeds, st.integers(1, 12), st.integers(1, 9), st.integers(1, 40))
def test_density_of_a_mixture_equals_brute_force(seed, N, S, block):    # 1.0 for sqrt(0.5); sum for @ scale; pi for 2 pi
    mu, logvar, z = randn(seed, N), randn(seed + 1, N), randn(seed + 2, S)
    want = log_normal(z[:, None], mu, logvar).logsumexp(1) - math.log(N)
    close(latents._log_density(z, mu, (-0.5 * logvar).exp(), block), want)


def test_density_far_from_most_components_is_that_of_the_near_one():    # clamp_max_(2) for 80
    mu = torch.tensor([0.0, 1000.0, 2000.0])
    got = latents._log_density(torch.tensor([1003.0]), mu, torch.full((3,), 2.0))
    close(got, log_normal(torch.tensor([1003.0]), mu[1], torch.tensor(-2 * math.log(2))) - math.log(3))


@given(seeds, st.integers(5, 14), st.integers(1, 4), st.integers(1, 3), st.integers(2, 14))
def test_information_is_its_definition_point_by_point(seed, N, Z, F, samples):  # at for rows[at]; all points for members; N for S
    mu, logvar = randn(seed, N, Z), randn(seed + 1, N, Z) - 2
    factors = torch.cat([randint(seed + 2, 3, N - 2, F), torch.tensor([[0], [1]]).expand(2, F)])
    g = rng(7)
    rows = torch.randperm(N, generator=g)[:samples]
    z = mu + (0.5 * logvar).exp() * torch.randn(N, Z, generator=g)
    value = torch.zeros(Z, F)
    for n, j, k in itertools.product(rows.tolist(), range(Z), range(F)):
        terms = log_normal(z[n, j], mu[:, j], logvar[:, j]).exp()
        value[j, k] += (terms[factors[:, k] == factors[n, k]].mean() / terms.mean()).log() / len(rows)
    _, gaps, information = latents.mig_chen(mu, logvar, factors, samples=samples, seed=7)
    close(information, value.clamp_min(0))
    share = (factors[:, None] == factors).double().mean(0)              # of each point's own value
    best = torch.cat([information, torch.zeros(2, F)]).sort(0).values
    close(gaps, (best[-1] - best[-2]) / -share[rows].log().mean(0))


def test_information_of_gaussians_given_the_factor_is_that_of_quadrature():     # logvar for 0.5 * logvar in the draw, in the scale
    N, centres, spreads = 3000, torch.tensor([-1.0, 0.2, 1.5, 1.6]), torch.tensor([0.3, 0.6, 0.2, 1.0])
    v = torch.repeat_interleave(torch.arange(4), torch.tensor([300, 600, 900, 1200]))
    w = randint(0, 3, N)
    axis = torch.linspace(-8, 9, 20001)
    joint = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None] * log_normal(axis, centres[:, None], 2 * spreads.log()[:, None]).exp()
    ratio = (joint / (joint.sum(0) * torch.tensor([[0.1], [0.2], [0.3], [0.4]]))).clamp_min(1e-300).log()
    cell = axis[1] - axis[0]
    exact = (joint * ratio).sum() * cell
    error = ((joint * ratio.square()).sum() * cell - exact**2).sqrt() / math.sqrt(N)
    mu = torch.stack([torch.zeros(N), centres[v], 2.0 * w], 1)          # three latents, two factors
    logvar = torch.stack([torch.zeros(N), 2 * spreads[v].log(), torch.full((N,), -8.0)], 1)
    _, _, information = latents.mig_chen(mu, logvar, torch.stack([v, w], 1), [4, 3])
    assert information.shape == (3, 2)
    assert abs(information[1, 0] - exact) < 5 * error and error < 0.02
    assert abs(information[2, 1] - math.log(3)) < 1e-3
    assert information[[0, 0, 1, 2], [0, 1, 1, 0]].max() < 5e-3


@given(seeds, st.integers(10, 60), st.integers(1, 4), st.integers(1, 3))
def test_both_estimators_agree_on_latents_of_a_few_values(seed, N, Z, F):       # bins * values in the joint; the share for its log; + H(joint)
    mu, factors = randint(seed, 6, N, Z).double(), randint(seed + 1, 4, N, F)
    factors[:4] = torch.arange(4)[:, None]
    chen = latents.mig_chen(mu, torch.full((N, Z), -12.0), factors, [4] * F)
    bins = latents.mig_bins(mu, factors)
    for a, b in zip(chen, bins):
        close(a, b, rtol=0, atol=1e-9)
    table = torch.stack([torch.stack([((mu[:, 0] == a) & (factors[:, 0] == b)).double().mean() for b in range(4)]) for a in range(6)])
    independent = table.sum(1, keepdim=True) * table.sum(0)
    close(bins[2][0, 0], torch.special.xlogy(table, table / independent).nansum())


@given(seeds, st.integers(8, 60), st.integers(1, 5), st.integers(1, 4), st.floats(-6, 1))
def test_information_is_bounded_by_the_entropy_and_the_gap_by_one(seed, N, Z, F, width):    # clamp_min dropped
    mu, factors = randn(seed, N, Z), randint(seed + 1, 3, N, F)
    factors[:3] = torch.arange(3)[:, None]
    entropy = torch.stack([torch.distributions.Categorical(c.bincount().double()).entropy() for c in factors.T])
    for mig, gaps, information in (latents.mig_chen(mu, torch.full((N, Z), width), factors), latents.mig_bins(mu, factors)):
        assert information.min() >= 0 and (information <= entropy + 1e-9).all()
        assert gaps.shape == (F,) and gaps.min() >= 0 and gaps.max() <= 1 + 1e-9
        close(mig, gaps.mean())


def both(mu, factors, sizes, logvar=-9.0):
    return latents.mig_chen(mu, torch.full_like(mu, logvar), factors, sizes), latents.mig_bins(mu, factors, sizes=sizes)


def test_a_latent_for_each_factor_scores_one_and_axes_are_not_confused():      # information.T returned; topk(2, 1)
    factors = grid(1, 3, 5, 4)
    mu = torch.cat([torch.zeros(60, 2), factors[:, [2, 3, 1]].double(), torch.zeros(60, 1)], 1)         # six latents, three factors
    for mig, gaps, information in both(mu, factors, [1, 3, 5, 4]):
        close(gaps, torch.ones(3))
        close(mig, torch.tensor(1.0))
        want = torch.zeros(6, 3)
        want[[4, 2, 3], [0, 1, 2]] = torch.tensor([3.0, 5.0, 4.0]).log()
        close(information, want, atol=1e-9, rtol=0)


def test_what_latents_that_know_nothing_score():                        # the second best dropped
    factors = grid(3, 4, 5).repeat(20, 1)
    shuffled = factors[torch.randperm(len(factors), generator=rng(0))].double()
    constant, twice = torch.zeros(len(factors), 3), torch.cat([factors, factors], 1).double()
    for mig, _, information in both(constant, factors, [3, 4, 5]):
        assert mig.abs() < 1e-9 and information.max() < 1e-9
    for mig, _, _ in both(shuffled, factors, [3, 4, 5]):
        assert mig < 0.02
    for mig, gaps, information in both(twice, factors, [3, 4, 5]):      # known twice: no latent stands for a factor
        assert mig.abs() < 1e-9 and gaps.max() < 1e-9 and information[:3].diagonal().min() > 1.09


def test_the_gap_compares_with_the_second_best_of_one_latent_too():     # the row of zeros dropped
    mig, gaps, _ = latents.information_gap(torch.tensor([[0.5, 0.2]]), torch.tensor([1.0, 0.5]))
    close(gaps, torch.tensor([0.5, 0.4]))
    mig, gaps, _ = latents.information_gap(torch.tensor([[0.5, 0.2], [0.9, 0.3], [0.1, 0.7]]), torch.tensor([1.0, 2.0]))
    close(gaps, torch.tensor([0.4, 0.2]))
    close(mig, torch.tensor(0.3))


@given(seeds, st.integers(-3, 3), st.permutations(range(4)))
@settings(max_examples=10)
def test_scale_sign_and_order_of_the_latents_do_not_matter(seed, power, order):     # 0.5 for -0.5 in the scale
    factors = grid(3, 5).repeat(20, 1)
    mu = torch.cat([factors.double(), randn(seed, 300, 2)], 1) + 0.3 * randn(seed + 1, 300, 4)
    logvar = randn(seed + 2, 300, 4) - 4
    mig, gaps, information = latents.mig_chen(mu, logvar, factors)
    scaled = latents.mig_chen(2.0**power * mu + 5, logvar + 2 * power * math.log(2), factors)
    close(scaled[2], information)
    moved = latents.mig_chen(-mu[:, order], logvar[:, order], factors)          # other noise on each latent
    close(moved[2], information[list(order)], rtol=0, atol=0.08)
    close(latents.mig_bins(-(2.0**power) * mu[:, order], factors)[2], latents.mig_bins(mu, factors)[2][list(order)])


def test_bins_are_of_equal_width_between_the_extremes():                # bins for bins + 1; right=False
    v = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])[:, None]
    mu = torch.tensor([0.0, 0.1, 0.2, 0.5, 0.6, 0.9, 1.2, 10.0])[:, None]      # but one in the first of 5
    share = torch.tensor([0.375, 0.25, 0.25, 0.125])                    # joint: (first, 0), (first, 1), (first, 2), (last, 2)
    H = lambda p: -(p * p.log()).sum()
    want = H(torch.tensor([7, 1]) / 8) + H(torch.tensor([3, 2, 3]) / 8) - H(share)
    close(latents.mig_bins(mu, v, bins=5)[2], want.view(1, 1))
    edge = torch.tensor([0.0, 1.0, 2.0, 2.0])[:, None]                  # the inner edge belongs to the right
    close(latents.mig_bins(edge, torch.tensor([0, 1, 1, 1])[:, None], bins=2)[1], torch.ones(1))


def test_factors_of_one_value_are_left_out_and_bad_ones_named():        # kept dropped; sizes >= 1; factors > sizes
    mu, logvar, factors = randn(0, 12, 2), torch.zeros(12, 2), torch.cat([torch.zeros(12, 1).long(), grid(3, 4)], 1)
    close(latents.mig_chen(mu, logvar, factors)[2], latents.mig_chen(mu, logvar, factors[:, 1:], [3, 4])[2])
    close(latents.mig_chen(mu, logvar, factors, [1, 3, 4])[1], latents.mig_chen(mu, logvar, factors)[1])
    assert latents.mig_bins(mu, factors)[2].shape == (2, 2)
    for bad, sizes, message in ((factors, [2, 3, 4], "two values"), (factors, [1, 3, 3], "grid"), (factors - 1, [1, 3, 4], "grid"),
                                (factors, [1, 3], "grid"), (factors[:5], None, "expected latents"), (factors[:, :1], None, "two values")):
        with pytest.raises(ValueError, match=message):
            latents.mig_chen(mu, logvar, bad, sizes)
    with pytest.raises(ValueError, match="not finite"):
        latents.mig_bins(mu / 0, factors)


def test_disentanglement_names_each_factor_beside_its_floor():          # floor for value; names of all factors
    factors = grid(1, 3, 4).repeat(50, 1)
    mu = torch.stack([factors[:, 2].double(), randn(0, 600)], 1)        # the last factor is known, the other is not
    out = latents.disentanglement(mu, torch.full_like(mu, -4.0), factors, [1, 3, 4], ["color", "shape", "x"])
    assert list(out) == ["mig_chen", "mig_bins", "mig_chen_shape", "mig_chen_x"]
    assert all(m["better"] == "higher" and m["floor"] < 0.05 for m in out.values()), out
    assert out["mig_chen_x"]["value"] > 0.95 > 0.1 > out["mig_chen_shape"]["value"]
    assert out["mig_chen"]["value"] == pytest.approx((out["mig_chen_x"]["value"] + out["mig_chen_shape"]["value"]) / 2)
    assert out["mig_bins"]["value"] == pytest.approx(float(latents.mig_bins(mu, factors)[0]))


def test_no_global_generator_is_touched():                              # generator= dropped
    torch.manual_seed(5)
    state = torch.get_rng_state()
    x, labels = blobs(0, 3, 20)
    latents.mig_chen(x, 0 * x, labels[:, None]), latents.clustering(x, labels), latents.tsne(x, 5, 4)
    latents.disentanglement(x, 0 * x, labels[:, None], [3], ["class"])
    assert torch.equal(state, torch.get_rng_state())


# ---- clusters


@given(seeds, st.integers(3, 30), st.integers(1, 3), st.integers(1, 6))
def test_lloyd_never_raises_the_inertia(seed, N, D, K):                 # one step only; counts + 1; the centre of the empty at 0
    x = randn(seed, N, D)
    start = randn(seed + 1, 1, D).expand(K, D) if seed % 2 else 4 * randn(seed + 1, K, D)      # equal centres: all but one empty
    rows = list(latents.lloyd(x, start))
    for labels, centres, inertia in rows:
        square = (x[:, None] - centres).square().sum(-1)
        assert inertia == pytest.approx(square.min(1).values.sum().item())
        close(square.gather(1, labels[:, None])[:, 0], square.min(1).values)
    inertia = [row[2] for row in rows]
    assert all(b <= a + 1e-9 for a, b in zip(inertia, inertia[1:]))
    labels, centres, _ = rows[-1]
    for k in labels.unique():
        close(centres[k], x[labels == k].mean(0))
    if K <= N:
        assert len(labels.unique()) == K


@given(seeds, st.integers(1, 6))
def test_k_means_starts_on_points_apart(seed, K):                       # the distance to the last alone; chosen[0]
    x = torch.arange(6.0)[torch.cat([torch.arange(6), torch.zeros(200, dtype=torch.long)])][:, None]
    start = latents._spread(x, K, rng(seed))
    assert len(start.unique()) == K


def test_k_means_plus_plus_draws_by_square_distance():                  # distance for its square
    x = torch.tensor([[0.0], [1.0], [3.0]])
    starts = torch.stack([latents._spread(x, 2, rng(i))[:, 0] for i in range(3000)])
    after_0 = starts[starts[:, 0] == 0, 1]
    assert abs((after_0 == 3).double().mean() - 0.9) < 5 * math.sqrt(0.09 / len(after_0))


def test_k_means_finds_what_lies_apart_and_repeats_itself():            # > for <; the last one; ones_like dropped
    x, truth = blobs(1, 5, 30, 6)
    labels, centres, inertia = latents.kmeans(x, 5, seed=3)
    assert latents.matched(truth, labels)[0] == 1
    assert inertia == pytest.approx(sum(((x[truth == k] - x[truth == k].mean(0)) ** 2).sum().item() for k in range(5)))
    again = latents.kmeans(x.float().numpy(), 5, seed=3)
    assert torch.equal(labels, again[0])
    y = randn(2, 80, 2)
    values = [latents.kmeans(y, 9, restarts=r)[2] for r in (1, 2, 4, 8, 16)]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    assert latents.kmeans(y, 80)[2] == 0 and latents.kmeans(torch.ones(7, 2), 3)[2] == 0
    close(latents.kmeans(y, 1)[1][0], y.mean(0))
    for k in (0, 81):
        with pytest.raises(ValueError, match="1 to 80 clusters"):
            latents.kmeans(y, k)


@given(seeds, st.integers(4, 25), st.integers(2, 4), st.integers(1, 30))
def test_silhouette_equals_brute_force(seed, N, K, block):              # - 1 dropped; amax; minimum(a, b); one alone counts
    x, labels = randn(seed, N, 2), randint(seed + 1, K, N) * 3
    labels[0], labels[1] = 99, 0                                        # 99 is alone
    d, scores = (x[:, None] - x).square().sum(-1).sqrt(), []
    for i in range(N):
        mine = (labels == labels[i]) & (torch.arange(N) != i)
        if mine.any():
            a = d[i, mine].mean()
            b = min(d[i, labels == k].mean() for k in labels.unique() if k != labels[i])
            scores.append(((b - a) / max(a, b)).item())
        else:
            scores.append(0.0)
    got = latents.silhouette(x, labels, block)
    assert got == pytest.approx(sum(scores) / N) and -1 <= got <= 1


def test_silhouette_of_clusters_apart_and_of_equal_points():            # clamp_min dropped: NaN
    x, labels = blobs(0, 3, 10, apart=1e4)
    assert latents.silhouette(x, labels) > 0.999
    assert latents.silhouette(torch.ones(6, 2), [0, 0, 0, 1, 1, 1]) == 0
    with pytest.raises(ValueError, match="two clusters"):
        latents.silhouette(x, 0 * labels)


@pytest.mark.parametrize("n, more", [(1, 0), (1, 2), (2, 1), (3, 0), (4, 0), (4, 2), (5, 0)])
def test_assignment_is_the_best_of_all(n, more):                        # + v; u[i] += 0; v += length; u of row 0 left out
    every = torch.tensor(list(itertools.permutations(range(n + more), n)))
    for seed in range(60):
        cost = randint(seed, 4, n, n + more).double() - 2 if seed % 3 == 0 else 10 * randn(seed, n, n + more)     # ties, too
        columns = latents.assignment(cost)
        assert columns.shape == (n,) and len(set(columns.tolist())) == n
        close(cost[torch.arange(n), columns].sum(), cost[torch.arange(n), every].sum(1).min())


@given(seeds)
@settings(max_examples=10)
def test_assignment_undoes_a_permutation(seed):                         # row 0 for i at the end of a path
    order = torch.randperm(40, generator=rng(seed))
    cost = torch.rand(40, 40, generator=rng(seed + 1))
    cost[torch.arange(40), order] -= 50.0 * torch.rand(40, generator=rng(seed + 2))
    cost[torch.arange(40), order] -= 1
    assert torch.equal(latents.assignment(cost), order)
    for bad in (torch.zeros(3, 2), torch.tensor([[math.nan]])):
        with pytest.raises(ValueError, match="finite costs"):
            latents.assignment(bad)


@given(seeds, st.integers(1, 40), st.integers(1, 6))
def test_confusion_and_matching(seed, N, K):                            # predicted * K + labels; matrix for -matrix
    labels, clusters = randint(seed, K, N), randint(seed + 1, K, N)
    matrix = latents.confusion(labels, clusters)
    close(matrix.sum(1), labels.bincount(minlength=len(matrix)))
    close(matrix.sum(0), clusters.bincount(minlength=len(matrix)))
    close(matrix[labels[0], clusters[0]], ((labels == labels[0]) & (clusters == clusters[0])).sum())
    accuracy, renamed = latents.matched(labels, clusters)
    assert accuracy >= 1 / len(matrix) - 1e-12
    close(renamed.sum(1), matrix.sum(1))
    names = torch.randperm(K, generator=rng(seed + 2))
    assert latents.matched(labels, names[clusters])[0] == pytest.approx(accuracy)
    assert latents.matched(labels, names[labels])[0] == 1
    best = max((torch.tensor(p)[clusters] == labels).double().mean() for p in itertools.permutations(range(K))) if K < 6 else accuracy
    assert accuracy == pytest.approx(float(best))
    assert renamed.trace().item() == pytest.approx(accuracy * N)


def test_what_is_no_list_of_classes_is_refused():                       # the checks dropped
    for a, b in (([0, 1], [0]), ([0, -1], [0, 0]), ([], [])):
        with pytest.raises(ValueError, match="two lists of classes"):
            latents.confusion(a, b)


def test_clustering_stands_beside_its_floor():                          # z for other, twice; labels for labels[order]
    z, labels = blobs(0, 4, 40, 4)
    out, matrix = latents.clustering(z, labels)
    assert torch.equal(matrix, 40 * torch.eye(4, dtype=torch.long))
    assert out["cluster_accuracy"]["value"] == 1 and 0.25 <= out["cluster_accuracy"]["floor"] < 0.4
    assert out["silhouette"]["value"] > 0.5 and abs(out["silhouette"]["floor"]) < 0.1
    assert {m["better"] for m in out.values()} == {"higher"}
    noise = randn(1, 160, 2)
    worse, _ = latents.clustering(noise, labels, other=z)
    assert worse["cluster_accuracy"]["floor"] == 1 and worse["cluster_accuracy"]["value"] < 0.5
    assert worse["silhouette"]["floor"] == out["silhouette"]["value"]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any))
def test_perplexity_lies_between_one_and_the_entries_used(counts):      # counts.max() for the sum
    share, perplexity = latents.codebook(counts)
    used = sum(c > 0 for c in counts)
    assert share == pytest.approx(used / len(counts)) and 1 - 1e-9 <= perplexity <= used + 1e-9
    assert latents.codebook([3 * c for c in counts] + [0])[1] == pytest.approx(perplexity)
    p = [c / sum(counts) for c in counts if c]
    assert perplexity == pytest.approx(math.prod(q**-q for q in p))


def test_codebook_of_equal_counts_and_of_none():                        # counts > 1; the check dropped
    assert latents.codebook(torch.full((8,), 5)) == pytest.approx((1.0, 8.0))
    assert latents.codebook([0, 1, 0, 0]) == (0.25, 1.0)                # chosen once is used
    for bad in ([0, 0], [3, -1], [[1]]):
        with pytest.raises(ValueError, match="counts"):
            latents.codebook(bad)


# ---- maps in the plane


@given(seeds, st.integers(2, 12), st.integers(1, 6))
def test_pca_with_all_components_gives_the_points_back(seed, N, D):     # x for x - mean; N - 1; sign dropped
    x = randn(seed, N, D) * torch.arange(1, D + 1) + 3
    k = min(N, D)
    scores, mean, components, variances = latents.pca(x, k)
    close(mean + scores @ components, x)
    close(components @ components.T, torch.eye(k))
    close(variances, torch.linalg.eigvalsh(torch.cov(x.T, correction=0).view(D, D)).flip(0)[:k], atol=1e-9, rtol=1e-6)
    assert (variances.diff() <= 1e-9).all()
    largest = components.abs().argmax(1, keepdim=True)
    assert (components.gather(1, largest) > 0).all()
    few = latents.pca(x, 1)
    close(few[0], scores[:, :1])
    close((x - few[1] - few[0] @ few[2]).square().sum() / N, variances[1:].sum())        # what is left out, no more
    assert latents.pca(randn(seed, 5, 3))[0].shape == (5, 2)            # of a plane
    for bad in (0, k + 1):
        with pytest.raises(ValueError, match=f"1 to {k} components"):
            latents.pca(x, bad)


@given(seeds, st.integers(6, 25), st.integers(1, 4), st.floats(-3, 3), st.floats(0, 1))
def test_neighbours_have_the_perplexity_asked_for_and_are_gaussian(seed, N, D, scale, share):  # log2; flat turned; d.sqrt(); p + p
    x, perplexity = 10**scale * randn(seed, N, D), 1.2 + share * (N - 2.5)
    p = latents.neighbours(x, perplexity)
    close(p.sum(1), torch.ones(N))
    close((-torch.special.xlogy(p, p)).sum(1).exp(), torch.full((N,), perplexity), rtol=1e-6, atol=1e-6)
    d = (x[:, None] - x).square().sum(-1)
    for i in range(N):
        at = (p[i] > 1e-20).nonzero()[:, 0]
        d_i, log_p = d[i, at] - d[i, at].mean(), p[i, at].log() - p[i, at].log().mean()
        close(log_p, (log_p @ d_i / (d_i @ d_i)) * d_i, rtol=1e-5, atol=1e-6)            # log p is linear in |x_i - x_j|^2
    P = latents.affinities(x, perplexity)
    close(P, P.T)
    close(P.sum(), torch.tensor(1.0))
    assert P.min() >= 0 and P.diagonal().abs().max() == 0
    close(P[0, 1], (p[0, 1] + p[1, 0]) / (2 * N))


def test_perplexities_at_the_edge_and_beyond():                         # < len(x); 1 < perplexity
    close(latents.neighbours(torch.tensor([[0.0], [1.0], [3.0], [7.0]]), 1.0).argmax(1), torch.tensor([1, 0, 1, 2]))
    for bad in (0.5, 9.0, 30.0):
        with pytest.raises(ValueError, match=r"lies in \[1, 9\)"):
            latents.affinities(randn(0, 10, 2), bad)


@given(seeds, st.integers(4, 9))
@settings(max_examples=10)
def test_gradient_of_tsne_equals_finite_differences(seed, N):           # 2 for 4; P + q; w dropped
    P, y, h = latents.affinities(randn(seed, N, 3), 2.0), randn(seed + 1, N, 2), 1e-5
    gradient = latents.tsne_gradient(P, y)
    for i, c in itertools.product(range(N), range(2)):
        step = torch.zeros(N, 2)
        step[i, c] = h
        slope = (latents.tsne_kl(P, y + step) - latents.tsne_kl(P, y - step)) / (2 * h)
        assert gradient[i, c].item() == pytest.approx(slope, abs=1e-7, rel=1e-5)
    close(gradient.sum(0), torch.zeros(2))                               # nothing pushes the whole map


@given(seeds, st.integers(4, 8))
@settings(max_examples=10)
def test_kl_of_tsne_equals_brute_force(seed, N):                        # w not normalised; 1 on the diagonal
    P, y = latents.affinities(randn(seed, N, 3), 2.0), randn(seed + 1, N, 2)
    pairs = [(i, j) for i in range(N) for j in range(N) if i != j]
    w = {(i, j): 1 / (1 + (y[i] - y[j]).square().sum().item()) for i, j in pairs}
    want = sum(P[i].tolist()[j] * (math.log(P[i, j]) - math.log(w[i, j] / sum(w.values()))) for i, j in pairs)
    assert latents.tsne_kl(P, y) == pytest.approx(want) and want >= 0


@pytest.mark.parametrize("seed", range(3))
def test_tsne_falls_and_keeps_classes_together(seed):                   # + for - rate; gains turned; early for late
    x, labels = blobs(seed, 4, 25, 10)
    P = latents.affinities(x, 8.0)
    falls = [latents.tsne(x, 8.0, steps, seed)[1] for steps in (10, 40, 100, 500)]
    assert falls == sorted(falls, reverse=True) and falls[-1] < 0.4 * falls[0], falls
    y, kl = latents.tsne(x, 8.0, seed=seed)
    assert y.shape == (100, 2) and kl == pytest.approx(latents.tsne_kl(P, y))
    assert latents.silhouette(y, labels) > 0.6 and y.mean(0).abs().max() < 1e-9
    assert torch.equal(y, latents.tsne(x, 8.0, seed=seed)[0])
    assert latents.tsne_gradient(P, y).abs().max() < 1e-4               # nearly at rest


@pytest.mark.parametrize("x", [torch.linspace(0, 1, 30)[:, None], torch.zeros(20, 3), torch.eye(3)[torch.arange(24) % 3]],
                         ids=["a line", "one point", "three points"])
def test_tsne_of_degenerate_points_is_a_map(x):                         # the noise at the start dropped; clamp_min(1e-30) dropped
    y, kl = latents.tsne(x, 5.0, 200)
    assert y.isfinite().all() and math.isfinite(kl)
    assert torch.pdist(y).min() > 0                                     # equal points part


# ---- directions


@given(seeds, st.integers(1, 4), st.integers(1, 3))
def test_attribute_vectors_are_the_coefficients_of_a_linear_truth(seed, Z, A):      # a not centred
    attributes = torch.cat([grid(*[2] * A).view(-1, A), randint(seed, 2, 40, A)])
    truth, base = randn(seed + 1, A, Z), randn(seed + 2, Z)
    close(latents.attribute_vectors(base + attributes.double() @ truth, attributes), truth)
    close(latents.attribute_vectors(base + attributes.double() @ truth, attributes.bool()), truth)


@given(seeds, st.integers(4, 30))
def test_one_attribute_moves_by_the_difference_of_means(seed, N):       # a.sum(0) for (1 - a).sum(0)
    z, a = randn(seed, N, 3), randint(seed + 1, 2, N, 2)
    a[:4] = grid(2, 2)
    for k in range(2):
        want = z[a[:, k] == 1].mean(0) - z[a[:, k] == 0].mean(0)
        close(latents.attribute_vectors(z, a[:, k:k + 1])[0], want)
        close(latents.attribute_vectors(z, a, partial=False)[k], want)


def test_what_comes_with_another_attribute_is_not_counted_twice():      # partial=False as the default
    g = rng(0)
    male = torch.rand(4000, generator=g) < 0.5
    beard = male & (torch.rand(4000, generator=g) < 0.7)                # only men
    z = torch.stack([2.0 * male, 1.0 * beard], 1) + 0.5 * torch.randn(4000, 2, generator=g)
    a = torch.stack([male, beard], 1)
    close(latents.attribute_vectors(z, a), torch.tensor([[2.0, 0.0], [0.0, 1.0]]), rtol=0, atol=0.12)
    assert latents.attribute_vectors(z, a, partial=False)[1, 0] > 1.3   # a beard would make a man


def test_attributes_without_a_direction_are_refused():                  # the checks dropped
    z, a = randn(0, 6, 2), torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0]])
    for bad, message in ((a, "determine"), (0 * a, "same for all"), (2 * a, "0 or 1"), (a[:3], "0 or 1")):
        with pytest.raises(ValueError, match=message):
            latents.attribute_vectors(z, bad)
    assert latents.attribute_vectors(z, a, partial=False).shape == (2, 2)


def test_a_traversal_moves_one_latent_a_row():                          # row[j] for row[:, j]
    z = torch.arange(4.0)
    out = latents.traversals(z, [2, 0], [-1, 5, 9])
    assert out.shape == (2, 3, 4) and torch.equal(z, torch.arange(4.0))
    close(out[0], torch.tensor([[0.0, 1, -1, 3], [0, 1, 5, 3], [0, 1, 9, 3]]))
    close(out[1, :, 0], torch.tensor([-1.0, 5, 9]))
    close(out[1, :, 1:], z[1:].expand(3, 3))


# ---- pictures


def picture(path):
    Image.open(path).verify()
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).long()


def close_to(image, colour, within=12):
    return ((image - torch.tensor(latents._rgb(colour))).abs() <= within).all(-1)


@pytest.mark.parametrize("eye", ["normal", "protan", "deutan", "tritan"])
def test_colours_stay_apart(eye):                                       # two colours nearly alike
    matrix = {"normal": torch.eye(3),                                   # Machado et al. 2009, severity 1
              "protan": torch.tensor([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
              "deutan": torch.tensor([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
              "tritan": torch.tensor([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]])}[eye]
    rgb = torch.tensor([latents._rgb(c) for c in (*latents.COLOURS, latents.PAPER)]) / 255
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ matrix.double().T
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear.clamp(0, 1) @ to_xyz.T / torch.tensor([0.9505, 1.0, 1.089])
    f = torch.where(xyz > 0.008856, xyz.clamp_min(1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116)
    lab = torch.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
    assert torch.pdist(lab).min() > 15


def test_scatter_picture_shows_each_class_and_its_name(tmp_path):       # one colour for all; text always; points not finite kept
    x, labels = blobs(0, 3, 50, 2)
    x[0], x[1] = math.nan, math.inf
    latents.scatter_picture(tmp_path / "new" / "a.png", x, labels, ["zero", "one", "two"], "a map")
    image = picture(tmp_path / "new" / "a.png")
    for c in latents.COLOURS[:3]:
        assert close_to(image, c, 40).sum() > 100
    assert close_to(image, latents.COLOURS[3], 20).sum() < 100
    latents.scatter_picture(tmp_path / "d.png", x[2:], labels[2:], ["zero", "one", "two"], "a map")
    assert torch.equal(image, picture(tmp_path / "d.png"))
    latents.scatter_picture(tmp_path / "b.png", x.numpy())              # no labels: one colour, no text
    assert close_to(picture(tmp_path / "b.png"), latents.INK).sum() == 0
    latents.scatter_picture(tmp_path / "c.png", x * math.nan, labels)
    picture(tmp_path / "c.png")


@pytest.mark.parametrize("levels, channels", [(2, 1), (256, 3), (None, 1), (None, 4)])
def test_grid_picture_puts_each_image_in_its_place(tmp_path, levels, channels):     # i % R; 256 for levels
    R, C, H, W = 3, 4, 12, 9
    x = torch.zeros(R, C, channels, H, W)
    if levels is None:
        x = 0 * x - 1
    else:
        x = x.to(torch.uint8)
    x[1, 2, :] = 1 if levels is None else levels - 1
    latents.grid_picture(tmp_path / "a.png", x, list("abc"), ["0", "1", "2", "3"], levels or 256, "edits")
    image = picture(tmp_path / "a.png")
    dark = (image < 5).all(-1)
    rows, columns = dark.any(1).nonzero()[:, 0], dark.any(0).nonzero()[:, 0]
    top, left, height, width = rows[0], columns[0], rows[-1] - rows[0], columns[-1] - columns[0]
    for r, c in itertools.product(range(R), range(C)):
        y, z = int(top + (r + 0.5) * height / R), int(left + (c + 0.5) * width / C)
        assert image[y, z].min() == (255 if (r, c) == (1, 2) else 0)
    assert 0.9 < height / width / (R * H / (C * W)) < 1.1
    latents.grid_picture(tmp_path / "b.png", x.numpy(), levels=levels or 256)
    assert picture(tmp_path / "b.png").shape[1] < image.shape[1]        # no labels


def test_confusion_picture_shows_what_is_right_in_ink_and_what_is_wrong_in_the_accent(tmp_path):   # accent, ink; .sum(0)
    matrix = torch.tensor([[90, 0, 0], [0, 0, 30], [60, 0, 60]])
    latents.confusion_picture(tmp_path / "a.png", matrix, ["a", "b", "c"], "k-means", "cluster")
    image = picture(tmp_path / "a.png")
    ink, wrong = (close_to(image, c).nonzero().double().median(0).values for c in (latents.INK, latents.ACCENT))
    assert wrong[0] > ink[0] + 50 and wrong[1] > ink[1] + 100           # (0, 0) above and left of (1, 2)
    latents.confusion_picture(tmp_path / "b.png", torch.eye(25), [f"class {k}" for k in range(25)])
    picture(tmp_path / "b.png")
