"""Properties of vae.py. The comment behind a test names a line that was broken to see it fail."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import judges
import latents
import vae

seeds = st.integers(0, 999)
numbers = st.floats(-3, 3)
CONTINUOUS = "vae", "beta", "iwae", "vamp"


def close(a, b, **kw):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), **kw)


def hermite(n=60):
    """Nodes and weights of E f(eps), eps ~ N(0, 1)."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(x), torch.tensor(w / w.sum())


def rough(name="vae", shape=(2,), latent=2, **options):
    """A model with no zero and no symmetry left."""
    model = vae.MODELS[name](shape, latent, width=16, **options)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


class Says(torch.nn.Module):
    """A network that is a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def linear_gaussian(D=4, Z=2, noise=0.3, seed=0):
    """A VAE whose q is the exact posterior: x = W z + b + sqrt(noise) eps with orthogonal columns; and log p(x)."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(D, Z, generator=g))[0]
    W, b = Q * torch.linspace(0.5, 1.5, Z), torch.randn(D, generator=g)
    model = vae.VAE((D,), Z)
    precision = 1 + (W * W).sum(0) / noise                                      # of p(z|x), diagonal
    model.encoder = Says(lambda x: torch.cat([(x - b) @ W / noise / precision, -precision.log().expand(len(x), Z)], 1))
    model.decoder = Says(lambda z: torch.cat([z @ W.T + b, torch.full((len(z), D), math.log(noise))], 1))
    model.anchor = torch.nn.Parameter(torch.zeros(()))                          # a network of functions has no device
    law = torch.distributions.MultivariateNormal(b, W @ W.T + noise * torch.eye(D))
    return model, law


# ---- maths


@given(numbers, st.floats(-4, 2))
def test_kl_is_the_integral(mu, logvar):                                        # expm1 -> exp; 0.5 left out
    eps, w = hermite()
    mu, logvar = torch.tensor(mu), torch.tensor(logvar)
    z = vae.reparameterize(mu, logvar, eps)
    zero = torch.zeros(())
    integral = (w * (vae.log_normal(z, mu, logvar) - vae.log_normal(z, zero, zero))).sum()
    close(vae.kl_to_standard(mu, logvar), integral)
    assert vae.kl_to_standard(mu, logvar) >= -1e-15 and vae.kl_to_standard(zero, zero) == 0


@given(numbers, numbers, st.floats(-3, 2))
def test_log_normal_is_the_libraries(x, mean, logvar):
    x, mean, logvar = map(torch.tensor, (x, mean, logvar))
    close(vae.log_normal(x, mean, logvar), torch.distributions.Normal(mean, (logvar / 2).exp()).log_prob(x))


@given(st.floats(-40, 40))
def test_log_bernoulli_is_normalised(logit):                                    # a sign of the logit
    logit = torch.tensor(logit)
    both = torch.stack([vae.log_bernoulli(torch.tensor(v), logit) for v in (-1.0, 1.0)])
    close(both.exp().sum(), 1.0)
    close(both[1].exp(), logit.sigmoid())


@given(numbers, st.floats(-2, 1))
def test_reparameterized_gradients_are_those_of_the_expectation(mu, logvar):    # exp(logvar)
    eps, w = hermite()
    mu, logvar = torch.tensor(mu, requires_grad=True), torch.tensor(logvar, requires_grad=True)
    z = vae.reparameterize(mu, logvar, eps)
    found = torch.autograd.grad((w * z.square()).sum(), [mu, logvar])
    close(found[0], 2 * mu.detach())                                            # E z^2 = mu^2 + exp(logvar)
    close(found[1], logvar.detach().exp())


@given(seeds, st.integers(2, 7))
def test_the_bound_of_fixed_weights_rises_with_the_subset(seed, K):             # log k left out
    log_w = 3 * torch.randn(K, generator=torch.Generator().manual_seed(seed))
    U = [torch.stack([vae.log_mean_exp(log_w[list(s)]) for s in itertools.combinations(range(K), k)]).mean()
         for k in range(1, K + 1)]
    assert all(a <= b + 1e-12 for a, b in zip(U, U[1:]))
    close(U[0], log_w.mean())
    close(U[-1], log_w.exp().mean().log())
    close(vae.log_mean_exp(log_w.expand(3, K), 1), U[-1].expand(3))


