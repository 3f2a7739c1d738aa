"""Bytes to arrays: the published file formats of data sets, and nothing about the sets themselves.

    read_idx(path)                    MNIST idx, .gz or plain           -> uint8 array
    read_cdb(path)                    HODA .cdb, binary run lengths     -> list of uint8 {0, 1} arrays, labels
    read_cifar(path)                  CIFAR-10 binary, 3073 a record    -> (N, 3, 32, 32) uint8, labels
    read_mat_cells(path)              MATLAB 5 arrays and cells of arrays -> {name: array or list of arrays}
    read_npz(path, name, bits)        one array of an .npz, or its bits -> array, or packed bits and their shape
    read_images(folder, size, grey)   png and jpg, a folder or a .zip   -> (N, C, size, size) uint8
    read_mesh(path)                   OFF or PLY, polygons cut up   -> vertices (V, 3) float64, triangles (F, 3) int64
    read_attributes(path)             CelebA's list of attributes       -> {file name: bool row}, names

Each reader stands alone and checks what it reads: a missing file gives FileNotFoundError, one that is empty, cut off or
corrupt gives ValueError, in one sentence with the file, what was expected and what was found. No pickle is ever loaded.

Sources
  idx     LeCun, Cortes, Burges, "The MNIST database", section "File formats"
  .cdb    Khosravi, Kabir, Pattern Recognition Letters 28(10), 2007 (the set); layout as in HodaDatasetReader
  CIFAR   Krizhevsky, "Learning multiple layers of features from tiny images", 2009, binary version
  MAT     MathWorks, "MAT-file format", chapter 1 (level 5)
  OFF     Princeton Shape Benchmark, "Object file format"      PLY  Turk, "The PLY polygon file format", 1994
  npy     NumPy, "NEP 1: a simple file format for NumPy arrays"; an .npz is a .zip of them
"""

import gzip
import io
import math
import pathlib
import struct
import warnings
import zipfile
import zlib

import numpy as np


def _read(path) -> bytes:
    """The bytes of a file, decompressed if it ends in .gz; never empty."""
    path = pathlib.Path(path)
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except (OSError, EOFError, zlib.error, struct.error) as e:
        raise _wrong(path, "a readable, whole file", f"{type(e).__name__}: {e}") from None
    if not raw:
        raise _wrong(path, "data", "an empty file")
    return raw


def _wrong(path, expected, found) -> ValueError:
    return ValueError(f"{path}: expected {expected}, found {found}")


def read_idx(path) -> np.ndarray:
    """The uint8 array of an idx file of 1 to 4 dimensions (gzip where the name ends in .gz)."""
    raw = _read(path)
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or not 1 <= raw[3] <= 4:
        raise _wrong(path, "the idx magic number 00 00 08 01..04 (unsigned bytes)", raw[:4].hex(" "))
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise _wrong(path, f"an idx header of {start} bytes", f"{len(raw)} bytes")
    shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
    if not 0 < math.prod(shape) == len(raw) - start:
        raise _wrong(path, f"{math.prod(shape)} bytes (above 0) for the shape {shape}", f"{len(raw) - start} bytes")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()


