"""The golden loss curve: 200 steps of a seeded `tiny` run on generated clips.

`python tests/golden_tiny.py` trains it anew and writes tests/golden_tiny.json. Do that only when a change of the method
or of its defaults is meant to change the losses, and say so in the commit.
"""
import json
import sys
import tempfile
from pathlib import Path

from aasp_nb.clips import write_clips
from aasp_nb.config import AaSPConfig
from aasp_nb.pretraining import pretrain
from aasp_nb.runs import environment, read_metrics

FILE = Path(__file__).with_suffix(".json")
FIELDS = dict(batch_size=4, views=4, steps=200, warmup_steps=20, seed=0, precision="fp32")
CLIPS = dict(per_class=4, seed=0, seconds=1.5)


def golden_losses(folder: Path, steps: int) -> list:
    "Losses of the first steps of the golden run, on the CPU."
    clips = write_clips(folder / "clips", **CLIPS)
    pretrain(AaSPConfig.preset("tiny", **FIELDS), clips, folder / "run", max_steps=steps, device="cpu", cache=False, workers=0,
             log_every=1, progress="none")
    return read_metrics(folder / "run")["loss"].tolist()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder: losses = golden_losses(Path(folder), FIELDS["steps"])
    made = dict(command="python tests/golden_tiny.py", preset="tiny", fields=FIELDS, clips=CLIPS, environment=environment())
    FILE.write_text(json.dumps(dict(first_20=losses[:20], mean_of_200=sum(losses) / len(losses), made=made), indent=1) + "\n")
    print(f"wrote {FILE.name}: {losses[0]:.4f} ... {losses[-1]:.4f}", file=sys.stderr)
