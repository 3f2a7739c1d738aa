"""What the kernels become as machine code, with no GPU.

    python -m kernels.compile [--targets sm_90 gfx942] [--json FILE] [--measure]

Each kernel is compiled for sm_80 (A100), sm_89 (RTX 40), sm_90 (H100), sm_100 (B200) and gfx942 (MI300), and read back:
registers, stack, spilled bytes, spill instructions inside the main loop, shared and tensor memory. A kernel that is too
large compiles without an error and fails at launch, so the hardware's limits are asserted here. So is
`budgets.json`, the measured numbers by Triton version and a little slack, so that nothing grows unseen. Exit status 1
over a limit or a budget, 2 where nothing can be compiled. --measure writes this Triton's numbers into budgets.json.

Triton interprets or compiles for the life of a process, so this is one of its own, with TRITON_INTERPRET removed.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)                                # before Triton is imported

from . import attention, chamfer, diffusion, langevin, quantize, scan, spline, wavefront  # noqa: E402
from ._runtime import triton  # noqa: E402

BUDGETS = pathlib.Path(__file__).with_name("budgets.json")
LIMITS = {                                                              # bytes of shared memory, registers a thread
    "sm_80": dict(shared=166_912, registers=255),
    "sm_86": dict(shared=101_376, registers=255),
    "sm_89": dict(shared=101_376, registers=255),
    "sm_90": dict(shared=232_448, registers=255),
    "sm_100": dict(shared=232_448, registers=255, tensor=512),
    "sm_120": dict(shared=101_376, registers=255),
    "gfx942": dict(shared=65_536, registers=512),
}
NVIDIA, AMD = ("sm_80", "sm_90", "sm_100"), ("gfx942",)
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
COLUMNS = ("registers", "stack", "spilled", "in_loop", "shared", "tensor", "loop", "instructions")
SLACK = dict(registers=8, stack=64, spilled=128, in_loop=16, shared=2048, tensor=0)     # over the measured number
TYPES = dict.fromkeys(("w_hidden_ptr", "w_out_ptr"), "*fp16") | dict(index_ptr="*i64", y_ptr="*i64") | dict.fromkeys(
    ("P", "Q", "A", "B", "C", "base", "bound", "clip", "slack", "tiny", "scale"), "fp32") | dict(
    length_ptr="*i32", n_ptr="*i32", m_ptr="*i32", picture_ptr="*u8") | dict.fromkeys(
    [f"{name}_ptr" for name in ("q", "k", "v", "o", "do", "dq", "dk", "dv")], "*bf16")
ALIGNED = {"stride_n", *(f"{name}_{axis}" for name in "qkv" for axis in "bht")}             # multiples of 16
NO_SPILL_IN_LOOP, SOME_SPILL = ("sm_90",), ("langevin 128", "langevin 128 logits")        # these have budgets alone
IMAGES = diffusion.step_kernel, langevin.update_kernel
LOOPLESS = "step", "centre", "update", "merge D64", "spline"


def generation(target):
    """(CUDA capability, AMD or not), as the launchers' tables take them."""
    return 9 if target in AMD else int(target[3:]) // 10, target in AMD


