"""The configuration of a run: one frozen dataclass, from which `dpresnet.commandline` is generated.

Every field of `Config` is a flag (``save_every_steps`` is ``--save-every-steps``) and carries its own help, group and
limits, so there is no second list to keep in step. ``replicas``, ``num_classes`` and ``threads`` are 0 and ``shortcut``
is "auto" until the program knows the data set and the ranks; it then makes the *resolved* configuration with
`dataclasses.replace`, validates that once more, and works with nothing else.
"""

import difflib
import hashlib
import json
import math
import operator
from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from dpresnet.errors import Refused

IMAGENET_ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
                  "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2")
CIFAR_ARCHS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
PLAIN_ARCHS = ("plain20", "plain32", "plain44", "plain56")

BUILT_IN_DATASETS = ("digits", "synthetic")
AUGMENTS = ("crop_padding", "resized_crop", "flip", "jitter", "erase", "cutout", "mixup", "cutmix")  # with --augment

RESUMABLE = frozenset({
    "recipe",  # what it says is in the other fields
    "steps",  # stops the run early; the schedule spans --epochs whatever it is
    "check_every", "timeout",
    "bucket_mb", "first_bucket_mb", "overlap",  # sums are taken element by element, wherever buckets end and whenever they go
    "out", "resume", "save_every_epochs", "save_every_steps", "keep", "record_every", "tensorboard", "trace", "trace_steps",
    "device", "threads", "bind", "debug", "dry_run",
    "data_mb",  # the samples are the same, from memory or from the file
})
"""The fields that a resumed run may change, because they do not enter the mathematics. ``epochs`` joins them where the
schedule is "constant", and a data set may move to another folder: its fingerprint is compared when it is opened."""


def _flag(default: Any, group: str, text: str, **limits: Any) -> Any:
    """A field with its help; `limits` are choices, least, most, above, below (see `_check`), metavar and shown.

    ``only`` = (another field, its values) says where the flag has a meaning: elsewhere a command line may not give it.
    """
    return field(default=default, metadata={"group": group, "help": text, **limits})


