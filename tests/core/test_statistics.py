import math

import pytest
import torch
from mira.sampler.statistics import (
    cmmd,
    expected,
    noise_statistics,
    pareto,
    spectral_distance,
    spectrum,
    spread,
)
from mira.sampler.trace import Trace


def noise(seed=0, batch=4):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 4, 16, 16, generator=g) for _ in range(6)]


def test_gaussian_noise_lies_in_its_ranges():
    z = noise()
    ranges = expected(z)
    for name, values in noise_statistics(z).items():
        low, high = ranges[name]
        assert all(low <= v <= high for v in values), name


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda z: z * 1.2, "norm"),
        (lambda z: z + 0.1, "mean"),
        (lambda z: z * 1.2, "deviation"),
        (lambda z: z + 0.2 * (z**2 - 1), "skewness"),
        (lambda z: z + 0.1 * z**3, "kurtosis"),
        (lambda z: (z + z.roll(1, -1)) / math.sqrt(2), "whiteness"),
    ],
)
def test_what_is_no_gaussian_noise_falls_out(change, name):
    z = noise()
    low, high = expected(z)[name]
    assert all(not low <= v <= high for v in noise_statistics([change(n) for n in z])[name])


def test_the_spectrum_of_white_noise_is_flat_and_a_constants_is_not():
    flat = spectrum(torch.randn(64, 4, 32, 32, generator=torch.Generator().manual_seed(0))).mean(0)
    torch.testing.assert_close(flat, torch.ones_like(flat), atol=0.2, rtol=0)  # the lowest octave has few frequencies
    constant = spectrum(torch.ones(1, 1, 16, 16))[0]
    assert constant[0] > 10 and constant[1:].max() < 1e-6


def reference_cmmd(x, y):
    """Written out from the paper's formula, pair by pair, as its reference implementation scales it."""
    gamma, scale = 1 / (2 * 10**2), 1000

    def mean(a, b):
        return sum(math.exp(-gamma * sum((p - q) ** 2 for p, q in zip(u, v, strict=True))) for u in a for v in b) / (
            len(a) * len(b)
        )

    return scale * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_cmmd_is_the_formulas():
    g = torch.Generator().manual_seed(0)
    x, y = (
        torch.nn.functional.normalize(torch.randn(n, 12, generator=g).double() + s, dim=1) for n, s in ((7, 0), (5, 1))
    )
    assert cmmd(x, y) == pytest.approx(reference_cmmd(x.tolist(), y.tolist()), rel=1e-6)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="CMMD compares two sets of images, but has 1 and 5"):
        cmmd(x[:1], y)


def test_the_spectral_distance_sees_variety_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    y = torch.randn(6, 9, generator=g)
    turn = torch.linalg.qr(torch.randn(9, 9, generator=g))[0]
    assert spectral_distance(y @ turn + 3, y) == pytest.approx(0, abs=1e-5)
    assert spectral_distance(y[:1].expand(6, -1), y) == pytest.approx(1)
    # Halved deviations have a quarter of every eigenvalue.
    assert spectral_distance(y / 2, y) == pytest.approx(3 / 4, rel=1e-5)
    # By hand, in two dimensions: variances (2, 0.5) against (0.5, 8).
    x = torch.tensor([[2.0, 0], [-2, 0], [0, 1], [0, -1], [0, 0]])
    z = torch.tensor([[1.0, 0], [-1, 0], [0, 4], [0, -4], [0, 0]])
    assert spectral_distance(x, z) == pytest.approx(math.hypot(2 - 8, 0.5 - 0.5) / math.hypot(8, 0.5))
    assert spectral_distance(torch.cat([x, x + 9]), z) == spectral_distance(x, z)  # as many of each
    for few in (x[:2], z[:2]):
        with pytest.raises(ValueError, match="at least 3 of each"):
            spectral_distance(few, z)
    assert math.isnan(spectral_distance(x, z[:1].expand(5, -1)))


def test_pareto_front():
    points = [(0.0, 0.0), (1.0, 2.0), (1.0, 1.0), (2.0, 1.5), (3.0, 3.0), (math.nan, 9.0)]
    assert pareto(points) == [0, 1, 4]


def test_spread():
    x = torch.eye(3)
    assert spread(x).tolist() == pytest.approx([math.sqrt(2)] * 3)
    with pytest.raises(ValueError, match="give 3 or more"):
        spread(x[:2])


def test_a_trace_comes_back_from_csv():
    rows = [{"iteration": k, "image": b, "reward": 0.1 * k, "path_kl": 0.5} for k in range(3) for b in range(2)]
    trace = Trace({}, rows, [1, 2], ["a", "b"])
    back = Trace.from_csv(trace.to_csv())
    assert back.rows == rows and back.kept == [2, 2] and "CSV" in back.notices[0]
    below, long = "iteration,image\n0,-1\n", f"iteration,image,reward\n0,0,{'9' * 200_000}\n"
    for text in ("", "a,b\n1,2\n", "iteration,image,reward\n0,0,x\n", below, long):
        with pytest.raises(ValueError, match="CSV"):
            Trace.from_csv(text)
