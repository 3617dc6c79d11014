"""How much of a recurrent state is used, and for how long it keeps what was written: formulas on tensors.

A state S [K, V] is a sum of written outer products k v^T, decayed or corrected since. Its singular values say how many
directions it uses; that is a bound on what it can return, not what it returns: random keys give nearly the same rank
under rules that recall everything and rules that recall nothing. So the measures that matter are what is left of a write
(``retained_energy``) and whether reading with a key gives its value back (``lagged_recall``), each beside its value on
random keys.

    >>> import torch
    >>> from evaluation.state_measures import spectrum_measures
    >>> round(float(spectrum_measures(torch.eye(4))["effective_rank"]), 6)
    4.0

Everything is computed in float64: rounding to 16 bits adds directions that were never written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybrid_models.recurrence import chunk

WRITES = (
    16  # that retained energy is averaged over: in the delta rule one write may collide with its successor by chance
)


def spectrum_measures(state: torch.Tensor) -> dict[str, torch.Tensor]:
    """Norm and dimension of matrix states [..., K, V], float64 [...] each.

    With singular values s: ``norm`` is Frobenius'; ``effective_rank`` exp(entropy of s / sum s) (Roy and Vetterli 2007),
    ``effective_rank_energy`` the same of s^2; ``stable_rank`` sum s^2 / s_1^2; ``participation_ratio`` (sum s^2)^2 / sum
    s^4; ``r90`` the least number of directions with 90 % of sum s^2. An empty state has dimension 0 in all of them.
    """
    wide = state.detach().cpu().double()
    if wide.shape[-2] > wide.shape[-1]:
        wide = wide.transpose(-1, -2)
    energy = torch.linalg.eigvalsh(wide @ wide.transpose(-1, -2)).clamp(min=0).flip(-1)
    total = energy.sum(-1)
    full = total > 0

    def entropy_rank(weights: torch.Tensor) -> torch.Tensor:
        share = weights / torch.where(full, weights.sum(-1), 1.0)[..., None]
        return torch.where(full, torch.special.entr(share).sum(-1).exp(), 0.0)

    reached = energy.cumsum(-1) < 0.9 * total[..., None]
    return {
        "norm": total.sqrt(),
        "effective_rank": entropy_rank(energy.sqrt()),
        "effective_rank_energy": entropy_rank(energy),
        "stable_rank": total / torch.where(full, energy[..., 0], 1.0),
        "participation_ratio": total**2 / torch.where(full, energy.square().sum(-1), 1.0),
        "r90": torch.where(full, reached.sum(-1) + 1, 0).double(),
    }


def participation_ratio(state: torch.Tensor) -> torch.Tensor:
    """The same ratio as ``norm(S)^4 / norm(S^T S)^2``, without a decomposition, for training logs: [..., K, V] -> [...]."""
    wide = state.detach().double()
    return wide.square().sum((-1, -2)) ** 2 / (wide.transpose(-1, -2) @ wide).square().sum((-1, -2))


def vector_measures(state: torch.Tensor) -> dict[str, torch.Tensor]:
    """For vector states [..., D]: the norm, and the participation ratio of the squared entries."""
    energy = state.detach().cpu().double().square()
    total = energy.sum(-1)
    squares = energy.square().sum(-1)
    return {"norm": total.sqrt(), "participation_ratio": total**2 / torch.where(total > 0, squares, 1.0)}


def norm_growth(tokens: Sequence[int], norms: Sequence[float]) -> float:
    """Slope of log norm over log tokens, by least squares: 0.5 where writes pile up without decay, 0 at equilibrium."""
    x = torch.tensor(tokens, dtype=torch.float64).log()
    y = torch.tensor(norms, dtype=torch.float64).clamp(min=1e-300).log()
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def retained_energy(
    k: torch.Tensor | None,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    lags: Sequence[int],
) -> torch.Tensor:
    """Share of a write k v^T that is left after the ``lag`` tokens that came since, by energy.

    Decay shrinks it, and in the delta rule later keys overwrite what they overlap with. The law itself is run on the
    write with values of zero, so nothing is restated here. RetNet gives gamma^(2 lag).

    Args:
        k, v, log_decay, beta: the law's inputs [B, T, ...], as in ``recurrence.reference``, T > max(lags).

    Returns:
        [H, lags] float64, means over the batch and the last WRITES writes that are old enough; [1, lags] for a vector
        state.
    """
    shares = []
    for lag in lags:
        T = v.shape[1]
        first = torch.arange(max(0, T - lag - WRITES), T - lag)  # of these writes ...
        since = first[:, None] + torch.arange(1, lag + 1)  # ... the tokens that follow
        later = [None if x is None else x[:, since].flatten(0, 1).double() for x in (k, v, log_decay, beta)]
        # A value is a bystander, so that one column of it stands for all; a vector state has no other.
        write = (v[:, first] if k is None else k[:, first, ..., None]).flatten(0, 1).double()
        silence = torch.zeros_like(later[1] if k is None else later[1][..., :1])
        left = chunk(None, later[0], silence, later[2], later[3], write)[1]
        energy = left.square().sum(-1) / write.square().sum(-1) if k is None else _energy(left) / _energy(write)
        shares.append(energy.mean(0, keepdim=k is None))
    return torch.stack(shares, -1)


def _energy(state_BHKV: torch.Tensor) -> torch.Tensor:
    return state_BHKV.square().sum((-1, -2))


def lagged_recall(
    state: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor, lags: Sequence[int], least_squares: bool = False
) -> torch.Tensor:
    """Share of the last ``lag`` keys whose value, of all that were written, is nearest in angle to what the key reads.

    Args:
        state: [B, H, K, V] after all T tokens, or [B, D].
        k: [B, T, H, K], or None for a vector state, which every write shares: its one reading can match one value.
        v: [B, T, H, V], or [B, T, D].
        least_squares: read with k (sum of k^T k)^-1, the key made orthogonal to the others, which undoes crosstalk as far
            as a linear reading can; needed where keys are all positive (HGRN2).

    Returns:
        [H, lags] float64, averaged over the batch; [1, lags] for a vector state. Equal values count as equally near.
    """
    most, T = max(lags), v.shape[1]
    if k is None:
        state, v = state[:, None, None], v[:, :, None]  # one head, one key channel
        k = torch.ones_like(v[..., :1])
        least_squares = False
    state, k, v = (x.detach().cpu().double() for x in (state, k, v))
    hits = []
    for state_HKV, k_HTK, v_HTV in zip(state, k.transpose(1, 2), v.transpose(1, 2)):
        if least_squares:
            gram = k_HTK.transpose(-1, -2) @ k_HTK
            k_HTK = k_HTK @ torch.linalg.pinv(gram, rtol=1e-6, hermitian=True)
        read_HLV = k_HTK[:, -most:] @ state_HKV
        cosine_HLT = read_HLV @ torch.nn.functional.normalize(v_HTV, dim=-1).transpose(-1, -2)
        own = torch.arange(T - min(most, T), T).expand(len(cosine_HLT), -1)
        best = cosine_HLT.amax(-1)
        hit = cosine_HLT.gather(-1, own[..., None])[..., 0] >= best - 1e-9 * best.abs()
        hits.append(torch.stack([hit[:, -lag:].double().mean(-1) for lag in lags], -1))
    return torch.stack(hits).mean(0)


__all__ = [
    "lagged_recall",
    "norm_growth",
    "participation_ratio",
    "retained_energy",
    "spectrum_measures",
    "vector_measures",
]
