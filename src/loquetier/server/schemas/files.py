"""Objects of ``/v1/files``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

PURPOSES = ("fine-tune", "assistants", "batch", "vision", "user_data", "evals")
"""What a client may say; only "fine-tune" is used by this server, the others are kept."""


class FileObject(BaseModel):
    """OpenAI's `OpenAIFile`."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None = None
    expires_at: int | None = None


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str
    last_id: str
    has_more: bool


class FileDeleted(BaseModel):
    """What a delete answers."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


UPLOAD_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                }
            }
        },
    }
}
"""The body of ``POST /v1/files``, which is read by `upload`."""
