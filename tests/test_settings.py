"Every setting of a run is felt, and what a step, an epoch and a file promise is kept: each was taken away once."

import copy
import json
import os

import fuzz
import pytest
import torch

from facesr.degradation import to_uint8
from facesr.faces import BUNDLED, FaceDataset, find_faces
from facesr.heatmaps import Part, Recipe
from facesr.loop import device_of
from facesr.metrics import predict, psnr
from facesr.model import model_bytes, SuperResolutionUNet
from facesr.runs import write_atomically
from facesr.store import make_heatmaps
from facesr.study import Config, resolve
from facesr.training import fit, train, Trainer

SMALL = {"train_faces": 8, "val_faces": 2, "test_faces": 2, "batch_size": 4, "width": 8, "epochs": 1}
SMALL |= {"warmup_steps": 0, "perceptual_weight": 0}
ATTENTIVE = {"variant": "heatmap", "attention_map": "uniform", "attention_weight": 2.0}


def begun(out, data=BUNDLED, **settings):
    "A run that is about to take its first step."
    return Trainer(resolve(preset="smoke", **SMALL | settings), data, out, report=lambda line: None)


def weights(module):
    return torch.cat([weight.detach().flatten() for weight in module.parameters()])


def stepped(trainer, steps=2):
    "The weights, and their averages, after some steps."
    dataset = FaceDataset(trainer.pixels["train"], trainer.maps)
    keys = list(trainer.batches)[:steps]
    list(trainer.loop.epoch(map(dataset.batch, keys), trainer.total_steps))
    return torch.cat([weights(trainer.loop.network), weights(trainer.loop.average.module)])


FELT = [  # what is changed, and where from
    ({"seed": 1}, {}), ({"degradation": "area"}, {}), ({"flips": False}, {}), ({"width": 16}, {}), ({"blocks": 2}, {}),
    ({"conv": "standard", "blocks": 1}, {}), ({"filtered": False}, {}), ({"train_faces": 12}, {}),
    ({"batch_size": 2}, {}), ({"epochs": 2}, {}),
    ({"pixel_weight": 0.5}, ATTENTIVE), ({"attention_weight": 1.0}, ATTENTIVE), ({"attention_map": "edges"}, ATTENTIVE),
    ({"supervision": "multiscale"}, ATTENTIVE), ({"supervision": "deep"}, ATTENTIVE), ({"learning_rate": 1e-3}, {}),
    ({"weight_decay": 0.1}, {}), ({"warmup_steps": 7}, {}), ({"ema_decay": 0.5}, {}),
    ({"perceptual_weight": 0.01}, {}),
    ({"perceptual_crop": 32}, {"perceptual_weight": 0.01}), ({"perceptual_share": 1.0}, {"perceptual_weight": 0.01}),
    ({"multiscale_targets": "pyramid"}, ATTENTIVE | {"supervision": "multiscale"}),
    ({"heads": "1x1"}, ATTENTIVE | {"supervision": "deep"}),
]
ELSEWHERE = {  # a change of them is noticed in other tests; a process has one precision
    "variant", "preset", "needs_celeba", "val_faces", "test_faces", "skip_unreadable", "heatmaps", "checkpoint_minutes",
    "mixed_precision", "initial",
    # the published recipe: here below, and where 13_loop and 15_training define what they do
    "perceptual_weights", "perceptual_clamp", "lpips_weight", "progress_by", "schedule", "kept_by", "patience",
}
_PLAIN = {}


@pytest.mark.parametrize("changed, start", FELT, ids=lambda settings: ",".join(settings) or "-")
def test_a_setting_is_felt(tmp_path_factory, changed, start):
    out = tmp_path_factory.mktemp("out")
    key = tuple(start.items())
    if key not in _PLAIN:
        _PLAIN[key] = stepped(begun(out / "plain", **start))
    other = stepped(begun(out / "other", **start | changed))
    assert other.shape != _PLAIN[key].shape or not torch.equal(other, _PLAIN[key])


def test_settings_of_the_published_recipe_reach_the_objective(tmp_path):
    trainer = begun(tmp_path, perceptual_weight=0.01, perceptual_clamp=True, lpips_weight=0.5)
    objective = trainer.loop.objective
    assert (objective.full["lpips"], objective.perceptual_loss.clamp, objective.lpips is None) == (0.5, True, False)
    other = begun(tmp_path / "other", perceptual_weight=0.01).loop.objective
    assert (other.full["lpips"], other.perceptual_loss.clamp, other.lpips) == (0, False, None)


def test_no_setting_is_left_out():
    assert {name for changed, _ in FELT for name in changed} | ELSEWHERE == set(Config.model_fields)


