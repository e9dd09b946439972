"""Tables in results/ are what their runs say, and docs/results.md shows them as they are."""

from __future__ import annotations

import io
import json
import re
import runpy
import shutil
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoTokenizer, BertConfig, BertModel

from aroma_lab.report.formats import markdown, signed_points, to_csv
from aroma_lab.report.tables import make_table
from aroma_lab.study.selection import edges
from aroma_lab.tasks.model import packaged_encoder
from published import (
    GROWN,
    RANKS,
    RESULTS,
    ROOT,
    at_half_the_length,
    by_one_run,
    each_seed_of,
    in_points,
    lora_error,
    not_again,
    not_squeezed,
    of_evidence,
    over_tasks,
    page_of,
    runs_of,
    runs_of_images,
    with_eight_slots,
)

TABLES = [
    RESULTS / "minilm-six" / "tables" / "inner.csv",
    RESULTS / "smollm2-commonsense" / "tables" / "sets.csv",
    *(RESULTS / grid / "tables" / f"{kind}.csv" for grid in GROWN for kind in ("ranks", "regret")),
    *(RESULTS / grid / "tables" / "ranks.csv" for grid in ("memory", "mrpc", "rte", "smollm2-news")),
]
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
TEXT = page_of("results.md")


def name_of(path: Path) -> str:
    return str(path.relative_to(RESULTS))


@pytest.mark.parametrize("path", TABLES, ids=name_of)
def test_a_table_has_the_numbers_of_its_runs(path: Path) -> None:
    table = make_table(runs_of(path.parents[1]), path.stem)
    found = pd.read_csv(io.StringIO(to_csv(table)))
    pd.testing.assert_frame_equal(found, pd.read_csv(path), rtol=1e-12, atol=1e-14, check_dtype=False)
    assert markdown(table) == path.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", TABLES, ids=name_of)
def test_the_page_shows_a_table_as_it_is(path: Path) -> None:
    lines = path.with_suffix(".md").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    if path.stem == "inner":  # of which the page leaves out the single kinds of matrices
        lines = [line for line in lines if not re.search(r"\| \w+[.\w]*\.\w+ ", line)]
        assert len(lines) == 2 + runs_of(path.parents[1]).of("aroma-paper").task.nunique()
    assert "\n".join(lines) in PAGE
    assert f"(../results/lab/{name_of(path.with_suffix('.md'))})" in PAGE


@pytest.mark.parametrize("grid", ["smollm2-commonsense", "smollm2-news", "memory", "mrpc", "rte", *GROWN])
def test_every_run_says_what_it_was_made_with(grid: str) -> None:
    rows = runs_of(RESULTS / grid).rows
    for row in rows:
        assert row["git_revision"], row["name"]
        assert {"python", "torch", "transformers", "peft", "aroma-peft"} <= row["result"]["versions"].keys()
        assert row["trial"]["training"]["max_steps"] > 0
    assert {row["state"] for row in rows} == {"finished"}


@pytest.mark.parametrize("page", ["results.md", "tried.md"])
def test_what_a_page_links_to_is_there(page: str) -> None:
    targets = re.findall(r"\]\((\.\./[^)#]+)\)", page_of(page))
    assert targets
    assert all((ROOT / "docs" / target).exists() for target in targets)


def test_the_page_says_of_the_inner_check_what_the_runs_say() -> None:
    table = pd.read_csv(RESULTS / "minilm-six" / "tables" / "inner.csv")
    whole = table[table.matrices == "all"]
    shares = sorted(round(100 * share) for share in whole.fired / (whole.fired + whole.never))
    assert f"The criterion fires in {shares[0]} to {shares[-1]} % of loops" in TEXT
    assert set(table["median"]) == {50, 60}


def test_the_page_in_pictures_says_what_the_run_says() -> None:
    runs = runs_of(RESULTS / "minilm-six").of("aroma-evidence")
    run = runs[(runs.task == "trec") & (runs.seed == 0)].iloc[0]
    page = page_of("how.md")
    ends = sum(run.result["ranks"].values())
    (_, left), (at_end, last) = run.curve["total_rank"][-2:]
    assert (at_end, last) == (288, ends), "only the squeeze changed what the trial left"
    assert f"Its trial left {left} components, of which {ends} are there in the end;" in page
    assert f"in {run.result['steps']} steps" in page
    others = sorted(sum(result["ranks"].values()) for result in runs[(runs.task == "trec") & (runs.seed > 0)].result)
    assert f"the others ended with {others[0]} to {others[-1]} components" in page


@pytest.mark.parametrize("name", ["memory", "mrpc", "rte", "smollm2-commonsense", "smollm2-news", *GROWN])
def test_what_was_chosen_was_compared_with_all_next_to_it(name: str) -> None:
    selection = json.loads((RESULTS / name / "selection.json").read_text(encoding="utf-8"))
    entries = {(name, task, method): entry for task, of_task in selection.items() for method, entry in of_task.items()}
    entries = {where: entry for where, entry in entries.items() if entry["chosen"] and where[2] != "pretrained"}
    assert entries
    for where, entry in entries.items():
        points = [values for values, _ in entry["tried"]]
        assert not edges(points, entry["chosen"]), where
        for key, value in entry["chosen"].items():
            numbers = sorted({point[key] for point in points})
            place = numbers.index(value)
            for other in (*numbers[max(place - 1, 0) : place], *numbers[place + 1 : place + 2]):
                assert {**entry["chosen"], key: other} in points, (entry["chosen"], key, other)


def test_results_are_json_that_any_reader_takes() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for path in (ROOT / "results").rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_results_are_small() -> None:
    sizes = [path.stat().st_size for path in (ROOT / "results").rglob("*") if path.is_file()]
    assert max(sizes) < 200_000
    assert sum(sizes) < 1_500_000


def test_generated_answers_are_counted_as_their_files_say() -> None:
    files = sorted((RESULTS / "smollm2-commonsense" / "generation").glob("*.json"))
    assert len(files) == 4
    for file in files:
        sets = json.loads(file.read_text(encoding="utf-8"))["sets"].values()
        right = sum(round(one["metrics"]["generated"] * one["examples"]) for one in sets)
        assert f"| {file.stem} | {right} | {sum(one['unparseable'] for one in sets)} |" in PAGE


