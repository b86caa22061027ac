"""Draw the loss curve of a training run from the log that it left beside its weights.

    uv run animations/loss-curve.py --save animations/loss-curve.png
    uv run animations/loss-curve.py --log weights/mine.csv --window
"""

import csv
from pathlib import Path

from drawing import picture_path, pyplot_with_window
from model import DEFAULT_WEIGHTS, BadInput, CommandLine, run


def read_log(path: Path) -> dict[str, list[float]]:
    """The log's columns by name. Raises BadInput where it is missing or no such log."""
    names = "characters_seen", "train_nelbo", "val_nelbo"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in names}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise BadInput(f"{path}: not a training log ({error})") from error


def draw_curve(log: dict[str, list[float]]):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=110)
    characters = [c / 1e6 for c in log["characters_seen"]]
    axes.plot(characters, log["train_nelbo"], "o-", ms=3, color="#7a86a6", label="train")
    axes.plot(characters, log["val_nelbo"], "o-", ms=3, color="#d98c00", label="validation")
    axes.set(xlabel="million characters seen", ylabel="NELBO, nats per character")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    log = DEFAULT_WEIGHTS.with_suffix(".csv")
    parser.add_argument("--log", type=Path, default=log, help="log of the run")
    parser.add_argument("--save", type=picture_path, help="picture to write")
    parser.add_argument("--window", action="store_true", help="show it in a window")
    args = parser.parse_args(argv)
    if not (args.save or args.window):
        raise BadInput("nothing to do: give --save PATH or --window")
    if args.window:
        plt = pyplot_with_window()
    figure = draw_curve(read_log(args.log))
    if args.save:
        figure.savefig(args.save)
    if args.window:
        plt.show()


if __name__ == "__main__":
    run(main)
