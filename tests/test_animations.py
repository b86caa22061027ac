import importlib
import itertools
import os
import re
import signal
import sys
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from conftest import (
    ROOT, TINY, Screen, assert_one_clear_line, island, last, no_space, random_model, script,
)
from PIL import Image, ImageChops, ImageSequence

import drawing
import sample
from model import save_weights
from sample import SamplerConfig, denoise, draft_and_correct, left_to_right

life = importlib.import_module("game-of-life")
process = importlib.import_module("diffusion-process")
race = importlib.import_module("race")
curve = importlib.import_module("loss-curve")


def seeded():
    return torch.Generator().manual_seed(0)


def test_life_follows_conways_rules_on_a_torus():
    alive = torch.rand(20, 30, generator=seeded()) < 0.4
    after = life.life_step(alive)
    steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    for row, col in itertools.product(range(20), range(30)):
        neighbours = sum(int(alive[(row + dy) % 20, (col + dx) % 30]) for dy, dx in steps)
        lives = neighbours in (2, 3) if alive[row, col] else neighbours == 3
        assert after[row, col] == lives


@pytest.mark.parametrize("sequence_len, lines", [(32, 40), (48, 32)])  # 48 doesn't divide 1280
def test_the_game_writes_its_field_and_then_rewrites_live_cells_and_no_others(sequence_len, lines):
    model = random_model(replace(TINY, sequence_len=sequence_len))
    args = Namespace(seed=0, temperature=1.0, density=0.2, generations=2, calls=4)
    texts = [ids for ids, _, _ in life.scenes(model, args, lambda: drawing.Recorder(0))]
    *field, full = texts[:-10]
    masked = [int((text == 0).sum()) for text in field]
    assert masked == list(range(1280 - lines, 0, -lines)) and (full != 0).all()
    first, second = texts[-10:-5], texts[-5:]
    for before, (begin, *states) in (full, first), (first[-1], second):
        alive = begin == 0
        assert alive.any() and (states[-1] != 0).all() and len(states) == 4
        assert all(torch.equal(state[~alive], before[~alive]) for state in states)
    assert torch.equal(second[0] == 0, life.life_step(first[0] == 0))


def some_frames():
    states = [0, 0, 0, 0], [72, 0, 0, 10], [72, 105, 7, 10]
    scenes = [(torch.tensor(ids).view(2, 2), "test", 1) for ids in states]
    return list(drawing.frames(scenes, mask_token_id=0))


def test_frames_mark_masked_and_fresh_characters_but_none_that_is_confirmed():
    first, second, third = some_frames()
    assert first.cells() == [[("█", drawing.BLOCK)] * 2] * 2
    assert second.fresh.tolist() == [[True, False], [False, True]]
    assert third.cells() == [[("H", drawing.CALM), ("i", drawing.FRESH)],
                             [("·", drawing.FRESH), ("↵", drawing.FAINT)]]
    scenes = [(torch.tensor([ids]), "", 1) for ids in ([72, 105], [0, 0], [72, 106])]
    *_, last = drawing.frames(scenes, mask_token_id=0)
    assert last.fresh.tolist() == [[False, True]]


def test_titles_number_the_network_calls_and_name_the_phase():
    args = sample.parse_arguments(["--turns", "9", "--sweeps", "1", "--stride", "4"])
    args.num_blocks, args.fps = 1, 10
    scenes = list(process.scenes(random_model(), args, lambda: drawing.Recorder(0)))
    titles = [tuple(re.split("  +", title)) for _, title, _ in scenes]
    calls = [f"call {n} of 13" for n in range(1, 14)]
    expected = [("", "all masked"), *((call, "draft") for call in calls[:9])]
    for call in calls[9:]:
        expected += [("", "masked again"), (call, "correction")]
    assert titles == expected and scenes[-1][2] == 10  # a second


@pytest.mark.parametrize("flags", [[], ["--block-len", "20", "--lookback", "4"]])
def test_a_block_is_what_sample_py_writes_with_the_same_seed_and_length(
    flags, tiny_weights, tmp_path, command
):
    flags = ["--weights", tiny_weights, "--num-blocks", 1, "--seed", 3, *flags]
    command(process.main, *flags, "--save", tmp_path / "x.html")
    run, = island((tmp_path / "x.html").read_text("utf-8"))["runs"]
    text = bytes(last(drawing.replay(run["steps"]))).decode()
    assert text + "\n" == "\n\n" + command(sample.main, *flags).stdout


def test_lines_end_at_line_ends_and_at_words_and_show_every_character_once():
    text = "\n\nROMEO:\nO, she doth teach the torches to burn bright!\n\n" + "x" * 30 + " so"
    lines = drawing.wrapped(list(text.encode()), 24)
    assert ["".join(text[place] for place in line) for line in lines] == [
        "ROMEO:\n", "O, she doth teach the ", "torches to burn bright!\n", "\n", "x" * 24,
        "xxxxxx so"]
    assert [place for line in lines for place in line] == list(range(2, len(text)))
    shown = drawing.laid_out(list(text.encode()), lines, 24)
    assert bytes(shown[2].tolist()) == b"torches to burn bright! "


