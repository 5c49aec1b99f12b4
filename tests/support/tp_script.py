"""One engine of test_worker_ranks.py, in processes of its own: reads what to run as JSON, prints what came out."""

import json
import os
import sys

PROMPTS = [[3, 7, 11, 2], [5, 5, 9], [1, 2, 3, 4, 5, 6, 7, 8], [13]]
WAYS = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.8, "seed": 5},
    "unseeded": {"temperature": 0.8},
    "without isd": {"temperature": 0, "extra_args": {"isd": False}},
}


def run(options: dict) -> dict:
    """Answers by way of sampling, and every rank's counts and record of forwards."""
    from vllm import LLM, SamplingParams

    llm = LLM(**options)
    isd = "speculative_config" in options
    if isd:
        llm.collective_rpc("isd_trace")
    answers = {}
    for way, how in WAYS.items():
        if isd or "extra_args" not in how:
            params = SamplingParams(max_tokens=20, ignore_eos=True, detokenize=False, **how)
            outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
            answers[way] = [list(o.outputs[0].token_ids) for o in outputs]
    return {"answers": answers, "ranks": llm.collective_rpc("isd_stats") if isd else []}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if cpus := asked.pop("ray_cpus", None):  # more than this machine has
        import ray

        os.environ["RAY_ADDRESS"] = ray.init(num_cpus=cpus, include_dashboard=False).address_info["gcs_address"]
    print("FOUND", json.dumps(run(asked)))
