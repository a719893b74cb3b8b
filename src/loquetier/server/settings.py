"""Limits of the server, in one frozen place. Memory and speed of the engine are `EngineConfig`'s."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loquetier.config import MIB
from loquetier.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """What one request, and all of them together, may take."""

    host: str = "127.0.0.1"
    port: int = 8000
    insecure: bool = False
    """Listen on a public address although there are no keys."""
    public_metrics: bool = False
    """Answer ``/metrics`` without a key."""
    adapter_root: Path | None = None
    """Directory below which `load_lora_adapter` may read; None = it loads nothing."""
    max_body_bytes: int = 8 * MIB
    """Of a JSON body; more is 413."""
    max_json_depth: int = 64
    max_file_bytes: int = 512 * MIB
    """Of one uploaded file; more is 413."""
    max_storage_bytes: int = 64 * 1024 * MIB
    """Of all files of an owner whose key says nothing else; more is 403."""
    max_jobs: int = 64
    """Fine-tuning jobs that have not ended; more is 429."""
    max_jobs_per_owner: int = 16
    """The same, of an owner whose key says nothing else."""
    body_timeout: float = 30.0
    """Seconds that a client may take to send its body; more is 408."""
    header_timeout: float = 10.0
    """Seconds from the first byte (or the connection) to the end of the headers; then the connection is closed."""
    stall_timeout: float = 30.0
    """Seconds that a client may leave its full socket unread before its request is aborted."""
    stream_interval: float | None = None
    """Seconds between two pieces of a streamed answer, each with all tokens that came meanwhile; the first and the last
    are never held back. 0: each token at once. None: each at once while up to 4 requests run, else 5 ms for each
    request that runs, 0.1 s at most."""
    max_connections: int = 4096
    max_prompts: int = 64
    """Prompts of one completion request."""
    max_choices: int = 256
    """Answers of one request: n times prompts."""
    max_messages: int = 4096
    max_queued: int = 512
    """Answers that may wait for KV memory or their first token; more is 503."""
    max_queue_seconds: float = 60.0
    """While an answer has waited this long for its first token, new requests are refused with 503."""
    slo_ttft: float | None = None
    """Goal in seconds for the first token: counted in the metrics, and `max_queue_seconds` where that is longer."""
    slo_tpot: float | None = None
    """Goal in seconds per further token: counted in the metrics (the engine's step budget keeps it)."""
    bad_keys_per_minute: int = 20
    """Per address; then 429."""
    grace_seconds: float = 30.0
    """After SIGTERM, open answers may go on for this long."""
    hang_seconds: float = 30.0
    """A step longer than this means that the engine hangs: /health says 503 and the process ends."""
    metric_models: int = 64
    """Models with metrics of their own; the others share "other"."""
    vllm_metrics: bool = True
    """Also emit vLLM's names."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port}: must be in [0, 65535]; 0 takes a free one")
        if self.stream_interval is not None and not 0 <= self.stream_interval <= 1:
            raise ConfigError(f"stream_interval={self.stream_interval}: must be seconds in [0, 1]")
        for name in ("slo_ttft", "slo_tpot"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 3600:
                raise ConfigError(f"{name}={value}: must be seconds in (0, 3600]")

    @property
    def queue_age_limit(self) -> float:
        """Seconds that the oldest waiting answer may have waited when a new request comes."""
        return min(self.max_queue_seconds, self.slo_ttft or self.max_queue_seconds)
