import io
import itertools
import math
import re
import sys
from dataclasses import replace
from functools import partial

import sample
from model import BadInput, DiffusionConfig, autocast, pick
from sample import (
    Proposal,
    SamplerConfig,
    ancestral,
    denoise,
    draft_and_correct,
    draw,
    everything,
    generate,
    gumbel_top_k,
    infill,
    left_to_right,
    row_generators,
    threshold,
    top_k,
    uniform,
)

import pytest
import torch
from benchmark_sampling import cosine_ancestral, entropy_bound, factor, leftmost, margin
from conftest import (
    TINY,
    TableModel,
    assert_one_clear_line,
    last,
    launch,
    partly_masked,
    random_model,
    script,
)
from hypothesis import given, settings
from hypothesis import strategies as st

not_windows = pytest.mark.skipif(sys.platform == "win32", reason="uses /dev")

RULES = {
    "threshold": partial(threshold, tau=0.1),
    "top-k": partial(top_k, k=3),
    "ancestral": partial(ancestral, steps=9),
    "top-k with noise": partial(gumbel_top_k, k=2),
    "entropy": partial(entropy_bound, gamma=4.0),
    "factor": partial(factor, f=2.0),
    "margin": partial(margin, k=3),
    "cosine ancestral": partial(cosine_ancestral, steps=9),
    "left to right": partial(left_to_right, k=2),
    "leftmost": partial(leftmost, rule=partial(top_k, k=3), width=5),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@every_rule
@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 32), share=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
       seed=st.integers(0, 999), temperature=st.sampled_from([0, 0.7, 1.5]))
def test_every_state_keeps_what_is_known_and_unmasks_more(rule, length, share, seed, temperature):
    x = partly_masked(3, length, share, seed)
    states = list(denoise(random_model(), x, rule, temperature, row_generators(seed, 3)))
    assert torch.equal(states[0], x)
    for before, after in itertools.pairwise(states):
        known = before != 0
        assert torch.equal(after[known], before[known])
        open_rows = (~known).any(1)
        assert ((after == 0).sum(1) < (before == 0).sum(1))[open_rows].all()
    assert (states[-1] != 0).all() and (states[-1] < 128).all()
    assert len(states) - 1 <= (x == 0).sum(1).max()  # never more calls than masked positions


@every_rule
def test_a_row_does_not_depend_on_the_others_in_its_batch(rule):
    model, x = random_model(), partly_masked(8, 32, 0.7, seed=1)
    together = last(denoise(model, x, rule, 0.9, row_generators(5, 8)))
    for row in range(8):
        alone = last(denoise(model, x[row : row + 1], rule, 0.9, row_generators(5 + row, 1)))
        assert torch.equal(alone[0], together[row])


