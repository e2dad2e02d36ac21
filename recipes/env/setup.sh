#!/usr/bin/env bash
# Installs, and only installs: a virtual environment with pinned packages and this project (editable).
# Quick when there is nothing to do.
#
#   PYTHON   interpreter to make the environment from   (default: python3)
#   VENV     where the environment goes                 (default: .venv beside the code; .venv-legacy for STACK=legacy)
#   STACK    current | legacy                           (default: current)
#   EXTRAS   extras of setup.cfg beside s3prl           (default: superb,pretrain,cka,test; those there already stay)
#            `superb` and the tasks se and ss compile one package and need a C compiler
set -euo pipefail

case "${1:-}" in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
PYTHON="${PYTHON:-python3}"
STACK="${STACK:-current}"
EXTRAS="s3prl,${EXTRAS:-superb,pretrain,cka,test}"
case "$STACK" in
  current) VENV="${VENV:-$ROOT/.venv}" ;;
  legacy) VENV="${VENV:-$ROOT/.venv-legacy}" ;;
  *) echo "setup: got STACK=$STACK, expected current or legacy" >&2; exit 2 ;;
esac
CONSTRAINTS="$ROOT/recipes/env/constraints-$STACK.txt"

say() { echo "[setup] $*"; }
fail() { echo "[setup] $*" >&2; exit 1; }

# numpy 1.26, which the legacy stack pins, ends at Python 3.12
newest=13
if [ "$STACK" = legacy ]; then newest=12; fi
command -v "$PYTHON" > /dev/null || fail "no interpreter '$PYTHON'; install Python 3.10 to 3.$newest or set PYTHON=/path/to/python"
"$PYTHON" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, $newest))" ||
  fail "$PYTHON is $("$PYTHON" --version 2>&1), the pinned packages need 3.10 to 3.$newest; set PYTHON=/path/to/python3.11"

# What was installed is remembered by a digest of everything that decides it, so the second run costs a blink.
wanted="$({ cat "$CONSTRAINTS" "$ROOT/setup.cfg" "$ROOT/setup.py" "$ROOT/pyproject.toml" "$ROOT/s3prl_speaker_upstreams/s3prl_speaker_upstreams.pth" "$ROOT/recipes/env/setup.sh"; echo "$ROOT $("$PYTHON" --version)"; } | cksum)"
stamp="$VENV/.s3prl_speaker_upstreams"
have="$(sed -n 2p "$stamp" 2> /dev/null || true)"
missing=""
for extra in ${EXTRAS//,/ }; do
  case ",$have," in *",$extra,"*) ;; *) missing="$missing,$extra" ;; esac
done
if [ -x "$VENV/bin/python" ] && [ "$(sed -n 1p "$stamp" 2> /dev/null)" = "$wanted" ] && [ -z "$missing" ]; then
  say "$VENV is up to date ($STACK stack)"
  exit 0
fi
EXTRAS="${have:+$have}$missing"
EXTRAS="${EXTRAS#,}"

if [ ! -x "$VENV/bin/python" ]; then
  say "making $VENV with $("$PYTHON" --version)"
  "$PYTHON" -m venv "$VENV" || fail "cannot make $VENV; Debian and Ubuntu keep venv in the package python3-venv"
fi
rm -f "$stamp"
say "installing the $STACK stack, pinned by recipes/env/constraints-$STACK.txt (about 6 GB, minutes at first)"
quiet=(-q)
if [ -t 1 ]; then quiet=(--progress-bar on); fi # a person sees pip at work, a log file stays short
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
# s3prl uses one sampler of catalyst, whose own requirements clash with others': without them on the legacy stack, where
# everything else of s3prl works as it is; the current stack gets a stand-in
if [ "$STACK" = legacy ]; then pip install "${quiet[@]}" --no-deps -c "$CONSTRAINTS" catalyst; fi
pip install "${quiet[@]}" -c "$CONSTRAINTS" -e "$ROOT[$EXTRAS]"
printf '%s\n%s\n' "$wanted" "$EXTRAS" > "$stamp"
say "done: $("$VENV/bin/python" -c 'import sys; print(sys.executable)')"
