#!/usr/bin/env bash
# A bare machine for the SmolLM2-135M adapter alone. From the repository's root, on the device:
#   bash .gpukit/kit/train_gpu.sh first              # carries .gpukit/kit and .gpukit/p1: unpacks; a quick smoke test
#   bash .gpukit/kit/train_gpu.sh second 540 [130]   # carries .gpukit/kit and .gpukit/p2: 130 s of samples, then training
# Give the second call's own limit 30 s more. $OUT gets the adapter (adapter.tar.z.*, pieces of 15 MiB), metrics.jsonl,
# results.jsonl. ROWS, LR, CONFIG, COUNT and DATA (a folder of samples that are there) change it.
set -uo pipefail
what="${1:?first or second}"; seconds="${2:-500}"; data="${3:-130}"
. .gpukit/kit/env.sh
began=$(date +%s); tmp="$GPUKIT_TMP"
nvidia-smi > "$OUT/env.txt" 2>&1
timeout 120 python3 .gpukit/kit/unpack.py 2>&1 | tee -a "$OUT/env.txt"
if [ "$what" = first ]; then
  timeout 100 python3 .gpukit/kit/smoke.py 2>&1 | tail -n 25
  exit 0
fi
DATA="${DATA:-$tmp/data/chat}"
samples() {  # LIMIT [--eager]
  timeout "$1" python3 .gpukit/kit/make_data.py "$DATA" --count "${COUNT:-40000}" --seconds "$data" "${@:2}" >> "$tmp/data.log" 2>&1
}
if [ ! -s "$DATA/train-00000.jsonl" ]; then
  samples $((data + 60)) || samples $((data + 40)) --eager
  tail -n 6 "$tmp/data.log"
fi
wc -lc "$DATA"/*.jsonl
left=$(( seconds - ($(date +%s) - began) - 25 ))
echo "training for $left s"
timeout $((left + 20)) python3 .gpukit/kit/train_run.py --fit "$left" "${CONFIG:-smollm2-135m-gated-tv}" out="$tmp/run" \
  "adapter={init: adapters/smollm2-135m-isd}" "data=[$DATA]" rows="${ROWS:-16}" row_tokens=512 max_tokens=384 tilings=3 \
  lr="${LR:-1.0e-3}" eval_samples=48 steps=1000 2>&1 | tee "$tmp/train.log" | tail -n 40
cp "$tmp/run/metrics.jsonl" "$OUT/" 2>/dev/null
tail -c 400000 "$tmp/data.log" > "$OUT/data.log" 2>/dev/null
tail -c 400000 "$tmp/train.log" > "$OUT/train.log"
last="$tmp/run/final"
if [ ! -d "$last" ]; then
  echo "no export: the weights of the last checkpoint instead (names as in training)"
  last="$tmp/run/last"
  python3 .gpukit/kit/last_weights.py "$tmp/run" "$last/weights.safetensors"
fi
pack="gzip -1"; command -v xz > /dev/null && pack="xz -1 -T8"
[ -n "$(ls -A "$last" 2>/dev/null)" ] &&
  tar -C "$(dirname "$last")" -cf - "$(basename "$last")" | $pack | split -b 15M -d - "$OUT/adapter.tar.z."
ls -la "$OUT"
