"""`loquetier doctor`: what this machine is, which code will run on it, and why. Reads only; loads no weights."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from loquetier import __version__
from loquetier.base.gemm import MEMORY_SHARE
from loquetier.base.gguf_cache import FORMAT
from loquetier.base.hardware import detect_hardware
from loquetier.base.presets import PRESETS, Preset, locate_preset
from loquetier.cache_dir import default_cache_dir
from loquetier.config import MIB, EngineConfig, resolve
from loquetier.errors import BaseNotFoundError, ConfigError
from loquetier.kernels.gemm import AMX, NO_KERNEL, GemmKernel
from loquetier.kernels.select import active_kernels, process_kernels

_ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "matplotlib")
Section = tuple[str, list[tuple[str, str]]]


def print_report(console: Console | None = None) -> None:
    """Print every section. Raises ConfigError when LOQUETIER_KERNELS names a backend that is not there."""
    console = console or Console()
    for title, lines in report():
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(style="cyan", no_wrap=True, min_width=18)
        table.add_column(overflow="fold")
        for name, value in lines:
            table.add_row(f"  {name}", value)
        console.print(table)
        console.print()


def report() -> Iterator[Section]:
    """The sections: a title, and (name, what we found) lines."""
    yield "Machine", list(_machine())
    yield "Software", list(_software())
    yield from _kernels(("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
    yield "Presets", [(name, _preset_state(preset)) for name, preset in PRESETS.items()]
    yield "Plan for smollm2-135m", list(_plan(PRESETS["smollm2-135m"]))


def _kernels(device_types: Sequence[str]) -> Iterator[Section]:
    """One section per kind of device. LOQUETIER_KERNELS may fit one and not the other; it must fit one."""
    refusals: list[ConfigError] = []
    sections: list[Section] = []
    for device_type in device_types:
        try:
            choices = active_kernels(os.environ, device_type)
            lines = [(kernel, f"{c.backend} ({c.reason})") for kernel, c in choices.items()]
        except ConfigError as error:
            refusals.append(error)
            lines = [("refused", str(error))]
        sections.append((f"Kernels on {device_type}", lines))
    if len(refusals) == len(device_types):
        raise refusals[0]
    yield from sections


def _machine() -> Iterator[tuple[str, str]]:
    cpuinfo = _cpuinfo()
    flags = set(f"{cpuinfo.get('flags', '')} {cpuinfo.get('Features', '')}".split())
    known = [flag for flag in _ISA_FLAGS if flag in flags]
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "CPU", cpuinfo.get("model name") or platform.processor() or "unknown"
    yield "ISA", " ".join(known) if known else "unknown (no /proc/cpuinfo)" if not flags else "none that matters here"
    yield "cores", f"{_usable_cores()} usable of {os.cpu_count()}"
    yield "memory", f"{_mib(detect_hardware('cpu').free_memory)} free"
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            yield f"cuda:{number}", f"{torch.cuda.get_device_name(number)}, {_mib(free)} free of {_mib(total)}"
    else:
        yield "GPU", "none that torch can use"


def _software() -> Iterator[tuple[str, str]]:
    yield "loquetier", __version__
    yield "python", platform.python_version()
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed (optional)"
    yield "torch threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')})"


def _plan(preset: Preset) -> Iterator[tuple[str, str]]:
    """What `Runtime` would decide now, with the weights' memory taken off first."""
    hardware = detect_hardware()
    config = resolve(EngineConfig(), hardware)
    yield "device", config.device
    if hardware.has_cuda:
        why = "a GPU"
    elif hardware.cpu_bf16_fast:
        why = "this CPU has AVX512_BF16 or AMX"
    else:
        why = "this CPU has neither AVX512_BF16 nor AMX"
    yield "dtype", f"{config.dtype} (auto: {why})"
    directory = _cached(preset)
    if directory is None:
        yield "weights", "not converted yet, so their size is not known"
    else:
        weights = _weight_bytes(directory) // 4 * getattr(torch, config.dtype).itemsize
        yield "weights", _mib(weights)
        yield "packed weights", _packed(config, weights)
        config = resolve(EngineConfig(), replace(hardware, free_memory=max(0, hardware.free_memory - weights)))
    assert config.kv_memory is not None and config.adapter_memory is not None and config.train_memory is not None
    yield "KV cache", f"at most {_mib(config.kv_memory)} (kv_memory)"
    yield "adapters", f"at most {_mib(config.adapter_memory)} (adapter_memory), for serving and training slots"
    yield "training", f"at most {_mib(config.train_memory)} (train_memory), for jobs' state and the open tape"


def _packed(config: EngineConfig, weights: int) -> str:
    """What `base.gemm.pack_base` will do with a preset's weights."""
    library = process_kernels("cpu").native("base_gemm") if config.device == "cpu" else None
    if library is None or config.dtype != "bfloat16":
        return "none: a CPU kernel packs bfloat16 weights, and it is not active here"
    level = GemmKernel(library).level
    if level == NO_KERNEL:
        return "none: this machine has neither AVX512_BF16 nor AMX"
    free = detect_hardware("cpu").free_memory - weights
    if weights > MEMORY_SHARE * free:
        return f"none: {_mib(weights)} more is over {MEMORY_SHARE:.0%} of what is left"
    name = "AMX" if level == AMX else "AVX512_BF16, up to 8 rows"
    return f"some {_mib(weights)} beside them, for {name}; with serve_only instead of them, but for the embedding"


def _preset_state(preset: Preset) -> str:
    try:
        locate_preset(preset.name)
    except BaseNotFoundError as error:
        return str(error)
    directory = _cached(preset)
    if directory is None:
        return f"installed; not converted yet: the first use takes some 20 s and writes to {default_cache_dir()}"
    return f"installed, converted in {directory}"


def _cached(preset: Preset) -> Path | None:
    """Directory of the converted weights, if there is one for this transformers. Its hash is not checked."""
    major = transformers.__version__.split(".")[0]
    found = sorted(default_cache_dir().glob(f"{Path(preset.filename).stem}-*-t{major}-f{FORMAT}"))
    return found[0] if found else None


def _weight_bytes(directory: Path) -> int:
    """Bytes of the float32 weights on disk."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo() -> dict[str, str]:
    """First processor's entries of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.0f} MiB"
