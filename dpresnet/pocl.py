"""What PoCL needs beyond OpenCL: its compiler may be older than the CPU that it compiles for.

The wheel that ``pip install pyopencl[pocl]`` brings is PoCL 3.0 with LLVM 14, of 2022. A CPU that came later is one of two
cases. LLVM takes it for an older one of its family, without AVX-512 (AMD Zen 4): `for_avx512`. Or LLVM has no name for it at
all and calls it "generic", which its own front end then refuses, so that nothing compiles (AMD Zen 5): `name_cpu`.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from itertools import pairwise

import pyopencl as cl

# Every function says what it is compiled for. The function from which PoCL calls a kernel does not, and would be given the
# code of the kernel: with a label whose address is taken a kernel stays a function of its own.
AVX512 = """#if defined(__AVX512F__) || !defined(__x86_64__)
#define APART
#else
#define AVX512
#define APART volatile ulong apart; apart: apart = (ulong)&&apart;
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq"))), apply_to = function)
#endif
SOURCE
#ifdef AVX512
#pragma clang attribute pop
#endif
"""

TRIPLE = b"x86_64-"  # how the name of the target begins
UNKNOWN = b"generic\0"  # what LLVM calls a CPU that it does not know
KNOWN = b"haswell\0"  # the first with AVX2, FMA and conversions of fp16; no longer than the name that it replaces
LARGEST_DEVICE = 8192  # bytes of PoCL's structure of a device that are searched


def is_pocl(device: cl.Device) -> bool:
    """Whether PoCL drives the device."""
    return "Portable Computing Language" in device.platform.name


def for_avx512(source: str) -> str:
    """A source whose kernels PoCL compiles for AVX-512, see `AVX512`."""
    return AVX512.replace("SOURCE", re.sub(r"\b__kernel\b[^{]*{", r"\g<0> APART", source))


def name_cpu(device: cl.Device) -> None:
    """Gives the compiler a name for a CPU that it has none for, if this is PoCL and it has AVX2 and FMA.

    PoCL finds the features of a CPU by asking the CPU and the name from a list, so that an unknown CPU has all its vectors
    and no name. PoCL has no option for it before version 5, which knows today's CPUs anyway: the name is written into its
    description of the device, where two neighbouring pointers lead to the target triple and to the name. Nothing is
    written unless both strings are there.
    """
    has_fma = device.single_fp_config & cl.device_fp_config.FMA
    if is_pocl(device) and device.native_vector_width_float >= 8 and has_fma:
        with suppress(OSError), open("/proc/self/mem", "r+b", buffering=0) as memory:  # fails where a pointer would crash
            if name := _unknown_name(memory.fileno(), device.int_ptr):
                os.pwrite(memory.fileno(), KNOWN, name)


def _unknown_name(memory: int, structure: int) -> int:
    """The address of the name in the structure of an x86 device, or 0 if that is another one or cannot be found."""
    words = [_read(memory, structure + at, 8) for at in range(0, LARGEST_DEVICE, 8)]
    pointers = [int.from_bytes(word, "little") for word in words if len(word) == 8]
    for triple, name in pairwise(pointers):
        if _read(memory, triple, len(TRIPLE)) == TRIPLE and _read(memory, name, len(UNKNOWN)) == UNKNOWN:
            return name
    return 0


def _read(memory: int, address: int, size: int) -> bytes:
    """Bytes of this process, or none where there is no memory."""
    try:
        return os.pread(memory, size, address)
    except (OSError, OverflowError):
        return b""
