"""The files of samples: rows come back as written, and one run writes at a time."""

from __future__ import annotations

import pytest

from vllm_idlm.data import files, prompts, samples
from vllm_idlm.data.errors import DataError

ROW = {
    "prompt_key": "p", "prompt_index": 0, "answer_index": 0, "kind": None, "temperature": 0.7, "seed": 5,
    "finish_reason": "stop", "prompt_ids": [1, 2], "answer_ids": [3], "text": "é",
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "é"}],
}  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize("suffix", files.FORMATS)
def test_rows_come_back_as_written(tmp_path, suffix):
    file = tmp_path / f"train-00000.{suffix}"
    files.write(file, [ROW, {**ROW, "kind": "k"}])
    assert [row for _, row in files.rows(file)] == [ROW, {**ROW, "kind": "k"}]
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]
    assert samples.read(tmp_path)[0] == samples.Sample([1, 2], [3], "p", None, 0.7)
    assert prompts.load(file)[0].messages == ({"role": "user", "content": "q"},)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="train-00000"):
        samples.read(tmp_path)


def test_one_run_at_a_time(tmp_path):
    again = files.locked(tmp_path)
    with files.locked(tmp_path), pytest.raises(DataError, match="being written by another run"):
        again.__enter__()
    with files.locked(tmp_path):
        pass
