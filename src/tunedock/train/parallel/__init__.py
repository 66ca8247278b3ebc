"""How training is spread over processes: an updater for each way, in the words of `train.optimizer.Updater`.

| `parallel` | weights | gradients and optimizer states | module |
|---|---|---|---|
| `ddp` | whole on every rank | whole; gradients are added up once a step | `replicated` |
| `fsdp` | sharded, gathered layer by layer (PyTorch's FSDP2) | sharded | `sharded` |
| `zero1`, `zero2` | whole | states sharded; with 2 gradients too (DeepSpeed) | `zero` |
| `zero3` | sharded | sharded (DeepSpeed) | `zero` |

All of them take gradients of a loss that is divided by the whole step's count and add them up over ranks, so a step is the same
step however many ranks share its rows. A checkpoint holds whole tensors by one process's names: a run goes on with another number
of ranks, or spread another way.
"""
