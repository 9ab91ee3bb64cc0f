"""Brings the results of the preset `celeba-cpu` to their present form; run once, on a checkout that still has their
weights, with FACESR_CELEBA naming CelebA: python results/migrate.py

The folder becomes results/celeba. The network `inverted` is called `separable`, the preset `celeba`, a person `person`.
Every run gets the SHA-256 of its weights and its pictures of the shown test faces; PNG becomes WebP or JPEG.
No measured number changes."""
import hashlib
import json
import subprocess
from pathlib import Path

import nbformat
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

from facesr.degradation import to_float, to_uint8
from facesr.faces import find_faces, read_pixels
from facesr.model import load_model
from facesr.runs import as_published, choose_shown, read_json, shown_picture, webp, write_atomically, write_json

ROOT = Path(__file__).parent.parent
NAMES = {"conv": {"inverted": "separable"}, "preset": {"celeba-cpu": "celeba"}}


def renamed(settings: dict) -> dict:
    return {name: NAMES.get(name, {}).get(value, value) if name in NAMES else value for name, value in settings.items()}


def rename_network(path: Path) -> None:
    "In the header of a file of weights; the weights stay."
    with safe_open(path, framework="pt") as file:
        settings = json.loads(file.metadata()["facesr"])
        weights = {name: file.get_tensor(name) for name in file.keys()}
    path.write_bytes(save(weights, metadata={"facesr": json.dumps(renamed(settings))}))


def rename_people(path: Path) -> None:
    "The header of a table; its rows stay as they are, to the byte."
    header, rows = path.read_text().split("\n", 1)
    assert header.startswith("name,identity,"), path
    path.write_text(header.replace("name,identity,", "name,person,") + "\n" + rows)


def main() -> None:
    old, home = ROOT / "results" / "celeba-cpu", ROOT / "results" / "celeba"
    subprocess.run(["git", "mv", str(old), str(home)], check=True)
    faces = find_faces()
    test = read_pixels(faces.images, faces.names("test", 2_500))
    shown = choose_shown(test.levels[16], test.levels[128])
    rows = [row for row, *_ in shown]
    about = [{"name": test.names[row], "why": why, "bicubic_psnr": round(score, 2)} for row, why, score in shown]
    for run in sorted(home.glob("*/seed*")):
        config = read_json(run / "config.json")
        assert config["faces"]["splits"]["test"]["sha256"] == test.fingerprint
        config |= {"config": renamed(config["config"]), "network": renamed(config["network"])}
        write_json(run / "config.json", config)
        rename_people(run / "per_image.csv")
        rename_network(run / "model.safetensors")
        lr, hr = test.levels[16][rows], test.levels[128][rows]
        with torch.inference_mode():
            sr = to_uint8(load_model(run / "model.safetensors")(to_float(lr)))
        write_atomically(run / "shown.webp", shown_picture(lr, sr, hr))
        digest = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
        metrics = renamed(read_json(run / "metrics.json")) | {"weights_sha256": digest, "shown": about}
        write_json(run / "metrics.json", metrics)
        write_atomically(run / "progress.webp", webp(Image.open(run / "progress.png").convert("RGB"), 85))
        (run / "progress.png").unlink()
        write_atomically(run / "train.ipynb", as_published(nbformat.read(run / "train.ipynb", 4)))
        print(run)
    for table in (home / "interpolation").glob("*.csv"):
        rename_people(table)
    for weights in (ROOT / "facesr" / "assets" / "weights").glob("*.safetensors"):
        rename_network(weights)


if __name__ == "__main__":
    main()
