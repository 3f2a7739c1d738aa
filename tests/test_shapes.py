"""Drawn sets with known factors and real faces. The comment at a test says which broken line it was seen to catch."""

import functools
import io
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import judges
import shapes

SIZES = (1, 3, 6, 40, 32, 32)
seeds = st.integers(0, 2**31)
classes = st.tuples(*(st.integers(0, n - 1) for n in SIZES))
drawn = functools.cache(lambda: data.load("dsprites", "/nowhere"))
GRID = shapes.Sprites()


def centre(images):
    """Centre of mass (B, 2), x then y, of images (B, 1, H, W)."""
    at, ink = torch.arange(images.shape[-1]) + 0.5, images[:, 0].double()
    return torch.stack([(ink.sum(k) @ at) / ink.sum((1, 2)) for k in (1, 2)], -1)


# ---- Persian digits


persian = functools.cache(lambda: data.load("persian"))


def test_persian_is_binary_balanced_and_deterministic():                # the seed ignored; labels % 9
    images = persian()
    assert images.shape == (1, 28, 28) and images.dim == 784 and images.levels == 2 and images.classes == 10
    assert images.class_names[4] == "۴" and images.train.shape[0] == 10_000 and images.test.shape[0] == 2_000
    assert images.train.dtype == torch.uint8 and set(images.train.unique().tolist()) == {0, 1}
    assert torch.bincount(images.train_labels).tolist() == [1000] * 10
    assert torch.bincount(images.test_labels).tolist() == [200] * 10
    other = shapes.digits(1, train=200, test=100)
    assert all(np.array_equal(a, b) for a, b in zip(other, shapes.digits(1, train=200, test=100)))
    assert not np.array_equal(other[0], shapes.digits(2, train=200, test=100)[0])


def test_persian_split_is_disjoint_and_without_doubles():               # no np.unique
    images = persian()
    rows = [row.numpy().tobytes() for row in torch.cat([images.train, images.test])]
    assert len(set(rows)) == len(rows)


def test_persian_digits_are_told_apart_and_vary():                      # one font; no thickness
    images = persian()
    ink = images.train.double().flatten(1)
    means = torch.stack([ink[images.train_labels == c].mean(0) for c in range(10)])
    guess = torch.cdist(images.test.double().flatten(1), means).argmin(1)
    assert 0.55 < (guess == images.test_labels).double().mean()
    amount = torch.stack([ink[images.train_labels == c].sum(1) for c in range(10)])
    assert 80 < amount.mean() < 160 and (amount.std(1) / amount.mean(1) > 0.31).all() and amount.min() > 0
    assert amount.mean(1).argmin() == 0                                 # the zero is a dot
    edge = torch.cat([images.train[:, 0, [0, -1]].flatten(), images.train[:, 0, :, [0, -1]].flatten()])
    assert edge.double().mean() < 0.01                                  # nothing is cut at the border
    at = torch.cartesian_prod(torch.arange(28.0), torch.arange(28.0))
    centre = ink @ at / ink.sum(1, keepdim=True) - 13.5
    assert (centre.mean(0).abs() < 1.5).all() and (centre.std(0) > 1).all()


@given(seeds)
@settings(max_examples=10)
def test_distance_is_to_the_nearest_set_pixel(seed):                    # .T dropped; square of one axis
    mask = np.random.default_rng(seed).random((9, 9)) < 0.1
    mask[seed % 9, 3] = True
    at, ink = np.argwhere(np.ones((9, 9))), np.argwhere(mask)
    brute = np.sqrt(((at[:, None] - ink) ** 2).sum(-1).min(1)).reshape(9, 9)
    assert np.allclose(shapes._distance(mask), brute, atol=1e-5)


def test_bilinear_is_exact_on_planes():                                 # x and y exchanged; at + side
    i, j = np.mgrid[:8, :8].astype(np.float32)
    fields = np.stack([np.stack([font + 10 * digit + 2 * i + 3 * j for digit in range(10)]) for font in range(2)])
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 6.9, (2, 5, 3, 3)).astype(np.float32)
    font, label = rng.integers(0, 2, 5), rng.integers(0, 10, 5)
    expected = (font + 10 * label)[:, None, None] + 2 * y + 3 * x
    assert np.allclose(shapes._bilinear(fields.astype(np.float32), font, label, x, y), expected, atol=1e-3)


