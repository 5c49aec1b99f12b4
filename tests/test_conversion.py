"""The whole way: train on a synthetic language, write the result, serve it with vLLM. Both forms; resume; bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import engines, songs
from vllm_idlm.settings import SettingsError
from vllm_idlm.training import checkpoint, config, export, loop, losses, start


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a base model that knows the songs, and samples."""
    folder = tmp_path_factory.mktemp("songs")
    songs.write_base(folder / "base")
    songs.write_samples(folder / "train.jsonl", 300, 1)
    songs.write_samples(folder / "eval.jsonl", 12, 2)
    return folder


def settings(world: Path, out: Path, **other) -> config.Config:
    given = {
        "model": str(world / "base"), "out": str(out), "mask_token_id": songs.MASK,
        "data": [str(world / "train.jsonl")], "eval_data": [str(world / "eval.jsonl")],
        "max_tokens": 128, "row_tokens": 140, "rows": 8, "tilings": 3,
        "steps": 120, "lr": 4e-3, "dtype": "float32", "eval_every": 60, "save_every": 1000,
    }  # fmt: skip
    return config.Config(**{**given, **other})


def run(made: config.Config, events: list | None = None) -> loop.Run:
    base = start.base(made)
    note = (lambda event, values: events.append((event, values))) if events is not None else (lambda *_: None)
    return start.run(made, base, *start.samples(made, None), note)


def answers(llm, prompts: list[list[int]]) -> list:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    return engines.tokens(llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False))


def served(world: Path, model: Path, **isd) -> tuple[list, dict]:
    """Greedy answers with ISD to beginnings of songs, and its statistics."""
    prompts = [song[: 1 + i % 4] for i, song in enumerate(songs.songs())]
    llm = engines.engine(str(model), skip_tokenizer_init=True, speculative_config=engines.isd(**isd))
    engines.stats(llm)
    return answers(llm, prompts), engines.stats(llm)


def plain(model: Path) -> list:
    prompts = [song[: 1 + i % 4] for i, song in enumerate(songs.songs())]
    return answers(engines.engine(str(model), skip_tokenizer_init=True), prompts)


@pytest.mark.vllm
def test_gated_adapter_learns_to_draft_and_serves_the_bases_own_text(world, tmp_path):
    trained = run(settings(world, tmp_path / "run"))
    assert trained.train()
    adapter = trained.export()
    record = json.loads((adapter / export.RECORD).read_text())
    assert record["held_out"]["alpha"][0] > 0.9
    want = plain(world / "base")
    got, found = served(world, world / "base", n=record["stride"], lora=str(adapter))
    assert got == want
    assert found["tpf"] > 2.7


@pytest.mark.slow
@pytest.mark.vllm
def test_full_conversion_learns_to_draft(world, tmp_path):
    trained = run(settings(world, tmp_path / "run", form="full", loss={"ce": 1.0}, lr=2e-3, steps=150))
    assert trained.train()
    model = trained.export()
    assert json.loads((model / export.RECORD).read_text())["held_out"]["alpha"][0] > 0.9
    got, found = served(world, model, n=4)  # the mask token id is in its config.json
    assert got == plain(model)
    assert found["tpf"] > 2.7


def states(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint.files(folder)[-1], weights_only=True)["weights"]


def loss_of_steps(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / loop.METRICS).read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "step"]


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


@pytest.mark.vllm
def test_adapter_of_another_base_is_refused_where_it_is_used(world, tmp_path, smol):
    trained = run(settings(world, tmp_path / "run", steps=1, rows=1))
    trained.train()
    adapter = trained.export()
    with pytest.raises(SettingsError, match=r"was trained for .*another"):
        engines.engine(smol, speculative_config=engines.isd(lora=str(adapter)))
    with pytest.raises(config.ConfigError, match="was trained for"):
        start.for_evaluation(smol, str(adapter), None, "float32")
    with pytest.raises(config.ConfigError, match="was trained for"):
        run(settings(world, tmp_path / "other", model=smol, adapter={"init": str(adapter)}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": {"js": 1.0}}, "'js' is unknown; allowed are ce, kl, tv"),
        ({"form": "full", "loss": {"kl": 1.0}}, "the full form trains ce alone"),
        ({"stages": [{"stride": 4, "until": 0.5}]}, "until must rise and end at 1.0"),
        ({"stages": [{"stride": 17, "until": 1.0}]}, "stages.0.stride: 17 is not allowed"),
        ({"loss": {"kl": -1.0}}, "kl has weight -1.0; allowed is 0 or more"),
        ({"depth_weights": [0.0, 0.0]}, "one of them more; they are"),
        ({"adapter": {"targets": ["lm_head"]}}, "lm_head cannot be trained; allowed are q_proj"),
        ({"row_tokens": 64}, "max_tokens 128 is more than row_tokens 64"),
        ({"steps_": 3}, "steps_ is no field"),
    ],
)
def test_wrong_configuration_is_refused_by_field(world, tmp_path, change, words):
    import yaml

    content = settings(world, tmp_path / "run").model_dump(mode="json") | change
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(config.ConfigError, match=words):
        config.load(tmp_path / "c.yaml")


def test_overrides_reach_into_mappings(world, tmp_path):
    import yaml

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings(world, tmp_path).model_dump(mode="json")))
    made = config.load(tmp_path / "c.yaml", ["steps=7", "adapter.rank=4", "loss={ce: 1}"])
    assert (made.steps, made.adapter.rank, made.loss) == (7, 4, {"ce": 1.0})
    with pytest.raises(config.ConfigError, match="'steps' is no override; write key=value"):
        config.load(tmp_path / "c.yaml", ["steps"])


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


def test_samples_without_answers_or_of_another_model_are_refused(world, tmp_path):
    (tmp_path / "short.jsonl").write_text(json.dumps({"prompt_ids": [2], "answer_ids": [3]}) + "\n")
    with pytest.raises(config.ConfigError, match="none of 1 samples has an answer of 3 tokens or more"):
        run(settings(world, tmp_path / "run", data=[str(tmp_path / "short.jsonl")]))
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt_ids": [2], "answer_ids": [3, 99, 4, 5]}) + "\n")
    with pytest.raises(config.ConfigError, match="holds token id 99, the model's vocabulary ends at 63"):
        run(settings(world, tmp_path / "run", data=[str(tmp_path / "other.jsonl")]))


def test_other_architectures_are_refused_by_name(tmp_path):
    from transformers import AutoConfig

    from vllm_idlm.training import forward

    with pytest.raises(ValueError, match=r"architecture 'gpt2' cannot be trained; allowed are llama, mistral"):
        forward.check_family(AutoConfig.for_model("gpt2"))
    with pytest.raises(ValueError, match="sliding window of 4096"):
        forward.check_family(AutoConfig.for_model("mistral", sliding_window=4096))


@pytest.mark.parametrize("form", ["gated", "full"])
def test_gradient_checkpointing_gives_the_same_gradients(world, tmp_path, form):
    found = []
    for checkpointing in (False, True):
        loss = {"ce": 1.0} if form == "full" else {"kl": 1.0}
        made = settings(world, tmp_path / "run", form=form, loss=loss, gradient_checkpointing=checkpointing)
        trained = run(made)
        trained.objective.train()
        trained.objective(next(trained.stream.steps(0))[0]).backward()
        found.append({n: p.grad for n, p in trained.objective.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() != set()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-4)


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
