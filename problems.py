"""The course problems: what the derivation gives beside a number that is found in another way.

    solve(name, pgm) -> (what it is, [Row])         `pgm` is that module, handed in: nothing here imports a script

A row holds what was derived by hand, what enumeration, quadrature, elimination or sampling found, and how far apart
they may be; where a solved sheet is wrong, `sheet` says what it claims. Each problem stands in its own function, with
its closed forms above it as functions of their own, which the tests use.

Sources
  K. N. Toosi University, homework 1 (stone drops, zeta, tables, counting), 2 (networks), 3 (ELBO) of Deep Generative
  Models; University of Tehran, the same course, 1403 and 1404 (server, medicine, separation, the two approximations)
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

import graphs
import networks

E = math.e


class Row(NamedTuple):
    what: str
    derived: Any
    found: Any
    tolerance: float = 1e-9
    sheet: Any = None                                       # a claim that the derivation refutes

    @property
    def agrees(self) -> bool:
        if isinstance(self.derived, float):
            return abs(self.derived - self.found) <= self.tolerance
        return self.derived == self.found


def quadrature(f, low: float, high: float, panels: int = 2000) -> float:
    """Integral of a smooth vectorised function by Gauss-Legendre with 5 points a panel."""
    x, w = np.polynomial.legendre.leggauss(5)
    edges = np.linspace(low, high, panels + 1)
    half = (edges[1:] - edges[:-1])[:, None] / 2
    return float((f((edges[:-1, None] + half) + half * x) * w * half).sum())


def simulate(n, seed=0):
    return np.random.default_rng(seed).random((2, n))


def cliques(text: str) -> set:
    """{'AB', 'BCD'} as sets of one-letter names."""
    return {frozenset(c) for c in text.split()}


def statement(text: str):
    """'O,A|M' -> ({'O'}, {'A'}, {'M'})."""
    sides, _, z = text.partition("|")
    x, y = sides.split(",")
    return set(x), set(y), set(z)


def check_statements(network, pgm, claims: dict, sheet=()):
    """A row for each claim {'O,A|M': bool}: the derivation beside d-separation and beside the numbers of the joint."""
    joint = pgm.joint(network)
    independent = graphs.oracle(joint.table, joint.variables)
    for text, truth in claims.items():
        s = statement(text)
        wrong = not truth if text in sheet else None
        sides, _, given = text.partition("|")
        what = sides.replace(",", " _|_ ") + (given and f" | {', '.join(given)}")
        yield Row(f"{what}   by the graph", truth, graphs.d_separated(network.parents, *s), 0, wrong)
        yield Row(f"{what}   by the numbers", truth, independent(*s), 0, wrong)


def shaped(text: str) -> str:
    return ", ".join(sorted("".join(sorted(c)) for c in cliques(text)))


def shown(found) -> str:
    return ", ".join(sorted("".join(sorted(c)) for c in found))


# ---- networks


def server(pgm):
    """Server room: O -> T <- A, T -> M, O -> S"""
    net = pgm.bayesian(*networks.NETWORKS["server"][1:])
    moral = graphs.moralize(net.parents)
    yield Row("parameters of the joint 1 + 1 + 4 + 2 + 2", 10, net.parameters())
    yield from check_statements(net, pgm, {"O,A": True, "O,A|M": False, "S,M": False, "S,M|O": True})
    yield Row("maximal cliques of the moral graph", shaped("AOT MT OS"), shown(graphs.maximal_cliques(moral)))
    yield Row("the moral graph is chordal", True, graphs.is_chordal(moral))
    p = np.array
    o, a, t, m, s = (p(networks.NETWORKS["server"][2][v][1]) for v in "OATMS")
    by_hand = (o[:, None] * a * t[..., 0] * m[0, 0]).sum(0) + (o[:, None] * a * t[..., 1] * m[1, 0]).sum(0)
    yield Row("P(A = yes | M = yes), summed by hand", float(by_hand[0] / by_hand.sum()),
              float(pgm.eliminate(net, "A", {"M": "yes"})[0].table[0]), 1e-12)
    yield Row("P(S = yes), summed by hand", float(o @ s[:, 0]), float(pgm.eliminate(net, "S")[0].table[0]), 1e-12)


def medical(pgm):
    """Medical diagnosis: M, S -> I; I, F -> T; I, T -> D. A solved sheet errs in three places"""
    net = pgm.bayesian(*networks.NETWORKS["medical"][1:])
    claims = {"F,D": False, "S,D|IT": True, "M,F": True, "M,F|T": False, "M,T|DI": True}
    yield from check_statements(net, pgm, claims, sheet=("M,T|DI",))
    graph = {v: set() for v in "ABCDEFG"}
    for c in ("ABC", "BDE", "CDF", "EG"):
        graphs.complete(graph, c)
    yield Row("maximal cliques of the graph whose cliques the sheet lists", shaped("ABC BDE CDF EG BCD"),
              shown(graphs.maximal_cliques(graph)), 0, shaped("ABC BDE CDF EG"))
    siren = {v: tuple(p) for v, p in networks.GRAPHS["ut-siren"].items()}
    found = shown(graphs.maximal_cliques(graphs.moralize(siren)))
    yield Row("moral cliques of O -> S, T; A -> T; S -> B; A, B, T -> M", shaped("ABMT AOT BS OS"), found, 0,
              "the same without ABMT")


def kntu(pgm):
    """K. N. Toosi network: B -> A, B -> D <- C, C -> E"""
    net = pgm.bayesian(*networks.NETWORKS["kntu"][1:])
    tree = pgm.JunctionTree(net)
    answers = {"E=1": 0.22, "C=0": 0.3, "C=1|B=1": 0.7, "C=1|B=1,D=0": 0.4375, "D=0|A=1": 0.44, "E=1|A=1,D=1": 0.16}
    for text, value in answers.items():
        what, _, given = text.partition("|")
        v, state = what.split("=")
        found, _ = tree.marginals(dict(pair.split("=") for pair in given.split(",") if given))
        yield Row(f"P({text})", value, float(found[v][int(state)]), 1e-12)


def markov(pgm):
    """Markov network of four spins: e^(AB), e^[B != C], e^(D + CD), e^(-AD)"""
    net = pgm.Network(*networks.MARKOV["markov"][1:])
    table = pgm.joint(net).table
    yield Row("Z", 203.0779990536, float(table.sum()), 1e-9)
    yield Row("Z by elimination", 203.0779990536, math.exp(pgm.eliminate(net)[1]), 1e-9)
    yield Row("Z by the junction tree", 203.0779990536, math.exp(pgm.JunctionTree(net).marginals()[1]), 1e-9)
    yield Row("P(A = 1)", 0.1743880261, float(pgm.eliminate(net, "A")[0].table[1]), 1e-10)
    for (a, b), value in {(0, 0): 157.170095, (0, 1): 10.493533, (1, 0): 4.221497, (1, 1): 31.192875}.items():
        sign = lambda k: "+" if k else "-"
        yield Row(f"Z P(A = {sign(a)}1, B = {sign(b)}1)", value, float(table.sum((2, 3))[a, b]), 1e-6)
    for b, c, d in itertools.product((0, 1), repeat=3):
        derived = 1 / (1 + math.exp(-2 * ((2 * b - 1) - (2 * d - 1))))
        found, at = pgm.eliminate(net, "A", {"B": b, "C": c, "D": d})[0].table[1], [2 * k - 1 for k in (b, c, d)]
        yield Row(f"P(A = 1 | B, C, D = {at}) = sigmoid(2 (B - D))", derived, float(found), 1e-12)
    independent = graphs.oracle(table / table.sum(), "ABCD")
    yield Row("A _|_ C | B, D   by the graph", True, graphs.separated(net.graph(), "A", "C", {"B", "D"}))
    yield Row("A _|_ C | B, D   by the numbers", True, independent("A", "C", {"B", "D"}))
    yield Row("the ring is chordal, so that some Bayesian network has the same independences", False,
              graphs.is_chordal(net.graph()))


def separation(pgm):
    """Separation in two graphs of a Tehran sheet, and a claim about perfect maps"""
    graph = {v: set() for v in "ABCDEFGHI"}
    for edge in networks.GRAPHS["ut-markov"].split():
        graphs.complete(graph, edge)
    claims = {"I,F": False, "B,I|F": False, "A,G|CE": True, "B,AG|CDF": False, "B,F|CD": True, "B,EHGI|CDF": True}
    for text, truth in claims.items():
        yield Row(text.replace(",", " _|_ "), truth, graphs.separated(graph, *statement(text)))
    yield Row("maximal cliques", shaped("AB BCD CDE CG DEF FH GI"), shown(graphs.maximal_cliques(graph)))
    yield Row("chordal, so that a Bayesian network is a perfect map of it", True, graphs.is_chordal(graph))
    dag = {v: tuple(p) for v, p in networks.GRAPHS["ut-bayes"].items()}
    moral = graphs.moralize(dag)
    joined = {e for e in itertools.combinations(dag, 2) if e[1] in moral[e[0]]}
    added = joined - {tuple(sorted(e)) for e in graphs.skeleton(dag)}
    yield Row("Markov blanket of 6", "3457", "".join(sorted(graphs.markov_blanket(dag, "6"))))
    yield Row("edges that moralisation adds", "23, 46", ", ".join(sorted("".join(e) for e in added)))
    yield Row("moral cliques", shaped("123 235 356 467 24"), shown(graphs.maximal_cliques(moral)))
    yield Row("the moral graph is chordal", False, graphs.is_chordal(moral))
    yield Row("the moral graph is a perfect map (no parents were married)", False, not added)
    less = {**graph, "A": set(), "B": graph["B"] - {"A"}}
    claims = graphs.separated(less, "A", "B", set("CDEFGHI")) and not graphs.separated(graph, "A", "B", set("CDEFGHI"))
    yield Row("a perfect map that loses an edge is still an I-map", False, not claims)


def markov_chain(pgm):
    """A Markov chain of seven steps with three states"""
    rng = np.random.default_rng(0)
    states = {f"X{t}": "abc" for t in range(7)}
    table = lambda t: rng.dirichlet(np.ones(3), 3 if t else None)
    net = pgm.bayesian(states, {f"X{t}": ((f"X{t - 1}",) if t else (), table(t)) for t in range(7)})
    joint = pgm.joint(net)
    independent = graphs.oracle(joint.table, joint.variables)
    rest = {f"X{t}" for t in (0, 1, 5, 6)}
    for what, truth, x, y, z in [("X6 _|_ X2 | X4", True, {"X6"}, {"X2"}, {"X4"}),
                                 ("X1 _|_ X5 | X3", True, {"X1"}, {"X5"}, {"X3"}),
                                 ("X3 _|_ the rest | X2, X4", True, {"X3"}, rest, {"X2", "X4"}),
                                 ("X3 _|_ the rest | X2", False, {"X3"}, rest | {"X4"}, {"X2"}),
                                 ("X6 _|_ X2", False, {"X6"}, {"X2"}, set())]:
        yield Row(f"{what}   by the graph", truth, graphs.d_separated(net.parents, x, y, z))
        yield Row(f"{what}   by the numbers", truth, independent(x, y, z))
    power, tables = np.asarray(net.factors[0].table), [f.table for f in net.factors[1:]]
    for T in tables:
        power = power @ T
    found = float(pgm.eliminate(net, "X6")[0].table[0])
    yield Row("P(X6 = a) by a product of transition tables", float(power[0]), found, 1e-12)


# ---- densities and tables


def lambert_w(x: np.ndarray) -> np.ndarray:
    """The branch W >= -1 of w e^w = x, x >= -1 / e, by Halley's rule from the expansion at the branch point."""
    x = np.asarray(x, float)
    p = np.sqrt(np.maximum(2 * (E * x + 1), 0))
    w = np.where(x < 0, -1 + p - p**2 / 3, np.log1p(np.maximum(x, 0)))
    for _ in range(20):
        f = w * np.exp(w) - x
        slope = np.exp(w) * (w + 1) - (w + 2) * f / np.where(w > -1, 2 * (w + 1), 1)
        w = w - np.where(w > -1 + 1e-12, f / np.where(slope == 0, 1, slope), 0)
    return w


