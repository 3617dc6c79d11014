"""chunk = step = reference, values and gradients, for every law.

A law is (kind of decay, kind of write): a vector state, no decay, one decay per head or per key channel, with the plain
write or the delta rule. Lengths, packed boundaries and masks are random; decays span 1e-6 to 1 - 1e-6.
"""

from __future__ import annotations

import pytest
import torch

from hybrid_models import recurrence
from hybrid_models.recurrence import chunk, reference, step

LAWS = ["vector", "none", "head", "channel", "none-delta", "head-delta"]
LENGTHS = [1, 2, 3, 31, 32, 33, 63, 64, 65, 97, 128, 200, 300]


def make(law: str, B: int, T: int, H: int = 2, K: int = 6, V: int = 5, dtype=torch.float64, seed: int = 0):
    """Inputs (q, k, v, log_decay, beta, initial_state) for a law."""
    g = torch.Generator().manual_seed(seed + 1000 * T)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    def log_decay(*shape):
        # Half of the decays anywhere in (1e-6, 1 - 1e-6), the rest pressed against either end.
        p = torch.rand(shape, generator=g, dtype=torch.float64)
        p = torch.where(torch.rand(shape, generator=g) < 0.5, p, torch.where(p < 0.5, p * 1e-5, 1 - (1 - p) * 1e-5))
        return p.clamp(1e-6, 1 - 1e-6).log().to(dtype)

    if law == "vector":
        return None, None, normal(B, T, V), log_decay(B, T, V), None, normal(B, V)
    q, k, v = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V)
    beta = None
    if law.endswith("delta"):
        k = torch.nn.functional.normalize(k, dim=-1)
        beta = 2 * torch.rand(B, T, H, generator=g, dtype=torch.float64).to(dtype)
    decay = {"none": None, "head": log_decay(B, T, H), "channel": log_decay(B, T, H, K)}[law.split("-")[0]]
    return q, k, v, decay, beta, normal(B, H, K, V)


def flags(B: int, T: int, share: float, seed: int) -> torch.Tensor:
    return torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < share


def options(case: str, B: int, T: int) -> dict:
    out = {}
    if "reset" in case:
        out["reset"] = flags(B, T, 0.07, seed=T)
    if "valid" in case:
        out["valid"] = flags(B, T, 0.75, seed=T + 1)
    return out


def with_grad(inputs):
    return [None if x is None else x.clone().requires_grad_() for x in inputs]


def results_and_gradients(form, inputs, kwargs):
    """o at valid tokens, final state, and the gradients of a random function of both."""
    inputs = with_grad(inputs)
    o, state = form(*inputs, **kwargs)
    if "valid" in kwargs:
        o = o * kwargs["valid"].reshape(*kwargs["valid"].shape, *[1] * (o.dim() - 2))
    g = torch.Generator().manual_seed(7)
    weight_o, weight_s = (torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (o, state))
    ((o * weight_o).sum() + (state * weight_s).sum()).backward()
    return [o.detach(), state.detach()] + [x.grad for x in inputs if x is not None]


@pytest.mark.parametrize("case", ["plain", "reset", "valid", "reset+valid"])
@pytest.mark.parametrize("law", LAWS)
def test_chunk_is_reference(law, case):
    """Values and all gradients, at every length around the chunk sizes. float64: only summation order differs."""
    for T in LENGTHS:
        inputs, kwargs = make(law, 2, T), options(case, 2, T)
        got, want = (results_and_gradients(form, inputs, kwargs) for form in (chunk, reference))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m: f"T={T}: {m}")


