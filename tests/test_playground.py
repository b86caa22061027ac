"""The recorder, the page, the server behind the live page, and both pages in a browser."""

import html
import http.client
import importlib
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from argparse import Namespace
from functools import partial
from html.parser import HTMLParser

import pytest
import torch
from conftest import ROOT, assert_one_clear_line, launch, no_space, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import drawing
from sample import SamplerConfig, dilated, draft_and_correct, left_to_right

playground = importlib.import_module("playground")
PAGE = (ROOT / "animations" / "page.html").read_text("utf-8")
BLANK = torch.zeros(1, 32, dtype=torch.long)


def sampled(model, x, **config):
    generator = torch.Generator().manual_seed(3)
    return draft_and_correct(model, x, x == 0, SamplerConfig(**{"stride": 4} | config), generator)


def recorded(model, x, **config):
    recorder = drawing.Recorder(0, on=True)
    recorder.begin()
    return recorder, list(recorder.watch(model, sampled(model, x, **config)))


def replayed(steps):
    """The text after every step."""
    text = {}
    for step in steps:
        text |= dict(zip(step["set"], step["to"].encode("latin-1"), strict=True))
        yield [text[place] for place in range(len(text))]


def island(page):
    """The trace inside a page. A real HTML parser decides where the script element ends."""
    class Finder(HTMLParser):
        inside, found = False, ""

        def handle_starttag(self, tag, attributes):
            self.inside = dict(attributes).get("id") == "trace"

        def handle_data(self, data):
            self.found += data * self.inside

        def handle_endtag(self, tag):
            self.inside = False

    finder = Finder()
    finder.feed(page)
    return json.loads(finder.found)


@pytest.mark.parametrize("config", [{}, {"stride": 1}, {"rule": left_to_right, "sweeps": 0}])
def test_the_recorder_keeps_every_state_and_does_not_change_the_text(config):
    model = random_model()
    recorder, states = recorded(model, BLANK, **config)
    assert all(map(torch.equal, states, sampled(model, BLANK, **config)))
    texts = iter(replayed(recorder.steps))
    for state in states:
        assert state[0].tolist() in texts  # in this order
    assert not model._forward_hooks


def test_guesses_are_the_likeliest_characters_of_the_masked_places():
    model, calls = random_model(), []
    with model.register_forward_hook(lambda model, inputs, log_p: calls.append((*inputs, log_p))):
        recorder, _ = recorded(model, BLANK, rule=partial(dilated, turns=8))
    assert [step["label"] for step in recorder.steps] == ["draft"] * 9 + ["correction"] * 16
    assert [len(step.get("nats", [])) for step in recorder.steps] == [0, *[4] * 8, *[0, 8] * 8]
    looks = [step for step in recorder.steps if "p" in step]
    assert len(looks) == len(calls) == 8 + 2 * 4
    for step, (x_t, _, log_p) in zip(looks, calls, strict=True):
        p = log_p[x_t == 0].exp()
        best = torch.tensor(list(step["guess"].encode("latin-1"))).view(-1, 5)
        assert len(best) == (x_t == 0).sum() and (best != 0).all()
        assert torch.equal(best[:, 0], p.argmax(-1))
        assert (torch.tensor(step["p"]).view(-1, 5) - 100 * p.gather(1, best)).abs().max() <= 0.51


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(min_size=6, max_size=6), min_size=1), st.text())
def test_states_of_any_bytes_can_be_read_back_from_the_page(
    tmp_path_factory, tiny_weights, states, name
):
    recorder = drawing.Recorder(0)
    recorder.begin(name + "</script>\u2028<!--")
    for state in states:
        recorder.see(list(state))
    trace = island(drawing.page(tiny_weights, **recorder.trace))
    assert trace["runs"] == recorder.trace["runs"]
    assert list(replayed(trace["runs"][0]["steps"])) == [list(state) for state in states]


def test_the_page_loads_nothing_from_other_sites():
    assert not re.findall(r"https?:|@import|\bsrc\s*=|\bhref=", PAGE)
    assert re.findall(r"fetch\((.*?),", PAGE) == ['"/run"']
    assert "default-src 'none'" in PAGE and "innerHTML" not in PAGE


def test_the_recorded_page_of_the_readme_was_made_from_this_page_html():
    """After a change of page.html, the command shown on denoising.html has to make it anew."""
    path = ROOT / "animations" / "denoising.html"
    assert path.stat().st_size <= 120_000
    shipped = re.sub(r'(id="trace">)[^<]*', r"\1{}", path.read_text("utf-8"), count=1)
    assert shipped == PAGE


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ink, paper", [
    ("ink", "paper"), ("ink", "panel"), ("soft", "paper"), ("fresh", "glow"), ("fault", "paper"),
    ("guess", "low"), ("guess", "high"), ("paper", "accent"),
])
def test_text_contrasts_with_its_background_in_both_themes(theme, ink, paper):
    palette = dict(re.findall(r"--(\w+): light-dark\((#\w+, #\w+)\)", PAGE))
    a, b = (luminance(palette[name].split(", ")[theme]) + 0.05 for name in (ink, paper))
    assert max(a, b) / min(a, b) >= 4.5


