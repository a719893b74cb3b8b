"""Bodies and objects of ``/v1/fine_tuning/jobs``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_STRICT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
_OURS = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""In our own objects an unknown name is a mistake; OpenAI's may grow fields that ask for nothing here."""

Auto = Literal["auto"]
MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]
Names = str | Annotated[list[Annotated[str, Field(min_length=1, max_length=512)]], Field(max_length=512)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class Hyperparameters(BaseModel):
    """OpenAI's three."""

    model_config = _STRICT

    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] | None = None
    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] | None = None
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=5000)] | None = None


class SupervisedMethod(BaseModel):
    """Settings of supervised training."""

    model_config = _STRICT

    hyperparameters: Hyperparameters | None = None


class Method(BaseModel):
    """How to train."""

    model_config = _STRICT

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: SupervisedMethod | None = None


class LoraOptions(BaseModel):
    """`LoraSpec` as JSON."""

    model_config = _OURS

    r: Annotated[int, Field(ge=1, le=65536)] | None = None
    alpha: float | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    target_modules: Names | None = None
    exclude_modules: Names | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    rank_pattern: Annotated[dict[str, int], Field(max_length=512)] | None = None
    alpha_pattern: Annotated[dict[str, float], Field(max_length=512)] | None = None
    layers_to_transform: Annotated[list[int], Field(max_length=1024)] | None = None
    layers_pattern: Annotated[list[str], Field(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """The job's: one seed decides the initial weights, the order of the data and what dropout drops."""


class TrainingOptions(BaseModel):
    """`TrainingConfig` as JSON, and how often to save."""

    model_config = _OURS

    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    lr_scheduler_type: Literal["constant", "linear", "cosine"] | None = None
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    weight_decay: Annotated[float, Field(ge=0, le=1)] | None = None
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] | None = None
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] | None = None
    adam_epsilon: Annotated[float, Field(gt=0, le=1)] | None = None
    loraplus_lr_ratio: float | None = None
    max_grad_norm: Annotated[float, Field(ge=0, le=1e9)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65536)] | None = None
    max_seq_len: Annotated[int, Field(ge=2, lt=2**31)] | None = None
    num_epochs: Annotated[int, Field(ge=1, le=10000)] | None = None
    max_steps: Count | None = None
    shuffle: bool | None = None
    publish: Literal["every_step", "every_n_steps", "checkpoint", "end", "best"] | None = None
    publish_every: Count | None = None
    checkpoint_every: Count | None = None
    eval_every: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    early_stopping_patience: Count | None = None
    early_stopping_threshold: Annotated[float, Field(ge=0, le=1e9)] | None = None


class CreateJob(BaseModel):
    """``POST /v1/fine_tuning/jobs``."""

    model_config = _STRICT

    model: Annotated[str, Field(min_length=1, max_length=512)]
    training_file: Annotated[str, Field(min_length=1, max_length=128)]
    validation_file: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: Metadata | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """Deprecated by OpenAI, and what many clients still send; `method` wins."""
    integrations: Annotated[list[dict[str, Any]], Field(max_length=5)] | None = None
    lora: LoraOptions | None = None
    training: TrainingOptions | None = None


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class JobObject(BaseModel):
    """OpenAI's `FineTuningJob`, and from `live_model` on what it lacks."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    model: str
    fine_tuned_model: str | None
    organization_id: str
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    seed: int
    integrations: list[dict[str, Any]]
    metadata: dict[str, str] | None
    error: JobError | None
    live_model: str | None
    """The name under which the adapter in training answers, from its first publish on."""
    reason: str | None
    """Why it is in its state, where that does not say it."""
    lora: dict[str, Any]
    training: dict[str, Any]


class EventObject(BaseModel):
    """OpenAI's `FineTuningJobEvent`."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class CheckpointObject(BaseModel):
    """OpenAI's `FineTuningJobCheckpoint`."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float]


class JobList(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[JobObject]
    has_more: bool


class EventList(BaseModel):
    """A page of events."""

    object: Literal["list"] = "list"
    data: list[EventObject]
    has_more: bool


class CheckpointList(BaseModel):
    """A page of checkpoints."""

    object: Literal["list"] = "list"
    data: list[CheckpointObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ModelDeleted(BaseModel):
    """What deleting a model answers."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True
