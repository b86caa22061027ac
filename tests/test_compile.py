"""The compiled path, which users get by default, with a real compiler."""

import shutil
import sys

import pytest
import torch
from conftest import random_model

import training

needs_a_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="needs g++"
)


def batch_of(model, rows=4):
    text = torch.randint(1, 128, (500,), generator=torch.Generator().manual_seed(1)).byte()
    return training.draw_batch(text, model.config, rows, torch.Generator().manual_seed(0))


def gradients(network, model, batch, teacher):
    model.zero_grad()
    training.batch_loss(network, batch, teacher).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@needs_a_compiler
@pytest.mark.parametrize("taught", [False, True])
def test_the_compiled_loss_has_the_gradients_of_the_eager_loss(taught, capsys):
    model, batch = random_model(), batch_of(random_model())
    teacher = random_model(seed=1) if taught else None
    eager = gradients(model, model, batch, teacher)
    network = training.compiled(model, 4)
    teacher = training.compiled(teacher, 4, learns=False) if taught else None
    with torch._dynamo.config.patch(error_on_recompile=True):  # compiled as they are used
        compiled = gradients(network, model, batch, teacher)
    assert "compile failed" not in capsys.readouterr().err
    for name in eager:  # bfloat16 rounds elsewhere once operations are fused
        assert (compiled[name] - eager[name]).norm() < 0.03 * eager[name].norm(), name


@pytest.mark.parametrize("learns", [True, False])
def test_a_compiler_that_fails_leaves_the_eager_model_and_one_line(learns, capsys, monkeypatch):
    def broken(model, options):
        def network(x_t, index):
            raise RuntimeError("C++ compile error\nwith many lines")
        return network

    monkeypatch.setattr(torch, "compile", broken)
    model = random_model()
    assert training.compiled(model, 4, learns) is model
    error = capsys.readouterr().err
    assert error.startswith("torch.compile failed") and len(error.splitlines()) == 1
    assert all(parameter.grad is None for parameter in model.parameters())
