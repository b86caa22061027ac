"""Runs of training.py with a tiny model, and the parts of a training step."""

import argparse
import contextlib
import errno
import io
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    Training, assert_one_clear_line, launch, no_space, partly_masked, random_model, script,
)

import sample
import training
from model import (
    DEFAULT_WEIGHTS, ROOT, DiffusionConfig, autocast, decode_tokens, load_corpus, load_weights,
    multiplies_bf16, nelbo, noise_index, save_weights,
)

not_windows = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
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


def assert_same_weights(one, other):
    a, b = (torch.load(path, weights_only=True)["model"] for path in (one, other))
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_learns_logs_and_leaves_only_its_weights_with_their_bound(whole_run, small_corpus):
    model, meta = load_weights(whole_run)
    assert os.listdir(whole_run.parent) == ["w.pt"]  # the state was removed at the end
    assert meta["step"] == 18 and meta["characters_seen"] == 18 * 8 * 32 and meta["seed"] == 1337
    assert meta["val_nelbo"] < 4.5  # an untrained model has log(127) = 4.844
    assert [row["step"] for row in meta["log"]] == [6, 12, 18]
    assert meta["log"][-1]["val_nelbo"] < meta["log"][0]["val_nelbo"]
    measured = script("training.py", "--eval-only", "--weights", whole_run, "--data", small_corpus,
                      "--device", "cpu")
    assert f"{whole_run}: validation NELBO {meta['val_nelbo']:.4f}" in measured.stdout


def test_the_split_that_chooses_the_weights_is_not_learned(
    small_corpus, tmp_path, command, monkeypatch
):
    learned, evaluated = [], []
    draw_batch, bound = training.draw_batch, training.nelbo
    monkeypatch.setattr(training, "draw_batch",
                        lambda text, *rest: learned.append(decode_tokens(text)) or
                        draw_batch(text, *rest))
    monkeypatch.setattr(training, "nelbo", lambda model, ids, **how:
                        evaluated.append(decode_tokens(ids)) or bound(model, ids, **how))
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--steps", 6, *TINY_RUN)
    assert process.returncode == 0, process.stderr
    corpus = small_corpus.read_text(encoding="utf-8")
    train, val = corpus[: int(0.9 * len(corpus))], corpus[int(0.9 * len(corpus)) :]
    held = train[: len(train) // 10]
    assert set(learned) == {train.removeprefix(held)}
    assert evaluated == [train.removeprefix(held), held, val, val]


def test_training_on_several_processes_is_training_on_one(whole_run, small_corpus, tmp_path):
    weights = tmp_path / "two.pt"
    process = script("training.py", "--data", small_corpus, "--weights", weights, "--steps", 18,
                     *TINY_RUN, processes=2)
    assert process.returncode == 0, process.stderr
    one, two = (load_weights(path)[0].state_dict() for path in (whole_run, weights))
    for name in one:
        if multiplies_bf16(torch.device("cpu")):  # rounding moves what starts at zero by 5%
            assert (two[name] - one[name]).norm() < 0.15 * one[name].norm(), name
        else:
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-3)
    assert process.stdout.count("validation NELBO") == 1  # only the leader speaks
    assert process.stderr.count("training on 2 x cpu") == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the threads in /proc")
def test_the_threads_of_several_processes_end_with_the_run(small_corpus, tmp_path):
    """One that lives on while Python shuts down aborts its process now and then."""
    program = tmp_path / "program.py"
    program.write_text(
        "import pathlib, sys\nimport training\ntraining.main(sys.argv[1:])\n"
        "for thread in pathlib.Path('/proc/self/task').iterdir():\n"
        "    print('thread', (thread / 'comm').read_text().strip())\n", encoding="utf-8")
    process = script(program, "--data", small_corpus, "--weights", tmp_path / "w.pt", "--steps", 1,
                     *TINY_RUN, processes=2, env={"PYTHONPATH": str(ROOT)})
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("thread") >= 2 and "gloo" not in process.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")
def test_a_process_that_dies_ends_the_run_and_the_last_save_stays_whole(small_corpus, tmp_path):
    launcher = launch("training.py", "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--steps", 1_000_000, *TINY_RUN, processes=2)
    while not (tmp_path / "w.pt").exists():
        assert launcher.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text("utf-8").split()
    os.kill(int(children[-1]), signal.SIGKILL)
    launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    state_of(tmp_path / "w.pt")  # whole


