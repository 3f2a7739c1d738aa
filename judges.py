"""What images look like to a network that reads them: a small classifier trained on the real set, or Inception.

    images(samples, truth) -> {name: metric}                images (N, C, H, W), uint8, against a data set
    train_classifier, judge                                 the reader: class probabilities and features
    precision_recall, classifier_score, nearest_accuracy    in any features
    inception_frechet(samples, truth)                       by torchvision's Inception, where it is installed
    report(name, model, ...) -> {name: metric}              what else a member of gan.py is asked, with its pictures
    energies(model, ...) -> {name: metric}                  what else a member of ebm.py is asked

Metrics are those of metrics.py, {value, floor, unit, better}; the floor is the same number for held-out real images.
Scores in the features of a small classifier are comparable within one data set only, and have names of their own: the
FID and the Inception score of papers are numbers of another network, of 2015, on 50,000 images.

References
  [1] Heusel et al., GANs Trained by a Two Time-Scale Update Rule, arXiv 1706.08500 (Frechet distance in features)
  [2] Salimans et al., Improved Techniques for Training GANs, arXiv 1606.03498 (Inception score)
  [3] Kynkaanniemi et al., Improved Precision and Recall Metric for Assessing Generative Models, arXiv 1904.06991
  [4] Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metrics import frechet, grid_picture, klh, metric, sliced_w2

# ---- scores in any features


def classifier_score(probabilities: Tensor) -> Tensor:
    """exp E KL(p(y|x) | p(y)) of class probabilities (N, K), with p(y) their mean: from 1 to K. [2]

    One class, or doubt about each image, give 1; each class equally often and surely, K."""
    p = probabilities.double()
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))).sum(1).mean().exp()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Share of fake features (M, D) among the real ones (N, D), and of real ones among the fake: a point lies among
    others if it is in the ball of one of them that reaches to its k-th neighbour. [3]"""
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"the {k}-th neighbour needs more than {k} images; got {len(real)} and {len(fake)}")
    real, fake = real.double(), fake.double()
    among = lambda x, others: (torch.cdist(x, others) <= torch.cdist(others, others).kthvalue(k + 1).values).any(1)
    return among(fake, real).double().mean(), among(real, fake).double().mean()


def nearest_accuracy(codes: Tensor, labels: Tensor, known: Tensor, known_labels: Tensor) -> Tensor:
    """Share of codes (N, D) whose nearest neighbour among the known (M, D) has their label."""
    nearest = torch.cat([torch.cdist(part, known).argmin(1) for part in codes.split(1000)])
    return (known_labels[nearest] == labels).double().mean()


# ---- a small classifier of the real set


