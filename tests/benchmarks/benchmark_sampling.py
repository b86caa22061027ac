"""How good and how fast is the sampler? A judge that sees the play, and the speed of sample.py.

    uv run tests/benchmarks/benchmark_sampling.py             # every rule, minutes to an hour a row
    uv run tests/benchmarks/benchmark_sampling.py --only "32 turns" --csv rows.csv
    uv run tests/benchmarks/benchmark_sampling.py --speed      # beside a naive loop and the twin
    uv run tests/benchmarks/benchmark_sampling.py --csv tests/benchmarks/frontier.csv \
        --plot tests/benchmarks/frontier.png --only no

A row is the mean, and its standard error, over seeds of 26 texts of 800 characters, which begin
behind two line ends that nobody sees. Columns:

    calls     network calls per 240 characters, the mean over texts
    speakers  per 1,000 characters: a blank line, a name, a colon
    ?!        question and exclamation marks per 1,000 characters
    line      mean length of the lines that are not empty
    JSD-3     Jensen-Shannon divergence, in nats, of the 3-grams of a seed's 20,800 characters from
              those of the counted text; it depends on the number of characters
    valid     share of the words that occur in the counted text
    n-gram    nats per character under an interpolated Witten-Bell 7-gram model of the counted text
    distinct  distinct 4-grams over all 4-grams of a text
    copy      longest verbatim copy from the counted text, in characters

The counted text is the train split without its last 40,000 characters. Those are the reference by
which settings are chosen; the validation split is shown and not tuned on. n-gram and distinct are
better the nearer they are to real text: low values reward text that is easy.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads must not spin on busy cores

import csv
import math
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "experiments")]  # model.py, causal_twin.py
import numpy as np
import torch
from causal_twin import TWIN_WEIGHTS, continue_causally

from model import (
    COUNT, DEFAULT_DATA, DEFAULT_WEIGHTS, SEED, CommandLine, decode_tokens, encode_text,
    load_corpus, load_weights, pick_device, spaced_windows, start,
)
from sample import (
    SamplerConfig, ancestral, best_k, dilated, fill, left_to_right, load_for_sampling, lowest,
    threshold, top_k,
)

TEXTS, LENGTH, UNSEEN = 26, 800, "\n\n"
REFERENCE = 40_000  # characters at the end of the train split, not counted
TWIN = "GPT twin"  # rows' name


class NGramJudge:
    """Interpolated Witten-Bell n-gram model,
        P(w | h) = (c(hw) + d(h) P(w | shorter h)) / (c(h) + d(h)),
    where d(h) counts the distinct characters seen after h, and P without history is 1 / 127."""

    def __init__(self, ids: np.ndarray, order: int = 7):
        self.tables = []
        for n in range(1, order + 1):
            grams, counts = np.unique(codes(ids, n), return_counts=True)
            histories, start = np.unique(grams >> 7, return_index=True)
            totals, kinds = np.add.reduceat(counts, start), np.diff([*start, len(grams)])
            self.tables.append((grams, counts, histories, totals, kinds))

    def nats(self, ids: np.ndarray, skip: int) -> np.ndarray:
        """-log P of every character after the first `skip`, which are history only."""
        p = np.full(len(ids) - skip, 1 / 127)
        for n, (grams, counts, histories, totals, kinds) in enumerate(self.tables, start=1):
            keys = codes(ids, n)[skip - n + 1 :]
            c_hw = look_up(grams, counts, keys)
            c_h, d_h = (look_up(histories, values, keys >> 7) for values in (totals, kinds))
            p = np.where(c_h > 0, (c_hw + d_h * p) / np.maximum(c_h + d_h, 1), p)
        return -np.log(p)


def codes(ids: np.ndarray, n: int) -> np.ndarray:
    """Every n characters in a row as one integer, 7 bits each."""
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.int64), n)
    return (windows << 7 * np.arange(n)[::-1]).sum(1)


def look_up(table: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The value of each key in the sorted table, 0 for one that is not there."""
    at = np.searchsorted(table, keys).clip(max=len(table) - 1)
    return np.where(table[at] == keys, values[at], 0)


