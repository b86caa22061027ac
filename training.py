"""Train the diffusion model on a text file, on one CPU, one GPU, or several.

    uv run training.py                                               # 20,000 steps of 64 x 256 characters
    uv run training.py --max-minutes 120 --batch-size 32             # what two hours can buy
    uv run torchrun --standalone --nproc_per_node=4 training.py      # the same run on four GPUs
    uv run training.py --resume                                      # go on after Ctrl-C, SIGTERM or a crash
    uv run training.py --init weights/diffusion_model.pt --data my.txt --weights weights/my.pt   # start from trained weights
    uv run training.py --eval-only                                   # measure the weights that are there

Beside the weights, X.pt, a run keeps X.state.pt, from which --resume goes on (sample.py reads it too),
and its log, X.state.csv. X.pt, and X.csv with it, is written whenever the validation NELBO is lower than
every one before, including that of the X.pt that the run found: only better weights ever replace it.
"""

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
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import (
    DEFAULT_DATA,
    DEFAULT_WEIGHTS,
    BadInput,
    DiffusionConfig,
    DiffusionTransformer,
    autocast,
    decode_tokens,
    load_corpus,
    load_weights,
    masked_nll,
    multiplies_bf16,
    nelbo,
    noise_index,
    q_sample,
    read_checkpoint,
    save_atomically,
    save_weights,
)
from sample import CommandLine, decode, number, pick_device, run, top_k

MAY_CHANGE_ON_RESUME = {"compile", "eval_interval", "micro_batch_size"}


def parse_arguments(words=None):
    parser = CommandLine(__doc__)
    count = number(int, least=1)
    group = parser.add_argument_group("files")
    group.add_argument("--data", type=Path, default=DEFAULT_DATA, help="text to learn; its last 10%% is for validation")
    group.add_argument("--weights", type=Path, default=DEFAULT_WEIGHTS, help="file to write (or to measure)")
    group.add_argument("--init", type=Path, metavar="WEIGHTS", help="start from these weights instead of random ones, "
                       "with fresh optimizers; the log goes on from theirs")
    group = parser.add_argument_group("network and diffusion")
    group.add_argument("--sequence-len", type=count, default=256, help="characters per sequence")
    group.add_argument("--vocab-size", type=count, default=128, help="byte values: 128 is ASCII, 256 any UTF-8 text")
    group.add_argument("--n-layer", type=count, default=6, help="transformer blocks")
    group.add_argument("--n-head", type=count, default=6, help="attention heads")
    group.add_argument("--n-embd", type=count, default=384, help="channels")
    group.add_argument("--diffusion-steps", type=count, default=128, help="noise levels")
    group.add_argument("--context-len", type=number(int, least=0), default=16, help="longest clean prefix of a sequence")
    group = parser.add_argument_group("optimization")
    group.add_argument("--steps", type=count, default=20000, help="optimizer steps")
    group.add_argument("--max-minutes", type=number(float, above=0), help="let the learning rate follow the clock, "
                       "compilation and evaluation counted, and stop after so many minutes instead of --steps")
    group.add_argument("--batch-size", type=count, default=64, help="sequences per step, over all processes")
    group.add_argument("--micro-batch-size", type=count, help="sequences per forward pass of a process, where a whole "
                       "batch needs too much memory (default: all of the process's share)")
    group.add_argument("--learning-rate", type=number(float, above=0), default=3e-3, help="AdamW: embeddings and head")
    group.add_argument("--muon-learning-rate", type=number(float, above=0), default=0.02, help="Muon: block matrices")
    group.add_argument("--weight-decay", type=number(float, least=0), default=0.0, help="of the block matrices, "
                       "per step and unit of learning rate")
    group.add_argument("--warmup", type=number(float, least=0, most=1), default=0.01, help="share of the run in which "
                       "the learning rate rises")
    group.add_argument("--decay", type=number(float, least=0, most=1), default=0.5, help="share of the run in which "
                       "the learning rate falls to zero")
    group.add_argument("--grad-clip", type=number(float, above=0), default=1.0, help="largest gradient norm")
    group.add_argument("--prefix-rate", type=number(float, least=0, most=1), default=0.25, help="share of the sequences "
                       "with a clean prefix of 1 to --context-len characters")
    group.add_argument("--noise-spread", type=number(float, above=0), default=1.0, help="width of the bell from which "
                       "t is drawn, in logits; at 1.7 it is nearly flat")
    group.add_argument("--opening", type=number(float, least=0, most=1), default=0.5, help="share of the run in which "
                       "the range of t widens from 40%% to all of it")
    group.add_argument("--seed", type=number(int, least=0), default=1337, help="of the weights, crops and masks")
    group = parser.add_argument_group("running")
    group.add_argument("--eval-interval", type=count, default=250, help="steps between evaluations and saves")
    group.add_argument("--device", default="auto", help="auto (CUDA, then MPS, then CPU), cpu, cuda or mps")
    group.add_argument("--compile", action="store_true", default=None, help="use torch.compile (default: except on MPS)")
    group.add_argument("--no-compile", action="store_false", dest="compile", default=None, help="run eagerly: no wait at the start")
    group.add_argument("--resume", action="store_true", help="go on from X.state.pt, with the settings of that run")
    group.add_argument("--eval-only", action="store_true", help="print the validation NELBO of --weights and stop")
    args = parser.parse_args(words)
    args.context_len = min(args.context_len, args.sequence_len - 1)
    defaults = {action.dest: action.default for action in parser._actions}
    args.given = {name for name, value in vars(args).items() if value != defaults.get(name)}
    return args