def configurations():
    """(name, target): (kernel, constants, options). The launcher's own table chooses by shared memory."""
    table = {}

    def chain(name, target, H, D, fast, L=3):
        config = diffusion.chain_config(H, L, LIMITS[target]["shared"], target in AMD)
        options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
        constants = dict(D=D, H=H, L=L, NOISE=True, FAST=fast and target not in AMD, **config)
        table[name, target] = diffusion.chain_kernel, constants, options

    def langevin_chain(name, target, H, L, C, fast=True):
        config = langevin.langevin_config(H, L, LIMITS[target]["shared"], target in AMD, target == "sm_100")
        options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
        constants = dict(D=2, H=H, L=L, C=C, LABELS=C > 1, CLIP=True, BOUND=True, NOISE=True,
                         FAST=fast and target not in AMD, **config)
        table[name, target] = langevin.langevin_kernel, constants, options

    def waves(name, target, width, layers):
        config = wavefront.wavefront_config(28, width, width, layers, *generation(target))
        options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
        offsets = tuple((a, b) for a in range(4) for b in range(4) if a + b)
        constants = dict(OFFSETS=offsets, S=1, K=15, A=3, DF=width, DG=width, PLACES=layers > 0, LAYERS=layers)
        table[name, target] = wavefront.wavefront_kernel, constants | config, options

    for target in TARGETS:
        for H in (64, 128):
            chain(f"chain {H}", target, H, 2, True)
            langevin_chain(f"langevin {H}", target, H, 2, 1)
        langevin_chain("langevin 64 logits", target, 64, 2, 10)
        table["update", target] = langevin.update_kernel, dict(CLIP=True, BOUND=True, NOISE=True, BLOCK=256), dict(
            num_warps=4)
        table["step", target] = diffusion.step_kernel, dict(CLIP=True, NOISE=True, BLOCK=256), dict(num_warps=4)
        for D in (64, 256):
            config = quantize.nearest_config(D, *generation(target))
            options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
            table[f"nearest D{D}", target] = quantize.nearest_kernel, dict(D=D, stride_d=1, **config), options
        options = chamfer.nearest_point_config(target in AMD)
        constants = {key: options.pop(key) for key in ("BN", "BM")}
        table["nearest point", target] = chamfer.nearest_point_kernel, dict(D=3, **constants), options
        for D in (32, 64, 128):
            for which in ("forward", "keys", "queries"):
                config = attention.attention_config(which, D, 2, target in AMD)
                options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
                kernel = {"forward": attention.attention_kernel}.get(which) or getattr(attention, f"{which}_kernel")
                constants = dict(D=D, PRECISION="ieee", **config)
                table[f"attention D{D} {which}", target] = kernel, constants, options
        options = dict(num_warps=4, num_stages=1 if target in AMD else 2)
        table["decode D64", target] = attention.decode_kernel, dict(D=64, BT=32, BD=64, SPAN=128), options
        table["merge D64", target] = attention.merge_kernel, dict(D=64, BD=64, BS=8), dict(num_warps=1)
        constants = scan.scan_config(16) | dict(E=256, N=16)
        options = dict(num_warps=constants.pop("num_warps"))
        table["scan", target] = scan.scan_kernel, constants | dict(KEEP=True), options
        table["scan back", target] = scan.scan_back_kernel, constants, options
        waves("wavefront table", target, 1, 0)
        waves("wavefront mlp-2", target, 64, 2)
        for K in (8, 32):
            options = spline.spline_config(K) | dict(K=K, UNIT=spline.UNIT, FLOOR=spline.LEAST)
            warps = dict(num_warps=options.pop("num_warps"))
            for which in ("", " inverse", " back"):
                constants = options | dict(BACK=which == " back", INVERSE=which == " inverse")
                table[f"spline K{K}{which}", target] = spline.spline_kernel, constants, warps
        table["centre", target] = quantize.centre_kernel, dict(D=64, BK=32, BD=64), dict(num_warps=4)
    for target in ("sm_90", "gfx942"):
        chain("chain 128 D16", target, 128, 16, True)
    chain("chain 128 precise", "sm_90", 128, 2, False)
    langevin_chain("langevin 128 logits", "sm_90", 128, 2, 10)
    return table


# ---- one program