@dataclass(frozen=True)
class Config:
    """All that a run depends on. ``python -m dpresnet.train --help`` explains the fields; `validate` checks them."""

    arch: str = _flag("resnet20", "model", "network", choices=IMAGENET_ARCHS + CIFAR_ARCHS + PLAIN_ARCHS)
    stem: str = _flag("cifar", "model", "first layers: 7x7/2 and max pooling, 3x3, or three 3x3 and max pooling",
                      choices=("imagenet", "cifar", "deep"))
    shortcut: str = _flag("auto", "model", "where shapes change: A pads with zeros, B projects; C projects everywhere; "
                          "auto is A for the CIFAR family, else B", choices=("auto", "A", "B", "C"))
    block: str = _flag("v1.5", "model", "stride on the first 1x1 (v1), on the 3x3 (v1.5), or pre-activation (v2)",
                       choices=("v1", "v1.5", "v2"))
    zero_init_residual: bool = _flag(False, "model", "start the last scale of every residual branch at 0")
    num_classes: int = _flag(0, "model", "classes; 0: as many as the data set has", least=0)

    dataset: str = _flag("digits", "data", "digits, synthetic, or a data set file in this project's HDF5 format",
                         metavar="NAME|FILE.h5")
    image: int = _flag(32, "data", "height and width in pixels, for synthetic only", least=1)
    channels: int = _flag(3, "data", "colour channels, for synthetic only", least=1)
    data_mb: float = _flag(4096.0, "data", "MiB of samples that a rank keeps in memory; a larger file is read again in every "
                           "epoch", above=0.0)

    augment: bool = _flag(True, "augmentation", "change the images of training at random, by seed, epoch and sample, as the "
                          "flags below say")
    crop_padding: int = _flag(-1, "augmentation", "random crops of the image with so many black pixels around it; -1: an "
                              "eighth of the image, unless it is cropped in another way", least=-1)
    resized_crop: float = _flag(0.0, "augmentation", "random crops of any shape, scaled to the size of the network: the "
                                "smallest share of the area, such as 0.08; 0: off", least=0.0, most=1.0)
    crop_size: int = _flag(0, "augmentation", "height and width that the network gets, if smaller than stored images: training "
                           "crops at random, evaluation in the middle; 0: as stored", least=0)
    flip: str = _flag("auto", "augmentation", "mirror every other image; auto: colour images only",
                      choices=("auto", "on", "off"))
    jitter: float = _flag(0.0, "augmentation", "largest relative change of brightness, contrast and saturation, such as 0.4; "
                          "0: off", least=0.0, most=1.0)
    erase: float = _flag(0.0, "augmentation", "probability of erasing a rectangle of 0.02 to 0.4 of the area", least=0.0,
                         most=1.0)
    cutout: int = _flag(0, "augmentation", "height and width of a square cut out of every image; 0: off", least=0)
    mixup: float = _flag(0.0, "augmentation", "blend pairs of images and their labels, by shares from Beta(X, X); 0: off",
                         least=0.0, most=100.0)
    cutmix: float = _flag(0.0, "augmentation", "paste a rectangle of another image, of a share from Beta(X, X), and mix the "
                          "labels; with --mixup one of both, equally often; 0: off", least=0.0, most=100.0)

    recipe: str = _flag("", "run", "settings to start from; the flags beside it win", metavar="NAME|FILE.toml", shown="none")
    batch: int = _flag(32, "run", "samples per replica and step", least=1)
    replicas: int = _flag(0, "run", "replicas in all, a multiple of the ranks: they fix the arithmetic, the ranks "
                          "only the speed; 0: one per rank", least=0)
    accumulate: int = _flag(1, "run", "micro-batches per step: their gradients are added before the replicas "
                            "exchange them", least=1)
    bn: str = _flag("sync", "run", "batch norm statistics: of all replicas (sync), of each (local), or of every K neighbouring "
                    "ones (group:K)", metavar="sync|local|group:K")
    precision: str = _flag("fp16", "run", "storage of activations and working weights; sums and masters are fp32",
                           choices=("fp16", "fp32"))
    epochs: int = _flag(25, "run", "passes over the training set", least=1)
    steps: int = _flag(0, "run", "stop after so many steps in all, the schedule as it was; 0: no limit", least=0)
    seed: int = _flag(0, "run", "fixes initial weights, order of samples and augmentation", least=0, most=2**32 - 1)

    optimizer: str = _flag("sgd", "optimisation", "SGD with momentum, the same with a rate for each layer (LARS), or AdamW",
                           choices=("sgd", "lars", "adamw"))
    lr: float = _flag(0.4, "optimisation", "peak learning rate per 256 samples of global batch: a step uses "
                      "lr * replicas * batch * accumulate / 256", least=0.0, shown="0.4; adamw 0.001")
    schedule: str = _flag("cosine", "optimisation", "after the warm-up: along a cosine or a polynomial, constant, in steps, or "
                          "one cycle, up from lr / 25 and down to lr / 250000 along a cosine",
                          choices=("cosine", "constant", "step", "onecycle", "polynomial"))
    warmup_epochs: float = _flag(2.0, "optimisation", "linear warm-up", least=0.0,
                                 shown="2.0, at most half the run; onecycle 0.3 of it")
    final_lr: float = _flag(0.0, "optimisation", "share of the peak at which cosine and polynomial end", least=0.0, most=1.0,
                            only=("schedule", ("cosine", "polynomial")))
    power: float = _flag(2.0, "optimisation", "exponent of the polynomial", above=0.0, only=("schedule", ("polynomial",)))
    milestones: str = _flag("", "optimisation", "epochs after which the learning rate of step falls", metavar="E,E,...",
                            shown="1/2 and 3/4 of the run", only=("schedule", ("step",)))
    gamma: float = _flag(0.1, "optimisation", "factor at each milestone", above=0.0, most=1.0, only=("schedule", ("step",)))
    momentum: float = _flag(0.9, "optimisation", "momentum of SGD and LARS", least=0.0, below=1.0,
                            only=("optimizer", ("sgd", "lars")))
    nesterov: bool = _flag(True, "optimisation", "Nesterov's form of momentum, of SGD", only=("optimizer", ("sgd",)))
    beta1: float = _flag(0.9, "optimisation", "AdamW: what the mean of gradients keeps in a step", least=0.0, below=1.0,
                         only=("optimizer", ("adamw",)))
    beta2: float = _flag(0.999, "optimisation", "AdamW: what the mean of their squares keeps", least=0.0, below=1.0,
                         only=("optimizer", ("adamw",)))
    eps: float = _flag(1e-8, "optimisation", "AdamW: added to the root of that mean", least=1e-30,
                       only=("optimizer", ("adamw",)))
    trust: float = _flag(0.001, "optimisation", "LARS: factor of a layer's learning rate, the norm of its weights by that of "
                         "its gradient", above=0.0, only=("optimizer", ("lars",)))
    weight_decay: float = _flag(5e-4, "optimisation", "L2 penalty, added to the gradient; of AdamW decoupled from it",
                                least=0.0, shown="0.0005; adamw 0.01")
    decay: str = _flag("all", "optimisation", "what decays: all parameters, or weights without biases, scales and shifts; "
                       "LARS does not scale these either then", choices=("all", "weights"))
    clip_norm: float = _flag(0.0, "optimisation", "largest norm of the gradient of a step; 0: no limit", least=0.0)
    ema: float = _flag(0.0, "optimisation", "what a moving average of parameters and statistics keeps in a step, evaluated "
                       "besides them; 0: none", least=0.0, below=1.0)
    label_smoothing: float = _flag(0.1, "optimisation", "target share given to all classes", least=0.0, below=1.0)

    reduce: str = _flag("tree", "parallel", "how gradients are summed: in one tree over the replicas, with the same bits on "
                        "any ranks, or in an order of the MPI library's", choices=("tree", "mpi"))
    wire: str = _flag("fp32", "parallel", "how gradients travel; with 16 bits each replica's are rounded once, and their sum "
                      "once more", choices=("fp32", "fp16", "bf16"))
    bucket_mb: float = _flag(25.0, "parallel", "gradient bytes that are reduced at once, in MiB", above=0.0)
    first_bucket_mb: float = _flag(1.0, "parallel", "the same for the first bucket, small to start early", above=0.0)
    overlap: bool = _flag(True, "parallel", "sum gradients while backward goes on; off: after it, for comparison")
    check_every: int = _flag(100, "parallel", "steps between comparisons of the parameters that the ranks hold, besides those "
                             "before every checkpoint; 0: none", least=0)
    timeout: float = _flag(300.0, "parallel", "seconds that a rank waits for others before it names them and ends the run; ten "
                           "times the longest step if that is more; 0: for ever", least=0.0)

    out: str = _flag("runs/digits-resnet20", "output", "folder for configuration, metrics, checkpoints and result",
                     metavar="FOLDER", shown="runs/DATASET-ARCH")
    resume: str = _flag("", "output", "go on from this checkpoint; auto: from the newest good one in --out, if any",
                        metavar="auto|FILE", shown="start anew")
    save_every_epochs: int = _flag(5, "output", "epochs between checkpoints; 0: none at epochs", least=0)
    save_every_steps: int = _flag(0, "output", "steps between checkpoints; 0: none at steps", least=0)
    keep: int = _flag(3, "output", "how many of the newest checkpoints stay, besides the best", least=1)
    record_every: int = _flag(0, "output", "steps between those whose every tensor leaves a digest in OUT/trail, for "
                              "python -m dpresnet.verify; 0: none", least=0)

    tensorboard: bool = _flag(False, "output", "the lines of metrics.jsonl also as event files in OUT/tensorboard")
    trace: str = _flag("", "output", "what all ranks do in the first steps of this run, for ui.perfetto.dev (.gz: compressed)",
                       metavar="FILE", shown="none")
    trace_steps: int = _flag(20, "output", "how many steps the trace covers; 0: all", least=0)

    device: str = _flag("auto", "device", "OpenCL device: its index, or part of its name", metavar="auto|INDEX|NAME")
    threads: int = _flag(0, "device", "CPU threads per rank; 0: cores / ranks on the node", least=0)
    bind: bool = _flag(True, "device", "keep the ranks of a node on separate cores, if there are enough and the launcher has "
                       "bound none")
    debug: bool = _flag(False, "device", "one process, synchronous launches, every output checked for NaN and inf")
    dry_run: bool = _flag(False, "device", "print the plan and its memory, then stop")


