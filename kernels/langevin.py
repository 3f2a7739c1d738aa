"""A whole Langevin chain of an MLP energy in one launch, and one fused update for the energies of images.

`langevin_chain`: S steps under the energy of a classifier's logits, its gradient derived by hand,

    phi = [x, sin(x F + phase)];   h_0 = silu(phi W_in^T + b_in);   h_l = silu(h_{l-1} W_l^T + b_l), l = 1..L
    f = h_L W_out^T + b_out;   E(x) = base |x|^2 / 2 - log sum_y exp f_y,   or - f_y for a chain of the class y >= 0
    dE/dh_L = - softmax(f) W_out,   g_l = silu'(a_l) dE/dh_l,   dE/dh_{l-1} = g_l W_l,   ..., down to phi and x
    x <- clamp(x - A_s clip(dE/dx, -c, c) + B_s z, -bound, bound),       z ~ N(0, I): rng.normal at step first + s

One logit is an energy without classes. A = step, B = sqrt(2 step T) is Langevin dynamics at temperature T; a table
(S, 2) of [A, B] anneals either; `clip` makes a step proximal. Shapes: x (N, D), frequencies F (D, E), phases (E,),
w_in (H, D + E), b_in (H,), w_hidden (L, H, H), b_hidden (L, H), w_out (C, H), b_out (C,), y (N,) int64 or None.

What it saves. An eager step runs the network, records it, walks it back and updates: some 60 launches, and a hidden
activation goes through memory a dozen times. The kernel is one launch for all steps: the weights in shared memory (W,
for the way back a view of the same copy), x, activations and slopes in registers. Products take fp16 operands and fp32
accumulators; x and phi stay fp32, phi enters the first layer as a sum of two fp16 parts. On a CPU a tile of rows goes
through all steps in preallocated buffers with no autograd graph: silu's slope is read from what silu was applied to.

`langevin_step`: x <- clamp(x - A clip(g) + B z) for the gradient g of a convolutional energy: 12 bytes an fp32 element
(eager: 8 to 12 an operation). That network's two passes take most of such a step: this saves the rest alone.

Limits. No gradients through a chain. The kernel: H = 64 or 128 (16 and 32 too when interpreted), D = 1..4, D + E <= 16,
C <= 16, L H <= 256, activations within fp16's 65504. The CPU path takes any size and the dtype of x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import diffusion, rng
from ._runtime import AMD, INTERPRET, backend, in_tiles, int32, jit, refuse_gradients, tl, triton

NAMES = ("frequencies", "phases", "w_in", "b_in", "w_hidden", "b_hidden", "w_out", "b_out")

# ---- definitions


def energy_reference(x, network, y=None, base=0.0) -> Tensor:
    """E (N,) of the docstring, in any dtype, for autograd."""
    frequencies, phases, w_in, b_in, w_hidden, b_hidden, w_out, b_out = network
    h = F.silu(torch.cat([x, torch.sin(x @ frequencies + phases)], 1) @ w_in.T + b_in)
    for w, b in zip(w_hidden, b_hidden):
        h = F.silu(h @ w.T + b)
    f = h @ w_out.T + b_out
    value = f.logsumexp(1)
    if y is not None:
        value = torch.where(y >= 0, f.gather(1, y.clamp(min=0)[:, None])[:, 0], value)
    return base / 2 * x.square().sum(1) - value


def langevin_chain_reference(x, network, coefficients, seed, y=None, first=0, base=0.0, clip=None, bound=None):
    """The definition, in any dtype, by autograd. The noise is rng's float32 stream, cast."""
    for s, (A, B) in enumerate(coefficients.tolist()):
        with torch.enable_grad():
            here = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(energy_reference(here, [w.detach() for w in network], y, base).sum(), here)
        g = g if clip is None else g.clamp(-clip, clip)
        x = x - A * g + B * rng.normal(*x.shape, seed, first + s, device=x.device).to(x.dtype)
        x = x if bound is None else x.clamp(-bound, bound)
    return x


