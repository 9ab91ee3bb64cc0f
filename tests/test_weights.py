"The weights in the package: how they were chosen, what their card says, and that half precision is enough."

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from facesr.degradation import to_float, to_uint8
from facesr.faces import find_faces, read_pixels
from facesr.metrics import METRICS, psnr
from facesr.model import load_model, model_bytes
from facesr.runs import read_run, read_table
from facesr.statistics import summarise
from facesr.upscale import bundled_dial, ENDS, expected_error, FIDELITY, pretrained, Upscaler, WEIGHTS

FAITHFUL_PSNR, SHARP_LPIPS, SHARP_PSNR = 26.05, 0.150, 25.2  # what the ends have to reach on CelebA's test faces
LOSS = 0.25  # dB of PSNR that the default may cost
LARGEST, TABLES = 6_500_000, 700_000  # bytes: of a file of weights, of all tables
HOME = ROOT / "results" / "weights"
SUMMARY = json.loads((HOME / "summary.json").read_text())
SETTINGS = {"sharp": 0.0, "default": FIDELITY, "faithful": 1.0}
MADE = SUMMARY["ends"] | {"photographs": SUMMARY["photographs"]}  # name in the package: its run
STOPS = sorted({0.0, 0.25, 0.5, 0.75, 1.0, FIDELITY})


def record(path):
    "What is kept of a run: the study's in results/celeba, others beside the tables."
    return read_run((ROOT / "results" if path.startswith("celeba/") else HOME / "runs") / path)


def table(name):
    return read_table(HOME, f"{name}.csv")


def on_test(setting):
    return table(f"dial_{SETTINGS[setting]:.2f}")


# How they were chosen


def test_the_faithful_end_has_the_highest_validation_psnr():
    found = {path: round(record(path).metrics["validation"]["val_psnr"], 2) for path in SUMMARY["candidates"].values()}
    assert len(found) >= 2 and SUMMARY["ends"]["faithful"] == max(found, key=found.get)  # the first of those that tie


def test_the_sharp_end_began_with_the_weights_of_the_faithful_one():
    sharp, faithful = (record(SUMMARY["ends"][end]) for end in ENDS)
    assert sharp.initial == faithful.metrics["weights_sha256"]
    assert sharp.config["initial"] == f"results/mine/{SUMMARY['ends']['faithful']}/model.safetensors"


def test_the_default_is_the_smallest_fidelity_that_costs_little():
    stops = pd.read_csv(HOME / "validation.csv")
    assert stops["fidelity"].tolist() == pytest.approx([stop / 10 for stop in range(11)])
    cheap = stops["fidelity"][stops["psnr"] >= stops["psnr"].iloc[-1] - LOSS]
    assert FIDELITY == SUMMARY["fidelity"] == pytest.approx(cheap.min())


def test_the_ends_reach_what_they_are_for():
    faithful, sharp = on_test("faithful"), on_test("sharp")
    assert faithful["psnr"].mean() >= FAITHFUL_PSNR
    assert sharp["lpips_alex"].mean() <= SHARP_LPIPS and sharp["psnr"].mean() >= SHARP_PSNR


# What ships


def test_all_that_ships_is_told_of():
    card = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    assert sorted(MADE) == pretrained() and all(f"`{name}.safetensors`" in card for name in MADE)


def test_the_network_for_photographs_takes_faces_of_32_pixels():
    settings = load_model(WEIGHTS / "photographs.safetensors").settings
    assert settings == {"conv": "separable", "width": 56, "blocks": 3, "filtered": True, "lr_size": 32}
    run = record(SUMMARY["photographs"])
    assert run.config["preset"] == "photographs" and run.metrics["best_epoch"] == run.config["epochs"]


@pytest.mark.parametrize("end", ENDS)
def test_what_ships_is_small_and_of_one_kind(end):
    assert (WEIGHTS / f"{end}.safetensors").stat().st_size <= LARGEST
    settings = {"conv": "separable", "width": 80, "blocks": 3, "filtered": True}
    assert load_model(WEIGHTS / f"{end}.safetensors").settings == settings


@pytest.mark.parametrize("end", MADE)
def test_what_ships_is_the_run_rounded(end):
    "To the bit, where the run is on this machine."
    trained = ROOT / "results" / "mine" / MADE[end] / "model.safetensors"
    if not trained.exists():
        pytest.skip(f"{MADE[end]} was not made here")
    assert model_bytes(load_model(trained).half()) == (WEIGHTS / f"{end}.safetensors").read_bytes()


@pytest.mark.parametrize("end", ENDS)
def test_half_precision_moves_no_printed_digit(end):
    shipped, run = on_test(end), record(SUMMARY["ends"][end]).metrics["test"]
    both = [metric for metric in run if metric in shipped]
    assert {"psnr", "ssim", "ms_ssim", "lpips_alex", "consistency"} <= set(both)
    for metric in both:
        most = 0.01 if METRICS[metric].unit == "dB" else 0.001
        assert shipped[metric].mean() == pytest.approx(run[metric]["mean"], abs=most), metric


# What their tables and their card say


def test_the_tables_are_small():
    assert sum(file.stat().st_size for file in HOME.rglob("*") if file.is_file()) <= TABLES


@pytest.mark.parametrize("stop", STOPS)
def test_every_stop_was_measured_on_all_test_faces(stop):
    found = table(f"dial_{stop:.2f}")
    assert len(found) == found["name"].nunique() == 2500 and found["person"].nunique() == 500


