#!/usr/bin/env bash
# The small real model, repeatable: DINO on an hour of unlabelled speech, three seeds, on one CPU thread each.
#
#   recipes/pretrain/small.sh [STAGE ...]      stages: trim train evaluate ship (default: trim train evaluate)
#
# Reads  $SPEECH/{commands,noise,rirs} to train and $SPEECH/digits to test (unseen speakers, other recordings).
# Writes $OUT/speech (the speech without silent ends), $OUT/seed{1,2,3} and $OUT/results (tables and curves). Steps and final checkpoint are fixed in the preset
# small_dino; nothing is chosen by the test. What is done is skipped; a stopped run goes on.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
SPEECH=${SPEECH:-$ROOT/../shared/speech}
OUT=${OUT:-$ROOT/exp/small_dino}
SEEDS=${SEEDS:-1 2 3}
RUN=${RUN:-} # a prefix for every command, such as "nice"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

trim() {
  [ -d "$SPEECH/commands" ] || { echo "no speech in $SPEECH; set SPEECH=FOLDER with commands/, noise/, digits/" >&2; exit 1; }
  $RUN python "$HERE/trim_silence.py" "$SPEECH/commands" "$OUT/speech"
}

train() {
  local seed
  for seed in $SEEDS; do
    [ -s "$OUT/seed$seed/model.safetensors" ] ||
      $RUN python -m s3prl_speaker_upstreams.cli pretrain --preset small_dino --data "$OUT/speech" \
        --noise "$SPEECH/noise" --out "$OUT/seed$seed" --set "run.seed=$seed" run.threads=1
  done
}

evaluate() {
  local runs=() seed
  for seed in $SEEDS; do runs+=("$OUT/seed$seed"); done
  [ -s "$OUT/results/digits_summary.csv" ] ||
    $RUN python "$HERE/small_evaluate.py" "${runs[@]}" --digits "$SPEECH/digits" --train "$OUT/speech" \
      --noise "$SPEECH/noise" --rirs "$SPEECH/rirs" --out "$OUT/results"
  cat "$OUT/results/digits_summary.csv"
}

ship() { # seed 3, as decided before any was evaluated; half precision; statistics as in the evaluation
  $RUN python "$HERE/small_ship.py" "$OUT/seed3" --train "$OUT/speech" --results "$OUT/results" \
    --out "$ROOT/s3prl_speaker_upstreams/weights/files/ecapa_dino_small.safetensors"
}

[ $# -gt 0 ] || set -- trim train evaluate
for stage; do
  case $stage in trim | train | evaluate | ship) "$stage" ;; *) echo "unknown stage '$stage'; expected trim, train, evaluate, ship" >&2; exit 1 ;; esac
done
