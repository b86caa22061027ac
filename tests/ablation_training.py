"""Which recipe trains best: a small network (4 layers of 192 channels) under one change at a time.

    uv run tests/ablation_training.py                        # every row, a few minutes each
    uv run tests/ablation_training.py --only weighting       # the rows whose name contains the word
    uv run tests/ablation_training.py --seeds 0 1 2 --only baseline "the recipe"
    uv run tests/ablation_training.py --share 0.05 --only baseline regularisation   # many epochs of little text

Every run sees the same number of characters and ends with a learning rate of zero. "baseline" is where
these trials began, and each of the others changes in it what its name says; "the recipe" is what they led
to, and what training.py does. What was tried and lost is written out here and nowhere else. The results
are in ablations.md.
"""

import math
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import (  # noqa: E402
    DEFAULT_DATA, DiffusionConfig, DiffusionTransformer, autocast, load_corpus, masked_nll, nelbo, noise_index, q_sample,
)
from sample import CommandLine, number, run  # noqa: E402
from training import keep_freed_memory, make_optimizers, update  # noqa: E402

CONFIG = DiffusionConfig(n_layer=4, n_head=4, n_embd=192)


@dataclass
class Recipe:
    """The baseline."""

    weighting: str = "sqrt"            # of a sequence with m masked: sqrt(m), "flat" m, "mean" 1, "bound" m S / t
    noise: str = "bell"                # how t is drawn: "bell", "stratified", "antithetic" or "independent" (all uniform)
    spread: float = 1.2                # of the bell, in logits
    optimizer: str = "muon"            # of the block matrices: "muon" or "adamw"
    muon_learning_rate: float = 0.02   # of the block matrices, also where that is AdamW's
    learning_rate: float = 3e-3        # of the rest
    batch_size: int = 16
    weight_decay: float = 0.0
    dropout: float = 0.0
    grad_clip: float = 1.0
    ema: float = 0.0
    warmup: float = 0.01
    decay: float = 0.5
    prefix_rate: float = 0.25
    complementary: bool = False        # every crop twice, the second time with the other characters masked
    curriculum: float = 0.0            # share of the run over which t / S opens from 0.4 to 1
    sampler_shape: tuple = (0.0, 0.0)  # share of sequences clean up to a point and masked after a window, from this progress on
    causal_start: float = 0.0          # share of the run in which the network predicts the next character, causally


ROWS = {
    "baseline": Recipe(),
    "the recipe": Recipe(spread=1.0, curriculum=0.5),
    "weighting: mean": Recipe(weighting="mean"),
    "weighting: flat": Recipe(weighting="flat"),
    "weighting: bound": Recipe(weighting="bound"),
    "noise: uniform, stratified": Recipe(noise="stratified"),
    "noise: uniform, antithetic": Recipe(noise="antithetic"),
    "noise: uniform, independent": Recipe(noise="independent"),
    "noise: bell of 0.8": Recipe(spread=0.8),
    "noise: bell of 1.0": Recipe(spread=1.0),
    "weighting: mean, uniform, stratified": Recipe(weighting="mean", noise="stratified"),
    "original: AdamW 3e-4, flat, independent": Recipe("flat", "independent", optimizer="adamw", muon_learning_rate=3e-4, learning_rate=3e-4),
    "optimizer: AdamW 1e-3": Recipe(optimizer="adamw", muon_learning_rate=1e-3),
    "optimizer: AdamW 3e-3": Recipe(optimizer="adamw", muon_learning_rate=3e-3),
    "optimizer: Muon 0.01": Recipe(muon_learning_rate=0.01),
    "optimizer: Muon 0.04": Recipe(muon_learning_rate=0.04),
    "optimizer: embeddings 1e-2": Recipe(learning_rate=1e-2),
    "optimizer: embeddings 1e-3": Recipe(learning_rate=1e-3),
    "optimizer: no clipping": Recipe(grad_clip=math.inf),
    "batch: 8 sequences": Recipe(batch_size=8),
    "batch: 32 sequences": Recipe(batch_size=32),
    "schedule: falls from the start": Recipe(decay=1.0),
    "schedule: falls over the last 20%": Recipe(decay=0.2),
    "EMA: 0.98": Recipe(ema=0.98),
    "regularisation: weight decay 0.5": Recipe(weight_decay=0.5),
    "regularisation: dropout 0.1": Recipe(dropout=0.1),
    "prefix: never": Recipe(prefix_rate=0.0),
    "masks: complementary pairs": Recipe(complementary=True),
    "masks: t up to 0.4, opening until half": Recipe(curriculum=0.5),
    "masks: half in the sampler's shape": Recipe(sampler_shape=(0.5, 0.0)),
    "masks: half in the sampler's shape, last 30%": Recipe(sampler_shape=(0.5, 0.7)),
    "start: causal for 15%": Recipe(causal_start=0.15),
    "start: causal for 30%": Recipe(causal_start=0.3),
}


