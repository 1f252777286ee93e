"""Images in folders and zip files: every pixel, order, any number of threads, going on after a kill, and what is refused."""

import io
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpresnet.datasets import folder, prepare, schema
from dpresnet.datasets.content import held_out
from tests.launching import ROOT
from tests.preparing import prepared, refusal, write_files

RNG = np.random.default_rng(0)


def encoded(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    lossless = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(pixels, mode).save(file, kind, **(lossless | options))
    return file.getvalue()


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, np.uint8)


PIXELS = {
    f"{split}/{name}/{i}.{kind}": noise(6, 9, 3)
    for split in ("train", "test")
    for name in ("dog", "ant", "cat")
    for i, kind in enumerate(["png", "webp", "PNG"])
}
FILES = {path: encoded(pixels, path.rpartition(".")[2].upper()) for path, pixels in PIXELS.items()}
OTHERS = {"readme.txt": b"hello", "train/.DS_Store": b"x", "train/ant/Thumbs.db": b"x", "__MACOSX/train/ant/._0.png": b"x"}


def zipped(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(params=["folder", "zip", "zip with a folder around"])
def source(request, tmp_path) -> Path:
    if request.param == "folder":
        return write_files(tmp_path / "source", FILES | OTHERS)
    around = "all/" if "around" in request.param else ""
    return zipped(tmp_path / "source.zip", {around + name: content for name, content in reversed((FILES | OTHERS).items())})


# What comes out


def test_every_pixel_in_the_order_of_the_paths(source, tmp_path, capsys):
    dataset = prepared("imagefolder", source, tmp_path / "out.h5", "--name", "pets", "--licence", "CC0")
    assert dataset.class_names == ("ant", "cat", "dog")
    assert (dataset.name, dataset.licence, dataset.shape) == ("pets", "CC0", (3, 6, 9))
    for name in schema.SPLITS:
        paths = sorted((path for path in PIXELS if path.startswith(name)), key=lambda path: path.split("/"))
        split = getattr(dataset, name)
        np.testing.assert_array_equal(split.images, np.stack([PIXELS[path].transpose(2, 0, 1) for path in paths]))
        assert [dataset.class_names[label] for label in split.labels] == [path.split("/")[1] for path in paths]
    said = capsys.readouterr().out
    assert "passed over 4 files that are no images by name" in said and "skipped" not in said
    assert f"9 + 9 images (train + test), 3 classes, 3 x 6 x 9, {(tmp_path / 'out.h5').stat().st_size:,} bytes" in said
    assert dataset.fingerprint in said.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out.h5", source.name])


def test_the_same_bytes_for_any_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "TOGETHER", 2)
    root = write_files(tmp_path / "source", {f"train/{i % 3}/{i}.png": encoded(noise(8, 8, 3)) for i in range(60)})
    (root / "train/0/bad.png").write_bytes(b"bad")
    made = []
    for workers in (1, 2, 7):
        out = tmp_path / f"{workers}.h5"
        flags = ("--name", "x", "--test-fraction", 0.2, "--skip-bad", "--workers", workers, "--size", 5)
        prepared("imagefolder", root, out, *flags)
        made.append(out.read_bytes())
    assert made[0] == made[1] == made[2]


def one(tmp_path: Path, content: bytes, *flags: object, name: str = "a.png") -> np.ndarray:
    """The pixels of a single image, uint8 [C, H, W]."""
    shutil.rmtree(tmp_path / "one", ignore_errors=True)
    root = write_files(tmp_path / "one", {f"train/a/{name}": content, f"test/a/{name}": content})
    return prepared("imagefolder", root, tmp_path / "one.h5", "--overwrite", *flags).train.images[0]


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_of_grey_are_scaled(tmp_path, channels):
    values = np.array([[0, 1, 128, 129, 256, 257], [385, 386, 32767, 32768, 65534, 65535]], np.uint16)
    found = one(tmp_path, encoded(values), "--channels", channels)
    np.testing.assert_array_equal(found, np.broadcast_to(np.rint(values / 65535 * 255).astype(np.uint8), (channels, 2, 6)))


