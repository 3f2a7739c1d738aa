"""igpt.py: the chain rule, causality, caches, scans, tokens and tables. Behind each `def`: a line that must not break."""

import itertools
import json
import math
import pathlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import baselines
import data
import igpt
import judges

seeds = st.integers(0, 999)
close = torch.testing.assert_close
MIXERS = sorted(igpt.MIXERS)
mixers = pytest.mark.parametrize("mixer", MIXERS)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def model(mixer="attention", K=3, T=5, seed=0, **options):
    """A small model whose weights are large enough for every path to matter."""
    torch.manual_seed(seed)
    gpt = igpt.GPT(K, T, **{"width": 8, "layers": 2, "heads": 2, "lags": (1, 2, 3)} | options, mixer=mixer)
    for name, p in gpt.named_parameters():
        if p.dim() > 1 and not name.endswith("A_log"):
            torch.nn.init.normal_(p, 0, 0.5)
    return gpt


def sentences(n, T, K, seed=0):
    return torch.randint(K, (n, T), generator=rng(seed))


# ---- the chain rule


@mixers
@pytest.mark.parametrize("K, T", [(2, 8), (3, 5)])
def test_the_probabilities_of_all_sentences_sum_to_one(mixer, K, T):    # the shift by one; ln_f of the future; cross_entropy's K
    gpt = model(mixer, K, T)
    every = torch.tensor(list(itertools.product(range(K), repeat=T)))
    p = (-gpt.nll(every).sum(1)).exp()
    close(p.sum(), torch.tensor(1.0))
    assert p.max() / p.min() > 2                                        # and it is not the uniform one


def test_an_untrained_model_is_the_uniform_one():                       # zeros_ of lm_head; mean for sum
    gpt = igpt.GPT(16, 7, 8, 1, 2)
    close(gpt.nll(sentences(4, 7, 16)), torch.full((4, 7), math.log(16)))


@mixers
def test_a_place_depends_on_all_before_it_and_on_none_after(mixer):     # is_causal; pad on the right; a dead mask
    gpt, T = model(mixer, T=7), 7
    x = torch.randn(1, T, 8, generator=rng(1), requires_grad=True)
    h = x
    for layer in gpt.h:
        h = layer(h)
    for t in range(T):
        (g,) = torch.autograd.grad(h[0, t].square().sum(), x, retain_graph=True)
        assert (g[0, : t + 1].abs().sum(1) > 1e-9).all() and (g[0, t + 1 :] == 0).all()


@mixers
@given(st.integers(0, 6), seeds)
@settings(max_examples=10)
def test_a_token_changes_no_probability_up_to_its_own(mixer, t, seed):  # inputs without the start token
    gpt, tokens = model(mixer, T=7, seed=seed), sentences(2, 7, 3, seed)
    logits = lambda tokens: gpt(gpt.inputs(tokens))
    other = tokens.clone()
    other[:, t] = (tokens[:, t] + 1) % 3
    a, b = logits(tokens), logits(other)
    close(a[:, : t + 1], b[:, : t + 1])
    assert t == 6 or (a[:, t + 1 :] - b[:, t + 1 :]).abs().amax((0, 2)).gt(1e-9).all()


@mixers
def test_the_class_is_read_from_the_start_token(mixer):                 # start without labels
    gpt, tokens = model(mixer, classes=3), sentences(4, 5, 3)
    one, two = (gpt.nll(tokens, torch.full((4,), c)) for c in (0, 2))
    assert (one[:, 0] - two[:, 0]).abs().min() > 1e-6 and (one[:, 4] - two[:, 4]).abs().max() > 1e-9
    close(gpt.nll(tokens), one)


