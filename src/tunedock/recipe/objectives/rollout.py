"""Objectives whose answers are made while training, and scored: `ppo`, `grpo`, `rloo`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from tunedock.recipe.objectives.rewards import Reward
from tunedock.recipe.section import Fraction, Section, tagged

ROLLOUTS = ("ppo", "grpo", "rloo")


class Local(Section):
    """Answers come from the model that is trained, in this process."""

    kind: Literal["local"] = "local"
    max_num_seqs: PositiveInt = 64
    """Answers made at once."""


class OpenAIEngine(Section):
    """Answers come from a vLLM server, which is given the trained adapter before each rollout; needs `tunedock[engine]`."""

    kind: Literal["openai"] = "openai"
    base_url: str
    """For example `http://localhost:8000/v1`."""
    model: str
    """The name the server has for the base model."""
    api_key_env: str | None = None
    """The environment variable that holds the key, where the server wants one. The key itself is kept nowhere."""
    adapter_dir: str | None = None
    """A folder that this process and the server both see, for the adapter; `engine` in the run directory by default."""
    adapter_dir_on_server: str | None = None
    """The same folder as the server sees it, where a container or another machine has it elsewhere."""
    timeout_s: PositiveFloat = 600.0
    """Of one request, which makes all the answers to a prompt."""
    max_retries: NonNegativeInt = 3
    """Further tries for a request that failed, after growing pauses."""
    concurrency: PositiveInt = 32
    """Requests under way at once."""


Engine = Annotated[
    Annotated[Local | OpenAIEngine, Field(discriminator="kind")],
    BeforeValidator(tagged("local"), json_schema_input_type=Literal["local"] | Local | OpenAIEngine),
]


class Rollout(Section):
    """What the objectives share: how answers are made and scored."""

    rewards: list[Reward] = Field(min_length=1)
    """What scores an answer; several are added up by their weights."""
    num_generations: PositiveInt = 8
    """Answers to each prompt."""
    max_new_tokens: PositiveInt = 256
    """Tokens of an answer, at most; prompt and answer together fit `data.max_length`."""
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: NonNegativeInt = 0
    """0 takes all tokens into account."""
    thinking: bool = False
    """Whether answers begin with reasoning, where the chat template knows of it."""
    steps_per_generation: PositiveInt = 1
    """Optimizer steps that one rollout's answers are divided among."""
    mask_truncated_completions: bool = False
    """Leave answers that were cut off at `max_new_tokens` out of the loss."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Taken off the reward of an answer that was cut off."""
    engine: Engine = Local()

    @property
    def times(self) -> int:
        """How often each answer is trained on."""
        return 1

    @property
    def needs_reference(self) -> bool:
        """Whether the model training began with is asked about the answers."""
        return False


class Compared(Rollout):
    """What the objectives share that measure answers to one prompt against each other."""

    beta: NonNegativeFloat = 0.0
    """Weight of the KL divergence from the model training began with; 0 does without that model."""
    epsilon: PositiveFloat = 0.2
    """How far below 1 a probability ratio counts."""
    epsilon_high: PositiveFloat | None = None
    """How far above 1; `epsilon` by default."""
    num_iterations: PositiveInt = 1
    """Times that each answer is trained on."""

    @property
    def times(self) -> int:
        return self.num_iterations

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0


class Grpo(Compared):
    """Group relative policy optimization: answers better than the others to their prompt become likelier."""

    kind: Literal["grpo"] = "grpo"
    use_bias_correction_kl: bool = True
    """Multiply the divergence by the probability ratio, so that its gradient is not biased."""
    delta: PositiveFloat | None = None
    """The most a ratio counts for at all, whatever the advantage's sign."""
    loss_type: Literal["grpo", "dapo", "dr_grpo", "cispo"] = "dapo"
    """How tokens are averaged: within each answer first (`grpo`), over all tokens (`dapo`), over answers times `max_new_tokens`
    (`dr_grpo`); `cispo` clips the ratio and never its gradient."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the standard deviation of the prompt's answers, of all answers, or nothing."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """`sequence` takes one ratio for an answer, the geometric mean of its tokens' (GSPO)."""


class Rloo(Compared):
    """REINFORCE with a leave-one-out baseline: an answer is measured against the mean of the others to its prompt."""

    kind: Literal["rloo"] = "rloo"
    beta: NonNegativeFloat = 0.05
    """Weight of the KL divergence from the model training began with, taken off the reward."""
    normalize_advantages: bool = False
    """Divide by the standard deviation of all advantages, less their mean."""
    reward_clip_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """Rewards are cut to this range."""


class Ppo(Rollout):
    """Proximal policy optimization: a value head learns what to expect, and tokens after which it went better become likelier."""

    kind: Literal["ppo"] = "ppo"
    num_generations: PositiveInt = 1
    """Answers to each prompt."""
    num_ppo_epochs: PositiveInt = 4
    """Times that each answer is trained on."""
    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL divergence from the model training began with, taken off the reward of each token."""
    target_kl: PositiveFloat | None = None
    """Divergence of an answer that `kl_coef` is moved towards; without it `kl_coef` stays."""
    kl_horizon: PositiveFloat = 10_000.0
    """Answers over which `kl_coef` is moved."""
    gamma: Fraction = 1.0
    """Discount of a reward a token later."""
    lam: Fraction = 0.95
    """Generalised advantage estimation's lambda: 1 trusts rewards alone, 0 the value head."""
    cliprange: PositiveFloat = 0.2
    cliprange_value: PositiveFloat = 0.2
    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value head's loss."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation over the rollout."""

    @property
    def times(self) -> int:
        return self.num_ppo_epochs

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0
