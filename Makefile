PYTHON ?= python3
BIN := .venv/bin

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14
$(BIN)/.installed: setup.py constraints.txt  # the environment, made again when the requirements change
	$(PYTHON) -m venv .venv && $(BIN)/pip install -q -c constraints.txt -e '.[dev]' && touch $@
setup: $(BIN)/.installed  ## Make the virtual environment .venv and install megagpt and its tools into it.
demo: setup  ## Raw text to a trained, evaluated and sampled GPT, with a report, in three minutes.
	@$(BIN)/megagpt demo
test: setup  ## What every change must pass.
	@$(BIN)/pytest -m "not slow"
drills: setup  ## The long proofs.
	@$(BIN)/pytest -m slow
check: setup  ## Formatting, lint and types.
	@$(BIN)/ruff format --check -q . && $(BIN)/ruff check -q . && $(BIN)/pyright
fix: setup  ## Format, and mend what ruff can.
	@$(BIN)/ruff format -q . && $(BIN)/ruff check -q --fix .
kernels: setup  ## What the compiler makes of every kernel and table, for each architecture; needs no GPU.
	@$(BIN)/python -m megagpt.kernels.report --full --out benchmarks/results
bench: setup  ## The benchmarks that need no GPU; results go to benchmarks/results.
	@cd benchmarks && for name in data data_build remote train_step parallel_overhead checkpoint; do \
		PYTHONPATH=.. ../$(BIN)/python $$name.py --out results/$$name.json || exit 1; \
	done && ../$(BIN)/python healing.py --write
drill: setup  ## Faults, stops and goodput on a throw-away SLURM, as root; docs/launch.md says what it needs.
	@$(BIN)/python benchmarks/launch_drill.py --out benchmarks/results/launch_drill.json && $(BIN)/python benchmarks/goodput.py --out benchmarks/results/goodput.json
test-gpu: setup  ## The kernels' tests on this machine's GPU instead of in the interpreter.
	@$(BIN)/pytest tests/kernels
bench-gpu: setup  ## The kernels' correctness and speed on this machine's GPU, beside torch's and others'.
	@$(BIN)/python benchmarks/kernels_gpu.py --out benchmarks/results/kernels_gpu.json
clean:  ## Remove what was built; corpora and runs stay.
	@rm -rf .venv build *.egg-info .pytest_cache .ruff_cache && find . -name __pycache__ -prune -exec rm -rf {} +
.PHONY: help setup demo test drills check fix kernels bench drill test-gpu bench-gpu clean
