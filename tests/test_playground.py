"""The recorder, the page, the server behind the live page, and both pages in a browser."""

import http.client
import importlib
import json
import re
import shutil
import signal
import socket
import threading
import time
from argparse import Namespace
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from urllib.parse import quote

import pytest
import torch
from conftest import ROOT, TINY, island, last, launch, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import drawing
from sample import SamplerConfig, dilated, draft_and_correct, left_to_right

with suppress(ImportError):  # else the tests in a browser are skipped
    from selenium.webdriver import ActionChains, Keys

playground = importlib.import_module("playground")
PAGE = (ROOT / "animations" / "page.html").read_text("utf-8")
BLANK = torch.zeros(1, 32, dtype=torch.long)


def sampled(model, **config):
    generator = torch.Generator().manual_seed(3)
    config = SamplerConfig(**{"stride": 4} | config)
    return draft_and_correct(model, BLANK, BLANK == 0, config, generator)


def recorded(model, **config):
    recorder = drawing.Recorder(0)
    return recorder, list(recorder.watch(model, BLANK, sampled(model, **config)))


@pytest.mark.parametrize("config", [{}, {"stride": 1}, {"rule": left_to_right, "sweeps": 0}])
def test_a_recorder_keeps_every_state_changes_no_text_and_hears_the_calls_of_no_other(config):
    model = random_model()
    recorder, states = recorded(model, **config)
    assert all(map(torch.equal, states, sampled(model, **config)))
    texts = drawing.replay(recorder.steps)
    for state in [BLANK, *states]:
        assert state[0].tolist() in texts  # in this order
    assert recorder.text == states[-1][0].tolist() and not model._forward_hooks
    one, other = drawing.Recorder(0), drawing.Recorder(0)
    for _ in zip_longest(one.watch(model, BLANK, sampled(model, **config)),
                         other.watch(model, BLANK, sampled(model, stride=2))):
        pass
    for step, same in zip(recorder.steps, one.steps, strict=True):
        assert step | {"ms": 0} == same | {"ms": 0}


def test_steps_name_their_phase_and_guess_what_is_likeliest_at_the_masked_places():
    model, calls = random_model(), []
    with model.register_forward_hook(lambda model, inputs, log_p: calls.append((*inputs, log_p))):
        recorder, _ = recorded(model, rule=partial(dilated, turns=8), sweeps=1)
    phases = [step["phase"] for step in recorder.steps]
    assert phases == ["given", *["draft"] * 8, *["mask", "correct"] * 4]
    assert [len(step.get("nats", [])) for step in recorder.steps] == [0, *[4] * 8, *[0, 8] * 4]
    looks = [step for step in recorder.steps if "p" in step]
    assert len(looks) == len(calls) == 8 + 4
    for step, (x_t, _, log_p) in zip(looks, calls, strict=True):
        p = log_p[x_t == 0].exp()
        best = torch.tensor(list(step["guess"].encode("latin-1"))).view(-1, 5)
        assert len(best) == (x_t == 0).sum() and (best != 0).all()
        assert torch.equal(best[:, 0], p.argmax(-1))
        assert (torch.tensor(step["p"]).view(-1, 5) - 100 * p.gather(1, best)).abs().max() <= 0.51


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(min_size=6, max_size=6), min_size=1), st.text())
def test_states_of_any_bytes_can_be_read_back_from_the_page(tiny_weights, states, name):
    recorder = drawing.Recorder(0, name + "</script>\u2028<!--")
    for state in states:
        recorder.add(torch.tensor(list(state)), "given")
    run, = island(drawing.page(tiny_weights, [recorder]))["runs"]
    assert run == {"name": recorder.name, "steps": recorder.steps}
    assert list(drawing.replay(run["steps"])) == [list(state) for state in states]


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


@pytest.mark.parametrize("ink, paper", [
    ("ink", "paper"), ("ink", "panel"), ("soft", "paper"), ("fresh", "glow"), ("fault", "paper"),
    ("guess", "low"), ("guess", "high"), ("paper", "accent"),
])
def test_text_contrasts_with_its_background_in_both_themes(ink, paper):
    palette = dict(re.findall(r"--(\w+): light-dark\((#\w+, #\w+)\)", PAGE))
    for colours in zip(palette[ink].split(", "), palette[paper].split(", "), strict=True):
        a, b = (luminance(colour) + 0.05 for colour in colours)
        assert max(a, b) / min(a, b) >= 4.5


