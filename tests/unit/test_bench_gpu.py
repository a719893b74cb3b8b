"""The GPU benchmark's script, on a CPU with a tiny shape: every section runs, and one that breaks harms no other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import loquetier.bench.gpu.__main__ as script
from loquetier.base.decode_stack import DecodeStack
from loquetier.bench.gpu import measured, numerics, work
from loquetier.bench.gpu.sections import SECTIONS, TARGETS, Section
from loquetier.bench.gpu.shapes import LLAMA_3_8B, TINY, random_model
from loquetier.errors import EngineError
from loquetier.kernels import triton_load, varlen

NOT_THERE = ("fastapi", "uvicorn", "typer", "rich", "msgspec", "structlog", "llguidance", "gguf", "prometheus_client")
"""What a bare GPU machine lacks of what the package depends on."""


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.name)
def test_every_section_gives_a_result(section: Section) -> None:
    if section.name == "fine_tuning":
        pytest.importorskip("peft")
    result = section.run(TINY)
    assert result and json.loads(json.dumps(result)) == result, "as it will be written"
    for target in TARGETS:
        if target.section == section.name:
            value = target.judged({section.name: {"result": result}})["value"]
            assert isinstance(value, float) and value > 0, f"{target.measure}: nothing at {target.path}"


def test_a_kernel_that_fails_its_check_is_a_failed_section(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch runs in its place, and every figure would be of something else."""
    monkeypatch.setattr(triton_load, "why_not", lambda environ, device_type: None)
    monkeypatch.setattr(triton_load, "describe", lambda device: "a stand-in")
    monkeypatch.setattr(varlen, "why_not", lambda device: None)
    checks: dict[str, Any] = {"smlm_forward": lambda device: None, "row_ops": lambda device: "off by 0.5"}
    monkeypatch.setattr(triton_load, "checks", lambda: checks)
    on_gpu = dataclasses.replace(TINY, device="cuda")
    with pytest.raises(EngineError, match=r"row_ops: .*off by 0\.5"):
        numerics.kernels(on_gpu)
    checks["row_ops"] = checks["smlm_forward"]
    assert numerics.kernels(on_gpu)["row_ops"]["backend"] == "triton"


def test_a_run_writes_one_file_and_needs_no_web_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NOT_THERE:  # packages of these names that cannot be imported
        (tmp_path / "without" / name).mkdir(parents=True)
        (tmp_path / "without" / name / "__init__.py").write_text("raise ImportError('not on this machine')")
    output = tmp_path / "out" / "gpu.json"
    # The section's process imports all that the program does.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "without"))
    assert script.main(["--dry-run", "--output", str(output), "--only", "roofline"]) == 0
    written: dict[str, Any] = json.loads(output.read_text())
    assert written["machine"]["dry_run"] is True and written["targets"] == []
    assert written["sections"]["roofline"]["result"]["gemm_flop_per_s"] > 0


def test_a_section_that_crashes_or_hangs_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    assert script._isolated("kernels", 1.0, dry=True)["error"]["type"] == "NoTimeLeft"
    monkeypatch.setattr(script, "MIN_SECONDS", 0.0)
    assert script._isolated("kernels", 0.05, dry=True)["error"]["type"] == "TimedOut"
    crashed = script._isolated("no such section", 60.0, dry=True)["error"]
    assert crashed["type"] == "Crashed" and "StopIteration" in crashed["stderr"]


def test_a_section_that_raises_is_written_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(_shape: object) -> dict[str, Any]:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("loquetier.bench.gpu.sections.SECTIONS", (Section("broken", broken, 1.0),))
    assert script._run_section("broken", tmp_path / "o.json", dry=True) == 1
    assert json.loads((tmp_path / "o.json").read_text()) == {
        "error": {"type": "RuntimeError", "message": "no kernel image is available"}
    }


def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert script.main([]) == 1 and "no CUDA device" in capsys.readouterr().err
    assert script.main(["--dry-run", "--only", "speed"]) == 1 and "--only speed" in capsys.readouterr().err


def test_sections_fit_the_time_and_the_shape_is_an_8b_model() -> None:
    assert sum(s.seconds for s in SECTIONS) <= script.TOTAL_SECONDS <= 540
    # 7.5 of the 8.03 billion weights: the rest are the embeddings, which nothing is multiplied by.
    assert LLAMA_3_8B.linear_weights == pytest.approx(7.504e9, rel=1e-3)
    judged = TARGETS[0].judged({"single_stream": {"result": {"base_ms_per_token": 9.0}}})
    assert judged["met"] is False and TARGETS[0].judged({})["met"] is None


def test_the_numeric_check_covers_the_path_of_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """In their dtype, on the fused stack; what is wrong there alone is found, and so is another path."""
    small = measured.small_shape(TINY)
    assert small.dtype == LLAMA_3_8B.dtype == measured.small_shape(LLAMA_3_8B).dtype
    model = numerics._spread(random_model(small))
    prompts = work.prompts(small, 3, seed=7)
    found = measured.served(small, model, prompts, [(False, False)])
    if not str(found["path"]).startswith("fused"):
        pytest.skip("this processor has no kernels of a bfloat16 base")
    assert 0 < found["logprob_error"] < 1

    def wrong(self: DecodeStack, *args: Any) -> Any:
        return right(self, *args) * 1.5

    right = DecodeStack.__call__
    with monkeypatch.context() as patch:
        patch.setattr(DecodeStack, "__call__", wrong)
        with pytest.raises(EngineError, match="log-probability is"):
            measured.served(small, model, prompts, [(False, False)])
    monkeypatch.setattr("loquetier.base.model.fused_stack", lambda *args: None)
    with pytest.raises(EngineError, match="does not run on the fused stack"):
        measured.served(small, model, prompts, [(False, False)])
