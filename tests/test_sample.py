import io
import itertools
import math
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, TINY, TableModel, assert_one_clear_line, last, random_model, script
from benchmark_sampling import cosine_ancestral, entropy_bound, factor, leftmost, margin
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
from model import BadInput, DiffusionConfig, autocast
from sample import (
    Decoding,
    Proposal,
    ancestral,
    complete,
    decode,
    draw,
    generate,
    gumbel_top_k,
    infill,
    threshold,
    top_k,
    uniform,
)

RULES = {
    "threshold": partial(threshold, tau=0.1),
    "top-k": partial(top_k, k=3),
    "ancestral": partial(ancestral, steps=9),
    "top-k with noise": partial(gumbel_top_k, k=2),
    "entropy": partial(entropy_bound, gamma=4.0),
    "factor": partial(factor, f=2.0),
    "margin": partial(margin, k=3),
    "cosine ancestral": partial(cosine_ancestral, steps=9),
    "leftmost": partial(leftmost, rule=partial(top_k, k=3), width=5),
}
every_rule = pytest.mark.parametrize("rule", [pytest.param(r, id=name) for name, r in RULES.items()])


def partly_masked(batch, length, share, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 128, (batch, length), generator=generator)
    return x.masked_fill(torch.rand(batch, length, generator=generator) < share, 0)


@every_rule
@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 32), share=st.sampled_from([0.0, 0.3, 0.8, 1.0]), seed=st.integers(0, 999),
       temperature=st.sampled_from([0, 0.7, 1.5]))
def test_every_state_keeps_what_is_known_and_reveals_more(rule, length, share, seed, temperature):
    x = partly_masked(3, length, share, seed)
    states = list(decode(random_model(), x, rule, temperature, seed))
    assert torch.equal(states[0], x)
    for before, after in zip(states, states[1:]):
        known = before != 0
        assert torch.equal(after[known], before[known])
        open_rows = (~known).any(1)
        assert ((after == 0).sum(1) < (before == 0).sum(1))[open_rows].all()
    assert (states[-1] != 0).all() and (states[-1] < 128).all()
    assert len(states) - 1 <= (x == 0).sum(1).max()  # never more calls than masked positions


@every_rule
def test_a_row_does_not_depend_on_the_others_in_its_batch(rule):
    model, x = random_model(), partly_masked(8, 32, 0.7, seed=1)
    together = last(decode(model, x, rule, 0.9, seed=5))
    for row in range(8):
        alone = last(decode(model, x[row : row + 1], rule, 0.9, seed=5 + row))
        assert torch.equal(alone[0], together[row])


