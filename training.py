"""Train the diffusion model on a text file, on one CPU, one GPU, or several.

    uv run training.py                                           # 20,000 steps of 64 x 256
    uv run training.py --max-minutes 120 --batch-size 32         # as much as two hours can buy
    uv run torchrun --standalone --nproc_per_node=4 training.py  # the same run on four GPUs
    uv run training.py --resume                                  # after Ctrl-C, SIGTERM, a crash
    uv run training.py --init weights/diffusion_model.pt --data my.txt --weights weights/my.pt
    uv run training.py --eval-only                               # measure the weights
    uv run training.py --eval-only --teachers A.pt B.pt          # several, averaged

Beside the weights X.pt, a run keeps its state X.state.pt, from which --resume continues (sample.py
reads it too), and its log X.state.csv. It writes X.pt, and X.csv with it, whenever the validation
NELBO falls below that of every evaluation before and of the X.pt that it found there.
"""

import argparse
import csv
import ctypes
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

from model import (  # before torch, for which it sets the environment
    COUNT,
    DEFAULT_DATA,
    DEFAULT_WEIGHTS,
    EVALUATION_LIMIT,
    SEED,
    BadInput,
    CommandLine,
    DiffusionConfig,
    DiffusionTransformer,
    add_device_argument,
    atomic_file,
    autocast,
    decode_tokens,
    hardware,
    load_corpus,
    load_ids,
    load_weights,
    log_probs,
    masked_nll,
    multiplies_bf16,
    nelbo,
    noise_index,
    number,
    pick_device,
    q_sample,
    read_checkpoint,
    run,
    save_weights,
    spaced_windows,
    warn,
)
from sample import denoise, row_generators, top_k

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

