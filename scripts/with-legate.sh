#!/usr/bin/env bash
# Run a command in one of the Legate environments:  scripts/with-legate.sh single|ranks COMMAND...
# CPUS (default 2) and SYSMEM (MiB, default 4000) say what Legate may use; LEGATE_CONFIG, where
# it is set, wins. A rank's processors are the launcher's business: see `legate --launcher mpirun`.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
kind=${1:?usage: scripts/with-legate.sh single|ranks COMMAND...}
shift
case $kind in
  single) env=$root/.venv-legate ;;
  ranks) env=$root/.venv-legate-ranks ;;
  *) echo "with-legate: '$kind' is neither single nor ranks." >&2; exit 2 ;;
esac
[ -e "$env/.stamp" ] || { echo "with-legate: first run scripts/legate-env.sh $kind" >&2; exit 3; }

packages=$(echo "$env"/lib/python3*/site-packages)
libraries=$env/cuda/usr/lib/x86_64-linux-gnu/nvidia/current
if [ "$kind" = ranks ]; then
  libraries=$libraries:$packages/nvidia/cuda_runtime/lib:$packages/libucx/lib
  export UCX_LOG_LEVEL=${UCX_LOG_LEVEL:-error}
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  # A rank's threads that look out for messages never sleep, and are two unless told otherwise: on
  # two cores a launch of both ranks takes 211 ms with two of them, 50 ms with one.
  export REALM_DEFAULT_ARGS=${REALM_DEFAULT_ARGS:--ll:bgwork 1}
else
  export LEGATE_CONFIG=${LEGATE_CONFIG:---cpus ${CPUS:-2} --gpus 0 --sysmem ${SYSMEM:-4000}}
fi
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PATH=$env/bin:$PATH PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}    # a Legate task has one processor: no BLAS threads beside it
exec "$@"