def test_the_page_says_of_planted_nets_what_the_runs_say() -> None:
    nets = runs_of(RESULTS / "planted-nets")
    ranks = make_table(nets, "ranks").values.set_index(["method", "task"])
    regret = make_table(nets, "regret").values
    regret = regret[regret.method == "aroma-evidence"].set_index("task")
    found, scores = ranks.loc["aroma-evidence"], 100 * ranks.score_mean

    def correlation(task: str) -> str:
        return f"{found.spearman_mean[task]:.2f} (`{task}`)"

    assert f"rank correlations of {correlation('graded')} and {correlation('noisy')}" in TEXT
    assert f"rank correlations of {correlation('graded-b4')} and {correlation('noisy-b4')}" in TEXT
    few = ("graded-b4", "noisy-b4")
    beyond = (regret.difference / regret.error)[[*few]]
    assert abs(beyond["graded-b4"]) < 1 < beyond["noisy-b4"]
    apart = [f"{signed_points(regret.difference[task])} ± {100 * regret.error[task]:.2f}" for task in few]
    size = [f"{found.trained_rank_mean[task]:.2f}" for task in few]
    assert (
        f"level with r = 8, and above it with noise: {apart[0]} points on `graded-b4`, at {size[0]} trained "
        f"components, and {apart[1]} on `noisy-b4`, at {size[1]}." in TEXT
    )
    with_noise = apart[1].removeprefix("+")
    assert f"level with r = 8 with little noise ({apart[0]} points), and {with_noise} above it with much, at" in TEXT
    assert {*regret.best[[*few]]} == {"lora-r8"}
    assert all(scores["aroma-evidence", task] > scores["lora-r4", task] for task in few)
    even = [f"{scores[method, 'uniform']:.1f}" for method in ("aroma-evidence", "lora-r2", "lora-r4")]
    assert f"{even[0]} % at {found.trained_rank_mean.uniform:.2f}, r = 2 {even[1]} %, and r = 4 {even[2]} %." in TEXT
    assert f"evidence leaves {100 - scores['aroma-evidence', 'graded']:.1f} % of the error unexplained" in TEXT
    assert f"LoRA leaves {100 - scores['lora-r4', 'graded']:.1f} % with 4" in TEXT
    paper = ranks.loc["aroma-paper"].drop("nothing")
    ends, right = (paper[key].dropna() for key in ("average_rank_mean", "spearman_mean"))
    assert f"with {ends.min():.0f} to {ends.max():.0f} components on average" in TEXT
    assert f"(rank correlations of {right.min():.2f} to {right.max():.2f})" in TEXT
    assert (
        f"Where nothing is planted, {100 * ranks.grew_mean['aroma-paper', 'nothing']:.0f} % of the matrices grow."
        in TEXT
    )
    assert f"explains {100 * paper.score_mean.min():.0f} to {100 * paper.score_mean.max():.0f} %." in TEXT


def test_the_page_says_of_single_matrices_what_the_runs_say() -> None:
    runs = runs_of(RESULTS / "planted-nets").of("aroma-evidence").set_index("task")
    pairs = {
        task: [
            (planted["ranks"][name], found)
            for result in runs.result[[task]]
            for planted in [result["planted"]]
            for name, found in result["ranks"].items()
        ]
        for task in ("graded", "noisy", "uniform")
    }
    right = sum(planted == found for planted, found in pairs["graded"])
    assert right == len(pairs["graded"]) == 60
    assert [found for _, found in pairs["uniform"]] == [2] * 60
    assert "In `graded` all 60 matrices have the rank that is planted, and in `uniform` all 60 have two." in TEXT
    nothing = [found for planted, found in pairs["noisy"] if not planted]
    assert nothing == [0] * 20
    assert "In `noisy` all 20 matrices that need nothing get nothing; of" in TEXT
    others = [found - planted for planted, found in pairs["noisy"] if planted]
    near = sum(-1 <= more <= 1 for more in others)
    said = (
        f"of the {len(others)} that need something {others.count(0)} have what is planted, and {near} at most one more"
    )
    assert f"{said} or less. The furthest off have two too many or too few." in TEXT
    assert {-2, 2} <= {*others}
    assert max(map(abs, others)) == 2
    before = not_squeezed().average_rank
    assert f"{before['graded'].mean():.2f} components a matrix in `graded`, and {before['uniform'].mean():.2f}" in TEXT


def test_the_page_says_of_what_is_elsewhere_what_its_runs_say() -> None:
    rewards = {
        method: [json.loads(path.read_text())["after"] for path in (ROOT / "results" / "rl").glob(f"{method}-?.json")]
        for method in ("aroma", "lora-8")
    }
    low, high = ([f"{pick(values):.2f}" for pick in (min, max)] for values in rewards.values())
    assert f"Evidence is right on {' to '.join(low)} of new sums, LoRA r = 8 on {' to '.join(high)}" in TEXT
    scores = [runs_of_images(name).accuracy for name in ("digits", "mnist")]
    digits, mnist = (f"{100 * score['AROMA'].mean():.1f} %" for score in scores)
    behind = [in_points(score["LoRA r=8"] - score["AROMA"]).removeprefix("+") for score in scores]
    assert {len(score["AROMA"]) for score in scores} == {20}
    assert {seed for score in scores for seed in score["AROMA"].index} == {*range(20, 40)}
    said = f"Evidence has {digits} on digits and {mnist} on MNIST, {' and '.join(behind)} points less than LoRA r = 8"
    assert said in TEXT
    fresh = each_seed_of("split-anew").score
    images = page_of("vision.md")
    for method, in_results, in_images in (
        ("LoRA r=8", "it is {} and {} points below r = 8", "{} points on digits and {} on MNIST against rank 8"),
        ("LoRA r=8, on the images that AROMA trains on", "and {} and {} below one that", "left it has {} and {}."),
    ):
        ahead = [(fresh["as it is", name] - fresh[method, name]).dropna() for name in ("digits", "mnist")]
        assert {len(gain) for gain in ahead} == {30}
        below = (in_points(-gain).removeprefix("+") for gain in ahead)
        assert in_results.format(*below) in TEXT
        assert in_images.format(*map(in_points, ahead)) in images


def test_the_page_says_of_a_planted_encoder_what_the_runs_say() -> None:
    runs = runs_of(RESULTS / "planted-minilm")
    ranks = make_table(runs, "ranks").values.set_index("method")
    left, found = 100 * (1 - ranks.score_mean), ranks.loc["aroma-evidence"]
    assert (
        f"leaves {left['aroma-evidence']:.1f} % of the error unexplained at {found.trained_rank_mean:.2f} trained "
        f"components, LoRA {left['lora-r4']:.1f} % with 4 and {left['lora-r8']:.1f} % with 8." in TEXT
    )
    by_seed = runs.reported.pivot_table("score", "seed", "method")
    ahead = by_seed["aroma-evidence"] - by_seed["lora-r8"]
    assert ahead.mean() > 2 * ahead.sem()
    assert f"it explains {in_points(ahead).removeprefix('+')} points more than r = 8, the best of the five" in TEXT
    assert 0.65 < found.trained_rank_mean / 8 < 0.75, "seven tenths of its size"
    assert left.filter(like="lora-r").idxmin() == "lora-r8"
    assert f"With 16, at a rate of 0.001, LoRA leaves {left['lora-r16']:.1f} %." in TEXT
    squeezed = by_seed["aroma-evidence"] - not_squeezed().score["minilm"]
    whole = not_squeezed().loc["minilm"]
    said = f"it was {whole.spearman.mean():.2f}, with {whole.average_rank.mean():.2f} components a matrix in place of"
    said = (
        f"{said} {found.average_rank_mean:.2f}, which explained {in_points(-squeezed).removeprefix('+')} points more."
    )
    assert said in TEXT
    then = not_again().score["minilm"]
    behind = in_points(by_seed["lora-r8"] - then).removeprefix("+")
    assert f"evidence left {100 * (1 - then.mean()):.1f} %, {behind} points more than r = 8." in TEXT
    assert runs.selection["minilm"]["lora-r16"]["chosen"] == {"training.learning_rate": 0.001}
    assert left["lora-r8"] / 2 < left["aroma-evidence"] < left["lora-r4"] / 2
    assert 4 < found.trained_rank_mean < 8, "so that it is compared with r = 8"
    assert f"(rank correlation {found.spearman_mean:.2f}): {100 * found.grew_mean:.0f} % of the matrices grow" in TEXT
    assert f"explains {100 * ranks.score_mean['aroma-paper']:.0f} %, less than LoRA r = 1." in TEXT
    assert ranks.score_mean["aroma-paper"] < ranks.score_mean["lora-r1"]
    tried = runs.selecting.assign(rate=[trial["training"]["learning_rate"] for trial in runs.selecting.trial])
    tried = tried.set_index(["method", "rate"])
    low, high = tried.loc["aroma-evidence", 0.001], tried.loc["aroma-evidence", 0.003]
    assert (
        f"0.001 and 0.003 have {100 * low.score:.1f} % and {100 * high.score:.1f} % on held-out sentences, at "
        f"{low.trained_rank:.2f} and {high.trained_rank:.2f} trained components" in TEXT
    )
    fixed = [f"{100 * tried.score[method, 0.003]:.1f} %" for method in ("lora-r4", "lora-r8")]
    assert f"LoRA r = 4 has {fixed[0]} there and r = 8 {fixed[1]}." in TEXT