LONG_RUN = 10_000   # steps from which on a low rate that falls from the start is the default
SHORT_RUN = {"muon_learning_rate": 0.02, "learning_rate": 3e-3, "decay": 0.5}  # the other default
WARMUP = 0.01       # share of the run in which the learning rate rises: Muon needs next to none
GRAD_CLIP = 1.0     # largest norm of the gradient; a guard that acts in the first steps only
PREFIX_RATE = 0.25  # share of the sequences with a clean prefix, as sampling has one
SPREAD = 1.0        # width in logits of the bell from which t is drawn (tests/ablations.md)
LATE_SPREAD = 1.7   # the same after --init: nearly flat, as the bound weighs all levels alike
FLAT_RATE = 1 / 16  # share of the sequences with t from a flat distribution, or t = 1 never comes
OPENING = 0.5       # share of the run in which the range of t widens from 40% to all of it
TEACHER_SHARE = 0.5  # of the loss, where there are teachers; the rest is the text's
AGREE_INTERVAL = 10  # steps between two agreements among processes on the clock and on stopping
LOG_INTERVAL = 20   # steps between two looks at the loss on a GPU, which it has to wait for
SIZES = [f.name for f in fields(DiffusionConfig) if f.name != "mask_token_id"]  # have a flag each
NOT_SETTINGS = {"data", "weights", "device", "resume", "eval_only"}
MAY_CHANGE_ON_RESUME = {"compile", "eval_interval"}
QUICK = {"passes": 4, "windows": 64, "seed": 0}  # the same crops and masks at every evaluation


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. The default learning rates depend on the length of the run. A run that is resumed,
    or starts from weights, takes that file's settings; BadInput where a flag contradicts them."""
    parser = CommandLine(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--data", type=Path, nargs="+", default=[DEFAULT_DATA], metavar="TEXT",
        help="text to learn, whose last 10%% validates; any further texts are only learned")
    add("--weights", type=Path, default=DEFAULT_WEIGHTS, help="file to write (or to measure)")
    add("--init", metavar="WEIGHTS", help="start from these weights instead of random "
        "ones, with fresh optimizers; the log continues theirs")
    add("--teachers", nargs="+", metavar="WEIGHTS", help="learn from these models' "
        "probabilities too (distillation)")
    add = parser.add_argument_group("network and diffusion").add_argument
    size = DiffusionConfig()
    add("--sequence-len", type=COUNT, default=size.sequence_len, help="characters per sequence")
    add("--vocab-size", type=COUNT, default=size.vocab_size,
        help="byte values: 128 is ASCII, 256 any UTF-8 text")
    add("--n-layer", type=number(int, 1, 1000), default=size.n_layer, help="transformer blocks")
    add("--n-head", type=COUNT, default=size.n_head, help="attention heads")
    add("--n-embd", type=COUNT, default=size.n_embd, help="channels")
    add("--diffusion-steps", type=COUNT, default=size.diffusion_steps, help="noise levels")
    add("--context-len", type=number(int, 0, 10**9), default=size.context_len,
        help="longest clean prefix of a sequence")
    short = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SHORT_RUN.items())
    add = parser.add_argument_group("optimization", f"A run of fewer than {LONG_RUN:,} steps, or "
        f"one by the clock, has other defaults:\n{short}").add_argument
    add("--steps", type=COUNT, default=20_000, help="optimizer steps")
    add("--max-minutes", type=number(float, above=0), help="let the learning rate follow the "
        "clock, compilation and evaluation included, and stop after so many minutes, not --steps")
    add("--batch-size", type=COUNT, default=64, help="sequences per step, over all processes")
    rate = number(float, above=0, most=1e37)  # so that float32 holds it
    add("--learning-rate", type=rate, default=7.5e-4,
        help="peak for AdamW: embeddings and output head")
    add("--muon-learning-rate", type=rate, default=0.005,
        help="peak for Muon: block matrices")
    add("--weight-decay", type=number(float, least=0, most=1e30), default=0.0,
        help="of the block matrices, per step and unit of learning rate")
    add("--decay", type=number(float, least=0, most=1), default=1.0,
        help="share of the run in which the learning rate falls to zero")
    add("--seed", type=SEED, default=1337, help="random seed")
    group = parser.add_argument_group("running")
    add = group.add_argument
    add("--eval-interval", type=COUNT, default=250, help="steps between evaluations and saves")
    add_device_argument(group)
    add("--compile", action=argparse.BooleanOptionalAction, help="use torch.compile, which pays "
        "off after a minute (default: except on MPS)")
    add("--resume", action="store_true", help="continue X.state.pt with the settings of that run")
    add("--eval-only", action="store_true", help="print the validation NELBO of --weights, or of "
        "the average of --teachers")
    args = parser.parse_args(argv)
    if args.max_minutes or args.steps < LONG_RUN:
        parser.set_defaults(**SHORT_RUN)
    settings, source, hint = {}, "", ""
    if args.resume:
        state = Files(args.weights).state
        settings, source = read_state(state)["args"], f"the run to resume, {state},"
        hint = "; to train it further: --init"
    elif args.init:
        settings, source = read_checkpoint(args.init)["config"], f"--init {args.init}"
        settings = {name: settings[name] for name in SIZES if name in settings}
    parser.set_defaults(**settings)
    args = parser.parse_args(argv)
    for name in settings.keys() - MAY_CHANGE_ON_RESUME:
        value = getattr(args, name)
        if value != settings[name]:
            flag = name.replace("_", "-")
            raise BadInput(f"--{flag} {value}: {source} has {settings[name]}{hint}")
    return args


def size_config(args: argparse.Namespace) -> DiffusionConfig:
    """The network and diffusion that the flags ask for."""
    return DiffusionConfig(**{name: getattr(args, name) for name in SIZES})


