"""How programs of one process end."""

import os
import subprocess
import sys

import pytest

PROGRAM = "import sys; from dpresnet.errors import exit_code; sys.exit(exit_code(lambda: {}))"


def end(body: str, stdout: int) -> tuple[int, str]:
    """Exit code and stderr."""
    program = [sys.executable, "-c", PROGRAM.format(body)]
    done = subprocess.run(program, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize("body", ["print(1)", "print(1, flush=True)", "print('x' * 10**6)"])
def test_nothing_is_said_to_nobody(body):
    """When it is flushed at the end, at once, or in the middle."""
    reader, writer = os.pipe()
    os.close(reader)
    assert end(body, writer) == (141, "")
    os.close(writer)


def test_other_broken_pipes_are_errors():
    code, said = end("(_ for _ in ()).throw(BrokenPipeError('a socket'))", subprocess.DEVNULL)
    assert code == 1 and "BrokenPipeError: a socket" in said


def test_what_is_refused_is_one_line():
    code, said = end("exec('from dpresnet.errors import Refused; raise Refused(\"no\")')", subprocess.DEVNULL)
    assert (code, said) == (78, "error: no\n")