def test_the_page_says_of_the_encoder_in_more_steps_what_the_runs_say() -> None:
    every = of_evidence("longer-encoder")
    chooses = every.of.str.startswith("choosing")
    chosen = every[chooses].pivot_table("held_out", "learning_rate", "of")
    runs = every[~chooses]
    for of, rates in (
        ("evidence", [0.000333, 0.001, 0.003]),
        *((fixed, [0.001, 0.003, 0.01]) for fixed in ("r = 4", "r = 8")),
    ):
        tried = chosen[f"choosing, {of}"].dropna()
        assert [*tried.index] == rates
        assert {*runs[runs.of == of].learning_rate} == {tried.idxmax()} == {rates[1]}
    by_seed = runs.pivot_table("score", "seed", "of")
    long = runs.groupby("of")[["score", "trained_rank", "spearman"]].mean()
    left, size = 100 * (1 - long.score), long.trained_rank
    before, higher = "evidence, short rows and memory", "evidence, at 0.003"
    whole, sure = (f"evidence, nothing {said}" for said in ("small goes early", "undecided stays"))
    seeds = {"evidence": 5, higher: 5, whole: 5, sure: 5, "r = 4": 5, "r = 8": 5, "r = 2": 2, before: 2}
    assert by_seed.count().to_dict() == seeds
    assert (
        f"Where nothing small went early it left {left[whole]:.2f} % at {size[whole]:.2f}, with a correlation of "
        f"{long.spearman[whole]:.2f}, and where nothing undecided stayed {left[sure]:.2f} % at {size[sure]:.2f}."
        in TEXT
    )
    assert (
        f"it leaves {left['evidence']:.2f} % at {size['evidence']:.2f} trained components, less than a tenth" in TEXT
    )
    assert left["evidence"] < left["r = 4"] / 10
    assert f"At 0.003 evidence without the first of these leaves {left[higher]:.2f} % at {size[higher]:.2f}." in TEXT
    of_lora = 100 * lora_error(long.score.rename(lambda of: of.replace("r = ", "lora-r")), size["evidence"])
    assert f"At its size LoRA would leave {of_lora:.2f} %, five times as much, so that the aim is met" in TEXT
    assert of_lora / left["evidence"] > 5
    fixed = {r: f"{left[f'r = {r}']:.2f} %" for r in (2, 4, 8)}
    ahead = in_points(by_seed["evidence"] - by_seed["r = 8"])
    beside = f"with r = 4: {fixed[4]}. With r = 8 that is {fixed[8]}"
    gain = by_seed["evidence"] - by_seed["r = 8"]
    assert gain.mean() > gain.sem()
    assert f"{beside}, so that evidence explains {ahead.removeprefix('+')} points more (five seeds" in TEXT
    assert f"and with r = 2 {fixed[2]} (two;" in TEXT
    grown = runs[runs.of == "evidence"]
    right = " and ".join(
        f"{100 * grown[key].mean():.0f} % {said}"
        for key, said in (
            ("exact", "of the matrices have the rank that is planted,"),
            ("within_one", "at most one more"),
        )
    )
    assert f"with a rank correlation of {long.spearman['evidence']:.2f}: {right}" in TEXT
    assert f"a short memory left {left[before]:.2f} % at {size[before]:.2f} (two seeds)." in TEXT


def test_the_page_says_of_other_planted_encoders_what_the_runs_say() -> None:
    runs = of_evidence("encoder-others")
    assert {*runs.groupby(["task", "of", "learning_rate"]).seed.count()} == {3}
    means = runs.groupby(["task", "of", "learning_rate"])[["score", "held_out", "trained_rank", "spearman"]].mean()
    nothing = runs[runs.task == "minilm-nothing"]
    matrices = 36 * len(nothing)
    assert f"{36 * nothing.grew.sum():.0f} of {matrices} matrices grow" in TEXT
    grown, fixed = (means.loc["minilm-uniform", of, 0.003] for of in ("evidence", "r = 2"))
    size = f"at {grown.trained_rank:.2f} trained components"
    left = [f"{100 * (1 - one.score):.1f} %" for one in (grown, fixed)]
    assert f"With rank 2 everywhere evidence leaves {left[0]} {size}, r = 2 {left[1]}, both" in TEXT
    few = means.loc["minilm-b4"]
    rates = few.held_out.unstack().idxmax(axis=1)
    best = {of: few.loc[of, rate] for of, rate in rates.items()}
    left = {of: f"{100 * (1 - one.score):.1f} %" for of, one in best.items()}
    by_seed = {
        of: runs[(runs.task == "minilm-b4") & (runs.of == of) & (runs.learning_rate == rate)].set_index("seed").score
        for of, rate in rates.items()
    }
    ahead = 100 * (by_seed["evidence"] - by_seed["r = 8"])
    fixed = f"r = 4 {left['r = 4']} and r = 8 {left['r = 8']}"
    assert f"it leaves {left['evidence']} at {best['evidence'].trained_rank:.2f}, {fixed}, which" in TEXT
    assert f"which is {ahead.mean():.2f} ± {ahead.sem():.2f} points more; the ranks" in TEXT
    assert f"the ranks are hardly found ({best['evidence'].spearman:.2f})." in TEXT


def test_the_page_says_of_memory_what_the_runs_say() -> None:
    means = make_table(runs_of(RESULTS / "memory"), "ranks").values
    assert not {*means.method} & {"aroma-paper"}
    means = means[means.method == "aroma-evidence"].set_index("task")
    found, recalled = means.average_rank_mean, 100 * means.score_mean
    most = int(found.idxmax()[1:])
    assert f"from {found.n100:.0f} for 100 pairs to {found.max():.0f} for {most:,}" in TEXT
    assert f"and {found.n10000:.0f} for 10,000" in TEXT
    *others, last = (f"{recalled[f'n{pairs}']:.0f}" for pairs in (100, 300, 1000, 3000, 10000))
    assert f"{', '.join(others)} and {last} %" in TEXT
    chosen = json.loads((RESULTS / "memory" / "selection.json").read_text(encoding="utf-8"))
    for name in ("aroma-evidence", "lora-r8"):
        rates = {one[name]["chosen"]["training.learning_rate"] for one in chosen.values() if name in one}
        assert rates == {0.01}, name
    assert "Its rate is 0.01 for each N, of four from 0.001 to 0.03, as is that of r = 8." in TEXT
    by_seed = runs_of(RESULTS / "memory").reported.pivot_table("score", ["task", "seed"], "method")
    tasks = ("n100", "n300", "n1000", "n3000")
    behind, level = (
        [in_points(by_seed.loc[task]["aroma-evidence"] - by_seed.loc[task][name]) for task in tasks]
        for name in ("lora-r16", "lora-r8")
    )
    *others, last = (points.removeprefix("−") for points in behind)
    assert f"below r = 16 for each N, by {', '.join(others)} and {last} points" in TEXT
    assert f"it has {', '.join(level[:3])} and, for 3,000 pairs, {level[3]}." in TEXT
    before = with_eight_slots().score
    less = f"{100 * before['n10000'].mean():.0f} % of 10,000 pairs."
    assert f"With eight slots it recalled [less](tried.md#sixteen-slots): {less}" in TEXT
    assert all((before[task] < by_seed.loc[task]["aroma-evidence"]).all() for task in (*tasks, "n10000"))
    assert {*by_seed.loc["n3000"].dropna(axis=1)} == {"lora-r8", "lora-r16", "aroma-evidence"}
    assert {*by_seed.loc["n10000"].dropna(axis=1)} == {"aroma-evidence"}
    assert 8 < means.trained_rank_mean.min() < means.trained_rank_mean.max() < 12, "of eight and of sixteen"


