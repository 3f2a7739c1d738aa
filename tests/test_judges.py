"""judges.py: images are judged by a network that reads them."""

import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import judges
import metrics


def rng(seed):
    return torch.Generator().manual_seed(seed)


# ---- scores in any features


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_classifier_score_runs_from_one_to_the_number_of_classes(K, copies, seed):
    sure = torch.eye(K).repeat(copies, 1)                               # mean(0) -> mean(1); exp left out; the sign
    assert judges.classifier_score(sure) == pytest.approx(K)
    assert judges.classifier_score(sure[:1].repeat(7, 1)) == pytest.approx(1)
    p = torch.rand(9, K, generator=rng(seed)).softmax(1)
    assert 1 <= judges.classifier_score(p) <= K
    assert judges.classifier_score(p[:1].repeat(5, 1)) == pytest.approx(1)
    joint = p / len(p)                                                  # exp of the information between image and class
    information = (joint * (joint / (joint.sum(0) * joint.sum(1, keepdim=True))).log()).sum()
    assert judges.classifier_score(p) == pytest.approx(information.exp().item())


def test_precision_and_recall_of_points_on_a_line():
    """Real 0, 1, 2, 10: with k = 1 their balls are [-1, 1], [0, 2], [1, 3], [2, 18]."""
    real = torch.tensor([[0.0], [1], [2], [10]])
    fake = torch.tensor([[-1.01], [-1.0], [18.0], [18.01], [2.5]])      # kthvalue(k); < for <=
    precision, recall = judges.precision_recall(real, fake, 1)
    assert precision == 3 / 5
    assert recall == 3 / 4                                              # 2.5 reaches to -1.0 and to 6; 10 is alone
    assert judges.precision_recall(fake, real, 1) == (recall, precision)


@given(st.integers(0, 10**6))
def test_precision_and_recall_by_brute_force(seed):
    real, fake = torch.randn(12, 3, generator=rng(seed)), 1.5 * torch.randn(9, 3, generator=rng(seed + 1))
    radius = [sorted((a - b).norm().item() for b in real)[3] for a in real]         # [0] is the point itself
    inside = [any((f - a).norm() <= r for a, r in zip(real, radius)) for f in fake]
    assert judges.precision_recall(real, fake)[0] == pytest.approx(sum(inside) / 9)
    assert judges.precision_recall(real, real) == (1, 1)
    assert judges.precision_recall(real, fake + 1000) == (0, 0)
    with pytest.raises(ValueError, match="more than 3 images; got 12 and 3"):
        judges.precision_recall(real, fake[:3])


def test_nearest_accuracy_asks_the_nearest():                           # argmax; labels swapped
    known, labels = torch.tensor([[0.0, 0], [1, 0], [5, 5]]), torch.tensor([0, 1, 2])
    codes = torch.tensor([[0.4, 0.0], [0.6, 0.0], [9.0, 9.0], [0.1, 0.1]])
    assert judges.nearest_accuracy(codes, torch.tensor([0, 1, 2, 1]), known, labels) == 0.75
    assert judges.nearest_accuracy(codes.repeat(600, 1), torch.tensor([0, 1, 2, 1]).repeat(600), known, labels) == 0.75


# ---- a small classifier of the real set


def bars(n, seed, levels=256):
    """Three classes of 10 x 12: a row, a column, both, at random places, with a little noise."""
    g = rng(seed)
    y = torch.randint(3, (n,), generator=g)
    x = torch.zeros(n, 1, 10, 12, dtype=torch.float64)
    i, j = torch.randint(2, 8, (n,), generator=g), torch.randint(2, 10, (n,), generator=g)   # a shift keeps them
    x[torch.arange(n), 0, i] = (y != 1).double()[:, None]
    column = x[torch.arange(n), 0, :, j]
    x[torch.arange(n), 0, :, j] = torch.where((y != 0)[:, None], torch.ones_like(column), column)
    if levels > 2:
        x = (0.9 * x + 0.1 * torch.rand(x.shape, generator=g)) * (levels - 1)
    return x.to(torch.uint8), y


class Bars:
    name, classes, class_names, shape = "bars", 3, ("row", "column", "both"), (1, 10, 12)

    def __init__(self, levels, labels=True):
        self.levels = levels
        self.train, self.train_labels = bars(2000, 0, levels)
        self.test, self.test_labels = bars(700, 1, levels)
        if not labels:
            self.train_labels = self.test_labels = None


@pytest.fixture(scope="module")
def classifier():
    truth = Bars(256)
    return judges.train_classifier(truth.train, truth.train_labels, 3, 256, steps=80, progress=False)


