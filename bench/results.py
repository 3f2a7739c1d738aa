"""The README's results: a script over several seeds, median and range of every metric.

    python bench/results.py ddpm.py --dataset gmm                    # seeds 0 1 2, as results/seed-0 ...
    python bench/results.py ddim.py --dataset gmm --ckpt 'results/seed-{seed}/ddpm-eps-gmm/model.pt'
    python bench/results.py ddpm.py --dataset gmm --read             # only tabulate what is there

What this does not know it hands to the script; {seed} is filled in.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", default="results", help="folder of the seeds' folders")
    parser.add_argument("--read", action="store_true")
    args, rest = parser.parse_known_args()
    found = []
    for seed in args.seeds:
        out = ROOT / args.root / f"seed-{seed}"
        if not args.read:
            options = [o.format(seed=seed) for o in rest] + (["--model", args.model] if args.model else [])
            command = [sys.executable, args.script, "--dataset", args.dataset, "--seed", str(seed), "--out", str(out)]
            subprocess.run([*command, *options], cwd=ROOT, check=True)
        files = sorted(out.glob(f"{pathlib.Path(args.script).stem}-{args.model or '*'}-{args.dataset}/metrics.json"),
                       key=lambda f: f.stat().st_mtime)
        if not files:
            sys.exit(f"no results of {args.script} on {args.dataset} in {out}")
        found.append(json.loads(files[-1].read_text()))
    print(f"\n{args.script} --dataset {args.dataset}, seeds {args.seeds}: median (range)\n")
    print("| metric | value | floor |\n|---|---|---|")
    show = lambda values: f"{statistics.median(values):.4g} ({min(values):.4g} .. {max(values):.4g})"
    for name, entry in found[0]["metrics"].items():
        floor = "" if entry["floor"] is None else f"{statistics.median(f['metrics'][name]['floor'] for f in found):.4g}"
        print(f"| {name} | {show([f['metrics'][name]['value'] for f in found])} | {floor} |")
    for name in ("train_seconds", "sample_seconds"):
        print(f"| {name} | {show([f[name] for f in found])} | |")
    if found[0].get("table"):
        steps = list(next(iter(found[0]["table"].values())))
        print("\n| | " + " | ".join(f"S = {S}" for S in steps) + " |\n|" + "---|" * (len(steps) + 1))
        for label in found[0]["table"]:
            cells = [f"{statistics.median(f['table'][label][S] for f in found):.4f}" for S in steps]
            print(f"| {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