class Classifier(nn.Module):
    """uint8 images (B, C, H, W) of `levels` values, H, W >= 8 -> logits (B, classes); `features` -> (B, 64). Sides are
    reduced to `most`: 32 for the class, more for the detail."""

    def __init__(self, channels: int, classes: int, levels: int, width: int = 24, most: int = 32):
        super().__init__()
        half = lambda i, o, k: [nn.Conv2d(i, o, k, 2, k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        self.levels, self.most, pool = levels, most, most**2 // 512
        self.body = nn.Sequential(
            *half(channels, width, 5), *half(width, 2 * width, 3), *half(2 * width, 4 * width, 3),
            nn.AdaptiveAvgPool2d(pool), nn.Flatten(), nn.Linear(4 * width * pool**2, 64), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def features(self, x: Tensor) -> Tensor:
        x = x.to(self.head.weight.dtype) * (2 / (self.levels - 1)) - 1
        if max(x.shape[-2:]) > self.most:
            x = F.interpolate(x, size=(self.most, self.most), mode="area")
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def train_classifier(x: Tensor, labels: Tensor, classes: int, levels: int, seed: int = 0, steps: int = 600,
                     batch: int = 128, progress: bool = True, lr: float = 1e-2, most: int = 32) -> Classifier:
    """A classifier in eval mode, fitted to uint8 images x (N, C, H, W) with random shifts of up to 2 pixels.

    labels (N,), or (N, classes) bool: then each is a question of its own, a logit above 0 says yes. About 25 s on two
    cores for 28x28; it runs where x lies. The same seed gives the same classifier."""
    from tqdm import tqdm

    _check_images(x, levels)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)                        # torch.manual_seed would reach the GPUs
        model = Classifier(x.shape[1], classes, levels, 24, most).float()
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.to(x.device, memory_format=torch.channels_last).parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    labels = labels.to(x.device)
    for _ in tqdm(range(steps), "classifier for the metrics", leave=False, disable=not progress):
        i = torch.randint(len(x), (batch,), generator=g).to(x.device)
        down, right = torch.randint(5, (2,), generator=g).tolist()
        shifted = F.pad(x[i].float(), (2, 2, 2, 2), mode="replicate")[..., down:, right:]
        logits = model(shifted[..., : x.shape[2], : x.shape[3]])
        loss = (F.cross_entropy(logits, labels[i]) if labels.dim() == 1
                else F.binary_cross_entropy_with_logits(logits, labels[i].float()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _check_images(x: Tensor, levels: int):
    if x.dim() != 4 or x.dtype != torch.uint8 or not len(x):
        raise ValueError(f"expected uint8 images (N, C, H, W), got {x.dtype} {tuple(x.shape)}; `unscale` makes them")
    if int(x.max()) >= levels:                                                  # 256 does not fit a uint8
        raise ValueError(f"images of {levels} levels hold 0 .. {levels - 1}, got {int(x.max())}")


@torch.no_grad()
def judge(classifier: Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
    """Class probabilities (N, classes) and features (N, 64), on the CPU."""
    device = next(classifier.parameters()).device
    features = torch.cat([classifier.features(part.to(device)) for part in x.split(512)])
    return classifier.head(features).softmax(-1).cpu(), features.cpu()


def images(samples: Tensor, truth, seed: int = 0, classifier: Classifier | None = None) -> dict[str, dict]:
    """Numbers for uint8 samples (N, C, H, W) against an image set (see data.py), by a classifier of the real classes.

    class_balance         largest |share of a class - its share in the training set|, percentage points
    recognised            share that the classifier gives a class with confidence 0.9 or more
    classifier_frechet    Frechet distance in its features [1]
    classifier_score      exp of the mean KL between p(class | image) and p(class) [2]
    precision, recall     share of samples among the real images, and the other way, in its features [3]
    classifier_accuracy   of the classifier on held-out images: how far the ones above can be trusted
    ink                   |share of pixels set - the real share|, percentage points; binary sets only

    Held-out images, which neither model nor classifier saw, are cut in two halves: one stands in for the samples (the
    floor), one is what both are compared with; samples and stand-ins are cut to the same number. Without labels,
    or where they are factors, there is only `pixel_sliced_w2`. Pass `classifier` (of train_classifier) to reuse one."""
    _check_images(samples, truth.levels)
    held_out = torch.randperm(len(truth.test), generator=torch.Generator().manual_seed(seed))
    n = min(len(samples), len(held_out) // 2)
    if n < 2:
        raise ValueError(f"too few images to compare: {len(samples)} samples, {len(held_out)} held out")
    samples, second, reference = samples[:n].cpu(), truth.test[held_out[:n]].cpu(), truth.test[held_out[-n:]].cpu()
    out = {}
    if truth.train_labels is None or {"factor_sizes", "train_attributes"} & vars(truth).keys():
        flat = lambda x: x.flatten(1) * (2.0 / (truth.levels - 1))
        out["pixel_sliced_w2"] = metric(*(sliced_w2(flat(x), flat(reference)) for x in (samples, second)))
    else:
        if classifier is None:
            classifier = train_classifier(truth.train, truth.train_labels, truth.classes, truth.levels, seed)
        judged = {name: judge(classifier, x) for name, x in
                  (("fake", samples), ("second", second), ("reference", reference))}
        true_share = truth.train_labels.cpu().bincount(minlength=truth.classes) / len(truth.train_labels)

        def class_balance(probabilities, features):
            share = probabilities.argmax(-1).bincount(minlength=truth.classes) / n
            return 100 * (share - true_share).abs().max()

        recognised = lambda probabilities, features: (probabilities.amax(-1) >= 0.9).double().mean()
        distance = lambda probabilities, features: frechet(features, judged["reference"][1])
        both = lambda f, unit, better: metric(f(*judged["fake"]), f(*judged["second"]), unit, better)
        out = {"class_balance": both(class_balance, "points", "lower"),
               "recognised": both(recognised, "share", "higher"), "classifier_frechet": both(distance, "", "lower"),
               "classifier_score": both(lambda probabilities, _: classifier_score(probabilities), "", "higher")}
        if n > 3:
            among = [precision_recall(judged["reference"][1], judged[name][1]) for name in ("fake", "second")]
            out |= {name: metric(*pair, "share", "higher") for name, pair in zip(("precision", "recall"), zip(*among))}
        right = [judged["second"][0].argmax(-1) == truth.test_labels[held_out[:n]].cpu(),
                 judged["reference"][0].argmax(-1) == truth.test_labels[held_out[-n:]].cpu()]
        out["classifier_accuracy"] = metric(torch.cat(right).double().mean(), None, "share", "higher")
    if truth.levels == 2:
        share = lambda x: 100 * x.double().mean()
        out["ink"] = metric(*((share(x) - share(reference)).abs() for x in (samples, second)), "points")
    return out


# ---- Inception, where it is installed


def inception_features(device="cpu"):
    """A function from uint8 images (B, C, 299, 299) of 256 levels to features (B, 2048): torchvision's Inception v3
    with its ImageNet weights, which must lie where torch.hub keeps them. ValueError says what is missing."""
    try:
        from torchvision.models import Inception_V3_Weights, inception_v3
    except ImportError as e:
        raise ValueError("--fid needs torchvision and its Inception weights; else see classifier_frechet") from e
    import pathlib

    weights = Inception_V3_Weights.IMAGENET1K_V1
    file = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    if not file.is_file():
        raise ValueError(f"--fid needs the weights of Inception at {file}; fetch {weights.url}")
    network = inception_v3(weights=None, transform_input=True, init_weights=False).eval().to(device)
    network.load_state_dict(torch.load(file, map_location=device, weights_only=True))
    network.fc = nn.Identity()
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return lambda x: network((x.to(device).float() / 255 - mean) / std)


@torch.no_grad()
def inception_frechet(samples: Tensor, truth, features=None, seed: int = 0) -> dict[str, dict]:
    """{inception_frechet}: the Frechet distance in Inception's features, uint8 samples against held-out images. [1]

    Of torchvision's weights and as few images as there are: biased upwards, and no number of a paper."""
    features = features or inception_features()
    held_out = torch.randperm(len(truth.test), generator=torch.Generator().manual_seed(seed))
    n = min(len(samples), len(held_out) // 2)
    if n < 2:
        raise ValueError(f"too few images to compare: {len(samples)} samples, {len(held_out)} held out")

    def read(x):
        x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
        x = F.interpolate(x.float() * (255 / (truth.levels - 1)), size=(299, 299), mode="bilinear", antialias=True)
        return torch.cat([features(part).cpu() for part in x.split(50)])

    reference = read(truth.test[held_out[-n:]])
    distances = (frechet(read(x.cpu()), reference) for x in (samples[:n], truth.test[held_out[:n]]))
    return {"inception_frechet": metric(*distances)}


# ---- what else a generative adversarial network is asked


@torch.inference_mode()
def report(name: str, model, source, truth, folder, samples: Tensor, inception=None) -> dict[str, dict]:
    """Numbers and pictures that one member of gan.py has beside those of all: see the functions below."""
    out = inception_frechet(samples, truth, inception) if inception else {}
    if name == "cgan":
        out |= label_agreement(model, truth)
    elif name == "bigan" and not hasattr(truth, "log_prob"):
        out |= codes(model, truth, folder)
    elif name == "cyclegan":
        out |= translation(model, source, truth, folder)
    elif name == "stylegan":
        styles(model, folder)
    return out


def label_agreement(model, truth, n: int = 1000, reader=None) -> dict[str, dict]:
    """{label_agreement}: how often what is drawn for a class is read as it, by a classifier of the real set, or in the
    plane by the nearest mode, if there are modes; the floor is that of real examples."""
    y = torch.arange(n) % truth.classes
    x = model.of_class(y.to(next(model.parameters()).device)).cpu()
    real, labels = truth.sample(n, labels=True)
    if hasattr(truth, "log_prob"):
        if truth.modes is None:
            return {}
        share = lambda x, y: (torch.cdist(x, truth.modes.to(x)).argmin(1) == y).double().mean()
    else:
        with torch.inference_mode(False), torch.enable_grad():
            reader = reader or train_classifier(truth.train, truth.train_labels, truth.classes, truth.levels)
        share = lambda x, y: (judge(reader, truth.unscale(x))[0].argmax(1) == y).double().mean()
    return {"label_agreement": metric(share(x, y), share(real, labels), "share", "higher")}


def codes(model, truth, folder, most: int = 10_000) -> dict[str, dict]:
    """{code_accuracy, reconstruction}: how often the nearest code among the training set's has the label of a held-out
    image, the floor by pixels instead; and the rms error of G(E(x)), the floor for another image of the set."""
    device = next(model.parameters()).device
    known, held_out = truth.scale(truth.train[:most]), truth.sample(2000, torch.Generator().manual_seed(0))
    encode = lambda x: torch.cat([model.encoder(part.to(device)).cpu() for part in x.split(500)])
    z = encode(held_out)
    back = torch.cat([model.generator(part.to(device)).cpu() for part in z.split(500)])
    rms = lambda x: (x - held_out).square().mean().sqrt()
    out = {"reconstruction": metric(rms(back), rms(held_out.roll(1, 0)), "rms")}
    if truth.train_labels is not None:
        _, labels = truth.sample(2000, torch.Generator().manual_seed(0), labels=True)
        right = lambda x, others: nearest_accuracy(x, labels, others, truth.train_labels[:most])
        pixels = right(held_out.flatten(1), known.flatten(1))
        out["code_accuracy"] = metric(right(z, encode(known)), pixels, "share", "higher")
    grid_picture(folder / "reconstructions.png", torch.stack([held_out[:10], back[:10]]), ["held out", "G(E(x))"], None,
                 truth.levels)
    return out


def translation(model, source, truth, folder, n: int = 500) -> dict[str, dict]:
    """Of held-out images from one set, translated to the other, and back:

    transferred    share that a classifier of the two sets takes for the other; floor: real images of the other
    kept           share of their other attributes that a classifier still reads, where they are known; floor: its own
                   share on the untouched images
    cycle          mean |x - x there and back|; identity: mean |y - y translated| for y of the other set already"""
    a, b = (v.sample(min(n, len(v.test)), torch.Generator().manual_seed(0)) for v in (source, truth))
    there = model.translate("ab", a.to(model.source.device)).cpu()
    back, same = model.translate("ba", there), model.translate("ab", b)
    both, sets = torch.cat([source.train, truth.train]), torch.tensor([0, 1])
    with torch.inference_mode(False), torch.enable_grad():
        side = sets.repeat_interleave(torch.tensor([len(source.train), len(truth.train)]))
        reader = train_classifier(both, side, 2, truth.levels, steps=400)
        others = _others(source, truth)
        if others is not None:
            known = torch.cat([source.train_attributes, truth.train_attributes])[:, others]
            second = train_classifier(both, known, len(others), truth.levels, steps=600)
    taken = lambda x: (judge(reader, truth.unscale(x))[0].argmax(1) == 1).double().mean()
    out = {"transferred": metric(taken(there), taken(b), "share", "higher"),
           "cycle": metric((back - a).abs().mean(), 0), "identity": metric((same - b).abs().mean(), 0)}
    if others is not None:
        rows = torch.randperm(len(source.test), generator=torch.Generator().manual_seed(0))[: len(a)]
        has = source.test_attributes[rows][:, others]
        kept = lambda x: ((second(truth.unscale(x)) > 0) == has).double().mean()
        out["kept"] = metric(kept(there), kept(a), "share", "higher")
    rows = [a[:8], there[:8], back[:8], b[:8], model.translate("ba", b[:8])]
    grid_picture(folder / "translations.png", torch.stack([row.cpu() for row in rows]),
                 ["held out", "translated", "and back", "the other set", "translated"], None, truth.levels)
    return out


def _others(source, truth):
    """Columns of attributes that vary within both sets, or None."""
    if not (hasattr(source, "train_attributes") and hasattr(truth, "train_attributes")):
        return None
    varied = [(v.train_attributes != v.train_attributes[0]).any(0) for v in (source, truth)]
    return (varied[0] & varied[1]).nonzero()[:, 0] if (varied[0] & varied[1]).any() else None


def styles(model, folder) -> None:
    """mixing.png: the coarse layers of one style and the fine ones of another, noise alike; truncation.png: psi from -1
    to 1.4, the mean at 0."""
    G = model.generator
    fixed = torch.Generator().manual_seed(0)
    noise = {side: torch.randn(1, 1, *side, generator=fixed) for side in G.sides}
    draw = lambda law, n, _, *side: noise[side].to(G.mean_w.device)
    w = G.styles(torch.randn(13, model.latent, generator=fixed).to(G.mean_w.device))
    rows, columns = w[:5], w[5:]
    whole = lambda w: G(w[:, None].expand(-1, len(G.convs), -1), draw).cpu()
    cut = torch.full((len(columns),), len(G.convs) // 2, device=w.device)
    mixed = [G(model.mix(row.expand(len(columns), -1), columns, cut), draw).cpu() for row in rows]
    blank = torch.ones_like(whole(w[:1]))
    sheet = [torch.cat([blank, whole(columns)]), *[torch.cat([whole(row[None]), m]) for row, m in zip(rows, mixed)]]
    grid_picture(folder / "mixing.png", torch.stack(sheet), ["fine layers", *["coarse layers"] * 5], None)
    psis = (-1.0, -0.5, 0.0, 0.35, 0.7, 1.0, 1.4)
    sheet = [torch.cat([whole(torch.lerp(G.mean_w, row[None], psi)) for psi in psis]) for row in rows]
    grid_picture(folder / "truncation.png", torch.stack(sheet), None, [f"psi {psi:g}" for psi in psis])


# ---- what else an energy-based model is asked


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """Mean |confidence - accuracy| over equal bins of the confidence, weighed by their examples. [4] (5)"""
    confidence, guess = probabilities.double().max(1)
    bin = (confidence * bins).ceil().long().clamp(1, bins) - 1
    error = confidence - (guess == labels).double()
    return torch.zeros(bins, dtype=torch.float64).index_add_(0, bin, error).abs().sum() / len(labels)


def auroc(inside: Tensor, outside: Tensor) -> Tensor:
    """P(a score of inside > one of outside), ties counted half: 1/2 where they tell nothing."""
    outside = outside.double().sort().values.contiguous()
    below, up_to = (torch.searchsorted(outside, inside.double().contiguous(), right=side) for side in (False, True))
    return (below + up_to).double().mean() / (2 * len(outside))


@torch.no_grad()
def energies(model, truth, samples: Tensor, kept: Tensor, results: dict, others=None, compared=None, folder=None):
    """(metrics, samples): those of images for fresh chains, and some for the chains of the buffer, called buffer_...

    label_agreement        chains of a class that are read as it
    accuracy               of the softmax on held-out data; its floor: of the exact posterior, where that is known
    calibration_error      of it
    auroc_noise, auroc_set, auroc_confidence
                           held-out data against uniform noise and against another set, told by -E(x); and against that
                           set by the largest class probability instead
    Samples of several kinds, `compared`, make a table, compare.md."""
    points, device = hasattr(truth, "log_prob"), next(model.parameters()).device
    out, reader = dict(results), None
    in_parts = lambda f, x: torch.cat([f(part.to(device)).cpu() for part in x.split(1000)])
    if not points:
        with torch.enable_grad():
            if truth.train_labels is not None:
                reader = train_classifier(truth.train, truth.train_labels, truth.classes, truth.levels)
        samples, kept = truth.unscale(samples), truth.unscale(kept)
        out |= images(samples, truth, classifier=reader)
        some = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[: len(samples)]]
        of_buffer = images(some, truth, classifier=reader)
        out |= {f"buffer_{k}": of_buffer[k] for k in ("recognised", "classifier_frechet", "recall") if k in of_buffer}
    if model.labels:
        out |= label_agreement(model, truth, 1000 if points else 200, reader)
    if model.labels and not model.conditional:
        x, y = truth.sample(10_000, torch.Generator().manual_seed(0), labels=True)
        p = in_parts(lambda x: model.network(x).softmax(1), x)
        right = lambda p: (p.argmax(1) == y).double().mean()
        exact = truth.label_log_prob(x).exp() if hasattr(truth, "label_log_prob") else None
        out["accuracy"] = metric(right(p), None if exact is None else right(exact), "share", "higher")
        error = None if exact is None else calibration_error(exact, y)
        out["calibration_error"] = metric(calibration_error(p, y), error, "share")
    if not points:
        x = truth.sample(2000, torch.Generator().manual_seed(0))
        noise = 2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 1
        low = lambda x: -in_parts(model.energy, x)
        out["auroc_noise"] = metric(auroc(low(x), low(noise)), None, "share", "higher")
        if others is not None:
            other = others.sample(2000, torch.Generator().manual_seed(0))
            out["auroc_set"] = metric(auroc(low(x), low(other)), None, "share", "higher")
            if model.labels:
                sure = lambda x: in_parts(lambda x: model.network(x).softmax(1).amax(1), x)
                out["auroc_confidence"] = metric(auroc(sure(x), sure(other)), None, "share", "higher")
    if compared:
        score = (lambda x: {"klh": klh(x, truth)}) if points else lambda x: {
            k: v["value"] for k, v in images(truth.unscale(x), truth, classifier=reader).items()}
        rows = {name: score(x) for name, x in compared.items()}
        names = list(next(iter(rows.values())))
        lines = [["chains", *names], ["---"] * (1 + len(names))]
        lines += [[name, *[f"{row[n]:.3g}" for n in names]] for name, row in rows.items()]
        (folder / "compare.md").write_text("".join("| " + " | ".join(line) + " |\n" for line in lines))
    return out, samples
