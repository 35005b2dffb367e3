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
    return
  fi
  [ $status = 0 ] || exit $status
  mkdir -p build
  scripts/with-legate.sh "$kind" python -m pytest -q -rs --junitxml="build/legate-$kind.xml" "$@"
  [ -z "${CI:-}" ] || "${PYTHON:-python3}" - "build/legate-$kind.xml" <<'PY'
import sys
import xml.etree.ElementTree as xml

suite = xml.parse(sys.argv[1]).getroot().find("testsuite")
ran, skipped = int(suite.get("tests")), int(suite.get("skipped"))
if ran == 0 or skipped:
    sys.exit(f"test-legate: {sys.argv[1]}: {ran} tests, {skipped} skipped; none may be skipped here.")
PY
}

# Only files that mention the marker are collected: the others need packages that are not here.
marked() { grep -lE "mark\.$1\b" tests/test_*.py; }

run_part single -m "legate and not gpu" $(marked legate)
run_part ranks -m ranks $(marked ranks)