# ---- dSprites: the grid


@given(st.lists(st.integers(0, 737_279), min_size=1, max_size=20))
def test_index_and_factors_are_a_bijection(index):                      # strides reversed; sizes[k:] for sizes[k + 1:]
    factors = GRID.factors(index)
    assert torch.equal(GRID.index(factors), torch.tensor(index))
    assert factors.tolist() == np.stack(np.unravel_index(index, SIZES), -1).tolist()


def test_the_grid_is_the_published_one():                               # endpoint=False; scales from 0.6
    x = drawn()
    assert x.source == "drawn" and x.shape == (1, 64, 64) and x.dim == 4096 and x.levels == 2 and x.classes == 3
    assert x.factor_names == ("color", "shape", "scale", "orientation", "posX", "posY") and x.factor_sizes == SIZES
    assert x.factor_values[3][-1] == 2 * np.pi and x.factor_values[3][13] == 13 * (2 * np.pi / 39)
    assert x.factor_values[2].tolist() == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0] and x.factor_values[5][31] == 1
    assert x.class_names == ("square", "ellipse", "heart") and len(x.train) == 614_400 and len(x.test) == 122_880


def test_the_split_is_disjoint_seeded_and_everything():                 # cut at the front for both; the seed ignored
    x = drawn()
    seen = torch.zeros(737_280, dtype=torch.int8)
    seen[x.train.index] += 1
    seen[x.test.index] += 2
    assert seen.bincount().tolist() == [0, 614_400, 122_880]
    assert torch.equal(x.test.index, data.load("dsprites", "/nowhere").test.index)
    assert not torch.equal(x.test.index, data.load("dsprites", "/nowhere", seed=1).test.index)
    for part, labels in ((x.train, x.train_labels), (x.test, x.test_labels)):
        assert torch.equal(x.factors(part.index)[:, 1], labels) and labels.dtype == torch.int64
        assert (labels.bincount() / len(labels) - 1 / 3).abs().max() < 3e-3


# ---- dSprites: the drawing


@given(classes, st.integers(0, 1))
def test_a_step_moves_the_centre_by_a_constant(factors, axis):          # 0.25 for 0.5; places exchanged; no + 0.5
    path = torch.tensor(factors).repeat(32, 1)
    path[:, 4 + axis] = torch.arange(32)
    at = centre(GRID.draw(path))
    place = 16 + 32 * path[:, 4 + axis] / 31
    offset = at[:, axis] - place
    assert offset.max() - offset.min() < 0.9 and (at[:, 1 - axis] - at[0, 1 - axis]).abs().max() < 0.5
    assert abs(np.polyfit(np.arange(32), at[:, axis].numpy(), 1)[0] - 32 / 31) < 0.015
    if factors[1] < 2:                                                  # a heart's middle is not its centre of mass
        assert offset.abs().max() < 0.51                                # an unturned square has whole pixels


@given(classes)
def test_area_grows_as_the_square_of_scale(factors):                    # / scale dropped; scale.sqrt()
    path = torch.tensor(factors).repeat(6, 1)
    path[:, 2] = torch.arange(6)
    area = GRID.draw(path).double().sum((1, 2, 3))
    full = (19.2**2, np.pi * 12.765 * 7.215, 224)[factors[1]]
    assert ((area / torch.linspace(0.5, 1, 6).square() - full).abs() / full < 0.09).all()


@given(classes)
def test_orientation_is_periodic_and_turns_to_the_left(factors):        # sin_ of the other sign; square as an ellipse
    path = torch.tensor(factors).repeat(2, 1)
    path[:, 3] = torch.tensor([0, 39])
    first, last = GRID.draw(path)
    assert (first != last).sum() <= 2                                   # sin(2 pi) is -2e-16: a pixel on the edge
    turn = torch.tensor([[1.0, 0], [0, 1.0]])                           # a quarter, which is not on the grid
    one = [torch.tensor([v]) for v in (factors[1] + 1.0, 0.5 + factors[2] / 10)]
    place = torch.tensor([0.5])
    still, quarter = (shapes.draw_sprites(*one, t[None], place, place)[0, 0] for t in turn)
    assert (still.rot90() != quarter).sum() <= 2
    if factors[1] == 0:
        assert (still != quarter).sum() <= 2
    if factors[1] == 2:                                                 # upright at 0, its left half the mirrored right
        assert torch.equal(still, still.flip(1)) and still[:32].sum() > still[32:].sum()


