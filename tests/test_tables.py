"Text tables, as people save them: marks, line ends, headers, gaps."

import json
import shutil

import pandas as pd
import pytest
from conftest import BUNDLED

from facesr import identity
from facesr.faces import ATTRIBUTES, find_faces, read_attributes, read_lines, read_partition, read_people
from facesr.heatmaps import Part, read_parts
from facesr.study import resolve
from facesr.training import judge_later, train

MARK = b"\xef\xbb\xbf"  # the byte-order mark that spreadsheets and Windows put first


def saved(path, text, mark=False, ends="\n"):
    path.write_bytes(MARK * mark + text.replace("\n", ends).encode())
    return path


every_form = pytest.mark.parametrize(
    "mark, ends", [(False, "\n"), (True, "\n"), (False, "\r\n"), (True, "\r\n"), (True, "\r")]
)
every_top = pytest.mark.parametrize("top", ["", "image_id,value\n", "File Value\n", "2\n", "2\nimage_id value\n"])


@every_form
@every_top
@pytest.mark.parametrize("separator", [",", " ", "  ", ", "])
def test_a_table_keeps_its_first_row_however_it_is_saved(tmp_path, top, mark, ends, separator):
    text = top + f"000001.jpg{separator}0\n000002.jpg{separator}2\n"
    path = saved(tmp_path / "list_eval_partition.txt", text, mark, ends)
    assert read_partition(path).values.tolist() == [["000001.jpg", "train"], ["000002.jpg", "test"]]
    assert read_people(path).to_dict() == {"000001.jpg": 0, "000002.jpg": 2}


@every_form
@pytest.mark.parametrize("top", ["", "image_id," + ",".join(ATTRIBUTES) + "\n", "2\n" + " ".join(ATTRIBUTES) + " \n"])
def test_attributes_keep_their_first_row_however_they_are_saved(tmp_path, top, mark, ends):
    separator = "," if "," in top else " "
    values = {"a.jpg": 2, "b.jpg": 3}.items()
    rows = [separator.join([name, *("1" if i % n else "-1" for i in range(40))]) for name, n in values]
    table = read_attributes(saved(tmp_path / "list_attr_celeba.txt", top + "\n".join(rows) + "\n", mark, ends))
    assert table.index.tolist() == ["a.jpg", "b.jpg"] and table.columns.tolist() == list(ATTRIBUTES)
    assert table.loc["b.jpg"].tolist() == [i % 3 > 0 for i in range(40)]


@pytest.mark.parametrize(
    "read, text, sentence",
    [
        (read_partition, "a.jpg\nb.jpg\n", "line 1: found 'a.jpg'; every line has to be an image name and 0"),
        (read_partition, "", "names no image; every line has to be an image name and 0"),
        (read_partition, "image_id,partition\n", "names no image"),
        (read_partition, "a.jpg 0\nb.jpg 0\na.jpg 1\n", r"names a.jpg more than once \(line 3\)"),
        (read_people, "a.jpg 7\nb.jpg 7 7\n", "line 2: found 'b.jpg 7 7'"),
        (read_attributes, "image_id,Male,Young\na.jpg,1\n", "the header 'image_id,Male,Young' and 1 columns beside"),
        (read_attributes, "image_id\na.jpg\n", "and 0 columns beside the name do not fit"),
        (read_attributes, "a.jpg,1,-1\n", "has no header, and 2 columns beside the name; CelebA's 40 need no header"),
        (read_attributes, "image_id,Male,Male\na.jpg,1,-1\n", "has to name every column, and once"),
        (read_attributes, "Male Young\na.jpg 1 1\nb.jpg 1\n", "line 3: found 'b.jpg 1'"),
        (read_attributes, "Male\na.jpg 1\na.jpg 1\n", r"names a.jpg more than once \(line 3\)"),
        (read_partition, 'a.jpg,0\n"b.jpg,1\n', "line 2: found"),
        (read_people, "a.jpg," + "1" * 131_073, "line 1 has 131,079 characters; at most 10,000 are allowed"),
        (read_parts, "class,weight\n" + "a" * 131_073 + ",1\n", "line 2 has 131,075 characters"),
        (read_parts, 'class,weight\n"' + "a" * 131_073 + '",1\n', "line 2 has 131,077 characters"),
        (read_parts, "class,weight\neye,4\nnose,4,5\n", "line 3: found 'nose,4,5'; the columns are class, weight"),
        (read_parts, "class,weight,weight\neye,4,5\n", "has the columns class, weight, weight"),
        (read_parts, "class,weight\neye,4_5\n", "line 2: weight is '4_5'; it has to be a number greater than 0, such"),
        (read_parts, "class,weight\neye,\uff14\n", "line 2: weight is '\uff14'; it has to be a number"),
        (read_parts, "class,weight\neye,infinity\n", "line 2: weight is 'infinity'; it has to be a number"),
    ],
)
def test_a_table_that_is_none_is_refused_with_its_name(tmp_path, read, text, sentence):
    with pytest.raises(ValueError, match="table.csv.* " + sentence):
        read(saved(tmp_path / "table.csv", text))


