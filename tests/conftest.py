"""Order, time limits and optional suites: the smallest tests run first, those that start ranks last, and none hangs.

The suites in OPTIONAL need what `make test` does not install, and run only when their folder is named:
``pytest tests/peers``. What is marked ``sweep`` runs with ``-m sweep`` only, by `make test-sweeps`.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

OPTIONAL = ("peers", "intel", "memcheck")
LAST = ("mpi", "system")
LIMIT_S = 120  # of a test without a @pytest.mark.limit(seconds) of its own

TESTS = Path(__file__).parent

os.environ["DPRESNET_TUNED"] = ""  # tests do not depend on what was tuned on this machine, nor change it


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves an optional suite out, unless the command line names its folder or something in it."""
    if collection_path.parent != TESTS or collection_path.name not in OPTIONAL:
        return None
    named = [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]
    return None if any(path.is_relative_to(collection_path) for path in named) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """test_tiny.py, then everything else, then LAST; files keep their order within each."""
    items.sort(key=lambda item: position(item.path.relative_to(TESTS)))


def position(path: Path) -> int:
    """Where a test file, given relative to this folder, stands in the order of all."""
    if path.name == "test_tiny.py":
        return 0
    return 2 + LAST.index(path.parts[0]) if path.parts[0] in LAST else 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Fails a test, fixtures included, at its time limit. What no signal interrupts is left to faulthandler_timeout."""
    marker = item.get_closest_marker("limit")
    seconds = marker.args[0] if marker else LIMIT_S

    def stop(signum: int, frame: object) -> NoReturn:
        pytest.fail(f"over the limit of {seconds} s")  # which no `except Exception` under test can catch

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
