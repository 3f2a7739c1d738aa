"""Bayesian and Markov networks: a graph, tables on it, and what follows from both.

    p(x) = prod_i p(x_i | x_parents(i))        or        p(x) = 1/Z prod_a psi_a(x_a)    [1] sections 3.2, 4.2
    log p(e) >= E_q log prod_a psi_a(x_a, e) + H(q),  the gap is KL(q || p(x | e))       [1] section 11.1

`--method`: ve, variable elimination in min-fill order [1] algorithm 9.1; junction, one calibration of a junction tree
for all marginals at once [2]; map, the most probable state; loopy belief propagation with its Bethe free energy [3];
gibbs sampling; mean-field, coordinate ascent on the bound above. One representation for all: a factor is a tuple of
variables and a table with an axis for each, in a conditional distribution the child's axis last.

References
  [1] Koller, Friedman, Probabilistic Graphical Models, MIT Press 2009
  [2] Shafer, Shenoy, Probability propagation, Annals of Mathematics and Artificial Intelligence 2, 1990
  [3] Yedidia, Freeman, Weiss, Constructing free-energy approximations and generalized belief propagation, 2005
  [4] Dempster, Laird, Rubin, Maximum likelihood from incomplete data via the EM algorithm, JRSS B 39, 1977

Glossary
  symbol       code            shape                  meaning
  G, H         parents, graph  {name: names}          a DAG by its parents; an undirected graph by its neighbours
  psi_a        Factor          (K_1, ..., K_m)        of variables with K_i states
  e            evidence        {name: state}          name or number; for a junction tree also (B,), -1 unobserved
  Z, p(e)      log_z           () or (B,)             of the product of factors under the evidence, nats

Use
  python pgm.py --network asia --evidence xray=yes,smoke=no         all posteriors, by junction tree
  python pgm.py --bif alarm.bif.gz --evidence HR=HIGH --query CO,BP --method ve
  python pgm.py --example medical                    a course problem: its derivation beside a numerical check
  python pgm.py --model pixels --dataset persian     a Bayesian network over pixels (pixels.py)

Not included: continuous variables other than in the examples, learning of structure from data, influence diagrams.
"""

import math
from typing import NamedTuple

import numpy as np

# ---- graphs: a DAG is {node: parents}, an undirected graph {node: neighbours}; more in graphs.py


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


def ancestors(parents: dict, nodes) -> set:
    """The nodes and all that lead to them."""
    found, stack = set(), list(nodes)
    while stack:
        if (v := stack.pop()) not in found:
            found.add(v)
            stack += parents[v]
    return found


def complete(graph: dict, nodes) -> None:
    """Join all of `nodes`, in place."""
    for v in nodes:
        graph[v].update(u for u in nodes if u != v)


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


def interaction(factors, names) -> dict:
    """The undirected graph in which the variables of each factor are neighbours."""
    graph = {v: set() for v in names}
    for f in factors:
        complete(graph, f.variables)
    return graph


def marginal(factor: Factor, keep) -> Factor:
    """Summed over all variables but `keep`, whose order is that of the result."""
    axes = tuple(i for i, v in enumerate(factor.variables) if v not in keep)
    return product([Factor(tuple(v for v in factor.variables if v in keep), factor.table.sum(axes))], keep)


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
            elif s in states if isinstance(s, str) else s in range(len(states)):
                out[v] = states.index(s) if isinstance(s, str) else int(s)
            else:
                raise ValueError(f"{v} has no state {s!r}; its states are {', '.join(states)}")
        return out

    def under(self, evidence) -> list[Factor]:
        """The factors with the evidence sliced out."""
        at = self.observe(evidence)
        pick = lambda f: f.table[tuple(at.get(v, slice(None)) for v in f.variables)]
        return [Factor(tuple(v for v in f.variables if v not in at), pick(f)) for f in self.factors]

    def graph(self) -> dict:                                            # of a Bayesian network, the moral graph
        return interaction(self.factors, self.states)

    def parameters(self) -> int:
        """Free ones: of a CPD (K - 1) a row; of a potential one an entry."""
        return sum(f.table.size - (f.table[..., 0].size if self.parents else 0) for f in self.factors)