def stone_density(radius: float = 1.0, rate: float = 1.0) -> float:
    """a of f(x, y) = a exp(rate r) on the disc of that radius; 1 / (pi radius^2) in the limit rate = 0."""
    t = rate * radius
    if abs(t) < 1e-4:                                       # (1 + (t - 1) e^t) / t^2 = 1/2 + t/3 + t^2/8 + ...
        return 1 / (2 * math.pi * radius**2 * (0.5 + t / 3 + t * t / 8))
    return rate**2 / (2 * math.pi * (1 + (t - 1) * math.exp(t)))


def stone_cdf(r):
    return 1 + (r - 1) * np.exp(r)


def stone_sample(u, v):
    """(r, angle) of uniform numbers: the CDF inverted by Lambert's W."""
    return 1 + lambert_w((u - 1) / E), 2 * math.pi * v - math.pi


def stone_drop(pgm):
    """Stones dropped on the unit disc with density a e^r"""
    radial = lambda f, low=0, high=1: quadrature(lambda r: f(r) * r * np.exp(r), low, high)
    yield Row("a = 1 / (2 pi)", 1 / (2 * math.pi), stone_density(), 1e-12)
    yield Row("mass on the disc", 1.0, stone_density() * 2 * math.pi * radial(np.ones_like))
    yield Row("P(R <= 1/4) = 1 - 3/4 e^(1/4)", float(stone_cdf(0.25)), radial(np.ones_like, 0, 0.25))
    yield Row("P(1/2 <= R <= 3/4)", float(stone_cdf(0.75) - stone_cdf(0.5)), radial(np.ones_like, 0.5, 0.75))
    yield Row("E R = e - 2", E - 2, radial(lambda r: r))
    yield Row("E R^2 = 6 - 2e", 6 - 2 * E, radial(lambda r: r * r))
    log_2pi = math.log(2 * math.pi)
    yield Row("entropy of (X, Y) = log 2 pi - (e - 2)", log_2pi - E + 2, radial(lambda r: log_2pi - r))
    n = 200_000
    r, angle = stone_sample(*simulate(n))
    x, y = r * np.cos(angle), r * np.sin(angle)
    yield Row("Var X = 3 - e, of 200,000 stones", 3 - E, float(x.var()), 5 * float((x**2).std()) / n**0.5)
    yield Row("Cov(X, Y) = 0, of the stones", 0.0, float((x * y).mean()), 5 * float((x * y).std()) / n**0.5)
    corner = lambda a, b: float(((a > 0.8) & (b > 0.8)).mean())
    yield Row("P(X > 0.8, Y > 0.8) = 0, though both have mass there: X, Y dependent", 0.0, corner(x, y), 0.0)
    yield Row("P(R > 1/2, angle > 0) = P(R > 1/2) / 2: R, angle independent", float(1 - stone_cdf(0.5)) / 2,
              float(((r > 0.5) & (angle > 0)).mean()), 5 * 0.5 / n**0.5)


