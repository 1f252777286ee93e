"""The flags that describe a `Workload`, for every program that measures one."""

from __future__ import annotations

import argparse

from dpresnet import environment
from dpresnet.bench.workload import Workload
from dpresnet.config import CIFAR_ARCHS, IMAGENET_ARCHS, PLAIN_ARCHS, Config
from dpresnet.wire import WIRES

SMALL = 64  # pixels; smaller images get the CIFAR stem


def add_workload(command: argparse.ArgumentParser, batch: int, threads: int = 0) -> None:
    """The flags of `Workload`."""
    command.add_argument("--arch", default="resnet18", choices=IMAGENET_ARCHS + CIFAR_ARCHS + PLAIN_ARCHS, metavar="ARCH")
    command.add_argument("--stem", choices=["imagenet", "cifar", "deep"], help=f"cifar below {SMALL} pixels, else imagenet")
    command.add_argument("--image", type=positive, default=32, help="height and width in pixels (32)")
    command.add_argument("--batch", type=positive, default=batch, help=f"images per step of a process ({batch})")
    command.add_argument("--classes", type=positive, default=10, help="(10)")
    command.add_argument("--precision", default="fp32", choices=["fp16", "fp32"], help="of dpresnet (fp32); PyTorch has fp32")
    command.add_argument("--device", default="auto", help="OpenCL device of dpresnet: index or part of its name")
    command.add_argument("--threads", type=int, default=threads,
                         help=f"CPU threads of a process; 0: its share of the cores ({threads})")  # fmt: skip
    command.add_argument("--vector", type=int, default=0, help="lanes of dpresnet's vectors, 8 for AVX2; 0: all there are")


def add_ranks(command: argparse.ArgumentParser) -> None:
    """The flags of a job: how many ranks, and how they work together, as in `dpresnet.train`."""
    command.add_argument("--ranks", type=several, default=2, help="of the job, and processes of what it is compared with (2)")
    add_wire(command)
    add_exchanges(command)


def add_wire(command: argparse.ArgumentParser) -> None:
    """The format of gradients on their way."""
    command.add_argument("--wire", default=Config.wire, choices=list(WIRES), help=f"how gradients travel ({Config.wire})")


def add_link(command: argparse.ArgumentParser) -> None:
    """The flags of machines that are not here."""
    command.add_argument("--nodes", default="1..1024", help="from..to in powers of two, or numbers joined by commas (1..1024)")
    command.add_argument("--ranks-per-node", type=positive, default=1, metavar="N", help="(1)")
    command.add_argument("--link", default="100Gbit", metavar="RATE", help="between nodes, in each direction (100Gbit)")
    command.add_argument("--latency", default="2us", metavar="TIME", help="of a message between nodes (2us)")
    add_wire(command)


def add_exchanges(command: argparse.ArgumentParser) -> None:
    """The flags of what ranks have to do with each other, as in `dpresnet.train`."""
    command.add_argument("--bn", default="sync", choices=["sync", "local"], help="statistics of all ranks, or of each (sync)")
    for flag, size in (("--bucket-mb", Config.bucket_mb), ("--first-bucket-mb", Config.first_bucket_mb)):
        command.add_argument(flag, type=above_0, default=size, metavar="MIB", help=f"gradients reduced at once ({size:g})")


def several(text: str) -> int:
    """A whole number above 1."""
    if (number := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"{number}: at least 2")
    return number


def above_0(text: str) -> float:
    """A number above 0."""
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{number}: above 0")
    return number


def positive(text: str) -> int:
    """A whole number above 0."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}: at least 1")
    return number


def workload(args: argparse.Namespace) -> Workload:
    """What the flags describe, with the defaults that depend on others or on the machine filled in."""
    return Workload(
        arch=args.arch,
        stem=args.stem or ("cifar" if args.image < SMALL else "imagenet"),
        image=args.image,
        batch=args.batch,
        classes=args.classes,
        precision=args.precision,
        device=args.device,
        threads=args.threads or environment.default_threads(getattr(args, "ranks", 1)),
        vector=args.vector,
        infer=getattr(args, "infer", False),
    )
