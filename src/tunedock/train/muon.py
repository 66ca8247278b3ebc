"""Muon for the matrices of hidden layers and AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024) keeps one momentum and makes its singular values equal before each step; it is made for matrices between
hidden states. Its step is scaled by 0.2 sqrt(max(rows, columns)) (Liu et al. 2025, arXiv 2502.16982), so that one learning rate and
one weight decay serve both halves; `adjust_lr_fn=original` turns that off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """Groups with `muon: True` go to `torch.optim.Muon`, the others to `torch.optim.AdamW`.

    The halves share the groups and the states of this optimizer, so that schedules, checkpoints and resuming see one optimizer.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, muon: dict[str, Any], adamw: dict[str, Any]) -> None:
        self.halves: list[torch.optim.Optimizer] = []
        super().__init__(groups, {"lr": lr})
        if theirs := [group for group in self.param_groups if group["muon"]]:
            self.halves.append(torch.optim.Muon(theirs, lr=lr, **muon))
        if theirs := [group for group in self.param_groups if not group["muon"]]:
            self.halves.append(torch.optim.AdamW(theirs, lr=lr, **adamw))
        self._share()

    def _share(self) -> None:
        """A half keeps the groups and states it is handed; `load_state_dict` makes new ones."""
        for half in self.halves:
            wanted = isinstance(half, torch.optim.Muon)
            half.param_groups = [group for group in self.param_groups if group["muon"] is wanted]
            half.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for half in self.halves:
            half.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
