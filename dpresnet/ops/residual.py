"""Residual addition: kernels/residual.cl appended to a plan."""

from dpresnet.plan import Plan, Tensor


def add(plan: Plan, name: str, a: Tensor, b: Tensor, y: Tensor) -> None:
    """y = a + b."""
    plan.elementwise(name, "residual_add", a.size, [a, b, y], [y])
