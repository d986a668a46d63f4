"""Print a plan for people."""

from __future__ import annotations

from typing import Any

from raymoe.console import counted, print_rows
from raymoe.plan.memory import Setting
from raymoe.plan.plans import GpuPlan, Plan, SweepPlan, TrialPlan


def show(plan: Plan) -> None:
    """Print the plan of a run."""
    counts = plan.counts
    print(
        f"{plan.model}, {plan.method}, {plan.precision}: {counts.total:,} parameters, "
        f"{counts.active:,} active, {counts.trained:,} trained"
    )
    print(f"model FLOPs per token: {plan.flops_per_token:.4g}")
    print(f"steps: {plan.steps or ''} ({plan.steps_from}), tokens: {plan.tokens or 'unknown'}")
    print_rows(f"GB per GPU, estimated, {counted(plan.gpus, 'GPU')}", [_setting_row(s) for s in plan.memory])
    print_rows(
        f"{counted(plan.gpus, 'GPU')} at an assumed MFU of {plan.mfu:g}", [_gpu_row(each) for each in plan.on]
    )
    if plan.prices == "examples":
        print("prices: example dollars on AWS, on demand; --price-per-gpu-hour takes yours")
    for each in plan.on:
        print(f"{each.gpu}: {each.why}")


def _setting_row(setting: Setting) -> dict[str, Any]:
    parts = ("state", "buffers", "activations", "update", "total")
    return {
        "ZeRO": setting.zero_stage,
        "offload": setting.offload,
        "checkpointing": "yes" if setting.activation_checkpointing else "no",
        **{name: f"{getattr(setting, name) / 1e9:.2f}" for name in parts},
    }


def _gpu_row(each: GpuPlan) -> dict[str, Any]:
    cost = each.cost
    return {
        "GPU": each.gpu,
        "tokens_per_second": _number(cost.tokens_per_second, 0),
        "hours": _number(cost.hours),
        "price": _number(cost.price),
        "recommended": _flags(each.recommended),
        "AWS": " ".join(each.instances),
    }


def show_sweep(plan: SweepPlan) -> None:
    """Print the plan of a sweep."""
    title = f"on {plan.gpus} x {plan.gpu} each, at an assumed MFU of {plan.mfu:g}"
    print_rows(title, [_trial_row(trial) for trial in plan.trials])
    if plan.hours is None:
        print(
            "hours and price are unknown until the instructions are in the store; "
            "`raymoe plan --tokens N` takes a number"
        )
        return
    money = f", {plan.price:,.2f}" if plan.price is not None else ""
    print(f"all trials: {plan.hours:,.2f} h{money} (prices: {plan.prices})")


def _trial_row(trial: TrialPlan) -> dict[str, Any]:
    return {
        "trial": trial.trial,
        "total": f"{trial.counts.total:,}",
        "active": f"{trial.counts.active:,}",
        "hours": _number(trial.hours),
        "price": _number(trial.price),
        "recommended": "in the store" if trial.in_store else _flags(trial.recommended),
    }


def _number(value: float | None, digits: int = 2) -> str:
    return "unknown" if value is None else f"{value:,.{digits}f}"


def _flags(setting: Setting | None) -> str:
    """Return a setting as options of the command line."""
    if setting is None:
        return "does not fit"
    words = [f"--zero-stage {setting.zero_stage} --micro-batch {setting.micro_batch}"]
    words += [f"--offload {setting.offload}"] if setting.offload != "none" else []
    return " ".join(words + ["--activation-checkpointing"] * setting.activation_checkpointing)
