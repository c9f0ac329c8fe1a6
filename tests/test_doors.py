"""The doors as the tools behind them see them: HEAR's rules, EVAR's calls, s3prl's lengths, timm's names, ONNX's numbers."""
import json
import sys
import types
import warnings

import numpy as np
import pytest
import torch

from aasp_nb import doors
from aasp_nb.runs import CheckpointError


@pytest.fixture(scope="module")
def hear():
    return doors.load_model(doors.DEMO)


def noise(n, seconds, rate=16000):
    return torch.rand((n, int(seconds * rate)), generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("seconds", [0.03, 1.07, 1.98, 4.0])
def test_hear_timestamps(hear, seconds):
    "The rules of hear-validator: shapes, types, even spacing, from the beginning to the end and not beyond."
    audio = noise(2, seconds)
    e, t = doors.get_timestamp_embeddings(audio, hear)
    assert isinstance(hear, torch.nn.Module) and hear.sample_rate in (16000, 22050, 44100, 48000)
    assert type(hear.timestamp_embedding_size) is int and type(hear.scene_embedding_size) is int
    assert e.dtype == torch.float32 and e.ndim == 3 and t.ndim == 2 and t.shape == e.shape[:2]
    assert e.shape[0] == 2 and e.shape[2] == hear.timestamp_embedding_size and e.isfinite().all()
    assert 0 <= t.min() and t.max() <= 1000 * seconds
    step = t.diff(dim=1)
    if step.numel():
        assert step.max() <= 50 and (step - step.mean()).abs().max() < 1
        assert t.min() <= step.mean() and t.max() >= 1000 * seconds - step.mean()


def test_hear_scene(hear):
    audio = noise(4, 2.74)
    e = doors.get_scene_embeddings(audio, hear)
    assert e.dtype == torch.float32 and e.shape == (4, hear.scene_embedding_size)
    alone = torch.cat([doors.get_scene_embeddings(a[None], hear) for a in audio])
    assert torch.allclose(e, alone, atol=1e-5)


def test_hear_validator(hear, monkeypatch):
    "The validator itself, where it is installed; it imports TensorFlow only to recognise TensorFlow's models."
    if "tensorflow" not in sys.modules:
        stub = types.ModuleType("tensorflow")
        stub.Module = type("Module", (), {})
        monkeypatch.setitem(sys.modules, "tensorflow", stub)
    validate = pytest.importorskip("hearvalidator.validate", reason="SKIPPED: hearvalidator is not installed (pip install --no-deps hearvalidator)")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        validate.ValidateModel("aasp_nb.doors", str(doors.DEMO), "cpu")()
    assert not [w for w in said if "timestamp" in str(w.message) and "IMPORTANT" not in str(w.message)]


def test_evar_pipeline(tmp_path, monkeypatch):
    "What EVAR's linear evaluation does with the written files: import, build from YAML, precompute, embed batches."
    yaml = pytest.importorskip("yaml")
    (tmp_path / "evar").mkdir(), (tmp_path / "config").mkdir()
    (tmp_path / "evar" / "__init__.py").touch()
    doors.evar_files(tmp_path, doors.DEMO)
    for name in [n for n in sys.modules if n.split(".")[0] == "evar"]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    import evar.ar_aasp  # noqa: F401
    cfg = types.SimpleNamespace(**yaml.safe_load((tmp_path / "config" / "aasp.yaml").read_text()))
    ar = eval("evar." + cfg.audio_repr)(cfg).to("cpu")
    batches = [(noise(3, 1.0), torch.arange(3)), (noise(2, 1.0), torch.arange(2))]
    ar.precompute("cpu", batches)
    ar.eval()
    with torch.no_grad(): out = torch.vstack([torch.nn.DataParallel(ar)(x).detach().cpu() for x, _ in batches])
    assert out.shape == (5, cfg.feature_d) and torch.allclose(out[:2], out[3:], atol=1e-5)
    frames = ar.encode_frames(batches[0][0])
    assert frames.shape[0] == 3 and frames.shape[2] == 7  # [B, D, T]
    for name in [n for n in sys.modules if n.split(".")[0] == "evar"]: sys.modules.pop(name)


@pytest.mark.parametrize("lengths", [(400,), (16000, 2560), (2561, 47000, 16000)])
def test_s3prl_lengths(lengths):
    "s3prl expects ceil(longest / rate) rows in every layer, equal widths, and rows that do not depend on the batch."
    upstream = doors.UpstreamExpert(doors.DEMO).eval()
    rate, wavs = upstream.get_downsample_rates("hidden_states"), [noise(1, 4)[0, :n] for n in lengths]
    with torch.no_grad(): out = upstream(wavs)
    states = out["hidden_states"]
    assert isinstance(states, (list, tuple)) and len({h.shape for h in states}) == 1
    assert states[0].shape[:2] == (len(lengths), len(range(0, max(lengths), rate)))
    with torch.no_grad(): alone = upstream(wavs[:1])["hidden_states"]
    for a, b in zip(alone, states): assert torch.allclose(a[0], b[0, :a.shape[1]], atol=1e-5)


def test_s3prl_hub(monkeypatch):
    "`register_s3prl` enters the upstream under its name."
    package, hub = types.ModuleType("s3prl"), types.ModuleType("s3prl.hub")
    package.hub = hub
    monkeypatch.setitem(sys.modules, "s3prl", package), monkeypatch.setitem(sys.modules, "s3prl.hub", hub)
    doors.register_s3prl()
    assert isinstance(hub.aasp(ckpt=str(doors.DEMO), refresh=False), doors.UpstreamExpert)


def test_timm_finetunes_a_checkpoint():
    "Create with weights and a head, one step of training, features change with it."
    import timm
    model = timm.create_model("aasp_tiny", checkpoint=str(doors.DEMO), num_classes=3)
    x, y = torch.randn(4, 1, *model.pretrained_cfg["input_size"][1:]), torch.tensor([0, 1, 2, 0])
    before = model(x)
    torch.nn.functional.cross_entropy(before, y).backward()
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking, lacking
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None: p -= 0.01 * p.grad
    assert torch.nn.functional.cross_entropy(model(x), y) < torch.nn.functional.cross_entropy(before, y)


@pytest.mark.parametrize("door", [doors.load_model, doors.UpstreamExpert, lambda p: doors.make_timm("tiny", checkpoint=p)])
def test_no_checkpoint_there(door, tmp_path):
    with pytest.raises(CheckpointError): door(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("patch_embed", ["aape", "standard"])
def test_onnx(patch_embed, tmp_path):
    "The exported file gives the same tokens in ONNX Runtime, for other batches and lengths; torch is left as it was."
    for name in ("onnx", "onnxscript", "onnxruntime"): pytest.importorskip(name, reason=f"SKIPPED: no {name} (pip install {name})")
    import onnxruntime
    if patch_embed == "aape": model = doors.open_encoder(doors.DEMO)
    else:
        config = doors.AaSPConfig.preset("tiny", patch_embed="standard", embed_dim=32, depth=2, num_heads=2)
        torch.manual_seed(0)
        model = doors.AaSPEncoder(doors.build_encoder(config), config)
    shapes = ((1, 16), (3, 48), (1, 128), (2, 208))
    inputs = [torch.randn(b, 128, t, generator=torch.Generator().manual_seed(t)) for b, t in shapes]
    with torch.no_grad(): wants = [model(x) for x in inputs]
    path = doors.export_onnx(model, tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["aasp_config"])["norm_mean"] == model.config.norm_mean
    for x, want in zip(inputs, wants):
        got = session.run(None, {"logmel": x.numpy()})[0]
        assert np.abs(got - want.numpy()).max() < 1e-3 * want.abs().max(), x.shape
        with torch.no_grad(): assert torch.equal(model(x), want), "the export changed the model in torch"
