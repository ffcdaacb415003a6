"""Breaks key lines of the source one at a time and shows that the tests named beside each turn red.

A passing suite says little where no test looks. Run on demand, it is not collected by pytest:

    python tests/mutations.py [--list] [--only NAME ...]

Each change is made in a copy of the package in a temporary folder. Exit status 1: a change went unnoticed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("bilevel_lightning", "cli", "datamodules", "configs", "tests", "pyproject.toml")
PYTEST = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no"]


class Mutation(NamedTuple):
    """One change: ``old``, which occurs once in the file of the package, becomes ``new``; the tests must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


M = Mutation
PROCESSES = "test_distributed.py::test_two_processes_with_half_the_batch_are_one_with_all_of_it"
SHARDING = "test_sharding.py"
FIRST = "algorithms/test_first_order.py"
STOCHASTIC = "algorithms/test_stochastic.py"
REWEIGHTING, REWEIGHTING_DATA = "tasks/test_reweighting.py", "datamodules/test_reweighting.py"
STORED = "tasks/test_stored_heads.py::test_meha_on_a_pool_of_tasks_is_meha_on_their_joint_problem"
EQUILIBRIUM = "tasks/test_equilibrium.py"
EQUILIBRIUM_BALL = "test_projections.py::test_convolution_ball_gives_the_nearest_kernel"
# fmt: off
MUTATIONS = [
    M("accumulated-is-a-sum", "module.py", "{name: t / number for name, t in total.items()}", "total",
      "test_module.py::test_accumulating_batches_is_one_step_with_their_mean"),
    M("window-is-lost", "module.py", 'self._gathered, self.scale = checkpoint.get("accumulated", (0, {})), dict(',
      "_, self.scale = None, dict(", "test_module.py::test_a_checkpoint_inside_the_window_keeps_what_was_gathered"),
    M("float64-too-late", "module.py", "self._trainer.precision_plugin.convert_module(self)", "pass",
      "test_checkpoints.py::test_all_digits_come_back"),
    M("upper-iterations-in-bfloat16", "module.py", "torch.autocast(self.device.type, enabled=False)",
      "torch.autocast(self.device.type, torch.bfloat16)", "algorithms/test_trust.py -k mixed"),
    M("half-a-checkpoint", "checkpoints.py", 'final.with_name(f".{final.name}.unfinished")', "final",
      "test_checkpoints.py::test_a_kill_during_a_write_leaves_the_file_before"),
    M("episodes-not-weighed", "distributed.py", "{name: weight * t for", "{name: t for",
      "algorithms/test_trust.py::test_two_processes_are_one_with_the_union_batch"),
    M("in-place-unseen", "checks.py", "if name in kept and not _same(p, kept[name])]", "if False]",
      "test_checks.py -k in_place"),
    M("around-unseen", "checks.py", "if id(own[n]) in levels]", "if False]", "test_checks.py -k around"),
    M("graph-without-graph", "derivatives.py", "y, create_graph=True)[0]", "y)[0]",
      "test_derivatives.py::test_products"),
    M("layer-and-change-swapped", "directional.py", "torch.cat([w, v])", "torch.cat([v, w])",
      "test_directional.py::test_reverse_over_reverse"),
    M("change-carries-nothing-back", "directional.py", "zip(cotangents, weights, strict=True)",
      "[(cotangents[0], weights[0])]", "test_directional.py::test_reverse_over_reverse"),
    M("products-without-replay", "derivatives.py", "with randomness.replayed(ctx.random):", "if True:",
      "test_derivatives.py::test_dropout_has_one_mask_in_all_evaluations"),
    M("differences-without-replay", "derivatives.py", "with randomness.replayed(random):", "if True:",
      "test_derivatives.py::test_dropout_has_one_mask_in_all_evaluations"),
    M("one-sided-differences", "derivatives.py", "side(radius), side(-radius)", "side(2 * radius), side(0.0)",
      "test_derivatives.py::test_products"),
    M("fused-attention", "derivatives.py", "self._set(False, False, False)", "pass",
      "test_derivatives.py::test_attention"),
    M("mean-is-sum", "tree.py", "w / total * tree", "w * tree",
      "test_module.py::test_episodes_are_averaged_and_y_is_solved_for_each"),
    M("unused-is-none", "tree.py", "t.new_zeros((*number, *t.shape)) if (g := next(flat)) is None else g for",
      "next(flat) for", "test_tree.py::test_gradients_of_what_is_not_used_are_zero"),
    M("upper-gradient-not-reduced", "problem.py", "return self._reduce(f_x), self._reduce(f_y)",
      "return f_x, self._reduce(f_y)", PROCESSES),
    M("tracked-gradient-not-reduced", "problem.py", "self._reduce(gradient(", "(gradient(", PROCESSES),
    M("gradient-not-reduced", "problem.py", "self._reduce(tree.grad(loss(", "(tree.grad(loss(", PROCESSES),
    M("product-not-reduced", "problem.py", "self._reduce(tree.vjp(", "(tree.vjp(", PROCESSES),
    M("cotangents-not-averaged", "distributed.py", "_Mean.apply(cotangents[0])", "cotangents[0]", PROCESSES),
    M("divided-not-averaged", "sharding.py", "cotangent / ctx.mesh.size()", "cotangent", SHARDING),
    M("tried-in-training-mode", "checks.py", "    model.eval()  # batch", "    pass  # batch",
      "test_checks.py::test_a_model_is_tried_on_one_sample_without_a_trace"),
    M("tracebacks-of-lightning", "../cli/arguments.py", "return 0 <= last < len(frames) - 1 and", "return False and",
      "cli/test_cli.py::test_mistakes_end_in_one_message"),
    M("quick-layer-without-bias", "layers.py", "else product + bias", "else product",
      "test_layers.py::test_values_and_derivatives"),
    M("prox-of-a-part", "binding.py", "one(whole(y))", "one(y)", SHARDING),
    M("averaged-twice", "distributed.py", "tree.items() if divided(t)}", "tree.items() if False}", SHARDING),
    M("checkpoints-of-parts", "sharding.py", "return dict(whole(super().lightning_module_state_dict()))",
      "return super().lightning_module_state_dict()", SHARDING),
    M("directions-do-not-agree", "hypergradients/forward.py", "problem.agree(signs)", "signs", PROCESSES),
    M("map-product-is-transposed", "problem.py", "self._reduce(through[0])",
      "tree.vjp([*image.values()], [v[n] for n in image], y, retain_graph=True)[0]",
      "hypergradients/test_implicit.py::test_fixed_point_maps"),
    M("product-not-counted", "problem.py", "            self.count(name, t)\n", "",
      "test_problem.py::test_oracles_of_the_quadratic"),
    M("running-statistics-shared", "binding.py", "[] if advance else", "[] if True else",
      "test_derivatives.py::test_running_statistics_advance_once_in_an_upper_iteration"),
    M("cross-term-added", "hypergradients/implicit.py", "-1.0 if stationary else 1.0, through",
      "1.0, through",
      "hypergradients/test_implicit.py::test_closed_form"),
    M("not-finite-passes", "hypergradients/implicit.py", 'if solution.status == "not finite":', "if False:",
      "hypergradients/test_implicit.py::test_indefinite_and_diverging_systems_warn"),
    M("one-more-step-kept", "hypergradients/unrolled.py", "min(truncation, steps)", "min(truncation + 1, steps)",
      "hypergradients/test_unrolled.py::test_closed_form_of_gradient_descent"),
    M("tracked-steps-misnumbered", "hypergradients/unrolled.py", "range(steps - kept, steps)", "range(kept)",
      "test_derivatives.py::test_darts_is_truncation_to_one_step"),
    M("start-not-differentiated", "hypergradients/unrolled.py",
      "tree.axpy(1.0, problem.initial_vjp(x, adjoint), gradient)", "gradient",
      "hypergradients/test_unrolled.py::test_derivative_through_the_start"),
    M("first-order-without-f-x", "hypergradients/unrolled.py", "tree.axpy(1.0, problem.initial_vjp(x, f_y), f_x)",
      "problem.initial_vjp(x, f_y)", "hypergradients/test_forward.py::test_first_order_is_its_formula"),
    M("tangents-of-x-dropped", "hypergradients/forward.py", "(directions, *tangents), strict",
      "(tree.zeros_like(directions), *tangents), strict",
      "hypergradients/test_forward.py::test_slopes_along_directions"),
    M("chunks-without-replay", "hypergradients/forward.py", "randomness.replayed(random) if first else nullcontext()",
      "nullcontext()", "hypergradients/test_forward.py::test_dropout_is_one_for_all_chunks"),
    M("directions-summed", "hypergradients/forward.py", "u, 1) / directions", "u, 1)",
      "hypergradients/test_forward.py::test_random_directions_are_signs"),
    M("shifts-not-divided", "hypergradients/zeroth_order.py", "/ (radius * directions)", "/ directions",
      "hypergradients/test_forward.py::test_zeroth_order_is_its_formula"),
    M("shifts-without-replay", "hypergradients/zeroth_order.py", "with randomness.replayed(random), ", "with ",
      "hypergradients/test_forward.py::test_dropout_is_one_for_all_shifts"),
    M("momentum-subtracted", "dynamics/descent.py", "m = tree.axpy(self.factor(x), ",
      "m = tree.axpy(-self.factor(x), ", "test_dynamics.py::test_trajectory_is_that_of_the_torch_optimizer"),
    M("nesterov-without-look-ahead", "dynamics/descent.py", "tree.axpy(mu, m, g_y), [m]", "m, [m]",
      "test_dynamics.py::test_trajectory_is_that_of_the_torch_optimizer"),
    M("heavy-ball-keeps-the-first-y", "dynamics/descent.py", "tree.axpy(-1.0, y, after)\n\n\nclass Acc",
      "tree.axpy(1.0, y, after)\n\n\nclass Acc",
      "test_dynamics.py::test_heavy_ball_is_momentum_at_a_constant_step"),
    M("step-size-of-the-first-step", "dynamics/descent.py", "self.rate(x, t)\n        direction",
      "self.rate(x, 0)\n        direction", "test_dynamics.py::test_decreasing_step"),
    M("lower-level-not-projected", "dynamics/descent.py", "problem.prox(x, self.descend(x, y, direction, lr), lr)",
      "self.descend(x, y, direction, lr)", "hypergradients/test_unrolled.py::test_projection_is_differentiated"),
    M("shares-swapped", "dynamics/descent.py", "track=track), (1 - alpha) * lr)", "track=track), alpha * lr)",
      "test_dynamics.py::test_aggregated_descent"),
    M("bias-correction-late", "dynamics/adam.py", "1 - b2 ** (t + 1)\n", "1 - b2 ** max(t, 1)\n",
      "test_dynamics.py::test_trajectory_is_that_of_the_torch_optimizer"),
    M("root-of-zero", "dynamics/adam.py", "v.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)", "v.sqrt()",
      "test_dynamics.py::test_adam_has_a_derivative_where_all_gradients_were_zero"),
    M("damping-not-added", "linear_solvers/base.py", "tree.axpy(self.damping, v, image) if self.damping else image",
      "image", "test_linear_solvers.py::test_damping_is_added_to_the_diagonal"),
    M("zero-right-hand-side-passes", "linear_solvers/base.py", "if scale == 0:", "if False:",
      "test_linear_solvers.py::test_zero_right_hand_side"),
    M("linear-start-not-subtracted", "linear_solvers/base.py", "tree.axpy(-1.0, system.product(start, 0), system.rhs)",
      "system.rhs", "test_linear_solvers.py::test_warm_start_at_the_solution_stays_there"),
    M("linear-start-not-added-back", "linear_solvers/base.py", "return tree.axpy(1.0, start, v), residual",
      "return v, residual", "test_linear_solvers.py::test_warm_start_at_the_solution_stays_there"),
    M("start-of-the-optimizer-ignored", "linear_solvers/series.py", "t.clone().requires_grad_()",
      "torch.zeros_like(t).requires_grad_()", "test_linear_solvers.py::test_warm_start_helps"),
    M("conjugate-gradient-without-last-update", "linear_solvers/krylov.py", "v, r = tree.axpy(rr / curvature, p, v),",
      "v, r = v if _ + 1 == self.steps else tree.axpy(rr / curvature, p, v),",
      "test_linear_solvers.py::test_conjugate_gradient_step_by_step"),
    M("curvature-not-checked", "linear_solvers/krylov.py", "if curvature <= small * largest * pp:", "if False:",
      "test_linear_solvers.py::test_status"),
    M("product-for-transpose", "linear_solvers/krylov.py", "s = system.transpose(r)\n            ss",
      "s = system.product(r, 0)\n            ss", "test_linear_solvers.py::test_nonsymmetric_system"),
    M("neumann-one-term-less", "linear_solvers/series.py", "for j in range(self.steps):\n            term",
      "for j in range(self.steps - 1):\n            term", "test_linear_solvers.py::test_neumann_is_its_series"),
    M("one-term-without-start", "linear_solvers/series.py", "tree.axpy(-1.0, system.product(start, power), system.rhs)",
      "system.rhs", "test_linear_solvers.py::test_randomised_neumann_from_a_start"),
    M("fixed-point-one-step-less", "linear_solvers/series.py", "range(1, self.steps)", "range(2, self.steps)",
      "test_linear_solvers.py::test_three_names_of_one_iteration"),
    M("samples-not-taken", "linear_solvers/series.py", "return self.steps\n", "return 0\n",
      "hypergradients/test_implicit.py::test_minibatches_of_the_linear_system"),
    M("nystrom-without-its-core", "linear_solvers/dense.py", "self.damping * w + c.T @ c", "c.T @ c",
      "test_linear_solvers.py::test_nystrom_is_woodbury_of_its_columns"),
    M("singular-passes", "linear_solvers/dense.py", "if values[-1] <= len(b)", "if values[-1] < 0 * len(b)",
      "test_linear_solvers.py::test_status"),
    M("state-not-set", "state.py", 't[where] = given[name.replace(":", ".")]', "pass",
      "test_derivatives.py::test_sama_keeps_the_memories_of_adam"),
    M("memories-not-kept", "algorithms/darts.py", "enumerate(state[1:])} if kept else {}",
      "enumerate(state[1:]) if False}", "test_derivatives.py::test_sama_keeps_the_memories_of_adam"),
    M("y-not-written", "module.py", "tree.assign(self.hooks.lower, lowers[0])", "pass",
      "test_module.py::test_warm_and_cold_start"),
    M("divergence-not-told-apart", "diagnosis/check.py", "except Diverged:", "except ValueError:",
      "test_diagnosis.py::test_other_errors_are_no_verdict"),
    M("constants-recorded", "compiled.py", "if func in (Tensor", "if not func and func in (Tensor",
      "test_compiled.py::test_what_cannot_be_recorded"),
    M("recording-draws", "compiled.py", "with randomness.replayed(randomness.state(tensors)):", "if True:",
      "test_compiled.py::test_recording_leaves_the_random_state"),
    M("counts-shared", "compiled.py", "counts.copy()", "counts",
      "test_compiled.py::test_another_shape_is_recorded_anew"),
    M("one-program-for-all-shapes", "compiled.py", "key = (str(spec), str(shapes))", "key = str(spec)",
      "test_compiled.py"),
    M("gap-not-checked", "algorithms/penalty.py", "if float(gap) < -(1.0 + abs(float(value))):", "if False:",
      f"{FIRST}::test_a_value_gap_that_is_clearly_negative_ends_the_run"),
    M("move-not-projected", "algorithms/penalty.py", "problem.prox(x, tree.axpy(-lr, d_y, y), lr * share)",
      "tree.axpy(-lr, d_y, y)", f"{FIRST}::test_y_and_twins_stay_feasible"),
    M("penalty-not-rescaled", "algorithms/pbgd.py", "1.0 / gamma if self.rescale and gamma > 1 else 1.0", "1.0",
      f"{FIRST}::test_vpbgd_step_is_its_formula"),
    M("value-function-held-fixed", "algorithms/pbgd.py", "(g_x[n] - v_x[n])", "g_x[n]",
      f"{FIRST}::test_vpbgd_step_is_its_formula"),
    M("twin-always-restarts", "algorithms/pbgd.py", "y if kept is None else kept", "y",
      f"{FIRST}::test_vpbgd_step_is_its_formula"),
    M("norm-penalty-without-hessian", "algorithms/pbgd.py", "(f_y, s_y)", "(f_y, g_y)",
      f"{FIRST}::test_gpbgd_step_is_its_formula"),
    M("difference-one-sided", "algorithms/f2sa.py", "problem.blend(-1 / gamma)", "problem",
      f"{FIRST}::test_f2sa_errors_fall_like_the_first_and_the_second_power_of_gamma"),
    M("difference-not-halved", "algorithms/f2sa.py", "for n in x}, gamma / 2", "for n in x}, gamma",
      f"{FIRST}::test_f2sa_step_is_its_formula"),
    M("multiplier-negative", "algorithms/bome.py", "(phi - inner).clamp(min=0)", "(phi - inner)",
      f"{FIRST}::test_bome_step_is_its_formula_and_keeps_its_promise"),
    M("barrier-without-twin", "algorithms/bome.py", "tree.axpy(-1.0, v_x, g_x)", "g_x",
      f"{FIRST}::test_bome_step_is_its_formula_and_keeps_its_promise"),
    M("value-without-slack", "algorithms/bvfsm.py", "tree.dot(z, z)) / 2 + mu", "tree.dot(z, z)) / 2",
      f"{FIRST}::test_bvfsm_solves_its_two_lower_levels"),
    M("barrier-outside-its-domain", "algorithms/bvfsm.py", "tau / (tau - gap) if gap < 0 else 1.0",
      "tau / (tau + abs(gap))", f"{FIRST}::test_bvfsm_outside_the_domain_of_the_logarithm_steps_on_g"),
    M("envelope-not-in-y", "algorithms/meha.py",
      "tree.axpy(-1 / self.gamma, apart, problem.blend(weight).grad_g(x, y, t))",
      "problem.blend(weight).grad_g(x, y, t)", f"{FIRST}::test_meha_goes_through_the_reference_trace"),
    M("weight-does-not-fall", "algorithms/meha.py", "1 / at(self.c, k)", "1 / at(self.c, 0)",
      f"{FIRST}::test_meha_goes_through_the_reference_trace"),
    M("theta-restarts", "algorithms/meha.py", "y if theta is None else theta", "y",
      f"{FIRST}::test_meha_goes_through_the_reference_trace"),
    M("pictures-in-one-row", "callbacks/pictures.py", "bottom = -height * i", "bottom = 0.0",
      "callbacks/test_cleaning.py::test_suspicious_images_are_those_of_the_smallest_weights"),
    M("largest-weights", "callbacks/cleaning.py", "weights.argsort()", "weights.argsort(descending=True)",
      "callbacks/test_cleaning.py::test_suspicious_images_are_those_of_the_smallest_weights"),
    M("box-then-ball", "projections.py", "torch.where(outside, moved.clamp(low, high), boxed)",
      "torch.where(outside, boxed * (self.radius / self._size(boxed)), boxed)",
      "test_projections.py::test_ball_in_box_against_a_quadratic_program"),
    M("spectral-derivative-symmetric", "projections.py",
      "inner = (even * (inner + inner.mT) + odd * (inner - inner.mT)) / 2", "inner = even * inner",
      "test_projections.py::test_derivatives"),
    M("threshold-without-shrinking", "projections.py", "point - threshold * point.sign()", "point",
      "test_projections.py::test_soft_threshold_against_brute_force"),
    M("storm-forgets-the-point-before", "estimators.py", "(1 - eta) * (memory[\"direction\"][n] - before[n])",
      "(1 - eta) * (memory[\"direction\"][n] - t)", f"{STOCHASTIC}::test_storm_is_its_definition"),
    M("sarah-without-the-direction-before", "estimators.py", "memory[\"direction\"][n] + t - before[n]", "t",
      f"{STOCHASTIC}::test_minibatches_lead_to_the_solution"),
    M("saga-mean-without-shares", "estimators.py", "tree.axpy(term.share, change", "tree.axpy(1.0, change",
      f"{STOCHASTIC}::test_saga_keeps_the_last_direction_of_each_part_and_their_mean"),
    M("cross-on-a-used-minibatch", "algorithms/bsgm.py", "t=steps, cross=linear", "t=steps, cross=0",
      f"{STOCHASTIC}::test_bsgm_is_its_definition"),
    M("linear-steps-of-one-size", "linear_solvers/series.py", "v = tree.axpy(at(lr, i), r, v)",
      "v = tree.axpy(at(lr, 0), r, v)", f"{STOCHASTIC}::test_bsgm_is_its_definition"),
    M("upper-minibatch-alone", "problem.py", "torch.stack(values).mean(0)", "values[0]",
      "test_problem.py::test_the_upper_loss_is_the_mean_over_its_minibatches"),
    M("built-gradients-touch-samples", "problem.py", "self.count(\"lower_gradients\", t, touched=False)",
      "self.count(\"lower_gradients\", t)", f"{STOCHASTIC}::test_operations_are_written_out_over_four_iterations"),
    M("multiples-are-one-draw", "datamodules/levels.py", "drawn += multiple", "drawn += 1",
      "datamodules/test_levels.py::test_draws_of_one_iteration_differ"),
    M("convolution-without-dual", "projections.py",
      "self._spectrum(point - self._small(ahead, height, width)) + ahead", "self._spectrum(kernel)", EQUILIBRIUM_BALL),
    M("convolution-scaled-only", "projections.py", "if norm <= radius * (1 + self.tol):", "if True:", EQUILIBRIUM_BALL),
    M("kernel-norm-on-half-the-grid", "models/equilibrium.py",
      "(height + self.padding, width + self.padding)", "(height // 2 + 1, width // 2 + 1)",
      f"{EQUILIBRIUM}::test_projected_weights_contract"),
    M("weights-not-clipped", "tasks/equilibrium.py", 'self.clip(upper["head.weight"])', 'upper["head.weight"]',
      f"{EQUILIBRIUM}::test_projected_weights_contract"),
    M("states-not-stored", "tasks/equilibrium.py", "self.stored[gather(", "self.stored.clone()[gather(",
      f"{EQUILIBRIUM}::test_states_are_stored_by_sample_and_are_the_next_start"),
    M("evaluation-from-stored-states", "tasks/equilibrium.py", "if self.training and len", "if len",
      f"{EQUILIBRIUM}::test_states_are_stored_by_sample_and_are_the_next_start"),
    M("wrong-episode-kept", "module.py", "self.hooks.keep_lower(one, solved)", "self.hooks.keep_lower(episode, solved)",
      "tasks/test_few_shot.py::test_tasks_that_remember_their_heads"),
    M("kept-for-no-task", "module.py", "self.hooks.stored_row(episode) if self.hooks.stored_lowers else None",
      "None", STORED),
    M("twins-of-tasks-not-kept", "module.py", ".set(Row(rows, new))", ".get()", STORED),
    M("one-proximal-term-for-all-episodes", "problem.py", "weight * self.square(away)",
      "weight * tree.dot(away, away)", STORED),
    M("followed-as-one-episode", "module.py", "tree.detach(self.upper_parameters()), number)",
      "tree.detach(self.upper_parameters()))", STORED),
    M("episodes-start-at-the-first", "evaluation.py", "for one in unstack(episode, number)])",
      "for one in unstack(episode, number)[:1] * number])",
      "tasks/test_few_shot.py::test_tasks_that_remember_their_heads"),
    M("chunks-weighted-equally", "callbacks/equilibrium.py", "tree.mean(gradients, samples)", "tree.mean(gradients)",
      f"{EQUILIBRIUM}::test_evaluation_in_chunks_is_that_of_the_whole"),
    M("minibatches-of-one-order", "datamodules/equilibrium.py", "permutation(k // number)", "permutation(0)",
      "datamodules/test_equilibrium.py::test_an_epoch_visits_every_sample_once_in_an_order_of_its_own"),
    M("flow-of-first-order", "flow.py", "-(1 - b[j - 1] * t[j - 1]) * new", "0.0",
      "test_flow.py::test_stages_are_those_of_a_stable_method_of_order_two"),
    M("flow-without-error-control", "flow.py", "if share <= 1:", "if True:",
      "test_flow.py::test_what_cannot_be_followed_is_said_and_changes_nothing"),
    M("flow-leaves-half-a-step", "flow.py", "            put(y)\n            raise", "            raise",
      "test_flow.py::test_what_cannot_be_followed_is_said_and_changes_nothing"),
    M("flow-with-small-curvature", "flow.py", "change, float(torch.linalg.vector_norm(change))",
      "change, 0.5 * float(torch.linalg.vector_norm(change))",
      "test_flow.py::test_curvature_is_the_largest_eigenvalue"),
    M("flow-keeps-a-direction-without-curvature", "flow.py", "direction if direction.any() else first", "direction",
      "test_flow.py::test_a_straight_way_that_bends_later_is_followed"),
    M("flow-keeps-a-direction-that-failed", "flow.py", "direction = first  # the curvature", "pass  # the curvature",
      "test_flow.py::test_a_straight_way_that_bends_later_is_followed"),
    M("flow-estimates-for-ever", "flow.py", "for _ in range(POWERS):", "while True:",
      "test_flow.py::test_rounding_cannot_keep_the_estimate_of_the_curvature_from_ending"),
    M("flow-is-never-too-fine", "flow.py", 'if group["tol"] < finest:', "if False:",
      "test_flow.py::test_a_tolerance_within_rounding_is_refused"),
    M("perturbs-clean-images", "tasks/poisoning.py", "where = [(part[2] >= 0)", "where = [(part[2] >= -1)",
      "tasks/test_poisoning.py::test_losses_are_the_formulas"),
    M("all-get-one-perturbation", "tasks/poisoning.py", "return self.delta[index]", "return self.delta[index * 0]",
      "tasks/test_poisoning.py::test_losses_are_the_formulas"),
    M("attack-helps", "tasks/poisoning.py", "return -cross_entropy(", "return cross_entropy(",
      "tasks/test_poisoning.py::test_losses_are_the_formulas"),
    M("ridge-is-a-sum", "tasks/poisoning.py", "entries.square().mean()", "entries.square().sum()",
      "tasks/test_poisoning.py::test_losses_are_the_formulas"),
    M("ball-without-box", "tasks/poisoning.py", "self.ball_in_box(delta[rows], low[rows], high[rows])",
      "self.ball(delta[rows])",
      "tasks/test_poisoning.py::test_the_projection_is_the_nearest_point_by_a_quadratic_program"),
    M("only-the-ball-is-looked-at", "tasks/poisoning.py", "((delta >= low) & (delta <= high)).flatten(1).all(1) & ", "",
      "tasks/test_poisoning.py::test_rows_in_the_set_are_left_alone"),
    M("retrained-on-clean-images", "callbacks/poisoning.py", "+= delta[index[where]]", "+= 0 * delta[index[where]]",
      "callbacks/test_poisoning.py::test_the_attack_beats_random_noise"),
    M("retrained-from-the-solved-y", "callbacks/retraining.py", "self.scratch = deepcopy(task.lower)",
      "self.scratch = task.lower",
      "callbacks/test_poisoning.py::test_retraining_is_the_lower_loss_from_the_first_weights"),
    M("random-start-over-what-was-learnt", "tasks/poisoning.py", " and not delta.any()", "",
      "tasks/test_poisoning.py::test_a_random_start_is_feasible_and_taken_once"),
    M("setting-without-effect", "algorithms/penalty.py", "if kwargs[name] != 1:", "if False:",
      "algorithms/test_contract.py::test_there_is_no_setting_for_a_lower_loop_that_is_not"),
    M("any-default-for-a-lambda", "pickling.py", "id(parameter.default): Default", "name: Default", "test_pickling.py"),
    M("minibatches-of-reports-from-the-first", "callbacks/retraining.py", "torch.randint(number,", "torch.randint(1,",
      "callbacks/test_poisoning.py::test_retraining_in_minibatches"),
    M("split-without-classes", "datamodules/poisoning.py", "stratify=labels[[*index]].numpy()", "stratify=None",
      "datamodules/test_poisoning.py::test_digits_are_split_with_equal_shares_of_each_class"),
    M("parts-weigh-alike", "binding.py", "min(most, total - first) / total", "1 / len(starts)",
      "test_samples_at_once.py::test_the_step_is_that_of_the_whole_minibatches"),
    M("last-part-only", "derivatives.py", "tree.axpy(1.0, g_y, d_y)", "g_y",
      "test_samples_at_once.py::test_the_step_is_that_of_the_whole_minibatches"),
    M("parts-ignore-what-follows", "derivatives.py", "{name: cotangent * t for", "{name: t for",
      "test_samples_at_once.py::test_the_step_is_that_of_the_whole_minibatches"),
    M("parts-for-second-derivatives", "derivatives.py", "if torch.is_grad_enabled():", "if False:",
      "test_samples_at_once.py::test_second_derivatives_are_refused"),
    M("all-samples-at-once", "binding.py", "rows(fill(x), first, most)", "fill(x)",
      "test_samples_at_once.py::test_a_run_takes_the_setting"),
    M("gpt-looks-ahead", "models/gpt.py", "is_causal=True", "is_causal=False", "models/test_text.py"),
    M("low-rank-without-scale", "models/adapters.py", "self.scale * linear(", "linear(", "models/test_text.py"),
    M("low-rank-merged-twice", "models/adapters.py", "change = self.scale *", "change = 2 * self.scale *",
      "models/test_text.py"),
    M("frozen-parameters-move", "models/adapters.py", "p.requires_grad_(name in kept)", "p.requires_grad_(True)",
      "tasks/test_text.py::test_what_is_frozen_keeps_its_bits"),
    M("bfloat16-in-second-derivatives", "models/autocast.py", "if torch.is_grad_enabled():", "if False:",
      "models/test_text.py"),
    M("windows-skip-a-byte", "datamodules/text.py", "unfold(0, self.context + 1, self.context)",
      "unfold(0, self.context + 1, self.context + 1)", "datamodules/test_text.py"),
    M("every-source-damaged", "datamodules/text.py", "if name not in self.corrupted:\n            return text",
      "if name not in self.corrupted:\n            name = next(iter(self.corrupted), name)",
      "datamodules/test_text.py"),
    M("nats-for-bits", "tasks/text.py", "each.mean(1) / math.log(2)", "each.mean(1)", "tasks/test_text.py -k metrics"),
    # Reweighting.
    M(
        "reweighting-loss-of-y",
        "tasks/reweighting.py",
        "self.upper(prepared[0] if prepared else each.detach(), index, source)",
        "self.upper(each.detach(), index, source)",
        f"{REWEIGHTING}::test_derivatives_commute",
    ),
    M(
        "reweighting-not-normalised",
        "tasks/reweighting.py",
        "weights = weights / weights.mean().clamp(",
        "weights = weights / weights.max().clamp(",
        f"{REWEIGHTING}::test_losses_are_the_formulas",
    ),
    M(
        "reweighting-fixed-normaliser",
        "tasks/reweighting.py",
        "weights.mean().clamp(",
        "weights.mean().detach().clamp(",
        f"{REWEIGHTING}::test_the_hypergradient_is_the_finite_difference",
    ),
    M(
        "reweighting-positions",
        "tasks/reweighting.py",
        "each.flatten(1).mean(1)",
        "each.flatten(1).sum(1)",
        f"{REWEIGHTING}::test_a_sequence_s_loss_is_the_mean_over_its_positions",
    ),
    M(
        "reweighting-profile",
        "datamodules/reweighting.py",
        "** (-c / (classes - 1))",
        "** (-c / classes)",
        f"{REWEIGHTING_DATA}::test_profile_of_the_published_sets",
    ),
    M(
        "reweighting-noise-keeps",
        "datamodules/reweighting.py",
        "rng.randint(1, self.classes - 1)",
        "rng.randint(0, self.classes - 1)",
        f"{REWEIGHTING_DATA}::test_symmetric_noise_replaces_exactly_its_share",
    ),
    M(
        "reweighting-control-meta",
        "callbacks/reweighting.py",
        "problem.blend(share, 1 - share)",
        "problem.blend(share)",
        "callbacks/test_reweighting.py::test_controls_by_hand",
    ),
]
# fmt: on


