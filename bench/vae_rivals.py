"""Images a second in the training of vae.py beside pythae, same MLP, same data, in one run.

    bash bench/rivals.sh vae_rivals         a throw-away environment with pythae, then this file

784 - 400 - 400 - 40 and back, Bernoulli likelihood, batch 128, Adam, 10,000 drawn digits. Ours is `vae.train` on
`data.Images.batches`, with dynamic binarisation and fused Adam; pythae's is its BaseTrainer with the same layers as
custom encoder and decoder, its progress bar and checkpoints off. An epoch of pythae is timed as the difference between
a run of `--epochs` + 1 and one of a single epoch, so its start and last save do not count. Turns alternate; medians.
"""

import argparse
import contextlib
import io
import logging
import pathlib
import statistics
import sys
import tempfile
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import data  # noqa: E402
import vae  # noqa: E402

BATCH, LATENT, WIDTH = 128, 40, 400


def ours(truth, steps):
    model = vae.VAE(truth.shape, LATENT, "bernoulli", WIDTH, "mlp")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, betas=(0.9, 0.99), fused=True)
    rows = vae.train(model, optimizer, truth.batches(BATCH), steps + 20, 1e-3)
    for _ in range(20):
        next(rows)
    began = time.perf_counter()
    for _ in rows:
        pass
    return steps * BATCH / (time.perf_counter() - began)


def pythae(truth, epochs):
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.disable(logging.INFO)

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.net, self.latent_dim = vae.mlp(784, 2 * LATENT, WIDTH), LATENT

        def forward(self, x):
            mu, logvar = self.net(x.flatten(1)).chunk(2, 1)
            return ModelOutput(embedding=mu, log_covariance=logvar)

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.net = vae.mlp(LATENT, 784, WIDTH)

        def forward(self, z):
            return ModelOutput(reconstruction=self.net(z).sigmoid().view(-1, 1, 28, 28))

    x = truth.train.float()

    def run(count):
        config = VAEConfig(input_dim=(1, 28, 28), latent_dim=LATENT, reconstruction_loss="bce")
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            trainer = BaseTrainer(VAE(config, Encoder(), Decoder()), BaseDataset(x, torch.zeros(len(x))), None,
                                  BaseTrainerConfig(output_dir=folder, num_epochs=count, learning_rate=1e-3,
                                                    per_device_train_batch_size=BATCH, no_cuda=True))
            began = time.perf_counter()
            trainer.train()
            return time.perf_counter() - began

    return epochs * len(x) / (run(epochs + 1) - run(1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    truth, rates = data.load("persian"), {"ours": [], "pythae": []}
    for _ in range(args.repeats):
        rates["ours"].append(ours(truth, args.epochs * len(truth.train) // BATCH))
        rates["pythae"].append(pythae(truth, args.epochs))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["pythae"]))
    print(f"{torch.get_num_threads()} threads, medians of {args.repeats}")
    for name, rate in medians.items():
        print(f"{name:8} {rate:8.0f} images/s")
    print(f"ours is {ratio:.2f}x (median of the ratios of each turn)")


if __name__ == "__main__":
    main()
