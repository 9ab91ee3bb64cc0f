"The notebooks in JupyterLab, as `make lab` starts it, in a real browser: what is on the page, by pixels or by text."

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BUNDLED, ROOT
from PIL import Image

from facesr.upscale import Upscaler

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium or google-chrome")

FACES = sorted(BUNDLED.rglob("*.jpg"))
SWITCHES = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
SWITCHES += ("--disable-component-update", "--disable-sync")
NO_NEWS = ".jupyter/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"


def eventually(found, what, seconds=120):
    "The first value that counts as true; waits for it."
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, what
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "What a clone holds, as far as the notebooks need it."
    place = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "nbs", place / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "Makefile", place)
    shutil.copytree(ROOT / "results" / "weights", place / "results" / "weights")
    (place / "facesr").symlink_to(ROOT / "facesr")
    return place


@pytest.fixture(scope="module")
def address(clone, tmp_path_factory):
    "JupyterLab runs there."
    home = tmp_path_factory.mktemp("home")
    (home / NO_NEWS).parent.mkdir(parents=True)
    (home / NO_NEWS).write_text('{"fetchNews": "false"}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--no-browser --allow-root --ServerApp.ip=127.0.0.1 --ServerApp.port={port} --IdentityProvider.token=''"
    command = ["make", "-o", ".venv/ready", "lab", f"bin={Path(sys.executable).parent}", f"LAB={options}"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "FACESR"))}
    threads = str(torch.get_num_threads())  # with another number the network rounds otherwise
    environment = inherited | {"HOME": str(home), "PYTHONPATH": str(clone), "OMP_NUM_THREADS": threads}
    url, opener = f"http://127.0.0.1:{port}", urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, cwd=clone, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            while True:
                assert server.poll() is None, (home / "log").read_text()
                try:
                    opener.open(f"{url}/api/status", timeout=5)
                    break
                except OSError:
                    time.sleep(0.2)
            yield url
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)


class Notebook:
    "A notebook in a tab of the browser."

    def __init__(self, browser, address, name):
        self.page = browser.new_page(viewport={"width": 1280, "height": 1000})
        self.page.goto(f"{address}/lab/tree/nbs/{name}.ipynb?reset")
        self.idle()

    def idle(self):
        eventually(lambda: self.page.get_by_text("Python 3 (ipykernel) | Idle").count(), "the kernel is not idle")

    def choose(self, menu, item):
        self.page.locator(f'.lm-MenuBar-itemLabel:text-is("{menu}")').click()
        self.page.locator(f'.lm-Menu-itemLabel:text-is("{item}")').click()

    def text(self):
        return self.page.locator(".jp-Notebook").text_content()


@pytest.fixture(scope="module")
def opened(browser, address):
    return Notebook(browser, address, "upscale")


def test_a_saved_notebook_opens_as_it_was_saved(opened):
    assert opened.page.locator(".lm-TabBar-tab", has_text="upscale.ipynb").count() == 1
    assert not opened.page.locator(".jp-mod-dirty").count()
    assert "children=(" not in opened.text()


@pytest.fixture(scope="module")
def chooser(opened):
    "The notebook has run, and pictures can be chosen."
    opened.choose("Run", "Run All Cells")
    eventually(opened.page.locator("button.widget-upload").count, "there is no chooser")
    opened.idle()
    assert not opened.page.locator('[data-mime-type="application/vnd.jupyter.error"]').count()
    return opened.page


def shown(image):
    "The pixels that an image of the page was given; while another one takes its place, it cannot be decoded."
    drawn = """async image => {
        for (let tries = 100; ; tries--)
            try { await image.decode(); break } catch (error) {
                if (!tries) throw error
                await new Promise(done => setTimeout(done, 50))
            }
        const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight)
        canvas.getContext("2d").drawImage(image, 0, 0)
        return Array.from(new Uint8Array(await (await canvas.convertToBlob()).arrayBuffer()))
    }"""
    return np.asarray(Image.open(BytesIO(bytes(image.evaluate(drawn)))).convert("RGB"), float)


