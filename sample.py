"""Write text with the diffusion model, or fill the gaps of a given one.

    uv run sample.py                                  # 30 windows of 256 characters, streamed
    uv run sample.py --prompt "ROMEO:" --num-blocks 4
    uv run sample.py --infill "To be, or ___ to be"
"""

import argparse
import itertools
import math
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
from tqdm import tqdm

from model import (
    DEFAULT_WEIGHTS,
    BadInput,
    DiffusionTransformer,
    autocast,
    best_device,
    decode_tokens,
    encode_text,
    load_weights,
    log_probs,
    multiplies_bf16,
    noise_index,
)

# ----------------------------------------------------------------------------------------------------
# The decoding loop


class Proposal(NamedTuple):
    """What a rule sees at one step; it answers which positions to reveal, (B, T) bool."""

    log_p: torch.Tensor     # (B, T, V) the model's log-probabilities, before any temperature
    chosen: torch.Tensor    # (B, T) the character drawn for every position
    masked: torch.Tensor    # (B, T) where nothing is revealed yet
    seeds: torch.Tensor     # (B,)
    step: int               # 1, 2, ...

    def fate(self) -> torch.Tensor:
        """Uniform on (0, 1), (B, T), the same at every step."""
        return uniform(self.seeds, self.chosen.size(1), stream=0)

    def confidence(self) -> torch.Tensor:
        """Probability of the chosen character, (B, T); -1 where nothing is masked."""
        p = self.log_p.gather(-1, self.chosen[..., None]).squeeze(-1).exp()
        return p.masked_fill(~self.masked, -1.0)


Rule = Callable[[Proposal], torch.Tensor]


def best_k(score: torch.Tensor, k: int) -> torch.Tensor:
    """True at the k highest scores of each row, (B, T)."""
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(min(k, score.size(1))).indices, True)


def threshold(proposal: Proposal, tau: float) -> torch.Tensor:
    """All characters with probability of at least tau, and the surest one in any case.
    Fast-dLLM, arXiv 2505.22618."""
    confidence = proposal.confidence()
    return (confidence >= tau) | best_k(confidence, 1)


def top_k(proposal: Proposal, k: int) -> torch.Tensor:
    """The k surest characters. LLaDA, arXiv 2502.09992."""
    return best_k(proposal.confidence(), k)


def gumbel_top_k(proposal: Proposal, k: int) -> torch.Tensor:
    """k characters drawn without replacement in proportion to their confidence, by Gumbel noise on its
    logarithm (arXiv 1903.06059): the surest still tend to come first, but not always the same ones, so
    that samples differ more."""
    u = uniform(proposal.seeds, proposal.chosen.size(1), stream=2 * proposal.step + 1)
    score = proposal.confidence().clamp(min=1e-9).log() - torch.log(-torch.log(u))
    return best_k(score.masked_fill(~proposal.masked, -math.inf), k)


def ancestral(proposal: Proposal, steps: int) -> torch.Tensor:
    """The exact reverse process on a grid of `steps` levels (MDLM, arXiv 2406.07524, eq. 7).

    A position is revealed in the step in which the forward process hid it, and that is uniform over
    the levels: `fate` decides it once and for all, which is the same in law as tossing a coin of
    probability 1 / t at every level t, and steps in which nothing would happen cost no network call."""
    level = (proposal.fate() * steps).long().masked_fill(~proposal.masked, -1)
    return level == level.amax(1, keepdim=True)


def uniform(seeds: torch.Tensor, length: int, stream: int) -> torch.Tensor:
    """Uniform numbers on (0, 1), (B, length), from row seeds (B,): a hash of seed, stream and position
    (the finaliser of SplitMix64). A row's numbers so depend on its own seed alone, not on which rows
    share its batch, which a torch.Generator could not promise."""
    position = torch.arange(length, device=seeds.device) + (stream << 32)
    h = seeds[:, None] * -7046029254386353131 + position * -4658895280553007687
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        h = (h ^ (h >> shift & (1 << 64 - shift) - 1)) * factor  # masked: int64 shifts drag the sign along
    h = h ^ (h >> 31 & (1 << 33) - 1)
    return ((h >> 40 & (1 << 24) - 1).float() + 0.5) / (1 << 24)


def draw(log_p: torch.Tensor, temperature: float, u: torch.Tensor | None) -> torch.Tensor:
    """One character id per position, (B, T), from log_p (B, T, V) by inverse transform of u (B, T);
    temperature 0 is argmax and needs no u."""
    if temperature == 0:
        return log_p.argmax(-1)
    cdf = (log_p / temperature).softmax(-1).cumsum(-1)                     # (B, T, V)
    return torch.searchsorted(cdf, u[..., None] * cdf[..., -1:]).squeeze(-1)


