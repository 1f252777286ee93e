"""The parent's end of a worker."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType

from dpresnet.bench.workload import Facts, Workload
from dpresnet.errors import Refused


class Child:
    """A worker process for one of the `worker.SIDES` (PyTorch's with its variants); to be used in a ``with``."""

    def __init__(self, side: str, work: Workload, variants: list[str] | None = None):
        self.side = side
        job = {"side": side, "work": asdict(work), "variants": variants or []}
        command = [sys.executable, "-m", "dpresnet.bench.worker", json.dumps(job)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind:
            self._process.kill()
        self._process.communicate()

    def hello(self) -> Facts:
        """Waits until it is built; its name, and the bytes it holds with its libraries ("imported") and when "built"."""
        return self._answer()

    def ask(self, do: str, **arguments: object) -> Facts:
        """The answer to one request; raises Refused with its message if it refuses, RuntimeError if it is gone."""
        with suppress(BrokenPipeError):  # then there is no answer either, which says why
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Facts:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.side} ended with exit code {self._process.wait()}: see its output above")
        answer = json.loads(line)
        if "refused" in answer:
            raise Refused(answer["refused"])
        return answer
