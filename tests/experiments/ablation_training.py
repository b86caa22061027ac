"""What each part of the training recipe is worth: a small network, with one change at a time.

    uv run tests/experiments/ablation_training.py                    # every row, a few minutes each
    uv run tests/experiments/ablation_training.py --only weighting   # rows whose name contains it
    uv run tests/experiments/ablation_training.py --seeds 0 1 2 --only baseline "the recipe"
    uv run tests/experiments/ablation_training.py --share 0.1 --only baseline regularisation
    uv run tests/experiments/ablation_training.py --share 0.167 --characters 24000000 \
        --keep weights/ablations --only "the recipe" long:      # 143 epochs, 40 minutes a row

Each row is the baseline with the change that its name describes; a row whose name begins with
"long:" is the recipe with that change. The recipe combines the changes that helped. training.py
follows it in runs by the clock or of fewer than 10,000 steps. All runs of a command see the same
number of characters and end with a learning rate of zero. The held-out slice, which no run learns,
judges them; the validation split judges only what ships. ablations.md has a result for every row.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads must not spin on busy cores

import argparse
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
import torch.nn.functional as F
from causal_twin import causal

from model import (
    DEFAULT_DATA, SEED, CommandLine, DiffusionConfig, DiffusionTransformer, autocast, load_corpus,
    load_weights, nelbo, noise_index, number, q_sample, save_weights, start,
)
from training import HELD_OUT, batch_loss, compiled, make_optimizers, update

CONFIG = DiffusionConfig(n_layer=4, n_head=4, n_embd=192)


@dataclass
class Recipe:
    """The settings of a row; the defaults are the baseline."""

    weighting: str = "sqrt"  # by the masked count m: sqrt(m), "count" m, "equal" 1, "bound" m S / t
    noise: str = "bell"      # how the noise level t is drawn: "bell" or "uniform"
    spread: float = 1.2      # width of the bell, in logits
    last_spread: float | None = None   # width at the end of the run, if the bell widens
    uniform_share: float = 0.0         # share of the sequences with t uniform instead
    optimizer: str = "muon"            # of the block matrices: "muon" or "adamw"
    muon_learning_rate: float = 0.02   # of the block matrices, even where AdamW trains them
    learning_rate: float = 3e-3        # of all other weights
    batch_size: int = 16
    weight_decay: float = 0.0
    last_weight_decay: float | None = None   # towards which it moves as the learning rate decays
    dropout: float = 0.0                     # behind attention and behind the MLP
    mlp_dropout: float = 0.0                 # behind the MLP alone
    ema: float = 0.0         # decay of a weight average, which is kept instead of the weights
    warmup: float = 0.01     # share of the run in which the learning rate rises
    decay: float = 0.5           # share of the run in which the learning rate decays
    prefix_share: float = 0.25   # share of the sequences with a clean prefix
    complementary: bool = False  # every crop twice, the second time with the other half masked
    curriculum: float = 0.0      # share of the run in which the limit of t / S rises to 1
    # The shape of a former sampler: share of the sequences that are clean up to a point, masked at
    # random in the next 32 characters, and wholly masked then; and from which progress on
    sampler_shape: tuple = (0.0, 0.0)
    time_std: float = 0.0        # of the time embedding's start
    causal_start: float = 0.0    # share of the run that trains causal next-character prediction
    permuted: bool = False       # an epoch reads every window once, in random order
    teachers: tuple = ()         # seeds of models whose probabilities are learned too
    teacher_row: str = "the recipe"  # the row that those models come from


RECIPE = Recipe(spread=1.0, uniform_share=1 / 16, curriculum=0.5)
DECAYING = replace(RECIPE, decay=1.0)
LOW_LEARNING_RATE = replace(DECAYING, muon_learning_rate=0.005, learning_rate=7.5e-4)
ROWS = {
    "baseline": Recipe(),
    "the recipe": RECIPE,
    "noise: curriculum": Recipe(curriculum=0.5),
    "noise: curriculum, bell of 1.0": Recipe(spread=1.0, curriculum=0.5),
    "noise: curriculum, bell of 1.0 widening to 1.7": Recipe(
        spread=1.0, last_spread=1.7, curriculum=0.5
    ),
    "noise: bell of 0.8": Recipe(spread=0.8),
    "noise: bell of 1.0": Recipe(spread=1.0),
    "noise: uniform": Recipe(noise="uniform"),
    "weighting: m": Recipe(weighting="count"),
    "weighting: equal": Recipe(weighting="equal"),
    "weighting: bound": Recipe(weighting="bound"),
    "weighting: equal, uniform noise": Recipe(weighting="equal", noise="uniform"),
    "optimizer: AdamW 1e-3": Recipe(optimizer="adamw", muon_learning_rate=1e-3),
    "optimizer: AdamW 3e-3": Recipe(optimizer="adamw", muon_learning_rate=3e-3),
    "optimizer: Muon 0.01": Recipe(muon_learning_rate=0.01),
    "optimizer: Muon 0.04": Recipe(muon_learning_rate=0.04),
    "batch: 8 sequences": Recipe(batch_size=8),
    "batch: 32 sequences": Recipe(batch_size=32),
    "schedule: decay from the start": Recipe(decay=1.0),
    "weight average: EMA 0.98": Recipe(ema=0.98),
    "regularisation: weight decay 0.5": Recipe(weight_decay=0.5),
    "regularisation: dropout 0.1": Recipe(dropout=0.1),
    "prefix: never": Recipe(prefix_share=0.0),
    "masks: complementary pairs": Recipe(complementary=True),
    "masks: half in the sampler's shape, last 30%": Recipe(sampler_shape=(0.5, 0.7)),
    "start: random time embedding": replace(RECIPE, time_std=1.0),
    "start: causal for 15%": Recipe(causal_start=0.15),
    "start: causal for 30%": Recipe(causal_start=0.3),
    "long: learning rate 0.02, decay from the start": DECAYING,
    "long: learning rate 0.01, decay from the start": replace(
        DECAYING, muon_learning_rate=0.01, learning_rate=1.5e-3
    ),
    "long: learning rate 0.005, decay from the start": LOW_LEARNING_RATE,
    "long: learning rate 0.005, decay from the start, weight decay 0.3": replace(
        LOW_LEARNING_RATE, weight_decay=0.3
    ),
    "long: batch of 32 sequences": replace(RECIPE, batch_size=32),
    "long: MLP dropout 0.05": replace(RECIPE, mlp_dropout=0.05),
    "long: MLP dropout 0.1": replace(RECIPE, mlp_dropout=0.1),
    "long: weight decay 0.3": replace(RECIPE, weight_decay=0.3),
    "long: weight decay 0.8": replace(RECIPE, weight_decay=0.8),
    "long: weight decay 0.1, rising to 0.8": replace(
        RECIPE, weight_decay=0.1, last_weight_decay=0.8
    ),
    "long: permuted epochs": replace(RECIPE, permuted=True),
    "long: student of two seeds": replace(RECIPE, teachers=(0, 1)),
    "long: student of one seed": replace(RECIPE, teachers=(1,)),
    "long: student of that student, learning rate 0.005, decay from the start": replace(
        LOW_LEARNING_RATE, teachers=(0,), teacher_row="long: student of one seed"
    ),
}


def draw_starts(recipe, length, steps):
    """Yields, for every step, the positions (B,) in a text of `length` at which sequences begin."""
    B, T = recipe.batch_size, CONFIG.sequence_len
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if recipe.permuted:
            while len(order) < B:
                offset = torch.randint(T, ()).item()
                places = torch.arange(offset, length - T + 1, T)
                order = torch.cat((order, places[torch.randperm(len(places))]))
            starts, order = order[:B], order[B:]
        else:
            starts = torch.randint(length - T + 1, (B,))
        if recipe.complementary:
            starts[B // 2 :] = starts[: B // 2]
        yield starts


def draw_levels(recipe, B, progress):
    """t (B,) in 1..S, stratified: one draw from each of B equal shares of its distribution."""
    quantile = ((torch.randperm(B) + torch.rand(B)) / B).clamp(1e-4, 1 - 1e-4)
    noise = quantile
    if recipe.noise == "bell":
        widening = (recipe.last_spread or recipe.spread) - recipe.spread
        spread = recipe.spread + widening * progress
        noise = torch.sigmoid(spread * torch.special.ndtri(quantile))
        noise = torch.where(torch.rand(B) < recipe.uniform_share, quantile, noise)
    if recipe.curriculum:
        noise = noise * min(1.0, 0.4 + 0.6 * progress / recipe.curriculum)
    return (noise * CONFIG.diffusion_steps).long() + 1


def draw_batch(recipe, x_0, progress):
    """As training.draw_batch: x_0, x_t and masked (B, T), time indices and loss weights (B,)."""
    (B, T), S = x_0.shape, CONFIG.diffusion_steps
    t = draw_levels(recipe, B, progress)
    prefix_len = torch.randint(1, CONFIG.context_len + 1, (B,))
    prefix_len *= torch.rand(B) < recipe.prefix_share
    _, masked = q_sample(x_0, t, CONFIG, prefix_len=prefix_len)
    if recipe.complementary:
        masked = torch.cat((masked[: B // 2], ~masked[: B // 2]))
    share, since = recipe.sampler_shape
    if share and progress >= since:
        place, start = torch.arange(T), torch.randint(0, T, (B, 1))
        shaped = (place >= start) & (masked | (place >= start + 32))
        masked = torch.where(torch.rand(B, 1) < share, shaped, masked)
    x_t, index = x_0.masked_fill(masked, CONFIG.mask_token_id), noise_index(masked, S)
    return x_0, x_t, masked, index, sequence_weights(recipe, masked, t)


def sequence_weights(recipe, masked, t):
    m = masked.sum(1).float()
    bound = m * CONFIG.diffusion_steps / (t * masked.size(1))
    ways = {"sqrt": m.sqrt(), "count": m, "equal": (m > 0).float(), "bound": bound}
    weight = ways[recipe.weighting]
    return weight / (len(m) if recipe.weighting == "bound" else weight.sum().clamp(min=1.0))


def causal_loss(model, x_0):
    """Cross-entropy of each character given the characters before it."""
    for block in model.blocks:
        block.attn.attend = causal
    with autocast(x_0.device):
        log_p = model(x_0, torch.zeros_like(x_0[:, 0]))[:, :-1]
    for block in model.blocks:
        del block.attn.attend
    return F.nll_loss(log_p.transpose(1, 2), x_0[:, 1:])


def drop_out(p, module, inputs, out):
    return F.dropout(out, p, module.training)


def train(recipe, tokens, characters, seed, teachers):
    torch.manual_seed(seed)
    model = DiffusionTransformer(CONFIG)
    if recipe.time_std:
        torch.nn.init.normal_(model.time_emb.weight, std=recipe.time_std)
    for block in model.blocks:
        mlp_dropout = max(recipe.dropout, recipe.mlp_dropout)
        for part, p in ((block.attn.c_proj, recipe.dropout), (block.mlp.c_proj, mlp_dropout)):
            if p:
                part.register_forward_hook(partial(drop_out, p))
    optimizers = make_optimizers(model, recipe.muon_learning_rate, recipe.weight_decay)
    optimizers[1].param_groups[0]["peak"] = recipe.learning_rate
    if recipe.optimizer == "adamw":
        matrices = optimizers[0].param_groups[0]["params"]
        optimizers[0] = torch.optim.AdamW(matrices, recipe.muon_learning_rate, betas=(0.9, 0.95),
                                          weight_decay=recipe.weight_decay)
        optimizers[0].param_groups[0]["peak"] = recipe.muon_learning_rate
    weights = [p.detach() for p in model.parameters()]
    average = [weight.clone() for weight in weights]
    B, T = recipe.batch_size, CONFIG.sequence_len
    network = compiled(model, B)
    steps = characters // (B * T)
    for step, starts in enumerate(draw_starts(recipe, len(tokens), steps)):
        progress = step / steps
        fall = min(1.0, (1 - progress) / recipe.decay)
        factor = min(progress / recipe.warmup, fall)
        if recipe.last_weight_decay is not None:
            rise = (recipe.last_weight_decay - recipe.weight_decay) * (1 - fall)
            optimizers[0].param_groups[0]["weight_decay"] = recipe.weight_decay + rise
        x_0 = tokens[starts[:, None] + torch.arange(T)].long()
        if progress < recipe.causal_start:
            loss = causal_loss(model, x_0)
        else:
            teacher = teachers[step % len(teachers)] if teachers else None
            loss = batch_loss(network, draw_batch(recipe, x_0, progress), teacher)
        loss.backward()
        update(model, optimizers, factor)
        if recipe.ema:
            torch._foreach_lerp_(average, weights, 1 - min(recipe.ema, (step + 1) / (step + 10)))
    if recipe.ema:
        torch._foreach_copy_(weights, average)
    return model.eval()


def trained(name: str, seed: int, tokens: torch.Tensor, args: argparse.Namespace):
    """The model of a row, and the seconds of its training. The model is not trained again if --keep
    has it from an earlier run with the same settings."""
    recipe = ROWS[name]
    about = {"recipe": asdict(recipe), "characters": args.characters, "share": args.share}
    path = args.keep and args.keep / (re.sub(r"\W+", "-", f"{name} {seed}") + ".pt")
    if path and path.exists():
        model, meta = load_weights(path)
        if meta == {**about, "seconds": meta["seconds"]}:
            return model, meta["seconds"]
    teachers = [trained(recipe.teacher_row, other, tokens, args)[0] for other in recipe.teachers]
    torch._dynamo.reset()
    started = time.perf_counter()
    model = train(recipe, tokens, args.characters, seed, teachers)
    seconds = time.perf_counter() - started
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(model, {**about, "seconds": seconds}, path)
        model, _ = load_weights(path)
    return model, seconds


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    add("--characters", type=number(int, 8192), default=1_638_400,
        help="characters that every run sees")
    add("--share", type=number(float, 1e-3, 1), default=1.0,
        help="share of the text that the runs learn; a smaller one means more epochs")
    add("--seeds", type=SEED, nargs="+", default=[0], help="random seeds")
    add("--keep", type=Path, metavar="FOLDER", help="save the models there, and train no row again "
        "whose model is there with the same settings")
    args = parser.parse_args(argv)
    held, tokens = load_corpus(DEFAULT_DATA, CONFIG)[0].tensor_split([HELD_OUT])
    tokens = tokens[: int(args.share * len(tokens))]
    print(f"{args.characters} characters a run, {args.characters / len(tokens):.1f} epochs\n\n"
          "| change | seed | held-out NELBO | seconds |\n|---|---|---|---|", flush=True)
    for name in ROWS:
        for seed in args.seeds if any(word in name for word in args.only) else []:
            model, seconds = trained(name, seed, tokens, args)
            mean, error = nelbo(model, held, passes=24)
            print(f"| {name} | {seed} | {mean:.4f} ± {error:.4f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    start(main)
