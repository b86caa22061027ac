"""Left to right against in parallel: same weights, same prompt, one network call a frame for each.

    uv run animations/race.py
    uv run animations/race.py --prompt "ROMEO:" --save animations/race.gif
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from drawing import GAP, Frame, add_arguments, panel_shape, room, show
from model import TEMPERATURE, BadInput, CommandLine, encode_text, pick_device, run
from sample import (
    CallCounter,
    SamplerConfig,
    draft_and_correct,
    left_to_right,
    load_for_sampling,
    row_generators,
)

import torch


class Runner:
    """One side of the race; `x` is its text so far, after `calls` calls and `seconds` of work."""

    def __init__(self, name: str, states: Iterator[torch.Tensor], counter: CallCounter):
        self.name, self.states, self.counter = name, states, counter
        self.x, self.calls, self.seconds, self.finished = next(states), 0, 0.0, False

    def run_one_call(self) -> None:
        """To the state after the next network call, if there is one."""
        started, before = time.perf_counter(), self.counter.n
        for x in self.states:
            self.x = x
            if self.counter.n > before:
                self.calls += 1
                self.seconds += time.perf_counter() - started
                return
        self.finished = True

    def title(self) -> str:
        return f"{self.name}: {self.calls} calls, {self.seconds:.1f} s"


def side_by_side(left: torch.Tensor, right: torch.Tensor, between: int) -> torch.Tensor:
    """Two panels (rows, cols) with a gap of one value between them."""
    return torch.cat((left, torch.full_like(left[:, :1], between).expand(-1, GAP), right), 1)


def frames(model, device, args) -> Iterator[Frame]:
    config = model.config
    shape = panel_shape(config.sequence_len, *room(args), panels=2)
    prompt = encode_text(args.prompt, config.vocab_size, config.mask_token_id)
    if len(prompt) > config.sequence_len:
        raise BadInput(f"the prompt has {len(prompt)} characters, a window {config.sequence_len}")
    x = torch.full((1, config.sequence_len), config.mask_token_id)
    x[0, : len(prompt)] = prompt
    x = x.to(device)
    counter = CallCounter()
    model.register_forward_hook(counter)
    ways = {
        "left to right": SamplerConfig(partial(left_to_right, k=1), args.temperature, sweeps=0),
        "in parallel": SamplerConfig(temperature=args.temperature),
    }
    runners = [
        Runner(name, draft_and_correct(model, x, way, row_generators(args.seed, 1)), counter)
        for name, way in ways.items()
    ]
    before = [runner.x.view(shape).cpu() for runner in runners]
    while not all(runner.finished for runner in runners):
        after = [runner.x.view(shape).cpu() for runner in runners]
        masked = [text == config.mask_token_id for text in after]
        fresh = [text != old for text, old in zip(after, before, strict=True)]
        frame = Frame(
            side_by_side(*after, between=ord(" ")), side_by_side(*masked, between=False),
            side_by_side(*fresh, between=False) & ~side_by_side(*masked, between=False),
            "   ".join(runner.title() for runner in runners),
        )
        yield frame
        before = after
        for runner in runners:
            runner.run_one_call()
    yield replace(frame, hold=3 * args.fps)


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add_arguments(parser, fps=12)
    parser.add_argument("--prompt", default="", help="text that both continue")
    parser.add_argument("--temperature", type=TEMPERATURE, default=SamplerConfig.temperature,
                        help="of the left-to-right text, and of the parallel draft")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    model = load_for_sampling(args.weights, device)
    show(frames(model, device, args), args)


if __name__ == "__main__":
    run(main)
