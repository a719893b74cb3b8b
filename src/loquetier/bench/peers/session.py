"""The sides of a run, each started when it is first needed, warmed up, and kept until the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from loquetier.base.hardware import detect_hardware
from loquetier.base.loading import load_base
from loquetier.base.support import linear_targets
from loquetier.bench.ours import allowed_tokens
from loquetier.bench.peers.client import drive
from loquetier.bench.peers.envs import PeerEnvironments
from loquetier.bench.peers.oneshot import OneShot, write_examples
from loquetier.bench.peers.plan import Plan
from loquetier.bench.peers.processes import Process, Worker, free_port, wait_ready
from loquetier.bench.roofline import ModelSize
from loquetier.config import EngineConfig, resolve

WARM_UP_TOKENS = 4
READY_SECONDS = 300.0
"""vLLM compiles at its first start."""


class RunningSide(Protocol):
    """Something that measures; a `Worker` or a `Server`."""

    def run(self, task: str, draw: int, new_tokens: int | None = None) -> dict[str, Any]:
        """One measurement."""


class Server:
    """A server that answers `loquetier.bench.peers.client`."""

    def __init__(self, process: Process, port: int, base: str, asks: Callable[..., Any]) -> None:
        self._port, self._base, self._asks = port, base, asks
        wait_ready(process, port, READY_SECONDS)

    def run(self, task: str, draw: int, new_tokens: int | None = None) -> dict[str, Any]:
        """One measurement."""
        return drive(self._port, self._base, self._asks(task, draw, new_tokens))


class Session:
    """Processes and files of a run; a context manager.

    Args:
        directory: for adapters and logs.
        envs: peers' environments; None: PEFT runs in ours.

    Raises:
        ConfigError: an environment is missing. EngineError: a process failed; its log's end is in the message.
    """

    def __init__(self, plan: Plan, directory: Path, envs: PeerEnvironments | None) -> None:
        self._plan, self._directory, self._envs = plan, directory, envs
        self.dtype = resolve(EngineConfig(dtype=plan.dtype), detect_hardware("cpu")).dtype  # type: ignore[arg-type]
        loaded = load_base(plan.base, dtype=getattr(torch, self.dtype), device="cpu")
        targets = linear_targets(loaded.model)
        self.size = ModelSize.of(loaded, targets)
        self._name, self._source = loaded.name, loaded.source
        self._allowed = allowed_tokens(loaded)
        self._adapters = plan.traffic.write_adapters(targets, directory / "adapters")
        self._sides: dict[str, RunningSide] = {}
        self._processes: dict[str, Process] = {}
        self._exit = ExitStack()
        self.versions: dict[str, Mapping[str, Any]] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._exit.close()

    def run(self, side: str, task: str, draw: int) -> dict[str, Any]:
        """One measurement on a warm side."""
        if side not in self._sides:
            self._sides[side] = opened = self._open(side)
            for name, work in dict.fromkeys(self._plan.steps):
                if name == side and work != "roofline":
                    opened.run(work, 0, WARM_UP_TOKENS)
        process = self._processes.get(side)
        if process is not None:
            process.go_on()
        sample = self._sides[side].run(task, draw)
        if process is not None:
            process.pause()
        return sample

    def _open(self, side: str) -> RunningSide:
        if side in ("ours", "peft"):
            return self._worker(side)
        if side in ("ours-train", "peft-train", "ours-steps"):
            return self._one_shot(side)
        port = free_port()
        if side == "ours-http":
            process = self._start(side, self._our_command(port), self._environ())
            return Server(process, port, self._name, self._asks)
        process = self._start(side, self._vllm_command(port, side), self._vllm_environ())
        return Server(process, port, "base", self._asks)

    def _asks(self, task: Any, draw: int, new_tokens: int | None) -> Any:
        return self._plan.traffic.asks(task, draw, self._allowed, new_tokens)

    def _start(self, side: str, command: list[str], environ: Mapping[str, str]) -> Process:
        process = Process(side, command, environ, self._directory / f"{side}.log")
        return self._keep(side, process)

    def _keep(self, side: str, process: Process) -> Process:
        self._exit.callback(process.close)
        self._processes[side] = process
        return process

    def _environ(self) -> dict[str, str]:
        return os.environ | {"OMP_NUM_THREADS": str(self._plan.threads), "OMP_WAIT_POLICY": "PASSIVE"}

    # --- us and PEFT ---

    def _interpreter(self, side: str) -> tuple[Path, dict[str, str]]:
        environ, python = self._environ(), Path(sys.executable)
        if side.startswith("peft") and self._envs is not None:
            python = self._envs.python("peft")
            environ["PYTHONPATH"] = str(self._envs.source())
        return python, environ

    def _one_shot(self, side: str) -> OneShot:
        python, environ = self._interpreter(side)
        data = self._plan.data or self._directory / "examples.jsonl"
        if self._plan.data is None:
            write_examples(data, 64)
        return OneShot(
            side=side,
            python=python,
            environ=environ,
            threads=self._plan.threads,
            base=str(self._source) if side == "peft-train" else self._plan.base,
            dtype=self.dtype,
            data=data,
            directory=self._directory,
        )

    def _worker(self, side: str) -> Worker:
        python, environ = self._interpreter(side)
        setup = {
            "side": side,
            "threads": self._plan.threads,
            "base": str(self._source) if side == "peft" else self._plan.base,
            "dtype": self.dtype,
            "adapters": {name: str(path) for name, path in self._adapters.items()},
            "traffic": asdict(self._plan.traffic),
            "workload": asdict(self._plan.workload),
        }
        worker = Worker(side, python, environ, self._directory / f"{side}.log", setup)
        self._keep(side, worker)
        self.versions[side] = worker.versions
        return worker

    def _our_command(self, port: int) -> list[str]:
        given = [f"--adapter={name}={path}" for name, path in self._adapters.items()]
        return [
            *(sys.executable, "-m", "loquetier", "serve", self._plan.base),
            *("--port", str(port), "--dtype", self.dtype, "--log-level", "error"),
            *("--kv-memory", str(1 << 30), "--adapter-memory", str(1 << 30)),
            *("--adapter-dtype", self.dtype),  # vLLM keeps adapters in the base's type, PEFT in float32
            *given,
        ]

    # --- vLLM ---

    def _vllm_command(self, port: int, side: str) -> list[str]:
        assert self._envs is not None, "the plan has vLLM, so there are environments"
        self.versions["vllm"] = self._envs.about("vllm")
        command = [
            *(str(self._envs.python("vllm")), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(self._source), "--served-model-name", "base", "--dtype", self.dtype),
            *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048"),
            # Prompts are new in every round, so its cache could not help; without it nobody needs to believe that.
            *("--no-enable-prefix-caching", "--disable-log-stats"),
        ]
        if side == "vllm-lora":
            traffic = self._plan.traffic
            command += ["--enable-lora", "--max-loras", str(traffic.adapters), "--max-lora-rank", str(traffic.rank)]
            command += ["--lora-modules", *(f"{name}={self._adapters[name]}" for name in traffic.uniform_names)]
        return command

    def _vllm_environ(self) -> dict[str, str]:
        cpus = sorted(os.sched_getaffinity(0))[: self._plan.threads]
        assert self._envs is not None, "the plan has vLLM, so there are environments"
        own = {
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CACHE_ROOT": str(self._envs.directory / "vllm-cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        # Its threads are its own affair: it sets OMP's variables for its worker from the list of CPUs.
        return {k: v for k, v in os.environ.items() if not k.startswith("OMP_") and k != "PYTHONPATH"} | own
