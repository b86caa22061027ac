"""Frames of masked text, and the ways to show them: in the terminal, as a GIF, or as a page.

Each animation's `scenes` yields states of the denoising loop: the ids (rows, cols), a title and how
many ordinary frames they last. `show` makes `Frame`s of them and shows those.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads must not spin on busy cores
os.environ.pop("MPLBACKEND", None)  # a notebook's, which its children inherit but cannot load

import argparse
import itertools
import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # model.py, sample.py
import torch

from model import CommandLine, number, pick_device, read_checkpoint, replacing
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
    """Keeps a text's states as the steps of a page: which places change (`set`), to what (`to`),
    how much that surprises the call that does it, in hundredths of a nat (`nats`), and the next
    call's likeliest characters (`guess`) and their percents (`p`) at `most` masked places."""

    def __init__(self, mask: int, candidates=5, most=None, on=False, **look):
        self.on, self.most = on, most
        self.trace = {"mask": mask, "candidates": candidates, "runs": [], **look}

    def begin(self, name: str = "") -> None:
        """What follows is another text."""
        self.state, self.steps = [], []
        self.trace["runs"].append({"name": name, "steps": self.steps})
        self.part()

    def part(self, title: str = "", start: int = 0) -> None:
        """What follows is a part of the text, which begins at that character."""
        self.title, self.start, self.phase = title, start, ""

    def watch(self, model, states: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Passes on the states, one a network call. If it is on, it keeps them and the calls."""
        if not self.on:
            return (yield from states)
        called = time.perf_counter()
        with model.register_forward_hook(self.hear):
            for x in states:
                self.see(x.flatten().tolist(), ms=round(1000 * (time.perf_counter() - called)))
                yield x
                called = time.perf_counter()

    def hear(self, model, inputs, log_p) -> None:
        """The forward hook. A call that sees other than the last state masked something again."""
        x_t, self.log_p = inputs[0].flatten().tolist(), log_p.flatten(0, 1).cpu()
        if x_t != self.state[self.start :]:
            self.phase = "correction" if self.phase else "draft"
            self.see(x_t)
        masked = self.log_p[[id == self.trace["mask"] for id in x_t]][: self.most]
        p, guess = (best.flatten() for best in masked.exp().topk(self.trace["candidates"]))
        self.steps[-1]["guess"] = "".join(map(chr, guess.tolist()))
        self.steps[-1]["p"] = (100 * p).round().int().tolist()

    def see(self, x: list[int], **facts) -> None:
        """Adds the step to x, the characters from the part's start on. With `ms`, a network call
        made it."""
        known, self.state[self.start :] = self.state[self.start :], x
        places = [i for i, id in enumerate(x) if known[i : i + 1] != [id]]
        if facts:
            facts["nats"] = [round(-100 * self.log_p[i, x[i]].item()) for i in places]
        label, to = f"{self.title} · {self.phase}", "".join(chr(x[i]) for i in places)
        places = [self.start + i for i in places]
        self.steps.append({"label": label.strip(" ·"), "set": places, "to": to, **facts})


def command_line(doc: str, fps: int) -> CommandLine:
    """A parser of what the animations with frames know."""
    parser = CommandLine(doc)
    add_model_arguments(parser)
    add = parser.add_argument_group("picture").add_argument
    add("--save", type=partial(picture_path, (".gif", ".html")), help="write a GIF or a page")
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


def show(scenes: Callable[..., Iterable[tuple]], args, **look) -> None:
    """Plays or saves the scenes as the command line asks. `look` is for their page."""
    model = load_for_sampling(args.weights, pick_device(args.device))
    recorder = Recorder(model.config.mask_token_id, **look)
    shots = frames(scenes(model, args, recorder), model.config.mask_token_id)
    if args.save and args.save.suffix.lower() == ".html":
        recorder.on = True
        *_, _ = shots
        with replacing(args.save) as file:
            file.write(page(args.weights, **recorder.trace).encode())
    elif args.save:
        save(shots, args.save, args.fps)
    elif sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        play(shots, args.fps, sys.stdout)
    else:  # a pipe, a file or a terminal that can't redraw gets the last frame as plain text
        *_, last = shots
        print(last.title, *("".join(glyph for glyph, _ in row) for row in last.cells()), sep="\n")


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
    """A stop is a Ctrl-C. A pause gives the cursor back; then frames begin anew, over no `rows`."""

    def pause(number, frame):
        print(SHOWN, end="", file=out, flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        out.write(HIDDEN)
        rows.clear()

    stop = signal.default_int_handler
    for name, handler in {"SIGTERM": stop, "SIGHUP": stop, "SIGTSTP": pause}.items():
        number = getattr(signal, name, None)  # Windows has only the first
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, handler)


def picture(frame: Frame):
    """The frame as a Pillow image."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", size=16)
    width, height, margin = 10, 22, 16  # pixels; a cell of this font fits
    rows, cols = frame.ids.shape
    image = Image.new("RGB", (cols * width + 2 * margin, (rows + 2) * height + margin), BACKGROUND)
    pen = ImageDraw.Draw(image)
    pen.text((margin, margin // 2), frame.title, font=font, fill=TITLE)
    for row, cells in enumerate(frame.cells()):
        for col, (glyph, rgb) in enumerate(cells):
            place = margin + col * width, margin // 2 + int((row + 1.5) * height)
            pen.text(place, glyph.replace("█", "▉"), font=font, fill=rgb)  # with gaps between
    return image


def save(frames: Iterable[Frame], path: Path, fps: float) -> None:
    """One GIF, by Pillow. All frames share a palette, as one for each would triple the size."""
    frames = list(frames)
    shared = max(map(picture, frames[::8]), key=lambda image: len(image.getcolors(1 << 20)))
    shared = shared.quantize(128)
    images = [picture(frame).quantize(palette=shared, dither=0) for frame in frames]
    with replacing(path) as file:
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], loop=0, optimize=True,
                       duration=[round(1000 * frame.hold / fps) for frame in frames])


def page(weights: Path, **trace) -> str:
    """page.html with a trace inside. Without `<`, no text can end the script element."""
    script = f"animations/{Path(sys.argv[0]).name}"
    trace["command"] = shlex.join(["uv", "run", script, *sys.argv[1:]])
    trace["nelbo"] = read_checkpoint(weights)["meta"].get("val_nelbo")
    island = json.dumps(trace, separators=(",", ":")).replace("<", "\\u003c")
    html = Path(__file__).with_name("page.html").read_text("utf-8")
    return html.replace("{}</script>", island + "</script>", 1)
