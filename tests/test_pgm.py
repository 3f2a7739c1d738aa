"""Bayesian and Markov networks: enumeration of the joint table is the oracle of everything."""

import itertools
import json
import math

import networkx
import numpy as np
import pytest
from conftest import SHARED as DATA
from hypothesis import given
from hypothesis import strategies as st

import formats
import graphs
import networks
import pgm
import problems

BIF = sorted((DATA / "bif").glob("*.bif.gz")) if DATA.is_dir() else []


def random_network(seed, n=5, most=3, zeros=False, markov=False, density=0.5):
    """A network of n variables with 1 to `most` states, its tables drawn from a Dirichlet."""
    rng = np.random.default_rng(seed)
    names = [f"v{i}" for i in rng.permutation(n)]
    states = {v: "".join("abcd"[: rng.integers(1 if n > 2 else 2, most + 1)]) for v in names}
    parents = {v: tuple(u for u in names[:i] if rng.random() < density) for i, v in enumerate(names)}
    size = {v: len(s) for v, s in states.items()}
    table = lambda v: rng.dirichlet(np.ones(size[v]), [size[p] for p in parents[v]])
    if markov:
        scopes = [(*parents[v], v) for v in names]
        return pgm.Network(states, [(s, rng.gamma(1, 1, [size[v] for v in s]) + 0.01) for s in scopes])
    cpds = {v: (parents[v], table(v)) for v in names}
    if zeros:
        cpds = {v: (p, np.eye(size[v])[t.argmax(-1)] if rng.random() < 0.3 else t) for v, (p, t) in cpds.items()}
    return pgm.bayesian({v: states[v] for v in sorted(names)}, cpds)


def random_evidence(network, seed, most=2):
    """States of a draw from the network, so that they are possible."""
    rng, at = np.random.default_rng(seed), {}
    table = pgm.joint(network)
    cell = np.unravel_index(rng.choice(table.table.size, p=table.table.ravel() / table.table.sum()), table.table.shape)
    for v in rng.permutation(list(network.states))[: rng.integers(0, most + 1)]:
        at[str(v)] = int(cell[table.variables.index(v)])
    return at


def enumerated(network, names, evidence):
    """p(names | e) and log p(e) by the whole table."""
    whole = pgm.joint(network)
    table = whole.table[tuple(evidence.get(v, slice(None)) for v in whole.variables)]
    left = [v for v in whole.variables if v not in evidence]
    table = np.einsum(table, [*range(len(left))], [left.index(v) for v in names])
    return table / table.sum(), math.log(table.sum())


# ---- networks and their mistakes


def test_child_axis_is_the_last():  # table = aligned(...) of another order
    net = pgm.bayesian(*networks.NETWORKS["kntu"][1:])
    whole = pgm.joint(net)
    assert whole.variables == ("B", "C", "A", "D", "E")
    assert whole.table[1, 0, 1, 1, 0] == pytest.approx(0.4 * 0.3 * 0.2 * 0.4 * 0.5)
    assert whole.table.sum() == pytest.approx(1)


@pytest.mark.parametrize("states, cpds, sentence", [
    ({"a": "01", "b": "01"}, {"a": ((), [0.5, 0.5])}, "b has no conditional distribution"),
    ({"a": "01"}, {"a": ((), [0.5, 0.5]), "c": ((), [1.0])}, "c is no variable"),
    ({"a": "01"}, {"a": ((), [0.5, 0.4])}, "must sum to 1; one sums to 0.9"),
    ({"a": "01", "b": "01"}, {"a": ((), [0.5, 0.5]), "b": (("a",), [[0.5, 0.5], [0.5, 0.3]])}, "one sums to 0.8"),
    ({"a": "01"}, {"a": ((), [0.5, 0.5 + 1.5e-6])}, "must sum to 1"),
    ({"a": "01"}, {"a": ((), [1.5, -0.5])}, "negative"),
    ({"a": "01"}, {"a": ((), [0.2, 0.3, 0.5])}, r"its states ask for \(2,\)"),
    ({"a": "01"}, {"a": (("b",), [[0.5, 0.5]])}, "parent b, which is not"),
    ({"a": "01", "b": "01"}, {"a": (("b",), [[0.5] * 2] * 2), "b": (("a",), [[0.5] * 2] * 2)}, "cycle"),
])
def test_a_wrong_network_is_a_sentence(states, cpds, sentence):  # any of the checks left out
    with pytest.raises(ValueError, match=sentence):
        pgm.bayesian(states, cpds)


