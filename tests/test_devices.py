"""Which devices and processes the scripts choose, and whether tensors stay on their device.

The tests have no GPU. Fake CUDA tensors have shapes, types and a device but hold no numbers; an
operation between tensors of two devices raises."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, assert_one_clear_line
from torch._subclasses import FakeTensorMode

import model
import sample
import training
from model import BadInput


@pytest.fixture
def cuda(monkeypatch):
    """A device for fake CUDA tensors, which need no driver."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    # Without a driver, autocast would switch itself off with a warning
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")
        try:
            torch.empty(1, device="cuda").uniform_()
        except RuntimeError:
            pytest.skip("this torch asks the driver even for fake tensors (2.9 does)")
        yield torch.device("cuda")


def network_on(device, dtype=torch.float32):
    """A network on the device. Fake parameters refuse .to(), so it is made there."""
    with device:
        network = model.DiffusionTransformer(TINY)
    state = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
    network.load_state_dict(state, assign=True)
    network.cos, network.sin = (x.to(device, dtype) for x in (network.cos, network.sin))
    return network


def test_a_training_step_stays_on_its_device_and_multiplies_in_bfloat16(cuda):
    network, types = network_on(cuda), []
    optimizers = training.make_optimizers(network, 0.02, weight_decay=0.1)
    network.output_head.register_forward_hook(lambda *call: types.append(call[-1].dtype))
    text = torch.zeros(500, dtype=torch.uint8, device=cuda)
    batch = training.draw_batch(text, TINY, 4, None)
    assert {part.device.type for part in batch} == {"cuda"}
    for teacher in None, network_on(cuda):
        loss = training.batch_loss(network, batch, teacher)
        assert loss.device.type == "cuda" and loss.shape == ()
    assert types == [torch.bfloat16] * 2
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)  # the backward pass needs a real device
    training.update(network, optimizers, factor=0.5)
    assert all(p.device.type == "cuda" for p in network.parameters())


def test_the_bound_stays_on_its_device(cuda, monkeypatch):
    rand, randperm = torch.rand, torch.randperm  # a CUDA generator needs a real device
    monkeypatch.setattr(torch, "rand", lambda shape, generator, device: rand(shape, device=device))
    monkeypatch.setattr(torch, "randperm", lambda n, generator, device: randperm(n, device=device))
    x_0 = torch.ones(5, 32, dtype=torch.long)
    nll = model.nelbo_samples(network_on(cuda), x_0, SimpleNamespace(device=cuda))
    assert nll.device.type == "cuda" and nll.shape == (5,)


@pytest.mark.parametrize("rule", [rule for rule, _ in sample.METHODS.values()])
def test_a_network_call_and_each_rule_stay_on_their_device(rule, cuda):
    """The body of `denoise` for each rule. The loop itself can't run, as it asks whether anything
    is still masked, and fake tensors hold no answer."""
    network = network_on(cuda, torch.bfloat16)
    x, generator = torch.zeros(2, 32, dtype=torch.long, device=cuda), torch.Generator()
    masked, unmask_time = x == 0, sample.uniform(x, generator)
    log_p = network(x, model.noise_index(masked, 128))
    chosen = sample.draw(log_p, 0.7, generator)
    unmask = rule(sample.Proposal(log_p, chosen, masked, unmask_time))
    assert log_p.dtype == torch.float32 and unmask.dtype == torch.bool
    assert log_p.device.type == chosen.device.type == unmask.device.type == "cuda"


def test_auto_falls_back_where_the_build_has_no_kernels(monkeypatch, capsys):
    """As with an NVIDIA card that is older than the PyTorch build supports."""
    def without_kernels(size, device):
        if device != "cpu":
            raise RuntimeError("CUDA error: no kernel image is available for execution\nmore")
        return torch.zeros(size)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", without_kernels)
    assert model.pick_device("auto") == torch.device("cpu")
    assert "no kernel image" in capsys.readouterr().err
    with pytest.raises(BadInput, match="--device cuda can't be used .*no kernel image"):
        model.pick_device("cuda")


@pytest.mark.parametrize("name", ["mps", "xla", "cuda:99", "nonsense"])
def test_a_device_that_is_missing_is_refused_in_a_short_line(name):
    with pytest.raises(BadInput, match=f"--device {name} can't be used") as refusal:
        model.pick_device(name)
    assert len(str(refusal.value)) < 220


@pytest.fixture
def torchrun(monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "localhost",
                        "MASTER_PORT": 29500, "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, str(value))


def test_a_batch_size_that_is_no_multiple_of_the_processes_is_refused(torchrun, train):
    assert_one_clear_line(train("--batch-size", 7, code=2), "7", "2 processes")


@pytest.mark.parametrize("environment", [
    {"RANK": "3"}, {"RANK": "0", "WORLD_SIZE": "4"}, {"RANK": "node-1", "WORLD_SIZE": "2"},
])
def test_the_rank_variables_of_a_platform_start_no_further_processes(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = SimpleNamespace(batch_size=4, device="cpu")
    assert training.start_processes(args) == (0, 1, torch.device("cpu"))


@pytest.mark.parametrize("gpus, device, backend", [(0, "cpu", "gloo"), (2, "cuda", "nccl")])
def test_processes_take_gpus_or_the_cpu(gpus, device, backend, torchrun, monkeypatch):
    """Never MPS, which can't exchange gradients."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(training.dist, "init_process_group", lambda *a, **_: chosen.append(a[0]))
    monkeypatch.setattr(training, "pick_device",
                        lambda name: torch.device("cuda" if name == "auto" else name))
    found = training.start_processes(SimpleNamespace(batch_size=4, device="auto"))
    assert found == (1, 2, torch.device(device))
    assert chosen == ([1, backend] if gpus else [backend])
