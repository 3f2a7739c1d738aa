"""The wavefront sampler against its definition, pixel by pixel in float64: the PyTorch path, and the kernel in Triton's
interpreter. All take the noise of one generator, so pictures are equal to the bit. Behind each `def`: a line that must
not break."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import DEVICE, ROOT, alone, has_compiler, needs_gpu, needs_triton

import kernels
import pixels
from kernels import rng, wavefront
from kernels.wavefront import wavefront_sample_reference

PATHS = ["torch", pytest.param("triton", marks=needs_triton)]
BLOCK, ABOVE, RIGHT = pixels.block(4), pixels.block(2), ((0, 1), (1, 1), (1, 0), (1, -1))
FAR = ((0, 3), (2, -4), (3, 1))                                         # the slope of 3 of a parent two rows above
HEADS = [((), False), ((), True), ((3,), True), ((20, 5), True), ((20, 5), False)]


def draw(offsets, shape, hidden=(), places=False, seed=0, dtype=torch.float32, columns=1):
    """first, places, layers of a network that leaves nothing certain."""
    g, sizes = torch.Generator().manual_seed(seed), [*hidden, 1] if hidden else [columns]
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype)
    first = 1.5 * rand(2 ** len(offsets), sizes[0])
    layers = [(2 * rand(m, k) / k**0.5, rand(m)) for k, m in zip(sizes, sizes[1:])]
    return first, rand(math.prod(shape), sizes[0]) if places else None, layers


def on(network, device=DEVICE, dtype=torch.float32):
    first, places, layers = network
    to = lambda t: t.to(device, dtype)
    return to(first), None if places is None else to(places), [(to(w), to(b)) for w, b in layers]


def sample(path, n, shape, offsets, network, seed):
    function = wavefront._sample_torch if path == "torch" else wavefront._sample_triton
    return function(n, shape, offsets, *on(network, "cpu" if path == "torch" else DEVICE), seed).cpu()


def exact(n, shape, offsets, network, seed):
    """With the float32 probabilities where a table of them is all there is, else in float64."""
    return wavefront_sample_reference(n, shape, offsets, *on(network, "cpu", torch.float64 if network[2] else torch.float32), seed)


@pytest.mark.parametrize("offsets", [BLOCK, RIGHT, FAR])
def test_kernel_wavefront_reference_is_the_raster_of_the_script(offsets):       # any line of either
    first, places, layers = draw(offsets, (4, 5), (6,), True, dtype=torch.float64)
    s = wavefront.slope(offsets)
    assert s == pixels.slope(offsets)
    u = wavefront.uniform(7, 4, 5, s, 11)
    u = torch.stack([torch.stack([u[s * i + j, i] for j in range(5)]) for i in range(4)]).permute(2, 0, 1).double()
    ask = lambda code, place: torch.sigmoid(pixels.head(first[code] + places[place, None], layers))
    wanted = pixels.ancestral(ask, u, offsets, torch.arange(20).split(1))
    assert torch.equal(wavefront_sample_reference(7, (4, 5), offsets, first, places, layers, 11), wanted)


def test_kernel_wavefront_noise_is_uniform_and_of_the_position_alone():         # a word twice; the row left out; 2^-31
    u = wavefront.uniform(4000, 6, 7, 1, 5).double()
    assert u.shape == (12, 6, 4000) and u.min() >= 0 and u.max() < 1
    n = u.numel()
    assert abs(u.mean() - 0.5) < 5 / (12 * n) ** 0.5 and abs((u**2).mean() - 1 / 3) < 5 * (4 / 45 / n) ** 0.5
    flat = u.view(72, 4000)
    assert (torch.corrcoef(flat) - torch.eye(72)).abs().max() < 5.5 / 4000**0.5
    assert torch.equal(wavefront.uniform(10, 6, 7, 1, 5, start=30).double(), u[:, :, 30:40])
    assert torch.equal(wavefront.uniform(9, 3, 4, 1, 5).double()[:6], u[:6, :3, :9])
    assert torch.equal(wavefront.uniform(2, 1, 1, 0, 5)[0, 0], rng.philox([torch.arange(2), *[torch.tensor(k) for k in (0, 0, 2)]], 5)[0].float() * 2.0**-32)
    assert rng.PIXELS not in (rng.CHAIN, rng.STEP)


def test_kernel_wavefront_noise_is_below_one(monkeypatch):              # the clamp: 2^32 - 1 rounds to 2^32
    monkeypatch.setattr(rng, "philox", lambda counter, seed: [torch.full((1, 1, 1), 2**32 - 1)] * 4)
    assert 1 - 1e-7 < wavefront.uniform(1, 1, 1, 0, 5).item() < 1


@pytest.mark.parametrize("hidden, places", HEADS)
@pytest.mark.parametrize("offsets", [ABOVE, BLOCK, RIGHT, FAR, ((0, 1),), ((1, 0),), ((2, 3),)])
def test_kernel_wavefront_on_the_cpu_equals_the_reference(offsets, hidden, places):   # low + 1; D; s R; the tile's row
    for n, shape in ((1, (1, 1)), (5, (1, 6)), (5, (6, 1)), (3, (4, 3)), (270, (5, 7))):
        network = draw(offsets, shape, hidden, places)
        assert torch.equal(sample("torch", n, shape, offsets, network, 3), exact(n, shape, offsets, network, 3))


@needs_triton
@pytest.mark.parametrize("offsets, hidden, places, n, shape", [
    (BLOCK, (), False, 3, (5, 3)), (RIGHT, (), True, 2, (3, 6)), (FAR, (20, 5), True, 3, (3, 4)), (ABOVE, (3,), True, 5, (4, 2)),
    (ABOVE, (20, 5), False, 1, (2, 3)), (((0, 1),), (), False, 2, (2, 5)), (ABOVE, (), False, 1, (33, 2)), (((1, 0),), (), False, 2, (1, 1))])
def test_kernel_wavefront_equals_the_reference(offsets, hidden, places, n, shape):
    """the shift of a parent's bit; above >= a; j < W; a mask of columns; the relu; the word of a wave; PLACES"""
    for seed in range(100):                                             # a network whose pictures are grey
        network = draw(offsets, shape, hidden, places, seed)
        wanted = exact(n, shape, offsets, network, -5)
        if 0.25 < wanted.double().mean() < 0.75:
            break
    assert torch.equal(sample("triton", n, shape, offsets, network, -5), wanted)


