"""OpenTelemetry, where the standard OTEL_* variables ask for it: a span and the GenAI metrics of each request.

Names are those of the GenAI semantic conventions (still "Development"). Models, counts, times and outcomes; never a
prompt, an answer or a key. Everything else here runs without OpenTelemetry installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from loquetier.errors import ConfigError
from loquetier.server.metrics import RequestTimes
from loquetier.server.orders import Order

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.metrics import Histogram, MeterProvider
    from opentelemetry.trace import TracerProvider

PROVIDER: Final = "loquetier"
_SCOPE: Final = "loquetier.server"
_HEADERS: Final = ("traceparent", "tracestate")
_TOKENS: Final = tuple(4.0**n for n in range(14))
_DURATIONS: Final = tuple(0.01 * 2**n for n in range(14))
_PER_TOKEN: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_FIRST: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_INSTRUMENTS: Final = (
    ("gen_ai.server.request.duration", "s", _DURATIONS, "From admission to the last token."),
    ("gen_ai.server.time_to_first_token", "s", _FIRST, "From admission to the first token."),
    ("gen_ai.server.time_per_output_token", "s", _PER_TOKEN, "Mean over the tokens after the first."),
    ("gen_ai.client.token.usage", "{token}", _TOKENS, "Tokens of prompt and answer."),
)
"""(name, unit, the conventions' bucket bounds, description)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended."""

    reason: str
    """"stop", "length", "abort" or "error"."""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    label: str = ""
    """The version that answered; "" when none did."""
    times: RequestTimes | None = None
    error_type: str | None = None


@dataclass(slots=True)
class Observation:
    """One request under way; ended once, whatever ends it first."""

    telemetry: Telemetry
    order: Order
    parent: Context | None
    began_ns: int
    began: float
    is_over: bool = False

    def end(self, outcome: Outcome) -> None:
        """Tell of it. Does nothing the second time, or where nobody listens."""
        if not self.is_over and self.telemetry.is_on:
            self.is_over = True
            self.telemetry.tell(self, outcome)


@dataclass(slots=True)
class Telemetry:
    """Where spans and metrics go; without providers: nowhere."""

    tracers: TracerProvider | None = None
    meters: MeterProvider | None = None
    label_of: Callable[[str], str] = lambda model: model
    """A model's label in metrics: bounded, see `Metrics.model`."""
    clock: Callable[[], float] = time.monotonic
    _histograms: dict[str, Histogram] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.meters is not None:
            meter = self.meters.get_meter(_SCOPE)
            for name, unit, bounds, text in _INSTRUMENTS:
                self._histograms[name] = meter.create_histogram(
                    name, unit, text, explicit_bucket_boundaries_advisory=list(bounds)
                )

    @property
    def is_on(self) -> bool:
        """Whether anybody listens."""
        return self.tracers is not None or self.meters is not None

    def begin(self, order: Order, headers: Mapping[str, str]) -> Observation:
        """A request has come; its span becomes a child of the caller's, if he names one (W3C trace context)."""
        parent = None
        if self.tracers is not None:
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            carrier = {name: headers[name] for name in _HEADERS if name in headers}
            parent = TraceContextTextMapPropagator().extract(carrier)
        return Observation(self, order, parent, time.time_ns(), self.clock())

    def tell(self, seen: Observation, outcome: Outcome) -> None:
        """Record the span and the metrics of a request that is over."""
        seconds = self.clock() - seen.began
        operation = "chat" if seen.order.request_id.startswith("chat") else "text_completion"
        known: dict[str, Any] = {"gen_ai.operation.name": operation, "gen_ai.provider.name": PROVIDER}
        if outcome.error_type is not None:
            known["error.type"] = outcome.error_type
        if self.tracers is not None:
            self._span(seen, outcome, seconds, known)
        if self.meters is not None:
            model = self.label_of(seen.order.model.partition("@")[0])
            self._measure(outcome, seconds, known | {"gen_ai.request.model": model, "gen_ai.response.model": model})

    def _span(self, seen: Observation, outcome: Outcome, seconds: float, known: dict[str, Any]) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        assert self.tracers is not None
        order, params = seen.order, seen.order.params
        attributes = known | {
            "gen_ai.request.model": order.model,
            "gen_ai.response.id": order.request_id,
            "gen_ai.request.choice.count": params.n,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.stream": order.streaming is not None,
            "gen_ai.response.finish_reasons": (outcome.reason,),
            "gen_ai.usage.input_tokens": outcome.input_tokens,
            "gen_ai.usage.output_tokens": outcome.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": outcome.cached_tokens,
        }
        if params.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = params.max_tokens
        if outcome.label:
            attributes["gen_ai.response.model"] = outcome.label
        span = self.tracers.get_tracer(_SCOPE).start_span(
            f"{known['gen_ai.operation.name']} {order.model}",
            context=seen.parent,
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=seen.began_ns,
        )
        times = outcome.times
        if times is not None and times.first is not None:
            span.add_event("gen_ai.first_token", timestamp=seen.began_ns + _nanoseconds(times.first - seen.began))
        if outcome.error_type is not None:
            span.set_status(Status(StatusCode.ERROR))
        span.end(seen.began_ns + _nanoseconds(seconds))

    def _measure(self, outcome: Outcome, seconds: float, known: dict[str, Any]) -> None:
        found = self._histograms
        found["gen_ai.server.request.duration"].record(seconds, known)
        times = outcome.times
        if times is None or times.first is None or times.last is None or outcome.error_type is not None:
            return
        found["gen_ai.server.time_to_first_token"].record(times.first - times.began, known)
        if times.per_token is not None:
            found["gen_ai.server.time_per_output_token"].record(times.per_token, known)
        for kind, count in (("input", outcome.input_tokens), ("output", outcome.output_tokens)):
            found["gen_ai.client.token.usage"].record(count, known | {"gen_ai.token.type": kind})

    def close(self) -> None:
        """Send what has not been sent."""
        for provider in (self.tracers, self.meters):
            shutdown = getattr(provider, "shutdown", None)
            if shutdown is not None:
                shutdown()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


# --- from the environment ---

_ENDPOINTS: Final = tuple(f"OTEL_EXPORTER_OTLP{part}ENDPOINT" for part in ("_", "_TRACES_", "_METRICS_"))
_NONE: Final = "none"


def open_telemetry(environ: Mapping[str, str]) -> Telemetry:
    """What the standard variables ask for; off when no exporter and no endpoint is named.

    Honoured here: OTEL_SDK_DISABLED, OTEL_TRACES_EXPORTER and OTEL_METRICS_EXPORTER (otlp, console, none),
    OTEL_EXPORTER_OTLP_PROTOCOL (http/protobuf). All others (endpoints, headers, sampler, service name, ...) are the
    SDK's own business.

    Raises:
        ConfigError: it is asked for and not installed, or asked for in a way that is not honoured.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return Telemetry()
    has_endpoint = any(environ.get(name) for name in _ENDPOINTS)
    kinds = {signal: _exporter(environ, signal, has_endpoint) for signal in ("TRACES", "METRICS")}
    if set(kinds.values()) == {_NONE}:
        return Telemetry()
    if "otlp" in kinds.values():
        _check_protocol(environ)
    try:
        return Telemetry(_tracers(kinds["TRACES"]), _meters(kinds["METRICS"]))
    except ImportError as error:
        raise ConfigError(
            f"the OTEL_* variables ask for OpenTelemetry, which is not installed ({error.name}): "
            "pip install 'loquetier[otel]', or set OTEL_SDK_DISABLED=true"
        ) from error


def _exporter(environ: Mapping[str, str], signal: str, has_endpoint: bool) -> str:
    name = f"OTEL_{signal}_EXPORTER"
    kind = environ.get(name, "").strip().lower() or ("otlp" if has_endpoint else _NONE)
    if kind not in ("otlp", "console", _NONE):
        raise ConfigError(f"{name}={kind!r}: must be otlp, console or none")
    return kind


def _check_protocol(environ: Mapping[str, str]) -> None:
    for part in ("_", "_TRACES_", "_METRICS_"):
        name = f"OTEL_EXPORTER_OTLP{part}PROTOCOL"
        if environ.get(name, "http/protobuf") != "http/protobuf":
            raise ConfigError(f"{name}={environ[name]!r}: must be http/protobuf, the only protocol that is built in")


def _tracers(kind: str) -> TracerProvider | None:
    if kind == _NONE:
        return None
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

    exporter: SpanExporter = ConsoleSpanExporter()
    if kind == "otlp":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter()
    provider = TracerProvider(resource=_resource())
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _meters(kind: str) -> MeterProvider | None:
    if kind == _NONE:
        return None
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, MetricExporter, PeriodicExportingMetricReader

    exporter: MetricExporter = ConsoleMetricExporter()
    if kind == "otlp":
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

        exporter = OTLPMetricExporter()
    return MeterProvider([PeriodicExportingMetricReader(exporter)], _resource())


def _resource() -> Any:
    """Ours; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before it."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    return Resource.create({"service.name": PROVIDER}).merge(OTELResourceDetector().detect())
