"""A server that knows nothing of rbee: mistral.rs, an engine in Rust, behind Python's own HTTP server."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mistralrs import ChatCompletionRequest, Runner, Which

FILE = Path(sys.argv[1])
RUNNER = Runner(which=Which.GGUF(quantized_model_id=str(FILE.parent), quantized_filename=FILE.name))


class Handler(BaseHTTPRequestHandler):
    """Streams chat completions, and nothing else."""

    def do_GET(self) -> None:
        """Say that the model is loaded, which it is before anybody is let in."""
        self.send_response(200 if self.path == "/alive" else 404)
        self.end_headers()

    def do_POST(self) -> None:
        """Stream one answer, for as long as its caller reads."""
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/chat/completions":
            self.send_error(404)
            return
        request = ChatCompletionRequest(
            messages=asked["messages"],
            model="default",
            stream=True,
            max_tokens=asked.get("max_tokens"),
            temperature=0.0,
        )
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for chunk in RUNNER.send_chat_completion_request(request):
            choice, usage = chunk.choices[0], chunk.usage
            delta = {"content": choice.delta.content}
            self._send({"choices": [{"index": 0, "delta": delta, "finish_reason": choice.finish_reason}]})
            if usage:
                told = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
                self._send({"choices": [], "usage": told})
        self.wfile.write(b"data:[DONE]\r\n\r\n")

    def _send(self, chunk: dict[str, object]) -> None:
        self.wfile.write(b"data:" + json.dumps(chunk).encode() + b"\r\n\r\n")


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
