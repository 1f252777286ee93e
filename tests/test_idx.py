"""MNIST's format: every pixel from either spelling, gzipped or not; files that are not what they announce are refused."""

import gzip
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpresnet.datasets import idx
from tests.preparing import prepared, refusal, write_files

RNG = np.random.default_rng(0)
IMAGES = {"train": RNG.integers(0, 256, (50, 7, 5), np.uint8), "t10k": RNG.integers(0, 256, (20, 7, 5), np.uint8)}
LABELS = {stem: (np.arange(len(images)) * 3 % 10).astype(np.uint8) for stem, images in IMAGES.items()}


def packed(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def files(dot: bool = False, zipped: bool = False) -> dict[str, bytes]:
    separator, end = "." if dot else "-", ".gz" if zipped else ""
    made = {f"{stem}-images{separator}idx3-ubyte{end}": packed(IMAGES[stem]) for stem in IMAGES}
    made |= {f"{stem}-labels{separator}idx1-ubyte{end}": packed(LABELS[stem]) for stem in LABELS}
    return {name: gzip.compress(content) if zipped else content for name, content in made.items()}


@pytest.mark.parametrize("kind", idx.KNOWN)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dot", [True, False])
def test_every_pixel_from_either_spelling(tmp_path, kind, zipped, dot):
    dataset = prepared(kind, write_files(tmp_path / "s", files(dot, zipped)), tmp_path / "o.h5")
    for split, stem in ((dataset.train, "train"), (dataset.test, "t10k")):
        np.testing.assert_array_equal(split.images, IMAGES[stem][:, None])
        np.testing.assert_array_equal(split.labels, LABELS[stem])
    assert dataset.classes == 10 and len(set(dataset.class_names)) == 10
    assert dataset.name == "o" and dataset.licence == idx.KNOWN[kind].licence


def test_the_licence_can_be_given(tmp_path):
    assert prepared("mnist", write_files(tmp_path / "s", files()), tmp_path / "o.h5", "--licence", "CC0").licence == "CC0"


def header(magic: int, *shape: int) -> bytes:
    return struct.pack(f">{1 + len(shape)}I", magic, *shape)


TRAIN, NAMES = packed(IMAGES["train"]), ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
BAD = {
    "truncated": (0, TRAIN[:-1], "announces 1,750 bytes behind its header, and has 1,749"),
    "trailing": (0, TRAIN + b"x", "announces 1,750 bytes behind its header, and has more"),
    "header": (0, TRAIN[:15], "ends within its header"),
    "empty": (0, b"", "ends within its header"),
    "magic": (0, header(0x0D03, 50, 7, 5) + TRAIN[16:], "begins with 0x00000d03 instead of 0x00000803"),
    "labels for images": (0, packed(LABELS["train"]), "begins with 0x00000801 instead of 0x00000803"),
    "no rows": (0, header(0x0803, 50, 0, 5), "announces 50 x 0 x 5 values, none at all"),
    "huge": (0, header(0x0803, 2**32 - 1, 2**32 - 1, 2**32 - 1), "more than its 16 can hold|more than its"),
    "fewer labels": (1, packed(LABELS["train"][:-1]), "holds 49 labels, train-images-idx3-ubyte"),
    "large label": (1, packed(LABELS["train"] + np.uint8(1)), "sample 3 has the label 10, there are 10 classes"),
    "other shape": (0, packed(IMAGES["train"][:, :6]), "images to train are (6, 5), those to test (7, 5)"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_bad_file_is_refused(tmp_path, capsys, kind, zipped):
    which, content, reason = BAD[kind]
    end = ".gz" if zipped else ""
    bad = {NAMES[which] + end: gzip.compress(content) if zipped else content}
    line = refusal(capsys, "mnist", write_files(tmp_path / "s", files(zipped=zipped) | bad), tmp_path / "o.h5")
    assert (any(part in line for part in reason.split("|")) and "get the files again" in line) or "IDX file" in line, line


@pytest.mark.parametrize("damage", [lambda c: c[:-9], lambda c: b"no gzip" + c, lambda c: c[:40] + b"xxxx" + c[44:]])
def test_a_damaged_gzip_is_refused(tmp_path, capsys, damage):
    content = files(zipped=True)
    content["train-images-idx3-ubyte.gz"] = damage(content["train-images-idx3-ubyte.gz"])
    line = refusal(capsys, "mnist", write_files(tmp_path / "s", content), tmp_path / "o.h5")
    assert "train-images-idx3-ubyte.gz cannot be read" in line


def test_a_gzip_is_not_expanded_beyond_what_it_announces(tmp_path):
    """256 MiB of zeros behind a header that announces few: the child's memory stays below 150 MiB, which it is without."""
    content = files(zipped=True)
    content["train-images-idx3-ubyte.gz"] = gzip.compress(header(0x0803, 50, 7, 5) + bytes(256 << 20), 1)
    source = write_files(tmp_path / "s", content)
    code = r"""if True:
        import re, sys
        from dpresnet.datasets import prepare
        code = prepare.main(["mnist", *sys.argv[1:]])
        print(code, re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])
        """
    done = subprocess.run([sys.executable, "-c", code, source, tmp_path / "o.h5"], capture_output=True, text=True, check=True)
    code, peak = map(int, done.stdout.split())
    assert code == 78 and "and has more" in done.stderr and peak < 150 * 1024


def test_what_is_missing_is_named(tmp_path, capsys):
    content = files()
    del content["t10k-labels-idx1-ubyte"]
    line = refusal(capsys, "mnist", write_files(tmp_path / "s", content), tmp_path / "o.h5")
    assert "t10k-labels-idx1-ubyte, t10k-labels.idx1-ubyte, t10k-labels-idx1-ubyte.gz, t10k-labels.idx1-ubyte.gz" in line
    assert "is not a folder" in refusal(capsys, "mnist", Path("/none"), tmp_path / "o.h5")
