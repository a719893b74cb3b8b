"""Where this package keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """LOQUETIER_CACHE, else XDG_CACHE_HOME/loquetier, else ~/.cache/loquetier."""
    if own := os.environ.get("LOQUETIER_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "loquetier"
