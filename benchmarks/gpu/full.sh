#!/usr/bin/env bash
# What this project wants from a GPU that has a network and time: one H100, some hours (about 30 engines, most of which
# compile the model). Never run. Needs `pip install -e '.[cuda,bench,dev]'`; results land in benchmarks/results/. vLLM
# picks Model Runner V2 and asynchronous scheduling by itself. With little time: `full.sh kernels equality`.
set -uo pipefail
cd "$(dirname "$0")/../.."

kernels() {  # compiled, against their plain torch forms; then time and bytes against the limit and vLLM's own chain
  OUT=benchmarks/results/.gpu python benchmarks/gpu/smoke.py
  python -m benchmarks.kernels --batches 1,4,16,64 --name kernels-gpu
}

equality() {  # greedy answers against plain decoding, the numeric floor beside them; with extra groups in CUDA graphs
  python -m benchmarks.equality --dtype bfloat16 --name equality-gpu
  for graphs in "" --eager; do
    python -m benchmarks.equality $graphs --dtype bfloat16 --methods risd:all,risd:auto --strides 4 \
      --name "equality-gpu-coverage$graphs"
  done
  python - <<'PY'
import json

with_graphs, without = (
    [row["tpf"] for row in json.load(open(f"benchmarks/results/equality-gpu-coverage{end}.json"))["result"]["rows"]
     if row["method"] == "risd:all"] for end in ("", "--eager"))
print("TPF of risd:all with CUDA graphs", with_graphs, "and without", without)
assert all(abs(a / b - 1) < 0.03 for a, b in zip(with_graphs, without, strict=True)), "graphs read other rows"
PY
}

start() {  # plainly: vLLM sizes its cache by itself, and profiles its graphs' memory in a cache of its own first
  python -c "from vllm import LLM; LLM('smollm2-135m-risd', max_model_len=1024,
             speculative_config={'method': 'isd', 'n': 4, 'coverage': 'all'})"
}

runner_v1() {
  VLLM_USE_V2_MODEL_RUNNER=0 python -m pytest tests/engine/test_proposer.py tests/engine/test_sampler.py -q
}

overhead() {  # a forward at the shape of Qwen3-8B, dummy weights, drafts accepted at a given rate; two engines at a time
  # Targets: OH <= 1.05 at batch <= 16 and R-ISD <= 1.08; over 2.6x plain's tokens/s at 1 and over 1.8x at 32 (rate 0.9);
  # at lower rates, where cold forwards are many, other coverages are to pay.
  for rate in 0.9 0.8 0.7; do
    methods="isd isd:all isd:auto"; [ "$rate" = 0.9 ] && methods="$methods risd"
    for method in $methods; do
      python -m benchmarks.overhead --shape qwen3-8b --methods "plain,$method" --batches 1,4,8,16,32,64 \
        --synthetic "$rate" --name "overhead-gpu-qwen3-8b-${method/:/-}-$rate"
    done
  done
}

idlm doctor || true
failed=()
for step in "${@:-kernels equality start runner_v1 overhead}"; do
  for name in $step; do
    echo "== $name"
    "$name" || failed+=("$name")
  done
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
