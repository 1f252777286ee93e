"""What a run writes while it runs: config.json, metrics.jsonl, confusion.json, result.json, and a display on standard error.

metrics.jsonl holds one JSON object per line, flushed as it is written; a number that is not finite is null.

    a step    step, epoch, samples, loss, lr, loss_scale, skipped, images_per_s, input_ms
              with --clip-norm also grad_norm, that of the gradient before it was limited, null in a step that was skipped
    an epoch  step, epoch, samples, train_loss, train_accuracy, test_loss, test_accuracy, with more than five classes
              test_top5, with --ema the last three also as ema_test_...

`step` and `samples` count what is done including this line's, `epoch` counts from 0 (the display from 1), `loss` is
per sample and unscaled, `skipped` counts the steps dropped so far, accuracies are fractions of 1, `input_ms` are the
milliseconds that the step waited for its images. An epoch's line follows its last step's, and comes before the
checkpoint of that step; then resuming leaves no line out and none twice.
"""

import functools
import json
import math
import os
import stat
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from dpresnet.config import Config, to_json
from dpresnet.errors import Refused, require

RESULT_KEYS = (
    "arch", "dataset", "replicas", "ranks", "precision", "steps", "epochs", "test_accuracy", "test_loss",
    "images_per_s", "wall_s", "peak_rss_mb", "device", "params_sha256",
)
SECONDS_BETWEEN_LINES = 30.0


def _if_enabled(method: Callable) -> Callable:
    @functools.wraps(method)
    def guarded(self: "Reporter", *args: Any, **kwargs: Any) -> None:
        if self.enabled:
            method(self, *args, **kwargs)

    return guarded


