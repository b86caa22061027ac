import io
import itertools
import math
import re
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import (
    TINY, Gone, TableModel, assert_every_call_unmasks, assert_one_clear_line, last, launch,
    partly_masked, random_model, script, seeded,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
from model import DiffusionConfig, save_weights
from sample import (
    Proposal, SamplerConfig, ancestral, denoise, dilated, draft_and_correct, draw, fill,
    left_to_right, threshold, top_k, uniform,
)

RULES = {
    "dilated": dilated,
    "dilated, five turns": partial(dilated, turns=5),
    "threshold": partial(threshold, tau=0.1),
    "top-k": partial(top_k, k=3),
    "ancestral": partial(ancestral, steps=9),
    "left to right": partial(left_to_right, k=2),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@every_rule
@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 32), share=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
       seed=st.integers(0, 999), temperature=st.sampled_from([0, 0.7, 1.5]))
def test_every_network_call_of_denoise_keeps_known_characters_and_unmasks_more(
    rule, length, share, seed, temperature
):
    x = partly_masked(3, length, share, seed)
    states = [x, *denoise(random_model(), x, rule, temperature, seeded(seed))]
    assert_every_call_unmasks(states)


@every_rule
def test_equal_seeds_give_equal_texts_and_neighbouring_seeds_share_no_text(rule):
    """In an earlier version, row r of seed s was row r - 1 of seed s + 1."""
    model, x = random_model(), torch.zeros(8, 32, dtype=torch.long)
    again, one, other = (last(denoise(model, x, rule, 1.0, seeded(seed))) for seed in (3, 3, 4))
    assert torch.equal(again, one) and len(torch.cat((one, other)).unique(dim=0)) == 16


def plain_top_k(model, ids, k):
    """A naive top-k at temperature 0: one row, Python loops, the noise level t from the share that
    is masked."""
    ids, S = list(ids), model.config.diffusion_steps
    while 0 in ids:
        t = math.ceil(S * ids.count(0) / len(ids))
        p = model(torch.tensor([ids]), torch.tensor([t - 1]))[0].exp()
        ranked = []
        for position, i in enumerate(ids):
            if i == 0:
                ranked.append((p[position].max().item(), position, int(p[position].argmax())))
        for _, position, character in sorted(ranked, reverse=True)[:k]:
            ids[position] = character
    return ids


@torch.no_grad()
def test_denoise_agrees_with_a_naive_loop():
    model, x = random_model(), partly_masked(4, 32, 0.8, seed=2)
    fast = last(denoise(model, x, partial(top_k, k=3), 0, seeded()))
    assert fast.tolist() == [plain_top_k(model, row.tolist(), 3) for row in x]


def exact_reverse_process(model, steps):
    """Distribution of x_0 under p(x_{t-1} | x_t) from t = steps down to 1, by enumeration."""
    V, L = model.config.vocab_size, model.config.sequence_len
    states = {(0,) * L: 1.0}
    for t in range(steps, 0, -1):
        after = {}
        for x, weight in states.items():
            p = model(torch.tensor([x]), None)[0].exp().tolist()
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
            log_p = model(torch.tensor([[*x_0[:i], *[0] * (L - i)]]), None)[0, i]
            probability *= log_p.exp()[x_0[i]].item()
        total[x_0] = probability
    return total


def assert_drawn_from(probabilities, counts):
    """By chi-squared, whose mean is the degrees of freedom and whose variance is twice as much."""
    n, degrees = sum(counts), len(counts) - 1
    terms = [(count - n * p) ** 2 / (n * p) for count, p in zip(counts, probabilities, strict=True)]
    assert sum(terms) < degrees + 4 * math.sqrt(2 * degrees)


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
    x = last(denoise(model, torch.zeros(n, 3, dtype=torch.long), rule, 1, seeded()))
    found, counts = x.unique(dim=0, return_counts=True)
    observed = dict(zip(map(tuple, found.tolist()), counts.tolist(), strict=True))
    assert_drawn_from(expected.values(), [observed.get(x_0, 0) for x_0 in expected])


