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
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from urllib.parse import quote

import pytest
import torch
from conftest import (
    ROOT, TINY, assert_one_clear_line, island, last, launch, no_space, random_model,
)
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
    recorder = drawing.Recorder(0)
    return recorder, list(recorder.watch(model, x, sampled(model, x, **config)))


@pytest.mark.parametrize("config", [{}, {"stride": 1}, {"rule": left_to_right, "sweeps": 0}])
def test_the_recorder_keeps_every_state_and_does_not_change_the_text(config):
    model = random_model()
    recorder, states = recorded(model, BLANK, **config)
    assert all(map(torch.equal, states, sampled(model, BLANK, **config)))
    texts = drawing.replay(recorder.steps)
    for state in [BLANK, *states]:
        assert state[0].tolist() in texts  # in this order
    assert recorder.text == states[-1][0].tolist() and not model._forward_hooks


def test_steps_name_their_phase_and_guess_what_is_likeliest_at_the_masked_places():
    model, calls = random_model(), []
    with model.register_forward_hook(lambda model, inputs, log_p: calls.append((*inputs, log_p))):
        recorder, _ = recorded(model, BLANK, rule=partial(dilated, turns=8), sweeps=1)
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


def test_two_recorders_listen_to_one_model_in_turn_and_confuse_nothing():
    model, ways = random_model(), [{}, {"rule": left_to_right, "sweeps": 0}]
    alone = [recorded(model, BLANK, **way)[0] for way in ways]
    both = [drawing.Recorder(0), drawing.Recorder(0)]
    for _ in zip_longest(*(recorder.watch(model, BLANK, sampled(model, BLANK, **way))
                           for recorder, way in zip(both, ways, strict=True))):
        pass
    for a, b in zip(alone, both, strict=True):
        assert [step | {"ms": 0} for step in a.steps] == [step | {"ms": 0} for step in b.steps]


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


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ink, paper", [
    ("ink", "paper"), ("ink", "panel"), ("soft", "paper"), ("fresh", "glow"), ("fault", "paper"),
    ("guess", "low"), ("guess", "high"), ("paper", "accent"),
])
def test_text_contrasts_with_its_background_in_both_themes(theme, ink, paper):
    palette = dict(re.findall(r"--(\w+): light-dark\((#\w+, #\w+)\)", PAGE))
    a, b = (luminance(palette[name].split(", ")[theme]) + 0.05 for name in (ink, paper))
    assert max(a, b) / min(a, b) >= 4.5


@pytest.mark.parametrize("name, arguments, lengths", [
    ("diffusion-process", [], [2 + 28]), ("diffusion-process", ["--num-blocks", 2], [2 + 2 * 28]),
    ("race", [], [32, 32]), ("race", ["--prompt", "x" * 32], [32, 32]),
    ("game-of-life", ["--generations", 2], [20 * 64]),
    ("game-of-life", ["--density", 0, "--generations", 1], [20 * 64]),
])
def test_scripts_save_pages_whole_or_not_at_all(
    name, arguments, lengths, tiny_weights, tmp_path, command, monkeypatch
):
    """Where there is nothing to fill, the page shows the text."""
    save = tmp_path / "x.html"
    main = partial(command, importlib.import_module(name).main, "--weights", tiny_weights)
    assert main("--save", save, *arguments).returncode == 0
    trace = island(old := save.read_text("utf-8"))
    texts = [last(drawing.replay(run["steps"])) for run in trace["runs"]]
    assert [len(text) for text in texts] == lengths and not any(0 in text for text in texts)
    monkeypatch.setattr("model.os.fsync", no_space)
    assert_one_clear_line(main("--save", save, *arguments), "No space left")
    assert save.read_text("utf-8") == old and list(tmp_path.iterdir()) == [save]


def test_loss_curve_refuses_a_page(command):
    curve = importlib.import_module("loss-curve")
    assert_one_clear_line(command(curve.main, "--save", "x.html"), "x.html", ".png")


LONG = replace(TINY, sequence_len=64)


@pytest.fixture(scope="module")
def server(tiny_weights):
    args = Namespace(seed=1, weights=tiny_weights)
    with playground.Server(0, random_model(LONG), args) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def answered(server, method, path, body=None, **headers):
    """The answer's status, headers and text."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


def post(server, body, **headers):
    """Posts to /run. Returns the status and the lines of the answer."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content_Type": "application/json", **headers}
    status, _, text = answered(server, "POST", "/run", body, **headers)
    return status, text.splitlines()


