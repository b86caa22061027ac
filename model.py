"""A masked (absorbing-state) diffusion language model over characters.

Everything that defines the model is here: config, network, diffusion (forward process, objective,
bound), characters and corpus, checkpoint. The last section, "What all scripts share", holds errors,
the command line and the choice of a device. `training.py` fits the model, `sample.py` runs it in
reverse.

Symbols, here and in the papers (MDLM, arXiv 2406.07524; MD4, arXiv 2406.04329):

    x_0             clean text, (B, T) character ids
    x_t             the same text with some characters replaced by [MASK]
    t               noise level, 1..diffusion_steps; the network's index is t - 1
    alpha           probability that a character is visible at level t: 1 - t / diffusion_steps
    m               number of masked characters in a sequence
    NELBO           negative evidence lower bound: an upper bound on -log p(x_0)
    B, T, V         batch, sequence length, vocabulary size
    C, H, D         channels, attention heads, channels per head
"""

import argparse
import hashlib
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO

# GNU OpenMP's threads spin while they wait. With more threads than cores, as when sample.py runs
# beside training.py, they spin on cores that others need, and both crawl. Read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

ROOT = Path(__file__).resolve().parent
DEFAULT_DATA = ROOT / "data" / "tiny_shakespeare.txt"
DEFAULT_DATA_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DEFAULT_WEIGHTS = ROOT / "weights" / "diffusion_model.pt"
EVALUATION_LIMIT = 2_000_000  # characters; a longer text is measured on evenly spaced windows


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
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("mask_token_id", "context_len") else 1
            if type(value) is not int or value < least:
                raise BadInput(f"{field.name} is {value!r}, not a whole number of at least {least}")
        if self.n_embd % (2 * self.n_head):
            raise BadInput(
                f"n_embd {self.n_embd} is not a multiple of {2 * self.n_head}, twice n_head "
                f"{self.n_head}: each head rotates its channels in pairs"
            )
        if not 2 <= self.vocab_size <= 256:
            raise BadInput(f"vocab_size is {self.vocab_size}, not 2 to 256 (tokens are bytes)")
        for name, limit in (("mask_token_id", "vocab_size"), ("context_len", "sequence_len")):
            if getattr(self, name) >= getattr(self, limit):
                raise BadInput(
                    f"{name} {getattr(self, name)} is not below {limit} {getattr(self, limit)}"
                )


