"""Decoding against ffmpeg: containers, codecs, rates, channels and headers that lie give what ffmpeg gives, or our error."""
import random
import shutil
import subprocess

import numpy as np
import pytest

from aasp_nb.audio import AudioError, audio_info, load_audio

FFMPEG = shutil.which("ffmpeg")
needs_ffmpeg = pytest.mark.skipif(not FFMPEG, reason="SKIPPED: no ffmpeg to compare with (apt-get install ffmpeg)")
RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
KINDS = {  # name -> (ending, ffmpeg's options, most channels)
    "mp3 of constant rate": ("mp3", ["-b:a", "64k"], 2), "mp3 of varying rate": ("mp3", ["-q:a", "5"], 2),
    "mp3 without Xing": ("mp3", ["-q:a", "6", "-write_xing", "0"], 2), "mp3 from a pipe": ("mp3", ["-q:a", "3", "PIPE"], 2),
    "mp3 without tags": ("mp3", ["-b:a", "48k", "-write_xing", "0", "-id3v2_version", "0"], 2), "mp2": ("mp2", ["-b:a", "96k"], 2),
    "flac": ("flac", [], 8), "flac from a pipe": ("flac", ["PIPE"], 8), "flac of 24 bits": ("flac", ["-sample_fmt", "s32"], 2),
    "wav": ("wav", [], 8), "wav from a pipe": ("wav", ["PIPE"], 8), "wav of floats": ("wav", ["-c:a", "pcm_f32le"], 4),
    "wav of 24 bits": ("wav", ["-c:a", "pcm_s24le"], 4), "mu-law": ("wav", ["-c:a", "pcm_mulaw"], 2), "adpcm": ("wav", ["-c:a", "adpcm_ms"], 2),
    "rf64": ("wav", ["-rf64", "always"], 4), "au": ("au", [], 4), "au from a pipe": ("au", ["PIPE"], 4), "aiff": ("aiff", [], 4),
    "w64": ("w64", [], 4), "caf": ("caf", [], 4), "vorbis": ("ogg", ["-c:a", "libvorbis"], 2), "opus": ("opus", ["-b:a", "48k", "-ar", "48000"], 2),
    "flac in ogg": ("oga", ["-c:a", "flac", "-sample_fmt", "s16"], 2)}