@pytest.mark.parametrize("kind, shape, row", [("patch", (1, 8, 12), 6), ("palette", (3, 6, 5), 5), ("pixel", (1, 7, 9), 9)])
def test_a_place_is_told_what_lies_around_it(kind, shape, row):         # side**2 left out; row + 1 for row - 1; reach - 1
    language = igpt.LANGUAGES[kind](shape, 4)
    gpt = igpt.IGPT(language, width=8, layers=1, heads=2).gpt
    tokens = torch.arange(2 * language.T).view(2, -1)                   # each its own name
    inputs, grid = gpt.inputs(tokens), tokens.view(2, -1, row)
    assert inputs.shape == (2, language.T, 6) and grid.shape[1] * row == language.T
    for r, c in itertools.product(range(2, grid.shape[1]), range(2, row - 1)):
        around = [(r, c - 1), (r, c - 2), (r - 1, c + 1), (r - 1, c), (r - 1, c - 1), (r - 2, c)]
        assert torch.equal(inputs[:, r * row + c], torch.stack([grid[:, i, j] for i, j in around], 1))
    assert (inputs[:, 0] == language.K).all() and inputs[:, 1].tolist() == [[int(row_[0]), *[language.K] * 5] for row_ in tokens]
    assert (gpt.inputs(tokens, torch.tensor([0, 3]))[1, 0] == language.K + 3).all()
    plain = igpt.IGPT(language, near=False, width=8, layers=1, heads=2).gpt
    assert torch.equal(plain.inputs(tokens)[:, 1:, 0], tokens[:, :-1]) and plain.lags == (1,)


def test_what_lies_elsewhere_is_read_from_a_table_of_its_own():         # one table; + table left out
    gpt = model(K=3, T=4)
    inputs = torch.tensor([[0, 1, 2], [3, 3, 1]])
    rows = [[gpt.wte.weight[4 * lag + k] for lag, k in enumerate(row)] for row in inputs.tolist()]
    close(gpt.embed(inputs), torch.stack([sum(row) for row in rows]))


# ---- caches


@mixers
@given(st.integers(1, 7), seeds)
@settings(max_examples=10)
def test_reading_a_token_at_a_time_from_any_split_is_reading_all(mixer, split, seed):
    """wpe of another place; the cache one short; k not transposed; past one off; h not kept"""
    gpt, T = model(mixer, T=8, seed=seed), 8
    inputs = gpt.inputs(sentences(3, T, 3, seed))
    full, memory = gpt(inputs), gpt.memory(3)
    with torch.inference_mode():
        close(gpt(inputs[:, :split], memory), full[:, :split])
        for t in range(split, T):
            close(gpt.step(inputs[:, t], memory, t), full[:, t])


@mixers
@given(st.integers(1, 6), st.integers(1, 6), seeds)
@settings(max_examples=10)
def test_reading_in_pieces_is_reading_all(mixer, one, two, seed):       # tril(0); start ignored; the convolution's past
    gpt, T = model(mixer, T=9, seed=seed), 9
    inputs, cuts = gpt.inputs(sentences(2, T, 3, seed)), sorted({0, one, min(one + two, 8), 9})
    memory = gpt.memory(2)
    with torch.no_grad():
        pieces = [gpt(inputs[:, a:b], memory, a) for a, b in zip(cuts, cuts[1:])]
        close(torch.cat(pieces, 1), gpt(inputs))


@mixers
def test_a_sentence_does_not_depend_on_its_neighbours(mixer):           # a sum over the batch
    gpt, tokens = model(mixer), sentences(6, 5, 3)
    close(gpt.nll(tokens)[2:3], gpt.nll(tokens[2:3]))


def test_the_memory_of_mamba_does_not_grow():                           # T in Mamba.memory
    size = lambda mixer, T: sum(v.numel() for layer in model(mixer, T=T).memory(2) for v in layer)
    assert size("mamba", 5) == size("mamba", 50) and size("attention", 50) == 10 * size("attention", 5)


# ---- sampling


@mixers
def test_samples_follow_the_model(mixer):                               # noise added; without log; argmin
    gpt = model(mixer, 2, 3)
    torch.manual_seed(1)
    n = 20_000
    drawn = gpt.generate(n)
    every = torch.tensor(list(itertools.product(range(2), repeat=3)))
    p = (-gpt.nll(every).sum(1)).exp().detach()
    counts = torch.bincount((drawn * torch.tensor([4, 2, 1])).sum(1), minlength=8)
    assert ((counts / n - p).abs() < 4.5 * (p * (1 - p) / n).sqrt()).all()