def request(text="To be, or ___ to be", what="fill", **settings):
    gaps = [i for i, character in enumerate(text) if character == "_"]
    return {"what": what, "text": text, "gaps": gaps, "settings": settings}


def test_server_fills_the_gaps_and_nothing_else(server):
    status, lines = post(server, request(method="left-to-right", k=2, seed=5))
    *steps, done = map(json.loads, lines)
    assert status == 200 and done == {"done": True}
    text = last(drawing.replay(steps))
    assert 0 not in text and re.fullmatch(r"To be, or .{3} to be", bytes(text).decode(), re.DOTALL)
    assert [step["phase"] for step in steps] == ["given", "draft", "draft"]


def test_a_look_makes_one_network_call_and_writes_nothing(server):
    _, lines = post(server, request(what="look"))
    step, _ = map(json.loads, lines)
    assert len(step["p"]) == 15 and step["to"].count("\0") == 3


def test_samples_are_rows_of_one_batch(server):
    _, lines = post(server, request(sweeps=0) | {"samples": 4})
    *steps, _ = map(json.loads, lines)
    text = torch.tensor(last(drawing.replay(steps))).view(4, 19)
    assert len(steps) == 4 and (text != 0).all() and len(set(map(str, text.tolist()))) > 1


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
    (request() | {"samples": 9}, "1 to 8"), (request() | {"samples": True}, "1 to 8"),
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
    _, headers, text = answered(server, "GET", "/")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    live = island(text)["live"]
    assert live["methods"]["left-to-right"] == {"flag": "k", "value": 1, "sweeps": 0}
    assert answered(server, "HEAD", "/")[::2] == (200, "")
    assert answered(server, "GET", "/favicon.ico")[0] == 404


def ask_and_leave(server, **settings):
    """Sends a request and closes the connection a moment after the answer has begun."""
    body = json.dumps(request(**settings)).encode()
    head = b"POST /run HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(server.server_address) as client:
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert client.recv(100)
        time.sleep(0.2)


@pytest.mark.parametrize("name", ["sweeps", "stride"])
def test_a_client_that_goes_away_frees_the_model(server, name):
    ask_and_leave(server, **{name: 10**9})
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
        client = socket.create_connection(("127.0.0.1", int(re.search(r":(\d+)/", address)[1])))
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert process.wait(30) == 130 and time.monotonic() - started < 5
    assert not process.stderr.read()
    client.close()




# In a browser. Every test has a fresh page of one Chromium and one server -------------------------

TO_BE = "To be, or ___ to be"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver") or pytest.skip("no chromedriver")
    options, folder = webdriver.ChromeOptions(), tmp_path_factory.mktemp("chromium")
    options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 f"user-data-dir={folder}/profile"):
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

    def size(self, width, height, calm=False, scheme="light"):
        cdp = self.chromium.execute_cdp_cmd
        cdp("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": False})
        cdp("Emulation.setEmulatedMedia", {"features": [
            {"name": "prefers-reduced-motion", "value": "reduce" if calm else "no-preference"},
            {"name": "prefers-color-scheme", "value": scheme}]})

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

    def rectangle(self, selector):
        return self.js("return arguments[0].getBoundingClientRect().toJSON()", self.find(selector))

    def idle(self):
        until(lambda: self.js("return !state.asked && !state.timer && state.runs.length > 0"))

    def press(self, name):
        self.chromium.find_element("xpath", f"//button[.='{name}']").click()

    def keys(self, *keys):
        webdriver = pytest.importorskip("selenium.webdriver")
        webdriver.ActionChains(self.chromium).send_keys(*keys).perform()

    def click(self, place, key=None):
        actions, span = self.actions(), self.all(".text > span")[place]
        (actions.key_down(key).click(span).key_up(key) if key else actions.click(span)).perform()

    def actions(self):
        return pytest.importorskip("selenium.webdriver").ActionChains(self.chromium, duration=20)

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
    recorder, _ = recorded(random_model(), BLANK, rule=partial(dilated, turns=8), sweeps=1)
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


