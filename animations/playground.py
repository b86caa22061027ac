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
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

import drawing
import sample
from model import (
    SEED, BadInput, CommandLine, DiffusionConfig, encode_text, noise_index, number, pick_device,
    start,
)

MAX_BODY = 64 * 1024
MAX_SAMPLES = 8
PATIENCE = 2  # seconds for which a request waits for the one before it
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
          "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


@dataclass
class Request:
    """What a page asks for, judged by `judge`."""

    what: str                     # "look": one network call; "fill": the sampler fills the gaps
    x: torch.Tensor               # (B, T) ids, with a mask in every gap, each row alike
    config: sample.SamplerConfig
    seed: int


def judge(request, model_config: DiffusionConfig) -> Request:
    """The request, or BadInput with one sentence that the page shows."""
    if not isinstance(request, dict) or request.keys() - {"what", "text", "gaps", "settings",
                                                         "samples"}:
        raise BadInput("a request is an object of what, text, gaps, settings and samples")
    what, text, gaps = request.get("what"), request.get("text"), request.get("gaps")
    settings, samples = request.get("settings", {}), request.get("samples", 1)
    if what not in ("look", "fill"):
        raise BadInput(f'what is "look" or "fill", not {json.dumps(what):.40}')
    if not isinstance(text, str) or not 1 <= len(text) <= model_config.sequence_len:
        length = f"has {len(text)} characters" if isinstance(text, str) else "is missing"
        raise BadInput(f"The text {length}; the model takes 1 to {model_config.sequence_len}.")
    if not isinstance(gaps, list) or not all(type(i) is int and 0 <= i < len(text) for i in gaps):
        raise BadInput(f"gaps is a list of whole numbers from 0 to {len(text) - 1}")
    if type(samples) is not int or not 1 <= samples <= MAX_SAMPLES:
        raise BadInput(f"samples is a whole number from 1 to {MAX_SAMPLES}")
    if what == "fill" and not gaps:
        raise BadInput("There is no gap to fill: click a word first.")
    x = ids_of(text, model_config)
    x[gaps] = model_config.mask_token_id
    return Request(what, x.repeat(samples, 1), *judge_settings(settings, model_config))


def ids_of(text: str, model_config: DiffusionConfig) -> torch.Tensor:
    """The ids (T,) of a text in which each character stands for one byte of UTF-8."""
    try:
        text = text.encode("latin-1").decode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise BadInput("text has one character for each byte of UTF-8") from error
    try:
        return encode_text(text, model_config).long()
    except BadInput as error:
        allowed = set(range(model_config.vocab_size)) - {model_config.mask_token_id}
        refused = next(character for character in text
                       if set(character.encode("utf-8", "surrogateescape")) - allowed)
        plain = "plain English letters" if model_config.vocab_size <= 128 else "other characters"
        shown = refused if refused.isprintable() else ascii(refused)
        raise BadInput(f"This model knows {plain} only: {shown} cannot be used.") from error


def judge_settings(settings, model_config: DiffusionConfig):
    """The sampler's settings and the seed, judged as a command line of sample.py is."""
    if not isinstance(settings, dict):
        raise BadInput("settings is an object")
    parser = CommandLine("")
    sample.add_sampler_arguments(parser)
    parser.add_argument("--seed", type=SEED, default=1337)
    args = parser.parse_args([f"--{name}={value}" for name, value in settings.items()])
    return sample.sampler_config(args, model_config.sequence_len), args.seed


def answer(model, request: Request) -> Iterator[list[dict]]:
    """The steps of the answer, in lists as they are complete; a network call lies between two."""
    mask_token_id = model.config.mask_token_id
    recorder, x = drawing.Recorder(mask_token_id), request.x.to(next(model.parameters()).device)
    masked = x == mask_token_id
    if request.what == "look":
        recorder.add(x, "given")
        with torch.inference_mode():
            log_p = model(x, noise_index(masked, model.config.diffusion_steps))
        recorder.expect(x, log_p.flatten(0, 1).cpu())
    else:
        generator = torch.Generator().manual_seed(request.seed)
        states = sample.draft_and_correct(model, x, masked, request.config, generator)
        with closing(recorder.watch(model, x, states)) as states:
            for _ in states:
                yield recorder.steps[:-1]
                del recorder.steps[:-1]  # the next call adds to the last one
    yield recorder.steps


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
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, error: object) -> None:
        self.reply(status, "application/json", json.dumps({"error": str(error)}).encode())

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

    do_HEAD = do_GET

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        length = int(length) if re.fullmatch(r"\d{1,9}", length) else 0
        body = self.rfile.read(min(length, 2 * MAX_BODY))  # a client hears no answer before
        is_json = self.headers.get_content_type() == "application/json"
        if self.foreign() or not is_json or length > MAX_BODY:
            return self.send_error(403 if self.foreign() else 413 if is_json else 415)
        try:
            request = judge(json.loads(body), self.server.model.config)
        except BadInput as error:
            return self.refuse(400, error)
        except (ValueError, RecursionError):
            return self.refuse(400, "the request is not JSON, or too deep")
        if not self.server.lock.acquire(timeout=PATIENCE):
            return self.refuse(503, "The model is busy with another window. Try again in a moment.")
        try:
            self.stream(request)
        finally:
            self.server.lock.release()

    def stream(self, request: Request) -> None:
        """One step a line, once it is complete; {"done": true} or {"error": "..."} comes last."""
        self.reply(200, "application/x-ndjson")
        try:
            with closing(answer(self.server.model, request)) as parts:
                for steps in parts:
                    if self.gone():
                        return
                    self.write(steps)
            self.write([{"done": True}])
        except (RuntimeError, MemoryError) as error:  # as where memory can't hold the call
            why = str(error).splitlines() or ["no memory"]
            self.write([{"error": f"The network call failed: {why[0]}"}])

    def write(self, lines: list[dict]) -> None:
        self.wfile.write("".join(json.dumps(line) + "\n" for line in lines).encode())


class Server(ThreadingHTTPServer):
    """One model. Each connection has a thread, as browsers open some that they never use."""

    allow_reuse_address = os.name != "nt"  # Windows would share a taken port

    def __init__(self, port: int, model, args):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.lock = model, threading.Lock()
        live = {"temperature": sample.SamplerConfig.temperature, "seed": args.seed, "methods": {},
                "length": model.config.sequence_len, "block": sample.SamplerConfig.block_len}
        for name, (rule, flag) in sample.METHODS.items():
            value = inspect.signature(rule).parameters[flag].default
            sweeps = judge_settings({"method": name}, model.config)[0].sweeps
            live["methods"][name] = {"flag": flag, "value": value, "sweeps": sweeps}
        self.page = drawing.page(
            args.weights, command="uv run animations/playground.py", title="Touch the model",
            mask=model.config.mask_token_id, candidates=5, live=live,
        ).encode()


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
