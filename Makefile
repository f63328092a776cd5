# make demo   sets everything up and runs the main job      make test   sets everything up and runs all tests
# make check  format, lint, types, layers, quick tests      make bench  measures, beside other systems
# make servers   installs, as root, the servers that tests of stores talk to
# make soak   100 trainings, 360 kills of them and their keepers, 50 of trainings of many ranks, 100 of prunes on
#             Ceph, 30 s without a store, and 100,000 hostile inputs
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PEERS  := $(VENV)/.peers
# Compiled once, tests too, wherever one's shell forbids it: that is a third of the quick tests' time.
export PYTHONDONTWRITEBYTECODE =
export PYTHONPYCACHEPREFIX = $(abspath $(VENV))/.bytecode

.PHONY: setup demo test check bench soak servers clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Everstep needs Python 3.10 or newer; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module; install it (Debian: apt install python3-venv) and run make again"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	@$(BIN)/python -m everstep.demo

check: $(READY)
	$(BIN)/ruff format --check src tests bench docs/examples
	$(BIN)/ruff check src tests bench docs/examples
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	QUICK=1 $(BIN)/python -m pytest -n 2 -m 'not slow and not process'

test: $(READY)
	$(BIN)/ruff format --check src tests bench docs/examples
	$(BIN)/ruff check src tests bench docs/examples
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -n 2 --dist worksteal

# What is compared with is installed only for this; restic is a package of the system.
$(PEERS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

bench: $(PEERS)
	$(BIN)/python -m bench $(BENCH)

soak: $(READY)
	$(BIN)/python -m bench.kill --kills 360 --seed 1 --json bench/results/kill.json
	$(BIN)/python -m bench.prune_kills --kills 100 --seed 1 --json bench/results/prune_kills.json
	$(BIN)/python -m bench.ranks_kill --kills 50 --seed 1 --json bench/results/ranks_kill.json
	$(BIN)/python -m bench.fuzz --inputs 100000 --seed 1 --json bench/results/fuzz.json
	OUTAGE_S=30 $(BIN)/python -m pytest -n 0 tests/store/test_outages.py

servers: $(READY)
	PYTHON=$(BIN)/python tests/servers/install.sh

clean:
	rm -rf $(VENV) build src/*.egg-info .mypy_cache .ruff_cache .hypothesis
