"""The set-up on CPU: Pythons that are refused, what is installed, and when it is done again."""

from __future__ import annotations

import sys

import pytest

from vllm_idlm import cpu_setup


@pytest.mark.parametrize("python", [(3, 10, 13), (3, 13, 0), (2, 7, 18)], ids=lambda v: ".".join(map(str, v)))
def test_other_pythons_are_refused(python):
    with pytest.raises(cpu_setup.SetupError, match=r"allowed is >=3\.11,<3\.13.*PYTHON=python3\.11"):
        cpu_setup.check_python(python)


@pytest.mark.parametrize("python", [(3, 11, 0), (3, 12, 9)], ids=lambda v: ".".join(map(str, v)))
def test_supported_pythons_pass(python):
    cpu_setup.check_python(python)


def test_project_requirements_never_resolve_vllm():
    wanted = cpu_setup.project_requirements()
    assert any(line.startswith("pytest") for line in wanted)
    assert not [line for line in wanted if line.startswith("vllm")]


def test_setup_is_skipped_only_for_the_same_inputs(tmp_path, monkeypatch):
    ran = []
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    monkeypatch.setattr(cpu_setup.Environment, "steps", lambda self: [("one step", lambda: ran.append(1))])
    cpu_setup.set_up(tmp_path, force=False)
    cpu_setup.set_up(tmp_path, force=False)
    assert len(ran) == 1
    cpu_setup.set_up(tmp_path, force=True)
    monkeypatch.setattr(cpu_setup, "stamp", lambda: "other pins")
    cpu_setup.set_up(tmp_path, force=False)
    assert len(ran) == 3


def test_failed_step_leaves_no_stamp(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    steps = lambda self: [("fails", lambda: self.run("-c", "print('why'); raise SystemExit(3)"))]  # noqa: E731
    monkeypatch.setattr(cpu_setup.Environment, "steps", steps)
    with pytest.raises(cpu_setup.SetupError, match=r"failed:\nwhy\nThe whole output is in .*setup\.log"):
        cpu_setup.set_up(tmp_path, force=False)
    assert not (tmp_path / "setup.stamp").exists()
