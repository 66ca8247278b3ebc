"""The recipe: what decides a run. Frozen sections, unknown keys refused, tagged unions; no key is ever ignored.

Keys under `train` carry the names of `transformers.TrainingArguments` wherever one exists; keys under `adapter` those
of PEFT's `LoraConfig`. A value left out is null here and filled in by `recipe.resolve`, which records where each value
came from.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from tunedock.recipe.adapters import Adapter, Lora
from tunedock.recipe.launch import Launch
from tunedock.recipe.objectives import Objective
from tunedock.recipe.objectives.likelihood import Sft
from tunedock.recipe.search import Search
from tunedock.recipe.section import Fraction, Section, Seed, shorthand
from tunedock.recipe.tracking import Track, Tracker


class Model(Section):
    path: str
    """Hub id (`Qwen/Qwen3-8B`) or a local folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub; the commit it resolves to is pinned into the run."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` makes fresh weights from the folder's config.json (pretraining from scratch)."""
    config_overrides: dict[str, Any] = {}
    """Values of the model's config to replace; only with `init: random`."""
    chat_template: str | None = None
    """A Jinja file to use instead of the tokenizer's own template."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for a model you trust."""
    add_tokens: list[str] = []
    """Texts that become one token each. Their rows of the embedding are trained, whatever the adapter."""
    add_special_tokens: list[str] = []
    """The same for marks that are no text, and are left out where an answer is shown."""

    adapters: list[str] = []
    """Folders with a LoRA, or run directories with one, merged into the weights before training, in this order."""

    @property
    def new_tokens(self) -> int:
        """Tokens to be made."""
        return len(self.add_tokens) + len(self.add_special_tokens)


class Source(Section):
    path: str
    """A file, a folder, a glob, a URL, a hub id, data in an image (`image://registry.example/support-data:v3`), or an entry of a
    dataset_info.json (`data/dataset_info.json#identity`)."""
    format: Literal[
        "auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text", "preference", "labelled", "prompt"
    ] = "auto"
    """The rows' shape; detected and reported by default."""
    columns: dict[str, str] = {}
    """Our name -> the name in the file (`{prompt: question, response: answer}`)."""
    subset: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set, or of data in an image."""
    revision: str | None = None
    """A commit or a tag on the hub; of data in an image, the `sha256:...` of its content."""
    num_samples: PositiveInt | None = None
    """Read at most this many rows of the source."""


class Split(Section):
    train: Fraction = 0.8
    """What `validation` and `test` leave, when only they are given."""
    validation: Fraction = 0.1
    test: Fraction = 0.1
    seed: Seed = 42
    group_by: str | None = None
    """A column; rows with the same value stay on one side."""


Sources = Annotated[
    list[Annotated[Source, shorthand("path", Source)]],
    BeforeValidator(
        lambda value: [value] if isinstance(value, str | dict) else value,
        json_schema_input_type=str | Source | list[str | Source],
    ),
]


class Data(Section):
    train: Sources = Field(min_length=1)
    validation: Sources = []
    """Own files for validation; then `split.validation` is 0."""
    test: Sources = []
    """Own files for the test; then `split.test` is 0."""
    split: Split = Split()
    max_length: PositiveInt = 2048
    """Tokens in a sample, prompt and answer together."""
    over_length: Literal["drop", "truncate", "error"] = "drop"
    """`truncate` cuts the prompt from the left; the answer's header and stop stay."""
    max_dropped: Fraction = 0.01
    """More dropped rows than this share is an error."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Tokens that carry loss: every assistant turn, the last one, or all tokens."""
    system: str | None = None
    """System prompt for conversations that bring none."""
    streaming: bool = False
    """Read while training, for data larger than the disk; needs `train.max_steps`."""
    shuffle_buffer: PositiveInt = 10_000
    """Samples held for shuffling when streaming."""
    num_proc: PositiveInt | None = None
    """Processes that render and tokenise; by default one for each core (8 at most), and for few rows none but the worker's own."""
    cache_dir: str | None = None
    """Where tokenised data is kept; `~/.cache/tunedock` by default."""


def _switch(value: Any) -> Any:
    """`on` and `off`, which YAML takes for text."""
    return {"on": True, "off": False}.get(value, value) if isinstance(value, str) else value


