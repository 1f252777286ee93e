"""The command line of training: a flag for every field of `dpresnet.config.Config`."""

import argparse
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from dpresnet import recipe
from dpresnet.config import EXPECTED, Config, flag_name, nearest, refuse, validate
from dpresnet.errors import Refused

RISE_OF_ONECYCLE = 0.3  # of the run


def parse(argv: Sequence[str]) -> Config:
    """The validated configuration of a command line (without the program's name).

    ``--help`` prints and exits with 0; anything that cannot be used raises `Refused` with one line.
    """
    flags, unknown = _parser().parse_known_args(list(argv))
    if unknown:
        _refuse_unknown(unknown[0])
    given = vars(flags)
    if given.get("recipe"):
        given = recipe.load(given["recipe"]) | given
    cfg = Config(**given)
    cfg = replace(cfg, **{name: value for name, value in _derived(cfg).items() if name not in given})
    for name in ("image", "channels"):
        if name in given and cfg.dataset != "synthetic":
            refuse(cfg, name, f"is for --dataset synthetic; {cfg.dataset!r} brings its own: leave the flag out")
    _check_meaning(cfg, given)
    validate(cfg)
    return cfg


def _check_meaning(cfg: Config, given: Mapping[str, Any]) -> None:
    """Refuses a flag that has no meaning beside the others."""
    for spec in fields(Config):
        other, values = spec.metadata.get("only", ("", ()))
        if spec.name in given and other and getattr(cfg, other) not in values:
            has = f"{flag_name(other)} {getattr(cfg, other)!r}"
            refuse(cfg, spec.name, f"has no meaning with {has}: leave it out, or use {flag_name(other)} {' or '.join(values)}")


def _derived(cfg: Config) -> dict[str, Any]:
    """Defaults that follow from other flags; those of `Config` are these for the default run."""
    warmup = RISE_OF_ONECYCLE * cfg.epochs if cfg.schedule == "onecycle" else min(Config.warmup_epochs, cfg.epochs / 2)
    adaptive = {"lr": 0.001, "weight_decay": 0.01} if cfg.optimizer == "adamw" else {}
    return {"warmup_epochs": warmup, "out": f"runs/{Path(cfg.dataset).stem}-{cfg.arch}", **adaptive}


class Parser(argparse.ArgumentParser):
    """A parser that refuses as all of ours does."""

    def error(self, message: str) -> NoReturn:
        """Ours is one line and exit code 78, where argparse prints the usage and exits with 2."""
        raise Refused(f"{message.removeprefix('argument ')} (--help explains every flag)")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        usage="python -m dpresnet.train [flags]     mpirun -n 4 python -m dpresnet.train [flags]",
        description="Train a residual network data-parallel on OpenCL devices, with MPI between the ranks.",
        epilog=f"Recipes: {', '.join(recipe.names())}. "
        "Exit codes: 0 done, 75 stopped on request (--resume auto goes on), 78 configuration or data refused, "
        "70 numerical give-up, 1 a bug.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
        argument_default=argparse.SUPPRESS,  # so that what was given can be told from what was not
        allow_abbrev=False,
    )
    add_flags(parser, fields(Config))
    return parser


def add_flags(parser: argparse.ArgumentParser, specs: Iterable[Field]) -> None:
    """Adds the flags of these fields of `Config`, in their groups."""
    for title, members in itertools.groupby(specs, key=lambda spec: spec.metadata["group"]):
        group = parser.add_argument_group(title)
        for spec in members:
            group.add_argument(flag_name(spec.name), help=_help(spec), **_argument(spec))


def _argument(spec: Field) -> dict[str, Any]:
    """How argparse reads one field: a switch, a number or a word."""
    if spec.type is bool:
        return {"action": argparse.BooleanOptionalAction}
    metavar = spec.metadata.get("metavar", {int: "N", float: "X", str: "NAME"}[spec.type])
    return {"type": functools.partial(_convert, spec.type), "metavar": metavar}


def _convert(kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {EXPECTED[kind]}") from None


def _help(spec: Field) -> str:
    choices = spec.metadata.get("choices")
    listed = f" [{', '.join(choices)}]" if choices else ""
    default = {"True": "on", "False": "off"}.get(str(spec.default), spec.default)
    return f"{spec.metadata['help']}{listed} (default: {spec.metadata.get('shown', default)})"


def _refuse_unknown(token: str) -> NoReturn:
    if not token.startswith("-"):
        raise Refused(f"unexpected argument {token!r}: every setting is a flag (--help lists them)")
    name = token.split("=")[0]
    known = [flag_name(spec.name) for spec in fields(Config)]
    known += [flag_name("no_" + spec.name) for spec in fields(Config) if spec.type is bool]
    raise Refused(f"unknown flag {name!r}{nearest(name, known)} (--help lists all flags)")
