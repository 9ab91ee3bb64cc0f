"What only a GPU can show; elsewhere these tests are skipped. A killed run is resumed by test_resume.py, on any device."

import pytest
import torch
from conftest import BUNDLED

from facesr.degradation import to_float
from facesr.detection import bundled_detector
from facesr.faces import EpochBatches, FaceDataset, find_faces, read_pixels
from facesr.heatmaps import BUNDLED_PARTS, Recipe
from facesr.loop import Captured, Loop, accelerator_for
from facesr.losses import attention_maps
from facesr.model import model_bytes
from facesr.store import make_heatmaps
from facesr.study import resolve
from facesr.upscale import Upscaler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module")
def dataset():
    faces = find_faces(BUNDLED)
    pixels = read_pixels(faces.images, faces.names("train", 64))
    return FaceDataset(pixels, attention_maps("edges", pixels, None, 0))


def trained(config, dataset, captured):
    "Sixteen steps, the last of them with LPIPS; the terms of each, and all weights."
    loop = Loop(config, accelerator_for(config))
    assert isinstance(loop.move, Captured)
    if not captured:
        loop.move.error = "asked for"  # the same places are read, and nothing is captured
    order = EpochBatches(64, 8, config.seed)
    batches = (dataset.batch(keys) for _ in range(2) for keys in order)
    terms = [{name: float(term) for name, term in loop.step(batch, i / 16).items()} for i, batch in enumerate(batches)]
    assert captured == (loop.move.graph is not None and not loop.move.error)
    return terms, [*loop.network.parameters(), *loop.average.parameters()]


@pytest.mark.parametrize("variant", ["baseline", "heatmap", "multiscale", "deep"])
def test_captured_and_plain_steps_agree_to_the_bit(variant, dataset):
    config = resolve(variant, "smoke", lpips_weight=0.1, perceptual_crop=48)
    on_card = dataset.to("cuda")
    (terms, weights), (same_terms, same_weights) = (trained(config, on_card, captured) for captured in (True, False))
    assert "lpips" in terms[-1] and "lpips" not in terms[0]
    assert terms == same_terms
    assert all(map(torch.equal, weights, same_weights))


def test_captured_steps_are_those_of_the_loop_without_a_graph(dataset):
    config, on_card = resolve("heatmap", "smoke", perceptual_crop=48), dataset.to("cuda")
    _, weights = trained(config, on_card, True)
    loop = Loop(config, accelerator_for(config))
    loop.move = loop.plain_move
    for i, keys in enumerate([*EpochBatches(64, 8, config.seed)] * 2):
        loop.step(on_card.batch(keys), i / 16)
    for one, other in zip(weights, [*loop.network.parameters(), *loop.average.parameters()]):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)  # the rate is a float32 in a graph


@pytest.mark.parametrize("kind", ["edges", "uniform"])
@pytest.mark.parametrize("kept", ["on the card", "in main memory"])
def test_batches_of_the_card_are_those_of_the_processor(dataset, kept, kind):
    dataset = FaceDataset(dataset.pixels, attention_maps(kind, dataset.pixels, None, 0))
    by_batch = FaceDataset(dataset.pixels, dataset.maps, torch.device("cuda"))
    on_card = dataset.to("cuda") if kept == "on the card" else by_batch
    for keys in EpochBatches(64, 16, seed=0):
        for here, there in zip(dataset.batch(keys).tensors(), on_card.batch(keys).tensors(), strict=True):
            assert there.is_cuda
            torch.testing.assert_close(there.cpu(), here, atol=5e-4, rtol=0)  # maps are kept in half precision


def test_heatmaps_of_the_card_are_close_to_those_of_the_processor(tmp_path):
    faces = find_faces(BUNDLED)
    names, maps = faces.names("test", 32), []
    for device in ("cpu", "cuda"):
        asked = faces.images, names, bundled_detector(device=device), Recipe(BUNDLED_PARTS)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            maps.append(make_heatmaps(tmp_path / f"{device}.h5", *asked, report=str).maps(names))
    assert (maps[0] - maps[1]).abs().mean() < 1e-3


def test_the_card_upscales_as_the_processor_does(dataset):
    small = to_float(dataset.pixels.levels[16][:16])
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        here, there = (Upscaler.from_pretrained(device=device).upscale(small) for device in ("cpu", "cuda"))
    assert (here - there).abs().max() <= 2.5 / 255  # [-1, 1]: a level of 255 is 2/255


def test_the_dial_turns_on_the_card(dataset):
    "Weights are mixed on the processor, so they are the same to the bit wherever the network is."
    small = to_float(dataset.pixels.levels[16][:16])
    here, there = (Upscaler.from_pretrained(device=device) for device in ("cpu", "cuda"))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for fidelity in (0, 0.3, 1):
            here.turn(fidelity)
            there.turn(fidelity)
            assert next(there.network.parameters()).is_cuda
            assert model_bytes(here.network) == model_bytes(there.network)
            assert (here.upscale(small) - there.upscale(small)).abs().max() <= 2.5 / 255
        assert (here.doubt(small) - there.doubt(small)).abs().max() <= 1.25 / 255
