"""``python -m dpresnet.bench.torch_train RUN``: a recorded run once more, trained by PyTorch on the CPU.

It begins with the same parameters and sees the same samples in the same order, cropped and mirrored alike, at the same
learning rates; all of it in fp32, and batch norm over whole batches. What it leaves has the form of a run, so that
`dpresnet.report` draws both into one picture. Its images/s are those of its steps alone: the images are there before.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpresnet import environment
from dpresnet.augment import Augmentation
from dpresnet.config import Config, global_batch
from dpresnet.data import Dataset, Loader, Shard, load, order, steps_per_epoch
from dpresnet.errors import Refused, exit_code, require
from dpresnet.evaluation import Evaluation, Tests, answers, confusion_text, figures, joined, per_class
from dpresnet.reporter import Reporter
from dpresnet.schedule import last_step, lr_at, planned_steps
from dpresnet.verify import read_run


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = __doc__.split(": ", 1)[1]
    command = argparse.ArgumentParser(prog="python -m dpresnet.bench.torch_train", description=text, allow_abbrev=False)
    command.add_argument("run", type=Path, metavar="RUN", help="folder of the run to repeat (its --out)")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="(RUN-torch)")
    command.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: all cores")
    command.add_argument("--format", choices=("channels_last", "contiguous"), default="channels_last", dest="layout",
                         help="of activations in memory (channels_last)")  # fmt: skip
    return command


def check(cfg: Config) -> None:
    """Refuses runs whose mathematics are written down here for OpenCL alone."""
    views = cfg.resized_crop, cfg.jitter, cfg.erase, cfg.cutout, cfg.mixup, cfg.cutmix
    unknown = {
        "--optimizer lars": cfg.optimizer == "lars",
        f"--accumulate {cfg.accumulate}": cfg.accumulate > 1,
        f"--bn {cfg.bn}": cfg.bn != "sync" and cfg.replicas > 1,
        "views beyond crops and mirrors": cfg.augment and any(views),
    }
    for what, asked in unknown.items():
        if asked:
            raise Refused(f"the run has {what}, which is not repeated in PyTorch: train one without")


def cropped(shard: Shard, augmentation: Augmentation) -> np.ndarray:
    """The images of a shard as its views crop and mirror them: uint8 [n, C, height, width]."""
    views, border, (height, width) = shard.views, augmentation.border, augmentation.size
    columns = np.arange(width)
    columns = np.where(views["flip"][:, None], columns[::-1], columns) + views["crop_left"][:, None] + border
    rows = np.arange(height) + views["crop_top"][:, None] + border
    padded = np.pad(shard.images, ((0, 0), (0, 0), (border, border), (border, border)))
    n, channels = shard.images.shape[:2]
    sample, channel = np.arange(n)[:, None, None, None], np.arange(channels)[None, :, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


class Training:
    """The network with its optimizer; ``layout`` is "channels_last" or "contiguous"."""

    def __init__(self, cfg: Config, dataset: Dataset, layout: str):
        import torch
        from torch import nn

        from dpresnet.bench.torch_resnet import resnet

        self.torch, self.cfg = torch, cfg
        self.format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        net = resnet(cfg.arch, num_classes=cfg.num_classes, in_channels=dataset.shape[0], stem=cfg.stem, shortcut=cfg.shortcut,
                     block=cfg.block, zero_init_residual=cfg.zero_init_residual)  # fmt: skip
        self._begin(net, dataset)
        for module in net.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = True
        self.net = net.to(memory_format=self.format)
        self.optimizer = self._optimizer()
        self.criterion = nn.CrossEntropyLoss(label_smoothing=cfg.label_smoothing)
        self.mean, self.std = (torch.from_numpy(part.reshape(1, -1, 1, 1)) for part in (dataset.mean, dataset.std))

    def _begin(self, net: Any, dataset: Dataset) -> None:
        """The initial parameters of the run."""
        from dpresnet.device import Device, choose_device
        from dpresnet.initial import initial_state
        from dpresnet.setup import build_model

        model = build_model(Device(choose_device(self.cfg.device)), self.cfg, dataset)
        arrays = {name.partition("/")[2]: array for name, array in initial_state(model.state, self.cfg.seed).items()
                  if name.startswith(("param/", "buffer/"))}  # fmt: skip
        for name, value in net.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                value.copy_(self.torch.from_numpy(arrays[name]))

    def _optimizer(self) -> Any:
        cfg, optim = self.cfg, self.torch.optim
        exempt = [p for p in self.net.parameters() if cfg.decay == "weights" and p.ndim == 1]
        others = [p for p in self.net.parameters() if not any(p is other for other in exempt)]
        groups = [{"params": others}, {"params": exempt, "weight_decay": 0.0}]
        if cfg.optimizer == "adamw":
            return optim.AdamW(groups, cfg.lr, (cfg.beta1, cfg.beta2), cfg.eps, cfg.weight_decay)
        return optim.SGD(groups, cfg.lr, cfg.momentum, weight_decay=cfg.weight_decay, nesterov=cfg.nesterov)

    def _input(self, images: np.ndarray) -> Any:
        """Normalised, as the network takes them."""
        pixels = self.torch.from_numpy(images).to(self.torch.float32) / 255
        return ((pixels - self.mean) / self.std).contiguous(memory_format=self.format)

    def step(self, images: np.ndarray, labels: np.ndarray, lr: float) -> tuple[float, int]:
        """Trains on a batch: its mean loss, and how many samples were right before."""
        targets = self.torch.from_numpy(labels).long()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.net.train()
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.net(self._input(images))
        loss = self.criterion(logits, targets)
        loss.backward()
        if self.cfg.clip_norm:
            self.torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.cfg.clip_norm)
        self.optimizer.step()
        return float(loss), int((logits.argmax(1) == targets).sum())

    def evaluate(self, shards: Sequence[Shard], augmentation: Augmentation) -> Evaluation:
        """The network on all samples, with running statistics."""
        loss, parts = 0.0, []
        self.net.eval()
        with self.torch.inference_mode():
            for shard in shards:
                logits = self.net(self._input(cropped(shard, augmentation)))
                plain = self.torch.nn.functional.cross_entropy(logits, self.torch.from_numpy(shard.labels).long())
                loss += float(plain) * len(shard.labels)
                parts.append(answers(logits.numpy(), shard.labels))
        return Evaluation(self.cfg.num_classes, loss, joined(parts))

    def digest(self) -> str:
        """SHA-256 (hex) of the parameters."""
        return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in self.net.parameters())).hexdigest()


def train(cfg: Config, dataset: Dataset, training: Training, reporter: Reporter) -> tuple[Tests, int, float]:
    """All epochs; the last evaluation, the number of steps, and their images/s."""
    from dpresnet.setup import augmentation_of

    augmentation, size = augmentation_of(cfg, dataset.shape), global_batch(cfg)
    per_epoch = steps_per_epoch(len(dataset.train), size)
    total, last = planned_steps(cfg, per_epoch), last_step(cfg, per_epoch)
    whole = partial(Loader, replicas=1, batch=size, local=range(1))
    tests, step, samples, seconds, sums = {}, 0, 0, 0.0, np.zeros(3)
    reporter.started(last)
    while step < last:
        epoch = step // per_epoch
        draw = partial(augmentation.drawn, cfg.seed, epoch)
        for batch in whole(dataset.train, order(cfg.seed, epoch, len(dataset.train)), draw=draw):
            [shard], lr = batch.shards, lr_at(cfg, step, per_epoch, total)
            images, began = cropped(shard, augmentation), time.perf_counter()
            loss, correct = training.step(images, shard.labels, lr)
            took = time.perf_counter() - began
            step, samples, seconds = step + 1, samples + batch.count, seconds + took
            sums += (loss * batch.count, correct, batch.count)
            reporter.step(step, epoch, samples, loss, lr, 1.0, 0, correct / batch.count, batch.count / took)
            if step == last:
                break
        if step % per_epoch == 0 or step == last:
            loader = whole(dataset.test, np.arange(len(dataset.test)), draw=augmentation.centred)
            tests = {"": training.evaluate([batch.shards[0] for batch in loader], augmentation)}
        if step % per_epoch == 0:
            reporter.epoch(epoch, sums[0] / sums[2], sums[1] / sums[2], **figures(tests))
            sums[:] = 0
    return tests, step, samples / seconds


def run(args: argparse.Namespace) -> None:
    """Repeats the run."""
    require("torch", "PyTorch", "dpresnet.bench.torch_train", "bench")
    cfg, began = read_run(args.run).cfg, time.monotonic()
    check(cfg)
    cfg = replace(cfg, precision="fp32", ema=0.0, tensorboard=False)
    environment.prepare(args.threads, 0, 1)
    import torch

    torch.set_num_threads(args.threads or environment.usable_cores())
    dataset = load(cfg.dataset, cfg.seed, cfg.image, cfg.channels, cfg.num_classes)
    training = Training(cfg, dataset, args.layout)
    with Reporter(args.out or args.run.with_name(f"{args.run.name}-torch"), cfg) as reporter:
        tests, steps, speed = train(cfg, dataset, training, reporter)
        reporter.finished({
            "arch": cfg.arch, "dataset": dataset.name, "replicas": cfg.replicas, "ranks": 1, "precision": "fp32",
            "steps": steps, "epochs": steps / steps_per_epoch(len(dataset.train), global_batch(cfg)), **figures(tests),
            **per_class(tests), "images_per_s": speed, "wall_s": time.monotonic() - began,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "device": f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {args.layout}",
            "params_sha256": training.digest(),
        }, confusion_text(tests, dataset.class_names))  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 78 for what is no run or cannot be repeated."""
    return exit_code(lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
