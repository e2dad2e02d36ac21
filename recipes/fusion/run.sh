#!/usr/bin/env bash
# Does one probe over a speech model *and* a speaker model beat each alone? Four upstreams, one budget, several seeds:
# the speech model, the speaker model, both fused, and the control: fused with the speaker model untrained, which has
# the width and the parameters of the fusion but not what the speaker model learnt.
#
#   CORPORA=/corpora recipes/fusion/run.sh                          SID, ASV, PR, ER and KS
#   TASKS="SID ER" SPEECH=hubert SPEAKER=ecapa_tdnn recipes/fusion/run.sh -- --device cuda
#   TASKS=KS SPEECH=fbank recipes/fusion/run.sh -- --smoke --device cpu     a few minutes, generated speech, no download
#
# Reads CORPORA/TASK. Writes EXP: the runs, control.yaml, fusion.md and fusion.json (means with intervals, a sentence of
# verdict for each task). Finished runs are skipped; options after -- go to every run.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac

RECIPE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SPEECH=${SPEECH:-wavlm_base_plus}     # any upstream of s3prl
SPEAKER=${SPEAKER:-ecapa_dino_small}  # a named entry, or a checkpoint's path
TASKS=${TASKS:-"SID ASV PR ER KS"}
SEEDS=${SEEDS:-"1337 1338 1339"}
STEPS=${STEPS:-}                      # updates of every run; empty: the stock number
CORPORA=${CORPORA:-}
EXP=${EXP:-exp/fusion}
STAGES=${STAGES:-"control runs table"}
[[ $# -gt 0 && $1 == -- ]] && shift
source "$RECIPE/../env/python.sh" # sets PYTHON

options=(--exp "$EXP")
[[ -n $STEPS ]] && options+=(--set "runner.total_steps=$STEPS")
mkdir -p "$EXP"

for stage in $STAGES; do
  case $stage in
    control) # the speaker model's architecture with random weights, and both fusions as files
      "$PYTHON" "$RECIPE/compare.py" prepare --speech "$SPEECH" --speaker "$SPEAKER" --exp "$EXP" ;;
    runs)
      for task in $TASKS; do
        data=()
        [[ -n $CORPORA ]] && data=(--data "$CORPORA/$task")
        for seed in $SEEDS; do
          for tag in speech speaker fused control; do
            case $tag in
              speech) upstream=("$SPEECH") ;;
              *) upstream=(fusion --ckpt "$EXP/$tag.yaml") ;;
            esac
            "$PYTHON" -m s3prl_speaker_upstreams.superb run "$task" "${upstream[@]}" --tag "$tag" --seed "$seed" \
              "${options[@]}" "${data[@]}" "$@"
          done
        done
      done ;;
    table) "$PYTHON" "$RECIPE/compare.py" table --exp "$EXP" ;;
    *) echo "run.sh: got stage '$stage', expected some of: control runs table" >&2; exit 2 ;;
  esac
done