# ----------------------------------------------------------------------------------------------------
# Muon


def orthogonalize(matrices, dtype, steps=5):
    """The nearest semi-orthogonal matrices, roughly: singular values of (N, rows, cols) moved to about 1
    by Newton-Schulz iteration. Quintic coefficients: kellerjordan.github.io/posts/muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(1) > matrices.size(2)
    X = (matrices.mT if tall else matrices).to(dtype)
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized. The same update as torch.optim.Muon (which the tests compare it with),
    but all matrices of a shape go through one batched iteration, and in float32 where the hardware does
    not multiply bfloat16: there torch's version, bfloat16 only, takes a minute a step."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for (rows, cols), params in by_shape.items():
                for p in params:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                nesterov = torch.stack([p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in params])
                dtype = torch.bfloat16 if multiplies_bf16(nesterov.device) else torch.float32
                updates = orthogonalize(nesterov, dtype).to(nesterov.dtype)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates.unbind()), alpha=-group["lr"] * max(1, rows / cols) ** 0.5)


def make_optimizers(model, args):
    """nanochat's split: Muon for the matrices of the blocks, AdamW for the embeddings and the output head."""
    matrices = list(model.blocks.parameters())
    others = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    return [
        Muon(matrices, lr=args.muon_learning_rate, weight_decay=args.weight_decay),
        torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=others[0].is_cuda),
    ]


# ----------------------------------------------------------------------------------------------------
# Data, gradients and measures


def draw_batch(train, config, args, generator, progress=1.0):
    """The global batch of a step: x_0, x_t, masked (B, T), noise indices and loss weights (B,), on the
    device.

    Every process draws all of it from the same seed and keeps its own rows, so that the batch does not
    depend on their number. t / S follows a logit-normal bell around 1/2, where a sequence has both
    something to read and something to predict (arXiv 2605.13026), and is stratified over the batch: one
    draw from each of B equally likely parts. It opens from 40% of its range to all of it over the first
    `args.opening` of the run: characters with many visible neighbours teach the most at first.

    The loss is a weighted mean of the sequences' `masked_nll`. Equal weights would be the bound itself
    (RADD, arXiv 2406.03736), whose gradient is noisy: a sequence with one masked character counts as
    much as one with 256. Weights proportional to the square root of the masked count trade a little of
    the objective for much less noise, and end at a lower bound after the same number of characters."""
    B, T, device = args.batch_size, config.sequence_len, train.device
    rand = lambda: torch.rand(B, generator=generator, device=device)
    starts = torch.randint(len(train) - T + 1, (B,), generator=generator, device=device)
    x_0 = train[starts[:, None] + torch.arange(T, device=device)]
    strata = torch.randperm(B, generator=generator, device=device)
    quantile = ((strata + rand()) / B).clamp(1e-4, 1 - 1e-4)
    opened = min(1.0, 0.4 + 0.6 * progress / args.opening) if args.opening else 1.0
    noise = torch.sigmoid(args.noise_spread * torch.special.ndtri(quantile)) * opened
    t = (noise * config.diffusion_steps).long() + 1
    prefix_len = (1 + rand() * config.context_len).long().clamp(max=config.context_len)
    prefix_len = prefix_len * (rand() < args.prefix_rate)
    x_t, masked = q_sample(x_0, t, config, generator, prefix_len)
    weight = masked.sum(1).float().sqrt()
    return x_0, x_t, masked, noise_index(masked, config.diffusion_steps), weight / weight.sum().clamp(min=1.0)


