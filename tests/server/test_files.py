"""``/v1/files`` with the official SDK and with hostile bodies; quotas, owners, idempotency, uploads that end early."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.server.fixtures import BASE, base_dir
from tests.server.live import DEADLINE, Live, error_of, wait_until
from tests.server.tuned import CHATS, jsonl, tuned, upload

from loquetier.server.auth import KeyRing, Principal, Scope
from loquetier.server.file_check import FileChecker

__all__ = ["base_dir"]

KEYS = {
    "ann-key": Principal(id="ann", owner="ann", scopes=frozenset(Scope)),
    "bob-key": Principal(id="bob", owner="bob", scopes=frozenset({Scope.TRAIN}), storage_bytes=5000, jobs=1),
    "infer-key": Principal(id="i", owner="ann", scopes=frozenset({Scope.INFER})),
}
RING = KeyRing(tuple((hashlib.sha256(key.encode()).hexdigest(), who) for key, who in KEYS.items()))


@pytest.fixture(scope="module")
def live(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    limits = {"max_file_bytes": 300_000, "body_timeout": 5.0}
    with tuned(base_dir, tmp_path_factory.mktemp("data"), RING, "ann-key", **limits) as found:
        yield found


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    return live.client()


@pytest.fixture(autouse=True)
def _nothing_is_left(live: Live, client: openai.OpenAI) -> Iterator[None]:
    yield
    for key in ("ann-key", "bob-key"):
        ours = live.client(api_key=key)
        for file in ours.files.list():
            ours.files.delete(file.id)
    tuning = live.services.tuning
    assert tuning is not None
    wait_until(lambda: not list(tuning.store.data_dir.leftovers()), "no temporary file is left")
    assert not list(tuning.store.data_dir.files.iterdir()), "bytes of deleted files"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_upload_look_read_and_delete(client: openai.OpenAI) -> None:
    content = jsonl(CHATS)
    made = client.files.create(file=("../../x.jsonl", content), purpose="fine-tune")
    assert made.id.startswith("file-") and made.bytes == len(content) and made.status == "uploaded"
    assert made.filename == "../../x.jsonl" and made.purpose == "fine-tune", "a name is only data"
    assert client.files.wait_for_processing(made.id, poll_interval=0.01).status == "processed"
    assert client.files.content(made.id).read() == content
    deleted = client.files.delete(made.id)
    assert deleted.deleted and deleted.id == made.id
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.retrieve(made.id)
    assert caught.value.body["code"] == "file_not_found"  # type: ignore[index]
    with pytest.raises(openai.NotFoundError):
        client.files.delete(made.id)


def test_pages(live: Live, client: openai.OpenAI) -> None:
    ids = [client.files.create(file=(f"{n}.txt", b"x"), purpose="user_data").id for n in range(5)]
    trained = client.files.create(file=("t.jsonl", jsonl(CHATS)), purpose="fine-tune").id
    assert [f.id for f in client.files.list()] == [trained, *ids[::-1]]
    assert [f.id for f in client.files.list(limit=2, order="asc")] == [*ids, trained], "the SDK walks the pages"
    first = client.files.list(limit=2, purpose="user_data")
    assert [f.id for f in first.data] == ids[:2:-1] and first.has_more
    assert [f.id for f in client.files.list(after=ids[1], order="desc").data] == [ids[0]]
    page = live.http("GET", "/v1/files?limit=2").json()
    assert page["first_id"] == trained and page["last_id"] == ids[-1] and page["object"] == "list"
    assert not live.http("GET", "/v1/files?limit=6").json()["has_more"], "six are all"
    assert live.http("GET", "/v1/files?limit=5").json()["has_more"]
    for query in ("limit=0", "limit=10001", "order=up", "after=file-none", "limit=x"):
        assert live.http("GET", f"/v1/files?{query}").status_code == 400
        error_of(live.http("GET", f"/v1/files?{query}"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xef\xbb\xbf" + jsonl(CHATS).replace(b"\n", b"\r\n\r\n"), None),
        (json.dumps(CHATS).encode(), None),
        (gzip.compress(jsonl(CHATS)), None),
        (b"prompt,completion\nx,y\n", None),
        (b"", "no examples"),
        (b"\xff\xfe" + jsonl(CHATS).decode().encode("utf-16-le"), "UTF-16"),
        (jsonl(CHATS) + b'{"messages": \xff}\n', "not UTF-8"),
        (b"hello\n", "Line 1 is not a dictionary"),
        (jsonl(CHATS) + b'{"messages": [}\n', "Example 13 cannot be parsed. Error: line contains invalid json"),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}\n', "duplicate key"),
        (b'{"messages": [{"role": "user", "content": "x"}]}\n', "Example 1"),
        (gzip.compress((b" " * 99_999 + b"\n") * 700), "decompression bombs"),
    ],
    ids=[
        "bom-crlf",
        "array",
        "gzip",
        "csv",
        "empty",
        "utf16",
        "bad-utf8",
        "text",
        "broken",
        "duplicate",
        "no-assistant",
        "bomb",
    ],
)
def test_row_26_training_data_is_looked_at(client: openai.OpenAI, content: bytes, problem: str | None) -> None:
    file = upload(client, content)
    assert file.status == ("processed" if problem is None else "error"), file.status_details
    if problem is not None:
        assert problem in (file.status_details or "")
        assert "/tmp" not in (file.status_details or ""), "no path of the server"


def test_expiry(client: openai.OpenAI, live: Live) -> None:
    after: Any = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=("x", b"x"), purpose="batch", expires_after=after)
    assert file.expires_at == file.created_at + 3600
    for wrong in ({"anchor": "created_at", "seconds": 3599}, {"anchor": "now", "seconds": 3600}):
        with pytest.raises(openai.BadRequestError, match="expires_after"):
            client.files.create(file=("x", b"x"), purpose="batch", expires_after=wrong)  # type: ignore[arg-type]


def post(live: Live, body: bytes, boundary: str = "b", **headers: str) -> httpx.Response:
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return live.http("POST", "/v1/files", content=body, headers=kind | headers)


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    shown = f'; filename="{filename}"' if filename is not None else ""
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{shown}\r\n\r\n'.encode() + value + b"\r\n"


PURPOSE, END = part("purpose", b"user_data"), b"--b--\r\n"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (part("purpose", b"user_data") * 1000 + END, 400, "purpose"),
        (b"".join(part(f"x{n}", b"") for n in range(100)) + END, 413, None),
        (PURPOSE + part("file", b"x" * 100_000) + END, 400, "file"),
        (PURPOSE + part("note", b"x" * 100_000) + END, 413, None),
        (PURPOSE + part("file", b"x", "a"), 400, None),
        (part("file", b"x", "a") + END, 400, "purpose"),
        (part("purpose", b"evil") + part("file", b"x", "a") + END, 400, "purpose"),
        (PURPOSE + END, 400, "file"),
        (PURPOSE + part("file", b"x", "a") * 2 + END, 400, "file"),
        (PURPOSE + part("file", b"x" * 300_001, "a") + END, 413, "file"),
        (PURPOSE + part("file", b"x", "a" * 10_000) + END, 400, None),
        (b"not multipart at all", 400, None),
        (b"", 400, None),
        (b"--b\r\nContent-Disposition: attachment\r\n\r\nx\r\n--b--\r\n", 400, None),
    ],
    ids=[
        "twice",
        "many-parts",
        "file-without-name",
        "long-field",
        "no-end",
        "no-purpose",
        "bad-purpose",
        "no-file",
        "two-files",
        "too-large",
        "long-name",
        "not-multipart",
        "empty",
        "no-form-data",
    ],
)
def test_row_24_hostile_bodies(live: Live, body: bytes, status: int, param: str | None) -> None:
    response = post(live, body)
    assert response.status_code == status, response.text
    assert error_of(response)["param"] == param


def test_row_24_strange_names_are_kept_as_data(live: Live) -> None:
    for name, shown in (("CON", "CON"), ("a\x00b", "a\N{REPLACEMENT CHARACTER}b"), ("x" * 4000, "x" * 255)):
        response = post(live, PURPOSE + part("file", b"x", name) + END)
        assert response.status_code == 200, response.text
        assert response.json()["filename"] == shown


def test_the_content_type_must_be_multipart(live: Live) -> None:
    assert live.post("/v1/files", {"purpose": "batch"}).status_code == 415
    assert post(live, b"x", boundary="").status_code == 415


def test_row_25_a_client_that_leaves_in_the_middle_leaves_nothing(live: Live) -> None:
    tuning = live.services.tuning
    assert tuning is not None
    body = PURPOSE + part("file", b"x" * 200_000, "a")
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer ann-key\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body) + 100}\r\n\r\n"
    )
    with live.connect() as client:
        client.sendall(head.encode() + body)
        wait_until(lambda: bool(list(tuning.store.data_dir.temporary.iterdir())), "the upload has begun")
    wait_until(lambda: not list(tuning.store.data_dir.temporary.iterdir()), "its temporary file is gone")
    assert tuning.files._coming == {}, "its bytes count no more"


def test_another_owner_sees_nothing_and_a_key_needs_the_scope(live: Live, client: openai.OpenAI) -> None:
    file = upload(client)
    bob = live.client(api_key="bob-key")
    missing = live.http("GET", "/v1/files/file-none", headers=bearer("bob-key"))
    for path in (f"/v1/files/{file.id}", f"/v1/files/{file.id}/content"):
        answer = live.http("GET", path, headers=bearer("bob-key"))
        assert answer.status_code == 404
        assert answer.json()["error"] == missing.json()["error"] | {"message": f"No such File object: {file.id}"}
    assert live.http("DELETE", f"/v1/files/{file.id}", headers=bearer("bob-key")).status_code == 404
    assert list(bob.files.list()) == []
    assert live.http("GET", f"/v1/files?after={file.id}", headers=bearer("bob-key")).status_code == 400
    assert live.http("GET", "/v1/files", headers=bearer("infer-key")).status_code == 403


def test_row_25_the_storage_quota_counts_what_is_there_and_what_is_coming(live: Live) -> None:
    bob = live.client(api_key="bob-key")
    bob.files.create(file=("a", b"x" * 3000), purpose="batch")
    with pytest.raises(openai.PermissionDeniedError) as caught:
        bob.files.create(file=("b", b"x" * 3000), purpose="batch")
    assert caught.value.body["code"] == "insufficient_quota"  # type: ignore[index]
    bob.files.create(file=("c", b"x" * 1000), purpose="batch")


def test_an_idempotency_key_makes_one_file(live: Live, client: openai.OpenAI) -> None:
    made: list[str] = []

    def ask() -> None:
        headers = {"Idempotency-Key": "once"}
        made.append(client.files.create(file=("a", b"same"), purpose="batch", extra_headers=headers).id)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert len(made) == 8 and len(set(made)) == 1
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("a", b"other"), purpose="batch", extra_headers={"Idempotency-Key": "once"})
    assert caught.value.body["code"] == "idempotency_key_reused"  # type: ignore[index]
    assert post(live, b"", **{"Idempotency-Key": "x" * 256}).status_code == 400


def test_row_42_a_full_disk_is_507_and_leaves_nothing(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = live.services.tuning
    assert tuning is not None
    connection = tuning.store.database._writer
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={pages}")
    try:
        name = "n" * 200  # rows that soon need a new page
        answers = [post(live, PURPOSE + part("file", b"x", name) + END) for _ in range(60)]
    finally:
        connection.execute("PRAGMA max_page_count=1000000")
    assert {a.status_code for a in answers} == {200, 507}
    assert error_of(answers[-1])["code"] == "insufficient_storage"
    kept = [a.json()["id"] for a in answers if a.status_code == 200]
    assert {f.id for f in live.client().files.list()} == set(kept)
    assert {p.name for p in tuning.store.data_dir.files.iterdir()} == set(kept), "no bytes without a row"
    assert post(live, PURPOSE + part("file", b"x", name) + END).status_code == 200, "there is room again"


def test_what_nobody_has_looked_at_is_looked_at_after_a_restart(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as m:
        m.setattr(FileChecker, "_check", lambda self, file_id: None)
        with tuned(base_dir, tmp_path) as live:
            made = live.client().files.create(file=("x.jsonl", jsonl(CHATS)), purpose="fine-tune")
            assert made.status == "uploaded"
    with tuned(base_dir, tmp_path) as live:
        assert live.client().files.wait_for_processing(made.id, poll_interval=0.01).status == "processed"


def test_base_is_shown(live: Live) -> None:
    assert live.http("GET", f"/v1/models/{BASE}").status_code == 200
