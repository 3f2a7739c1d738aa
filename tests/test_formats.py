"""Readers: what was written comes back, and nothing else does. The comment says which broken line each test caught."""

import gzip
import io
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import formats

seeds = st.integers(0, 2**31)


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def runs(row):
    """Run lengths of a row of {0, 1}, background first: by hand, one pixel after the other."""
    out, colour = [0], 0
    for pixel in row:
        if pixel != colour:
            colour = pixel
            out.append(0)
        out[-1] += 1
    return out


def cdb_bytes(images, labels, fixed=None):
    header = struct.pack("<HBBBBI", 2005, 8, 4, *(fixed or (0, 0)), len(images))
    header += np.bincount(labels, minlength=128).astype("<u4").tobytes() + bytes(1 + 256 + 245)
    for image, label in zip(images, labels):
        data = bytes(sum((runs(row) for row in image), []))
        size = b"" if fixed else bytes([image.shape[1], image.shape[0]])
        header += bytes([255, label]) + size + struct.pack("<H", len(data)) + data
    return header


def mat_element(kind, data):
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def mat_matrix(value, name=""):
    small = struct.pack("<HH", 1, len(name)) + name.encode().ljust(4, b"\0") if 0 < len(name) <= 4 else None
    name = small or mat_element(1, name.encode())
    if isinstance(value, list):
        shape, klass, body = (len(value), 1), 1, b"".join(mat_matrix(v) for v in value)
    else:
        shape, klass, body = value.shape, {"u1": 9, "f8": 6, "i4": 12}[value.dtype.str[1:]], value.tobytes("F")
        body = mat_element({9: 2, 6: 9, 12: 5}[klass], body)
    head = mat_element(6, bytes([klass]) + bytes(7)) + mat_element(5, np.array(shape, "<i4").tobytes()) + name
    return mat_element(14, head + body)


def mat_bytes(variables, pack):
    out = b"MATLAB 5.0 MAT-file".ljust(124, b" ") + b"\0\1IM"
    for name, value in variables.items():
        body = mat_matrix(value, name)
        packed = zlib.compress(body)
        out += struct.pack("<II", 15, len(packed)) + packed if pack else body
    return out


def npz_bytes(*arrays, save=np.savez_compressed):
    file = io.BytesIO()
    save(file, **dict(zip("xyz", arrays)))
    return file.getvalue()


def images_of(seed, count, most=12):
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 2, rng.integers(1, most, 2), dtype=np.uint8) for _ in range(count)]
    return images, rng.integers(0, 10, count)


# ---- round trips


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), seeds, st.booleans())
def test_idx_round_trip(tmp_path_factory, shape, seed, packed):          # "<" for ">" in the shape; offset=4
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path_factory.mktemp("idx") / ("a.gz" if packed else "a")
    path.write_bytes(gzip.compress(idx_bytes(array)) if packed else idx_bytes(array))
    back = formats.read_idx(path)
    assert back.dtype == np.uint8 and np.array_equal(back, array)
    back += 1                                                           # ours to write to


@given(seeds, st.integers(1, 6))
def test_cdb_round_trip(tmp_path_factory, seed, count):                  # parity ^ 1; W and H exchanged; last[1:]
    images, labels = images_of(seed, count)
    path = tmp_path_factory.mktemp("cdb") / "a.cdb"
    path.write_bytes(cdb_bytes(images, labels))
    back, back_labels = formats.read_cdb(path)
    assert back_labels.dtype == np.int64 and np.array_equal(back_labels, labels)
    assert len(back) == count and all(b.dtype == np.uint8 and np.array_equal(a, b) for a, b in zip(images, back))


def test_cdb_with_one_size_in_the_header(tmp_path):                     # 6 for 4 in start
    images, labels = np.random.default_rng(0).integers(0, 2, (3, 7, 5), dtype=np.uint8), np.array([3, 1, 127])
    (tmp_path / "a.cdb").write_bytes(cdb_bytes(images, labels, fixed=(7, 5)))
    back, back_labels = formats.read_cdb(tmp_path / "a.cdb")
    assert np.array_equal(np.stack(back), images) and back_labels.tolist() == [3, 1, 127]