@given(seeds, st.integers(1, 5), st.integers(1, 4))
def test_mixture_is_the_mean_of_its_components(seed, K, Z):                     # a factor of the cross term
    g = torch.Generator().manual_seed(seed)
    mu, logvar, z = torch.randn(K, Z, generator=g), torch.randn(K, Z, generator=g), torch.randn(3, 5, Z, generator=g)
    weight = torch.rand(K, generator=g)
    wanted = (weight * vae.log_normal(z[..., None, :], mu, logvar).sum(-1).exp()).sum(-1).log()
    close(vae.log_mixture(z, mu, logvar, weight.log()), wanted)
    order = torch.randperm(K, generator=g)
    twice = vae.log_mixture(z, mu[order].repeat(2, 1), logvar[order].repeat(2, 1), weight[order].repeat(2).log())
    close(twice, wanted + math.log(2))                                          # order, duplicates


# ---- networks


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 3), st.integers(1, 5))
@settings(max_examples=12)
def test_convolutions_take_any_size(H, W, C, Z):                                # s * n for s * m; s for s + 1
    shape = (C, H, W)
    down, up, grid = vae.pyramid(shape, 2)
    assert max(grid[1:]) <= 8 and grid[0] in (2, 4)
    x = torch.randn(2, *shape)
    assert down(x).shape == (2, *grid) and up(down(x)).shape == x.shape
    model = vae.VAE(shape, Z, width=2, network="conv")
    mu, logvar = model.encode(x)
    assert mu.shape == logvar.shape == (2, Z) and model.decode(mu)[0].shape == x.shape
    model = vae.GridVAE(shape, Z, width=2)
    assert model.encode(x).shape == (2, math.prod(grid[1:]), Z) and model.decode(model.encode(x))[0].shape == x.shape


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_each_row_is_encoded_and_decoded_alone_and_listens(network):
    model = rough(shape=(1, 12, 12), latent=3, network=network, likelihood="bernoulli")
    x = torch.randn(4, 1, 12, 12)
    mu, logvar = model.encode(x)
    close(model.encode(x.flip(0))[0].flip(0), mu)
    assert (mu[0] != mu[1]).all() and (logvar[0] != logvar[1]).all()
    (out,) = model.decode(mu)
    close(model.decode(mu[1:3])[0], out[1:3])
    assert (out[0] != out[1]).any() and out.std() > 0


# ---- bounds


@given(seeds, st.integers(1, 3), st.floats(0.05, 2))
def test_at_the_true_posterior_every_weight_is_the_likelihood(seed, Z, noise):  # a sign of log q; log_prior left out
    model, law = linear_gaussian(4, Z, noise, seed)
    x = 2 * torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    close(model.log_weights(x, 3), law.log_prob(x).expand(3, 5))
    close(model.bound(x, 7, block=3), law.log_prob(x))


def test_elbo_is_the_likelihood_less_the_posteriors_kl():                       # nll + kl
    torch.manual_seed(0)
    model, law = linear_gaussian()
    x = torch.randn(3, 4)
    found = torch.stack([model.elbo(x) for _ in range(4000)])
    assert ((found.mean(0) - law.log_prob(x)).abs() < 5 * found.std(0) / 4000**0.5).all()
    encoder = model.encoder
    model.encoder = Says(lambda x: encoder(x) + 0.5)                            # mu and logvar half too large
    mu, logvar = encoder(x).chunk(2, 1)
    gap = 0.5 * (0.25 / logvar.exp() + math.exp(0.5) - 1 - 0.5).sum(1)          # KL(q || p(z|x)) of the shifted q
    found = torch.stack([model.elbo(x) for _ in range(4000)])
    assert ((found.mean(0) - law.log_prob(x) + gap).abs() < 5 * found.std(0) / 4000**0.5).all()


