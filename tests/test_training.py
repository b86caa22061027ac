"""training.py from the outside, as subprocesses with a tiny model, plus its Muon from the inside."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Training, assert_one_clear_line, random_model, script

import training
from model import load_weights, multiplies_bf16

TINY_RUN = ["--n-layer", "1", "--n-embd", "16", "--n-head", "1", "--sequence-len", "32", "--context-len", "4", "--batch-size", "8",
            "--eval-interval", "6", "--no-compile", "--device", "cpu"]


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return path


@pytest.fixture(scope="module")
def whole_run(small_corpus, tmp_path_factory):
    weights = tmp_path_factory.mktemp("run") / "w.pt"
    training_run = Training("--data", small_corpus, "--weights", weights, "--steps", 18, *TINY_RUN).wait()
    assert training_run.process.exitcode == 0, training_run.output
    return weights


def state_of(weights):
    return torch.load(weights.with_suffix(".state.pt"), weights_only=True)


def assert_same_run(one, other):
    a, b = state_of(one), state_of(other)
    assert a["step"] == b["step"]
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
    measured = script("training.py", "--eval-only", "--weights", whole_run, "--data", small_corpus, "--device", "cpu")
    assert f"{meta['val_nelbo']:.4f}" in measured.stdout


def test_training_on_several_processes_is_training_on_one(whole_run, small_corpus, tmp_path):
    weights = tmp_path / "two.pt"
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "training.py"),
         "--data", str(small_corpus), "--weights", str(weights), "--steps", "18", *TINY_RUN, "--micro-batch-size", "2"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    one, two = state_of(whole_run)["model"], state_of(weights)["model"]
    for name in one:
        if multiplies_bf16(torch.device("cpu")):  # whose rounding moves the zero-initialised ones by 5%
            assert (two[name] - one[name]).norm() < 0.15 * one[name].norm(), name
        else:
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-3)
    assert process.stdout.count("validation NELBO") == 1  # rank 0 alone speaks


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
def test_a_process_that_dies_ends_the_run_with_a_clear_line(small_corpus, tmp_path):
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "training.py"),
         "--data", str(small_corpus), "--weights", str(tmp_path / "w.pt"), "--steps", "1000000", *TINY_RUN],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (tmp_path / "w.state.pt").exists():
        assert launcher.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert "error: another process of this run died" in err
    state_of(tmp_path / "w.pt")  # whole


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_and_resumed_run_ends_with_the_same_weights(signum, whole_run, small_corpus, tmp_path):
    files = ["--data", small_corpus, "--weights", tmp_path / "w.pt"]
    stopped = Training(*files, "--steps", 18, *TINY_RUN)
    while not (tmp_path / "w.state.pt").exists():  # the first evaluation, after step 6
        assert stopped.process.is_alive()
        time.sleep(0.002)
    os.kill(stopped.process.pid, signum)
    stopped.wait()
    assert stopped.process.exitcode == 0 and "--resume" in stopped.output
    assert 6 <= state_of(tmp_path / "w.pt")["step"] < 18
    resumed = Training(*files, "--resume").wait()
    assert resumed.process.exitcode == 0, resumed.output
    assert_same_run(tmp_path / "w.pt", whole_run)


def test_a_killed_run_resumes_from_its_last_whole_checkpoint(whole_run, small_corpus, tmp_path):
    """SIGKILL at ten random moments of a run that saves after every step."""
    files, state = ["--data", small_corpus, "--weights", tmp_path / "w.pt"], tmp_path / "w.state.pt"
    moments = random.Random(0)
    for _ in range(10):
        victim = Training(*files, *(["--resume"] if state.exists() else ["--steps", 18, *TINY_RUN]), "--eval-interval", 1)
        time.sleep(moments.uniform(0.1, 1.0))
        victim.process.kill()
        victim.wait()
        if state.exists():
            state_of(tmp_path / "w.pt")  # always whole
    resumed = Training(*files, *(["--resume"] if state.exists() else ["--steps", 18, *TINY_RUN]), "--eval-interval", 6).wait()
    assert resumed.process.exitcode == 0, resumed.output
    assert_same_run(tmp_path / "w.pt", whole_run)


def test_only_better_weights_replace_existing_ones(whole_run, small_corpus, tmp_path):
    weights = tmp_path / "w.pt"
    weights.write_bytes(whole_run.read_bytes())
    worse = Training("--data", small_corpus, "--weights", weights, "--steps", 2, *TINY_RUN).wait()
    assert worse.process.exitcode == 0 and "was better and stays" in worse.output
    assert weights.read_bytes() == whole_run.read_bytes()


def test_a_run_that_starts_from_weights_goes_on_from_what_they_know(whole_run, small_corpus, tmp_path):
    files = ["--data", small_corpus, "--weights", tmp_path / "w.pt"]
    further = Training(*files, "--init", whole_run, "--steps", 2, "--learning-rate", 1e-9, "--muon-learning-rate", 1e-9, *TINY_RUN).wait()
    assert further.process.exitcode == 0, further.output
    (_, before), (_, after) = load_weights(whole_run), load_weights(tmp_path / "w.pt")
    assert after["started_from"] == before and after["characters_seen"] == (18 + 2) * 8 * 32
    assert after["val_nelbo"] == pytest.approx(before["val_nelbo"], abs=1e-3)  # it learned next to nothing, and had forgotten nothing
    with open((tmp_path / "w.csv"), newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [6, 12, 18, 2]
    again = Training(*files, "--resume").wait()
    assert again.process.exitcode == 0, again.output
    assert state_of(tmp_path / "w.pt")["meta"]["started_from"] == before


def test_weights_of_another_shape_are_no_start(whole_run, small_corpus, tmp_path, command):
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt", "--init", whole_run, *TINY_RUN, "--n-layer", 2)
    assert_one_clear_line(process, "--init", "n_layer=1", "n_layer=2")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(small_corpus, tmp_path):
    files = ["--data", small_corpus, "--weights", tmp_path / "w.pt"]
    wild = Training(*files, "--steps", 50, *TINY_RUN, "--learning-rate", "2e37", "--warmup", 0).wait()
    assert wild.process.exitcode == 2
    last_line = wild.output.splitlines()[-1]
    assert last_line.startswith("error: the loss at step") and "Traceback" not in wild.output


def test_max_minutes_follows_the_clock(small_corpus, tmp_path):
    files = ["--data", small_corpus, "--weights", tmp_path / "w.pt"]
    timed = Training(*files, "--max-minutes", "0.05", *TINY_RUN).wait()
    assert timed.process.exitcode == 0, timed.output
    state = state_of(tmp_path / "w.pt")
    assert 3 <= state["seconds"] < 15
    assert state["optimizers"][0]["param_groups"][0]["lr"] < 0.002  # it had fallen nearly to zero


def test_muon_makes_the_updates_of_torch_optim_muon():
    models = [random_model(), random_model()]
    ours = training.Muon(models[0].blocks.parameters(), lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(models[1].blocks.parameters(), lr=0.02, weight_decay=0.1)
    start = {name: p.clone() for name, p in models[0].blocks.named_parameters()}
    for step in range(3):
        torch.manual_seed(step)
        for a, b in zip(models[0].blocks.parameters(), models[1].blocks.parameters()):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    for (name, a), b in zip(models[0].blocks.named_parameters(), models[1].blocks.parameters()):
        moved_a, moved_b = a - start[name], b - start[name]
        assert (moved_a - moved_b).norm() < 0.03 * moved_b.norm(), name  # theirs rounds to bfloat16


def test_learning_rate_rises_stays_and_falls():
    args = Namespace(warmup=0.1, decay=0.4)
    assert [training.learning_rate_factor(p, args) for p in (0, 0.05, 0.1, 0.5)] == [0, 0.5, 1, 1]
    assert training.learning_rate_factor(0.8, args) == pytest.approx(0.5) and training.learning_rate_factor(1, args) == 0


@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere.txt"], ["nowhere.txt"]),
    (["--batch-size", "0"], ["'0'", "at least 1"]),
    (["--steps", "-1"], ["-1"]),
    (["--n-embd", "50", "--n-head", "4"], ["50", "4"]),
    (["--learning-rate", "0"], ["'0'", "above 0"]),
    (["--device", "cuda:9"], ["cuda:9"]),
    (["--weights", "/proc/nothing/w.pt"], ["/proc/nothing"]),
    (["--resume"], ["state.pt"]),
    (["--eval-only"], ["w.pt"]),
    (["--init", "nowhere.pt"], ["nowhere.pt"]),
    (["--batch-size", "8", "--micro-batch-size", "3"], ["3", "8"]),
    (["--vocab-size", "999"], ["999"]),
])
def test_bad_input_to_training_is_one_line(arguments, words, tmp_path, command):
    assert_one_clear_line(command(training.main, "--weights", tmp_path / "w.pt", *arguments), *words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text, words", [
    ("", ["empty"]),
    ("short", ["5 characters"]),
    ("caf\u00e9 " * 2000, ["\u00e9", "position 3"]),
    ("a\0b" * 2000, ["position 1", "MASK"]),
])
def test_bad_corpus_is_one_line(text, words, tmp_path, command):
    data = tmp_path / "corpus.txt"
    data.write_text(text)
    assert_one_clear_line(command(training.main, "--data", data, "--weights", tmp_path / "w.pt"), *words)


def test_weights_that_are_no_checkpoint_are_not_overwritten(small_corpus, tmp_path, command):
    weights = tmp_path / "w.pt"
    weights.write_text("my diary")
    assert_one_clear_line(command(training.main, "--data", small_corpus, "--weights", weights, *TINY_RUN), "w.pt")
    assert weights.read_text() == "my diary"


def test_a_batch_that_the_processes_do_not_divide_is_refused(small_corpus, tmp_path, command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt", *TINY_RUN, "--batch-size", 7)
    assert_one_clear_line(process, "7", "2 processes")


def test_resume_refuses_other_settings_than_the_run_has(whole_run, small_corpus, command):
    process = command(training.main, "--data", small_corpus, "--weights", whole_run, "--resume", "--steps", 99)
    assert_one_clear_line(process, "--steps 99", "18")