class Train(Section):
    output_dir: str | None = None
    """The run directory; `runs/<time>-<objective>-<model>` by default."""
    num_train_epochs: PositiveFloat = 3.0
    max_steps: int = Field(-1, ge=-1)
    """Optimizer steps; overrides the epochs when positive."""
    batch_size: PositiveInt | None = None
    """Examples per optimizer step over all devices; 16 by default."""
    per_device_train_batch_size: PositiveInt | None = None
    """The familiar way to say `batch_size`: times `gradient_accumulation_steps` times the devices."""
    gradient_accumulation_steps: PositiveInt | None = None
    learning_rate: PositiveFloat | None = None
    """1e-4 for LoRA, 1e-5 for full and freeze, 1e-3 for pretraining a fresh model, by default."""
    lr_scheduler_type: str = "cosine"
    """A schedule by transformers' name (linear, cosine, constant_with_warmup, ...)."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    warmup_steps: NonNegativeFloat = 0.0
    """Steps, or a share of all steps when below 1."""
    optim: str = "adamw_torch"
    """An optimizer by transformers' name, or `muon`; docs/reference/optimizers.md lists them."""
    optim_args: str | None = None
    """`key=value,key=value`, as transformers takes it."""
    optim_target_modules: str | list[str] | None = None
    """Matrices GaLore and APOLLO work on: `all-linear`, words or expressions that modules' names match; those of attention and
    feed-forward parts, by default."""
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: PositiveFloat = 1e-8
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    neftune_noise_alpha: PositiveFloat | None = None
    """NEFTune: uniform noise on the embeddings in training, of at most alpha / sqrt(tokens of the sample x width); 5 is common."""
    bf16: bool | None = None
    """bfloat16 compute; where the device has it, by default."""
    fp16: bool = False
    """float16 compute with gradient scaling."""
    gradient_checkpointing: bool | PositiveInt = False
    """Computes activations again in the backward pass instead of keeping them: in every layer, or in as many as the number says.
    Without it, in as few layers as memory needs, once a single sample does not fit."""
    torch_compile: Annotated[
        Literal["auto"] | bool, BeforeValidator(_switch, json_schema_input_type=Literal["auto", "on", "off"] | bool)
    ] = "auto"
    """Puts the decoder layers through PyTorch's compiler. `auto` tries it on a GPU before the first step of a longer run, and keeps
    it where it pays; on a CPU the parts of a layer have kernels of their own, which are faster."""
    seed: Seed = 42
    deepspeed: str | None = None
    """A DeepSpeed JSON of your own. It says the stage and the offloading that `parallel` and `offload` else say."""
    token_budget: PositiveInt | None = None
    """Tokens of a row, which is what one call of the model takes; planned from the memory that is free, by default."""
    logging_steps: PositiveInt = 1
    eval_strategy: Literal["no", "steps", "epoch"] = "epoch"
    """`no` by default where there is no validation data."""
    eval_steps: PositiveInt | None = None
    """As `save_steps`, by default."""
    predict_with_generate: bool = False
    """Answer validation rows at each evaluation too, as the `eval` section says, and tell exact match, ROUGE and BLEU beside the
    loss. For objectives whose rows have answers: sft, dpo, orpo, simpo, kto."""
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    save_steps: PositiveInt = 500
    save_total_limit: PositiveInt | None = 3
    load_best_model_at_end: bool = False
    """Keep the best checkpoint's weights as the run's result, not the last."""
    metric_for_best_model: Literal[
        "eval_loss", "eval_exact_match", "eval_rouge1", "eval_rouge2", "eval_rougeL", "eval_bleu"
    ] = "eval_loss"
    """What tells the best, here and for `early_stopping_patience`: the least loss, or the most of a figure that
    `predict_with_generate` tells."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many evaluations without improvement."""
    early_stopping_threshold: NonNegativeFloat = 0.0
    on_divergence: Literal["stop", "skip", "roll_back"] = "stop"
    """What a step whose loss or gradients are no numbers means: the end; an update left out (at most 5 in a row); or back to the
    last good checkpoint and past that step's samples (at most 5 times). The rows that did it are named."""
    report_to: Annotated[
        list[Tracker],
        BeforeValidator(
            lambda value: ([] if value == "none" else [value]) if isinstance(value, str) else value,
            json_schema_input_type=Literal["none"] | Tracker | list[Tracker],
        ),
    ] = ["tensorboard"]
    """Trackers; `none` or an empty list for none. Those other than TensorBoard have settings in `track`."""


