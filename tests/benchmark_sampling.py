"""How good and how fast is the sampler? The frontier of decoding rules, and the speed of sample.py.

    uv run tests/benchmark_sampling.py                      # every rule over temperature, 64 samples a point
    uv run tests/benchmark_sampling.py --speed              # characters per second against a plain loop and a causal model
    uv run tests/benchmark_sampling.py --plot frontier.png  # the frontier as a picture too

Every sample continues 16 characters of held-out text by 240. Columns, each with its standard error
over groups of 8 samples:

    calls     network calls for the slowest sample
    n-gram    nats per character under an interpolated Witten-Bell 7-gram model of the train split
    valid     share of the words that occur in the train split
    distinct  distinct 4-grams over all 4-grams of 8 samples
    copy      longest verbatim copy from the train split, characters, over all samples

Likelihood alone rewards repetition and diversity alone rewards noise: read n-gram, valid and distinct
together, beside the held-out row.
"""

import itertools
import math
import re
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import (  # noqa: E402
    DEFAULT_DATA, DEFAULT_WEIGHTS, autocast, decode_tokens, encode_text, load_corpus, load_weights, log_probs,
)
from sample import (  # noqa: E402
    CommandLine, Decoding, ancestral, best_k, continue_ids, draw, generate, gumbel_top_k, load_for_sampling, number, run, threshold,
    top_k,
)

CONTEXT, LENGTH, GROUP = 16, 240, 8


class NGramJudge:
    """Interpolated Witten-Bell n-gram model: P(w | h) = (c(hw) + d(h) P(w | shorter h)) / (c(h) + d(h)),
    d(h) counting the distinct characters seen after h; the shortest history's P is uniform over 127."""

    def __init__(self, ids: np.ndarray, order: int = 7):
        self.tables = []
        for n in range(1, order + 1):
            grams, counts = np.unique(self.codes(ids, n), return_counts=True)
            histories, start = np.unique(grams >> 7, return_index=True)
            self.tables.append((grams, counts, histories, np.add.reduceat(counts, start), np.diff([*start, len(grams)])))

    @staticmethod
    def codes(ids: np.ndarray, n: int) -> np.ndarray:
        """Every n characters in a row as one integer, 7 bits each."""
        windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.int64), n)
        return (windows << 7 * np.arange(n)[::-1]).sum(1)

    def nats(self, ids: np.ndarray, skip: int) -> np.ndarray:
        """-log P of every character after the first `skip`, which are history only."""
        p = np.full(len(ids) - skip, 1 / 127)
        look_up = lambda table, values, keys: np.where(
            (at := np.searchsorted(table, keys).clip(max=len(table) - 1), table[at] == keys)[1], values[at], 0)
        for n, (grams, counts, histories, totals, kinds) in enumerate(self.tables, start=1):
            codes = self.codes(ids, n)[skip - n + 1 :]
            c_hw, c_h, d_h = look_up(grams, counts, codes), look_up(histories, totals, codes >> 7), look_up(histories, kinds, codes >> 7)
            p = np.where(c_h > 0, (c_hw + d_h * p) / np.maximum(c_h + d_h, 1), p)
        return -np.log(p)


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
    """Whole words, folded to lower case; those cut by either end of the text are left out."""
    return [match[0].lower() for match in re.finditer(r"[A-Za-z']+", text) if match.start() > 0 and match.end() < len(text)]


