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


def put_rows(kept: Tensor | None, rows: Tensor, start: int, total: int) -> Tensor:
    """`rows` as rows ``[start, start + n)`` (axis 1) of what is kept of `total`; made when `kept` is None.

    All rows at once are taken as they are, see `own`; no memory is set aside for others then.
    """
    if rows.shape[1] == total:
        return own(rows)
    if kept is None:
        kept = rows.new_empty((rows.shape[0], total, *rows.shape[2:]))
    kept[:, start : start + rows.shape[1]] = rows.detach()
    return kept


@dataclass(slots=True)
class _Rows:
    """A tensor ``[n, T, ...]`` of the train rows, filled window by window."""

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
    """Keeps layers' arguments, window by window. What several layers share (rotary cos and sin) is kept once."""

    def __init__(self, num_train: int) -> None:
        self._num_train = num_train
        self._start = 0
        self._kept: dict[int, tuple[Tensor, _Rows]] = {}
        """By address of the tensor object, which is held here so that no address is used twice."""

    def keep(self, call: LayerCall) -> KeptCall:
        """The call of the first window, without its step.

        Raises:
            UnsupportedModelError: an argument that cannot be cut to rows.
        """
        args, kwargs = _without_step(call)

        def keep(value: Any) -> Any:
            return self._keep(value, call.step)

        return KeptCall(_map(args, keep), _map(kwargs, keep))

    def add(self, kept: KeptCall, call: LayerCall) -> None:
        """Put the rows of the same layer's call in a later window to those of the first.

        Raises:
            UnsupportedModelError: the call differs in more than its rows.
        """
        before, now = _leaves((kept.args, kept.kwargs)), _leaves(_without_step(call))
        if len(before) != len(now):
            raise _changed(f"{len(before)} arguments", f"{len(now)}")
        for earlier, value in zip(before, now, strict=True):
            self._add(earlier, value, call.step)

    def end_window(self, num_rows: int) -> None:
        """The window had so many rows; let go of the tensors of its step."""
        self._start += num_rows
        self._kept.clear()

    def _add(self, earlier: Any, value: Any, step: StepContext) -> None:
        if not isinstance(earlier, _Rows):
            if isinstance(value, Tensor) or value != earlier:
                raise _changed(str(earlier), str(value) if not isinstance(value, Tensor) else "a tensor")
            return
        if id(value) in self._kept:
            if self._kept[id(value)][1] is not earlier:
                raise _changed("two tensors", "one")
            return
        if any(rows is earlier for _, rows in self._kept.values()):
            raise _changed("one tensor for several layers", "two")
        self._check_rows(value, step.num_rows)
        earlier.tensor = put_rows(earlier.tensor, value[:, : step.num_train], self._start, self._num_train)
        self._kept[id(value)] = (value, earlier)

    def _keep(self, value: Any, step: StepContext) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        self._check_rows(value, step.num_rows)
        if id(value) not in self._kept:
            rows = put_rows(None, value[:, : step.num_train], 0, self._num_train)
            self._kept[id(value)] = (value, _Rows(rows))
        return self._kept[id(value)][1]

    def _check_rows(self, value: Any, num_rows: int) -> None:
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != num_rows:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UnsupportedModelError(
                f"a decoder layer is given {shape} in a step of {num_rows} rows: the replay tape cannot cut that to "
                "rows; train this base with tape='graph'"
            )


def _changed(before: str, now: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"a decoder layer is given {before} in one window of rows and {now} in another: the replay tape cannot put "
        "them together; train this base with tape='graph'"
    )


def _without_step(call: LayerCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return call.args, {name: value for name, value in call.kwargs.items() if not isinstance(value, StepContext)}


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    _map(value, found.append)
    return found


def _map(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Apply `leaf` inside tuples, lists and dictionaries."""
    if isinstance(value, tuple | list):
        return type(value)(_map(v, leaf) for v in value)
    if isinstance(value, dict):
        return {name: _map(v, leaf) for name, v in value.items()}
    return leaf(value)
