"""The GPT twin: the model's trunk made causal, trained to predict the next character.

    uv run tests/experiments/causal_twin.py --max-minutes 17
    uv run tests/experiments/causal_twin.py --steps 1000 --weight-decay 0.3 --seed 1
    uv run tests/experiments/causal_twin.py --fit
    uv run tests/experiments/causal_twin.py --write 3000000 --temperature 1.1 > weights/twin.txt

The benchmarks compare the diffusion model with this GPT. It has the same size and learns the same
text by the same optimizers. Its weights, weights/causal_twin.pt, are not shipped. It overfits after
some ten million characters. So a run learns all but the first 40,000 characters of the train split,
and keeps the weights that are best on those. --write prints fresh text for training.py to learn
besides the real one; --fit finds the temperature at which to write.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads must not spin on busy cores

import math
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
import torch.nn.functional as F
from tqdm import trange

from model import (
    COUNT, DEFAULT_DATA, ROOT, SEED, TEMPERATURE, BadInput, CommandLine, DiffusionConfig,
    DiffusionTransformer, autocast, decode_tokens, load_corpus, number, pick_device,
    read_checkpoint, save_weights, say, start,
)
from sample import draw, load_for_sampling
from training import HELD_OUT, compiled, learning_rate_factor, make_optimizers, update

TWIN_WEIGHTS = ROOT / "weights" / "causal_twin.pt"
LEARNING_RATE = 0.02  # Muon's; AdamW's is 3e-3

# Every query attends only to the keys up to its own position
causal = partial(F.scaled_dot_product_attention, is_causal=True)


def make_causal(model: DiffusionTransformer) -> DiffusionTransformer:
    for block in model.blocks:
        block.attn.attend = causal
    return model


def average(log_p: list[torch.Tensor]) -> torch.Tensor:
    """log p of an ensemble: the logarithm of the mean of its members' probabilities."""
    return torch.stack(log_p).logsumexp(0) - math.log(len(log_p))


def next_log_p(network, x_0):
    """log p(x_i | x_<i) at every position, (B, T, V); the first character is given nothing. The
    input is shifted by one, and begins with [MASK]. The time index has no meaning here; it is 0."""
    begin = torch.full_like(x_0[:, :1], network.config.mask_token_id)
    with autocast(x_0.device):
        return network(torch.cat((begin, x_0[:, :-1]), 1), torch.zeros_like(x_0[:, 0]))


def nll_of(log_p, x_0):
    """-log p(x_i | x_<i) in nats, (B, T)."""
    return -log_p.gather(-1, x_0[..., None]).squeeze(-1)