def test_the_page_says_of_a_language_model_what_the_runs_say() -> None:
    scores = make_table(runs_of(RESULTS / "smollm2-news"), "ranks").values.set_index("method").score_mean
    methods = ("pretrained", "lora-r1", "lora-r8", "lora-r32", "aroma-evidence")
    before, one, eight, most, grown = (f"{1 / scores[method]:.2f}" for method in methods)
    fixed = f"{one} after LoRA r = 1, {eight} after LoRA r = 8, {most} after r = 32"
    assert f"is {before} before, {fixed}, and {grown} after growth by evidence" in TEXT
    runs = runs_of(RESULTS / "smollm2-news").reported
    size = {row.method: row.result["parameters"]["average"] / 1e6 for row in runs.itertuples()}
    assert f"({size['aroma-evidence']:.2f} M on average against {size['lora-r8']:.2f} M)" in TEXT
    assert size["aroma-evidence"] < size["lora-r8"] / 2
    chosen = json.loads((RESULTS / "smollm2-news" / "selection.json").read_text(encoding="utf-8"))["news"]
    trials = {method: runs_of(RESULTS / "smollm2-news").of(method).trial.iloc[0] for method in methods[1:]}
    for method, trial in trials.items():
        assert trial["training"]["learning_rate"] == chosen[method]["chosen"]["training.learning_rate"]
    lengths = {row["trial"]["training"]["max_steps"] for row in runs_of(RESULTS / "smollm2-news").rows}
    assert lengths == {100}, "rates are chosen in runs of the same length"


def test_the_page_says_of_real_text_what_the_runs_say() -> None:
    six = runs_of(RESULTS / "minilm-six")
    scores = six.reported.groupby(["method", "task"]).score.mean().unstack()
    labels = {"aroma-evidence": "evidence", **{f"lora-r{r}": f"r = {r}" for r in (1, 2, 4, 8, 16)}}
    (best, score), *others = scores.mean(axis=1)[[*labels]].sort_values(ascending=False).items()
    listed = [f"{labels[name]} {100 * value:.2f}" for name, value in others]
    assert f"of the four, {labels[best]} has {100 * score:.2f}, {', '.join(listed[:-1])} and {listed[-1]}." in TEXT
    by_seed = six.reported.pivot_table("score", ["task", "seed"], "method")
    ahead = {name: over_tasks(by_seed["aroma-evidence"] - by_seed[name]) for name in labels if name in by_seed}
    said = {name: f"{signed_points(mean)} ± {100 * error:.2f}" for name, (mean, error) in ahead.items()}
    below = said["lora-r16"].removeprefix("−")
    assert f"level with r = 2, 4 and 8, and {below} points below the best of five fixed ranks, r = 16" in TEXT
    beside = [f"{said[f'lora-r{r}']} against r = {r}" for r in (16, 2, 8, 4, 1)]
    assert f"Evidence has {', '.join(beside[:-1])} and {beside[-1]}." in TEXT
    assert all(abs(ahead[f"lora-r{r}"][0]) < ahead[f"lora-r{r}"][1] for r in (2, 4, 8)), "which is level"
    gained = (100 * (by_seed["aroma-evidence"] - by_seed["aroma-paper"])).groupby("task").agg(["mean", "sem"])
    said = {task: f"{one['mean']:.2f} ± {one['sem']:.2f}".replace("-", "−") for task, one in gained.iterrows()}
    level = f"level with it on BBC News ({said['bbc-news']}) and BANKING77 ({said['banking77']})"
    assert f"{said['trec']} points above it on TREC and {said['sst2']} on SST-2, and {level}" in TEXT
    beside = {
        name: over_tasks((by_seed["aroma-evidence"] - by_seed[name]).dropna())
        for name in ("adalora-r8", "bitfit", "full")
    }
    assert by_seed[[*beside]].groupby("task").count().to_numpy().tolist() == [[3, 3, 3]] * 4
    ada, bitfit, full = (f"{100 * abs(mean):.2f} ± {100 * error:.2f}" for mean, error in beside.values())
    assert min(beside["adalora-r8"][0], beside["bitfit"][0]) > 0 > beside["full"][0]
    trained = six.of("adalora-r8").trained_rank
    assert 8.5 < trained.min() < trained.max() < 9.5
    assert (
        f"evidence is {ada} points above AdaLoRA, which trains nine components a matrix, {bitfit} above BitFit, and "
        f"{full} below full fine-tuning" in TEXT
    )
    on_sst2 = 100 * (by_seed["full"] - by_seed["aroma-evidence"])["sst2"].dropna()
    assert f"which is ahead on SST-2 ({on_sst2.mean():.2f} ± {on_sst2.sem():.2f})." in TEXT
    starts = {name: by_seed[name].dropna() for name in ("lora-r8-eva", "lora-r8-ga")}
    for task, place in (("trec", "TREC"), ("banking77", "BANKING77")):
        assert [len(one[task]) for one in starts.values()] == [3, 3]
        eva, ga = (f"{100 * one[task].mean():.2f} %" for one in starts.values())
        own, grown = (f"{100 * scores[task][name]:.2f} %" for name in ("lora-r8", "aroma-evidence"))
        assert f"{eva} (EVA) and {ga} (LoRA-GA) on {place}; from its own start {own}, and evidence {grown}" in TEXT
    low, *_, high = sorted(100 * scores.banking77[RANKS])
    assert f"the five have {low:.2f} to {high:.2f}, and evidence is level with r = 2 and 4." in TEXT
    assert f"ranks, which lie within {high - low:.2f} points of each other there." in TEXT
    against = (by_seed["aroma-evidence"] - by_seed[name] for name in RANKS)
    level = [abs(one["banking77"].mean()) < one["banking77"].sem() for one in against]
    assert level == [False, True, True, False, False]
    runs = six.of("aroma-evidence")
    ranks = [[*result["ranks"].values()] for result in runs[runs.task == "sst2"].result]
    kept, where = sorted(map(sum, ranks)), sorted(sum(map(bool, of_run)) for of_run in ranks)
    assert f"the runs end with {kept[0]} to {kept[-1]} components in {where[0]} to {where[-1]} of the 36" in TEXT
    size = {task: f"{rank:.2f}" for task, rank in runs.groupby("task").trained_rank.mean().items()}
    assert (
        f"{size['trec']} trained components on TREC, {size['sst2']} on SST-2 and {size['banking77']} on BANKING77, "
        f"where 16 is the best, and {size['bbc-news']} on BBC News, where 4 is." in TEXT
    )
    of_both = [six.of(f"aroma-{rule}", task="banking77").trained_rank.mean() for rule in ("evidence", "paper")]
    assert 3.5 < of_both[0] / of_both[1] < 4.5
    assert "on BANKING77, where it trains four times as many parameters," in TEXT
    trained = sorted(runs.groupby("task").trained_rank.mean())
    assert f"0.8 of the {trained[0]:.1f} to {trained[-1]:.1f} trained components" in TEXT


