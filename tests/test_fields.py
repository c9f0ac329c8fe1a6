"""Every field of a configuration reaches something: changed, it changes a module, the optimizer, a batch, or the loss."""
import hashlib

import numpy as np
import pytest
import torch

from aasp_nb.config import AaSPConfig
from aasp_nb.data import collate, Manifest
from aasp_nb.pretraining import build_learner, prepare_data

SMALL = dict(embed_dim=32, depth=2, num_heads=2, sblu_hidden=4, sblu_dim=8, lambda_dim=16, lambda_heads=2, views=3, predictor_dim=32,
             predictor_depth=1, predictor_heads=2, batch_size=4, crop_seconds=1.0, steps=20, warmup_steps=4, norm_measure=False,
             drop_path=0.1, grad_clip=0.1, fill_crops=False)
NON_ADAPTIVE, CNN, POST = dict(adaptive=False), dict(predictor="cnn", cnn_groups=4), dict(block_norm="post")
CHANGES = dict(  # field -> (another value, fields that both have)
    sample_rate=(8000, dict(f_max=4000.0, n_fft=512, win_length=200, hop_length=80)), channel=(1, {}), n_fft=(2048, {}),
    win_length=(320, {}), hop_length=(200, dict(n_frames=None)), n_mels=(64, {}), f_min=(50.0, {}), f_max=(7000.0, {}),
    log_floor=(1e-6, {}), norm_mean=(-5.0, {}), norm_std=(4.0, {}), crop_seconds=(1.2, {}), n_frames=(96, {}),
    frame_padding=("floor", {}), fill_crops=(True, {}), mix_ratio=(0.4, {}), gain_db=(6.0, {}),
    resize_range=((0.6, 1.5), {}), patch_embed=("standard", {}),
    encoder=("tests.test_fields:other_encoder", {}), part_args=({"gain": 2.0}, dict(patch_embed="tests.test_fields:Louder")),
    adaptive=(False, {}), patch_size=((16, 8), {}), embed_dim=(64, {}), depth=(3, {}), num_heads=(4, {}), mlp_ratio=(2.0, {}),
    block_norm=("post", {}), drop_path=(0.5, {}), sblu_hidden=(8, {}), sblu_dim=(16, {}), lambda_dim=(32, {}),
    lambda_depth=(2, {}), lambda_heads=(1, {}), kernel_size=(31, {}), eps=(0.1, {}), delta=(0.5, {}), phase=("signed", {}),
    norm_scope=("patch", {}), mask_input=(True, {}), pos_in_fusion=(True, {}), highpass_taps=(31, {}), alpha_init=(0.5, {}),
    backend=("torch", {}), mask_ratio=(0.7, {}), views=(4, {}), block_sizes=(((1, 1),), {}), block_placement=("center", {}),
    predictor=("cnn", dict(cnn_groups=4)), predictor_dim=(64, {}), predictor_depth=(2, {}), predictor_heads=(4, {}),
    predictor_cls=(True, {}), cnn_depth=(2, CNN), cnn_groups=(8, CNN), query_ratio=(0.5, {}), target=("logmel", {}),
    target_norm=("token", {}), cls_target_norm=("channel", {}), target_layer=("ffn", {}), target_layers=(1, {}), teacher_cls=(True, {}),
    loss_scale=("mean", {}), contrastive_weight=(0.5, {}), contrastive_dim=(16, {}), temperature=(0.3, {}),
    contrastive_scope=("micro", dict(accumulation_steps=2)), ema_base=(0.5, {}), ema_end=(0.999, {}), ema_steps=(7, {}),
    ema_schedule=("linear", {}), batch_size=(8, {}), accumulation_steps=(2, {}), steps=(30, {}), warmup_steps=(8, {}),
    lr=(1e-4, {}), min_lr=(1e-5, {}), weight_decay=(0.5, {}), betas=((0.8, 0.9), {}), grad_clip=(1e-3, {}),
    precision=("bf16", {}), seed=(1, {}))
ELSEWHERE = dict(  # field -> why no change of it can be seen here
    norm_measure="decides whether `prepare_run` measures; test_training and the golden curve measure",
    preset_name="a name for tables", version="of the format: others are refused")


