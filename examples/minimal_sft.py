"""The engine on one page: supervised fine-tuning with LoRA, from rows to an adapter, with tunedock's own parts and no framework.

    python examples/minimal_sft.py [MODEL_FOLDER [ROWS.jsonl [ADAPTER_FOLDER]]]

What `tunedock train` adds to this: accounting of data, checkpoints, exact resume, validation, a planned token budget, metrics.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunedock.data.chat import Chat
from tunedock.data.conversation import Conversation, Message
from tunedock.data.layout import step_indices
from tunedock.model.adapter import attach, save
from tunedock.model.policy import Policy, Precision
from tunedock.recipe.adapters import Lora

HERE = Path(__file__).parent
BATCH, STEPS, LEARNING_RATE, BUDGET_TOKENS, SEED = 16, 30, 3e-3, 1024, 42


def main(model_folder: Path, rows_file: Path, adapter_folder: Path) -> list[float]:
    # Rows -> samples. A sample is a small tree of token segments with a weight for each token. The model's own chat template makes
    # the text; only the assistant's answers, and the stop token behind each, weigh something.
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    chat = Chat(tokenizer, stop_ids={tokenizer.eos_token_id}, max_length=1024, over_length="drop", train_on="assistant")
    with rows_file.open(encoding="utf-8") as lines:
        rows = [json.loads(line)["messages"] for line in lines]
    conversations = [
        (f"{rows_file.name}:{number}", Conversation(tuple(Message(m["role"], m["content"]) for m in row)))
        for number, row in enumerate(rows, start=1)
    ]
    samples = [encoded.sample for outcome in chat.encode(conversations) for encoded in outcome]

    # Model -> policy: rows of tokens in, log-probabilities of the chosen tokens out. The probe compares the ways of laying out a
    # row with what the untouched model gives for each path alone, and keeps the leanest that is exact.
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    policy = Policy(
        attach(model, Lora(r=16, alpha=32), seed=SEED), torch.device("cpu"), Precision(torch.float32, torch.float32)
    )
    print(*policy.probe(), f"layout: {policy.layout}; head: {policy.head}; fused: {', '.join(policy.fused)}", sep="\n")
    parameters = [parameter for _, parameter in policy.trainable]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)

    losses: list[float] = []
    policy.model.train()
    for step in range(STEPS):
        batch = [samples[i] for i in step_indices(len(samples), BATCH, step, seed=SEED)]
        # The step's samples in as few rows as the budget allows: no padding, a prefix that samples share stands once.
        step_rows = policy.rows(batch, BUDGET_TOKENS)
        # The loss is a sum over rows, divided once by the step's count: how many rows there are changes memory and nothing else.
        count = sum(sample.weight for sample in batch)
        loss = 0.0
        for row in step_rows:
            logprob_N, tensors = policy.logprobs(row)
            share = -(tensors.weight_N * logprob_N).sum() / count
            share.backward()
            loss += share.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        print(
            f"step {step + 1:3}  loss {loss:.4f}  {sum(row.tokens for row in step_rows):5} tokens in {len(step_rows)} rows"
        )

    save(policy.model, adapter_folder)
    return losses


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    defaults = [HERE / "demo" / "base", HERE / "demo" / "triage.jsonl", Path("adapter")]
    main(*given, *defaults[len(given) :])
