"""A checkpoint's fingerprint: of its tensors, not of its files."""

from __future__ import annotations

import pytest

from vllm_idlm.fingerprint import FingerprintError, fingerprint


def test_fingerprint_is_of_the_tensors_not_of_the_files(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    a, b = torch.arange(6.0).view(2, 3), torch.ones(4, dtype=torch.bfloat16)
    for name, parts in {
        "one": [{"a": a, "b": b}],
        "two": [{"b": b}, {"a": a}],
        "other": [{"a": a.view(3, 2), "b": b}],
        "bit": [{"a": a, "b": b * 2}],
    }.items():
        (tmp_path / name).mkdir()
        for i, part in enumerate(parts):
            save_file(part, tmp_path / name / f"{i}.safetensors", {"format": "pt"})
    one, two, other, bit = (fingerprint(tmp_path / name) for name in ("one", "two", "other", "bit"))
    assert one == two
    assert len({one, other, bit}) == 3
    (tmp_path / "one" / "0.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(FingerprintError, match="no whole safetensors"):
        fingerprint(tmp_path / "one")
    with pytest.raises(FingerprintError, match=r"no \*.safetensors"):
        fingerprint(tmp_path)
