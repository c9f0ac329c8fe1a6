"""Presets against the paper: Table I (pre-training), Table II (probes), Tables V to VIII (sizes).

The numbers are copied from the tables. With AASP_PAPER set to a folder that holds `table1_training.csv` and
`table2_linear_probing.csv`, the copies are held against those files too.
"""
import csv
import os
from pathlib import Path

import pytest
import torch

from aasp_nb.config import PRESETS, AaSPConfig, build_encoder, build_patch_embed, build_predictor
from aasp_nb.probing import PROBE_PRESETS

TABLE_1 = dict(betas=(0.9, 0.95), lr=5e-4, min_lr=0.0, weight_decay=0.05, steps=600_000, warmup_steps=80_000,
               batch_size=512, drop_path=0.0)
TABLE_2 = dict(us8k=dict(lr=1e-3, weight_decay=0.0, steps=8_000, batch_size=128, schedule="cosine"),
               nsynth=dict(lr=1e-3, weight_decay=0.0, steps=50_000, batch_size=512, schedule="cosine"),
               cremad=dict(lr=1e-3, weight_decay=0.0, steps=50_000, batch_size=16, schedule="cosine"))
CSV_NAMES = dict(lr="peak_lr", steps="training_steps")  # where a table's name differs from ours


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", ["base", "eat"])
def test_table_1_pretraining(name):
    config = AaSPConfig.preset(name)
    assert {k: getattr(config, k) for k in TABLE_1} == TABLE_1


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2_probes(name):
    assert {k: getattr(PROBE_PRESETS[name], k) for k in TABLE_2[name]} == TABLE_2[name]


def _column(path, column):
    with open(path, newline="") as f:
        return {row["hyperparameter"]: row[column] for row in csv.DictReader(f)}


@pytest.mark.skipif("AASP_PAPER" not in os.environ, reason="AASP_PAPER (folder of the paper's tables) is not set")
def test_copies_equal_the_tables():
    folder = Path(os.environ["AASP_PAPER"])
    columns = [(TABLE_1, _column(folder/"table1_training.csv", "pretrain_as2m"))]
    columns += [(TABLE_2[n], _column(folder/"table2_linear_probing.csv", n)) for n in TABLE_2]
    for ours, printed in columns:
        for key, value in ours.items():
            text = printed[CSV_NAMES.get(key, key)]
            have = tuple(map(float, text.split())) if isinstance(value, tuple) else type(value)(text)
            assert have == value, (key, text, value)
        if "optimizer" in printed and ours is TABLE_1: assert printed["optimizer"] == "AdamW"


def test_base_holds_the_values_of_the_text():
    c = AaSPConfig.preset("base")
    assert (c.sample_rate, c.win_length, c.hop_length, c.n_fft, c.n_mels) == (16_000, 400, 160, 1024, 128)
    assert (c.crop_seconds, c.n_frames, c.grid, c.n_patches) == (6.0, 608, (8, 38), 304)
    assert (c.embed_dim, c.depth, c.num_heads, c.patch_size) == (768, 12, 12, (16, 16))
    assert (c.sblu_hidden, c.sblu_dim, c.kernel_size, c.highpass_taps) == (16, 128, 63, 63)
    assert (c.mask_ratio, c.query_ratio, c.contrastive_weight, c.ema_base, c.ema_end) == (0.8, 0.75, 0.1, 0.994, 1.0)
    assert (c.predictor, c.predictor_depth, c.predictor_dim, c.predictor_heads) == ("cross-attention", 3, 512, 16)


@pytest.mark.parametrize("fields, printed", [  # Tables V and VI: parameters of the patch embedding, millions
    (dict(patch_embed="standard"), 0.43), (dict(adaptive=False), 1.16), (dict(), 1.86)])
def test_patch_embedding_sizes(fields, printed):
    with torch.device("meta"):
        assert round(parameters(build_patch_embed(AaSPConfig.preset("base", **fields)))/1e6, 2) == printed


@pytest.mark.parametrize("fields, printed", [(dict(predictor="cnn"), 2.59), (dict(), 10.63)])  # Table VIII, millions
def test_predictor_sizes(fields, printed):
    with torch.device("meta"):
        assert round(parameters(build_predictor(AaSPConfig.preset("base", **fields)))/1e6, 2) == printed


def test_encoder_size():  # Tables III and IV: 87M
    with torch.device("meta"):
        assert round(parameters(build_encoder(AaSPConfig.preset("base")))/1e6) == 87


@pytest.mark.parametrize("kernel_size, printed", [(31, 2.41), (63, 4.90), (127, 9.88)])
def test_convolution_cost(kernel_size, printed):  # Table VII, millions of multiply-adds; it prints 9.86 for 127
    c = AaSPConfig.preset("base", kernel_size=kernel_size)
    assert round(c.n_frames*c.grid[0]*c.sblu_hidden*c.kernel_size/1e6, 2) == printed


def test_small_presets_keep_the_method():
    """Only sizes, crops and the schedule differ from the paper, and the norm of tiny's targets (said why in 08)."""
    sizes = {"embed_dim", "depth", "num_heads", "crop_seconds", "n_frames", "fill_crops", "sblu_dim", "lambda_dim",
             "lambda_depth", "lambda_heads", "views", "predictor_dim", "predictor_depth", "predictor_heads", "ema_base",
             "batch_size", "steps", "warmup_steps", "lr", "precision", "target_norm"}
    for name in ("small", "tiny"):
        assert set(PRESETS[name]) <= sizes, name
