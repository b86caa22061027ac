"""Watch the model turn masked characters into text, block after block.

    uv run animations/diffusion-process.py
    uv run animations/diffusion-process.py --save animations/animation.gif
    uv run animations/diffusion-process.py --save animations/denoising.html
    uv run animations/diffusion-process.py --save animations/order.png      # and order-dark.png

A PNG shows when each character came. One block is what sample.py writes with the same seed.
"""

from drawing import command_line, laid_out, replay, show, wrapped
from model import COUNT, encode_text, start
from sample import add_sampler_arguments, draft_and_correct, sampler_config

import torch  # after drawing.py, which sets what OpenMP reads when torch is loaded

WIDTH = 44  # characters in a line
WORDS = {"given": "all masked", "draft": "draft", "mask": "masked again", "correct": "correction"}


def scenes(model, args, record):
    """Each block is written after the last characters of the one before, the first after an empty
    line, where a speaker begins. It is shown once it is written: its text decides the lines."""
    mask_token_id, T = model.config.mask_token_id, model.config.sequence_len
    config, generator = sampler_config(args, T), torch.Generator().manual_seed(args.seed)
    device = next(model.parameters()).device
    recorder, begin = record(), 0
    known = encode_text("\n\n"[: T - config.block_len], model.config).long()[None].to(device)
    for block in range(1, args.num_blocks + 1):
        x = torch.cat((known, known.new_full((1, config.block_len), mask_token_id)), 1)
        label = f"block {block} of {args.num_blocks}" if args.num_blocks > 1 else ""
        first = len(recorder.steps)
        states = draft_and_correct(model, x, x == mask_token_id, config, generator)
        *_, x = recorder.watch(model, x, states, label, begin)
        yield from pictures(recorder.steps, first, begin, args.fps)
        known = x[:, x.size(1) - min(config.lookback, x.size(1)) :]
        begin += x.size(1) - known.size(1)


def pictures(steps, first, begin, second):
    """The steps from `first` on, of the text from `begin` on; the last one stays for a second."""
    texts = [text[begin:] for text in replay(steps)][first:]
    steps, lines, call = steps[first:], wrapped(texts[-1], WIDTH), 0
    calls = sum("ms" in step for step in steps)
    for step, text in zip(steps, texts, strict=True):
        call += "ms" in step
        title = f"call {call} of {calls}" if "ms" in step else ""
        title = f"{title:22}{WORDS[step['phase']]}"
        yield laid_out(text, lines, WIDTH), title, second if step is steps[-1] else 1


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, fps=5, endings=(".gif", ".html", ".png"))
    parser.add_argument("--num-blocks", type=COUNT, default=1, help="how many blocks to write")
    add_sampler_arguments(parser)
    show(scenes, parser.parse_args(argv), title="Masked characters become text")


if __name__ == "__main__":
    start(main)