@every_rule
def test_same_seed_same_text_and_another_seed_another_text(rule):
    model, x = random_model(), torch.zeros(1, 32, dtype=torch.long)
    texts = [last(decode(model, x, rule, 1.0, seed=seed)) for seed in (3, 3, 4)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def plain_top_k(model, ids, k):
    """Argmax decoding as one would write it first: one row, Python loops, the index from the fraction."""
    ids, S = list(ids), model.config.diffusion_steps
    while 0 in ids:
        t = math.ceil(S * ids.count(0) / len(ids))
        with autocast(torch.device("cpu")):
            logits = model(torch.tensor([ids]), torch.tensor([t - 1]))[0].float()
        ranked = []
        for position, i in enumerate(ids):
            if i == 0:
                p = logits[position, 1:].softmax(0)
                ranked.append((p.max().item(), position, int(p.argmax()) + 1))
        for _, position, character in sorted(ranked, reverse=True)[:k]:
            ids[position] = character
    return ids


@torch.no_grad()
def test_the_loop_agrees_with_a_slow_plain_one():
    model, x = random_model(), partly_masked(4, 32, 0.8, seed=2)
    fast = last(decode(model, x, partial(top_k, k=3), temperature=0))
    assert fast.tolist() == [plain_top_k(model, row.tolist(), 3) for row in x]


def exact_reverse_process(model, steps):
    """Distribution of x_0 under p(x_{t-1} | x_t) from t = steps down to 1, by enumeration."""
    V, L = model.config.vocab_size, model.config.sequence_len
    states = {(0,) * L: 1.0}
    for t in range(steps, 0, -1):
        after = {}
        for x, weight in states.items():
            logits = model(torch.tensor([x]), None)[0].clone()
            logits[:, 0] = -math.inf
            p = logits.softmax(-1).tolist()
            options = []
            for i, character in enumerate(x):
                stay = [(0, 1 - 1 / t)] if t > 1 else []
                options.append(stay + [(v, p[i][v] / t) for v in range(1, V)] if character == 0 else [(character, 1.0)])
            for outcome in itertools.product(*options):
                key = tuple(v for v, _ in outcome)
                after[key] = after.get(key, 0.0) + weight * math.prod(q for _, q in outcome)
        states = after
    return states


@torch.no_grad()
def test_ancestral_sampling_draws_from_the_exact_reverse_process():
    config = DiffusionConfig(sequence_len=3, vocab_size=4, diffusion_steps=4, context_len=0)
    model, n = TableModel(config, seed=1), 40_000
    expected = exact_reverse_process(model, steps=4)
    assert sum(expected.values()) == pytest.approx(1)
    x = last(decode(model, torch.zeros(n, 3, dtype=torch.long), partial(ancestral, steps=4), temperature=1, seed=0))
    found, counts = x.unique(dim=0, return_counts=True)
    observed = {tuple(row): count for row, count in zip(found.tolist(), counts.tolist())}
    chi2 = sum((observed.get(x_0, 0) - n * p) ** 2 / (n * p) for x_0, p in expected.items())
    degrees = len(expected) - 1  # 26; chi-squared has mean 26 and standard deviation sqrt(52)
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees)


