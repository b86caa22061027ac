import importlib
import os
import re
import signal
import sys
import time
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from conftest import (
    ROOT, TINY, Screen, assert_one_clear_line, island, last, no_space, random_model, script,
)
from PIL import Image, ImageChops

import drawing
from model import save_weights
from sample import (
    SamplerConfig, add_sampler_arguments, denoise, draft_and_correct, fill, left_to_right,
    sampler_config,
)

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses /proc")

life = importlib.import_module("game-of-life")
process = importlib.import_module("diffusion-process")
race = importlib.import_module("race")
curve = importlib.import_module("loss-curve")


@pytest.fixture(autouse=True)
def a_capable_terminal(monkeypatch):
    """The same terminal for every test, whatever terminal pytest runs in."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)


def board(*cells, side=8):
    alive = torch.zeros(side, side, dtype=torch.bool)
    for row, col in cells:
        alive[row % side, col % side] = True
    return alive


def test_blinker_has_period_two():
    upright, level = board((2, 3), (3, 3), (4, 3)), board((3, 2), (3, 3), (3, 4))
    assert torch.equal(life.life_step(upright), level)
    assert torch.equal(life.life_step(level), upright)


def test_a_square_of_live_cells_stays_and_a_lone_cell_dies():
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


def seeded():
    return torch.Generator().manual_seed(0)


def test_game_rewrites_live_cells_and_no_others():
    model = random_model()
    text, hidden = torch.randint(1, 128, (32, 32)), torch.rand(32, 32) < 0.3
    states = list(life.rewrite(model, text, hidden, 1.0, calls=4, generator=seeded()))
    assert all(torch.equal(state[~hidden], text[~hidden]) for state in states)
    assert (states[-1] != 0).all() and len(states) == 4


def test_game_works_where_the_sequence_length_does_not_divide_the_board():
    model = random_model(replace(TINY, sequence_len=48))
    text = torch.ones(32, 32, dtype=torch.long)
    *_, text = life.rewrite(model, text, text == 1, 1.0, calls=2, generator=seeded())
    assert (text != 0).all()


def some_frames():
    states = [0, 0, 0, 0], [72, 0, 0, 10], [72, 105, 7, 10]
    scenes = [(torch.tensor(ids).view(2, 2), "test", 1) for ids in states]
    return list(drawing.frames(scenes, mask_token_id=0))


def test_frames_mark_masked_and_fresh_characters():
    first, second, third = some_frames()
    assert first.masked.all() and not first.fresh.any()
    assert second.fresh.tolist() == [[True, False], [False, True]]
    assert third.fresh.tolist() == [[False, True], [True, False]]
    cells = list(third.cells())
    assert cells[0] == [("H", drawing.CALM), ("i", drawing.FRESH)]
    assert cells[1] == [("·", drawing.FRESH), ("↵", drawing.FAINT)]
    assert list(first.cells())[0][0] == ("█", drawing.BLOCK)


def test_a_character_that_the_corrector_confirms_is_not_fresh():
    scenes = [(torch.tensor([ids]), "", 1) for ids in ([72, 105], [0, 0], [72, 106])]
    frames = list(drawing.frames(scenes, mask_token_id=0))
    assert frames[1].masked.all() and frames[2].fresh.tolist() == [[False, True]]


def process_scenes(*flags, num_blocks=1):
    parser = drawing.command_line("", fps=10)
    add_sampler_arguments(parser)
    args = parser.parse_args([*flags, "--seed", "3"], Namespace(num_blocks=num_blocks))
    recorders = []

    def record():
        recorders.append(drawing.Recorder(0))
        return recorders[-1]

    return list(process.scenes(random_model(), args, record)), *recorders


def test_titles_number_the_network_calls_and_name_the_phase():
    scenes, _ = process_scenes("--turns", "9", "--sweeps", "1", "--stride", "4")
    titles = [tuple(re.split("  +", title)) for _, title, _ in scenes]
    calls = [f"call {n} of 13" for n in range(1, 14)]
    expected = [("", "all masked"), *((call, "draft") for call in calls[:9])]
    for call in calls[9:]:
        expected += [("", "masked again"), (call, "correction")]
    assert titles == expected and scenes[-1][2] == 10  # a second


def test_a_block_is_what_sample_py_writes_with_the_same_seed_and_length():
    for flags in ([], ["--block-len", "20", "--lookback", "4"]):
        scenes, recorder = process_scenes(*flags)
        parser = drawing.command_line("", fps=10)
        add_sampler_arguments(parser)
        config = sampler_config(parser.parse_args(flags), 32)
        x = torch.tensor([[10, 10, *[0] * config.block_len]])
        x, _ = last(fill(random_model(), x, config, torch.Generator().manual_seed(3)))
        assert recorder.text == x[0].tolist()


def test_lines_end_at_line_ends_and_at_words_and_show_every_character_once():
    text = "\n\nROMEO:\nO, she doth teach the torches to burn bright!\n\n" + "x" * 30 + " so"
    lines = drawing.wrapped(list(text.encode()), 24)
    assert ["".join(text[place] for place in line) for line in lines] == [
        "ROMEO:\n", "O, she doth teach the ", "torches to burn bright!\n", "\n", "x" * 24,
        "xxxxxx so"]
    assert [place for line in lines for place in line] == list(range(2, len(text)))
    shown = drawing.laid_out(list(text.encode()), lines, 24)
    assert bytes(shown[2].tolist()) == b"torches to burn bright! "


def test_terminal_redraws_in_place_and_gives_the_cursor_back(screen):
    drawing.play(some_frames(), 1000, screen.out)
    assert screen.text().splitlines() == ["test", "Hi", "·↵"]
    text = screen.received.decode()
    assert text.count("\x1b[3F") == 2  # title and two rows, twice
    assert text.startswith("\x1b[?25l") and "\x1b[?25h" in text[-20:]


def showing(weights):
    """The two arguments of `show`: the function that yields scenes, and the flags."""
    scenes = [(frame.ids, frame.title, 1) for frame in some_frames()]
    return lambda *_: scenes, Namespace(weights=weights, device="cpu", save=None, fps=1000)


def test_no_color_and_dumb_terminals_are_honoured(monkeypatch, screen, capsys, tiny_weights):
    monkeypatch.setenv("NO_COLOR", "1")
    drawing.play(some_frames(), 1000, screen.out)
    screen.text()
    assert b"\x1b[38" not in screen.received and b"\x1b[3F" in screen.received
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    drawing.show(*showing(tiny_weights))
    assert capsys.readouterr().out.splitlines() == ["test", "Hi", "·↵"]


def test_a_terminal_hears_that_the_model_is_loading(monkeypatch, screen, tiny_weights):
    monkeypatch.setattr(drawing, "play", lambda *_: None)
    with screen.shown():
        drawing.show(*showing(tiny_weights))
    assert screen.text() == "loading ..."


def test_the_game_shows_how_its_field_is_written(tiny_weights):
    args = Namespace(seed=0, temperature=1.0, density=0.2, generations=1, calls=2)
    scenes = list(life.scenes(random_model(), args, lambda: drawing.Recorder(0)))
    masked = [int((ids == 0).sum()) for ids, _, _ in scenes]
    assert masked[:32] == list(range(31 * 40, -1, -40)) and len(scenes) == 32 + 3


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


@linux_only
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_stop_gives_the_cursor_back(signum, screen):
    signals = signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP
    before = {number: signal.getsignal(number) for number in signals}
    signal.signal(signum, signal.SIG_DFL)  # a shell's background job ignores some

    def frames():
        yield some_frames()[0]
        os.kill(os.getpid(), signum)
        time.sleep(1)

    try:
        with pytest.raises(KeyboardInterrupt):
            drawing.play(frames(), 1000, screen.out)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    screen.text()
    assert screen.received.decode().endswith(drawing.SHOWN)


def test_characters_of_several_bytes_are_shown_as_themselves():
    ids = torch.tensor(list("é☃\n".encode()) + [0xE2, 0x98, 7])
    assert drawing.glyphs(ids) == ["é", "·", "☃", "·", "·", "↵", "·", "·", "·"]


def test_a_pipe_gets_the_last_frame_as_plain_text(capsys, tiny_weights):
    drawing.show(*showing(tiny_weights))
    assert capsys.readouterr().out.splitlines() == ["test", "Hi", "·↵"]


@pytest.mark.parametrize("length, width, shape", [(256, 64, (4, 64)), (250, 64, (5, 50)),
                                                  (7, 64, (1, 7)), (256, 32, (8, 32))])
def test_a_panel_has_the_widest_equal_lines(length, width, shape):
    assert drawing.panel(torch.zeros(1, length), width).shape == shape


def race_frames(model):
    args = Namespace(seed=0, temperature=1.0, parallel_temperature=1.0, prompt="To be", fps=10)
    scenes = race.scenes(model, args, lambda name: drawing.Recorder(0, name))
    return list(drawing.frames(scenes, mask_token_id=0))


def states_in_parallel(model):
    x = torch.zeros(1, 32, dtype=torch.long)
    x[0, :5] = torch.tensor(list(b"To be"))
    config = SamplerConfig(temperature=1.0)
    return list(draft_and_correct(model, x, x == 0, config, seeded()))


def test_each_runner_of_a_race_makes_one_network_call_a_frame_and_then_waits():
    model = random_model()
    frames, n = race_frames(model), len(states_in_parallel(model))
    panels = [(frame.masked[:, :32], frame.masked[:, 36:]) for frame in frames]
    assert [int(left.sum()) for left, _ in panels[:28]] == list(range(27, -1, -1))
    for frame, left, right in (frames[5], 5, 5), (frames[-1], 27, n):
        title = f"left to right: {left} calls", f"in parallel: {right} calls"
        assert tuple(re.split("  +", frame.title)) == title
    assert not panels[n][1].any() and len(frames) == max(27, n) + 2
    for call, frame in enumerate(frames[:-1]):  # faster, once the right one waits
        assert frame.hold == (1 if call <= n else 1 / 4)
    assert (frames[-1].ids[0, :5] == torch.tensor(list(b"To be"))).all()


def test_both_runners_of_a_race_write_what_the_sampler_writes():
    model = random_model()
    last = race_frames(model)[-1].ids
    x = torch.zeros(1, 32, dtype=torch.long)
    x[0, :5] = torch.tensor(list(b"To be"))
    *_, left = denoise(model, x, left_to_right, 1.0, seeded())
    *_, right = states_in_parallel(model)
    assert torch.equal(last[:, :32].flatten(), left[0])
    assert torch.equal(last[:, 36:].flatten(), right[0])


def test_pictures_colour_masked_and_fresh_characters():
    first, _, third = (drawing.picture(frame) for frame in some_frames())
    colours = [{colour for _, colour in picture.getcolors(100_000)} for picture in (first, third)]
    assert drawing.BLOCK in colours[0] and drawing.FRESH not in colours[0]
    assert drawing.BLOCK not in colours[1] and drawing.FRESH in colours[1]
    assert first.size == third.size


def durations(path):
    with Image.open(path) as gif:
        for i in range(gif.n_frames):
            gif.seek(i)
            yield gif.info["duration"]


def test_gif_begins_with_the_last_frame_and_then_shows_every_one_for_its_time(tmp_path):
    frames = some_frames()
    frames[-1].hold = 10
    drawing.save(frames, tmp_path / "a.gif", fps=10)
    assert list(durations(tmp_path / "a.gif")) == [1000, 100, 100, 1000]
    with Image.open(tmp_path / "a.gif") as gif:
        first = gif.convert("RGB")
        gif.seek(3)
        assert first.tobytes() == gif.convert("RGB").tobytes()


def assert_pictures_agree(page, gif, stills):
    """The GIF's first frame shows the page's text; the stills are those of the page's steps."""
    run, = island(page.read_text("utf-8"))["runs"]
    recorder = drawing.Recorder(0)
    recorder.steps, recorder.text = run["steps"], last(drawing.replay(run["steps"]))
    *_, frame = drawing.frames(process.pictures(run["steps"], 0, 0, 1), mask_token_id=0)
    with Image.open(gif) as image:
        difference = ImageChops.difference(drawing.picture(frame), image.convert("RGB"))
    assert max(most for _, most in difference.getextrema()) < 50  # the GIF has fewer colours
    for path, dark in stills.items():
        again = page.with_name("again.png")
        drawing.still(recorder, again, dark)
        with Image.open(path) as made, Image.open(again) as remade:
            assert made.tobytes() == remade.tobytes()


