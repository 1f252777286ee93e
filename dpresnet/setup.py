"""What happens before the first step of a run: filling in the configuration, finding the checkpoint, comparing the ranks,
recording the network.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO, TypeVar

import numpy as np

from dpresnet import checkpoint
from dpresnet.amp import LossScaler
from dpresnet.augment import Augmentation
from dpresnet.comm import Comm
from dpresnet.config import Config, statistics_group, validate
from dpresnet.data import Dataset
from dpresnet.device import Device
from dpresnet.errors import GaveUp, Refused
from dpresnet.model import PRIVATE, Model, Pixels
from dpresnet.resnet import Options, resolve_shortcut
from dpresnet.shared import Commons
from dpresnet.trainer import Trainer
from dpresnet.update import Rule

T = TypeVar("T")


def from_rank_0(comm: Comm, find: Callable[[], T]) -> T:
    """What ``find()`` returns on rank 0, on all ranks; if it refuses or gives up there, all ranks do so alike."""
    found, failed = None, None
    if comm.rank == 0:
        try:
            found = find()
        except (Refused, GaveUp) as error:
            failed = Refused(str(error)) if isinstance(error, Refused) else error
    found, failed = comm.bcast((found, failed))
    if failed:
        raise failed
    return found


@contextmanager
def in_turn(comm: Comm) -> Iterator[None]:
    """Within, the first rank of a node compiles every kernel into the shared cache; the others come when it is done, and find
    them there.

    If it refuses, the others get their turn all the same: they will refuse alike.
    """
    comm.events.what = "the first rank of the node to compile"
    if comm.local_rank:
        comm.node_barrier()
    try:
        yield
    finally:
        if not comm.local_rank:
            comm.node_barrier()


def resolve(cfg: Config, dataset: Dataset, ranks: int, saved: Config | None) -> Config:
    """Fills in what depends on the data set, the ranks and, when resuming, the saved run."""
    if saved and cfg.replicas == 0:
        cfg = replace(cfg, replicas=saved.replicas)
    cfg = replace(
        cfg,
        replicas=cfg.replicas or ranks,
        num_classes=cfg.num_classes or dataset.classes,
        shortcut=resolve_shortcut(cfg.arch, cfg.shortcut),
    )
    if cfg.replicas % ranks:
        divisors = [str(n) for n in range(1, cfg.replicas + 1) if cfg.replicas % n == 0]
        raise Refused(f"--replicas {cfg.replicas} cannot be divided among {ranks} ranks: use {', '.join(divisors)} ranks")
    if cfg.num_classes < dataset.classes:
        raise Refused(f"--num-classes {cfg.num_classes}: the data set {dataset.name} has {dataset.classes} classes")
    validate(cfg)
    augmentation_of(cfg, dataset.shape)
    return cfg


def augmentation_of(cfg: Config, stored: tuple[int, int, int]) -> Augmentation:
    """What the flags do to stored images of shape (C, H, W). Refused if they are smaller than --crop-size.

    With --flip auto, colour images are flipped; grey ones are mostly characters, which have no mirror images.
    """
    flip = stored[0] == 3 if cfg.flip == "auto" else cfg.flip == "on"
    size = (cfg.crop_size, cfg.crop_size) if cfg.crop_size else stored[1:]
    return Augmentation(stored, size, cfg.augment, cfg.crop_padding, cfg.resized_crop, flip, cfg.jitter, cfg.erase,
                        cfg.cutout, cfg.mixup, cfg.cutmix)  # fmt: skip


def find_checkpoint(cfg: Config) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The checkpoint that --resume asks for, and why newer ones were passed over."""
    if not cfg.resume:
        return None, []
    if cfg.resume != "auto":
        return checkpoint.load(cfg.resume), []
    found = checkpoint.newest(Path(cfg.out) / "checkpoints")
    return (found[0], [str(bad) for bad in found[1]]) if found else (None, [])


def check_dataset(saved: checkpoint.Checkpoint | None, dataset: Dataset, name: str) -> None:
    """Refuses a checkpoint of a run whose data set of that name held other samples."""
    if saved and saved.meta["fingerprint"] != dataset.fingerprint:
        raise Refused(f"checkpoint {saved.path}: that run used another version of the data set {name}")