def started(*arguments):
    """Starts a run, and returns it when its first evaluation has written weights."""
    run = Training(*arguments)
    weights = Path(str(arguments[3]))
    while not weights.exists():
        assert run.process.is_alive(), run.wait().output
        time.sleep(0.002)
    return run


@not_windows
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", 1)])
def test_a_stopped_and_resumed_run_ends_with_the_weights_of_an_unbroken_run(
    signum, whole_run, small_corpus, tmp_path
):
    files = ["--data", small_corpus, "--weights", tmp_path / "w.pt"]
    stopped = started(*files, "--steps", 18, *TINY_RUN)
    os.kill(stopped.process.pid, signum)
    stopped.wait()
    assert stopped.process.exitcode == 128 + signum and "--resume" in stopped.output
    run = state_of(tmp_path / "w.pt")["run"]
    assert 6 <= run["step"] < 18
    assert len(run["log"]) <= run["step"] // 6  # a stop saves without an evaluation
    resumed = Training("--weights", tmp_path / "w.pt", "--resume", "--device", "cpu").wait()
    assert resumed.process.exitcode == 0, resumed.output
    assert_same_weights(tmp_path / "w.pt", whole_run)


def test_a_run_that_is_stopped_before_its_first_step_resumes_with_its_settings(
    small_corpus, tmp_path, command, monkeypatch
):
    weights = tmp_path / "w.pt"
    with monkeypatch.context() as patch:
        patch.setattr(training, "stop_signals", lambda: contextlib.nullcontext([signal.SIGTERM]))
        stopped = command(training.main, "--data", small_corpus, "--weights", weights, "--steps", 2,
                          "--seed", 2, *TINY_RUN)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert stopped.stderr.endswith(f"after step 0; continue: uv run training.py --resume --weights "
                                   f"{weights}\n")
    resumed = command(training.main, "--resume", "--weights", weights, "--device", "cpu")
    assert resumed.returncode == 0, resumed.stderr
    meta = load_weights(weights)[1]
    assert (meta["step"], meta["seed"]) == (2, 2)


