"""Landmarks by MediaPipe's FaceMesh, a second opinion on the part detector: make_detector.ipynb compares with them.

MediaPipe wants an older NumPy than the library, so this runs in an environment of its own:

    python -m venv mediapipe-env && mediapipe-env/bin/pip install mediapipe==0.10.21
    mediapipe-env/bin/python mediapipe_landmarks.py FOLDER OUT.csv [NAMES.txt]

NAMES.txt holds a file name a line; without NAMES.txt every .jpg of the folder is read. OUT.csv gets a row for each
picture in which a face is found: centres of the eyes (left: smaller x in the picture), tip of the nose, middle of the
mouth, and the box of all 468 points, in pixels of the picture (centre of the first pixel: 0, 0).
"""

import csv
import sys
from pathlib import Path

import mediapipe as mp
import numpy as np
from PIL import Image

EYES = (
    [33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246],
    [263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466],
)
NOSE_TIP, MOUTH = 1, [61, 291, 0, 17]
COLUMNS = [
    "name",
    *(f"{part}_{axis}" for part in ("left_eye", "right_eye", "nose", "mouth") for axis in "xy"),
    "face_left",
    "face_top",
    "face_right",
    "face_bottom",
]
TRIES = ((3, 0.5), (2, 0.3), (5, 0.3), (1, 0.2))  # enlargement, least confidence


def find_points(image: Image.Image, meshes: dict) -> np.ndarray | None:
    "468 points [468, 2] in pixels of the picture, None where no try finds a face."
    for enlargement, confidence in TRIES:
        large = image.resize((image.width * enlargement, image.height * enlargement), Image.Resampling.BICUBIC)
        if faces := meshes[confidence].process(np.asarray(large)).multi_face_landmarks:
            return np.array([(p.x * image.width - 0.5, p.y * image.height - 0.5) for p in faces[0].landmark])[:468]
    return None


def main(folder: Path, out: Path, names: list[str]) -> None:
    meshes = {
        c: mp.solutions.face_mesh.FaceMesh(
            static_image_mode=True, max_num_faces=1, refine_landmarks=False, min_detection_confidence=c
        )
        for c in {c for _, c in TRIES}
    }
    rows = []
    for name in names:
        points = find_points(Image.open(folder / name).convert("RGB"), meshes)
        if points is not None:
            eyes = sorted((points[eye].mean(0) for eye in EYES), key=lambda centre: centre[0])
            values = np.concatenate([*eyes, points[NOSE_TIP], points[MOUTH].mean(0), points.min(0), points.max(0)])
            rows.append([name, *(f"{v:.1f}" for v in values)])
    with open(out, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    print(f"{len(rows)} of {len(names)} faces found")


if __name__ == "__main__":
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    main(
        folder,
        out,
        Path(sys.argv[3]).read_text().split() if len(sys.argv) > 3 else sorted(p.name for p in folder.glob("*.jpg")),
    )
