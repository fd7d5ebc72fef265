"""Planted faults: single wrong expressions in the source, each with the tests that must fail because of it.

    python tests/faults.py             # every fault, half an hour on two busy cores; exit code 1 if one is not caught
    python tests/faults.py kl_reversed # these alone
    python tests/faults.py --table     # writes the table of tests/README.md

A fault is applied to a copy of the repository in a temporary folder, and its tests run there, in that copy's own code.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT

ROOT = Path(__file__).parent.parent
README = ROOT / "tests" / "README.md"
COPIED = ("prune_lab", "conf", "hydra_plugins", "experiments", "docs", "tests")  # and the files beside them
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
SIDE_BY_SIDE = 2
PATIENCE = 900  # seconds: a fault may have processes wait for each other
_CAUGHT = re.compile(r"^(?:FAILED|ERROR) tests/(\S+?::\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Fault:
    """A wrong expression: in `file` of the repository `old`, which occurs once, becomes `new`.

    tests: the narrowest tests, as file::function below tests/, of which at least one must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def subject(file: str) -> str:
    """The part of the package that a file is in, by which the table is ordered."""
    parts = Path(file).parts
    return parts[1] if len(parts) > 2 else Path(file).stem


def table() -> str:
    """The faults as Markdown."""
    lines = ["| fault | where | caught by |", "|---|---|---|"]
    for fault in sorted(FAULTS, key=lambda fault: subject(fault.file)):
        tests = ", ".join(f"`{test}`" for test in fault.tests)
        lines.append(f"| {fault.name.replace('_', ' ')} | `{fault.file.removeprefix('prune_lab/')}` | {tests} |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    """A page with the table between its two markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


def planted(fault: Fault) -> str:
    """The source of the fault's file with the fault; raises ValueError where `old` does not occur once."""
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.name}: {fault.old!r} occurs {text.count(fault.old)} times in {fault.file}, not once")
    return text.replace(fault.old, fault.new)


