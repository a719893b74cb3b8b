"""Loaded adapters outlive the process: names, versions, owners, pins; and belong to who loaded them."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.server.fixtures import BASE, base_dir, make_adapter
from tests.server.live import DEADLINE, Live, error_of, serving, wait_until
from tests.server.tuned import QUICK, create, tuned, upload, wait_for

from loquetier.adapters.packed import PackedAdapter, Packer
from loquetier.config import MIB, EngineConfig
from loquetier.errors import ConfigError
from loquetier.runtime import Runtime
from loquetier.server.adapter_ledger import AdapterLedger
from loquetier.server.auth import KeyRing, Principal, Scope
from loquetier.server.store.store import open_store

__all__ = ["base_dir"]

ENGINE = EngineConfig(
    dtype="float32", device="cpu", kv_memory=8 * MIB, adapter_memory=4 * MIB, keep_versions=2, adapter_patience=0.0
)
KEYS = {
    "ann-key": Principal(id="ann", owner="ann", scopes=frozenset(Scope)),
    "bob-key": Principal(id="bob", owner="bob", scopes=frozenset(Scope)),
    "few-key": Principal(id="few", owner="few", scopes=frozenset(Scope), adapters=frozenset({"few"})),
    "guest-key": Principal(
        id="guest", owner="guest", scopes=frozenset({Scope.INFER}), adapters=frozenset({"a0", BASE})
    ),
}
RING = KeyRing(tuple((hashlib.sha256(key.encode()).hexdigest(), who) for key, who in KEYS.items()))
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def root(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("given")
    config = EngineConfig(dtype="float32", device="cpu", kv_memory=MIB, adapter_memory=MIB)
    with Runtime(str(base_dir), config=config) as made:
        for seed in range(4):
            make_adapter(made, directory / str(seed), seed=seed)
    return directory


@contextmanager
def up(base: Path, data: Path, root: Path) -> Iterator[Live]:
    store = open_store(data)
    runtime = Runtime(str(base), config=ENGINE)
    store.bind(runtime.base_name, runtime.base_fingerprint)
    with serving(runtime, RING, "ann-key", store=store, adapter_root=root) as found:
        yield found


def as_key(key: str) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {key}"}}


def say(live: Live, model: str, key: str = "ann-key") -> tuple[int, str]:
    body = {"model": model, "prompt": "abc", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = live.post("/v1/completions", body, **as_key(key))
    return answer.status_code, answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text


def listed(live: Live, key: str = "ann-key") -> dict[str, dict[str, Any]]:
    return {a["id"]: a for a in live.http("GET", "/v1/adapters", **as_key(key)).json()["data"]}


def load(live: Live, name: str, path: str, **more: Any) -> None:
    answer = live.post(LOAD, {"lora_name": name, "lora_path": path} | more)
    assert answer.status_code == 200, answer.text


def test_after_a_restart_everything_is_there_and_nothing_is_read(base_dir: Path, root: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(root, tmp_path / "own"))
    with up(base_dir, tmp_path / "data", own) as live:
        load(live, "a0", "0")
        load(live, "a1", "1")
        load(live, "a0", "2", load_inplace=True)
        load(live, "gone", "3")
        assert live.post(UNLOAD, {"lora_name": "gone"}).status_code == 200
        assert live.post("/v1/adapters/pin", {"lora_name": "a1"}).status_code == 200
        before = {name: say(live, name) for name in ("a0", "a1", "a0@1")}
        assert len(set(before.values())) == 3 and {status for status, _ in before.values()} == {200}
        assert live.post("/v1/rollback_lora_adapter", {"lora_name": "a0", "version": 1}).status_code == 200
    shutil.rmtree(own)  # what was given is not needed any more: the data directory has a copy
    own.mkdir()
    with up(base_dir, tmp_path / "data", own) as live:
        found = listed(live)
        assert set(found) == {"a0", "a1"} and found["a0"]["version"] == 1 and not found["a0"]["resident"]
        assert found["a1"]["pinned"] and not found["a0"]["pinned"]
        wait_until(lambda: listed(live)["a1"]["resident"], "what is pinned comes in by itself")
        assert say(live, "a0") == before["a0@1"] and say(live, "a0@2") == before["a0"]
        assert say(live, "a1") == before["a1"]
        assert listed(live)["a0"]["resident"]
        shutil.copytree(root / "3", own / "3")
        load(live, "a0", "3", load_inplace=True)
        assert listed(live)["a0"]["version"] == 3, "no number is given to other weights"
        wait_until(lambda: len(list((tmp_path / "data" / "adapters").iterdir())) == 3 + 1, "files of a0 (3) and a1")
        load(live, "a0", "3", load_inplace=True)
        wait_until(lambda: len(list((tmp_path / "data" / "adapters").iterdir())) == 3 + 1, "the oldest is gone")
        assert say(live, "a0@1")[0] == 404
        assert live.post(UNLOAD, {"lora_name": "a0"}).status_code == 200
        wait_until(lambda: len(list((tmp_path / "data" / "adapters").iterdir())) == 1, "its files are gone")


def test_an_adapter_is_its_owners(base_dir: Path, root: Path, tmp_path: Path) -> None:
    with up(base_dir, tmp_path / "data", root) as live:
        load(live, "a0", "0")
        load(live, "a1", "1")
        nobody = say(live, "nobody", "bob-key")
        for name in ("a0", "a0@1", "a1"):
            status, text = say(live, name, "bob-key")
            assert status == 404 and text.replace(name, "nobody") == nobody[1], "as if it were not there"
        assert listed(live, "bob-key") == {}
        ids = [m["id"] for m in live.http("GET", "/v1/models", **as_key("bob-key")).json()["data"]]
        assert ids == [BASE]
        for path, body in (
            (UNLOAD, {"lora_name": "a0"}),
            ("/v1/adapters/pin", {"lora_name": "a0"}),
            ("/v1/adapters/unpin", {"lora_name": "a0"}),
            ("/v1/rollback_lora_adapter", {"lora_name": "a0", "version": 1}),
        ):
            refused = live.post(path, body, **as_key("bob-key"))
            assert refused.status_code == 404 and "a0" in error_of(refused)["message"]
        taken = live.post(LOAD, {"lora_name": "a0", "lora_path": "2", "load_inplace": True}, **as_key("bob-key"))
        assert taken.status_code == 400 and error_of(taken)["code"] == "invalid_value", "not whose, and not what"
        for name, key in (
            ("ft:x:ann::aaaaaaaa", "bob-key"),
            ("ft:x:ann::aaaaaaaa:ckpt-step-2", "ann-key"),
            ("b", "few-key"),
            ("a1", "few-key"),
        ):
            refused = live.post(LOAD, {"lora_name": name, "lora_path": "2"}, **as_key(key))
            assert refused.status_code == 400 and refused.text == taken.text.replace("'a0'", f"'{name}'")
        assert say(live, "a0", "guest-key")[0] == 200, "its key names this one"
        assert say(live, "a1", "guest-key")[0] == 404
        assert say(live, "a0")[0] == 200


def test_what_the_engine_refuses_leaves_no_row_and_no_file(base_dir: Path, root: Path, tmp_path: Path) -> None:
    with up(base_dir, tmp_path / "data", root) as live:
        refused = live.post(LOAD, {"lora_name": BASE, "lora_path": "0"})
        assert refused.status_code == 400
        load(live, "a0", "0")
        torn = Path(shutil.copytree(root / "1", root / "torn"))
        (torn / "adapter_model.safetensors").write_bytes(b"\x00" * 100)
        bad = live.post(LOAD, {"lora_name": "a0", "lora_path": "torn", "load_inplace": True})
        shutil.rmtree(torn)
        assert bad.status_code == 400 and listed(live)["a0"]["version"] == 1
        assert len(list((tmp_path / "data" / "adapters").iterdir())) == 1
        tuning = live.services.tuning
        assert tuning is not None and [row.name for row in tuning.store.adapters.all()] == ["a0"]


def test_the_bases_name_never_gets_a_row(
    base_dir: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even until the engine refuses it: the base would be its owner's, and a 404 for all others, meanwhile."""
    noted: list[Any] = []
    monkeypatch.setattr(AdapterLedger, "_note", lambda *args: noted.append(args))
    with up(base_dir, tmp_path / "data", root) as live:
        refused = live.post(LOAD, {"lora_name": BASE, "lora_path": "0"})
        assert refused.status_code == 400 and "the base's name" in error_of(refused)["message"]
        assert not noted and say(live, BASE, "bob-key")[0] == 200