def test_cdb_rows_of_long_runs(tmp_path):                               # cumsum in uint8
    images = [np.ones((255, 255), np.uint8), np.zeros((3, 255), np.uint8), np.zeros((1, 1), np.uint8)]
    (tmp_path / "a.cdb").write_bytes(cdb_bytes(images, [0, 1, 1]))
    back, _ = formats.read_cdb(tmp_path / "a.cdb")
    assert all(np.array_equal(a, b) for a, b in zip(images, back))


@given(seeds, st.integers(1, 4))
def test_cifar_round_trip(tmp_path_factory, seed, count):                # reshape(-1, 32, 32, 3)
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, count)
    path = tmp_path_factory.mktemp("cifar") / "a.bin"
    path.write_bytes(b"".join(bytes([label]) + image.tobytes() for image, label in zip(images, labels)))
    back, back_labels = formats.read_cifar(path)
    assert np.array_equal(back, images) and np.array_equal(back_labels, labels) and back_labels.dtype == np.int64


@given(seeds, st.booleans())
def test_mat_round_trip(tmp_path_factory, seed, packed):                 # no padding; order="C"; kind & 0xFF00
    rng = np.random.default_rng(seed)
    variables = {"Data": [rng.integers(0, 256, rng.integers(1, 6, 2), dtype=np.uint8) for _ in range(3)],
                 "labels": rng.integers(0, 10, (3, 1), dtype=np.uint8), "longer_name": rng.normal(size=(2, 3, 2)),
                 "n": rng.integers(-9, 9, (1, 2), dtype=np.int32), "none": np.zeros((0, 2))}
    path = tmp_path_factory.mktemp("mat") / "a.mat"
    path.write_bytes(mat_bytes(variables, packed))
    back = formats.read_mat_cells(path)
    assert list(back) == list(variables)
    assert all(np.array_equal(a, b) for a, b in zip(back["Data"], variables["Data"])) and len(back["Data"]) == 3
    for name in ("labels", "longer_name", "n", "none"):
        assert np.array_equal(back[name], variables[name]) and back[name].dtype == variables[name].dtype


@given(st.lists(st.integers(1, 5), min_size=0, max_size=4), seeds, st.booleans())
def test_npz_round_trip(tmp_path_factory, shape, seed, packed):          # reshape lost; the wrong member
    rng = np.random.default_rng(seed)
    arrays = rng.normal(size=shape), rng.integers(0, 2, (7, *shape), dtype=np.uint8), rng.integers(0, 9, shape)
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    path.write_bytes(npz_bytes(*arrays, save=np.savez_compressed if packed else np.savez))
    for name, array in zip("xyz", arrays):
        back = formats.read_npz(path, name)
        assert back.dtype == array.dtype and np.array_equal(back, array)
        back += 1                                                       # ours to write to
    bits, size = formats.read_npz(path, "y", bits=True)
    assert size == arrays[1].shape and np.array_equal(bits, np.packbits(arrays[1].reshape(7, -1), axis=1))


def test_npz_bits_in_blocks(tmp_path, monkeypatch):                     # rows for start + rows; the last block whole
    array = np.random.default_rng(0).integers(0, 2, (5000, 64, 64), dtype=np.uint8)
    (tmp_path / "a.npz").write_bytes(npz_bytes(array, save=np.savez))
    sizes, exactly = [], formats._exactly
    monkeypatch.setattr(formats, "_exactly", lambda file, size: sizes.append(size) or exactly(file, size))
    bits, shape = formats.read_npz(tmp_path / "a.npz", "x", bits=True)
    assert shape == (5000, 64, 64) and np.array_equal(bits, np.packbits(array.reshape(5000, -1), axis=1))
    assert sizes == [2**24, 904 * 4096]


