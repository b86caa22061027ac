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


def scenes(model, args, recorder):
    mask_token_id, T = model.config.mask_token_id, model.config.sequence_len
    prompt = encode_text(args.prompt, model.config)
    if len(prompt) > T:
        raise BadInput(f"the prompt has {len(prompt)} characters, a window {T}")
    x = torch.full((1, T), mask_token_id, device=next(model.parameters()).device)
    x[0, : len(prompt)] = prompt
    left = SamplerConfig(left_to_right, args.temperature, sweeps=0)
    right = SamplerConfig(temperature=args.parallel_temperature)
    runners = []
    for name, config in ("left to right", left), ("in parallel", right):
        recorder.begin(name)
        generator = torch.Generator().manual_seed(args.seed)
        states = draft_and_correct(model, x, x == mask_token_id, config, generator)
        states = enumerate(chain([x], recorder.watch(model, states)))
        runners.append(list(states) if recorder.on else states)  # one after the other, or in turn
    last = [None, None]
    for states in zip_longest(*runners):
        last = [new or old for new, old in zip(states, last, strict=True)]
        (m, left), (n, right) = last
        title = f"network calls   left to right, no cache: {m}   in parallel: {n}"
        left, right = panel(left, 32), panel(right, 32)
        ids = torch.cat((left, left.new_full((len(left), 4), ord(" ")), right), 1)
        yield ids, title, 1
    yield ids, title, 3 * args.fps


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, fps=12)
    add = parser.add_argument
    add("--prompt", default="", help="text that both continue")
    add("--temperature", type=TEMPERATURE, default=0.8, help="of the left-to-right text")
    add("--parallel-temperature", type=TEMPERATURE, default=SamplerConfig.temperature,
        help="of the text in parallel")
    show(scenes, parser.parse_args(argv), title="Left to right against in parallel", candidates=3,
         most=16)


if __name__ == "__main__":
    start(main)