def jensen_shannon(a: np.ndarray, b: np.ndarray) -> float:
    """Of the distributions of the values in a and in b, in nats."""
    kinds, place = np.unique(np.concatenate((a, b)), return_inverse=True)
    parts = np.split(place, [len(a)])
    p, q = (np.bincount(part, minlength=len(kinds)) / len(part) for part in parts)
    m = (p + q) / 2

    def kl(x):
        return (x[x > 0] * np.log(x[x > 0] / m[x > 0])).sum()

    return (kl(p) + kl(q)) / 2


def longest_copy(text: str, source: str) -> int:
    """Length of the longest stretch of `text` that stands in `source`."""
    best = start = 0
    while start + best < len(text):
        if text[start : start + best + 1] in source:
            best += 1
        else:
            start += 1
    return best


def words(text: str) -> list[str]:
    """Whole words in lower case; those that touch either end of the text are left out."""
    matches = re.finditer(r"[A-Za-z']+", text)
    return [m[0].lower() for m in matches if m.start() > 0 and m.end() < len(text)]


class Judge:
    """The columns of a set of texts, from what it has counted."""

    def __init__(self, counted: str):
        self.source, self.vocabulary = counted, set(words(counted))
        ids = np.frombuffer(counted.encode(), np.uint8)
        self.ngram, self.trigrams = NGramJudge(ids), codes(ids, 3)

    def columns(self, texts: list[str]) -> dict[str, float]:
        whole = [np.frombuffer((UNSEEN + text).encode(), np.uint8) for text in texts]
        lines = [line for text in texts for line in text.split("\n") if line]
        known = [word in self.vocabulary for text in texts for word in words(text)]
        per_thousand = 1000 / sum(map(len, texts))
        return {
            "speakers": per_thousand * sum(len(re.findall(r"\n\n[A-Z][A-Za-z ']+:\n", text))
                                           for text in texts),
            "?!": per_thousand * sum(text.count("?") + text.count("!") for text in texts),
            "line": np.mean([len(line) for line in lines]),
            "JSD-3": jensen_shannon(np.concatenate([codes(ids[2:], 3) for ids in whole]),
                                    self.trigrams),
            "valid": np.mean(known),
            "n-gram": np.mean([self.ngram.nats(ids, 8).mean() for ids in whole]),
            "distinct": np.mean([len(set(grams)) / len(grams) for grams in
                                 ([text[i : i + 4] for i in range(len(text) - 3)]
                                  for text in texts)]),
            "copy": max(longest_copy(text, self.source) for text in texts),
        }


# Rules that were tried and lost to those of sample.py


def gumbel_top_k(proposal, k=20):
    """k characters drawn without replacement in proportion to their confidence, by adding Gumbel
    noise to its logarithm (arXiv 1903.06059). Each position keeps its noise."""
    noise = -torch.log(-torch.log(proposal.unmask_time.clamp(min=1e-9)))
    score = proposal.confidence().clamp(min=1e-9).log() + noise
    return best_k(score.masked_fill(~proposal.masked, -math.inf), k)


def entropy_bound(proposal, gamma):
    """The positions of least entropy, as many as keep the sum of their entropies but the largest
    within gamma nats: a bound on what unmasking them at once, as if independent, can cost.
    EB-Sampler, arXiv 2505.24857."""
    p_log_p = torch.where(proposal.log_p > -math.inf, proposal.log_p.exp() * proposal.log_p, 0.0)
    entropy = (-p_log_p.sum(-1)).masked_fill(~proposal.masked, math.inf)        # (B, T)
    ascending, order = entropy.sort(1)
    within = ascending.cumsum(1) - ascending <= gamma                           # or the first
    return torch.zeros_like(within).scatter_(1, order, within)


def leftmost(proposal, rule, width):
    """What `rule` unmasks when it sees no more than the leftmost `width` masked positions."""
    near = proposal.masked & (proposal.masked.cumsum(1) <= width)
    return rule(proposal._replace(masked=near)) & near