def test_a_damaged_one_is_told_and_the_others_answer(
    base_dir: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with up(base_dir, tmp_path / "data", root) as live:
        load(live, "a0", "0")
        load(live, "a1", "1")
        tuning = live.services.tuning
        assert tuning is not None
        version = tuning.store.adapters.version("a0")
        assert version is not None
        place = tuning.store.adapters.path(version)
    (place / "adapter_model.safetensors").write_bytes(b"{}")
    with up(base_dir, tmp_path / "data", root) as live:
        assert say(live, "a0")[0] == 404 and say(live, "a1")[0] == 200
        assert live.post(UNLOAD, {"lora_name": "a0"}).status_code == 200, "it can be cleared away"
        load(live, "a0", "0")
        assert say(live, "a0")[0] == 200


def test_a_hundred_come_back_without_their_weights(
    base_dir: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with up(base_dir, tmp_path / "data", root) as live:
        tuning = live.services.tuning
        assert tuning is not None
        for number in range(100):
            tuning.ledger.load(KEYS["ann-key"], f"n{number}", root / str(number % 4), "given")

    def refuse(*_: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Runtime, "read_adapter", refuse)
    with up(base_dir, tmp_path / "data", root) as live:
        assert len(listed(live)) == 100 and live.runtime.stats().adapters_resident == 0
        assert say(live, "n42")[0] == 200 and live.runtime.stats().adapters_resident == 1


class Gate:
    """Holds the reading of weights up until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.opened = threading.Event(), threading.Event()
        read = Packer.read_again

        def wait(packer: Packer, *rest: Any) -> PackedAdapter:
            self.began.set()
            assert self.opened.wait(DEADLINE)
            return read(packer, *rest)

        monkeypatch.setattr(Packer, "read_again", wait)

    def during(self, live: Live, model: str, change: Callable[[], None]) -> tuple[int, str]:
        """What a request on a cold adapter is answered when `change` comes after it was accepted."""
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(say, live, model)
            assert self.began.wait(DEADLINE)
            change()
            self.opened.set()
            return asked.result()


def test_files_stay_until_the_last_request_has_left(
    base_dir: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with up(base_dir, tmp_path / "data", root) as live:
        load(live, "a0", "0")
        before = say(live, "a0")
    with up(base_dir, tmp_path / "data", root) as live:

        def unload() -> None:
            assert live.post(UNLOAD, {"lora_name": "a0"}).status_code == 200
            assert say(live, "a0")[0] == 404

        assert Gate(monkeypatch).during(live, "a0", unload) == before
        wait_until(lambda: not list((tmp_path / "data" / "adapters").iterdir()), "its files are gone")
        load(live, "a0", "1")
        assert say(live, "a0") != before


def test_a_version_that_only_requests_hold_is_not_rolled_back_to(base_dir: Path, root: Path, tmp_path: Path) -> None:
    """Its rows have gone: another version would answer after a restart."""
    back = "/v1/rollback_lora_adapter"
    with up(base_dir, tmp_path / "data", root) as live:
        load(live, "a0", "0")
        held = live.runtime.port.call(lambda engine: engine.registry.acquire("a0")).result()
        for seed in (1, 2, 3):
            load(live, "a0", str(seed), load_inplace=True)
        newest = say(live, "a0")
        assert live.runtime.port.find("a0@1") is held
        refused = live.post(back, {"lora_name": "a0", "version": 1})
        assert refused.status_code == 404 and "load it again" in error_of(refused)["message"]
        assert say(live, "a0") == newest
        live.runtime.port.call(lambda engine: engine.registry.release(held)).result()
        assert live.post(back, {"lora_name": "a0", "version": 2}).status_code == 200
        wait_until(lambda: len(list((tmp_path / "data" / "adapters").iterdir())) == 3, "its files are gone")


def test_so_do_those_of_a_jobs_model(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tuned(base_dir, tmp_path / "data", adapter_root=tmp_path) as live:
        client = live.client()
        job = create(client, upload(client), BASE, QUICK)
        model = wait_for(live, job.id, "succeeded")["fine_tuned_model"]
        old = f"{model}:ckpt-step-4"
        assert listed(live)[old]["resident"] is False, "checkpoints come in when they are asked for"
        taken = live.post(LOAD, {"lora_name": f"{model}:ckpt-step-8", "lora_path": "."})
        assert taken.status_code == 400 and job.id in error_of(taken)["message"]

        def delete() -> None:
            assert live.http("DELETE", f"/v1/models/{old}").status_code == 200
            assert say(live, old)[0] == 404

        places = set((tmp_path / "data" / "adapters").iterdir())
        assert Gate(monkeypatch).during(live, old, delete)[0] == 200
        for name in (model, f"{model}:ckpt-step-2"):
            assert live.post(UNLOAD, {"lora_name": name}).status_code == 200, "vLLM's call forgets it as durably"
        assert [c.step_number for c in client.fine_tuning.jobs.checkpoints.list(job.id)] == [6]
        wait_until(lambda: len(set((tmp_path / "data" / "adapters").iterdir())) < len(places), "some are gone")
    with tuned(base_dir, tmp_path / "data") as live:
        assert set(listed(live)) == {f"{model}:ckpt-step-6"}


def test_adapters_of_the_command_line_are_not_ours(base_dir: Path, root: Path, tmp_path: Path) -> None:
    given = {"math": str(root / "0")}
    store = open_store(tmp_path / "data")
    runtime = Runtime(str(base_dir), adapters=given, config=ENGINE)
    with serving(runtime, RING, "ann-key", store=store, adapter_root=root) as live:
        assert say(live, "math", "bob-key")[0] == 200, "everybody's"
        over = live.post(LOAD, {"lora_name": "math", "lora_path": "1", "load_inplace": True})
        assert over.status_code == 400 and "--adapter" in error_of(over)["message"]
        assert live.post(UNLOAD, {"lora_name": "math"}).status_code == 200
        load(live, "math", "1")
        assert listed(live)["math"]["version"] == 2, "no number is given to other weights"
    store = open_store(tmp_path / "data")
    with Runtime(str(base_dir), adapters=given, config=ENGINE) as runtime:
        with pytest.raises(ConfigError, match="--adapter math"):
            AdapterLedger(store, runtime).open()
        store.close()


def test_without_a_store_adapters_are_in_memory_only(base_dir: Path, root: Path) -> None:
    with Runtime(str(base_dir), config=ENGINE) as runtime, serving(runtime, adapter_root=root) as live:
        load(live, "a0", "0")
        assert say(live, "a0")[0] == 200
        source = live.services.port.versions()[0].source
        assert source == root / "0", "read from where it was given"
