"""How likely is the validation split to the model, and to its GPT twin, on the same windows?

    uv run tests/experiments/causal_twin.py --max-minutes 17        # first, for the last row
    uv run tests/benchmarks/benchmark_likelihood.py --windows 48

Every window of 256 characters is scored without context, in nats per character, by

    NELBO, 128 steps        the bound that the project reports
    NELBO, continuous time  the limit of infinitely many noise levels, as MDLM and MD4 report it
    left to right           exact: each character from those before it, with the rest masked
    most confident first    exact: always the position whose likeliest character is most probable.
                            The order depends only on characters that are already unmasked, so this
                            is a likelihood too
    GPT twin                exact: the same trunk with causal attention (causal_twin.py), or an
                            ensemble of several

The standard errors are over windows; the differences to the first row are paired.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads must not spin on busy cores

import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "experiments")]  # model.py, causal_twin.py
import torch
from causal_twin import TWIN_WEIGHTS, average, make_causal, next_log_p, nll_of

from model import (
    COUNT, DEFAULT_DATA, DEFAULT_WEIGHTS, SEED, CommandLine, DiffusionTransformer, load_corpus,
    masked_count_weights, masked_nll, noise_index, number, pick_device, spaced_windows, start,
)
from sample import load_for_sampling


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
        parts = zip(rows.split(64), masked.split(64), strict=True)
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


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--weights", type=Path, default=DEFAULT_WEIGHTS, help="checkpoint to score")
    add("--twins", type=Path, nargs="+", default=[TWIN_WEIGHTS], metavar="WEIGHTS",
        help="the GPT twin, or several as an ensemble; files that are missing are left out")
    add("--windows", type=number(int, 2), default=48, help="evenly spaced validation windows")
    add("--draws", type=COUNT, default=64, help="masks per window, for the bounds")
    add("--bounds", action="store_true", help="print only the two bounds (minutes for all "
        "436 windows at --draws 16)")
    add("--seed", type=SEED, default=0, help="random seed of the bounds")
    add("--device", default="auto", help="auto (CUDA, then MPS, then CPU), cpu, cuda or mps")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    model = load_for_sampling(args.weights, device)
    T = model.config.sequence_len
    _, val, _ = load_corpus(DEFAULT_DATA, model.config)
    x_0 = spaced_windows(val, T, args.windows).to(device)
    discrete, continuous = bounds(model, x_0, args.draws, args.seed)
    rows = {"NELBO, 128 steps": discrete, "NELBO, continuous time": continuous}
    twins = []
    if not args.bounds:
        rows["left to right"] = left_to_right(model, x_0)
        rows["most confident first"] = most_confident_first(model, x_0)
        twins = [make_causal(load_for_sampling(w, device)) for w in args.twins if w.exists()]
    if twins:
        log_p = average([next_log_p(twin, x_0) for twin in twins])
        name = "GPT twin" if len(twins) == 1 else f"ensemble of {len(twins)} GPT twins"
        rows[name] = nll_of(log_p, x_0).double().mean(1)
    print(f"{args.windows} windows, {device.type}, {torch.get_num_threads()} threads, "
          f"seed {args.seed}\n\n"
          "| | nats per character | bits | difference to the bound |\n|---|---|---|---|")
    root = math.sqrt(args.windows)
    for name, nll in rows.items():
        gap = nll - discrete
        print(f"| {name} | {nll.mean():.4f} ± {nll.std() / root:.4f} | "
              f"{nll.mean() / math.log(2):.4f} | {gap.mean():+.4f} ± {gap.std() / root:.4f} |")


if __name__ == "__main__":
    start(main)
