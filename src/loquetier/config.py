"""Settings as frozen keyword-only dataclasses, validated where they are built. Imports nothing of ours but checks.

`resolve` turns what the user wrote (with "auto" in it) and what the machine is into a new config without "auto".
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from loquetier.checks import check, check_bools, integer, is_bool, is_text, number, one_of, or_none, require, several
from loquetier.errors import ConfigError

DType = Literal["auto", "float32", "bfloat16"]
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen. Names and ranges are vLLM's and OpenAI's."""

    max_tokens: int | None = None
    """Most tokens to generate; None = up to the context's end."""
    min_tokens: int = 0
    """No end-of-sequence or stop token before this many generated tokens."""
    temperature: float = 1.0
    """0 = greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 = all."""
    top_p: float = 1.0
    """Keep the smallest set whose probability reaches top_p."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one."""
    repetition_penalty: float = 1.0
    """> 1 makes tokens of prompt and answer less likely (CTRL, arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence from the logit of each token already generated."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; not part of the returned text."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer, besides the model's own end tokens."""
    ignore_eos: bool = False
    """Do not stop at the model's end tokens."""
    n: int = 1
    """Number of independent answers."""
    seed: int | None = None
    """Same seed, same text, whoever shares the batch, given equal logits; choice i uses stream i."""
    logprobs: int | None = None
    """Return the chosen token's logprob and this many most likely alternatives (0..20)."""
    prompt_logprobs: int | None = None
    """The same for every prompt token but the first."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        check(self, "max_tokens", or_none(integer(1)), "must be an integer >= 1, or None for up to the context's end")
        check(self, "min_tokens", integer(0), "must be an integer >= 0")
        if self.max_tokens is not None:
            rule = f"must be <= max_tokens ({self.max_tokens})"
            require(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, rule)
        check(self, "temperature", number(0, 100), "must be in [0, 100]; 0 is greedy")
        check(self, "top_k", integer(-1), "must be an integer >= -1; 0 and -1 keep all")
        check(self, "top_p", number(0, 1, but=0), "must be in (0, 1]")
        check(self, "min_p", number(0, 1), "must be in [0, 1]")
        check(self, "repetition_penalty", number(0, sys.float_info.max, but=0), "must be a finite number > 0")
        for name in ("presence_penalty", "frequency_penalty"):
            check(self, name, number(-2, 2), "must be in [-2, 2]")
        self._check_bias()
        check(self, "stop", several(is_text), "must be a tuple of non-empty strings")
        check(self, "stop_token_ids", several(integer(0)), "must be a tuple of token ids >= 0")
        check_bools(self, "ignore_eos", "skip_special_tokens")
        check(self, "n", integer(1, 128), "must be an integer in [1, 128]")
        check(self, "seed", or_none(integer(-(2**63), 2**63 - 1)), "must be a 64-bit integer or None")
        for name in ("logprobs", "prompt_logprobs"):
            check(self, name, or_none(integer(0, 20)), "must be in [0, 20] or None")

    def _check_bias(self) -> None:
        is_key, is_bias = integer(0), number(-100, 100)
        require(isinstance(self.logit_bias, Mapping), "logit_bias", self.logit_bias, "must map token ids to numbers")
        for token, bias in self.logit_bias.items():
            require(is_key(token), "logit_bias", token, "keys are token ids >= 0")
            require(is_bias(bias), "logit_bias", bias, "values must be in [-100, 100]")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """One job's hyper-parameters. Names and defaults follow transformers' TrainingArguments where they exist there."""

    learning_rate: float = 2e-4
    """Peak learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up; linear and cosine end at 0."""
    warmup_ratio: float = 0.0
    """Part of all steps spent rising linearly from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    loraplus_lr_ratio: float | None = None
    """LoRA+ (arXiv 2402.12354): B learns at this many times the rate of A; None = one rate for both."""
    max_grad_norm: float = 1.0
    """Clip the job's own global gradient norm; 0 = never."""
    batch_size: int = 8
    """Examples per micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    max_seq_len: int = 1024
    """Longer examples are cut at the end."""
    num_epochs: int = 1
    """Passes over the data, unless max_steps ends the job first."""
    max_steps: int | None = None
    """Optimizer steps; None = num_epochs decides. Data is repeated when it runs out before."""
    shuffle: bool = True
    """A fresh seeded permutation for each epoch; False = file order."""
    seed: int = 0
    """Seeds the initial weights, the data order and what dropout drops."""
    publish: Literal["every_step", "every_n_steps", "checkpoint", "end", "best"] = "every_step"
    """When the weights in training become a new served version of the job's name; "checkpoint": those of each
    checkpoint once it is on the disk (needs a checkpoint directory), and of the last step; "best": after every
    evaluation whose loss is lower than all before, so what is served is the best so far (needs evaluation data and
    eval_every)."""
    publish_every: int = 1
    """Steps between two publishes with publish="every_n_steps"."""
    eval_every: int = 0
    """Optimizer steps between evaluations on the evaluation data, if there is any; 0 = one after the last step."""
    early_stopping_patience: int | None = None
    """End the job after this many evaluations in a row without improvement; None = never."""
    early_stopping_threshold: float = 0.0
    """An evaluation is an improvement when its loss is lower than the lowest before by more than this."""

    def __post_init__(self) -> None:
        self._check_optimizer()
        for name in ("batch_size", "gradient_accumulation_steps", "max_seq_len", "num_epochs", "publish_every"):
            check(self, name, integer(1), "must be an integer >= 1")
        check(self, "max_seq_len", integer(2), "must be >= 2: one token predicts the next")
        check(self, "max_steps", or_none(integer(1)), "must be an integer >= 1, or None to let num_epochs decide")
        check(
            self,
            "publish",
            one_of("every_step", "every_n_steps", "checkpoint", "end", "best"),
            "must be every_step, every_n_steps, checkpoint, end or best",
        )
        check(self, "eval_every", integer(0), "must be an integer >= 0")
        require(
            self.publish_every == 1 or self.publish == "every_n_steps",
            "publish_every",
            self.publish_every,
            f"has an effect only with publish='every_n_steps', not {self.publish!r}",
        )
        check_bools(self, "shuffle")
        check(self, "seed", integer(0, 2**63 - 1), "must be an integer in [0, 2**63)")
        self._check_ratio()
        self._check_evaluation()

    def _check_optimizer(self) -> None:
        check(self, "learning_rate", number(0, 1, but=0), "must be in (0, 1]")
        check(self, "lr_scheduler_type", one_of("constant", "linear", "cosine"), "must be constant, linear or cosine")
        for name in ("warmup_ratio", "weight_decay"):
            check(self, name, number(0, 1), "must be in [0, 1]")
        for name in ("adam_beta1", "adam_beta2"):
            check(self, name, number(0, 1, but=1), "must be in [0, 1)")
        check(self, "adam_epsilon", number(0, 1, but=0), "must be in (0, 1]")
        check(self, "max_grad_norm", number(0, 1e9), "must be in [0, 1e9]; 0 = no clipping")

    def check_checkpoints(self, directory: object | None) -> None:
        """Refuse to publish checkpoints of a job that makes none. Raises ConfigError."""
        made = self.publish != "checkpoint" or directory is not None
        require(made, "publish", self.publish, "needs checkpoints; give checkpoint_dir (--checkpoint-dir)")

    def _check_ratio(self) -> None:
        check(
            self,
            "loraplus_lr_ratio",
            or_none(number(0, 1 / self.learning_rate, but=0)),
            f"must be > 0, and times learning_rate={self.learning_rate} at most 1; or None for one rate",
        )

    def _check_evaluation(self) -> None:
        is_patience, rule = or_none(integer(1)), "must be an integer >= 1, or None to train to the end"
        check(self, "early_stopping_patience", is_patience, rule)
        check(self, "early_stopping_threshold", number(0, 1e9), "must be in [0, 1e9]")
        if self.early_stopping_patience is None:
            check(self, "early_stopping_threshold", lambda value: bool(value == 0), "needs early_stopping_patience")
        for name, value in self.evaluation_users:
            require(self.eval_every > 0, name, value, "needs evaluations; set eval_every to a number of steps > 0")

    @property
    def evaluation_users(self) -> tuple[tuple[str, object], ...]:
        """Settings (name, value) that mean nothing without evaluations."""
        found: list[tuple[str, object]] = []
        if self.early_stopping_patience is not None:
            found.append(("early_stopping_patience", self.early_stopping_patience))
        if self.publish == "best":
            found.append(("publish", self.publish))
        return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What the engine may use and how it fills a step."""

    dtype: DType = "auto"
    """Weights and KV cache: bfloat16 where the machine is fast at it, else float32."""
    adapter_dtype: DType = "auto"
    """Adapters' weights as they are computed with, served and trained: "auto" = float32 on a CPU, as PEFT keeps them,
    and `dtype` on a GPU. "bfloat16" (with a bfloat16 base only) halves what a step reads of many adapters; a loaded
    adapter is rounded, and a job trains float32 master weights whose rounded copy runs in its forward and is served."""
    serve_only: bool = False
    """Give up training: the base's original weights are dropped where the CPU kernels have a packed copy of them, which
    halves the weights' memory there. Jobs are refused with ServeOnlyError, and so are adapters other than LoRA, which
    compute with the original weights."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:0", ... or "auto": the first GPU, else the CPU."""
    kv_memory: int | None = None
    """Bytes for the KV cache; None = a quarter of the free memory, at most 4 GiB on a CPU."""
    adapter_memory: int | None = None
    """Bytes for adapter weights of serving and training slots; None = an eighth of the free memory, at most 2 GiB."""
    page_size: int = 16
    """Tokens per KV page."""
    prefix_cache: bool = True
    """Keep the KV pages of prompts and answers while there is room, and begin a request of the same owner, on the same
    adapter version, with those of its first tokens that are there; False = compute every prompt anew."""
    max_rows: int = 2048
    """Most rows of all kinds in one step."""
    max_prefill_rows: int = 512
    """Most PREFILL rows in one step: longer prompts advance by chunks."""
    max_train_rows: int = 1024
    """Most TRAIN rows in one step; an example longer than that runs alone, on the replay tape in windows of so many."""
    max_sequences: int = 256
    """Most sequences with KV pages at once."""
    backward_units_while_serving: int = 4
    """Layers of backward per step while requests are running; with no traffic the whole backward runs in one step."""
    step_time_budget: float | None = None
    """Seconds a step may take while requests are running (from --slo-tpot); None = the fixed limits."""
    tape: Literal["auto", "graph", "replay"] = "auto"
    """What a training forward keeps: "graph" = every layer's graph (fastest), "replay" = layer inputs, K and V only
    (bounded memory, shorter units, a second forward), "auto" = graph while it fits `train_memory`, beside the jobs'
    state, and `step_time_budget`."""
    train_memory: int | None = None
    """Bytes of all memory of training outside `adapter_memory`: the state of the jobs that run or are paused
    (gradients, moments, float32 weights, encoded data, copies for checkpoints) and the open tape. Jobs that do not fit
    beside those that run wait in the queue. None = a quarter of the free memory."""
    train_window: int = 512
    """Most rows of one backward unit of the replay tape."""
    max_context: int | None = None
    """Cap on the model's own context length."""
    async_scheduling: bool | None = None
    """Plan and build a step while the device computes the one before. None = on a GPU, not on a CPU, where it only
    delays tokens by a step. Requests with a grammar get a row every other step then: their next token can be chosen
    only when the host knows the last one."""
    cuda_graphs: bool | None = None
    """Capture steps of decode rows once per size and replay them. None = on a GPU."""
    keep_versions: int = 0
    """Versions of each adapter before the live one that stay in memory, to roll back to or to be asked for as
    ``name@number``. They are given up, oldest first, when adapter_memory is needed for something else."""
    adapter_patience: float = 0.5
    """Seconds that a request waits for its adapter while others keep all of adapter_memory busy; then some of them get
    no new requests until it has had its turn."""
    host_adapter_memory: int | None = None
    """Bytes of host memory for adapters that are not in adapter_memory, ready to be copied in; the others are read from
    their files. None = as much as adapter_memory on a GPU, nothing on a CPU, where raising adapter_memory does more."""
    adapter_spill: str | None = None
    """Directory in which versions that training published are saved when adapter_memory is needed for others; None =
    they stay in adapter_memory as long as they answer."""

    def __post_init__(self) -> None:
        is_dtype = one_of("auto", "float32", "bfloat16")
        for name in ("dtype", "adapter_dtype"):
            check(self, name, is_dtype, "must be auto, float32 or bfloat16")
        check_bools(self, "serve_only")
        check(self, "device", _is_device, "must be auto, cpu, cuda or cuda:N")
        check(self, "tape", one_of("auto", "graph", "replay"), "must be auto, graph or replay")
        check_bools(self, "prefix_cache")
        for name in ("page_size", "max_rows", "max_prefill_rows", "max_train_rows", "max_sequences", "train_window"):
            check(self, name, integer(1), "must be an integer >= 1")
        rule = "must be an integer >= 1, or training would never move under traffic"
        check(self, "backward_units_while_serving", integer(1), rule)
        check(self, "keep_versions", integer(0), "must be an integer >= 0")
        for name in ("async_scheduling", "cuda_graphs"):
            check(self, name, or_none(is_bool), "must be True, False, or None: on a GPU")
        self._check_memory()
        rule = "must be a number of seconds in (0, 1e6], or None for the fixed limits"
        check(self, "step_time_budget", or_none(number(0, 1e6, but=0)), rule)
        check(self, "max_context", or_none(integer(2)), "must be an integer >= 2, or None")

    def _check_memory(self) -> None:
        for name in ("kv_memory", "adapter_memory", "train_memory"):
            check(self, name, or_none(integer(MIB)), f"must be at least {MIB} bytes, or None")
        check(self, "adapter_patience", number(0, 3600), "must be in [0, 3600]")
        check(self, "host_adapter_memory", or_none(integer(0)), "must be an integer >= 0, or None")
        check(self, "adapter_spill", or_none(is_text), "must be a directory's path, or None")


