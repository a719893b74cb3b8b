"""`make bench-gpu`: the engine on one NVIDIA GPU, checked and measured; `python -m loquetier.bench.gpu`.

Needs torch, triton, transformers and peft, and nothing of the web. `--dry-run` runs every section on a CPU with a tiny
shape: what it writes are no measurements.
"""
