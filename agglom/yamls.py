"""YAML as the configuration reads it: one scalar rule, no key twice, `extends`, `--set`, paths made absolute.

A relative path starts at the folder of the file that says it, or at the current folder when `--set` says it. Paths are
`data.manifest`, `data.root`, every kind that ends in `.py`, and every option that begins with `./`, `../` or `~/`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from agglom.errors import ConfigError

Key = tuple[str | int, ...]

# The numbers, booleans and nulls of YAML 1.2: `1e-4` is a number; `no`, `12:30` and `2020-01-01` are strings.
_RESOLVERS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, that refuses a key given twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own declaration)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in first:
                problem = f"key {key.value!r} is given twice, first in line {first[key.value]}; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            first[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes every string that either YAML 1.1 or `_Loader` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.ScalarNode:
        # Plain and single-quoted scalars lose line breaks such as U+0085.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


Dumper.add_representer(str, Dumper.represent_text)


for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{where}:{line}: {error.problem or 'not YAML'}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {error}") from error


def read_text(path: Path, role: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such {role}{suggest(path.name, beside)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read this {role}: {error}") from error


def _anchor(value: Any, key: Key, folder: Path) -> Any:
    """`value` with every relative path in it made absolute, starting at `folder`."""
    if isinstance(value, dict):
        return {name: _anchor(item, (*key, name), folder) for name, item in value.items()}
    if isinstance(value, list) and key == ("stages",):
        return [_anchor(item, (*key, index), folder) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    match key:
        case ("data", "manifest" | "root"):
            is_path = bool(value)
        case ("teachers", _, "kind") | ("student" | "balance", "kind") | ("stages", _, "student", "kind"):
            is_path = value.endswith(".py")
        case (
            ("teachers", _, "options", *_)
            | ("student" | "balance", "options", *_)
            | ("stages", _, "student", "options", *_)
        ):
            is_path = value.startswith(("./", "../", "~/"))
        case _:
            is_path = False
    return os.path.abspath(folder / Path(value).expanduser()) if is_path else value


def merge(base: Any, top: Any) -> Any:
    """`top` over `base`: maps are merged, everything else (lists too) is replaced."""
    if isinstance(base, dict) and isinstance(top, dict):
        return base | {key: merge(base[key], value) if key in base else value for key, value in top.items()}
    return top


def read_file(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The map in a file, merged over the file that it extends."""
    if path.resolve() in seen:
        chain = " extends ".join(p.name for p in (*seen[seen.index(path.resolve()) :], path))
        raise ConfigError(f"{path}: extends: a cycle, {chain}; remove one of these")
    raw = parse(read_text(path, "configuration"), str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a map of keys (data, teachers, stages, …), got {show(raw)}")
    parent = raw.pop("extends", None)
    raw = _anchor(raw, (), path.parent)
    if parent is None:
        return raw
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends: expected the name of one file, got {show(parent)}")
    return merge(read_file(path.parent / parent, (*seen, path.resolve())), raw)


def override(raw: dict[str, Any], text: str) -> None:
    """Apply one `--set a.b[0]=value` in place."""
    name, equals, value = text.partition("=")
    parts = re.findall(r"[^.\[\]]+", name)
    if not equals or not parts:
        raise ConfigError(f"--set {text}: expected key.path=value, for example --set optim.batch=64")
    node: Any = raw
    key: Key = ()
    for depth, part in enumerate(parts):
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(
                    f"--set {text}: {key_path(key)} has {len(node)} entries, counted from 0; got {part!r}"
                )
            place: str | int = int(part)
        elif isinstance(node, dict):
            place = part
            if node.get(part) is None and depth + 1 < len(parts):
                node[part] = {}
        else:
            raise ConfigError(f"--set {text}: {key_path(key)} is {show(node)}, it has no keys")
        key = (*key, place)
        if depth + 1 < len(parts):
            node = node[place]
    node[place] = _anchor(parse(value, f"--set {name}"), key, Path.cwd())


def key_path(key: Key) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return text.removeprefix(".") or "top level"


def show(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_of(word: str, known: Sequence[str], what: str) -> str:
    listed = ", ".join(known) or f"none; there are no {what}"
    return f"{word!r} is not one of the {what}: {listed}{suggest(word, known)}"
