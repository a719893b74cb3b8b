"""The same work as people do it today with PEFT: `generate` on a padded batch with `adapter_names`, and a loop.

The loop is the plain one: padded micro-batches, AdamW, one optimizer step each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loquetier.base.loading import LoadedBase
from loquetier.bench.ours import allowed_tokens, tokens_of
from loquetier.bench.traffic import Traffic
from loquetier.bench.workload import Workload
from loquetier.errors import ConfigError
from loquetier.training.data import IGNORE


class PeftPeer:
    """A PEFT model with the adapters loaded, and one more in training. The base is as transformers loads it.

    Raises:
        ConfigError: peft is not installed.
    """

    def __init__(self, loaded: LoadedBase, adapters: Mapping[str, Path], traffic: Traffic, workload: Workload) -> None:
        try:
            from peft import LoraConfig, PeftModel
        except ImportError as error:
            raise ConfigError("the comparison needs peft: install the dev extra, or run with --no-peer") from error
        self._traffic, self._workload = traffic, workload
        self._allowed = allowed_tokens(loaded)
        self._examples = workload.examples(int(loaded.model.config.vocab_size))
        names = list(traffic.uniform_names)
        self.model: Any = PeftModel.from_pretrained(loaded.model, str(adapters[names[0]]), adapter_name=names[0])
        for name in names[1:]:
            self.model.load_adapter(str(adapters[name]), adapter_name=name)
        trained = LoraConfig(r=workload.rank, lora_alpha=2 * workload.rank, target_modules="all-linear")
        self.model.add_adapter("trained", trained)

    def run(self, task: str, draw: int, new_tokens: int | None = None) -> dict[str, Any]:
        """One measurement. `new_tokens`: shorter answers, for a warm-up."""
        if task == "train":
            return self._train()
        assert task in ("decode", "prefill"), task
        return self._serve(task, draw, new_tokens)

    def _serve(self, task: str, draw: int, new_tokens: int | None) -> dict[str, Any]:
        """The requests as one left-padded batch."""
        self.model.eval()
        asks = self._traffic.asks(task, draw, self._allowed, new_tokens)  # type: ignore[arg-type]
        width, new = max(len(a.prompt) for a in asks), asks[0].new_tokens
        ids_BL = torch.tensor([[0] * (width - len(a.prompt)) + list(a.prompt) for a in asks])
        mask_BL = torch.tensor([[0] * (width - len(a.prompt)) + [1] * len(a.prompt) for a in asks])
        started = time.perf_counter()
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                adapter_names=[a.model or "__base__" for a in asks],  # PEFT's word for "none"
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - started
        assert out.shape[1] == width + new, "the peer must generate as many tokens as we do"
        return {"seconds": seconds, "tokens": tokens_of(asks)}

    def _train(self) -> dict[str, Any]:
        """Every example once, in right-padded micro-batches."""
        self.model.set_adapter("trained")
        self.model.train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        started = time.perf_counter()
        for at in range(0, len(self._examples), self._workload.batch_size):
            ids_BL, mask_BL, labels_BL = self._padded(at)
            loss = self.model(input_ids=ids_BL, attention_mask=mask_BL, labels=labels_BL).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": sum(e.num_rows for e in self._examples)}

    def _padded(self, at: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = self._examples[at : at + self._workload.batch_size]
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
