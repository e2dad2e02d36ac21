#!/usr/bin/env bash
# Supervised ECAPA-TDNN on VoxCeleb2 (AAM-softmax): WeSpeaker's published settings, then large-margin fine-tuning.
#
#   [GPUS=2 OUT=exp/aam] recipes/pretrain/voxceleb2_supervised.sh [STAGE ...]
#   stages: data train average evaluate large_margin evaluate_large_margin export
#   (default: all; STAGES="train average" says the same)
#
# Reads  $DATA (made by voxceleb_data.sh). Writes $OUT and $OUT-large-margin. Every stage can be run alone and again.
# Published result (WeSpeaker ECAPA512, 2 GPUs x 128, 150 epochs, cosine): Vox1-O/E/H 1.069 / 1.209 / 2.310 % EER;
# with large-margin fine-tuning 0.878 / 1.072 / 2.007.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
HERE=$(cd "$(dirname "$0")" && pwd)
source "$HERE/../env/python.sh" # sets PYTHON
source "$HERE/stage.sh"
export DATA=${DATA:-data/voxceleb}
OUT=${OUT:-exp/voxceleb2_supervised}
export GPUS=${GPUS:-2}
MAIN=$HERE/voxceleb2_dino.sh # train, average and evaluate are the same commands with another preset

main() { PRESET=voxceleb2_supervised OUT=$OUT "$MAIN" "$@"; }
fine() {
  local begin=$OUT/average.pt
  PRESET=voxceleb2_large_margin OUT=$OUT-large-margin NUM_AVERAGE=1 \
    EXTRA="model.init=$begin eval.every=1 ${EXTRA:-}" "$MAIN" "$@"
}
large_margin() { # starts from the average of the newest checkpoints, classifier included
  local last=${NUM_AVERAGE:-10} files
  mapfile -t files < <(find "$OUT/checkpoints" -name 'step_*.pt' | sort | tail -n "$last")
  if ! fresh "$OUT/average.pt" "$last" "${files[@]}"; then
    speaker average "$OUT" "$OUT/average.pt" --last "$last"
    made "$OUT/average.pt" "$last" "${files[@]}"
  fi
  fine train
}

# shellcheck disable=SC2086  # a list of words
[ $# -gt 0 ] || set -- ${STAGES:-data train average evaluate large_margin evaluate_large_margin export}
unset STAGES # for the recipe that is called below
for stage; do
  case $stage in
    data | train | average | evaluate) main "$stage" ;;
    large_margin) large_margin ;;
    evaluate_large_margin) fine average evaluate ;;
    export)
      speaker export "$OUT-large-margin" "$OUT-large-margin/last.safetensors"
      echo "use it:  python s3prl/run_downstream.py -u ecapa_tdnn_local -k $OUT-large-margin/average.safetensors ..."
      ;;
    *) echo "unknown stage '$stage'; see the head of $0" >&2; exit 1 ;;
  esac
done
