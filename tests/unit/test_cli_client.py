"""`loquetier jobs` and `adapters` against a scripted server on a real socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loquetier.cli import main
from loquetier.cli_client import ServerRefusedError, ServerUnreachableError, connected
from loquetier.cli_watch import PATIENCE_SECONDS, follow

JOB = "ftjob-1"
PATH = f"/v1/fine_tuning/jobs/{JOB}"


@dataclass
class Script:
    """What the server answers, and what it was asked."""

    answers: dict[str, Any] = field(default_factory=dict)
    """By "METHOD path" without query: an object, (status, object), a stream's text, a list of such by turn, or a
    function of the query."""
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""

    def answer(self, method: str, path: str) -> tuple[int, str, bytes]:
        bare, _, query = path.partition("?")
        found = self.answers.get(f"{method} {path}", self.answers.get(f"{method} {bare}"))
        if isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        if callable(found):
            found = found(query)
        if found is None:
            found = (404, {"error": {"message": f"no {bare}", "type": "x", "param": None, "code": "not_found"}})
        if isinstance(found, str):
            return 200, "text/event-stream" if found.startswith(("data:", ":")) else "text/plain", found.encode()
        status, body = found if isinstance(found, tuple) else (200, found)
        return status, "application/json", body.encode() if isinstance(body, str) else json.dumps(body).encode()


@pytest.fixture
def server() -> Iterator[Script]:
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do("GET")

        def do_POST(self) -> None:
            self.do("POST")

        def do(self, method: str) -> None:
            sent = self.rfile.read(int(self.headers.get("content-length", 0)))
            is_json = self.headers.get("content-type") == "application/json"
            script.asked.append((method, self.path, json.loads(sent) if is_json else sent))
            script.keys.append(self.headers.get("authorization"))
            status, kind, body = script.answer(method, self.path)
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            if status == 429:
                self.send_header("retry-after", "7")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield script
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def run(server: Script, *argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main([*argv, "--url", server.url])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def job(status: str = "running", **fields: Any) -> dict[str, Any]:
    return {"object": "fine_tuning.job", "id": JOB, "status": status, "model": "base", "created_at": 0} | fields


def event(number: int, message: str, **fields: Any) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job.event", "id": f"ftevent-{number}", "created_at": number, "level": "info",
        "message": message, "type": "message",
    } | fields  # fmt: skip


def page(*data: dict[str, Any], has_more: bool = False) -> dict[str, Any]:
    return {"object": "list", "data": list(data), "has_more": has_more}


# --- jobs ---


def test_list_asks_for_pages_until_it_has_enough(server: Script, capsys: pytest.CaptureFixture[str]) -> None:
    def pages(query: str) -> dict[str, Any]:
        if "after=ftjob-8" in query:
            return page(job("failed", id="ftjob-7"), job("succeeded", id="ftjob-6", fine_tuned_model="ft:x"))
        return page(job(id="ftjob-9"), job("failed", id="ftjob-8"), has_more=True)

    server.answers["GET /v1/fine_tuning/jobs"] = pages
    assert run(server, "jobs", "list", "--limit", "3") == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["ftjob-9", "ftjob-8", "ftjob-7"]
    assert run(server, "jobs", "list", "--status", "succeeded", "--json") == 0
    assert [j["id"] for j in json.loads(capsys.readouterr().out)] == ["ftjob-6"]


def test_no_id_is_cut_off_in_a_narrow_terminal(
    server: Script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    long, model = "ftjob-" + "a" * 24, "ft:smollm2-135m:local:" + "b" * 40 + ":cccccccc"
    server.answers["GET /v1/fine_tuning/jobs"] = page(job(id=long, fine_tuned_model=model))
    server.answers[f"GET {PATH}"] = job(id=long, fine_tuned_model=model)
    server.answers["GET /v1/lora_adapters"] = {"data": [{"id": f"{model}@1", "lora_name": model, "version": 1}]}
    for command in (("jobs", "list"), ("jobs", "show", JOB), ("adapters", "list")):
        assert run(server, *command) == 0
        out = capsys.readouterr().out
        assert model in out and (command[0] == "adapters" or long in out), out
        assert all(line == line.rstrip() for line in out.splitlines())


def test_show_tells_what_there_is_and_no_escape_codes(server: Script, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers[f"GET {PATH}"] = job("failed", error={"code": "c", "message": "\x1b[31mred"}, metadata={})
    assert run(server, "jobs", "show", JOB) == 0
    out = capsys.readouterr().out
    assert "failed" in out and "\x1b" not in out and "[31mred" in out and "metadata" not in out


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume"])
def test_orders(verb: str, server: Script, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers[f"POST {PATH}/{verb}"] = job("paused")
    assert run(server, "jobs", verb, JOB) == 0
    assert capsys.readouterr().out == f"{JOB}: paused\n"
    assert server.asked == [("POST", f"{PATH}/{verb}", b"")]


def test_create_uploads_files_and_sends_only_what_was_given(
    server: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    server.answers["POST /v1/files"] = {"id": "file-1", "status": "processed"}
    server.answers["POST /v1/fine_tuning/jobs"] = job("validating_files")
    argv = ["jobs", "create", "--training-file", str(data), "--validation-file", "file-2", "--model", "base"]
    options = ["--suffix", "s", "--metadata", "k=v=w", "--epochs", "2", "--learning-rate", "0.01", "--seed", "3"]
    assert run(server, *argv, *options, "--checkpoint-every", "5", "--r", "4") == 0
    assert capsys.readouterr().out == f"{JOB}\n"
    upload, created = server.asked
    assert upload[1] == "/v1/files" and data.read_bytes() in upload[2] and b"fine-tune" in upload[2]
    assert created[2] == {
        "model": "base",
        "training_file": "file-1",
        "validation_file": "file-2",
        "suffix": "s",
        "seed": 3,
        "metadata": {"k": "v=w"},
        "training": {"learning_rate": 0.01, "num_epochs": 2, "checkpoint_every": 5},
        "lora": {"r": 4},
    }
    server.asked.clear()
    assert run(server, "jobs", "create", "--training-file", "file-1", "--model", "base") == 0
    assert server.asked[0][2] == {"model": "base", "training_file": "file-1"}


def test_the_help_of_create_shows_the_servers_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["jobs", "create", "--help"])
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    # What `loquetier finetune` does without --num-epochs (one pass) is not what a server does.
    assert "[default: (by the data: 3," in out and "[default: (1)]" in out.split("--gradient")[1]
    assert "[default: (1)]" not in out.split("--num-epochs")[1].split("--max-steps")[0]


def test_create_refuses_what_is_no_file_before_asking(server: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "jobs", "create", "--training-file", "nowhere.jsonl", "--model", "base") == 2
    assert "nowhere.jsonl" in capsys.readouterr().err and not server.asked


def test_a_file_that_the_server_cannot_use(server: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("?")
    server.answers["POST /v1/files"] = {"id": "file-1", "status": "error", "status_details": "Example 1: no JSON"}
    assert run(server, "jobs", "create", "--training-file", str(data), "--model", "base") == 1
    err = capsys.readouterr().err
    assert err.startswith("error [invalid_training_file]") and "Example 1: no JSON" in err


def test_events_are_told_oldest_first(server: Script, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers[f"GET {PATH}/events"] = page(event(2, "two", level="warn"), event(1, "one"), event(0, "zero"))
    assert run(server, "jobs", "events", JOB, "--limit", "2") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("one") and second.endswith("warn: two")


# --- watch ---


def sse(*events: dict[str, Any], end: str = "data: [DONE]\n\n") -> str:
    return ": ping\n\n" + "".join(f"event: e\ndata: {json.dumps(e)}\n\n" for e in events) + end


def watched(server: Script, sleeps: list[float]) -> list[str]:
    with connected(server.url, None) as api:
        return [seen.get("message") or seen["status"] for seen in follow(api, JOB, sleeps.append)]


def test_watch_follows_the_stream_and_misses_nothing(server: Script) -> None:
    """Events before the stream, in it, twice in both, and between its end and the job's."""
    events = [event(i, f"m{i}") for i in range(5)]
    server.answers[f"GET {PATH}"] = [job("queued"), job("running"), job("succeeded")]
    server.answers[f"GET {PATH}/events"] = [page(events[1], events[0]), page(*reversed(events))]
    server.answers[f"GET {PATH}/events?stream=true"] = sse(*events[:4])
    sleeps: list[float] = []
    assert watched(server, sleeps) == ["queued", "m0", "m1", "m2", "m3", "m4", "succeeded"]
    assert len(sleeps) == 1


