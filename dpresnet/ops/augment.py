"""8-bit images into activations, with augmentation: kernels/augment.cl appended to a plan."""

import numpy as np

from dpresnet.device import BLOCK
from dpresnet.plan import Constant, Plan, Tensor


def normalise(plan: Plan, name: str, x: Tensor, samples: Tensor, y: Tensor, control: Tensor, mean: np.ndarray,
              std: np.ndarray, padding: int, flip: bool) -> None:  # fmt: skip
    """y = (crop and flip of x [N, C, H, W] u8 / 255 - mean) / std, as `reference.augment_apply` says."""
    affine = np.zeros((2, BLOCK))
    affine[:, : y.channels] = 1 / (255 * np.asarray(std, np.float64)), -np.asarray(mean, np.float64) / std
    args = [x, samples, y, control, Constant(affine.astype(np.float32)), *(np.int32(v) for v in (y.width, padding, flip))]
    plan.launch(name, "augment_normalise", (y.height, y.images), args, [y], CHANNELS=y.channels)
