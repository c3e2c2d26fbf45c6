import contextlib
import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from gaussian import ancestral, ddim, denoiser, noises, rollout, schedule
from mira.sampler.memory import offloaded, out_of_memory, saved_bytes
from mira.sampler.rollout import NotTheSame, Rollout, draw, mean_square
from mira.sampler.selftest import check
from mira.sampler.surrogates import REGULARIZERS, energies


def leaves(z):
    return [n.clone().requires_grad_() for n in z]


def test_plain_sample_and_replay_are_the_same_bits():
    s = schedule()
    sample = ancestral(denoiser(0.3, 0.7), s)
    torch.manual_seed(5)
    x0, z = draw(sample, noises(1)[0])
    assert len(z) == 6
    path = Rollout(sample, s)(z)
    assert torch.equal(path.x0, x0)


def test_eps_hat_is_the_exact_score():
    z = noises()
    path = rollout(D=denoiser(0.5, 2.0))(z)
    # Recover x_t from eps_hat and the closed form: eps = sigma (x - mean) / (std^2 + sigma^2).
    x_T = z[0] * (1 + path.sigmas[0][0] ** 2).sqrt()
    sigma = path.sigmas[0][0]
    torch.testing.assert_close(path.eps[0], sigma * (x_T - 0.5) / (4 + sigma**2))


def test_ddim_eta_1_is_euler_ancestral():
    s, z = schedule(), noises()
    a = Rollout(ancestral(denoiser(0.5, 0.8), s), s)(z)
    b = Rollout(ddim(denoiser(0.5, 0.8), s), s)(z)
    torch.testing.assert_close(a.x0, b.x0)
    for left, right in zip(a.eps, b.eps, strict=True):
        torch.testing.assert_close(left, right)


def test_flow_coordinates_give_the_same_eps_hat():
    # x_t = (1 - t) x0 + t eps is x / (1 + s) of the variance-exploding x, with s = t / (1 - t).
    D = denoiser(0.5, 0.8)
    x = noises(1)[0]
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    s = t / (1 - t)

    def one_call(x, source, wrap):
        return wrap(lambda y, tt: D(y / (1 - tt.view(-1, 1, 1, 1)), tt / (1 - tt)))(x, t)

    flow = Rollout(one_call, torch.tensor([0.8, 0.0], dtype=torch.float64), signal=lambda t: 1 - t)(
        [x * (1 - t.view(-1, 1, 1, 1))]
    )
    expected = (x - D(x, s)) / s.view(-1, 1, 1, 1)
    torch.testing.assert_close(flow.eps[0], expected)
    torch.testing.assert_close(flow.sigmas[0], s)


def test_transition_weights():
    path = rollout(weighting="transition")(noises())
    s = schedule()
    for w, a, b in zip(path.weights, s[:-1], s[1:], strict=True):
        abar, abar_next = 1 / (1 + a**2), 1 / (1 + b**2)
        variance = (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)
        torch.testing.assert_close(w, (variance / (1 - abar)).expand(2))


@pytest.mark.parametrize("name", [*REGULARIZERS])
def test_gradcheck_of_every_noise(name):
    run = rollout(4, D=denoiser(0.3, 0.6))
    z = leaves(noises(4))
    reference = run(noises(4, seed=7)).detach()
    f = REGULARIZERS[name]
    kwargs = {"permutations": 3} if name == "prno" else {}
    assert torch.autograd.gradcheck(lambda *z: f(run(z), reference, **kwargs) + run(z).x0.square().flatten(1).sum(1), z)


@pytest.mark.parametrize("memory", ["per_step", "per_block", "offload", "auto"])
def test_checkpointed_gradients_are_the_unchecked_ones(memory):
    def gradients(memory):
        z = leaves(noises())
        path = rollout(memory=memory, D=denoiser(0.3, 0.6))(z)
        return torch.autograd.grad(path.x0.sin().sum() + energies(path).sum(), z)

    for a, b in zip(gradients("none"), gradients(memory), strict=True):
        assert torch.equal(a, b)