def zeta(n: int, terms: int = 1000) -> tuple[float, float]:
    """(zeta(n), bound of the error), n >= 2: a partial sum and the integral that its tail is close to."""
    k = np.arange(terms, 0, -1.0)
    tail = terms ** (1 - n) / (n - 1) - terms**-n / 2
    return math.fsum(k**-n) + tail, n * terms ** (-n - 1) / 12 + 1e-15


def zeta_problem(pgm):
    """p(i, n) = a i^(-n) on i, n = 2, 3, ..."""
    value = {n: zeta(n)[0] for n in range(2, 60)}
    yield Row("a = 1: the marginals zeta(n) - 1 sum to 1", 1.0, math.fsum(v - 1 for v in value.values()), 1e-9)
    partial = math.fsum(1 / (i * (i - 1)) for i in range(2, 100_001))
    yield Row("the marginals 1 / (i (i - 1)) up to 100,000 sum to 1 - 1e-5", 1 - 1e-5, partial, 1e-12)
    for n in (2, 3, 4, 5):
        direct = math.fsum(np.arange(2, 2_000_001.0)**-n) + 2_000_000.5 ** (1 - n) / (n - 1)
        yield Row(f"p(N = {n}) = zeta({n}) - 1", value[n] - 1, direct, 1e-9)
    yield Row("zeta(2) = pi^2 / 6", math.pi**2 / 6, value[2], 1e-9)
    yield Row("E N = zeta(2) + 1", math.pi**2 / 6 + 1, math.fsum(n * (v - 1) for n, v in value.items()), 1e-9)
    for i in (2, 5):
        row = [(i - 1) * i ** (1.0 - n) for n in range(2, 400)]
        yield Row(f"p(n | i = {i}) sums to 1", 1.0, math.fsum(row))
        yield Row(f"E[N | i = {i}] = 1 + i / (i - 1)", 1 + i / (i - 1), math.fsum(n * p for n, p in enumerate(row, 2)))
    yield Row("p(2, 2) = p(I = 2) p(N = 2), were I, N independent", False, abs(0.25 - 0.5 * (value[2] - 1)) < 1e-12)
    grows = [sum(1 / (i - 1) for i in range(2, m)) for m in (10**3, 10**6)]
    yield Row("E I is infinite: from 10^3 to 10^6 its sums grow by log 1000", math.log(1000), grows[1] - grows[0], 1e-2)


