"""Train the diffusion model on a text file, on one CPU, one GPU, or several.

    uv run training.py                                           # 20,000 steps of 64 x 256
    uv run training.py --max-minutes 120 --batch-size 32         # as much as two hours can buy
    uv run torchrun --standalone --nproc_per_node=4 training.py  # the same run on four GPUs
    uv run training.py --resume                                  # after Ctrl-C, SIGTERM, a crash
    uv run training.py --init weights/diffusion_model.pt --data my.txt --weights weights/my.pt
    uv run training.py --eval-only                               # measure the weights

The first 90% of the text are the train split; its first 40,000 characters are not learned and
choose which weights are kept. The last 10% validate; they choose only whether the run's
weights replace those that were there. Until then X.state.pt stands beside the weights X.pt;
--resume and sample.py can read it. Both hold the log.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads must not spin on busy cores

import argparse
import ctypes
import math
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported later, it would keep the group's threads alive
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import (
    COUNT, DEFAULT_DATA, DEFAULT_WEIGHTS, SEED, BadInput, CommandLine, DiffusionConfig,
    DiffusionTransformer, autocast, decode_tokens, load_corpus, load_weights, masked_nll,
    multiplies_bf16, nelbo, noise_index, number, pick_device, q_sample, read_checkpoint, replacing,
    run, save_weights, warn,
)
from sample import denoise, dilated

ADAMW_SHARE = 0.15  # AdamW's learning rate as a share of Muon's
WARMUP = 0.01       # share of the run in which the learning rate rises: Muon needs next to none
GRAD_CLIP = 1.0     # largest norm of the gradient; a guard that acts in the first steps only
PREFIX_SHARE = 0.25  # share of the sequences with a clean prefix, as sampling has one
SPREAD = 1.0        # width in logits of the bell from which t is drawn (ablations.md)
LATE_SPREAD = 1.7   # the width after --init: nearly uniform, as the bound weighs all levels alike
FLAT_SHARE = 1 / 16  # share of the sequences with uniform t; a bell of width 1 never draws t = 1
OPENING = 0.5       # share of the run in which the range of t widens from 40% to all of it:
                    # at first many visible neighbours teach the most. Not after --init
TEACHER_SHARE = 0.5  # of the loss, where there is a teacher; the rest is the text's
HELD_OUT = 40_000   # characters at the start of the train split (a tenth of a short one): those at
                    # its end belong to the play that most of the validation split comes from
QUICK = {"passes": 4, "windows": 64, "seed": 0}  # the same crops and masks at every evaluation
SIZES = [field.name for field in fields(DiffusionConfig) if field.name != "mask_token_id"]
NOT_SETTINGS = {"weights", "device", "resume", "eval_only", "state"}  # may differ on --resume


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. --resume takes the settings of the saved run, --init the sizes of its file;
    BadInput where a flag contradicts them."""
    parser = CommandLine(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--weights", type=Path, default=DEFAULT_WEIGHTS, help="file to write, X.pt")
    add("--data", nargs="+", default=[str(DEFAULT_DATA)], metavar="TEXT",
        help="training text, whose last 10%% validates; all of any further texts is learned")
    add("--teachers", nargs="+", default=[], metavar="WEIGHTS",
        help="learn these models' probabilities too; one of them, in turn, at each step")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--init", metavar="WEIGHTS", help="start from these weights")
    add("--resume", action="store_true", help="continue X.state.pt with the settings of that run")
    add("--eval-only", action="store_true", help="print the validation bound of X.pt")
    add = parser.add_argument_group("network and diffusion").add_argument
    for size in SIZES:
        add("--" + size.replace("_", "-"), type=int, default=getattr(DiffusionConfig, size),
            help="256 for any UTF-8 text" if size == "vocab_size" else "see DiffusionConfig")
    add = parser.add_argument_group("optimization").add_argument
    add("--steps", type=COUNT, default=20_000, help="optimizer steps")
    add("--max-minutes", type=number(float, 1e-3), help="train by the clock instead of --steps")
    add("--batch-size", type=COUNT, default=64, help="sequences per step, over all processes")
    add("--learning-rate", type=number(float, 1e-12), help="peak for the block matrices (default: "
        "0.005, or 0.02 by the clock and in fewer than 10,000 steps)")
    add("--decay", type=number(float, 0, 1), help="share of the run in which the learning rate "
        "falls to zero (default: 1, or 0.5 where the learning rate is 0.02)")
    add("--weight-decay", type=number(float, 0), default=0.0, help="of the block matrices")
    add("--seed", type=SEED, default=1337, help="random seed")
    add = parser.add_argument_group("running").add_argument
    add("--eval-interval", type=COUNT, help="steps between saves (default: 250; on CUDA 1000)")
    add("--device", default="auto", help="auto (CUDA, then MPS, then CPU), cpu, cuda or mps")
    add("--no-compile", action="store_true", help="without torch.compile, which takes a minute")
    args = parser.parse_args(argv)
    source, state, saved = args.init, None, {}
    if args.resume:
        source = state_beside(args.weights)
        state = read_checkpoint(source)
        if not isinstance(saved := state.get("args"), dict):
            raise BadInput(f"{source}: weights alone, so there is nothing to resume")
    elif source is not None:
        saved = {name: x for name, x in read_checkpoint(source)["config"].items() if name in SIZES}
    args = parser.parse_args(argv, argparse.Namespace(**saved))  # sets only what was given
    for name in saved.keys() - {"no_compile", "eval_interval"}:
        if getattr(args, name) != saved[name]:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise BadInput(f"{flag}: {source} has {saved[name]}")
    long = args.steps >= 10_000 and not args.max_minutes
    args.learning_rate = args.learning_rate or (0.005 if long else 0.02)
    args.decay = (1.0 if long else 0.5) if args.decay is None else args.decay
    args.state = state
    return args


# Optimizers ---------------------------------------------------------------------------------------


def orthogonalize(matrices, steps: int = 5):
    """Roughly the nearest semi-orthogonal matrices: Newton-Schulz iteration moves the singular
    values of (N, rows, columns) to about 1. Coefficients: kellerjordan.github.io/posts/muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(1) > matrices.size(2)
    X = matrices.mT if tall else matrices
    X = X.to(torch.bfloat16 if multiplies_bf16(X.device) else torch.float32)
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: the update of torch.optim.Muon. But the matrices of a group, which
    have one shape, go through one batched iteration, and in float32 where the hardware does not
    multiply bfloat16: torch's version always uses bfloat16, whose emulation takes a minute a step.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, lr, beta = group["params"], group["lr"], group["momentum"]
            grads = torch.stack([p.grad for p in params])           # (N, rows, columns)
            state = self.state[params[0]]
            momentum = state.setdefault("momentum", torch.zeros_like(grads))
            momentum.lerp_(grads, 1 - beta)
            updates = orthogonalize(grads.lerp(momentum, beta))     # Nesterov's
            scale = max(1, grads.size(1) / grads.size(2)) ** 0.5
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, list(updates.unbind()), alpha=-lr * scale)


def make_optimizers(model, learning_rate: float, weight_decay: float = 0.0):
    """nanochat's split: Muon for the matrices of the blocks, AdamW for embeddings and output head.
    Every group remembers its peak learning rate."""
    by_shape = {}
    for p in model.blocks.parameters():
        by_shape.setdefault(p.shape, []).append(p)
    muon = {"lr": learning_rate, "weight_decay": weight_decay, "momentum": 0.95}
    others = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    optimizers = [
        Muon([{"params": params} for params in by_shape.values()], muon),
        torch.optim.AdamW(others, ADAMW_SHARE * learning_rate, (0.9, 0.95), weight_decay=0.0,
                          fused=others[0].is_cuda),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def learning_rate_factor(progress: float, decay: float) -> float:
    """Trapezoid over progress 0..1: a linear rise, a plateau, and a linear fall to zero."""
    fall = (1 - progress) / decay if decay else 1.0
    return max(0.0, min(1.0, progress / WARMUP, fall))


def update(model, optimizers, factor: float) -> None:
    """Clips the gradient and takes a step at `factor` times the peak learning rates."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad()


# The batch and its loss ---------------------------------------------------------------------------


def draw_batch(text, config, batch_size: int, generator, spread: float = SPREAD, opened=1.0):
    """The batch of a step over all processes: x_0, x_t and masked (B, T), noise indices and loss
    weights (B,), on the device of `text` and `generator`. (t - 1) / S is below `opened`."""
    B, T, device = batch_size, config.sequence_len, text.device
    starts = torch.randint(len(text) - T + 1, (B,), generator=generator, device=device)
    x_0 = text[starts[:, None] + torch.arange(T, device=device)].long()
    # t / S follows a logit-normal bell around 1/2, where a sequence has both something to read and
    # something to predict (arXiv 2605.13026), stratified: one draw from each of B equal shares
    strata = torch.randperm(B, generator=generator, device=device)
    u, v, w, flat = torch.rand(4, B, generator=generator, device=device)
    quantile = ((strata + u) / B).clamp(1e-4, 1 - 1e-4)
    normal = math.sqrt(2) * torch.erfinv(2 * quantile - 1)  # MPS has no ndtri
    noise = torch.where(flat < FLAT_SHARE, quantile, torch.sigmoid(spread * normal))
    t = (noise * opened * config.diffusion_steps).long() + 1
    prefix_len = (1 + v * config.context_len).long().clamp(max=config.context_len)
    x_t, masked = q_sample(x_0, t, config, generator, prefix_len * (w < PREFIX_SHARE))
    # Equal weights and uniform t would make the loss the bound (RADD, arXiv 2406.03736), but too
    # noisy: a sequence with one masked character would count as much as one with 256. The square
    # root trades a little of the objective for much less noise.
    weight = masked.sum(1).float().sqrt()
    weight = weight / weight.sum().clamp(min=1.0)
    return x_0, x_t, masked, noise_index(masked, config.diffusion_steps), weight


def distilled_nll(log_p, log_q, masked):
    """Mean over the masked positions of the cross-entropy -sum_v q(v) log p(v | x_t) with the
    teacher's q, in nats per character, (B,)."""
    terms = torch.where(log_q > -math.inf, log_q.exp() * log_p, 0.0)            # (B, T, V)
    return -terms.sum(-1).masked_fill(~masked, 0.0).sum(1) / masked.sum(1).clamp(min=1)


def batch_loss(network, batch, teacher=None):
    """The loss of a batch as `draw_batch` gives it, or of some of its rows. A teacher judges the
    same x_t, and its probabilities are learned beside the text."""
    x_0, x_t, masked, index, weight = batch
    with autocast(x_t.device):
        log_p = network(x_t, index)                                 # (B, T, V)
        if teacher is not None:
            with torch.no_grad():
                log_q = teacher(x_t, index)                         # (B, T, V)
    nll = masked_nll(log_p, x_0, masked)                            # (B,)
    if teacher is not None:
        soft = distilled_nll(log_p, log_q, masked)                  # (B,)
        nll = TEACHER_SHARE * soft + (1 - TEACHER_SHARE) * nll
    return (nll * weight).sum()


# Processes, signals, compilation ------------------------------------------------------------------


def start_processes(args: argparse.Namespace) -> tuple[int, int, torch.device]:
    """Rank, number of processes, device. Under torchrun there are several processes, and else one,
    as a platform may set RANK for purposes of its own."""
    torch.set_float32_matmul_precision("high")
    if platform.libc_ver()[0] == "glibc":
        # Keep the memory of activations: the kernel would clear every page that the next step asks
        # for, up to a quarter of a step on a CPU
        for option, value in (-4, 0), (-1, -1):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    if not dist.is_torchelastic_launched():
        return 0, 1, pick_device(args.device)
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if args.batch_size % world:
        raise BadInput(f"--batch-size {args.batch_size} is not a multiple of the {world} processes")
    if cuda := args.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(local)  # first, or every process opens a context on GPU 0
    # MPS, which "auto" may find, can't exchange gradients
    device = pick_device("cpu" if args.device == "auto" and not cuda else args.device)
    # The others wait while the leader evaluates, so the limit is generous; a process that dies
    # closes its connections and is noticed at once
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    return rank, world, device


def agree(progress: float, signum: int, device: torch.device) -> tuple[float, int]:
    """The largest progress of any process, and the signal that stops one of them, or 0."""
    if dist.is_initialized():
        shared = torch.tensor([progress, signum], dtype=torch.float64, device=device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        progress, signum = shared[0].item(), int(shared[1].item())
    return progress, signum


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside, SIGINT, SIGTERM and SIGHUP only add their number to the list, unless they were
    ignored before (nohup). Windows has no SIGHUP."""
    received = []
    stops = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    before = {signum: signal.signal(signum, lambda n, frame: received.append(n))
              for signum in stops if signal.getsignal(signum) != signal.SIG_IGN}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def compiled(model, batch_size: int, learns: bool = True):
    """The model under torch.compile, tried on one batch as it will be used: a teacher doesn't
    learn. Where the trial fails, a warning and the eager model. g++ 12 removes live stores from
    Inductor's CPU code, which makes gradients silently wrong, so it is told not to."""
    gcc = {"cpp.cxx": (None, f"{os.environ.get('CXX', 'g++')} -fno-dse")}
    network = torch.compile(model, options=gcc if sys.platform == "linux" else None)
    device = next(model.parameters()).device
    x_t = torch.zeros(batch_size, model.config.sequence_len, dtype=torch.long, device=device)
    try:
        with autocast(device), torch.set_grad_enabled(learns):
            log_p = network(x_t, x_t[:, 0].contiguous())
        if learns:
            log_p[..., 1].sum().backward()
    except Exception as error:  # no compiler, a broken one, no support: torch raises many kinds
        warn(f"torch.compile failed, continuing without it: {error!r:.200}".splitlines()[0])
        network = model
    model.zero_grad()
    return network


# Files --------------------------------------------------------------------------------------------


def state_beside(weights: Path) -> Path:
    """X.state.pt for X.pt, or beside what a link X.pt points to."""
    path = os.path.realpath(weights) if weights.is_symlink() else str(weights)
    return Path(path.removesuffix(".pt") + ".state.pt")


def claim_files(args: argparse.Namespace, config, sha256: str, val, device, run: dict) -> None:
    """Sets the mark of a new run, which is the quick validation bound of the weights that are there
    or infinity, and creates its state, which refuses a second run. Raises BadInput for files that
    no run has written, and for weights of another text or vocabulary."""
    weights, state = args.weights, state_beside(args.weights)
    if weights.suffix != ".pt" or weights.name.endswith(".state.pt"):
        raise BadInput(f"--weights {weights}: has to be a file X.pt, and not X.state.pt")
    if weights.exists():
        model, meta = load_weights(weights, device)
        if meta.get("corpus_sha256", sha256) != sha256:
            raise BadInput(f"{weights} learned another text; choose another --weights")
        if model.config.vocab_size != config.vocab_size:
            raise BadInput(f"{weights} has vocab_size {model.config.vocab_size}, not "
                           f"{config.vocab_size}; choose another --weights")
        if not args.resume:
            run["mark"] = nelbo(model, val, **QUICK)[0]
    else:
        run["best"] = math.inf  # a resumed run's weights have gone
    try:
        weights.parent.mkdir(parents=True, exist_ok=True)
        state.touch(exist_ok=args.resume)
    except FileExistsError as error:
        raise BadInput(f"{state} holds a run: --resume continues it, or delete it") from error


def saved(save, *arguments) -> bool:
    """Calls save(*arguments). One that fails, as on a full disk, ends no run: the next one tries
    again."""
    try:
        save(*arguments)
    except (OSError, RuntimeError) as error:  # torch.save makes the one the other
        warn(f"not saved, the next save tries again: {str(error).splitlines()[0]}")
        return False
    return True


def save_state(args, about: dict, model, optimizers, generator, run: dict) -> None:
    """The state from which --resume continues."""
    contents = {
        "model": model.state_dict(), "config": asdict(model.config), "meta": about,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers], "run": run,
        "args": {name: x for name, x in vars(args).items() if name not in NOT_SETTINGS},
        "generator": generator.get_state(),
    }
    with replacing(state_beside(args.weights)) as file:
        torch.save(contents, file)


# The run ------------------------------------------------------------------------------------------


def evaluate(args, about: dict, model, run: dict, splits: dict) -> None:
    """Adds the quick bounds of all splits to the log; keeps the weights if they are the best of the
    run on the held-out split and beat those that were there; shows the bounds and some text."""
    bounds = {name: nelbo(model, ids, **QUICK) for name, ids in splits.items()}
    row = {
        "step": run["step"], "seconds": round(run["seconds"]),
        "characters_seen": run["step"] * args.batch_size * args.sequence_len,
        **{f"{name}_nelbo": mean for name, (mean, _) in bounds.items()},
        "val_nelbo_error": bounds["val"][1],
    }
    run["log"].append(row)
    if row["held_nelbo"] < run["best"] and row["val_nelbo"] < run["mark"]:
        if saved(save_weights, model, {**about, **row, "log": run["log"]}, args.weights):
            run["best"] = row["held_nelbo"]
    device = next(model.parameters()).device
    blank = torch.full((1, args.sequence_len), model.config.mask_token_id, device=device)
    rule, generator = partial(dilated, turns=32), torch.Generator().manual_seed(args.seed)
    *_, x = denoise(model, blank, rule, 1.0, generator)
    figures = ", ".join(f"{name} {mean:.4f}" for name, (mean, _) in bounds.items())
    warn(f"\nstep {run['step']}, {run['seconds'] / 60:.1f} min, NELBO in nats per character: "
         f"{figures}\n{decode_tokens(x[0])}\n")


def show_bound(path: Path, mean: float, error: float) -> None:
    print(f"{path}: validation NELBO {mean:.4f} +- {error:.4f} nats per character "
          f"({mean / math.log(2):.4f} bits)")


def finish(args, val, device: torch.device, run: dict) -> None:
    """The full bound of what the run wrote, into the file and onto the screen."""
    state = state_beside(args.weights)
    if run["best"] == math.inf:
        advice = f"this run's model: uv run sample.py --weights {shlex.quote(str(state))}"
        if run["mark"] == math.inf:
            raise BadInput(f"{args.weights} was not written, for want of time or space; {advice}")
        return print(f"{args.weights} was better and stays; {advice}")
    model, meta = load_weights(args.weights, device)
    mean, error = nelbo(model, val)
    meta |= {"val_nelbo": mean, "val_nelbo_error": error, "log": run["log"]}
    if saved(save_weights, model, meta, args.weights):
        state.unlink()
    show_bound(args.weights, mean, error)


def start_run(args, config, texts: list[str], device: torch.device):
    """All that a run changes as it goes, fresh or from --init or the saved state: model,
    optimizers, generator, and what it has to remember."""
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    fresh = args.resume or not args.init
    model = (DiffusionTransformer(config) if fresh else load_weights(args.init)[0]).to(device)
    optimizers = make_optimizers(model, args.learning_rate, args.weight_decay)
    run = {"step": 0, "seconds": 0.0, "best": math.inf, "mark": math.inf, "log": []}
    if args.resume:
        try:
            run |= args.state["run"]
            model.load_state_dict(args.state["model"])
            for optimizer, contents in zip(optimizers, args.state["optimizers"], strict=True):
                optimizer.load_state_dict(contents)
            generator.set_state(args.state["generator"])
            if (args.state["meta"]["texts"], args.state["meta"]["device"]) != (texts, device.type):
                raise ValueError(f"it learned other texts than {args.data}, or not on {device}")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            raise BadInput(f"{state_beside(args.weights)}: not this run's state ({why})") from error
    return model, optimizers, generator, run


def train(args: argparse.Namespace, command: str) -> int:
    """The run. Returns 0 at its end, or the number of the signal that stopped it."""
    clock = time.perf_counter()
    rank, world, device = start_processes(args)
    leader = rank == 0

    # Texts: what is learned, what chooses the weights that are kept, what validates
    config = DiffusionConfig(**{size: getattr(args, size) for size in SIZES})
    train_split, val, sha256 = load_corpus(args.data[0], config)
    held, train_split = train_split.tensor_split([min(HELD_OUT, len(train_split) // 10)])
    further = [load_corpus(path, config) for path in args.data[1:]]
    texts = [sha256, *(sha256 for _, _, sha256 in further)]
    text = torch.cat((train_split, *(part for parts in further for part in parts[:2]))).to(device)

    # Model, optimizers, files
    model, optimizers, generator, run = start_run(args, config, texts, device)
    teachers = [load_weights(path, device)[0] for path in args.teachers]
    for path, teacher in zip(args.teachers, teachers, strict=True):
        for size in ("sequence_len", "vocab_size", "mask_token_id", "diffusion_steps"):
            if (found := getattr(teacher.config, size)) != (wanted := getattr(config, size)):
                raise BadInput(f"--teachers {path}: has {size} {found}, not {wanted}")
    about = {
        "texts": texts, "corpus_sha256": sha256, "seed": args.seed, "command": command,
        "torch": str(torch.__version__), "device": device.type, "hardware": f"{world} x "
        f"{device.type}, {torch.get_num_threads()} threads, bfloat16 {multiplies_bf16(device)}",
    }
    save = partial(save_state, args, about, model, optimizers, generator, run)
    if leader:
        claim_files(args, config, sha256, val, device, run)
        saved(save)

    # Compile and DDP
    rows = args.batch_size // world
    mine = slice(rank * rows, (rank + 1) * rows)  # of the batch
    network = model
    if not args.no_compile and device.type != "mps":
        network = compiled(model, rows)
        teachers = [compiled(teacher, rows, learns=False) for teacher in teachers]
    if world > 1:
        network = DistributedDataParallel(network)
        network.broadcast_buffers = False  # the rotary tables never change
    if leader:
        beat = f"; mark to beat: {run['mark']:.4f}" if run["mark"] < math.inf else ""
        warn(f"training on {about['hardware']}{beat}")

    # The loop
    spread = LATE_SPREAD if args.init else SPREAD
    interval = args.eval_interval or (1000 if device.type == "cuda" else 250)
    splits = {"train": train_split, "held": held, "val": val}
    bar = tqdm(total=None if args.max_minutes else args.steps, initial=run["step"], unit="step",
               disable=None if leader else True)  # None: silent unless stderr is a terminal
    with stop_signals() as received, bar:
        while True:
            # Where the run is, by the clock or by the count; all processes agree on it
            now = time.perf_counter()
            run["seconds"], clock = run["seconds"] + now - clock, now
            progress = run["step"] / args.steps
            if args.max_minutes:
                progress = run["seconds"] / (60 * args.max_minutes)
            progress, signum = agree(progress, received[0] if received else 0, device)
            finished = progress >= 1

            # Evaluate and save; a run that is told to stop saves only, as it may not be given long
            due = finished or signum or run["step"] % interval == 0
            evaluated = run["log"][-1]["step"] if run["log"] else 0
            if leader and due and run["step"] > evaluated:
                if finished or not signum:
                    evaluate(args, about, model, run, splits)
                saved(save)
            if finished or signum:
                break

            # The batch. Every process draws the whole and keeps its rows, so that the batch does
            # not depend on their number
            opened = 1.0 if args.init else min(1.0, 0.4 + 0.6 * progress / OPENING)
            batch = draw_batch(text, config, args.batch_size, generator, spread, opened)
            batch = [part[mine] for part in batch]
            teacher = teachers[run["step"] % len(teachers)] if teachers else None

            # Forward, loss, backward, update
            loss = batch_loss(network, batch, teacher) * world  # DDP takes the processes' mean
            loss.backward()
            factor = learning_rate_factor(progress, args.decay)
            update(model, optimizers, factor)
            if not math.isfinite(loss.item()):
                raise BadInput(f"the loss at step {run['step']} is {loss.item()}: stopped; the "
                               "last save stays. A lower --learning-rate may help")
            run["step"] += 1
            bar.update()
            bar.set_postfix_str(f"loss {loss.item():.3f}, lr {args.learning_rate * factor:.4f}")

    if leader and finished:
        finish(args, val, device, run)
    elif leader:
        warn(f"stopped after step {run['step']}; continue: uv run training.py --resume --weights "
             f"{shlex.quote(str(args.weights))}")
    return 0 if finished else signum


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.eval_only:
        model, _ = load_weights(args.weights, pick_device(args.device))
        return show_bound(args.weights, *nelbo(model, load_corpus(args.data[0], model.config)[1]))
    words = sys.argv[1:] if argv is None else argv
    try:
        signum = train(args, shlex.join(["uv", "run", "training.py", *map(str, words)]))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if signum:
        sys.exit(128 + signum)


if __name__ == "__main__":
    run(main)
