#!/usr/bin/env bash
# All gates: format, lint, types, import contracts, sizes, fresh generated docs, tests.
# Runs with the tools of the active environment or of the one named by VENV (default .venv-dev):
#   tools/check.sh            everything
#   tools/check.sh gates      everything but the tests
#   tools/check.sh fix        formats and repairs what ruff can, rewrites generated docs, then the gates
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-dev}
if [ -d "$venv/bin" ]; then PATH="$PWD/$venv/bin:$PATH"; fi
code="jaxtune tools tests configs launch"

what=${1:-all}
case $what in
  all | gates) ;;
  fix)
    ruff check --fix --quiet $code || true
    ruff format --quiet $code
    python tools/docs.py
    ;;
  *)
    echo "usage: tools/check.sh [gates | fix]" >&2
    exit 2
    ;;
esac

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
if [ "$what" = all ]; then gate tests python -m pytest -n 2; fi

if [ ${#failed[@]} -gt 0 ]; then
  echo "check: failed: ${failed[*]}" >&2
  exit 1
fi
echo "check: all passed"