def test_evidence_names_states_and_numbers():  # `s in states` for numbers too
    net = pgm.bayesian({"a": ("1", "0")}, {"a": ((), [0.25, 0.75])})
    assert net.observe({"a": "0"}) == {"a": 1} and net.observe({"a": 0}) == {"a": 0}
    for wrong, sentence in (({"b": 0}, "unknown variable 'b'"), ({"a": "2"}, "no state '2'"), ({"a": 2}, "no state 2"),
                            ({"a": np.array([0, 5])}, "whole numbers from -1 to 1"), ({"a": np.array([0.5])}, "whole")):
        with pytest.raises(ValueError, match=sentence):
            net.observe(wrong)


@pytest.mark.parametrize("call", [
    lambda n, e: pgm.eliminate(n, ["smoke"], e), lambda n, e: pgm.JunctionTree(n).marginals(e),
    lambda n, e: pgm.most_probable(n, e), lambda n, e: pgm.loopy(n, e), lambda n, e: pgm.gibbs(n, e, 5, 5),
    lambda n, e: pgm.JunctionTree(n).marginals({v: np.array([0, s]) for v, s in e.items()})])
def test_impossible_evidence_is_a_sentence(call):  # no check of the scale
    net = pgm.bayesian(*networks.NETWORKS["asia"][1:])
    with pytest.raises(ValueError, match="probability zero( in set 1)?$"):
        call(net, {"tub": 0, "either": 1})


def test_the_impossible_set_is_numbered():  # first left out
    net = pgm.bayesian(*networks.NETWORKS["asia"][1:])
    tub, either = np.zeros(40_000, int), np.zeros(40_000, int)
    either[39_990] = 1
    with pytest.raises(ValueError, match="probability zero in set 39990$"):
        pgm.JunctionTree(net).marginals({"tub": tub, "either": either})


def test_query_in_evidence_is_a_sentence():  # no check
    net = pgm.bayesian(*networks.NETWORKS["asia"][1:])
    with pytest.raises(ValueError, match="in the query and in the evidence"):
        pgm.eliminate(net, "tub", {"tub": 0})
    with pytest.raises(ValueError, match="one length"):
        pgm.JunctionTree(net).marginals({"tub": np.zeros(2, int), "lung": np.zeros(3, int)})


# ---- exact inference


@given(st.integers(0, 10**6), st.booleans())
def test_elimination_is_enumeration(seed, markov):  # log_scale not added; `names` without the evidence's ancestors
    net = random_network(seed, zeros=not markov, markov=markov)
    evidence = random_evidence(net, seed)
    free = [v for v in net.states if v not in evidence]
    for query in [[v] for v in free] + [free[1::-1]]:
        found, log_z = pgm.eliminate(net, query, evidence)
        table, value = enumerated(net, query, evidence)
        np.testing.assert_allclose(found.table, table, atol=1e-12)
        assert log_z == pytest.approx(value, abs=1e-10) and found.variables == tuple(query)


@given(st.integers(0, 10**6))
def test_any_order_gives_the_same(seed):  # order = [v for v in order ...] without `v not in query`
    net = random_network(seed)
    rng = np.random.default_rng(seed)
    expected, log_z = pgm.eliminate(net, "v0", {"v1": 0})
    for _ in range(3):
        found, value = pgm.eliminate(net, "v0", {"v1": 0}, order=[str(v) for v in rng.permutation(list(net.states))])
        np.testing.assert_allclose(found.table, expected.table, atol=1e-12)
        assert value == pytest.approx(log_z, abs=1e-10)


@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.5]), st.booleans())
def test_junction_tree_is_enumeration(seed, density, markov):  # / scales[j] left out; after.pop() twice
    net = random_network(seed, n=6, zeros=not markov, markov=markov, density=density)
    tree, evidence = pgm.JunctionTree(net), random_evidence(net, seed)
    found, log_z = tree.marginals(evidence)
    for v in net.states:
        if v not in evidence:
            table, value = enumerated(net, [v], evidence)
            np.testing.assert_allclose(found[v], table, atol=1e-12)
            assert log_z == pytest.approx(value, abs=1e-10)
        else:
            assert found[v][evidence[v]] == pytest.approx(1)


@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.6]))
def test_a_calibrated_tree_agrees_on_its_sepsets_and_holds_each_family(seed, density):  # sets[above] = rest
    net = random_network(seed, n=7, density=density)
    tree = pgm.JunctionTree(net)
    beliefs, _ = tree.calibrate(random_evidence(net, seed))
    for i, p in enumerate(tree.parent):
        assert beliefs[i].sum() == pytest.approx(1)
        if p is None:
            assert not tree.sepset[i]
            continue
        assert tree.sepset[i] == set(tree.cliques[i]) & set(tree.cliques[p])
        mine, other = (pgm.marginal(pgm.Factor(tree.cliques[k], beliefs[k][..., 0]), sorted(tree.sepset[i])) for k in (i, p))
        np.testing.assert_allclose(mine.table, other.table, atol=1e-12)
    for f in net.factors:
        assert set(f.variables) <= set(tree.cliques[tree.home[f.variables]])
    assert not any(set(a) <= set(b) for a, b in itertools.permutations(tree.cliques, 2))
    for v in net.states:                                    # running intersection: v's cliques hang together
        inside = [i for i, c in enumerate(tree.cliques) if v in c]
        assert sum(tree.parent[i] not in inside for i in inside) == 1


