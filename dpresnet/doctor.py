"""``python -m dpresnet.doctor [-n RANKS]``: what this machine has for training, what is wrong with it, and the remedy.

`DIAGNOSES` are pure functions over the facts that `dpresnet.machine` gathers, one fault each. The exit code is 0 if
training with so many ranks can run here, and 78 if not.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dpresnet import __version__, environment
from dpresnet.errors import Refused
from dpresnet.machine import ROOT_PERMISSION, Facts, gather


@dataclass(frozen=True)
class Finding:
    """A fault with its remedy; ``fatal`` if training cannot run because of it."""

    fault: str
    remedy: str
    fatal: bool = True


# ---- OpenCL


def opencl_not_loaded(facts: Facts) -> Finding | None:
    """pyopencl is missing, or the loader library that it is linked to."""
    error = facts.opencl.get("error")
    if not error:
        return None
    remedy = "python -c 'import pyopencl; pyopencl.get_platforms()' shows where it fails"
    if "libOpenCL" in error:
        remedy = "install the OpenCL loader (Debian: ocl-icd-libopencl1), or pyopencl's wheel, which contains one"
    elif "No module named" in error:
        remedy = "pip install pyopencl"
    return Finding(f"OpenCL cannot be loaded: {error}", remedy)


def no_platform(facts: Facts) -> Finding | None:
    """The loader works but finds no driver."""
    if "error" in facts.opencl or facts.opencl["platforms"]:
        return None
    if place := facts.settings.get("OCL_ICD_VENDORS"):
        fault = f"no OpenCL platform: OCL_ICD_VENDORS={place} names no driver that loads"
        return Finding(fault, "unset or correct OCL_ICD_VENDORS")
    remedy = "install the driver of your device, or the CPU runtime: pip install 'dpresnet[local]'"
    return Finding("no OpenCL platform: no driver is installed", remedy)


def dangling_driver(facts: Facts) -> Finding | None:
    """A driver is registered but its library is gone; others still work."""
    gone = [file for file, there in facts.drivers.items() if not there]
    if not gone:
        return None
    fault = f"the library of OpenCL driver {gone[0]} does not exist"
    return Finding(fault, "reinstall that driver or correct the path", fatal=False)


def no_device(facts: Facts) -> Finding | None:
    """A driver loads but sees no hardware that it supports."""
    if not facts.opencl.get("platforms") or facts.opencl["devices"]:
        return None
    remedy = "check the kernel driver, the permissions of /dev/dri or /dev/nvidia*, and that a container has them"
    return Finding(f"no OpenCL device: {facts.opencl['platforms'][0]} reports none", remedy)


def compiler_fails(facts: Facts) -> Finding | None:
    """There is a device, but a small kernel does not build and run on it."""
    if "error" not in facts.compiler or not facts.opencl.get("devices"):
        return None
    device = facts.opencl["devices"][0]
    fault = f"a kernel does not run on {device['name']} ({device['platform']}): {facts.compiler['error']}"
    remedy = "update the driver, or train on another device with --device; PoCL: remove the kernel cache " + facts.cache
    return Finding(fault, remedy)


def cache_refused(facts: Facts) -> Finding | None:
    """Compiled kernels have no place."""
    if not facts.cache_error:
        return None
    fault, _, remedy = facts.cache_error.partition(": ")
    return Finding(fault, remedy)


# ---- MPI


def mpi_not_loaded(facts: Facts) -> Finding | None:
    """mpi4py is missing, or finds no MPI library; one process works without."""
    error = facts.mpi.get("error")
    if not error:
        return None
    remedy = (
        "pip install mpi4py and load the cluster's MPI module (or set MPI4PY_LIBMPI to its libmpi.so); on a machine "
        "without MPI: pip install 'dpresnet[local]'; one process needs none of this: python -m dpresnet.train"
    )
    return Finding(f"MPI cannot be loaded: {error}", remedy, fatal=facts.ranks > 1)


def no_mpirun(facts: Facts) -> Finding | None:
    """There is a library but nothing to start ranks with."""
    if "error" in facts.mpi or facts.launchers:
        return None
    remedy = f"put the mpirun of {facts.mpi['library']} on PATH, or activate the environment that contains it"
    return Finding("there is no mpirun on PATH", remedy, fatal=facts.ranks > 1)


def foreign_mpirun(facts: Facts) -> Finding | None:
    """The mpirun that a shell starts is of another MPI than mpi4py's library: each rank believes it is alone."""
    if "error" in facts.mpi or not facts.launchers or facts.launchers[0].fits:
        return None
    first = facts.launchers[0]
    seen = f"each of two processes sees {first.sizes[0]}" if first.sizes else first.error
    fault = f"{first.path} ({first.version}) does not start ranks of mpi4py's {facts.mpi['library']}: {seen}"
    if fitting := [launcher.path for launcher in facts.launchers if launcher.fits]:
        return Finding(
            fault, f"use {fitting[0]} (launch/local.sh finds it), or put its folder first on PATH", fatal=False
        )
    remedy = f"use the mpirun of {facts.mpi['library']}, or point MPI4PY_LIBMPI to the libmpi.so of {first.version}"
    return Finding(fault, remedy, fatal=facts.ranks > 1)


