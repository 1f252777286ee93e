"""Recipes: settings that belong together, in small TOML files of which each key is a field of `dpresnet.config.Config`.

Those that come with the program lie in the folder recipes/. A flag beside ``--recipe`` wins over the recipe, the recipe over
the defaults; config.json of a run holds what came out.
"""

import tomllib
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from dpresnet.config import EXPECTED, Config, is_a, nearest
from dpresnet.errors import Refused

FOLDER = Path(__file__).with_name("recipes")
OF_ONE_RUN = ("recipe", "resume", "debug", "dry_run")  # what is asked of a single run, not said of all


def names() -> list[str]:
    """The recipes that come with the program."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> dict[str, Any]:
    """The settings of the recipe ``name``, or of the file of that path if it ends in .toml.

    Raises Refused for a recipe that does not exist, is no TOML, or has a key or a value that no flag has.
    """
    is_file = name.endswith(".toml")
    if not is_file and name not in names():
        raise Refused(f"--recipe {name!r} is none of {', '.join(names())}{nearest(name, names())} "
                      "Or give a file: FILE.toml")  # fmt: skip
    path = Path(name) if is_file else FOLDER / f"{name}.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"--recipe {name}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # of the encoding or of TOML
        raise Refused(f"--recipe {name}: not a TOML file: {error}") from None
    known = {spec.name: spec for spec in fields(Config) if spec.name not in OF_ONE_RUN}
    for key, value in values.items():
        _check(name, key, value, known)
    return {key: known[key].type(value) for key, value in values.items()}


def _check(name: str, key: str, value: Any, known: dict[str, Field]) -> None:
    if key not in known:
        said = " belongs on the command line" if key in OF_ONE_RUN else f" is no setting{nearest(key, known)}"
        raise Refused(f"--recipe {name}: {key!r}{said}")
    if not is_a(value, known[key].type):
        raise Refused(f"--recipe {name}: {key} = {value!r} is not {EXPECTED[known[key].type]}")
