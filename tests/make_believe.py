"""A make-believe accelerator: tensors that say they lie on a device `fakegpu` and are computed by the CPU.

What would be wrong on a GPU is wrong here: an operation on tensors of two devices, and everything that makes the host
wait for the device (reading a value, a size that depends on values, a copy that is not queued). Both are noted, with
where they happened; `waits` may be looked at after a step.

It changes the process for good (torch has one private device), so it is imported in a process of its own:
``python -m tests.engine.on_make_believe``.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fakegpu"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)

WAITING = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::is_nonzero",
    "aten::equal",
    "aten::repeat_interleave.Tensor",
    "aten::_unique2",
}
"""Operations for which torch asks a GPU for a value or a size."""


class OnDevice(Tensor):
    """A tensor of the make-believe device; `raw` holds its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.raw = raw
        return made  # type: ignore[no-any-return]

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"OnDevice({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Accelerator.running().call(func, args, kwargs or {})


class Accelerator(TorchDispatchMode):
    """While it is entered, the device can be used; `waits` and `mixed` say where it was used badly."""

    _current: ClassVar[list[Accelerator]] = []

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.mixed: list[str] = []
        self.copies_to_device = 0
        self._allowed = 0

    @classmethod
    def running(cls) -> Accelerator:
        return cls._current[-1]

    def __enter__(self) -> Accelerator:
        self._current.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._current.pop()

    @contextmanager
    def may_wait(self) -> Iterator[None]:
        """Waiting is what the code inside is for."""
        self._allowed += 1
        try:
            yield
        finally:
            self._allowed -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        flat, _ = pytree.tree_flatten((args, kwargs))
        tensors = [t for t in flat if isinstance(t, Tensor)]
        on_device = [t for t in tensors if isinstance(t, OnDevice)]
        name, target = func.name(), kwargs.get("device")
        wants_device = target is not None and torch.device(target).type == NAME
        if on_device and name in WAITING:
            self._note(self.waits, name)
        to_other = name in ("aten::_to_copy", "aten::copy_", "aten::to.device")
        if on_device and not to_other and any(t.dim() and not isinstance(t, OnDevice) for t in tensors):
            self._note(self.mixed, name)
        if to_other:
            self._check_copy(name, args, kwargs)
        if target is not None:
            kwargs = {**kwargs, "device": "cpu" if wants_device else target}
        # There is no page-locked memory without a real device; ordinary memory holds the same.
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        raw_args, raw_kwargs = pytree.tree_map_only(OnDevice, lambda t: t.raw, (args, kwargs))
        out = func(*raw_args, **raw_kwargs)
        if name in ("aten::_to_copy",) and out is raw_args[0]:
            out = out.clone()
        if not (wants_device or (on_device and target is None)):
            return out
        known = {id(t.raw): t for t in on_device}
        return pytree.tree_map_only(Tensor, lambda t: known[id(t)] if id(t) in known else OnDevice(t), out)

    def _check_copy(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if name == "aten::copy_":
            to, source, queued = args[0], args[1], bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            to_device, from_device = isinstance(to, OnDevice), isinstance(source, OnDevice)
        else:
            from_device, target = isinstance(args[0], OnDevice), kwargs.get("device")
            to_device = from_device if target is None else torch.device(target).type == NAME
            queued = bool(kwargs.get("non_blocking"))
        if to_device != from_device:
            self.copies_to_device += to_device
            if not queued:
                self._note(self.waits, f"{name} {'to' if to_device else 'from'} the device")

    def _note(self, notes: list[str], name: str) -> None:
        if self._allowed and notes is self.waits:
            return
        ours = [f for f in traceback.extract_stack() if "/loquetier/" in f.filename]
        where = f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}" if ours else "elsewhere"
        notes.append(f"{name} at {where}")
