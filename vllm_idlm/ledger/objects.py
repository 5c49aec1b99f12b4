"""Ledger: what code outside this folder replaces on vLLM's objects, and the private state that it reads or makes.

Callable attributes are replaced by `vllm_idlm.patching.replace`, which names its entry here. None of these entries
changes a class or a module.
"""

from __future__ import annotations

from vllm_idlm.patching import patch

_FORWARD = ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output")
_BACKENDS = "vllm.v1.attention.backends"
_PROCESSORS = "vllm.v1.sample.logits_processor.builtin"

attention = patch(
    "object-attention",
    "vllm.v1.attention.backend",
    "groups",
    what="the attention of each layer computes the rows of extra groups behind vLLM's own (impl.forward); the metadata "
    "builders hand it their places (builder.build, builder.build_for_cudagraph_capture). In vllm_idlm.tail",
    why="rows of extra groups see a prefix and themselves, which is no causal attention over a sequence",
    removed_by="positions and an attention mask of a proposer's own for speculative rows",
)
for _impl in ("flash_attn:FlashAttentionImpl", "triton_attn:TritonAttentionImpl", "cpu_attn:CPUAttentionBackendImpl"):
    attention.reads(f"{_BACKENDS}.{_impl}.forward", *_FORWARD)
attention.reads("AttentionMetadataBuilder.build", "self", "common_prefix_len", "common_attn_metadata")
attention.reads("AttentionMetadataBuilder.build_for_cudagraph_capture", "self", "common_attn_metadata")
attention.reads(
    "vllm.v1.attention.backend:CommonAttentionMetadata",
    fields=(
        "query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "block_table_tensor", "max_query_len",
    ),
)  # fmt: skip

v1_sampler = patch(
    "object-v1-rejection-sampler",
    "vllm.v1.worker.gpu_model_runner",
    "v1",
    what="runner.rejection_sampler is ISD's. In vllm_idlm.v1.proposer",
    why="rows of mask slots are not verified, and every option of a request applies to every verified row",
    removed_by="a proposer interface that may bring its rejection sampler",
)
v1_sampler.reads("GPUModelRunner", fields=("rejection_sampler", "sampler", "input_batch", "requests", "positions"))
v1_sampler.reads(
    "vllm.v1.sample.rejection_sampler:RejectionSampler.forward",
    "self", "metadata", "draft_probs", "logits", "sampling_metadata",
)  # fmt: skip
v1_sampler.reads("vllm.v1.sample.sampler:Sampler.apply_logits_processors", "self", "logits", "sampling_metadata")
v1_sampler.reads(
    "vllm.v1.sample.metadata:SamplingMetadata",
    fields=(
        "temperature", "all_greedy", "top_p", "top_k", "generators", "max_num_logprobs", "no_penalties",
        "prompt_token_ids", "frequency_penalties", "presence_penalties", "repetition_penalties", "output_token_ids",
        "allowed_token_ids_mask", "bad_words_token_ids", "logitsprocs", "spec_token_ids", "logprob_token_ids",
        "thinking_budget_state_holder",
    ),
)  # fmt: skip

v1_options = patch(
    "object-v1-logits-processors",
    _PROCESSORS,
    "v1",
    what="vLLM's built-in logits processors are made anew with one entry a verified row, field by field. In "
    "vllm_idlm.v1.options",
    why="their state is one entry a request, and they have no way to lay it out over rows",
    removed_by="logits processors that take rows of a request, as vLLM's own speculation will need",
)
v1_options.reads("MinTokensLogitsProcessor", fields=("device", "neg_inf_tensor", "min_toks", "logits_slice"))
v1_options.reads("MinTokensLogitsProcessor.apply", "self", "logits")
v1_options.reads("LogitBiasLogitsProcessor", fields=("device", "biases", "bias_tensor", "logits_slice"))
v1_options.reads("LogitBiasLogitsProcessor.apply", "self", "logits")
v1_options.reads("MinPLogitsProcessor", fields=("min_p", "min_p_count"))
v1_options.reads("MinPLogitsProcessor.apply", "self", "logits")

v1_thinking = patch(
    "object-v1-thinking",
    "vllm.v1.sample.thinking_budget_state",
    "v1",
    what="a thinking budget's state machine is advanced over the drafts before each verified row (_state, "
    "_update_think_state, _init_state_entry); a key isd in its state keeps how far. In vllm_idlm.v1.thinking",
    why="vLLM advances it by the tokens of a step, not by rows",
    removed_by="a state machine of one token at a time with a copy for each row",
)
v1_thinking.reads("ThinkingBudgetStateHolder", fields=("_state", "in_spec_mode", "num_spec_tokens"))
v1_thinking.reads("ThinkingBudgetStateHolder._update_think_state", "self", "state")
v1_thinking.reads("ThinkingBudgetStateHolder._init_state_entry", "self", "prompt_tok_ids", "thinking_token_budget")
v1_thinking.reads(
    "ThinkingBudgetStateHolder.apply_to_logits", "self", "logits", "predict_bonus_token", "spec_token_ids"
)
v1_thinking.reads("ThinkingBudgetStateHolder.has_tracked_requests", "self")

