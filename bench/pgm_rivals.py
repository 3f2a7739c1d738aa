"""pgm.py and graphs.py beside pgmpy and pyAgrum, in one run.

    bash bench/rivals.sh pgm_rivals --bif FOLDER      a throw-away environment with both, then this file

Posteriors: all single marginals of alarm under the same 20 sets of evidence on five variables (a set a call), and 1,000
sets, which ours takes at once and the rivals one after the other. Junction trees: built and calibrated for every
network in the folder. d-separation: pairs of nodes given 5 or 10 others in DAGs with about 2n edges. Samples: 10,000 at
once. Loading: alarm.bif. Answers are compared before anything is timed. Turns alternate, so that a busy machine slows
all alike; medians, and the median of the ratios turn by turn. What is not installed is named and left out.
"""

import argparse
import gzip
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import formats  # noqa: E402
import graphs  # noqa: E402
import pgm  # noqa: E402


def clock(f):
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def compare(title, contenders, repeats, unit, count=1):
    """Median of count / seconds (a rate) or of seconds for each contender, and ours against it."""
    spent = {name: [] for name in contenders}
    for turn in range(repeats + 1):                         # the first turn warms up
        for name, f in contenders.items():
            seconds = clock(f)
            if turn:
                spent[name].append(seconds)
    print(title)
    ours = next(iter(spent))
    for name, seconds in spent.items():
        value = statistics.median(seconds)
        shown = f"{count / value:12,.0f} {unit}" if unit.endswith("/s") else f"{1e3 * value / count:12.4f} {unit}"
        ratio = statistics.median(b / a for a, b in zip(spent[ours], seconds))
        print(f"  {name:36} {shown}   {ours} is {ratio:.2f}x as fast")


def random_dag(n, rng):
    """2n arrows at most, each between two nodes drawn at random."""
    parents = {f"n{i}": [] for i in range(n)}
    for a, b in np.unique(np.sort(rng.integers(0, n, (2 * n, 2)), 1), axis=0):
        if a != b:
            parents[f"n{b}"].append(f"n{a}")
    return parents


