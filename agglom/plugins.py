"""From a kind to a function: teachers, students and balancers are found by name and read before they are imported.

A bare kind is a file in `teachers/` or `students/`, or a function in `agglom/core/balance.py`;
`package.module:function` is anything importable; a path that ends in `.py` is a file with a function `build`.
The typed, keyword-only signature is the schema of the options. It is read from the source, since importing some
libraries takes 15 s and a wrong option should be answered at once.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from agglom.errors import AgglomError, PluginError

Package = Literal["teachers", "students", "balancers"]
HOME = Path(__file__).parents[1]
# Keywords that the engine fills in; the user gives `source` beside the options, as the name of a teacher.
INJECTED = {"teachers": ("source", "source_name"), "students": (), "balancers": ("cells", "measured")}


@dataclass(frozen=True)
class Option:
    """One keyword of a plug-in: its annotation and its default as they stand in the source."""

    annotation: str
    default: str | None

    def __str__(self) -> str:
        return self.annotation if self.default is None else f"{self.annotation} = {self.default}"


@dataclass(frozen=True)
class Signature:
    """What the source says of a plug-in. `returns` is the annotation of the result, "" where there is none."""

    kind: str
    file: Path
    function: str
    doc: str
    options: dict[str, Option] = field(hash=False)
    returns: str = ""


@dataclass(frozen=True)
class Plugin:
    """An imported plug-in."""

    name: str
    build: Callable[..., Any]
    signature: Signature
    doc: str


def available(package: str) -> list[str]:
    """The bare kinds of `teachers`, `students` or `balancers`."""
    if package == "balancers":
        tree = ast.parse(_home(package).read_text(encoding="utf-8"))
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
        return sorted(node.name for node in functions if "Balancer" in _source(node.returns))
    return sorted(path.stem for path in _home(package).glob("*.py") if path.stem[0] != "_")


def schema(kind: str, package: str) -> Signature:
    """Read a plug-in's signature without importing it. Raises PluginError where there is none of that kind."""
    file, function = _locate(kind, package)
    stat = file.stat()
    return _parse(kind, file, function, stat.st_mtime_ns)


def takes(kind: str, package: str, option: str) -> bool | None:
    """Whether a plug-in has that keyword; None where there is no such plug-in."""
    try:
        return option in schema(kind, package).options
    except PluginError:
        return None


def given(kind: str, package: str, options: Mapping[str, Any], option: str) -> Any:
    """The value of an option or else its default; None where a plug-in has no such option, or there is none."""
    if not takes(kind, package, option):
        return None
    default = schema(kind, package).options[option].default
    return options.get(option, None if default is None else ast.literal_eval(default))


def problems(
    signature: Signature, options: Mapping[str, Any], injected: Collection[str] = ()
) -> Iterator[tuple[str | None, str]]:
    """Everything wrong with some options: (option or None, message). `injected` keywords are not the user's to give."""
    known = {name: option for name, option in signature.options.items() if name not in injected}
    meant = set()
    for name, value in options.items():
        if name not in known:
            meant.update(difflib.get_close_matches(name, known, n=1))
            yield None, f"unknown key {name!r}{_suggest(name, known) or _list(known)}"
        elif not _accepts(ast.parse(known[name].annotation, mode="eval").body, value):
            yield name, f"expected {known[name].annotation}, got {value!r}"
    for name, option in known.items():
        if option.default is None and name not in options and name not in meant:
            yield None, f"key {name!r} ({option.annotation}) is missing; kind {signature.kind!r} needs it"


def check(signature: Signature, options: Mapping[str, Any], injected: Collection[str] = ()) -> None:
    """Raise one PluginError that lists every problem of the options."""
    if found := list(problems(signature, options, injected)):
        count = f"{len(found)} problem{'s' * (len(found) > 1)}"
        lines = [f"options.{name}: {message}" if name else f"options: {message}" for name, message in found]
        raise PluginError("\n  ".join([f"kind {signature.kind!r}: {count}", *lines]))


def place(name: str) -> tuple[str, str]:
    """Kind and package of a plug-in named on the command line.

    `students/timm` or `students/timm.py` is the bare kind where the engine has it. Otherwise, a function that is
    annotated to return a Student is a student, and everything else a teacher.
    """
    path = Path(name)
    package = path.parent.name if path.parent.name in ("teachers", "students") else ""
    if package and path.suffix in ("", ".py") and (not path.is_file() or path.resolve().parent == HOME / package):
        return path.stem, package
    returns = schema(name, "teachers").returns if ":" in name or path.suffix == ".py" else ""
    return name, "students" if returns.split(".")[-1] == "Student" else "teachers"


def resolve(kind: str, package: str) -> Plugin:
    """Import a plug-in. Raises PluginError where it is not found or its import fails."""
    signature = schema(kind, package)
    try:
        if ":" in kind:
            module = importlib.import_module(kind.partition(":")[0])
        elif kind.endswith(".py"):
            module = _import_file(signature.file)
        elif package == "balancers":
            module = importlib.import_module("agglom.core.balance")
        else:
            module = importlib.import_module(f"{package}.{kind}")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(f"{package} kind {kind!r}: {signature.file} cannot be imported: {reason}") from error
    return Plugin(kind, getattr(module, signature.function), signature, signature.doc)


