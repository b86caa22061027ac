"""Conway's Game of Life on a torus of characters: live cells are masked, and the model rewrites them.

    uv run animations/game-of-life.py
    uv run animations/game-of-life.py --save life.gif --generations 20
"""

import torch

from drawing import Frame, add_arguments, show
from sample import CommandLine, decode, load_for_sampling, number, pick_device, run, top_k

SIDE = 32


def life_step(alive: torch.Tensor) -> torch.Tensor:
    """The next generation on a torus: born with three live neighbours, staying alive with two or three."""
    neighbours = sum(
        alive.int().roll((dy, dx), dims=(0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)
    )
    return (neighbours == 3) | alive & (neighbours == 2)


def rewrite(model, text, hidden, seed, temperature, calls):
    """The states (SIDE, SIDE) in which the model fills the hidden cells of the text, in about `calls`
    network calls. The grid is read line by line and cut into the longest equal pieces that fit the model."""
    config = model.config
    length = max(n for n in range(1, config.sequence_len + 1) if text.numel() % n == 0)
    x = text.masked_fill(hidden, config.mask_token_id).view(-1, length)
    per_call = max(1, -(-int((x == config.mask_token_id).sum(1).max()) // calls))
    for state in decode(model, x, lambda proposal: top_k(proposal, per_call), temperature, seed):
        yield state.view(text.shape)


def frames(model, device, args):
    mask_token_id = model.config.mask_token_id
    blank = torch.full((SIDE, SIDE), mask_token_id, device=device)
    *_, text = rewrite(model, blank, blank == mask_token_id, args.seed, args.temperature, calls=64)
    generator = torch.Generator().manual_seed(args.seed)
    alive = (torch.rand(SIDE, SIDE, generator=generator) < args.density).to(device)
    for generation in range(args.generations):
        before = alive
        for text in rewrite(model, text, alive, args.seed + 1 + generation, args.temperature, args.calls):
            masked = text == mask_token_id
            yield Frame(text.cpu(), masked.cpu(), (before & ~masked).cpu(),
                        f"generation {generation}   {int(alive.sum())} alive   {int(masked.sum())} masked")
            before = masked
        alive = life_step(alive)


def main():
    parser = CommandLine(__doc__)
    add_arguments(parser, fps=8)
    parser.add_argument("--generations", type=number(int, least=1), default=60, help="how long to play")
    parser.add_argument("--density", type=number(float, least=0, most=1), default=0.2, help="share of cells alive at the start")
    parser.add_argument("--temperature", type=number(float, least=0), default=0.6, help="0 always takes the likeliest character")
    parser.add_argument("--calls", type=number(int, least=1), default=4, help="network calls a generation")
    args = parser.parse_args()
    device = pick_device(args.device)
    model = load_for_sampling(args.weights, device)
    show(frames(model, device, args), args)


if __name__ == "__main__":
    run(main)
