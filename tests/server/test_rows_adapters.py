"""Adapters that lie, over HTTP: each is refused by name, nothing of it runs, and the base answers as before.

Numbers in names are rows of the project's table of hostile inputs; `tests/unit/test_peft_io.py` has many more of each.
"""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.server.fixtures import BASE, base_dir, make_adapter, runtime
from tests.server.live import Live, error_of, serving

from loquetier.runtime import Runtime

__all__ = ["base_dir", "runtime"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def root(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    make_adapter(runtime, directory / "good", seed=1)
    return directory


@pytest.fixture(scope="module")
def live(runtime: Runtime, root: Path) -> Iterator[Live]:
    with serving(runtime, adapter_root=root) as found:
        yield found


@pytest.fixture
def copy(root: Path) -> Iterator[Path]:
    """A good adapter for a test to spoil."""
    directory = root / "copy"
    shutil.copytree(root / "good", directory)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def before(live: Live) -> tuple[str, list[float]]:
    return said(live)


@pytest.fixture(autouse=True)
def _the_base_is_as_before(live: Live, before: tuple[str, list[float]]) -> Iterator[None]:
    yield
    assert said(live) == before, "bit for bit"
    live.runtime.check_integrity()


def said(live: Live) -> tuple[str, list[float]]:
    body = {"model": BASE, "prompt": "abc", "max_tokens": 6, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    choice = live.post("/v1/completions", body).json()["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def refused(live: Live, *names: str) -> str:
    """The 400 of loading the copy, whose message has all of `names`."""
    response = live.post("/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": "copy"})
    assert response.status_code == 400, response.text
    message = str(error_of(response)["message"])
    assert all(name in message for name in names), message
    assert live.http("GET", "/v1/models/bad").status_code == 404
    return message


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_row_33_pickles_are_refused_and_not_run(live: Live, copy: Path, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (copy / name).write_bytes(pickle.dumps(Canary(canary)))
    (copy / WEIGHTS).unlink()
    response = live.post("/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": "copy"})
    assert response.status_code in (400, 404) and "safetensors" in error_of(response)["message"]
    assert not canary.exists()


def test_row_33_pickles_beside_good_weights_are_never_opened(live: Live, copy: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name in ("training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (copy / name).write_bytes(pickle.dumps(Canary(canary)))
    response = live.post("/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": "copy"})
    if response.status_code == 200:
        assert live.post("/v1/unload_lora_adapter", {"lora_name": "bad"}).status_code == 200
    else:
        error_of(response)
    assert not canary.exists()


def header(value: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        header({}, length=2**63),
        header({}, length=100_000_000),
        header(b"not json"),
        header(b'{"a": {}, "a": {}}'),
        header({"a": tensor(0, 4, 1), "b": tensor(0, 4, 1)}, b"\0" * 4),
        header({"a": tensor(0, 4, 1), "b": tensor(8, 12, 1)}, b"\0" * 12),
        header({"a": tensor(0, 4, 1)}, b"\0" * 3),
        header({"a": tensor(0, 4, 1)}, b"\0" * 5),
        header({"a": tensor(0, 0, 0), "b": tensor(0, 0, 0)}),
        header({str(n): tensor(4 * n, 4 * n + 4, 1) for n in range(100_000)}, b"\0" * 400_000),
    ],
    ids=["2^63", "100MB", "no-json", "duplicate", "overlap", "hole", "short", "extra", "zero-size", "many"],
)
def test_row_34_safetensors_that_lie(live: Live, copy: Path, content: bytes) -> None:
    (copy / WEIGHTS).write_bytes(content)
    refused(live)


def edit(copy: Path, change: Callable[[Tensors, str], object]) -> str:
    """Change the tensors; `change` gets the name of the first A. Returns that name."""
    tensors = safetensors.torch.load((copy / WEIGHTS).read_bytes())
    name = next(name for name in sorted(tensors) if ".lora_A." in name)
    change(tensors, name)
    safetensors.torch.save_file(tensors, copy / WEIGHTS)
    return name


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, name: tensors.__setitem__(name, torch.full_like(tensors[name], torch.nan)),
        lambda tensors, name: tensors.__setitem__(name, torch.full_like(tensors[name], torch.inf)),
        lambda tensors, name: tensors.__setitem__(name, torch.zeros(4, 3)),
        lambda tensors, name: tensors.__setitem__(name, torch.zeros(4)),
    ],
    ids=["nan", "inf", "shape", "rank-1"],
)
def test_row_35_bad_tensors_are_named(live: Live, copy: Path, change: Callable[[Tensors, str], object]) -> None:
    refused(live, edit(copy, change))


def test_row_35_a_missing_b_is_named(live: Live, copy: Path) -> None:
    name = edit(copy, lambda tensors, name: tensors.pop(name.replace("lora_A", "lora_B")))
    refused(live, name.replace("lora_A", "lora_B"))


def test_row_35_weights_of_another_base(live: Live, copy: Path) -> None:
    """Its layers are wider, or there are more of them."""
    edit(copy, lambda tensors, name: tensors.__setitem__(name.replace("layers.0", "layers.77"), tensors[name].clone()))
    refused(live, "layers.77")


def configure(copy: Path, **changes: Any) -> None:
    path = copy / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"r": 0}, "r"),
        ({"r": 4096}, "4096"),
        ({"target_modules": ["no_such_proj"]}, "no_such_proj"),
        ({"use_dora": True}, "magnitude_vector"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_alpha": 1e30}, "alpha"),
        ({"lora_alpha": float("nan")}, CONFIG),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_row_35_settings_that_cannot_be_honoured(live: Live, copy: Path, changes: dict[str, Any], named: str) -> None:
    configure(copy, **changes)
    assert named.lower() in refused(live).lower()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type"),
        ({"from_the_future": 1, "peft_version": "0.22.0"}, "from_the_future"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_row_36_a_configuration_that_is_not_loras(live: Live, copy: Path, changes: dict[str, Any], named: str) -> None:
    configure(copy, **changes)
    refused(live, named)


def test_row_36_keys_that_are_not_pefts_are_ignored_with_a_warning(
    live: Live, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    configure(copy, a_note="of its maker")
    answer = live.post("/v1/load_lora_adapter", {"lora_name": "noted", "lora_path": "copy"})
    assert answer.status_code == 200, answer.text
    told = [r.getMessage() for r in caplog.records if "are ignored" in r.getMessage()]
    assert told == ["adapter noted: adapter_config.json has keys that are not PEFT's and are ignored: 'a_note'"]
    assert live.post("/v1/unload_lora_adapter", {"lora_name": "noted"}).status_code == 200


def test_row_36_a_configuration_of_50_mb(live: Live, copy: Path) -> None:
    (copy / CONFIG).write_bytes(b" " * (50 << 20) + (copy / CONFIG).read_bytes())
    refused(live, CONFIG)
