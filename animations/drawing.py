"""Frames of masked text, and the ways to show them: in the terminal, as a GIF, or as a page.

Each animation's `scenes` yields states of the denoising loop: the ids (rows, cols), a title and how
many ordinary frames they last. `show` makes `Frame`s of them and shows those. A page is made of
what `Recorder`s have kept, one for each text.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads must not spin on busy cores
os.environ.pop("MPLBACKEND", None)  # a notebook's, which its children inherit but cannot load

import argparse
import itertools
import json
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # model.py, sample.py
import torch

from model import DEFAULT_WEIGHTS, CommandLine, number, pick_device, read_checkpoint, replacing
from sample import add_model_arguments, load_for_sampling

# One palette for the terminal and for pictures: (red, green, blue)
BACKGROUND = (16, 20, 31)
TITLE = (122, 136, 166)
BLOCK = (44, 56, 84)        # a masked cell
FRESH = (255, 196, 84)      # changed in this frame
CALM = (208, 214, 226)      # settled earlier
FAINT = (70, 82, 108)       # line ends

HIDDEN, SHOWN = "\x1b[?25l\x1b[?7l", "\x1b[0m\x1b[?25h\x1b[?7h"  # the cursor; lines wrap or not


@dataclass
class Frame:
    ids: torch.Tensor     # (rows, cols) character ids
    masked: torch.Tensor  # (rows, cols) bool
    fresh: torch.Tensor   # (rows, cols) bool: characters that this frame changed
    title: str
    hold: float           # how many ordinary frames this one lasts

    def cells(self) -> list[list[tuple[str, tuple[int, int, int]]]]:
        """Row by row, the glyph and the colour of each cell."""
        cols = self.ids.size(1)
        masked, fresh = self.masked.flatten().tolist(), self.fresh.flatten().tolist()
        cells = []
        for glyph, hidden, new in zip(glyphs(self.ids.flatten()), masked, fresh, strict=True):
            known = FRESH if new else FAINT if glyph == "↵" else CALM
            cells.append(("█", BLOCK) if hidden else (glyph, known))
        return [cells[start : start + cols] for start in range(0, len(cells), cols)]


def glyphs(ids) -> list[str]:
    """One visible cell for each of the ids (n,): a line end becomes an arrow, anything else that
    can't be shown a dot. A character of several bytes takes the cell of its first, and dots."""
    cells = []
    for character in bytes(ids.tolist()).decode("utf-8", errors="surrogateescape"):
        visible = "↵" if character == "\n" else character if character.isprintable() else "·"
        cells += visible.ljust(len(character.encode("utf-8", errors="surrogateescape")), "·")
    return cells


def frames(scenes: Iterable[tuple], mask_token_id: int) -> Iterator[Frame]:
    """Fresh is what differs from the last character seen there, so not one that is confirmed."""
    last = None
    for ids, title, hold in scenes:
        ids = ids.cpu()
        masked = ids == mask_token_id
        last = ids if last is None else last
        yield Frame(ids, masked, ~masked & (ids != last), title, hold)
        last = torch.where(masked, last, ids)


