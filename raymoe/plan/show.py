"""Print a plan for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def show_sweep(made: Mapping[str, Any]) -> None:
    """Print the plan of a sweep for people."""
    from raymoe.console import print_rows

    title = f"on {made['gpus']} x {made['gpu']} each, at an assumed MFU of {made['mfu']:g}"
    print_rows(title, [_trial_row(row) for row in made["trials"]])
    if made["hours"] is None:
        print(
            "hours and price are unknown until the instructions are in the store; "
            "`raymoe plan --tokens N` takes a number"
        )
        return
    money = f", {made['price']:,.2f}" if made["price"] is not None else ""
    print(f"all trials: {made['hours']:,.2f} h{money} (prices: {made['prices']})")


def _trial_row(row: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: f"{row[name]:,.2f}" if row[name] is not None else "unknown" for name in ("hours", "price")}
    counts = {name: f"{row[name]:,}" for name in ("total", "active")}
    setting = "in the store" if row["in_store"] else _flags(row["recommended"])
    return {"trial": row["trial"], **counts, **known, "recommended": setting}


def show(made: Mapping[str, Any]) -> None:
    """Print a plan for people."""
    from raymoe.console import print_rows

    parameters = made["parameters"]
    print(
        f"{made['model']}, {made['method']}, {made['precision']}: {parameters['total']:,} parameters, ",
        end="",
    )
    print(f"{parameters['active']:,} active, {parameters['trained']:,} trained")
    print(f"model FLOPs per token: {made['flops_per_token']:.4g}")
    print(f"steps: {made['steps'] or ''} ({made['steps_from']}), tokens: {made['tokens'] or 'unknown'}")
    print_rows(f"GB per GPU, estimated, {made['gpus']} GPUs", [_memory_row(s) for s in made["memory"]])
    print_rows(f"{made['gpus']} GPUs at an assumed MFU of {made['mfu']:g}", [_gpu_row(g) for g in made["on"]])
    if made["prices"] == "examples":
        print("prices: example dollars on AWS, on demand; --price-per-gpu-hour takes yours")
    for each in made["on"]:
        print(f"{each['gpu']}: {each['why']}")


def _memory_row(s: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "ZeRO": s["zero_stage"],
        "offload": s["offload"],
        "checkpointing": "yes" if s["activation_checkpointing"] else "no",
        **{name: f"{s[name] / 1e9:.2f}" for name in ("state", "buffers", "activations", "update", "total")},
    }


def _gpu_row(g: Mapping[str, Any]) -> dict[str, Any]:
    cost = {
        name: f"{g[name]:,.{digits}f}" if g[name] is not None else "unknown"
        for name, digits in {"tokens_per_second": 0, "hours": 2}.items()
    }
    price = {"price": f"{g['price']:,.2f}" if g["price"] is not None else "unknown"}
    setting = _flags(g["recommended"])
    return {"GPU": g["gpu"], **cost, **price, "recommended": setting, "AWS": " ".join(g["instances"])}


def _flags(best: Mapping[str, Any] | None) -> str:
    """A setting as options of the command line."""
    if best is None:
        return "does not fit"
    words = [f"--zero-stage {best['zero_stage']} --micro-batch {best['micro_batch']}"]
    words += [f"--offload {best['offload']}"] if best["offload"] != "none" else []
    return " ".join(words + ["--activation-checkpointing"] * best["activation_checkpointing"])
