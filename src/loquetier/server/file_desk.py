"""What can be done with files, over the store: upload, look, delete; each file belongs to an owner."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from starlette.requests import Request

from loquetier.adapters.durable import fsync_directory
from loquetier.server.auth import Principal
from loquetier.server.file_check import CHECKED_PURPOSE, FileChecker
from loquetier.server.problems import ApiError, bad
from loquetier.server.quota import check_quota
from loquetier.server.schemas.files import PURPOSES
from loquetier.server.settings import ServerSettings
from loquetier.server.store.files import FileRow
from loquetier.server.store.store import Store
from loquetier.server.upload import Upload, receive

log = structlog.get_logger("loquetier.server.files")

ROUTE = "files"
_LOOK_BYTES = 1 << 20
"""How much may come in before the owner's files are counted again."""
MIN_SECONDS, MAX_SECONDS = 3600, 2592000


@dataclass(slots=True)
class FileDesk:
    """Event loop, but for `commit` and `delete`."""

    store: Store
    settings: ServerSettings
    checker: FileChecker
    _coming: Counter[str] = field(default_factory=Counter)
    """Bytes of uploads under way, by owner."""

    async def upload(self, request: Request, who: Principal, key: str | None) -> FileRow:
        """Take a file in; it is on the disk when this returns.

        Args:
            key: an idempotency key.

        Raises:
            As `receive`, and ApiError 403 over the quota, 400 for its other fields; nothing is left behind.
        """
        target = self.store.data_dir.temporary / f"upload.tmp-{secrets.token_hex(8)}"
        with self._quota(who) as check_size:
            try:
                upload = await receive(request, self.settings, target, check_size)
                # Shielded: a client that leaves now has sent everything; the file is made or not made, never half.
                return await asyncio.shield(asyncio.to_thread(self.commit, who, upload, target, key))
            finally:
                target.unlink(missing_ok=True)

    @contextmanager
    def _quota(self, who: Principal) -> Iterator[_Quota]:
        quota = _Quota(self, who)
        try:
            yield quota
        finally:
            self._coming[who.owner] -= quota.counted
            self._coming += Counter()  # forget zeros

    def commit(self, who: Principal, upload: Upload, temporary: Path, key: str | None) -> FileRow:
        """Make an upload a file, durably; on a thread. Raises ApiError 400."""
        store, now = self.store, int(self.store.wall())
        file = _row_of(who, upload, now)
        digest = hashlib.sha256(f"{upload.sha256} {file.purpose} {upload.filename}".encode()).hexdigest()
        final = store.files.path(file.id)
        store.fail_point("upload.before_rename")
        os.rename(temporary, final)
        try:
            fsync_directory(final.parent)
            store.fail_point("upload.before_commit")
            with store.write() as c:
                store.know(c, who.owner, who.id)
                store.files.expire(c)
                known = key and store.once.find(c, who.owner, ROUTE, key, digest)
                if not known:
                    store.files.add(c, file)
                    if key:
                        store.once.note(c, who.owner, ROUTE, key, digest, file.id)
        except BaseException:
            final.unlink(missing_ok=True)
            raise
        if known:
            final.unlink()
            return self.find(who, known)
        store.fail_point("upload.after_commit")
        log.info("file_uploaded", file=file.id, owner=who.owner, bytes=file.bytes, purpose=file.purpose)
        if file.status == "uploaded":
            self.checker.put(file.id)
        store.files.tidy()
        return file

    def find(self, who: Principal, file_id: str) -> FileRow:
        """One of the caller's files. Raises ApiError 404, the same for what does not exist and what is another's."""
        file = self.store.files.find(file_id, who.owner)
        if file is None:
            raise no_such_file(file_id)
        return file

    def delete(self, who: Principal, file_id: str) -> None:
        """Out of sight at once; the bytes go when no job needs them. On a thread. Raises ApiError 404."""
        self.find(who, file_id)
        with self.store.write() as c:
            deleted = self.store.files.delete(c, file_id)
        if not deleted:
            raise no_such_file(file_id)
        self.store.files.tidy()
        log.info("file_deleted", file=file_id, owner=who.owner)


@dataclass(slots=True)
class _Quota:
    """How many bytes one upload may still bring."""

    desk: FileDesk
    who: Principal
    counted: int = 0
    _stored: int = 0
    """Bytes of the owner's files and adapters, when it was last looked."""
    _looked_at: int = -_LOOK_BYTES

    def __call__(self, num_bytes: int) -> None:
        """Raises ApiError: 413 for the file, 403 for all files of the owner."""
        desk, settings = self.desk, self.desk.settings
        if num_bytes > settings.max_file_bytes:
            raise ApiError(
                413,
                f"the file is larger than {settings.max_file_bytes} bytes",
                code="request_too_large",
                param="file",
                headers={"Connection": "close"},
            )
        desk._coming[self.who.owner] += num_bytes - self.counted
        self.counted = num_bytes
        if num_bytes - self._looked_at >= _LOOK_BYTES:
            self._stored, self._looked_at = desk.store.bytes_of(self.who.owner), num_bytes
        check_quota(settings, self.who, self._stored, desk._coming[self.who.owner], "file")


def no_such_file(file_id: str, param: str | None = "id") -> ApiError:
    """404 in OpenAI's words."""
    shown = "".join(c if c.isprintable() else "?" for c in file_id[:64])
    return ApiError(404, f"No such File object: {shown}", code="file_not_found", param=param)


def _purpose(fields: dict[str, str]) -> str:
    purpose = fields.get("purpose")
    if purpose is None:
        raise bad("'purpose' is a required property", "purpose", "missing_required_parameter")
    if purpose not in PURPOSES:
        raise bad(f"purpose {purpose[:64]!r} must be one of {', '.join(PURPOSES)}", "purpose", "invalid_value")
    return purpose


def _expiry(fields: dict[str, str], now: int) -> int | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise bad("expires_after[anchor] must be 'created_at'", "expires_after[anchor]", "invalid_value")
    is_number = seconds is not None and seconds.isascii() and seconds.isdigit() and len(seconds) < 9
    if not is_number or not MIN_SECONDS <= int(seconds or 0) <= MAX_SECONDS:
        raise bad(
            f"expires_after[seconds] must be a whole number in [{MIN_SECONDS}, {MAX_SECONDS}]",
            "expires_after[seconds]",
            "invalid_value",
        )
    return now + int(seconds or 0)


def _row_of(who: Principal, upload: Upload, now: int) -> FileRow:
    """The row of a new file. Raises ApiError 400 for a field that is not as it should be."""
    purpose = _purpose(upload.fields)
    return FileRow(
        id=f"file-{secrets.token_hex(12)}",
        owner=who.owner,
        key_id=who.id,
        filename=upload.filename,
        purpose=purpose,
        bytes=upload.num_bytes,
        sha256=upload.sha256,
        created_at=now,
        expires_at=_expiry(upload.fields, now),
        status="uploaded" if purpose == CHECKED_PURPOSE else "processed",
    )
