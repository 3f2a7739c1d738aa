"""A whole reverse process in one launch, and one fused update for image models.

`sample_chain`: S steps of an MLP denoiser whose time embedding is folded into a table of biases,

    h = silu(x W_in^T + bias[s, 0]);   h <- h + silu(h W_l^T + bias[s, l]), l = 1..L;   f = h W_out^T + b_out
    x <- A_s x + B_s f + C_s z,        z ~ N(0, I): rng.normal at step first + s

One linear form for many samplers: DDPM, DDIM with any eta, Euler for flows and probability-flow ODEs, Langevin; the
table (S, 3) of [A, B, C] chooses. Shapes: x (N, D), w_in (H, D), w_hidden (L, H, H), w_out (D, H), b_out (D,),
biases (S, L + 1, H).

What it saves. An eager step launches 16 operations or more and moves each hidden activation through memory eight times
(13 kB a sample at H = 128, L = 3). The kernel is one launch for all steps: the weights stay in shared memory, the
activations in registers, and x alone is read once and written once. Matrix products take fp16 operands and fp32
accumulators; x stays fp32, and enters the first layer as a sum of two fp16 parts. On a CPU the same idea holds with the
cache in place of registers: a tile of rows goes through all steps in preallocated buffers before the next one starts.

`diffusion_step`: the update of a U-Net's sampler in one pass, 12 bytes an fp32 element (eager: 8 to 12 an operation),

    x_0 = P x + Q out, clamped to [-clip, clip] if clip is given;   x <- A x_0 + B x + C z

Limits. No gradients. sample_chain's kernel: H = 64 or 128 (16 and 32 too when interpreted; H = 256 does not fit without
spills and runs in PyTorch), D = 1..16, L H <= 384, activations within fp16's 65504. The CPU path takes any size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import rng
from ._runtime import AMD, INTERPRET, backend, in_tiles, int32, jit, refuse_gradients, tl, triton

# ---- definitions


def sample_chain_reference(x, w_in, w_hidden, w_out, b_out, biases, coefficients, seed, first=0, noise="philox"):
    """The definition, in any dtype. The noise is rng's float32 stream, cast."""
    for s, (A, B, C) in enumerate(coefficients.tolist()):
        h = F.silu(x @ w_in.T + biases[s, 0])
        for W, bias in zip(w_hidden, biases[s, 1:]):
            h = h + F.silu(h @ W.T + bias)
        x = A * x + B * (h @ w_out.T + b_out)
        if noise == "philox":
            x = x + C * rng.normal(*x.shape, seed, first + s, device=x.device).to(x.dtype)
    return x


