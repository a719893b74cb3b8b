"""The shapes that OpenAI publishes for the objects we answer with, restated as JSON schemas: the second oracle.

The SDK parses leniently: a missing or a wrong field raises only where the SDK looks at it. Here every answer that a
test gets is held against the published description (facts of openai/openai-openapi at f85dbe2, MIT): required keys,
types and enumerations. `python -m tests.server.published openapi.yaml` compares this file with a copy of it.

Where OpenAI's own servers differ from their description, or the description cannot express an answer, we follow the
servers; each such place has a comment that begins with "Differs".
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}


def a(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object; keys of neither group are extensions, which the description allows."""
    return {"type": "object", "properties": required | (optional or {}), "required": sorted(required)}


def some(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def a_list(item: Schema, **more: Schema) -> Schema:
    return a({"object": one_of("list"), "data": some(item), **more})


AUTO_OR_COUNT = {"anyOf": [one_of("auto"), {"type": "integer", "minimum": 1}]}
HYPERPARAMETERS = a(
    {},
    {
        "batch_size": or_null(AUTO_OR_COUNT),
        "n_epochs": AUTO_OR_COUNT,
        "learning_rate_multiplier": {"anyOf": [one_of("auto"), {"type": "number", "exclusiveMinimum": 0}]},
    },
)
METADATA = or_null({"type": "object", "additionalProperties": STRING})

JOB = a(
    {
        "id": STRING,
        "object": one_of("fine_tuning.job"),
        "created_at": INTEGER,
        "finished_at": or_null(INTEGER),
        "error": or_null(a({"code": STRING, "message": STRING, "param": or_null(STRING)})),
        "fine_tuned_model": or_null(STRING),
        "hyperparameters": HYPERPARAMETERS,
        "model": STRING,
        "organization_id": STRING,
        "result_files": some(STRING),
        # Differs: "paused" and "pausing" are answered by OpenAI's own pause, and are not in the enumeration.
        "status": one_of(
            "validating_files", "queued", "running", "succeeded", "failed", "cancelled", "paused", "pausing"
        ),
        "trained_tokens": or_null(INTEGER),
        "training_file": STRING,
        "validation_file": or_null(STRING),
        "seed": INTEGER,
    },
    {
        "estimated_finish": or_null(INTEGER),
        "integrations": or_null({"type": "array", "maxItems": 5}),
        "metadata": METADATA,
        "method": a(
            {"type": one_of("supervised", "dpo", "reinforcement")},
            {"supervised": a({}, {"hyperparameters": HYPERPARAMETERS})},
        ),
    },
)
EVENT = a(
    {
        "id": STRING,
        "object": one_of("fine_tuning.job.event"),
        "created_at": INTEGER,
        "level": one_of("info", "warn", "error"),
        "message": STRING,
    },
    {"type": one_of("message", "metrics"), "data": {"type": "object"}},
)
CHECKPOINT = a(
    {
        "id": STRING,
        "object": one_of("fine_tuning.job.checkpoint"),
        "created_at": INTEGER,
        "fine_tuning_job_id": STRING,
        "fine_tuned_model_checkpoint": STRING,
        "step_number": INTEGER,
        "metrics": a(
            {},
            dict.fromkeys(
                (
                    "step",
                    "train_loss",
                    "train_mean_token_accuracy",
                    "valid_loss",
                    "valid_mean_token_accuracy",
                    "full_valid_loss",
                    "full_valid_mean_token_accuracy",
                ),
                NUMBER,
            ),
        ),
    }
)
FILE = a(
    {
        "id": STRING,
        "object": one_of("file"),
        "bytes": INTEGER,
        "created_at": INTEGER,
        "filename": STRING,
        # Differs: an upload may say "evals", which the enumeration of answers leaves out.
        "purpose": one_of(
            "assistants",
            "assistants_output",
            "batch",
            "batch_output",
            "fine-tune",
            "fine-tune-results",
            "vision",
            "user_data",
            "evals",
        ),
        "status": one_of("uploaded", "processed", "error"),
    },
    {"expires_at": INTEGER, "status_details": STRING},
)
# Differs: an empty page has no first id; the description has no word for it, and checkpoints answer null there.
PAGE_ENDS = {"first_id": or_null(STRING), "last_id": or_null(STRING)}
DELETED = {"id": STRING, "deleted": BOOLEAN}
MODEL = a({"id": STRING, "object": one_of("model"), "created": INTEGER, "owned_by": STRING})

USAGE = a(
    dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), INTEGER),
    {
        "prompt_tokens_details": a({}, dict.fromkeys(("cached_tokens", "audio_tokens"), INTEGER)),
        "completion_tokens_details": a({}, dict.fromkeys(("reasoning_tokens", "audio_tokens"), INTEGER)),
    },
)
BYTES = or_null(some(INTEGER))
TOP_LOGPROB = a({"token": STRING, "logprob": NUMBER, "bytes": BYTES})
TOKEN_LOGPROB = a({"token": STRING, "logprob": NUMBER, "bytes": BYTES, "top_logprobs": some(TOP_LOGPROB)})
CHAT_LOGPROBS = or_null(
    a({"content": or_null(some(TOKEN_LOGPROB)), "refusal": or_null(some(TOKEN_LOGPROB))}),
)
CHAT_ENDS = ("stop", "length", "tool_calls", "content_filter", "function_call")
TOOL_CALL = a({"id": STRING, "type": one_of("function"), "function": a({"name": STRING, "arguments": STRING})})