def test_sprites_stay_whole_at_every_size_and_reach():                  # reach 12; window clamp dropped
    corners = torch.cartesian_prod(torch.zeros(1).long(), torch.arange(3), torch.tensor([5]), torch.arange(0, 40, 3),
                                   torch.tensor([0, 31]), torch.tensor([0, 31]))
    whole = GRID.draw(corners)
    rim = torch.cat([whole[..., 0, :], whole[..., -1, :], whole[..., 0], whole[..., -1]], -1)
    assert rim.sum() == 0
    middle = corners.clone()
    middle[:, 4:] = 15
    assert (whole.sum((1, 2, 3)) - GRID.draw(middle).sum((1, 2, 3))).abs().max() <= 40
    for size in (1, 8, 16, 32, 48, 128):
        small = shapes.Sprites(size).draw(corners)
        assert small.shape == (len(corners), 1, size, size)
        if size >= 16:
            exact = torch.tensor([19.2**2, np.pi * 12.765 * 7.215, 224])[corners[:, 1]] / 4096
            assert (small.double().mean((1, 2, 3)) / exact - 1).abs().max() < 8 / size


def test_agreement_with_the_published_rows(real_data):                  # 9.5 for 9.6; 7.3; the heart's 1.437; -sin
    with np.load(real_data / "dsprites" / "dsprites_subset.npz") as file:
        index, real = (torch.as_tensor(file[key][::4]) for key in ("original_dataset_indices", "imgs"))
    mine = torch.cat([GRID.images(part) for part in index.split(500)])[:, 0]
    kind = GRID.factors(index)[:, 1]
    both, either, wrong = (v.long().sum((1, 2)) for v in (mine & real, mine | real, mine != real))
    for k in range(3):                                                  # all 20,000: IoU 0.9997, 0.9997, 0.9995
        iou = (both / either)[kind == k]
        assert iou.mean() > 0.999 and iou.min() > 0.8 and (wrong[kind == k] == 0).double().mean() > 0.92
        assert wrong[kind == k].double().mean() / 4096 < 3e-5


def test_drawing_is_the_same_alone_and_in_company():                    # index[0] for index; a shared place
    index = torch.randint(0, 737_280, (40,), generator=torch.Generator().manual_seed(0))
    together = GRID.images(index)
    assert together.dtype == torch.uint8 and set(together.unique().tolist()) == {0, 1}
    assert all(torch.equal(GRID.images(i[None])[0], image) for i, image in zip(index, together))
    assert torch.equal(GRID.draw(GRID.factors(index)), together)


# ---- images on demand


def test_drawn_stands_where_a_tensor_would():                           # reshape lost; blocks in another order
    x = drawn().test
    assert len(x) == 122_880 and x.dim() == 4 and x.shape == (122_880, 1, 64, 64) and x.dtype == torch.uint8
    assert x.max() == 1 and x[0].shape == (1, 64, 64) and x[-1].sum() > 0 and x[3:5].shape == (2, 1, 64, 64)
    i = torch.randint(0, len(x), (2, 3))
    assert x[i].shape == (2, 3, 1, 64, 64) and torch.equal(x[i][1, 2], x[int(i[1, 2])])
    long = torch.arange(1500)
    assert torch.equal(x[long][1100:], x[1100:1500]) and torch.equal(x.to("cpu")[7], x[7])
    assert len(x[i[:0]]) == 0


def test_batches_are_the_generators_and_labels_fit():                   # labels of another split
    x = drawn()
    batches = x.batches(64, labels=True)
    torch.manual_seed(5)
    images, labels = next(batches)
    torch.manual_seed(5)
    index = x.train.index[torch.randint(614_400, (64,))]
    assert torch.equal(images, x.scale(x.draw(x.factors(index)))) and torch.equal(labels, x.factors(index)[:, 1])
    held, labels = x.sample(50, torch.Generator().manual_seed(0), labels=True)
    again = x.sample(50, torch.Generator().manual_seed(0))
    assert torch.equal(held, again) and held.dtype == torch.float32 and set(held.unique().tolist()) == {-1, 1}
    area = x.unscale(held).double().sum((1, 2, 3))
    assert (area[labels == 0].mean() > area[labels == 2].mean())


