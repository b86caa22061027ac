"""Frames of masked text, and the ways to show them: in the terminal, as a GIF, or as a page.

The animations turn the states of the denoising loop into `Frame`s and hand them to `show`.
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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # model.py, sample.py
import torch

from model import CommandLine, number, read_checkpoint, replacing
from sample import add_model_arguments

# One palette for the terminal and for pictures: (red, green, blue)
BACKGROUND = (16, 20, 31)
TITLE = (122, 136, 166)
BLOCK = (44, 56, 84)        # a masked cell
FRESH = (255, 196, 84)      # changed in this step
CALM = (208, 214, 226)      # settled earlier
FAINT = (70, 82, 108)       # line ends

GAP = 4  # columns between panels side by side
HIDDEN, SHOWN = "\x1b[?25l\x1b[?7l", "\x1b[0m\x1b[?25h\x1b[?7h"  # the cursor; lines wrap or not


@dataclass
class Frame:
    ids: torch.Tensor     # (rows, cols) character ids
    masked: torch.Tensor  # (rows, cols) bool
    fresh: torch.Tensor   # (rows, cols) bool: characters that the step changed
    title: str
    hold: float = 1.0     # how many ordinary frames this one lasts

    def cells(self) -> Iterator[list[tuple[str, tuple[int, int, int]]]]:
        """Row by row, the glyph and the colour of each cell."""
        rows, cols = self.ids.shape
        masked, fresh = self.masked.flatten().tolist(), self.fresh.flatten().tolist()
        cells = []
        for glyph, hidden, new in zip(glyphs(self.ids.flatten()), masked, fresh, strict=True):
            known = FRESH if new else FAINT if glyph == "↵" else CALM
            cells.append(("█", BLOCK) if hidden else (glyph, known))
        for row in range(rows):
            yield cells[row * cols : (row + 1) * cols]


def glyphs(ids) -> list[str]:
    """One visible cell for each of the ids (n,): a line end becomes an arrow, anything else that
    can't be shown a dot. A character of several bytes takes the cell of its first, and dots."""
    cells = []
    for character in bytes(ids.tolist()).decode("utf-8", errors="surrogateescape"):
        visible = "↵" if character == "\n" else character if character.isprintable() else "·"
        n_bytes = len(character.encode("utf-8", errors="surrogateescape"))
        cells += [visible, *"·" * (n_bytes - 1)]
    return cells


class Film:
    """Makes frames of the states of a text: it knows which characters a state changed."""

    def __init__(self, mask_token_id: int):
        self.mask_token_id, self.last = mask_token_id, None

    def frame(self, ids: torch.Tensor, title: str) -> Frame:
        """ids (rows, cols). Fresh is a character that differs from the last one seen there: what a
        correction masks and confirms is not."""
        ids = ids.cpu()
        masked = ids == self.mask_token_id
        last = torch.where(masked, 0, ids) if self.last is None else self.last
        fresh = ~masked & (ids != last)
        self.last = torch.where(masked, last, ids)
        return Frame(ids, masked, fresh, title)


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
        """Adds a step to x, the characters from the part's start on; by a call if `ms` is given."""
        known, self.state[self.start :] = self.state[self.start :], x
        places = [i for i, id in enumerate(x) if known[i : i + 1] != [id]]
        if facts:
            facts["nats"] = [round(-100 * self.log_p[i, x[i]].item()) for i in places]
        label, to = f"{self.title} · {self.phase}", "".join(chr(x[i]) for i in places)
        places = [self.start + i for i in places]
        self.steps.append({"label": label.strip(" ·"), "set": places, "to": to, **facts})


def add_arguments(parser: CommandLine, fps: int) -> None:
    add_model_arguments(parser)
    add = parser.add_argument_group("picture").add_argument
    add("--save", type=picture_path(".gif", ".html"), help="write a GIF or page; needs no display")
    add("--fps", type=number(float, 0.1, 50), default=fps, help="frames per second")


