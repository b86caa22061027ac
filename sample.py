"""Write text with the diffusion model, or fill the gaps of a given text.

    uv run sample.py                                  # 30 windows of 256 characters, streamed
    uv run sample.py --prompt "ROMEO:" --num-blocks 4
    uv run sample.py --infill "To be, or ___ to be"
"""

import argparse
import codecs
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from model import (  # before torch, for which it sets the environment
    COUNT,
    DEFAULT_WEIGHTS,
    SEED,
    TEMPERATURE,
    BadInput,
    CommandLine,
    DiffusionTransformer,
    add_device_argument,
    autocast,
    decode_tokens,
    encode_text,
    load_weights,
    log_probs,
    multiplies_bf16,
    noise_index,
    number,
    pick_device,
    read_text,
    run,
)

import torch
from tqdm import tqdm

DEFAULT_K, DEFAULT_THRESHOLD, DEFAULT_STEPS = 20, 0.9, 128  # of the methods below

# --------------------------------------------------------------------------------------------------
# The denoising loop


class Proposal(NamedTuple):
    """What a rule sees at one step; it answers with the positions to unmask, (B, T) bool."""

    # (B, T, V) the model's log-probabilities before any temperature; no meaning where not masked
    log_p: torch.Tensor
    chosen: torch.Tensor        # (B, T) the character drawn at every position
    masked: torch.Tensor        # (B, T)
    unmask_time: torch.Tensor   # (B, T) uniform on [0, 1), the same at every step
    generators: list[torch.Generator]  # one per row

    def confidence(self) -> torch.Tensor:
        """Probability of the chosen character, (B, T); -1 where nothing is masked."""
        p = self.log_p.gather(-1, self.chosen[..., None]).squeeze(-1).exp()
        return p.masked_fill(~self.masked, -1.0)


Rule = Callable[[Proposal], torch.Tensor]


def best_k(score: torch.Tensor, k: int) -> torch.Tensor:
    """True at the k highest scores of each row, (B, T)."""
    places = score.topk(min(k, score.size(1))).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, places, True)


def threshold(proposal: Proposal, tau: float) -> torch.Tensor:
    """Every character with probability of at least tau, and the most confident one in any case.
    Fast-dLLM, arXiv 2505.22618."""
    confidence = proposal.confidence()
    return (confidence >= tau) | best_k(confidence, 1)


def top_k(proposal: Proposal, k: int) -> torch.Tensor:
    """The k most confident characters. LLaDA, arXiv 2502.09992."""
    return best_k(proposal.confidence(), k)


def gumbel_top_k(proposal: Proposal, k: int) -> torch.Tensor:
    """k characters drawn without replacement in proportion to their confidence, by adding Gumbel
    noise to its logarithm (arXiv 1903.06059). The most confident still tend to come first, but not
    always the same ones, so samples differ more."""
    u = uniform(proposal.generators, proposal.chosen)
    score = proposal.confidence().clamp(min=1e-9).log() - torch.log(-torch.log(u))
    return best_k(score.masked_fill(~proposal.masked, -math.inf), k)


def ancestral(proposal: Proposal, steps: int) -> torch.Tensor:
    """The exact reverse process on a grid of `steps` levels (MDLM, arXiv 2406.07524, eq. 7).

    A position is unmasked at the level at which the forward process masked it, which is uniform
    over the levels. Drawing it once has the same law as tossing a coin of probability 1 / t at
    every level t, and levels at which nothing happens cost no network call."""
    level = (proposal.unmask_time * steps).long().masked_fill(~proposal.masked, -1)
    return level == level.amax(1, keepdim=True)


def left_to_right(proposal: Proposal, k: int) -> torch.Tensor:
    """The k leftmost masked characters; k = 1 draws from the exact left-to-right distribution."""
    return proposal.masked.cumsum(1) <= k


def everything(proposal: Proposal) -> torch.Tensor:
    return proposal.masked


def row_generators(seed: int, num_rows: int) -> list[torch.Generator]:
    """Row r draws from a generator of its own, seeded with seed + r: its numbers depend neither on
    the rows beside it nor, as it lives on the CPU, on the device."""
    return [torch.Generator().manual_seed(seed + r) for r in range(num_rows)]