def rates_in(runs: pd.DataFrame) -> dict[tuple[str, str], dict[str, float]]:
    """Return the rates of method and task, as a selection has them."""
    names = ["learning_rate", "head_learning_rate"]
    first = runs.groupby(["of", "task"])[names].first().add_prefix("training.")
    return {place: row.dropna().to_dict() for place, row in first.iterrows()}


def chosen_by_one_run(method: str, task: str) -> dict[str, float]:
    """Return the rates that one run chose on one of the four texts."""
    table = runs_of(RESULTS / "minilm-six").selection[task][method]["chosen"]
    return rates_in(by_one_run()).get((method, task), table)


def scores_by_one_run() -> pd.Series:
    """Return scores of the four texts by method, task and seed, at rates that one run each chose."""
    table = runs_of(RESULTS / "minilm-six").reported.rename(columns={"method": "of"})
    scores: pd.Series = by_one_run().score.drop("mrpc", level="task")
    return scores.combine_first(table.set_index(["of", "task", "seed"]).score)


def test_the_page_says_of_ten_seeds_what_the_runs_say() -> None:
    later = each_seed_of("banking77-seeds")
    first = scores_by_one_run()
    ten = {}
    for method in ("aroma-evidence", "aroma-paper", *RANKS):
        rates = {name: {*later.loc[method][name]} for name in ("learning_rate", "head_learning_rate")}
        only = {f"training.{name}": rate for name, (rate,) in rates.items()}
        assert only == chosen_by_one_run(method, "banking77")
        ten[method] = pd.concat([first[method, "banking77"], later.score[method, "banking77"]])
        assert [*ten[method].index] == [*range(10)]
    ahead = {method: in_points(ten["aroma-evidence"] - scores) for method, scores in ten.items()}
    fixed = [f"{ahead[f'lora-r{r}']} {'points ' * (r == 16)}against r = {r}" for r in (16, 1, 2, 4, 8)]
    paper = f"{ahead['aroma-paper']} against the paper's rule"
    assert f"evidence has {', '.join(fixed)} and {paper}." in TEXT
    assert f"Over ten seeds it is {ahead['lora-r16'].removeprefix('−')} below r = 16." in TEXT
    assert f"With ten evidence is above it on BANKING77 at rates that one run chose ({ahead['aroma-paper']})." in TEXT


def test_the_page_says_of_the_best_rank_of_each_task_what_the_runs_say() -> None:
    rows = make_table(runs_of(RESULTS / "minilm-six"), "regret").values
    rows = rows[rows.method == "aroma-evidence"].set_index("task").drop("average")
    said = {
        task: f"{100 * row.difference:+.2f} ± {100 * row.error:.2f}".replace("-", "−") for task, row in rows.iterrows()
    }
    assert (
        f"{said['trec']} points on TREC, {said['sst2']} on SST-2, {said['bbc-news']} on BBC News, "
        f"{said['banking77']} on BANKING77." in TEXT
    )
    assert f"**SST-2** ({said['sst2']} against r = 16)." in TEXT
    behind = {task: points.removeprefix("−") for task, points in said.items()}
    assert (
        f"with the best of the five on TREC and BBC News, and below it on SST-2 ({behind['sst2']}) and BANKING77 "
        f"({behind['banking77']})." in TEXT
    )
    assert {task for task, row in rows.iterrows() if abs(row.difference) < row.error} == {"trec", "bbc-news"}
    assert 0.18 < rows.trained.mean() / 16 < 0.23
    assert "best of five fixed ranks, r = 16, at about a fifth of its size." in TEXT
    sizes = rows.trained / rows.best.str.removeprefix("lora-r").astype(int)
    assert all((sizes[["sst2", "banking77"]] > 0.18) & (sizes[["sst2", "banking77"]] < 0.27)), sizes
    best = {"banking77": "lora-r16", "sst2": "lora-r16", "trec": "lora-r16", "bbc-news": "lora-r4"}
    assert rows.best.to_dict() == best
    most, *more = sorted(-100 * rows.difference[["sst2", "banking77"]])
    ahead = f"{most:.1f} and {more[0]:.1f} points"
    assert f"was ahead by {ahead} on two, and level with it on two" in page_of("limits.md")
    readme = page_of("../README.md")
    assert f"is level with it on two, and {ahead} ahead on SST-2 and BANKING77, at some four times the" in readme


def test_three_runs_choose_each_rate_of_the_ranks_and_of_evidence() -> None:
    """`one-run.json` has all that one run chose otherwise; MRPC's runs of evidence are in a file of their own."""
    before, names = rates_in(by_one_run()), ["training.learning_rate", "training.head_learning_rate"]
    changed = set()
    for grid in ("minilm-six", "mrpc"):
        runs = runs_of(RESULTS / grid)
        frame = runs.selecting
        grown = ["aroma-evidence"] if grid == "minilm-six" else []
        frame = frame[(frame.planned_steps == 320) & frame.method.isin([*RANKS, *grown])]
        rates = pd.DataFrame([[trial["training"][name[9:]] for name in names] for trial in frame.trial], columns=names)
        losses = pd.concat([frame.reset_index(drop=True), rates], axis=1)
        losses["loss"] = [result["held_out_loss"] for result in losses.result]
        for (task, method), mine in losses.groupby(["task", "method"]):
            chosen = runs.selection[task][method]["chosen"]
            of_three = mine.groupby(names).loss.agg(["mean", "count"]).query("count == 3")["mean"]
            assert len(of_three) > 1, (task, method)
            assert of_three.idxmin() == tuple(chosen[name] for name in names), (task, method)
            of_one = dict(zip(names, mine[mine.seed == 100].groupby(names).loss.first().idxmin(), strict=True))
            assert before.get((method, task), chosen) == of_one
            if of_one != chosen:
                changed.add((method, task))
    assert changed == {*before}
    assert f"{len(changed)} of 30 choices for evidence and the five ranks, MRPC included, were others" in TEXT


def test_the_page_says_of_rates_by_one_run_what_the_runs_say() -> None:
    score, six = scores_by_one_run().unstack("of"), runs_of(RESULTS / "minilm-six")
    assert f"Then one run of r = 8 collapsed on SST-2 ({100 * score['lora-r8'].min():.1f} %)" in TEXT
    assert 100 * six.of("lora-r8", task="sst2").score.min() > 85
    mrpc = runs_of(RESULTS / "mrpc").of("lora-r4").score
    there, here = 100 * by_one_run().score["lora-r4", "mrpc"].mean(), 100 * mrpc.mean()
    assert f"r = 4 had {there:.2f} % on MRPC in place of {here:.2f}" in TEXT
    average = 100 * score.groupby("task").mean().mean()
    mean, error = over_tasks(score["aroma-evidence"] - score["lora-r16"])
    said = f"{signed_points(mean)} ± {100 * error:.2f} against r = 16, with {average['aroma-evidence']:.2f}"
    assert f"evidence had {said} and {average['lora-r16']:.2f}." in TEXT
    banking = six.selecting.query("task == 'banking77' and method == 'aroma-evidence'")
    losses: dict[float, list[float]] = {}
    for trial, result in zip(banking.trial, banking.result, strict=True):
        if trial["training"]["head_learning_rate"] == 0.006 and result["planned_steps"] == 320:
            losses.setdefault(trial["training"]["learning_rate"], []).append(result["held_out_loss"])
    same = {f"{sum(losses[rate]) / 3:.3f}" for rate in (0.001, 0.003)}
    assert f"the same mean loss as at 0.003, {' '.join(same)}." in TEXT


