"""pointflows.py: a bijection of whole clouds, equivariant, with the log-determinant of the full Jacobian. Parameters are
perturbed first. Behind each `def`: a line that must not break."""

import json
import pathlib
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import pointflows

close = torch.testing.assert_close
seeds = st.integers(0, 99)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def make(seed=0, **options):
    torch.manual_seed(seed)
    model = pointflows.PointFlow(**dict(channels=3, width=6, depth=2, k=2, noise=2) | options)
    with torch.no_grad():
        model.denoise(cloud(seed, 2, 20))
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape)
    return model


def cloud(seed, B=2, N=12):
    return torch.randn(B, N, 3, generator=rng(seed + 7))


@given(seeds)
def test_neighbours_are_the_nearest_others(seed):                       # the point itself; largest
    x = cloud(seed)
    graph = pointflows.neighbours(x, 3)
    d = torch.cdist(x, x)
    for b in range(2):
        for i in range(12):
            others = sorted((float(d[b, i, j]), j) for j in range(12) if j != i)
            assert graph[b, i].tolist() == [j for _, j in others[:3]]
    h = torch.randn(2, 5, 12, generator=rng(seed))
    close(pointflows.gathered(h, graph)[1, :, 4, 2], h[1, :, graph[1, 4, 2]])


@given(seeds)
@settings(max_examples=5)
def test_log_det_is_that_of_the_jacobian_of_four_points(seed):          # N times; one coupling's sum; neighbours of b
    model = make(seed)
    y, graph, h = (v.detach() for v in model.condition(cloud(seed, 1, 4)))
    z, log_det = model(y, graph, h)
    J = torch.autograd.functional.jacobian(lambda v: model(v.view_as(y), graph, h)[0].flatten(), y.flatten())
    assert J.shape == (24, 24) and log_det.abs() > 1e-3
    close(log_det[0], torch.linalg.slogdet(J)[1])
    back, minus = model.inverse(z, graph, h)
    close(back, y, rtol=1e-7, atol=1e-8)
    close(minus, -log_det, rtol=1e-6, atol=1e-7)


@given(seeds)
@settings(max_examples=8)
def test_points_in_another_order_give_the_same_in_that_order(seed):     # a position of a point
    model, x = make(seed), cloud(seed)
    order = torch.randperm(12, generator=rng(seed))
    z, log_det = model(*model.condition(x))
    again, log_det_again = model(*model.condition(x[:, order]))
    close(again, z[:, :, order])
    close(log_det_again, log_det)
    close(model.denoise(x[:, order]), model.denoise(x)[:, order])
    close(model.denoise(x)[1:], model.denoise(x[1:]))                   # no cloud knows of another


def test_what_is_left_alone_comes_back():                               # the order of layers; zeroed = 0
    model, x = make(), cloud(0)
    close(model.denoise(x, "left"), x, rtol=1e-8, atol=1e-8)
    close(model.denoise(x, "zero", 0), x, rtol=1e-8, atol=1e-8)
    assert (model.denoise(x) - x).abs().max() > 1e-3


def test_the_noise_of_z_is_its_last_channels():                         # -n: for :n
    model, z = make(), torch.randn(2, 6, 5, generator=rng(0))
    for latent, n in (("zero", 2), ("zero", 4), ("random", 2)):
        edited = model.edit(z, latent, n)
        assert torch.equal(edited[:, :-n], z[:, :-n]) and not torch.equal(edited[:, -n:], z[:, -n:])
    assert not model.edit(z)[:, -2:].any() and torch.equal(model.edit(z), model.edit(z, "zero", 2))


def test_it_learns_to_leave_the_noise_out():                            # the loss's sign; error of noisy
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = pointflows.PointFlow(channels=3, width=16, depth=2, k=8, noise=3)
    average = pointflows.copy.deepcopy(model)

    def batches():                                                      # a plane with noise across it
        while True:
            clean = torch.cat([torch.rand(8, 64, 2), torch.zeros(8, 64, 1)], 2)
            yield clean + 0.05 * torch.randn(8, 64, 1) * torch.tensor([0.0, 0.0, 1.0]), clean

    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in pointflows.train(model, average, optimizer, batches(), 150, 1e-2):
        pass
    noisy, clean = next(batches())
    with torch.no_grad():
        assert (average.denoise(noisy) - clean).square().mean() < 0.3 * (noisy - clean).square().mean()


@pytest.mark.parametrize("x, says", [(torch.zeros(1, 2, 3), "points or more"), (torch.zeros(1, 0, 3), "points or more"),
                                     (torch.full((1, 9, 3), torch.nan), "finite"), (torch.zeros(9, 3), "finite")])
def test_bad_clouds_are_one_sentence(x, says):                          # the check
    with pytest.raises(ValueError, match=says):
        make().denoise(x)
    with pytest.raises(ValueError, match="channels"):
        pointflows.PointFlow(channels=3, noise=6)
    with pytest.raises(ValueError, match="noise of z"):
        make().denoise(cloud(0), "half")


def test_a_resumed_run_is_the_unbroken_one(resumed, monkeypatch):       # average not kept
    import clouds

    monkeypatch.setattr(clouds, "report", lambda *a, **k: {})
    small = ("--width", 6, "--depth", 1, "--k", 4, "--points", 16, "--batch", 2)
    whole, broken = resumed(pointflows, *small)
    assert whole.keys() == broken.keys() and all(torch.equal(v, broken[k]) for k, v in whole.items())


@pytest.mark.parametrize("flags, says", [(("--dataset", "gmm"), "clouds"), (("--zeroed", 12), "--zeroed must be below 12"),
                                         (("--test-points", 10), "points of a cloud, 10"),
                                         (("--corruptions", "shear,blur"), "distortion_rbf_inv; got blur")])
def test_bad_input_is_one_sentence_before_training(cli, flags, says):   # the check
    status, error, _ = cli(pointflows, *flags, "--steps", 10**6)
    assert status == 2 and says in error and "Traceback" not in error


def test_a_run_reports_the_corruptions_that_it_names(cli, monkeypatch):              # their names not handed on
    import clouds

    monkeypatch.setattr(clouds, "picture", lambda *a: None)
    status, error, out = cli(pointflows, "--steps", 2, "--width", 6, "--depth", 1, "--k", 4, "--points", 16, "--batch", 2,
                             "--test-points", 64, "--corruptions", "shear,cutout")
    assert status == 0, error
    found = json.loads((out / "pointflows-points-shapes3d" / "metrics.json").read_text())["metrics"]
    assert {"chamfer_shear_1", "surface_cutout_5_knn"} <= found.keys() and "chamfer_gaussian_1" not in found


@pytest.mark.parametrize("flags", [["--model", "points"], ["--model=points"]])
def test_flows_hands_clouds_over(flags, cli, monkeypatch):              # argv[0] kept
    import flows

    status, error, _ = cli(flows, *flags, "--dataset", "gmm")
    assert status == 2 and error.startswith("pointflows.py: pointflows wants clouds")