@mixers
def test_a_prompt_is_kept_and_read(mixer):                              # tokens[:, :s]; the last of the prompt read twice
    gpt = model(mixer, 3, 6)
    for s in (1, 3, 5):
        prompt = sentences(4, s, 3)
        tokens = gpt.generate(4, prompt, temperature=0.0)
        assert torch.equal(tokens[:, :s], prompt)
        logits = gpt(gpt.inputs(tokens))
        assert torch.equal(tokens[:, s:], logits.argmax(2)[:, s:])
    assert torch.equal(gpt.generate(2, sentences(2, 6, 3)), sentences(2, 6, 3))


@given(st.lists(st.integers(-32, 32), min_size=2, max_size=8, unique=True), st.floats(0.1, 3), st.integers(0, 9),
       st.floats(0, 1))
def test_what_is_left_to_choose_from(logits, temperature, k, p):
    """highest k, not lowest; `>`: a token too many; the probability of the token itself counted; temperature after top_p"""
    logits = torch.tensor(logits) / 8.0
    close(igpt.restrict(logits, temperature).softmax(0), (logits / temperature).softmax(0))
    assert igpt.restrict(logits, 0.0).isfinite().nonzero()[:, 0].tolist() == [int(logits.argmax())]
    kept = igpt.restrict(logits, 1.0, k).isfinite()
    order = logits.argsort(descending=True)
    assert set(kept.nonzero()[:, 0].tolist()) == set(order[: k or len(logits)].tolist())
    share = (logits / temperature).softmax(0)[order]
    fewest = 1 + int((share.cumsum(0) < p - 1e-12).sum())
    nucleus = igpt.restrict(logits, temperature, 0, p).isfinite()
    close_call = (share.cumsum(0) - p).abs().min() < 1e-9
    assert close_call or p == 1 or set(nucleus.nonzero()[:, 0].tolist()) == set(order[:fewest].tolist())


# ---- scans


