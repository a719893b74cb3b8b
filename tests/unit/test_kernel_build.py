"""The C library: found, compiled, cached, refused; and which backend is chosen."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.native import native_library

from loquetier.errors import ConfigError
from loquetier.kernels import build, select, triton_load
from loquetier.kernels.build import BuildError, built_library, compile_library, find_compiler, source_hash, sources
from loquetier.kernels.native import ISA_NAMES, NativeLibrary
from loquetier.kernels.select import KERNELS, choose_kernels, process_kernels

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler on PATH")
NO_COMPILER = {"PATH": "/nowhere"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the library."""
    directory = tmp_path_factory.mktemp("cache")
    assert "compiled in" in built_library(directory).origin
    return directory


@needs_compiler
def test_it_is_compiled_once(cache: Path) -> None:
    found = built_library(cache)
    assert "before" in found.origin
    assert [p.name for p in (cache / "kernels").iterdir()] == [found.path.name], "nothing temporary is left"


@needs_compiler
def test_other_sources_or_flags_are_another_library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = built_library(cache).path
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1"))
    other = built_library(cache)
    assert other.path != first and "compiled in" in other.origin
    other.path.unlink()


@needs_compiler
def test_a_changed_header_changes_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "csrc"
    shutil.copytree(build.SOURCE_DIR, copy)
    before = source_hash()
    monkeypatch.setattr(build, "SOURCE_DIR", copy)
    assert source_hash() == before
    (copy / "loquetier.h").write_text((copy / "loquetier.h").read_text() + "\n")
    assert source_hash() != before


@needs_compiler
def test_a_library_of_other_sources_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loquetier.kernels.native.source_hash", lambda: "0" * 16)
    with pytest.raises(BuildError, match="other sources"):
        NativeLibrary(built_library(cache).path)


@needs_compiler
def test_sources_compile_without_a_warning(tmp_path: Path) -> None:
    assert COMPILER is not None
    compile_library(COMPILER, tmp_path / "strict.so", ["-Wall", "-Wextra", "-Werror", "-O1"])


@needs_compiler
def test_a_compiler_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.c").write_text("int f(void) { return nothing_like_it; }\n")
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)
    with pytest.raises(BuildError, match="nothing_like_it"):
        built_library(tmp_path / "cache")
    assert not list((tmp_path / "cache" / "kernels").iterdir()), "a failed build leaves nothing behind"


def test_no_compiler_is_named(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    environ = {**NO_COMPILER, "LOQUETIER_CACHE": str(tmp_path)}
    with caplog.at_level(logging.WARNING, "loquetier.kernels"):
        kernels = choose_kernels(environ)
    assert {c.backend for c in kernels.choices.values()} == {"reference"}
    assert all("no C compiler" in c.reason for c in kernels.choices.values())
    assert len(caplog.records) == 1 and "no C compiler" in caplog.records[0].getMessage()
    with pytest.raises(ConfigError, match="LOQUETIER_KERNELS=cpu: no C compiler"):
        choose_kernels({**environ, "LOQUETIER_KERNELS": "cpu"})
    with pytest.raises(BuildError, match="CC='no-such-cc'"):
        find_compiler({"CC": "no-such-cc"})


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="LOQUETIER_CACHE"):
        built_library(tmp_path / "file")


def test_what_cannot_run_here_is_an_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"LOQUETIER_KERNELS=triton: .*TRITON_INTERPRET=1"):
        choose_kernels({"LOQUETIER_KERNELS": "triton"})
    with pytest.raises(ConfigError, match="LOQUETIER_KERNELS=cpu: C kernels do not run on cuda"):
        choose_kernels({"LOQUETIER_KERNELS": "cpu"}, "cuda")
    monkeypatch.setattr(triton_load, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="LOQUETIER_KERNELS=triton: the package triton is not installed"):
        choose_kernels({"LOQUETIER_KERNELS": "triton", "TRITON_INTERPRET": "1"})
    with caplog.at_level(logging.WARNING, "loquetier.kernels"):
        kernels = choose_kernels({}, "cuda")
    assert all(c.backend == "reference" and "not installed" in c.reason for c in kernels.choices.values())
    assert len(caplog.records) == 1 and "on cuda" in caplog.records[0].getMessage()
    with pytest.raises(ConfigError, match=r"'warp': must be one of auto, reference, cpu"):
        choose_kernels({"LOQUETIER_KERNELS": "warp"})
    assert choose_kernels({"LOQUETIER_KERNELS": "reference"}).library is None