@pytest.mark.parametrize("name, arguments", [
    ("diffusion-process", ["--num-blocks", 2]), ("race", []),
    ("game-of-life", ["--generations", 2]),
])
def test_scripts_save_pages_whole_or_not_at_all(
    name, arguments, tiny_weights, tmp_path, command, monkeypatch
):
    save = tmp_path / "x.html"
    main = partial(command, importlib.import_module(name).main, "--weights", tiny_weights)
    assert main("--save", save, *arguments).returncode == 0
    trace = island(old := save.read_text("utf-8"))
    for run in trace["runs"]:
        *_, text = replayed(run["steps"])
        assert len(text) in (32, 32 + 24, 20 * 64) and 0 not in text
    assert len(trace["runs"]) == 1 + (name == "race")
    monkeypatch.setattr("model.os.fsync", no_space)
    assert_one_clear_line(main("--save", save, *arguments), "No space left")
    assert save.read_text("utf-8") == old and list(tmp_path.iterdir()) == [save]


def test_loss_curve_refuses_a_page(command):
    curve = importlib.import_module("loss-curve")
    assert_one_clear_line(command(curve.main, "--save", "x.html"), "x.html", ".png")


@pytest.fixture(scope="module")
def server(tiny_weights):
    args = Namespace(seed=1, weights=tiny_weights)
    with playground.Server(0, random_model(), args) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def post(server, body, **headers):
    """Posts to /run. Returns the status and the lines of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", "/run", body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    return answer.status, answer.read().decode().splitlines()


def request(text="To be, or ___ to be", what="fill", **settings):
    gaps = [i for i, character in enumerate(text) if character == "_"]
    return {"what": what, "text": text, "gaps": gaps, "settings": settings}


def test_server_fills_the_gaps_and_nothing_else(server):
    status, lines = post(server, request(method="left-to-right", k=2, seed=5))
    *steps, done = map(json.loads, lines)
    assert status == 200 and done == {"done": True}
    *_, text = replayed(steps)
    assert 0 not in text and re.fullmatch(r"To be, or .{3} to be", bytes(text).decode(), re.DOTALL)
    assert [step["label"] for step in steps] == ["draft"] * 3


def test_a_look_makes_one_network_call_and_writes_nothing(server):
    _, lines = post(server, request(what="look"))
    step, _ = map(json.loads, lines)
    assert len(step["p"]) == 15 and step["to"].count("\0") == 3


@pytest.mark.parametrize("body, words", [
    (request(temperature="hot"), "hot"), (request(k=3), "--k belongs to another"),
    (request(method="dream"), "dream"), (request(help=""), "help"), (request(weights=1), "weights"),
    (request(text="_" * 33), "33 characters"), (request(text=""), "0 characters"),
    (request(text="caf\xc3\xa9 _"), "é"), (request(text="no gap"), "no gap"),
    (request(text="☃"), "latin-1"), (request() | {"text": 7}, "int"),
    (request() | {"gaps": [99]}, "99"), (request() | {"gaps": "all"}, "str"),
    (request() | {"settings": []}, "list"), ({}, "text"), ([], "list"), (None, "None"),
    (b"{", "char 1"), (b"\xff", "utf-8"), (b"[" * 60000, "recursion"),
])
def test_a_bad_request_is_refused_in_one_line(server, body, words):
    status, lines = post(server, body)
    assert status == 400 and len(lines) == 1
    error = json.loads(lines[0])["error"]
    assert words in error and error.strip() and "\n" not in error


def test_server_answers_its_own_page_only(server):
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1:1@evil.example", ""):
        assert post(server, request(), Host=host)[0] == 403
    assert post(server, request(), Host="localhost:80", Origin="http://evil.example")[0] == 403
    for host in ("localhost:80", "[::1]", "127.0.0.1"):
        assert post(server, request(), Host=host, Origin=f"http://{host}")[0] == 200
    assert post(server, request(), Content_Type="text/plain")[0] == 415
    assert post(server, b" " * (64 * 1024 + 1))[0] == 413
    assert server.server_address[0] == "127.0.0.1"


def test_the_server_sends_its_page_under_a_content_security_policy(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    live = island(answer.read().decode())["live"]
    assert live["methods"]["left-to-right"] == {"flag": "k", "value": 1, "sweeps": 0}
    connection.request("GET", "/favicon.ico")
    assert connection.getresponse().status == 404


def test_a_client_that_goes_away_frees_the_model(server):
    body = json.dumps(request(sweeps=10**9)).encode()
    head = b"POST /run HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(server.server_address) as client:
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert client.recv(100)
    assert post(server, request())[0] == 200
    assert not server.model._forward_hooks


def test_the_playground_passes_over_a_taken_port_and_ends_at_once_on_ctrl_c(tiny_weights):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = launch("animations/playground.py", "--weights", tiny_weights, "--no-browser",
                         "--port", port)
        address = process.stdout.readline()
        assert re.match(r"http://127\.0\.0\.1:\d+/ ", address) and f":{port}/" not in address
        client = socket.create_connection(("127.0.0.1", int(re.search(r":(\d+)/", address)[1])))
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert process.wait(30) == 130 and time.monotonic() - started < 5
    assert not process.stderr.read()
    client.close()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def page(tiny_weights, tmp_path_factory):
    """A recorded page, and its steps."""
    recorder, _ = recorded(random_model(), BLANK, rule=partial(dilated, turns=8))
    trace = recorder.trace | {"title": "</script> & <b>title</b>"}
    path = tmp_path_factory.mktemp("page") / "x.html"
    path.write_text(drawing.page(tiny_weights, **trace), "utf-8")
    return path.as_uri(), recorder.steps


def dom(address, tmp_path):
    """The page's elements once its script has run."""
    words = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}", "--virtual-time-budget=2000"]
    dumped = subprocess.run([*words, "--dump-dom", address], capture_output=True, timeout=60)
    return dumped.stdout.decode().split("<main>")[1].split("<script>")[0]


