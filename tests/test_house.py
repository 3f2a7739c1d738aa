"""The house rules of DESIGN.md that a program can see: arrows between files, line budgets, what stands at a file's top."""

import ast
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SHARED = {"baselines", "clouds", "data", "draw_graphs", "edits", "formats", "graphs", "judges", "latents", "metrics", "networks",
          "problems", "run", "shapes"}
SCRIPTS = {p.stem for p in ROOT.glob("*.py")} - SHARED
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def imports(node):
    """Top-level names of the modules that a node imports."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name.split(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and not child.level:
            yield child.module.split(".")[0]


def tree(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_above_main_a_script_needs_only_the_library_torch_and_einops(name):
    allowed = set(sys.stdlib_module_names) | {"torch", "einops", "kernels"} | ({"numpy"} if name == "pgm" else set())   # tables of a few cells: numpy calls cost a third
    for node in tree(name).body:
        if not (isinstance(node, ast.FunctionDef) and node.name == "main"):
            assert set(imports(node)) <= allowed, f"{name}.py, line {node.lineno}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert "kernels" not in imports(node), f"{name}.py: kernels belong inside a function"


@pytest.mark.parametrize("name", sorted(SHARED & {p.stem for p in ROOT.glob("*.py")}))
def test_no_shared_module_uses_a_script(name):
    assert not set(imports(tree(name))) & SCRIPTS


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_no_kernel_uses_a_script_or_a_shared_module(path):
    assert not set(imports(ast.parse(path.read_text()))) & (SCRIPTS | SHARED)


@pytest.mark.parametrize("path", [*sorted(ROOT.glob("*.py")), *KERNELS], ids=lambda p: p.name)
def test_line_budget_and_docstring(path):
    text = path.read_text()
    assert text.count("\n") <= (400 if path.parent.name == "kernels" else 600)
    assert ast.get_docstring(ast.parse(text)), f"{path.name} says nothing of itself"


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_script_reads_in_the_order_of_the_house(name):
    """Docstring with references, glossary, use and what is left out; then maths; then networks; then the family."""
    doc = ast.get_docstring(tree(name))
    places = [doc.find(word) for word in ("References", "Glossary", "Use", "Not included")]
    assert -1 not in places and places == sorted(places) and len(doc.splitlines()) <= 45
    kinds = [type(node).__name__ for node in tree(name).body]
    assert "FunctionDef" in kinds and kinds.index("FunctionDef") < kinds.index("ClassDef")
    assert [n.name for n in tree(name).body if isinstance(n, ast.FunctionDef)][-1] == "main"


OWN = ("main", "train", "build", "evaluate")                # each script has its own


def test_what_two_scripts_repeat_is_word_for_word_the_same():
    """ddim.py repeats a few blocks of ddpm.py to stand alone: a copy that drifts is a defect."""
    sources = {}
    for name in sorted(SCRIPTS):
        text = (ROOT / f"{name}.py").read_text()
        for node in tree(name).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN:
                body = ast.dump(ast.Module([n for n in node.body if not isinstance(getattr(n, "value", None), ast.Constant)], []))
                sources.setdefault(node.name, {})[name] = body if text else ""
    drifted = {what: list(where) for what, where in sources.items() if len(set(where.values())) > 1}
    assert not drifted


def test_graphs_and_pgm_walk_a_dag_by_the_same_lines():
    """Both stand alone."""
    walks = [{node.name: ast.dump(node) for node in tree(name).body if getattr(node, "name", "") in ("topological", "ancestors", "complete")}
             for name in ("graphs", "pgm")]
    assert len(walks[0]) == 3 and walks[0] == walks[1]


def test_names_that_ought_to_be_there():
    for name in ("LICENSE", "README.md", "Makefile", "pyproject.toml", "requirements.txt", ".ci/run"):
        assert (ROOT / name).is_file(), name
    assert (ROOT / "README.md").read_text().count("\n") <= 150


def test_the_pins_of_pip_and_uv_are_the_same():
    pins = {line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()} - {""}
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.findall(r'^    "([a-z]+[=>][^"]+)"', project, re.M)
    assert pins == set(listed)