@given(st.integers(0, 10**6))
def test_beliefs_over_sepsets_are_the_joint(seed):  # tables[j] * ... of the wrong child
    net = random_network(seed, n=6)
    tree = pgm.JunctionTree(net)
    beliefs, _ = tree.calibrate()
    factors = [pgm.Factor(c, b[..., 0]) for c, b in zip(tree.cliques, beliefs)]
    whole = pgm.product(factors, net.states).table
    for i, f in enumerate(factors):
        shared = pgm.marginal(f, sorted(tree.sepset[i]))
        with np.errstate(divide="ignore", invalid="ignore"):
            whole = np.nan_to_num(whole / pgm.aligned(shared, list(net.states)))
    np.testing.assert_allclose(whole, pgm.joint(net).table, atol=1e-12)


@given(st.integers(0, 10**6), st.integers(1, 9))
def test_many_sets_at_once_are_each_alone(seed, B):  # indicator[v][s] without .T; row -1 of zeros
    net = random_network(seed, n=5)
    tree, rng = pgm.JunctionTree(net), np.random.default_rng(seed)
    evidence = {v: rng.integers(-1, net.size[v], B) for v in rng.permutation(list(net.states))[:2]} | {"v0": 0}
    found, log_z = tree.marginals(evidence)
    for b in range(B):
        alone = {v: s if v == "v0" else int(s[b]) for v, s in evidence.items() if v == "v0" or s[b] >= 0}
        expected, value = tree.marginals(alone)
        assert log_z[b] == pytest.approx(value, abs=1e-10)
        for v in net.states:
            np.testing.assert_allclose(found[v][b], expected[v], atol=1e-12)


def test_blocks_of_sets_join_up(monkeypatch):  # s[k:k + block] from 0
    net = random_network(3, n=5, most=3)
    tree, rng = pgm.JunctionTree(net), np.random.default_rng(0)
    largest = max(t.size for t in tree.tables)
    B = 2**17 // largest + 3
    states = rng.integers(0, net.size["v1"], B)
    found, log_z = tree.marginals({"v1": states})
    assert len(log_z) == B
    for s in set(states.tolist()):
        expected, value = tree.marginals({"v1": s})
        np.testing.assert_allclose(found["v0"][states == s], np.broadcast_to(expected["v0"], (sum(states == s), net.size["v0"])), atol=1e-12)
        np.testing.assert_allclose(log_z[states == s], value)


@given(st.integers(0, 10**6), st.booleans())
def test_most_probable_is_the_largest_cell(seed, markov):  # argmin; reversed(tables) forwards
    net = random_network(seed, markov=markov)
    evidence = random_evidence(net, seed)
    best, log_p = pgm.most_probable(net, evidence)
    whole = pgm.joint(net, evidence)
    assert log_p == pytest.approx(math.log(whole.table.max()), abs=1e-10)
    assert whole.table[tuple(net.states[v].index(best[v]) for v in whole.variables)] == pytest.approx(whole.table.max())


def test_a_long_chain_does_not_underflow():  # no scale
    n = 2000
    cpds = {f"x{i}": ((f"x{i - 1}",) if i else (), [[0.9, 0.1], [0.2, 0.8]] if i else [0.5, 0.5]) for i in range(n)}
    emissions = {f"y{i}": ((f"x{i}",), [[1e-3, 1 - 1e-3], [2e-3, 1 - 2e-3]]) for i in range(0, n, 10)}
    net = pgm.bayesian(dict.fromkeys([*cpds, *emissions], "01"), cpds | emissions)
    evidence, p = dict.fromkeys(emissions, 0), np.array([0.5, 0.5])
    log_z = 0.0
    for i in range(n):                                      # the forward algorithm
        p = p @ np.array([[0.9, 0.1], [0.2, 0.8]]) if i else p
        p = p * [1e-3, 2e-3] if i % 10 == 0 else p
        log_z, p = log_z + math.log(p.sum()), p / p.sum()
    beliefs, found = pgm.JunctionTree(net).marginals(evidence)
    assert found == pytest.approx(log_z, abs=1e-8) and log_z < -1200
    np.testing.assert_allclose(beliefs[f"x{n - 1}"], p, atol=1e-10)


