"""Training data for the gated draft adapter: prompts, the model's own answers, and reading them back.

`recipe` makes prompts, `prompts` reads them, `distil` generates answers, `samples` reads and splits the result.
Importing these modules imports neither torch nor vLLM.
"""
