"""What training.py learns: the batch, the loss, the optimizers, the texts, and whole runs."""

import math
import shutil
import sys

import pytest
import torch
from conftest import (
    SETTINGS, TINY_RUN, assert_one_clear_line, not_windows, partly_masked, random_model, script,
    seeded,
)

import model
import training
from model import (
    DEFAULT_WEIGHTS, ROOT, DiffusionConfig, autocast, decode_tokens, load_corpus, load_weights,
    nelbo, noise_index, save_weights,
)


@pytest.fixture
def more(tmp_path):
    """A further text."""
    path = tmp_path / "more.txt"
    path.write_text("a rolling stone gathers no moss\n" * 12, encoding="utf-8")
    return path


def test_a_run_learns_logs_and_leaves_only_its_weights_with_their_bound(whole_run, small_corpus):
    network, meta = load_weights(whole_run)
    assert [path.name for path in whole_run.parent.iterdir()] == ["w.pt"]  # the state has gone
    assert meta["step"] == 18 and meta["characters_seen"] == 18 * 8 * 32 and meta["seed"] == 1337
    assert meta["val_nelbo"] < 4.5  # an untrained model has log(127) = 4.844
    assert [row["step"] for row in meta["log"]] == [6, 12, 18]
    assert meta["log"][-1]["held_nelbo"] < meta["log"][0]["held_nelbo"]
    measured = script("training.py", "--eval-only", "--weights", whole_run, "--data", small_corpus,
                      "--device", "cpu")
    assert f"{whole_run}: validation NELBO {meta['val_nelbo']:.4f}" in measured.stdout