def test_the_page_says_of_a_choice_by_more_seeds_on_mrpc_what_the_runs_say() -> None:
    found = of_evidence("again-on-mrpc").query("of == 'now'")
    losses = found.groupby(["learning_rate", "head_learning_rate"]).held_out_loss
    assert {*losses.count()} == {3}
    chosen = runs_of(RESULTS / "mrpc").selection["mrpc"]["aroma-evidence"]["chosen"]
    assert losses.mean().idxmin() == (chosen["training.learning_rate"], chosen["training.head_learning_rate"])
    assert "On MRPC its choice is [the same](../results/lab/tried/again-on-mrpc.json)." in TEXT


def test_the_page_says_of_runs_of_half_the_length_what_the_runs_say() -> None:
    """The file has what changes: the rates that they chose, and what came of these."""
    then = at_half_the_length()
    lower = []
    pairs = rates_in(then)
    for (method, task), before in pairs.items():
        now = chosen_by_one_run(method, task)
        assert before != now
        rates = [one.get("training.learning_rate", 0) for one in (now, before)]
        assert rates[0] <= rates[1]
        if rates[0] < rates[1]:
            lower.append((method, task))
    said = f"{len(pairs)} of 32 choices change; {len(lower)} lower the rate of the adapter, and none raises it."
    assert said in TEXT
    on_banking = {method for method, task in lower if task == "banking77"}
    assert on_banking == {"lora-r2", "lora-r4", "lora-r8", "aroma-evidence"}, "had three times the rate there"
    now = scores_by_one_run().groupby(["of", "task"]).mean()
    average = 100 * then.groupby(["of", "task"]).score.mean().combine_first(now).groupby("of").mean()
    best = average[RANKS].idxmax()
    evidence = average["aroma-evidence"]
    assert f"evidence had {evidence:.2f} on average, and r = {best[6:]}, the best rank, {average[best]:.2f}" in TEXT


def test_the_page_on_settings_says_of_the_default_scale_what_the_runs_say() -> None:
    tried = of_evidence("default-scale").set_index(["task", "seed"])
    beside = not_again().score
    said = {
        task: (f"{100 * tried.score[task].mean():.2f} %", in_points(tried.score[task] - beside[task]))
        for task in ("trec", "banking77")
    }
    assert {*tried.learning_rate} == {0.001}
    assert {*tried.groupby("task").score.count()} == {5}
    (trec, lost), (banking, gained) = said.values()
    assert f"0.001 was the best, with {trec} on TREC ({lost}) and {banking} on BANKING77 ({gained};" in page_of(
        "settings.md"
    )


def test_rte_is_not_learnt() -> None:
    assert "rte (accuracy), not learnt" in markdown(make_table(runs_of(RESULTS / "rte"), "main"))


def test_the_page_says_of_rates_on_mrpc_what_the_runs_say() -> None:
    runs = pd.DataFrame(json.loads((RESULTS / "tried" / "rates-on-mrpc.json").read_text(encoding="utf-8"))["runs"])
    short = 100 * runs[runs.max_steps == 160].groupby("method").held_out.max()
    assert f"most {short['lora-r1']:.1f} % of the held-out pairs right" in TEXT
    assert f"head-only has {short['head-only']:.1f} %" in TEXT
    long = {run.learning_rate: 100 * run.reported["test"] for run in runs[runs.max_steps == 320].itertuples()}
    assert f"r = 8 has {long[0.001]:.1f} % of the test set at a rate of 0.001, and {long[0.003]:.1f} %," in TEXT


def test_the_page_says_of_mrpc_what_the_runs_say() -> None:
    table = make_table(runs_of(RESULTS / "mrpc"), "ranks").values.set_index("method")
    scores = 100 * table.score_mean
    gains = sorted(scores.filter(regex="^lora") - scores["head-only"])
    assert len(gains) == 5
    assert f"each of the five ranks is above head-only, by {gains[0]:.1f} to {gains[-1]:.1f} points" in TEXT
    by_seed = runs_of(RESULTS / "mrpc").reported.pivot_table("score", "seed", "method")
    assert {*by_seed.count()[["aroma-evidence", *RANKS]]} == {len(by_seed)} == {10}
    difference = {name: by_seed["aroma-evidence"] - by_seed[name] for name in by_seed}
    ahead = {r: in_points(difference[f"lora-r{r}"]) for r in (1, 2, 4, 8, 16)}
    *first, last = (f"{points} against r = {r}" for r, points in ahead.items())
    size = f"{table.trained_rank_mean['aroma-evidence']:.2f} trained components"
    assert f"{', '.join(first)} and {last} points, at {size}. Its trial" in TEXT
    away = {r: difference[f"lora-r{r}"].mean() / difference[f"lora-r{r}"].sem() for r in ahead}
    assert [r for r in ahead if away[r] > 1] == [1, 2, 4, 8]
    assert away[16] < -1
    assert "above r = 1, 2, 4 and 8, and below r = 16**" in TEXT
    ends = sorted(sum(result["ranks"].values()) for result in runs_of(RESULTS / "mrpc").of("aroma-evidence").result)
    assert f"end with {ends[7]} to {ends[9]} components in the 36 matrices." in TEXT
    assert f"The others end with {ends[0]} to {ends[6]}: in" in TEXT
    assert f"It is {in_points(difference['aroma-paper'])} points above the paper's rule (five seeds)" in TEXT
    others = {name: in_points(difference[name]) for name in ("adalora-r8", "full", "bitfit")}
    assert (
        f"Against AdaLoRA it has {others['adalora-r8']}, against full fine-tuning {others['full']}, and against "
        f"BitFit {others['bitfit']} (three seeds" in TEXT
    )
    chosen = runs_of(RESULTS / "mrpc").selection["mrpc"]
    key, names = "training.head_learning_rate", ("adalora-r8", "aroma-paper")
    taken = [f"{chosen[name]['chosen'][key]:.2e}" for name in names]
    lowest = [f"{min(point[key] for point, _ in chosen[name]['tried']):.2e}" for name in names]
    said = f"head rates are {' and '.join(taken)}, in grids that reach down to {' and '.join(lowest)}."
    assert said.replace("e-0", "e-") in TEXT
    assert {*by_seed[[*others]].count()} == {3}
    gain = in_points(difference["head-only"])
    assert f"it is {gain.removeprefix('+')} points above its head alone" in TEXT
    *below, sixteen = (f"{points.lstrip('+−')} {{}} r = {r}" for r, points in ahead.items())
    said = [*(one.format("above") for one in below), f"and {sixteen.format('below')}.**"]
    assert ", ".join(said) in TEXT
    tried = of_evidence("trial-that-goes-on")
    shipped = sorted(100 * tried[(tried.task == "mrpc") & (tried["of"] == "shipped")].score)
    assert f"evidence had {shipped[0]:.1f} to {shipped[-1]:.1f} % right (three seeds, at a rate of 0.001)" in TEXT
    assert len(shipped) == 3
    before = of_evidence("one-at-a-time")
    assert f"it had {100 * before.score.mean():.2f} % ([runs](../results/lab/tried/one-at-a-time.json))" in TEXT
    assert len(before) == 5
    tried = runs_of(RESULTS / "mrpc").selecting
    best = min(tried[tried.method == "aroma-evidence"].itertuples(), key=lambda run: run.result["held_out_loss"])
    rates = best.trial["training"]
    assert (rates["learning_rate"], rates["head_learning_rate"]) == (0.001, 0.000222)
    *above, below = (100 * difference[f"lora-r{r}"].mean() for r in ahead)
    said = f"it is {min(above):.1f} to {max(above):.1f} points above the ranks up to 8, and {-below:.1f}"
    readme = page_of("../README.md")
    assert f"On MRPC, where learning begins late, {said} below r = 16." in readme