def test_page_gif_and_stills_show_the_same_text(tiny_weights, tmp_path, command):
    for name in ("x.html", "x.gif", "x.png"):
        made = command(process.main, "--weights", tiny_weights, "--save", tmp_path / name)
        assert made.returncode == 0, made.stderr
    stills = {tmp_path / "x.png": False, tmp_path / "x-dark.png": True}
    assert_pictures_agree(tmp_path / "x.html", tmp_path / "x.gif", stills)
    other = tmp_path / "other.gif"
    command(process.main, "--weights", tiny_weights, "--save", other, "--seed", 2)
    with pytest.raises(AssertionError):
        assert_pictures_agree(tmp_path / "x.html", other, {})


def test_the_pictures_of_the_readme_show_the_text_of_the_page_beside_them(tmp_path):
    folder, page = ROOT / "animations", tmp_path / "x.html"
    page.write_bytes((folder / "denoising.html").read_bytes())
    stills = {folder / "order.png": False, folder / "order-dark.png": True}
    assert_pictures_agree(page, folder / "animation.gif", stills)


def test_a_picture_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "a.gif").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        drawing.save(some_frames(), tmp_path / "a.gif", fps=10)
    assert os.listdir(tmp_path) == ["a.gif"] and (tmp_path / "a.gif").read_bytes() == b"old"


def test_scripts_write_pictures_without_a_display(tiny_weights, tmp_path):
    """The backend that a notebook leaves in the environment must not matter either."""
    settings = {"DISPLAY": "", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    made = script("animations/loss-curve.py", "--save", tmp_path / "x.png", env=settings)
    assert made.returncode == 0, made.stderr
    with Image.open(tmp_path / "x.png") as image:
        assert image.width > 600


def test_output_is_utf8_whatever_the_locale_says(tiny_weights):
    shown = script("animations/diffusion-process.py", "--weights", tiny_weights,
                   "--num-blocks", 1, env={"PYTHONIOENCODING": "cp1252"})
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
