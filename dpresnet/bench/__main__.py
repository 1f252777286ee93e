"""The command line of the measurements: table on the terminal, JSON with --json, picture with --png."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dpresnet import environment
from dpresnet.bench import facts, layers, memory, ops, picture, reduce, scaling, step
from dpresnet.bench.child import mpirun
from dpresnet.bench.flags import add_exchanges, add_link, add_ranks, add_workload, positive, workload
from dpresnet.bench.projection import RATES, TIMES, counts, quantity
from dpresnet.bench.workload import Facts, Workload
from dpresnet.comm import Comm, connect, launched
from dpresnet.errors import Refused, exit_code, require
from dpresnet.failure import Guard

WORDS = ("channels_last", "compile", "bf16")  # of which a variant of PyTorch is made


def parser() -> argparse.ArgumentParser:
    """Subcommands and their flags."""
    top = argparse.ArgumentParser(prog="python -m dpresnet.bench", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, batch, text in (
        ("step", 64, "whole training steps, interleaved with PyTorch's if asked"),
        ("layers", 64, "single convolutions, forward and backward, interleaved with PyTorch's if asked"),
        ("ops", 32, "every launch of a step against the peaks of the device"),
        ("memory", 64, "peak memory of a training process"),
        ("scaling", 32, "a job of several ranks against one rank, and against PyTorch's if asked; starts the ranks itself"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        add_workload(command, batch, threads=int(name == "scaling"))
        if name != "ops":
            command.add_argument("--against", choices=["torch"], help="compare with PyTorch on the CPU")
        if name in ("step", "memory", "scaling"):
            command.add_argument("--variants", type=variants, default=variants("contiguous,channels_last"), metavar="LIST",
                                 help="of PyTorch, the best one counts: contiguous, or words joined by + of "
                                 f"{', '.join(WORDS)} (contiguous,channels_last)")  # fmt: skip
        if name in ("step", "ops"):
            command.add_argument("--infer", action="store_true", help="the forward pass of evaluation, not a training step")
        command.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
        command.add_argument("--png", type=Path, metavar="FILE", help="draw it")
    steps, single, operations, held, job = (commands.choices[name] for name in ("step", "layers", "ops", "memory", "scaling"))
    for command, turn, what in ((steps, 2.0, "steps"), (single, 0.1, "calls"), (job, 2.0, "steps")):
        command.add_argument("--pairs", type=positive, default=7, help="turns of each side (7)")
        command.add_argument("--turn", type=float, default=turn, metavar="SECONDS", help=f"of {what} in a row ({turn})")
    operations.add_argument("--rounds", type=positive, default=7, help="times that each launch is measured (7)")
    held.add_argument("--steps", type=positive, default=3, help="that each process trains (3)")
    held.add_argument("--runs", type=positive, default=3, help="processes of each kind; the median counts (3)")
    add_ranks(job)
    add_jobs(commands)
    return top


def add_jobs(commands: argparse._SubParsersAction) -> None:
    """Those that an mpirun starts, on each rank."""
    text = "the sum of gradients over ranks: mpirun -n 2 python -m dpresnet.bench reduce"
    reducing = commands.add_parser("reduce", help=text, description=text)
    reducing.add_argument("--mb", type=float, default=45.0, metavar="MB", help="gradients of a rank, 10^6 bytes of fp32 (45)")
    reducing.add_argument("--bucket-mb", type=float, default=25.0, metavar="MB", help="of them in a bucket (25)")
    text = "what exchanges cost a step: mpirun -n 2 python -m dpresnet.bench exchanges"
    exchanging = commands.add_parser("exchanges", help=text, description=text)
    add_workload(exchanging, 32, threads=1)
    add_exchanges(exchanging)
    text = "the step on other numbers of nodes, by a model; started by mpirun: the model checked against the job's own step"
    projecting = commands.add_parser("project", help=text, description=text)
    add_workload(projecting, 32, threads=1)
    add_exchanges(projecting)
    add_link(projecting)
    for command in (exchanging, projecting):
        command.add_argument("--turn", type=float, default=1.0, metavar="SECONDS", help="of steps in a row (1)")
    for command in (reducing, exchanging, projecting):
        command.add_argument("--rounds", type=positive, default=9, help="in which everything compared takes turns (9)")
        command.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    projecting.add_argument("--png", type=Path, metavar="FILE", help="draw it")
    for command in (reducing, exchanging):
        command.set_defaults(png=None)


def variants(text: str) -> list[str]:
    """Names of variants of PyTorch, each once."""
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name != "contiguous" and not set(name.split("+")) <= set(WORDS):
            raise argparse.ArgumentTypeError(f"{name!r}: use contiguous, or words of {', '.join(WORDS)} joined by +")
    return names


def check(args: argparse.Namespace) -> None:
    """Refuses at once what would fail after minutes of measuring."""
    facts.check_folder(args.json, "--json")
    facts.check_folder(args.png, "--png")
    if args.png:
        picture.check()
    if getattr(args, "against", None):
        require("torch", "PyTorch", "--against torch", "bench",
                " (in a checkout: make .venv/installed-bench), or leave --against out to measure dpresnet alone")  # fmt: skip
    if args.command == "scaling":
        if (launch := launched()) and launch.size != 1:
            raise Refused(f"scaling starts its ranks itself: run it without {launch.name}, and say --ranks {launch.size or 2}")
        mpirun()


def measure(args: argparse.Namespace, work: Workload) -> tuple[Facts, str]:
    """What the subcommand found, and its table."""
    against = bool(getattr(args, "against", None))
    if args.command == "layers":
        results = layers.measure(work, against, args.pairs, args.turn)
        return results, layers.report(results, work)
    peers = args.variants if against else []
    if args.command == "step":
        results = step.measure(work, peers, args.pairs, args.turn)
        return results, step.report(results, work)
    if args.command == "scaling":
        options = {name: getattr(args, name) for name in ("bn", "wire", "bucket_mb", "first_bucket_mb")}
        results = scaling.measure(work, args.ranks, options, peers, args.pairs, args.turn)
        return results, scaling.report(results, work)
    if args.command == "memory":
        results = memory.measure(work, peers, args.steps, args.runs)
        return results, memory.report(results, work)
    environment.prepare(work.threads, 0, 1)
    results = ops.measure(work, args.rounds)
    return results, ops.report(results, work)


def run(argv: Sequence[str] | None) -> None:
    """Checks, measures, prints, writes."""
    args = parser().parse_args(argv)
    check(args)
    if args.command in ("reduce", "exchanges", "project"):
        run_in_job(args)
        return
    work = workload(args)
    found = facts.gather(args) | {"workload": vars(work)}
    print(facts.heading(found), flush=True)
    results, text = measure(args, work)
    print(text)
    found["versions"]["driver"] = results["device"]
    found |= {"results": results}
    if args.json:
        facts.write_json(args.json, found)
    if args.png:
        picture.draw(args.command, found, work, args.png)


def run_in_job(args: argparse.Namespace) -> None:
    """On each rank; rank 0 prints and writes."""
    with Guard() as job:
        job.comm = comm = connect()
        found = facts.gather(args)  # before this rank is bound to some cores
        results, text = measure_in_job(args, comm)
        if comm.rank == 0:
            print(facts.heading(found), text, sep="\n")
            found |= {"results": results}
            if args.json:
                facts.write_json(args.json, found)
            if args.png and "rows" in results:
                picture.draw(args.command, found, workload(args), args.png)


def measure_in_job(args: argparse.Namespace, comm: Comm) -> tuple[Facts, str]:
    """What the subcommand found, and its table."""
    if args.command == "reduce":
        results = reduce.measure(comm, args.mb, args.bucket_mb, args.rounds)
        return results, reduce.report(results)
    work = workload(args)
    environment.prepare_rank(comm, work.threads)
    from dpresnet.bench import exchanges, project  # they load OpenCL

    buckets = {name: getattr(args, name) for name in ("bucket_mb", "first_bucket_mb")}
    if args.command == "project":
        link = quantity(args.latency, TIMES, "--latency"), quantity(args.link, RATES, "--link")
        layout = project.layout_of(comm, args.ranks_per_node, args.bn, args.wire)
        results = project.measure(comm, work, layout, link, counts(args.nodes), args.rounds, args.turn, args.wire, **buckets)
        return results, project.report(results, work)
    results = exchanges.measure(comm, work, args.bn, args.rounds, args.turn, **buckets)
    return results, exchanges.report(results, work)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or that of what was refused, with one line on stderr."""
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