def bayesian(states: dict, cpds: dict) -> Network:
    """From {child: (parents, table)}, tables (K_parents..., K_child) with rows that sum to 1."""
    for v in [*states, *cpds]:
        if v not in cpds or v not in states:
            what = "is no variable of the network" if v in cpds else "has no conditional distribution"
            raise ValueError(f"{v} {what}; each variable needs exactly one")
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
    names = tuple(v for v in network.states if v not in (evidence or {}))
    shape = [network.size[v] for v in names]
    if math.prod(shape) > 2**24:
        raise ValueError(f"a joint table of {math.prod(shape)} cells is too large; ask for single variables instead")
    return product([Factor(names, np.ones(shape)), *network.under(evidence)])


# ---- exact inference


def impossible(evidence):
    what = ", ".join(f"{v} = {s}" for v, s in (evidence or {}).items() if not isinstance(s, np.ndarray))
    return ValueError(f"the evidence {what or 'given'} has probability zero")


def remove(factors, order, size: dict, over, evidence) -> tuple[list, float, list]:
    """Variables taken out one after the other: (factors left, log of what they were divided by, [(v, table)] with v as
    the first axis, as it was before it went)."""
    largest = [f.table.max() or 1.0 for f in factors]                   # divided by: a product of many may underflow
    factors = [Factor(f.variables, f.table / s) for f, s in zip(factors, largest)]
    log_scale, tables = float(np.log(largest).sum()), []
    for v in order:
        touched = product([Factor((v,), np.ones(size[v])), *(f for f in factors if v in f.variables)])
        made = over(touched.table, axis=0)
        if not (scale := made.max(initial=0)):
            raise impossible(evidence)
        log_scale += math.log(scale)
        factors = [*(f for f in factors if v not in f.variables), Factor(touched.variables[1:], made / scale)]
        tables.append((v, touched))
    return factors, log_scale, tables


def eliminate(network: Network, query=(), evidence=None, order=None) -> tuple[Factor, float]:
    """p(query | evidence) and log p(evidence) (or log Z). [1] algorithm 9.1; `order` overrides min-fill.
    Of a Bayesian network what is no ancestor of query and evidence is barren and left out."""
    query = tuple(network.known(v) for v in ((query,) if isinstance(query, str) else query))
    at, factors, names = network.observe(evidence), network.under(evidence), set(network.states)
    if both := at.keys() & set(query):
        raise ValueError(f"{', '.join(both)} is in the query and in the evidence")
    if network.parents:
        names = ancestors(network.parents, (*query, *at))
        factors = [f for f, whole in zip(factors, network.factors) if whole.variables[-1] in names]
    if order is None:
        order = triangulate(interaction(factors, names - at.keys()), network.size, query)[0]
    order = [v for v in order if v in names and v not in at and v not in query]
    left, log_z, _ = remove(factors, order, network.size, np.sum, evidence)
    table = product([Factor(query, np.ones([network.size[v] for v in query])), *left], query).table
    if not (total := table.sum()):
        raise impossible(evidence)
    return Factor(query, table / total), log_z + math.log(total)


def most_probable(network: Network, evidence=None) -> tuple[dict, float]:
    """The state of all that is not observed with the largest p(x, e), and its log (of the product, without Z)."""
    at, factors = network.observe(evidence), network.under(evidence)
    order = triangulate(interaction(factors, [v for v in network.states if v not in at]), network.size)[0]
    (left, log_p, tables), best = remove(factors, order, network.size, np.max, evidence), {}
    if not all(f.table for f in left):                                  # by now numbers, divided to be 1
        raise impossible(evidence)
    for v, touched in reversed(tables):
        best[v] = int(touched.table[(slice(None), *(best[u] for u in touched.variables[1:]))].argmax())
    return {v: network.states[v][best[v]] for v in network.states if v in best}, log_p