@torch.inference_mode()
def decode(
    model: DiffusionTransformer,
    x: torch.Tensor,
    rule: Rule,
    temperature: float = 1.0,
    seed: int | torch.Tensor = 0,
) -> Iterator[torch.Tensor]:
    """The one decoding loop. Yields x (B, T) itself and then every intermediate state; the last one
    has no masked position left.

    x        ids with model.config.mask_token_id wherever a character is wanted; known ones stay
    rule     chooses what to reveal at a step: at least one masked position in every unfinished row
    seed     an int, from which row r gets seed + r, or a seed per row (B,)
    """
    mask_token_id, T = model.config.mask_token_id, x.size(1)
    seeds = seed + torch.arange(x.size(0), device=x.device) if isinstance(seed, int) else seed
    yield x
    for step in itertools.count(1):
        masked = x == mask_token_id                                           # (B, T)
        live = masked.any(1).nonzero().squeeze(1)                             # (B',) rows not finished
        if not len(live):
            return
        index = noise_index(masked, model.config.diffusion_steps)             # (B,)
        with autocast(x.device):                                              # (B', T, V)
            logits = model(x[live], index[live])
        log_p = log_probs(logits, mask_token_id)
        u = uniform(seeds[live], T, stream=2 * step) if temperature else None
        chosen = draw(log_p, temperature, u)
        reveal = rule(Proposal(log_p, chosen, masked[live], seeds[live], step)) & masked[live]
        x = x.index_copy(0, live, torch.where(reveal, chosen, x[live]))
        yield x


# ----------------------------------------------------------------------------------------------------
# Whole texts


