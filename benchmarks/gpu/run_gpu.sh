#!/usr/bin/env bash
# What a bare machine is asked, in two or three calls. From the repository's root, on the device:
#   bash .gpukit/kit/run_gpu.sh first 300      # carries .gpukit/kit and .gpukit/p1: kernels, 8B plain and ISD
#   bash .gpukit/kit/run_gpu.sh second 400     # carries .gpukit/kit and .gpukit/p2: SmolLM2, 8B R-ISD, training
#   bash .gpukit/kit/run_gpu.sh third 200      # carries .gpukit/kit: other acceptances, torch.compile, coverage auto
#   bash .gpukit/kit/run_gpu.sh job 100 NAME METHOD ENGINE_ARGS..   # one engine of your own
# The number is the seconds that all may take; give the call's own limit 30 more. What is found is in
# $OUT/results.jsonl (a line a job, at once), $OUT/logs.txt (all that jobs printed), $OUT/env.txt; the table comes last.
set -uo pipefail
what="${1:?first, second, third or job}"; seconds="${2:?seconds}"; shift 2
. .gpukit/kit/env.sh
began=$(date +%s)
{
  date; nvidia-smi
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
  python3 -V; nproc; free -g | head -2; cat .gpukit/kit/commit.txt
  python3 -m pip list | grep -iE '^(torch|triton|transformers|peft|accelerate|numpy|numba|tokenizers|safetensors) '
} > "$OUT/env.txt" 2>&1 &
timeout 120 python3 .gpukit/kit/unpack.py 2>&1 | tee -a "$OUT/env.txt"
python3 .gpukit/kit/plans.py "$what" "$@" > "$GPUKIT_TMP/gpukit-plan.json" || exit 2
left=$(( seconds - ($(date +%s) - began) ))
python3 .gpukit/kit/jobs.py "$GPUKIT_TMP/gpukit-plan.json" --seconds "$left"
cp "$GPUKIT_TMP/gpukit-results.jsonl" "$OUT/all-results.jsonl" 2>/dev/null || true
