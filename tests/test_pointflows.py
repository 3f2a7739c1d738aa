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
    model = pointflows.PointFlow(**dict(width=6, depth=2, k=3, noise=4) | options)
    with torch.no_grad():
        model.denoise(cloud(seed, 2, 20))
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
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
    assert torch.equal(graph, pointflows.neighbours(x, 3, rows=5)) and torch.equal(graph[..., :1], pointflows.neighbours(x, 1))
    h = torch.randn(2, 5, 12, generator=rng(seed))
    close(pointflows.gathered(h, graph)[1, :, 4, 2], h[1, :, graph[1, 4, 2]])


@given(seeds)
def test_a_plane_has_the_normal_of_its_points(seed):                    # axes[..., 2]; the sign; a mean left in
    normal = torch.nn.functional.normalize(torch.randn(3, generator=rng(seed)), dim=0)
    x = torch.randn(4, 30, 3, generator=rng(seed + 1))
    flat = x - (x @ normal)[..., None] * normal
    up = torch.randn(4, 3, generator=rng(seed + 2))
    found, spreads = pointflows.plane(flat + 5 * torch.ones(3), up)
    close(found, normal * (up @ normal).sign()[:, None], rtol=1e-5, atol=1e-5)
    close(spreads[:, 0], torch.full((4,), 1e-3))                        # the floor: none across it
    close(spreads[:, 1:].square().sum(1), flat.var(1, correction=0).sum(1))


@given(seeds)
def test_heights_begin_as_the_move_onto_the_plane(seed):                # n m.n of the mean m; sum for mean
    model, x = pointflows.PointFlow(width=6, k=10), cloud(seed, 2, 30)
    y, _, _, unit = model.condition(x)
    graph, measured = pointflows.neighbours(x, 10), model.planes(x)[3].unflatten(1, (3, 6))
    for i, k in enumerate((3, 5, 10)):
        near = torch.stack([x[b, torch.cat([torch.arange(30)[:, None], graph[b, :, :k]], 1)] for b in range(2)])
        normal, spreads = pointflows.plane((near - x[:, :, None]) / unit[..., None], x)
        mean, height = (near.mean(2) - x) / unit, ((near.mean(2) - x) * normal).sum(2) / unit[..., 0]
        close(measured[:, i, :3], spreads.transpose(1, 2))
        close(measured[:, i, 3].abs(), height.abs())
        close(measured[:, i, 3].square() + measured[:, i, 4].square(), mean.square().sum(2))
        close(measured[:, i, 5], measured[:, i, 3] / spreads[..., 0])
        away, (normal_again, heights, places) = (near - x[:, :, None]) / unit[..., None], model.planes(x)[4][i]
        close(heights, (away * normal_again[:, :, None]).sum(3))
        along = places[..., 0] * (away.square().sum(3) - heights.square()).clamp_min(0).sqrt().mean(2, keepdim=True)
        close(along.square() + heights.square(), away.square().sum(3))
        close(places[..., 1], (heights - heights.mean(2, keepdim=True)) / spreads[..., :1])
        assert torch.equal(places[..., 2], places[..., 1].abs())
        onto = normal * ((near.mean(2) - x) * normal).sum(2, keepdim=True)
        close(y[:, 3 + 3 * i : 6 + 3 * i], (onto / unit).transpose(1, 2), rtol=1e-6, atol=1e-6)
    wide = near.mean(2)
    close(y[:, :3], ((x - wide) / unit).transpose(1, 2))
    close(unit.flatten(), (near[:, :, 1:9] - x[:, :, None]).norm(dim=3).mean(2).median(1).values)


@given(seeds, st.floats(0.1, 10))
def test_a_turned_moved_and_larger_cloud_has_the_same_planes(seed, size):            # a length not divided; axes' signs
    model, x = make(seed, k=6), cloud(seed)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=rng(seed)))[0]
    y, graph, h, unit = model.condition(x)
    again = model.condition(size * x @ turn.mT + torch.tensor([3.0, -1.0, 2.0]))
    close(again[0].unflatten(1, (4, 3)), torch.einsum("ij,bcjn->bcin", turn, y.unflatten(1, (4, 3))), rtol=1e-5, atol=1e-6)
    assert torch.equal(again[1], graph)
    close(again[2], h, rtol=1e-5, atol=1e-6)
    close(again[3], size * unit)
    with torch.no_grad():
        close(model.denoise(size * x + 3.0), size * model.denoise(x) + 3.0, rtol=1e-5, atol=1e-5)


