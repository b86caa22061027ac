"""The model's causal twin: the same trunk and optimizers, trained to predict the next character.

    uv run tests/causal_twin.py --max-minutes 17
    uv run tests/causal_twin.py --write 3000000 > weights/twin.txt

It is what a GPT of this size makes of the same text, and the benchmarks set it beside the diffusion
model. Its weights, weights/causal_twin.pt, are not shipped. It overfits after some ten million
characters, so the best evaluation is kept. What it writes is text that nobody has learned by heart
yet, for training.py to learn from besides the real one.
"""

import itertools
import math
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import (  # noqa: E402
    COUNT,
    DEFAULT_DATA,
    ROOT,
    SEED,
    BadInput,
    CommandLine,
    DiffusionConfig,
    DiffusionTransformer,
    add_device_argument,
    autocast,
    decode_tokens,
    hardware,
    load_corpus,
    log_probs,
    number,
    pick_device,
    read_checkpoint,
    run,
    save_weights,
    warn,
)
from sample import draw, load_for_sampling, row_generators, uniform  # noqa: E402
from training import (  # noqa: E402
    average,
    keep_freed_memory,
    learning_rate_factor,
    make_optimizers,
    parse_arguments,
    update,
)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tqdm import trange  # noqa: E402

TWIN_WEIGHTS = ROOT / "weights" / "causal_twin.pt"


@contextmanager
def causal_attention():
    """Inside, every query attends only to the keys up to its own position."""
    with mock.patch("model.attend", partial(F.scaled_dot_product_attention, is_causal=True)):
        yield


