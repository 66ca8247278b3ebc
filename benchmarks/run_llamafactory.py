"""LLaMA-Factory's side: what `llamafactory-cli train` runs, with the data set registered in its `dataset_info.json`."""

from __future__ import annotations

import peft  # noqa: F401 - every side's imports count PEFT and the model's module
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from llamafactory.train import tuner  # type: ignore[import-not-found]
from llamafactory.train.dpo import workflow as dpo_workflow  # type: ignore[import-not-found]
from llamafactory.train.sft import workflow as sft_workflow  # type: ignore[import-not-found]

from benchmarks.hf import Recorder, drive
from benchmarks.protocol import Job
from benchmarks.sides import variant_of


def train(job: Job, recorder: Recorder) -> None:
    chosen = variant_of(job).settings
    given = {
        "stage": job.objective,
        "do_train": True,
        "model_name_or_path": job.model,
        "finetuning_type": "lora",
        "lora_rank": job.lora_r,
        "lora_alpha": job.lora_alpha,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "dataset": "bench",
        "dataset_dir": job.data,
        "cutoff_len": job.max_length,
        "overwrite_cache": True,
        "preprocessing_num_workers": job.workers,
        "output_dir": job.work,
        "per_device_train_batch_size": job.batch_size,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1.0,
        "max_steps": job.limit_steps or -1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "disable_shuffling": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": job.seed,
        **({"pref_beta": job.beta} if job.objective == "dpo" else {}),
        **chosen,
    }
    workflow = sft_workflow if job.objective == "sft" else dpo_workflow
    workflow.get_dataset = recorder.timed(workflow.get_dataset, "preprocessing_s")
    tuner.run_exp({name: value for name, value in given.items() if value is not None}, callbacks=[recorder])


if __name__ == "__main__":
    drive(train)
