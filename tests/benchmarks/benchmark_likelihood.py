"""How likely is the validation split to diffusion models and to GPT twins, on the same windows?

    uv run tests/benchmarks/benchmark_likelihood.py --measures bounds      # the shipped weights
    uv run tests/benchmarks/benchmark_likelihood.py weights/make/student.pt \
        weights/make/gpt_student.pt weights/make/twin_0.pt+weights/make/twin_1.pt \
        --csv weights/make/likelihood.csv

Every window of 256 characters is scored without context, in nats per character. A diffusion model
has the measures

    bound, 128 steps        the NELBO that the project reports
    bound, continuous time  its limit for infinitely many noise levels, as MDLM and MD4 report it
    left to right           exact: each character from those before it, with the rest masked. A
                            network call for each character: hours for all windows on a CPU
    most confident first    exact: always the position whose likeliest character is most probable.
                            The order depends only on characters that are already unmasked, so this
                            is a likelihood too

and a GPT twin (causal_twin.py), or several joined by +, whose probabilities are averaged, has

    exact                   each character from those before it

All standard errors are over windows. A row is compared with the first model, bound with bound and
exact with exact, in pairs of windows. --csv keeps the nats of every window, and what stands there
is not computed again.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads must not spin on busy cores

import argparse
import csv
import hashlib
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "experiments")]  # model.py, causal_twin.py
import torch
from causal_twin import average, make_causal, next_log_p, nll_of
from tqdm import trange

from model import (
    COUNT, DEFAULT_DATA, DEFAULT_WEIGHTS, SEED, BadInput, CommandLine, DiffusionTransformer,
    is_causal, masked_count_weights, masked_nll, noise_index, number, pick_device,
    read_checkpoint, spaced_windows, start,
)
from sample import load_for_sampling
from training import read_texts

ROWS = 64     # sequences of a network call
ALL = 10**9   # windows at a time
EXACT = {"exact", "left to right"}  # measures of a GPT and of a diffusion model that are alike


def predict(model: DiffusionTransformer, x_0: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """log p(x_0 | x_t), (B, T, V), where `masked` (B, T) is hidden."""
    x_t = x_0.masked_fill(masked, model.config.mask_token_id)
    return model(x_t, noise_index(masked, model.config.diffusion_steps))


def bounds(model, x_0: torch.Tensor, draws: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The discrete and the continuous-time bound of each window of x_0 (N, T), (N,) each, from the
    same masks: m is uniform, stratified over the draws, and the discrete bound weights it by
    T w(m)."""
    N, T = x_0.shape
    generator = torch.Generator(x_0.device).manual_seed(seed)
    weights = T * masked_count_weights(T, model.config.diffusion_steps).to(x_0.device)
    discrete, continuous = torch.zeros(2, N, dtype=torch.float64, device=x_0.device)
    for draw in range(draws):
        u = torch.rand(N, 1, generator=generator, device=x_0.device)
        m = ((draw + u) / draws * T).long().clamp(max=T - 1) + 1
        rank = torch.rand(N, T, generator=generator, device=x_0.device).argsort(1).argsort(1)
        masked = rank < m
        nll = masked_nll(predict(model, x_0, masked), x_0, masked).double()
        continuous += nll / draws
        discrete += nll * weights[m[:, 0] - 1] / draws
    return discrete, continuous


def left_to_right(model, x_0: torch.Tensor) -> torch.Tensor:
    """Exact -log p per character of each window of x_0 (N, T), (N,). The network gets one row
    for each position, in which this position and all later ones are masked."""
    T = x_0.size(1)
    position = torch.arange(T, device=x_0.device)
    masked = position >= position[:, None]                          # (T, T): row i hides i...
    nll = []
    for window in x_0:
        rows = window.expand(T, T)
        parts = zip(rows.split(ROWS), masked.split(ROWS), strict=True)
        log_p = torch.cat([predict(model, x, hidden) for x, hidden in parts])
        nll.append(-log_p[position, position, window].double().mean())
    return torch.stack(nll)


def most_confident_first(model, x_0: torch.Tensor) -> torch.Tensor:
    """Exact -log p per character of each window of x_0 (N, T), (N,). Each network call scores
    and then unmasks the position whose likeliest character is most probable."""
    N, T = x_0.shape
    rows = torch.arange(N, device=x_0.device)
    masked = torch.ones_like(x_0, dtype=torch.bool)
    nll = torch.zeros(N, dtype=torch.float64, device=x_0.device)
    for _ in range(T):
        log_p = predict(model, x_0, masked)                         # (N, T, V)
        confidence = log_p.amax(-1).masked_fill(~masked, -math.inf)
        place = confidence.argmax(1)                                # (N,)
        nll -= log_p[rows, place, x_0[rows, place]].double()
        masked[rows, place] = False
    return nll / T


def exact(twins: list[DiffusionTransformer], x_0: torch.Tensor) -> torch.Tensor:
    """-log p per character of each window of x_0 (N, T) under the twins' ensemble, (N,)."""
    nll = [nll_of(average([next_log_p(twin, x) for twin in twins]), x) for x in x_0.split(ROWS)]
    return torch.cat(nll).double().mean(1)


class Kept:
    """Nats per character by (SHA-256 of the models, measure, protocol, window): in memory, and in a
    CSV file if there is one."""

    COLUMNS = ("sha256", "measure", "protocol", "window", "row", "nats")

    def __init__(self, path: Path | None):
        self.path, self.nats = path, {}
        if path and path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                for *key, window, _, nats in list(csv.reader(file))[1:]:
                    self.nats[(*key, int(window))] = float(nats)

    def add(self, row: str, key: tuple, first: int, nats: torch.Tensor) -> None:
        """For the windows from `first` on."""
        lines = [(*key, first + i, row, x) for i, x in enumerate(nats.tolist())]
        self.nats |= {line[:4]: line[5] for line in lines}
        if self.path:
            begins = not self.path.exists()
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([self.COLUMNS] * begins + lines)