def draw_scan(n, T, E, N, seed):
    g = rng(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    return [rand(n, T, E), rand(n, T, E).exp() / 3, -rand(E, N).exp(), rand(n, T, N), rand(n, T, N), rand(n, E, N)]


@given(st.integers(1, 3), st.integers(1, 30), st.integers(1, 4), st.integers(1, 4), seeds)
def test_the_parallel_scan_is_the_sequential_one(n, T, E, N, seed):     # the order of a and u; `before` after h; the padding
    arguments = draw_scan(n, T, E, N, seed)
    for a, b in zip(igpt.selective_scan_plain(*arguments), igpt.scan_sequential(*arguments)):
        close(a, b)
    close(igpt.selective_scan_plain(*arguments[:5])[0], igpt.scan_sequential(*arguments[:5])[0])


def test_the_parallel_scan_has_the_gradient_of_the_sequential_one():    # a detach
    arguments = [v.requires_grad_() for v in draw_scan(2, 11, 3, 2, 0)]
    one, two = (torch.autograd.grad(f(*arguments)[0].square().sum(), arguments)
                for f in (igpt.selective_scan_plain, igpt.scan_sequential))
    for a, b in zip(one, two):
        close(a, b)


def test_a_scan_that_does_not_select_is_a_convolution():                # exp(A) for exp(dt A); dt left out of the input
    x, dt, A, B, C, _ = draw_scan(1, 12, 1, 3, 0)
    dt, B, C = torch.full_like(dt, 0.7), B[:, :1].expand(-1, 12, -1), C[:, :1].expand(-1, 12, -1)
    kernel = torch.stack([(C[0, 0] * (0.7 * k * A[0]).exp() * 0.7 * B[0, 0]).sum() for k in range(12)])
    y = igpt.scan_sequential(x, dt, A, B, C)[0][0, :, 0]
    close(y, torch.stack([(kernel[: t + 1].flip(0) * x[0, : t + 1, 0]).sum() for t in range(12)]))


def test_a_scan_forgets_without_dividing():                             # a cumulative product in a denominator
    x, dt, A, B, C, h = (v.float() for v in draw_scan(1, 400, 2, 2, 0))
    y, h = igpt.selective_scan_plain(x, 30 * dt, A, B, C, h)
    assert y.isfinite().all() and h.isfinite().all()
    held, h_2 = igpt.selective_scan_plain(x, 0 * dt, A, B, C, h)        # no time passes: the state stays
    close(h_2, h)


def test_the_steps_of_mamba_start_where_the_paper_says():               # softplus^-1; A_log of 0..N-1
    torch.manual_seed(0)
    mamba = igpt.Mamba(16, 1, states=4)
    dt = F.softplus(mamba.dt_proj.bias)
    assert dt.min() >= 1e-3 - 1e-9 and dt.max() <= 0.1 + 1e-9 and dt.log().std() > 0.8
    _, A, _, _ = mamba.select(torch.randn(1, 32))
    close(A, -torch.arange(1.0, 5).expand(32, 4))
    mamba.float().bfloat16()
    dt, A, _, _ = mamba.select(torch.randn(1, 32, dtype=torch.bfloat16))
    assert dt.dtype == A.dtype == torch.float32


# ---- attention


@given(st.integers(1, 6), st.integers(0, 4), seeds)
def test_attention_by_hand(S, past, seed):                              # tril(0); sqrt(D); a key of the future
    q, k, v = (torch.randn(1, 1, n, 4, generator=rng(seed)) for n in (S, S + past, S + past))
    o = igpt.causal_attention_plain(q, k, v)[0, 0]
    for i in range(S):
        p = (k[0, 0, : i + past + 1] @ q[0, 0, i] / 2).softmax(0)
        close(o[i], p @ v[0, 0, : i + past + 1])
    cache = torch.full((1, 1, 9 + S, 4), torch.nan)
    cache_k, cache_v = cache.clone(), cache.clone()
    cache_k[:, :, : S + past], cache_v[:, :, : S + past] = k, v
    close(igpt.decode_attention_plain(q[:, :, -1], cache_k.mT, cache_v, S + past)[0, 0], o[-1]) if past <= 9 else None


# ---- tokens


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), seeds)
def test_patches_lose_nothing(n, h, w, seed):                           # >> and <<; the order of p and q; rows for columns
    bits = torch.randint(2, (n, 1, 2 * h, 2 * w), generator=rng(seed))
    tokens = igpt.patches(bits)
    assert tokens.shape == (n, h * w) and tokens.min() >= 0 and tokens.max() < 16
    assert torch.equal(igpt.unpatch(tokens, 2 * h, 2 * w), bits)
    i = bits[0, 0]
    assert tokens[0, 0] == 8 * i[0, 0] + 4 * i[0, 1] + 2 * i[1, 0] + i[1, 1]
    if w > 1:
        assert tokens[0, 1] == 8 * i[0, 2] + 4 * i[0, 3] + 2 * i[1, 2] + i[1, 3]


@pytest.mark.parametrize("name, levels", [("pixel", 2), ("patch", 2), ("grey", 2), ("grey", 5), ("grey", 256)])
def test_lossless_tokens_give_the_image_back(name, levels):             # floor for round; 2 / K
    language = igpt.LANGUAGES[name]((1, 4, 6), levels)
    x = torch.randint(levels, (9, 1, 4, 6), generator=rng(0)) * (2 / (levels - 1)) - 1
    tokens = language.tokens(x)
    assert tokens.shape == (9, language.T) and tokens.max() < language.K and language.exact
    close(language.decode(tokens), x)
    close(language.pixels(tokens) * (2 / (language.kinds - 1)) - 1, x[:, 0])


def test_grey_levels_are_probabilities_of_a_bit():                      # < for >; the factor 2
    torch.manual_seed(0)
    x = torch.tensor([-1.0, -0.5, 0.4, 1.0]).repeat(40_000, 1)
    p = igpt.draw_bits(x).double().mean(0)
    assert p[0] == 0 and p[3] == 1 and (p - (x[0] + 1) / 2).abs().max() < 0.012


