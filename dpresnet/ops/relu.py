"""Rectified linear unit: kernels/relu.cl appended to a plan."""

from dpresnet.plan import Plan, Tensor


def forward(plan: Plan, name: str, x: Tensor, y: Tensor) -> None:
    """y = max(x, 0)."""
    plan.elementwise(name, "relu_forward", x.size, [x, y], [y])


def backward(plan: Plan, name: str, dy: Tensor, y: Tensor, dx: Tensor) -> None:
    """dx = dy where y is positive."""
    plan.elementwise(name, "relu_backward", y.size, [dy, y, dx], [dx])