def ways_of(paths: list[str], models: list[DiffusionTransformer], args: argparse.Namespace):
    """How to measure the models in `paths` together: the names of measures, how many windows to
    score at a time, and the function from windows (N, T) to nats (N,) for each name. Raises
    BadInput for models that can't be averaged."""
    if all(is_causal(read_checkpoint(path)) for path in paths):
        twins = [make_causal(model) for model in models]
        return [(["exact"], ALL, lambda x: [exact(twins, x)])]
    if len(models) > 1:
        raise BadInput(f"{'+'.join(paths)}: only GPT twins can be joined by +")
    model, = models
    ways = {
        "bounds": ([f"bound, {model.config.diffusion_steps} steps", "bound, continuous time"], ALL,
                   lambda x: bounds(model, x, args.draws, args.seed)),
        "left-to-right": (["left to right"], 4, lambda x: [left_to_right(model, x)]),
        "most-confident": (["most confident first"], ROWS,
                           lambda x: [most_confident_first(model, x)]),
    }
    return [ways[name] for name in args.measures]


def measured(row: str, models: list[DiffusionTransformer], x_0, protocol: str, kept: Kept, args):
    """The nats (N,) of every measure of a row of the table."""
    paths = row.split("+")
    sha256 = hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()[:16]
    N = len(x_0)
    for names, chunk, way in ways_of(paths, models, args):
        keys = [(sha256, name, protocol) for name in names]
        for first in trange(0, N, chunk, desc=f"{row} {names[-1]}", disable=None):
            chunk_of = range(first, min(first + chunk, N))
            if not all((*key, i) in kept.nats for key in keys for i in chunk_of):
                for key, nats in zip(keys, way(x_0[first : first + chunk]), strict=True):
                    kept.add(row, key, first, nats)
        for key in keys:
            yield key[1], torch.tensor([kept.nats[(*key, i)] for i in range(N)])


@torch.inference_mode()
def score(args: argparse.Namespace) -> tuple[str, dict[str, dict[str, torch.Tensor]]]:
    """The protocol, and for each row the nats (N,) of its measures. Raises BadInput for models with
    windows of different lengths."""
    device, kept, table, protocol = pick_device(args.device), Kept(args.csv), {}, None
    for row in args.rows:
        models = [load_for_sampling(path, device, is_causal(read_checkpoint(path)))
                  for path in row.split("+")]
        config = models[0].config
        texts = read_texts([args.data], config)
        ids = texts.held if args.held_out else texts.val
        windows = args.windows or math.ceil(len(ids) / config.sequence_len)
        split, [sha256] = "held-out" if args.held_out else "validation", texts.sha256
        own = (f"{windows} {split} windows of {config.sequence_len}, text {sha256:.8}, "
               f"{args.draws} draws, seed {args.seed}, {device.type}")
        if own != (protocol := protocol or own):
            raise BadInput(f"{row}: {own}; the first row has {protocol}")
        x_0 = spaced_windows(ids, config.sequence_len, windows).to(device)
        table[row] = dict(measured(row, models, x_0, protocol, kept, args))
    return protocol, table


def label(row: str) -> str:
    """The names of the files, without folders; of many, the first and their number."""
    stems = [Path(path).stem for path in row.split("+")]
    return stems[0] if len(stems) == 1 else f"{stems[0]} and {len(stems) - 1} more"


def show(table: dict[str, dict[str, torch.Tensor]]) -> None:
    """Every row with its difference to the first model: bound to bound, exact to exact. The first
    model's own measures are compared with its first."""
    print("| model | measure | nats per character | bits | difference |\n|---|---|---|---|---|")
    reference = next(iter(table.values()))
    first = next(iter(reference.values()))
    for row, measures in table.items():
        for name, nats in measures.items():
            alike = EXACT if name in EXACT else {name}
            found = [reference[other] for other in reference.keys() & alike]
            gap = nats - (found[0] if found and measures is not reference else first)
            root = math.sqrt(len(nats))
            print(f"| {label(row)} | {name} | {nats.mean():.4f} ± {nats.std() / root:.4f} | "
                  f"{nats.mean() / math.log(2):.4f} | "
                  f"{gap.mean():+.4f} ± {gap.std() / root:.4f} |")


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("rows", nargs="*", default=[str(DEFAULT_WEIGHTS)], metavar="WEIGHTS",
        help="a checkpoint, or GPT twins joined by +; the others are compared with the first")
    add("--measures", nargs="+", choices=("bounds", "left-to-right", "most-confident"),
        default=["bounds", "left-to-right"], help="of diffusion models")
    add("--data", default=str(DEFAULT_DATA), metavar="TEXT", help="whose last 10%% is scored")
    add("--held-out", action="store_true", help="score the characters at the beginning of the text "
        "that choose the weights instead")
    add("--windows", type=number(int, 2), help="evenly spaced windows (default: just enough to "
        "cover the text, which are 436)")
    add("--draws", type=COUNT, default=16, help="masks per window, for the bounds")
    add("--seed", type=SEED, default=0, help="random seed of the bounds")
    add("--csv", type=Path, help="file that keeps the nats of every window")
    add("--device", default="auto", help="auto (CUDA, then MPS, then CPU), cpu, cuda or mps")
    args = parser.parse_args(argv)
    protocol, table = score(args)
    print(f"{protocol}, {torch.get_num_threads()} threads\n")
    show(table)


if __name__ == "__main__":
    start(main)
