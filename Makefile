# make demo: install and run all four stages on the embedded photographs.  make test: install and run the tests.
PYTHON ?= python3
BIN := .venv/bin
# One more than there are cores: some tests wait for processes of their own.
TESTERS ?= $$($(BIN)/python -c 'import os; print(os.cpu_count() + 1)')
DEMO := datasets_demo/deblur
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test check fix docs clean

demo: .venv/installed
	$(BIN)/prep scan $(DEMO)
	$(BIN)/prep pairs $(DEMO) --preview 12
	$(BIN)/prep report $(DEMO)
	$(BIN)/prep cache $(DEMO)
	$(BIN)/train run $(DEMO)
	@echo
	@echo "Everything is below $(CURDIR)/$(DEMO)/work:"
	@echo "  report.html                                     what was scanned and paired, on one page"
	@echo "  pairs/photos.preview.png                        what the model sees, references beside targets: look at it"
	@echo "  manifests/ pairs/ cache/                        tables and shards, plain Parquet (docs/formats.md)"
	@echo "  runs/default/pytorch_lora_weights.safetensors   the LoRA, for FluxKontextPipeline.load_lora_weights"
	@echo "  runs/default/metrics.jsonl                      loss, learning rate and time of every step"
	@echo "Run it again: nothing is done twice. Your own project: README.md."

test: .venv/installed-dev
	$(BIN)/pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/installed-dev
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv datasets_demo/*/work

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "pairline needs Python 3.11 or newer; say which: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
