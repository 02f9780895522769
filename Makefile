# make demo and make test are the README's two commands; each works alone in a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
WORKERS ?= 2

# One torch thread per test worker: two workers with a thread pool each fight over two cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
SOURCES := moe_hf training examples benchmarks tests docs

# The tests that lean most on other libraries, in under 4 minutes: routing with caches, blocks, save and load, trainer.
SLICE := tests/test_versions.py $(addprefix tests/modeling/, test_routing_cache.py test_routing_ids.py \
	test_output_mixture.py test_moe_block.py test_remote_code.py test_behaviour.py test_layout.py test_serving.py) \
	$(addprefix tests/trainer/, test_trainer.py test_resume.py) tests/finetuning/test_lora_files.py tests/hub/test_hub.py
OLDEST := .venv-oldest
NEWEST := .venv-newest

# An environment $(1) in front of .venv: it has what is installed into it, and of the rest what .venv has.
define IN_FRONT
$(BIN)/python -m venv --clear --without-pip $(1)
$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth
endef
RUN_SLICE = $(TEST_ENV) OTHER_PYTHON=$(CURDIR)/$(BIN)/python $(1)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(SLICE)

.DEFAULT_GOAL := help
.PHONY: help demo setup test test-all test-oldest newest numerics test-gpu conformance interop check-real release-check docs docs-serve style quality clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"moe_hf needs Python 3.11 to 3.13, and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(STAMP)  ## create .venv and install moe_hf with its exact tested versions

demo: $(STAMP)  ## the main job on real text: dense -> MoE -> fine-tuned -> compared (SEEDS=3, SOURCE=<Hub id or folder>); REAL=1: with a pretrained model (MINUTES=25)
	REAL='$(REAL)' SEEDS='$(SEEDS)' SOURCE='$(SOURCE)' MINUTES='$(MINUTES)' $(BIN)/python -m training.demo

test: $(STAMP)  ## the tests that every change runs, under 25 minutes on 2 cores
	$(TEST_ENV) $(PYTEST) -n $(WORKERS) --dist worksteal

test-all: $(STAMP)  ## the tests, the slow ones too
	$(TEST_ENV) $(PYTEST) -n $(WORKERS) --dist worksteal -m 'not gpu and not conformance and not interop' --timeout 3600

$(OLDEST)/.installed: $(STAMP) constraints-oldest.txt
	$(call IN_FRONT,$(OLDEST))
	$(BIN)/python -m pip --python $(OLDEST) install --quiet --no-warn-conflicts --requirement constraints-oldest.txt
	@touch $@

test-oldest: $(OLDEST)/.installed  ## a slice of the tests on the oldest versions that pyproject.toml allows, torch excepted
	$(call RUN_SLICE,$(OLDEST))

newest: $(STAMP)  ## the slice on the newest of everything but torch, and which private names of other libraries changed there
	$(call IN_FRONT,$(NEWEST))
	$(BIN)/python -m pip --python $(NEWEST) install --quiet --upgrade --upgrade-strategy eager --no-warn-conflicts \
		--editable '.[dev]' $$(sed -n 's/^\(torch==.*\)/\1/p; /^#/d; /^torch==/d; s/==.*//p' constraints.txt)
	$(call RUN_SLICE,$(NEWEST)); status=$$?; $(BIN)/python -m tests.doors $(NEWEST)/bin/python; exit $$status

numerics: $(STAMP)  ## what compares computed values, under each kind of kernels of this machine (ONLY=sse|avx2|avx512|2-threads|busy|misaligned)
	$(TEST_ENV) $(BIN)/python -m tests.check_numerics $(if $(ONLY),--only $(ONLY))

conformance: $(STAMP)  ## transformers' own model tests over our classes; fetches its sources from PyPI
	$(TEST_ENV) $(PYTEST) tests/conformance -m conformance --timeout 3600

check-real: $(STAMP)  ## 8 models of the Hub: upcycled, verified, exported, compared with what is expected; needs a network
	$(BIN)/python -m tests.check_real

interop: $(STAMP)  ## servers and evaluators on our models, each in an environment from PyPI (TOOL=lm_eval|llama_cpp|vllm|trl|peft|serve)
	$(TEST_ENV) $(PYTEST) $(if $(TOOL),tests/interop/test_$(TOOL).py,tests/interop) -m interop --timeout 7200; \
	status=$$?; $(BIN)/python -m tests.interop.results; exit $$status

release-check: $(STAMP)  ## all that a release has to prove, with a report in release/report.md; hours (ONLY='wheel demo')
	$(BIN)/python -m tests.check_release $(if $(ONLY),--only $(ONLY))

test-gpu: $(STAMP)  ## the tests that need CUDA; skips itself without it
	$(TEST_ENV) $(PYTEST) -m gpu --timeout 3600

docs: $(STAMP)  ## the site of docs/: build/site/index.html opens from the disk, without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(STAMP)  ## the site on this machine, built again as its sources change
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --watch moe_hf

style: $(STAMP)  ## format and fix what ruff can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: $(STAMP)  ## what CI checks before the tests
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

clean:  ## remove the environment, builds and the demo's output
	rm -rf $(VENV) $(OLDEST) $(NEWEST) demo conformance interop release dist build outputs .pytest_cache .ruff_cache .hypothesis
