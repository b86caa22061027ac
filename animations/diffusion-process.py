"""Watch the model turn masked blocks into text, window after window.

    uv run animations/diffusion-process.py
    uv run animations/diffusion-process.py --turns 16
    uv run animations/diffusion-process.py --save animations/animation.gif
    uv run animations/diffusion-process.py --num-blocks 1 --save denoising.html
"""

from dataclasses import replace

import torch

from drawing import Film, Recorder, add_arguments, panel, show
from model import COUNT, CommandLine, pick_device, run
from sample import add_sampler_arguments, draft_and_correct, load_for_sampling, sampler_config


def frames(model, device, config, args, recorder):
    """Each window is denoised after the last characters of the one before."""
    T, mask_token_id = model.config.sequence_len, model.config.mask_token_id
    lookback = min(config.lookback, T // 2)
    film, generator = Film(mask_token_id), torch.Generator().manual_seed(args.seed)
    x = torch.full((1, T), mask_token_id, device=device)
    recorder.begin()
    for block in range(1, args.num_blocks + 1):
        region = x == mask_token_id
        title = f"block {block} of {args.num_blocks}   "
        recorder.part(title.strip(), start=(block - 1) * (T - lookback))
        yield film.frame(panel(x), title + f"{region.sum()} masked")
        step, drafting = 0, True
        states = draft_and_correct(model, x, region, config, generator)
        for x in recorder.watch(model, states):
            step, masked = step + 1, int((x == mask_token_id).sum())
            phase = "draft" if drafting else "correction"
            frame = film.frame(panel(x), f"{title}{phase}   step {step}   {masked} masked")
            yield frame
            drafting = drafting and masked > 0
        yield replace(frame, fresh=torch.zeros_like(frame.fresh), hold=2 * args.fps)
        x = torch.cat((x[:, T - lookback :], x.new_full((1, T - lookback), mask_token_id)), 1)


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add_arguments(parser, fps=8)
    parser.add_argument("--num-blocks", type=COUNT, default=3, help="blocks, a window each")
    add_sampler_arguments(parser)
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    model = load_for_sampling(args.weights, device)
    config = sampler_config(args, model.config.sequence_len)
    recorder = Recorder(model.config.mask_token_id, title="Masked blocks become text")
    show(frames(model, device, config, args, recorder), args, recorder)


if __name__ == "__main__":
    run(main)
