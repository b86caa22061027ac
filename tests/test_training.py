"""training.py from the outside, in processes of its own with a tiny model, and its Muon."""

import csv
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import training
from model import (
    DEFAULT_WEIGHTS,
    BadInput,
    DiffusionConfig,
    autocast,
    decode_tokens,
    load_corpus,
    load_weights,
    log_probs,
    multiplies_bf16,
    nelbo,
    noise_index,
)

import pytest
import torch
from conftest import (
    Training,
    assert_one_clear_line,
    launch,
    no_space,
    partly_masked,
    random_model,
    script,
)

not_windows = pytest.mark.skipif(sys.platform == "win32", reason="uses /dev")
SIZES = ["--n-layer", 1, "--n-embd", 16, "--n-head", 1, "--sequence-len", 32, "--context-len", 4]
SETTINGS = ["--batch-size", 8, "--eval-interval", 6, "--no-compile", "--device", "cpu"]
TINY_RUN = [*SIZES, *SETTINGS]


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 60, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole_run(small_corpus, tmp_path_factory):
    weights = tmp_path_factory.mktemp("run") / "w.pt"
    files = ["--data", small_corpus, "--weights", weights]
    training_run = Training(*files, "--steps", 18, *TINY_RUN).wait()
    assert training_run.process.exitcode == 0, training_run.output
    return weights


def state_of(weights):
    return torch.load(weights.with_suffix(".state.pt"), weights_only=True)


def assert_same_run(one, other):
    a, b = state_of(one), state_of(other)
    assert a["run"]["step"] == b["run"]["step"]
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    assert torch.equal(a["generator"], b["generator"])


def test_a_run_learns_logs_and_leaves_measured_weights(whole_run, small_corpus):
    model, meta = load_weights(whole_run)
    assert meta["step"] == 18 and meta["characters_seen"] == 18 * 8 * 32 and meta["seed"] == 1337
    assert meta["val_nelbo"] < 4.5  # log(127) = 4.844 is where an untrained model stands
    with open(whole_run.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [6, 12, 18]
    assert float(rows[-1]["val_nelbo"]) < float(rows[0]["val_nelbo"])
    measured = script("training.py", "--eval-only", "--weights", whole_run, "--data", small_corpus,
                      "--device", "cpu")
    assert f"{meta['val_nelbo']:.4f}" in measured.stdout


def test_training_on_several_processes_is_training_on_one(whole_run, small_corpus, tmp_path):
    weights = tmp_path / "two.pt"
    process = script("training.py", "--data", small_corpus, "--weights", weights, "--steps", 18,
                     *TINY_RUN, processes=2)
    assert process.returncode == 0, process.stderr
    one, two = state_of(whole_run)["model"], state_of(weights)["model"]
    for name in one:
        if multiplies_bf16(torch.device("cpu")):  # rounding moves the zero-initialised ones by 5%
            assert (two[name] - one[name]).norm() < 0.15 * one[name].norm(), name
        else:
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-3)
    assert process.stdout.count("validation NELBO") == 1  # only the leader speaks
    assert process.stderr.count("training on 2 x cpu") == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")
def test_a_process_that_dies_ends_the_run_with_a_clear_line(small_corpus, tmp_path):
    launcher = launch("training.py", "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--steps", 1_000_000, *TINY_RUN, processes=2)
    while not (tmp_path / "w.state.pt").exists():
        assert launcher.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text("utf-8").split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert "error: another process of this run died" in err
    state_of(tmp_path / "w.pt")  # whole


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_and_resumed_run_ends_with_the_same_weights(
    signum, whole_run, small_corpus, tmp_path
):
    files = ["--data", small_corpus, "--weights", tmp_path / "w.pt"]
    stopped = Training(*files, "--steps", 18, *TINY_RUN)
    while not (tmp_path / "w.state.pt").exists():  # the first evaluation, after step 6
        assert stopped.process.is_alive()
        time.sleep(0.002)
    os.kill(stopped.process.pid, signum)
    stopped.wait()
    assert stopped.process.exitcode == 0 and "--resume" in stopped.output
    run = state_of(tmp_path / "w.pt")["run"]
    assert 6 <= run["step"] < 18 and len(run["log"]) <= run["step"] // 6  # saved unevaluated
    resumed = Training(*files, "--resume").wait()
    assert resumed.process.exitcode == 0, resumed.output
    assert_same_run(tmp_path / "w.pt", whole_run)


