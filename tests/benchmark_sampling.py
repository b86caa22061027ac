"""How good and how fast is the sampler? The frontier of the rules, and the speed of sample.py.

    uv run tests/causal_twin.py --max-minutes 17            # first, for the causal twin's rows
    uv run tests/benchmark_sampling.py                      # every rule, 64 samples a row
    uv run tests/benchmark_sampling.py --speed              # beside a plain loop and the twin
    uv run tests/benchmark_sampling.py --plot frontier.png  # the frontier as a picture too

Every sample continues 16 characters of held-out text by 240. Columns, each with its standard error
over groups of 8 samples:

    calls     network calls for the slowest sample
    n-gram    nats per character under an interpolated Witten-Bell 7-gram model of the train split
    valid     share of the words that occur in the train split
    distinct  distinct 4-grams over all 4-grams of 8 samples
    copy      longest verbatim copy from the train split, in characters, over all samples

Likelihood alone rewards repetition and variety alone rewards noise: read n-gram, valid and distinct
together, beside the held-out row.
"""

import math
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import (  # noqa: E402
    COUNT,
    DEFAULT_DATA,
    DEFAULT_WEIGHTS,
    SEED,
    TEMPERATURE,
    CommandLine,
    decode_tokens,
    encode_text,
    load_corpus,
    load_weights,
    number,
    run,
)
from sample import (  # noqa: E402
    CallCounter,
    SamplerConfig,
    ancestral,
    best_k,
    generate,
    gumbel_top_k,
    left_to_right,
    load_for_sampling,
    row_generators,
    threshold,
    top_k,
)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from causal_twin import TWIN_WEIGHTS, continue_causally  # noqa: E402

CONTEXT, LENGTH, GROUP = 16, 240, 8
TWIN = "causal twin"  # a row's name


class NGramJudge:
    """Interpolated Witten-Bell n-gram model,
        P(w | h) = (c(hw) + d(h) P(w | shorter h)) / (c(h) + d(h)),
    where d(h) counts the distinct characters seen after h, and P without history is 1 / 127."""

    def __init__(self, ids: np.ndarray, order: int = 7):
        self.tables = []
        for n in range(1, order + 1):
            grams, counts = np.unique(self.codes(ids, n), return_counts=True)
            histories, start = np.unique(grams >> 7, return_index=True)
            totals, kinds = np.add.reduceat(counts, start), np.diff([*start, len(grams)])
            self.tables.append((grams, counts, histories, totals, kinds))

    @staticmethod
    def codes(ids: np.ndarray, n: int) -> np.ndarray:
        """Every n characters in a row as one integer, 7 bits each."""
        windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.int64), n)
        return (windows << 7 * np.arange(n)[::-1]).sum(1)

    def nats(self, ids: np.ndarray, skip: int) -> np.ndarray:
        """-log P of every character after the first `skip`, which are history only."""
        p = np.full(len(ids) - skip, 1 / 127)
        for n, (grams, counts, histories, totals, kinds) in enumerate(self.tables, start=1):
            codes = self.codes(ids, n)[skip - n + 1 :]
            c_hw = look_up(grams, counts, codes)
            c_h, d_h = (look_up(histories, values, codes >> 7) for values in (totals, kinds))
            p = np.where(c_h > 0, (c_hw + d_h * p) / np.maximum(c_h + d_h, 1), p)
        return -np.log(p)