@not_windows
def test_stop_signals_leave_an_ignored_hangup_ignored_and_put_the_handlers_back():
    """nohup ignores SIGHUP before it starts a program."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        with training.stop_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == terminate
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_killed_run_resumes_from_its_last_whole_checkpoint(whole_run, small_corpus, tmp_path):
    """SIGKILL at ten random moments of a run that saves after every step."""
    files, state = ["--data", small_corpus, "--weights", tmp_path / "w.pt"], tmp_path / "w.state.pt"
    moments = random.Random(0)

    def start(eval_interval):
        if state.exists() and not state.stat().st_size:  # killed between creation and contents
            state.unlink()
        settings = ["--resume", "--device", "cpu"] if state.exists() else ["--steps", 18, *TINY_RUN]
        return Training(*files, *settings, "--eval-interval", eval_interval)

    for _ in range(10):
        victim = start(eval_interval=1)
        time.sleep(moments.uniform(0.1, 1.0))
        victim.process.kill()
        victim.wait()
        if state.exists() and state.stat().st_size:
            state_of(tmp_path / "w.pt")  # always whole
    if state.exists() or not (tmp_path / "w.pt").exists():
        resumed = start(eval_interval=6).wait()
        assert resumed.process.exitcode == 0, resumed.output
    assert_same_weights(tmp_path / "w.pt", whole_run)


def test_only_better_weights_replace_existing_ones(whole_run, small_corpus, tmp_path):
    weights = tmp_path / "w.pt"
    weights.write_bytes(whole_run.read_bytes())
    worse = Training("--data", small_corpus, "--weights", weights, "--steps", 2, *TINY_RUN).wait()
    assert worse.process.exitcode == 0 and "was better and stays" in worse.output
    assert weights.read_bytes() == whole_run.read_bytes()
    load_weights(weights.with_suffix(".state.pt"))  # sample.py can read the run's own model


def test_init_starts_from_weights(whole_run, small_corpus, tmp_path):
    files = ["--data", small_corpus, "--weights", tmp_path / "w.pt"]
    # The sizes come from the file. At this learning rate, the bound has to stay that of the file
    further = Training(*files, "--init", whole_run, "--steps", 2, "--learning-rate", 1e-9,
                       *SETTINGS).wait()
    assert further.process.exitcode == 0, further.output
    (_, before), (_, after) = load_weights(whole_run), load_weights(tmp_path / "w.pt")
    assert after["val_nelbo"] == pytest.approx(before["val_nelbo"], abs=1e-3)
    assert f"--init {whole_run}" in after["command"]
    assert [row["step"] for row in after["log"]] == [2]


@not_windows
def test_a_run_resumes_without_the_weights_that_it_started_from(
    whole_run, small_corpus, tmp_path
):
    (tmp_path / "init.pt").write_bytes(whole_run.read_bytes())
    run = started("--data", small_corpus, "--weights", tmp_path / "w.pt",
                  "--init", tmp_path / "init.pt", "--steps", 60, *SETTINGS)
    run.process.terminate()
    assert run.wait().process.exitcode == 128 + signal.SIGTERM, run.output
    (tmp_path / "init.pt").unlink()
    resumed = Training("--weights", tmp_path / "w.pt", "--resume", "--device", "cpu").wait()
    assert resumed.process.exitcode == 0, resumed.output


@pytest.mark.parametrize("table", [
    pytest.param(b"\xef\xbb\xbfstep;val_nelbo\r\n6;4,5\r\n", id="saved by Excel"),
    pytest.param(b"id,poem\n1,caf\xe9\n", id="somebody else's"),
])
def test_a_table_beside_the_weights_is_neither_read_nor_written(
    table, whole_run, small_corpus, tmp_path, command
):
    (tmp_path / "init.pt").write_bytes(whole_run.read_bytes())
    for name in ("init.csv", "w.csv"):
        (tmp_path / name).write_bytes(table)
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--init", tmp_path / "init.pt", "--steps", 6, *SETTINGS)
    assert process.returncode == 0, process.stderr
    files = snapshot(tmp_path)
    assert files.keys() == {"init.pt", "w.pt", "init.csv", "w.csv"}
    assert files["init.csv"] == files["w.csv"] == table


@pytest.mark.parametrize("meta", [{"log": "many", "val_nelbo": None, "seconds": "x"}, {3: [1]}],
                         ids=["words for numbers", "other names"])
def test_weights_with_foreign_meta_can_be_measured_and_trained_on(
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


def test_init_refuses_flags_for_another_shape(whole_run, small_corpus, tmp_path, command):
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--init", whole_run, "--n-layer", 2)
    assert_one_clear_line(process, "--n-layer 2", str(whole_run), "has 1")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(small_corpus, tmp_path):
    files = ["--data", small_corpus, "--weights", tmp_path / "w.pt"]
    wild = Training(*files, "--steps", 50, *TINY_RUN, "--learning-rate", 1e38).wait()
    assert wild.process.exitcode == 2
    last_line = wild.output.splitlines()[-1]
    assert last_line.startswith("error: the loss at step") and "Traceback" not in wild.output


def test_max_minutes_follows_the_clock(small_corpus, tmp_path):
    files = ["--data", small_corpus, "--weights", tmp_path / "w.pt"]
    timed = Training(*files, "--max-minutes", "0.05", *TINY_RUN).wait()
    assert timed.process.exitcode == 0, timed.output
    meta = load_weights(tmp_path / "w.pt")[1]
    assert 3 <= meta["log"][-1]["seconds"] < 15 and meta["log"][-1]["step"] > 0


def test_every_time_index_is_trained():
    """The bell alone never draws t = 1. The embedding of its time index would stay random."""
    config = DiffusionConfig(n_layer=1, n_head=1, n_embd=8)
    train, generator = torch.ones(1000, dtype=torch.long), torch.Generator().manual_seed(0)
    *_, index, _ = training.draw_batch(train, config, 100_000, generator)
    share = index.bincount(minlength=128) / len(index)
    assert (share > 0.25 * training.FLAT_SHARE / 128).all() and share[60:68].mean() > 1.4 / 128


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
    args = training.parse_arguments(arguments)
    assert (args.learning_rate, args.decay) == (learning_rate, decay)
    optimizers = training.make_optimizers(random_model(), args.learning_rate)
    peaks = [optimizer.param_groups[0]["peak"] for optimizer in optimizers]
    assert peaks == pytest.approx([learning_rate, 0.15 * learning_rate])


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
    assert os.listdir(tmp_path) == []


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


def test_a_text_is_kept_as_bytes_until_a_batch_is_drawn(
    small_corpus, tmp_path, command, monkeypatch
):
    types, draw_batch = [], training.draw_batch

    def spy(text, *rest):
        batch = draw_batch(text, *rest)
        types.append((text.dtype, batch[0].dtype))
        return batch

    monkeypatch.setattr(training, "draw_batch", spy)
    process = command(training.main, "--data", small_corpus, small_corpus, "--weights",
                      tmp_path / "w.pt", "--steps", 1, *TINY_RUN)
    assert process.returncode == 0, process.stderr
    assert types == [(torch.uint8, torch.int64)]


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
    args = training.parse_arguments(["--device", "cpu"])
    assert training.start_processes(args) == (0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def stopped_run(small_corpus, tmp_path_factory):
    """The weights of a run that was stopped, with its state beside them."""
    weights = tmp_path_factory.mktemp("stopped") / "w.pt"
    run = started("--data", small_corpus, "--weights", weights, "--steps", 1_000_000, *TINY_RUN)
    run.process.terminate()
    run.wait()
    return weights


@not_windows
@pytest.mark.parametrize("flag, value, saved", [
    ("--steps", 99, 1_000_000), ("--seed", 1338, 1337), ("--n-layer", 6, 1),
    ("--batch-size", 64, 8), ("--data", "other.txt", ""),
])
def test_resume_refuses_other_settings_than_the_run_has(flag, value, saved, stopped_run, command):
    """--n-layer 6 and --batch-size 64 are the parser's defaults, and refused all the same."""
    process = command(training.main, "--weights", stopped_run, "--resume", flag, value)
    assert_one_clear_line(process, flag, f"{value}", "w.state.pt has", f"{saved}")


