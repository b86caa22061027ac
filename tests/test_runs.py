"""The files of a run of training.py: its state, its end, stops, and what is never lost."""

import contextlib
import errno
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
    SETTINGS, TINY_RUN, Gone, Training, assert_one_clear_line, launch, no_space,
)

import sample
import training
from model import load_weights

not_windows = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")


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
    while not state.exists() or not state.stat().st_size:
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


# ---- the end of a run


def test_a_run_moves_aside_what_stood_there_and_ends_with_the_command_that_writes(
    whole_run, small_corpus, tmp_path, command
):
    weights = tmp_path / "w.pt"
    weights.write_bytes(whole_run.read_bytes())
    arguments = ["--data", small_corpus, "--weights", weights, "--steps", 2, *TINY_RUN]
    ends = [command(training.main, *arguments) for _ in range(2)]
    assert (tmp_path / "w.1.pt").read_bytes() == whole_run.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["w.1.pt", "w.2.pt", "w.pt"]
    for n, end in enumerate(ends, start=1):
        moved, scored, written = end.stdout.splitlines()
        bound, aside = load_weights(tmp_path / f"w.{n}.pt")[1]["val_nelbo"], tmp_path / f"w.{n}.pt"
        assert moved == f"{weights} ({bound:.4f}) is {os.path.relpath(aside)} now"
        assert scored.startswith(f"{weights}: validation NELBO")
    words = written.removeprefix("write with it: uv run sample.py ").split()
    assert command(sample.main, *words, "--num-blocks", 1).stdout.strip()


def test_the_default_weights_need_no_flag_to_write_with():
    assert sample.sample_command(training.DEFAULT_WEIGHTS) == "uv run sample.py"


def test_a_full_disk_at_the_end_leaves_what_stood_there_and_resume_writes_the_weights(
    whole_run, small_corpus, tmp_path, command, monkeypatch
):
    weights = tmp_path / "w.pt"
    weights.write_bytes(whole_run.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_weights", no_space)
        failed = command(training.main, "--data", small_corpus, "--weights", weights,
                         "--steps", 2, *TINY_RUN)
    assert failed.returncode == 2 and "--resume tries again" in failed.stderr
    assert weights.read_bytes() == whole_run.read_bytes()
    resumed = command(training.main, "--resume", "--weights", weights, "--device", "cpu")
    assert resumed.returncode == 0, resumed.stderr
    assert load_weights(weights)[1]["step"] == 2


def test_a_run_that_is_resumed_at_its_end_evaluates_its_last_step(stopped_run, tmp_path, command):
    state = state_of(stopped_run)
    state["args"]["steps"], state["run"]["log"], state["best"] = state["run"]["step"], [], {}
    torch.save(state, tmp_path / "w.state.pt")
    process = command(training.main, "--resume", "--weights", tmp_path / "w.pt", "--device", "cpu")
    assert process.returncode == 0, process.stderr
    assert load_weights(tmp_path / "w.pt")[1]["step"] == state["run"]["step"]


def test_a_run_saves_its_last_weights_before_it_prints_their_bound(
    small_corpus, tmp_path, command, monkeypatch
):
    monkeypatch.setattr(sys, "stdout", Gone())
    command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt", "--steps", 6,
            *TINY_RUN)
    assert os.listdir(tmp_path) == ["w.pt"]


@not_windows
def test_a_run_writes_through_a_link(small_corpus, tmp_path, command):
    (tmp_path / "link.pt").symlink_to("target.pt")
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "link.pt",
                      "--steps", 6, *TINY_RUN)
    assert process.returncode == 0, process.stderr
    command(training.main, "--data", small_corpus, "--weights", tmp_path / "link.pt",
            "--steps", 6, *TINY_RUN)
    link, target = tmp_path / "link.pt", tmp_path / "target.pt"
    assert link.is_symlink() and load_weights(target)
    assert training.state_beside(link) == training.state_beside(target)
    assert sorted(os.listdir(tmp_path)) == ["link.pt", "target.1.pt", "target.pt"]


# ---- stopped and resumed


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
    assert not (tmp_path / "w.pt").exists()  # a run writes its weights at its end
    run = state_of(tmp_path / "w.pt")["run"]
    assert 6 <= run["step"] < 18
    assert len(run["log"]) <= run["step"] // 6  # a stop saves without an evaluation
    resumed = Training("--weights", tmp_path / "w.pt", "--resume", "--device", "cpu").wait()
    assert resumed.process.exitcode == 0, resumed.output
    assert_same_weights(tmp_path / "w.pt", whole_run)