def test_the_slider_moves_the_line(chooser):
    picture = chooser.locator(".wipe img")
    before = shown(picture)
    chooser.locator(".wipe .noUi-handle").last.focus()
    chooser.keyboard.press("Home")  # the line at the left edge: all of it is the output
    eventually(lambda: np.abs(shown(picture) - before)[:, :180].mean() > 2, "the picture stays as it was", 20)
    assert np.abs(shown(picture) - before)[:, 200:].mean() < 1


def slide(chooser, slider, key):
    "Press a key on a slider: Home is its lowest value, End its highest."
    slider.locator(".noUi-handle").focus()
    chooser.keyboard.press(key)


def test_the_slider_turns_the_dial(chooser):
    "The line is at the left edge: all of the picture is the output, which is another one at each end of the dial."
    picture, slider = chooser.locator(".wipe img"), chooser.locator(".wipe .widget-slider", has_text="fidelity")
    before, seen = shown(picture), []
    for key in ("Home", "End"):
        slide(chooser, slider, key)
        eventually(lambda: np.abs(shown(picture) - before).mean() > 0.5, "the picture stays as it was", 20)
        before = shown(picture)
        seen.append(before)
    assert np.abs(seen[0] - seen[1]).mean() > 0.5


def say(chooser, kind):
    "What the pictures are."
    chooser.locator(".widget-dropdown", has_text="They are").locator("select").select_option(label=kind)


def give(chooser, files):
    "Choose files, and wait until they are drawn. Returns the lines that told how far it was."
    with chooser.expect_file_chooser() as dialog:
        chooser.locator("button.widget-upload").click()
    said, status = [], chooser.locator(".widget-html", has_text=re.compile(rf"^\d+ of {len(files)}( drawn)?$"))
    dialog.value.set_files(files)

    def done():
        said.extend(status.all_inner_texts())
        return said and said[-1].endswith("drawn")

    eventually(done, "the pictures are not drawn")
    return [line.strip() for line in said]


def outputs(chooser):
    return chooser.locator("figure", has_text="output").locator("img")


def save(chooser):
    "Press the button. Returns the file that is said to be saved."
    chooser.get_by_role("button", name="Save outputs").click()
    saved = chooser.locator(".widget-html", has_text=re.compile("^saved: "))
    eventually(saved.count, "nothing is saved")
    return Path(saved.inner_text().strip().removeprefix("saved: "))


def test_twenty_pictures_are_all_drawn_and_saved(chooser, clone):
    say(chooser, "cropped faces (face-crop)")
    said = give(chooser, FACES[:20])
    assert said[-1] == "20 of 20 drawn" and len(set(said)) > 3
    made = Upscaler.from_pretrained()(FACES[:20], prepare="face-crop")
    assert outputs(chooser).count() == 20
    for picture, expected in zip(outputs(chooser).all(), made):
        seen = Image.open(BytesIO(picture.screenshot())).convert("RGB")
        assert np.abs(np.asarray(seen, float) - np.asarray(expected.resize(seen.size), float)).mean() < 6
    path = save(chooser)
    assert path == clone / "nbs" / "upscaled.zip"
    with zipfile.ZipFile(path) as saved:
        assert saved.namelist() == [f"{face.stem}.png" for face in FACES[:20]]
        for name, expected in zip(saved.namelist(), made):
            assert np.array_equal(Image.open(saved.open(name)), expected)