@every_rule
def test_same_seed_same_text_and_another_seed_another_text(rule):
    model, x = random_model(), torch.zeros(1, 32, dtype=torch.long)
    texts = [last(denoise(model, x, rule, 1.0, row_generators(seed, 1))) for seed in (3, 3, 4)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def plain_top_k(model, ids, k):
    """Argmax as one would write it first: one row, Python loops, the index from the fraction."""
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
    fast = last(denoise(model, x, partial(top_k, k=3), 0, row_generators(0, 4)))
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
                unmasked = [(v, p[i][v] / t) for v in range(1, V)]
                options.append(stay + unmasked if character == 0 else [(character, 1.0)])
            for outcome in itertools.product(*options):
                key = tuple(v for v, _ in outcome)
                after[key] = after.get(key, 0.0) + weight * math.prod(q for _, q in outcome)
        states = after
    return states


def left_to_right_distribution(model):
    """p(x_0) = product of p(x_i | x_<i, the rest masked), by enumeration."""
    V, L = model.config.vocab_size, model.config.sequence_len
    total = {}
    for x_0 in itertools.product(range(1, V), repeat=L):
        probability = 1.0
        for i in range(L):
            logits = model(torch.tensor([[*x_0[:i], *[0] * (L - i)]]), None)[0, i]
            probability *= logits[1:].softmax(0)[x_0[i] - 1].item()
        total[x_0] = probability
    return total


@torch.no_grad()
@pytest.mark.parametrize("rule, distribution", [
    (partial(ancestral, steps=4), partial(exact_reverse_process, steps=4)),
    (partial(left_to_right, k=1), left_to_right_distribution),
], ids=["ancestral", "left to right"])
def test_sampling_draws_from_the_exact_distribution(rule, distribution):
    config = DiffusionConfig(sequence_len=3, vocab_size=4, diffusion_steps=4, context_len=0)
    model, n = TableModel(config, seed=1), 40_000
    expected = distribution(model)
    assert sum(expected.values()) == pytest.approx(1)
    x = last(denoise(model, torch.zeros(n, 3, dtype=torch.long), rule, 1, row_generators(0, n)))
    found, counts = x.unique(dim=0, return_counts=True)
    observed = dict(zip(map(tuple, found.tolist()), counts.tolist(), strict=True))
    chi2 = sum((observed.get(x_0, 0) - n * p) ** 2 / (n * p) for x_0, p in expected.items())
    degrees = len(expected) - 1  # 26; chi-squared has mean 26 and standard deviation sqrt(52)
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees)


def test_rows_draw_from_generators_of_their_own():
    like = torch.zeros(64, 256)
    generators = row_generators(7, 64)
    u = torch.stack([uniform(generators, like) for _ in range(8)])          # (8, 64, 256)
    assert ((u >= 0) & (u < 1)).all()
    centred = u - 0.5
    neighbours = (
        (centred[:, :, 1:], centred[:, :, :-1]), (centred[:, 1:], centred[:, :-1]),
        (centred[1:], centred[:-1]),
    )
    for a, b in neighbours:
        assert abs(12 * (a * b).mean() * math.sqrt(a.numel())) < 4.5
    alone = row_generators(7 + 9, 1)
    assert torch.equal(torch.cat([uniform(alone, like[:1]) for _ in range(8)]), u[:, 9])


@pytest.mark.parametrize("temperature", [1e-39, 1e-6, 0.5, 100])
def test_every_temperature_draws_characters_that_have_a_probability(temperature):
    log_p = torch.randn(3, 50, 128).masked_fill(torch.arange(128) == 0, -math.inf).log_softmax(-1)
    for u in (torch.zeros(3, 50), torch.rand(3, 50), torch.full((3, 50), 1 - 2**-24)):
        drawn = draw(log_p, temperature, u)
        assert ((drawn > 0) & (drawn < 128)).all()
        if temperature < 1e-5:
            assert torch.equal(drawn, log_p.argmax(-1))


def test_characters_are_drawn_with_their_tempered_probabilities():
    log_p = torch.tensor([-math.inf, math.log(0.5), math.log(0.3), math.log(0.2)])
    u = (torch.arange(10_000) + 0.5)[None] / 10_000
    drawn = draw(log_p.expand(1, 10_000, 4), 0.5, u)
    expected = torch.tensor([0, 0.25, 0.09, 0.04]) / 0.38
    shares = drawn.flatten().bincount(minlength=4) / 10_000
    torch.testing.assert_close(shares, expected, rtol=0, atol=2e-4)
    assert (draw(log_p.expand(1, 10_000, 4), 0, u) == 1).all()


def proposal(p, chosen, masked):
    p, chosen, masked = torch.tensor(p), torch.tensor(chosen), torch.tensor(masked)
    return Proposal(p.log(), chosen, masked, torch.rand(chosen.shape), row_generators(0, 1))