def look_up(table: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The value of each key in the sorted table, 0 for one that is not there."""
    at = np.searchsorted(table, keys).clip(max=len(table) - 1)
    return np.where(table[at] == keys, values[at], 0)


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


def measure(texts: list[str], contexts: list[str], judge, vocabulary, train_text) -> dict:
    """Means and standard errors over groups of 8 samples."""
    groups = []
    for i in range(len(texts) // GROUP):
        members = range(i, len(texts), len(texts) // GROUP)  # neighbours in the corpus are alike
        part = [texts[j] for j in members]
        whole = [np.frombuffer((contexts[j] + texts[j]).encode(), np.uint8) for j in members]
        nats = [judge.nats(ids, CONTEXT).mean() for ids in whole]
        known = [word in vocabulary for text in part for word in words(text)]
        grams = [text[j : j + 4] for text in part for j in range(len(text) - 3)]
        groups.append((np.mean(nats), np.mean(known), len(set(grams)) / len(grams)))
    mean, error = np.mean(groups, 0), np.std(groups, 0, ddof=1) / math.sqrt(len(groups))
    copy = max(longest_copy(text, train_text) for text in texts)
    figures = dict(zip(("ngram", "valid", "distinct"), zip(mean, error, strict=True), strict=True))
    return {**figures, "copy": copy}


def row(name, calls, m):
    keys = "ngram", "valid", "distinct"
    cells = "".join(f" {m[key][0]:.3f} ± {m[key][1]:.3f} |" for key in keys)
    return f"| {name} | {calls} |{cells} {m['copy']} |"


def write(model, x, config, seed):
    """The ids that continue the contexts x (B, T) in one batch, and the network calls it took."""
    calls = CallCounter()
    hook = model.register_forward_hook(calls)
    block_len, _ = config.lengths(model.config.sequence_len)
    num_blocks = -(-LENGTH // block_len)
    parts = list(generate(model, x, num_blocks, config, row_generators(seed, len(x))))
    hook.remove()
    return torch.cat(parts, 1)[:, :LENGTH], calls.n


# Rules that were tried and lost to those of sample.py


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
    n = torch.arange(1, confidence.size(1) + 1)
    within = ((n + 1) * (1 - confidence) < f) & (confidence >= 0)
    many = (within * n).amax(1, keepdim=True).clamp(min=1)
    return torch.zeros_like(within).scatter_(1, order, n <= many)


def cosine_ancestral(proposal, steps):
    """The reverse process on levels t = cos(pi / 2 (1 - i / steps)), finer where much is masked,
    coarser where little is. MD4, arXiv 2406.04329."""
    level = (steps * (1 - 2 / math.pi * proposal.unmask_time.arccos())).long()
    level = level.masked_fill(~proposal.masked, -1)
    return level == level.amax(1, keepdim=True)


def frontier_points(temperatures):
    """(name, temperatures, SamplerConfig but for the temperature)."""
    whole, large, medium, small = (
        dict(block_len=b, context_len=c) for b, c in ((240, 16), (128, 64), (64, 32), (32, 32))
    )
    gumbel = partial(gumbel_top_k, k=4)
    for name, rule in (
        ("threshold 0.9", partial(threshold, tau=0.9)),
        ("factor 0.5", partial(factor, f=0.5)),
        ("entropy 0.5", partial(entropy_bound, gamma=0.5)),
        ("margin 4", partial(margin, k=4)),
        ("ancestral 16 a block", partial(ancestral, steps=16)),
        ("cosine ancestral 16 a block", partial(cosine_ancestral, steps=16)),
        ("top-k 4", partial(top_k, k=4)),
        ("top-k 4, Gumbel noise", gumbel),
        ("top-k 4, Gumbel noise, leftmost 16", partial(leftmost, rule=gumbel, width=16)),
        ("left to right, 1", partial(left_to_right, k=1)),
    ):
        yield f"draft alone, {name}", temperatures, SamplerConfig(rule, sweeps=0, **medium)
    for name, rule, sweeps, stride, block in (
        ("top-k 16, 1 sweep of 6", partial(top_k, k=16), 1, 6, large),
        ("top-k 16, 2 sweeps of 4", partial(top_k, k=16), 2, 4, large),
        ("top-k 8, 1 sweep of 6", partial(top_k, k=8), 1, 6, large),
        ("top-k 16 with Gumbel noise, 1 sweep of 6", partial(gumbel_top_k, k=16), 1, 6, large),
        ("top-k 16 with Gumbel noise, 2 sweeps of 4", partial(gumbel_top_k, k=16), 2, 4, large),
        ("top-k 16 with Gumbel noise, 2 sweeps of 3", partial(gumbel_top_k, k=16), 2, 3, large),
        ("top-k 20 with Gumbel noise, 2 sweeps of 4", partial(gumbel_top_k, k=20), 2, 4, large),
        ("top-k 8 with Gumbel noise, 2 sweeps of 4", partial(gumbel_top_k, k=8), 2, 4, large),
        ("top-k 8 with Gumbel noise, 2 sweeps of 6", partial(gumbel_top_k, k=8), 2, 6, large),
        ("top-k 6 with Gumbel noise, 2 sweeps of 4", partial(gumbel_top_k, k=6), 2, 4, large),
        ("threshold 0.5, 1 sweep of 6", partial(threshold, tau=0.5), 1, 6, large),
        ("top-k 20 with noise, 2 sweeps of 4, after 32", partial(gumbel_top_k, k=20), 2, 4, {}),
        ("top-k 22 with noise, 2 sweeps of 4, after 32", partial(gumbel_top_k, k=22), 2, 4, {}),
        ("top-k 8 with noise, 2 sweeps of 4, after 32", partial(gumbel_top_k, k=8), 2, 4, {}),
        ("top-k 6 with noise, 2 sweeps of 4, after 32", partial(gumbel_top_k, k=6), 2, 4, {}),
        ("top-k 8, 2 sweeps of 4, blocks of 64", partial(top_k, k=8), 2, 4, medium),
        ("top-k 8, 2 sweeps of 4, blocks of 32", partial(top_k, k=8), 2, 4, small),
        ("top-k 24 with Gumbel noise, whole window", partial(gumbel_top_k, k=24), 2, 4, whole),
        ("top-k 11 with Gumbel noise, whole window", partial(gumbel_top_k, k=11), 2, 4, whole),
    ):
        config = SamplerConfig(rule, sweeps=sweeps, stride=stride, **block)
        yield f"corrected, {name}", temperatures, config
    rule = partial(ancestral, steps=128)
    yield "whole window, ancestral 128", [0.8], SamplerConfig(rule, sweeps=0, **whole)
    rule = partial(threshold, tau=0.9)
    yield "whole window, threshold 0.9", [0.0], SamplerConfig(rule, sweeps=0, **whole)
    rule = partial(left_to_right, k=1)
    yield "whole window, left to right", [0.6], SamplerConfig(rule, sweeps=0, **whole)


def everything_written(args, model, twin, x):
    """(name, temperature, new ids, calls) of every row of the frontier that --only asks for."""
    for name, temperatures, config in frontier_points(args.temperatures):
        for temperature in temperatures if any(words in name for words in args.only) else []:
            config = replace(config, temperature=temperature)
            yield name, temperature, *write(model, x, config, args.seed)
    asked = twin is not None and any(words in TWIN for words in args.only)
    for temperature in (0.6, 0.7, 0.8) if asked else []:
        generators = row_generators(args.seed, len(x))
        new = continue_causally([twin], x, LENGTH, temperature, generators)[:, CONTEXT:]
        yield TWIN, temperature, new, LENGTH


def frontier(args, model, twin, train, val):
    judge = NGramJudge(train.numpy())
    train_text, val_text = decode_tokens(train), decode_tokens(val)
    vocabulary = set(words(train_text))
    starts = np.linspace(0, len(val_text) - CONTEXT - LENGTH, args.num_samples).astype(int)
    contexts = [val_text[s : s + CONTEXT] for s in starts]
    references = [val_text[s + CONTEXT : s + CONTEXT + LENGTH] for s in starts]
    print("| decoding | calls | n-gram | valid | distinct | copy |\n|---|---|---|---|---|---|")
    held_out = measure(references, contexts, judge, vocabulary, train_text)
    print(row("held-out Shakespeare", "", held_out), flush=True)
    points, x = [], torch.stack([encode_text(context) for context in contexts])
    for name, temperature, new, calls in everything_written(args, model, twin, x):
        texts = [decode_tokens(ids) for ids in new]
        result = measure(texts, contexts, judge, vocabulary, train_text)
        points.append((name, calls / LENGTH, result))
        print(row(f"{name}, T {temperature:g}", calls, result), flush=True)
    if args.plot:
        plot(points, held_out, args.plot)


def plot(points, held_out, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 5))
    labels = "distinct 4-grams", "n-gram, nats per character", "network calls per character"
    pairs = (0, 1), (2, 1), (2, 0)
    rules = dict.fromkeys(name for name, _, _ in points)
    colors = plt.get_cmap("turbo")(np.linspace(0, 1, len(rules)))
    for color, rule in zip(colors, rules, strict=True):
        mine = [(m["distinct"][0], m["ngram"][0], n) for name, n, m in points if name == rule]
        for axis, (x, y) in zip(axes, pairs, strict=True):
            xs, ys = [point[x] for point in mine], [point[y] for point in mine]
            axis.plot(xs, ys, "o-", ms=4, lw=1, color=color, label=rule)
    for axis, (x, y) in zip(axes, pairs, strict=True):
        axis.set(xlabel=labels[x], ylabel=labels[y])
    held_out_point = held_out["distinct"][0], held_out["ngram"][0]
    axes[0].plot(*held_out_point, "k*", ms=12, label="held-out text")
    axes[1].axhline(held_out["ngram"][0], color="k", lw=0.5)
    axes[2].axhline(held_out["distinct"][0], color="k", lw=0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, fontsize=7)
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    figure.savefig(path, dpi=100)


@torch.no_grad()
def plain_loop(model, context: str, tau=0.9) -> str:
    """What one writes first: float32, the whole window at every step, argmax, Python loops."""
    ids = list(context.encode()) + [0] * LENGTH
    while 0 in ids:
        t = math.ceil(model.config.diffusion_steps * ids.count(0) / len(ids))
        logits = model(torch.tensor([ids]), torch.tensor([t - 1]))[0]
        logits[:, 0] = -math.inf
        confidence, chosen = logits.softmax(-1).max(-1)
        masked = [i for i, token in enumerate(ids) if token == 0]
        sure = [i for i in masked if confidence[i] >= tau]
        for i in sure or [max(masked, key=confidence.tolist().__getitem__)]:
            ids[i] = int(chosen[i])
    return decode_tokens(torch.tensor(ids[len(context):]))


def causal_loop(twin, context: str, seed: int) -> str:
    """One character a call, the keys and values of all before it kept."""
    x = continue_causally([twin], encode_text(context)[None], LENGTH, 0.7, row_generators(seed, 1))
    return decode_tokens(x[0, CONTEXT:])


def sampler(model, context: str, seed: int, num_samples: int) -> str:
    """What sample.py does with its defaults, for eight blocks."""
    x, generators = encode_text(context).expand(num_samples, -1), row_generators(seed, num_samples)
    new = torch.cat(list(generate(model, x, 8, SamplerConfig(), generators)), 1)
    return decode_tokens(new.flatten())


def speed(args, model, twin, float32_model, val):
    """Every way in turn, so that a slow spell of the machine hits all of them."""
    context = decode_tokens(val[:CONTEXT])
    ways = {"plain loop": lambda seed: plain_loop(float32_model, context)}
    if twin:
        ways["causal twin, cached"] = partial(causal_loop, twin, context)
    for num_samples, name in ((1, "sample.py"), (8, "sample.py, 8 samples")):
        ways[name] = partial(sampler, model, context, num_samples=num_samples)
    rates = {name: [] for name in ways}
    for seed in range(args.repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            rates[name].append(len(way(seed)) / (time.perf_counter() - started))
    for name, values in rates.items():
        ratio = np.median(np.array(values) / np.array(rates["plain loop"]))
        print(f"{name:22} {np.median(values):7.0f} characters per second   {ratio:5.1f} x")


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--weights", type=Path, default=DEFAULT_WEIGHTS, help="checkpoint to judge")
    add("--twin", type=Path, default=TWIN_WEIGHTS, help="the causal twin; left out if missing")
    add("--num-samples", type=number(int, least=16), default=64,
        help="samples a point, in groups of 8")
    add("--temperatures", type=TEMPERATURE, nargs="+", default=[0.6, 0.8, 1.0],
        help="points of each curve")
    add("--only", nargs="+", default=[""], help="the rules whose name contains one of these")
    add("--plot", type=Path, help="file for the picture")
    add("--speed", action="store_true", help="measure characters per second instead")
    add("--repeats", type=COUNT, default=3, help="speed: measurements of each")
    add("--seed", type=SEED, default=0, help="random seed")
    args = parser.parse_args(argv)
    model = load_for_sampling(args.weights, torch.device("cpu"))
    twin = load_for_sampling(args.twin, torch.device("cpu")) if args.twin.exists() else None
    train, val, _ = load_corpus(DEFAULT_DATA, model.config)
    if args.speed:
        speed(args, model, twin, load_weights(args.weights)[0], val)
    else:
        frontier(args, model, twin, train, val)


if __name__ == "__main__":
    run(main)
