"""Bayesian and Markov networks: a graph, tables on it, and what follows from both.

    p(x) = prod_i p(x_i | x_parents(i))        or        p(x) = 1/Z prod_a psi_a(x_a)    [1] (3.17), definition 4.3
    log p(e) >= E_q log prod_a psi_a(x_a, e) + H(q),  the gap is KL(q || p(x | e))       [1] (11.3)

`--method`: ve, variable elimination in min-fill order [1] algorithm 9.1; junction, one calibration of a junction tree
for all marginals at once [2]; map, the most probable state; loopy belief propagation with its Bethe free energy [3];
gibbs sampling; mean-field, coordinate ascent on the bound above. One representation for all: a factor is a tuple of
variables and a table with an axis for each, in a conditional distribution the child's axis last. A junction tree also
takes many sets of evidence at once; they are one more axis behind the others, so that sums run along memory.

References
  [1] Koller, Friedman, Probabilistic Graphical Models, MIT Press 2009
  [2] Shafer, Shenoy, Probability propagation, Annals of Mathematics and Artificial Intelligence 2, 1990
  [3] Yedidia, Freeman, Weiss, Constructing free-energy approximations and generalized belief propagation, 2005
  [4] Bron, Kerbosch, Algorithm 457, CACM 16(9), 1973; pivot: Tomita, Tanaka, Takahashi, TCS 363, 2006
  [5] Meek, Causal inference and causal explanation with background knowledge, arXiv 1302.4972
  [6] Dempster, Laird, Rubin, Maximum likelihood from incomplete data via the EM algorithm, JRSS B 39, 1977

Glossary
  symbol       code            shape                  meaning
  G, H         parents, graph  {name: names}          a DAG by its parents; an undirected graph by its neighbours
  psi_a        Factor          (K_1, ..., K_m)        of variables with K_i states
  e            evidence        {name: state}          a state's name or number; a junction tree: (B,), -1 unobserved
  Z, p(e)      log_z           () or (B,)             of the product of factors under the evidence, nats
  S_ij         sepset          names                  what two neighbours in the junction tree share
  q_i          q               {name: (K_i,)}         the factors of a mean field

Use
  python pgm.py --network asia --evidence xray=yes,smoke=no                all posteriors, by junction tree
  python pgm.py --bif alarm.bif.gz --evidence HR=HIGH --query CO,BP --method ve
  python pgm.py --example medical                    a course problem: its derivation beside a numerical check
  python pgm.py --model pixels --dataset persian     a Bayesian network over pixels (pixels.py)

Not included: continuous variables other than in the examples, learning of structure from data, influence diagrams.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

# ---- graphs: a DAG is {node: parents}, an undirected graph {node: neighbours}


def topological(parents: dict) -> list:
    """The nodes, parents first; ValueError if there is a cycle or an unknown parent."""
    order, seen, waiting = [], set(), dict(parents)
    for v, above in parents.items():
        for p in above:
            if p not in parents:
                raise ValueError(f"{v} has the parent {p}, which is not a variable of the network")
    while waiting:
        ready = [v for v, above in waiting.items() if seen.issuperset(above)]
        if not ready:
            raise ValueError(f"the arrows among {', '.join(map(str, waiting))} hold a cycle, so this is no DAG")
        order += ready
        seen.update(ready)
        waiting = {v: above for v, above in waiting.items() if v not in seen}
    return order


def children(parents: dict) -> dict:
    out = {v: [] for v in parents}
    for v, above in parents.items():
        for p in above:
            out[p].append(v)
    return out


def ancestors(parents: dict, nodes) -> set:
    """The nodes and all that lead to them."""
    found, stack = set(), list(nodes)
    while stack:
        if (v := stack.pop()) not in found:
            found.add(v)
            stack += parents[v]
    return found


def reachable(parents: dict, below: dict, x, z) -> set:
    """Nodes with an active trail from x given z; `below` are the children. [1] algorithm 3.1"""
    z = set(z)
    opens = ancestors(parents, z)                                       # a collider among these is open
    visited, found, stack = set(), set(), [(x, True)]
    while stack:
        v, up = state = stack.pop()                                     # up: the trail came from a child
        if state in visited:
            continue
        visited.add(state)
        if v not in z:
            found.add(v)
            stack += [(c, False) for c in below[v]]
        if v not in z if up else v in opens:
            stack += [(p, True) for p in parents[v]]
    return found


def as_set(x) -> set:
    return {x} if isinstance(x, str) else set(x)


def d_separated(parents: dict, x, y, z=()) -> bool:
    """Whether x is separated from y by z in a DAG: names or sets of names."""
    x, y, z = map(as_set, (x, y, z))
    for v in x | y | z:
        if v not in parents:
            raise ValueError(f"{v} is not a variable of the graph; it has {', '.join(map(str, parents))}")
    if x & y or (x | y) & z:
        raise ValueError("the three sets of a statement about independence must not share a variable")
    below = children(parents)
    return not any(reachable(parents, below, v, z) & y for v in x)


def separated(graph: dict, x, y, z=()) -> bool:
    """Whether z cuts every path between x and y in an undirected graph."""
    found, stack, y = set(as_set(z)), list(as_set(x)), as_set(y)
    while stack:
        if (v := stack.pop()) not in found:
            found.add(v)
            stack += graph[v]
    return not found & (y - as_set(z))


def markov_blanket(parents: dict, x) -> set:
    """Parents, children and the children's other parents."""
    below = children(parents)[x]
    return {*parents[x], *below, *(p for c in below for p in parents[c])} - {x}