@pytest.mark.parametrize("name, arguments, lengths", [
    ("diffusion-process", [], [2 + 28]), ("diffusion-process", ["--num-blocks", 2], [2 + 2 * 28]),
    ("race", [], [32, 32]), ("race", ["--prompt", "x" * 32], [32, 32]),
    ("game-of-life", ["--generations", 2], [20 * 64]),
    ("game-of-life", ["--density", 0, "--generations", 1], [20 * 64]),
])
def test_the_page_of_a_script_ends_with_its_whole_texts(
    name, arguments, lengths, tiny_weights, tmp_path, command
):
    """Where there is nothing to fill, the page shows the text."""
    save, script = tmp_path / "x.html", importlib.import_module(name)
    command(script.main, "--weights", tiny_weights, "--save", save, *arguments)
    runs = island(save.read_text("utf-8"))["runs"]
    texts = [last(drawing.replay(run["steps"])) for run in runs]
    assert [len(text) for text in texts] == lengths and not any(0 in text for text in texts)


LONG = replace(TINY, sequence_len=64)


@pytest.fixture(scope="module")
def server(tiny_weights):
    args = Namespace(seed=1, weights=tiny_weights)
    with playground.Server(0, random_model(LONG), args) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def answered(server, method, path, body=None, **headers):
    """The answer, whose text is still to be read."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, headers)
    return connection.getresponse()


def post(server, body, **headers):
    """Posts to /run. Returns the status and the lines of the answer."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content_Type": "application/json", **headers}
    answer = answered(server, "POST", "/run", body, **headers)
    return answer.status, answer.read().decode().splitlines()


def request(text="To be, or ___ to be", what="fill", samples=1, **settings):
    gaps = [i for i, character in enumerate(text) if character == "_"]
    return {"what": what, "text": text, "gaps": gaps, "samples": samples, "settings": settings}


def steps_of(server, **parts):
    """What the server answers to this request."""
    status, lines = post(server, request(**parts))
    *steps, done = map(json.loads, lines)
    assert status == 200 and done == {"done": True}
    return steps


def test_server_fills_the_gaps_and_nothing_else(server):
    steps = steps_of(server, method="left-to-right", k=2, seed=5)
    text = bytes(last(drawing.replay(steps))).decode()
    assert re.fullmatch(r"To be, or [^\0]{3} to be", text)
    assert [step["phase"] for step in steps] == ["given", "draft", "draft"]


def test_a_look_makes_one_network_call_and_writes_nothing(server):
    step, = steps_of(server, what="look")
    assert len(step["p"]) == 15 and step["to"].count("\0") == 3


def test_samples_are_rows_of_one_batch(server):
    steps = steps_of(server, samples=4, sweeps=0)
    text = torch.tensor(last(drawing.replay(steps))).view(4, 19)
    assert len(steps) == 4 and (text != 0).all() and len(text.unique(dim=0)) > 1


@pytest.mark.parametrize("body, words", [
    (request(temperature="hot"), "hot"), (request(k=3), "--k belongs to another"),
    (request(method="dream"), "dream"), (request(help=""), "help"), (request(weights=1), "weights"),
    (request(text="_" * 65), "65 characters"), (request(text=""), "0 characters"),
    (request(text="caf\xc3\xa9 _"), "plain English letters only: é cannot be used"),
    (request(text="no gap"), "no gap"), (request(text="☃_"), "UTF-8"),
    (request() | {"text": 7}, "text is missing"), (request() | {"settings": []}, "settings"),
    (request() | {"gaps": "all"}, "whole numbers from 0 to 18"),
    *[(request() | {"gaps": [gap]}, "whole numbers from 0 to 18")
      for gap in (99, 19, -1, 0.5, True, None, float("nan"), float("inf"))],
    (request(samples=9), "1 to 8"), (request(samples=True), "1 to 8"),
    (request(what="dance"), "dance"), (request() | {"more": 1}, "object of"),
    ({}, "what"), ([], "object"), (None, "object"),
    (b"{", "JSON"), (b"\xff", "JSON"), (b"[" * 60000, "JSON"),
])
def test_a_bad_request_is_refused_in_one_line(server, body, words):
    status, lines = post(server, body)
    assert status == 400 and len(lines) == 1
    error = json.loads(lines[0])["error"]
    assert words in error and "\n" not in error
    assert not re.search(r"list indices|NoneType|not iterable|KeyError|'int'", error)