@not_windows
def test_resume_refuses_a_truncated_state(stopped_run, tmp_path, command):
    state = (stopped_run.parent / "w.state.pt").read_bytes()
    (tmp_path / "w.state.pt").write_bytes(state[: len(state) // 2])
    before = snapshot(tmp_path)
    process = command(training.main, "--resume", "--weights", tmp_path / "w.pt")
    assert_one_clear_line(process, "w.state.pt")
    assert snapshot(tmp_path) == before


def test_resume_refuses_weights_under_the_name_of_a_state(whole_run, tmp_path, command):
    (tmp_path / "w.state.pt").write_bytes(whole_run.read_bytes())
    process = command(training.main, "--resume", "--weights", tmp_path / "w.pt")
    assert_one_clear_line(process, "w.state.pt", "nothing to resume")


# ---- teachers


@torch.no_grad()
def test_distilled_nll_is_the_cross_entropy_to_the_teacher():
    """By enumeration over all characters at all masked positions."""
    teacher, student = random_model(seed=1), random_model(seed=9)
    x_t = partly_masked(1, 32, 0.5, seed=0)
    masked, index = x_t == 0, noise_index(x_t == 0, 128)
    log_q, log_p = teacher(x_t, index), student(x_t, index)
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
    x_0, x_t, masked, index, weight = batch
    alone, both = training.batch_loss(model, batch), training.batch_loss(model, batch, teacher)
    with autocast(torch.device("cpu")), torch.no_grad():
        soft = training.distilled_nll(model(x_t, index), teacher(x_t, index), masked)
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
    assert last["val_nelbo"] < first["val_nelbo"]
    process = command(training.main, *arguments[:2], "--weights", tmp_path / "v.pt",
                      "--teachers", DEFAULT_WEIGHTS, *TINY_RUN)
    assert_one_clear_line(process, "--teachers", "diffusion_model.pt", "sequence_len 256", "not 32")


def test_further_texts_are_used_for_training_only(
    small_corpus, tmp_path, command, monkeypatch
):
    more = "a rolling stone gathers no moss\n" * 12
    (tmp_path / "more.txt").write_text(more, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    learned, draw_batch = [], training.draw_batch

    def spy(text, *rest):
        learned.append(decode_tokens(text))
        return draw_batch(text, *rest)

    monkeypatch.setattr(training, "draw_batch", spy)
    process = command(training.main, "--weights", "w.pt", "--data", small_corpus, "more.txt",
                      "--steps", 2, *TINY_RUN)
    assert process.returncode == 0, process.stderr
    assert set(learned) == {learned[0]} and learned[0].endswith(more)
    model, meta = load_weights("w.pt")
    _, val, _ = load_corpus(small_corpus, model.config)
    assert meta["val_nelbo"] == pytest.approx(nelbo(model, val)[0], abs=1e-6)


# ---- no user's file is lost


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_save_that_fails_is_tried_again(small_corpus, tmp_path, command, monkeypatch):
    save, failures = torch.save, [1, 1, 0, 0, 1, 0]  # of saves in turn, first the state at step 0

    def fail_twice(*arguments):
        if failures and failures.pop(0):
            no_space()
        save(*arguments)

    monkeypatch.setattr(torch, "save", fail_twice)
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--steps", 12, *TINY_RUN)
    assert process.returncode == 0 and not failures
    assert process.stderr.count("not saved, the next save tries again: No space left") == 3
    assert load_weights(tmp_path / "w.pt")[1]["step"] == 12
    assert os.listdir(tmp_path) == ["w.pt"]


def test_a_run_goes_on_when_the_reader_of_its_log_goes_away(small_corpus, tmp_path):
    process = launch("training.py", "--data", small_corpus, "--weights", tmp_path / "w.pt",
                     "--steps", 12, *TINY_RUN)
    process.stderr.close()
    assert process.wait(120) == 0
    assert load_weights(tmp_path / "w.pt")[1]["step"] == 12


@pytest.mark.parametrize("number, terminal", [(errno.ENOSPC, False), (errno.EIO, True)],
                         ids=["full disk", "closed terminal"])
def test_a_run_goes_on_when_its_log_cannot_be_written(
    number, terminal, small_corpus, tmp_path, command, monkeypatch
):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(number, "gone")

        def isatty(self):
            return terminal

    monkeypatch.setattr(sys, "stderr", Gone())
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--steps", 12, *TINY_RUN)
    assert process.returncode == 0 and "validation NELBO" in process.stdout
    assert load_weights(tmp_path / "w.pt")[1]["step"] == 12


@pytest.mark.parametrize("change, words", [
    (["--vocab-size", 256], ["vocab_size 128", "256"]),
    (["--data", "other.txt"], ["another text"]),
])
def test_weights_of_another_text_or_vocabulary_are_never_replaced(
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
    ("poems.state.pt", "poems.pt"), ("poems.pt", "poems.pt"), ("poems", "poems"),
])
def test_no_file_of_a_run_overwrites_its_text(data, weights, tmp_path, command, monkeypatch):
    (tmp_path / data).write_text("shall I compare thee\n" * 60, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    process = command(training.main, "--data", data, "--weights", weights, *TINY_RUN, "--steps", 3)
    assert_one_clear_line(process, data)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["w.pt", "w.state.pt"])
def test_foreign_files_are_never_overwritten(name, small_corpus, tmp_path, command):
    (tmp_path / name).write_text("name,age\nBob,3\n", encoding="utf-8")
    before = snapshot(tmp_path)
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      *TINY_RUN, "--steps", 3)
    assert_one_clear_line(process, name)
    assert snapshot(tmp_path) == before


def test_a_folder_is_refused_before_the_run_starts(small_corpus, tmp_path, command):
    (tmp_path / "w.pt").mkdir()
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      *TINY_RUN)
    assert_one_clear_line(process, "w.pt")
    assert os.listdir(tmp_path) == ["w.pt"] and (tmp_path / "w.pt").is_dir()


