"""The instruments: the n-gram judge, what is counted in its texts, and the count of operations."""

import itertools
import math
from argparse import Namespace
from collections import Counter
from dataclasses import replace

from model import (
    BadInput,
    DiffusionConfig,
    DiffusionTransformer,
    log_probs,
    nelbo,
    save_weights,
)
from sample import draw, row_generators, uniform

import ablation_training as ablation
import benchmark_likelihood as likelihood
import benchmark_sampling as judging
import benchmark_training as timing
import causal_twin
import numpy as np
import pytest
import torch
from causal_twin import causal_attention, continue_causally, next_nll
from conftest import TableModel, random_model
from torch.utils.flop_counter import FlopCounterMode

TEXT = "to be or not to be that is the question whether tis nobler in the mind to suffer"


def plain_witten_bell(text, history, character):
    """P(character | history) as the formula reads, from counts of substrings."""
    if history is None:
        return 1 / 127
    n = len(history)
    after = Counter(text[i + n] for i in range(len(text) - n) if text.startswith(history, i))
    shorter = plain_witten_bell(text, history[1:] if history else None, character)
    if not after:
        return shorter
    return (after[character] + len(after) * shorter) / (sum(after.values()) + len(after))


def test_judge_is_interpolated_witten_bell():
    judge = judging.NGramJudge(np.frombuffer(TEXT.encode(), np.uint8), order=4)
    for text in ("to be seen", "xyz the qu"):
        p = [plain_witten_bell(TEXT, text[i - 3 : i], text[i]) for i in range(3, len(text))]
        ids = np.frombuffer(text.encode(), np.uint8)
        np.testing.assert_allclose(judge.nats(ids, skip=3), -np.log(p))


def test_judge_gives_a_probability_to_every_character_and_one_to_all_of_them():
    judge = judging.NGramJudge(np.frombuffer(TEXT.encode(), np.uint8))
    texts = [np.frombuffer(b" the qu" + bytes([c]), np.uint8) for c in range(1, 128)]
    total = sum(math.exp(-judge.nats(text, skip=7)[0]) for text in texts)
    assert total == pytest.approx(1)


@pytest.mark.parametrize("text, expected", [
    ("not to be xx", 10), ("zzz", 0), (TEXT, len(TEXT)), ("question not to", 9),
])
def test_longest_copy(text, expected):
    assert judging.longest_copy(text, TEXT) == expected


def test_words_cut_by_the_edges_of_a_text_are_not_judged():
    assert judging.words("estion: Whether 'tis no") == ["whether", "'tis"]