def diffusion_step_reference(x, out, coefficients, seed, step, clip=None) -> Tensor:
    """The definition, in any dtype. Element i of the flattened x takes normal [i // 4, i % 4] of stream rng.STEP."""
    P, Q, A, B, C = coefficients
    x_0 = P * x + Q * out
    if clip is not None:
        x_0 = x_0.clamp(-clip, clip)
    z = rng.normal((x.numel() + 3) // 4, 4, seed, step, rng.STEP, x.device).flatten()[: x.numel()].view(x.shape)
    return A * x_0 + B * x + C * z.to(x.dtype)


# ---- CPU: a tile of rows through all steps, one tile a thread


def _chain_tile(x, row, w_in, w_hidden, w_out, b_out, biases, table, seed, first, stop):
    """x (R, D) in place; w_in (D, H), w_hidden L x (H, H), w_out (H, D): transposed; biases: S tuples of L + 1 rows."""
    (R, D), H = x.shape, w_in.shape[1]
    rows = torch.arange(row, row + R, device=x.device)
    h, a, f = x.new_empty(R, H), x.new_empty(R, H), x.new_empty(R, D)
    block = max(1, 32768 // (R * ((D + 3) // 4))) if x.device.type == "cpu" else 8  # the generator's words stay in L2
    for start in range(0, len(table), block):
        part = table[start : start + block]
        if any(C for _, _, C in part):
            steps = torch.arange(first + start, first + start + len(part), device=x.device).bitwise_and_(rng.MASK)
            z = rng.normal_block(rows, D, steps, seed)
        for k, (A, B, C) in enumerate(part):
            bias = biases[start + k]
            torch.addmm(bias[0], x, w_in, out=h)
            F.silu(h, inplace=True)
            for W, b in zip(w_hidden, bias[1:]):
                torch.addmm(b, h, W, out=a)
                h.add_(F.silu(a, inplace=True))
            torch.addmm(b_out, h, w_out, out=f)
            x.mul_(A).add_(f, alpha=B)
            if C:
                x.add_(z[k], alpha=C)
        if stop.is_set():
            return


def _chain_torch(x, w_in, w_hidden, w_out, b_out, biases, coefficients, seed, first) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    with torch.inference_mode():
        shared = (w_in.T.contiguous(), [W.T.contiguous() for W in w_hidden], w_out.T.contiguous(), b_out,
                  [rows.unbind() for rows in biases.unbind()], coefficients.tolist())
    work = lambda row, part, stop: _chain_tile(part, row, *shared, seed, first, stop)
    in_tiles(work, out, max(128, 131072 // len(w_in)))                  # h and a: 0.5 MB each, a core's L2
    return out


def _step_torch(x, out, coefficients, seed, step, clip) -> Tensor:
    P, Q, A, B, C = coefficients
    new = x.mul(P).add_(out, alpha=Q) if clip is None else x.mul(P).add_(out, alpha=Q).clamp_(-clip, clip)
    new = new.mul_(A).add_(x, alpha=B).contiguous()
    if C:
        flat, block = new.flatten(), 65536
        step = torch.tensor([step & rng.MASK], device=x.device)
        for i in range(0, len(flat), block):
            part = flat[i : i + block]
            groups = torch.arange(i // 4, (i + len(part) + 3) // 4, device=x.device)
            z = rng.normal_block(groups, 4, step, seed, rng.STEP).flatten()[: len(part)]
            part.add_(z.to(x.dtype), alpha=C)
    return new


# ---- Triton


@jit()
def silu(a, FAST: tl.constexpr):
    if FAST:                                                            # one special-function instruction, NVIDIA only
        half = 0.5 * a
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [half], tl.float32, is_pure=True, pack=1)
        return half * tanh + half
    else:
        return a / (1 + tl.exp(-a))


@jit()
def normal_tile(k0, k1, rows, step, D: tl.constexpr, BN: tl.constexpr):
    """[BN, 16] normals, zero from column D on."""
    zero = tl.zeros((BN, 4), tl.uint32)
    row = rows[:, None].to(tl.uint32) + zero                            # [BN, 4]: a group of four columns each
    group = tl.arange(0, 4)[None, :].to(tl.uint32) + zero
    w0, w1, w2, w3 = rng.philox_words(k0, k1, row, step.to(tl.uint32) + zero, group, zero)
    z0, z1 = rng.box_muller_pair(w0, w1)
    if D > 2:
        z2, z3 = rng.box_muller_pair(w2, w3)
    else:
        z2, z3 = z0 * 0, z0 * 0
    z = tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape(BN, 16)       # [BN, 4, 2, 2]: column 4 group + 2 i + j
    return tl.where(tl.arange(0, 16)[None, :] < D, z, 0.0)


@jit(do_not_specialize=["n", "steps", "first", "k0", "k1", "reload"])
def chain_kernel(x_ptr, w_in_ptr, w_hidden_ptr, w_out_ptr, b_out_ptr, biases_ptr, table_ptr, out_ptr,
                 n, steps, first, k0, k1, reload,
                 D: tl.constexpr, H: tl.constexpr, L: tl.constexpr, BN: tl.constexpr,
                 NOISE: tl.constexpr, FAST: tl.constexpr, RELOAD: tl.constexpr):
    """One program: BN rows through all steps. w_hidden and w_out fp16 (or fp32, then every product is fp32).

    `reload` is 0 at run time and unknown to the compiler: times the step, it keeps the weights from being held for the
    whole loop, where they do not fit (RELOAD); they are then read again each step, from L2.
    """
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)        # [BN]
    cols = tl.arange(0, 16)                                             # [16], D of them real
    hid = tl.arange(0, H)                                               # [H]
    here = (rows < n)[:, None] & (cols < D)[None, :]
    at = rows[:, None] * D + cols[None, :]
    x = tl.load(x_ptr + at, mask=here, other=0.0)                       # [BN, 16] fp32
    half = w_hidden_ptr.dtype.element_ty
    w = tl.load(w_in_ptr + hid[None, :] * D + cols[:, None], mask=(cols < D)[:, None], other=0.0)
    w_hi = w.to(half)                                                   # [16, H]
    w_lo = (w - w_hi.to(tl.float32)).to(half)
    w_out = tl.load(w_out_ptr + cols[None, :] * H + hid[:, None], mask=(cols < D)[None, :], other=0.0)  # [H, 16]
    b_out = tl.load(b_out_ptr + cols, mask=cols < D, other=0.0)         # [16]
    square = hid[None, :] * H + hid[:, None]                            # [H, H] of W^T
    hidden = ()
    if not RELOAD:
        for l in tl.static_range(L):
            hidden = hidden + (tl.load(w_hidden_ptr + l * H * H + square),)     # L x [H, H] in shared memory
    for s in range(steps):
        bias_ptr = biases_ptr + tl.cast(s, tl.int64) * ((L + 1) * H) + hid
        a = tl.load(bias_ptr)[None, :] + tl.zeros((BN, H), tl.float32)  # [BN, H]: the bias starts the accumulator
        if half == tl.float32:
            a = tl.dot(x, w, acc=a, input_precision="ieee")
        else:
            x_hi = x.to(half)                                           # 22 bits of x and w_in in two parts each
            x_lo = (x - x_hi.to(tl.float32)).to(half)
            a = tl.dot(x_hi, w_hi, acc=a)
            a = tl.dot(x_lo, w_hi, acc=a)
            a = tl.dot(x_hi, w_lo, acc=a)
        h = silu(a, FAST)                                               # [BN, H] fp32, in registers from here on
        for l in tl.static_range(L):
            if RELOAD:
                W = tl.load(w_hidden_ptr + l * H * H + s * reload + square)
            else:
                W = hidden[l]
            a = tl.load(bias_ptr + (l + 1) * H)[None, :] + tl.zeros((BN, H), tl.float32)
            h += silu(tl.dot(h.to(half), W, acc=a, input_precision="ieee"), FAST)
        f = tl.dot(h.to(half), w_out, acc=b_out[None, :] + tl.zeros((BN, 16), tl.float32), input_precision="ieee")
        row_ptr = table_ptr + tl.cast(s, tl.int64) * 3
        x = tl.load(row_ptr) * x + tl.load(row_ptr + 1) * f
        if NOISE:
            x += tl.load(row_ptr + 2) * normal_tile(k0, k1, rows, first + s, D, BN)
    tl.store(out_ptr + at, x, mask=here)


@jit(do_not_specialize=["step", "k0", "k1"])                             # n a multiple of 16: 16-byte accesses
def step_kernel(x_ptr, out_ptr, new_ptr, n, step, k0, k1, P, Q, A, B, C, clip,
                CLIP: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK groups of four elements of flattened tensors."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]            # [BLOCK, 1]
    at = group * 4 + tl.arange(0, 4)[None, :]                           # [BLOCK, 4]
    here = at < n
    x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
    x_0 = P * x + Q * tl.load(out_ptr + at, mask=here, other=0.0).to(tl.float32)
    if CLIP:
        x_0 = tl.minimum(tl.maximum(x_0, -clip), clip)
    x = A * x_0 + B * x
    if NOISE:
        row = group.to(tl.uint32)
        zero = row * 0
        z0, z1, z2, z3 = rng.philox_normal4(k0, k1, row, zero + step.to(tl.uint32), zero, zero + 1)
        x += C * tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape(BLOCK, 4)
    tl.store(new_ptr + at, x, mask=here)


# ---- launchers: static tables, no autotune


def chain_config(H: int, L: int, shared: int, amd: bool) -> dict | None:
    """How to launch chain_kernel with `shared` bytes of shared memory a block to be had; None if it cannot be.

    BN is 16 rows a warp, for chained products are split over warps by rows alone. num_stages = 1: nothing but biases
    is left to prefetch. The weights take 2 L H^2 bytes, and the rest measured 14 kB at most (`kernels.compile`).
    """
    if H not in (16, 32, 64, 128) or L * H > 384:                       # more overflows sm_100's tensor memory in 3.6
        return None
    reload = 2 * L * H * H + 16_384 > shared or (amd and H > 64)
    if reload and 2 * H * H + 16_384 > shared:
        return None
    return dict(BN=64, RELOAD=reload, num_warps=4, num_stages=1)


def _config_for(x: Tensor, H: int, L: int) -> dict | None:
    if not x.is_cuda:
        return chain_config(H, L, 1 << 20, False)                       # interpreted
    device = torch.cuda.get_device_properties(x.device)
    shared = getattr(device, "shared_memory_per_block_optin", 0) or 65_536
    return chain_config(H, L, shared, AMD) if H >= 64 else None


def _chain_triton(x, w_in, w_hidden, w_out, b_out, biases, coefficients, seed, first, noise,
                  precision=torch.float16, fast=None, reload=None) -> Tensor:
    (N, D), H, L = x.shape, w_in.shape[0], len(w_hidden)
    x, w_in, b_out, biases, table = (t.contiguous() for t in (x, w_in, b_out, biases, coefficients))
    w_hidden, w_out = w_hidden.to(precision).contiguous(), w_out.to(precision).contiguous()
    out = torch.empty_like(x)
    config = _config_for(x, H, L)
    if reload is not None:
        config["RELOAD"] = reload
    fast = not (INTERPRET or AMD) if fast is None else fast
    if N:
        chain_kernel[(triton.cdiv(N, config["BN"]),)](
            x, w_in, w_hidden, w_out, b_out, biases, table, out,
            N, len(table), int32(first), int32(seed), int32(seed >> 32), 0,
            D=D, H=H, L=L, NOISE=noise == "philox", FAST=fast, enable_fp_fusion=True, **config)
    return out


def _step_triton(x, out, coefficients, seed, step, clip) -> Tensor:
    new = torch.empty_like(x)
    if n := x.numel():
        step_kernel[(triton.cdiv(n, 1024),)](
            x, out, new, n, int32(step), int32(seed), int32(seed >> 32), *map(float, coefficients), float(clip or 0),
            CLIP=clip is not None, NOISE=coefficients[4] != 0, BLOCK=256, num_warps=4, enable_fp_fusion=True)
    return new


# ---- public


def _check_chain(x, w_in, w_hidden, w_out, b_out, biases, coefficients, noise):
    if x.ndim != 2 or w_in.ndim != 2 or biases.ndim != 3:
        raise ValueError(f"x (N, D), w_in (H, D) and biases (S, L + 1, H) are wanted; got {tuple(x.shape)}, "
                         f"{tuple(w_in.shape)}, {tuple(biases.shape)}")
    (N, D), (H, _), S, L = x.shape, w_in.shape, len(biases), biases.shape[1] - 1
    want = dict(w_in=(H, D), w_hidden=(L, H, H), w_out=(D, H), b_out=(D,), biases=(S, L + 1, H), coefficients=(S, 3))
    have = dict(w_in=w_in, w_hidden=w_hidden, w_out=w_out, b_out=b_out, biases=biases, coefficients=coefficients)
    for name, shape in want.items():
        if tuple(have[name].shape) != shape:
            raise ValueError(f"{name} must be {shape} for x {(N, D)}, {H} units and {L} hidden layers; "
                             f"got {tuple(have[name].shape)}")
    if noise not in ("philox", "none"):
        raise ValueError(f"noise={noise!r}: it is 'philox' or 'none'")


def sample_chain(x, w_in, w_hidden, w_out, b_out, biases, coefficients, seed, first=0, noise="philox") -> Tensor:
    """The samples after S steps, float32 (N, D), from x (N, D); `seed`: an integer of up to 64 bits.

    `first` is the number of the first step in the noise stream: a chain cut in two, the second with first + S_1, equals
    the whole chain exactly. noise="none" leaves the last term out. No gradients: call it under torch.no_grad().
    """
    tensors = (x, w_in, w_hidden, w_out, b_out, biases, coefficients)
    refuse_gradients("sample_chain", *tensors)
    _check_chain(*tensors, noise)
    x, w_in, w_hidden, w_out, b_out, biases, table = (t.detach().float().to(x.device) for t in tensors)
    H, D = w_in.shape
    why_not = ""
    if not 1 <= D <= 16:
        why_not = f"D = {D}, and the kernel takes 1 to 16"
    elif _config_for(x, H, len(w_hidden)) is None:
        why_not = f"H = {H}, L = {len(w_hidden)}, and the kernel takes H = 64 or 128 with L H <= 384"
    if backend(x, why_not) == "triton":
        return _chain_triton(x, w_in, w_hidden, w_out, b_out, biases, table, seed, first, noise)
    if noise == "none":
        table = table * table.new_tensor([1.0, 1.0, 0.0])
    return _chain_torch(x, w_in, w_hidden, w_out, b_out, biases, table, seed, first)


def diffusion_step(x, out, coefficients, seed, step, clip=None) -> Tensor:
    """One update with [P, Q, A, B, C] = `coefficients` (numbers), the shape and dtype of x; noise of step `step`."""
    refuse_gradients("diffusion_step", x, out)
    if x.shape != out.shape:
        raise ValueError(f"x {tuple(x.shape)} and out {tuple(out.shape)} must have one shape")
    coefficients = tuple(map(float, coefficients))
    if len(coefficients) != 5:
        raise ValueError(f"coefficients are P, Q, A, B, C; got {len(coefficients)} numbers")
    if backend(x, "" if x.is_floating_point() and x.dtype != torch.float64 else f"{x.dtype}") == "triton":
        return _step_triton(x.contiguous(), out.contiguous(), coefficients, seed, step, clip)
    return _step_torch(x, out, coefficients, seed, step, clip)