def test_a_run_that_is_stopped_before_its_first_step_resumes_with_its_settings(
    small_corpus, tmp_path, command, stop_at_once
):
    weights = tmp_path / "my run.pt"
    stopped = command(training.main, "--data", small_corpus, "--weights", weights, "--steps", 2,
                      "--seed", 2, *TINY_RUN)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert stopped.stderr.endswith("after step 0; continue: uv run training.py --resume --weights "
                                   f"'{weights}'\n")
    stop_at_once.undo()
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

    def begin(eval_interval):
        saved = state.exists() and state.stat().st_size
        settings = ["--resume", "--device", "cpu"] if saved else ["--steps", 18, *TINY_RUN]
        return Training(*files, *settings, "--eval-interval", eval_interval)

    for _ in range(10):
        victim = begin(eval_interval=1)
        time.sleep(moments.uniform(0.1, 1.0))
        victim.process.kill()
        victim.wait()
        if (tmp_path / "w.pt").exists() and not state.exists():
            break  # it had ended
        if state.exists() and state.stat().st_size:
            state_of(tmp_path / "w.pt")  # always whole
    if state.exists() or not (tmp_path / "w.pt").exists():
        resumed = begin(eval_interval=6).wait()
        assert resumed.process.exitcode == 0, resumed.output
    assert os.listdir(tmp_path) == ["w.pt"]  # no temporary file, no lock
    # The bounds of other steps may have chosen other weights, but the last step is the same
    log = [load_weights(path)[1]["log"][-1] for path in (tmp_path / "w.pt", whole_run)]
    assert log[0]["step"] == 18 and log[0]["held_nelbo"] == log[1]["held_nelbo"]


@not_windows
def test_a_run_resumes_in_another_folder_without_the_weights_that_it_started_from(
    whole_run, small_corpus, tmp_path, command, stop_at_once
):
    for name, source in ("init.pt", whole_run), ("mine.txt", small_corpus):
        (tmp_path / name).write_bytes(source.read_bytes())
    (tmp_path / "elsewhere").mkdir()
    stop_at_once.chdir(tmp_path)
    command(training.main, "--data", "mine.txt", "--weights", "w.pt", "--init", "init.pt",
            "--teachers", "init.pt", "--steps", 3, *SETTINGS)
    stop_at_once.undo()
    stop_at_once.chdir(tmp_path / "elsewhere")
    (tmp_path / "init.pt").rename("init.pt")
    Path("other.txt").write_text("a rolling stone gathers no moss\n" * 60, encoding="utf-8")
    words = ["--resume", "--weights", "../w.pt", "--device", "cpu", "--teachers", "init.pt"]
    other = command(training.main, *words, "--data", "other.txt")
    assert_one_clear_line(other, "w.state.pt", "other texts")
    moved = command(training.main, *words)
    assert moved.returncode == 0, moved.stderr


