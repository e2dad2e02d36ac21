#!/usr/bin/env bash
# One SUPERB task with one upstream, through s3prl's own runner, resumable stage by stage.
#
#   recipes/superb/run.sh TASK UPSTREAM [options]         e.g.  recipes/superb/run.sh SID ecapa_dino --data /corpora/VoxCeleb1
#   recipes/superb/run.sh KS fbank --smoke --device cpu   the whole path in a minute or two, on a generated corpus
#   STAGES="evaluate score" recipes/superb/run.sh ...     some stages only; each starts alone
#
# Reads: the corpus (--data). Writes: EXP/UPSTREAM/TASK (s3prl_speaker_upstreams/superb/run.py says what lies where).
# Finished stages are skipped; after a kill, start it again and it goes on from the last whole checkpoint.
# All options: python -m s3prl_speaker_upstreams.superb run --help
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac

RECIPE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STAGES=${STAGES:-"check prepare train choose evaluate score collect"}
EXP=${EXP:-exp/superb}            # where runs are kept
DATA=${DATA:-}                    # root of the corpus, or of a folder with one folder for each task (all.sh)
S3PRL_ROOT=${S3PRL_ROOT:-}        # a checkout of s3prl; empty: the installed package

if [[ $# -lt 2 ]]; then
  sed -n '2,10p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//' >&2
  exit 2
fi
task=$1 upstream=$2
shift 2
source "$(dirname "${BASH_SOURCE[0]}")/../env/python.sh" # sets PYTHON

previous=
for option in "$@"; do
  [[ $previous == --exp ]] && EXP=$option # the tables belong where the runs are
  [[ $option == --exp=* ]] && EXP=${option#--exp=}
  previous=$option
done
options=(--exp "$EXP")
[[ -n $DATA ]] && options+=(--data "$DATA")
[[ -n $S3PRL_ROOT ]] && options+=(--s3prl-root "$S3PRL_ROOT")

own=() collect=no
for stage in $STAGES; do
  if [[ $stage == collect ]]; then collect=yes; else own+=("$stage"); fi
done
if [[ ${#own[@]} -gt 0 ]]; then
  "$PYTHON" -m s3prl_speaker_upstreams.superb run "$task" "$upstream" "${options[@]}" "$@" \
    --stages "$(IFS=,; echo "${own[*]}")"
fi
if [[ $collect == yes ]]; then "$PYTHON" -m s3prl_speaker_upstreams.superb collect --exp "$EXP"; fi
