#!/usr/bin/env bash
# Accuracy on real speech with a probe trained for minutes: SID on six speakers' digits, KS on four keywords.
#
#   SPEECH=/folder recipes/superb/accuracy.sh fbank
#   SPEECH=/folder recipes/superb/accuracy.sh ecapa_tdnn_local --ckpt small.safetensors --tag ecapa_small
#
# Reads SPEECH (digits/<speaker>, keywords/<word>). Writes EXP (one folder for each upstream) and EXP/tables/superb.md.
# Chance: SID 16.7 %, KS 25 %. Frozen upstream, s3prl's own probe and runner; short training, learning rate chosen on dev.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac

RECIPE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SPEECH=${SPEECH:-}
EXP=${EXP:-exp/accuracy}
UPDATES=${UPDATES:-300}
RATES=${RATES:-1e-2,1e-3}
LIMIT=${LIMIT:-150}               # keyword recordings of each word; digits are all used
TASKS=${TASKS:-"SID KS"}
export EXP

if [[ $# -lt 1 ]]; then sed -n '2,9p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//' >&2; exit 2; fi
if [[ ! -d $SPEECH ]]; then
  echo "accuracy.sh: no folder '$SPEECH'; set SPEECH=FOLDER with digits/<speaker> and keywords/<word>" >&2
  exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/../env/python.sh" # sets PYTHON
export PYTHON
upstream=$1
every=$((UPDATES < 50 ? UPDATES : 50)) # updates between two evaluations
shift

for task in $TASKS; do
  data=$EXP/data/$task
  limit=()
  [[ $task == KS ]] && limit=(--limit "$LIMIT")
  "$PYTHON" -m s3prl_speaker_upstreams.demo.corpora --once --task "$task" --speech "$SPEECH" --out "$data" "${limit[@]}"
  DATA=$data "$RECIPE/run.sh" "$task" "$upstream" --device "${DEVICE:-cpu}" --workers 0 --lr "$RATES" \
    --set "runner.total_steps=$UPDATES" --set "runner.eval_step=$every" --set "runner.save_step=$every" --set "runner.log_step=$every" \
    --set "runner.eval_dataloaders=[dev]" --set runner.gradient_accumulate_steps=1 "$@"
done
