"""Advantages are those of the papers, and of TRL where it has them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunedock.objective.advantages import generalised, leave_one_out, normalised, relative, whitened

NUMBERS = st.floats(-10, 10, allow_nan=False, width=32)


def test_what_differs_by_rounding_alone_is_not_blown_up() -> None:
    made = whitened([np.array([1.0, 1.0 + 1e-9]), np.array([1.0 - 1e-9])])
    assert max(abs(value).max() for value in made) < 1e-4


def test_relative_to_the_group() -> None:
    reward_PG = np.array([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    deviation = np.std([1, 0, 0, 1], ddof=1)
    np.testing.assert_allclose(relative(reward_PG, "group")[0], np.array([0.5, -0.5, -0.5, 0.5]) / (deviation + 1e-4))
    assert not relative(reward_PG, "group")[1].any(), "equal answers teach nothing"
    np.testing.assert_allclose(relative(reward_PG, "none")[0], [0.5, -0.5, -0.5, 0.5])
    np.testing.assert_allclose(
        relative(reward_PG, "batch")[0], np.array([0.5, -0.5, -0.5, 0.5]) / (reward_PG.std(ddof=1) + 1e-4)
    )


@given(st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=5))
def test_leave_one_out_is_its_definition(rewards: list[list[float]]) -> None:
    reward_PG = np.array(rewards)
    found_PG = leave_one_out(reward_PG)
    for p, g in np.ndindex(reward_PG.shape):
        assert found_PG[p, g] == pytest.approx(reward_PG[p, g] - np.delete(reward_PG[p], g).mean(), abs=1e-9)
    assert abs(found_PG.sum(axis=1)).max() < 1e-6
    assert abs(normalised(found_PG).mean()) < 1e-9


def test_leave_one_out_needs_others() -> None:
    with pytest.raises(ValueError, match="two answers"):
        leave_one_out(np.zeros((3, 1)))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12), st.floats(0, 1), st.floats(0, 1))
def test_generalised_is_the_sum_of_the_paper(tokens: list[tuple[float, float]], gamma: float, lam: float) -> None:
    """Schulman et al. 2016, eq. 16, term by term: A_t = sum_l (gamma lam)^l delta_t+l."""
    reward_T, value_T = np.array(tokens).T
    after_T = np.append(value_T[1:], 0.0)
    delta_T = reward_T + gamma * after_T - value_T
    found_T, return_T = generalised(reward_T, value_T, gamma=gamma, lam=lam)
    for t in range(len(tokens)):
        expected = sum((gamma * lam) ** (u - t) * delta_T[u] for u in range(t, len(tokens)))
        assert found_T[t] == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(return_T, found_T + value_T)


def test_generalised_at_its_ends() -> None:
    reward_T, value_T = np.array([0.0, 0.0, 1.0]), np.array([0.2, 0.4, 0.6])
    np.testing.assert_allclose(generalised(reward_T, value_T, gamma=1.0, lam=1.0)[1], [1.0, 1.0, 1.0])
    np.testing.assert_allclose(generalised(reward_T, value_T, gamma=1.0, lam=0.0)[0], [0.2, 0.2, 0.4])


@given(st.lists(st.lists(NUMBERS, min_size=1, max_size=4), min_size=2, max_size=5))
def test_whitened_over_all(values: list[list[float]]) -> None:
    arrays = [np.array(value) for value in values]
    every = np.concatenate(arrays)
    white = np.concatenate(whitened(arrays))
    kept = np.concatenate(whitened(arrays, shift_mean=False))
    assert abs(white.mean()) < 1e-6
    assert kept.mean() == pytest.approx(every.mean(), abs=1e-5)
    if every.std() > 0.1:
        assert white.std(ddof=1) == pytest.approx(1.0, abs=1e-6)
