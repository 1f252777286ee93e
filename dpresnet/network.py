"""A network in one process, for notebooks and tests: forward, loss, gradients and training steps on numpy arrays.

    net = dpresnet.Network("resnet50", num_classes=1000, image=(3, 224, 224), batch=8, precision="fp32")
    net.load_state_dict(weights)                        # names of the usual PyTorch implementation
    logits = net.forward(images)                        # float32 [N, C, H, W] -> float32 [N, classes]
    loss, gradients = net.loss_and_grads(images, labels)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from dpresnet.amp import LossScaler
from dpresnet.comm import Solo
from dpresnet.config import statistics_group
from dpresnet.device import Device, choose_device
from dpresnet.errors import Refused
from dpresnet.initial import initial_state
from dpresnet.model import Model
from dpresnet.optimizer import Hyper
from dpresnet.resnet import Options
from dpresnet.trainer import Trainer


class Network:
    """``arch`` for images of shape ``image`` = (channels, height, width), recorded for ``batch`` images at a time.

    ``options``: stem, shortcut, block, zero_init_residual. ``replicas`` > 1 splits each batch of training over that many
    emulated replicas of ``batch`` images each. ``loss_scale`` (a power of two) multiplies the loss in fp16 so that small
    gradients survive; results are unscaled.
    """

    def __init__(self, arch: str, *, num_classes: int = 1000, image: tuple[int, int, int] = (3, 224, 224), batch: int = 8,
                 precision: str = "fp16", device: str = "auto", seed: int = 0, replicas: int = 1, bn: str = "sync",
                 label_smoothing: float = 0.0, loss_scale: float = 1024.0, **options: object):  # fmt: skip
        if precision not in ("fp16", "fp32"):
            raise Refused(f"precision {precision!r}: choose fp16 or fp32")
        for name, value in {"batch": batch, "replicas": replicas, "image": min(image), "loss_scale": loss_scale}.items():
            if value < 1:
                raise Refused(f"{name} {value}: at least 1")
        if not 0 <= label_smoothing < 1:
            raise Refused(f"label_smoothing {label_smoothing}: at least 0 and less than 1")
        self.device = Device(choose_device(device))
        chosen = Options(num_classes=num_classes, **options)
        self.model = Model(self.device, arch, chosen, tuple(image), batch, precision, label_smoothing)
        scaler = LossScaler(scale=loss_scale) if precision == "fp16" else LossScaler.disabled()
        self.trainer = Trainer(self.model, Solo(), replicas, group=statistics_group(bn, replicas), scaler=scaler)
        self.batch, self.num_classes = batch, num_classes
        self.trainer.restore(initial_state(self.model.state, seed))

    # Weights by name

    def state_dict(self) -> dict[str, np.ndarray]:
        """Parameters and running statistics, fp32 copies, in the order of their declaration."""
        arrays = self.trainer.arrays()
        return {key.split("/", 1)[1]: value for key, value in arrays.items() if not key.startswith("momentum/")}

    def load_state_dict(self, arrays: Mapping[str, np.ndarray]) -> int:
        """Sets all parameters and running statistics; momentum starts at zero.

        Raises ValueError that lists everything missing, unexpected or of a wrong shape. ``num_batches_tracked`` entries have
        no counterpart; their number is returned.
        """
        counted = [name for name in arrays if name.endswith("num_batches_tracked")]
        given = {name: np.asarray(array) for name, array in arrays.items() if name not in counted}
        wanted = {name: array.shape for name, array in self.state_dict().items()}
        problems = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in given]
        problems += [f"unexpected: {name}" for name in given if name not in wanted]
        problems += [
            f"wrong shape: {name} is {list(given[name].shape)}, not {list(shape)}"
            for name, shape in wanted.items()
            if name in given and given[name].shape != shape
        ]
        if problems:
            raise ValueError("state_dict does not fit the network:\n  " + "\n  ".join(problems))
        groups = {f"{'param' if name in self.model.state.parameters else 'buffer'}/{name}": v for name, v in given.items()}
        momentum = {f"momentum/{p.name}": np.zeros(p.shape, np.float32) for p in self.model.parameters}
        self.trainer.restore(groups | momentum)
        return len(counted)

    # Computing

    def forward(self, images: np.ndarray, train: bool = False) -> np.ndarray:
        """float32 logits [N, classes] of images [N, C, H, W].

        With ``train``, N is at most batch * replicas; batch statistics are used, and enter the running statistics as in any
        training pass. Otherwise any N works, with running statistics.
        """
        images = self._images(images)
        if train:
            batches = self._split(images, np.zeros(len(images), np.int32))
            self._training_pass(batches, len(images))
            return self._logits(self.model.train, batches)
        size, parts = self.batch * len(self.trainer.replicas.all), []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            batches = self._split(part, np.zeros(len(part), np.int32))
            self.trainer.evaluate(batches)
            parts.append(self._logits(self.model.evaluate, batches))
        return np.concatenate(parts) if parts else np.zeros((0, self.num_classes), np.float32)

    def loss_and_grads(self, images: np.ndarray, labels: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        """Mean loss with batch statistics, and its gradient by parameter name.

        Parameters stay as they are; the batch statistics enter the running statistics, as in any training pass. In fp16 a
        pass that overflows at the loss scale gives infinities or NaN, and changes no running statistic.
        """
        images = self._images(images)
        batches = self._split(images, self._labels(labels, len(images)))
        self._training_pass(batches, len(images))
        loss = self._loss(batches) / len(images)
        scale = np.float32(1 / self.trainer.scaler.scale)
        return loss, {p.name: self.trainer.replicas.parameter(p.name, "grad") * scale for p in self.model.parameters}

    def train_step(self, images: np.ndarray, labels: np.ndarray, *, lr: float, momentum: float = 0.9,
                   weight_decay: float = 0.0, nesterov: bool = False) -> float:  # fmt: skip
        """One step of SGD on the batch; returns its mean loss before the step.

        A step whose gradients overflow in fp16 changes nothing but the loss scale, which halves
        (``net.trainer.scaler.skipped`` counts them).
        """
        images = self._images(images)
        batches = self._split(images, self._labels(labels, len(images)))
        outcome = self.trainer.step([batches], len(images), lr, Hyper(momentum, weight_decay, nesterov))
        return outcome.loss / outcome.count

    def _training_pass(self, batches: list[tuple], count: int) -> None:
        self.trainer.forward_backward([batches], count)
        self.trainer.sync_bn.commit()

    def _images(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images, np.float32)
        if images.ndim != 4 or images.shape[1:] != self.model.image:
            raise ValueError(f"images have shape {list(images.shape)}, not [N, {', '.join(map(str, self.model.image))}]")
        return images

    def _labels(self, labels: np.ndarray, count: int) -> np.ndarray:
        labels = np.asarray(labels)
        if labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}, not integers [{count}]")
        if count and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(f"labels are in {labels.min()}..{labels.max()}, the classes in 0..{self.num_classes - 1}")
        return labels.astype(np.int32)

    def _split(self, images: np.ndarray, labels: np.ndarray) -> list[tuple]:
        """The batch of each replica: contiguous, the last ones shorter or empty."""
        count, size = len(self.trainer.replicas.all), self.batch
        if not 0 < len(images) <= count * size:
            raise ValueError(f"{len(images)} images: 1 to {count * size} fit {count} replicas of batch {size}")
        cuts = [slice(v * size, (v + 1) * size) for v in range(count)]
        return [(images[cut], labels[cut], None) for cut in cuts]

    def _each(self, batches: list[tuple]) -> Iterator[tuple]:
        return zip(self.trainer.replicas.all, batches, strict=True)

    def _logits(self, recorded: object, batches: list[tuple]) -> np.ndarray:
        parts = [r.memory.read(recorded.logits)[: len(b[0]), : self.num_classes] for r, b in self._each(batches)]
        return np.concatenate(parts)

    def _loss(self, batches: list[tuple]) -> float:
        loss = self.model.train.loss
        return sum(float(r.memory.read(loss)[: len(b[0])].sum(dtype=np.float64)) for r, b in self._each(batches))