def test_the_held_out_slice_chooses_and_the_validation_split_is_scored_once(
    train, small_corpus, learned, monkeypatch
):
    evaluated, bound = [], training.nelbo
    monkeypatch.setattr(training, "nelbo", lambda model, ids, **how:
                        evaluated.append(decode_tokens(ids)) or bound(model, ids, **how))
    train("--steps", 6)
    corpus = small_corpus.read_text(encoding="utf-8")
    first, val = corpus[: int(0.9 * len(corpus))], corpus[int(0.9 * len(corpus)) :]
    held = first[: len(first) // 10]
    assert {decode_tokens(text) for text in learned} == {first.removeprefix(held)}
    assert evaluated == [first.removeprefix(held), held, val]


@pytest.mark.parametrize("held, kept", [([3.0, 1.0, 2.0], 12), ([1.0, 1.0, 1.0], 6)])
def test_the_least_held_out_bound_is_kept(held, kept, train, tmp_path, monkeypatch):
    bounds = iter([9.0, held[0], 9.0, held[1], 9.0, held[2], 5.0])  # train, held out ..., val
    monkeypatch.setattr(training, "nelbo", lambda *_, **__: (next(bounds), 0.1))
    train("--steps", 18)
    meta = load_weights(tmp_path / "w.pt")[1]
    assert (meta["step"], meta["val_nelbo"]) == (kept, 5.0)


FLOAT32 = """
import pathlib, sys
import model, training
model.multiplies_bf16 = training.multiplies_bf16 = lambda device: False  # rounding would tell
training.main(sys.argv[1:])
for thread in pathlib.Path("/proc/self/task").glob("*/comm"):
    print("thread", thread.read_text().strip())
"""


def test_several_processes_train_as_one(train, small_corpus, tmp_path, monkeypatch):
    """And their threads end: one that is alive while Python shuts down may abort its process."""
    program = tmp_path / "program.py"
    program.write_text(FLOAT32, encoding="utf-8")
    together = script(program, "--data", small_corpus, "--weights", tmp_path / "two.pt",
                      "--steps", 18, *TINY_RUN, processes=2, env={"PYTHONPATH": str(ROOT)})
    assert together.returncode == 0, together.stderr
    for module in model, training:
        monkeypatch.setattr(module, "multiplies_bf16", lambda device: False)
    train("--steps", 18)
    one, two = (load_weights(tmp_path / name)[0].state_dict() for name in ("w.pt", "two.pt"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-3)
    assert together.stdout.count("validation NELBO") == 1  # only the leader speaks
    assert together.stderr.count("training on 2 x cpu") == 1
    assert "gloo" not in together.stdout


def test_init_starts_from_weights_and_masks_with_their_mask_token(
    train, small_corpus, tmp_path, learned
):
    config = DiffusionConfig(32, mask_token_id=127, n_layer=1, n_head=1, n_embd=16, context_len=4)
    init = tmp_path / "init.pt"
    save_weights(random_model(config), {}, init)
    # The sizes come from the file. At this learning rate, the bound has to stay that of the file
    train("--init", init, "--steps", 2, "--learning-rate", 1e-9, settings=SETTINGS)
    _, val, _ = load_corpus(small_corpus, config)
    network, meta = load_weights(tmp_path / "w.pt")
    assert meta["val_nelbo"] == pytest.approx(nelbo(load_weights(init)[0], val)[0], abs=1e-3)
    assert f"--init {init}" in meta["command"] and [row["step"] for row in meta["log"]] == [2]
    assert network.config == config
    x_0, x_t, masked, *_ = training.draw_batch(learned[0], config, 8, seeded())
    assert (x_t[masked] == 127).all() and not masked[x_0 == 127].any()


@pytest.mark.parametrize("meta", [{"log": "many", "val_nelbo": None, "seconds": "x"}, {3: [1]}],
                         ids=["words for numbers", "other names"])
def test_weights_may_have_any_meta(meta, whole_run, train, tmp_path):
    contents, weights = torch.load(whole_run, weights_only=True), tmp_path / "w.pt"
    torch.save({**contents, "meta": meta}, weights)
    measured = train("--eval-only", settings=["--device", "cpu"])
    assert measured.stdout.startswith(f"{weights}: validation NELBO")
    train("--init", weights, "--steps", 6, settings=SETTINGS)
    assert [row["step"] for row in load_weights(weights)[1]["log"]] == [6]
    assert torch.load(tmp_path / "w.1.pt", weights_only=True)["meta"] == meta


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(train, monkeypatch):
    batch_loss = training.batch_loss
    monkeypatch.setattr(training, "batch_loss", lambda *batch: batch_loss(*batch) * math.nan)
    stopped = train("--steps", 50, code=2)
    assert stopped.stderr.splitlines()[-1].startswith("error: the loss at step 0 is nan")


def test_max_minutes_follows_the_clock_of_the_loop(train, tmp_path):
    train("--max-minutes", "0.02")
    end = load_weights(tmp_path / "w.pt")[1]["log"][-1]
    assert 1 <= end["seconds"] < 8 and end["step"] > 0


# ---- the batch


def test_every_time_index_is_trained():
    """The bell alone never draws t = 1. The embedding of its time index would stay untrained."""
    config = DiffusionConfig(n_layer=1, n_head=1, n_embd=8)
    text = torch.ones(1000, dtype=torch.long)
    *_, time_index, _ = training.draw_batch(text, config, 100_000, seeded())
    share = time_index.bincount(minlength=128) / len(time_index)
    flat_share = training.FROM_SCRATCH.flat_share
    assert (share > 0.25 * flat_share / 128).all() and share[60:68].mean() > 1.4 / 128


@pytest.mark.parametrize("progress, largest", [(0.0, 0.4), (0.25, 0.7), (0.5, 1.0), (1.0, 1.0)])
def test_the_range_of_noise_levels_opens_in_the_first_half_of_a_run(progress, largest):
    t = training.draw_levels(50_000, 128, progress, seeded(), "cpu")
    assert t.min() >= 1 and 0.97 * largest * 128 < t.max() <= largest * 128 + 1
    late = training.draw_levels(50_000, 128, progress, seeded(), "cpu", training.AFTER_INIT)
    assert late.max() == 128  # after --init, all levels from the start


def test_noise_levels_follow_the_bell_that_the_curriculum_names():
    """By the share of t below S / 4: the normal distribution function at logit(1/4) / spread."""
    for curriculum in training.FROM_SCRATCH, training.AFTER_INIT:
        t = training.draw_levels(100_000, 128, 1.0, seeded(), "cpu", curriculum)
        z = torch.logit(torch.tensor(0.25)) / curriculum.spread
        bell, flat = torch.special.ndtr(z).item(), curriculum.flat_share
        expected = (1 - flat) * bell + flat * 0.25
        assert (t <= 32).float().mean().item() == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize("share, expected", [(None, 0.2), (1 / 3, 1 / 3), (1.0, 1.0), (0.0, 0.0)])
def test_the_first_text_has_the_share_of_the_sequences_that_was_asked_for(share, expected):
    T, first_len, length = 32, 2_000, 10_000
    curriculum = training.FROM_SCRATCH._replace(first_share=share, first_len=first_len)
    starts = training.draw_starts(length, T, 50_000, seeded(), "cpu", curriculum)
    assert starts.min() >= 0 and starts.max() <= length - T
    assert (starts < first_len).float().mean().item() == pytest.approx(expected, abs=0.01)
    if share is not None:  # no sequence runs from one text into the next
        assert not ((starts > first_len - T) & (starts < first_len)).any()


# ---- optimizers


def test_muon_matches_torch_optim_muon():
    model, twin, start = random_model(), random_model(), random_model()  # equal weights
    ours, _ = training.make_optimizers(model, 0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(twin.blocks.parameters(), lr=0.02, weight_decay=0.1)
    pairs = list(zip(model.blocks.parameters(), twin.blocks.parameters(), strict=True))
    for step in range(3):
        torch.manual_seed(step)
        for a, b in pairs:
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    for (a, b), before in zip(pairs, start.blocks.parameters(), strict=True):
        assert (a - b).norm() < 0.03 * (b - before).norm()  # torch's is bfloat16


def test_the_learning_rate_rises_stays_and_decays():
    factors = [training.learning_rate_factor(p, decay=0.4) for p in (0, 0.005, 0.01, 0.5, 0.8, 1)]
    assert factors == pytest.approx([0, 0.5, 1, 1, 0.5, 0])
    assert training.learning_rate_factor(1, decay=0) == 1


@pytest.mark.parametrize("arguments, learning_rate, decay", [
    ([], 0.005, 1.0),
    (["--steps", "9999"], 0.02, 0.5),
    (["--max-minutes", "20"], 0.02, 0.5),
    (["--learning-rate", "0.01"], 0.01, 1.0),
    (["--max-minutes", "20", "--decay", "1"], 0.02, 1.0),
])
def test_default_rates_depend_on_the_length_of_the_run(arguments, learning_rate, decay):
    parser = training.command_line()
    args = training.settle(parser, arguments, {}, None)
    assert (args.learning_rate, args.decay) == (learning_rate, decay)
    optimizers = training.make_optimizers(random_model(), args.learning_rate)
    peaks = [optimizer.param_groups[0]["peak"] for optimizer in optimizers]
    assert peaks == pytest.approx([learning_rate, training.ADAMW_SHARE * learning_rate])


# ---- what is refused


@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere.txt"], ["nowhere.txt"]),
    (["--data", ""], ["directory"]),
    (["--teachers", ""], ["weights file"]),
    (["--teachers", DEFAULT_WEIGHTS, "--sequence-len", "32", "--n-layer", "1"],
     ["--teachers", "diffusion_model.pt", "sequence_len 256", "not 32"]),
    (["--batch-size", "0"], ["'0'", "from 1"]),
    (["--n-embd", "50", "--n-head", "4"], ["50", "4"]),
    (["--n-layer", "0"], ["n_layer is 1 to 1000"]),
    (["--learning-rate", "0"], ["'0'"]),
    (["--device", "cuda:9"], ["cuda:9"]),
    (["--resume"], ["state.pt"]),
    (["--eval-only"], ["w.pt"]),
    (["--eval-only", "--init", "x.pt"], ["--eval-only", "--init"]),
    (["--eval-only", "--steps", "9"], ["--eval-only", "--steps"]),
    (["--eval-only", "--n-layer", "6"], ["--eval-only", "--n-layer"]),
    (["--eval-only", "--data", "a.txt", "b.txt"], ["--eval-only", "--data", "2"]),
    (["--steps", "9", "--max-minutes", "9"], ["--steps", "--max-minutes"]),
    (["--first-share", "0.3"], ["--first-share 0.3", "one text"]),
    (["--init", "nowhere.pt"], ["nowhere.pt"]),
    (["--init", ""], ["weights file"]),
    (["--init", DEFAULT_WEIGHTS, "--n-layer", "2"], ["--n-layer 2", "diffusion_model.pt", "has 6"]),
    (["--vocab-size", "999"], ["999"]),
    (["--context-len", "300"], ["300", "256"]),
    (["--weights", "w"], ["w", ".pt"]),
    (["--weights", "w.state.pt"], ["w.state.pt", "not X.state.pt"]),
    pytest.param(["--weights", "a" * 245 + ".pt"], ["too long"], marks=not_windows),
])
def test_bad_input_to_training_is_refused_in_one_line_and_writes_nothing(
    arguments, words, tmp_path, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert_one_clear_line(command(training.main, "--weights", "w.pt", *arguments), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, words", [
    ("", ["0 characters"]),
    ("caf\u00e9 " * 2000, ["\u00e9", "position 3", "--vocab-size 256"]),
    ("a\0b" * 2000, ["position 1", "MASK"]),
])
def test_a_bad_corpus_is_refused_in_one_line(text, words, more, train):
    more.write_text(text, encoding="utf-8")
    assert_one_clear_line(train("--data", more, code=2), *words)


CORPUS = "".join(f"line {n} of a text without repetitions\n" for n in range(90))


@pytest.mark.parametrize("further, refused", [
    (CORPUS, True), ("a preface\n" + CORPUS + "an afterword\n", True), (CORPUS[-500:-1], True),
    (CORPUS.replace("\n", "\n\n"), True), (CORPUS[:300], True), (CORPUS[600:1800], False),
], ids=["a copy", "inside another", "most of the validation split", "other line ends",
        "the held-out slice", "learned anyway"])
def test_a_further_text_that_holds_what_must_not_be_learned_is_refused(
    further, refused, more, train, tmp_path
):
    (tmp_path / "first.txt").write_text(CORPUS, encoding="utf-8")
    more.write_text(more.read_text("utf-8") + further, encoding="utf-8")
    process = train("--data", tmp_path / "first.txt", more, "--steps", 1, code=2 * refused)
    if refused:
        assert_one_clear_line(process, "more.txt", "must not be learned", "first.txt")


def test_a_further_text_that_is_given_twice_is_refused(train, small_corpus, more):
    assert_one_clear_line(train("--data", small_corpus, more, more, code=2), "more.txt", "twice")


def test_further_texts_are_used_for_training_only_and_kept_as_bytes(
    train, small_corpus, more, tmp_path, learned
):
    train("--data", small_corpus, more, "--first-share", 0.5, "--steps", 2)
    assert decode_tokens(learned[0]).endswith(more.read_text("utf-8"))
    assert learned[0].dtype == torch.uint8  # until a batch is drawn
    network, meta = load_weights(tmp_path / "w.pt")
    _, val, _ = load_corpus(small_corpus, network.config)
    assert meta["val_nelbo"] == pytest.approx(nelbo(network, val)[0], abs=1e-6)


# ---- teachers


@torch.no_grad()
def test_distilled_nll_is_the_cross_entropy_to_the_teacher():
    """By enumeration over all characters at all masked positions."""
    teacher, student = random_model(seed=1), random_model(seed=9)
    x_t = partly_masked(1, 32, 0.5, seed=0)
    masked, time_index = x_t == 0, noise_index(x_t == 0, 128)
    log_q, log_p = teacher(x_t, time_index), student(x_t, time_index)
    total = 0.0
    for i in masked[0].nonzero().flatten().tolist():
        for v in range(1, 128):
            total -= log_q[0, i, v].exp().item() * log_p[0, i, v].item()
    nll = training.distilled_nll(log_p, log_q, masked)
    assert nll.item() == pytest.approx(total / masked.sum().item(), rel=1e-4)


def some_batch(config):
    text = partly_masked(1, 500, 0, seed=1)[0].byte()
    return training.draw_batch(text, config, 4, seeded())


def test_the_loss_with_a_teacher_is_the_mean_of_text_and_teacher_losses():
    model, teacher = random_model(), random_model(seed=1)
    x_0, x_t, masked, time_index, weight = batch = some_batch(model.config)
    alone, both = training.batch_loss(model, batch), training.batch_loss(model, batch, teacher)
    with autocast(torch.device("cpu")), torch.no_grad():
        soft = training.distilled_nll(model(x_t, time_index), teacher(x_t, time_index), masked)
    assert both.item() == pytest.approx((alone.item() + (soft * weight).sum().item()) / 2, rel=1e-3)
    both.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_student_learns_from_two_teachers_in_turn(whole_run, train, tmp_path, monkeypatch):
    asked, batch_loss = [], training.batch_loss
    monkeypatch.setattr(training, "batch_loss", lambda network, batch, teacher:
                        asked.append(teacher) or batch_loss(network, batch, teacher))
    process = train("--teachers", whole_run, whole_run, "--steps", 12)
    assert "lr 0" not in process.stderr  # no progress bar where there is no terminal
    assert len(asked) == 12 and len(set(asked)) == 2 and asked[2:] == asked[:-2]
    first, last = load_weights(tmp_path / "w.pt")[1]["log"]
    assert last["held_nelbo"] < first["held_nelbo"]


# ---- torch.compile, which users get by default


def gradients(network, model, batch, teacher):
    model.zero_grad()
    training.batch_loss(network, batch, teacher).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("taught", [False, True])
def test_the_compiled_loss_has_the_gradients_of_the_eager_loss(taught, capsys):
    model, batch = random_model(), some_batch(random_model().config)
    teacher = random_model(seed=1) if taught else None
    eager = gradients(model, model, batch, teacher)
    network = training.compiled(model, 4)
    teacher = training.compiled(teacher, 4, learns=False) if taught else None
    with torch._dynamo.config.patch(error_on_recompile=True):  # compiled as they are used
        compiled = gradients(network, model, batch, teacher)
    assert "compile failed" not in capsys.readouterr().err
    for name in eager:  # bfloat16 rounds elsewhere once operations are fused
        assert (compiled[name] - eager[name]).norm() < 0.03 * eager[name].norm(), name


@pytest.mark.parametrize("learns", [True, False])
def test_a_compiler_that_fails_leaves_the_eager_model_and_one_line(learns, capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("C++ compile error\nwith many lines")

    monkeypatch.setattr(torch, "compile", lambda model, options: broken)
    model = random_model()
    assert training.compiled(model, 4, learns) is model
    error = capsys.readouterr().err
    assert error.startswith("torch.compile failed") and len(error.splitlines()) == 1
    assert all(parameter.grad is None for parameter in model.parameters())