def uniform(generators: list[torch.Generator], like: torch.Tensor) -> torch.Tensor:
    """Uniform numbers on [0, 1), of the shape (B, T) and on the device of `like`."""
    rows = [torch.rand(like.size(1), generator=generator) for generator in generators]
    return torch.stack(rows).to(like.device)


def draw(log_p: torch.Tensor, temperature: float, u: torch.Tensor | None) -> torch.Tensor:
    """One character id per position, (B, T), from log_p (B, T, V), by inverting the distribution
    function at u (B, T). Temperature 0 is argmax and needs no u."""
    if temperature == 0:
        return log_p.argmax(-1)
    log_p = log_p - log_p.amax(-1, keepdim=True)                    # no overflow when divided
    cdf = (log_p / max(temperature, 1e-6)).softmax(-1).cumsum(-1)   # (B, T, V)
    # The first character whose cdf exceeds u; without its last entry, rounding can't leave V - 1
    u = u[..., None] * cdf[..., -1:]                                # (B, T, 1)
    return torch.searchsorted(cdf[..., :-1].contiguous(), u, right=True).squeeze(-1)


@torch.inference_mode()
def denoise(
    model: DiffusionTransformer,
    x: torch.Tensor,
    rule: Rule,
    temperature: float,
    generators: list[torch.Generator],
) -> Iterator[torch.Tensor]:
    """The one denoising loop. Yields x (B, T) itself and then every state; the last one has no
    masked position left.

    x            ids, with model.config.mask_token_id wherever a character is wanted; the rest stays
    rule         chooses what to unmask: at least one masked position in every unfinished row
    generators   one per row, from `row_generators`
    """
    mask_token_id = model.config.mask_token_id
    x = x.contiguous()  # index_copy on MPS needs that
    unmask_time = uniform(generators, x)                                    # (B, T)
    yield x
    while True:
        masked = x == mask_token_id                                         # (B, T)
        live = masked.any(1).nonzero().squeeze(1)                           # (B',) unfinished rows
        if not len(live):
            return
        x_t, masked = x[live], masked[live]                                 # (B', T)
        live_generators = [generators[r] for r in live.tolist()]
        # Logits are wanted at masked positions; rows that have fewer than others add visible ones
        at = masked.float().topk(int(masked.sum(1).max())).indices          # (B', K)
        with autocast(x.device):
            logits = model(x_t, noise_index(masked, model.config.diffusion_steps), at)
        logits = logits.new_zeros(*x_t.shape, logits.size(-1)).scatter_(
            1, at[..., None].expand_as(logits), logits
        )
        log_p = log_probs(logits, mask_token_id)                            # (B', T, V)
        u = uniform(live_generators, x_t) if temperature else None
        chosen = draw(log_p, temperature, u)                                # (B', T)
        unmask = rule(Proposal(log_p, chosen, masked, unmask_time[live], live_generators))
        x = x.index_copy(0, live, torch.where(unmask & masked, chosen, x_t))
        yield x


# --------------------------------------------------------------------------------------------------
# Whole texts


