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


@pytest.fixture
def resumed(cli, monkeypatch, tmp_path):
    """The tensors that a run of six steps keeps, and those of one that was killed after three and resumed."""

    def call(module, *args):
        import run

        def killed(self, numbers, floors=None, track=run.Run.track):
            for k, row in enumerate(track(self, numbers, floors), 1):
                if k == 3:
                    raise KeyboardInterrupt
                yield row

        monkeypatch.setattr(run, "SAVE_SECONDS", 0)
        *_, whole = cli(module, *args, "--steps", 6, out=tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr(run.Run, "track", killed)
            assert cli(module, *args, "--steps", 6, out=tmp_path / "broken")[0] == 130
        status, error, broken = cli(module, *args, "--steps", 6, "--resume", out=tmp_path / "broken")
        assert status == 0, error
        states = (torch.load(next(out.glob("*/model.pt")), weights_only=True)["state"] for out in (whole, broken))
        return [{f"{part}.{key}": value for part in ("model", "average") if part in state
                 for key, value in state[part].items()} for state in states]

    return call


@pytest.fixture
def guarded(monkeypatch):
    """From the call on new_empty gives NaN with `margin` elements of -7 behind; these are listed in what it returns."""

    def call(margin):
        guards, empty = [], torch.Tensor.new_empty

        def new_empty(t, *shape, **options):
            shape = shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape
            size = torch.Size(shape).numel()
            whole = empty(t, size + margin, **options).fill_(float("nan"))
            whole[size:] = -7
            guards.append(whole[size:])
            return whole[:size].view(shape)

        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
        return guards

    return call
