"""8-bit images into activations, with augmentation: kernels/augment.cl appended to a plan."""

import numpy as np

from dpresnet.device import BLOCK
from dpresnet.plan import Constant, Plan, Tensor


def normalise(plan: Plan, name: str, x: Tensor, views: Tensor, y: Tensor, control: Tensor, mean: np.ndarray,
              std: np.ndarray, **features: int) -> None:  # fmt: skip
    """y = (x [N, C, H, W] u8 / 255 - mean) / std as ``views``, `dpresnet.augment.VIEW` [N], say; images beyond control.valid
    are black. ``features`` are those of `dpresnet.augment.Augmentation`: views that only crop and flip need none.
    """
    affine = np.zeros((2, BLOCK))
    affine[:, : y.channels] = 1 / (255 * np.asarray(std, np.float64)), -np.asarray(mean, np.float64) / std
    args = [x, views, y, control, Constant(affine.astype(np.float32)), *(np.int32(v) for v in (*x.shape[2:], y.width))]
    general = any(features.values())
    verb, defines = ("transform", features) if general else ("normalise", {})
    plan.launch(name, f"augment_{verb}", (y.height, y.images), args, [y], CHANNELS=y.channels, **defines)