def numbers(u, monkeypatch):
    """Lets `draw` take these numbers in place of random ones."""
    monkeypatch.setattr(sample, "uniform", lambda x, generator: u)


@pytest.mark.parametrize("temperature", [0, 1e-39, 1e-6, 0.5, 100])
def test_every_temperature_draws_characters_that_have_a_probability(temperature, monkeypatch):
    log_p = torch.randn(3, 50, 128).masked_fill(torch.arange(128) == 0, -math.inf).log_softmax(-1)
    for u in (torch.zeros(3, 50), torch.rand(3, 50), torch.full((3, 50), 1 - 2**-24)):
        numbers(u, monkeypatch)
        drawn = draw(log_p, temperature, None)
        assert ((drawn > 0) & (drawn < 128)).all()
        if temperature < 1e-5:
            assert torch.equal(drawn, log_p.argmax(-1))


@pytest.mark.parametrize("min_p, weights", [(0, [0.25, 0.09, 0.04]), (0.5, [0.25, 0.09, 0]),
                                            (0.7, [1, 0, 0]), (1, [1, 0, 0])])
def test_draws_have_tempered_probabilities_but_not_below_min_p(min_p, weights, monkeypatch):
    log_p = torch.tensor([-math.inf, math.log(0.5), math.log(0.3), math.log(0.2)])
    numbers((torch.arange(10_000) + 0.5)[None] / 10_000, monkeypatch)
    drawn = draw(log_p.expand(1, 10_000, 4), 0.5, None, min_p)
    expected = torch.tensor([0, *weights]) / sum(weights)
    shares = drawn.flatten().bincount(minlength=4) / 10_000
    torch.testing.assert_close(shares, expected, rtol=0, atol=2e-4)


def test_threshold_and_top_k_unmask_the_positions_computed_by_hand():
    p = torch.tensor([[[0, 0.9, 0.1], [0, 0.6, 0.4], [0, 0.95, 0.05], [0, 0.99, 0.01]]])
    chosen, masked = torch.tensor([[1, 1, 1, 1]]), torch.tensor([[True, True, True, False]])
    seen = Proposal(p.log(), chosen, masked, None)
    assert threshold(seen, tau=0.9).tolist() == [[True, False, True, False]]
    assert threshold(seen, tau=0.97).tolist() == [[False, False, True, False]]
    assert (top_k(seen, k=2) & seen.masked).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("turns, order", [
    (8, [0, 4, 2, 6, 1, 5, 3, 7]), (4, [0, 2, 1, 3]), (1, [0]), (6, [0, 4, 2, 1, 5, 3]),
])
def test_dilated_unmasks_equally_spaced_characters_in_van_der_corput_order(turns, order):
    unmask_time = torch.full((1, 24), 0.0)
    masked, seen = torch.ones(1, 24, dtype=torch.bool), []
    while masked.any():
        unmask = dilated(Proposal(None, None, masked, unmask_time), turns)
        places = unmask.nonzero()[:, 1]
        assert (places.diff() == turns).all()
        seen.append(int(places[0]))
        masked = masked & ~unmask
    assert seen == order


def test_dilated_begins_at_random_places_and_needs_no_more_calls_than_turns():
    x = torch.zeros(400, 32, dtype=torch.long)
    first = dilated(Proposal(None, None, x == 0, uniform(x, seeded())), 8).float().mean(0)
    assert (first - 1 / 8).abs().max() < 4.5 * math.sqrt(7 / 64 / 400)
    for n in (1, 8, 13):
        calls = list(denoise(random_model(), x[:2], partial(dilated, turns=n), 1.0, seeded()))
        assert len(calls) == n


# ---- whole texts


