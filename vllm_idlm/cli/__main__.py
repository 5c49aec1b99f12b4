"""`python -m vllm_idlm.cli`: the command line, for launchers that start modules (accelerate launch -m)."""

from vllm_idlm.cli import main

main()