# --------------------------------------------------------------------------------------------------
# Optimizers


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype, steps: int = 5) -> torch.Tensor:
    """Roughly the nearest semi-orthogonal matrices: Newton-Schulz iteration moves the singular
    values of (N, rows, columns) to about 1. Coefficients: kellerjordan.github.io/posts/muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(1) > matrices.size(2)
    X = (matrices.mT if tall else matrices).to(dtype)
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: the update of torch.optim.Muon. But all matrices of a shape go
    through one batched iteration, and in float32 where the hardware does not multiply bfloat16.
    torch's version always uses bfloat16, whose emulation takes a minute a step."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), params in by_shape.items():
                grads = [p.grad for p in params]
                momenta = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = torch.stack(grads).lerp_(torch.stack(momenta), group["momentum"])
                dtype = torch.bfloat16 if multiplies_bf16(nesterov.device) else torch.float32
                updates = orthogonalize(nesterov, dtype).to(nesterov.dtype)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                scale = max(1, rows / columns) ** 0.5
                torch._foreach_add_(params, list(updates.unbind()), alpha=-group["lr"] * scale)


def make_optimizers(
    model: DiffusionTransformer, args: argparse.Namespace
) -> list[torch.optim.Optimizer]:
    """nanochat's split: Muon for the matrices of the blocks, AdamW for embeddings and output head.
    Every group remembers its peak learning rate."""
    matrices = list(model.blocks.parameters())
    others = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    optimizers = [
        Muon(matrices, args.muon_learning_rate, args.weight_decay),
        torch.optim.AdamW(
            others, args.learning_rate, (0.9, 0.95), weight_decay=0.0, fused=others[0].is_cuda
        ),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def learning_rate_factor(progress: float, decay: float) -> float:
    """Trapezoid over progress 0..1: a linear rise, a plateau, and a linear fall to zero."""
    fall = (1 - progress) / decay if decay else 1.0
    return max(0.0, min(1.0, progress / WARMUP, fall))


def update(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Clips the gradient and takes a step at `factor` times the peak learning rates."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad()


# --------------------------------------------------------------------------------------------------
# The batch


def draw_batch(
    train: torch.Tensor,
    config: DiffusionConfig,
    batch_size: int,
    generator: torch.Generator,
    spread: float = SPREAD,
    opened: float = 1.0,
) -> tuple[torch.Tensor, ...]:
    """The batch of a step over all processes: x_0, x_t and masked (B, T), noise indices and loss
    weights (B,), on the device of `train` and `generator`. t / S is below `opened`."""
    B, T, device = batch_size, config.sequence_len, train.device
    starts = torch.randint(len(train) - T + 1, (B,), generator=generator, device=device)
    x_0 = train[starts[:, None] + torch.arange(T, device=device)]
    # t / S follows a logit-normal bell around 1/2, where a sequence has both something to read and
    # something to predict (arXiv 2605.13026), stratified: one draw from each of B equal shares
    strata = torch.randperm(B, generator=generator, device=device)
    u, v, w, flat = torch.rand(4, B, generator=generator, device=device)
    quantile = ((strata + u) / B).clamp(1e-4, 1 - 1e-4)
    normal = math.sqrt(2) * torch.erfinv(2 * quantile - 1)  # MPS has no ndtri
    noise = torch.where(flat < FLAT_RATE, quantile, torch.sigmoid(spread * normal))
    t = (noise * opened * config.diffusion_steps).long() + 1
    prefix_len = (1 + v * config.context_len).long().clamp(max=config.context_len)
    x_t, masked = q_sample(x_0, t, config, generator, prefix_len * (w < PREFIX_RATE))
    # With equal weights the loss would be the bound itself (RADD, arXiv 2406.03736), but noisy: a
    # sequence with one masked character would count as much as one with 256. The square root
    # trades a little of the objective for much less noise.
    weight = masked.sum(1).float().sqrt()
    weight = weight / weight.sum().clamp(min=1.0)
    return x_0, x_t, masked, noise_index(masked, config.diffusion_steps), weight


def noise_schedule(progress: float, init: str | None) -> tuple[float, float]:
    """Width of the bell, and how far the range of t is open. At first t is low, because many
    visible neighbours teach the most; weights that --init names have that behind them."""
    if init:
        return LATE_SPREAD, 1.0
    return SPREAD, min(1.0, 0.4 + 0.6 * progress / OPENING)


# --------------------------------------------------------------------------------------------------
# Teachers


def load_teachers(
    paths: list[str], config: DiffusionConfig, device: torch.device
) -> list[DiffusionTransformer]:
    """Models whose probabilities the network learns; they may differ from it in size alone."""
    teachers = [load_weights(path, device)[0] for path in paths]
    for path, teacher in zip(paths, teachers, strict=True):
        for name in ("sequence_len", "vocab_size", "mask_token_id", "diffusion_steps"):
            theirs, ours = getattr(teacher.config, name), getattr(config, name)
            if theirs != ours:
                raise BadInput(f"--teachers {path}: its {name} is {theirs}, this run's is {ours}")
    return teachers


def average(log_p: list[torch.Tensor]) -> torch.Tensor:
    """The logarithm of the mean of the probabilities whose logarithms are given."""
    return torch.stack(log_p).logsumexp(0) - math.log(len(log_p))


class Ensemble(torch.nn.Module):
    """Several models as one that averages their probabilities."""

    def __init__(self, models: list[DiffusionTransformer]):
        super().__init__()
        self.models, self.config = torch.nn.ModuleList(models), models[0].config

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        log_p = [log_probs(model(x_t, t), self.config.mask_token_id) for model in self.models]
        return average(log_p)                                       # (B, T, V)


@torch.no_grad()
def ask(teachers: list[DiffusionTransformer], x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """log p(x_0 | x_t), (B, T, V), each sequence judged by one teacher. Cross-entropy is linear in
    its target, so in expectation that equals the teachers' average, at the cost of one."""
    n, log_p = len(teachers), []
    with autocast(x_t.device):
        for teacher, x, index in zip(teachers, x_t.tensor_split(n), t.tensor_split(n), strict=True):
            log_p.append(log_probs(teacher(x, index), teacher.config.mask_token_id))
    return torch.cat(log_p)


