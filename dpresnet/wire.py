"""How gradients travel: as they are (fp32), or in 16 bits a value.

    fp32  4 bytes, exact
    bf16  2 bytes: the upper half of an fp32 number, rounded to nearest, ties to even; the same range, 8 bits of precision
    fp16  2 bytes: fp16 with one power of two for each 128 neighbours, so that the largest of them lies in [16384, 32768]: 11
          bits of precision, over the range of fp32 (block floating point; Wilkinson 1963, chapter 1)

With 16 bits the contribution of each replica is rounded once, before anything is added, and the sum over all replicas once
more, before it is handed out. Whatever is added in between is fp32, and what has been rounded may travel again: it stays as
it is. So the bits do not depend on the number of ranks; and as gradients lie on multiples of 128 values in their arena, not
on where buckets end either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

BLOCK = 128  # neighbours in the gradient arena that share a power of two: `dpresnet.device.ALIGNMENT` bytes of fp32
LARGEST = 15  # fp16: the largest of them is at most 2^15, before and after it is rounded
CHUNK = 2**15  # values that are rounded at a time
LEAST = LARGEST - 127  # exponent of a block's largest value: 2^(LARGEST - LEAST) is still an fp32 number


class Wire(ABC):
    """A format. Values are float32 [n], n a multiple of ``unit``; messages are uint8 [nbytes(n)]. The message of an array is
    those of its parts one after the other.
    """

    name: str
    unit = 1

    @abstractmethod
    def nbytes(self, n: int) -> int:
        """Of a message of ``n`` values."""

    @abstractmethod
    def encode(self, values: np.ndarray) -> np.ndarray:
        """The message of ``values``; it may be their memory."""

    @abstractmethod
    def decode(self, message: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The values that a message holds, in ``out`` if that is given; they may be the memory of the message."""

    @abstractmethod
    def room(self, out: np.ndarray) -> np.ndarray:
        """Where to receive the message that is then decoded to ``out``."""

    def round(self, values: np.ndarray) -> None:
        """Makes of ``values`` what would arrive."""
        self.decode(self.encode(values), values)


class Fp32(Wire):
    """The values themselves: nothing is copied."""

    name = "fp32"

    def nbytes(self, n: int) -> int:
        return 4 * n

    def encode(self, values: np.ndarray) -> np.ndarray:
        return values.view(np.uint8)

    def decode(self, message: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        return message.view(np.float32)

    def room(self, out: np.ndarray) -> np.ndarray:
        return out.view(np.uint8)


class Rounding(Wire):
    """A format that rounds: some values at a time, so that what that takes stays in the caches."""

    def encode(self, values: np.ndarray) -> np.ndarray:
        message = self.room(values)
        for begin in range(0, values.size, CHUNK):
            end = min(begin + CHUNK, values.size)
            self._write(values[begin:end], message[self.nbytes(begin) : self.nbytes(end)])
        return message

    @abstractmethod
    def _write(self, values: np.ndarray, message: np.ndarray) -> None:
        """Fills the message of some values."""

    def room(self, out: np.ndarray) -> np.ndarray:
        return np.empty(self.nbytes(out.size), np.uint8)


class Bf16(Rounding):
    """Upper halves of fp32 numbers."""

    name = "bf16"

    def nbytes(self, n: int) -> int:
        return 2 * n

    def _write(self, values: np.ndarray, message: np.ndarray) -> None:
        bits = values.view(np.uint32)
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16  # may carry into the exponent, up to infinity
        quiet = (bits >> 16) | 0x40  # NaN, whose payload could carry, or be lost
        message.view(np.uint16)[:] = np.where(np.isnan(values), quiet, rounded)

    def decode(self, message: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        out = np.empty(message.size // 2, np.float32) if out is None else out
        bits = out.view(np.uint32)
        bits[:] = message.view(np.uint16)
        bits <<= 16
        return out


class Fp16(Rounding):
    """For each block 128 fp16 values and an int16 exponent."""

    name, unit = "fp16", BLOCK

    def nbytes(self, n: int) -> int:
        return 2 * (n // BLOCK) * (BLOCK + 1)

    def _write(self, values: np.ndarray, message: np.ndarray) -> None:
        rows, target = values.reshape(-1, BLOCK), message.view(np.uint16).reshape(-1, BLOCK + 1)
        largest = (rows.view(np.int32) & 0x7FFFFFFF).max(axis=1)  # bits, which order as magnitudes do; NaN above infinity
        exponents = np.maximum(((largest - 1) >> 23) - 126, LEAST)  # 2^15 too keeps its exponent, when it travels again
        target[:, BLOCK] = exponents.astype(np.int16).view(np.uint16)
        target[:, :BLOCK].view(np.float16)[:] = rows * np.ldexp(np.float32(1), LARGEST - exponents)[:, None]

    def decode(self, message: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        rows = message.view(np.uint16).reshape(-1, BLOCK + 1)
        scales = np.ldexp(np.float32(1), rows[:, BLOCK].view(np.int16).astype(np.int32) - LARGEST)
        out = np.empty(len(rows) * BLOCK, np.float32) if out is None else out
        with np.errstate(over="ignore"):  # what was rounded up to 2^128
            np.multiply(rows[:, :BLOCK].view(np.float16), scales[:, None], out=out.reshape(-1, BLOCK), dtype=np.float32)
        return out


WIRES: dict[str, Wire] = {wire.name: wire for wire in (Fp32(), Fp16(), Bf16())}
