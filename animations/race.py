"""Left to right against in parallel: same weights, same prompt, one network call a frame for each.

    uv run animations/race.py
    uv run animations/race.py --prompt "ROMEO:" --save animations/race.gif

This counts calls, each of the whole window. A model made for left to right caches what it has read,
so its calls cost less, and a race in seconds is much closer: see tests/benchmarks/speed.md.
"""

from itertools import chain, zip_longest

from drawing import command_line, panel, show
from model import TEMPERATURE, BadInput, encode_text, start
from sample import SamplerConfig, draft_and_correct, left_to_right

import torch  # after drawing.py, which sets what OpenMP reads when torch is loaded
import torch.nn.functional as F

WIDTH, BETWEEN = 32, 4  # columns of each text, and between the two


def columns(x):
    """The text x (1, N) in lines of WIDTH, (rows, WIDTH)."""
    return panel(F.pad(x, (0, -x.size(1) % WIDTH), value=ord(" ")), WIDTH)


def scenes(model, args, record):
    mask_token_id, T = model.config.mask_token_id, model.config.sequence_len
    prompt = encode_text(args.prompt or "\n\n", model.config).long()[None]
    if prompt.size(1) > T:
        raise BadInput(f"the prompt has {prompt.size(1)} characters, a window {T}")
    n_new = min(SamplerConfig.block_len, T - prompt.size(1))
    x = torch.cat((prompt, prompt.new_full((1, n_new), mask_token_id)), 1)
    x = x.to(next(model.parameters()).device)
    unseen = 0 if args.prompt else 2  # text begins where a speaker does
    left = SamplerConfig(left_to_right, args.temperature, sweeps=0)
    right = SamplerConfig(temperature=args.parallel_temperature)
    runners = []
    for name, config in ("left to right", left), ("in parallel", right):
        generator = torch.Generator().manual_seed(args.seed)
        states = draft_and_correct(model, x, x == mask_token_id, config, generator)
        runners.append(enumerate(chain([x], record(name).watch(model, x, states))))
    last = [None, None]
    for states in zip_longest(*runners):
        last = [new or old for new, old in zip(states, last, strict=True)]
        (m, left), (n, right) = last
        title = f"left to right: {m} calls".ljust(WIDTH + BETWEEN) + f"in parallel: {n} calls"
        left, right = columns(left[:, unseen:]), columns(right[:, unseen:])
        ids = torch.cat((F.pad(left, (0, BETWEEN), value=ord(" ")), right), 1)
        yield ids, title, 1 if states[1] else 1 / 4  # faster, once one of them waits
    yield ids, title, 3 * args.fps


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, fps=12)
    add = parser.add_argument
    add("--prompt", default="", help="text that both continue; without one, a speaker begins")
    add("--temperature", type=TEMPERATURE, default=0.8, help="of the left-to-right text")
    add("--parallel-temperature", type=TEMPERATURE, default=SamplerConfig.temperature,
        help="of the text in parallel")
    show(scenes, parser.parse_args(argv), title="Left to right against in parallel", candidates=3,
         most=16)


if __name__ == "__main__":
    start(main)
