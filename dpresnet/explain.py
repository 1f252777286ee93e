"""``python -m dpresnet.explain RUN``: where each rank of a run stood when it ended, and which one the others waited for.

Reads what the ranks have noted about their communication, see `dpresnet.events`: also a rank that was killed has left it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from dpresnet.errors import Refused, exit_code
from dpresnet.events import BLOCKING, FAREWELL, GAVE_UP, Event, Rank, describe, missing, read, under_way


def explain(ranks: list[Rank]) -> str:
    """Where each rank stood at the last sign of life of any of them, and the conclusion."""
    now = max((max(event.began, event.ended) for rank in ranks for event in rank.events), default=0.0)
    return "\n".join([*(describe(rank, now) for rank in ranks), "", *conclusions(ranks)])


def conclusions(ranks: list[Rank]) -> Iterator[str]:
    """Sentences: who is missing, who did something else, or that nobody waited."""
    size = ranks[0].size
    if absent := sorted(set(range(size)) - {rank.rank for rank in ranks}):
        yield f"of {size} ranks, {', '.join(f'rank {n}' for n in absent)} has left nothing: was it ever started?"
    if strays := first_disagreement(ranks):
        yield from strays
        return
    pending = [event for rank in ranks for event in under_way(rank.events)]
    waiting = sorted(pending, key=lambda event: (event.channel not in BLOCKING, event.began))
    for event in waiting:
        if culprits := missing(ranks, event):
            yield f"{' and '.join(map(str, culprits))} never came to {event}; the others waited there"
            return
    if waiting:
        yield f"every rank has come to {waiting[0]}, and it did not end: the network, or the MPI library"
    else:
        yield "no rank was waiting for another"


def first_disagreement(ranks: list[Rank]) -> list[str]:
    """All ranks do the same thing as operation n of a channel; the first one where they do not, if any."""
    by_number: dict[tuple[str, int], list[tuple[Rank, Event]]] = {}
    for rank in ranks:
        for event in (event for event in rank.events if event.channel not in (FAREWELL, GAVE_UP)):
            by_number.setdefault((event.channel, event.number), []).append((rank, event))
    for _, found in sorted(by_number.items(), key=lambda item: min(event.began for _, event in item[1])):
        kinds = Counter((event.what, event.step) for _, event in found)
        if len(kinds) > 1:
            (usual, most), (_, second), *_ = kinds.most_common()
            if most == second:
                stood = ", ".join(f"{rank} was at {event}" for rank, event in found)
                return [f"{stood}: one skipped an exchange, or made one too many, and no majority tells which"]
            odd = [(rank, event) for rank, event in found if (event.what, event.step) != usual]
            others = next(event for _, event in found if (event.what, event.step) == usual)
            return [f"{rank} was at {event}, where the others were at {others}: it skipped an exchange, or made one too many"
                    for rank, event in odd]  # fmt: skip
    return []


def run(folder: Path) -> None:
    """Prints the explanation. Refused if there is nothing to explain."""
    ranks = read(folder / "events")
    if not ranks:
        raise Refused(f"{folder} holds no events: it is not the folder of a run, or of a run of one process")
    print(explain(ranks))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="python -m dpresnet.explain", description=__doc__.split("\n\n")[0].split(": ", 1)[1])
    command.add_argument("run", type=Path, metavar="RUN", help="folder of the run (its --out)")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 78 if the folder holds no events."""
    return exit_code(lambda: run(parser().parse_args(argv).run))


if __name__ == "__main__":
    sys.exit(main())
