"""What comes back is what was saved, bit for bit, or a refusal with its reason: whatever happens to the file, whoever
wrote it, and at whichever system call the writer dies. ``stamp`` knows the documented format by itself: the oracle."""

import ctypes
import errno
import hashlib
import io
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from dpresnet import checkpoint
from dpresnet.checkpoint import BadCheckpoint, SaveFailed, check_writable, load, newest, save
from dpresnet.errors import Refused

META = {"step": 7, "epoch": 1.5, "scaler": {"scale": 65536.0}, "name": "Grüße", "best": None, "list": [1, "a", True]}
OLD, NEW = "step-00000001.h5", "step-00000002.h5"


def state(seed=0):
    """Arrays of every shape and type that may be saved, with values that survive only a bit-exact trip."""
    rng = np.random.default_rng(seed)
    return {
        "param/layer1.0.conv1.weight": np.asfortranarray(rng.standard_normal((4, 3, 3, 3), np.float32))[::2],
        "param/fc.bias": np.array([0.0, -0.0, 1e-45, 1.1754944e-38, 3.4028235e38], np.float32),
        "momentum/conv1.weight": rng.standard_normal((5, 7)),
        "momentum/empty": np.zeros((0, 3), np.float32),
        "buffer/scalar": np.float32(seed),
        "buffer/bn1.num_batches_tracked": np.array([2**62 + seed]),
        "buffer/seen": rng.integers(0, 256, (2, 1, 2), np.uint8),
    }


def same(found, expected):
    bits = [{name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()} for arrays in (found, expected)]
    assert bits[0] == bits[1]


def stamp(content, version=1):
    """A file with ``content`` behind the user block that the module's docstring documents."""
    header = b"DPRESNET" + version.to_bytes(4, "little") + len(content).to_bytes(8, "little")
    return header + hashlib.sha256(content).digest() + bytes(460) + content


def reason(path, data):
    """The reason for which ``load`` refuses the file with these bytes."""
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint) as caught:
        load(path)
    assert caught.value.path == path and str(path) in str(caught.value)
    return caught.value.reason


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save(tmp_path_factory.mktemp("good"), 7, state(), META, keep=3).read_bytes()


def test_round_trip_is_bit_exact(tmp_path):
    path = save(str(tmp_path), 1234, state(), META, keep=3)
    assert path == tmp_path / "step-00001234.h5" and sorted(os.listdir(tmp_path)) == [path.name]
    assert load(path).path == path and load(path).meta == META
    same(load(path).arrays, state())


def test_kinds_that_only_some_runs_have_come_back_too(good, tmp_path):
    """Without them a file has the groups that it always had."""
    more = {f"{kind}/fc.bias": np.arange(3, dtype=np.float32) for kind in ("second_moment", "ema_param", "ema_buffer")}
    path = save(tmp_path, 1, state() | more, META, keep=1)
    same(load(path).arrays, state() | more)
    for data, groups in ((path.read_bytes(), {"second_moment", "ema_param", "ema_buffer"}), (good, set())):
        with h5py.File(io.BytesIO(data)) as file:
            assert set(file) == {"buffer", "meta", "momentum", "param"} | groups
    with pytest.raises(ValueError, match="third_moment/fc"):
        save(tmp_path, 2, {"third_moment/fc.bias": np.zeros(1)}, META, keep=1)


def test_bytes_are_as_documented_and_a_function_of_the_content(good, tmp_path):
    time.sleep(1.1)  # HDF5's time stamps count seconds
    path = save(tmp_path, 1, dict(reversed(state().items())), META, keep=1)
    assert path.read_bytes() == good == stamp(good[512:])
    with h5py.File(path) as file:
        assert json.loads(file["meta"][...].tobytes()) == META
        same({name: file[name][...] for name in state()}, state())