def test_npz_without_pickles_numbers_or_the_name(tmp_path):             # without: each condition
    path = tmp_path / "a.npz"
    for array in (np.array([{}], dtype=object), np.zeros((0, 3)), np.asfortranarray(np.zeros((2, 3)))):
        path.write_bytes(npz_bytes(array))
        with pytest.raises(ValueError, match="a.npz: expected a whole NumPy archive with numbers named x"):
            formats.read_npz(path, "x")
    path.write_bytes(npz_bytes(np.zeros(3)))
    with pytest.raises(ValueError, match="named y"):
        formats.read_npz(path, "y")
    for array in (np.full((2, 3), 2, np.uint8), np.zeros((2, 3), np.int8)):
        path.write_bytes(npz_bytes(array))
        with pytest.raises(ValueError, match="where 0 and 1 were to be"):
            formats.read_npz(path, "x", bits=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", npz_bytes(np.zeros(3))[:0] + b"\x93NUMPY\1\0")
    with pytest.raises(ValueError, match="a.npz"):
        formats.read_npz(path, "x")


# ---- damage: ValueError with the file's name, or an array; never anything else

TINY_IMAGES, TINY_LABELS = images_of(1, 3, 6)
TINY = {                                                                # format: (file name, whole content, reader)
    "idx": ("a-idx", idx_bytes(np.arange(12, dtype=np.uint8).reshape(2, 3, 2)), formats.read_idx),
    "idx.gz": ("a.gz", gzip.compress(idx_bytes(np.arange(12, dtype=np.uint8).reshape(2, 3, 2))), formats.read_idx),
    "cdb": ("a.cdb", cdb_bytes(TINY_IMAGES, TINY_LABELS), formats.read_cdb),
    "cifar": ("a.bin", b"\7" + bytes(range(256)) * 12, formats.read_cifar),
    "mat": ("a.mat", mat_bytes({"Data": TINY_IMAGES, "x": np.eye(2)}, False), formats.read_mat_cells),
    "npz": ("a.npz", npz_bytes(np.arange(12).reshape(3, 4)), lambda path: formats.read_npz(path, "x")),
    "bits": ("a.npz", npz_bytes(np.eye(9, dtype=np.uint8)), lambda path: formats.read_npz(path, "x", bits=True)),
    "celeba": ("a.txt", b"2\r\nMale Bald \r\n1.jpg -1  1\r\n2.jpg  1 -1\r\n", formats.read_attributes),
    "mat.z": ("a.mat", mat_bytes({"Data": TINY_IMAGES}, True), formats.read_mat_cells),
}


@pytest.mark.parametrize("name", TINY)
def test_a_file_cut_off_anywhere_is_refused(tmp_path, name):            # without: a length check of each reader in turn
    file, content, reader = TINY[name]
    path = tmp_path / file
    ends = {"mat": {len(content) - len(mat_matrix(np.eye(2), "x"))},     # whole, with less in it
            "celeba": {len(content) - 1, len(content) - 2}}.get(name, set())
    path.write_bytes(content)
    for end in sorted(set(range(len(content))) - ends, reverse=True):
        os.truncate(path, end)
        with pytest.raises(ValueError, match=file):
            reader(path)
    path.write_bytes(content)
    reader(path)


@pytest.mark.parametrize("name", TINY)
def test_bytes_behind_the_end_are_refused(tmp_path, name):              # >= for == in the length checks
    file, content, reader = TINY[name]
    if content[:2] == b"PK":                                            # a .zip may end in a comment
        pytest.skip("a .zip is read from its end")
    (tmp_path / file).write_bytes(content + b"\7")
    with pytest.raises(ValueError, match=file):
        reader(tmp_path / file)


@pytest.mark.parametrize("name", TINY)
@given(damage=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=60)
def test_damage_gives_value_error_or_an_array(tmp_path_factory, name, damage):   # no limit on dimensions, on labels
    file, content, reader = TINY[name]
    broken = bytearray(content)
    for at, value in damage:
        broken[at % len(content)] = value
    path = tmp_path_factory.mktemp("damage") / file
    path.write_bytes(broken)
    try:
        reader(path)
    except ValueError as e:
        assert file in str(e) and "expected" in str(e) and "found" in str(e)


@pytest.mark.parametrize("name", TINY)
def test_missing_empty_and_folder(tmp_path, name):
    file, _, reader = TINY[name]
    with pytest.raises(FileNotFoundError, match=file):
        reader(tmp_path / file)
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match="empty"):
        reader(tmp_path / file)
    with pytest.raises(ValueError, match="expected"):
        reader(tmp_path)


def change(content, at, new):
    return content[:at] + new + content[at + len(new):]


@pytest.mark.parametrize("name, at, new, message", [
    ("idx", 2, b"\x0d", "magic"), ("idx", 3, b"\5", "magic"), ("idx", 3, b"\0", "magic"),
    ("idx", 4, bytes(4), "above 0"), ("cifar", 0, b"\x0a", "labels 0 to 9, found label 10"),
    ("cdb", 522, b"\1", "type 1"), ("cdb", 1024, b"\xfe", "FF"),
    ("cdb", 1025, b"\x7f", "label"), ("cdb", 6, bytes(4), "above 0"), ("cdb", 1026, b"\0", "rows of 0"),
    ("mat", 126, b"MI", "little-endian"),
])
def test_what_the_formats_exclude(tmp_path, name, at, new, message):    # without: the condition in question
    file, content, reader = TINY[name]
    (tmp_path / file).write_bytes(change(content, at, new))
    with pytest.raises(ValueError, match=message):
        reader(tmp_path / file)


