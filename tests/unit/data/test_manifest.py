"""The manifest: what it reads, and every way in which it may be wrong."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from agglom.data.manifest import Manifest, bin_names, load
from agglom.errors import DataError
from agglom.job import Attribute, Data, Splits

HEADER = "image,patient,split,sick,sex,age\n"
GOOD = (
    HEADER
    + "a.png,007,train,1,F,49.9\n"
    + "b.png,007,train,0.0,F,50\n"
    + "c.png,8,val,1.0,M,65\n"
    + "d.png,9,test,,unknown,NA\n"
)
ATTRIBUTES = {"sex": Attribute(), "age_band": Attribute(kind="continuous", column="age", bins=(50, 65))}


def data(name: str = "m.csv", **options) -> Data:
    return Data(manifest=name, **{"labels": ("sick",), "attributes": ATTRIBUTES, **options})


def write(folder: Path, text: str = GOOD, images: str = "abcd") -> Path:
    (folder / "m.csv").write_text(text)
    for name in images:
        (folder / f"{name}.png").touch()
    return folder


def problems(folder: Path, text: str, **options) -> str:
    write(folder, text)
    with pytest.raises(DataError) as caught:
        load(data(**options), folder)
    return str(caught.value)


def same(a: Manifest, b: Manifest) -> None:
    for field in ("images", "patients", "labels", "attributes"):
        assert getattr(a, field) == getattr(b, field)
    for field in ("patient_N", "split_N", "label_NL"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


def test_fields(tmp_path):
    manifest = load(data(), write(tmp_path))
    assert manifest.images == tuple(str(tmp_path / f"{name}.png") for name in "abcd")
    assert manifest.patients == ("007", "8", "9")
    assert manifest.patient_N.tolist() == [0, 0, 1, 2]
    assert manifest.patient_N.dtype == np.int64
    assert manifest.split_N.tolist() == ["train", "train", "val", "test"]
    assert manifest.rows("train").tolist() == [0, 1]
    assert manifest.rows("train").dtype == np.int64
    assert manifest.label_NL.dtype == np.float32
    np.testing.assert_array_equal(manifest.label_NL, [[1], [0], [1], [np.nan]])
    assert manifest.attributes == {"sex": ("F", "F", "M", None), "age_band": ("<50", "50-65", ">=65", None)}
    assert manifest.digest == hashlib.sha256(GOOD.encode()).hexdigest()
    assert len(manifest) == 4
    assert "data row 3" in manifest.where(2)


def test_parquet_and_csv_agree(tmp_path):
    write(tmp_path)
    table = pa.table(
        {
            "image": ["a.png", "b.png", "c.png", "d.png"],
            "patient": pa.array(["007", "007", "8", "9"]).dictionary_encode(),
            "split": ["train", "train", "val", "test"],
            "sick": pa.array([1.0, 0.0, 1.0, None]),
            "sex": ["F", "F", "M", None],
            "age": pa.array([49.9, 50.0, 65.0, float("nan")]),
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    same(load(data(), tmp_path), load(data("m.parquet"), tmp_path))


def test_parquet_numbers_rows_from_one(tmp_path):
    columns = {"image": ["a.png"], "patient": [1], "split": ["train"], "sick": [-1], "sex": ["F"], "age": [3]}
    pq.write_table(pa.table(columns), tmp_path / "m.pq")
    with pytest.raises(DataError, match=r"(?s)data rows counted from 1.*row 1: '-1'"):
        load(data("m.pq"), tmp_path, check_files=False)


def test_spreadsheet_habits(tmp_path):
    """A byte order mark, Windows line ends, blanks around cells, commas and line ends in quotes."""
    text = "\ufeff" + HEADER.replace("image", "note,image") + 'x,a.png,1,train, 1 , F,3\n"y,\nz",b.png,2, val,0,F ,4\n'
    (tmp_path / "m.csv").write_bytes(text.replace("\n", "\r\n").encode())
    manifest = load(data(), tmp_path, check_files=False)
    assert manifest.attributes["sex"] == ("F", "F")
    assert manifest.rows("val").tolist() == [1]
    assert manifest.label_NL.ravel().tolist() == [1, 0]


def test_own_names_of_columns_and_splits(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "pixels").mkdir()
    (tmp_path / "pixels" / "a.png").touch()
    (tmp_path / "tables" / "m.csv").write_text("path,who,fold\na.png,1,0\nsub/../b.png,2,1\n")
    spec = Data(
        manifest="tables/m.csv",
        root="pixels",
        image="path",
        patient="who",
        split="fold",
        splits=Splits(train="0", val="1", test=None),
    )
    manifest = load(spec, tmp_path, check_files=False)
    assert manifest.images == tuple(str(tmp_path / "pixels" / name) for name in ("a.png", "b.png"))
    assert manifest.label_NL.shape == (2, 0)
    assert manifest.rows("test").size == 0


def test_every_problem_at_once(tmp_path):
    message = problems(
        tmp_path,
        HEADER
        + "a.png,1,train,1,F,30\n"
        + "b.png,1,val,maybe,F,old\n"  # patient in two splits, label, age
        + "a.png,2,train,0,M,40\n"  # duplicate
        + ",3,train,0,M,40\n"  # no image
        + "c.png,,train,0,M,40\n"  # no patient
        + "d.png,4,,0,M,40\n"  # no split
        + "e.png,5,holdout,0,M,inf\n",  # unknown split, missing file, age
    )
    assert "9 problems" in message
    assert "the header is line 1" in message
    for kind, line in {
        "empty image cells: 1 row.": "line 5: ''",
        "duplicate image rows: 1 row.": "line 4: 'a.png' is also in line 2",
        "missing image files: 1 row.": "line 8: 'e.png'",
        "empty split cells: 1 row.": "line 7: ''",
        "unknown split values: 1 row.": "line 8: 'holdout'",
        "empty patient cells: 1 row.": "line 6: ''",
        "patients in two splits (1): 1 row.": "line 3: patient '1' is in 'val', in line 2 in 'train'",
        "label 'sick' not 0 or 1: 1 row.": "line 3: 'maybe'",
        "attribute 'age_band' not numeric: 2 rows.": "line 3: 'old'",
    }.items():
        assert kind in message
        assert line in message.split(kind)[1]


def test_first_five_and_the_count(tmp_path):
    rows = "".join(f"x{i}.png,{i},train,1,F,3\n" for i in range(7)) + "a.png,8,val,1,F,3\n"
    message = problems(tmp_path, HEADER + rows)
    assert "missing image files: 7 rows" in message
    assert "line 6: 'x4.png'" in message
    assert "x5.png" not in message


def test_lines_are_those_of_the_file(tmp_path):
    """Blank lines move the numbers; where a cell spans lines, rows are counted instead."""
    assert "line 3: 'maybe'" in problems(tmp_path, HEADER + "\na.png,1,train,maybe,F,3\nb.png,2,val,1,F,3\n")
    assert "row 1: 'maybe'" in problems(tmp_path, HEADER + 'a.png,1,train,maybe,"F\nx",3\nb.png,2,val,1,F,3\n')


def test_missing_columns_suggest(tmp_path):
    message = problems(tmp_path, GOOD.replace("sick", "sickk").replace("patient", "patient_id"))
    assert "2 problems" in message
    assert "missing column 'patient' (data.patient); did you mean 'patient_id'? The file has: image," in message
    assert "missing column 'sick' (data.labels); did you mean 'sickk'?" in message


def test_column_twice(tmp_path):
    assert "column 'sex' (data.attributes.sex) appears 2 times" in problems(tmp_path, GOOD.replace("age", "sex"))


@pytest.mark.parametrize(("kept", "lost"), [("train", "val"), ("val", "train")])
def test_empty_split(tmp_path, kept, lost):
    message = problems(tmp_path, HEADER + f"a.png,1,{kept},1,F,3\n")
    assert f"no {lost} rows" in message
    assert f"data.splits.{lost}" in message


def test_missing_codes(tmp_path):
    attributes = {
        "sex": Attribute(missing=("X",)),
        "age": Attribute(kind="continuous", bins=(50,), missing=("-1",)),
    }
    text = HEADER + "a.png,1,train,1,X,-1.0\nb.png,2,val,1,,\nc.png,3,val,1,NA,-2\n"
    manifest = load(data(attributes=attributes), write(tmp_path, text))
    assert manifest.attributes == {"sex": (None, None, "NA"), "age": (None, None, "<50")}


def test_bin_names():
    assert bin_names((50, 65)) == ("<50", "50-65", ">=65")
    assert bin_names((0.5,)) == ("<0.5", ">=0.5")


@pytest.mark.parametrize(
    ("name", "raw", "says"),
    [
        ("m.csv", b"", "is empty"),
        ("m.csv", b"image,patient,split\n", "no rows"),
        ("m.csv", b"image,patient,split\na,\xff,train\n", "UTF-8"),
        ("m.csv", b"image,patient,split\na,1,train\nb,2\n", r"(?s)wrong number of cells: 1 rows.*row 3: 2 cells"),
        ("m.parquet", b"PAR1 and then nothing", "not a readable Parquet file"),
        ("m.parquet", b"image,patient", "not a readable Parquet file"),
    ],
)
def test_broken_file(tmp_path, name, raw, says):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=says):
        load(Data(manifest=name), tmp_path)


def test_absent_file_suggests(tmp_path):
    write(tmp_path)
    with pytest.raises(DataError, match=r"does not exist; did you mean '.*m\.csv'\?"):
        load(data("mm.csv"), tmp_path)


def test_a_folder_is_no_image(tmp_path):
    write(tmp_path, images="abc")
    (tmp_path / "d.png").mkdir()
    with pytest.raises(DataError, match=r"missing image files: 1 row\."):
        load(data(), tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_hundred_thousand_rows(tmp_path, suffix):
    count, folders = 100_000, 20
    for folder in range(folders):
        (tmp_path / f"p{folder}").mkdir()
    names = [f"p{i % folders}/{i}.png" for i in range(count)]
    # To write a hundred thousand files would take the test's time; a listing of them takes .1 s.
    for i in range(2000):
        (tmp_path / names[i]).touch()
    columns = {
        "image": names,
        "patient": [f"P{i // 4}" for i in range(count)],
        "split": [("train", "train", "val", "test")[i // 4 % 4] for i in range(count)],
        "sick": [("0", "1", "")[i % 3] for i in range(count)],
        "sex": [("F", "M", "unknown")[i % 3] for i in range(count)],
        "age": [str(i % 97) for i in range(count)],
    }
    path = tmp_path / f"m.{suffix}"
    if suffix == "csv":
        rows = zip(*columns.values(), strict=True)
        path.write_text(HEADER + "".join(",".join(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.table(columns), path)
    start = time.process_time()
    with pytest.raises(DataError, match="missing image files: 98000 rows"):
        load(data(path.name), tmp_path)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("name", ["m.csv", "m.parquet"])
def test_imports_are_light(tmp_path, name):
    """A table is checked before torch is paid for."""
    pq.write_table(csv.read_csv(write(tmp_path) / "m.csv"), tmp_path / "m.parquet")
    code = (
        "import sys, agglom.data.manifest as m; from agglom.job import Data; from pathlib import Path\n"
        f"m.load(Data(manifest='{name}', labels=('sick',)), Path('{tmp_path}'))\n"
        "print([name for name in ('torch', 'pandas', 'PIL') if name in sys.modules])"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


# ── Groups ──


def grouped(folder, rows, **options):
    write(folder, "image,patient,split,sick,sex,age,race\n" + rows)
    attributes = ATTRIBUTES | {"race": Attribute(separator=";")}
    return load(data(attributes=attributes, **options), folder, check_files=False, needed=())


ROWS = """\
a.png,1,test,1,F,49,B;A
b.png,2,test,0,M,70,A
c.png,3,test,1,,NA,unknown; A
d.png,4,test,1,F,3,unknown
e.png,5,test,1,F,55,A;;A
"""


def members(view):
    return {group: rows.tolist() for group, rows in view.members.items()}


def test_an_image_may_be_in_several_groups(tmp_path):
    manifest = grouped(tmp_path, ROWS)
    assert manifest.attributes["race"] == ("A;B", "A", "A", None, "A")
    assert manifest.separators == {"race": ";"}
    view = manifest.view("race")
    assert members(view) == {"A": [0, 1, 2, 4], "B": [0]}
    assert view.unknown.tolist() == [3]


def test_crossings_of_several_values(tmp_path):
    view = grouped(tmp_path, ROWS).view("sex*race")
    assert members(view) == {"F|A": [0, 4], "F|B": [0], "M|A": [1], "M|B": []}
    assert view.unknown.tolist() == [2, 3]


def test_bins_are_in_the_order_of_their_numbers(tmp_path):
    manifest = grouped(tmp_path, ROWS)
    np.testing.assert_array_equal(manifest.numbers["age_band"], [49, 70, np.nan, 3, 55])
    assert members(manifest.view("age_band")) == {"<50": [0, 3], "50-65": [4], ">=65": [1]}
    assert list(manifest.view("age_band*sex").members)[:2] == ["<50|F", "<50|M"]


def test_everybody_is_a_view(tmp_path):
    view = grouped(tmp_path, ROWS).view()
    assert (view.attribute, members(view), view.unknown.tolist()) == ("", {"all": [0, 1, 2, 3, 4]}, [])


def test_nobody_is_annotated(tmp_path):
    view = grouped(tmp_path, ROWS.replace("F,", ",").replace("M,", ",")).view("sex*race")
    assert (members(view), view.unknown.tolist()) == ({}, [0, 1, 2, 3, 4])


def test_without_a_split_column_all_rows_are_of_test(tmp_path):
    write(tmp_path, "image,patient,sick,sex,age\na.png,1,1,F,3\n")
    manifest = load(data(split=None), tmp_path, check_files=False, needed=())
    assert (manifest.rows("test").tolist(), manifest.headline) == ([0], "test")
    assert load(data(), write(tmp_path, GOOD), check_files=False).headline == "test"
    only_val = load(data(), write(tmp_path, GOOD.replace("test", "val")), check_files=False)
    assert only_val.headline == "val"


def test_cells_are_images_as_the_file_writes_them(tmp_path):
    manifest = load(data(), write(tmp_path, GOOD.replace("a.png", "./x/../a.png")), check_files=False)
    assert manifest.cells == ("./x/../a.png", "b.png", "c.png", "d.png")
    assert manifest.images[0] == str(tmp_path / "a.png")


CLASSES = "image,patient,split,finding\na.png,1,train,none\nb.png,2,val,covid\nc.png,3,test,flu\nd.png,4,test,\n"


def test_labels_that_are_classes_of_a_column(tmp_path):
    names = ("finding=none", "finding=covid", "finding=flu")
    manifest = load(data(labels=names, attributes={}), write(tmp_path, CLASSES))
    nan = np.nan
    np.testing.assert_array_equal(manifest.label_NL, [[1, 0, 0], [0, 1, 0], [0, 0, 1], [nan] * 3])
    assert manifest.classes == {"finding": ("none", "covid", "flu")}
    alone = load(data(labels=("finding=covid",), attributes={}), tmp_path)
    np.testing.assert_array_equal(alone.label_NL[:, 0], [0, 1, 0, nan])
    assert alone.classes == {}


def test_all_classes_of_a_column_are_named(tmp_path):
    text = problems(tmp_path, CLASSES, labels=("finding=none", "finding=covd"), attributes={})
    assert "classes of 'finding' that no label names: 2 rows" in text
    assert "line 3: 'covid'; did you mean 'covd'?" in text
    assert "missing column 'find' (data.labels); did you mean 'finding'?" in problems(
        tmp_path, CLASSES, labels=("find=none",), attributes={}
    )
