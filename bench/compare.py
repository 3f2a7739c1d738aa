"""Members of a family side by side: one table and one figure from one command.

    python bench/compare.py gan.py --models gan wgan --dataset persian
    python bench/compare.py gan.py --models gan wgan wgan-gp --dataset persian --read       # from runs that are there

The members train side by side, the cores divided among them: small networks gain little from more than one. What this
does not know it hands to the script. Table and figure (samples above the curves of training) go to
<root>/<script>-<models>-<dataset>.md and .png.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import metrics  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--root", default="results/compare")
    parser.add_argument("--read", action="store_true")
    args, rest = parser.parse_known_args()
    stem, root = pathlib.Path(args.script).stem, ROOT / args.root
    folders = [root / f"{stem}-{model}-{args.dataset}" for model in args.models]
    if not args.read:
        threads = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(folders)))}
        command = [sys.executable, args.script, "--dataset", args.dataset, "--out", str(root), *rest]
        running = [subprocess.Popen([*command, "--model", model], cwd=ROOT, env=threads) for model in args.models]
        if any([process.wait() for process in running]):
            sys.exit("not all members came to their end; see above")
    for model, folder in zip(args.models, folders):
        if not (folder / "metrics.json").is_file():
            sys.exit(f"no results of {model} in {folder}; leave out --read")
    found = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    lines = ["| | " + " | ".join(args.models) + " | real |", "|---" * (len(folders) + 2) + "|"]
    for name, entry in found[0]["metrics"].items():
        cells = [f"{f['metrics'][name]['value']:.4g}" if name in f["metrics"] else "" for f in found]
        floor = "" if entry["floor"] is None else f"{entry['floor']:.4g}"
        lines.append(f"| {name} ({entry['better']} is better) | {' | '.join(cells)} | {floor} |")
    lines.append("| training, s | " + " | ".join(f"{f['train_seconds']:.0f}" for f in found) + " | |")
    name = root / f"{stem}-{'-'.join(args.models)}-{args.dataset}"
    name.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    figure, axes = metrics._figure(2, len(folders), 4.2, 3.6)
    for k, (model, folder) in enumerate(zip(args.models, folders)):
        samples = np.load(folder / "samples.npy")
        metrics._title(axes[0, k], model)
        if samples.ndim == 2:
            metrics._scatter(axes[0, k], samples, metrics.ACCENT)
        else:
            metrics._show_tile(axes[0, k], samples, 10, 2 if samples.max() < 2 else 256)
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses = [key for key in rows[0] if key.endswith("loss")]
        for key, colour in zip(losses, (metrics.INK, metrics.ACCENT, metrics.MUTED)):
            axes[1, k].plot([r["step"] for r in rows], [r[key] for r in rows], color=colour, linewidth=1, label=key)
        axes[1, k].legend(fontsize=8, frameon=False)
        metrics._title(axes[1, k], "losses by step")
    figure.savefig(name.with_suffix(".png"))
    print(f"figure and table in {name}.png and .md")


if __name__ == "__main__":
    main()
