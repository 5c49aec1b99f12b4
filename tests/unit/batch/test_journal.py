"""The journal of `idlm batch`: wherever a run was killed the next one goes on, and no other job may."""

from __future__ import annotations

import json

import pytest

from vllm_idlm.batch.errors import BatchError
from vllm_idlm.batch.journal import Journal

JOB = {"input": "abc", "max_tokens": 8}


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
