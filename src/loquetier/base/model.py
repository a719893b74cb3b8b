"""The base: a Hugging Face causal LM after surgery, and the two calls the engine makes on it."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable
from functools import cached_property
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from loquetier.adapters.spec import LinearTarget
from loquetier.base.attention import ATTENTION_NAME, STEP_KEYWORD, register
from loquetier.base.context import Binding, StepContext
from loquetier.base.decode_stack import DecodeStack
from loquetier.base.footprint import layer_footprints
from loquetier.base.frozen_head import FrozenHead
from loquetier.base.fuse import fused_stack
from loquetier.base.fuse_train import train_footprints, train_stack
from loquetier.base.fused import FusedStack
from loquetier.base.fused_train import TrainStack
from loquetier.base.gemm import BaseGemm, FrozenLinear, pack_base, pack_for_backward
from loquetier.base.kernel_rows import row_library
from loquetier.base.kv_cache import KVCache
from loquetier.base.linear import VirtualLinear
from loquetier.base.loading import LoadedBase
from loquetier.base.rotary import defer_rotary
from loquetier.base.support import check_supported, decoder_layers, decoder_stack, linear_targets
from loquetier.base.surgery import cut_layers, limit_row_modules, swap_linears
from loquetier.kernels.native_loss import NativeCrossEntropy
from loquetier.kernels.native_stack import NativeStack
from loquetier.kernels.rowops import RowOps
from loquetier.kernels.select import Kernels, process_kernels

log = logging.getLogger("loquetier.base")

T = TypeVar("T")


class Base:
    """One frozen decoder model, shared by every adapter. Used by the engine thread only.

    Args:
        loaded: the model as it was loaded; it is changed in place and belongs to the base from here on.

    Raises:
        UnsupportedModelError: by name and reason, before anything is changed.
    """

    def __init__(self, loaded: LoadedBase) -> None:
        model = loaded.model
        check_supported(model)
        self.loaded = loaded
        self.name = loaded.name
        self.tokenizer = loaded.tokenizer
        self.config: Any = model.config
        self.targets: tuple[LinearTarget, ...] = linear_targets(model)
        self.num_layers = len(decoder_layers(model))
        self.vocab_size = int(self.config.vocab_size)
        self.dtype, self.device = model.dtype, model.device
        self.kv_heads = int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)
        self.head_dim = int(
            getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        )
        window = getattr(self.config, "sliding_window", None)
        self.sliding_window: int | None = None if window is None else int(window)
        """Tokens that a row of some layer attends to; None where every layer attends to all before it."""
        self._binding = Binding()
        register()
        layers = list(decoder_layers(model))
        self._layers = layers
        swap_linears(model, self.targets, self._binding)
        linears = {t.index: model.get_submodule(t.path) for t in self.targets}
        self._weights: dict[int, Any] = {index: linear.weight for index, linear in linears.items()}
        kernels = process_kernels(self.device.type)
        self.gates_in_kernels = limit_row_modules(model, layers, self._binding, row_library(kernels))
        """Whether every gated activation of the model's own code is one kernel."""
        cut_layers(layers, self._binding)
        model.set_attn_implementation(ATTENTION_NAME)
        self.footprints = layer_footprints(layers, self.config, self.head_dim)
        """What each layer keeps per TRAIN row."""
        self.graph_row_bytes = self.dtype.itemsize * sum(layer.kept() for layer in self.footprints)
        """Bytes that a graph tape keeps per TRAIN row, estimated from the layers' shapes."""
        self._stack = decoder_stack(model)
        self._head = _head_only(model, self._stack)
        self._output: FrozenLinear | VirtualLinear | None = None
        """lm_head, where the model's own code does nothing else; None: that code runs."""
        self._is_ready_to_train = False
        self._binding.own_code = True
        self._take_kernels(kernels)
        self._binding.own_code = False
        if self.fused is None and kernels.native("kv_write"):
            defer_rotary(layers, self._binding, self._probe_rows)

    def _take_kernels(self, kernels: Kernels) -> None:
        """Put the kernels where they fit this base and give its own results."""
        self.packed_bytes = pack_base(self._gemms(), kernels)
        """Bytes of the weights' copy in the CPU kernel's layout; 0 where torch's GEMM runs."""
        self._output = self._find_output()
        self.fused: FusedStack | None = None
        self.decode_stack: DecodeStack | None = None
        self.train_stack: TrainStack | None = None
        self.frozen_head: FrozenHead | None = None
        """lm_head and loss without autograd, for rows on which no adapter sits there."""
        self._kernels = kernels
        if kernels.in_triton("row_ops") and kernels.in_triton("decode_attention") and self.dtype != torch.float32:
            from loquetier.kernels.triton_rows import TritonRowOps  # imports triton

            self.fused = fused_stack(self.loaded.model, self._stack, self._layers, TritonRowOps(), self._during)
            return
        library = kernels.native("row_ops")
        if library is None or not self.packed_bytes:  # float32 keeps one path: trained and served rows agree to the bit
            return
        self.fused = fused_stack(self.loaded.model, self._stack, self._layers, RowOps(library), self._during)
        if self.fused is not None:
            self.train_stack = train_stack(self.fused, self._layers, kernels, self._during)
        if self.train_stack is not None:
            self.footprints = train_footprints(self.train_stack, self.footprints)
            self.graph_row_bytes = self.dtype.itemsize * sum(layer.kept() for layer in self.footprints)
        self.frozen_head = self._frozen_head(kernels)
        needed = ("smlm_forward", "decode_attention", "prefill_attention")
        if self.fused and all(kernels.native(kernel) for kernel in needed):
            self.decode_stack = DecodeStack(self.fused, NativeStack(library))

    def _probe_rows(self, step: StepContext) -> None:
        """A forward of the model's own code on some tokens."""
        rows = torch.arange(step.num_rows)
        self.hidden(rows % self.vocab_size, rows, step)

    def _find_output(self) -> FrozenLinear | VirtualLinear | None:
        """The head's linear, if on a probe that is all that the model's own code does.

        Rows of several sizes: a softcap leaves small logits as they are, to the last bit of bfloat16.
        """
        output = next((m for m in self._head.children() if isinstance(m, FrozenLinear | VirtualLinear)), None)
        if output is None:
            return None
        sizes = torch.tensor([[1.0], [30.0], [1000.0]])
        probe_nD = sizes * torch.randn(3, output.weight.shape[1], generator=torch.Generator().manual_seed(0))
        probe_nD, step = probe_nD.to(self.device, self.dtype), StepContext(num_rows=3)
        with torch.no_grad():
            own_nV = self.logits(probe_nD, step)
            plain_nV = self._during(lambda: output(probe_nD), step)
        return output if torch.equal(own_nV, plain_nV) else None

    def _frozen_head(self, kernels: Kernels) -> FrozenHead | None:
        library, output = kernels.native("cross_entropy"), self._output
        if library is None or output is None:
            return None
        return FrozenHead(_gemm_of(output), NativeCrossEntropy(library))

    def prepare_training(self) -> None:
        """Before the first tape of a process that trains: pack the weights for the backward, where that pays."""
        if not self._is_ready_to_train and self.packed_bytes:
            pack_for_backward(self._gemms(), self._kernels)
        self._is_ready_to_train = True

    def _gemms(self) -> list[BaseGemm]:
        """Every GEMM of the decoder layers and the head, each once."""
        modules = [*self._stack.modules(), *self._head.children()]
        groups = {id(m.group): m.group.gemm for m in modules if isinstance(m, VirtualLinear)}
        return [*groups.values(), *(m.gemm for m in modules if isinstance(m, FrozenLinear))]

    def drop_originals(self) -> int:
        """Drop the weights that a packed copy stands for: nothing can be trained from here on. Returns the bytes.

        A weight that is the embedding too stays. Nothing is dropped where nothing is packed.
        """
        _ = self.fingerprint  # made of the first numbers of every weight
        freed = 0
        for linear in self._stack.modules():
            if isinstance(linear, VirtualLinear) and linear.group.gemm.packed is not None:
                freed += linear.group.drop_original()
                linear.weight = nn.Parameter(linear.weight.detach().to("meta"), requires_grad=False)
        if freed:
            self._weights = {index: weight.to("meta") for index, weight in self._weights.items()}
            log.info("original weights dropped, %d MiB: this engine only serves", freed >> 20)
        return freed

    def weight(self, module: int) -> Tensor:
        """The weight ``[out, in]`` of the linear with this index, in the base's dtype. Never to be written."""
        weight_NK: Tensor = self._weights[module]
        return weight_NK

    def new_cache(self, num_pages: int, page_size: int) -> KVCache:
        """An empty KV cache of this base's shape."""
        return KVCache(
            num_layers=self.num_layers,
            num_pages=num_pages,
            page_size=page_size,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Tells bases apart: names, shapes and the first weights (rounded to bfloat16) of every parameter.

        The same checkpoint has the same fingerprint in float32 and in bfloat16.
        """
        digest = hashlib.sha256()
        for name, parameter in self.loaded.model.named_parameters():
            head = parameter.detach().flatten()[:64].to(torch.bfloat16).view(torch.int16).cpu()
            digest.update(f"{name}{tuple(parameter.shape)}{head.tolist()}".encode())
        return digest.hexdigest()

    def page_bytes(self, page_size: int) -> int:
        """Bytes of one KV page over all layers."""
        return KVCache.page_bytes(self.num_layers, page_size, self.kv_heads, self.head_dim, self.dtype)

    def hidden(self, ids_M: Tensor, positions_M: Tensor, step: StepContext) -> Tensor:
        """Final hidden states ``[M, D]`` (after the last norm) of a step's rows.

        With `step.cuts` the graph of the train rows is recorded, cut at each layer's input; without, nothing is.
        """
        fused = self.fused
        if fused is not None and step.cuts is None and step.num_train == 0:
            if self.decode_stack is not None and self.decode_stack.takes(step):
                return self.decode_stack(ids_M, positions_M, step)
            return self._during(lambda: fused(ids_M, positions_M, step), step)
        train = self.train_stack
        if train is not None and step.num_train and step.cuts is not None:
            return self._during(lambda: train(ids_M, positions_M, step), step)
        self._binding.step = step
        try:
            with torch.set_grad_enabled(step.cuts is not None):
                out = self._stack(
                    input_ids=ids_M[None],
                    position_ids=positions_M[None],
                    past_key_values=None,
                    use_cache=False,
                    **{STEP_KEYWORD: step},
                )
        finally:
            self._binding.step = None
        hidden_MD: Tensor = out.last_hidden_state[0]
        return hidden_MD

    def _during(self, call: Callable[[], T], step: StepContext) -> T:
        """``call()`` while `step` is the running step."""
        self._binding.step = step
        try:
            return call()
        finally:
            self._binding.step = None

    def run_layer(
        self, layer: int, hidden_1nD: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], step: StepContext
    ) -> Tensor:
        """One decoder layer alone, with its graph, on the rows that `step` describes -> ``[1, n, D]``.

        `args` and `kwargs` are what the model gives this layer beside the hidden states, cut to these rows.
        """
        if self.train_stack is not None:
            return self.train_stack.run_layer(layer, hidden_1nD, kwargs["position_embeddings"], step)
        self._binding.step = step
        try:
            with torch.enable_grad():
                out = self._layers[layer](hidden_1nD, *args, **kwargs, **{STEP_KEYWORD: step})
        finally:
            self._binding.step = None
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def logits(self, hidden_ND: Tensor, step: StepContext) -> Tensor:
        """Logits ``[N, V]`` of some rows: lm_head and whatever the model does after it (softcap, scaling).

        `step` describes these N rows (segments matter when an adapter sits on lm_head); see `head_step`. Gradients
        flow when `hidden_ND` requires them.
        """
        output = self._output
        if output is not None:  # the code around it is 0.3 ms of Python
            plain_NV: Tensor = self._during(lambda: output(hidden_ND), step)
            return plain_NV
        self._binding.step = step
        try:
            out = self._head(inputs_embeds=hidden_ND[None], use_cache=False)
        finally:
            self._binding.step = None
        # Not [0]: the backward of a view is free, that of a selection makes one more tensor of this size.
        logits_NV: Tensor = out.logits.squeeze(0)
        return logits_NV


def _gemm_of(output: FrozenLinear | VirtualLinear) -> BaseGemm:
    return output.gemm if isinstance(output, FrozenLinear) else output.group.gemm


def _head_only(model: nn.Module, stack: nn.Module) -> nn.Module:
    """A shallow copy of the causal LM whose decoder hands its input through: only the head's own code is left.

    It shares lm_head and every parameter with the model; like the paper's virtual modules it owns nothing but a
    different table of children.
    """
    head = copy.copy(model)
    head._modules = dict(model._modules)
    name = next(n for n, child in model.named_children() if child is stack)
    head._modules[name] = _PassThrough()
    output = model.get_output_embeddings()  # type: ignore[operator]
    for child_name, child in model.named_children():
        if child is output and type(child) is nn.Linear:  # tied to the embeddings: no adapter sits on it
            head._modules[child_name] = FrozenLinear(child)
    return head


class _PassThrough(nn.Module):
    """Stands for the decoder in the head-only copy."""

    def forward(self, *, inputs_embeds: Tensor, **_: Any) -> Any:
        return SimpleNamespace(
            last_hidden_state=inputs_embeds,
            past_key_values=None,
            hidden_states=None,
            attentions=None,
            router_logits=None,
        )