def test_likelihood_by_quadrature_is_exact():                                   # half the cell; a missing 2 pi; log K
    model, law = linear_gaussian(D=3, noise=0.2)
    torch.manual_seed(0)
    x = law.sample((600,))                                                      # more than a block of rows
    close(model.log_prob(x), law.log_prob(x), atol=1e-4, rtol=1e-4)             # the grid ends at 5
    for latent in (1, 3):
        with pytest.raises(ValueError, match="two dimensions"):
            rough(latent=latent).log_prob(x[:, :2])
    vamp = rough("vamp", pseudo=6)                                              # the same prior on its own nodes and on a grid
    axis = (torch.arange(400) + 0.5) / 25 - 8
    z = torch.cartesian_prod(axis, axis)
    vamp.decoder[-1].bias.data[2:] = -1.0
    wanted = vamp.log_prob(x[:50, :2])
    vamp.nodes = lambda: (z, vamp.log_prior(z) - 2 * math.log(25))
    close(vamp.log_prob(x[:50, :2]), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_importance_weights_sum_to_a_probability(name):                         # sum over x in {-1, 1}^D of p(x) = 1
    torch.manual_seed(0)
    model = rough(name, shape=(1, 2, 2), latent=2, likelihood="bernoulli")
    x = 2.0 * torch.cartesian_prod(*[torch.arange(2)] * 4).view(16, 1, 2, 2) - 1
    p = torch.stack([model.bound(x, 500).exp().sum() for _ in range(20)])
    assert abs(p.mean() - 1) < 5 * p.std() / 20**0.5 and p.std() < 0.05


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_likelihoods_sum_over_pixels(likelihood):                               # a mean over pixels
    small, large = (vae.VAE((1, 3, w), 2, likelihood) for w in (4, 8))
    x, z = torch.rand(5, 1, 3, 4).round() * 2 - 1, torch.randn(5, 2)
    out = torch.linspace(-1, 1, 12).view(1, 1, 3, 4).expand_as(x)
    rest = () if likelihood == "bernoulli" else (torch.tensor(-0.3),)
    small.decode, large.decode = lambda z: (out, *rest), lambda z: (torch.cat([out, out], -1), *rest)
    close(large.log_likelihood(torch.cat([x, x], -1), z), 2 * small.log_likelihood(x, z))
    if likelihood == "bernoulli":
        close(small.log_likelihood(x, z), torch.where(x == 1, out.sigmoid(), (-out).sigmoid()).log().flatten(1).sum(1))


def test_grey_levels_are_drawn_as_bits_each_time_anew():                        # (x + 1); levels of 2 stay
    torch.manual_seed(0)
    model = vae.VAE((1, 1, 1), 1, "bernoulli")
    x = torch.full((40_000, 1, 1, 1), -0.4)
    bits = model.binarize(x)
    assert set(bits.unique().tolist()) == {-1.0, 1.0} and abs(bits.mean() + 0.4) < 5 / 200
    assert (model.binarize(x) != bits).any()
    close(model.binarize(bits), bits)
    close(vae.VAE((1, 1, 1), 1, "gaussian").binarize(x), x)


@given(seeds)
def test_loss_is_minus_the_elbo_and_its_parts_add_up(seed):
    model = rough(latent=3)
    x = torch.randn(6, 2)
    torch.manual_seed(seed)
    row = model.loss(x)
    torch.manual_seed(seed)
    close(row["loss"], -model.elbo(x).mean())
    close(row["loss"], row["nll"] + row["kl"])
    close(row["kl"], vae.kl_to_standard(*model.encode(x)).sum(1).mean())


@given(st.floats(0, 8), st.floats(0, 5), st.floats(0, 1))
def test_beta_weighs_the_kl_and_capacity_holds_it(beta, capacity, progress):    # abs left out; progress left out
    model = rough("beta", beta=beta, capacity=capacity)
    row = model.loss(torch.randn(6, 2), progress)
    kl = abs(row["kl"] - capacity * progress) if capacity else row["kl"]
    close(row["loss"], row["nll"] + beta * kl)


@given(seeds, st.integers(1, 4))
def test_iwae_gradient_weighs_each_sample_by_its_softmax(seed, k):              # softmax(-log w)
    model = rough("iwae", k=k)
    x = torch.randn(3, 2)
    weights = list(model.parameters())
    torch.manual_seed(seed)
    found = torch.autograd.grad(model.loss(x)["loss"], weights)
    torch.manual_seed(seed)
    log_w = model.log_weights(x, k)
    wanted = torch.autograd.grad(-(log_w.softmax(0).detach() * log_w).sum(0).mean(), weights)
    for a, b in zip(found, wanted):
        close(a, b)


# ---- the VampPrior


def test_vamp_with_one_standard_pseudo_input_is_the_vae():
    vamp = rough("vamp", pseudo=1)
    vamp.components = lambda: (torch.zeros(1, 2), torch.zeros(1, 2))
    z = torch.randn(4, 5, 2)
    close(vamp.log_prior(z), vae.VAE.log_prior(vamp, z))


def test_vamp_prior_is_normalised_and_sampled_as_it_is_scored():                # samples from N(0, I)
    torch.manual_seed(0)
    vamp = rough("vamp", latent=1, pseudo=5)
    with torch.no_grad():
        vamp.pseudo.mul_(4)
        vamp.encoder[-1][-1].weight.mul_(4)
    z = torch.linspace(-40, 40, 20_001)[:, None]
    p = vamp.log_prior(z).exp() * (z[1] - z[0])
    close(p.sum(), 1.0, atol=1e-6, rtol=0)
    mean, square = (p * z[:, 0]).sum(), (p * z[:, 0].square()).sum()
    draws = vamp.sample_prior(40_000)
    assert draws.shape == (40_000, 1) and abs(mean) + square > 0.05
    assert abs(draws.mean() - mean) < 5 * draws.std() / 200 and abs(draws.square().mean() - square) < 5 * draws.square().std() / 200


def test_vamp_kl_is_estimated_against_its_own_prior_and_moves_the_pseudo_inputs():
    vamp = rough("vamp", pseudo=4)
    mu, logvar, z = torch.randn(3, 2), torch.randn(3, 2), torch.randn(3, 2)
    close(vamp.kl(mu, logvar, z), vae.log_normal(z, mu, logvar).sum(1) - vae.log_mixture(z, *vamp.encode(vamp.pseudo), -math.log(4)))
    vamp.loss(torch.randn(5, 2))["loss"].backward()
    assert (vamp.pseudo.grad != 0).all()
    images = rough("vamp", shape=(1, 2, 2), pseudo=3, likelihood="bernoulli")
    with torch.no_grad():
        images.pseudo.fill_(7.0)
    close(images.components()[0], images.encode(torch.ones(3, 1, 2, 2))[0])


# ---- a book of codes


def test_the_nearest_code_is_nearest_and_the_lowest_of_equals():                # a sign; the square left out
    g = torch.Generator().manual_seed(0)
    z, codes = torch.randint(-4, 5, (300, 3), generator=g).double(), torch.randint(-4, 5, (40, 3), generator=g).double()
    distance = (z[:, None] - codes).square().sum(2)
    lowest = torch.stack([(row == row.min()).nonzero()[0, 0] for row in distance])
    close(vae.nearest_code_plain(z, codes), lowest)
    model = rough("vq", codes=40, latent=3)
    model.codes.copy_(codes)
    e, index = model.quantize(z.view(30, 10, 3))
    close(index.flatten(), lowest)
    close(e, codes[index])
    close(model.quantize(e)[0], e)                                              # idempotent
    close(model.code(torch.ones(2, 2)), model.quantize(model.encode(torch.ones(2, 2)))[0])


def book(shape=(1, 8, 8), **options):
    model = rough("vq", shape=shape, latent=3, likelihood="bernoulli" if len(shape) > 1 else "gaussian", **{"codes": 9, **options})
    model.codes.copy_(torch.randn(model.codes.shape, generator=torch.Generator().manual_seed(5)))
    return model


def test_gradients_pass_straight_through_and_stop_where_they_should():          # e alone; z + e - z; detach left out
    model, x = book(commitment=0.0), torch.rand(4, 1, 8, 8).round() * 2 - 1
    model.eval()
    seen = {}
    log_likelihood = model.log_likelihood
    model.log_likelihood = lambda x, z: log_likelihood(x, seen.setdefault("z", z.detach().requires_grad_()))
    nll, rate, commitment = model.terms(x)
    close(seen["z"].detach(), model.code(x))                                    # the decoder sees the codes
    nll.sum().backward()
    model.log_likelihood = log_likelihood
    z = model.encode(x)
    wanted = torch.autograd.grad((z * seen["z"].grad).sum(), list(model.encoder.parameters()))
    found = torch.autograd.grad(model.terms(x)[0].sum(), list(model.encoder.parameters()))
    for a, b in zip(found, wanted):
        close(a, b)
    own = list(model.prior.parameters())
    assert all(g is None for g in torch.autograd.grad(model.terms(x)[1].sum(), [*model.encoder.parameters()], allow_unused=True))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(model.terms(x)[1].sum(), own))
    assert not model.codes.requires_grad