NAMES = ("weight", "/param/a", "other/a", "param/a/b", "param/..", "param/", "param/ä", "meta")
UNSAVABLE = [("param/w", np.array([[0, value]]), "param/w has non-finite") for value in (np.nan, np.inf, -np.inf)]
UNSAVABLE += [("param/w", np.zeros(2, code), "param/w is") for code in ("f2", ">f4", "i4", "O", "S3", "c8")]
UNSAVABLE += [(name, np.zeros(2), f'array name "{name}" is not KIND/NAME') for name in NAMES]


@pytest.mark.parametrize(("name", "array", "message"), UNSAVABLE)
def test_what_a_checkpoint_cannot_hold_is_not_saved(tmp_path, name, array, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        save(tmp_path / "new", 1, state() | {name: array}, META, keep=1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path / "new", 1, state(), {"loss": float("nan")}, keep=1)
    assert sorted(os.listdir(tmp_path)) == []


def test_truncated_and_foreign_files_are_refused(good, tmp_path):
    for data in [good[:length] for length in (0, 1, 511, 512, len(good) // 2, len(good) - 1)] + [good + b"\0"]:
        assert f"has {len(data)} bytes" in reason(tmp_path / "x.h5", data)
    h5py.File(foreign := io.BytesIO(), "w").close()
    for data in (b"lines of text\n" * 100, b"\xff\xd8\xff\xe0" + bytes(600), foreign.getvalue()):
        assert reason(tmp_path / "x.h5", data) == "is not a dpresnet checkpoint"
    assert "version 2" in reason(tmp_path / "x.h5", stamp(good[512:], version=2))
    assert "signature" in reason(tmp_path / "x.h5", stamp(bytes(1000)))
    with pytest.raises(BadCheckpoint, match="No such file"):
        load(tmp_path / "missing.h5")


def test_every_flipped_bit_is_found(good, tmp_path):
    dice = np.random.default_rng(1)
    for position in [*range(512), *dice.integers(512, len(good), 200)]:
        damaged = bytearray(good)
        damaged[position] ^= 1 << int(dice.integers(8))
        assert reason(tmp_path / "x.h5", damaged)


def put(name, value):
    return lambda file: (file.pop(name, None), file.update({name: value}))


def array(*args, **options):
    return lambda file: file.create_dataset("param/x", *args, **options)


def virtual(end=None, limit=None):
    layout = h5py.VirtualLayout((16,), "f4", maxshape=limit)
    layout[0:end] = h5py.VirtualSource("secret.h5", "x", (16,), "f4", maxshape=limit)[0:end]
    return lambda file: file.create_virtual_dataset("param/x", layout)


def unknown_filter(file):
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((16,))
    creation.set_filter(307, h5py.h5z.FLAG_OPTIONAL, (9,))  # bzip2: a plug-in
    h5py.h5d.create(file["param"].id, b"x", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((16,)), creation)


ELSEWHERE = "is not stored contiguously, without filters and in this file"
LEAKS = {  # whoever reads param/x without looking opens secret.h5
    "external link": (put("param/x", h5py.ExternalLink("secret.h5", "/x")), "ExternalLink"),
    "external group": (put("param", h5py.ExternalLink("secret.h5", "/")), "ExternalLink"),
    "external storage": (array((16,), "f4", external=[("secret.h5", 0, h5py.h5f.UNLIMITED)]), ELSEWHERE),
    "virtual": (virtual(), ELSEWHERE),
    "unlimited virtual": (virtual(h5py.h5s.UNLIMITED, (None,)), ELSEWHERE),
}
FOREIGN = LEAKS | {
    "soft link": (put("param/x", h5py.SoftLink("/meta")), "SoftLink"),
    "nested group": (put("param/x/y", np.zeros(2)), "is a Group"),
    "unknown member": (put("extra", np.zeros(2)), "has the members"),
    "no meta": (lambda file: file.pop("meta"), "has the members"),
    "unknown filter": (unknown_filter, ELSEWHERE),
    "known filter": (array(data=np.zeros(16, "f4"), compression="lzf"), ELSEWHERE),
    "huge shape": (array((1 << 44,), "f4"), "claim 70368744"),
    "variable length": (array((2,), h5py.vlen_dtype(np.float32)), "is object"),
    "no value": (put("param/x", h5py.Empty("f4")), "not an array of"),
    "not finite": (array(data=np.array([1, np.nan])), "param/x has non-finite"),
    "odd name": (put("param/a b", np.zeros(2)), "is not KIND/NAME"),
    "no JSON": (put("meta", np.zeros(3, np.uint8)), "char 0"),
    "no object": (put("meta", np.frombuffer(b"[]", np.uint8)), "not a JSON object"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_content_with_a_correct_hash_is_refused_unread(good, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    with h5py.File("secret.h5", "w") as file:
        file["x"] = np.full(16, 42.0, np.float32)
    build, expected = FOREIGN[kind]
    with h5py.File(stream := io.BytesIO(good), "r+") as file:
        build(file)
    libc, forged = ctypes.CDLL(None), stamp(stream.getvalue()[512:])
    with open(libc.inotify_init1(os.O_NONBLOCK), "rb", buffering=0) as opened:
        assert libc.inotify_add_watch(opened.fileno(), b"secret.h5", 0x20) >= 0  # IN_OPEN
        assert expected in reason(Path("x.h5"), forged)
        assert opened.read(4096) is None
        if kind in LEAKS:
            with h5py.File("x.h5") as file:
                assert file["param/x"][0] != 0 and opened.read(4096)


def test_newest_falls_back_and_never_starts_afresh_in_silence(tmp_path):
    assert newest(tmp_path) is None and newest(tmp_path / "missing") is None
    paths = [save(tmp_path, step, state(), META, keep=9, best=step == 5) for step in (123456789, 99999999, 5)]
    (tmp_path / "step-00000007.h5.tmp-1").write_bytes(b"half")
    for i, path in enumerate([*paths, tmp_path / "best.h5"]):
        found, rejected = newest(tmp_path)
        assert found.path == path and [bad.path for bad in rejected] == paths[:i]
        same(found.arrays, state())
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Refused, match=r"none of the 4 checkpoints in .*step-123456789\.h5 refused: has \d+ bytes"):
        newest(tmp_path)


def test_pruning_keeps_the_last_k_and_the_best(tmp_path):
    for step in range(6):
        save(tmp_path, step, state(step), META, keep=3, best=step == 1)
    assert sorted(os.listdir(tmp_path)) == ["best.h5", "step-00000003.h5", "step-00000004.h5", "step-00000005.h5"]
    same(load(tmp_path / "best.h5").arrays, state(1))
    (tmp_path / "step-00000005.h5").write_bytes(b"damaged")  # so the run resumed from 3
    save(tmp_path, 4, state(44), META, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["best.h5", "step-00000004.h5", "step-00000005.h5"]
    same(newest(tmp_path)[0].arrays, state(44))
    with pytest.raises(ValueError, match="keep 0 at least 1"):
        save(tmp_path, 5, state(), META, keep=0)


def watched(before):
    """The module's ``os``: ``before(name, args)`` runs ahead of each call that touches the disk; writes are short."""

    def call(name, *args):
        before(name, args)
        return getattr(os, name)(*((args[0], args[1][:1500]) if name == "write" else args))

    return SimpleNamespace(**vars(os) | {n: partial(call, n) for n in ("open", "write", "fsync", "replace", "unlink")})


def test_nothing_is_removed_before_its_successor_is_durable(tmp_path, monkeypatch):
    save(tmp_path, 1, state(), META, keep=1)
    log, expected = [], []

    def record(name, args):
        path = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else args[0]
        log.append((name, Path(path).name.removesuffix(f".tmp-{os.getpid()}")))

    monkeypatch.setattr(checkpoint, "os", watched(record))
    same(load(save(tmp_path, 2, state(2), META, keep=1, best=True)).arrays, state(2))
    for name in ("best.h5", NEW):
        expected += [(call, name) for call in ("open", "write", "fsync", "replace")]
        expected += [("open", tmp_path.name), ("fsync", tmp_path.name)]
    assert [entry for entry, _ in itertools.groupby(log)] == [*expected, ("unlink", OLD)]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize(("code", "remedy"), [(errno.ENOSPC, "free space"), (errno.EROFS, "--out"), (None, "")])
def test_failed_or_interrupted_save_leaves_everything_as_it_was(tmp_path, monkeypatch, call, code, remedy):
    def fail(name, args):
        if name == call:
            raise OSError(code, os.strerror(code), args[0]) if code else KeyboardInterrupt

    save(tmp_path, 1, state(1), META, keep=1, best=True)
    monkeypatch.setattr(checkpoint, "os", watched(fail))
    with pytest.raises(SaveFailed if code else KeyboardInterrupt) as caught:
        save(tmp_path, 2, state(2), META, keep=1, best=True)
    assert sorted(os.listdir(tmp_path)) == ["best.h5", OLD]
    same(newest(tmp_path)[0].arrays, state(1))
    if code:
        assert re.search(f"{tmp_path / NEW}: {os.strerror(code)}; .*{remedy}", str(caught.value))
        with pytest.raises(Refused, match=f"{tmp_path}: {os.strerror(code)}; .*{remedy}"):
            check_writable(tmp_path)


def test_check_writable_creates_cleans_or_refuses(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        check_writable(tmp_path / "a" / "b")
    for name, pid in (("step-00000009", dead.pid), ("probe", os.getpid()), ("best", os.getppid()), ("notes", dead.pid)):
        (tmp_path / "a" / f"{name}.h5.tmp-{pid}").write_bytes(b"half")
    check_writable(tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == ["b", f"best.h5.tmp-{os.getppid()}", f"notes.h5.tmp-{dead.pid}"]
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(Refused, match=f"in {place}: .* --out"):
            check_writable(place)


def die_at_every_call(root):
    """Writers die before each call of a save in turn; prints the step that is found afterwards."""
    for k in itertools.count():
        directory, calls = root / str(k), itertools.count()
        save(directory, 1, state(1), {"step": 1}, keep=1, best=True)
        if (writer := os.fork()) == 0:
            checkpoint.os = watched(lambda *_, k=k, calls=calls: next(calls) == k and os._exit(9))
            save(directory, 2, state(2), {"step": 2}, keep=1, best=True)
            os._exit(0)
        survived = os.waitpid(writer, 0)[1] == 0
        (found, rejected), best = newest(directory), load(directory / "best.h5")
        assert not rejected and best.meta["step"] >= found.meta["step"]
        for loaded in (found, best):
            same(loaded.arrays, state(loaded.meta["step"]))
        save(directory, 3, state(3), META, keep=1)
        assert sorted(os.listdir(directory)) == ["best.h5", "step-00000003.h5"]
        print(found.meta["step"])
        if survived:
            return


def fill_the_disk(directory):
    """The second checkpoint meets a limit on the size of files; prints what is raised."""
    save(directory, 1, state(1), META, keep=1, best=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    with pytest.raises(SaveFailed) as caught:
        save(directory, 2, state(2), META, keep=1, best=True)
    print(caught.value)
    assert sorted(os.listdir(directory)) == ["best.h5", OLD]
    same(newest(directory)[0].arrays, state(1))


def run_alone(function, directory):
    """The lines that ``function(directory)`` prints in a process of its own."""
    command = [sys.executable, __file__, function.__name__, str(directory)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.check_output(command, env=environment, text=True, timeout=60).splitlines()


def test_killed_at_any_call_the_old_or_the_new_checkpoint_loads(tmp_path):
    steps = run_alone(die_at_every_call, tmp_path)
    assert steps == sorted(steps) and set(steps) == {"1", "2"} and len(steps) >= 16  # with two short writes per file


def test_full_disk_is_a_clean_failure(tmp_path):
    (message,) = run_alone(fill_the_disk, tmp_path)
    assert message.startswith(f"cannot save checkpoint {tmp_path / NEW}: File too large; free space")


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