def root_refused(facts: Facts) -> Finding | None:
    """Open MPI does not start as root unless told."""
    if not facts.root or not _open_mpi(facts) or ROOT_PERMISSION in facts.settings:
        return None
    return Finding(
        "Open MPI refuses to start as root",
        f"use launch/local.sh, or set {ROOT_PERMISSION}=1 and {ROOT_PERMISSION}_CONFIRM=1",
        fatal=False,
    )


def _open_mpi(facts: Facts) -> bool:
    return bool(facts.launchers) and facts.launchers[0].version.startswith("Open MPI")


# ---- cores, threads, files


def more_ranks_than_cores(facts: Facts) -> Finding | None:
    """Ranks take turns; Open MPI refuses that unless told."""
    if facts.ranks <= facts.cores:
        return None
    remedy = f"start {facts.cores} ranks with the same --replicas: same result, to the bit"
    if _open_mpi(facts):
        remedy += (
            "; Open MPI also wants --map-by :oversubscribe (version 4: --oversubscribe), which launch/local.sh gives"
        )
    return Finding(f"{facts.ranks} ranks share {facts.cores} cores: that works but is not faster", remedy, fatal=False)


def too_many_threads(facts: Facts) -> Finding | None:
    """The user's own thread setting makes the ranks of this node compete."""
    for name in environment.THREAD_VARIABLES:
        value = facts.settings.get(name, "")
        if value.isdigit() and int(value) * facts.ranks > max(facts.cores, facts.ranks):
            fault = f"{name}={value}: {facts.ranks} ranks of {value} threads on {facts.cores} cores"
            return Finding(fault, f"unset {name}: each rank then takes its share of the cores", fatal=False)
    return None


def pinned_threads(facts: Facts) -> Finding | None:
    """PoCL would pin the first thread of every rank to the first core."""
    if facts.settings.get("POCL_AFFINITY", "0") == "0" or facts.ranks == 1:
        return None
    return Finding("POCL_AFFINITY is set: all ranks run on the same cores", "unset POCL_AFFINITY", fatal=False)


def hdf5_not_loaded(facts: Facts) -> Finding | None:
    """Data sets and checkpoints are HDF5."""
    error = facts.hdf5.get("error")
    return Finding(f"HDF5 cannot be loaded: {error}", "pip install h5py") if error else None


DIAGNOSES: tuple[Callable[[Facts], Finding | None], ...] = (
    opencl_not_loaded,
    no_platform,
    dangling_driver,
    no_device,
    compiler_fails,
    cache_refused,
    mpi_not_loaded,
    no_mpirun,
    foreign_mpirun,
    root_refused,
    more_ranks_than_cores,
    too_many_threads,
    pinned_threads,
    hdf5_not_loaded,
)


def diagnose(facts: Facts) -> list[Finding]:
    """All findings, those that prevent training first."""
    found = [finding for diagnosis in DIAGNOSES if (finding := diagnosis(facts))]
    return sorted(found, key=lambda finding: not finding.fatal)


# ---- printing


def describe(facts: Facts) -> Iterator[str]:
    """The facts, a line each."""
    yield f"dpresnet   {__version__}, Python {platform.python_version()} ({sys.executable}), {platform.platform()}"
    yield f"OpenCL     {_or_error(facts.opencl, 'pyopencl {pyopencl}')}"
    for name in facts.opencl.get("platforms", ()):
        yield f"  platform {name}"
    for i, device in enumerate(facts.opencl.get("devices", ())):
        yield "  device {0}: {kind} {name}, {units} units, {lanes}-wide fp32, {platform}, driver {driver}".format(
            i, **device
        )
    yield f"  compiler {_or_error(facts.compiler, 'builds {lanes}-wide kernels for {device}')}"
    if "tuned" in facts.compiler:
        yield f"  tuned    {facts.compiler['tuned']}"
    yield f"  cache    {facts.cache or facts.cache_error}"
    yield f"threads    {facts.cores} cores / {facts.ranks} ranks = {max(1, facts.cores // facts.ranks)} per rank"
    for name, value in facts.settings.items():
        yield f"  set      {name}={value}"
    yield f"MPI        {_or_error(facts.mpi, '{library}, mpi4py {mpi4py}')}"
    for launcher in facts.launchers:
        verdict = "belongs to it" if launcher.fits else "does not belong to it"
        yield f"  mpirun   {launcher.path} ({launcher.version}) {verdict}"
    yield f"HDF5       {_or_error(facts.hdf5, '{hdf5}, h5py {h5py}')}"


def _or_error(probe: dict, text: str) -> str:
    return f"error: {probe['error']}" if "error" in probe else text.format(**probe)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dpresnet.doctor", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("-n", "--ranks", type=int, default=4, help="ranks that training shall have on this machine (4)")
    facts = gather(parser.parse_args(argv).ranks)
    print("\n".join(describe(facts)))
    findings = diagnose(facts)
    for finding in findings:
        print(f"\n{'FAULT' if finding.fatal else 'note'}: {finding.fault}\n  remedy: {finding.remedy}")
    fatal = any(finding.fatal for finding in findings)
    print(f"\ntraining with {facts.ranks} ranks {'cannot' if fatal else 'can'} run here")
    return Refused.exit_code if fatal else 0


if __name__ == "__main__":
    sys.exit(main())