@given(st.floats(0, 3))
@settings(max_examples=5)
def test_commitment_pulls_the_encoder_alone_and_is_no_part_of_the_bound(beta):  # the square of a sum; commitment in elbo
    model, x = book(commitment=beta), torch.rand(4, 1, 8, 8).round() * 2 - 1
    model.eval()
    z = model.encode(x)
    close(model.terms(x)[2], beta * ((z - model.code(x)) ** 2).sum((1, 2)))
    row, (nll, rate, pull) = model.loss(x), model.terms(x)
    close(row["loss"], (nll + rate + pull).mean())
    close(row["nll"] + row["kl"], -model.elbo(x).mean())
    close(model.bound(x, 1000), model.elbo(x))
    decoder = torch.autograd.grad(pull.sum(), [*model.decoder.parameters()], allow_unused=True)
    assert all(g is None for g in decoder)


@given(seeds, st.integers(2, 6), st.floats(0.5, 0.95))
@settings(max_examples=10)
def test_the_book_follows_the_means_and_counts_are_conserved(seed, K, decay):   # 1 - decay; count for total
    g = torch.Generator().manual_seed(seed)
    model = vae.VQVAE((2,), 3, codes=K, decay=decay, width=4)
    centres = 20 * torch.randn(K, 3, generator=g)
    index = torch.arange(60) % K                                                # all in use: no code is dead
    model.count.fill_(7.0), model.total.copy_(7 * centres)
    sums, count = 7 * centres, 7.0
    for step in range(1, 4):
        z = centres[index] + torch.randn(60, 3, generator=g)
        model.follow(z, index)
        sums = decay * sums + (1 - decay) * torch.stack([z[index == k].sum(0) for k in range(K)])
        close(model.count.sum(), decay**step * 7 * K + (1 - decay**step) * 60)
        close(model.total, sums)
        close(model.codes, model.total / model.count[:, None])
    assert count and (model.codes - centres).abs().max() < 6


