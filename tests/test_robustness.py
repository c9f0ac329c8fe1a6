"""The stability notebook under papermill: several encoders, generated clips, and real audio where there is some."""
import csv
import warnings
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs" / "runs" / "stability.ipynb"
pytestmark = pytest.mark.filterwarnings("ignore")


def execute(tmp_path, monkeypatch, **parameters):
    "Run the notebook in another folder and return the rows of its table."
    import papermill
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        papermill.execute_notebook(NOTEBOOK, tmp_path / "out.ipynb", dict(parameters, table=str(tmp_path / "t.csv")),
                                   progress_bar=False)
    with open(tmp_path / "t.csv", newline="") as f: return list(csv.DictReader(f))


def test_table_of_several_models(tmp_path, monkeypatch):
    rows = execute(tmp_path, monkeypatch, models="logmel,untrained,timm:vit_tiny_patch16_224", limit=60, seconds=0.8,
                   kinds="cropped,modulation", patch_embed="standard")
    assert {r["model"] for r in rows} == {"logmel", "untrained", "timm:vit_tiny_patch16_224"}
    assert len(rows) == 3 * (9 + 1 + 5 + 1)
    for r in rows:
        if r["amount"] in ("0", "0.0"): assert float(r["distance"]) < 1e-6 and float(r["flips"] or 0) == 0
        if r["amount"] == "all":
            assert 0 <= float(r["worst_case"]) <= float(r["accuracy"]) <= 1 and float(r["rank"]) > 1
            assert 0 < float(r["distance"]) < 2 and r["data"] == "generated clips"


def test_refuses_before_any_work(tmp_path, monkeypatch):
    import papermill
    with pytest.raises(papermill.PapermillExecutionError, match="unknown kinds"):
        execute(tmp_path, monkeypatch, kinds="croped")


@pytest.mark.data
def test_real_audio(real_data, tmp_path, monkeypatch):
    rows = execute(tmp_path, monkeypatch, models="logmel", data=str(real_data / "esc50"), limit=200, seconds=4.0,
                   kinds="cropped,tempo")
    whole = {r["kind"]: r for r in rows if r["amount"] == "all"}
    assert float(whole["cropped"]["distance"]) < 0.2 and 0.02 < float(whole["tempo"]["accuracy"]) < 1
