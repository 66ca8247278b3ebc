"""The plain way: `transformers.Trainer` with PEFT, as tutorials write it. It has no preference objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers.models.qwen3.modeling_qwen3  # noqa: F401 - every side's imports count the model's module
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from benchmarks.hf import NO_LOSS, Recorder, drive, rows_of
from benchmarks.protocol import Job
from benchmarks.sides import variant_of


def tokenised(rows: Dataset, tokenizer: Any, workers: int | None) -> Dataset:
    """Token ids and labels of chats, prompts masked."""

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(row["messages"])["input_ids"]
        labels = [NO_LOSS] * len(prompt) + whole[len(prompt) :]
        return {"input_ids": whole, "attention_mask": [1] * len(whole), "labels": labels}

    return rows.map(encode, remove_columns=rows.column_names, num_proc=workers)


def train(job: Job, recorder: Recorder) -> None:
    chosen = variant_of(job).settings
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    with recorder.preprocessing():
        rows = tokenised(Dataset.from_list(rows_of(Path(job.data) / "ordered.jsonl")), tokenizer, job.workers)
    torch.manual_seed(job.seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(job.model),
        LoraConfig(
            r=job.lora_r,
            lora_alpha=job.lora_alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    given = {
        "output_dir": job.work,
        "per_device_train_batch_size": job.batch_size,
        "num_train_epochs": 1,
        "max_steps": job.limit_steps or -1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": job.seed,
        **chosen,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**given),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[recorder],
    )
    trainer.train()


if __name__ == "__main__":
    drive(train)
