"""A masked (absorbing-state) diffusion language model over characters.

Everything that defines the model is here: config, network, diffusion (forward process, loss of a
prediction, bound), characters and corpus, checkpoint; at the end, what all scripts share.
`training.py` fits the model, `sample.py` runs it in reverse.

Symbols, most of them also in MD4, arXiv 2406.04329 (MDLM, arXiv 2406.07524, writes x, z_t, T and L
for x_0, x_t, S and T):

    x_0             clean text, (B, T) ids of characters: a character is a byte of UTF-8 text
    x_t             the same text with some characters replaced by [MASK]
    S               diffusion_steps, the number of noise levels
    t               noise level, 1..S
    time_index      what the network is told: the level of the masked count (`noise_index`), 0..S-1
    alpha           probability that a character is visible at level t: 1 - t / diffusion_steps
    m               number of masked characters in a sequence
    log_p           log p(x_0 | x_t), (B, T, V), meaningful at masked positions
    NELBO           negative evidence lower bound: an upper bound on -log p(x_0)
    B, T, V         batch, sequence length, vocabulary size
    C, H, D         channels, attention heads, channels per head
"""

import argparse
import glob
import hashlib
import itertools
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
DEFAULT_DATA = ROOT / "data" / "tiny_shakespeare.txt"
DEFAULT_WEIGHTS = ROOT / "weights" / "diffusion_model.pt"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # characters that act on a terminal


class BadInput(ValueError):
    """Ends the program with one line for the user: something that they gave can't be used."""


@dataclass
class DiffusionConfig:
    sequence_len: int = 256
    vocab_size: int = 128  # byte values: 128 is ASCII, 256 is any UTF-8 text
    mask_token_id: int = 0
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    diffusion_steps: int = 128
    context_len: int = 16  # longest clean prefix in training

    def __post_init__(self):
        why = ""
        if not all(type(size) is int and 0 <= size <= 10**6 for size in vars(self).values()):
            why = "sizes are whole numbers up to a million"
        elif not (self.sequence_len and self.diffusion_steps and 0 < self.n_layer <= 1000):
            why = "sequence_len and diffusion_steps are at least 1, n_layer is 1 to 1000"
        elif not self.n_head or not self.n_embd or self.n_embd % (2 * self.n_head):
            why = "n_embd is a multiple of twice n_head, as each head rotates channels in pairs"
        elif not self.mask_token_id < self.vocab_size <= 256 or self.vocab_size < 2:
            why = "vocab_size is 2 to 256, as tokens are bytes, and above mask_token_id"
        elif self.context_len >= self.sequence_len:
            why = "context_len is below sequence_len"
        if why:
            raise BadInput(f"{self}: {why}")


# The network: nanochat's transformer block, with attention in both directions ---------------------


def norm(x):
    """x divided by the root mean square of its last axis. F.rms_norm would cast bfloat16 to float32
    and back."""
    rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.size(-1) ** -0.5
    return x / rms.clamp(min=1e-6)


