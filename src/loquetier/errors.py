"""One error tree. Every error has a machine `code` and an HTTP `status`, and is also a stdlib error.

To add one: subclass `LoquetierError` and the stdlib error a Python user would catch, set `code` and
`status`, and let the message name the value, the limit and the way out. Messages are for people; programs
switch on the class or on `code`, never on the text. Errors pickle (message only), so they cross processes.
"""

from __future__ import annotations


class LoquetierError(Exception):
    """Base of every error this package raises on purpose."""

    code: str = "internal_error"
    status: int = 500


class ConfigError(LoquetierError, ValueError):
    """A setting or argument is outside its documented range, or two of them contradict each other."""

    code = "invalid_value"
    status = 400


class UnsupportedModelError(LoquetierError, ValueError):
    """The base model cannot be served exactly; refused at load by name and reason."""

    code = "unsupported_model"
    status = 400


class BaseNotFoundError(LoquetierError, FileNotFoundError):
    """The base is neither a preset, a local directory, a GGUF file nor a reachable hub id."""

    code = "base_not_found"
    status = 404


class AdapterError(LoquetierError, ValueError):
    """An adapter directory, tensor or option is malformed or not honoured; nothing was changed."""

    code = "invalid_adapter"
    status = 400


class UnsupportedAdapterError(AdapterError):
    """A PEFT feature we do not honour (bias, modules_to_save, ...), named by its key."""

    code = "unsupported_adapter"


class AdapterMismatchError(AdapterError):
    """The adapter does not fit this base: nothing (or not everything) matches, or shapes differ."""

    code = "adapter_mismatch"


class AdapterNotFoundError(LoquetierError, LookupError):
    """No adapter, version or base is served under this name."""

    code = "model_not_found"
    status = 404


class AdapterExistsError(LoquetierError, ValueError):
    """An adapter of this name is already loaded."""

    code = "adapter_exists"
    status = 400


class AdapterInUseError(LoquetierError, RuntimeError):
    """The operation needs the adapter idle, and requests or a job still use it."""

    code = "adapter_in_use"
    status = 400


class AdapterUnavailableError(LoquetierError, RuntimeError):
    """A registered version is not in memory, and its files cannot be read any more."""

    code = "adapter_unavailable"
    status = 503


class AdapterChangedError(AdapterUnavailableError):
    """The files of a version hold other weights than when it was loaded; they are not served under its number."""

    code = "adapter_changed"


class OutOfAdapterMemoryError(LoquetierError, MemoryError):
    """The adapter arena has no room; the message gives needed, free and total bytes."""

    code = "insufficient_adapter_memory"
    status = 503


class OutOfTrainMemoryError(LoquetierError, MemoryError):
    """The job can never fit `train_memory`, however long it waits."""

    code = "insufficient_training_memory"
    status = 400


class InsufficientStorageError(LoquetierError, OSError):
    """The disk has no room for what must be written; the message gives path, needed and free bytes."""

    code = "insufficient_storage"
    status = 507


class OutOfKVMemoryError(LoquetierError, MemoryError):
    """The request can never fit the KV cache, however long it waits."""

    code = "insufficient_kv_memory"
    status = 400


class ContextLengthError(LoquetierError, ValueError):
    """Prompt, or prompt plus max_tokens, is longer than the model's context."""

    code = "context_length_exceeded"
    status = 400


class DataError(LoquetierError, ValueError):
    """A training example is malformed; the message names it by its 1-based number."""

    code = "invalid_training_file"
    status = 400


class CheckpointError(LoquetierError, ValueError):
    """A checkpoint is torn, corrupted or of an unknown format; it was not used, and nothing was changed."""

    code = "invalid_checkpoint"
    status = 500


class ServeOnlyError(LoquetierError, RuntimeError):
    """The engine was told to serve only (`EngineConfig.serve_only`): what is asked for needs the original weights."""

    code = "serve_only"
    status = 400


class JobStateError(LoquetierError, RuntimeError):
    """A job cannot make this transition from the state it is in."""

    code = "invalid_job_state"
    status = 400


class TrainingDivergedError(LoquetierError, ArithmeticError):
    """Loss or gradient was not finite; the job stopped before the bad update was applied."""

    code = "training_diverged"
    status = 500


class EngineError(LoquetierError, RuntimeError):
    """The engine failed while running this request; other requests are not affected."""

    code = "engine_error"
    status = 500


class EngineStoppedError(EngineError):
    """The runtime is closed (or its loop died); nothing more will be answered."""

    code = "engine_stopped"
    status = 503


class IntegrityError(LoquetierError, RuntimeError):
    """A resource owner's books do not add up. Always our bug, never the user's."""

    code = "integrity_error"
    status = 500


def typed(error: Exception) -> LoquetierError:
    """The error itself if it is one of ours, else an EngineError that names it: what a caller is told of a bug."""
    return error if isinstance(error, LoquetierError) else EngineError(f"{type(error).__name__}: {error}")