def test_operations_per_character_are_those_that_torch_counts():
    config = DiffusionConfig(n_layer=2, n_head=2, n_embd=32, sequence_len=16, context_len=4)
    model, x = DiffusionTransformer(config), torch.zeros(3, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(x, x[:, 0]).sum().backward()
    counted = sum(counter.get_flop_counts()["Global"].values())
    assert counted == 3 * 16 * timing.flops_per_character(config)


def test_permuted_epochs_read_every_window_once():
    recipe = replace(ablation.RECIPE, permuted=True, batch_size=3)
    starts = torch.cat(list(ablation.draw_starts(recipe, 256 * 8 + 255, steps=16)))
    for epoch in starts.view(6, 8):  # of eight windows, wherever the first begins
        assert (epoch.sort().values.diff() == 256).all()
    assert not torch.equal(starts[:8] - starts[:8].min(), starts[8:16] - starts[8:16].min())


def test_a_kept_ablation_is_not_trained_again_unless_its_settings_differ(tmp_path, monkeypatch):
    trainings = []

    def train(recipe, tokens, characters, seed, teachers):
        trainings.append((recipe, seed, len(teachers)))
        return random_model()

    monkeypatch.setattr(ablation, "train", train)
    args = Namespace(keep=tmp_path, characters=8192, share=1.0)
    for _ in range(2):
        ablation.trained("long: student of two seeds", 0, None, args)
    student = ablation.ROWS["long: student of two seeds"]
    assert trainings == [(ablation.RECIPE, 0, 0), (ablation.RECIPE, 1, 0), (student, 0, 2)]
    args.share = 0.5
    ablation.trained("the recipe", 0, None, args)
    assert len(trainings) == 4


def every_text(length, vocab_size):
    return torch.tensor(list(itertools.product(range(1, vocab_size), repeat=length)))


@torch.no_grad()
@pytest.mark.parametrize("score", [likelihood.left_to_right, likelihood.most_confident_first])
def test_exact_likelihoods_sum_to_one_over_all_texts(score):
    config = DiffusionConfig(sequence_len=3, vocab_size=4, diffusion_steps=5, context_len=0)
    nll = score(TableModel(config), every_text(3, 4))
    assert (-3 * nll).exp().sum().item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_bounds_of_the_likelihood_benchmark_are_those_of_the_model():
    config = DiffusionConfig(sequence_len=3, vocab_size=4, diffusion_steps=5, context_len=0)
    model, x_0 = TableModel(config), torch.tensor([1, 3, 2])
    expected, error = nelbo(model, x_0.repeat(500), passes=8)
    discrete, _ = likelihood.bounds(model, x_0.expand(500, 3), draws=30, seed=1)
    assert discrete.mean().item() == pytest.approx(expected, abs=4.5 * error + 0.01)
    config = replace(config, diffusion_steps=100_000)  # nearly continuous time
    discrete, continuous = likelihood.bounds(TableModel(config), x_0.expand(9, 3), 30, seed=1)
    torch.testing.assert_close(discrete, continuous, rtol=1e-3, atol=0)


@torch.no_grad()
def test_the_causal_twin_predicts_each_character_from_those_before_it():
    model = random_model()
    x_0 = torch.randint(1, 128, (2, 32))
    changed = x_0.clone()
    changed[:, 20] = x_0[:, 20] % 127 + 1
    with causal_attention():
        before, after = next_nll(model, x_0, 0), next_nll(model, changed, 0)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.isclose(before[:, 20:], after[:, 20:]).all(0).any()


@torch.no_grad()
@pytest.mark.parametrize("given", [0, 1, 9])
def test_a_twin_that_keeps_keys_writes_what_one_that_recomputes_them_writes(given, monkeypatch):
    monkeypatch.setattr("model.multiplies_bf16", lambda device: False)
    model = random_model()
    x = x_plain = torch.randint(1, 128, (3, given))
    kept = continue_causally([model, model], x, 32 - given, 0.8, row_generators(5, 3))
    generators, t = row_generators(5, 3), torch.zeros(3, dtype=torch.long)
    with causal_attention():
        while x_plain.size(1) < 32:
            shifted = torch.nn.functional.pad(x_plain, (1, 0))      # 0 is [MASK]
            log_p = log_probs(model(shifted, t)[:, -1:], mask_token_id=0)
            new = draw(log_p, 0.8, uniform(generators, log_p[..., 0]))
            x_plain = torch.cat((x_plain, new), 1)
    assert torch.equal(kept, x_plain)
    assert model.cos.size(0) == 32  # the rotary tables are whole again


@torch.no_grad()
def test_twins_write_from_the_average_of_their_probabilities(monkeypatch):
    monkeypatch.setattr("model.multiplies_bf16", lambda device: False)
    twins, begin = [random_model(seed=1), random_model(seed=2)], torch.zeros(50, 1).long()
    with causal_attention():
        p = sum(log_probs(twin(begin, begin[:, 0]), 0).exp() for twin in twins) / 2
    expected = draw(p.log(), 1.0, uniform(row_generators(0, 50), begin))
    written = continue_causally(twins, begin[:, :0], 1, 1.0, row_generators(0, 50))
    assert torch.equal(written, expected) and len(written.unique()) > 10


def test_a_twin_writes_at_least_as_much_as_asked_and_the_same_for_the_same_seed():
    text = causal_twin.write([random_model()], 200, seed=4, streams=3)
    assert 200 <= len(text) <= 200 + 3 * 16 + 2  # a half window more for each stream
    assert text == causal_twin.write([random_model()], 200, seed=4, streams=3)
    assert text != causal_twin.write([random_model()], 200, seed=5, streams=3)


def test_the_twin_that_is_there_sets_the_mark_and_another_model_stays(tmp_path):
    path = tmp_path / "twin.pt"
    assert causal_twin.incumbent(path) == math.inf
    save_weights(random_model(), {"causal": True, "val_nll": 1.5}, path)
    assert causal_twin.incumbent(path) == 1.5
    save_weights(random_model(), {"val_nelbo": 1.5}, path)
    with pytest.raises(BadInput, match="not a causal twin"):
        causal_twin.incumbent(path)
