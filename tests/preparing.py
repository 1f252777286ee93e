"""What the tests of `dpresnet.datasets.prepare` share."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from dpresnet.datasets import prepare, schema


def prepared(kind: str, source: Path, out: Path, *flags: object) -> schema.Dataset:
    """The data set that the command makes, which must succeed."""
    assert prepare.main([kind, str(source), str(out), *map(str, flags)]) == 0
    return schema.read(out)


def refusal(capsys: pytest.CaptureFixture, kind: str, source: Path, out: Path, *flags: object) -> str:
    """The one line with which the command refuses; nothing is left under the final name."""
    before = out.read_bytes() if out.is_file() else None
    capsys.readouterr()
    assert prepare.main([kind, str(source), str(out), *map(str, flags)]) == 78
    line, rest = capsys.readouterr().err.rstrip("\n").rpartition("\n")[::2][::-1]
    assert line.startswith("error: ") and "Traceback" not in rest
    assert (out.read_bytes() if out.is_file() else None) == before
    return line


def write_files(root: Path, files: Mapping[str, bytes]) -> Path:
    """Files below a folder, by their paths."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root
