#!/usr/bin/env bash
# An environment of its own for llm-compressor, which wants another transformers than ours:
#   bash tests/oracles/make_llm_compressor_env.sh FOLDER
set -euo pipefail
python3 -m venv "$1"
"$1/bin/pip" install --quiet "torch<2.14" "llmcompressor==0.14.*" "transformers>=5.15,<5.18"