def test_a_palette_is_nearest_and_its_means_are_means():                # argmax; a mean over all
    torch.manual_seed(0)
    x = torch.rand(20, 3, 4, 4) * 2 - 1
    language = igpt.Palette((3, 4, 4), 5)
    language.fit(x)
    flat = x.permute(0, 2, 3, 1).reshape(-1, 3)
    index = language.tokens(x).flatten()
    assert torch.equal(index, torch.cdist(flat, language.palette).argmin(1)) and not language.exact
    error = lambda means: torch.cdist(flat, means).min(1).values.square().mean()
    torch.manual_seed(0)
    assert error(language.palette) < 0.8 * error(flat[torch.randperm(len(flat))[:5]])
    again = igpt.Palette((3, 4, 4), 5)
    again.load_state_dict(language.state_dict())
    assert torch.equal(again.tokens(again.decode(again.tokens(x))), again.tokens(x))
    many = igpt.k_means(torch.tensor([[0.0], [0.1], [1.0], [1.1]]), 2, 50).flatten().sort().values
    close(many, torch.tensor([0.05, 1.05]))
    with pytest.raises(ValueError, match="3 clusters are wanted of 2 distinct values"):
        igpt.k_means(torch.tensor([[0.0], [1.0], [1.0]]), 3)


def test_points_in_cells_are_a_density():                               # log_volume; floor; + rand
    torch.manual_seed(0)
    whole = igpt.IGPT(igpt.Cells((2,), 8, 2.0), width=8, layers=1, heads=2)
    torch.nn.init.normal_(whole.gpt.lm_head.weight, 0, 0.3)
    axis = (torch.arange(32) + 0.5) / 8 - 2
    grid = torch.cartesian_prod(axis, axis)
    close((whole.log_prob(grid).exp().sum() / 64).detach(), torch.tensor(1.0))
    assert (whole.log_prob(torch.tensor([[2.1, 0.0]])) == -math.inf).all()
    x = whole.sample(4000)
    assert x.abs().max() <= 2 and (x.max(0).values - x.min(0).values > 2).all()
    cell = whole.language.tokens(x)
    close(whole.language.tokens(whole.language.decode(cell)), cell)
    inside = (whole.language.decode(cell) - whole.language.decode(cell)).abs().max()
    assert 0.3 < inside < 0.5                                           # uniform in a cell of 0.5


# ---- the family


def tiny(mixer="attention", shape=(1, 4, 6), levels=2, classes=None, **options):
    config = {"tokens": "auto", "cells": 8, "colours": 4, "width": 8, "layers": 2, "heads": 2, "dropout": 0.0,
              "near": True, "conditional": False, "model": mixer} | options
    return igpt.build(config, shape, levels, classes)


def test_build_chooses_the_language_and_refuses_what_cannot_be():       # each of the raises
    kinds = [((2,), None, igpt.Cells), ((1, 4, 6), 2, igpt.Patches), ((1, 5, 6), 256, igpt.Bits), ((3, 4, 4), 256, igpt.Palette)]
    for shape, levels, kind in kinds:
        assert type(tiny(shape=shape, levels=levels).language) is kind
    for options, words in [(dict(tokens="cells"), "--tokens cells is for points"), (dict(tokens="patch", shape=(2,), levels=None), "for images"),
                           (dict(tokens="grey", shape=(3, 4, 4)), "one channel"), (dict(conditional=True), "classes"),
                           (dict(tokens="patch", shape=(1, 5, 6)), "even sides"), (dict(heads=3), "3 heads")]:
        with pytest.raises(ValueError, match=words):
            tiny(**options)


@mixers
def test_a_completion_keeps_what_it_was_given(mixer):                   # rows of tokens for rows of pixels
    torch.manual_seed(0)
    model = tiny(mixer)
    x = torch.randint(2, (3, 1, 4, 6)) * 2.0 - 1
    out = model.complete(x, 2)
    assert torch.equal(out[:, :, :2], x[:, :, :2]) and out.abs().eq(1).all() and not torch.equal(out, x)
    model, x = tiny(mixer, shape=(1, 6, 6)), torch.randint(2, (40, 1, 6, 6)) * 2.0 - 1
    out = model.complete(x, 3)                                          # a row of patches is two of pixels
    assert torch.equal(out[:, :, :2], x[:, :, :2])
    assert ((out != x)[:, 0, 2].double().mean(0) > 0.1).all() and ((out != x)[:, 0, 3].double().mean(0) > 0.1).all()


