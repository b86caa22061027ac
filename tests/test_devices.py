"""Device code without the device: it runs on fake CUDA tensors, which have shapes, types and places
but hold no numbers. A tensor made on the wrong device raises."""

import warnings
from functools import partial
from types import SimpleNamespace

import model
import sample
import training
from model import BadInput

import pytest
import torch
from conftest import TINY
from torch._subclasses import FakeTensorMode


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA device without a driver."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")
        try:
            torch.empty(1, device="cuda").uniform_()
        except RuntimeError:
            pytest.skip("this torch asks the driver even for fake tensors (2.9 does)")
        yield torch.device("cuda")


def network_on(device):
    with device:
        return model.DiffusionTransformer(TINY)


def test_a_training_step_stays_on_its_device(cuda):
    network = network_on(cuda)
    args = SimpleNamespace(muon_learning_rate=0.02, learning_rate=3e-3, weight_decay=0.1)
    optimizers = training.make_optimizers(network, args)
    train = torch.zeros(500, dtype=torch.long, device=cuda)
    x_0, x_t, masked, t, weight = training.draw_batch(train, TINY, 4, None)
    assert {part.device.type for part in (x_0, x_t, masked, t, weight)} == {"cuda"}
    with model.autocast(cuda):
        logits = network(x_t, t)
    loss = (model.masked_nll(logits, x_0, masked, 0) * weight).sum()
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)  # the backward pass itself wants a real device
    training.update(network, optimizers, factor=0.5)
    assert loss.device.type == "cuda" and logits.shape == (4, 32, 128)
    assert all(p.device.type == "cuda" for p in network.parameters())


def test_distillation_stays_on_its_device(cuda):
    teachers = [network_on(cuda) for _ in range(2)]
    train = torch.zeros(500, dtype=torch.long, device=cuda)
    x_0, x_t, masked, t, _ = training.draw_batch(train, TINY, 4, None)
    log_q = training.ask(teachers, x_t, t)
    loss = training.teacher_nll(log_q, log_q, masked, 0)
    assert loss.device.type == "cuda" and log_q.shape == (4, 32, 128)


def test_the_bound_stays_on_its_device(cuda):
    network = network_on(cuda)
    generator = SimpleNamespace(device=cuda)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", without_generator(torch.rand))
        patch.setattr(torch, "randperm", without_generator(torch.randperm))
        nll = model.nelbo_samples(network, torch.ones(5, 32, dtype=torch.long), generator)
    assert nll.device.type == "cuda" and nll.shape == (5,)


def without_generator(function):
    """FakeTensorMode can't take a generator of a device that is not there."""

    def call(*arguments, generator=None, **keywords):
        return function(*arguments, **keywords)

    return call


@pytest.mark.parametrize("rule", [
    partial(sample.threshold, tau=0.9), partial(sample.top_k, k=3),
    partial(sample.gumbel_top_k, k=3), partial(sample.ancestral, steps=9),
    partial(sample.left_to_right, k=1), sample.everything,
], ids=["threshold", "top-k", "gumbel-top-k", "ancestral", "left-to-right", "everything"])
def test_a_step_of_denoising_stays_on_its_device(rule, cuda):
    """One step by hand: the loop itself asks for numbers, to know which rows are finished."""
    network = network_on(cuda)
    x = torch.zeros(2, 32, dtype=torch.long, device=cuda)
    generators = sample.row_generators(0, 2)
    masked = x == 0
    with model.autocast(cuda):
        logits = network(x, model.noise_index(masked, 128))
    log_p = model.log_probs(logits, 0)
    chosen = sample.draw(log_p, 0.7, sample.uniform(generators, x))
    unmask_time = sample.uniform(generators, x)
    proposal = sample.Proposal(log_p, chosen, masked, unmask_time, generators)
    unmask = rule(proposal)
    assert unmask.device.type == "cuda" and unmask.dtype == torch.bool
    assert torch.where(unmask & masked, chosen, x).device.type == "cuda"


def no_kernel(*_, **__):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")


def test_auto_falls_back_where_the_build_has_no_kernels(monkeypatch, capsys):
    """An NVIDIA card that is older than the wheel."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    ones = torch.ones
    monkeypatch.setattr(
        torch, "ones", lambda *a, device: no_kernel() if device.type == "cuda" else ones(*a)
    )
    assert model.pick_device("auto") == torch.device("cpu")
    assert "no kernel image" in capsys.readouterr().err
    with pytest.raises(BadInput, match="--device cuda can't be used .*no kernel image"):
        model.pick_device("cuda")


def test_torchrun_refuses_mps_and_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    args = SimpleNamespace(batch_size=4, device="mps")
    monkeypatch.setattr(training, "pick_device", torch.device)
    with pytest.raises(BadInput, match="mps"):
        training.start_processes(args)
    args.device = "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadInput, match="1 GPUs"):
        training.start_processes(args)