def rival(name):
    try:
        if name == "pgmpy":
            import pgmpy.inference
            import pgmpy.readwrite
            return pgmpy
        import pyagrum
        return pyagrum
    except ImportError as e:
        print(f"{name}: not installed ({e})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bif", default="../shared/data/bif", help="a folder of .bif.gz files")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    rng, folder = np.random.default_rng(0), pathlib.Path(args.bif)
    plain = pathlib.Path(tempfile.mkdtemp()) / "alarm.bif"
    plain.write_bytes(gzip.decompress((folder / "alarm.bif.gz").read_bytes()))
    pgmpy, agrum = rival("pgmpy"), rival("pyagrum")
    net = alarm = pgm.bayesian(*formats.read_bif(plain))
    tree, drawn = pgm.JunctionTree(net), pgm.sample(net, 1000, rng)[0]
    observed = [str(v) for v in rng.permutation(list(net.states))[:5]]
    sets = [{v: net.states[v][drawn[v][i]] for v in observed} for i in range(1000)]
    many = {v: drawn[v] for v in observed}
    hidden = [v for v in net.states if v not in observed]
    singles = {"ours": lambda: [tree.marginals(e) for e in sets[:20]]}
    batch = {"ours, 1,000 at once": lambda: tree.marginals(many)}
    samples = {"ours": lambda: pgm.sample(alarm, 10_000, rng)}
    load = {"ours": lambda: formats.read_bif(plain)}
    if pgmpy:
        from pgmpy.inference import VariableElimination
        from pgmpy.readwrite import BIFReader

        theirs = BIFReader(str(plain)).get_model()
        ve = VariableElimination(theirs)
        ask = lambda e: [ve.query([v], evidence=e, show_progress=False) for v in hidden]
        exact = tree.marginals(sets[0])[0]
        for v, f in zip(hidden, ask(sets[0])):
            order = [f.state_names[v].index(s) for s in net.states[v]]
            assert np.allclose(f.values[order], exact[v], atol=1e-9), v
        singles["pgmpy VariableElimination"] = lambda: [ask(e) for e in sets[:20]]
        load["pgmpy BIFReader"] = lambda: BIFReader(str(plain)).get_model()
        samples["pgmpy simulate"] = lambda: theirs.simulate(10_000, show_progress=False)
    if agrum:
        bn = agrum.loadBN(str(plain))
        lazy = {name: getattr(agrum, name)(bn) for name in ("ShaferShenoyInference", "LazyPropagation")}

        def run(engine, e):
            engine.setEvidence(e)
            engine.makeInference()
            return {v: engine.posterior(v) for v in net.states}

        exact = tree.marginals(sets[0])[0]
        for v, p in run(lazy["ShaferShenoyInference"], sets[0]).items():
            order = [bn.variable(v).labels().index(s) for s in net.states[v]]
            assert np.allclose(p.toarray()[order], exact[v], atol=1e-6), v
        for name, engine in lazy.items():
            singles[f"pyAgrum {name}"] = lambda engine=engine: [run(engine, e) for e in sets[:20]]
            batch[f"pyAgrum {name}"] = lambda engine=engine: [run(engine, e) for e in sets]
        load["pyAgrum loadBN"] = lambda: agrum.loadBN(str(plain))
        generator = agrum.BNDatabaseGenerator(bn)
        samples["pyAgrum BNDatabaseGenerator"] = lambda: generator.drawSamples(10_000)
    compare("alarm, all single posteriors, a set of evidence", singles, args.repeats, "ms a set", 20)
    compare("alarm, 1,000 sets of evidence", batch, max(2, args.repeats // 2), "ms a set", 1000)
    compare("alarm, 10,000 ancestral samples", samples, args.repeats, "samples/s", 10_000)
    compare("loading alarm.bif", load, max(2, args.repeats // 2), "ms")
    print("junction trees: built, calibrated, largest clique")
    total = 0
    for path in sorted(folder.glob("*.bif.gz")):
        net = pgm.bayesian(*formats.read_bif(path))
        seconds = clock(lambda net=net: pgm.JunctionTree(net).marginals())
        total += seconds
        print(f"  {path.name[:-7]:12} {1e3 * seconds:8.1f} ms {max(map(len, pgm.JunctionTree(net).cliques)):4}")
    print(f"  {'together':12} {1e3 * total:8.1f} ms")
    for n, z in ((20, 3), (100, 5), (1000, 10)):
        dag = random_dag(n, rng)
        names = list(dag)
        queries = [(names[c[0]], names[c[1]], [names[k] for k in c[2:]])
                   for c in (rng.choice(n, 2 + z, replace=False) for _ in range(4096))]
        below, at = graphs.children(dag), graphs.Separations(dag)
        one = lambda q, at=at: at.one(*q)
        walk = lambda q, dag=dag, below=below: q[1] not in graphs.reachable(dag, below, q[0], q[2])
        few = queries[:200]
        truth = at(queries)
        assert truth[:200] == [one(q) for q in few] == [walk(q) for q in few]
        work = {"ours, one by one": lambda few=few, one=one: [one(q) for q in few],
                "ours, algorithm 3.1 as printed": lambda few=few, walk=walk: [walk(q) for q in few]}
        if pgmpy:
            from pgmpy.base import DAG

            graph = DAG()
            graph.add_nodes_from(dag)
            graph.add_edges_from((p, v) for v, above in dag.items() for p in above)
            connected = lambda q, graph=graph: graph.is_dconnected(q[0], q[1], observed=q[2])
            assert [not connected(q) for q in few] == truth[:200]
            work["pgmpy is_dconnected"] = lambda few=few, f=connected: [f(q) for q in few]
        if agrum:
            graph, number = agrum.DAG(), {v: i for i, v in enumerate(dag)}
            graph.addNodes(n)
            for v, above in dag.items():
                for p in above:
                    graph.addArc(number[p], number[v])
            numbered = [(number[x], number[y], {number[v] for v in z}) for x, y, z in few]
            assert [graph.dSeparation(*q) for q in numbered] == truth[:200]
            work["pyAgrum dSeparation"] = lambda g=graph, few=numbered: [g.dSeparation(*q) for q in few]
        share = sum(truth) / len(truth)
        compare(f"d-separation, {n} nodes, {z} observed, {share:.0%} separated", work, args.repeats, "queries/s", 200)
        compare("  4,096 at once", {"ours, at once": lambda at=at, q=queries: at(q)}, args.repeats, "queries/s", 4096)


if __name__ == "__main__":
    main()
