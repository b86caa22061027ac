"""What a fresh clone holds: the shipped weights are what their meta and the README say they are."""

import math
import re
import subprocess
import sys

from model import (
    DEFAULT_DATA,
    DEFAULT_WEIGHTS,
    DiffusionConfig,
    load_corpus,
    load_weights,
    nelbo,
)

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def shipped():
    return load_weights(DEFAULT_WEIGHTS)


def test_shipped_weights_are_the_default_model_and_say_how_they_came_about(shipped):
    model, meta = shipped
    assert model.config == DiffusionConfig()
    assert DEFAULT_WEIGHTS.stat().st_size <= 45e6
    assert meta["corpus_sha256"] == load_corpus(DEFAULT_DATA, model.config)[2]
    for name in ("step", "characters_seen", "val_nelbo_error", "seed", "hardware", "command"):
        assert meta[name] is not None
    assert meta["val_nelbo"] <= 1.535 and meta["val_nelbo_error"] <= 0.01


def test_shipped_weights_score_what_their_meta_says(shipped):
    model, meta = shipped
    _, val, _ = load_corpus(DEFAULT_DATA, model.config)
    mean, _ = nelbo(model, val, passes=2, windows=64)
    # 128 estimates scatter by about 0.35 each, so 0.03 together; the windows differ too
    assert abs(mean - meta["val_nelbo"]) < 0.15


def test_readme_reports_the_figure_in_the_weights(shipped):
    _, meta = shipped
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"{meta['val_nelbo']:.4f}" in readme
    assert f"{meta['val_nelbo'] / math.log(2):.4f}" in readme


def test_the_denoising_loop_of_the_readme_runs_as_written(capsys):
    readme = (ROOT / "README.md").read_text("utf-8")
    _, loop, *_ = re.split("```python\n|```\n", readme[readme.index("```python") :])
    exec(loop, {})
    assert len(capsys.readouterr().out) == 256 + 1


def test_every_script_that_the_readme_names_exists():
    readme = (ROOT / "README.md").read_text("utf-8")
    named = set(re.findall(r"[\w/-]+\.(?:py|md|gif|png|csv|txt|pt)\b", readme))
    theirs = {"weights/laptop.pt", "weights/my.pt", "my.txt", "out.txt", "loss-curve.png"}
    places = [ROOT, ROOT / "animations"]
    missing = {name for name in named if not any((place / name).exists() for place in places)}
    assert missing <= theirs


def test_top_level_holds_what_it_should_and_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} == {
        "model.py", "training.py", "sample.py", "data", "weights", "animations", "pyproject.toml",
        "uv.lock", "README.md", "tests",
    }


def test_ruff_finds_nothing():
    checked = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True)
    assert checked.returncode == 0, checked.stdout.decode()


@pytest.mark.parametrize("script", [
    "model", "sample", "training", "animations/drawing", "animations/diffusion-process",
    "animations/game-of-life", "animations/loss-curve", "tests/benchmark_sampling",
    "tests/benchmark_training",
])
def test_openmp_is_told_not_to_spin_before_torch_loads(script):
    """Two processes whose threads spin slow one another down thirty times."""
    watch = """if True:
        import os, runpy, sys
        class Watch:
            def find_spec(self, name, path=None, target=None):
                if name == "torch":
                    print(os.environ.get("GOMP_SPINCOUNT"))
                    sys.exit()
        sys.meta_path.insert(0, Watch())
        sys.path.insert(0, os.path.dirname(sys.argv[1]))
        runpy.run_path(sys.argv[1])"""
    found = subprocess.run([sys.executable, "-c", watch, ROOT / f"{script}.py"], text=True,
                           capture_output=True)
    assert found.stdout.strip() == "1000", found.stderr
