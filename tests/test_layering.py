"""The house: who may import whom, and that an operator is complete."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mmkern"
STANDARD = set(sys.stdlib_module_names) | {"__future__"}
HELPERS = {"_checks", "_distributed", "_library", "layout"}

# Part of the package -> what of mmkern it may import, besides itself.
LAYERS = {
    "nn": {"ops", "layout"},
    "models": {"nn", "ops", "layout"},
    "data": {"layout"},
    "compose": {"data"},
    "train": {"models", "nn", "ops", "data", "compose", "_library"},  # metrics name the backend
    "eval": {"models", "nn", "ops", "data", "compose"},
}


def imports(path: Path, *, inside_functions: bool = True) -> set[str]:
    """Dotted names that a file imports, at its top or anywhere."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if inside_functions else iter(tree.body)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parts(names: set[str]) -> set[str]:
    """Parts of mmkern among dotted names: mmkern.ops.info_nce -> ops."""
    return {name.split(".")[1] for name in names if name.startswith("mmkern.")}


def third_party(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - STANDARD - {"mmkern"}


OPERATORS = sorted(p.parent.name for p in PACKAGE.glob("ops/*/__init__.py"))


@pytest.mark.parametrize("op", OPERATORS)
def test_operator_imports(op: str):
    """A reference that needs triton, or a kernel that calls its reference, proves nothing."""
    folder = PACKAGE / "ops" / op
    assert third_party(imports(folder / "reference.py")) == {"torch"}
    assert parts(imports(folder / "reference.py")) == set()
    assert third_party(imports(folder / "triton.py")) <= {"torch", "triton"}
    assert parts(imports(folder / "triton.py")) <= {"_triton"}
    top = imports(folder / "__init__.py")
    assert third_party(top) == {"torch"}
    assert {name for name in top if name.startswith("mmkern.ops")} == {f"mmkern.ops.{op}.reference"}
    assert parts(top) <= HELPERS | {"ops"}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer: str):
    """A lower part that imports a higher one cannot be used, or understood, alone."""
    files = sorted((PACKAGE / layer).rglob("*.py"))
    assert files
    for path in files:
        allowed = LAYERS[layer] | {layer}
        found = parts(imports(path)) - {"__version__"}
        assert found <= allowed, f"{path.relative_to(ROOT)} imports {found - allowed}"


def test_import_is_light():
    """Importing mmkern must not pull in triton (absent off Linux) or transformers (seconds)."""
    heavy = ("triton", "transformers", "PIL", "sklearn", "matplotlib", "mmkern.cli")
    code = f"import sys, mmkern; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("op", OPERATORS)
def test_operator_is_complete(op: str):
    """An operator touches five places; one without a test or a benchmark makes empty claims."""
    wanted = [
        f"mmkern/ops/{op}/reference.py",
        f"mmkern/ops/{op}/triton.py",
        f"csrc/cpu/{op}.cpp",
        f"tests/ops/test_{op}.py",
        f"benchmarks/ops/{op}.py",
        f"docs/kernels/{op}.md",
    ]
    assert [path for path in wanted if not (ROOT / path).exists()] == []
    from mmkern import ops

    assert op in ops.__all__ and getattr(ops, op).__doc__
