"""The house itself: imports point down, nothing heavy comes in by the door, and the public names
are what they say."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_ranks

import lightning_normdyn

ROOT = Path(lightning_normdyn.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# Folders from the ground up. A module imports from its own folder and from lower floors only,
# whatever form the import has: at the top, inside a function or under TYPE_CHECKING. Rooms on one
# floor do not know each other.
FLOORS = {
    "errors": -1, "functional": 0, "steering": 0, "storage": 0, "tables": 0, "parametrizations": 0,
    "geometry": 1,
    "optimizers": 2,
    "invariance": 3,
    "theory": 4,
    "lr_schedules": 5, "engine": 5,
    "monitor": 6, "input_span": 7,
    "metrics": 8, "callbacks": 8,
    # Short paths to modules that people use directly. Nothing inside the package imports them.
    "equilibrium": 9, "history": 9, "plots": 9, "report": 9, "targets": 9, "workspace": 9,
    "__init__": 10, "__main__": 10,
}  # fmt: skip
# The one file that knows Lightning by name, or rather by both of its names.
KNOWS_LIGHTNING = ROOT / "engine" / "flavours.py"
HEAVY = {
    "wandb",
    "wandb_workspaces",
    "matplotlib",
    "sklearn",
    "deepspeed",
    "rich",
    "scipy",
    "tensorboard",
    "torchmetrics",
}


def room(path: Path) -> str:
    """The top-level part of the package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(node: ast.AST, package: str) -> list[str]:
    """Names of the modules that a statement imports, in a file of ``package`` (a dotted name)."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        # Relative within a room, absolute across rooms: one sees what crosses.
        assert node.level <= 1, "imports from other rooms are absolute"
        if node.level:
            assert package != "lightning_normdyn", "imports on the top floor are absolute"
            module = f"{package}.{module}".removesuffix(".")
        else:
            assert package == "lightning_normdyn" or not f"{module}.".startswith(f"{package}."), (
                f"{module} is in the same room: import it relatively"
            )
        if module in ("lightning_normdyn", package):
            return [f"{module}.{alias.name}" for alias in node.names]
        return [module]
    return []


@functools.cache
def nodes_of(path: Path) -> tuple[list[ast.AST], list[ast.AST]]:
    """All nodes of a file, and those among them that run when it is imported: neither inside a
    function nor under TYPE_CHECKING. Half a dozen tests ask for each file's, so it is read and
    walked once."""
    everywhere, on_top = [], []
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    left: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text(encoding="utf-8")), True)]
    while left:
        node, runs = left.pop()
        never_runs = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, functions) or never_runs:
            runs = False
        everywhere.append(node)
        if runs:
            on_top.append(node)
        left += [(child, runs) for child in ast.iter_child_nodes(node)]
    return everywhere, on_top


@functools.cache
def imports(path: Path, *, top_level: bool = False) -> list[str]:
    """Names of the modules that a file imports, in whatever form; with ``top_level`` only those
    that run with it."""
    everywhere, on_top = nodes_of(path)
    package = ".".join(("lightning_normdyn", *path.relative_to(ROOT).parts[:-1]))
    names = []
    for node in on_top if top_level else everywhere:
        names += imported(node, package)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    here = room(path)
    assert here in FLOORS, f"{here} has no floor yet"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "lightning_normdyn" and len(parts) > 1 and parts[1] in FLOORS:
            below = FLOORS[parts[1]] < FLOORS[here] or parts[1] == here
            assert below, f"{here} imports {name}"
        if parts[0] in ("lightning", "pytorch_lightning", "lightning_fabric"):
            assert path == KNOWS_LIGHTNING, f"{path.name} imports {name}"


def test_no_circles_among_modules():
    graph = {
        ".".join(("lightning_normdyn", *p.relative_to(ROOT).with_suffix("").parts)): p
        for p in MODULES
        if p.name != "__init__.py"
    }
    below = {
        name: {i for i in imports(path) if i in graph and i != name} for name, path in graph.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in below[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in below:
        visit(name, ())


TESTS = Path(__file__).parent
TEST_FILES = sorted(TESTS.rglob("*.py"))
TEST_MODULES = {p.stem for p in TEST_FILES if p.stem.startswith("test_")}


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda p: str(p.relative_to(TESTS)))
def test_no_test_module_imports_another(path):
    """What several test modules use is a helper: tests/models.py, tests/cases.py, ..."""
    everywhere, _ = nodes_of(path)
    names = set()
    for node in everywhere:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update([node.module or "", *(alias.name for alias in node.names)])
    assert not {name.split(".")[-1] for name in names} & TEST_MODULES


# Short paths hold nothing but imports; test_public_names and the tests of their homes cover them.
SHORT_PATHS = {name for name, floor in FLOORS.items() if floor == FLOORS["plots"]}


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if p != ROOT / "__init__.py"],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_own_modules_are_imported_at_the_top(path):
    """An import inside a function or under TYPE_CHECKING hides a circle."""
    own = [name for name in imports(path) if name.startswith("lightning_normdyn")]
    on_top = [
        name for name in imports(path, top_level=True) if name.startswith("lightning_normdyn")
    ]
    assert sorted(own) == sorted(on_top)


LONGEST = 500


def test_a_file_of_many_lines_says_why_at_its_top():
    silent = []
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        reason = f"{LONGEST} lines"
        if len(text.splitlines()) > LONGEST and reason not in ast.get_docstring(ast.parse(text)):
            silent.append(str(path.relative_to(ROOT)))
    assert not silent


def test_every_file_has_its_test_file():
    missing = []
    for path in MODULES:
        below = path.relative_to(ROOT)
        is_short_path = len(below.parts) == 1 and below.stem in SHORT_PATHS
        if path.name == "__init__.py" or is_short_path:
            continue
        mirror = TESTS / below.with_name(f"test_{below.stem.strip('_')}.py")
        if not mirror.exists():
            missing.append(str(below))
    assert not missing


@pytest.mark.parametrize(
    "path", [p for p in MODULES if room(p) == "callbacks"], ids=lambda p: p.name
)
def test_callbacks_never_import_each_other(path):
    others = {p.stem for p in MODULES if room(p) == "callbacks"} - {"__init__", path.stem}
    if path.stem not in ("__init__",):
        assert not [
            n
            for n in imports(path)
            if n.split(".")[-1] in others and n.startswith("lightning_normdyn.callbacks")
        ]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_are_imported_where_they_are_used(path):
    found = {name.split(".")[0] for name in imports(path, top_level=True)} & HEAVY
    assert found <= ({"torchmetrics"} if room(path) == "metrics" else set())


MAKES_A_TENSOR = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace",
    "logspace", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_tensor_that_is_made_names_its_dtype_and_device(path):
    """A user may have set another default dtype or device for the whole process."""
    silent = []
    everywhere, _ = nodes_of(path)
    for node in everywhere:
        if not (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            continue
        if node.func.value.id != "torch" or node.func.attr not in MAKES_A_TENSOR:
            continue
        missing = {"dtype", "device"} - {keyword.arg for keyword in node.keywords}
        if missing:
            silent.append(
                f"line {node.lineno}: torch.{node.func.attr} names no "
                f"{' and no '.join(sorted(missing))}"
            )
    assert not silent


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_import_brings_neither_wandb_nor_pyplot():
    heavy = {"wandb", "matplotlib.pyplot", "sklearn", "deepspeed", "rich", "plotly", "triton"}
    code = f"import sys, lightning_normdyn; print(sorted({heavy} & set(sys.modules)))"
    assert run(code) == "[]"


BRINGS_NOTHING_OF = {"wandb", "matplotlib", "sklearn", "deepspeed", "plotly"}


def test_the_callbacks_bring_nothing_heavy():
    """In a fork of this process, which has Lightning: to start one and import it takes seconds."""

    def brought() -> list[str]:
        # Lightning brings Matplotlib where it is installed: what it brings must be there before.
        importlib.import_module("lightning.pytorch")
        for name in list(sys.modules):
            if name.split(".")[0] in BRINGS_NOTHING_OF | {"lightning_normdyn"}:
                del sys.modules[name]
        package = importlib.import_module("lightning_normdyn")
        for name in package.__all__:
            getattr(package, name)
        assert "lightning_normdyn.callbacks.norm_dynamics_monitor" in sys.modules
        return sorted(BRINGS_NOTHING_OF & set(sys.modules))

    assert run_ranks(brought, world=1)[0] == []


@pytest.mark.slow
def test_the_callbacks_bring_no_more_than_lightning_does():
    code = (
        "import sys, lightning.pytorch; before = set(sys.modules); {}; "
        "print(sorted({{'wandb', 'matplotlib.pyplot', 'sklearn', 'plotly', 'triton'}} & (set(sys.modules) "
        "- before)))"
    )
    names = ", ".join(lightning_normdyn.__all__)
    assert run(code.format(f"from lightning_normdyn import {names}")) == "[]"


def test_public_names_are_sorted_and_there():
    assert lightning_normdyn.__all__ == sorted(lightning_normdyn.__all__)
    for name in lightning_normdyn.__all__:
        assert getattr(lightning_normdyn, name).__module__.startswith("lightning_normdyn.")
    assert set(lightning_normdyn.__all__) <= set(dir(lightning_normdyn))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = lightning_normdyn.Nothing


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_all_is_sorted_and_true(path):
    name = ".".join(
        ("lightning_normdyn", *path.relative_to(ROOT).with_suffix("").parts)
    ).removesuffix(".__init__")
    if name.endswith("__main__"):
        return
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", [])
    assert list(listed) == sorted(listed)
    assert all(hasattr(module, n) for n in listed)


def test_the_version_is_one_string():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.\w+)?", lightning_normdyn.__version__)
    assert (ROOT / "py.typed").exists()
