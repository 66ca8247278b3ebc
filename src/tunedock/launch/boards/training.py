"""What a training looks like: figures of `tunedock runs metrics`."""

from __future__ import annotations

from tunedock.launch.boards.shape import Board, Panel, Query, Row, Unit, Variable

_OF = 'run=~"$run"'


def _stat(title: str, expr: str, legend: str = "{{run}}", unit: Unit = "") -> Panel:
    return Panel(title, [Query(expr, legend)], unit, "stat", width=6, height=4, text="value_and_name")


def _figure(title: str, names: str, legend: str = "{{run}}", unit: Unit = "", *, logarithmic: bool = False) -> Panel:
    """`names`: of figures, as a regular expression."""
    expr = f'tunedock_run_metric{{{_OF},name=~"{names}"}}'
    return Panel(title, [Query(expr, legend)], unit, logarithmic=logarithmic)


BOARD = Board(
    uid="tunedock-training",
    title="tunedock: training",
    refresh="5s",
    variables=[Variable("run", "Run", "label_values(tunedock_run_status, run)")],
    rows=[
        Row(
            None,
            [
                _stat("Status", f"tunedock_run_status{{{_OF}}} == 1", "{{run}}: {{status}}"),
                _stat(
                    "Steps done",
                    f"tunedock_run_steps{{{_OF}}} / on (run) tunedock_run_steps_planned{{{_OF}}}",
                    unit="percentunit",
                ),
                _stat("Warnings", f"tunedock_run_warnings_total{{{_OF}}}"),
                _stat("Since the last event", f"time() - tunedock_run_last_event_timestamp_seconds{{{_OF}}}", unit="s"),
                _figure("Loss", "loss|eval_loss", "{{run}} {{name}}"),
                _figure("Norm of the gradients", "grad_norm", logarithmic=True),
                _figure("Tokens a second", "tokens_per_second"),
                _figure("Learning rate", "learning_rate"),
                _figure("Rewards", "reward|rewards/.*|logged/.*|kl", "{{run}} {{name}}"),
                _figure("Memory", "memory_bytes", unit="bytes"),
                _figure("How busy the device is", "device_utilisation", unit="percent"),
            ],
        )
    ],
)
