"""Images a second in training, gan.py against a plain loop over the same networks, in turns in one run.

    python bench/gan_loops.py [--batch 64] [--seconds 8] [--turns 5]

The plain loop is what tutorials write: a DataLoader, losses by BCEWithLogitsLoss, torch's Adam as it comes, the
generator's step first, all gradients of the discriminator in it, one pass for real and one for fake, and in WGAN-GP a
generator in the graph of the critic's loss. It has no moving average and no record of gradient norms; gan.py has both.
"""

import argparse
import copy
import pathlib
import statistics
import sys
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import data
import gan


def plain_dcgan(model, loader, lr, latent):
    G, D, law = model.generator, model.discriminator, nn.BCEWithLogitsLoss()
    g_optimizer, d_optimizer = (torch.optim.Adam(net.parameters(), lr, betas=(0.5, 0.999)) for net in (G, D))
    while True:
        for (images,) in loader:
            ones, zeros = torch.ones(len(images)), torch.zeros(len(images))
            g_optimizer.zero_grad()
            made = G(torch.randn(len(images), latent))
            law(D(made), ones).backward()
            g_optimizer.step()
            d_optimizer.zero_grad()
            ((law(D(images), ones) + law(D(made.detach()), zeros)) / 2).backward()
            d_optimizer.step()
            yield


def plain_wgan_gp(model, loader, lr, latent, penalty=10.0, critic_steps=5):
    G, D = model.generator, model.discriminator
    g_optimizer, d_optimizer = (torch.optim.Adam(net.parameters(), lr, betas=(0.0, 0.9)) for net in (G, D))
    step = 0
    while True:
        for (images,) in loader:
            d_optimizer.zero_grad()
            z = torch.randn(len(images), latent)
            made = G(z)
            u = torch.rand(len(images), 1, 1, 1)
            between = (u * images + (1 - u) * made.detach()).requires_grad_()
            score = D(between)
            (slope,) = torch.autograd.grad(score, between, torch.ones_like(score), create_graph=True, retain_graph=True)
            slope = slope.view(len(images), -1).norm(2, dim=1)
            loss = -D(images).mean() + D(made).mean() + penalty * ((slope - 1) ** 2).mean()
            loss.backward()
            d_optimizer.step()
            step += 1
            if step % critic_steps == 0:
                g_optimizer.zero_grad()
                (-D(G(z)).mean()).backward()
                g_optimizer.step()
                yield


def ours(model, truth, batch, lr):
    average = copy.deepcopy(model).eval()
    return gan.train(model, average, model.optimizers(lr), truth.batches(batch), 10**6, lr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    truth = data.load("persian")
    loader = DataLoader(TensorDataset(truth.scale(truth.train)), args.batch, shuffle=True, drop_last=True)
    print(f"{torch.get_num_threads()} threads, batch {args.batch}, persian: real images a second, median")
    print("| | ours | plain loop | ours is |\n|---|---|---|---|")
    for name, plain in (("dcgan", plain_dcgan), ("wgan-gp", plain_wgan_gp)):
        torch.manual_seed(0)
        model = gan.MODELS[name](truth.shape, 64, 32, "conv")
        same = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        loops = {"ours": ours(model, truth, args.batch, 2e-4), "plain": plain(same, loader, 2e-4, 64)}
        each, rates = args.batch * (1 if name == "dcgan" else 5), {k: [] for k in loops}
        for turn in range(args.turns + 1):                  # the first warms up
            for k, loop in loops.items():
                began, steps = time.perf_counter(), 0
                while time.perf_counter() - began < args.seconds:
                    next(loop)
                    steps += 1
                if turn:
                    rates[k].append(each * steps / (time.perf_counter() - began))
        ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["plain"]))
        ours_rate, plain_rate = (statistics.median(rates[k]) for k in loops)
        print(f"| {name} | {ours_rate:.0f} | {plain_rate:.0f} | {ratio:.2f}x |")


if __name__ == "__main__":
    main()
