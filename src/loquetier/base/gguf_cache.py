"""A GGUF file as a Hugging Face directory: converted once, then memory-mapped from the cache.

Safe against two processes that convert the same file at once, and against a kill in the middle: each writes its own
temporary directory and renames it; the first rename wins. The key is the content's sha256, so a changed file is
never answered with old weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loquetier.cache_dir import default_cache_dir
from loquetier.errors import ConfigError, UnsupportedModelError

FORMAT = 2
"""Raise when what is written into the cache changes."""
COMPLETE = "complete.json"
"""Written last: the sizes of all other files."""


def converted_directory(gguf_file: Path, cache_dir: Path | None = None) -> Path:
    """Directory with config, fp32 safetensors, tokenizer, chat template and generation config of `gguf_file`.

    Takes some 20 s per 100 MB the first time and a hash of the file later. Needs 4 bytes of disk per weight.

    Raises:
        UnsupportedModelError: transformers cannot read this GGUF, or would drop a part of it silently.
        ConfigError: the cache directory cannot be written.
    """
    root = cache_dir if cache_dir is not None else default_cache_dir()
    major = transformers.__version__.split(".")[0]
    with gguf_file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = root / f"{gguf_file.stem}-{digest[:16]}-t{major}-f{FORMAT}"
    if (target / COMPLETE).is_file():
        _refuse_damaged(target)
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=".converting-"))
    except OSError as error:
        raise ConfigError(
            f"cache directory {str(root)!r} cannot be written ({error.strerror}); set LOQUETIER_CACHE to one that can"
        ) from error
    try:
        _convert(gguf_file, temporary)
        sizes = {path.name: path.stat().st_size for path in temporary.iterdir()}
        (temporary / COMPLETE).write_text(json.dumps(sizes), encoding="utf-8")
        _rename_first_wins(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _refuse_damaged(target: Path) -> None:
    """A file that is gone or has another size than when it was written: say which, and what to delete."""
    sizes = json.loads((target / COMPLETE).read_text(encoding="utf-8"))
    for name, size in sizes.items():
        path = target / name
        if not path.is_file() or path.stat().st_size != size:
            raise ConfigError(f"the cached conversion {str(target)!r} is damaged ({name}); delete that directory")


def _rename_first_wins(temporary: Path, target: Path) -> None:
    for path in temporary.iterdir():
        _fsync(path)
    try:
        temporary.rename(target)
    except OSError:
        # A full target means that another process was faster, with the same bytes.
        if not target.is_dir():
            raise
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _convert(gguf_file: Path, out: Path) -> None:
    _refuse_dropped_parts(gguf_file)
    try:
        model, tokenizer, info = _read(gguf_file)
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{gguf_file.name}: transformers {transformers.__version__} cannot read this GGUF file ({error}); "
            "use the model's safetensors directory"
        ) from error
    if info["missing_keys"]:
        raise UnsupportedModelError(f"{gguf_file.name}: no weights for {', '.join(sorted(info['missing_keys'])[:5])}")
    _save(model, tokenizer, out)


def _read(gguf_file: Path) -> tuple[Any, Any, Any]:
    """Model in fp32, tokenizer and transformers' loading report."""
    with tempfile.TemporaryDirectory() as alone:
        # transformers also reads configs, code and adapters that lie beside the file: show it nothing but the file.
        (Path(alone) / gguf_file.name).symlink_to(gguf_file.resolve())
        where = {
            "pretrained_model_name_or_path": alone,
            "gguf_file": gguf_file.name,
            "local_files_only": True,
            "trust_remote_code": False,
        }
        model, info = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
        return model, AutoTokenizer.from_pretrained(**where), info


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    config = model.config
    # save_pretrained refuses a model that still says it is quantized; these weights are plain fp32 by now.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    weights: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        # Tied weights (embedding and lm_head) are one tensor: stored once, tied again on load.
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            weights[name] = tensor.contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def _refuse_dropped_parts(gguf_file: Path) -> None:
    """Refuse what transformers' reader would leave out without a word: scaled RoPE."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(gguf_file))
    except (ValueError, IndexError, OSError) as error:
        raise UnsupportedModelError(f"{gguf_file.name}: not a readable GGUF file ({error})") from error
    scaling = [
        key for key, field in reader.fields.items() if key.endswith(".rope.scaling.type") and field.contents() != "none"
    ]
    factors = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    if scaling or factors:
        raise UnsupportedModelError(
            f"{gguf_file.name}: scaled RoPE ({', '.join(scaling + factors)}) is lost when transformers reads a GGUF "
            "file, and answers would be wrong; use the model's safetensors directory"
        )