def test_people_are_numbers_and_groups_are_names(tmp_path):
    with pytest.raises(ValueError, match="i.txt, line 2: found '7,a.jpg'; every line has to be an image name and the"):
        read_people(saved(tmp_path / "i.txt", "person,name\n7,a.jpg\n"))
    with pytest.raises(ValueError, match="g.csv names 'smear 7' first; every line has to be an image name and"):
        read_people(saved(tmp_path / "g.csv", "group,name\nsmear 7,a.JPG\n"))
    slides = saved(tmp_path / "s.csv", "name,group\na.jpg,slide.tif\nb.jpg,slide.tif\n")
    assert read_people(slides).to_dict() == {"a.jpg": 0, "b.jpg": 0}
    assert read_people(saved(tmp_path / "g.csv", "name,group\na.jpg,smear 7\n")).to_dict() == {"a.jpg": 0}


@pytest.mark.parametrize("read", [read_partition, read_people, read_attributes, read_parts])
@pytest.mark.parametrize("content", ["a.jpg 0\n".encode("utf-16"), "fran\xe7ois.jpg 0\n".encode("latin-1")])
def test_a_table_in_another_encoding_is_refused(tmp_path, read, content):
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(ValueError, match="table.csv is no text file in UTF-8; it has to hold"):
        read(tmp_path / "table.csv")


@every_form
def test_names_a_line_come_without_mark_and_line_ends(tmp_path, mark, ends):
    assert read_lines(saved(tmp_path / "n.txt", "a b.jpg\n\xe9,1.jpg\n", mark, ends), "names") == [
        "a b.jpg", "\xe9,1.jpg", ""
    ]  # fmt: skip


@every_form
def test_parts_however_they_are_saved(tmp_path, mark, ends):
    path = saved(tmp_path / "parts.csv", 'class,weight,fade\n"left eye",4.5,\n\nrim, 3 , rim\n', mark, ends)
    assert read_parts(path) == {"left eye": Part(4.5), "rim": Part(3, "rim")}


def celeba_of(root, count=12):
    "The first bundled faces in Kaggle's layout, with a table of people and of attributes."
    (root / "img_align_celeba").mkdir()
    names = [f"{i:06}.jpg" for i in range(1, count + 1)]
    for name in names:
        shutil.copy(BUNDLED / "img_align_celeba" / name, root / "img_align_celeba")
    splits = "".join(f"{n},{i % 3}\n" for i, n in enumerate(names))
    saved(root / "list_eval_partition.csv", "image_id,partition\n" + splits)
    saved(root / "identity_CelebA.txt", "".join(f"{n} {i // 2 + 1}\n" for i, n in enumerate(names)))
    saved(root / "list_attr_celeba.txt", "".join(f"{n}{' -1' * 40}\n" for n in names))
    return root


def test_marks_change_nothing_of_a_set_of_faces(tmp_path):
    plain = find_faces(celeba_of(tmp_path))
    for path in tmp_path.glob("*.*"):
        path.write_bytes(MARK + path.read_bytes().replace(b"\n", b"\r\n"))
    marked = find_faces(tmp_path)
    assert len(marked.table) == 12 and marked.table.equals(plain.table) and marked.attributes.equals(plain.attributes)
    assert str(marked) == str(plain) and "not" not in str(marked).partition(")")[2]


def test_incomplete_tables_are_said(tmp_path):
    root = celeba_of(tmp_path)
    for name in ("identity_CelebA.txt", "list_attr_celeba.txt"):
        lines = (root / name).read_text().splitlines()
        saved(root / name, "\n".join(lines[:8]))
    assert str(find_faces(root)).endswith(
        "; who is on 4 of 12 is not known; the attributes of 2 of 4 test faces are not known"
    )


def test_a_run_made_without_dlib_is_judged_later(tmp_path, monkeypatch):
    (data := tmp_path / "data").mkdir()
    celeba_of(data, 24)
    config = resolve(preset="smoke", needs_celeba=False, epochs=1, perceptual_weight=0)
    with_it = train(config, data, tmp_path / "with", report=str)
    with monkeypatch.context() as without:
        without.setattr(identity, "find_spec", lambda name: None)
        folder = train(config, data, tmp_path / "without", report=str)
    assert "identity_cosine" not in pd.read_csv(folder / "per_image.csv")
    judge_later(folder, data, report=str)
    assert (folder / "per_image.csv").read_text() == (with_it / "per_image.csv").read_text()
    measured = [json.loads((run / "metrics.json").read_text())["test"] for run in (folder, with_it)]
    assert measured[0] == measured[1] and "landmark_error" in measured[0]
    shutil.copy(BUNDLED / "img_align_celeba" / "000100.jpg", data / "img_align_celeba" / "000003.jpg")
    with pytest.raises(ValueError, match="holds other test faces than those of"):
        judge_later(folder, data, report=str)
