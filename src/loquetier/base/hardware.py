"""What this machine is, as far as `config.resolve` asks."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from loquetier.config import Hardware
from loquetier.errors import ConfigError

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


def detect_hardware(device: str = "auto") -> Hardware:
    """Look at the machine. `device` says whose memory counts: "cpu", "cuda", "cuda:1", ... or "auto" (a GPU if any).

    Raises:
        ConfigError: a GPU by a number that there is not.
    """
    has_cuda = torch.cuda.is_available()
    number = device.removeprefix("cuda:")
    if has_cuda and number.isdigit() and int(number) >= torch.cuda.device_count():
        raise ConfigError(f"device={device!r}: {torch.cuda.device_count()} CUDA devices are visible, from cuda:0")
    if has_cuda and device != "cpu":
        free, _total = torch.cuda.mem_get_info(None if device == "auto" else torch.device(device))
    else:
        free = cpu_free_memory(_read(_MEMINFO), _cgroup_free())
    return Hardware(has_cuda=has_cuda, cpu_bf16_fast=cpu_bf16_fast(_read(_CPUINFO)), free_memory=free)


def cpu_bf16_fast(cpuinfo: str) -> bool:
    """True when the text of /proc/cpuinfo names AVX512_BF16 or AMX; False where there is no such file."""
    flags = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    return not _BF16_FLAGS.isdisjoint(flags.split())


def cpu_free_memory(meminfo: str, cgroup_free: int | None) -> int:
    """Bytes that can be had without swapping: MemAvailable, or the control group's rest if that is less."""
    available = next(
        (int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable:")), None
    )
    if available is None:
        # No /proc (macOS): half of what is built in is a guess on the safe side.
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return available if cgroup_free is None else max(0, min(available, cgroup_free))


def _cgroup_free() -> int | None:
    """Bytes left under this container's memory limit (cgroup v2); None without a limit."""
    limit = _read(_CGROUP / "memory.max").strip()
    used = _read(_CGROUP / "memory.current").strip()
    if not limit.isdigit() or not used.isdigit():
        return None
    # File cache counts as used, but the kernel gives it back on demand.
    stat = dict(line.split() for line in _read(_CGROUP / "memory.stat").splitlines() if len(line.split()) == 2)
    return int(limit) - int(used) + int(stat.get("inactive_file", 0))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
