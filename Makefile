# Two commands: `make train` shows a small MiniMax-M1 learning; `make test` checks everything.
# Each sets itself up in .venv first.

VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: train test lint bench clean

$(READY): pyproject.toml
	@echo "Setting up $(VENV): some minutes, and 2 GB with a CPU build of torch"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

train: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2 \
		-m megatron_m1.pretrain experiment=tiny $(ARGS)

test: $(READY) lint
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python tools/bench_train.py $(ARGS)

clean:
	rm -rf $(VENV) runs data
