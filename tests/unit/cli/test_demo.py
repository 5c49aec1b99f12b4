"""`idlm demo`: its prompts."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from vllm_idlm.cli import app, demo

RUNNER = CliRunner()


@pytest.mark.parametrize(("content", "words"), [(None, "one prompt a line"), ("\n \n", "holds no prompt")])
def test_prompt_file_is_checked(tmp_path, content, words):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_text(content)
    shown = RUNNER.invoke(app, ["demo", "--prompts", str(file)])
    assert shown.exit_code == 2
    assert words in " ".join(shown.output.split())


def test_prompts_one_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n two \n")
    assert demo._prompts(file) == ["one", "two"]
    assert demo._prompts(None) == list(demo.PROMPTS)
