"""One run of a script: what stands around every training loop, and nothing of any model.

    args = run.parse(__doc__, models=MODELS, steps=..., batch=..., lr=..., training={...}, sampling={...})
    with run.Run(args) as job:                              # device, seed, folder; errors become one sentence
        start = job.keep(model=model, optimizer=optimizer)  # what a checkpoint holds; restored by --resume
        for _ in job.track(train(..., start)):              # bar, log, checkpoints, NaN guard
            pass
        results, samples = job.judge(samples, truth)        # samples beside the truth, floors
        job.report(results, samples=samples, truth=truth)   # metrics.json, pictures, the table

A run writes `<out>/<script>-<model>-<dataset>/`: model.pt, log.jsonl, metrics.json, samples.npy, samples.png,
curves.png, and process.png and process.gif where there is a sampling process to show. Each file is written aside and
renamed, so that a kill leaves the old one or the new one. A checkpoint holds the state of everything given to `keep`,
the step and the random generators: on the CPU `--resume` gives, bit for bit, the numbers of an unbroken run.
Checkpoints are read with weights_only=True: no pickled object is ever loaded.

`torchrun --nproc-per-node=N SCRIPT.py ...` trains data-parallel: each process draws the whole global batch from the
same seed, keeps the rows `job.share`, and an optimizer given to `keep` averages its gradients: the numbers of one
process at the same global batch.

Exit status: 0 done, 2 bad input (a ValueError or OSError that this folder's own code raised), 1 a failed run
(`Failed`), 130 interrupted. Any other exception is a bug and keeps its traceback.
"""

import argparse
import importlib
import io
import json
import math
import os
import pathlib
import pickle
import re
import sys
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist

HERE = pathlib.Path(__file__).resolve().parent
SAVE_SECONDS = 30                                           # at most so much work is lost to a kill


class Failed(RuntimeError):
    """The input was good and the run was not: exit status 1."""


# ---- the command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def parse(doc: str, models, *, model: str | None = None, dataset: str = "gmm", steps: int, batch: int, lr: float,
          training: dict | None = None, sampling: dict | None = None, images: dict | None = None, reads=(),
          alias: dict | None = None, others=(), argv=None):
    """Namespace of the options that every script has and its own.

    `training` and `sampling` map a name to (default, help) or (default, help, choices); a checkpoint remembers the
    first, and --resume insists on them. `images` holds other defaults for sets of images, under the name of a model
    what that one wants there, and under the name of any set what is wanted for it; `reads` names the sibling scripts
    whose checkpoints --ckpt takes as well, `alias` a second flag of an option, `others` more names of
    data sets. A member that is a string names the sibling script that has it, which then runs in this one's place. A
    count is 1 or more, unless its help says what "0:" means."""
    import data

    for name, member in models.items() if isinstance(models, dict) else ():
        if isinstance(member, str) and argv is None and f"--model {name}" in " ".join(sys.argv).replace("=", " "):
            sys.argv[0] = str(HERE / f"{member}.py")
            sys.exit(importlib.import_module(member).main())
    training, sampling, images = training or {}, sampling or {}, images or {}
    names = [*data.NAMES, *others, "folder:PATH"]
    script = pathlib.Path(sys.argv[0]).stem if argv is None else "test"
    common = {
        "model": (model or next(iter(models)), "member of the family", list(models)),
        "dataset": (dataset, "one of " + ", ".join(names)),
        "steps": (steps, "optimiser steps"), "batch": (batch, "examples a step"), "lr": (lr, "peak learning rate"),
        "seed": (0, "of everything random"),
    }
    output = {
        "samples": (10_000, "samples to draw for the report"),
        "data_dir": (str(pathlib.Path("~/.cache/dgm").expanduser()), "where real data lies"),
        "download": (False, "fetch missing data that has a public address"),
        "skip_bad": (False, "leave out pictures of a folder that cannot be read"),
        "device": ("auto", "auto, cpu or cuda", ["auto", "cpu", "cuda"]),
        "out": ("results", "folder of results"),
        "resume": (False, "continue from the last checkpoint"),
        "ckpt": ("", "sample this checkpoint instead of training; its own options hold"),
        "log": ("jsonl", "where numbers go", ["none", "jsonl", "wandb"]),
    }
    parser = Parser(prog=f"{script}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    for name, (default, text, *choices) in (common | training | sampling | output).items():
        other = f" (images: {images[name]})" if name in images else ""
        shown = f"{text}; default {default}{other}".replace("%", "%%")
        flag = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=shown)
        else:
            kind = str if default is None else type(default)
            flags = [flag, alias[name]] if name in (alias or {}) else [flag]
            parser.add_argument(*flags, type=kind, default=None, help=shown, choices=choices[0] if choices else None,
                                metavar=None if choices else name.upper())
    args = parser.parse_args(argv)
    remembered = ["model", "dataset", "steps", "batch", "lr", "seed", *training]
    if args.ckpt:
        try:
            checkpoint = read_checkpoint(args.ckpt)
        except (ValueError, OSError) as e:
            parser.error(str(e))
        if checkpoint["script"] not in (script, *reads):
            parser.error(f"{args.ckpt} is a checkpoint of {checkpoint['script']}.py, which {script}.py does not read")
        for name in remembered:
            given, there = getattr(args, name), checkpoint["config"].get(name)
            if there is not None and name != "seed":
                if given is not None and given != there:
                    parser.error(f"{args.ckpt} was trained with {name} = {there}; --{name} {given} asks for another")
                setattr(args, name, there)
    if args.dataset is None:
        args.dataset = dataset
    if args.dataset not in (*data.NAMES, *others) and not args.dataset.startswith("folder:"):
        parser.error(f"unknown dataset {args.dataset!r}; the names are {', '.join(names)}")
    preset = ({} if args.dataset in data.DENSITIES else images) | images.get(args.dataset, {})
    preset = preset | preset.get(args.model or preset.get("model", common["model"][0]), {})
    for name, (default, *_) in (common | training | sampling | output).items():
        if getattr(args, name) is None:
            setattr(args, name, preset.get(name, default))
    for name, (default, text, *_) in (common | training | sampling | output).items():
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if name in ("steps", "batch", "lr", "samples") and not 0 < value < math.inf:
                parser.error(f"{flag} must be above 0; got {value}")
            if isinstance(default, int) and default > 0 and value < 1 and "0:" not in text:
                parser.error(f"{flag} must be at least 1; got {value}")
            if not 0 <= value < math.inf and name != "seed":
                parser.error(f"{flag} must be a number of 0 or more; got {value}")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed must be between 0 and 2^63 - 1; got {args.seed}")
    args.script = script
    args.remembered = remembered
    return args