def teacher_nll(
    logits: torch.Tensor, log_q: torch.Tensor, masked: torch.Tensor, mask_token_id: int
) -> torch.Tensor:
    """Mean over the masked positions of the cross-entropy -sum_v q(v) log p(v | x_t) with the
    teachers' q, in nats per character, (B,)."""
    log_p = log_probs(logits, mask_token_id)
    terms = (log_q.exp() * log_p).masked_fill(log_q == -math.inf, 0.0)          # (B, T, V)
    return -terms.sum(-1).masked_fill(~masked, 0.0).sum(1) / masked.sum(1).clamp(min=1)


# --------------------------------------------------------------------------------------------------
# Files


@dataclass
class RunState:
    """What a run has to remember besides its tensors; saved and restored as a whole."""

    step: int = 0
    seconds: float = 0.0
    best: float = math.inf    # validation NELBO that the weights file has to beat
    wrote: bool = False       # whether this run has written it
    finished: bool = False
    log: list[dict] = field(default_factory=list)
    started_from: dict = field(default_factory=dict)  # meta of the weights that --init named


class Files:
    """The files of a run, and who may write them."""

    def __init__(self, weights: Path):
        stem = weights.name.removesuffix(".pt")  # no other dot ends a name: run0.01, run0.03
        self.weights, self.log = weights, weights.with_name(f"{stem}.csv")
        self.state = weights.with_name(f"{stem}.state.pt")
        self.state_log = weights.with_name(f"{stem}.state.csv")
        self.seen = self.stamp()

    def stamp(self) -> tuple | None:
        """Changes when the weights file is replaced."""
        if not self.weights.exists():
            return None
        stat = self.weights.stat()
        return stat.st_mtime_ns, stat.st_ino, stat.st_size

    def check(self, args: argparse.Namespace, n_bytes: int) -> None:
        """Raises BadInput, before the work starts, for what would fail later or cost a file."""
        for path in (self.weights, self.state, self.log, self.state_log):
            read = [*args.data, *(args.teachers or []), *([args.init] * (path != self.weights))]
            for other in map(Path, filter(None, read)):
                if path.exists() and other.exists() and path.samefile(other):
                    raise BadInput(f"{path}: the run reads it, so can't write it; change --weights")
            if path.exists() and not self.is_ours(path):
                raise BadInput(f"{path}: not from a training run, so it stays; change --weights")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                probe = path.with_name(f"{path.name}.{os.getpid()}.tmp")
                probe.touch()
                probe.unlink()
                if path.exists():
                    open(path, "ab").close()
            except OSError as error:
                raise BadInput(f"{path}: cannot be written ({error.strerror})") from error
        if self.state.exists() and not args.resume:
            earlier = RunState(**read_state(self.state)["run"])
            if not earlier.finished:
                raise BadInput(
                    f"{self.state} is an unfinished run, at step {earlier.step}: continue it with "
                    "--resume, delete it, or choose another --weights"
                )
        free = shutil.disk_usage(self.weights.parent).free
        if free < n_bytes:
            raise BadInput(
                f"{self.weights.parent}: a run needs {n_bytes >> 20} MiB, {free >> 20} are free"
            )

    def is_ours(self, path: Path) -> bool:
        if not path.is_file():
            return False
        if path in (self.log, self.state_log):
            return path.read_bytes()[:20].startswith(b"step,characters_seen")
        return ("optimizers" in read_checkpoint(path)) == (path == self.state)

    def incumbent(self, config, corpus_sha256, val, device) -> float:
        """Validation NELBO of the weights that are there, infinite if there are none. Raises
        BadInput for weights that can't be compared, which are never replaced."""
        self.seen = self.stamp()
        if self.seen is None:
            return math.inf
        model, meta = load_weights(self.weights, device)
        if meta.get("corpus_sha256", corpus_sha256) != corpus_sha256:
            raise BadInput(f"{self.weights} learned another text; choose another --weights")
        if model.config.vocab_size != config.vocab_size:
            raise BadInput(
                f"{self.weights} has vocab_size {model.config.vocab_size}, this run "
                f"{config.vocab_size}; choose another --weights"
            )
        best, _ = nelbo(model, val, **QUICK)
        warn(f"{self.weights} has a NELBO of {best:.4f}; only a lower one replaces it")
        return best


