# SPDX-License-Identifier: Apache-2.0
"""One stem per op in every room, and imports that point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from softprompt_fast.backends._registry import OPS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "softprompt_fast"
ROOMS = (
    "softprompt_fast/ops/{}.py",
    "softprompt_fast/reference/{}.py",
    "softprompt_fast/backends/torch/{}.py",
    "softprompt_fast/backends/cpu/{}.py",
    "softprompt_fast/backends/triton/{}.py",
    "tests/ops/test_{}.py",
    "benchmarks/bench_{}.py",
)
FILES = sorted(PACKAGE.rglob("*.py"))

# Modules from the top: each imports from its own line and from those below, never from above.
LAYERS = (
    ("cli",),
    ("demo", "info", "serving", "train", "tune"),
    ("wrap",),
    ("model", "encoder"),
    ("banked", "compiling", "generation", "loading", "passes", "prompted", "scoring", "selection"),
    ("integrations",),
    ("accumulation",),
    (
        "arena",
        "bank",
        "cache",
        "catalogue",
        "expanded",
        "explanation",
        "losses",
        "packed",
        "packing",
        "prefix_kv",
        "prompt",
        "row_layout",
        "rows",
        "spill",
        "tiers",
        "versions",
    ),
    ("nn", "testing"),
    ("ops",),
    ("backends", "reference"),
)
# What any of them may import.
COMMON = ("__init__", "_io", "_version", "errors")


def imports(path: Path, run_time: bool = False) -> set[str]:
    """Absolute names of the modules a file imports; ``run_time``: leaving out what only type checkers see."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    if run_time:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                skipped.update(child for statement in node.body for child in ast.walk(statement))
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = list(path.relative_to(ROOT).with_suffix("").parts)[: -node.level]
                base = ".".join([*parts, base]) if base else ".".join(parts)
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def inside(modules: set[str], *packages: str) -> set[str]:
    return {m for m in modules if any(m == p or m.startswith(p + ".") for p in packages)}


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("op", OPS)
def test_every_op_has_every_room(op: str, room: str) -> None:
    assert (ROOT / room.format(op)).is_file()


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_has_a_stranger(room: str) -> None:
    """A file that is no op's is a helper, and says so with an underscore."""
    folder, pattern = room.rsplit("/", 1)
    stems = {pattern.format(op) for op in OPS}
    prefix = pattern.split("{}", 1)[0]
    found = {p.name for p in (ROOT / folder).glob(f"{prefix}*.py") if not p.name.startswith("_")}
    whole = {f"bench_{name}.py" for name in ("model", "serve", "systems", "train", "train_quality", "vllm")}
    allowed = whole if folder == "benchmarks" else set()
    assert found - allowed == stems


@pytest.mark.parametrize("path", sorted((PACKAGE / "reference").glob("*.py")), ids=lambda p: p.name)
def test_the_reference_imports_torch_alone(path: Path) -> None:
    outside = {m.split(".")[0] for m in imports(path)} - set(sys.stdlib_module_names) - {"torch", "softprompt_fast"}
    assert not outside
    package = inside(imports(path), "softprompt_fast")
    assert package == inside(package, "softprompt_fast.reference")


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "backends").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_no_backend_imports_the_reference_or_above(path: Path) -> None:
    package = inside(imports(path), "softprompt_fast")
    assert package == inside(package, "softprompt_fast.backends", "softprompt_fast._C", "softprompt_fast._version")


def test_every_module_has_its_layer() -> None:
    top = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert top - set(COMMON) == {name for names in LAYERS for name in names}


def layer(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] != "softprompt_fast" or len(parts) < 2:
        return None
    return next((i for i, names in enumerate(LAYERS) if parts[1] in names), None)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if here is None:
        return
    up = {m for m in imports(path, run_time=True) if (other := layer(m)) is not None and other < here}
    assert not up, f"layer {LAYERS[here]} imports from above: {sorted(up)}"


def test_third_parties_stay_in_integrations() -> None:
    """Only integrations (and what runs on top of them) know other libraries' versions."""
    named = {"ops", "backends", "reference", "nn.py", "testing.py"}
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0] in named:
            assert not inside(imports(path), "transformers", "peft", "vllm"), path


def test_import_is_light() -> None:
    """``import softprompt_fast`` loads neither torch's world nor any optional library."""
    heavy = ("torch", "transformers", "peft", "triton", "vllm")
    code = f"import sys, softprompt_fast; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_file_names_its_licence(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n")