def picture_path(*endings: str):
    """An argparse type: a path with one of these endings, in a folder that can be written."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in endings:
            wanted = " or ".join(endings)
            raise argparse.ArgumentTypeError(f"{text!r}: the name has to end in {wanted}")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"{text!r}: cannot be written")
        return path

    return parse


def panel(x, width: int = 64):
    """A text (1, T) as a rectangle (rows, cols), in the widest equal lines of at most `width`."""
    T = x.size(1)
    return x.view(-1, max(n for n in range(1, min(T, width) + 1) if T % n == 0))


def show(frames: Iterable[Frame], args, recorder: Recorder) -> None:
    """Plays or saves the frames as the command line asks."""
    if args.save and args.save.suffix.lower() == ".html":
        recorder.on = True
        *_, _ = frames
        with replacing(args.save) as file:
            file.write(page(args.weights, **recorder.trace).encode())
    elif args.save:
        save(frames, args.save, args.fps)
    elif sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        play(frames, args.fps, sys.stdout)
    else:  # a pipe, a file or a terminal that can't redraw gets the last frame as plain text
        *_, last = frames
        rows = ("".join(glyph for glyph, _ in row) for row in last.cells())
        print("\n".join([last.title, *rows]))


def play(frames: Iterable[Frame], fps: float, out) -> None:
    """Redraws in place with ANSI colours, unless NO_COLOR is set. A terminal that became too narrow
    or too low shows what fits."""
    with terminal(out):
        height = 0
        for frame in frames:
            cols, lines = shutil.get_terminal_size()
            rows = [[(glyph, TITLE) for glyph in frame.title], *frame.cells()][: lines - 1]
            out.write(f"\x1b[{height}F" if height else "")  # up to the first line
            for row in rows:
                for rgb, run in itertools.groupby(row[:cols], key=lambda cell: cell[1]):
                    out.write(colour(rgb) + "".join(glyph for glyph, _ in run))
                out.write("\x1b[0m\x1b[K\n")
            out.write("\x1b[J")
            out.flush()
            height = len(rows)
            time.sleep(frame.hold / fps)


@contextmanager
def terminal(out) -> Iterator[None]:
    """Inside, the cursor is hidden and lines do not wrap. Gives both back in the end, and when a
    signal stops or pauses the process."""

    def stop(number, frame):
        raise KeyboardInterrupt

    def pause(number, frame):
        out.write(SHOWN)
        out.flush()
        os.kill(os.getpid(), signal.SIGSTOP)
        out.write(HIDDEN)

    for name, handler in {"SIGTERM": stop, "SIGHUP": stop, "SIGTSTP": pause}.items():
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)
    out.write(HIDDEN)
    try:
        yield
    finally:
        out.write(SHOWN)
        out.flush()


def colour(rgb: tuple[int, int, int]) -> str:
    """The ANSI sequence that switches to a colour; nothing where the user wants none."""
    return "" if os.environ.get("NO_COLOR") else "\x1b[38;2;{};{};{}m".format(*rgb)


def picture(frame: Frame, size: int = 16):
    """The frame as a Pillow image. `size` is the font's height in pixels."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    path = Path(get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")
    font = ImageFont.truetype(str(path), size)
    width, height, margin = round(font.getlength("M")), round(1.35 * size), size
    rows, cols = frame.ids.shape
    image = Image.new("RGB", (cols * width + 2 * margin, (rows + 2) * height + margin), BACKGROUND)
    pen = ImageDraw.Draw(image)
    pen.text((margin, margin // 2), frame.title, font=font, fill=TITLE)
    for row, cells in enumerate(frame.cells()):
        for col, (character, rgb) in enumerate(cells):
            left, top = margin + col * width, margin // 2 + int((row + 1.5) * height)
            if character == "█":
                pen.rectangle((left + 1, top + 2, left + width - 2, top + height - 3), fill=rgb)
            else:
                pen.text((left, top), character, font=font, fill=rgb)
    return image


def save(frames: Iterable[Frame], path: Path, fps: float) -> None:
    """One GIF, by Pillow. All frames share a palette, as one for each would triple the size."""
    frames = list(frames)
    shared = max(map(picture, frames[::8]), key=lambda image: len(image.getcolors(1 << 20)))
    shared = shared.quantize(128)
    images = [picture(frame).quantize(palette=shared, dither=0) for frame in frames]
    durations = [round(1000 * frame.hold / fps) for frame in frames]
    with replacing(path) as file:
        images[0].save(file, format="GIF", save_all=True, append_images=images[1:], loop=0,
                       duration=durations, optimize=True)


def page(weights: Path, **trace) -> str:
    """page.html with a trace inside. Without `<`, no text can end the script element."""
    script = f"animations/{Path(sys.argv[0]).name}"
    trace["command"] = shlex.join(["uv", "run", script, *sys.argv[1:]])
    trace["nelbo"] = read_checkpoint(weights)["meta"].get("val_nelbo")
    island = json.dumps(trace, separators=(",", ":")).replace("<", "\\u003c")
    with open(Path(__file__).with_name("page.html"), encoding="utf-8") as file:
        return file.read().replace("{}</script>", island + "</script>", 1)
