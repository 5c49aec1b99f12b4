"""What a client sees when a part of a service dies: an error, never a hang and never other text.

A tiny random model with the embedded model's tokenizer, two ranks on Ray or on vLLM's own processes, real HTTP.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("httpx")
pytest.importorskip("psutil")

import httpx

from tests.support import tiny
from tests.support.servers import one_called, serving

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]
LONG, SECONDS = 900, 120
NAME = "tiny"
RAY = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}


@pytest.fixture(scope="module")
def model(smol, tmp_path_factory):
    """A tiny Qwen3 with SmolLM2's vocabulary and tokenizer, and a random adapter."""
    folder = tmp_path_factory.mktemp("failures")
    path = tiny.write_tiny(folder / "model", vocab=49152)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (Path(smol) / name).exists():
            shutil.copy(Path(smol) / name, path / name)
    return str(path), str(tiny.write_adapter(folder / "draft", path, scale=0.5))


def command(model, *flags):
    path, draft = model
    isd = {"method": "isd", "n": 4, "mask_token_id": 16, "lora": draft, "coverage": "last"}
    vllm = str(Path(sys.executable).with_name("vllm"))
    flags = ("--served-model-name", NAME, "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4", *flags)
    memory = ("--max-model-len", "1024", "--kv-cache-memory-bytes", "100000000")
    return [vllm, "serve", path, *flags, *memory, "--speculative-config", json.dumps(isd)]


def ask(client, tokens=24, **options):
    body = {"model": NAME, "prompt": [300, 301, 302], "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return client.post("/v1/completions", json={**body, **options})


def stream_until_killed(client, kill):
    """Stream a long answer, `kill` something after its first pieces: the text so far, and how it ended."""
    text, ended = "", "complete"
    body = {"model": NAME, "prompt": [300, 301, 302], "max_tokens": LONG, "temperature": 0, "ignore_eos": True}
    try:
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            assert response.status_code == 200
            for count, line in enumerate(response.iter_lines()):
                data = line.removeprefix("data: ")
                if not line or data == "[DONE]":
                    continue
                content = json.loads(data)
                if "error" in content:
                    ended = "error event"
                    continue
                text += content["choices"][0]["text"]
                if count == 10:
                    kill()
    except httpx.HTTPError as error:
        ended = type(error).__name__
    return text, ended


@pytest.mark.parametrize("part", ["a rank (mp)", "a rank (ray)", "the head node"])
def test_a_part_dies_under_a_request(model, tmp_path, part):
    """The stream ends with an error, its text is a prefix of the right one, and the service ends to be restarted."""
    backend = "mp" if "mp" in part else "ray"
    flags = ("--tensor-parallel-size", "2", "--distributed-executor-backend", backend)
    words = {"the head node": ("gcs_server",)}.get(
        part, ("VLLM::Worker_TP1", "ray::CPURayWorkerProc", "ray::RayWorkerProc")
    )
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", **RAY}
    with serving(command(model, *flags), tmp_path / "log", **environment) as (process, client):
        whole = ask(client, LONG).json()["choices"][0]["text"]
        assert len(whole) > 200
        text, ended = stream_until_killed(client, one_called(process.pid, *words).kill)
        began = time.monotonic()
        assert whole.startswith(text)
        assert ended != "complete" or text == whole
        while time.monotonic() - began < SECONDS and process.poll() is None:
            try:
                answer = ask(client)
                assert answer.status_code == 500 or whole.startswith(answer.json()["choices"][0]["text"])
            except httpx.HTTPError:
                pass
            time.sleep(1)
        print(f"{part}: {ended} after {len(text)} of {len(whole)} characters, service ended {process.returncode}")
        assert process.poll() is not None, "a service without a part must end, to be started again"


def test_no_room_for_keys_and_values(model, tmp_path):
    """Four long answers in a cache for less than two: preempted and computed anew, the same text; none is refused."""
    from concurrent.futures import ThreadPoolExecutor

    flags = ("--num-gpu-blocks-override", "10", "--block-size", "128", "--no-enable-prefix-caching")
    with serving(command(model, *flags), tmp_path / "log") as (_, client):
        alone = ask(client, 600).json()["choices"][0]["text"]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda _: ask(client, 600).json()["choices"][0]["text"], range(4)))
        counted = [x for x in client.get("/metrics").text.splitlines() if x.startswith("vllm:num_preemptions_total")]
        assert together == [alone] * 4
        assert float(counted[0].split()[-1]) > 0


def test_data_parallel(model, tmp_path):
    """Two engines behind one port give one engine's answers, and both work."""
    from concurrent.futures import ThreadPoolExecutor

    flags, environment = ("--data-parallel-size", "2"), {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with serving(command(model, *flags), tmp_path / "log", **environment) as (_, client):
        alone = ask(client, 200).json()["choices"][0]["text"]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda _: ask(client, 200).json()["choices"][0]["text"], range(8)))
        lines = [x for x in client.get("/metrics").text.splitlines() if x.startswith("isd:forwards_total")]
        engines = {x.split('engine="')[1].split('"')[0] for x in lines if float(x.split()[-1]) > 0}
        assert together == [alone] * 8
        assert engines == {"0", "1"}