def complete(graph: dict, nodes) -> None:
    """Join all of `nodes`, in place."""
    for v in nodes:
        graph[v].update(u for u in nodes if u != v)


def moralize(parents: dict) -> dict:
    graph = {v: set() for v in parents}
    for v, above in parents.items():
        complete(graph, (v, *above))
    return graph


def triangulate(graph: dict, size: dict, last=()) -> tuple[list, list]:
    """An elimination order of all but `last` and the clique that each node made: least fill-in first, then the
    smallest table. The counts are those of the graph as it is by then, not of the first one."""
    graph, order, cliques = {v: set(n) for v, n in graph.items()}, [], []

    def cost(v):
        around = graph[v]
        return sum(len(around - graph[u]) - 1 for u in around) // 2, math.prod(size[u] for u in around) * size[v]

    costs = {v: cost(v) for v in graph if v not in last}
    while costs:
        v = min(costs, key=costs.get)
        around = graph.pop(v)
        order.append(v)
        cliques.append({v, *around})
        changed = around | {w for u in around for w in graph[u]} if costs.pop(v)[0] else around
        for u in around:
            graph[u].discard(v)
        complete(graph, around)
        costs.update((u, cost(u)) for u in changed if u in costs)
    return order, cliques


def is_chordal(graph: dict) -> bool:
    """Whether elimination in reversed maximum-cardinality order adds no edge."""
    numbered = []
    weight = dict.fromkeys(graph, 0)
    while weight:
        v = max(weight, key=weight.get)
        earlier = graph[v].intersection(numbered)
        if any(b not in graph[a] for a, b in itertools.combinations(earlier, 2)):
            return False
        del weight[v]
        numbered.append(v)
        for u in graph[v]:
            if u in weight:
                weight[u] += 1
    return True


def maximal_cliques(graph: dict) -> list[frozenset]:
    """Bron-Kerbosch with a pivot. [4]"""

    def extend(clique, candidates, done):
        if not candidates and not done:
            yield frozenset(clique)
            return
        pivot = max(candidates | done, key=lambda u: len(candidates & graph[u]))
        for v in list(candidates - graph[pivot]):
            yield from extend(clique | {v}, candidates & graph[v], done & graph[v])
            candidates = candidates - {v}
            done = done | {v}

    return list(extend(frozenset(), set(graph), set()))


def immoralities(parents: dict) -> set:
    """(a, c, b) with a -> c <- b and no edge between a and b, a < b."""
    linked = lambda a, b: a in parents[b] or b in parents[a]
    return {(*sorted((a, b))[:1], c, *sorted((a, b))[1:]) for c, above in parents.items()
            for a, b in itertools.combinations(above, 2) if not linked(a, b)}


def skeleton(parents: dict) -> set:
    return {frozenset((p, v)) for v, above in parents.items() for p in above}


def i_equivalent(a: dict, b: dict) -> bool:
    """Same skeleton and same immoralities. [1] theorem 3.8"""
    return a.keys() == b.keys() and skeleton(a) == skeleton(b) and immoralities(a) == immoralities(b)


