"""flows.py beside zuko and nflows (splines), torchcfm and flow_matching (matching), one data set, one time, in one run.

    bash bench/rivals.sh flows_rivals       a throw-away environment with the rivals, then this file

Steps: training steps a second of spline flows of the same sizes (3 transforms of 32 bins on [-5, 5], a hidden layer of
64, Adam), forward, backward and update; turns alternate, medians. Ours has sines beside the coordinate and an average
of the weights; the rivals what their constructors give. Quality: each trains for --seconds with a cosine to zero over
the steps that it can make in that time, measured first; then the exact KL by quadrature (splines), or klh of 10,000
samples by Heun's method in 50 steps (matching), where each gets the network of ours.
"""

import argparse
import copy
import itertools
import math
import pathlib
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import data  # noqa: E402
import flows  # noqa: E402
import metrics  # noqa: E402

TRANSFORMS, BINS, WIDTH, BOUND = 3, 32, 64, 5.0


class Zuko:
    """An autoregressive neural spline flow, as zuko has it; its splines lie on [-5, 5]."""

    def __init__(self):
        import zuko

        self.model = zuko.flows.NSF(2, 0, bins=BINS, transforms=TRANSFORMS, hidden_features=[WIDTH])

    def log_prob(self, x):
        return self.model().log_prob(x)


class NFlows:
    def __init__(self):
        from nflows.distributions.normal import StandardNormal
        from nflows.flows.base import Flow
        from nflows.nn.nets import ResidualNet
        from nflows.transforms.base import CompositeTransform
        from nflows.transforms.coupling import PiecewiseRationalQuadraticCouplingTransform as Spline

        net = lambda i, o: ResidualNet(i, o, WIDTH, num_blocks=1)
        layers = [Spline(torch.tensor([k % 2, 1 - k % 2]), net, BINS, tails="linear", tail_bound=BOUND)
                  for k in range(TRANSFORMS)]
        self.model = Flow(CompositeTransform(layers), StandardNormal([2]))

    def log_prob(self, x):
        return self.model.log_prob(x)


class Ours:
    def __init__(self):
        self.model = flows.Spline((2,), depth=TRANSFORMS, width=WIDTH, bins=BINS)

    def log_prob(self, x):
        return self.model.log_prob(x)


class OursMatching:
    def __init__(self):
        self.model = flows.Matching((2,))

    def loss(self, x):
        return self.model.loss(x)["loss"]


class TorchCFM(OursMatching):
    def __init__(self):
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

        super().__init__()
        self.matcher = ConditionalFlowMatcher(sigma=0.0)

    def loss(self, x):
        t, x_t, v = self.matcher.sample_location_and_conditional_flow(torch.randn_like(x), x)
        return (self.model.velocity(x_t, t) - v).square().mean()


class FlowMatching(OursMatching):
    def __init__(self):
        from flow_matching.path import AffineProbPath
        from flow_matching.path.scheduler import CondOTScheduler

        super().__init__()
        self.path = AffineProbPath(scheduler=CondOTScheduler())

    def loss(self, x):
        at = self.path.sample(t=torch.rand(len(x)), x_0=torch.randn_like(x), x_1=x)
        return (self.model.velocity(at.x_t, at.t) - at.dx_t).square().mean()


def plain(rival, truth, batch, lr, steps):
    """A generator of steps: a user's loop, with fused Adam and a cosine to zero."""
    optimizer = torch.optim.Adam(rival.model.parameters(), lr, betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        x = truth.sample(batch)
        loss = rival.loss(x) if hasattr(rival, "loss") else -rival.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss


def ours(rival, truth, batch, lr, steps):
    rival.average = copy.deepcopy(rival.model).requires_grad_(False)
    optimizer = torch.optim.Adam(rival.model.parameters(), lr, betas=(0.9, 0.99), fused=True)
    return flows.train(rival.model, rival.average, optimizer, truth.batches(batch), steps, lr)


def loop(rival):
    return ours if type(rival) in (Ours, OursMatching) else plain


def rate(generator, n=60):
    for _ in itertools.islice(generator, 10):
        pass
    began = time.perf_counter()
    for _ in itertools.islice(generator, n):
        pass
    return n / (time.perf_counter() - began)


def quality(make, truth, batch, lr, seconds, matching):
    torch.manual_seed(0)
    rival = make()
    steps = max(100, int(seconds * rate(loop(rival)(rival, truth, batch, lr, 10**6), 2000 if matching else 250)))
    torch.manual_seed(0)
    rival = make()
    began = time.perf_counter()
    for _ in loop(rival)(rival, truth, batch, lr, steps):
        pass
    took = time.perf_counter() - began
    model = getattr(rival, "average", rival.model)
    if matching:
        torch.manual_seed(1)
        return steps, took, metrics.klh(model.sample(10_000), truth)
    log_prob = model.log_prob if isinstance(model, flows.Flow) else rival.log_prob
    try:
        return steps, took, metrics.exact_kl(log_prob, truth, 600)
    except ValueError:
        return steps, took, math.inf


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="gmm")
    parser.add_argument("--seconds", type=float, default=55.0)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", default="", help="steps, spline or matching")
    args = parser.parse_args()
    truth = data.load(args.dataset)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dataset}")
    if args.only in ("", "steps"):
        for batch in (512, 2048):
            running = {make.__name__: loop(rival)(rival, truth, batch, 1e-3, 10**6)
                       for make in (Ours, Zuko, NFlows) for rival in [make()]}
            rates = {name: [] for name in running}
            for _ in range(args.turns):
                for name, generator in running.items():
                    rates[name].append(rate(generator))
            for name, values in rates.items():
                ratio = statistics.median(a / b for a, b in zip(rates["Ours"], values))
                median = statistics.median(values)
                print(f"batch {batch}: {name:14} {median:7.1f} steps/s; ours is {ratio:.2f}x", flush=True)
    for kind, makers in (("spline", (Ours, Zuko, NFlows)), ("matching", (OursMatching, TorchCFM, FlowMatching))):
        if args.only not in ("", kind):
            continue
        for make in makers:
            batch = 1024 if make is Ours else 512
            rates = {"spline": (1e-2,) if make is Ours else (2e-3, 5e-3), "matching": (4e-3,)}[kind]
            for lr in rates:                                # a rival's best of two counts
                steps, took, value = quality(make, truth, batch, lr, args.seconds, kind == "matching")
                name = "klh" if kind == "matching" else "exact KL"
                print(f"{make.__name__:14} lr {lr:g}, batch {batch}: {steps} steps in {took:.1f} s, {name} {value:.4f}",
                      flush=True)


if __name__ == "__main__":
    main()