def test_rules_unmask_what_their_papers_say():
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
    log_p = [torch.full((4,), -math.inf), confidence.log(), (1 - confidence).log()]
    log_p = torch.stack(log_p, 1).expand(n, 4, 3)
    masked = torch.tensor([True, True, True, False]).expand(n, 4)
    chosen = torch.ones(n, 4, dtype=torch.long)
    seen = Proposal(log_p, chosen, masked, torch.rand(n, 4), row_generators(0, n))
    first = gumbel_top_k(seen, k=1)
    assert (first.sum(1) == 1).all()
    expected = torch.tensor([0.6, 0.3, 0.1, 0.0])
    torch.testing.assert_close(first.float().mean(0), expected, rtol=0, atol=0.015)
    assert torch.equal(gumbel_top_k(seen, k=3), masked)


def test_leftmost_confines_each_step():
    model, x = random_model(), partly_masked(2, 32, 0.9, seed=3)
    rule = partial(leftmost, rule=partial(top_k, k=2), width=3)
    for before, after in itertools.pairwise(denoise(model, x, rule, 1.0, row_generators(0, 2))):
        for row in range(2):
            open_before = (before[row] == 0).nonzero().flatten().tolist()
            unmasked = [i for i in open_before if after[row, i] != 0]
            assert set(unmasked) <= set(open_before[:3])


# ---- whole texts


def test_correcting_rewrites_each_open_character_once_a_sweep_and_no_other():
    model, x = random_model(), partly_masked(3, 32, 0.5, seed=4)
    open_to_change = x == 0
    config = SamplerConfig(sweeps=3, stride=4)
    states = list(draft_and_correct(model, x, config, row_generators(0, 3)))
    remasked = [(after == 0) & (before != 0) for before, after in itertools.pairwise(states)]
    assert (sum(r.int() for r in remasked) == 3 * open_to_change).all()
    assert (states[-1] != 0).all() and torch.equal(states[-1][~open_to_change], x[~open_to_change])