def test_a_step_that_is_no_call_has_no_number_and_one_call_is_no_plural(page, recording):
    page.open(recording[0], step=9)
    assert page.find("#label").text == "masks again · 8 masked"
    page.open(text="a_", seed=1).idle()
    page.js("state.runs = [newRun([65, 0], 'x', 1), newRun([65, 0], 'y', 1)];"
            "state.runs[0].steps.push({phase: 'draft', ms: 1, set: [], to: ''}); go(Infinity)")
    assert "1 call\n" in page.find("#texts").text + "\n" and "1 calls" not in page.find("main").text


def drag(page, start, end, key=None):
    spans = page.all(".text > span")
    actions = page.actions()
    if key:
        actions.key_down(key)
    actions.move_to_element(spans[start]).click_and_hold().move_to_element(spans[end]).release()
    if key:
        actions.key_up(key)
    actions.perform()


def test_dragging_masks_characters_and_with_shift_selects_them_for_copying(page):
    from selenium.webdriver.common.keys import Keys

    page.open(text=TO_BE).idle()
    drag(page, 4, 6)
    until(lambda: page.text() == "To b___or ___ to be")
    drag(page, 6, 1)
    until(lambda: page.text() == "T______or ___ to be")
    page.idle()
    drag(page, 8, 15, Keys.SHIFT)
    assert page.text() == "T______or ___ to be"
    page.actions().key_down(Keys.CONTROL).send_keys("c").key_up(Keys.CONTROL).perform()
    copied = page.chromium.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert copied and copied in "T______or ___ to be" and " ___ " in copied


def test_a_click_masks_a_word_with_alt_a_letter_and_ctrl_z_brings_it_back(page):
    from selenium.webdriver.common.keys import Keys

    page.open(text="Come, let us go_").idle()
    page.click(7)
    until(lambda: page.text() == "Come, ___ us go_")
    page.click(2, Keys.ALT)
    until(lambda: page.text() == "Co_e, ___ us go_")
    page.idle()
    for expected in ("Come, ___ us go_", "Come, let us go_"):
        page.actions().key_down(Keys.CONTROL).send_keys("z").key_up(Keys.CONTROL).perform()
        assert page.text() == expected


def test_the_text_is_edited_in_place_by_the_keyboard_alone(page):
    from selenium.webdriver.common.keys import Keys

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
    letter, best = best.text.split()[0], best.click()
    until(lambda: "_" not in page.text()[10])
    assert visible(page.text()[10]) == letter
    assert page.js("return [...document.activeElement.parentNode.children]"
                   ".indexOf(document.activeElement)") == 11  # the next gap
    page.idle()
    assert not [row for row in page.all(".candidate") if row.text.endswith(" 0%")]


def test_a_written_letter_tells_on_demand_what_else_it_might_be(page):
    from selenium.webdriver.common.keys import Keys

    page.open(text=TO_BE).idle()
    page.click(3, Keys.SHIFT)
    until(lambda: page.all("button.candidate"))
    assert page.text() == TO_BE


def test_a_gap_becomes_longer_and_shorter_but_never_vanishes(page):
    page.open(text="To be __", at=7).idle()
    page.press("Longer")
    until(lambda: page.text() == "To be ___")
    for _ in range(4):
        page.idle()
        page.press("Shorter")
    assert page.text() == "To be _"
    assert page.js("return document.activeElement.textContent") == "Shorter"


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
    page.type("a___")
    until(lambda: page.find("#act").is_enabled() and page.text() == "a___")


def test_a_whole_chapter_pasted_into_the_box_is_refused_as_too_long(page):
    page.open(text=TO_BE).idle()
    page.js("const box = document.getElementById('box'); box.closest('details').open = true;"
            "box.focus(); box.value = 'x'.repeat(1115394); box.oninput()")
    assert "1115394 characters; the model takes 1 to 64" in page.find("#fault").text
    assert page.text() == TO_BE and page.find("#box").get_property("value").startswith("xxx")


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
    page.js("window.seen = []; const label = document.getElementById('label');"
            "new MutationObserver(() => seen.push([performance.now(), state.tick]))"
            ".observe(label, {childList: true})")
    page.press("Write it")
    until(lambda: page.js("return !state.asked"))  # all steps have come
    first = page.js("return state.tick")
    assert len(page.steps()[0]) > first + 5  # they wait to be shown
    until(lambda: page.js("return state.tick") > first + 2)
    seen = dict(reversed([(tick, at) for at, tick in page.js("return seen")]))
    waits = [seen[n + 1] - seen[n] for n in range(1, max(seen)) if n in seen and n + 1 in seen]
    assert waits and min(waits) >= 100
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
    link = page.chromium.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    page.open(link.split("#")[0])
    page.chromium.get("about:blank")
    page.chromium.get(link)
    page.idle()
    assert page.text() == "To be, or ___ to __"
    settings = page.js("return settings()")
    assert (settings["seed"], settings["turns"], settings["sweeps"]) == ("7", "3", "1")
    assert page.js("return state.view") == "order"