def aims() -> list[list[str]]:
    """Return what the table of the aims says is met and missed, by row."""
    (table,) = re.findall(r"### The aims\n.*?\n(\|.*?)\n\n", PAGE, re.DOTALL)
    return [[cell.strip() for cell in line.strip("|").split("|")[1:]] for line in table.splitlines()[2:]]


def test_the_page_says_of_the_aims_what_the_runs_say() -> None:
    score, average, floor, paper, found, error, longer, nothing, _ = aims()
    nets = ("graded", "noisy", "graded-b4", "noisy-b4", "uniform")
    labels = {task: f"`{task}`" for task in (*nets, "nothing")} | {"minilm": "the encoder"}
    labels |= {"trec": "TREC", "sst2": "SST-2", "bbc-news": "BBC News", "banking77": "BANKING77", "mrpc": "MRPC"}
    grids = {name: runs_of(RESULTS / name) for name in ("planted-nets", "planted-minilm", "minilm-six", "mrpc")}
    rows = pd.concat([make_table(runs, "regret").values for runs in grids.values()])
    rows = rows[rows.method == "aroma-evidence"].set_index("task")
    reported = pd.concat([runs.reported for runs in grids.values()])
    by_seed = reported.pivot_table("score", ["task", "seed"], "method")
    ahead = by_seed.rsub(by_seed["aroma-evidence"], axis=0)
    assert {*by_seed.index.unique("task")} == {*rows.drop("average").index} == {*labels}

    def is_said(row: list[str], task: str, holds: bool) -> None:
        assert [labels[task] in cell for cell in row] == [holds, not holds], task

    for task in labels:
        is_said(score, task, bool(rows.met[task]))
        is_level = bool(ahead["lora-r1"][task].mean() >= -ahead["lora-r1"][task].sem())
        is_said(floor, task, is_level)
        assert is_level or f"{labels[task]} ({in_points(ahead['lora-r1'][task])})" in floor[1]
        if task != "nothing" and task != "minilm":
            is_better = bool(ahead["aroma-paper"][task].mean() > ahead["aroma-paper"][task].sem())
            said = labels[task] if is_better else f"{labels[task]} ({in_points(ahead['aroma-paper'][task])})"
            assert said in paper[not is_better], task
    means = [f"{100 * one.difference:.2f} ± {100 * one.error:.2f}" for one in rows.loc["average"].itertuples()]
    assert by_seed[RANKS].groupby("task").mean().mean().idxmax() == "lora-r8"
    whole = "{:.2f} ± {:.2f}".format(*(100 * one for one in over_tasks(ahead["lora-r8"])))
    assert average[0] == f"nets, {means[0]} above r = 8; all twelve tasks, {whole} above r = 8"
    assert len(labels) == 12
    texts = ["banking77", "bbc-news", "mrpc", "sst2", "trec"]
    best = by_seed.loc[texts, RANKS].groupby("task").mean().mean().idxmax()
    second = "lora-r2"
    (apart, doubt), (gap, its_doubt), *others = (
        over_tasks(ahead[name].loc[texts]) for name in (best, second, *{*RANKS} - {best, second})
    )
    assert apart < -doubt
    assert abs(gap) < its_doubt
    assert all(mean > error for mean, error in others)
    four = f"four texts, {means[1].removeprefix('-')} below r = 16"
    assert average[1] == f"{four}; five texts, {100 * -apart:.2f} ± {100 * doubt:.2f} below r = {best[6:]}"
    below = f"below r = {best[6:]} on the average, level with r = 2, and above the others."
    assert f"With MRPC it is {100 * -apart:.2f} ± {100 * doubt:.2f} {below}" in TEXT
    readme = page_of("../README.md")
    assert f"With MRPC it is {100 * -apart:.1f} {below}" in readme
    ranks = pd.concat([make_table(runs, "ranks").values for runs in grids.values()]).set_index(["method", "task"])
    for task in nets[:4]:
        right = ranks.spearman_mean["aroma-evidence", task]
        is_said(found, task, bool(right >= 0.9))
        assert right >= 0.9 or f"{labels[task]} ({right:.2f})" in found[1]
    labels["minilm"] = "the encoder in 500"
    for task in [*nets, "minilm"]:
        left, of_lora = 1 - rows["mean"][task], lora_error(ranks.score_mean.xs(task, level="task"), rows.trained[task])
        is_said(error, task, left <= of_lora / 2)
        if task != "uniform":
            name = "the encoder" if task == "minilm" else labels[task]
            assert f"{name} {100 * left:.1f} in place of {100 * of_lora:.1f} %" in TEXT
    unexplained = 100 * (1 - ranks.score_mean)
    assert f"In `uniform` r = 2 is planted, and leaves {unexplained['lora-r2', 'uniform']:.1f} %." in TEXT
    by_seed = of_evidence("longer-encoder").pivot_table("score", "seed", "of")
    left = 100 * (1 - by_seed.mean())
    assert "the encoder in 1,500 steps" in error[0], "the test of the encoder in more steps says so"
    said = f"{left['evidence']:.2f} % in place of {left['r = 8']:.2f}"
    assert longer[bool(left["evidence"] > left["r = 8"])] == said
    results = grids["planted-nets"].of("aroma-evidence", task="nothing").result
    grew = [rank > 0 for result in results for rank in result["ranks"].values()]
    assert nothing[0] == f"{sum(grew)} of {len(grew)}"
    assert sum(grew) <= len(grew) / 10
    costs = [
        f"{-100 * ranks.score_mean[method, 'nothing']:.2f}" for method in ("aroma-evidence", "lora-r1", "lora-r8")
    ]
    assert f"That costs {costs[0]} points; LoRA learns noise by heart there, and loses {costs[1]} (r = 1) to" in TEXT
    assert f"to {costs[2]} points (r = 8)." in TEXT


def test_the_page_says_on_how_many_tasks_a_method_is_level_with_the_best_fixed_rank() -> None:
    runs = pd.concat([runs_of(RESULTS / name).reported for name in (*GROWN, "mrpc")])
    by_seed = runs.pivot_table("score", ["task", "seed"], "method")
    size = runs.pivot_table("trained_rank", "task", "method")
    best = {task: by_seed.loc[task, RANKS].mean().idxmax() for task in size.index}

    def is_level(method: str, task: str) -> bool:
        behind = (by_seed[best[task]] - by_seed[method])[task].dropna()
        return bool(behind.mean() <= behind.sem())

    words = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight")
    level = {method: [task for task in best if is_level(method, task)] for method in (*RANKS, "aroma-evidence")}
    r1, r2, r4, r8, r16, grown = (words[len(tasks)] for tasks in level.values())
    assert all(size["aroma-evidence"][task] <= size[best[task]][task] for task in level["aroma-evidence"])
    assert len(best) == 12
    assert r2 == r4
    assert (
        f"Of the twelve tasks, r = 8 is the best of the five, or at most one standard error below it, on {r8}, r = 16 "
        f"on {r16}, r = 2 and 4 on {r2} and r = 1 on {r1}. Evidence is on {grown}, all at no more trained" in TEXT
    )
    readme = page_of("../README.md")
    assert f"below the best of five fixed ranks on {grown}. No fixed rank is on more than {r8}." in readme


def test_the_page_says_of_settings_that_differ_what_the_runs_say() -> None:
    *_, settings = aims()
    for name, scale, unlike in (
        *((name, 2, {}) for name in ("planted-nets", "planted-minilm", "smollm2-news")),
        *((name, 1, {}) for name in ("minilm-six", "mrpc")),
        ("memory", 2, {"growth_share": 0}),
    ):
        for trial in runs_of(RESULTS / name).of("aroma-evidence").trial:
            assert trial["options"] == {"growth": "evidence", "lora_alpha": scale, **unlike}, name
    assert settings == [
        "α, κ, β, S and the length of the trial, on all",
        "the scale s, 1 on real text and 2 elsewhere, as LoRA has it; on pairs to remember nothing is held out",
    ]


