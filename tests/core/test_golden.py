"""Golden Noise: the arithmetic of its network, and its published file format on a small file."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from mira.sampler import golden

SIDE, TOKENS, WIDTH = 16, 77, 8


def network(seed: int = 0) -> golden.GoldenNoise:
    torch.manual_seed(seed)
    net = golden.GoldenNoise(SIDE, TOKENS * WIDTH, hidden=24, width=32, depths=(1, 1, 2, 1), classes=3).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def published(net: golden.GoldenNoise, text: str = "embeeding") -> dict:
    """As the authors' training saves it."""
    state = net.state_dict()

    def part(prefix):
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    parts = {"unet_svd": part("unet_svd."), "unet_embedding": part("unet_embedding."), text: part("text.")}
    return parts | {"alpha": state["alpha"][0], "beta": torch.nn.Parameter(state["beta"])}


def drawn(batch: int = 2):
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, SIDE, SIDE, generator=g), torch.randn(batch, TOKENS, WIDTH, generator=g)


@torch.no_grad()
def test_a_network_that_moves_nothing_gives_the_noise_back():
    net = network()
    net.alpha.zero_()
    net.beta.zero_()
    for p in net.unet_svd.mlp4[2].parameters():
        p.zero_()
    noise, prompt = drawn()
    torch.testing.assert_close(net(noise, prompt), noise, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_it_is_the_published_formula():
    net = network()
    noise, prompt = drawn()
    svd = net.unet_svd
    u, s, v = torch.linalg.svd(rearrange(noise, "b (a c) h w -> b (a h) (c w)", a=2, c=2))
    told = svd.mlp1(u.permute(0, 2, 1)) + svd.mlp2(v) + svd.mlp3(s).unsqueeze(1)
    q, k, w = svd.attention.qkv(told).reshape(2, 32, 3, 8, 4).permute(2, 0, 3, 1, 4).unbind(0)
    seen = ((q @ k.transpose(-2, -1) / 2).softmax(-1) @ w).transpose(1, 2).reshape(2, 32, 32)
    moved = u @ torch.diag_embed(svd.mlp4(svd.attention.proj(seen).mean(1)) + s) @ v
    moved = rearrange(moved, "b (a h) (c w) -> b (a c) h w", a=2, c=2)
    scale, shift = net.text["linear"](prompt.reshape(2, -1)).reshape(2, 2, 4, 1, 1).unbind(1)
    normal = (noise - noise.mean((1, 2, 3), True)) / (noise.var((1, 2, 3), False, True) + 1e-6).sqrt()
    text = normal * (1 + scale) + shift
    swin = net.unet_embedding
    features = swin.swin.forward_features(swin.downconv(torch.nn.functional.interpolate(noise + text, [224, 224])))
    assert features.shape == (2, 7, 7, 256)
    embedded = swin.upconv(torch.nn.functional.interpolate(features, [SIDE, SIDE]))
    expected = moved + (2 * torch.sigmoid(net.alpha) - 1) * text + net.beta * embedded
    torch.testing.assert_close(net(noise, prompt), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", golden.TEXT)
def test_the_published_layout_is_read(tmp_path, text):
    net, (noise, prompt) = network(), drawn()
    torch.save(published(net, text), tmp_path / "sdxl.pth")
    read = golden.load(tmp_path / "sdxl.pth")
    assert not any(p.requires_grad for p in read.parameters()) and not read.training
    with torch.no_grad():
        assert torch.equal(read(noise, prompt), net(noise, prompt))
    older = published(net, text)
    older["unet_embedding"]["swin.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    torch.save(older, tmp_path / "older.pth")
    assert golden.load(tmp_path / "older.pth").side == SIDE


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"x\.pth cannot be read as weights"):
        golden.load(path)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"x\.pth is no golden noise network"):
        golden.load(path)
    parts = published(network())
    del parts["unet_svd"]["mlp2.0.weight"]
    torch.save(parts, path)
    with pytest.raises(ValueError, match=r"x\.pth is damaged, or of another version"):
        golden.load(path)


def test_another_size_is_refused():
    net, (noise, prompt) = network(), drawn()
    with pytest.raises(ValueError, match=r"latents of 4 x 16 x 16 \(128 px\), not 4 x 16 x 8"):
        net(noise[..., :8], prompt)
    with pytest.raises(ValueError, match=r"77 tokens of 8\), not 154 x 8"):
        net(noise, prompt.repeat(1, 2, 1))
