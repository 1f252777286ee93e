"""Recipes: what a file may say, and what wins."""

import pytest

from dpresnet import recipe
from dpresnet.commandline import parse
from dpresnet.config import Config
from dpresnet.errors import Refused


def written(folder, text):
    path = folder / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def refusal(name):
    with pytest.raises(Refused) as caught:
        parse(["--recipe", name])
    return str(caught.value)


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    path = written(tmp_path, 'arch = "resnet56"\nlr = 1\nnesterov = false\n')
    cfg = parse(["--lr", "0.25", "--recipe", path])
    assert (cfg.arch, cfg.lr, cfg.nesterov, cfg.momentum) == ("resnet56", 0.25, False, Config.momentum)
    assert cfg.recipe == path
    assert parse(["--recipe", path, "--nesterov"]).nesterov


def test_whole_numbers_are_numbers(tmp_path):
    cfg = parse(["--recipe", written(tmp_path, "lr = 1\nwarmup_epochs = 2")])
    assert (type(cfg.lr), cfg.lr, type(cfg.warmup_epochs)) == (float, 1.0, float)


def test_what_a_recipe_leaves_open_follows_from_what_it_says(tmp_path):
    cfg = parse(["--recipe", written(tmp_path, 'epochs = 1\ndataset = "flowers.h5"')])
    assert (cfg.warmup_epochs, cfg.out) == (0.5, "runs/flowers-resnet20")


@pytest.mark.parametrize(("text", "said"), [
    ("epoch = 3", "'epoch' is no setting; did you mean epochs?"),
    ("colour = 3", "'colour' is no setting"),
    ("epochs = 2.5", "epochs = 2.5 is not a whole number"),
    ("epochs = true", "epochs = True is not a whole number"),
    ("lr = nan", "lr = nan is not a finite number"),
    ('nesterov = "yes"', "nesterov = 'yes' is not True or False"),
    ('resume = "auto"', "'resume' belongs on the command line"),
    ('recipe = "digits-resnet20"', "'recipe' belongs on the command line"),
    ("[run]\nepochs = 3", "'run' is no setting"),
    ("epochs = ", "not a TOML file: "),
    ("lr = 1\nlr = 2", "not a TOML file: "),
    (b"# \xff", "not a TOML file: "),
])  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(tmp_path, text, said):
    path = written(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"--recipe {path}: ") and said in message and "\n" not in message


def test_values_are_checked_as_those_of_flags(tmp_path):
    assert refusal(written(tmp_path, "epochs = 0")) == "--epochs 0 is out of range: it must be at least 1"
    assert "is for --dataset synthetic" in refusal(written(tmp_path, "image = 8"))


def test_recipes_that_do_not_exist(tmp_path):
    assert "did you mean digits-resnet20?" in refusal("digits-resnet2")
    missing = str(tmp_path / "none.toml")
    assert refusal(missing) == f"--recipe {missing}: cannot be read: No such file or directory"


@pytest.mark.parametrize("name", recipe.names())
def test_those_that_come_along_are_valid_and_short(name):
    """And say first what they are."""
    text = (recipe.FOLDER / f"{name}.toml").read_text()
    assert text.startswith("# ") and text.count("\n") <= 30
    cfg = parse(["--recipe", name])
    assert {key: getattr(cfg, key) for key in recipe.load(name)} == recipe.load(name)
    assert cfg.out == f"runs/{cfg.dataset.removesuffix('.h5')}-{cfg.arch}"