@pytest.mark.parametrize("graph, width", [
    (networkx.random_labeled_tree(12, seed=1), 1), (networkx.cycle_graph(9), 2), (networkx.grid_2d_graph(3, 3), 3),
    (networkx.grid_2d_graph(4, 4), 4), (networkx.complete_graph(5), 4)])
def test_min_fill_reaches_known_treewidths(graph, width):  # costs never updated
    _, cliques = pgm.triangulate({v: set(graph[v]) for v in graph}, dict.fromkeys(graph, 2))
    assert max(map(len, cliques)) - 1 == width


@given(st.integers(0, 10**6))
def test_triangulation_is_chordal_and_keeps_the_graph(seed):  # complete(graph, around) left out
    graph = networkx.gnp_random_graph(9, 0.35, seed=seed)
    _, cliques = pgm.triangulate({v: set(graph[v]) for v in graph}, dict.fromkeys(graph, 2))
    filled = {v: set() for v in graph}
    for c in cliques:
        graphs.complete(filled, c)
    assert graphs.is_chordal(filled) and all(b in filled[a] for a, b in graph.edges)


def test_min_fill_adds_nothing_to_a_chordal_graph():  # + 1 for - 1: the bridge, of few neighbours, would go first
    graph = networkx.barbell_graph(6, 1)
    _, cliques = pgm.triangulate({v: set(graph[v]) for v in graph}, dict.fromkeys(graph, 2))
    assert all(graph.has_edge(a, b) for c in cliques for a, b in itertools.combinations(c, 2))


