"The weights in the package: what was chosen, what their card says, and that half precision is enough."

import json

import pandas as pd
import pytest
import torch
from conftest import ROOT

from facesr.degradation import to_float, to_uint8
from facesr.faces import find_faces, read_pixels
from facesr.metrics import METRICS, psnr
from facesr.model import load_model
from facesr.runs import find_runs
from facesr.study import VARIANTS
from facesr.upscale import DEFAULT_WEIGHTS, pretrained, WEIGHTS

SUMMARY = json.loads((ROOT / "results" / "weights" / "summary.json").read_text())


def run_of(name):
    return ROOT / "results" / "celeba" / name / "seed0"


def test_validation_chose_them():
    runs = {
        run.variant: run.metrics["validation"]
        for run in find_runs(ROOT / "results", "celeba")
        if run.seed == 0 and run.variant in VARIANTS
    }
    best = [
        max(runs, key=lambda v: round(runs[v]["val_psnr"], 2)),
        min(runs, key=lambda v: round(runs[v]["val_lpips_alex"], 3)),
    ]  # the simplest of those that tie
    assert (
        SUMMARY["chosen"] == list(dict.fromkeys(best))
        and sorted(SUMMARY["chosen"]) == pretrained()
        and DEFAULT_WEIGHTS == best[0]
    )


@pytest.mark.parametrize("name", pretrained())
def test_what_ships_is_the_run_rounded(name):
    "Face by face the weights in the package reach what the run has reached; half precision moves no printed digit."
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size <= 8_000_000
    settings = {"conv": "separable", "width": 80, "blocks": 3, "filtered": False}
    assert load_model(WEIGHTS / f"{name}.safetensors").settings == settings
    places = (ROOT / "results" / "weights" / f"{name}_celeba.csv", run_of(name) / "per_image.csv")
    shipped, run = (pd.read_csv(path).set_index("name")["psnr"] for path in places)
    assert (shipped - run).abs().max() < 0.05 and abs((shipped - run).mean()) < 0.001


@pytest.mark.parametrize("name", pretrained())
def test_every_number_of_the_card_is_measured(name):
    card = (WEIGHTS / "README.md").read_text()
    table = pd.read_csv(ROOT / "results" / "weights" / f"{name}_celeba.csv")
    assert len(table) == 2500 and table["person"].nunique() == 500
    for metric in ("psnr", "ssim", "lpips_alex", "psnr_eye"):
        mean = table[metric].mean()
        assert mean == pytest.approx(SUMMARY["celeba"][name][metric]["mean"], abs=1e-4)
    for scores, metrics in (
        (
            SUMMARY["celeba"][name],
            ("psnr", "ssim", "ms_ssim", "lpips_alex", "psnr_eye", "psnr_nose", "psnr_mouth", "consistency"),
        ),
        (SUMMARY["identity"][name], ("identity_cosine", "landmark_error")),
        (SUMMARY["portraits"][name], ("psnr", "ssim", "lpips_alex", "psnr_eye", "identity_cosine", "landmark_error")),
    ):
        row = " | ".join(
            "{} ({} – {})".format(*(f"{scores[m][key]:.{METRICS[m].decimals}f}" for key in ("mean", "low", "high")))
            for m in metrics
        )
        assert f"| {name} | {row} |" in card
    columns = SUMMARY["attributes"]
    for label, count, *values in zip(
        columns["slice"],
        columns["faces"],
        columns["PSNR, bicubic"],
        *(columns[f"PSNR, {chosen}"] for chosen in SUMMARY["chosen"]),
    ):
        assert f"| {label} | {count:,} | {' | '.join(f'{value:.2f}' for value in values)} |" in card
    for found in SUMMARY["likeness"].values():
        assert f"{found['median']:.3f}" in card
    assert "not evidence of who someone is" in card


@pytest.mark.parametrize("name", pretrained())
def test_the_table_can_be_measured_again(name, celeba):
    "The first 40 test faces, now."
    faces = find_faces(celeba)
    table = pd.read_csv(ROOT / "results" / "weights" / f"{name}_celeba.csv").head(40)
    pixels = read_pixels(faces.images, table["name"].tolist()).levels
    with torch.inference_mode():
        again = psnr(to_uint8(load_model(WEIGHTS / f"{name}.safetensors")(to_float(pixels[16]))), pixels[128])
    assert again.tolist() == pytest.approx(table["psnr"].tolist(), abs=0.01)
