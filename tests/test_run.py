"""The run around a script: files, resume bit for bit, the NaN guard, several processes, and what bad input gets."""

import errno
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import ddim
import ddpm
import igpt
import run

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ["--T", "25", "--samples", "200", "--batch", "32", "--width", "16"]
NAMES = {"metrics.json", "samples.npy", "samples.png", "curves.png", "process.png", "process.gif", "log.jsonl", "model.pt"}


def weights(folder, name="ddpm-eps-gmm"):
    return run.read_checkpoint(folder / name / "model.pt")


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- a whole run


def test_a_run_leaves_its_files_and_honest_numbers(cli):
    status, _, out = cli(ddpm, "--steps", 40, *SMALL)
    folder = out / "ddpm-eps-gmm"
    assert status == 0 and {p.name for p in folder.iterdir()} == NAMES
    result = json.loads((folder / "metrics.json").read_text())
    assert {"script", "model", "dataset", "seed", "device", "torch", "triton", "steps", "train_seconds", "sample_seconds",
            "samples", "parameters", "metrics"} <= result.keys()
    for value in result["metrics"].values():
        assert set(value) == {"value", "floor", "unit", "better"} and value["better"] in ("lower", "higher")
    assert result["metrics"]["klh"]["floor"] > 0 and result["parameters"] > 0 and result["samples"] == 200
    assert np.load(folder / "samples.npy").shape == (200, 2)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 41)) and rows[-1].keys() == {"step", "seconds", "loss"}


def test_same_seed_same_samples_other_seed_other_samples(cli, tmp_path):
    runs = [cli(ddpm, "--steps", 5, *SMALL, "--seed", s, out=tmp_path / str(i))[2] for i, s in enumerate((3, 3, 4))]
    a, b, c = (np.load(r / "ddpm-eps-gmm" / "samples.npy") for r in runs)
    assert (a == b).all() and (a != c).any()


def test_ddim_samples_what_ddpm_trained(cli, tmp_path):
    cli(ddpm, "--steps", 20, *SMALL)
    checkpoint = tmp_path / "ddpm-eps-gmm" / "model.pt"
    before = checkpoint.read_bytes()
    status, error, _ = cli(ddim, "--ckpt", checkpoint, "--sample-steps", 5, "--samples", 100, "--no-table")
    assert status == 0, error
    assert json.loads((tmp_path / "ddim-eps-gmm" / "metrics.json").read_text())["train_seconds"] == 0
    assert (tmp_path / "ddim-eps-gmm" / "interpolation.png").is_file() and checkpoint.read_bytes() == before
    status, error, _ = cli(ddim, "--ckpt", checkpoint, "--sample-steps", 26, "--samples", 100)
    assert status == 2 and "between 1 and 25" in error


# ---- kill and resume


def test_resume_is_bit_for_bit_the_unbroken_run(cli, tmp_path, monkeypatch):
    whole = weights(cli(ddpm, "--steps", 60, *SMALL, out=tmp_path / "whole")[2])
    monkeypatch.setattr(run, "SAVE_SECONDS", 0)
    real, calls = ddpm.Diffusion.loss, []

    def fails_at_37(self, *args):
        calls.append(1)
        if len(calls) == 37:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(ddpm.Diffusion, "loss", fails_at_37)
    status, error, out = cli(ddpm, "--steps", 60, *SMALL, out=tmp_path / "broken")
    assert status == 130 and "--resume" in error
    assert weights(out)["step"] == 36
    monkeypatch.setattr(ddpm.Diffusion, "loss", real)
    status, error, out = cli(ddpm, "--steps", 60, *SMALL, "--resume", out=tmp_path / "broken")
    assert status == 0, error
    broken = weights(out)
    assert same(whole["state"], broken["state"]) and same(whole["rng"], broken["rng"]) and broken["step"] == 60
    assert [r["loss"] for r in whole["rows"]] == [r["loss"] for r in broken["rows"]]
    a, b = (np.load(tmp_path / n / "ddpm-eps-gmm" / "samples.npy") for n in ("whole", "broken"))
    assert (a == b).all()


