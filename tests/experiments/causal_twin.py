"""The GPT twin: the model's trunk made causal, trained to predict the next character.

    uv run tests/experiments/causal_twin.py                  # one twin, weights/causal_twin.pt
    uv run tests/experiments/causal_twin.py --seeds 0 1 2 --weights "weights/twin_{seed}.pt"
    uv run tests/experiments/causal_twin.py --twins weights/twin_?.pt \
        --write 3000000 --out weights/fresh.txt
    uv run tests/experiments/causal_twin.py --teachers weights/twin_?.pt --first-share 0.33 \
        --data data/tiny_shakespeare.txt weights/fresh.txt --characters 60000000

The benchmarks compare the diffusion model with this GPT. It has the same size and learns by the
same optimizers. As in training.py, the first 40,000 characters of the train split are not learned,
and choose which weights are kept; the validation split is not read. Twins write fresh text for
training.py, as an ensemble, at the temperature that makes the held-out characters likeliest. The
third command trains a GPT student: it learns the fresh text too, and the ensemble's probabilities.

Once a minute a run saves X.state.pt beside its weights X.pt. The same command continues from there.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads must not spin on busy cores

import argparse
import math
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import trange

from model import (
    COUNT, DEFAULT_DATA, ROOT, SEED, BadInput, CommandLine, DiffusionConfig, DiffusionTransformer,
    autocast, bfloat16_state, decode_tokens, load_weights, number, pick_device, read_checkpoint,
    replacing, save_weights, say, start,
)
from sample import draw, load_for_sampling
from training import (
    FROM_SCRATCH, SIZES, TEACHER_SHARE, Curriculum, Run, claimed, compiled, distilled_nll,
    draw_starts, learning_rate_factor, make_optimizers, read_texts, state_beside, tune_process,
    update,
)

TWIN_WEIGHTS = ROOT / "weights" / "causal_twin.pt"
EVAL_INTERVAL = 50  # steps between evaluations on the held-out characters
SAVE_SECONDS = 60   # between saves of the state
REACH = {"cuda": 64}  # kept keys that attention reads are a multiple of this: four shapes for 256

# Every query attends only to the keys up to its own position
causal = partial(F.scaled_dot_product_attention, is_causal=True)


def make_causal(model: DiffusionTransformer) -> DiffusionTransformer:
    for block in model.blocks:
        block.attn.attend = causal
    return model


def average(log_p: list[torch.Tensor]) -> torch.Tensor:
    """log p of an ensemble: the logarithm of the mean of its members' probabilities."""
    return torch.stack(log_p).logsumexp(0) - math.log(len(log_p))


def next_log_p(network, x_0):
    """log p(x_i | x_<i) at every position, (B, T, V); the first character is given nothing. The
    input is shifted by one, and begins with [MASK]. The time index has no meaning here; it is 0."""
    begin = torch.full_like(x_0[:, :1], network.config.mask_token_id)
    with autocast(x_0.device):
        return network(torch.cat((begin, x_0[:, :-1]), 1), torch.zeros_like(x_0[:, 0]))


def nll_of(log_p, x_0):
    """-log p(x_i | x_<i) in nats, (B, T)."""
    return -log_p.gather(-1, x_0[..., None]).squeeze(-1)


