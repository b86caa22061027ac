"""Watch the model turn masked blocks into text, window after window.

    uv run animations/diffusion-process.py
    uv run animations/diffusion-process.py --save animations/animation.gif
    uv run animations/diffusion-process.py --num-blocks 1 --save denoising.html
"""

from drawing import command_line, panel, show
from model import COUNT, start
from sample import add_sampler_arguments, draft_and_correct, sampler_config

import torch  # after drawing.py, which sets what OpenMP reads when torch is loaded


def scenes(model, args, recorder):
    """Each window is denoised after the last characters of the one before."""
    mask_token_id, T = model.config.mask_token_id, model.config.sequence_len
    config, generator = sampler_config(args, T), torch.Generator().manual_seed(args.seed)
    n_new = T - config.lookback
    x = torch.full((1, T), mask_token_id, device=next(model.parameters()).device)
    recorder.begin()
    for block in range(1, args.num_blocks + 1):
        region, phase = x == mask_token_id, "draft"
        name = f"block {block} of {args.num_blocks}"
        recorder.part(name, start=(block - 1) * n_new)
        yield panel(x), f"{name}   {region.sum()} masked", 1
        states = draft_and_correct(model, x, region, config, generator)
        for call, x in enumerate(recorder.watch(model, states), start=1):
            masked = int((x == mask_token_id).sum())
            title = f"{name}   {phase}   network call {call}   {masked} masked"
            yield panel(x), title, 1
            phase = phase if masked else "correction"
        yield panel(x), title, 2 * args.fps
        x = torch.cat((x[:, n_new:], x.new_full((1, n_new), mask_token_id)), 1)


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, fps=8)
    parser.add_argument("--num-blocks", type=COUNT, default=3, help="how many; each fills a window")
    add_sampler_arguments(parser)
    show(scenes, parser.parse_args(argv), title="Masked blocks become text")


if __name__ == "__main__":
    start(main)
