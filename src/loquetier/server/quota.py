"""How much an owner may keep on the disk: files, loaded adapters, models and checkpoints of jobs."""

from __future__ import annotations

from loquetier.server.auth import Principal
from loquetier.server.problems import ApiError
from loquetier.server.settings import ServerSettings


def check_quota(settings: ServerSettings, who: Principal, stored: int, more: int, param: str | None) -> None:
    """Whether `more` bytes may come to the `stored` ones.

    Raises:
        ApiError: 403 with the numbers.
    """
    limit = who.storage_bytes or settings.max_storage_bytes
    if stored + more > limit:
        raise ApiError(
            403,
            f"{stored} bytes of files and adapters are stored, and {more} more would exceed this owner's {limit}; "
            "delete files, models or checkpoints, or unload adapters",
            code="insufficient_quota",
            param=param,
            headers={"Connection": "close"} if param == "file" else None,
        )
