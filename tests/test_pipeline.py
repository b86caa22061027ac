"""From nothing to weights: the GPT twin, exact likelihoods, and weights/make.sh."""

import hashlib
import itertools
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import benchmark_likelihood as likelihood
import causal_twin
import pytest
import torch
from causal_twin import continue_causally, make_causal, next_log_p, nll_of
from conftest import ROOT, SIZES, TableModel, forks, random_model

from model import DEFAULT_DATA, DiffusionConfig, load_weights, nelbo, save_weights
from sample import draw


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def exact_arithmetic(monkeypatch):
    monkeypatch.setattr("model.multiplies_bf16", lambda device: False)


# Likelihoods --------------------------------------------------------------------------------------


def every_text(length, vocab_size):
    return torch.tensor(list(itertools.product(range(1, vocab_size), repeat=length)))


@torch.no_grad()
@pytest.mark.parametrize("score", [likelihood.left_to_right, likelihood.most_confident_first])
def test_exact_likelihoods_sum_to_one_over_all_texts(score):
    config = DiffusionConfig(sequence_len=3, vocab_size=4, diffusion_steps=5, context_len=0)
    nll = score(TableModel(config), every_text(3, 4))
    assert (-3 * nll).exp().sum().item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_bounds_of_the_likelihood_benchmark_match_nelbo_and_meet_in_continuous_time():
    config = DiffusionConfig(sequence_len=3, vocab_size=4, diffusion_steps=5, context_len=0)
    model, x_0 = TableModel(config), torch.tensor([1, 3, 2])
    expected, error = nelbo(model, x_0.repeat(500), passes=8)
    discrete, _ = likelihood.bounds(model, x_0.expand(500, 3), draws=30, seed=1)
    assert discrete.mean().item() == pytest.approx(expected, abs=4.5 * error + 0.01)
    config = replace(config, diffusion_steps=100_000)  # nearly continuous time
    discrete, continuous = likelihood.bounds(TableModel(config), x_0.expand(9, 3), 30, seed=1)
    torch.testing.assert_close(discrete, continuous, rtol=1e-3, atol=0)


@pytest.fixture
def three_models(tmp_path):
    paths = [tmp_path / f"{name}.pt" for name in ("student", "twin_0", "twin_1")]
    for seed, path in enumerate(paths):
        save_weights(random_model(seed=seed), {"causal": True} if seed else {}, path)
    return paths


def test_the_table_compares_every_row_with_the_first_on_the_same_windows(three_models, command):
    student, *twins = three_models
    table = command(likelihood.main, student, f"{twins[0]}+{twins[1]}", "--windows", 3)
    lines = [line.split(" | ") for line in table.stdout.splitlines()[4:]]
    assert [line[:2] for line in lines] == [
        ["| student", "bound, 128 steps"], ["| student", "bound, continuous time"],
        ["| student", "left to right"], ["| twin_0 and 1 more", "exact"],
    ]
    nats = [float(line[2].split()[0]) for line in lines]
    gaps = [float(line[4].split()[0]) for line in lines]
    assert gaps == pytest.approx([0, nats[1] - nats[0], nats[2] - nats[0], nats[3] - nats[2]],
                                 abs=2e-4)


def test_the_nats_of_every_window_are_kept_and_not_computed_again(three_models, command, tmp_path,
                                                                 monkeypatch):
    arguments = (*three_models[:2], "--windows", 6, "--csv", tmp_path / "nats.csv")
    calls, left_to_right = [], likelihood.left_to_right
    monkeypatch.setattr(likelihood, "left_to_right",
                        lambda model, x: calls.append(len(x)) or left_to_right(model, x))
    before = command(likelihood.main, *arguments)
    kept = (tmp_path / "nats.csv").read_text().splitlines()
    assert len(kept) == 1 + 6 * 4 and calls == [4, 2]
    assert command(likelihood.main, *arguments).stdout == before.stdout and calls == [4, 2]
    stopped = [line for line in kept if "left" not in line or ",3," in line or ",0," in line]
    (tmp_path / "nats.csv").write_text("\n".join(stopped) + "\n")
    assert command(likelihood.main, *arguments).stdout == before.stdout


