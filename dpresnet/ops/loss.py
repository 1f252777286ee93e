"""Softmax cross-entropy: kernels/loss.cl appended to a plan."""

import numpy as np

from dpresnet.plan import Plan, Tensor


def softmax(plan: Plan, name: str, logits: Tensor, labels: Tensor, loss: Tensor, correct: Tensor, dlogits: Tensor,
            control: Tensor, classes: int, smoothing: float, views: Tensor | None = None) -> None:  # fmt: skip
    """loss [N], correct [N] and dlogits [N, padded K] times control.grad_scale; images beyond control.valid give zeros.

    With ``views``, `dpresnet.augment.VIEW` [N], an image has its partner's label too, and its own for its share.
    """
    args = [logits, labels, loss, correct, dlogits, control]
    args += [np.int32(classes), np.int32(logits.shape[1]), np.float32(smoothing)]
    args, mixed = ([*args, views], {"MIXED": 1}) if views else (args, {})
    plan.launch(name, "loss_softmax", (logits.shape[0],), args, [loss, correct, dlogits], **mixed)
