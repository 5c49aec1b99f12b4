"""A run of training: resumed to the bit, refused where it is another run, its metrics, its adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import songs
from tests.support.training import loss_of_steps, run, settings
from vllm_idlm.training import checkpoint, config, export, losses


def states(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint.files(folder)[-1], weights_only=True)["weights"]


@pytest.mark.heavy
@pytest.mark.parametrize(("stop_at", "form", "compiled"), [(2, "gated", False), (3, "gated", True), (2, "full", False)])
def test_resumed_run_is_the_uninterrupted_one_to_the_bit(world, tmp_path, stop_at, form, compiled, monkeypatch):
    monkeypatch.setattr(losses, "COMPILE_FROM", 0 if compiled else losses.COMPILE_FROM)
    small = {"steps": 5, "rows": 2, "accumulate": 2, "stages": [{"stride": 2, "until": 0.5}, {"stride": 4, "until": 1}]}
    small |= {"form": form, "loss": {"ce": 1.0} if form == "full" else {"kl": 1.0, "tv": 1.0}}
    whole = run(settings(world, tmp_path / "whole", **small))
    assert whole.train()
    cut = settings(world, tmp_path / "cut", **small)
    broken = run(cut)
    steps = broken.stream.steps(0)
    (tmp_path / "cut").mkdir()
    for _ in range(stop_at):
        broken._step(next(steps))
    broken.save()
    broken._step(next(steps))  # lost with the interruption
    again = run(cut)
    assert again.resume()
    assert again.step == stop_at
    assert again.train()
    assert loss_of_steps(tmp_path / "cut") == loss_of_steps(tmp_path / "whole")
    one, other = states(tmp_path / "whole"), states(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_of_another_configuration_is_refused_by_field(world, tmp_path):
    first = run(settings(world, tmp_path / "run", steps=1, rows=1))
    first.train()
    with pytest.raises(config.ConfigError, match=r"lr: 0.002, but the checkpoint in .* was made with 0.004"):
        run(settings(world, tmp_path / "run", steps=1, rows=1, lr=2e-3)).resume()


def test_other_samples_are_no_resume(world, tmp_path):
    first = run(settings(world, tmp_path / "run", steps=1, rows=1))
    first.train()
    songs.write_samples(tmp_path / "more.jsonl", 5, 9)
    more = [str(world / "train.jsonl"), str(tmp_path / "more.jsonl")]
    with pytest.raises(config.ConfigError, match="samples: "):
        run(settings(world, tmp_path / "run", steps=1, rows=1, data=more)).resume()


def test_adapter_of_another_shape_and_a_base_without_weights_are_refused(world, tmp_path):
    first = run(settings(world, tmp_path / "run", steps=1, rows=1))
    first.train()
    adapter = first.export()
    (adapter / export.RECORD).unlink()
    songs.write_base(tmp_path / "wide", steps=1, hidden=256)
    with pytest.raises(config.ConfigError, match="does not fit"):
        run(settings(world, tmp_path / "other", model=str(tmp_path / "wide"), adapter={"init": str(adapter)}))
    for file in (tmp_path / "wide").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(config.ConfigError, match=r"no \*.safetensors"):
        run(settings(world, tmp_path / "other", model=str(tmp_path / "wide")))


def test_mask_token_outside_the_vocabulary_is_refused(world, tmp_path):
    with pytest.raises(config.ConfigError, match=r"mask_token_id: 64 is outside .* allowed are 0..63"):
        run(settings(world, tmp_path / "run", mask_token_id=64))


def logged(folder: Path) -> dict[str, list[float]]:
    """The scalars in TensorBoard's event files: records of a length, a checksum, the event and its checksum."""
    import struct

    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[float]] = {}
    for file in folder.rglob("*tfevents*"):
        rest = file.read_bytes()
        while rest:
            (size,) = struct.unpack("<Q", rest[:8])
            for value in Event.FromString(rest[12 : 12 + size]).summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append(value.simple_value)
            rest = rest[16 + size :]
    return found


def test_metrics_go_to_a_tracker_and_one_that_is_missing_is_named(world, tmp_path, monkeypatch):
    made = settings(world, tmp_path / "run", steps=2, rows=1, trackers=["tensorboard"])
    assert run(made).train()
    found = logged(tmp_path / "run")
    assert found["step/loss"] == pytest.approx(loss_of_steps(tmp_path / "run"), rel=1e-5)
    assert len(found["eval/tpf"]) == 2
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(config.ConfigError, match="trackers: wandb is not installed"):
        run(settings(world, tmp_path / "other", trackers=["wandb"]))