@mixers
def test_training_learns_a_language(mixer):                             # the sign of the loss; the shift
    torch.manual_seed(0)
    model = tiny(mixer, width=16)
    pattern = torch.randint(2, (1, 1, 4, 6)) * 2.0 - 1
    batches = itertools.repeat(torch.cat([pattern, -pattern]).repeat(4, 1, 1, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-2)
    rows = [row["loss"].item() for row in igpt.train(model, optimizer, batches, 90, 3e-2)]
    assert abs(rows[0] - math.log(16)) < 1e-6 and 6 * rows[-1] < math.log(2) + 0.4     # one bit an image is left


def test_two_shares_of_a_batch_make_its_loss():                          # bits drawn for x[share] alone
    model, losses = tiny(), []
    with torch.no_grad():
        model.gpt.lm_head.weight.normal_()
    side = model.language.shape[1:]
    x, labels = 2 * torch.rand(6, 1, *side, generator=rng(0)) - 1, torch.zeros(6, dtype=torch.long)
    for share in (slice(None), slice(0, 3), slice(3, 6)):
        torch.manual_seed(5)
        losses.append(model.loss(x, labels, share).detach())
    close((losses[1] + losses[2]) / 2, losses[0])


def test_features_are_those_of_each_layer():                            # after the layer; a sum
    model = tiny()
    tokens = sentences(3, 6, 16)
    features = model.gpt.features(tokens)
    assert len(features) == 3 and all(f.shape == (3, 8) for f in features)
    x = model.gpt.embed(model.gpt.inputs(tokens)) + model.gpt.wpe.weight
    close(features[0], model.gpt.h[0].ln_1(x).mean(1))
    close(features[1], model.gpt.h[1].ln_1(model.gpt.h[0](x)).mean(1))
    thirds = model.gpt.features(tokens, 3)
    assert all(f.shape == (3, 24) for f in thirds)
    close(thirds[0][:, 8:16], model.gpt.h[0].ln_1(x)[:, 2:4].mean(1))


# ---- where training begins


@pytest.mark.parametrize("mixer", igpt.MIXERS)
def test_weights_start_as_the_papers_say(mixer):                        # no 1 / sqrt(2 layers); a variance for a std
    torch.manual_seed(0)
    model = igpt.GPT(16, 4, 128, 3, 4, mixer)
    assert model.wte.num_embeddings == 17                               # one start token
    close(model(model.inputs(sentences(2, 4, 16))), torch.zeros(2, 4, 16))
    layer, residual = model.h[1], 0.02 / 6**0.5                         # GPT-2, section 2.3
    wanted = [(model.wte.weight, 0.02), (layer.c_fc.weight, 0.02), (layer.c_proj.weight, residual)]
    m = layer.mixer
    if mixer == "attention":
        wanted += [(m.c_attn.weight, 0.02), (m.c_proj.weight, residual)]
    else:
        wanted += [(m.in_proj.weight, 0.02), (m.out_proj.weight, residual), (m.x_proj.weight, 1 / 16),
                   (m.dt_proj.weight, 8**-0.5), (m.conv, 0.5)]
        dt, A, B, C = m.select(torch.zeros(2, 256))
        assert 1e-3 < dt.min() < 2e-3 and 0.007 < dt.median() < 0.014 and 0.05 < dt.max() < 0.1
        close(A, -torch.arange(1.0, 17).expand(256, -1))
        assert (m.D == 1).all() and not B.any() and not C.any()
    for weight, std in wanted:
        assert weight.std().item() == pytest.approx(std, rel=0.1)


def test_symbols_of_bits_are_two_and_training_takes_its_steps():         # kinds of 3; a start of 1
    config = dict(cells=8, colours=4, near=True, width=8, layers=1, heads=2, dropout=0.0, conditional=False, model="attention")
    wanted = {"pixel": (2, 2), "patch": (16, 2), "grey": (5, 5)}
    for name, sizes in wanted.items():
        language = igpt.build(config | {"tokens": name}, (1, 4, 4), 5).language
        assert (language.K, language.kinds) == sizes, name
    model = tiny()
    batches = iter([torch.ones(2, *model.language.shape)] * 3)
    assert len(list(igpt.train(model, torch.optim.AdamW(model.parameters()), batches, 3, 1e-3))) == 3


def test_without_options_nothing_is_restricted():                       # a default of 2
    logits = torch.randn(3, 9, generator=rng(0))
    assert torch.equal(igpt.restrict(logits), logits)


def test_a_conditional_model_is_judged_as_the_mixture_that_it_draws(monkeypatch):    # the density of class 0
    truth, seen = data.load("gmm"), []
    monkeypatch.setattr(baselines, "exact_kl", lambda log_prob, *a: seen.append(log_prob) or 0.0)
    torch.manual_seed(0)
    model = igpt.build(dict(tokens="auto", cells=16, colours=2, near=True, width=8, layers=1, heads=2, dropout=0.0, conditional=True,
                            model="attention"), truth.shape, None, 8)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape)
    model.eval()
    args = types.SimpleNamespace(nll_rows=60, conditional=True, samples=1, probe_rows=0)
    with torch.no_grad():
        out = baselines.report(model, igpt.evaluate, truth, types.SimpleNamespace(device="cpu", folder=None), args, 1.0)
        axis = (torch.arange(16) + 0.5) * 6 / 16 - 3                    # the middles of all cells
        cells = torch.cartesian_prod(axis, axis)
        log_p = seen[0](cells)
        each = torch.stack([model.log_prob(cells, torch.full((256,), k)) for k in range(8)])
        assert (each[0] - each[1]).abs().max() > 1e-3
    close(log_p, each.exp().mean(0).log())
    close(log_p.exp().sum() * (6 / 16) ** 2, torch.tensor(1.0), rtol=1e-4, atol=1e-4)
    assert out["nll"]["value"] > 0