# --------------------------------------------------------------------------------------------------
# The network: nanochat's transformer block, with attention in both directions


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(
    length: int, head_dim: int, base: float = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position times frequency, (T, D/2) each. RoFormer, arXiv 2104.09864."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)                                       # (B, H, T, D/2) each
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, (B, H, K, D) for K queries: each attends to all T keys.

    On a CPU as plain products: the fused kernel is slower there, its backward pass up to three
    times."""
    if q.device.type == "cpu":
        return ((q * q.size(-1) ** -0.5) @ k.mT).softmax(-1) @ v    # (B, H, K, T) in between
    return F.scaled_dot_product_attention(q, k, v)


def pick(x: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
    """x (B, T, C) at the positions `at` (B, K): (B, K, C). Without any, all of x; then K is T."""
    return x if at is None else x.gather(1, at[..., None].expand(-1, -1, x.size(-1)))


class Attention(nn.Module):
    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_v = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, at=None):
        B, T, C = x.shape
        heads = (B, -1, self.n_head, C // self.n_head)
        x = x.to(self.c_q.weight.dtype)  # cast once, where autocast would cast three times
        q = self.c_q(pick(x, at)).view(heads).transpose(1, 2)       # (B, H, K, D)
        k = self.c_k(x).view(heads).transpose(1, 2)                 # (B, H, T, D)
        v = self.c_v(x).view(heads).transpose(1, 2)                 # (B, H, T, D)
        k = norm(rotate(k, cos, sin))
        if at is not None:
            cos, sin = cos[at][:, None], sin[at][:, None]           # (B, 1, K, D/2)
        y = attend(norm(rotate(q, cos, sin)), k, v)                 # (B, H, K, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, -1, C))     # (B, K, C)


class MLP(nn.Module):
    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())           # (B, T, C); arXiv 2109.08668


class Block(nn.Module):
    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, at=None):
        y = self.attn(norm(x), cos, sin, at)                        # (B, K, C)
        x = pick(x, at) + y                                         # (B, K, C)
        return x + self.mlp(norm(x))                                # (B, K, C)


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
        """token_emb, time_emb          normal, std 1
        c_q, c_k, c_v, c_fc          normal, std min(1, sqrt(fan_out / fan_in)) / sqrt(fan_in)
        both c_proj, output_head     zero: every block starts as the identity, and every character
                                     is equally likely
        """
        for name, parameter in self.named_parameters():
            if "_emb" in name:
                nn.init.normal_(parameter)
            elif "c_proj" in name or "output_head" in name:
                nn.init.zeros_(parameter)
            else:
                fan_out, fan_in = parameter.shape
                std = min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
                nn.init.normal_(parameter, std=std)

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, at: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (B, T, V) at every position, from ids x_t (B, T) and noise indices t (B,), as
        `noise_index` gives them. T may be anything up to sequence_len.

        With positions `at` (B, K): logits (B, K, V) there, and the last block skips the others."""
        T = x_t.size(1)
        cos, sin = self.cos[:T], self.sin[:T]
        x = self.token_emb(x_t) + self.time_emb(t)[:, None]         # (B, T, C)
        x = norm(x)                                                 # (B, T, C)
        for block in self.blocks[:-1]:
            x = block(x, cos, sin)                                  # (B, T, C)
        x = self.blocks[-1](x, cos, sin, at)                        # (B, K, C)
        return self.output_head(norm(x))                            # (B, K, V)


# --------------------------------------------------------------------------------------------------
# The diffusion


def noise_index(masked: torch.Tensor, diffusion_steps: int) -> torch.Tensor:
    """The network's time index (B,) for sequences whose `masked` (B, T) positions are hidden:
    t - 1 with t = ceil(diffusion_steps * m / T), or 0 where nothing is masked. Training, evaluation
    and sampling all use this one rule, so the index always says how noisy the input is."""
    m, T = masked.sum(1), masked.size(1)
    return ((diffusion_steps * m + T - 1) // T - 1).clamp(min=0)


def q_sample(
    x_0: torch.Tensor,
    t: torch.Tensor,
    config: DiffusionConfig,
    generator: torch.Generator | None = None,
    prefix_len: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward process q(x_t | x_0) with alpha = 1 - t / diffusion_steps: each character is masked
    independently with probability 1 - alpha. MDLM, arXiv 2406.07524, eq. 3.

    x_0 (B, T) ids, t (B,) levels, prefix_len (B,) characters kept clean at the left of each row.
    Returns x_t (B, T) and which positions are masked (B, T)."""
    u = torch.rand(x_0.shape, generator=generator, device=x_0.device)
    masked = u < t[:, None] / config.diffusion_steps
    if prefix_len is not None:
        masked &= torch.arange(x_0.size(1), device=x_0.device) >= prefix_len[:, None]
    return x_0.masked_fill(masked, config.mask_token_id), masked


def log_probs(logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """log p(x_0 | x_t) per position, (B, T, V) in float32, with probability zero for [MASK]
    (MDLM's zero masking probabilities, arXiv 2406.07524, sec. 3.2.3)."""
    is_mask_token = torch.arange(logits.size(-1), device=logits.device) == mask_token_id
    return logits.float().masked_fill(is_mask_token, -math.inf).log_softmax(-1)


def masked_nll(
    logits: torch.Tensor, x_0: torch.Tensor, masked: torch.Tensor, mask_token_id: int
) -> torch.Tensor:
    """Mean over the masked positions of -log p(x_i | x_t), in nats per character, (B,); 0 for a row
    with nothing masked."""
    log_p = log_probs(logits, mask_token_id)                        # (B, T, V)
    nll = -log_p.gather(-1, x_0[..., None]).squeeze(-1)             # (B, T)
    return nll.masked_fill(~masked, 0.0).sum(1) / masked.sum(1).clamp(min=1)


def masked_count_weights(length: int, diffusion_steps: int) -> torch.Tensor:
    """The bound as an average over the number of masked characters: weights (T,) for m = 1..T.

    The bound of arXiv 2406.07524 (eq. 8, discrete time) per character is
        NELBO = E_t[ (S / t) * sum over masked i of -log p(x_i | x_t) ] / T,   t uniform on 1..S,
    and given t the count m is Binomial(T, t / S), with every subset of m positions equally likely.
    So it equals sum_m w(m) * E[masked_nll | m] with w(m) = sum_t Binomial(m; T, t/S) * m / (T * t).
    The weights sum to 1 (E[m] = T t / S) and approach 1 / T as S grows (RADD, arXiv 2406.03736)."""
    m = torch.arange(1, length + 1, dtype=torch.float64)
    t = torch.arange(1, diffusion_steps + 1, dtype=torch.float64)[:, None]
    p = t / diffusion_steps
    log_choose = math.lgamma(length + 1) - torch.lgamma(m + 1) - torch.lgamma(length - m + 1)
    log_binomial = log_choose + torch.xlogy(m, p) + torch.xlogy(length - m, 1 - p)
    return (log_binomial.exp() * m / (length * t)).sum(0)


def nelbo_samples(
    model: DiffusionTransformer, x_0: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """One unbiased draw of the NELBO for each row of x_0 (B, T), in nats per character, (B,).

    m is drawn from `masked_count_weights`, stratified over the rows, then m positions uniformly,
    with far less variance than Bernoulli masks weighted by S / t."""
    config, (B, T), device = model.config, x_0.shape, generator.device
    u = torch.rand(B, generator=generator, device=device)
    u = (u + torch.randperm(B, generator=generator, device=device)) / B
    cdf = masked_count_weights(T, config.diffusion_steps).cumsum(0).float().to(device)
    m = torch.searchsorted(cdf, u).clamp(max=T - 1) + 1
    nll = []
    for x_0_part, m_part in zip(x_0.split(64), m.split(64), strict=True):
        x_0_part = x_0_part.to(device)
        u = torch.rand(x_0_part.shape, generator=generator, device=device)
        rank = u.argsort(1).argsort(1)                              # of each position, 0..T-1
        masked = rank < m_part[:, None]
        x_t = x_0_part.masked_fill(masked, config.mask_token_id)
        logits = model(x_t, noise_index(masked, config.diffusion_steps))
        nll.append(masked_nll(logits, x_0_part, masked, config.mask_token_id))
    return torch.cat(nll)


def spaced_windows(tokens: torch.Tensor, length: int, windows: int) -> torch.Tensor:
    """So many evenly spaced windows of a 1-D tensor, (windows, length)."""
    starts = torch.linspace(0, len(tokens) - length, windows, dtype=torch.float64).long()
    return tokens.unfold(0, length, 1)[starts]


@torch.no_grad()
def nelbo(
    model: DiffusionTransformer,
    tokens: torch.Tensor,
    passes: int = 8,
    seed: int = 0,
    windows: int | None = None,
) -> tuple[float, float]:
    """NELBO of a 1-D tensor of ids in nats per character, and its standard error.

    The text is cut into non-overlapping windows of sequence_len, each without context; what is left
    over is a shorter window. Where `windows` is given, or the text is longer than EVALUATION_LIMIT,
    that many evenly spaced windows stand for it. Every pass draws fresh masks for all windows; the
    standard error comes from the spread of the passes, so `passes` is at least 2. Divide by ln 2
    for bits."""
    length, device = model.config.sequence_len, next(model.parameters()).device
    if windows is None and len(tokens) > EVALUATION_LIMIT:
        windows = EVALUATION_LIMIT // length
    if windows is not None:
        batches = [spaced_windows(tokens, length, windows)]
    else:
        whole = len(tokens) // length * length
        batches = [tokens[:whole].view(-1, length), tokens[whole:][None]]
        batches = [batch for batch in batches if batch.numel()]
    generator = torch.Generator(device).manual_seed(seed)
    was_training = model.training
    model.eval()
    estimates = torch.zeros(passes, dtype=torch.float64)
    with autocast(device):
        for i in range(passes):
            for x_0 in batches:
                nll = nelbo_samples(model, x_0, generator)
                estimates[i] += nll.cpu().double().sum() * x_0.size(1)
    model.train(was_training)
    estimates /= sum(batch.numel() for batch in batches)
    return estimates.mean().item(), (estimates.std() / math.sqrt(passes)).item()


# --------------------------------------------------------------------------------------------------
# Characters and corpus


def encode_text(text: str, vocab_size: int = 128, mask_token_id: int = 0) -> torch.Tensor:
    """UTF-8 bytes of `text` as a 1-D int64 tensor. Raises BadInput for a byte that is [MASK] or not
    below `vocab_size`, naming the character and its position: nothing is silently replaced."""
    try:
        raw = bytearray(text.encode("utf-8"))
    except UnicodeEncodeError as error:  # Python's stand-in for a byte that it could not decode
        raise BadInput(f"the text is not UTF-8 at position {error.start}") from error
    ids = torch.frombuffer(raw, dtype=torch.uint8).long() if raw else torch.empty(0).long()
    refused = (ids >= vocab_size) | (ids == mask_token_id)
    if refused.any():
        position = len(raw[: int(refused.int().argmax())].decode("utf-8", errors="ignore"))
        if ord(text[position]) == mask_token_id:
            raise BadInput(f"character {text[position]!r} at position {position} means [MASK]")
        raise BadInput(
            f"character {text[position]!r} at position {position} is not among the model's "
            f"{vocab_size} byte values (one trained with --vocab-size 256 takes any text)"
        )
    return ids


def decode_tokens(tokens: torch.Tensor) -> str:
    """The text of a 1-D tensor of ids; bytes that are no whole UTF-8 character become U+FFFD."""
    return bytes(tokens.tolist()).decode("utf-8", errors="replace")


def read_text(path: Path) -> tuple[str, bytes]:
    """The file's UTF-8 text without a byte order mark, and its bytes; BadInput where unreadable."""
    try:
        if path.is_char_device() or path.is_block_device():
            raise BadInput(f"{path}: a device, not a text file")
        raw = path.read_bytes()
        return raw.decode("utf-8-sig"), raw
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start})") from error


def load_ids(path: Path, config: DiffusionConfig) -> tuple[torch.Tensor, str]:
    """The file's characters as a 1-D tensor of ids, and its SHA-256. Raises BadInput where it is
    missing or empty, or has a character outside the vocabulary."""
    path = Path(path)
    text, raw = read_text(path)
    sha256 = hashlib.sha256(raw).hexdigest()
    if path.resolve() == DEFAULT_DATA and sha256 != DEFAULT_DATA_SHA256:
        warn(f"{path} is not the published text (did Git convert its line ends?)")
    try:
        ids = encode_text(text, config.vocab_size, config.mask_token_id)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    if not len(ids):
        raise BadInput(f"{path}: empty")
    return ids, sha256


def load_corpus(path: Path, config: DiffusionConfig) -> tuple[torch.Tensor, torch.Tensor, str]:
    """The train split (first 90% of the characters), the validation split (the rest), and the
    file's SHA-256. Raises BadInput as `load_ids` does, and where the file is too short for either
    split to hold one sequence plus one character."""
    ids, sha256 = load_ids(path, config)
    n_train = int(0.9 * len(ids))
    train, val = ids[:n_train], ids[n_train:]
    if len(val) < config.sequence_len + 1:
        raise BadInput(
            f"{path}: {len(ids)} characters are too few; its last 10% has to hold "
            f"sequence_len + 1 = {config.sequence_len + 1}"
        )
    return train, val, sha256


# --------------------------------------------------------------------------------------------------
# The checkpoint: one torch.save of {"model": state dict, "config": dict, "meta": dict}


@contextmanager
def atomic_file(path: Path, mode: str = "wb", **kwargs) -> Iterator[IO]:
    """A temporary file beside `path`, open for writing, that is flushed to disk and renamed over it
    in the end: a crash at any moment leaves either the old file or the new one. BadInput where the
    disk is full."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **kwargs) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            why = error.strerror or error
            raise BadInput(f"{path}: not saved ({why}); the old file is still there") from error
        raise


def replace(source: Path, target: Path, tries: int = 5) -> None:
    """os.replace, tried again for a second: on Windows a virus scanner may hold the file open."""
    for left in reversed(range(tries)):
        try:
            return os.replace(source, target)
        except PermissionError:
            if not left:
                raise
            time.sleep(0.2)


def save_weights(model: DiffusionTransformer, meta: dict, path: Path) -> None:
    """Writes the weights as bfloat16, half the bytes; `meta` says what they score as such."""
    state = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()}
    with atomic_file(path) as file:
        torch.save({"model": state, "config": asdict(model.config), "meta": meta}, file)


def read_checkpoint(path: Path) -> dict:
    """The file's dict, or BadInput if it is missing, truncated or not a checkpoint. A bare state
    dict, which is what the original project saves, gets the default config and an empty meta."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        why = error.strerror or error
        raise BadInput(f"weights file {path}: {why} (uv run training.py makes one)") from error
    except Exception as error:  # torch raises many kinds for broken files
        kind = type(error).__name__
        raise BadInput(f"weights file {path}: truncated or not by torch.save ({kind})") from error
    if isinstance(contents, dict) and "token_emb.weight" in contents:
        contents = {"model": contents, "config": asdict(DiffusionConfig()), "meta": {}}
    if not isinstance(contents, dict) or not {"model", "config", "meta"} <= contents.keys():
        raise BadInput(f"weights file {path}: no tiny-diffusion model (needs model, config, meta)")
    return contents


def load_weights(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[DiffusionTransformer, dict]:
    """The model in float32 on `device`, in eval mode, and its meta. Names and shapes have to be
    exactly those that the file's config asks for, or BadInput says which are not."""
    contents = read_checkpoint(path)
    try:
        model = DiffusionTransformer(DiffusionConfig(**contents["config"]))
        model.load_state_dict(contents["model"])
    except (TypeError, BadInput) as error:
        raise BadInput(f"weights file {path}: unusable ({error})") from error
    except RuntimeError as error:  # a heading, then one line for each parameter that does not fit
        raise BadInput(f"weights file {path}: {str(error).splitlines()[1].strip()}") from error
    return model.to(device).eval(), contents["meta"]


# --------------------------------------------------------------------------------------------------
# What all scripts share


class BadInput(ValueError):
    """Something that the user gave can't be used; the message is one line for them to read."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults and answers bad input with one line and exit code 2."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=HelpFormatter)

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def number(kind: type, least: float = -math.inf, most: float = math.inf, above: float = -math.inf):
    """An argparse type: a finite number in the given range."""
    limits = {"at least": least, "above": above, "at most": most}
    wanted = " and ".join(f"{word} {x}" for word, x in limits.items() if math.isfinite(x))

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and value > above and abs(value) < math.inf):
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {wanted}".rstrip())
        return value

    return parse


COUNT = number(int, least=1, most=10**9)
SEED = number(int, least=0, most=2**31 - 1)
TEMPERATURE = number(float, least=0, most=100)


def add_device_argument(parser) -> None:
    """--device, for a parser or a group of its arguments."""
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA, then MPS, then CPU), cpu, cuda or mps"
    )


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first of CUDA, Apple's MPS and the CPU that works.
    Raises BadInput for a device that is missing or can't run this build of PyTorch's kernels."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    names = [*(device for device in found if found[device]), "cpu"] if name == "auto" else [name]
    for candidate in names:
        try:
            device = torch.device(candidate)
            (torch.ones(1, device=device) + 1).item()
            return device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            why = str(error).splitlines()[0]
            if name != "auto":
                raise BadInput(
                    f"--device {name} can't be used ({why}); auto, cpu, cuda and mps are possible, "
                    "as the machine and this PyTorch build allow"
                ) from error
            warn(f"{candidate} does not work ({why}); trying the next device")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 matrix units. A CPU without them emulates bfloat16: about
    100 times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bf16(device))


def hardware(device: torch.device) -> str:
    """The device in words, for logs and checkpoints: its name, threads and precision."""
    precision = "bfloat16" if multiplies_bf16(device) else "float32"
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}, {precision}"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        name = next(names, name)
    return f"{device.type}, {name}, {torch.get_num_threads()} threads, {precision}"


def warn(message: str) -> None:
    """One line on stderr, above a progress bar if there is one."""
    tqdm.write(message, file=sys.stderr)


def run(main: Callable[[], None]) -> None:
    """Calls main; bad input and failing files end in one line and exit code 2, a closed pipe
    quietly. Text in and out is UTF-8 on every platform."""
    encodings = (sys.stdin, "strict"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")
    for stream, errors in encodings:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=errors)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (BadInput, OSError) as error:
        warn(f"error: {error}")
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not out_of_memory and "allocate memory" not in str(error):
            raise
        warn("error: out of memory; try fewer samples, a smaller batch or a smaller network")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