def test_every_sweep_remasks_each_new_character_but_only_the_first_sentence_ends(monkeypatch):
    monkeypatch.setattr(sample, "SENTENCE_ENDS", torch.arange(96, 128))
    model, x = random_model(), partly_masked(3, 32, 0.9, seed=4)
    open_to_change, remasked = x == 0, []
    model.register_forward_hook(lambda module, inputs, log_p: remasked.append(inputs[0] == 0))
    config = SamplerConfig(temperature=1.0, sweeps=3, stride=4)
    states = list(draft_and_correct(model, x, open_to_change, config, seeded()))
    before, turn = states[-13:-1], open_to_change.cumsum(1) % 4     # of the 12 correction calls
    for phase, (state, masked) in enumerate(zip(before, remasked[-12:], strict=True)):
        wanted = open_to_change & (turn == phase % 4) & ((phase < 4) | (state < 96))
        assert torch.equal(masked, wanted)
    result = states[-1]
    assert (result != 0).all() and torch.equal(result[~open_to_change], x[~open_to_change])


def test_a_stride_beyond_the_text_redraws_each_character_alone_and_makes_no_empty_call():
    model, x, calls = random_model(), partly_masked(2, 32, 0.5, seed=4), []
    model.register_forward_hook(lambda module, inputs, log_p: calls.append((inputs[0] == 0).sum(1)))
    config = SamplerConfig(partial(dilated, turns=1), sweeps=2, stride=10**9)
    last(draft_and_correct(model, x, x == 0, config, seeded()))
    corrections = torch.stack(calls[1:])
    assert corrections.max() == 1 and len(corrections) == 2 * (x == 0).sum(1).max()


@torch.no_grad()
def test_the_corrector_at_temperature_one_turns_independent_draws_into_joint_ones():
    """Gibbs sampling. The draft draws both characters at once, so independently; each correction
    call draws one from its exact distribution given the other."""
    config = DiffusionConfig(sequence_len=2, vocab_size=3, diffusion_steps=4, context_len=0)
    joint = torch.tensor([[0.4, 0.1], [0.2, 0.3]])  # p(x_0, x_1) over the characters 1 and 2
    exact = TableModel(config)
    for a, b in itertools.product(range(3), repeat=2):  # x_t, where 0 is [MASK]
        first = joint[:, b - 1] if b else joint.sum(1)
        second = joint[a - 1] if a else joint.sum(0)
        exact.table[a + 3 * b, :, 1:] = torch.stack((first, second)).log()
    at_once = partial(dilated, turns=1)
    how = SamplerConfig(at_once, 1.0, sweeps=8, sweep_min_p=0.0, stride=2)
    blank = torch.zeros(20_000, 2, dtype=torch.long)
    x = last(draft_and_correct(exact, blank, blank == 0, how, seeded()))
    counts = (2 * (x[:, 0] - 1) + x[:, 1] - 1).bincount(minlength=4)
    assert_drawn_from(joint.flatten().tolist(), counts.tolist())


def ids(text):
    """Ids (1, N) of a text, where \\0 is [MASK]."""
    return torch.tensor([list(text.encode())], dtype=torch.long)


def filled(x, config, model=None):
    """How many characters of x are final after every window, and x in the end. Checks what always
    holds: more and more characters are final, which means full and unchanged from then on."""
    states = [(x, 0), *fill(model or random_model(), x, config, seeded(1))]
    for (before, final), (after, next_final) in itertools.pairwise(states):
        assert final < next_final and (after[:, :next_final] != 0).all()
        assert torch.equal(before[:, :final], after[:, :final])
    result, final = states[-1]
    assert final == x.size(1) and torch.equal(result[x != 0], x[x != 0])
    return [final for _, final in states[1:]], result


SHORT = SamplerConfig(block_len=8, lookback=8)


def test_windows_continue_one_another_and_leave_half_the_lookback_to_the_corrector():
    x = ids("To be" + 32 * "\0")
    assert filled(x, SHORT)[0] == [9, 17, 25, 37]
    assert filled(x, replace(SHORT, sweeps=0))[0] == [13, 21, 29, 37]


def test_only_the_lookback_at_the_end_of_a_prompt_conditions_a_continuation():
    config = replace(SHORT, lookback=5)
    _, one = filled(ids("And so To be" + 24 * "\0"), config)
    _, other = filled(ids("xyzXYZ To be" + 24 * "\0"), config)
    assert torch.equal(one[:, 12:], other[:, 12:])