def cpdag(edges: set, colliders: set) -> tuple[set, set]:
    """Arrows that all members of a class share, {(a, b)}, and the undirected rest, from skeleton and immoralities.
    Meek's rules R1 to R3 [5]; R4 is for background knowledge."""
    arrows = {(x, c) for a, c, b in colliders for x in (a, b)}
    free = {e for e in edges if not any((a, b) in arrows for a, b in itertools.permutations(e))}
    nodes = set().union(*edges) if edges else set()
    joined = lambda a, b: frozenset((a, b)) in edges

    def forced(a, b):                                                   # a - b must become a -> b
        into = [c for c in nodes if (c, b) in arrows]
        return (any((c, a) in arrows and c != b and not joined(c, b) for c in nodes)                    # R1
                or any((a, c) in arrows for c in into)                                                  # R2
                or any(frozenset((a, c)) in free and frozenset((a, d)) in free and not joined(c, d)
                       for c, d in itertools.combinations(into, 2)))                                    # R3

    while found := next((pair for e in free for pair in itertools.permutations(e) if forced(*pair)), None):
        arrows.add(found)
        free.remove(frozenset(found))
    return arrows, free


def essential(parents: dict) -> tuple[set, set]:
    """The CPDAG of a DAG's class."""
    return cpdag(skeleton(parents), immoralities(parents))


def subsets(items, least: int = 0):
    items = list(items)
    return itertools.chain.from_iterable(itertools.combinations(items, k) for k in range(least, len(items) + 1))


def minimal_i_map(order, independent) -> dict:
    """The DAG in which each variable gets a least set of predecessors that cuts it off from the others; order matters.
    independent(x, ys, z) answers for the distribution. [1] algorithm 3.2"""
    parents = {}
    for i, v in enumerate(order):
        above = next(u for u in subsets(order[:i])
                     if len(u) == i or independent(v, set(order[:i]) - set(u), set(u)))
        parents[v] = tuple(above)
    return parents


def markov_i_map(names, independent) -> dict:
    """The minimal undirected I-map of a positive distribution: no edge where x and y are independent given the rest."""
    graph = {v: set() for v in names}
    for x, y in itertools.combinations(names, 2):
        if not independent(x, {y}, set(names) - {x, y}):
            complete(graph, (x, y))
    return graph


def statements(names, separated) -> set:
    """All (x, y, z) of a graph or a distribution, x and y single, that `separated(x, {y}, z)` affirms."""
    return {(x, y, frozenset(z)) for x, y in itertools.combinations(sorted(names), 2)
            for z in subsets(set(names) - {x, y}) if separated(x, {y}, set(z))}


def local_statements(parents: dict) -> list:
    """(x, its non-descendants without the parents, its parents) where the middle is not empty. [1] definition 3.1"""
    rest = {v: {u for u in parents if v not in ancestors(parents, [u])} - set(parents[v]) for v in parents}
    return [(v, others, set(parents[v])) for v, others in rest.items() if others]


def find_perfect_map(names, independent) -> dict | None:
    """A DAG whose d-separations are exactly the independences of an oracle, or None: skeleton, immoralities, rules,
    an extension, and the test of every statement. [1] section 3.4.3"""
    names, witness, edges = list(names), {}, set()
    for x, y in itertools.combinations(names, 2):
        cut = next((set(z) for z in subsets(set(names) - {x, y}) if independent(x, {y}, set(z))), None)
        edges |= {frozenset((x, y))} if cut is None else set()
        witness[frozenset((x, y))] = cut
    colliders = {(*sorted((a, b))[:1], c, *sorted((a, b))[1:]) for c in names
                 for a, b in itertools.combinations([v for v in names if frozenset((v, c)) in edges], 2)
                 if frozenset((a, b)) not in edges and c not in witness[frozenset((a, b))]}
    arrows, free = cpdag(edges, colliders)
    for order in itertools.permutations(names):                         # small graphs: any order that fits the arrows
        place = {v: i for i, v in enumerate(order)}
        if all(place[a] < place[b] for a, b in arrows):
            rest = [sorted(e, key=place.get) for e in free]
            parents = {v: tuple(a for a, b in [*arrows, *rest] if b == v) for v in names}
            if immoralities(parents) == colliders:
                same = statements(names, lambda *s: d_separated(parents, *s)) == statements(names, independent)
                return parents if same else None
    return None


