"""What a model of tokens must beat, and what it learned beside: the tables that igpt.py's numbers stand next to.

    uniform          log2 K bits a symbol
    independent      each place its own counted distribution
    context table    each place given the nearest places before it, counted: the best that memorising can do
    linear probe     classes read off frozen features, layer by layer (Chen et al., ICML 2020, section 2.4)

All are counted or fitted on training images and measured on held-out ones. A count starts at 1/2 (Krichevsky,
Trofimov), so that nothing has probability 0; likelihoods are exact, in nats, and a sum over all images would be 1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import judges
from metrics import bits_per_dim, exact_kl, grid_picture, metric

# ---- counted


def independent_nll(seen: Tensor, x: Tensor, K: int) -> Tensor:
    """(B,) nats of x (B, T) when each place has its own counted distribution over K, from seen (N, T)."""
    counts = torch.stack([(seen == k).sum(0) for k in range(K)], 1) + 0.5                     # (T, K)
    return -(counts / counts.sum(1, keepdim=True)).log().gather(1, x.T).sum(0)


def context_nll(seen: Tensor, x: Tensor, K: int, pixels: int) -> Tensor:
    """(B,) nats of x (B, H, W) by a table counted on seen (N, H, W): a place given the `pixels` nearest before it.

    Beyond the border stands a symbol of its own. Each count starts at 1/2 (Krichevsky, Trofimov)."""
    reach = range(-4, 5)
    before = [(-i, j) for i in range(5) for j in reach if (i, j) > (0, -1) and i or not i and j < 0]
    before = sorted(before, key=lambda o: (o[0] ** 2 + o[1] ** 2, o))[:pixels]

    def contexts(images):
        padded, (H, W) = F.pad(images, (4, 4, 4, 0), value=K), images.shape[1:]
        code = torch.zeros_like(images)
        for i, j in before:
            code = code * (K + 1) + padded[:, 4 + i : 4 + i + H, 4 + j : 4 + j + W]
        return code

    table = torch.cat([contexts(seen).flatten(), contexts(x).flatten()]).unique(return_inverse=True)[1]
    known, asked = table[: seen.numel()], table[seen.numel() :]
    counts = torch.bincount(known * K + seen.flatten(), minlength=(int(table.max()) + 1) * K).view(-1, K) + 0.5
    chosen = counts[asked, x.flatten()] / counts.sum(1)[asked]
    return -chosen.log().view(len(x), -1).sum(1)


# ---- features


def probe(features: Tensor, labels: Tensor, asked: Tensor, steps: int = 100) -> Tensor:
    """The classes (M,) that a logistic regression on features (N, F) finds for `asked` (M, F). [1] section 2.4"""
    mean, std = features.mean(0), features.std(0, correction=0) + 1e-6
    features, asked = (features - mean) / std, (asked - mean) / std
    weight = torch.zeros(features.shape[1] + 1, int(labels.max()) + 1, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight[1:] + weight[0], labels) + 1e-4 * weight[1:].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (asked @ weight[1:] + weight[0]).argmax(1)


# ---- the report of igpt.py


def report(model, evaluate, truth, job, args, seconds: float) -> dict[str, dict]:
    """Likelihood of args.nll_rows held-out examples beside its baselines, or for points the exact KL; distortion where
    tokens lose something, the linear probe, and completions.png: upper halves, and what the model draws below them."""
    language, device = model.language, job.device
    x = truth.sample(args.nll_rows, **({"labels": True} if args.conditional else {}))
    x, *labels = (v.to(device) for v in (x if args.conditional else (x,)))
    if model.gpt.classes > 1 and hasattr(truth, "log_prob"):            # a mixture of even classes, as it is drawn
        classes = range(model.gpt.classes)
        each = lambda x: torch.stack([model.log_prob(x, torch.full((len(x),), k, device=x.device)) for k in classes])
        log_prob = lambda x: each(x).logsumexp(0) - math.log(len(classes))
        nll = -torch.cat([log_prob(part) for part in x.split(500)])
    else:
        log_prob, nll = model.log_prob, evaluate(model, x, *labels)
    out = {"tokens_per_second": metric(args.samples * language.T / seconds, None, "1/s", "higher")}
    if hasattr(truth, "log_prob"):
        kl = exact_kl(log_prob, truth, language.K, language.reach, device)
        return out | {"nll": metric(nll.mean(), truth.entropy, "nats"), "kl": metric(kl, 0, "nats")}
    known = truth.scale(truth.train).to(device)
    known, asked = (language.pixels(language.tokens(part)) for part in (known, x))
    kinds, places = language.kinds, asked[0].numel()
    rivals = {"uniform": torch.full((1,), places * math.log(kinds)),
              "independent": independent_nll(known.flatten(1), asked.flatten(1), kinds),
              "context": context_nll(known, asked, kinds, max(2, int(15 / math.log2(kinds))))}
    name, unit = ("bits_per_dim", "bits") if language.exact else ("bits_per_token", "bits a token (not of the pixels)")
    unit += " given the class" if model.gpt.classes > 1 else ""
    out[name] = metric(bits_per_dim(float(nll.mean()), places), None, unit)
    out |= {f"{name}_{rival}": metric(bits_per_dim(float(value.mean()), places), None, unit)
            for rival, value in rivals.items()}
    if language.exact:
        out["nll"] = metric(nll.mean(), None, "nats")
    else:
        error = language.decode(language.tokens(x)) - x
        out["distortion"] = metric(error.square().mean().sqrt() * (truth.levels - 1) / 2, None, "levels, rms")
    if model.gpt.classes > 1:
        out |= judges.label_agreement(model, truth)
    if args.probe_rows and truth.classes:
        out |= probe_layers(model, truth, args.probe_rows, device)
    half = truth.shape[1] // 2 // language.side * language.side
    originals = x[:10]
    blank = originals.clone()
    blank[:, :, half:] = 0
    rows = [originals, blank, *(model.complete(originals, half, *(v[:10] for v in labels)) for _ in range(3))]
    grid_picture(job.folder / "completions.png", torch.stack([row.cpu() for row in rows]),
                 ["held out", "what it sees", "completed", "again", "again"], None, truth.levels)
    return out


@torch.inference_mode()
def _read(model, x, parts, rows=100):
    read = [model.gpt.features(model.language.tokens(part), parts) for part in x.split(rows)]
    return [torch.cat(layer).clone() for layer in zip(*read)]


def probe_layers(model, truth, n: int, device) -> dict[str, dict]:
    """{probe_layer_i}: accuracy on 2,000 held-out images of a logistic regression on the features of each layer, and
    {probe_quarters_i} on their means over each quarter of the sentence; the floor is that on the pixels themselves."""
    draw = lambda n, split: truth.sample(n, torch.Generator().manual_seed(1), split=split, labels=True)
    (x, y), (x_2, y_2) = ((a.to(device), b.to(device)) for a, b in (draw(n, "train"), draw(2000, "test")))
    with torch.inference_mode(False), torch.enable_grad():
        right = lambda a, b: (probe(a.clone(), y, b.clone()) == y_2).double().mean()
        pixels = right(x.flatten(1), x_2.flatten(1))
        return {f"probe_{name}_{i}": metric(right(a, b), pixels, "share", "higher")
                for name, parts in (("layer", 1), ("quarters", 4))
                for i, (a, b) in enumerate(zip(_read(model, x, parts), _read(model, x_2, parts)))}
