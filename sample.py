"""Write text with the diffusion model, or fill the gaps of a given text.

    uv run sample.py                                  # 7,600 characters, streamed
    uv run sample.py --prompt "ROMEO:" --num-blocks 4
    uv run sample.py --infill "To be, or ___ to be"
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads must not spin on busy cores

import argparse
import codecs
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from model import (
    COUNT, DEFAULT_WEIGHTS, SEED, TEMPERATURE, BadInput, CommandLine, DiffusionTransformer,
    decode_tokens, encode_text, harmless, load_weights, multiplies_bf16, noise_index, number,
    pick_device, read_text, say, start,
)

# Rules: which characters a step unmasks -----------------------------------------------------------


class Proposal(NamedTuple):
    """What a rule sees at one step. The rule answers with the positions to unmask, (B, T) bool. Its
    answer has no effect at positions that are not masked."""

    log_p: torch.Tensor         # (B, T, V) log p(x_0 | x_t), meaningful at masked positions
    chosen: torch.Tensor        # (B, T) the character drawn at every position
    masked: torch.Tensor        # (B, T)
    unmask_time: torch.Tensor   # (B, T) uniform on [0, 1), the same at every step

    def confidence(self):
        """Probability of the chosen character, (B, T); -1 at positions that are not masked."""
        p = self.log_p.gather(-1, self.chosen[..., None]).squeeze(-1).exp()
        return p.masked_fill(~self.masked, -1.0)


Rule = Callable[[Proposal], torch.Tensor]


def best_k(score, k: int):
    """True at the k highest scores of each row, (B, T)."""
    places = score.topk(min(k, score.size(1))).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, places, True)


def lowest(level, masked):
    """True at the masked positions of the lowest level in each row, (B, T)."""
    level = level.masked_fill(~masked, level.max() + 1)
    return masked & (level == level.amin(1, keepdim=True))


def van_der_corput(i: int) -> float:
    """The binary digits of i, mirrored at the point: 0, 1/2, 1/4, 3/4, 1/8 ..."""
    return int(f"{i:b}"[::-1], 2) / 2 ** i.bit_length()


def dilated(proposal: Proposal, turns: int = 20):
    """Every turns-th character of each row. Characters unmasked in one call are drawn independently
    of one another, which costs little where they stand far apart (arXiv 2506.19037). The turns
    are sorted by van der Corput's number of each, so that most lie far from earlier ones. They
    ignore confidence, which would put easy characters first, and begin at a random place."""
    u = proposal.unmask_time
    start = (u[:, :1] * turns).long()                               # (B, 1)
    place = torch.arange(u.size(1), device=u.device) + start        # (B, T)
    order = torch.tensor([van_der_corput(i) for i in range(turns)], device=u.device)
    return lowest(order[place % turns], proposal.masked)


def threshold(proposal: Proposal, tau: float = 0.9):
    """Every character with a probability of at least tau, and the most confident one in any case.
    Fast-dLLM, arXiv 2505.22618."""
    confidence = proposal.confidence()
    return (confidence >= tau) | best_k(confidence, 1)


def top_k(proposal: Proposal, k: int = 20):
    """The k most confident characters. LLaDA, arXiv 2502.09992."""
    return best_k(proposal.confidence(), k)


def ancestral(proposal: Proposal, steps: int = 128):
    """The exact reverse process on a grid of `steps` levels (MDLM, arXiv 2406.07524, eq. 7).

    A position is unmasked at the level at which the forward process masked it, which is uniform
    over the levels. Drawing it once has the same law as tossing a coin of probability 1 / t at
    every level t, and levels at which nothing happens cost no network call."""
    return lowest(-(proposal.unmask_time * steps).long(), proposal.masked)


def left_to_right(proposal: Proposal, k: int = 1):
    """The k leftmost masked characters; k = 1 draws from the exact left-to-right distribution."""
    return proposal.masked.cumsum(1) <= k


METHODS = {  # name: (rule, the one flag that tunes it)
    "dilated": (dilated, "turns"),
    "top-k": (top_k, "k"),
    "left-to-right": (left_to_right, "k"),
    "threshold": (threshold, "tau"),
    "ancestral": (ancestral, "steps"),
}

# The denoising loop -------------------------------------------------------------------------------


def uniform(x, generator):
    """Uniform numbers on [0, 1) in the shape of x, on its device. With a generator on the CPU, a
    seed means the same on every device."""
    return torch.rand(x.shape, generator=generator, device=generator.device).to(x.device)


def draw(log_p, temperature: float, generator, min_p: float = 0.0):
    """One character id per position, (B, T), from log_p (B, T, V), by inverting the distribution
    function. Temperature 0 takes the likeliest. A character less than min_p times as likely as the
    likeliest is never drawn (min-p, arXiv 2407.01082)."""
    if temperature == 0:
        return log_p.argmax(-1)
    log_p = log_p - log_p.amax(-1, keepdim=True)                    # no overflow when divided
    log_p = log_p.masked_fill(log_p.exp() < min_p, -math.inf)
    cdf = (log_p / max(temperature, 1e-6)).softmax(-1).cumsum(-1)   # (B, T, V)
    u = uniform(log_p[..., 0], generator)[..., None] * cdf[..., -1:]
    index = torch.searchsorted(cdf, u, right=True).squeeze(-1)      # the first whose cdf exceeds u
    return index.clamp(max=cdf.size(-1) - 1)                        # u may be rounded up to the sum


@torch.inference_mode()
def denoise(model, x, rule: Rule, temperature, generator) -> Iterator[torch.Tensor]:
    """The one denoising loop. Fills x (B, T), which holds mask_token_id wherever a character is
    wanted; the rest stays. Yields x after every network call; the last one has nothing masked."""
    mask_token_id, S = model.config.mask_token_id, model.config.diffusion_steps
    unmask_time = uniform(x, generator)                             # (B, T)
    while (masked := x == mask_token_id).any():                     # (B, T)
        log_p = model(x, noise_index(masked, S))                    # (B, T, V)
        chosen = draw(log_p, temperature, generator)                # (B, T)
        unmask = rule(Proposal(log_p, chosen, masked, unmask_time)) # (B, T)
        x = torch.where(unmask & masked, chosen, x)
        yield x


# Whole texts --------------------------------------------------------------------------------------


@dataclass
class SamplerConfig:
    """Settings of the sampler."""

    rule: Rule = dilated
    temperature: float = 0.9
    sweeps: int = 4                 # how often the correction redraws the new characters
    sweep_min_p: float = 0.3        # the correction's min_p; 1 takes the likeliest
    stride: int = 5                 # each correction call remasks every stride-th character
    block_len: int = 200            # new characters at a time
    lookback: int = 32              # characters that a block sees before it


QUALITIES = {  # the best found at 26, 40 and 53 calls a block: 31, 48, 64 in frontier.md's unit
    "fast": SamplerConfig(partial(dilated, turns=16), 0.83, sweeps=2, sweep_min_p=0.2),
    "default": SamplerConfig(),
    "best": SamplerConfig(partial(dilated, turns=23), 0.88, sweeps=6, sweep_min_p=0.2),
}
SENTENCE_ENDS = torch.tensor(list(b".?!"))


@torch.inference_mode()
def draft_and_correct(model, x, region, config: SamplerConfig, generator):
    """Denoises x (B, T) and then corrects it within `region` (B, T). Yields x after every network
    call; the last one is the result.

    Characters unmasked in the same call are sampled independently of one another. So a correction
    call masks every stride-th character of the region again and draws it anew, given all the
    others. A sweep of `stride` calls reaches each character once. This is a remasking corrector
    (ReMDM, arXiv 2503.00307). It mends the spelling, as it never draws what is far less likely than
    the likeliest. Only the first sweep redraws sentence ends: a full stop is nearly always likelier
    than a question mark, so every sweep would leave fewer of those."""
    mask_token_id, S = model.config.mask_token_id, model.config.diffusion_steps
    for x in denoise(model, x, config.rule, config.temperature, generator):
        yield x
    place = region.cumsum(1)                                        # (B, T)
    stride = min(config.stride, int(place.max()))  # a short region needs fewer calls
    for sweep in range(config.sweeps):
        for phase in range(stride):
            remask = region & (place % stride == phase)             # (B, T)
            if sweep > 0:
                remask &= ~torch.isin(x, SENTENCE_ENDS.to(x.device))
            if remask.any():
                log_p = model(x.masked_fill(remask, mask_token_id), noise_index(remask, S))
                chosen = draw(log_p, config.temperature, generator, config.sweep_min_p)
                x = torch.where(remask, chosen, x)
                yield x


def next_window(masked, config: SamplerConfig, sequence_len: int) -> tuple[int, int, int]:
    """The next window of a text whose `masked` positions (N,) are still open: where it begins,
    where it ends, and up to where the text will be final after it. The end of a window has not seen
    what will stand to its right, so some of it stays open until the next window corrects it."""
    N, first = len(masked), int(masked.int().argmax())
    if masked[first:].all():  # only blanks follow: a block of them
        start = max(0, first - config.lookback)
        stop = min(N, first + config.block_len)
        tail = config.lookback // 2
    else:                     # a gap: as much around it as the model can see
        start = max(0, min(first - sequence_len // 4, N - sequence_len))
        stop = min(N, start + sequence_len)
        tail = sequence_len // 4
    if not masked[stop:].any():
        return start, stop, N
    if not config.sweeps:     # no correction will change the end of the window
        return start, stop, stop
    return start, stop, max(first + 1, stop - tail)


def fill(model, x, config: SamplerConfig, generator) -> Iterator[tuple[torch.Tensor, int]]:
    """Fills the masked positions of x (B, N), the same ones in every row, from left to right and
    window by window. A prompt is a text followed by blanks. Yields x and the number of characters
    at its left that will not change any more."""
    wanted = x == model.config.mask_token_id
    final = 0
    while (masked := x[0].cpu() == model.config.mask_token_id).any():
        start, stop, next_final = next_window(masked, config, model.config.sequence_len)
        region = wanted[:, start:stop].clone()
        region[:, : max(0, final - start)] = False
        *_, window = draft_and_correct(model, x[:, start:stop], region, config, generator)
        x = torch.cat((x[:, :start], window, x[:, stop:]), 1)
        final = next_final
        yield x, final


# The command line, parts of which the animations share --------------------------------------------


def add_model_arguments(parser: CommandLine) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--weights", type=Path, default=DEFAULT_WEIGHTS, help="checkpoint to load")
    add("--device", default="auto", help="auto (CUDA, then MPS, then CPU), cpu, cuda or mps")
    add("--seed", type=SEED, default=1337, help="random seed")


def add_sampler_arguments(parser: CommandLine) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add("--quality", choices=QUALITIES, help="dilated: 26, 40 or 53 network calls for a block of "
        "200 characters; the flags below override it (default: default)")
    add("--method", choices=METHODS, default="dilated",
        help="which characters a network call unmasks: those far apart, the k most confident, the "
        "k leftmost, those above a confidence, or those of the reverse process")
    add("--turns", type=number(int, 1, 10_000), help="dilated: calls in which a draft is complete "
        "(default: 16, 20 or 23, by --quality)")
    add("--k", type=COUNT, help="top-k and left-to-right: characters per call (default: 20 and 1)")
    add("--tau", type=number(float, 0, 1), help="threshold: least confidence (default: 0.9)")
    add("--steps", type=COUNT, help="ancestral: levels of the reverse process (default: 128)")
    add("--temperature", type=TEMPERATURE, help="of every draw; 0 always takes the likeliest "
        "character (default: 0.83, 0.9 or 0.88, by --quality)")
    add("--sweeps", type=number(int, 0, 1000), help="how often the correction redraws the new "
        "characters (default: 2, 4 or 6, by --quality; left-to-right: 0)")
    add("--sweep-min-p", type=number(float, 0, 1), help="the sweeps draw no character less likely "
        "than this share of the likeliest (default: 0.2, 0.3 or 0.2, by --quality)")
    add("--stride", type=COUNT, help="each correction call masks every stride-th character "
        "(default: 5)")
    add("--block-len", type=COUNT, help="characters per block (default: 200, or seven eighths "
        "of the model's sequence length if that is less)")
    add("--lookback", type=number(int, 0),
        help="characters before a block that it is conditioned on (default: 32, or what fits)")


def sampler_config(args: argparse.Namespace, T: int) -> SamplerConfig:
    """What the flags ask for, for a model of sequence length T. Raises BadInput for a flag of
    another method, for one of the correction without sweeps, and for lengths that do not fit."""
    rule, flag = METHODS[args.method]
    for other in ("turns", "k", "tau", "steps"):
        if other != flag and getattr(args, other) is not None:
            raise BadInput(f"--{other} belongs to another --method; {args.method} has --{flag}")
    if args.quality and args.method != "dilated":
        raise BadInput(f"--quality belongs to --method dilated; {args.method} has --{flag}")

    config = QUALITIES[args.quality or "default"]
    if args.method != "dilated":
        config = replace(config, rule=rule)
    if args.method == "left-to-right":
        config = replace(config, sweeps=0)
    if getattr(args, flag) is not None:
        config = replace(config, rule=partial(config.rule, **{flag: getattr(args, flag)}))
    given = {field.name: getattr(args, field.name, None) for field in fields(SamplerConfig)}
    config = replace(config, **{name: x for name, x in given.items() if x is not None})
    if not config.sweeps and (args.stride or args.sweep_min_p is not None):
        raise BadInput("--stride and --sweep-min-p belong to the correction; it has 0 --sweeps")

    # Without flags, the lengths shrink to what a small model can see
    if not args.block_len:
        config.block_len = min(config.block_len, max(1, 7 * T // 8))
    if args.lookback is None:
        config.lookback = max(0, min(config.lookback, T - config.block_len))
    if config.block_len + config.lookback > T:
        both = f" and --lookback {config.lookback} together" if config.lookback else ""
        raise BadInput(f"--block-len {config.block_len}{both} exceed the model's sequence length, "
                       f"{T}")
    return config


def sample_command(weights: Path) -> str:
    """The command that writes with these weights."""
    chosen = [] if weights == DEFAULT_WEIGHTS else [f"--weights={weights}"]
    return shlex.join(["uv", "run", "sample.py", *chosen])


def load_for_sampling(path: Path, device: torch.device, causal=False) -> DiffusionTransformer:
    """The model of `load_weights`, in bfloat16 where the hardware multiplies bfloat16."""
    model, _ = load_weights(path, device, causal)
    return model.to(torch.bfloat16) if multiplies_bf16(device) else model


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    text = parser.add_argument_group("text")
    add = text.add_mutually_exclusive_group().add_argument
    add("--prompt", default="", help="text to continue")
    add("--prompt-file", type=Path, help="file whose text is the prompt")
    add("--infill", metavar="TEXT", help="fill every underscore of TEXT, or of stdin if TEXT is -")
    add = text.add_argument
    add("--num-blocks", type=number(int, 1, 100_000),
        help="blocks to write (default: about 30 sequence lengths of text)")
    add("--num-samples", type=number(int, 1, 10_000), default=1,
        help="texts to write, all in one batch")
    add_sampler_arguments(parser)
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.prompt_file:
        args.prompt = read_text(args.prompt_file)
    if args.infill == "-":
        args.infill = read_text("-")
    if args.infill is not None and "_" not in args.infill:
        raise BadInput("--infill: no gap to fill; every underscore of the text is one character")
    if args.infill is not None and args.num_blocks:
        raise BadInput(f"--num-blocks {args.num_blocks}: --infill writes no blocks; it fills gaps")
    return args


def text_to_fill(args: argparse.Namespace, config: SamplerConfig, model):
    """The ids (N,) of the text with its gaps masked, or of the prompt and blanks after it."""
    mask_token_id, T = model.config.mask_token_id, model.config.sequence_len
    text = args.prompt if args.infill is None else args.infill
    x = encode_text(text.replace("\r\n", "\n"), model.config).long()
    if args.infill is not None:
        return x.masked_fill(x == ord("_"), mask_token_id)
    num_blocks = args.num_blocks or max(1, 30 * T // config.block_len)
    return torch.cat((x, x.new_full((num_blocks * config.block_len,), mask_token_id)))


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device = pick_device(args.device)
    model = load_for_sampling(args.weights, device)
    config = sampler_config(args, model.config.sequence_len)
    if args.prompt and not config.lookback:
        raise BadInput(f"with --block-len {config.block_len} and --lookback 0 no block sees the "
                       "prompt")
    unseen = 0  # characters at the left that are not printed
    if not (args.prompt or args.infill):
        args.prompt, unseen = "\n\n", 2  # the model goes on with a speaker
    x = text_to_fill(args, config, model).to(device).repeat(args.num_samples, 1)
    n_written, shown = int((x == model.config.mask_token_id).sum()), unseen
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a window may end within a character
    started = time.perf_counter()
    for x, final in fill(model, x, config, torch.Generator().manual_seed(args.seed)):
        # The first sample is streamed; the others follow when it is complete
        text = utf8.decode(bytes(x[0, shown:final].tolist()))
        print(harmless(text, sys.stdout), end="", flush=True)
        shown = final
    print(utf8.decode(b"", final=True))
    for i, row in enumerate(x[1:, unseen:], start=2):
        print(f"\n----- sample {i} -----\n{harmless(decode_tokens(row), sys.stdout)}")
    seconds = time.perf_counter() - started
    say(f"{n_written} characters in {seconds:.1f} s, {n_written / seconds:.0f} a second")
    if sys.stderr.isatty():
        say(f'{sample_command(args.weights)} --prompt "ROMEO:" continues a text, '
            '--infill "To be, or ___" fills gaps, --quality best takes its time')


if __name__ == "__main__":
    start(main)
