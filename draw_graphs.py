"""Pictures of graphs: a DAG with its tables, an undirected graph with its cliques, a junction tree, posteriors as bars.

    network_picture(path, parents, states, tables)      arrows from layer to layer; tables beside small networks
    cliques_picture(path, graph, cliques)               on a circle, each maximal clique in a colour of its own
    tree_picture(path, cliques, parent, sepset)         a junction forest, the sepset on each edge
    posteriors_picture(path, states, beliefs, exact)    a bar for each state, a mark where the exact answer lies
    report(job, network, tree, ...)                     all of them for one query of pgm.py, and its numbers

Each file is written aside and renamed into place. Layers are longest paths from the roots; within a layer nodes are
sorted by the mean place of their neighbours in the layer before and behind, swept until it settles.

References
  Sugiyama, Tagawa, Toda, Methods for visual understanding of hierarchical system structures, IEEE SMC 11(2), 1981
"""

import math

from metrics import ACCENT, FAINT, INK, MUTED, PAPER, _figure, _title, _write

COLORS = ("#c8452f", "#2f6fc8", "#3a8f5c", "#b7892b", "#7a4fb0", "#2b9aa6", "#a8416f", "#6b6f2a")


def layers(parents: dict) -> list[list]:
    """Nodes by their longest path from a root, ordered so that few edges cross."""
    depth, left = {}, dict(parents)
    while left:
        for v in [v for v, above in left.items() if all(p in depth for p in above)]:
            depth[v] = max((depth[p] + 1 for p in left.pop(v)), default=0)
    near = {v: set(above) for v, above in parents.items()}
    for v, above in parents.items():
        for p in above:
            near[p].add(v)
    rows = [[v for v in parents if depth[v] == d] for d in range(max(depth.values(), default=0) + 1)]
    place = {v: (i + 0.5) / len(row) for row in rows for i, v in enumerate(row)}
    for _ in range(12):
        for row in [*rows, *rows[::-1]]:
            row.sort(key=lambda v: sum(place[u] for u in near[v]) / len(near[v]) if near[v] else place[v])
            place.update({v: (i + 0.5) / len(row) for i, v in enumerate(row)})
    return rows


def _places(rows) -> dict:
    height = len(rows)
    return {v: ((i + 0.5) / len(row), 1 - (k + 0.5) / height) for k, row in enumerate(rows) for i, v in enumerate(row)}


def _canvas(width, height):
    figure, axes = _figure(1, 1, width, height)
    ax = axes[0, 0]
    ax.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return figure, ax


def _node(ax, xy, text, size=9, color=INK):
    ax.text(*xy, text, ha="center", va="center", fontsize=size, color=color, zorder=3,
            bbox={"boxstyle": "round,pad=0.35", "facecolor": PAPER, "edgecolor": color, "linewidth": 1})


def _save(path, figure):
    _write(path, lambda handle: figure.savefig(handle, format="png"))


def _table(v, above, states, table) -> str:
    """A conditional distribution as text: a row for each state of the parents."""
    import numpy as np

    rows = [f"{' ' * 12 if above else ''}{' '.join(f'{s[:6]:>6}' for s in states[v])}"]
    for index in np.ndindex(table.shape[:-1]):
        label = ",".join(states[p][i][:5] for p, i in zip(above, index))
        rows.append(f"{label:12.12}"[:12 if above else 0] + " ".join(f"{x:6.3g}" for x in table[index]))
    return "\n".join(rows)


