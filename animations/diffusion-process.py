"""Watch the model turn masked blocks into text, block after block.

    uv run animations/diffusion-process.py
    uv run animations/diffusion-process.py --window
    uv run animations/diffusion-process.py --save animations/animation.gif
"""

from dataclasses import replace

from drawing import add_arguments, frames_of, panel_shape, room, show
from model import COUNT, CommandLine, pick_device, run
from sample import (
    add_sampler_arguments,
    draft_and_correct,
    load_for_sampling,
    row_generators,
    sampler_config,
)

import torch


def frames(model, device, config, args):
    """Each block is denoised after the last context_len characters of the one before."""
    T, context_len, mask_token_id = (
        model.config.sequence_len, model.config.context_len, model.config.mask_token_id
    )
    shape = panel_shape(T, *room(args))
    generators = row_generators(args.seed, 1)
    x = torch.full((1, T), mask_token_id, device=device)
    for block in range(args.num_blocks):
        states = draft_and_correct(model, x, config, generators)
        title = f"block {block + 1} of {args.num_blocks}"
        for frame in frames_of(states, mask_token_id, shape, title):
            yield frame
        yield replace(frame, fresh=torch.zeros_like(frame.fresh), hold=2 * args.fps)
        x = torch.full_like(x, mask_token_id)
        x[0, :context_len] = frame.ids.flatten()[T - context_len :].to(device)


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add_arguments(parser, fps=12)
    parser.add_argument("--num-blocks", type=COUNT, default=3, help="blocks of text to write")
    add_sampler_arguments(parser)
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    model = load_for_sampling(args.weights, device)
    show(frames(model, device, sampler_config(args), args), args)


if __name__ == "__main__":
    run(main)
