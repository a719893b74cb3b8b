"""One long example's gradients as people compute them today: Hugging Face's model, PEFT's adapter, autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loquetier.base.loading import LoadedBase
from loquetier.errors import ConfigError


class PeftLong:
    """A PEFT model that trains one adapter.

    Args:
        loaded: the base, untouched.
        adapter: the PEFT directory to start from.
        attention: "sdpa" or "eager".
        checkpointing: Hugging Face's gradient checkpointing.
    """

    def __init__(self, loaded: LoadedBase, adapter: Path, attention: str, checkpointing: bool) -> None:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise ConfigError("the comparison needs peft: install the dev extra") from error
        loaded.model.set_attn_implementation(attention)
        self.model: Any = PeftModel.from_pretrained(loaded.model, str(adapter), is_trainable=True)
        self.model.train()
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.enable_input_require_grads()

    def backward(self, tokens: tuple[int, ...]) -> None:
        """Loss on every token but the first, and its backward."""
        ids = torch.tensor([tokens])
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def gradients(self) -> dict[str, Tensor]:
        """By our module paths: ``path.a [R, in]`` and ``path.b [out, R]``."""
        found: dict[str, Tensor] = {}
        for name, module in self.model.named_modules():
            if hasattr(module, "lora_A"):
                path = name.removeprefix("base_model.model.")
                found[f"{path}.a"] = module.lora_A.default.weight.grad
                found[f"{path}.b"] = module.lora_B.default.weight.grad
        return found
