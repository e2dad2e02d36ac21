# Sourced by recipes: a stage is skipped where its output was made from these very inputs, not where the file exists.
#   fresh OUTPUT INPUT ...   whether it was        made OUTPUT INPUT ...   note that it is now
# An input is a file, which counts by its content, a folder, which counts by the names and sizes of what is in it, or a
# word such as a setting, which counts as itself.

identity() {
  local input
  for input in "$@"; do
    if [ -f "$input" ]; then
      sha256sum <"$input"
    elif [ -d "$input" ]; then
      (cd "$input" && find . -type f -exec wc -c {} + | sort)
    else
      echo "$input"
    fi
  done | sha256sum
}
fresh() { [ -s "$1" ] && [ "$(cat "$1.made_from" 2>/dev/null)" = "$(identity "${@:2}")" ]; }
made() { identity "${@:2}" >"$1.made_from"; }
