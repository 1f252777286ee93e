"""dpresnet trains residual networks data-parallel on any OpenCL device, with MPI between the ranks.

    mpirun -n 4 python -m dpresnet.train     a run (``--help`` lists the flags)
    python -m dpresnet.doctor                what this machine has, and what is wrong with it
    dpresnet.Network("resnet50", ...)        the same networks from Python, one process, without MPI
    dpresnet.Classifier("RUN")               a trained one, for images

Importing the package loads neither OpenCL nor MPI: both read settings from the environment at that moment, and
`dpresnet.environment.prepare` has to come first.
"""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# In a checkout the side folders kernels/, launch/ and datasets/ lie beside this package; a wheel has them inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "kernels" / "__init__.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    if name in ("Network", "Classifier"):
        import importlib
        import sys

        from dpresnet import environment

        if "pyopencl" not in sys.modules:
            environment.prepare(threads=0, local_rank=0, local_size=1)
        return getattr(importlib.import_module(f"dpresnet.{name.lower()}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
