"""What a model gives its decoder layers beside the hidden states, kept so that a layer can run again on some rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loquetier.base.context import LayerCall, StepContext
from loquetier.errors import UnsupportedModelError


def own(x: Tensor) -> Tensor:
    """`x`, detached; copied if its storage holds more than itself, which a kept view would keep alive."""
    x = x.detach()
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x


@dataclass(frozen=True, slots=True)
class _Rows:
    """A tensor ``[n, T, ...]`` of the train rows."""

    tensor: Tensor


@dataclass(frozen=True, slots=True)
class KeptCall:
    """Arguments of a layer; what has rows is kept for the train rows only."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def rows(self, start: int, stop: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for train rows ``[start, stop)``."""

        def cut(value: Any) -> Any:
            return value.tensor[:, start:stop] if isinstance(value, _Rows) else value

        args: tuple[Any, ...] = _map(self.args, cut)
        kwargs: dict[str, Any] = _map(self.kwargs, cut)
        return args, kwargs


class RowTensors:
    """Keeps layers' arguments. What several layers share (rotary cos and sin) is kept once."""

    def __init__(self, num_train: int) -> None:
        self._num_train = num_train
        self._kept: dict[int, tuple[Tensor, _Rows]] = {}
        """By address of the tensor object, which is held here so that no address is used twice."""

    def keep(self, call: LayerCall) -> KeptCall:
        """The call without its step.

        Raises:
            UnsupportedModelError: an argument that cannot be cut to rows.
        """
        kwargs = {name: value for name, value in call.kwargs.items() if not isinstance(value, StepContext)}
        num_rows = call.step.num_rows

        def keep(value: Any) -> Any:
            return self._keep(value, num_rows)

        return KeptCall(_map(call.args, keep), _map(kwargs, keep))

    def end_forward(self) -> None:
        """Let go of the tensors of the whole step."""
        self._kept.clear()

    def _keep(self, value: Any, num_rows: int) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != num_rows:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UnsupportedModelError(
                f"a decoder layer is given {shape} in a step of {num_rows} rows: the replay tape cannot cut that to "
                "rows; train this base with tape='graph'"
            )
        if id(value) not in self._kept:
            self._kept[id(value)] = (value, _Rows(own(value[:, : self._num_train])))
        return self._kept[id(value)][1]


def _map(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Apply `leaf` inside tuples, lists and dictionaries."""
    if isinstance(value, tuple | list):
        return type(value)(_map(v, leaf) for v in value)
    if isinstance(value, dict):
        return {name: _map(v, leaf) for name, v in value.items()}
    return leaf(value)