@torch.no_grad()
def judged(twins: list[DiffusionTransformer], ids) -> tuple[torch.Tensor, torch.Tensor]:
    """The non-overlapping windows (N, T) of a text, and log p (N, T, V) of the twins' ensemble for
    each of them without context."""
    T = twins[0].config.sequence_len
    x_0 = ids[: len(ids) // T * T].view(-1, T).long().to(next(twins[0].parameters()).device)
    log_p = [average([next_log_p(twin, x) for twin in twins]) for x in x_0.split(64)]
    return x_0, torch.cat(log_p)


def nats(twins: list[DiffusionTransformer], ids) -> float:
    """Exact nats per character of a text, for comparison with the bound."""
    x_0, log_p = judged(twins, ids)
    return nll_of(log_p, x_0).mean().item()


# Writing ------------------------------------------------------------------------------------------


def fit_temperature(twins: list[DiffusionTransformer], ids) -> dict[float, float]:
    """Nats per character of a text at temperatures from 1 to 1.4, as `draw` applies them."""
    x_0, log_p = judged(twins, ids)
    temperatures = [percent / 100 for percent in range(100, 141)]
    return {t: nll_of((log_p / t).log_softmax(-1), x_0).mean().item() for t in temperatures}


@dataclass
class Place:
    """Where the newest characters stand, which all blocks of all twins share."""

    length: int                             # positions that are kept in the end
    stop: int = 0                           # positions that are kept so far
    position: torch.Tensor | None = None    # (T,) of the newest characters
    reach: int = 0                          # kept keys that attention reads
    readable: torch.Tensor | None = None    # (T, reach) those that each attends to; None: all

    def move(self, T: int, device: torch.device) -> None:
        """On to the next T characters."""
        multiple = REACH.get(device.type, 1)
        self.position = torch.arange(self.stop, self.stop + T, device=device)
        self.stop += T
        self.reach = min(self.length, math.ceil(self.stop / multiple) * multiple)
        self.readable = None
        if T > 1 or multiple > 1:
            self.readable = torch.arange(self.reach, device=device) <= self.position[:, None]


class KeptKeys:
    """Causal attention of one transformer block. It keeps the keys and values of all earlier
    positions, so that a network call needs only the new ones."""

    def __init__(self, place: Place):
        self.place = place

    def __call__(self, q, k, v):
        place = self.place
        if place.stop == k.size(2):  # the first call
            B, H, _, D = k.shape
            # A CPU needs twice as long for a single query in bfloat16
            dtype = torch.bfloat16 if k.is_cuda else torch.float32
            self.kept = torch.zeros(2, B, H, place.length, D, dtype=dtype, device=k.device)
        for kept, new in zip(self.kept, (k, v), strict=True):
            kept.index_copy_(2, place.position, new.to(kept.dtype))
        keys, values = self.kept[:, :, :, : place.reach]
        y = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, place.readable)
        return y.to(q.dtype)


def following_log_p(twin: DiffusionTransformer, new, position):
    """log p (B, 1, V) of the character after the ids `new` (B, T), which stand at `position` (T,)
    behind those whose keys the twin keeps."""
    cos, sin = twin.cos, twin.sin
    twin.cos, twin.sin = cos[position], sin[position]
    log_p = twin(new, torch.zeros_like(new[:, 0]))[:, -1:]
    twin.cos, twin.sin = cos, sin
    return log_p


@torch.inference_mode()
def continue_causally(twins: list[DiffusionTransformer], x, length: int, temperature: float,
                      generator: torch.Generator):
    """The ids x (B, T) and `length` more, (B, T + length), at most sequence_len in all. After the
    first network call, each needs only the newest character. Several twins write as an ensemble."""
    mask_token_id, end = twins[0].config.mask_token_id, x.size(1) + length
    place = Place(length=end)
    for twin in twins:
        for block in twin.blocks:
            block.attn.attend = KeptKeys(place)
    new = torch.cat((x.new_full((len(x), 1), mask_token_id), x), 1)
    # cuDNN's attention would plan every length anew
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        while x.size(1) < end:
            place.move(new.size(1), x.device)
            log_p = average([following_log_p(twin, new, place.position) for twin in twins])
            new = draw(log_p, temperature, generator)               # (B, 1)
            x = torch.cat((x, new), 1)
    for twin in twins:
        make_causal(twin)
    return x


