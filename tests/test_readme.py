"""Every Python example of the README runs."""
import re
from pathlib import Path

import pytest
import soundfile as sf

from aasp_nb.clips import generate_clip, write_clips

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_there_are_examples(): assert len(BLOCKS) == 4  # each has its test below


def test_a_newcomer_reads_about_five_hundred_words_before_the_first_table():
    before = README[:README.index("\n|")]
    assert len(before.split()) <= 620 and "figures/figure1_overview.png" in before  # code counts too
    assert before.count("make demo") and before.count("```python") == 3 and "## Open this first" in before


@pytest.mark.parametrize("seconds", (0.7, 6.0, 9.3))
def test_first_example_takes_clips_of_any_length(seconds, tmp_path, monkeypatch):
    "One clip to tokens and estimates, of the shapes that the comments name."
    monkeypatch.chdir(tmp_path)
    sf.write("clip.wav", generate_clip("voice", 0, seconds=seconds), 16000)
    scope = {}
    exec(BLOCKS[0], scope)
    assert scope["logmel"].shape == (1, 128, 608) and scope["tokens"].shape == (1, 304, 768)
    assert scope["decay"].shape == scope["frequency"].shape == (1, 8, 16, 38)
    assert sum(p.numel() for p in scope["embed"].parameters()) == 1_856_800


def test_the_other_examples_train_a_folder_open_it_and_take_an_embedding_of_your_own(tmp_path, monkeypatch):
    "As they stand, but for the size: two steps of two clips."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AASP_HOME", str(tmp_path / "home"))
    write_clips(tmp_path / "my" / "audio", per_class=1, seed=0, seconds=1.0)
    sf.write("clip.wav", generate_clip("voice", 0, seconds=3.3, sr=22050), 22050)
    small = BLOCKS[1].replace('preset("tiny")', 'preset("tiny", steps=2, warmup_steps=1, batch_size=2, views=2, depth=1)')
    assert small != BLOCKS[1]
    scope = {}
    for code in (small, *BLOCKS[2:]): exec(code, scope)
    assert scope["results"]["status"] == "finished" and scope["vector"].shape == (384,)
    from aasp_nb.config import PATCH_EMBEDS, build_patch_embed
    try: assert build_patch_embed(scope["config"]).gain == 0.5
    finally: del PATCH_EMBEDS["squared"]