class Separations:
    """d-separation of many queries (x, y, z) at once: bit q of an integer belongs to query q, so that one pass of
    algorithm 3.1 over the edges, up and down until nothing changes, serves thousands."""

    def __init__(self, parents: dict):
        self.order = topological(parents)
        self.index = {v: i for i, v in enumerate(self.order)}
        self.parents = [[self.index[p] for p in parents[v]] for v in self.order]

    def __call__(self, queries, block: int = 4096) -> list[bool]:
        return [s for i in range(0, len(queries), block) for s in self._block(queries[i:i + block])]

    def _block(self, queries):
        index, parents, n = self.index, self.parents, len(self.order)
        up, down, z, ends = [0] * n, [0] * n, [0] * n, []
        for q, (x, y, observed) in enumerate(queries):
            bit = 1 << q
            up[index[x]] |= bit
            ends.append(index[y])
            for v in observed:
                z[index[v]] |= bit
        opens, both = z[:], range(n)
        for v in reversed(both):
            for p in parents[v]:
                opens[p] |= opens[v]
        hidden = [~m for m in z]
        before = None
        while before != (up, down):
            before = up[:], down[:]
            for v in reversed(both):
                if rising := up[v] & hidden[v] | down[v] & opens[v]:
                    for p in parents[v]:
                        up[p] |= rising
            passing = [(a | b) & h for a, b, h in zip(up, down, hidden)]
            for v in both:
                for p in parents[v]:
                    down[v] |= passing[p]
                passing[v] |= down[v] & hidden[v]
        return [not (up[y] | down[y]) >> q & 1 for q, y in enumerate(ends)]


# ---- factors and networks


class Factor(NamedTuple):
    variables: tuple[str, ...]
    table: np.ndarray


def aligned(factor: Factor, variables) -> np.ndarray:
    """The table with an axis for each of `variables`, of length 1 where the factor does not depend on it."""
    at = {v: i for i, v in enumerate(factor.variables)}
    table = factor.table.transpose([at[v] for v in variables if v in at])
    return table[tuple(slice(None) if v in at else None for v in variables)]


def product(factors, variables=None) -> Factor:
    """Of at least one factor; axes in the order of `variables`, else of first appearance."""
    scope = dict.fromkeys(v for f in factors for v in f.variables)
    variables = tuple(scope) if variables is None else tuple(variables)
    table = aligned(factors[0], variables)
    for f in factors[1:]:
        table = table * aligned(f, variables)
    return Factor(variables, table)


def marginal(factor: Factor, keep, over=np.sum) -> Factor:
    """Summed (or `over` = np.max) over all variables but `keep`, whose order is that of the result."""
    axes = tuple(i for i, v in enumerate(factor.variables) if v not in keep)
    left = Factor(tuple(v for v in factor.variables if v in keep), over(factor.table, axis=axes))
    return product([left], [v for v in keep if v in left.variables])


def mutual_information(joint: Factor, x, y, z=()) -> float:
    """I(x; y | z) in nats of a normalised joint table; 0 exactly where they are independent."""
    x, y, z = (tuple(sorted(as_set(s))) for s in (x, y, z))
    entropy = lambda names: -sum(p * math.log(p) for p in marginal(joint, names).table.ravel().tolist() if p > 0)
    return entropy(x + z) + entropy(y + z) - entropy(x + y + z) - entropy(z)


def oracle(joint: Factor, tolerance: float = 1e-12):
    """independent(x, y, z) of a distribution: whether the mutual information is 0 up to rounding."""
    return lambda x, y, z=(): mutual_information(joint, x, y, z) < tolerance


