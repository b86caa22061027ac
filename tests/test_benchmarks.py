"""The benchmarks themselves: the judges of text, the timed steps, the ablations, the exact
likelihoods and the GPT twin."""

import itertools
import math
from argparse import Namespace
from dataclasses import replace

import ablation_training as ablation
import benchmark_likelihood as likelihood
import benchmark_sampling as judging
import benchmark_training as timing
import causal_twin
import pytest
import torch
from causal_twin import continue_causally, make_causal, next_log_p, nll_of
from conftest import TINY, TableModel, random_model
from torch.utils.flop_counter import FlopCounterMode

from model import (
    Attention, BadInput, DiffusionConfig, DiffusionTransformer, load_weights, nelbo, save_weights,
)
from sample import draw

TEXT = "to be or not to be that is the question whether tis nobler in the mind to suffer"


def seeded(seed):
    return torch.Generator().manual_seed(seed)


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


def test_the_columns_of_a_text_match_a_count_by_hand():
    text = "to be?\n\nROMEO:\nno be!\n"
    columns = judging.Columns("to be or not to be " * 50, None, []).of(text)
    # "to", which touches the edge, is left out; romeo and no are unknown; "o be" stands there twice
    assert columns == {
        "?!": 2000 / 22, "speakers": 1000 / 22, "valid": 2 / 4, "distinct": 18 / 19, "copy": 5}


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


def test_words_cut_by_the_edges_of_a_text_are_not_judged():
    assert judging.words("estion: Whether 'tis no") == ["whether", "'tis"]


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


def every_text(length, vocab_size):
    return torch.tensor(list(itertools.product(range(1, vocab_size), repeat=length)))


@torch.no_grad()
@pytest.mark.parametrize("score", [likelihood.left_to_right, likelihood.most_confident_first])
def test_exact_likelihoods_sum_to_one_over_all_texts(score):
    config = DiffusionConfig(sequence_len=3, vocab_size=4, diffusion_steps=5, context_len=0)
    nll = score(TableModel(config), every_text(3, 4))
    assert (-3 * nll).exp().sum().item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_bounds_of_the_likelihood_benchmark_match_nelbo_and_meet_in_continuous_time():
    config = DiffusionConfig(sequence_len=3, vocab_size=4, diffusion_steps=5, context_len=0)
    model, x_0 = TableModel(config), torch.tensor([1, 3, 2])
    expected, error = nelbo(model, x_0.repeat(500), passes=8)
    discrete, _ = likelihood.bounds(model, x_0.expand(500, 3), draws=30, seed=1)
    assert discrete.mean().item() == pytest.approx(expected, abs=4.5 * error + 0.01)
    config = replace(config, diffusion_steps=100_000)  # nearly continuous time
    discrete, continuous = likelihood.bounds(TableModel(config), x_0.expand(9, 3), 30, seed=1)
    torch.testing.assert_close(discrete, continuous, rtol=1e-3, atol=0)


@torch.no_grad()
def test_a_gpt_twin_predicts_each_character_from_the_characters_before():
    model = make_causal(random_model())
    x_0 = torch.randint(1, 128, (2, 32))
    changed = x_0.clone()
    changed[:, 20] = x_0[:, 20] % 127 + 1
    before, after = (nll_of(next_log_p(model, x), x) for x in (x_0, changed))
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.isclose(before[:, 20:], after[:, 20:]).all(0).any()


@torch.no_grad()
@pytest.mark.parametrize("given", [0, 1, 9])
def test_kept_keys_do_not_change_the_text_of_a_gpt_twin(given, monkeypatch):
    monkeypatch.setattr("model.multiplies_bf16", lambda device: False)
    model, same = random_model(), random_model()
    x = x_plain = torch.randint(1, 128, (3, given))
    kept = continue_causally([model, same], x, 32 - given, 0.8, seeded(5))
    generator, index = seeded(5), torch.zeros(3, dtype=torch.long)
    make_causal(model)
    while x_plain.size(1) < 32:
        shifted = torch.nn.functional.pad(x_plain, (1, 0))          # 0 is [MASK]
        new = draw(model(shifted, index)[:, -1:], 0.8, generator)
        x_plain = torch.cat((x_plain, new), 1)
    assert torch.equal(kept, x_plain)
    assert model.cos.size(0) == 32  # the rotary tables are whole again


