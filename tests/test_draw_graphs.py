"""Pictures of graphs: layers point downwards, files are whole, odd graphs do not fail."""

import numpy as np
import pytest
from PIL import Image

import draw_graphs
import graphs
import networks
import pgm


def test_layers_are_longest_paths():  # max -> min
    rows = draw_graphs.layers({"a": (), "b": ("a",), "c": ("a", "b"), "d": ()})
    assert [set(r) for r in rows] == [{"a", "d"}, {"b"}, {"c"}]


def test_layers_uncross():  # the sort left out
    first, second = draw_graphs.layers({"a": (), "b": (), "c": (), "x": ("c",), "y": ("b",), "z": ("a",)})
    assert [first.index(v) for v in "cba"] == [second.index(v) for v in "xyz"]


@pytest.mark.parametrize("name", ["asia", "medical"])
def test_pictures_are_whole(name, tmp_path):
    net = pgm.bayesian(*networks.NETWORKS[name][1:])
    tree = pgm.JunctionTree(net)
    tables, graph = {f.variables[-1]: f.table for f in net.factors}, net.graph()
    draw_graphs.network_picture(tmp_path / "n.png", net.parents, net.states, tables, name)
    draw_graphs.cliques_picture(tmp_path / "c.png", graph, graphs.maximal_cliques(graph))
    draw_graphs.tree_picture(tmp_path / "t.png", tree.cliques, dict(enumerate(tree.parent)), dict(enumerate(tree.sepset)))
    beliefs = tree.marginals()[0]
    draw_graphs.posteriors_picture(tmp_path / "p.png", net.states, beliefs, beliefs, "posteriors")
    for k in "nctp":
        image = np.asarray(Image.open(tmp_path / f"{k}.png").convert("L"))
        assert 0.002 < (image < 128).mean() < 0.3 and min(image.shape) > 200
    assert not list(tmp_path.glob(".*"))


def test_a_single_node_is_drawn(tmp_path):
    net = pgm.bayesian({"a": "01"}, {"a": ((), [0.5, 0.5])})
    draw_graphs.network_picture(tmp_path / "n.png", net.parents, net.states, {"a": net.factors[0].table})
    draw_graphs.cliques_picture(tmp_path / "c.png", {"a": set()}, [frozenset("a")])
    draw_graphs.posteriors_picture(tmp_path / "p.png", net.states, {"a": np.array([0.5, 0.5])})
    assert len(list(tmp_path.glob("*.png"))) == 3
