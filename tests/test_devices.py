"""Several devices: two CPU processes, with the whole model each or sharing it out, train as one with twice the rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import engines, songs
from vllm_idlm.training import config, devices, export, loop, start

CONFIGS = Path(__file__).parent.parent / "configs" / "train" / "accelerate"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a base model that knows the songs, and samples."""
    folder = tmp_path_factory.mktemp("songs")
    songs.write_base(folder / "base")
    songs.write_samples(folder / "train.jsonl", 100, 1)
    songs.write_samples(folder / "eval.jsonl", 6, 2)
    return folder


def settings(world: Path, form: str, **other) -> config.Config:
    given = {
        "model": str(world / "base"), "mask_token_id": songs.MASK, "out": "unset", "form": form,
        "data": [str(world / "train.jsonl")], "eval_data": [str(world / "eval.jsonl")],
        "max_tokens": 128, "row_tokens": 140, "rows": 2, "accumulate": 2, "tilings": 3, "steps": 8, "lr": 2e-3,
        "loss": {"ce": 1.0} if form == "full" else {"tv": 1.0, "kl": 1.0}, "dtype": "float32",
        "stages": [{"stride": 2, "until": 0.5}, {"stride": 4, "until": 1}],
    }  # fmt: skip
    return config.Config(**{**given, **other})


def launch(by: str, file: Path, *overrides: str, processes: int = 2) -> subprocess.CompletedProcess:
    """`idlm train` in several processes, as the documents say."""
    words = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / by), "--num_processes", str(processes)]
    command = [sys.executable, *words, "-m", "vllm_idlm.cli", "train", str(file), *overrides]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=900)


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / loop.METRICS).read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "step"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def answers(model: Path, **options) -> list:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": song[: 1 + i % 4]} for i, song in enumerate(songs.songs())]
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    llm = engines.engine(str(model), skip_tokenizer_init=True, **options)
    return engines.tokens(llm.generate(prompts, params, use_tqdm=False))


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("form", ["gated", "full"])
@pytest.mark.parametrize("by", ["fsdp.yaml", "ddp.yaml"])
def test_two_processes_train_as_one_with_twice_the_rows(world, tmp_path, by, form):
    """The losses of one process; the same after an interruption; and what is written is served by vLLM."""
    made = settings(world, form, gradient_checkpointing=by == "fsdp.yaml")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(json.loads(made.model_dump_json())))
    whole = launch(by, tmp_path / "c.yaml", f"out={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr[-3000:]
    kind = "2 (FSDP)" if by == "fsdp.yaml" else 2
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["devices"] == kind

    one = settings(world, form, rows=4, out=str(tmp_path / "one"))
    alone = start.run(one, start.base(one), *start.samples(one, None), lambda *_: None)
    assert alone.train()
    alone.export()
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    got, want = (weights(tmp_path / name / "final") for name in ("whole", "one"))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, atol=2e-3, rtol=2e-2)

    for more in (["stop_minutes=0.0001"], []):
        cut = launch(by, tmp_path / "c.yaml", f"out={tmp_path / 'cut'}", *more)
        assert cut.returncode == 0, cut.stderr[-3000:]
        assert len(losses(tmp_path / "cut")) == (1 if more else 8)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert {n: t.tolist() for n, t in weights(tmp_path / "cut" / "final").items()} == {
        n: t.tolist() for n, t in got.items()
    }

    final = tmp_path / "whole" / "final"
    record = json.loads((final / export.RECORD).read_text())
    model = final if form == "full" else world / "base"
    lora = {} if form == "full" else {"lora": str(final)}
    assert answers(model, speculative_config=engines.isd(record["stride"], **lora)) == answers(model)


@pytest.mark.slow
def test_shared_out_training_learns_and_a_checkpoint_of_copies_is_not_taken(world, tmp_path):
    made = settings(world, "gated", rows=4, steps=60, lr=4e-3, out=str(tmp_path / "run"), dtype="bfloat16")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(json.loads(made.model_dump_json())))
    done = launch("fsdp.yaml", tmp_path / "c.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "final" / export.RECORD).read_text())
    assert record["held_out"]["alpha"][0] > 0.5
    other = launch("ddp.yaml", tmp_path / "c.yaml")
    assert other.returncode != 0
    assert "devices: 2, but the checkpoint in" in " ".join(other.stdout.split() + other.stderr.split())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"accelerate is set up for DEEPSPEED; allowed are .* FSDP with"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
            r"fsdp_version is 1; allowed is 2\. Fix: fsdp_version: 2",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "fsdp_cpu_ram_efficient_loading is true; allowed is false",
        ),
    ],
)
def test_other_ways_of_accelerate_are_refused_by_name(monkeypatch, given, said):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(config.ConfigError, match=said):
        devices.accelerator(config.Config(model="m", out="o", data=["d"], steps=1))


def test_blocks_are_those_of_the_whole_batch_on_any_number_of_devices(world):
    """Two streams of two rows hold, row by row, what one stream of four rows holds."""
    from vllm_idlm.training.stream import Stream

    made = settings(world, "gated")
    train, _ = start.samples(made, None)
    whole = next(Stream(train, made.model_copy(update={"rows": 4})).steps(6))
    halves = [next(Stream(train, made, rank, 2).steps(6)) for rank in range(2)]
    for forward in range(made.accumulate):
        for row in range(4):
            own = halves[row // 2][forward]
            for field, within in (("tokens", "sample"), ("start", "start"), ("place", "start")):
                got, want = (
                    getattr(batch, field)[r][getattr(batch, within)[r] >= 0]
                    for batch, r in ((own, row % 2), (whole[forward], row))
                )
                assert torch.equal(got, want)