def margin(proposal, k):
    """The k positions whose two likeliest characters are furthest apart. arXiv 2502.06768."""
    first, second = proposal.log_p.topk(2).values.exp().unbind(-1)
    return best_k((first - second).masked_fill(~proposal.masked, -math.inf), k)


def factor(proposal, f):
    """The n most confident, for the largest n with (n + 1)(1 - confidence of the n-th) < f.
    Fast-dLLM, arXiv 2505.22618."""
    confidence, order = proposal.confidence().sort(1, descending=True)
    n = torch.arange(1, confidence.size(1) + 1, device=order.device)
    within = ((n + 1) * (1 - confidence) < f) & (confidence >= 0)
    many = (within * n).amax(1, keepdim=True).clamp(min=1)
    return torch.zeros_like(within).scatter_(1, order, n <= many)


def cosine_ancestral(proposal, steps):
    """The reverse process on levels t = cos(pi / 2 (1 - i / steps)), finer where much is masked,
    coarser where little is. MD4, arXiv 2406.04329."""
    level = (steps * (1 - 2 / math.pi * proposal.unmask_time.arccos())).long()
    return lowest(-level, proposal.masked)


def random_order(proposal, k):
    """k characters anywhere."""
    return best_k(proposal.unmask_time.masked_fill(~proposal.masked, -1.0), k)


DEFAULT = SamplerConfig()
PLAIN = SamplerConfig(temperature=1.0, sweeps=0, block_len=128)  # what other rules are tried with
SWEPT = replace(PLAIN, sweeps=2, sweep_min_p=1.0, stride=4)
ROWS = {
    "the default": DEFAULT,
    "the default, T 1": replace(DEFAULT, temperature=1.0),
    "the default, sweeps that take the likeliest": replace(DEFAULT, sweep_min_p=1.0),
    "the default, 32 turns": replace(DEFAULT, rule=partial(dilated, turns=32)),
    "the default, 22 turns, 4 sweeps, min-p 0.5": replace(
        DEFAULT, rule=partial(dilated, turns=22), sweeps=4, sweep_min_p=0.5
    ),
    "left to right, T 0.8": replace(PLAIN, rule=left_to_right, temperature=0.8),
    "gumbel-top-k 20, T 0.6: the old default": replace(SWEPT, rule=gumbel_top_k, temperature=0.6),
    "random order, 20 a call": replace(SWEPT, rule=partial(random_order, k=20)),
    "ancestral 128, whole window": replace(PLAIN, rule=ancestral, block_len=224),
    "top-k 8": replace(SWEPT, rule=partial(top_k, k=8)),
    "threshold 0.9": replace(PLAIN, rule=threshold),
    "factor 0.5": replace(PLAIN, rule=partial(factor, f=0.5)),
    "entropy 0.5": replace(PLAIN, rule=partial(entropy_bound, gamma=0.5)),
    "margin 4": replace(PLAIN, rule=partial(margin, k=4)),
    "cosine ancestral 16": replace(PLAIN, rule=partial(cosine_ancestral, steps=16)),
}


@torch.inference_mode()
def write(model, config: SamplerConfig, seed: int, length: int = LENGTH) -> tuple[list[str], float]:
    """The texts of a seed, and the network calls per 240 characters. A call counts for the texts
    that have masked characters: the batch waits for the text that needs most calls."""
    calls, mask_token_id = [], model.config.mask_token_id
    hook = model.register_forward_pre_hook(
        lambda _, inputs: calls.append((inputs[0] == mask_token_id).any(1).float().mean().item())
    )
    unseen = encode_text(UNSEEN, model.config).long()
    x = torch.cat((unseen, unseen.new_full((length,), mask_token_id)))
    x = x.to(next(model.parameters()).device).repeat(TEXTS, 1)
    *_, (x, _) = fill(model, x, config, torch.Generator().manual_seed(seed))
    hook.remove()
    return [decode_tokens(row) for row in x[:, len(unseen):]], 240 * sum(calls) / length


