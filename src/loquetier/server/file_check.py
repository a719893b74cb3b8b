"""Whether training data can be read, told by the file's status before any job uses it. One thread, file by file."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from loquetier.errors import DataError, InsufficientStorageError
from loquetier.server.store.store import Store
from loquetier.storage import FIRST_WAIT
from loquetier.training.encode import check_same_format
from loquetier.training.files import iter_records
from loquetier.training.formats import format_name, normalize

log = structlog.get_logger("loquetier.server.files")

CHECKED_PURPOSE = "fine-tune"
"""Files for other purposes are kept as they are."""
_MAX_SHOWN = 1000


@dataclass(slots=True)
class FileChecker:
    """Looks at every uploaded training file, those of an earlier life of the process first."""

    store: Store
    _queue: queue.SimpleQueue[str | None] = field(default_factory=queue.SimpleQueue)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _closing: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        for file in self.store.files.unchecked():
            self._queue.put(file.id)
        self._thread = threading.Thread(target=self._run, name="loquetier-file-check", daemon=True)
        self._thread.start()

    def put(self, file_id: str) -> None:
        """Look at a file soon."""
        self._queue.put(file_id)

    def wait(self, file_id: str) -> bool:
        """Wait until a file has been looked at; False when the server is closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing.is_set() or self._is_done(file_id))
        return not self._closing.is_set()

    def _is_done(self, file_id: str) -> bool:
        file = self.store.files.any(file_id)
        return file is None or file.status != "uploaded"

    def close(self) -> None:
        """End; what was not looked at is looked at after the next start."""
        self._closing.set()
        self._queue.put(None)
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        for file_id in iter(self._queue.get, None):
            if self._closing.is_set():
                return
            self._check(file_id)
            with self._changed:
                self._changed.notify_all()

    def _check(self, file_id: str) -> None:
        try:
            count = self._count(self.store.files.path(file_id))
            problem = None
        except DataError as error:
            count, problem = None, str(error).replace(str(self.store.files.path(file_id)), "the file")[:_MAX_SHOWN]
        except Exception as error:  # our bug, and still the client must not wait for ever
            log.exception("file_check_failed", file=file_id)
            count, problem = None, f"the file could not be checked: {type(error).__name__}"
        if self._closing.is_set():
            return
        status = "processed" if problem is None else "error"
        while True:
            try:
                with self.store.write() as c:
                    self.store.files.checked(c, file_id, status, problem, count)  # type: ignore[arg-type]
                return
            except InsufficientStorageError as error:
                log.warning("file_check_waits", file=file_id, problem=str(error))
                if self._closing.wait(FIRST_WAIT):
                    return

    def _count(self, path: Path) -> int:
        """Examples. Raises DataError for the first one that is none."""
        count, first = 0, ""
        for record in iter_records(path):
            if self._closing.is_set():
                return 0
            count += 1
            if record.error is not None:
                where = f"Invalid file format. Example {count} cannot be parsed. Error: {record.error}"
                raise DataError(f"{where} (line {record.line})")
            normalize(record.value, count)
            name = format_name(record.value, count)
            first = first or name
            check_same_format(name, first, count)
        if count == 0:
            raise DataError("the file has no examples")
        return count
