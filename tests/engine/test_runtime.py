"""The Python API over a real engine thread and a tiny base: answers, streams, jobs, errors, shutdown."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.tiny import save_tiny

from loquetier import EngineConfig, LoraSpec, Runtime, SamplingParams, TrainingConfig
from loquetier.errors import (
    AdapterExistsError,
    AdapterMismatchError,
    AdapterNotFoundError,
    BaseNotFoundError,
    ConfigError,
    ContextLengthError,
    DataError,
    EngineStoppedError,
    JobStateError,
    OutOfAdapterMemoryError,
)
from loquetier.finetuning import JobEvent
from loquetier.training.job import JobStatus

CONFIG = EngineConfig(dtype="float32", kv_memory=4 << 20, adapter_memory=2 << 20)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
DATA = [{"prompt": f"{a} then ", "completion": f"{b}!"} for a, b in zip("abcdefgh", "hgfedcba", strict=True)]
TRAINING = TrainingConfig(batch_size=4, max_steps=6, learning_rate=1e-2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runtime") / "base"
    save_tiny(directory, "llama")
    return directory


@pytest.fixture
def runtime(base: Path) -> Iterator[Runtime]:
    with Runtime(str(base), config=CONFIG) as it:
        yield it
        it.check_integrity()


def test_sync_stream_and_async_give_the_same_answer(runtime: Runtime) -> None:
    whole = runtime.generate("hello", None, GREEDY)
    pieces = list(runtime.stream("hello", None, GREEDY))
    assert "".join(p.text for p in pieces) == whole.text
    assert [p.token_id for p in pieces] == whole.token_ids
    assert pieces[-1].finish_reason == whole.answers[0].finish_reason == "length"

    async def both() -> list[str]:
        completion = await runtime.agenerate("hello", None, GREEDY)
        text = "".join([event.text async for event in runtime.astream("hello", None, GREEDY)])
        return [completion.text, text]

    assert asyncio.run(both()) == [whole.text, whole.text]


def test_many_threads_share_the_batch_and_get_their_own_answers(runtime: Runtime) -> None:
    prompts = [f"question {i} " * (1 + i % 5) for i in range(12)]
    alone = [runtime.generate(p, None, GREEDY).token_ids for p in prompts]
    together: dict[int, list[int]] = {}

    def client(i: int) -> None:
        together[i] = runtime.generate(prompts[i], None, GREEDY).token_ids

    threads = [threading.Thread(target=client, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(len(prompts))] == alone


def test_leaving_a_stream_early_frees_its_pages(runtime: Runtime) -> None:
    long = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    for event in runtime.stream("hello", None, long):
        assert event.finish_reason is None
        break
    stats = runtime.stats()  # the abort was queued before this call
    assert (stats.num_running, stats.num_waiting, stats.kv_pages_free) == (0, 0, stats.kv_pages)


def test_cancelling_an_async_request_frees_its_pages(runtime: Runtime) -> None:
    async def scenario() -> None:
        long = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        task = asyncio.create_task(runtime.agenerate("hello", None, long))
        while runtime.stats().num_running == 0:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert runtime.stats().num_running == 0


def test_a_client_whose_event_loop_is_gone_loses_only_its_own_request(runtime: Runtime) -> None:
    expected = runtime.generate("other", None, GREEDY).token_ids
    loop = asyncio.new_event_loop()
    loop.close()

    def dead(_: object) -> None:
        loop.call_soon_threadsafe(print)  # raises RuntimeError: Event loop is closed

    runtime._loop.call(lambda: runtime._engine.add_request([1, 2, 3], runtime.base_name, GREEDY, dead))
    assert runtime.generate("other", None, GREEDY).token_ids == expected
    assert runtime.stats().num_running == 0


def test_train_publish_serve_export_and_load_again(runtime: Runtime, tmp_path: Path) -> None:
    events: list[JobEvent] = []
    job = runtime.finetune("fox", DATA, lora=LoraSpec(r=4), training=TRAINING, callbacks=[events.append])
    history = job.wait(60)
    assert [r.step for r in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1].loss < history[0].loss
    assert runtime.adapter("fox").version == 6
    answer = runtime.generate("c then ", "fox", GREEDY)
    assert answer.model == "fox@6"
    runtime.export_adapter("fox", tmp_path / "fox")
    info = runtime.load_adapter("copy", tmp_path / "fox")
    assert info.spec.r == 4
    assert runtime.generate("c then ", "copy", GREEDY).token_ids == answer.token_ids
    assert runtime.digest("copy") == runtime.digest("fox@6")
    # The job's own thread of callbacks may lag behind wait(); its last event is the final state.
    while not events or not events[-1].status.is_final:
        runtime.stats()
    assert [e.record.step for e in events if e.kind == "step" and e.record] == [1, 2, 3, 4, 5, 6]


def test_data_may_be_a_file_and_trains_the_same(runtime: Runtime, tmp_path: Path) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in DATA)
    (tmp_path / "data.jsonl").write_text(lines, encoding="utf-8")
    runtime.finetune("listed", DATA, training=TRAINING).wait(60)
    runtime.finetune("filed", str(tmp_path / "data.jsonl"), training=TRAINING).wait(60)
    assert runtime.digest("filed") == runtime.digest("listed")
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        runtime.finetune("none", tmp_path / "nothing.jsonl")


def test_the_base_answers_while_an_adapter_trains_and_steps_are_shared(runtime: Runtime) -> None:
    quiet = runtime.generate("hello", None, GREEDY).token_ids
    job = runtime.finetune("fox", DATA, training=TrainingConfig(batch_size=4, max_steps=20))
    answers = [runtime.generate("hello", None, GREEDY).token_ids for _ in range(4)]
    job.wait(60)
    assert answers == [quiet] * 4
    assert runtime.stats().totals.mixed_steps > 0


def test_a_failing_callback_is_recorded_and_the_job_goes_on(runtime: Runtime) -> None:
    def broken(event: JobEvent) -> None:
        raise ValueError("callback bug")

    job = runtime.finetune("fox", DATA, training=TRAINING, callbacks=[broken])
    assert len(job.wait(60)) == 6
    while len(job.callback_errors) < 7:  # six steps and the end, on the callbacks' own thread
        runtime.stats()
    assert job.status is JobStatus.SUCCEEDED


def test_pause_resume_cancel(runtime: Runtime) -> None:
    job = runtime.finetune("fox", DATA, training=TrainingConfig(batch_size=2, max_steps=1000))
    job.pause()
    with pytest.raises(JobStateError, match="paused"):
        job.pause()
    with pytest.raises(TimeoutError):
        job.wait(0.01)
    job.resume()
    job.cancel()
    assert job.status is JobStatus.CANCELLED
    with pytest.raises(JobStateError, match="cancelled"):
        job.resume()
    stats = runtime.stats()
    runtime.check_integrity()
    assert job.wait() == job.history and stats.arena_bytes >= stats.arena_bytes_free


def test_continue_from_a_served_adapter(runtime: Runtime) -> None:
    runtime.finetune("first", DATA, lora=LoraSpec(r=4), training=TRAINING).wait(60)
    before = runtime.evaluate("first", DATA).loss
    whole = TrainingConfig(batch_size=len(DATA), max_steps=6, learning_rate=1e-2)
    history = runtime.finetune("second", DATA, start_from="first", training=whole).wait(60)
    # Its first step sees all the data on the weights that "first" ended with; rounding differs with the batch's shape.
    assert history[0].loss == pytest.approx(before, rel=1e-5)
    assert runtime.evaluate("second", DATA).loss < before
    assert runtime.digest("second") != runtime.digest("first")
    with pytest.raises(ConfigError, match="start_from"):
        runtime.finetune("third", DATA, lora=LoraSpec(r=2), start_from="first", training=TRAINING)


def test_errors_change_nothing(runtime: Runtime, tmp_path: Path) -> None:
    before = runtime.stats()
    with pytest.raises(AdapterNotFoundError, match="nobody"):
        runtime.generate("x", "nobody")
    with pytest.raises(ContextLengthError):
        runtime.generate("x" * 5000)
    with pytest.raises(ConfigError, match="empty"):
        runtime.generate([])
    with pytest.raises(ConfigError, match="token id"):
        runtime.generate([10**9])
    with pytest.raises(AdapterNotFoundError):
        runtime.unload_adapter("nobody")
    with pytest.raises(DataError, match="Example 2"):
        runtime.finetune("fox", [DATA[0], {"wrong": 1}])
    with pytest.raises(AdapterMismatchError, match="no_such_proj"):
        runtime.finetune("fox", DATA, lora=LoraSpec(target_modules=("no_such_proj",)))
    with pytest.raises(ConfigError, match="base"):
        runtime.finetune(runtime.base_name, DATA)
    with pytest.raises(OutOfAdapterMemoryError, match="MiB"):
        runtime.finetune("fox", DATA, lora=LoraSpec(r=4096))
    with pytest.raises(ConfigError, match="is the base"):
        runtime.export_adapter(runtime.base_name, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    after = runtime.stats()
    assert (after.kv_pages_free, after.arena_bytes_free) == (before.kv_pages_free, before.arena_bytes_free)
    assert runtime.adapters() == []


def test_loading_a_name_twice_is_an_error_and_the_first_stays(runtime: Runtime, tmp_path: Path) -> None:
    runtime.finetune("fox", DATA, training=TRAINING).wait(60)
    runtime.export_adapter("fox", tmp_path / "fox")
    with pytest.raises(AdapterExistsError, match="fox"):
        runtime.load_adapter("fox", tmp_path / "fox")
    assert runtime.adapter("fox").version == 6
    assert runtime.unload_adapter("fox") > 0
    assert runtime.load_adapter("fox", tmp_path / "fox").version == 7  # numbers are never reused


def test_closing_ends_requests_and_jobs_with_a_typed_error(base: Path) -> None:
    runtime = Runtime(str(base), config=CONFIG)
    handle = runtime.submit("hello", None, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
    job = runtime.finetune("fox", DATA, training=TrainingConfig(max_steps=10_000))
    runtime.close()
    runtime.close()
    with pytest.raises(EngineStoppedError):
        handle.result()
    with pytest.raises(EngineStoppedError):
        job.wait()
    with pytest.raises(EngineStoppedError):
        runtime.generate("hello")


def test_an_unknown_base_names_the_ways_out() -> None:
    with pytest.raises(BaseNotFoundError, match="smollm2-135m"):
        Runtime("no-such-base")
