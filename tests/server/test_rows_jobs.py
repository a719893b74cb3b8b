"""Bad requests for jobs and bad jobs, by the numbers of the project's table of hostile inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import FileObject
from tests.server.fixtures import BASE, base_dir, make_adapter
from tests.server.live import Live, error_of, wait_until
from tests.server.test_jobs import JOBS, RING, bearer, messages
from tests.server.tuned import CHATS, LONG, QUICK, create, job_of, jsonl, say, tuned, upload, wait_for, wait_for_step

from loquetier.server.file_check import FileChecker
from loquetier.training.job import FinetuneJob

__all__ = ["base_dir"]


@pytest.fixture(scope="module")
def live(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("adapters")
    with tuned(base_dir, tmp_path_factory.mktemp("data"), RING, "ann-key", adapter_root=root) as found:
        make_adapter(found.runtime, root / "one", seed=1)
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
    for job in live.http("GET", f"{JOBS}?limit=100").json()["data"]:
        if job["status"] not in ("succeeded", "failed", "cancelled"):
            live.http("POST", f"{JOBS}/{job['id']}/cancel")
    tuning = live.services.tuning
    assert tuning is not None
    wait_until(lambda: not tuning.running.num_running, "every job has ended")
    live.runtime.check_integrity()
    tuning.store.check_integrity()


def ask(live: Live, **fields: Any) -> Any:
    return live.post(JOBS, {"model": BASE} | fields)


# --- row 27: data sets that teach nothing ---

ASKED = {"role": "user", "content": "x"}
MUTE = {"messages": [ASKED, {"role": "assistant", "content": "y", "weight": 0}]}


@pytest.mark.parametrize(
    "content",
    [b"", jsonl([{"messages": [ASKED]}]), jsonl([MUTE]), jsonl([*CHATS, MUTE])],
    ids=["no-rows", "no-assistant", "weight-0", "one-row-of-weight-0"],
)
def test_row_27_nothing_to_learn(live: Live, client: openai.OpenAI, content: bytes) -> None:
    file = upload(client, content)
    made = ask(live, training_file=file.id, **QUICK)
    if file.status == "error":
        assert made.status_code == 400 and error_of(made)["code"] == "invalid_training_file"
        return
    failed = wait_for(live, made.json()["id"], "failed")
    assert failed["error"]["code"] == "invalid_training_file" and failed["error"]["param"] == "training_file"
    assert "Example" in failed["error"]["message"]


@pytest.mark.parametrize("rows", [1, 9])
def test_row_27_few_rows_are_enough(live: Live, client: openai.OpenAI, rows: int) -> None:
    made = create(client, upload(client, jsonl(CHATS[:rows])), BASE, QUICK)
    assert wait_for(live, made.id, "succeeded", "failed")["status"] == "succeeded"


def test_row_27_answers_behind_the_cut(live: Live, client: openai.OpenAI) -> None:
    long = [{"prompt": "x" * 100, "completion": "y"}]
    made = create(client, upload(client, jsonl(long)), BASE, QUICK | {"training": {"max_seq_len": 20}})
    failed = wait_for(live, made.id, "failed")
    assert failed["error"]["code"] == "invalid_training_file" and "max_seq_len=20" in failed["error"]["message"]


def test_row_27_what_is_cut_is_told_with_counts(live: Live, client: openai.OpenAI) -> None:
    texts = [{"text": "x" * length} for length in (10, 30, 40)]
    extra = QUICK | {"training": QUICK["training"] | {"max_seq_len": 20}}
    made = create(client, upload(client, jsonl(texts)), BASE, extra)
    wait_for(live, made.id, "succeeded")
    told = client.fine_tuning.jobs.list_events(made.id, limit=100)
    warned = [(e.message, e.data) for e in told if e.level == "warn"]
    tokens = [len(live.runtime.encode(text["text"])) + 1 for text in texts]  # each has an end token
    counts = {"truncated_examples": 2, "cut_tokens": sum(tokens[1:]) - 40}
    assert warned == [("2 of 3 examples are longer than max_seq_len=20 and were cut", counts)]


# --- row 28: files that are not there ---


def test_row_28_files_that_cannot_be_trained_on(live: Live, client: openai.OpenAI, file: FileObject) -> None:
    theirs = upload(live.client(api_key="bob-key"))
    other = client.files.create(file=("x", jsonl(CHATS)), purpose="batch")
    gone = upload(client)
    client.files.delete(gone.id)
    wrong = {"file-none": 404, "../../etc/passwd": 404, theirs.id: 404, gone.id: 404, other.id: 400}
    for name, status in wrong.items():
        for param in ("training_file", "validation_file"):
            response = ask(live, **({"training_file": file.id} | {param: name}))
            assert response.status_code == status, (name, response.text)
            assert error_of(response)["param"] == param


def test_row_28_deleted_between_create_and_run(
    live: Live, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = upload(client)
    wait = FileChecker.wait

    def deleted_first(checker: FileChecker, file_id: str) -> bool:
        if file_id == gone.id:
            client.files.delete(gone.id)
        return wait(checker, file_id)

    monkeypatch.setattr(FileChecker, "wait", deleted_first)
    made = create(client, gone, BASE, QUICK)
    failed = wait_for(live, made.id, "failed")
    assert failed["error"]["param"] == "training_file" and "deleted" in failed["error"]["message"]


# --- rows 29 and 30: numbers and names ---


@pytest.mark.parametrize("value", ["0", "-1", "1e9", "1e999", "NaN", '"AUTO"', "true", '"1"', "[]", "2.5"])
@pytest.mark.parametrize("name", ["n_epochs", "batch_size", "learning_rate_multiplier"])
def test_row_29_hyperparameters(live: Live, file: FileObject, name: str, value: str) -> None:
    if (name, value) == ("learning_rate_multiplier", "2.5"):
        return  # a good one
    for wrapped in (
        '"hyperparameters": {%s}',
        '"method": {"type": "supervised", "supervised": {"hyperparameters": {%s}}}',
    ):
        inner = wrapped % f'"{name}": {value}'
        text = f'{{"model": "{BASE}", "training_file": "{file.id}", {inner}}}'
        response = live.http("POST", JOBS, content=text, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, response.text
        found = error_of(response)
        assert value in ("NaN", "1e999") or name in str(found["param"]), found


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": "x" * 65}, {"suffix": "a:b"}, {"suffix": "../x"}, {"suffix": "\N{GRINNING FACE}"}, {"suffix": ""},
        {"suffix": "a\nb"}, {"suffix": "a\n"}, {"suffix": "<script>"}, {"suffix": 5},
        {"metadata": {str(n): "x" for n in range(17)}}, {"metadata": {"k" * 65: "v"}}, {"metadata": {"k": "v" * 513}},
        {"metadata": {"": "v"}}, {"metadata": {"k": 1}}, {"metadata": []},
    ],
    ids=lambda fields: repr(fields)[:30],
)  # fmt: skip
def test_row_30_suffix_and_metadata(live: Live, file: FileObject, fields: dict[str, Any]) -> None:
    response = ask(live, training_file=file.id, **fields)
    assert response.status_code == 400, response.text
    assert str(error_of(response)["param"]).startswith(next(iter(fields)))


# --- row 31: changes in every wrong state ---


def test_row_31_changes_in_wrong_states(live: Live, client: openai.OpenAI, file: FileObject) -> None:
    def refused(job_id: str, *verbs: str) -> None:
        for verb in verbs:
            response = live.http("POST", f"{JOBS}/{job_id}/{verb}")
            assert response.status_code == 400 and error_of(response)["code"] == "invalid_job_state", response.text
            assert response.headers["x-should-retry"] == "false"

    ends = {"succeeded": create(client, file, BASE, QUICK).id, "cancelled": create(client, file, BASE, LONG).id}
    wait_for_step(live, ends["cancelled"], 1)
    refused(ends["cancelled"], "resume")
    assert live.http("POST", f"{JOBS}/{ends['cancelled']}/pause").status_code == 200
    refused(ends["cancelled"], "pause")
    client.fine_tuning.jobs.cancel(ends["cancelled"])
    bad = upload(client, b'{"input_ids": [1], "labels": [1]}\n')
    ends["failed"] = create(client, bad, BASE, QUICK).id
    for status, job_id in ends.items():
        wait_for(live, job_id, status)
        told = messages(client, job_id)
        refused(job_id, "pause", "resume", "cancel")
        assert messages(client, job_id) == told and job_of(live, job_id)["status"] == status


# --- row 41: a job that diverges harms nobody ---


def test_row_41_a_job_that_diverges_fails_alone(
    live: Live, client: openai.OpenAI, file: FileObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = FinetuneJob.record

    def poisoned(job: FinetuneJob, nll: float, correct: float, n: int) -> None:
        record(job, math.nan if job.config.seed == 666 and job.num_steps + 1 in (2, 5, 6, 7) else nll, correct, n)

    monkeypatch.setattr(FinetuneJob, "record", poisoned)
    before = say(live, BASE)
    long = QUICK | {"training": QUICK["training"] | {"max_steps": 12}}
    bad, good = create(client, file, BASE, long, seed=666), create(client, file, BASE, long, seed=1)
    failed = wait_for(live, bad.id, "failed", "succeeded")
    assert failed["error"]["code"] == "training_diverged", failed
    warned = [e for e in client.fine_tuning.jobs.list_events(bad.id, limit=100) if e.level == "warn"]
    assert [e.message.partition(":")[0] for e in warned[::-1]] == [f"Step {n} was skipped" for n in (2, 5, 6, 7)]
    checkpoints = client.fine_tuning.jobs.checkpoints.list(bad.id).data
    assert checkpoints and say(live, checkpoints[0].fine_tuned_model_checkpoint), "the last good one answers"
    assert wait_for(live, good.id, "succeeded", "failed")["status"] == "succeeded"
    assert say(live, BASE) == before


# --- row 51: text that other programs would run ---


def test_row_51_text_that_other_programs_would_run(live: Live, client: openai.OpenAI, file: FileObject) -> None:
    assert ask(live, training_file=file.id, suffix="=cmd()").status_code == 400
    for name in ("a\nb", 'a"} 1\nevil{x="'):
        loaded = live.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "one"})
        assert loaded.status_code == 400
        assert live.post("/v1/completions", {"model": name, "prompt": "x"}).status_code == 404
    hostile = {"=cmd|'/c calc'!A1": '@SUM(1)\n"', "__proto__": "<script>"}
    made = create(client, file, BASE, QUICK, metadata=hostile)
    done = wait_for(live, made.id, "succeeded")
    assert done["metadata"] == hostile, "kept as data"
    table = client.files.content(done["result_files"][0]).text
    cells = [cell for line in table.splitlines()[1:] for cell in line.split(",")]
    assert cells and not [cell for cell in cells if cell[:1] in "=+@\t" and cell]
    page = live.http("GET", "/metrics").text
    assert "evil" not in page and "script" not in page and "cmd" not in page
    for line in page.splitlines():
        assert line.startswith("#") or math.isfinite(float(line.rpartition(" ")[2])) or "Inf" in line, line


# --- row 52: one key, a hundred requests ---


def test_row_52_a_hundred_creates_with_one_key(live: Live, file: FileObject) -> None:
    body = {"model": BASE, "training_file": file.id} | QUICK
    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(live.post, JOBS, body, headers={"Idempotency-Key": "hundred"}) for _ in range(100)]
    answers = [future.result() for future in asked]
    assert {a.status_code for a in answers} == {200}
    assert len({a.json()["id"] for a in answers}) == 1


# --- row 37: a model that is being trained is nobody's to unload or to load over ---


@pytest.mark.parametrize("key", ["ann-key", "bob-key"])
def test_row_37_a_job_keeps_its_model(live: Live, client: openai.OpenAI, file: FileObject, key: str) -> None:
    made = create(client, file, BASE, LONG)
    wait_for_step(live, made.id, 2)
    name = job_of(live, made.id)["live_model"]
    wait_until(lambda: live.http("GET", f"/v1/models/{name}").status_code == 200, "it answers")
    headers = bearer(key)
    unloaded = live.post("/v1/unload_lora_adapter", {"lora_name": name}, headers=headers)
    body = {"lora_name": name, "lora_path": "one", "load_inplace": True}
    replaced = live.post("/v1/load_lora_adapter", body, headers=headers)
    for response in (unloaded, replaced):
        assert response.status_code in (400, 404), response.text
        error_of(response)
    assert say(live, name) and live.http("GET", f"/v1/models/{name}").status_code == 200
    wait_for_step(live, made.id, 4)
    client.fine_tuning.jobs.cancel(made.id)
    wait_for(live, made.id, "cancelled")
    tuning = live.services.tuning
    assert tuning is not None
    assert tuning.store.adapters.find(name) is not None, "still known after a restart"
    assert json.dumps(say(live, name))