def test_other_modes_become_colours_or_grey(tmp_path):
    colours = noise(5, 7, 3)
    alpha = np.concatenate([colours, noise(5, 7, 1)], axis=2)
    palette = Image.fromarray(colours).quantize(20)
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=3)
    expected = np.asarray(palette.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(palette)]
    np.testing.assert_array_equal(one(tmp_path, file.getvalue()), expected.transpose(2, 0, 1))
    np.testing.assert_array_equal(one(tmp_path, encoded(alpha)), colours.transpose(2, 0, 1))
    grey = noise(5, 7)
    np.testing.assert_array_equal(one(tmp_path, encoded(grey)), np.stack([grey] * 3))
    np.testing.assert_array_equal(one(tmp_path, encoded(grey), "--channels", 1), grey[None])
    np.testing.assert_array_equal(one(tmp_path, encoded(np.stack([grey, noise(5, 7)], -1))), np.stack([grey] * 3))
    bits = grey > 128
    np.testing.assert_array_equal(one(tmp_path, encoded(bits)), np.stack([bits * np.uint8(255)] * 3))
    luma = colours @ np.array([0.299, 0.587, 0.114])
    assert np.abs(one(tmp_path, encoded(colours), "--channels", 1)[0] - luma).max() <= 1
    flat = np.broadcast_to(np.uint8([0, 255, 255, 0]), (8, 8, 4))  # cyan, magenta, yellow, black: red
    file = io.BytesIO()
    Image.fromarray(flat, "CMYK").save(file, "JPEG", quality=100)
    red = one(tmp_path, file.getvalue(), name="a.jpg").astype(int)
    assert np.abs(red - np.array([255, 0, 0])[:, None, None]).max() <= 3


def test_a_photo_with_a_preview_in_it_is_a_jpeg(tmp_path):
    first, second = (Image.fromarray(noise(16, 16, 3)) for _ in range(2))
    files = [io.BytesIO(), io.BytesIO()]
    first.save(files[0], "MPO", save_all=True, append_images=[second])
    first.save(files[1], "JPEG")
    with Image.open(files[0]) as image:
        assert image.format == "MPO"
    photo, plain = (one(tmp_path, file.getvalue(), name="a.jpg") for file in files)
    np.testing.assert_array_equal(photo, plain)


ORIENTED = {1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
            5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
            8: lambda x: np.rot90(x)}  # fmt: skip


@pytest.mark.parametrize("orientation", ORIENTED)
def test_the_orientation_of_exif_is_applied(tmp_path, orientation):
    pixels, exif = noise(4, 6, 3), Image.Exif()
    exif[0x0112] = orientation
    found = one(tmp_path, encoded(pixels, exif=exif))
    np.testing.assert_array_equal(found, ORIENTED[orientation](pixels).transpose(2, 0, 1))