@torch.no_grad()
def judged(twins: list[DiffusionTransformer], ids) -> tuple[torch.Tensor, torch.Tensor]:
    """The non-overlapping windows (N, T) of a text, and log p (N, T, V) of the twins' ensemble for
    each of them without context."""
    T = twins[0].config.sequence_len
    x_0 = ids[: len(ids) // T * T].view(-1, T).long().to(next(twins[0].parameters()).device)
    log_p = [average([next_log_p(twin, x) for twin in twins]) for x in x_0.split(64)]
    return x_0, torch.cat(log_p)


def nats(twins: list[DiffusionTransformer], ids) -> float:
    """Exact nats per character of a text, for comparison with the bound."""
    x_0, log_p = judged(twins, ids)
    return nll_of(log_p, x_0).mean().item()


def fit_temperature(twins: list[DiffusionTransformer], ids) -> dict[float, float]:
    """Nats per character of a text at temperatures from 1 to 1.4, as `draw` applies them."""
    x_0, log_p = judged(twins, ids)
    temperatures = [percent / 100 for percent in range(100, 141)]
    return {t: nll_of((log_p / t).log_softmax(-1), x_0).mean().item() for t in temperatures}


# --------------------------------------------------------------------------------------------------
# Writing


class KeptKeys:
    """Causal attention of one transformer block. It keeps the keys and values of all earlier
    positions, so that a network call needs only the new ones."""

    def __init__(self, length: int):
        self.length, self.n = length, 0  # of positions: in the end, and kept so far

    def __call__(self, q, k, v):
        begin, self.n = self.n, self.n + q.size(2)
        if not begin:
            B, H, _, D = k.shape
            self.keys, self.values = torch.empty(2, B, H, self.length, D, device=k.device)
        self.keys[:, :, begin : self.n] = k
        self.values[:, :, begin : self.n] = v
        keys, values = self.keys[:, :, : self.n], self.values[:, :, : self.n]
        # In float32: with a single query, a CPU needs twice as long in bfloat16. The mask is right,
        # as several queries come only in the first call, when nothing is kept
        y = F.scaled_dot_product_attention(q.float(), keys, values, is_causal=q.size(2) > 1)
        return y.to(q.dtype)


def following_log_p(twin: DiffusionTransformer, new):
    """log p (B, 1, V) of the character after the ids `new` (B, T). The new ids follow the positions
    whose keys the twin keeps."""
    cos, sin, n = twin.cos, twin.sin, twin.blocks[0].attn.attend.n
    twin.cos, twin.sin = cos[n:], sin[n:]                           # `new` begins at position n
    log_p = twin(new, torch.zeros_like(new[:, 0]))[:, -1:]
    twin.cos, twin.sin = cos, sin
    return log_p


@torch.inference_mode()
def continue_causally(twins: list[DiffusionTransformer], x, length: int, temperature: float,
                      generator: torch.Generator):
    """The ids x (B, T) and `length` more, (B, T + length), at most sequence_len in all. After the
    first network call, each needs only the newest character. Several twins write as an ensemble."""
    mask_token_id, end = twins[0].config.mask_token_id, x.size(1) + length
    for twin in twins:
        for block in twin.blocks:
            block.attn.attend = KeptKeys(end)
    new = torch.cat((x.new_full((len(x), 1), mask_token_id), x), 1)
    while x.size(1) < end:
        log_p = average([following_log_p(twin, new) for twin in twins])             # (B, 1, V)
        new = draw(log_p, temperature, generator)
        x = torch.cat((x, new), 1)
    for twin in twins:
        make_causal(twin)
    return x


def write(twins: list[DiffusionTransformer], num_characters: int, temperature: float, seed: int,
          streams: int = 192) -> str:
    """At least num_characters characters, as several streams in one batch. A stream grows by half a
    window at a time, and each half sees the one before it."""
    half = twins[0].config.sequence_len // 2
    x = torch.empty(streams, 0, dtype=torch.long, device=next(twins[0].parameters()).device)
    generator = torch.Generator().manual_seed(seed)
    for _ in trange(-(-num_characters // (streams * half)), unit="half window", disable=None):
        window = continue_causally(twins, x[:, -half:], half, temperature, generator)
        x = torch.cat((x, window[:, -half:]), 1)
    return "\n".join(decode_tokens(row) for row in x)


# --------------------------------------------------------------------------------------------------
# Training


def incumbent(path: Path) -> float:
    """Held-out nats per character of the existing twin, infinite if there is none. Raises BadInput
    for a file that is no twin."""
    if not path.exists():
        return math.inf
    meta = read_checkpoint(path)["meta"]
    if "held_nll" not in meta:
        raise BadInput(f"{path}: not a GPT twin, so not overwritten; choose another --weights")
    say(f"{path} has {meta['held_nll']:.4f} held-out nats per character; only a better twin "
         "replaces it")
    return meta["held_nll"]


def train(args, device: torch.device) -> None:
    best, step = incumbent(args.weights), 0
    config = DiffusionConfig()
    text, val, corpus_sha256 = load_corpus(DEFAULT_DATA, config)
    held, text = text.tensor_split([HELD_OUT])
    torch.manual_seed(args.seed)
    started = time.perf_counter()
    model = make_causal(DiffusionTransformer(config).to(device))
    optimizers = make_optimizers(model, LEARNING_RATE, args.weight_decay)
    network = compiled(model, args.batch_size)
    while True:
        minutes = (time.perf_counter() - started) / 60
        progress = step / args.steps if args.steps else minutes / args.max_minutes
        if step and (step % args.eval_interval == 0 or progress >= 1):
            held_nll = nats([model], held)
            say(f"step {step}: {held_nll:.4f} held-out nats per character")
            if held_nll < best:
                best = held_nll
                meta = {"step": step, "held_nll": held_nll, "val_nll": nats([model], val),
                        "corpus_sha256": corpus_sha256, "seed": args.seed, "causal": True,
                        "weight_decay": args.weight_decay, "batch_size": args.batch_size}
                save_weights(model, meta, args.weights)
        if progress >= 1:
            break
        starts = torch.randint(len(text) - config.sequence_len + 1, (args.batch_size, 1))
        x_0 = text[starts + torch.arange(config.sequence_len)].long().to(device)
        nll_of(next_log_p(network, x_0), x_0).mean().backward()
        update(model, optimizers, learning_rate_factor(progress, decay=0.5))
        step += 1
    meta = read_checkpoint(args.weights)["meta"]
    print(f"{step} steps, {step * args.batch_size * config.sequence_len} characters; "
          f"{args.weights} has {meta['val_nll']:.4f} nats per validation character (exact)")


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--max-minutes", type=number(float, 1e-3), default=17, help="train for this long")
    add("--steps", type=COUNT, help="optimizer steps, instead of --max-minutes")
    add("--batch-size", type=COUNT, default=32, help="sequences per step")
    add("--weight-decay", type=number(float, 0), default=0.0, help="of the block matrices")
    add("--eval-interval", type=COUNT, default=100, help="steps between evaluations")
    add("--weights", type=Path, default=TWIN_WEIGHTS, help="file to write")
    add("--write", metavar="N", type=COUNT, help="print at least N characters "
        "instead of training")
    add("--temperature", type=TEMPERATURE, default=1.0, help="of the written text")
    add("--fit", action="store_true", help="print the temperature at which the held-out characters "
        "are likeliest, instead of training")
    add("--twins", type=Path, nargs="+", default=[TWIN_WEIGHTS], metavar="WEIGHTS",
        help="the GPT twins that --write and --fit use, as an ensemble")
    add("--seed", type=SEED, default=1337, help="random seed")
    add("--device", default="auto", help="auto (CUDA, then MPS, then CPU), cpu, cuda or mps")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    if not (args.write or args.fit):
        return train(args, device)
    twins = [make_causal(load_for_sampling(path, device)) for path in args.twins]
    if args.fit:
        text, _, _ = load_corpus(DEFAULT_DATA, twins[0].config)
        fitted = fit_temperature(twins, text[:HELD_OUT])
        t = min(fitted, key=fitted.get)
        print(f"temperature {t}: {fitted[t]:.4f} nats per held-out character, "
              f"{fitted[1.0]:.4f} at temperature 1")
    if args.write:
        print(write(twins, args.write, args.temperature, args.seed))


if __name__ == "__main__":
    start(main)