@not_windows
@pytest.mark.parametrize("flag, value, saved", [
    ("--steps", 99, 1_000_000), ("--seed", 1338, 1337), ("--n-layer", 6, 1),
    ("--batch-size", 64, 8),
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


def test_resume_refuses_the_state_of_an_earlier_version(stopped_run, tmp_path, command):
    state = state_of(stopped_run)
    del state["best"]
    torch.save(state, tmp_path / "w.state.pt")
    process = command(training.main, "--resume", "--weights", tmp_path / "w.pt", "--device", "cpu")
    assert_one_clear_line(process, "w.state.pt", "best")


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


def test_a_save_that_fails_is_tried_again(small_corpus, tmp_path, command, monkeypatch):
    save, failures = torch.save, [1, 0, 0]  # of saves in turn

    def fail_once(*arguments):
        if failures and failures.pop(0):
            no_space()
        save(*arguments)

    monkeypatch.setattr(torch, "save", fail_once)
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--steps", 12, *TINY_RUN)
    assert process.returncode == 0 and not failures
    assert process.stderr.count("not saved, the next save tries again: No space left") == 1
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
    monkeypatch.setattr(sys, "stderr", Gone(number, terminal))
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--steps", 12, *TINY_RUN)
    assert process.returncode == 0 and "validation NELBO" in process.stdout
    assert load_weights(tmp_path / "w.pt")[1]["step"] == 12


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


@pytest.mark.skipif(not training.fcntl, reason="no locks")
def test_only_one_of_several_runs_that_start_at_once_claims_the_files(tmp_path):
    together, refusals, ended = threading.Barrier(8), [], threading.Event()

    def claim():
        together.wait()
        try:
            with training.claimed(tmp_path / "w.pt", resume=False):
                ended.wait(60)
        except training.BadInput as error:
            refusals.append(str(error))
            if len(refusals) == 7:
                ended.set()

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refusals) == 7 and all("is going on" in refusal for refusal in refusals)
    assert not list(tmp_path.iterdir())


@not_windows
@pytest.mark.parametrize("words", [["--resume"], TINY_RUN], ids=["resumed", "new"])
def test_no_second_run_touches_the_files_of_one_that_is_going_on(
    words, stopped_run, small_corpus, command
):
    before = snapshot(stopped_run.parent)
    with training.claimed(stopped_run, resume=True):
        process = command(training.main, "--data", small_corpus, "--weights", stopped_run, *words,
                          "--device", "cpu")
    assert_one_clear_line(process, "w.state.pt", "is going on")
    assert snapshot(stopped_run.parent) == before


@not_windows
def test_a_new_run_does_not_replace_the_state_of_a_stopped_one(stopped_run, small_corpus, command):
    before = snapshot(stopped_run.parent)
    process = command(training.main, "--data", small_corpus, "--weights", stopped_run, *TINY_RUN)
    assert_one_clear_line(process, "w.state.pt holds a run", "--resume", "delete it")
    assert snapshot(stopped_run.parent) == before


def test_the_next_run_removes_what_a_killed_one_was_writing_and_nothing_else(
    small_corpus, tmp_path, command
):
    mine = {"w.pt.tmp", "other.pt.12.tmp", "w.pt.draft.tmp"}
    for name in mine | {"w.pt.99999999.tmp", "w.state.pt.99999999.tmp", "w.state.pt"}:
        (tmp_path / name).touch()
    process = command(training.main, "--data", small_corpus, "--weights", tmp_path / "w.pt",
                      "--steps", 2, *TINY_RUN)
    assert process.returncode == 0, process.stderr
    assert set(os.listdir(tmp_path)) == {"w.pt"} | mine


def test_a_run_that_does_not_fit_into_memory_ends_in_one_line_and_leaves_nothing(
    small_corpus, tmp_path, command, monkeypatch
):
    arguments = ["--data", small_corpus, "--weights", tmp_path / "w.pt", "--steps", 2, *TINY_RUN]
    network = command(training.main, *arguments, "--n-embd", 1_000_000)
    with monkeypatch.context() as patch:  # a batch of a real size would take half a minute to fail
        patch.setattr(training, "draw_batch", lambda *_: torch.empty(2**60))
        batch = command(training.main, *arguments)
    for process in network, batch:
        assert process.returncode == 2 and "Traceback" not in process.stderr
        assert process.stderr.splitlines()[-1].startswith("error: out of memory")
    assert not list(tmp_path.iterdir())
    assert command(training.main, *arguments).returncode == 0


@not_windows
def test_a_name_that_is_too_long_for_the_file_system_is_refused_at_once(
    small_corpus, tmp_path, command
):
    process = command(training.main, "--data", small_corpus, "--weights",
                      tmp_path / ("a" * 245 + ".pt"), "--steps", 2, *TINY_RUN)
    assert process.returncode == 2 and "too long" in process.stderr
    assert "step 2" not in process.stderr and not list(tmp_path.iterdir())


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


def test_init_from_weights_of_an_absurd_size_is_refused_in_one_line(
    whole_run, small_corpus, tmp_path, command
):
    contents = torch.load(whole_run, weights_only=True)
    contents["config"]["n_embd"] = 2**30
    torch.save(contents, tmp_path / "huge.pt")
    assert_one_clear_line(command(training.main, "--data", small_corpus, "--weights",
                                  tmp_path / "w.pt", "--init", tmp_path / "huge.pt", "--steps", 6,
                                  *SETTINGS), "huge.pt")


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