class Eval(Section):
    max_samples: PositiveInt | None = 200
    """Rows that answers are generated for, of the test split or, while training, of the validation rows; null for all."""
    max_new_tokens: PositiveInt = 256
    temperature: NonNegativeFloat = 0.0
    """0 is greedy."""
    batch_size: PositiveInt = 16
    """Prompts generated at once."""
    compare_base: bool = True
    """Measure the base model too."""
    tasks: Annotated[
        list[str],
        BeforeValidator(
            lambda value: [value] if isinstance(value, str) else value, json_schema_input_type=str | list[str]
        ),
    ] = []
    """Tasks of lm-evaluation-harness by name (`[hellaswag, gsm8k]`), of its own or yours; needs `tunedock[lm-eval]`."""
    tasks_path: str | None = None
    """A folder with task YAML files of your own. The `data_files` in them start from it."""
    tasks_run_code: bool = False
    """Run Python code that tasks of `tasks_path` name, and metrics that are fetched as code. Only for tasks you have read."""
    num_fewshot: NonNegativeInt | None = None
    """Examples shown before each question of a task, except where the task says 0 itself; as each task says, by default."""
    apply_chat_template: bool = False
    """Put a task's prompts through the chat template, as the model was trained; most published figures are without."""
    limit: PositiveInt | None = None
    """Documents of each task, its first ones; all by default."""


class Recipe(Section):
    """One recipe decides a run."""

    model: Annotated[Model, shorthand("path", Model)]
    objective: Objective = Sft()
    adapter: Adapter = Lora()
    quantize: Literal["none", "nf4", "int8", "fp8"] = "none"
    """What the frozen linear layers under a LoRA are held in. `nf4` (QLoRA) takes a quarter of 16 bits' memory, `int8` and `fp8`
    half; the first two need bitsandbytes. GPUs with float8 products (Ada, Hopper and later) compute in `fp8` too."""
    parallel: Literal["auto", "ddp", "fsdp", "zero1", "zero2", "zero3"] = "auto"
    """What each of many processes holds. `ddp`: the whole model. `fsdp` (FSDP2): a share of its weights, gradients and optimizer
    states. `zero1`, `zero2`, `zero3` (DeepSpeed): a share of the optimizer states; of the gradients too; of the weights too.
    `auto`: `ddp` where the plan of the memory has it fit on each device, else `fsdp`."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept in main memory instead of the devices': the optimizer states, or weights, gradients and states."""
    data: Data
    train: Train = Train()
    eval: Eval = Eval()
    track: Track = Track()
    search: Search | None = None
    """For `tunedock search`; `tunedock train` takes the values as they stand."""
    launch: Launch = Launch()
    hub: str = "hf"
    """`hf`, `modelscope`, or the URL of a Hugging Face mirror."""
    offline: bool = False
    """Touch no network: models and data must be local or in the hub cache."""


NOT_BUILT: dict[str, tuple[str, ...]] = {
    "objective.loss_type": ("bco_pair", "aot", "aot_unpaired"),
    "objective.sync_ref_model": (),
    "objective.f_divergence_type": (),
    "objective.ld_alpha": (),
    "objective.use_weighting": (),
    "adapter.kind": ("loha", "lokr", "oft", "vera"),
    "adapter.init_lora_weights": ("eva", "corda", "loftq", "orthogonal", "mica", "lora_ga"),
    "launch.on": ("kubernetes",),
    "serve": (),
    "train.report_to": ("comet_ml", "trackio", "all"),
}
"""What the design names and this version refuses by name: a key's values, or () for the key itself."""

SAID_ELSEWHERE: dict[str, dict[str, str]] = {
    "objective.kind": {
        "ipo": "IPO is `objective: {kind: dpo, loss_type: ipo}`",
        "cpo": "CPO-SimPO is `objective: {kind: simpo, sft_weight: 1.0}`",
    },
    "objective.loss_type": {
        "orpo": "ORPO is an objective of its own: `objective: orpo`",
        "simpo": "SimPO is an objective of its own: `objective: simpo`",
        "kto_pair": "KTO is an objective of its own, and takes pairs too: `objective: kto`",
    },
    "adapter.kind": {
        "qlora": "a QLoRA is `adapter: lora` with `quantize: nf4`",
        "dora": "a DoRA is `adapter: {kind: lora, use_dora: true}`",
        "rslora": "rsLoRA is `adapter: {kind: lora, use_rslora: true}`",
        "pissa": "PiSSA is `adapter: {kind: lora, init_lora_weights: pissa}`",
        "lora+": "LoRA+ is `adapter: {kind: lora, loraplus_lr_ratio: 16}`",
    },
    "quantize": {
        "gptq": "a GPTQ checkpoint says so itself: give it as `model`, and leave `quantize` out",
        "awq": "an AWQ checkpoint says so itself: give it as `model`, and leave `quantize` out",
    },
}
"""Values that people write for a key, and how tunedock has it said."""
