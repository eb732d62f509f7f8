# Two commands do all the set-up: `make demo` and `make test`. Each builds .venv if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
KERNELS := $(wildcard experts/kernels/native/*.h experts/kernels/native/*.cpp router/native/*.h router/native/*.cpp)

.PHONY: demo serve test test-emulated-kernels test-image test-crds test-pods lint check bench fuzz soak protos train clean

demo: $(VENV)/.installed
	$(BIN)/mobula demo

serve: $(VENV)/.installed
	$(BIN)/mobula serve

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests $(ARGS)

# The kernels for AMX and AVX512-BF16 on a processor that has AVX512-VNNI at most: the instructions that it lacks are emulated,
# slowly, to the bit; all else is theirs.
test-emulated-kernels: $(VENV)/.installed-test
	CFLAGS="-DMOBULA_EMULATE_BF16 -DMOBULA_EMULATE_AMX" $(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	$(BIN)/python -m pytest tests/experts tests/attention $(ARGS); status=$$?; \
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e . && exit $$status

# What the Dockerfile installs, in an empty environment: torch, Ray and a wheel with compiled kernels. Minutes.
test-image: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/k8s -m image $(ARGS)

# Custom resources against a real API server, built from Debian's and Go's packages the first time: minutes, 3 GB of disk
# while it builds, 100 MB that stay. MOBULA_CRDS: a folder with the definitions.
test-crds: $(VENV)/.installed-test
	$(BIN)/python -m tests.k8s.build_api_server $(VENV)/api-server
	MOBULA_API_SERVER=$(VENV)/api-server $(BIN)/python -m pytest tests/k8s -m api_server $(ARGS)

# The Pods of an overlay as hosts on this machine, with what their manifests say: a minute. Needs root,
# iproute2, util-linux, Prometheus.
test-pods: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/k8s -m pods $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

# e.g. make bench ONLY=wire,kernels OUT=bench.json
bench: $(VENV)/.installed-test
	$(BIN)/python -m tests.bench $(if $(ONLY),--only "$(ONLY)") $(if $(OUT),--out "$(OUT)") $(ARGS)

# Hostile input to every port and file format, e.g. make fuzz ARGS="--cases 500000 --seed 7"
fuzz: $(VENV)/.installed-test
	$(BIN)/python -m tests.fuzz $(ARGS)

# Twenty minutes of load and faults, e.g. make soak ARGS="--seed 7"
soak: $(VENV)/.installed-test
	$(BIN)/python -m tests.soak $(ARGS)

protos: $(VENV)/.installed-test
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. protos/*.proto

# After a change of what the Grafana boards show.
boards: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[boards]"
	$(BIN)/python k8s/components/monitoring/boards/generate.py

train: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[train]"
	$(BIN)/python -m cluster.bundled_model.train --out cluster/bundled_model

# torch first and by version where a CPU wheel is at hand: without it, pip takes the newest build, with CUDA.
$(VENV)/.torch:
	@echo "building $(VENV): two or three minutes, mostly torch, ray and compiling the kernels"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(KERNELS)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.torch pyproject.toml $(KERNELS)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
