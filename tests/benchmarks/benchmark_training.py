"""How fast is training? The step of training.py beside a naive step and products of matrices.

    uv run tests/benchmarks/benchmark_training.py                   # steps of 64 x 256 characters
    uv run tests/benchmarks/benchmark_training.py --batch-size 32
    uv run torchrun --standalone --nproc_per_node=2 tests/benchmarks/benchmark_training.py

The measurements take turns, so that a slow spell of the machine hits all of them. A step counts as

    6 operations for each weight of a matrix + 12 * n_layer * n_embd * sequence_len for attention

per character, forward and backward (71 million at the default size). The optimizer's own
products count in the time of a step but not in its operations. Utilisation is the operations per
second of our step over those of products of square matrices.

Under torchrun, the command compares one process with several that share the batch.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads must not spin on busy cores

import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from model import (
    COUNT, DEFAULT_DATA, CommandLine, DiffusionConfig, DiffusionTransformer, load_corpus,
    multiplies_bf16, start,
)
from training import (
    batch_loss, compiled, draw_batch, make_optimizers, start_processes, tune_process, update,
)

CONFIG = DiffusionConfig()
SIDE = 2048  # rows and columns of the square matrices
RUN_SEED = 1337


def flops_per_character(config: DiffusionConfig) -> int:
    """Operations, forward and backward. PaLM, arXiv 2204.02311, appendix B."""
    in_matrices = 12 * config.n_layer * config.n_embd**2 + config.n_embd * config.vocab_size
    return 6 * in_matrices + 12 * config.n_layer * config.n_embd * config.sequence_len


def seconds_of(work, device, times=1):
    """Mean wall time of work(), between two moments at which the device is idle."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - started) / times


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def products(device, dtype):
    a = torch.randn(SIDE, SIDE, device=device, dtype=dtype)
    return partial(torch.matmul, a, a)


def naive_step(tokens, batch_size, device):
    """A naive baseline: float32, eager, AdamW for everything, unweighted cross-entropy."""
    model = DiffusionTransformer(CONFIG).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    T, S = CONFIG.sequence_len, CONFIG.diffusion_steps

    def step():
        starts = torch.randint(len(tokens) - T, (batch_size,))
        x_0 = torch.stack([tokens[s : s + T] for s in starts]).long()
        t = torch.randint(1, S + 1, (batch_size,), device=device)
        masked = torch.rand(batch_size, T, device=device) < t[:, None] / S
        log_p = model(x_0.masked_fill(masked, CONFIG.mask_token_id), t - 1)
        F.nll_loss(log_p[masked], x_0[masked]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(tokens, args, device, rank=0, world=1):
    """A step of training.py; with several processes, this one's share of it."""
    torch.manual_seed(RUN_SEED)
    generator = torch.Generator(device).manual_seed(RUN_SEED)
    rows = args.batch_size // world
    mine = slice(rank * rows, (rank + 1) * rows)
    model = DiffusionTransformer(CONFIG).to(device)
    optimizers = make_optimizers(model, learning_rate=0.02)
    network = model if args.no_compile or device.type == "mps" else compiled(model, rows)
    if world > 1:
        network = DistributedDataParallel(network)
        network.broadcast_buffers = False

    def step():
        batch = draw_batch(tokens, CONFIG, args.batch_size, generator)
        loss = batch_loss(network, [part[mine] for part in batch])
        (loss * world).backward()
        update(model, optimizers, factor=1.0)

    return step


def ratio(seconds, a, b):
    """Seconds of a over seconds of b, the median over the rounds."""
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


def one_process(args, tokens, device):
    work = {
        "products, float32": products(device, torch.float32),
        "naive step": naive_step(tokens, args.batch_size, device),
        "our step": our_step(tokens, args, device),
    }
    if multiplies_bf16(device):
        work["products, bfloat16"] = products(device, torch.bfloat16)
    times = {name: 1 if "step" in name and device.type == "cpu" else 20 for name in work}
    for step in work.values():
        seconds_of(step, device, times=2)  # compilation, caches
    seconds = {name: [] for name in work}
    for _ in range(args.repeats):
        for name, step in work.items():
            seconds[name].append(seconds_of(step, device, times[name]))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    characters = args.batch_size * CONFIG.sequence_len
    flops = characters * flops_per_character(CONFIG)
    fastest = "products, bfloat16" if multiplies_bf16(device) else "products, float32"
    for name in work:
        if "products" in name:
            print(f"{name:20} {2 * SIDE**3 / median[name] / 1e9:10,.0f} GFLOP/s")
    for name in ("naive step", "our step"):
        print(f"{name:20} {1000 * median[name]:10,.1f} ms {characters / median[name]:12,.0f} "
              f"characters/s {flops / median[name] / 1e9:10,.0f} GFLOP/s")
    utilisation = ratio(seconds, fastest, "our step") * flops / (2 * SIDE**3)
    print(f"our step: {100 * utilisation:.0f}% of the speed of {fastest}, "
          f"{ratio(seconds, 'naive step', 'our step'):.2f} times as fast as the naive step")


def several_processes(args, tokens, device, rank, world):
    alone = our_step(tokens, args, device) if rank == 0 else None
    together = our_step(tokens, args, device, rank, world)
    if rank == 0:
        alone()
    together()
    ratios = []
    for _ in range(args.repeats):
        by_one = seconds_of(alone, device, 3) if rank == 0 else 0.0
        dist.barrier()
        ratios.append(by_one / seconds_of(together, device, 3))
        dist.barrier()
    if rank == 0:
        median = statistics.median(ratios)
        print(f"{world} processes: {median:.2f} times as fast as one, "
              f"{100 * median / world:.0f}% efficiency")
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--batch-size", type=COUNT, default=64, help="sequences per step, over all processes")
    add("--repeats", type=COUNT, default=5, help="rounds; in each, everything is measured in turn")
    add("--device", default="auto", help="auto (CUDA, then MPS, then CPU), cpu, cuda or mps")
    add("--no-compile", action="store_true", help="run our step without torch.compile")
    args = parser.parse_args(argv)
    tune_process()
    rank, world, device = start_processes(args)
    tokens = load_corpus(DEFAULT_DATA, CONFIG)[0].to(device)
    if rank == 0:
        print(f"{world} x {device.type}, {torch.get_num_threads()} threads, {args.batch_size} x "
              f"{CONFIG.sequence_len} characters a step, seed {RUN_SEED}")
    if world > 1:
        several_processes(args, tokens, device, rank, world)
    else:
        one_process(args, tokens, device)


if __name__ == "__main__":
    start(main)
