"""Conway's Game of Life on a torus of text: live cells are masked, and the model rewrites them.

    uv run animations/game-of-life.py
    uv run animations/game-of-life.py --save life.gif --generations 20
"""

from functools import partial

from drawing import Frame, add_arguments, room, show
from model import COUNT, TEMPERATURE, BadInput, CommandLine, number, pick_device, run
from sample import denoise, load_for_sampling, row_generators, top_k

import torch

SIDE = 32  # of the torus, where there is room for it


def life_step(alive: torch.Tensor) -> torch.Tensor:
    """The next generation: born with three live neighbours, surviving with two or three."""
    neighbours = sum(
        alive.int().roll((dy, dx), dims=(0, 1))
        for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)
    )
    return (neighbours == 3) | alive & (neighbours == 2)


def rewrite(model, text, hidden, temperature, calls, seed):
    """The states (rows, cols) in which the model fills the hidden cells of the text, in about
    `calls` network calls. The grid is read line by line, in the longest equal pieces that fit."""
    config = model.config
    length = max(n for n in range(1, config.sequence_len + 1) if text.numel() % n == 0)
    x = text.masked_fill(hidden, config.mask_token_id).view(-1, length)
    per_call = max(1, -(-int((x == config.mask_token_id).sum(1).max()) // calls))
    rule = partial(top_k, k=per_call)
    for state in denoise(model, x, rule, temperature, row_generators(seed, len(x))):
        yield state.view(text.shape)


def frames(model, device, args):
    mask_token_id = model.config.mask_token_id
    rows, cols = room(args)
    if min(rows, cols) < 3:
        raise BadInput(f"a terminal of {cols} x {rows + 2} is too small; 3 x 5 is the least")
    blank = torch.full((min(SIDE, rows), min(SIDE, cols)), mask_token_id, device=device)
    *_, text = rewrite(model, blank, blank == mask_token_id, args.temperature, 64, args.seed)
    u = torch.rand(blank.shape, generator=torch.Generator().manual_seed(args.seed))
    alive = (u < args.density).to(device)
    for generation in range(1, args.generations + 1):
        before = alive
        seed = args.seed + generation * text.numel()  # a row is at most one cell
        for state in rewrite(model, text, alive, args.temperature, args.calls, seed):
            masked = state == mask_token_id
            title = f"generation {generation}   {alive.sum()} alive   {masked.sum()} masked"
            yield Frame(state.cpu(), masked.cpu(), (before & ~masked).cpu(), title)
            before = masked
        text, alive = state, life_step(alive)


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add_arguments(parser, fps=8)
    add = parser.add_argument
    add("--generations", type=COUNT, default=60, help="how long to play")
    add("--density", type=number(float, least=0, most=1), default=0.2,
        help="share of the cells that are alive at the start")
    add("--temperature", type=TEMPERATURE, default=0.6,
        help="0 always takes the likeliest character")
    add("--calls", type=COUNT, default=4, help="network calls per generation")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    model = load_for_sampling(args.weights, device)
    show(frames(model, device, args), args)


if __name__ == "__main__":
    run(main)
