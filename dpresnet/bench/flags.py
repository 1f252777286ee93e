"""The flags that describe a `Workload`, for every program that measures one."""

from __future__ import annotations

import argparse

from dpresnet import environment
from dpresnet.bench.workload import Workload
from dpresnet.config import CIFAR_ARCHS, IMAGENET_ARCHS, PLAIN_ARCHS

SMALL = 64  # pixels; smaller images get the CIFAR stem


def add_workload(command: argparse.ArgumentParser, batch: int) -> None:
    """The flags of `Workload`."""
    command.add_argument("--arch", default="resnet18", choices=IMAGENET_ARCHS + CIFAR_ARCHS + PLAIN_ARCHS, metavar="ARCH")
    command.add_argument("--stem", choices=["imagenet", "cifar", "deep"], help=f"cifar below {SMALL} pixels, else imagenet")
    command.add_argument("--image", type=positive, default=32, help="height and width in pixels (32)")
    command.add_argument("--batch", type=positive, default=batch, help=f"images per step ({batch})")
    command.add_argument("--classes", type=positive, default=10, help="(10)")
    command.add_argument("--precision", default="fp32", choices=["fp16", "fp32"], help="of dpresnet (fp32); PyTorch has fp32")
    command.add_argument("--device", default="auto", help="OpenCL device of dpresnet: index or part of its name")
    command.add_argument("--threads", type=int, default=0, help="CPU threads of either side; 0: all cores")
    command.add_argument("--vector", type=int, default=0, help="lanes of dpresnet's vectors, 8 for AVX2; 0: all there are")


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
        threads=args.threads or environment.default_threads(1),
        vector=args.vector,
        infer=getattr(args, "infer", False),
    )
