"""A running server as the command line sees it: HTTP calls, errors in one line, tables without escape codes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from loquetier.cli_options import DEFAULT_URL
from loquetier.errors import ConfigError, LoquetierError

_TIMEOUT = httpx.Timeout(60.0, connect=10.0)
_UPLOAD_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
_STREAM_TIMEOUT = httpx.Timeout(300.0, connect=10.0)
"""Between two events or signs of life; then it is asked anew."""


class ServerUnreachableError(LoquetierError, ConnectionError):
    """No server answers there, or it stopped answering."""

    code = "server_unreachable"
    status = 503


class ServerRefusedError(LoquetierError, RuntimeError):
    """The server answered with an error; `code` and `status` are its own."""

    def __init__(self, message: str, code: str = "server_error", status: int = 500) -> None:
        super().__init__(message)
        self.code, self.status = code, status


@dataclass(frozen=True, slots=True)
class Api:
    """Calls of one server. Every call raises ServerUnreachableError or ServerRefusedError."""

    http: httpx.Client
    url: str

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        """JSON of a GET; query values that are None are left out."""
        return self._json(self._send("GET", path, params={k: v for k, v in query.items() if v is not None}))

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """JSON of a POST; an answer in plain text as ``{"message": ...}``."""
        return self._json(self._send("POST", path, **({} if body is None else {"json": body})))

    def upload(self, path: Path) -> dict[str, Any]:
        """Send a training file; returns the server's file object. Raises OSError as well."""
        with path.open("rb") as file:
            return self._json(
                self._send(
                    "POST",
                    "/v1/files",
                    data={"purpose": "fine-tune"},
                    files={"file": (path.name, file)},
                    timeout=_UPLOAD_TIMEOUT,
                )
            )

    @contextmanager
    def events(self, path: str) -> Iterator[Iterator[dict[str, Any]] | None]:
        """The live events of a server-sent stream; None where the server has none for this path."""
        with self._reached(), self.http.stream("GET", path, timeout=_STREAM_TIMEOUT) as answer:
            if answer.is_error:
                answer.read()
                raise refusal(answer)
            if answer.headers.get("content-type", "").partition(";")[0] != "text/event-stream":
                yield None
            else:
                yield _server_sent(answer.iter_lines())

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        with self._reached():
            answer = self.http.request(method, path, **options)
        if answer.is_error:
            raise refusal(answer)
        return answer

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException as error:
            raise ServerUnreachableError(f"the server at {self.url} did not answer in time") from error
        except httpx.TransportError as error:
            raise ServerUnreachableError(
                f"no server answers at {self.url} ({error}); start one with `loquetier serve`, or give --url"
            ) from error

    @staticmethod
    def _json(answer: httpx.Response) -> dict[str, Any]:
        if answer.headers.get("content-type", "").startswith("text/plain"):
            return {"message": answer.text}
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ServerRefusedError(f"{answer.url} answered with something that is not a JSON object: not our server?")
        return found


@contextmanager
def connected(url: str, api_key: str | None) -> Iterator[Api]:
    """Calls of the server at `url`, which may end in /v1.

    Raises:
        ConfigError: `url` or the key cannot be used as such.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"--url {url!r}: must be like {DEFAULT_URL}")
    root = url.rstrip("/").removesuffix("/v1")
    headers = {"Accept": "application/json"}
    if api_key:
        if not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("--api-key has characters that no key has")
        headers["Authorization"] = f"Bearer {api_key}"
    with httpx.Client(base_url=root, headers=headers, timeout=_TIMEOUT, follow_redirects=False) as http:
        yield Api(http, root)


def refusal(answer: httpx.Response) -> ServerRefusedError:
    """The error of an answer that is not a success, with the server's own words where it has some."""
    try:
        told = answer.json()["error"]
        message, code = str(told["message"]), told.get("code")
    except (ValueError, KeyError, TypeError):
        message, code = f"{answer.url} answered {answer.status_code}", None
    if answer.status_code == 401:
        message += " (give a key with LOQUETIER_API_KEY or --api-key)"
    wait = answer.headers.get("retry-after")
    if wait is not None:
        message += f" (try again in {wait} s)"
    return ServerRefusedError(printable(message), printable(str(code or "server_error")), answer.status_code)


def _server_sent(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """JSON objects of a server-sent stream, until ``[DONE]`` or its end."""
    for line in lines:
        if not line.startswith("data:"):
            continue  # a comment that keeps the connection open, or another field
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        found = json.loads(data)
        if isinstance(found, dict) and "error" in found and "object" not in found:
            raise ServerRefusedError(printable(str(found["error"].get("message", found["error"]))))
        yield found


def printable(text: str) -> str:
    """`text` without control characters: what a server tells must not steer the terminal."""
    return "".join(c if c.isprintable() or c == " " else f"\\x{ord(c):02x}" for c in text)


def print_json(found: Any) -> None:
    """For programs."""
    print(json.dumps(found, indent=2, ensure_ascii=False))
