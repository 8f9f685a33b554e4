#!/usr/bin/env bash
# What env.sh makes, without a network: wheels.sh FOLDER WHEELS [PYTHON]
# WHEELS: a folder of wheels: kvpress 0.5.5, transformers 5.2.0, tokenizers 0.22.2, and what PYTHON
# (default: python3), whose torch is used, lacks of their needs.
set -euo pipefail
mkdir -p "$1/bin" "$1/site"
folder=$(cd "$1" && pwd)
python=$(command -v "${3:-python3}")
"$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$folder/site" "$2"/*.whl
printf '#!/bin/sh\nPYTHONPATH=%q exec %q "$@"\n' "$folder/site" "$python" >"$folder/bin/python"
chmod +x "$folder/bin/python"
