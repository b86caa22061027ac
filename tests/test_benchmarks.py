"""The instruments: the n-gram judge, what is counted in its texts, and the count of operations."""

import math
from collections import Counter

from model import DiffusionConfig, DiffusionTransformer

import benchmark_sampling as judging
import benchmark_training as timing
import numpy as np
import pytest
import torch
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