def test_unused_codes_start_again_at_vectors_of_the_batch_and_eval_moves_nothing():        # 0.03 usual; drawn at zero
    torch.manual_seed(0)
    model = vae.VQVAE((2,), 3, codes=5, width=4)
    z = torch.randn(50, 3) + 10
    model.follow(z, torch.zeros(50, dtype=torch.long))                          # the first batch fills the book
    assert torch.cdist(model.codes[1:], z).min(1).values.max() < 1e-6 and model.codes.isfinite().all()
    close(model.codes[0], z.mean(0))
    assert (model.count > 0).all()
    before, x = model.codes.clone(), torch.randn(8, 2)
    model.eval()
    model.loss(x)
    model.train()
    model.elbo(x)
    close(model.codes, before)
    model.loss(x)
    assert (model.codes != before).any()


@pytest.mark.parametrize("grid, K", [((1, 1), 5), ((2, 2), 3), ((3, 1), 4), ((1, 4), 2)])
def test_prior_of_codes_is_a_law_and_is_sampled_as_it_is_scored(grid, K):       # above of i + 1; the last code left out
    torch.manual_seed(0)
    P = math.prod(grid)
    prior = vae.CodePrior(K, grid, width=8)
    with torch.no_grad():
        for p in prior.parameters():
            p.mul_(3)
    every = torch.cartesian_prod(*[torch.arange(K)] * P).view(-1, P)
    p = prior.log_prob(every).exp()
    close(p.sum(), 1.0)
    draws = prior.sample(20_000)
    share = ((draws * K ** torch.arange(P - 1, -1, -1)).sum(1)).bincount(minlength=K**P) / 20_000
    assert (share - p).abs().max() < 5 * 0.5 / 20_000**0.5 and p.std() > 0.1 / K**P


def test_prior_reads_every_code_before_and_none_after():                        # left of the same place
    torch.manual_seed(0)
    prior, index = vae.CodePrior(6, (3, 4), width=8), torch.randint(6, (1, 12))
    logits, _ = prior(index)
    for i in range(12):
        other = index.clone()
        other[0, i] = (other[0, i] + 1) % 6
        changed = (prior(other)[0] != logits).any(2)[0]
        assert not changed[: i + 1].any() and changed[i + 1 :].all()
    seen = {}
    prior.gru.register_forward_pre_hook(lambda gru, args: seen.update(x=args[0]))
    prior(index)
    left, above = seen["x"][0].chunk(2, 1)
    close(left[1:], prior.embed(index[0, :-1]))
    close(above[4:], prior.embed(index[0, :-4]))
    close(torch.cat([left[:1], above[:4]]), prior.embed(torch.full((5,), 6)))


def test_a_book_over_points_is_a_mixture_whose_likelihood_is_exact():           # log_weight left out
    torch.manual_seed(0)
    model = book((2,), codes=7)
    x = torch.randn(30, 2)
    log_pi = model.prior.log_prob(torch.arange(7)[:, None])
    mean, logvar = model.decode(model.codes[:, None])
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=log_pi),
        torch.distributions.Independent(torch.distributions.Normal(mean, (logvar / 2).exp()), 1))
    close(model.log_prob(x), mixture.log_prob(x))
    assert (model.elbo(x) <= model.log_prob(x)).all()