def measure(texts: list[str], contexts: list[str], judge, vocabulary, train_text) -> dict:
    """Means and standard errors over groups of 8 samples."""
    groups = []
    for i in range(len(texts) // GROUP):
        members = range(i, len(texts), len(texts) // GROUP)  # spread over the contexts: neighbours are alike
        part = [texts[j] for j in members]
        nats = [judge.nats(np.frombuffer((contexts[j] + texts[j]).encode(), np.uint8), CONTEXT).mean() for j in members]
        known = [word in vocabulary for text in part for word in words(text)]
        grams = [text[j : j + 4] for text in part for j in range(len(text) - 3)]
        groups.append((np.mean(nats), np.mean(known), len(set(grams)) / len(grams)))
    mean, error = np.mean(groups, 0), np.std(groups, 0, ddof=1) / math.sqrt(len(groups))
    copy = max(longest_copy(text, train_text) for text in texts)
    return {"ngram": (mean[0], error[0]), "valid": (mean[1], error[1]), "distinct": (mean[2], error[2]), "copy": copy}


def row(name, calls, m):
    cells = "".join(f" {m[key][0]:.3f} ± {m[key][1]:.3f} |" for key in ("ngram", "valid", "distinct"))
    return f"| {name} | {calls} |{cells} {m['copy']} |"


def write(model, contexts, decoding, seed):
    """The texts that continue all contexts in one batch, and the network calls it took."""
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    hook = model.register_forward_hook(count)
    prompts = torch.stack([encode_text(context) for context in contexts])
    block_len, _ = decoding.lengths(model.config.sequence_len)
    parts = list(continue_ids(model, prompts, -(-LENGTH // block_len), decoding, seed))
    hook.remove()
    return [decode_tokens(row[:LENGTH]) for row in torch.cat(parts, 1)], calls


# Rules that were tried and lost to those of sample.py


def entropy_bound(proposal, gamma):
    """The positions of least entropy, as many as keep the sum of all their entropies but the largest
    within gamma nats: a bound on what revealing them at once, as if independent, can cost.
    EB-Sampler, arXiv 2505.24857."""
    p_log_p = torch.where(proposal.log_p > -math.inf, proposal.log_p.exp() * proposal.log_p, 0.0)
    entropy = (-p_log_p.sum(-1)).masked_fill(~proposal.masked, math.inf)      # (B, T)
    ascending, order = entropy.sort(1)
    within = ascending.cumsum(1) - ascending <= gamma                            # the first always is
    return torch.zeros_like(within).scatter_(1, order, within)


def leftmost(proposal, rule, width):
    """What `rule` reveals when it sees no more than the leftmost `width` masked positions."""
    near = proposal.masked & (proposal.masked.cumsum(1) <= width)
    return rule(proposal._replace(masked=near)) & near


def margin(proposal, k):
    """The k positions whose two likeliest characters are furthest apart. arXiv 2502.06768."""
    first, second = proposal.log_p.topk(2).values.exp().unbind(-1)
    return best_k((first - second).masked_fill(~proposal.masked, -math.inf), k)


def factor(proposal, f):
    """The n surest, for the largest n with (n + 1)(1 - confidence of the n-th) < f. Fast-dLLM, arXiv 2505.22618."""
    confidence, order = proposal.confidence().sort(1, descending=True)
    n = torch.arange(1, confidence.size(1) + 1)
    within = ((n + 1) * (1 - confidence) < f) & (confidence >= 0)
    many = (within * n).amax(1, keepdim=True).clamp(min=1)
    return torch.zeros_like(within).scatter_(1, order, n <= many)


def cosine_ancestral(proposal, steps):
    """The reverse process on levels t = cos(pi / 2 (1 - i / steps)), finer where much is masked,
    coarser where little is. MD4, arXiv 2406.04329."""
    level = (steps * (1 - 2 / math.pi * proposal.fate().arccos())).long().masked_fill(~proposal.masked, -1)
    return level == level.amax(1, keepdim=True)


def frontier_points(temperatures):
    """(name, temperatures, how one of them decodes)."""
    whole, medium, small = [dict(block_len=b, context_len=c) for b, c in ((240, 16), (64, 32), (32, 32))]
    drafts = dict(sweeps=0, **medium)
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
    ):
        yield f"draft alone, {name}", temperatures, lambda T: Decoding(rule, T, **drafts)
    for name, rule, sweeps, stride, block in (
        ("top-k 16, 1 sweep of 6", partial(top_k, k=16), 1, 6, {}),
        ("top-k 16, 2 sweeps of 4", partial(top_k, k=16), 2, 4, {}),
        ("top-k 8, 1 sweep of 6", partial(top_k, k=8), 1, 6, {}),
        ("top-k 16 with Gumbel noise, 1 sweep of 6", partial(gumbel_top_k, k=16), 1, 6, {}),
        ("top-k 16 with Gumbel noise, 2 sweeps of 4", partial(gumbel_top_k, k=16), 2, 4, {}),
        ("top-k 16 with Gumbel noise, 2 sweeps of 3", partial(gumbel_top_k, k=16), 2, 3, {}),
        ("top-k 20 with Gumbel noise, 2 sweeps of 4", partial(gumbel_top_k, k=20), 2, 4, {}),
        ("top-k 8 with Gumbel noise, 2 sweeps of 4", partial(gumbel_top_k, k=8), 2, 4, {}),
        ("top-k 8 with Gumbel noise, 2 sweeps of 6", partial(gumbel_top_k, k=8), 2, 6, {}),
        ("top-k 6 with Gumbel noise, 2 sweeps of 4", partial(gumbel_top_k, k=6), 2, 4, {}),
        ("threshold 0.5, 1 sweep of 6", partial(threshold, tau=0.5), 1, 6, {}),
        ("top-k 8, 2 sweeps of 4, blocks of 64", partial(top_k, k=8), 2, 4, medium),
        ("top-k 8, 2 sweeps of 4, blocks of 32", partial(top_k, k=8), 2, 4, small),
    ):
        yield f"corrected, {name}", temperatures, lambda T: Decoding(rule, T, sweeps=sweeps, stride=stride, **block)
    yield "warm, the default with sweeps at the same T", temperatures, lambda T: Decoding(temperature=T, sweep_temperature=T)
    yield "whole window, ancestral 128", [0.8], lambda T: Decoding(partial(ancestral, steps=128), T, sweeps=0, **whole)
    yield "whole window, threshold 0.9", [0.0], lambda T: Decoding(partial(threshold, tau=0.9), T, sweeps=0, **whole)


def frontier(args, model, train, val):
    judge = NGramJudge(train.numpy())
    train_text, val_text = decode_tokens(train), decode_tokens(val)
    vocabulary = set(words(train_text))
    starts = np.linspace(0, len(val_text) - CONTEXT - LENGTH, args.num_samples).astype(int)
    contexts = [val_text[s : s + CONTEXT] for s in starts]
    references = [val_text[s + CONTEXT : s + CONTEXT + LENGTH] for s in starts]
    print("| decoding | calls | n-gram | valid | distinct | copy |\n|---|---|---|---|---|---|")
    held_out = measure(references, contexts, judge, vocabulary, train_text)
    print(row("held-out Shakespeare", "", held_out), flush=True)
    points = []
    for name, temperatures, decoding in frontier_points(args.temperatures):
        for temperature in temperatures if not args.only or any(words in name for words in args.only) else []:
            texts, calls = write(model, contexts, decoding(temperature), args.seed)
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
    for color, rule in zip(plt.get_cmap("turbo")(np.linspace(0, 1, len(rules))), rules):
        mine = [(m["distinct"][0], m["ngram"][0], calls) for name, calls, m in points if name == rule]
        for axis, (x, y) in zip(axes, pairs):
            axis.plot([point[x] for point in mine], [point[y] for point in mine], "o-", ms=4, lw=1, color=color, label=rule)
    for axis, (x, y) in zip(axes, pairs):
        axis.set(xlabel=labels[x], ylabel=labels[y])
    axes[0].plot(held_out["distinct"][0], held_out["ngram"][0], "k*", ms=12, label="held-out text")
    axes[1].axhline(held_out["ngram"][0], color="k", lw=0.5)
    axes[2].axhline(held_out["distinct"][0], color="k", lw=0.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=5, fontsize=7)
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    figure.savefig(path, dpi=100)


@torch.no_grad()
def plain_loop(model, context: str, tau=0.9) -> str:
    """What one writes first: float32, eager, the whole window at every step, argmax, loops over positions."""
    ids = list(context.encode()) + [0] * LENGTH
    while 0 in ids:
        t = math.ceil(model.config.diffusion_steps * ids.count(0) / len(ids))
        logits = model(torch.tensor([ids]), torch.tensor([t - 1]))[0]
        logits[:, 0] = -math.inf
        confidence, chosen = logits.softmax(-1).max(-1)
        masked = [i for i, token in enumerate(ids) if token == 0]
        sure = [i for i in masked if confidence[i] >= tau] or [max(masked, key=lambda i: confidence[i])]
        for i in sure:
            ids[i] = int(chosen[i])
    return decode_tokens(torch.tensor(ids[len(context):]))


@torch.inference_mode()
def causal_loop(model, context: str, temperature=0.7) -> str:
    """What a causal model of the same trunk would cost: one character a call, the keys and values of all
    before it kept. These weights were not trained for that, and every call rotates as if it stood at the
    window's beginning: only the time counts, not the text."""
    layers = itertools.cycle([[] for _ in model.blocks])  # keys and values so far; the blocks ask in turn

    def attend_to_kept(q, k, v):
        kept = next(layers)
        kept[:] = [torch.cat(pair, 2) for pair in zip(kept, (k, v))] or [k, v]
        return F.scaled_dot_product_attention(q, *kept)

    text, index = encode_text(context)[None], torch.zeros(1, dtype=torch.long)
    generator, new = torch.Generator().manual_seed(0), text
    with autocast(text.device), mock.patch("model.attend", attend_to_kept):
        for _ in range(LENGTH):
            log_p = log_probs(model(new, index)[:, -1:], model.config.mask_token_id)
            new = draw(log_p, temperature, torch.rand(1, 1, generator=generator))
            text = torch.cat((text, new), 1)
    return decode_tokens(text[0, len(context):])


def speed(args, model, float32_model, val):
    """Plain loop, causal loop and sample.py in turn, so that a slow spell of the machine hits all of them."""
    context = decode_tokens(val[:CONTEXT])
    ours = lambda seed, num_samples=1: "".join(
        text for texts in generate(model, context, num_samples=num_samples, seed=seed) for text in texts)
    ways = {
        "plain loop": lambda seed: plain_loop(float32_model, context),
        "causal, cached": lambda seed: causal_loop(model, context),
        "sample.py": ours,
        "sample.py, 8 samples": partial(ours, num_samples=8),
    }
    rates = {name: [] for name in ways}
    for seed in range(args.repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            rates[name].append(len(way(seed)) / (time.perf_counter() - started))
    for name, values in rates.items():
        ratio = np.median(np.array(values) / np.array(rates["plain loop"]))
        print(f"{name:22} {np.median(values):7.0f} characters per second   {ratio:5.1f} x")


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("--weights", type=Path, default=DEFAULT_WEIGHTS, help="checkpoint to judge")
    parser.add_argument("--num-samples", type=number(int, least=16), default=64, help="samples a point, in groups of 8")
    parser.add_argument("--temperatures", type=number(float, least=0), nargs="+", default=[0.6, 0.8, 1.0], help="points of each curve")
    parser.add_argument("--only", nargs="+", help="only the rules whose name contains one of these")
    parser.add_argument("--plot", type=Path, help="file for the picture")
    parser.add_argument("--speed", action="store_true", help="measure characters per second instead")
    parser.add_argument("--repeats", type=number(int, least=1), default=3, help="speed: measurements of each")
    parser.add_argument("--seed", type=number(int, least=0), default=0, help="of the samples")
    args = parser.parse_args()
    model = load_for_sampling(args.weights, torch.device("cpu"))
    train, val, _ = load_corpus(DEFAULT_DATA, model.config)
    if args.speed:
        speed(args, model, load_weights(args.weights)[0], val)
    else:
        frontier(args, model, train, val)


if __name__ == "__main__":
    run(main)