def test_a_killed_run_resumes_from_its_last_whole_checkpoint(whole_run, small_corpus, tmp_path):
    """SIGKILL at ten random moments of a run that saves after every step."""
    files, state = ["--data", small_corpus, "--weights", tmp_path / "w.pt"], tmp_path / "w.state.pt"
    moments = random.Random(0)

    def start(eval_interval):
        settings = ["--resume"] if state.exists() else ["--steps", 18, *TINY_RUN]
        return Training(*files, *settings, "--eval-interval", eval_interval)

    for _ in range(10):
        victim = start(eval_interval=1)
        time.sleep(moments.uniform(0.1, 1.0))
        victim.process.kill()
        victim.wait()
        if state.exists():
            state_of(tmp_path / "w.pt")  # always whole
    resumed = start(eval_interval=6).wait()
    assert resumed.process.exitcode == 0, resumed.output
    assert_same_run(tmp_path / "w.pt", whole_run)


def test_only_better_weights_replace_existing_ones(whole_run, small_corpus, tmp_path):
    weights = tmp_path / "w.pt"
    weights.write_bytes(whole_run.read_bytes())
    worse = Training("--data", small_corpus, "--weights", weights, "--steps", 2, *TINY_RUN).wait()
    assert worse.process.exitcode == 0 and "was better and stays" in worse.output
    assert weights.read_bytes() == whole_run.read_bytes()