def test_the_page_says_of_few_examples_what_the_runs_say() -> None:
    news = of_evidence("bbc-news").groupby("of").score.agg(["mean", "count"])
    assert f"r = 4 had {100 * news['mean']['fewer examples']:.2f} % with a tenth fewer (three seeds," in TEXT
    assert (
        f"training batches of the first pass has {100 * news['mean']['nothing held out']:.2f} % (three seeds)" in TEXT
    )
    assert f"trial kept {100 * news['mean']['all kept']:.2f} % (two)" in TEXT
    assert news["count"].to_dict() == {"fewer examples": 3, "nothing held out": 3, "all kept": 2}


def held_out_losses() -> pd.Series:
    """Return the loss on held-out examples of the reported runs of real text, by method, task and seed."""
    reported = runs_of(RESULTS / "minilm-six").reported
    loss = [result["held_out_loss"] for result in reported.result]
    return reported.assign(loss=loss).set_index(["method", "task", "seed"]).loss.sort_index()


def test_the_page_says_of_trying_and_of_loss_what_the_runs_say() -> None:
    rows = make_table(runs_of(RESULTS / "minilm-six"), "regret").values
    rows = rows[rows.method == "aroma-evidence"].set_index("task")
    said = {
        task: f"{100 * row.chosen_difference:+.2f} ± {100 * row.chosen_error:.2f}".replace("-", "−")
        for task, row in rows.iterrows()
    }
    more = said["average"].removeprefix("−")
    assert f"on held-out examples has {more} more on average, which is level." in TEXT
    assert (
        f"level with them on TREC ({said['trec']}) and BBC News ({said['bbc-news']}), and below on SST-2 "
        f"({said['sst2']}) and BANKING77 ({said['banking77']}); on average {said['average']}." in TEXT
    )
    assert rows.chosen.dropna().to_dict() == {
        "banking77": "lora-r16",
        "sst2": "lora-r16",
        "trec": "lora-r4",
        "bbc-news": "lora-r4",
    }
    losses = held_out_losses()
    average = losses.groupby(["method", "task"]).mean().groupby("method").mean()
    ranks = [16, 8, 1, 4, 2]
    shown = [f"{average[f'lora-r{rank}']:.3f}" for rank in ranks]
    assert (
        f"{average['aroma-evidence']:.3f} on average, where r = 16 has {shown[0]}, r = 8 {shown[1]}, r = 1 {shown[2]}"
        f", r = 4 {shown[3]} and r = 2 {shown[4]}." in TEXT
    )


TASKS = ROOT / "results" / "tasks"


def test_the_page_of_tasks_has_the_table_that_the_example_makes_of_its_runs(tmp_path: Path) -> None:
    for file in TASKS.glob("*.json"):
        shutil.copy(file, tmp_path)
    runpy.run_path(str(ROOT / "examples" / "tasks_in_a_row.py"))["draw"](tmp_path)
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table == (TASKS / "table.md").read_text(encoding="utf-8")
    assert table in (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")


def test_the_page_of_tasks_says_what_its_runs_say() -> None:
    runs = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in TASKS.glob("*.json")}
    grown = [run for name, run in runs.items() if name.startswith("aroma")]
    alone = runs["separate-0"]["after"]
    page = page_of("tasks.md")
    after = pd.DataFrame([run["after"] for run in grown])
    assert f"is {100 * (pd.Series(alone) - after.mean()).mean():.1f} points below that as" in page
    behind = sorted(100 * (alone["sst2"] - after.sst2))
    kept = sorted(sum(run["ranks"]["sst2"]) for run in grown)
    assert f"{behind[0]:.1f} to {behind[-1]:.1f} points below, with {kept[0]} to {kept[-1]} components in 36" in page

    def forgotten(method: str) -> str:
        several = [run for name, run in runs.items() if name.startswith(method)]
        lost = [run["after"][task] - run["final"][task] for run in several for task in run["after"]]
        return f"{100 * sum(lost) / len(lost):.0f}"

    taken = [forgotten(method) for method in ("aroma", "o-lora", "sequential")]
    assert f"take {taken[0]} points off, {taken[1]} off O-LoRA, and {taken[2]} off the one LoRA that goes on." in page


@pytest.mark.shared
def test_the_example_of_tasks_does_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "tasks_in_a_row.py"))["main"]
    grid = (ROOT / "examples" / "lab" / "minilm-six.yaml").read_text(encoding="utf-8")
    tiny = grid.replace("max_length: 64", "max_length: 32").replace("model: minilm", f"model: {tmp_path / 'model'}")
    (tmp_path / "tiny.yaml").write_text(tiny, encoding="utf-8")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(**sizes, max_position_embeddings=32)).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(packaged_encoder()).save_pretrained(tmp_path / "model")
    monkeypatch.setitem(main.__globals__, "GRID", tmp_path / "tiny.yaml")
    monkeypatch.setitem(main.__globals__, "ORDERS", (("trec", "banking77"),))
    out = tmp_path / "out"
    words = [str(out), "--data", str(ROOT.parent / "shared" / "data"), "--steps", "40", "--examples", "60"]
    monkeypatch.setattr("sys.argv", ["tasks_in_a_row.py", *words, "--methods", "aroma", "o-lora"])
    with pytest.warns(UserWarning, match="examples are trained on, too"):  # TREC has some questions twice
        main()
    for method in ("aroma", "o-lora"):
        told = json.loads((out / f"{method}-0.json").read_text())
        assert {*told["after"]} == {*told["final"]} == {*told["ranks"]} == {"trec", "banking77"}
        assert told["final"]["banking77"] == told["after"]["banking77"], "nothing was learnt after the last task"
        assert {len(ranks) for ranks in told["ranks"].values()} == {12}
        assert "git_revision" in told
    assert {file.name for file in out.iterdir()} == {"aroma-0.json", "o-lora-0.json", "table.md", "ranks.png"}
    before = (out / "aroma-0.json").stat().st_mtime_ns
    main()
    assert (out / "aroma-0.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("line", "grid", "task"),
    [
        ("nets with planted ranks, explained", "planted-nets", "graded"),
        ("the same with noise", "planted-nets", "noisy"),
        ("the first in batches of 4, not 16", "planted-nets", "graded-b4"),
        ("the second in batches of 4", "planted-nets", "noisy-b4"),
        ("rank 2 in every matrix", "planted-nets", "uniform"),
        ("an encoder with planted updates", "planted-minilm", "minilm"),
        ("TREC, accuracy", "minilm-six", "trec"),
        ("BANKING77, accuracy", "minilm-six", "banking77"),
        ("SST-2, accuracy", "minilm-six", "sst2"),
        ("BBC News, accuracy", "minilm-six", "bbc-news"),
        ("the average of these four", "minilm-six", "average"),
    ],
)
def test_the_readme_says_what_the_runs_say(line: str, grid: str, task: str) -> None:
    rows = make_table(runs_of(RESULTS / grid), "regret").values
    row = rows[(rows.task == task) & (rows.method == "aroma-evidence")].iloc[0]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("**", "")
    rank = row.best.removeprefix("lora-r")
    assert (
        f"| {line} | {100 * row['mean']:.1f} % at {row.trained:.1f} | {100 * row.best_mean:.1f} % at r = {rank} |"
        in readme
    )
