"""Trains a network:  mpirun -n 4 python -m dpresnet.train [flags]     (or without mpirun, as a single process)

The order below matters. MPI says which ranks share a node; from that follow the threads of each; OpenCL reads them when
it is loaded, so everything that imports it is imported last.
"""

from __future__ import annotations

import sys

from dpresnet import environment, failure
from dpresnet.comm import Comm, connect
from dpresnet.commandline import parse
from dpresnet.config import Config


def run(cfg: Config, comm: Comm, stop: failure.StopFlag) -> None:
    """One run of a configuration on this rank."""
    environment.prepare_rank(comm, cfg.threads, cfg.bind)
    from dpresnet.session import Session
    from dpresnet.setup import describe

    session = Session(cfg, comm)
    if not cfg.dry_run:
        session.run(stop)
    elif comm.rank == 0:
        print(describe(session.trainer.model, session.trainer.buckets))


def main() -> None:
    """Parses the command line, joins the other ranks and trains; ends the process with the exit code of DESIGN."""
    argv = sys.argv[1:]

    def body(comm: Comm, stop: failure.StopFlag) -> None:
        if comm.rank == 0 or not {"-h", "--help"} & set(argv):  # help is printed once
            run(parse(argv), comm, stop)

    failure.main(lambda: connect(debug="--debug" in argv), body)


if __name__ == "__main__":
    main()
