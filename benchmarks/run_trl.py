"""TRL's side: SFTTrainer and DPOTrainer as their documentation uses them, and the fastest settings found on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers.models.qwen3.modeling_qwen3  # noqa: F401 - every side's imports count the model's module
from datasets import Dataset
from peft import LoraConfig
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from benchmarks.hf import Recorder, drive, rows_of
from benchmarks.protocol import Job
from benchmarks.sides import variant_of


def train(job: Job, recorder: Recorder) -> None:
    chosen = variant_of(job).settings
    given = {
        "output_dir": job.work,
        "per_device_train_batch_size": job.batch_size,
        "num_train_epochs": 1,
        "max_steps": job.limit_steps or -1,
        "max_length": job.max_length,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": job.seed,
        "dataset_num_proc": job.workers,
        **chosen,
    }
    with recorder.preprocessing():
        rows = Dataset.from_list(rows_of(Path(job.data) / "completions.jsonl"))
    adapter = LoraConfig(
        r=job.lora_r,
        lora_alpha=job.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    kind: Any = SFTTrainer if job.objective == "sft" else DPOTrainer
    kind._prepare_dataset = recorder.timed(kind._prepare_dataset, "preprocessing_s")
    if job.objective == "dpo":
        kind._precompute_ref_logps = recorder.timed(kind._precompute_ref_logps, "reference_s")
        given["beta"] = job.beta
    config = (SFTConfig if job.objective == "sft" else DPOConfig)(**given)
    trainer = kind(model=job.model, args=config, train_dataset=rows, peft_config=adapter, callbacks=[recorder])
    trainer.train()


if __name__ == "__main__":
    drive(train)
