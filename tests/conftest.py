"""What the tests share: small models, texts and runs, a terminal, and four ways to run a script:

    command     calls its main in this process: the fastest, for all that ends by itself
    Training    training.py in a forked process: for signals, kills and runs that go on
    script      as a user types it, to its end: for torchrun, and for what the process itself does
    launch      as script, but returns at once: to close its pipes or kill it
"""

import os
import signal

# The tests run alike in an editor's dumb terminal, a notebook, a cluster's job and on busy cores
os.environ |= {"TERM": "xterm", "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
for name in ("COLUMNS", "LINES", "NO_COLOR", "MPLBACKEND", "PYTHONIOENCODING", "RANK", "WORLD_SIZE",
             "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
    os.environ.pop(name, None)

import contextlib
import errno
import io
import itertools
import json
import multiprocessing
import re
import struct
import subprocess
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

import training
from model import DiffusionConfig, DiffusionTransformer, save_weights, start

ROOT = Path(__file__).resolve().parent.parent
TINY = DiffusionConfig(sequence_len=32, n_layer=2, n_head=2, n_embd=32, context_len=4)
not_windows = pytest.mark.skipif(sys.platform == "win32", reason="Windows works otherwise here")


def random_model(config=TINY, seed=0):
    """A model whose zero-initialised matrices are random too. With zeros in the output head, every
    input would give the same probabilities."""
    torch.manual_seed(seed)
    model = DiffusionTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return model.eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# A run of training.py that takes a second
SIZES = ["--n-layer", 1, "--n-embd", 16, "--n-head", 1, "--sequence-len", 32, "--context-len", 4]
SETTINGS = ["--batch-size", 8, "--eval-interval", 6, "--no-compile", "--device", "cpu"]
TINY_RUN = [*SIZES, *SETTINGS]


class TableModel(torch.nn.Module):
    """Arbitrary probabilities for every possible x_t, so that expectations can be enumerated."""

    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        size = config.vocab_size**config.sequence_len, config.sequence_len, config.vocab_size
        self.table = torch.nn.Parameter(torch.randn(size, generator=seeded(seed)))

    def forward(self, x_t, index):
        place = self.config.vocab_size ** torch.arange(self.config.sequence_len)
        logits = self.table[(x_t * place).sum(1)].clone()
        logits[..., self.config.mask_token_id] = -torch.inf
        return logits.log_softmax(-1)


class Screen:
    """A pseudo-terminal of a given size, for code that runs in this process. `text()` closes `out`
    and returns what a person has seen there, including lines that scrolled away."""

    def __init__(self, rows=60, cols=100):
        fcntl = pytest.importorskip("fcntl")  # not on Windows
        import pty
        import termios

        self.cols = cols
        self.master, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
        self.out = open(terminal, "w", encoding="utf-8")
        self.received = b""
        self.reader = threading.Thread(target=self.receive)
        self.reader.start()

    def receive(self):
        with contextlib.suppress(OSError):  # Linux says EIO when the other end closes
            while more := os.read(self.master, 65536):
                self.received += more

    @contextlib.contextmanager
    def shown(self):
        """Inside, the screen stands for stdout and stderr."""
        with contextlib.redirect_stdout(self.out), contextlib.redirect_stderr(self.out):
            yield

    def text(self):
        self.out.close()
        self.reader.join(60)
        os.close(self.master)
        lines, row, col = [""], 0, 0
        for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.", self.received.decode(), re.DOTALL):
            count = int(re.sub(r"\D", "", token) or 1) if len(token) > 1 else 0
            if token == "\r":
                col = 0
            elif token == "\n":
                row += 1
                lines += [""] * (row == len(lines))
            elif token[-1] in "AF" and count:
                row, col = max(0, row - count), col if token[-1] == "A" else 0
            elif token[-1] == "K" and count:
                lines[row] = lines[row][:col]
            elif len(token) == 1:
                if col == self.cols:
                    row, col = row + 1, 0
                    lines += [""] * (row == len(lines))
                lines[row] = lines[row].ljust(col)[:col] + token + lines[row][col + 1 :]
                col += 1
        return "\n".join(line.rstrip() for line in lines)


@pytest.fixture
def screen():
    return Screen()


def no_space(*_):
    """Stands in for a function that writes to a full disk."""
    raise OSError("No space left on device")


def last(states):
    *_, x = states
    return x


def partly_masked(batch, length, share, seed):
    generator = seeded(seed)
    x = torch.randint(1, 128, (batch, length), generator=generator)
    return x.masked_fill(torch.rand(batch, length, generator=generator) < share, 0)


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    save_weights(random_model(), {"step": 0}, path)
    return path


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 60, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def whole_run(small_corpus, tmp_path_factory):
    """The weights of a run of 18 steps."""
    weights = tmp_path_factory.mktemp("run") / "w.pt"
    files = ["--data", small_corpus, "--weights", weights]
    run = Training(*files, "--steps", 18, *TINY_RUN).wait()
    assert run.process.exitcode == 0, run.output
    return weights


@pytest.fixture
def learned(monkeypatch):
    """A list that gets the text from which a training step draws its batch, at every step."""
    texts, draw_batch = [], training.draw_batch

    def spy(text, *rest):
        texts.append(text)
        return draw_batch(text, *rest)

    monkeypatch.setattr(training, "draw_batch", spy)
    return texts


class Gone(io.StringIO):
    """A stream that can't be written: a full disk, or a closed terminal."""

    def __init__(self, number=errno.ENOSPC, terminal=False):
        super().__init__()
        self.number, self.terminal = number, terminal

    def write(self, text):
        raise OSError(self.number, "gone")

    def isatty(self):
        return self.terminal


def island(page):
    """The trace inside a page: as in a browser, the script element ends at the first end tag."""
    pattern = '<script [^>]*id="trace">(.*?)</script'
    return json.loads(re.search(pattern, page, re.DOTALL | re.IGNORECASE)[1])


@pytest.fixture
def command(capsys):
    """Calls a script's main in this process, because a new process would import torch for seconds.
    Returns exit code, stdout and stderr. If `code` is given, the exit code has to be that."""

    def call(main, *arguments, code=None):
        try:
            start(partial(main, [str(argument) for argument in arguments]))
            found = 0
        except SystemExit as exit:
            found = exit.code
        out, err = capsys.readouterr()
        assert code in (None, found), err
        return subprocess.CompletedProcess(arguments, found, out, err)

    return call


@pytest.fixture
def train(command, small_corpus, tmp_path):
    """Calls training.py for a tiny run that learns the small corpus and writes tmp_path/w.pt, or
    does what further flags say. Returns as `command`."""

    def call(*flags, settings=TINY_RUN, code=0):
        files = ["--data", small_corpus, "--weights", tmp_path / "w.pt"]
        return command(training.main, *files, *settings, *flags, code=code)

    return call


if hasattr(signal, "SIGHUP"):  # nohup ignores it, and the scripts under test would inherit that
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A fork server, where the platform has one, imports training.py and torch's compiler once for all
# runs; that takes seconds
methods = multiprocessing.get_all_start_methods()
forks = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
if "forkserver" in methods:
    forks.set_forkserver_preload(["training", "torch._dynamo"])


def _run_training(arguments, log):
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["training.py", *arguments]
    start(training.main)


class Training:
    """A run of training.py in a process of its own. `output` is what the run prints to stdout and
    stderr; `wait` sets it."""

    def __init__(self, *arguments):
        self.log = Path(tempfile.mkstemp()[1])
        arguments = [str(argument) for argument in arguments]
        self.process = forks.Process(target=_run_training, args=(arguments, str(self.log)))
        self.process.start()

    def wait(self):
        self.process.join(120)
        self.output = self.log.read_text(encoding="utf-8")
        return self


def launch(name, *arguments, processes=None, cwd=None, env=None):
    """Starts one of the project's scripts as a user would, but without uv. If `processes` is given,
    torchrun starts so many."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [sys.executable, *(torchrun if processes else []), ROOT / name, *arguments]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **(env or {})}
    return subprocess.Popen(
        [str(word) for word in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, encoding="utf-8", cwd=cwd, env=settings,
    )


def script(name, *arguments, stdin="", **kwargs):
    """Runs one of the project's scripts to its end."""
    process = launch(name, *arguments, **kwargs)
    out, err = process.communicate(stdin, timeout=180)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def assert_every_call_unmasks(states):
    """The states of `denoise`, the first one included, keep what is known and fill all blanks."""
    for before, after in itertools.pairwise(states):
        known = before != 0
        assert torch.equal(after[known], before[known])
        open_rows = (~known).any(1)
        assert ((after == 0).sum(1) < (before == 0).sum(1))[open_rows].all()
    assert (states[-1] != 0).all() and (states[-1] < 128).all()
    assert len(states) - 1 <= (states[0] == 0).sum(1).max()  # no more calls than masked positions


def assert_one_clear_line(process, *words):
    assert process.returncode == 2, process.stderr
    assert len(process.stderr.strip().splitlines()) == 1, process.stderr
    for word in words:
        assert word in process.stderr
