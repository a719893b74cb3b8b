"""What /metrics tells of the engine: vLLM's names, jobs, publishes, steps; and that labels are bounded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.server.fixtures import BASE, base_dir, runtime
from tests.server.live import Live, serving, wait_until

from loquetier import LoraSpec, SamplingParams, TrainingConfig
from loquetier.engine.engine import Engine
from loquetier.engine.tally import Tally
from loquetier.runtime import Runtime
from loquetier.server.engine_metrics import OTHER, EngineCollector
from loquetier.server.metrics import RequestTimes
from loquetier.server.watch import Pulse, _pulse

__all__ = ["base_dir", "runtime"]

VLLM = [
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "lora_requests_info",
    "cache_config_info",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "admission_rejections",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "iteration_tokens_total",
]
ASK = {"model": "math", "prompt": "abc", "max_tokens": 9, "ignore_eos": True}
DATA = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(8)]


@pytest.fixture(scope="module")
def live(runtime: Runtime) -> Iterator[Live]:
    with serving(runtime) as found:
        yield found


def _next_heartbeat(live: Live) -> None:
    before = live.services.watch.pulse
    wait_until(lambda: live.services.watch.pulse is not before, "a heartbeat")


def samples(live: Live) -> dict[tuple[str, ...], float]:
    """By name and label values, of a page whose heartbeat began after this call: the second one that comes."""
    for _ in range(2):
        _next_heartbeat(live)
    page = live.http("GET", "/metrics").text
    return {
        (s.name, *(v for _, v in sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(page)
        for s in family.samples
    }


def test_every_name_of_vllm_is_there(live: Live) -> None:
    assert live.post("/v1/completions", ASK).status_code == 200
    assert live.post("/v1/completions", ASK | {"n": 128, "prompt": ["a"] * 3}).status_code in (400, 503)
    page = live.http("GET", "/metrics").text
    served = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE vllm:")}
    missing = {name for name in VLLM if f"vllm:{name}" not in served and f"vllm:{name}_total" not in served}
    assert not missing


def test_times_of_a_request_add_up(live: Live) -> None:
    before = samples(live)
    assert live.post("/v1/completions", ASK).status_code == 200
    after = samples(live)

    def grown(name: str) -> float:
        key = (f"vllm:request_{name}_time_seconds_sum", "math")
        return after[key] - before.get(key, 0.0)

    e2e = ("vllm:e2e_request_latency_seconds_sum", "math")
    total = after[e2e] - before.get(e2e, 0.0)
    queue, prefill, decode, inference = (grown(n) for n in ("queue", "prefill", "decode", "inference"))
    assert 0 <= queue < total and prefill > 0 and decode > 0
    # Sums of the same clock's differences: only rounding may differ. The last token comes before the answer's end.
    assert prefill + decode == pytest.approx(inference, abs=1e-9) and queue + inference <= total + 1e-9
    tokens = ("vllm:request_params_max_tokens_sum", "math")
    assert after[tokens] - before.get(tokens, 0.0) == 9


def test_choices_that_share_their_steps_are_no_faster() -> None:
    """Two answers, a token each at 1, 2 and 4 s."""
    times = RequestTimes(lambda: 0.0)
    assert times.per_token is None
    for now in (1.0, 2.0, 4.0):
        for index in (0, 1):
            times.token(now, (0, index))
    assert times.gaps == [1.0, 1.0, 2.0, 2.0] and times.per_token == 1.5
    assert (times.first, times.last) == (1.0, 4.0)


def test_jobs_and_publishes_are_counted(live: Live) -> None:
    before = samples(live)
    training = TrainingConfig(batch_size=4, max_steps=3, publish="every_step")
    job = live.runtime.finetune("taught", DATA, lora=LoraSpec(r=4), training=training)
    job.wait(60)
    after = samples(live)
    try:

        def grown(*key: str) -> float:
            return after[key] - before.get(key, 0.0)

        assert grown("loquetier:train_steps_total") == 3
        assert grown("loquetier:train_tokens_total") == sum(r.num_tokens for r in job.history)
        assert grown("loquetier:jobs_ended_total", "succeeded") == 1
        assert grown("loquetier:publish_seconds_count") == 3 and grown("loquetier:publish_seconds_sum") > 0
        assert grown("loquetier:engine_rows_total", "train") == grown("loquetier:train_tokens_total")
        assert grown("loquetier:engine_backward_units_total") > 0
        steps = grown("loquetier:engine_steps_total")
        assert steps > 0 and grown("loquetier:engine_step_seconds_count") == steps
        assert not any(value for key, value in after.items() if key[0] == "loquetier:jobs"), "none is left"
    finally:
        live.runtime.unload_adapter("taught")


def test_adapters_with_requests_are_told(live: Live) -> None:
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    pulses: list[Pulse] = []

    def between_steps(engine: Engine) -> None:
        request = engine.add_request([5, 6, 7], "org/x:y", params, lambda event: None)
        pulses.append(_pulse(engine))
        engine.step()
        pulses.append(_pulse(engine))
        engine.abort_request(request.request_id)

    live.services.port.call(between_steps).result()
    waits, runs = pulses
    assert (waits.waiting, waits.running, runs.waiting, runs.running) == ({"org/x:y": 1}, {}, {}, {"org/x:y": 1})
    collector = EngineCollector(BASE, ("vllm",), lambda model: OTHER, pulse=runs)
    found = {s.name: s for family in collector.collect() for s in family.samples if s.labels.get("state") != "waiting"}
    assert found["loquetier:model_requests"].labels == {"model_name": OTHER, "state": "running"}


def test_a_tally_is_a_histogram(live: Live) -> None:
    tally = Tally((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        tally.add(value)
    assert tally.counts == [2, 1, 1] and tally.total == 12.0
    copied = tally.copy()
    tally.add(1.0)
    assert copied.counts == [2, 1, 1]
    found = samples(live)
    bounds = [(key, value) for key, value in found.items() if key[0] == "vllm:iteration_tokens_total_bucket"]
    values = [value for _, value in bounds]
    assert values == sorted(values) and values[-1] == found["vllm:iteration_tokens_total_count", BASE]
