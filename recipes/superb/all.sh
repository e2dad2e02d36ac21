#!/usr/bin/env bash
# All SUPERB tasks with all upstreams given, then one table.
#
#   CORPORA=/corpora recipes/superb/all.sh ecapa_dino ecapa_tdnn fbank -- --device cuda
#   TASKS="KS SID" recipes/superb/all.sh fbank -- --smoke --device cpu
#   SEEDS="1337 1338 1339" recipes/superb/all.sh ...          several seeds; the table then gives mean and deviation
#
# As a job array, elements 0 to N-1 (COUNT=1 prints N and stops):
#   ELEMENT=$SLURM_ARRAY_TASK_ID recipes/superb/all.sh ...    one (task, upstream, seed)
#   PART=train ELEMENT=... recipes/superb/all.sh ... -- --lr sweep    one (task, upstream, seed, learning rate, fold)
#   PART=join ELEMENT=... recipes/superb/all.sh ... -- --lr sweep     after those: choose, evaluate, score
#
# Reads CORPORA/TASK for each task (links to the corpora do; --smoke needs none). Writes EXP, and EXP/tables.
# A task that fails does not stop the others; the exit code then is 1 and its error stands in the output.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac

RECIPE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TASKS=${TASKS:-"PR ASR KS QbE SID ASV SD IC SF ER SE SS"}
SEEDS=${SEEDS:-1337}
PART=${PART:-all}                 # all, train or join
CORPORA=${CORPORA:-}
ELEMENT=${ELEMENT:-}
COUNT=${COUNT:-}
S3PRL_ROOT=${S3PRL_ROOT:-}        # a checkout of s3prl; empty: the installed package
EXP=${EXP:-exp/superb}

upstreams=()
while [[ $# -gt 0 && $1 != -- ]]; do upstreams+=("$1"); shift; done
[[ $# -gt 0 ]] && shift
if [[ ${#upstreams[@]} -eq 0 ]]; then
  sed -n '2,15p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//' >&2
  exit 2
fi
if [[ -n $ELEMENT && ! $ELEMENT =~ ^[0-9]+$ ]]; then
  echo "all.sh: ELEMENT=$ELEMENT, expected a number from 0 on; COUNT=1 prints how many there are" >&2
  exit 2
fi
source "$RECIPE/../env/python.sh" # sets PYTHON

rates=() previous=
for option in "$@"; do
  [[ $previous == --lr ]] && rates=(--lr "$option")
  [[ $option == --lr=* ]] && rates=("$option")
  [[ $previous == --exp ]] && EXP=$option # the tables belong where the runs are
  [[ $option == --exp=* ]] && EXP=${option#--exp=}
  previous=$option
done
listed=$("$PYTHON" -m s3prl_speaker_upstreams.superb elements --part "$PART" --tasks "$TASKS" \
  --upstreams "${upstreams[*]}" --seeds "$SEEDS" "${rates[@]}")
mapfile -t elements <<<"$listed"
if [[ -n $COUNT ]]; then echo "${#elements[@]}"; exit 0; fi
if [[ -n $ELEMENT ]]; then
  if ((10#$ELEMENT >= ${#elements[@]})); then
    echo "all.sh: ELEMENT=$ELEMENT, but there are ${#elements[@]}: 0 to $((${#elements[@]} - 1))" >&2
    exit 2
  fi
  elements=("${elements[10#$ELEMENT]}")
fi

options=(--exp "$EXP")
[[ -n $S3PRL_ROOT ]] && options+=(--s3prl-root "$S3PRL_ROOT")
failed=()
for element in "${elements[@]}"; do
  read -ra own <<<"$element"
  [[ -n $CORPORA ]] && own+=(--data "$CORPORA/${own[0]}")
  if ! "$PYTHON" -m s3prl_speaker_upstreams.superb run "${options[@]}" "$@" "${own[@]}"; then
    failed+=("${own[0]}/${own[1]}")
  fi
done

if compgen -G "$EXP/*/*/result.json" >/dev/null || compgen -G "$EXP/*/*/seed*/result.json" >/dev/null; then
  "$PYTHON" -m s3prl_speaker_upstreams.superb collect --exp "$EXP"
fi
if [[ ${#failed[@]} -gt 0 ]]; then
  echo "all.sh: failed: ${failed[*]}; their errors stand above, finished work is kept" >&2
  exit 1
fi
