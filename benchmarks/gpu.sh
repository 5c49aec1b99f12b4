#!/usr/bin/env bash
# What this project wants from a GPU, in one go (about 20 minutes on one H100). Not run yet: no GPU was lent so far.
# Needs `pip install 'vllm>=0.32,<0.34'` and this package; results land in benchmarks/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
export VLLM_USE_V2_MODEL_RUNNER=0 # ISD runs on Model Runner V1 so far
idlm doctor || true
# 1. Exactness on CUDA: greedy equality with the numeric floor beside it, and the sampled distribution.
python -m benchmarks.equality --dtype bfloat16 --name equality-gpu
python -m pytest tests/test_forwards.py tests/test_sampled.py -q
# 2. The cost of a forward at the shape of Qwen3-8B, dummy weights.
python -m benchmarks.overhead --shape qwen3-8b --batches 1,8,16 --name overhead-gpu-qwen3-8b
