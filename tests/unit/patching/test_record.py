"""Patches as data: the supported versions are those that were reviewed."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet

from vllm_idlm.patching import fit, record


def test_what_is_supported_is_what_was_reviewed():
    """Nothing unreviewed is promised: the range holds the reviewed versions, and none beyond them."""
    reviewed = fit.reviewed()
    assert all(v in SpecifierSet(record.SUPPORTED) for v in reviewed)
    for text in ("0.31.0", "0.34.0", "0.34.0rc1", "1.0.0"):
        assert text not in SpecifierSet(record.SUPPORTED)
    assert {v.rsplit(".", 1)[0] for v in reviewed} == {"0.32", "0.33"}
