#!/usr/bin/env bash
# VoxCeleb for pre-training: unpack, convert VoxCeleb2's m4a to 16 kHz flac (parallel, resumable), trial lists, MUSAN, RIRs.
#
#   recipes/pretrain/voxceleb_data.sh [STAGE ...]        stages: check unpack convert trials (default: all, in this order;
#                                                       STAGES="unpack convert" says the same)
#
# Reads  $DOWNLOADS: the archives, which VoxCeleb hands out on request (https://mm.kaist.ac.kr/datasets/voxceleb/):
#          vox2_dev_aac.zip (or its parts vox2_dev_aac_parta?), vox1_dev_wav.zip (or parts), vox1_test_wav.zip
#        and, free to download, https://www.openslr.org/17 (musan.tar.gz) and https://www.openslr.org/28 (rirs_noises.zip)
# Writes $DATA/{vox2_dev,voxceleb1,musan,RIRS_NOISES,trials}; about 300 GB. What is done is skipped; a killed conversion goes on.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
DATA=${DATA:-data/voxceleb}
DOWNLOADS=${DOWNLOADS:-$DATA/downloads}
JOBS=${JOBS:-$(nproc)}
META=${META:-https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta}

say() { echo "[$(date +%H:%M:%S)] $*" >&2; }
die() { echo "voxceleb_data.sh: $*" >&2; exit 1; }

join() { # NAME.zip from NAME_parta?: the archives come in pieces
  local whole=$DOWNLOADS/$1 pattern=$2
  [ -s "$whole" ] && return 0
  compgen -G "$DOWNLOADS/$pattern" >/dev/null || return 1
  say "joining $DOWNLOADS/$pattern"
  cat "$DOWNLOADS"/$pattern >"$whole.part" && mv "$whole.part" "$whole"
}

check() {
  command -v ffmpeg >/dev/null || die "ffmpeg is needed to convert m4a: apt-get install ffmpeg (or conda install ffmpeg)"
  command -v unzip >/dev/null || die "unzip is needed: apt-get install unzip"
  local missing=()
  { [ -f "$DATA/.vox2.unpacked" ] || join vox2_dev_aac.zip 'vox2_dev_aac_part*'; } || missing+=("vox2_dev_aac.zip")
  { [ -f "$DATA/.vox1_dev.unpacked" ] || join vox1_dev_wav.zip 'vox1_dev_wav_part*'; } || missing+=("vox1_dev_wav.zip")
  { [ -f "$DATA/.vox1_test.unpacked" ] || [ -s "$DOWNLOADS/vox1_test_wav.zip" ]; } || missing+=("vox1_test_wav.zip")
  { [ -d "$DATA/musan" ] || [ -s "$DOWNLOADS/musan.tar.gz" ]; } || missing+=("musan.tar.gz (openslr.org/17)")
  { [ -d "$DATA/RIRS_NOISES" ] || [ -s "$DOWNLOADS/rirs_noises.zip" ]; } || missing+=("rirs_noises.zip (openslr.org/28)")
  [ ${#missing[@]} -eq 0 ] || die "not found in $DOWNLOADS: ${missing[*]}. VoxCeleb is given out on request; see the head of this file"
}

extract() { # MARK ARCHIVE FOLDER: the mark is set only when all is out
  local mark=$DATA/.$1.unpacked
  [ -f "$mark" ] && return 0
  say "unpacking $2"
  mkdir -p "$3"
  unzip -qn "$DOWNLOADS/$2" -d "$3"
  touch "$mark"
}

unpack() {
  mkdir -p "$DATA"
  extract vox2 vox2_dev_aac.zip "$DATA/vox2_m4a"
  extract vox1_dev vox1_dev_wav.zip "$DATA/voxceleb1"
  extract vox1_test vox1_test_wav.zip "$DATA/voxceleb1"
  [ -d "$DATA/musan" ] || { say "unpacking MUSAN"; tar -xzf "$DOWNLOADS/musan.tar.gz" -C "$DATA"; }
  [ -d "$DATA/RIRS_NOISES" ] || { say "unpacking RIRS_NOISES"; unzip -qn "$DOWNLOADS/rirs_noises.zip" -d "$DATA"; }
}

convert_one() { # written beside and renamed: a file that exists is whole
  local source=$1 target=$2
  [ -s "$target" ] && return 0
  mkdir -p "$(dirname "$target")"
  ffmpeg -nostdin -v error -y -i "$source" -ac 1 -ar 16000 -sample_fmt s16 -f flac "$target.part" && mv "$target.part" "$target" ||
    { rm -f "$target.part"; echo "$source" >>"$FAILED"; }
}
export -f convert_one

convert() {
  export FAILED=$DATA/vox2_failed.txt
  : >"$FAILED"
  local from=$DATA/vox2_m4a to=$DATA/vox2_dev total
  total=$(find "$from" -name '*.m4a' | wc -l)
  [ "$total" -gt 0 ] || die "no m4a below $from; run the stage unpack first"
  say "converting $total files with $JOBS jobs; those already in $to are skipped"
  # id00012/abc/00001.m4a, whatever folders the archive puts before
  find "$from" -name '*.m4a' -print0 |
    xargs -0 -P "$JOBS" -n 32 bash -c 'to=$0; for f; do r=${f%.m4a}; s=$(basename "$(dirname "$(dirname "$r")")"); v=$(basename "$(dirname "$r")"); convert_one "$f" "$to/$s/$v/$(basename "$r").flac"; done' "$to"
  say "$(find "$to" -name '*.flac' | wc -l) of $total converted; $(wc -l <"$FAILED") failed (listed in $FAILED)"
}

trials() {
  mkdir -p "$DATA/trials"
  local list
  for list in veri_test2 list_test_all2 list_test_hard2; do # Vox1-O, -E, -H, cleaned
    [ -s "$DATA/trials/$list.txt" ] && continue
    say "downloading $list.txt"
    curl -fsSL "$META/$list.txt" -o "$DATA/trials/$list.txt.part" || die "cannot download $META/$list.txt; put it into $DATA/trials by hand"
    mv "$DATA/trials/$list.txt.part" "$DATA/trials/$list.txt"
  done
}

# shellcheck disable=SC2086  # a list of words
[ $# -gt 0 ] || set -- ${STAGES:-check unpack convert trials}
for stage; do
  case $stage in check | unpack | convert | trials) "$stage" ;; *) die "unknown stage '$stage'; expected check, unpack, convert, trials" ;; esac
done
