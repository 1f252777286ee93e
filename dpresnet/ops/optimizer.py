"""The optimizers over the whole arenas of parameters, and what goes before and after them: kernels/optimizer.cl appended to a
plan.
"""

from dataclasses import dataclass

import numpy as np

from dpresnet.device import ALIGNMENT, BLOCK
from dpresnet.plan import Constant, Plan, Tensor

HYPER = np.dtype(  # the struct of kernels/optimizer.cl
    [(name, np.float32) for name in ("lr", "momentum", "weight_decay", "nesterov", "grad_factor", "beta1", "beta2", "fresh1",
                                     "fresh2", "correct1", "correct2", "eps", "share")]
)  # fmt: skip
RATE = np.dtype([(name, np.float32) for name in ("trust", "weight_decay")])  # the struct Rate of kernels/optimizer.cl

SLOT = ALIGNMENT // 4  # values: parameters begin at multiples of it
CHUNK = 4096  # values whose squares are added on the device


@dataclass(frozen=True)
class Table:
    """Where parameters are treated apart: ``owner`` int32 [slots of the arena] says to which parameter each SLOT values belong,
    ``rates`` RATE [parameters] what it gets.
    """

    owner: Constant
    rates: Tensor


def sgd(plan: Plan, name: str, param: Tensor, grad: Tensor, momentum: Tensor, hyper: Tensor,
        table: Table | None = None) -> None:  # fmt: skip
    """PyTorch's SGD rule on flat fp32 arenas of equal layout, in place."""
    _update(plan, name, "optimizer_sgd", [param, grad, momentum], hyper, table)


def lars(plan: Plan, name: str, param: Tensor, grad: Tensor, momentum: Tensor, hyper: Tensor, table: Table) -> None:
    """Momentum SGD with a learning rate for each parameter on flat fp32 arenas of equal layout, in place."""
    _update(plan, name, "optimizer_lars", [param, grad, momentum], hyper, table)


def adamw(plan: Plan, name: str, param: Tensor, grad: Tensor, momentum: Tensor, second_moment: Tensor, hyper: Tensor,
          table: Table | None = None) -> None:  # fmt: skip
    """AdamW on flat fp32 arenas of equal layout, in place; ``momentum`` is the first moment."""
    _update(plan, name, "optimizer_adamw", [param, grad, momentum, second_moment], hyper, table)


def _update(plan: Plan, name: str, kernel: str, arenas: list[Tensor], hyper: Tensor, table: Table | None) -> None:
    param, _, *moments = arenas
    more, defines = ([table.owner, table.rates], {"TABLE": 1, "SLOT": SLOT}) if table else ([], {})
    plan.elementwise(name, kernel, param.size, [*arenas, hyper, *more], [param, *moments], **defines)


def average(plan: Plan, name: str, average: Tensor, values: Tensor, hyper: Tensor) -> None:
    """average += hyper.share * (values - average), fp32."""
    plan.elementwise(name, "optimizer_average", values.size, [average, values, hyper], [average])


def squares(plan: Plan, name: str, values: Tensor, chunks: Constant, sums: Tensor) -> None:
    """sums [chunks] fp32 of the squares of the values in each range of ``chunks``, see `cut`."""
    plan.launch(name, "optimizer_squares", (len(chunks.data),), [values, chunks, sums], [sums])


def cut(begin: int, size: int) -> list[tuple[int, int]]:
    """Ranges of at most CHUNK values, in whole blocks, that cover ``size`` values from ``begin`` on."""
    end = begin + -(-size // BLOCK) * BLOCK
    return [(start, min(start + CHUNK, end)) for start in range(begin, end, CHUNK)]


def accumulate(plan: Plan, name: str, grad: Tensor, total: Tensor, fresh: bool) -> None:
    """total = total + grad, or grad if it is ``fresh``: the sum over the micro-batches so far, fp32."""
    plan.elementwise(name, "optimizer_accumulate", grad.size, [grad, total, np.int32(fresh)], [total])


def complete(plan: Plan, name: str, grad: Tensor, total: Tensor) -> None:
    """grad = total + grad: the gradient of the last micro-batch becomes that of all."""
    plan.elementwise(name, "optimizer_complete", grad.size, [grad, total], [grad])


def check(plan: Plan, name: str, grad: Tensor, found: Tensor) -> None:
    """found [work-items] int32: 1 where a range of the gradients holds an infinity or NaN."""
    plan.elementwise(name, "optimizer_check", grad.size, [grad, found], [found])


def check_items(plan: Plan, elements: int) -> int:
    """Work-items of `check`, the length of ``found``."""
    probe = Plan(plan.device, "fp32")
    probe.elementwise("", "optimizer_check", elements, [], [])
    return probe.entries[0].size[0]