def compiled(kernel, constants, options, target):
    """The compiled program, with the attributes that the launcher would find: every pointer divisible by 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, pointers = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = TYPES.get(name, "*fp32")
            pointers[i,] = [["tt.divisibility", 16]]
        else:
            if name in ALIGNED or name in "nT" and kernel in (*IMAGES, attention.decode_kernel):
                pointers[i,] = [["tt.divisibility", 16]]
            signature[name] = TYPES.get(name, "i32")
    source = ASTSource(kernel, signature, constants, pointers)
    gpu = GPUTarget("hip", "gfx942", 64) if target in AMD else GPUTarget("cuda", int(target[3:]), 32)
    return triton.compile(source, target=gpu, options=dict(options, enable_fp_fusion=True))


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def find(pattern, text):
    return int(re.search(pattern, text)[1])


def numbers_nvidia(program, target):
    from triton.backends.nvidia import compiler

    arch = int(target[3:])
    ptxas = pathlib.Path(compiler.get_ptxas(arch).path)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = pathlib.Path(folder, "x.ptx"), pathlib.Path(folder, "x.cubin")
        ptx.write_text(program.asm["ptx"])
        cubin.write_bytes(program.asm["cubin"])
        name = re.search(r"\.target\s+(\w+)", program.asm["ptx"])[1]
        extra = ["--regAllocOptLevel=2"] if "regAllocOptLevel" in pathlib.Path(compiler.__file__).read_text() else []
        report = run(ptxas, "-v", *extra, f"--gpu-name={name}", ptx, "-o", pathlib.Path(folder, "again.cubin"))
        lines = run(ptxas.with_name("nvdisasm"), "-c", cubin).splitlines()
    code, labels = [], {}
    for line in lines:
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif "/*" in line and re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", line):
            code.append(line)
    loop = []                                                           # the longest body of a backward branch
    for i, line in enumerate(code):
        branch = re.search(r"\bBRA\b.*?`?\(?(\.L_x_\d+)", line)
        start = labels.get(branch[1], i) if branch else i
        if i - start > len(loop):
            loop = code[start : i + 1]
    spills = sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in loop)
    return dict(
        registers=find(r"Used (\d+) registers", report), stack=find(r"(\d+) bytes stack frame", report),
        spilled=find(r"(\d+) bytes spill stores", report) + find(r"(\d+) bytes spill loads", report),
        in_loop=spills, shared=program.metadata.shared, tensor=getattr(program.metadata, "tmem_size", 0) or 0,
        loop=len(loop), instructions=len(code))


def numbers_amd(program, target):
    text = program.asm["amdgcn"]
    get = lambda key: find(rf"\.{key}:\s+(\d+)", text)
    code = [line for line in text.splitlines() if re.match(r"\s+[vs]_|\s+(ds|buffer|global|flat|scratch)_", line)]
    labels, at, loop = {}, 0, []
    for line in text.splitlines():                                      # as above: the longest backward branch
        if label := re.match(r"(\.LBB\d+_\d+):", line):
            labels[label[1]] = at
        elif re.match(r"\s+[vs]_|\s+(ds|buffer|global|flat|scratch)_", line):
            at += 1
            branch = re.match(r"\s+s_c?branch\w*\s+(\.LBB\d+_\d+)", line)
            if branch and branch[1] in labels and at - labels[branch[1]] > len(loop):
                loop = code[labels[branch[1]] : at]
    return dict(
        registers=get("vgpr_count"), stack=get("private_segment_fixed_size"), spilled=4 * get("vgpr_spill_count"),
        in_loop=sum("scratch_" in line or "buffer_load_dword v" in line and "s[0:3]" in line for line in loop),
        shared=program.metadata.shared, tensor=0, loop=len(loop), instructions=len(code))


def numbers(kernel, constants, options, target):
    program = compiled(kernel, constants, options, target)
    return (numbers_amd if target in AMD else numbers_nvidia)(program, target)


# ---- the gate


def faults(name, target, n, budget):
    limits = LIMITS[target]
    for key in ("registers", "shared", "tensor"):
        if n[key] > limits.get(key, 0):
            yield f"{key} {n[key]} over the hardware's {limits.get(key, 0)}"
    if n["instructions"] < 100:
        yield f"{n['instructions']} instructions: an empty program"
    if not name.startswith(LOOPLESS) and target not in AMD and not n["loop"]:
        yield "no loop found in the machine code"
    if target in NO_SPILL_IN_LOOP and name not in SOME_SPILL and n["in_loop"]:
        yield f"{n['in_loop']} spills in the loop"
    for key, slack in SLACK.items():
        if budget and n[key] > budget[key] + (slack if budget[key] or key not in ("in_loop", "spilled") else 0):
            yield f"{key} {n[key]} over the budget, {budget[key]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS, metavar="TARGET",
                        help=", ".join(TARGETS))
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--json", type=pathlib.Path, help="also write the numbers here")
    parser.add_argument("--measure", action="store_true", help="write the numbers into budgets.json as the new budget")
    args = parser.parse_args()
    if triton is None:
        print("kernels.compile: Triton is not installed, so there is nothing to compile")
        return 2
    minor = ".".join(triton.__version__.split(".")[:2])
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    budget = budgets.get(minor, {})
    against = "to be measured" if args.measure else minor if budget else "none for this version, limits only"
    print(f"Triton {triton.__version__}; budget: {against}")
    print(f"{'kernel':20s}{'target':8s}" + "".join(f"{c:>13s}" for c in COLUMNS))
    measured, bad = {}, 0
    for (name, target), (kernel, constants, options) in configurations().items():
        if target not in args.targets or args.only not in name:
            continue
        key = f"{name} {target}"
        n = measured[key] = numbers(kernel, constants, options, target)
        wrong = list(faults(name, target, n, None if args.measure else budget.get(key)))
        bad += bool(wrong)
        print("\n    ".join([f"{name:20s}{target:8s}" + "".join(f"{n[c]:13d}" for c in COLUMNS), *wrong]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({minor: measured}, indent=1) + "\n")
    if args.measure:
        keep = {k: {c: n[c] for c in SLACK} for k, n in measured.items()}
        budgets[minor] = budget | keep
        BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
    print(f"{len(measured)} programs, {bad} over a limit or a budget")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
