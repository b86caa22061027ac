"""Write text with the diffusion model, or fill the gaps of a given one.

    uv run sample.py                                  # 30 blocks, each continuing the one before
    uv run sample.py --prompt "ROMEO:" --num-blocks 2
    uv run sample.py --method ancestral --temperature 0.8 --num-samples 4
"""

import argparse
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch

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
    noise_index,
)

# ----------------------------------------------------------------------------------------------------
# The decoding loop


class Proposal(NamedTuple):
    """What a rule sees at one step; it answers which positions to reveal, (B, T) bool."""

    log_p: torch.Tensor     # (B, T, V) the model's log-probabilities, before any temperature
    chosen: torch.Tensor    # (B, T) the character drawn for every position
    eligible: torch.Tensor  # (B, T) masked positions that may be revealed now
    noise: torch.Tensor     # (B, T) uniform on (0, 1), fresh at every step
    fate: torch.Tensor      # (B, T) uniform on (0, 1), the same at every step

    def confidence(self) -> torch.Tensor:
        """Probability of the chosen character, (B, T); -1 where nothing may be revealed."""
        p = self.log_p.gather(-1, self.chosen[..., None]).squeeze(-1).exp()
        return p.masked_fill(~self.eligible, -1.0)


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


def ancestral(proposal: Proposal, steps: int) -> torch.Tensor:
    """The exact reverse process on a grid of `steps` levels (MDLM, arXiv 2406.07524, eq. 7).

    A position is revealed in the step in which the forward process hid it, and that is uniform over
    the levels: `fate` decides it once and for all, which is the same in law as tossing a coin of
    probability 1 / t at every level t, and steps in which nothing would happen cost no network call."""
    level = (proposal.fate * steps).long().masked_fill(~proposal.eligible, -1)
    return level == level.amax(1, keepdim=True)


def uniform(seeds: torch.Tensor, length: int, stream: int) -> torch.Tensor:
    """Uniform numbers on (0, 1), (B, length), from row seeds (B,): a hash of seed, stream and position
    (the finaliser of SplitMix64). A row's numbers so depend on its own seed alone, not on which rows
    share its batch, which a torch.Generator could not promise."""
    position = torch.arange(length, device=seeds.device)
    h = seeds[:, None] * -7046029254386353131 + position * -4658895280553007687 + stream * -7723592293110705685
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        h = (h ^ (h >> shift & (1 << 64 - shift) - 1)) * factor  # masked: int64 shifts drag the sign along
    h = h ^ (h >> 31 & (1 << 33) - 1)
    return ((h >> 40 & (1 << 24) - 1).float() + 0.5) / (1 << 24)


def draw(log_p: torch.Tensor, temperature: float, u: torch.Tensor) -> torch.Tensor:
    """One character id per position, (B, T), from log_p (B, T, V) by inverse transform of u (B, T);
    temperature 0 is argmax."""
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
    window: int | None = None,
) -> Iterator[torch.Tensor]:
    """The one decoding loop. Yields x (B, T) itself and then every intermediate state; the last one
    has no masked position left.

    x        ids with model.config.mask_token_id wherever a character is wanted; known ones stay
    rule     chooses what to reveal at a step: at least one eligible position in every unfinished row
    seed     an int, from which row r gets seed + r, or a seed per row (B,)
    window   only the leftmost `window` masked positions of a row are eligible
    """
    mask_token_id = model.config.mask_token_id
    rows = torch.arange(x.size(0), device=x.device)
    seeds = seed + rows if isinstance(seed, int) else seed
    fate = uniform(seeds, x.size(1), stream=0)
    step = 0
    yield x
    while (masked := x == mask_token_id).any():
        step += 1
        with autocast(x.device):
            logits = model(x, noise_index(masked, model.config.diffusion_steps))  # (B, T, V)
        log_p = log_probs(logits, mask_token_id)
        chosen = draw(log_p, temperature, uniform(seeds, x.size(1), stream=2 * step))
        eligible = masked if window is None else masked & (masked.cumsum(1) <= window)
        proposal = Proposal(log_p, chosen, eligible, uniform(seeds, x.size(1), stream=2 * step + 1), fate)
        x = torch.where(rule(proposal) & eligible, chosen, x)
        yield x


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
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(130)
