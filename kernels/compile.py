"""What the kernels become as machine code, with no GPU: `python -m kernels.compile [--targets sm_90 ...] [--json FILE]`.

Each kernel is compiled for sm_80 (A100), sm_90 (H100), sm_100 (B200) and gfx942 (MI300), and the program is read back: registers, stack,
spilled bytes, spill instructions inside the main loop, shared and tensor memory. A kernel that is too large compiles
without an error and fails at launch, so the hardware's limits are asserted here, and so is `budgets.json`: the
measured numbers by Triton version, to which nothing may be added unseen. Exit status 1 over a limit or a budget.
`--measure` writes the numbers of this Triton into budgets.json.

Triton interprets or compiles for the life of a process, so this is one of its own, with TRITON_INTERPRET removed.
"""

import os
import pathlib
import re
import subprocess
import tempfile

os.environ.pop("TRITON_INTERPRET", None)                                # before Triton is imported

from . import diffusion  # noqa: E402
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
COLUMNS = ("registers", "stack", "spilled", "in_loop", "shared", "tensor", "instructions")
NO_SPILL_IN_LOOP = ("sm_90",)


def configurations():
    """name: (kernel, constants, options, targets)."""
    table = {}
    for H in (64, 128):
        for fast, targets in ((True, NVIDIA), (False, ("sm_90", "gfx942"))):
            for target in targets:
                config = dict(diffusion.chain_config(H, target))
                kernel = config.pop("kernel")
                options = {k: config.pop(k) for k in ("num_warps", "num_stages")}
                name = f"chain {H}" + ("" if fast or target in AMD else " precise")
                table[name, target] = (kernel, dict(D=2, H=H, L=3, NOISE=True, FAST=fast, **config), options)
    for target in NVIDIA + AMD:
        table["step", target] = (diffusion.step_kernel, dict(CLIP=True, NOISE=True, BLOCK=256), dict(num_warps=4))
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
            signature[name] = "*fp16" if name in ("w_hidden_ptr", "w_out_ptr") else "*fp32"
            pointers[i,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in ("P", "Q", "A", "B", "C", "clip") else "i32"
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
        registers=get("vgpr_count"), stack=get("private_segment_fixed_size"),
        spilled=4 * (get("vgpr_spill_count") + get("sgpr_spill_count")),
        in_loop=sum("scratch_" in line or "buffer_load_dword v" in line and "s[0:3]" in line for line in loop),
        shared=program.metadata.shared, tensor=0, loop=len(loop), instructions=len(code))


def numbers(kernel, constants, options, target):
    program = compiled(kernel, constants, options, target)
    return (numbers_amd if target in AMD else numbers_nvidia)(program, target)
