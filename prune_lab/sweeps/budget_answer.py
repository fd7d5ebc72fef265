"""The answer of a search within bounds, as Markdown: above the leaderboard, and in the note of the sweep's parent."""

from __future__ import annotations

import math

from prune_lab.results.bounds import not_kept, number, said
from prune_lab.sweeps.budget import KL, Candidate, Found, shown


def answer(found: Found) -> str:
    """The outcome as Markdown: the winner, what each candidate came to, and how far predictions were off."""
    bounds = said(found.bounds)
    if found.winner is None:
        lines = [f"**Within {bounds}** ({found.runs} runs): no shape; {found.why_none}."]
    else:
        shape = shown(found.winner.counts, found.space.dense, "method.")
        what = f"`method=shape {shape}`" if found.winner.counts != found.space.dense else "the dense model, as it is"
        assert found.final is not None
        is_made, final = found.final.status == "FINISHED", found.final.metrics
        titles = {"quality/kl": "KL", "quality/perplexity": "perplexity", "params/total": "parameters"}
        figures = [f"{title} {number(final[name])}" for name, title in titles.items() if name in final]
        if not is_made:
            figures = [f"its last run, from all calibration windows, did not finish: {found.final.reason}"]
        lines = [f"**Within {bounds}** ({found.runs} runs): {what}; {', '.join(figures)}."]
        kept = [bound for bound in found.bounds if bound.metric != KL]
        if is_made and (missed := not_kept(kept, final)):
            lines += ["", f"Made from all calibration windows, it is not within: {'; '.join(missed)}."]
    if not found.candidates:
        return "\n".join([*lines, ""])
    metrics = list(dict.fromkeys([*found.costs, *(bound.metric for bound in found.bounds)]))
    head = ["shape", "damage", "KL held out", *(f"{name}" for name in metrics)]
    lines += ["", f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for one in sorted(found.candidates, key=lambda one: one.kl):
        shape = shown(one.counts, found.space.dense)
        if one.summary.status != "FINISHED":
            lines.append(f"| {shape} | {number(one.predicted)} | {one.summary.reason} |{'  |' * len(metrics)}")
            continue
        cells = [_predicted(one, name) for name in metrics]
        lines.append(f"| {shape} | {number(one.predicted)} | {number(one.kl)} | {' | '.join(cells)} |")
    lines += ["", *_errors(found), ""]
    return "\n".join(lines)


def _predicted(one: Candidate, metric: str) -> str:
    measured = number(one.metrics[metric]) if metric in one.metrics else "-"
    return f"{measured} (predicted {number(one.costs[metric])})" if metric in one.costs else measured


def _errors(found: Found) -> list[str]:
    """Sentences on how far predictions were from what was measured."""
    lines = []
    ratios = [one.kl / one.predicted for one in found.candidates if math.isfinite(one.kl) and one.predicted > 0]
    if ratios:
        lines.append(
            f"Damage is the sum over axes, each cut alone; the KL divergence of the whole shape was {min(ratios):.2f} "
            f"to {max(ratios):.2f} times that."
        )
    for metric in found.costs:
        off = [abs(one.costs[metric] / one.metrics[metric] - 1) for one in found.candidates if one.metrics.get(metric)]
        seen = f"at most {max(off):.2%} from what was measured of the candidates" if off else "not measured"
        if metric in found.fits:
            error = found.fits[metric].error
            held = f"; leaving out each of the shapes that it was fitted to, at most {error:.1%}"
            held = "" if math.isnan(error) else held
            lines.append(f"Predicted {metric} was {seen}{held}.")
        else:
            lines.append(f"Predicted {metric} was {seen}.")
    return lines