@not_windows
def test_a_run_writes_through_a_link(small_corpus, tmp_path, command):
    (tmp_path / "link.pt").symlink_to("target.pt")
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "link.pt",
                      "--steps", 6, *TINY_RUN)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "link.pt").is_symlink() and load_weights(tmp_path / "target.pt")


def test_only_one_of_several_runs_that_start_at_once_claims_the_files(tmp_path):
    args = argparse.Namespace(weights=tmp_path / "w.pt", resume=False)
    together, refusals = threading.Barrier(8), []

    def claim():
        together.wait()
        try:
            training.claim_files(args, DiffusionConfig(), "", None, "cpu", {})
        except training.BadInput as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refusals) == 7 and all("holds a run" in refusal for refusal in refusals)


@not_windows
def test_a_second_run_on_the_same_files_is_refused(stopped_run, small_corpus, command):
    before = snapshot(stopped_run.parent)
    process = command(training.main, "--data", small_corpus, "--weights", stopped_run, *TINY_RUN)
    assert_one_clear_line(process, "w.state.pt holds a run", "--resume", "delete it")
    assert snapshot(stopped_run.parent) == before


def test_weights_with_dots_in_their_names_have_states_of_their_own():
    assert training.state_beside(Path("run0.01.pt")) != training.state_beside(Path("run0.03.pt"))
    assert training.state_beside(Path("a/w.pt")) == Path("a/w.state.pt")


