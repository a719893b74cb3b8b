"""Prometheus metrics: our own, and vLLM's names as aliases. Labels are capped; unknown models never become labels."""

from __future__ import annotations

import time
from collections import Counter as Counted
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from loquetier.server.engine_metrics import OTHER, EngineCollector
from loquetier.server.settings import ServerSettings
from loquetier.server.watch import Pulse

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


@dataclass(slots=True)
class RequestTimes:
    """When a request's tokens came, in monotonic seconds."""

    clock: Callable[[], float]
    began: float = field(init=False)
    first: float | None = None
    last: float | None = None
    queued: float | None = None
    """Seconds until the engine computed the first rows."""
    gaps: list[float] = field(default_factory=list)
    """Between two tokens of one choice."""
    _latest: dict[tuple[int, int], float] = field(default_factory=dict)
    """When the last token of each choice came."""

    def __post_init__(self) -> None:
        self.began = self.clock()

    def token(self, now: float, choice: tuple[int, int]) -> None:
        """A token of a choice (its prompt, its index) came at `now`, by the same clock."""
        if self.first is None:
            self.first = now
        if choice in self._latest:
            self.gaps.append(now - self._latest[choice])
        self.last = self._latest[choice] = now

    @property
    def per_token(self) -> float | None:
        """Mean seconds of a choice's further tokens; choices that share their steps do not make them faster."""
        return sum(self.gaps) / len(self.gaps) if self.gaps else None


