"""``/v1/fine_tuning/jobs`` with the official SDK, strict: to success on chat data, and to a job's other ends."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import FileObject
from tests.server.fixtures import BASE, base_dir
from tests.server.live import DEADLINE, Live, error_of, wait_until
from tests.server.tuned import (
    CHATS,
    LONG,
    QUICK,
    create,
    job_of,
    jsonl,
    say,
    tuned,
    upload,
    wait_for,
    wait_for_step,
)  # fmt: skip

from loquetier.errors import InsufficientStorageError
from loquetier.server.auth import KeyRing, Principal, Scope
from loquetier.server.jobs.keeper import Keeper

__all__ = ["base_dir"]

KEYS = {
    "ann-key": Principal(id="ann", owner="ann", scopes=frozenset(Scope)),
    "bob-key": Principal(id="bob", owner="bob", scopes=frozenset(Scope), jobs=1),
    "infer-key": Principal(id="i", owner="ann", scopes=frozenset({Scope.INFER})),
}
RING = KeyRing(tuple((hashlib.sha256(key.encode()).hexdigest(), who) for key, who in KEYS.items()))
JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture(scope="module")
def live(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with tuned(base_dir, tmp_path_factory.mktemp("data"), RING, "ann-key") as found:
        yield found


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    return live.client()


@pytest.fixture(scope="module")
def file(live: Live) -> FileObject:
    return upload(live.client())


@pytest.fixture(autouse=True)
def _every_job_ends(live: Live) -> Iterator[None]:
    yield
    for key in ("ann-key", "bob-key"):
        headers = bearer(key)
        for job in live.http("GET", f"{JOBS}?limit=100", headers=headers).json()["data"]:
            if job["status"] not in ("succeeded", "failed", "cancelled"):
                live.http("POST", f"{JOBS}/{job['id']}/cancel", headers=headers)
    tuning = live.services.tuning
    assert tuning is not None
    wait_until(lambda: not tuning.running.num_running, "every job has ended")
    live.runtime.check_integrity()
    tuning.store.check_integrity()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def messages(client: openai.OpenAI, job_id: str) -> list[str]:
    """Oldest first."""
    return [e.message for e in client.fine_tuning.jobs.list_events(job_id, limit=100)][::-1]


def test_a_job_to_success(live: Live, client: openai.OpenAI, file: FileObject) -> None:
    held_out = upload(client, jsonl(CHATS[:3]))
    extra = QUICK | {"training": QUICK["training"] | {"eval_every": 3}}
    options: Any = {"suffix": "my-suffix", "seed": 7, "metadata": {"team": "x"}, "validation_file": held_out.id}
    made = create(client, file, BASE, extra, **options)
    assert made.object == "fine_tuning.job" and made.id.startswith("ftjob-") and made.status == "validating_files"
    wait_for(live, made.id, "succeeded")
    job = client.fine_tuning.jobs.retrieve(made.id)
    short = made.id[6:14]
    assert job.fine_tuned_model == f"ft:{BASE}:ann:my-suffix:{short}" and job.organization_id == "org-ann"
    assert job.hyperparameters.n_epochs == 9 and job.hyperparameters.batch_size == 4
    assert job.hyperparameters.learning_rate_multiplier == pytest.approx(50)
    assert job.method is not None and job.method.supervised is not None and job.method.type == "supervised"
    assert job.seed == 7 and job.metadata == {"team": "x"} and job.error is None
    assert job.finished_at is not None and job.finished_at >= job.created_at
    shown = job_of(live, made.id)
    assert (
        shown["lora"]["r"] == 2 and shown["training"]["max_steps"] == 6 and shown["live_model"] == job.fine_tuned_model
    )

    told = messages(client, made.id)
    assert told[:5] == [
        f"Created fine-tuning job: {made.id}",
        f"Validating training file: {file.id} and validation file: {held_out.id}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        told[4],
    ]
    steps = [e for e in client.fine_tuning.jobs.list_events(made.id) if e.type == "metrics"][::-1]
    assert [e.data["step"] for e in steps] == [1, 2, 3, 4, 5, 6]  # type: ignore[index]
    losses = [e.data["train_loss"] for e in steps]  # type: ignore[index]
    assert steps[0].message == f"Step 1/6: training loss={losses[0]:.2f}" and losses[-1] < losses[0]
    valid = [e.data["step"] for e in steps if "full_valid_loss" in e.data]  # type: ignore[operator, index]
    assert valid == [3, 6]
    assert told[-2:] == [f"New fine-tuned model created: {job.fine_tuned_model}", "The job has successfully completed"]

    rows = client.files.content(job.result_files[0]).text.splitlines()
    assert rows[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [float(row.split(",")[1]) for row in rows[1:]] == losses
    assert client.files.retrieve(job.result_files[0]).purpose == "fine-tune-results"

    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(made.id))
    assert [c.step_number for c in checkpoints] == [6, 4, 3], "the newest three; that of step 3 is the best so far"
    assert checkpoints[0].metrics.full_valid_loss is not None and checkpoints[1].metrics.train_loss == losses[3]
    assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
    last, first = (checkpoints[n].fine_tuned_model_checkpoint for n in (0, 2))
    assert last == f"{job.fine_tuned_model}:ckpt-step-6"
    assert say(live, job.fine_tuned_model) == say(live, last) != say(live, BASE)
    assert say(live, first) != say(live, last)
    assert {job.fine_tuned_model, first, last} <= {m.id for m in client.models.list()}


def test_a_checkpoint_waits_until_it_is_kept(
    live: Live, client: openai.OpenAI, file: FileObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far the job is ahead of who keeps its checkpoints, none is lost."""
    go_on, keep = threading.Event(), Keeper.keep_checkpoint

    def late(*rest: Any, **more: Any) -> None:
        assert go_on.wait(60)
        keep(*rest, **more)

    monkeypatch.setattr(Keeper, "keep_checkpoint", late)
    made = create(client, file, BASE, QUICK)
    tuning = live.services.tuning
    assert tuning is not None
    wait_until(lambda: tuning.running.handle(made.id) is not None, "it has begun")
    handle = tuning.running.handle(made.id)
    assert handle is not None
    handle.wait(60)
    assert not list(client.fine_tuning.jobs.checkpoints.list(made.id))
    go_on.set()
    wait_for(live, made.id, "succeeded")
    assert [c.step_number for c in client.fine_tuning.jobs.checkpoints.list(made.id)] == [6, 4, 2]


