"""Softmax cross-entropy: kernels/loss.cl appended to a plan."""

import numpy as np

from dpresnet.plan import Plan, Tensor


def softmax(plan: Plan, name: str, logits: Tensor, labels: Tensor, loss: Tensor, correct: Tensor, dlogits: Tensor,
            control: Tensor, classes: int, smoothing: float) -> None:  # fmt: skip
    """loss [N], correct [N] and dlogits [N, padded K] times control.grad_scale; images beyond control.valid give zeros."""
    args = [logits, labels, loss, correct, dlogits, control]
    args += [np.int32(classes), np.int32(logits.shape[1]), np.float32(smoothing)]
    plan.launch(name, "loss_softmax", (logits.shape[0],), args, [loss, correct, dlogits])
