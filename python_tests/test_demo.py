"""The demo on the packaged model, cut short: every chapter runs, and what it says follows from what it measured."""

import json
import math

import pytest

from calora_ext.demo import ASSETS, Plan, report, story
from calora_ext.demo.plan import ARMS
from calora_ext.errors import CaloraError
from calora_ext.evaluate import perplexity
from calora_ext.integrations.models import load

SHORT = Plan(formats=("int4 row", "int4 everywhere"), arms=("ceiling", "i-rc-d"), steps=2, batch_size=1, windows=2, new_tokens=2, bench_seconds=0.01)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "calora-demo-report"
    lines = []
    report.fresh_folder(out)
    results = story.tell(SHORT, out, say=lines.append)
    machine = {"processor": "a processor", "threads": 1, "rung chosen": "some", "torch": "2"}
    report.write_report(out, results, machine)
    return out, results, "\n".join(lines)


def test_arms(told):
    _, results, said = told
    names = [row["arm"] for row in results["arms"]]
    assert names == [
        "dense", "dense + LoRA", "int4 row", "int4 row + LoRA, inherited", "int4 everywhere", "int4 everywhere, exact activations",
        "int4 everywhere + LoRA, inherited", ARMS["ceiling"], f"int4 everywhere {ARMS['i-rc-d']}",
    ]  # fmt: skip
    loss = {row["arm"]: row["loss"] for row in results["arms"]}
    assert loss["dense + LoRA"] < loss["dense"] and loss["int4 row + LoRA, inherited"] < loss["int4 row"]
    assert all(row["perplexity"] == pytest.approx(math.exp(row["loss"])) for row in results["arms"])
    assert all(f"{row['loss']:.4f}" in said for row in results["arms"])


def test_figures_are_measured(told):
    """The dense loss and the sizes, measured again by other means."""
    out, results, _ = told
    ids = story._Story(SHORT, out, print, ASSETS).texts["austen-test"]
    again = perplexity(load(ASSETS / "base", dtype="float32"), None, ids, story.WINDOW)
    assert results["arms"][0]["loss"] == pytest.approx(again.loss, abs=1e-5) and len(ids) == 2 * story.WINDOW
    on_disk = sum(f.stat().st_size for f in (out / "models" / "int4-row").glob("*.safetensors"))
    assert sum(results["sizes"]["int4 row"].values()) == on_disk < sum(results["sizes"]["dense bf16"].values()) / 2
    assert results["round_trip_bit_exact"]


def test_report_folder(told):
    out, results, _ = told
    text = (out / "report.md").read_text()
    pictures = {line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert pictures == {"sizes.png", "errors.png", "losses.png", "training.png", "kernels.png"}
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert json.loads((out / "report.json").read_text())["arms"] == json.loads(json.dumps(results["arms"]))
    assert "adapter **on**" in text and "adapter **off**" in text
    assert load(out / "models" / "int4-row") is not None and list((out / "adapters").iterdir())


def test_without_matplotlib(told, tmp_path, monkeypatch):
    monkeypatch.setattr("calora_ext.plots.available", lambda: False)
    report.write_report(tmp_path, told[1], {"processor": "", "threads": 1, "rung chosen": "", "torch": ""})
    assert "calora_ext[plots]" in (tmp_path / "report.md").read_text() and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(("gap", "sd", "says"), [(0.1, 0.0, "closes 80 %"), (0.01, 0.0, "nothing to recover"), (0.1, 0.05, "nothing to recover")])
def test_verdict(gap, sd, says):
    arms = [
        {"arm": "dense + LoRA", "loss": 1.0, "sd": None},
        {"arm": ARMS["ceiling"], "loss": 1.0, "sd": sd},
        {"arm": "f + LoRA, inherited", "loss": 1.0 + gap, "sd": None},
        {"arm": f"f {ARMS['i-rc-d']}", "loss": 1.0 + 0.2 * gap, "sd": None},
    ]
    assert says in story.verdict(arms, "f")["says"]


def test_only_its_own_folder_is_replaced(told, tmp_path):
    theirs = tmp_path / "calora-demo-report"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("two years")
    with pytest.raises(CaloraError, match="is not a report"):
        report.fresh_folder(theirs)
    assert (theirs / "thesis.txt").exists()
    mine = tmp_path / "mine"
    report.fresh_folder(mine)
    (mine / "old.png").write_text("")
    report.fresh_folder(mine)
    assert [p.name for p in mine.iterdir()] == ["report.json"]


def test_missing_assets(tmp_path):
    with pytest.raises(CaloraError, match="package data is missing"):
        story.tell(SHORT, tmp_path, assets=tmp_path)


def test_packaged_files_are_small():
    """Nothing executable, and 12 MB in all."""
    files = [f for f in ASSETS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 12e6
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".gz", ".md"}