def next_nll(network: torch.nn.Module, x_0: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """-log p(x_i | x_<i) in nats, (B, T), the first character given nothing. The input is shifted
    by one, with [MASK] for the beginning; the time index means nothing here and is 0."""
    begin = torch.full_like(x_0[:, :1], mask_token_id)
    x = torch.cat((begin, x_0[:, :-1]), 1)                          # (B, T)
    t = torch.zeros(len(x), dtype=torch.long, device=x.device)      # (B,)
    with autocast(x.device):
        logits = network(x, t)                                      # (B, T, V)
    return -log_probs(logits, mask_token_id).gather(-1, x_0[..., None]).squeeze(-1)


class KeptKeys:
    """Causal attention that keeps the keys and values of all positions before, layer by layer."""

    def __init__(self, config: DiffusionConfig):
        self.length, self.layers = config.sequence_len, [[] for _ in range(config.n_layer)]
        self.turn = itertools.cycle(self.layers)  # the blocks call in this order
        self.n = 0  # positions kept so far

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        layer, end = next(self.turn), self.n + q.size(2)
        if not self.n:
            B, H, _, D = q.shape
            layer[:] = torch.empty(2, B, H, self.length, D, device=q.device).unbind()
        for kept, new in zip(layer, (k, v), strict=True):
            kept[:, :, self.n : end] = new
        keys, values = (kept[:, :, :end] for kept in layer)
        if layer is self.layers[-1]:
            self.n = end
        # In float32, so without autocast: for a single query, bfloat16 takes a CPU twice as long.
        # More than one query comes only at the beginning, when nothing is kept
        with torch.autocast(q.device.type, enabled=False):
            return F.scaled_dot_product_attention(q.float(), keys, values, is_causal=q.size(2) > 1)


def next_log_probs(
    twin: DiffusionTransformer, kept: KeptKeys, new: torch.Tensor
) -> torch.Tensor:
    """log p of the character after the ids `new` (B, T), which follow those that are kept,
    (B, 1, V)."""
    t = torch.zeros(len(new), dtype=torch.long, device=new.device)
    cos, sin = twin.cos, twin.sin
    twin.cos, twin.sin = cos[kept.n :], sin[kept.n :]               # position kept.n comes first
    with autocast(new.device), mock.patch("model.attend", kept):
        logits = twin(new, t)[:, -1:]
    twin.cos, twin.sin = cos, sin
    return log_probs(logits, twin.config.mask_token_id)


@torch.inference_mode()
def continue_causally(
    twins: list[DiffusionTransformer],
    x: torch.Tensor,
    length: int,
    temperature: float,
    generators: list[torch.Generator],
) -> torch.Tensor:
    """The ids x (B, T) and `length` more, (B, T + length), at most sequence_len in all. One network
    call a character, on that character alone. Several twins average their probabilities."""
    config, end = twins[0].config, x.size(1) + length
    caches = [KeptKeys(config) for _ in twins]
    new = torch.cat((x.new_full((len(x), 1), config.mask_token_id), x), 1)
    while x.size(1) < end:
        pairs = zip(twins, caches, strict=True)
        log_p = average([next_log_probs(twin, kept, new) for twin, kept in pairs])  # (B, 1, V)
        new = draw(log_p, temperature, uniform(generators, log_p[..., 0]))
        x = torch.cat((x, new), 1)
    return x


@torch.no_grad()
def validate(model: DiffusionTransformer, val: torch.Tensor, device: torch.device) -> float:
    """Nats per character over non-overlapping windows without context, like the diffusion bound."""
    T, mask_token_id = model.config.sequence_len, model.config.mask_token_id
    windows = val[: len(val) // T * T].view(-1, T).split(64)
    nll = [next_nll(model, x_0.to(device), mask_token_id).double().cpu() for x_0 in windows]
    return torch.cat(nll).mean().item()


def write(
    twins: list[DiffusionTransformer], num_characters: int, seed: int, streams: int = 192
) -> str:
    """At least so many characters at temperature 1, in long streams, side by side: half a window
    at a time, each after the half before it."""
    half = twins[0].config.sequence_len // 2
    x = torch.empty(streams, 0, dtype=torch.long, device=next(twins[0].parameters()).device)
    generators = row_generators(seed, streams)
    for _ in trange(-(-num_characters // (streams * half)), unit="half window", disable=None):
        window = continue_causally(twins, x[:, -half:], half, 1.0, generators)
        x = torch.cat((x, window[:, -half:]), 1)
    return "\n".join(decode_tokens(row) for row in x)


def incumbent(path: Path) -> float:
    """Nats per character of the twin that is there, infinite if there is none. BadInput where the
    file is something else."""
    if not path.exists():
        return math.inf
    meta = read_checkpoint(path)["meta"]
    if not meta.get("causal"):
        raise BadInput(f"{path}: not a causal twin, so it stays; choose another --weights")
    warn(f"{path} has {meta['val_nll']:.4f} nats per character; only a better twin replaces it")
    return meta["val_nll"]


def train(args, device: torch.device) -> None:
    best, step = incumbent(args.weights), 0
    config = DiffusionConfig()
    text, val, corpus_sha256 = load_corpus(DEFAULT_DATA, config)
    torch.manual_seed(args.seed)
    keep_freed_memory()
    model = DiffusionTransformer(config).to(device)
    optimizers = make_optimizers(model, parse_arguments([]))
    started = time.perf_counter()
    with causal_attention():
        network = torch.compile(model)
        while True:
            progress = (time.perf_counter() - started) / (60 * args.max_minutes)
            if step and (step % args.eval_interval == 0 or progress >= 1):
                nll = validate(model, val, device)
                warn(f"step {step}: validation {nll:.4f} nats per character")
                if nll < best:
                    best = nll
                    meta = {"step": step, "val_nll": nll, "corpus_sha256": corpus_sha256,
                            "seed": args.seed, "hardware": hardware(device), "causal": True}
                    save_weights(model, meta, args.weights)
            if progress >= 1:
                break
            starts = torch.randint(len(text) - config.sequence_len + 1, (args.batch_size, 1))
            x_0 = text[starts + torch.arange(config.sequence_len)].to(device)
            next_nll(network, x_0, config.mask_token_id).mean().backward()
            update(model, optimizers, learning_rate_factor(progress, decay=0.5))
            step += 1
    print(f"{step} steps, {step * args.batch_size * config.sequence_len} characters; "
          f"{args.weights} has {best:.4f} nats per character (exact)")


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--max-minutes", type=number(float, above=0), default=17, help="length of the run")
    add("--batch-size", type=COUNT, default=32, help="sequences per step")
    add("--eval-interval", type=COUNT, default=100, help="steps between evaluations")
    add("--weights", type=Path, default=TWIN_WEIGHTS, help="file to write")
    add("--write", metavar="N", type=COUNT, help="print N characters of text instead")
    add("--twins", type=Path, nargs="+", default=[TWIN_WEIGHTS], metavar="WEIGHTS",
        help="who writes: the average of these twins")
    add("--seed", type=SEED, default=1337, help="random seed")
    add_device_argument(parser)
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    if args.write:
        twins = [load_for_sampling(path, device) for path in args.twins]
        print(write(twins, args.write, args.seed))
    else:
        train(args, device)


if __name__ == "__main__":
    run(main)
