"""The ways a run ends on purpose, each with the exit code that launchers and schedulers read."""

import importlib.util
import os
import select
import sys
from collections.abc import Callable

UNREAD = 141  # as a shell reports SIGPIPE


class Refused(Exception):
    """Configuration or data that cannot work. The message is one line: the value, why, and the remedy."""

    exit_code = 78


class GaveUp(Exception):
    """The numbers went wrong for good: no loss scale, or no state, from which training could go on."""

    exit_code = 70


class DifferentBits(Exception):
    """A repeated run computed something else than the recorded one. The message names the first difference."""

    exit_code, word = 70, "DIFFERENT"


class Late(RuntimeError):
    """Another rank has not come within --timeout. The message says what was waited for, and who is missing."""


class Stopped(Exception):
    """Stopped on request after saving; the same command with ``--resume auto`` goes on bit for bit."""

    exit_code = 75


def require(module: str, library: str, flag: str, extra: str, otherwise: str = "") -> None:
    """Refuses ``flag`` where an optional library is not installed, and says which extra brings it and what else helps."""
    if importlib.util.find_spec(module) is None:
        raise Refused(f"{flag}: {library} is not installed here: pip install 'dpresnet[{extra}]'{otherwise}")


def exit_code(program: Callable[[], None]) -> int:
    """Runs a program of one process: 0, or the exit code of its planned end, which is said in one line on stderr.

    Nothing is said where nobody reads stdout any more, as in ``... | head -1``.
    """
    try:
        program()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _stdout_is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return UNREAD
    except (Refused, GaveUp, DifferentBits) as error:
        print(f"{getattr(error, 'word', 'error')}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _stdout_is_unread() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
