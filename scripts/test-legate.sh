#!/usr/bin/env bash
# The tests on Legate, for real: on two CPUs of this machine, then on two ranks.
# A machine without Linux, libcuda or OpenMPI skips its part with the reason in one line, except
# where CI is set: there a missing part, or a single skipped test, is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

run_part() {
  local kind=$1 status=0
  shift
  bash scripts/legate-env.sh "$kind" || status=$?
  if [ $status = 3 ] && [ -z "${CI:-}" ]; then
    echo "test-legate: skipped the part '$kind': the line above says why."
    return 3
  fi
  [ $status = 0 ] || exit $status
  run_tests "$kind" "$kind" "$@"
}

run_tests() {
  local kind=$1 report=build/legate-$2.xml
  shift 2
  mkdir -p build
  # `if run_part` below switches -e off in here.
  scripts/with-legate.sh "$kind" python -m pytest -q -rs --junitxml="$report" "$@" || exit 1
  [ -z "${CI:-}" ] || "${PYTHON:-python3}" - "$report" <<'PY' || exit 1
import sys
import xml.etree.ElementTree as xml

suite = xml.parse(sys.argv[1]).getroot().find("testsuite")
ran, skipped = int(suite.get("tests")), int(suite.get("skipped"))
if ran == 0 or skipped:
    sys.exit(f"test-legate: {sys.argv[1]}: {ran} tests, {skipped} skipped; none may be skipped here.")
PY
}

# Only files that mention the marker, or run over every array library, are collected: the others
# need packages that are not here.
collected() { grep -lE "$1" tests/test_*.py; }

if run_part single -m "legate and not gpu" $(collected 'mark\.legate\b|def test_\w+\(xp\b'); then
  CPUS=1 run_tests single one-cpu -m legate tests/test_backends.py
  scripts/with-legate.sh single legate --cpus 2 --gpus 0 --sysmem 1000 examples/legate_fit.py 1e6
  for example in sinc burgers mnist; do
    scripts/with-legate.sh single legate --cpus 2 --gpus 0 --sysmem 1000 "examples/$example.py" \
      --smoke --linalg legate
  done
  scripts/with-legate.sh single python benchmarks/legate_scaling.py --smoke --repeats 2
  scripts/with-legate.sh single python benchmarks/legate_networks.py --smoke
  scripts/with-legate.sh single legate --cpus 2 --gpus 0 --sysmem 1000 benchmarks/networks.py \
    --smoke --linalg legate
fi
if run_part ranks -m ranks $(collected 'mark\.ranks\b'); then
  scripts/with-legate.sh ranks legate --launcher mpirun --ranks-per-node 2 --cpus 1 --gpus 0 \
    --sysmem 1000 --launcher-extra=--oversubscribe examples/legate_fit.py 1e5
fi
