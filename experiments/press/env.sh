#!/usr/bin/env bash
# An environment of its own for NVIDIA's kvpress, which needs a library below 5.3: env.sh FOLDER [TORCH]
# TORCH: a version, as of the environment that runs beside it (default: what python3 has).
set -euo pipefail
folder=$1
torch=${2:-$(python3 -c 'import torch; print(torch.__version__.partition("+")[0])')}
python3 -m venv "$folder"
"$folder/bin/pip" install -q "torch==$torch" transformers==5.2.0 tokenizers==0.22.2 kvpress==0.5.5 accelerate
# The library's quantized caches: arms that need them are refused where these cannot be had.
"$folder/bin/pip" install -q optimum-quanto || echo "no optimum-quanto here: no arm quanto" >&2
"$folder/bin/pip" install -q hqq || echo "no hqq here: no arm hqq" >&2