def read_cdb(path) -> tuple[list[np.ndarray], np.ndarray]:
    """The images, each (H, W) uint8 with ink 1 and background 0, and the int64 labels (N,) of a HODA .cdb file.

    Header of 1024 bytes: date (4), H, W, total u32, 128 counts u32, type (0 = binary), text. Record: FF, label, W, H
    (only if the header has H = W = 0), byte count u16, then a row at a time runs of background, ink, ... that sum to W.
    """
    raw = _read(path)
    if len(raw) < 1024:
        raise _wrong(path, "a .cdb header of 1024 bytes", f"{len(raw)} bytes")
    height, width, total = struct.unpack_from("<BBI", raw, 4)
    counts = np.frombuffer(raw, "<u4", 128, offset=10)
    if raw[522]:
        raise _wrong(path, "type 0, binary images", f"type {raw[522]}")
    fixed, at, images, labels = height > 0 and width > 0, 1024, [], []
    for record in range(total):
        start = at + (4 if fixed else 6)
        if start > len(raw) or raw[at] != 0xFF:
            found = raw[at:start].hex(" ") or "the end of the file"
            raise _wrong(path, f"record {record + 1} of {total} (FF and its sizes) at byte {at}", found)
        W, H = (width, height) if fixed else raw[at + 2:at + 4]
        labels.append(raw[at + 1])
        at = start + int.from_bytes(raw[start - 2:start], "little")
        image = _unpack_runs(np.frombuffer(raw[start:at], np.uint8), H, W) if at <= len(raw) else None
        if image is None:
            found = f"{len(raw[start:at])} bytes that do not"
            raise _wrong(path, f"runs that fill {H} rows of {W} in record {record + 1}", found)
        images.append(image)
    if at != len(raw) or not images:
        raise _wrong(path, f"{total} records (above 0) and nothing behind them", f"{len(raw) - at} bytes more")
    labels = np.array(labels, np.int64)
    if not np.array_equal(np.bincount(labels, minlength=128), counts):
        raise _wrong(path, "as many records of each label as the header says", f"other counts in {total} records")
    return images, labels


def _unpack_runs(runs, H, W):
    """The (H, W) image of alternating run lengths (background first in each row), or None where they do not fit."""
    if H * W == 0 or len(runs) == 0:
        return None
    ends = np.cumsum(runs, dtype=np.int64)
    full = W * np.arange(1, H + 1)
    last = np.searchsorted(ends, full)                                  # the first to reach a row's end closes it
    if ends[-1] != full[-1] or last[-1] != len(runs) - 1 or not np.array_equal(ends[last], full):
        return None
    position = np.arange(len(runs))
    position[last[0] + 1:] -= np.repeat(last[:-1] + 1, np.diff(last))   # of a run in its row; odd = ink
    return np.repeat((position & 1).astype(np.uint8), runs).reshape(H, W)


