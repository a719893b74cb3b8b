"""From a base's name to a frozen model in memory: preset, local directory, GGUF file or hub id.

Refuses before it reads weights: remote code, pickled weights, and every architecture that `support` cannot vouch for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from loquetier.base.gguf_cache import converted_directory
from loquetier.base.hardware import detect_hardware as detect_hardware
from loquetier.base.presets import PRESETS, locate_preset
from loquetier.base.support import check_config, check_supported
from loquetier.errors import BaseNotFoundError, UnsupportedModelError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedBase:
    """A frozen base, ready for surgery."""

    model: PreTrainedModel
    """In eval mode, no parameter requires a gradient."""
    tokenizer: Any
    """The directory's tokenizer; None when it has none (then only token ids can be served)."""
    name: str
    """What to show: the preset's or hub's name, else the file or directory name."""
    source: Path
    """Directory that the weights were read from."""
    max_context: int
    """Tokens that the model's positions reach."""
    eos_token_ids: frozenset[int]
    """Tokens that end an answer: the generation config's and the tokenizer's."""
    num_parameters: int
    """Tied weights count once."""
    weight_bytes: int


def load_base(
    name: str, *, dtype: torch.dtype, device: str, cache_dir: Path | None = None, allow_network: bool = True
) -> LoadedBase:
    """Load the base called `name` onto `device` as `dtype`.

    `name` is a preset, a local Hugging Face directory, a .gguf file or a hub id "org/name". Only a hub id may use the
    network, unless `allow_network` is False or HF_HUB_OFFLINE is set. `cache_dir` holds converted GGUF files.

    Raises:
        BaseNotFoundError: nothing of that name can be reached.
        UnsupportedModelError: the model cannot be served exactly, by name and reason.
        ConfigError: the cache directory cannot be written.
    """
    with _no_progress_bars():
        display, source = _locate(name, cache_dir, allow_network)
        _refuse_remote_code(display, source)
        config = _read_config(display, source)
        check_config(config)
        _check_skeleton(display, config)
        model = _read_weights(display, source, dtype)
        tokenizer = _read_tokenizer(display, source)
    model.to(device).eval().requires_grad_(False)
    parameters = list(model.parameters())
    return LoadedBase(
        model=model,
        tokenizer=tokenizer,
        name=display,
        source=source,
        max_context=_max_context(display, config),
        eos_token_ids=_eos_token_ids(model, tokenizer),
        num_parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
    )


def load_tokenizer(name: str, *, cache_dir: Path | None = None, allow_network: bool = True) -> Any:
    """The tokenizer of the base called `name`, without its weights in memory; None when it has none.

    Raises:
        BaseNotFoundError, UnsupportedModelError, ConfigError: as `load_base`.
    """
    with _no_progress_bars():
        display, source = _locate(name, cache_dir, allow_network)
        _refuse_remote_code(display, source)
        return _read_tokenizer(display, source)


def _locate(name: str, cache_dir: Path | None, allow_network: bool) -> tuple[str, Path]:
    """Display name and local directory of `name`."""
    if name in PRESETS:
        return name, converted_directory(locate_preset(name), cache_dir)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path.stem, converted_directory(path, cache_dir)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            # transformers would load the adapter's weights into the base without a word.
            raise BaseNotFoundError(f"base {name!r}: the directory holds an adapter; give the base and load it on top")
        if not (path / "config.json").is_file():
            raise BaseNotFoundError(f"base {name!r}: the directory has no config.json")
        return path.resolve().name, path
    if not path.exists() and _HUB_ID.fullmatch(name):
        return name, _hub_directory(name, allow_network)
    raise BaseNotFoundError(
        f"base {name!r} not found; give a preset ({', '.join(sorted(PRESETS))}), a local Hugging Face directory, "
        "a .gguf file, or a hub id like 'org/name'"
    )