def test_features_are_added_to_what_is_measured():                      # a sign; the sum over points for their mean
    model, x = make(), cloud(0)
    _, graph, found, _ = model.condition(x)
    h = torch.nn.functional.silu(model.measured(model.planes(x)[3]))
    h = h + model.first(h, graph)
    h = h + model.whole(h.mean(2, keepdim=True))
    close(found, h + model.second(h, graph))


def test_training_warms_up_and_falls_to_zero_and_averages():            # 101; sin; the other way; the decay
    model, pair = make(k=5), (cloud(0), cloud(1))
    model.layers[0].initialized.fill_(False)                            # on the first batch, and the average with it
    average, seen = pointflows.copy.deepcopy(model), []
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    expected = [p.detach().clone() for p in model.layers[-1].parameters()]
    for _ in pointflows.train(model, average, optimizer, iter([pair] * 9), 6, 0.3):
        rate = min(0.99, (1 + len(seen)) / (10 + len(seen)))
        expected = [rate * e + (1 - rate) * p.detach() for e, p in zip(expected, model.layers[-1].parameters())]
        for e, p in zip(expected, average.layers[-1].parameters()):
            close(p, e)
        seen.append(optimizer.param_groups[0]["lr"])
    expected_lr = [0.3 * (s + 1) / 100 * (1 + torch.tensor(torch.pi * s / 6).cos()) / 2 for s in range(6)]
    close(torch.tensor(seen), torch.stack(expected_lr))
    assert average.layers[0].initialized


def test_all_points_tell_how_much_noise_there_is():                     # h.mean left out; before the neighbours alone
    model = make()
    few = lambda seed: torch.cat([cloud(0, 1, 40), 100 + 10 * cloud(seed, 1, 20)], 1)      # no edge between the two
    (_, _, h, unit), (_, _, again, same) = model.condition(few(1)), model.condition(few(2))
    assert torch.equal(unit, same) and (h - again)[:, :, :40].abs().min() > 1e-6
    with torch.no_grad():
        model.whole.weight.zero_()
    close(model.condition(few(1))[2][:, :, :40], model.condition(few(2))[2][:, :, :40])


def test_a_new_model_leaves_a_cloud_as_it_is():                         # a random W; v added
    model, x = pointflows.PointFlow(width=6, k=10), cloud(0, 2, 30)
    with torch.no_grad():
        model.denoise(x)
        close(model.denoise(x), x, rtol=1e-5, atol=1e-5)
        flat = torch.zeros(1, 30, 3)
        assert model.denoise(flat).isfinite().all()                     # all points in one place


def test_pieces_are_near_pairs_of_thinned_clouds():                    # rows of one alone; the farthest
    g = rng(0)
    clean = torch.rand(3, 2000, 3, generator=g)
    spacings, stream = [], pointflows.pieces(iter([(clean + 1, clean)] * 40), 50, 500)
    for noisy, true in stream:
        assert noisy.shape == (3, 50, 3)
        close(noisy, true + 1)
        centre = noisy[:, :1]                                           # the nearest to the first is itself
        assert ((noisy - centre).norm(dim=2).diff(dim=1) >= 0).all()
        spacings.append(float((noisy - centre).norm(dim=2).max(1).values.mean()))
    assert len(spacings) == 40 and 1.3 < max(spacings) / min(spacings) < 2.2        # densities of 500 to 2,000: 4^(1/3)


def test_the_error_is_a_part_of_the_noise():                            # not divided; clean for noisy
    model, x = pointflows.PointFlow(width=6, k=10), cloud(0, 2, 30)
    with torch.no_grad():
        model.denoise(x)
        close(model.loss(x, x + 0.1)["error"], torch.tensor(1.0), rtol=1e-4, atol=1e-4)
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=rng(1))
        clean = cloud(1, 2, 30)
        expected = (model.denoise(x) - clean).square().sum((1, 2)) / (x - clean).square().sum((1, 2))
        row = model.loss(x, clean, weight=0.5)
        close(row["error"], expected.mean())
        y, graph, h, _ = model.condition(x)
        z, log_det = model(y, graph, h)
        nll = z.square().sum((1, 2)) / 2 + 360 / 2 * torch.tensor(2 * torch.pi).log() - log_det
        close(row["nll"], nll.mean() / 360)
        close(row["loss"], row["error"] + 0.5 * row["nll"])