def test_auto_becomes_numbers(live: Live, client: openai.OpenAI, file: FileObject) -> None:
    hyper: Any = {"n_epochs": 1, "batch_size": "auto", "learning_rate_multiplier": 2}
    made = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, hyperparameters=hyper)
    assert made.hyperparameters.batch_size == "auto"
    wait_for(live, made.id, "succeeded")
    done = client.fine_tuning.jobs.retrieve(made.id)
    assert done.hyperparameters.batch_size == 1 and done.hyperparameters.n_epochs == 1
    assert job_of(live, made.id)["training"]["learning_rate"] == pytest.approx(4e-4)
    assert len(client.files.content(done.result_files[0]).text.splitlines()) == 1 + len(CHATS)
    assert done.trained_tokens is not None and done.trained_tokens > 0


def test_pause_resume_and_cancel(live: Live, client: openai.OpenAI, file: FileObject) -> None:
    lenient = live.client(_strict_response_validation=False)  # "paused" is in SPEC's example, not in its enum
    made = create(client, file, BASE, LONG)
    wait_for_step(live, made.id, 2)
    shown = job_of(live, made.id)
    assert shown["status"] == "running" and shown["estimated_finish"] > made.created_at
    assert say(live, shown["live_model"]), "the adapter in training answers"
    assert lenient.fine_tuning.jobs.pause(made.id).status == "paused"  # type: ignore[comparison-overlap]
    refused = live.http("POST", f"{JOBS}/{made.id}/pause")
    assert refused.status_code == 400 and refused.headers["x-should-retry"] == "false"
    assert error_of(refused)["code"] == "invalid_job_state"
    at = len(live.services.tuning.running.handle(made.id).history)  # type: ignore[union-attr]
    assert client.fine_tuning.jobs.resume(made.id).status == "running"
    wait_until(lambda: len(live.services.tuning.running.handle(made.id).history) > at, "it goes on")  # type: ignore[union-attr]
    assert live.http("POST", f"{JOBS}/{made.id}/resume").status_code == 400
    assert client.fine_tuning.jobs.cancel(made.id).status == "cancelled"
    for verb in ("pause", "resume", "cancel"):
        assert live.http("POST", f"{JOBS}/{made.id}/{verb}").status_code == 400
    wait_until(lambda: live.services.tuning.running.handle(made.id) is None, "it has ended")  # type: ignore[union-attr]
    told = messages(client, made.id)
    changes = [m for m in told if m.startswith("The job was")]
    assert changes == ["The job was paused", "The job was resumed", "The job was cancelled"]
    checkpoint = client.fine_tuning.jobs.checkpoints.list(made.id).data[0]
    assert say(live, checkpoint.fine_tuned_model_checkpoint), "what was trained until then answers"