class Recorder:
    """Keeps how one text came about, as the steps of a page.

    A step says which places change (`set`) and to what (`to`). Its `phase` is
        given      the text as the sampler gets it
        draft      a network call writes; so it goes on until nothing is masked
        mask       the corrector masks some characters again
        correct    a network call writes those; `mask` and `correct` take turns to the end
    A step that a call made also has the call's duration (`ms`) and how much each of its characters
    surprised the call, in hundredths of a nat (`nats`). What a call expects stands at the step that
    the call sees: the likeliest characters (`guess`) and their percents (`p`) at the first `most`
    masked places."""

    def __init__(self, mask_token_id: int, name: str = "", candidates: int = 5, most=None):
        self.mask_token_id, self.candidates, self.most = mask_token_id, candidates, most
        self.name, self.steps = name, []
        self.label, self.start = "", 0
        self.text = []  # the ids after the last step

    def watch(self, model, x, states, label="", start=0) -> Iterator[torch.Tensor]:
        """Passes on the states that a sampler makes of x, one a network call, and keeps them. x is
        the part of the text that begins at character `start`; `label` names the part."""
        self.label, self.start = label, start
        self.add(x, "given")
        phase, call = "draft", {}

        def hear(model, inputs, log_p):
            call.update(x_t=inputs[0], log_p=log_p.flatten(0, 1).cpu())

        with model.register_forward_hook(hear):
            called = time.perf_counter()
            for x in states:
                ms = round(1000 * (time.perf_counter() - called))
                if phase == "correct":
                    self.add(call["x_t"], "mask")
                self.expect(call["x_t"], call["log_p"])
                self.add(x, phase, call["log_p"], ms)
                if self.mask_token_id not in self.text[start:]:
                    phase = "correct"
                yield x
                called = time.perf_counter()

    def add(self, x, phase: str, log_p=None, ms=None) -> None:
        """Adds the step that turns the text from `start` on into x; log_p (n, V) if a call did."""
        ids, before = x.flatten().tolist(), self.text[self.start :]
        changed = [i for i, id in enumerate(ids) if before[i : i + 1] != [id]]
        step = {"label": self.label, "phase": phase, "set": [self.start + i for i in changed],
                "to": "".join(chr(ids[i]) for i in changed)}
        if log_p is not None:
            nats = [round(-100 * log_p[i, ids[i]].item()) for i in changed]
            step |= {"ms": ms, "nats": nats}
        self.steps.append(step)
        self.text[self.start :] = ids

    def expect(self, x_t, log_p) -> None:
        """Adds to the last step what a call that sees x_t expects, log_p (n, V)."""
        masked = (x_t == self.mask_token_id).flatten().cpu()
        p, guess = log_p[masked][: self.most].exp().topk(self.candidates)
        self.steps[-1]["guess"] = "".join(map(chr, guess.flatten().tolist()))
        self.steps[-1]["p"] = (100 * p).round().int().flatten().tolist()


def replay(steps: list[dict]) -> Iterator[list[int]]:
    """The text after each step."""
    text = []
    for step in steps:
        for place, character in zip(step["set"], step["to"], strict=True):
            text[place : place + 1] = [ord(character)]
        yield list(text)


def command_line(doc: str, fps: int, endings=(".gif", ".html")) -> CommandLine:
    """A parser of what the animations with frames know."""
    parser = CommandLine(doc)
    add_model_arguments(parser)
    add = parser.add_argument_group("picture").add_argument
    add("--save", type=partial(picture_path, endings), metavar="FILE",
        help=f"write a picture or a page, whose name ends in {', '.join(endings)}")
    add("--fps", type=number(float, 0.1, 50), default=fps, help="frames per second")
    return parser


def picture_path(endings: tuple[str, ...], text: str) -> Path:
    """The path of a picture with one of these endings, in a folder that can be written."""
    path = Path(text)
    if path.suffix.lower() not in endings:
        raise argparse.ArgumentTypeError(f"{text!r}: the name has to end in {' or '.join(endings)}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r}: cannot be written")
    return path


def panel(x, width: int = 64):
    """The characters of x as (rows, cols), in the widest equal lines of at most `width`."""
    return x.view(-1, max(n for n in range(1, width + 1) if x.numel() % n == 0))


def wrapped(ids: list[int], width: int) -> list[list[int]]:
    """The places of a text line by line. A line ends after a line end, or after the last space that
    fits; only a word longer than a line is split. Line ends at the start are left out."""
    text = "".join(map(chr, ids))
    lines = re.findall(rf"[^\n]{{0,{width - 1}}}(?:[ \n]|$)|[^\n]{{{width}}}", text.lstrip("\n"))
    ends = list(itertools.accumulate(map(len, lines), initial=len(text) - len(text.lstrip("\n"))))
    return [list(range(*ends)) for ends in itertools.pairwise(ends) if ends[0] < ends[1]]


def laid_out(ids: list[int], lines: list[list[int]], width: int) -> torch.Tensor:
    """The ids at the places of `lines`, (rows, width), with spaces for line ends and after them."""
    shown = [[ord(" ") if ids[place] == ord("\n") else ids[place] for place in line]
             for line in lines]
    return torch.tensor([line + [ord(" ")] * (width - len(line)) for line in shown])