# ---- sparse codes


def ista(h, D, sparsity, L, steps):
    z, path = torch.zeros(*h.shape[:-1], D.shape[1]), []
    for _ in range(steps):
        z = vae.soft_threshold(z + (h - z @ D.T) @ D / L, sparsity / L)
        path.append(z)
    return path


@given(st.floats(-3, 3), st.floats(0, 2))
def test_soft_threshold_is_the_prox_of_the_absolute_value(v, theta):            # v.abs() + theta
    z = torch.linspace(-4, 4, 8001)
    best = ((z - v).square() / 2 + theta * z.abs()).min()
    found = vae.soft_threshold(torch.tensor(v), theta)
    assert (found - v).square() / 2 + theta * found.abs() <= best + 1e-12
    a, b = torch.randn(2, 50)
    assert ((vae.soft_threshold(a, theta) - vae.soft_threshold(b, theta)).abs() <= (a - b).abs() + 1e-12).all()


@given(st.integers(1, 9), st.integers(0, 9))
def test_dictionary_is_orthonormal_when_square_and_of_unit_atoms(d, more):      # i + 0.5
    D = vae.dct_dictionary(d, d + more)
    close(D.square().sum(0), torch.ones(d + more))
    close(vae.dct_dictionary(d, d).T @ vae.dct_dictionary(d, d), torch.eye(d))
    assert torch.linalg.matrix_rank(D) == d


@given(seeds, st.floats(0.1, 1))
@settings(max_examples=4)
def test_ista_falls_to_a_point_that_satisfies_kkt(seed, sparsity):              # 0.5 left out of the objective
    g = torch.Generator().manual_seed(seed)
    D = vae.dct_dictionary(4, 7)
    h, L = torch.randn(5, 4, generator=g), torch.linalg.matrix_norm(D, 2).item() ** 2
    path = ista(h, D, sparsity, L, 3000)
    values = torch.stack([vae.sparse_objective(h, z, D, sparsity) for z in path[:60]])
    assert (values.diff(dim=0) <= 1e-12).all()
    z = path[-1].requires_grad_()
    close(z, vae.soft_threshold(z + (h - z @ D.T) @ D / L, sparsity / L), atol=1e-4, rtol=0)
    smooth = 0.5 * (h - z @ D.T).square().sum()
    pull = -torch.autograd.grad(smooth, z)[0]
    assert (pull.abs() <= sparsity + 1e-3).all()
    active = z.detach().abs() > 1e-2
    close(pull[active], sparsity * z.detach()[active].sign(), atol=1e-3, rtol=0)
    total = vae.sparse_objective(h, z, D, sparsity)
    close(total.sum(), smooth + sparsity * z.abs().sum())
    most = (h @ D).abs().amax()
    assert (ista(h, D, most.item(), L, 30)[-1] == 0).all()                      # above this there is nothing


@pytest.mark.parametrize("unrolled", [1, 2, 8])
def test_lista_starts_as_ista(unrolled):                                        # eye left out; D / L ** 2
    model = vae.SCVAE((2,), 4, codes=7, sparsity=0.2, unrolled=unrolled, width=4)
    h, L = torch.randn(6, 3, 4), torch.linalg.matrix_norm(model.dictionary, 2).item() ** 2
    close(model.lista(h), ista(h, model.dictionary, 0.2, L, unrolled)[-1])
    square = vae.SCVAE((2,), 4, codes=4, sparsity=0.2, unrolled=1, width=4)     # orthonormal: one step is exact
    close(square.lista(h), vae.soft_threshold(h @ square.dictionary, 0.2))
    square.theta.data.fill_(-1.0)
    close(square.lista(h), h @ square.dictionary)                               # a threshold is never negative


def test_sparse_codes_are_decoded_through_the_dictionary_and_scored():          # z for D z; the norm left out
    model, x = rough("sc", codes=7, latent=4), torch.randn(5, 2)
    close(model.encode(1e3 * x).square().mean(2), torch.ones(5, 1), atol=1e-4, rtol=0)
    z = model.code(x)
    assert z.shape == (5, 1, 7)
    close(model.decode(z)[0], vae.GridVAE.decode(model, z @ model.dictionary.T)[0])
    nll, objective = model.terms(x)
    close(nll, -model.log_likelihood(x, z))
    close(objective, vae.sparse_objective(model.encode(x), z, model.dictionary, 0.1)[:, 0])
    row = model.loss(x)
    close(row["loss"], row["nll"] + row["objective"])