def write_causally(twin, temperature: float, seed: int) -> tuple[list[str], float]:
    """The same by the GPT twin, half a window at a time."""
    half = twin.config.sequence_len // 2
    x = encode_text(UNSEEN, twin.config).long().to(next(twin.parameters()).device).repeat(TEXTS, 1)
    generator = torch.Generator().manual_seed(seed)
    while x.size(1) < LENGTH + len(UNSEEN):
        seen = x[:, -half:]
        window = continue_causally([twin], seen, half, temperature, generator)
        x = torch.cat((x, window[:, seen.size(1):]), 1)
    return [decode_tokens(row[len(UNSEEN):][:LENGTH]) for row in x], 240


def summary(figures: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and standard error over seeds, for every column."""
    values = {name: np.array([row[name] for row in figures]) for name in figures[0]}
    root = math.sqrt(max(1, len(figures)))
    return {name: (v.mean(), v.std(ddof=1) / root if len(v) > 1 else 0.0)
            for name, v in values.items()}


def show(name: str, row: dict[str, tuple[float, float]], path: Path | None) -> None:
    digits = {"JSD-3": 4, "valid": 3, "n-gram": 2, "distinct": 3, "copy": 0, "calls": 0}
    cells = (f"{mean:.{digits.get(column, 1)}f} ± {error:.{digits.get(column, 1)}f}"
             for column, (mean, error) in row.items())
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    if path:
        fresh = not path.exists()
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(["row", *(c + e for c in row for e in ("", " error"))])
            writer.writerow([name, *(f"{x:.5g}" for pair in row.values() for x in pair)])


def frontier(args, model, twin, train, val):
    counted, held = train[:-REFERENCE], train[-REFERENCE:]
    judge = Judge(decode_tokens(counted))
    references = {"train split": counted, "its last 40,000 characters": held, "validation": val}
    print("| text | calls | speakers | ?! | line | JSD-3 | valid | n-gram | distinct | copy |\n"
          "|---|---|---|---|---|---|---|---|---|---|")

    def row(name, write_texts):
        if any(part in name for part in args.only):
            figures = []
            for seed in args.seeds:
                texts, calls = write_texts(seed)
                figures.append({"calls": calls, **judge.columns(texts)})
            show(name, summary(figures), args.csv)

    for name, ids in references.items():
        row(name, lambda seed, ids=ids: (pieces(ids, seed), 0))
    for name, config in ROWS.items():
        row(name, partial(write, model, config))
    for temperature in (1.0, 0.8) if twin else ():
        row(f"{TWIN}, T {temperature}", partial(write_causally, twin, temperature))


def pieces(ids, seed: int) -> list[str]:
    """Evenly spaced pieces of a text, other ones for other seeds."""
    shift = seed * LENGTH // 8
    return [decode_tokens(piece) for piece in spaced_windows(ids[shift:], LENGTH, TEXTS)]


def plot(rows_file: Path, picture: Path) -> None:
    from matplotlib.figure import Figure

    with open(rows_file, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(8, 5), dpi=110, layout="tight")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        below = -9 if i % 2 else 3  # neighbours' names on either side
        calls, divergence, error = (float(row[key]) for key in ("calls", "JSD-3", "JSD-3 error"))
        if calls:
            # Variants of the default, present and former, get no name
            name = row["row"]
            trial = ("default" in name or "dilated" in name) and not name.endswith("default")
            colour, right = "#bbb" if trial else "#222", calls > 150
            axes.errorbar(calls, divergence, error, fmt="o", ms=3, color=colour)
            axes.annotate("" if trial else name, (calls, divergence), fontsize=7,
                          xytext=(-5 if right else 5, below), textcoords="offset points",
                          ha="right" if right else "left")
        else:
            axes.axhline(divergence, lw=0.8, color="#d98c00")
            axes.annotate(row["row"], (90, divergence), fontsize=7, color="#d98c00",
                          xytext=(0, below), textcoords="offset points")
    axes.set(xscale="log", xlabel="network calls per 240 characters")
    axes.set(yscale="log", ylabel="JSD-3, nats")
    axes.set_xticks([30, 60, 120, 240], ["30", "60", "120", "240"], minor=False)
    ticks = ["0.05", "0.06", "0.08", "0.1", "0.15", "0.2"]
    axes.set_yticks([float(tick) for tick in ticks], ticks)
    axes.minorticks_off()
    figure.savefig(picture)


@torch.no_grad()
def naive_loop(model, context: str, length: int = 240, tau: float = 0.9) -> str:
    """What one writes first: float32, the whole window at every step, argmax, Python loops."""
    ids = list(context.encode()) + [0] * length
    device = next(model.parameters()).device
    while 0 in ids:
        t = math.ceil(model.config.diffusion_steps * ids.count(0) / len(ids))
        x, index = torch.tensor([ids], device=device), torch.tensor([t - 1], device=device)
        confidence, chosen = model(x, index)[0].exp().max(-1)
        masked = [i for i, token in enumerate(ids) if token == 0]
        sure = [i for i in masked if confidence[i] >= tau]
        for i in sure or [max(masked, key=confidence.tolist().__getitem__)]:
            ids[i] = int(chosen[i])
    return decode_tokens(torch.tensor(ids[len(context):]))


def causal_loop(twin, context: str, seed: int) -> str:
    """One character a call, the keys and values of all before it kept."""
    x = encode_text(context, twin.config).long().to(next(twin.parameters()).device)[None]
    x = continue_causally([twin], x, 240, 0.7, torch.Generator().manual_seed(seed))
    return decode_tokens(x[0, len(context):])


def sampler(model, context: str, seed: int, num_samples: int) -> str:
    """What sample.py does with its defaults, for eight blocks."""
    x = encode_text(context, model.config).long().to(next(model.parameters()).device)
    x = torch.cat((x, x.new_zeros(8 * DEFAULT.block_len))).repeat(num_samples, 1)
    *_, (x, _) = fill(model, x, DEFAULT, torch.Generator().manual_seed(seed))
    return decode_tokens(x[:, len(context):].flatten())


def speed(args, model, twin, float32_model, val):
    """Every way in turn, so that a slow spell of the machine hits all of them."""
    context = decode_tokens(val[:16])
    ways = {"naive loop": lambda seed: naive_loop(float32_model, context)}
    if twin:
        ways["GPT twin, cached"] = partial(causal_loop, twin, context)
    for num_samples, name in ((1, "sample.py"), (8, "sample.py, 8 samples")):
        ways[name] = partial(sampler, model, context, num_samples=num_samples)
    rates = {name: [] for name in ways}
    for seed in range(args.repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            rates[name].append(len(way(seed)) / (time.perf_counter() - started))
    for name, values in rates.items():
        ratio = np.median(np.array(values) / np.array(rates["naive loop"]))
        print(f"{name:22} {np.median(values):7.0f} characters per second   {ratio:5.1f} x")


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--weights", type=Path, default=DEFAULT_WEIGHTS, help="checkpoint to judge")
    add("--twin", type=Path, default=TWIN_WEIGHTS, help="the GPT twin; left out if missing")
    add("--seeds", type=SEED, nargs="+", default=[0, 1, 2, 3], help="random seeds of a row")
    add("--only", nargs="+", default=[""], help="the rows whose name contains one of these")
    add("--csv", type=Path, help="file that gets the rows as well, at its end")
    add("--plot", type=Path, help="picture of the rows in --csv")
    add("--speed", action="store_true", help="measure characters per second instead")
    add("--repeats", type=COUNT, default=3, help="speed: measurements of each")
    add("--device", default="cpu", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    model = load_for_sampling(args.weights, device)
    twin = load_for_sampling(args.twin, device) if args.twin.exists() else None
    train, val, _ = load_corpus(DEFAULT_DATA, model.config)
    if args.speed:
        speed(args, model, twin, load_weights(args.weights, device)[0], val)
    else:
        frontier(args, model, twin, train, val)
    if args.plot:
        plot(args.csv, args.plot)


if __name__ == "__main__":
    start(main)
