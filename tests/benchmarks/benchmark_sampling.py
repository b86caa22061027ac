"""How good and how fast is the sampler? The text, judged by a GPT that wrote none of it; the speed.

    uv run tests/experiments/causal_twin.py --characters 2700000 --seeds 12 \
        --weights weights/judge.pt
    uv run tests/benchmarks/benchmark_sampling.py             # every row, minutes to an hour each
    uv run tests/benchmarks/benchmark_sampling.py --only "quality" --csv rows.csv
    uv run tests/benchmarks/benchmark_sampling.py --speed      # beside a naive loop and the twin
    uv run tests/benchmarks/benchmark_sampling.py --csv tests/benchmarks/frontier.csv \
        --plot tests/benchmarks/frontier.png --only no

A row is the mean, and its standard error, over the texts of all seeds: 26 a seed, each of 800
characters behind two line ends that nobody sees. Real text comes in pieces of 800 characters, as
many as it has, but at most 150. Columns:

    calls     network calls per 240 characters
    judge     nats per character under the judge, a GPT twin that reads windows of 256 characters;
              the first 64 of each are not scored
    over      `judge` less that of the held-out slice: the distance over unseen plays
    ?!        question and exclamation marks per 1,000 characters
    speakers  per 1,000 characters: a blank line, a name, a colon
    valid     share of the words that occur in the train split
    distinct  distinct 4-grams over all 4-grams of a text
    copy      longest verbatim copy from the train split, in characters
    longest   the longest copy of all texts

The train split leaves out the held-out slice, its first 40,000 characters, which the judge has not
learned. Settings are chosen by the slice's row; the validation split chooses nothing. Near to real
text is good in every column, and below it is not better: `judge`, `valid` and `distinct` reward
easy text. Without --judge, its two columns are left out.
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
from itertools import chain
from pathlib import Path

sys.path[:0] = map(str, (Path(__file__).parents[2], Path(__file__).parents[1] / "experiments"))
import numpy as np
import torch
import torch.nn.functional as F
from causal_twin import TWIN_WEIGHTS, continue_causally, make_causal, next_log_p, nll_of

from model import (
    COUNT, DEFAULT_DATA, DEFAULT_WEIGHTS, ROOT, SEED, CommandLine, decode_tokens, encode_text,
    load_corpus, load_weights, pick_device, spaced_windows, start,
)
from sample import (
    QUALITIES, SamplerConfig, ancestral, best_k, fill, left_to_right, load_for_sampling, lowest,
    threshold, top_k,
)
from training import HELD_OUT

TEXTS, BATCH, LENGTH, PIECES, UNSEEN = 26, 13, 800, 150, "\n\n"
JUDGE_WEIGHTS = ROOT / "weights" / "judge.pt"
TWIN = "GPT twin"  # rows' name


@torch.no_grad()
def judged_nats(judge, x_0, context: int = 64):
    """Nats per character of the texts x_0 (B, N) under a GPT twin, (B,). Its windows overlap by
    `context` characters, which it only reads: each character but the first of these counts once."""
    T, scored = judge.config.sequence_len, x_0.size(1) - context
    full = F.pad(x_0, (0, -scored % (T - context)))                 # for the last window
    windows = full.unfold(1, T, T - context).flatten(0, 1)          # (B * windows of a text, T)
    nll = torch.cat([nll_of(next_log_p(judge, x), x) for x in windows.split(64)])
    return nll[:, context:].reshape(len(x_0), -1)[:, :scored].mean(1)


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


class Columns:
    """Judges texts: what it has counted, and the GPT twin that reads them, or None."""

    def __init__(self, learned: str, judge, unseen: list[str]):
        self.learned, self.vocabulary, self.judge = learned, set(words(learned)), judge
        self.level = np.mean(self.nats(unseen)) if judge else 0

    def nats(self, texts: list[str]) -> list[float]:
        x_0 = [encode_text(UNSEEN + text, self.judge.config).long() for text in texts]
        x_0 = torch.stack(x_0).to(next(self.judge.parameters()).device)
        return judged_nats(self.judge, x_0).tolist()

    def of(self, text: str) -> dict[str, float]:
        grams = [text[i : i + 4] for i in range(len(text) - 3)]
        return {
            "?!": 1000 * len(re.findall("[?!]", text)) / len(text),
            "speakers": 1000 * len(re.findall(r"\n\n[A-Z][A-Za-z ']+:\n", text)) / len(text),
            "valid": np.mean([word in self.vocabulary for word in words(text)]),
            "distinct": len(set(grams)) / len(grams),
            "copy": longest_copy(text, self.learned),
        }

    def row(self, texts: list[str], calls: list[float]) -> dict[str, tuple[float, float]]:
        """Mean and standard error of every column."""
        columns = {"calls": calls}
        if self.judge:
            columns["judge"] = self.nats(texts)
            columns["over"] = [nats - self.level for nats in columns["judge"]]
        rest = [self.of(text) for text in texts]
        columns |= {name: [row[name] for row in rest] for name in rest[0]}
        row = {name: (np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values)))
               for name, values in columns.items()}
        return row | {"longest": (max(columns["copy"]), 0)}


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


PLAIN = SamplerConfig(temperature=1.0, sweeps=0, block_len=128)  # what other rules are tried with
SWEPT = replace(PLAIN, sweeps=2, sweep_min_p=1.0, stride=4)
ROWS = {f"--quality {name}": config for name, config in QUALITIES.items()} | {
    "left to right": replace(PLAIN, rule=left_to_right),
    "gumbel-top-k 20, T 0.6: the first default": replace(
        SWEPT, rule=gumbel_top_k, temperature=0.6
    ),
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
def write(model, config: SamplerConfig, seed: int, length: int = LENGTH):
    """The texts of a seed, and the network calls of each per 240 characters. A call counts for the
    texts that have masked characters: the batch waits for the text that needs most calls. Half of
    the texts at a time, because a CPU's cache then holds the activations."""
    masked, mask_token_id = [], model.config.mask_token_id      # at every call: (BATCH,) bool
    hook = model.register_forward_pre_hook(
        lambda _, inputs: masked.append((inputs[0] == mask_token_id).any(1))
    )
    unseen = encode_text(UNSEEN, model.config).long()
    blank = torch.cat((unseen, unseen.new_full((length,), mask_token_id)))
    blank = blank.to(next(model.parameters()).device).repeat(BATCH, 1)
    generator = torch.Generator().manual_seed(seed)
    texts, calls = [], []
    for _ in range(TEXTS // BATCH):
        *_, (x, _) = fill(model, blank, config, generator)
        texts += [decode_tokens(row) for row in x[:, len(unseen):]]
        calls += (torch.stack(masked).sum(0) * 240 / length).tolist()
        masked.clear()
    hook.remove()
    return texts, calls


def write_causally(twin, temperature: float, seed: int):
    """The same by the GPT twin, half a window at a time."""
    half = twin.config.sequence_len // 2
    x = encode_text(UNSEEN, twin.config).long().to(next(twin.parameters()).device).repeat(TEXTS, 1)
    generator = torch.Generator().manual_seed(seed)
    while x.size(1) < LENGTH + len(UNSEEN):
        seen = x[:, -half:]
        window = continue_causally([twin], seen, half, temperature, generator)
        x = torch.cat((x, window[:, seen.size(1):]), 1)
    return [decode_tokens(row[len(UNSEEN):][:LENGTH]) for row in x], [240.0] * TEXTS


def pieces(ids) -> list[str]:
    """Evenly spaced pieces of a text, which do not overlap."""
    windows = spaced_windows(ids, LENGTH, min(PIECES, len(ids) // LENGTH))
    return [decode_tokens(window) for window in windows]


def show(name: str, row: dict[str, tuple[float, float]], path: Path | None) -> None:
    digits = {"calls": 0, "judge": 3, "over": 3, "valid": 3, "distinct": 3, "longest": 0}
    cells = (" ± ".join(f"{x:.{digits.get(column, 1)}f}" for x in pair if x)
             for column, pair in row.items())
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    if path:
        fresh = not path.exists()
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(["row", *(c + e for c in row for e in ("", " error"))])
            writer.writerow([name, *(f"{x:.5g}" for pair in row.values() for x in pair)])


def frontier(args, model, judge, twin, train, val):
    held, learned = train.tensor_split([HELD_OUT])
    columns = Columns(decode_tokens(learned), judge, pieces(held))

    def row(name, batches):
        if any(part in name for part in args.only):
            texts, calls = (list(chain(*parts)) for parts in zip(*batches, strict=True))
            show(name, columns.row(texts, calls), args.csv)

    for name, ids in {"train split": learned, "held-out slice": held, "validation": val}.items():
        row(name, [(texts := pieces(ids), [0.0] * len(texts))])
    for name, config in ROWS.items():
        row(name, (write(model, config, seed) for seed in args.seeds))
    if twin:
        row(f"{TWIN}, T 1", (write_causally(twin, 1.0, seed) for seed in args.seeds))


def plot(rows_file: Path, picture: Path) -> None:
    """Calls against the distance from unseen plays, of every row that makes calls."""
    from matplotlib.figure import Figure

    with open(rows_file, newline="", encoding="utf-8") as file:
        rows = {row["row"]: [float(row[key]) for key in ("calls", "over", "over error")]
                for row in csv.DictReader(file) if float(row["calls"])}
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="tight")
    axes = figure.subplots()
    qualities = [rows[name] for name in sorted(rows, key=rows.get) if name.startswith("--quality")]
    axes.plot(*list(zip(*qualities, strict=True))[:2], lw=1, color="#d98c00")
    for name, (calls, over, error) in rows.items():
        ours = name == "--quality default"
        axes.errorbar(calls, over, error, fmt="*" if ours else "o", ms=14 if ours else 4,
                      color="#d98c00" if name.startswith("--quality") else "#444")
        axes.annotate(name.removeprefix("--quality "), (calls, over), fontsize=11 if ours else 8,
                      xytext=(-8, 8) if calls > 150 else (8, 5), textcoords="offset points",
                      ha="right" if calls > 150 else "left", weight="bold" if ours else None)
    axes.axhline(0, lw=0.8, color="#888")
    axes.annotate("unseen plays", (240, 0), fontsize=8, color="#888", ha="right", xytext=(0, 3),
                  textcoords="offset points")
    axes.set(xscale="log", xlabel="network calls per 240 characters",
             ylabel="nats per character over unseen plays")
    axes.set_xticks([30, 60, 120, 240], ["30", "60", "120", "240"], minor=False)
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


def sampler(model, context: str, seed: int, config: SamplerConfig, num_samples: int = 1) -> str:
    """What sample.py does, for 1,200 characters."""
    x = encode_text(context, model.config).long().to(next(model.parameters()).device)
    x = torch.cat((x, x.new_zeros(6 * config.block_len))).repeat(num_samples, 1)
    *_, (x, _) = fill(model, x, config, torch.Generator().manual_seed(seed))
    return decode_tokens(x[:, len(context):].flatten())


def speed(args, model, twin, float32_model, val):
    """Every way in turn, so that a slow spell of the machine hits all of them."""
    context = decode_tokens(val[:16])
    ways = {"naive loop": lambda seed: naive_loop(float32_model, context)}
    if twin:
        ways["GPT twin, cached"] = partial(causal_loop, twin, context)
    for name, config in QUALITIES.items():
        ways[f"--quality {name}"] = partial(sampler, model, context, config=config)
    ways["default, 8 samples"] = partial(sampler, model, context, config=SamplerConfig(),
                                         num_samples=8)
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
    add("--weights", type=Path, default=DEFAULT_WEIGHTS, help="checkpoint whose text is judged")
    add("--judge", type=Path, default=JUDGE_WEIGHTS,
        help="the GPT twin that judges; without it, no column of its own")
    add("--twin", type=Path, default=TWIN_WEIGHTS,
        help="the GPT twin that writes, another one; left out if missing")
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
    judge, twin = (make_causal(load_for_sampling(path, device, True)) if path.exists() else None
                   for path in (args.judge, args.twin))
    train, val, _ = load_corpus(DEFAULT_DATA, model.config)
    if args.speed:
        speed(args, model, twin, load_weights(args.weights, device)[0], val)
    else:
        frontier(args, model, judge, twin, train, val)
    if args.plot:
        plot(args.csv, args.plot)


if __name__ == "__main__":
    start(main)
