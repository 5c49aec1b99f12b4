"""`idlm batch`: what it reads, its journal, and a real job on Ray that is killed, resumed, and loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from vllm_idlm.batch.errors import BatchError
from vllm_idlm.batch.journal import Journal
from vllm_idlm.batch.rows import read

JOB = {"input": "abc", "max_tokens": 8}


def write(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# -- rows


def test_rows_carry_what_they_say_over_the_defaults(tmp_path):
    file = write(
        tmp_path / "in.jsonl", {"prompt": "Hello."}, {"id": 7, "prompt_ids": [1, 2], "sampling": {"max_tokens": 3}}
    )
    first, second = read(file, {"max_tokens": 8})
    assert (first["index"], first["prompt"], first["sampling"]["max_tokens"]) == (0, "Hello.", 8)
    assert (second["index"], second["id"], second["sampling"]["max_tokens"]) == (1, 7, 3)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"promt": "x"}, "'promt' is no field of row; allowed are id, prompt"),
        ({}, ".*given none"),
        ({"prompt": "x", "prompt_ids": [1]}, ".*given prompt and prompt_ids"),
        ({"prompt": "x", "sampling": {"temp": 1}}, "'temp' is no field of sampling"),
        ({"prompt": "x", "sampling": {"top_p": 2}}, "top_p: .*less than or equal to 1, given 2"),
        ({"prompt_ids": []}, "prompt_ids: .*at least 1 item"),
        ({"id": "a", "prompt": "x"}, r"id 'a' stands in .*line 1 too"),
    ],
)
def test_a_wrong_row_is_refused_by_its_line(tmp_path, row, words):
    file = write(tmp_path / "in.jsonl", {"id": "a", "prompt": "y"}, row)
    with pytest.raises(BatchError, match=rf"line 2: {words}"):
        read(file, {})


def test_a_file_without_rows_is_refused(tmp_path):
    with pytest.raises(BatchError, match="holds no row"):
        read(write(tmp_path / "in.jsonl"), {})


# -- journal


def answers(*indices):
    return [{"index": i, "text": f"answer {i}"} for i in indices]


def test_a_journal_resumes_and_writes_in_order(tmp_path):
    out = tmp_path / "out.jsonl"
    with Journal(out, JOB, 3) as journal:
        journal.add(answers(2))
        journal.add(answers(0, 2))  # a second answer to a row is dropped
    with Journal(out, JOB, 3) as journal:
        assert journal.done == {0, 2}
        with pytest.raises(BatchError, match="1 of 3 rows are not answered"):
            journal.finish()
        journal.add(answers(1))
        assert journal.finish() == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == answers(0, 1, 2)
    with Journal(out, JOB, 3) as journal:
        assert journal.finished()


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_line_that_a_kill_cut_does_not_count(tmp_path, cut):
    """Whatever length the file has when the run is killed: whole lines stay, the rest is answered again."""
    out = tmp_path / "out.jsonl"
    with Journal(out, JOB, 3) as journal:
        journal.add(answers(0, 1))
        journal.file.write_bytes(journal.file.read_bytes()[:-cut])
    with Journal(out, JOB, 3) as journal:
        assert journal.done == ({0} if cut < len(json.dumps(answers(1)[0])) + 2 else set())
        journal.add(answers(0, 1, 2))
        journal.finish()
    assert [json.loads(line)["index"] for line in out.read_text().splitlines()] == [0, 1, 2]


def test_killed_between_the_output_and_the_journals_end(tmp_path):
    out = tmp_path / "out.jsonl"
    with Journal(out, JOB, 1) as journal:
        journal.add(answers(0))
        kept = journal.file.read_bytes()
        journal.finish()
    journal.file.write_bytes(kept)
    with Journal(out, JOB, 1) as journal:
        assert journal.done == {0}
        journal.finish()
    assert not journal.file.exists()
    assert len(out.read_text().splitlines()) == 1


def test_another_job_is_refused_by_what_differs(tmp_path):
    out = tmp_path / "out.jsonl"
    with Journal(out, JOB, 2) as journal:
        journal.add(answers(0))
    with pytest.raises(BatchError, match="max_tokens was 8, now 9"), Journal(out, {**JOB, "max_tokens": 9}, 2):
        pass
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("not ours\n")
    with pytest.raises(BatchError, match="exists and is no output of this job"), Journal(foreign, JOB, 2):
        pass
    assert foreign.read_text() == "not ours\n"


def test_two_runs_at_once_are_refused(tmp_path):
    with (
        Journal(tmp_path / "out.jsonl", JOB, 2),
        pytest.raises(BatchError, match="another run"),
        Journal(tmp_path / "out.jsonl", JOB, 2),
    ):
        pass


def test_a_journal_that_is_none_is_refused(tmp_path):
    out = tmp_path / "out.jsonl"
    with Journal(out, JOB, 2) as journal:
        journal.add(answers(0))
    with journal.file.open("a") as stream:
        stream.write('{"index": 7}\n')
    with pytest.raises(BatchError, match=r"line 3: .*row 7 of 2"), Journal(out, JOB, 2):
        pass


# -- the command


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "idlm-32"), "did you mean idlm-32b"),
        (("--engine", "[1]"), "list where an object is needed"),
        (("--plain", "--n", "4"), "--plain and --n 4 contradict"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(tmp_path, options, words):
    from typer.testing import CliRunner

    from vllm_idlm.cli import app

    source = write(tmp_path / "in.jsonl", {"prompt": "Hello."})
    done = CliRunner().invoke(app, ["batch", str(source), str(tmp_path / "out.jsonl"), *options])
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())
    assert list(tmp_path.iterdir()) == [source]


def test_engine_options_come_from_the_zoo_and_the_command(monkeypatch):
    from vllm_idlm.cli.batch import engine_options

    found = engine_options("idlm-32b", False, None, None, 8, '{"max_model_len": 4096}')
    assert found == {
        "model": "idlm-32b",
        "max_num_seqs": 8,
        "speculative_config": {"method": "isd", "n": 4},
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "ray",
        "max_model_len": 4096,
    }
    assert "speculative_config" not in engine_options("idlm-32b", True, None, 1, 8, "{}")
    assert engine_options("idlm-8b", False, 3, None, 8, "{}")["speculative_config"]["n"] == 3


# -- a real job on Ray


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
    ("count", "kills"), [(40, (5, 17)), pytest.param(500, (60, 190, 350), marks=pytest.mark.slow)], ids=["40", "500"]
)
def test_a_killed_job_loses_and_doubles_nothing(tmp_path, count, kills):
    """R-ISD, one prompt that is refused; every answer is the one of an engine that nobody killed."""
    pytest.importorskip("ray")
    from tests import tiny
    from tests.engines import engine

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
    found, last = killed_job(write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl", kills, *settings)
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
