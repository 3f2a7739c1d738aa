"""Properties of clouds.py and of the mesh reader. Each was seen to fail with the line broken that its comment names."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clouds
import data
import formats
from clouds import Box, Mesh, Placed, Revolution, Sphere, Torus, Union, cone, cylinder

TETRAHEDRON = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3.0]]), np.array([[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]])
SURFACES = {
    "sphere": Sphere(0.8), "torus": Torus(1.0, 0.4), "box": Box((1.0, 0.4, 0.7)), "cylinder": cylinder(0.6, 0.9),
    "cone": cone(0.7, 0.5), "frustum": Revolution([(0.2, 0), (0.9, 0.4), (0.9, 0.6)]), "mesh": Mesh(*TETRAHEDRON),
    "union": Union(Sphere(0.5), Placed(Box((0.2, 0.3, 0.9)), shift=(0.3, 0, 0)), Placed(cone(), scale=0.4)),
}
EACH = pytest.mark.parametrize("name", SURFACES)
seeds = st.integers(0, 2**31)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def points(n, seed=0, half=1.5):
    return (torch.rand(n, 3, generator=generator(seed)) * 2 - 1) * half


@pytest.fixture(scope="module")
def truth():
    return clouds.load("shapes3d", train=18, test=9)


# ---- surfaces


@EACH
def test_samples_lie_on_the_surface(name):                              # a sign of v in Torus; Box: sign() left out
    x = SURFACES[name].sample(3000, generator())
    assert x.shape == (3000, 3) and x.dtype == torch.float64
    assert SURFACES[name].distance(x).max() < 1e-14


@EACH
def test_distance_is_that_of_brute_force(name):                         # Box: amin for amax; Mesh: "inside" left out
    surface, x = SURFACES[name], points(40, half=1.0)
    near = torch.cdist(x, surface.sample(400_000, generator())).amin(1)
    gap = near - surface.distance(x)                                    # of 400,000 points the nearest is this far off
    assert gap.min() > -1e-12 and gap.max() < 0.02 and gap.median() < 1e-3


@EACH
@given(seed=seeds)
@settings(max_examples=10)
def test_distance_is_1_lipschitz_with_slope_1(name, seed):              # Placed: the scale left out; squared distance
    surface, x = SURFACES[name], points(60, seed)
    y = x + 0.3 * torch.randn(x.shape, generator=generator(seed))
    assert ((surface.distance(x) - surface.distance(y)).abs() <= (x - y).norm(dim=1) + 1e-12).all()
    x.requires_grad_()
    (slope,) = torch.autograd.grad(surface.distance(x).sum(), x)
    torch.testing.assert_close(slope.norm(dim=1), torch.ones(60), rtol=1e-6, atol=1e-6)


@EACH
def test_projection_is_on_the_surface_and_no_farther_than_the_distance(name):   # "+" for "-" in project
    surface, x = SURFACES[name], points(100)
    y = clouds.project(x, surface)
    assert surface.distance(y).max() < 1e-12
    torch.testing.assert_close((x - y).norm(dim=1), surface.distance(x))
    on = surface.sample(50, generator())
    assert clouds.project(on, surface).isfinite().all() and (clouds.project(on, surface) - on).abs().max() < 1e-12


MOMENTS = {                                                             # E[x^2], E[z], E[z^2] by area, closed forms
    "sphere": (Sphere(0.8), 0.64 / 3, 0, 0.64 / 3),
    "torus": (Torus(1.0, 0.4), (1 + 3 * 0.16 / 2) / 2, 0, 0.16 / 2),    # E[rho^2] = R^2 + 3 r^2 / 2
    "lateral cone": (Revolution([(0.7, 0), (0, 0.5)]), 0.49 / 4, 0.5 / 3, 0.25 / 6),
    "disc": (Revolution([(0, 0.2), (0.7, 0.2)]), 0.49 / 4, 0.2, 0.04),
    "cube": (Box((1.0, 1.0, 1.0)), 1 / 3 * 2 / 3 + 1 / 3, 0, 1 / 3 * 2 / 3 + 1 / 3),
    "slab": (Box((2.0, 1.0, 0.5)), (2 / 14 * 4 + 12 / 14 * 4 / 3), 0, (8 / 14 * 0.25 + 6 / 14 * 0.25 / 3)),
    "triangle": (Mesh([[0, 0, 0], [1, 0, 0], [0, 0, 1.0]], [[0, 1, 2]]), 1 / 6, 1 / 3, 1 / 6),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_sampling_is_uniform_by_area(name):                             # Torus: keep all; Revolution: t = u; Mesh: no root
    surface, *moments = MOMENTS[name]
    x = surface.sample(200_000, generator(3))
    for found, moment in zip((x[:, 0] ** 2, x[:, 2], x[:, 2] ** 2), moments):
        assert abs(found.mean() - moment) < 4.5 * found.std() / 200_000**0.5 + 1e-12


@pytest.mark.parametrize("half", [(1.0, 0.4, 0.7), (0.1, 1.0, 1.0)])
def test_faces_of_a_box_and_parts_of_a_union_are_drawn_by_their_area(half):    # faces in another order; weights equal
    surface, (a, b, c) = Box(half), half
    x = surface.sample(50_000, generator())
    for axis, share in enumerate((b * c, a * c, a * b)):
        share /= b * c + a * c + a * b
        assert abs((x[:, axis].abs() == half[axis]).double().mean() - share) < 5 * (share / 50_000) ** 0.5
    two = Union(Sphere(1.0), Placed(Sphere(1.0), shift=(5, 0, 0), scale=0.5))
    assert abs((two.sample(50_000, generator())[:, 0] > 2).double().mean() - 0.2) < 5 * (0.2 / 50_000) ** 0.5


def test_areas_are_the_closed_forms():                                  # 4 for 8 in Box; math.pi left out
    r, h = 0.6, 0.9
    known = {Sphere(2.0): 16 * math.pi, Torus(2.0, 0.5): 4 * math.pi**2, Box((1, 2, 3)): 88,
             cylinder(r, h): 2 * math.pi * r * (r + 2 * h), cone(r, h): math.pi * r * (r + math.hypot(r, 2 * h)),
             Mesh(*TETRAHEDRON): (2 + 3 + 6 + 7) / 2, Placed(Sphere(1.0), scale=3.0): 36 * math.pi}
    for surface, area in known.items():
        assert math.isclose(surface.area, area)


@given(seed=seeds)
@settings(max_examples=10)
def test_rotations_and_places_are_rigid(seed):                          # `* q.det()` left out; rotation.T for rotation
    q = clouds._rotation(generator(seed))
    torch.testing.assert_close(q @ q.T, torch.eye(3))
    assert q.det() > 0
    surface = Placed(Box((1, 0.5, 0.2)), q, (0.3, -1, 2), 0.7)
    assert surface.distance(surface.sample(200, generator(seed))).max() < 1e-13
    assert math.isclose(surface.area, Box((1, 0.5, 0.2)).area * 0.49)


@pytest.mark.parametrize("name", clouds.SHAPES)
def test_drawn_shapes_fill_the_box(name):                               # 1 / (high - low); the centre left where it was
    surface = clouds.draw(name, generator(1))
    x = surface.sample(20_000, generator())
    low, high = x.amin(0), x.amax(0)
    assert 1.98 < (high - low).max() < 2.06 and (low + high).abs().max() < 0.06
    assert surface.distance(x).max() < 1e-13
    assert not torch.equal(x, clouds.draw(name, generator(2)).sample(20_000, generator()))


# ---- corruptions


def cloud(n=1024, seed=0, surface=None):
    return clouds.normalize((surface or Torus(1.0, 0.4)).sample(n, generator(seed)))


COUNTS = {"uniform": [1024] * 5, "gaussian": [1024] * 5, "impulse": [1024] * 5, "rotation": [1024] * 5, "shear": [1024] * 5,
          "upsampling": [1228, 1280, 1365, 1536, 2048], "background": [1046, 1049, 1053, 1058, 1075],
          "cutout": [964, 934, 874, 814, 724], "density": [949, 874, 799, 724, 649], "density_inc": [512] * 5,
          "distortion": [1024] * 5, "distortion_rbf": [1024] * 5, "distortion_rbf_inv": [1024] * 5}


def test_there_are_thirteen_corruptions():
    assert clouds.CORRUPTIONS.keys() == COUNTS.keys() and len(COUNTS) == 13


@pytest.mark.parametrize("name", COUNTS)
def test_corruption_counts_seed_and_input(name):                        # a constant; the input written to; 75 for 3 // 4
    x = cloud()
    before = x.clone()
    for severity in range(1, 6):
        y = clouds.corrupt(x, name, severity, generator(4))
        assert y.shape == (COUNTS[name][severity - 1], 3) and y.isfinite().all()
        assert torch.equal(y, clouds.corrupt(x, name, severity, generator(4)))
        assert not torch.equal(y, clouds.corrupt(x, name, severity, generator(5)))
        assert torch.equal(x, before)
        if name not in ("gaussian", "cutout", "density", "density_inc"):
            torch.testing.assert_close(y, clouds.normalize(clouds.corrupt(x, name, severity, generator(4), scaled=False)))
            assert math.isclose((y.amax(0) - y.amin(0)).max(), 2) and (y.amax(0) + y.amin(0)).abs().max() < 1e-12
    same = clouds.corrupt(x, name, 0)
    assert torch.equal(same, x) and same is not x
    assert clouds.corrupt(x.float(), name, 3, generator()).dtype == torch.float32


@pytest.mark.parametrize("severity", range(1, 6))
def test_corruption_bounds(severity):                                   # a constant; "-c" for "c"; clamp left out
    x, s = 0.9 * cloud(4096), severity - 1
    at = lambda name: clouds.corrupt(x, name, severity, generator(1), scaled=False)
    step = (at("uniform") - x).abs()
    assert 0.99 * 0.01 * severity < step.max() <= 0.01 * severity and abs(step.mean() / (0.005 * severity) - 1) < 0.05
    assert abs((at("gaussian") - x).std() / [0.01, 0.015, 0.02, 0.025, 0.03][s] - 1) < 0.03
    assert clouds.corrupt(x / 0.9, "gaussian", severity, generator(1)).abs().max() == 1
    moved = at("impulse") - x
    hit = (moved != 0).any(1)
    assert hit.sum() == 4096 // [30, 25, 20, 15, 10][s]
    torch.testing.assert_close(moved[hit].abs(), torch.full((int(hit.sum()), 3), 0.1))
    assert 0.4 < (moved[hit] > 0).double().mean() < 0.6
    up, back = at("upsampling"), at("background")
    assert torch.equal(up[:4096], x) and torch.equal(back[:4096], x)
    added = up[4096:]
    least = (added[:, None] - x).abs().amax(2).amin(1)
    assert least.max() <= 0.05 and (added.unsqueeze(1) != x).all()
    assert back[4096:].abs().max() <= 1 and abs(back[4096:].std() - 3**-0.5) < 0.05


@pytest.mark.parametrize("severity", range(1, 6))
def test_corruptions_of_density_keep_points_of_the_cloud(severity):     # near for ~near; largest=True
    x = cloud()
    for name in ("cutout", "density", "density_inc"):
        y = clouds.corrupt(x, name, severity, generator(severity))
        assert (y[:, None] == x).all(2).any(1).all()
        if name != "density_inc":
            assert len({*map(tuple, y.tolist())}) == len(y)
    gone = {*map(tuple, x.tolist())} - {*map(tuple, clouds.corrupt(x, "cutout", severity, generator(severity)).tolist())}
    gone = torch.tensor(sorted(gone))
    assert torch.cdist(gone, gone).topk(20, largest=False)[0].max() < 1.2               # balls, not scattered points
    inside = clouds.corrupt(cloud(2048), "density_inc", severity, generator(severity))
    assert len({*map(tuple, inside[: 100 * severity].tolist())}) == 100 * severity
    assert torch.cdist(inside[:100], inside[:100]).max() < 0.85                         # a ball of 100 of 2,048


@given(severity=st.integers(1, 5), seed=seeds)
@settings(max_examples=20)
def test_rotation_is_a_rotation_of_the_published_angles(severity, seed):    # a sign in one entry; degrees for radians
    c, x = [2.5, 5, 7.5, 10, 15][severity - 1], torch.eye(3)
    q = clouds.corrupt(x, "rotation", severity, generator(seed), scaled=False)          # rows of eye: the matrix itself
    torch.testing.assert_close(q @ q.T, torch.eye(3))
    assert math.isclose(q.det(), 1)
    beta, gamma = math.degrees(math.atan2(-q[0, 1], q[0, 0])), math.degrees(math.asin(q[0, 2]))
    theta = math.degrees(math.atan2(-q[1, 2], q[2, 2]))
    # q = Rx Ry Rz: its (0, 2) is sin gamma, (0, :2) cos gamma (cos beta, -sin beta), (1:, 2) cos gamma (-sin, cos) theta
    for angle in (beta, gamma, theta):
        assert c - 2.5 - 1e-9 <= abs(angle) <= c + 2.5 + 1e-9


@given(severity=st.integers(1, 5), seed=seeds)
@settings(max_examples=20)
def test_shear_is_the_published_matrix(severity, seed):                 # the transpose; c - 0.05 for both ends
    m = clouds.corrupt(torch.eye(3), "shear", severity, generator(seed), scaled=False)
    assert m.diagonal().tolist() == [1, 1, 1] and m[0, 1] == m[2, 1] == 0
    for entry in (m[0, 2], m[1, 0], m[1, 2], m[2, 0]):
        assert 0.05 * severity - 0.05 <= abs(entry) <= 0.05 * severity + 0.05


def test_free_form_deformation():                                       # binom left out; degree 5; 2 * left out
    t = torch.rand(20, generator=generator())
    for degree in (1, 4):
        torch.testing.assert_close(clouds.bernstein(t, degree).sum(-1), torch.ones(20))
        mean = (clouds.bernstein(t, degree) * torch.arange(degree + 1)).sum(-1)
        torch.testing.assert_close(mean, degree * t)
    x, corners = points(500, half=1.0), torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    at = lambda x, s, seed=0: clouds.corrupt(x, "distortion", s, generator(seed), scaled=False) - x
    assert 0.3 * 2 * 0.5 < at(corners, 5).abs().max() <= 2 * 0.5        # a corner moves with its control point
    torch.testing.assert_close(at(x, 5), 5 * at(x, 1))                  # linear in the displacements
    assert (at(1.5 * corners, 5) == 0).all()
    assert torch.cat([at(corners, 1, seed) for seed in range(40)]).abs().max() > 0.19


@pytest.mark.parametrize("power, name", [(0.5, "distortion_rbf"), (-0.5, "distortion_rbf_inv")])
def test_radial_basis_functions_interpolate_and_hold_affine_maps(power, name):  # 1 for 0.25; affine.T left out
    axis = torch.linspace(-1, 1, 5)
    control, x = torch.cartesian_prod(axis, axis, axis), points(50, half=1.0)
    for severity in range(1, 6):
        moved = clouds.corrupt(control, name, severity, generator(2), scaled=False)
        torch.testing.assert_close((moved - control).norm(dim=1), torch.full((125,), 0.025 * severity))
        assert (moved - control).mean(0).norm() < 0.01 * severity       # in all directions
    basis = lambda r: (r.square() + 0.25) ** power
    matrix, shift = torch.randn(3, 3, generator=generator()), torch.tensor([0.1, 2, -3])
    torch.testing.assert_close(clouds.rbf(x, control, control @ matrix + shift, basis), x @ matrix + shift)
    far = torch.tensor([[0.1, 0.2, 0.3], [3.0, -4, 5], [0.9, -0.2, 0.1]])
    moved = control + 0.1 * torch.randn(control.shape, generator=generator())
    found = clouds.corrupt(far, name, 2, generator(7), scaled=False)
    there = clouds.corrupt(control, name, 2, generator(7), scaled=False)
    torch.testing.assert_close(found, clouds.rbf(far, control, there, basis))
    one = clouds.rbf(far, control, moved, basis) - far
    torch.testing.assert_close(clouds.rbf(far, control, control + 2 * (moved - control), basis) - far, 2 * one)


def test_harder_is_farther_from_the_clean_cloud(truth):                 # a constant out of order
    for name in ("uniform", "gaussian", "impulse", "background", "cutout", "shear", "distortion", "distortion_rbf"):
        far = [clouds.chamfer(*truth.test(9, 512, name, s)).mean().item() for s in range(6)]
        assert far[0] == 0 and far == sorted(far), name


# ---- the data set


def test_batches_are_pairs_in_the_box(truth):                           # clean returned for noisy; pool without turning
    torch.manual_seed(0)
    noisy, clean = next(truth.batches(64, 300))
    assert noisy.shape == clean.shape == (64, 300, 3) and noisy.dtype == clean.dtype == torch.float32
    edges = clean.amax(1) - clean.amin(1)
    torch.testing.assert_close(edges.amax(1), torch.full((64,), 2.0, dtype=torch.float32))
    spread = (noisy - clean).double().flatten(1).std(1)
    assert 0.004 < spread.min() < 0.01 < 0.025 < spread.max() < 0.033
    assert all(len({*map(tuple, one.tolist())}) == 300 for one in clean)
    torch.manual_seed(0)
    again = next(truth.batches(64, 300))
    assert torch.equal(again[0], noisy) and torch.equal(again[1], clean)


def test_batches_with_background(truth):                                # partner of another cloud; rows mixed up
    torch.manual_seed(0)
    noisy, clean = next(truth.batches(32, 400, noise="background"))
    gap = (noisy - clean).norm(dim=-1)
    assert (gap[:, 20:] < 0.2).all() and (gap[:, :20] > 0.3).sum() > 32
    assert (gap[:, :20].amax(1) < 0.2).sum() < 6
    far = gap[:, :20] > 0.3
    stray = noisy[:, :20][far]
    assert stray.abs().max() <= 1 and stray.mean(0).abs().max() < 0.15 and (stray.abs() > 0.9).double().mean() > 0.05
    nearest = torch.cdist(noisy, clean).amin(-1)[:, :20]
    torch.testing.assert_close(nearest[far], gap[:, :20][far], rtol=1e-3, atol=2e-3)


def test_test_clouds_are_held_out_and_the_same_each_time(truth):        # the generator not seeded; train for surfaces
    noisy, clean = truth.test(10, 200, "background", 5)
    again = truth.test(10, 200, "background", 5)
    assert torch.equal(noisy, again[0]) and torch.equal(clean, again[1])
    assert noisy.shape == (10, 210, 3) and clean.shape == (10, 200, 3)
    assert max(d.max() for d in truth.distance(clean)) < 1e-6
    assert torch.equal(truth.test(10, 200, "gaussian", 1)[1], clean)
    assert not torch.equal(truth.clean(10, 200, seed=1), truth.clean(10, 200))
    assert truth.test(2, 200, "density_inc", 2)[0].shape == (2, 200, 3)
    assert truth.distance(noisy)[0].shape == (210,)
    assert truth.shape == (3,) and truth.pool.shape == (18, 8192, 3)


def test_data_load_gives_clouds(tmp_path):
    assert isinstance(data.load("shapes3d"), clouds.Clouds) and len(data.load("shapes3d").train) == 240
    for k in range(12):
        folder = tmp_path / "modelnet" / "thing" / ("test" if k < 3 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        write_off(folder / f"{k}.off", TETRAHEDRON[0] * (k + 1), TETRAHEDRON[1])
    here = data.load("modelnet", tmp_path)
    assert (len(here.train), len(here.surfaces)) == (9, 3)
    assert here.clean(3, 500).abs().max() < 1.05 and max(d.max() for d in here.distance(here.clean(3, 50))) < 1e-6
    for path in (tmp_path / "modelnet" / "thing" / "test").glob("*.off"):
        path.rename(path.parents[1] / "train" / path.name)
    here = data.load("modelnet", tmp_path)
    assert (len(here.train), len(here.surfaces)) == (10, 2)
    with pytest.raises(FileNotFoundError, match="two meshes .* found 0; say where modelnet lies with --data-dir"):
        data.load("modelnet", tmp_path / "nowhere")


def test_bad_clouds_are_one_sentence(truth):
    for bad in (torch.zeros(0, 3), torch.zeros(1, 3), torch.zeros(5, 2), torch.zeros(3)):
        for call in (lambda x: clouds.corrupt(x, "gaussian", 1), lambda x: clouds.smooth([x]), lambda x: clouds.flatten([x]),
                     lambda x: clouds.remove_outliers([x])):
            with pytest.raises(ValueError, match=r"a cloud \(N, 3\) of 2 or more points is wanted; got"):
                call(bad)
    broken = points(5).index_fill(0, torch.tensor([1, 3]), math.nan)
    for call in (lambda: clouds.corrupt(broken, "shear", 1), lambda: clouds.chamfer(broken[None], broken[None]),
                 lambda: clouds.smooth([broken])):
        with pytest.raises(ValueError, match="finite points are wanted; 2 are NaN or infinite"):
            call()
    with pytest.raises(ValueError, match="corruptions are uniform, gaussian, .*got blur 1"):
        clouds.corrupt(points(5), "blur", 1)
    with pytest.raises(ValueError, match="severities 0 to 5; got gaussian 6"):
        clouds.corrupt(points(5), "gaussian", 6)
    for bad in (dict(points=1), dict(points=9, noise="shear"), dict(points=9000)):
        with pytest.raises(ValueError, match="pairs are of gaussian or background noise on 2 to 8192 points; got"):
            next(truth.batches(2, **bad))
    with pytest.raises(ValueError, match=r"a cloud \(N, 3\) of 2 or more points is wanted; got \(1, 3\)"):
        truth.test(3, 1, "gaussian", 1)
    with pytest.raises(ValueError, match="one cloud or more of two points or more is wanted; got 0 of 4"):
        truth.test(0, 2, "gaussian", 1)
    with pytest.raises(ValueError, match="as many clouds"):
        clouds.chamfer(torch.zeros(2, 3, 3), torch.zeros(1, 3, 3))


# ---- classical denoisers, distances, report


@given(n=st.integers(2, 30), k=st.integers(1, 12), seed=seeds)
def test_smooth_is_the_mean_of_the_point_and_its_nearest(n, k, seed):   # the point itself left out; k + 1
    x = points(n, seed)
    (found,) = clouds.smooth([x], k)
    for p, q in zip(x, found):
        near = (x - p).norm(dim=1).argsort()[: min(k, n - 1) + 1]
        torch.testing.assert_close(q, x[near].mean(0))


@given(seeds, st.integers(1, 300))
def test_the_nearest_face_is_among_the_few_that_are_looked_at(seed, faces):          # the radii; their largest left out
    g = torch.Generator().manual_seed(seed)
    corners = torch.randn(faces, 1, 3, generator=g) + torch.rand(faces, 1, 1, generator=g) * torch.randn(faces, 3, 3, generator=g)
    mesh = clouds.Mesh(corners.reshape(-1, 3), torch.arange(3 * faces).view(-1, 3))
    x = 2 * torch.randn(20, 3, generator=g, dtype=torch.float64)
    every = torch.arange(faces).expand(20, -1)
    torch.testing.assert_close(mesh.distance(x), mesh._among(x, every), rtol=0, atol=0)


@given(seeds)
def test_flatten_moves_points_across_the_plane_of_their_nearest(seed):  # the point itself left out; another axis
    x = torch.randn(25, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * torch.tensor([1.0, 1.0, 0.1])
    (found,) = clouds.flatten([x], 9)
    for i in (0, 11):
        near = x[(x - x[i]).norm(dim=1).topk(10, largest=False).indices]
        normal = torch.linalg.svd(near - near.mean(0))[2][2]
        torch.testing.assert_close(found[i], x[i] + ((near.mean(0) - x[i]) @ normal) * normal)
    flat = x * torch.tensor([1.0, 1.0, 0.0]) + 3
    torch.testing.assert_close(clouds.flatten([flat], 5)[0], flat)


def test_smooth_comes_nearer_to_a_plane_and_outliers_are_dropped():     # ">" for "<="; largest=True
    g = generator()
    plane = torch.cat([torch.rand(800, 2, generator=g), torch.zeros(800, 1)], 1)
    noisy = plane + 0.02 * torch.randn(plane.shape, generator=g)
    assert clouds.smooth([noisy])[0][:, 2].abs().mean() < 0.5 * noisy[:, 2].abs().mean()
    stray = torch.tensor([[0.5, 0.5, 1.0], [0.2, 0.9, -0.8], [3, 0, 0]])
    (kept,) = clouds.remove_outliers([torch.cat([plane, stray])])
    assert kept[:, 2].abs().max() == 0 and len(kept) > 780
    assert len(clouds.remove_outliers([plane], ratio=50.0)[0]) == 800


def test_outliers_are_those_far_from_their_neighbours_by_two_deviations():           # another ratio; k for 16
    x = points(200, 3) ** 3
    far = torch.cdist(x, x).sort(1).values[:, 1:17].mean(1)
    keep = far <= far.mean() + 2 * (far - far.mean()).square().mean().sqrt()
    assert 0 < (~keep).sum() < 30
    close = clouds.remove_outliers([x])[0]
    assert torch.equal(close, x[keep]) and not torch.equal(clouds.remove_outliers([x], ratio=4.0)[0], close)


def test_chamfer_of_lists_is_that_of_each_pair():                       # lengths left out: padding would be near 0
    x, y = [points(n, n) + 3 for n in (4, 9, 2)], [points(n, n) + 3 for n in (7, 1, 5)]
    found = clouds.chamfer(x, y)
    for value, a, b in zip(found, x, y):
        squares = torch.cdist(a, b).square()
        torch.testing.assert_close(value, squares.amin(1).mean() + squares.amin(0).mean())


def test_what_chamfer_can_reach(truth):                                 # two thirds of the noise lie along the surface
    noisy, clean = truth.test(9, 512, "gaussian", 3)
    near = clouds.chamfer(noisy, clean).mean()
    best = clouds.chamfer([clouds.project(x, s) for x, s in zip(noisy, truth.surfaces)], clean).mean()
    assert 0.6 < best / near < 0.72
    assert clouds.chamfer(truth.clean(9, 512, seed=1), clean).mean() > 3 * near


def test_report_and_its_pictures(truth, tmp_path):                      # ours for noisy; a floor of another cloud
    torch.set_default_dtype(torch.float32)
    out = clouds.report(lambda x: x, truth, tmp_path, severities=(3,), n=3, points=128, shown=2)
    kinds = ("", "_noisy", "_knn", "_plane", "_outliers")
    assert out.keys() == {f"{m}_{c}_3{k}" for m in ("chamfer", "surface") for c in ("gaussian", "background") for k in kinds}
    for name in ("chamfer_gaussian_3", "surface_background_3"):
        assert out[name]["value"] == out[f"{name}_noisy"]["value"] > out[name]["floor"] >= 0
        assert out[name]["better"] == "lower"
    noisy, clean = truth.test(3, 128, "gaussian", 3)
    assert math.isclose(out["chamfer_gaussian_3"]["value"], clouds.chamfer(noisy, clean).mean(), rel_tol=1e-6)
    assert math.isclose(out["surface_gaussian_3"]["value"], torch.cat(truth.distance(noisy)).mean(), rel_tol=1e-6)
    dense = clouds.report(lambda x: x, truth, None, ("background",), (5,), n=3, points=600)
    assert dense["chamfer_background_5_outliers"]["value"] < 0.5 * dense["chamfer_background_5_noisy"]["value"]
    perfect = clouds.report(lambda x: clean, truth, None, ("gaussian",), (3,), n=3, points=128)
    assert perfect["chamfer_gaussian_3"]["value"] == 0 and perfect["surface_gaussian_3"]["value"] < 1e-6
    for name in ("gaussian", "background"):
        raw = (tmp_path / f"clouds-{name}-3.png").read_bytes()
        assert raw[:4] == b"\x89PNG" and len(raw) > 5000


# ---- meshes


def write_off(path, vertices, faces, header="OFF\n{} {} 0\n"):
    lines = [" ".join(map(repr, map(float, v))) for v in vertices]
    lines += [" ".join(map(str, [len(f), *map(int, f)])) for f in faces]
    path.write_text(header.format(len(vertices), len(faces)) + "\n".join(lines) + "\n")


@pytest.mark.parametrize("header", ["OFF\n{} {} 0\n", "OFF{} {} 0\n", "OFF {} {} 0\n", "# made by hand\nOFF\n\n{} {}\n"])
@given(seed=seeds, n=st.integers(3, 9))
@settings(max_examples=5)
def test_off_round_trip_with_any_header(tmp_path_factory, header, seed, n):     # lines[0][3:] for lines[0] != "OFF"
    g = np.random.default_rng(seed)
    vertices, faces = g.normal(size=(n, 3)), g.integers(0, n, (4, 3))
    path = tmp_path_factory.mktemp("off") / "a.off"
    write_off(path, vertices, faces, header)
    found = formats.read_mesh(path)
    assert np.array_equal(found[0], vertices) and np.array_equal(found[1], faces)


def test_off_polygons_and_colours(tmp_path):                            # face[[0, k, k + 1]]: 1 for 0
    path = tmp_path / "square.off"
    path.write_text("OFF\n4 1 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n4 0 1 2 3 255 0 0\n")
    mesh = Mesh(*formats.read_mesh(path))
    assert mesh.area == 1 and len(mesh.corners) == 2


PLY = "ply\nformat {}\ncomment c\nelement vertex 4\nproperty {} x\nproperty float y\nproperty float z\nproperty uchar red\n" \
      "element face 2\nproperty list uchar int vertex_indices\nend_header\n"


def test_ply_ascii_and_binary_agree(tmp_path):                          # order "<" for ">"; at not moved
    corners, faces = TETRAHEDRON[0].tolist(), [[0, 1, 2, 3], [1, 2, 3]]
    text = PLY.format("ascii 1.0", "double") + "".join(f"{x} {y} {z} 7\n" for x, y, z in corners) + "".join(
        " ".join(map(str, [len(f), *f])) + "\n" for f in faces)
    (tmp_path / "a.ply").write_text(text.replace("\n", "\r\n"))
    for order, name in (("<", "little"), (">", "big")):
        raw = PLY.format(f"binary_{name}_endian 1.0", "double").encode()
        raw += b"".join(struct.pack(f"{order}dffB", *c, 7) for c in corners)
        raw += b"".join(struct.pack(f"{order}B{len(f)}i", len(f), *f) for f in faces)
        (tmp_path / f"{name}.ply").write_bytes(raw)
    for name in ("a", "little", "big"):
        vertices, triangles = formats.read_mesh(tmp_path / f"{name}.ply")
        assert np.array_equal(vertices, TETRAHEDRON[0]) and sorted(map(tuple, triangles)) == [(0, 1, 2), (0, 2, 3), (1, 2, 3)]
    (tmp_path / "cut.ply").write_bytes((tmp_path / "big.ply").read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"cut.ply: expected a whole mesh \(OFF or PLY\), found"):
        formats.read_mesh(tmp_path / "cut.ply")


@pytest.mark.parametrize("text, what", [
    ("", "expected data, found an empty file"), ("PFF\n1 1 0\n", "'PFF' in the place of OFF"), ("# nothing\n", "no line"),
    ("OFF\n0 0 0\n", "expected vertices and faces, found 0 vertices, 0 triangles"),
    ("OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n", "found 3 vertices, 0 triangles"),
    ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 3\n", "faces of the vertices 0 to 2, found indices 0 to 3"),
    ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 nan 0\n3 0 1 2\n", "expected finite numbers"),
    ("OFF\n3 1 0\n0 0 0\n1 0 0\n", "2 lines for 3 vertices and 1 faces"), ("OFF\n3 1 0\n0 0\n1 0\n0 1\n3 0 1 2\n", "whole mesh"),
    ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1\n", "a face of"), ("OFF\nthree 1 0\n", "whole mesh"),
    ("OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n", "a surface is wanted, and the area of this mesh of 1 faces is 0"),
])
def test_faults_of_a_mesh_are_one_sentence_with_the_file(tmp_path, text, what):
    path = tmp_path / "bad.off"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        clouds.read(path)
    assert "bad.off: " in str(caught.value) and what in str(caught.value) and "\n" not in str(caught.value)


def test_real_meshes(real_data):                                        # the header fault of ModelNet40
    sizes = {"ModelNet40/bathtub/train/bathtub_0001.off": (3514, 3546), "ModelNet10/bathtub/train/bathtub_0001.off": (3514, 3546),
             "ModelNet10/chair/train/chair_0002.off": (192, 96)}
    for name, (V, F) in sizes.items():
        vertices, triangles = formats.read_mesh(real_data / "modelnet" / name)
        assert vertices.shape == (V, 3) and triangles.shape == (F, 3)
    surface = clouds.read(real_data / "modelnet" / "ModelNet10/chair/train/chair_0002.off")
    x = surface.sample(300, generator())
    assert surface.distance(x).max() < 1e-12 and x.abs().max() < 1.05
    for name, V in (("bunny", 8171), ("airplane", 1335), ("ant", 486)):
        assert len(formats.read_mesh(real_data / "meshes" / f"{name}.ply")[0]) == V
