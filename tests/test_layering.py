"""Who may import whom, read from the source with `ast`.

- `accelc/ir` imports nothing of ours but itself.
- `passes`, `codegen` and `runtime` import `accelc.ir` and themselves, never each other or the face: an artifact runs
  without passes and without a compiler.
- Only the face (`accelc/*.py` and its sub-packages other than `ir`) imports all of them.
- Private torch modules (`torch._inductor`, `torch.fx._x`, ...) are imported in `accelc/ir/compat.py` alone, so that a
  new version of torch is one file's work.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPAT = "accelc.ir.compat"
ROOMS = ("passes", "codegen", "runtime")
# Attributes of `torch` that are private modules and can be reached without an import statement.
PRIVATE_ATTRIBUTES = {"_inductor", "_dynamo", "_functorch", "_export", "_subclasses", "_higher_order_ops", "_decomp"}


def sources() -> Iterator[tuple[str, Path]]:
    """Every source file of the package with the module name it is installed under."""
    for folder in ("accelc", *ROOMS):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if folder != "accelc":
                parts = ("accelc", *parts)
            yield ".".join(parts), path


def imported(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that `module` (its dotted name, with `__init__` for packages) imports.

    `from a import b` yields `a.b`: whether b is a module or a name in one, the rules below read the same.
    """
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{prefix}.{alias.name}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if called in {"import_module", "__import__"} and node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)
        elif (
            isinstance(node, ast.Attribute)
            and node.attr in PRIVATE_ATTRIBUTES
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        ):
            yield node.lineno, f"torch.{node.attr}"


def within(name: str, package: str) -> bool:
    """Whether the dotted `name` is `package` or lies in it."""
    return name == package or name.startswith(package + ".")


def violation(module: str, name: str) -> str | None:
    """The rule that `module` breaks by importing `name`, or None."""
    parts = name.split(".")
    if parts[0] == "torch" and module != COMPAT and any(p.startswith("_") and not p.startswith("__") for p in parts):
        return f"private torch modules are imported in {COMPAT} alone"
    if parts[0] in ROOMS:
        return f"import it as accelc.{parts[0]}: the folder's own name is not installed"
    if parts[0] != "accelc":
        return None
    if within(module, "accelc.ir") and not within(name, "accelc.ir"):
        return "accelc.ir imports nothing of ours"
    for room in ROOMS:
        if within(module, f"accelc.{room}") and not within(name, f"accelc.{room}") and not within(name, "accelc.ir"):
            return f"accelc.{room} imports accelc.ir and itself only"
    return None


def test_imports_respect_the_layers() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: imports {name}: {rule}"
        for module, path in sources()
        for line, name in imported(ast.parse(path.read_text(encoding="utf-8")), module)
        if (rule := violation(module, name))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("accelc.ir.program", "from accelc.passes.base import Pass"),
        ("accelc.ir.program", "from ..passes import base"),
        ("accelc.ir.__init__", "import accelc"),
        ("accelc.passes.derive.cut", "from ...runtime import state"),
        ("accelc.codegen.cpu", "def f():\n    import accelc.passes"),
        ("accelc.runtime.step", "from accelc import compile"),
        ("accelc.runtime.step", "import importlib\nimportlib.import_module('accelc.codegen')"),
        ("accelc.runtime.step", "from passes.base import Pass"),
        ("accelc.backend", "from torch._inductor import config"),
        ("accelc.backend", "from torch import _inductor"),
        ("accelc.backend", "import torch\ntorch._inductor.config.freezing = True"),
        ("accelc.ir.capture", "from torch.fx.experimental._config import x"),
    ],
)
def test_each_rule_catches_its_violation(module: str, source: str) -> None:
    assert [rule for _, name in imported(ast.parse(source), module) if (rule := violation(module, name))]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("accelc.ir.compat", "from torch._inductor import config"),
        ("accelc.passes.derive.cut", "from accelc.ir import program\nfrom .roles import want\nfrom ..base import Pass"),
        ("accelc.__init__", "from accelc.passes import manager\nfrom accelc.runtime.step import Step"),
        ("accelc.runtime.step", "import torch\ntorch.ops.aten._weight_int8pack_mm\nfrom torch.fx import Graph"),
    ],
)
def test_allowed_imports_pass(module: str, source: str) -> None:
    assert not [name for _, name in imported(ast.parse(source), module) if violation(module, name)]


def test_sources_cover_every_room() -> None:
    modules = {module for module, _ in sources()}
    assert {"accelc.ir.__init__", *(f"accelc.{room}.__init__" for room in ROOMS)} <= modules