@given(seeds)
@settings(max_examples=5)
def test_log_det_is_that_of_the_jacobian_of_four_points(seed):          # N times; one coupling's sum; neighbours of b
    model = make(seed)
    y, graph, h = (v.detach() for v in model.condition(cloud(seed, 1, 4))[:3])
    z, log_det = model(y, graph, h)
    J = torch.autograd.functional.jacobian(lambda v: model(v.view_as(y), graph, h)[0].flatten(), y.flatten())
    assert J.shape == (48, 48) and log_det.abs() > 1e-3
    close(log_det[0], torch.linalg.slogdet(J)[1])
    back, minus = model.inverse(z, graph, h)
    close(back, y, rtol=1e-7, atol=1e-8)
    close(minus, -log_det, rtol=1e-6, atol=1e-7)


@given(seeds)
@settings(max_examples=8)
def test_points_in_another_order_give_the_same_in_that_order(seed):     # a position of a point
    model, x = make(seed), cloud(seed)
    order = torch.randperm(12, generator=rng(seed))
    z, log_det = model(*model.condition(x)[:3])
    again, log_det_again = model(*model.condition(x[:, order])[:3])
    close(again, z[:, :, order])
    close(log_det_again, log_det)
    close(model.denoise(x[:, order]), model.denoise(x)[:, order])
    close(model.denoise(x)[1:], model.denoise(x[1:]))                   # no cloud knows of another


def test_what_is_left_alone_comes_back():                               # the order of layers; zeroed = 0
    model, x = make(), cloud(0)
    assert pointflows.round_trip(model, x) < 1e-8
    model.inverse = lambda z, graph, h: (z, None)
    y, graph, h, _ = model.condition(x)
    close(torch.tensor(pointflows.round_trip(model, x)), ((model(y, graph, h)[0] - y).abs() / y.abs().clamp_min(1)).max().detach())
    model = make()
    close(model.denoise(x, "left"), x, rtol=1e-8, atol=1e-8)
    close(model.denoise(x, "zero", 0), x, rtol=1e-8, atol=1e-8)
    assert (model.denoise(x) - x).abs().max() > 1e-3


def test_the_noise_of_z_is_its_last_channels():                         # -n: for :n
    model, z = make(), torch.randn(2, 12, 5, generator=rng(0))
    for latent, n in (("zero", 4), ("zero", 7), ("random", 4)):
        edited = model.edit(z, latent, n)
        assert torch.equal(edited[:, :-n], z[:, :-n]) and not torch.equal(edited[:, -n:], z[:, -n:])
    random = model.edit(torch.randn(2, 12, 2000, generator=rng(0)), "random")[:, -4:]
    assert random.mean().abs() < 0.05 and (random.std() - 1).abs() < 0.05
    assert not model.edit(z)[:, -4:].any() and torch.equal(model.edit(z), model.edit(z, "zero", 4))


def test_it_learns_to_leave_the_noise_out():                            # the loss's sign; error of noisy
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = pointflows.PointFlow(width=16, depth=1, k=15)
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
    for options in ({"noise": 12}, {"noise": 0}, {"k": 2}):
        with pytest.raises(ValueError, match="of 12 channels 1 to 11 can"):
            pointflows.PointFlow(**options)
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
    import metrics

    monkeypatch.setattr(metrics, "clouds_picture", lambda *a: None)
    status, error, out = cli(pointflows, "--steps", 2, "--width", 6, "--depth", 1, "--k", 4, "--points", 16, "--batch", 2,
                             "--test-points", 64, "--corruptions", "shear,cutout")
    assert status == 0, error
    found = json.loads((out / "pointflows-points-shapes3d" / "metrics.json").read_text())["metrics"]
    assert {"chamfer_shear_1", "surface_cutout_5_knn"} <= found.keys() and "chamfer_gaussian_1" not in found
    assert found["inverse_error"]["value"] < 1e-5


@pytest.mark.parametrize("flags", [["--model", "points"], ["--model=points"]])
def test_flows_hands_clouds_over(flags, cli, monkeypatch):              # argv[0] kept
    import flows

    status, error, _ = cli(flows, *flags, "--dataset", "gmm")
    assert status == 2 and error.startswith("pointflows.py: pointflows wants clouds")