def flag_name(name: str) -> str:
    """The flag of a field: "save_every_steps" -> "--save-every-steps"."""
    return "--" + name.replace("_", "-")


# -------------------------------------------------------------------------------------------------- validation

EXPECTED = {int: "a whole number", float: "a finite number", str: "text", bool: "True or False"}
_BOUNDS = {
    "least": (operator.ge, "at least"),
    "most": (operator.le, "at most"),
    "above": (operator.gt, "greater than"),
    "below": (operator.lt, "less than"),
}


def validate(cfg: Config) -> None:
    """Raise `Refused` for the first value, or combination of values, that cannot work whatever the machine.

    To be called again on the resolved configuration: some combinations show only once the replicas are known.
    """
    for spec in fields(Config):
        _check(cfg, spec)
    _check_dataset(cfg)
    _check_augmentation(cfg)
    _check_model(cfg)
    _check_statistics(cfg)
    milestones_of(cfg)
    if cfg.reduce == "mpi" and cfg.wire != "fp32":
        refuse(cfg, "wire", "needs --reduce tree: the MPI library adds fp32 numbers only")
    if cfg.warmup_epochs > cfg.epochs:
        refuse(cfg, "warmup_epochs", f"is longer than the run of --epochs {cfg.epochs}: shorten it or raise --epochs")


