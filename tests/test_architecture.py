"""The shape of the project: every op has every cell of its row, imports point down, texts agree with each other."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vareid_ext"
ROW = (
    "vareid_ext/reference/{op}.py",
    "csrc/{op}.h",
    "csrc/cpu/{op}.cpp",
    "csrc/cuda/{op}.cu",
    "python/{op}.cpp",
    "tests/test_{op}.py",
    "benchmarks/bench_{op}.py",
)
HEAVY = (
    "timm", "torchvision", "matplotlib", "jinja2", "tensorboard", "PIL", "jsonargparse", "tqdm", "scipy", "wandb",
    "mlflow",
)  # fmt: skip
# Lower layers first; a module may import from its own layer and from those before it.
LAYERS = (
    ("_version", "_interrupt", "_native", "_processes", "_ring", "_arrays", "_text", "_labels", "_limits"),
    ("reference",),
    ("ops",),
    ("losses", "models", "retrieval", "files"),
    ("data", "metrics"),
    ("methods", "recipes"),
    ("training",),
    ("model_card", "trained", "_load"),
    ("report",),
    ("cli", "__main__", "train", "evaluate", "rerank", "doctor"),
)


def ops() -> list[str]:
    return sorted(path.stem for path in (PACKAGE / "ops").glob("*.py") if not path.stem.startswith("_"))


def layer_of(name: str) -> int:
    for level, names in enumerate(LAYERS):
        if name in names:
            return level
    raise AssertionError(f"vareid_ext.{name} belongs to no layer: name it in tests/test_architecture.py")


def imports_of(path: Path) -> set[str]:
    """The first name below vareid_ext of everything a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("vareid_ext.")}
    return found


@pytest.mark.parametrize("op", ops())
def test_every_op_has_its_whole_row(op):
    missing = [cell.format(op=op) for cell in ROW if not (ROOT / cell.format(op=op)).exists()]
    assert not missing


def test_imports_point_down():
    offences = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts == ("__init__",):
            continue
        level = layer_of(parts[0])
        for name in imports_of(path):
            is_module = (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()
            if is_module and layer_of(name) > level:
                offences.append(f"{path.relative_to(ROOT)} imports vareid_ext.{name}")
    assert not offences


def test_only_one_module_imports_the_compiled_one():
    users = [
        p.name for p in PACKAGE.rglob("*.py") if re.search(r"^\s*(import|from)\s+_vareid_native", p.read_text(), re.M)
    ]
    assert users == []
    assert "_vareid_native" in (PACKAGE / "_native.py").read_text()


def test_native_sources_know_neither_python_nor_torch():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert sources
    offences = [
        str(p) for p in sources if re.search(r"#include\s*[<\"](torch|ATen|c10|Python\.h|pybind11)", p.read_text())
    ]
    assert not offences


def test_importing_the_package_is_quiet_and_light():
    """No output, no warnings, nothing beyond torch and numpy: the heavy libraries come with the entry points."""
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import vareid_ext; "
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before}; "
        f"print(sorted(loaded & {set(HEAVY)!r}))"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""


def test_public_names_exist_and_are_documented():
    import vareid_ext

    assert list(vareid_ext.__all__) == sorted(vareid_ext.__all__)
    for name in vareid_ext.__all__:
        value = getattr(vareid_ext, name)
        if callable(value):
            assert value.__doc__, name


def test_no_public_name_hides_an_entry_point():
    import vareid_ext

    entry_points = {path.stem for path in PACKAGE.glob("*.py") if "__main__" in path.read_text()}
    assert not entry_points & set(vareid_ext.__all__)
