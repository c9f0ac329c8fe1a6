"""Embeddings of real-life audio: long, odd, many at once; the encoder through its two files."""
import math

import numpy as np
import pytest
import torch

from aasp_nb.audio import AudioError
from aasp_nb.clips import generate_clip
from aasp_nb.encoders import AaSPEncoder
from aasp_nb.config import AaSPConfig, build_encoder
from aasp_nb.runs import CheckpointError

TINY = dict(embed_dim=16, depth=1, num_heads=2, sblu_hidden=2, sblu_dim=4, lambda_dim=8, predictor_heads=2, predictor_dim=16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = AaSPConfig.preset("tiny", **TINY, norm_mean=-6.0, norm_std=5.0)
    return AaSPEncoder(build_encoder(config), config)


@pytest.mark.parametrize("options", [dict(), dict(patch_embed="standard"), dict(norm_scope="patch"), dict(block_norm="post")])
def test_round_trip(options, tmp_path):
    config = AaSPConfig.preset("tiny", **TINY, **options)
    first = AaSPEncoder(build_encoder(config), config)
    second = AaSPEncoder.from_pretrained(first.save_pretrained(tmp_path / "m"))
    x = torch.randn(2, 128, 32)
    assert second.config == config and torch.equal(first(x), second(x))


def test_no_pickle_is_read(tmp_path, model):
    torch.save(model.encoder.state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="pickle"): AaSPEncoder.from_pretrained(tmp_path / "model.pt")
    model.save_pretrained(tmp_path / "m")
    data = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError): AaSPEncoder.from_pretrained(tmp_path / "m")


def test_batched_equals_single_for_any_mixture_of_lengths(model):
    rng = np.random.default_rng(0)
    clips = [torch.from_numpy(rng.standard_normal(n).astype(np.float32) * 0.1) for n in
             [1, 159, 160, 161, 2559, 2560, 2561, 33279, 33280, 33281, 66560, 70000, *rng.integers(1, 80000, 8)]]
    together = model.embed(clips, 16000, batch_size=5)
    for wave, e in zip(clips, together):
        alone = model.embed(wave, 16000)
        assert torch.allclose(alone.scene, e.scene, atol=1e-5) and torch.allclose(alone.frames, e.frames, atol=1e-5)
        assert len(e.times) == max(1, math.ceil(math.ceil(len(wave) / 160) / 16)) == len(e.frames)


def test_frames_follow_the_sound(model):
    "Silence and noise: the frame at the onset is the first that differs from a silent clip's (per-patch statistics)."
    config = model.config.replace(norm_scope="patch", patch_embed="standard", depth=1)
    torch.manual_seed(0)
    local = AaSPEncoder(build_encoder(config), config)
    silent = torch.zeros(32000)
    loud = silent.clone()
    loud[16000:] = torch.randn(16000) * 0.1
    a, b = (local.encoder.patch_embed(local.window_logmel(w, 0, 208)[None])[0].unflatten(0, (8, 13)) for w in (silent, loud))
    first = int((a - b).abs().sum((0, 2)).gt(1e-3).nonzero()[0])
    times = model.embed(loud, 16000).times
    assert times[first] - 0.08 <= 1.0 <= times[first] + 0.08 + 0.032  # the window of the transform reaches 32 ms ahead


def test_long_audio_is_not_kept_in_memory(model):
    "Four minutes, scene only; each window on its own."
    wave = generate_clip("am_slow", 0, seconds=10.0).repeat(24)
    e = model.embed(wave, 16000, frames=None)
    assert e.frames is None and len(e.times) == 1500 and e.scene.isfinite().all()
    short = model.embed(wave[: 208 * 160], 16000)
    assert not torch.allclose(short.scene, e.scene)


def test_rates_and_forms(model):
    wave = generate_clip("pluck", 0, seconds=1.0, sr=44100)
    a, b = model.embed(wave, 44100), model.embed(wave.double().numpy(), 44100)
    assert torch.allclose(a.scene, b.scene, atol=1e-6) and a.times.tolist() == pytest.approx([0.08 + 0.16 * k for k in range(7)])
    wrong = model.embed(wave, 16000)
    assert len(wrong.times) == 18  # a wrong rate is a longer clip
    stacked = model.embed(np.stack([wave, wave]), 44100, frames="mean")
    assert stacked.scene.shape == (2, 32) and stacked.frames.shape == (2, 7, 16)


@pytest.mark.parametrize("audio, sr, message", [
    (torch.zeros(10), None, "sr is needed"), (torch.zeros(2, 3, 4), 16000, r"must be \[S\]"), (torch.zeros(0), 16000, "empty"),
    (torch.full((9,), math.nan), 16000, "NaN"), (torch.zeros(9, dtype=torch.int16), 16000, "full scale"),
    (torch.zeros(9), -1, "positive"), ("no such file.wav", None, "no such file")])
def test_bad_audio_says_what_to_do(model, audio, sr, message):
    with pytest.raises(AudioError, match=message): model.embed(audio, sr)


def test_real_clips(model, real_data):
    folder = next((real_data / n for n in ("fsdd", "ravdess", "esc50") if (real_data / n / "manifest.csv").is_file()), None)
    if folder is None: pytest.skip("SKIPPED: no fsdd, ravdess or esc50 in AASP_DATA")
    from aasp_nb.data import Manifest
    m = Manifest.open(folder)
    out = model.embed([m.file(i) for i in range(0, len(m), len(m) // 5)])
    assert all(e.scene.isfinite().all() and len(e.frames) == len(e.times) for e in out)