@torch.no_grad()
def test_correcting_at_temperature_one_leaves_the_models_own_distribution_alone():
    """Redrawing from exact conditionals, one position at a time, makes independent draws joint."""
    config = DiffusionConfig(sequence_len=2, vocab_size=3, diffusion_steps=4, context_len=0)
    joint = torch.tensor([[0.4, 0.1], [0.2, 0.3]])  # p(x_0, x_1) over the characters 1 and 2

    class Exact(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = config

        def forward(self, x_t, t, at):
            p = torch.full((len(x_t), 2, 3), 1e-9)
            for i, table in ((0, joint), (1, joint.T)):
                other = x_t[:, 1 - i]
                conditional = table[:, (other - 1).clamp(min=0)].T
                p[:, i, 1:] = torch.where((other == 0)[:, None], table.sum(1), conditional)
            return pick(p.log(), at)

    n = 20_000
    how = SamplerConfig(everything, 1.0, sweeps=8, sweep_temperature=1.0, stride=2)
    blank = torch.zeros(n, 2, dtype=torch.long)
    x = last(draft_and_correct(Exact(), blank, how, row_generators(0, n)))
    places = x[:, 0] - 1, x[:, 1] - 1
    counts = torch.zeros(2, 2).index_put(places, torch.ones(n), accumulate=True)
    assert ((counts - n * joint) ** 2 / (n * joint)).sum() < 3 + 4 * math.sqrt(6)


def ids(text, num_rows=1):
    return torch.tensor([list(text.encode())], dtype=torch.long).expand(num_rows, -1)


def continuation(prompt, num_blocks, config, seed=1, num_rows=1):
    """The blocks that continue a prompt, (B, n) each."""
    generators = row_generators(seed, num_rows)
    return list(generate(random_model(), ids(prompt, num_rows), num_blocks, config, generators))


SHORT = SamplerConfig(block_len=8, context_len=8)


def test_blocks_continue_one_another():
    blocks = continuation("To be", 4, SHORT)
    assert [x.size(1) for x in blocks] == [6, 8, 8, 10]  # two characters are held back at a time
    blocks = continuation("To be", 4, SamplerConfig(sweeps=0, block_len=8, context_len=8))
    assert [x.size(1) for x in blocks] == [8, 8, 8, 8]


def test_only_the_end_of_a_prompt_conditions():
    config = SamplerConfig(block_len=8, context_len=5)
    one, other = (continuation(prompt, 3, config) for prompt in ("And so To be", "xyz To be"))
    assert torch.equal(torch.cat(one, 1), torch.cat(other, 1))


def test_samples_are_the_same_alone_and_in_a_batch():
    batch = torch.cat(continuation("A", 2, SHORT, seed=10, num_rows=8), 1)
    for row in range(8):
        alone = torch.cat(continuation("A", 2, SHORT, seed=10 + row), 1)
        assert torch.equal(alone[0], batch[row])


@settings(max_examples=60, deadline=None)
@given(sequence_len=st.integers(1, 12), block_len=st.none() | st.integers(1, 14),
       context_len=st.none() | st.integers(0, 14), prompt=st.integers(0, 20),
       sweeps=st.integers(0, 1))
def test_every_block_and_context_length_works_or_is_refused(
    sequence_len, block_len, context_len, prompt, sweeps
):
    model = random_model(replace(TINY, sequence_len=sequence_len, context_len=0))
    config = SamplerConfig(sweeps=sweeps, block_len=block_len, context_len=context_len)
    blocks = generate(model, ids("x" * prompt), 2, config, row_generators(0, 1))
    if (block_len or 1) + (context_len or 0) > sequence_len:
        with pytest.raises(BadInput, match=f"sequence length of {sequence_len}"):
            list(blocks)
    elif block_len is None and context_len is not None:
        try:
            assert torch.cat(list(blocks), 1).size(1) == 2 * config.lengths(sequence_len)[0]
        except BadInput as error:
            assert "exceed" in str(error)
    else:
        assert torch.cat(list(blocks), 1).size(1) == 2 * config.lengths(sequence_len)[0]


@settings(max_examples=25, deadline=None)
@given(st.text("abc _\n", max_size=150), st.integers(1, 3), st.sampled_from([1, 2, 5, 32]))
def test_infilling_touches_gaps_alone_however_long_the_text(text, num_samples, sequence_len):
    model = random_model(replace(TINY, sequence_len=sequence_len, context_len=0))
    filled = infill(model, text, num_samples, SamplerConfig(), seed=2)
    assert len(filled) == num_samples
    for result in filled:
        assert len(result) == len(text) and "\0" not in result
        assert all(a == b for a, b in zip(text, result, strict=True) if a != "_")


# ---- the command


def test_sample_prints_text_alone_to_stdout_from_any_folder(tiny_weights, tmp_path, command):
    prompt = "ROMEO: a long prompt is printed whole"
    arguments = ["--weights", tiny_weights, "--block-len", 8, "--context-len", 8, "--num-blocks", 3,
                 "--prompt", prompt]
    process = script("sample.py", *arguments, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(prompt) and len(process.stdout) == len(prompt) + 24 + 1
    assert "24 characters in" in process.stderr and "network calls" in process.stderr
    # The pipe is read in text mode, which turns \r into \n
    assert command(sample.main, *arguments).stdout.replace("\r", "\n") == process.stdout


def test_sample_separates_several_samples_and_fills_gaps(tiny_weights, command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("To __ or not"))
    process = command(sample.main, "--weights", tiny_weights, "--num-samples", 3, "--infill", "-")
    texts = re.split(r"\n*----- sample \d -----\n", process.stdout)
    assert len(texts) == 3
    assert all(text.startswith("To ") and text.rstrip("\n").endswith(" or not") for text in texts)


@pytest.mark.parametrize("arguments", [
    ["--num-blocks", 3], ["--num-blocks", 2, "--num-samples", 3], ["--infill", "To be, or ___ be"],
    ["--infill", "To ___\nor not ____", "--num-samples", 2],
], ids=["streaming", "several samples", "infilling", "infilling twice"])
def test_a_terminal_shows_what_a_pipe_gets(arguments, command, screen):
    """A progress bar must not write over text, nor stand among its lines."""
    arguments = [*arguments, "--seed", 5]
    piped = command(sample.main, *arguments).stdout
    with screen.shown():
        sample.main([str(word) for word in arguments])
    shown = screen.text()
    assert shown.startswith("\n".join(line.rstrip() for line in piped.split("\n")))
    assert len(piped) > 16 and "characters in" in shown.removeprefix(piped)


def test_a_closed_pipe_ends_quietly(tiny_weights):
    process = launch("sample.py", "--weights", tiny_weights, "--block-len", 8, "--context-len", 8,
                     "--num-blocks", 100_000)
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
    (["--block-len", "33"], ["33", "32"]),
    (["--block-len", "300"], ["300", "32"]),
    (["--infill", "a _", "--prompt", "b"], ["--prompt", "--infill"]),
    (["--infill", "a _", "--num-blocks", "3"], ["--num-blocks", "--infill"]),
    (["--method", "threshold", "--k", "3"], ["--k", "threshold"]),
    (["--sweeps", "0", "--stride", "3"], ["--stride", "--sweeps"]),
    (["--method", "left-to-right", "--sweep-temperature", "1"], ["--sweep-temperature"]),
    (["--steps", "3"], ["--steps", "gumbel-top-k"]),
    (["--prompt", "caf\udce9"], ["not UTF-8", "position 3"]),
    (["--infill", "caf\udce9 _"], ["not UTF-8", "position 3"]),
    (["--seed", "99999999999999999999"], ["99999999999999999999", "at most"]),
    (["--temperature", "1e39"], ["1e39", "at most 100"]),
    (["--num-samples", "999999999999"], ["999999999999", "at most"]),
    (["--weights", "."], ["weights file ."]),
    (["--prompt-file", "."], ["."]),
    pytest.param(["--prompt-file", "/dev/zero"], ["/dev/zero", "device"], marks=not_windows),
    (["--weights", "nowhere.pt"], ["nowhere.pt", "training.py"]),
])
def test_bad_input_to_sample_is_one_line(arguments, words, tiny_weights, command):
    assert_one_clear_line(command(sample.main, "--weights", tiny_weights, *arguments), *words)


