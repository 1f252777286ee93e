#!/usr/bin/env bash
# Trains on this machine:   launch/local.sh [-n RANKS] [-- FLAGS OF dpresnet.train]
#
#   -n RANKS          ranks to start (default: one per core)
#   PYTHON=...        the Python to use (default: that of the active environment, of the checkout's .venv, or of PATH)
#   DPRESNET_DRY=1    print the command instead of running it
#
# Uses the mpirun that belongs to mpi4py's library, gives each rank its share of the cores, and lets ranks outnumber cores
# only when they do. The exit code is that of mpirun.
set -euo pipefail

fail() {
    echo "local.sh: $*" >&2
    exit 78
}

# Reads what an MPI library or an mpirun says about itself; prints its kind. Launchers of the MPICH family (MPICH, Intel
# MPI, MVAPICH) start each other's programs; Open MPI changed its options with version 5.
kind() {
    local text
    text=$(cat)
    case $text in
        *"Open MPI v5"* | *"(Open MPI) 5"*) echo openmpi5 ;;
        *"Open MPI v"* | *"(Open MPI) "*) echo openmpi4 ;;
        *MPICH* | *HYDRA* | *"Intel(R) MPI"* | *MVAPICH*) echo mpich ;;
        *) echo unknown ;;
    esac
}

find_python() {
    local beside
    beside=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python
    if [[ -n ${PYTHON:-} ]]; then
        echo "$PYTHON"
    elif [[ -n ${VIRTUAL_ENV:-} ]]; then
        echo "$VIRTUAL_ENV/bin/python"
    elif [[ -x $beside ]]; then
        echo "$beside"
    else
        command -v python || command -v python3 || fail "no python on PATH; set PYTHON"
    fi
}

# The first mpirun of the kind $1: beside the python $2, else on PATH, where Debian also has mpirun.openmpi and mpirun.mpich.
find_mpirun() {
    local candidate candidates
    mapfile -t candidates < <(echo "$(dirname "$2")/mpirun"; type -ap mpirun mpirun.openmpi mpirun.mpich mpiexec)
    for candidate in "${candidates[@]}"; do
        if [[ -x $candidate && $("$candidate" --version 2>&1 | kind) == "$1" ]]; then
            echo "$candidate"
            return
        fi
    done
    fail "no mpirun of mpi4py's MPI library ($1) beside $2 or on PATH; python -m dpresnet.doctor tells more"
}

cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
ranks=$cores
while (($#)); do
    case $1 in
        -n) ranks=${2:-} && shift $(($# > 1 ? 2 : 1)) ;;
        --) shift && break ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
        *) fail "unknown argument $1: usage is local.sh [-n RANKS] [-- FLAGS]" ;;
    esac
done
[[ $ranks =~ ^[1-9][0-9]*$ ]] || fail "-n '$ranks' is not a number of ranks"

python=$(find_python)
library=$("$python" -m mpi4py --mpi-lib-version 2>&1 | tr -d '\0') || fail "mpi4py finds no MPI library: ${library##*$'\n'}"
library=$(kind <<<"$library")
[[ $library != unknown ]] || fail "mpi4py's MPI library is none of MPICH, Intel MPI, MVAPICH and Open MPI: use its own mpirun"
mpirun=$(find_mpirun "$library" "$python")

threads=$((cores > ranks ? cores / ranks : 1))
settings=(
    "POCL_MAX_PTHREAD_COUNT=${POCL_MAX_PTHREAD_COUNT:-$threads}"
    "POCL_CPU_MAX_CU_COUNT=${POCL_CPU_MAX_CU_COUNT:-$threads}"
    "DPCPP_CPU_NUM_CUS=${DPCPP_CPU_NUM_CUS:-$threads}"
)
# Open MPI binds each of two ranks to one core, and all OpenCL threads of the rank with it.
options=(-n "$ranks")
if [[ $library == openmpi* ]]; then
    options+=(--bind-to none)
    ((ranks <= cores)) || case $library in
        openmpi4) options+=(--oversubscribe) ;;
        openmpi5) options+=(--map-by :oversubscribe) ;;
    esac
    (($(id -u))) || options+=(--allow-run-as-root)
fi

command=(env "${settings[@]}" "$mpirun" "${options[@]}" "$python" -m dpresnet.train "$@")
if [[ -n ${DPRESNET_DRY:-} ]]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
