"""Runs with every augmentation: the same bits on any ranks, after going on elsewhere, when checked, and when repeated."""

import json

import numpy as np
import pytest

from dpresnet.config import AUGMENTS
from dpresnet.data import Split
from dpresnet.datasets import schema
from tests.launching import python
from tests.system.test_train import curve, sha, succeed

AUGMENTED = ("--resized-crop", "0.2", "--crop-size", "8", "--flip", "on", "--jitter", "0.4", "--erase", "0.5", "--cutout", "2",
             "--mixup", "0.4", "--cutmix", "1")  # fmt: skip


@pytest.mark.limit(300)
def test_an_augmented_run_has_the_same_bits_everywhere(tmp_path):
    """Images are not square, the last batch of an epoch is short, gradients are accumulated, and a run goes on in mid-epoch."""
    rng = np.random.default_rng(0)
    train, test = (Split(rng.integers(0, 256, (n, 3, 9, 12), np.uint8), (np.arange(n) % 3).astype(np.int32)) for n in (53, 9))
    file = tmp_path / "random.h5"
    schema.write(file, schema.assemble("random", "made here", "none", tuple("abc"), train, test))
    base = ("--dataset", str(file), "--replicas", "2", "--batch", "5", "--accumulate", "2", "--epochs", "2", *AUGMENTED,
            "--save-every-epochs", "0", "--save-every-steps", "2")  # fmt: skip
    together, parted = tmp_path / "together", tmp_path / "parted"
    assert succeed(2, together, base=base)["steps"] == 6
    verified = python(["-m", "dpresnet.verify", together])
    assert verified.returncode == 0 and "every bit the same" in verified.stdout, verified.stderr
    succeed(0, parted, "--steps", "4", "--debug", base=base)
    assert succeed(2, parted, "--resume", "auto", base=base)["params_sha256"] == sha(together)
    assert curve(parted) == curve(together)


def test_a_run_of_an_older_version_is_repeated_as_it_was(tmp_path):
    """A configuration that lacks the flags is that of a run which cropped and flipped as runs do by default."""
    base = ("--dataset", "synthetic", "--image", "9", "--replicas", "1", "--batch", "8", "--steps", "2")
    succeed(0, tmp_path, base=base)
    saved = tmp_path / "config.json"
    values = json.loads(saved.read_text())
    saved.write_text(json.dumps({name: value for name, value in values.items() if name not in ("augment", *AUGMENTS)}))
    assert python(["-m", "dpresnet.verify", tmp_path]).returncode == 0
