"""The store: transactions, start-up recovery, refusals in one line, adapters and versions, idempotency keys."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loquetier.adapters.peft_write import CONFIG_NAME, WEIGHTS_NAME
from loquetier.errors import AdapterExistsError, ConfigError, InsufficientStorageError
from loquetier.server.store.adapters import VersionRow
from loquetier.server.store.datadir import DATABASE
from loquetier.server.store.files import FileRow
from loquetier.server.store.jobs import EventRow, JobRow
from loquetier.server.store.once import KEPT_SECONDS, KeyReusedError
from loquetier.server.store.schema import MIGRATIONS
from loquetier.server.store.store import Store, open_store


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    opened = open_store(tmp_path / "data", clock)
    with opened.write() as c:
        opened.know(c, "me", "key-1")
    yield opened
    opened.check_integrity()
    opened.close()


def file(store: Store, file_id: str = "file-1", *, expires_at: int | None = None, owner: str = "me") -> FileRow:
    row = FileRow(
        id=file_id, owner=owner, key_id="key-1", filename="a.jsonl", purpose="fine-tune", bytes=3, sha256="0",
        created_at=int(store.wall()), expires_at=expires_at, status="uploaded",
    )  # fmt: skip
    store.files.path(file_id).write_bytes(b"abc")
    with store.write() as c:
        store.files.add(c, row)
    return row


def job(store: Store, job_id: str = "ftjob-1", file_id: str = "file-1", **fields: object) -> JobRow:
    row = JobRow(
        id=job_id, owner="me", key_id="key-1", created_at=int(store.wall()), base="b", model=f"ft:b:me::{job_id[6:]}",
        training_file=file_id, validation_file=None, seed=0, settings={}, **fields,  # type: ignore[arg-type]
    )  # fmt: skip
    with store.write() as c:
        store.jobs.add(c, row)
    return row


def test_a_transaction_is_whole_or_nothing_and_is_seen_only_when_it_is_committed(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.write() as c:
        store.adapters.create(c, "a", "me", "loaded", "/x")
        assert store.adapters.find("a") is None, "the reader sees what is committed"
        _ = 1 / 0
    assert store.adapters.find("a") is None
    with store.write() as c:
        store.adapters.create(c, "a", "me", "loaded", "/x")
    assert store.adapters.find("a") is not None


def test_writes_are_synced_at_each_commit(store: Store) -> None:
    with store.write() as c:
        assert c.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
        assert c.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_row_42_a_full_disk_is_told_as_such(store: Store) -> None:
    with store.write() as c:
        pages = c.execute("PRAGMA page_count").fetchone()[0]
    store.database._writer.execute(f"PRAGMA max_page_count={pages}")  # SQLITE_FULL, as on a full disk
    with pytest.raises(InsufficientStorageError) as caught, store.write() as c:
        c.execute("INSERT INTO meta VALUES ('x', ?)", ("y" * 100_000,))
    assert caught.value.status == 507
    store.database._writer.execute("PRAGMA max_page_count=1000000")
    with store.write() as c:  # and there is room again
        c.execute("INSERT INTO meta VALUES ('x', 'y')")


def test_row_43_one_process_at_a_time(store: Store) -> None:
    with pytest.raises(ConfigError, match="in use by another process"):
        open_store(store.data_dir.root)


def test_a_kill_releases_the_directory(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from loquetier.server.store.store import open_store\n"
        "store = open_store(Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    open_store(tmp_path).close()


def test_row_43_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    with sqlite3.connect(tmp_path / DATABASE) as c:
        c.execute(f"PRAGMA user_version={len(MIGRATIONS) + 1}")
    c.close()
    before = (tmp_path / DATABASE).read_bytes()
    with pytest.raises(ConfigError, match="newer"):
        open_store(tmp_path)
    assert (tmp_path / DATABASE).read_bytes() == before


@pytest.mark.parametrize("damage", ["page", "not a database", "empty over an old one", "a file"])
def test_row_43_a_damaged_directory_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    root = tmp_path / "data"
    store = open_store(root)
    with store.write() as c:
        store.know(c, "me", "k")
        for n in range(500):
            store.adapters.create(c, f"adapter-{n}", "me", "loaded", "/x" * 50)
    (store.data_dir.files / "file-1").write_bytes(b"x")
    store.close()
    if damage == "page":
        content = bytearray((root / DATABASE).read_bytes())
        content[4096 * 20 : 4096 * 21] = b"\xff" * 4096
        (root / DATABASE).write_bytes(content)
    elif damage == "not a database":
        (root / DATABASE).write_bytes(b"hello" * 1000)
    elif damage == "empty over an old one":
        (root / DATABASE).unlink()
    else:
        root = root / DATABASE
    with pytest.raises(ConfigError, match="--data-dir") as caught:
        open_store(root)
    assert "\n" not in str(caught.value)
    assert damage != "empty over an old one" or (root / "files" / "file-1").exists()


def test_recovery_removes_what_no_row_knows(tmp_path: Path, clock: Clock) -> None:
    store = open_store(tmp_path, clock)
    with store.write() as c:
        store.know(c, "me", "key-1")
    file(store)
    job(store)
    job(store, "ftjob-2")
    with store.write() as c:
        store.jobs.update(c, "ftjob-2", status="succeeded")
    for name in ("ftjob-1", "ftjob-2"):
        (store.data_dir.jobs / name / "checkpoints").mkdir(parents=True)
    (store.data_dir.files / "file-lost").write_bytes(b"x")
    (store.data_dir.temporary / "upload").write_bytes(b"x")
    (store.data_dir.adapters / "lost").mkdir()
    store.close()
    store = open_store(tmp_path, clock)
    assert [p.name for p in store.data_dir.files.iterdir()] == ["file-1"]
    assert [p.name for p in store.data_dir.jobs.iterdir()] == ["ftjob-1"], "a job that has ended needs no checkpoints"
    assert not list(store.data_dir.adapters.iterdir()) and not list(store.data_dir.leftovers())
    store.close()


def test_another_base_is_refused(store: Store) -> None:
    store.bind("none", "sha256:0")  # of no consequence while there is nothing in it
    store.bind("one", "sha256:1")
    with store.write() as c:
        store.adapters.create(c, "a", "me", "loaded", "/x")
    store.bind("renamed", "sha256:1")
    with pytest.raises(ConfigError, match=r"'one'.*other weights"):
        store.bind("two", "sha256:2")


def adapter_files(directory: Path) -> Path:
    directory.mkdir()
    (directory / CONFIG_NAME).write_text("{}")
    (directory / WEIGHTS_NAME).write_bytes(b"weights")
    return directory


def test_an_adapters_directory_entry_is_synced_before_its_row(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("loquetier.server.store.adapters.fsync_directory", synced.append)
    place = store.adapters.place(adapter_files(tmp_path / "source"))
    assert len(synced) == 2 and synced[1] == place.parent, "its files' entries, then, renamed, its own"


def test_a_copied_adapters_files_are_synced_before_they_have_their_name(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        told.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(old: Path, new: Path) -> None:
        told.append("renamed")
        rename(old, new)

    source = adapter_files(tmp_path / "source")
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    store.adapters.place(source)
    assert {CONFIG_NAME, WEIGHTS_NAME} <= set(told[: told.index("renamed")])


@pytest.mark.parametrize("link", [False, True])
def test_versions_of_an_adapter(store: Store, tmp_path: Path, link: bool) -> None:
    source = adapter_files(tmp_path / "source")
    with store.write() as c:
        store.adapters.create(c, "a", "me", "loaded", str(source))
        assert store.adapters.reserve(c, "a", 5) == 1
    places = [store.adapters.place(source, link=link).name for _ in range(2)]
    assert not list(store.data_dir.leftovers())
    with store.write() as c:
        for number, place in zip((3, 7), places, strict=True):
            store.adapters.add(c, VersionRow("a", number, f"digest-{number}", place, 7, 1000))
    assert [v.number for v in store.adapters.versions("a")] == [3, 7]
    live = store.adapters.version("a")
    assert live is not None and live.label == "a@7" and (store.adapters.path(live) / WEIGHTS_NAME).exists()
    with store.write() as c:
        assert store.adapters.reserve(c, "a", 1) == 8, "above every number that was ever given"
        store.adapters.set_live(c, "a", 3)
        store.adapters.set_pinned(c, "a", True)
        store.adapters.drop_versions(c, "a", [7])
    store.adapters.tidy([places[1]])
    row = store.adapters.find("a")
    assert row is not None and row.live_number == 3 and row.is_pinned
    assert [p.name for p in store.data_dir.adapters.iterdir()] == [places[0]]
    with pytest.raises(AdapterExistsError), store.write() as c:
        store.adapters.create(c, "a", "me", "loaded", "/elsewhere")
    with store.write() as c:
        assert store.adapters.remove(c, "a") and not store.adapters.remove(c, "b")
    store.adapters.tidy(places)
    assert store.adapters.all() == [] and not list(store.data_dir.adapters.iterdir()) and source.exists()


def test_a_deleted_file_stays_on_the_disk_while_a_job_may_read_it_again(store: Store) -> None:
    file(store)
    job(store)
    with store.write() as c:
        assert store.files.delete(c, "file-1") and not store.files.delete(c, "file-1")
    store.files.tidy()
    assert store.files.find("file-1") is None and store.files.path("file-1").exists()
    with store.write() as c:
        store.jobs.update(c, "ftjob-1", status="failed")
    store.files.tidy()
    assert not store.files.path("file-1").exists() and store.files.bytes_of("me") == 0
    assert store.jobs.find("ftjob-1") is not None


def test_files_expire(store: Store, clock: Clock) -> None:
    file(store, "file-1", expires_at=1100)
    file(store, "file-2")
    pages = {"owner": "me", "after": None, "limit": 9, "descending": True, "purpose": None}
    assert [f.id for f in store.files.page(**pages)] == ["file-2", "file-1"]  # type: ignore[arg-type]
    clock.now = 1100
    assert [f.id for f in store.files.page(**pages)] == ["file-2"]  # type: ignore[arg-type]
    assert store.files.find("file-1") is None
    store.recover()
    assert not store.files.path("file-1").exists() and store.files.any("file-1") is None


def test_an_event_is_told_once_and_a_job_that_has_ended_does_not_change(store: Store) -> None:
    file(store)
    job(store)
    with store.write() as c:
        assert store.jobs.tell(c, EventRow(job_id="ftjob-1", once="step-1", message="first"))
        assert not store.jobs.tell(c, EventRow(job_id="ftjob-1", once="step-1", message="again"))
        for _ in range(2):
            assert store.jobs.tell(c, EventRow(job_id="ftjob-1", message="paused", data={"x": 1.5}))
    events = store.jobs.events("ftjob-1", after=None, limit=9)
    assert [e.message for e in events] == ["paused", "paused", "first"] and events[0].data == {"x": 1.5}
    with store.write() as c:
        assert store.jobs.update(c, "ftjob-1", status="cancelled")
        assert not store.jobs.update(c, "ftjob-1", status="running")
    found = store.jobs.find("ftjob-1")
    assert found is not None and found.status == "cancelled"


def test_an_idempotency_key_makes_one_thing(store: Store, clock: Clock) -> None:
    made: list[str] = []

    def ask(n: int) -> None:
        with store.write() as c:
            if store.once.find(c, "me", "jobs", "k", "digest") is None:
                store.once.note(c, "me", "jobs", "k", "digest", f"job-{n}")
                made.append(f"job-{n}")

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    with store.write() as c:
        assert store.once.find(c, "me", "jobs", "k", "digest") == made[0]
        assert store.once.find(c, "other", "jobs", "k", "digest") is None
        with pytest.raises(KeyReusedError):
            store.once.find(c, "me", "jobs", "k", "another")
    clock.now += KEPT_SECONDS
    with store.write() as c:
        assert store.once.find(c, "me", "jobs", "k", "another") is None