def test_watch_polls_a_server_without_a_stream(server: Script) -> None:
    events = [event(i, f"m{i}") for i in range(3)]
    server.answers[f"GET {PATH}"] = [job(), job(), job(), job("cancelled")]
    server.answers[f"GET {PATH}/events"] = [page(events[0]), page(events[0]), page(*reversed(events))]
    server.answers[f"GET {PATH}/events?stream=true"] = page(events[0])
    assert watched(server, []) == ["running", "m0", "m1", "m2", "cancelled"]


def test_watch_says_how_it_ended(server: Script, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers[f"GET {PATH}"] = job("succeeded", fine_tuned_model="ft:base:o::1")
    server.answers[f"GET {PATH}/events"] = page(event(1, "Step 3/3: training loss=0.50"), event(0, "started"))
    assert run(server, "jobs", "watch", JOB) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("started") and lines[1].endswith("Step 3/3: training loss=0.50")
    assert lines[2].split() == ["succeeded", "ft:base:o::1"]
    server.answers[f"GET {PATH}"] = job("failed", error={"code": "training_diverged", "message": "NaN [/red]"})
    assert run(server, "jobs", "watch", JOB) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "training_diverged: NaN [/red]"


def test_watch_waits_for_a_server_that_is_away_but_not_for_ever(server: Script) -> None:
    server.answers[f"GET {PATH}"] = [job(), job("succeeded")]
    server.answers[f"GET {PATH}/events"] = page()
    away: list[float] = []
    with connected(server.url, None) as api:
        seen = follow(api, JOB, away.append)
        assert next(seen)["status"] == "running"
        with connected("http://127.0.0.1:9", None) as nobody:
            lost = follow(nobody, JOB, away.append)
            with pytest.raises(ServerUnreachableError):
                next(lost)  # it never was there
        assert [one["status"] for one in seen] == ["succeeded"]
    closed = FlakyApi()
    with pytest.raises(ServerUnreachableError):
        list(follow(closed, JOB, away.append))  # type: ignore[arg-type]
    assert sum(away) >= PATIENCE_SECONDS


class FlakyApi:
    """There once, then gone."""

    was_asked = False

    def get(self, path: str, **_: Any) -> dict[str, Any]:
        if self.was_asked:
            raise ServerUnreachableError("gone")
        self.was_asked = True
        return job()


# --- adapters ---


def versions(*numbers: int, live: int) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [
            {"id": f"fox@{n}", "lora_name": "fox", "version": n, "live": n == live, "running": 0, "r": 8}
            for n in numbers
        ],
    }


