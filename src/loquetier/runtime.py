"""The Python API: one object that loads a base, serves many adapters on it and trains others meanwhile."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

from loquetier.adapters.packed import PackedAdapter
from loquetier.adapters.registry import check_name
from loquetier.adapters.spec import AdapterSpec, LoraSpec
from loquetier.answers import Answers
from loquetier.arguments import Data, Prompt, checkpoint_config, given, given_spec, path_of, records_of
from loquetier.base.hardware import detect_hardware
from loquetier.base.loading import load_base
from loquetier.base.model import Base
from loquetier.config import EngineConfig, SamplingParams, TrainingConfig, resolve
from loquetier.engine.background import Threads
from loquetier.engine.engine import Engine
from loquetier.engine.loop import EngineLoop
from loquetier.engine.request import TokenEvent
from loquetier.engine_port import EnginePort
from loquetier.errors import (
    ConfigError,
    EngineError,
    EngineStoppedError,
    LoquetierError,
)
from loquetier.finetuning import FinetuneHandle, JobCallback, JobObserver
from loquetier.generation import Completion, GenerationHandle
from loquetier.info import AdapterInfo as AdapterInfo
from loquetier.info import RuntimeStats as RuntimeStats
from loquetier.info import stats_of
from loquetier.intake import Intake, JobOrder
from loquetier.reporting.reporters import open_reporters
from loquetier.served import ServedAdapters
from loquetier.training.data import encode_examples
from loquetier.training.job import EvalResult


class Runtime:
    """One base, many adapters, one engine thread. Methods may be called from any thread.

    Args:
        base: a preset (``smollm2-135m``), a local Hugging Face directory, a GGUF file, or a hub id.
        adapters: PEFT directories to serve from the start, by name.
        config: what the engine may use; ``EngineConfig()`` suits most machines.

    Raises:
        BaseNotFoundError, UnsupportedModelError, AdapterError, ConfigError: nothing is left running.
    """

    def __init__(
        self,
        base: str,
        *,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        if not isinstance(base, str):
            raise ConfigError(f"base is {type(base).__name__}: must be a preset, a path, or a hub id as a string")
        wanted = given(config, EngineConfig, "config") or EngineConfig()
        # Memory is counted after the weights and their packed copy are there, so dtype and device are resolved first.
        first = resolve(wanted, detect_hardware(wanted.device))
        loaded = load_base(base, dtype=getattr(torch, first.dtype), device=first.device)
        loaded_base = Base(loaded)
        if wanted.serve_only:
            loaded_base.drop_originals()
        self.config = resolve(wanted, detect_hardware(wanted.device))
        self._engine = Engine(loaded_base, self.config)
        self.base_name = loaded.name
        self.tokenizer = loaded.tokenizer
        self._loop = EngineLoop(self._engine)
        self._served = ServedAdapters(self._engine, self._loop)
        self._answers = Answers(self._engine, self._loop)
        self._intake = Intake(self._engine, self._loop)
        self._engine.residency.files.background = self._background = Threads(self._loop.submit)
        try:
            for name, directory in (adapters or {}).items():
                self.load_adapter(name, directory)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the engine: open requests and jobs end with EngineStoppedError. Idempotent.

        Jobs with a checkpoint directory write a last checkpoint first; from there they can be resumed.
        """
        with suppress(EngineStoppedError):  # closed before, or died: then there is nothing good to save
            self._loop.call(self._intake.save_all)
        self._loop.stop()
        self._background.close()
        self._intake.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.max_context

    @property
    def base_fingerprint(self) -> str:
        """Of the base's weights: what adapters and checkpoints are bound to."""
        return self._engine.base.fingerprint

    @property
    def port(self) -> EnginePort:
        """The engine for callers that must not wait for a step, as a server's event loop."""
        return EnginePort(self._engine, self._loop)

    # --- adapters ---

    def load_adapter(self, name: str, directory: str | os.PathLike[str], *, replace: bool = False) -> AdapterInfo:
        """Read a PEFT directory and serve it as `name`. Reading and checking run outside the engine's thread.

        Thousands may be loaded: those that `adapter_memory` has no room for are brought in when they are asked for,
        from this directory, which must hold the same weights then.

        With `replace`, also over an adapter of that name: a new version, while requests under way end on the old one.

        Raises:
            AdapterError: malformed, not honoured, or not for this base. AdapterExistsError, OutOfAdapterMemoryError.
            In every case nothing has changed.
        """
        check_name(name)
        source = path_of(directory).absolute()
        return self.add_adapter(name, self.read_adapter(source), source, replace=replace)

    def read_adapter(self, directory: Path) -> PackedAdapter:
        """Read and check a PEFT directory as `load_adapter` does, without serving it. On the caller's thread."""
        return self._engine.residency.files.packer.read(directory)

    def add_adapter(
        self, name: str, packed: PackedAdapter, source: Path, *, replace: bool = False, number: int | None = None
    ) -> AdapterInfo:
        """Serve what `read_adapter` gave. Raises as `load_adapter`.

        Args:
            source: the directory; its files must stay as they are.
            number: of the version, higher than all before; None = the next one.
        """
        return self._served.add(name, packed, source, replace=replace, number=number)

    def register_adapter(self, name: str, number: int, directory: Path, digest: str) -> None:
        """Have a version of an earlier run answer as ``name@number`` again, and as `name` if it is the newest.

        Only the config and the header are read; the weights come in with the first request, if the files still have
        this digest (as `export_adapter` gave it). Raises as `load_adapter`.
        """
        self._served.register(name, number, directory, digest)

    def number_after(self, name: str, number: int) -> int:
        """Give the next version of `name` a higher number than `number`, and than any before; returns the last one."""
        return self._served.number_after(name, number)

    def on_swapped_in(self, tell: Callable[[float], object]) -> None:
        """Have `tell` called, on the engine's thread, with the seconds that each version took to come into memory."""
        self._served.on_swapped_in(tell)

    def on_forgotten(self, tell: Callable[[Path], object]) -> None:
        """Have `tell` called, on a background thread, with the directory of a version that nothing needs any more."""
        self._served.on_forgotten(tell)

    def unload_adapter(self, name: str) -> int:
        """Stop serving `name` at once; requests under way end on it. Returns the bytes that are or will be freed.

        Raises:
            AdapterNotFoundError: no adapter of this name. AdapterInUseError: a job trains it.
        """
        return self._served.unload(name)

    def adapters(self) -> list[AdapterInfo]:
        """The adapters that answer now."""
        return self._served.infos()

    def pin_adapter(self, name: str, *, wait: bool = True) -> AdapterInfo:
        """Bring the live version of `name` into the arena and keep it there, also the versions that follow it.

        Returns when it is there, or at once without `wait`.

        Raises:
            AdapterNotFoundError, AdapterUnavailableError, OutOfAdapterMemoryError: nothing is pinned.
        """
        return self._served.pin(name, wait=wait)

    def unpin_adapter(self, name: str) -> AdapterInfo:
        """Let `name` leave the arena again when others need it. Raises AdapterNotFoundError."""
        return self._served.unpin(name)

    def adapter(self, name: str) -> AdapterInfo:
        """One adapter that answers now. Raises AdapterNotFoundError."""
        return self._served.info(name)

    def digest(self, model: str) -> str:
        """sha256 of a served version's layout and weights, the same for equal weights in any runtime."""
        return self._served.digest(model)

    def versions(self, name: str) -> list[int]:
        """Numbers of the versions of `name` in memory, the live one included. Raises AdapterNotFoundError."""
        return self._served.versions(name)

    def rollback(self, name: str, number: int) -> AdapterInfo:
        """Make an older version, still in memory (`EngineConfig.keep_versions`), the one that answers as `name`.

        Requests under way end on the version they began with. The version before stays in memory as after a publish; a
        job that is still training `name` will publish over it.

        Raises:
            AdapterNotFoundError: no adapter of this name, or that version is gone; nothing changed.
        """
        return self._served.rollback(name, number)

    def export_adapter(self, model: str, directory: str | os.PathLike[str], *, overwrite: bool = False) -> str:
        """Write a served version as a PEFT directory; returns its digest (sha256).

        Raises:
            AdapterNotFoundError: no such model. ConfigError: it is the base. AdapterError: the directory exists or
                cannot be written. InsufficientStorageError: the disk is full. Nothing is left behind.
        """
        return self._served.export(model, directory, overwrite=overwrite)

    @property
    def template_fingerprint(self) -> str | None:
        """What turns this base's conversations into token ids, as ``sha256:...``; None without a tokenizer."""
        return self._served.template_fingerprint

    # --- answers ---

    def submit(
        self, prompt: Prompt, model: str | None = None, params: SamplingParams | None = None, *, priority: int = 0
    ) -> GenerationHandle:
        """Queue a request and return at once. `model`: an adapter's name, ``name@version``, or None for the base.

        Raises:
            AdapterNotFoundError, ContextLengthError, OutOfKVMemoryError, ConfigError: nothing was queued.
        """
        return self._answers.submit(prompt, model, params, priority)

    def generate(self, prompt: Prompt, model: str | None = None, params: SamplingParams | None = None) -> Completion:
        """Answer one prompt. Call it from many threads, or use `submit`, and the answers share the batch.

        Raises:
            as `submit`, and EngineError if the request fails on the way.
        """
        return self.submit(prompt, model, params).result()

    def stream(
        self, prompt: Prompt, model: str | None = None, params: SamplingParams | None = None
    ) -> Iterator[TokenEvent]:
        """Yield the answer token by token. Leaving the loop early aborts the request."""
        return iter(self.submit(prompt, model, params))

    async def agenerate(
        self, prompt: Prompt, model: str | None = None, params: SamplingParams | None = None
    ) -> Completion:
        """`generate` for asyncio; cancelling the task aborts the request."""
        return await self._answers.generate(prompt, model, params)

    def astream(
        self, prompt: Prompt, model: str | None = None, params: SamplingParams | None = None
    ) -> AsyncIterator[TokenEvent]:
        """`stream` for asyncio."""
        return self._answers.stream(prompt, model, params)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            ConfigError: text without a tokenizer, messages without a chat template, or a wrong type.
        """
        return self._answers.encode(prompt)

    # --- training ---

    def finetune(
        self,
        name: str,
        data: Data,
        *,
        lora: LoraSpec | None = None,
        spec: AdapterSpec | None = None,
        training: TrainingConfig | None = None,
        eval_data: Data | None = None,
        start_from: str | None = None,
        callbacks: Sequence[JobCallback | object] = (),
        output_dir: str | os.PathLike[str] | None = None,
        report_to: Sequence[str | JobObserver] = (),
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 50,
        checkpoints_to_keep: int = 2,
        resume: bool = False,
        hold_checkpoints: bool = False,
        validate_in_background: bool = False,
    ) -> FinetuneHandle:
        """Start training an adapter; its rows join the steps that answer requests. Returns when the data is checked.

        The job runs at once if there is memory for it, else it is queued behind those that came before.

        From its first publish on it answers as `name`. An adapter already served as `name` keeps answering until then.

        Args:
            data, eval_data: records, or the path of a file of them.
            lora: LoRA's settings, or DoRA's with ``use_dora``. None: `LoraSpec()`, or those of `start_from`.
            spec: in place of `lora`, the settings of any method, such as `IA3Spec()`.
            start_from: continue from a served adapter (same spec) instead of fresh weights.
            callbacks: callables that get each `JobEvent`, or objects with methods of transformers' TrainerCallback (see
                `reporting.callbacks`); on a thread of their own, and what they raise cannot fail the job.
            output_dir: a new directory for ``metrics.jsonl`` and ``results.csv``, on disk after every step; with
                `resume` also the one of the same job, whose files go on from the checkpoint's step.
            report_to: "tensorboard", "wandb", "mlflow", "trackio", or a `JobObserver`; they cannot fail the job either.
            checkpoint_dir: this job's own directory of checkpoints, one every `checkpoint_every` optimizer steps, one
                at the job's end and one when the runtime is closed; the newest `checkpoints_to_keep` stay.
            resume: go on, bit for bit, from the newest good checkpoint in `checkpoint_dir` (a fresh job where there is
                none). Settings, data and base must be those it was made with; `start_from` counts only when fresh.
            hold_checkpoints: none is removed before the handle's `let_go` was told of its step: for who copies them.
            validate_in_background: return at once with a job that is `validating_files`: the data is read, encoded and
                checked on a thread, and what is wrong with it, or with checkpoint_dir, fails the job.

        Raises:
            DataError, AdapterError, ConfigError, CheckpointError, InsufficientStorageError: nothing was started.
            OutOfAdapterMemoryError, OutOfTrainMemoryError: it would not fit even if it were alone.
        """
        training = given(training, TrainingConfig, "training") or TrainingConfig()
        if not isinstance(callbacks, Sequence):
            raise ConfigError(f"callbacks is {type(callbacks).__name__}: must be a list of callables")
        if training.eval_every and eval_data is None:
            raise ConfigError(f"eval_every={training.eval_every} needs eval_data")
        training.check_checkpoints(checkpoint_dir)
        spec = given_spec(lora, spec) or (LoraSpec() if start_from is None else self._spec_of(start_from))
        order = JobOrder(
            name=name,
            spec=spec,
            config=training,
            data=data,
            eval_data=eval_data,
            start_from=start_from,
            tokenizer=self.tokenizer,
            max_seq_len=min(training.max_seq_len, self.max_context),
        )
        new = None if validate_in_background else order.load()
        self._engine.jobs.publisher.template_fingerprint = self.template_fingerprint
        reporters = open_reporters(report_to)
        files = None if output_dir is None else path_of(output_dir)
        place = checkpoint_config(checkpoint_dir, checkpoint_every, checkpoints_to_keep, resume, hold_checkpoints)
        handle = FinetuneHandle(self._engine, self._loop, callbacks, reporters, files, name if resume else None)
        self._intake.start(order, new, handle, place)
        return handle

    def _spec_of(self, model: str) -> AdapterSpec:
        return self._loop.call(lambda: self._engine.registry.resolve(model).spec)

    def evaluate(self, model: str | None, data: Data, *, max_seq_len: int = 1024) -> EvalResult:
        """Loss and token accuracy of a served model (None: the base) on labelled data, as EVAL rows of steps."""
        examples = encode_examples(records_of(data), self.tokenizer, min(max_seq_len, self.max_context))
        done: Future[EvalResult | LoquetierError] = Future()
        name = self._answers.model_name(model)
        self._loop.call(lambda: self._engine.jobs.evaluate(name, examples, done.set_result))
        result = done.result()
        if isinstance(result, LoquetierError):
            raise result
        if not math.isfinite(result.loss):
            raise EngineError(f"the loss of {name!r} on this data is {result.loss}: its logits are not finite")
        return result

    # --- books ---

    def stats(self) -> RuntimeStats:
        """A consistent snapshot."""
        return self._loop.call(lambda: stats_of(self._engine))

    def check_integrity(self) -> None:
        """Pages, slots and references add up. Raises IntegrityError."""
        self._loop.call(self._engine.check_integrity)
