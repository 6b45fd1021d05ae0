#!/usr/bin/env bash
# Every gate that needs no training run: format, lint, types, import contracts, sizes, fresh docs.
# Runs with the tools of the active environment or of the one named by VENV (default .venv-dev):
#   tools/check.sh            all gates
#   tools/check.sh --fix      formats and repairs what ruff can, rewrites generated docs, then all gates
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-dev}
if [ -d "$venv/bin" ]; then PATH="$PWD/$venv/bin:$PATH"; fi
code="jaxtune tools tests configs"

if [ "${1:-}" = "--fix" ]; then
  ruff check --fix --quiet $code || true
  ruff format --quiet $code
  python tools/docs.py
fi

failed=()
gate() {
  local name=$1
  shift
  echo "== $name: $*"
  "$@" || failed+=("$name")
}
gate format ruff format --check $code
gate lint ruff check $code
gate types pyright
gate imports lint-imports --no-cache
gate sizes python tools/sizes.py
gate docs python tools/docs.py --check

if [ ${#failed[@]} -gt 0 ]; then
  echo "check: failed: ${failed[*]}" >&2
  exit 1
fi
echo "check: all gates passed"