TABLE = {(-1, 1): 0.04, (-1, 2): 0.06, (0, 1): 0.05, (0, 2): 0.08, (1, 1): 0.30, (1, 2): 0.47}


def independence(pgm):
    """A table that is almost, and not quite, independent"""
    p = np.array([[TABLE[m, n] for n in (1, 2)] for m in (-1, 0, 1)])
    product = np.outer(p.sum(1), p.sum(0))
    mi = graphs.mutual_information(p, "MN", "M", "N")
    yield Row("P(M = -1) P(N = 1)", 0.039, float(product[0, 0]), 1e-12)
    yield Row("largest |p(m, n) - p(m) p(n)|", 0.001, float(abs(p - product).max()), 1e-12)
    yield Row("mutual information in nats", 2.9135e-5, mi, 1e-9)
    yield Row("independent: the table has rank 1", False, bool(np.linalg.svd(p)[1][1] < 1e-12))
    yield Row("independent, to a test that rounds at 0.01", True, bool(np.allclose(p, product, atol=1e-2)))
    yield Row("samples until 2 n I(M; N) reaches chi-square's 5.99, about 10^5", 102_800.0, 5.991 / (2 * mi), 100.0)


def counting(pgm):
    """Free parameters of P(A, B, C) with 3, 4 and 2 states"""
    size, names = {"A": 3, "B": 4, "C": 2}, {"A": range(3), "B": range(4), "C": range(2)}

    def of(parents, only=None):
        cpds = {v: (p, np.full([size[u] for u in (*p, v)], 1 / size[v])) for v, p in parents.items()}
        net = pgm.bayesian({v: names[v] for v in parents}, cpds)
        return sum(f.table.size - f.table[..., 0].size for f in net.factors if only is None or f.variables[-1] == only)

    yield Row("P(A, B, C)", 3 * 4 * 2 - 1, of({"A": (), "B": ("A",), "C": ("A", "B")}))
    yield Row("P(A | B)", 4 * 2, of({"B": (), "A": ("B",)}, "A"))
    yield Row("P(B | A)", 3 * 3, of({"A": (), "B": ("A",)}, "B"))
    yield Row("P(A | B, C)", 8 * 2, of({"B": (), "C": (), "A": ("B", "C")}, "A"))
    yield Row("P(C | A, B)", 12 * 1, of({"A": (), "B": (), "C": ("A", "B")}, "C"))
    yield Row("P(A, B | C)", 2 * 11, of({"C": (), "A": ("C",), "B": ("A", "C")}) - 1)
    yield Row("A, B, C independent", 2 + 3 + 1, of({"A": (), "B": (), "C": ()}))
    yield Row("B _|_ C | A", 2 + 3 * 3 + 3 * 1, of({"A": (), "B": ("A",), "C": ("A",)}))
    rng = np.random.default_rng(0)
    p = rng.random((3, 4, 1)) * rng.random((3, 1, 2))
    yield Row("p = phi(a, b) psi(a, c) has B _|_ C | A", True, graphs.oracle(p / p.sum(), "ABC")("B", "C", "A"))