@pytest.mark.parametrize("rows", [[[3, 3], [2, 2]], [[4], [4, 0]], [[5], [3]], [[2, 1], [2, 3]]])
def test_cdb_runs_that_do_not_fit_are_refused(tmp_path, rows):          # without: any one condition in _unpack_runs
    data = bytes(sum(rows, []))
    whole = cdb_bytes([np.zeros((2, 4), np.uint8)], [0])
    (tmp_path / "a.cdb").write_bytes(whole[:1028] + struct.pack("<H", len(data)) + data)
    with pytest.raises(ValueError, match="2 rows of 4"):
        formats.read_cdb(tmp_path / "a.cdb")


@pytest.mark.parametrize("klass, flag, shape",
                         [(4, 0, (2, 2)), (9, 8, (2, 2)), (9, 0, (4,)), (9, 0, (-2, -2)), (9, 0, (1, 2))])
def test_mat_text_complex_and_wrong_shapes_are_refused(tmp_path, klass, flag, shape):
    body = mat_element(6, bytes([klass, flag]) + bytes(6)) + mat_element(5, np.array(shape, "<i4").tobytes())
    body = mat_element(14, body + mat_element(1, b"x") + mat_element(2, bytes(4)))
    (tmp_path / "a.mat").write_bytes(b" " * 124 + b"\0\1IM" + body)
    with pytest.raises(ValueError, match="a.mat: expected whole MATLAB 5"):
        formats.read_mat_cells(tmp_path / "a.mat")


# ---- pictures


def picture(path, array, **options):
    from PIL import Image

    Image.fromarray(array).save(path, **options)


def test_images_are_sorted_and_keep_colours_and_channels(tmp_path):
    red, blue = (np.zeros((8, 8, 3), np.uint8) for _ in range(2))
    red[..., 0], blue[..., 2] = 255, 255
    picture(tmp_path / "b.png", red)
    picture(tmp_path / "a.PNG", blue)
    (tmp_path / "notes.txt").write_text("not an image")
    x = formats.read_images(tmp_path, 4)
    assert x.shape == (2, 3, 4, 4) and x.dtype == np.uint8
    assert x[0, :, 0, 0].tolist() == [0, 0, 255] and x[1, :, 3, 3].tolist() == [255, 0, 0]
    assert formats.read_images(tmp_path, 4, grey=True)[:, 0, 0, 0].tolist() == [29, 76]  # luma .114, .299


@given(seeds, st.integers(1, 4), st.booleans())
@settings(max_examples=10)
def test_shrinking_is_the_mean_of_the_centre_square(tmp_path_factory, seed, factor, tall):  # NEAREST for BOX; no box
    folder = tmp_path_factory.mktemp("images")
    a = np.random.default_rng(seed).integers(0, 256, (4 * factor, 4 * factor + 6), dtype=np.uint8)
    picture(folder / "a.png", np.ascontiguousarray(a.T) if tall else a)
    centre = a[:, 3:-3].reshape(4, factor, 4, factor).mean((1, 3))
    found = formats.read_images(folder, 4, grey=True)[0, 0]
    assert np.abs((found.T if tall else found) - centre).max() <= 1


def test_transparent_parts_become_white(tmp_path):                      # convert("RGB") at once
    a = np.zeros((4, 4, 4), np.uint8)
    a[:2, :, 3], a[2, :, 3] = 255, 128
    picture(tmp_path / "a.png", a)
    assert formats.read_images(tmp_path, 4, grey=True)[0, 0, :, 0].tolist() == [0, 0, 127, 255]


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_picture_cut_off_anywhere_is_refused(tmp_path, kind):         # without the look for IEND
    path = tmp_path / f"a.{kind}"
    picture(path, np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    content = path.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=f"a.{kind}"):
            formats.read_images(tmp_path, 4)


