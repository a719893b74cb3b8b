"""`loquetier serve --serve-only` over a data directory: it cannot train, and ends no job for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import openai
import pytest
from tests.server.fixtures import BASE, base_dir
from tests.server.live import ENGINE, wait_until
from tests.server.tuned import LONG, create, job_of, tuned, upload, wait_for, wait_for_step

__all__ = ["base_dir"]


def test_a_job_waits_for_a_server_that_can_train(base_dir: Path, tmp_path: Path) -> None:
    with tuned(base_dir, tmp_path) as live:
        file = upload(live.client())
        job, other = (create(live.client(), file, BASE, LONG).id for _ in range(2))
        wait_for_step(live, job, 2)
    with tuned(base_dir, tmp_path, engine=replace(ENGINE, serve_only=True)) as live:
        wait_until(lambda: job_of(live, job)["status"] == "queued", "the job waits")
        assert "--serve-only" in job_of(live, job)["reason"]
        with pytest.raises(openai.BadRequestError, match="--serve-only") as refused:
            create(live.client(), file, BASE, LONG)
        assert refused.value.code == "serve_only"
        assert live.client().fine_tuning.jobs.cancel(other).status == "cancelled"
    with tuned(base_dir, tmp_path) as live:
        assert wait_for(live, job, "running")["reason"] is None
        wait_for_step(live, job, 3)
        assert job_of(live, other)["status"] == "cancelled"
        assert live.client().fine_tuning.jobs.cancel(job).status == "cancelled"
