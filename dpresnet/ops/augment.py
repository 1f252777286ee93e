"""8-bit images into activations, with augmentation: kernels/augment.cl appended to a plan."""

import numpy as np

from dpresnet.plan import Constant, Plan, Tensor


def normalise(plan: Plan, name: str, x: Tensor, samples: Tensor, y: Tensor, control: Tensor, mean: np.ndarray,
              std: np.ndarray, padding: int, flip: bool) -> None:  # fmt: skip
    """y = (crop and flip of x [N, C, H, W] u8 / 255 - mean) / std, as `reference.augment_apply` says."""
    moments = Constant(np.stack([mean, 1 / np.asarray(std, np.float64)]).astype(np.float32))
    args = [x, samples, y, control, moments, *(np.int32(v) for v in (y.channels, y.width, padding, flip))]
    plan.launch(name, "augment_normalise", (y.height, y.images), args, [y])
