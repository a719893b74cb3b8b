"""OpenTelemetry: spans and GenAI metrics of requests, nothing of what was said, and off unless asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from tests.server.fixtures import BASE, base_dir, runtime
from tests.server.live import Live, serving, wait_until

from loquetier.errors import ConfigError
from loquetier.runtime import Runtime
from loquetier.server.telemetry import Telemetry, open_telemetry

__all__ = ["base_dir", "runtime"]

SECRET = "what the user said"
CHAT = {"model": "math", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 6, "ignore_eos": True}
TEXT = {"model": BASE, "prompt": SECRET, "max_tokens": 3, "ignore_eos": True}


class Seen:
    """A server whose telemetry stays in memory."""

    def __init__(self) -> None:
        self.spans, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(self.spans))
        self.telemetry = Telemetry(tracers, MeterProvider([self.reader]))

    def last(self, count: int = 1) -> ReadableSpan:
        wait_until(lambda: len(self.spans.get_finished_spans()) >= count, "the span")
        spans = self.spans.get_finished_spans()
        assert len(spans) == count
        return spans[-1]

    def points(self, name: str) -> dict[tuple[tuple[str, Any], ...], Any]:
        data = self.reader.get_metrics_data()
        assert data is not None
        metrics = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics]
        return {
            tuple(sorted((p.attributes or {}).items())): p
            for m in metrics
            if m.name == name
            for p in m.data.data_points
        }


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def live(runtime: Runtime, seen: Seen) -> Iterator[Live]:
    with serving(runtime, telemetry=seen.telemetry) as found:
        yield found


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_span(stream: bool, live: Live, seen: Seen) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = live.post("/v1/chat/completions", CHAT | {"stream": stream}, headers={"traceparent": parent})
    assert answer.status_code == 200
    span = seen.last()
    assert (span.name, span.kind, span.status.status_code) == ("chat math", SpanKind.SERVER, StatusCode.UNSET)
    assert span.parent is not None and f"{span.parent.trace_id:x}" == "af7651916cd43dd8448eb211c80319c"
    assert span.start_time is not None and span.end_time is not None and span.start_time < span.end_time
    (first,) = span.events
    assert first.name == "gen_ai.first_token" and span.start_time < first.timestamp <= span.end_time
    known = dict(span.attributes or {})
    assert known["gen_ai.operation.name"] == "chat" and known["gen_ai.provider.name"] == "loquetier"
    assert (known["gen_ai.request.model"], known["gen_ai.response.model"]) == ("math", "math@1")
    assert known["gen_ai.response.finish_reasons"] == ("length",) and known["gen_ai.usage.output_tokens"] == 6
    assert known["gen_ai.usage.input_tokens"] == len(live.runtime.encode(CHAT["messages"]))  # type: ignore[arg-type]
    assert known["gen_ai.request.stream"] is stream and "error.type" not in known
    assert SECRET not in span.to_json()


def test_metrics_have_the_conventions_names(live: Live, seen: Seen) -> None:
    for body in (TEXT, TEXT | {"model": BASE}):
        assert live.post("/v1/completions", body).status_code == 200
    seen.last(2)
    about = (
        ("gen_ai.operation.name", "text_completion"),
        ("gen_ai.provider.name", "loquetier"),
        ("gen_ai.request.model", BASE),
        ("gen_ai.response.model", BASE),
    )
    for name in ("request.duration", "time_to_first_token", "time_per_output_token"):
        points = seen.points(f"gen_ai.server.{name}")
        assert points.keys() == {about} and points[about].count == 2 and 0 < points[about].sum < 60
    usage = seen.points("gen_ai.client.token.usage")
    assert {dict(k)["gen_ai.token.type"]: (p.count, p.sum) for k, p in usage.items()} == {
        "input": (2, 2 * len(SECRET)),
        "output": (2, 6),
    }
    assert all(p.explicit_bounds[0] == 1 and p.explicit_bounds[-1] == 4**13 for p in usage.values())


def test_a_refusal_is_an_error_span(live: Live, seen: Seen) -> None:
    live.services.admission.is_draining = True
    assert live.post("/v1/completions", TEXT).status_code == 503
    span = seen.last()
    assert span.status.status_code is StatusCode.ERROR
    known = dict(span.attributes or {})
    assert known["error.type"] == "shutting_down" and "gen_ai.response.model" not in known
    (point,) = seen.points("gen_ai.server.request.duration").values()
    assert point.count == 1 and not seen.points("gen_ai.server.time_to_first_token")


def test_a_client_that_leaves_is_one_span_too(live: Live, seen: Seen) -> None:
    import httpx

    body = TEXT | {"max_tokens": 200, "stream": True}
    with httpx.stream("POST", f"{live.url}/v1/completions", json=body, timeout=20) as answer:
        next(answer.iter_lines())
    span = seen.last()
    assert dict(span.attributes or {})["error.type"] == "client_gone"


def test_metric_labels_are_bounded(runtime: Runtime, seen: Seen) -> None:
    with serving(runtime, telemetry=seen.telemetry, metric_models=1) as live:
        live.post("/v1/completions", TEXT | {"model": "math@1"})
        live.post("/v1/completions", TEXT | {"model": "no such model"})
        seen.last()
    labels = {dict(key)["gen_ai.request.model"] for key in seen.points("gen_ai.server.request.duration")}
    assert labels == {"other"}


@pytest.mark.parametrize(
    "environ",
    [{}, {"OTEL_SERVICE_NAME": "x"}, {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"},
     {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none"}],
)  # fmt: skip
def test_it_is_off_unless_asked_for(environ: dict[str, str]) -> None:
    assert not open_telemetry(environ).is_on


def test_console_exporters_are_the_sdks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    found = open_telemetry({"OTEL_TRACES_EXPORTER": "console"})
    assert found.is_on and found.meters is None
    assert isinstance(found.tracers, TracerProvider) and found.tracers.resource.attributes["service.name"] == "mine"
    found.close()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER='zipkin': must be otlp, console or none"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL='grpc': must be http/protobuf",
        ),
    ],
)
def test_what_is_not_honoured_is_refused(environ: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        open_telemetry(environ)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'loquetier\[otel\]'"):
        open_telemetry({"OTEL_TRACES_EXPORTER": "console"})