# The GPT twin -------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_gpt_twin_predicts_each_character_from_the_characters_before():
    model = make_causal(random_model())
    x_0 = torch.randint(1, 128, (2, 32))
    changed = x_0.clone()
    changed[:, 20] = x_0[:, 20] % 127 + 1
    before, after = (nll_of(next_log_p(model, x), x) for x in (x_0, changed))
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.isclose(before[:, 20:], after[:, 20:]).all(0).any()


@torch.no_grad()
@pytest.mark.parametrize("multiple", [1, 8])  # as on a CPU; as on a GPU, where they are 64
@pytest.mark.parametrize("given", [0, 1, 9])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_kept_keys_do_not_change_the_text_of_a_gpt_twin(given, multiple, temperature, monkeypatch):
    monkeypatch.setitem(causal_twin.REACH, "cpu", multiple)
    model, same = random_model(), random_model()
    x = x_plain = torch.randint(1, 128, (3, given))
    kept = continue_causally([model, same], x, 32 - given, temperature, seeded(5))
    generator, index = seeded(5), torch.zeros(3, dtype=torch.long)
    make_causal(model)
    while x_plain.size(1) < 32:
        shifted = torch.nn.functional.pad(x_plain, (1, 0))          # 0 is [MASK]
        new = draw(model(shifted, index)[:, -1:], temperature, generator)
        x_plain = torch.cat((x_plain, new), 1)
    assert torch.equal(kept, x_plain)
    assert model.cos.size(0) == 32  # the rotary tables are whole again


@torch.no_grad()
def test_several_gpt_twins_write_from_the_mean_of_their_probabilities():
    twins, begin = [random_model(seed=1), random_model(seed=2)], torch.zeros(50, 1).long()
    p = sum(twin(begin, begin[:, 0]).exp() for twin in twins) / 2  # of one position
    expected = draw(p.log(), 1.0, seeded(0))
    written = continue_causally(twins, begin[:, :0], 1, 1.0, seeded(0))
    assert torch.equal(written, expected) and len(written.unique()) > 10


def test_the_text_of_gpt_twins_has_the_length_and_the_seed_asked_for(three_models, command,
                                                                   tmp_path):
    def text(seed):
        out = tmp_path / "fresh.txt"
        written = command(causal_twin.main, "--twins", *three_models[1:], "--write", 200,
                          "--streams", 3, "--seeds", seed, "--out", out)
        assert written.returncode == 0, written.stderr
        return out.read_text()

    first = text(4)
    assert 200 <= len(first) <= 200 + 3 * 16 + 2  # up to half a window more in each stream
    assert text(4) == first != text(5)


def test_the_fitted_temperature_is_the_one_at_which_the_text_was_drawn():
    """The twins write the text at temperature 1.2. At 1, they are too sure of their own text."""
    twins = [make_causal(random_model(seed=1)), make_causal(random_model(seed=2))]
    x = torch.empty(400, 0, dtype=torch.long)
    x = continue_causally(twins, x, 32, 1.2, seeded(3))
    fitted = causal_twin.fit_temperature(twins, x.flatten())
    assert min(fitted, key=fitted.get) == pytest.approx(1.2, abs=0.05)
    assert fitted[1.0] == pytest.approx(causal_twin.nats(twins, x.flatten()), abs=1e-5)


def twin(command, folder, *arguments, seeds=(0,), text=None):
    """Trains twins for ten steps of 128 characters; the last file."""
    if text is None:
        text = DEFAULT_DATA.read_text()[:3000]
    (folder / "text.txt").write_text(text)
    trained = command(causal_twin.main, "--data", folder / "text.txt", *arguments, *SIZES,
                      "--weights", folder / "twin_{seed}.pt", "--seeds", *seeds,
                      "--characters", 1280, "--batch-size", 4, "--no-compile")
    assert trained.returncode == 0, trained.stderr
    return load_weights(folder / f"twin_{seeds[-1]}.pt", causal=True)


