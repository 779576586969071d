# The two commands that matter: make demo, make test.
PYTHON ?= python3
UV = .uv/bin/uv
BIN = .venv/bin

# Python may keep the modules' bytecode in .venv, whatever the caller's environment says: compiling torch anew takes each process 3 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test lint claims bench readme fixtures clean

setup: .venv/installed

# uv comes into a folder of the project, so that nothing outside it changes.
$(UV):
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --quiet uv==0.13.8

.venv/installed: $(UV) requirements.lock pyproject.toml
	$(UV) venv --quiet --allow-existing --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv
	$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/robench demo --out robench-demo

# One process for each core and file of tests, in the files' order: by the number of tests, as is the default, the longest files, which
# have few, would come last. The claims run in one, which prints their table, and find in the cache what the demo
# trained and measured on all cores, with one thread as there: the number of threads decides a logit's last bits.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses auto --dist loadfile --no-loadscope-reorder
	$(BIN)/robench demo --out robench-demo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest claims

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

claims: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest claims

bench: setup
	$(BIN)/python -m benchmarks

# Rewrites the README's tables from the demo's and the leaderboard's records.
readme: demo
	$(BIN)/python leaderboard/render.py

# Trains anew the weights that come with the zoo, after a change of their recipes.
fixtures: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m robench_zoo.fixtures

# Regenerates the lock file, with hashes and without addresses.
requirements.lock: | $(UV)
	$(UV) pip compile pyproject.toml --group dev --extra robustbench --universal --generate-hashes --no-header --quiet -o $@

clean:
	rm -rf .venv .uv robench-demo
