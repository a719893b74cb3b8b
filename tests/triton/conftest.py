"""These tests run in Triton's interpreter (`make test-triton`) or on a GPU. Elsewhere `test_here.py` says why not."""

from __future__ import annotations

import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available()):
    collect_ignore = ["test_smlm.py", "test_compile.py", "test_attention.py", "test_rows.py", "test_engine.py"]
elif not INTERPRETED:
    collect_ignore = ["test_engine.py"]  # written for the CPU's engine
