"""Properties of the pixel networks. Each was seen to fail with the guarded line broken (the comment says which)."""

import functools
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import metrics
import pixels
from pixels import PixelNetwork, block, nearest

seeds = st.integers(0, 2**31)
SETS = {"block 3": block(2), "block 8": block(3), "block 15": block(4), "nearest 3": nearest(3), "nearest 4": nearest(4),
        "nearest 8": nearest(8), "nearest 15": nearest(15), "left": ((0, 1),), "odd": ((2, -4), (0, 2), (1, 1))}
parents = st.sampled_from(list(SETS.values()))
close = functools.partial(torch.testing.assert_close, atol=1e-9, rtol=1e-9)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def images(n, H, W, seed, p=0.4):
    return (torch.rand(n, H, W, generator=rng(seed)) < p).to(torch.uint8)


def make(shape, offsets, hidden=(), position=False, seed=0, scale=2.0):
    """A network whose every weight says something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PixelNetwork(shape, offsets, hidden, position)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(scale * torch.randn(p.shape) / p.shape[-1] ** 0.5)
    return model


def every(H, W):
    """All 2^(H W) images."""
    return (torch.arange(2 ** (H * W))[:, None] >> torch.arange(H * W) & 1).view(-1, H, W).to(torch.uint8)


def parents_of(i, j, offsets, H, W):
    return [(i - a, j - b) for a, b in offsets if i - a >= 0 and 0 <= j - b < W]


# ---- parents and waves


def test_parents_are_those_of_the_model():                              # k + 1 for k; a == b == 0 let in; b > 0 alone
    for k, count in ((2, 3), (3, 8), (4, 15)):
        assert set(block(k)) == {(a, b) for a in range(k) for b in range(k)} - {(0, 0)} and len(block(k)) == count
        assert block(k) == block(5)[:count]
        assert nearest(count) == nearest(40)[:count] and len(set(nearest(count))) == count
    assert set(nearest(4)) == {(0, 1), (1, 0), (1, 1), (1, -1)}         # PixelCNN's, reach 1
    reach = [math.hypot(*o) for o in nearest(40)]
    assert reach == sorted(reach)


@given(st.integers(1, 9), st.integers(1, 9), parents)
def test_a_wave_holds_no_parent_of_its_own_and_all_come_before(H, W, offsets):   # s - 1; j - t for t; s a - b
    seen, order = set(), pixels.waves(H, W, offsets)
    for wave in order:
        for place in wave.tolist():
            assert all(i * W + j in seen for i, j in parents_of(place // W, place % W, offsets, H, W))
        seen |= set(wave.tolist())
    assert sorted(torch.cat(order).tolist()) == list(range(H * W))


def test_no_order_takes_fewer_waves():                                  # s + 1
    """The longest chain of parents is as long as the waves are many: 55 and 82 of a 28 x 28 image."""
    for name, side, wanted in (("block 3", 28, 55), ("block 8", 28, 55), ("block 15", 28, 55), ("nearest 4", 28, 82),
                               ("nearest 8", 28, None), ("nearest 15", 28, None), ("left", 28, 28)):
        depth = {}
        for i, j in itertools.product(range(side), range(side)):
            depth[i, j] = 1 + max((depth[p] for p in parents_of(i, j, SETS[name], side, side)), default=0)
        count = len(pixels.waves(side, side, SETS[name]))
        assert count == max(depth.values()) and wanted in (None, count), name


@given(parents)
def test_the_slope_is_the_least(offsets):                               # // for the ceiling
    ok = lambda s: all(s * a + b >= 1 for a, b in offsets)
    s = pixels.slope(offsets)
    assert ok(s) and (s == 0 or not ok(s - 1))


@pytest.mark.parametrize("offsets", [((0, 0),), ((0, -1),), ((-1, 2),), ((1, 1), (0, -2))])
def test_a_parent_that_comes_later_is_refused(offsets):
    with pytest.raises(ValueError, match="before its pixel"):
        pixels.slope(offsets)


# ---- contexts, counts


@given(st.integers(1, 5), st.integers(1, 6), parents, seeds)
def test_a_context_is_the_bits_of_the_parents(H, W, offsets, seed):     # left for right in the padding; bits reversed
    x = images(3, H, W, seed)
    codes = pixels.contexts(x, offsets)
    for n, i, j in itertools.product(range(3), range(H), range(W)):
        at = [(i - a, j - b) for a, b in offsets]
        wanted = [int(x[n, p, q]) if 0 <= p and 0 <= q < W else 0 for p, q in at]
        assert pixels.bits(codes[n, i, j][None], len(offsets))[0].tolist() == wanted
        assert int(codes[n, i, j]) == sum(bit << m for m, bit in enumerate(wanted))


@given(st.integers(1, 4), st.integers(1, 5), parents, seeds)
def test_counts_are_of_places_and_contexts(H, W, offsets, seed):        # 0 and 1 swapped; chunks lost
    x, found = images(7, H, W, seed), {}
    codes = pixels.contexts(x, offsets)
    for n, i, j in itertools.product(range(7), range(H), range(W)):
        found.setdefault((int(codes[n, i, j]), i * W + j), [0, 0])[x[n, i, j]] += 1
    code, place, n = pixels.count(x, offsets, rows=3)
    assert {(c, p): m for c, p, m in zip(code.tolist(), place.tolist(), n.tolist())} == found
    K = len(offsets) // 2 + 1
    for where, position in ((place, True), (None, False)):              # place forgotten; a parent too many
        fewer = {}
        for (c, p), m in found.items():
            entry = fewer.setdefault((c % 2**K, p if position else None), [0, 0])
            entry[0], entry[1] = entry[0] + m[0], entry[1] + m[1]
        c_2, p_2, n_2 = pixels.merge(code, where, n, K)
        places = p_2.tolist() if position else [None] * len(c_2)
        assert {(c, p): m for c, p, m in zip(c_2.tolist(), places, n_2.tolist())} == fewer


def test_counts_that_cannot_be_numbered_are_refused():
    with pytest.raises(ValueError, match="60 parents at 16 places"):
        pixels.count(images(1, 4, 4, 0), tuple((1 + k, 0) for k in range(60)))


@given(seeds)
def test_counted_tables_are_the_optimum(seed):                          # xlogy(n, total); 0 log 0 = nan; n_0 forgotten
    n = torch.randint(0, 9, (20, 2), generator=rng(seed))
    best = pixels.optimum(n.double())
    assert (n == 0).any() and best.isfinite()
    logits = (n[:, 1] / n[:, 0]).log().nan_to_num(0.0, 40.0, -40.0)
    close(pixels.nll_of_counts(logits, n), best, atol=1e-6)
    for scale in (0.01, 1.0):
        assert pixels.nll_of_counts(logits + scale * torch.randn(20, generator=rng(seed)), n) > best


@given(seeds)
def test_krichevsky_trofimov_starts_at_a_half(seed):                    # 1 for 1/2; the sign
    n = torch.randint(0, 9, (20, 2), generator=rng(seed)).double()
    close(torch.sigmoid(pixels.krichevsky_trofimov(n)), (n[:, 1] + 0.5) / (n.sum(1) + 1))


@given(parents, seeds, st.booleans())
@settings(max_examples=15)
def test_a_counted_table_measures_other_images(offsets, seed, position):  # a context never seen takes its neighbour's count
    K, seen, asked = len(offsets), images(4, 4, 5, seed), images(3, 4, 5, seed + 1)
    table = {}
    cells = lambda x: ((int(c), k if position else 0, int(v)) for c_, x_ in zip(pixels.contexts(x, offsets), x)
                       for k, (c, v) in enumerate(zip(c_.flatten(), x_.flatten())))
    for c, k, v in cells(seen):
        table.setdefault((c, k), [0.5, 0.5])[v] += 1
    wanted = 0.0
    for c, k, v in cells(asked):
        n = table.get((c, k), [0.5, 0.5])
        wanted -= math.log(n[v] / sum(n))
    counts = [pixels.Counts(c, p if position else None, n, len(x)) for x in (seen, asked)
              for c, p, n in [pixels.count(x, offsets)]]
    if not position:
        counts = [pixels.Counts(*pixels.merge(c.code, None, c.n, K), c.images) for c in counts]
    assert pixels.counted_nll(*counts, K) == pytest.approx(wanted / 3)
    if not position:
        model = pixels.Counted((4, 5), offsets, counts[0].code, counts[0].n)
        assert -model.log_prob(asked).mean().item() == pytest.approx(wanted / 3)
        assert counts[1].nll(model) == pytest.approx(wanted / 3)


# ---- networks

HIDDEN = [(), (6,), (6, 5)]
kinds = st.tuples(parents, st.sampled_from(HIDDEN), st.booleans(), seeds)


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (1, 5), (4, 1)])
@pytest.mark.parametrize("offsets", SETS.values(), ids=SETS)
def test_the_probabilities_of_all_images_sum_to_one(shape, offsets):    # a parent of the pixel's future; its own value
    for hidden, position in itertools.product(HIDDEN, (False, True)):
        model = make(shape, offsets, hidden, position)
        close(model.log_prob(every(*shape)).exp().sum(), torch.tensor(1.0))


@given(kinds)
@settings(max_examples=20)
def test_log_prob_is_the_product_of_the_conditionals(kind):             # the sign; y and x swapped; W for W - 1
    offsets, hidden, position, seed = kind
    model, x = make((3, 5), offsets, hidden, position, seed), images(2, 3, 5, seed)
    layers = [(layer.weight, layer.bias) for layer in model.cpd.layers]
    wanted = torch.zeros(2)
    for n, i, j in itertools.product(range(2), range(3), range(5)):
        at = [(i - a, j - b) for a, b in offsets]
        z = [float(x[n, p, q]) if 0 <= p and 0 <= q < 5 else 0.0 for p, q in at]
        z = torch.tensor(z + [i / 2, j / 4] * position)
        for w, b in layers[:-1]:
            z = (w @ z + b).clamp(min=0)
        p = torch.sigmoid(layers[-1][0] @ z + layers[-1][1])[0]
        wanted[n] += (p if x[n, i, j] else 1 - p).log()
    close(model.log_prob(x), wanted)
    counts = pixels.Counts(*pixels.count(x, offsets), 2)
    assert counts.nll(model) == pytest.approx(-wanted.mean().item())    # through distinct contexts alone
    assert counts.nll(model, rows=4) == pytest.approx(-wanted.mean().item())


@given(kinds, st.integers(0, 19))
@settings(max_examples=20)
def test_a_pixel_moves_its_children_alone(kind, at):                    # any offset off by one
    """Of the conditionals of all pixels those change whose parent it is, no others: causality, and that none is dead."""
    offsets, _, position, seed = kind
    model, x, H, W = make((4, 5), offsets, (), position, seed), images(1, 4, 5, seed), 4, 5
    y, (i, j) = x.clone(), divmod(at, W)
    y[0, i, j] ^= 1
    logits = lambda x: model.logits(pixels.contexts(x, offsets).flatten(), torch.arange(H * W))
    moved = {divmod(k, W) for k in (logits(x) != logits(y)).nonzero()[:, 0].tolist()}
    assert moved == {(p, q) for p in range(H) for q in range(W) if (i, j) in parents_of(p, q, offsets, H, W)}
    assert all(child > (i, j) for child in moved)


@given(st.sampled_from([block(2), block(3), nearest(4)]), st.booleans(), seeds)
@settings(max_examples=10)
def test_linear_is_nested_in_the_networks_with_hidden_layers(offsets, position, seed):   # another activation; no bias
    linear, x = make((3, 4), offsets, (), position, seed), images(2, 3, 4, seed)
    w, b = linear.cpd.layers[0].weight[0], linear.cpd.layers[0].bias
    for hidden in ((2,), (2, 2)):
        model = PixelNetwork((3, 4), offsets, hidden, position)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
            model.cpd.layers[0].weight.copy_(torch.stack([w, -w]))
            model.cpd.layers[0].bias.copy_(torch.cat([b, -b]))          # relu(l) - relu(-l) = l
            for layer in model.cpd.layers[1:-1]:
                layer.weight.copy_(torch.eye(2))
            model.cpd.layers[-1].weight.copy_(torch.tensor([[1.0, -1.0]]))
        close(model.log_prob(x), linear.log_prob(x))


@given(kinds)
@settings(max_examples=20)
def test_the_lookup_is_the_network(kind):                               # position's columns in `first`; a bias twice
    offsets, hidden, position, seed = kind
    model, code = make((3, 4), offsets, hidden, position, seed), torch.arange(2 ** len(offsets))[:100]
    first, places, layers = model.lookup()
    assert (places is None and not layers and first.shape[1] == 1) or position
    for place in (0, 7, 11):
        z = first[code] + (0 if places is None else places[place])
        close(pixels.head(z, layers), model.logits(code, torch.full_like(code, place)))


# ---- sampling


def by_hand(model, u):
    """Raster, one pixel at a time."""
    x, (N, H, W) = torch.zeros(u.shape, dtype=torch.uint8), u.shape
    for i, j in itertools.product(range(H), range(W)):
        code = pixels.contexts(x, model.offsets)[:, i, j]
        x[:, i, j] = u[:, i, j] < torch.sigmoid(model.logits(code, torch.full((N,), i * W + j)))
    return x


@given(st.integers(1, 5), st.integers(1, 6), kinds)
@settings(max_examples=25)
def test_the_wavefront_draws_the_picture_of_the_raster(H, W, kind):     # s - 1; a wave left out; u of another place
    offsets, hidden, position, seed = kind
    model, u = make((H, W), offsets, hidden, position, seed), torch.rand(4, H, W, generator=rng(seed))
    first, places, layers = model.lookup()
    ask = lambda code, place: torch.sigmoid(pixels.head(first[code] + (0 if places is None else places[place, None]), layers))
    raster = pixels.ancestral(ask, u, offsets, torch.arange(H * W).split(1))
    assert torch.equal(raster, pixels.ancestral(ask, u, offsets, pixels.waves(H, W, offsets)))
    assert torch.equal(raster, by_hand(model, u))


@pytest.mark.parametrize("name", ["block 3", "block 15", "nearest 4"])
@pytest.mark.parametrize("hidden, position", [((), False), ((), True), ((4, 3), True)])
def test_samples_have_the_probabilities_of_the_model(name, hidden, position):   # places left out; sigmoid for head
    model, n = make((2, 3), SETS[name], hidden, position, 3), 40_000
    p = model.log_prob(every(2, 3)).exp()
    x = pixels.wavefront_sample_plain(n, (2, 3), SETS[name], *model.lookup(), seed=1)
    found = torch.bincount((x.flatten(1).long() << torch.arange(6)).sum(1), minlength=64) / n
    assert ((found - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()
    assert len(pixels.wavefront_sample_plain(7, (2, 3), SETS[name], *model.lookup(), 1, rows=3)) == 7


def test_a_seed_is_a_picture():
    model = make((4, 4), block(3), (5,), True)
    assert torch.equal(model.sample(50, 3), model.sample(50, 3)) and not torch.equal(model.sample(50, 3), model.sample(50, 4))


# ---- training


@given(seeds, st.sampled_from([block(2), nearest(4)]), st.booleans())
@settings(max_examples=10)
def test_newton_finds_the_optimum_of_the_linear_model(seed, offsets, position):   # the slope's sign; no 1 - p; n_0 for n_1
    x = images(30, 4, 5, seed)
    code, place, n = pixels.count(x, offsets)
    counts, model = pixels.Counts(code, place, n, 30), PixelNetwork((4, 5), offsets, (), position)
    pixels.solve(model, counts)
    loss = pixels.nll_of_counts(model.logits(code, place), n)
    for g in torch.autograd.grad(loss, list(model.parameters())):
        assert g.abs().max() < 1e-4 * len(code)
    for k in range(5):
        other = make((4, 5), offsets, (), position, k, 0.1)
        with torch.no_grad():
            for p, q in zip(other.parameters(), model.parameters()):
                p.add_(q)
        assert counts.nll(other) >= counts.nll(model) >= counts.optimum() - 1e-9


def test_newton_in_parts_and_where_a_weight_would_have_no_end():        # a part lost; nothing bounds w
    n, features = torch.tensor([[9, 0], [0, 9], [3, 1]]), torch.tensor([[1.0, 0, 1], [0, 1, 1], [0, 0, 1]])
    w = pixels.newton(features, n)
    assert w.isfinite().all() and pixels.nll_of_counts(features @ w, n) == pytest.approx(pixels.optimum(n.double()).item(), abs=1e-4)
    features, n = torch.randn(40, 3, generator=rng(0)), torch.randint(1, 9, (40, 2), generator=rng(1))
    close(pixels.newton(features, n, rows=7), pixels.newton(features, n))


def test_newton_where_a_whole_step_goes_too_far():                      # no halving
    g = rng(238)
    features = torch.randn(12, 3, generator=g) * torch.tensor([1.0, 5, 20])
    features[:, 2] = (features[:, 2] / 10).exp()
    n = torch.randint(0, 4, (12, 2), generator=g) * torch.tensor([1, 30])
    w, values = torch.zeros(3), []
    for _ in range(8):                                                  # the steps whole
        p, total = torch.sigmoid(features @ w), n.sum(1)
        values.append(pixels.nll_of_counts(features @ w, n))
        w = w - torch.linalg.solve(features.T @ (features * (total * p * (1 - p))[:, None]), features.T @ (total * p - n[:, 1]))
    assert any(b > a + 1 for a, b in zip(values, values[1:]))
    w = pixels.newton(features, n).requires_grad_()
    assert torch.autograd.grad(pixels.nll_of_counts(features @ w, n), w)[0].abs().max() < 1e-4


def test_a_batch_stands_for_all_pixels(monkeypatch):                    # right=False; times left out; weights of a row
    counts = pixels.Counts(*pixels.count(images(40, 4, 5, 0), block(3)), 40)
    whole = counts.draw(10**6)
    assert torch.equal(whole[0], counts.code) and whole[2].sum().item() == pytest.approx(1)
    close(whole[2], counts.n / counts.n.sum())
    mean, steps, key = torch.zeros(20, 2**8, 2), 400, counts.place.long() * 2**8 + counts.code
    for k in range(steps):                                              # every offset of the comb
        monkeypatch.setattr(torch, "rand", lambda *a, k=k, **o: torch.tensor((k + 0.5) / steps))
        code, place, weight = counts.draw(50)
        assert len(code) <= 50 and weight.sum().item() == pytest.approx(1)
        mean.view(-1, 2).index_add_(0, place.long() * 2**8 + code, weight / steps)
    assert (mean.view(-1, 2)[key] - counts.n / counts.n.sum()).abs().max() < 1.5 / (50 * steps)


def some(kinds=("linear", "mlp-1", "mlp-2"), shape=(5, 6), seed=0):
    sets = [block(2), block(3)]
    code, place, n = pixels.count(images(60, *shape, seed, 0.3), sets[-1])
    counts = {(len(o), position): pixels.Counts(*pixels.merge(code, place if position else None, n, len(o)), 60)
              for o in sets for position in (False, True)}
    torch.manual_seed(seed)
    models = pixels.build(kinds, shape, sets, 8)
    return models, counts, torch.optim.Adam(models.parameters(), 1e-2)


def test_the_table_has_what_its_names_say():                            # position for none; a layer more; K
    models = pixels.build(pixels.MODELS["all"], (5, 6), pixels.PARENTS[False], 7)
    assert len(models) == 18
    for name, model in models.items():
        kind, K, *position = name.split()
        widths = [layer.out_features for layer in model.cpd.layers]
        assert (widths, model.K, model.position) == ([7] * "linear mlp-1 mlp-2".split().index(kind) + [1], int(K), position == ["yx"])
        assert model.cpd.layers[0].in_features == int(K) + 2 * bool(position)


def test_all_are_trained_as_each_would_be_alone():                      # losses multiplied; a shared batch's context
    together, counts, optimizer = some()
    for _ in pixels.train(together, counts, optimizer, 5, 10**6, 1e-2):
        pass
    alone, *_ = some()
    for name in alone:
        part = torch.nn.ModuleDict({name: alone[name]})
        rows = list(pixels.train(part, counts, torch.optim.Adam(part.parameters(), 1e-2), 5, 10**6, 1e-2))
        for p, q in zip(together[name].parameters(), alone[name].parameters()):
            close(p, q)
        assert list(rows[0]) == [name.split()[0]]
        assert rows[0][name.split()[0]].item() < 60 and not rows[0][name.split()[0]].requires_grad


def test_no_model_of_the_same_contexts_passes_the_counted_table():      # the table of other parents; train for all pixels
    models, counts, optimizer = some()
    rows = list(pixels.train(models, counts, optimizer, 150, 10**6, 1e-2))
    with torch.no_grad():
        for name, model in models.items():
            own = counts[model.K, model.position]
            assert own.nll(model) >= own.optimum() - 1e-9, name
            if name == "mlp-2 3":
                assert own.nll(model) < 1.01 * own.optimum()
    for name in ("linear 3", "linear 8 yx"):                            # solved, not descended
        model, own = PixelNetwork((5, 6), models[name].offsets, (), models[name].position), counts[models[name].K, models[name].position]
        pixels.solve(model, own)
        with torch.no_grad():
            assert own.nll(models[name]) == pytest.approx(own.nll(model), rel=1e-9)
    kinds = {"linear": 0.0, "mlp-1": 0.0, "mlp-2": 0.0}
    for name, model in models.items():
        with torch.no_grad():
            kinds[name.split()[0]] += counts[model.K, model.position].nll(model) / 4
    assert rows[-1]["linear"].item() == pytest.approx(kinds["linear"], rel=1e-6)
    assert rows[-1]["mlp-2"].item() == pytest.approx(kinds["mlp-2"], abs=0.05)
    assert rows[0]["linear"] == rows[-1]["linear"] and rows[-1]["mlp-2"] < rows[0]["mlp-2"]


def test_training_follows_its_schedule():                               # the warm-up; half a cosine
    models, counts, optimizer = some(("mlp-1",))
    found = [optimizer.param_groups[0]["lr"] for _ in pixels.train(models, counts, optimizer, 300, 20, 0.1, 280)]
    wanted = [0.1 * 0.5 * (1 + math.cos(math.pi * k / 300)) for k in range(280, 300)]
    close(torch.tensor(found), torch.tensor(wanted))
    next(pixels.train(models, counts, optimizer, 300, 20, 0.1))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


# ---- runs

LOAD = functools.cache(data.load)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(data, "load", lambda name, *rest, **more: LOAD(name))


SMALL = ["--width", 4, "--images", 60, "--samples", 40, "--batch", 200]


@pytest.mark.parametrize("options", [["--dataset", "persian"], ["--model", "linear", "--dataset", "latin", "--nearest"]])
def test_a_run_leaves_its_table(cli, quick, capsys, options):
    status, error, out = cli(pixels, *options, *SMALL, "--steps", 3)
    assert status == 0, error
    (folder,) = out.iterdir()
    result = json.loads((folder / "metrics.json").read_text())
    names = [row["name"] for row in result["table"]]
    assert len(names) == (24 if "persian" in options else 12) and {"linear 3", "linear 15 yx", "counted 8 yx"} <= set(names)
    for row in result["table"]:
        assert row["over_optimum"] >= -1e-6 and row["test_nats"] > 0
    by_name = {row["name"]: row for row in result["table"]}
    assert by_name["linear 15"]["train_nats"] <= by_name["linear 8"]["train_nats"] <= by_name["linear 3"]["train_nats"]
    assert by_name["linear 8 yx"]["train_nats"] <= by_name["linear 8"]["train_nats"]
    best = result["metrics"]["nll"]["value"]
    models = [row for row in result["table"] if not row["name"].startswith("counted")]
    assert best == min(models, key=lambda row: row["train_nats"])["test_nats"]
    assert result["metrics"]["bits_per_dim"]["value"] == pytest.approx(metrics.bits_per_dim(best, 784))
    assert (folder / "grid.png").is_file() and (folder / "samples.png").is_file()
    status, error, _ = cli(pixels, "--ckpt", folder / "model.pt", "--samples", 40)
    assert status == 0, error
    again = json.loads((folder / "metrics.json").read_text())
    assert again["table"] == result["table"]


def test_resume_is_bit_for_bit(resumed, quick):                         # Adam's moments, the generator not kept
    whole, broken = resumed(pixels, "--dataset", "persian", *SMALL)
    assert len(whole) > 18 and whole.keys() == broken.keys()
    assert all(torch.equal(whole[key], broken[key]) for key in whole)


@pytest.mark.parametrize("options, words", [
    (["--dataset", "gmm"], "no set of binary images"),
    (["--model", "mlp-9"], "mlp-9"), (["--width", "0"], "at least 1"), (["--images", "0"], "at least 1"),
    (["--dataset", "hoda", "--data-dir", "/nowhere"], "hoda"), (["--resume"], "no checkpoint")])
def test_bad_input_gets_a_sentence(cli, options, words):
    status, error, _ = cli(pixels, *options)
    assert status == 2 and words in error and "Traceback" not in error


def test_linear_on_persian_digits_is_near_its_optimum():                # Newton on other counts
    x = LOAD("persian").train[:300, 0]
    code, place, n = pixels.count(x, block(2))
    model = PixelNetwork((28, 28), block(2))
    counts = pixels.Counts(*pixels.merge(code, None, n, 3), 300)
    pixels.solve(model, counts)
    assert counts.optimum() < counts.nll(model) < 1.05 * counts.optimum()
