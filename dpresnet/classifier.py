"""A trained network from a checkpoint, for images outside of any run.

    classifier = dpresnet.Classifier("runs/digits-resnet20")
    shares = classifier.probabilities(images)           # uint8 [N, C, H, W] -> float32 [N, classes]
    classifier.class_names[shares[0].argmax()]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpresnet import checkpoint
from dpresnet.comm import Solo
from dpresnet.config import from_json
from dpresnet.course import check_arrays, evaluation, in_order
from dpresnet.data import Batch, Dataset, Loader, Split
from dpresnet.device import Device, choose_device
from dpresnet.errors import Refused
from dpresnet.evaluation import Evaluation
from dpresnet.setup import build_model, build_trainer


@dataclass(frozen=True, eq=False)
class Samples:
    """What a network has to know of the data set that it was trained on: class names, (C, H, W), mean and std per channel."""

    name: str
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset) -> Samples:
        """Those of a data set."""
        return cls(dataset.name, dataset.class_names, tuple(dataset.shape), dataset.mean, dataset.std)

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint; `from_json` is the inverse, to the bit."""
        lists = {name: getattr(self, name).tolist() for name in ("mean", "std")}
        return {"name": self.name, "class_names": list(self.class_names), "shape": list(self.shape), **lists}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Samples:
        """As a checkpoint holds them."""
        arrays = {name: np.array(values[name], np.float32) for name in ("mean", "std")}
        return cls(values["name"], tuple(values["class_names"]), tuple(values["shape"]), **arrays)


class Classifier:
    """The network of a checkpoint in one process, ``batch`` images at a time (0: as many as a replica trained on).

    ``path`` is a file, or the folder of a run, of which the best epoch is taken: ``checkpoints/best.h5``.

    With ``ema`` the moving averages of the parameters answer, if the run kept any; ``averaged`` says whether they do. Raises
    Refused for a file that is no checkpoint, or one of a version that did not note its classes.
    """

    def __init__(self, path: str | Path, batch: int = 0, device: str = "auto", ema: bool = True):
        if batch < 0:
            raise Refused(f"batch {batch}: at least 1, or 0 for the one of training")
        path = Path(path)
        if path.is_dir():
            path = path / "checkpoints" / "best.h5"
        self.saved = saved = checkpoint.load(path)
        if "data" not in saved.meta:
            raise Refused(f"checkpoint {path} does not say what its classes are: resume the run for a step with this version")
        self.samples = Samples.from_json(saved.meta["data"])
        cfg = from_json(saved.meta["config"])
        self.cfg = cfg = replace(cfg, replicas=1, bn="sync", accumulate=1, batch=batch or cfg.batch, debug=False)
        self._model = build_model(Device(choose_device(device)), cfg, self.samples)
        self._trainer = build_trainer(cfg, self._model, Solo())
        check_arrays(self._trainer, saved, cfg)
        self._trainer.restore(saved.arrays)
        self.averaged = ema and self._model.rule.ema

    @property
    def class_names(self) -> tuple[str, ...]:
        """By class index; outputs beyond those of the data set have a number."""
        named = self.samples.class_names
        return (*named, *(f"class {k}" for k in range(len(named), self.cfg.num_classes)))

    def logits(self, images: np.ndarray) -> np.ndarray:
        """float32 [N, classes] of images uint8 [N, C, H, W] of the shape of training."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.samples.shape:
            wanted = ", ".join(map(str, self.samples.shape))
            raise ValueError(f"images are {images.dtype} {list(images.shape)}, not uint8 [N, {wanted}]")
        parts = [np.zeros((0, self.cfg.num_classes), np.float32)]
        for batch in self.batches(Split(images, np.zeros(len(images), np.int32))):
            self._trainer.evaluate(batch.shards, self.averaged)
            parts += [logits.copy() for logits in self._trainer.logits(batch.shards)]
        return np.concatenate(parts)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """The softmax of `logits`."""
        logits = self.logits(images).astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)

    def batches(self, split: Split) -> Loader:
        """The samples of a split, for `evaluate`."""
        return in_order(self._trainer, split, 1, self.cfg.batch)

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """How the network does on them."""
        return evaluation(self._trainer, batches, self.averaged)
