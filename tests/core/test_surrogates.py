import itertools
import math

import torch
from gaussian import denoiser, noises, rollout, schedule
from mira.sampler.surrogates import REGULARIZERS, SURROGATES, energies, prno


def test_all_are_zero_at_the_reference():
    run = rollout(D=denoiser(0.3, 0.5))
    reference = run(noises()).detach()
    for name, f in SURROGATES.items():
        assert f(run(noises()), reference).abs().max() == 0, name


def test_energy_is_the_score_energy():
    path = rollout()(noises())
    # w_t ||s||^2 with s = -eps / sqrt(1 - abar) and w_t = 1 - abar.
    one_minus_abar = [s**2 / (1 + s**2) for s in schedule()[:-1]]
    for e, eps, a in zip(energies(path), path.eps, one_minus_abar, strict=True):
        score = -eps / a.sqrt()
        torch.testing.assert_close(e, a * score.square().flatten(1).mean(1))


def test_a_shift_towards_the_reward_raises_the_energy():
    """The sign question: data N(0, 1), every noise shifted by h / 2; S0 - S falls, so the penalty rewards drift."""
    run = rollout(100)
    z0 = noises(100, batch=8)
    reference = run(z0).detach()
    values = []
    for h in (0.1, 0.3, 0.6):
        path = run([z + h for z in z0])
        values.append(SURROGATES["mira"](path, reference).mean().item())
        assert path.x0.mean() > reference.x0.mean()
    assert 0 > values[0] > values[1] > values[2]


def test_path_kl_is_the_kl_of_the_gaussian_paths():
    z0, h = noises(), 0.4
    run = rollout()
    value = SURROGATES["path_kl"](run([z + h for z in z0]), run(z0).detach())
    # KL(N(h, 1) || N(0, 1)) = h^2 / 2 per element and noise; the norm is a mean over elements.
    torch.testing.assert_close(value, torch.full((2,), len(z0) * h**2 / 2, dtype=torch.float64))


def test_score_distance_of_a_shift_is_closed_form():
    # Linear: eps_hat(x) - eps_hat(x') = sigma / (1 + sigma^2) (x - x'), and only z_T is moved, by h.
    run, z0, h = rollout(), noises(), 0.3
    value = SURROGATES["score_distance"](run([z0[0] + h, *z0[1:]]), run(z0).detach())
    s = schedule()
    delta, total = h * (1 + s[0] ** 2).sqrt(), 0.0
    for a, b in itertools.pairwise(s):
        total += (a / (1 + a**2) * delta) ** 2
        up = (b**2 * (a**2 - b**2) / a**2).sqrt()
        down = (b**2 - up**2).sqrt()
        delta = delta * (1 + (down - a) * a / (1 + a**2)) if b > 0 else delta / (1 + a**2)
    torch.testing.assert_close(value, total.expand(2))


def test_two_sided_penalises_both_directions():
    run, z0 = rollout(), noises()
    reference = run(z0).detach()
    for factor in (0.8, 1.2):
        assert (SURROGATES["mira_two_sided"](run([z * factor for z in z0]), reference) > 0).all()
    signs = [SURROGATES["mira"](run([z * f for z in z0]), reference).sign() for f in (0.8, 1.2)]
    assert (signs[0] == -signs[1]).all()


def transcribed_prno(z: list[float], k: int, orders: list[list[int]]) -> float:
    """PRNO of one image, number by number."""

    def log_p(values):
        m = len(values) // k
        rows = [values[i * k : (i + 1) * k] for i in range(m)]
        mean = [sum(r[j] for r in rows) / m for j in range(k)]
        m1 = math.sqrt(sum(v * v for v in mean))
        cov = torch.tensor(
            [[sum(r[i] * r[j] for r in rows) / m - (i == j) for j in range(k)] for i in range(k)], dtype=torch.float64
        )
        m2 = torch.linalg.eigvalsh(cov).abs().max().item()
        logp1 = min(-m * m1**2 / (2 * k), -math.log(2))
        logp2 = min(-m * max(math.sqrt(1 + m2) - 1 - math.sqrt(k / m), 0) ** 2 / 2, -math.log(2))
        return logp1 + logp2

    return -log_p(z) - sum(log_p([z[i] for i in order]) for order in orders) / len(orders)


def test_prno_is_its_formula():
    run = rollout(8)
    for scale, shift in ((1.0, 0.0), (2.5, 1.5)):
        z = [n * scale + shift for n in noises(8)]
        path = run(z)
        flat = torch.cat([n.flatten(1) for n in z], 1)
        g = torch.Generator().manual_seed(0)
        orders = [torch.randperm(flat.shape[1], generator=g).tolist() for _ in range(5)]
        expected = [transcribed_prno(row.tolist(), 4, orders) for row in flat]
        torch.testing.assert_close(prno(path, path, permutations=5), torch.tensor(expected, dtype=torch.float64))
    assert expected[0] > 10  # the second case is far out: the bound is not at its floor of 4 log 2


def test_prno_of_white_noise_is_at_its_floor():
    path = rollout(40)(noises(40))
    torch.testing.assert_close(
        prno(path, path, permutations=10), torch.full((2,), 4 * math.log(2), dtype=torch.float64), atol=1.5, rtol=0
    )


def test_tables_hold_what_the_nodes_offer():
    assert set(REGULARIZERS) == {
        "mira",
        "mira_two_sided",
        "score_distance",
        "path_kl",
        "latent_distance",
        "prno",
        "chi",
        "none",
    }
