# Every target sets up what it needs: a fresh machine needs only make and python3 (>= 3.10).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEEPSPEED := .venv-deepspeed
CLIENTS := .venv-clients
LIGHTNINGS := 2.4 2.5 2.6

# Empty: bytecode is written also where a container says otherwise. To rewrite the asserts of all
# tests anew takes a third of the time that each worker needs before its first test.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo docs bench gpu test test-slow test-rare test-all test-deepspeed test-clients test-versions lint format types clean

# The pin in constraints.txt keeps torch at the tested version; point PIP_INDEX_URL or PIP_EXTRA_INDEX_URL at a CPU index for a CPU-only build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,triton]'
	touch $(READY)

demo: $(READY)  ## train a small network twice and draw its effective learning rates
	$(BIN)/python examples/digits_resnet.py --demo

docs: $(READY)  ## the site, to build/docs/index.html; a warning or a broken link is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	$(BIN)/python docs/check_links.py build/docs

# Peers come from an extra of their own; where one cannot be installed, the table says that it is missing.
bench: $(READY)  ## what each callback costs, beside floors and peers; writes benchmarks/cost.md
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/cost.py

# With the Python that has torch for this GPU: no environment is made, since there may be no network.
gpu:  ## tests, launches, times and memory on a CUDA GPU, at most 8 minutes; writes benchmarks/gpu.md
	PYTHONPATH="$(CURDIR)" $(PYTHON) benchmarks/gpu.py

# worksteal: each worker begins with half of the files, so that what the tests of a file share is
# made once, and not in both workers.
test: $(READY)  ## everything but what is slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not deepspeed"

test-slow: $(READY)  ## what `make test` leaves out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not rare and not deepspeed"

test-rare: $(READY)  ## what `make test-slow` leaves out: the rest of large cross products
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "rare and not deepspeed"

test-all: test test-slow test-rare test-deepspeed  ## everything

# DeepSpeed in an environment of its own: it is built here, with an old setuptools, and without its compiled operations.
$(DEEPSPEED)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/python -m pip install --quiet --upgrade pip wheel "setuptools<81"
	$(DEEPSPEED)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(DEEPSPEED)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]' ninja
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(DEEPSPEED)/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	touch $@

test-deepspeed: $(DEEPSPEED)/.ready  ## the DeepSpeed part of the strategies
	PATH="$(CURDIR)/$(DEEPSPEED)/bin:$$PATH" DS_ACCELERATOR=cpu $(DEEPSPEED)/bin/python -m pytest -m deepspeed

# One by one: a package that no longer installs is left out, and the page says so. Their own demands are not asked for, since some exclude others.
$(CLIENTS)/.ready: pyproject.toml constraints.txt clients/needed.txt clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --upgrade pip
	$(CLIENTS)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(CLIENTS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[plot]'
	-xargs -n 1 $(CLIENTS)/bin/python -m pip install --quiet --constraint constraints.txt < clients/needed.txt
	-xargs -n 1 $(CLIENTS)/bin/python -m pip install --quiet --no-deps < clients/requirements.txt
	touch $@

test-clients: $(CLIENTS)/.ready  ## models and optimizers of other packages; writes docs/clients.md
	OMP_NUM_THREADS=2 $(CLIENTS)/bin/python clients/run.py

# The oldest and the newest releases of each minor version that install beside the pinned torch.
.PRECIOUS: .venv-lightning-%/.ready
.venv-lightning-%/.ready: pyproject.toml constraints.txt tests/versions/lightning-%.txt
	$(PYTHON) -m venv .venv-lightning-$*
	.venv-lightning-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-lightning-$*/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-lightning-$*/bin/python -m pip install --quiet --constraint constraints.txt --constraint tests/versions/lightning-$*.txt --editable '.[test]' pytorch-lightning
	touch $@

test-versions: $(LIGHTNINGS:%=test-lightning-%)  ## callbacks and conformance under the oldest and the newest Lightning, torchmetrics and wandb, and both of Lightning's packages

test-lightning-%: .venv-lightning-%/.ready
	for flavour in lightning.pytorch pytorch_lightning; do \
		NORMDYN_TEST_FLAVOUR=$$flavour OMP_NUM_THREADS=1 .venv-lightning-$*/bin/python -m pytest -n 2 -m "not slow and not deepspeed" \
			tests/callbacks tests/engine tests/monitor tests/test_metrics.py tests/test_conformance.py || exit 1; \
	done

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEEPSPEED) $(CLIENTS) $(LIGHTNINGS:%=.venv-lightning-%) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
