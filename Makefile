PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two tests at a time: many wait for child processes.
TOGETHER := -n 2 --dist worksteal
# Some environments turn the bytecode cache off. Tests start many processes, and each would compile
# fitloop again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help .venv demo test types tests test-fast test-transformers test-loggers test-peers test-ray docs bench bench-ray pictures clean

help:
	@echo "make .venv      create $(VENV) with $(PYTHON) and everything that the tests need"
	@echo "make demo       train a classifier of digits (examples/digits.py)"
	@echo "make test       check style and types, run all tests"
	@echo "make test-fast  run the quick tests only"
	@echo "make test-transformers  run the example that needs transformers, which is large"
	@echo "make test-peers  run the programs of the documentation that are of other libraries"
	@echo "make test-ray  run the tests that need Ray, on a cluster of this machine"
	@echo "make docs       build the site of the documentation in build/site"
	@echo "make test-loggers  run the tests that need TensorBoard, MLflow and Weights & Biases"
	@echo "make bench      measure what fitloop costs and gains (python -m benchmarks)"
	@echo "make bench-ray  measure a sweep on Ray, on a cluster of this machine"
	@echo "make pictures   draw the pictures of the README (docs/pictures.py)"
	@echo "make clean      remove $(VENV), caches and build output"
	@echo "PYTHON=... make .venv uses another Python (3.11 or newer)"

.venv: $(STAMP)

# torch is installed first and is not in constraints.txt, so that another build of it (for CUDA) can be
# chosen. The stamp is made last, so that a failed install is repeated.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
		"fitloop needs Python 3.11 or newer, and $(PYTHON) is %d.%d; set PYTHON=..." % v[:2])'
	@echo "installing into $(VENV)"
	@rm -f $(STAMP)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install '$(TORCH)'
	$(BIN)/python -m pip install -e '.[test]' -c constraints.txt
	@touch $(STAMP)

demo: .venv
	$(BIN)/python examples/digits.py

test: .venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@$(MAKE) --no-print-directory -j 2 types tests

# Both at once: the types need one core for a minute, and tests wait now and then.
types: .venv
	$(BIN)/mypy

tests: .venv
	$(BIN)/python -m pytest $(TOGETHER)

test-fast: .venv
	$(BIN)/python -m pytest $(TOGETHER) -m "not slow"

# Transformers has a folder of its own, so that no other test depends on it.
TRANSFORMERS := $(VENV)/transformers
$(TRANSFORMERS)/.installed: $(STAMP)
	$(BIN)/python -m pip install -q --upgrade --target $(TRANSFORMERS) transformers -c constraints.txt
	@touch $@

test-transformers: $(TRANSFORMERS)/.installed
	PYTHONPATH=$(TRANSFORMERS) $(BIN)/python -m pytest tests/examples/test_finetune.py

# So have the tools of loggers. MLflow is the small package, with what a database in a file needs.
LOGGERS := $(VENV)/loggers
$(LOGGERS)/.installed: $(STAMP)
	$(BIN)/python -m pip install -q --upgrade --target $(LOGGERS) tensorboard mlflow-skinny sqlalchemy alembic sqlparse \
		wandb -c constraints.txt
	@touch $@

test-loggers: $(LOGGERS)/.installed
	PYTHONPATH=$(LOGGERS) $(BIN)/python -m pytest tests/loggers

# The other trainers see everything in $(VENV), torch too, and nothing there sees them.
PEERS := $(VENV)/peers
$(PEERS)/.installed: $(STAMP)
	rm -rf $(PEERS)
	$(PYTHON) -m venv $(PEERS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/fitloop.pth"
	$(PEERS)/bin/python -m pip install -q '.[peers]' -c constraints.txt
	@touch $@

test-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m pytest tests/examples/test_coming_from.py tests/benchmarks/test_peers.py

# Ray has an environment of its own, as the peers have: its workers find everything there.
RAY := $(VENV)/ray
$(RAY)/.installed: $(STAMP)
	rm -rf $(RAY)
	$(PYTHON) -m venv $(RAY)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(RAY)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/fitloop.pth"
	$(RAY)/bin/python -m pip install -q 'ray==2.60.0' -c constraints.txt
	@touch $@

test-ray: $(RAY)/.installed
	PYTHONPATH=$(CURDIR) $(RAY)/bin/python -m pytest tests/ray_cluster

bench-ray: $(RAY)/.installed
	PYTHONPATH=$(CURDIR) $(RAY)/bin/python -m benchmarks --only ray

docs: .venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

bench: .venv
	$(BIN)/python -m benchmarks

pictures: .venv
	$(BIN)/python docs/pictures.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