@torch.no_grad()
def test_several_gpt_twins_write_from_the_mean_of_their_probabilities(monkeypatch):
    monkeypatch.setattr("model.multiplies_bf16", lambda device: False)
    twins, begin = [random_model(seed=1), random_model(seed=2)], torch.zeros(50, 1).long()
    p = sum(twin(begin, begin[:, 0]).exp() for twin in twins) / 2  # of one position
    expected = draw(p.log(), 1.0, seeded(0))
    written = continue_causally(twins, begin[:, :0], 1, 1.0, seeded(0))
    assert torch.equal(written, expected) and len(written.unique()) > 10


def test_a_gpt_twin_writes_at_least_the_length_asked_for_and_equal_texts_for_equal_seeds():
    text = causal_twin.write([random_model()], 200, 1.0, seed=4, streams=3)
    assert 200 <= len(text) <= 200 + 3 * 16 + 2  # up to half a window more in each stream
    assert text == causal_twin.write([random_model()], 200, 1.0, seed=4, streams=3)
    assert text != causal_twin.write([random_model()], 200, 1.0, seed=5, streams=3)


def test_the_fitted_temperature_is_the_one_at_which_the_text_was_drawn(monkeypatch):
    """The twins write the text at temperature 1.2. At 1, they are too sure of their own text."""
    monkeypatch.setattr("model.multiplies_bf16", lambda device: False)
    twins = [make_causal(random_model(seed=1)), make_causal(random_model(seed=2))]
    x = torch.empty(400, 0, dtype=torch.long)
    x = continue_causally(twins, x, 32, 1.2, seeded(3))
    fitted = causal_twin.fit_temperature(twins, x.flatten())
    assert min(fitted, key=fitted.get) == pytest.approx(1.2, abs=0.05)
    assert fitted[1.0] == pytest.approx(causal_twin.nats(twins, x.flatten()), abs=1e-5)


def test_the_weights_of_a_gpt_twin_are_chosen_on_text_that_it_does_not_learn(tmp_path, monkeypatch):
    """Its characters tell which text a call reads: a is learned, b is held out, c validates."""
    text, val = (torch.tensor(list(part), dtype=torch.uint8) for part in (
        b"b" * 300 + b"a" * 600, b"c" * 90))
    learned, held_out = set(), iter([3.0, 1.0, 2.0])
    next_log_p = causal_twin.next_log_p

    def noted(network, x_0):
        learned.update(x_0.unique().tolist())
        return next_log_p(network, x_0)

    def nats(twins, ids):
        return next(held_out) if set(ids.tolist()) == {ord("b")} else 9.0

    for name, value in {
        "HELD_OUT": 300, "DiffusionConfig": lambda: TINY, "compiled": lambda model, B: model,
        "load_corpus": lambda *_: (text, val, ""), "next_log_p": noted, "nats": nats,
    }.items():
        monkeypatch.setattr(causal_twin, name, value)
    args = Namespace(steps=3, eval_interval=1, batch_size=9, weight_decay=0.1, seed=0,
                     weights=tmp_path / "twin.pt", max_minutes=None)
    causal_twin.train(args, torch.device("cpu"))
    meta = load_weights(args.weights)[1]
    assert learned == {ord("a")}
    assert (meta["step"], meta["held_nll"], meta["val_nll"]) == (2, 1.0, 9.0)


def test_an_existing_gpt_twin_is_the_mark_to_beat_and_another_model_is_refused(tmp_path):
    path = tmp_path / "twin.pt"
    assert causal_twin.incumbent(path) == math.inf
    save_weights(random_model(), {"held_nll": 1.5}, path)
    assert causal_twin.incumbent(path) == 1.5
    save_weights(random_model(), {"val_nelbo": 1.5}, path)
    with pytest.raises(BadInput, match="not a GPT twin"):
        causal_twin.incumbent(path)
