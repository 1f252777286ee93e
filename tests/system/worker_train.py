"""``python worker_train.py FLAGS``: dpresnet.train with one fault, described in the variable FAULT.

FAULT="kind=exception,rank=1,step=3". The product knows nothing of this: public seams are wrapped here. Single processes
count as the rank that would own the replica: give replica= instead of rank= to strike wherever it lives.
"""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np

from dpresnet import trace, train

FAULT = dict(part.split("=") for part in os.environ.get("FAULT", "kind=none").split(","))
KIND, STEP = FAULT["kind"], int(FAULT.get("step", 0))


def struck(trainer) -> bool:
    """Whether this rank is the one."""
    if "replica" in FAULT:
        return int(FAULT["replica"]) in trainer.replicas_range
    return trainer.comm.rank == int(FAULT.get("rank", 0))


def before_step(trainer) -> None:
    if KIND == "exception":
        raise KeyError("what went wrong")
    if KIND == "kill":
        time.sleep(float(FAULT.get("after", 0)))
        os.kill(os.getpid(), signal.SIGKILL)
    if KIND == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if KIND in ("bad-weight", "flip"):
        trainer.replicas.pull_state()  # the update of the step before may still run
    if KIND == "bad-weight":
        trainer.replicas.parameter("layer2.0.conv2.weight")[0, 0, 0, 0] = float("nan")
        trainer.replicas.push_state()
    if KIND == "flip":  # one bit of the mantissa of one weight
        trainer.replicas.parameter("layer2.0.conv2.weight").reshape(-1).view(np.uint32)[7] ^= 1 << 12
        trainer.replicas.push_state()
    if KIND == "cores":
        print("cores", trainer.comm.mpi_library, *sorted(os.sched_getaffinity(0)))
    if KIND == "sleep":
        time.sleep(1e6)


def wrap_step(trainer_class) -> None:
    original = trainer_class.step
    calls = [0]

    def step(self, *args, **kwargs):
        calls[0] += 1
        self.faulty_step = calls[0] == STEP and struck(self)
        if KIND == "slow" and struck(self):
            time.sleep(float(FAULT["seconds"]))
        if self.faulty_step:
            before_step(self)
        return original(self, *args, **kwargs)

    trainer_class.step = step


def wrap_buckets(trainer_class) -> None:
    """Writes an infinity into the gradients of one replica, where a backward pass would overflow."""
    original = trainer_class._start_bucket

    def start(self, bucket):
        if KIND == "overflow" and self.faulty_step:
            owner = next(r for r in self.replicas.all if r.number == int(FAULT["replica"]))
            owner.memory.homes["gradient"][0].view(0, (8,), "float32")[5] = float("inf")
        return original(self, bucket)

    trainer_class._start_bucket = start


def wrap_exchange(exchange_class, trainer_class) -> None:
    """Lets a rank leave out the first exchange of statistics of the step."""
    original, agree = exchange_class.combine_groups, trainer_class._agree

    def combine_groups(self, rows, combine):
        if KIND == "skip" and self.skips_one:
            self.skips_one = False
            return list(rows[: len(self.members)])
        return original(self, rows, combine)

    def _agree(self, entry, event):
        if self.faulty_step and not self.skipped:
            self.skipped = self.sync_bn._over_groups.skips_one = True
        if self.faulty_step and KIND == "sleep-in-backward" and entry.name == "layer1.1.bn1" and entry.kind == "sums":
            time.sleep(1e6)
        agree(self, entry, event)

    exchange_class.skips_one, trainer_class.skipped = False, False
    exchange_class.combine_groups, trainer_class._agree = combine_groups, _agree


def wrap_requests(request_class, trainer_class) -> None:
    """From a step on no message arrives, on any rank."""
    original, test = trainer_class.step, request_class.test

    def step(self, *args, **kwargs):
        request_class.cut = request_class.cut or self.comm.events.step == STEP
        return original(self, *args, **kwargs)

    request_class.cut = False
    trainer_class.step, request_class.test = step, lambda self: not self.cut and test(self)


def wrap_node_barrier(comm) -> None:
    """Writes down what the kernel cache holds when the first rank of the node lets the others build."""
    original = comm.node_barrier

    def barrier():
        if comm.local_rank == 0:
            compiled = Path(os.environ["POCL_CACHE_DIR"]).rglob("*.so")
            Path(FAULT["file"]).write_text(json.dumps({str(path): path.stat().st_mtime_ns for path in compiled}))
        original()

    comm.node_barrier = barrier


def wrap_loader(loader_class) -> None:
    original = loader_class.at

    def at(self, step):
        if KIND == "loader" and step == STEP and self.local.start == int(FAULT["replica"]):
            raise OSError("the disk fell off")
        return original(self, step)

    loader_class.at = at


def run(cfg, comm, stop, original=train.run):
    """Wraps what the run imports only after the threads are set."""
    from dpresnet import environment

    environment.prepare(cfg.threads, comm.local_rank, comm.local_size)
    from dpresnet.comm import Request
    from dpresnet.data import Loader
    from dpresnet.exchange import TreeExchange
    from dpresnet.trainer import Trainer

    wrap_step(Trainer)
    wrap_buckets(Trainer)
    wrap_loader(Loader)
    wrap_exchange(TreeExchange, Trainer)
    if KIND == "cut":
        wrap_requests(Request, Trainer)
    if KIND == "list-cache":
        wrap_node_barrier(comm)
    if KIND == "clock" and comm.rank == int(FAULT["rank"]):
        right = trace.clock
        trace.clock = lambda: right() + float(FAULT["seconds"])
    original(cfg, comm, stop)


if __name__ == "__main__":
    train.run = run
    train.main()
