"""The demo on the packaged model, cut short: every chapter runs, and what it says follows from what it measured."""

import json
import math

import pytest

from calora_ext.demo import ASSETS, Plan, report, story
from calora_ext.demo.plan import ARMS, DENSE, FORMATS, FULL, QUICK, TASKS, TRAINED
from calora_ext.demo.results import Row, Rows, packaged
from calora_ext.errors import CaloraError
from calora_ext.evaluate import perplexity
from calora_ext.integrations.models import load

FORM = "2:4 int4"
SHORT = Plan(
    formats=("int4 everywhere", FORM), trained=(("cpp", FORM),), arms=("i", "i-big", "i-rc-d"), steps=2, seeds=(0, 1), batch_size=1,
    learning_rates=(1e-4, 1e-2), windows=2, new_tokens=2, bench_seconds=0.01,
)  # fmt: skip


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "calora-demo-report"
    lines = []
    report.fresh_folder(out)
    results = story.tell(SHORT, out, say=lines.append)
    machine = {"processor": "a processor", "threads": 1, "rung chosen": "some", "torch": "2"}
    report.write_report(out, results, machine)
    return out, results, "\n".join(lines)


def row_of(results, task, form, arm):
    return next(row for row in results["rows"] if (row["task"], row["format"], row["arm"]) == (task, form, arm))


def test_rows(told):
    _, results, said = told
    live = {(row["task"], row["format"], row["arm"]) for row in results["rows"] if not row["packaged"]}
    untrained = {(task, form, arm) for task in TASKS for form in (DENSE, *SHORT.formats) for arm in ("none", "inherited")}
    assert live == untrained | {("cpp", DENSE, "i")} | {("cpp", FORM, arm) for arm in SHORT.arms}
    for task in TASKS:  # each LoRA helps on its own text, also on the compressed model
        for form in (DENSE, FORM):
            assert row_of(results, task, form, "inherited")["loss"] < row_of(results, task, form, "none")["loss"] - 0.05
    ours = row_of(results, "cpp", FORM, "i-rc-d")
    assert len(ours["losses"]) == 2 and ours["steps"] == 2 and ours["learning_rate"] in SHORT.learning_rates
    assert 0.9 < row_of(results, "cpp", FORM, "i-big")["parameters"] / ours["parameters"] < 1.1
    assert f"{ours['loss']:.4f} ± {ours['sd']:.4f} (2 seeds)" in said


def test_figures_are_measured(told):
    """The dense loss and the sizes, measured again by other means."""
    out, results, _ = told
    ids = story._Story(SHORT, out, print, ASSETS).test["docs"]
    again = perplexity(load(ASSETS / "base", dtype="float32"), None, ids, story.WINDOW)
    assert row_of(results, "docs", DENSE, "none")["loss"] == pytest.approx(again.loss, abs=1e-5) and len(ids) == 2 * story.WINDOW
    on_disk = sum(f.stat().st_size for f in (out / "models" / "int4-everywhere").glob("*.safetensors"))
    assert sum(results["sizes"]["int4 everywhere"].values()) == on_disk < sum(results["sizes"][DENSE].values()) / 2
    assert results["round_trip_bit_exact"]
    assert results["activations"]["int8"]["cpp"] == row_of(results, "cpp", FORM, "none")["loss"]
    assert results["activations"]["int8"]["cpp"] == pytest.approx(results["activations"]["exact"]["cpp"], rel=0.01)


def test_report_folder(told):
    out, results, _ = told
    text = (out / "report.md").read_text()
    pictures = {line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert pictures >= {"sizes.png", "errors.png", "losses-cpp-2-4-int4.png", "training.png", "kernels.png"}
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert json.loads((out / "report.json").read_text())["rows"] == json.loads(json.dumps(results["rows"]))
    assert "adapter **cpp**" in text and "**no** adapter" in text
    assert load(out / "models" / "int4-everywhere") is not None and list((out / "adapters").iterdir())


def test_without_matplotlib(told, tmp_path, monkeypatch):
    monkeypatch.setattr("calora_ext.plots.available", lambda: False)
    report.write_report(tmp_path, told[1], {"processor": "", "threads": 1, "rung chosen": "", "torch": ""})
    assert "calora_ext[plots]" in (tmp_path / "report.md").read_text() and not list(tmp_path.glob("*.png"))


def rows_with(gap, spread, ours=0.2):
    """Ceiling 1.0, inherited 1 + gap, CA-LoRA with ours * gap left, seeds ± spread around the mean."""

    def row(form, arm, loss, seeds=True):
        return Row("cpp", form, arm, (loss - spread, loss + spread) if seeds else (loss,), bytes=1)

    return Rows([
        row(DENSE, "inherited", 1.1, seeds=False), row(DENSE, "i", 1.0), row("f", "inherited", 1 + gap, seeds=False),
        row("f", "i", 1 + 0.5 * gap), row("f", "i-big", 1 + 0.4 * gap), row("f", "i-rc-d", 1 + ours * gap),
    ])  # fmt: skip


@pytest.mark.parametrize(("gap", "spread", "says"), [(0.1, 0.0, "closes 80 %"), (0.01, 0.0, "nothing to recover"), (0.1, 0.05, "nothing to recover")])
def test_verdict(gap, spread, says):
    verdict = rows_with(gap, spread).verdict("cpp", "f")
    assert says in verdict["says"] and verdict["gap"] == pytest.approx(gap)
    assert verdict["closed"] is None or (verdict["ahead_of_i"] == pytest.approx(0.3 * gap) and verdict["ahead_of_i-big"] == pytest.approx(0.2 * gap))


def test_verdict_takes_the_better_ceiling():
    rows = Rows([Row("cpp", DENSE, "inherited", (0.99,), 1), *rows_with(0.1, 0.0)])
    assert rows.verdict("cpp", "f")["ceiling"] == 0.99
    assert rows.verdict("cpp", "g") is None and rows.verdict("docs", "f") is None


def test_live_rows_count_before_packaged_ones(tmp_path):
    (tmp_path / "full.json").write_text(json.dumps({"rows": [
        Row("cpp", FORM, "i", (3.0, 4.0, 5.0), 1, steps=9).to_dict(), Row("cpp", FORM, "none", (9.0,), 1).to_dict(),
    ]}))  # fmt: skip
    stored = packaged(tmp_path)
    assert [(row.arm, row.loss, row.sd, row.packaged) for row in stored] == [("i", 4.0, 1.0, True)]
    live = Row("cpp", FORM, "i", (2.0,), 1, steps=9)
    assert Rows([live, *stored]).get("cpp", FORM, "i") is live and packaged(tmp_path / "none") == []


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
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".gz", ".md", ".txt"}


def test_packaged_results_are_complete():
    """What the default run fills in: every trained arm of the full plan that it does not train itself, on the same text."""
    rows = {(row.task, row.format, row.arm): row for row in packaged(ASSETS)}
    wanted = {(task, form, arm) for task, form in FULL.trained for arm in TRAINED} | {(task, DENSE, "i") for task in TASKS}
    assert set(rows) == wanted and all(len(row.losses) == len(FULL.seeds) for row in rows.values())
    assert QUICK.windows == FULL.windows and set(QUICK.trained) <= set(FULL.trained) and QUICK.formats == tuple(FORMATS)
    assert all(math.isfinite(row.loss) and row.arm in ARMS for row in rows.values())
