"""From nothing to weights: the GPT twin, exact likelihoods, and weights/make.sh."""

import hashlib
import itertools
import math
import os
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import benchmark_likelihood as likelihood
import causal_twin
import pytest
import torch
from causal_twin import continue_causally, make_causal, next_log_p, nll_of
from conftest import ROOT, SIZES, TINY, TableModel, forks, random_model

from model import DEFAULT_DATA, DiffusionConfig, load_weights, nelbo, save_weights
from sample import draw


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def exact_arithmetic(monkeypatch):
    monkeypatch.setattr("model.multiplies_bf16", lambda device: False)


# Likelihoods --------------------------------------------------------------------------------------


LITTLE = DiffusionConfig(sequence_len=3, vocab_size=4, diffusion_steps=5, context_len=0)
SMALL = replace(TINY, sequence_len=3, vocab_size=4, context_len=0)
TWINS = [make_causal(random_model(SMALL, seed)) for seed in (1, 2)]


@torch.no_grad()
@pytest.mark.parametrize("score, model", [
    (likelihood.left_to_right, TableModel(LITTLE)), (likelihood.exact, TWINS),
    (likelihood.most_confident_first, TableModel(LITTLE)),
], ids=["left to right", "GPT twins", "most confident first"])
def test_exact_likelihoods_sum_to_one_over_all_texts(score, model):
    """So a GPT twin predicts each character from none but those before it."""
    texts = torch.tensor(list(itertools.product(range(1, 4), repeat=3)))
    assert (-3 * score(model, texts)).exp().sum().item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_bounds_of_the_likelihood_benchmark_match_nelbo_and_meet_in_continuous_time():
    model, x_0 = TableModel(LITTLE), torch.tensor([1, 3, 2])
    expected, error = nelbo(model, x_0.repeat(500), passes=8)
    discrete, _ = likelihood.bounds(model, x_0.expand(500, 3), draws=30, seed=1)
    assert discrete.mean().item() == pytest.approx(expected, abs=4.5 * error + 0.01)
    config = replace(LITTLE, diffusion_steps=100_000)  # nearly continuous time
    discrete, continuous = likelihood.bounds(TableModel(config), x_0.expand(9, 3), 30, seed=1)
    torch.testing.assert_close(discrete, continuous, rtol=1e-3, atol=0)


@pytest.fixture
def three_models(tmp_path):
    paths = [tmp_path / f"{name}.pt" for name in ("student", "twin_0", "twin_1")]
    for seed, path in enumerate(paths):
        save_weights(random_model(seed=seed), {"causal": True} if seed else {}, path)
    return paths


def test_the_table_compares_every_row_with_the_first_and_what_is_kept_is_not_computed_again(
        three_models, command, tmp_path, monkeypatch):
    student, *twins = three_models
    nats = tmp_path / "nats.csv"
    arguments = (student, f"{twins[0]}+{twins[1]}", "--windows", 6, "--csv", nats)
    scored, left_to_right = [], likelihood.left_to_right
    monkeypatch.setattr(likelihood, "left_to_right",
                        lambda model, x: scored.extend(x) or left_to_right(model, x))
    table = command(likelihood.main, *arguments).stdout
    lines = [line.split(" | ") for line in table.splitlines()[4:]]
    assert [line[:2] for line in lines] == [
        ["| student", "bound, 128 steps"], ["| student", "bound, continuous time"],
        ["| student", "left to right"], ["| twin_0 and 1 more", "exact"],
    ]
    mean = [float(line[2].split()[0]) for line in lines]
    gaps = [float(line[4].split()[0]) for line in lines]
    assert gaps == pytest.approx([0, mean[1] - mean[0], mean[2] - mean[0], mean[3] - mean[2]],
                                 abs=2e-4)
    kept = nats.read_text().splitlines()
    assert len(kept) == 1 + 6 * 4 and len(scored) == 6
    assert command(likelihood.main, *arguments).stdout == table and len(scored) == 6
    stopped = [line for line in kept if "left" not in line or ",3," in line or ",0," in line]
    nats.write_text("\n".join(stopped) + "\n")
    assert command(likelihood.main, *arguments).stdout == table