def test_auto_takes_the_fastest_policy_that_fits():
    weight = torch.nn.Parameter(torch.randn(12, 12, dtype=torch.float64), requires_grad=False)

    def D(x, sigma):
        return ((x.flatten(1) @ weight).tanh() @ weight).tanh().view_as(x)

    x = noises(1)[0]
    step = saved_bytes(lambda x: D(x, None), x)
    assert step == 2 * 2 * 12 * 8  # two tanh outputs of (2, 12) in float64; the weight is not counted
    for room, policy in ((step * 20, "none"), (step * 4, "per_step"), (step, "per_block")):
        run = rollout(memory="auto", D=D, free_bytes=lambda room=room: room, blocks=contextlib.nullcontext)
        run(leaves(noises()))
        assert run.memory == policy
        assert run.estimate.step == (step if policy != "per_block" else math.inf) and run.estimate.free == room
    assert run.shrink() and run.memory == "per_block" and run.score_offloaded
    assert run.shrink() and run.memory == "offload" and run.shrink() is False
    run = rollout(memory="auto", D=D, free_bytes=lambda: step)
    run(leaves(noises()))
    assert run.memory == "offload" and run.shrink() is False  # no blocks to checkpoint
    run = rollout(memory="auto", D=D, free_bytes=lambda: step * 20, score_bytes=lambda x, most: step * 13)
    run(leaves(noises()))
    assert run.memory == "per_step" and run.shrink() and run.memory == "per_step" and run.score_offloaded
    assert run.shrink() and run.memory == "offload"


def test_where_the_blocks_inputs_fit_no_step_is_computed_again():
    D, calls = denoiser(), []

    def counted(x, sigma):
        calls.append(1)
        return D(x, sigma)

    def forward_passes(free: float) -> int:
        calls.clear()
        run = rollout(memory="per_block", D=counted, free_bytes=lambda: free, blocks=contextlib.nullcontext)
        run(leaves(noises())).x0.sum().backward()
        return len(calls)

    steps = len(noises()) - 1
    plenty, little = forward_passes(1e12), forward_passes(1.0)
    assert plenty - 1 < little - 1 == 2 * (plenty - 1)  # one more to measure it
    assert plenty - 1 >= steps
    run = rollout(memory="per_block", D=D, free_bytes=lambda: 1e12, blocks=contextlib.nullcontext)
    run(leaves(noises()))
    assert [run.shrink() for _ in range(4)] == [True, True, True, False] and run.memory == "offload"


