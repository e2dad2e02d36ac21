#!/usr/bin/env bash
# DINO on VoxCeleb2 without labels: WeSpeaker's published settings (preset voxceleb2_dino), evaluated on Vox1-O/E/H.
#
#   [GPUS=2 OUT=exp/dino] recipes/pretrain/voxceleb2_dino.sh [STAGE ...]
#   stages: data train average evaluate export (default: all; STAGES="train average" says the same)
#
# Reads  $DATA (made by voxceleb_data.sh from the archives in $DOWNLOADS).
# Writes $OUT: checkpoints, logs, average.safetensors, vox1_{O,E,H}.{json,tsv}. Every stage can be run alone and again:
# training goes on from its newest checkpoint, the others are skipped where their inputs are the same. Settings are
# changed by EXTRA="run.batch=32 run.accumulate=2", the device of the evaluation by DEVICE=cpu.
# Published result of these settings (WeSpeaker, 2 GPUs x 64, 150 epochs): Vox1-O/E/H 3.016 / 3.093 / 5.538 % EER.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
HERE=$(cd "$(dirname "$0")" && pwd)
source "$HERE/../env/python.sh" # sets PYTHON
source "$HERE/stage.sh"
export DATA=${DATA:-data/voxceleb}
OUT=${OUT:-exp/voxceleb2_dino}
GPUS=${GPUS:-2}
PRESET=${PRESET:-voxceleb2_dino}
NUM_AVERAGE=${NUM_AVERAGE:-10}
DEVICE=${DEVICE:-$("$PYTHON" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}
read -ra EXTRA <<<"${EXTRA:-}"

data() { "$HERE/voxceleb_data.sh" check unpack convert trials; }

train() {
  processes "$GPUS" s3prl_speaker_upstreams pretrain --preset "$PRESET" --data "$DATA/vox2_dev" \
    --noise "$DATA/musan" --rirs "$DATA/RIRS_NOISES" \
    --trials "$DATA/trials/veri_test2.txt" --trials-root "$DATA/voxceleb1/wav" --out "$OUT" \
    --set "eval.every=10 epochs" "run.keep_last=$NUM_AVERAGE" ${EXTRA[@]+"${EXTRA[@]}"}
}

newest() { find "$OUT/checkpoints" -name 'step_*.pt' | sort | tail -n "$1"; }

average() {
  local files
  mapfile -t files < <(newest "$NUM_AVERAGE")
  fresh "$OUT/average.safetensors" "$NUM_AVERAGE" "${files[@]}" && return 0
  speaker average "$OUT" "$OUT/average.safetensors" --last "$NUM_AVERAGE"
  made "$OUT/average.safetensors" "$NUM_AVERAGE" "${files[@]}"
}

evaluate() {
  local name list inputs
  for name in O:veri_test2 E:list_test_all2 H:list_test_hard2; do
    list=${name#*:} name=${name%%:*}
    inputs=("$OUT/average.safetensors" "$DATA/trials/$list.txt" "cohort $DATA/vox2_dev" "$DEVICE")
    fresh "$OUT/vox1_$name.json" "${inputs[@]}" && continue
    speaker evaluate "$OUT/average.safetensors" "$DATA/trials/$list.txt" --root "$DATA/voxceleb1/wav" \
      --cohort "$DATA/vox2_dev" --device "$DEVICE" --scores "$OUT/vox1_$name.tsv" --out "$OUT/vox1_$name.json"
    made "$OUT/vox1_$name.json" "${inputs[@]}"
  done
}

export_() {
  speaker export "$OUT" "$OUT/last.safetensors"
  echo "use it:  python s3prl/run_downstream.py -u ecapa_dino_local -k $OUT/average.safetensors ..."
}

# shellcheck disable=SC2086  # a list of words
[ $# -gt 0 ] || set -- ${STAGES:-data train average evaluate export}
for stage; do
  case $stage in
    data | train | average | evaluate) "$stage" ;;
    export) export_ ;;
    *) echo "unknown stage '$stage'; expected data, train, average, evaluate, export" >&2; exit 1 ;;
  esac
done