def other_encoder(patch_embed, embed_dim, num_heads):
    from aasp_nb.encoder import AudioViT
    return AudioViT(patch_embed, embed_dim=embed_dim, depth=1, num_heads=num_heads)


def __getattr__(name):
    if name != "Louder": raise AttributeError(name)
    from aasp_nb.patch_embed import StandardPatchEmbed

    class Louder(StandardPatchEmbed):
        def __init__(self, img_size, patch_size, embed_dim, gain=1.0):
            super().__init__(img_size, patch_size, embed_dim)
            self.gain = gain

        def forward(self, x, *args, **kw): return super().forward(self.gain * x, *args, **kw)
    return Louder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "Stereo clips of 0.7 and 1.5 s, so that padding, crops and channels matter."
    import soundfile as sf
    folder = tmp_path_factory.mktemp("fields")
    rng = np.random.default_rng(0)
    for i in range(8):
        sound = rng.normal(0, 0.1, (11200 if i % 2 else 24000, 2))
        sound[5000:9000] = 0
        sf.write(folder / f"{i}.wav", sound, 16000)
    return Manifest.open(folder)


KNOWN = {}  # many fields start from the same configuration


def observed(config, clips) -> dict:
    if config not in KNOWN: KNOWN[config] = _observed(config, clips)
    return KNOWN[config]


def _observed(config, clips) -> dict:
    "What a run with this configuration consists of: parts by name, as digests."
    learner = build_learner(config)
    dataset = prepare_data(config, clips, cache=False)
    items = [dataset[(i, 0)] for i in range(config.batch_size if config.batch_size <= len(clips) else 4)]
    batch = {k: v for k, v in collate(items).items() if k not in ("index", "epoch", "broken")}
    groups = [(g["weight_decay"], g["betas"], len(g["params"])) for g in learner.optimizer.param_groups]
    rates = [(learner.lr_at(s), learner.schedule.momentum_at(s)) for s in (0, 3, 9, 19)]
    out = dict(weights=learner.model.state_dict(), batch=learner.prepare(batch, 3), optimizer=groups, rates=rates,
               structure=str(learner.model), micro=(learner.micro_batch, learner.precision, config.backend))
    logs = learner.step(batch, 3)
    return {k: _digest(v) for k, v in (out | dict(step={k: v for k, v in logs.items()}, after=learner.model.state_dict())).items()}


def _digest(x) -> str:
    h = hashlib.sha256()
    for k, v in (x.items() if isinstance(x, dict) else enumerate([x])):
        h.update(str(k).encode())
        h.update(v.detach().float().contiguous().numpy().tobytes() if isinstance(v, torch.Tensor) else repr(v).encode())
    return h.hexdigest()[:12]


def test_every_field_has_a_change_or_a_reason():
    assert set(CHANGES) | set(ELSEWHERE) == set(AaSPConfig.names()) and not set(CHANGES) & set(ELSEWHERE)


def test_the_same_configuration_is_the_same_run(clips):
    c = AaSPConfig.preset("tiny", **SMALL)
    assert observed(c, clips) == _observed(c, clips)


def test_the_seed_reaches_the_weights_and_the_masks():
    one, two = (build_learner(AaSPConfig.preset("tiny", **SMALL, seed=s)) for s in (0, 1))
    assert not torch.equal(one.model.student.blocks[0].attn.qkv.weight, two.model.student.blocks[0].attn.qkv.weight)
    batch = dict(wave=torch.randn(4, 16000), valid_samples=torch.full((4,), 16000))
    assert not torch.equal(one.prepare(batch, 0)["mask"], two.prepare(batch, 0)["mask"])


@pytest.mark.parametrize("field", CHANGES)
def test_a_field_changes_something(field, clips):
    value, both = CHANGES[field]
    a = AaSPConfig.preset("tiny", **{**SMALL, **both})
    b = a.replace(**{field: value})
    assert getattr(a, field) != getattr(b, field)
    one, two = observed(a, clips), observed(b, clips)
    differ = [k for k in one if one[k] != two[k] and k != "structure"]
    assert differ or one["structure"] != two["structure"], f"{field} changes nothing"
    if field in ("backend",): return
    assert [k for k in differ if k != "micro"] or field == "accumulation_steps", f"{field} is stored and does nothing"
