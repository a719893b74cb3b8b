"""Imports point one way, and the rooms that plan work know no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "loquetier"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "checks", "config", "engine.rows", "failpoints", "cache_dir"),
    ("kernels",),
    ("adapters", "base"),
    ("training",),
    ("engine",),
    (
        "storage",
        "intake",
        "answers",
        "arguments",
        "info",
        "engine_port",
        "generation",
        "reporting",
        "finetuning",
        "checkpointing",
        "virtual",
        "served",
        "runtime",
    ),
    (
        "cli",
        "cli_adapters",
        "cli_bench",
        "cli_client",
        "cli_finetune",
        "cli_jobs",
        "cli_options",
        "cli_serve",
        "cli_validate",
        "cli_view",
        "cli_watch",
        "cli_words",
        "validate_view",
        "doctor",
        "demo",
        "server",
        "bench",
        "cluster",
        "__main__",
        "",
    ),
)
"""Lowest first. A module may import its own layer and those below. The last entry, "", is the package itself."""

TORCHLESS = (
    "loquetier",
    "loquetier.errors",
    "loquetier.config",
    "loquetier.adapters.spec",
    "loquetier.engine.rows",
    "loquetier.engine.scheduler",
    "loquetier.engine.blocks",
    "loquetier.engine.prefix",
    "loquetier.engine.policy",
    "loquetier.engine.residency_policy",
    "loquetier.engine.cost",
    "loquetier.engine.stopping",
)
"""Modules that must stay importable without torch, if they exist."""

TEST_ONLY = frozenset({"pytest", "hypothesis", "peft", "accelerate", "ruff", "mypy", "psutil"})
HEAVY = frozenset({"torch", "transformers", "safetensors"})


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, module: str, is_package: bool) -> set[str]:
    """Absolute names of everything imported anywhere in `source`, inside functions and TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            found.add(base)
            # `from loquetier.engine import rows` imports loquetier.engine.rows.
            found.update(f"{base}.{alias.name}" for alias in node.names if is_module(f"{base}.{alias.name}"))
    return found


def is_module(name: str) -> bool:
    path = SRC.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def layer_of(module: str) -> int | None:
    """Layer of one of our modules, by the longest matching entry; None for an entry we do not know."""
    inner = module.removeprefix("loquetier").removeprefix(".")
    matches = [
        (len(entry), number)
        for number, layer in enumerate(LAYERS)
        for entry in layer
        if inner == entry or (entry and inner.startswith(entry + "."))
    ]
    return max(matches)[1] if matches else None


FILES = sorted(SRC.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    return imported_modules(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 5


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    module = module_name(path)
    own = layer_of(module)
    assert own is not None, f"{module} is in no layer: add its room to LAYERS"
    for imported in imports_of(path):
        if imported == "loquetier" or not imported.startswith("loquetier."):
            continue
        layer = layer_of(imported)
        assert layer is not None, f"{module} imports {imported}, which is in no layer"
        # `from loquetier.engine import rows` also names the package, whose __init__ is empty: the module counts.
        if any(other.startswith(imported + ".") for other in imports_of(path)):
            continue
        assert layer <= own, f"{module} (layer {own}) imports {imported} (layer {layer})"


PEERS = {
    "loquetier.bench.peft_peer",
    "loquetier.bench.peft_long",
    "loquetier.bench.trainer_peer",
    "loquetier.bench.gpu.tuning",
}
"""What a benchmark compares with is imported when it is asked for, with a typed error where it is missing."""


@pytest.mark.parametrize("path", [f for f in FILES if module_name(f) not in PEERS], ids=module_name)
def test_src_imports_no_test_dependency(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports_of(path)} & TEST_ONLY


@pytest.mark.parametrize("module", [m for m in TORCHLESS if is_module(m)])
def test_planning_modules_name_no_torch(module: str) -> None:
    path = SRC.parent.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert not {name.split(".")[0] for name in imports_of(file)} & HEAVY


def test_planning_modules_load_no_torch() -> None:
    """The same for what they import indirectly: only a fresh interpreter can tell."""
    modules = [m for m in TORCHLESS if is_module(m)]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = sorted(set({sorted(HEAVY)!r}) & set(sys.modules))\n"
        "    assert not loaded, f'{name} loads {loaded}'\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SRC.parent)},
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_the_check_catches_an_upward_import() -> None:
    found = imported_modules("def f():\n    from ..engine import runner\n", "loquetier.kernels.cpu", is_package=False)
    assert "loquetier.engine" in found
    assert layer_of("loquetier.kernels.cpu") == 1
    assert layer_of("loquetier.engine.runner") == 4
    assert layer_of("loquetier.engine.rows") == 0
    assert layer_of("loquetier.unheard_of") is None
