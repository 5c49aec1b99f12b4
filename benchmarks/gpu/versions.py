"""What of the kit differs from one vLLM to another."""

from __future__ import annotations

import re
from dataclasses import dataclass

DEFAULT = "0.32.0"


@dataclass(frozen=True)
class Version:
    """One version of vLLM's CUDA wheel, cut down to a bf16 Llama or Qwen3 on Hopper."""

    requirements: str = ""  # file of the packages that it imports and the machine lacks
    drop: re.Pattern = re.compile("(?!)")  # files of the wheel that stay away
    # Extension modules that are cut, by a part of their names: the kernels that stay, as a pattern over the demangled
    # names of a fatbin's kernels (one match keeps the fatbin); None: all but what `leave` matches.
    keep: tuple[tuple[str, re.Pattern | None], ...] = ()
    leave: re.Pattern = re.compile("(?!)")
    keep_anyway: re.Pattern = re.compile("(?!)")  # also where `leave` matches
    refused: str | None = None  # why no kit is made of it


VERSIONS = {
    "0.32.0": Version(
        requirements="kit_requirements.txt",
        drop=re.compile(  # not for Hopper, not for Llama and Qwen3, or not for Python
            r"vllm-rs$|_vllm_fa2_C|_qutlass_C|_flashmla|_flashkda_C|_deepselect_C|/third_party/(deep_gemm|fmha_sm100|"
            r"tml_fa4|flashmla|qutlass|triton_kernels/)|\.(h|hpp|cuh|cu|inl|jpg|png|js|css|html)$|fused_moe/configs/"
            r"|/RECORD$|/vllm_flash_attn/cute/|/kernels/helion/configs|/quantization/utils/configs/"
        ),
        keep=(
            # FlashAttention 3: bf16 with heads of 64 and 128, splits, paging, causal; combine and scheduling kernels.
            (
                "_vllm_fa3_C",
                re.compile(
                    r"FlashAttnFwdCombine|prepare_varlen_num_blocks|"
                    r"cute::tuple<cute::C<\d+>, cute::C<\d+>, cute::C<(?P<d>64|128)> >, (?P=d), cutlass::bfloat16_t"
                ),
            ),
            ("_moe_C_stable", re.compile(r"(?!)")),  # imported for its operators' names alone
            ("_C_stable", None),
        ),
        leave=re.compile(
            r"marlin|machete|selective_scan|cutlass_3x|cutlass::reorder|Gemm|gemm|gptq|awq|kda_|gdn_|minimax|deepseek|"
            r"Deepseek|kimi|Kimi|hadamard|hisparse|cooperative_topk|sampled_topk|topKPerRow|MLA|mla_|mnnvl|batched_moe|"
            r"int4b|dcp_|lse_combine|sparse_topk|per_token_group_quant|dynamic_per_token_quant|scaled_int8|fp8_quant"
        ),
        keep_anyway=re.compile(
            r"apply_repetition_penalties|persistent_topk|reshape_and_cache|rotary_embedding_kernel|rms_norm_kernel|"
            r"activation_kernel|act_and_mul|vocab_"
        ),
    ),
    "0.33.0": Version(
        refused="its CUDA build wants torch 2.14, and the machine that the kit is for has 2.11; which of its kernels "
        "to keep and what shims.py would have to put in were not looked at. Fix: --vllm 0.32.0"
    ),
}


def named(version: str) -> Version:
    """The entry of a version; SystemExit with the reason where no kit can be made of it."""
    found = VERSIONS.get(version)
    allowed = ", ".join(name for name, one in VERSIONS.items() if one.refused is None)
    if found is None:
        raise SystemExit(
            f"--vllm {version}: not known; allowed are {allowed}. Fix: add an entry to versions.py, with the kernels "
            "that its extension modules call and the packages that it imports"
        )
    if found.refused:
        raise SystemExit(f"--vllm {version}: {found.refused}")
    return found