def test_row_31_a_change_by_twenty_clients_at_once_happens_once(
    live: Live, client: openai.OpenAI, file: FileObject
) -> None:
    made = create(client, file, BASE, LONG)
    wait_for_step(live, made.id, 1)
    for verb, word in (("pause", "paused"), ("resume", "resumed"), ("cancel", "cancelled")):
        with ThreadPoolExecutor(20) as pool:
            asked = [pool.submit(live.http, "POST", f"{JOBS}/{made.id}/{verb}") for _ in range(20)]
        answers = [future.result() for future in asked]
        assert sorted(a.status_code for a in answers) == [200] + [400] * 19
        assert messages(client, made.id).count(f"The job was {word}") == 1


def test_row_42_a_cancel_that_cannot_be_written_has_not_happened(
    live: Live, client: openai.OpenAI, file: FileObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row comes before the engine: else a job would have ended whose owner was told that it goes on."""
    made = create(client, file, BASE, LONG)
    wait_for_step(live, made.id, 1)
    tuning = live.services.tuning
    assert tuning is not None
    full = InsufficientStorageError("no room")

    def refuse(*_: Any, **__: Any) -> Any:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(type(tuning.store.jobs), "update", refuse)
        assert error_of(live.http("POST", f"{JOBS}/{made.id}/cancel"))["code"] == full.code
        handle = tuning.running.handle(made.id)
        assert handle is not None and not handle.status.is_final
    at = len(handle.history)
    wait_until(lambda: len(handle.history) > at, "it goes on")
    assert job_of(live, made.id)["status"] == "running"
    assert client.fine_tuning.jobs.cancel(made.id).status == "cancelled"


def test_events_are_streamed_until_the_job_ends(live: Live, client: openai.OpenAI, file: FileObject) -> None:
    made = create(client, file, BASE, QUICK)
    url = f"{live.url}{JOBS}/{made.id}/events?stream=true"
    with httpx.stream("GET", url, headers=bearer("ann-key"), timeout=DEADLINE) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    seen = [json.loads(line)["message"] for line in lines[:-1]]
    assert seen == messages(client, made.id) and seen[-1] == "The job has successfully completed"
    ids = [json.loads(line)["id"] for line in lines[:-1]]
    rest = live.http("GET", f"{JOBS}/{made.id}/events?stream=true&after={ids[-2]}").text
    assert ids[-1] in rest and ids[-2] not in rest


def test_pages_and_filters(live: Live, client: openai.OpenAI, file: FileObject) -> None:
    bob = live.client(api_key="bob-key")
    theirs = upload(bob)
    made = []
    for n in range(3):
        extra = LONG | {"lora": {"r": 1}}
        job = create(bob, theirs, BASE, extra, **({"metadata": {"n": str(n), "k": "v"}} if n else {}))
        made.append(job.id)
        bob.fine_tuning.jobs.cancel(job.id)
    listed = bob.fine_tuning.jobs.list(limit=2)
    assert [j.id for j in listed.data] == made[:0:-1] and listed.has_more
    assert not bob.fine_tuning.jobs.list(limit=3).has_more, "three are all"
    assert [j.id for j in bob.fine_tuning.jobs.list(limit=1)] == made[::-1], "the SDK walks the pages"
    assert [j.id for j in bob.fine_tuning.jobs.list(metadata={"n": "1"})] == [made[1]]
    assert [j.id for j in bob.fine_tuning.jobs.list(metadata={"n": "1", "k": "w"})] == []
    everything = live.http("GET", f"{JOBS}?metadata=null", headers=bearer("bob-key")).json()["data"]
    assert [j["id"] for j in everything] == [made[0]]
    events = bob.fine_tuning.jobs.list_events(made[0], limit=1)
    assert events.has_more and len(list(events)) >= 2
    for query in ("after=ftjob-none", "limit=0", "limit=101", "metadata=x"):
        assert live.http("GET", f"{JOBS}?{query}").status_code == 400
    assert live.http("GET", f"{JOBS}/{made[0]}/events?after=x", headers=bearer("bob-key")).status_code == 400
    assert live.http("GET", f"{JOBS}/{made[0]}/checkpoints?after=x", headers=bearer("bob-key")).status_code == 400


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora": {"rank": 8}}, "lora.rank: there is no such setting; there are r, alpha, dropout"),
        ({"training": {"lr": 1}}, "training.lr: there is no such setting; there are learning_rate"),
        ({"hyperparameters": {"n_epochs": 100}}, "n_epochs: Input should be less than or equal to 50"),
        ({"max_steps": 3}, "as training.max_steps"),
        ({"lora": {"r": 60000}}, "adapter_memory=16777216"),
        ({"lora": {"r": 60000}}, "Lower r, choose fewer target_modules"),
        ({"lora": {"r": 2, "rank_pattern": {"q_proj": 60000}}}, "adapter_memory=16777216"),
        ({"training": {"max_seq_len": 5000}}, "training.max_seq_len=5000: this server has room for 256 tokens"),
        (
            {"lora": {"target_modules": ["q_proj"], "layers_to_transform": [1, 7]}},
            "[7] are not layers of this base, whose last layer is 1",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_refusal_says_what_would_do(live: Live, file: FileObject, change: dict[str, Any], said: str) -> None:
    response = live.post(JOBS, {"model": BASE, "training_file": file.id} | change)
    assert response.status_code == 400 and said in error_of(response)["message"], response.text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": "none"}, "model"),
        ({"training_file": "file-none"}, "training_file"),
        ({"validation_file": "file-none"}, "validation_file"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"suffix": "a:b"}, "suffix"),
        ({"suffix": "../x"}, "suffix"),
        ({"suffix": "\N{GRINNING FACE}"}, "suffix"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "AUTO"}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": -1}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"learning_rate_multiplier": 1e9}}, "hyperparameters.learning_rate_multiplier"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        ({"lora": {"rank": 8}}, "lora.rank"),
        ({"lora": {"r": 0}}, "lora.r"),
        ({"lora": {"target_modules": ["no_such_proj"]}}, "lora"),
        ({"lora": {"target_modules": r"(.+)+\.(.+)+!"}}, "lora"),
        ({"lora": {"rank_pattern": {"no_such_proj": 4}}}, "lora"),
        ({"lora": {"r": 60000}}, "lora"),
        ({"lora": {"alpha": 1e30}}, "lora.alpha"),
        ({"lora": {"seed": 1}, "seed": 2}, "lora.seed"),
        ({"training": {"max_seq_len": 100_000}}, "training.max_seq_len"),
        ({"training": {"loraplus_lr_ratio": -1}}, "training.loraplus_lr_ratio"),
        ({"training": {"learning_rate": 1.5}}, "training.learning_rate"),
        ({"training": {"lr": 1}}, "training.lr"),
        ({"training": {"eval_every": 5}}, "training.eval_every"),
        ({"training": {"publish": "best", "eval_every": 2}}, "training.eval_every"),
        ({"training": {"publish_every": 3}}, "training.publish_every"),
        (
            {"training": {"learning_rate": 0.1}, "hyperparameters": {"learning_rate_multiplier": 2}},
            "training.learning_rate",
        ),
        ({"training": {"batch_size": 2}, "hyperparameters": {"batch_size": 3}}, "training.batch_size"),
        ({"r": 8}, "r"),  # one level too high: it would train with other settings without a word
        ({"max_steps": 3}, "max_steps"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else None,
)
def test_what_is_refused(live: Live, file: FileObject, change: dict[str, Any], param: str) -> None:
    response = live.post(JOBS, {"model": BASE, "training_file": file.id} | change)
    assert response.status_code in (400, 404), response.text
    found = error_of(response)
    assert str(found["param"]).startswith(param), found
    assert live.http("GET", f"{JOBS}?limit=1").json()["data"][:1] != [], "the jobs of other tests"


def test_a_job_whose_checkpoints_have_no_room_is_not_made(
    live: Live, file: FileObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = live.http("GET", f"{JOBS}?limit=1").json()["data"]
    with monkeypatch.context() as patch:
        patch.setattr("loquetier.storage.free_bytes", lambda _: 1000)
        refused = live.post(JOBS, {"model": BASE, "training_file": file.id})
    assert refused.status_code == 507 and error_of(refused)["code"] == "insufficient_storage"
    message = error_of(refused)["message"]
    assert "1000 are free" in message and "'the data directory/jobs'" in message
    assert live.http("GET", f"{JOBS}?limit=1").json()["data"] == before


def test_row_27_training_data_that_cannot_be_used(live: Live, client: openai.OpenAI) -> None:
    broken = upload(client, jsonl(CHATS) + b"{\n")
    refused = live.post(JOBS, {"model": BASE, "training_file": broken.id})
    assert refused.status_code == 400 and error_of(refused)["code"] == "invalid_training_file"
    wrong = client.files.create(file=("x", jsonl(CHATS)), purpose="batch")
    refused = live.post(JOBS, {"model": BASE, "training_file": wrong.id})
    assert refused.status_code == 400 and error_of(refused)["param"] == "training_file"
    # What only the tokenizer finds out: too short to be learnt from.
    empty = upload(client, b'{"input_ids": [1], "labels": [1]}\n')
    made = create(client, empty, BASE, QUICK)
    failed = wait_for(live, made.id, "failed")
    assert failed["error"]["code"] == "invalid_training_file" and failed["error"]["param"] == "training_file"
    assert "Example 1" in failed["error"]["message"] and failed["fine_tuned_model"] is None
    assert messages(client, made.id)[-1].startswith("The job failed.")
    assert client.fine_tuning.jobs.retrieve(made.id).status == "failed"


def test_a_deleted_checkpoint_and_a_cancelled_job_leave_nothing_behind_a_restart(
    base_dir: Path, tmp_path: Path
) -> None:
    often = {"lora": {"r": 2}, "training": {"max_steps": 100_000, "checkpoint_every": 2, "batch_size": 1}}
    with tuned(base_dir, tmp_path, RING, "ann-key") as live:
        client = live.client()
        made = create(client, upload(client), BASE, often)
        wait_until(lambda: list(client.fine_tuning.jobs.checkpoints.list(made.id)), "a checkpoint")
        assert live.http("POST", f"{JOBS}/{made.id}/pause").status_code == 200
    with tuned(base_dir, tmp_path, RING, "ann-key") as live:
        client = live.client()
        kept = list(client.fine_tuning.jobs.checkpoints.list(made.id))
        for checkpoint in kept:  # the job's own files of the newest two are still there
            assert client.models.delete(checkpoint.fine_tuned_model_checkpoint).deleted
        assert live.http("POST", f"{JOBS}/{made.id}/resume").status_code == 200
        wait_until(lambda: list(client.fine_tuning.jobs.checkpoints.list(made.id)), "another one")
        assert all(c.step_number > kept[0].step_number for c in client.fine_tuning.jobs.checkpoints.list(made.id))
        assert live.http("POST", f"{JOBS}/{made.id}/pause").status_code == 200
    assert list((tmp_path / "jobs").iterdir())
    with tuned(base_dir, tmp_path, RING, "ann-key") as live:
        assert live.http("POST", f"{JOBS}/{made.id}/cancel").status_code == 200
        assert not list((tmp_path / "jobs").iterdir())


def test_ready_waits_for_what_a_job_is_said_to_be(live: Live, client: openai.OpenAI, file: FileObject) -> None:
    """Who waits for `/ready` after a restart must not find a job as it was before its data was read."""
    tuning = live.services.tuning
    assert tuning is not None
    made = create(client, file, BASE, LONG)
    wait_for_step(live, made.id, 1)
    with tuning.store.write() as c:  # as a recorder that is behind leaves it
        tuning.store.jobs.update(c, made.id, status="validating_files")
    tuning.running._restarted.add(made.id)
    assert live.http("GET", "/ready").status_code == 503
    with tuning.store.write() as c:
        tuning.store.jobs.update(c, made.id, status="running")
    assert live.http("GET", "/ready").status_code == 200


def test_a_file_may_be_deleted_while_a_job_uses_it(live: Live, client: openai.OpenAI) -> None:
    own = upload(client, jsonl(CHATS[:4]))
    tuning = live.services.tuning
    assert tuning is not None
    made = create(client, own, BASE, LONG)
    wait_for_step(live, made.id, 1)
    client.files.delete(own.id)
    assert live.http("GET", f"/v1/files/{own.id}").status_code == 404
    assert tuning.store.files.path(own.id).exists(), "a restart has to read it again"
    at = len(tuning.running.handle(made.id).history)  # type: ignore[union-attr]
    wait_for_step(live, made.id, at + 1)
    client.fine_tuning.jobs.cancel(made.id)
    wait_until(lambda: not tuning.store.files.path(own.id).exists(), "its bytes go with the job")


def test_owners_scopes_and_limits(live: Live, client: openai.OpenAI, file: FileObject) -> None:
    bob = live.client(api_key="bob-key")
    made = create(client, file, BASE, QUICK)
    model = wait_for(live, made.id, "succeeded")["fine_tuned_model"]
    headers = bearer("bob-key")
    for path in ("", "/events", "/checkpoints"):
        assert live.http("GET", f"{JOBS}/{made.id}{path}", headers=headers).status_code == 404
        assert live.http("GET", f"{JOBS}/{made.id}{path}", headers=bearer("infer-key")).status_code == 403
    for verb in ("pause", "resume", "cancel"):
        assert live.http("POST", f"{JOBS}/{made.id}/{verb}", headers=headers).status_code == 404
    refused = live.http("POST", JOBS, json={"model": BASE, "training_file": file.id}, headers=headers)
    assert refused.status_code == 404, "another owner's file"
    for name in (model, f"{model}:ckpt-step-6"):
        ask = {"model": name, "prompt": "x", "max_tokens": 1}
        assert live.http("POST", "/v1/completions", json=ask, headers=headers).status_code == 404
        assert live.http("GET", f"/v1/models/{name}", headers=headers).status_code == 404
        assert live.http("DELETE", f"/v1/models/{name}", headers=headers).status_code == 404
        assert name not in {m.id for m in bob.models.list()}
        assert live.http("POST", "/v1/completions", json=ask, headers=bearer("infer-key")).status_code == 200
    theirs = upload(bob)
    create(bob, theirs, BASE, LONG)
    second = live.http("POST", JOBS, json={"model": BASE, "training_file": theirs.id}, headers=headers)
    assert second.status_code == 429 and second.headers["x-should-retry"] == "false"


def test_a_model_is_as_old_as_its_job(
    live: Live, client: openai.OpenAI, file: FileObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as the server, and no other after a restart."""
    monkeypatch.setattr(live.services.models, "started", 0)
    made = create(client, file, BASE, QUICK)
    model = wait_for(live, made.id, "succeeded")["fine_tuned_model"]
    row = live.services.tuning and live.services.tuning.store.adapters.find(model)
    assert row and client.models.retrieve(model).created == row.created_at >= made.created_at


def test_a_model_is_deleted(live: Live, client: openai.OpenAI, file: FileObject) -> None:
    made = create(client, file, BASE, QUICK)
    model = wait_for(live, made.id, "succeeded")["fine_tuned_model"]
    checkpoint = f"{model}:ckpt-step-4"
    assert client.models.delete(checkpoint).deleted
    assert [c.step_number for c in client.fine_tuning.jobs.checkpoints.list(made.id)] == [6, 2]
    assert say(live, model)
    deleted = client.models.delete(model)
    assert deleted.deleted and deleted.id == model and deleted.object == "model"
    for name in (model, checkpoint):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)
        with pytest.raises(openai.NotFoundError):
            client.models.delete(name)
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete(BASE)
    assert client.fine_tuning.jobs.retrieve(made.id).fine_tuned_model == model, "the job remembers"