def test_the_temperature_may_be_tiny(tiny_weights, command):
    process = command(sample.main, "--weights", tiny_weights, "--num-blocks", 1,
                      "--temperature", "1e-39", "--sweep-temperature", "1e-39")
    assert process.returncode == 0 and len(process.stdout) == 16 + 1, process.stderr


@pytest.mark.parametrize("stdin, words", [(b"caf\xe9 ___", "not UTF-8"), (None, "closed")])
def test_bad_stdin_is_one_line(stdin, words, tiny_weights, command, monkeypatch):
    stream = stdin and io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stream)
    process = command(sample.main, "--weights", tiny_weights, "--infill", "-")
    assert_one_clear_line(process, "stdin", words)


def test_multibyte_characters_survive_the_edge_of_a_block(tiny_weights, command, monkeypatch):
    text = "caf\u00e9 \u2603 \U0001f600!"
    raw = torch.tensor([list(text.encode())])
    monkeypatch.setattr(sample, "generate", lambda *_: iter(raw.split(1, dim=1)))
    process = command(sample.main, "--weights", tiny_weights)
    assert process.stdout == text + "\n"


def test_a_byte_order_mark_is_dropped(tiny_weights, tmp_path, command):
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufeffTo be".encode())
    process = command(sample.main, "--weights", tiny_weights, "--prompt-file", path,
                      "--num-blocks", 1)
    assert process.returncode == 0 and process.stdout.startswith("To be"), process.stderr


def test_a_clock_that_stands_still_divides_nothing_by_zero(tiny_weights, command, monkeypatch):
    monkeypatch.setattr(sample.time, "perf_counter", lambda: 1.0)
    process = command(sample.main, "--weights", tiny_weights, "--num-blocks", 1)
    assert process.returncode == 0 and "characters per second" in process.stderr
