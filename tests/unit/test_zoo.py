"""The model zoo: entries, names, a user's own folder, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from vllm_idlm import embedded, zoo

SHIPPED = ["idlm-32b", "idlm-8b", "qwen3-8b-risd", "smollm2-135m-risd"]
TWO_GPUS = {
    "dtype": "bfloat16",
    "tensor_parallel_size": 2,
    "distributed_executor_backend": "ray",
    "gpu_memory_utilization": 0.9,
}


def write_entry(folder, name="mine", **changes):
    fields = {"name": name, "description": "d", "model": "org/model", "mask_token_id": 3, "source": "s", **changes}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({k: v for k, v in fields.items() if v is not ...}))


def test_shipped_names():
    assert zoo.names() == SHIPPED


@pytest.mark.parametrize(
    ("name", "model", "lora", "mask", "engine"),
    [
        ("idlm-8b", "yifanyu/I-DLM-8B", None, 151669, {"dtype": "bfloat16"}),
        ("idlm-32b", "yifanyu/I-DLM-32B", None, 151669, TWO_GPUS),
        ("qwen3-8b-risd", "Qwen/Qwen3-8B", "yifanyu/I-DLM-8B-lora-r128", 151669, {"dtype": "bfloat16"}),
    ],
)
def test_hub_entries(name, model, lora, mask, engine):
    entry = zoo.load(name)
    assert (entry.model_path(), entry.lora_path(), entry.mask_token_id) == (model, lora, mask)
    assert entry.engine_defaults() == engine


def test_embedded_entry(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "ensure", lambda: tmp_path / "made")
    entry = zoo.load("smollm2-135m-risd")
    assert entry.model_path() == str(tmp_path / "made")
    assert entry.mask_token_id == 16
    with open(f"{entry.lora_path()}/adapter_config.json") as config:
        assert yaml.safe_load(config)["r"] == 32


@pytest.mark.parametrize("name", SHIPPED)
def test_engine_settings_are_vllms(name):
    from vllm.engine.arg_utils import EngineArgs

    assert set(zoo.load(name).engine_defaults()) <= set(EngineArgs.__dataclass_fields__)


def test_engine_defaults_are_a_copy():
    entry = zoo.load("idlm-32b")
    entry.engine_defaults()["dtype"] = "float32"
    assert entry.engine_defaults()["dtype"] == "bfloat16"


def test_resolve_only_zoo_names():
    assert zoo.resolve("idlm-8b").name == "idlm-8b"
    assert zoo.resolve("gpt2") is None
    assert zoo.resolve("yifanyu/I-DLM-8B") is None


def test_local_folder_of_that_name_wins(tmp_path, monkeypatch):
    (tmp_path / "idlm-8b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert zoo.resolve("idlm-8b") is None


def test_unknown_name_suggests():
    with pytest.raises(zoo.ZooError, match=r"'idlm-8' is not in the model zoo; allowed are .*did you mean idlm-8b"):
        zoo.load("idlm-8")


def test_user_folder_is_searched_first(tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    write_entry(tmp_path, lora="./adapter")
    write_entry(tmp_path, "idlm-8b", model="me/other")
    monkeypatch.setenv("VLLM_IDLM_CONFIGS", str(tmp_path))
    assert zoo.names() == sorted([*SHIPPED, "mine"])
    assert zoo.load("idlm-8b").model == "me/other"
    assert zoo.load("mine").lora_path() == str(tmp_path / "adapter")


def test_missing_user_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_IDLM_CONFIGS", str(tmp_path / "none"))
    with pytest.raises(zoo.ZooError, match=r"VLLM_IDLM_CONFIGS=.*is no folder"):
        zoo.names()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token": 3}, "mask_token: no such field; allowed are name"),
        ({"mask_token_id": -1}, "mask_token_id: -1"),
        ({"mask_token_id": ...}, "mask_token_id: missing"),
        ({"n": 1}, "n: 1"),
        ({"n": 17}, "n: 17"),
        ({"engine": "float32"}, "engine: 'float32'"),
        ({"model": "embedded:gpt2"}, "embedded:smollm2-135m-instruct"),
    ],
    ids=["unknown field", "mask below 0", "no mask", "n too small", "n too large", "engine no mapping", "embedded"],
)
def test_wrong_file_names_the_field(tmp_path, monkeypatch, changes, message):
    write_entry(tmp_path, **changes)
    monkeypatch.setenv("VLLM_IDLM_CONFIGS", str(tmp_path))
    with pytest.raises(zoo.ZooError, match=message) as error:
        zoo.load("mine")
    assert "mine.yaml" in str(error.value)


@pytest.mark.parametrize("text", ["a: [1", "- 1", "1: 2", ""], ids=["no yaml", "list", "number key", "empty"])
def test_broken_file_is_refused(tmp_path, monkeypatch, text):
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setenv("VLLM_IDLM_CONFIGS", str(tmp_path))
    with pytest.raises(zoo.ZooError, match=r"mine\.yaml"):
        zoo.load("mine")


def test_missing_adapter_folder_is_refused(tmp_path, monkeypatch):
    write_entry(tmp_path, lora="./none")
    monkeypatch.setenv("VLLM_IDLM_CONFIGS", str(tmp_path))
    with pytest.raises(zoo.ZooError, match=r"lora: './none'.*is no folder"):
        zoo.load("mine").lora_path()


def test_name_must_be_the_files(tmp_path, monkeypatch):
    write_entry(tmp_path)
    (tmp_path / "mine.yaml").rename(tmp_path / "yours.yaml")
    monkeypatch.setenv("VLLM_IDLM_CONFIGS", str(tmp_path))
    with pytest.raises(zoo.ZooError, match="'mine' must be the file's own, 'yours'"):
        zoo.load("yours")


def test_import_is_cheap():
    code = "import sys, vllm_idlm.zoo; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
