"""A fresh clone: its shipped weights are what their meta and the README say, its files those that
the README names."""

import math
import re
import subprocess
import sys

import pytest
from conftest import ROOT, script

from model import DEFAULT_DATA, DEFAULT_WEIGHTS, DiffusionConfig, load_corpus, load_weights, nelbo

README = (ROOT / "README.md").read_text("utf-8")


def test_shipped_weights_are_the_default_model_and_score_what_their_meta_and_the_readme_say():
    model, meta = load_weights(DEFAULT_WEIGHTS)
    _, val, sha256 = load_corpus(DEFAULT_DATA, model.config)
    assert model.config == DiffusionConfig()
    assert DEFAULT_WEIGHTS.stat().st_size <= 45e6
    assert meta["corpus_sha256"] == sha256
    for name in ("step", "characters_seen", "seed", "hardware", "command"):
        assert meta[name] is not None
    assert meta["val_nelbo"] <= 1.49 and meta["val_nelbo_error"] <= 0.01
    assert f"{meta['val_nelbo']:.4f}" in README
    assert f"{meta['val_nelbo'] / math.log(2):.4f}" in README
    mean, _ = nelbo(model, val, passes=2, windows=64)
    # One estimate scatters by about 0.35, so the mean of 128 by 0.03. Other windows differ, too
    assert abs(mean - meta["val_nelbo"]) < 0.15


def test_the_code_that_the_readme_quotes_stands_in_the_scripts():
    step, loop = re.findall("```python\n(.*?)```\n", README, re.DOTALL)
    assert loop.startswith("@torch.inference_mode()\ndef denoise(") and "yield x\n" in loop
    assert loop in (ROOT / "sample.py").read_text("utf-8")
    assert "draw_batch(" in step and "update(" in step
    source = (ROOT / "training.py").read_text("utf-8")
    assert re.sub("\n +", "\n", step) in re.sub("\n +", "\n", source)


def test_every_file_that_the_readme_names_exists():
    named = set(re.findall(r"[\w/.-]+\.(?:py|md|gif|png|csv|txt|pt)\b", README))
    made_by_commands = {"weights/laptop.pt", "weights/mine.pt", "my.txt",
                        "weights/diffusion_model.1.pt"}
    places = [ROOT, ROOT / "animations"]
    missing = {name for name in named if not any((place / name).exists() for place in places)}
    assert missing <= made_by_commands


def test_the_top_level_holds_exactly_the_listed_files_and_folders():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} == {
        "model.py", "training.py", "sample.py", "data", "weights", "animations", "pyproject.toml",
        "uv.lock", "README.md", "tests", "LICENSE",
    }


def test_ruff_finds_nothing():
    checked = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True)
    assert checked.returncode == 0, checked.stdout.decode()


def test_every_script_tells_openmp_not_to_spin_before_it_loads_torch(tmp_path, monkeypatch):
    """Two processes whose threads spin slow one another down thirty times."""
    monkeypatch.delenv("GOMP_SPINCOUNT")
    stub = "import os\nraise SystemExit(os.environ.get('GOMP_SPINCOUNT'))\n"
    (tmp_path / "torch.py").write_text(stub)
    for folder in (".", "animations", "tests/benchmarks", "tests/experiments"):
        for path in (ROOT / folder).glob("*.py"):
            if "__main__" in path.read_text("utf-8"):
                assert script(path, env={"PYTHONPATH": str(tmp_path)}).stderr == "1000\n", path