def test_classifier_learns_and_leaves_the_global_generator_alone():     # fork_rng left out
    truth = Bars(2)
    before = torch.get_rng_state()
    fit = lambda seed: judges.train_classifier(truth.train, truth.train_labels, 3, 2, seed, steps=30, batch=48,
                                                progress=False)
    first, again, other = fit(0), fit(0), fit(1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.head.weight, again.head.weight) and not torch.equal(first.head.weight, other.head.weight)
    assert not first.training and first.head.weight.dtype == torch.float32
    assert (first(truth.test).argmax(-1) == truth.test_labels).double().mean() > 0.9
    assert first.features(truth.test[:5]).shape == (5, 64)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 40, 64)])
def test_classifier_takes_any_size(shape):                              # a pool that rounds to nothing
    x = torch.randint(256, (20, *shape), generator=rng(0), dtype=torch.uint8)
    model = judges.train_classifier(x, torch.arange(20) % 2, 2, 256, steps=2, batch=8, progress=False)
    assert model(x).shape == (20, 2) and model(x).isfinite().all()


def test_images_of_the_truth_sit_at_the_floor_and_defects_do_not(classifier):
    truth = Bars(256)                                                   # train for test in `second`; [-n:] for [:n]
    before = torch.get_rng_state()
    good = judges.images(bars(300, 2)[0], truth, classifier=classifier)
    assert torch.equal(before, torch.get_rng_state())
    assert list(good) == ["class_balance", "recognised", "classifier_frechet", "classifier_score", "precision", "recall",
                          "classifier_accuracy"]
    assert all(abs(good[name]["value"] - good[name]["floor"]) < 0.1 for name in ("precision", "recall", "classifier_score"))
    assert good["classifier_accuracy"]["value"] > 0.95 and good["recognised"]["floor"] > 0.8
    assert 0 < good["classifier_frechet"]["value"] < 3 * good["classifier_frechet"]["floor"]
    assert abs(good["recognised"]["value"] - good["recognised"]["floor"]) < 0.05
    x, y = bars(1200, 3)
    one = judges.images(x[y == 1][:300], truth, classifier=classifier)
    share = (truth.train_labels == 1).double().mean().item()
    assert one["class_balance"]["value"] == pytest.approx(100 * (1 - share), abs=1.5)
    assert one["classifier_frechet"]["value"] > 10 * one["classifier_frechet"]["floor"]
    assert one["classifier_score"]["value"] < 1.5 < 2.5 < one["classifier_score"]["floor"] <= 3
    assert one["recall"]["value"] < 0.6 and one["precision"]["value"] > 0.7  # one class of three, each of it good
    grey = judges.images(torch.full((300, 1, 10, 12), 90, dtype=torch.uint8), truth, classifier=classifier)
    assert grey["class_balance"]["value"] > 60
    assert grey["class_balance"]["floor"] == one["class_balance"]["floor"] < 10
    between = (x[y == 0][:300].int() + x[y == 1][:300].int()) // 2      # neither this nor that
    assert judges.images(between.to(torch.uint8), truth, classifier=classifier)["recognised"]["value"] < \
        good["recognised"]["floor"] - 0.05


def test_images_judges_by_shares_confidence_and_held_out_images():      # >= 0.9 -> 0.8; argmax -> argmin; [:n]
    class Reader:                                                       # knows the class from the first two pixels
        def features(self, x):
            return x[:, 0, 0, :2].double()

        def head(self, features):
            return torch.stack([features[:, 1].div(100), torch.zeros(len(features)), torch.zeros(len(features))],
                               -1).roll(0, -1) + 20 * torch.nn.functional.one_hot(features[:, 0].long(), 3) * \
                (features[:, 1] == 0).double()[:, None]

        def parameters(self):
            return iter([torch.zeros(())])

    def drawn(classes, doubt):
        x = torch.zeros(len(classes), 1, 8, 8, dtype=torch.uint8)
        x[:, 0, 0, 0], x[:, 0, 0, 1] = torch.tensor(classes), torch.tensor(doubt)
        return x

    class Truth:
        levels, classes = 256, 3
        train, train_labels = drawn([0, 0, 1, 2], [0] * 4), torch.tensor([0, 0, 1, 2])
        test, test_labels = drawn([0, 1, 2, 0] * 10, [0] * 40), torch.tensor([0, 1, 2, 1] * 10)

    # logit 2.8: 0.891, below the bar; 3: 0.909, above it
    samples = drawn([0] * 5 + [1] * 5 + [0] * 10, [0] * 10 + [255] * 5 + [250] * 5)
    result = judges.images(samples, Truth, classifier=Reader())
    logits = Reader().head(Reader().features(samples)).softmax(-1)
    assert result["recognised"]["value"] == pytest.approx((logits.amax(-1) >= 0.9).double().mean().item())
    assert result["class_balance"]["value"] == pytest.approx(25)        # 15/20 against 1/2; 5/20, 1/4; none, 1/4
    assert result["classifier_accuracy"]["value"] == 0.75 and result["classifier_accuracy"]["floor"] is None
    assert result["recognised"]["floor"] == 1 and result["recognised"]["better"] == "higher"
    more = judges.images(samples.repeat(3, 1, 1, 1), Truth, classifier=Reader())
    assert more["class_balance"] == result["class_balance"]             # cut to half of the held-out images


