"""A decoder's own backward passes: PyTorch's gradients, with less kept."""

from functools import partial

import pytest
import torch
from comfy.ldm.modules.diffusionmodules.model import Decoder
from mira.nodes.host import backwards
from mira.nodes.host.backwards import OwnBackwards
from mira.sampler.memory import offloaded, saved_bytes
from torch.nn.functional import scaled_dot_product_attention


@pytest.fixture(scope="module")
def decoder():
    """Of Stable Diffusion's proportions."""
    torch.manual_seed(0)
    sizes = {"ch": 32, "ch_mult": (1, 2, 4, 4), "num_res_blocks": 2, "attn_resolutions": (), "z_channels": 4}
    decoder = Decoder(out_ch=3, in_channels=3, resolution=64, **sizes).requires_grad_(False)
    for p in decoder.parameters():
        torch.nn.init.normal_(p, 0, 0.05)
    return decoder


def gradient(decode, z):
    z = z.requires_grad_()
    out = decode(z)
    return torch.autograd.grad(out.square().sum(), z)[0], out


def within(context, decode):
    def inside(z):
        with context():
            return decode(z)

    return inside


def test_a_decoder_keeps_less_for_the_same_gradient(decoder):
    z, own = torch.randn(2, 4, 8, 8), within(OwnBackwards, decoder)
    (theirs, image), (ours, same) = (gradient(decode, z) for decode in (decoder, own))
    assert torch.equal(ours, theirs) and torch.equal(image, same)
    assert saved_bytes(own, z) < 0.7 * saved_bytes(decoder, z)
    moved, _ = gradient(within(offloaded, own), z)
    assert torch.equal(moved, theirs)


@pytest.mark.parametrize(
    "layer",
    [
        partial(torch.nn.Conv2d, 4, 6, 3, stride=2, padding=1, bias=False),
        partial(torch.nn.Conv2d, 4, 6, 3, padding="same"),
        partial(torch.nn.Conv2d, 4, 6, 3, padding=1, padding_mode="reflect", groups=2),
        partial(torch.nn.Conv3d, 4, 6, (1, 3, 3), padding=(0, 1, 1), dilation=(1, 1, 1)),
    ],
)
def test_of_every_convolution(layer):
    layer = layer().requires_grad_(False)
    x = torch.randn(2, 4, *[5] * (layer.weight.ndim - 2))
    assert torch.equal(gradient(within(OwnBackwards, layer), x)[0], gradient(layer, x)[0])


def test_what_is_not_usual_stays_pytorchs():
    layer, x = torch.nn.Conv2d(4, 6, 3).requires_grad_(False), torch.randn(4, 5, 5)  # without a batch
    assert torch.equal(gradient(within(OwnBackwards, layer), x)[0], gradient(layer, x)[0])
    with torch.autocast("cpu"):
        out = within(OwnBackwards, layer)(x[None].requires_grad_())
    assert "_Convolution" not in type(out.grad_fn).__name__


def test_a_weight_that_learns_still_does():
    layer, x = torch.nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5, requires_grad=True)
    with OwnBackwards():
        layer(x).square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype, off", [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_attention_in_pieces_of_the_queries(monkeypatch, dtype, off):
    monkeypatch.setattr(backwards, "_one_processor", lambda q: q.shape[-1] > 16)  # as on a card that has to repeat
    monkeypatch.setattr(backwards, "QUERIES", 32)
    inputs = [torch.randn(2, 1, 75, 24, dtype=dtype, requires_grad=True) for _ in range(3)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    with OwnBackwards():
        out = scaled_dot_product_attention(*inputs, attn_mask=None, dropout_p=0.0, is_causal=False)
    assert "_Attention" in type(out.grad_fn).__name__
    found = torch.autograd.grad(out.sin().sum(), inputs)
    known = torch.autograd.grad(scaled_dot_product_attention(*exact).sin().sum(), exact)
    for ours, theirs in zip(found, known, strict=True):
        assert ours.dtype == dtype and (ours - theirs).norm() < off * theirs.norm()
    assert torch.equal(out, scaled_dot_product_attention(*inputs))


def test_other_attention_stays_pytorchs(monkeypatch):
    monkeypatch.setattr(backwards, "_one_processor", lambda q: True)
    q = torch.randn(1, 1, 8, 4, requires_grad=True)
    for more in ({"is_causal": True}, {"attn_mask": torch.zeros(8, 8)}, {"scale": 0.1}):
        with OwnBackwards():
            assert "_Attention" not in type(scaled_dot_product_attention(q, q, q, **more).grad_fn).__name__
