"""Draw the loss curves of a training run from the log that its weights, or its state, hold.

    uv run animations/loss-curve.py --save weights/loss-curve.png
    uv run animations/loss-curve.py --weights weights/mine.pt --save mine.png
"""

from functools import partial
from pathlib import Path

from drawing import picture_path
from model import DEFAULT_WEIGHTS, BadInput, CommandLine, read_checkpoint, replacing, start


def main(argv: list[str] | None = None) -> None:
    from matplotlib.figure import Figure  # without pyplot, no display or backend matters

    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--weights", type=Path, default=DEFAULT_WEIGHTS, help="X.pt or X.state.pt of the run")
    add("--save", type=partial(picture_path, (".png", ".svg", ".pdf")), required=True,
        help="picture to write")
    args = parser.parse_args(argv)
    contents = read_checkpoint(args.weights)
    log = contents.get("run", contents["meta"]).get("log")
    try:
        characters = [row["characters_seen"] / 1e6 for row in log]
        curves = {name: [float(row[name]) for row in log]
                  for name in log[0] if name.endswith(("_nelbo", "_loss"))}
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{args.weights}: holds no log of a training run") from error
    figure = Figure(figsize=(7, 4), dpi=110, layout="tight")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(characters, curve, "o-", ms=3, label=name)
    axes.set(xlabel="million characters seen", ylabel="nats per character")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(args.save) as file:
        figure.savefig(file, format=args.save.suffix[1:])


if __name__ == "__main__":
    start(main)