def test_many_megabytes_arrive(chooser, tmp_path):
    "More than the 10 MB at which a server that was not started by `make lab` breaks the connection, and says so."
    noise, files = np.random.default_rng(0), [tmp_path / f"{i}.bmp" for i in range(3)]
    for face, path in zip(FACES, files):
        pixels = np.asarray(Image.open(face).resize((1068, 1308)), int) + noise.integers(-9, 9, (1308, 1068, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    assert sum(path.stat().st_size for path in files) > 12_000_000
    assert give(chooser, files)[-1] == "3 of 3 drawn"
    assert outputs(chooser).count() == 3
    assert chooser.locator(".widget-html", has_text="more than 10 MB together").count() == 1


def test_what_is_found_and_what_cannot_be_used(chooser, clone, tmp_path):
    "A photograph of two faces, and a file that is no image, in the words of the page."
    two = Image.new("RGB", (700, 500), "gray")
    two.paste(Image.open(FACES[1]), (20, 100))
    two.paste(Image.open(FACES[2]).resize((356, 436)), (300, 30))
    two.save(tmp_path / "two.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    say(chooser, "photographs: the face is found (detect)")  # those of before are still drawn when others are chosen
    assert give(chooser, [tmp_path / "two.png", tmp_path / "broken.png"])[-1] == "1 of 2 drawn"
    text = chooser.locator(".jp-Notebook").text_content()
    assert re.search("two.png: [2-8] faces found, the largest is drawn", text)
    assert "broken.png: no image that can be decoded" in text
    assert chooser.locator(".widget-html figure").count() == 4
    path = save(chooser)
    assert path == clone / "nbs" / "upscaled two.png"
    assert np.array_equal(Image.open(path), Upscaler.from_pretrained()(tmp_path / "two.png", prepare="detect"))
    say(chooser, "16x16")
    wrong = "two.png: it is 700x500, and has to be 16x16; choose a preparation"
    eventually(lambda: wrong in chooser.locator(".jp-Notebook").text_content(), "a wrong size is not named")


def test_the_dial_redraws_what_is_shown(chooser, clone):
    "Outputs follow the slider, those that are saved as well."
    say(chooser, "cropped faces (face-crop)")
    give(chooser, FACES[:2])
    slider = chooser.locator(".widget-slider", has_text="fidelity").last
    for key, fidelity in (("Home", 0), ("End", 1)):
        slide(chooser, slider, key)
        expected = Upscaler.from_pretrained(fidelity=fidelity)(FACES[:2], prepare="face-crop")
        near = lambda: len(found := outputs(chooser).all()) == 2 and all(
            np.abs(shown(picture) - np.asarray(face, float)).mean() < 2 for picture, face in zip(found, expected)
        )
        eventually(near, f"the outputs are not those at fidelity {fidelity}", 30)
        with zipfile.ZipFile(save(chooser)) as saved:
            for name, face in zip(saved.namelist(), expected, strict=True):
                assert np.array_equal(Image.open(saved.open(name)), face)
    assert chooser.locator(".widget-html figure").count() == 8


class Training(Notebook):
    "train.ipynb, on the smallest preset."

    def run(self, *parameters):
        "Run All, with these lines in the place of the parameters."
        cell = self.page.locator(".jp-CodeCell", has_text="# Parameters of this page").first
        cell.locator(".cm-content").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text("\n".join(("# Parameters of this page", 'preset: str = "smoke"', *parameters)))
        self.choose("Run", "Run All Cells")

    def said(self, text):
        "Wait until an output says it."
        eventually(self.page.locator(".jp-OutputArea-output", has_text=text).count, f"the page does not say: {text}")


@pytest.fixture(scope="module")
def training(browser, address):
    return Training(browser, address, "train")


def test_parameters_are_what_the_cell_says_now(training, clone):
    "A name that does not exist is refused, until it is corrected; interrupted, the page says how to go on."
    training.run("epoch = 3")
    training.said("there is no parameter 'epoch'; did you mean epochs?")
    training.run("epochs = 200")
    training.said(re.compile("epoch [0-9]+/200"))
    training.choose("Kernel", "Interrupt Kernel")
    training.said("results/mine/smoke/baseline/seed0: its checkpoint is at step")
    assert "Traceback" not in training.page.locator(".jp-Notebook").text_content()
    assert (clone / "results" / "mine" / "smoke" / "baseline" / "seed0" / "checkpoint" / "progress.json").exists()


def test_a_page_that_is_opened_again_shows_the_run(training, browser, address, clone):
    "The tab is closed while the network is trained. What was deleted from the parameters does not count."
    training.run("seed: int = 1")
    training.said("results: results/mine/smoke/baseline/seed1")
    training.choose("File", "Save Notebook")
    eventually(lambda: "seed: int = 1" in (clone / "nbs" / "train.ipynb").read_text(), "the page is not saved")
    training.page.close()
    again = Training(browser, address, "train")
    assert "facesr runs" in again.page.locator(".jp-Notebook").text_content()
    again.choose("Run", "Run All Cells")
    again.said("is complete: nothing is left to train")
    again.said("run complete: results/mine/smoke/baseline/seed1")
    config = json.loads((clone / "results" / "mine" / "smoke" / "baseline" / "seed1" / "config.json").read_text())
    assert config["config"]["epochs"] == 2
