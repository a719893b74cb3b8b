"""The engine's books as Prometheus metrics, made anew from the last heartbeat whenever somebody reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from loquetier.engine.tally import Tally
from loquetier.server.watch import Pulse

OTHER = "other"
"""Label of all models beyond the cap."""


@dataclass(slots=True, eq=False)
class EngineCollector(Collector):
    """What `metrics.Metrics` registers; reads `pulse`, which whoever answers ``/metrics`` sets before."""

    base: str
    prefixes: tuple[str, ...]
    label_of: Callable[[str], str]
    """A model's label, `OTHER` beyond the cap."""
    pulse: Pulse | None = None

    def describe(self) -> list[Metric]:
        """None: registering must not read the engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Nothing before the first heartbeat."""
        pulse = self.pulse
        if pulse is None:
            return
        for prefix in self.prefixes:
            yield from self._shared(prefix, pulse)
        yield from self._rows(pulse)
        yield from self._jobs(pulse)
        yield from self._requests(pulse)

    def _shared(self, prefix: str, pulse: Pulse) -> Iterator[Metric]:
        """What vLLM has too."""
        labels = [self.base]

        def gauge(name: str, text: str, value: float) -> Metric:
            found = GaugeMetricFamily(f"{prefix}:{name}", text, labels=["model_name"])
            found.add_metric(labels, value)
            return found

        def counter(name: str, text: str, value: float) -> Metric:
            found = CounterMetricFamily(f"{prefix}:{name}", text, labels=["model_name"])
            found.add_metric(labels, value)
            return found

        waiting = pulse.num_waiting + pulse.num_deferred
        yield gauge("num_requests_running", "Answers that hold KV memory.", pulse.num_running)
        yield gauge("num_requests_waiting", "Answers that wait for KV memory or their adapter.", waiting)
        by_reason = GaugeMetricFamily(
            f"{prefix}:num_requests_waiting_by_reason",
            "Answers that wait, for KV memory (capacity) or for their adapter (deferred).",
            labels=["model_name", "reason"],
        )
        by_reason.add_metric([self.base, "capacity"], pulse.num_waiting)
        by_reason.add_metric([self.base, "deferred"], pulse.num_deferred)
        yield by_reason
        used = 1 - pulse.kv_pages_free / pulse.kv_pages
        yield gauge("kv_cache_usage_perc", "Part of the KV cache in use, 0 to 1.", used)
        yield counter("prefix_cache_queries", "Tokens looked for in the prefix cache.", pulse.prefix_queries)
        yield counter("prefix_cache_hits", "Tokens found in the prefix cache.", pulse.prefix_hits)
        yield counter("num_preemptions", "Answers that lost their KV memory for a while.", pulse.preemptions)
        yield _histogram(f"{prefix}:iteration_tokens_total", "Tokens served per step.", pulse.step_tokens, self.base)
        config = GaugeMetricFamily(f"{prefix}:cache_config_info", "The KV cache; always 1.", labels=list(pulse.cache))
        config.add_metric(list(pulse.cache.values()), 1)
        yield config

    def _rows(self, pulse: Pulse) -> Iterator[Metric]:
        totals = pulse.totals
        rows = CounterMetricFamily("loquetier:engine_rows", "Rows since the start, by kind.", labels=["kind"])
        for kind in ("train", "eval", "prefill", "decode"):
            rows.add_metric([kind], getattr(totals, f"{kind}_rows"))
        yield rows
        for name, text, value in (
            ("engine_steps", "Steps since the start.", totals.steps),
            ("engine_mixed_steps", "Steps that served and trained.", totals.mixed_steps),
            ("engine_backward_units", "Units of backward since the start.", totals.backward_units),
        ):
            yield CounterMetricFamily(f"loquetier:{name}", text, value=value)
        yield _histogram("loquetier:engine_step_seconds", "Seconds per step.", pulse.step_seconds)
        if pulse.prediction_error is not None:
            yield GaugeMetricFamily(
                "loquetier:step_time_prediction_error",
                "Mean of |predicted - actual| / actual of the last steps' times.",
                value=pulse.prediction_error,
            )

    def _jobs(self, pulse: Pulse) -> Iterator[Metric]:
        now = GaugeMetricFamily("loquetier:jobs", "Jobs in the engine, by state.", labels=["status"])
        ended = CounterMetricFamily("loquetier:jobs_ended", "Jobs that have ended, by outcome.", labels=["status"])
        for family, counts in ((now, pulse.jobs), (ended, pulse.jobs_ended)):
            for status, count in sorted(counts.items()):
                family.add_metric([status], count)
            yield family
        yield CounterMetricFamily("loquetier:train_steps", "Optimizer steps.", value=pulse.train_steps)
        yield CounterMetricFamily("loquetier:train_tokens", "Tokens trained on.", value=pulse.train_tokens)
        yield _histogram("loquetier:publish_seconds", "From weights in training to a served version.", pulse.publishes)

    def _requests(self, pulse: Pulse) -> Iterator[Metric]:
        requests = GaugeMetricFamily(
            "loquetier:model_requests", "Answers by model and state.", labels=["model_name", "state"]
        )
        for state, by_model in (("running", pulse.running), ("waiting", pulse.waiting)):
            shown: dict[str, int] = {}
            for model, count in by_model.items():
                label = self.label_of(model)
                shown[label] = shown.get(label, 0) + count
            for label, count in sorted(shown.items()):
                requests.add_metric([label, state], count)
        yield requests


def _histogram(name: str, text: str, tally: Tally, model: str | None = None) -> Metric:
    buckets = [
        (_bound(bound), float(count))
        for bound, count in zip((*tally.bounds, None), accumulate(tally.counts), strict=True)
    ]
    found = HistogramMetricFamily(name, text, labels=[] if model is None else ["model_name"])
    found.add_metric([] if model is None else [model], buckets, tally.total)
    return found


def _bound(bound: float | None) -> str:
    return "+Inf" if bound is None else str(bound)