@dataclass
class Decoding:
    """How text is made; the defaults are what tests/benchmark_sampling.py found best on the shipped weights."""

    rule: Rule = partial(gumbel_top_k, k=20)
    temperature: float = 0.6        # of the draft
    sweeps: int = 2                 # how often every new character is reconsidered
    sweep_temperature: float = 0.0  # in doing so
    stride: int = 4                 # one character in so many is reconsidered at a time
    block_len: int | None = None    # new characters at a time; None is 128, or less for a short model
    context_len: int | None = None  # characters before them that they are conditioned on; None is 64, or what fits

    def lengths(self, sequence_len: int) -> tuple[int, int]:
        """Block and context for a model of that sequence length. Raises BadInput where they do not fit."""
        block_len = self.block_len or min(128, sequence_len // 2)
        context_len = min(64, sequence_len - block_len) if self.context_len is None else self.context_len
        if context_len + block_len > sequence_len:
            raise BadInput(f"context {context_len} and block {block_len} exceed the model's {sequence_len} characters")
        return block_len, context_len


def complete(model, x, decoding, seeds, region=None) -> Iterator[torch.Tensor]:
    """Decodes x (B, T) and then corrects it; yields every state, the last is the result.

    Characters revealed in the same call do not know of each other. So afterwards every stride-th
    character of `region` (B, T), by default of what was masked, is masked again and drawn anew given all
    the others, and so on in turn: Gibbs sampling, a remasking corrector (ReMDM, arXiv 2503.00307) that
    takes back each character equally often. Towards temperature 0 that climbs to a likelier text near by:
    the draft brings the variety, the corrector the spelling."""
    region = x == model.config.mask_token_id if region is None else region
    turn = region.cumsum(1) % decoding.stride
    everything = lambda proposal: proposal.masked
    for x in decode(model, x, decoding.rule, decoding.temperature, seeds):
        yield x
    for phase in range(decoding.sweeps * decoding.stride):
        again = region & (turn == phase % decoding.stride)
        remasked = x.masked_fill(again, model.config.mask_token_id)
        for x in decode(model, remasked, everything, decoding.sweep_temperature, seeds + (phase + 1 << 32)):
            yield x


def continue_ids(model, x, num_blocks, decoding, seed=0) -> Iterator[torch.Tensor]:
    """Continues the ids x (B, T), which may be empty, by num_blocks blocks; yields new ids (B, n) as soon
    as they are settled. Row r depends on its own ids and on seed + r alone.

    A block is decoded with nothing to its right, so its last quarter is uncertain: the corrector of the
    next block may still rewrite it, and it is held back until then."""
    device = x.device
    block_len, context_len = decoding.lengths(model.config.sequence_len)
    held = min(block_len // 4, context_len) if decoding.sweeps else 0
    seeds = seed + torch.arange(x.size(0), device=device)
    blank = torch.full((x.size(0), block_len), model.config.mask_token_id, device=device)
    settled = x.size(1)
    for block in range(num_blocks):
        context = x[:, max(0, x.size(1) - context_len) :]
        window = torch.cat([context, blank], 1)
        open_from = settled - (x.size(1) - context.size(1))     # where in the window the unsettled part begins
        region = (torch.arange(window.size(1), device=device) >= open_from).expand_as(window)
        *_, done = complete(model, window, decoding, seeds + (block << 40), region)
        x = torch.cat([x[:, : x.size(1) - context.size(1)], done], 1)
        until = x.size(1) - (held if block < num_blocks - 1 else 0)
        yield x[:, settled:until]
        settled = until


def generate(
    model: DiffusionTransformer,
    prompt: str = "",
    num_blocks: int = 8,
    num_samples: int = 1,
    decoding: Decoding = Decoding(),
    seed: int = 0,
) -> Iterator[list[str]]:
    """Continues `prompt`; yields, block after block, the new text of each of num_samples samples.

    Sample i is the same whatever num_samples is. Raises BadInput for a prompt with characters outside the
    vocabulary, and where context and block exceed sequence_len."""
    config, device = model.config, next(model.parameters()).device
    ids = encode_text(prompt, config.vocab_size, config.mask_token_id).to(device)
    for new in continue_ids(model, ids.expand(num_samples, -1), num_blocks, decoding, seed):
        yield [decode_tokens(row) for row in new]


def infill(
    model: DiffusionTransformer,
    text: str,
    num_samples: int = 1,
    decoding: Decoding = Decoding(),
    seed: int = 0,
) -> list[str]:
    """`text` with every underscore replaced by the model, once for each of num_samples samples;
    everything else stays as it is. Raises BadInput for characters outside the vocabulary.

    A text longer than sequence_len is filled from left to right, window by window: each starts a
    quarter of a window before the first open gap, and what it puts into its own last quarter is thrown
    away unless the text ends there, because characters beyond that edge have not been seen."""
    config, device = model.config, next(model.parameters()).device
    length = config.sequence_len
    x = encode_text(text, config.vocab_size, config.mask_token_id).to(device)
    x = x.masked_fill(x == ord("_"), config.mask_token_id)
    gaps = (x == config.mask_token_id).nonzero().flatten().tolist()
    x = x.repeat(num_samples, 1)
    seeds = seed + torch.arange(num_samples, device=device)
    done = 0
    for gap in gaps:
        if gap < done:
            continue
        start = max(0, min(gap - length // 4, x.size(1) - length))
        stop = min(start + length, x.size(1))
        done = stop if stop == x.size(1) else stop - length // 4
        *_, filled = complete(model, x[:, start:stop], decoding, seeds + (gap << 40))
        x[:, start:done] = filled[:, : done - start]
    return [decode_tokens(row) for row in x]


def load_for_sampling(path: Path, device: torch.device) -> DiffusionTransformer:
    """The model of `load_weights`, its matrices stored as bfloat16 where the hardware multiplies that:
    autocast would convert them at every call, to the same numbers."""
    model, _ = load_weights(path, device)
    if multiplies_bf16(device):
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(torch.bfloat16)
    return model


# ----------------------------------------------------------------------------------------------------
# The command line, whose pieces training.py and animations/ share


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults and answers bad input with one line and exit code 2."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=HelpFormatter)

    def error(self, message):
        self.exit(2, f"error: {message}\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def number(kind: type, least: float = -math.inf, most: float = math.inf, above: float = -math.inf):
    """An argparse type: a finite number in the given range."""
    limits = [f"at least {least}"] * (least > -math.inf) + [f"above {above}"] * (above > -math.inf)
    wanted = " and ".join([*limits, *[f"at most {most}"] * (most < math.inf)])

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most and value > above):
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {wanted}".rstrip())
        return value

    return parse


def pick_device(name: str) -> torch.device:
    """"auto" is CUDA, then Apple's MPS, then the CPU. Raises BadInput for what is not there."""
    if name == "auto":
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise BadInput(f"--device {name}: no such device here (use auto, cpu, cuda or mps, as the machine has)")
    return device


def run(main: Callable[[], None]) -> None:
    """Calls main; bad input and failing files end in one line and exit code 2, a closed pipe quietly."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the exit flush is quiet too
    except (BadInput, OSError) as error:
        tqdm.write(f"error: {error}", file=sys.stderr)  # a progress bar may stand on the line
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def add_model_arguments(parser: CommandLine) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--weights", type=Path, default=DEFAULT_WEIGHTS, help="checkpoint to load")
    group.add_argument("--device", default="auto", help="auto (CUDA, then MPS, then CPU), cpu, cuda or mps")
    group.add_argument("--seed", type=number(int, least=0, most=2**31), default=1337, help="of everything that is drawn")


def add_decoding_arguments(parser: CommandLine) -> None:
    count, best = number(int, least=1), Decoding()
    group = parser.add_argument_group("decoding")
    group.add_argument("--method", choices=["gumbel-top-k", "top-k", "threshold", "ancestral"], default="gumbel-top-k",
                       help="which characters a step reveals: k drawn in proportion to how sure they are, the k surest, "
                       "those above a confidence, or what the exact reverse diffusion does")
    group.add_argument("--k", type=count, default=best.rule.keywords["k"], help="gumbel-top-k and top-k: characters a step")
    group.add_argument("--threshold", type=number(float, above=0, most=1), default=0.9, help="threshold: least probability")
    group.add_argument("--steps", type=count, default=128, help="ancestral: levels of the reverse process")
    group.add_argument("--temperature", type=number(float, least=0), default=best.temperature, help="of the draft; 0 always "
                       "takes the likeliest character")
    group.add_argument("--sweeps", type=number(int, least=0), default=best.sweeps, help="how often every new character is "
                       "masked again and reconsidered")
    group.add_argument("--sweep-temperature", type=number(float, least=0), default=best.sweep_temperature, help="in doing so")
    group.add_argument("--stride", type=count, default=best.stride, help="one character in so many is reconsidered at a time")


def pick_decoding(args, block_len: int | None = None, context_len: int | None = None) -> Decoding:
    rule = {
        "gumbel-top-k": partial(gumbel_top_k, k=args.k),
        "top-k": partial(top_k, k=args.k),
        "threshold": partial(threshold, tau=args.threshold),
        "ancestral": partial(ancestral, steps=args.steps),
    }[args.method]
    return Decoding(rule, args.temperature, args.sweeps, args.sweep_temperature, args.stride, block_len, context_len)


def parse_arguments():
    parser = CommandLine(__doc__)
    count = number(int, least=1)
    group = parser.add_argument_group("text")
    group.add_argument("--prompt", default="", help="text to continue")
    group.add_argument("--prompt-file", type=Path, help="file whose text is the prompt")
    group.add_argument("--infill", metavar="TEXT", help="fill every underscore of TEXT, or of stdin where TEXT is -")
    group.add_argument("--num-blocks", type=count, help="blocks to write (default: 30 sequence lengths of text)")
    group.add_argument("--num-samples", type=count, default=1, help="texts to write, all in one batch")
    group.add_argument("--block-len", type=count, help="characters per block (default: 128, or half the model's sequence "
                       "length where that is less)")
    group.add_argument("--context-len", type=number(int, least=0), help="characters before a block that it is "
                       "conditioned on (default: 64, or what fits)")
    add_decoding_arguments(parser)
    add_model_arguments(parser)
    args = parser.parse_args()
    try:
        if args.prompt_file:
            args.prompt += args.prompt_file.read_text("utf-8")
        if args.infill == "-":
            args.infill = sys.stdin.read()
    except UnicodeDecodeError:
        raise BadInput(f"{args.prompt_file or 'stdin'}: not UTF-8 text")
    return args


def main():
    args = parse_arguments()
    model = load_for_sampling(args.weights, pick_device(args.device))
    decoding = pick_decoding(args, args.block_len, args.context_len)
    bar = tqdm(unit=" calls", desc="network", disable=None, leave=False)  # None: silent unless stderr is a terminal
    n_calls = 0

    def count(*_):
        nonlocal n_calls
        n_calls += 1
        bar.update()

    model.register_forward_hook(count)
    started, written = time.monotonic(), 0
    if args.infill is not None:
        texts = infill(model, args.infill, args.num_samples, decoding, args.seed)
        written = args.infill.count("_") * args.num_samples
        print(texts[0])
    else:
        block_len, _ = decoding.lengths(model.config.sequence_len)
        num_blocks = args.num_blocks or 30 * model.config.sequence_len // block_len
        texts = [args.prompt] * args.num_samples
        for block in generate(model, args.prompt, num_blocks, args.num_samples, decoding, args.seed):
            bar.clear()
            print((args.prompt if written == 0 else "") + block[0], end="", flush=True)  # the others follow when this one is whole
            texts = [text + new for text, new in zip(texts, block)]
            written += sum(map(len, block))
        print()
    for i, text in enumerate(texts[1:], start=2):
        print(f"\n----- sample {i} -----\n{text}")
    seconds = time.monotonic() - started
    bar.close()
    print(f"{written} characters in {seconds:.1f} s: {written / seconds:.0f} characters per second, "
          f"{n_calls} network calls", file=sys.stderr)


if __name__ == "__main__":
    run(main)
