"""The faults of `tests.mutations` fit today's source, and its runner tells found, missed, crashed and hung apart."""

from __future__ import annotations

import ast
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutations import __main__ as command
from tests.mutations import copies, faults
from tests.mutations.campaign import Campaign
from tests.mutations.fault import Fault, FaultError, groups
from tests.mutations.results import Results

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("fault", faults.ALL, ids=lambda fault: fault.name)
def test_a_fault_fits_the_source(fault):
    mutated = fault.mutated((ROOT / fault.file).read_text())
    if fault.file.endswith(".py"):
        compile(mutated, fault.file, "exec")
    assert fault.says.endswith(".")
    assert fault.tests
    for test in fault.tests:
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), file
        assert not name or name.partition("[")[0] in _functions(file), test


def _functions(file: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)}


def test_faults_are_many_and_each_has_a_name_of_its_own():
    names = [fault.name for fault in faults.ALL]
    assert len(names) == len(set(names)) >= 40
    assert all(name == name.lower() and " " not in name and "_" not in name for name in names)
    assert len({(fault.file, fault.old, fault.new) for fault in faults.ALL}) == len(names)


def test_a_text_that_is_not_there_once_is_refused():
    fault = Fault("f", "a", "x.py", "one", "two", "It.", ("tests/test_x.py",))
    assert fault.mutated("only one") == "only two"
    for text in ("nothing", "one and one"):
        with pytest.raises(FaultError, match=r"occurs [02] times"):
            fault.mutated(text)
    with pytest.raises(FaultError, match="the same"):
        replace(fault, new="one").mutated("one")


def test_interpreted_tests_have_a_process_of_their_own():
    tests = ("tests/unit/a.py", "tests/engine/b.py::t", "tests/interpreted/c.py", "tests/unit/d.py")
    assert groups(tests) == [tests[:2], tests[2:3], tests[3:]]


# -- on a toy repository


CORE = """
def double(x):
    return 2 * x


def triple(x):
    return 3 * x
"""
TESTS = """
import subprocess, sys
import toy.core


class TestDouble:
    def test_of_three(self):
        assert toy.core.double(3) == 6


def test_it_is_the_copy():
    code = "import toy.core; print(toy.core.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True).stdout
    assert found == toy.core.__file__ + chr(10)
"""
PROJECT = """
[tool.setuptools]
packages = ["toy", "toy.core"]
package-dir = {"toy" = "toy", "toy.core" = "core"}
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A git repository whose package has a part in another folder, and whose tests see one of two functions."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # most of the time that a run takes
    root = tmp_path / "toy"
    for name, text in {
        "pyproject.toml": PROJECT,
        "toy/__init__.py": "",
        "core/__init__.py": CORE,
        "tests/test_core.py": TESTS,
        "ignored.txt": "",
        ".gitignore": "ignored.txt\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    return root


def fault(name: str, old: str, new: str) -> Fault:
    return Fault(name, "toy", "core/__init__.py", old, new, "It is wrong.", ("tests/test_core.py",))


SEEN = fault("seen", "2 * x", "2 + x")
UNSEEN = fault("unseen", "3 * x", "3 + x")
BROKEN = fault("broken", "\n\ndef triple", "\n\nraise RuntimeError('at import')\n\n\ndef triple")
ENDLESS = fault("endless", "    return 2 * x", "    while x:\n        pass")
DYING = fault("dying", "    return 2 * x", "    import os\n\n    os.abort()")


def test_a_fault_is_found_and_one_that_no_test_sees_is_missed(toy, tmp_path, capsys):
    kept = Results(tmp_path / "results.json")
    with Campaign(toy, kept) as campaign:
        assert not (campaign.snapshot / "ignored.txt").exists()
        assert campaign.control([SEEN, UNSEEN]) == []
        campaign.judge([SEEN, UNSEEN], jobs=2)
    assert kept.faults["seen"]["outcome"] == "found"
    assert kept.faults["seen"]["found_by"] == "tests/test_core.py::TestDouble::test_of_three"
    assert "5 == 6" in kept.faults["seen"]["error"]
    assert kept.faults["unseen"]["outcome"] == "missed"
    assert "TestDouble::test_of_three" in capsys.readouterr().out
    assert (toy / "core/__init__.py").read_text() == CORE
    assert Results(tmp_path / "results.json").faults == kept.faults


@pytest.mark.heavy
def test_crashes_deaths_and_endless_loops_are_told_apart(toy):
    kept = Results()
    with Campaign(toy, kept) as campaign:
        campaign.judge([BROKEN, DYING])
    with Campaign(toy, kept, timeout=5) as campaign:
        campaign.judge([ENDLESS])
    assert {name: record["outcome"] for name, record in kept.faults.items()} == {
        "broken": "crash",
        "dying": "died",
        "endless": "hang",
    }
    assert "at import" in kept.faults["broken"]["error"]
    assert "SIGABRT" in kept.faults["dying"]["error"]


@pytest.mark.heavy
def test_what_is_known_of_the_same_source_is_not_run_again(toy, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(Campaign, "_run", lambda self, tests, *_, run=Campaign._run, **more: (
        ran.append(tests), run(self, tests, *_, **more))[1])  # fmt: skip
    for runs, again in ((2, False), (0, False), (1, True)):
        ran.clear()
        with Campaign(toy, Results(tmp_path / "results.json")) as campaign:
            campaign.control([SEEN])
            campaign.judge([SEEN], again=again)
        assert len(ran) == runs
    (toy / "toy/__init__.py").write_text("VALUE = 1\n")
    ran.clear()
    with Campaign(toy, Results(tmp_path / "results.json")) as campaign:
        campaign.control([SEEN])
        campaign.judge([SEEN])
    assert len(ran) == 2


def test_a_test_that_fails_without_a_fault_is_named(toy):
    (toy / "core/__init__.py").write_text(SEEN.mutated(CORE))
    with Campaign(toy, Results()) as campaign:
        failed = campaign.control([UNSEEN])
    assert [failure.test for failure in failed] == ["tests/test_core.py::TestDouble::test_of_three"]


def test_a_copy_that_python_does_not_import_is_refused(toy, tmp_path, monkeypatch):
    folder = copies.snapshot(toy, tmp_path / "copy")
    env = copies.environment(folder, tmp_path, tmp_path / "cache")
    found = copies.check_imports(folder, env, tmp_path)
    assert {name: Path(place).resolve().relative_to(folder) for name, place in found.items()} == {
        "toy": Path("toy/__init__.py"),
        "toy.core": Path("core/__init__.py"),
    }
    with pytest.raises(copies.CopyError, match="not from the copy"):
        copies.check_imports(folder, {**env, "PYTHONPATH": str(toy)}, tmp_path)


def test_the_command_line_lists_chooses_and_ends_with_1_if_one_is_missed(toy, monkeypatch, capsys):
    monkeypatch.setattr(faults, "ALL", [SEEN, UNSEEN])
    monkeypatch.setattr(command, "ROOT", toy)
    assert command.main(["--list"]) == 0
    assert "unseen" in capsys.readouterr().out
    assert command.main(["--only", "seen", "--no-control"]) == 0
    assert "1 of 1 faults were found" in capsys.readouterr().out
    assert command.main(["--area", "toy", "--no-control"]) == 1
    assert "MISSED unseen: It is wrong." in capsys.readouterr().out
    assert command.main(["--only", "nothing"]) == 2
    assert "no fault is called nothing" in capsys.readouterr().err
