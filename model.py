"""A masked (absorbing-state) diffusion language model over characters.

Everything that defines the model lives here, in the order in which it is best read: the characters,
the network, the diffusion (forward process, objective, the reverse step's probabilities), and the
checkpoint. `training.py` fits it, `sample.py` runs it backwards.

Symbols, here and in the papers (MDLM, arXiv 2406.07524; MD4, arXiv 2406.04329):

    x_0             clean text, (B, T) character ids
    x_t             the same text with some characters replaced by [MASK]
    t               noise level, 1..diffusion_steps; the network's index is t - 1
    alpha           probability that a character is still visible at level t: 1 - t / diffusion_steps
    m               how many characters of a sequence are masked
    NELBO           negative evidence lower bound: an upper bound on -log p(x_0)
    B, T, V         batch, sequence length, vocabulary size
    H, D            attention heads, channels per head
"""

import hashlib
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent
DEFAULT_DATA = ROOT / "data" / "tiny_shakespeare.txt"
DEFAULT_WEIGHTS = ROOT / "weights" / "diffusion_model.pt"


class BadInput(ValueError):
    """Something that the user gave cannot be used; the message is one line meant for them."""


@dataclass
class DiffusionConfig:
    sequence_len: int = 256
    vocab_size: int = 128  # byte values: 128 is ASCII, 256 is any UTF-8 text
    mask_token_id: int = 0
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    diffusion_steps: int = 128
    context_len: int = 16  # longest clean prefix in training; what a block continues in sampling

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("mask_token_id", "context_len") else 1
            if type(value) is not int or value < least:
                raise BadInput(f"{field.name} is {value!r}; it has to be a whole number of at least {least}")
        if self.n_embd % (2 * self.n_head):
            raise BadInput(
                f"n_embd {self.n_embd} does not fit n_head {self.n_head}: n_embd has to be a multiple of "
                f"{2 * self.n_head}, because each head rotates its channels in pairs"
            )
        if not 2 <= self.vocab_size <= 256:
            raise BadInput(f"vocab_size is {self.vocab_size}; tokens are bytes, so 2 to 256 is possible")
        if self.mask_token_id >= self.vocab_size:
            raise BadInput(f"mask_token_id {self.mask_token_id} is not below vocab_size {self.vocab_size}")
        if self.context_len >= self.sequence_len:
            raise BadInput(f"context_len {self.context_len} is not below sequence_len {self.sequence_len}")


# ----------------------------------------------------------------------------------------------------
# Characters


def encode_text(text: str, vocab_size: int = 128, mask_token_id: int = 0) -> torch.Tensor:
    """UTF-8 bytes of `text` as a 1-D int64 tensor. Raises BadInput for a byte that is [MASK] or not
    below `vocab_size`, naming the character and its position: nothing is silently substituted."""
    ids = torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8).long() if text else torch.empty(0).long()
    if ((ids >= vocab_size) | (ids == mask_token_id)).any():
        for position, character in enumerate(text):
            if any(byte >= vocab_size or byte == mask_token_id for byte in character.encode("utf-8")):
                what = "is reserved for [MASK]" if ord(character) == mask_token_id else f"does not fit vocab_size {vocab_size}"
                raise BadInput(f"character {character!r} at position {position} {what}")
    return ids


def decode_tokens(tokens: torch.Tensor) -> str:
    """The text of a 1-D tensor of ids; bytes that are no whole UTF-8 character become U+FFFD."""
    return bytes(tokens.tolist()).decode("utf-8", errors="replace")


