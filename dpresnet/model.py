"""A network recorded for one device: its plans for training and evaluation, its state, and where everything lies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpresnet.augment import VIEW, Augmentation
from dpresnet.device import Device
from dpresnet.errors import Refused
from dpresnet.nn import Recorder
from dpresnet.ops import augment, cast, optimizer
from dpresnet.plan import Plan, Tensor, aligned, insert_ready, place_by_liveness, place_in_order
from dpresnet.resnet import Options, resnet
from dpresnet.state import FLOAT, Parameter, State
from dpresnet.update import SGD, TRAINED, Rule, Update

SHARED = (*TRAINED, "update")  # homes that the replicas of a process have in common
PRIVATE = ("work", "gradient", "accumulated", "statistic", "io")


@dataclass(frozen=True)
class Pixels:
    """How 8-bit images become activations: mean and std per channel in 0..1, and the augmentation of training."""

    mean: np.ndarray
    std: np.ndarray
    augmentation: Augmentation


@dataclass(frozen=True)
class Recorded:
    """One plan and the arrays through which the host feeds it and reads it.

    ``prepare`` runs before the first of several replays of the plan between which neither state nor the other plan changes.
    """

    plan: Plan
    prepare: Plan
    control: Tensor
    images: Tensor  # [N, C, H, W]: stored ones, u8, with ``views``, or fp32 without
    views: Tensor | None
    labels: Tensor
    logits: Tensor
    loss: Tensor
    correct: Tensor

    def host_tensors(self) -> list[Tensor]:
        """Every array of the host's side."""
        listed = [self.control, self.images, self.views, self.labels, self.logits, self.loss, self.correct]
        return [tensor for tensor in listed if tensor is not None]


class Model:
    """Everything about a network that does not change while it trains.

    ``image`` is (channels, height, width), ``batch`` the images per replica. ``pixels`` says how 8-bit images, which may be
    larger, are normalised; None means that fp32 images arrive as they are. With ``accumulate`` there is room for the sum of
    several micro-batches. ``rule`` says how parameters are updated.
    """

    def __init__(self, device: Device, arch: str, options: Options, image: tuple[int, int, int], batch: int,
                 precision: str, smoothing: float = 0.0, pixels: Pixels | None = None, accumulate: bool = False,
                 rule: Rule = SGD):  # fmt: skip
        self.device, self.arch, self.options, self.image = device, arch, options, image
        self.batch, self.precision, self.rule = batch, precision, rule
        self.state = State()
        self._smoothing, self.pixels = smoothing, pixels
        self.train, self.evaluate = self._record(train=True), self._record(train=False)
        self.gradients = [p.grad for p in reversed(self.parameters)]  # about the order in which backward finishes them
        self.bytes = self._place()
        self.update = Update(device, precision, self.parameters[::-1], self.bytes, rule)
        self.bytes["update"] = [self.update.nbytes]
        self.bytes["accumulated"] = self.bytes["gradient"] if accumulate else []
        self.accumulate = [self._record_accumulation(fresh) for fresh in (True, False)] if accumulate else []
        self.complete: list[Plan] = []  # by bucket

    @property
    def parameters(self) -> list[Parameter]:
        """In the order of declaration."""
        return list(self.state.parameters.values())

    @property
    def parameter_count(self) -> int:
        """Number of trained values."""
        return sum(parameter.size for parameter in self.parameters)

    @property
    def flops_per_image(self) -> int:
        """Multiplications and additions of one training step, forward and backward, per image."""
        return self.train.plan.flops // self.batch

    def set_buckets(self, buckets: list[range]) -> None:
        """Marks in the training plan where each bucket (a range of `gradients`) is complete."""
        insert_ready(self.train.plan, [[self.gradients[i] for i in bucket] for bucket in buckets])
        if self.accumulate:
            self.complete = [self._record_completion(self.gradient_slice(bucket)) for bucket in buckets]

    def gradient_slice(self, bucket: range) -> slice:
        """The elements of the gradient arena that a bucket covers."""
        first, last = self.gradients[bucket[0]], self.gradients[bucket[-1]]
        return slice(first.place[1] // 4, (last.place[1] + aligned(last.nbytes)) // 4)

    def _record(self, train: bool) -> Recorded:
        channels, height, width = self.image
        net = Recorder(self.state, self.device, self.precision, self.batch, train)
        x = net.input(channels, height, width)
        views, mixed = None, None
        if self.pixels is None:
            images = Tensor("images", (self.batch, *self.image), FLOAT, "io")
            cast.pack(net.plan, "input", images, x)
        else:
            if channels > 16:
                raise Refused(f"images of {channels} channels: at most 16 are supported")
            p, augmentation = self.pixels, self.pixels.augmentation
            images = Tensor("images", (self.batch, *augmentation.stored), np.dtype(np.uint8), "io")
            views = Tensor("views", (self.batch,), VIEW, "io")
            features = augmentation.features if train else {}
            augment.normalise(net.plan, "input", images, views, x, net.control, p.mean, p.std, **features)
            mixed = views if train and augmentation.mixes else None
        logits = resnet(net, x, self.arch, self.options)
        labels, loss, correct = net.loss(logits, self._smoothing if train else 0.0, mixed)
        if train:
            net.backward()
        prepare = Plan(self.device, self.precision) if train else net.prepare
        return Recorded(net.plan, prepare, net.control, images, views, labels, logits, loss, correct)

    def _record_accumulation(self, fresh: bool) -> Plan:
        """Adds the gradients of a micro-batch to those before, of which there are none if it is ``fresh``."""
        plan = Plan(self.device, self.precision)
        whole = slice(0, self.bytes["gradient"][0] // 4)
        optimizer.accumulate(plan, "accumulate", self._part("gradient", whole), self._part("accumulated", whole), fresh)
        return plan

    def _record_completion(self, part: slice) -> Plan:
        """Adds the micro-batches before to the last one's gradients of a bucket."""
        plan = Plan(self.device, self.precision)
        optimizer.complete(plan, "complete", self._part("gradient", part), self._part("accumulated", part))
        return plan

    def _part(self, home: str, part: slice) -> Tensor:
        return Tensor(home, (part.stop - part.start,), FLOAT, home, place=(0, 4 * part.start))

    def _place(self) -> dict[str, list[int]]:
        """Places every tensor; returns the bytes of the chunks of each home."""
        backwards, buffers = self.parameters[::-1], self.state.buffers.values()
        recorded = (self.train, self.evaluate)
        listed = [t for r in recorded for t in (*r.plan.tensors(), *r.host_tensors())]
        unique = list({id(t): t for t in listed}.values())
        limit = self.device.cl.max_mem_alloc_size
        work = [place_by_liveness(r.plan, limit, r.prepare) for r in recorded]
        longest = max(map(len, work))
        padded = [[*chunks, *[0] * (longest - len(chunks))] for chunks in work]
        kept = [[getattr(p, part) for p in backwards] for part in (*self.rule.of_parameters.values(), "grad")]
        kept += [[getattr(b, part) for b in buffers] for part in self.rule.of_buffers.values()]
        kept += [[t for t in unique if t.home == home] for home in ("statistic", "io")]
        placed = {tensors[0].home: [place_in_order(tensors)] for tensors in kept}
        return {home: [] for home in TRAINED} | placed | {"work": [max(pair) for pair in zip(*padded, strict=True)]}