def equal(model, other):
    other = other.state_dict()
    return all(torch.equal(x, other[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("held_out, kept_at", [("ab", 1), ("aa", 10)])
def test_the_weights_of_a_gpt_twin_are_chosen_on_text_that_it_does_not_learn(
        held_out, kept_at, command, tmp_path, monkeypatch):
    """It learns a's. The first step has learning rate zero; from then on a b becomes unlikely."""
    monkeypatch.setattr(causal_twin, "EVAL_INTERVAL", 1)
    text = 135 * held_out + 2430 * "a" + 300 * "c"  # c's validate
    _, meta = twin(command, tmp_path, text=text)
    assert meta["step"] == kept_at
    if held_out == "ab":
        assert meta["held_nll"] == pytest.approx(math.log(127), abs=1e-4)


def test_gpt_twins_of_one_command_are_those_of_a_command_for_each_seed(command, tmp_path):
    together, _ = twin(command, tmp_path, seeds=(3, 4))
    alone, _ = twin(command, tmp_path, seeds=(4,))
    assert equal(together, alone)
    assert equal(together, load_weights(tmp_path / "twin_4.1.pt", causal=True)[0])
    assert not equal(together, load_weights(tmp_path / "twin_3.pt", causal=True)[0])


def test_a_gpt_twin_that_was_stopped_continues_as_if_it_never_was(command, tmp_path, monkeypatch):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole, meta = twin(command, tmp_path / "whole")
    monkeypatch.setattr(causal_twin, "SAVE_SECONDS", -1)
    steps, update = [], causal_twin.update

    def stopping(*arguments):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        update(*arguments)

    monkeypatch.setattr(causal_twin, "update", stopping)
    with pytest.raises(AssertionError):
        twin(command, tmp_path / "stopped")
    with pytest.raises(AssertionError, match="weight_decay"):  # another run's state
        twin(command, tmp_path / "stopped", "--weight-decay", 0.1)
    continued, same_meta = twin(command, tmp_path / "stopped")
    assert equal(continued, whole) and same_meta == meta and len(steps) == 11
    assert not list(tmp_path.glob("stopped/*.state.pt"))


def test_a_gpt_student_learns_the_mean_probabilities_of_its_teachers_beside_the_text():
    student, *teachers = (make_causal(random_model(seed=seed)) for seed in range(3))
    x_0 = torch.randint(1, 128, (2, 32), generator=seeded(0))
    p, *q = (next_log_p(model, x_0).double().exp() for model in (student, *teachers))
    terms = [
        -0.5 * p[b, i, x_0[b, i]].log() - 0.5 * sum(
            (q[0][b, i, v] + q[1][b, i, v]) / 2 * p[b, i, v].log() for v in range(1, 128)
        ) for b in range(2) for i in range(32)
    ]
    loss = causal_twin.batch_loss(student, x_0, teachers)
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), abs=1e-5)
    assert causal_twin.batch_loss(student, x_0, []).item() == pytest.approx(
        nll_of(p.log(), x_0).mean().item(), abs=1e-5)


def test_the_first_text_has_its_share_of_the_windows_and_no_window_joins_two_texts():
    text = torch.cat((torch.full((100,), 1), torch.full((5000,), 2)))
    curriculum = causal_twin.FROM_SCRATCH._replace(first_len=100, first_share=0.25)
    x_0 = causal_twin.draw_windows(text, 4000, 32, seeded(0), curriculum)
    assert (x_0 == x_0[:, :1]).all()
    assert (x_0[:, 0] == 1).float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("arguments, words", [
    (("--write", "5"), "--write needs --out"), (("--seeds", "1", "2"), "{seed}"),
    (("--weights", "x.state.pt"), "x.state.pt"),
])
def test_a_gpt_twin_that_has_no_file_to_write_says_so(arguments, words, command):
    refused = command(causal_twin.main, *arguments)
    assert refused.returncode == 2 and words in refused.stderr


# weights/make.sh ----------------------------------------------------------------------------------

# In place of Python: the test runs each command in a process that has imported torch already
CLIENT = """#!/bin/sh
case "$*" in *"$REAL"*) exec {python} "$@" ;; esac
printf '%s\\n' "$@" > {folder}/asked.part
mv {folder}/asked.part {folder}/asked
until [ -e {folder}/answer ]; do sleep 0.02; done
cat {folder}/printed
code=$(cat {folder}/answer)
rm {folder}/answer
exit "$code"
"""


def run_script(arguments, printed):
    for descriptor, path in (1, printed), (2, f"{printed}.log"):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(ROOT)  # make.sh names its scripts from there
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


class Make:
    """weights/make.sh at test size. `asked` are the scripts that it ran and their results' names,
    but for commands with `real` in them, for which it starts Python itself."""

    def __init__(self, folder, real="none"):
        self.folder, self.asked = folder, []
        client = folder / "python"
        client.write_text(CLIENT.format(python=sys.executable, folder=folder))
        client.chmod(0o755)
        self.process = subprocess.Popen(
            ["bash", ROOT / "weights" / "make.sh", "test", folder / "results"], encoding="utf-8",
            env={**os.environ, "PYTHON": str(client), "REAL": real, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )

    def serve(self, until=lambda: False):
        """Answers its commands until it ends."""
        while self.process.poll() is None and not until():
            if not (self.folder / "asked").exists():
                time.sleep(0.02)
                continue
            arguments = (self.folder / "asked").read_text().splitlines()
            (self.folder / "asked").unlink()
            self.asked.append(arguments)
            script = forks.Process(target=run_script, args=(arguments, self.folder / "printed"))
            script.start()
            script.join(600)
            (self.folder / "answer").write_text(str(script.exitcode))


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_make_goes_from_the_corpus_to_the_table_and_continues_after_a_stop(tmp_path):
    results, state = tmp_path / "results", tmp_path / "results" / "student.state.pt"
    stopped = Make(tmp_path, real="results/student.pt --")
    stopped.serve(until=lambda: state.exists() and state.stat().st_size)
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.process.wait(600) == 143
    assert state.stat().st_size and not (results / "student.pt").exists()

    continued = Make(tmp_path)
    continued.serve()
    printed = continued.process.stdout.read()
    assert continued.process.returncode == 0, printed
    assert [Path(words[2]).stem for words in continued.asked if "--weights" in words] == [
        "student", "gpt_student", "plain", "plain_gpt"]
    assert "--resume" in continued.asked[0] and not state.exists()
    assert set(os.listdir(results)) == {
        "text.txt", "fresh_0.txt", "make.tsv", "likelihood.md", "likelihood.csv",
        *(f"{name}.pt" for name in ("twin_0", "twin_1", "teacher", "student", "gpt_student",
                                    "plain", "plain_gpt")),
    }
    table = (results / "likelihood.md").read_text()
    assert table in printed and table.count("left to right") == 2
    log = [line.split("\t") for line in (results / "make.tsv").read_text().splitlines()]
    assert [(line[1], line[2]) for line in log[1:]] == [
        ("twin_0.pt", "0"), ("twin_1.pt", "0"), ("fresh_0.txt", "0"), ("teacher.pt", "0"),
        ("student.pt", "stopped"), ("student.pt", "0"), ("gpt_student.pt", "0"), ("plain.pt", "0"),
        ("plain_gpt.pt", "0"), ("likelihood.md", "0"),
    ]
    for _, result, code, _, sha256, *_ in log[1:]:
        if code == "0":
            assert sha256 == hashlib.sha256((results / result).read_bytes()).hexdigest()