def test_bad_pictures_are_named_and_skipped_only_when_asked(tmp_path):  # out[i] for out[len(names)]; no warning
    for i in range(4):
        picture(tmp_path / f"{i}.png", np.full((4, 4), i, np.uint8))
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    (tmp_path / "2b.jpg").touch()
    with pytest.raises(ValueError, match="2 of 5 images cannot be read: .*1.png: .*2b.jpg: .*empty"):
        formats.read_images(tmp_path, 4)
    with pytest.warns(UserWarning, match="1.png.*2b.jpg.*left out"):
        names, images = formats.read_named_images(tmp_path, 4, True, skip_bad=True)
    assert names == ["0.png", "2.png", "3.png"] and images[:, 0, 0, 0].tolist() == [0, 2, 3]
    for i in (0, 2, 3):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(ValueError, match="2 of 2 images"):
        formats.read_images(tmp_path, 4, skip_bad=True)


def test_pictures_in_a_zip(tmp_path):                                   # the folder in the name
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in (2, 0, 1):
            picture(tmp_path / "x.png", np.full((5, 4), 10 * i, np.uint8))
            archive.write(tmp_path / "x.png", f"folder/{i}.png")
        archive.writestr("folder/notes.txt", "not an image")
    names, images = formats.read_named_images(tmp_path / "a.zip", 4, grey=True)
    assert names == ["0.png", "1.png", "2.png"] and images[:, 0, 0, 0].tolist() == [0, 10, 20]
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[50:60] = bytes(10)                                          # within the first member
    (tmp_path / "b.zip").write_bytes(content)
    with pytest.raises(ValueError, match="b.zip: 1 of 3 images cannot be read"):
        formats.read_images(tmp_path / "b.zip", 4)
    for end in (0, 10, len(content) - 30):
        (tmp_path / "b.zip").write_bytes(content[:end])
        with pytest.raises(ValueError, match="b.zip: expected a whole .zip"):
            formats.read_images(tmp_path / "b.zip", 4)


def test_attributes_of_celeba(tmp_path):                                # == "-1"; names from the first line
    (tmp_path / "a.txt").write_bytes(TINY["celeba"][1])
    files, values, names = formats.read_attributes(tmp_path / "a.txt")
    assert files == ["1.jpg", "2.jpg"] and names == ("Male", "Bald") and values.tolist() == [[False, True], [True, False]]


def test_impossible_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        formats.read_images(tmp_path / "nowhere", 4)
    with pytest.raises(ValueError, match="found none"):
        formats.read_images(tmp_path, 4)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="found a file"):
        formats.read_images(tmp_path / "file", 4)
    with pytest.raises(ValueError, match="at least 1"):
        formats.read_images(tmp_path, 0)


# ---- the published files, where they lie here


def test_hoda(real_data):
    images, labels = formats.read_cdb(real_data / "hoda" / "Test 20000.cdb")
    assert np.bincount(labels).tolist() == [2000] * 10
    heights, widths = np.array([image.shape for image in images]).T
    assert (heights.min(), heights.max(), widths.min(), widths.max()) == (5, 64, 4, 54)
    assert round(100 * np.mean(np.maximum(heights, widths) > 32)) == 35


def test_hoda_mat(real_data):
    mat = formats.read_mat_cells(real_data / "hoda" / "Data_hoda_full.mat")
    assert mat["labels"][:8, 0].tolist() == [6, 5, 0, 2, 7, 0, 7, 5]
    assert np.bincount(mat["labels"][:, 0]).tolist() == [6000] * 10
    heights, widths = np.array([image.shape for image in mat["Data"]]).T
    assert (heights.min(), heights.max(), widths.min(), widths.max()) == (4, 62, 3, 51)


def test_olivetti(real_data):
    faces = formats.read_mat_cells(real_data / "olivetti" / "olivettifaces.mat")["faces"]
    assert faces.shape == (4096, 400) and faces.max() == 242


