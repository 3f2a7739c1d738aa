"""Tokens a second of igpt.py beside Hugging Face GPT-2 and x-transformers, same sizes, in one run.

    bash bench/rivals.sh igpt_rivals        a throw-away environment with both, then this file

Four layers, width 128, four heads, sentences of 784 tokens of 16 kinds. Sampling: whole sentences from the start token;
ours is `GPT.generate`, theirs `GPT2LMHeadModel.generate` with its cache and `AutoregressiveWrapper.generate` with
cache_kv. Ours has the exact GELU, GPT-2 its tanh form, which is slow on a CPU: it runs with both. Training: batch 8,
forward, backward and a step of fused AdamW for all, no dropout; ours with attention and with Mamba. Turns alternate, so
that a busy machine slows all alike; medians, and the ratio of ours with attention to each. Last, what a sentence
keeps in memory while it is drawn. `--tokens` shortens the sentences for a quick look; what is not installed is named
and left out.
"""

import argparse
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import igpt  # noqa: E402

K, WIDTH, LAYERS, HEADS = 16, 128, 4, 4


class Ours:
    def __init__(self, T, mixer):
        self.model, self.T = igpt.GPT(K, T, WIDTH, LAYERS, HEADS, mixer), T

    def sample(self, batch):
        return self.model.generate(batch)

    def loss(self, tokens):
        return self.model.nll(tokens).mean()


class HuggingFace:
    def __init__(self, T, activation="gelu_new"):
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=K + 1, n_positions=T + 1, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
                            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=K, eos_token_id=None,
                            pad_token_id=K, activation_function=activation)
        self.model, self.T = GPT2LMHeadModel(config), T

    def sample(self, batch):
        start = torch.full((batch, 1), K)
        return self.model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0,
                                   use_cache=True, max_new_tokens=self.T, min_new_tokens=self.T)

    def loss(self, tokens):
        logits = self.model(F.pad(tokens[:, :-1], (1, 0), value=K)).logits
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class XTransformers:
    def __init__(self, T):
        from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

        layers = Decoder(dim=WIDTH, depth=LAYERS, heads=HEADS, attn_dim_head=WIDTH // HEADS, attn_flash=True)
        net = TransformerWrapper(num_tokens=K + 1, max_seq_len=T + 1, attn_layers=layers)
        self.model, self.T = AutoregressiveWrapper(net), T

    def sample(self, batch):
        return self.model.generate(torch.full((batch, 1), K), self.T, cache_kv=True)

    def loss(self, tokens):
        return self.model(F.pad(tokens, (1, 0), value=K))


def contenders(T):
    kinds = {"ours, attention": lambda: Ours(T, "attention"), "ours, mamba": lambda: Ours(T, "mamba"),
             "Hugging Face GPT-2": lambda: HuggingFace(T),
             "the same, exact GELU": lambda: HuggingFace(T, "gelu"), "x-transformers": lambda: XTransformers(T)}
    out = {}
    for name, make in kinds.items():
        try:
            out[name] = make()
        except ImportError as e:
            print(f"{name}: not installed ({e})")
    return out


def sampling(one, batch):
    one.model.eval()
    with torch.inference_mode():
        began = time.perf_counter()
        one.sample(batch)
    return batch * one.T / (time.perf_counter() - began)


def training(one, tokens, steps):
    one.model.train()
    if not hasattr(one, "optimizer"):
        one.optimizer = torch.optim.AdamW(one.model.parameters(), 1e-4, fused=True)
    began = time.perf_counter()
    for _ in range(steps):
        one.optimizer.zero_grad()
        one.loss(tokens).backward()
        one.optimizer.step()
    return steps * tokens.numel() / (time.perf_counter() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=784)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of training, a turn")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="of sampling")
    args = parser.parse_args()
    torch.manual_seed(0)
    models, tokens = contenders(args.tokens), torch.randint(K, (8, args.tokens))
    rows = {f"sampling, batch {n}": (lambda one, n=n: sampling(one, n)) for n in args.batches}
    rows["training, batch 8"] = lambda one: training(one, tokens, args.steps)
    print(f"{torch.get_num_threads()} threads, {args.tokens} tokens, medians of {args.repeats}; tokens a second")
    for title, measure in rows.items():
        rates = {name: [] for name in models}
        for turn in range(args.repeats + 1):                # the first turn warms up
            for name, one in models.items():
                rate = measure(one)
                if turn:
                    rates[name].append(rate)
        print(title)
        for name, values in rates.items():
            ratio = statistics.median(a / b for a, b in zip(rates["ours, attention"], values))
            print(f"  {name:20} {statistics.median(values):10.0f}   ours, attention, is {ratio:.2f}x")
    print("memory of one sentence while it is drawn, bytes")
    for mixer in igpt.MIXERS:
        half, whole = (sum(part.nbytes for layer in Ours(T, mixer).model.memory(1) for part in layer)
                       for T in (args.tokens // 2, args.tokens))
        grows = (whole - half) / (args.tokens - args.tokens // 2)
        print(f"  ours, {mixer:14} {whole:10}   {grows:.0f} more for each token")


if __name__ == "__main__":
    main()
