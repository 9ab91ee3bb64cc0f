"""Damaged files for every reader, for as long as one likes: each ends clean or in a sentence that names the file.

    python tests/fuzz.py --minutes 30 --seed 0     all readers, files made here and then damaged
    python tests/fuzz.py --kinds store,image       some readers
    python tests/fuzz.py --case store 17           one case again, with the whole traceback

Cases run in a process of their own, so a crash, a hang or a hunger for memory is seen; a finding says which case it is.
The files of a case depend on its kind, its seed and the code that makes the valid ones, and on nothing else."""

import argparse
import contextlib
import faulthandler
import importlib
import io
import json
import os
import pickle
import random
import re
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STANDSTILL = 120           # seconds without an answer, after which the process is ended
ADDRESSES = 6 * 1024**3    # bytes that a case may ask for beyond what the process has
WHOLE = -1                 # the seed of a case without damage
FILE_SIZE = 1024**3        # bytes of the largest file that a case may write


# Damage to bytes


def _place(rng: random.Random, length: int) -> int:
    "Somewhere, more often near the beginning or the end, where headers are."
    near = min(length, 400)
    return rng.choice((rng.randrange(length), rng.randrange(near), length - 1 - rng.randrange(near)))


def _flip(rng: random.Random, content: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        content[_place(rng, len(content))] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, content: bytearray) -> None:
    content[_place(rng, len(content))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _number(rng: random.Random, content: bytearray) -> None:
    "A field of 2, 4 or 8 bytes becomes a number at the edge of its range."
    size, place = rng.choice((2, 4, 8)), _place(rng, len(content))
    value = rng.choice((0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1, 10**4, 10**9))
    content[place : place + size] = (value % 2 ** (8 * size)).to_bytes(size, rng.choice(("little", "big")))


def _cut(rng: random.Random, content: bytearray) -> None:
    del content[_place(rng, len(content)) :]


def _remove(rng: random.Random, content: bytearray) -> None:
    place = _place(rng, len(content))
    del content[place : place + rng.choice((1, 4, 64, 4096))]


def _insert(rng: random.Random, content: bytearray) -> None:
    place = _place(rng, len(content))
    content[place:place] = rng.randbytes(rng.choice((1, 4, 64, 4096)))


def _repeat(rng: random.Random, content: bytearray) -> None:
    place, size = _place(rng, len(content)), rng.choice((1, 16, 512, 8192))
    content[place:place] = content[place : place + size] * rng.choice((1, 2, 20))


def _swap(rng: random.Random, content: bytearray) -> None:
    size = rng.choice((1, 4, 64))
    one, other = sorted((_place(rng, len(content)), _place(rng, len(content))))
    if one + size <= other:
        first, second = content[one : one + size], content[other : other + size]
        content[one : one + size], content[other : other + len(second)] = second, first


def _zero(rng: random.Random, content: bytearray) -> None:
    place, size = _place(rng, len(content)), rng.choice((4, 512, 4096))
    content[place : place + size] = bytes(len(content[place : place + size]))


BYTES = (_flip, _flip, _set, _number, _cut, _remove, _insert, _repeat, _swap, _zero)


def damage_bytes(rng: random.Random, path: Path) -> None:
    "One to four operations on the content."
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 4))):
        if content:
            rng.choice(BYTES)(rng, content)
    path.write_bytes(content)


# Damage to structure


ODD = (
    None, True, False, 0, 1, -1, 10**9, 2**63, 2**70, 0.5, -0.0, float("nan"), float("inf"), 1e308, "", "0", "nan", "é",
    "\x00", "\ud800", "../../x", "x" * 200_000, [], [1, 2], [[]], {}, {"": 0}, {"1": None},
)
Tree = dict | list


def _places(tree: Any) -> Iterator[tuple[Tree, Any]]:
    "All containers in nested dictionaries and lists, with each of their keys."
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def damage_tree(
    rng: random.Random,
    tree: Tree,                                              # nested dictionaries and lists; changed in place
    odd: Callable[[random.Random, Any], Any] | None = None,  # another leaf in the place of one
) -> None:
    "Fields are dropped, renamed, doubled, swapped or made something else."
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = list(_places(tree))
        if not places:
            return
        where, key = rng.choice(places)
        other, another = rng.choice(places)
        act = rng.choice(("odd", "odd", "odd", "drop", "swap", "rename", "wrap"))
        if act == "drop":
            del where[key]
        elif act == "swap":
            where[key], other[another] = other[another], where[key]
        elif act == "rename" and isinstance(where, dict):
            where[f"{key}{rng.choice(('s', ' ', '.', 'é'))}"] = where.pop(key)
        elif act == "wrap":
            where[key] = rng.choice(([where[key]], {"": where[key]}, [where[key]] * 3))
        else:
            where[key] = odd(rng, where[key]) if odd and rng.random() < 0.7 else rng.choice(ODD)


def damage_json(rng: random.Random, path: Path) -> None:
    tree = json.loads(path.read_text())
    damage_tree(rng, tree)
    with contextlib.suppress(RecursionError, ValueError):  # what was swapped may hold itself
        path.write_text(json.dumps(tree))
    if rng.random() < 0.1:
        text = rng.choice(("", "[]", "1", "[" * 100_000, '{"a": ' * 100_000, "NaN", "{}", "\ufeff{}", '"config"'))
        path.write_text(text)


CELLS = (
    "", " ", "0", "1", "2", "3", "-1", "1.0", "01", "nan", "inf", "-inf", "1e999", "9" * 30, "٣", "é", '"', '""', "'",
    "\x00", "\ufeff", "None", "True", "x" * 200_000, "a,b", "a b", "../../etc/passwd", "\ud800", "000001.jpg",
    "image_id",
)


