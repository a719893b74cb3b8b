"""These tests run where Triton is, in its interpreter: `make test-triton`. Elsewhere `test_here.py` says why not."""

from __future__ import annotations

import importlib.util
import os

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore = ["test_smlm.py", "test_compile.py", "test_attention.py", "test_rows.py", "test_engine.py"]
