"""Training on a GPU: what only shows there. Imports no more than a machine with PyTorch and a few wheels has."""
from copy import deepcopy

import pytest
import torch

from aasp_nb import loop, pretraining
from aasp_nb.patch_embed import AaPE
from aasp_nb.config import AaSPConfig, draw_masks


@pytest.fixture
def no_waiting():
    "Inside, an operation that waits for the GPU is an error."
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_no_step_waits_for_the_gpu(request):
    learner = pretraining.build_learner(AaSPConfig.preset("tiny", batch_size=4, crop_seconds=1.0, norm_measure=False), "cuda")
    batch = dict(wave=(torch.randn(4, 16000) * 0.1).pin_memory(), valid_samples=torch.full((4,), 12000), index=torch.arange(4))
    for s in range(3): learner.step(batch, s)
    request.getfixturevalue("no_waiting")
    window = loop.Window()
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


@pytest.mark.cuda
@pytest.mark.parametrize("kind", (dict(), dict(phase="signed"), dict(adaptive=False), dict(norm_scope="patch"), dict(mask_input=True)))
def test_the_patch_embedding_is_the_same_on_a_gpu(kind):
    torch.manual_seed(0)
    embed, x = AaPE(img_size=(32, 96), embed_dim=32, sblu_hidden=4, sblu_dim=8, lambda_dim=16, **kind), torch.randn(2, 32, 96)
    if kind.get("adaptive", True): torch.nn.init.normal_(embed.lambda_encoder.expand.weight, std=0.5)  # so that patches differ
    for visible in (None, torch.rand(2, 3, 12).argsort(-1)[..., :5]):
        there = deepcopy(embed).cuda()
        a, b = embed(x, visible), there(x.cuda(), None if visible is None else visible.cuda())
        torch.testing.assert_close(b.cpu(), a, rtol=0, atol=1e-3)
        embed.zero_grad()
        a.square().mean().backward()
        b.square().mean().backward()
        for p, q in zip(embed.parameters(), there.parameters()):
            if p.requires_grad: torch.testing.assert_close(q.grad.cpu(), p.grad, rtol=1e-2, atol=1e-4)