@pytest.mark.parametrize("path", BIF, ids=lambda p: p.name.split(".")[0])
def test_shared_networks_answer_alike_by_two_methods(path):  # any of the above
    net = pgm.bayesian(*formats.read_bif(path))
    drawn, _ = pgm.sample(net, 1, np.random.default_rng(1))
    seen = np.random.default_rng(0).permutation(list(net.states))[: max(1, len(net.states) // 7)]
    evidence = {str(v): int(drawn[v][0]) for v in seen}
    found, log_z = pgm.JunctionTree(net).marginals(evidence)
    for v in net.states:
        if v not in evidence:
            table, value = pgm.eliminate(net, v, evidence)
            np.testing.assert_allclose(found[v], table.table, atol=1e-10)
            assert log_z == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("name", ["asia", "cancer"])
def test_built_in_networks_are_those_of_the_files(name, real_data):  # a number of a table
    states, cpds = formats.read_bif(real_data / "bif" / f"{name}.bif.gz")
    theirs, ours = pgm.bayesian(states, cpds), pgm.bayesian(*networks.NETWORKS[name][1:])
    rename = {v: w for v, w in zip(ours.states, ours.states)}
    assert ours.states == {rename[v]: theirs.states[v] for v in ours.states}
    np.testing.assert_allclose(pgm.joint(ours).table, pgm.marginal(pgm.joint(theirs), list(ours.states)).table, atol=1e-12)


@given(st.integers(0, 10**6))
def test_product_of_clique_potentials_is_the_joint_and_a_scale_is_z(seed):  # aligned without the transpose
    net = random_network(seed, markov=True)
    scaled = pgm.Network(net.states, [(f.variables, 5 * f.table if i == 0 else f.table) for i, f in enumerate(net.factors)])
    a, b = pgm.JunctionTree(net).marginals(), pgm.JunctionTree(scaled).marginals()
    assert b[1] - a[1] == pytest.approx(math.log(5))
    for v in net.states:
        np.testing.assert_allclose(a[0][v], b[0][v], atol=1e-12)


def test_parameters_are_the_rank_of_the_map_from_logits():  # (K - 1) a row without the -1
    import torch

    net = random_network(5, n=4, most=3, density=0.6)
    logits = [torch.randn(f.table.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i, f in enumerate(net.factors)]
    names = list(net.states)

    def whole(*logits):
        terms = []
        for f, w in zip(net.factors, logits):
            w, at = w.log_softmax(-1), {v: i for i, v in enumerate(f.variables)}
            w = w.permute([at[v] for v in names if v in at])
            terms.append(w[tuple(slice(None) if v in at else None for v in names)])
        return sum(terms).exp().flatten()

    jacobian = torch.cat([j.reshape(j.shape[0], -1) for j in torch.autograd.functional.jacobian(whole, tuple(logits))], 1)
    assert torch.linalg.matrix_rank(jacobian).item() == net.parameters()


# ---- approximate inference


@given(st.integers(0, 10**6))
def test_loopy_is_exact_on_trees(seed):  # (len(into[v]) - 1) without the - 1; damping on the wrong term
    rng = np.random.default_rng(seed)
    states = {f"v{i}": "abc"[: rng.integers(2, 4)] for i in range(6)}
    size = {v: len(s) for v, s in states.items()}
    cpds = {f"v{i}": ((f"v{rng.integers(i)}",) if i else (), None) for i in range(6)}
    table = lambda v, p: rng.dirichlet(np.ones(size[v]), [size[u] for u in p])
    certain = lambda v, t: np.eye(size[v])[t.argmax(-1)] if rng.random() < 0.3 else t               # zeros are no exception
    net = pgm.bayesian(states, {v: (p, certain(v, table(v, p))) for v, (p, _) in cpds.items()})
    evidence = random_evidence(net, seed)
    beliefs, log_z, change = pgm.loopy(net, evidence)
    exact, value = pgm.JunctionTree(net).marginals(evidence)
    assert change < 1e-9 and log_z == pytest.approx(value, abs=1e-7)
    for v, b in beliefs.items():
        np.testing.assert_allclose(b, exact[v], atol=1e-7)


def test_loopy_on_a_loop_is_near_and_says_so():  # change not returned
    net = pgm.Network(*networks.MARKOV["markov"][1:])
    beliefs, log_z, change = pgm.loopy(net)
    exact, value = pgm.JunctionTree(net).marginals()
    error = max(abs(beliefs[v] - exact[v]).max() for v in beliefs)
    assert change < 1e-9 and 1e-4 < error < 0.1 and abs(log_z - value) < 0.1
    assert all(change < 1e-9 for change in [pgm.loopy(net, damping=d)[2] for d in (0.0, 0.3, 0.7)])
    assert pgm.loopy(net, rounds=2)[2] > 1e-3


@given(st.integers(0, 10**6))
def test_gibbs_leaves_the_posterior_alone(seed):  # conditional without its normaliser, or with a factor missing
    net = random_network(seed, n=4, markov=True)
    whole = pgm.joint(net)
    p, names, shape = whole.table.ravel() / whole.table.sum(), whole.variables, whole.table.shape
    cells = np.array(list(np.ndindex(shape)))
    after = p
    for k, v in enumerate(names):
        row = pgm.conditional(net.factors, v, {u: cells[:, i] for i, u in enumerate(names)})
        kernel = np.zeros((len(p), len(p)))
        for s in range(net.size[v]):
            to = cells.copy()
            to[:, k] = s
            kernel[np.arange(len(p)), np.ravel_multi_index(to.T, shape)] += row[:, s]
        np.testing.assert_allclose(kernel.sum(1), 1)
        after = after @ kernel
    np.testing.assert_allclose(after, p, atol=1e-12)


@pytest.mark.parametrize("name", ["sprinkler", "markov"])
def test_gibbs_estimates_within_its_error(name):  # random > cumsum with the last column; burn counted
    net = pgm.bayesian(*networks.NETWORKS[name][1:]) if name in networks.NETWORKS else pgm.Network(*networks.MARKOV[name][1:])
    evidence = {"wet": 0} if name == "sprinkler" else {"B": 1}
    found, error = pgm.gibbs(net, evidence, 300, 200, 50)
    exact, _ = pgm.JunctionTree(net).marginals(evidence)
    for v in found:
        assert (abs(found[v] - exact[v]) < 5 * error[v] + 1e-9).all() and error[v].max() < 0.02


def test_evidence_far_below_the_smallest_number_is_not_impossible():  # exp of the log weights; largest 1
    rare = [f"y{i}" for i in range(40)]
    cpds = {"x": ((), [0.5, 0.5])} | {y: (("x",), [[1 - 1e-10, 1e-10], [1 - 2e-10, 2e-10]]) for y in rare}
    net = pgm.bayesian({"x": "01"} | {y: "01" for y in rare}, cpds)
    evidence = {y: 1 for y in rare}
    exact, log_z = pgm.JunctionTree(net).marginals(evidence)
    assert log_z == pytest.approx(40 * math.log(1e-10) + math.log((1 + 2.0**40) / 2), rel=1e-9)
    belief, value = pgm.eliminate(net, ("x",), evidence)
    _, log_p = pgm.most_probable(net, evidence)
    loopy, bethe, _ = pgm.loopy(net, evidence)
    assert value == pytest.approx(log_z) == pytest.approx(bethe) and log_p == pytest.approx(log_z, abs=1e-9)
    for found in (exact["x"], belief.table, loopy["x"], pgm.gibbs(net, evidence, 5, 10)[0]["x"]):
        np.testing.assert_allclose(found, [1 / (1 + 2.0**40), 2.0**40 / (1 + 2.0**40)], atol=1e-14)
    assert pgm.most_probable(net, evidence | {"x": 1})[1] == pytest.approx(log_p)       # all of it constants


def test_a_junction_tree_takes_hundreds_of_children():                  # a star for the chain; a sum for the largest
    K, n = 10, 330
    names, states = [f"y{i}" for i in range(n)], "0123456789"[:K]
    rows = [np.where(np.arange(K) % 2, [[0.99], [0.01]], [[0.01], [0.99]]).T[:, ::sign] for sign in (1, -1)]
    net = pgm.bayesian({"x": states} | dict.fromkeys(names, "01"),
                       {"x": ((), np.full(K, 1 / K))} | {y: (("x",), rows[i % 2]) for i, y in enumerate(names)})
    tree = pgm.JunctionTree(net)
    beliefs, log_z = tree.marginals()
    np.testing.assert_allclose(beliefs["x"], 1 / K)
    assert log_z == pytest.approx(0, abs=1e-9)
    beliefs, log_z = tree.marginals(dict.fromkeys(names, 1))            # half of them say one thing, half the other
    np.testing.assert_allclose(beliefs["x"], 1 / K, rtol=1e-9)
    assert log_z == pytest.approx(n // 2 * math.log(0.0099), rel=1e-9)


def test_rounds_are_as_many_as_the_defaults_say_and_seed_0_is_the_default(monkeypatch):  # burn or sweeps off by one; seed 1
    net, rng = pgm.bayesian(*networks.NETWORKS["sprinkler"][1:]), lambda: np.random.default_rng(0)
    calls, plain = [], pgm.conditional
    monkeypatch.setattr(pgm, "conditional", lambda *a: calls.append(a[1]) or plain(*a))
    found = pgm.gibbs(net, {"wet": 0})[0]
    assert len(calls) == 1100 * (len(net.states) - 1)
    again = pgm.gibbs(net, {"wet": 0}, rng=rng())[0]
    assert all((found[v] == again[v]).all() for v in found)
    assert all((a == b).all() for a, b in zip(pgm.sample(net, 50)[0].values(), pgm.sample(net, 50, rng())[0].values()))
    q, bounds = pgm.mean_field(net, tolerance=-1)
    again, _ = pgm.mean_field(net, tolerance=-1, rng=rng())
    assert len(bounds) == 201 and all((q[v] == again[v]).all() for v in q)
    drawn = pgm.sample(net, 40)[0] | {"rain": np.full(40, -1)}
    assert len(pgm.em(net, drawn, tolerance=-math.inf)[1]) == 101


def test_a_variable_without_company_is_no_exception():  # weight of shape (K,)
    net = pgm.Network({"a": "01", "b": "012", "c": "01"}, [(("a",), [0.2, 0.6]), (("a", "c"), [[1, 2], [3, 4]])])
    exact, log_z = pgm.JunctionTree(net).marginals()
    assert log_z == pytest.approx(math.log(3 * (0.2 * 3 + 0.6 * 7))) and pgm.eliminate(net)[1] == pytest.approx(log_z)
    np.testing.assert_allclose(exact["b"], 1 / 3)
    found, error = pgm.gibbs(net, None, 200, 200)
    beliefs, bethe, _ = pgm.loopy(net)
    assert bethe == pytest.approx(log_z)
    for v in net.states:
        np.testing.assert_allclose(found[v], exact[v], atol=0.01)
        np.testing.assert_allclose(beliefs[v], exact[v], atol=1e-8)
    assert pgm.most_probable(net)[0] == {"a": "1", "b": "0", "c": "1"}
    assert pgm.mean_field(net)[1][-1] <= log_z
    only = pgm.loopy(net, {"a": 0, "c": 1})[1]              # a factor that the evidence leaves without a variable
    assert only == pytest.approx(math.log(3 * 0.2 * 2)) == pytest.approx(pgm.JunctionTree(net).marginals({"a": 0, "c": 1})[1])


@given(st.integers(0, 10**6))
def test_mean_field_rises_below_log_z_and_the_gap_is_the_kl(seed):  # all at once; the entropy left out
    net = random_network(seed, n=4, markov=True)
    evidence = {"v0": 0}
    whole = pgm.joint(net, evidence)
    log_z = math.log(whole.table.sum())
    logs = [pgm.Factor(f.variables, np.log(f.table)) for f in net.under(evidence)]
    rng = np.random.default_rng(seed)
    q = {v: rng.dirichlet(np.ones(net.size[v])) for v in whole.variables}

    def kl():
        qs = pgm.product([pgm.Factor((v,), p) for v, p in q.items()], whole.variables).table
        return (qs * (np.log(qs) - np.log(whole.table) + log_z)).sum()

    bounds = [pgm.elbo(logs, q)]
    for v in list(q) * 3:
        q[v] = pgm.mean_field_update(logs, q, v)
        bounds.append(pgm.elbo(logs, q))
        assert log_z - bounds[-1] == pytest.approx(kl(), abs=1e-9)
    assert all(b >= a - 1e-10 for a, b in zip(bounds, bounds[1:])) and bounds[-1] <= log_z + 1e-10
    assert np.diff(pgm.mean_field(net, evidence)[1]).min(initial=0) > -1e-9


@given(st.integers(0, 10**6))
def test_mean_field_is_exact_where_nothing_is_shared(seed):  # H of one variable missing
    net = random_network(seed, n=4, markov=True, density=0)
    q, bounds = pgm.mean_field(net)
    exact, log_z = pgm.JunctionTree(net).marginals()
    assert bounds[-1] == pytest.approx(log_z, abs=1e-9)
    for v in q:
        np.testing.assert_allclose(q[v], exact[v], atol=1e-9)


def test_mean_field_holds_the_bound_with_zeros():  # log of 0
    net = pgm.bayesian(*networks.NETWORKS["asia"][1:])
    _, log_z = pgm.JunctionTree(net).marginals({"dysp": 0})
    for seed in range(3):
        _, bounds = pgm.mean_field(net, {"dysp": 0}, rng=np.random.default_rng(seed))
        assert np.isfinite(bounds).all() and bounds[-1] <= log_z + 1e-9 and np.diff(bounds).min() > -1e-9


# ---- sampling and learning


def test_ancestral_frequencies():  # u > limit of the wrong row
    net = random_network(11, n=4, most=3)
    n = 200_000
    drawn, weight = pgm.sample(net, n, np.random.default_rng(0))
    whole = pgm.joint(net)
    counts = np.zeros(whole.table.shape)
    np.add.at(counts, tuple(drawn[v] for v in whole.variables), 1)
    p = whole.table
    assert (abs(counts / n - p) < 5 * np.sqrt(p * (1 - p) / n) + 1e-12).all() and not weight.any()


def test_weighted_samples_are_unbiased():  # the weight of the evidence left out
    net = pgm.bayesian(*networks.NETWORKS["sprinkler"][1:])
    drawn, weight = pgm.sample(net, 200_000, np.random.default_rng(0), {"wet": 0, "sprinkler": 1})
    w = np.exp(weight)
    exact, log_z = pgm.JunctionTree(net).marginals({"wet": 0, "sprinkler": 1})
    assert w.mean() == pytest.approx(math.exp(log_z), abs=5 * w.std() / len(w) ** 0.5)
    assert (w * (drawn["rain"] == 0)).sum() / w.sum() == pytest.approx(exact["rain"][0], abs=0.01)
    assert (drawn["wet"] == 0).all()
    with pytest.raises(ValueError, match="ancestral sampling needs"):
        pgm.sample(pgm.Network(*networks.MARKOV["markov"][1:]), 3)


@given(st.integers(0, 10**6))
def test_em_never_falls_and_counts_what_is_seen(seed):  # beliefs without @ counts
    net, rng = random_network(seed, n=4), np.random.default_rng(seed)
    data, _ = pgm.sample(net, 60, rng)
    start = random_network(seed + 1, n=4)
    start = pgm.Network(net.states, [(f.variables, rng.dirichlet(np.ones(f.table.shape[-1]), f.table.shape[:-1])) for f in net.factors], net.parents)
    learnt, history = pgm.em(start, data, 5)
    counted = history[1]
    assert counted == pytest.approx(history[-1], abs=1e-9)  # nothing hidden: done in one round
    for f in learnt.factors:
        counts = np.zeros(f.table.shape)
        np.add.at(counts, tuple(data[v] for v in f.variables), 1)
        seen = counts.sum(-1) > 0
        np.testing.assert_allclose(f.table[seen], counts[seen] / counts[seen].sum(-1, keepdims=True), atol=1e-12)
    hidden = {v: np.where(rng.random(60) < 0.4, -1, s) for v, s in data.items() if v != "v2"}
    _, history = pgm.em(start, hidden, 8)
    assert np.diff(history).min() > -1e-9
    assert len(history) == 9 or history[-1] - history[-2] < 1e-8 * 60                   # it stops where nothing is gained
    assert history[0] == pytest.approx(pgm.JunctionTree(start).marginals(hidden)[1].sum(), abs=1e-9)


def test_em_keeps_rows_that_never_occur_and_adds_its_pseudo_counts():  # total >= 0; - pseudo
    net = pgm.bayesian({"a": "01", "b": "01"}, {"a": ((), [0.5, 0.5]), "b": (("a",), [[0.3, 0.7], [0.9, 0.1]])})
    data = {"a": np.array([0, 0, 0]), "b": np.array([1, 1, 0])}
    learnt, _ = pgm.em(net, data)
    np.testing.assert_allclose(learnt.factors[0].table, [1, 0])
    np.testing.assert_allclose(learnt.factors[1].table, [[1 / 3, 2 / 3], [0.9, 0.1]])
    learnt, _ = pgm.em(net, data, rounds=1, pseudo=1.0)
    np.testing.assert_allclose(learnt.factors[0].table, [4 / 5, 1 / 5])
    np.testing.assert_allclose(learnt.factors[1].table, [[2 / 5, 3 / 5], [0.5, 0.5]])
    with pytest.raises(ValueError, match="EM fits"):
        pgm.em(net, {})


def test_entropy_and_ties():  # p >= 0; / size[v] in the cost of an elimination
    assert pgm.entropy(np.array([0.0, 1.0])) == 0 and pgm.entropy(np.full(4, 0.25)) == pytest.approx(math.log(4))
    star = {0: {1}, 1: {0, 2}, 2: {1}}
    assert pgm.triangulate(star, {0: 5, 1: 3, 2: 2})[0][0] == 2         # the smaller table first
    with pytest.raises(ValueError, match="too large"):
        pgm.joint(pgm.Network(dict.fromkeys([f"v{i}" for i in range(25)], "01"), []))


# ---- the command line


@pytest.mark.parametrize("method", pgm.METHODS)
def test_each_method_writes_its_numbers_and_pictures(method, cli):
    status, error, out = cli(pgm, "--network", "sprinkler", "--method", method, "--evidence", "wet=yes", "--query", "rain", "--sample", 5)
    folder = out / f"pgm-{method}-sprinkler"
    numbers = json.loads((folder / "metrics.json").read_text())["metrics"]
    assert status == 0, error
    assert numbers["log_z"]["value"] == pytest.approx(math.log(0.6471), abs=1e-9)
    assert [numbers[k]["value"] for k in ("independences", "broken", "unforeseen")] == [2, 0, 0]
    for name in ("network", "cliques", "tree"):
        assert (folder / f"{name}.png").stat().st_size > 1000
    assert (folder / "samples.csv").read_text().count("\n") == 6
    if method != "map":
        assert numbers["largest_error"]["value"] < {"gibbs": 0.02, "loopy": 0.15, "mean-field": 0.5}.get(method, 1e-12)


def test_the_command_line_reads_a_file(cli, tmp_path):
    states, cpds = networks.NETWORKS["asia"][1:]
    formats.write_bif(tmp_path / "x.bif.gz", states, {v: (p, np.array(t)) for v, (p, t) in cpds.items()})
    status, error, out = cli(pgm, "--bif", tmp_path / "x.bif.gz", "--evidence", "xray=yes")
    assert status == 0, error
    assert json.loads((out / "pgm-junction-x" / "metrics.json").read_text())["parameters"] == 18


@pytest.mark.parametrize("options, sentence", [
    (["--evidence", "tub=yes,either=no"], "tub = yes, either = no has probability zero"), (["--evidence", "lungs=yes"], "unknown variable 'lungs'"),
    (["--evidence", "lung=perhaps"], "no state 'perhaps'"), (["--query", "lungs"], "unknown variable"),
    (["--bif", "nowhere.bif"], "no such file"), (["--sample", "-1"], "negative"), (["--network", "x"], "invalid choice"),
    (["--network", "markov", "--sample", "3"], "ancestral sampling needs")])
def test_bad_input_is_a_sentence(options, sentence, cli):
    status, error, _ = cli(pgm, *options)
    assert status == 2 and sentence in error and "Traceback" not in error


@pytest.mark.parametrize("asked", [["--model", "pixels"], ["--model=pixels"]])
def test_pixels_are_handed_over(asked, cli, monkeypatch):                           # replace("=", " ")
    import sys
    import types

    seen = []
    monkeypatch.setitem(sys.modules, "pixels", types.SimpleNamespace(main=lambda: seen.extend(sys.argv[1:])))
    cli(pgm, *asked, "--dataset", "persian", "--steps", 3)
    assert seen[2:] == ["--dataset", "persian", "--steps", "3"]


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_examples_agree(name, cli):
    status, error, out = cli(pgm, "--example", name)
    result = json.loads((out / f"pgm-example-{name}" / "metrics.json").read_text())
    assert status == 0 and result["metrics"]["disagree"]["value"] == 0 and len(result["rows"]) > 3, error