def read_cifar(path) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of a CIFAR-10 binary file: label, red, green, blue."""
    raw = _read(path)
    if len(raw) % 3073:
        raise _wrong(path, "records of 3073 bytes", f"{len(raw)} bytes, {len(raw) % 3073} too many")
    records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
    if records[:, 0].max() > 9:
        raise _wrong(path, "labels 0 to 9", f"label {records[:, 0].max()}")
    return records[:, 1:].reshape(-1, 3, 32, 32).copy(), records[:, 0].astype(np.int64)


# ---- MATLAB level 5: elements of (type, size, data), arrays within elements, cells of arrays

MAT_TYPES = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}


def read_mat_cells(path) -> dict[str, np.ndarray | list[np.ndarray]]:
    """The variables of a little-endian MATLAB 5 file: numeric arrays, cells of them as flat lists (columns first).

    Struct, sparse, text and object variables are refused with ValueError, like anything corrupt.
    """
    raw = _read(path)
    if len(raw) < 136 or raw[126:128] != b"IM":
        raise _wrong(path, "a MATLAB 5 header (little-endian) of 128 bytes and a variable", f"{len(raw)} other bytes")
    variables, at = {}, 128
    try:
        while at < len(raw):
            kind, body, at = _mat_element(raw, at)
            if kind == 15:                                              # zlib around one matrix
                kind, body, _ = _mat_element(zlib.decompress(body), 0)
            name, value = _mat_matrix(kind, body, cells=True)
            variables[name] = value
    except (ValueError, struct.error, zlib.error, IndexError) as e:
        raise _wrong(path, "whole MATLAB 5 arrays or cells of arrays", f"{e} before or at byte {at}") from None
    return variables


def _mat_element(raw, at):
    """(type, data, offset of the next element). Data of up to 4 bytes may sit in the tag itself."""
    kind, size = struct.unpack_from("<II", raw, at)
    start = at + 8
    if kind >> 16:
        kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        after = at + 8
    else:
        after = start + size + (-size % 8 if kind != 15 else 0)
    if size > (4 if start == at + 4 else len(raw) - start):
        raise ValueError(f"an element of {size} bytes that is cut off")
    return kind, raw[start:start + size], after


def _mat_matrix(kind, body, cells=False):
    """(name, value) of a matrix element: flags, dimensions, name, then the numbers or the cells."""
    if kind != 14:
        raise ValueError(f"an element of type {kind}")
    (_, flags, at), parts = _mat_element(body, 0), []
    for _ in range(2):
        _, part, at = _mat_element(body, at)
        parts.append(part)
    shape, name = np.frombuffer(parts[0], "<i4"), parts[1].decode("latin1")
    if len(shape) < 2 or shape.min() < 0 or flags[1] & 8:
        raise ValueError(f"the shape {shape.tolist()} or complex numbers")
    if flags[0] == 1 and cells:
        values = []
        for _ in range(math.prod(shape.tolist())):
            kind, part, at = _mat_element(body, at)
            values.append(_mat_matrix(kind, part)[1])
        return name, values
    if not 6 <= flags[0] <= 15:
        raise ValueError(f"an array of class {flags[0]}")
    kind, part, _ = _mat_element(body, at)
    if kind not in MAT_TYPES:
        raise ValueError(f"numbers of type {kind}")
    return name, np.frombuffer(part, MAT_TYPES[kind]).reshape(shape, order="F").copy()


# ---- NumPy archives


def read_npz(path, name: str, bits: bool = False):
    """The array `name` of an .npz file; with bits the packed rows (N, ceil(M / 8)) of its (N, ...) zeros and ones, M a
    row, and its shape: read in blocks, so that the 3 GB of dSprites need 378 MB. What is pickled is refused."""
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, columns_first, dtype = header(file)
            if dtype.hasobject or columns_first or math.prod(shape) == 0:
                raise ValueError(f"an array {shape} of {dtype}, columns first: {columns_first}")
            row = math.prod(shape[1:]) if shape else 1
            rows, blocks = max(1, 2**24 // (row * dtype.itemsize)) if bits else math.prod(shape[:1]), []
            for start in range(0, math.prod(shape[:1]), rows):
                wanted = min(rows, math.prod(shape[:1]) - start) * row * dtype.itemsize
                block = np.frombuffer(_exactly(file, wanted), dtype).reshape(-1, row)
                if bits and (dtype != np.uint8 or block.max() > 1):
                    raise ValueError(f"{dtype} up to {block.max()} where 0 and 1 were to be")
                blocks.append(np.packbits(block, axis=1) if bits else block)
            if file.read(1):
                raise ValueError("bytes behind the array")
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error,
            struct.error) as e:
        raise _wrong(path, f"a whole NumPy archive with numbers named {name}", f"{type(e).__name__}: {e}") from None
    return (np.concatenate(blocks), shape) if bits else blocks[0].reshape(shape).copy()


def _exactly(file, size):
    """The next `size` bytes: a claim of the header alone reserves no memory."""
    parts = []
    while size and (part := file.read(min(size, 2**20))):
        parts.append(part)
        size -= len(part)
    if size:
        raise EOFError(f"{size} bytes are missing")
    return b"".join(parts)


# ---- meshes

PLY_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
             "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
             "float32": "f4", "float64": "f8"}


def read_mesh(path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) float64 and triangles (F, 3) int64 of an .off or .ply file; polygons are cut into fans.

    The counts may stand on the first line of an OFF file, with or without a blank (`OFF12 34 0`, the known fault of
    ModelNet40). A mesh without vertices or faces, or with an index or a number that cannot be, is a ValueError.
    """
    path = pathlib.Path(path)
    raw, name = _read(path), path.name.lower().removesuffix(".gz")
    try:
        vertices, faces = (_ply if name.endswith(".ply") else _off)(raw)
    except (ValueError, IndexError, KeyError, struct.error, OverflowError, UnicodeDecodeError) as e:
        raise _wrong(path, "a whole mesh (OFF or PLY)", f"{type(e).__name__}: {e}") from None
    triangles = [face[[0, k, k + 1]] for face in faces if len(face) > 3 for k in range(1, len(face) - 1)]
    triangles = np.array([face for face in faces if len(face) == 3] + triangles, np.int64).reshape(-1, 3)
    if not len(vertices) or not len(triangles):
        raise _wrong(path, "vertices and faces", f"{len(vertices)} vertices, {len(triangles)} triangles")
    if not np.isfinite(vertices).all() or triangles.min() < 0 or triangles.max() >= len(vertices):
        raise _wrong(path, f"finite numbers, and faces of the vertices 0 to {len(vertices) - 1}",
                     f"indices {triangles.min()} to {triangles.max()}, all finite: {np.isfinite(vertices).all()}")
    return vertices, triangles