def test_a_seed_decides_weights_order_and_crops_each(tmp_path):
    one, other = (begun(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert not torch.equal(weights(one.loop.network), weights(other.loop.network))
    assert list(one.batches) != list(other.batches)
    assert (one.loop.objective.seed, other.loop.objective.seed) == (0, 1)


def test_a_run_begins_with_the_weights_that_are_named_and_goes_on_with_no_others(tmp_path):
    first, other = (SuperResolutionUNet(width=8, blocks=1) for _ in range(2))
    (file := tmp_path / "first.safetensors").write_bytes(model_bytes(first))
    trainer = begun(tmp_path, initial=str(file))
    assert torch.equal(weights(trainer.loop.network), weights(first))
    assert torch.equal(weights(trainer.loop.average.module), weights(first))
    trainer.save()
    trainer.free()
    begun(tmp_path, initial=str(file)).free()
    file.write_bytes(model_bytes(other))
    with pytest.raises(ValueError, match="other settings .*initial weights"):
        begun(tmp_path, initial=str(file))


def test_a_complete_run_is_known_by_the_weights_it_began_with(tmp_path):
    (file := tmp_path / "first.safetensors").write_bytes(model_bytes(SuperResolutionUNet(width=8, blocks=1)))
    config = resolve(preset="smoke", **SMALL, initial=str(file))
    folder = train(config, BUNDLED, tmp_path, report=str)
    assert json.loads((folder / "config.json").read_text())["initial weights"]
    file.write_bytes(model_bytes(SuperResolutionUNet(width=8, blocks=1)))
    for again in (train, Trainer):
        with pytest.raises(ValueError, match="complete run with other settings .*initial weights"):
            again(config, BUNDLED, tmp_path, report=str)
    file.unlink()  # no longer needed
    assert train(config, BUNDLED, tmp_path, report=str) == folder
    assert Trainer(config, BUNDLED, tmp_path, report=str).complete


def test_a_step_follows_its_own_gradient_and_the_average_follows_the_step(tmp_path):
    trainer = begun(tmp_path)
    dataset, (first, second) = FaceDataset(trainer.pixels["train"]), trainer.batches
    loop, start = trainer.loop, weights(trainer.loop.network)
    loop.step(dataset.batch(first), 0)
    assert not torch.equal(weights(loop.network), start)
    assert torch.equal(weights(loop.network), weights(loop.average.module))  # the first average is what it was moved to
    alone, batch = copy.deepcopy(loop.network), dataset.batch(second).to(device_of(loop.accelerator))
    loop.objective(alone(batch.lr), batch, loop.objective.numbers(loop.steps, 0.5)).total.backward()
    loop.step(batch, 0.5)
    for expected, found in zip(alone.parameters(), loop.network.parameters()):
        torch.testing.assert_close(found.grad, expected.grad)  # nothing is left of the first batch


def test_averaged_weights_are_scored_and_kept(tmp_path):
    trainer = begun(tmp_path, ema_decay=0.9)
    fit(trainer)
    average, network = trainer.loop.average.module.eval(), trainer.loop.network.eval()
    device = device_of(trainer.accelerator)
    kept = trainer.progress.best_weights
    assert all(torch.equal(kept[name], weight) for name, weight in average.state_dict().items())
    assert not all(torch.equal(kept[name], weight) for name, weight in network.state_dict().items())
    made = [predict(model, trainer.pixels["val"], device) for model in (average, network)]
    scores = [float(torch.cat([psnr(to_uint8(sr), hr) for _, sr, hr, _ in batches]).mean()) for batches in made]
    assert trainer.progress.history[0]["val_psnr"] == pytest.approx(scores[0], abs=1e-3)
    assert scores[0] != pytest.approx(scores[1], abs=1e-2)


def test_training_refuses_heatmaps_of_other_photographs(tmp_path):
    "Of the same names: the training looks at the pixels that the maps were made from."
    faces = find_faces(BUNDLED)
    names = faces.names("train", 12)
    (tmp_path / "data").mkdir()
    for name in names:
        (tmp_path / "data" / name).write_bytes((faces.images / name).read_bytes())
    store, recipe = tmp_path / "store.h5", Recipe({"eye": Part(4.5)})
    make_heatmaps(store, tmp_path / "data", names, fuzz.FixedBoxes(), recipe, report=lambda line: None)
    settings = {"variant": "heatmap", "heatmaps": str(store), "batch_size": 2, "val_faces": 1, "test_faces": 1}
    trained = begun(tmp_path / "out", tmp_path / "data", **settings).pixels["train"].names
    (tmp_path / "data" / trained[3]).write_bytes((faces.images / faces.names("test", 1)[0]).read_bytes())
    with pytest.raises(ValueError, match=f"was made for other images: 1 of 8 faces .*{trained[3]}"):
        begun(tmp_path / "again", tmp_path / "data", **settings)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch, step):
    "Content reaches the disk before the name does."
    path = tmp_path / "config.json"
    write_atomically(path, "old")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="config.json cannot be written: No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["config.json"]