def _hub_directory(name: str, allow_network: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(patterns: list[str]) -> Path:
        # Subdirectories hold other formats of the same weights.
        return Path(
            snapshot_download(
                name, allow_patterns=patterns, ignore_patterns=["*/*"], local_files_only=not allow_network
            )
        )

    try:
        # The small files first: a refused model is refused before its weights are fetched.
        small = fetch(["config.json", "tokenizer_config.json"])
        _refuse_remote_code(name, small)
        check_config(_read_config(name, small))
        return fetch(_HUB_FILES)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, BaseNotFoundError):
            raise
        raise BaseNotFoundError(
            f"base {name!r}: not a preset ({', '.join(sorted(PRESETS))}) or local path, and the hub did not give it "
            f"({type(error).__name__}: {_first_line(error)}); check the name, the network and HF_HUB_OFFLINE"
        ) from error


def _refuse_remote_code(name: str, directory: Path) -> None:
    for file in ("config.json", "tokenizer_config.json"):
        path = directory / file
        if path.is_file() and "auto_map" in _read_json(name, path):
            raise UnsupportedModelError(
                f"base {name!r}: {file} asks for code from the model's directory (auto_map), which is never run; if "
                "transformers knows this architecture by itself, remove auto_map from a local copy"
            )


def _read_json(name: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"base {name!r}: {path.name} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"base {name!r}: {path.name} is not a JSON object")
    return value


def _read_config(name: str, directory: Path) -> Any:
    if not (directory / "config.json").is_file():
        raise BaseNotFoundError(f"base {name!r}: there is no config.json")
    try:
        return AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(
            f"base {name!r}: transformers {transformers.__version__} does not accept its config.json ({error})"
        ) from error


def _check_skeleton(name: str, config: Any) -> None:
    """Build the model without memory and gate it, so that a refusal does not wait for gigabytes of weights."""
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise UnsupportedModelError(
            f"base {name!r}: {config.model_type} has no causal language model class in transformers "
            f"({_first_line(error)})"
        ) from error
    check_supported(skeleton)


def _read_weights(name: str, directory: Path, dtype: torch.dtype) -> Any:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported in `info`, and refused below
        )
    except (OSError, SafetensorError) as error:
        raise UnsupportedModelError(
            f"base {name!r}: its weights cannot be read; only safetensors are ({_first_line(error)})"
        ) from error
    # transformers fills missing weights with random numbers and leaves out unknown ones: both change every answer.
    for key, meaning in (("missing_keys", "lacks"), ("mismatched_keys", "has wrong shapes for")):
        if info[key]:
            shown = ", ".join(str(item) for item in sorted(info[key], key=str)[:5])
            raise UnsupportedModelError(f"base {name!r}: its weight file {meaning} {len(info[key])} tensors: {shown}")
    if info["unexpected_keys"]:
        shown = ", ".join(sorted(info["unexpected_keys"])[:5])
        raise UnsupportedModelError(
            f"base {name!r}: {type(model).__name__} does not use {len(info['unexpected_keys'])} tensors of its weight "
            f"file: {shown}"
        )
    return model


def _read_tokenizer(name: str, directory: Path) -> Any:
    if not any((directory / file).is_file() for file in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UnsupportedModelError(f"base {name!r}: its tokenizer cannot be read ({_first_line(error)})") from error


def _max_context(name: str, config: Any) -> int:
    value = getattr(config, "max_position_embeddings", None)
    if not isinstance(value, int) or value < 2:
        raise UnsupportedModelError(f"base {name!r}: config.json gives no usable max_position_embeddings ({value!r})")
    return value


def _eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    settings = [getattr(model.generation_config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    if settings[0] is None:
        settings.append(getattr(model.config, "eos_token_id", None))
    found: set[int] = set()
    for value in settings:
        found.update([value] if isinstance(value, int) else value or ())
    return frozenset(found)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws bars on stderr; whoever calls us says what the user should see."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
