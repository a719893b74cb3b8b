"""vLLM's adapter endpoints: bodies, answers, errors; the jail; versions; streams that end on what they began with."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.fixtures import BASE, base_dir, make_adapter, runtime
from tests.server.live import ENGINE, Live, error_of, serving, wait_until

from loquetier.cli import main
from loquetier.runtime import Runtime
from loquetier.server.adapter_desk import jailed
from loquetier.server.problems import ApiError

__all__ = ["base_dir", "runtime"]

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def own(base_dir: Path) -> Iterator[Runtime]:
    from dataclasses import replace

    with Runtime(str(base_dir), config=replace(ENGINE, keep_versions=2)) as made:
        yield made


@pytest.fixture(scope="module")
def root(own: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    make_adapter(own, directory / "one", seed=1)
    make_adapter(own, directory / "two", seed=2)
    return directory


@pytest.fixture(scope="module")
def live(own: Runtime, root: Path) -> Iterator[Live]:
    with serving(own, adapter_root=root) as found:
        yield found


@pytest.fixture(autouse=True)
def _as_found(live: Live) -> Iterator[None]:
    yield
    for info in live.runtime.adapters():
        live.runtime.unload_adapter(info.name)


def say(live: Live, model: str) -> str:
    body = {"model": model, "prompt": "abc", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = live.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_load_answer_and_unload(live: Live, root: Path) -> None:
    loaded = live.post(LOAD, {"lora_name": "a", "lora_path": str(root / "one")})
    assert loaded.status_code == 200 and loaded.headers["content-type"].startswith("text/plain")
    assert loaded.text == "Success: LoRA adapter 'a' added successfully."
    card = live.http("GET", "/v1/models/a").json()
    assert card["root"] == str(root / "one") and card["parent"] == BASE and card["id"] == "a"
    assert say(live, "a") != say(live, BASE)
    gone = live.post(UNLOAD, {"lora_name": "a", "lora_int_id": 1})
    assert gone.status_code == 200 and gone.text == "Success: LoRA adapter 'a' removed successfully."
    assert int(gone.headers["x-loquetier-freed-bytes"]) > 0
    assert live.post("/v1/completions", {"model": "a", "prompt": "x"}).status_code == 404


def test_without_a_root_the_answer_says_how_to_get_one() -> None:
    with pytest.raises(ApiError, match="without --adapter-root DIR"):
        jailed("one", None)


def test_a_path_may_be_relative_to_the_root(live: Live) -> None:
    assert live.post(LOAD, {"lora_name": "a", "lora_path": "one"}).status_code == 200


@pytest.mark.parametrize("body", [{}, {"lora_name": "a"}, {"lora_path": "one"}, {"lora_name": "", "lora_path": "one"}])
def test_missing_fields(live: Live, body: dict[str, str]) -> None:
    response = live.post(LOAD, body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "InvalidUserInput"
    assert error["message"] == "Both 'lora_name' and 'lora_path' must be provided."
    assert live.post(UNLOAD, {}).status_code == 400


def test_loading_a_name_twice(live: Live) -> None:
    body = {"lora_name": "a", "lora_path": "one"}
    assert live.post(LOAD, body).status_code == 200
    again = live.post(LOAD, body)
    assert again.status_code == 400
    assert error_of(again)["message"] == (
        "The lora adapter 'a' has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True."
    )
    assert live.post(LOAD, {"lora_name": BASE, "lora_path": "one"}).status_code == 400, "the base's name"


def test_unloading_what_is_not_there(live: Live) -> None:
    for name in ("nobody", BASE, "../x", "\x00"):
        response = live.post(UNLOAD, {"lora_name": name})
        assert response.status_code == 404
        assert error_of(response)["message"] == f"The lora adapter '{name}' cannot be found."


@pytest.mark.parametrize("name", ["../x", "a..b", "a b", "x" * 200, "a@1", "-a", "a\nb"])
def test_bad_names(live: Live, name: str) -> None:
    response = live.post(LOAD, {"lora_name": name, "lora_path": "one"})
    assert response.status_code == 400
    error_of(response)


def test_row_32_nothing_outside_the_root_is_read(live: Live, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(root / "one", outside)
    (root / "link").symlink_to(outside)
    half = root / "half"
    shutil.copytree(root / "one", half)
    (half / "adapter_model.safetensors").unlink()
    (half / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    os.mkfifo(root / "fifo")
    (root / "empty").mkdir()
    bad = ["/etc", "../outside", str(outside), "link", "half", "fifo", "/dev/zero", "empty", "one\x00", "x" * 9000, "."]
    for path in bad:
        response = live.post(LOAD, {"lora_name": "a", "lora_path": path})
        assert response.status_code == 404, (path, response.text)
        assert "No adapter found" in error_of(response)["message"]
    assert live.http("GET", "/v1/models/a").status_code == 404


def test_without_a_root_nothing_is_loaded(own: Runtime, root: Path) -> None:
    with serving(own) as live:
        assert live.post(LOAD, {"lora_name": "a", "lora_path": str(root / "one")}).status_code == 404


def test_row_32_a_fifo_in_the_directory_does_not_hang(live: Live, root: Path) -> None:
    directory = root / "waits"
    directory.mkdir()
    os.mkfifo(directory / "adapter_config.json")
    response = live.post(LOAD, {"lora_name": "a", "lora_path": "waits"})
    assert response.status_code == 400
    error_of(response)


def test_load_in_place_makes_a_version_and_rollback_brings_the_old_one_back(live: Live) -> None:
    assert live.post(LOAD, {"lora_name": "a", "lora_path": "one"}).status_code == 200
    first = live.http("GET", "/v1/lora_adapters").json()["data"][0]["version"]
    old = say(live, "a")
    replaced = live.post(LOAD, {"lora_name": "a", "lora_path": "two", "load_inplace": True})
    assert replaced.headers["x-loquetier-model-version"] == f"a@{first + 1}"
    new = say(live, "a")
    assert new != old and say(live, f"a@{first}") == old
    assert live.http("GET", f"/v1/models/a@{first}").json()["id"] == f"a@{first}"
    listed = live.http("GET", "/v1/lora_adapters").json()["data"]
    assert {(v["id"], v["live"]) for v in listed} == {(f"a@{first}", False), (f"a@{first + 1}", True)}
    back = live.post("/v1/rollback_lora_adapter", {"lora_name": "a", "version": first})
    assert back.status_code == 200 and back.json()["version"] == first
    assert say(live, "a") == old
    assert live.post("/v1/rollback_lora_adapter", {"lora_name": "a", "version": 99}).status_code == 404
    assert live.post("/v1/rollback_lora_adapter", {"lora_name": "b", "version": 1}).status_code == 404


def test_row_37_streams_end_on_the_version_they_began_with(live: Live) -> None:
    live.post(LOAD, {"lora_name": "a", "lora_path": "one"})
    options: dict[str, Any] = {"model": "a", "prompt": "abc", "max_tokens": 200, "temperature": 0.0}
    options["extra_body"] = {"ignore_eos": True}
    client = live.client(_strict_response_validation=False)
    whole = client.completions.create(**options).choices[0].text
    texts: list[str] = [""] * 8
    begun = threading.Barrier(9, timeout=20)

    def read(number: int) -> None:
        for count, chunk in enumerate(client.completions.create(**options, stream=True)):
            texts[number] += chunk.choices[0].text
            if count == 0:
                begun.wait()

    threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    begun.wait()
    assert live.post(LOAD, {"lora_name": "a", "lora_path": "two", "load_inplace": True}).status_code == 200
    newer = say(live, "a")
    assert live.post(UNLOAD, {"lora_name": "a"}).status_code == 200
    assert live.post("/v1/completions", {"model": "a", "prompt": "x"}).status_code == 404
    for thread in threads:
        thread.join(20)
    assert texts == [whole] * 8
    assert not whole.startswith(newer)
    wait_until(lambda: live.services.port.versions() == (), "both versions are freed")


def test_models_are_listed_base_first(live: Live, root: Path) -> None:
    for name, path in (("math", "one"), ("ft:HuggingFaceTB/SmolLM2-135M:org:x:abc123", "two")):
        assert live.post(LOAD, {"lora_name": name, "lora_path": path}).status_code == 200
    client = live.client()
    assert [m.id for m in client.models.list()] == [BASE, "math", "ft:HuggingFaceTB/SmolLM2-135M:org:x:abc123"]
    one = client.models.retrieve("ft:HuggingFaceTB/SmolLM2-135M:org:x:abc123")
    assert one.id == "ft:HuggingFaceTB/SmolLM2-135M:org:x:abc123" and one.object == "model"
    card = live.http("GET", "/v1/models").json()["data"][0]
    assert card["parent"] is None and card["max_model_len"] == 256 and card["permission"] == []


def test_the_command_line_is_a_client(live: Live, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*argv: str) -> tuple[int, list[str]]:
        with pytest.raises(SystemExit) as caught:
            main(["adapters", *argv, "--url", live.url])
        assert isinstance(caught.value.code, int)
        out, err = capsys.readouterr()
        # The server logs to the same stdout here.
        return caught.value.code, [line for line in (out + err).splitlines() if line.startswith(("fox", "error"))]

    assert run("load", "fox", "one")[0] == 0
    assert run("load", "fox", "two")[0] == 1
    assert run("load", "fox", "two", "--replace")[0] == 0
    code, lines = run("list")
    versions = {line.split()[0]: line.split()[1] == "yes" for line in lines}
    assert code == 0 and versions == {"fox@1": False, "fox@2": True}
    second = say(live, "fox")
    assert run("rollback", "fox") == (0, ["fox@1 answers as fox"]) and say(live, "fox") != second
    assert run("promote", "fox", "2") == (0, ["fox@2 answers as fox"]) and say(live, "fox") == second
    code, lines = run("rollback", "fox", "--to", "9")
    assert code == 1 and lines[0].startswith("error [model_not_found]: version 9 of 'fox'")
    assert run("unload", "fox")[0] == 0
    assert run("unload", "fox") == (1, ["error [adapter_not_found]: The lora adapter 'fox' cannot be found."])
