"""One tiny runtime and one server for the tests that leave both as they found them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.server.live import ENGINE, Live, serving
from tests.tiny import save_tiny

from loquetier.adapters.peft_write import write_adapter
from loquetier.adapters.spec import LoraSpec, resolve_modules
from loquetier.runtime import Runtime

BASE = "tiny-base"


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("server") / BASE
    save_tiny(directory, "llama", vocab=260)
    return directory


def make_adapter(runtime: Runtime, directory: Path, *, seed: int, std: float = 0.3, r: int = 4) -> Path:
    """A PEFT directory with random factors, large enough to change what is said."""
    spec = LoraSpec(r=r)
    modules = resolve_modules(spec, runtime._engine.base.targets)
    g = torch.Generator().manual_seed(seed)
    factors: dict[str, Any] = {
        m.target.path: (
            std * torch.randn(m.rank, m.target.in_features, generator=g),
            std * torch.randn(m.target.out_features, m.rank, generator=g),
        )
        for m in modules
    }
    write_adapter(directory, spec=spec, modules=modules, factors=factors, base_name=runtime.base_name)
    return directory


@pytest.fixture(scope="module")
def runtime(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with Runtime(str(base_dir), config=ENGINE) as made:
        made.load_adapter("math", make_adapter(made, tmp_path_factory.mktemp("a") / "math", seed=1))
        made.load_adapter("org/x:y", make_adapter(made, tmp_path_factory.mktemp("a") / "other", seed=2))
        yield made


@pytest.fixture(scope="module")
def live(runtime: Runtime) -> Iterator[Live]:
    with serving(runtime) as found:
        yield found
