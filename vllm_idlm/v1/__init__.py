"""ISD on vLLM's Model Runner V1: the proposer, the sampler and the LoRA mapping. The algorithm is in `proposers`."""