def write_log(rows: list[dict], path: Path) -> None:
    with atomic_file(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[-1])
        writer.writeheader()
        writer.writerows(rows)


def read_log(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_state(path: Path) -> dict:
    """The saved state of a run, or BadInput."""
    contents = read_checkpoint(path)
    if not {"optimizers", "run"} <= contents.keys():
        raise BadInput(f"{path}: weights alone, or an older version's run, so nothing to resume")
    return contents


# --------------------------------------------------------------------------------------------------
# Processes, signals, machines


def start_processes(args: argparse.Namespace) -> tuple[int, int, torch.device]:
    """Rank, number of processes, device. torchrun says in the environment how many it starts."""
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world:
        raise BadInput(f"--batch-size {args.batch_size} is not a multiple of the {world} processes")
    if world > 1 and args.device in ("auto", "cuda") and torch.cuda.is_available():
        local, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= n_gpus:
            raise BadInput(f"--nproc_per_node asks for more processes than the {n_gpus} GPUs here")
        torch.cuda.set_device(local)  # first, or every process would open a context on GPU 0
    device = pick_device(args.device)
    if world > 1 and device.type == "mps":
        raise BadInput("--device mps: torchrun needs cpu or cuda, MPS can't exchange gradients")
    if world > 1:
        # The others wait while the leader evaluates, so the limit is generous; a process that dies
        # closes its connections and is noticed at once
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return rank, world, device


def agree(progress: float, stopping: bool, device: torch.device) -> tuple[float, bool]:
    """The largest progress of any process, and whether any is to stop."""
    if dist.is_initialized():
        shared = torch.tensor([progress, float(stopping)], device=device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        progress, stopping = shared[0].item(), bool(shared[1].item())
    return progress, stopping


class StopSignal:
    """The first SIGINT or SIGTERM asks the loop to stop after its step, a later one ends the
    process. torchrun passes Ctrl-C on, so it comes twice: what follows within a second is one."""

    def __init__(self):
        self.received = None
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self)

    def __call__(self, signum, frame):
        if self.received is None:
            self.received = time.perf_counter()
            if os.environ.get("RANK", "0") == "0":
                warn("stopping after this step (Ctrl-C again ends at once)")
        elif time.perf_counter() - self.received > 1:
            raise KeyboardInterrupt


def keep_freed_memory() -> None:
    """Stops glibc from returning the memory of activations to the kernel, which clears every page
    when the next step asks for it: up to a quarter of a step on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def compiled(model: DiffusionTransformer, batch_size: int, device: torch.device):
    """torch.compile, tried on one batch; where that fails, a warning and the eager model."""
    x_t = torch.zeros(batch_size, model.config.sequence_len, dtype=torch.long, device=device)
    # Contiguous like the loop's noise indices: another stride would compile the network again
    t = x_t[:, 0].contiguous()
    try:
        network = torch.compile(model)
        with autocast(device):
            network(x_t, t).sum().backward()
        model.zero_grad()
        return network
    except Exception as error:  # no compiler, a broken one, no support: torch raises many kinds
        warn(f"torch.compile failed, continuing without it ({type(error).__name__})")
        return model


# --------------------------------------------------------------------------------------------------
# The run


def evaluate_only(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    if args.teachers:
        model, meta = Ensemble(load_teachers(args.teachers, size_config(args), device)), {}
    else:
        model, meta = load_weights(args.weights, device)
    _, val, corpus_sha256 = load_corpus(args.data[0], model.config)
    if meta.get("corpus_sha256", corpus_sha256) != corpus_sha256:
        warn("note: the weights learned another text than --data")
    mean, error = nelbo(model, val)
    print(
        f"validation NELBO {mean:.4f} +- {error:.4f} nats per character "
        f"({mean / math.log(2):.4f} bits), {min(len(val), EVALUATION_LIMIT)} of {len(val)} "
        f"characters, {hardware(device)}"
    )


def measure(model, train, val, state: RunState, batch_size: int) -> dict:
    """A row of the log."""
    characters = state.step * batch_size * model.config.sequence_len
    train_nelbo, _ = nelbo(model, train, **QUICK)
    val_nelbo, val_error = nelbo(model, val, **QUICK)
    earlier = state.started_from
    return {
        "step": state.step,
        "characters_seen": earlier.get("characters_seen", 0) + characters,
        "seconds": earlier.get("seconds", 0) + round(state.seconds),
        "train_nelbo": train_nelbo, "val_nelbo": val_nelbo, "val_nelbo_error": val_error,
    }


def show_progress(model, state: RunState, seed: int) -> None:
    """The figures of the last evaluation, and a window of text."""
    row, T, mask_token_id = state.log[-1], model.config.sequence_len, model.config.mask_token_id
    blank = torch.full((1, T), mask_token_id, device=next(model.parameters()).device)
    *_, x = denoise(model, blank, partial(top_k, k=2), 0.8, row_generators(seed, 1))
    warn(
        f"\nstep {state.step}, {state.seconds / 60:.1f} min: NELBO train {row['train_nelbo']:.4f}, "
        f"validation {row['val_nelbo']:.4f} +- {row['val_nelbo_error']:.4f} nats per character\n"
        f"{decode_tokens(x[0])}\n"
    )


def check_finite(losses: list[torch.Tensor], state: RunState, files: Files) -> float | None:
    """The last of the losses of the latest steps, if any. BadInput where one is not finite."""
    values = [loss.item() for loss in losses]
    for step, value in enumerate(values, start=state.step - len(values)):
        if not math.isfinite(value):
            kept = f"{files.state} is the last save" if files.state.exists() else "nothing is saved"
            raise BadInput(f"the loss at step {step} is {value}: stopped; {kept}. A lower "
                           "--muon-learning-rate or --learning-rate may help")
    return values[-1] if values else None


def load_further_texts(
    paths: list[Path], val: torch.Tensor, config: DiffusionConfig
) -> list[tuple[torch.Tensor, str]]:
    """Ids and SHA-256 of each. BadInput for one that holds any of 64 evenly spaced passages of the
    validation split: a model that has read those can't be validated on them."""
    passages = [bytes(ids) for ids in spaced_windows(val, min(256, len(val)), 64).tolist()]
    texts = [load_ids(path, config) for path in paths]
    for path, (ids, _) in zip(paths, texts, strict=True):
        text = ids.to(torch.uint8).numpy().tobytes()
        if any(passage in text for passage in passages):
            raise BadInput(f"--data {path}: holds text of the last 10% of the first, which "
                           "validates and must not be learned")
    return texts


def start_run(
    args: argparse.Namespace, config: DiffusionConfig, texts: dict, device: torch.device
) -> tuple[DiffusionTransformer, list[torch.optim.Optimizer], torch.Generator, RunState]:
    """Everything that a run changes as it goes: resumed, from given weights, or fresh."""
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    model = DiffusionTransformer(config).to(device)
    optimizers = make_optimizers(model, args)
    if args.resume:
        path = Files(args.weights).state
        saved = read_state(path)
        if texts != {name: saved["meta"].get(name, []) for name in texts}:
            paths = " ".join(map(str, args.data))
            raise BadInput(f"--data {paths}: the run to resume learned another text")
        if saved["device"] != device.type:
            raise BadInput(f"--device {device.type}: the run to resume is on {saved['device']}")
        model.load_state_dict(saved["model"])
        for optimizer, optimizer_state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        generator.set_state(saved["generator"])
        state = RunState(**saved["run"])
    elif args.init:
        weights, meta = load_weights(args.init, device)
        model.load_state_dict(weights.state_dict())
        state = RunState(started_from=meta, log=read_log(Files(Path(args.init)).log))
    else:
        state = RunState()
    return model, optimizers, generator, state


def save_state(args, files: Files, about: dict, model, optimizers, generator, state: RunState):
    """The state from which --resume continues, and the log so far."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    contents = {
        "model": model.state_dict(), "config": asdict(model.config), "meta": about,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "generator": generator.get_state(), "device": generator.device.type,
        "args": settings, "run": asdict(state),
    }
    with atomic_file(files.state) as file:
        torch.save(contents, file)
    for path in [files.state_log, *[files.log] * state.wrote] if state.log else []:
        write_log(state.log, path)


def save_if_best(files: Files, about: dict, model, state: RunState, val, device) -> None:
    """Writes the weights where the last evaluation beats all before, and those that are there."""
    row = state.log[-1]
    if files.stamp() != files.seen:  # another run has written them meanwhile
        incumbent = files.incumbent(model.config, about["corpus_sha256"], val, device)
        state.best = min(state.best, incumbent)
    if row["val_nelbo"] < state.best:
        state.best, state.wrote = row["val_nelbo"], True
        save_weights(model, {**about, **row}, files.weights)
        files.seen = files.stamp()


def finish(files: Files, state: RunState, val, device: torch.device) -> None:
    """The full bound of what the run wrote, into the file and onto the screen."""
    if not state.wrote or files.stamp() != files.seen:
        print(f"{files.weights} was better and stays; this run's model: "
              f"uv run sample.py --weights {files.state}")
        return
    model, meta = load_weights(files.weights, device)
    meta["val_nelbo"], meta["val_nelbo_error"] = nelbo(model, val)
    save_weights(model, meta, files.weights)
    print(f"{files.weights}: validation NELBO {meta['val_nelbo']:.4f} +- "
          f"{meta['val_nelbo_error']:.4f} nats per character")


def advise(files: Files, state: RunState) -> None:
    """What a user can do who has stopped the run."""
    if not files.state.exists():
        warn("stopped before the first step; there is nothing to resume")
        return
    again = shlex.join([word for word in sys.argv[1:] if word != "--resume"])
    warn(f"stopped after step {state.step}; continue: uv run training.py {again} --resume")


def train(args: argparse.Namespace) -> None:
    # Processes and device
    stop = StopSignal()
    rank, world, device = start_processes(args)
    leader = rank == 0

    # Data
    config = size_config(args)
    train, val, corpus_sha256 = load_corpus(args.data[0], config)
    others = load_further_texts(args.data[1:], val, config)
    texts = {"corpus_sha256": corpus_sha256, "other_texts": [sha256 for _, sha256 in others]}
    text = torch.cat((train, *(ids for ids, _ in others))).to(device)

    # Model, optimizers, and the state of the run
    model, optimizers, generator, state = start_run(args, config, texts, device)
    teachers = load_teachers(args.teachers or [], config, device)
    files = Files(args.weights)
    about = {
        **texts, "seed": args.seed, "torch": str(torch.__version__),
        "hardware": f"{world} x {hardware(device)}", "started_from": state.started_from,
        "command": shlex.join(["uv", "run", "training.py", *sys.argv[1:]]),
    }
    if leader:
        files.check(args, n_bytes=20 * sum(p.numel() for p in model.parameters()))
        state.best = min(state.best, files.incumbent(config, corpus_sha256, val, device))
        warn(f"training on {about['hardware']}")

    # Compile and DDP
    rows = args.batch_size // world
    mine = slice(rank * rows, (rank + 1) * rows)  # of the batch
    compiles = args.compile or (args.compile is None and device.type != "mps")
    network = compiled(model, rows, device) if compiles else model
    if world > 1:
        network = DistributedDataParallel(network)
        network.broadcast_buffers = False  # the rotary tables never change

    # The loop
    first_step = saved_step = state.step
    progress, stopping, losses, clock = 0.0, False, [], time.perf_counter()
    bar = tqdm(total=None if args.max_minutes else args.steps, initial=state.step, unit="step",
               disable=None if leader else True)  # None: silent unless stderr is a terminal
    while True:
        # Where the run is, by the clock or by the count; several processes agree now and then
        state.seconds, clock = state.seconds + time.perf_counter() - clock, time.perf_counter()
        if not args.max_minutes:
            progress = state.step / args.steps
        if world == 1 or (state.step - first_step) % AGREE_INTERVAL == 0:
            if args.max_minutes:
                progress = state.seconds / (60 * args.max_minutes)
            progress, stopping = agree(progress, stop.received is not None, device)
        finished = state.finished = progress >= 1

        # Evaluate and save; a run that is told to stop saves only, as it may not be given long
        due = finished or stopping or state.step % args.eval_interval == 0
        if due and state.step > saved_step:
            check_finite(losses, state, files)
            if leader and (finished or not stopping):
                state.log.append(measure(model, train, val, state, args.batch_size))
                save_if_best(files, about, model, state, val, device)
                show_progress(model, state, args.seed)
            if leader:
                save_state(args, files, about, model, optimizers, generator, state)
            saved_step = state.step
        if finished or stopping:
            break

        # The batch, forward, loss, backward, update. Every process draws the whole batch and keeps
        # its rows, so that the batch does not depend on their number
        spread, opened = noise_schedule(progress, args.init)
        batch = draw_batch(text, config, args.batch_size, generator, spread, opened)
        x_0, x_t, masked, t, weight = (part[mine] for part in batch)
        if teachers:
            log_q = ask(teachers, x_t, t)                           # (B, T, V)
        with autocast(device):
            logits = network(x_t, t)                                # (B, T, V)
        nll = masked_nll(logits, x_0, masked, config.mask_token_id) # (B,)
        if teachers:
            soft = teacher_nll(logits, log_q, masked, config.mask_token_id)
            nll = TEACHER_SHARE * soft + (1 - TEACHER_SHARE) * nll
        loss = (nll * weight).sum()
        (loss * world).backward()  # DDP takes the mean over processes, the weights ask for the sum
        factor = learning_rate_factor(progress, args.decay)
        update(model, optimizers, factor)
        losses.append(loss.detach())
        state.step += 1
        bar.update()

        # Log, when that does not make the device wait
        if device.type == "cpu" or len(losses) == LOG_INTERVAL:
            value = check_finite(losses, state, files)
            losses.clear()
            left = state.seconds * (1 - progress) / max(progress, 1e-9) / 60
            rate = args.muon_learning_rate * factor
            bar.set_postfix_str(f"loss {value:.3f}, lr {rate:.4f}, {left:.1f} min left")

    bar.close()
    if leader and finished:
        finish(files, state, val, device)
    elif leader:
        advise(files, state)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.eval_only:
        return evaluate_only(args)
    try:
        train(args)
    except RuntimeError as error:
        lost = ("closed by peer", "reset by peer", "imed out", "remote process exited")
        if not any(words in str(error) for words in lost):
            raise
        why = str(error).splitlines()[0]
        raise BadInput(f"another process of this run died or hangs ({why}); --resume continues "
                       "from the last save") from error
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