def write(twins: list[DiffusionTransformer], num_characters: int, temperature: float, seed: int,
          streams: int) -> str:
    """At least num_characters characters, as several streams in one batch. A stream grows by half a
    window at a time, and each half sees the one before it."""
    half, device = twins[0].config.sequence_len // 2, next(twins[0].parameters()).device
    x = torch.empty(streams, 0, dtype=torch.long, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for _ in trange(-(-num_characters // (streams * half)), unit="half window", disable=None):
        window = continue_causally(twins, x[:, -half:], half, temperature, generator)
        x = torch.cat((x, window[:, -half:]), 1)
    return "\n".join(decode_tokens(row) for row in x)


def write_text(args: argparse.Namespace) -> None:
    """Writes --out as the ensemble of --twins, at the temperature that suits the held-out text."""
    device = pick_device(args.device)
    twins = [make_causal(load_for_sampling(path, device, causal=True)) for path in args.twins]
    held = read_texts(args.data[:1], twins[0].config).held
    alone = [nats([twin], held) for twin in twins]
    fitted = fit_temperature(twins, held)
    t = min(fitted, key=fitted.get)
    say(f"nats per held-out character: each twin {', '.join(f'{x:.4f}' for x in alone)}; their "
         f"ensemble {fitted[1.0]:.4f}, at temperature {t} {fitted[t]:.4f}")
    started = time.perf_counter()
    text = write(twins, args.write, t, args.seeds[0], args.streams)
    seconds = time.perf_counter() - started
    with replacing(args.out) as file:
        file.write(text.encode())
    print(f"{args.out}: {len(text)} characters at temperature {t}, "
          f"{len(text) / seconds:.0f} a second")


# Training -----------------------------------------------------------------------------------------


def draw_windows(text, B: int, T: int, generator, curriculum: Curriculum):
    """Random windows x_0 (B, T) of a text."""
    device = text.device
    starts = draw_starts(len(text), T, B, generator, device, curriculum)
    return text[starts[:, None] + torch.arange(T, device=device)].long()


def batch_loss(network, x_0, teachers: list):
    """Cross-entropy of the text, or half of it and half with the teachers' mean probabilities."""
    log_p = next_log_p(network, x_0)                                # (B, T, V)
    nll = nll_of(log_p, x_0).mean()
    if not teachers:
        return nll
    with torch.no_grad():
        log_q = average([next_log_p(teacher, x_0) for teacher in teachers])
    soft = distilled_nll(log_p, log_q, torch.ones_like(x_0, dtype=torch.bool)).mean()
    return TEACHER_SHARE * soft + (1 - TEACHER_SHARE) * nll


def restore(run: Run, state_path: Path, settings: dict) -> None:
    """Continues a saved run. Raises BadInput for one with other settings."""
    state = read_checkpoint(state_path)
    for name, value in settings.items():
        if (before := state["meta"].get(name)) != value:
            raise BadInput(f"{state_path} holds a run with {name} {before}, not {value}: give its "
                           "settings, or delete it")
    run.restore(state)


def learn(run: Run, settings: dict, loss, held, path: Path) -> None:
    """The run, from the beginning or its state to the file of its best weights. `loss` draws a
    batch."""
    state_path, steps = state_beside(path), settings["steps"]
    if state_path.exists():
        restore(run, state_path, settings)
    saved = time.perf_counter()
    while True:
        if run.step == steps or run.step and run.step % EVAL_INTERVAL == 0:
            row = {"step": run.step, "held_nll": nats([run.model], held)}
            say(f"{path.name}, step {run.step}: {row['held_nll']:.4f} nats per held-out character")
            if not run.best or row["held_nll"] < run.best["row"]["held_nll"]:
                run.best = {"row": row, "model": bfloat16_state(run.model)}
        if run.step == steps:
            break
        if time.perf_counter() - saved > SAVE_SECONDS:
            contents = {**run.state(), "config": asdict(run.model.config), "meta": settings}
            with replacing(state_path) as file:
                torch.save(contents, file)
            saved = time.perf_counter()
        loss(run.generator).backward()
        factor = learning_rate_factor(run.step / steps, settings["decay"])
        update(run.model, run.optimizers, factor)
        run.step += 1
    run.model.load_state_dict(run.best["model"])
    if aside := save_weights(run.model, {**settings, **run.best["row"], "causal": True}, path):
        print(f"{path} is {aside.name} now")
    state_path.unlink(missing_ok=True)
    row = run.best["row"]
    print(f"{path}: {row['held_nll']:.4f} nats per held-out character, at step {row['step']}")


def train(args: argparse.Namespace, paths: list[Path]) -> None:
    """A twin for each seed. All of them use one network, which is compiled once."""
    tune_process()
    device = pick_device(args.device)
    config = DiffusionConfig(**{size: getattr(args, size) for size in SIZES})
    texts = read_texts(args.data, config)
    model = make_causal(DiffusionTransformer(config).to(device))
    teachers = [make_causal(load_weights(path, device, causal=True)[0]) for path in args.teachers]
    network, B, T = model, args.batch_size, config.sequence_len
    if not args.no_compile:
        network = compiled(model, B)
        teachers = [compiled(teacher, B, learns=False) for teacher in teachers]
    learned = texts.learned.to(device)
    curriculum = FROM_SCRATCH._replace(first_len=texts.first_len, first_share=args.first_share)

    def loss(generator):
        x_0 = draw_windows(learned, B, T, generator, curriculum)
        return batch_loss(network, x_0, teachers)

    settings = {
        "texts": texts.sha256, "corpus_sha256": texts.sha256[0], "first_share": args.first_share,
        "teachers": [path.name for path in args.teachers], "batch_size": B,
        "steps": math.ceil(args.characters / (B * T)), "learning_rate": args.learning_rate,
        "decay": args.decay, "weight_decay": args.weight_decay,
    }
    for seed, path in zip(args.seeds, paths, strict=True):
        torch.manual_seed(seed)
        model.init_weights()
        optimizers = make_optimizers(model, args.learning_rate, args.weight_decay)
        run = Run(model, optimizers, torch.Generator(device).manual_seed(seed))
        learn(run, {"seed": seed, **settings}, loss, texts.held, path)


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--weights", type=Path, default=TWIN_WEIGHTS, metavar="FILE",
        help="file to write, X.pt; {seed} in its name stands for the seed")
    add("--data", nargs="+", default=[str(DEFAULT_DATA)], metavar="TEXT",
        help="training text, whose last 10%% is not read; all of any further texts is learned")
    add("--first-share", type=number(float, 0, 1), help="share of the sequences that come from the "
        "first text (without it, every text counts by its length)")
    add("--teachers", type=Path, nargs="+", default=[], metavar="WEIGHTS",
        help="learn the mean probabilities of these GPT twins too")
    add = parser.add_argument_group("network and optimization").add_argument
    for size in SIZES:
        add("--" + size.replace("_", "-"), type=int, default=getattr(DiffusionConfig, size),
            help="see DiffusionConfig")
    add("--characters", type=COUNT, default=7_500_000, help="to train on; a twin overfits after "
        "some ten million characters of the one text")
    add("--batch-size", type=COUNT, default=32, help="sequences per step")
    add("--learning-rate", type=number(float, 1e-12), default=0.02,
        help="peak for the block matrices")
    add("--decay", type=number(float, 0, 1), default=0.5,
        help="share of the run in which the learning rate falls to zero")
    add("--weight-decay", type=number(float, 0), default=0.3, help="of the block matrices")
    add("--seeds", type=SEED, nargs="+", default=[1337], help="a twin for each; or of the writing")
    add = parser.add_argument_group("writing").add_argument
    add("--write", type=COUNT, metavar="N", help="write N characters or more instead of training")
    add("--out", type=Path, help="file for them")
    add("--twins", type=Path, nargs="+", default=[TWIN_WEIGHTS], metavar="WEIGHTS",
        help="the twins that write, as an ensemble")
    add("--streams", type=COUNT, default=192, help="texts that grow at once; 4096 on a large GPU")
    add = parser.add_argument_group("running").add_argument
    add("--device", default="auto", help="auto (CUDA, then MPS, then CPU), cpu, cuda or mps")
    add("--no-compile", action="store_true", help="without torch.compile, which takes a minute")
    args = parser.parse_args(argv)
    if args.write and not args.out:
        raise BadInput("--write needs --out FILE")
    if args.first_share is not None and len(args.data) == 1:
        raise BadInput(f"--first-share {args.first_share}: there is one text; --data takes more")
    if not args.write and len(args.seeds) > 1 and "{seed}" not in args.weights.name:
        raise BadInput("several --seeds need a --weights FILE with {seed} in its name")
    if args.write:
        return write_text(args)
    paths = [Path(str(args.weights).replace("{seed}", str(seed))) for seed in args.seeds]
    with ExitStack() as claims:
        for path in paths:
            claims.enter_context(claimed(path, resume=True))
        train(args, paths)


if __name__ == "__main__":
    start(main)