class JunctionTree:
    """Cliques of the triangulated graph, each joined to one that holds all it shares with the rest; built once, asked
    often, with any number of sets of evidence at a time. [2]

    Every table has its variables in one order, last eliminated first, and the sets of evidence behind. So what a clique
    shares with its parent comes first, a message is a sum over axes, and it meets its receiver by broadcasting."""

    def __init__(self, network: Network):
        self.network, size = network, network.size
        order, made = triangulate(network.graph(), size)
        place, owner, sets, last = {v: i for i, v in enumerate(order)}, {}, [], {}
        self.parent, self.sepset = [], []                               # parents come before their children
        for v, clique in zip(reversed(order), reversed(made)):
            rest = clique - {v}
            above = owner[min(rest, key=place.get)] if rest else None   # it holds all of rest
            if rest and rest == sets[above]:                            # not maximal: it grows by v
                sets[above], owner[v] = clique, above
                continue
            owner[v] = len(sets)
            sets.append(clique)
            if rest:                                                    # a chain, not a star, whose product underflows
                last[above, frozenset(rest)], above = owner[v], last.get((above, frozenset(rest)), above)
            self.parent.append(above)
            self.sepset.append(rest)
        self.cliques = [tuple(sorted(c, key=place.get, reverse=True)) for c in sets]
        self.children, held = [[] for _ in sets], [[Factor(c, np.ones([size[v] for v in c]))] for c in self.cliques]
        for i in range(len(sets) - 1, 0, -1):                           # in the order in which their messages come
            if self.parent[i] is not None:
                self.children[self.parent[i]].append(i)
        self.home = {f.variables: owner[min(f.variables, key=place.get)] for f in network.factors if f.variables}
        for f in network.factors:
            held[self.home.get(f.variables, 0)].append(f)
        shape = lambda c, names: tuple(size[v] if v in names else 1 for v in c) + (-1,)
        axes = lambda c, names: tuple(k for k, v in enumerate(c) if v not in names)
        self.tables, self.up, self.down = [], [], []
        for i, (c, p, shared) in enumerate(zip(self.cliques, self.parent, self.sepset)):
            table = product(held[i]).table
            self.tables.append(table[..., None])
            above = () if p is None else self.cliques[p]
            first = math.prod(size[v] for v in shared)
            self.up.append(((first, table.size // first, -1), shape(above, shared)))
            self.down.append((axes(above, shared), shape(c, shared)))
        self.single = {v: (i, axes(self.cliques[i], [v]), shape(self.cliques[i], [v])) for v, i in owner.items()}
        self.indicator = {v: np.vstack([np.eye(k), np.ones(k)]) for v, k in size.items()}       # row -1: unobserved

    def calibrate(self, evidence=None, first: int = 0) -> tuple[list, np.ndarray]:
        """p(clique | e) of each clique, (K..., B), and log p(e), (B,); B is 1 where no evidence is an array.

        What scales a message up, to a largest of 1, also divides the one that comes back down: then each clique of a
        tree sums to what its root does, and a root that is normalised normalises all."""
        at, tables, add = self.network.observe(evidence), list(self.tables), np.add.reduce
        for v, s in at.items():
            i, _, shape = self.single[v]
            tables[i] = tables[i] * self.indicator[v][s].T.reshape(shape)
        messages = [[] for _ in tables]
        scales = np.empty((len(tables), max([np.size(s) for s in at.values()], default=1)))
        with np.errstate(divide="ignore", invalid="ignore"):
            for i in range(len(tables) - 1, -1, -1):
                table = tables[i]
                for message in messages[i]:
                    table = table * message
                shape, at_parent = self.up[i]
                message = add(table.reshape(shape), 1)
                scales[i] = np.maximum.reduce(message, 0)
                tables[i] = tables[i] / scales[i] if self.parent[i] is None else tables[i]
                if self.parent[i] is not None:
                    messages[self.parent[i]].append((message / scales[i]).reshape(at_parent))
        if not scales.all():
            which = first + int((scales == 0).any(0).argmax())
            raise ValueError(f"{impossible(evidence)}{f' in set {which}' if scales.shape[1] > 1 else ''}")
        for i, table in enumerate(tables):
            after = [1.0]                                               # products of the messages that come later
            for message in messages[i][:0:-1]:
                after.append(after[-1] * message)
            for j, message in zip(self.children[i], messages[i]):
                axes, shape = self.down[j]
                others = table * after.pop() if len(after) > 1 else table
                tables[j] = tables[j] * (add(others, axes) / scales[j]).reshape(shape)
                table = table * message
            tables[i] = table
        return tables, np.log(scales).sum(0)

    def marginals(self, evidence=None) -> tuple[dict, np.ndarray]:
        """{name: p(x | e), (K,)} of all variables, and log p(e); (B, K) and (B,) where some evidence is an array (B,).
        Many sets go through in blocks that fit the cache."""
        at = self.network.observe(evidence)
        many = {v: len(s) for v, s in at.items() if isinstance(s, np.ndarray)}
        if len(set(many.values())) > 1:
            raise ValueError(f"evidence for several sets must have one length, not {many}")
        n, out, log_z = next(iter(many.values()), 1), {v: [] for v in self.single}, []
        block = max(1, 2**17 // max(t.size for t in self.tables))
        for k in range(0, n, block):
            part = {v: s[k:k + block] if v in many else s for v, s in (evidence or {}).items()}
            beliefs, z = self.calibrate(part, k)
            log_z.append(z)
            for v, (i, axes, _) in self.single.items():
                out[v].append(np.add.reduce(beliefs[i], axes))
        if not many:
            return {v: p[0][:, 0] for v, p in out.items()}, log_z[0][0]
        return {v: np.concatenate(p, 1).T for v, p in out.items()}, np.concatenate(log_z)


# ---- approximate inference


def entropy(p: np.ndarray) -> float:
    return -float((p * np.log(np.where(p > 0, p, 1))).sum())


def loopy(network: Network, evidence=None, rounds: int = 500, damping: float = 0.5, tolerance: float = 1e-10):
    """({name: belief}, Bethe log Z, largest change of the last round) by sum-product on the factor graph.

    Exact on trees; elsewhere a fixed point of the Bethe free energy [3], if it is reached at all: a change above
    the tolerance says that it was not. All messages move together, new ones weigh 1 - damping."""
    factors, change = network.under(evidence), math.inf
    possible = all(f.table.any() for f in factors)
    names = [v for v in network.states if v not in (evidence or {})]
    into = {v: [(a, f.variables.index(v)) for a, f in enumerate(factors) if v in f.variables] for v in names}
    to_variable = {(a, k): np.full(network.size[v], 1 / network.size[v]) for v in names for a, k in into[v]}

    def normal(p):
        if not (total := p.sum()) or not possible:
            raise impossible(evidence)
        return p / total

    def belief(a, without=None):                                        # psi_a times what its variables say
        f, table = factors[a], factors[a].table
        for k, v in enumerate(f.variables):
            if k != without:
                said = math.prod((to_variable[b, m] for b, m in into[v] if b != a), start=np.ones(network.size[v]))
                table = table * normal(said).reshape([-1 if i == k else 1 for i in range(table.ndim)])
        return table

    for _ in range(rounds):
        new = {(a, k): normal(belief(a, k).sum(tuple(i for i in range(factors[a].table.ndim) if i != k)))
               for a, k in to_variable}
        change = max((abs(new[e] - to_variable[e]).max() for e in new), default=0.0)
        to_variable = {e: (1 - damping) * m + damping * to_variable[e] for e, m in new.items()}
        if change < tolerance:
            break
    beliefs = {v: normal(math.prod((to_variable[e] for e in into[v]), start=np.ones(network.size[v]))) for v in names}
    log_z = -sum((len(into[v]) - 1) * entropy(b) for v, b in beliefs.items())
    for a, f in enumerate(factors):
        b = normal(belief(a))
        log_z += (b * np.log(np.where(f.table > 0, f.table, 1))).sum() + entropy(b)
    return beliefs, float(log_z), change


def conditional(factors, v, state: dict) -> np.ndarray:
    """p(v | all others) of many states {name: (C,)}, (C, K): the factors that touch v, multiplied and normalised."""
    tables = [(f, np.moveaxis(f.table, f.variables.index(v), -1)) for f in factors if v in f.variables]
    weight = np.ones((len(next(iter(state.values()))), 1))
    for f, table in tables:
        weight = weight * table[tuple(state[u] for u in f.variables if u != v)]
    return weight / weight.sum(-1, keepdims=True)


def gibbs(network: Network, evidence=None, sweeps: int = 1000, chains: int = 100, burn: int = 100, rng=None):
    """({name: estimate of p(x | e)}, {name: its standard error}) from many chains; each visit counts its whole
    conditional. Chains start as forward samples weighted by the evidence; zeros in a table may part what they reach."""
    rng, at = rng or np.random.default_rng(0), network.observe(evidence)
    names = [v for v in network.states if v not in at]
    factors = [*network.under(at), *(Factor((v,), np.ones(network.size[v])) for v in names)]
    if network.parents:
        start, log_weight = sample(network, max(10_000, chains), rng, at)
        if log_weight.max() == -np.inf:
            raise ValueError(f"no start: in {len(log_weight)} forward samples {impossible(evidence)}")
        weight = np.exp(log_weight - log_weight.max())
        chosen = rng.choice(len(weight), chains, p=weight / weight.sum())
        state = {v: start[v][chosen] for v in names}
    else:
        state = {v: rng.integers(network.size[v], size=chains) for v in names}
    touching = {v: [Factor(f.variables, f.table / f.table.max()) for f in factors if v in f.variables] for v in names}
    means = {v: np.zeros((chains, network.size[v])) for v in names}
    for sweep in range(burn + sweeps):
        for v in names:
            p = conditional(touching[v], v, state)
            state[v] = (rng.random((chains, 1)) > p.cumsum(-1)[:, :-1]).sum(-1)
            means[v] += p / sweeps * (sweep >= burn)
    return {v: m.mean(0) for v, m in means.items()}, {v: m.std(0) / (chains - 1) ** 0.5 for v, m in means.items()}


def expected_log(log_factor: Factor, q: dict, without=None) -> np.ndarray:
    """E_q log psi_a over all its variables but `without`."""
    table = log_factor.table
    for k in reversed(range(len(log_factor.variables))):
        if (v := log_factor.variables[k]) != without:
            table = np.tensordot(table, q[v], (k, 0))
    return table


def elbo(log_factors, q: dict) -> float:
    """sum_a E_q log psi_a + sum_i H(q_i) <= log Z. [1] section 11.1"""
    return float(sum(expected_log(f, q) for f in log_factors)) + sum(map(entropy, q.values()))


def mean_field_update(log_factors, q: dict, v) -> np.ndarray:
    """The best q_v while the others stay: log q_v = sum_{a of v} E_q log psi_a + constant. [1] section 11.5.1"""
    score = sum(expected_log(f, q, v) for f in log_factors if v in f.variables)
    p = np.exp(score - score.max())
    return p / p.sum()


def mean_field(network: Network, evidence=None, sweeps: int = 200, tolerance: float = 1e-10, rng=None):
    """(q, [ELBO before and after each sweep]): one variable after the other, which never lowers the bound (all at once
    may). Local optima depend on the random start. A zero counts as 1e-300, so its bound is on a Z that is as close."""
    rng, names = rng or np.random.default_rng(0), [v for v in network.states if v not in (evidence or {})]
    log_factors = [Factor(f.variables, np.log(np.maximum(f.table, 1e-300))) for f in network.under(evidence)]
    log_factors += [Factor((v,), np.zeros(network.size[v])) for v in names]
    touching = {v: [f for f in log_factors if v in f.variables] for v in names}
    q = {v: rng.dirichlet(np.full(network.size[v], 10.0)) for v in names}
    bounds = [elbo(log_factors, q)]
    for _ in range(sweeps):
        for v in names:
            q[v] = mean_field_update(touching[v], q, v)
        bounds.append(elbo(log_factors, q))
        if bounds[-1] - bounds[-2] < tolerance:
            break
    return q, bounds


# ---- sampling and learning


def sample(network: Network, n: int, rng=None, evidence=None) -> tuple[dict, np.ndarray]:
    """({name: states (n,)}, log weights (n,)): parents first, evidence held and weighted by its probability."""
    if not network.parents:
        raise ValueError("ancestral sampling needs a Bayesian network; this one has potentials and no direction")
    rng, at, out, log_weight = rng or np.random.default_rng(0), network.observe(evidence), {}, np.zeros(n)
    cpds, u = {f.variables[-1]: f for f in network.factors}, np.empty(n)
    for v in topological(network.parents):
        table, row = cpds[v].table, 0
        for p in network.parents[v]:
            row = row * network.size[p] + out[p]
        rows = table.reshape(-1, network.size[v])
        if v in at:
            out[v] = np.full(n, at[v])
            with np.errstate(divide="ignore"):
                log_weight += np.log(rows[row, at[v]])
            continue
        rng.random(out=u)
        state = np.zeros(n, np.intp)
        for limit in rows.cumsum(-1).T[:-1]:
            state += u >= limit[row]
        out[v] = state
    return out, log_weight


def em(network: Network, data: dict, rounds: int = 100, tolerance: float = 1e-8, pseudo: float = 0.0):
    """(network with fitted tables, [log-likelihood before each round and at the end]) from {name: states (N,)}, -1 or
    no array where hidden. One calibration a round, of all distinct rows at once, gives the expected counts of families
    [4]. The log-likelihood never falls (pseudo = 0). Rows of a table that never occur stay as they are."""
    data = {v: np.asarray(s) for v, s in network.observe(data).items()}
    if not network.parents or not data:
        raise ValueError("EM fits the tables of a Bayesian network to rows of data, {name: array of states}")
    rows, counts = np.unique(np.stack(list(data.values())), axis=1, return_counts=True)
    history = []
    for k in range(rounds + 1):
        tree = JunctionTree(network)
        beliefs, log_z = tree.calibrate(dict(zip(data, rows)))
        history.append(float(log_z @ counts))
        if k == rounds or k and history[-1] - history[-2] < tolerance * len(counts) and not pseudo:
            break
        factors = []
        for f in network.factors:
            i = tree.home[f.variables]
            family = marginal(Factor(tree.cliques[i], beliefs[i] @ counts), f.variables).table + pseudo
            total = family.sum(-1, keepdims=True)
            factors.append((f.variables, np.where(total > 0, family / np.where(total > 0, total, 1), f.table)))
        network = Network(network.states, factors, network.parents)
    return network, history


# ---- one run

METHODS = {                                                 # -> {name: belief} and log Z (a list of bounds: mean field)
    "junction": lambda net, e, rng: JunctionTree(net).marginals(e),
    "ve": lambda net, e, rng: ({v: eliminate(net, v, e)[0].table for v in net.states if v not in e},
                               eliminate(net, (), e)[1]),
    "loopy": lambda net, e, rng: loopy(net, e),
    "gibbs": lambda net, e, rng: (gibbs(net, e, rng=rng)[0], None),
    "mean-field": lambda net, e, rng: mean_field(net, e, rng=rng),
    "map": lambda net, e, rng: most_probable(net, e),
}


def main():
    import argparse
    import sys

    if "--model pixels" in " ".join(sys.argv).replace("=", " "):                    # has a command line of its own
        import pixels
        argv = "\0".join(sys.argv[1:]).replace("--model=pixels", "--model\0pixels")
        sys.argv[1:] = filter(None, argv.replace("--model\0pixels", "", 1).split("\0"))
        return pixels.main()

    import draw_graphs
    import formats
    import networks
    import problems
    import run

    built_in = {**networks.NETWORKS, **networks.MARKOV}
    parser = run.Parser(prog="pgm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(built_in), default="asia", help="a built-in network; default asia")
    parser.add_argument("--bif", default="", help="a network from this .bif or .bif.gz file")
    parser.add_argument("--example", choices=list(problems.PROBLEMS), help="solve this course problem")
    parser.add_argument("--model", choices=["pixels"], help="the Bayesian network over pixels (pixels.py)")
    parser.add_argument("--method", choices=list(METHODS), default="junction")
    parser.add_argument("--evidence", default="", help="name=state,...")
    parser.add_argument("--query", default="", help="name,...; default: all that is not observed")
    parser.add_argument("--sample", type=int, default=0, help="write so many ancestral samples to samples.csv")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--out", default="results", help="folder of results")
    args = parser.parse_args()
    if args.sample < 0 or not 0 <= args.seed < 2**63:
        parser.error("--sample must not be negative, --seed between 0 and 2^63 - 1")
    name = args.example or (args.bif and args.bif.rpartition("/")[2].partition(".")[0]) or args.network
    args.script, args.model, args.dataset = "pgm", "example" if args.example else args.method, name
    args.device, args.batch, args.steps = "cpu", 1, 0
    with run.Run(args) as job:
        if args.example:
            return problems.report(job, args.example, sys.modules[__name__])
        data = formats.read_bif(args.bif) if args.bif else built_in[name][1:]
        network = Network(*data) if name in networks.MARKOV and not args.bif else bayesian(*data)
        pairs = [p.partition("=") for p in args.evidence.split(",") if p]
        evidence, rng = {v.strip(): s.strip() for v, _, s in pairs}, np.random.default_rng(args.seed)
        drawn = sample(network, args.sample, rng)[0] if args.sample else None
        query = [network.known(v) for v in map(str.strip, args.query.split(",")) if v]
        answer = METHODS[args.method](network, evidence, rng)
        draw_graphs.report(job, network, JunctionTree(network), evidence, query, answer, drawn)


if __name__ == "__main__":
    main()