def backward(network, batch, micro, mask_token_id, rank=0, world=1):
    """Adds to the gradients those of this process's rows of the batch, `micro` sequences at a time, and
    returns their part of the loss. Processes exchange gradients in the last micro-batch only."""
    rows = len(batch[0]) // world
    share = [part[rank * rows : (rank + 1) * rows].split(micro) for part in batch]
    total = 0.0
    for i, (x_0, x_t, masked, index, weight) in enumerate(zip(*share)):
        last = (i + 1) * micro == rows
        with nullcontext() if last or world == 1 else network.no_sync():
            with autocast(x_t.device):
                logits = network(x_t, index)
            # Times world: DDP takes the mean over processes where the weights ask for the sum
            loss = (masked_nll(logits, x_0, masked, mask_token_id) * weight).sum() * world
            loss.backward()
        total = total + loss.detach()
    return total


def update(model, optimizers, grad_clip):
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def quick_nelbo(model, tokens):
    """The same crops and masks at every call, so that values compare closely from step to step."""
    return nelbo(model, tokens, passes=4, windows=64, seed=0)


def learning_rate_factor(progress, args):
    """Trapezoid over progress 0..1: a linear rise, a plateau, a linear fall to zero."""
    rise = progress / args.warmup if args.warmup else 1.0
    fall = (1 - progress) / args.decay if args.decay else 1.0
    return max(0.0, min(1.0, rise, fall))