def _check(cfg: Config, spec: Field) -> None:
    value, limits = getattr(cfg, spec.name), spec.metadata
    if not is_a(value, spec.type):
        refuse(cfg, spec.name, f"is not {EXPECTED[spec.type]}")
    if value == "" and spec.default != "":
        refuse(cfg, spec.name, f"is empty: give a value or leave the flag out (default: {spec.default})")
    choices = limits.get("choices")
    if choices and value not in choices:
        refuse(cfg, spec.name, f"is none of {', '.join(choices)}{nearest(value, choices)}")
    for bound, (holds, words) in _BOUNDS.items():
        if bound in limits and not holds(value, limits[bound]):
            refuse(cfg, spec.name, f"is out of range: it must be {words} {limits[bound]}")


def is_a(value: Any, kind: type) -> bool:
    """Whether a field of this type can hold the value.

    Whole numbers count as floats, as JSON writes them; True and False are no numbers; nan and inf are neither.
    """
    if bool in (kind, type(value)):
        return kind is type(value)
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def refuse(cfg: Config, name: str, reason: str) -> NoReturn:
    """Raises Refused, naming the flag and its value."""
    raise Refused(f"{flag_name(name)} {getattr(cfg, name)!r} {reason}")


def nearest(word: str, known: Collection[str]) -> str:
    """"; did you mean ...?" where a known word is near."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _check_dataset(cfg: Config) -> None:
    is_file = Path(cfg.dataset).suffix in (".h5", ".hdf5")
    if cfg.dataset not in BUILT_IN_DATASETS and not is_file:
        refuse(cfg, "dataset", f"is none of digits, synthetic, FILE.h5{nearest(cfg.dataset, BUILT_IN_DATASETS)}")
    if cfg.num_classes == 1:
        refuse(cfg, "num_classes", "leaves nothing to learn: give at least 2, or 0 to take them from the data set")


def _check_augmentation(cfg: Config) -> None:
    if cfg.resized_crop and cfg.crop_padding > 0:
        refuse(cfg, "crop_padding", "and --resized-crop are two ways to crop: leave one of them out")
    if not cfg.augment:
        names = [name for name in AUGMENTS if getattr(cfg, name) != getattr(Config, name)]
        if names:
            refuse(cfg, names[0], "has no effect with --no-augment: leave one of them out")


def _check_model(cfg: Config) -> None:
    plain = cfg.arch in PLAIN_ARCHS
    if plain and cfg.shortcut in ("B", "C"):
        refuse(cfg, "shortcut", f"has no meaning for {cfg.arch}, which has no shortcuts: use auto")
    if plain and cfg.zero_init_residual:
        refuse(cfg, "zero_init_residual", f"would zero the only path through {cfg.arch}: use a residual network")


def _check_statistics(cfg: Config) -> None:
    """The variance of a single value is 0, so every normalised activation would be a constant."""
    sharing = statistics_group(cfg.bn, cfg.replicas)
    if cfg.dataset == "synthetic" and cfg.batch * sharing * _smallest_map(cfg) ** 2 == 1:
        name = "crop_size" if cfg.crop_size else "image"
        refuse(cfg, name, f"leaves batch norm one value per channel in the last layers: raise {flag_name(name)} or --batch")


def _smallest_map(cfg: Config) -> int:
    """Height of the last feature map for a synthetic image; every halving rounds up."""
    stem = 1 if cfg.stem == "cifar" else 4
    stages = 8 if cfg.arch in IMAGENET_ARCHS else 4
    return math.ceil((cfg.crop_size or cfg.image) / (stem * stages))


def statistics_group(bn: str, replicas: int) -> int:
    """How many neighbouring replicas normalise with common statistics; 0 for all of an unknown number."""
    word, _, size = bn.partition(":")
    if bn in ("sync", "local"):
        return replicas if bn == "sync" else 1
    if word != "group" or not size.isdecimal() or int(size) < 1:
        near = nearest(word, ("sync", "local", "group:K"))
        raise Refused(f"--bn {bn!r} is none of sync, local, group:K with K replicas{near}")
    if replicas % int(size):
        raise Refused(f"--bn {bn!r} does not divide {replicas} replicas: use a divisor")
    return int(size)


def milestones_of(cfg: Config) -> tuple[float, ...]:
    """The epochs of ``milestones``. Refused unless they are numbers that rise and lie inside the run."""
    try:
        epochs = tuple(float(part) for part in cfg.milestones.split(",")) if cfg.milestones else ()
    except ValueError:
        refuse(cfg, "milestones", "is no list of epochs: give numbers such as 15,25")
    if not all(before < after for before, after in pairwise((0.0, *epochs, cfg.epochs))):
        refuse(cfg, "milestones", f"must rise inside the run: give epochs above 0 and below --epochs {cfg.epochs}, in order")
    return epochs


def global_batch(cfg: Config) -> int:
    """Samples of a step, over all replicas of a resolved configuration."""
    return cfg.replicas * cfg.batch * cfg.accumulate


# ------------------------------------------------------------------------------- what is written, what is fixed

def to_json(cfg: Config) -> dict[str, Any]:
    """The fields as JSON can hold them, each in its declared type; `from_json` is the inverse."""
    return {spec.name: spec.type(getattr(cfg, spec.name)) for spec in fields(Config)}


def from_json(values: Mapping[str, Any]) -> Config:
    """A configuration that `to_json` wrote, perhaps in an older version: a field it lacks has its default.

    Raises `Refused` for unknown fields and for values that `validate` refuses.
    """
    unknown = sorted(set(values) - {spec.name for spec in fields(Config)})
    if unknown:
        raise Refused(f"the saved configuration holds {unknown[0]!r}, unknown here: use the version that wrote it")
    cfg = Config(**values)
    validate(cfg)
    return cfg


def mathematics(cfg: Config) -> dict[str, Any]:
    """The fields that fix every bit of the parameters: all but `RESUMABLE` and what its note exempts."""
    fixed = {name: value for name, value in to_json(cfg).items() if name not in RESUMABLE}
    fixed["dataset"] = Path(cfg.dataset).name
    if cfg.schedule == "constant":
        del fixed["epochs"]
    return fixed


def digest(cfg: Config) -> str:
    """SHA-256 (hex) of `mathematics`: equal for two resolved configurations that must give the same bits."""
    return hashlib.sha256(json.dumps(mathematics(cfg), sort_keys=True).encode()).hexdigest()


def check_resume(saved: Mapping[str, Any], cfg: Config) -> None:
    """Raise `Refused` naming every field in which a resumed run would leave the mathematics of the saved one.

    Both are resolved: `saved` is what `to_json` gave when the checkpoint was written, `cfg` belongs to this run.
    """
    before, now = mathematics(from_json(saved)), mathematics(cfg)
    differing = [name for name in now if name in before and before[name] != now[name]]
    if differing:
        listed = ", ".join(f"{flag_name(name)} was {before[name]!r}, now {now[name]!r}" for name in differing)
        raise Refused(f"cannot resume with other mathematics: {listed}; give the saved values or another --out")
