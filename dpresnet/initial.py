"""Initial values of parameters and running statistics, a pure function of (seed, name)."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from dpresnet.state import Parameter, State
from dpresnet.update import SGD, Rule


def initial_state(state: State, seed: int, rule: Rule = SGD) -> dict[str, np.ndarray]:
    """Every array of a fresh run, keyed as in a checkpoint (param/, momentum/, buffer/ and what else the ``rule`` keeps)."""
    arrays = {}
    for p in state.parameters.values():
        value = initial_value(p, seed)
        for group, part in rule.of_parameters.items():
            arrays[f"{group}/{p.name}"] = value if part in ("value", "ema") else np.zeros(p.shape, np.float32)
    for buffer in state.buffers.values():
        start = 1.0 if buffer.name.endswith("running_var") else 0.0
        for group in rule.of_buffers:
            arrays[f"{group}/{buffer.name}"] = np.full(buffer.channels, start, np.float32)
    return arrays


def initial_value(parameter: Parameter, seed: int) -> np.ndarray:
    """Kaiming normal with fan out for convolutions (He et al. 2015, arXiv:1502.01852), uniform for the classifier."""
    if parameter.init in ("zeros", "ones"):
        return np.full(parameter.shape, float(parameter.init == "ones"), np.float32)
    name = int.from_bytes(hashlib.sha256(parameter.name.encode()).digest()[:8], "little")
    random = np.random.Generator(np.random.Philox(key=np.array([seed, name], np.uint64)))
    if parameter.init == "uniform":
        bound = 1 / math.sqrt(parameter.fan_in)
        return random.uniform(-bound, bound, parameter.shape).astype(np.float32)
    out_channels, _, height, width = parameter.shape
    deviation = math.sqrt(2 / (out_channels * height * width))
    return (deviation * random.standard_normal(parameter.shape)).astype(np.float32)