def test_mnist(real_data):
    images = formats.read_idx(real_data / "mnist" / "train-images-idx3-ubyte.gz")
    labels = formats.read_idx(real_data / "mnist" / "train-labels-idx1-ubyte.gz")
    assert images.shape == (60000, 28, 28) and abs(images.mean() / 255 - 0.1307) < 1e-4
    assert np.bincount(labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_cifar(real_data):
    images, labels = formats.read_cifar(real_data / "cifar10" / "cifar-10-batches-bin" / "data_batch_1.bin")
    assert len(images) == 3000 and labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert np.allclose(images.mean((0, 2, 3)) / 255, [0.4905, 0.4813, 0.4450], atol=1e-4)


def test_pokesprite_alpha_and_palette(real_data):
    x = formats.read_images(real_data / "pokesprite" / "regular", 28)
    assert x.shape == (500, 3, 28, 28) and (x[:, :, 0, 0] == 255).mean() > 0.95                # corners are transparent


# ---- Bayesian networks

BIF = """network x { }  // a comment
variable a { type discrete [ 2 ] { yes, no/maybe }; }
variable b { type discrete [ 3 ] { <5, 5-12, 12+ }; }
probability ( a ) { table 0.25, 0.75; }
probability ( b | a ) {
  (no/maybe) 0.5, 0.25, 0.25;
  (yes) 0.1, 0.2, 0.7;
}
"""


def test_bif_rows_go_where_their_labels_say(tmp_path):  # rows in the order of the file
    (tmp_path / "x.bif").write_text(BIF)
    states, cpds = formats.read_bif(tmp_path / "x.bif")
    assert states == {"a": ("yes", "no/maybe"), "b": ("<5", "5-12", "12+")} and cpds["b"][0] == ("a",)
    np.testing.assert_allclose(cpds["b"][1], [[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]])


def test_bif_default_and_flat_tables(tmp_path):  # moveaxis left out
    (tmp_path / "x.bif").write_text(BIF.replace("(yes) 0.1, 0.2, 0.7;", "default 0.3 0.3 0.4;"))
    np.testing.assert_allclose(formats.read_bif(tmp_path / "x.bif")[1]["b"][1], [[0.3, 0.3, 0.4], [0.5, 0.25, 0.25]])
    start, end = BIF.index("  (no"), BIF.rindex("}")
    (tmp_path / "x.bif").write_text(BIF[:start] + "table 0.1, 0.5, 0.2, 0.25, 0.7, 0.25;" + BIF[end:])
    np.testing.assert_allclose(formats.read_bif(tmp_path / "x.bif")[1]["b"][1], [[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]])


@pytest.mark.parametrize("name", ["x.bif", "x.bif.gz"])
def test_bif_round_trip(name, tmp_path):  # parents reversed in the label
    rng = np.random.default_rng(0)
    states = {"a": ("u", "v"), "b": ("1", "2", "3"), "c": ("x", "y", "z", "w")}
    cpds = {"a": ((), rng.dirichlet(np.ones(2))), "b": ((), rng.dirichlet(np.ones(3))),
            "c": (("b", "a"), rng.dirichlet(np.ones(4), (3, 2)))}
    formats.write_bif(tmp_path / name, states, cpds)
    found, tables = formats.read_bif(tmp_path / name)
    assert found == states and {v: p for v, (p, _) in tables.items()} == {v: p for v, (p, _) in cpds.items()}
    for v in states:
        np.testing.assert_allclose(tables[v][1], cpds[v][1], rtol=1e-15)


@pytest.mark.parametrize("old, new, sentence", [
    ("0.25, 0.75", "0.25, 0.65", "that sum to 1"), ("0.25, 0.75", "-0.25, 1.25", "from 0 on"), ("0.25, 0.75", "0.25", "2 numbers"),
    ("(yes) 0.1", "(perhaps) 0.1", "3 numbers for a state"), ("  (yes) 0.1, 0.2, 0.7;\n", "", "that sum to 1"),
    ("b | a", "b | c", "'c'"), ("[ 3 ]", "[ 4 ]", "different states of b"), ("yes, no/maybe", "yes, yes", "different states of a"),
    ("probability ( a ) { table 0.25, 0.75; }", "", "none of a"), ("variable", "thing", "that it declares"), ("0.75", "x", "2 numbers")])
def test_wrong_bif_is_a_sentence(old, new, sentence, tmp_path):  # any of the checks
    (tmp_path / "x.bif").write_text(BIF.replace(old, new))
    with pytest.raises(ValueError, match="x.bif: expected .*found") as error:
        formats.read_bif(tmp_path / "x.bif")
    assert sentence in str(error.value)


def test_bif_that_is_no_text_or_empty(tmp_path):
    for content in (b"\xff\xfe\x00", b"hello", b""):
        (tmp_path / "x.bif").write_bytes(content)
        with pytest.raises(ValueError, match="x.bif"):
            formats.read_bif(tmp_path / "x.bif")
    with pytest.raises(FileNotFoundError):
        formats.read_bif(tmp_path / "none.bif")