def mutated(mutation: Mutation, source: str) -> str:
    """Returns the source with the change.

    Raises:
        ValueError: if what it replaces does not occur exactly once.
    """
    if source.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: {mutation.old!r} occurs {source.count(mutation.old)} times")
    return source.replace(mutation.old, mutation.new)


def python(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python where the copy is imported, not the package that is installed."""
    settings = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=copy / "tests", env=environment, capture_output=True, text=True, check=False)


def run(copy: Path, targets: list[str]) -> tuple[int, str]:
    """Runs pytest on the copy; returns its exit status (0: passed, 1: a test failed) and the test that failed first."""
    done = python(copy, *PYTEST, *" ".join(targets).split())
    if done.returncode > 1:  # nothing collected, an unknown test, a copy that does not import
        raise RuntimeError(f"pytest could not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, failed[0] if failed else ""


def main() -> int:
    """Returns the number of changes that went unnoticed, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the changes and make none")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[m.name for m in MUTATIONS], help="only these")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if arguments.only is None or m.name in arguments.only]
    sources = {m.file: (ROOT / "bilevel_lightning" / m.file).read_text() for m in chosen}
    changed = {m.name: mutated(m, sources[m.file]) for m in chosen}
    if arguments.list:
        print("\n".join(f"{m.name:35} {m.file:30} {m.tests}" for m in chosen))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, copy / name)
        origin = python(copy, "-c", "import bilevel_lightning; print(bilevel_lightning.__file__)").stdout.strip()
        if origin != str(copy / "bilevel_lightning" / "__init__.py"):
            raise SystemExit(f"The tests would import {origin!r} instead of the copy.")
        began, survived = time.perf_counter(), []
        status, failed = run(copy, sorted({m.tests for m in chosen}))
        if status:
            raise SystemExit(f"Without any change: {failed}")
        for m in chosen:
            start, path = time.perf_counter(), copy / "bilevel_lightning" / m.file
            path.write_text(changed[m.name])
            status, failed = run(copy, [m.tests])
            path.write_text(sources[m.file])
            survived += [m.name] * (status == 0)
            verdict = "killed  " if status else "SURVIVED"
            print(f"{verdict} {time.perf_counter() - start:5.1f} s  {m.name:35} {failed}", flush=True)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} killed in {time.perf_counter() - began:.0f} s")
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main())
