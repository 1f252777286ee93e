"""The shape of the source: imports go one way, OpenCL and MPI never meet below the trainer, one stem names an operation
everywhere, and files stay readable in one sitting.
"""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"dpresnet": ROOT / "dpresnet", "dpresnet.datasets": ROOT / "datasets"}

# A module may import modules of lower layers only.
LAYERS = [
    ["trace"],
    ["errors", "evaluation", "reference", "reference_augment", "reference_optimizer", "shape", "tree", "tiles", "pocl",
     "events", "wire", "stall", "bench.torch_resnet"],
    ["launcher", "shared", "augment", "datasets.split"],
    ["config", "environment", "device", "comm", "trail", "datasets.schema", "bench.workload"],
    ["plan", "amp", "recipe", "schedule", "checkpoint", "data", "reporter", "exchange", "buckets", "failure", "bench.facts",
     "bench.flags", "bench.channel", "datasets.content", "datasets.images", "datasets.staging", "datasets.pickles"],
    ["bench.projection", "commandline", "datasets.sources"],
    ["convolution"],
    ["ops.*", "datasets.*", "state"],
    ["nn", "update"],
    ["resnet"],
    ["model", "initial"],
    ["replicas"],
    ["syncbn", "optimizer"],
    ["trainer"],
    ["network", "setup", "machine", "course", "tracing"],
    ["classifier"],
    ["session"],
    ["tuning", "bench.ours", "bench.theirs", "bench.their_layers", "bench.peaks", "bench.child"],
    ["bench.our_layers", "bench.step", "bench.memory", "bench.reduce", "bench.exchanges", "bench.project", "bench.worker"],
    ["bench.layers", "bench.ops", "bench.picture", "bench.scaling"],
    ["train", "verify", "explain", "evaluate", "bench.__main__", "doctor", "tune", "timeline", "report",
     "datasets.prepare", "datasets.show"],
    ["predict", "bench.torch_train"],
]
ALONE = ["trace", "errors", "evaluation", "reference", "reference_augment", "reference_optimizer", "shape", "tree", "tiles",
         "pocl", "wire", "stall", "bench.torch_resnet"]  # fmt: skip
WITHOUT_MPI = ["pocl", "device", "plan", "convolution", "ops.*", "state", "nn", "update", "resnet", "model", "initial",
               "replicas", "optimizer", "tuning"]  # fmt: skip
WITHOUT_OPENCL = ["launcher", "comm", "exchange", "buckets", "failure"]
WITHOUT_BOTH = ["config", "commandline", "recipe", "amp", "schedule", "checkpoint", "data", "reporter", "environment", "trail"]
WITHOUT_BOTH += ["augment", "evaluation", "events", "explain", "datasets.*", "trace", "timeline", "report", "shared"]
PROGRAMS = {"datasets.show"}  # behind no wall, whatever its neighbours are: it draws what the device computes
WITHOUT_BOTH += [f"bench.{name}" for name in ("workload", "facts", "flags", "channel", "child", "step", "memory", "picture",
                                            "projection", "scaling", "theirs")]  # fmt: skip

NOT_OPERATIONS = {"common", "convolution", "packing", "probe", "tile", "transform", "view"}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60


def source_files():
    return sorted(
        file
        for folder in ("dpresnet", "datasets", "tests", "kernels")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".cl")
    )


@cache
def modules():
    """Every module of ours: its name below `dpresnet` and its file."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            if file.name != "__init__.py":
                name = ".".join([package, *file.relative_to(folder).with_suffix("").parts])
                found[name.removeprefix("dpresnet.")] = file
    return found


@cache
def imports(name):
    """Modules that the module imports, also inside functions: ours below `dpresnet`, others by their first part."""
    here = f"dpresnet.{name}".split(".")
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(here[: -node.level] if node.level else []), *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {known(target) for target in found} - {""}


def known(target):
    """The module that a dotted name belongs to: ops.conv for dpresnet.ops.conv.forward, numpy for numpy.typing."""
    if target.split(".")[0] != "dpresnet":
        return target.split(".")[0]
    target = target.removeprefix("dpresnet").removeprefix(".")
    while target and target not in modules():
        target = target.rpartition(".")[0]
    return target


@cache
def reach(name):
    """Everything that importing the module can bring along."""
    direct = imports(name)
    return direct.union(*(reach(other) for other in direct if other in modules()))


def matches(name, pattern):
    return name == pattern or (pattern.endswith(".*") and name.startswith(pattern[:-1]))


def layer(name):
    exact = [i for i, patterns in enumerate(LAYERS) if name in patterns]
    return (exact or [i for i, patterns in enumerate(LAYERS) if any(matches(name, pattern) for pattern in patterns)])[0]


def side(patterns):
    return [name for name in modules() if any(matches(name, pattern) for pattern in patterns)]


def test_every_module_has_a_layer():
    placed = side([pattern for patterns in LAYERS for pattern in patterns])
    assert sorted(placed) == sorted(modules())


def test_imports_go_down_only():
    wrong = [
        f"{name} imports {other}"
        for name in modules()
        for other in imports(name) & modules().keys()
        if layer(other) >= layer(name)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("patterns", "strangers"),
    [
        (ALONE, set(modules())),
        (WITHOUT_MPI, {"comm", "mpi4py"}),
        (WITHOUT_OPENCL, {"device", "pocl", "pyopencl"}),
        (WITHOUT_BOTH, {"comm", "mpi4py", "device", "pocl", "pyopencl"}),
    ],
    ids=["alone", "without MPI", "without OpenCL", "without both"],
)
def test_walls(patterns, strangers):
    """Nothing behind a wall reaches, over any number of imports, what lies on the other side."""
    assert {name: reach(name) & strangers for name in side(patterns) if reach(name) & strangers and name not in PROGRAMS} == {}


@pytest.mark.parametrize("library", ["pyopencl", "mpi4py"])
@pytest.mark.parametrize(
    "module", ["dpresnet", *(f"dpresnet.{name}" for name in ("train", "comm", "environment", "bench.__main__", "tune",
                                                                "datasets.show"))]
)
def test_importing_loads_neither_opencl_nor_mpi(module, library):
    """Both read the environment when they are loaded, so a program has to come first."""
    code = f"import sys, {module}; sys.exit({library!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def operations():
    return sorted({file.stem for file in (ROOT / "kernels").glob("*.cl")} - NOT_OPERATIONS)


@pytest.mark.parametrize("stem", operations())
def test_a_stem_names_kernel_launcher_and_test(stem):
    assert (ROOT / "dpresnet" / "ops" / f"{stem}.py").exists()
    assert (ROOT / "tests" / "ops" / f"test_{stem}.py").exists()
    kernels = re.findall(r"__kernel\s+void\s+(\w+)", (ROOT / "kernels" / f"{stem}.cl").read_text())
    assert kernels
    assert [name for name in kernels if not name.startswith(f"{stem}_")] == []


def test_every_launcher_has_a_kernel():
    assert sorted(file.stem for file in (ROOT / "dpresnet" / "ops").glob("[!_]*.py")) == operations()


def test_sizes():
    long_files = [file.name for file in source_files() if len(file.read_text().splitlines()) > MOST_LINES]
    assert long_files == []
    long_functions = [
        f"{file.name}:{node.name}"
        for file in source_files()
        if file.suffix == ".py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= MOST_LINES_OF_A_FUNCTION
    ]
    assert long_functions == []