class Network:
    """Variables with their states, and factors whose product is p(x) up to 1/Z; `parents` where each factor is a
    conditional distribution (Z = 1), else None."""

    def __init__(self, states: dict, factors, parents: dict | None = None):
        self.states = {v: tuple(map(str, s)) for v, s in states.items()}
        self.size = {v: len(s) for v, s in self.states.items()}
        self.parents, self.factors = parents, []
        for variables, table in factors:
            table, shape = np.asarray(table, float), tuple(self.size[self.known(v)] for v in variables)
            if table.shape != shape:
                raise ValueError(f"the table of {', '.join(variables)} is {table.shape}; its states ask for {shape}")
            if not (table >= 0).all() or not np.isfinite(table).all():
                raise ValueError(f"the table of {', '.join(variables)} holds a number that is negative or not finite")
            self.factors.append(Factor(tuple(variables), table))

    def known(self, v) -> str:
        if v not in self.size:
            raise ValueError(f"unknown variable {v!r}; the network has {', '.join(self.size)}")
        return v

    def observe(self, evidence) -> dict:
        """{name: number of the state}, with arrays (B,) of numbers kept; names and numbers checked."""
        out = {}
        for v, s in (evidence or {}).items():
            states = self.states[self.known(v)]
            if isinstance(s, np.ndarray):
                if s.dtype.kind not in "iu" or s.min(initial=0) < -1 or s.max(initial=0) >= len(states):
                    raise ValueError(f"evidence of {v} must be whole numbers from -1 to {len(states) - 1}")
                out[v] = s
            elif str(s) in states:
                out[v] = states.index(str(s))
            elif isinstance(s, (int, np.integer)) and 0 <= s < len(states):
                out[v] = int(s)
            else:
                raise ValueError(f"{v} has no state {s!r}; its states are {', '.join(states)}")
        return out

    def under(self, evidence) -> list[Factor]:
        """The factors with the evidence sliced out."""
        at = self.observe(evidence)
        pick = lambda f: f.table[tuple(at.get(v, slice(None)) for v in f.variables)]
        return [Factor(tuple(v for v in f.variables if v not in at), pick(f)) for f in self.factors]

    def graph(self) -> dict:
        """Undirected: all variables of a factor are neighbours (of a Bayesian network, the moral graph)."""
        graph = {v: set() for v in self.states}
        for f in self.factors:
            complete(graph, f.variables)
        return graph

    def parameters(self) -> int:
        """Free ones: of a CPD (K - 1) a row; of a potential one an entry."""
        return sum(f.table.size - (f.table[..., 0].size if self.parents else 0) for f in self.factors)


def bayesian(states: dict, cpds: dict) -> Network:
    """From {child: (parents, table)}, tables (K_parents..., K_child) with rows that sum to 1."""
    for v in states:
        if v not in cpds:
            raise ValueError(f"{v} has no conditional distribution")
    for v in cpds:
        if v not in states:
            raise ValueError(f"there is a distribution of {v}, which is not a variable of the network")
    parents = {v: tuple(cpds[v][0]) for v in states}
    topological(parents)
    network = Network(states, [((*parents[v], v), cpds[v][1]) for v in states], parents)
    for f in network.factors:
        if not np.allclose(total := f.table.sum(-1), 1, rtol=0, atol=1e-6):
            worst = np.ravel(total)[abs(np.ravel(total) - 1).argmax()]
            raise ValueError(f"the rows of the table of {f.variables[-1]} must sum to 1; one sums to {worst:.6g}")
    return network


def joint(network: Network, evidence=None) -> Factor:
    """The whole table of the variables that are not observed, not normalised: the oracle of small networks."""
    factors = network.under(evidence)
    names = [v for v in network.states if v not in (evidence or {})]
    if (cells := math.prod(network.size[v] for v in names)) > 2**24:
        raise ValueError(f"a joint table of {cells} cells is too large; ask for single variables by another method")
    table = product([*factors, Factor((), np.ones(()))], names).table
    return Factor(tuple(names), np.broadcast_to(table, [network.size[v] for v in names]))


# ---- exact inference


def impossible(evidence):
    what = ", ".join(f"{v} = {s}" for v, s in (evidence or {}).items() if not isinstance(s, np.ndarray))
    return ValueError(f"the evidence {what or 'given'} has probability zero")


