"""The same work as people do it today with PEFT: `generate` on a padded batch with `adapter_names`, and a loop.

Needs the `dev` extra (peft). The loop is the plain one: padded micro-batches, AdamW, one optimizer step each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loquetier.base.loading import LoadedBase
from loquetier.bench.workload import Workload
from loquetier.errors import ConfigError
from loquetier.training.data import IGNORE


class PeftPeer:
    """A PEFT model with every adapter loaded, and one more in training."""

    def __init__(self, loaded: LoadedBase, adapters: Mapping[str, Path], workload: Workload) -> None:
        try:
            from peft import LoraConfig, PeftModel
        except ImportError as error:
            raise ConfigError("the comparison needs peft: install the dev extra, or run with --no-peer") from error
        vocab_size = int(loaded.model.config.vocab_size)
        self.workload = workload
        self._prompts = workload.prompts(vocab_size)
        self._examples = workload.examples(vocab_size)
        names = list(adapters)
        self.model: Any = PeftModel.from_pretrained(loaded.model, str(adapters[names[0]]), adapter_name=names[0])
        for name in names[1:]:
            self.model.load_adapter(str(adapters[name]), adapter_name=name)
        trained = LoraConfig(r=workload.rank, lora_alpha=2 * workload.rank, target_modules="all-linear")
        self.model.add_adapter("trained", trained)

    def serve(self) -> float:
        """Seconds to answer every request, as one left-padded batch."""
        self.model.eval()
        width = max(len(p) for p in self._prompts)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in self._prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in self._prompts])
        names = [f"a{i % self.workload.num_adapters}" for i in range(len(self._prompts))]
        n = self.workload.new_tokens
        started = time.perf_counter()
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                adapter_names=names,
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - started
        assert out.shape[1] == width + n, "the peer must generate as many tokens as we do"
        return seconds

    def train(self) -> float:
        """Seconds to train on every example once, in right-padded micro-batches."""
        self.model.set_adapter("trained")
        self.model.train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        started = time.perf_counter()
        for at in range(0, len(self._examples), self.workload.batch_size):
            ids, mask, labels = self._padded(at)
            loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - started

    def _padded(self, at: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = self._examples[at : at + self.workload.batch_size]
        width = max(len(e.tokens) for e in batch)
        ids = torch.tensor([[*e.tokens, *[0] * (width - len(e.tokens))] for e in batch])
        mask = torch.tensor([[1] * len(e.tokens) + [0] * (width - len(e.tokens)) for e in batch])
        labels = torch.tensor(
            [
                [t if learn else IGNORE for t, learn in zip(e.tokens, e.learn, strict=True)]
                + [IGNORE] * (width - len(e.tokens))
                for e in batch
            ]
        )
        return ids, mask, labels
