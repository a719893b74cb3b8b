"""`loquetier adapters export`: a data directory's adapters as PEFT directories, with a server beside it or without."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from loquetier.adapters.peft_copy import copy_adapter
from loquetier.adapters.peft_io import read_adapter
from loquetier.adapters.peft_write import WEIGHTS_NAME, write_adapter
from loquetier.adapters.spec import LinearTarget, LoraSpec, resolve_modules
from loquetier.cli import main
from loquetier.errors import AdapterError
from loquetier.server.store.adapters import VersionRow
from loquetier.server.store.datadir import DATABASE
from loquetier.server.store.store import Store, open_store

TARGETS = tuple(
    LinearTarget(index=i, path=f"model.layers.{i}.self_attn.q_proj", layer=i, in_features=8, out_features=8)
    for i in range(2)
)


def write(directory: Path, seed: int, spec: LoraSpec) -> str:
    modules = resolve_modules(spec, TARGETS)
    g = torch.Generator().manual_seed(seed)
    factors = {
        m.target.path: (torch.randn(m.rank, 8, generator=g), torch.randn(8, m.rank, generator=g)) for m in modules
    }
    return write_adapter(directory, spec=spec, modules=modules, factors=factors, base_name="tiny")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Adapter "fox" with versions 1 ("all-linear") and 2 (a list of names), the first one live."""
    opened = open_store(tmp_path / "data")
    with opened.write() as c:
        opened.know(c, "me", "key")
        opened.adapters.create(c, "fox", "me", "loaded", "/x")
    for number, spec in ((1, LoraSpec(r=2)), (2, LoraSpec(r=4, target_modules=("q_proj",)))):
        digest = write(tmp_path / f"v{number}", number, spec)
        place = opened.adapters.place(tmp_path / f"v{number}").name
        with opened.write() as c:
            opened.adapters.add(c, VersionRow("fox", number, digest, place, 1, 1), live=number == 1)
    yield opened
    opened.close()


def export(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["adapters", "export", *argv])
    assert isinstance(caught.value.code, int)
    out = capsys.readouterr()
    return caught.value.code, out.out, out.err


@pytest.mark.parametrize("is_running", [True, False])
def test_what_is_exported_is_what_was_kept(
    is_running: bool, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(store.data_dir.root)
    if not is_running:
        store.close()
    before = sorted(str(p) for p in store.data_dir.root.rglob("*") if not p.name.endswith(("-wal", "-shm")))
    assert export(capsys, "fox", str(tmp_path / "a" / "live"), "--data-dir", data)[:2] == (
        0,
        f"fox@1 is in {tmp_path / 'a' / 'live'}\n",
    )
    assert export(capsys, "fox@2", str(tmp_path / "two"), "--data-dir", data)[0] == 0
    for exported, original in ((tmp_path / "a" / "live", "v1"), (tmp_path / "two", "v2")):
        ours, theirs = read_adapter(exported, TARGETS), read_adapter(tmp_path / original, TARGETS)
        assert ours.digest == theirs.digest and ours.spec == theirs.spec
        assert {p.name: p.read_bytes() for p in exported.iterdir()} == {
            p.name: p.read_bytes() for p in (tmp_path / original).iterdir()
        }
    assert before == sorted(str(p) for p in store.data_dir.root.rglob("*") if not p.name.endswith(("-wal", "-shm")))


def test_what_is_not_there(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = str(store.data_dir.root), str(tmp_path / "out")
    for name in ("wolf", "fox@7", "wolf@1"):
        code, _, err = export(capsys, name, out, "--data-dir", data)
        assert code == 1 and "error [model_not_found]" in err and "adapters there: fox" in err
    code, _, err = export(capsys, "fox@x", out, "--data-dir", data)
    assert code == 1 and "NAME@NUMBER" in err
    code, _, err = export(capsys, "fox", out, "--data-dir", str(tmp_path))
    assert code == 1 and "is no data directory" in err
    assert not Path(out).exists() and not list(tmp_path.glob(".out*"))


def test_a_place_that_is_taken_stays_as_it_is(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(store.data_dir.root)
    assert export(capsys, "fox@2", str(tmp_path / "v1"), "--data-dir", data)[0] == 1
    assert read_adapter(tmp_path / "v1", TARGETS).spec.r == 2
    assert export(capsys, "fox@2", str(tmp_path / "v1"), "--data-dir", data, "--overwrite")[0] == 0
    assert read_adapter(tmp_path / "v1", TARGETS).spec.r == 4


def test_damaged_weights_are_not_handed_out(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version = store.adapters.version("fox")
    assert version is not None
    weights = store.adapters.path(version) / WEIGHTS_NAME
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, err = export(capsys, "fox", str(tmp_path / "out"), "--data-dir", str(store.data_dir.root))
    assert code == 1 and "is damaged" in err and not list(tmp_path.glob("*out*"))
    weights.unlink()
    code, _, err = export(capsys, "fox", str(tmp_path / "out"), "--data-dir", str(store.data_dir.root))
    assert code == 1 and "does not exist" in err


def test_changed_settings_are_damage_too(tmp_path: Path) -> None:
    digest = write(tmp_path / "a", 1, LoraSpec(r=2, alpha=4))
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    with pytest.raises(AdapterError, match="is damaged"):
        copy_adapter(tmp_path / "a", tmp_path / "b", digest)


def test_another_release_has_written_it(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store.close()
    database = store.data_dir.root / DATABASE
    for version, way in ((0, "start the server"), (999, "newer release")):
        with closing(sqlite3.connect(database)) as connection:
            connection.execute(f"PRAGMA user_version={version}")
        code, _, err = export(capsys, "fox", str(tmp_path / "out"), "--data-dir", str(store.data_dir.root))
        assert code == 1 and way in err
    database.write_bytes(b"not a database" * 100)
    code, _, err = export(capsys, "fox", str(tmp_path / "out"), "--data-dir", str(store.data_dir.root))
    assert code == 1 and "cannot be read" in err
