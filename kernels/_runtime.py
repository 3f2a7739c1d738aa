"""What all kernels share: the guarded import of Triton, and the choice between a kernel and PyTorch.

Triton reads TRITON_INTERPRET when it is imported, so a process either interprets kernels on the CPU or compiles them.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":                                          # there but broken: let it be heard
        raise
    triton = None

    class tl:                                                           # enough for the kernel files to be imported
        constexpr = staticmethod(lambda value: value)


def jit(**options):
    """`triton.jit`, or nothing where there is no Triton."""
    return triton.jit(**options) if triton else lambda function: function


INTERPRET = triton is not None and bool(triton.knobs.runtime.interpret)
AMD = torch.version.hip is not None


def backend(x: torch.Tensor, why_not: str = "") -> str:
    """ "triton" or "torch" for the device of `x`. `why_not`: a reason why the kernel cannot take this call, or "".

    Raises ValueError for an unknown KERNELS, RuntimeError where KERNELS=triton asks for the impossible.
    """
    choice = os.environ.get("KERNELS", "auto") or "auto"
    if choice not in ("auto", "torch", "triton"):
        raise ValueError(f"KERNELS={choice}: it is torch, triton or auto")
    if triton is None:
        why_not = "Triton is not installed"
    elif x.device.type == "cuda" and INTERPRET:
        why_not = why_not or "TRITON_INTERPRET=1 interprets kernels on the CPU, and the tensor is on the GPU"
    elif x.device.type == "cpu" and not INTERPRET:
        why_not = "a CPU tensor needs TRITON_INTERPRET=1, set before Triton is imported"
    elif x.device.type not in ("cpu", "cuda"):
        why_not = f"there is no kernel for {x.device.type} tensors"
    if choice == "triton":
        if why_not:
            raise RuntimeError(f"KERNELS=triton, but the kernel cannot run: {why_not}")
        return "triton"
    return "torch" if why_not or choice == "torch" or x.device.type == "cpu" else "triton"


def refuse_gradients(name: str, *tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(f"{name} has no gradient: call it under torch.no_grad() or torch.inference_mode()")


def int32(value: int) -> int:
    """The low 32 bits as a signed number: one kernel argument type for every value."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


def in_tiles(work, x: torch.Tensor, tile: int) -> None:
    """work(row, x[row : row + tile], stop) for all rows of x, in inference mode; it may end when stop.is_set().

    On the CPU one thread a tile, not all threads on each small operation: nobody waits at a barrier 20 times a step,
    which costs little on an idle machine and everything on a shared one. On other devices it is one tile. The workers'
    thread count would become the default of threads started later, so it is put back.
    """
    N, stop, threads = len(x), threading.Event(), torch.get_num_threads()
    if x.is_cuda:
        tile = max(1, N)
    elif N <= tile * threads:
        tile = max(1, -(-N // threads))
    starts = range(0, N, tile)
    pool = None if x.is_cuda or threads == 1 or len(starts) == 1 else ThreadPoolExecutor(threads)

    def one(row):
        with torch.inference_mode():
            if pool:
                torch.set_num_threads(1)                                # of this worker
            work(row, x[row : row + tile], stop)

    if pool is None:
        for row in starts:
            one(row)
        return
    try:
        for done in [pool.submit(one, row) for row in starts]:
            done.result()
    finally:
        stop.set()                                                      # Ctrl-C: the tiles end at their next block
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
