"""The configuration: flags, help, refusals, digest and the rule for resuming."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from dpresnet import config
from dpresnet.commandline import parse
from dpresnet.config import Config, check_resume, digest, from_json, to_json, validate
from dpresnet.errors import Refused

RESOLVED = Config(replicas=4, num_classes=10, shortcut="A")

# One value per field that differs from the default; flags that need company bring it along.
OTHER = {
    "recipe": "digits-resnet20",
    "arch": "resnet50", "stem": "imagenet", "shortcut": "C", "block": "v2", "zero_init_residual": True,
    "num_classes": 7, "dataset": "folder/flowers.h5", "image": 48, "channels": 1, "data_mb": 0.5,
    "augment": False, "crop_padding": 3, "resized_crop": 0.25, "crop_size": 8, "flip": "on", "jitter": 0.4, "erase": 0.5,
    "cutout": 6, "mixup": 0.2, "cutmix": 1.0, "batch": 5, "replicas": 12,
    "accumulate": 3, "bn": "group:3", "precision": "fp32", "epochs": 3, "steps": 17, "seed": 2**32 - 1, "lr": 0.125,
    "optimizer": "adamw", "schedule": "step", "warmup_epochs": 0.5, "final_lr": 0.25, "power": 1.5, "milestones": "1,2",
    "gamma": 0.5, "beta1": 0.5, "beta2": 0.95, "eps": 1e-6, "trust": 0.02, "decay": "weights", "clip_norm": 2.5, "ema": 0.99,
    "momentum": 0.0, "nesterov": False, "weight_decay": 1e-4, "label_smoothing": 0.2,
    "reduce": "mpi", "wire": "bf16", "bucket_mb": 4.5, "first_bucket_mb": 0.25, "overlap": False,
    "check_every": 7, "timeout": 12.5, "out": "some/where", "resume": "auto",
    "save_every_epochs": 0,
    "save_every_steps": 100, "keep": 1, "record_every": 5, "tensorboard": True, "trace": "some/trace.json", "trace_steps": 3,
    "device": "pocl", "threads": 2, "bind": False, "debug": True, "dry_run": True,
}
MAY_CHANGE = {
    "recipe", "tensorboard", "data_mb",
    "steps", "bucket_mb", "first_bucket_mb", "overlap", "check_every", "timeout", "out", "resume", "save_every_epochs",
    "save_every_steps", "keep", "record_every", "trace", "trace_steps", "device", "threads", "bind", "debug", "dry_run",
}
TOGETHER = {"reduce": "tree", "augment": True, "crop_padding": 0}  # where the others would refuse
COMPANY = {
    "image": {"dataset": "synthetic"}, "channels": {"dataset": "synthetic"}, "power": {"schedule": "polynomial"},
    "milestones": {"schedule": "step"}, "gamma": {"schedule": "step"}, "trust": {"optimizer": "lars"},
} | {name: {"optimizer": "adamw"} for name in ("beta1", "beta2", "eps")}
DERIVED = {  # what else follows from a flag
    "arch": {"out"}, "dataset": {"out"}, "image": {"out"}, "channels": {"out"}, "epochs": {"warmup_epochs"},
} | {name: {"lr", "weight_decay"} for name in ("optimizer", "beta1", "beta2", "eps")}


def argument(name: str, value: object) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-")]
    return [flag, str(value)]


def refusal(*argv: str) -> str:
    with pytest.raises(Refused) as caught:
        parse(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_table_of_this_file_covers_every_field():
    assert set(OTHER) == {spec.name for spec in fields(Config)}
    assert not [name for name, value in OTHER.items() if value == getattr(Config(), name)]


@pytest.mark.parametrize("name", sorted(set(OTHER) - {"recipe"}))
def test_each_flag_sets_its_field_and_no_other(name):
    company = COMPANY.get(name, {})
    cfg = parse([word for pair in (*company.items(), (name, OTHER[name])) for word in argument(*pair)])
    assert getattr(cfg, name) == OTHER[name]
    assert type(getattr(cfg, name)) is type(getattr(Config(), name))
    changed = {spec.name for spec in fields(Config) if getattr(cfg, spec.name) != spec.default}
    assert changed - DERIVED.get(name, set()) - set(company) == {name}


def test_no_flags_give_the_defaults_and_the_defaults_are_valid():
    assert parse([]) == Config()


def test_the_mpi_library_adds_fp32_only():
    assert refusal("--reduce", "mpi", "--wire", "bf16") == (
        "--wire 'bf16' needs --reduce tree: the MPI library adds fp32 numbers only")


@pytest.mark.parametrize("choice, meaningless", [
    ({"optimizer": "adamw", "schedule": "step"}, {"momentum", "nesterov", "trust", "final_lr", "power"}),
    ({"optimizer": "lars", "schedule": "polynomial"}, {"nesterov", "beta1", "beta2", "eps", "milestones", "gamma"}),
    ({"optimizer": "sgd", "schedule": "cosine"}, {"beta1", "beta2", "eps", "trust", "milestones", "gamma", "power"}),
])
def test_all_flags_together_also_joined_by_an_equals_sign(choice, meaningless):
    values = OTHER | TOGETHER | {"dataset": "synthetic"} | choice
    values = {name: value for name, value in values.items() if name not in meaningless}
    spaced = parse([word for name, value in values.items() for word in argument(name, value)])
    joined = parse(["=".join(argument(name, value)) for name, value in values.items()])
    assert spaced == joined == Config(**values)


def test_the_configuration_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        Config().lr = 1.0


@pytest.mark.parametrize("argv, name, expected", [
    (["--arch", "plain56"], "out", "runs/digits-plain56"),
    (["--dataset", "/data/flowers.h5"], "out", "runs/flowers-resnet20"),
    (["--dataset", "synthetic", "--out", "x"], "out", "x"),
    (["--epochs", "1"], "warmup_epochs", 0.5),
    (["--epochs", "100"], "warmup_epochs", 2.0),
    (["--epochs", "10", "--schedule", "onecycle"], "warmup_epochs", 3.0),
    (["--optimizer", "adamw"], "lr", 0.001),
    (["--optimizer", "adamw"], "weight_decay", 0.01),
    (["--optimizer", "adamw", "--lr", "0.4"], "lr", 0.4),
    (["--optimizer", "lars"], "lr", 0.4),
    (["--epochs", "1", "--warmup-epochs", "1"], "warmup_epochs", 1.0),
])
def test_defaults_that_follow_from_other_flags(argv, name, expected):
    assert getattr(parse(argv), name) == expected


# ------------------------------------------------------------------------------------------------------- help


def test_help_lists_every_field_in_its_group_with_choices_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # nothing is wrapped
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    titles = list(dict.fromkeys(spec.metadata["group"] for spec in fields(Config)))
    headings = [text.index(f" {title}: --") for title in titles]
    assert headings == sorted(headings) and len(headings) == 8
    for spec in fields(Config):
        start = text.index(" " + argument(spec.name, True)[0] + ("," if spec.type is bool else " "))
        entry = text[start:text.index("(default: ", start) + 40]
        shown = {"True": "on", "False": "off"}.get(str(spec.default), spec.default)
        shown = {"out": "runs/DATASET-ARCH", "resume": "start anew"}.get(spec.name, shown)
        assert f"(default: {shown}" in entry, spec.name
        assert " ".join(spec.metadata["help"].split()) in entry, spec.name
        assert all(choice in entry for choice in spec.metadata.get("choices", ())), spec.name


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("argv, words", [
    # the flags themselves
    (["--batsh", "64"], ["'--batsh'", "did you mean --batch?", "--help"]),
    (["--batsh=64"], ["'--batsh'", "did you mean --batch?"]),
    (["--save_every_steps", "3"], ["did you mean --save-every-steps?"]),
    (["--no-nestrov"], ["did you mean --no-nesterov?"]),
    (["--lab", "0.1"], ["'--lab'", "--help"]),
    (["--zzzzzz"], ["'--zzzzzz'", "--help"]),
    (["64"], ["'64'", "--help"]),
    (["--lr"], ["--lr", "expected one argument"]),
    (["--batch", "2.5"], ["--batch", "'2.5'", "whole number"]),
    (["--lr", "fast"], ["--lr", "'fast'", "number"]),
    (["--batch", "a\nb"], ["--batch", r"a\nb"]),
    # one field by itself
    (["--arch", "resnet19"], ["--arch 'resnet19'", "resnet18, resnet34", "did you mean"]),
    (["--stem", "cifer"], ["--stem 'cifer'", "did you mean cifar?"]),
    (["--batch", "0"], ["--batch 0", "at least 1"]),
    (["--accumulate", "0"], ["--accumulate 0", "at least 1"]),
    (["--bn", "grop:2"], ["--bn 'grop:2'", "group:K", "did you mean group:K?"]),
    (["--bn", "group:0"], ["--bn 'group:0'", "group:K"]),
    (["--bn", "group:"], ["--bn 'group:'", "group:K"]),
    (["--replicas", "6", "--bn", "group:4"], ["--bn 'group:4'", "6 replicas", "divisor"]),
    (["--steps", "-1"], ["--steps -1", "at least 0"]),
    (["--replicas", "-1"], ["--replicas -1", "at least 0"]),
    (["--seed", str(2**32)], ["--seed 4294967296", "at most 4294967295"]),
    (["--data-mb", "0"], ["--data-mb 0.0", "greater than 0.0"]),
    (["--bucket-mb", "0"], ["--bucket-mb 0.0", "greater than 0.0"]),
    (["--first-bucket-mb", "-1"], ["--first-bucket-mb -1.0", "greater than 0.0"]),
    (["--momentum", "1"], ["--momentum 1.0", "less than 1.0"]),
    (["--label-smoothing", "1"], ["--label-smoothing 1.0", "less than 1.0"]),
    (["--weight-decay", "-0.1"], ["--weight-decay -0.1", "at least 0.0"]),
    (["--optimizer", "adam"], ["--optimizer 'adam'", "did you mean adamw?"]),
    (["--decay", "weight"], ["--decay 'weight'", "did you mean weights?"]),
    (["--optimizer", "adamw", "--eps", "0"], ["--eps 0.0", "at least 1e-30"]),
    (["--optimizer", "adamw", "--beta2", "1"], ["--beta2 1.0", "less than 1.0"]),
    (["--optimizer", "lars", "--trust", "0"], ["--trust 0.0", "greater than 0.0"]),
    (["--clip-norm", "-1"], ["--clip-norm -1.0", "at least 0.0"]),
    (["--ema", "1"], ["--ema 1.0", "less than 1.0"]),
    (["--final-lr", "1.5"], ["--final-lr 1.5", "at most 1.0"]),
    (["--schedule", "step", "--gamma", "0"], ["--gamma 0.0", "greater than 0.0"]),
    (["--schedule", "polynomial", "--power", "0"], ["--power 0.0", "greater than 0.0"]),
    (["--lr", "nan"], ["--lr nan", "finite"]),
    (["--lr", "inf"], ["--lr inf", "finite"]),
    (["--keep", "0"], ["--keep 0", "at least 1"]),
    (["--out", ""], ["--out ''", "leave the flag out"]),
    (["--num-classes", "1"], ["--num-classes 1", "at least 2"]),
    (["--dataset", "digts"], ["--dataset 'digts'", "did you mean digits?"]),
    (["--dataset", "photos.zip"], ["--dataset 'photos.zip'", "FILE.h5"]),
    # fields together
    (["--warmup-epochs", "5", "--epochs", "4"], ["--warmup-epochs 5.0", "--epochs 4", "raise --epochs"]),
    (["--optimizer", "adamw", "--momentum", "0.8"], ["--momentum 0.8", "no meaning with --optimizer 'adamw'", "sgd or lars"]),
    (["--optimizer", "lars", "--nesterov"], ["--nesterov True", "no meaning with --optimizer 'lars'", "--optimizer sgd"]),
    (["--beta1", "0.8"], ["--beta1 0.8", "no meaning with --optimizer 'sgd'", "leave it out, or use --optimizer adamw"]),
    (["--optimizer", "adamw", "--trust", "0.1"], ["--trust 0.1", "no meaning with --optimizer 'adamw'", "--optimizer lars"]),
    (["--milestones", "3"], ["--milestones '3'", "no meaning with --schedule 'cosine'", "--schedule step"]),
    (["--schedule", "constant", "--final-lr", "0"], ["--final-lr 0.0", "no meaning with --schedule 'constant'"]),
    (["--schedule", "onecycle", "--power", "1"], ["--power 1.0", "no meaning", "--schedule polynomial"]),
    (["--schedule", "step", "--milestones", "15;20"], ["--milestones '15;20'", "no list of epochs", "15,25"]),
    (["--schedule", "step", "--milestones", "15,"], ["--milestones '15,'", "no list of epochs"]),
    (["--schedule", "step", "--milestones", "15,10"], ["--milestones '15,10'", "must rise", "--epochs 25"]),
    (["--schedule", "step", "--milestones", "0,10"], ["--milestones '0,10'", "above 0"]),
    (["--schedule", "step", "--milestones", "5,25"], ["--milestones '5,25'", "below --epochs 25"]),
    (["--schedule", "step", "--milestones", "nan"], ["--milestones 'nan'", "must rise"]),
    (["--image", "64"], ["--image 64", "--dataset synthetic", "leave the flag out"]),
    (["--channels", "3", "--dataset", "a.h5"], ["--channels 3", "'a.h5'", "leave the flag out"]),
    (["--crop-padding", "4", "--resized-crop", "0.08"], ["--crop-padding 4", "--resized-crop", "leave one"]),
    (["--crop-padding", "-2"], ["--crop-padding -2", "at least -1"]),
    (["--no-augment", "--mixup", "0.2"], ["--mixup 0.2", "no effect", "--no-augment", "leave one"]),
    (["--no-augment", "--flip", "on"], ["--flip 'on'", "--no-augment"]),
    (["--resized-crop", "1.5"], ["--resized-crop 1.5", "at most 1.0"]),
    (["--erase", "-0.1"], ["--erase -0.1", "at least 0.0"]),
    (["--mixup", "1000"], ["--mixup 1000", "at most 100"]),
    (["--dataset", "synthetic", "--crop-size", "4", "--batch", "1", "--bn", "local"], ["--crop-size", "raise"]),
    (["--arch", "plain20", "--shortcut", "B"], ["--shortcut 'B'", "plain20", "auto"]),
    (["--arch", "plain20", "--zero-init-residual"], ["--zero-init-residual", "plain20"]),
    (["--dataset", "synthetic", "--image", "4", "--batch", "1", "--bn", "local"], ["--image 4", "raise"]),
    (["--dataset", "synthetic", "--image", "4", "--batch", "1", "--replicas", "1"], ["--image 4", "raise"]),
])
def test_a_refusal_is_one_line_with_the_value_and_the_remedy(argv, words):
    message = refusal(*argv)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("argv", [
    ["--image", "5", "--batch", "1", "--bn", "local"],  # a map of 2 x 2
    ["--image", "4", "--batch", "2", "--bn", "local"],
    ["--image", "4", "--batch", "1", "--replicas", "2"],
    ["--image", "4", "--batch", "1"],  # the replicas are not known yet
])
def test_one_pixel_is_enough_where_batch_norm_sees_several(argv):
    parse(["--dataset", "synthetic", *argv])


@pytest.mark.parametrize("argv, side", [
    ([], 32 // 4),
    (["--arch", "resnet50"], 32 // 8),
    (["--arch", "resnet18", "--stem", "imagenet"], 1),
    (["--arch", "resnet20", "--stem", "deep"], 2),
])
def test_the_last_map_has_the_known_size(argv, side):
    assert config._smallest_map(parse(argv)) == side


@pytest.mark.parametrize("name, value", [
    ("batch", "32"), ("batch", 2.0), ("batch", True), ("lr", "0.1"), ("lr", True), ("nesterov", 1), ("arch", None),
])
def test_values_of_the_wrong_type_are_refused_where_no_flag_converted_them(name, value):
    with pytest.raises(Refused, match=repr(value)):
        validate(replace(Config(), **{name: value}))


def test_refused_carries_the_exit_code_of_a_bad_configuration():
    assert Refused.exit_code == 78


# ------------------------------------------------------------------------------------- saved, compared, resumed


def test_json_round_trip_of_every_field():
    cfg = Config(**OTHER | TOGETHER)
    assert from_json(to_json(cfg)) == cfg
    assert list(to_json(cfg)) == [spec.name for spec in fields(Config)]


def test_json_of_an_older_version_takes_defaults_and_of_a_newer_one_is_refused():
    older = {name: value for name, value in to_json(RESOLVED).items() if name != "label_smoothing"}
    assert from_json(older) == RESOLVED
    with pytest.raises(Refused, match="dropout"):
        from_json(to_json(RESOLVED) | {"dropout": 0.2})


def test_json_with_an_impossible_value_is_refused():
    with pytest.raises(Refused, match="--batch 0"):
        from_json(to_json(RESOLVED) | {"batch": 0})


@pytest.mark.parametrize("name", OTHER)
def test_the_digest_and_resuming_depend_on_exactly_the_mathematical_fields(name):
    changed = replace(RESOLVED, **{name: OTHER[name]})
    if name in MAY_CHANGE:
        assert digest(changed) == digest(RESOLVED)
        check_resume(to_json(RESOLVED), changed)
        return
    assert digest(changed) != digest(RESOLVED)
    with pytest.raises(Refused) as caught:
        check_resume(to_json(RESOLVED), changed)
    message = str(caught.value)
    now = "flowers.h5" if name == "dataset" else OTHER[name]
    assert f"{config.flag_name(name)} was {getattr(RESOLVED, name)!r}, now {now!r}" in message
    assert message.count(" was ") == 1 and "\n" not in message


def test_resuming_names_all_differences_at_once():
    with pytest.raises(Refused, match=r"--batch was 32, now 64, --lr was 0\.4, now 0\.1; give the saved values"):
        check_resume(to_json(RESOLVED), replace(RESOLVED, batch=64, lr=0.1, keep=9))


def test_epochs_may_change_only_where_the_schedule_does_not_span_them():
    constant = replace(RESOLVED, schedule="constant")
    check_resume(to_json(constant), replace(constant, epochs=80))
    assert digest(constant) == digest(replace(constant, epochs=80))
    with pytest.raises(Refused, match="--schedule was 'constant', now 'cosine'; "):
        check_resume(to_json(constant), replace(RESOLVED, epochs=80))


def test_a_data_set_may_move_to_another_folder():
    here, there = (replace(RESOLVED, dataset=f"{folder}/flowers.h5") for folder in ("/a", "b"))
    check_resume(to_json(here), there)


def test_the_digest_does_not_see_how_a_number_was_written():
    assert digest(replace(RESOLVED, lr=1)) == digest(replace(RESOLVED, lr=1.0))