def test_server_answers_its_own_page_only(server):
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1:1@evil.example", ""):
        assert post(server, request(), Host=host)[0] == 403
    assert post(server, request(), Host="localhost:80", Origin="http://evil.example")[0] == 403
    for host in ("localhost:80", "[::1]", "127.0.0.1"):
        assert post(server, request(), Host=host, Origin=f"http://{host}")[0] == 200
    assert post(server, request(), Content_Type="text/plain")[0] == 415
    assert post(server, b" " * (64 * 1024 + 1))[0] == 413
    assert server.server_address[0] == "127.0.0.1"


def test_the_server_sends_its_page_with_headers_that_keep_it_to_itself(server):
    answer = answered(server, "GET", "/")
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"
    live = island(answer.read().decode())["live"]
    assert live["methods"]["left-to-right"] == {"flag": "k", "value": 1, "sweeps": 0}
    assert answered(server, "GET", "/favicon.ico").status == 404


@pytest.mark.parametrize("name", ["sweeps", "stride"])
def test_a_client_that_goes_away_frees_the_model(server, name):
    body = json.dumps(request(**{name: 10**9}))
    answer = answered(server, "POST", "/run", body, Content_Type="application/json")
    answer.read(1)
    time.sleep(0.2)
    answer.close()
    assert post(server, request())[0] == 200
    assert not server.model._forward_hooks


def test_another_window_hears_that_the_model_is_busy(server, monkeypatch):
    monkeypatch.setattr(playground, "PATIENCE", 0.1)
    with server.lock:
        status, lines = post(server, request())
    assert status == 503 and "busy with another window" in lines[0]


def test_a_call_that_memory_cannot_hold_is_answered_in_one_line(server, monkeypatch, capsys):
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 TiB.\nMore.")

    monkeypatch.setattr(server.model, "forward", forward)
    for what in ("look", "fill"):
        status, lines = post(server, request(what=what))
        assert "out of memory" in json.loads(lines[-1])["error"] and "More" not in lines[-1]
    assert not capsys.readouterr().err


def test_the_playground_passes_over_a_taken_port_and_ends_at_once_on_ctrl_c(tiny_weights):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = launch("animations/playground.py", "--weights", tiny_weights, "--no-browser",
                         "--port", port)
        address = process.stdout.readline()
        assert re.match(r"http://127\.0\.0\.1:\d+/ ", address) and f":{port}/" not in address
        port = int(re.search(r":(\d+)/", address)[1])
        client = socket.create_connection(("127.0.0.1", port))
    another = http.client.HTTPConnection("127.0.0.1", port)  # once it is served, the first waits
    another.request("GET", "/")
    assert another.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert process.wait(30) == 130 and time.monotonic() - started < 5
    assert not process.stderr.read()
    client.close()
    another.close()


# In a browser. Every test has a fresh page of one Chromium and one server -------------------------

