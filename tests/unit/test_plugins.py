"""Plug-ins: found by kind, read without being imported, refused with a reason."""

import sys
from pathlib import Path

import pytest

from agglom import plugins
from agglom.errors import PluginError

OWN = '''"""A plug-in of one's own."""
from typing import Literal
from agglom.core.types import Student


def build(
    *,
    name: str,
    count: int = 1,
    rate: "float | None" = None,
    mode: Literal["a", "b"] = "a",
    sizes: tuple[int, ...] = (),
    pair: tuple[float, str] = (0.0, ""),
    table: dict[str, int] | None = None,
    odd: Student | None = None,
    cells=None,
) -> Student:
    """Say what it got.

    And more.
    """
    return name, count, cells
'''


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_an_option_is_given_or_has_its_default():
    assert plugins.given("timm", "students", {"levels": 4}, "levels") == 4
    assert plugins.given("timm", "students", {}, "class_tokens") == 1
    assert plugins.given("timm", "students", {}, "model") is None
    assert plugins.given("timm", "students", {}, "modle") is None
    assert plugins.given("tim", "students", {"levels": 4}, "levels") is None


def test_bare_kinds_are_the_files_and_functions():
    assert {"timm", "packaged", "erased"} <= set(plugins.available("teachers"))
    assert plugins.available("students") == ["timm"]
    groups = {"static", "inverse_frequency", "group_dro", "cvar"}
    teachers = {"ada_loss", "teacher_dropping", "agre"}
    assert set(plugins.available("balancers")) == {"uniform", "cells"} | groups | teachers


@pytest.mark.parametrize("package", ["teachers", "students", "balancers"])
def test_every_bare_kind_can_be_read(package):
    for kind in plugins.available(package):
        signature = plugins.schema(kind, package)
        assert signature.doc, kind
        assert set(plugins.INJECTED[package]) & set(signature.options) == set(signature.options) & {
            "source",
            "source_name",
            "cells",
            "measured",
        }


def test_reading_imports_nothing(own):
    own.write_text(OWN + "\nraise SystemExit('imported')\n")
    signature = plugins.schema(str(own), "students")
    assert signature.doc.startswith("Say what it got.")
    assert signature.returns == "Student"
    assert str(signature.options["name"]) == "str"
    assert str(signature.options["rate"]) == "float | None = None"


def test_a_changed_file_is_read_again(own):
    assert "extra" not in plugins.schema(str(own), "students").options
    own.write_text("def build(*, extra: int): ...\n")
    assert list(plugins.schema(str(own), "students").options) == ["extra"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"count": 3, "rate": 1, "mode": "b", "sizes": [1, 2], "pair": [1, "x"], "table": {"a": 1}},
        {"rate": None, "table": None, "odd": object(), "sizes": ()},
    ],
)
def test_fitting_options(own, options):
    assert list(plugins.problems(plugins.schema(str(own), "students"), {"name": "x", **options})) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("name", 3),
        ("name", None),
        ("count", 1.5),
        ("count", True),
        ("count", "1"),
        ("rate", "fast"),
        ("rate", True),
        ("mode", "c"),
        ("sizes", [1, "2"]),
        ("sizes", 3),
        ("pair", [1.0]),
        ("pair", ["x", 1.0]),
        ("table", [1]),
    ],
)
def test_options_that_do_not_fit(own, option, value):
    ((name, message),) = plugins.problems(plugins.schema(str(own), "students"), {"name": "x", option: value})
    assert name == option
    assert message.startswith("expected ")
    assert message.endswith(f"got {value!r}")


def test_build_lists_every_problem(own):
    with pytest.raises(PluginError) as caught:
        plugins.build(str(own), "students", {"cout": 1, "mode": "z", "cells": 3}, cells=1)
    assert str(caught.value).splitlines() == [
        f"kind {str(own)!r}: 4 problems",
        "  options: unknown key 'cout'; did you mean 'count'?",
        "  options.mode: expected Literal['a', 'b'], got 'z'",
        "  options: unknown key 'cells'; there are: name, count, rate, mode, sizes, pair, table, odd",
        "  options: key 'name' (str) is missing; kind " + repr(str(own)) + " needs it",
    ]


def test_build_injects_what_is_named(own):
    assert plugins.build(str(own), "students", {"name": "x"}, cells=7, unasked=1) == ("x", 1, 7)


def test_build_of_an_importable_function(tmp_path, monkeypatch):
    folder = tmp_path / "own_package" / "deep"
    folder.mkdir(parents=True)
    (folder / "module.py").write_text(OWN.replace("def build", "def make"))
    monkeypatch.syspath_prepend(tmp_path)
    kind = "own_package.deep.module:make"
    assert plugins.schema(kind, "students").file == folder / "module.py"
    assert not any(name.startswith("own_package") for name in sys.modules)
    assert plugins.build(kind, "students", {"name": "x"}) == ("x", 1, None)
    assert plugins.place(kind) == (kind, "students")
    for name in [name for name in sys.modules if name.startswith("own_package")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("pakaged", "'pakaged' is not one of the teachers; did you mean 'packaged'?; there are: "),
        ("none/mine.py", "no such file: none/mine.py"),
        ("no_such_package.x:f", "there is no module 'no_such_package' to import; install it"),
        ("agglom.nothing:f", "found no source file of module 'agglom.nothing'"),
        ("agglom.config:biuld", "defines no function 'biuld'"),
        ("agglom.config:load", "load() must take keywords only"),
        (".x:f", "there is no module ''"),
    ],
)
def test_kinds_that_are_not_there(kind, expected):
    with pytest.raises(PluginError) as caught:
        plugins.schema(kind, "teachers")
    assert expected in str(caught.value)
    assert caught.value.exit_status == 2


def test_a_file_that_is_not_python(own):
    own.write_text("def build(:\n")
    with pytest.raises(PluginError, match=r"own\.py:1: not Python"):
        plugins.schema(str(own), "teachers")


def test_an_import_that_fails_says_why(own):
    own.write_text("import no_such_library\ndef build(*, a: int = 1): ...\n")
    with pytest.raises(PluginError, match=r"cannot be imported: ModuleNotFoundError.*no_such_library"):
        plugins.build(str(own), "teachers", {})


def test_a_foreign_package_of_the_same_name_is_refused(tmp_path, monkeypatch):
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "teachers", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError) as caught:
        plugins.schema("timm", "teachers")
    text = str(caught.value)
    assert "the Python package 'teachers'" in text
    assert str(tmp_path / "teachers") in text
    assert str(plugins.HOME / "teachers") in text
    assert "off PYTHONPATH" in text


def test_place(own, monkeypatch):
    assert plugins.place("timm") == ("timm", "teachers")
    assert plugins.place("students/timm") == ("timm", "students")
    assert plugins.place("teachers/timm.py") == ("timm", "teachers")
    assert plugins.place(str(own)) == (str(own), "students")
    monkeypatch.chdir(plugins.HOME)
    assert plugins.place("teachers/timm.py") == ("timm", "teachers")
    assert Path("teachers/timm.py").is_file()
