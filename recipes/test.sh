#!/usr/bin/env bash
# Runs the test suite, after setting everything up. Arguments go to pytest: ./recipes/test.sh -m "not e2e" -k ecapa
#
#   PYTHON, VENV, STACK   see recipes/env/setup.sh
#   TESTS                 full | compat      (default: full on the current stack, compat on the legacy one)
#   JOBS                  processes          (default: 2)
set -euo pipefail

case "${1:-}" in --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export STACK="${STACK:-current}"
if [ "$STACK" = legacy ]; then TESTS="${TESTS:-compat}"; else TESTS="${TESTS:-full}"; fi
VENV="${VENV:-$ROOT/$([ "$STACK" = legacy ] && echo .venv-legacy || echo .venv)}"
VENV="$VENV" "$ROOT/recipes/env/setup.sh"

cd "$ROOT"
select=()
case "$TESTS" in
  full) select=(-m "") ;;
  compat) select=(-m compat) ;;
  *) echo "test: got TESTS=$TESTS, expected full or compat" >&2; exit 2 ;;
esac
# One thread a process: the suite runs two processes, and small machines have two cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
echo "[test] $STACK stack, $TESTS suite"
exec "$VENV/bin/python" -m pytest -n "${JOBS:-2}" --dist loadgroup --durations=20 "${select[@]}" "$@"