TO_BE = "To be, or ___ to be"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver") or pytest.skip("no chromedriver")
    options, folder = webdriver.ChromeOptions(), tmp_path_factory.mktemp("chromium")
    options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-component-update"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chromium:
        chromium.execute_cdp_cmd("Browser.grantPermissions", {
            "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
        chromium.folder = folder
        yield chromium


class Page:
    """What a person does with the page, and sees there."""

    def __init__(self, chromium, address):
        self.chromium, self.address = chromium, address
        self.find = partial(chromium.find_element, "css selector")
        self.all = partial(chromium.find_elements, "css selector")
        self.js = chromium.execute_script
        self.size(1280, 800)

    def size(self, width, height, motion="no-preference"):
        self.chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": False})
        self.chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {
            "features": [{"name": "prefers-reduced-motion", "value": motion}]})

    def open(self, address="", **parts):
        """The page with these parts of its address, by default of the live one's."""
        parts = "&".join(f"{name}={quote(str(part))}" for name, part in parts.items())
        self.chromium.get("about:blank")
        self.chromium.get(f"{address or self.address}#{parts}")
        return self

    def text(self):
        """The text that is shown; a gap is an underscore."""
        return self.js("return shown.length ? plain(idsShown(0)) : ''")

    def steps(self):
        return self.js("return state.runs.map(run => run.steps)")

    def clipboard(self):
        read = "navigator.clipboard.readText().then(arguments[0])"
        return self.chromium.execute_async_script(read)

    def idle(self):
        until(lambda: self.js("return !state.asked && !state.timer && state.runs.length > 0"))

    def milliseconds_until(self, condition, begin=""):
        """By the clock of the page, as a busy machine is slow to tell a test."""
        return self.chromium.execute_async_script(f"""
            const [done] = arguments, started = performance.now();
            {begin};
            (function wait() {{
                if ({condition}) done(performance.now() - started);
                else setTimeout(wait, 20);
            }})();
        """)

    def press(self, name):
        self.chromium.find_element("xpath", f"//button[.='{name}']").click()

    def actions(self):
        return ActionChains(self.chromium, duration=20)

    @contextmanager
    def holding(self, key):
        self.actions().key_down(key).perform()
        yield
        self.actions().key_up(key).perform()

    def keys(self, *keys):
        self.actions().send_keys(*keys).perform()

    def click(self, place):
        self.actions().click(self.all(".text > span")[place]).perform()

    def drag(self, start, end):
        spans = self.all(".text > span")
        self.actions().drag_and_drop(spans[start], spans[end]).perform()

    def type(self, text):
        """Into the box, in place of what stands there."""
        self.js("document.getElementById('own').open = true")
        self.find("#box").clear()
        self.find("#box").send_keys(text)


@pytest.fixture
def page(chromium, server):
    yield Page(chromium, f"http://127.0.0.1:{server.server_port}/")
    faults = chromium.get_log("browser")  # "network": a request that the server refused
    assert {fault["source"] for fault in faults} <= {"network"}, faults


def until(condition):
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def recording(tiny_weights, tmp_path_factory):
    """The address of a recorded page, and its steps."""
    recorder, _ = recorded(random_model(), rule=partial(dilated, turns=8), sweeps=1)
    path = tmp_path_factory.mktemp("page") / "x.html"
    look = {"mask": 0, "candidates": 5, "title": "</script> & <b>title</b>"}
    path.write_text(drawing.page(tiny_weights, [recorder], **look), "utf-8")
    return path.as_uri(), recorder.steps


def visible(byte):
    """How the page shows one byte."""
    return {" ": "␣", "\n": "↵"}.get(byte) or (byte if "!" <= byte <= "~" else "·")


def test_a_recorded_page_opens_at_a_step_and_a_character(page, recording):
    address, steps = recording
    *_, text = list(drawing.replay(steps))[:4]
    gaps = [place for place, id in enumerate(text) if id == 0]
    page.open(address, step=3, at=gaps[7])
    names = [span.get_attribute("class") for span in page.all(".text > span")]
    assert [place for place, name in enumerate(names) if "masked" in name] == gaps
    assert page.find("#label").text.startswith("call 3 of 12 · writes · 20 masked")
    assert page.chromium.title == "</script> & <b>title</b>"
    likely = [(visible(guess), f"{p}%") for guess, p in
              zip(steps[3]["guess"][35:40], steps[3]["p"][35:40], strict=True) if p]
    rows = [tuple(row.text.split()) for row in page.all(".candidate")]
    assert rows == likely and page.all(".text > span")[gaps[7]].text == likely[0][0]
    page.open(address, step=9)
    assert page.find("#label").text == "masks again · 8 masked"


def test_the_order_view_marks_filled_and_corrected_characters(page, recording):
    address, steps = recording
    page.open(address, step=16, view="order")
    texts = list(drawing.replay(steps))
    names = [span.get_attribute("class") for span in page.all(".text > span")]
    assert all("came" in name for name in names) and len(names) == 32
    assert [("changed" in name) for name in names] == [
        a != b for a, b in zip(texts[8], texts[-1], strict=True)]


def test_an_address_that_makes_no_sense_shows_the_text_all_the_same(page, recording):
    for at in ("x,y", "9999", "1,5"):
        page.open(recording[0], step="abc", at=at, view="toString")
        assert "NaN" not in page.find("main").text and len(page.all(".text > span")) == 32
        assert len(page.all(".text > span[tabindex]")) == 1


def test_dragging_masks_characters_and_with_shift_selects_them_for_copying(page):
    page.open(text=TO_BE).idle()
    page.drag(4, 6)
    until(lambda: page.text() == "To b___or ___ to be")
    page.drag(6, 1)
    until(lambda: page.text() == "T______or ___ to be")
    page.idle()
    with page.holding(Keys.SHIFT):
        page.drag(8, 15)
    assert page.text() == "T______or ___ to be"
    with page.holding(Keys.CONTROL):
        page.keys("c")
    copied = page.clipboard()
    assert copied in "T______or ___ to be" and " ___ " in copied


def test_a_click_masks_a_word_with_alt_a_letter_and_with_shift_asks_what_else_it_might_be(page):
    page.open(text="Come, let us go_").idle()
    with page.holding(Keys.SHIFT):
        page.click(3)
    until(lambda: page.all("button.candidate"))
    assert page.text() == "Come, let us go_"
    page.click(7)
    until(lambda: page.text() == "Come, ___ us go_")
    with page.holding(Keys.ALT):
        page.click(2)
    until(lambda: page.text() == "Co_e, ___ us go_")
    page.idle()
    for before in ("Come, ___ us go_", "Come, let us go_"):
        with page.holding(Keys.CONTROL):
            page.keys("z")  # brings it back
        assert page.text() == before


def test_the_text_is_edited_in_place_by_the_keyboard_alone(page):
    page.open(text=TO_BE).idle()
    until(lambda: page.keys(Keys.TAB) or page.js(
        "return document.activeElement.matches('.text > span')"))
    page.keys("Go", Keys.ARROW_RIGHT, Keys.DELETE)
    until(lambda: page.text() == "Go _e, or ___ to be")
    page.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ENTER)
    until(lambda: page.text() == "Go _e, __ ___ to be")


