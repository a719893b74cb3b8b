"""`loquetier serve` as a process: options, refusals, the signal that ends it, and its log."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tests.server.fixtures import BASE, base_dir
from tests.unit.test_cli import exit_code

import loquetier.cli_serve as cli_serve
from loquetier.errors import ConfigError
from loquetier.server.serve import open_socket
from loquetier.server.settings import ServerSettings

__all__ = ["base_dir"]

SRC = Path(__file__).parents[2] / "src"


@contextmanager
def process(*argv: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process, and its URL."""
    env = dict(os.environ, PYTHONPATH=str(SRC))
    code = "from loquetier.cli import main; main()"
    with tempfile.TemporaryDirectory() as data, _process(code, argv, env | {"LOQUETIER_DATA_DIR": data}) as found:
        yield found


@contextmanager
def _process(code: str, argv: tuple[str, ...], env: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-c", code, "serve", *argv, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as child:
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            found = re.search(r"http://\S+(?=/v1)", line)
            assert found is not None, (line, child.stderr.read() if child.stderr and not line else "")
            yield child, found[0]
        finally:
            child.kill()


def ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise AssertionError("not ready after 60 s")


def test_serve_answers_and_sigterm_ends_it_with_0(base_dir: Path) -> None:
    secret = "the prompt is secret"
    with process(str(base_dir), "--dtype", "float32", "--kv-memory", str(8 << 20)) as (child, url):
        ready(url)
        body = {"model": BASE, "prompt": secret, "max_tokens": 2}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=20).status_code == 200
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=60)
        assert child.returncode == 0, err
    lines = [json.loads(line) for line in err.splitlines() if line]
    request = next(line for line in lines if line["event"] == "request" and line["path"] == "/v1/completions")
    assert request["status"] == 200 and request["model"] == BASE and request["request_id"].startswith("req-")
    assert secret not in err


def test_a_log_that_nobody_reads_fails_no_request(base_dir: Path) -> None:
    with process(str(base_dir), "--dtype", "float32", "--kv-memory", str(8 << 20)) as (child, url):
        assert child.stderr is not None
        child.stderr.close()
        ready(url)
        for _ in range(3):
            body = {"model": BASE, "prompt": "x", "max_tokens": 2}
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=20).status_code == 200
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert exit_code("serve", *argv) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err


def test_a_public_address_without_keys_is_refused_before_anything_is_loaded(
    base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--api-keys" in failure(capsys, str(base_dir), "--host", "0.0.0.0")


def test_a_taken_port_is_told_in_one_line(base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        told = failure(capsys, str(base_dir), "--port", str(taken.getsockname()[1]))
        assert "cannot listen" in told
        assert "another --port" in told


def test_answers_do_not_wait_for_delayed_acknowledgements() -> None:
    """asyncio sets TCP_NODELAY on connections of such a socket only; without it each answer took 40 ms more."""
    with open_socket(ServerSettings(port=0)) as opened:
        assert opened.proto == socket.IPPROTO_TCP


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_serve, "PACKAGES", ("json", "no_such_package"))
    with pytest.raises(ConfigError, match=r"no_such_package.*pip install no-such-package"):
        cli_serve.check_packages()


def test_the_package_imports_no_web_package() -> None:
    names = ("fastapi", "starlette", "uvicorn", "msgspec", "structlog", "prometheus_client")
    code = (
        "import sys\n"
        f"for name in {names!r}: sys.modules[name] = None\n"
        "import loquetier, loquetier.runtime, loquetier.cli, loquetier.doctor, loquetier.virtual\n"
    )
    env = dict(os.environ, PYTHONPATH=str(SRC))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=env)