def test_fitted_prior_keeps_values_zeros_and_correlation():                     # scores of unsorted ranks; rank of u
    torch.manual_seed(0)
    model = rough("sc", codes=3, latent=4)
    with pytest.raises(ValueError, match="call fit"):
        model.sample(2)
    a, b = torch.randn(2, 2000)
    z = torch.stack([a, 0.8 * a + 0.6 * b, torch.where(a.abs() + b > 0, 0.0, b)], 1)[:, None]
    model.code = lambda x: z
    model.fit(torch.zeros(2000, 2))
    draws = model.sample_prior(20_000)[:, 0]
    assert all(set(draws[:, j].tolist()) <= set(z[:, 0, j].tolist()) for j in range(3))
    close((draws[:, 2] == 0).double().mean(), (z[:, 0, 2] == 0).double().mean(), atol=0.02, rtol=0)
    close(draws[:, :2].T.corrcoef(), z[:, 0, :2].T.corrcoef(), atol=0.03, rtol=0)
    close(draws.std(0), z[:, 0].std(0), atol=0.05, rtol=0)


# ---- samples, training, the command


def test_samples_follow_the_model():                                            # the mean for points
    torch.manual_seed(0)
    model, law = linear_gaussian(D=3)
    x = model.sample(40_000)
    assert ((x.mean(0) - law.mean).abs() < 5 * x.std(0) / 200).all()
    close(x.T.cov(), law.covariance_matrix, atol=0.05, rtol=0)


def test_images_are_shown_as_means_on_the_scale_of_the_data():
    model = rough(shape=(1, 4, 4), likelihood="bernoulli")
    z, x = torch.randn(3, 2), torch.rand(3, 1, 4, 4).round() * 2 - 1
    close((model.mean(z) + 1) / 2, model.decode(z)[0].sigmoid())
    close(model.reconstruct(x), model.mean(model.encode(x)[0]))
    model = rough(shape=(3, 4, 4), likelihood="gaussian")
    close(model.mean(z), model.decode(z)[0])
    torch.manual_seed(0)
    a = model.sample(3)
    torch.manual_seed(0)
    close(a, model.mean(model.sample_prior(3)))


def test_build_takes_channels_for_convolutions_and_width_for_layers():  # the other one
    config = dict(model="vae", network="auto", likelihood="auto", latent=3, code_dim=2, width=12, channels=5)
    assert vae.build(config, (1, 8, 8), 2).decoder[0].out_features == 12
    convs = [m for m in vae.build(config | {"network": "conv"}, (1, 16, 16), 2).modules() if isinstance(m, torch.nn.Conv2d)]
    assert convs[0].out_channels == 5


def test_training_tells_the_loss_how_far_it_is():           # (step + 2) / steps; progress = 0 where none is given
    model, seen = vae.BetaVAE((2,), 2, width=4, beta=3.0, capacity=1.5), []
    x = torch.randn(5, 2)
    torch.manual_seed(0)
    whole = model.loss(x)
    torch.manual_seed(0)
    assert model.loss(x, 1.0)["loss"] == whole["loss"] == whole["nll"] + 3 * (whole["kl"] - 1.5).abs()
    loss, model.loss = model.loss, lambda x, progress: seen.append(progress) or loss(x, progress)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    assert len(list(vae.train(model, optimizer, iter([x] * 4), 4, 1e-3))) == 4 and seen == [0.25, 0.5, 0.75, 1.0]


def test_a_code_is_dead_below_three_hundredths_of_the_usual_share():    # 0.06; <= of another mean
    model = vae.VQVAE((2,), 2, width=4, codes=3, decay=1.0)
    model.count.copy_(torch.tensor([3.0, 0.031, 0.028]))    # their mean is 1.02
    model.total.copy_(model.count[:, None].expand(3, 2))
    model.follow(torch.full((4, 2), 7.0), torch.zeros(4, dtype=torch.long))
    close(model.codes, torch.tensor([[1.0, 1.0], [1.0, 1.0], [7.0, 7.0]]))


