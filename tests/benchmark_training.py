"""How fast is training? The step of training.py beside a plain one and the machine's matrix products.

    uv run tests/benchmark_training.py                   # steps of 64 x 256 characters, like the default run
    uv run tests/benchmark_training.py --batch-size 32   # like the README's laptop run
    uv run torchrun --standalone --nproc_per_node=2 tests/benchmark_training.py   # how well processes share a step

The measurements take turns, so that a slow spell of the machine hits all of them. A step counts as

    6 operations for each weight of a matrix + 12 * n_layer * n_embd * sequence_len for attention

per character, forward and backward (71 million at the default size); the optimizer's own products count
as time but not as work. Utilisation is that, per second, over what products of square matrices reach.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import DEFAULT_DATA, DiffusionConfig, DiffusionTransformer, load_corpus, multiplies_bf16  # noqa: E402
from sample import CommandLine, number, pick_device, run  # noqa: E402
from training import backward, draw_batch, hardware, keep_freed_memory, make_optimizers, parse_arguments, update  # noqa: E402

CONFIG = DiffusionConfig()
SIDE = 2048  # of the square matrices


def flops_per_character(config: DiffusionConfig) -> int:
    """Forward and backward; PaLM, arXiv 2204.02311, appendix B."""
    in_matrices = 12 * config.n_layer * config.n_embd**2 + config.n_embd * config.vocab_size
    return 6 * in_matrices + 12 * config.n_layer * config.n_embd * config.sequence_len


def seconds_of(work, device, times=1):
    """Wall time of one call, from when the device is idle until it is idle again."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - started) / times


def products(device, dtype):
    a = torch.randn(SIDE, SIDE, device=device, dtype=dtype)
    return lambda: a @ a


def plain_step(tokens, batch_size, device):
    """What one writes first: float32, eager, AdamW for everything, flat cross-entropy."""
    model = DiffusionTransformer(CONFIG).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    T, S = CONFIG.sequence_len, CONFIG.diffusion_steps

    def step():
        starts = torch.randint(len(tokens) - T, (batch_size,))
        x_0 = torch.stack([tokens[s : s + T] for s in starts])
        t = torch.randint(1, S + 1, (batch_size,), device=device)
        masked = torch.rand(batch_size, T, device=device) < t[:, None] / S
        logits = model(x_0.masked_fill(masked, CONFIG.mask_token_id), t - 1)
        F.cross_entropy(logits[masked], x_0[masked]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(tokens, args, device, rank=0, world=1):
    """The body of training.py's loop; with several processes, this one's share of it."""
    torch.manual_seed(args.seed)
    model = DiffusionTransformer(CONFIG).to(device)
    optimizers = make_optimizers(model, args)
    network = torch.compile(model) if args.compile is not False else model
    if world > 1:
        network = DistributedDataParallel(network)
        network.broadcast_buffers = False
    generator = torch.Generator(device).manual_seed(args.seed)

    def step():
        batch = draw_batch(tokens, CONFIG, args, generator)
        backward(network, batch, args.batch_size // world, CONFIG.mask_token_id, rank, world)
        update(model, optimizers, args.grad_clip)

    return step


def one_process(options, args, tokens, device):
    work = {"products, float32": products(device, torch.float32), "plain step": plain_step(tokens, args.batch_size, device),
            "our step": our_step(tokens, args, device)}
    if multiplies_bf16(device):
        work["products, bfloat16"] = products(device, torch.bfloat16)
    times = {name: 20 if "products" in name else 1 if device.type == "cpu" else 20 for name in work}
    for step in work.values():  # compilation, caches
        step(), step()
    seconds = {name: [] for name in work}
    for _ in range(options.repeats):
        for name, step in work.items():
            seconds[name].append(seconds_of(step, device, times[name]))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(seconds[a], seconds[b]))
    characters = args.batch_size * CONFIG.sequence_len
    flops = characters * flops_per_character(CONFIG)
    fastest = "products, bfloat16" if multiplies_bf16(device) else "products, float32"
    for name in work:
        if "products" in name:
            print(f"{name:20} {2 * SIDE**3 / median[name] / 1e9:10,.0f} GFLOP/s")
    for name in ("plain step", "our step"):
        print(f"{name:20} {1000 * median[name]:10,.1f} ms {characters / median[name]:12,.0f} characters/s "
              f"{flops / median[name] / 1e9:10,.0f} GFLOP/s")
    print(f"our step: {100 * ratio(fastest, 'our step') * flops / (2 * SIDE**3):.0f}% of the rate of {fastest}, "
          f"{ratio('plain step', 'our step'):.2f} times as fast as the plain step")


def several_processes(options, args, tokens, device, rank, world):
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    alone, together = our_step(tokens, args, device), our_step(tokens, args, device, rank, world)
    if rank == 0:
        alone()
    together()
    ratios = []
    for _ in range(options.repeats):
        by_one = seconds_of(alone, device, 3) if rank == 0 else 0.0
        dist.barrier()
        ratios.append(by_one / seconds_of(together, device, 3))
        dist.barrier()
    if rank == 0:
        ratio = statistics.median(ratios)
        print(f"{world} processes: {ratio:.2f} times as fast as one, {100 * ratio / world:.0f}% efficiency")
    dist.destroy_process_group()


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("--batch-size", type=number(int, least=1), default=64, help="sequences per step, over all processes")
    parser.add_argument("--repeats", type=number(int, least=1), default=5, help="measurements of each")
    parser.add_argument("--device", default="auto", help="auto (CUDA, then MPS, then CPU), cpu, cuda or mps")
    parser.add_argument("--no-compile", action="store_true", help="our step without torch.compile")
    options = parser.parse_args()
    args = parse_arguments(["--batch-size", str(options.batch_size), *["--no-compile"] * options.no_compile])
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(options.device)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    tokens = load_corpus(DEFAULT_DATA, CONFIG)[0].to(device)
    if rank == 0:
        print(f"{world} x {hardware(device)}, {args.batch_size} x {CONFIG.sequence_len} characters a step, seed {args.seed}")
    if world > 1:
        several_processes(options, args, tokens, device, rank, world)
    else:
        one_process(options, args, tokens, device)


if __name__ == "__main__":
    run(main)
