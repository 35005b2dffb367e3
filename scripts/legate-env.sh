#!/usr/bin/env bash
# Make the environment of the Legate tests:  scripts/legate-env.sh single|ranks
#   single: .venv-legate,       nvidia-cupynumeric 26.6.1, one process
#   ranks:  .venv-legate-ranks, nvidia-cupynumeric 26.1.0 with UCX and OpenMPI, several processes
# A second call takes no time: a stamp holds the sum of this script and of its list of packages.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:?usage: scripts/legate-env.sh single|ranks}
python=${PYTHON:-python3}
case $kind in
  single) env=.venv-legate; download=1.9; disk=4 ;;
  ranks) env=.venv-legate-ranks; download=2.4; disk=5.3 ;;
  *) echo "legate-env: '$kind' is neither single nor ranks." >&2; exit 2 ;;
esac
list=scripts/legate-$kind.txt

say() { echo "legate-env: $*" >&2; }
give_up() { say "$*"; exit 3; }        # 3: this machine lacks a part; the caller may skip

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
  give_up "the wheels used here are for Linux on x86-64, this is $(uname -sm)."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  give_up "cuPyNumeric needs Python 3.11 or newer; name one as PYTHON=..."

have_library() { "$python" -c "import ctypes, sys; ctypes.CDLL(sys.argv[1])" "$1" 2>/dev/null; }

# Debian's own driver library, unpacked beside the environment: nothing is installed, and the
# machine's apt keeps its sources; ours are the same ones with the non-free component.
unpack_libcuda() {
  have_library libcuda.so.1 && return
  command -v apt-get dpkg >/dev/null ||
    give_up "libcuda.so.1 is missing, and without apt it can't be unpacked here: install NVIDIA's driver."
  local apt; apt=$(mktemp -d); chmod 755 "$apt"
  mkdir -p "$apt/sources" "$apt/lists/partial" "$apt/archives/partial"
  local file
  for file in /etc/apt/sources.list.d/*.sources; do
    [ -e "$file" ] && sed -E 's/^Components:.*/Components: main non-free/' "$file" >"$apt/sources/$(basename "$file")"
  done
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    [ -e "$file" ] && sed -nE '/^deb /s/ main( .*)?$/ main non-free/p' "$file" >"$apt/sources/$(basename "$file" .list).list"
  done
  local options=(-q -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$apt/sources"
    -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt" -o APT::Sandbox::User=root)
  apt-get "${options[@]}" update >"$apt/log" 2>&1 && (cd "$apt" && apt-get "${options[@]}" download libcuda1 >>"$apt/log" 2>&1) ||
    { tail -3 "$apt/log" >&2; give_up "libcuda.so.1 is missing, and apt can't fetch the package libcuda1 (Debian, non-free)."; }
  dpkg -x "$apt"/libcuda1_*.deb "$env/cuda"
  rm -rf "$apt"
}

need_mpi() {
  command -v mpirun >/dev/null && have_library libmpi.so && return
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
    give_up "OpenMPI is missing: install openmpi-bin and libopenmpi-dev (for libmpi.so), as root."
  apt-get -q update >/dev/null && DEBIAN_FRONTEND=noninteractive \
    apt-get -q install -y --no-install-recommends openmpi-bin libopenmpi-dev openssh-client >/dev/null ||
    give_up "apt can't install openmpi-bin and libopenmpi-dev."
}

[ "$kind" = single ] || need_mpi
stamp=$(cat scripts/legate-env.sh "$list" | sha256sum; "$python" -V)
if [ "$(cat "$env/.stamp" 2>/dev/null)" != "$stamp" ]; then
  say "making $env: downloads about $download GB of wheels (less where pip has them), takes $disk GB of disk."
  rm -rf "$env"
  "$python" -m venv "$env"
  unpack_libcuda
  # pip names every dependency that --no-deps left unchecked: kept in the log, shown on failure.
  { { [ "$kind" = single ] || "$env/bin/pip" install -q --no-deps legate==26.1.0 nvidia-cupynumeric==26.1.0; } &&
    "$env/bin/pip" install -q -r "$list"; } >"$env/pip.log" 2>&1 || { tail -5 "$env/pip.log" >&2; say "pip failed: $env/pip.log has it all."; exit 1; }
  echo "$stamp" >"$env/.stamp"
fi
say "$env is ready."