def network_picture(path, parents: dict, states: dict, tables: dict, title: str = ""):
    """`tables` {node: (K_parents..., K)}; they are shown where there are at most 8 nodes with 12 rows each."""
    rows = layers(parents)
    small = len(parents) <= 8 and all(t.size // t.shape[-1] <= 12 for t in tables.values())
    wide, side = max(map(len, rows)), 2.6 if small else max(0.7, 0.1 * max(map(len, parents)))
    figure, ax = _canvas(max(5, side * wide), max(3, (2.1 if small else 0.75) * len(rows)))
    at, depth = _places(rows), {v: k for k, row in enumerate(rows) for v in row}
    for v, above in parents.items():
        for p in above:                                     # past a layer in an arc, which no node there hides
            rad = 0.35 * (small and depth[v] - depth[p] > 1) * (1 if at[p][0] <= at[v][0] else -1)
            ax.annotate("", at[v], at[p], zorder=1, arrowprops={
                "arrowstyle": "-|>", "color": MUTED, "shrinkA": 10, "shrinkB": 12, "linewidth": 0.9,
                "connectionstyle": f"arc3,rad={rad}"})
    for v in parents:
        _node(ax, at[v], v, 10 if small else 7)
        if small:
            ax.annotate(_table(v, parents[v], states, tables[v]), at[v], (0, -14), textcoords="offset points", zorder=2,
                        ha="center", va="top", fontsize=5.5, family="monospace", color=INK, linespacing=1.25,
                        bbox={"boxstyle": "round,pad=0.3", "facecolor": PAPER, "edgecolor": FAINT, "linewidth": 0.6})
    _title(ax, title)
    _save(path, figure)


def cliques_picture(path, graph: dict, cliques, title: str = ""):
    """Each maximal clique as a coloured polygon through its nodes, which lie on a circle."""
    import matplotlib.patches as patches

    n = len(graph)
    at = {v: (0.5 + 0.4 * math.sin(2 * math.pi * i / n), 0.5 + 0.4 * math.cos(2 * math.pi * i / n))
          for i, v in enumerate(graph)}
    figure, ax = _canvas(max(5, n / 6), max(5, n / 6))
    for i, clique in enumerate(sorted(cliques, key=len, reverse=True)):
        corners, color = [at[v] for v in graph if v in clique], COLORS[i % len(COLORS)]
        if len(corners) > 2:
            ax.add_patch(patches.Polygon(corners, facecolor=color, alpha=0.18, edgecolor=color, linewidth=1))
        elif len(corners) == 2:
            ax.plot(*zip(*corners), color=color, linewidth=1.2, zorder=1)
    for v in graph:
        _node(ax, at[v], v, 9 if n <= 12 else 6)
    _title(ax, title or f"{len(list(cliques))} maximal cliques")
    _save(path, figure)


def tree_picture(path, cliques, parent: dict, sepset: dict, title: str = ""):
    """Cliques as boxes from the roots down; what two neighbours share stands on their edge."""
    short = lambda names: "\n".join(", ".join(list(names)[i:i + 3]) for i in range(0, len(names), 3))
    rows = layers({i: () if p is None else (p,) for i, p in parent.items()})
    figure, ax = _canvas(max(6, 1.5 * max(map(len, rows))), max(3, 0.9 * len(rows)))
    at = _places(rows)
    for i, p in parent.items():
        if p is not None:
            ax.plot(*zip(at[i], at[p]), color=MUTED, linewidth=0.9, zorder=1)
            middle = [(a + b) / 2 for a, b in zip(at[i], at[p])]
            ax.text(*middle, short(sorted(sepset[i])), fontsize=4.5, color=ACCENT, ha="center", va="center", zorder=2,
                    bbox={"boxstyle": "square,pad=0.1", "facecolor": PAPER, "edgecolor": "none"})
    for i in parent:
        _node(ax, at[i], short(cliques[i]), 5.5)
    _title(ax, title or f"junction tree: {len(cliques)} cliques, at most {max(map(len, cliques))} variables")
    _save(path, figure)


def posteriors_picture(path, states: dict, beliefs: dict, exact: dict | None = None, title: str = ""):
    """One panel a variable: a bar a state; a dark tick where `exact` lies, where it is given."""
    columns = min(6, max(1, math.ceil(len(beliefs) ** 0.5)))
    figure, axes = _figure(math.ceil(len(beliefs) / columns), columns, 2.0, 1.2)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, (v, p) in zip(axes.flat, beliefs.items()):
        ax.set_axis_on()
        ax.barh(range(len(p)), p, color=ACCENT, height=0.7)
        if exact is not None:
            for k, x in enumerate(exact[v]):
                ax.plot([x, x], [k - 0.45, k + 0.45], color=INK, linewidth=1.5)
        ax.set(xlim=(0, 1), ylim=(len(p) - 0.5, -0.5), xticks=[0, 0.5, 1], yticks=range(len(p)))
        ax.set_yticklabels([s[:12] for s in states[v]], fontsize=6)
        ax.set_title(v, fontsize=7, color=INK, loc="left", pad=2)
        ax.spines[:].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=9, color=INK)
    _save(path, figure)