def eliminate(network: Network, query=(), evidence=None, order=None) -> tuple[Factor, float]:
    """p(query | evidence) and log p(evidence) (or log Z). [1] algorithm 9.1; `order` overrides min-fill.
    Of a Bayesian network what is no ancestor of query and evidence is barren and left out."""
    query = (query,) if isinstance(query, str) else tuple(network.known(v) for v in query)
    at, factors = network.observe(evidence), network.under(evidence)
    if both := at.keys() & set(query):
        raise ValueError(f"{', '.join(both)} is in the query and in the evidence")
    names = set(network.states)
    if network.parents:
        names = ancestors(network.parents, (*map(network.known, query), *at))
        factors = [f for f, whole in zip(factors, network.factors) if whole.variables[-1] in names]
    factors += [Factor((v,), np.ones(network.size[v])) for v in names - at.keys()]      # each has one at least
    graph, log_z = {v: set() for v in names - at.keys()}, 0.0
    for f in factors:
        complete(graph, f.variables)
    if order is None:
        order, _ = triangulate(graph, network.size, query)
    for v in order:
        if v not in graph or v in query:
            continue
        touched = product([f for f in factors if v in f.variables])
        factors = [f for f in factors if v not in f.variables]
        made = marginal(touched, [u for u in touched.variables if u != v])
        if not (scale := made.table.max(initial=0)):
            raise impossible(evidence)
        log_z += math.log(scale)
        factors.append(Factor(made.variables, made.table / scale))
    result = product([*factors, Factor((), np.ones(()))], query).table
    if not (total := result.sum()):
        raise impossible(evidence)
    return Factor(query, result / total), log_z + math.log(total)


def most_probable(network: Network, evidence=None) -> tuple[dict, float]:
    """The state of all that is not observed with the largest p(x, e), and its log (of the product, without Z)."""
    factors, log_p, choices = network.under(evidence), 0.0, []
    graph = {v: set() for v in network.states if v not in (evidence or {})}
    for f in factors:
        complete(graph, f.variables)
    for v in triangulate(graph, network.size)[0]:
        touched = product([Factor((v,), np.ones(network.size[v])), *(f for f in factors if v in f.variables)])
        factors = [f for f in factors if v not in f.variables]
        choices.append((v, touched))
        made = marginal(touched, touched.variables[1:], np.max)
        if not (scale := made.table.max(initial=0)):
            raise impossible(evidence)
        log_p += math.log(scale)
        factors.append(Factor(made.variables, made.table / scale))
    best = {}
    for v, touched in reversed(choices):                                # v is the first axis
        best[v] = int(touched.table[(slice(None), *(best[u] for u in touched.variables[1:]))].argmax())
    rest = math.prod(float(f.table) for f in factors)
    if not rest:
        raise impossible(evidence)
    return {v: network.states[v][best[v]] for v in network.states if v in best}, log_p + math.log(rest)