def test_another_window_is_told_that_the_model_is_busy(page, server, monkeypatch):
    monkeypatch.setattr(playground, "PATIENCE", 0.1)
    page.open(text=TO_BE).idle()
    with server.lock:
        page.click(3)
        until(lambda: "busy with another window" in page.find("#fault").text)
    assert page.text() == TO_BE


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
    page.js("window.calls = 0; const old = timesOf; timesOf = run => (calls++, old(run))")
    page.press("The race")
    until(lambda: page.js("return state.timer && !state.asked"))
    assert page.js("return !document.getElementById('results').children.length")
    page.js("calls = 0; render()")
    assert page.js("return calls") <= 8  # it grew with the number of steps squared
    page.js("go(Infinity)")
    result = page.find("#results").text
    draft, correct = (sum(step["phase"] == phase for step in page.steps()[1])
                      for phase in ("draft", "correct"))
    assert f"{draft + correct} calls against 62. Same weights." in result
    assert f"{draft} to write, {correct} to correct" in result and result.count("seconds") == 2
    assert page.js("return speech().filter(id => id === mask).length") >= 40


def test_two_texts_keep_in_step_by_milliseconds_as_long_as_they_took(page):
    page.open(text=TO_BE).idle()
    page.js("const step = {phase: 'draft', ms: 20, set: [], to: ''};"
            "state.runs = [newRun([0, 0], 'a'), newRun([0, 0], 'b')];"
            "for (const run of state.runs) run.steps.push(...Array(40).fill(step));"
            "state.by = 'ms'; window.begun = performance.now(); play(0)")
    until(lambda: page.js("return !state.timer && (window.took ||= performance.now() - begun)"))
    assert 750 <= page.js("return took") <= 1100  # 40 times 20 ms


def test_two_letters_clash_in_five_texts_side_by_side(page):
    page.open(text=TO_BE).idle()
    page.press("Why two letters clash")
    page.idle()
    assert page.js("return shown.map(seen => [seen.calls, seen.cells.length])") == [
        [1, 5 * 28], [2, 5 * 28]]
    page.click(0)  # a word of the first of the five
    until(lambda: page.text().startswith("____, let us go "))
    assert len(page.text()) == 28


def test_the_page_opens_in_the_middle_of_the_action_or_calmly_at_its_end(page):
    page.open()
    until(lambda: page.js("return state.timer && shown[0]?.calls"))
    assert page.text().startswith("\n\n") and page.js("return state.pace") == 250
    page.size(1280, 800, calm=True)
    page.open().idle()
    assert page.find("#said").text == "It wrote everywhere at once. Now click any word."
    assert page.find("#label").text.startswith("call ") and " 0 masked" in page.find("#label").text


@pytest.mark.parametrize("width, height", [(1280, 800), (360, 740)])
def test_text_button_slider_and_keys_stand_above_the_fold(page, width, height):
    page.size(width, height)
    page.open(text="\n\nROMEO:\n" + "_" * 54).idle()
    for part in (".text > span", ".text > span:last-child", "#act", "#slider", "#lead"):
        place = page.rectangle(part)
        assert 0 <= place["top"] and place["bottom"] <= height and place["right"] <= width, part
    assert page.js("return document.documentElement.scrollWidth") <= width
    cell = page.rectangle(".text > .masked")
    assert cell["width"] >= 12 and cell["height"] >= 24  # pixels for a finger


def test_the_steps_of_the_game_of_life_are_no_draft(page, tiny_weights, tmp_path, command):
    life, save = importlib.import_module("game-of-life"), tmp_path / "x.html"
    assert command(life.main, "--weights", tiny_weights, "--generations", 2, "--save", save,
                   "--calls", 2).returncode == 0
    page.open(save.as_uri(), step=1)
    assert page.find("#label").text.startswith("generation 1 · call 1 of 2 · writes · ")
    assert "draft" not in page.find("main").text and page.all(".text.grid")
