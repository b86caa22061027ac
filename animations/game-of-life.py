"""Conway's Game of Life on a torus of text: live cells are masked, and the model rewrites them.

    uv run animations/game-of-life.py
    uv run animations/game-of-life.py --save life.gif --generations 20
"""

from functools import partial
from itertools import chain

from drawing import command_line, panel, show
from model import COUNT, TEMPERATURE, number, start
from sample import denoise, dilated, uniform

import torch  # after drawing.py, which sets what OpenMP reads when torch is loaded

ROWS, COLS = 20, 64  # of the torus: what a terminal of 80 x 24 shows


def life_step(alive):
    """The next generation: born with three live neighbours, surviving with two or three."""
    cells, around = alive.int(), (-1, 0, 1)
    neighbours = sum(cells.roll((dy, dx), (0, 1)) for dy in around for dx in around) - cells
    return (neighbours == 3) | alive & (neighbours == 2)


def rewrite(model, text, hidden, temperature, calls, generator):
    """The states (rows, cols) in which the model fills the hidden cells of the text, in as many
    `calls`. The grid is read line by line, in the longest equal pieces that fit."""
    x = panel(text.masked_fill(hidden, model.config.mask_token_id), model.config.sequence_len)
    for state in denoise(model, x, partial(dilated, turns=calls), temperature, generator):
        yield state.view(text.shape)


def scenes(model, args, record):
    mask_token_id, device = model.config.mask_token_id, next(model.parameters()).device
    generator = torch.Generator().manual_seed(args.seed)
    blank = torch.full((ROWS, COLS), mask_token_id, device=device)
    for text in rewrite(model, blank, blank == mask_token_id, args.temperature, 64, generator):
        yield text, "writing the field", 1 / 8
    alive = uniform(blank, generator) < args.density
    recorder = record()
    for generation in range(1, args.generations + 1):
        title = f"generation {generation}   {alive.sum()} alive"
        states = rewrite(model, text, alive, args.temperature, args.calls, generator)
        start = text.masked_fill(alive, mask_token_id)
        states = recorder.watch(model, start, states, f"generation {generation}")
        for text in chain([start], states):
            yield text, title, 1
        alive = life_step(alive)


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, fps=8)
    add = parser.add_argument
    add("--generations", type=COUNT, default=60, help="how long to play")
    add("--density", type=number(float, 0, 1), default=0.2, help="share of cells alive at first")
    add("--temperature", type=TEMPERATURE, default=0.8, help="0 takes the likeliest character")
    add("--calls", type=number(int, 1, 10_000), default=4, help="network calls per generation")
    show(scenes, parser.parse_args(argv), title="Life in a field of text", candidates=3,
         columns=COLS, view="grid")


if __name__ == "__main__":
    start(main)