def test_a_run_goes_on_when_the_disk_is_too_full_for_its_state(small_corpus, tmp_path, command):
    """A limit on the size of files stands in for the disk. torch.save turns the OSError of the file
    into a RuntimeError."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, before[1]))  # the state is larger
    try:
        process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                          "--steps", 12, *TINY_RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("not saved") == 2


def test_a_run_that_never_wrote_its_weights_ends_with_an_error(
    small_corpus, tmp_path, command, monkeypatch
):
    monkeypatch.setattr(torch, "save", no_space)
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--steps", 6, *TINY_RUN)
    assert "was better" not in process.stdout and process.returncode != 0


def test_a_run_that_is_stopped_while_it_measures_old_weights_leaves_no_empty_state(
    whole_run, small_corpus, tmp_path, command, monkeypatch
):
    (tmp_path / "w.pt").write_bytes(whole_run.read_bytes())

    def stop(*_, **__):
        raise KeyboardInterrupt  # as SIGINT does at this point; SIGTERM would end the process

    with monkeypatch.context() as patch:
        patch.setattr(training, "nelbo", stop)
        command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt", *TINY_RUN)
    state = tmp_path / "w.state.pt"
    assert not state.exists() or state.stat().st_size


def test_a_run_saves_its_last_weights_before_it_prints_their_bound(
    small_corpus, tmp_path, command, monkeypatch
):
    class Gone(io.StringIO):
        def write(self, text):
            no_space()

    monkeypatch.setattr(sys, "stdout", Gone())
    command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt", "--steps", 6,
            *TINY_RUN)
    assert os.listdir(tmp_path) == ["w.pt"]


def test_init_from_weights_of_an_absurd_size_is_refused_in_one_line(
    whole_run, small_corpus, tmp_path, command
):
    contents = torch.load(whole_run, weights_only=True)
    contents["config"]["n_embd"] = 2**30
    torch.save(contents, tmp_path / "huge.pt")
    assert_one_clear_line(command(training.main, "--data", small_corpus, "--weights",
                                  tmp_path / "w.pt", "--init", tmp_path / "huge.pt", "--steps", 6,
                                  *SETTINGS), "huge.pt")


def test_a_resumed_run_does_not_replace_the_weights_of_another_text(
    stopped_run, tmp_path, command
):
    state = torch.load(stopped_run.parent / "w.state.pt", weights_only=True)
    state["args"]["steps"] = state["run"]["step"] + 30
    state["args"]["eval_interval"] = 5
    torch.save(state, tmp_path / "w.state.pt")
    save_weights(random_model(), {"corpus_sha256": "another"}, tmp_path / "w.pt")
    before = (tmp_path / "w.pt").read_bytes()
    process = command(training.main, "--resume", "--weights", tmp_path / "w.pt", "--device", "cpu")
    assert_one_clear_line(process, "another text")
    assert (tmp_path / "w.pt").read_bytes() == before


def test_a_run_that_is_resumed_at_its_end_evaluates_its_last_step(stopped_run, tmp_path, command):
    """By the clock, compilation alone may use up the time that was left."""
    state = torch.load(stopped_run.parent / "w.state.pt", weights_only=True)
    state["args"]["steps"], state["run"]["log"] = state["run"]["step"], []
    torch.save(state, tmp_path / "w.state.pt")
    process = command(training.main, "--resume", "--weights", tmp_path / "w.pt", "--device", "cpu")
    assert process.returncode == 0, process.stderr
    assert load_weights(tmp_path / "w.pt")[1]["step"] == state["run"]["step"]


def test_a_file_and_a_link_to_it_have_one_state(tmp_path):
    (tmp_path / "link.pt").symlink_to("w.pt")
    one, other = (training.state_beside(tmp_path / name) for name in ("link.pt", "w.pt"))
    assert one == other


@pytest.mark.parametrize("main", [sample.main, training.main])
def test_sample_and_training_work_with_a_closed_stderr(
    main, tiny_weights, small_corpus, tmp_path, command, monkeypatch
):
    """After `2>&-`, or under pythonw, sys.stderr is None."""
    monkeypatch.setattr(sys, "stderr", None)
    files = ["--weights", tiny_weights, "--num-blocks", 1] if main is sample.main else [
        "--data", small_corpus, "--weights", tmp_path / "w.pt", "--steps", 6, *TINY_RUN]
    process = command(main, *files)
    assert process.returncode == 0 and "characters in" not in process.stdout
    assert "training on" not in process.stdout


def test_the_resume_command_that_a_stopped_run_prints_quotes_its_path(
    small_corpus, tmp_path, command, monkeypatch
):
    weights = tmp_path / "my run.pt"
    monkeypatch.setattr(training, "stop_signals", lambda: contextlib.nullcontext([15]))
    stopped = command(training.main, "--data", small_corpus, "--weights", weights, "--steps", 2,
                      *TINY_RUN)
    assert f"--weights '{weights}'" in stopped.stderr
