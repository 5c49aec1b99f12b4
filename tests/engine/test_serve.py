"""The real `vllm serve` with ISD over HTTP: answers, concurrency, refusals that hurt nobody else, and /metrics."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.cases import SCHEMA

httpx = pytest.importorskip("httpx")

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
MODEL = "smollm2-135m-risd"
N = 4
LENGTH = 1024
START_SECONDS = 300
FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", str(LENGTH), "--max-num-seqs", "16")
MEMORY = ("--kv-cache-memory-bytes", "400000000", "--disable-uvicorn-access-log")
SUBJECTS = ("the sea", "a cat", "France", "bread", "the moon")
PROMPTS = [f"{ask} {subject}." for ask in ("Write one sentence about", "Ask a question about") for subject in SUBJECTS]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(smol, tmp_path_factory):
    """A client of a running server; its whole process group is ended afterwards."""
    port = _free_port()
    log = tmp_path_factory.mktemp("serve") / "server.log"
    speculation = ("--speculative-config", json.dumps({"method": "isd", "n": N, "coverage": "last"}))
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "serve", MODEL, *speculation, *FLAGS, *MEMORY, "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            _wait(client, process, log)
            yield client
    finally:
        _end(process)


def _wait(client, process, log) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    pytest.fail("the server did not start:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-40:]))


def _end(process) -> None:
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _body(prompt, **options):
    messages = [{"role": "user", "content": prompt}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 24, **options}


def _ask(client, prompt, **options) -> str:
    response = client.post("/v1/chat/completions", json=_body(prompt, **options))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def _stream(client, prompt, **options) -> tuple[str, int]:
    """The text of a streamed answer, and the number of pieces it came in."""
    pieces = []
    with client.stream("POST", "/v1/chat/completions", json=_body(prompt, stream=True, **options)) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if not line or data == "[DONE]":
                continue
            pieces += [c["delta"]["content"] for c in json.loads(data)["choices"] if c["delta"].get("content")]
    return "".join(pieces), len(pieces)


def test_models_lists_the_zoo_name(server):
    assert [model["id"] for model in server.get("/v1/models").json()["data"]] == [MODEL]


def test_streamed_equals_not_streamed(server):
    whole = _ask(server, "Explain gravity in simple words.", max_tokens=40)
    streamed, count = _stream(server, "Explain gravity in simple words.", max_tokens=40)
    assert streamed == whole
    assert len(whole) > 50
    assert count > 5


@pytest.fixture(scope="module")
def alone(server):
    """Every prompt's answer, asked one by one."""
    return [_ask(server, prompt) for prompt in PROMPTS]


def test_concurrent_requests_equal_single_ones(server, alone):
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda prompt: _ask(server, prompt), PROMPTS))
    assert together == alone
    assert len(set(alone)) > 7


