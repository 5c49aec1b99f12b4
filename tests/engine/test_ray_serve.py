"""Ray Serve with the toy configuration: it serves the embedded model, and comes back once killed."""

from __future__ import annotations

import json
import sys

import pytest

from tests.support.paths import ROOT
from tests.unit.test_ray_serve import config

_APP = """
import json, sys, time
import ray, yaml
from ray import serve
from vllm_idlm.ray_serve import build

if __name__ == "__main__":
    given, port = json.loads(sys.argv[1]), int(sys.argv[-1])
    ray.init(num_cpus=4, include_dashboard=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(given["applications"][0]["args"]), name="toy", route_prefix="/")
    while True:
        time.sleep(1)
"""


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_toy_config_serves_and_comes_back(smol, tmp_path):
    """A real Ray cluster and Serve: plain decoding's text; the engine killed: an error, then the same text again."""
    pytest.importorskip("ray.serve.llm")
    httpx = pytest.importorskip("httpx")
    import time

    from vllm import SamplingParams

    from tests.support.engines import engine, python_path
    from tests.support.servers import one_called, serving

    script = tmp_path / "app.py"
    script.write_text(_APP)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": "smollm2-135m-risd", "messages": chat, "temperature": 0, "max_tokens": 24}
    command = [sys.executable, str(script), json.dumps(config("serve-smollm2.yaml"))]
    environment = {"PYTHONPATH": python_path(ROOT), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with serving(command, tmp_path / "log", "/v1/models", 900, **environment) as (process, client):

        def ask(tokens=24):
            return client.post("/v1/chat/completions", json={**body, "max_tokens": tokens}, timeout=300)

        first = ask()
        assert first.status_code == 200, first.text
        text = first.json()["choices"][0]["message"]["content"]
        one_called(process.pid, "VLLM::EngineCore", "VLLM::Worker").kill()
        seen, until = [], time.monotonic() + 900
        while time.monotonic() < until:
            try:
                answer = ask()
                seen.append(answer.status_code)
                if answer.status_code == 200:
                    assert answer.json()["choices"][0]["message"]["content"] == text
                    if len(seen) > 1:
                        break
            except httpx.HTTPError as error:
                seen.append(type(error).__name__)
            time.sleep(1)
        print("after the kill a client saw", seen)
        assert seen[-1] == 200, seen
        assert any(status != 200 for status in seen)
    plain = engine(smol).chat([chat], SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    assert text == plain[0].outputs[0].text