def load_corpus(path: Path, config: DiffusionConfig) -> tuple[torch.Tensor, torch.Tensor, str]:
    """The train split (first 90% of the characters), the validation split (the rest) and the SHA-256
    of the file. Raises BadInput where the file is missing or empty, holds a character outside the
    vocabulary, or is too short for either split to hold one sequence plus one character."""
    try:
        raw = Path(path).read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise BadInput(f"data file {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        raise BadInput(f"data file {path}: not UTF-8 text (byte {error.start})")
    try:
        ids = encode_text(text, config.vocab_size, config.mask_token_id)
    except BadInput as error:
        raise BadInput(f"data file {path}: {error}")
    if not len(ids):
        raise BadInput(f"data file {path}: empty")
    n_train = int(0.9 * len(ids))
    train, val = ids[:n_train], ids[n_train:]
    if len(val) < config.sequence_len + 1:
        raise BadInput(
            f"data file {path}: {len(ids)} characters are too few; its last 10% has to hold "
            f"sequence_len + 1 = {config.sequence_len + 1}"
        )
    return train, val, hashlib.sha256(raw).hexdigest()


# ----------------------------------------------------------------------------------------------------
# The network: nanochat's transformer block, with attention in both directions


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(length: int, head_dim: int, base: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position times frequency, (length, head_dim / 2) each. RoFormer, arXiv 2104.09864."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)                                   # (B, H, T, D/2) each
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, every query reading every key; (B, H, T, D) like q. Gradients on a
    CPU go through plain products: the fused kernel's backward pass takes up to three times as long."""
    if q.device.type == "cpu" and torch.is_grad_enabled():
        return ((q * q.size(-1) ** -0.5) @ k.mT).softmax(-1) @ v  # (B, H, T, T) in between
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_v = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q = self.c_q(x).view(heads).transpose(1, 2)             # (B, H, T, D)
        k = self.c_k(x).view(heads).transpose(1, 2)             # (B, H, T, D)
        v = self.c_v(x).view(heads).transpose(1, 2)             # (B, H, T, D)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        y = attend(q, k, v)                                     # (B, H, T, D), no mask: both directions
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())       # (B, T, C); Primer, arXiv 2109.08668


class Block(nn.Module):
    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin):
        x = x + self.attn(norm(x), cos, sin)                    # (B, T, C)
        return x + self.mlp(norm(x))                            # (B, T, C)


