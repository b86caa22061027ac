"""The model's causal twin: the same trunk and optimizers, trained to predict the next character.

    uv run tests/causal_twin.py --max-minutes 15

It is what a GPT of this size makes of the same text, and benchmark_likelihood.py sets it beside the
diffusion model. Its weights, weights/causal_twin.pt, are not shipped. It overfits after some
ten million characters, so the best evaluation is kept.
"""

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
    hardware,
    load_corpus,
    log_probs,
    number,
    pick_device,
    run,
    save_weights,
    warn,
)
from training import (  # noqa: E402
    keep_freed_memory,
    learning_rate_factor,
    make_optimizers,
    parse_arguments,
    update,
)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

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


@torch.no_grad()
def validate(model: DiffusionTransformer, val: torch.Tensor, device: torch.device) -> float:
    """Nats per character over non-overlapping windows without context, like the diffusion bound."""
    T, mask_token_id = model.config.sequence_len, model.config.mask_token_id
    windows = val[: len(val) // T * T].view(-1, T).split(64)
    nll = [next_nll(model, x_0.to(device), mask_token_id).double().cpu() for x_0 in windows]
    return torch.cat(nll).mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--max-minutes", type=number(float, above=0), default=15, help="length of the run")
    add("--batch-size", type=COUNT, default=32, help="sequences per step")
    add("--eval-interval", type=COUNT, default=100, help="steps between evaluations")
    add("--weights", type=Path, default=TWIN_WEIGHTS, help="file to write")
    add("--seed", type=SEED, default=1337, help="random seed")
    add_device_argument(parser)
    args = parser.parse_args(argv)
    if args.weights.exists() and args.weights != TWIN_WEIGHTS:
        raise BadInput(f"{args.weights} exists already; choose another --weights")
    config = DiffusionConfig()
    train, val, corpus_sha256 = load_corpus(DEFAULT_DATA, config)
    torch.manual_seed(args.seed)
    keep_freed_memory()
    device = pick_device(args.device)
    model = DiffusionTransformer(config).to(device)
    optimizers = make_optimizers(model, parse_arguments([]))
    best, step, started = math.inf, 0, time.perf_counter()
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
            starts = torch.randint(len(train) - config.sequence_len + 1, (args.batch_size, 1))
            x_0 = train[starts + torch.arange(config.sequence_len)].to(device)
            next_nll(network, x_0, config.mask_token_id).mean().backward()
            update(model, optimizers, learning_rate_factor(progress, decay=0.5))
            step += 1
    print(f"{args.weights}: validation {best:.4f} nats per character (exact), {step} steps, "
          f"{step * args.batch_size * config.sequence_len} characters")


if __name__ == "__main__":
    run(main)