def _is_device(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """What `resolve` needs to know of the machine. `base.loading.detect_hardware` fills it."""

    has_cuda: bool
    cpu_bf16_fast: bool
    """AVX512_BF16 or AMX on x86."""
    free_memory: int
    """Bytes free on the device the engine will use."""


def resolve(config: EngineConfig, hardware: Hardware) -> EngineConfig:
    """Return `config` with every "auto" and None budget replaced. Pure.

    Raises:
        ConfigError: a CUDA device is asked for and there is none; bfloat16 adapters on a float32 base.
    """
    device = config.device if config.device != "auto" else ("cuda" if hardware.has_cuda else "cpu")
    if device.startswith("cuda") and not hardware.has_cuda:
        raise ConfigError(f"device={config.device!r}: no CUDA device is visible; use device='cpu' or 'auto'")
    on_gpu = device.startswith("cuda")
    if config.cuda_graphs and not on_gpu:
        raise ConfigError(f"cuda_graphs=True on device={device!r}: graphs need a CUDA device; leave it None or False")
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu or hardware.cpu_bf16_fast else "float32"
    adapter_dtype = config.adapter_dtype
    if adapter_dtype == "auto":
        adapter_dtype = dtype if on_gpu else "float32"
    if adapter_dtype == "bfloat16" and dtype == "float32":
        raise ConfigError(
            "adapter_dtype='bfloat16': the base is float32, and its rows would be rounded to the adapters' type; "
            "use dtype='bfloat16' or adapter_dtype='float32'"
        )
    cap = hardware.free_memory if on_gpu else 4096 * MIB
    kv_memory = config.kv_memory or max(MIB, min(cap, hardware.free_memory // 4))
    adapter_memory = config.adapter_memory or max(MIB, min(cap // 2, hardware.free_memory // 8))
    train_memory = config.train_memory or max(MIB, hardware.free_memory // 4)
    host_memory = config.host_adapter_memory
    if host_memory is None:
        host_memory = adapter_memory if on_gpu else 0
    return replace(
        config,
        device=device,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        kv_memory=kv_memory,
        adapter_memory=adapter_memory,
        train_memory=train_memory,
        host_adapter_memory=host_memory,
        cuda_graphs=on_gpu if config.cuda_graphs is None else config.cuda_graphs,
        async_scheduling=on_gpu if config.async_scheduling is None else config.async_scheduling,
    )