@in_browser
def test_a_recorded_page_opens_at_a_step_and_a_character(page, tmp_path):
    address, steps = page
    *_, text = replayed(steps[:4])
    gaps = [place for place, id in enumerate(text) if id == 0]
    found = dom(f"{address}#step=3&at={gaps[7]}", tmp_path)
    spans = re.findall(r'<span role="button" class="([^"]*)"[^>]*>(.*?)</span>', found)
    assert [place for place, (names, _) in enumerate(spans) if "masked" in names] == gaps
    assert "step 3 of 24 · draft · 20 masked" in found and "&lt;b&gt;title" in found
    guesses = steps[3]["guess"][35:40]
    shown = [visible(guess) for guess in guesses]
    rows = re.findall(r"<b>(.*?)</b><i[^>]*></i>(\d+)%", found)
    assert rows == list(zip(shown, map(str, steps[3]["p"][35:40]), strict=True))
    assert spans[gaps[7]][1] == shown[0]


def visible(byte):
    """How the page shows one byte, as HTML."""
    named = {" ": "␣", "\n": "↵"}
    return named.get(byte) or (html.escape(byte) if "!" <= byte <= "~" else "·")


@in_browser
def test_the_order_view_marks_filled_and_corrected_characters(page, tmp_path):
    address, steps = page
    found = dom(f"{address}#step=24&view=order", tmp_path)
    texts = list(replayed(steps))
    spans = re.findall(r'<span role="button" class="([^"]*)"', found)
    assert all("came" in names for names in spans) and len(spans) == 32
    assert [("changed" in names) for names in spans] == [a != b for a, b in
                                                        zip(texts[8], texts[-1], strict=True)]


@pytest.fixture
def browser(server, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver") or pytest.skip("no chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path}/profile"]:
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    with webdriver.Chrome(options, service) as browser:
        browser.get(f"http://127.0.0.1:{server.server_port}/")
        yield browser
        faults = browser.get_log("browser")  # "network": a request that the server refused
        assert {fault["source"] for fault in faults} <= {"network"}


def press(browser, name):
    browser.find_element("xpath", f"//button[.='{name}']").click()


def until(condition):
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@in_browser
def test_the_live_page_masks_a_character_places_a_guess_fills_and_saves(browser, tmp_path):
    find = partial(browser.find_elements, "css selector")

    def text():
        return find("#text")[0].get_property("value")

    until(lambda: text() == "To be, or ___ to be")
    find(".text > span")[1].click()
    until(lambda: text() == "T_ be, or ___ to be")
    best = until(lambda: find("#card button"))[1]
    letter = best.text.splitlines()[0].replace("␣", " ").replace("↵", "\n")
    best.click()
    until(lambda: text() == f"T{letter} be, or ___ to be" or "·" in letter)
    find("#sweeps")[0].clear()
    find("#sweeps")[0].send_keys("0")
    press(browser, "Fill")
    until(lambda: "0 masked" in find("#label")[0].text)
    filled = text()
    press(browser, "Save page")
    saved = until(lambda: list(tmp_path.glob("denoising.html")))[0]
    *_, written = replayed(island(saved.read_text("utf-8"))["runs"][0]["steps"])
    assert bytes(written).decode().replace("\r", "\n") == filled
    browser.get(f"{saved.as_uri()}#step=1")
    until(lambda: "4 masked" in find("#label")[0].text)


@in_browser
def test_the_live_page_shows_a_fault_compares_gap_lengths_and_races(browser):
    find = partial(browser.find_element, "css selector")
    until(lambda: find("#label").text)
    find("#text").clear()
    find("#text").send_keys("_" * 33)
    until(lambda: "33 characters" in find("#fault").text)
    find("#text").clear()
    find("#text").send_keys("To be ____")
    until(lambda: "4 masked" in find("#label").text)
    press(browser, "Compare lengths")
    until(lambda: len(browser.find_elements("css selector", "#lengths button")) == 8)
    press(browser, "Longer gap")
    until(lambda: "5 masked" in find("#label").text)
    press(browser, "Race against left to right")
    until(lambda: "left to right: 5 calls" in find("#texts").text)
