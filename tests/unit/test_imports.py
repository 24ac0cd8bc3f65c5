"""The rules of the design over who may import what, read from the sources without importing them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "agglom").rglob("*.py"))
CORE = {"torch", "einops", "agglom", *sys.stdlib_module_names}
LIGHT = (
    *("config.py", "job.py", "yamls.py", "checks.py", "plan.py", "plugins.py", "errors.py", "licences.py"),
    "cli/__init__.py",
)
PLUGINS = {package: {path.stem for path in (ROOT / package).glob("[!_]*.py")} for package in ("teachers", "students")}


def place(path):
    return path.relative_to(ROOT).as_posix()


def imports(path, inside_functions=True):
    """Absolute names of the modules that a file imports; those in `if TYPE_CHECKING` never count."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not inside_functions:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(path)}:{node.lineno}: relative import"
            found.update({node.module} | {f"{node.module}.{alias.name}" for alias in node.names})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def top(modules):
    return {module.partition(".")[0] for module in modules}


@pytest.mark.parametrize("path", sorted((ROOT / "agglom" / "core").glob("*.py")), ids=place)
def test_core_imports_torch_einops_the_standard_library_and_itself(path):
    modules = imports(path)
    assert top(modules) <= CORE
    inner = {module for module in modules if module.startswith("agglom")} - {"agglom", "agglom.core"}
    assert all(module.startswith("agglom.core.") for module in inner)
    assert not any(module.startswith("torch.distributed") for module in modules)


@pytest.mark.parametrize("path", SOURCES, ids=place)
def test_the_engine_alone_imports_deepspeed(path):
    assert place(path) == "agglom/engine.py" or "deepspeed" not in top(imports(path))


@pytest.mark.parametrize("path", SOURCES, ids=place)
def test_agglom_names_no_concrete_teacher_or_student(path):
    modules = imports(path)
    assert not top(modules) & set(PLUGINS), "plug-ins are found by their kind"
    text = path.read_text(encoding="utf-8")
    dotted = [f"{package}.{stem}" for package, stems in PLUGINS.items() for stem in stems]
    assert not [name for name in dotted if f"{name}:" in text or f'"{name}' in text]


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parent.parent.name != "agglom"], ids=place)
def test_imports_at_the_top_of_a_light_module_are_light(path):
    if path.relative_to(ROOT / "agglom").as_posix() in LIGHT:
        heavy = {"torch", "timm", "open_clip", "transformers", "deepspeed", "pandas", "torchmetrics"}
        assert not top(imports(path, inside_functions=False)) & heavy


@pytest.mark.parametrize("name", ["config", "plan", "cli"])
def test_a_wrong_configuration_is_answered_without_torch(name):
    """By running it, so that what is imported through others counts."""
    command = f"import sys, agglom.{name}; print(*sorted({{'torch', 'deepspeed', 'pandas'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("package", sorted(PLUGINS))
def test_a_plug_in_does_not_reach_into_the_shell(package):
    """Dependencies point one way: nouns and pure functions, errors, and what loads weights are all it may use."""
    for path in (ROOT / package).glob("*.py"):
        inner = {module for module in imports(path) if module.startswith("agglom.")}
        assert all(
            module.startswith(("agglom.core", "agglom.errors", "agglom.exported", "agglom.weights")) for module in inner
        ), path
