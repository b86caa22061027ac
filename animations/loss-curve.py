"""Draw the loss curve of a training run from the log that it left beside its weights.

    uv run animations/loss-curve.py --save animations/loss-curve.png
    uv run animations/loss-curve.py --log weights/mine.csv --save mine.png
"""

import csv
from pathlib import Path

from drawing import picture_path
from model import DEFAULT_WEIGHTS, BadInput, CommandLine, replacing, run


def read_log(path: Path) -> dict[str, list[float]]:
    """The log's columns by name. Raises BadInput where it is missing or no such log."""
    names = "characters_seen", "train_nelbo", "val_nelbo"
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in names}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise BadInput(f"{path}: not a training log ({error})") from error


def draw_curve(log: dict[str, list[float]]):
    from matplotlib.figure import Figure  # without pyplot, no display or backend matters

    figure = Figure(figsize=(7, 4), dpi=110, layout="tight")
    axes = figure.subplots()
    characters = [c / 1e6 for c in log["characters_seen"]]
    axes.plot(characters, log["train_nelbo"], "o-", ms=3, color="#7a86a6", label="train")
    axes.plot(characters, log["val_nelbo"], "o-", ms=3, color="#d98c00", label="validation")
    axes.set(xlabel="million characters seen", ylabel="NELBO, nats per character")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    log = DEFAULT_WEIGHTS.with_suffix(".csv")
    parser.add_argument("--log", type=Path, default=log, help="log of the run")
    parser.add_argument("--save", type=picture_path(".png", ".svg", ".pdf"), required=True,
                        help="picture to write")
    args = parser.parse_args(argv)
    figure = draw_curve(read_log(args.log))
    with replacing(args.save) as file:
        figure.savefig(file, format=args.save.suffix[1:])


if __name__ == "__main__":
    run(main)
