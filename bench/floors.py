"""What a sampler loses by its steps alone: DDIM with the exact score of gmm, no training, at each spacing of the times.

    python bench/floors.py
"""

import pathlib
import sys

import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import data  # noqa: E402
import ddim  # noqa: E402
import metrics  # noqa: E402


class ExactEps(nn.Module):
    def __init__(self, truth, alphas_cumprod):
        super().__init__()
        self.truth, self.alphas_cumprod = truth, alphas_cumprod

    def forward(self, x, t):
        abar = self.alphas_cumprod[t[:1]]
        a, b = abar.sqrt(), (1 - abar).sqrt()
        return (x - a * self.truth.denoise(x, a, b)) / b


def main():
    torch.set_default_dtype(torch.float64)
    truth, schedule = data.load("gmm"), ddim.linear_schedule(1000)
    model = ddim.DDIM((2,), schedule, ExactEps(truth, schedule))
    print("| klh, eta = 0 | trailing | leading | quadratic |\n|---|---|---|---|")
    for S in (10, 20, 50, 200):
        row = []
        for spacing in ("trailing", "leading", "quadratic"):
            torch.manual_seed(0)
            *_, x = model.sample(10_000, ddim.timesteps(1000, S, spacing))
            row.append(f"{metrics.klh(x, truth):.4f}")
        print(f"| S = {S} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
