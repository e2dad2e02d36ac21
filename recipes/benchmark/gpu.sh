#!/usr/bin/env bash
# Is everything right on a GPU, and how fast: under 9 minutes, from a checkout, nothing to install.
#
#   recipes/benchmark/gpu.sh                       both halves on the first GPU
#   recipes/benchmark/gpu.sh --parts correctness   one half; or parts by name (--list shows them)
#   recipes/benchmark/gpu.sh --tiny --device cpu   the same way with tiny sizes, so that it can be tried anywhere
#
# Needs torch, numpy, scipy, safetensors, soundfile and pyyaml; a part that needs more is skipped by name. Writes
# results/gpu.*.json beside this script (--out FILE.json elsewhere) and prints the tables. Exit status 1 where a
# correctness limit is missed. PYTHON chooses the interpreter.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
for python in "${PYTHON:-python}" python3 "$HERE/../../.venv/bin/python"; do
  if "$python" -c 'import torch' 2> /dev/null; then
    export PYTHONPATH="$HERE/../..${PYTHONPATH:+:$PYTHONPATH}" CUBLAS_WORKSPACE_CONFIG=:4096:8
    exec "$python" "$HERE/gpu.py" "$@"
  fi
done
echo "gpu.sh: no Python with torch; activate an environment or set PYTHON" >&2
exit 1