def independences(network, tree, graphs, metrics) -> dict:
    """Of at most 8 variables: print the independences of each from its non-descendants, and count the statements
    (x, y, z) of the graph, those that the numbers break (none may be), and those that hold unknown to the graph."""
    import numpy as np

    names, parents, graph = list(network.states), network.parents, network.graph()
    if len(names) > 8 or math.prod(network.size.values()) > 2**10:
        return {}
    table = 1.0
    for clique, shared, belief in zip(tree.cliques, tree.sepset, tree.calibrate()[0]):      # the joint, from the tree
        belief = belief[..., 0].transpose(np.argsort([names.index(v) for v in clique]))
        belief = belief.reshape([network.size[v] if v in clique else 1 for v in names])
        below = belief.sum(tuple(k for k, v in enumerate(names) if v not in shared), keepdims=True)
        table = table * belief / (below + (below == 0))
    if parents:
        for x, others, above in graphs.local_statements(parents):
            print(f"{x} _|_ {', '.join(sorted(others))}{' | ' if above else ''}{', '.join(sorted(above))}")
    apart = (lambda *s: graphs.d_separated(parents, *s)) if parents else (lambda *s: graphs.separated(graph, *s))
    said, held = graphs.statements(names, apart), graphs.statements(names, graphs.oracle(table, names))
    return {"independences": metrics.metric(len(said), None, "statements", "higher"),
            "broken": metrics.metric(len(said - held), 0, "statements"),
            "unforeseen": metrics.metric(len(held - said), None, "statements")}


def report(job, network, tree, evidence: dict, query, answer, drawn=None) -> None:
    """Print and draw what pgm.py's --method found, `answer`, beside the exact posteriors of its junction tree."""
    import graphs
    import metrics
    import run

    exact, log_z = tree.marginals(evidence)
    found, value, *more = answer
    folder, method, graph = job.folder, job.args.method, network.graph()
    if network.parents:
        tables = {f.variables[-1]: f.table for f in network.factors}
        network_picture(folder / "network.png", network.parents, network.states, tables, job.args.dataset)
    cliques_picture(folder / "cliques.png", graph, graphs.maximal_cliques(graph))
    tree_picture(folder / "tree.png", tree.cliques, dict(enumerate(tree.parent)), dict(enumerate(tree.sepset)))
    results = {"log_z": metrics.metric(log_z, None, "nats", "higher")} | independences(network, tree, graphs, metrics)
    names = query or [v for v in network.states if v not in evidence]
    if method == "map":
        print("\n".join(f"{v:20} {found.get(v, '(observed)')}" for v in names))
        results["log_map"] = metrics.metric(value - log_z, 0, "nats", "higher")
    else:
        beliefs = {v: found[v] if v in found else exact[v] for v in names}
        for v, p in beliefs.items():
            print(f"{v:20} " + "  ".join(f"{s} {x:.6f}" for s, x in zip(network.states[v], p)))
        if beliefs:
            posteriors_picture(folder / "posteriors.png", network.states, beliefs, exact)
        error = max((float(abs(p - exact[v]).max()) for v, p in beliefs.items()), default=0)
        results["largest_error"] = metrics.metric(error, 0, "probability")
    if method == "mean-field":
        results["elbo"] = metrics.metric(value[-1], log_z, "nats", "higher")
        results["kl"] = metrics.metric(log_z - value[-1], 0, "nats")
        curve = [{"step": k, "elbo": bound} for k, bound in enumerate(value)]
        metrics.curves_picture(folder / "elbo.png", curve, {"elbo": log_z})
    elif method not in ("map", "gibbs"):
        results["log_z_found"] = metrics.metric(value, log_z, "nats", "higher")
    if method == "loopy":
        results["last_change"] = metrics.metric(more[0], 0, "probability")
    if drawn:
        lines = zip(*([network.states[v][k] for k in drawn[v]] for v in network.states))
        text = "\n".join([",".join(network.states), *map(",".join, lines)]) + "\n"
        run.write(folder / "samples.csv", text.encode())
    job.report(results, parameters=network.parameters())