def test_a_chosen_candidate_is_placed_and_the_focus_stays_in_the_text(page):
    page.open(text=TO_BE).idle()
    page.click(10)
    best = until(lambda: page.all("button.candidate"))[0]
    letter = best.text.split()[0]
    best.click()
    until(lambda: visible(page.text()[10]) == letter)
    assert page.chromium.switch_to.active_element == page.all(".text > span")[11]  # the next gap
    page.idle()
    assert not [row for row in page.all(".candidate") if row.text.endswith(" 0%")]


def test_a_gap_becomes_longer_and_shorter_but_never_vanishes(page):
    page.open(text="To be __", at=7).idle()
    page.press("Longer")
    until(lambda: page.text() == "To be ___")
    for _ in range(4):
        page.idle()
        page.press("Shorter")
    assert page.text() == "To be _"
    assert page.chromium.switch_to.active_element.text == "Shorter"


def test_what_was_typed_and_refused_stays_in_the_box_and_cannot_be_filled(page):
    page.open(text=TO_BE).idle()
    for typed, fault in [("Café, or ___ to be", "plain English letters only: é cannot be used"),
                         ("_" * 65, "65 characters; the model takes 1 to 64")]:
        page.type(typed)
        until(lambda fault=fault: fault in page.find("#fault").text)
        assert not page.find("#act").is_enabled()
        page.find("#act").click()
        assert page.find("#box").get_property("value") == typed
        assert 0 < len(page.text()) < len(typed) and typed.startswith(page.text())  # accepted
    page.js("arguments[0].value = 'x'.repeat(10 ** 6); arguments[0].oninput()", page.find("#box"))
    assert "1000000 characters; the model takes 1 to 64" in page.find("#fault").text
    page.type("a___")
    until(lambda: page.find("#act").is_enabled() and page.text() == "a___")


def test_a_saved_page_after_a_refusal_holds_the_text_and_nothing_of_the_server(page):
    page.open(text=TO_BE).idle()
    page.press("Write it")
    page.idle()
    written = page.text()
    page.type("ü")
    until(lambda: page.find("#fault").text)
    page.press("Save page")
    saved = until(lambda: list(page.chromium.folder.glob("denoising.html")))[0]
    trace = island(saved.read_text("utf-8"))
    saved.unlink()
    assert bytes(last(drawing.replay(trace["runs"][0]["steps"]))).decode() == written
    assert trace["title"] == "A text by tiny-diffusion" and "port" not in trace["command"]
    assert "live" not in trace


def test_a_fill_is_shown_at_a_pace_for_eyes_and_leaves_the_slider_to_the_hand(page):
    page.open(text="_" * 64).idle()
    page.press("Write it")
    until(lambda: page.js("return !state.asked"))  # all steps have come, and wait to be shown
    took = page.milliseconds_until("state.tick >= first + 5", begin="window.first = state.tick")
    assert took >= 400  # four whole paces of 120
    page.js("const slider = document.getElementById('slider'); slider.value = 2; slider.oninput()")
    time.sleep(0.4)
    assert page.js("return state.tick") == 2


