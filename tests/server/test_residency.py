"""More adapters than memory, over HTTP: answers, pins, the list, the metrics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.server.fixtures import base_dir, make_adapter
from tests.server.live import Live, error_of, serving, wait_until

from loquetier.config import MIB, EngineConfig
from loquetier.runtime import Runtime

__all__ = ["base_dir"]

ENGINE = EngineConfig(dtype="float32", device="cpu", kv_memory=8 * MIB, adapter_memory=MIB, adapter_patience=0.0)
NAMES = [f"org/a:{n}" for n in range(12)]


@pytest.fixture(scope="module")
def live(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("crowd")
    with Runtime(str(base_dir), config=ENGINE) as made:
        for number in range(len(NAMES)):
            make_adapter(made, root / str(number), seed=number, r=32)
        with serving(made, adapter_root=root) as found:
            for number, name in enumerate(NAMES):
                body = {"lora_name": name, "lora_path": str(number)}
                assert found.post("/v1/load_lora_adapter", body).status_code == 200
            yield found


def say(live: Live, model: str) -> tuple[str, str]:
    body = {"model": model, "prompt": "abc", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = live.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"]), answer.headers["x-loquetier-model-version"]


def test_all_answer_though_few_fit(live: Live) -> None:
    first = {name: say(live, name) for name in NAMES}
    again = {name: say(live, name) for name in reversed(NAMES)}
    assert first == again and all(label == f"{name}@1" for name, (_, label) in first.items())
    assert len({text for text, _ in first.values()}) == len(NAMES)
    listed = live.http("GET", "/v1/adapters").json()
    assert [a["id"] for a in listed["data"]] == sorted(NAMES) and not listed["has_more"]
    there = [a["id"] for a in listed["data"] if a["resident"]]
    assert 0 < len(there) < len(NAMES)
    wait_until(lambda: live.http("GET", "/v1/adapters/residency").json().get("num_resident") == len(there), "a beat")
    books = live.http("GET", "/v1/adapters/residency").json()
    assert books["num_registered"] == len(NAMES) and books["loads"] > 0 and books["evictions"] > 0
    assert books["bytes_used"] <= books["bytes_total"] == MIB and books["num_waiting"] == 0
    live.runtime.check_integrity()


def test_the_list_is_paged(live: Live) -> None:
    page = live.http("GET", "/v1/adapters?limit=5").json()
    assert [a["id"] for a in page["data"]] == sorted(NAMES)[:5] and page["has_more"]
    rest = live.http("GET", f"/v1/adapters?limit=100&after={page['data'][-1]['id']}").json()
    assert [a["id"] for a in rest["data"]] == sorted(NAMES)[5:] and not rest["has_more"]
    for bad in ("limit=0", "limit=x", "limit=10001", "after=" + "x" * 200):
        refused = live.http("GET", f"/v1/adapters?{bad}")
        assert refused.status_code == 400 and error_of(refused)["param"] == bad.partition("=")[0]


def test_a_pinned_adapter_stays(live: Live) -> None:
    pinned = live.post("/v1/adapters/pin", {"lora_name": NAMES[3]})
    assert pinned.status_code == 200, pinned.text
    assert pinned.json()["resident"] and pinned.json()["pinned"]
    for name in NAMES:
        say(live, name)
    listed = {a["id"]: a for a in live.http("GET", "/v1/adapters").json()["data"]}
    assert listed[NAMES[3]]["resident"] and listed[NAMES[3]]["pinned"]
    assert not live.post("/v1/adapters/unpin", {"lora_name": NAMES[3]}).json()["pinned"]
    for verb in ("pin", "unpin"):
        refused = live.post(f"/v1/adapters/{verb}", {"lora_name": "nobody"})
        assert refused.status_code == 404 and error_of(refused)["code"] == "model_not_found"
        assert live.post(f"/v1/adapters/{verb}", {"lora_name": 1}).status_code == 400


def test_metrics_name_few_adapters_and_count_all(live: Live) -> None:
    for name in NAMES:
        say(live, name)
    wait_until(lambda: "loquetier:adapters_registered 12.0" in live.http("GET", "/metrics").text, "a beat")
    page = live.http("GET", "/metrics").text
    assert "vllm:lora_requests_info{max_lora=" in page and 'running_lora_adapters="' in page
    resident = [line for line in page.splitlines() if line.startswith("loquetier:resident{")]
    total = sum(float(line.rpartition(" ")[2]) for line in resident)
    assert f"loquetier:adapters_resident {total}" in page
    assert "loquetier:adapter_swap_in_seconds_bucket" in page and "loquetier:adapter_evictions_total" in page


def test_files_that_changed_underneath_are_told_without_their_place(live: Live, base_dir: Path) -> None:
    root = live.services.settings.adapter_root
    assert root is not None
    file = root / "7" / "adapter_model.safetensors"
    good = file.read_bytes()
    for name in NAMES[8:] + NAMES[:7]:
        say(live, name)  # the seventh leaves
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    for _ in range(4):  # not quarantined either: once the files are back it answers
        refused = live.post("/v1/completions", {"model": NAMES[7], "prompt": "abc"})
        assert refused.status_code == 503
        error = error_of(refused)
        assert error["code"] == "adapter_changed" and str(root) not in refused.text
    file.write_bytes(good)
    say(live, NAMES[7])
    assert say(live, NAMES[6])