@pytest.mark.parametrize("law", LAWS)
def test_random_lengths_and_boundaries(law):
    for seed in range(12):
        T = int(torch.randint(1, 301, (1,), generator=torch.Generator().manual_seed(seed)))
        inputs = make(law, 1, T, seed=seed)
        kwargs = {"reset": flags(1, T, 0.1, seed), "valid": flags(1, T, 0.9, seed + 1)}
        for a, b in zip(*(results_and_gradients(form, inputs, kwargs) for form in (chunk, reference)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m: f"T={T} seed={seed}: {m}")


@pytest.mark.parametrize("law", LAWS)
def test_step_is_reference(law):
    """Token by token, with and without an initial state."""
    T = 9
    q, k, v, log_decay, beta, initial = make(law, 3, T)
    for state in (initial, None):
        want, want_state = reference(q, k, v, log_decay, beta, state)
        outputs = []
        for t in range(T):
            one = [None if x is None else x[:, t : t + 1] for x in (q, k, v, log_decay, beta)]
            o, state = step(*one, state)
            outputs.append(o)
        # reference's absent decay leaves log_decay None; step then keeps the state
        torch.testing.assert_close(torch.cat(outputs, 1), want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state, want_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", [chunk, step])
@pytest.mark.parametrize("law", LAWS)
def test_one_token_with_flags(law, form):
    """A single token that is masked leaves the state alone, and one that begins a document forgets it."""
    inputs = make(law, 4, 1)
    kwargs = {
        "reset": torch.tensor([[False], [True], [False], [True]]),
        "valid": torch.tensor([[True], [True], [False], [False]]),
    }
    (o, state), (want, want_state) = form(*inputs, **kwargs), reference(*inputs, **kwargs)
    torch.testing.assert_close(state, want_state)
    torch.testing.assert_close(o[:2], want[:2])


@pytest.mark.parametrize("law", LAWS)
def test_gradcheck(law, monkeypatch):
    """Against finite differences. Chunks of 4, so that 11 tokens cross chunk borders and end inside one."""
    for name in ("CHUNK_SIZE", "DELTA_CHUNK_SIZE", "VECTOR_CHUNK_SIZE"):
        monkeypatch.setattr(recurrence, name, 4)
    inputs = make(law, 1, 11, H=1, K=3, V=2)
    # Finite differences of exp(log_decay) at log_decay = -13 see nothing but rounding: keep decays above e^-3 here.
    inputs = [x.clamp(min=-3.0) if i == 3 and x is not None else x for i, x in enumerate(inputs)]
    present = [i for i, x in enumerate(inputs) if x is not None]
    reset = flags(1, 11, 0.2, seed=3)

    def function(*tensors):
        full = [None] * 6
        for i, x in zip(present, tensors, strict=True):
            full[i] = x
        return chunk(*full, reset=reset)

    assert torch.autograd.gradcheck(function, with_grad([inputs[i] for i in present]))


@pytest.mark.parametrize("law", LAWS)
def test_gradcheck_long(law):
    """The fast gradcheck (random projections) over 150 tokens and the real chunk sizes."""
    inputs = [
        x.clamp(min=-3.0) if i == 3 and x is not None else x for i, x in enumerate(make(law, 1, 150, H=1, K=4, V=3))
    ]
    present = [i for i, x in enumerate(inputs) if x is not None]

    def function(*tensors):
        full = [None] * 6
        for i, x in zip(present, tensors, strict=True):
            full[i] = x
        return chunk(*full)

    assert torch.autograd.gradcheck(function, with_grad([inputs[i] for i in present]), fast_mode=True)


@pytest.mark.parametrize("law", LAWS)
def test_float32(law):
    """float32 stays within 2e-5 of the float64 law, relative to the largest value: rounding of sums over a chunk's log
    decays (up to 64 * 13.8 = 884, whose last bit is 6e-5) is what limits it, times the share such pairs have."""
    for T in (64, 300):
        inputs = make(law, 2, T, dtype=torch.float32)
        (o, state), (want, want_state) = chunk(*inputs), reference(*inputs)
        assert o.dtype == state.dtype == torch.float32
        assert (o - want).abs().max() < 2e-5 * want.abs().max()
        assert (state - want_state).abs().max() < 2e-5 * want_state.abs().max()


@pytest.mark.parametrize("law", ["vector", "head", "channel", "head-delta"])
def test_extreme_decays_stay_finite(law):
    """A chunk that decays by e^-2000 overflows in the factored form exp(b_i) exp(-b_j); here nothing may."""
    inputs = make(law, 1, 200, dtype=torch.float32)
    for value in (-30.0, -1e-7):
        tensors = with_grad(inputs)
        tensors[3] = torch.full_like(inputs[3], value).requires_grad_()
        o, state = chunk(*tensors)
        (o.sum() + state.sum()).backward()
        want, _ = reference(*inputs[:3], torch.full_like(inputs[3], value), *inputs[4:])
        assert (o.detach() - want).abs().max() < 2e-5 * want.abs().max()
        assert all(x.grad.isfinite().all() for x in tensors if x is not None)


def test_delta_rule_with_near_identical_keys():
    """Writes nearly cancel here, and the Neumann series of the system's inverse would overflow float32."""
    g = torch.Generator().manual_seed(0)
    k = torch.nn.functional.normalize(
        torch.ones(1, 256, 1, 16) + 1e-3 * torch.randn(1, 256, 1, 16, generator=g), dim=-1
    )
    q, v = torch.randn(2, 1, 256, 1, 16, generator=g).unbind(0)
    beta = torch.full((1, 256, 1), 1.9)
    o, _ = chunk(q, k, v, None, beta)
    want, _ = reference(q, k, v, None, beta)
    # 8e-6 was measured; ten times as much leaves room for other BLAS libraries.
    assert (o - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("law", LAWS)
def test_invalid_tokens_may_hold_anything(law):
    """Padding often carries huge or undefined values; they must not reach a valid token, nor a gradient."""
    inputs = make(law, 2, 70)
    valid = flags(2, 70, 0.7, seed=5)
    dirty = [
        None if x is None else torch.where(valid.reshape(2, 70, *[1] * (x.dim() - 2)), x, float("nan"))
        for x in inputs[1:4]
    ]
    o, state = chunk(inputs[0], *dirty, *inputs[4:], valid=valid)
    want, want_state = reference(*inputs, valid=valid)
    torch.testing.assert_close(o[valid], want[valid])
    torch.testing.assert_close(state, want_state)


@pytest.mark.parametrize("form", [chunk, step])
@pytest.mark.parametrize("law", LAWS)
def test_state_only(law, form):
    """Without queries the state is all that is computed (how a cache replays tokens)."""
    inputs = make(law, 2, 1 if form is step else 77)
    _, state = form(None, *inputs[1:])
    torch.testing.assert_close(state, reference(*inputs)[1])


def test_step_refuses_more_than_one_token():
    with pytest.raises(ValueError, match="T=2.*use chunk"):
        step(*make("head", 1, 2))


@pytest.mark.parametrize("law", LAWS)
def test_autocast_does_not_touch_the_law(law):
    inputs = make(law, 1, 100, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = chunk(*inputs)
    want, want_state = chunk(*inputs)
    assert torch.equal(o, want) and torch.equal(state, want_state)
