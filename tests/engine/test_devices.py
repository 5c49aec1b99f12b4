"""Several devices: two CPU processes train as one with twice the rows, and vLLM serves what they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.engine.test_training import plain, served
from tests.support import songs
from tests.support.training import launch, loss_of_steps, several
from vllm_idlm.training import export, start


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """As the world of the other files, with fewer samples."""
    return songs.write_world(tmp_path_factory.mktemp("songs"), 100, 6)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("form", ["gated", "full"])
@pytest.mark.parametrize("by", ["fsdp.yaml", "ddp.yaml"])
def test_two_processes_train_as_one_with_twice_the_rows(world, tmp_path, by, form):
    """The losses of one process; the same after an interruption; and what is written is served by vLLM."""
    made = several(world, form, gradient_checkpointing=by == "fsdp.yaml")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(json.loads(made.model_dump_json())))
    whole = launch(by, tmp_path / "c.yaml", f"out={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr[-3000:]
    kind = "2 (FSDP)" if by == "fsdp.yaml" else 2
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["devices"] == kind

    one = several(world, form, rows=4, out=str(tmp_path / "one"))
    alone = start.run(one, start.base(one), *start.samples(one, None), lambda *_: None)
    assert alone.train()
    alone.export()
    assert loss_of_steps(tmp_path / "whole") == pytest.approx(loss_of_steps(tmp_path / "one"), rel=1e-4)
    got, want = (weights(tmp_path / name / "final") for name in ("whole", "one"))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, atol=2e-3, rtol=2e-2)

    for more in (["stop_minutes=0.0001"], []):
        cut = launch(by, tmp_path / "c.yaml", f"out={tmp_path / 'cut'}", *more)
        assert cut.returncode == 0, cut.stderr[-3000:]
        assert len(loss_of_steps(tmp_path / "cut")) == (1 if more else 8)
    assert loss_of_steps(tmp_path / "cut") == loss_of_steps(tmp_path / "whole")
    assert {n: t.tolist() for n, t in weights(tmp_path / "cut" / "final").items()} == {
        n: t.tolist() for n, t in got.items()
    }

    final = tmp_path / "whole" / "final"
    record = json.loads((final / export.RECORD).read_text())
    model = final if form == "full" else world / "base"
    lora = {} if form == "full" else {"lora": str(final)}
    assert served(model, n=record["stride"], **lora)[0] == plain(model)


@pytest.mark.slow
def test_shared_out_training_learns_and_a_checkpoint_of_copies_is_not_taken(world, tmp_path):
    made = several(world, "gated", rows=4, steps=60, lr=4e-3, out=str(tmp_path / "run"), dtype="bfloat16")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(json.loads(made.model_dump_json())))
    done = launch("fsdp.yaml", tmp_path / "c.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "final" / export.RECORD).read_text())
    assert record["held_out"]["alpha"][0] > 0.5
    other = launch("ddp.yaml", tmp_path / "c.yaml")
    assert other.returncode != 0
    assert "devices: 2, but the checkpoint in" in " ".join(other.stdout.split() + other.stderr.split())
