#!/usr/bin/env bash
# All SUPERB tasks with all upstreams given, then one table.
#
#   CORPORA=/corpora recipes/superb/all.sh ecapa_dino ecapa_tdnn fbank -- --device cuda
#   TASKS="KS SID" recipes/superb/all.sh fbank -- --smoke --device cpu
#   ELEMENT=$SLURM_ARRAY_TASK_ID recipes/superb/all.sh ...    one (task, upstream) of the array only: elements 0 to N-1
#   COUNT=1 recipes/superb/all.sh ...                         print N, the number of elements, and stop
#
# Reads CORPORA/TASK for each task (links to the corpora do; --smoke needs none). Writes EXP, and EXP/tables.
# A task that fails does not stop the others; the exit code then is 1 and its error stands in the output.
set -euo pipefail

RECIPE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TASKS=${TASKS:-"PR ASR KS QbE SID ASV SD IC SF ER SE SS"}
CORPORA=${CORPORA:-}
ELEMENT=${ELEMENT:-}
COUNT=${COUNT:-}
export EXP=${EXP:-exp/superb}

upstreams=()
while [[ $# -gt 0 && $1 != -- ]]; do upstreams+=("$1"); shift; done
[[ $# -gt 0 ]] && shift
if [[ ${#upstreams[@]} -eq 0 ]]; then
  sed -n '2,10p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//' >&2
  exit 2
fi

elements=()
for task in $TASKS; do for upstream in "${upstreams[@]}"; do elements+=("$task $upstream"); done; done
if [[ -n $COUNT ]]; then echo "${#elements[@]}"; exit 0; fi
if [[ -n $ELEMENT && $ELEMENT -ge ${#elements[@]} ]]; then
  echo "all.sh: ELEMENT=$ELEMENT, but there are ${#elements[@]}: 0 to $((${#elements[@]} - 1))" >&2
  exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/../env/python.sh" # sets PYTHON
export PYTHON

failed=()
for index in "${!elements[@]}"; do
  [[ -n $ELEMENT && $ELEMENT -ne $index ]] && continue
  read -r task upstream <<<"${elements[$index]}"
  [[ -n $CORPORA ]] && export DATA=$CORPORA/$task
  if ! STAGES="check prepare train choose evaluate score" "$RECIPE/run.sh" "$task" "$upstream" "$@"; then
    failed+=("$task/$upstream")
  fi
done

if compgen -G "$EXP/*/*/result.json" >/dev/null; then
  "$PYTHON" -m s3prl_speaker_upstreams.superb collect --exp "$EXP"
fi
if [[ ${#failed[@]} -gt 0 ]]; then
  echo "all.sh: failed: ${failed[*]}; their errors stand above, finished work is kept" >&2
  exit 1
fi