class DiffusionTransformer(nn.Module):
    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.config = config
        self.token_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.time_emb = nn.Embedding(config.diffusion_steps, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.output_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = rotary_tables(config.sequence_len, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)      # not saved: the config determines them
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """token_emb, time_emb              normal, std 1
        c_q, c_k, c_v, c_fc              normal, std min(1, sqrt(fan_out / fan_in)) / sqrt(fan_in)
        both c_proj, output_head         zero: every block starts as the identity, every character
                                         starts equally likely
        """
        for name, parameter in self.named_parameters():
            if "_emb" in name:
                nn.init.normal_(parameter)
            elif "c_proj" in name or "output_head" in name:
                nn.init.zeros_(parameter)
            else:
                fan_out, fan_in = parameter.shape
                nn.init.normal_(parameter, std=min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) for every position, from ids x_t (B, T) and noise indices t (B,), which
        `noise_index` gives. T may be anything up to sequence_len."""
        T = x_t.size(1)
        x = self.token_emb(x_t) + self.time_emb(t)[:, None]     # (B, T, C)
        x = norm(x)                                             # (B, T, C)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])            # (B, T, C)
        return self.output_head(norm(x))                        # (B, T, V)


# ----------------------------------------------------------------------------------------------------
# The diffusion


def noise_index(masked: torch.Tensor, diffusion_steps: int) -> torch.Tensor:
    """The network's time index (B,) for sequences whose `masked` (B, T) positions are hidden:
    t - 1 with t = ceil(diffusion_steps * m / T). The one rule for training, evaluation and sampling,
    so that the index always says how noisy the input is; with nothing masked it is 0."""
    m, n = masked.sum(1), masked.size(1)
    return ((diffusion_steps * m + n - 1) // n - 1).clamp(min=0)


def q_sample(x_0, t, config, generator=None, prefix_len=None):
    """Forward process q(x_t | x_0), linear schedule alpha = 1 - t / diffusion_steps: each character is
    hidden independently with probability t / diffusion_steps. MDLM, arXiv 2406.07524, eq. 3.

    x_0 (B, T) ids, t (B,) levels 1..diffusion_steps, prefix_len (B,) characters kept clean at the
    left of each row. Returns x_t (B, T) and which positions are masked (B, T)."""
    draw = torch.rand(x_0.shape, generator=generator, device=x_0.device)
    masked = draw < t[:, None] / config.diffusion_steps
    if prefix_len is not None:
        masked &= torch.arange(x_0.size(1), device=x_0.device) >= prefix_len[:, None]
    return x_0.masked_fill(masked, config.mask_token_id), masked


def log_probs(logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """log p(x_0 | x_t) per position, (B, T, V) in float32, with probability zero for [MASK]
    (MDLM's zero masking probabilities, arXiv 2406.07524, sec. 3.2.3)."""
    is_mask_token = torch.arange(logits.size(-1), device=logits.device) == mask_token_id
    return logits.float().masked_fill(is_mask_token, -math.inf).log_softmax(-1)


def masked_nll(logits, x_0, masked, mask_token_id):
    """Mean over the masked positions of -log p(x_i | x_t), in nats per character, (B,); 0 for a row
    with nothing masked."""
    nll = -log_probs(logits, mask_token_id).gather(-1, x_0[..., None]).squeeze(-1)   # (B, T)
    return nll.masked_fill(~masked, 0.0).sum(1) / masked.sum(1).clamp(min=1)


def masked_count_weights(length: int, diffusion_steps: int) -> torch.Tensor:
    """The bound as an average over how many characters are masked: weights (length,) for m = 1..length.

    The bound of arXiv 2406.07524 (eq. 8, discrete time) per character is
        NELBO = E_t[ (S / t) * sum over masked i of -log p(x_i | x_t) ] / T,   t uniform on 1..S,
    and given t the count m is Binomial(T, t / S), every subset of m positions being equally likely.
    So it equals sum_m w(m) * E[masked_nll | m] with w(m) = sum_t Binomial(m; T, t / S) * m / (T * t).
    The weights add up to 1 (E[m] = T t / S) and approach 1 / T as S grows (RADD, arXiv 2406.03736)."""
    m = torch.arange(1, length + 1, dtype=torch.float64)
    t = torch.arange(1, diffusion_steps + 1, dtype=torch.float64)[:, None]
    p = t / diffusion_steps
    log_choose = math.lgamma(length + 1) - torch.lgamma(m + 1) - torch.lgamma(length - m + 1)
    log_binomial = log_choose + torch.xlogy(m, p) + torch.xlogy(length - m, 1 - p)
    return (log_binomial.exp() * m / (length * t)).sum(0)


def nelbo_samples(model, x_0, generator):
    """One unbiased draw of the NELBO per row of x_0 (B, T), in nats per character.

    m is drawn from `masked_count_weights`, stratified over the rows, then m positions uniformly:
    far less variance than Bernoulli masks weighted by S / t. `generator` lives on x_0's device."""
    config, (B, T), device = model.config, x_0.shape, x_0.device
    u = torch.rand(B, generator=generator, device=device) + torch.randperm(B, generator=generator, device=device)
    cdf = masked_count_weights(T, config.diffusion_steps).cumsum(0).float().to(device)
    m = torch.searchsorted(cdf, u / B).clamp(max=T - 1) + 1
    order = torch.rand(B, T, generator=generator, device=device).argsort(1).argsort(1)
    masked = order < m[:, None]
    x_t = x_0.masked_fill(masked, config.mask_token_id)
    logits = [
        model(rows, index) for rows, index in zip(x_t.split(64), noise_index(masked, config.diffusion_steps).split(64))
    ]
    return masked_nll(torch.cat(logits), x_0, masked, config.mask_token_id)


@torch.no_grad()
def nelbo(model, tokens, passes=8, seed=0, windows=None):
    """NELBO of a 1-D tensor of ids in nats per character, and its standard error.

    The text is cut into non-overlapping windows of sequence_len with no context (the rest, if any, is
    a shorter window), or into `windows` evenly spaced ones where that is given. Every pass draws fresh
    masks for all windows; the passes' spread gives the standard error of their mean. Divide by ln 2
    for bits. Needs passes >= 2."""
    length, device = model.config.sequence_len, next(model.parameters()).device
    if windows is not None:
        starts = torch.linspace(0, len(tokens) - length, windows).long()
        batches = [torch.stack([tokens[s : s + length] for s in starts])]
    else:
        whole = len(tokens) // length * length
        batches = [part for part in (tokens[:whole].view(-1, length), tokens[whole:][None]) if part.numel()]
    n_characters = sum(batch.numel() for batch in batches)
    generator = torch.Generator(device).manual_seed(seed)
    was_training = model.training
    model.eval()
    with autocast(device):
        estimates = torch.stack([
            sum(nelbo_samples(model, batch.to(device), generator).cpu().double().sum() * batch.size(1) for batch in batches)
            for _ in range(passes)
        ]) / n_characters
    model.train(was_training)
    return estimates.mean().item(), (estimates.std() / math.sqrt(passes)).item()


# ----------------------------------------------------------------------------------------------------
# Devices


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 matrix units. A CPU without them emulates bfloat16, which is
    a hundred times slower than float32, so the answer decides between a gain and a standstill."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bf16(device))


# ----------------------------------------------------------------------------------------------------
# The checkpoint: one torch.save of {"model": state dict, "config": dict, "meta": dict}


def save_atomically(contents: dict, path: Path) -> None:
    """torch.save through a temporary file beside `path`, flushed to disk and renamed over it: a crash
    at any moment leaves either the old file or the new one. BadInput where the disk is full or refuses."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise BadInput(f"{path}: not saved ({error.strerror or error}); what stood there before still does")
        raise


def save_weights(model: DiffusionTransformer, meta: dict, path: Path) -> None:
    """Writes the weights as bfloat16 (half the bytes; `meta` records what the file scores as it is)."""
    state = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_atomically({"model": state, "config": asdict(model.config), "meta": meta}, path)


def read_checkpoint(path: Path) -> dict:
    """The file's dict, or BadInput for one that is missing, truncated or not a checkpoint. A bare state
    dict, which is what the original project saves, gets the default config and an empty meta."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BadInput(f"weights file {path}: {error.strerror or error} (uv run training.py makes one)")
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError, ... for broken files
        raise BadInput(f"weights file {path}: truncated, or not written by torch.save ({type(error).__name__})")
    if isinstance(contents, dict) and "token_emb.weight" in contents:
        contents = {"model": contents, "config": asdict(DiffusionConfig()), "meta": {}}
    if not isinstance(contents, dict) or not {"model", "config", "meta"} <= contents.keys():
        raise BadInput(f"weights file {path}: not a tiny-diffusion checkpoint (needs model, config and meta)")
    return contents


def load_weights(path: Path, device: torch.device | str = "cpu") -> tuple[DiffusionTransformer, dict]:
    """The model in float32 on `device`, in eval mode, and its meta. Strict: names and shapes have to be
    exactly those that the file's config asks for, or BadInput says which are not."""
    contents = read_checkpoint(path)
    try:
        model = DiffusionTransformer(DiffusionConfig(**contents["config"]))
    except (TypeError, BadInput) as error:
        raise BadInput(f"weights file {path}: unusable config ({error})")
    expected, found = model.state_dict(), contents["model"]
    for name in sorted(expected.keys() | found.keys()):
        shapes = [tuple(state[name].shape) if isinstance(state.get(name), torch.Tensor) else "nothing"
                  for state in (found, expected)]
        if shapes[0] != shapes[1]:
            raise BadInput(f"weights file {path}: {name} holds {shapes[0]} where its config asks for {shapes[1]}")
    model.load_state_dict(found)
    return model.to(device).eval(), contents["meta"]
