"""Architecture `SDARForCausalLM` for vLLM: the published I-DLM checkpoints (arXiv 2604.11035)."""

from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM


class SDARForCausalLM(Qwen3ForCausalLM):
    """Qwen3 under the name that the I-DLM checkpoints carry.

    Differs from its parent in nothing: same weights, same names, strictly causal attention. What makes the model an
    I-DLM is its training and the mask slots that decoding hands it. Block-diffusion SDAR checkpoints of the same
    architecture name attend both ways inside a block, which this class does not do.
    """