def test_init_continues_from_weights_and_their_log(whole_run, small_corpus, tmp_path):
    files = ["--data", small_corpus, "--weights", tmp_path / "w.pt"]
    # The sizes come from the file. It learns next to nothing, and has forgotten nothing
    rates = ["--learning-rate", 1e-9, "--muon-learning-rate", 1e-9]
    further = Training(*files, "--init", whole_run, "--steps", 2, *rates, *SETTINGS).wait()
    assert further.process.exitcode == 0, further.output
    (_, before), (_, after) = load_weights(whole_run), load_weights(tmp_path / "w.pt")
    assert after["started_from"] == before and after["characters_seen"] == (18 + 2) * 8 * 32
    assert after["val_nelbo"] == pytest.approx(before["val_nelbo"], abs=1e-3)
    with open((tmp_path / "w.csv"), newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [6, 12, 18, 2]
    again = Training(*files, "--resume").wait()
    assert again.process.exitcode == 0, again.output
    assert state_of(tmp_path / "w.pt")["meta"]["started_from"] == before


def test_init_refuses_flags_for_another_shape(whole_run, small_corpus, tmp_path, command):
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--init", whole_run, "--n-layer", 2)
    assert_one_clear_line(process, "--n-layer 2", "--init", "has 1")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(small_corpus, tmp_path):
    files = ["--data", small_corpus, "--weights", tmp_path / "w.pt"]
    wild = Training(*files, "--steps", 50, *TINY_RUN, "--learning-rate", 1e37).wait()
    assert wild.process.exitcode == 2
    last_line = wild.output.splitlines()[-1]
    assert last_line.startswith("error: the loss at step") and "Traceback" not in wild.output


def test_max_minutes_follows_the_clock(small_corpus, tmp_path):
    files = ["--data", small_corpus, "--weights", tmp_path / "w.pt"]
    timed = Training(*files, "--max-minutes", "0.05", *TINY_RUN).wait()
    assert timed.process.exitcode == 0, timed.output
    state = state_of(tmp_path / "w.pt")
    assert 3 <= state["run"]["seconds"] < 15
    assert state["optimizers"][0]["param_groups"][0]["lr"] < 0.002  # it had fallen nearly to zero


def test_every_time_index_is_trained():
    """The bell alone never draws t = 1 or 2, and left the first time indices at random."""
    config = DiffusionConfig(n_layer=1, n_head=1, n_embd=8)
    train, generator = torch.ones(1000, dtype=torch.long), torch.Generator().manual_seed(0)
    *_, t, _ = training.draw_batch(train, config, 100_000, generator)
    share = t.bincount(minlength=128) / len(t)
    assert (share > 0.25 * training.FLAT_RATE / 128).all() and share[60:68].mean() > 1.4 / 128


def test_muon_matches_torch_optim_muon():
    models = [random_model(), random_model()]
    ours = training.Muon(models[0].blocks.parameters(), lr=0.02, weight_decay=0.1)
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
        assert (moved_a - moved_b).norm() < 0.03 * moved_b.norm(), name  # theirs rounds to bfloat16


def test_learning_rate_rises_stays_and_falls():
    factors = [training.learning_rate_factor(p, decay=0.4) for p in (0, 0.005, 0.01, 0.5, 0.8, 1)]
    assert factors == pytest.approx([0, 0.5, 1, 1, 0.5, 0])
    assert training.learning_rate_factor(1, decay=0) == 1


@pytest.mark.parametrize("arguments, muon, adamw, decay", [
    ([], 0.005, 7.5e-4, 1.0),
    (["--steps", "9999"], 0.02, 3e-3, 0.5),
    (["--max-minutes", "20"], 0.02, 3e-3, 0.5),
    (["--muon-learning-rate", "0.02"], 0.02, 7.5e-4, 1.0),
    (["--max-minutes", "20", "--decay", "1"], 0.02, 3e-3, 1.0),
])
def test_default_rates_depend_on_the_length_of_the_run(arguments, muon, adamw, decay):
    args = training.parse_arguments(arguments)
    assert (args.muon_learning_rate, args.learning_rate, args.decay) == (muon, adamw, decay)


@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere.txt"], ["nowhere.txt"]),
    (["--batch-size", "0"], ["'0'", "at least 1"]),
    (["--steps", "-1"], ["-1"]),
    (["--n-embd", "50", "--n-head", "4"], ["50", "4"]),
    (["--learning-rate", "0"], ["'0'", "above 0"]),
    (["--device", "cuda:9"], ["cuda:9"]),
    (["--resume"], ["state.pt"]),
    (["--eval-only"], ["w.pt"]),
    (["--init", "nowhere.pt"], ["nowhere.pt"]),
    (["--vocab-size", "999"], ["999"]),
    (["--context-len", "300"], ["300", "256"]),
    (["--seed", "99999999999999999999"], ["99999999999999999999", "at most"]),
    pytest.param(["--data", "/dev/zero"], ["/dev/zero", "device"], marks=not_windows),
    (["--data", "."], ["."]),
])
def test_bad_input_to_training_is_one_line(arguments, words, tmp_path, command):
    process = command(training.main, "--weights", tmp_path / "w.pt", *arguments)
    assert_one_clear_line(process, *words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text, words", [
    ("", ["empty"]),
    ("short", ["5 characters"]),
    ("caf\u00e9 " * 2000, ["\u00e9", "position 3", "--vocab-size 256"]),
    ("a\0b" * 2000, ["position 1", "MASK"]),
])
def test_bad_corpus_is_one_line(text, words, tmp_path, command):
    data = tmp_path / "corpus.txt"
    data.write_text(text, encoding="utf-8")
    process = command(training.main, "--data", data, "--weights", tmp_path / "w.pt")
    assert_one_clear_line(process, *words)


def test_weights_that_are_no_checkpoint_are_not_overwritten(small_corpus, tmp_path, command):
    weights = tmp_path / "w.pt"
    weights.write_text("my diary", encoding="utf-8")
    process = command(training.main, "--data", small_corpus, "--weights", weights, *TINY_RUN)
    assert_one_clear_line(process, "w.pt")
    assert weights.read_text("utf-8") == "my diary"