CHAT = a(
    {
        "id": STRING,
        "object": one_of("chat.completion"),
        "created": INTEGER,
        "model": STRING,
        "choices": some(
            a(
                {
                    "index": INTEGER,
                    "finish_reason": one_of(*CHAT_ENDS),
                    "logprobs": CHAT_LOGPROBS,
                    "message": a(
                        {"role": one_of("assistant"), "content": or_null(STRING), "refusal": or_null(STRING)},
                        {"tool_calls": some(TOOL_CALL)},
                    ),
                }
            )
        ),
    },
    {"usage": USAGE, "system_fingerprint": STRING},
)
CHAT_CHUNK = a(
    {
        "id": STRING,
        "object": one_of("chat.completion.chunk"),
        "created": INTEGER,
        "model": STRING,
        "choices": some(
            a(
                {
                    "index": INTEGER,
                    "finish_reason": or_null(one_of(*CHAT_ENDS)),
                    "delta": a(
                        {},
                        {
                            "role": one_of("developer", "system", "user", "assistant", "tool"),
                            "content": or_null(STRING),
                            "refusal": or_null(STRING),
                        },
                    ),
                },
                {"logprobs": CHAT_LOGPROBS},
            )
        ),
    },
    {"usage": or_null(USAGE), "system_fingerprint": STRING},
)
COMPLETION_LOGPROBS = or_null(
    a(
        {},
        {
            "tokens": some(STRING),
            # Differs: the first token of an echoed prompt has no logprob; OpenAI's servers and vLLM answer null there.
            "token_logprobs": some(or_null(NUMBER)),
            "top_logprobs": or_null(some(or_null({"type": "object", "additionalProperties": NUMBER}))),
            "text_offset": some(INTEGER),
        },
    )
)


def completion(finish: Schema) -> Schema:
    choice = a({"index": INTEGER, "text": STRING, "logprobs": COMPLETION_LOGPROBS, "finish_reason": finish})
    return a(
        {
            "id": STRING,
            "object": one_of("text_completion"),
            "created": INTEGER,
            "model": STRING,
            "choices": some(choice),
        },
        {"usage": or_null(USAGE), "system_fingerprint": STRING},
    )


COMPLETION_ENDS = one_of("stop", "length", "content_filter")
COMPLETION = completion(COMPLETION_ENDS)
# Differs: the description has one schema for both; a chunk in mid-stream has no reason yet, and answers null.
COMPLETION_CHUNK = completion(or_null(COMPLETION_ENDS))
ERROR = a({"error": a({"message": STRING, "type": STRING, "param": or_null(STRING), "code": or_null(STRING)})})

PUBLISHED: dict[str, Schema] = {
    "FineTuningJob": JOB,
    "ListPaginatedFineTuningJobsResponse": a_list(JOB, has_more=BOOLEAN),
    "FineTuningJobEvent": EVENT,
    "ListFineTuningJobEventsResponse": a_list(EVENT, has_more=BOOLEAN),
    "FineTuningJobCheckpoint": CHECKPOINT,
    "ListFineTuningJobCheckpointsResponse": a_list(CHECKPOINT, has_more=BOOLEAN, **PAGE_ENDS),
    "OpenAIFile": FILE,
    "ListFilesResponse": a_list(FILE, has_more=BOOLEAN, **PAGE_ENDS),
    "DeleteFileResponse": a({"object": one_of("file"), **DELETED}),
    "Model": MODEL,
    "ListModelsResponse": a_list(MODEL),
    "DeleteModelResponse": a({"object": STRING, **DELETED}),
    "CreateChatCompletionResponse": CHAT,
    "CreateChatCompletionStreamResponse": CHAT_CHUNK,
    "CreateCompletionResponse": COMPLETION,
    "CompletionChunk": COMPLETION_CHUNK,
    "ErrorResponse": ERROR,
}
VALIDATORS = {name: jsonschema_rs.validator_for(schema) for name, schema in PUBLISHED.items()}