# ---- variational inference


def two_latent_elbo(v, w, s2, q1, q2):
    """ELBO of h1, h2 ~ Bernoulli(1/2), v | h ~ N(w0 + w1 h1 + w2 h2, s2), under q(h1 = 1) = q1, q(h2 = 1) = q2."""
    w0, w1, w2 = w
    entropy = lambda q: -q * np.log(q) - (1 - q) * np.log(1 - q)
    square = (v - w0 - w1 * q1 - w2 * q2) ** 2 + w1**2 * q1 * (1 - q1) + w2**2 * q2 * (1 - q2)
    return -2 * math.log(2) - 0.5 * math.log(2 * math.pi * s2) - square / (2 * s2) + entropy(q1) + entropy(q2)


def two_latent_update(v, w, s2, q2):
    """The best q1; that of q2 with w1 and w2 in each other's place."""
    return 1 / (1 + np.exp(-w[1] * (v - w[0] - w[2] * q2 - w[1] / 2) / s2))


def mean_field(pgm):
    """Mean field with two binary latents and the data v = 1, -1"""
    w, s2, bound = (0.2, 1.5, -1.0), 0.4, 0.0
    for v in (1.0, -1.0):
        grid = np.linspace(1e-6, 1 - 1e-6, 2_000_001)
        best = float(grid[two_latent_elbo(v, w, s2, grid, 0.3).argmax()])
        update = float(two_latent_update(v, w, s2, 0.3))
        yield Row(f"v = {v:g}: best q1 given q2 = 0.3, beside a grid", update, best, 1e-6)
        h = [[math.exp(-((v - w[0] - w[1] * a - w[2] * b) ** 2) / (2 * s2)) / math.sqrt(2 * math.pi * s2) / 4
              for b in (0, 1)] for a in (0, 1)]
        net = pgm.Network({"h1": "01", "h2": "01"}, [(("h1", "h2"), h)])
        q, bounds = pgm.mean_field(net)
        derived = float(two_latent_elbo(v, w, s2, q["h1"][1], q["h2"][1]))
        yield Row(f"v = {v:g}: ELBO at the fixed point, beside pgm.py's on the table", derived, bounds[-1])
        fixed = float(two_latent_update(v, w, s2, q["h2"][1]))
        yield Row(f"v = {v:g}: the update leaves pgm.py's q1 where it is", fixed, float(q["h1"][1]), 1e-5)
        posterior = np.array(h) / np.sum(h)
        gap = float((np.outer(q["h1"], q["h2"]) * np.log(np.outer(q["h1"], q["h2"]) / posterior)).sum())
        yield Row(f"v = {v:g}: log p(v) - ELBO = KL(q || posterior)", gap, math.log(np.sum(h)) - bounds[-1], 1e-9)
        bound += bounds[-1]
    certain = 0.5 * (1 - 1e-15)
    exact = [two_latent_elbo(v, (-1, 2, 0), s, 0.5 + v * certain, 0.5) for s in (1e-2, 1e-4) for v in (1, -1)]
    yield Row("learned variance: from 1e-2 to 1e-4 the bound of two points rises by 2 log 10, without end",
              2 * math.log(10), float(sum(exact[2:]) - sum(exact[:2])), 1e-6)