def build(kind: str, package: str, options: Mapping[str, Any], **injected: Any) -> Any:
    """Check the options, import the plug-in and call it with them and `injected`, of which it gets what it names.

    Raises PluginError that lists every wrong option, or tells how the plug-in failed.
    """
    signature = schema(kind, package)
    check(signature, options, injected)
    given = {name: value for name, value in injected.items() if name in signature.options}
    plugin = resolve(kind, package)
    try:
        return plugin.build(**options, **given)
    except AgglomError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(
            f"{package} kind {kind!r}: {signature.function}() in {signature.file} failed: {reason}"
        ) from error


def _home(package: str) -> Path:
    return HOME / "agglom" / "core" / "balance.py" if package == "balancers" else HOME / package


def _locate(kind: str, package: str) -> tuple[Path, str]:
    """The file of a plug-in and the name of its function."""
    module, colon, function = kind.partition(":")
    if colon:
        return _module_file(kind, module), function
    if kind.endswith(".py"):
        if not Path(kind).is_file():
            raise PluginError(f"no such file: {kind}")
        return Path(kind), "build"
    known = available(package)
    if kind not in known:
        hint = "package.module:function and path/to/file.py are accepted too"
        raise PluginError(f"{kind!r} is not one of the {package}{_suggest(kind, known)}{_list(known)}; {hint}")
    if package == "balancers":
        return _home(package), kind
    _refuse_foreign(package)
    return _home(package) / f"{kind}.py", "build"


def _refuse_foreign(package: str) -> None:
    """`teachers` and `students` are names that another project may use, too."""
    spec = importlib.util.find_spec(package)
    places = [Path(place).resolve() for place in (spec.submodule_search_locations or [])] if spec else []
    if spec and _home(package).resolve() not in places:
        where = spec.origin or ", ".join(map(str, places))
        raise PluginError(
            f"the Python package {package!r} at {where} is not agglom's ({_home(package)}) and hides it; "
            "take its folder off PYTHONPATH or start from another folder"
        )


def _module_file(kind: str, module: str) -> Path:
    """The file of an importable module, found without importing its parents."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ValueError, ImportError):
        spec = None
    if spec is None:
        raise PluginError(f"{kind!r}: there is no module {top!r} to import; install it or add its folder to PYTHONPATH")
    if not rest:
        candidates = [Path(spec.origin)] if spec.origin else []
    else:
        stems = [Path(place, *rest) for place in spec.submodule_search_locations or []]
        candidates = [path for stem in stems for path in (stem.with_name(stem.name + ".py"), stem / "__init__.py")]
    for path in candidates:
        if path.suffix == ".py" and path.is_file():
            return path
    raise PluginError(f"{kind!r}: found no source file of module {module!r}")


def _import_file(file: Path) -> ModuleType:
    name = f"agglom_plugin_{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise PluginError(f"{file} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@functools.cache
def _parse(kind: str, file: Path, function: str, modified: int) -> Signature:
    """`modified` (ns) makes the cache forget a file that has changed."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise PluginError(f"{file}:{getattr(error, 'lineno', None) or 1}: not Python: {error}") from error
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            break
    else:
        raise PluginError(f"{file}: defines no function {function!r} at its top level")
    names = node.args
    if names.args or names.posonlyargs or names.vararg or names.kwarg:
        raise PluginError(f"{file}:{node.lineno}: {function}() must take keywords only: def {function}(*, …)")
    options = {}
    for argument, default in zip(names.kwonlyargs, names.kw_defaults, strict=True):
        annotation = _source(argument.annotation) or "Any"
        options[argument.arg] = Option(annotation, None if default is None else ast.unparse(default))
    return Signature(kind, file, function, ast.get_docstring(node) or "", options, _source(node.returns))


def _source(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ast.unparse(node) if node is not None else ""


def _accepts(annotation: ast.expr, value: Any) -> bool:
    """Whether a YAML value fits an annotation. What is not a plain type is left to the plug-in."""
    match annotation:
        case ast.Constant(value=None):
            return value is None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _accepts(left, value) or _accepts(right, value)
        case ast.Name(id="bool"):
            return isinstance(value, bool)
        case ast.Name(id="int"):
            return isinstance(value, int) and not isinstance(value, bool)
        case ast.Name(id="float"):
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case ast.Name(id="str" | "Path"):
            return isinstance(value, (str, Path))
        case ast.Name(id="dict" | "Mapping"):
            return isinstance(value, Mapping)
        case ast.Name(id="list" | "tuple" | "Sequence"):
            return isinstance(value, (list, tuple))
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            nodes = choices.elts if isinstance(choices, ast.Tuple) else [choices]
            return value in [ast.literal_eval(node) for node in nodes]
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[*items])):
            if len(items) == 2 and isinstance(items[1], ast.Constant) and items[1].value is ...:
                return isinstance(value, (list, tuple)) and all(_accepts(items[0], item) for item in value)
            fits = isinstance(value, (list, tuple)) and len(value) == len(items)
            return fits and all(_accepts(node, item) for node, item in zip(items, value, strict=True))
        case ast.Subscript(value=ast.Name(id="list" | "Sequence"), slice=item_type):
            return isinstance(value, (list, tuple)) and all(_accepts(item_type, item) for item in value)
        case ast.Subscript(value=origin):
            return _accepts(origin, value)
    return True


def _suggest(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _list(known: Collection[str]) -> str:
    return f"; there are: {', '.join(known)}" if known else "; there are none"