def test_the_metrics_take_drawn_images():
    x = drawn()
    classifier = judges.Classifier(1, 3, 2).eval()
    found = judges.images(x.train[:40], x, classifier=classifier.float())
    assert found["ink"]["value"] < 2
    judges.train_classifier(x.train, x.train_labels, 3, 2, steps=1, batch=4, progress=False)


def test_what_the_grid_refuses():
    for index in ([737_280], [-1], [5, 10**9]):
        with pytest.raises(ValueError, match="images 0 to 737279"):
            GRID.factors(index)
    for factors in ([[0, 3, 0, 0, 0, 0]], [[0, 0, 0, 0, 0, -1]], [[0, 0, 0]], [[0.5] * 6]):
        with pytest.raises(ValueError, match=r"below \(1, 3, 6, 40, 32, 32\)"):
            GRID.draw(factors)
    with pytest.raises(ValueError, match="size 0 is impossible for dsprites"):
        data.load("dsprites", "/nowhere", size=0)


# ---- dSprites: published files


def write_sprites(path, index, columns=6, **change):
    path.parent.mkdir(parents=True, exist_ok=True)
    factors = GRID.factors(index)
    values = np.stack([GRID.values[k][factors[:, k]] for k in range(6)], -1)
    arrays = {"imgs": GRID.images(torch.as_tensor(index))[:, 0].numpy(), "latents_classes": factors[:, -columns:].numpy(),
              "latents_values": values[:, -columns:], "metadata": np.array([{"pickled": 1}], dtype=object)}
    np.savez_compressed(path, **(arrays | change))


@pytest.mark.parametrize("columns", [6, 5])
def test_a_published_file_is_read_in_place_of_the_drawing(tmp_path, columns):   # bits reversed; row order; value table
    index = np.random.default_rng(0).permutation(737_280)[:60]
    write_sprites(tmp_path / "dsprites" / "dsprites_some.npz", index, columns)
    x = data.load("dsprites", tmp_path)
    assert x.source.endswith("dsprites_some.npz") and len(x.train) == 50 and len(x.test) == 10
    rows = torch.cat([x.train.index, x.test.index])
    assert rows.sort()[0].tolist() == list(range(60))
    assert torch.equal(torch.cat([x.train[:], x.test[:]]), GRID.images(torch.as_tensor(index))[rows])
    assert torch.equal(x.factors(rows), GRID.factors(index)[rows]) and torch.equal(x.index(x.factors(rows)), rows)
    assert torch.equal(x.draw(x.factors([7])), GRID.images(torch.as_tensor(index[7:8])))
    assert torch.equal(x.test_labels, x.factors(x.test.index)[:, 1])
    turned = x.factors(3)[3]
    assert x.factor_values[3][turned] == GRID.values[3][turned]
    absent = next(f for f in GRID.factors(torch.arange(99)) if not (GRID.factors(index) == f).all(1).any())
    with pytest.raises(ValueError, match="lacks 1 of the images|below"):
        x.draw(absent[None])


def test_the_published_name_comes_first_and_halves_are_areas(tmp_path):  # min for max; < 0.5
    write_sprites(tmp_path / "dsprites" / "dsprites_more.npz", np.arange(100))
    write_sprites(tmp_path / "dsprites" / "dsprites_ndarray_x.npz", np.arange(500_000, 500_020))
    x = data.load("dsprites", tmp_path, size=32)
    assert len(x.train) == 17 and x.shape == (1, 32, 32)
    whole = data.load("dsprites", tmp_path).train[:].float()
    area = whole.reshape(17, 1, 32, 2, 32, 2).mean((3, 5))
    assert torch.equal(x.train[:], (area >= 0.5).to(torch.uint8))


