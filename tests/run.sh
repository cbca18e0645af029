#!/usr/bin/env bash
# Sets up .venv, fetches the two small real models, runs every test: bash tests/run.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. demo/setup.sh
exec python -m pytest "$@"
