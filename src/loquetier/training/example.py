"""What a training job runs on: tokens, and which of them are labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from loquetier.errors import DataError

IGNORE = -100
"""Label of a token that is not predicted, as everywhere in this field."""


@dataclass(frozen=True)
class Example:
    """Tokens, and for each of them whether the model shall learn to produce it."""

    tokens: tuple[int, ...]
    learn: tuple[bool, ...]
    """``learn[i]``: token i is a label. ``learn[0]`` has no effect: nothing predicts the first token."""
    num_cut: int = field(default=0, compare=False)
    """Tokens of the record behind the last of these, cut off by ``max_seq_len``."""

    @property
    def num_rows(self) -> int:
        """Rows it takes in a step: the last token is predicted but predicts nothing."""
        return len(self.tokens) - 1

    @property
    def num_labels(self) -> int:
        """Rows with a loss."""
        return len(self.label_rows)

    @cached_property
    def label_rows(self) -> npt.NDArray[np.int64]:
        """Rows with a loss, counted inside the example: row i predicts token i + 1."""
        return np.flatnonzero(np.asarray(self.learn[1:], dtype=bool))

    @cached_property
    def label_targets(self) -> npt.NDArray[np.int64]:
        """The token that each of `label_rows` shall predict."""
        return np.asarray(self.tokens, dtype=np.int64)[self.label_rows + 1]


def check_examples(examples: Sequence[Example], vocab_size: int) -> None:
    """Refuse what a step could not run.

    Raises:
        DataError: no example, an example without a label, or a token id that the base does not have.
    """
    if not examples:
        raise DataError("the data has 0 examples; at least 1 is needed")
    for number, example in enumerate(examples, 1):
        if example.num_labels == 0:
            raise DataError(f"Example {number} has no token to learn")
        if min(example.tokens) < 0 or max(example.tokens) >= vocab_size:
            bad = next(t for t in example.tokens if not 0 <= t < vocab_size)
            raise DataError(f"Example {number} has token id {bad}; ids must be in [0, {vocab_size})")