class Metrics:
    """One registry per server, so that two servers in one process do not mix."""

    def __init__(self, settings: ServerSettings, base_name: str) -> None:
        self._settings, self._base = settings, base_name
        self.registry = CollectorRegistry()
        self._models: set[str] = {base_name}
        self._prefixes = ("loquetier", "vllm") if settings.vllm_metrics else ("loquetier",)
        self._counters: dict[str, list[Counter]] = {}
        self._histograms: dict[str, list[Histogram]] = {}
        self._build()

    def _build(self) -> None:
        model = ("model_name",)
        for name, text, labels in (
            ("prompt_tokens", "Prompt tokens of admitted requests.", model),
            ("generation_tokens", "Generated tokens.", model),
            ("request_success", "Completed requests.", ("model_name", "finished_reason")),
            ("admission_rejections", "Requests refused at the door.", ("model_name", "reason")),
        ):
            self._counters[name] = [
                Counter(f"{p}:{name}", text, labels, registry=self.registry) for p in self._prefixes
            ]
        for name, text, buckets in (
            ("time_to_first_token_seconds", "From admission to the first token.", _SECONDS),
            ("inter_token_latency_seconds", "Between two tokens of an answer.", _SECONDS),
            ("request_time_per_output_token_seconds", "Mean over its answers' further tokens.", _SECONDS),
            ("e2e_request_latency_seconds", "From admission to the last token.", _SECONDS),
            ("request_prompt_tokens", "Prompt tokens per request.", _TOKENS),
            ("request_generation_tokens", "Generated tokens per request.", _TOKENS),
            ("request_queue_time_seconds", "From arrival in the engine to the first rows.", _SECONDS),
            ("request_inference_time_seconds", "From the first rows to the last token.", _SECONDS),
            ("request_prefill_time_seconds", "From the first rows to the first token.", _SECONDS),
            ("request_decode_time_seconds", "From the first token to the last.", _SECONDS),
            ("request_params_n", "Answers asked for per prompt.", (1, 2, 5, 10, 20, 50, 128)),
            ("request_params_max_tokens", "Most tokens asked for per answer.", _TOKENS),
        ):
            self._histograms[name] = [
                Histogram(f"{p}:{name}", text, model, buckets=buckets, registry=self.registry) for p in self._prefixes
            ]
        self._build_own()

    def _build_own(self) -> None:
        registry = self.registry
        self._http = Counter("loquetier:http_requests", "Answers by status.", ("status",), registry=registry)
        self._slo = Counter(
            "loquetier:slo_requests", "Requests by whether they kept a goal.", ("goal", "met"), registry=registry
        )
        self._adapter_load = Histogram(
            "loquetier:adapter_load_seconds", "Reading and loading an adapter.", buckets=_SECONDS, registry=registry
        )
        self._swap_in = Histogram(
            "loquetier:adapter_swap_in_seconds",
            "From a place in memory found to an adapter's weights being there.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._resident = Gauge(
            "loquetier:resident", "Versions by adapter and where they are.", ("adapter", "tier"), registry=registry
        )
        # vLLM's shape: the names in the labels, the current time as the value; two lists, so the series are cleared.
        self._lora_info = Gauge(
            "vllm:lora_requests_info",
            "Adapters that answer and that are waited for.",
            ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
            registry=registry if self._settings.vllm_metrics else None,
        )
        self._own_gauges = {
            name: Gauge(f"loquetier:{name}", text, labels, registry=registry)
            for name, text, labels in (
                ("adapters_resident", "Adapter versions in memory.", ()),
                ("adapters_registered", "Adapter versions, in memory or not.", ()),
                ("adapters_waiting", "Requests, evaluations and jobs that wait for their adapter.", ()),
                ("adapters_in_host_memory", "Adapter versions in host memory.", ()),
                ("adapter_loads_total", "Versions that were brought into memory.", ()),
                ("adapter_evictions_total", "Versions that left memory for others.", ()),
                ("adapter_load_failures_total", "Versions that could not be brought in.", ()),
                ("adapter_bytes_used", "Bytes of adapter memory in use.", ()),
                ("adapter_bytes_total", "Bytes of adapter memory.", ()),
            )
        }
        self._engine = EngineCollector(self._base, self._prefixes, self.known)
        registry.register(self._engine)

    def model(self, name: str) -> str:
        """The label for a model that is known to exist; "other" beyond the cap."""
        if name in self._models:
            return name
        if len(self._models) < self._settings.metric_models:
            self._models.add(name)
            return name
        return OTHER

    def known(self, name: str) -> str:
        """The label of a model that has one by now, else "other": reading the metrics makes no labels."""
        return name if name in self._models else OTHER

    def admitted(self, model: str, prompt_tokens: Iterable[int], n: int, max_tokens: int | None) -> None:
        """A request was queued. `max_tokens`: None where the context's end decides."""
        label = self.model(model)
        for count in prompt_tokens:
            self._count("prompt_tokens", count, label)
            self._observe("request_prompt_tokens", count, label)
        self._observe("request_params_n", n, label)
        if max_tokens is not None:
            self._observe("request_params_max_tokens", max_tokens, label)

    def refused(self, model: str, reason: str) -> None:
        """A request for an existing model was refused at the door. `reason` is one of our own codes."""
        self._count("admission_rejections", 1, self.model(model), reason)

    def finished(self, model: str, times: RequestTimes, tokens: int, reason: str) -> None:
        """A request is over: "stop", "length", "abort" or "error"."""
        label, now = self.model(model), times.clock()
        self._count("request_success", 1, label, reason)
        self._count("generation_tokens", tokens, label)
        self._observe("request_generation_tokens", tokens, label)
        self._observe("e2e_request_latency_seconds", now - times.began, label)
        if times.first is None or times.last is None:
            return
        self._observe("time_to_first_token_seconds", times.first - times.began, label)
        queued = times.queued or 0.0
        for name, seconds in (
            ("queue", queued),
            ("prefill", times.first - times.began - queued),
            ("decode", times.last - times.first),
            ("inference", times.last - times.began - queued),
        ):
            self._observe(f"request_{name}_time_seconds", max(0.0, seconds), label)
        for gap in times.gaps:
            self._observe("inter_token_latency_seconds", gap, label)
        self._goal("ttft", self._settings.slo_ttft, times.first - times.began)
        if (per_token := times.per_token) is not None:
            self._observe("request_time_per_output_token_seconds", per_token, label)
            self._goal("tpot", self._settings.slo_tpot, per_token)

    def _goal(self, name: str, goal: float | None, seconds: float) -> None:
        if goal is not None:
            self._slo.labels(name, "yes" if seconds <= goal else "no").inc()

    def answered(self, status: int) -> None:
        """An HTTP answer."""
        self._http.labels(str(status)).inc()

    def adapter_loaded(self, seconds: float) -> None:
        """An adapter is there."""
        self._adapter_load.observe(seconds)

    def page(self, pulse: Pulse | None) -> bytes:
        """The text of ``/metrics``."""
        self._engine.pulse = pulse
        if pulse is not None:
            self._set_adapters(pulse)
        return generate_latest(self.registry)

    def _set_adapters(self, pulse: Pulse) -> None:
        found, own = pulse.adapters, self._own_gauges
        own["adapter_bytes_used"].set(pulse.arena_bytes - pulse.arena_bytes_free)
        own["adapter_bytes_total"].set(pulse.arena_bytes)
        own["adapters_resident"].set(found.num_resident)
        own["adapters_registered"].set(found.num_registered)
        own["adapters_waiting"].set(found.num_waiting)
        own["adapters_in_host_memory"].set(found.num_in_host_memory)
        own["adapter_loads_total"].set(found.loads)
        own["adapter_evictions_total"].set(found.evictions)
        own["adapter_load_failures_total"].set(found.load_failures)
        self._resident.clear()
        counts = Counted(self.model(name) for name in found.resident)
        counts["other"] += found.num_resident - len(found.resident)
        for name, count in counts.items():
            if count:
                self._resident.labels(name, "memory").set(count)
        if found.num_in_host_memory:
            self._resident.labels("other", "host").set(found.num_in_host_memory)
        self._lora_info.clear()
        names = [",".join(sorted({self.model(name) for name in some})) for some in (found.running, found.waiting)]
        self._lora_info.labels(str(found.capacity), *names).set(time.time())

    def adapter_swapped_in(self, seconds: float) -> None:
        """A version that was registered has come into memory. Any thread."""
        self._swap_in.observe(seconds)

    def _count(self, name: str, amount: float, *labels: str) -> None:
        for counter in self._counters[name]:
            counter.labels(*labels).inc(amount)

    def _observe(self, name: str, value: float, label: str) -> None:
        for histogram in self._histograms[name]:
            histogram.labels(label).observe(value)