def show_some_frames(weights):
    scenes = [(frame.ids, frame.title, 1) for frame in some_frames()]
    drawing.show(lambda *_: scenes, Namespace(weights=weights, device="cpu", save=None, fps=1000))


def test_terminal_hears_of_loading_redraws_in_place_and_gets_the_cursor_back(screen, tiny_weights):
    with screen.shown():
        show_some_frames(tiny_weights)
    assert screen.text().splitlines() == ["test", "Hi", "·↵"]
    text = screen.received.decode()
    assert text.count("\x1b[3F") == 2  # title and two rows, twice
    assert text.startswith("loading ...\r\x1b[?25l") and "\x1b[?25h" in text[-20:]


def test_no_color_dumb_terminals_and_pipes_are_honoured(monkeypatch, screen, capsys, tiny_weights):
    monkeypatch.setenv("NO_COLOR", "1")
    drawing.play(some_frames(), 1000, screen.out)
    screen.text()
    assert b"\x1b[38" not in screen.received and b"\x1b[3F" in screen.received
    show_some_frames(tiny_weights)  # into a pipe
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show_some_frames(tiny_weights)
    assert capsys.readouterr().out.splitlines() == ["test", "Hi", "·↵"] * 2


@pytest.mark.parametrize("rows, cols", [(24, 80), (10, 40), (3, 8)])
def test_frames_do_not_pile_up_on_a_small_terminal(rows, cols, monkeypatch):
    screen = Screen(rows, cols)
    size = os.terminal_size((cols, rows))
    monkeypatch.setattr(drawing.shutil, "get_terminal_size", lambda: size)
    ids = torch.full((20, 64), ord("x"))
    frame = drawing.Frame(ids, ids == 0, ids == 0, "t" * 70, hold=1)
    drawing.play([frame] * 3, 1000, screen.out)
    lines = screen.text().splitlines()
    assert len(lines) == min(21, rows - 1) and lines[0] == "t" * min(70, cols)
    assert set(lines[1:]) == {"x" * min(64, cols)}


def test_narrowing_the_terminal_leaves_no_wrapped_lines_of_the_last_frame(monkeypatch, screen):
    sizes = iter([os.terminal_size((80, 24)), os.terminal_size((30, 24))])
    monkeypatch.setattr(drawing.shutil, "get_terminal_size", lambda: next(sizes))
    ids = torch.full((2, 64), ord("x"))
    drawing.play([drawing.Frame(ids, ids == 0, ids == 0, "test", hold=1)] * 2, 1000, screen.out)
    screen.text()
    assert screen.received.count(b"\x1b[7F") == 1  # the title, and two rows of three lines each
    *_, last = screen.received.split(b"\n")[:-1]
    assert last.index(b"\x1b[K") < last.index(b"x" * 30)  # else the erasing takes the last column


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT"])
def test_a_stop_gives_the_cursor_back(name, screen):
    number = getattr(signal, name)
    signal.signal(number, signal.SIG_DFL)  # a shell's background job ignores some

    def frames():
        yield some_frames()[0]
        signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt):
        drawing.play(frames(), 1000, screen.out)
    screen.text()
    assert screen.received.decode().endswith(drawing.SHOWN)


def test_characters_of_several_bytes_are_shown_as_themselves():
    ids = torch.tensor(list("é☃\n".encode()) + [0xE2, 0x98, 7])
    assert drawing.glyphs(ids) == ["é", "·", "☃", "·", "·", "↵", "·", "·", "·"]


def test_each_runner_of_a_race_writes_as_the_sampler_with_a_call_a_frame_and_then_waits():
    model, x = random_model(), torch.tensor([[*b"To be", *[0] * 27]])
    args = Namespace(seed=0, temperature=1.0, parallel_temperature=1.0, prompt="To be", fps=10)
    scenes = race.scenes(model, args, lambda name: drawing.Recorder(0, name))
    frames = list(drawing.frames(scenes, mask_token_id=0))
    *_, left = denoise(model, x, left_to_right, 1.0, seeded())
    states = list(draft_and_correct(model, x, x == 0, SamplerConfig(temperature=1.0), seeded()))
    n = len(states)
    assert torch.equal(frames[-1].ids[:, :32], left)
    assert torch.equal(frames[-1].ids[:, 36:], states[-1])
    assert [int(frame.masked[:, :32].sum()) for frame in frames[:28]] == list(range(27, -1, -1))
    for frame, left, right in (frames[5], 5, 5), (frames[-1], 27, n):
        title = f"left to right: {left} calls", f"in parallel: {right} calls"
        assert tuple(re.split("  +", frame.title)) == title
    assert not frames[n].masked[:, 36:].any() and len(frames) == max(27, n) + 2
    for call, frame in enumerate(frames[:-1]):  # faster, once the right one waits
        assert frame.hold == (1 if call <= n else 1 / 4)