def _table_row(rng: random.Random, rows: list[list[str]]) -> None:
    "A row goes, comes again, moves, grows or shrinks; the first one among them, which may be the header."
    row = rng.choice((0, rng.randrange(len(rows))))
    act = rng.choice(("drop", "double", "move", "grow", "shrink", "empty"))
    if act == "drop":
        del rows[row]
    elif act in ("double", "move"):
        rows.insert(rng.randrange(len(rows) + 1), list(rows[row]) if act == "double" else rows.pop(row))
    elif act == "grow":
        cell, times = rng.choice(CELLS), rng.choice((1, 1, 3, 5000))
        rows[row] += [cell] * (times if len(cell) < 100 else 3)  # files of some MB
    else:
        rows[row] = rows[row][: rng.randrange(max(1, len(rows[row])))] if act == "shrink" else []


def _table_column(rng: random.Random, rows: list[list[str]]) -> None:
    "A column goes, comes again or is filled with one value."
    column = rng.randrange(max(map(len, rows), default=0) + 1)
    act, value = rng.choice(("drop", "double", "fill")), rng.choice(CELLS)
    for row in rows:
        if column < len(row):
            row[column : column + 1] = {"drop": [], "double": [row[column]] * 2, "fill": [value]}[act]


def damage_table(rng: random.Random, path: Path) -> None:
    "Cells, rows, columns, delimiters, line ends and encoding of a text table."
    delimiter = "," if path.suffix == ".csv" else " "
    rows = [line.split(delimiter) for line in path.read_text().splitlines()]
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        if rows and rng.random() < 0.4:
            rng.choice((_table_row, _table_column))(rng, rows)
        elif rows and (row := rng.choice((rows[0], rng.choice(rows)))):
            row[rng.randrange(len(row))] = rng.choice(CELLS)
    delimiter = rng.choice((*[delimiter] * 6, ";", "\t", ",", " ", "  "))
    text = rng.choice(("\n", "\n", "\n", "\r\n", "\r", "\u2028", "")).join(delimiter.join(row) for row in rows)
    encoding = rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp037"))
    path.write_bytes(text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace"))


def damage_png(rng: random.Random, path: Path) -> None:
    "Chunks of a PNG are damaged, with their checksums made right again; other files have their bytes damaged."
    content = path.read_bytes()
    if not content.startswith(b"\x89PNG"):
        return damage_bytes(rng, path)
    chunks, place = [], 8
    while place < len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        chunks.append((content[place + 4 : place + 8], bytearray(content[place + 8 : place + 8 + size])))
        place += size + 12
    kinds = [b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"gAMA", b"iTXt", b"acTL", b"fcTL", b"IDAT", b"IEND", b"IHDR", b"zTXt"]
    for _ in range(rng.choice((1, 2))):
        kind, data = chunks[i := rng.randrange(len(chunks))]
        if rng.random() < 0.3:
            chunks.insert(i, (rng.choice(kinds), bytearray(rng.randbytes(rng.choice((0, 1, 13, 300))))))
        elif data:
            rng.choice(BYTES)(rng, data)
    out = [(len(data).to_bytes(4, "big"), kind + data) for kind, data in chunks]
    sealed = [size + body + zlib.crc32(body).to_bytes(4, "big") for size, body in out]
    path.write_bytes(content[:8] + b"".join(sealed))


def _odd_dataset(rng: random.Random, group, name: str) -> None:
    "Something else than the dataset that was there, or the same rows as another type."
    import h5py
    import numpy as np

    old = group[name] if isinstance(group.get(name), h5py.Dataset) else None
    values = np.asarray(old[()]) if old is not None and old.size is not None and old.size < 10**6 else np.zeros(3)
    del group[name]
    act = rng.randrange(12)
    if act == 0:
        group.create_group(name)
    elif act == 1:
        group[name] = h5py.Empty("f")
    elif act == 2:
        group[name] = h5py.SoftLink(rng.choice(("/nothing", f"/{name}", "/heatmaps", "/")))
    elif act == 3:
        group[name] = h5py.ExternalLink(rng.choice(("nothing.h5", "/dev/zero", group.file.filename)), f"/{name}")
    elif act == 4:
        layout = h5py.VirtualLayout(values.shape or (1,), "f4")
        layout[...] = h5py.VirtualSource("nothing.h5", name, values.shape or (1,))
        group.create_virtual_dataset(name, layout)
    elif act == 5:
        group.create_dataset(name, (16,), "f4", external=[("/dev/zero", 0, 64)])
    elif act == 6:
        shape = (rng.choice((10**6, 10**9, 10**12)), *values.shape[1:])
        group.create_dataset(name, shape, values.dtype if values.dtype.kind in "fiu" else "f4", chunks=(1, *shape[1:]))
    elif act == 7:
        group[name] = rng.choice((1.5, "text", [1, 2, 3], np.zeros((2, 2)), np.zeros((0,)), np.zeros((2, 3, 4, 5))))
    elif act == 8:
        types = ("i1", "f8", "c8", "u2", h5py.string_dtype(), h5py.ref_dtype)
        group.create_dataset(name, values.shape, rng.choice(types))
    elif act == 9:
        group[name] = values[: rng.randrange(len(values) + 1)] if values.ndim else values
    elif act == 10:
        group[name] = np.stack([values] * 2, -1) if values.dtype.kind in "fiu" else values.reshape(-1, 1)[:, [0, 0]]
    else:
        group.create_dataset(name, data=np.full(values.shape, rng.choice((np.nan, np.inf, -1.0, 2.0, 1e-300))))


def damage_hdf5(rng: random.Random, path: Path) -> None:
    "Datasets and attributes of an HDF5 file are dropped, doubled, resized, or replaced by something else."
    import h5py
    import numpy as np

    with h5py.File(path, "r+") as file:
        for _ in range(rng.choice((1, 1, 2))):
            act = rng.choice(("set", "set", "set", "attribute", "attribute", "drop", "add", "resize"))
            names = list(file)
            if act == "attribute" and len(file.attrs):
                name = rng.choice(list(file.attrs))
                odd = rng.choice((1, "", b"\xff", np.zeros(3), h5py.Empty("f"), None, "[]", "{}", "1", "[" * 50_000))
                if isinstance(file.attrs[name], str) and file.attrs[name].startswith("{") and rng.random() < 0.7:
                    tree = json.loads(file.attrs[name])
                    damage_tree(rng, tree)
                    with contextlib.suppress(RecursionError, ValueError):
                        odd = json.dumps(tree)[:60_000]
                del file.attrs[name]
                if odd is not None:
                    file.attrs[name] = odd
            elif act == "drop" and names:
                del file[rng.choice(names)]
            elif act == "add":
                file[f"more{rng.randrange(9)}"] = np.zeros(rng.choice((0, 3)))
            elif act == "resize" and names:
                name = rng.choice(names)
                if getattr(file[name], "maxshape", None) and file[name].maxshape[0] is None:
                    rows = rng.choice((0, len(file[name]) + rng.choice((-1, 1)), 10**6, 10**9))
                    file[name].resize(max(0, rows), axis=0)
            elif names:
                _odd_dataset(rng, file, rng.choice(names))


def damage_safetensors(rng: random.Random, path: Path) -> None:
    "The header of a safetensors file, its own length made right again."
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    settings = json.loads(header.get("__metadata__", {}).get("facesr", "{}"))
    if settings and rng.random() < 0.4:
        damage_tree(rng, settings)
        with contextlib.suppress(RecursionError, ValueError):
            header["__metadata__"]["facesr"] = json.dumps(settings)
    elif rng.random() < 0.3:
        header = {name if name == "__metadata__" else f"_orig_mod.{name}": entry for name, entry in header.items()}
    else:
        damage_tree(rng, header)
    with contextlib.suppress(RecursionError, ValueError):
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def _odd_leaf(rng: random.Random, old: Any) -> Any:
    "Another tensor in the place of one, another number in the place of one."
    import torch

    if not isinstance(old, torch.Tensor):
        return rng.choice(ODD)
    cast = [torch.int64, torch.float64, torch.bool, torch.complex64, torch.bfloat16]
    choices = (
        lambda: torch.full(old.shape, rng.choice((float("nan"), float("inf"), -1e30)))
        if old.is_floating_point() else torch.full_like(old, -1),
        lambda: old.to(rng.choice(cast)), lambda: old[None], lambda: old.flatten()[:-1], lambda: torch.zeros(0),
        lambda: torch.tensor(-5), lambda: old.to_sparse(), lambda: old.to("meta"), lambda: None,
        lambda: torch.zeros(1).expand(10**6),
    )
    return rng.choice(choices)()


def damage_checkpoint(rng: random.Random, path: Path) -> None:
    "Fields and tensors of a file of torch.save, which is written whole again."
    import torch

    if rng.random() < 0.25:
        return damage_zip(rng, path)
    tree = torch.load(path, weights_only=True)
    fields = [tree, tree["loop"], tree["loop"], tree["progress"], tree["progress"], tree["loop"]["optimizer"]]
    damage_tree(rng, rng.choice([one for one in fields if isinstance(one, dict)]), _odd_leaf)
    with contextlib.suppress(RecursionError, RuntimeError, UnicodeError):
        torch.save(tree, buffer := io.BytesIO())
        path.write_bytes(buffer.getvalue())


def damage_zip(rng: random.Random, path: Path) -> None:
    "Members of a zip archive are dropped, renamed, doubled or damaged, with their checksums right."
    with zipfile.ZipFile(path) as archive:
        members = [[info.filename, bytearray(archive.read(info))] for info in archive.infolist()]
    for _ in range(rng.choice((1, 2))):
        if not members:
            break
        member = rng.choice(members[:3] + [rng.choice(members)])
        act = rng.choice(("bytes", "bytes", "drop", "rename", "double"))
        if act == "bytes" and member[1]:
            rng.choice(BYTES)(rng, member[1])
        elif act == "drop":
            members.remove(member)
        elif act == "rename":
            member[0] += rng.choice(("x", "/", "/../y"))
        elif act == "double":
            members.append([member[0], bytearray(member[1])])
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # a name twice
        for name, content in members:
            archive.writestr(name, bytes(content))


# Valid files


def _face(rng: random.Random, width: int = 178, height: int = 218):
    "A picture with some structure."
    from PIL import Image, ImageDraw

    noise = Image.frombytes("RGB", (width // 4, height // 4), rng.randbytes(width // 4 * (height // 4) * 3))
    picture = noise.resize((width, height))
    draw = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y = rng.randrange(width), rng.randrange(height)
        draw.ellipse([x, y, x + 40, y + 30], fill=tuple(rng.randbytes(3)))
    return picture


def make_images(folder: Path) -> None:
    "One picture in every format and mode that is read."
    from PIL import Image, ImageCms
    from pillow_heif import from_pillow

    picture = _face(random.Random("face"))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x9286] = 6, "maker", "a comment"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture.save(folder / "plain.jpg", quality=90)
    picture.save(folder / "progressive.jpg", progressive=True, exif=exif, icc_profile=profile)
    picture.convert("CMYK").save(folder / "cmyk.jpg", icc_profile=profile)
    picture.convert("L").save(folder / "grey.png", exif=exif, icc_profile=profile)
    picture.resize((136, 136)).convert("I").point(lambda x: x * 257).convert("I;16").save(folder / "sixteen.png")
    picture.quantize(64).save(folder / "palette.png", transparency=3)
    picture.resize((136, 136)).convert("RGBA").save(folder / "alpha.png")
    picture.convert("1").save(folder / "bits.png")
    picture.save(folder / "lossy.webp", exif=exif, icc_profile=profile)
    picture.resize((136, 136)).convert("RGBA").save(folder / "lossless.webp", lossless=True)
    picture.resize((136, 136)).save(folder / "animated.webp", save_all=True, append_images=[picture.resize((136, 136))])
    picture.resize((136, 140)).save(folder / "plain.bmp")
    picture.resize((136, 140)).quantize(16).save(folder / "palette.bmp")
    picture.save(folder / "packed.tif", compression="tiff_lzw", exif=exif, icc_profile=profile)
    picture.save(folder / "photographic.tif", compression="jpeg")
    picture.resize((136, 140)).convert("I").point(lambda x: x * 257).convert("I;16").save(folder / "sixteen.tif")
    from_pillow(picture).save(folder / "phone.heic")


NAMES = [f"{i:06}.jpg" for i in range(1, 25)]


def make_tables(folder: Path) -> None:
    "The tables of CelebA in both forms, a table of parts, and a list of names."
    splits = [i % 3 for i in range(len(NAMES))]
    partition = [f"{name} {split}" for name, split in zip(NAMES, splits)]
    (folder / "list_eval_partition.txt").write_text("\n".join(partition) + "\n")
    listed = ["image_id,partition", *(line.replace(" ", ",") for line in partition)]
    (folder / "list_eval_partition.csv").write_text("\n".join(listed) + "\n")
    (folder / "identity_CelebA.txt").write_text("".join(f"{name} {i // 2 + 1}\n" for i, name in enumerate(NAMES)))
    columns = ["Bald", "Eyeglasses", "Male", "Smiling"]
    rows = [[name, *(str(1 - 2 * (i >> k & 1)) for k in range(len(columns)))] for i, name in enumerate(NAMES)]
    (folder / "list_attr_celeba.csv").write_text("\n".join(",".join(row) for row in [["image_id", *columns], *rows]))
    text = [str(len(rows)), " ".join(columns), *(" ".join(row) for row in rows)]
    (folder / "list_attr_celeba.txt").write_text("\n".join(text))
    (folder / "parts.csv").write_text("class,weight,fade\neye,4.5,centre\nnose,4,centre\nface,4,rim\n")
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n")


class FixedBoxes:
    "A detector without a network: one eye and a face, always at the same places."

    classes, fingerprint, settings = ("eye", "face"), "fixed", {"weights": "none"}

    def __call__(self, images, names=()):
        import numpy as np

        from facesr.detection import Detections

        boxes = np.array([[40, 50, 60, 62], [30, 30, 100, 120]], np.float32)
        return [Detections(boxes, ["eye", "face"], np.array([0.9, 0.8], np.float32)) for _ in images]


def _recipe():
    from facesr.heatmaps import Part, Recipe

    return Recipe({"eye": Part(4.5), "face": Part(4, "rim")})


def make_faces(folder: Path) -> None:
    "Some photographs, in a folder beside the file that is read."
    (folder / "images").mkdir()
    for i, name in enumerate(NAMES[:6]):
        _face(random.Random(i)).save(folder / "images" / name)


def make_store(folder: Path) -> None:
    "A store of heatmaps, and the photographs it was made from."
    from facesr.store import make_heatmaps

    make_faces(folder)
    make_heatmaps(folder / "store.h5", folder / "images", NAMES[:6], FixedBoxes(), _recipe(), report=lambda line: None)


def make_shards(folder: Path) -> None:
    "What an interrupted `facesr heatmaps make` leaves: a store, and shards that wait to be joined."
    import facesr.store as store

    make_faces(folder)
    arguments = (folder / "images", NAMES[:2], FixedBoxes(), _recipe())
    store.make_heatmaps(folder / "store.h5", *arguments, report=lambda line: None)

    class Stopped(FixedBoxes):
        def __call__(self, images, names=()):
            if (folder / "store.h5.parts").is_dir() and len(list((folder / "store.h5.parts").iterdir())) > 1:
                raise KeyboardInterrupt
            return super().__call__(images)

    whole, store.SHARD = store.SHARD, 2
    with contextlib.suppress(KeyboardInterrupt):
        store.make_heatmaps(folder / "store.h5", folder / "images", NAMES[:6], Stopped(), _recipe(), report=print)
    store.SHARD = whole


def make_published(folder: Path) -> None:
    "The layout in which heatmaps are published, with the names of its rows beside it."
    from facesr.store import HeatmapStore, export_published

    make_store(folder)
    export_published(HeatmapStore(folder / "store.h5"), folder / "published.h5")


def make_weights(folder: Path) -> None:
    "A small network as a run writes it."
    import torch

    from facesr.model import SuperResolutionUNet, model_bytes

    torch.manual_seed(0)
    (folder / "model.safetensors").write_bytes(model_bytes(SuperResolutionUNet(width=8, blocks=1)))


def make_arrays(folder: Path) -> None:
    "Nested dictionaries of arrays, pickled, as weights of perceptual networks are published."
    import numpy as np

    layer = {"kernel": np.zeros((3, 3, 2, 4), np.float32), "bias": np.zeros(4, np.float32)}
    (folder / "arrays.ckpt").write_bytes(pickle.dumps({f"Net_{i}": {"Conv_0": layer} for i in range(3)}, protocol=4))


def make_run(folder: Path) -> None:
    "The published files of two small runs, with invented scores."
    import pandas as pd
    import torch

    from facesr.metrics import METRICS
    from facesr.runs import choose_shown, provenance, shown_picture, write_json
    from facesr.statistics import summarise
    from facesr.study import resolve

    torch.manual_seed(0)
    lr = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    hr = lr.repeat_interleave(8, -1).repeat_interleave(8, -2)
    shown = choose_shown(lr, hr)
    rows = [row for row, _, _ in shown]
    measured = [name for name, metric in METRICS.items() if metric.group != "identity"]
    table = pd.DataFrame({"name": NAMES[:8], "person": [1, 1, 2, 2, 3, 3, 4, 4]})
    table = table.assign(**{name: 0.5 + 0.01 * table.index for name in measured})
    columns = ("mse", "perceptual", "learning_rate", "val_psnr", "val_ssim", "val_lpips_alex", "seconds")
    history = pd.DataFrame({"epoch": [1, 2], "step": [2, 4]} | {name: [0.2, 0.1] for name in columns})
    history["faces_per_second"] = 16.0
    for variant in ("baseline", "heatmap"):
        config = resolve(variant, "smoke")
        run = folder / "results" / "smoke" / variant / "seed0"
        run.mkdir(parents=True)
        splits = {split: {"used": 8, "skipped": 0, "sha256": split} for split in ("train", "val", "test")}
        faces = {"origin": "bundled", "reason": "bundled with the package", "missing": 0, "splits": splits}
        about = [{"name": NAMES[row], "why": why, "bicubic_psnr": round(score, 2)} for row, why, score in shown]
        write_json(run / "config.json", {
            "config": config.model_dump(), "network": {"conv": "separable", "width": 16, "blocks": 1},
            "faces": faces, "heatmaps": None, **provenance(),
        })
        write_json(run / "metrics.json", {
            "variant": variant, "preset": "smoke", "seed": 0, "best_epoch": 2, "rule": "",
            "validation": {"val_psnr": 21.0},
            "test": summarise(table), "parameters": 1, "gmac": 0.1, "training_seconds": 1.0, "weights_sha256": "",
            "shown": about,
        })
        (run / "shown.webp").write_bytes(shown_picture(lr[rows], hr[rows], hr[rows]))
        table.to_csv(run / "per_image.csv", index=False)
        seen = history.assign(attention=0.1) if config.attention_weight else history
        seen.to_csv(run / "history.csv", index=False)


def make_checkpoint(folder: Path) -> None:
    "The checkpoint of a run that has taken a step of its first epoch."
    trainer = _trainer()
    (folder / "checkpoint").mkdir()
    shutil.copy(trainer.folder / "checkpoint" / "state.pt", folder / "checkpoint")


def make_boxes(folder: Path) -> None:
    "Boxes that people drew in one picture, in three layouts."
    from PIL import Image

    Image.new("RGB", (64, 48)).save(folder / "a.png")
    for place in ("voc", "yolo", "named", "coco"):
        (folder / place).mkdir()
    ends = "<xmin>5</xmin><ymin>6</ymin><xmax>30</xmax><ymax>40</ymax>"
    thing = f"<object><name>cell</name><bndbox>{ends}</bndbox></object>"
    (folder / "voc" / "a.xml").write_text(f"<annotation><filename>a.png</filename>{2 * thing}</annotation>")
    for place in ("yolo", "named"):
        (folder / place / "a.txt").write_text("0 0.5 0.5 0.2 0.3\n1 0.25 0.5 0.1 0.1\n")
    (folder / "yolo" / "classes.txt").write_text("cell\ndirt\n")
    (folder / "named" / "data.yaml").write_text("names: [cell, dirt]\n")
    thing = {"image_id": 1, "category_id": 2, "bbox": [4, 5, 20, 30]}
    images, classes = [{"id": 1, "file_name": "a.png"}], [{"id": 2, "name": "cell"}]
    coco = {"images": images, "categories": classes, "annotations": [thing, thing]}
    (folder / "coco" / "a.json").write_text(json.dumps(coco))


def make_detector(folder: Path) -> None:
    "The bundled detector as a checkpoint of Ultralytics."
    from facesr.detection import bundled_detector

    bundled_detector().yolo.save(folder / "mine.pt")


# Readers


def read_one_image(case: "Case") -> Any:
    from facesr.images import read_image

    found = read_image(case.victim)
    assert found.mode == "RGB" and found.width * found.height > 0
    return found


def read_faces(case: "Case") -> Any:
    from facesr.faces import read_pixels

    return read_pixels(case.folder, [case.victim.name]).levels[128]


def read_table(case: "Case") -> Any:
    from facesr import faces, heatmaps, store

    readers = {
        "list_eval_partition": faces.read_partition, "identity_CelebA": faces.read_people,
        "list_attr_celeba": faces.read_attributes, "parts": heatmaps.read_parts, "names": store.read_names,
    }
    return readers[case.victim.stem](case.victim)


def read_store(case: "Case") -> Any:
    "All that is asked of a store; a map that comes out of damaged bytes has to be the map that went in."
    import torch

    from facesr.faces import read_pixels
    from facesr.store import HeatmapStore, coverage, mean_map

    names = NAMES[:6]
    with contextlib.ExitStack() as stack:
        found = HeatmapStore(case.victim)
        stack.callback(found._file.close)
        found.check(names, read_pixels(case.folder / "images", names).levels[128])
        maps = found.maps(names)
        coverage(found), mean_map(found, names), found.empty, found.counts, found.fingerprint
        whole = HeatmapStore(case.valid / "store.h5")
        stack.callback(whole._file.close)
        if case.damage is damage_bytes and not torch.equal(maps, whole.maps(names)):
            raise AssertionError("the maps are others than those that were stored")
    return maps


def read_shards(case: "Case") -> Any:
    from facesr.store import make_heatmaps

    images = case.folder / "images"
    made = make_heatmaps(case.folder / "store.h5", images, NAMES[:6], FixedBoxes(), _recipe(), report=print)
    made._file.close()
    return sorted(made.names)


def read_published(case: "Case") -> Any:
    from facesr.store import import_published

    store = import_published(str(case.victim), case.folder / "imported.h5", NAMES[:6], report=print)
    maps = store.maps(NAMES[:6])
    store._file.close()
    return maps


def read_model(case: "Case") -> Any:
    from facesr.model import load_model

    return load_model(case.victim).settings


def read_arrays(case: "Case") -> Any:
    from facesr.perceptual import unpickle_arrays

    return unpickle_arrays(case.victim.read_bytes())


def read_weights(case: "Case") -> Any:
    "Whatever differs in a byte is refused."
    from facesr import perceptual

    if case.victim.read_bytes() != (case.valid / case.victim.name).read_bytes():
        perceptual.read_weights(case.victim)
        raise AssertionError("weights that nobody has published were read")


_TRAINERS: list = []


def _trainer():
    "A run that has begun; made once a process."
    if not _TRAINERS:
        from facesr.faces import BUNDLED, FaceDataset
        from facesr.study import resolve
        from facesr.training import Trainer

        faces = {"train_faces": 4, "val_faces": 2, "test_faces": 2, "batch_size": 2}
        config = resolve(preset="smoke", perceptual_weight=0, width=8, blocks=1, **faces)
        trainer = Trainer(config, BUNDLED, tempfile.mkdtemp(dir=_scratch()), report=lambda line: None)
        batch = FaceDataset(trainer.pixels["train"]).batch(next(iter(trainer.batches)))
        trainer.loop.step(batch.to(trainer.accelerator.device), 0)
        trainer.save()
        _TRAINERS.append(trainer)
    return _TRAINERS[0]


def read_checkpoint(case: "Case") -> Any:
    "A run goes on from it, and what it goes on with is a run."
    import torch

    from facesr.training import resume

    trainer = _trainer()
    shutil.copy(case.victim, trainer.folder / "checkpoint" / "state.pt")
    try:
        resume(trainer)
        weights = [*trainer.loop.network.parameters(), *trainer.loop.average.module.parameters()]
        assert all(weight.isfinite().all() for weight in weights), "weights that are no numbers are trained on"
        assert 0 <= trainer.loop.steps <= trainer.total_steps, f"step {trainer.loop.steps} of {trainer.total_steps}"
        assert len(trainer.progress.history) <= trainer.config.epochs
        return torch.cat([weight.flatten() for weight in weights])
    finally:
        shutil.copy(case.valid / "checkpoint" / "state.pt", trainer.folder / "checkpoint" / "state.pt")
        resume(trainer)


def read_runs(case: "Case") -> Any:
    from facesr.runs import find_runs, is_complete, read_shown, trained_with
    from facesr.study import resolve

    runs = find_runs(case.folder / "results", "smoke")
    for run in runs:
        read_shown(run.folder)
        with contextlib.suppress(ValueError):  # other settings than these: that is an answer
            is_complete(run.folder, resolve("baseline", "smoke"), ROOT)
    return trained_with(runs)


def read_report(case: "Case") -> Any:
    "What the report reads of runs."
    from facesr.reporting import average_seeds, check_comparable, read_histories, read_pictures, read_tables, run_table
    from facesr.runs import find_runs

    runs = find_runs(case.folder / "results", "smoke")
    check_comparable(runs)
    run_table(runs), read_pictures(runs), read_histories(runs)
    return average_seeds(read_tables(runs))


def read_boxes(case: "Case") -> Any:
    import pandas as pd

    from facesr.detection import Annotations
    from facesr.faces import FaceSet

    place = case.victim if case.victim.suffix == ".json" else case.victim.parent
    pictures = FaceSet(case.folder, pd.DataFrame({"name": ["a.png"]}), "folder", "for the test")
    found = Annotations(place, pictures)(None, ["a.png"])[0]
    assert len(found.boxes) == len(found.classes) and ((found.boxes >= 0) & (found.boxes <= 128)).all()
    return found.boxes


def read_detector(case: "Case") -> Any:
    import torch

    from facesr.detection import checkpoint_detector

    return checkpoint_detector(case.victim, size=128)(torch.zeros(1, 3, 128, 128, dtype=torch.uint8))


@dataclass(frozen=True)
class Reader:
    "How the cases of a kind are made and judged."

    make: Callable[[Path], None]              # valid files in a folder
    read: Callable[["Case"], Any]             # of the damaged ones
    victims: tuple[str, ...]                  # patterns of the files that are damaged
    damages: tuple[Callable, ...]             # ways to do so
    named: bool = True                        # a sentence says which file is meant; otherwise its caller does
    seconds: float = 10                       # of computing
    megabytes: int = 400                      # more than before
    share: float = 1.0                        # of the cases, compared with other kinds
    warm: Callable[[], Any] = tuple           # what takes long the first time, and is not counted
    allowed: tuple = (ValueError, OSError)


JSON_AND_BYTES = (damage_json, damage_json, damage_bytes)
READERS = {
    "image": Reader(make_images, read_one_image, ("*.*",), (damage_bytes, damage_png), named=False, megabytes=1500),
    "faces": Reader(make_images, read_faces, ("*.*",), (damage_bytes, damage_png), megabytes=1500, share=0.3),
    "table": Reader(make_tables, read_table, ("*.csv", "*.txt"), (damage_table, damage_table, damage_bytes), share=2),
    "store": Reader(make_store, read_store, ("store.h5",), (damage_bytes, damage_hdf5)),
    "shards": Reader(
        make_shards, read_shards, ("store.h5", "store.h5.parts/*.h5"), (damage_bytes, damage_hdf5), share=0.5
    ),
    "published": Reader(make_published, read_published, ("published.h5",), (damage_bytes, damage_hdf5)),
    "model": Reader(make_weights, read_model, ("*.safetensors",), (damage_bytes, damage_safetensors)),
    "arrays": Reader(make_arrays, read_arrays, ("*.ckpt",), (damage_bytes,), named=False),
    "weights": Reader(make_arrays, read_weights, ("*.ckpt",), (damage_bytes,), share=0.1),
    "checkpoint": Reader(
        make_checkpoint, read_checkpoint, ("checkpoint/state.pt",), (damage_bytes, damage_checkpoint), warm=_trainer
    ),
    "runs": Reader(make_run, read_runs, ("**/*.json", "**/*.json", "**/*.webp"), JSON_AND_BYTES),
    "report": Reader(make_run, read_report, ("**/*.csv", "**/*.json"), JSON_AND_BYTES, share=0.5),
    "boxes": Reader(make_boxes, read_boxes, ("*/a.*", "*/*.txt", "*/*.yaml"), JSON_AND_BYTES, share=0.3),
    "detector": Reader(
        make_detector, read_detector, ("*.pt",), (damage_bytes, damage_zip), seconds=60, megabytes=1500, share=0.02
    ),
}
IMPORTS = ("facesr.cli", "facesr.training", "facesr.reporting")  # before anything is measured
SUFFIXES = {damage_json: ".json", damage_table: ".csv .txt", damage_hdf5: ".h5", damage_zip: ".pt"}


# One case


@dataclass
class Case:
    "A folder with valid files, one of which is damaged."

    folder: Path
    valid: Path                      # the folder they are copied from
    victim: Path = field(init=False)
    damage: Callable = field(init=False)


def _scratch() -> Path:
    "The folder of this process's files; who started it removes it."
    if "FACESR_FUZZ" not in os.environ:
        os.environ["FACESR_FUZZ"] = tempfile.mkdtemp(prefix="facesr-fuzz-")
    return Path(os.environ["FACESR_FUZZ"])


def valid_files(kind: str, readers: dict[str, Reader]) -> Path:
    "The folder with the valid files of a kind; made once."
    folder = _scratch() / "valid" / kind
    if not folder.exists():
        part = Path(tempfile.mkdtemp(dir=_scratch()))
        with contextlib.redirect_stdout(io.StringIO()):
            readers[kind].make(part)
        folder.parent.mkdir(exist_ok=True)
        part.rename(folder)
    return folder


def prepared(kind: str, seed: int, readers: dict[str, Reader]) -> Case:
    "The files of a case."
    reader, rng = readers[kind], random.Random(f"{kind}/{seed}")
    valid = valid_files(kind, readers)
    case = Case(_scratch() / f"{kind}-{seed}", valid)
    shutil.rmtree(case.folder, ignore_errors=True)
    shutil.copytree(valid, case.folder)
    pattern = rng.choice(reader.victims)
    found = sorted(path for path in case.folder.glob(pattern) if path.is_file())
    case.victim = found[0] if seed == WHOLE else rng.choice(found)
    fitting = [one for one in reader.damages if case.victim.suffix in SUFFIXES.get(one, case.victim.suffix)]
    if case.victim.suffix == ".csv" and damage_table not in fitting:
        fitting += [damage_table] * 2
    case.damage = rng.choice(fitting)
    if seed != WHOLE:
        with contextlib.suppress(Exception):  # what is damaged already may not take more of it
            case.damage(rng, case.victim)
    return case


def _peak(reset: bool = False) -> int:
    "The most memory that this process had since the last reset, in MB (Linux; elsewhere 0)."
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) // 1024
    except (OSError, TypeError):
        return 0


def _raised_in(error: BaseException) -> str:
    "The last place in the package that an exception came through."
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if "facesr" in Path(frame.filename).parts] or frames
    return f"{Path(inside[-1].filename).stem}.{inside[-1].name}"


