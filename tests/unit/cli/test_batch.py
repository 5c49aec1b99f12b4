"""`idlm batch`: options that are refused, and the engine's options that come of them."""

from __future__ import annotations

import pytest

from tests.support.jsonl import write_jsonl


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

    source = write_jsonl(tmp_path / "in.jsonl", {"prompt": "Hello."})
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
