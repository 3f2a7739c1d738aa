"""Each script, copied alone into an empty folder, imports, trains three steps on random tensors and samples."""

import os
import pathlib
import subprocess
import sys

import pytest
from test_house import SCRIPTS

ROOT = pathlib.Path(__file__).parents[1]
DIFFUSION = """
import copy, torch
import {name} as m
model = {model}
average = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
batches = iter([torch.randn(8, *model.shape)] * 3)
losses = [row["loss"].item() for row in m.train(model, average, optimizer, batches, 3, 1e-3)]
*_, x = average.sample(5, m.timesteps(model.T, 4))
assert len(losses) == 3 and x.shape == (5, *model.shape) and x.isfinite().all()
"""
VAE = """
import torch
import vae as m
for name in m.MODELS:
    model = m.MODELS[name]({shape}, 2, width=8, network="{network}")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    batches = iter([torch.rand(8, *model.shape)] * 3)
    losses = [row["loss"].item() for row in m.train(model, optimizer, batches, 3, 1e-3)]
    if name == "sc":
        model.fit(torch.rand(8, *model.shape))
    x = model.sample(5)
    assert len(losses) == 3 and x.shape == (5, *model.shape) and x.isfinite().all()
"""
GAN = """
import copy, torch
import gan as m
for name in {names}:
    model = m.MODELS[name]({shape}, 4, 8, "{network}")
    average = copy.deepcopy(model)
    average.source = x = torch.rand(8, *model.shape)
    batch = {{"cgan": (x, torch.arange(8)), "cyclegan": (x, -x)}}.get(name, x)
    rows = list(m.train(model, average, model.optimizers(1e-3), iter([batch] * 18), 3, 1e-3))
    x = average.eval().sample(5)
    assert len(rows) == 3 and x.shape == (5, *model.shape) and x.isfinite().all()
"""
IGPT = """
import torch
import igpt as m
for mixer in m.MIXERS:
    model = m.IGPT(m.{language}, width=8, layers=1, heads=2, mixer=mixer)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    batches = iter([torch.rand(8, *model.language.shape)] * 3)
    losses = [row["loss"].item() for row in m.train(model, optimizer, batches, 3, 1e-3)]
    x = model.sample(5)
    assert len(losses) == 3 and x.shape == (5, *model.language.shape) and x.isfinite().all()
"""
EBM = """
import copy, torch
import ebm as m
for name in m.MODELS:
    model = m.MODELS[name]({shape}, 2, width=8, channels=4, buffer=40)
    average = copy.deepcopy(model)
    average.buffer = model.buffer
    x, y = torch.rand(8, *model.shape), torch.arange(8) % 2
    if name == "jem++":
        for mine, value in zip((model.means, model.factors), m.fit_gaussians(x, y, 2)):
            mine[:, : value.shape[1]].copy_(value)
    batches = iter([(x, y) if model.labels else x] * 3)
    rows = list(m.train(model, average, torch.optim.Adam(model.parameters(), 1e-3), batches, 3, 1e-3))
    *_, x = average.sample(5, 4)
    assert len(rows) == 3 and x.shape == (5, *model.shape) and x.isfinite().all()
"""
PIXELS = """
import torch
import pixels as m
x = (torch.rand(20, 6, 5) < 0.3).to(torch.uint8)
code, place, n = m.count(x, m.block(3))
counts = {(len(o), p): m.Counts(*m.merge(code, place if p else None, n, len(o)), 20)
          for o in (m.block(2), m.block(3)) for p in (False, True)}
models = m.build(m.MODELS["all"], (6, 5), [m.block(2), m.block(3)], 4)
rows = list(m.train(models, counts, torch.optim.Adam(models.parameters(), 1e-2), 3, 100, 1e-2))
assert len(rows) == 3 and len(models) == 12
for model in models.values():
    assert model.sample(5, 0).shape == (5, 6, 5) and model.log_prob(x).isfinite().all()
"""
PGM = """
import numpy as np
import pgm as m
net = m.bayesian({"a": "01", "b": "012"}, {"a": ((), [0.3, 0.7]), "b": (("a",), [[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])})
data, _ = m.sample(net, 50)
learnt, history = m.em(net, {"b": data["b"]}, rounds=3)
found, _ = m.JunctionTree(learnt).marginals({"b": 1})
assert 2 <= len(history) <= 4 and np.allclose(found["a"], m.eliminate(learnt, "a", {"b": 1})[0].table)
"""
FLOWS = """
import copy, torch
import flows as m
for name in {names}:
    model = m.MODELS[name]({shape}, {levels}, width=8, waves=2)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    batches = iter([torch.rand(8, *model.shape)] * 3)
    losses = [row["loss"].item() for row in m.train(model, average, optimizer, batches, 3, 1e-3)]
    x = average.sample(5)
    assert len(losses) == 3 and x.shape == (5, *model.shape) and x.isfinite().all()
"""
POINTFLOWS = """
import copy, torch
import pointflows as m
model = m.PointFlow(width=8, depth=1, k=4, noise=3)
average = copy.deepcopy(model).requires_grad_(False)
batches = iter([(torch.rand(2, 16, 3), torch.rand(2, 16, 3))] * 3)
rows = list(m.train(model, average, torch.optim.Adam(model.parameters(), 1e-3), batches, 3, 1e-3))
x = average.denoise(torch.rand(5, 16, 3))
assert len(rows) == 3 and x.shape == (5, 16, 3) and x.isfinite().all()
"""
USES = {
    "pgm": [PGM],
    "pixels": [PIXELS],
    "pointflows": [POINTFLOWS],
    "flows": [FLOWS.format(names="m.MODELS", shape=(2,), levels=None),
              FLOWS.format(names=["realnvp", "glow"], shape=(1, 8, 8), levels=256).replace("width=8, waves=2", "width=8")],
    "igpt": [IGPT.format(language="Patches((1, 4, 4))"), IGPT.format(language="Cells((2,), 9)")],
    "ebm": [EBM.format(shape=(2,)), EBM.format(shape=(1, 9, 9))],
    "gan": [GAN.format(names=["gan", "wgan", "wgan-gp", "bigan", "cgan"], shape=(2,), network="mlp"),
            GAN.format(names="m.MODELS", shape=(1, 9, 9), network="conv")],
    "vae": [VAE.format(shape=(2,), network="mlp"), VAE.format(shape=(1, 9, 9), network="conv")],
    "ddpm": [DIFFUSION.format(name="ddpm", model="m.Diffusion((2,), m.make_schedule('linear', 50))"),
             DIFFUSION.format(name="ddpm", model="m.Diffusion((1, 8, 8), m.make_schedule('cosine', 50), 'v', 'learned', 256, 16)")],
    "ddim": [DIFFUSION.format(name="ddim", model="m.DDIM((2,), m.linear_schedule(50), m.MLP(2, 2, m.linear_schedule(50)))")],
}
FOREIGN = "def sample_chain():\n    raise AssertionError('not ours')\n".replace("sample_chain", "something_else")


def lonely(folder, code):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", USES)
def test_copied_alone_it_trains_and_samples(name, tmp_path):
    (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    for code in USES[name]:
        result = lonely(tmp_path, code)
        assert result.returncode == 0, result.stderr[-1500:]


@pytest.mark.parametrize("name", [n for n in USES if "import kernels" in (ROOT / f"{n}.py").read_text()])
def test_a_foreign_package_called_kernels_is_left_alone_and_a_broken_one_of_ours_is_not(name, tmp_path):
    (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(FOREIGN)
    result = lonely(tmp_path, USES[name][0])
    assert result.returncode == 0, result.stderr[-1500:]
    (tmp_path / "kernels" / "__init__.py").write_text("import no_such_module_of_ours\n")
    result = lonely(tmp_path, USES[name][0])
    assert result.returncode != 0 and "no_such_module_of_ours" in result.stderr


def test_every_script_is_tried_here():
    assert SCRIPTS == set(USES)
