"""The real vLLM with one thing changed: plain engines run as ever, ISD is refused or not needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.engines import in_a_process
from tests.support.paths import ROOT
from tests.support.tiny import write_tiny
from vllm_idlm.patching import Tree

_SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

def answers(**options):
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, kv_cache_memory_bytes=50_000_000, max_model_len=64,
              max_num_seqs=2, disable_log_stats=True, skip_tokenizer_init=True, **options)
    sampling = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True)
    return list(llm.generate([{"prompt_token_ids": [5, 6, 7]}], sampling, use_tqdm=False)[0].outputs[0].token_ids)

found = {"plain": answers()}
try:
    found["isd"] = answers(speculative_config={"method": "isd", "n": 3, "mask_token_id": 1, "coverage": "last"})
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
print("FOUND " + json.dumps(found))
"""


@pytest.fixture
def changed_vllm(tmp_path):
    """A function that lays vLLM out anew by links, with one file changed; returns the environment to run it in."""

    def lay(file: str, old: str, new: str) -> dict[str, str]:
        real, place = Tree.installed().place, tmp_path / "site"
        _link(real / "vllm", place / "vllm", Path(file).parts)
        text = (real / "vllm" / file).read_text()
        assert old in text
        (place / "vllm" / file).write_text(text.replace(old, new))
        for entry in real.glob("vllm*.dist-info"):
            (place / entry.name).symlink_to(entry)
        path = os.pathsep.join(filter(None, [str(place), str(ROOT), os.environ.get("PYTHONPATH")]))
        return {**os.environ, "PYTHONPATH": path}

    return lay


def _link(source: Path, place: Path, parts: tuple[str, ...]) -> None:
    """Link all of `source` into `place` but the file at `parts`, whose folders are made."""
    place.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.name == "__pycache__":
            continue
        if entry.name != parts[0]:
            (place / entry.name).symlink_to(entry)
        elif len(parts) > 1:
            _link(entry, place / entry.name, parts[1:])


@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("file", "old", "new", "refused"),
    [
        ("v1/core/sched/scheduler.py", "make_spec_decoding_stats", "spec_decoding_anew", "masks-are-no-drafts"),
        ("v1/executor/ray_executor_v2.py", "RayExecutorV2", "RayExecutorV3", None),
    ],
    ids=["a method that every ISD engine needs", "a class that nobody asked for"],
)
def test_a_real_engine_of_a_changed_vllm(changed_vllm, tmp_path, file, old, new, refused):
    """Plain decoding runs with the plugin installed; ISD says what does not fit, or runs if it does not need it."""
    model = write_tiny(tmp_path / "model")
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    found = in_a_process([sys.executable, str(script), str(model)], changed_vllm(file, old, new))
    assert len(found["plain"]) == 8
    if refused is None:
        assert found["isd"] == found["plain"]
    else:
        assert f"Patch {refused}" in found["error"]
        assert "make_spec_decoding_stats: not found" in found["error"]
        assert "VLLM_PLUGINS=''" in found["error"]