def sound(rng, rate, channels):
    "Half a second to two of tones and noise, with pauses; every channel another."
    n = rng.randint(rate // 2, 2 * rate)
    t, g = np.arange(n) / rate, np.random.default_rng(rng.randrange(1 << 30))
    x = np.stack([0.3 * np.sin(2 * np.pi * (150 + 90 * c) * t * (1 + t)) for c in range(channels)], 1)
    return ((x + 0.03 * g.standard_normal(x.shape)) * (np.sin(2 * np.pi * 1.3 * t) > -0.5)[:, None]).astype("<f4")


def ffmpeg(*args, data=b""):
    "Run it; what it reads from its standard input is `data`."
    return subprocess.run([FFMPEG, "-v", "error", *args], input=data, capture_output=True)


def make(rng, folder):
    "A file of a random kind, rate and number of channels; None where ffmpeg makes none of that sort."
    name = rng.choice(list(KINDS))
    ending, options, most = KINDS[name]
    rate, channels = rng.choice(RATES), rng.randint(1, most)
    path, options = folder / f"a.{ending}", list(options)
    pipe = "PIPE" in options
    if pipe: options.remove("PIPE")
    target = ["-f", ending, "pipe:1"] if pipe else ["-y", str(path)]
    done = ffmpeg("-f", "f32le", "-ar", str(rate), "-ac", str(channels), "-i", "pipe:0", *options, *target, data=sound(rng, rate, channels).tobytes())
    if done.returncode: return None
    if pipe: path.write_bytes(done.stdout)
    return name, path, channels


def reference(path, name, channels):
    "What ffmpeg decodes, [frames, channels]; opus by the same library, for its own decoder rounds otherwise."
    done = ffmpeg(*["-c:a", "libopus"] * (name == "opus"), "-i", str(path), "-map", "0:a", "-f", "f32le", "-c:a", "pcm_f32le", "pipe:1")
    return np.frombuffer(done.stdout, "<f4").reshape(-1, channels)


def lie(rng, name, data):
    "One thing that headers say falsely: a length, a count, a placeholder, a tag, an end that is not there; and its name."
    data, at = bytearray(data), -1
    number = rng.choice([0, 1, 7, 1000, 0x7FFFFFFF, 0xFFFFFFFF])
    what = rng.choice(["length", "length", "length", "cut", "tag", "cover"])
    if what == "cut": return data[:rng.randrange(len(data) // 3, len(data))], what
    if what in ("tag", "cover") and "mp3" in name:
        size = 5000 if what == "cover" else 100
        return b"ID3\3\0\0" + bytes([0, 0, size >> 7, size & 127]) + bytes(size) + data, what
    for mark, shift, order in ((b"Xing", 8, "big"), (b"Info", 8, "big"), (b"SSND", 4, "big"), (b"data", 4, "little")):
        if name.startswith(("mp3", "aiff", "wav", "mu", "adpcm")) and (at := data.find(mark, 0, 4000)) >= 0: break
    if at >= 0: data[at + shift:at + shift + 4] = number.to_bytes(4, order)
    elif data[:4] == b"fLaC": data[22:26] = number.to_bytes(4, "big"); data[21] &= 0xF0
    elif data[:4] == b".snd": data[8:12] = number.to_bytes(4, "big")
    return data, what


def agrees(x, ref, name, cut):
    "The same samples, but for what ffmpeg does otherwise."
    # It counts a vorbis' last block otherwise, decodes an mp3 frame that is cut off, and is inexact in mp3 at 24 kHz.
    # One sample: the byte that pads a chunk of odd length, where the length is a placeholder.
    more, x = 2048 if name == "vorbis" else 1152 if name.startswith("mp") and cut else 1, x.numpy()
    if abs(len(ref) - len(x)) > more: return False
    n = min(len(x), len(ref))
    if name.startswith("mp"): return np.square(x[:n] - ref[:n]).sum() <= 0.01 * np.square(ref[:n]).sum() + 1e-6
    return float(np.abs(x[:n] - ref[:n]).max(initial=0)) < 1e-3


def one(rng, folder):
    "One file: what became of it."
    made = make(rng, folder)
    if made is None: return "not made"
    name, path, channels = made
    kind, ref = name, reference(path, name, channels)
    false = rng.random() < 0.5
    if false:
        data, what = lie(rng, name, path.read_bytes())
        path.write_bytes(data)
        name += f", false {what}"
        if what == "cut": ref = reference(path, kind, channels)  # else what the good file holds
    try:
        info = audio_info(path)
        c = rng.randrange(channels)
        x = load_audio(path, info["sample_rate"], channel=c)
    except AudioError as e:
        assert str(path) in str(e)  # the decoder refuses some flac in ogg, by name
        assert false or name == "flac in ogg", f"a good file was refused: {name}: {e}"
        return "refused"
    assert len(x) == info["frames"], name
    at, n = rng.uniform(0, 0.8) * info["seconds"], rng.uniform(0.02, 0.2)
    if len(x) < 100: at = 0.0
    start = round(at * info["sample_rate"])
    part = load_audio(path, info["sample_rate"], offset=at, duration=n, channel=c)
    assert (part - x[start:start + len(part)]).abs().max() < 1e-3, f"{name}: another part at {at}"
    assert agrees(x, ref[:, c], kind, "cut" in name), f"{name}: {len(x)} samples of {info}, ffmpeg has {len(ref)}"
    return "equal"


@needs_ffmpeg
@pytest.mark.parametrize("files, seed", [(60, 0), pytest.param(300, 1, marks=pytest.mark.slow)])
def test_files_are_read_as_ffmpeg_reads_them_or_refused(tmp_path, files, seed):
    rng, seen = random.Random(seed), dict(equal=0, refused=0)
    while sum(seen.values()) < files:
        what = one(rng, tmp_path)
        if what in seen: seen[what] += 1
    assert seen["equal"] > 0.6 * files and seen["refused"] > 0.02 * files, seen
