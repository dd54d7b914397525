"""A second try of a step whose loss is not finite, by Megatron's rerun state machine.

A device may compute wrong once, or always. The machine runs the forward and backward pass again
with the same rows and compares the losses: one that is finite now is taken, for the first was the
device's; one that is the same again is the step's own. Megatron's log says which, and where.
"""

from __future__ import annotations

from megatron.core.rerun_state_machine import RerunMode, RerunState, RerunStateMachine
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker
from torch import Tensor, nn

from megatron_m1.model.build import unwrap


def rerun_machine(mode: str) -> RerunStateMachine:
    """One of its own for each run: Megatron's global one cannot be begun anew."""
    return RerunStateMachine(mode=RerunMode(mode))


def forget_first_try(machine: RerunStateMachine, chunks: list[nn.Module]) -> None:
    """What routers counted in a pass that is run again."""
    if machine.state == RerunState.RERUNNING_IN_PLACE:
        clear_aux_losses_tracker()
        for chunk in chunks:
            for layer in unwrap(chunk).decoder.layers:
                layer.mlp.router.take_counts()


def judge(machine: RerunStateMachine, sums: list[Tensor]) -> None:
    """Ask for a second try unless the loss of this process is finite. Megatron does not judge the
    first step of a process."""
    if machine.mode != RerunMode.DISABLED and sums:
        machine.validate_result(
            sum(part[0] for part in sums),
            rejection_func=lambda loss: not loss.isfinite(),
            message="the loss is not finite",
            # What the second try shows is for the step to judge: it is taken or skipped.
            fatal=False,
        )
