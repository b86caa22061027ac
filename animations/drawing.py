"""Frames of masked text, and the three ways to show them: terminal, window, file.

The animations turn the states of the denoising loop into `Frame`s and hand them to `show`.
"""

import os
import shutil
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # model.py, sample.py
from model import BadInput, CommandLine, number  # noqa: E402
from sample import add_model_arguments  # noqa: E402

import torch  # noqa: E402

# One palette for the terminal and for pictures: (red, green, blue)
BACKGROUND = (16, 20, 31)
TITLE = (122, 136, 166)
BLOCK = (44, 56, 84)        # a masked cell
FRESH = (255, 196, 84)      # unmasked in this step
CALM = (208, 214, 226)      # unmasked earlier
FAINT = (70, 82, 108)       # line ends

GAP = 4  # columns between panels side by side


@dataclass
class Frame:
    ids: torch.Tensor     # (rows, cols) character ids
    masked: torch.Tensor  # (rows, cols) bool
    fresh: torch.Tensor   # (rows, cols) bool: unmasked since the frame before
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


def glyphs(ids: torch.Tensor) -> list[str]:
    """One visible cell for each of the ids (n,): a line end becomes an arrow, anything else that
    can't be shown a dot. A character of several bytes takes the cell of its first, and dots."""
    cells = []
    for character in bytes(ids.tolist()).decode("utf-8", errors="surrogateescape"):
        visible = "↵" if character == "\n" else character if character.isprintable() else "·"
        n_bytes = len(character.encode("utf-8", errors="surrogateescape"))
        cells += [visible, *"·" * (n_bytes - 1)]
    return cells


def frames_of(
    states: Iterable[torch.Tensor], mask_token_id: int, shape: tuple[int, int], title: str
) -> Iterator[Frame]:
    """The states (B, T) of one denoising as frames of `shape` (rows, columns), B * T cells."""
    before = None
    for step, x in enumerate(states):
        x = x.cpu().view(shape)
        masked = x == mask_token_id
        fresh = torch.zeros_like(masked) if before is None else before & ~masked
        yield Frame(x, masked, fresh, f"{title}   step {step}   {int(masked.sum())} masked")
        before = masked


def add_arguments(parser: CommandLine, fps: int) -> None:
    add_model_arguments(parser)
    group = parser.add_argument_group("picture")
    group.add_argument("--window", action="store_true", help="play in a matplotlib window")
    group.add_argument("--save", type=picture_path, help="write PATH.gif, or PATH.png as one "
                       "numbered file per frame; needs no display")
    group.add_argument("--fps", type=number(float, least=0.1, most=50), default=fps,
                       help="frames per second")


def picture_path(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".gif", ".png"):
        raise ArgumentTypeError(f"{text!r}: the name has to end in .gif or .png")
    if not path.parent.is_dir():
        raise ArgumentTypeError(f"{text!r}: there is no folder {path.parent}")
    try:
        probe = path.with_name(path.name + ".tmp")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ArgumentTypeError(f"{text!r}: cannot be written ({error.strerror})") from error
    return path


def room(args) -> tuple[int, int]:
    """Rows and columns that a frame may have where `args` show it: without limit but in a terminal,
    where a line goes to the title and one to the cursor."""
    if args.save or args.window or not animates(sys.stdout):
        return sys.maxsize, sys.maxsize
    cols, lines = shutil.get_terminal_size()
    return lines - 2, cols


def panel_shape(n: int, rows: int, cols: int, panels: int = 1) -> tuple[int, int]:
    """Rows and columns of each of the panels side by side, n characters each: the widest lines, up
    to 64 in all, that fill a rectangle which fits into the room. BadInput where none does."""
    gaps = GAP * (panels - 1)
    for width in range(min(n, (min(cols, 64 + gaps) - gaps) // panels), 0, -1):
        if n % width == 0 and n // width <= rows:
            return n // width, width
    raise BadInput(f"a terminal of {cols} x {rows + 2} is too small for {panels} x {n} characters")


def animates(out) -> bool:
    """Whether the stream is a terminal that can redraw."""
    return out.isatty() and os.environ.get("TERM") != "dumb"


def show(frames: Iterable[Frame], args) -> None:
    """Plays or saves the frames as the command line asks."""
    if args.save:
        save(frames, args.save, args.fps)
    elif args.window:
        play_in_window(frames, args.fps)
    else:
        play_in_terminal(frames, args.fps)


def play_in_terminal(frames: Iterable[Frame], fps: float, out=None) -> None:
    """Redraws in place with ANSI colours, unless NO_COLOR is set. A pipe, a file or a terminal that
    can't redraw gets the last frame alone, as plain text."""
    out = out or sys.stdout
    if not animates(out):
        *_, last = frames
        rows = ("".join(glyph for glyph, _ in row) for row in last.cells())
        out.write("\n".join([last.title, *rows]) + "\n")
        return
    out.write("\x1b[?25l")  # hide the cursor
    try:
        height = 0
        for frame in frames:
            title = frame.title[: shutil.get_terminal_size().columns]
            rows = [[(title, TITLE)], *frame.cells()]
            lines = ["".join(colour(rgb) + glyph for glyph, rgb in row) for row in rows]
            out.write(f"\x1b[{height}F" if height else "")  # up to the first line
            out.write("".join(f"{line}\x1b[0m\x1b[K\n" for line in lines))
            out.flush()
            height = len(lines)
            time.sleep(frame.hold / fps)
    finally:
        out.write("\x1b[0m\x1b[?25h")
        out.flush()


def colour(rgb: tuple[int, int, int]) -> str:
    """The ANSI sequence that switches to a colour; nothing where the user wants none."""
    return "" if os.environ.get("NO_COLOR") else "\x1b[38;2;{};{};{}m".format(*rgb)


def draw(frame: Frame, size: int = 16):
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


def play_in_window(frames: Iterable[Frame], fps: float) -> None:
    plt = pyplot_with_window()
    frames = iter(frames)
    first = next(frames)
    image = draw(first)
    figure = plt.figure(figsize=(image.width / 100, image.height / 100), dpi=100, frameon=False)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    canvas = axes.imshow(image)
    for frame in chain([first], frames):
        if not plt.fignum_exists(figure.number):  # the user closed it
            return
        canvas.set_data(draw(frame))
        plt.pause(frame.hold / fps)
    plt.show()


def pyplot_with_window():
    """matplotlib.pyplot; BadInput where it has no display to open a window on."""
    import matplotlib.pyplot as plt

    if plt.get_backend().lower() == "agg":
        raise BadInput("--window: there is no display here; use --save PATH, or neither")
    return plt


def shared_palette():
    """A Pillow palette for all frames, as one for each would triple the size of a GIF: our colours,
    and six shades of each towards the background, for the edges of glyphs."""
    from PIL import Image

    shades = [
        round(back + (full - back) * step / 6)
        for rgb in (TITLE, BLOCK, FRESH, CALM, FAINT) for step in range(7)
        for back, full in zip(BACKGROUND, rgb, strict=True)
    ]
    palette = Image.new("P", (1, 1))
    palette.putpalette(shades)
    return palette


def save(frames: Iterable[Frame], path: Path, fps: float) -> None:
    """One GIF, or numbered PNG files beside `path`, by Pillow."""
    frames = list(frames)
    if path.suffix.lower() == ".png":
        for i, frame in enumerate(frames):
            draw(frame).save(path.with_name(f"{path.stem}-{i:04d}.png"))
        return
    palette = shared_palette()
    images = [draw(frame).quantize(palette=palette, dither=0) for frame in frames]
    durations = [round(1000 * frame.hold / fps) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0,
                   optimize=True)
