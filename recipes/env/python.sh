# Sourced by recipes: sets and exports PYTHON, an interpreter that has s3prl and torch. A PYTHON that is set wins; then the
# python on the path (an activated environment); then the environment that recipes/env/setup.sh made.
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  if ! python -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("s3prl") and u.find_spec("torch")))' 2> /dev/null; then
    PYTHON="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv/bin/python"
    if [ ! -x "$PYTHON" ]; then
      echo "no Python with s3prl and torch: run recipes/env/setup.sh, activate your environment, or set PYTHON" >&2
      exit 1
    fi
  fi
fi
export PYTHON

speaker() { "$PYTHON" -m s3prl_speaker_upstreams "$@"; } # the command s3prl-speaker, of that interpreter

processes() { # N MODULE ...: python -m MODULE ..., by N processes where that is more than one
  local count=$1
  shift
  if [ "$count" -gt 1 ]; then "$PYTHON" -m torch.distributed.run "--nproc_per_node=$count" -m "$@"; else "$PYTHON" -m "$@"; fi
}
