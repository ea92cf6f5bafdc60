# Each target does its own set-up: Python >= 3.11, make and pip are all that a fresh machine needs.
#
#   PYTHON=python3.12     the interpreter that makes the environment
#   VENV=path             the environment; one that already holds the tools is used as it is
#   PYTEST_ARGS=...       more arguments for pytest
#   TORCH_INDEX=url       the package index of torch and torchvision. The default is that of all packages. There, torch
#                         for Linux brings libraries for GPUs. $(TORCH_CPU) has it without them.
#
# pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are honoured.

PYTHON ?= python3
PYTHON_LOWER ?= python3.12
VENV_LOWER ?= .venv-lower
VENV_DOCS ?= .venv-docs
TORCH_INDEX ?=
TORCH_CPU := https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=
# Three bits: the digits lose next to nothing at four. A demo that was stopped goes on.
DEMO ?= quietvit compare --recipe digits --seeds 0,1,2,3,4 \
  --bits W8A8,W4A4+attention-maps-8,W3A3+attention-maps-8 --output demo-output \
  $(if $(wildcard demo-output/compare.json),--resume)

# An active environment is used when it holds the tools already; nothing is ever installed into it.
ifneq ($(and $(VIRTUAL_ENV),$(wildcard $(VIRTUAL_ENV)/bin/lint-imports)),)
VENV ?= $(VIRTUAL_ENV)
endif
VENV ?= .venv
BIN := $(VENV)/bin

STAMP := $(VENV)/.quietvit-installed
STAMP_LOWER := $(VENV_LOWER)/.quietvit-installed
STAMP_DOCS := $(VENV_DOCS)/.quietvit-installed
ifneq ($(VENV),.venv)
READY := $(if $(wildcard $(BIN)/lint-imports),,$(STAMP))
else
READY := $(STAMP)
endif

# This checkout is what runs, whatever the environment was installed from.
export PYTHONPATH := $(CURDIR)/src
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-lower lint format docs dist clean

help:
	@echo "make demo        train with and without Colinearity Decay on embedded digits, quantize, report"
	@echo "make test        every test, on two processes"
	@echo "make test-lower  every test, on the lowest versions that pyproject.toml claims ($(PYTHON_LOWER))"
	@echo "make lint        ruff, format, types, import direction"
	@echo "make format      rewrite the code as ruff formats it"
	@echo "make docs        the documentation site, in site/ (its own small environment $(VENV_DOCS))"
	@echo "make dist        the wheel and the sources of a release, in dist/: make dist URL=https://..."
	@echo "make install     only make the environment $(VENV)"
	@echo "make clean       remove the environments and the caches"

install: $(READY)

# $(call environment,interpreter,folder): a virtual environment with pip in it, also where the
# distribution ships venv without ensurepip (Debian without python3-venv).
define environment
@$(1) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
  "quietvit needs Python 3.11 or later, this is %d.%d: name another, for example PYTHON=python3.12" \
  % sys.version_info[:2])'
if $(1) -c 'import ensurepip' 2>/dev/null; then $(1) -m venv "$(2)"; else \
  $(1) -m venv --without-pip "$(2)" && \
  $(1) -m pip --python "$(2)/bin/python" install --quiet pip; fi
endef

# $(call torch,folder,more arguments for pip): say the size, and install torch first if it has an index of its own.
define torch
@echo "$(if $(TORCH_INDEX),torch comes from $(TORCH_INDEX).,The environment takes about 7 GB on Linux. Without a GPU, \
  about 2 GB are enough: make TORCH_INDEX=$(TORCH_CPU) $(MAKECMDGOALS))"
$(if $(TORCH_INDEX),"$(1)/bin/python" -m pip install --index-url "$(TORCH_INDEX)" $(2) torch torchvision)
endef

# One pip command solves torch, torchvision and timm together, so that they match each other.
$(STAMP): pyproject.toml
	$(call environment,$(PYTHON),$(VENV))
	$(call torch,$(VENV))
	"$(BIN)/python" -m pip install --editable '.[dev,transformers,datasets,lightning,onnx,openvino,torchao,detection]'
	"$(BIN)/python" -m pip check
	@touch "$@"

$(STAMP_LOWER): pyproject.toml requirements/lower-bounds.txt
	$(call environment,$(PYTHON_LOWER),$(VENV_LOWER))
	$(call torch,$(VENV_LOWER),--constraint requirements/lower-bounds.txt)
	"$(VENV_LOWER)/bin/python" -m pip install --constraint requirements/lower-bounds.txt \
	  --editable '.[dev,transformers,datasets,lightning,onnx,openvino,torchao,detection]'
	"$(VENV_LOWER)/bin/python" -m pip check
	@touch "$@"

# The site is made from the source as text, so this environment needs only the group, not torch.
$(STAMP_DOCS): pyproject.toml
	$(call environment,$(PYTHON),$(VENV_DOCS))
	"$(VENV_DOCS)/bin/python" -c 'import tomllib; \
	  groups = tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]; \
	  print(*groups["docs"], sep="\n")' > "$(VENV_DOCS)/requirements.txt"
	"$(VENV_DOCS)/bin/python" -m pip install --requirement "$(VENV_DOCS)/requirements.txt"
	@touch "$@"

docs: $(STAMP_DOCS)
	NO_MKDOCS_2_WARNING=1 "$(VENV_DOCS)/bin/mkdocs" build --strict

demo: $(READY)
	"$(BIN)/"$(DEMO)

test: $(READY)
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -n 2 $(PYTEST_ARGS)

test-lower: $(STAMP_LOWER)
	OMP_NUM_THREADS=1 "$(VENV_LOWER)/bin/python" -m pytest -n 2 $(PYTEST_ARGS)

lint: $(READY)
	"$(BIN)/ruff" check
	"$(BIN)/ruff" format --check
	"$(BIN)/mypy"
	"$(BIN)/lint-imports"

format: $(READY)
	"$(BIN)/ruff" check --fix
	"$(BIN)/ruff" format

# The README of a release has absolute links to this repository, see hatch_build.py.
dist: $(READY)
	@test -n "$(URL)" || { echo "make dist needs the public repository: make dist URL=https://..."; exit 2; }
	"$(BIN)/python" -m pip install --quiet build
	QUIETVIT_URL="$(URL)" "$(BIN)/python" -m build

clean:
	rm -rf .venv .venv-lower .venv-docs site demo-output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache \
	  .hypothesis build dist
