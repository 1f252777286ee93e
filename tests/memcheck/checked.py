"""A bench whose kernels run on oclgrind, each tensor in a buffer of its own, and where every complaint is a failure.

In a buffer with neighbours a stray access would hit one of them and pass; alone, the byte after the last one belongs to
nobody. Nothing but the inputs is written beforehand: what `harness.Bench` poisons would count as initialised.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import harness
import numpy as np
import pyopencl as cl
import pytest

from dpresnet.device import Device, kernel_source
from dpresnet.plan import Constant, Memory, Plan, Tensor, bind

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
HARMLESS = r"Function: clGetDeviceInfo\s+Error: +CL_INVALID_VALUE"  # pyopencl asks for what later versions of OpenCL have
MOST_STEPS = 16384  # of one plan, a third of a second; larger ones are left to tests/ops on real devices

launched: set[tuple[str, harness.Mode]] = set()  # kernels, e.g. "residual_add"
buffers: list[cl.Buffer] = []
compiled: set[tuple[str, harness.Mode]] = set()  # kernels of all programs that were built for them


class Complaint(AssertionError):
    """What oclgrind reported."""


class Apart(Memory):
    """A buffer for every tensor; one that no launch writes is read-only."""

    def __init__(self, plan: Plan):
        super().__init__({})
        self._device, self._buffers = plan.device, {}
        self._written = {tensor for entry in plan for tensor in entry.writes}

    def buffer(self, tensor: Tensor) -> cl.Buffer:
        """Device side of a tensor, not initialised."""
        if tensor not in self._buffers:
            flags = cl.mem_flags.READ_WRITE if tensor in self._written else cl.mem_flags.READ_ONLY
            self._buffers[tensor] = allocate(self._device, flags, tensor.nbytes)
        return self._buffers[tensor]

    def read(self, tensor: Tensor) -> np.ndarray:
        """A copy of a tensor."""
        host = np.empty(tensor.shape, tensor.dtype)
        cl.enqueue_copy(self._device.queue, host, self.buffer(tensor))
        return host

    def write(self, tensor: Tensor, values: np.ndarray | float) -> None:
        """Fills a tensor from the host."""
        host = np.empty(tensor.shape, tensor.dtype)
        host[...] = values
        cl.enqueue_copy(self._device.queue, self.buffer(tensor), host)


def allocate(device: Device, flags: int, nbytes: int) -> cl.Buffer:
    """A buffer that lives as long as the process: what oclgrind knows about one it would take for the next at its address."""
    buffers.append(cl.Buffer(device.context, flags, nbytes))
    return buffers[-1]


def constants_of(plan: Plan) -> dict[int, cl.Buffer]:
    """The tables of a plan, as `dpresnet.plan.bind` takes them. Copied: COPY_HOST_PTR does not count as initialised."""
    tables = {}
    for entry in plan:
        for argument in entry.args:
            if isinstance(argument, Constant):
                data = np.ascontiguousarray(argument.data)
                tables[id(argument)] = allocate(plan.device, cl.mem_flags.READ_ONLY, data.nbytes)
                cl.enqueue_copy(plan.device.queue, tables[id(argument)], data)
    return tables


class Bench(harness.Bench):
    """Runs a plan under oclgrind; comparisons that a test makes afterwards hold here too."""

    def run(self) -> None:
        """Raises `Complaint` with the first of oclgrind's messages; skips the test where the plan is too large."""
        if steps(self.plan) > MOST_STEPS:
            pytest.skip("too large to interpret")
        with stderr_text() as texts:
            self.memory = Apart(self.plan)
            for tensor, stored in self._inputs:
                self.memory.write(tensor, stored)
            self._enqueue()
        note(self.plan, self.mode)
        found = complaints(texts[0])
        if found:
            raise Complaint("\n\n".join([f"{len(found)} messages of oclgrind", *found[:3]]))

    def _enqueue(self) -> None:
        device = self.plan.device
        for entry, kernel in zip(self.plan, bind(self.plan, self.memory, constants_of(self.plan)), strict=True):
            device.enqueue(kernel, entry.size)
        device.finish()


def steps(plan: Plan) -> int:
    """About how many vectors a plan handles: those of the operations that it counts, and one visit to every element."""
    return (plan.flops + sum(tensor.size for entry in plan for tensor in entry.tensors)) // plan.device.vector


def note(plan: Plan, mode: harness.Mode) -> None:
    """Remembers what was launched, and what else the same programs contain."""
    if mode.path == "narrow":  # 8 lanes, as many as "vector" has here: the same programs
        mode = replace(mode, path="vector")
    for entry in plan:
        launched.add((f"{entry.stem}_{entry.verb}", mode))
        names = plan.device.program(entry.stem, **dict(entry.defines)).kernel_names
        compiled.update((name, mode) for name in names.split(";"))


@contextmanager
def stderr_text() -> Iterator[list[str]]:
    """Takes what is written to the file descriptor, from C++ as well; the list holds it afterwards."""
    texts, usual = [], os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield texts
        finally:
            os.dup2(usual, 2)
            os.close(usual)
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))


def complaints(text: str) -> list[str]:
    """oclgrind's messages, without those in HARMLESS, with lines of source files."""
    messages = [message.strip() for message in re.split(r"\n\n(?=\S)", text)]
    return [in_source_files(message) for message in messages if message and not re.search(HARMLESS, message)]


def in_source_files(message: str) -> str:
    """A message with lines of kernels/*.cl instead of those of the text that was compiled."""
    kernel = re.search(r"Kernel: +(\w+?)_", message)
    if not kernel:
        return message
    return re.sub(r"line (\d+) \(column \d+\) of input.cl", lambda m: place(kernel.group(1), int(m.group(1))), message)


def place(stem: str, line: int) -> str:
    """File and line of a line of a compiled text, which has one line in front of `kernel_source`."""
    source = kernel_source(stem)
    for file in KERNELS.glob("*.cl"):
        text = file.read_text()
        first = source[: max(0, source.find(text))].count("\n") + 2
        if text in source and first <= line < first + text.count("\n"):
            return f"kernels/{file.name}:{line - first + 1}"
    return f"line {line} of the program {stem}"
