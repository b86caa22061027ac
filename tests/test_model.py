import io
import itertools
import math
import os
import re
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    TINY, Gone, TableModel, assert_one_clear_line, no_space, partly_masked, random_model,
)
from hypothesis import given
from hypothesis import strategies as st

from model import (
    DEFAULT_DATA, BadInput, DiffusionConfig, DiffusionTransformer, decode_tokens, encode_text,
    harmless, load_corpus, load_weights, masked_count_weights, masked_nll, nelbo, noise_index,
    q_sample, replacing, save_weights, spaced_windows,
)

# ---- characters


@given(st.text(st.characters(min_codepoint=1, max_codepoint=127)),
       st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"])))
def test_ascii_text_and_with_a_byte_vocabulary_any_text_survives_encoding(ascii_text, text):
    assert decode_tokens(encode_text(ascii_text, TINY)) == ascii_text
    assert decode_tokens(encode_text(text, replace(TINY, vocab_size=256))) == text


@pytest.mark.parametrize("text, character, position", [
    ("caf\u00e9", "\u00e9", 3), ("a\0b", "\\x00", 1), ("\u2603", "\u2603", 0),
    ("a" * 9 + "\U0001f600", "\U0001f600", 9),
])
def test_a_character_outside_the_vocabulary_is_named_with_its_position(text, character, position):
    with pytest.raises(BadInput, match=f"position {position}") as error:
        encode_text(text, TINY)
    assert character in str(error.value)


def test_the_shipped_corpus_is_tiny_shakespeare_in_the_split_of_nanogpt():
    train, val, sha256 = load_corpus(DEFAULT_DATA, DiffusionConfig())
    assert sha256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert train.dtype == torch.uint8  # a byte a character, until a batch is drawn
    assert (len(train), len(val)) == (1003854, 111540)
    assert decode_tokens(train) + decode_tokens(val) == DEFAULT_DATA.read_text("utf-8")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="measures with /proc")
