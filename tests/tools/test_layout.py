"""The order of the tests: unit tests mirror the source, engine tests are named after it, each kind has its folder."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.support.paths import ROOT

TESTS = ROOT / "tests"
SOURCES = {"vllm_idlm": ROOT / "vllm_idlm", "kernels": ROOT / "kernels", "proposers": ROOT / "proposers"}


def files(*folders: str) -> list[str]:
    """The test files below these folders of tests/, by their paths in it."""
    return sorted(str(file.relative_to(TESTS)) for f in folders for file in (TESTS / f).rglob("test_*.py"))


def is_source(place: Path) -> bool:
    """Whether there is a module or a package at the path, which has no suffix."""
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def places(file: str) -> list[Path]:
    """What a unit test's path may stand for: a/test_b.py for vllm_idlm/a/b or, at the top, for a/b."""
    *folders, name = Path(file).parts[1:]
    place = Path(*folders, name.removesuffix(".py").removeprefix("test_"))
    return [SOURCES["vllm_idlm"] / place, *([ROOT / place] if folders and folders[0] in SOURCES else [])]


def mirrors(file: str) -> bool:
    """Whether a unit test's path is that of a module or package."""
    return any(map(is_source, places(file)))


def modules() -> set[str]:
    """The names of all modules and packages, of any depth; `benchmarks` is one."""
    found = {file for top in SOURCES.values() for file in top.rglob("*.py")}
    return {file.parent.name if file.stem == "__init__" else file.stem for file in found} | {"benchmarks"}


def begins_with_a_module(file: str) -> bool:
    """Whether a test file's name is test_<module>.py or test_<module>_<aspect>.py."""
    name = Path(file).stem.removeprefix("test_")
    return any(name == module or name.startswith(f"{module}_") for module in modules())


def marked(text: str) -> bool:
    """Whether a file marks tests as such that start a real engine."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute) and node.attr == "vllm"]
    return any(isinstance(node.value, ast.Attribute) and node.value.attr == "mark" for node in nodes)


def test_no_test_stands_at_the_top():
    wrong = [f"tests/{file.name}" for file in TESTS.glob("test_*.py")]
    assert not wrong, f"{wrong}: tests stand in unit/, engine/, interpreted/ or tools/, none at the top of tests/"


def test_unit_tests_mirror_the_source():
    wrong = {f"tests/{f}": [str(p.relative_to(ROOT)) for p in places(f)] for f in files("unit") if not mirrors(f)}
    assert not wrong, f"unit tests have the paths of what they test, and there is no such module or package: {wrong}"


def test_engine_tests_begin_with_the_module_that_they_test_most():
    wrong = [f"tests/{file}" for file in files("engine", "interpreted") if not begins_with_a_module(file)]
    assert not wrong, f"{wrong}: name them test_<module>.py or test_<module>_<aspect>.py after a module that there is"


def test_nothing_in_unit_or_tools_starts_an_engine():
    wrong = [f"tests/{file}" for file in files("unit", "tools") if marked((TESTS / file).read_text(encoding="utf-8"))]
    assert not wrong, f"{wrong}: tests that start an engine (mark vllm) stand in engine/ or interpreted/"


def test_what_is_out_of_order_is_found():
    """The checks themselves."""
    assert mirrors("unit/kernels/test_tail.py")
    assert mirrors("unit/v1/test_stats.py")
    assert not mirrors("unit/test_stats.py")
    assert not mirrors("unit/batch/test_nothing.py")
    assert begins_with_a_module("engine/test_worker_ranks.py")
    assert not begins_with_a_module("engine/test_ranks.py")
    assert marked("@pytest.mark.vllm\ndef test_a(): ...")
    assert not marked("@pytest.mark.slow\ndef test_a(): vllm.mark()")