def test_a_batch_that_the_processes_do_not_divide_is_refused(
    small_corpus, tmp_path, command, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      *TINY_RUN, "--batch-size", 7)
    assert_one_clear_line(process, "7", "2 processes")


@pytest.mark.parametrize("flag, value, saved", [
    ("--steps", 99, 18), ("--seed", 1338, 1337), ("--n-layer", 6, 1), ("--batch-size", 64, 8),
])
def test_resume_refuses_other_settings_than_the_run_has(
    flag, value, saved, whole_run, small_corpus, command
):
    """Also where the value is the parser's own default: --n-layer 6, --batch-size 64."""
    process = command(training.main, "--data", small_corpus, "--weights", whole_run, "--resume",
                      flag, value)
    assert_one_clear_line(process, f"{flag} {value}", f"has {saved}", "--init")


# ---- teachers


@torch.no_grad()
def test_teacher_nll_is_the_cross_entropy_to_their_average():
    """By enumeration over characters and teachers: each judges the same sequence."""
    teachers = [random_model(seed=seed) for seed in range(3)]
    x_t, student = partly_masked(1, 32, 0.5, seed=0), random_model(seed=9)
    masked, t = x_t == 0, noise_index(x_t == 0, 128)
    with autocast(torch.device("cpu")):
        p = [log_probs(model(x_t, t), 0)[0].exp() for model in (*teachers, student)]
    total = 0.0
    for i in masked[0].nonzero().flatten().tolist():
        for v in range(1, 128):
            average = sum(q[i, v].item() for q in p[:3]) / 3
            total -= average * math.log(p[3][i, v].item())
    log_q = training.ask(teachers, x_t.repeat(3, 1), t.repeat(3))  # a row for each teacher
    nll = training.teacher_nll(p[3].log().expand(3, -1, -1), log_q, masked.expand(3, -1), 0)
    assert nll.mean().item() == pytest.approx(total / masked.sum().item(), rel=1e-4)


@torch.no_grad()
def test_an_ensemble_averages_probabilities(whole_run, small_corpus, command):
    models = [random_model(seed=seed) for seed in range(3)]
    x_t = partly_masked(4, 32, 0.5, seed=1)
    t = noise_index(x_t == 0, 128)
    p = torch.stack([log_probs(model(x_t, t), 0).exp() for model in models]).mean(0)
    torch.testing.assert_close(training.Ensemble(models)(x_t, t).exp(), p)
    alone = ["--eval-only", "--data", small_corpus, "--weights", whole_run]
    twice = ["--eval-only", "--data", small_corpus, *SIZES, "--teachers", whole_run, whole_run]
    figures = [command(training.main, *arguments).stdout for arguments in (alone, twice)]
    assert "nats per character" in figures[0] and figures[0] == figures[1]


def test_a_student_learns_from_teachers(whole_run, small_corpus, tmp_path, command):
    arguments = ["--data", small_corpus, "--weights", tmp_path / "w.pt", "--teachers", whole_run,
                 whole_run, "--steps", 12, *TINY_RUN]
    process = command(training.main, *arguments)
    assert process.returncode == 0, process.stderr
    assert "min left" not in process.stderr  # no progress bar where there is no terminal
    with open(tmp_path / "w.csv", newline="", encoding="utf-8") as file:
        first, last = csv.DictReader(file)
    assert float(last["val_nelbo"]) < float(first["val_nelbo"])
    process = command(training.main, *arguments[:4], "--teachers", DEFAULT_WEIGHTS, *TINY_RUN)
    assert_one_clear_line(process, "--teachers", "sequence_len", "256", "32")