def _off(raw):
    lines = [line for line in (line.split("#")[0].strip() for line in raw.decode("latin1").splitlines()) if line]
    if not lines or not lines[0].startswith("OFF"):
        raise ValueError(f"{lines[0][:20]!r} in the place of OFF" if lines else "no line")
    lines = [lines[0][3:].strip(), *lines[1:]] if lines[0] != "OFF" else lines[1:]
    V, F = (int(word) for word in lines[0].split()[:2])
    if V < 0 or F < 0 or len(lines) < 1 + V + F:
        raise ValueError(f"{len(lines) - 1} lines for {V} vertices and {F} faces")
    vertices = np.array([line.split()[:3] for line in lines[1:1 + V]], np.float64).reshape(V, 3)
    faces = [_face([int(float(word)) for word in line.split()]) for line in lines[1 + V:1 + V + F]]
    return vertices, faces


def _face(words):
    """The indices behind their number; colours may follow."""
    if not words or len(words) <= words[0]:
        raise ValueError(f"a face of {words[:1]} corners with {max(0, len(words) - 1)} numbers")
    return np.array(words[1:1 + words[0]], np.int64)


def _ply(raw):
    head, mark, body = raw.partition(b"end_header")
    lines = [line.split() for line in head.decode("ascii").splitlines() if line.strip()]
    if not mark or lines[0] != ["ply"]:
        raise ValueError("no line ply and no end_header")
    body = body[body.index(b"\n") + 1:]
    form, elements = next(line[1] for line in lines if line[0] == "format"), []
    for line in lines:
        if line[0] == "element":
            elements.append((line[1], int(line[2]), []))
        elif line[0] == "property":
            elements[-1][2].append((line[-1], line[1:-1]))
    found, at, words = {}, 0, iter(body.split() if form == "ascii" else ())
    order = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}[form]
    for name, count, properties in elements:
        kinds = [[np.dtype(order + PLY_TYPES[t]) for t in kind if t != "list"] for _, kind in properties]
        if count < 0 or count > len(raw):
            raise ValueError(f"{count} of {name}")
        if form != "ascii" and all(len(kind) == 1 for kind in kinds):
            rows = np.frombuffer(body, [(key, kind[0]) for (key, _), kind in zip(properties, kinds)], count, at)
            at += rows.nbytes
            found[name] = {key: rows[key].astype(np.float64) for key, _ in properties}
            continue
        found[name] = {key: [] for key, _ in properties}
        for _ in range(count):
            for (key, _), kind in zip(properties, kinds):
                values = []
                for dtype, many in zip(kind, (1, None)):                # a list: its length, then its members
                    many = many or int(values[0])
                    if form == "ascii":
                        values = [float(word) for _, word in zip(range(many), words)]
                    else:
                        values, at = np.frombuffer(body, dtype, many, at), at + many * dtype.itemsize
                    if len(values) != many:
                        raise ValueError(f"the end of the file in {name}")
                found[name][key].append(values[0] if len(kind) == 1 else np.array(values, np.int64))
    vertices = np.stack([np.asarray(found["vertex"][axis], np.float64) for axis in "xyz"], 1)
    faces = next((v for key, v in found.get("face", {}).items() if key in ("vertex_indices", "vertex_index")), [])
    return vertices, faces