def hardware(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{device.type}, {name}, {torch.get_num_threads()} threads"


def keep_freed_memory():
    """Stops glibc from handing blocks of activations back to the kernel, which clears every page anew when
    the next step asks for it: up to a quarter of a step on a CPU. Elsewhere than on glibc, does nothing."""
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def check_writable(path, n_bytes):
    """Raises before the work starts what would otherwise fail at the first save."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(path.name + ".probe.tmp")
        probe.touch()
        probe.unlink()
        with open(path, "ab") if path.exists() else nullcontext():
            pass
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror})")
    if shutil.disk_usage(path.parent).free < n_bytes:
        raise BadInput(f"{path.parent}: a run needs {n_bytes >> 20} MiB free, there are "
                       f"{shutil.disk_usage(path.parent).free >> 20}")


def compiled(model, batch, device):
    """torch.compile, tried on one batch; a warning and the eager model where that fails."""
    try:
        fast = torch.compile(model)
        with autocast(device):
            fast(*batch).sum().backward()
        model.zero_grad()
        return fast
    except Exception as error:  # no compiler, a broken one, an unsupported platform: torch raises many kinds
        warnings.warn(f"torch.compile failed, going on without it ({type(error).__name__})")
        return model


# ----------------------------------------------------------------------------------------------------


def evaluate_only(args):
    device = pick_device(args.device)
    model, meta = load_weights(args.weights, device)
    _, val, corpus_sha256 = load_corpus(args.data, model.config)
    if meta.get("corpus_sha256", corpus_sha256) != corpus_sha256:
        print("note: the weights come from another text than --data", file=sys.stderr)
    mean, error = nelbo(model, val)
    print(f"validation NELBO {mean:.4f} +- {error:.4f} nats per character ({mean / math.log(2):.4f} bits), "
          f"{len(val)} characters, {hardware(device)}")


def train(args):
    state_path, log_path = args.weights.with_suffix(".state.pt"), args.weights.with_suffix(".state.csv")
    state = read_checkpoint(state_path) if args.resume else None
    if state:
        if "optimizers" not in state:
            raise BadInput(f"{state_path}: holds weights alone, so there is no run to resume")
        for name, value in state["args"].items():
            if name not in args.given:
                setattr(args, name, value)
            elif name not in MAY_CHANGE_ON_RESUME and getattr(args, name) != value:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: the run to resume has {value}")

    # Processes: torchrun starts several and says so in the environment
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    leader = rank == 0
    device = pick_device(args.device)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    rows_here = args.batch_size // world
    micro = args.micro_batch_size or rows_here
    if args.batch_size % world:
        raise BadInput(f"--batch-size {args.batch_size} is not a multiple of the {world} processes")
    if rows_here % micro:
        raise BadInput(f"--micro-batch-size {micro} does not divide the {rows_here} sequences of a process")

    config = DiffusionConfig(**{name: getattr(args, name) for name in (
        "sequence_len", "vocab_size", "n_layer", "n_head", "n_embd", "diffusion_steps", "context_len")})
    train, val, corpus_sha256 = load_corpus(args.data, config)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    model, earlier = DiffusionTransformer(config).to(device), {}  # earlier: the meta of the weights to start from
    if state:
        earlier = state["meta"].get("started_from", {})
    elif args.init:
        model, earlier = load_weights(args.init, device)
        if model.config != config:
            raise BadInput(f"--init {args.init}: holds {model.config}, the flags ask for {config}")
    characters_seen = lambda: earlier.get("characters_seen", 0) + step * args.batch_size * config.sequence_len
    optimizers = make_optimizers(model, args)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    generator = torch.Generator(device).manual_seed(args.seed)
    train_on_device = train.to(device)

    # Where the run stands; best is the validation NELBO that the weights file has to beat
    step, seconds_before, best, wrote = 0, 0.0, math.inf, False
    if leader:
        check_writable(args.weights, 20 * sum(p.numel() for p in model.parameters()))
    if state:
        if state["meta"]["corpus_sha256"] != corpus_sha256:
            raise BadInput(f"--data {args.data}: the run to resume learned another text")
        if state["device"] != device.type:
            raise BadInput(f"--device {device.type}: the run to resume draws its batches on {state['device']}")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        generator.set_state(state["generator"])
        step, seconds_before, best, wrote = (state[name] for name in ("step", "seconds", "best", "wrote"))
    elif args.weights.exists() and leader:
        incumbent, _ = load_weights(args.weights, device)
        if incumbent.config.vocab_size == config.vocab_size:
            best = quick_nelbo(incumbent, val)[0]
            print(f"{args.weights} has a validation NELBO of {best:.3f}: only lower ones will replace it", file=sys.stderr)

    stop_signal = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda received, frame: stop_signal.append(received))
    started = time.monotonic()
    seconds = lambda: seconds_before + time.monotonic() - started

    network = model
    if args.compile is not False and device.type != "mps":
        example = torch.zeros(micro, config.sequence_len, dtype=torch.long, device=device)
        network = compiled(model, (example, example[:, 0]), device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=5))
        network = DistributedDataParallel(network)
        network.broadcast_buffers = False  # the rotary tables never change

    rows_log, log_so_far = [], log_path if state or not args.init else args.init.with_suffix(".csv")
    if leader and (state or args.init) and log_so_far.exists():
        with open(log_so_far, newline="") as file:
            rows_log = [row for row in csv.DictReader(file) if int(row["characters_seen"]) <= characters_seen()]

    def checkpoint():
        """Evaluates, logs, saves: the resumable state always, the weights if they are the best so far."""
        nonlocal best, wrote
        val_nelbo, val_error = quick_nelbo(model, val)
        train_nelbo, _ = quick_nelbo(model, train)
        meta = {
            "step": step, "characters_seen": characters_seen(), "seconds": earlier.get("seconds", 0) + round(seconds()),
            "val_nelbo": val_nelbo, "val_nelbo_error": val_error, "train_nelbo": train_nelbo,
            "corpus_sha256": corpus_sha256, "seed": args.seed, "hardware": f"{world} x {hardware(device)}",
            "command": shlex.join(["uv", "run", "training.py", *sys.argv[1:]]), "torch": str(torch.__version__),
            **({"started_from": earlier} if earlier else {}),
        }
        rows_log.append({name: meta[name] for name in ("step", "characters_seen", "seconds", "train_nelbo", "val_nelbo", "val_nelbo_error")})
        if val_nelbo < best:
            best, wrote = val_nelbo, True
            save_weights(model, meta, args.weights)
        save_atomically({
            "model": model.state_dict(), "config": vars(config), "meta": meta,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers], "generator": generator.get_state(), "device": device.type,
            "args": {name: value for name, value in vars(args).items() if isinstance(value, (int, float, type(None)))
                     and name not in ("resume", "eval_only")},
            "step": step, "seconds": seconds(), "best": best, "wrote": wrote,
        }, state_path)
        for path in [log_path, args.weights.with_suffix(".csv")] if wrote else [log_path]:
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, rows_log[-1])
                writer.writeheader()
                writer.writerows(rows_log)
        blank = torch.full((1, config.sequence_len), config.mask_token_id, device=device)
        *_, written = decode(model, blank, lambda p: top_k(p, 2), temperature=0.8, seed=args.seed)
        tqdm.write(f"\nstep {step}, {seconds() / 60:.1f} min: NELBO train {train_nelbo:.4f}, "
                   f"validation {val_nelbo:.4f} +- {val_error:.4f} nats per character\n{decode_tokens(written[0])}\n", file=sys.stderr)

    # ------------------------------------------------------------------------------------------------
    # The loop

    progress_bar = tqdm(total=None if args.max_minutes else args.steps, initial=step, disable=not leader, unit="step")
    evaluated_at = step
    losses, progress, stopping = [], None, False
    pace = (time.monotonic(), step)
    while True:
        # Where the run stands: by the clock or by the count, the same on every process
        if world == 1 or step % 10 == 0 or progress is None:
            progress = seconds() / (60 * args.max_minutes) if args.max_minutes else step / args.steps
            stopping = bool(stop_signal)
            if world > 1:
                shared = torch.tensor([progress, float(stopping)], device=device)
                dist.all_reduce(shared, op=dist.ReduceOp.MAX)
                progress, stopping = shared[0].item(), bool(shared[1].item())
        elif not args.max_minutes:
            progress = step / args.steps
        factor = learning_rate_factor(progress, args)
        for optimizer, peak in zip(optimizers, peaks):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor

        # Every so often, look at the losses: that is where the host waits for the device
        finished = progress >= 1
        evaluate = step % args.eval_interval == 0 or finished or stopping
        if losses and (device.type == "cpu" or evaluate or len(losses) == 20):
            values = torch.stack(losses).tolist()
            for back, value in enumerate(values):
                if not math.isfinite(value):
                    progress_bar.close()
                    raise BadInput(f"the loss at step {step - len(values) + back} is {value}: stopped; {state_path} holds "
                                   f"step {evaluated_at}. A lower --muon-learning-rate or --learning-rate may help")
            losses.clear()
            rate = (step - pace[1]) * args.batch_size * config.sequence_len / (time.monotonic() - pace[0])
            left = max(0.0, seconds() * (1 - progress) / progress / 60) if progress else math.nan
            progress_bar.set_postfix_str(f"loss {values[-1]:.3f}, lr {peaks[0] * factor:.4f}, {rate:,.0f} chars/s, {left:.1f} min left")
        if evaluate and step > evaluated_at:
            if leader:
                checkpoint()
            evaluated_at = step
            if world > 1:
                dist.barrier()
            pace = (time.monotonic(), step)
        if finished or stopping:
            break

        batch = draw_batch(train_on_device, config, args, generator, progress)
        losses.append(backward(network, batch, micro, config.mask_token_id, rank, world))
        update(model, optimizers, args.grad_clip)
        step += 1
        progress_bar.update()

    progress_bar.close()
    if leader and stopping and not finished:
        again = [word for word in sys.argv[1:] if word != "--resume"] + ["--resume"]
        print(f"stopped after step {step}; go on with: {shlex.join(['uv', 'run', 'training.py', *again])}", file=sys.stderr)
    elif leader and wrote:
        best_model, meta = load_weights(args.weights, device)
        meta["val_nelbo"], meta["val_nelbo_error"] = nelbo(best_model, val)
        save_weights(best_model, meta, args.weights)
        print(f"{args.weights}: validation NELBO {meta['val_nelbo']:.4f} +- {meta['val_nelbo_error']:.4f} nats per character")
    elif leader:
        print(f"{args.weights} was better and stays; this run's model: uv run sample.py --weights {state_path}", file=sys.stderr)
    if world > 1:
        dist.destroy_process_group()


def main():
    args = parse_arguments()
    if args.eval_only:
        return evaluate_only(args)
    try:
        train(args)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("closed by peer", "reset by peer", "imed out", "NCCL")):
            raise
        raise BadInput("another process of this run died or hangs; go on from the last save with --resume")


if __name__ == "__main__":
    run(main)