def averaged(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bilinear interpolation with antialiasing of float64 [H, W, 3]: triangles as wide as two new pixels."""
    def weights(n: int) -> np.ndarray:
        scale = n / size
        centres = (np.arange(size) + 0.5) * scale
        w = np.clip(1 - np.abs(np.arange(n) + 0.5 - centres[:, None]) / max(scale, 1), 0, None)
        return w / w.sum(axis=1, keepdims=True)

    return np.einsum("ah,bw,hwc->cab", weights(pixels.shape[0]), weights(pixels.shape[1]), pixels.astype(np.float64))


@pytest.mark.parametrize("shape", [(30, 45), (45, 30), (31, 31), (8, 90)])
def test_resizing_is_antialiased_and_central(tmp_path, shape):
    pixels, (h, w) = noise(*shape, 3), shape
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    square = pixels[top : top + side, left : left + side]
    for size in (8, 12, 30):
        shorter = one(tmp_path, encoded(pixels), "--size", size)
        assert np.abs(shorter - averaged(square, size)).max() <= 1.01  # two roundings to whole numbers
        squeezed = one(tmp_path, encoded(pixels), "--size", size, "--fit", "fixed")
        assert np.abs(squeezed - averaged(pixels, size)).max() <= 1.01
    np.testing.assert_array_equal(one(tmp_path, encoded(pixels), "--size", side), square.transpose(2, 0, 1))


def test_held_out_by_the_names_not_by_the_order(tmp_path):
    counts = {"a": 20, "b": 10, "c": 2}
    labels = {f"train/{name}/{i}.png": i for name, count in counts.items() for i in range(count)}
    files = {path: encoded(np.full((2, 2), number, np.uint8)) for path, number in labels.items()}
    for name, listed in (("one", files), ("two", dict(reversed(files.items())))):
        write_files(tmp_path / name, listed)
    one, two = (prepared("imagefolder", tmp_path / n, tmp_path / f"{n}.h5", "--test-fraction", 0.3) for n in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    assert np.bincount(one.test.labels).tolist() == [6, 3, 1]
    values = [set(split.images[split.labels == 0, 0, 0, 0].tolist()) for split in (one.train, one.test)]
    assert values[0] | values[1] == set(range(20)) and not values[0] & values[1]
    assert values[1] != set(range(6))
    mask = held_out([b"x%d" % i for i in range(9)], [0] * 9, ["a"], 0.99)
    assert mask.sum() == 8, "one stays to be trained on"
    assert held_out([b"x%d" % i for i in range(9)], [0] * 9, ["a"], 0.01).sum() == 1, "one is for testing"


def test_names_of_classes_can_be_given(tmp_path, capsys):
    root = write_files(tmp_path / "source", FILES)
    (tmp_path / "names").write_text("Ameise\nKatze\n\nHund\n")
    for given in ("Ameise,Katze,Hund", tmp_path / "names"):
        found = prepared("imagefolder", root, tmp_path / "o.h5", "--class-names", given, "--overwrite")
        assert found.class_names == ("Ameise", "Katze", "Hund")
    assert "gives 2 names" in refusal(capsys, "imagefolder", root, tmp_path / "p.h5", "--class-names", "a,b")
    assert "different names" in refusal(capsys, "imagefolder", root, tmp_path / "p.h5", "--class-names", "a,b,a")


def test_the_splits_of_a_source(tmp_path, capsys):
    train, test = ({k.removeprefix(s): v for k, v in FILES.items() if k.startswith(s)} for s in ("train/", "test/"))
    files = {f"train/{k}": v for k, v in train.items()}
    for name in ("val", "valid", "validation"):
        root = write_files(tmp_path / name, files | {f"{name}/{k}": v for k, v in test.items()})
        assert len(prepared("imagefolder", root, tmp_path / f"{name}.h5").test) == 9
    root = write_files(tmp_path / "both", files | {f"{s}/{k}": v for s in ("test", "val") for k, v in test.items()})
    assert "--test-split" in refusal(capsys, "imagefolder", root, tmp_path / "both.h5")
    prepared("imagefolder", root, tmp_path / "both.h5", "--test-split", "val")
    assert "of test 9" in capsys.readouterr().out
    root = write_files(tmp_path / "alone", files)
    assert "--test-fraction 0.1" in refusal(capsys, "imagefolder", root, tmp_path / "no.h5")
    assert "has the split val already" in refusal(capsys, "imagefolder", tmp_path / "val", tmp_path / "no.h5",
                                                 "--test-fraction", "0.1")  # fmt: skip
    assert "no images in test/CLASS" in refusal(capsys, "imagefolder", root, tmp_path / "no.h5", "--test-split", "test")
    assert "no images in train/CLASS/, only in ant" in refusal(capsys, "imagefolder", root / "train", tmp_path / "no.h5")
    write_files(root, {"test/bird/1.png": FILES["test/ant/0.png"]})
    assert "test/bird/1.png is of class 'bird', which train lacks" in refusal(capsys, "imagefolder", root, tmp_path / "no.h5")


# Going on

CHILD = """
import os, signal, sys
from dpresnet.datasets import folder, prepare
folder.COMMIT_BYTES, folder.TOGETHER, original = 1, 2, folder.decode
count = 0
def decode(content, name, shaping):
    global count
    count += 1
    if count == int(sys.argv[1]) + 1:
        os.kill(os.getpid(), {how})
    return original(content, name, shaping)
folder.decode = decode
code = prepare.main(sys.argv[2:])
print("decoded", count)
sys.exit(code)
"""


def child(argv: list[object], at: int, how: str = "signal.SIGKILL") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", CHILD.replace("{how}", how), str(at), *map(str, argv)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)


@pytest.mark.parametrize("how, code", [("signal.SIGKILL", -signal.SIGKILL), ("signal.SIGINT", 130)])
def test_a_killed_program_goes_on_with_what_is_missing(tmp_path, how, code):
    root = write_files(tmp_path / "s", {f"train/{i % 3}/{i}.png": encoded(noise(8, 8, 3)) for i in range(60)})
    argv = ["imagefolder", root, tmp_path / "o.h5", "--test-fraction", 0.2, "--name", "x", "--size", "6", "--workers", "2"]
    killed = child(argv, 30, how)
    assert killed.returncode == code, killed.stderr
    assert not (tmp_path / "o.h5").exists() and "Traceback" not in killed.stderr
    done = int(np.fromfile(tmp_path / "o.h5.partial" / "status", np.uint8).sum())
    assert 10 <= done <= 30
    again = child(argv, 1000)
    assert (again.returncode, f"holds {done} of 60 images" in again.stderr) == (0, True), again.stderr
    assert f"decoded {60 - done}\n" in again.stdout
    assert not (tmp_path / "o.h5.partial").exists()
    assert child([*argv[:2], tmp_path / "p.h5", *argv[3:]], 1000).returncode == 0
    assert (tmp_path / "o.h5").read_bytes() == (tmp_path / "p.h5").read_bytes()


def test_other_options_or_another_listing_start_anew(tmp_path, monkeypatch, capsys):
    root, out, decoded = write_files(tmp_path / "s", FILES), tmp_path / "o.h5", []
    (root / "train/dog/z.png").write_bytes(FILES["train/dog/0.png"][:-30])
    original = folder.decode
    monkeypatch.setattr(folder, "decode", lambda *args: decoded.append(args[1]) or original(*args))

    def attempt(*flags: str, code: int = 78) -> tuple[bool, bool]:
        """Whether the first image was decoded, and whether it was said that all are."""
        decoded.clear()
        assert prepare.main(["imagefolder", str(root), str(out), "--workers", "1", *flags]) == code
        said = capsys.readouterr().err
        assert ("train/dog/z.png: it is damaged" in said) == bool(code)
        return "train/ant/0.png" in decoded, "starting anew" in said

    monkeypatch.setattr(folder, "TOGETHER", 1)
    assert attempt("--size", "4") == (True, False)
    assert attempt("--size", "4") == (False, False)
    assert attempt("--size", "5") == (True, True)
    os.utime(root / "train/ant/0.png", ns=(1, 1))
    assert attempt("--size", "5") == (True, True)
    assert attempt("--size", "5", "--skip-bad", code=0) == (False, False)


def test_images_are_on_disk_before_their_status(tmp_path):
    staging, flushed = folder.Staging(tmp_path / "s", "plan", 4), []
    staging.begin((1, 2, 2))
    staging.images[1] = 7
    staging.images.flush = lambda: flushed.append(staging.status.tolist())
    staging.status.flush = lambda: flushed.append(staging.status.tolist())
    staging.commit([1])
    assert flushed == [[0, 0, 0, 0], [0, 1, 0, 0]]
    assert staging.missing.tolist() == [0, 2, 3]
    staging.close(remove=False)
    again = folder.Staging(tmp_path / "s", "plan", 4)
    assert again.found and again.shape == (1, 2, 2) and again.images[1].tolist() == [[[7, 7], [7, 7]]]
    again.close(remove=True)


def test_a_second_run_does_not_meddle_with_the_first(tmp_path, capsys):
    root = write_files(tmp_path / "s", FILES)
    staging = folder.Staging(tmp_path / "o.h5.partial", "plan", 3)
    assert "in use by another run" in refusal(capsys, "imagefolder", root, tmp_path / "o.h5")
    staging.close(remove=False)
    prepared("imagefolder", root, tmp_path / "o.h5")


def test_an_existing_file_is_kept_unless_it_is_to_be_overwritten(tmp_path, capsys):
    root, out = write_files(tmp_path / "s", FILES), tmp_path / "o.h5"
    prepared("imagefolder", root, out)
    assert "exists: give another name, or --overwrite" in refusal(capsys, "imagefolder", root, out)
    prepared("imagefolder", root, out, "--overwrite", "--size", "4")
    assert "ends in .h5" in refusal(capsys, "imagefolder", root, tmp_path / "o.zip")
    assert "no folder" in refusal(capsys, "imagefolder", root, tmp_path / "none" / "o.h5")


def test_too_little_room_is_refused_before_decoding(tmp_path, capsys, monkeypatch):
    root = write_files(tmp_path / "s", FILES)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))
    assert "make room" in refusal(capsys, "imagefolder", root, tmp_path / "o.h5")
