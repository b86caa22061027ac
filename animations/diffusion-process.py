"""Watch the model turn masked blocks into text, block after block.

    uv run animations/diffusion-process.py
    uv run animations/diffusion-process.py --window
    uv run animations/diffusion-process.py --save animations/animation.gif
"""

from dataclasses import replace

import torch

from drawing import add_arguments, frames_of, show
from sample import CommandLine, add_decoding_arguments, complete, load_for_sampling, number, pick_decoding, pick_device, run


def frames(model, device, decoding, args):
    """Each block is decoded after the last context_len characters of the one before."""
    config = model.config
    cols = 64 if config.sequence_len % 64 == 0 else config.sequence_len
    shape = (config.sequence_len // cols, cols)
    x = torch.full((1, config.sequence_len), config.mask_token_id, device=device)
    for block in range(args.num_blocks):
        states = complete(model, x, decoding, torch.tensor([args.seed + block], device=device))
        for frame in frames_of(states, config.mask_token_id, shape, f"block {block + 1} of {args.num_blocks}"):
            yield frame
        yield replace(frame, fresh=torch.zeros_like(frame.fresh), hold=2 * args.fps)
        context = frame.ids.flatten()[config.sequence_len - config.context_len :]
        x = torch.full_like(x, config.mask_token_id)
        x[0, : config.context_len] = context.to(device)


def main():
    parser = CommandLine(__doc__)
    add_arguments(parser, fps=12)
    parser.add_argument("--num-blocks", type=number(int, least=1), default=3, help="blocks of text to write")
    add_decoding_arguments(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    model = load_for_sampling(args.weights, device)
    show(frames(model, device, pick_decoding(args), args), args)


if __name__ == "__main__":
    run(main)