base_graph = patch(
    "object-v1-second-graph",
    "vllm.compilation.wrapper",
    "cpu", "v1", "auto",
    what="a compiled module is copied and compiled a second time without LoRA (its private marks of what was compiled "
    "are reset). In vllm_idlm.v1.base_graph",
    why="a step without mask slots still paid for the LoRA calls of the one graph",
    removed_by="a graph without LoRA on the CPU platform, as full CUDA graphs have",
    optional=True,
)  # fmt: skip
base_graph.reads("TorchCompileWithNoGuardsWrapper.__init__", "self", "compile_prefix", "is_encoder")
base_graph.reads(
    "TorchCompileWithNoGuardsWrapper",
    fields=("_compile_prefix", "_is_encoder", "compiled"),
)
base_graph.reads(
    "vllm.compilation.decorators:_support_torch_compile",
    holds=("self.aot_compiled_fn", "self.was_aot_compile_fn_loaded_from_disk", "self.do_not_compile"),
)
base_graph.reads("vllm.v1.worker.cpu_model_runner:_set_global_compilation_settings", "config")

v2_sampler = patch(
    "object-v2-samplers",
    "vllm.v1.worker.gpu.sample.sampler",
    "v2",
    what="runner.rejection_sampler and runner.sampler are ISD's; add_request of the sampler's states, of its "
    "processors and of the requests' states tells ISD of each new request. In vllm_idlm.v2.sampler and .speculator",
    why="V2 does not ask a speculator how its drafts are verified, nor tell it of requests",
    removed_by="a speculator interface that may bring its rejection sampler and hears of new requests",
)
v2_sampler.reads(
    "Sampler",
    fields=("sampling_states", "thinking_budget_state", "logits_processors", "compute_nans", "logprobs_mode",
            "logprob_token_ids_state"),
)  # fmt: skip
v2_sampler.reads("Sampler.__call__", "self", "logits", "input_batch")
v2_sampler.reads("vllm.v1.worker.gpu.sample.states:SamplingStates.add_request", "self", "req_idx", "sampling_params")
v2_sampler.reads("vllm.v1.worker.gpu.sample.states:SamplingStates", fields=("temperature", "seeds", "vocab_size"))
v2_sampler.reads("vllm.v1.worker.gpu.states:RequestState.add_request", "self", "req_id")
v2_sampler.reads(
    "vllm.v1.worker.gpu.states:RequestState", fields=("draft_tokens", "req_id_to_index", "prefill_len", "max_num_reqs")
)
v2_sampler.reads(
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler.__call__",
    "self", "logits", "input_batch", "draft_logits",
)  # fmt: skip
v2_sampler.reads(
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner", fields=("sampler", "rejection_sampler", "req_states")
)

v2_lora = patch(
    "object-v2-lora",
    "vllm.v1.worker.gpu.lora_utils",
    "v2", "lora",
    what="the buffers that vLLM's LoRA kernels read are written on the device (of the punica wrapper, of its "
    "LoRAKernelMeta, the manager's _last_mapping). In vllm_idlm.v2.lora",
    why="vLLM makes them from one adapter a request, on the host, with waits for the device",
    removed_by="a mapping by rows that is made on the device",
)  # fmt: skip
v2_lora.reads("LoraState.make_lora_inputs", "self", "req_ids", "idx_mapping", "num_scheduled_tokens")
v2_lora.reads("LoraState.get_activate_loras", "self", "req_ids")
v2_lora.reads("LoraState", fields=("lora_ids",))
v2_lora.reads(
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase",
    fields=("_token_lora_indices", "_sampler_indices", "_embeddings_indices", "indices_len", "is_prefill", "no_lora"),
)
v2_lora.reads(
    "vllm.lora.ops.triton_ops.lora_kernel_metadata:LoRAKernelMeta",
    fields=("token_lora_mapping", "token_indices_sorted_by_lora_ids", "active_lora_ids", "num_tokens_per_lora",
            "lora_token_start_loc", "no_lora_flag_cpu", "num_active_loras_cpu"),
)  # fmt: skip
v2_lora.reads(
    "vllm.lora.model_manager:LoRAModelManager",
    fields=("punica_wrapper_mapping", "lora_index_to_id", "_last_mapping", "vocab_size", "supports_mm"),
)
v2_lora.reads("vllm.lora.worker_manager:WorkerLoRAManager._apply_adapters", "self", "adapter_requests")
v2_lora.reads("vllm.lora.worker_manager:WorkerLoRAManager", fields=("_adapter_manager",))

metrics = patch(
    "object-statistics",
    "vllm.v1.spec_decode.metrics",
    what="the last place of SpecDecodingStats.num_draft_tokens_per_pos carries a step's slots from the scheduler to "
    "the logger. In vllm_idlm.ledger.scheduler and vllm_idlm.metrics",
    why="the statistics cross a process border in vLLM's own fields alone",
    removed_by="statistics of a plugin's own beside vLLM's",
)
metrics.reads("SpecDecodingStats", fields=("num_drafts", "num_draft_tokens_per_pos"))

calibration = patch(
    "object-calibration",
    "vllm.forward_context",
    "auto",
    what="the model is run on made-up tokens, outside of any step, to measure what rows cost. In vllm_idlm.calibrate",
    why="the policy needs the time of a forward by its rows, with the adapter and without",
    removed_by="a dummy run of vLLM's that takes a LoRA mapping and a number of rows",
)
calibration.reads("set_forward_context", "attn_metadata", "vllm_config", "num_tokens")