def test_published_files_that_are_wrong_are_refused(tmp_path):          # each condition in turn
    path = tmp_path / "dsprites" / "dsprites_x.npz"
    changes = [dict(imgs=np.zeros((9, 32, 32), np.uint8)), dict(imgs=np.full((9, 64, 64), 2, np.uint8)),
               dict(imgs=np.zeros((8, 64, 64), np.uint8)), dict(latents_classes=np.zeros((9, 4), int)),
               dict(latents_classes=np.full((9, 6), -1)), dict(latents_classes=np.zeros((9, 6))),
               dict(latents_values=np.zeros((9, 5))), dict(imgs=np.array([{}], dtype=object)),
               dict(latents_classes=np.full((9, 6), 64)), dict(imgs=np.zeros((9, 64, 64)))]
    for change in changes:
        write_sprites(path, np.arange(9), **change)
        with pytest.raises(ValueError, match="dsprites_x.npz: expected"):
            data.load("dsprites", tmp_path)


def test_the_sample_of_the_published_file(real_data):
    x = data.load("dsprites", real_data)
    assert x.factor_sizes == (1, 3, 6, 10, 16, 16) and len(x.train) == 38_400 and len(x.test) == 7_680
    factors = x.factors(x.test.index[:200])
    real = x.test[:200]
    assert torch.equal(x.draw(factors), real)
    mine = GRID.draw(factors * torch.tensor([1, 1, 1, 4, 2, 2]))        # every fourth turn, every second place
    assert ((mine != real).sum((1, 2, 3)) == 0).double().mean() > 0.85


# ---- faces


def some(n, seed=0):
    """Factors (n, 25): coins and uniforms, where the extremes of the uniforms come often."""
    f = torch.rand(n, 25, generator=torch.Generator().manual_seed(seed))
    f[:, :8] = f[:, :8].round()
    f[:, 8:] = (f[:, 8:] * 1.6 - 0.3).clamp(0, 1)
    return f


faces = functools.cache(lambda: data.load("faces", size=32))


def test_faces_know_their_attributes():                                 # the seed ignored; labels of another column
    x = faces()
    assert x.shape == (3, 32, 32) and x.levels == 256 and len(x.train) == 4096 and len(x.test) == 768
    assert x.attribute_names == shapes.ATTRIBUTES and x.class_names == ("neutral", "smile") and x.classes == 2
    assert x.train_attributes.dtype == torch.bool and x.train_attributes.shape == (4096, 8)
    assert torch.equal(x.train_labels, x.train_attributes[:, 0].long()) and x.train_labels.dtype == torch.int64
    assert torch.equal(x.train_factors[:, :8] == 1, x.train_attributes) and len(x.factor_names) == 25
    assert torch.equal(x.draw(x.test_factors[5:9]), x.test[5:9])
    one, again, other = (shapes.faces(seed, 16, train=8, test=4) for seed in (1, 1, 2))
    assert torch.equal(one["train"], again["train"]) and torch.equal(one["test_factors"], again["test_factors"])
    assert not torch.equal(one["train_factors"], other["train_factors"])
    whole = torch.cat([x.train, x.test]).flatten(1)
    assert len(whole.unique(dim=0)) == len(whole)                       # no face twice, so none in both splits


