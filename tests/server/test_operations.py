"""Load, failures and the end: back-pressure, metrics, a broken adapter, a dead engine, a graceful stop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.server.fixtures import BASE, base_dir, make_adapter
from tests.server.live import ENGINE, Live, error_of, serving, wait_until

from loquetier.errors import EngineError
from loquetier.runtime import Runtime
from loquetier.server.limits import BadKeys, TokenBucket

__all__ = ["base_dir"]

ASK: dict[str, Any] = {"model": BASE, "prompt": "abc", "max_tokens": 4, "temperature": 0}
LONG: dict[str, Any] = ASK | {"max_tokens": 250, "ignore_eos": True}


@pytest.fixture
def runtime(base_dir: Path, tmp_path: Path) -> Iterator[Runtime]:
    with Runtime(str(base_dir), config=ENGINE) as made:
        made.load_adapter("bad", make_adapter(made, tmp_path / "bad", seed=1))
        yield made


def post_many(live: Live, body: dict[str, Any], count: int) -> list[Any]:
    """The same request from many clients at once."""
    answers: list[Any] = [None] * count

    def post(number: int) -> None:
        answers[number] = live.post("/v1/completions", body)

    threads = [threading.Thread(target=post, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


def test_row_47_more_than_the_cache_holds(base_dir: Path) -> None:
    """Requests for the whole context queue up and are preempted; each gets the text that it gets alone, or a 503."""
    from dataclasses import replace

    from loquetier.config import MIB

    with (
        Runtime(str(base_dir), config=replace(ENGINE, kv_memory=MIB, max_sequences=8)) as runtime,
        serving(runtime, max_queued=16) as live,
    ):
        alone = live.post("/v1/completions", LONG).json()["choices"][0]["text"]
        answers = post_many(live, LONG, 48)
        statuses = [a.status_code for a in answers]
        assert set(statuses) <= {200, 503} and 200 in statuses
        for answer in answers:
            if answer.status_code == 200:
                assert answer.json()["choices"][0]["text"] == alone
            else:
                assert error_of(answer)["code"] == "server_overloaded" and int(answer.headers["retry-after"]) >= 1
        wait_until(live.settled, "all of it is over")


def test_the_queues_age_refuses_new_requests(runtime: Runtime) -> None:
    now = [1000.0]
    with serving(runtime, clock=lambda: now[0], slo_ttft=5.0) as live:
        admission = live.services.admission
        entry = admission.enter(1)
        now[0] += 4
        assert live.post("/v1/completions", ASK).status_code == 200
        now[0] += 2
        refused = live.post("/v1/completions", ASK)
        assert refused.status_code == 503 and "6.0 s" in error_of(refused)["message"]
        assert refused.headers["retry-after"] == "3"
        admission.leave(entry)
        assert live.post("/v1/completions", ASK).status_code == 200
        assert 'loquetier:admission_rejections_total{model_name="tiny-base",reason="server_overloaded"} 1.0' in (
            live.http("GET", "/metrics").text
        )


def test_row_48_a_broken_adapter_is_set_aside_and_the_others_go_on(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = runtime._engine
    slot = engine.registry.resolve("bad").slot
    real = engine.base.hidden

    def breaks(ids_M: Any, positions_M: Any, step: Any) -> Any:
        if any(segment.slot == slot for segment in step.segments):
            raise RuntimeError("injected")
        return real(ids_M, positions_M, step)

    monkeypatch.setattr(engine.base, "hidden", breaks)
    with serving(runtime) as live:
        for _ in range(3):
            response = live.post("/v1/completions", ASK | {"model": "bad"})
            assert response.status_code == 500 and error_of(response)["code"] == "engine_error"
        aside = live.post("/v1/completions", ASK | {"model": "bad"})
        assert aside.status_code == 503 and error_of(aside)["code"] == "adapter_quarantined"
        assert live.post("/v1/completions", ASK).status_code == 200
        for path in ("/health", "/ready"):
            assert live.http("GET", path).status_code == 200
        monkeypatch.setattr(engine.base, "hidden", real)
        assert live.post("/v1/completions", ASK | {"model": "bad@1"}).status_code == 503, "by another of its names"


def test_a_failure_in_mid_stream_is_an_error_event(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(runtime) as live:
        client = live.client(_strict_response_validation=False)
        extra = {"ignore_eos": True}
        stream = iter(client.completions.create(**ASK | {"max_tokens": 250}, stream=True, extra_body=extra))
        next(stream)

        def breaks(*_: Any) -> Any:
            raise EngineError("injected")

        monkeypatch.setattr(runtime._engine.base, "hidden", breaks)
        with pytest.raises(openai.APIError, match="injected"):
            list(stream)
        monkeypatch.undo()
        wait_until(live.settled, "it is gone")


def test_row_49_a_dead_engine_ends_the_process(base_dir: Path) -> None:
    runtime = Runtime(str(base_dir), config=ENGINE)
    with serving(runtime) as live:
        assert live.http("GET", "/health").status_code == 200
        runtime.close()
        wait_until(lambda: live.server.death is not None, "the watch sees it")
        assert live.server.death == "the engine loop has ended"


def test_row_49_a_hung_engine_is_unhealthy(runtime: Runtime) -> None:
    release = threading.Event()
    with serving(runtime, hang_seconds=0.2) as live:
        future = live.services.port.call(lambda _: release.wait(30))
        try:
            wait_until(lambda: live.server.death is not None, "the watch sees it")
            assert "has not finished a step" in str(live.server.death)
            assert live.services.watch.problem is not None
        finally:
            release.set()
            future.result(30)


def test_row_45_a_stop_lets_answers_finish(runtime: Runtime) -> None:
    with serving(runtime, grace_seconds=60) as live:
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(live.post("/v1/completions", LONG)))
        thread.start()
        wait_until(lambda: live.services.admission.num_open == 1, "it runs")
        live.services.admission.is_draining = True
        assert live.http("GET", "/ready").status_code == 503
        assert live.http("GET", "/health").status_code == 200
        refused = live.post("/v1/completions", ASK)
        assert refused.status_code == 503 and error_of(refused)["code"] == "shutting_down"
        live.server.stop()
        thread.join(60)
        assert answers[0].status_code == 200
        wait_until(lambda: live.server.should_exit, "the server ends")


@pytest.mark.parametrize("stream", [False, True])
def test_row_45_when_the_time_is_over_answers_end_with_an_error(runtime: Runtime, stream: bool) -> None:
    hold = threading.Event()
    with serving(runtime, grace_seconds=0.0) as live:
        answers: list[Any] = []
        body = LONG | {"stream": stream}
        thread = threading.Thread(target=lambda: answers.append(live.post("/v1/completions", body)))
        runtime._engine.base.hidden = _slowly(runtime._engine.base.hidden, hold)  # type: ignore[method-assign]
        thread.start()
        wait_until(lambda: len(live.services.open_runs) == 1, "it runs")
        live.server.stop()
        wait_until(lambda: live.server._stopping is not None, "it drains")
        hold.set()
        thread.join(30)
        answer = answers[0]
        if stream:
            assert '"code":"shutting_down"' in answer.text and "[DONE]" not in answer.text
        else:
            assert answer.status_code == 503 and error_of(answer)["code"] == "shutting_down"


def _slowly(real: Any, hold: threading.Event) -> Any:
    """A forward that waits once, so that the answer is still open when the stop comes."""

    def hidden(*args: Any) -> Any:
        hold.wait(20)
        return real(*args)

    return hidden


def test_metrics(runtime: Runtime) -> None:
    with serving(runtime, slo_ttft=60.0, slo_tpot=60.0) as live:
        live.post("/v1/completions", LONG)
        live.post("/v1/completions", ASK | {"model": "bad"})
        live.post("/v1/completions", ASK | {"model": "unheard-of"})
        page = live.http("GET", "/metrics").text
    for prefix in ("loquetier", "vllm"):
        assert f'{prefix}:generation_tokens_total{{model_name="{BASE}"}} 250.0' in page
        assert f'{prefix}:prompt_tokens_total{{model_name="bad"}} 3.0' in page
        assert f'{prefix}:request_success_total{{finished_reason="length",model_name="{BASE}"}} 1.0' in page
        assert f'{prefix}:inter_token_latency_seconds_count{{model_name="{BASE}"}} 249.0' in page
        assert f'{prefix}:time_to_first_token_seconds_count{{model_name="{BASE}"}} 1.0' in page
    assert 'loquetier:slo_requests_total{goal="ttft",met="yes"} 2.0' in page
    assert "loquetier:adapters_resident 1.0" in page
    assert "unheard-of" not in page


def test_models_share_labels_beyond_the_cap(runtime: Runtime) -> None:
    with serving(runtime, metric_models=1, vllm_metrics=False) as live:
        live.post("/v1/completions", ASK | {"model": "bad"})
        page = live.http("GET", "/metrics").text
    assert 'model_name="other"' in page and 'model_name="bad"' not in page and "vllm:" not in page


def test_row_46_a_clock_that_jumps_back() -> None:
    bucket = TokenBucket(60, 0.0, 1000.0)
    bucket.refill(10.0)
    assert bucket.level == 0 and bucket.wait_for(1) == 1.0
    bucket.refill(11.0)
    assert bucket.level == 1.0


def test_bad_keys_are_bounded() -> None:
    bad = BadKeys(lambda: 0.0, per_minute=1, max_addresses=10)
    for number in range(1000):
        bad.count(f"10.0.0.{number}")
    assert len(bad._buckets) == 10
