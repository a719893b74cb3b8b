"""Can the replay tape run this base? Asked once, when the engine is made, by running it on a few rows."""

from __future__ import annotations

import torch

from loquetier.base.context import StepContext
from loquetier.base.model import Base
from loquetier.engine.rows import BASE_SLOT, TrainItem
from loquetier.errors import UnsupportedModelError
from loquetier.training.replay import ReplayTape

_WINDOWS = (3, 2)


def replay_refusal(base: Base) -> UnsupportedModelError | None:
    """Why the replay tape cannot run `base`, or None: five tokens go through it, in two windows and back.

    A refusal is for a model that changes the hidden states between its layers, or gives a layer something that has no
    rows or that changes from window to window.
    """
    total = sum(_WINDOWS)
    tape = ReplayTape((TrainItem(0, 0, total, BASE_SLOT),), base.run_layer, base.num_layers, window=4)
    ids_M = torch.arange(total, device=base.device) % base.vocab_size
    positions_M = torch.arange(total, device=base.device)
    start = 0
    try:
        for count in _WINDOWS:
            rows = slice(start, start + count)
            step = StepContext(num_rows=count, num_train=count, spans=((0, count),), cuts=tape)
            hidden_nD = tape.close(base.hidden(ids_M[rows], positions_M[rows], step))
            tape.start(torch.zeros_like(hidden_nD))
            start += count
        while tape.units_left:
            tape.run_unit()
    except UnsupportedModelError as error:
        return error
    return None