def test_further_texts_are_learned_but_do_not_validate(
    small_corpus, tmp_path, command, monkeypatch
):
    (tmp_path / "more.txt").write_text("a rolling stone gathers no moss\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    learned, draw_batch = [], training.draw_batch

    def spy(text, *rest):
        learned.append(decode_tokens(text))
        return draw_batch(text, *rest)

    monkeypatch.setattr(training, "draw_batch", spy)
    arguments = ["--weights", "w.pt", "--data", small_corpus, "more.txt"]
    process = command(training.main, *arguments, "--steps", 2, *TINY_RUN)
    assert process.returncode == 0, process.stderr
    corpus = small_corpus.read_text(encoding="utf-8")
    more = Path("more.txt").read_text(encoding="utf-8")
    assert learned == [corpus[: int(0.9 * len(corpus))] + more] * 2
    model, meta = load_weights("w.pt")
    _, val, _ = load_corpus(small_corpus, model.config)
    assert meta["val_nelbo"] == pytest.approx(nelbo(model, val)[0], abs=1e-6)
    Path("more.txt").write_text(more.upper(), encoding="utf-8")
    assert_one_clear_line(command(training.main, *arguments, "--resume"), "another text")


def test_further_texts_may_not_hold_the_validation_split(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = random.Random(0)
    lines = ["".join(words.choices("abcdefgh ", k=49)) + "\n" for _ in range(120)]
    Path("corpus.txt").write_text("".join(lines), encoding="utf-8")
    Path("train.txt").write_text("".join(lines[:108]), encoding="utf-8")
    Path("excerpt.txt").write_text("".join(lines[:5] + lines[109:117]), encoding="utf-8")
    arguments = ["--weights", "w.pt", "--steps", 1, *TINY_RUN, "--data", "corpus.txt"]
    for leak in ("corpus.txt", "excerpt.txt"):
        process = command(training.main, *arguments, "train.txt", leak)
        assert_one_clear_line(process, f"--data {leak}", "validates")
        assert not Path("w.pt").exists()
    process = command(training.main, *arguments, "train.txt")
    assert process.returncode == 0, process.stderr


# ---- no user's file is lost


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_log_that_cannot_be_saved_leaves_the_old_one(tmp_path, monkeypatch):
    training.write_log([{"step": 1}], tmp_path / "w.csv")
    before = snapshot(tmp_path)
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(BadInput, match="w.csv: not saved"):
        training.write_log([{"step": 1}, {"step": 2}], tmp_path / "w.csv")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("change, words", [
    (["--vocab-size", 256], ["vocab_size 128", "256"]),
    (["--data", "other.txt"], ["another text"]),
])
def test_weights_that_cannot_be_compared_are_never_replaced(
    change, words, whole_run, small_corpus, tmp_path, command, monkeypatch
):
    (tmp_path / "w.pt").write_bytes(whole_run.read_bytes())
    (tmp_path / "other.txt").write_text("a rolling stone gathers no moss\n" * 60, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    process = command(training.main, "--data", small_corpus, "--weights", "w.pt", *TINY_RUN,
                      "--steps", 3, *change)
    assert_one_clear_line(process, *words, "another --weights")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("data, weights", [
    ("poems.csv", "poems.pt"), ("poems.state.csv", "poems.pt"), ("poems.state.pt", "poems.pt"),
    ("poems.pt", "poems.pt"), ("poems", "poems"),
])
def test_no_file_of_a_run_overwrites_its_text(data, weights, tmp_path, command, monkeypatch):
    (tmp_path / data).write_text("shall I compare thee\n" * 60, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    process = command(training.main, "--data", data, "--weights", weights, *TINY_RUN, "--steps", 3)
    assert_one_clear_line(process, data)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["w.csv", "w.state.csv", "w.state.pt"])
def test_a_file_that_no_run_has_written_stays(name, small_corpus, tmp_path, command):
    (tmp_path / name).write_text("name,age\nBob,3\n", encoding="utf-8")
    before = snapshot(tmp_path)
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      *TINY_RUN, "--steps", 3)
    assert_one_clear_line(process, name)
    assert snapshot(tmp_path) == before


def test_the_state_of_a_run_is_not_taken_for_weights_to_replace(whole_run, small_corpus, command):
    state = whole_run.with_name("w.state.pt")
    process = command(training.main, "--data", small_corpus, "--weights", state, *TINY_RUN)
    assert_one_clear_line(process, "w.state.pt", "--weights")


def test_an_unfinished_run_is_not_overwritten_by_a_new_one(small_corpus, tmp_path, command):
    files = ["--data", small_corpus, "--weights", tmp_path / "w.pt"]
    run = Training(*files, "--steps", 1_000_000, *TINY_RUN)
    while not (tmp_path / "w.state.pt").exists():
        assert run.process.is_alive()
        time.sleep(0.002)
    os.kill(run.process.pid, signal.SIGINT)
    run.wait()
    before = snapshot(tmp_path)
    process = command(training.main, *files, "--steps", 3, *TINY_RUN)
    assert_one_clear_line(process, "unfinished run", "--resume")
    assert snapshot(tmp_path) == before


def test_dotted_names_have_files_of_their_own():
    one, other = (training.Files(Path(f"run0.0{digit}")) for digit in "13")
    assert {one.state, one.log, one.state_log}.isdisjoint({other.state, other.log, other.state_log})
    assert training.Files(Path("a/w.pt")).state == Path("a/w.state.pt")


def test_better_weights_that_appear_during_a_run_stay(whole_run, small_corpus, tmp_path):
    weights = tmp_path / "w.pt"
    worse = Training("--data", small_corpus, "--weights", weights, "--steps", 300, *TINY_RUN,
                     "--muon-learning-rate", 1e-9, "--learning-rate", 1e-9)
    while not weights.exists():
        assert worse.process.is_alive()
        time.sleep(0.002)
    time.sleep(0.1)
    (tmp_path / "other.pt").write_bytes(whole_run.read_bytes())
    os.replace(tmp_path / "other.pt", weights)
    worse.wait()
    assert worse.process.exitcode == 0, worse.output
    same, _ = load_weights(weights)
    for name, tensor in load_weights(whole_run)[0].state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor)


def test_a_run_that_is_stopped_before_its_first_save_says_so(small_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "StopSignal", lambda: type("Stopped", (), {"received": 0.0})())
    args = ["--data", small_corpus, "--weights", tmp_path / "w.pt", "--steps", 3, *TINY_RUN]
    said = []
    monkeypatch.setattr(training, "warn", said.append)
    training.main([str(word) for word in args])
    assert said[-1] == "stopped before the first step; there is nothing to resume"
    assert not (tmp_path / "w.state.pt").exists()


def test_a_second_signal_ends_the_process_but_not_torchruns_echo(monkeypatch):
    clock = [10.0]
    monkeypatch.setattr(training.signal, "signal", lambda *_: None)
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    stop = training.StopSignal()
    for now in (10.0, 10.3):  # Ctrl-C, and again from torchrun
        clock[0] = now
        stop(signal.SIGINT, None)
    assert stop.received == 10.0
    clock[0] = 12.0
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGINT, None)


def test_the_default_text_is_recognised_as_changed(tmp_path, monkeypatch, capsys):
    import model

    text = tmp_path / "text.txt"
    text.write_bytes(model.DEFAULT_DATA.read_bytes().replace(b"\n", b"\r\n"))
    monkeypatch.setattr(model, "DEFAULT_DATA", text.resolve())
    model.load_corpus(text, model.DiffusionConfig())
    assert "line ends" in capsys.readouterr().err


def test_a_lost_process_is_reported_with_its_cause_and_other_errors_as_they_are(monkeypatch):
    def fail(message):
        def train(args):
            raise RuntimeError(message)

        monkeypatch.setattr(training, "train", train)
        training.main([])

    with pytest.raises(BadInput, match="another process .*[(]Connection closed by peer[)]"):
        fail("Connection closed by peer")
    with pytest.raises(RuntimeError, match="NCCL error: invalid usage"):
        fail("NCCL error: invalid usage")
