"""`idlm batch`: a real job on Ray that is killed, resumed, and loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.jsonl import write_jsonl


def command(source, out, *options):
    """The command's arguments, its Ray on this machine alone."""
    return [sys.executable, "-m", "vllm_idlm.cli", "batch", str(source), str(out), *options]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def run_and_kill(arguments, journal, rows):
    """Start the command and SIGKILL it, and nothing else, once the journal has `rows` answers."""
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 500
    while process.poll() is None and time.monotonic() < until:
        if journal.exists() and journal.read_bytes().count(b"\n") > rows:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read()[-2000:]


def killed_job(source, out, kills, *options):
    """Run a job that is killed after each number of answers in `kills`; its answers, and its last run's stderr."""
    journal = out.with_name(out.name + ".partial")
    seen = []
    for rows in kills:
        run_and_kill(command(source, out, *options), journal, rows)
        assert not out.exists()
        seen.append(journal.read_bytes().count(b"\n") - 1)
    assert seen == sorted(set(seen)), "a run must go on where the one before was"
    print(f"killed with {seen} answers in the journal")
    last = subprocess.run(
        command(source, out, *options), env=environment(), capture_output=True, text=True, check=False
    )
    assert last.returncode in (0, 3), last.stderr[-2000:]
    return [json.loads(line) for line in out.read_text().splitlines()], last


@pytest.mark.vllm
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("count", "kills"), [(30, (9,)), pytest.param(500, (60, 190, 350), marks=pytest.mark.slow)], ids=["30", "500"]
)
def test_a_killed_job_loses_and_doubles_nothing(tmp_path, count, kills):
    """R-ISD, one prompt that is refused; every answer is the one of an engine that nobody killed."""
    pytest.importorskip("ray")
    from tests.support import tiny
    from tests.support.engines import engine

    model = str(tiny.write_tiny(tmp_path / "model"))
    draft = str(tiny.write_adapter(tmp_path / "draft", model, scale=0.5))
    prompts = [[2 + (3 * i + j * j) % 46 for j in range(3 + i % 7)] for i in range(count - 1)]
    rows = [{"id": f"row-{i}", "prompt_ids": p, "sampling": {"ignore_eos": True}} for i, p in enumerate(prompts)]
    rows.insert(20, {"id": "too-long", "prompt_ids": [3] * 500})
    options = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 20_000_000, "max_model_len": 128}
    options |= {"skip_tokenizer_init": True, "max_num_batched_tokens": 256}
    isd = {"method": "isd", "n": 4, "mask_token_id": 1, "lora": draft, "coverage": "last"}
    given = json.dumps({**options, "speculative_config": isd})
    settings = ("--model", model, "--engine", given, "--max-tokens", "24", "--in-flight", "4")
    found, last = killed_job(write_jsonl(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl", kills, *settings)
    assert [answer["index"] for answer in found] == list(range(count))
    assert [answer["id"] for answer in found] == [row["id"] for row in rows]
    assert "128" in found.pop(20)["error"]
    assert last.returncode == 3
    assert [answer["token_ids"] for answer in found] == plain(engine(model, **options), prompts, 24)


def plain(llm, prompts, tokens):
    """Greedy answers without ISD, by an engine in this process."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
