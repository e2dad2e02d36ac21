#!/usr/bin/env bash
# Runs the test suite, after setting everything up. Arguments go to pytest: ./recipes/test.sh -m "not e2e" -k ecapa
#
#   PYTHON, VENV, STACK   see recipes/env/setup.sh
#   TESTS                 full | compat      (default: full on the current stack, compat on the legacy one)
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export STACK="${STACK:-current}"
if [ "$STACK" = legacy ]; then TESTS="${TESTS:-compat}"; else TESTS="${TESTS:-full}"; fi
VENV="${VENV:-$ROOT/$([ "$STACK" = legacy ] && echo .venv-legacy || echo .venv)}"
VENV="$VENV" "$ROOT/recipes/env/setup.sh"

cd "$ROOT"
select=()
case "$TESTS" in
  full) select=(-m "not slow") ;;
  compat) select=(-m "compat and not slow") ;;
  *) echo "test: got TESTS=$TESTS, expected full or compat" >&2; exit 2 ;;
esac
# One thread a process: the suite runs two processes, and small machines have two cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
echo "[test] $STACK stack, $TESTS suite"
exec "$VENV/bin/python" -m pytest -n "${JOBS:-2}" --dist loadgroup "${select[@]}" "$@"