@dataclass
class SamplerConfig:
    """How text is made. The defaults are what tests/benchmark_sampling.py found best."""

    rule: Rule = partial(gumbel_top_k, k=DEFAULT_K)
    temperature: float = 0.6        # of the draft
    sweeps: int = 2                 # how often the correction redraws every new character
    sweep_temperature: float = 0.0
    stride: int = 4                 # each correction call remasks every stride-th character
    block_len: int | None = None    # new characters at a time; None is 128, or half a short model
    context_len: int | None = None  # characters that a block sees before it; None is 32, or fewer

    def lengths(self, sequence_len: int) -> tuple[int, int]:
        """Block and context for a model of that sequence length, or BadInput if they don't fit."""
        block_len = self.block_len or min(128, max(1, sequence_len // 2))
        context_len = self.context_len
        if context_len is None:
            context_len = max(0, min(32, sequence_len - block_len))
        if context_len + block_len > sequence_len:
            raise BadInput(
                f"block {block_len} and context {context_len} together exceed the model's "
                f"sequence length of {sequence_len}"
            )
        return block_len, context_len


def draft_and_correct(
    model: DiffusionTransformer,
    x: torch.Tensor,
    config: SamplerConfig,
    generators: list[torch.Generator],
    region: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Denoises x (B, T) and then corrects it; yields every state, the last one is the result.

    Characters unmasked in the same call are sampled independently of one another. So every
    stride-th character of `region` (B, T), by default of what was masked, is then masked again and
    drawn anew given all the others, each in its turn: Gibbs sampling, a remasking corrector (ReMDM,
    arXiv 2503.00307) that visits every character equally often. Near temperature 0 it climbs to a
    likelier text close by. The draft brings the variety, the corrector the spelling."""
    region = x == model.config.mask_token_id if region is None else region
    stride = min(config.stride, x.size(1) + 1)  # a larger one would only add empty turns
    turn = region.cumsum(1) % stride
    for x_t in denoise(model, x, config.rule, config.temperature, generators):
        yield x_t
    for phase in range(config.sweeps * stride):
        remask = region & (turn == phase % stride)
        x = x_t.masked_fill(remask, model.config.mask_token_id)
        for x_t in denoise(model, x, everything, config.sweep_temperature, generators):
            yield x_t


def generate(
    model: DiffusionTransformer,
    x: torch.Tensor,
    num_blocks: int,
    config: SamplerConfig,
    generators: list[torch.Generator],
) -> Iterator[torch.Tensor]:
    """Continues the ids x (B, T), where T may be 0, by num_blocks blocks. Yields new ids (B, n) as
    soon as they are final. Raises BadInput if block and context exceed the model's sequence length.

    A block is drafted with nothing to its right, so its end is uncertain. A quarter of it, or half
    the context if that is less, is held back until the next block exists, whose corrector may still
    change it."""
    block_len, context_len = config.lengths(model.config.sequence_len)
    held = min(block_len // 4, context_len // 2) if config.sweeps else 0
    blank = torch.full((x.size(0), block_len), model.config.mask_token_id, device=x.device)
    final = x.size(1)
    for block in range(num_blocks):
        start = max(0, x.size(1) - context_len)                     # of the window, within x
        window = torch.cat([x[:, start:], blank], 1)
        region = torch.arange(window.size(1), device=x.device) >= final - start
        *_, window = draft_and_correct(model, window, config, generators, region.expand_as(window))
        x = torch.cat([x[:, :start], window], 1)
        end = x.size(1) - (held if block < num_blocks - 1 else 0)
        yield x[:, final:end]
        final = end


def infill(
    model: DiffusionTransformer,
    text: str,
    num_samples: int,
    config: SamplerConfig,
    seed: int,
) -> list[str]:
    """`text` with every underscore replaced by the model, once for each of num_samples samples.
    Raises BadInput for characters outside the vocabulary.

    A text longer than sequence_len is filled from left to right, window by window. Each window
    starts a quarter of its length before the first open gap. What it puts into its own last quarter
    is discarded unless the text ends there, because it has not seen what lies beyond."""
    length, mask_token_id = model.config.sequence_len, model.config.mask_token_id
    x = encode_text(text, model.config.vocab_size, mask_token_id)
    x = x.masked_fill(x == ord("_"), mask_token_id).to(next(model.parameters()).device)
    gaps = (x == mask_token_id).nonzero().flatten().tolist()
    x = x.repeat(num_samples, 1)
    generators = row_generators(seed, num_samples)
    done = 0
    for gap in gaps:
        if gap < done:
            continue
        start = max(0, min(gap - length // 4, x.size(1) - length))
        stop = min(start + length, x.size(1))
        done = stop if stop == x.size(1) else stop - length // 4
        *_, filled = draft_and_correct(model, x[:, start:stop], config, generators)
        x[:, start:done] = filled[:, : done - start]
    return [decode_tokens(row) for row in x]


def load_for_sampling(path: Path, device: torch.device) -> DiffusionTransformer:
    """The model of `load_weights`, its matrices and rotary tables stored as bfloat16 where the
    hardware multiplies that. Autocast would convert the matrices at every call, to the same
    numbers; with tables of float32, queries and keys would become float32 for a while."""
    model, _ = load_weights(path, device)
    if multiplies_bf16(device):
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(torch.bfloat16)
        model.cos, model.sin = model.cos.bfloat16(), model.sin.bfloat16()
    return model


# --------------------------------------------------------------------------------------------------
# The command line, parts of which the animations share

METHOD_FLAGS = {
    "gumbel-top-k": "k", "top-k": "k", "left-to-right": "k", "threshold": "threshold",
    "ancestral": "steps",
}


def add_model_arguments(parser: CommandLine) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--weights", type=Path, default=DEFAULT_WEIGHTS, help="checkpoint to load")
    add_device_argument(group)
    group.add_argument("--seed", type=SEED, default=1337, help="random seed")


def add_sampler_arguments(parser: CommandLine) -> None:
    add = parser.add_argument_group("sampling").add_argument
    default = SamplerConfig()
    add("--method", choices=METHOD_FLAGS, default="gumbel-top-k",
        help="which characters a step unmasks: k drawn in proportion to confidence, the k most "
        "confident, the k leftmost, those above a confidence, or those of the reverse process")
    add("--k", type=COUNT, help="gumbel-top-k, top-k and left-to-right: characters per step "
        f"(default: {DEFAULT_K}; left-to-right: 1)")
    add("--threshold", type=number(float, above=0, most=1),
        help=f"threshold: least confidence (default: {DEFAULT_THRESHOLD})")
    add("--steps", type=number(int, least=1, most=10**6),
        help=f"ancestral: levels of the reverse process (default: {DEFAULT_STEPS})")
    add("--temperature", type=TEMPERATURE, default=default.temperature,
        help="temperature of the draft; 0 always takes the likeliest character")
    add("--sweeps", type=number(int, least=0, most=10**6),
        help="how often the correction redraws every new character "
        f"(default: {default.sweeps}; left-to-right: 0)")
    add("--sweep-temperature", type=TEMPERATURE,
        help=f"temperature of the correction sweeps (default: {default.sweep_temperature})")
    add("--stride", type=COUNT,
        help=f"each correction call remasks every stride-th character (default: {default.stride})")


def sampler_config(args: argparse.Namespace, **lengths: int | None) -> SamplerConfig:
    """What the flags ask for. Raises BadInput for one that the method does not use."""
    used = METHOD_FLAGS[args.method]
    for name in ("k", "threshold", "steps"):
        if name != used and getattr(args, name) is not None:
            raise BadInput(f"--{name} has no effect with --method {args.method}, but --{used} has")
    rule = {
        "gumbel-top-k": partial(gumbel_top_k, k=args.k or DEFAULT_K),
        "top-k": partial(top_k, k=args.k or DEFAULT_K),
        "left-to-right": partial(left_to_right, k=args.k or 1),
        "threshold": partial(threshold, tau=args.threshold or DEFAULT_THRESHOLD),
        "ancestral": partial(ancestral, steps=args.steps or DEFAULT_STEPS),
    }[args.method]
    sweeps = args.sweeps
    if sweeps is None:
        sweeps = 0 if args.method == "left-to-right" else SamplerConfig.sweeps
    correction = {"sweep_temperature": args.sweep_temperature, "stride": args.stride}
    correction = {name: value for name, value in correction.items() if value is not None}
    if correction and not sweeps:
        flag = next(iter(correction)).replace("_", "-")
        raise BadInput(f"--{flag} has no effect without sweeps; --sweeps 1 or more makes some")
    return SamplerConfig(rule, args.temperature, sweeps, **correction, **lengths)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    add = parser.add_argument_group("text").add_argument
    add("--prompt", help="text to continue")
    add("--prompt-file", type=Path, help="file whose text is the prompt, or the rest of it")
    add("--infill", metavar="TEXT", help="fill every underscore of TEXT, or of stdin if TEXT is -")
    add("--num-blocks", type=COUNT, help="blocks to write (default: 30 sequence lengths of text)")
    add("--num-samples", type=number(int, least=1, most=10_000), default=1,
        help="texts to write, all in one batch")
    add("--block-len", type=COUNT,
        help="characters per block (default: 128, or half the model's sequence length if that is "
        "less)")
    add("--context-len", type=number(int, least=0, most=10**9),
        help="characters before a block that it is conditioned on (default: 32, or what fits)")
    add_sampler_arguments(parser)
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.infill is not None:
        for name in ("prompt", "prompt_file", "num_blocks", "block_len", "context_len"):
            if getattr(args, name) is not None:
                raise BadInput(f"--{name.replace('_', '-')} has no effect with --infill")
    if args.infill == "-":
        args.infill = read_stdin()
    args.prompt = args.prompt or ""
    if args.prompt_file:
        args.prompt += read_text(args.prompt_file)[0]
    return args


def read_stdin() -> str:
    try:
        return sys.stdin.read().removeprefix("\ufeff")  # a byte order mark
    except UnicodeDecodeError as error:
        raise BadInput(f"stdin: not UTF-8 text (byte {error.start})") from error
    except AttributeError as error:  # None, where the process has no stdin
        raise BadInput("stdin is closed") from error


class CallCounter:
    """A forward hook that counts network calls, on a progress bar if it gets one."""

    def __init__(self, bar: tqdm | None = None):
        self.n, self.bar = 0, bar

    def __call__(self, *_):
        self.n += 1
        if self.bar is not None:
            self.bar.update()


def write_blocks(model: DiffusionTransformer, args: argparse.Namespace) -> Iterator[list[str]]:
    """The new text of each sample, block by block."""
    config = model.config
    ids = encode_text(args.prompt, config.vocab_size, config.mask_token_id)
    x = ids.to(next(model.parameters()).device).expand(args.num_samples, -1)
    how = sampler_config(args, block_len=args.block_len, context_len=args.context_len)
    block_len, _ = how.lengths(config.sequence_len)
    num_blocks = args.num_blocks or max(1, 30 * config.sequence_len // block_len)
    # A character of several bytes may lie across the edge of two blocks
    utf8 = [codecs.getincrementaldecoder("utf-8")("replace") for _ in x]
    for new in generate(model, x, num_blocks, how, row_generators(args.seed, len(x))):
        yield [d.decode(bytes(row)) for d, row in zip(utf8, new.tolist(), strict=True)]
    yield [d.decode(b"", final=True) for d in utf8]


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    model = load_for_sampling(args.weights, pick_device(args.device))
    # Streamed text shows its own progress, and a bar would write over its unfinished line. Filling
    # prints nothing until the end, so it has a bar, but only on a terminal (None)
    streams = args.infill is None
    bar = tqdm(unit=" calls", desc="network", disable=streams or None, leave=False)
    calls = CallCounter(bar)
    model.register_forward_hook(calls)
    started, written = time.perf_counter(), 0
    if args.infill is not None:
        texts = infill(model, args.infill, args.num_samples, sampler_config(args), args.seed)
        bar.close()
        written = args.infill.count("_") * args.num_samples
        print(texts[0])
    else:
        texts, shown = [args.prompt] * args.num_samples, 0
        for new in write_blocks(model, args):
            texts = [text + more for text, more in zip(texts, new, strict=True)]
            # The first sample is streamed; the others follow when it is complete
            print(texts[0][shown:], end="", flush=True)
            shown = len(texts[0])
        written = sum(map(len, texts)) - len(args.prompt) * args.num_samples
        print()
    for i, text in enumerate(texts[1:], start=2):
        print(f"\n----- sample {i} -----\n{text}")
    seconds = max(time.perf_counter() - started, 1e-9)
    print(
        f"{written} characters in {seconds:.1f} s: {written / seconds:.0f} characters per second, "
        f"{calls.n} network calls", file=sys.stderr,
    )
    if sys.stderr.isatty():
        print('try --prompt "ROMEO:", --infill "To be, or ___", or --k 8 --temperature 1, which '
              "writes likelier text in more calls", file=sys.stderr)


if __name__ == "__main__":
    run(main)