def test_a_kill_leaves_a_whole_checkpoint(tmp_path):
    code = "import run; run.SAVE_SECONDS = 0; import ddpm; ddpm.main()"
    process = subprocess.Popen([sys.executable, "-c", code, "--steps", "100000", *SMALL, "--out", str(tmp_path)], cwd=ROOT,
                               stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    checkpoint = tmp_path / "-c-eps-gmm" / "model.pt"
    for _ in range(600):
        time.sleep(0.1)
        if checkpoint.exists() and run.read_checkpoint(checkpoint)["step"] >= 1000:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run.read_checkpoint(checkpoint)["step"] >= 1000
    assert {p.name for p in checkpoint.parent.iterdir() if not p.name.startswith(".")} == {"model.pt", "log.jsonl"}


def test_resume_insists_on_the_same_options(cli):
    cli(ddpm, "--steps", 5, *SMALL)
    status, error, out = cli(ddpm, "--steps", 5, *SMALL, "--schedule", "cosine", "--resume")
    assert status == 2 and "schedule = linear" in error and len(error.strip().splitlines()) == 1
    status, error, out = cli(ddpm, "--steps", 5, *SMALL, "--resume", "--sample-steps", 7)      # sampling may differ
    assert status == 0


# ---- several processes


@pytest.mark.parametrize("module, flags", [
    (ddpm, SMALL), (igpt, ["--width", "16", "--layers", "1", "--cells", "16", "--samples", "50", "--batch", "32"])])
def test_two_processes_train_as_one(module, flags, cli, tmp_path):      # the clip before the average: igpt's gradients
    flags, name = ["--steps", "20", *flags], {ddpm: "ddpm-eps-gmm", igpt: "igpt-attention-gmm"}[module]
    one = weights(cli(module, *flags, out=tmp_path / "one")[2], name)
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"{module.__name__}.py",
         *flags, "--device", "cpu", "--out", str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr[-2000:]
    two = weights(tmp_path / "two", name)
    for key, value in one["state"]["model"].items():
        torch.testing.assert_close(two["state"]["model"][key], value, atol=1e-5, rtol=1e-4)
    losses = lambda c: torch.tensor([r["loss"] for r in c["rows"]])
    torch.testing.assert_close(losses(one), losses(two), atol=1e-4, rtol=1e-4)


# ---- failures


def test_nan_stops_the_run_names_the_step_and_keeps_the_last_good_checkpoint(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "SAVE_SECONDS", 0)
    real, calls = ddpm.Diffusion.loss, []

    def turns_nan(self, *args):
        calls.append(1)
        losses = real(self, *args)
        return {k: v * (float("nan") if len(calls) == 30 else 1) for k, v in losses.items()}

    monkeypatch.setattr(ddpm.Diffusion, "loss", turns_nan)
    status, error, out = cli(ddpm, "--steps", 60, *SMALL)
    assert status == 1 and "step 30" in error and "step 29" in error and "Traceback" not in error
    kept = weights(out)
    assert kept["step"] == 29 and all(v.isfinite().all() for v in kept["state"]["model"].values())
    monkeypatch.setattr(ddpm.Diffusion, "loss", real)
    status, error, _ = cli(ddpm, "--steps", 60, *SMALL, "--lr", 1e30, out=tmp_path / "hot")
    assert status == 1 and "not finite at step" in error and not (tmp_path / "hot" / "ddpm-eps-gmm" / "metrics.json").exists()


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "model.pt"
    run.write(target, b"old")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.write(target, b"new")
    assert target.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_a_disk_that_fills_during_a_run_is_one_sentence(cli, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run.os, "fsync", full)
    status, error, _ = cli(ddpm, "--steps", 5, *SMALL)
    assert status == 2 and "No space left" in error and "Traceback" not in error


def test_a_bug_keeps_its_traceback(cli, monkeypatch):
    def broken(self, *args):
        return torch.zeros(2) + torch.zeros(3)

    monkeypatch.setattr(ddpm.Diffusion, "loss", broken)
    with pytest.raises(RuntimeError, match="size"):
        cli(ddpm, "--steps", 5, *SMALL)


# ---- bad input: one sentence, status 2


@pytest.mark.parametrize("script, args, words", [
    (ddpm, ["--dataset", "gnn"], "gmm"),
    (ddpm, ["--model", "score"], "eps"),
    (ddpm, ["--schedule", "quartic"], "cosine"),
    (ddpm, ["--steps", "0"], "--steps must be above 0"),
    (ddpm, ["--steps", "many"], "many"),
    (ddpm, ["--batch", "-3"], "--batch must be above 0"),
    (ddpm, ["--lr", "nan"], "--lr must be above 0"),
    (ddpm, ["--seed", "-1"], "--seed"),
    (ddpm, ["--T", "20"], "more than 20 steps"),
    (ddpm, ["--T", "50", "--sample-steps", "51"], "between 1 and 50"),
    (ddpm, ["--sample-steps", "-1"], "a number of 0 or more"),
    (ddpm, ["--zero-snr"], "zero terminal SNR"),
    (ddpm, ["--width", "0"], "--width must be at least 1"),
    (ddpm, ["--size", "inf"], "--size"),
    (ddim, ["--eta", "nan"], "0 or more"),
    (ddpm, ["--no-such-flag"], "no-such-flag"),
    (ddpm, ["--ckpt", "nowhere.pt"], "nowhere.pt"),
    (ddpm, ["--resume"], "no checkpoint"),
    (ddpm, ["--dataset", "mnist", "--data-dir", "/nowhere"], "--data-dir"),
    (ddpm, ["--dataset", "hoda", "--data-dir", "/nowhere"], "--data-dir"),
    (ddpm, ["--dataset", "folder:/nowhere"], "/nowhere"),
    (ddim, ["--eta", "-0.5"], "--eta must be a number of 0 or more"),
    (ddim, ["--eta", "1.5"], "eta must be between 0"),
    (ddim, ["--sample-steps", "1001"], "between 1 and 1000"),
    (ddim, ["--sample-steps", "0"], "--sample-steps must be at least 1"),
])
def test_bad_options_get_one_sentence(cli, script, args, words):
    status, error, _ = cli(script, *args)
    assert status == 2 and words in error, error
    assert "Traceback" not in error and len(error.strip().splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(cli):
    status, error, _ = cli(ddpm, "--device", "cuda")
    assert status == 2 and "no CUDA device" in error


def test_a_folder_that_cannot_be_written_is_refused(cli, tmp_path):
    (tmp_path / "file").write_text("")
    status, error, _ = cli(ddpm, "--steps", 5, *SMALL, out=tmp_path / "file")
    assert status == 2 and "cannot write results" in error and len(error.strip().splitlines()) == 1


def idx(n, rows=28, columns=28):
    return bytes([0, 0, 8, 3]) + b"".join(v.to_bytes(4, "big") for v in (n, rows, columns)) + bytes(n * rows * columns)


@pytest.mark.parametrize("dataset, path, content", [
    ("mnist", "mnist/train-images-idx3-ubyte", idx(5)[:-1]),
    ("mnist", "mnist/train-images-idx3-ubyte", b""),
    ("mnist", "mnist/train-images-idx3-ubyte.gz", b"\x1f\x8b\x08 not gzip"),
    ("hoda", "hoda/Test 20000.cdb", b"\xff" * 1500),
    ("hoda", "hoda/Test 20000.cdb", b"short"),
    ("cifar10", "cifar10/cifar-10-batches-bin/data_batch_1.bin", bytes(3072)),
    ("folder", "folder/a.png", b"not a picture"),
])
def test_damaged_data_is_named(cli, tmp_path, dataset, path, content):
    file = tmp_path / "data" / path
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    name = f"folder:{file.parent}" if dataset == "folder" else dataset
    status, error, _ = cli(ddpm, "--dataset", name, "--data-dir", tmp_path / "data", "--steps", 1)
    assert status == 2 and "Traceback" not in error and len(error.strip().splitlines()) == 1, error
    assert file.parent.name in error


class Payload:
    def __reduce__(self):
        return os.system, ("touch /dev/null",)


def test_foreign_and_damaged_checkpoints_are_refused_and_kept(cli, tmp_path):
    cli(ddpm, "--steps", 5, *SMALL)
    good = tmp_path / "ddpm-eps-gmm" / "model.pt"
    content = good.read_bytes()
    bad = tmp_path / "bad.pt"
    pickled, other = io.BytesIO(), io.BytesIO()
    torch.save({"script": "ddpm", "config": {}, "step": 1, "state": Payload(), "rng": {}}, pickled)
    torch.save({"weights": torch.zeros(3)}, other)
    vae = io.BytesIO()
    torch.save({**torch.load(io.BytesIO(content), weights_only=True), "script": "vae"}, vae)
    cases = {"cut short": content[: len(content) // 2], "empty": b"", "text": b"hello", "pickled": pickled.getvalue(),
             "not ours": other.getvalue(), "another script": vae.getvalue()}
    for case, damage in cases.items():
        bad.write_bytes(damage)
        status, error, _ = cli(ddpm, "--ckpt", bad)
        assert status == 2 and "bad.pt" in error and len(error.strip().splitlines()) == 1, (case, error)
        good.write_bytes(damage)
        status, error, _ = cli(ddpm, "--steps", 5, *SMALL, "--resume")
        assert status == 2 and "model.pt" in error and len(error.strip().splitlines()) == 1, (case, error)
        assert good.read_bytes() == damage
    good.write_bytes(content)
    status, error, _ = cli(ddpm, "--ckpt", good, "--width", 32)
    assert status == 2 and "width = 16" in error
    with pytest.raises(ValueError, match="holds another model"):
        state = run.read_checkpoint(good)["state"]["model"]
        run.restore(ddpm.Diffusion((2,), ddpm.make_schedule("linear", 25), width=32), state, good, "model")


# ---- logs


def test_wandb_is_asked_for_only_by_its_flag_and_its_absence_is_one_sentence(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)                             # import wandb raises
    assert cli(ddpm, "--steps", 3, *SMALL)[0] == 0
    status, error, _ = cli(ddpm, "--steps", 3, *SMALL, "--log", "wandb")
    assert status == 2 and "pip install wandb" in error


def test_wandb_gets_the_numbers_offline_without_a_key(cli, monkeypatch):
    seen = {"log": []}

    class Fake:
        api = type("Api", (), {"api_key": None})

        @staticmethod
        def init(**kw):
            seen["init"] = kw
            return type("Tracker", (), {"log": lambda self, row, step: seen["log"].append((step, row)),
                                        "finish": lambda self: seen.setdefault("finished", True)})()

    monkeypatch.setitem(sys.modules, "wandb", Fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    status, error, out = cli(ddpm, "--steps", 3, *SMALL, "--log", "wandb")
    assert status == 0 and seen["init"]["mode"] == "offline" and seen["finished"]
    assert [s for s, _ in seen["log"]] == [1, 2, 3] and set(seen["log"][0][1]) == {"loss"}
    assert (out / "ddpm-eps-gmm" / "log.jsonl").is_file()
    assert cli(ddpm, "--steps", 3, *SMALL, "--log", "none", out=out / "quiet")[0] == 0
    assert not (out / "quiet" / "ddpm-eps-gmm" / "log.jsonl").exists()


@pytest.mark.parametrize("options, steps, batch", [
    ([], 1, 1), (["--model", "b"], 1, 1), (["--dataset", "mnist"], 2, 1), (["--dataset", "persian"], 3, 4),
    (["--dataset", "persian", "--model", "b"], 5, 4), (["--dataset", "persian", "--steps", "9"], 9, 4),
    (["--dataset", "grid"], 6, 1), (["--dataset", "grid", "--model", "b"], 6, 1)])
def test_a_set_and_a_model_bring_their_own_defaults(options, steps, batch):     # model before set; preset for points
    images = {"steps": 2, "persian": {"steps": 3, "batch": 4}, "b": {"steps": 5}, "grid": {"steps": 6}}
    args = run.parse("", ["a", "b"], steps=1, batch=1, lr=1.0, images=images, argv=options)
    assert (args.steps, args.batch) == (steps, batch)


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_a_bad_picture_is_named_and_skipped_only_when_asked(cli, tmp_path):     # skip_bad not handed on
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(40):
        Image.new("L", (8, 8), 6 * i).save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    options = ["--dataset", f"folder:{folder}", "--size", 8, "--steps", 2, "--batch", 4, "--width", 16, "--T", 40, "--samples", 4,
               "--sample-steps", 2]
    status, error, _ = cli(ddpm, *options)
    assert status == 2 and "bad.png" in error and "Traceback" not in error
    status, error, _ = cli(ddpm, *options, "--skip-bad")
    assert status == 0, error
