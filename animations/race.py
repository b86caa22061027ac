"""Left to right against in parallel: same weights, same prompt, one network call a frame for each.

    uv run animations/race.py
    uv run animations/race.py --prompt "ROMEO:" --save animations/race.gif
"""

from dataclasses import replace
from itertools import chain, zip_longest

import torch

from drawing import GAP, Film, Recorder, add_arguments, panel, show
from model import TEMPERATURE, BadInput, CommandLine, encode_text, pick_device, run
from sample import SamplerConfig, draft_and_correct, left_to_right, load_for_sampling


def side_by_side(left, right):
    """Two panels (rows, cols) with a gap of blanks between them."""
    return torch.cat((left, left.new_full((len(left), GAP), ord(" ")), right), 1)


def frames(model, device, args, recorder):
    T, mask_token_id = model.config.sequence_len, model.config.mask_token_id
    prompt = encode_text(args.prompt, model.config)
    if len(prompt) > T:
        raise BadInput(f"the prompt has {len(prompt)} characters, a window {T}")
    x = torch.cat((prompt.long(), torch.full((T - len(prompt),), mask_token_id)))[None].to(device)
    left = SamplerConfig(left_to_right, args.temperature, sweeps=0)
    right = SamplerConfig(temperature=args.parallel_temperature)
    runners = []
    for name, config in ("left to right", left), ("in parallel", right):
        recorder.begin(name)
        states = draft_and_correct(model, x, x == mask_token_id, config,
                                   torch.Generator().manual_seed(args.seed))
        states = chain([x], recorder.watch(model, states))
        runners.append(list(states) if recorder.on else states)  # one after the other, or in turn
    film, texts, calls = Film(mask_token_id), [x, x], [0, 0]
    for states in zip_longest(*runners):
        calls = [n + (state is not None) for n, state in zip(calls, states, strict=True)]
        texts = [old if state is None else state for old, state in zip(texts, states, strict=True)]
        title = f"left to right: {calls[0] - 1} calls   in parallel: {calls[1] - 1} calls"
        frame = film.frame(side_by_side(*(panel(text, 32) for text in texts)), title)
        yield frame
    yield replace(frame, hold=3 * args.fps)


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add_arguments(parser, fps=12)
    add = parser.add_argument
    add("--prompt", default="", help="text that both continue")
    add("--temperature", type=TEMPERATURE, default=0.8, help="of the left-to-right text")
    add("--parallel-temperature", type=TEMPERATURE, default=SamplerConfig.temperature,
        help="of the draft in parallel")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    model = load_for_sampling(args.weights, device)
    recorder = Recorder(model.config.mask_token_id, candidates=3, most=16,
                        title="Left to right against in parallel")
    show(frames(model, device, args, recorder), args, recorder)


if __name__ == "__main__":
    run(main)
