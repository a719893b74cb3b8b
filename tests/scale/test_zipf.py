"""A small run of `make zipf`: a hundred adapters, room for eight, no answer from a wrong adapter or version."""

from __future__ import annotations

from pathlib import Path

from tests.scale.zipf import SMALL, check, storm


def test_row_38_no_answer_is_another_adapters_or_another_versions(tmp_path: Path) -> None:
    with storm(tmp_path, SMALL) as (found, expected):
        report = found.run()
        check(found, expected)
        found.runtime.check_integrity()
    assert report.wrong == []
    assert report.answers + sum(report.errors.values()) == SMALL.requests
    assert report.evictions > 50 and report.loads > 50, "most adapters had to be brought in again and again"
    assert report.most_resident <= 8 and report.reloads > 0 and report.live_versions > 1