def laplace_vi(pgm):
    """z ~ N(0, 1), x_i | z ~ N(z, s_i^2), q = Laplace(m, b)"""
    log_normal = lambda z, mean, sd: -0.5 * math.log(2 * math.pi * sd**2) - (z - mean) ** 2 / (2 * sd**2)
    log_q = lambda z, m, b: -abs(z - m) / b - math.log(2 * b)
    sides = lambda f, m, b: quadrature(f, m - 60 * b, m, 600) + quadrature(f, m, m + 60 * b, 600)
    for x, s in (((1.0, -0.5), (1.0, 2.0)), ((3.0, 4.0), (0.5, 0.7))):
        precision = 1 + 1 / s[0] ** 2 + 1 / s[1] ** 2
        m, b = (x[0] / s[0] ** 2 + x[1] / s[1] ** 2) / precision, 1 / math.sqrt(2 * precision)

        def log_joint(z, x=x, s=s):
            return log_normal(z, 0, 1) + log_normal(x[0], z, s[0]) + log_normal(x[1], z, s[1])

        def bound(m, b, log_joint=log_joint):
            return sides(lambda z: np.exp(log_q(z, m, b)) * (log_joint(z) - log_q(z, m, b)), m, b)

        evidence = math.log(sides(lambda z: np.exp(log_joint(z)), m, 1 / math.sqrt(precision)))
        gap = (math.log(math.pi) - 1) / 2
        yield Row(f"x = {x}: gap (log pi - 1) / 2, the same for every x", gap, evidence - bound(m, b))
        nearby = max(bound(m + dm, b * k) for dm, k in ((0.02, 1), (-0.02, 1), (0, 1.02), (0, 0.98)))
        yield Row(f"x = {x}: m and b = 1 / sqrt(2 precision) are the best", True, bound(m, b) > nearby)


