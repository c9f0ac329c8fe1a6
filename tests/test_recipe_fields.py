"""Every field of a fine-tuning recipe and of a probe's protocol reaches something: changed, it changes what comes out."""
import functools
from dataclasses import fields

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from aasp_nb.clips import write_clips
from aasp_nb.config import AaSPConfig, build_encoder
from aasp_nb.data import Manifest
from aasp_nb.finetuning import FinetuneConfig, finetune, make_learner, prepare_task
from aasp_nb.probing import ProbeConfig, ProbeData, _protocol_name, linear_probe, probe_summary
from aasp_nb.runs import read_metrics

BALANCED = dict(sampling="balanced", epoch_clips=30)
RECIPE = dict(steps=3, warmup_steps=1, batch_size=8, lr=3e-3, ema=0.5, frames=64, evaluations=1, validation=0.2, precision="fp32",
              grad_clip=0.5, drop_path=0.3)
FINETUNE = dict(  # field -> (another value, fields that both have)
    frames=(32, {}), multi_label=(True, {}), steps=(4, {}), warmup_steps=(2, {}), batch_size=(10, {}), lr=(1e-3, {}),
    min_lr=(1e-3, {}), layer_decay=(0.5, {}), weight_decay=(0.5, {}), betas=((0.5, 0.9), {}), grad_clip=(0.05, {}),
    drop_path=(0.9, {}), mixup=(0.0, {}), spec_augment=(0.5, {}), ema=(0.0, {}), patch_dropout=(0.5, {}),
    sampling=("balanced", {}), balance=("smoothed", BALANCED), epoch_clips=(10, BALANCED), normalization=("checkpoint", {}),
    validation=(0.4, {}), selection=("validation", {}), evaluations=(3, {}), precision=("bf16", {}), seed=(1, {}))
FINETUNE_ELSEWHERE = dict(  # field -> why no change of it can be seen
    accumulation_steps="splits a step and leaves its result; what it splits is asserted",
    preset_name="a name for tables", version="of the format: others are refused")
PROBE = dict(steps=(7, {}), epochs=(2, dict(steps=None)), batch_size=(9, {}), lr=(1e-2, {}), schedule=("constant", {}),
             weight_decay=(0.1, {}), betas=((0.5, 0.9), {}), evaluations=(3, {}), patience=(1, dict(evaluations=6, lr=0.1)),
             validation=(0.4, {}), twin=(False, {}), headline=("validation", {}), seeds=((0, 2), {}))
PROBE_ELSEWHERE = dict(protocol="the name that results stand under")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "Generated clips of three classes, of which the first is rare."
    m = Manifest.open(write_clips(tmp_path_factory.mktemp("clips"), per_class=10, seed=0, seconds=0.5)).select(
        label=["noise", "clicks_fast", "voice"])
    rare = np.flatnonzero(np.array(m.columns["label"]) == m.columns["label"][0])
    return m.take(np.setdiff1d(np.arange(len(m)), rare[::3]))


@pytest.fixture(scope="module")
def start():
    torch.manual_seed(0)
    config = AaSPConfig.preset("tiny", embed_dim=16, depth=2, num_heads=2, sblu_hidden=2, sblu_dim=4, lambda_dim=8, norm_mean=-4.0)
    return build_encoder(config), config


def fine_tuned(start, clips, folder, fields):
    "What a short run leaves, but for its records: weights, losses, scores, predictions, headline."
    out = finetune(start, clips, folder, FinetuneConfig.preset("scv2", **{**RECIPE, **fields}), fold=1, device="cpu", cache=False,
                   progress="none", log_every=1)
    weights = {f"{k} {tuple(v.shape)}": v.double().sum().item() for k, v in load_file(folder / "model" / "model.safetensors").items()}
    logs = {k: read_metrics(folder)[k].tolist() for k in ("loss", "lr", "grad_norm")}
    return dict(weights=weights, logs=logs, **{k: out[k] for k in ("curve", "scores", "metric", "selection", "norm", "n")})


def probed(fields):
    "What a short probe leaves: curves and test scores of every run, and the headline."
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    data = ProbeData(rng.normal(size=(60, 5)) + np.eye(3, 5)[y], y, list("abc"), fold=y * 0 + np.arange(60) // 30,
                     group=np.arange(60) // 3)
    out = linear_probe(data, ProbeConfig(**{**dict(steps=6, batch_size=8, evaluations=2, seeds=(0, 1)), **fields}))
    return ([(t.run.seed, t.run.fold, t.curve, {k: (s, v, l.tolist()) for k, (s, v, l) in t.kept.items()}) for t in out.runs],
            probe_summary(out, draws=10))


@pytest.fixture(scope="module")
def unchanged(start, clips, tmp_path_factory):
    "The run that others are compared with, once for all of them that share its fields."
    return functools.cache(lambda common: fine_tuned(start, clips, tmp_path_factory.mktemp("run") / "run", dict(common)))


@pytest.mark.parametrize("name", FINETUNE)
def test_every_field_of_a_fine_tuning_reaches_something(name, start, clips, tmp_path, unchanged):
    value, common = FINETUNE[name]
    assert fine_tuned(start, clips, tmp_path / "run", {**common, name: value}) != unchanged(tuple(common.items()))


def test_accumulation_splits_a_step(start, clips, tmp_path):
    size = lambda n: make_learner(prepare_task(FinetuneConfig.preset("scv2", **{**RECIPE, "accumulation_steps": n}), start[1], clips,
                                               1, cache=False), start, tmp_path, torch.device("cpu")).micro_batch
    assert (size(1), size(4)) == (8, 2)


@pytest.mark.parametrize("name", PROBE)
def test_every_field_of_a_probe_reaches_something(name):
    value, common = PROBE[name]
    assert probed(common if name != "epochs" else {**common, "epochs": 1}) != probed({**common, name: value})
    assert probed({}) == probed({}), "and nothing else does"


def test_every_field_is_named():
    assert {*FINETUNE, *FINETUNE_ELSEWHERE} == {f.name for f in fields(FinetuneConfig)} and not {*FINETUNE} & {*FINETUNE_ELSEWHERE}
    assert {*PROBE, *PROBE_ELSEWHERE} == {f.name for f in fields(ProbeConfig)} and not {*PROBE} & {*PROBE_ELSEWHERE}
    assert _protocol_name(ProbeConfig("evar"), "us8k") != _protocol_name(ProbeConfig(), "us8k")


def test_the_same_recipe_gives_the_same_run(start, clips, tmp_path, unchanged):
    assert fine_tuned(start, clips, tmp_path / "run", {}) == unchanged(())