# The GPT twin -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("multiple", [1, 8])  # as on a CPU; as on a GPU, where they are 64
@pytest.mark.parametrize("given", [0, 1, 9])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_kept_keys_do_not_change_the_text_that_gpt_twins_write_from_their_mean_probabilities(
        given, multiple, temperature, monkeypatch):
    monkeypatch.setitem(causal_twin.REACH, "cpu", multiple)
    twins = [random_model(seed=1), random_model(seed=2)]
    x = torch.randint(1, 128, (3, given))
    kept = continue_causally(twins, x, 32 - given, temperature, seeded(5))
    generator, index = seeded(5), torch.zeros(3, dtype=torch.long)
    while x.size(1) < 32:
        shifted = torch.nn.functional.pad(x, (1, 0))                # 0 is [MASK]
        p = sum(make_causal(twin)(shifted, index)[:, -1:].exp() for twin in twins) / 2
        x = torch.cat((x, draw(p.log(), temperature, generator)), 1)
    assert torch.equal(kept, x)


def test_the_text_of_gpt_twins_has_the_length_and_the_seed_asked_for(three_models, command,
                                                                   tmp_path):
    def text(seed):
        out = tmp_path / "fresh.txt"
        command(causal_twin.main, "--twins", *three_models[1:], "--write", 200, "--streams", 3,
                "--seeds", seed, "--out", out)
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


SPEECHES = DEFAULT_DATA.read_text("utf-8")[:3000]


def twin(command, folder, *arguments, seeds=(0,), text=SPEECHES):
    """Trains twins for ten steps of 128 characters; the last file."""
    folder.mkdir(exist_ok=True)
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
    log_p, *log_q = (next_log_p(model, x_0) for model in (student, *teachers))
    q = (log_q[0].exp() + log_q[1].exp()) / 2
    text, taught = nll_of(log_p, x_0), -(q * log_p)[..., 1:].sum(-1)  # no text holds [MASK]
    loss = causal_twin.batch_loss(student, x_0, teachers)
    torch.testing.assert_close(loss, (text + taught).mean() / 2)
    torch.testing.assert_close(causal_twin.batch_loss(student, x_0, []), text.mean())


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


def make(folder, real="none", stop_when=lambda: False):
    """Runs weights/make.sh at test size; its exit status, and what it printed. A command with
    `real` in it, it starts itself."""
    client = folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, folder=folder))
    client.chmod(0o755)
    settings = {"PYTHON": str(client), "REAL": real, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        ["bash", ROOT / "weights" / "make.sh", "test", folder / "results"], encoding="utf-8",
        env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    while process.poll() is None and not stop_when():
        if (folder / "asked").exists():
            arguments = (folder / "asked").read_text().splitlines()
            (folder / "asked").unlink()
            script = forks.Process(target=run_script, args=(arguments, folder / "printed"))
            script.start()
            script.join(600)
            (folder / "answer").write_text(str(script.exitcode))
        time.sleep(0.02)
    process.terminate()  # if it has not ended
    printed, _ = process.communicate(timeout=600)
    return process.returncode, printed


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_make_goes_from_the_corpus_to_the_table_and_continues_after_a_stop(tmp_path):
    results, state = tmp_path / "results", tmp_path / "results" / "student.state.pt"
    code, _ = make(tmp_path, real="results/student.pt --",
                   stop_when=lambda: state.exists() and state.stat().st_size)
    assert code == 143 and state.stat().st_size and not (results / "student.pt").exists()

    code, printed = make(tmp_path)
    assert code == 0, printed
    log = [line.split("\t") for line in (results / "make.tsv").read_text().splitlines()[1:]]
    made = ["twin_0.pt", "twin_1.pt", "fresh_0.txt", "teacher.pt", "student.pt", "gpt_student.pt",
            "plain.pt", "plain_gpt.pt", "likelihood.md"]
    assert [line[1] for line in log if line[2] == "0"] == made
    stopped, = (line for line in log if line[2] != "0")
    assert stopped[1:3] == ["student.pt", "stopped"] and "--resume" in log[5][-1]
    assert set(os.listdir(results)) == {"text.txt", "make.tsv", "likelihood.csv", *made}
    table = (results / "likelihood.md").read_text()
    assert table in printed and table.count("left to right") == 2
    for _, result, code, _, sha256, *_ in log:
        if code == "0":
            assert sha256 == hashlib.sha256((results / result).read_bytes()).hexdigest()
