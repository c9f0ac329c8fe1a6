"""Every run, dashboard and lesson notebook executes, headless, in the reduced setting of the table below.

Solutions of the lessons are folded away in the text (`<details>` with a python block); here each becomes a cell that runs
where it stands, so a solution that is wrong fails the test."""
import hashlib
import os
import re
import time
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
OUT = "{out}"  # replaced by a fresh folder

# parameters of each notebook in its reduced setting; a notebook that is missing here runs as it stands
REDUCED = {
    "runs/figures.ipynb": dict(out_dir=OUT, preset="tiny"),
    "lessons/01_aliasing.ipynb": dict(),
    "lessons/02_windows_and_gradients.ipynb": dict(),
    "lessons/03_sblu_by_hand.ipynb": dict(),
}
# what another test file executes already, or what takes longer than a test may: run with --full only
ELSEWHERE = {"runs/bench_sblu.ipynb", "runs/train_demo_checkpoint.ipynb"}
# in `make test`; the rest with --full
QUICK = {"runs/figures.ipynb", "lessons/01_aliasing.ipynb", "lessons/03_sblu_by_hand.ipynb"}
SECONDS = 180  # a notebook that takes longer is a failure: lessons are meant for 60 s on two idle cores

FOLDERS = ("runs", "dashboards", "lessons")
GUIDES = sorted(str(p.relative_to(NBS)) for f in FOLDERS for p in (NBS / f).glob("*.ipynb"))
LESSONS = [g for g in GUIDES if g.startswith("lessons/")]
SOLUTION = re.compile(r"<details>.*?</details>", re.S)
BLOCK = re.compile(r"```python\n(.*?)```", re.S)


def solutions(text: str) -> list[str]:
    "Code blocks inside the folded parts of a markdown cell."
    return [code for part in SOLUTION.findall(text) for code in BLOCK.findall(part)]


def with_solutions(source: Path, target: Path) -> int:
    "Copy a notebook, each folded solution as a code cell after its text; the number of solutions."
    nb, cells, count = nbformat.read(source, 4), [], 0
    for cell in nb.cells:
        cells.append(cell)
        if cell.cell_type != "markdown": continue
        for code in solutions(cell.source):
            cells.append(nbformat.v4.new_code_cell(code))
            count += 1
    nb.cells = cells
    nbformat.write(nb, target)
    return count


def execute(name: str, tmp: Path, **parameters) -> tuple[nbformat.NotebookNode, float]:
    "Run a notebook from an unrelated folder, its own AASP_HOME; the executed notebook and the seconds it took."
    values = {k: str(tmp / "out") if v == OUT else v for k, v in {**REDUCED.get(name, {}), **parameters}.items()}
    source, home = tmp / "source.ipynb", os.environ.get("AASP_HOME")
    with_solutions(NBS / name, source)
    os.environ["AASP_HOME"] = str(tmp / "home")
    start = time.time()
    try:
        done = papermill.execute_notebook(source, tmp / "done.ipynb", values, cwd=tmp, progress_bar=False,
                                          kernel_name="python3", store_widget_state=False)
    finally:
        if home is None: del os.environ["AASP_HOME"]
        else: os.environ["AASP_HOME"] = home
    return done, time.time() - start


def outputs(nb) -> list:
    return [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]


@pytest.mark.parametrize("name", GUIDES)
def test_notebook_executes(name, tmp_path, request):
    full = request.config.getoption("--full")
    if name in ELSEWHERE and not full: pytest.skip(f"SKIPPED: {name} is long or run by another test, use --full")
    if name not in QUICK and not full: pytest.skip(f"SKIPPED: {name} runs with --full (make test-full)")
    nb, seconds = execute(name, tmp_path)
    assert not [o for o in outputs(nb) if o.output_type == "error"]
    assert (tmp_path / "done.ipynb").stat().st_size < 2_000_000, "an executed notebook must stay under 2 MB"
    if name.startswith("lessons/"): assert seconds < SECONDS


@pytest.mark.parametrize("name", LESSONS)
def test_lesson_keeps_its_promises(name):
    nb = nbformat.read(NBS / name, 4)
    text = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    first = next(c.source for c in nb.cells if c.cell_type == "markdown")
    assert re.search(r"rates.*not\s+(>\s+)?(of\s+|about\s+)?audio", first, re.S | re.I), "the first lines say what this is not about"
    assert text.lower().count("predict") >= 3, "predict first, then reveal"
    folded = [code for c in nb.cells if c.cell_type == "markdown" for code in solutions(c.source)]
    assert len(folded) >= 2 and all("assert" in code for code in folded), "exercises with solutions that check themselves"
    code = "\n".join(c.source for c in nb.cells if c.cell_type == "code")
    assert "player(" in code and "autoplay=True" not in code, "sound to play, never by itself"
    links = re.findall(r"\]\(([^)#]+?\.ipynb)", text)
    assert links and not [target for target in links if not (NBS / name).parent.joinpath(target).exists()]
    tags = [t for c in nb.cells for t in c.metadata.get("tags", [])]
    assert tags.count("parameters") == 1 and re.search(r"^clip = ", code, re.M)


def test_tables_name_notebooks_that_exist():
    assert not [n for n in {*REDUCED, *QUICK} if not (NBS / n).exists()]


def test_figures_are_the_same_bytes_again(tmp_path):
    "Two runs of the figures notebook with one seed write the same bytes; another seed changes what is drawn from it."
    made = []
    for i in range(2):
        folder = tmp_path / str(i); folder.mkdir()
        execute("runs/figures.ipynb", folder)
        made.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((folder / "out").iterdir())})
    assert made[0] == made[1] and len(made[0]) >= 15
    text = (tmp_path / "0" / "out" / "captions.md").read_text(encoding="utf-8")
    for name in made[0]:
        assert name in text or name == "captions.md", f"{name} has no caption"


def test_committed_figures_have_captions():
    text = (ROOT / "figures" / "captions.md").read_text(encoding="utf-8")
    for number in (1, 2, 3, 4): assert f"In the paper: Figure {number}" in text
    for target in re.findall(r"`([\w]+\.(?:svg|png))`", text): assert (ROOT / "figures" / target).exists(), target
    for svg in (ROOT / "figures").glob("*.svg"):
        source = svg.read_text(encoding="utf-8")
        assert "<dc:date>" not in source
        if svg.stem in text: assert "<text" not in source, f"{svg.name} depends on installed fonts"