# ---- tables


@given(st.integers(2, 3), seeds)
@settings(max_examples=10)
def test_tables_are_distributions_over_all_images(K, seed):             # + 0.5 on one side only; a look at the pixel itself
    every = torch.tensor(list(itertools.product(range(K), repeat=6))).view(-1, 2, 3)
    seen = torch.randint(K, (20, 2, 3), generator=rng(seed))
    close((-baselines.independent_nll(seen.flatten(1), every.flatten(1), K)).exp().sum(), torch.tensor(1.0))
    for pixels in (1, 2, 4, 9):
        close((-baselines.context_nll(seen, every, K, pixels)).exp().sum(), torch.tensor(1.0))


def test_a_table_counts_its_context():                                  # above for left; K for K + 1
    seen = torch.zeros(50, 4, 4, dtype=torch.long)
    seen[:, :, 1::2] = 1                                                # stripes: the left pixel says all
    assert baselines.context_nll(seen, seen[:1], 2, 2).item() < 0.2
    assert baselines.independent_nll(seen.flatten(1), seen[:1].flatten(1), 2).item() < 0.2
    flipped = torch.cat([seen, 1 - seen])
    assert baselines.independent_nll(flipped.flatten(1), seen[:1].flatten(1), 2).item() > 16 * 0.69
    assert baselines.context_nll(flipped, seen[:1], 2, 1).item() < 4 * 0.7 + 0.2       # a bit for each row's first


def test_the_probe_finds_what_is_linear():                              # the bias; std; argmin
    torch.set_default_dtype(torch.float32)
    x = torch.randn(600, 5, generator=rng(0)) * torch.tensor([1, 100, 1, 1e-2, 1]) + 30
    y = ((x[:, 1] - 30) / 100 + (x[:, 3] - 30) * 100 > 0.5).long()
    assert (baselines.probe(x[:400], y[:400], x[400:]) == y[400:]).double().mean() > 0.96


# ---- main


@mixers
def test_main_on_points(mixer, cli):
    status, error, out = cli(igpt, "--mixer", mixer, "--dataset", "gmm", "--steps", 3, "--batch", 16, "--samples", 60, "--cells", 16,
                             "--width", 16, "--layers", 1)
    assert not status, error
    metrics = json.loads((out / f"igpt-{mixer}-gmm" / "metrics.json").read_text())["metrics"]
    assert {"klh", "kl", "nll", "tokens_per_second"} <= metrics.keys() and metrics["kl"]["value"] > 0