@needs_triton
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.sampled_from([ABOVE, RIGHT, FAR]), st.sampled_from(HEADS), st.integers(0, 2**64 - 1))
@settings(max_examples=6)
def test_kernel_wavefront_equals_the_reference_at_any_size(n, H, W, offsets, head, seed):    # the high half of the seed
    network = draw(offsets, (H, W), *head, seed=seed % 1000)
    assert torch.equal(sample("triton", n, (H, W), offsets, network, seed), exact(n, (H, W), offsets, network, seed))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")                   # the interpreter is NumPy
@pytest.mark.parametrize("path", PATHS)
def test_kernel_wavefront_of_what_is_certain(path):                     # u of 1 for p of 1
    for value, picture in ((1e4, 1), (-1e4, 0)):
        for hidden, places in (((), False), ((), True)):
            first, place, layers = draw(ABOVE, (3, 3), hidden, places)
            x = sample(path, 4, (3, 3), ABOVE, (torch.full_like(first, value), place, layers), 0)
            assert (x == picture).all()


@pytest.mark.parametrize("path", PATHS)
def test_kernel_wavefront_a_picture_is_of_its_number_alone(path):       # a tile's row; the seed
    network = draw(ABOVE, (3, 4), (3,), True)
    whole = sample(path, 7, (3, 4), ABOVE, network, 9)
    assert torch.equal(sample(path, 2, (3, 4), ABOVE, network, 9), whole[:2])
    assert not torch.equal(sample(path, 7, (3, 4), ABOVE, network, 9 + 2**32), whole)
    assert sample(path, 0, (3, 4), ABOVE, network, 9).shape == (0, 3, 4)


@needs_triton
def test_kernel_wavefront_writes_all_of_its_output_and_no_more(monkeypatch):   # the masks of the store
    empty, guards = torch.Tensor.new_empty, []

    def new_empty(t, *shape, **options):
        size = math.prod(shape)
        whole = empty(t, size + 200, **options).fill_(77)
        guards.append(whole)
        return whole[:size].view(shape)

    for hidden in ((), (3,)):                                           # a program for one image, and for four
        network = draw(ABOVE, (3, 4), hidden, True)
        wanted = exact(3, (3, 4), ABOVE, network, 1)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", new_empty)
            assert torch.equal(sample("triton", 3, (3, 4), ABOVE, network, 1), wanted)
    pictures = [g for g in guards if g.dtype == torch.uint8 and len(g) == 236]
    assert len(pictures) >= 2 and all((g[36:] == 77).all() for g in pictures)


@pytest.mark.parametrize("threads", [1, 2])
def test_kernel_wavefront_in_tiles_is_the_whole(threads):               # row of the tile in `uniform`
    network, before = draw(ABOVE, (5, 4), (3,), True), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        x = kernels.wavefront_sample(300, (5, 4), ABOVE, *on(network, "cpu"), 3)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(x, exact(300, (5, 4), ABOVE, network, 3))


@needs_triton
def test_kernel_wavefront_dispatch(monkeypatch):
    calls = []
    for name in ("triton", "torch"):
        monkeypatch.setattr(wavefront, f"_sample_{name}", lambda *a, name=name: calls.append(name))
    network = on(draw(ABOVE, (3, 4), (3,), True))
    for choice, name in (("torch", "torch"), ("triton", "triton")):
        monkeypatch.setenv("KERNELS", choice)
        kernels.wavefront_sample(2, (3, 4), ABOVE, *network, 1)
        assert calls.pop() == name
    for shape, offsets, hidden, dtype in (((129, 2), ABOVE, (), torch.float32), ((3, 4), ((1, 40),), (), torch.float32),
                                          ((3, 4), ABOVE, (3, 3, 3), torch.float32), ((3, 4), ABOVE, (65,), torch.float32),
                                          ((3, 4), ABOVE, (), torch.float64)):
        other = on(draw(offsets, shape, hidden, True, dtype=dtype), dtype=dtype)
        with pytest.raises(RuntimeError, match="the kernel cannot run"):        # a limit left out
            kernels.wavefront_sample(2, shape, offsets, *other, 1)
    monkeypatch.delenv("KERNELS")
    kernels.wavefront_sample(2, (3, 4), ABOVE, *other, 1)
    assert calls.pop() == "torch"


