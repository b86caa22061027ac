"""The files of a run of training.py: its state, its end, stops, and what is never lost."""

import contextlib
import errno
import io
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    SETTINGS, TINY_RUN, Gone, Training, assert_one_clear_line, launch, no_space, not_windows,
)

import sample
import training
from model import load_weights


def state_of(weights):
    return torch.load(weights.with_suffix(".state.pt"), weights_only=True)


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_weights(one, other):
    a, b = (torch.load(path, weights_only=True)["model"] for path in (one, other))
    for name in a:
        assert torch.equal(a[name], b[name]), name


def wait_for_state(weights, alive):
    state = training.state_beside(Path(weights))
    while not state.exists():
        assert alive()
        time.sleep(0.002)


def started(*arguments):
    """Starts a run, and returns it when its first evaluation has saved its state."""
    run = Training(*arguments)
    wait_for_state(arguments[3], run.process.is_alive)
    return run


@pytest.fixture(scope="module")
def stopped_run(small_corpus, tmp_path_factory):
    """The weights' name of a run that was stopped, with its state beside it."""
    weights = tmp_path_factory.mktemp("stopped") / "w.pt"
    run = started("--data", small_corpus, "--weights", weights, "--steps", 1_000_000, *TINY_RUN)
    run.process.terminate()
    run.wait()
    return weights


@pytest.fixture
def stop_at_once(monkeypatch):
    """Every run gets a signal before its first step, while this is not undone."""
    monkeypatch.setattr(training, "stop_signals",
                        lambda: contextlib.nullcontext([signal.SIGTERM]))
    return monkeypatch


@pytest.fixture
def resume(command):
    return partial(command, training.main, "--resume", "--device", "cpu", "--weights", code=0)


# ---- the end of a run


def test_a_run_moves_weights_aside_and_prints_how_to_write(whole_run, train, tmp_path, command):
    weights = tmp_path / "w.pt"
    weights.write_bytes(whole_run.read_bytes())
    ends = [train("--steps", 2) for _ in range(2)]
    assert (tmp_path / "w.1.pt").read_bytes() == whole_run.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["w.1.pt", "w.2.pt", "w.pt"]
    for n, end in enumerate(ends, start=1):
        moved, scored, written = end.stdout.splitlines()
        aside = tmp_path / f"w.{n}.pt"
        bound = load_weights(aside)[1]["val_nelbo"]
        assert moved == f"{weights} ({bound:.4f}) is {os.path.relpath(aside)} now"
        assert scored.startswith(f"{weights}: validation NELBO")
    words = written.removeprefix("write with it: uv run sample.py ").split()
    assert command(sample.main, *words, "--num-blocks", 1).stdout.strip()


def test_the_default_weights_need_no_flag_to_write_with():
    assert sample.sample_command(training.DEFAULT_WEIGHTS) == "uv run sample.py"


