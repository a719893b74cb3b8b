"""The data of a job: examples and their order. One example is one sequence; nothing is padded.

A record is normalised by `formats`, becomes tokens and labels in `encode`, through the chat template in `chat`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from loquetier.training.chat import render_chat, template_fingerprint
from loquetier.training.encode import encode_example, encode_examples
from loquetier.training.example import IGNORE, Example, check_examples

__all__ = [
    "IGNORE",
    "Example",
    "batches",
    "check_examples",
    "encode_example",
    "encode_examples",
    "epoch_order",
    "render_chat",
    "template_fingerprint",
]


def epoch_order(num_examples: int, *, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """Example numbers of one epoch; a pure function of its arguments, so that a resumed job repeats it."""
    order = list(range(num_examples))
    if shuffle:
        random.Random(f"loquetier-{seed}-{epoch}").shuffle(order)
    return order


def batches(num_examples: int, batch: int, *, seed: int, shuffle: bool, epochs: int | None) -> Iterator[list[int]]:
    """Example numbers of each optimizer step; the last batch of an epoch may be shorter. ``epochs=None``: for ever."""
    epoch = 0
    while epochs is None or epoch < epochs:
        order = epoch_order(num_examples, seed=seed, epoch=epoch, shuffle=shuffle)
        for at in range(0, num_examples, batch):
            yield order[at : at + batch]
        epoch += 1