def judge(error: BaseException | None, case: Case, reader: Reader) -> tuple[str, str]:
    "clean, sentence or what is wrong, and the text that goes with it."
    if error is None:
        return "clean", ""
    text = str(error)
    if not isinstance(error, reader.allowed):
        return f"{type(error).__name__} in {_raised_in(error)}", text
    if len(text.split()) < 3:
        return f"no sentence ({type(error).__name__}) in {_raised_in(error)}", text
    if "\n" in text.strip():
        return f"several lines ({type(error).__name__}) in {_raised_in(error)}", text
    names = {*case.victim.relative_to(case.folder).parts} - {"results", "smoke"}  # the file, or a folder it is in
    if reader.named and not any(name in text for name in names):
        return f"names no file ({type(error).__name__}) in {_raised_in(error)}", text
    return "sentence", text


def run_case(kind: str, seed: int, readers: dict[str, Reader], show: bool = False) -> dict[str, Any]:
    "Make a case, read it, judge what came."
    reader, case = readers[kind], prepared(kind, seed, readers)
    reader.warm()
    before, started, error = _peak(reset=True), time.process_time(), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader.read(case)
        except BaseException as found:
            error = found
            if show:
                traceback.print_exc()
    seconds, megabytes = time.process_time() - started, _peak() - before
    verdict, text = judge(error, case, reader)
    error = None
    if verdict in ("clean", "sentence") and seconds > reader.seconds:
        verdict, text = "slow", f"{seconds:.0f} s of computing, allowed are {reader.seconds}. {text}"
    if verdict in ("clean", "sentence") and megabytes > reader.megabytes:
        verdict, text = "hungry", f"{megabytes} MB more than before, allowed are {reader.megabytes}. {text}"
    what = f"{case.damage.__name__} of {case.victim.relative_to(case.folder)}"
    if not show:
        shutil.rmtree(case.folder, ignore_errors=True)
    return {"kind": kind, "seed": seed, "verdict": verdict, "damage": what, "text": text[:600]}