def test_a_gap_sees_the_text_on_both_sides():
    model, seen = random_model(), []
    model.register_forward_hook(lambda module, inputs, log_p: seen.append(inputs[0]))
    x = partly_masked(1, 100, 0, seed=0)
    x[0, 50:53] = 0
    list(fill(model, x, SamplerConfig(), seeded()))
    assert torch.equal(seen[0], x[:, 42:74])  # a quarter of the window of 32 before the gap


@settings(max_examples=60, deadline=None)
@given(sequence_len=st.integers(1, 12), block_len=st.none() | st.integers(1, 14),
       lookback=st.none() | st.integers(0, 14), prompt=st.integers(0, 20), sweeps=st.integers(0, 1))
def test_every_block_length_and_lookback_writes_text_or_is_refused(
    sequence_len, block_len, lookback, prompt, sweeps
):
    flags = [f"--block-len={block_len}"] * bool(block_len) + [f"--sweeps={sweeps}"]
    flags += [f"--lookback={lookback}"] * (lookback is not None)
    args = sample.parse_arguments(flags)
    if (block_len or max(1, 7 * sequence_len // 8)) + (lookback or 0) > sequence_len:
        with pytest.raises(sample.BadInput, match=f"sequence length, {sequence_len}"):
            sample.sampler_config(args, sequence_len)
    else:
        model = random_model(replace(TINY, sequence_len=sequence_len, context_len=0))
        config = sample.sampler_config(args, sequence_len)
        filled(ids(prompt * "x" + 20 * "\0"), config, model)


@settings(max_examples=25, deadline=None)
@given(st.text("abc _\n", min_size=1, max_size=150).filter(lambda text: "_" in text),
       st.integers(1, 3), st.sampled_from([1, 2, 5, 32]))
def test_filling_changes_only_the_gaps_of_a_text_of_any_length(text, num_samples, sequence_len):
    model = random_model(replace(TINY, sequence_len=sequence_len, context_len=0))
    x = ids(text.replace("_", "\0")).repeat(num_samples, 1)
    filled(x, SamplerConfig(block_len=1, lookback=0), model)


# ---- the command


@pytest.fixture
def written(tiny_weights, command):
    """Calls sample.py with tiny weights. Returns what it writes to stdout."""
    return lambda *flags: command(sample.main, "--weights", tiny_weights, *flags, code=0).stdout


@pytest.fixture
def stdin(monkeypatch):
    def feed(raw):
        stream = io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stream)

    return feed


def test_sample_prints_text_alone_to_stdout_from_any_folder(tiny_weights, tmp_path, written):
    prompt = "ROMEO: a prompt longer than a window is printed whole"
    flags = ["--block-len", 8, "--lookback", 8, "--num-blocks", 3, "--prompt", prompt]
    process = script("sample.py", "--weights", tiny_weights, *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(prompt) and len(process.stdout) == len(prompt) + 24 + 1
    assert "24 characters in" in process.stderr
    # The pipe is read in text mode, which turns \r into \n
    assert written(*flags).replace("\r", "\n") == process.stdout


def test_without_a_prompt_sample_continues_two_line_ends_that_it_does_not_print(written):
    """In the corpus, a speaker follows two line ends."""
    alone = written("--num-blocks", 2)
    assert written("--num-blocks", 2, "--prompt", "\n\n") == "\n\n" + alone
    assert len(alone) == 2 * 28 + 1
    assert len(written("--num-blocks", 1, "--block-len", 32)) == 32 + 1  # they need not fit


def test_sample_separates_several_samples_and_fills_gaps(written, stdin):
    stdin(b"\xef\xbb\xbfTo __\r\nor not")  # with a byte order mark, and CR LF for LF
    texts = re.split(r"\n*----- sample \d -----\n", written("--num-samples", 3, "--infill", "-"))
    assert len(texts) == 3
    assert all(text.startswith("To ") and text.rstrip("\n").endswith("\nor not") for text in texts)


def test_sample_reads_crlf_as_lf_in_prompts_and_prompt_files(written, tmp_path):
    prompt, crlf = "ROMEO:\nGood morrow.\n", "ROMEO:\r\nGood morrow.\r\n"
    (tmp_path / "crlf.txt").write_bytes(crlf.encode())
    expected = written("--num-blocks", 1, "--prompt", prompt)
    assert written("--num-blocks", 1, "--prompt", crlf) == expected
    assert written("--num-blocks", 1, "--prompt-file", tmp_path / "crlf.txt") == expected


@pytest.mark.parametrize("arguments", [
    ["--num-blocks", 2, "--block-len", 60, "--num-samples", 2],
    ["--infill", "To ___\nor not ____"],
], ids=["streaming", "infilling"])
def test_a_terminal_shows_the_text_that_a_pipe_gets(arguments, command, screen):
    """The line on stderr must not stand among the lines of the text, nor write over them."""
    arguments = [*arguments, "--seed", 5]
    piped = command(sample.main, *arguments).stdout
    with screen.shown():
        sample.main([str(word) for word in arguments])
    shown = screen.text()
    assert shown.startswith("\n".join(line.rstrip() for line in piped.split("\n")))
    assert len(piped) > 16 and "characters in" in shown.removeprefix(piped)


def test_sample_ends_quietly_when_its_pipe_is_closed(tiny_weights):
    process = launch("sample.py", "--weights", tiny_weights, "--block-len", 8, "--lookback", 8,
                     "--num-blocks", 100_000)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 0


@pytest.mark.parametrize("arguments, words", [
    (["--temperature", "-1"], ["-1", "from 0"]),
    (["--temperature", "warm"], ["warm", "number"]),
    (["--tau", "1.5"], ["1.5", "to 1"]),
    (["--turns", "2.5"], ["2.5", "whole number"]),
    (["--infill", "a_b", "--num-blocks", "2"], ["--num-blocks 2", "--infill"]),
    (["--prompt", "caf\u00e9"], ["\u00e9", "position 3", "ASCII", "trained from scratch"]),
    (["--turns", "1000000000"], ["1000000000", "to 10000"]),
    (["--num-samples", "999999999999"], ["999999999999", "to 10000"]),
    (["--method", "magic"], ["magic", "ancestral"]),
    (["--method", "threshold", "--k", "3"], ["--k", "threshold", "--tau"]),
    (["--k", "3"], ["--k", "dilated", "--turns"]),
    (["--quality", "middling"], ["middling", "fast"]),
    (["--quality", "best", "--method", "top-k"], ["--quality", "dilated", "--k"]),
    (["--device", "toaster"], ["toaster"]),
    (["--infill", "caf\udce9 _"], ["position 3"]),
    (["--prompt-file", "nowhere.txt"], ["nowhere.txt"]),
    (["--block-len", "30", "--lookback", "20"], ["30", "20", "32"]),
    (["--block-len", "32", "--prompt", "a"], ["32", "prompt"]),
    (["--infill", "a _", "--prompt", "b"], ["--infill", "--prompt"]),
    (["--infill", "To be, or [MASK]"], ["no gap", "underscore"]),
    (["--infill", ""], ["no gap"]),
    (["--infill", "-"], ["-", "utf-8", "0xe9", "position 3"]),
    (["--weights", "."], ["weights file ."]),
    (["--weights", "nowhere.pt"], ["nowhere.pt", "No such file"]),
])
def test_bad_input_to_sample_is_refused_in_one_line(arguments, words, tiny_weights, command, stdin):
    stdin(b"caf\xe9 ___")
    assert_one_clear_line(command(sample.main, "--weights", tiny_weights, *arguments), *words)


def test_a_character_of_several_bytes_survives_the_edge_of_a_window(tmp_path, command):
    config = replace(TINY, vocab_size=256, sequence_len=4, context_len=0)
    save_weights(random_model(config), {}, tmp_path / "w.pt")
    text = "_\u2603_\u2603_"  # the first window has four bytes, of which three are final
    process = command(sample.main, "--weights", tmp_path / "w.pt", "--infill", text)
    assert process.stdout.count("\u2603") == 2


@pytest.mark.parametrize("stderr", [Gone(), None], ids=["full disk", "none: 2>&- or pythonw"])
def test_sample_writes_its_text_when_stderr_cannot_be_written(stderr, written, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr)
    assert len(written("--num-blocks", 1)) == 28 + 1