def langevin_step_reference(x, g, A, B, seed, step, clip=None, bound=None) -> Tensor:
    """The definition, in any dtype. Element i of the flattened x takes normal [i // 4, i % 4] of stream rng.STEP."""
    g = g if clip is None else g.clamp(-clip, clip)
    z = rng.normal((x.numel() + 3) // 4, 4, seed, step, rng.STEP, x.device).flatten()[: x.numel()].view(x.shape)
    x = x - A * g + B * z.to(x.dtype)
    return x if bound is None else x.clamp(-bound, bound)


# ---- CPU: a tile of rows through all steps, one tile a thread


def _chain_tile(x, row, network, y, table, seed, first, base, clip, bound, stop):
    """x (R, D) in place; y (R,) or None."""
    frequencies, phases, w_in, b_in, w_hidden, b_hidden, w_out, b_out = network
    (R, D), H, L, E = x.shape, len(b_in), len(w_hidden), len(phases)
    rows = torch.arange(row, row + R, device=x.device)
    both, phases = frequencies.repeat(1, 2), torch.cat([phases, phases + torch.pi / 2])     # a cosine is a sine
    angle, g_waves, g_x = x.new_empty(R, 2 * E), x.new_empty(R, E), torch.empty_like(x)
    sin, cos = angle.chunk(2, 1)
    a, h, g = x.new_empty(L + 1, R, H).unbind(), x.new_empty(R, H), x.new_empty(R, H)
    w_x, w_waves, back = w_in[:, :D], w_in[:, D:], w_hidden.unbind()
    forward, down = list(zip(b_hidden.unbind(), w_hidden.mT.unbind(), a[1:])), list(zip(a[1:], back))[::-1]
    x_in, waves_in, waves_out = w_x.T, w_waves.T, frequencies.T
    chosen = -w_out.expand(R, H) if len(w_out) == 1 else None if y is None else -w_out[y.clamp(min=0)]
    free = chosen is None or len(w_out) > 1 and y is not None and bool((y < 0).any())       # dE/dh_L changes with x
    block = max(1, 32768 // (R * ((D + 3) // 4)))                       # the generator's words stay in L2
    silu, slope = torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input
    for start in range(0, len(table), block):
        part, z = table[start : start + block], [None] * block
        if any(B for _, B in part):
            steps = torch.arange(first + start, first + start + len(part), device=x.device).bitwise_and_(rng.MASK)
            z = rng.normal_block(rows, D, steps, seed).unbind()
        for (A, B), noise in zip(part, z):
            torch.addmm(phases, x, both, out=angle).sin_()
            torch.addmm(b_in, sin, waves_in, out=a[0]).addmm_(x, x_in)
            silu(a[0], out=h)
            for b, w, out in forward:
                torch.addmm(b, h, w, out=out)
                silu(out, out=h)
            g_h = torch.addmm(b_out, h, w_out.T).softmax(1).neg_() @ w_out if free else chosen
            if free and chosen is not None:
                g_h = torch.where((y < 0)[:, None], g_h, chosen)
            for out, w in down:
                slope(g_h, out, grad_input=g)
                g_h = torch.mm(g, w, out=h)
            slope(g_h, a[0], grad_input=g)
            torch.mm(g, w_waves, out=g_waves).mul_(cos)
            torch.addmm(x, g, w_x, beta=base, out=g_x).addmm_(g_waves, waves_out)
            if clip is not None:
                g_x.clamp_(-clip, clip)
            x.sub_(g_x, alpha=A)
            if B:
                x.add_(noise, alpha=B)
            if bound is not None:
                x.clamp_(-bound, bound)
        if stop.is_set():
            return


def _chain_torch(x, network, coefficients, seed, y, first, base, clip, bound) -> Tensor:
    out, table = x.clone(memory_format=torch.contiguous_format), coefficients.tolist()

    def work(row, part, stop):
        labels = None if y is None else y[row : row + len(part)]
        _chain_tile(part, row, network, labels, table, seed, first, base, clip, bound, stop)

    in_tiles(work, out, max(64, 65536 // len(network[3])))              # five buffers of 0.25 MB: a core's L2
    return out


def _step_torch(x, g, A, B, seed, step, clip, bound) -> Tensor:
    new = diffusion._step_torch(x, g, (0.0, 1.0, -A, 1.0, B), seed, step, clip)    # g is its x_0
    return new if bound is None else new.clamp_(-bound, bound)


# ---- Triton


@jit()
def sigmoid(a, FAST: tl.constexpr):
    if FAST:                                                            # one special-function instruction, NVIDIA only
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * a], tl.float32, is_pure=True, pack=1)
        return 0.5 * tanh + 0.5
    else:
        return 1 / (1 + tl.exp(-a))


@jit()
def sine_cosine(a):
    """Of any |a| < 1e4 to 1e-6, without libdevice's branch for huge arguments: a = n pi + r, then Taylor to 1e-8."""
    n = tl.floor(a * 0.3183098861837907 + 0.5)
    r = (a - n * 3.140625) - n * 9.676535897932e-4                      # pi in two parts: n times the first is exact
    s = r * r
    sin = r + r * s * (-1.6666667e-1 + s * (8.3333333e-3 + s * (-1.9841270e-4 + s * (2.7557319e-6 - s * 2.4767479e-8))))
    cos = 2.4801587e-5 + s * (-2.7557319e-7 + s * 2.0437326e-9)
    cos = 1 + s * (-0.5 + s * (4.1666667e-2 + s * (-1.3888889e-3 + s * cos)))
    odd = (n.to(tl.int32) & 1) == 1
    return tl.where(odd, -sin, sin), tl.where(odd, -cos, cos)


@jit(do_not_specialize=["n", "steps", "first", "k0", "k1", "reload"])
def langevin_kernel(x_ptr, y_ptr, waves_ptr, phases_ptr, w_in_ptr, b_in_ptr, w_hidden_ptr, b_hidden_ptr, w_out_ptr,
                    b_out_ptr, table_ptr, out_ptr, n, steps, first, k0, k1, reload, base, clip, bound,
                    D: tl.constexpr, H: tl.constexpr, L: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
                    LABELS: tl.constexpr, CLIP: tl.constexpr, BOUND: tl.constexpr, NOISE: tl.constexpr,
                    FAST: tl.constexpr, RELOAD: tl.constexpr):
    """One program: BN chains through all steps. w_hidden and w_out fp16 (or fp32, then every product is fp32).

    Padded to 16: waves (D, 16), its first D columns the identity and then F; phases (16,); w_in (H, 16); w_out (16, H)
    and b_out (16,), -inf from C on. `reload` is 0 at run time: see diffusion.chain_kernel.
    """
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)        # [BN]
    cols = tl.arange(0, 16)                                             # [16]
    hid = tl.arange(0, H)                                               # [H]
    here = (rows < n)[:, None] & (cols < D)[None, :]
    at = rows[:, None] * D + cols[None, :]
    x = tl.load(x_ptr + at, mask=here, other=0.0)                       # [BN, 16] fp32, zero from column D on
    half = w_hidden_ptr.dtype.element_ty
    w = tl.load(w_in_ptr + hid[None, :] * 16 + cols[:, None])           # [16, H] fp32
    w_hi = w.to(half)
    w_lo = (w - w_hi.to(tl.float32)).to(half)
    w_out = tl.load(w_out_ptr + cols[:, None] * H + hid[None, :])       # [16, H]
    phases = tl.load(phases_ptr + cols)                                 # [16]
    if LABELS:
        y = tl.load(y_ptr + rows, mask=rows < n, other=0).to(tl.int32)  # [BN]
    square = hid[None, :] * H + hid[:, None]                            # [H, H] of W^T
    hidden = ()
    if not RELOAD:
        for l in tl.static_range(L):
            hidden = hidden + (tl.load(w_hidden_ptr + l * H * H + square),)     # L x [H, H] in shared memory
    for s in range(steps):
        angle = phases[None, :] + tl.zeros((BN, 16), tl.float32)
        for d in tl.static_range(D):
            x_d = tl.sum(tl.where(cols[None, :] == d, x, 0.0), 1)       # [BN]
            angle += x_d[:, None] * tl.load(waves_ptr + d * 16 + cols)[None, :]
        sin, cos = sine_cosine(angle)
        phi = tl.where(cols[None, :] < D, x, sin)                       # [BN, 16]
        a = tl.load(b_in_ptr + s * reload + hid)[None, :] + tl.zeros((BN, H), tl.float32)
        if half == tl.float32:
            a = tl.dot(phi, w, acc=a, input_precision="ieee")
        else:
            phi_hi = phi.to(half)
            phi_lo = (phi - phi_hi.to(tl.float32)).to(half)
            a = tl.dot(phi_hi, w_hi, acc=a)
            a = tl.dot(phi_lo, w_hi, acc=a)
            a = tl.dot(phi_hi, w_lo, acc=a)
        up = sigmoid(a, FAST)
        h = a * up                                                      # silu, and below its slope s + h (1 - s)
        slopes = ((up + h * (1 - up)).to(half),)                        # L + 1 tiles [BN, H]
        for l in tl.static_range(L):
            if RELOAD:
                W = tl.load(w_hidden_ptr + l * H * H + s * reload + square)
            else:
                W = hidden[l]
            a = tl.load(b_hidden_ptr + l * H + s * reload + hid)[None, :] + tl.zeros((BN, H), tl.float32)
            a = tl.dot(h.to(half), W, acc=a, input_precision="ieee")
            up = sigmoid(a, FAST)
            h = a * up
            slopes = slopes + ((up + h * (1 - up)).to(half),)
        if C == 1:
            g = tl.zeros((BN, H), tl.float32) - tl.load(w_out_ptr + s * reload + hid).to(tl.float32)[None, :]
        else:
            f = tl.dot(h.to(half), tl.trans(w_out), input_precision="ieee") + tl.load(b_out_ptr + cols)[None, :]
            p = tl.exp(f - tl.max(f, 1)[:, None])                       # [BN, 16]
            p = p / tl.sum(p, 1)[:, None]
            if LABELS:
                p = tl.where(y[:, None] < 0, p, tl.where(cols[None, :] == y[:, None], 1.0, 0.0))
            g = tl.dot((-p).to(half), w_out, input_precision="ieee")    # dE/dh_L
        for k in tl.static_range(L):
            if RELOAD:
                W = tl.load(w_hidden_ptr + (L - 1 - k) * H * H + s * reload + square)
            else:
                W = hidden[L - 1 - k]
            g = tl.dot((g * slopes[L - k].to(tl.float32)).to(half), tl.trans(W), input_precision="ieee")
        g = g * slopes[0].to(tl.float32)
        if half == tl.float32:
            g_phi = tl.dot(g, tl.trans(w), input_precision="ieee")      # [BN, 16]
        else:
            g_phi = tl.dot(g.to(half), tl.trans(w_hi))
        g_phi = tl.where(cols[None, :] < D, g_phi, g_phi * cos)
        g_x = base * x
        for d in tl.static_range(D):
            g_d = tl.sum(g_phi * tl.load(waves_ptr + d * 16 + cols)[None, :], 1)
            g_x += tl.where(cols[None, :] == d, g_d[:, None], 0.0)
        if CLIP:
            g_x = tl.minimum(tl.maximum(g_x, -clip), clip)
        x -= tl.load(table_ptr + tl.cast(s, tl.int64) * 2) * g_x
        if NOISE:
            noise = tl.load(table_ptr + tl.cast(s, tl.int64) * 2 + 1)
            x += noise * diffusion.normal_tile(k0, k1, rows, first + s, D, BN)
        if BOUND:
            x = tl.minimum(tl.maximum(x, -bound), bound)
    tl.store(out_ptr + at, x, mask=here)


@jit(do_not_specialize=["step", "k0", "k1"])                             # n a multiple of 16: 16-byte accesses
def update_kernel(x_ptr, g_ptr, new_ptr, n, step, k0, k1, A, B, clip, bound,
                  CLIP: tl.constexpr, BOUND: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK groups of four elements of flattened tensors."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]            # [BLOCK, 1]
    at = group * 4 + tl.arange(0, 4)[None, :]                           # [BLOCK, 4]
    here = at < n
    g = tl.load(g_ptr + at, mask=here, other=0.0).to(tl.float32)
    if CLIP:
        g = tl.minimum(tl.maximum(g, -clip), clip)
    x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32) - A * g
    if NOISE:
        row = group.to(tl.uint32)
        zero = row * 0
        z0, z1, z2, z3 = rng.philox_normal4(k0, k1, row, zero + step.to(tl.uint32), zero, zero + 1)
        x += B * tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape(BLOCK, 4)
    if BOUND:
        x = tl.minimum(tl.maximum(x, -bound), bound)
    tl.store(new_ptr + at, x, mask=here)


# ---- launchers: static tables, no autotune


def langevin_config(H: int, L: int, shared: int, amd: bool, blackwell: bool = False) -> dict | None:
    """How to launch langevin_kernel with `shared` bytes of shared memory a block to be had; None if it cannot be."""
    if H not in (16, 32, 64, 128) or L * H > 256:
        return None
    layer = 2 * H * H * (1 if amd or shared > 200_000 else 2)           # before sm_90 W^T is a copy
    reload = L * layer + 24_576 > shared or (amd and H > 64)
    if reload and layer + 24_576 > shared:
        return None
    narrow = blackwell and H == 128                                     # 64 rows overfill tensor memory in Triton 3.6
    return dict(BN=32 if narrow else 64, RELOAD=reload, num_warps=4, num_stages=1)


def _config_for(x: Tensor, H: int, L: int) -> dict | None:
    if not x.is_cuda:
        return langevin_config(H, L, 1 << 20, False)                    # interpreted
    device = torch.cuda.get_device_properties(x.device)
    shared = getattr(device, "shared_memory_per_block_optin", 0) or 65_536
    return langevin_config(H, L, shared, AMD, not AMD and device.major >= 10) if H >= 64 else None


def _padded(tensor: Tensor, *shape: int, value: float = 0.0) -> Tensor:
    out = tensor.new_full(shape, value)
    out[tuple(slice(n) for n in tensor.shape)] = tensor
    return out


def _chain_triton(x, network, coefficients, seed, y, first, base, clip, bound, noise=True,
                  precision=torch.float16, fast=None, reload=None) -> Tensor:
    frequencies, phases, w_in, b_in, w_hidden, b_hidden, w_out, b_out = (w.detach().float() for w in network)
    (N, D), H, L, C = x.shape, len(b_in), len(w_hidden), len(w_out)
    waves = _padded(torch.cat([torch.eye(D).to(frequencies), frequencies], 1), D, 16)
    phases = _padded(torch.cat([phases.new_zeros(D), phases]), 16)
    weights = _padded(w_in, H, 16), b_in.contiguous(), w_hidden.to(precision).contiguous(), b_hidden.contiguous()
    last = _padded(w_out, 16, H).to(precision), _padded(b_out, 16, value=-torch.inf)
    table, labels = coefficients.float().to(x.device).contiguous(), x if y is None else y.contiguous()
    out, config = torch.empty_like(x := x.contiguous()), _config_for(x, H, L)
    if reload is not None:
        config["RELOAD"] = reload
    fast = not (INTERPRET or AMD) if fast is None else fast
    if N:
        langevin_kernel[(triton.cdiv(N, config["BN"]),)](
            x, labels, waves, phases, *weights, *last, table, out,
            N, len(table), int32(first), int32(seed), int32(seed >> 32), 0, float(base), float(clip or 0),
            float(bound or 0), D=D, H=H, L=L, C=C, LABELS=y is not None, CLIP=clip is not None, BOUND=bound is not None,
            NOISE=noise, FAST=fast, enable_fp_fusion=True, **config)
    return out


def _step_triton(x, g, A, B, seed, step, clip, bound) -> Tensor:
    new = torch.empty_like(x)
    if n := x.numel():
        update_kernel[(triton.cdiv(n, 1024),)](
            x, g, new, n, int32(step), int32(seed), int32(seed >> 32), A, B, float(clip or 0), float(bound or 0),
            CLIP=clip is not None, BOUND=bound is not None, NOISE=B != 0, BLOCK=256, num_warps=4, enable_fp_fusion=True)
    return new


# ---- public


def _check_chain(x, network, coefficients, y):
    if x.ndim != 2 or len(network) != 8 or any(network[i].ndim != 2 for i in (0, 2, 6)):
        raise ValueError(f"x (N, D) and a network of {', '.join(NAMES)} are wanted; got x {tuple(x.shape)} and "
                         f"{[tuple(w.shape) for w in network]}")
    (N, D), E, H, L, C = x.shape, network[0].shape[1], network[2].shape[0], len(network[4]), network[6].shape[0]
    want = ((D, E), (E,), (H, D + E), (H,), (L, H, H), (L, H), (C, H), (C,), (len(coefficients), 2), (N,))
    have = (*network, coefficients, x[:, 0] if y is None else y)
    for name, shape, tensor in zip((*NAMES, "coefficients", "y"), want, have):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} for x {(N, D)}, {E} waves, {H} units, {L} hidden layers and {C} "
                             f"logits; got {tuple(tensor.shape)}")
    if y is not None and N and not -1 <= int(y.min()) <= int(y.max()) < C:
        raise ValueError(f"classes are 0 .. {C - 1}, or -1 for the sum; got {int(y.min())} .. {int(y.max())}")