def show(scenes: Callable[..., Iterable[tuple]], args, candidates=5, most=None, **look) -> None:
    """Plays or saves the scenes as the command line asks. `look` is for their page."""
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if terminal:
        print("loading ...", end="\r", flush=True)
    model = load_for_sampling(args.weights, pick_device(args.device))
    mask_token_id, recorders = model.config.mask_token_id, []

    def record(name: str = "") -> Recorder:
        recorders.append(Recorder(mask_token_id, name, candidates, most))
        return recorders[-1]

    shots = frames(scenes(model, args, record), mask_token_id)
    ending = args.save.suffix.lower() if args.save else ""
    if ending == ".gif":
        save(shots, args.save, args.fps)
    elif not ending and terminal:
        play(shots, args.fps, sys.stdout)
    else:
        *_, last = shots
        if ending == ".html":
            look |= {"mask": mask_token_id, "candidates": candidates}
            html = page(args.weights, recorders, **look)
            with replacing(args.save) as file:
                file.write(html.encode())
        elif ending == ".png":
            still(recorders[0], args.save, dark=False)
            still(recorders[0], args.save.with_stem(f"{args.save.stem}-dark"), dark=True)
        else:  # a pipe, a file or a terminal that can't redraw gets the last frame as plain text
            lines = ("".join(glyph for glyph, _ in row).rstrip() for row in last.cells())
            print(last.title, *lines, sep="\n")