def test_adapters_are_listed(server: Script, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers["GET /v1/lora_adapters"] = versions(3, 1, 2, live=2)
    assert run(server, "adapters", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["fox@1", "fox@2", "fox@3"]
    assert [line.split()[1] for line in lines[1:]] == ["-", "yes", "-"]


def test_adapters_are_loaded_and_unloaded(server: Script, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers["POST /v1/load_lora_adapter"] = "Success: LoRA adapter 'fox' added successfully."
    server.answers["POST /v1/unload_lora_adapter"] = "Success: LoRA adapter 'fox' removed successfully."
    assert run(server, "adapters", "load", "fox", "dir", "--replace") == 0
    assert run(server, "adapters", "unload", "fox") == 0
    assert capsys.readouterr().out.splitlines() == list(server.answers.values())
    assert [asked[2] for asked in server.asked] == [
        {"lora_name": "fox", "lora_path": "dir", "load_inplace": True},
        {"lora_name": "fox"},
    ]


def test_pins_are_set_and_taken_back(server: Script, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers |= {f"POST /v1/adapters/{verb}": {"id": "fox", "pinned": verb == "pin"} for verb in ("pin", "unpin")}
    assert run(server, "adapters", "pin", "fox") == 0 and run(server, "adapters", "pin", "fox", "--off") == 0
    assert [(path, body) for _, path, body in server.asked] == [
        ("/v1/adapters/pin", {"lora_name": "fox"}),
        ("/v1/adapters/unpin", {"lora_name": "fox"}),
    ]


def test_rollback_goes_to_the_version_before_the_live_one(server: Script, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers["GET /v1/lora_adapters"] = versions(1, 2, 4, 5, live=4)
    server.answers["POST /v1/rollback_lora_adapter"] = {"lora_name": "fox", "version": 2}
    assert run(server, "adapters", "rollback", "fox") == 0
    assert run(server, "adapters", "rollback", "fox", "--to", "1") == 0
    assert run(server, "adapters", "promote", "fox", "5") == 0
    sent = [asked[2]["version"] for asked in server.asked if asked[0] == "POST"]
    assert sent == [2, 1, 5] and capsys.readouterr().out.splitlines()[0] == "fox@2 answers as fox"
    server.answers["GET /v1/lora_adapters"] = versions(4, live=4)
    assert run(server, "adapters", "rollback", "fox") == 1
    assert "error [model_not_found]: no version of 'fox' is older" in capsys.readouterr().err


# --- errors ---


def test_the_key_is_sent_and_never_shown(
    server: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOQUETIER_API_KEY", "sk-secret")
    server.answers["GET /v1/lora_adapters"] = (401, {"error": {"message": "bad key", "code": "invalid_api_key"}})
    assert run(server, "adapters", "list") == 1
    err = capsys.readouterr().err
    assert err == "error [invalid_api_key]: bad key (give a key with LOQUETIER_API_KEY or --api-key)\n"
    assert server.keys == ["Bearer sk-secret"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((404, {"error": {"message": "no\x1b[2J job", "code": "not_found"}}), "error [not_found]: no\\x1b[2J job"),
        ((429, {"error": {"message": "slow", "code": "rate_limit_exceeded"}}), "slow (try again in 7 s)"),
        ((502, "<html>proxy</html>"), "answered 502"),
        ((200, "[1]"), "not our server?"),
        ((200, "<html>"), "not our server?"),
    ],
)
def test_one_line_says_what_is_wrong(
    answer: Any, expected: str, server: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers[f"GET {PATH}"] = answer
    assert run(server, "jobs", "show", JOB) == 1
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1 and "Traceback" not in err


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Script(url="http://127.0.0.1:9"), "jobs", "list") == 1
    assert "error [server_unreachable]: no server answers at http://127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "", "http://"])
def test_a_url_that_is_none(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Script(url=url), "jobs", "list") == 1
    assert "error [invalid_value]: --url" in capsys.readouterr().err


def test_an_address_with_v1_is_the_same(server: Script) -> None:
    server.answers["GET /v1/lora_adapters"] = page()
    server.url += "/v1/"
    assert run(server, "adapters", "list", "--json") == 0


@pytest.mark.parametrize("bad", ["../files", "a/b", "x?y", ""])
def test_a_job_id_cannot_lead_elsewhere(bad: str, server: Script) -> None:
    assert run(server, "jobs", "show", bad) == 2 and not server.asked


def test_an_error_in_the_stream_is_told(server: Script) -> None:
    server.answers["GET /x"] = 'data: {"error": {"message": "engine died"}}\n\n'
    with (
        connected(server.url, None) as api,
        api.events("/x") as events,
        pytest.raises(ServerRefusedError, match="engine died"),
    ):
        list(events or ())
