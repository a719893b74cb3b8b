"""The benchmark of /health beside all that a server can do: its figures and its load. Its times are not tested."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from tests.server.fixtures import base_dir
from tests.server.tuned import tuned

from loquetier.bench.health import figures, measure

__all__ = ["base_dir"]


def test_figures_are_milliseconds() -> None:
    found = figures([n / 1000 for n in range(200, 0, -1)])
    assert found == {"requests": 200, "median": 100.5, "p99": 199.0, "longest": 200.0}


def test_it_measures_beside_a_job_and_clients(base_dir: Path, tmp_path: Path) -> None:
    with tuned(base_dir, tmp_path) as live:
        args = Namespace(clients=2, prompt_words=24, new_tokens=8, rank=2, seconds=0.5, settle=0.2)
        found = measure(live.address[1], args)
        assert found["meanwhile"]["errors"] == [] and found["meanwhile"]["tokens"] > 0
        assert found["meanwhile"]["job_steps"] > 0
        assert all(found[kind][path]["requests"] > 5 for kind in ("idle_ms", "busy_ms") for path in found[kind])
        jobs = live.http("GET", "/v1/fine_tuning/jobs").json()["data"]
        assert [job["status"] for job in jobs] == ["cancelled"]
