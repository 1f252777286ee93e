"""CIFAR as published: every pixel and label from every form; pickles that do more than hold data, and bombs, are refused."""

import gzip
import io
import pickle
import struct
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpresnet.datasets import cifar, pickles
from dpresnet.errors import Refused
from tests.preparing import prepared, refusal, write_files

COUNT = 12  # samples in a file
RNG = np.random.default_rng(0)


class Python2:
    """Writes a value as cPickle of Python 2 did by protocol 2: texts without Unicode, arrays as NumPy of its time."""

    def __init__(self) -> None:
        self.put = 0

    def dumps(self, value: object) -> bytes:
        return b"\x80\x02" + self.value(value) + b"."

    def remembered(self, code: bytes) -> bytes:
        self.put += 1
        return code + (b"q" + bytes([self.put - 1]) if self.put <= 256 else b"r" + struct.pack("<I", self.put - 1))

    def value(self, value: object) -> bytes:
        if isinstance(value, bytes):
            short = len(value) < 256
            return self.remembered((b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<I", len(value))) + value)
        if isinstance(value, bool):
            return b"\x88" if value else b"\x89"
        if isinstance(value, int):
            return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
        if value is None:
            return b"N"
        if isinstance(value, list):
            return self.remembered(b"]") + b"(" + b"".join(map(self.value, value)) + b"e"
        if isinstance(value, dict):
            return self.remembered(b"}") + b"(" + b"".join(self.value(k) + self.value(v) for k, v in value.items()) + b"u"
        assert isinstance(value, np.ndarray) and value.dtype == np.uint8
        made = self.remembered(b"cnumpy.core.multiarray\n_reconstruct\n") + self.remembered(b"cnumpy\nndarray\n")
        made += self.remembered(b"K\x00\x85") + self.value(b"b") + self.remembered(b"\x87") + self.remembered(b"R")
        shape = self.remembered(self.value(value.shape[0]) + self.value(value.shape[1]) + b"\x86")
        dtype = self.remembered(b"cnumpy\ndtype\n") + self.value(b"u1") + b"K\x00K\x01" + self.remembered(b"\x87")
        dtype += self.remembered(b"R") + b"(K\x03" + self.value(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00"
        fortran = value.flags.f_contiguous and not value.flags.c_contiguous
        content = self.value(value.tobytes("F" if fortran else "C"))
        return made + b"(K\x01" + shape + dtype + self.remembered(b"t") + b"b" + self.value(fortran) + content + \
            self.remembered(b"t") + b"b"  # fmt: skip


def samples(classes: int) -> tuple[np.ndarray, np.ndarray]:
    return RNG.integers(0, 256, (COUNT, 3072), np.uint8), (np.arange(COUNT) * 7 % classes).astype(np.uint8)


CONTENT = {kind: {name: samples(known.classes) for name in known.samples} for kind, known in cifar.KNOWN.items()}
CLASSES = {kind: [b"class%d" % i for i in range(known.classes)] for kind, known in cifar.KNOWN.items()}


WRITERS = {
    "Python 2": lambda value: Python2().dumps(value),
    "Python 3": lambda value: pickle.dumps(value, 2),
    "protocol 4": lambda value: pickle.dumps(value, 4),
}


def published(kind: str, version: str) -> dict[str, bytes]:
    """The files of a version, by their names in the archive."""
    known, content = cifar.KNOWN[kind], CONTENT[kind]
    folder = {"cifar10": "cifar-10-batches-", "cifar100": "cifar-100-"}[kind] + ("binary" if version == "binary" else "python")
    if version == "binary":
        coarse = [np.zeros((COUNT, 1), np.uint8)] * (known.labels - 1)
        files = {f"{name}.bin": np.concatenate([*coarse, labels[:, None], images], axis=1).tobytes()
                 for name, (images, labels) in content.items()}  # fmt: skip
        files |= {known.names: b"\n".join(CLASSES[kind]) + b"\n\n", "readme.html": b"<html>"}
    else:
        write = WRITERS[version]
        batches = {name: {b"batch_label": b"one of them", known.key.encode(): labels.tolist(), b"data": images,
                          b"filenames": [b"%d.png" % i for i in range(COUNT)]} for name, (images, labels) in content.items()}
        files = {name: write(batch) for name, batch in batches.items()}
        files[known.meta] = write({b"num_vis": 3072, known.names_key.encode(): CLASSES[kind]})
    return {f"{folder}/{name}": content for name, content in files.items()}


def tarred(path: Path, files: dict[str, bytes], *more: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info, content in more:
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Published sets of few samples; all else is as it is."""
    known = {kind: replace(k, train_batch=COUNT, test_batch=COUNT) for kind, k in cifar.KNOWN.items()}
    monkeypatch.setattr(cifar, "KNOWN", known)


@pytest.mark.parametrize("version", ["binary", *WRITERS])
@pytest.mark.parametrize("form", ["archive", "folder", "folder around"])
@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_every_pixel_and_label(tmp_path, kind, form, version):
    files = published(kind, version)
    if form == "archive":
        source = tarred(tmp_path / "named-anyhow", files)
    else:
        source = write_files(tmp_path / "s", files)
        source = source if form == "folder around" else next(source.iterdir())
    dataset, known = prepared(kind, source, tmp_path / "o.h5"), cifar.KNOWN[kind]
    for split, names in ((dataset.train, known.train), (dataset.test, (known.test,))):
        expected = [CONTENT[kind][name] for name in names]
        np.testing.assert_array_equal(split.images.reshape(-1, 3072), np.concatenate([images for images, _ in expected]))
        np.testing.assert_array_equal(split.labels, np.concatenate([labels for _, labels in expected]))
    assert dataset.shape == (3, 32, 32)
    assert dataset.class_names == tuple(name.decode() for name in CLASSES[kind])


def test_an_array_in_the_order_of_fortran():
    array = np.asfortranarray(RNG.integers(0, 256, (5, 7), np.uint8))
    np.testing.assert_array_equal(pickles.loads(Python2().dumps({b"data": array}), "here")["data"], array)


def test_values_are_what_pickle_makes_of_them():
    value = {"a": 1, "b": [1.5, -3, 2**40, None, True, "ä", ("x",), {"y": []}], "c": b"\xff" * 300, "d": (), "e": (1, 2, 3, 4)}
    for protocol in (2, 3, 4):
        assert pickles.loads(pickle.dumps(value, protocol), "here") == pickle.loads(pickle.dumps(value, protocol))


# What is refused


class Calls:
    """Pickles as a call."""

    def __init__(self, *call: object):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def global_pickle(module: str, name: str) -> bytes:
    return b"\x80\x02}U\x04datac" + module.encode() + b"\n" + name.encode() + b"\nU\x01x\x85Rs."


EVIL = {
    "system": (pickle.dumps({b"data": Calls(exec, "raise SystemExit('carried out')")}, 2), "asks for __builtin__.exec"),
    "protocol 4": (pickle.dumps({b"data": Calls(exec, "1")}, 4), "asks for builtins.exec"),
    "numpy's own": (global_pickle("numpy.testing", "run"), "asks for numpy.testing.run"),
    "fromfile": (global_pickle("numpy", "fromfile"), "asks for numpy.fromfile"),
    "dotted": (global_pickle("numpy", "dtype.mro"), "asks for numpy.dtype.mro"),
    "ndarray called": (global_pickle("numpy", "ndarray"), "calls ndarray with other arguments"),
    "objects": (pickle.dumps({b"data": np.array([None])}, 2), "calls dtype with other arguments"),
    "floats": (pickle.dumps({b"data": np.zeros(3)}, 2), "calls dtype with other arguments"),
    "new object": (pickle.dumps({b"data": Refused("x")}, 2), "asks for dpresnet.errors.Refused"),
    "set": (pickle.dumps({b"data": {1, 2}}, 4), "has the instruction EMPTY_SET"),
    "extension": (b"\x80\x02\x82\x01.", "has the instruction EXT1"),
    "persistent": (b"\x80\x02U\x01xQ.", "has the instruction BINPERSID"),
    "not a dict": (pickle.dumps([1], 2), "holds list, not a dict"),
    "key": (pickle.dumps({1: 2}, 2), "has a key that is a int"),
    "used twice": (b"\x80\x02]q\x00h\x00a.", "uses a list twice"),
    "empty stack": (b"\x80\x02e.", "pop from empty list"),
    "too few": (b"\x80\x02(K\x01\x86.", "takes more than it has made"),
    "across a mark": (b"\x80\x02}K\x01K\x02(K\x03\x86.", "takes more than it has made"),
    "built": (b"\x80\x02}U\x01ab.", "treats a dict as a Array"),
    "nothing": (b"", "not the pickle"),
    "text": (b"just text", "not the pickle"),
    "shape": (Python2().dumps({b"data": np.zeros((2, 3), np.uint8)}).replace(b"K\x02K\x03", b"K\x03K\x03"),
              "shape (3, 3) with 6"),
}  # fmt: skip


@pytest.mark.parametrize("kind", EVIL)
def test_a_pickle_that_is_not_data_is_refused_by_name(tmp_path, capsys, kind):
    content, reason = EVIL[kind]
    files = published("cifar10", "Python 2") | {"cifar-10-batches-python/data_batch_3": content}
    line = refusal(capsys, "cifar10", write_files(tmp_path / "s", files), tmp_path / "o.h5")
    assert "data_batch_3 is not the pickle that was published" in line and reason in line


def test_any_truncation_of_a_pickle_is_refused():
    content = Python2().dumps({b"data": np.zeros((2, 3), np.uint8), b"labels": [1, 2]})
    for length in range(len(content)):
        with pytest.raises(Refused, match="here is not the pickle"):
            pickles.loads(content[:length], "here")


def changed(**values: object) -> bytes:
    images, labels = CONTENT["cifar10"]["data_batch_2"]
    batch = {b"labels": labels.tolist(), b"data": images} | {name.encode(): value for name, value in values.items()}
    return Python2().dumps(batch)


LABELS = [0] * COUNT
BAD = {
    "no data": (changed(data=[]), f'has no "data" of {COUNT} x 3072 bytes'),
    "fewer images": (changed(data=np.zeros((COUNT - 1, 3072), np.uint8)), f'has no "data" of {COUNT} x 3072'),
    "no labels": (Python2().dumps({b"data": np.zeros((COUNT, 3072), np.uint8)}), f'has no "labels", {COUNT} whole numbers'),
    "fewer labels": (changed(labels=LABELS[:-1]), 'has no "labels"'),
    "text labels": (changed(labels=[b"x", *LABELS[1:]]), 'has no "labels"'),
    "large label": (changed(labels=[*LABELS[:-1], 10]), "sample 11 has the label 10, there are 10 classes"),
    "negative label": (changed(labels=[-1, *LABELS[1:]]), "sample 0 has the label -1"),
    "too large": (bytes(COUNT * 3200 + (1 << 16) + 1), "more than the 103,936 bytes"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_batch_that_is_not_as_published_is_refused(tmp_path, capsys, kind):
    content, reason = BAD[kind]
    files = published("cifar10", "Python 2") | {"cifar-10-batches-python/data_batch_2": content}
    for source in (write_files(tmp_path / "s", files), tarred(tmp_path / "s.tar.gz", files)):
        line = refusal(capsys, "cifar10", source, tmp_path / "o.h5")
        assert "data_batch_2" in line and reason in line


@pytest.mark.parametrize("extra", [-1, -3073, 1])
def test_a_binary_file_has_its_exact_size(tmp_path, capsys, extra):
    files, name = published("cifar10", "binary"), "cifar-10-batches-binary/test_batch.bin"
    files[name] = files[name][:extra] if extra < 0 else files[name] + b"x"
    line = refusal(capsys, "cifar10", write_files(tmp_path / "s", files), tmp_path / "o.h5")
    assert "test_batch.bin has" in line


def test_names_and_kind_must_fit(tmp_path, capsys):
    files = published("cifar10", "binary")
    files["cifar-10-batches-binary/batches.meta.txt"] = b"a b c"
    line = refusal(capsys, "cifar10", write_files(tmp_path / "s", files), tmp_path / "o.h5")
    assert "does not hold the names of 10 classes" in line
    hundred = tarred(tmp_path / "h.tar.gz", published("cifar100", "Python 2"))
    assert "lacks batches.meta, data_batch_1" in refusal(capsys, "cifar10", hundred, tmp_path / "o.h5")
    assert "does not exist" in refusal(capsys, "cifar10", tmp_path / "none", tmp_path / "o.h5")


def info(name: str, **values: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(made, key, value)
    return made


def test_archives_are_not_trusted(tmp_path, capsys):
    files = published("cifar10", "binary")
    name, content = next(item for item in files.items() if "data_batch_1" in item[0])
    link = info(name, type=tarfile.SYMTYPE, linkname="/etc/passwd")
    without = {k: v for k, v in files.items() if k != name}
    assert "is a link" in refusal(capsys, "cifar10", tarred(tmp_path / "l", without, (link, b"")), tmp_path / "o.h5")
    twice = tarred(tmp_path / "t", files, (info(name, size=len(content)), content))
    assert "is there twice" in refusal(capsys, "cifar10", twice, tmp_path / "o.h5")
    whole = tarred(tmp_path / "w", files).read_bytes()
    for position, damaged in enumerate((whole[:-2000], b"x" + whole, gzip.compress(b"no tar" * 1000))):
        (tmp_path / str(position)).write_bytes(damaged)
        assert "not a whole .tar.gz" in refusal(capsys, "cifar10", tmp_path / str(position), tmp_path / "o.h5")


def test_an_archive_is_not_expanded_beyond_a_published_one(tmp_path):
    bomb = tarred(tmp_path / "bomb", {}, (info("cifar-10-batches-py/readme", size=256 << 20), bytes(256 << 20)))
    code = r"""if True:
        import re, sys
        from dataclasses import replace
        from dpresnet.datasets import cifar, prepare
        cifar.KNOWN = {kind: replace(k, train_batch=10, test_batch=10) for kind, k in cifar.KNOWN.items()}
        code = prepare.main(["cifar10", *sys.argv[1:]])
        print(code, re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])
        """
    done = subprocess.run([sys.executable, "-c", code, bomb, tmp_path / "o.h5"], capture_output=True, text=True, check=True)
    code, peak = map(int, done.stdout.split())
    assert code == 78 and "has more than" in done.stderr and peak < 150 * 1024