class Reporter:
    """Writes the run folder and the display; on the ranks that do not (`enabled=False`) every method does nothing.

    Usable as a context manager, which closes it. A terminal that goes away ends the display, never the run.
    """

    def __init__(self, out: Path, cfg: Config, *, ranks: int = 1, enabled: bool = True,
                 stderr: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`cfg` is the resolved configuration; `stderr` and `clock` are replaced by tests."""
        self.enabled = enabled
        self._out, self._cfg, self._ranks = Path(out), cfg, ranks
        self._stderr, self._clock = stderr or sys.stderr, clock
        self._metrics: TextIO | None = None
        self._curves: Any = None  # a writer of TensorBoard's event files
        self._display: _Bar | _Lines | None = None
        self._position = {"step": 0, "epoch": 0, "samples": 0}

    @_if_enabled
    def started(self, total_steps: int, step: int = 0, samples: int = 0) -> None:
        """Open the files of a run of `total_steps` that stands at `step` and `samples`, 0 unless it is resumed.

        What an earlier run wrote beyond that point goes away. Raises `Refused` if the folder cannot be written.
        """
        try:
            self._open_files(samples)
        except OSError as error:
            raise Refused(f"--out {str(self._out)!r} cannot be written ({error.strerror}): choose another") from error
        self._position |= {"step": step, "samples": samples}
        self._curves = _event_writer(self._out, step) if self._cfg.tensorboard else None
        self._display = self._open_display(total_steps, step)
        self.note(self._headline(total_steps, step))

    @_if_enabled
    def step(self, step: int, epoch: int, samples: int, loss: float, lr: float, loss_scale: float, skipped: int,
             accuracy: float, images_per_s: float, **more: Any) -> None:
        """One training step is done; `loss` and `accuracy` are those of its global batch, ``more`` goes into its line."""
        self._position = {"step": step, "epoch": epoch, "samples": samples}
        self._append({"loss": loss, "lr": lr, "loss_scale": loss_scale, "skipped": skipped,
                      "images_per_s": images_per_s, **more})
        status = (f"{images_per_s:.0f} images/s loss {loss:.3f} acc {_percent(accuracy)} "
                  f"scale 2^{math.log2(loss_scale):.0f}")  # short enough for 80 columns
        with suppress(OSError):
            self._display.step(step, self._epoch_name(epoch), status)

    @_if_enabled
    def epoch(self, epoch: int, train_loss: float, train_accuracy: float, test_loss: float | None = None,
              test_accuracy: float | None = None, **more: float) -> None:
        """An epoch is done, up to the last step reported; the test figures are None if it was not evaluated, ``more`` of them
        go into its line.
        """
        self._position["epoch"] = epoch
        self._append({"train_loss": train_loss, "train_accuracy": train_accuracy,
                      "test_loss": test_loss, "test_accuracy": test_accuracy, **more})
        tested = "" if test_loss is None else f", test loss {test_loss:.4f} accuracy {_percent(test_accuracy)}"
        if "ema_test_accuracy" in more:
            tested += f", of the average {_percent(more['ema_test_accuracy'])}"
        self.note(f"{self._epoch_name(epoch)}: step {self._position['step']}, train loss {train_loss:.4f} "
                  f"accuracy {_percent(train_accuracy)}{tested}")

    @_if_enabled
    def note(self, text: str) -> None:
        """A line for the reader, above the progress bar: a step skipped, a checkpoint refused."""
        with suppress(OSError):
            if self._display:
                self._display.note(text)
            else:
                print(text, file=self._stderr, flush=True)

    @_if_enabled
    def finished(self, result: Mapping[str, Any], confusion: str = "") -> None:
        """The run is done: write result.json, which must hold at least `RESULT_KEYS`, and before it confusion.json."""
        missing = [key for key in RESULT_KEYS if key not in result]
        if missing:
            raise ValueError(f"result.json needs {', '.join(missing)}")
        if confusion:
            write_whole(self._out / "confusion.json", confusion)
        write_json(self._out / "result.json", result)
        self.close()
        speed = f", {result['images_per_s']:.0f} images/s" if result["images_per_s"] else ""  # none if nothing was left to do
        self.note(f"done: test accuracy {_percent(result['test_accuracy'])}, {result['steps']} steps in "
                  f"{result['wall_s']:.1f} s{speed} -> {self._out / 'result.json'}")

    @_if_enabled
    def close(self) -> None:
        """Close files and display; harmless when repeated."""
        if self._metrics:
            self._metrics.close()
        if self._curves:
            self._curves.close()
        if self._display:
            with suppress(OSError):
                self._display.close()
        self._metrics = self._curves = self._display = None

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_files(self, samples: int) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        for name in ("result.json", "confusion.json"):  # or a run that fails would seem to have succeeded
            (self._out / name).unlink(missing_ok=True)
        write_json(self._out / "config.json", to_json(self._cfg))
        cut_metrics(self._out / "metrics.jsonl", samples)
        self._metrics = (self._out / "metrics.jsonl").open("a", encoding="utf-8")

    def _open_display(self, total_steps: int, step: int) -> "_Bar | _Lines":
        terminal = _terminal(self._stderr)
        if terminal is None:
            return _Lines(self._stderr, self._clock, total_steps, step)
        return _Bar(terminal, total_steps, step, owned=terminal is not self._stderr)

    def _append(self, values: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(plain(self._position | values), allow_nan=False) + "\n")
        self._metrics.flush()
        for name, value in plain(values).items() if self._curves else ():
            if value is not None:
                self._curves.add_scalar(name, value, self._position["step"])

    def _epoch_name(self, epoch: int) -> str:
        return f"epoch {epoch + 1}/{self._cfg.epochs}"

    def _headline(self, total_steps: int, step: int) -> str:
        cfg = self._cfg
        resumed = f", resumed at step {step}" if step else ""
        times = f" x {cfg.accumulate}" if cfg.accumulate > 1 else ""
        return (f"{cfg.arch} on {cfg.dataset}, {cfg.precision}, {cfg.replicas} x {cfg.batch}{times} samples per step on "
                f"{self._ranks} rank{'s' if self._ranks > 1 else ''}, {total_steps} steps{resumed} -> {self._out}")


# ------------------------------------------------------------------------------------------------------- files

def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, see `write_whole`."""
    write_whole(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is at every instant either the old one or the whole new one."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def check_tensorboard() -> None:
    """Refuses when event files cannot be written."""
    require("tensorboardX", "tensorboardX", "--tensorboard", "tensorboard", ", or leave it out")


def _event_writer(out: Path, step: int) -> Any:
    """TensorBoard forgets what an earlier run wrote beyond ``step``, and all of it where a run begins anew."""
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1, filename_suffix=f".{step}")


def cut_metrics(path: Path, samples: int) -> None:
    """Cut a metrics file at the first line that lies beyond `samples` or is torn; what stays is not rewritten.

    Samples tell, not steps: a skipped step takes samples too, but need not count as a step.
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        kept = 0
        for line in file:
            if not _is_within(line, samples):
                break
            kept += len(line)
        file.truncate(kept)


def _is_within(line: bytes, samples: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["samples"] <= samples
    except (ValueError, KeyError, TypeError):  # the line that was being written when the machine went down
        return False


def plain(value: Any) -> Any:
    """The same for JSON: numpy scalars become numbers, and what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ----------------------------------------------------------------------------------------------------- display

class _Bar:
    """A progress bar that a terminal shows in place."""

    def __init__(self, terminal: TextIO, total_steps: int, step: int, owned: bool) -> None:
        from tqdm import tqdm  # only here: other ranks, and runs without a terminal, do without it

        layout = "{desc}|{bar}| {remaining} left{postfix}"
        self._terminal, self._owned = terminal, owned
        self._bar = tqdm(total=total_steps, initial=step, file=terminal, dynamic_ncols=True, bar_format=layout)

    def step(self, step: int, epoch: str, status: str) -> None:
        self._bar.set_description_str(f"{epoch} ", refresh=False)
        self._bar.set_postfix_str(status, refresh=False)
        self._bar.update(step - self._bar.n)

    def note(self, text: str) -> None:
        self._bar.write(text, file=self._terminal)

    def close(self) -> None:
        self._bar.close()
        if self._owned:
            self._terminal.close()


class _Lines:
    """Plain lines for logs and pipes: all notes, and now and then where the run stands."""

    def __init__(self, stream: TextIO, clock: Callable[[], float], total_steps: int, step: int) -> None:
        self._stream, self._clock, self._total, self._first = stream, clock, total_steps, step
        self._began = self._spoke = clock()

    def step(self, step: int, epoch: str, status: str) -> None:
        if self._clock() - self._spoke >= SECONDS_BETWEEN_LINES:
            self.note(f"{epoch}: step {step}/{self._total} {status} {self._left(step)} left")

    def note(self, text: str) -> None:
        self._spoke = self._clock()
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing to do: the stream belongs to the process."""

    def _left(self, step: int) -> str:
        per_step = (self._clock() - self._began) / max(1, step - self._first)
        minutes, seconds = divmod(round(per_step * max(0, self._total - step)), 60)
        return f"{minutes}:{seconds:02d}"


def _percent(fraction: float | None) -> str:
    return "unknown" if fraction is None else f"{100 * fraction:.1f}%"


def _terminal(stderr: TextIO) -> TextIO | None:
    """The terminal on which a bar can be drawn, or None.

    mpirun gives its ranks pipes. What the user looks at is then mpirun's own standard error, which Linux shows us if
    mpirun runs on this node; elsewhere the answer is None and the run writes lines.
    """
    if stderr.isatty():
        return stderr
    launcher = _launcher() if _is_pipe(stderr) else None
    if launcher is None:
        return None
    with suppress(OSError):
        # O_NOCTTY: a rank without a controlling terminal must not acquire this one, and its Ctrl-C, by looking at it
        stream = os.fdopen(os.open(f"/proc/{launcher}/fd/2", os.O_WRONLY | os.O_NOCTTY), "w", errors="replace")
        if stream.isatty():
            return stream
        stream.close()
    return None


def _is_pipe(stream: TextIO) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # a stream in memory has no descriptor
        return False


def _launcher() -> int | None:
    """The process id of the nearest mpirun above this process, whatever it is called."""
    pid = os.getppid()
    while pid > 1:
        try:
            name, rest = Path(f"/proc/{pid}/stat").read_text().split("(", 1)[1].rsplit(")", 1)
        except (OSError, IndexError):
            return None
        if name.startswith(("mpirun", "mpiexec", "prterun", "orterun")):
            return pid
        pid = int(rest.split()[1])
    return None