def draw_levels(recipe, B, progress):
    """t (B,) in 1..S."""
    strata = torch.randperm(B)
    if recipe.noise == "independent":
        quantile = torch.rand(B)
    elif recipe.noise == "antithetic":
        half = (torch.randperm(B // 2) + torch.rand(B // 2)) / B
        quantile = torch.cat((half, 1 - half))
    else:
        quantile = (strata + torch.rand(B)) / B
    quantile = quantile.clamp(1e-4, 1 - 1e-4)
    noise = torch.sigmoid(recipe.spread * torch.special.ndtri(quantile)) if recipe.noise == "bell" else quantile
    if recipe.curriculum:
        noise = noise * min(1.0, 0.4 + 0.6 * progress / recipe.curriculum)
    return (noise * CONFIG.diffusion_steps).long() + 1


def draw_masks(recipe, x_0, progress):
    """x_t, masked (B, T) and t (B,)."""
    B, T = x_0.shape
    t = draw_levels(recipe, B, progress)
    prefix_len = (torch.randint(1, CONFIG.context_len + 1, (B,))) * (torch.rand(B) < recipe.prefix_rate)
    x_t, masked = q_sample(x_0, t, CONFIG, prefix_len=prefix_len)
    if recipe.complementary:
        masked = torch.cat((masked[: B // 2], ~masked[: B // 2]))
    share, since = recipe.sampler_shape
    if share and progress >= since:
        place, start = torch.arange(T), torch.randint(0, T, (B, 1))
        shaped = (place >= start) & (masked | (place >= start + 32))
        masked = torch.where(torch.rand(B, 1) < share, shaped, masked)
    return x_0.masked_fill(masked, CONFIG.mask_token_id), masked, t


def sequence_weights(recipe, masked, t):
    m = masked.sum(1).float()
    weight = {"sqrt": m.sqrt(), "flat": m, "mean": (m > 0).float(), "bound": m / (t * masked.size(1) / CONFIG.diffusion_steps)}[recipe.weighting]
    return weight / (len(m) if recipe.weighting == "bound" else weight.sum().clamp(min=1.0))


@contextmanager
def causal_attention():
    with mock.patch("model.attend", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)):
        yield


def loss_of(recipe, model, fast, x_0, progress):
    if progress < recipe.causal_start:
        with causal_attention():
            logits = model(x_0, torch.zeros(len(x_0), dtype=torch.long))[:, :-1]
        return F.cross_entropy(logits.float().reshape(-1, CONFIG.vocab_size), x_0[:, 1:].reshape(-1))
    x_t, masked, t = draw_masks(recipe, x_0, progress)
    logits = fast(x_t, noise_index(masked, CONFIG.diffusion_steps))
    return (masked_nll(logits, x_0, masked, CONFIG.mask_token_id) * sequence_weights(recipe, masked, t)).sum()


def train(recipe, tokens, characters, seed):
    torch.manual_seed(seed)
    model = DiffusionTransformer(CONFIG)
    if recipe.dropout:
        for block in model.blocks:
            for part in (block.attn.c_proj, block.mlp.c_proj):
                part.register_forward_hook(lambda module, inputs, out: F.dropout(out, recipe.dropout, module.training))
    optimizers = make_optimizers(model, recipe)
    if recipe.optimizer == "adamw":
        matrices = optimizers[0].param_groups[0]["params"]
        optimizers[0] = torch.optim.AdamW(matrices, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)
    peaks = [recipe.muon_learning_rate, recipe.learning_rate]
    weights = [p.detach() for p in model.parameters()]
    average = [weight.clone() for weight in weights]
    fast = torch.compile(model)
    B, T = recipe.batch_size, CONFIG.sequence_len
    steps = characters // (B * T)
    for step in range(steps):
        progress = step / steps
        factor = min(1.0, progress / recipe.warmup, (1 - progress) / recipe.decay)
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * factor
        starts = torch.randint(len(tokens) - T + 1, (B,))
        if recipe.complementary:
            starts[B // 2 :] = starts[: B // 2]
        with autocast(torch.device("cpu")):
            loss = loss_of(recipe, model, fast, tokens[starts[:, None] + torch.arange(T)], progress)
        loss.backward()
        update(model, optimizers, recipe.grad_clip)
        if recipe.ema:
            torch._foreach_lerp_(average, weights, 1 - min(recipe.ema, (step + 1) / (step + 10)))
    if recipe.ema:
        torch._foreach_copy_(weights, average)
    return model


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--characters", type=number(int, least=8192), default=1_638_400, help="characters that every run sees")
    parser.add_argument("--share", type=number(float, above=0, most=1), default=1.0, help="of the train split that the runs see: "
                        "less means more epochs")
    parser.add_argument("--seeds", type=number(int, least=0), nargs="+", default=[0], help="of the weights, crops and masks")
    args = parser.parse_args()
    keep_freed_memory()
    tokens, val, _ = load_corpus(DEFAULT_DATA, CONFIG)
    tokens = tokens[: int(args.share * len(tokens))]
    print(f"{args.characters} characters a run, {args.characters / len(tokens):.1f} epochs\n\n| change | seed | NELBO | seconds |\n|---|---|---|---|", flush=True)
    for name, recipe in ROWS.items():
        for seed in args.seeds if any(word in name for word in args.only) else []:
            torch._dynamo.reset()
            started = time.monotonic()
            model = train(recipe, tokens, args.characters, seed)
            seconds = time.monotonic() - started
            mean, error = nelbo(model, val)
            print(f"| {name} | {seed} | {mean:.4f} ± {error:.4f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    run(main)