def langevin_chain(x, network, coefficients, seed, y=None, first=0, base=0.0, clip=None, bound=None) -> Tensor:
    """x (N, D) after S steps, from x; `network`: the eight tensors of NAMES; `seed`: an integer of up to 64 bits.

    `first` is the number of the first step in the noise stream: a chain cut in two, the second with first + S_1, equals
    the whole chain exactly. No gradients: call it under torch.no_grad(). On the CPU in the dtype of x."""
    refuse_gradients("langevin_chain", x, *network, coefficients)
    _check_chain(x, network, coefficients, y)
    (D, E), H, L, C, why_not = network[0].shape, len(network[3]), len(network[4]), len(network[7]), ""
    if not (1 <= D <= 4 and D + E <= 16 and C <= 16 and x.dtype == torch.float32):
        why_not = f"D = {D}, E = {E}, C = {C}, {x.dtype}; the kernel takes D <= 4, D + E <= 16, C <= 16 and float32"
    elif _config_for(x, H, L) is None:
        why_not = f"H = {H}, L = {L}, and the kernel takes H = 64 or 128 with L H <= 256"
    if backend(x, why_not) == "triton":
        return _chain_triton(x, network, coefficients, seed, y, first, base, clip, bound)
    return _chain_torch(x, network, coefficients, seed, y, first, base, clip, bound)


def langevin_step(x, g, A, B, seed, step, clip=None, bound=None) -> Tensor:
    """clamp(x - A clip(g) + B z), in the shape and dtype of x; noise of step `step`. No gradients."""
    refuse_gradients("langevin_step", x, g)
    if x.shape != g.shape:
        raise ValueError(f"x {tuple(x.shape)} and g {tuple(g.shape)} must have one shape")
    if backend(x, "" if x.is_floating_point() and x.dtype != torch.float64 else f"{x.dtype}") == "triton":
        return _step_triton(x.contiguous(), g.contiguous(), float(A), float(B), seed, step, clip, bound)
    return _step_torch(x, g, float(A), float(B), seed, step, clip, bound)
