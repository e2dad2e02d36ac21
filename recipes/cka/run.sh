#!/usr/bin/env bash
# The study's CKA figures (arXiv 2401.17632): WavLM BASE / BASE+ / LARGE within and across, DINO and supervised ECAPA-TDNN
# within and across, and each against WavLM, over the recordings of a VoxCeleb1 folder, in one pass.
#
#   AUDIO=/corpora/VoxCeleb1/dev/wav recipes/cka/run.sh              models by their public names (downloaded by s3prl)
#   AUDIO=... WAVLM_BASE=/ckpt/WavLM-Base.pt recipes/cka/run.sh      models from files (wavlm_local -k)
#   SMOKE=1 AUDIO=some/wavs recipes/cka/run.sh                       small untrained models: the path, not the numbers
#   STAGES="plot report" recipes/cka/run.sh                          some stages only; each starts alone
#
# Stages: models (SMOKE only: checkpoints to $EXP/models), compute ($EXP/cka.json, .csv, .parquet), plot ($EXP/figures),
# weights (only with WEIGHTS: $EXP/layer_weights), report ($EXP/report.html). What is done is skipped; remove it to redo it.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac

source "$(dirname "${BASH_SOURCE[0]}")/../env/python.sh" # sets PYTHON
RECIPE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STAGES=${STAGES:-"models compute plot weights report"}
EXP=${EXP:-exp/cka}                 # where everything is kept
AUDIO=${AUDIO:-}                    # folder of recordings, or a list of paths
SMOKE=${SMOKE:-}                    # 1: small untrained models in the real formats
LIMIT=${LIMIT-2000}                 # recordings, out of a seeded order; empty: all
MODE=${MODE:-minibatch}             # minibatch (the study's estimator) or full (exact)
BATCH=${BATCH:-512}                 # frames per minibatch
SEED=${SEED:-0}
PROCESSES=${PROCESSES:-1}           # more: torchrun shares the work
WAVLM_BASE=${WAVLM_BASE:-}          # checkpoint files; empty: s3prl's public names
WAVLM_BASE_PLUS=${WAVLM_BASE_PLUS:-}
WAVLM_LARGE=${WAVLM_LARGE:-}
ECAPA_DINO=${ECAPA_DINO:-}
ECAPA_TDNN=${ECAPA_TDNN:-}
WEIGHTS=${WEIGHTS:-}                # "PR=exp/pr/states-100000.ckpt SID=..." of the first model, for the layer weights
OPTIONS=${OPTIONS:-}                # more for compute, e.g. "--permutations 1 --examples means"

wants() { [[ " $STAGES " == *" $1 "* ]]; }
say() { echo "[cka] $*" >&2; }

if [[ -n $SMOKE ]]; then
  WAVLM_BASE=$EXP/models/wavlm_base.pt WAVLM_BASE_PLUS=$EXP/models/wavlm_base_plus.pt
  WAVLM_LARGE=$EXP/models/wavlm_large.pt
  ECAPA_DINO=$EXP/models/ecapa_dino ECAPA_TDNN=$EXP/models/ecapa_tdnn
fi

# name, s3prl entry for a file, file -> "name=s3prl:entry ckpt=file", or the public name where there is no file
model() { if [[ -n $3 ]]; then echo "$1=s3prl:$2 ckpt='$3'"; else echo "$1=s3prl:$1"; fi; }
models=(
  "$(model wavlm_base wavlm_local "$WAVLM_BASE")"
  "$(model wavlm_base_plus wavlm_local "$WAVLM_BASE_PLUS")"
  "$(model wavlm_large wavlm_local "$WAVLM_LARGE")"
  "$(model ecapa_dino ecapa_dino_local "$ECAPA_DINO")"
  "$(model ecapa_tdnn ecapa_tdnn_local "$ECAPA_TDNN")"
)

if wants models && [[ -n $SMOKE ]]; then
  for kind in base base_plus large; do
    [[ -e $EXP/models/wavlm_$kind.pt ]] || "$PYTHON" "$RECIPE/make_wavlm.py" "$kind" "$EXP/models/wavlm_$kind.pt"
  done
  seed=1
  for name in ecapa_dino ecapa_tdnn; do
    if [[ ! -e $EXP/models/$name ]]; then
      "$PYTHON" -m s3prl_speaker_upstreams.cli init "$EXP/models/$name" --seed "$seed" --channels 64
    fi
    seed=$((seed + 1))
  done
  say "untrained models in $EXP/models: the figures show that the path works, nothing else"
fi

if wants compute && [[ ! -e $EXP/cka.json ]]; then
  if [[ -z $AUDIO ]]; then
    echo "AUDIO is not set; expected the folder of VoxCeleb1 recordings, e.g. AUDIO=/corpora/VoxCeleb1/dev/wav" >&2
    exit 2
  fi
  mkdir -p "$EXP"
  # A seeded choice of recordings, over all speakers: kept beside the result, so that it can be repeated and read.
  "$PYTHON" "$RECIPE/choose.py" "$AUDIO" "$EXP/recordings.txt" --seed "$SEED" ${LIMIT:+--limit "$LIMIT"}
  arguments=()
  for m in "${models[@]}"; do arguments+=(-m "$m"); done
  launch=("$PYTHON" -m cka_addon)
  if [[ $PROCESSES -gt 1 ]]; then
    launch=("$PYTHON" -m torch.distributed.run --nproc_per_node "$PROCESSES" -m cka_addon)
  fi
  # shellcheck disable=SC2086  # OPTIONS is a list of words
  "${launch[@]}" compute "${arguments[@]}" -a "$EXP/recordings.txt" -o "$EXP/cka.json" --parquet --skip-unreadable \
    --mode "$MODE" --batch-size "$BATCH" --seed "$SEED" $OPTIONS
fi

if wants plot && [[ ! -e $EXP/figures/cka.csv ]]; then
  "$PYTHON" -m cka_addon plot "$EXP/cka.json" -o "$EXP/figures" \
    --to ecapa_dino/0 --to ecapa_dino/3 --to ecapa_tdnn/0 --to ecapa_tdnn/3 --to wavlm_base/11
fi

if wants weights && [[ -n $WEIGHTS && ! -e $EXP/layer_weights/layer_weights.csv ]]; then
  # shellcheck disable=SC2086
  "$PYTHON" -m cka_addon layer-weights $WEIGHTS -m "${models[0]}" -a "$EXP/recordings.txt" -o "$EXP/layer_weights"
fi

if wants report && [[ ! -e $EXP/report.html ]]; then
  # shellcheck disable=SC2086
  "$PYTHON" -m cka_addon report "$EXP/cka.json" -o "$EXP/report.html" ${WEIGHTS:+--weights $WEIGHTS} \
    --title "WavLM and ECAPA-TDNN: layer-wise similarity"
fi
say "done: $EXP/report.html, $EXP/figures, $EXP/cka.csv"
