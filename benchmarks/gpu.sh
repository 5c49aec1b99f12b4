#!/usr/bin/env bash
# What this project wants from a GPU, in one go (about 30 minutes on one H100). Not run yet: no GPU was lent so far.
# Needs `pip install 'vllm>=0.32,<0.34'` and this package with its extras bench and dev; results land in
# benchmarks/results/. vLLM picks Model Runner V2 and asynchronous scheduling by itself.
set -uo pipefail
cd "$(dirname "$0")/.."
idlm doctor || true
# 1. The kernels against their plain torch forms (under the interpreter there too), greedy equality on CUDA with the
#    numeric floor beside it.
python -m pytest tests/interpreted -q -k "oracle or verify_rows or draft_and_gate or tail_kernel" -p no:cacheprovider
python -m benchmarks.equality --dtype bfloat16 --name equality-gpu
#    Extra groups inside full CUDA graphs, and without graphs: the same text, and the same TPF but for ties (`auto` has its
#    widths by the clock). A lower one under graphs would mean that they read other rows than they should.
for graphs in "" --eager; do
  python -m benchmarks.equality $graphs --dtype bfloat16 --methods risd:all,risd:auto --strides 4 \
    --name "equality-gpu-coverage$graphs"
done
python - <<'PY' || exit 1
import json
with_graphs, without = (
    [row["tpf"] for row in json.load(open(f"benchmarks/results/equality-gpu-coverage{end}.json"))["result"]["rows"]
     if row["method"] == "risd:all"] for end in ("", "--eager"))
print("TPF of risd:all with CUDA graphs", with_graphs, "and without", without)
assert all(abs(a / b - 1) < 0.03 for a, b in zip(with_graphs, without, strict=True)), "graphs read other rows"
PY
#    vLLM profiles its graphs' memory in a cache of its own first where it sizes the cache by itself: a plain start.
python -c "from vllm import LLM; LLM('smollm2-135m-risd', speculative_config={'method': 'isd', 'n': 4, 'coverage': 'all'}, max_model_len=1024)" || exit 1
VLLM_USE_V2_MODEL_RUNNER=0 python -m pytest tests/test_forwards.py tests/test_sampled.py -q
# 2. The step kernels: time and bytes against the limit and against vLLM's own chain.
python -m benchmarks.kernels --batches 1,4,16,64 --name kernels-gpu
# 3. The cost of a forward and tokens/s at the shape of Qwen3-8B, dummy weights, drafts accepted at the paper's rate.
#    Targets: OH <= 1.05 at batch <= 16 and R-ISD <= 1.08; tokens/s over 2.6x plain at 1 and over 1.8x at 32.
for pair in plain,isd plain,risd plain,isd:all plain,isd:auto; do
  python -m benchmarks.overhead --shape qwen3-8b --methods "$pair" --batches 1,4,8,16,32,64 --synthetic 0.9 \
    --name "overhead-gpu-qwen3-8b-$(tr : - <<<"${pair#plain,}")"
done
# 4. By coverage at lower acceptance, where cold forwards are many (aim: over 3.0x plain at 1 request and 0.9).
for rate in 0.7 0.8; do
  python -m benchmarks.overhead --shape qwen3-8b --methods plain,isd,isd:all,isd:auto --batches 1,4,16,64 --synthetic $rate \
    --name "overhead-gpu-qwen3-8b-coverage-$rate"
done
