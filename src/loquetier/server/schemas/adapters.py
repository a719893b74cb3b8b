"""Bodies of the adapter endpoints, vLLM's and ours."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class LoadRequest(BaseModel):
    """``POST /v1/load_lora_adapter``."""

    model_config = ConfigDict(strict=True, extra="allow")

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class UnloadRequest(BaseModel):
    """``POST /v1/unload_lora_adapter``."""

    model_config = ConfigDict(strict=True, extra="allow")

    lora_name: str = ""
    lora_int_id: int | None = None
    """vLLM's internal number; names are enough here."""


class RollbackRequest(BaseModel):
    """``POST /v1/rollback_lora_adapter``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    lora_name: str
    version: Annotated[int, Field(ge=1, lt=2**63)]


class PinRequest(BaseModel):
    """``POST /v1/adapters/pin`` and ``/v1/adapters/unpin``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    lora_name: str