@pytest.mark.parametrize("name", vae.MODELS)
def test_training_raises_the_bound(name):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    truth = data.load("gmm")
    model = vae.MODELS[name]((2,), 2, width=32)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    x = truth.sample(500)
    score = "nll" if model.bounded else "reconstruction"
    before, rows = vae.evaluate(model, x, 20)[score].mean(), []
    for row in vae.train(model, optimizer, truth.batches(128), 300, 5e-3):
        rows.append(optimizer.param_groups[0]["lr"])
        assert not row["loss"].requires_grad
    close(rows, [5e-3 * min(1, (i + 1) / 100) * 0.5 * (1 + math.cos(math.pi * i / 300)) for i in range(300)])
    scores = vae.evaluate(model, x, 20)
    assert all(value.shape == (500,) for value in scores.values()) and scores[score].mean() < before - 1
    if model.bounded:
        close(scores["elbo"], -scores["reconstruction"] - scores["rate"])
        assert -scores["elbo"].mean() >= scores["nll"].mean() and (-scores["elbo"] == scores["nll"]).all() == (name == "vq")
        assert scores["nll"].mean() > truth.entropy - 5 * scores["nll"].std() / 500**0.5


@pytest.mark.parametrize("dataset, options", [("gmm", ["--pseudo", 9]), ("gmm", ["--model", "vae", "--latent", 3]),
                                              ("persian", ["--model", "iwae", "--network", "conv"]),
                                              ("persian", ["--model", "beta", "--likelihood", "gaussian"]),
                                              ("gmm", ["--model", "vq"]), ("gmm", ["--model", "sc"]),
                                              ("persian", ["--model", "vq"]), ("persian", ["--model", "sc"]),
                                              ("dsprites", ["--model", "beta"]), ("faces", ["--size", 32])])
def test_a_run_leaves_its_numbers(cli, monkeypatch, dataset, options):
    monkeypatch.setattr(judges, "train_classifier",
                        lambda x, labels, classes, levels, *rest, **more:
                        judges.Classifier(x.shape[1], classes, levels).eval())
    monkeypatch.setattr(latents, "tsne", lambda z, seed: (z[:, :2], 0.0))
    kmeans = latents.kmeans
    monkeypatch.setattr(latents, "kmeans", lambda x, k, seed: kmeans(x, k, restarts=1, steps=2, seed=seed))
    small = ["--steps", 3, "--batch", 8, "--width", 4, "--channels", 4, "--codes", 6, "--samples", 200, "--bound-samples", 7, "--bound-rows", 20]
    status, error, out = cli(vae, "--dataset", dataset, *small, *options)
    assert status == 0, error
    (folder,) = out.iterdir()
    result = json.loads((folder / "metrics.json").read_text())
    if "sc" in options:
        assert {"reconstruction", "objective"} <= result["metrics"].keys() and not {"elbo", "rate"} & result["metrics"].keys()
    else:
        assert {"elbo", "nll"} <= result["metrics"].keys() and result["metrics"]["nll_standard_error"]["value"] > 0
    if dataset == "persian":
        assert "cluster_accuracy" in result["metrics"] and (folder / "latents-tsne.png").is_file()
        assert ("codes_used" in result["metrics"]) == ("vq" in options)
        assert (folder / "traversals.png").is_file() == ("vq" not in options and "sc" not in options)
    if dataset == "dsprites":
        assert {"mig_chen", "mig_bins", "mig_chen_posX"} <= result["metrics"].keys()
    if dataset == "faces":
        assert "attribute_added" in result["metrics"] and (folder / "attributes.png").is_file()
    assert (folder / "samples.png").is_file() and (folder / "process.gif").is_file()
    status, error, _ = cli(vae, "--ckpt", folder / "model.pt", "--samples", 200, "--bound-samples", 7, "--bound-rows", 20)
    assert status == 0, error


@pytest.mark.parametrize("options, words", [
    (["--latent", "0"], "--latent must be at least 1"), (["--width", "0"], "--width"), (["--beta", "-1"], "0 or more"),
    (["--capacity", "-1"], "0 or more"), (["--beta", "nan"], "0 or more"), (["--model", "iwae", "--k", "0"], "at least 1"),
    (["--model", "vamp", "--pseudo", "0"], "at least 1"), (["--likelihood", "bernoulli"], "no bits"),
    (["--network", "conv"], "no pixels"), (["--model", "vqvae"], "vae"), (["--code-dim", "0"], "at least 1"),
    (["--model", "vq", "--dataset", "persian", "--codes", "10001"], "larger than the 10000 images")])
def test_bad_input_gets_a_sentence(cli, options, words):
    status, error, _ = cli(vae, *options)
    assert status == 2 and words in error and "Traceback" not in error