def _bound() -> None:
    "No case takes all memory or fills the disk."
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, resource.RLIM_INFINITY))


def serve(readers: dict[str, Reader], imports: tuple[str, ...]) -> None:
    "Do the cases that come in, a line each, and answer with a line each. What the readers print goes elsewhere."
    faulthandler.enable()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name in imports:
        importlib.import_module(name)
    answers.write("ready\n")
    bounded = False
    for line in sys.stdin:
        kind, seed = line.split()
        valid_files(kind, readers)
        if not bounded:
            _bound()
            bounded = True
        answers.write(json.dumps(run_case(kind, int(seed), readers)) + "\n")


# Many cases


class Process:
    "The process that does the cases; a new one after a crash or a standstill."

    def __init__(self, module: str = "fuzz", standstill: float = STANDSTILL):
        self.module, self.standstill, self.child = module, standstill, None
        self.folder = Path(tempfile.mkdtemp(prefix="facesr-fuzz-"))

    def start(self) -> None:
        code = f"import {self.module} as m, fuzz; fuzz.serve(m.READERS, m.IMPORTS)"
        paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        environment = {name: value for name, value in os.environ.items() if name != "FACESR_CELEBA"}
        environment |= {"OMP_NUM_THREADS": "1", "FACESR_FUZZ": str(self.folder), "PYTHONPATH": os.pathsep.join(paths)}
        self.log = open(self.folder / "log", "wb")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.child = subprocess.Popen([sys.executable, "-c", code], cwd=self.folder, env=environment, **pipes)
        if self.child.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the readers cannot be loaded: {(self.folder / 'log').read_text()}")

    def __call__(self, kind: str, seed: int) -> dict[str, Any]:
        "What became of a case."
        if self.child is None:
            self.start()
        self.child.stdin.write(f"{kind} {seed}\n".encode())
        self.child.stdin.flush()
        answered, _, _ = select.select([self.child.stdout], [], [], self.standstill)
        if answered and (line := self.child.stdout.readline()):
            return json.loads(line)
        return self.ended(kind, seed, answered)

    def ended(self, kind: str, seed: int, crashed: bool) -> dict[str, Any]:
        "The finding of a process that crashed or stood still."
        if not crashed:
            self.child.kill()
        code = self.child.wait()
        verdict = f"crash ({code})" if crashed else f"no answer in {self.standstill:.0f} s"
        self.stop()
        said = (self.folder / "log").read_text(errors="replace")[-600:]
        return {"kind": kind, "seed": seed, "verdict": verdict, "damage": "", "text": said}

    def stop(self) -> None:
        if self.child:
            self.child.stdin.close()
            self.child.stdout.close()
            self.child.kill()
            self.child.wait()
            self.log.close()
            self.child = None

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def schedule(kinds: list[str], seed: int) -> Iterator[tuple[str, int]]:
    "Cases without end: kinds by their share, numbers on from the seed."
    rng, number = random.Random(seed), dict.fromkeys(kinds, seed * 1_000_000)
    while True:
        kind = rng.choices(kinds, [READERS[kind].share for kind in kinds])[0]
        yield kind, number[kind]
        number[kind] += 1


