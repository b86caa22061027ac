"""Touch the model: mask characters in a browser, and watch the whole line change its mind.

    uv run animations/playground.py
    uv run animations/playground.py --weights weights/mine.pt --port 8080 --no-browser
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads must not spin on busy cores

import inspect
import json
import re
import select
import socket
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

import drawing
import sample
from model import SEED, BadInput, CommandLine, encode_text, noise_index, number, pick_device, start

MAX_BODY = 64 * 1024
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
          "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def judge(settings: dict, T: int):
    """The sampler's settings and the seed, judged as a command line of sample.py is."""
    parser = CommandLine("")
    sample.add_sampler_arguments(parser)
    parser.add_argument("--seed", type=SEED, default=1337)
    args = parser.parse_args([f"--{name}={value}" for name, value in settings.items()])
    return sample.sampler_config(args, T), args.seed


def states(model, request: dict) -> Iterator[torch.Tensor]:
    """The states of a request's text, one a network call. What is wrong is raised before them."""
    mask_token_id, T = model.config.mask_token_id, model.config.sequence_len
    text, gaps = request["text"].encode("latin-1"), request["gaps"]  # a character is a byte
    if not 1 <= len(text) <= T:
        raise BadInput(f"the text has {len(text)} characters; the model takes 1 to {T}")
    x = encode_text(text.decode("utf-8", "surrogateescape"), model.config).long()[None]
    x[0, gaps] = mask_token_id
    x = x.to(next(model.parameters()).device)
    region = x == mask_token_id
    if request["what"] == "look":
        return look(model, x, region)
    config, seed = judge(request["settings"], T)
    if not gaps:
        raise BadInput("there is no gap to fill: mask a character first")
    return sample.draft_and_correct(model, x, region, config, torch.Generator().manual_seed(seed))


@torch.inference_mode()
def look(model, x, masked) -> Iterator[torch.Tensor]:
    """One network call, and no new state."""
    model(x, noise_index(masked, model.config.diffusion_steps))
    yield from ()


class Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds for which a client may keep a thread waiting

    def handle(self):
        with suppress(ConnectionError, TimeoutError):  # a client may go away at any moment
            super().handle()

    def log_message(self, *_):
        pass

    def reply(self, status: int, kind: str, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(body)

    def foreign(self) -> bool:
        """Whether another site asks, or asks under a host name that is not this server's."""
        host = self.headers.get("Host", "")
        own = re.fullmatch(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", host)
        return not own or self.headers.get("Origin", f"http://{host}") != f"http://{host}"

    def gone(self) -> bool:
        """Whether the client has closed its end."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def do_GET(self):
        if self.foreign() or self.path != "/":
            return self.send_error(403 if self.foreign() else 404)
        self.reply(200, "text/html; charset=utf-8", self.server.page)

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        length = int(length) if re.fullmatch(r"\d{1,9}", length) else 0
        body = self.rfile.read(min(length, 2 * MAX_BODY))  # a client hears no answer before
        is_json = self.headers.get_content_type() == "application/json"
        if self.foreign() or not is_json or length > MAX_BODY:
            return self.send_error(403 if self.foreign() else 413 if is_json else 415)
        with self.server.lock:
            self.answer(body)

    def answer(self, body: bytes) -> None:
        """One step a line, once it is complete; {"done": true} comes last."""
        try:
            found = states(self.server.model, json.loads(body))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            return self.reply(400, "application/json", json.dumps({"error": str(error)}).encode())
        self.reply(200, "application/x-ndjson")
        recorder = drawing.Recorder(self.server.model.config.mask_token_id, on=True)
        recorder.begin()
        with closing(recorder.watch(self.server.model, found)) as found:
            for _ in found:
                if self.gone():
                    return
                self.write(recorder.steps[:-1])
                del recorder.steps[:-1]  # the next call adds to the last one
        self.write([*recorder.steps, {"done": True}])

    def write(self, lines: list[dict]) -> None:
        self.wfile.write("".join(json.dumps(line) + "\n" for line in lines).encode())


class Server(ThreadingHTTPServer):
    """One model. Each connection has a thread, as browsers open some that they never use."""

    allow_reuse_address = os.name != "nt"  # Windows would share a taken port

    def __init__(self, port: int, model, args):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.lock = model, threading.Lock()
        live = {"temperature": sample.SamplerConfig.temperature, "seed": args.seed, "methods": {}}
        for name, (rule, flag) in sample.METHODS.items():
            value = inspect.signature(rule).parameters[flag].default
            sweeps = judge({"method": name}, model.config.sequence_len)[0].sweeps
            live["methods"][name] = {"flag": flag, "value": value, "sweeps": sweeps}
        recorder = drawing.Recorder(model.config.mask_token_id, title="Touch the model", live=live)
        self.page = drawing.page(args.weights, **recorder.trace).encode()


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    sample.add_model_arguments(parser)
    parser.add_argument("--port", type=number(int, 0, 65000), default=8000, help="first to try")
    parser.add_argument("--no-browser", action="store_true", help="open no browser")
    args = parser.parse_args(argv)
    model = sample.load_for_sampling(args.weights, pick_device(args.device))
    for port in range(args.port, args.port + 20):
        with suppress(OSError):
            server = Server(port, model, args)
            break
    else:
        raise BadInput(f"ports {args.port} to {port} are taken")
    address = f"http://127.0.0.1:{server.server_port}/"
    print(f"{address} (Ctrl-C ends it)", flush=True)
    if not args.no_browser:  # one in the terminal would hold the server up
        threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    start(main)