def test_a_link_restores_the_text_the_seed_and_the_settings(page):
    page.open(text=TO_BE, seed=7, turns=3, view="order").idle()
    page.js("document.querySelector('#sweeps').value = 1")
    page.click(17)
    until(lambda: page.text() == "To be, or ___ to __")
    page.idle()
    page.press("Copy link")
    until(lambda: "Link copied" in page.find("#said").text)
    link = page.clipboard()
    page.chromium.get("about:blank")
    page.chromium.get(link)
    page.idle()
    assert page.text() == "To be, or ___ to __"
    settings = page.js("return settings()")
    assert (settings["seed"], settings["turns"], settings["sweeps"]) == ("7", "3", "1")
    assert page.js("return state.view") == "order"


def test_lengths_are_compared_over_several_texts_and_the_best_is_marked(page):
    page.open(text="To be __", at=7).idle()
    page.press("Compare lengths")
    page.idle()
    rows = page.all("#lengths button")
    assert [row.text.split()[0] for row in rows] == list("123456")
    means = [float(row.text.split()[1].replace("−", "-")) for row in rows]
    marked = [float(row.text.split()[1]) for row in page.all("#lengths .best")]
    assert marked == [max(means)] and "likeliest" in page.find("#lengths .best").text


def test_the_race_ends_with_calls_and_seconds_and_tells_corrections_apart(page):
    page.open(text=TO_BE).idle()
    page.press("The race")
    until(lambda: page.js("return state.timer && !state.asked"))
    assert not page.find("#results").text
    page.js("go(Infinity)")
    result = page.find("#results").text
    draft, correct = (sum(step["phase"] == phase for step in page.steps()[1])
                      for phase in ("draft", "correct"))
    assert f"{draft + correct} calls against 62. Same weights." in result
    assert f"{draft} to write, {correct} to correct" in result and result.count("seconds") == 2


def test_two_texts_keep_in_step_by_milliseconds_as_long_as_they_took(page):
    page.open(text=TO_BE).idle()
    page.js("const step = {phase: 'draft', ms: 20, set: [], to: ''};"
            "state.runs = [newRun([0, 0], 'a'), newRun([0, 0], 'b')];"
            "for (const run of state.runs) run.steps.push(...Array(40).fill(step));"
            "state.by = 'ms'")
    assert 750 <= page.milliseconds_until("!state.timer", begin="play(0)") <= 1100  # 40 times 20


def test_two_letters_clash_in_five_texts_side_by_side(page):
    page.open(text=TO_BE).idle()
    page.press("Why two letters clash")
    page.idle()
    titles = [title.text for title in page.all("#texts h2")]
    assert titles == ["both at once: 1 call", "one by one: 2 calls"]
    assert len(page.all("#texts section:first-child .text > span")) == 5 * 28
    page.click(0)  # a word of the first of the five
    until(lambda: page.text().startswith("____, let us go "))
    assert len(page.text()) == 28


def test_the_page_opens_in_the_middle_of_the_action_or_calmly_at_its_end(page):
    page.open()
    until(lambda: page.js("return state.timer && shown[0]?.calls"))
    assert page.text().startswith("\n\n")
    page.size(1280, 800, motion="reduce")
    page.open().idle()
    assert page.find("#said").text == "It wrote everywhere at once. Now click any word."
    assert page.find("#label").text.startswith("call ") and " 0 masked" in page.find("#label").text


@pytest.mark.parametrize("width, height", [(1280, 800), (360, 740)])
def test_text_button_slider_and_keys_stand_above_the_fold(page, width, height):
    page.size(width, height)
    page.open(text="\n\nROMEO:\n" + "_" * 54).idle()
    for part in (".text > span", ".text > span:last-child", "#act", "#slider", "#lead"):
        place = page.find(part).rect
        assert 0 <= place["y"] <= height - place["height"], part
        assert place["x"] + place["width"] <= width, part
    assert page.js("return document.documentElement.scrollWidth") <= width
    cell = page.find(".text > .masked").rect
    assert cell["width"] >= 12 and cell["height"] >= 24  # pixels for a finger


def test_the_steps_of_the_game_of_life_are_no_draft(page, tiny_weights, tmp_path, command):
    life, save = importlib.import_module("game-of-life"), tmp_path / "x.html"
    command(life.main, "--weights", tiny_weights, "--generations", 2, "--calls", 2, "--save", save)
    page.open(save.as_uri(), step=1)
    assert page.find("#label").text.startswith("generation 1 · call 1 of 2 · writes · ")
    assert "draft" not in page.find("main").text and page.all(".text.grid")
