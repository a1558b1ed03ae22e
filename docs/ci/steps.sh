#!/usr/bin/env bash
# The steps of the GitHub action and of the GitLab template: install, plan, run, comment. Settings are environment
# variables: RECIPE, MODEL, OUT, SET (lines of key.path=value), EXTRAS, VERSION, TORCH_INDEX, ACTION (this repository).
set -euo pipefail

overrides() { # the lines of SET as --set options, in the array `options`
  options=()
  [ -z "${MODEL:-}" ] || options+=(--model "$MODEL")
  while IFS= read -r line; do
    [ -z "${line//[[:space:]]/}" ] || options+=(--set "$line")
  done <<< "${SET:-}"
}

install() {
  # torch first, from its own index: pip then leaves it alone
  python -c 'import torch' 2> /dev/null || python -m pip install --quiet torch --index-url "$TORCH_INDEX"
  python -m pip install --quiet "${VERSION:-quantpress${EXTRAS:+[$EXTRAS]} @ file://$ACTION}"
  quantpress doctor
}

plan() {
  overrides
  quantpress plan "$RECIPE" "${options[@]}"
}

run() {
  overrides
  local code=0
  quantpress run "$RECIPE" --out "$OUT" "${options[@]}" || code=$?
  if [ -n "${GITHUB_OUTPUT:-}" ]; then
    local verdict=""
    [ ! -f "$OUT/eval/results.json" ] || verdict=$(python -c \
      'import json, sys; print(json.load(open(sys.argv[1], encoding="utf-8"))["gates"]["verdict"])' "$OUT/eval/results.json")
    { echo "verdict=$verdict"; echo "report=$OUT/report/index.html"; echo "artifact=$OUT/quantized"; } >> "$GITHUB_OUTPUT"
  fi
  return "$code"
}

comment() { # one comment on the pull request, written again by each run of the same recipe
  [ -f "$OUT/report/summary.md" ] || { echo "no summary: nothing to say"; return 0; }
  local mark="<!-- quantpress $RECIPE -->" body old
  # a picture cannot be attached from here: the chart is in the artifact that the link leads to
  body=$(printf '%s\n' "$mark"; sed '/^!\[/d' "$OUT/report/summary.md"; printf '\n[Report, chart and measurements](%s)\n' "$RUN_URL")
  old=$(gh api --paginate "repos/$GITHUB_REPOSITORY/issues/$PULL_REQUEST/comments" \
    --jq ".[] | select(.body | startswith(\"$mark\")) | .id" | head -n 1)
  if [ -n "$old" ]; then
    gh api --silent --method PATCH "repos/$GITHUB_REPOSITORY/issues/comments/$old" --field body="$body"
  else
    gh api --silent --method POST "repos/$GITHUB_REPOSITORY/issues/$PULL_REQUEST/comments" --field body="$body"
  fi
}

"$@"
