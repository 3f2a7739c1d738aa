"""Causal attention and decoding against their definitions in float64: the PyTorch path, and the kernels in Triton's
interpreter. Behind each `def`: a line that must not break."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import DEVICE, GPU, ROOT, alone, close, has_compiler, needs_gpu, needs_triton

import kernels
from kernels import attention
from kernels.attention import causal_attention_reference, decode_attention_reference

PATHS = ["torch", pytest.param("triton", marks=needs_triton)]
seeds = st.integers(0, 2**32)


def draw(B, H, S, T, D, seed=0, dtype=torch.float32, device=DEVICE):
    """q, k, v as c_attn leaves them: views of one tensor, no stride of which is the contiguous one."""
    g = torch.Generator().manual_seed(seed)
    whole = 1.5 * torch.randn(B, T, 3, H, D, generator=g, dtype=torch.float64)
    q, k, v = whole.to(dtype).to(device).permute(2, 0, 3, 1, 4)
    return q[:, :, T - S :], k, v


def cache(B, H, T, D, seed=0, dtype=torch.float32, device=DEVICE):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).to(device)
    return rand(B, H, D), rand(B, H, D, T), rand(B, H, T, D)


def on(path, monkeypatch):
    monkeypatch.setenv("KERNELS", path)


def gradients(function, tensors, weight):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    o = function(*tensors)
    return o.detach(), torch.autograd.grad((o * weight.to(o)).sum(), tensors)


# ---- the definitions


@given(st.integers(1, 6), st.integers(0, 4), seeds)
@settings(max_examples=10)
def test_kernel_attention_reference_is_the_definition(S, past, seed):  # triu(T - S); sqrt(D) left out
    q, k, v = (t[0, 0] for t in draw(1, 1, S, S + past, 3, seed, torch.float64, "cpu"))
    for i in range(S):
        p = torch.stack([(q[i] @ k[j] / 3**0.5).exp() for j in range(i + past + 1)])
        o = sum(p[j] * v[j] for j in range(i + past + 1)) / p.sum()
        torch.testing.assert_close(causal_attention_reference(q[None, None], k[None, None], v[None, None])[0, 0, i], o)


@given(st.integers(1, 6), st.integers(0, 4), seeds)
@settings(max_examples=10)
def test_kernel_decode_reference_is_the_last_row(length, rest, seed):  # length - 1; k not transposed
    q, k, v = draw(2, 3, length, length, 4, seed, torch.float64, "cpu")
    pad = torch.nn.functional.pad
    last = decode_attention_reference(q[:, :, -1], pad(k, (0, 0, 0, rest), value=9.0).mT, pad(v, (0, 0, 0, rest)), length)
    torch.testing.assert_close(last, causal_attention_reference(q, k, v)[:, :, -1])


# ---- equality


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("S, T, D", [(1, 1, 16), (33, 33, 32), (130, 130, 64), (65, 131, 20), (1, 70, 128), (70, 96, 33)])
def test_kernel_attention_equals_the_reference(path, S, T, D, monkeypatch):
    """no `past`; a mask short by one; `clear` a tile later; delta left out; dk not over sqrt(D)"""
    on(path, monkeypatch)
    q, k, v = draw(2, 2, S, T, D)
    weight = torch.randn(2, 2, S, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    o, grads = gradients(kernels.causal_attention, (q, k, v), weight)
    exact, truth = gradients(causal_attention_reference, [t.double() for t in (q, k, v)], weight)
    close(o, exact, 3e-3 if GPU else 2e-6)
    for mine, wanted in zip(grads, truth):
        close(mine, wanted, 5e-3 if GPU else 5e-6)


@needs_triton
@given(st.integers(1, 140), st.integers(0, 70), st.sampled_from([16, 24, 64]), seeds)
@settings(max_examples=10)
def test_kernel_attention_at_any_size(S, past, D, seed):                # "T" for "S" in a mask; `start` of keys_kernel
    q, k, v = draw(1, 2, S, S + past, D, seed)
    weight = torch.ones(1, 2, S, D, dtype=torch.float64, device=DEVICE)
    o, grads = gradients(attention.CausalAttention.apply, (q, k, v), weight)
    exact, truth = gradients(causal_attention_reference, [t.double() for t in (q, k, v)], weight)
    for mine, wanted in zip((o, *grads), (exact, *truth)):
        close(mine, wanted, 5e-3 if GPU else 5e-6)


@needs_triton
@pytest.mark.parametrize("which", ["forward", "keys", "queries"])
@pytest.mark.parametrize("BM, BN", [(16, 64), (64, 16)])
def test_kernel_attention_in_other_tiles_is_the_same(which, BM, BN, monkeypatch):      # `clear` counted in the other tile
    config = attention.attention_config
    tile = lambda name, *rest: config(name, *rest) | (dict(BM=BM, BN=BN) if name == which else {})
    q, k, v = draw(1, 2, 70, 100, 16)
    weight = torch.ones(1, 2, 70, 16, dtype=torch.float64, device=DEVICE)
    usual = gradients(attention.CausalAttention.apply, (q, k, v), weight)
    monkeypatch.setattr(attention, "attention_config", tile)
    other = gradients(attention.CausalAttention.apply, (q, k, v), weight)
    for a, b in zip((usual[0], *usual[1]), (other[0], *other[1])):
        close(a, b, 5e-3 if GPU else 5e-6)


@needs_triton
def test_kernel_attention_of_half_precision():                          # p in float16 summed in float16
    q, k, v = draw(1, 2, 90, 90, 32, dtype=torch.float16)
    weight = torch.ones(1, 2, 90, 32, device=DEVICE)
    o, grads = gradients(attention.CausalAttention.apply, (q, k, v), weight)
    exact, truth = gradients(causal_attention_reference, [t.double() for t in (q, k, v)], weight)
    assert o.dtype == torch.float16 and all(g.dtype == torch.float16 for g in grads)
    for mine, wanted in zip((o, *grads), (exact, *truth)):
        close(mine, wanted, 4e-3)


@pytest.mark.parametrize("path", PATHS)
@given(st.integers(1, 300), st.integers(0, 150), st.sampled_from([16, 32, 50, 128]), seeds)
@settings(max_examples=8)
def test_kernel_decode_equals_the_reference(path, length, rest, D, seed):
    """a split from 0; j <= length; weights of the merge without the maximum; T for SPAN"""
    q, k, v = cache(2, 2, length + rest, D, seed)
    exact = decode_attention_reference(q.double(), k.double(), v.double(), length)
    k[..., length:], v[:, :, length:] = torch.nan, torch.nan            # what is not filled is not read
    for span in (64, 128):
        o = attention._decode_torch(q, k, v, length) if path == "torch" else attention._decode_triton(q, k, v, length, span)
        close(o, exact, 2e-6)


@needs_triton
def test_kernel_decode_takes_its_length_from_the_device(monkeypatch):   # the int
    on("triton", monkeypatch)
    q, k, v = cache(1, 2, 200, 32)
    for n in (1, 128, 129, 200):
        length = torch.tensor([n], dtype=torch.int32, device=DEVICE)
        close(kernels.decode_attention(q, k, v, length), decode_attention_reference(q.double(), k.double(), v.double(), n), 2e-6)


@needs_triton
def test_kernel_attention_writes_all_of_its_output_and_no_more(guarded):           # the mask of a store
    q, k, v = draw(1, 2, 70, 101, 20)
    weight = torch.ones(1, 2, 70, 20, dtype=torch.float64, device=DEVICE)
    exact = gradients(causal_attention_reference, [t.double() for t in (q, k, v)], weight)
    guards = guarded(4000)
    o, grads = gradients(attention.CausalAttention.apply, (q, k, v), weight)
    for mine, wanted in zip((o, *grads), (exact[0], *exact[1])):
        close(mine, wanted, 5e-3 if GPU else 5e-6)
    assert len(guards) >= 5 and all((guard == -7).all() for guard in guards)


# ---- what must not be seen


@pytest.mark.parametrize("path", PATHS)
def test_kernel_attention_never_looks_ahead(path, monkeypatch):         # j < i + past + 2
    on(path, monkeypatch)
    q, k, v = draw(1, 1, 80, 80, 16)
    o = kernels.causal_attention(q, k, v)
    for t in (1, 31, 32, 63, 64, 79):
        k_2, v_2 = k.clone(), v.clone()
        k_2[:, :, t], v_2[:, :, t] = 50.0, 1e3
        other = kernels.causal_attention(q, k_2, v_2)
        assert torch.equal(other[:, :, :t], o[:, :, :t]) and not torch.equal(other[:, :, t], o[:, :, t])


@pytest.mark.parametrize("path", PATHS)
def test_kernel_attention_of_huge_scores_is_finite(path, monkeypatch):  # the running maximum left out
    on(path, monkeypatch)
    q, k, v = draw(1, 1, 70, 70, 16)
    o, grads = gradients(kernels.causal_attention, (60 * q, 60 * k, v), torch.ones(1, 1, 70, 16))
    assert o.isfinite().all() and all(g.isfinite().all() for g in grads)


# ---- dispatch and errors


@needs_triton
def test_kernel_attention_dispatch(monkeypatch):
    on("triton", monkeypatch)
    with pytest.raises(RuntimeError, match="torch.float64, and the kernel takes float32"):
        kernels.causal_attention(*draw(1, 1, 3, 3, 16, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="heads of 8, and the kernel takes 16 to 128"):
        kernels.causal_attention(*draw(1, 1, 3, 3, 8))
    monkeypatch.delenv("KERNELS")
    q, k, v = draw(1, 1, 3, 3, 8)
    close(kernels.causal_attention(q, k, v), causal_attention_reference(q.double(), k.double(), v.double()), 1e-5)


def test_kernel_attention_errors_say_what_was_wanted():
    q, k, v = draw(1, 2, 3, 5, 16)
    for bad in ((k, q, q), (q, k, v[:, :, 1:]), (q[:, :1], k, v), (q[0], k[0], v[0]), (q[:, :, :0], k, v)):
        with pytest.raises(ValueError, match="0 < S <= T are wanted"):
            kernels.causal_attention(*bad)
    q, k, v = cache(1, 2, 5, 16)
    for bad in ((q, k.mT, v), (q, k, v.mT), (q[..., 1:], k, v)):
        with pytest.raises(ValueError, match=r"k \(B, H, D, T\) and v \(B, H, T, D\) are wanted"):
            kernels.decode_attention(*bad, 2)
    with pytest.raises(RuntimeError, match="no gradient"):
        kernels.decode_attention(q.requires_grad_(), k, v, 2)


def test_kernel_attention_without_triton():
    done = alone("import sys; sys.modules['triton'] = None\n"
                 "import torch, kernels; x = torch.eye(3)[None, None]\n"
                 "assert kernels.causal_attention(x, x, x).shape == x.shape\n"
                 "assert kernels.decode_attention(x[:, :, 0], x, x, 2).shape == (1, 1, 3)")
    assert done.returncode == 0, done.stderr


# ---- machine code


@pytest.mark.skipif(not has_compiler(), reason="Triton, or its nvdisasm, is not here")
def test_kernel_attention_machine_code_is_within_limits_and_budget():   # BN = 256
    done = subprocess.run([sys.executable, "-m", "kernels.compile", "--targets", "sm_80", "sm_90", "--only", "attention D64"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- a GPU, where there is one


@needs_gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-3), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("T, D", [(784, 64), (785, 32), (1024, 128), (196, 16)])
def test_kernel_attention_on_the_gpu(T, D, dtype, tolerance):
    q, k, v = draw(2, 4, T, T, D, dtype=dtype)
    weight = torch.randn(2, 4, T, D, device="cuda", dtype=torch.float64)
    mine = gradients(kernels.causal_attention, (q, k, v), weight)
    truth = gradients(causal_attention_reference, [t.double() for t in (q, k, v)], weight)
    for a, b in zip((mine[0], *mine[1]), (truth[0], *truth[1])):
        close(a, b, tolerance)
    again = gradients(kernels.causal_attention, (q, k, v), weight)
    assert all(torch.equal(a, b) for a, b in zip((mine[0], *mine[1]), (again[0], *again[1])))


@needs_gpu
def test_kernel_decode_on_the_gpu_goes_into_a_cuda_graph():
    q, k, v = cache(8, 4, 784, 64, dtype=torch.bfloat16)
    length = torch.tensor([100], dtype=torch.int32, device="cuda")
    kernels.decode_attention(q, k, v, length)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.decode_attention(q, k, v, length)
    for n in (1, 100, 784):
        length.fill_(n)
        graph.replay()
        close(captured, decode_attention_reference(q.double(), k.double(), v.double(), n), 2e-2)
