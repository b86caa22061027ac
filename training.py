"""Train the diffusion model on a text file, on one CPU, one GPU, or several.

    uv run training.py                                           # 20,000 steps of 64 x 256
    uv run training.py --max-minutes 120 --batch-size 32         # stop after two hours
    uv run torchrun --standalone --nproc_per_node=4 training.py  # the same run on four GPUs
    uv run training.py --resume                                  # after Ctrl-C, SIGTERM, a crash
    uv run training.py --init weights/diffusion_model.pt --data my.txt --weights weights/my.pt
    uv run training.py --eval-only                               # measure the weights

X.pt is the file that --weights names. During a run, training.py writes X.state.pt, which --resume
and sample.py can read. At the end, it writes the best weights to X.pt and renames an earlier X.pt
to X.1.pt, X.2.pt, ... Both files contain the log.

The last 10% of the first text is the validation split. It only measures the final weights. The
first 40,000 characters of the other 90% (a tenth, if that is less) are the held-out slice. The run
keeps the weights that score best on the held-out slice. Training reads the remaining text, and all
of any further texts.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads must not spin on busy cores

import argparse
import ctypes
import hashlib
import math
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # unused, but early on purpose: torch imports it anyway.
# After init_process_group, its default arguments would keep the group and its threads alive
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import (
    COUNT, DEFAULT_DATA, DEFAULT_WEIGHTS, SEED, BadInput, CommandLine, DiffusionConfig,
    DiffusionTransformer, autocast, bfloat16_state, build_model, decode_tokens, load_corpus,
    load_weights, masked_mean, masked_nll, multiplies_bf16, nelbo, noise_index, number,
    pick_device, q_sample, read_checkpoint, replacing, save_weights, say, start, temporaries,
)
from sample import denoise, dilated, sample_command

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ADAMW_SHARE = 0.15  # AdamW's learning rate as a share of Muon's
WARMUP = 0.01       # share of the run in which the learning rate rises: Muon needs next to none
GRAD_CLIP = 1.0     # largest norm of the gradient; a guard that acts in the first steps only
PREFIX_SHARE = 0.25  # share of the sequences with a clean prefix, as a prompt is when sampling
TEACHER_SHARE = 0.5  # weight of a teacher's term in the loss; the text's term has the rest
HELD_OUT = 40_000   # characters of the held-out slice. The end of the first 90% and most of the
                    # validation split are from one play, so the slice is taken from the start
SIZES = [size.name for size in fields(DiffusionConfig) if size.name != "mask_token_id"]
NOT_SAVED = {"weights", "device", "resume"}  # settings that --resume does not restore
# --resume accepts other values of these; `train` compares texts and teachers by checksum
MAY_DIFFER = {"no_compile", "eval_interval", "data", "teachers"}


# The command line ---------------------------------------------------------------------------------


def command_line() -> CommandLine:
    parser = CommandLine(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--weights", type=Path, default=DEFAULT_WEIGHTS, help="file to write, X.pt")
    add("--data", nargs="+", default=[str(DEFAULT_DATA)], metavar="TEXT", help="training texts; "
        "the last 10%% of the first one validates, further ones are learned whole")
    add("--first-share", type=number(float, 0, 1), help="share of the sequences that come from the "
        "first text (default: its share of all characters)")
    add("--teachers", nargs="+", default=[], metavar="WEIGHTS", help="models whose probabilities "
        "are learned too; each step uses the next one in turn")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--init", metavar="WEIGHTS", help="start from these weights")
    add("--resume", action="store_true", help="continue X.state.pt with the settings of that run")
    add("--eval-only", action="store_true", help="print the validation bound of X.pt")
    add = parser.add_argument_group("network and diffusion").add_argument
    for size in SIZES:
        about = "256 for any UTF-8 text" if size == "vocab_size" else "see DiffusionConfig"
        add("--" + size.replace("_", "-"), type=number(int, 0, 10**6),
            default=getattr(DiffusionConfig, size), help=about)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--steps", type=COUNT, default=20_000, help="optimizer steps")
    add("--max-minutes", type=number(float, 1e-3, 1e6),
        help="stop after this many minutes in the loop instead")
    add = parser.add_argument_group("optimization").add_argument
    add("--batch-size", type=COUNT, default=64, help="sequences per step, over all processes")
    add("--learning-rate", type=number(float, 1e-12, 10), help="peak learning rate of the block "
        "matrices (default: 0.005; 0.02 with --max-minutes or in fewer than 10,000 steps)")
    add("--decay", type=number(float, 0, 1), help="share of the run in which the learning rate "
        "falls to zero (default: 1; 0.5 with --max-minutes or in fewer than 10,000 steps)")
    add("--weight-decay", type=number(float, 0, 100), default=0.0, help="of the block matrices")
    add("--seed", type=SEED, default=1337, help="random seed")
    add = parser.add_argument_group("running").add_argument
    add("--eval-interval", type=COUNT,
        help="steps between evaluations (default: 250; on CUDA 1000)")
    add("--device", default="auto", help="auto (CUDA, then MPS, then CPU), cpu, cuda or mps")
    add("--no-compile", action="store_true", help="skip torch.compile, which takes about a minute")
    return parser


def saved_settings(args: argparse.Namespace, state: dict | None) -> dict:
    """The settings that the state of --resume or the weights of --init determine. A run from random
    weights has none. Raises BadInput for weights under the name of a state."""
    if state:
        if not isinstance(state.get("args"), dict):
            raise BadInput(f"{state_beside(args.weights)}: weights alone, so there is nothing to "
                           "resume")
        return state["args"]
    if args.init is not None:
        config = read_checkpoint(args.init)["config"]
        return {size: config[size] for size in SIZES if size in config}
    return {}


def settle(parser: CommandLine, argv, saved: dict, source: Path | str | None):
    """The settings of a run. What `source` has saved becomes the parser's defaults, and then the
    command line is parsed again. Raises BadInput where it contradicts what is saved."""
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for name in saved.keys() - MAY_DIFFER:
        if (given := getattr(args, name)) != saved[name]:
            raise BadInput(f"--{name.replace('_', '-')} {given}: {source} has {saved[name]}")
    if args.first_share is not None and len(args.data) == 1:
        raise BadInput(f"--first-share {args.first_share}: there is one text; --data takes more")
    long = args.steps >= 10_000 and not args.max_minutes
    args.learning_rate = args.learning_rate or (0.005 if long else 0.02)
    args.decay = (1.0 if long else 0.5) if args.decay is None else args.decay
    return args


# Texts --------------------------------------------------------------------------------------------


class Texts(NamedTuple):
    learned: torch.Tensor  # (N,) ids: the learned part of the first text, then all further texts
    first_len: int         # length of the first text's learned part
    held: torch.Tensor     # held-out slice: selects the weights to keep
    val: torch.Tensor      # validation split
    sha256: list[str]      # checksum of each text


def read_texts(paths: list[str], config: DiffusionConfig) -> Texts:
    """Reads and splits the texts. Raises BadInput for an unusable text, and for a further text that
    contains a piece of the first one's held-out slice or validation split."""
    train, val, sha256 = load_corpus(paths[0], config)
    held, train = train.tensor_split([min(HELD_OUT, len(train) // 10)])
    learned, checksums = [train], [sha256]
    for path in paths[1:]:
        *parts, sha256 = load_corpus(path, config)
        learned.append(torch.cat(parts))
        if sha256 in checksums or any(shares_pieces(split, learned[-1]) for split in (held, val)):
            raise BadInput(f"--data {path}: given twice, or it holds a part of {paths[0]} that "
                           "must not be learned, of its held-out slice or validation split")
        checksums.append(sha256)
    return Texts(torch.cat(learned), len(train), held, val, checksums)


def shares_pieces(split: torch.Tensor, text: torch.Tensor) -> bool:
    """Whether one of 50 evenly spaced pieces of the split, of 100 characters each, stands in the
    text, whatever the white space."""
    split, text = (b" ".join(bytes(ids.numpy()).split()) for ids in (split, text))
    last = max(0, len(split) - 100)
    return any(split[last * i // 49 : last * i // 49 + 100] in text for i in range(50))


# Optimizers ---------------------------------------------------------------------------------------


def orthogonalize(matrices):
    """Roughly the nearest semi-orthogonal matrices: Newton-Schulz iteration moves the singular
    values of each of N matrices (N, rows, columns) to about 1. The coefficients are from
    kellerjordan.github.io/posts/muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(1) > matrices.size(2)
    X = matrices.mT if tall else matrices
    X = X.to(torch.bfloat16 if multiplies_bf16(X.device) else torch.float32)
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = X @ X.mT                                 # X becomes a X + (b gram + c gram²) X
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Makes the update of torch.optim.Muon: momentum, orthogonalized. All matrices of a group have
    one shape and go through one batched iteration. It runs in float32 where the hardware has no
    bfloat16: torch.optim.Muon would emulate bfloat16 there, which takes a minute a step."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, lr, beta = group["params"], group["lr"], group["momentum"]
            grads = torch.stack([p.grad for p in params])           # (N, rows, columns)
            state = self.state[params[0]]                           # that of the whole group
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
        Muon([{"params": params} for params in by_shape.values()], defaults=muon),
        torch.optim.AdamW(others, ADAMW_SHARE * learning_rate, (0.9, 0.95), weight_decay=0.0,
                          fused=others[0].is_cuda),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


# A training step: draw_batch and its parts, batch_loss, update ------------------------------------


class Curriculum(NamedTuple):
    """How the sequences of a batch are drawn in the course of a run."""

    spread: float   # width in logits of the bell from which t / S is drawn (ablations.md)
    opening: float  # share of the run in which the range of t / S widens from 40% to all of it:
                    # at first many visible neighbours teach the most
    flat_share: float = 1 / 16  # share of the sequences with uniform t / S, as a narrow bell never
                                # comes near 1, where sampling begins
    first_share: float | None = None  # share of the sequences from the first text; None: by length
    first_len: int = 0                # length of the first text's learned part


FROM_SCRATCH = Curriculum(spread=1.0, opening=0.5)
AFTER_INIT = Curriculum(spread=1.7, opening=0.0)  # nearly uniform, as the bound weighs levels


def draw_levels(B: int, S: int, progress: float, generator, device, curriculum=FROM_SCRATCH):
    """Noise levels t (B,) in 1..S at `progress` (0..1) of the run."""
    # Stratified: one draw from each of B equal parts of the distribution
    stratum = torch.randperm(B, generator=generator, device=device)
    u, v = torch.rand(2, B, generator=generator, device=device)
    quantile = ((stratum + u) / B).clamp(1e-4, 1 - 1e-4)
    # A logit-normal bell, where a sequence has both something to read and something to predict
    # (arXiv 2605.13026). Its middle is 1/2, less during the opening
    normal = math.sqrt(2) * torch.erfinv(2 * quantile - 1)  # MPS has no ndtri
    bell = torch.sigmoid(curriculum.spread * normal)
    noise = torch.where(v < curriculum.flat_share, quantile, bell)
    if progress < curriculum.opening:
        noise *= 0.4 + 0.6 * progress / curriculum.opening
    return (noise * S).long() + 1


def draw_starts(length: int, T: int, B: int, generator, device, curriculum=FROM_SCRATCH):
    """Where in a text of `length` the sequences begin, (B,)."""
    draw = partial(torch.randint, size=(B,), generator=generator, device=device)
    if curriculum.first_share is None:
        return draw(0, length - T + 1)
    first_len = curriculum.first_len
    first, further = draw(0, first_len - T + 1), draw(first_len, length - T + 1)
    u = torch.rand(B, generator=generator, device=device)
    return torch.where(u < curriculum.first_share, first, further)


def draw_batch(text, config, batch_size: int, generator, progress=1.0, curriculum=FROM_SCRATCH):
    """The batch of a step over all processes: x_0, x_t and masked (B, T), time indices and loss
    weights (B,), on the device of `text` and `generator`."""
    B, T, device = batch_size, config.sequence_len, text.device
    starts = draw_starts(len(text), T, B, generator, device, curriculum)
    x_0 = text[starts[:, None] + torch.arange(T, device=device)].long()
    t = draw_levels(B, config.diffusion_steps, progress, generator, device, curriculum)
    u, v = torch.rand(2, B, generator=generator, device=device)
    prefix_len = (1 + u * config.context_len).long().clamp(max=config.context_len)
    prefix_len = prefix_len.where(v < PREFIX_SHARE, 0)
    x_t, masked = q_sample(x_0, t, config, generator, prefix_len)
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
    return masked_mean(-terms.sum(-1), masked)


def batch_loss(network, batch, teacher=None):
    """The loss of a batch as `draw_batch` gives it, or of some of its rows. A teacher judges the
    same x_t, and its probabilities are learned beside the text."""
    x_0, x_t, masked, time_index, weight = batch
    with autocast(x_t.device):
        log_p = network(x_t, time_index)                            # (B, T, V)
        if teacher is not None:
            with torch.no_grad():
                log_q = teacher(x_t, time_index)                    # (B, T, V)
    nll = masked_nll(log_p, x_0, masked)                            # (B,)
    if teacher is not None:
        soft = distilled_nll(log_p, log_q, masked)                  # (B,)
        nll = TEACHER_SHARE * soft + (1 - TEACHER_SHARE) * nll
    return (nll * weight).sum()


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


# Processes, signals, compilation ------------------------------------------------------------------


def tune_process() -> None:
    """Settings of PyTorch and of the C library that make training faster."""
    torch.set_float32_matmul_precision("high")
    if platform.libc_ver()[0] == "glibc":
        # Keep freed activations in the process. Otherwise the kernel clears their pages again for
        # the next step, which costs up to a quarter of a step on a CPU
        for option, value in (-4, 0), (-1, -1):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)


def start_processes(args: argparse.Namespace) -> tuple[int, int, torch.device]:
    """Rank, number of processes, device. Only torchrun starts several processes: RANK alone proves
    nothing, as some platforms set it for purposes of their own."""
    if not dist.is_torchelastic_launched():
        return 0, 1, pick_device(args.device)
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if args.batch_size % world:
        raise BadInput(f"--batch-size {args.batch_size} is not a multiple of the {world} processes")
    name = args.device
    if torch.cuda.is_available() and name != "cpu":
        torch.cuda.set_device(local)  # first, or every process opens a context on GPU 0
    elif name == "auto":
        name = "cpu"  # pick_device may find MPS, which can't exchange gradients
    device = pick_device(name)
    # The others wait while the leader evaluates, so the limit is generous; a process that dies
    # closes its connections and is noticed at once
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    return rank, world, device


def agree(progress: float, signum: int, device: torch.device) -> tuple[float, int]:
    """The largest progress of any process, and the signal that stops one of them, or 0."""
    if not dist.is_initialized():
        return progress, signum
    shared = torch.tensor([progress, signum], dtype=torch.float64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    progress, signum = shared.tolist()
    return progress, int(signum)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside, SIGINT, SIGTERM and SIGHUP only add their number to the list, unless they were
    ignored before (nohup). Windows has no SIGHUP."""
    received, before = [], {}
    for signum in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(signum) != signal.SIG_IGN:
            before[signum] = signal.signal(signum, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def compiled(model, batch_size: int, learns: bool = True):
    """Compiles the model and tries it on one batch, with a backward pass if it `learns` (a teacher
    doesn't). If the trial fails, prints a warning and returns the eager model. g++ 12 removes
    live stores from Inductor's CPU code, and gradients are silently wrong; -fno-dse prevents it."""
    # Inductor's form of a compiler: (None, command)
    gcc = {"cpp.cxx": (None, f"{os.environ.get('CXX', 'g++')} -fno-dse")}
    network = torch.compile(model, options=gcc if sys.platform == "linux" else None)
    device, T = next(model.parameters()).device, model.config.sequence_len
    mask_token_id = model.config.mask_token_id
    x_t = torch.full((batch_size, T), mask_token_id, device=device)
    x_0 = torch.full_like(x_t, 1 if mask_token_id == 0 else 0)  # any character but [MASK]
    masked = torch.ones_like(x_t, dtype=torch.bool)
    try:
        with autocast(device), torch.set_grad_enabled(learns):
            log_p = network(x_t, noise_index(masked, model.config.diffusion_steps))
        if learns:
            masked_nll(log_p, x_0, masked).sum().backward()
    except Exception as error:  # no compiler, a broken one, no support: torch raises many kinds
        say(f"torch.compile failed, continuing without it: {error!r:.200}".splitlines()[0])
        network = model
    model.zero_grad()
    return network


# The run and its files ----------------------------------------------------------------------------


@dataclass
class Run:
    """Everything that changes during a run. X.state.pt stores all of it."""

    model: DiffusionTransformer
    optimizers: list[torch.optim.Optimizer]
    generator: torch.Generator
    step: int = 0
    seconds: float = 0.0  # in the loop, evaluations included
    log: list[dict] = field(default_factory=list)  # a row of bounds for every evaluation
    best: dict = field(default_factory=dict)  # the weights of the lowest held-out bound
    # ("model"), and their row of the log ("row")

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "run": {"step": self.step, "seconds": self.seconds, "log": self.log},
            "best": self.best,
        }

    def restore(self, state: dict) -> None:
        """Restores what `state` returned. Raises KeyError, TypeError, ValueError or RuntimeError
        if the contents do not fit this model and these optimizers."""
        self.model.load_state_dict(state["model"])
        for optimizer, contents in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(contents)
        self.generator.set_state(state["generator"])
        self.step, self.seconds = state["run"]["step"], state["run"]["seconds"]
        self.log, self.best = state["run"]["log"], state["best"]


def state_beside(weights: Path) -> Path:
    """X.state.pt for X.pt, or beside what a link X.pt points to."""
    path = os.path.realpath(weights) if weights.is_symlink() else str(weights)
    return Path(path.removesuffix(".pt") + ".state.pt")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock on a file beside `path`. The operating system frees it when the process ends,
    even by a crash. Raises BadInput if another process has it. Windows has no such lock."""
    if not fcntl:
        yield
        return
    lock = Path(f"{path}.lock")
    with open(lock, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(f"{path}: its run is going on in another process") from error
        try:
            yield
        finally:
            lock.unlink()


@contextmanager
def claimed(weights: Path, resume: bool) -> Iterator[None]:
    """Inside, no other run can write X.pt and X.state.pt (except on Windows). Raises BadInput if
    another run is active, if X.state.pt holds a run that is not to be resumed, if X.pt is not a
    checkpoint, or if it has another kind of name."""
    if weights.suffix != ".pt" or weights.name.endswith(".state.pt"):
        raise BadInput(f"--weights {weights}: has to be a file X.pt, and not X.state.pt")
    if weights.exists():
        read_checkpoint(weights)  # refuses another file now, and not after the whole run
    state_path = state_beside(weights)
    state_path.parent.mkdir(parents=True, exist_ok=True)
    with locked(state_path):
        if state_path.exists() and not resume:
            raise BadInput(f"{state_path} holds a run: --resume continues it, or delete it")
        for unfinished in *temporaries(weights), *temporaries(state_path):
            unfinished.unlink()  # a run was killed while it wrote
        yield


def save_state(args: argparse.Namespace, about: dict, run: Run) -> None:
    """Writes the state from which --resume continues. A failed save (a full disk) does not end the
    run: the next save tries again."""
    settings = {name: x for name, x in vars(args).items() if name not in NOT_SAVED}
    for name in "data", "teachers":  # --resume may be typed in another folder
        settings[name] = [path if path == "-" else os.path.abspath(path) for path in settings[name]]
    contents = {**run.state(), "config": asdict(run.model.config), "meta": about, "args": settings}
    try:
        with replacing(state_beside(args.weights)) as file:
            torch.save(contents, file)
    except (OSError, RuntimeError) as error:  # torch.save turns one into the other
        say(f"not saved, the next save tries again: {str(error).splitlines()[0]}")


def evaluate(args: argparse.Namespace, run: Run, texts: Texts) -> None:
    """Adds bounds of the first text's learned part and of the held-out slice to the log, keeps the
    weights if they are the best so far, and shows the bounds and some text."""
    if run.log and run.log[-1]["step"] == run.step:
        return  # a resumed run: evaluated before it was killed, or before X.pt failed to be written
    # The same windows and masks at every evaluation
    train_nelbo, _ = nelbo(run.model, texts.learned[: texts.first_len], passes=4, windows=64)
    held_nelbo, _ = nelbo(run.model, texts.held, passes=4, windows=64)
    T, mask_token_id = run.model.config.sequence_len, run.model.config.mask_token_id
    row = {"step": run.step, "seconds": round(run.seconds),
           "characters_seen": run.step * args.batch_size * T,
           "train_nelbo": train_nelbo, "held_nelbo": held_nelbo}
    run.log.append(row)
    if not run.best or held_nelbo < run.best["row"]["held_nelbo"]:
        run.best = {"row": row, "model": bfloat16_state(run.model)}
    device = next(run.model.parameters()).device
    blank = torch.full((1, T), mask_token_id, device=device)
    rule, generator = partial(dilated, turns=32), torch.Generator().manual_seed(args.seed)
    *_, x = denoise(run.model, blank, rule, 1.0, generator)
    say(f"\nstep {run.step}, {run.seconds / 60:.1f} min, NELBO in nats per character: "
        f"train {train_nelbo:.4f}, held-out {held_nelbo:.4f}\n"
        f"{decode_tokens(x[0])}\n")


def show_bound(path: Path, mean: float, error: float) -> None:
    print(f"{path}: validation NELBO {mean:.4f} +- {error:.4f} nats per character "
          f"({mean / math.log(2):.4f} bits)")


def finish(args: argparse.Namespace, about: dict, run: Run, val) -> None:
    """Scores the best weights on the validation split, moves an earlier file aside, writes the
    weights, and deletes the state. Prints the earlier file's new name, the bound, and the command
    that writes with the weights."""
    run.model.load_state_dict(run.best["model"])
    mean, standard_error = nelbo(run.model, val)
    meta = {**about, **run.best["row"], "val_nelbo": mean, "val_nelbo_error": standard_error,
            "log": run.log}
    earlier = read_checkpoint(args.weights)["meta"] if args.weights.exists() else {}
    score = earlier.get("val_nelbo")
    try:
        aside = save_weights(run.model, meta, args.weights)
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{args.weights} was not written ({error}); --resume tries again") from error
    state_beside(args.weights).unlink(missing_ok=True)
    if aside:
        scored = f" ({score:.4f})" if isinstance(score, float) else ""
        print(f"{args.weights}{scored} is {os.path.relpath(aside)} now")
    show_bound(args.weights, mean, standard_error)
    print(f"write with it: {sample_command(args.weights)}")


def start_run(args: argparse.Namespace, state: dict | None, device: torch.device) -> Run:
    """A run from random weights, from those of --init, or from the state of a run."""
    torch.manual_seed(args.seed)
    if state:
        model = build_model(state, state_beside(args.weights))
    elif args.init is not None:
        model, _ = load_weights(args.init)
    else:
        sizes = {size: getattr(args, size) for size in SIZES}
        model = DiffusionTransformer(DiffusionConfig(**sizes))
    model = model.to(device)
    optimizers = make_optimizers(model, args.learning_rate, args.weight_decay)
    run = Run(model, optimizers, torch.Generator(device).manual_seed(args.seed))
    if state:
        try:
            run.restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BadInput(f"{state_beside(args.weights)}: not the state of such a run "
                           f"({str(error).splitlines()[0]})") from error
    return run


def load_teachers(paths: list[str], config: DiffusionConfig, device) -> list[DiffusionTransformer]:
    """Loads the teachers. Raises BadInput for one whose sequence length, vocabulary, [MASK] or
    number of noise levels differs from the student's."""
    teachers = [load_weights(path, device)[0] for path in paths]
    for path, teacher in zip(paths, teachers, strict=True):
        for size in ("sequence_len", "vocab_size", "mask_token_id", "diffusion_steps"):
            if (found := getattr(teacher.config, size)) != (wanted := getattr(config, size)):
                raise BadInput(f"--teachers {path}: has {size} {found}, not {wanted}")
    return teachers


def describe(args: argparse.Namespace, texts: Texts, device, world: int, command: str) -> dict:
    """The metadata that a checkpoint stores about its run."""
    return {
        "texts": texts.sha256, "corpus_sha256": texts.sha256[0], "seed": args.seed,
        "teachers": [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in args.teachers],
        "command": command, "torch": str(torch.__version__), "device": device.type,
        "hardware": f"{world} x {device.type}, {torch.get_num_threads()} threads, "
                    f"bfloat16 {multiplies_bf16(device)}",
    }


def train(args: argparse.Namespace, state: dict | None, command: str) -> int:
    """Trains to the end and returns 0, or trains until a signal and returns its number."""
    tune_process()
    rank, world, device = start_processes(args)
    leader = rank == 0
    if world > 1 and "-" in args.data:
        raise BadInput("--data -: several processes can't share one stdin; give a file")

    # Model, optimizers, texts, teachers
    run = start_run(args, state, device)
    config = run.model.config
    texts = read_texts(args.data, config)
    text = texts.learned.to(device)
    teachers = load_teachers(args.teachers, config, device)
    about = describe(args, texts, device, world, state["meta"].get("command") if state else command)
    for name in "texts", "teachers", "device":
        if state and state["meta"].get(name) != about[name]:
            raise BadInput(f"{state_beside(args.weights)}: its run has other {name} "
                           f"({state['meta'].get(name)}, not {about[name]})")

    # Compile and DDP
    if leader:
        say(f"training on {about['hardware']}")
    B, rows = args.batch_size, args.batch_size // world
    mine = slice(rank * rows, (rank + 1) * rows)  # of the batch
    network = run.model
    if not args.no_compile and device.type != "mps":
        if leader:
            say("compiling, about a minute")
        network = compiled(run.model, rows)
        teachers = [compiled(teacher, rows, learns=False) for teacher in teachers]
    if world > 1:
        network = DistributedDataParallel(network)
        network.broadcast_buffers = False  # the rotary tables never change. (As an
        # argument, torch 2.15 deprecates it)

    # The loop
    curriculum = FROM_SCRATCH if args.init is None else AFTER_INIT
    curriculum = curriculum._replace(first_share=args.first_share, first_len=texts.first_len)
    interval = args.eval_interval or (1000 if device.type == "cuda" else 250)
    bar = tqdm(total=round(60 * args.max_minutes) if args.max_minutes else args.steps,
               bar_format="{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}",
               disable=None if leader else True)  # None: silent unless stderr is a terminal
    clock = time.perf_counter()
    with stop_signals() as received, bar:
        while True:
            # Where the run is, by the clock or by the count; all processes agree on it
            now = time.perf_counter()
            run.seconds += now - clock
            clock = now
            if args.max_minutes:
                progress = run.seconds / (60 * args.max_minutes)
            else:
                progress = run.step / args.steps
            progress, signum = agree(progress, received[0] if received else 0, device)
            finished = progress >= 1
            stopped = signum and not finished

            # Evaluate and save. A stopped run only saves: the system may kill it soon
            due = finished or (run.step > 0 and run.step % interval == 0)
            if leader and due and not stopped:
                evaluate(args, run, texts)
            if leader and (due or stopped):
                save_state(args, about, run)
            if finished or stopped:
                break

            # The batch. Every process draws the whole batch and keeps its own rows. So the
            # batch does not depend on the number of processes
            teacher = teachers[run.step % len(teachers)] if teachers else None
            batch = draw_batch(text, config, B, run.generator, progress, curriculum)
            batch = [part[mine] for part in batch]

            # Forward, loss, backward, update
            loss = batch_loss(network, batch, teacher) * world  # DDP takes the processes' mean
            loss.backward()
            factor = learning_rate_factor(progress, args.decay)
            update(run.model, run.optimizers, factor)

            if not math.isfinite(loss.item()):
                raise BadInput(f"the loss at step {run.step} is {loss.item()}: stopped. A "
                               "lower --learning-rate or --weight-decay may help")
            run.step += 1
            bar.update(round(progress * bar.total) - bar.n)
            bar.set_postfix_str(f"step {run.step}, loss {loss.item():.3f}, "
                                f"lr {args.learning_rate * factor:.4f}")

    if leader and finished:
        finish(args, about, run, texts.val)
    elif leader:
        say(f"stopped after step {run.step}; continue: uv run training.py --resume --weights="
            f"{shlex.quote(str(args.weights))}")
    return 0 if finished else signum


def evaluate_only(parser: CommandLine, argv: list[str] | None) -> None:
    """Prints the validation bound of the weights. Raises BadInput for flags of training."""
    args = parser.parse_args(argv)
    others = vars(args).keys() - {"eval_only", "weights", "data", "device"}
    parser.set_defaults(**dict.fromkeys(others))  # None: no flag gives that
    given = vars(parser.parse_args(argv))
    words = "".join(f" --{name.replace('_', '-')}" for name in sorted(others)
                    if given[name] is not None)
    if words or len(args.data) > 1:
        raise BadInput(f"--eval-only takes --weights, --data with one text and --device, not "
                       f"{len(args.data)} texts{words}")
    model, _ = load_weights(args.weights, pick_device(args.device))
    _, val, _ = load_corpus(args.data[0], model.config)
    show_bound(args.weights, *nelbo(model, val))


def main(argv: list[str] | None = None) -> None:
    parser = command_line()
    args = parser.parse_args(argv)
    if args.eval_only:
        return evaluate_only(parser, argv)
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["uv", "run", "training.py", *map(str, words)])
    if args.resume and not state_beside(args.weights).exists():
        raise BadInput(f"{state_beside(args.weights)}: not there, so there is no run to continue")
    leader = not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"
    # The files are claimed before the state is read, so that no other run can go on from it
    with claimed(args.weights, args.resume) if leader else nullcontext():
        source = state_beside(args.weights) if args.resume else args.init
        state = read_checkpoint(source) if args.resume else None
        args = settle(parser, argv, saved_settings(args, state), source)
        try:
            signum = train(args, state, command)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    if signum:
        sys.exit(128 + signum)


if __name__ == "__main__":
    start(main)