def test_equals_plain_decoding(smol, alone):
    """The same prompts by vLLM without ISD, in this process."""
    from vllm import SamplingParams

    from tests.support.engines import engine

    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    outputs = engine(smol).chat(chats, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    assert alone == [output.outputs[0].text for output in outputs]


def _bad_schema(kind):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": kind}}}}


REFUSED = {
    "unknown-model": ({"model": "no-such-adapter"}, 404, "no-such-adapter"),
    "prompt-too-long": ({"messages": [{"role": "user", "content": "word " * 2 * LENGTH}]}, 400, str(LENGTH)),
    "bad-schema": (_bad_schema("no-such-type"), 400, ""),
    "bad-temperature": ({"temperature": -1}, 400, "temperature"),
    "bad-bias": ({"logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    "bad-opt-out": ({"vllm_xargs": {"isd": "perhaps"}}, 400, "perhaps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_fails_alone(server, alone, case):
    """It is refused while another is being answered; that one and the next get the same answer as ever."""
    options, status, words = REFUSED[case]
    others: list[str] = []
    busy = threading.Thread(target=lambda: others.append(_ask(server, PROMPTS[0])))
    busy.start()
    refused = server.post("/v1/chat/completions", json=_body("Hello.", **options))
    busy.join()
    assert refused.status_code == status, refused.text
    assert words in refused.text
    assert others == alone[:1]
    assert alone[2].startswith(_ask(server, PROMPTS[2], max_tokens=8))


@pytest.mark.parametrize("options", [{"min_p": 0.2, "temperature": 0.8, "seed": 1}, {"logit_bias": {"1000": 2.5}}])
def test_options_that_other_speculation_refuses(server, options):
    assert _ask(server, "Name a colour.", max_tokens=12, **options)


def test_json_schema(server):
    text = _ask(
        server,
        "Describe a person as JSON with name, age, city.",
        max_tokens=120,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
    )
    assert set(json.loads(text)) == {"name", "age", "city"}


# -- metrics


def _counters(client) -> dict[str, float]:
    """vLLM's counters and ISD's: name, and position or kind where there is one, -> value."""
    found = {}
    for line in client.get("/metrics").text.splitlines():
        if match := re.match(r"((?:vllm|isd):\w+_total)\{(.*)\} (\S+)$", line):
            name, labels, value = match.groups()
            place = re.search(r'(?:position|kind)="(\w+)"', labels)
            key = f"{name} {place.group(1)}" if place else name
            found[key] = found.get(key, 0.0) + float(value)
    return found


@pytest.fixture(scope="module")
def counted(server):
    """Growth of the counters over 16 concurrent answers of exactly 24 tokens, and the number of tokens answered."""
    before = _counters(server)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda prompt: _ask(server, prompt, ignore_eos=True), PROMPTS))
    time.sleep(1)  # the counters are written after the answer
    after = _counters(server)
    return {name: value - before.get(name, 0.0) for name, value in after.items()}, 24 * len(PROMPTS)


def _spec(growth, name):
    return growth[f"vllm:spec_decode_num_{name}_total"]


def _positions(growth) -> list[float]:
    prefix = "vllm:spec_decode_num_accepted_tokens_per_pos_total "
    places = {int(name.removeprefix(prefix)): v for name, v in growth.items() if name.startswith(prefix)}
    return [places[i] for i in range(len(places))]


def test_metrics_count_drafts_only(counted):
    growth, _ = counted
    drafts = _spec(growth, "drafts")
    assert 0 < drafts < _spec(growth, "draft_tokens") <= (N - 1) * drafts
    assert 0 < _spec(growth, "accepted_tokens") < _spec(growth, "draft_tokens")


def test_metrics_per_position(counted):
    growth, _ = counted
    places = _positions(growth)
    assert sum(places) == _spec(growth, "accepted_tokens")
    assert places == sorted(places, reverse=True)
    assert places[0] > 0
    assert places[N - 1 :] == [0.0] * len(places[N - 1 :])


def test_metrics_account_for_every_token(counted):
    """Each answer's first token comes from its prompt; a forward gives one token, and one more per accepted draft.

    Forwards = verify forwards (drafts) + cold ones. Only an answer's last forward may be cut (by max_tokens), and a
    rejection makes a cold one, so the cold forwards are bounded by what was not accepted in full.
    """
    growth, tokens = counted
    assert growth["vllm:generation_tokens_total"] == tokens
    after_first = tokens - len(PROMPTS)
    forwards = after_first - _spec(growth, "accepted_tokens")
    cold = forwards - _spec(growth, "drafts")
    cut = (N - 1) * len(PROMPTS)
    assert 0 < cold <= _spec(growth, "drafts") + cut


def test_isds_own_metrics(counted):
    """Forwards by kind and their tokens, in agreement with vLLM's counters: TPF can be read off `/metrics`."""
    growth, tokens = counted
    assert growth["isd:tokens_total"] == tokens - len(PROMPTS)
    assert growth["isd:forwards_total verify"] == _spec(growth, "drafts")
    forwards = growth["isd:forwards_total verify"] + growth["isd:forwards_total cold"]
    assert forwards == growth["isd:tokens_total"] - _spec(growth, "accepted_tokens")


def test_rows_are_counted(counted):
    """A verify forward has 2 n - 1 rows, a cold one n, a prompt's end n - 1 masks; the last of an answer less."""
    growth, _ = counted
    verify, cold = (growth[f"isd:forwards_total {kind}"] for kind in ("verify", "cold"))
    most = (2 * N - 1) * verify + N * cold + (N - 1) * len(PROMPTS)
    assert 0 <= most - growth["isd:rows_total"] <= 3 * N * len(PROMPTS)


def test_a_request_may_opt_out(server, alone):
    """The same answer, without a draft."""
    before = _counters(server)
    assert _ask(server, PROMPTS[0], vllm_xargs={"isd": "off"}) == alone[0]
    time.sleep(1)
    growth = {name: value - before[name] for name, value in _counters(server).items()}
    assert _spec(growth, "drafts") == 0
    assert growth["isd:forwards_total cold"] > 5
    assert growth["isd:rows_total"] == growth["isd:forwards_total cold"]
