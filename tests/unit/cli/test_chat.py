"""`idlm chat`: what a server is asked, what is shown of its answers, and what of its errors."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from vllm_idlm.cli import app, chat

RUNNER = CliRunner()


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