def test_images_of_two_levels_and_without_labels():                     # ink without 100; levels - 1
    truth = Bars(2, labels=False)
    x = truth.test.clone()
    x[:, :, :2] = 1
    result = judges.images(x, truth)
    assert list(result) == ["pixel_sliced_w2", "ink"]
    held_out = torch.randperm(700, generator=rng(0))
    ink = lambda x: 100 * x.double().mean().item()
    real = ink(truth.test[held_out[350:]])
    assert result["ink"]["value"] == pytest.approx(abs(ink(x[:350]) - real))
    assert result["ink"]["floor"] == pytest.approx(abs(ink(truth.test[held_out[:350]]) - real))
    flat = lambda x: 2.0 * x.flatten(1)
    assert result["pixel_sliced_w2"]["value"] == pytest.approx(
        metrics.sliced_w2(flat(x[:350]), flat(truth.test[held_out[350:]])))
    assert result["pixel_sliced_w2"]["value"] > 2 * result["pixel_sliced_w2"]["floor"]


def test_images_refuses_what_are_no_images():                           # x.max() >= 256 in uint8 is x.max() >= 0
    truth = Bars(2, labels=False)
    for bad in (torch.zeros(4, 1, 10, 12), torch.zeros(4, 10, 12, dtype=torch.uint8), truth.test[:0]):
        with pytest.raises(ValueError, match="uint8 images"):
            judges.images(bad, truth)
    with pytest.raises(ValueError, match="0 .. 1, got 2"):
        judges.images(2 * truth.test, truth)
    with pytest.raises(ValueError, match="too few"):
        judges.images(truth.test[:1], truth)
    assert judges.images(truth.test[:2], truth)


# ---- Inception


def test_without_torchvision_or_its_weights_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ValueError, match="--fid needs torchvision"):
        judges.inception_features()
    weights = types.SimpleNamespace(IMAGENET1K_V1=types.SimpleNamespace(url="https://somewhere/inception.pth"))
    models = types.SimpleNamespace(Inception_V3_Weights=weights, inception_v3=None)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="the weights of Inception at .*inception.pth; fetch https://somewhere"):
        judges.inception_features()


def test_inception_gets_large_normalised_pictures_and_its_class_layer_is_left_out(monkeypatch, tmp_path):
    class Network(torch.nn.Module):                                     # keeps what it was shown
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x.mean((2, 3)))

    made = []
    monkeypatch.setitem(sys.modules, "torchvision.models", types.SimpleNamespace(
        Inception_V3_Weights=types.SimpleNamespace(IMAGENET1K_V1=types.SimpleNamespace(url="x/inception.pth")),
        inception_v3=lambda **options: made.append((options, Network().float())) or made[-1][1]))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(Network().float().state_dict(), tmp_path / "checkpoints" / "inception.pth")
    features = judges.inception_features()
    assert made[0][0]["transform_input"] is True and made[0][0]["weights"] is None and not made[0][1].training
    white, black = (features(torch.full((2, 3, 299, 299), v)) for v in (255.0, 0.0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(white[0].double(), (1 - mean) / std, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(black[0].double(), -mean / std, atol=1e-5, rtol=1e-5)


def test_inception_frechet_compares_with_held_out_images():             # the floor; levels - 1; grey as colour
    truth, shown = Bars(2), []

    def features(x):
        assert x.shape[1:] == (3, 299, 299) and 0 <= x.min() and 200 < x.max() <= 256
        shown.append(len(x))
        return x[:, :, ::60, ::60].flatten(1)[:, :6].double()

    found = judges.inception_frechet(bars(120, 5, 2)[0], truth, features)["inception_frechet"]
    assert sum(shown) == 3 * 120 and max(shown) <= 50
    white = judges.inception_frechet(torch.ones(120, 1, 10, 12, dtype=torch.uint8), truth, features)["inception_frechet"]
    assert white["value"] > 3 * found["value"] and white["floor"] == found["floor"] > 0
    with pytest.raises(ValueError, match="too few"):
        judges.inception_frechet(truth.test[:1], truth, features)
