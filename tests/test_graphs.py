"""What graphs say: separation by four methods over every small DAG, classes of equal graphs counted, maps of distributions."""

import itertools

import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import graphs
import networks


def all_dags(n):
    """Every labelled DAG on n nodes: 1, 3, 25, 543, 29281, ..."""
    names = "abcdefg"[:n]
    for choice in itertools.product((0, 1, 2), repeat=n * (n - 1) // 2):
        parents = {v: () for v in names}
        for (a, b), arrow in zip(itertools.combinations(names, 2), choice):
            if arrow:
                child, parent = (b, a) if arrow == 1 else (a, b)
                parents[child] += (parent,)
        try:
            graphs.topological(parents)
        except ValueError:
            continue
        yield parents


def random_dag(seed, n, density=0.3):
    rng = np.random.default_rng(seed)
    names = [f"v{i}" for i in rng.permutation(n)]
    return {v: tuple(u for u in names[:i] if rng.random() < density) for i, v in enumerate(names)}


def by_moral_ancestors(parents, x, y, z):
    keep = graphs.ancestors(parents, {x, y, *z})
    return graphs.separated(graphs.moralize({v: parents[v] for v in keep}), x, y, z)


def as_networkx(parents):
    graph = networkx.DiGraph()
    graph.add_nodes_from(parents)
    graph.add_edges_from((p, v) for v, above in parents.items() for p in above)
    return graph


def queries(names):
    return [(x, y, set(z)) for x, y in itertools.combinations(sorted(names), 2) for z in graphs.subsets(set(names) - {x, y})]


def random_joint(parents, seed, most=3):
    rng = np.random.default_rng(seed)
    names = graphs.topological(parents)
    size = {v: int(rng.integers(2, most + 1)) for v in names}
    table = np.ones([size[v] for v in names])
    for v in names:
        cpd = rng.dirichlet(np.ones(size[v]), [size[p] for p in parents[v]])
        at = {u: i for i, u in enumerate((*parents[v], v))}
        cpd = cpd.transpose([at[u] for u in names if u in at])
        table = table * cpd[tuple(slice(None) if u in at else None for u in names)]
    return table, names


# ---- d-separation


def test_separation_by_four_methods_over_every_dag_of_four_nodes():  # opens = z; not visited by direction; families all
    count = 0
    for parents in all_dags(4):
        asked = queries(parents)
        walked = [graphs.d_separated(parents, *q) for q in asked]
        at = graphs.Separations(parents)
        assert walked == [by_moral_ancestors(parents, *q) for q in asked] == at(asked) == [at.one(*q) for q in asked]
        count += 1
    assert count == 543


@given(st.integers(0, 10**6))
def test_separation_is_networkx_and_symmetric(seed):  # end = 1 << x
    parents = random_dag(seed, 10)
    graph, at, rng = as_networkx(parents), graphs.Separations(parents), np.random.default_rng(seed)
    asked = [(x, y, set(z)) for x, y, *z in (rng.choice(list(parents), rng.integers(2, 7), replace=False).tolist() for _ in range(40))]
    truth = [networkx.is_d_separator(graph, {x}, {y}, z) for x, y, z in asked]
    assert truth == at(asked) == at([(y, x, z) for x, y, z in asked]) == at(asked, block=7)
    assert truth == [at.one(*q) for q in asked] == [graphs.d_separated(parents, *q) for q in asked]


@given(st.integers(0, 10**6))
def test_laws_of_separation(seed):  # any instead of all sides
    parents, rng = random_dag(seed, 8), np.random.default_rng(seed)
    names = rng.permutation(list(parents)).tolist()
    x, y, w, z = names[:1], names[1:3], names[3:4], names[4:6]
    sep = lambda x, y, z: graphs.d_separated(parents, x, y, z)
    assert sep(x, y + w, z) == sep(y + w, x, z)                                     # symmetry
    assert not sep(x, y + w, z) or sep(x, y, z) and sep(x, y, z + w)                # decomposition, weak union
    assert not (sep(x, y, z + w) and sep(x, w, z)) or sep(x, y + w, z)              # contraction


@given(st.integers(0, 10**6))
def test_separation_is_independence_and_nearly_always_the_other_way(seed):  # entropy(z) left out
    parents = random_dag(seed, 5, 0.4)
    table, names = random_joint(parents, seed)
    asked = queries(parents)
    found = [graphs.mutual_information(table, names, *q) for q in asked]
    apart = [graphs.d_separated(parents, *q) for q in asked]
    assert all(mi < 1e-12 for mi, s in zip(found, apart) if s)
    assert sum(mi < 1e-9 for mi, s in zip(found, apart) if not s) <= 0.02 * len(asked)


def test_separation_checks_its_names():  # no check
    parents = {"a": (), "b": ("a",)}
    for x, y, z in (("a", "c", ()), ("a", "a", ()), ("a", "b", {"a"})):
        with pytest.raises(ValueError):
            graphs.d_separated(parents, x, y, z)
    with pytest.raises(ValueError, match="cycle"):
        graphs.topological({"a": ("b",), "b": ("a",)})


@given(st.integers(0, 10**6))
def test_the_blanket_cuts_a_node_off_and_is_its_moral_neighbourhood(seed):  # children's other parents left out
    parents = random_dag(seed, 8)
    for x in parents:
        blanket = graphs.markov_blanket(parents, x)
        rest = set(parents) - blanket - {x}
        assert not rest or graphs.d_separated(parents, x, rest, blanket)
        assert blanket == graphs.moralize(parents)[x]
        for v in blanket:                                   # and none of it can be spared
            assert not graphs.d_separated(parents, x, v, blanket - {v})
    for x, others, above in graphs.local_statements(parents):
        assert graphs.d_separated(parents, x, others, above)


# ---- cliques and chords


@given(st.integers(0, 10**6), st.sampled_from([0.2, 0.5, 0.8]))
def test_cliques_and_chordality_are_networkx(seed, p):  # done not handed on; `earlier` not all joined
    graph = networkx.gnp_random_graph(9, p, seed=seed)
    ours = {v: set(graph[v]) for v in graph}
    found = graphs.maximal_cliques(ours)
    assert len(found) == len(set(found)) and set(found) == set(map(frozenset, networkx.find_cliques(graph)))
    assert graphs.is_chordal(ours) == networkx.is_chordal(graph)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_moon_moser_graphs_have_the_most_cliques(k):  # pivot's neighbours tried as well would repeat them
    graph = {v: {u for u in range(3 * k) if u // 3 != v // 3} for v in range(3 * k)}
    assert len(graphs.maximal_cliques(graph)) == 3**k


def test_a_tree_and_a_ring():
    assert graphs.is_chordal({"a": {"b"}, "b": {"a"}}) and not graphs.is_chordal({0: {1, 3}, 1: {0, 2}, 2: {1, 3}, 3: {0, 2}})
    assert graphs.maximal_cliques({"a": set()}) == [{"a"}]


# ---- classes


@pytest.mark.parametrize("n, dags, classes", [(1, 1, 1), (2, 3, 2), (3, 25, 11), (4, 543, 185)])
def test_counts_of_dags_and_classes(n, dags, classes):  # immoralities of joined parents; R1 dropped
    everything = list(all_dags(n))
    assert len(everything) == dags
    groups = {}
    for parents in everything:
        directed, free = graphs.essential(parents)
        groups.setdefault((frozenset(directed), frozenset(free)), []).append(parents)
    assert len(groups) == classes
    for members in groups.values():
        assert all(graphs.i_equivalent(members[0], m) for m in members)
        arrows = [{(p, v) for v, above in m.items() for p in above} for m in members]
        directed, free = graphs.essential(members[0])
        assert directed == set.intersection(*arrows)        # exactly the arrows that all members share
        assert {frozenset(e) for e in set.union(*arrows) - directed} == free


def test_equal_classes_are_equal_independences():  # `same skeleton` alone
    seen = {}
    for parents in all_dags(3):
        said = frozenset(graphs.statements(parents, lambda *s: graphs.d_separated(parents, *s)))  # noqa: B023
        if len(graphs.skeleton(parents)):
            seen.setdefault(said, []).append(parents)
    for one, other in itertools.combinations(seen.values(), 2):
        assert not graphs.i_equivalent(one[0], other[0])
    for members in seen.values():
        assert all(graphs.i_equivalent(members[0], m) for m in members)


# ---- maps of a distribution


@given(st.integers(0, 10**6))
def test_a_minimal_i_map_loses_no_edge(seed):  # subsets from the largest
    parents = random_dag(seed, 4, 0.5)
    table, names = random_joint(parents, seed)
    independent = graphs.oracle(table, names)
    rng = np.random.default_rng(seed)
    found = graphs.minimal_i_map(rng.permutation(names).tolist(), independent)
    said = lambda g: graphs.statements(g, lambda *s: graphs.d_separated(g, *s))
    truth = graphs.statements(names, independent)
    assert said(found) <= truth
    for v, above in found.items():
        for p in above:
            assert not said({**found, v: tuple(u for u in above if u != p)}) <= truth
    own = graphs.minimal_i_map(graphs.topological(parents), lambda x, y, z: graphs.d_separated(parents, x, y, z))
    assert {v: set(a) for v, a in own.items()} == {v: set(a) for v, a in parents.items()}


def test_the_burglary_network_in_a_bad_order_has_more_edges():
    parents = {v: p for v, (p, _) in networks.NETWORKS["burglary"][2].items()}
    oracle = lambda x, y, z: graphs.d_separated(parents, x, y, z)
    count = lambda order: sum(map(len, graphs.minimal_i_map(order, oracle).values()))
    assert count("BEAJM") == 4 and count("MJABE") == 6 and count("MJEBA") == 10


@given(st.integers(0, 10**6))
def test_the_markov_map_of_a_bayesian_network_is_its_moral_graph(seed):  # names without - {x, y}
    parents = random_dag(seed, 5, 0.4)
    oracle = lambda x, y, z: graphs.d_separated(parents, x, y, z)
    assert graphs.markov_i_map(list(parents), oracle) == graphs.moralize(parents)


def test_every_dag_of_four_nodes_is_found_from_its_independences():  # colliders without the witness
    for parents in itertools.islice(all_dags(4), 0, None, 7):
        found = graphs.find_perfect_map(parents, lambda *s: graphs.d_separated(parents, *s))  # noqa: B023
        assert graphs.i_equivalent(found, parents)


def test_what_has_no_perfect_map():  # same statements not checked
    xor = np.zeros((2, 2, 2))
    for x, y in itertools.product((0, 1), repeat=2):
        xor[x, y, x ^ y] = 0.25
    assert graphs.find_perfect_map("xyz", graphs.oracle(xor, "xyz")) is None
    ring = {v: set(n) for v, n in {"a": "bd", "b": "ac", "c": "bd", "d": "ac"}.items()}
    assert graphs.find_perfect_map("abcd", lambda *s: graphs.separated(ring, *s)) is None


@given(st.integers(0, 10**6))
def test_an_undirected_graph_has_a_perfect_dag_exactly_when_chordal(seed):  # is_chordal true for a ring
    graph = networkx.gnp_random_graph(4, 0.6, seed=seed)
    ours = {"abcd"[v]: {"abcd"[u] for u in graph[v]} for v in graph}
    found = graphs.find_perfect_map("abcd", lambda *s: graphs.separated(ours, *s))
    assert (found is not None) == graphs.is_chordal(ours)


@given(st.integers(0, 10**6))
def test_a_dag_has_a_perfect_markov_network_exactly_without_immoralities(seed):
    parents = random_dag(seed, 4, 0.5)
    moral = graphs.moralize(parents)
    same = graphs.statements(parents, lambda *s: graphs.d_separated(parents, *s)) == graphs.statements(parents, lambda *s: graphs.separated(moral, *s))
    assert same == (not graphs.immoralities(parents))


@given(st.integers(0, 10**6))
def test_hammersley_clifford_factors_multiply_to_the_distribution(seed):  # a sign of the Moebius sum
    rng = np.random.default_rng(seed)
    ring = {v: set(n) for v, n in {"a": "bd", "b": "ac", "c": "bd", "d": "ac"}.items()}
    log_p = sum(np.expand_dims(rng.normal(size=(2, 2)), axes) for axes in ((2, 3), (0, 3), (0, 1))) + rng.normal(size=(2, 1, 1, 2))
    log_p -= np.log(np.exp(log_p).sum())
    total = np.zeros_like(log_p)
    for clique in graphs.subsets(range(4)):
        inner = np.zeros_like(log_p)
        for part in graphs.subsets(clique):                 # the others at their first state
            fixed = log_p[tuple(slice(None) if k in part else slice(0, 1) for k in range(4))]
            inner += (-1) ** (len(clique) - len(part)) * fixed
        names = ["abcd"[k] for k in clique]
        if all(b in ring[a] for a, b in itertools.combinations(names, 2)):
            total += inner
        else:
            np.testing.assert_allclose(inner, 0, atol=1e-10)
    np.testing.assert_allclose(total, log_p, atol=1e-10)