def gamma_vi(pgm):
    """p(z) = e^(-z), p(x | z) = z e^(-zx), q = Gamma(2, rate theta)"""
    for x in (0.5, 3.0):
        def bound(theta, x=x):
            log_q = lambda z: 2 * math.log(theta) + np.log(z) - theta * z
            return quadrature(lambda z: np.exp(log_q(z)) * (np.log(z) - z - x * z - log_q(z)), 1e-12, 60 / theta)

        closed = lambda theta, x=x: -2 * (x + 1) / theta - 2 * math.log(theta) + 2
        for theta in (0.7, x + 1):
            what = f"x = {x:g}: ELBO({theta:g}) = -2 (x + 1) / theta - 2 log theta + 2"
            yield Row(what, closed(theta), bound(theta), 1e-7)
        log_p = -2 * math.log(1 + x)
        yield Row(f"x = {x:g}: best theta = x + 1, no gap: log p(x) = -2 log(1 + x)", log_p, closed(x + 1))
        evidence = quadrature(lambda z, x=x: z * np.exp(-z * (1 + x)), 0, 60 / (1 + x))
        yield Row(f"x = {x:g}: p(x) = 1 / (1 + x)^2", 1 / (1 + x) ** 2, evidence)


PROBLEMS = {"server": server, "medical": medical, "kntu": kntu, "markov": markov, "separation": separation,
            "markov-chain": markov_chain, "stone-drop": stone_drop, "zeta": zeta_problem, "independence": independence,
            "counting": counting, "mean-field": mean_field, "laplace-vi": laplace_vi, "gamma-vi": gamma_vi}


def solve(name: str, pgm) -> tuple[str, list[Row]]:
    if name not in PROBLEMS:
        raise ValueError(f"unknown example {name!r}; the examples are {', '.join(PROBLEMS)}")
    return PROBLEMS[name].__doc__, list(PROBLEMS[name](pgm))


def listing(rows) -> str:
    """One line a row: what, the derived and the found value, and a word where they part or a sheet errs."""
    wide = max(len(row.what) for row in rows)
    text = lambda x: "no yes".split()[x] if isinstance(x, bool) else f"{x:.12g}" if isinstance(x, float) else str(x)
    lines = [f"{'':{wide}}  {'derived':>20}  {'found':>20}"]
    for row in rows:
        note = "" if row.agrees else "   DISAGREE"
        note += "" if row.sheet is None else f"   (a sheet says {text(row.sheet)})"
        lines.append(f"{row.what:{wide}}  {text(row.derived):>20}  {text(row.found):>20}{note}")
    return "\n".join(lines)


def report(job, name: str, pgm) -> None:
    """Print a solved problem and write its metrics.json; a derivation that its check refutes is a failed run."""
    import metrics
    import run

    title, rows = solve(name, pgm)
    print(f"{title}\n\n{listing(rows)}\n")
    wrong = [row.what for row in rows if not row.agrees]
    job.report({"checks": metrics.metric(len(rows), None, "rows", "higher"),
                "disagree": metrics.metric(len(wrong), 0, "rows")}, rows=[row._asdict() for row in rows])
    if wrong:
        raise run.Failed(f"derivation and check disagree: {'; '.join(wrong)}")