def test_a_full_disk_at_the_end_leaves_what_stood_there_and_resume_writes_the_weights(
    whole_run, train, resume, tmp_path, monkeypatch
):
    weights = tmp_path / "w.pt"
    weights.write_bytes(whole_run.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_weights", no_space)
        assert "--resume tries again" in train("--steps", 2, code=2).stderr
    assert weights.read_bytes() == whole_run.read_bytes()
    resume(weights)
    assert load_weights(weights)[1]["step"] == 2


def test_a_run_saves_its_last_weights_before_it_prints_their_bound(train, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Gone())
    train("--steps", 6, code=2)
    assert os.listdir(tmp_path) == ["w.pt"]


def test_a_run_resumed_at_its_end_evaluates_its_last_step(stopped_run, tmp_path, resume):
    state = state_of(stopped_run)
    state["args"]["steps"], state["run"]["log"], state["best"] = state["run"]["step"], [], {}
    torch.save(state, tmp_path / "w.state.pt")
    resume(tmp_path / "w.pt")
    assert load_weights(tmp_path / "w.pt")[1]["step"] == state["run"]["step"]


@not_windows
def test_a_run_writes_through_a_link(train, tmp_path):
    link, target = tmp_path / "link.pt", tmp_path / "target.pt"
    link.symlink_to("target.pt")
    for _ in range(2):
        train("--weights", link, "--steps", 6)
    assert link.is_symlink() and load_weights(target)
    assert training.state_beside(link) == training.state_beside(target)
    assert sorted(os.listdir(tmp_path)) == ["link.pt", "target.1.pt", "target.pt"]


# ---- stopped and resumed


@not_windows
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", 1)])
def test_a_resumed_run_ends_as_an_unbroken_run(signum, whole_run, small_corpus, tmp_path):
    files = ["--data", small_corpus, "--weights", tmp_path / "w.pt"]
    stopped = started(*files, "--steps", 18, *TINY_RUN)
    os.kill(stopped.process.pid, signum)
    stopped.wait()
    assert stopped.process.exitcode == 128 + signum and "--resume" in stopped.output
    assert not (tmp_path / "w.pt").exists()  # a run writes its weights at its end
    run = state_of(tmp_path / "w.pt")["run"]
    assert 6 <= run["step"] < 18
    assert len(run["log"]) <= run["step"] // 6  # a stop saves without an evaluation
    resumed = Training("--weights", tmp_path / "w.pt", "--resume", "--device", "cpu").wait()
    assert resumed.process.exitcode == 0, resumed.output
    assert_same_weights(tmp_path / "w.pt", whole_run)


def test_a_run_stopped_at_once_resumes_with_its_settings(train, resume, tmp_path, stop_at_once):
    weights = tmp_path / "my run 0.1.pt"
    stopped = train("--weights", weights, "--steps", 2, "--seed", 2, code=128 + signal.SIGTERM)
    assert stopped.stderr.endswith("after step 0; continue: uv run training.py --resume --weights="
                                   f"'{weights}'\n")
    assert os.listdir(tmp_path) == ["my run 0.1.state.pt"]  # that of "my run 0.2.pt" is another
    stop_at_once.undo()
    resume(weights)
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
    """SIGKILL at random moments of a run that saves after every step, until it ends by itself."""
    files, state = ["--data", small_corpus, "--weights", tmp_path / "w.pt"], tmp_path / "w.state.pt"
    moments, new = random.Random(0), ["--steps", 18, *TINY_RUN]
    for attempt in range(1, 100):
        settings = ["--resume", "--device", "cpu"] if state.exists() else new
        run = Training(*files, *settings, "--eval-interval", 1)
        run.process.join(0.2 * attempt * moments.random())  # later and later, or it might never end
        run.process.kill()
        run.wait()
        if state.exists():
            state_of(tmp_path / "w.pt")  # always whole
        elif (tmp_path / "w.pt").exists():
            break
    assert os.listdir(tmp_path) == ["w.pt"]  # no temporary file, no lock
    # The bounds of other steps may have chosen other weights, but the last step is the same
    log = [load_weights(path)[1]["log"][-1] for path in (tmp_path / "w.pt", whole_run)]
    assert log[0]["step"] == 18 and log[0]["held_nelbo"] == log[1]["held_nelbo"]


@not_windows
def test_a_run_resumes_in_another_folder_without_the_weights_that_it_started_from(
    whole_run, small_corpus, tmp_path, train, resume, stop_at_once
):
    for name, source in ("init.pt", whole_run), ("mine.txt", small_corpus):
        (tmp_path / name).write_bytes(source.read_bytes())
    (tmp_path / "elsewhere").mkdir()
    stop_at_once.chdir(tmp_path)
    train("--data", "mine.txt", "--weights", "w.pt", "--init", "init.pt", "--teachers", "init.pt",
          "--steps", 3, settings=SETTINGS, code=128 + signal.SIGTERM)
    stop_at_once.undo()
    stop_at_once.chdir(tmp_path / "elsewhere")
    (tmp_path / "init.pt").rename("init.pt")
    Path("other.txt").write_text("a rolling stone gathers no moss\n" * 60, encoding="utf-8")
    other = resume("../w.pt", "--teachers", "init.pt", "--data", "other.txt", code=2)
    assert_one_clear_line(other, "w.state.pt", "other texts")
    resume("../w.pt", "--teachers", "init.pt")


@not_windows
@pytest.mark.parametrize("flag, value, saved", [
    ("--steps", 99, 1_000_000), ("--seed", 1338, 1337), ("--n-layer", 6, 1),
    ("--batch-size", 64, 8),
])
def test_resume_refuses_other_settings_than_the_run_has(flag, value, saved, stopped_run, resume):
    """--n-layer 6 and --batch-size 64 are the parser's defaults, and refused all the same."""
    process = resume(stopped_run, flag, value, code=2)
    assert_one_clear_line(process, flag, f"{value}", "w.state.pt has", f"{saved}")


@not_windows
def test_resume_refuses_and_keeps_what_is_no_state(stopped_run, whole_run, tmp_path, resume):
    half = stopped_run.with_suffix(".state.pt").read_bytes()[:20_000]
    state, earlier_version, too_large = state_of(stopped_run), io.BytesIO(), io.BytesIO()
    torch.save({**state, "config": {**state["config"], "n_embd": 2**30}}, too_large)
    del state["best"]
    torch.save(state, earlier_version)
    refused = {"weights file": half, "nothing to resume": whole_run.read_bytes(),
               "best": earlier_version.getvalue(), "unusable": too_large.getvalue()}
    for word, contents in refused.items():
        (tmp_path / "w.state.pt").write_bytes(contents)
        assert_one_clear_line(resume(tmp_path / "w.pt", code=2), "w.state.pt", word)
        assert snapshot(tmp_path) == {"w.state.pt": contents}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")
def test_a_process_that_dies_ends_the_run_and_the_last_save_stays_whole(small_corpus, tmp_path):
    launcher = launch("training.py", "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--steps", 1_000_000, *TINY_RUN, processes=2)
    wait_for_state(tmp_path / "w.pt", lambda: launcher.poll() is None)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text("utf-8").split()
    os.kill(int(children[-1]), signal.SIGKILL)
    launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    state_of(tmp_path / "w.pt")  # whole


# ---- no file is lost, and none is left


def test_a_run_goes_on_when_the_reader_of_its_log_goes_away(small_corpus, tmp_path):
    process = launch("training.py", "--data", small_corpus, "--weights", tmp_path / "w.pt",
                     "--steps", 12, *TINY_RUN)
    process.stderr.close()
    assert process.wait(120) == 0
    assert load_weights(tmp_path / "w.pt")[1]["step"] == 12


def test_a_run_goes_on_when_the_disk_is_too_full_for_its_state(train, tmp_path):
    """A limit on the size of files stands in for the disk. torch.save turns the OSError of the file
    into a RuntimeError."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, before[1]))  # the state is larger
    try:
        process = train("--steps", 12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert process.stderr.count("not saved, the next save tries again: ") == 2
    assert load_weights(tmp_path / "w.pt")[1]["step"] == 12
    assert os.listdir(tmp_path) == ["w.pt"]


@pytest.mark.parametrize("stderr", [
    Gone(errno.ENOSPC), Gone(errno.EPIPE), Gone(errno.EIO, terminal=True), None,
], ids=["full disk", "reader gone", "closed terminal", "none: 2>&- or pythonw"])
def test_a_run_goes_on_when_its_log_cannot_be_written(stderr, train, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr)
    process = train("--steps", 12)
    assert "validation NELBO" in process.stdout and "training on" not in process.stdout
    assert load_weights(tmp_path / "w.pt")[1]["step"] == 12


@pytest.mark.parametrize("name", ["w.pt", "w.state.pt"])
def test_foreign_files_are_never_overwritten(name, train, small_corpus, tmp_path):
    (tmp_path / name).write_text("shall I compare thee\n" * 60, encoding="utf-8")
    before = snapshot(tmp_path)
    for data in small_corpus, tmp_path / name:  # nor does a run overwrite its text
        assert_one_clear_line(train("--data", data, "--steps", 3, code=2), name)
        assert snapshot(tmp_path) == before


def test_a_folder_is_refused_before_the_run_starts(train, tmp_path):
    (tmp_path / "w.pt").mkdir()
    assert_one_clear_line(train("--steps", 3, code=2), "w.pt")
    assert os.listdir(tmp_path) == ["w.pt"] and (tmp_path / "w.pt").is_dir()


@pytest.mark.skipif(not training.fcntl, reason="no locks")
def test_only_one_of_several_runs_that_start_at_once_claims_the_files(tmp_path):
    together, refusals = threading.Barrier(8, timeout=60), []

    def claim(_):
        together.wait()
        try:
            with training.claimed(tmp_path / "w.pt", resume=False):
                together.wait()  # until the others have been refused
        except training.BadInput as error:
            refusals.append(str(error))
            together.wait()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(claim, range(8)))
    assert len(refusals) == 7 and all("is going on" in refusal for refusal in refusals)
    assert not list(tmp_path.iterdir())


@not_windows
def test_no_run_touches_the_files_of_one_that_is_going_on_or_was_stopped(stopped_run, train):
    before = snapshot(stopped_run.parent)
    process = train("--weights", stopped_run, code=2)
    assert_one_clear_line(process, "w.state.pt holds a run", "--resume", "delete it")
    with training.claimed(stopped_run, resume=True):
        for words in ["--resume"], TINY_RUN:
            process = train("--weights", stopped_run, settings=words, code=2)
            assert_one_clear_line(process, "w.state.pt", "is going on")
    assert snapshot(stopped_run.parent) == before


def test_the_next_run_removes_what_a_killed_one_was_writing_and_nothing_else(train, tmp_path):
    mine = {"w.pt.tmp", "other.pt.12.tmp", "w.pt.draft.tmp"}
    for name in mine | {"w.pt.99999999.tmp", "w.state.pt.99999999.tmp"}:
        (tmp_path / name).touch()
    train("--steps", 2)
    assert set(os.listdir(tmp_path)) == {"w.pt"} | mine


def test_a_run_too_large_for_memory_says_so_and_leaves_nothing(train, tmp_path, monkeypatch):
    network = train("--steps", 2, "--n-embd", 1_000_000, code=2)
    with monkeypatch.context() as patch:  # a batch of a real size would take half a minute to fail
        patch.setattr(training, "draw_batch", lambda *_: torch.empty(2**60))
        batch = train("--steps", 2, code=2)
    for process in network, batch:
        assert "Traceback" not in process.stderr
        assert process.stderr.splitlines()[-1].startswith("error: out of memory")
    assert not list(tmp_path.iterdir())
    train("--steps", 2)