def rotary_tables(length: int, head_dim: int):
    """Cosine and sine of position times frequency, (T, D/2) each. RoFormer, arXiv 2104.09864. On
    the CPU, also where `load_weights` builds the rest on the meta device."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, device="cpu") / head_dim)
    angle = torch.arange(length, device="cpu")[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)                                       # (B, H, T, D/2) each
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_v = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    @staticmethod
    def attend(q, k, v):
        """softmax(q k^T / sqrt(D)) v, (B, H, T, D): every position attends to all positions.

        On a CPU as plain products: the fused kernel is slower there, up to three times in the
        backward pass. Static, so that a function with another mask can replace it (the GPT twin of
        tests/experiments/causal_twin.py)."""
        if q.device.type == "cpu":
            return ((q * q.size(-1) ** -0.5) @ k.mT).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)               # each of q, k, v: (B, H, T, D)
        q, k, v = (c(x).view(heads).transpose(1, 2) for c in (self.c_q, self.c_k, self.c_v))
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        y = self.attend(q, k, v)                                    # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))      # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        # Squared ReLU: Primer, arXiv 2109.08668
        return self.c_proj(F.relu(self.c_fc(x)).square())           # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin):
        x = x + self.attn(norm(x), cos, sin)                        # (B, T, C)
        return x + self.mlp(norm(x))                                # (B, T, C)


class DiffusionTransformer(nn.Module):
    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.config = config
        self.token_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.time_emb = nn.Embedding(config.diffusion_steps, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.output_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = rotary_tables(config.sequence_len, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)          # the config determines them
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """The two c_proj of a block and output_head begin with zeros, so that every block is the
        identity and every character is equally likely. time_emb begins with zeros, so that the
        network first learns what all noise levels have in common."""
        nn.init.normal_(self.token_emb.weight)
        nn.init.zeros_(self.time_emb.weight)
        nn.init.zeros_(self.output_head.weight)
        for block in self.blocks:
            attn, mlp = block.attn, block.mlp
            for linear in (attn.c_q, attn.c_k, attn.c_v, mlp.c_fc):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            for linear in (attn.c_proj, mlp.c_proj):
                nn.init.zeros_(linear.weight)

    def forward(self, x_t, time_index):
        """log p(x_0 | x_t) at every position, (B, T, V) in float32, from ids x_t (B, T) and time
        indices (B,), as `noise_index` gives them. T may be anything up to sequence_len. [MASK] has
        probability zero (MDLM's zero masking probabilities, arXiv 2406.07524, sec. 3.2.3)."""
        T = x_t.size(1)
        cos, sin = self.cos[:T], self.sin[:T]                       # (T, D/2) each
        x = self.token_emb(x_t)                                     # (B, T, C)
        x = norm(x + self.time_emb(time_index)[:, None])            # (B, T, C)
        for block in self.blocks:
            x = block(x, cos, sin)                                  # (B, T, C)
        logits = self.output_head(norm(x)).float()                  # (B, T, V)
        logits[..., self.config.mask_token_id] = -math.inf
        return logits.log_softmax(-1)                               # (B, T, V)


# The diffusion ------------------------------------------------------------------------------------


def noise_index(masked, diffusion_steps: int):
    """The network's time index (B,) for sequences whose `masked` (B, T) positions are hidden. The
    network is not told the level t that was drawn, but the level that the share of masked
    characters suggests: ceil(diffusion_steps * m / T) - 1, and 0 where nothing is masked. Training,
    evaluation and sampling all use this one rule."""
    m, T = masked.sum(1), masked.size(1)
    return ((diffusion_steps * m + T - 1) // T - 1).clamp(min=0)


def q_sample(x_0, t, config: DiffusionConfig, generator=None, prefix_len=None):
    """Forward process q(x_t | x_0) with alpha = 1 - t / diffusion_steps: each character is masked
    independently with probability 1 - alpha. MDLM, arXiv 2406.07524, eq. 3.

    x_0 (B, T) ids, t (B,) levels, prefix_len (B,) characters kept clean at the left of each row.
    Returns x_t (B, T) and which positions are masked (B, T)."""
    u = torch.rand(x_0.shape, generator=generator, device=x_0.device)
    masked = u < t[:, None] / config.diffusion_steps
    if prefix_len is not None:
        masked &= torch.arange(x_0.size(1), device=x_0.device) >= prefix_len[:, None]
    return x_0.masked_fill(masked, config.mask_token_id), masked


def masked_mean(values, masked):
    """Mean of values (B, T) over the masked positions of each row, (B,); 0 for a row with nothing
    masked."""
    return values.masked_fill(~masked, 0.0).sum(1) / masked.sum(1).clamp(min=1)


def masked_nll(log_p, x_0, masked):
    """Mean over the masked positions of -log p(x_i | x_t), in nats per character, (B,)."""
    nll = -log_p.gather(-1, x_0[..., None]).squeeze(-1)             # (B, T)
    return masked_mean(nll, masked)


def masked_count_weights(length: int, diffusion_steps: int) -> torch.Tensor:
    """The weights w (T,) by which the bound is an average over the masked count m = 1..T.

    The bound of arXiv 2406.07524 (eq. 8, discrete time) per character is
        NELBO = E_t[ (S / t) * sum over masked i of -log p(x_i | x_t) ] / T,   t uniform on 1..S,
    and given t the count m is Binomial(T, t / S), with every subset of m positions equally likely.
    So it equals sum_m w(m) * E[masked_nll | m] with w(m) = sum_t Binomial(m; T, t/S) * m / (T * t).
    The weights sum to 1, because E[m] = T t / S, and approach 1 / T as S grows (RADD, arXiv
    2406.03736)."""
    m = torch.arange(1, length + 1, dtype=torch.float64)
    t = torch.arange(1, diffusion_steps + 1, dtype=torch.float64)[:, None]
    p = t / diffusion_steps
    log_choose = math.lgamma(length + 1) - torch.lgamma(m + 1) - torch.lgamma(length - m + 1)
    log_binomial = log_choose + torch.xlogy(m, p) + torch.xlogy(length - m, 1 - p)
    return (log_binomial.exp() * m / (length * t)).sum(0)


def nelbo_samples(model, x_0, generator):
    """One unbiased draw of the NELBO for each row of x_0 (B, T), in nats per character, (B,).

    Draws m from `masked_count_weights`, stratified over the rows, and then m positions uniformly.
    The variance is far below that of Bernoulli masks weighted by S / t."""
    (B, T), S, device = x_0.shape, model.config.diffusion_steps, generator.device
    u = torch.rand(B, generator=generator, device=device)
    u = (u + torch.randperm(B, generator=generator, device=device)) / B
    cdf = masked_count_weights(T, S).cumsum(0).float().to(device)
    m = torch.searchsorted(cdf, u).clamp(max=T - 1) + 1             # (B,)
    nll = []
    for rows, counts in zip(x_0.to(device).split(64), m.split(64), strict=True):
        rank = torch.rand(rows.shape, generator=generator, device=device).argsort(1).argsort(1)
        masked = rank < counts[:, None]
        x_t = rows.masked_fill(masked, model.config.mask_token_id)
        nll.append(masked_nll(model(x_t, noise_index(masked, S)), rows, masked))
    return torch.cat(nll)


def spaced_windows(tokens, length: int, windows: int):
    """`windows` evenly spaced windows of a 1-D tensor, (windows, length) in int64."""
    starts = torch.linspace(0, len(tokens) - length, windows, dtype=torch.float64).long()
    return tokens.unfold(0, length, 1)[starts].long()


@torch.no_grad()
def nelbo(model, tokens, passes: int = 8, windows: int = 8192):
    """NELBO of a 1-D tensor of ids in nats per character, and its standard error.

    Scores the fewest evenly spaced windows of sequence_len that cover the text, or `windows` if
    that is less, each without context. Every pass draws fresh masks for every window. The standard
    error measures the spread over the passes (at least 2), not over windows. Divide by ln 2 for
    bits."""
    T, device = model.config.sequence_len, next(model.parameters()).device
    x_0 = spaced_windows(tokens, T, min(windows, math.ceil(len(tokens) / T)))
    generator = torch.Generator(device).manual_seed(0)
    with autocast(device):
        draws = [nelbo_samples(model, x_0, generator).mean().item() for _ in range(passes)]
    return statistics.mean(draws), statistics.stdev(draws) / math.sqrt(passes)


# Characters and corpus ----------------------------------------------------------------------------


def encode_text(text: str, config: DiffusionConfig) -> torch.Tensor:
    """UTF-8 bytes of `text` as a 1-D uint8 tensor of ids. Raises BadInput for a byte that is [MASK]
    or not below vocab_size, naming the character and its position: nothing is silently replaced."""
    raw = text.encode("utf-8", errors="surrogateescape")
    ids = torch.from_numpy(np.frombuffer(raw, np.uint8).copy())
    last = config.vocab_size - 1  # comparing with vocab_size itself would overflow uint8 at 256
    refused = (ids == config.mask_token_id) | (ids > last)
    if refused.any():
        before = raw[: int(refused.int().argmax())].decode("utf-8", "surrogateescape")
        position = min(len(before), len(text) - 1)  # the byte may be one within a character
        known = "ASCII" if config.vocab_size == 128 else f"the bytes up to {last}"
        raise BadInput(f"character {text[position]!r} at position {position}: the model accepts "
                       f"{known} except byte {config.mask_token_id}, which is [MASK]; one trained "
                       "from scratch with --vocab-size 256 accepts every byte except [MASK]")
    return ids


def decode_tokens(tokens) -> str:
    """The text of a 1-D tensor of ids; bytes that do not form a UTF-8 character become U+FFFD."""
    return bytes(tokens.tolist()).decode("utf-8", errors="replace")


def read_text(path: Path | str) -> str:
    """The UTF-8 text of a file, or of stdin for "-", without byte order mark and with LF for CRLF.
    """
    try:
        raw = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def load_corpus(path: Path | str, config: DiffusionConfig):
    """The first 90% of a text file's characters (the train split) and the rest (validation), both
    1-D uint8, and the text's SHA-256. Raises BadInput where the file is missing, shorter than
    twelve sequences, or has a character outside the vocabulary."""
    text = read_text(path)
    ids = encode_text(text, config)
    if len(ids) < 12 * config.sequence_len:  # so that training's held-out slice, 9%, has a sequence
        raise BadInput(f"{path}: {len(ids)} characters are too few; 12 sequences of "
                       f"{config.sequence_len} are the least")
    train, val = ids.tensor_split([int(0.9 * len(ids))])
    return train, val, hashlib.sha256(text.encode("utf-8")).hexdigest()


# The checkpoint: one torch.save of {"model": state dict, "config": dict, "meta": dict} ------------


def free_name(path: Path) -> Path | None:
    """The name to which a file X.pt can move: the first free one of X.1.pt, X.2.pt ...; None if
    there is no file X.pt. Follows links."""
    path = Path(path).resolve()
    if not path.exists():
        return None
    names = (path.with_name(f"{path.stem}.{n}{path.suffix}") for n in itertools.count(1))
    return next(name for name in names if not name.exists())


@contextmanager
def replacing(path: Path, aside: Path | None = None) -> Iterator[IO[bytes]]:
    """A temporary file beside `path`, open for writing, which is flushed to disk and renamed to
    `path` in the end. It replaces the old file, or the old file is renamed to `aside` just before.
    So a crash never leaves a half-written `path`. Follows links. Writes directly to a path that is
    not a regular file, such as /dev/null."""
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            yield file
        return
    temporary = path.with_name(f"{path.name[:60]}.{os.getpid()}.tmp")  # `temporaries` finds it
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if aside:
            path.rename(aside)
        try:
            os.replace(temporary, path)
        except OSError:
            if aside:
                aside.rename(path)
            raise
    finally:
        temporary.unlink(missing_ok=True)


def temporaries(path: Path) -> list[Path]:
    """What `replacing` was writing when its process was killed."""
    path = path.resolve()
    return list(path.parent.glob(f"{glob.escape(path.name[:60])}.[0-9]*.tmp"))


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile and DistributedDataParallel put before it."""
    return str(name).replace("_orig_mod.", "").removeprefix("module.")


def bfloat16_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the model's weights on the CPU, in half the bytes of float32."""
    return {name: x.to("cpu", torch.bfloat16) for name, x in model.state_dict().items()}


def save_weights(model: nn.Module, meta: dict, path: Path) -> Path | None:
    """Writes the weights, as bfloat16, and `meta`. An earlier file at `path` moves aside. Returns
    its new name."""
    contents = {"model": bfloat16_state(model), "config": asdict(model.config), "meta": meta}
    aside = free_name(path)
    with replacing(path, aside) as file:
        torch.save(contents, file)
    return aside


def read_checkpoint(path: Path | str) -> dict:
    """The file's dict, or BadInput if it is missing, truncated or not a checkpoint. A bare state
    dict, which is what the original project saves, gets the default config and an empty meta."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for broken files
        why = getattr(error, "strerror", None) or f"broken, or not by torch.save ({error!r:.40})"
        raise BadInput(f"weights file {path}: {why}") from error
    contents = contents if isinstance(contents, dict) else {}
    if "token_emb.weight" in map(plain_name, contents):
        contents = {"model": contents, "config": asdict(DiffusionConfig()), "meta": {}}
    if not all(isinstance(contents.get(part), dict) for part in ("model", "config", "meta")):
        raise BadInput(f"weights file {path}: not a tiny-diffusion model (model, config, meta)")
    return contents


def is_causal(contents: dict) -> bool:
    """Whether a checkpoint holds a GPT twin, which has the same names and shapes."""
    return bool(contents["meta"].get("causal"))


def build_model(contents: dict, path: Path | str) -> DiffusionTransformer:
    """The model of a checkpoint's dict, in float32 on the CPU. Raises BadInput, which names `path`,
    if a name or shape does not fit the config, or if a weight is not finite."""
    state = {plain_name(name): tensor for name, tensor in contents["model"].items()}
    try:
        with torch.device("meta"):  # no memory for weights: a damaged config may name any size
            model = DiffusionTransformer(DiffusionConfig(**contents["config"]))
        model.load_state_dict(state, assign=True)
        model = model.float()
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise BadInput("it holds numbers that are not finite")  # sampling would never end
    except (TypeError, RuntimeError, BadInput) as error:
        why = str(error).splitlines()[-1].strip()
        raise BadInput(f"weights file {path}: unusable ({why})") from error
    return model


def load_weights(path: Path | str, device: torch.device | str = "cpu", causal: bool = False):
    """The DiffusionTransformer in float32 on `device`, in eval mode, and its meta. Raises BadInput
    for a file that `read_checkpoint` or `build_model` refuses, and if the file holds a GPT twin
    (causal_twin.py) where `causal` is false, or none where it is true."""
    contents = read_checkpoint(path)
    if is_causal(contents) != causal:
        raise BadInput(f"weights file {path}: {'no GPT twin' if causal else 'a GPT twin'}")
    return build_model(contents, path).to(device).eval(), contents["meta"]


# What all scripts share ---------------------------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        silent = action.default is False or action.default in (None, "", [])
        return action.help if silent else super()._get_help_string(action)


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults and raises BadInput for bad input."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=HelpFormatter)

    def error(self, message):
        raise BadInput(message)


def number(kind: type, least: float, most: float = math.inf):
    """An argparse type: a finite number from `least` to `most`."""

    def parse(text):
        with suppress(ValueError):
            value = kind(text)
            if least <= value <= most and value < math.inf:
                return value
        wanted = f"{'a whole' if kind is int else 'a'} number from {least} to {most}"
        raise argparse.ArgumentTypeError(f"{text!r:.60}: expected {wanted.removesuffix(' to inf')}")

    return parse


COUNT = number(int, 1, 10**9)
SEED = number(int, 0, 2**31 - 1)
TEMPERATURE = number(float, 0, 100)


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first of CUDA, Apple's MPS and the CPU that works.
    Raises BadInput for a device that is missing or can't run the installed PyTorch's kernels."""
    for candidate in ("cuda", "mps", "cpu") if name == "auto" else (name,):
        try:
            (torch.ones(1, device=candidate) + 1).item()
            return torch.device(candidate)
        except (RuntimeError, AssertionError, ImportError) as error:
            why = str(error).partition(". ")[0].partition("\n")[0][:100]
            if name != "auto":
                raise BadInput(f"--device {name} can't be used ({why}); choose auto, cpu, cuda "
                               "or mps") from error
            if candidate == "cuda" and torch.cuda.is_available():
                say(f"cuda does not work ({why}); trying the next device")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether to multiply in bfloat16 on the device: on CUDA and on CPUs, if the hardware has units
    for it. A CPU without them emulates bfloat16, which is far slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and units


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bf16(device))


def harmless(text: str, stream: IO[str]) -> str:
    """The text for the stream. On a terminal, a dot replaces every control character except tab
    and line end: an escape sequence that a model wrote could do anything there."""
    return CONTROL.sub("·", text) if stream.isatty() else text


def say(message: str) -> None:
    """Writes a message to stderr, above a progress bar if there is one. If that fails (a closed
    terminal, `| head`, a full disk), the program goes on."""
    with suppress(OSError):
        tqdm.write(harmless(message, sys.stderr), file=sys.stderr)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. On a CPU, torch raises a RuntimeError like any other."""
    signs = "allocate memory", "not enough memory", "Storage size calculation overflowed"
    named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return named or any(sign in str(error) for sign in signs)


def start(main: Callable[[], None]) -> None:
    """Calls main. Bad input, a failing file or too little memory prints one line and exits with
    code 2. Ctrl-C exits with 130. A closed pipe ends the program silently. Output is UTF-8."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as by 2>&-
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # Python flushes stdout again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except (BadInput, OSError) as error:
        say(f"error: {' '.join(str(error).splitlines())}")
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        say("error: out of memory; a smaller batch, network or number of samples needs less")
        sys.exit(2)
