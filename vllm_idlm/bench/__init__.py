"""`idlm bench`: decoding methods of vLLM side by side, each an engine in a process of its own, measured in turn.

config    what is asked: methods, prompts, concurrency, temperatures, rounds
worker    the child's side: an engine that measures rounds when told to
load      one round: a closed loop of requests over an engine
counters  what vLLM's own metrics and ISD's say of a round
child     the parent's side of `worker`
run       the order of rounds, failures, going on after an interruption
figures   from rounds to medians, spreads and ratios
checks    that the sum of the parts is right
report    JSON, tables; `plots` the pictures
"""