def test_attributes_are_independent_of_all_else():                      # rows unshuffled; an attribute from a nuisance
    x = faces()
    for attributes, factors in ((x.train_attributes, x.train_factors), (x.test_attributes, x.test_factors)):
        code = (attributes.long() * 2 ** torch.arange(8)).sum(1)
        assert set(code.bincount(minlength=256).tolist()) == {len(code) // 256}
        both = torch.corrcoef(factors.double().T)
        assert both[:8, :8].fill_diagonal_(0).abs().max() < 1e-12
        assert both.fill_diagonal_(0).abs().max() < 4.5 / len(code) ** 0.5      # 232 of them, standard error 1 / sqrt(n)
        order = torch.corrcoef(torch.stack([code.double(), torch.arange(len(code)).double()]))[0, 1]
        assert order.abs() < 4 / len(code) ** 0.5
    uniform = x.train_factors[:, 8:].double()
    assert (uniform.mean(0) - 0.5).abs().max() < 5 * 12**-0.5 / 64 and (uniform.var(0) - 1 / 12).abs().max() < 0.01


REGIONS = {                                                             # left, top, right, bottom of an upright face
    "smile": (-0.29, 0.2, 0.29, 0.62), "open_mouth": (-0.29, 0.2, 0.29, 0.66), "closed_eyes": (-0.38, -0.2, 0.38, 0.12),
    "glasses": (-0.62, -0.25, 0.62, 0.15), "beard": (-0.55, -0.06, 0.55, 0.66), "hat": (-0.75, -1.0, 0.75, -0.1),
    "long_hair": (-0.75, -0.8, 0.75, 0.85), "fair_hair": (-0.75, -0.8, 0.75, 0.85)}


@pytest.mark.parametrize("name", shapes.ATTRIBUTES)
def test_an_attribute_is_seen_and_changes_only_its_region(name):        # opacity dropped; the brow by closed_eyes
    f, k = some(64, 1), shapes.ATTRIBUTES.index(name)
    for fixed in ("tilt", "turn", "move_x", "move_y", "zoom"):
        f[:, 8 + shapes.NUISANCES.index(fixed)] = 0.5
    off, on = f.clone(), f.clone()
    off[:, k], on[:, k] = 0, 1
    change = (shapes.draw_faces(off).int() - shapes.draw_faces(on).int()).abs().sum(1)
    at = (torch.arange(128) + 0.5) / 64 - 1
    x, y = at / 1.23, (at - 0.08) / 1.23                                # zoom and move_y in the middle of their range
    left, top, right, bottom = REGIONS[name]
    inside = ((x > left) & (x < right)) & ((y > top) & (y < bottom))[:, None]
    assert change[:, ~inside].max() <= 3                                # no more than rounding of the layers
    assert ((change > 40).sum((1, 2)) > 30).all()                       # in each of the faces, whatever else is there


def test_half_an_attribute_lies_between():                             # an attribute rounded
    f = some(8, 2)
    low, mid, high = (shapes.draw_faces(torch.cat([torch.full((8, 8), v), f[:, 8:]], 1)).double() for v in (0, 0.5, 1))
    assert (mid - low).abs().mean() < (high - low).abs().mean() > (high - mid).abs().mean()


def test_no_window_cuts_what_it_holds(monkeypatch):                     # any window a tenth smaller
    f = some(96, 3)
    f[:32, :8] = 1
    faces = shapes.draw_faces(f)
    monkeypatch.setattr(shapes._Canvas, "window", lambda self, *place: self)
    whole = shapes.draw_faces(f)
    assert (whole != faces).any(1).sum() <= 20                          # of 1.6 million pixels


@given(seeds, st.floats(0.05, 0.4), st.floats(0.05, 0.4))
@settings(max_examples=10)
def test_an_ellipse_is_a_signed_distance_at_its_edge(seed, r_x, r_y):   # - row_x; r / 2; sin of the other sign
    g = torch.Generator().manual_seed(seed)
    turn, x_0, y_0, zoom = (torch.rand(3, 1, 1, generator=g, dtype=torch.float32) * 0.4 + v for v in (0, -0.2, -0.2, 0.8))
    canvas = shapes._Canvas.blank(200, turn, x_0, y_0, zoom)
    part = canvas.window(-0.75, -0.8 / 1.2, 0.8 / 1.2, 0.75)
    assert part.rgb.shape[2:] == (170, 170)
    x, y = part.xy()
    at = (torch.arange(200, dtype=torch.float32) + 0.5) / 100 - 1
    X, Y = (at[10:180] - x_0), (at[20:190, None] - y_0)                 # by hand: turned back and scaled
    assert torch.allclose(x, (turn.cos() * X + turn.sin() * Y) / zoom, atol=1e-5)
    assert torch.allclose(y, (turn.cos() * Y - turn.sin() * X) / zoom, atol=1e-5)
    k = ((x - 0.1) / r_x) ** 2 + ((y - 0.2) / r_y) ** 2 - 1
    d = part.ellipse(0.1, 0.2, r_x, r_y)
    assert torch.allclose(d, k * r_x * r_y / (r_x + r_y), atol=2e-4, rtol=1e-3)
    assert torch.allclose(part.above(0.1, 0.3), y - 0.1 - 0.3 * x, atol=1e-5)
    circle = part.ellipse(0.1, 0.2, r_x, r_x)
    near = circle.abs() < 0.05 * r_x
    assert (circle - (torch.hypot(x - 0.1, y - 0.2) - r_x))[near].abs().max() < 0.003 * r_x


def test_arcs_are_at_their_thickness():                                 # rise of the other sign; no slope
    x, y = (v.float() for v in torch.meshgrid(torch.linspace(-1, 1, 201), torch.linspace(-1, 1, 201), indexing="xy"))
    half, rise, thick = torch.tensor(0.5), 0.2, 0.05
    d = shapes._arc(x, y, half, rise, thick)
    t = torch.linspace(-0.5, 0.5, 400)
    curve = torch.stack([t, rise * (1 - (t / half) ** 2)], -1).float()
    exact = torch.cdist(torch.stack([x, y], -1).reshape(-1, 2), curve).amin(1).reshape(201, 201) - thick
    edge = exact.abs() < 0.02
    assert (d - exact)[edge].abs().max() < 0.016


def test_grey_is_the_luma_and_sizes_are_sizes():
    f = some(20, 4)
    colour, grey = shapes.draw_faces(f, 48).double(), shapes.draw_faces(f, 48, grey=True)
    assert grey.shape == (20, 1, 48, 48) and colour.shape == (20, 3, 48, 48)
    luma = (colour * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    assert (grey - luma).abs().max() <= 1.01
    fine = shapes.draw_faces(f, 96).double().reshape(20, 3, 48, 2, 48, 2).mean((3, 5))
    assert (fine - colour).abs().mean() < 4                             # the same picture, only finer
    assert shapes.draw_faces(f, 1).shape == (20, 3, 1, 1)


def test_faces_are_the_same_on_any_number_of_threads():
    f, threads = some(20, 5), torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            index = torch.arange(0, 737_280, 9000)
            results.append((shapes.draw_faces(f), GRID.images(index)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert torch.equal(shapes.draw_faces(f[7:8]), results[0][0][7:8])   # alone as in company


def test_impossible_faces_are_refused():
    for factors in (torch.zeros(3, 24), torch.zeros(25), torch.full((1, 25), 1.1), torch.full((1, 25), float("nan"))):
        with pytest.raises(ValueError, match=r"factors \(B, 25\) from 0 to 1"):
            shapes.draw_faces(factors)
    with pytest.raises(ValueError, match="at least 1"):
        shapes.draw_faces(torch.zeros(1, 25), 0)


# ---- real faces


def write_celeba(folder, n, packed=False, attributes=("Male", "Smiling")):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(n)
    signs = rng.choice([-1, 1], (n, len(attributes)))
    rows = [f"{i:06d}.jpg " + "  ".join(map(str, row)) for i, row in enumerate(signs)]
    (folder / "list_attr_celeba.txt").write_bytes("\r\n".join([str(n), " ".join(attributes) + " ", *rows, ""]).encode())
    archive = zipfile.ZipFile(folder / "img_align_celeba.zip", "w") if packed else None
    for i in range(n):
        buffer = io.BytesIO()
        Image.fromarray(np.full((22, 18, 3), 5 * i, np.uint8)).save(buffer, "PNG")
        if packed:
            archive.writestr(f"img_align_celeba/{i:06d}.jpg", buffer.getvalue())
        else:
            (folder / "img_align_celeba").mkdir(exist_ok=True)
            (folder / "img_align_celeba" / f"{i:06d}.jpg").write_bytes(buffer.getvalue())
    if packed:
        archive.close()
    return signs == 1


@pytest.mark.parametrize("packed", [False, True])
def test_celeba_keeps_each_row_with_its_picture(tmp_path, packed):      # rows unpermuted; last sixth; == -1
    truth = write_celeba(tmp_path / "celeba", 20, packed)
    x = data.load("celeba", tmp_path, size=16)
    assert x.train.shape == (16, 3, 16, 16) and x.test.shape == (4, 3, 16, 16)
    assert x.attribute_names == ("Male", "Smiling") and x.class_names == ("neutral", "smile")
    for images, attributes, labels in ((x.train, x.train_attributes, x.train_labels),
                                       (x.test, x.test_attributes, x.test_labels)):
        file = images[:, 0, 0, 0].long() // 5
        assert torch.equal(attributes, torch.as_tensor(truth)[file]) and torch.equal(labels, attributes[:, 1].long())
    seen = torch.cat([x.train, x.test])[:, 0, 0, 0] // 5
    assert seen.sort()[0].tolist() == list(range(20))
    again, other = data.load("celeba", tmp_path, size=16), data.load("celeba", tmp_path, size=16, seed=1, grey=True)
    assert torch.equal(again.test, x.test) and not torch.equal(other.test_attributes, x.test_attributes)
    assert other.shape == (1, 16, 16) and data.load("celeba", tmp_path).shape == (3, 128, 128)


def test_celeba_without_smiles_and_under_another_name(tmp_path):        # glob of the wrong folder; min for max
    write_celeba(tmp_path / "celeba-a", 10, attributes=("Male",))
    write_celeba(tmp_path / "celeba-b", 6)
    x = data.load("celeba", tmp_path, size=4)
    assert x.source.endswith("celeba-b") or len(x.train) == 8
    longest = max((tmp_path / f"celeba-{k}/list_attr_celeba.txt" for k in "ab"), key=lambda p: p.stat().st_size)
    assert x.source == str(longest.parent)
    male = data.load("celeba-a", tmp_path, size=4)
    assert male.classes is None and male.train_labels is None and male.attribute_names == ("Male",)
    assert len(male.sample(3)) == 3


def test_folders_of_faces_that_are_wrong(tmp_path):                     # without the condition in question
    for name in ("celeba", "lfw-smiles", "celeba-none"):
        with pytest.raises(FileNotFoundError, match=f"{name}: .*--data-dir"):
            data.load(name, tmp_path)
    write_celeba(tmp_path / "celeba", 6)
    listed = tmp_path / "celeba" / "list_attr_celeba.txt"
    lines = listed.read_text().splitlines()
    listed.write_text("\n".join(["5", *lines[1:-1]]))
    with pytest.raises(ValueError, match="found none for 1: 000005.jpg"):
        data.load("celeba", tmp_path)
    for text in ("6", "6\n", "\n".join(["7", *lines[1:]]), "\n".join([*lines[:3], "a.jpg 1", *lines[4:]]),
                 "\n".join([*lines[:3], "a.jpg 1 0", *lines[4:]])):
        listed.write_text(text)
        with pytest.raises(ValueError, match="list_attr_celeba.txt: expected"):
            data.load("celeba", tmp_path)
    (tmp_path / "lfw-smiles" / "smile").mkdir(parents=True)
    with pytest.raises(ValueError, match="each of two classes, found 1"):
        data.load("lfw-smiles", tmp_path)


def test_bad_pictures_are_skipped_only_when_asked(tmp_path):            # names and rows drift apart
    truth = write_celeba(tmp_path / "celeba", 12)
    for i in (3, 7):
        (tmp_path / "celeba" / "img_align_celeba" / f"{i:06d}.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="2 of 12 images cannot be read: .*000003.jpg.*000007.jpg"):
        data.load("celeba", tmp_path, size=4)
    with pytest.warns(UserWarning, match="000003.jpg.*000007.jpg.*left out"):
        x = data.load("celeba", tmp_path, size=4, skip_bad=True)
    assert len(x.train) == 8 and len(x.test) == 2
    file = x.train[:, 0, 0, 0].long() // 5
    assert torch.equal(x.train_attributes, torch.as_tensor(truth)[file])


def test_classes_in_folders(tmp_path):
    for k, name in enumerate(("smile", "neutral")):
        (tmp_path / "lfw-smiles" / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(np.full((4, 6), 100 * k + i, np.uint8)).save(tmp_path / "lfw-smiles" / name / f"{i}.png")
    x = data.load("lfw-smiles", tmp_path, size=4, grey=True)
    assert len(x.train) == 16 and x.class_names == x.attribute_names == ("neutral", "smile")
    assert torch.equal(x.train_labels == 0, x.train[:, 0, 0, 0] >= 100)
    assert torch.equal(x.test_attributes.long().argmax(1), x.test_labels)


def test_celeba_samples(real_data):
    x = data.load("celeba-178x218", real_data, grey=True)
    assert (len(x.train), len(x.test), x.shape) == (26, 6, (1, 128, 128)) and len(x.attribute_names) == 40
    assert 60 < x.train.double().mean() < 200 and x.train_attributes.sum() + x.test_attributes.sum() > 0


def test_lfw_smiles(real_data):
    x = data.load("lfw-smiles", real_data, size=16)
    assert (len(x.train), len(x.test)) == (963, 240) and x.class_names == ("non_smile", "smile")
    assert torch.cat([x.train_labels, x.test_labels]).bincount().tolist() == [603, 600]
