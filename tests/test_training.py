"""What training.py learns: the batch, the loss, the optimizers, the texts, and whole runs."""

import math

import pytest
import torch
from conftest import (
    SETTINGS, TINY_RUN, assert_one_clear_line, partly_masked, random_model, script,
)

import model
import training
from model import (
    DEFAULT_WEIGHTS, ROOT, DiffusionConfig, autocast, decode_tokens, load_corpus, load_weights,
    nelbo, noise_index, save_weights,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


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
    small_corpus, tmp_path, command, monkeypatch, learned
):
    evaluated, bound = [], training.nelbo
    monkeypatch.setattr(training, "nelbo", lambda model, ids, **how:
                        evaluated.append(decode_tokens(ids)) or bound(model, ids, **how))
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--steps", 6, *TINY_RUN)
    assert process.returncode == 0, process.stderr
    corpus = small_corpus.read_text(encoding="utf-8")
    train, val = corpus[: int(0.9 * len(corpus))], corpus[int(0.9 * len(corpus)) :]
    held = train[: len(train) // 10]
    assert {decode_tokens(text) for text in learned} == {train.removeprefix(held)}
    assert evaluated == [train.removeprefix(held), held, val]


@pytest.mark.parametrize("held, kept", [([3.0, 1.0, 2.0], 12), ([1.0, 1.0, 1.0], 6)])
def test_a_run_keeps_the_weights_of_the_least_held_out_bound(
    held, kept, small_corpus, tmp_path, command, monkeypatch
):
    bounds, saved = iter([x for y in held for x in (9.0, y)] + [5.0]), []
    monkeypatch.setattr(training, "nelbo", lambda *_, **__: (next(bounds), 0.1))
    monkeypatch.setattr(training, "save_weights", lambda model, meta, path: saved.append(meta))
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--steps", 18, *TINY_RUN)
    assert process.returncode == 0, process.stderr
    assert (saved[0]["step"], saved[0]["val_nelbo"]) == (kept, 5.0)


FLOAT32 = """
import pathlib, sys
import model, training
model.multiplies_bf16 = training.multiplies_bf16 = lambda device: False  # rounding would tell
training.main(sys.argv[1:])
for thread in pathlib.Path("/proc/self/task").glob("*/comm"):
    print("thread", thread.read_text().strip())
"""


def test_training_on_several_processes_is_training_on_one_and_its_threads_end(
    small_corpus, tmp_path, command, monkeypatch
):
    """A thread that lives on while Python shuts down aborts its process now and then."""
    program = tmp_path / "program.py"
    program.write_text(FLOAT32, encoding="utf-8")
    arguments = ["--data", small_corpus, "--steps", 18, *TINY_RUN]
    together = script(program, *arguments, "--weights", tmp_path / "two.pt", processes=2,
                      env={"PYTHONPATH": str(ROOT)})
    assert together.returncode == 0, together.stderr
    for module in model, training:
        monkeypatch.setattr(module, "multiplies_bf16", lambda device: False)
    alone = command(training.main, *arguments, "--weights", tmp_path / "one.pt")
    assert alone.returncode == 0, alone.stderr
    one, two = (load_weights(tmp_path / name)[0].state_dict() for name in ("one.pt", "two.pt"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-3)
    assert together.stdout.count("validation NELBO") == 1  # only the leader speaks
    assert together.stderr.count("training on 2 x cpu") == 1
    assert "gloo" not in together.stdout


def test_init_starts_from_weights(whole_run, small_corpus, tmp_path, command):
    files = ["--data", small_corpus, "--weights", tmp_path / "w.pt"]
    # The sizes come from the file. At this learning rate, the bound has to stay that of the file
    further = command(training.main, *files, "--init", whole_run, "--steps", 2,
                      "--learning-rate", 1e-9, *SETTINGS)
    assert further.returncode == 0, further.stderr
    (_, before), (_, after) = load_weights(whole_run), load_weights(tmp_path / "w.pt")
    assert after["val_nelbo"] == pytest.approx(before["val_nelbo"], abs=1e-3)
    assert f"--init {whole_run}" in after["command"]
    assert [row["step"] for row in after["log"]] == [2]


def test_init_masks_with_the_mask_token_of_its_weights(small_corpus, tmp_path, command, learned):
    config = DiffusionConfig(32, mask_token_id=127, n_layer=1, n_head=1, n_embd=16, context_len=4)
    save_weights(random_model(config), {}, tmp_path / "init.pt")
    process = command(training.main, "--data", small_corpus, "--init", tmp_path / "init.pt",
                      "--weights", tmp_path / "w.pt", "--steps", 2, *SETTINGS)
    assert process.returncode == 0, process.stderr
    assert load_weights(tmp_path / "w.pt")[0].config.mask_token_id == 127
    x_0, x_t, masked, *_ = training.draw_batch(learned[0], config, 8, seeded(0))
    assert (x_t[masked] == 127).all() and not masked[x_0 == 127].any()


@pytest.mark.parametrize("meta", [{"log": "many", "val_nelbo": None, "seconds": "x"}, {3: [1]}],
                         ids=["words for numbers", "other names"])
def test_weights_with_foreign_meta_can_be_measured_trained_on_and_moved_aside(
    meta, whole_run, small_corpus, tmp_path, command
):
    contents = torch.load(whole_run, weights_only=True)
    torch.save({**contents, "meta": meta}, tmp_path / "w.pt")
    files = ["--data", small_corpus, "--weights", tmp_path / "w.pt"]
    measured = command(training.main, *files, "--eval-only", "--device", "cpu")
    assert measured.stdout.startswith(f"{tmp_path}/w.pt: validation NELBO"), measured.stderr
    further = command(training.main, *files, "--init", tmp_path / "w.pt", "--steps", 6, *SETTINGS)
    assert further.returncode == 0, further.stderr
    assert [row["step"] for row in load_weights(tmp_path / "w.pt")[1]["log"]] == [6]
    assert torch.load(tmp_path / "w.1.pt", weights_only=True)["meta"] == meta


def test_init_refuses_flags_for_another_shape(whole_run, small_corpus, tmp_path, command):
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--init", whole_run, "--n-layer", 2)
    assert_one_clear_line(process, "--n-layer 2", str(whole_run), "has 1")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    small_corpus, tmp_path, command, monkeypatch
):
    batch_loss = training.batch_loss
    monkeypatch.setattr(training, "batch_loss", lambda *batch: batch_loss(*batch) * math.nan)
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--steps", 50, *TINY_RUN)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("error: the loss at step 0 is nan")


def test_max_minutes_follows_the_clock_of_the_loop(small_corpus, tmp_path, command):
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--max-minutes", "0.02", *TINY_RUN)
    assert process.returncode == 0, process.stderr
    meta = load_weights(tmp_path / "w.pt")[1]
    assert 1 <= meta["log"][-1]["seconds"] < 8 and meta["log"][-1]["step"] > 0


# ---- the batch


def test_every_time_index_is_trained():
    """The bell alone never draws t = 1. The embedding of its time index would stay untrained."""
    config = DiffusionConfig(n_layer=1, n_head=1, n_embd=8)
    text = torch.ones(1000, dtype=torch.long)
    *_, time_index, _ = training.draw_batch(text, config, 100_000, seeded(0))
    share = time_index.bincount(minlength=128) / len(time_index)
    flat_share = training.FROM_SCRATCH.flat_share
    assert (share > 0.25 * flat_share / 128).all() and share[60:68].mean() > 1.4 / 128


@pytest.mark.parametrize("progress, largest", [(0.0, 0.4), (0.25, 0.7), (0.5, 1.0), (1.0, 1.0)])
def test_the_range_of_noise_levels_opens_in_the_first_half_of_a_run(progress, largest):
    t = training.draw_levels(50_000, 128, progress, seeded(0), "cpu")
    assert t.min() >= 1 and 0.97 * largest * 128 < t.max() <= largest * 128 + 1
    late = training.draw_levels(50_000, 128, progress, seeded(0), "cpu", training.AFTER_INIT)
    assert late.max() == 128  # after --init, all levels from the start


def test_noise_levels_follow_the_bell_that_the_curriculum_names():
    """By the share of t below S / 4: the normal distribution function at logit(1/4) / spread."""
    for curriculum in training.FROM_SCRATCH, training.AFTER_INIT:
        t = training.draw_levels(100_000, 128, 1.0, seeded(0), "cpu", curriculum)
        z = torch.logit(torch.tensor(0.25)) / curriculum.spread
        bell, flat = torch.special.ndtr(z).item(), curriculum.flat_share
        expected = (1 - flat) * bell + flat * 0.25
        assert (t <= 32).float().mean().item() == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize("share, expected", [(None, 0.2), (1 / 3, 1 / 3), (1.0, 1.0), (0.0, 0.0)])
def test_the_first_text_has_the_share_of_the_sequences_that_was_asked_for(share, expected):
    T, first_len, length = 32, 2_000, 10_000
    curriculum = training.FROM_SCRATCH._replace(first_share=share, first_len=first_len)
    starts = training.draw_starts(length, T, 50_000, seeded(0), "cpu", curriculum)
    assert starts.min() >= 0 and starts.max() <= length - T
    assert (starts < first_len).float().mean().item() == pytest.approx(expected, abs=0.01)
    if share is not None:  # no sequence runs from one text into the next
        assert not ((starts > first_len - T) & (starts < first_len)).any()


# ---- optimizers


def test_muon_matches_torch_optim_muon():
    models = [random_model(), random_model()]
    ours, _ = training.make_optimizers(models[0], 0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(models[1].blocks.parameters(), lr=0.02, weight_decay=0.1)
    start = {name: p.clone() for name, p in models[0].blocks.named_parameters()}
    for step in range(3):
        torch.manual_seed(step)
        for a, b in zip(*(m.blocks.parameters() for m in models), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    theirs = list(models[1].blocks.parameters())
    for (name, a), b in zip(models[0].blocks.named_parameters(), theirs, strict=True):
        moved_a, moved_b = a - start[name], b - start[name]
        assert (moved_a - moved_b).norm() < 0.03 * moved_b.norm(), name  # torch's is bfloat16


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
def test_default_learning_rate_and_decay_depend_on_the_length_of_the_run(
    arguments, learning_rate, decay
):
    args = training.settle(*training.parse_arguments(arguments), {}, "")
    assert (args.learning_rate, args.decay) == (learning_rate, decay)
    optimizers = training.make_optimizers(random_model(), args.learning_rate)
    peaks = [optimizer.param_groups[0]["peak"] for optimizer in optimizers]
    assert peaks == pytest.approx([learning_rate, training.ADAMW_SHARE * learning_rate])


# ---- what is refused


@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere.txt"], ["nowhere.txt"]),
    (["--data", "."], ["."]),
    (["--data", ""], ["directory"]),
    (["--teachers", ""], ["weights file"]),
    (["--batch-size", "0"], ["'0'", "from 1"]),
    (["--n-embd", "50", "--n-head", "4"], ["50", "4"]),
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
    (["--vocab-size", "999"], ["999"]),
    (["--context-len", "300"], ["300", "256"]),
    (["--weights", "w"], ["w", ".pt"]),
    (["--weights", "w.safetensors"], ["w.safetensors", ".pt"]),
    (["--weights", "w.state.pt"], ["w.state.pt", "not X.state.pt"]),
])
def test_bad_input_to_training_is_refused_in_one_line(
    arguments, words, tmp_path, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert_one_clear_line(command(training.main, "--weights", "w.pt", *arguments), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, words", [
    ("", ["0 characters"]),
    ("short", ["5 characters"]),
    ("caf\u00e9 " * 2000, ["\u00e9", "position 3", "--vocab-size 256"]),
    ("a\0b" * 2000, ["position 1", "MASK"]),
])
def test_a_bad_corpus_is_refused_in_one_line(text, words, tmp_path, command):
    data = tmp_path / "corpus.txt"
    data.write_text(text, encoding="utf-8")
    process = command(training.main, "--data", data, "--weights", tmp_path / "w.pt")
    assert_one_clear_line(process, *words)


def test_a_text_is_kept_as_bytes_until_a_batch_is_drawn(small_corpus, tmp_path, command, learned):
    (tmp_path / "more.txt").write_text("a rolling stone gathers no moss\n" * 12, encoding="utf-8")
    process = command(training.main, "--data", small_corpus, tmp_path / "more.txt", "--weights",
                      tmp_path / "w.pt", "--steps", 1, *TINY_RUN)
    assert process.returncode == 0, process.stderr
    assert learned[0].dtype == torch.uint8


def test_a_batch_size_that_is_no_multiple_of_the_processes_is_refused(
    small_corpus, tmp_path, command, monkeypatch
):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost",
                        "MASTER_PORT": 29500, "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, str(value))
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      *TINY_RUN, "--batch-size", 7)
    assert_one_clear_line(process, "7", "2 processes")


