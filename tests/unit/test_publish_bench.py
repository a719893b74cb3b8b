"""The publish benchmark runs, and its verdict follows from its figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import save_tiny

from loquetier.bench.publish import measure, summarize


def test_it_measures_both_parts_and_counts_what_it_did(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", "llama")
    result = measure(str(tmp_path / "base"), "float32", rank=4, count=4, streams=3)
    for part in ("idle", "streaming"):
        assert result[part]["publish_ms"]["count"] == result[part]["copy_ms"]["count"] == 4
        assert result[part]["publish_ms"]["median"] > 0
    assert result["engine_says"]["publishes"] == 3 + 4 + 4 and result["adapter_bytes"] % 64 == 0


@pytest.mark.parametrize(("publish", "met"), [([2.0, 2.9, 9.0], True), ([2.0, 3.1, 3.1], False)])
def test_the_target_is_two_milliseconds_over_the_copy(publish: list[float], met: bool) -> None:
    assert summarize({"publish": publish, "copy": [1.0, 1.0, 5.0]})["meets_target"] is met