# ---- a folder of pictures


def read_images(folder, size: int, grey: bool = False, skip_bad: bool = False) -> np.ndarray:
    """All .png, .jpg and .jpeg files of a folder in the order of their names: (N, 1 or 3, size, size) uint8.

    Transparent parts become white; the short side is brought to `size` (area average) and the centre square kept.
    skip_bad: leave out, with a warning that names them, the files that cannot be read; else they are a ValueError.
    """
    return read_named_images(folder, size, grey, skip_bad)[1]


def read_named_images(folder, size: int, grey: bool = False, skip_bad: bool = False) -> tuple[list[str], np.ndarray]:
    """As read_images, of a folder or a .zip of one, with the names of the files that were read."""
    from tqdm import tqdm

    folder = pathlib.Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    if not folder.is_dir() and folder.suffix != ".zip":
        raise _wrong(folder, "a folder of images", "a file")
    if size < 1:
        raise ValueError(f"images of {size} x {size} pixels are impossible; the size must be at least 1")
    if folder.is_dir():
        paths, read = [p.name for p in folder.iterdir()], lambda name: _read(folder / name)
    else:
        paths, read = _open_zip(folder)
    paths = sorted(p for p in paths if p.lower().endswith((".png", ".jpg", ".jpeg")))
    if not paths:
        raise _wrong(folder, "images (.png, .jpg, .jpeg)", "none")
    out, names, bad = np.empty((len(paths), 1 if grey else 3, size, size), np.uint8), [], []
    for path in tqdm(paths, f"reading {folder.name}", leave=False, disable=len(paths) < 5000):
        try:
            out[len(names)] = _decode_image(read(path), folder / path, size, grey)
            names.append(pathlib.PurePosixPath(path).name)
        except ValueError as e:
            bad.append(str(e))
    if bad:
        found = f"{folder}: {len(bad)} of {len(paths)} images cannot be read: {'; '.join(bad[:10])}"
        if not skip_bad or not names:
            raise ValueError(found)
        warnings.warn(f"{found}; they are left out", stacklevel=3)
    return names, out[:len(names)]


def _open_zip(path):
    """The names in a .zip and the function from a name to its bytes."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as e:
        raise _wrong(path, "a whole .zip of images", f"{type(e).__name__}: {e}") from None

    def read(name):
        try:
            return archive.read(name)
        except (OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as e:
            raise _wrong(path / name, "a whole member of the .zip", f"{type(e).__name__}: {e}") from None
    return archive.namelist(), read


def read_attributes(path) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    """File names, (N, A) bool and the A names of a CelebA list: a count, the names, then `000001.jpg -1 1 ...`."""
    lines = _read(path).decode("latin1").splitlines()
    names, rows = (lines[1].split() if len(lines) > 1 else []), [line.split() for line in lines[2:] if line.strip()]
    if not names or lines[0].strip() != str(len(rows)):
        raise _wrong(path, "the number of rows, names, and as many rows", f"{lines[0][:20]!r} above {len(rows)} rows")
    for row in rows:
        if len(row) != 1 + len(names) or not {*row[1:]} <= {"1", "-1"}:
            raise _wrong(path, f"a file and {len(names)} of 1 or -1", " ".join(row[:4]) + f" ({len(row)} in all)")
    return [row[0] for row in rows], np.array([row[1:] for row in rows]) == "1", tuple(names)


def _decode_image(raw, path, size, grey):
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(raw)) as image:
            if image.format == "PNG" and b"IEND\xaeB`\x82" not in raw:
                raise ValueError("the closing chunk is missing")
            image = ImageOps.exif_transpose(image).convert("RGBA")
    except Exception as e:                                              # decoders raise OSError, SyntaxError, ...
        raise _wrong(path, "a whole PNG or JPEG image", f"{type(e).__name__}: {e}") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("L" if grey else "RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    filter = Image.Resampling.BOX if size < side else Image.Resampling.BICUBIC
    image = image.resize((size, size), filter, box=(left, top, left + side, top + side))
    return np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)
