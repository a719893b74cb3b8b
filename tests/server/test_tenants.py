"""Several owners on one server: what each keeps counts for it, and nobody learns of what is another's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.server.fixtures import BASE, base_dir, make_adapter
from tests.server.live import Live, error_of, wait_until
from tests.server.tuned import CHATS, QUICK, create, jsonl, tuned, upload, wait_for

from loquetier.config import MIB, EngineConfig
from loquetier.runtime import Runtime
from loquetier.server.auth import KeyRing, Principal, Scope

__all__ = ["base_dir"]

LIMIT = 40_000
KEYS = {
    "ann-key": Principal(id="ann", owner="ann", scopes=frozenset(Scope)),
    "listed-key": Principal(id="listed", owner="ann", scopes=frozenset(Scope), adapters=frozenset({BASE})),
    "other-key": Principal(id="other", owner="ann", scopes=frozenset(Scope), adapters=frozenset({BASE})),
    "bob-key": Principal(id="bob", owner="bob", scopes=frozenset({Scope.INFER, Scope.TRAIN})),
    "small-key": Principal(id="small", owner="small", scopes=frozenset(Scope), storage_bytes=LIMIT),
}
RING = KeyRing(tuple((hashlib.sha256(key.encode()).hexdigest(), who) for key, who in KEYS.items()))
JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture(scope="module")
def root(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("given")
    with Runtime(str(base_dir), config=EngineConfig(dtype="float32", device="cpu", kv_memory=MIB)) as made:
        make_adapter(made, directory / "0", seed=0)
    return directory


@pytest.fixture(scope="module")
def live(base_dir: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with tuned(base_dir, tmp_path_factory.mktemp("data"), RING, "ann-key", adapter_root=root) as found:
        yield found


def as_key(key: str) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {key}"}}


def status_of(live: Live, key: str, model: str) -> int:
    return live.post("/v1/completions", {"model": model, "prompt": "a", "max_tokens": 1}, **as_key(key)).status_code


def listed(live: Live, key: str) -> set[str]:
    return {model["id"] for model in live.http("GET", "/v1/models", **as_key(key)).json()["data"]}


def made_by(live: Live, key: str) -> str:
    """The model of a job that this key has made."""
    client = live.client(api_key=key)
    made = create(client, upload(client), BASE, QUICK)
    return str(wait_for(live, made.id, "succeeded")["fine_tuned_model"])


def test_what_jobs_and_loads_leave_counts_for_the_storage(live: Live) -> None:
    client, key = live.client(api_key="small-key"), as_key("small-key")
    file = upload(client)
    assert live.services.tuning is not None
    store = live.services.tuning.store
    assert store.bytes_of("small") == file.bytes
    made = create(client, file, BASE, QUICK | {"lora": {"r": 16, "alpha": 4}})
    wait_until(lambda: client.fine_tuning.jobs.retrieve(made.id).status == "succeeded", "it has ended", 60)
    model = client.fine_tuning.jobs.retrieve(made.id).fine_tuned_model
    assert model is not None
    places = {v.directory for row in store.adapters.of_job(made.id) for v in store.adapters.versions(row.name)}
    on_disk = sum(f.stat().st_size for place in places for f in (store.data_dir.adapters / place).iterdir())
    assert store.adapters.bytes_of("small") == on_disk > LIMIT, "each directory once, though two names share them"

    with pytest.raises(openai.PermissionDeniedError, match=str(LIMIT)) as refused:
        client.files.create(file=("more.jsonl", jsonl(CHATS[:1])), purpose="fine-tune")
    assert refused.value.code == "insufficient_quota"
    with pytest.raises(openai.PermissionDeniedError, match=str(LIMIT)):
        create(client, file, BASE, QUICK)
    load = {"lora_name": "mine", "lora_path": "0"}
    response = live.post("/v1/load_lora_adapter", load, **key)
    assert response.status_code == 403 and error_of(response)["code"] == "insufficient_quota"
    assert not {path.name for path in store.data_dir.adapters.iterdir()} - store.adapters.directories(), "not copied"

    for name in [m.id for m in client.models.list() if m.id.startswith(model)]:
        assert client.models.delete(name).deleted
    assert store.adapters.bytes_of("small") == 0
    assert live.post("/v1/load_lora_adapter", load, **key).status_code == 200
    assert store.adapters.bytes_of("small") > 0
    upload(client)


def test_a_key_with_a_list_has_the_models_of_its_own_jobs(live: Live) -> None:
    model = made_by(live, "listed-key")
    names = {model, f"{model}:ckpt-step-4"}
    assert names <= listed(live, "listed-key") and names <= listed(live, "ann-key")
    for name in names:
        assert status_of(live, "listed-key", name) == 200
        assert status_of(live, "ann-key", name) == 200, "its owner's key without a list"
        for key in ("other-key", "bob-key"):  # the same owner's with a list of its own; another owner's
            assert status_of(live, key, name) == 404
    assert not names & (listed(live, "other-key") | listed(live, "bob-key"))
    theirs = made_by(live, "ann-key")
    assert status_of(live, "listed-key", theirs) == 404, "not on its list, and not its own"


def test_who_names_anothers_model_learns_nothing(live: Live) -> None:
    model = made_by(live, "ann-key")
    answers = [
        live.post(JOBS, {"model": name, "training_file": "file-x"}, **as_key("bob-key")) for name in (model, "nobody")
    ]
    assert [a.status_code for a in answers] == [404, 404]
    assert answers[0].text.replace(model, "nobody") == answers[1].text
    loads = [
        live.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "0"}, **as_key("small-key"))
        for name in (model, f"{model}:ckpt-step-4", f"{model}:ckpt-step-99", "ft:nobody")
    ]
    assert {error_of(a)["code"] for a in loads} == {"invalid_value"}
    assert all(
        a.text == loads[-1].text.replace("ft:nobody", name)
        for a, name in zip(loads, (model, f"{model}:ckpt-step-4", f"{model}:ckpt-step-99", "ft:nobody"), strict=True)
    )
    mine = live.post(JOBS, {"model": model, "training_file": "file-x"})
    assert mine.status_code == 400 and "only the base" in error_of(mine)["message"]


def test_metrics_name_models_to_the_operator_only(live: Live) -> None:
    model = made_by(live, "ann-key")
    assert status_of(live, "ann-key", model) == 200
    page = live.http("GET", "/metrics")
    assert page.status_code == 200 and model in page.text
    refused = live.http("GET", "/metrics", **as_key("bob-key"))
    assert refused.status_code == 403 and model not in refused.text
