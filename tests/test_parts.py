"""A patch embedding from outside the package: one class, one name, and it is pre-trained, opened elsewhere and probed."""
import json
import subprocess
import sys
import textwrap

import pytest
import torch

from aasp_nb.clips import write_clips
from aasp_nb.config import PATCH_EMBEDS, AaSPConfig, build, build_encoder, draw_masks, register_encoder, register_patch_embed, register_predictor
from aasp_nb.pretraining import pretrain
from aasp_nb.settings import ConfigError

SMALL = dict(embed_dim=32, depth=1, num_heads=2, views=2, predictor_dim=16, predictor_depth=1, predictor_heads=2, batch_size=4, steps=3,
             warmup_steps=1, crop_seconds=1.0)
EMBED = """
    import torch
    from torch import nn
    from aasp_nb.patch_embed import StandardPatchEmbed

    class Squared(StandardPatchEmbed):
        "The standard embedding of the squared spectrogram, times a gain that no configuration knows."
        def __init__(self, img_size, patch_size, embed_dim, gain=1.0):
            super().__init__(img_size, patch_size, embed_dim)
            self.gain = gain

        def forward(self, x, *args, **kw): return super().forward(self.gain * x.square(), *args, **kw)
"""
ELSEWHERE = """
    import sys, numpy as np
    from aasp_nb.encoders import load_encoder
    from aasp_nb.encoders import AaSPEncoder
    from aasp_nb.probing import run_probe
    run, clips = sys.argv[1:]
    encoder, config = load_encoder(run)
    assert type(encoder.patch_embed).__name__ == "Squared" and encoder.patch_embed.gain == 0.5, encoder.patch_embed
    assert AaSPEncoder.from_pretrained(run).embed(np.random.randn(16000).astype("float32") * 0.1, sr=16000).scene.isfinite().all()
    result = run_probe(run, clips, cache=None, steps=5, batch_size=8, evaluations=1, seeds=(0,))
    print("probed", result.scores if hasattr(result, "scores") else result)
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    "A folder with a module that holds an embedding of its own, importable from there alone."
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_embeds.py").write_text(textwrap.dedent(EMBED))
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    yield tmp_path / "mine"
    sys.modules.pop("my_embeds", None)


def test_one_place_makes_an_embedding_known(outside, tmp_path):
    clips = write_clips(tmp_path / "clips", per_class=3, seed=0, seconds=1.0)
    config = AaSPConfig.preset("tiny", **SMALL, patch_embed="my_embeds:Squared", part_args="{'gain': 0.5}")
    out = pretrain(config, clips, tmp_path / "run", device="cpu", cache=False, workers=0, progress="none")
    assert out["step"] == 3
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (stored["patch_embed"], stored["part_args"]) == ("my_embeds:Squared", {"gain": 0.5})
    def elsewhere(cwd): return subprocess.run([sys.executable, "-c", textwrap.dedent(ELSEWHERE), str(tmp_path / "run"), str(clips)],
                                              cwd=cwd, capture_output=True, text=True)
    done = elsewhere(outside)
    assert done.returncode == 0 and "probed" in done.stdout, done.stderr[-2000:]
    lost = elsewhere(tmp_path)
    assert lost.returncode != 0 and "my_embeds:Squared" in lost.stderr and "start where my_embeds lies" in lost.stderr


def test_a_registered_name_trains_as_well(outside):
    from my_embeds import Squared
    register_patch_embed("squared", Squared)
    try:
        c = AaSPConfig.preset("tiny", **SMALL, patch_embed="squared")
        model = build(c)
        model(torch.randn(2, 128, c.n_frames), draw_masks(c, 2))[0].backward()
        assert model.student.patch_embed.gain == 1.0
    finally: del PATCH_EMBEDS["squared"]
    with pytest.raises(ConfigError, match="unknown patch_embed 'squared'.*registered first"): AaSPConfig.from_dict(c.to_dict())


def test_encoders_and_predictors_of_your_own(monkeypatch):
    from aasp_nb import config as module
    monkeypatch.setattr(module, "ENCODERS", dict(module.ENCODERS))
    monkeypatch.setattr(module, "PREDICTORS", dict(module.PREDICTORS))

    @register_encoder("shallow")
    def shallow(patch_embed, embed_dim, num_heads, mlp_ratio):
        from aasp_nb.encoder import AudioViT
        return AudioViT(patch_embed, embed_dim=embed_dim, depth=1, num_heads=num_heads, mlp_ratio=mlp_ratio)

    @register_predictor("mean")
    class Mean(torch.nn.Module):
        def __init__(self, embed_dim, out_dim):
            super().__init__()
            self.head = torch.nn.Linear(embed_dim, out_dim)

        def forward(self, tokens, visible, queries, grid, ignore=None):
            return self.head(tokens.mean(2, keepdim=True)).expand(-1, -1, queries.shape[-1], -1)

    c = AaSPConfig.preset("tiny", **{**SMALL, "depth": 3}, encoder="shallow", predictor="mean")
    assert len(build_encoder(c).blocks) == 1
    model = build(c)
    model(torch.randn(2, 128, c.n_frames), draw_masks(c, 2))[0].backward()
    assert model.predictor.head.weight.grad.abs().sum() > 0
    with pytest.raises(ConfigError, match="must be a class or a function"): register_predictor("none", 3)