_JOBS = r"/v1/fine_tuning/jobs"
ROUTES: tuple[tuple[str, str, str], ...] = (
    ("POST", r"/v1/completions", "CreateCompletionResponse"),
    ("POST", r"/v1/chat/completions", "CreateChatCompletionResponse"),
    ("GET", r"/v1/models", "ListModelsResponse"),
    ("GET", r"/v1/models/.+", "Model"),
    ("DELETE", r"/v1/models/.+", "DeleteModelResponse"),
    ("POST", r"/v1/files", "OpenAIFile"),
    ("GET", r"/v1/files", "ListFilesResponse"),
    ("GET", r"/v1/files/[^/]+", "OpenAIFile"),
    ("DELETE", r"/v1/files/[^/]+", "DeleteFileResponse"),
    ("POST", _JOBS, "FineTuningJob"),
    ("GET", _JOBS, "ListPaginatedFineTuningJobsResponse"),
    ("GET", rf"{_JOBS}/[^/]+", "FineTuningJob"),
    ("POST", rf"{_JOBS}/[^/]+/(cancel|pause|resume)", "FineTuningJob"),
    ("GET", rf"{_JOBS}/[^/]+/events", "ListFineTuningJobEventsResponse"),
    ("GET", rf"{_JOBS}/[^/]+/checkpoints", "ListFineTuningJobCheckpointsResponse"),
)
CHUNKS = {
    "CreateCompletionResponse": "CompletionChunk",
    "CreateChatCompletionResponse": "CreateChatCompletionStreamResponse",
    "ListFineTuningJobEventsResponse": "FineTuningJobEvent",
}
"""What one `data:` of a stream is, by what the same route answers without one."""


def check(method: str, path: str, status: int, content_type: str, body: bytes) -> None:
    """Hold one answer against the description; what is not OpenAI's (`/health`, `/metrics`, /v1/adapters) passes.

    Raises: AssertionError: with the path into the answer and what is wrong there.
    """
    name = next((n for m, pattern, n in ROUTES if m == method and re.fullmatch(pattern, path)), None)
    if status >= 400:
        if path.startswith("/v1/"):
            conforms("ErrorResponse", json.loads(body))
    elif name is None:
        return
    elif content_type.startswith("text/event-stream"):
        for line in body.decode().split("\n"):
            if line.startswith("data: ") and line != "data: [DONE]":
                chunk = json.loads(line.removeprefix("data: "))
                conforms("ErrorResponse" if "error" in chunk and "id" not in chunk else CHUNKS[name], chunk)
    else:
        conforms(name, json.loads(body))


def conforms(name: str, answer: Any) -> None:
    wrong = [f"{'/'.join(map(str, e.instance_path))}: {e.message}" for e in VALIDATORS[name].iter_errors(answer)]
    assert not wrong, f"not a published {name}: {wrong[:3]}\n{json.dumps(answer)[:1000]}"


def differences(document: dict[str, Any]) -> Iterator[str]:
    """Required keys and enumerations in which `PUBLISHED` and a copy of the description differ."""
    schemas = document["components"]["schemas"]

    def resolved(node: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in node:
            node = schemas[node["$ref"].rsplit("/", 1)[1]]
        for key in ("anyOf", "oneOf"):  # "or null" is the only choice that matters here
            real = [n for n in node.get(key, ()) if n != {"type": "null"}]
            if len(real) == 1:
                return resolved(real[0])
        return node

    def walk(where: str, ours: Schema, theirs: dict[str, Any]) -> Iterator[str]:
        ours, theirs = resolved(ours), resolved(theirs)
        if sorted(ours.get("required", ())) != sorted(theirs.get("required", ())):
            yield f"{where}: required {ours.get('required', [])}, published {sorted(theirs.get('required', []))}"
        if sorted(ours.get("enum", ())) != sorted(theirs.get("enum", ())):
            yield f"{where}: enumeration {ours.get('enum')}, published {theirs.get('enum')}"
        for key, value in ours.get("properties", {}).items():
            if key not in theirs.get("properties", {}):
                yield f"{where}.{key}: not published"
            else:
                yield from walk(f"{where}.{key}", value, theirs["properties"][key])
        if "items" in ours and "items" in theirs:
            yield from walk(f"{where}[]", ours["items"], theirs["items"])

    for name, ours in PUBLISHED.items():
        if name in schemas:
            yield from walk(name, ours, schemas[name])


if __name__ == "__main__":
    import yaml

    print("\n".join(differences(yaml.safe_load(Path(sys.argv[1]).read_text()))))
