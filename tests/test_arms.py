"""Every arm of the comparison inside an encoder: whole clips, views, padding, weights kept and read back."""
import pytest
import torch

from aasp_nb.arms import ARMS, FixedBank, HighpassOnly, PatchArm, StandardPatchEmbed
from aasp_nb.encoder import AudioViT

SMALL = dict(img_size=(32, 96), embed_dim=32)
BRANCH = dict(sblu_hidden=4, sblu_dim=8)
LAMBDA = dict(lambda_dim=16, lambda_depth=1, lambda_heads=1)


def encoder(name, seed=0):
    "A ViT of one block on an arm of small sizes."
    kind, more = ARMS[name]
    sizes = {} if issubclass(kind, PatchArm) or kind is StandardPatchEmbed else BRANCH
    if sizes and kind not in (HighpassOnly, FixedBank): sizes = BRANCH | LAMBDA
    torch.manual_seed(seed)
    return AudioViT(kind(**SMALL, **sizes, **more), 32, 1, 2)


@pytest.mark.parametrize("name", ARMS)
def test_inside_an_encoder(name):
    x, vit = torch.randn(3, 32, 96, generator=torch.Generator().manual_seed(0)), encoder(name)
    views = torch.rand(3, 2, 12, generator=torch.Generator().manual_seed(1)).argsort(-1)[..., :5]
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    vit(x, views, padding)[:, :, 0].square().sum().backward()  # as in pre-training
    vit.eval()
    with torch.no_grad():
        first = vit(x)
        assert first.shape == (3, 13, 32) and vit(x[..., :48]).shape == (3, 7, 32)
        assert vit(x, views, padding).isfinite().all() and vit(x, padding=padding).isfinite().all()
        other = encoder(name, seed=1).eval()
        assert not torch.allclose(other(x), first)
        other.load_state_dict(vit.state_dict())
        torch.testing.assert_close(other(x), first)


@pytest.mark.parametrize("name", ["lowpass", "overlap", "polyphase", "standard_equal"])
def test_padding_does_not_reach_the_tokens_before_it(name):
    x, embed = torch.randn(2, 32, 96, generator=torch.Generator().manual_seed(0)), encoder(name).patch_embed.eval()
    louder = x.clone()
    louder[..., 64:] = 7.0
    a, b = (embed(v, padding=torch.tensor([4, 4])).unflatten(1, (2, 6))[:, :, :4] for v in (x, louder))
    torch.testing.assert_close(a, b)
    assert name == "standard_equal" or not torch.allclose(embed(x).unflatten(1, (2, 6))[:, :, :4], a, atol=1e-3)
