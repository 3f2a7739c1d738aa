"""What a graph says without any table: separation, blankets, cliques, classes of equal graphs, maps of a distribution.

A DAG is {node: parents}, an undirected graph {node: neighbours}; nodes are names. A distribution enters as an oracle
independent(x, ys, z) -> bool: `oracle` makes one of a joint table, and the same functions then hold a graph against it.

    d_separated, separated, Separations          one query, or thousands at once
    markov_blanket, moralize, is_chordal, maximal_cliques
    i_equivalent, essential, cpdag               what graphs with the same independences share
    statements, local_statements, minimal_i_map, markov_i_map, find_perfect_map

References
  [1] Koller, Friedman, Probabilistic Graphical Models, MIT Press 2009, chapters 3 and 4
  [2] Bron, Kerbosch, Algorithm 457, CACM 16(9), 1973; pivot: Tomita, Tanaka, Takahashi, TCS 363, 2006
  [3] Meek, Causal inference and causal explanation with background knowledge, arXiv 1302.4972
  [4] Tarjan, Yannakakis, Simple linear-time algorithms to test chordality, SIAM J. Comput. 13, 1984
"""

import itertools
import math

import numpy as np

# ---- DAGs; topological, ancestors and complete are those of pgm.py, which stands alone


def topological(parents: dict) -> list:
    """The nodes, parents first; ValueError if there is a cycle or an unknown parent."""
    order, seen, waiting = [], set(), dict(parents)
    if unknown := [(v, p) for v, above in parents.items() for p in above if p not in parents]:
        raise ValueError("{} has the parent {}, which is not a variable of the network".format(*unknown[0]))
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


def is_chordal(graph: dict) -> bool:
    """Whether elimination in reversed maximum-cardinality order adds no edge. [4]"""
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
    """Bron-Kerbosch with a pivot. [2]"""

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
    Meek's rules R1 to R3 [3]; R4 is for background knowledge."""
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
        if all(order.index(a) < order.index(b) for a, b in arrows):
            rest = [sorted(e, key=order.index) for e in free]
            parents = {v: tuple(a for a, b in [*arrows, *rest] if b == v) for v in names}
            if immoralities(parents) == colliders:
                return parents if is_perfect_map(parents, names, independent) else None
    return None


def is_perfect_map(parents: dict, names, independent) -> bool:
    """Whether the d-separations of a DAG are exactly the independences of an oracle."""
    return statements(names, lambda *s: d_separated(parents, *s)) == statements(names, independent)


def mutual_information(joint: np.ndarray, names, x, y, z=()) -> float:
    """I(x; y | z) in nats of a normalised table with an axis for each name; 0 exactly where they are independent."""
    x, y, z = map(as_set, (x, y, z))

    def entropy(keep):
        p = joint.sum(tuple(i for i, v in enumerate(names) if v not in keep)).ravel()
        return -math.fsum(p[p > 0] * np.log(p[p > 0]))

    return entropy(x | z) + entropy(y | z) - entropy(x | y | z) - entropy(z)


def oracle(joint: np.ndarray, names, tolerance: float = 1e-12):
    """independent(x, y, z) of a distribution: whether the mutual information is 0 up to rounding."""
    return lambda x, y, z=(): mutual_information(joint, names, x, y, z) < tolerance


class Separations:
    """d-separation in a DAG asked often. Many queries (x, y, z) at once: bit q of an integer belongs to query q,
    so that one pass of algorithm 3.1 over the edges, up and down until nothing changes, serves thousands."""

    def __init__(self, parents: dict):
        self.order = topological(parents)
        self.index = {v: i for i, v in enumerate(self.order)}
        self.parents = [[self.index[p] for p in parents[v]] for v in self.order]
        self.above, self.below, self.older = [], [0] * len(self.order), []      # bit masks of nodes
        for i, above in enumerate(self.parents):
            self.above.append(sum(1 << p for p in above))
            older = 1 << i
            for p in above:
                self.below[p] |= 1 << i
                older |= self.older[p]
            self.older.append(older)                                            # ancestors and the node itself

    def one(self, x, y, z) -> bool:
        """A single query, by the moral graph of the ancestors without z: whether y lies in another part than x."""
        at, older, above, below = self.index, self.older, self.above, self.below
        x, y, relevant, observed = at[x], at[y], 0, 0
        relevant = older[x] | older[y]
        for v in z:
            relevant |= older[at[v]]
            observed |= 1 << at[v]
        end, edge, left = 1 << y, 1 << x, relevant & ~observed          # left: neither observed nor found
        families = relevant                                             # of which the parents are still to be married
        while edge:
            v = edge.bit_length() - 1
            edge ^= 1 << v
            born = below[v] & families
            families &= ~born
            near = above[v] | born
            while born:
                c = born.bit_length() - 1
                born ^= 1 << c
                near |= above[c]
            near &= left
            if near & end:
                return False
            left ^= near
            edge |= near
        return True

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
