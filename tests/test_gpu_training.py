"""Training on a GPU: what only shows there. Imports no more than a machine with PyTorch and a few wheels has."""
import pytest
import torch

from aasp_nb import training
from aasp_nb.patch_embed import AaPE
from aasp_nb.pretraining import AaSPConfig, draw_masks


@pytest.fixture
def no_waiting():
    "Inside, an operation that waits for the GPU is an error."
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_no_step_waits_for_the_gpu(request):
    learner = training.AaSPLearner(AaSPConfig.preset("tiny", batch_size=4, crop_seconds=1.0, norm_measure=False), "cuda")
    batch = dict(wave=(torch.randn(4, 16000) * 0.1).pin_memory(), valid_samples=torch.full((4,), 12000), index=torch.arange(4))
    for s in range(3): learner.step(batch, s)
    request.getfixturevalue("no_waiting")
    window = training.Window()
    for s in range(3, 8): window.add(s, learner.step(batch, s), batch["index"])
    torch.cuda.set_sync_debug_mode("default")
    assert window.flush()[0]["loss"] > 0


@pytest.mark.cuda
@pytest.mark.parametrize("kind", (dict(), dict(adaptive=False), dict(norm_scope="patch"), dict(mask_input=True)))
def test_the_patch_embedding_does_not_wait_for_the_gpu(kind, request):
    embed, x = AaPE(img_size=(128, 208), embed_dim=192, **kind).cuda(), torch.randn(2, 128, 208, device="cuda")
    masks = draw_masks(AaSPConfig.preset("tiny"), 2).to("cuda")
    embed(x, masks.visible).square().sum().backward()  # compiles what compiles
    request.getfixturevalue("no_waiting")
    embed(x, masks.visible).square().sum().backward()
    torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.isfinite().all() for p in embed.parameters() if p.requires_grad)