def test_the_scores_tensors_are_offloaded_before_the_networks(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def counted():
        entered.append(1)
        yield

    monkeypatch.setattr("mira.sampler.rollout.offloaded", counted)

    def offloads(run) -> int:
        entered.clear()
        run(leaves(noises())).x0.sum().backward()
        return len(entered)

    run = rollout(memory="per_step", D=denoiser())
    assert offloads(run) == 0
    assert run.shrink() and run.memory == "per_step" and run.score_offloaded and offloads(run) == 0
    assert run.shrink() and run.memory == "offload" and offloads(run) > 0
    assert offloads(rollout(memory="offload", D=denoiser())) > 0


@pytest.mark.parametrize("memory", ["auto", "per_block"])
@pytest.mark.parametrize("gradient_steps", [0, 2])
def test_measuring_is_no_part_of_a_trajectory(memory, gradient_steps):
    """Guidance with momentum remembers its last call, until sigma rises."""

    def with_momentum():
        D, last = denoiser(), []

        def call(x, sigma):
            if last and sigma.max() > last[0]:
                last.clear()
            out = D(x, sigma) + (0.3 * last[1] if last else 0)
            last[:] = [sigma.max(), out.detach()]
            return out

        return call

    options = dict(gradient_steps=gradient_steps, free_bytes=lambda: 1e12, blocks=contextlib.nullcontext)
    run = rollout(memory=memory, D=with_momentum(), **options)
    found = run(leaves(noises())).x0
    assert run.memory == ("none" if memory == "auto" else "per_block") and run._blocks_alone is not False
    assert torch.equal(found, rollout(memory="none", D=with_momentum(), **options)(leaves(noises())).x0)


def test_a_restart_goes_on_with_what_was_learned_about_the_memory():
    first = rollout(memory="per_block", free_bytes=lambda: 1e12, blocks=contextlib.nullcontext)
    first(leaves(noises()))
    ways = []
    while first.shrink():
        then = rollout(memory=first.memory, free_bytes=lambda: 1e12, blocks=contextlib.nullcontext)
        then.go_on_as(first)
        then(leaves(noises()))
        ways.append((then.memory, then.score_offloaded, then._blocks_alone))
    assert ways == [("per_block", False, False), ("per_block", True, False), ("offload", True, False)]


def test_conditional_prediction_can_be_measured():
    D = denoiser()

    def both(x, sigma):
        return D(x, sigma), torch.zeros_like(x)

    path = Rollout(ancestral(both, schedule()), schedule(), measured="conditional")(noises())
    sigma = path.sigmas[0][0]
    torch.testing.assert_close(path.eps[0], noises()[0] * (1 + sigma**2).sqrt() / sigma)


def test_masked_mean():
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    mask = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert mean_square(x, mask).tolist() == [1.0, 16.0]
    assert mean_square(x).tolist() == [2.5, 12.5]


def test_a_sampler_that_wants_more_noises_is_named():
    with pytest.raises(RuntimeError, match="number of steps depends on the image"):
        rollout()(noises(4))


@pytest.mark.parametrize("kwargs", [{"memory": "lots"}, {"weighting": "x"}])
def test_unknown_choices_are_refused(kwargs):
    with pytest.raises(ValueError, match="is not one of"):
        rollout(**kwargs)


def half_the_product_rule(y):
    return y * y.detach()


def test_a_gradient_against_a_finite_difference():
    x = noises(1)[0]
    assert check(torch.sin, x).wrong < 1e-3
    assert check(half_the_product_rule, x).wrong > 0.1
    assert check(lambda y: y.detach() * 1.0, x).wrong == math.inf
    assert check(lambda y: y * 0, x).wrong == math.inf


def test_a_part_without_a_gradient_shows_in_a_random_direction():
    """Along its own gradient it is next to nothing."""
    x = torch.randn(2, 4, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def cut(y):
        return y.sin() + 0.5 * y.roll(1, -1).detach()

    assert check(torch.sin, x).lacks < 0.01
    found = check(cut, x)
    assert found.wrong < 0.02 and found.lacks > 0.15


def test_a_gradient_against_one_that_is_known():
    x, asked = noises(1)[0], []

    def sine(y):
        asked.append(y)
        return y.sin()

    known = check(sine, x)
    count = len(asked)
    again = check(sine, x, known=known)
    assert (again.wrong, again.moved) == (known.wrong, 0) and len(asked) == count + 1
    # A checkpoint that loses a half of it, as far as the two are apart.
    whole = check(lambda y: y * y, x)
    assert check(half_the_product_rule, x, known=whole).apart == pytest.approx(0.5, abs=1e-3)
    assert check(lambda y: y.detach() * 1.0, x, known=whole).wrong == math.inf


def test_a_prediction_that_changes_with_the_wish_for_a_gradient():
    def changes(y):
        return y * (1.1 if y.requires_grad else 1.0)

    x = noises(1)[0]
    assert check(torch.sin, x).moved == 0
    assert check(changes, x).moved == pytest.approx(0.1)
    # Seen in what the network says, not in what it is a small part of.
    assert check(changes, x, looked_at=lambda d: d - 0.9 * x).moved > 0.9
    assert check(changes, x, known=check(lambda y: y * 1.0, x)).moved == pytest.approx(0.1)


def test_a_models_own_scale_of_noise_is_taken_out_of_the_score():
    """Its noise at sigma is 8 sigma z: that is another's at 8 sigma."""

    def of(scale):
        D = denoiser()

        def sample(z_T, source, wrap):
            model = wrap(lambda x, sigma: D(x, 8 / scale * sigma))
            return model(16.0 * z_T, torch.full((len(z_T),), 2.0 * scale / 8, dtype=z_T.dtype))

        schedule = torch.tensor([2.0 * scale / 8, 0.0], dtype=torch.float64)
        return Rollout(sample, schedule, memory="none", noise_scale=8 / scale)(noises(1))

    own, another = of(1.0), of(8.0)
    for name in ("eps", "sigmas", "weights"):
        torch.testing.assert_close(getattr(own, name), getattr(another, name))


class Counting:
    """A denoiser that remembers how often it was asked."""

    def __init__(self, change):
        self.calls, self.change, self.D = 0, change, denoiser(0.3, 0.6)

    def __call__(self, x, sigma):
        self.calls += 1
        return self.D(x, sigma) * (1 + self.change * self.calls)


def test_a_denoiser_that_remembers_is_found_when_it_is_asked_again():
    z = leaves(noises())
    for change, found in ((0.0, False), (0.3, True)):
        path = rollout(memory="per_step", D=Counting(change))(z)
        if found:
            with pytest.raises(NotTheSame, match="computed again for its gradient"):
                torch.autograd.grad(path.x0.sum(), z)
        else:
            torch.autograd.grad(path.x0.sum(), z)


@pytest.mark.parametrize("memory", ["per_step", "per_block"])
def test_what_does_not_come_in_by_x_has_a_gradient_too(memory):
    """Outside a mask a step makes x anew from z_T."""
    z = leaves(noises())

    def masked(x, sigma):
        return denoiser(0.3, 0.6)(0.5 * x + 0.5 * z[0] * sigma.reshape(-1, 1, 1, 1), sigma)

    def gradients(memory):
        run = rollout(memory=memory, D=masked, mask=torch.ones_like(z[0]))
        return torch.autograd.grad(run(z).x0.sin().sum(), z)

    for a, b in zip(gradients("none"), gradients(memory), strict=True):
        torch.testing.assert_close(a, b)


def test_random_numbers_of_a_call_are_the_same_when_it_is_done_again():
    class Again:
        def __init__(self, n):
            self.n = n

        def __enter__(self):
            torch.manual_seed(self.n)

        def __exit__(self, *_):
            pass

    def noisy(x, sigma):
        return denoiser(0.3, 0.6)(x, sigma) * (1 + torch.rand(()))

    z = leaves(noises())

    def gradients(memory):
        return torch.autograd.grad(rollout(memory=memory, D=noisy, random=Again)(z).x0.sin().sum(), z)

    for a, b in zip(gradients("none"), gradients("per_step"), strict=True):
        assert torch.equal(a, b)


def test_measuring_keeps_nothing():
    """Not even what a hook was given: graph and hook would hold each other, and no collector sees C++."""
    weight = torch.nn.Parameter(torch.randn(4, 4), requires_grad=False)
    kept = []

    def fn(x):
        out = (x @ weight).tanh().tanh()
        kept.append(weakref.ref(out))
        return out

    assert saved_bytes(fn, torch.randn(3, 4)) == 2 * 3 * 4 * 4
    gc.collect()
    assert kept[0]() is None
    assert saved_bytes(fn, torch.randn(3, 4), most=60) == math.inf


def test_offloaded_gradients_are_the_same():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(4, 4, dtype=torch.float64), requires_grad=False)

    def f(x):
        return ((x @ weight).tanh() @ weight).sin().sum()

    (expected,) = torch.autograd.grad(f(x), x)
    with offloaded():
        out = f(x)
    assert torch.equal(torch.autograd.grad(out, x)[0], expected)


def test_a_linear_layers_weight_is_no_activation():
    layer = torch.nn.Linear(64, 64, dtype=torch.float64).requires_grad_(False)
    assert saved_bytes(lambda x: layer(layer(x)), torch.randn(1, 64, dtype=torch.float64)) == 0


def test_measuring_stops_even_where_exceptions_are_caught():
    def careful(x):
        try:
            return x.sin().cos().tanh()
        except Exception as problem:
            raise RuntimeError("the user's own words") from problem

    assert saved_bytes(careful, torch.randn(100), most=10) == math.inf


FULL = (
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED when calling",
    "CUDNN_STATUS_INTERNAL_ERROR_ALLOCATION_FAILED",
    "GET was unable to find an engine to execute this computation",
    "Unable to find a valid cuDNN algorithm to run convolution",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes",
    "VRAM grow failed: 33554432 bytes",
    "VRAM reservation failed",
    "level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)",
    "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
    "cudaErrorMemoryAllocation",
)


@pytest.mark.parametrize("words", FULL)
def test_what_running_out_of_memory_is_called(words):
    assert out_of_memory(RuntimeError(words)) and not out_of_memory(RuntimeError("shapes do not match"))


def test_page_locked_memory_has_one_bound(monkeypatch):
    """PyTorch keeps what is freed for others of its size: that counts until it is handed back."""
    from mira.sampler import memory

    unlocked = []
    locked = memory._PageLocked(100)
    monkeypatch.setattr(memory, "_locked", locked)
    monkeypatch.setattr(memory, "_unlock", lambda: (unlocked.append(1), setattr(locked, "held", +locked.used)))
    assert locked.take(64) and not locked.take(64) and locked.take(32) and not locked.take(8) and not unlocked
    locked.give(64)
    assert locked.take(64) and not unlocked  # the same block
    locked.give(64)
    assert locked.take(32) and unlocked == [1]  # which another size cannot have
    assert sum(size * count for size, count in locked.held.items()) == 64


def test_a_container_may_have_less_memory_than_its_machine(monkeypatch, tmp_path):
    from mira.sampler import memory

    newer, older = tmp_path / "memory.max", tmp_path / "limit_in_bytes"
    monkeypatch.setattr(memory, "LIMITS", (newer, older))
    whole = memory._most()
    newer.write_text("max\n")
    assert memory._most() == whole <= memory.LOCKED
    older.write_text(f"{2**20}\n")
    assert memory._most() == 2**18


def test_what_cannot_be_page_locked_is_not_asked_for_again(monkeypatch):
    """The system has no more of it: what there is goes on being used."""
    from mira.sampler import memory

    asked = []

    def refused(t, **how):
        asked.append(how)
        raise RuntimeError("CUDA error: out of memory")

    locked = memory._PageLocked(1 << 20)
    assert locked.take(4096)
    monkeypatch.setattr(torch, "empty_like", refused)
    card = SimpleNamespace(is_cuda=True, numel=lambda: 1000, element_size=lambda: 4)
    assert [locked.copy(card) for _ in range(9)] == [None] * 9 and len(asked) == 1
    assert locked.held == {4096: 1} == locked.used and locked.most == 4096
    monkeypatch.setattr(memory, "_locked", locked)
    memory.give_back()
    assert locked.most == 4096
    memory.unlock()  # at a run's end: another program may have let go of its own since
    assert locked.most == memory._most()
    locked.give(4096)
    assert locked.copy(card) is None and len(asked) == 2 and locked.held[4096] == 0


def test_a_card_that_reports_its_fault_again_ends_nothing(monkeypatch):
    from mira.sampler import memory

    def again():
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", again)
    memory.give_back()
