"""Quality of ISD against plain decoding on the usual benchmarks, through lm-evaluation-harness (`idlm eval`)."""