def test_uniform_numbers_are_uniform_and_uncorrelated():
    u = torch.stack([uniform(torch.arange(64), 256, stream) for stream in range(8)])
    assert ((u > 0) & (u < 1)).all()
    counts = torch.histc(u, bins=64, min=0, max=1)
    chi2 = ((counts - u.numel() / 64) ** 2 / (u.numel() / 64)).sum()
    assert abs(chi2 - 63) < 5 * math.sqrt(126)
    centred = u - 0.5
    for a, b in ((centred[:, :, 1:], centred[:, :, :-1]), (centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
        correlation = 12 * (a * b).mean() * math.sqrt(a.numel())
        assert abs(correlation) < 4.5


def test_characters_are_drawn_with_their_tempered_probabilities():
    log_p = torch.tensor([-math.inf, math.log(0.5), math.log(0.3), math.log(0.2)])
    u = (torch.arange(10_000) + 0.5)[None] / 10_000
    drawn = draw(log_p.expand(1, 10_000, 4), 0.5, u)
    expected = torch.tensor([0, 0.25, 0.09, 0.04]) / 0.38
    torch.testing.assert_close(drawn.flatten().bincount(minlength=4) / 10_000, expected, rtol=0, atol=2e-4)
    assert (draw(log_p.expand(1, 10_000, 4), 0, u) == 1).all()


def proposal(p, chosen, masked):
    return Proposal(torch.tensor(p).log(), torch.tensor(chosen), torch.tensor(masked), torch.tensor([0]), step=1)


def test_rules_reveal_what_their_papers_say():
    p = [[[0, 0.9, 0.1], [0, 0.6, 0.4], [0, 0.95, 0.05], [0, 0.99, 0.01]]]
    seen = proposal(p, [[1, 1, 1, 1]], [[True, True, True, False]])
    assert threshold(seen, tau=0.9).tolist() == [[True, False, True, False]]
    assert threshold(seen, tau=0.97).tolist() == [[False, False, True, False]]
    assert (top_k(seen, k=2) & seen.masked).tolist() == [[True, False, True, False]]
    # entropies 0.325, 0.673, 0.199: the two smallest risk 0.199 nats, all three 0.524
    assert entropy_bound(seen, gamma=0.1).tolist() == [[False, False, True, False]]
    assert entropy_bound(seen, gamma=0.3).tolist() == [[True, False, True, False]]
    assert (entropy_bound(seen, gamma=0.6) & seen.masked).tolist() == [[True, True, True, False]]


def test_gumbel_noise_draws_places_in_proportion_to_confidence():
    n, confidence = 20_000, torch.tensor([0.6, 0.3, 0.1, 0.9])
    log_p = torch.stack([torch.full((4,), -math.inf), confidence.log(), (1 - confidence).log()], 1).expand(n, 4, 3)
    masked = torch.tensor([True, True, True, False]).expand(n, 4)
    seen = Proposal(log_p, torch.ones(n, 4, dtype=torch.long), masked, torch.arange(n), step=1)
    first = gumbel_top_k(seen, k=1)
    assert (first.sum(1) == 1).all()
    torch.testing.assert_close(first.float().mean(0), torch.tensor([0.6, 0.3, 0.1, 0.0]), rtol=0, atol=0.015)
    assert torch.equal(gumbel_top_k(seen, k=3), masked)


def test_leftmost_confines_each_step():
    model, x = random_model(), partly_masked(2, 32, 0.9, seed=3)
    for before, after in itertools.pairwise(decode(model, x, partial(leftmost, rule=partial(top_k, k=2), width=3), 1.0, 0)):
        for row in range(2):
            open_before = (before[row] == 0).nonzero().flatten().tolist()
            revealed = [i for i in open_before if after[row, i] != 0]
            assert set(revealed) <= set(open_before[:3])


# ---- whole texts


def test_correcting_rewrites_each_open_character_once_a_sweep_and_no_other():
    model, x = random_model(), partly_masked(3, 32, 0.5, seed=4)
    open_to_change = x == 0
    states = list(complete(model, x, Decoding(sweeps=3, stride=4), torch.arange(3)))
    remasked = [(after == 0) & (before != 0) for before, after in itertools.pairwise(states)]
    assert (sum(r.int() for r in remasked) == 3 * open_to_change).all()
    assert (states[-1] != 0).all() and torch.equal(states[-1][~open_to_change], x[~open_to_change])


@torch.no_grad()
def test_correcting_at_temperature_one_leaves_the_models_own_distribution_alone():
    """Resampling from exact conditionals, one position at a time, turns independent draws into the joint."""
    config = DiffusionConfig(sequence_len=2, vocab_size=3, diffusion_steps=4, context_len=0)
    joint = torch.tensor([[0.4, 0.1], [0.2, 0.3]])  # p(x_0, x_1) over the characters 1 and 2

    class Exact(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = config

        def forward(self, x_t, t):
            p = torch.full((len(x_t), 2, 3), 1e-9)
            for i, table in ((0, joint), (1, joint.T)):
                other = x_t[:, 1 - i]
                p[:, i, 1:] = torch.where((other == 0)[:, None], table.sum(1), table[:, (other - 1).clamp(min=0)].T)
            return p.log()

    n = 20_000
    x = last(complete(Exact(), torch.zeros(n, 2, dtype=torch.long), Decoding(partial(top_k, k=2), 1.0, sweeps=8, sweep_temperature=1.0, stride=2), torch.arange(n)))
    counts = torch.zeros(2, 2).index_put((x[:, 0] - 1, x[:, 1] - 1), torch.ones(n), accumulate=True)
    assert ((counts - n * joint) ** 2 / (n * joint)).sum() < 3 + 4 * math.sqrt(6)


SHORT = dict(block_len=8, context_len=8)


def test_generated_blocks_continue_one_another():
    model = random_model()
    blocks = [text for (text,) in generate(model, "To be", 4, decoding=Decoding(**SHORT), seed=1)]
    assert [len(text) for text in blocks] == [6, 8, 8, 10]  # two characters are held back for correction
    blocks = [text for (text,) in generate(model, "To be", 4, decoding=Decoding(sweeps=0, **SHORT), seed=1)]
    assert [len(text) for text in blocks] == [8, 8, 8, 8]


def test_only_the_end_of_a_prompt_conditions():
    texts = []
    for prompt in ("And so To be", "xyz To be"):
        parts = generate(random_model(), prompt, 3, decoding=Decoding(block_len=8, context_len=5), seed=1)
        texts.append("".join(part for (part,) in parts))
    assert texts[0] == texts[1]


def test_samples_are_the_same_alone_and_in_a_batch():
    model, decoding = random_model(), Decoding(**SHORT)
    batch = ["".join(parts) for parts in zip(*generate(model, "A", 2, num_samples=8, decoding=decoding, seed=10))]
    for i, text in enumerate(batch):
        assert "".join(part for (part,) in generate(model, "A", 2, decoding=decoding, seed=10 + i)) == text


def test_block_and_context_have_to_fit():
    with pytest.raises(BadInput, match="exceed"):
        next(generate(random_model(), decoding=Decoding(block_len=30, context_len=3)))


@settings(max_examples=25, deadline=None)
@given(st.text("abc _\n", max_size=150), st.integers(1, 3))
def test_infilling_touches_gaps_alone_however_long_the_text(text, num_samples):
    filled = infill(random_model(), text, num_samples=num_samples, seed=2)
    assert len(filled) == num_samples
    for result in filled:
        assert len(result) == len(text) and "\0" not in result
        assert all(a == b for a, b in zip(text, result) if a != "_")


# ---- the command


def test_sample_prints_text_alone_to_stdout_from_any_folder(tiny_weights, tmp_path, command):
    prompt = "ROMEO: a long prompt is printed whole"
    arguments = ["--weights", tiny_weights, "--block-len", 8, "--context-len", 8, "--num-blocks", 3, "--prompt", prompt]
    process = script("sample.py", *arguments, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(prompt) and len(process.stdout) == len(prompt) + 24 + 1
    assert "24 characters in" in process.stderr and "network calls" in process.stderr
    assert command(sample.main, *arguments).stdout.replace("\r", "\n") == process.stdout  # text mode translated the pipe's


def test_sample_separates_several_samples_and_fills_gaps(tiny_weights, command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("To __ or not"))
    process = command(sample.main, "--weights", tiny_weights, "--num-samples", 3, "--infill", "-")
    texts = re.split(r"\n*----- sample \d -----\n", process.stdout)
    assert len(texts) == 3
    assert all(text.startswith("To ") and text.rstrip("\n").endswith(" or not") for text in texts)


def test_a_closed_pipe_ends_quietly(tiny_weights):
    command = [sys.executable, ROOT / "sample.py", "--weights", tiny_weights, "--block-len", "8", "--context-len", "8",
               "--num-blocks", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 0


@pytest.mark.parametrize("arguments, words", [
    (["--temperature", "-1"], ["-1", "at least 0"]),
    (["--temperature", "nan"], ["nan"]),
    (["--temperature", "warm"], ["warm"]),
    (["--threshold", "0"], ["'0'", "above 0"]),
    (["--threshold", "1.5"], ["1.5", "at most 1"]),
    (["--k", "0"], ["'0'", "at least 1"]),
    (["--steps", "2.5"], ["2.5", "whole"]),
    (["--num-blocks", "-3"], ["-3", "at least 1"]),
    (["--num-samples", "0"], ["'0'"]),
    (["--method", "magic"], ["magic", "ancestral"]),
    (["--device", "cuda:9"], ["cuda:9"]),
    (["--device", "toaster"], ["toaster"]),
    (["--prompt", "na\u00efve"], ["\u00ef", "position 2"]),
    (["--infill", "na\u00efve _"], ["\u00ef", "position 2"]),
    (["--prompt-file", "nowhere.txt"], ["nowhere.txt"]),
    (["--block-len", "30", "--context-len", "20"], ["30", "20", "32"]),
    (["--weights", "nowhere.pt"], ["nowhere.pt", "training.py"]),
])
def test_bad_input_to_sample_is_one_line(arguments, words, tiny_weights, command):
    assert_one_clear_line(command(sample.main, "--weights", tiny_weights, *arguments), *words)