# ---- files


def write(path, content: bytes) -> None:
    """Write aside and rename: the file is the old one or the whole new one, never half."""
    path = pathlib.Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as e:
        aside.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {e.strerror}") from e


def read_checkpoint(path, script: str | None = None) -> dict:
    """{script, config, step, seconds, state, rng} of a file that a run wrote; ValueError in a sentence if it is not."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise ValueError(f"{path} is corrupt or holds pickled objects, which are not loaded") from e
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile) as e:
        raise ValueError(f"{path} is not a whole checkpoint: it is cut short or corrupt") from e
    if not isinstance(checkpoint, dict) or not {"script", "config", "step", "state", "rng"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of ours: it holds no script, config, step and state")
    if script and checkpoint["script"] != script:
        raise ValueError(f"{path} is a checkpoint of {checkpoint['script']}.py, not of {script}.py")
    return checkpoint


def restore(thing, state, path, name: str) -> None:
    """load_state_dict with a sentence that names the first tensor that does not fit."""
    if isinstance(thing, torch.nn.Module):
        own = thing.state_dict()
        for key in own.keys() | state.keys():
            here, there = (tuple(s[key].shape) if key in s else None for s in (own, state))
            if here != there:
                here, there = here or "absent", there or "absent"
                raise ValueError(f"{path} holds another {name}: {key} is {there} there and {here} here")
    try:
        thing.load_state_dict(state)
    except (ValueError, KeyError, RuntimeError) as e:
        raise ValueError(f"{path} holds a state of {name} that does not fit this one") from e


# ---- the run


class Run:
    """A context with `device`, `folder`, `share` (this process's rows of a global batch), and the methods below."""

    def __init__(self, args):
        self.args, self.kept, self.rows, self.floors, self.seconds, self.start = args, {}, [], {}, 0.0, 0
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        dataset = "-".join(re.findall(r"[\w.]+", args.dataset))
        self.folder = pathlib.Path(args.out) / f"{args.script}-{args.model}-{dataset}"

    # -- entering and leaving

    def __enter__(self):
        try:
            self._enter()
        except BaseException:
            if not self.__exit__(*sys.exc_info()):
                raise
        return self

    def _enter(self):
        args = self.args
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but torch finds no CUDA device here; use --device cpu or auto")
        cuda = args.device != "cpu" and torch.cuda.is_available()
        self.device = torch.device(f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}" if cuda else "cpu")
        if self.world > 1:
            if args.batch % self.world:
                raise ValueError(f"--batch {args.batch} is not divisible by the {self.world} processes")
            dist.init_process_group("nccl" if cuda else "gloo")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        part = args.batch // self.world
        self.share = slice(self.rank * part, (self.rank + 1) * part)
        torch.manual_seed(args.seed)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".probe.{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as e:
            raise OSError(f"cannot write results to {self.folder}: {e.strerror}") from e

    def __exit__(self, kind, error, trace):
        if dist.is_initialized():
            dist.destroy_process_group()
        if kind is None:
            return False
        name = f"{self.args.script}.py"
        if issubclass(kind, KeyboardInterrupt):
            print(f"\n{name}: interrupted; --resume continues from the last checkpoint", file=sys.stderr)
            raise SystemExit(130) from None
        if issubclass(kind, Failed):
            print(f"{name}: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        while trace.tb_next:
            trace = trace.tb_next
        ours = pathlib.Path(trace.tb_frame.f_code.co_filename).resolve().is_relative_to(HERE)
        if issubclass(kind, (ValueError, OSError)) and ours and ".venv" not in trace.tb_frame.f_code.co_filename:
            print(f"{name}: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        return False

    # -- checkpoints

    def keep(self, **things) -> int:
        """Name what a checkpoint holds (anything with state_dict / load_state_dict); the step to start from."""
        self.kept = things
        if self.world > 1:
            for optimizer in (t for t in things.values() if isinstance(t, torch.optim.Optimizer)):
                self._average_gradients([p for group in optimizer.param_groups for p in group["params"]])
        if not self.args.resume:
            return 0
        path = self.folder / "model.pt"
        checkpoint = read_checkpoint(path, self.args.script)
        for name, here in self._config().items():
            there = checkpoint["config"].get(name)
            if there != here:
                raise ValueError(f"{path} was trained with {name} = {there}, this run asks for {here}; "
                                 "--resume needs the same")
        for name, thing in things.items():
            if name not in checkpoint["state"]:
                raise ValueError(f"{path} holds no {name}")
            restore(thing, checkpoint["state"][name], path, name)
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in checkpoint["rng"]:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], self.device)
        self.start, self.seconds, self.rows = checkpoint["step"], checkpoint["seconds"], checkpoint["rows"]
        return self.start

    def _config(self) -> dict:
        return {name: getattr(self.args, name) for name in self.args.remembered}

    def _average_gradients(self, parameters) -> None:
        """At the end of each backward pass, in one message; so a clip of gradients after it sees those of the batch."""
        waiting = []

        def average():
            waiting.clear()
            gradients = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([g.reshape(-1) for g in gradients])
            dist.all_reduce(flat)
            for g, mean in zip(gradients, (flat / self.world).split([g.numel() for g in gradients])):
                g.copy_(mean.view_as(g))

        def once(_):
            if not waiting:
                waiting.append(True)
                torch.autograd.Variable._execution_engine.queue_callback(average)

        for p in parameters:
            p.register_post_accumulate_grad_hook(once)

    def _save(self, step: int) -> None:
        if self.rank:
            return
        state = {name: thing.state_dict() for name, thing in self.kept.items()}
        for name, thing in self.kept.items():
            if isinstance(thing, torch.nn.Module) and not all(v.isfinite().all() for v in state[name].values()):
                raise Failed(f"the weights of {name} are no longer finite at step {step}; {self._last()}")
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        buffer = io.BytesIO()
        torch.save({"script": self.args.script, "config": self._config(), "step": step, "seconds": self.seconds,
                    "rows": self.rows, "state": state, "rng": rng}, buffer)
        write(self.folder / "model.pt", buffer.getvalue())
        if self.args.log != "none":
            write(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        self.saved = step

    def _last(self) -> str:
        saved = getattr(self, "saved", self.start)
        return f"the checkpoint of step {saved} is in {self.folder}" if saved else "no checkpoint had been written yet"

    def restore(self, **things) -> None:
        """Fill things from the checkpoint that --ckpt names."""
        state = read_checkpoint(self.args.ckpt)["state"]
        for name, thing in things.items():
            if name not in state:
                raise ValueError(f"{self.args.ckpt} holds no {name}")
            restore(thing, state[name], self.args.ckpt, name)

    # -- the loop

    def bar(self, total: int, label: str, done: int = 0, unit: str = "it"):
        from tqdm import tqdm

        return tqdm(total=total, initial=done, unit=unit, disable=bool(self.rank), desc=label, dynamic_ncols=True,
                    mininterval=0.5 if sys.stderr.isatty() else 15)

    def track(self, numbers, floors: dict | None = None):
        """Pass through a generator of {name: 0-d tensor} a step, with a bar, a log, checkpoints and a NaN guard.

        Numbers are averaged over the log interval and fetched once an interval. `floors` {name: value} are shown
        beside the number of that name, in the bar and in curves.png. Only process 0 goes on after the last step."""
        args, self.floors = self.args, floors or {}
        every = max(1, args.steps // 200)
        tracker = self._wandb() if args.log == "wandb" and not self.rank else None
        bar = self.bar(args.steps, f"{args.script} {args.model}", self.start, "step")
        pending, began, last_save = [], time.perf_counter(), time.perf_counter()
        for step, row in enumerate(numbers, self.start + 1):
            pending.append(row)
            bar.update()
            if step % every and step < args.steps:
                yield row
                continue
            means = self._means(pending, step)
            pending = []
            now = time.perf_counter()
            self.seconds, began = self.seconds + now - began, now
            self.rows.append({"step": step, "seconds": round(self.seconds, 3), **means})
            if tracker:
                tracker.log(means, step=step)
            beside = lambda k: f" (floor {self.floors[k]:.4g})" if k in self.floors else ""
            bar.set_postfix_str(" ".join(f"{k} {v:.4g}{beside(k)}" for k, v in means.items()), refresh=False)
            if now - last_save > SAVE_SECONDS or step == args.steps:
                self._save(step)
                last_save = time.perf_counter()
            yield row
        bar.close()
        if tracker:
            tracker.finish()
        if self.rank:
            raise SystemExit(0)

    def _means(self, pending: list[dict], step: int) -> dict[str, float]:
        table = torch.stack([torch.stack([torch.as_tensor(v, device=self.device).float() for v in row.values()])
                             for row in pending])
        bad = ~table.isfinite().all(1)
        if self.world > 1:                                  # all processes stop together, or none
            bad = bad.to(torch.int32)
            dist.all_reduce(bad)
        if bad.any():
            at = step - len(pending) + 1 + int(bad.nonzero()[0])
            name = next((k for k, v in pending[at - step - 1].items() if not math.isfinite(float(v))), "a number")
            raise Failed(f"{name} is not finite at step {at}; {self._last()}; a lower --lr may help")
        means = table.mean(0)
        if self.world > 1:
            dist.all_reduce(means)
            means /= self.world
        return dict(zip(pending[0], means.tolist()))

    def _wandb(self):
        try:
            import wandb
        except ModuleNotFoundError as e:
            raise ValueError("--log wandb needs the package wandb: pip install wandb") from e
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        return wandb.init(project="dgm", name=self.folder.name, dir=str(self.folder), config=self._config(), mode=mode)

    # -- the report

    def judge(self, samples, truth):
        """({name: metric}, samples) of what a model drew: points as they are, images as the integers of the data."""
        if hasattr(truth, "log_prob"):
            import metrics

            return metrics.two_dimensional(samples, truth), samples
        import judges

        samples = truth.unscale(samples)
        return judges.images(samples, truth), samples

    def report(self, metrics: dict, samples=None, truth=None, parameters: int = 0, sample_seconds: float = 0.0,
               frames=None, **extra) -> None:
        """Write metrics.json, samples.npy, the pictures, and print the table. `metrics` is {name: metrics.metric(...)};
        `samples` an array (N, 2) or uint8 (N, C, H, W) of `truth`'s kind, `frames` {label: state on the way}."""
        import metrics as measure

        args, levels = self.args, getattr(truth, "levels", 256)
        try:
            from triton import __version__ as triton_version
        except ModuleNotFoundError:
            triton_version = None
        finite = {name: {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in m.items()}
                  for name, m in metrics.items()}          # JSON knows no infinity
        result = {"script": args.script, "model": args.model, "dataset": args.dataset, "seed": args.seed,
                  "device": str(self.device), "torch": torch.__version__, "triton": triton_version,
                  "steps": args.steps, "train_seconds": round(self.seconds, 2),
                  "sample_seconds": round(sample_seconds, 3), "samples": 0 if samples is None else len(samples),
                  "parameters": parameters,
                  "options": {k: v for k, v in vars(args).items() if k not in ("remembered", "script")},
                  **extra, "metrics": finite}
        write(self.folder / "metrics.json", (json.dumps(result, indent=1) + "\n").encode())
        if samples is not None:
            samples = np.asarray(samples)
            buffer = io.BytesIO()
            np.save(buffer, samples)
            write(self.folder / "samples.npy", buffer.getvalue())
            if truth is not None:
                real = truth.sample(len(samples))
                measure.samples_picture(self.folder / "samples.png", real, samples, truth, levels)
        if frames:
            labels = list(frames)
            if len(labels) > 8:
                at = [1 - (1 - i / 7) ** 2 for i in range(8)]           # most happens near the end
                labels = [labels[round(a * (len(labels) - 1))] for a in at]
            measure.strip_picture(self.folder / "process.png", [frames[k] for k in labels], labels, levels)
            measure.gif(self.folder / "process.gif", list(frames.values()), levels=levels)
        if self.rows:
            rows = [{k: v for k, v in row.items() if k != "seconds"} for row in self.rows]
            measure.curves_picture(self.folder / "curves.png", rows, self.floors)
        print(measure.table(metrics))
        print(f"trained {self.seconds:.1f} s, sampled {sample_seconds:.1f} s; pictures and numbers in {self.folder}/")
