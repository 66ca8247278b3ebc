"""Prompts -> answers of the model as it is -> rewards -> experiences to learn from: the feed of ppo, grpo and rloo.

A rollout takes the next prompts of the epoch's order, has each answered `num_generations` times, has the answers scored, and reads
what the policy, the reference and the value head say of every token, in rows laid out like those of training: a prompt stands once
for all of its answers. The answers are then divided among optimizer steps, group by group, in another order each time round.

What is drawn depends on seed and number of the rollout alone. A checkpoint in the middle of a rollout keeps its experiences, for
the policy that made them is gone.

Shapes: P prompts of a rollout, G answers to each, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tunedock.data.batch import RowTensors
from tunedock.data.layout import Ints, Row, epoch_order
from tunedock.data.sample import Sample
from tunedock.errors import DataError
from tunedock.eval.judged import Judged, Prompts, Told
from tunedock.eval.rewards.completion import Moment
from tunedock.model import world
from tunedock.model.answers import Sampled, Sampling
from tunedock.model.reference import Reference, evaluating
from tunedock.objective.credit import Measured, credited, next_kl_coef
from tunedock.objective.evaluate import Smaller, once_it_fits
from tunedock.objective.experience import Experience, asked_and_answered
from tunedock.plan.steps import RolloutPlan
from tunedock.recipe.objectives.rollout import Grpo, Ppo, Rollout
from tunedock.train.agreement import Agreement, Floats
from tunedock.train.experience_state import from_tensors, to_tensors
from tunedock.train.feed import FixedFeed


class Reads(Protocol):
    """What is asked of a policy (`model.policy.Policy`)."""

    model: torch.nn.Module

    def logprobs(self, row: Row) -> tuple[Tensor, RowTensors]: ...

    def at_temperature(self, temperature: float) -> None: ...

    @property
    def values_N(self) -> Tensor | None: ...


class RolloutFeed(FixedFeed):
    """Steps of experiences. A rollout is made when its first step is asked for."""

    def __init__(
        self,
        prompts: Prompts,
        judged: Judged,
        section: Rollout,
        plan: RolloutPlan,
        policy: Reads,
        reference: Reference | None,
        *,
        layout: Callable[[Sequence[Sample]], list[Row]],
        smaller: Smaller,
        seed: int,
        batch_size: int,
        always_read: bool,
        between: Callable[[int, int], None],
        check: Callable[[], None],
        on_warning: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`always_read`: the policy that makes the answers is not the one that is trained, to the last digit (another engine).

        `between(answers made, answers of the rollout)` is called before each batch of answers, equally often on each rank that
        makes some, `check` while they are scored; both may raise to stop.
        """
        self._prompts = prompts
        self._judged = judged
        self._section = section
        self._plan = plan
        self._policy = policy
        self._reference = reference
        self._layout = layout
        self._smaller = smaller
        self._seed = seed
        self._groups = batch_size // section.num_generations
        """Prompts of a step."""
        self._reads_old = always_read or plan.steps > 1 or _rewards_need_old(section)
        self._between = between
        self._check = check
        self._agreement = Agreement(self._said_at, section.temperature, on_warning)
        self._kl_coef = section.kl_coef if isinstance(section, Ppo) else 0.0
        self._number: int | None = None
        self._experiences: list[Experience] = []
        self._told: Told = {}

    def step(self, number: int) -> list[Sample]:
        rollout, within = divmod(number, self._plan.steps)
        if rollout != self._number:
            self._make(rollout, number)
        time, part = divmod(within, self._plan.steps // self._section.times)
        order = _drawn(self._seed, rollout, time).permutation(len(self._experiences))
        chosen = order[part * self._groups : (part + 1) * self._groups]
        return [self._experiences[i] for i in chosen]

    def may_be_drawn_ahead(self, number: int) -> bool:
        return number % self._plan.steps != 0

    def told(self, number: int) -> Mapping[str, tuple[float, float]]:
        """Of the rollout the step belongs to, with its first step."""
        return self._told if number % self._plan.steps == 0 else {}

    # -- a rollout -----------------------------------------------------------------------------------------------------

    def _make(self, rollout: int, step: int) -> None:
        section = self._section
        asked = self._prompts.take(rollout_indices(len(self._prompts), self._plan, rollout, seed=self._seed))
        total = len(asked) * section.num_generations

        made, reward_PG, told = self._judged(
            asked,
            section.num_generations,
            sampling_of(section),
            seed=_seed(self._seed, rollout),
            between=lambda done: self._between(done, total),
            moment=Moment(step, self._plan.total_steps, self._check),
        )
        counts = [[one.stopped or not section.mask_truncated_completions for one in group] for group in made]
        if not any(any(group) for group in counts):
            raise DataError(
                f"all {total} answers of a rollout were cut off at {section.max_new_tokens} tokens, so none of them counts",
                where="objective.mask_truncated_completions",
                hint="raise `objective.max_new_tokens`, or let cut answers count",
            )
        samples = [
            asked_and_answered(
                one.sample.row_id,
                one.sample.segments[0].tokens_T,
                [np.asarray(a.ids, np.int32) for a in group],
                counted,
            )
            for one, group, counted in zip(asked, made, counts, strict=True)
        ]
        measured = self._measured(samples, made, counts, reward_PG)
        told |= self._agreement(samples, made, measured)
        answers = credited(section, measured, kl_coef=self._kl_coef)
        self._experiences = [
            Experience(sample.row_id, sample.segments, answers=tuple(group))
            for sample, group in zip(samples, answers, strict=True)
        ]
        divergences = [away for group in measured for one in group if (away := one.divergence) is not None]
        if divergences and not _divergence_is_in_loss(section):
            told["kl"] = (float(sum(divergences)), float(len(divergences)))
        if isinstance(section, Ppo):
            told["kl_coef"] = (self._kl_coef, 1.0)
            self._kl_coef = next_kl_coef(section, self._kl_coef, divergences)
        self._told = told
        self._number = rollout

    def _measured(
        self,
        samples: Sequence[Sample],
        made: Sequence[Sequence[Sampled]],
        counts: Sequence[Sequence[bool]],
        reward_PG: np.ndarray[Any, np.dtype[np.float64]],
    ) -> list[list[Measured]]:
        whole = [asked_again(sample) for sample in samples]  # the answers that do not count are read all the same
        old = values = reference = None
        if self._reads_old:
            with torch.no_grad(), evaluating(self._policy.model):
                old, values = self._read(self._policy, whole)
        if self._section.needs_reference:
            if self._reference is None:
                raise ValueError("the objective needs a reference policy")
            with self._reference.entered() as began:
                reference, _ = self._read(began, whole)
        return [
            [
                Measured(
                    reward=float(reward_PG[p, g]),
                    length=len(one.ids),
                    counts=counts[p][g],
                    old_T=None if old is None else old[p][g],
                    reference_T=None if reference is None else reference[p][g],
                    value_T=None if values is None else values[p][g],
                )
                for g, one in enumerate(group)
            ]
            for p, group in enumerate(made)
        ]

    def _said_at(self, temperature: float, samples: Sequence[Sample]) -> list[list[Floats]]:
        """What the policy says at another temperature than that of sampling."""
        self._policy.at_temperature(temperature)
        try:
            with torch.no_grad(), evaluating(self._policy.model):
                return self._read(self._policy, [asked_again(sample) for sample in samples])[0]
        finally:
            self._policy.at_temperature(self._section.temperature)

    def _read(
        self, policy: Reads, samples: Sequence[Sample]
    ) -> tuple[
        list[list[np.ndarray[Any, np.dtype[np.float32]]]], list[list[np.ndarray[Any, np.dtype[np.float32]]]] | None
    ]:
        """Log-probabilities, and what the value head says where there is one, by prompt, answer and token."""

        def read(rows: Sequence[Row]) -> list[tuple[Row, np.ndarray[Any, Any], np.ndarray[Any, Any] | None]]:
            found = []
            for row in rows:
                logprob_N, _ = policy.logprobs(row)
                value_N = policy.values_N
                found.append((row, logprob_N.cpu().numpy(), None if value_N is None else value_N.cpu().numpy()))
            return found

        rows = once_it_fits(samples, self._layout(samples), lambda rows: read(world.share(rows)), self._smaller)
        logprobs = [[np.zeros(len(s.tokens_T), np.float32) for s in sample.segments[1:]] for sample in samples]
        values = [[np.zeros(len(s.tokens_T), np.float32) for s in sample.segments[1:]] for sample in samples]
        prompt_S = np.asarray([len(sample.segments[0].tokens_T) for sample in samples])
        valued = any(value_N is not None for _, _, value_N in rows)
        for row, logprob_N, value_N in rows:
            chosen = row.chosen
            place_N = row.position_ids_BT[chosen.line_N, chosen.own_N] - prompt_S[chosen.sample_N]
            for s, leaf in {(int(s), int(leaf)) for s, leaf in zip(chosen.sample_N, chosen.leaf_N, strict=True)}:
                here_N = (chosen.sample_N == s) & (chosen.leaf_N == leaf)
                logprobs[s][leaf][place_N[here_N]] = logprob_N[here_N]
                if value_N is not None:
                    values[s][leaf][place_N[here_N]] = value_N[here_N]
        _of_all_ranks([*logprobs, *values] if valued else logprobs)
        return logprobs, values if valued else None

    # -- state ---------------------------------------------------------------------------------------------------------

    def state(self, number: int) -> dict[str, Any]:
        return {"kind": "rollout", "prompts": len(self._prompts), "kl_coef": self._kl_coef}

    def tensors(self, number: int) -> dict[str, Tensor]:
        """The experiences in use, when step `number` is to go on with them."""
        rollout, within = divmod(number, self._plan.steps)
        if within == 0 or rollout != self._number:
            return {}
        return {"rollout": torch.tensor([rollout]), **to_tensors(self._experiences)}

    def restore(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._kl_coef = float(state["kl_coef"])
        self._number, self._experiences, self._told = None, [], {}
        if tensors:
            rest = {name: tensor for name, tensor in tensors.items() if name != "rollout"}
            self._number, self._experiences = int(tensors["rollout"]), from_tensors(rest)


def _of_all_ranks(groups: Sequence[Sequence[np.ndarray[Any, np.dtype[np.float32]]]]) -> None:
    """Fills in what other ranks have read, where these have zeros. A collective call."""
    if not world.together():
        return
    every = [values for group in groups for values in group]
    whole = world.add_up(torch.as_tensor(np.concatenate(every))).numpy()
    for values, told in zip(every, np.split(whole, np.cumsum([len(values) for values in every])[:-1]), strict=True):
        values[:] = told


def sampling_of(section: Rollout) -> Sampling:
    return Sampling(section.max_new_tokens, section.temperature, section.top_k, section.top_p)


def rollout_indices(prompts: int, plan: RolloutPlan, rollout: int, *, seed: int) -> Ints:
    """The prompts of a rollout, by number: the next ones of its epoch's order. An epoch's last rollout is filled up with its first
    prompts."""
    epoch, within = divmod(rollout, plan.rollouts_per_epoch)
    order = epoch_order(prompts, seed=seed, epoch=epoch)
    chosen: Ints = order[(within * plan.prompts + np.arange(plan.prompts)) % prompts]
    return chosen


def asked_again(sample: Sample) -> Sample:
    """The sample with every token of every answer asked for."""
    answers = [segment.tokens_T for segment in sample.segments[1:]]
    return asked_and_answered(sample.row_id, sample.segments[0].tokens_T, answers, [True] * len(answers))


def _rewards_need_old(section: Rollout) -> bool:
    """Whether what is learned from an answer depends on how likely it was when it was given."""
    return isinstance(section, Ppo) or (section.needs_reference and not _divergence_is_in_loss(section))


def _divergence_is_in_loss(section: Rollout) -> bool:
    """Rather than in the rewards."""
    return isinstance(section, Grpo)


def _drawn(seed: int, rollout: int, time: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, (rollout << 16) + time + 1]))


def _seed(seed: int, rollout: int) -> int:
    """For the generator that samples answers."""
    return int(np.random.Generator(np.random.Philox(key=[seed, rollout << 16])).integers(0, 2**63 - 1))