@pytest.mark.parametrize("environment", [
    {"RANK": "3"}, {"RANK": "0", "WORLD_SIZE": "4"}, {"RANK": "node-1", "WORLD_SIZE": "2"},
])
def test_the_rank_variables_of_a_platform_start_no_further_processes(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = training.settle(*training.parse_arguments(["--device", "cpu"]), {}, "")
    assert training.start_processes(args) == (0, 1, torch.device("cpu"))


CORPUS = "".join(f"line {n} of a text without repetitions\n" for n in range(90))


@pytest.mark.parametrize("further, refused", [
    (CORPUS, True), ("a preface\n" + CORPUS + "an afterword\n", True), (CORPUS[-500:-1], True),
    (CORPUS.replace("\n", "\n\n"), True), (CORPUS[:300], True), (CORPUS[600:1800], False),
], ids=["a copy", "inside another", "most of the validation split", "other line ends",
        "the held-out slice", "learned anyway"])
def test_a_further_text_that_holds_what_must_not_be_learned_is_refused(
    further, refused, tmp_path, command
):
    (tmp_path / "first.txt").write_text(CORPUS, encoding="utf-8")
    filler = "a rolling stone gathers no moss\n" * 12
    (tmp_path / "further.txt").write_text(filler + further, encoding="utf-8")
    process = command(training.main, "--data", tmp_path / "first.txt", tmp_path / "further.txt",
                      "--weights", tmp_path / "w.pt", "--steps", 1, *TINY_RUN)
    if refused:
        assert_one_clear_line(process, "further.txt", "must not be learned", "first.txt")
    else:
        assert process.returncode == 0, process.stderr


def test_a_further_text_that_is_given_twice_is_refused(small_corpus, tmp_path, command):
    further = tmp_path / "more.txt"
    further.write_text("a rolling stone gathers no moss\n" * 12, encoding="utf-8")
    process = command(training.main, "--data", small_corpus, further, further, "--weights",
                      tmp_path / "w.pt", "--steps", 1, *TINY_RUN)
    assert_one_clear_line(process, "more.txt", "twice")


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


def test_the_loss_with_a_teacher_is_the_mean_of_text_and_teacher_losses():
    model, teacher, config = random_model(), random_model(seed=1), random_model().config
    text = torch.randint(1, 128, (500,), dtype=torch.uint8)
    batch = training.draw_batch(text, config, 4, torch.Generator().manual_seed(0))
    x_0, x_t, masked, time_index, weight = batch
    alone, both = training.batch_loss(model, batch), training.batch_loss(model, batch, teacher)
    with autocast(torch.device("cpu")), torch.no_grad():
        soft = training.distilled_nll(model(x_t, time_index), teacher(x_t, time_index), masked)
    assert both.item() == pytest.approx((alone.item() + (soft * weight).sum().item()) / 2, rel=1e-3)
    both.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_student_learns_from_two_teachers_in_turn_and_refuses_one_of_other_sizes(
    whole_run, small_corpus, tmp_path, command, monkeypatch
):
    asked, batch_loss = [], training.batch_loss
    monkeypatch.setattr(training, "batch_loss", lambda network, batch, teacher:
                        asked.append(teacher) or batch_loss(network, batch, teacher))
    arguments = ["--data", small_corpus, "--weights", tmp_path / "w.pt", "--teachers", whole_run,
                 whole_run, "--steps", 12, *TINY_RUN]
    process = command(training.main, *arguments)
    assert process.returncode == 0, process.stderr
    assert "lr 0" not in process.stderr  # no progress bar where there is no terminal
    assert len(asked) == 12 and len(set(asked)) == 2 and asked[2:] == asked[:-2]
    first, last = load_weights(tmp_path / "w.pt")[1]["log"]
    assert last["held_nelbo"] < first["held_nelbo"]
    process = command(training.main, *arguments[:2], "--weights", tmp_path / "v.pt",
                      "--teachers", DEFAULT_WEIGHTS, *TINY_RUN)
    assert_one_clear_line(process, "--teachers", "diffusion_model.pt", "sequence_len 256", "not 32")


def test_further_texts_are_used_for_training_only(small_corpus, tmp_path, command, learned):
    more = "a rolling stone gathers no moss\n" * 12
    (tmp_path / "more.txt").write_text(more, encoding="utf-8")
    process = command(training.main, "--weights", tmp_path / "w.pt", "--data", small_corpus,
                      tmp_path / "more.txt", "--first-share", 0.5, "--steps", 2, *TINY_RUN)
    assert process.returncode == 0, process.stderr
    assert decode_tokens(learned[0]).endswith(more)
    network, meta = load_weights(tmp_path / "w.pt")
    _, val, _ = load_corpus(small_corpus, network.config)
    assert meta["val_nelbo"] == pytest.approx(nelbo(network, val)[0], abs=1e-6)