def test_reading_a_text_takes_a_few_bytes_a_character(tmp_path):
    """At the peak, in memory: 6.4 bytes. Commit 98a2603 needed 15.3."""
    length, proc = 30_000_000, Path("/proc/self")
    (tmp_path / "long.txt").write_bytes(b"to be or not to be\n" * (length // 19))

    def peak():
        return int(re.search(r"VmHWM:\s+(\d+)", (proc / "status").read_text("utf-8"))[1]) * 1024

    (proc / "clear_refs").write_text("5", "utf-8")  # the peak is measured from here
    before = peak()
    load_corpus(tmp_path / "long.txt", TINY)
    assert peak() - before < 10 * length


# ---- the network


def test_initial_weights_are_zero_or_normal_with_the_documented_deviation():
    torch.manual_seed(0)
    for name, parameter in DiffusionTransformer(DiffusionConfig()).named_parameters():
        if any(part in name for part in ("time_emb", "c_proj", "output_head")):
            assert not parameter.any()
            continue
        fan_out, fan_in = parameter.shape
        std = min(1, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
        if name == "token_emb.weight":
            std = 1.0
        assert parameter.std().item() == pytest.approx(std, rel=0.02)
        assert parameter.mean().item() == pytest.approx(0, abs=0.02 * std)


def plain_forward(state, ids, time_index, n_layer, n_head):
    """The architecture as its description reads, for one sequence and one head at a time."""
    w = {name.removesuffix(".weight"): tensor for name, tensor in state.items()}

    def unit(v):
        return v / (v * v).mean(-1, keepdim=True).sqrt()

    def rotated(v):  # channel i and channel i + half, as a complex number
        half = v.size(1) // 2
        angle = torch.arange(len(v))[:, None] * 10000.0 ** (-torch.arange(half) / half)
        z = torch.complex(v[:, :half], v[:, half:]) * torch.exp(-1j * angle)
        return unit(torch.cat((z.real, z.imag), 1))

    x = unit(w["token_emb"][ids] + w["time_emb"][time_index])       # (T, C)
    for layer in range(n_layer):
        block = f"blocks.{layer}."
        q, k, v = (unit(x) @ w[f"{block}attn.c_{name}"].T for name in "qkv")
        heads = []
        for head in torch.arange(x.size(1)).chunk(n_head):          # its channels
            scores = rotated(q[:, head]) @ rotated(k[:, head]).T / math.sqrt(len(head))
            heads.append(scores.softmax(1) @ v[:, head])
        x = x + torch.cat(heads, 1) @ w[block + "attn.c_proj"].T
        x = x + (unit(x) @ w[block + "mlp.c_fc"].T).clamp(min=0) ** 2 @ w[block + "mlp.c_proj"].T
    logits = unit(x) @ w["output_head"].T
    logits[:, 0] = -math.inf                                        # [MASK]
    return logits.log_softmax(1)


def test_forward_agrees_with_a_plain_implementation_and_gives_probabilities_in_bfloat16_too():
    model = random_model()
    x_t, time_index = partly_masked(2, 7, 0.5, seed=0), torch.tensor([3, 127])
    for log_p, ids, index in zip(model(x_t, time_index), x_t, time_index, strict=True):
        expected = plain_forward(model.state_dict(), ids, index, n_layer=2, n_head=2)
        torch.testing.assert_close(log_p, expected, rtol=1e-4, atol=1e-4)
    log_p = model.to(torch.bfloat16)(x_t, time_index)
    assert log_p.dtype == torch.float32 and (log_p[..., 0] == -math.inf).all()
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, 7))


# ---- the diffusion


@given(st.integers(1, 300), st.integers(1, 200), st.data())
def test_time_index_matches_masked_fraction(n, steps, data):
    m = data.draw(st.integers(0, n))
    masked = (torch.randperm(n) < m)[None]
    assert noise_index(masked, steps).item() == max(0, math.ceil(steps * m / n) - 1)


def test_forward_process_masks_characters_independently_with_probability_t_over_128():
    torch.manual_seed(0)
    x_0 = torch.randint(1, 128, (4000, 8))
    for t in (1, 40, 128):
        x_t, masked = q_sample(x_0, torch.full((4000,), t), DiffusionConfig())
        p = t / 128
        bound = 4.5 * math.sqrt(p * (1 - p) / 4000) + 1e-9  # 4.5 standard errors at each position
        assert ((masked.float().mean(0) - p).abs() <= bound).all()
        pairs = (masked[:, :-1] & masked[:, 1:]).float().mean(0)
        assert ((pairs - p * p).abs() <= 4.5 * math.sqrt(p * p * (1 - p * p) / 4000) + 1e-9).all()
        assert torch.equal(x_t == 0, masked) and torch.equal(x_t[~masked], x_0[~masked])


def test_forward_process_leaves_the_prefix_clean():
    x_0 = torch.randint(1, 128, (3, 8))
    prefix_len = torch.tensor([0, 3, 8])
    _, masked = q_sample(x_0, torch.full((3,), 128), DiffusionConfig(), prefix_len=prefix_len)
    assert masked.sum(1).tolist() == [8, 5, 0] and not masked[1, :3].any()


def test_loss_and_gradient_stay_finite_with_nothing_or_everything_masked():
    model, x_0 = random_model(), torch.randint(1, 128, (2, 32))
    masked = torch.tensor([[False], [True]]).expand(2, 32)
    log_p = model(x_0.masked_fill(masked, 0), noise_index(masked, 128))
    nll = masked_nll(log_p, x_0, masked)
    nll.sum().backward()
    assert nll[0] == 0 and nll[1] > 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_bound_of_an_untrained_model_is_the_logarithm_of_127():
    model = DiffusionTransformer(TINY)
    mean, error = nelbo(model, torch.randint(1, 128, (300,)), passes=3)
    assert mean == pytest.approx(math.log(127), abs=1e-5) and error < 1e-5


def all_masks(length):
    return torch.tensor(list(itertools.product([False, True], repeat=length)))


def enumerated_bound(model, x_0):
    """The bound by its definition: the sum over every noise level t and every mask, each weighted
    by its probability."""
    config = model.config
    S, L = config.diffusion_steps, config.sequence_len
    total = 0.0
    for t in range(1, S + 1):
        for masked in all_masks(L):
            m = int(masked.sum())
            if m == 0:
                continue
            probability = (t / S) ** m * (1 - t / S) ** (L - m)
            index = torch.tensor([math.ceil(S * m / L) - 1])
            log_p = model(x_0.masked_fill(masked, 0)[None], index)[0]
            nll = F.nll_loss(log_p[masked], x_0[masked], reduction="sum")
            total += probability * S / t * nll.item() / (S * L)
    return total


def test_sampled_bound_equals_enumeration_over_all_masks():
    config = DiffusionConfig(sequence_len=3, vocab_size=4, diffusion_steps=5, context_len=0)
    model, x_0 = TableModel(config), torch.tensor([1, 3, 2])
    exact = enumerated_bound(model, x_0)
    mean, error = nelbo(model, x_0.repeat(500), passes=8)
    assert error < 0.02
    assert abs(mean - exact) < 4.5 * error
    by_count = [[], [], [], []]
    for masked in all_masks(3):
        log_p = model(x_0.masked_fill(masked, 0)[None], None)
        by_count[int(masked.sum())].append(masked_nll(log_p, x_0[None], masked[None]).item())
    weights = masked_count_weights(3, 5).tolist()
    by_weights = sum(w * sum(n) / len(n) for w, n in zip(weights, by_count[1:], strict=True))
    assert by_weights == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("length, windows, count", [(32 * 5, 99, 5), (32 * 5 + 1, 99, 6),
                                                   (32 * 500, 150, 150), (32, 99, 1)])
def test_the_bound_reads_the_fewest_windows_that_cover_the_text(length, windows, count):
    """The windows are evenly spaced, and there are at most `windows` of them. One network call gets
    at most 64, so that memory does not grow with the text."""
    model, rows = random_model(), []
    model.register_forward_hook(lambda module, inputs, log_p: rows.append(len(log_p)))
    text = torch.arange(length).remainder(97).add(1).to(torch.uint8)
    nelbo(model, text, passes=2, windows=windows)
    assert sum(rows) == 2 * count and max(rows) <= 64
    starts = spaced_windows(torch.arange(length), 32, count)[:, 0]
    assert starts[0] == 0 and (count == 1 or starts[-1] == length - 32)
    assert starts.diff().unique().numel() <= 2


# ---- the checkpoint


def test_checkpoint_round_trip_keeps_weights_config_and_meta(tmp_path):
    model = random_model()
    save_weights(model, {"step": 7, "seed": 3}, tmp_path / "w.pt")
    loaded, meta = load_weights(tmp_path / "w.pt")
    assert meta == {"step": 7, "seed": 3} and loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16().float())


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_a_bare_state_dict_loads_even_of_a_compiled_or_distributed_model(prefix, tmp_path):
    model = DiffusionTransformer(DiffusionConfig())
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "original.pt")
    loaded, meta = load_weights(tmp_path / "original.pt")
    assert meta == {} and loaded.config == DiffusionConfig()
    assert torch.equal(loaded.token_emb.weight, model.token_emb.weight)