def play(frames: Iterable[Frame], fps: float, out) -> None:
    """Redraws in place, in colours unless NO_COLOR is set. A small terminal shows what fits."""
    plain, rows = os.environ.get("NO_COLOR"), []
    handle_signals(out, rows)
    out.write(HIDDEN)
    try:
        for frame in frames:
            cols, lines = shutil.get_terminal_size()
            height = sum((len(row) + cols - 1) // cols for row in rows)  # narrower: they wrapped
            out.write(f"\x1b[{height}F" if height else "")  # up to the first line
            fitting = [[(glyph, TITLE) for glyph in frame.title], *frame.cells()][: lines - 1]
            rows[:] = [row[:cols] for row in fitting]
            for row in rows:
                out.write("\x1b[K")  # before the text: in the last column it would take a letter
                for (r, g, b), run in itertools.groupby(row, key=lambda cell: cell[1]):
                    out.write("" if plain else f"\x1b[38;2;{r};{g};{b}m")
                    out.write("".join(glyph for glyph, _ in run))
                out.write("\x1b[0m\n")
            print("\x1b[J", end="", file=out, flush=True)
            time.sleep(frame.hold / fps)
    finally:
        print(SHOWN, end="", file=out, flush=True)


def handle_signals(out, rows: list) -> None:
    r"""A stop is a Ctrl-C, and so is Ctrl-\. A pause gives the cursor back; then frames begin anew,
    over no `rows`."""

    def pause(number, frame):
        print(SHOWN, end="", file=out, flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        out.write(HIDDEN)
        rows.clear()

    stop = signal.default_int_handler
    handlers = {"SIGTERM": stop, "SIGHUP": stop, "SIGQUIT": stop, "SIGTSTP": pause}
    for name, handler in handlers.items():
        number = getattr(signal, name, None)  # Windows has only the first
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, handler)


def monospace(size: int):
    """The fixed-width font that comes with matplotlib; a character is 0.6 times as wide as high."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", size)


def picture(frame: Frame):
    """The frame as a Pillow image. Parts of the title with two spaces between them begin above
    their columns, in larger letters."""
    from PIL import Image, ImageDraw

    width, height, margin, head = 10, 22, 16, 42  # pixels; a cell of this font fits
    rows, cols = frame.ids.shape
    size = cols * width + 2 * margin, head + rows * height + margin
    image = Image.new("RGB", size, BACKGROUND)
    pen, font, large = ImageDraw.Draw(image), monospace(16), monospace(23)
    for part in re.finditer(r"\S+(?: \S+)*", frame.title):
        pen.text((margin + part.start() * width, margin // 2), part[0], font=large, fill=TITLE)
    for row, cells in enumerate(frame.cells()):
        for col, (glyph, rgb) in enumerate(cells):
            place = margin + col * width, head + row * height
            pen.text(place, glyph.replace("█", "▉"), font=font, fill=rgb)  # with gaps between
    return image


def save(frames: Iterable[Frame], path: Path, fps: float) -> None:
    """One GIF, by Pillow. It begins with the last frame, for a second: previews show that one.
    All frames share a palette, as one for each would triple the size."""
    frames = list(frames)
    frames.insert(0, replace(frames[-1], hold=fps))
    shared = max(map(picture, frames[::8]), key=lambda image: len(image.getcolors(1 << 20)))
    shared = shared.quantize(128)
    images = [picture(frame).quantize(palette=shared, dither=0) for frame in frames]
    with replacing(path) as file:
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], loop=0, optimize=True,
                       duration=[round(1000 * frame.hold / fps) for frame in frames])


def calls_of_characters(recorder: Recorder) -> list[int]:
    """The number of the network call in which each character of the text came, 0 if in none."""
    came, known, calls = {}, {}, 0
    for step in recorder.steps:
        calls += "ms" in step
        for place, character in zip(step["set"], step["to"], strict=True):
            if ord(character) != recorder.mask_token_id and known.get(place) != character:
                known[place], came[place] = character, calls
    return [came[place] for place in range(len(recorder.text))]


def still(recorder: Recorder, path: Path, dark: bool) -> None:
    """A PNG of the text's first six lines, on cells coloured by when each character came."""
    from matplotlib import colormaps
    from PIL import Image, ImageDraw

    lines, came = wrapped(recorder.text, 48)[:6], calls_of_characters(recorder)
    cells, last = glyphs(torch.tensor(recorder.text)), max(came)
    width, height, margin = 14, 34, 12  # pixels
    cols = max(map(len, lines))
    size = cols * width + 2 * margin, (len(lines) + 1) * height + 3 * margin
    image = Image.new("RGB", size, BACKGROUND if dark else "white")
    pen, font, small, ink = ImageDraw.Draw(image), monospace(22), monospace(17), TITLE

    def colour(share: float):
        return tuple(int(255 * part) for part in colormaps["viridis"](share)[:3])

    for row, line in enumerate(lines):
        for col, place in enumerate(line):
            x, y, share = margin + col * width, margin + row * height, came[place] / last
            if came[place] and cells[place] != "↵":
                pen.rectangle((x, y, x + width - 1, y + height - 3), colour(share))
                ink = "white" if share < 0.45 else "black"
                pen.text((x, y + 2), cells[place], font=font, fill=ink)
    y, ink = size[1] - height, CALM if dark else "black"
    start, end = margin + 12 * width, size[0] - margin - 5 * width  # the key, between its words
    pen.text((margin, y), "first call", font=small, fill=ink)
    pen.text((end + width, y), "last", font=small, fill=ink)
    for x in range(start, end):
        pen.line((x, y, x, y + 20), colour((x - start) / (end - start)))
    with replacing(path) as file:
        image.save(file, "PNG")


def page(weights: Path, recorders: Iterable[Recorder] = (), command: str = "", **trace) -> str:
    """page.html with a trace inside. Without `<`, no text can end the script element."""
    script = f"animations/{Path(sys.argv[0]).name}"
    trace["command"] = command or shlex.join(["uv", "run", script, *sys.argv[1:]])
    trace["runs"] = [{"name": it.name, "steps": it.steps} for it in recorders]
    contents = read_checkpoint(weights)
    trace["nelbo"] = contents["meta"].get("val_nelbo")
    numbers = sum(tensor.numel() for tensor in contents["model"].values())
    learned = ", one megabyte of Shakespeare" if weights == DEFAULT_WEIGHTS else ""
    trace["about"] = f"{numbers // 10**5 / 10} million numbers{learned}"
    island = json.dumps(trace, separators=(",", ":")).replace("<", "\\u003c")
    html = Path(__file__).with_name("page.html").read_text("utf-8")
    return html.replace("{}</script>", island + "</script>", 1)