@needs_compiler
def test_a_kernel_that_fails_its_check_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checks = {KERNELS[0]: lambda library: "off by 0.5", KERNELS[1]: lambda library: None}
    monkeypatch.setattr(select, "CHECKS", checks)
    kernels = choose_kernels(dict(os.environ) | {"LOQUETIER_KERNELS": "auto"})
    assert kernels.native(KERNELS[0]) is None and kernels.native(KERNELS[1]) is kernels.library
    assert "off by 0.5" in kernels.choices[KERNELS[0]].reason
    assert [kernels.choices[k].fault for k in KERNELS[:3]] == ["off by 0.5", None, None]
    assert any(r.levelno == logging.ERROR and KERNELS[0] in r.getMessage() for r in caplog.records)
    with pytest.raises(ConfigError, match=r"off by 0\.5"):
        choose_kernels(dict(os.environ) | {"LOQUETIER_KERNELS": "cpu"})


@needs_compiler
def test_every_kernel_of_this_machine_passes_its_check(cache: Path) -> None:
    library = NativeLibrary(built_library(cache).path)
    for kernel, check in select.CHECKS.items():
        assert kernel in KERNELS
        assert check(library) is None


@needs_compiler
def test_what_a_machine_lacks_instructions_for_is_not_said_to_run() -> None:
    with native_library("generic") as library:
        for kernel, needs in (("base_gemm", "AVX512_BF16"), ("smlm_long", "AMX")):
            choice = select._checked(kernel, library, "in C", forced=True)
            assert choice.backend == "reference" and needs in choice.reason and choice.fault is None
        assert select._checked("row_ops", library, "in C", forced=True).backend == "cpu"


@needs_compiler
def test_a_variant_can_be_asked_for(cache: Path) -> None:
    path = built_library(cache).path
    best = NativeLibrary(path).isa
    try:
        for isa in ISA_NAMES[: ISA_NAMES.index(best) + 1]:
            assert NativeLibrary(path, isa).isa == isa
        for isa in ISA_NAMES[ISA_NAMES.index(best) + 1 :]:
            with pytest.raises(BuildError, match=isa):
                NativeLibrary(path, isa)
    finally:
        assert NativeLibrary(path).isa == best


def test_importing_compiles_nothing(tmp_path: Path) -> None:
    """And works without a compiler: PATH is empty."""
    code = "import loquetier.runtime, loquetier.kernels.select as s; assert s.process_kernels.cache_info().misses == 0"
    environ = {"PYTHONPATH": os.pathsep.join(sys.path), "LOQUETIER_CACHE": str(tmp_path / "cache"), **NO_COMPILER}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists()


def test_a_process_chooses_once() -> None:
    assert process_kernels() is process_kernels()
    assert all(path.suffix == ".c" for path in sources())


def test_a_triton_kernel_that_fails_its_check_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By numbers or by an error; the others run. Forced, it is an error."""

    def refused(device: object) -> str | None:
        raise RuntimeError("no such instruction")

    checks = {"smlm_forward": lambda device: None, "smlm_backward": lambda device: "off by 0.5", "row_ops": refused}
    monkeypatch.setattr(triton_load, "why_not", lambda environ, device_type: None)
    monkeypatch.setattr(triton_load, "checks", lambda: checks)
    monkeypatch.setattr(triton_load, "describe", lambda device: "a stand-in")
    kernels = choose_kernels({}, "cuda")
    assert kernels.in_triton("smlm_forward") and kernels.choices["smlm_forward"].reason == "a stand-in"
    for kernel, why in (("smlm_backward", "off by 0.5"), ("row_ops", "RuntimeError: no such instruction")):
        assert not kernels.in_triton(kernel) and why in kernels.choices[kernel].reason
        assert why in (kernels.choices[kernel].fault or "")
        assert any(r.levelno == logging.ERROR and why in r.getMessage() for r in caplog.records)
    assert kernels.choices["decode_attention"].reason.endswith("no Triton kernel for it")
    assert kernels.choices["decode_attention"].fault is None
    with pytest.raises(ConfigError, match=r"LOQUETIER_KERNELS=triton: .*no such instruction"):
        choose_kernels({"LOQUETIER_KERNELS": "triton"}, "cuda")
