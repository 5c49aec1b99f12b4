# Sourced on the device, from the repository's root, by every command: `. .gpukit/kit/env.sh`
export GPUKIT_REPO="${GPUKIT_REPO:-$PWD}" GPUKIT_TMP="${GPUKIT_TMP:-/tmp}"
export GPUKIT_SITE="${GPUKIT_SITE:-$GPUKIT_TMP/site}" OUT="${OUT:-$GPUKIT_TMP/out}"
export PYTHONPATH="$GPUKIT_SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export VLLM_IDLM_CACHE="${VLLM_IDLM_CACHE:-$GPUKIT_TMP/idlm-cache}" VLLM_CACHE_ROOT="$GPUKIT_TMP/vllm-cache"
export TRITON_CACHE_DIR="$GPUKIT_TMP/triton-cache" TORCHINDUCTOR_CACHE_DIR="$GPUKIT_TMP/inductor-cache"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-INFO}" TOKENIZERS_PARALLELISM=true
export VLLM_ENABLE_V1_MULTIPROCESSING=0          # the engine in this process: a faster start
export VLLM_USE_FLASHINFER_SAMPLER=0             # FlashInfer is not carried
export VLLM_DISTRIBUTED_USE_SPLIT_GROUP=0        # with 1 vLLM calls split_group(backend=..), which torch 2.11 lacks
mkdir -p "$OUT"
