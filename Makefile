# Two commands: `make train` shows a small MiniMax-M1 learning; `make test` checks everything.
# Each sets itself up in .venv first.

VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: train rl test lint bench slurm-demo clean

$(READY): pyproject.toml
	@echo "Setting up $(VENV): some minutes, and 2 GB with a CPU build of torch"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

train: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2 \
		-m megatron_m1.pretrain experiment=tiny $(ARGS)

rl: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m megatron_m1.train_rl experiment=rl_tiny $(ARGS)

test: $(READY) lint
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python tools/bench_train.py $(ARGS)

slurm-demo: $(READY)
	@command -v slurmctld munged > /dev/null || [ -x /usr/sbin/slurmctld -a -x /usr/sbin/munged ] || \
		$(if $(filter 0,$(shell id -u)),,sudo) apt-get install -y --no-install-recommends slurm-wlm munge
	$(BIN)/python tools/slurm_demo.py

clean:
	rm -rf $(VENV) runs data