class JunctionTree:
    """Cliques of the triangulated graph joined in a spanning forest of largest sepsets; built once, asked often. [2]

    Every table has its variables in one order, with the sets of evidence behind: a message is a sum over axes and
    meets its receiver by broadcasting, with no permutation."""

    def __init__(self, network: Network):
        self.network, size = network, network.size
        order, made = triangulate(network.graph(), size)
        place = {v: i for i, v in enumerate(order)}
        sets = [c for i, c in enumerate(made) if not any(c < other for other in made[:i])]      # only maximal ones
        self.cliques = [tuple(sorted(c, key=place.get)) for c in sets]
        pairs = itertools.combinations(range(len(sets)), 2)
        links = sorted(((len(shared), i, j) for i, j in pairs if (shared := sets[i] & sets[j])), reverse=True)
        root = list(range(len(sets)))                                   # Kruskal
        near = {i: [] for i in root}

        def find(i):
            while root[i] != i:
                i = root[i]
            return i

        for _, i, j in links:
            if find(i) != find(j):
                root[find(i)] = find(j)
                near[i].append(j)
                near[j].append(i)
        self.parent, self.order, self.children = {}, [], {i: [] for i in near}                  # parents first
        stack = [(i, None) for i in near if find(i) == i]
        while stack:
            i, above = stack.pop()
            self.order.append(i)
            self.parent[i] = above
            stack += [(j, i) for j in near[i] if j != above]
        for i in reversed(self.order):                                  # in the order in which their messages come
            if self.parent[i] is not None:
                self.children[self.parent[i]].append(i)
        self.sepset = {i: sets[i] & sets[p] if p is not None else set() for i, p in self.parent.items()}
        held = [[] for _ in sets]
        for f in network.factors:                                       # each factor goes to the smallest clique
            held[self._smallest(f.variables)].append(f)
        self.tables = [np.broadcast_to(product([Factor((), np.ones(())), *fs], c).table, [size[v] for v in c])[..., None]
                       for c, fs in zip(self.cliques, held)]
        self.tables = [np.ascontiguousarray(t) for t in self.tables]
        shape = lambda names, c: tuple(size[v] if v in names else 1 for v in c) + (-1,)
        axes = lambda names, c: tuple(k for k, v in enumerate(c) if v not in names)
        self.up, self.down = {}, {}                                     # (axes to sum, shape at the receiver)
        for i, p in self.parent.items():
            here, there = self.cliques[i], self.cliques[i if p is None else p]
            self.up[i] = axes(self.sepset[i], here), shape(self.sepset[i], there)
            self.down[i] = axes(self.sepset[i], there), shape(self.sepset[i], here)
        self.all = {i: tuple(range(len(self.cliques[i if p is None else p]))) for i, p in self.parent.items()}
        self.home = {v: self._smallest((v,)) for v in network.states}
        self.single = {v: (axes((v,), self.cliques[i]), shape((v,), self.cliques[i])) for v, i in self.home.items()}
        self.indicator = {v: np.vstack([np.eye(k), np.ones(k)]) for v, k in size.items()}       # row -1: unobserved

    def _smallest(self, variables) -> int:
        inside = (i for i, c in enumerate(self.cliques) if set(variables) <= set(c))
        return min(inside, key=lambda i: math.prod(self.network.size[v] for v in self.cliques[i]))

    @property
    def width(self) -> int:
        return max(map(len, self.cliques)) - 1

    def calibrate(self, evidence=None) -> tuple[list, np.ndarray]:
        """p(clique | e) of each clique, (K..., B), and log p(e), (B,); B is 1 where no evidence is an array.

        What scales a message up, so that it sums to 1, also divides the one that comes back down: then each clique of
        a tree sums to what its root does, and a root that is normalised normalises all."""
        at, tables, add = self.network.observe(evidence), list(self.tables), np.add.reduce
        for v, s in at.items():
            i = self.home[v]
            tables[i] = tables[i] * self.indicator[v][s].T.reshape(self.single[v][1])
        messages, scales = [[] for _ in tables], [None] * len(tables)
        with np.errstate(divide="ignore", invalid="ignore"):
            for i in reversed(self.order):
                table = tables[i]
                for message in messages[i]:
                    table = table * message
                axes, shape = self.up[i]
                message = add(table, axes).reshape(shape)
                scales[i] = scale = add(message, self.all[i])
                if (above := self.parent[i]) is None:
                    tables[i] = tables[i] / scale
                else:
                    messages[above].append(message / scale)
        scales = np.stack(np.broadcast_arrays(*scales))
        if not scales.all():
            which = "" if scales.shape[1] == 1 else f" in set {int((scales == 0).any(0).argmax())}"
            raise ValueError(f"{impossible(evidence)}{which}")
        for i in self.order:
            table, after = tables[i], [1.0]                             # products of the messages that come later
            for message in messages[i][:0:-1]:
                after.append(after[-1] * message)
            for j, message in zip(self.children[i], messages[i]):
                axes, shape = self.down[j]
                tables[j] = tables[j] * (add(table * after.pop(), axes).reshape(shape) / scales[j])
                table = table * message
            tables[i] = table
        return tables, np.log(scales).sum(0)

    def marginals(self, evidence=None, names=None) -> tuple[dict, np.ndarray]:
        """{name: p(x | e)} of all variables or of `names`, (K,) each, and log p(e); (B, K) and (B,) for evidence (B,).
        Many sets go through in blocks that fit the cache."""
        at = self.network.observe(evidence)
        many = {v: len(s) for v, s in at.items() if isinstance(s, np.ndarray)}
        if len(set(many.values())) > 1:
            raise ValueError(f"evidence for several sets must have one length, not {many}")
        names = list(self.network.states) if names is None else list(map(self.network.known, names))
        n, out, log_z = next(iter(many.values()), 1), {v: [] for v in names}, []
        block = max(1, 2**17 // max(t.size for t in self.tables)) if many else 1
        for k in range(0, n, block):
            part = {v: s[k:k + block] if v in many else s for v, s in at.items()}
            beliefs, z = self.calibrate(part)
            log_z.append(z)
            for v in names:
                out[v].append(np.add.reduce(beliefs[self.home[v]], self.single[v][0]))
        if not many:
            return {v: p[0][:, 0] for v, p in out.items()}, log_z[0][0]
        return {v: np.concatenate(p, 1).T for v, p in out.items()}, np.concatenate(log_z)
