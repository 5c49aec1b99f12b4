"""C++ libraries of ops: built once and found again."""

from __future__ import annotations

from vllm_idlm.kernels import native
from vllm_idlm.kernels.lora import cpu


def test_the_library_is_built_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_IDLM_CACHE", str(tmp_path))
    path = native.library_path(cpu.SOURCE)
    assert path.is_relative_to(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"built before")
    assert native.build(cpu.SOURCE) == path
    assert path.read_bytes() == b"built before"
