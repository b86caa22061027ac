import importlib
import io
import os
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial

import drawing
from model import BadInput
from sample import SamplerConfig, draft_and_correct, left_to_right, row_generators

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import TINY, assert_one_clear_line, random_model, script
from PIL import Image

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses /proc")

life = importlib.import_module("game-of-life")
process = importlib.import_module("diffusion-process")
race = importlib.import_module("race")


def board(*cells, side=8):
    alive = torch.zeros(side, side, dtype=torch.bool)
    for row, col in cells:
        alive[row % side, col % side] = True
    return alive


def test_blinker_has_period_two():
    upright, level = board((2, 3), (3, 3), (4, 3)), board((3, 2), (3, 3), (3, 4))
    assert torch.equal(life.life_step(upright), level)
    assert torch.equal(life.life_step(level), upright)


def test_block_stays_and_a_lone_cell_dies():
    block = board((0, 0), (0, 7), (7, 0), (7, 7))  # one block, across both edges
    assert torch.equal(life.life_step(block), block)
    assert not life.life_step(board((4, 4))).any()


def test_glider_crosses_the_edge_and_comes_back():
    glider = [(0, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    alive = board(*glider)
    for generation in range(1, 33):
        alive = life.life_step(alive)
        if generation % 4 == 0:  # moved one cell down and right
            shift = generation // 4
            assert torch.equal(alive, board(*((row + shift, col + shift) for row, col in glider)))
    assert torch.equal(alive, board(*glider))


def test_game_rewrites_live_cells_and_no_others():
    model = random_model()
    text, hidden = torch.randint(1, 128, (32, 32)), torch.rand(32, 32) < 0.3
    states = list(life.rewrite(model, text, hidden, temperature=1.0, calls=4, seed=0))
    assert torch.equal(states[0] == 0, hidden)
    assert torch.equal(states[-1][~hidden], text[~hidden]) and (states[-1] != 0).all()
    assert 4 <= len(states) - 1 <= 5


def test_game_works_where_the_sequence_length_does_not_divide_the_board():
    model = random_model(replace(TINY, sequence_len=48))
    text = torch.ones(32, 32, dtype=torch.long)
    *_, text = life.rewrite(model, text, text == 1, temperature=1.0, calls=2, seed=0)
    assert (text != 0).all()


def some_frames():
    states = [torch.tensor([ids]) for ids in ([0, 0, 0, 0], [72, 0, 0, 10], [72, 105, 7, 10])]
    return list(drawing.frames_of(states, mask_token_id=0, shape=(2, 2), title="test"))


def test_frames_say_what_is_masked_and_what_is_fresh():
    first, second, third = some_frames()
    assert first.masked.all() and not first.fresh.any()
    assert second.fresh.tolist() == [[True, False], [False, True]] and "2 masked" in second.title
    assert third.fresh.tolist() == [[False, True], [True, False]] and "0 masked" in third.title
    cells = list(third.cells())
    assert cells[0] == [("H", drawing.CALM), ("i", drawing.FRESH)]
    assert cells[1] == [("·", drawing.FRESH), ("↵", drawing.FAINT)]
    assert list(first.cells())[0][0] == ("█", drawing.BLOCK)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_redraws_in_place_and_gives_the_cursor_back():
    out = Terminal()
    drawing.play_in_terminal(some_frames(), fps=1000, out=out)
    text = out.getvalue()
    assert text.count("\x1b[3F") == 2  # up by title and two rows, before the second and third frame
    assert text.startswith("\x1b[?25l") and text.endswith("\x1b[?25h")


def test_no_color_and_dumb_terminals_are_honoured(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    drawing.play_in_terminal(some_frames(), fps=1000, out=out)
    assert "\x1b[38" not in out.getvalue() and "\x1b[3F" in out.getvalue()
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    drawing.play_in_terminal(some_frames(), fps=1000, out=out)
    assert "\x1b" not in out.getvalue() and out.getvalue().splitlines()[1:] == ["Hi", "·↵"]


def test_characters_of_several_bytes_are_shown_as_themselves():
    ids = torch.tensor(list("é☃\n".encode()) + [0xE2, 0x98, 7])
    assert drawing.glyphs(ids) == ["é", "·", "☃", "·", "·", "↵", "·", "·", "·"]


@pytest.mark.parametrize("lines, cols", [(24, 80), (24, 40), (10, 40), (40, 8)])
def test_animations_fit_the_terminal(lines, cols, monkeypatch):
    monkeypatch.setattr(drawing.sys, "stdout", Terminal())
    size = os.terminal_size((cols, lines))
    monkeypatch.setattr(drawing.shutil, "get_terminal_size", lambda: size)
    monkeypatch.setenv("TERM", "xterm")
    args = Namespace(save=None, window=False, seed=0, temperature=1.0, density=0.3, generations=1,
                     calls=2, num_blocks=1, fps=10)
    rows, width = drawing.panel_shape(256, *drawing.room(args))
    assert rows * width == 256
    assert rows <= lines - 2 and width <= cols
    for frame in life.frames(random_model(), torch.device("cpu"), args):
        assert frame.ids.size(0) <= lines - 2 and frame.ids.size(1) <= cols


def test_a_terminal_that_is_too_small_is_named():
    with pytest.raises(BadInput, match="20 x 4"):
        drawing.panel_shape(256, rows=2, cols=20)


def test_a_pipe_gets_the_last_frame_as_plain_text():
    out = io.StringIO()
    drawing.play_in_terminal(some_frames(), fps=1000, out=out)
    assert out.getvalue().splitlines()[1:] == ["Hi", "·↵"]


def race_frames(model, **changes):
    args = Namespace(save=True, window=False, seed=0, temperature=1.0, prompt="To be", fps=10)
    return list(race.frames(model, torch.device("cpu"), Namespace(**{**vars(args), **changes})))


def test_each_runner_of_a_race_makes_one_call_a_frame_and_then_waits():
    frames = race_frames(random_model())
    panels = [(frame.masked[:, :32], frame.masked[:, 36:]) for frame in frames]
    assert [int(left.sum()) for left, _ in panels[:28]] == list(range(27, -1, -1))
    calls = frames[-1].title.split("calls")
    assert calls[0].endswith(": 27 ") and calls[1].endswith(": 10 ")  # 2 of the draft, 8 correct it
    assert not panels[10][1].any() and len(frames) == 29
    assert (frames[-1].ids[0, :5] == torch.tensor(list(b"To be"))).all()


def test_both_runners_of_a_race_write_what_the_sampler_writes():
    model = random_model()
    last = race_frames(model)[-1].ids
    x = torch.zeros(1, 32, dtype=torch.long)
    x[0, :5] = torch.tensor(list(b"To be"))
    ways = [SamplerConfig(partial(left_to_right, k=1), 1.0, sweeps=0), SamplerConfig(temperature=1)]
    for way, panel in zip(ways, (last[:, :32], last[:, 36:]), strict=True):
        *_, expected = draft_and_correct(model, x, way, row_generators(0, 1))
        assert torch.equal(panel.flatten(), expected[0])


def test_pictures_show_blocks_for_masked_cells_and_text_for_the_rest():
    first, _, third = (drawing.draw(frame) for frame in some_frames())
    colours = [{colour for _, colour in picture.getcolors(100_000)} for picture in (first, third)]
    assert drawing.BLOCK in colours[0] and drawing.FRESH not in colours[0]
    assert drawing.BLOCK not in colours[1] and drawing.FRESH in colours[1]
    assert first.size == third.size


def test_gif_has_every_frame_with_its_duration(tmp_path):
    frames = some_frames()
    frames[-1].hold = 10
    drawing.save(frames, tmp_path / "a.gif", fps=10)
    with Image.open(tmp_path / "a.gif") as gif:
        durations = []
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
    assert durations == [100, 100, 1000]


def test_scripts_write_pictures_without_a_display(tiny_weights, tmp_path):
    settings = {"DISPLAY": "", "MPLBACKEND": ""}
    made = script("animations/diffusion-process.py", "--weights", tiny_weights, "--num-blocks", 2,
                  "--save", tmp_path / "a.gif", cwd=tmp_path, env=settings)
    assert made.returncode == 0, made.stderr
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames > 4
    made = script("animations/game-of-life.py", "--weights", tiny_weights, "--generations", 2,
                  "--calls", 2, "--save", tmp_path / "life.png", env=settings)
    assert made.returncode == 0, made.stderr
    assert len(list(tmp_path.glob("life-*.png"))) == 6


def test_animations_play_in_a_pipe_and_in_a_window(tiny_weights, command, monkeypatch):
    piped = command(process.main, "--weights", tiny_weights, "--num-blocks", 1)
    assert piped.stdout.count("\n") == 2
    arguments = ["--weights", tiny_weights, "--generations", 1, "--window", "--fps", 50]
    assert_one_clear_line(command(life.main, *arguments), "--window", "no display")
    monkeypatch.setattr(plt, "get_backend", lambda: "a backend with windows")
    played = command(life.main, *arguments)
    assert played.returncode == 0, played.stderr


def test_output_is_utf8_whatever_the_locale_says(tiny_weights):
    shown = script("animations/diffusion-process.py", "--weights", tiny_weights, "--num-blocks", 1,
                   env={"PYTHONIOENCODING": "cp1252"})
    assert shown.returncode == 0, shown.stderr
    assert len(shown.stdout.splitlines()[1]) == 32


@pytest.mark.parametrize("name", [life, process, race], ids=lambda module: module.__name__)
@pytest.mark.parametrize("arguments, words", [
    (["--save", "a.bmp"], ["a.bmp", ".gif"]),
    (["--save", "/nowhere/a.gif"], ["/nowhere"]),
    pytest.param(["--save", "/proc/a.gif"], ["/proc/a.gif", "written"], marks=linux_only),
    (["--fps", "0"], ["'0'", "at least 0.1"]),
    (["--temperature", "-1"], ["-1"]),
    (["--weights", "nowhere.pt"], ["nowhere.pt"]),
    (["--device", "cuda:9"], ["cuda:9"]),
])
def test_bad_input_to_animations_is_one_line(name, arguments, words, tiny_weights, command):
    process = command(name.main, "--weights", tiny_weights, *arguments)
    assert_one_clear_line(process, *words)