def broken_files():
    state, config = random_model().state_dict(), asdict(TINY)
    broken = {**state, "output_head.weight": state["output_head.weight"] * math.nan}
    large = {name: tensor.double() * 1e300 for name, tensor in state.items()}
    whole = io.BytesIO()
    torch.save({"model": state, "config": config, "meta": {}}, whole)
    for percent in (1, 30, 70, 99):
        yield f"{percent}%", whole.getvalue()[: whole.tell() * percent // 100]
    yield "missing", None
    yield "empty", b""
    yield "text", b"To be, or not to be"
    yield "foreign dict", {"weights": torch.zeros(3)}
    yield "list", [1, 2]
    for change in ({"n_embd": 64}, {"n_embd": 2**30}, {"n_layer": 1}, {"n_layer": 2**30},
                   {"n_head": 5}, {"sequence_len": 2.5}, {"vocab_size": 300}, {"context_len": 32},
                   {"mask_token_id": 128}, {"n_gpu": 1}):
        yield str(change), {"model": state, "config": {**config, **change}, "meta": {}}
    yield "config is no dict", {"model": state, "config": 3, "meta": {}}
    yield "meta is no dict", {"model": state, "config": config, "meta": [1]}
    yield "not tensors", {"model": {name: 0 for name in state}, "config": config, "meta": {}}
    yield "not finite", {"model": broken, "config": config, "meta": {}}
    yield "too large for float32", {"model": large, "config": config, "meta": {}}
    yield "code", {"model": print, "config": config, "meta": {}}


@pytest.mark.parametrize("contents", [pytest.param(c, id=name) for name, c in broken_files()])
def test_unusable_weights_are_refused_in_one_line(contents, tmp_path):
    path = tmp_path / "w.pt"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    elif contents is not None:
        torch.save(contents, path)
    with pytest.raises(BadInput) as error:
        load_weights(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "w.pt"
    save_weights(random_model(seed=1), {}, path)
    old = path.read_bytes()
    for module, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, no_space)
            with pytest.raises(OSError, match="No space left"):
                save_weights(random_model(seed=2), {}, path)
        assert path.read_bytes() == old
        assert os.listdir(tmp_path) == ["w.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such file")
def test_what_is_no_regular_file_is_written_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with replacing(tmp_path / "pipe") as file:
        file.write(b"text")
    assert os.read(reader, 9) == b"text" and os.listdir(tmp_path) == ["pipe"]
    os.close(reader)


def test_a_terminal_gets_no_control_character_and_a_pipe_gets_all():
    text = "\x1bc\r\x07one\ttwo\n\x7f\x9b"
    assert harmless(text, Gone(terminal=True)) == "·c··one\ttwo\n··"
    assert harmless(text, io.StringIO()) == text


def failing(error, _):
    raise error


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
])
def test_too_little_memory_is_one_line_and_other_faults_stay_tracebacks(error, command):
    assert_one_clear_line(command(partial(failing, error)), "error: out of memory; ")
    with pytest.raises(RuntimeError, match="a fault"):
        command(partial(failing, RuntimeError("a fault")))


def test_a_gpt_twin_is_no_diffusion_model_and_the_other_way_round(tmp_path):
    save_weights(random_model(), {"causal": True}, tmp_path / "twin.pt")
    save_weights(random_model(), {}, tmp_path / "w.pt")
    for name, causal in (("twin.pt", False), ("w.pt", True)):
        with pytest.raises(BadInput, match="GPT twin"):
            load_weights(tmp_path / name, causal=causal)
        load_weights(tmp_path / name, causal=not causal)


def test_crlf_line_ends_of_a_corpus_become_lf(tmp_path):
    """sample.py turns CR LF of a prompt into LF, so the model has to learn LF."""
    (tmp_path / "c.txt").write_bytes(b"to be\r\nor not\r\n" * 60)
    train, _, _ = load_corpus(tmp_path / "c.txt", TINY)
    assert 13 not in train.tolist()
