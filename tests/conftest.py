"""Small models shared by the tests."""

import importlib
import itertools
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from model import DiffusionConfig, DiffusionTransformer, save_weights
from sample import run

ROOT = Path(__file__).resolve().parent.parent
TINY = DiffusionConfig(sequence_len=32, n_layer=2, n_head=2, n_embd=32, context_len=4)


def random_model(config=TINY, seed=0):
    """A model whose zero-initialised matrices are random too, so that its outputs say something."""
    torch.manual_seed(seed)
    model = DiffusionTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return model.eval()


class TableModel(torch.nn.Module):
    """Arbitrary logits for every possible x_t, so that expectations can be enumerated."""

    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        size = config.vocab_size**config.sequence_len
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(
            torch.randn(size, config.sequence_len, config.vocab_size, generator=generator)
        )

    def forward(self, x_t, t):
        place = self.config.vocab_size ** torch.arange(self.config.sequence_len)
        return self.table[(x_t * place).sum(1)]


def last(states):
    *_, x = states
    return x


def all_masks(length):
    return torch.tensor(list(itertools.product([False, True], repeat=length)))


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    save_weights(random_model(), {"step": 0}, path)
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """Calls a script's main with a command line, in this process: importing torch anew takes seconds."""

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        try:
            run(main)
            code = 0
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    return call


# Imports torch's optimizers once, which takes seconds, and forks a child for every run after that
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["training", "torch._dynamo"])


def _run_training(arguments, log):
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["training.py", *arguments]
    run(importlib.import_module("training").main)


class Training:
    """A run of training.py with a process of its own; `output` is what it prints to both streams."""

    def __init__(self, *arguments):
        self.log = Path(tempfile.mkstemp()[1])
        self.process = forks.Process(target=_run_training, args=([str(a) for a in arguments], str(self.log)))
        self.process.start()

    def wait(self):
        self.process.join(60)
        self.output = self.log.read_text()
        return self


def script(*arguments, cwd=None, env=None, **kwargs):
    """Runs one of the project's scripts as a user would, but for uv; returns the finished process."""
    name, *rest = map(str, arguments)
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **(env or {})}
    return subprocess.run([sys.executable, str(ROOT / name), *rest], capture_output=True, text=True,
                          timeout=120, cwd=cwd, env=settings, **kwargs)


def assert_one_clear_line(process, *words):
    assert process.returncode == 2, process.stderr
    assert len(process.stderr.strip().splitlines()) == 1, process.stderr
    for word in words:
        assert word in process.stderr
