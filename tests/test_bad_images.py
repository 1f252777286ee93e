"""Image files and archives that cannot be used are refused by name and reason, or left out and listed; none does harm."""

import io
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpresnet.datasets import folder, images, prepare, schema, sources
from tests.preparing import prepared, refusal, write_files


def encoded(kind: str, shape: tuple[int, ...] = (8, 8, 3)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8)).save(file, kind)
    return file.getvalue()


PNG, JPEG, WEBP, GIF = (encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF"))
GOOD = {f"{split}/{name}/{i}.png": PNG for split in ("train", "test") for name in "ab" for i in range(2)}


def png_of(width: int, height: int) -> bytes:
    """A PNG file whose header announces so many pixels, of which there are none."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


BAD = {
    "train/a/cut.png": (PNG[:-40], "it is damaged"),
    "train/a/cut.jpg": (JPEG[:-100], "it is damaged"),
    "train/a/cut.webp": (WEBP[:-30], "it is damaged|no JPEG, PNG or WebP"),
    "train/a/header.png": (PNG[:20], "it is damaged|no JPEG, PNG or WebP"),
    "train/a/flipped.png": (flipped(PNG, 20), "it is damaged|no JPEG, PNG or WebP"),
    "train/a/empty.jpg": (b"", "it is empty"),
    "train/a/text.jpg": (b"not an image at all", "its content is no JPEG, PNG or WebP image"),
    "train/a/gif.png": (GIF, "its content is no JPEG, PNG or WebP image"),
    "train/a/jpeg.png": (JPEG, "its content is JPEG, its name says png"),
    "train/a/png.jpeg": (PNG, "its content is PNG, its name says jpeg"),
    "train/a/webp.jpg": (WEBP, "its content is WEBP, its name says jpg"),
    "train/a/many.png": (png_of(9000, 8000), "it has 9000 x 8000 pixels, more than 64,000,000"),
    "train/a/bomb.png": (png_of(60_000, 60_000), "it has more than 64,000,000 pixels"),
    "train/loose.png": (PNG, "an image belongs in SPLIT/CLASS/"),
    "train/a/deep/er.png": (PNG, "an image belongs in SPLIT/CLASS/"),
    "other/a/0.png": (PNG, "an image belongs in SPLIT/CLASS/"),
    "loose.png": (PNG, "an image belongs in SPLIT/CLASS/"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_name_and_reason(name, tmp_path, capsys):
    content, reason = BAD[name]
    root = write_files(tmp_path / "s", GOOD | {name: content})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own, on the terminal, would only confuse
        line = refusal(capsys, "imagefolder", root, tmp_path / "o.h5")
    assert f"{root}: {name}: " in line and "--skip-bad" in line
    assert any(part in line for part in reason.split("|")), line


def test_all_bad_files_are_left_out_and_listed_on_request(tmp_path, capsys):
    files = GOOD | {name: content for name, (content, _) in BAD.items()}
    root, out = write_files(tmp_path / "s", files), tmp_path / "o.h5"
    dataset = prepared("imagefolder", root, out, "--skip-bad")
    clean = prepared("imagefolder", write_files(tmp_path / "clean" / "s", GOOD), tmp_path / "clean.h5")
    assert dataset.fingerprint == clean.fingerprint
    listed = (tmp_path / "o.h5.skipped.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == sorted(BAD)
    assert all(any(p in line for p in BAD[line.split(": ")[0]][1].split("|")) for line in listed)
    said = capsys.readouterr().out
    assert f"skipped {len(BAD)} files" in said and "\n  loose.png: an image" in said
    assert sum(line in said for line in listed) == prepare.SHOWN
    prepared("imagefolder", tmp_path / "clean" / "s", out, "--overwrite", "--skip-bad")
    assert not (tmp_path / "o.h5.skipped.txt").exists()


def test_the_flag_takes_the_place_of_pillows_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # below half of the pixels Pillow would refuse
    assert images.decode(PNG, "a.png", images.Shaping()).shape == (3, 8, 8)


def test_a_jpeg_cut_anywhere_is_refused_or_whole(tmp_path):
    whole = images.decode(JPEG, "a.jpg", images.Shaping())
    refused = 0
    for length in range(len(JPEG)):
        try:
            np.testing.assert_array_equal(images.decode(JPEG[:length], "a.jpg", images.Shaping()), whole)
        except images.Unusable:
            refused += 1
    assert refused >= len(JPEG) - 3, "only the mark at its end may be missing"


def test_classes_without_usable_images_are_refused(tmp_path, capsys):
    root = write_files(tmp_path / "s", GOOD | {"train/c/0.png": PNG[:-40]})
    assert "no image of class 'c' can be used" in refusal(capsys, "imagefolder", root, tmp_path / "o.h5", "--skip-bad")
    root = write_files(tmp_path / "t", {k: v if "train" in k else PNG[:-40] for k, v in GOOD.items()})
    assert "no image of the test split" in refusal(capsys, "imagefolder", root, tmp_path / "o.h5", "--skip-bad")
    root = write_files(tmp_path / "u", dict.fromkeys(GOOD, PNG[:-40]))
    assert "none of its 8 images" in refusal(capsys, "imagefolder", root, tmp_path / "o.h5", "--skip-bad")
    root = write_files(tmp_path / "v", {"train/a/0.png": PNG, "train/b/0.png": PNG})
    assert "class a has a single sample" in refusal(capsys, "imagefolder", root, tmp_path / "o.h5", "--test-fraction", "0.5")


def test_images_of_several_sizes_need_a_size(tmp_path, capsys):
    root = write_files(tmp_path / "s", GOOD | {f"train/b/{i}.png": encoded("PNG", (8, 9 - i, 3)) for i in (3, 4)})
    line = refusal(capsys, "imagefolder", root, tmp_path / "o.h5", "--skip-bad", "--workers", "7")
    assert "train/b/3.png has 6 x 8 pixels, those before it have 8 x 8" in line and "--size 224" in line
    assert prepared("imagefolder", root, tmp_path / "o.h5", "--size", "8").shape == (3, 8, 8)


def test_pixels_and_files_that_are_admitted_follow_the_flag(tmp_path, capsys):
    root = write_files(tmp_path / "s", GOOD)
    assert "more than 63 (--max-pixels)" in refusal(capsys, "imagefolder", root, tmp_path / "o.h5", "--max-pixels", "63")
    prepared("imagefolder", root, tmp_path / "o.h5", "--max-pixels", "64")
    (root / "train/a/padded.png").write_bytes(PNG + b"\0" * images.Shaping(most_pixels=64).most_bytes)
    line = refusal(capsys, "imagefolder", root, tmp_path / "p.h5", "--max-pixels", "64")
    assert "train/a/padded.png: it has more than 1,048,832 bytes" in line


# Zip files


def zip_of(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in (*GOOD.items(), *members):
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../a.png", "train/../../a.png", "/etc/a.png", "C:/a.png", "c:a.txt", "train\\a\\0.png"])
@pytest.mark.parametrize("flags", [(), ("--skip-bad",)])
def test_zip_slips_are_always_refused(tmp_path, capsys, name, flags):
    line = refusal(capsys, "imagefolder", zip_of(tmp_path / "s.zip", (name, PNG)), tmp_path / "o.h5", *flags)
    assert repr(name) in line and "do not trust" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.zip"]


def patched(path: Path, member: str, offset: int, value: bytes, local: int | None = None) -> Path:
    """Overwrites bytes of a member's entry in the directory, and of its header if ``local`` is an offset there."""
    content = bytearray(path.read_bytes())
    entry = content.rindex(member.encode()) - 46
    content[entry + offset : entry + offset + len(value)] = value
    if local is not None:
        header = content.index(member.encode()) - 30
        content[header + local : header + local + len(value)] = value
    path.write_bytes(content)
    return path


def link(path: Path) -> Path:
    info = zipfile.ZipInfo("train/a/bad.png")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return zip_of(path, (info, b"/etc/passwd"))


def bomb(path: Path) -> Path:
    return zip_of(path, ("train/a/bad.png", bytes(300_000_000)))


def plain(path: Path) -> Path:
    return zip_of(path, ("train/a/bad.png", PNG))


ZIPS = {
    "link": (link, "it is a link"),
    "encrypted": (lambda p: patched(plain(p), "train/a/bad.png", 8, b"\1\0", 6), "it is encrypted"),
    "expands": (bomb, "it has more than 257,048,576 bytes"),
    "expands further than announced": (lambda p: patched(bomb(p), "train/a/bad.png", 24, struct.pack("<I", 1000), 22),
                                       "cannot be unpacked"),
    "other content than announced": (lambda p: patched(plain(p), "train/a/bad.png", 16, b"\1\2\3\4", 14), "cannot be unpacked"),
    "method": (lambda p: patched(plain(p), "train/a/bad.png", 10, b"\x63\0", 8), "cannot be unpacked"),
    "twice": (lambda p: zip_of(p, ("train/a/0.png", PNG)), "its name is there twice"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ZIPS)
def test_a_bad_member_is_refused_or_left_out(tmp_path, capsys, kind):
    make, reason = ZIPS[kind]
    path = make(tmp_path / "s.zip")
    line = refusal(capsys, "imagefolder", path, tmp_path / "o.h5")
    assert reason in line and ("train/a/bad.png" in line or kind == "twice")
    assert len(prepared("imagefolder", path, tmp_path / "o.h5", "--skip-bad").train) == 4
    assert (tmp_path / "o.h5.skipped.txt").read_text().count("\n") == 1


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_read_to_their_last_byte(tmp_path, compression):
    content = np.random.default_rng(1).bytes(10_000)
    with zipfile.ZipFile(tmp_path / "s.zip", "w", compression) as archive:
        archive.writestr("train/a/0.png", content)
    source = sources.open_source(tmp_path / "s.zip")
    (file,) = source.files()
    assert source.read(file, 10_000) == content
    with pytest.raises(images.Unusable, match="more than 9,999 bytes"):
        source.read(file, 9_999)
    source.close()


def test_the_memory_that_a_zip_bomb_takes_is_bounded(tmp_path):
    path = patched(bomb(tmp_path / "s.zip"), "train/a/bad.png", 24, struct.pack("<I", 1000), 22)
    code = r"""if True:
        import re, sys
        from dpresnet.datasets import prepare
        code = prepare.main(["imagefolder", *sys.argv[1:], "--skip-bad"])
        print(code, re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])
        """
    done = subprocess.run([sys.executable, "-c", code, path, tmp_path / "o.h5"], capture_output=True, text=True, check=True)
    code, peak = done.stdout.splitlines()[-1].split()
    assert int(code) == 0 and int(peak) < 150 * 1024


def test_what_is_no_source_is_refused(tmp_path, capsys):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "torn.zip").write_bytes(plain(tmp_path / "s.zip").read_bytes()[:-200])
    assert "does not exist" in refusal(capsys, "imagefolder", tmp_path / "none", tmp_path / "o.h5")
    for name in ("text", "torn.zip"):
        assert "neither a folder nor a zip file" in refusal(capsys, "imagefolder", tmp_path / name, tmp_path / "o.h5")
    (tmp_path / "empty").mkdir()
    assert "only in nothing" in refusal(capsys, "imagefolder", tmp_path / "empty", tmp_path / "o.h5")


# Names and links


def test_names_that_are_no_text_do_no_harm(tmp_path, capsys):
    root = write_files(tmp_path / "s", GOOD)
    (root / "train/a/new\nline.png").write_bytes(b"bad")
    with open(bytes(root) + b"/train/a/\xff.png", "wb") as file:
        file.write(b"bad")
    assert r"train/a/new\nline.png" in refusal(capsys, "imagefolder", root, tmp_path / "o.h5")
    prepared("imagefolder", root, tmp_path / "o.h5", "--skip-bad")
    assert [line.split(":")[0] for line in (tmp_path / "o.h5.skipped.txt").read_text().splitlines()] == [
        r"train/a/new\nline.png", r"train/a/\udcff.png"]  # fmt: skip
    (root / "train/b").rename(root / "train/\udcff")
    (root / "test/b").rename(root / "test/\udcff")
    assert "not UTF-8" in refusal(capsys, "imagefolder", root, tmp_path / "p.h5", "--skip-bad")


def test_links_in_folders_are_followed_but_not_in_circles(tmp_path):
    root = write_files(tmp_path / "s", GOOD)
    (root / "train/a/linked.png").symlink_to(root / "train/b/0.png")
    (root / "train/c").symlink_to(root / "train/a")
    (root / "train/a/circle").symlink_to(root)
    (root / "test/a/gone.png").symlink_to(root / "nowhere.png")
    dataset = prepared("imagefolder", root, tmp_path / "o.h5", "--skip-bad")
    assert np.bincount(dataset.train.labels).tolist() == [3, 2, 3]
    assert (tmp_path / "o.h5.skipped.txt").read_text() == "test/a/gone.png: it cannot be read (No such file or directory)\n"


def test_without_pillow_the_remedy_is_named(tmp_path, capsys, monkeypatch):
    root = write_files(tmp_path / "s", GOOD)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install 'dpresnet[images]'" in refusal(capsys, "imagefolder", root, tmp_path / "o.h5")


@pytest.mark.parametrize("flags, words", [
    (("--size", "0"), "'0' is not a whole number above 0"), (("--fit", "wide"), "--fit"), (("--channels", "2"), "--channels"),
    (("--test-fraction", "1"), "'1' is not a number between 0 and 1"), (("--workers", "two"), "'two'"), (("--turn",), "--turn"),
    (("--name", "\udcff"), "--name '\\udcff' is not UTF-8"), (("--licence", "\udcff"), "--licence '\\udcff' is not UTF-8"),
])  # fmt: skip
def test_bad_flags_are_one_line(tmp_path, capsys, flags, words):
    assert words in refusal(capsys, "imagefolder", write_files(tmp_path / "s", GOOD), tmp_path / "o.h5", *flags)


def test_the_staging_is_not_trusted_where_it_is_torn(tmp_path, capsys):
    root = write_files(tmp_path / "s", GOOD)
    write_files(tmp_path / "o.h5.partial", {"plan.json": b'{"plan": "', "images": b"x", "status": b"\1" * 8})
    dataset = prepared("imagefolder", root, tmp_path / "o.h5")
    assert dataset.fingerprint == prepared("imagefolder", root, tmp_path / "p.h5").fingerprint
    assert isinstance(dataset.train, schema.Split) and not list(tmp_path.glob("*.partial")) and folder.COMMIT_BYTES > 0