def claim(out: Path) -> TextIO:
    """Takes the run folder for this run, until the returned file is closed or the process ends."""
    out.mkdir(parents=True, exist_ok=True)
    lock = (out / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Refused(f"--out {out}: another run is writing there: wait for it, or choose another folder") from None
    return lock


def put_aside(folder: Path) -> str:
    """Moves the checkpoints of an earlier run out of the way of a fresh one, replacing what was put aside before."""
    if not any(folder.glob("*.h5")):
        return ""
    aside = folder.with_name("checkpoints.previous")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return f"the checkpoints of the earlier run in this folder are now in {aside} (--resume auto would have gone on)"


def handshake(comm: Comm, facts: dict[str, object]) -> None:
    """Refuses to start unless all ranks hold the same facts; the message says who differs in what."""
    everyone = comm.gather((comm.host, facts))
    first = everyone[0][1]
    for rank, (host, theirs) in enumerate(everyone):
        for name, value in first.items():
            if theirs.get(name) != value:
                raise Refused(f"rank {rank} on {host} has {name} {theirs.get(name)!r}, rank 0 has {value!r}: "
                              "start all ranks with the same flags, data, version and kind of device")  # fmt: skip


def odd_ranks(found: list[tuple[bytes, str]]) -> str:
    """Says which ranks differ from most, given the fingerprint and host of each; "" if all are alike."""
    groups: dict[bytes, list[int]] = {}
    for rank, (fingerprint, _) in enumerate(found):
        groups.setdefault(fingerprint, []).append(rank)
    most, *others = sorted(groups.values(), key=len, reverse=True)
    if not others:
        return ""
    clear = len(most) > len(others[0])
    odd = sorted(rank for group in (others if clear else groups.values()) for rank in group)
    named = ", ".join(f"rank {rank} on {found[rank][1]}" for rank in odd)
    if clear:
        return f"{named} {'holds' if len(odd) == 1 else 'hold'} other parameters than the other {len(most)} ranks"
    return f"{named} hold different parameters, and no majority tells which are right"


def straggler(busy_s: list[float]) -> tuple[int, float]:
    """The rank that was busy longest, without waiting for others, and how many times as long as the median of the others."""
    slowest = int(np.argmax(busy_s))
    middle = float(np.median(np.delete(busy_s, slowest))) if len(busy_s) > 1 else 0.0
    return slowest, busy_s[slowest] / middle if middle > 0 else 1.0


def build_model(device: Device, cfg: Config, dataset: Dataset) -> Model:
    """The network of a resolved configuration, for the images of a data set."""
    augmentation = augmentation_of(cfg, dataset.shape)
    pixels, image = Pixels(dataset.mean, dataset.std, augmentation), (dataset.shape[0], *augmentation.size)
    options = Options(cfg.num_classes, cfg.stem, cfg.shortcut, cfg.block, cfg.zero_init_residual)
    rule = Rule(cfg.optimizer, cfg.decay, cfg.clip_norm > 0, cfg.ema > 0)
    return Model(device, cfg.arch, options, image, cfg.batch, cfg.precision, cfg.label_smoothing, pixels,
                 accumulate=cfg.accumulate > 1, rule=rule)  # fmt: skip


def build_trainer(cfg: Config, model: Model, comm: Comm, commons: Commons | None = None) -> Trainer:
    """This rank's replicas of a resolved configuration's network, before anything is in their arrays."""
    scaler = LossScaler() if cfg.precision == "fp16" else LossScaler.disabled()
    return Trainer(model, comm, cfg.replicas, group=statistics_group(cfg.bn, cfg.replicas), scaler=scaler,
                   first_bucket_mb=cfg.first_bucket_mb, bucket_mb=cfg.bucket_mb, reduce=cfg.reduce, wire=cfg.wire,
                   overlap=cfg.overlap, check=cfg.debug, commons=commons)  # fmt: skip


def check_memory(model: Model, replicas: int, ranks_on_device: int) -> None:
    """Refuses ``replicas`` replicas on each of the ranks of a device if they cannot fit, before anything is allocated."""
    private = sum(sum(model.bytes[home]) for home in PRIVATE)
    shared = sum(sum(chunks) for chunks in model.bytes.values()) - private
    needed, has = (private * replicas + shared) * ranks_on_device, model.device.cl.global_mem_size
    if needed > has:
        raise Refused(
            f"--batch {model.batch}: {replicas * ranks_on_device} replicas on one device need {needed / 2**30:.1f} GiB, "
            f"{model.device.name} has {has / 2**30:.1f} GiB: use a smaller --batch or --image, or fewer replicas per device"
        )


def describe(model: Model, buckets: list[slice]) -> str:
    """What --dry-run prints: every entry of the plan, the arenas, buckets, parameters and work."""
    lines = [str(model.train.plan), ""]
    for home, chunks in model.bytes.items():
        lines.append(f"arena {home:13s} {sum(chunks) / 2**20:10.2f} MiB")
    for number, bucket in enumerate(buckets):
        lines.append(f"bucket {number:<12d} {(bucket.stop - bucket.start) * 4 / 2**20:10.2f} MiB")
    lines.append(f"{model.parameter_count:,} parameters, {model.flops_per_image / 1e6:,.1f} MFLOP per image and training step, "
                 f"{len(model.train.plan.entries)} entries")  # fmt: skip
    return "\n".join(lines)