def test_the_dial_is_that_of_the_tables():
    points = pd.read_csv(HOME / "dial.csv")
    bicubic = json.loads((ROOT / "results" / "celeba" / "interpolation" / "bicubic.json").read_text())["test"]
    beside = {name: record(path).metrics["test"] for name, path in SUMMARY["candidates"].items()}
    for conv in ("separable", "standard"):
        beside[f"{conv}, 3 passes"] = record(f"three/{conv}/celeba/uniform/seed0").metrics["test"]
    known = {"bicubic": bicubic} | beside
    dial = points[points["name"] == "dial"]
    assert dial["fidelity"].tolist() == pytest.approx(STOPS)
    assert {"bicubic", "baseline", "heatmap", "multiscale", "deep"} <= set(points["name"])
    for _, point in points.iterrows():
        on_dial = point["name"] == "dial"
        measured = summarise(table(f"dial_{point.fidelity:.2f}")) if on_dial else known[point["name"]]
        for metric in ("psnr", "lpips_alex"):
            for column, key in ((metric, "mean"), (f"{metric}_low", "low"), (f"{metric}_high", "high")):
                assert point[column] == pytest.approx(measured[metric][key], rel=1e-5), point["name"]


def test_a_sharper_setting_costs_psnr():
    dial = pd.read_csv(HOME / "dial.csv").query("name == 'dial'")
    assert dial["psnr"].is_monotonic_increasing and dial["lpips_alex"].is_monotonic_increasing


ON_CARD = {
    "celeba": ("psnr", "ssim", "ms_ssim", "lpips_alex", "psnr_eye", "psnr_nose", "psnr_mouth", "consistency"),
    "identity": ("identity_cosine", "landmark_error"),
    "portraits": ("psnr", "ssim", "lpips_alex", "psnr_eye", "identity_cosine", "landmark_error"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_number_of_the_card_is_measured(setting):
    card, stop = (WEIGHTS / "README.md").read_text(), SETTINGS[setting]
    for part, prefix in (("celeba", "dial"), ("identity", "identity"), ("portraits", "portraits")):
        scores, measured = SUMMARY[part][setting], summarise(table(f"{prefix}_{stop:.2f}"))
        cells = []
        for metric in ON_CARD[part]:
            ends = [scores[metric][key] for key in ("mean", "low", "high")]
            assert ends == pytest.approx([measured[metric][key] for key in ("mean", "low", "high")], rel=1e-5)
            cells.append("{} ({} – {})".format(*(f"{end:.{METRICS[metric].decimals}f}" for end in ends)))
        assert f"| {setting} (fidelity {stop:g}) | {' | '.join(cells)} |" in card


def test_the_card_says_what_else_was_found():
    card, slices = (WEIGHTS / "README.md").read_text(), SUMMARY["attributes"]
    columns = [slices[f"PSNR, {name}"] for name in ("bicubic", *SETTINGS)]
    for label, count, *values in zip(slices["slice"], slices["faces"], *columns):
        assert f"| {label} | {count:,} | {' | '.join(f'{value:.2f}' for value in values)} |" in card
    likeness, tones = table(f"likeness_{FIDELITY:.2f}"), table(f"tones_{FIDELITY:.2f}").set_index("of")
    for label, found in SUMMARY["likeness"].items():
        assert f"{found['median']:.3f}" in card
        assert label not in likeness or found["median"] == pytest.approx(likeness[label].median(), rel=1e-5)
    for metric in ("psnr", "lpips_alex", "skin_error"):
        for third in ("darkest third", "middle third", "lightest third"):
            assert f"{tones.at[f'default, {metric}', third]:.{METRICS[metric].decimals}f} (" in card
    assert f"{SUMMARY['doubt']['doubt, 8x8 blocks']['found'] * 100:.0f} %" in card
    assert f"The default is fidelity {FIDELITY:g}" in card
    assert "not evidence of who someone is" in card


# Doubt


def test_more_doubt_is_more_error():
    curve = pd.read_csv(WEIGHTS / "doubt.csv")
    assert len(curve) >= 12 and (curve > 0).all(axis=None) and (curve < 1).all(axis=None)
    assert (curve.diff().iloc[1:] > 0).all(axis=None)


# Measured again, on faces of CelebA


def test_doubt_says_how_wrong_the_default_is(celeba):
    "On 100 test faces, which had no part in the curve, by their doubt in five groups."
    faces, upscaler = find_faces(celeba), Upscaler.from_pretrained()
    pixels = read_pixels(faces.images, faces.names("test", 100)).levels
    lr, hr = to_float(pixels[16]), to_float(pixels[128])
    doubt, error = upscaler.doubt(lr).numpy(), ((upscaler.upscale(lr) - hr).abs().mean(1) / 2).numpy()
    group = np.searchsorted(np.quantile(doubt, (0.2, 0.4, 0.6, 0.8)), doubt)
    for i in range(5):
        assert expected_error(doubt[group == i]).mean() == pytest.approx(error[group == i].mean(), rel=0.15)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_table_can_be_measured_again(setting, celeba):
    "The first 40 test faces, now."
    faces, kept = find_faces(celeba), on_test(setting).head(40)
    pixels = read_pixels(faces.images, kept["name"].tolist()).levels
    with torch.inference_mode():
        again = psnr(to_uint8(bundled_dial().network(SETTINGS[setting])(to_float(pixels[16]))), pixels[128])
    assert again.tolist() == pytest.approx(kept["psnr"].tolist(), abs=0.01)
