"""The table of mutants, by file."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """A change of one place in a file, and the tests of which one has to fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def found(self, root: Path) -> int:
        """How often the text that is replaced stands in the file."""
        return (root / self.file).read_text(encoding="utf-8").count(self.old)


def _of(file: str, tests: str, *changes: tuple[str, str]) -> list[Mutant]:
    return [Mutant(file, old, new, tuple(tests.split())) for old, new in changes]


EFFECTS = "tests/measure/test_effects.py tests/measure/test_gaps.py tests/measure/test_shown.py"
STATISTICS = "tests/records/test_statistics.py tests/records/test_intervals.py tests/records/test_few_pairs.py"
ABLATED = "tests/engine/test_corruptions.py::test_ablated_latents_are_those_meant_not_those_encoded_again"
RESUMED = "tests/engine/test_resume.py"
SWEEP = "tests/engine/test_batch_noise.py tests/measure/test_planted.py tests/engine/test_several_sites.py"
PICTURES = "tests/pictures/test_families.py"

MUTANTS = [
    *_of(
        "saepatch/measure/results/gaps.py",
        EFFECTS,
        ("patched - corrupted, clean - patched)", "patched - corrupted, patched - clean)"),
        ("corrupted + change, clean - change)", "corrupted + change, clean + change)"),
        ("np.abs(self.gap) >= self.min_gap, self.gap, np.nan)", "np.abs(self.gap) > self.min_gap, self.gap, np.nan)"),
        ("np.abs(self.gap) >= self.min_gap, self.gap, np.nan)", "self.gap >= self.min_gap, self.gap, np.nan)"),
        ("return gap if abs(gap) >= self.min_gap", "return gap if gap >= self.min_gap"),
        ("np.abs(self.gap) if sizes else self.gap", "self.gap"),
        ("-np.sign(self.gap.mean()) * totals", "-totals"),
        ("return self.bootstrap(seed).of(change)", "return self.bootstrap().of(change)"),
    ),
    *_of(
        "saepatch/measure/results/effects.py",
        EFFECTS,
        ("self.change / self.usable_gap[:, None]", "self.change / self.mean_gap"),
        ("self.ratio(self.change[:, self._index(edit)], seed)", "self.ratio(self.change[:, self._index(edit)])"),
        ("bootstrap_mean(self.normalised[:, self._index(edit)]", "bootstrap_mean(self.change[:, self._index(edit)]"),
        ("self.change[:, columns].mean(1)", "self.change[:, columns].sum(1)"),
        ("== (role, mine.kind, mine.place, mine.position)", "== (role, mine.kind, mine.place, other.position)"),
        ("(other.beside_key == mine.key if other.beside", "(True if other.beside"),
        ("self.change.mean(0) / self.mean_gap", "np.nanmean(self.normalised, axis=0)"),
        ("np.argsort(-ratios, kind", "np.argsort(-np.abs(ratios), kind"),
        (" if self.edits[i].role not in CONTROLS]\n        return", "]\n        return"),
        (
            "false_discovery(self._beyond_rounding, self.ran & ~self._is_control)",
            "false_discovery(self._beyond_rounding, self.ran)",
        ),
        ("false_discovery(self._beyond_rounding, self.ran", "false_discovery(self.change, self.ran"),
        ("self.rounding * np.abs(self.gap).mean(), 0.0", "self.rounding * np.abs(self.gap.mean()), 0.0"),
        ("bool(0 < abs(mean) <", "bool(abs(mean) <"),
        ('ROUNDING if name == "float32" else NARROW', 'NARROW if name == "bfloat16" else ROUNDING'),
        ('edit.role != "single" and edit.position is None', 'edit.role != "single" or edit.position is None'),
        ("np.flatnonzero(self.ran[:, edit])", "np.arange(len(self.ran))"),
        ("self.normalised, self.rounding * float(np.abs(self.gap).mean())", "self.normalised, self.rounding"),
    ),
    *_of(
        "saepatch/records/statistics.py",
        STATISTICS,
        ("kept = kept[~np.isnan(kept)]", "kept = np.nan_to_num(kept)"),
        ("(residual**2).sum() / (n - 1) / n)", "(residual**2).sum() / n / n)"),
        ("        t = _t_quantile((1 + self.level) / 2, n - 1)", "        t = _t_quantile(self.level, n - 1)"),
        ("- 2 * shift * cross", "+ 2 * shift * cross"),
        ("np.maximum(variance, 0) / (n - 1))", "np.maximum(variance, 0) / n)"),
        ("np.quantile(scaled, [tail, 1 - tail]", "np.quantile(scaled, [tail / 2, 1 - tail / 2]"),
        (
            "float(ratio - max(t, upper) * error), float(ratio - min(-t, lower) * error)",
            "float(ratio + min(-t, lower) * error), float(ratio + max(t, upper) * error)",
        ),
        ("residual = top - ratio * bottom\n", "residual = top - ratio * bottom.mean()\n"),
        ("np.random.default_rng(self._seed).multinomial", "np.random.default_rng(0).multinomial"),
        ("if n < FEWEST:", "if n <= FEWEST:"),
        ("values[common] == 0 and others < FEWEST_MOVED", "values[common] == 0 and others <= FEWEST_MOVED"),
        ("bottom.std(ddof=1)", "bottom.std()"),
        ("(p + z * z / (2 * n))", "(p + z * z / n)"),
        ("z * z / (4 * n * n)", "z * z / (4 * n)"),
        (".sum() + 1) / (n + 2) for sign", ".sum() + 1) / n for sign"),
        ("_t_quantile((1 + level) / 2, n + 1)", "_t_quantile((1 + level) / 2, n - 1)"),
        ("share * np.sqrt(n - 1) / np.sqrt(1 - share**2)", "share * np.sqrt(n) / np.sqrt(1 - share**2)"),
        ("np.maximum(2 * stats.t.sf(t, n - 1)", "np.maximum(stats.t.sf(t, n - 1)"),
        ("2 * stats.t.sf(t, n - 1), 2.0 ** (1 - n))", "2 * stats.t.sf(t, n - 1), 0.0)"),
        ("if least * columns <= FLAGGED", "if least <= FLAGGED"),
        ("1 - 0.05 ** (1 / sets)", "1 - 0.95 ** (1 / sets)"),
        ("np.abs(mean) / centred.std(0)", "np.abs(mean) / centred.std(0, ddof=1)"),
        ("largest = np.maximum(largest, scaled.max(1))", "largest = scaled.max(1)"),
        ("np.abs(signs @ unit).max(1)", "(signs @ unit).max(1)"),
        ("own - 1e-9)\n    p[columns] = (1 + reached) / (1 + draws)", "own - 1e-9)\n    p[columns] = reached / draws"),
        ("np.searchsorted(np.sort(largest), own - 1e-9)", "np.searchsorted(np.sort(largest), own + 1e-9)"),
        ("(tested.sum(0) >= fewest)", "tested.any(0)"),
    ),
    *_of(
        "saepatch/measure/controls.py",
        "tests/records/test_statistics.py tests/measure/test_patching.py "
        "tests/engine/test_several_sites.py::test_a_group_of_latents_over_sites_has_controls_at_each",
        (
            "np.setdiff1d(among.nonzero().flatten().cpu().numpy(), np.asarray(sorted(exclude), dtype=int))",
            "among.nonzero().flatten().cpu().numpy()",
        ),
        ("np.setdiff1d(differs.nonzero()[0], np.asarray(ranking[:k], dtype=int))", "differs.nonzero()[0]"),
        ("size = statistics.mean_active * statistics.norm", "size = statistics.mean_active"),
        ("free, drawn = others.copy(), []", "free, drawn = others, []"),
        ("free[row] = False", "free[row] = True"),
        ("[: min(neighbours, int(free.sum()))]", "[: min(neighbours + 1, int(free.sum()))]"),
        ("statistics[site], seed + number, draws)", "statistics[site], seed, draws)"),
        ("for text in (pair.clean, pair.corrupted)]", "for text in (pair.clean,)]"),
    ),
    *_of(
        "saepatch/measure/curves.py",
        "tests/measure/test_patching.py",
        ("bootstrap_ratio(some.mean(1), gap, seed=seed)", "bootstrap_ratio(some.sum(1), gap, seed=seed)"),
        (
            "own = _edits(dictionary, ranking, sizes, statistics, seed + number)",
            "own = _edits(dictionary, ranking, sizes, statistics, seed)",
        ),
        (
            "for drawn in differing_sets(ranking, k, differs, seed + number)",
            "for drawn in differing_sets(ranking, k, differs, seed)",
        ),
    ),
    *_of(
        "saepatch/measure/patching.py",
        f"tests/engine/test_batch_noise.py {ABLATED} tests/measure/test_planted.py tests/measure/test_patching.py "
        "tests/engine/test_several_sites.py::test_each_position_alone_and_listed_edits",
        ("2 * swept.noise_share", "swept.noise_share"),
        ("corrupted = options.denoises and options.corruption is None", "corrupted = options.denoises"),
        ("keys |= {(control, at) for control in controls.get(edits[i].key, ())}", "pass"),
        ("    base = swept.corrupted if options.denoises else swept.clean\n", "    base = swept.corrupted\n"),
        ("patched=base[number] + change[None,", "patched=swept.corrupted[number] + change[None,"),
        ("return base[[pair for pair, _ in edits]] + change", "return base[[pair for pair, _ in edits]] - change"),
    ),
    *_of(
        "saepatch/engine/sweep.py",
        f"{SWEEP} {RESUMED}::test_padding_that_a_model_does_not_know_is_refused "
        f"{RESUMED}::test_prompts_aligned_from_the_right_name_positions_from_the_end tests/engine/test_corruptions.py",
        ("np.add.at(swept.clean, index, ends[0] / samples)", "np.add.at(swept.clean, index, ends[0])"),
        ("((values - own[rows.numpy()]) / samples)", "(values - own[rows.numpy()])"),
        ("own = ends[1] if options.denoises else ends[0]", "own = ends[1]"),
        ("float(np.abs(clean - corrupted).mean())", "float(np.abs((clean - corrupted).mean()))"),
        ("run.tokens.lengths.argmin()", "run.tokens.lengths.argmax()"),
        (
            "max(swept.noise or 0.0, batch_noise(model, bare, measured, len(part)))",
            "batch_noise(model, bare, measured, len(part))",
        ),
        (
            "own_positions(base.tokens, rows, columns, options.align)",
            "own_positions(base.tokens, rows, columns, 'equal')",
        ),
    ),
    *_of(
        "saepatch/engine/plan.py",
        "tests/engine/test_several_sites.py::test_columns_of_positions_in_prompts_padded_on_the_left",
        ("(width if position < 0 else width - length) + position", "(width if position < 0 else 0) + position"),
        ("if not -length <= position < length", "if not -length <= position <= length"),
    ),
    *_of(
        "saepatch/engine/edited_runs.py",
        "tests/engine/test_several_sites.py",
        ("runs = {False: self.source, True: self.base}", "runs = {False: self.source, True: self.source}"),
        ("(self.base.tokens.attention_mask.bool() if frozen else self.where[number])", "self.where[number]"),
        ("changes.vectors(some).to(out.dtype), accumulate=True)", "changes.vectors(some).to(out.dtype))"),
        ("return (x + change).to(x.dtype)", "return (x - change).to(x.dtype)"),
        ("chosen[number, column - first, ids] = True", "chosen[number, column, ids] = True"),
    ),
    *_of(
        "saepatch/engine/components.py",
        "tests/engine/test_several_sites.py tests/engine/test_corruptions.py",
        ("value = value * scale[row, pos, 0]", "pass"),
        ("(where & change.ne(0).any(-1))", "(where & change.ne(0).all(-1))"),
        (
            "(values - base).unflatten(-1, (self.units, -1)) * where[..., None, None]",
            "(values - base).unflatten(-1, (self.units, -1))",
        ),
        ("part if part.frozen else replace(part, position=position)", "replace(part, position=position)"),
    ),
    *_of(
        "saepatch/engine/changes.py",
        "tests/engine/test_corruptions.py tests/measure/long",
        ("base.written[here], where[here]).reversed()", "base.written[here], where[here])"),
    ),
    *_of(
        "saepatch/engine/metrics.py",
        "tests/engine/test_metrics.py",
        ("(log_p.exp() * (log_p - log_q)", "(log_q.exp() * (log_p - log_q)"),
        ("log_p[:, ids].logsumexp(-1) - log_p[:, others]", "log_p[:, ids].sum(-1) - log_p[:, others]"),
        ("(logits > take(logits, batch.answer)[:, None])", "(logits >= take(logits, batch.answer)[:, None])"),
    ),
    *_of(
        "saepatch/measure/results/screen.py",
        "tests/measure/test_screen.py",
        ("minlength=len(unique)) / len(self.examples)", "minlength=len(unique)) / np.bincount(inverse.reshape(-1))"),
        ("[: self.largest]))[-k])", "[: self.largest]))[k - 1])"),
        (
            "np.abs(self.exact[self.largest :]) >= self.threshold(k)",
            "np.abs(self.exact[self.largest :]) > self.threshold(k)",
        ),
        ("(1 - level) / self.looks / bounded", "(1 - level) / self.looks"),
        ("start = self.largest if sample_only else 0", "start = 0 if sample_only else 0"),
        ("means / (abs(self.mean_gap) if self.sizes else self.mean_gap)", "means / abs(self.mean_gap)"),
    ),
    *_of(
        "saepatch/engine/gradients.py",
        "tests/measure/test_attribution.py",
        ("(step + 0.5) / self.steps * difference", "step / self.steps * difference"),
    ),
    *_of(
        "saepatch/splicing/donors.py",
        "tests/splicing/test_restoring.py tests/restoration/test_safety_latents.py",
        ("values * (theirs / scale.clamp(min=1e-12))", "values"),
        ("own.error + (donors.beside - own.beside)", "donors.error"),
        ("first = seen.width - self._columns ", "first = seen.width - self._columns + 1 "),
        ("(columns >= seen.width - template)", "(columns > seen.width - template)"),
        ("keep = tokens.width - start if self._read else self._columns", "keep = self._columns"),
        (
            "mean if self._ids is None else mean[list(self._ids)]",
            "mean if self._ids is None else mean[: len(self._ids)]",
        ),
        ("template > shortest:", "template >= shortest:"),
    ),
    *_of(
        "saepatch/restoration/ranking.py",
        "tests/restoration/test_safety_latents.py "
        "tests/dictionaries/test_unknown_tokens.py::test_change_scores_and_safety_latents",
        ("(squares[site] / n[site]).sqrt() * norms[site]", "squares[site].sqrt() / n[site] * norms[site]"),
        (
            "_tail(dictionary.written(here[site][None])[0], n)",
            "_tail(dictionary.activations(here[site][None])[0][0], n)",
        ),
        ("sums[site] += difference.sum(0)", "sums[site] -= difference.sum(0)"),
        ("order[every[order] > 0]", "order[every[order] >= 0]"),
        ("for token in row[: len(row) - completion]", "for token in row"),
        ("_wide(acts[len(acts) - n :])", "_wide(acts[:n])"),
        ("(total / len(prompts)).float()", "total.float()"),
        ("first = 0 if template is None else tokens.width - template", "first = 0"),
        (
            "torch.cat([x.new_zeros(len(x), missing, x.shape[2]), x], 1)",
            "torch.cat([x, x.new_zeros(len(x), missing, x.shape[2])], 1)",
        ),
        ("(total / seen[site])", "(total / sum(counts))"),
        ("& {*_known(dictionary, other, its, n)})", ")"),
        ("(change * along).sum(0)", "(change * along).mean(0)"),
    ),
    *_of(
        "saepatch/restoration/restore.py",
        "tests/restoration/test_safety.py",
        ("difference.pow(2).mean(0).sqrt()", "difference.abs().mean(0)"),
        ("else latents.acts * latents.scale", "else latents.acts"),
        ("in plain[:80] for", "in plain for"),
        ("(_written(clean) - _written(corrupted))[where]", "(_written(clean) - _written(corrupted)).flatten(0, 1)"),
    ),
    *_of(
        "saepatch/runs/commands/answers.py",
        "tests/runs/test_answering.py::test_draws_are_averaged_prompt_by_prompt",
        ("bootstrap_mean(scores / count, seed=seed)", "bootstrap_mean(scores, seed=seed)"),
        ("wilson_share(hit_counts / count)", "wilson_share(hit_counts / count.max() / 2)"),
    ),
    *_of(
        "saepatch/model/inputs/images.py",
        PICTURES,
        ("while column > 0 and (inside := int(self.before[:, column].max())):", "while False and (inside := 0):"),
    ),
    *_of(
        "saepatch/model/inputs/pictures.py",
        PICTURES,
        ('"picture" if from_picture < last else "none"', '"none"'),
    ),
    *_of("saepatch/model/forward.py", PICTURES, ("or self.own_offset:", "or False:")),
]
