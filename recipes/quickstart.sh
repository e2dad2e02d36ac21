#!/usr/bin/env bash
# From a bare checkout to a result: s3prl's own run_downstream trains and tests speaker identification (SUPERB's SID)
# on an ECAPA-TDNN's frozen hidden states, on those of an untrained network and on FBANK; prints the accuracies, and
# draws the learned layer weights and the similarity (CKA) of all layers.
#
#   PYTHON, VENV, STACK   see recipes/env/setup.sh
#   SKIP_SETUP=1          use VENV as it is, or the active environment where there is no VENV
#   SPEECH    folder of real speech, one sub-folder per speaker
#             (default: a public corpus is downloaded; where that fails, synthetic eSpeak NG voices)
#   WORK      where data and experiments go                        (default: ./work/quickstart)
#   UPSTREAM  our entry to try; with CKPT for the *_local ones     (default: ecapa_dino_small, shipped with the package)
#   CKPT      checkpoint for UPSTREAM=ecapa_tdnn_local and the like
#   STEPS     training steps of each probe                         (default: 400)
#   DEVICE    cpu | cuda                                           (default: cuda where there is one)
#
# Finished stages are skipped; delete WORK to start over.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export STACK="${STACK:-current}"
VENV="${VENV:-$ROOT/$([ "$STACK" = legacy ] && echo .venv-legacy || echo .venv)}"
WORK="${WORK:-$ROOT/work/quickstart}"
SPEECH="${SPEECH:-}"
STEPS="${STEPS:-400}"
UPSTREAM="${UPSTREAM:-}"
CKPT="${CKPT:-}"

say() { printf '\n[quickstart] %s\n' "$*"; }

case "${1:-}" in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac

say "1/6 packages"
[ -n "${SKIP_SETUP:-}" ] || VENV="$VENV" EXTRAS="${EXTRAS:-espeak,pretrain,cka}" "$ROOT/recipes/env/setup.sh"
if [ -x "$VENV/bin/python" ]; then PYTHON="$(cd "$VENV" && pwd)/bin/python"; fi
source "$ROOT/recipes/env/python.sh" # sets PYTHON
python="$PYTHON"
mkdir -p "$WORK"
WORK="$(cd "$WORK" && pwd)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
DEVICE="${DEVICE:-$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}"

say "2/6 speech"
corpus="$WORK/speech"
if [ -n "$SPEECH" ]; then corpus="$WORK/speech-$(basename "$SPEECH")"; fi
"$python" -m s3prl_speaker_upstreams.demo speech --out "$corpus" --cache "$WORK/download" ${SPEECH:+--speech "$SPEECH"}

say "3/6 weights"
if [ -z "$UPSTREAM" ]; then
  if "$python" -m s3prl_speaker_upstreams -q info ecapa_dino_small > /dev/null 2>&1; then
    UPSTREAM=ecapa_dino_small
    echo "ecapa_dino_small: small DINO-ECAPA-TDNN, trained on real unlabelled speech and shipped with the package"
  else
    UPSTREAM=ecapa_dino_local
    CKPT="$WORK/untrained.safetensors" # made below
    echo "NO TRAINED WEIGHTS are at hand: the upstream is an explicitly UNTRAINED network with random weights."
    echo "Its accuracy says what the architecture does by itself, nothing about speaker models."
  fi
fi
# Random features are not worthless, so the untrained network is always shown beside the trained one.
UNTRAINED="$WORK/untrained.safetensors"
[ -f "$UNTRAINED" ] || "$python" -m s3prl_speaker_upstreams -q init "$UNTRAINED" --channels 128 --seed 0
if [ -n "$CKPT" ]; then CKPT="$(cd "$(dirname "$CKPT")" && pwd)/$(basename "$CKPT")"; fi

# One probe through the stock runner: train, then evaluate from the last checkpoint.
probe() { # NAME UPSTREAM [CKPT]
  local exp="$WORK/exp/$(basename "$corpus")-$1-$STEPS" overrides
  overrides="config.downstream_expert.datarc.file_path='$corpus'"
  overrides+=",,config.downstream_expert.datarc.meta_data='$corpus/veri_test_class.txt'"
  overrides+=",,config.downstream_expert.datarc.num_workers=0"
  overrides+=",,config.downstream_expert.datarc.max_timestep=48000"
  overrides+=",,config.runner.total_steps=$STEPS,,config.runner.save_step=$((STEPS / 4)),,config.runner.log_step=$((STEPS / 4))"
  overrides+=",,config.runner.eval_dataloaders=[],,config.runner.gradient_accumulate_steps=1,,config.optimizer.lr=5.0e-3"
  if [ ! -f "$exp/states-$STEPS.ckpt" ]; then
    "$python" -m s3prl.run_downstream -m train -a -u "$2" ${3:+-k "$3"} -d voxceleb1 \
      -c "$ROOT/recipes/superb/conf/SID.yaml" -p "$exp" --device "$DEVICE" -o "$overrides"
  fi
  if ! grep -q '^test at step' "$exp/log.log" 2> /dev/null; then
    "$python" -m s3prl.run_downstream -m evaluate -t test -e "$exp/states-$STEPS.ckpt" --device "$DEVICE"
  fi
}

say "4/6 SID with -u $UPSTREAM, $STEPS steps on $DEVICE"
label="$UPSTREAM"
if [ "$CKPT" = "$UNTRAINED" ]; then
  label=untrained
elif [ -n "$CKPT" ]; then
  label="$UPSTREAM-$(basename "$CKPT" | tr -c 'A-Za-z0-9_.\n' _)"
fi
probe "$label" "$UPSTREAM" "$CKPT"
say "5/6 SID with an untrained network and with -u fbank, the same budget"
probe untrained ecapa_tdnn_local "$UNTRAINED"
probe fbank fbank

say "6/6 results"
results="$WORK/results/$(basename "$corpus")-$label-$STEPS"
mkdir -p "$results"
experiment="$WORK/exp/$(basename "$corpus")"
others=()
rows=("$label=$experiment-$label-$STEPS")
models=(-m "$label=s3prl:$UPSTREAM${CKPT:+ ckpt='$CKPT'}")
weights="SID=$experiment-$label-$STEPS/states-$STEPS.ckpt"
audio=(-a "$corpus/test/wav" --limit 60 --device "$DEVICE")
if [ "$label" != untrained ]; then
  rows+=("untrained=$experiment-untrained-$STEPS")
  others=(-m "untrained=s3prl:ecapa_tdnn_local ckpt='$UNTRAINED'")
fi
"$python" -m cka_addon layer-weights "$weights" "${models[@]}" -a "$corpus/test/wav" --limit 60 --out "$results"
if [ ! -f "$results/cka.json" ]; then
  "$python" -m cka_addon compute "${models[@]}" ${others[@]+"${others[@]}"} -m fbank "${audio[@]}" --mode full -o "$results/cka.json"
fi
"$python" -m cka_addon plot "$results/cka.json" -o "$results"
"$python" -m cka_addon report "$results/cka.json" -o "$results/report.html" --weights "$weights" --title "Quickstart"
"$python" -m s3prl_speaker_upstreams.demo summary --speakers "$corpus/vox1_meta.csv" \
  "${rows[@]}" "fbank=$experiment-fbank-$STEPS" | tee "$results/accuracy.txt"
say "pictures and tables are in $results; open $results/report.html"
