"""A run's name, its parameters and tags, as a tracker shows them: few and telling."""

from __future__ import annotations

from typing import Any

from prune_lab.results.summary import Summary, flatten

_GROUPS = ("method", "schedule", "recovery", "post", "export")
_UNTOLD = ("none", "hf")  # options of the later groups that change nothing of what is measured


def run_name(summary: Summary) -> str:
    """Name of a run: what was done, such as structured 0.4 + finetune, or magnitude 2:4."""
    how_much = summary.config["method"].get("pattern") or f"{_amount(summary.config):g}"
    later = (summary.choices.get(group, "none") for group in ("recovery", "post", "export"))
    extra = [option for option in later if option not in _UNTOLD]
    return " + ".join([f"{summary.choices.get('method')} {how_much}", *extra])


def params_of(summary: Summary) -> dict[str, Any]:
    """The few, telling parameters: chosen options, amount, seed, device, and the chosen options' own keys."""
    config = summary.config
    chosen = summary.choices
    params: dict[str, Any] = {group: chosen[group] for group in ("model", "dataset", *_GROUPS) if group in chosen}
    params |= {"amount": _amount(config), "seed": config["seed"]}
    params |= {"dtype": summary.protocol["dtype"], "device": summary.protocol["device"]}
    for group in (group for group in _GROUPS if isinstance(config.get(group), dict)):
        unused = summary.not_applicable.get(group, [])
        for key, value in flatten(config[group], f"{group}.").items():
            if key != "method.amount":
                params[key] = "n/a" if key.removeprefix(f"{group}.") in unused else value
        params |= {f"{group}.{key}": "n/a" for key in unused if key != "amount"}
    return params


def _amount(config: dict[str, Any]) -> float:
    """The method's, which is the root's unless it was given one of its own; some have none."""
    found: float = config["method"].get("amount", config["amount"])
    return found


def tags_of(summary: Summary) -> dict[str, str]:
    """Tags of a finished run: the metrics that diverged, and the load of other processes while it was timed."""
    tags = {"diverged": ", ".join(summary.diverged)} if summary.diverged else {}
    busy = summary.environment.get("cores_used_by_others")
    return tags if busy is None else {**tags, "cores_used_by_others": str(busy)}