def test_pictures_colour_masked_and_fresh_characters():
    first, _, third = (drawing.picture(frame) for frame in some_frames())
    colours = [{colour for _, colour in picture.getcolors(100_000)} for picture in (first, third)]
    assert drawing.BLOCK in colours[0] and drawing.FRESH not in colours[0]
    assert drawing.BLOCK not in colours[1] and drawing.FRESH in colours[1]
    assert first.size == third.size


def test_gif_begins_with_the_last_frame_and_then_shows_every_one_for_its_time(tmp_path):
    frames = some_frames()
    frames[-1].hold = 10
    drawing.save(frames, tmp_path / "a.gif", fps=10)
    with Image.open(tmp_path / "a.gif") as gif:
        shown = [(image.info["duration"], image.convert("RGB").tobytes())
                 for image in ImageSequence.Iterator(gif)]
    assert [duration for duration, _ in shown] == [1000, 100, 100, 1000]
    assert shown[0] == shown[3]


def assert_pictures_agree(page, gif, still, again):
    """The GIF's first frame shows the page's text; the stills are those of the page's steps."""
    run, = island(page.read_text("utf-8"))["runs"]
    recorder = drawing.Recorder(0)
    recorder.steps, recorder.text = run["steps"], last(drawing.replay(run["steps"]))
    *_, frame = drawing.frames(process.pictures(run["steps"], 0, 0, 1), mask_token_id=0)
    with Image.open(gif) as image:
        difference = ImageChops.difference(drawing.picture(frame), image.convert("RGB"))
    assert max(most for _, most in difference.getextrema()) < 50  # the GIF has fewer colours
    for path, dark in (still, False), (still.with_stem(f"{still.stem}-dark"), True):
        drawing.still(recorder, again, dark)
        with Image.open(path) as made, Image.open(again) as remade:
            assert made.tobytes() == remade.tobytes()


def test_page_gif_and_stills_show_the_same_text_and_are_replaced_whole_or_not_at_all(
    tiny_weights, tmp_path, command, monkeypatch
):
    paths = [tmp_path / name for name in ("x.html", "x.gif", "x.png")]
    for path in paths:
        made = command(process.main, "--weights", tiny_weights, "--save", path)
        assert made.returncode == 0, made.stderr
    assert_pictures_agree(*paths, again=tmp_path / "again.png")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("model.os.fsync", no_space)
    for path in paths:
        failed = command(process.main, "--weights", tiny_weights, "--save", path, "--seed", 2)
        assert_one_clear_line(failed, "No space left")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_pictures_of_the_readme_show_the_text_of_the_page_beside_them(tmp_path):
    names = "denoising.html", "animation.gif", "order.png"
    paths = [ROOT / "animations" / name for name in names]
    assert_pictures_agree(*paths, again=tmp_path / "again.png")


def test_scripts_write_utf8_and_pictures_whatever_the_environment_says(tiny_weights, tmp_path):
    """As without a display, after a notebook and in an old Windows terminal."""
    settings = {"DISPLAY": "", "MPLBACKEND": "module://matplotlib_inline.backend_inline",
                "PYTHONIOENCODING": "cp1252"}
    made = script("animations/loss-curve.py", "--save", tmp_path / "x.png", env=settings)
    assert made.returncode == 0 and (tmp_path / "x.png").exists(), made.stderr
    shown = script("animations/diffusion-process.py", "--weights", tiny_weights, env=settings)
    assert shown.returncode == 0, shown.stderr
    assert "correction" in shown.stdout.splitlines()[0]


def test_the_loss_curve_draws_the_log_in_weights_and_refuses_weights_without_one(tmp_path, command):
    model, picture = random_model(), tmp_path / "x.png"
    log = [{"step": n, "characters_seen": 1e6 * n, "val_nelbo": 2.0 / n} for n in (1, 2)]
    save_weights(model, {"log": log}, tmp_path / "w.pt")
    drawn = command(curve.main, "--weights", tmp_path / "w.pt", "--save", picture)
    assert drawn.returncode == 0, drawn.stderr
    with Image.open(picture) as image:
        assert image.width > 600
    save_weights(model, {}, tmp_path / "w.pt")
    drawn = command(curve.main, "--weights", tmp_path / "w.pt", "--save", picture)
    assert_one_clear_line(drawn, "w.pt", "no log")
    assert_one_clear_line(command(curve.main, "--save", "x.html"), "x.html", ".png")


@pytest.mark.parametrize("name", [life, process, race], ids=lambda module: module.__name__)
@pytest.mark.parametrize("arguments, words", [
    (["--save", "a.bmp"], ["a.bmp", ".gif"]),
    (["--save", ""], [".gif"]),
    (["--save", "/nowhere/a.gif"], ["/nowhere"]),
    (["--fps", "0"], ["'0'", "from 0.1"]),
    (["--temperature", "-1"], ["-1"]),
    (["--weights", "nowhere.pt"], ["nowhere.pt"]),
])
def test_bad_input_to_animations_is_refused_in_one_line(
    name, arguments, words, tiny_weights, command
):
    process = command(name.main, "--weights", tiny_weights, *arguments)
    assert_one_clear_line(process, *words)