def copy_repository(folder: Path) -> None:
    """What the tests need of the repository, without what Python and pytest left there."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, folder)


def catch(fault: Fault) -> tuple[bool, str]:
    """Whether a test fails with the fault, and what to say of it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        copy_repository(folder)
        (folder / fault.file).write_text(planted(fault), encoding="utf-8")
        env = {**os.environ, "PYTHONPATH": str(folder)}
        found = subprocess.run(
            [sys.executable, "-c", "import prune_lab; print(prune_lab.__file__)"],
            cwd=folder, env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert Path(found.stdout.strip()).is_relative_to(folder), f"another prune_lab would be tested: {found.stdout}"
        tests = [f"tests/{test}" for test in fault.tests]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", *tests]
        run = subprocess.Popen(command, cwd=folder, env=env, stdout=PIPE, stderr=STDOUT, text=True, process_group=0)
        try:
            said, _ = run.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            return False, f"NOT CAUGHT: its tests did not end within {PATIENCE} s"
    if run.returncode == 0:
        return False, "NOT CAUGHT"
    failed = _CAUGHT.search(said)
    if run.returncode != 1 or failed is None:
        return False, f"NOT CAUGHT: its tests could not run\n{said[-3000:]}"
    return True, f"caught by {failed[1]}"


def main(arguments: list[str]) -> int:
    """Runs the faults of these names, or all; returns 1 where one is not caught, 2 where a name is unknown."""
    if arguments == ["--table"]:
        README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    if unknown := set(arguments) - {fault.name for fault in FAULTS}:
        sys.stderr.write(f"no such fault: {', '.join(sorted(unknown))}\n")
        return 2
    chosen, missed = [fault for fault in FAULTS if not arguments or fault.name in arguments], 0
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for fault, (caught, outcome) in zip(chosen, pool.map(catch, chosen), strict=True):
            missed += not caught
            sys.stdout.write(f"{fault.name}: {outcome}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(chosen) - missed} of {len(chosen)} faults caught\n")
    return int(missed > 0)


FAULTS = (
    # Which weights go
    Fault(
        "found_layouts_calibrate_each_time", "prune_lab/pruning/calibration.py",
        "    if cache is None:\n        yield from observe(needs)",
        "    if cache is None or anatomy.found is not None:\n        yield from observe(needs)",
        ("test_sharing.py::test_statistics_of_found_layouts_are_observed_once_too",),
    ),
    Fault(
        "kept_statistics_forget_the_tokens_of_an_expert", "prune_lab/pruning/dense_statistics.py",
        '"input_norm": ("input_norm", "rows"),', '"input_norm": ("input_norm",),',
        ("test_sharing.py::test_statistics_of_found_layouts_are_observed_once_too",),
    ),
    Fault(
        "states_of_another_bos", "prune_lab/measure/dense_states.py",
        ', "bos": self._bos.stamp}', "}",
        ("test_dense_states.py::test_other_states_of_another_text_batch_bos_or_model",),
    ),
    Fault(
        "states_of_fewer_windows_than_are_compared", "prune_lab/measure/perplexity.py",
        "return -(-compared // batch_size) * batch_size", "return compared // batch_size * batch_size",
        ("test_dense_states.py::test_figures_are_those_of_the_model_beside",),
    ),
    Fault(
        "count_rounded_down", "prune_lab/pruning/selection.py",
        "math.floor(numel * amount + 0.5)", "math.floor(numel * amount)",
        ("test_selection.py::test_counts_round_half_up",),
    ),
    Fault(
        "one_weight_of_a_row_too_few", "prune_lab/pruning/selection.py",
        "rank >= ties[row, 0]", "rank >= ties[row, 0] - 1",
        ("test_selection.py::test_ties_go_by_the_lower_index_first",),
    ),
    Fault(
        "ties_of_a_layer_all_go", "prune_lab/pruning/selection.py",
        "torch.ge(flat[end:],", "torch.gt(flat[end:],",
        ("test_selection.py::test_layer_selection_is_exact_with_heavy_ties",),
    ),
    Fault(
        "ties_of_a_pattern_by_the_higher_index", "prune_lab/pruning/selection.py",
        "columns[first] <= columns[second]", "columns[first] < columns[second]",
        ("test_selection.py::test_ties_within_a_pattern_go_by_the_lower_index_first",),
    ),
    Fault(
        "pattern_keeps_what_it_should_remove", "prune_lab/pruning/selection.py",
        "pattern.m - pattern.n, out=kept)", "pattern.n, out=kept)",
        ("test_selection.py::test_n_of_m_are_kept_not_removed",),
    ),
    Fault(
        "pattern_along_the_outputs", "prune_lab/methods/weights.py",
        "keep_pattern(scores, Pattern.parse(self.pattern))", "keep_pattern(scores.T, Pattern.parse(self.pattern)).T",
        ("test_methods.py::test_a_pattern_keeps_n_of_each_m",),
    ),
    Fault(
        "pattern_that_does_not_fit_is_not_refused", "prune_lab/methods/weights.py",
        "if inputs % m:", "if False:",
        ("test_methods.py::test_inputs_that_no_pattern_fits_are_refused",),
    ),
    Fault(
        "what_was_zero_is_ranked_again", "prune_lab/methods/weights.py",
        "scores.masked_fill(weight == 0, -1)", "scores",
        ("test_methods.py::test_zeros_stay_when_pruned_on",),
    ),
    # Masks
    Fault(
        "mask_not_held_in_training", "prune_lab/recovery/train.py",
        "self.work.masks.hold(trained)", "pass",
        ("test_training.py::test_pruned_weights_are_zero_after_every_step",),
    ),
    Fault(
        "mask_lost_when_lora_is_merged", "prune_lab/recovery/adapters.py",
        "add_(_update(linear, masks.keep.get(name), scale))", "add_(_update(linear, None, scale))",
        ("test_lora.py::test_adapters_and_their_merge_are_the_sum_by_hand",),
    ),
    Fault(
        "mask_lost_while_lora_trains", "prune_lab/recovery/adapters.py",
        "weight + scale * (b @ a) * keep", "weight + scale * (b @ a)",
        ("test_lora.py::test_adapters_and_their_merge_are_the_sum_by_hand",),
    ),
    # Mixtures in few bits, in training, beside the dense model
    Fault(
        "parts_of_experts_in_another_order", "prune_lab/models/low_bit/experts.py",
        "return self._of(expert).expand()", "return self._of(0).expand()",
        ("test_low_bit_experts.py::test_each_expert_is_rounded_as_a_linear_of_its_own",),
    ),
    Fault(
        "updates_of_experts_past_the_mask", "prune_lab/recovery/expert_adapters.py",
        "update.masked_fill(~self._keep, 0)", "update",
        ("test_expert_adapters.py::test_updates_and_their_gradients_by_hand",),
    ),
    Fault(
        "routers_trained_all_the_same", "prune_lab/recovery/recipe.py",
        "module.requires_grad_(False)", "module.requires_grad_(True)",
        ("test_expert_adapters.py::test_routers_stay_as_they_are_if_asked_to",),
    ),
    Fault(
        "choices_by_the_numbers_of_what_is_left", "prune_lab/measure/routing.py",
        "numbers[block].to(chosen.device)[chosen] if block in numbers else chosen", "chosen",
        ("test_routing.py::test_choices_that_are_the_same_by_hand",),
    ),
    Fault(
        "idle_experts_are_read", "prune_lab/measure/size.py",
        "idle = sum(size for _, size in _idle_weights(anatomy))", "idle = 0",
        ("test_routing.py::test_weights_that_a_token_reads_by_hand",),
    ),
    Fault(
        "experts_forgotten_on_resume", "prune_lab/pruning/surgery.py",
        "    if shape.experts:\n", "    if False:\n",
        ("test_routing.py::test_what_was_found_of_experts_outlives_an_interruption",),
    ),
    # Surgery
    Fault(
        "bias_not_cut", "prune_lab/pruning/surgery.py",
        'found[f"{part.name}.bias"] = [Selection(0, index)]', "pass",
        ("test_structured.py::test_biases_leave_with_their_rows",),
    ),
    Fault(
        "bias_not_zeroed", "prune_lab/pruning/surgery.py",
        "part.linear.bias[~part.lines(kept)] = 0", "pass",
        ("test_structured.py::test_not_physical_keeps_every_shape",),
    ),
    Fault(
        "compensation_of_the_wrong_sign", "prune_lab/pruning/surgery.py",
        "reader.linear.bias.float() + shift", "reader.linear.bias.float() - shift",
        ("test_structured.py::test_the_bias_makes_up_for_what_units_gave_on_average",),
    ),
    Fault(
        "refit_of_columns_to_the_wrong_side", "prune_lab/pruning/refit.py",
        "target[:, kept] + change", "target[:, kept] - change",
        ("test_refit.py::test_columns_of_the_worked_example",),
    ),
    Fault(
        "refit_forgets_the_mean_of_what_stays", "prune_lab/pruning/refit.py",
        "target[:, gone] @ mean[gone] - change @ mean[kept]", "target[:, gone] @ mean[gone]",
        ("test_refit.py::test_columns_of_the_worked_example_with_a_bias",),
    ),
    Fault(
        "refit_of_rows_fills_zeros", "prune_lab/pruning/refit.py",
        "residual = residual.mul_(scale).mul_(keep)", "residual = residual.mul_(scale)",
        ("test_refit.py::test_conjugate_gradients_end_at_the_solution_of_each_row",),
    ),
    Fault(
        "refit_of_columns_forgets_its_target", "prune_lab/pruning/refit.py",
        "missing if wanted is None else missing + wanted[kept]", "missing",
        ("test_refit.py::test_columns_for_a_target_are_its_least_squares_solution",),
    ),
    Fault(
        "states_repaired_with_the_wrong_sign", "prune_lab/pruning/dense_beside.py",
        "error = rows(out_of_dense).float() - rows(out_of_pruned).float()",
        "error = rows(out_of_pruned).float() - rows(out_of_dense).float()",
        ("test_refit.py::test_errors_are_those_of_two_models_side_by_side",
         "test_refit.py::test_a_block_that_repairs_the_states_ends_nearer_to_the_dense_model"),
    ),
    Fault(
        "dense_model_beside_stands_still", "prune_lab/pruning/dense_beside.py",
        "self._stream.states[number] = out_of_dense", "pass",
        ("test_refit.py::test_errors_are_those_of_two_models_side_by_side",),
    ),
    Fault(
        "reconstruction_on_its_own_inputs", "prune_lab/recovery/reconstruction.py",
        "(states.to(args[0].dtype), *args[1:])", "args",
        ("test_reconstruct.py::test_it_is_adamw_on_the_outputs_of_each_mlp",),
    ),
    Fault(
        "reconstruction_moves_pruned_weights", "prune_lab/recovery/reconstruction.py",
        "clear(self._linears[name].weight, keep)", "pass",
        ("test_reconstruct.py::test_outputs_come_nearer_and_all_else_stays",),
    ),
    Fault(
        "refit_to_the_pruned_weight", "prune_lab/methods/weights.py",
        "refit_rows(dense, weight, statistics.gram", "refit_rows(weight, weight, statistics.gram",
        ("test_refit.py::test_a_refit_of_rows_keeps_zeros_and_lowers_the_error",),
    ),
    Fault(
        "experts_seen_as_the_first_one", "prune_lab/models/products.py",
        "int(w.storage_offset()) - start)", "0)",
        ("test_found.py::test_an_expert_is_observed_on_its_own_tokens",),
    ),
    Fault(
        "routers_are_pruned", "prune_lab/models/found.py",
        "        return ROUTER", "        pass",
        ("test_found.py::test_routers_are_left_alone",),
    ),
    Fault(
        "halves_taken_for_interleaved_channels", "prune_lab/models/unit_probe.py",
        "for widths in ((1,) * count, (count,)):", "for widths in ((1,) * count,):",
        ("test_found_units.py::test_channels_of_interleaved_experts_by_hand",),
    ),
    Fault(
        "experts_lose_the_same_channels", "prune_lab/models/unit_cut.py",
        "index = torch.stack(indices)\n", "index = indices[0]\n",
        ("test_found_units.py::test_channels_of_interleaved_experts_by_hand",),
    ),
    Fault(
        "units_of_unseen_experts_are_scored", "prune_lab/methods/structured.py",
        "if self.calibrated and statistics[reader.name].is_unseen:", "if False:",
        ("test_found_units.py::test_an_expert_that_saw_hardly_a_token_loses_its_lowest_norms",),
    ),
    Fault(
        "shared_experts_keep_another_share", "prune_lab/models/unit_fields.py",
        "multiple=s.units // count", "multiple=1",
        ("test_found_units.py::test_shared_experts_keep_the_same_share_where_one_field_holds_both",),
    ),
    Fault(
        "reap_without_the_gates", "prune_lab/pruning/expert_scores.py",
        "total(g * norms)", "total(norms)",
        ("test_experts.py::test_golden_values",),
    ),
    Fault(
        "best_experts_go", "prune_lab/pruning/expert_scores.py",
        "gone = by_group.argsort(dim=1, stable=True)", "gone = (-by_group).argsort(dim=1, stable=True)",
        ("test_experts.py::test_frequency_and_reap_remove_different_experts",),
    ),
    Fault(
        "outputs_of_experts_behind_the_gate", "prune_lab/models/watched_experts.py",
        "ones = torch.ones(tokens * k, 1,", "ones = torch.full((tokens * k, 1), 0.5,",
        ("test_experts.py::test_scores_of_a_mixture_by_hand",),
    ),
    Fault(
        "active_experts_of_what_is_left", "prune_lab/methods/active_experts.py",
        "total - count_to_remove(total, amount)), top.count)",
        "top.count - count_to_remove(top.count, amount)), top.count)",
        ("test_active_experts.py::test_prunings_in_a_row_are_of_the_dense_models_number",),
    ),
    Fault(
        "layout_of_more_active_experts_kept", "prune_lab/pruning/surgery.py",
        "note_count(anatomy, ACTIVE, top.count, count)\n    forget_layout(model)\n",
        "note_count(anatomy, ACTIVE, top.count, count)\n",
        ("test_active_experts.py::test_active_parameters_and_work_follow",),
    ),
    Fault(
        "dense_results_whatever_the_config", "prune_lab/dense_cache.py",
        "and self._model.config.to_dict() == model.config.to_dict()\n", "\n",
        ("test_active_experts.py::test_results_of_the_dense_model_are_not_served_for_it",),
    ),
    Fault(
        "gates_of_experts_left_out", "prune_lab/pruning/statistics.py",
        "rows.float() * gates[:, None]", "rows.float()",
        ("test_expert_gates.py::test_weights_of_experts_go_by_gated_inputs",),
    ),
    Fault(
        "gates_of_the_first_choice", "prune_lab/pruning/expert_gates.py",
        "gates[token, choice].float()", "gates[token, 0].float()",
        ("test_expert_gates.py::test_weights_of_experts_go_by_gated_inputs",),
    ),
    Fault(
        "unseen_experts_are_scored", "prune_lab/methods/weights.py",
        "if self.calibrated and statistics.is_unseen:", "if False:",
        ("test_found.py::test_an_expert_that_saw_hardly_a_token_is_pruned_by_magnitude_and_the_run_says_so",),
    ),
    Fault(
        "scaled_logits_without_their_scale", "prune_lab/models/loss.py",
        "return found is not None and found.whole_logits", "return False",
        ("test_found.py::test_losses_are_those_of_the_models_own_logits",),
    ),
    Fault(
        "blocks_called_alone_that_cannot_be", "prune_lab/pruning/calibration.py",
        "if not layout.one_by_one:", "if False:",
        ("test_found.py::test_blocks_that_cannot_be_called_alone_are_calibrated_in_whole_passes",),
    ),
    Fault(
        "conv1d_not_transposed", "prune_lab/models/anatomy.py",
        "tensor.T if isinstance(module, Conv1D) else tensor", "tensor",
        ("test_families.py::test_a_pattern_runs_along_the_inputs_of_a_transposed_matrix",),
    ),
    Fault(
        "conv1d_cut_along_the_wrong_axis", "prune_lab/pruning/surgery.py",
        'int((part.side == "rows") != isinstance(part.linear, nn.Linear))', 'int(part.side != "rows")',
        ("test_families.py::test_masked_and_sliced_channels_are_those_zeroed_by_hand",),
    ),
    Fault(
        "query_heads_chosen_over_all_groups", "prune_lab/pruning/obs.py",
        "cost[~there | (gone_of_part[of_part] >= quota)] = torch.inf", "cost[~there] = torch.inf",
        ("test_obs.py::test_of_each_part_as_many_go",),
    ),
    Fault(
        "kv_group_cut_with_one_query_head", "prune_lab/models/anatomy.py",
        'heads = self.query_heads // self.unit_count("heads") if run', "heads = 1 if run",
        ("test_families.py::test_masked_groups_are_those_zeroed_by_hand",),
    ),
    Fault(
        "rows_of_a_unit_interleaved", "prune_lab/models/anatomy.py",
        "units.repeat_interleave(width)", "units.repeat(width)",
        ("test_families.py::test_masked_groups_are_those_zeroed_by_hand",),
    ),
    Fault(
        "fused_rows_in_another_order", "prune_lab/models/families.py",
        '"rows", ("query", "kv", "kv"))', '"rows", ("kv", "query", "kv"))',
        ("test_families.py::test_masked_groups_are_those_zeroed_by_hand",),
    ),
    Fault(
        "interleaved_rows_read_as_runs", "prune_lab/models/families.py",
        '"rows", ("qkv",))', '"rows", ("kv", "kv", "kv"))',
        ("test_families.py::test_masked_groups_are_those_zeroed_by_hand",),
    ),
    Fault(
        "config_not_updated", "prune_lab/models/resize.py",
        "data |= {name: count * ((data.get(name) or was) // was) for name in units.counts}", "pass",
        ("test_structured.py::test_every_block_and_the_config_hold_the_same_count",),
    ),
    Fault(
        "head_dim_left_to_its_default", "prune_lab/models/resize.py",
        "data |= {name: getattr(anatomy, name) for name in units.written_out}", "pass",
        ("test_structured.py::test_an_export_loads_and_generates_in_stock_transformers",),
    ),
    Fault(
        "stand_in_with_a_window", "prune_lab/models/stand_in.py",
        '{"mistral": {"sliding_window": None}}', '{"mistral": {}}',
        ("test_stand_in.py::test_a_mistral_computes_what_the_masked_llama_does",),
    ),
    Fault(
        "stand_in_not_tried", "prune_lab/models/stand_in.py",
        "if not is_same(found, wanted):", "if False:",
        ("test_stand_in.py::test_what_a_mistral_computes_otherwise_is_refused_before_the_work",),
    ),
    Fault(
        "resumed_as_another_class", "prune_lab/pruning/surgery.py",
        "if shape.model_type != anatomy.config.model_type:", "if False:",
        ("test_stand_in.py::test_an_interrupted_training_goes_on_as_what_it_was",),
    ),
    Fault(
        "hooks_lost_in_a_rebuild", "prune_lab/models/rebuild.py",
        'for key, hooks in of_old.items() if "hook" in key and hooks', "for key, hooks in ()",
        ("test_stand_in.py::test_dropout_of_a_training_goes_on_in_a_mistral_and_ends",),
    ),
    Fault(
        "norms_of_fewer_channels_not_multiplied", "prune_lab/models/hidden.py",
        "cuts[-1].new.copy_(scale(cuts[-1].new.float(), factor))", "pass",
        ("test_hidden.py::test_a_cut_model_is_the_model_with_zeros_in_their_place",),
    ),
    Fault(
        "last_norm_before_a_tied_head_multiplied", "prune_lab/models/hidden.py",
        "1.0 if before_head else factor", "factor",
        ("test_hidden.py::test_a_cut_model_is_the_model_with_zeros_in_their_place",),
    ),
    Fault(
        "channels_go_without_a_comparison", "prune_lab/models/hidden.py",
        "return found is not None and wanted is not None and is_same(found, wanted)", "return True",
        ("test_hidden.py::test_norms_that_subtract_a_mean_are_refused",),
    ),
    Fault(
        "score_of_all_tokens_at_once", "prune_lab/pruning/hidden.py",
        "states.float().abs().mean(1).square().sum(0)", "states.float().abs().square().sum((0, 1))",
        ("test_hidden.py::test_the_score_is_minitrons",),
    ),
    Fault(
        "score_of_the_last_norm_too", "prune_lab/models/hidden.py",
        "if name in read and name.startswith(inside)]", "if name in read]",
        ("test_hidden.py::test_channels_of_lowest_score_go",),
    ),
    Fault(
        "refit_for_the_dense_inputs", "prune_lab/pruning/hidden.py",
        ".forward(states * keep)[..., keep]", ".forward(states)[..., keep]",
        ("test_hidden.py::test_the_refit_is_least_squares",),
    ),
    Fault(
        "channels_forgotten_by_a_checkpoint", "prune_lab/pruning/surgery.py",
        "remove_hidden(anatomy, torch.arange(anatomy.unit_count(HIDDEN)) < count)", "pass",
        ("test_hidden.py::test_an_interrupted_training_goes_on_with_fewer_channels",),
    ),
    Fault(
        "blocks_apart_counted_as_a_run", "prune_lab/pruning/block_importance.py",
        "(distances[start][start + remove], start)", "(distances[start][start + 1], start)",
        ("test_depth.py::test_by_angle_a_run_of_blocks_goes",),
    ),
    Fault(
        "blocks_taken_that_cannot_go_together", "prune_lab/models/removable_blocks.py",
        "if len(chosen) < count and self.can_go([*chosen, block]):", "if len(chosen) < count:",
        ("test_found_depth.py::test_of_blocks_that_cannot_go_together_one_stays",),
    ),
    Fault(
        "divergence_of_dense_from_pruned", "prune_lab/pruning/block_importance.py",
        "position_divergences(logits_of(before, dense), logits_of(model, states))[0]",
        "-position_divergences(logits_of(before, dense), logits_of(model, states))[0]",
        ("test_depth.py::test_by_kl_each_step_drops_the_block_that_is_missed_least",),
    ),
    Fault(
        "most_influential_blocks_go", "prune_lab/pruning/block_importance.py",
        "key=lambda index: (influence[index], index)", "key=lambda index: (-influence[index], index)",
        ("test_depth.py::test_the_blocks_of_least_influence_go",),
    ),
    Fault(
        "blocks_before_removed_ones_repair_nothing", "prune_lab/pruning/depth_refit.py",
        "for index in range(max(at, before), run.stop):", "for index in range(max(at, before), run.start):",
        ("test_depth.py::test_a_refit_is_the_least_squares_of_two_models_side_by_side",
         "test_depth.py::test_whichever_blocks_go_the_states_come_nearer"),
    ),
    Fault(
        "later_refits_do_not_see_earlier_ones", "prune_lab/pruning/depth_refit.py",
        "calibrator.forward(pruned, before, bar, keep=True)", "pruned.states = list(dense.states)",
        ("test_depth.py::test_a_refit_is_the_least_squares_of_two_models_side_by_side",),
    ),
    Fault(
        "blocks_go_without_a_comparison", "prune_lab/models/fewer_blocks.py",
        "float((one - other).abs().max()) if one.shape", "0.0 if one.shape",
        ("test_found_depth.py::test_blocks_that_cannot_go_stay",),
    ),
    Fault(
        "config_has_the_entries_of_other_blocks", "prune_lab/models/fewer_blocks_config.py",
        "made = [value[index] for index in kept]", "made = list(value[: len(kept)])",
        ("test_found_depth.py::test_a_config_says_which_blocks_are_left",),
    ),
    Fault(
        "embeddings_keep_the_parts_of_other_blocks", "prune_lab/models/fewer_blocks.py",
        "torch.cat([lines[block] for block in kept])", "torch.cat(list(lines[: len(kept)]))",
        ("test_found_depth.py::test_embeddings_of_each_block_lose_their_part_and_the_optimizer_follows",),
    ),
    Fault(
        "float32_kept_under_the_names_of_other_blocks", "prune_lab/recovery/train.py",
        "dense_name(anatomy, name)", "name",
        ("test_found_depth.py::test_blocks_go_in_a_training_of_a_model_that_was_loaded_in_bfloat16",),
    ),
    # Scores and their statistics
    Fault(
        "wanda_norm_by_the_wrong_axis", "prune_lab/pruning/scores.py",
        "weight.float().abs() * statistics.input_norm\n", "weight.float().abs() * statistics.input_norm.mean()\n",
        ("test_scores.py::test_wanda_is_weight_times_norm",),
    ),
    Fault(
        "ria_without_column_sums", "prune_lab/pruning/scores.py",
        "size / columns + size / rows", "size / rows",
        ("test_scores.py::test_ria_is_that_of_a_double_loop",),
    ),
    Fault(
        "biased_variance", "prune_lab/pruning/statistics.py",
        "max(1, self._tokens - 1)", "max(1, self._tokens)",
        ("test_scores.py::test_wifv_is_squared_weight_times_unbiased_variance",),
    ),
    Fault(
        "variance_merged_wrongly", "prune_lab/pruning/statistics.py",
        "(n * more / (n + more))", "(n * more / n)",
        ("test_calibration.py::test_statistics_do_not_depend_on_the_batch_size",),
    ),
    Fault(
        "half_of_the_gram", "prune_lab/pruning/statistics.py",
        "self._gram.triu() + self._gram.triu(1).T", "self._gram.triu()",
        ("test_calibration.py::test_statistics_are_those_of_one_stock_forward_pass",),
    ),
    Fault(
        "blocks_calibrated_on_stale_states", "prune_lab/pruning/calibration.py",
        "if propagate_pruned and index < last:", "if False:",
        ("test_calibration.py::test_later_blocks_are_seen_behind_what_was_asked_for",),
    ),
    Fault(
        "saliency_of_the_gradient_alone", "prune_lab/pruning/gradients.py",
        "weight.detach().float() * weight.grad.float()", "weight.grad.float()",
        ("test_scores.py::test_saliency_is_that_of_plain_autograd",),
    ),
    Fault(
        "dead_inputs_keep_their_weights", "prune_lab/pruning/sparsegpt_solver.py",
        "columns[dead] = 0", "pass",
        ("test_sparsegpt.py::test_dead_inputs_lose_their_weights_and_disturb_nothing",),
    ),
    Fault(
        "damping_without_the_mean_of_the_diagonal", "prune_lab/pruning/gram.py",
        "damped.diagonal().add_(used * mean)", "damped.diagonal().add_(used)",
        ("test_sparsegpt.py::test_the_scale_of_the_gram_changes_nothing",),
    ),
    Fault(
        "error_not_passed_on_to_later_windows", "prune_lab/pruning/sparsegpt_solver.py",
        "torch.sub(was, columns[part], out=changes[part])", "pass",
        ("test_sparsegpt.py::test_the_solver_is_the_textbook_loop",),
    ),
    Fault(
        "rows_of_a_window_ranked_together", "prune_lab/pruning/sparsegpt_solver.py",
        "if pattern is None and by_row:", "if False:",
        ("test_sparsegpt.py::test_by_row_every_row_loses_the_same_number",),
    ),
    Fault(
        "inputs_removed_without_an_update_of_the_others", "prune_lab/pruning/obs.py",
        "values.addmm_(cross.T, errors, alpha=-1)", "errors",
        ("test_obs.py::test_what_goes_is_what_costs_least",),
    ),
    Fault(
        "units_chosen_as_if_no_bias_moved", "prune_lab/methods/structured.py",
        'self.refit != "none" and reader.linear.bias is not None', "False",
        ("test_obs.py::test_units_go_as_their_loss_was_tried",),
    ),
    # How much goes where, and when
    Fault(
        "allocation_loses_the_total", "prune_lab/pruning/allocation.py",
        "max(0.0, v + high)) for v in values]", "max(0.0, v + high / 2)) for v in values]",
        ("test_allocation.py::test_owl_keeps_the_mean_over_weights",),
    ),
    Fault(
        "owl_prunes_outliers_most", "prune_lab/pruning/allocation.py",
        "[-density for density in densities]", "densities",
        ("test_allocation.py::test_owl_of_the_worked_example",),
    ),
    Fault(
        "allocation_ignores_the_sizes_of_blocks", "prune_lab/pruning/allocation.py",
        "(y1 - y0) / ((x1 - x0) * size)", "(y1 - y0) / (x1 - x0)",
        ("test_allocation.py::test_the_cheapest_step_for_each_weight_goes_first",),
    ),
    Fault(
        "scan_leaves_the_model_pruned", "prune_lab/pruning/loss_increase.py",
        "block.load_state_dict(before)", "pass",
        ("test_sensitivity.py::test_the_model_is_bit_identical_afterwards",),
    ),
    Fault(
        "gradual_schedule_one_event_early", "prune_lab/schedules.py",
        "range(first + every, last, every)", "range(first, last, every)",
        ("test_schedules.py::test_the_amounts_by_hand",),
    ),
    Fault(
        "iterative_amounts_not_cumulative", "prune_lab/schedules.py",
        "share = number / self.rounds", "share = 1 / self.rounds",
        ("test_schedules.py::test_the_amounts_by_hand",),
    ),
    Fault(
        "rewinding_to_the_wrong_step", "prune_lab/recovery/rewinding.py",
        "and step == self._rewind.step", "and step == self._rewind.step + 1",
        ("test_rewinding.py::test_what_stays_goes_back_to_exactly_what_it_was",),
    ),
    Fault(
        "learning_rate_not_rewound", "prune_lab/recovery/rewinding.py",
        "return back_to + step - began, back_to + ended - began", "return step, self._steps",
        ("test_rewinding.py::test_the_learning_rate_of_every_step_by_hand",),
    ),
    # Training
    Fault(
        "optimizer_state_not_resumed", "prune_lab/recovery/checkpoint.py",
        'if key.startswith("optimizer/"):', "if False:",
        ("test_interrupted.py::test_an_interrupted_training_ends_in_the_same_model",),
    ),
    Fault(
        "random_state_not_resumed", "prune_lab/recovery/checkpoint.py",
        'torch.set_rng_state(self.tensors["rng"])', "pass",
        ("test_interrupted.py::test_an_interrupted_training_ends_in_the_same_model",),
    ),
    Fault(
        "moments_do_not_follow_a_cut", "prune_lab/recovery/optimizer.py",
        "state = optimizer.state.pop(cut.old, {})", "state = {}",
        ("test_schedules.py::test_the_optimizer_goes_on_with_the_state_of_what_stays",),
    ),
    Fault(
        "kl_reversed", "prune_lab/recovery/losses.py",
        "kl_div(found, wanted,", "kl_div(wanted, found,",
        ("test_training.py::test_the_soft_loss_by_hand",),
    ),
    Fault(
        "load_balance_is_told_and_not_trained", "prune_lab/recovery/losses.py",
        "loss + balance.coefficient * of_routers", "loss + balance.coefficient * of_routers.detach()",
        ("test_mixtures.py::test_the_loss_of_a_mixture_is_stocks",),
    ),
    Fault(
        "blocks_make_up_for_each_others_load", "prune_lab/models/loss.py",
        "    if by_block:", "    if False:",
        ("test_mixtures.py::test_each_block_may_have_its_own_balance",),
    ),
    Fault(
        "experts_begin_without_a_fit", "prune_lab/models/split.py",
        "fitted.view(count, width, -1).mT", "down[:, channels].transpose(0, 1)",
        ("test_mixtures.py::test_experts_begin_as_what_the_dense_mlp_adds",),
    ),
    Fault(
        "warm_up_begins_at_zero", "prune_lab/recovery/optimizer.py",
        "(step + 1) / warm", "step / warm",
        ("test_training.py::test_the_learning_rate_by_hand",),
    ),
    Fault(
        "parts_of_a_batch_count_whole", "prune_lab/recovery/train.py",
        "len(part) / len(mine)", "1.0",
        ("test_schedules.py::test_parts_of_a_batch_make_the_same_training",),
    ),
    Fault(
        "best_weights_from_before_the_last_pruning", "prune_lab/recovery/validation.py",
        "step > self._training.last_event", "step >= 0",
        ("test_validation.py::test_what_was_measured_before_the_last_pruning_is_not_the_best",),
    ),
    Fault(
        "share_of_a_process_taken_for_all", "prune_lab/pruning/statistics.py",
        "if world.size == 1:", "if world.size:",
        ("test_shared_windows.py::test_two_processes_find_what_one_does",),
    ),
    Fault(
        "deviations_from_the_mean_of_a_share", "prune_lab/pruning/statistics.py",
        "self._deviations += (self._mean - mean).square_() * self._tokens", "pass",
        ("test_shared_windows.py::test_two_processes_find_what_one_does",),
    ),
    Fault(
        "errors_of_a_share_of_the_windows", "prune_lab/pruning/dense_beside.py",
        "(self._products.values(), self._sums.values(), [tokens])", "(self._sums.values(), [tokens])",
        ("test_shared_windows.py::test_two_processes_find_what_one_does",),
    ),
    Fault(
        "gradients_of_a_share_of_the_windows", "prune_lab/pruning/gradients.py",
        "world.sum(sums[name] for name in linears)", "pass",
        ("test_shared_windows.py::test_two_processes_find_what_one_does",),
    ),
    Fault(
        "parts_of_windows_in_another_order", "prune_lab/system/world.py",
        "return torch.cat([found[:count] for", "return torch.cat([found[len(found) - count :] for",
        ("test_shared_windows.py::test_two_processes_find_what_one_does",),
    ),
    Fault(
        "every_process_takes_all_windows", "prune_lab/system/world.py",
        "return self if self.size <= count else World()", "return World()",
        ("test_shared_windows.py::test_two_processes_find_what_one_does",),
    ),
    Fault(
        "processes_that_differ_go_on", "prune_lab/system/world.py",
        "return self.all(mine == self.from_main(mine))", "return True",
        ("test_shared_windows.py::test_two_processes_find_what_one_does",),
    ),
    Fault(
        "processes_sum_their_gradients", "prune_lab/system/world.py",
        "flat /= self.size", "pass",
        ("test_world.py::test_a_sweep_of_two_processes_is_recorded_once_and_found_again",),
    ),
    # Text
    Fault(
        "calibration_overlaps_the_test_text", "prune_lab/text/splits.py",
        '"calibration": (17, 18)', '"calibration": (17, 20)',
        ("test_text.py::test_one_document_is_cut_by_position",),
    ),
    Fault(
        "test_documents_drawn_for_calibration", "prune_lab/text/splits.py",
        '_BUCKET_SPLIT.get(bucket, "train")', '_BUCKET_SPLIT.get(int(key < "m"), "train")',
        ("test_text.py::test_the_standard_library_is_split_by_the_hash_of_each_path",),
    ),
    Fault(
        "named_calibration_text_may_be_the_test_text", "prune_lab/text/calibration_corpus.py",
        "whole.apart_from(run, taken)", "whole",
        ("test_calibration_source.py::test_what_the_run_trains_or_tests_on_is_left_out",),
    ),
    Fault(
        "parts_of_a_mix_one_after_the_other", "prune_lab/text/calibration_windows.py",
        "key=lambda w: ((2 * w[1] + 1) / (2 * w[2]), w[0])", "key=lambda w: w[0]",
        ("test_calibration_mix.py::test_every_stretch_of_a_mix_is_about_in_its_shares",),
    ),
    Fault(
        "a_document_in_two_parts_of_a_mix", "prune_lab/text/calibration_corpus.py",
        "taken |= whole.digests.keys()", "taken |= set()",
        ("test_calibration_mix.py::test_a_document_is_in_one_part_of_a_mix",),
    ),
    Fault(
        "calibration_windows_cross_documents", "prune_lab/text/sampling.py",
        "int(torch.randint(int(lengths[document]) - seq_len, (1,), generator=generator))",
        "int(torch.randint(int(lengths[document]), (1,), generator=generator))",
        ("test_text.py::test_calibration_windows_lie_inside_their_documents",),
    ),
    Fault(
        "bos_not_prefixed", "prune_lab/text/bos.py",
        "torch.cat([windows.new_full((len(windows), 1), self.id), windows], dim=1)",
        "torch.cat([windows[:, :1], windows], dim=1)",
        ("test_bos.py::test_perplexity_is_that_of_a_naive_loop",),
    ),
    # What is measured
    Fault(
        "window_counted_twice", "prune_lab/measure/perplexity.py",
        "losses.double().mean()", "torch.cat([losses, losses[-1:]]).double().mean()",
        ("test_measures.py::test_perplexity_is_that_of_a_naive_loop",),
    ),
    Fault(
        "loss_divided_by_all_tokens", "prune_lab/models/loss.py",
        "token_losses(model, batch, prefix).mean(1)", "token_losses(model, batch, prefix).sum(1) / batch.shape[1]",
        ("test_families.py::test_losses_and_steps_are_those_of_the_whole_model",),
    ),
    Fault(
        "logits_not_capped", "prune_lab/models/loss.py",
        "logits if cap is None else cap * torch.tanh(logits / cap)", "logits",
        ("test_families.py::test_losses_and_steps_are_those_of_the_whole_model",),
    ),
    Fault(
        "logits_of_all_chunks_kept", "prune_lab/models/loss.py",
        "if len(chunks) == 1 or not torch.is_grad_enabled():", "if True:",
        ("test_losses.py::test_the_logits_of_a_window_are_never_held",),
    ),
    Fault(
        "gguf_entry_without_the_content", "prune_lab/models/gguf_folder.py",
        "of = [content, version", "of = [version",
        ("test_gguf.py::test_what_is_kept_is_made_once_and_never_stale",),
    ),
    Fault(
        "gguf_tensors_left_out", "prune_lab/models/gguf_folder.py",
        "unread = sorted(header.tensors.keys() - wanted)", "unread = list[str]()",
        ("test_gguf.py::test_tensors_that_transformers_leaves_out_are_refused",),
    ),
    Fault(
        "gguf_folder_not_held_while_streamed", "prune_lab/models/load.py",
        "weakref.finalize(weights.source, stack.pop_all().close)", "stack.pop_all().close()",
        ("test_gguf.py::test_streamed_it_is_the_same_and_its_files_stay",),
    ),
    Fault(
        "bits_per_byte_multiplied", "prune_lab/measure/perplexity.py",
        "/ bytes_per_token)", "* bytes_per_token)",
        ("test_measures.py::test_bits_per_byte_by_hand",),
    ),
    Fault(
        "divergence_reversed", "prune_lab/measure/divergence.py",
        "dense.log_softmax(-1), compressed.log_softmax(-1)", "compressed.log_softmax(-1), dense.log_softmax(-1)",
        ("test_divergence.py::test_golden_divergence",),
    ),
    Fault(
        "divergence_of_other_positions", "prune_lab/measure/perplexity.py",
        "states_of_dense.flatten(0, 1), targets.flatten()).cpu()",
        "states_of_dense.roll(1, 1).flatten(0, 1), targets.flatten()).cpu()",
        ("test_divergence.py::test_divergence_is_that_of_whole_logits",),
    ),
    Fault(
        "interval_of_a_ratio_not_paired", "prune_lab/measure/divergence.py",
        "(compressed.double() - dense.double()).flatten()", "compressed.double().flatten()",
        ("test_divergence.py::test_golden_ratio_and_its_error",),
    ),
    Fault(
        "flips_of_lost_answers_alone", "prune_lab/measure/divergence.py",
        "sum(a != b for", "sum(a > b for",
        ("test_divergence.py::test_golden_flips",),
    ),
    Fault(
        "repetition_of_what_is_not_repeated", "prune_lab/measure/continuations.py",
        "1 - len(set(grams)) / len(grams)", "len(set(grams)) / len(grams)",
        ("test_generation.py::test_golden_repetition",),
    ),
    Fault(
        "loops_that_were_left", "prune_lab/measure/continuations.py",
        "half = ids[len(ids) // 2 :]", "half = ids[: len(ids) // 2]",
        ("test_generation.py::test_loops_by_hand",),
    ),
    Fault(
        "texts_end_at_one_token_alone", "prune_lab/measure/generation.py",
        "if ids[-1] in ends:", "if ids[-1] in ends[:1]:",
        ("test_generation.py::test_it_ends_at_the_first_of_several_tokens",),
    ),
    Fault(
        "dense_texts_of_other_prompts", "prune_lab/evaluator.py",
        'value("continuations", self.prompts.stamp, found)', 'value("continuations", {}, found)',
        ("test_generation.py::test_dense_continuations_are_kept",),
    ),
    Fault(
        "tokens_without_their_cache", "prune_lab/measure/inference.py",
        "return model(input_ids=last, use_cache=True, **{name: getattr(output, name)})",
        "return model(input_ids=last, use_cache=True)",
        ("test_generation.py::test_greedy_as_without_a_cache_and_as_generate",),
    ),
    Fault(
        "texts_as_markup_in_the_page", "prune_lab/report/page.py",
        "return escape(printable(text))", "return printable(text)",
        ("test_generation.py::test_texts_are_text_in_the_page",),
    ),
    Fault(
        "queries_in_the_kv_cache", "prune_lab/measure/size.py",
        "width += rows - _shape(block.get_submodule(family.attention_output))[1]", "width += rows",
        ("test_divergence.py::test_the_cache_holds_what_is_counted",),
    ),
    Fault(
        "speedup_inverted", "prune_lab/measure/speed.py",
        "(self.dense / self.compressed).quantile(0.5)", "(self.compressed / self.dense).quantile(0.5)",
        ("test_measures.py::test_a_constant_ratio_is_the_speedup",),
    ),
    Fault(
        "interval_of_unpaired_times", "prune_lab/measure/speed.py",
        "medians = ratios[drawn]", "medians = (self.dense[drawn] / self.compressed[drawn.flip(0)])",
        ("test_measures.py::test_a_constant_ratio_is_the_speedup",),
    ),
    Fault(
        "interval_of_90_percent", "prune_lab/measure/speed.py",
        "[0.025, 0.975]", "[0.05, 0.95]",
        ("test_latency.py::test_95_percent_of_the_intervals_hold_the_truth",),
    ),
    Fault(
        "pairs_always_in_one_order", "prune_lab/measure/speed.py",
        "if pair % 2 == 0", "if pair >= 0",
        ("test_measures.py::test_pairs_alternate_their_order_and_warm_up_is_not_counted",),
    ),
    Fault(
        "macs_of_attention_counted_double", "prune_lab/measure/macs.py",
        "2 * context * heads", "4 * context * heads",
        ("test_macs.py::test_macs_by_hand",),
    ),
    Fault(
        "macs_of_zeros_are_effective", "prune_lab/measure/macs.py",
        "sum(int(torch.count_nonzero(matrix)) for matrix in", "sum(matrix.numel() for matrix in",
        ("test_macs.py::test_zeros_save_nothing_but_effective_macs",),
    ),
    Fault(
        "tied_embeddings_counted_twice", "prune_lab/models/contents.py",
        "[*model.parameters(), *codes]",
        "[*(w for _, w in model.named_parameters(remove_duplicate=False)), *codes]",
        ("test_measures.py::test_sizes_by_hand",),
    ),
    Fault(
        "reduction_inverted", "prune_lab/compare.py",
        "1 - size.disk_mb / full.disk_mb", "1 - full.disk_mb / size.disk_mb",
        ("test_sweep.py::test_the_metrics_belong_together",),
    ),
    Fault(
        "figures_of_an_engine_swapped", "prune_lab/compare.py",
        '_both(f"{name}/{figure}", after, before)', '_both(f"{name}/{figure}", before, after)',
        ("test_metrics.py::test_figures_of_an_engine_are_of_their_model",),
    ),
    Fault(
        "counter_that_begins_again_loses_its_turn", "prune_lab/measure/energy.py",
        "(self._range if now < self._last else 0)", "0",
        ("test_energy.py::test_a_counter_that_begins_again_loses_nothing",),
    ),
    # Exports and other forms of weights
    Fault(
        "export_is_not_checked", "prune_lab/models/export.py",
        "if not difference <= tolerance", "if False and not difference <= tolerance",
        ("test_export.py::test_a_file_that_was_tampered_with_does_not_pass",),
    ),
    Fault(
        "export_without_its_processor", "prune_lab/models/export.py",
        "(folder / name).write_bytes(content)", "pass",
        ("test_image_text.py::test_the_command_line_exports_what_came_in",),
    ),
    Fault(
        "vision_tower_is_left_behind", "prune_lab/models/auto_class.py",
        "(of_text is None or is_whole)", "of_text is None",
        ("test_image_text.py::test_the_text_part_is_pruned_and_the_rest_stays",),
    ),
    Fault(
        "scales_of_other_blocks_are_taken", "prune_lab/models/low_bit/dequantized.py",
        "if not is_one and (", "if False and (",
        ("test_dequantized.py::test_numbers_that_would_be_read_as_others_are_refused",),
    ),
    Fault(
        "streamed_export_lacks_what_was_not_changed", "prune_lab/models/offload/on_disk.py",
        "            if name not in self._written:\n", "            if False:\n",
        ("test_streaming.py::test_every_family_streams_to_the_same_files",),
    ),
    Fault(
        "streamed_block_not_written_back", "prune_lab/models/offload/on_disk.py",
        "            self.put(model, changed)", "            pass",
        ("test_streaming.py::test_every_family_streams_to_the_same_files",),
    ),
    Fault(
        "streamed_weights_do_not_learn", "prune_lab/models/offload/on_disk.py",
        "requires_grad=tensor.is_floating_point()", "requires_grad=False",
        ("test_streaming.py::test_every_type_whose_layout_is_found_streams_to_the_same_files",),
    ),
    Fault(
        "streamed_experts_in_one_place", "prune_lab/models/offload/stored.py",
        "whole[expert, number * each : (number + 1) * each]", "whole[0, number * each : (number + 1) * each]",
        ("test_streaming.py::test_every_type_whose_layout_is_found_streams_to_the_same_files",),
    ),
    Fault(
        "streamed_experts_as_active_as_before", "prune_lab/models/found_experts.py",
        "replace(m, active=m.active * was / count)", "replace(m, active=m.active)",
        ("test_streaming.py::test_two_prunings_in_a_row_of_a_streamed_mixture",),
    ),
    Fault(
        "choices_of_streamed_batches_in_another_order", "prune_lab/measure/routing.py",
        ".popleft()", ".pop()",
        ("test_streaming.py::test_a_streamed_run_is_the_run_in_memory",),
    ),
    Fault(
        "tied_matrix_streamed_twice", "prune_lab/models/offload/stored.py",
        "if of_tensor[id(tensor)] == name}", "if name}",
        ("test_streaming.py::test_every_family_streams_to_the_same_files",),
    ),
    Fault(
        "bits_of_a_mask_in_another_order", "prune_lab/models/low_bit/bitmask.py",
        "torch.arange(8, dtype=torch.uint8)", "torch.arange(7, -1, -1, dtype=torch.uint8)",
        ("test_bitmask.py::test_the_layout_by_hand",),
    ),
    Fault(
        "gguf_rows_of_queries_in_halves", "prune_lab/models/gguf/tensors.py",
        "rows.unflatten(0, (heads, 2, -1))", "rows.unflatten(0, (heads, -1, 2))",
        ("test_gguf_export.py::test_a_llama_by_hand",),
    ),
    Fault(
        "gguf_norms_without_their_one", "prune_lab/models/gguf/tensors.py",
        "return 1.0 if architecture.norms_plus_one", "return 1.0 if False",
        ("test_gguf_export.py::test_norms_of_a_gemma_have_their_one",),
    ),
    Fault(
        "gguf_windows_are_not_said", "prune_lab/models/gguf/families.py",
        "if in_window != [", "if False and in_window != [",
        ("test_gguf_export.py::test_windows_that_do_not_alternate_are_said",),
    ),
    Fault(
        "gguf_values_are_not_compared", "prune_lab/models/gguf/file.py",
        "if not bool((off <= ", "if False and not bool((off <= ",
        ("test_gguf_export.py::test_a_file_that_was_tampered_with_does_not_pass",),
    ),
    Fault(
        "gguf_forgets_how_its_source_cuts_text", "prune_lab/models/gguf_folder.py",
        "stored[ORIGIN] = split", "del split",
        ("test_gguf_export.py::test_the_name_of_the_file_that_a_model_came_from_stays",),
    ),
    Fault(
        "int4_with_another_zero_point", "prune_lab/models/low_bit/linears.py",
        "integers.to(torch.int64) + 8", "integers.to(torch.int64) + 7",
        ("test_low_bits.py::test_int4_codes_and_steps_by_hand",),
    ),
    Fault(
        "int8_step_of_half_the_range", "prune_lab/models/low_bit/linears.py",
        "float() / 127, self.weight_scale.dtype)", "float() / 64, self.weight_scale.dtype)",
        ("test_low_bits.py::test_int8_codes_and_steps_by_hand",),
    ),
    Fault(
        "pattern_2_4_checked_along_the_outputs", "prune_lab/models/low_bit/semi_structured.py",
        "(linear.weight.unflatten(1, (-1, 4)) != 0).sum(dim=2)",
        "(linear.weight.unflatten(0, (-1, 4)) != 0).sum(dim=1)",
        ("test_low_bits.py::test_the_2_4_pattern_by_hand",),
    ),
    # What is kept, and for whom
    Fault(
        "tokens_kept_without_their_tokenizer", "prune_lab/fingerprint.py",
        "digest_of([text_sha256, tokenizer_sha256, split,", "digest_of([text_sha256, split,",
        ("test_text.py::test_tokens_are_kept_and_found_again_by_what_they_are",),
    ),
    Fault(
        "facts_kept_without_the_config", "prune_lab/dense_cache.py",
        'for name in ("weights", "config", "tokenizer")}', 'for name in ("weights", "tokenizer")}',
        ("test_sharing.py::test_each_field_of_the_key_misses",),
    ),
    Fault(
        "baseline_kept_without_the_bos", "prune_lab/evaluator.py",
        '("test_tokens_sha256", "seq_len", "windows", "bos", "batch_size")',
        '("test_tokens_sha256", "seq_len", "windows", "batch_size")',
        ("test_identity.py::test_an_input_that_changed_is_another_run_in_memory_and_on_disk",),
    ),
    Fault(
        "baseline_kept_without_its_windows", "prune_lab/evaluator.py",
        '("test_tokens_sha256", "seq_len", "windows", "bos", "batch_size")',
        '("bos", "batch_size", "tasks")',
        ("test_identity.py::test_an_input_that_changed_is_another_run_in_memory_and_on_disk",),
    ),
    Fault(
        "scan_kept_without_its_kind_of_unit", "prune_lab/methods/structured.py",
        '"kind": kind, "seed": seed}', '"seed": seed}',
        ("test_sharing.py::test_a_scan_is_served_for_no_other",),
    ),
    Fault(
        "scan_kept_without_its_method", "prune_lab/methods/weights.py",
        '{"method": asdict(self) | {"amount": None, "allocation": None}, "seed": seed}', '{"seed": seed}',
        ("test_sharing.py::test_a_scan_is_served_for_no_other",),
    ),
    Fault(
        "statistics_kept_without_the_bos", "prune_lab/pruning/calibration.py",
        '"prefix": self.prefix,', "",
        ("test_sharing.py::test_each_field_of_the_key_misses",),
    ),
    Fault(
        "facts_of_a_changed_model", "prune_lab/models/anatomy.py",
        "self._dense is not None and self._dense.are_of(self.model)", "self._dense is not None",
        ("test_sharing.py::test_a_changed_model_has_no_facts",),
    ),
    Fault(
        "corrupt_entry_believed", "prune_lab/cache.py",
        "if _sha256_of_file(folder / name) != checksum:", "if False:",
        ("test_sharing.py::test_a_damaged_entry_is_made_again_with_a_warning",),
    ),
    Fault(
        "corrupt_facts_believed", "prune_lab/cache.py",
        'if whole["sha256"] != digest_of([whole["facts"], whole["files"]]):', "if False:",
        ("test_sharing.py::test_a_damaged_entry_is_made_again_with_a_warning",),
    ),
    Fault(
        "fingerprint_without_the_seed", "prune_lab/fingerprint.py",
        '(*NO_FIGURE, "device", "dtype")', '(*NO_FIGURE, "device", "dtype", "seed")',
        ("test_resume.py::test_what_a_result_depends_on_changes_the_fingerprint",),
    ),
    Fault(
        "lock_held_while_waiting_for_another", "prune_lab/system/timing_lock.py",
        "shared, self._shares = self._shares, False\n", "shared = False\n",
        ("test_timing_lock.py::test_a_job_that_waits_for_another_one_s_lock_holds_no_timing_up",),
    ),
    Fault(
        "lock_shared_by_two_writers", "prune_lab/system/lock.py",
        'fcntl.LOCK_SH if how == "shared" else fcntl.LOCK_EX', "fcntl.LOCK_SH",
        ("test_sharing.py::test_of_two_processes_one_makes_the_entry",),
    ),
    # Refusals, records, comparisons
    Fault(
        "a_refusal_becomes_a_warning", "prune_lab/models/contents.py",
        'raise Refused(f"model.name', 'print(f"model.name',
        ("test_models.py::test_weights_that_are_not_finite_are_refused",),
    ),
    Fault(
        "an_unknown_matrix_is_left_alone", "prune_lab/models/anatomy.py",
        "parameter.ndim >= 2 and name not in prunable", "parameter.ndim > 3 and name not in prunable",
        ("test_families.py::test_a_matrix_that_nothing_would_prune_is_refused",),
    ),
    Fault(
        "run_without_its_sweep", "prune_lab/tracking/mlflow_store.py",
        "tags[PARENT] = parent", "pass",
        ("test_sweep.py::test_one_finished_parent_has_two_finished_children",),
    ),
    Fault(
        "tags_not_written", "prune_lab/tracking/mlflow_log.py",
        "self._client.set_tag(self._run_id, tag, value)", "pass",
        ("test_tracking.py::test_another_store_and_experiment_are_used_and_infinity_is_no_metric",),
    ),
    Fault(
        "a_failed_run_recorded_as_finished", "prune_lab/tracking/mlflow_store.py",
        'log.end("FAILED", f"', 'log.end("FINISHED", f"',
        ("test_tracking.py::test_a_run_that_fails_says_why",),
    ),
    Fault(
        "a_failed_sweep_recorded_as_finished", "prune_lab/sweeps/sweep.py",
        '"FAILED" if sweep.failed else "FINISHED"', '"FINISHED"',
        ("test_sweep.py::test_a_refused_job_does_not_stop_the_others",),
    ),
    Fault(
        "a_finished_job_is_repeated", "prune_lab/runner.py",
        "if settings.resume else None", "if not settings.resume else None",
        ("test_resume.py::test_the_same_command_is_not_computed_again",),
    ),
    Fault(
        "a_result_served_without_its_export", "prune_lab/runner.py",
        "parts.export.is_kept and not _has_export(found, parts.export)", "False",
        ("test_resume.py::test_an_export_that_is_not_there_is_made",),
    ),
    Fault(
        "front_inverted", "prune_lab/results/pareto.py",
        '{"lower": 1.0, "higher": -1.0}', '{"lower": -1.0, "higher": 1.0}',
        ("test_sweep.py::test_the_front_is_what_nothing_beats_in_both",),
    ),
    Fault(
        "time_left_corrected_the_wrong_way", "prune_lab/system/run_clock.py",
        "min(max(took / known, FASTEST), SLOWEST)", "min(max(known / took, FASTEST), SLOWEST)",
        ("test_run_clock.py::test_what_is_left_is_what_was_expected_less_what_passed",),
    ),
    Fault(
        "outputs_of_the_first_choice_alone", "prune_lab/models/watched_experts.py",
        "of_all[chosen[:, i], at]", "of_all[chosen[:, 0], at]",
        ("test_experts.py::test_scores_where_gates_multiply_the_states_by_hand",),
    ),
    Fault(
        "no_change_shown_as_a_speedup", "prune_lab/results/metrics.py",
        "if found.contains(1) else", "if False else",
        ("test_sweep.py::test_a_speedup_whose_interval_contains_1_is_no_change",),
    ),
    Fault(
        "a_mode_within_braces_is_overlooked", "prune_lab/config/composing.py",
        'not keys & {"hydra", "hydra.mode", "hydra.searchpath"}', 'not keys & {"hydra.mode", "hydra.searchpath"}',
        ("test_overrides.py::test_the_mode_is_the_one_that_hydra_finds",),
    ),
    Fault(
        "held_out_windows_calibrate", "prune_lab/methods/shape.py",
        "return replace(calibrator, windows=windows[:-held_out]), ", "return calibrator, ",
        ("test_shape.py::test_windows_that_are_held_out_measure_and_do_not_calibrate",),
    ),
    Fault(
        "divergence_by_the_cut_head", "prune_lab/pruning/block_importance.py",
        "position_divergences(logits_of(before, dense),", "position_divergences(logits_of(model, dense),",
        ("test_shape.py::test_windows_that_are_held_out_measure_and_do_not_calibrate",),
    ),
    Fault(
        "damage_of_a_step_taken_for_the_next", "prune_lab/sweeps/shape_search.py",
        "numpy.interp(self.total - self.options, gone,", "numpy.interp(self.options, gone,",
        ("test_shape_search.py::test_damage_and_costs_of_every_shape",),
    ),
    Fault(
        "the_worst_candidate_wins", "prune_lab/sweeps/budget.py",
        "rank = (lambda one: one.kl)", "rank = (lambda one: -one.kl)",
        ("test_budget.py::test_from_a_bound_to_an_exported_model",),
    ),
    Fault(
        "bound_kept_from_below", "prune_lab/results/bounds.py",
        "metrics.get(self.metric, math.inf) <= self.limit", "metrics.get(self.metric, math.inf) >= self.limit",
        ("test_bisect.py::test_a_run_without_the_metric_is_not_within",),
    ),
    Fault(
        "runs_of_other_text_compared_without_a_word", "prune_lab/report/comparability.py",
        "if len(holders) > 1:", "if False:",
        ("test_report.py::test_other_stamps_are_a_warning",),
    ),
    # Exports elsewhere, and use from Python
    Fault(
        "older_names_for_described_types_alone", "prune_lab/models/export_config.py",
        'if config.get("model_type") not in READ_BY_4:', 'if config.get("model_type") not in FAMILIES:',
        ("test_export.py::test_a_type_that_is_not_described_has_the_older_names_too",),
    ),
    Fault(
        "k_quants_keep_rows_of_32", "prune_lab/export/loads_in.py",
        'return "K" if not length % SUPERBLOCK else', 'return "K" if not length % BLOCK else',
        ("test_loads_in.py::test_rows_by_the_block_sizes_of_the_package_gguf",),
    ),
    Fault(
        "kv_heads_are_never_copied", "prune_lab/export/loads_in.py",
        "(count % n if count >= n else n % count)", "count % n",
        ("test_loads_in.py::test_where_vllm_spreads_a_model",),
    ),
    Fault(
        "text_of_a_call_taken_for_a_split", "prune_lab/api.py",
        "named = [tokens] if isinstance(corpus, UnsplitCorpus) else [None]", "named = [None]",
        ("test_api.py::test_the_weights_are_those_of_the_command_line",),
    ),
    Fault(
        "gradients_of_a_training_added", "prune_lab/api.py",
        "    own.zero_grad(set_to_none=True)", "    pass",
        ("test_api.py::test_gradients_of_the_caller_change_nothing",),
    ),
    Fault(
        "hydra_of_a_call_left_behind", "prune_lab/config/in_python.py",
        "        Singleton._instances = singletons\n", "        pass\n",
        ("test_api.py::test_the_process_is_as_it_was",),
    ),
)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
