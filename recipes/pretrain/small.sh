#!/usr/bin/env bash
# The small real model, repeatable: DINO on an hour of unlabelled speech, three seeds, on one CPU thread each.
#
#   SPEECH=/folder recipes/pretrain/small.sh [STAGE ...]      stages: trim train evaluate ship (default: all but ship)
#   STAGES="train evaluate" SPEECH=... recipes/pretrain/small.sh        the same, as other recipes take them
#
# Reads  $SPEECH/{commands,noise,rirs} to train and $SPEECH/digits/<speaker> to test (unseen speakers).
# Writes $OUT/speech (the speech without silent ends), $OUT/seed{1,2,3} and $OUT/results (tables and curves).
# Steps and final checkpoint are fixed in the preset small_dino (SET="run.steps=20" changes settings); nothing is chosen
# by the test. What was made from the same speech and settings is skipped; a stopped run goes on.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
source "$HERE/../env/python.sh" # sets PYTHON
source "$HERE/stage.sh"
SPEECH=${SPEECH:-}
read -ra SET <<<"${SET:-}"
OUT=${OUT:-$ROOT/exp/small_dino}
SEEDS=${SEEDS:-1 2 3}
RUN=${RUN:-} # a prefix for every command, such as "nice"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

trim() {
  [ -d "$SPEECH/commands" ] || { echo "no speech in '$SPEECH'; set SPEECH=FOLDER with commands/, noise/, rirs/, digits/" >&2; exit 1; }
  $RUN "$PYTHON" "$HERE/trim_silence.py" "$SPEECH/commands" "$OUT/speech"
}

train() {
  local seed run inputs
  for seed in $SEEDS; do
    run=(--preset small_dino --data "$OUT/speech" --noise "$SPEECH/noise" --out "$OUT/seed$seed"
      --set "run.seed=$seed" run.threads=1 ${SET[@]+"${SET[@]}"})
    inputs=("$("$PYTHON" -m s3prl_speaker_upstreams pretrain "${run[@]}" --show)" "$OUT/speech" "$SPEECH/noise")
    fresh "$OUT/seed$seed/model.safetensors" "${inputs[@]}" && continue
    $RUN "$PYTHON" -m s3prl_speaker_upstreams pretrain "${run[@]}"
    made "$OUT/seed$seed/model.safetensors" "${inputs[@]}"
  done
}

evaluate() {
  local runs=() inputs=("$OUT/speech" "$SPEECH/digits" "$SPEECH/noise" "$SPEECH/rirs") seed
  for seed in $SEEDS; do runs+=("$OUT/seed$seed") inputs+=("$OUT/seed$seed/model.safetensors"); done
  if ! fresh "$OUT/results/digits_summary.csv" "${inputs[@]}"; then
    $RUN "$PYTHON" "$HERE/small_evaluate.py" "${runs[@]}" --digits "$SPEECH/digits" --train "$OUT/speech" \
      --noise "$SPEECH/noise" --rirs "$SPEECH/rirs" --out "$OUT/results"
    made "$OUT/results/digits_summary.csv" "${inputs[@]}"
  fi
  cat "$OUT/results/digits_summary.csv"
}

ship() { # seed 3, as decided before any was evaluated; half precision; statistics as in the evaluation
  $RUN "$PYTHON" "$HERE/small_ship.py" "$OUT/seed3" --train "$OUT/speech" --results "$OUT/results" \
    --out "${SHIP:-$ROOT/s3prl_speaker_upstreams/weights/files/ecapa_dino_small.safetensors}"
}

# shellcheck disable=SC2086  # a list of words
[ $# -gt 0 ] || set -- ${STAGES:-trim train evaluate}
for stage; do
  case $stage in trim | train | evaluate | ship) "$stage" ;; *) echo "unknown stage '$stage'; expected trim, train, evaluate, ship" >&2; exit 1 ;; esac
done
