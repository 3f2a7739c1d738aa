"""One place for what all tests share: a quiet, derandomised hypothesis profile, float64 by default, where real data lies."""

import os
import pathlib
import sys

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")                      # before anything imports triton
settings.register_profile("ci", deadline=None, database=None, derandomize=True, max_examples=30)
settings.load_profile("ci")

ROOT = pathlib.Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def float64():
    """Maths is tested in float64; a test that runs a script's own training sets float32 itself."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def real_data():
    if not SHARED.is_dir():
        pytest.skip("the real data samples are not here")
    return SHARED


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Run a script's main() in this process: (exit status, standard error, folder of results)."""

    def call(module, *args, out=tmp_path):
        torch.set_default_dtype(torch.float32)
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--out", str(out), *map(str, args)])
        try:
            module.main()
            status = 0
        except SystemExit as e:
            status = e.code
        return status, capsys.readouterr().err, pathlib.Path(out)

    return call
