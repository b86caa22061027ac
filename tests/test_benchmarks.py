"""The benchmarks themselves: the judge of text, the timed steps and the ablations."""

import itertools
from argparse import Namespace
from dataclasses import replace
from functools import partial

import ablation_training as ablation
import benchmark_sampling as judging
import benchmark_training as timing
import pytest
import torch
from benchmark_sampling import (
    cosine_ancestral, entropy_bound, factor, gumbel_top_k, leftmost, margin,
)
from causal_twin import make_causal, next_log_p, nll_of
from conftest import TINY, assert_every_call_unmasks, partly_masked, random_model, seeded
from torch.utils.flop_counter import FlopCounterMode

from model import Attention, DiffusionConfig, DiffusionTransformer, nelbo
from sample import Proposal, denoise, top_k

TEXT = "to be or not to be that is the question whether tis nobler in the mind to suffer"


@torch.no_grad()
@pytest.mark.parametrize("length", [9, 32, 33, 80, 95])
def test_the_judge_scores_each_character_but_the_first_ones_in_one_of_its_windows(
    length, monkeypatch
):
    monkeypatch.setattr("model.multiplies_bf16", lambda device: False)
    judge, context = make_causal(random_model()), 8
    T, x_0 = judge.config.sequence_len, torch.randint(1, 128, (3, length))
    expected = []
    for start in range(0, length - context, T - context):
        window = x_0[:, start : start + T]
        expected.append(nll_of(next_log_p(judge, window), window)[:, context:])
    nats = judging.judged_nats(judge, x_0, context)
    torch.testing.assert_close(nats, torch.cat(expected, 1).mean(1))
    assert sum(part.size(1) for part in expected) == length - context


@pytest.mark.parametrize("text, expected", [
    ("not to be xx", 10), ("zzz", 0), (TEXT, len(TEXT)), ("question not to", 9),
])
def test_longest_copy_finds_the_longest_stretch_that_stands_in_the_source(text, expected):
    assert judging.longest_copy(text, TEXT) == expected


def test_the_columns_of_a_text_match_a_count_by_hand_without_words_cut_by_its_edges():
    text = "to be?\n\nROMEO:\nno be!\n"
    columns = judging.Columns("to be or not to be " * 50, None, []).of(text)
    # "to", which touches the edge, is left out; romeo and no are unknown; "o be" stands there twice
    assert columns == {
        "?!": 2000 / 22, "speakers": 1000 / 22, "valid": 2 / 4, "distinct": 18 / 19, "copy": 5}
    assert judging.words("estion: Whether 'tis no") == ["whether", "'tis"]


def test_a_row_is_the_mean_over_texts_with_its_standard_error():
    judge = make_causal(random_model(replace(TINY, sequence_len=96)))
    texts = [TEXT, TEXT[::-1]]
    unseen = [TEXT[1:] + "x"]
    columns = judging.Columns(TEXT, judge, unseen)
    nats = columns.nats(texts)
    row = columns.row(texts, [30, 40])
    assert row["calls"] == pytest.approx((35, 5))
    assert row["judge"] == pytest.approx((sum(nats) / 2, abs(nats[0] - nats[1]) / 2))
    assert row["over"] == pytest.approx((sum(nats) / 2 - columns.nats(unseen)[0], row["judge"][1]))
    assert row["longest"] == (len(TEXT), 0)


