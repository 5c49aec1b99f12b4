"""The configuration of `model_type` "sdar": what config.json of the published I-DLM checkpoints says."""

from transformers import Qwen3Config


class SDARConfig(Qwen3Config):
    """Qwen3's configuration under the name "sdar".

    Differs from its parent in the name only; the checkpoints' further fields (`mask_token_id`, `block_size`, ...) are
    kept as attributes. A class of its own, because vLLM sets `model_type` on the class it registers: registered as
    itself, Qwen3Config would be renamed for every Qwen3 model of the process.
    """

    model_type = "sdar"