def test_kernel_wavefront_of_many_layers_and_of_float64():
    for network in (draw(ABOVE, (3, 4), (3, 4, 5), True, dtype=torch.float64), draw(ABOVE, (3, 4), dtype=torch.float64)):
        x = kernels.wavefront_sample(9, (3, 4), ABOVE, *network, 1)
        assert torch.equal(x, wavefront_sample_reference(9, (3, 4), ABOVE, *network, 1))


def test_kernel_wavefront_errors_say_what_was_wanted():
    first, places, layers = on(draw(ABOVE, (3, 4), (3,), True), "cpu")
    for offsets in ((), ((0, 0),), ((1, 0), (0, -1)), ((-1, 0),)):
        with pytest.raises(ValueError, match="must come before its pixel"):
            kernels.wavefront_sample(1, (3, 4), offsets, first, places, layers, 0)
    w, b = layers[0]
    for bad in ((first[:7], places, layers), (first, places[:5], layers), (first, places[:, :2], layers), (first, places, []),
                (first, places, [(w[:, :2], b)]), (first, places, [(w.repeat(2, 1), b.repeat(2))])):
        with pytest.raises(ValueError, match=r"first \(2\^3, F\), places \(12, F\) or None, layers .* are wanted; got"):
            kernels.wavefront_sample(1, (3, 4), ABOVE, *bad, 0)
    with pytest.raises(ValueError, match="are wanted"):
        kernels.wavefront_sample(-1, (3, 4), ABOVE, first, places, layers, 0)
    with pytest.raises(RuntimeError, match="wavefront_sample has no gradient"):
        kernels.wavefront_sample(1, (3, 4), ABOVE, first.requires_grad_(), places, layers, 0)


def test_kernel_wavefront_is_what_the_script_samples_by():              # another function under the name
    model = pixels.PixelNetwork((4, 5), ABOVE, (6,), True)
    with torch.no_grad():
        assert torch.equal(model.sample(3, 8), wavefront_sample_reference(3, (4, 5), ABOVE, *model.lookup(), 8))


def test_kernel_wavefront_without_triton():
    done = alone("import sys; sys.modules['triton'] = None\n"
                 "import torch, kernels; x = kernels.wavefront_sample(3, (2, 2), ((0, 1),), torch.zeros(2, 1), None, [], 0)\n"
                 "assert x.shape == (3, 2, 2)")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not has_compiler(), reason="Triton, or its nvdisasm, is not here")
def test_kernel_wavefront_machine_code_is_within_limits_and_budget():   # 64 rows before capability 9; words of 64 bits
    done = subprocess.run([sys.executable, "-m", "kernels.compile", "--targets", "sm_80", "sm_90", "--only", "wavefront"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 programs, 0 over a limit" in done.stdout
    for line in done.stdout.splitlines():
        if line.startswith("wavefront"):
            numbers = line.split()[3:]                                  # after the two words of the name and the target
            assert numbers[2:4] == ["0", "0"] and ("table" not in line or numbers[4] == "0"), line


def test_kernel_wavefront_bench_runs(capsys):
    from kernels import bench_wavefront

    torch.set_default_dtype(torch.float32)
    bench_wavefront.main(["--images", "20", "--side", "6", "--repeats", "1"])
    shown = capsys.readouterr().out
    assert "gate: " in shown and "wavefront_sample" in shown and "raster" in shown


# ---- a GPU, where there is one


@needs_gpu
@pytest.mark.parametrize("hidden, places", HEADS)
@pytest.mark.parametrize("offsets, n, shape", [(BLOCK, 1000, (28, 28)), (RIGHT, 333, (28, 28)), (ABOVE, 65, (100, 17)), (FAR, 10, (16, 40))])
def test_kernel_wavefront_on_the_gpu(hidden, places, offsets, n, shape):
    network = draw(offsets, shape, hidden, places)
    mine, wanted = sample("triton", n, shape, offsets, network, 7), exact(n, shape, offsets, network, 7)
    other = (mine != wanted).flatten(1).any(1).double().mean()
    assert other <= (0 if not places and not hidden else 0.02)          # a rounding turns a pixel, and what follows it
    assert all(torch.equal(sample("triton", n, shape, offsets, network, 7), mine) for _ in range(10))


@needs_gpu
def test_kernel_wavefront_on_the_gpu_goes_into_a_cuda_graph():
    network = on(draw(BLOCK, (28, 28)))
    eager = kernels.wavefront_sample(100, (28, 28), BLOCK, *network, 7)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.wavefront_sample(100, (28, 28), BLOCK, *network, 7)
    graph.replay()
    assert torch.equal(captured, eager)