def test_operations_per_character_match_the_count_of_torch():
    config = DiffusionConfig(n_layer=2, n_head=2, n_embd=32, sequence_len=16, context_len=4)
    model, x = DiffusionTransformer(config), torch.zeros(3, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(x, x[:, 0]).sum().backward()
    counted = sum(counter.get_flop_counts()["Global"].values())
    assert counted == 3 * 16 * timing.flops_per_character(config)


def test_permuted_epochs_read_every_window_once():
    recipe = replace(ablation.RECIPE, permuted=True, batch_size=3)
    starts = torch.cat(list(ablation.draw_starts(recipe, 256 * 8 + 255, steps=16)))
    for epoch in starts.view(6, 8):  # of eight windows, the first at a random offset
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


@pytest.mark.parametrize("row", [
    "baseline", "start: causal for 15%", "regularisation: dropout 0.1", "long: student of one seed",
    "optimizer: AdamW 1e-3", "masks: complementary pairs",
])
def test_an_ablation_trains_a_diffusion_model(row, monkeypatch):
    small = replace(TINY, sequence_len=64)
    monkeypatch.setattr(ablation, "CONFIG", small)
    monkeypatch.setattr(ablation, "compiled", lambda model, B: model)
    recipe = replace(ablation.ROWS[row], batch_size=8)
    text = torch.tensor(list(TEXT.encode()) * 4, dtype=torch.uint8)
    teachers = [random_model(small)] * len(recipe.teachers)
    model = ablation.train(recipe, text, 30 * 8 * 64, 0, teachers)
    assert model.blocks[0].attn.attend is Attention.attend and not model.training
    assert nelbo(model, text, passes=2)[0] < 4


def test_the_timed_steps_run_on_the_bytes_of_a_corpus(monkeypatch):
    monkeypatch.setattr(timing, "CONFIG", TINY)
    args = Namespace(batch_size=2, no_compile=True)
    text, device = torch.randint(1, 128, (600,), dtype=torch.uint8), torch.device("cpu")
    timing.our_step(text, args, device)()
    timing.naive_step(text, 2, device)()


# ---- rules that lost


LOST = {
    "top-k with noise": partial(gumbel_top_k, k=2),
    "entropy": partial(entropy_bound, gamma=4.0),
    "factor": partial(factor, f=2.0),
    "margin": partial(margin, k=3),
    "cosine ancestral": partial(cosine_ancestral, steps=9),
    "leftmost": partial(leftmost, rule=partial(top_k, k=3), width=5),
}


@pytest.mark.parametrize("rule", LOST.values(), ids=LOST)
def test_every_network_call_of_a_rule_that_lost_keeps_known_characters_and_unmasks_more(rule):
    for seed, temperature in enumerate((0, 0.7, 1.5)):
        x = partly_masked(3, 32, 0.3 + 0.35 * seed, seed)
        states = [x, *denoise(random_model(), x, rule, temperature, seeded(seed))]
        assert_every_call_unmasks(states)


def test_entropy_bound_unmasks_the_positions_computed_by_hand():
    p = torch.tensor([[[0, 0.9, 0.1], [0, 0.6, 0.4], [0, 0.95, 0.05], [0, 0.99, 0.01]]])
    masked = torch.tensor([[True, True, True, False]])
    seen = Proposal(p.log(), torch.ones(1, 4, dtype=torch.long), masked, None)
    # entropies 0.325, 0.673, 0.199: the two smallest risk 0.199 nats, all three 0.524
    assert entropy_bound(seen, gamma=0.1).tolist() == [[False, False, True, False]]
    assert entropy_bound(seen, gamma=0.3).tolist() == [[True, False, True, False]]
    assert (entropy_bound(seen, gamma=0.6) & masked).tolist() == [[True, True, True, False]]


def test_gumbel_noise_draws_places_in_proportion_to_confidence():
    n, p = 20_000, torch.tensor([[0, 0.6, 0.4], [0, 0.3, 0.7], [0, 0.1, 0.9], [0, 0.9, 0.1]])
    masked = torch.tensor([True, True, True, False]).expand(n, 4)
    chosen = torch.ones(n, 4, dtype=torch.long)
    seen = Proposal(p.log().expand(n, 4, 3), chosen, masked, torch.rand(n, 4))
    first = gumbel_top_k(seen, k=1)
    assert (first.sum(1) == 1).all()
    expected = torch.tensor([0.6, 0.3, 0.1, 0.0])
    torch.testing.assert_close(first.float().mean(0), expected, rtol=0, atol=0.015)
    assert torch.equal(gumbel_top_k(seen, k=3), masked)


def test_leftmost_confines_each_network_call_to_the_leftmost_masked_characters():
    model, x = random_model(), partly_masked(2, 32, 0.9, seed=3)
    rule = partial(leftmost, rule=partial(top_k, k=2), width=3)
    for before, after in itertools.pairwise([x, *denoise(model, x, rule, 1.0, seeded())]):
        for row in range(2):
            open_before = (before[row] == 0).nonzero().flatten().tolist()
            unmasked = [i for i in open_before if after[row, i] != 0]
            assert set(unmasked) <= set(open_before[:3])