def summary(counts: dict[str, dict[str, int]], first: dict[tuple[str, str], dict[str, Any]]) -> str:
    "A line a kind, then a line a finding with a case that shows it."
    lines = [f"{'kind':12}{'clean':>8}{'sentence':>10}{'finding':>9}"]
    for kind, found in sorted(counts.items()):
        good = found.get("clean", 0), found.get("sentence", 0)
        lines.append(f"{kind:12}{good[0]:>8}{good[1]:>10}{sum(found.values()) - sum(good):>9}")
    for (kind, verdict), one in sorted(first.items()):
        text = " ".join(one["text"].split())[:150]
        lines.append(f"--case {kind} {one['seed']}  ({counts[kind][verdict]}x) {verdict}: {one['damage']}: {text}")
    return "\n".join(lines)


def fuzz(minutes: float, seed: int, kinds: list[str], out: Path) -> bool:
    "Cases for so many minutes; findings are written as they come. Whether there was none."
    counts, first, end = {kind: {} for kind in kinds}, {}, time.monotonic() + 60 * minutes
    with Process() as process, open(out, "w") as file, contextlib.suppress(KeyboardInterrupt):
        for kind, number in schedule(kinds, seed):
            if time.monotonic() > end:
                break
            found = process(kind, number)
            verdict = found["verdict"]
            counts[kind][verdict] = counts[kind].get(verdict, 0) + 1
            if verdict not in ("clean", "sentence"):
                file.write(json.dumps(found) + "\n")
                file.flush()
                if (kind, verdict) not in first:
                    first[kind, verdict] = found
                    print(f"--case {kind} {number}: {verdict}: {' '.join(found['text'].split())[:150]}", flush=True)
    print(summary(counts, first))
    return not first


def one_case(kind: str, seed: int) -> None:
    "A case again, here, with its traceback; its files stay."
    faulthandler.enable()
    for name in IMPORTS:
        importlib.import_module(name)
    valid_files(kind, READERS)
    _bound()
    print(json.dumps(run_case(kind, seed, READERS, show=True), indent=1, ensure_ascii=True))
    print(f"its files: {_scratch() / f'{kind}-{seed}'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(READERS), help="of " + ", ".join(READERS))
    parser.add_argument("--case", nargs=2, metavar=("KIND", "SEED"), help="one case again")
    parser.add_argument("--out", type=Path, default=Path("fuzz.jsonl"), help="findings, a line each")
    told = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    if told.case:
        one_case(told.case[0], int(told.case[1]))
    else:
        sys.exit(0 if fuzz(told.minutes, told.seed, told.kinds.split(","), told.out) else 1)


if __name__ == "__main__":
    main()