@pytest.mark.parametrize("levels, channels", [(2, 1), (256, 3)])
def test_main_on_images_completes_and_probes(levels, channels, cli, monkeypatch):      # a baseline left out; mean for sum
    x, y = torch.randint(levels, (80, channels, 8, 8), generator=rng(0)).to(torch.uint8), torch.arange(80) % 2
    monkeypatch.setattr(data, "load", lambda *a, **k: data.Images("persian", x, y, x[:40], y[:40], levels, ("a", "b")))
    monkeypatch.setattr(judges, "images", lambda *a: {})                # it trains a classifier
    status, error, out = cli(igpt, "--dataset", "persian", "--steps", 2, "--batch", 4, "--samples", 10, "--width", 16, "--layers",
                             1, "--nll-rows", 20, "--probe-rows", 60, "--colours", 4)
    assert not status, error
    folder = out / "igpt-attention-persian"
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    name = "bits_per_dim" if levels == 2 else "bits_per_token"
    wanted = {name, f"{name}_uniform", f"{name}_independent", f"{name}_context", "probe_layer_0", "probe_layer_1",
              "probe_quarters_1"}
    assert wanted | {"nll" if levels == 2 else "distortion"} <= metrics.keys()
    assert abs(metrics[name]["value"] - metrics[f"{name}_uniform"]["value"]) < 0.05        # two steps from uniform
    assert metrics[f"{name}_uniform"]["value"] == pytest.approx(1 if levels == 2 else 2) and (folder / "completions.png").is_file()


def test_completions_of_a_conditional_model_know_their_classes(cli, monkeypatch):    # labels not handed on
    x, y = torch.randint(2, (80, 1, 8, 8), generator=rng(0)).to(torch.uint8), torch.arange(80) % 2
    monkeypatch.setattr(data, "load", lambda *a, **k: data.Images("persian", x, y, x[:40], y[:40], 2, ("a", "b")))
    monkeypatch.setattr(judges, "images", lambda *a: {})
    monkeypatch.setattr(judges, "label_agreement", lambda *a: {})
    seen, plain = [], igpt.IGPT.complete
    monkeypatch.setattr(igpt.IGPT, "complete", lambda self, x, rows, labels=None: seen.append((x, labels)) or plain(self, x, rows, labels))
    status, error, _ = cli(igpt, "--dataset", "persian", "--conditional", "--steps", 2, "--batch", 4, "--samples", 10, "--width", 16,
                           "--layers", 1, "--nll-rows", 20, "--probe-rows", 0)
    assert not status, error
    images, classes = (x[:40].float() * 2 - 1), y[:40]
    for originals, labels in seen:
        assert len(seen) == 3 and labels.tolist() == [int(classes[(images == one).flatten(1).all(1)][0]) for one in originals]
    assert len({*labels.tolist()}) == 2


def test_main_says_what_is_wrong(cli):                                  # no raise: a traceback
    for options, words in [(["--tokens", "grey"], "for images"), (["--top-p", "1.5"], "probability"), (["--cells", "1"], "2 or more"),
                           (["--dropout", "1.5"], "below 1")]:
        status, error, _ = cli(igpt, "--dataset", "gmm", "--steps", 1, *options)
        assert status == 2 and words in error and "Traceback" not in error


@mixers
def test_a_class_is_drawn_when_named_and_classes_are_even_when_not(mixer):             # labels of another part
    torch.manual_seed(0)
    model = tiny(mixer, shape=(1, 2, 4), conditional=True, classes=2)
    torch.nn.init.normal_(model.gpt.wte.weight, 0, 3.0)
    torch.nn.init.normal_(model.gpt.lm_head.weight, 0, 3.0)
    first = lambda x: model.language.tokens(x)[:, 0]
    shares = lambda x: torch.bincount(first(x), minlength=16) / len(x)
    one, two = (shares(model.of_class(torch.full((2000,), c))) for c in (0, 1))
    assert (one - two).abs().sum() > 0.5
    assert (shares(model.sample(2000, rows=301)) - (one + two) / 2).abs().max() < 0.06


def test_the_drawn_digits_are_tokens_without_loss():
    truth = data.load("persian")
    x = truth.sample(50)
    language = tiny(shape=truth.shape).language
    assert language.T == 196 and torch.equal(language.decode(language.tokens(x)).float(), x)