def test_links_of_the_description_lead_somewhere(live: Live) -> None:
    paths = live.http("GET", "/openapi.json").json()["paths"]
    operations = {o["operationId"]: o for methods in paths.values() for o in methods.values()}
    assert len(operations) == sum(len(methods) for methods in paths.values()), "an id means one operation"
    found = {
        (name, target): link
        for name, operation in operations.items()
        for target, link in operation["responses"].get("200", {}).get("links", {}).items()
    }
    assert {("create_file", "create_job"), ("create_job", "cancel_job"), ("pause_job", "resume_job")} <= found.keys()
    for (_, target), link in found.items():
        assert link["operationId"] == target
        known = {p["name"] for p in operations[target].get("parameters", ())}
        assert link.get("parameters", {}).keys() <= known
        content = operations[target].get("requestBody", {}).get("content", {})
        fields = {f for kind in content.values() for f in kind["schema"]["properties"]}
        assert link.get("requestBody", {}).keys() <= fields and (link.get("parameters") or link.get("requestBody"))


def test_a_model_in_training_is_not_deleted(live: Live, client: openai.OpenAI, file: FileObject) -> None:
    made = create(client, file, BASE, LONG)
    wait_for_step(live, made.id, 1)
    with pytest.raises(openai.BadRequestError) as caught:
        client.models.delete(job_of(live, made.id)["live_model"])
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_row_52_an_idempotency_key_makes_one_job(live: Live, client: openai.OpenAI) -> None:
    file = upload(client)  # its own: it is deleted at the end
    made: list[str] = []

    def ask() -> None:
        made.append(create(client, file, BASE, QUICK, extra_headers={"Idempotency-Key": "k"}).id)

    threads = [threading.Thread(target=ask) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert len(made) == 30 and len(set(made)) == 1
    events = f"{JOBS}/{wait_for(live, made[0], 'succeeded')['id']}/events"
    number = len(live.http("GET", f"{events}?limit=100").json()["data"])
    more = [live.http("GET", f"{events}?limit={limit}").json()["has_more"] for limit in (number - 1, number)]
    assert more == [True, False], "a page of exactly all events is the last one"
    again = live.post(JOBS, {"model": BASE, "training_file": file.id}, headers={"Idempotency-Key": "k"})
    assert again.status_code == 400 and error_of(again)["code"] == "idempotency_key_reused"
    client.files.delete(file.id)
    ask()
    assert made[-1] == made[0], "the answer is the job that was made, whatever has become of its file"


def test_a_job_goes_on_after_a_stop_and_ends_with_the_same_weights(base_dir: Path, tmp_path: Path) -> None:
    steps: dict[str, Any] = {"max_steps": 300, "checkpoint_every": 7, "learning_rate": 1e-2, "batch_size": 2}
    extra = {"lora": {"r": 2}, "training": steps, "seed": 3}
    said, losses = [], []
    for stops in (False, True):
        data = tmp_path / f"stops-{stops}"
        with tuned(base_dir, data) as live:
            job_id = create(live.client(), upload(live.client()), BASE, extra).id
            paused = create(live.client(), upload(live.client()), BASE, LONG).id
            wait_for_step(live, job_id, 3)
            live.http("POST", f"{JOBS}/{paused}/pause")
            if not stops:
                wait_for(live, job_id, "succeeded")
        with tuned(base_dir, data) as live:
            client = live.client()
            job = wait_for(live, job_id, "succeeded")
            said.append(say(live, job["fine_tuned_model"]))
            metrics = [e for e in client.fine_tuning.jobs.list_events(job_id, limit=100) if e.type == "metrics"]
            losses.append([(e.data["step"], e.data["train_loss"]) for e in metrics])  # type: ignore[index]
            assert any("was restarted" in m for m in messages(client, job_id)) == stops
            assert client.files.content(job["result_files"][0]).text.count("\n") == 301
            assert job_of(live, paused)["status"] == "paused", "a pause outlives the process"
            assert live.http("POST", f"{JOBS}/{paused}/resume").status_code == 200
            wait_for_step(
                live,
                paused,
                1
                + max(
                    0,
                    *(
                        e["data"].get("step", 0)
                        for e in live.http("GET", f"{JOBS}/{paused}/events?limit=100").json()["data"]
                    ),
                ),
            )
            live.http("POST", f"{JOBS}/{paused}/cancel")
    assert said[0] == said[1] and losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(300, 0, -1)), "each step once"


def test_row_42_a_full_disk_pauses_a_job_until_there_is_room(
    live: Live, client: openai.OpenAI, file: FileObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_full = threading.Event()

    def write(point: str) -> None:
        if is_full.is_set() and point == "checkpoint.before_write":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("loquetier.storage.FIRST_WAIT", 0.01)
    monkeypatch.setattr("loquetier.storage.LONGEST_WAIT", 0.01)
    monkeypatch.setattr(live.runtime._engine.jobs, "fail_point", write)
    made = create(client, file, BASE, LONG | {"training": LONG["training"] | {"checkpoint_every": 2}})
    wait_for_step(live, made.id, 1)
    is_full.set()
    held = wait_for(live, made.id, "paused")
    assert "insufficient_storage" in held["reason"]
    is_full.clear()
    assert wait_for(live, made.id, "running")["reason"] is None
    told = messages(client, made.id)
    assert sum(m.startswith("The job is paused: insufficient_storage") for m in told) == 1
    assert told.count("There is room again; the job goes on") == 1
