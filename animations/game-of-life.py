"""Conway's Game of Life on a torus of text: live cells are masked, and the model rewrites them.

    uv run animations/game-of-life.py
    uv run animations/game-of-life.py --save life.gif --generations 20
"""

from functools import partial

import torch

from drawing import Film, Recorder, add_arguments, show
from model import COUNT, TEMPERATURE, CommandLine, number, pick_device, run
from sample import denoise, dilated, load_for_sampling

ROWS, COLS = 20, 64  # of the torus: what a terminal of 80 x 24 shows


def life_step(alive):
    """The next generation: born with three live neighbours, surviving with two or three."""
    neighbours = sum(
        alive.int().roll((dy, dx), dims=(0, 1))
        for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)
    )
    return (neighbours == 3) | alive & (neighbours == 2)


def rewrite(model, text, hidden, temperature, calls, generator):
    """The states (rows, cols) in which the model fills the hidden cells of the text, in as many
    `calls`. The grid is read line by line, in the longest equal pieces that fit."""
    T = model.config.sequence_len
    length = max(n for n in range(1, T + 1) if text.numel() % n == 0)
    x = text.masked_fill(hidden, model.config.mask_token_id).view(-1, length)
    for state in denoise(model, x, partial(dilated, turns=calls), temperature, generator):
        yield state.view(text.shape)


def frames(model, device, args, recorder):
    mask_token_id = model.config.mask_token_id
    film, generator = Film(mask_token_id), torch.Generator().manual_seed(args.seed)
    blank = torch.full((ROWS, COLS), mask_token_id, device=device)
    *_, text = rewrite(model, blank, blank == mask_token_id, args.temperature, 64, generator)
    alive = (torch.rand(blank.shape, generator=generator) < args.density).to(device)
    recorder.begin()
    for generation in range(1, args.generations + 1):
        recorder.part(f"generation {generation}")
        title = f"generation {generation}   {alive.sum()} alive   "
        yield film.frame(text.masked_fill(alive, mask_token_id), title + f"{alive.sum()} masked")
        states = rewrite(model, text, alive, args.temperature, args.calls, generator)
        for text in recorder.watch(model, states):
            yield film.frame(text, title + f"{(text == mask_token_id).sum()} masked")
        alive = life_step(alive)


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add_arguments(parser, fps=8)
    add = parser.add_argument
    add("--generations", type=COUNT, default=60, help="how long to play")
    add("--density", type=number(float, 0, 1), default=0.2,
        help="share of the cells that are alive at the start")
    add("--temperature", type=TEMPERATURE, default=0.8,
        help="0 always takes the likeliest character")
    add("--calls", type=COUNT, default=4, help="network calls per generation")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    model = load_for_sampling(args.weights, device)
    recorder = Recorder(model.config.mask_token_id, candidates=3,
                        title="Life in a field of text", columns=COLS, view="grid")
    show(frames(model, device, args, recorder), args, recorder)


if __name__ == "__main__":
    run(main)
