"""docs/tried.md says of what was tried what its runs in results/lab/tried/ say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

import pandas as pd
import pytest

from aroma import AromaConfig
from aroma.algorithm.budget import HELD_OUT_INTERVAL
from aroma_lab.report.formats import signed_points
from published import (
    RESULTS,
    SHIPPED,
    at_half_the_length,
    each_seed_of,
    gained,
    grown,
    in_points,
    not_again,
    not_doubted,
    not_early,
    not_so_small,
    not_squeezed,
    not_undecided,
    of_evidence,
    over_tasks,
    page_of,
    runs_of,
    runs_of_images,
    scores_of,
    with_eight_slots,
    with_short_memory,
    with_short_rows,
    with_sixteen_questions,
    without_floor,
)

TEXT = page_of("tried.md")

LABELS = {
    "graded": "`graded`",
    "noisy": "`noisy`",
    "graded-b4": "`graded-b4`",
    "noisy-b4": "`noisy-b4`",
    "uniform": "`uniform`",
    "trec": "TREC",
    "banking77": "BANKING77",
    "sst2": "SST-2",
    "bbc-news": "BBC News",
    "mrpc": "MRPC",
    "minilm": "the encoder",
}
PAIRS = {f"n{pairs}": f"{pairs:,} pairs" for pairs in (100, 300, 1000, 3000, 10000)}

ALONE = ("noisy", "noisy-b4", "graded-b4")
NETS = ("graded", "noisy", "graded-b4", "noisy-b4", "uniform")
FEW = ("graded-b4", "noisy-b4")
FOUND = ("graded", "noisy", *FEW, "minilm")
TEXTS = ("trec", "banking77", "sst2", "bbc-news", "mrpc")


def compared(task: str, before: pd.DataFrame, after: pd.DataFrame) -> str:
    """Return the line of a table of the page: scores, their paired difference, and trained ranks by two rules."""
    old, new = before.loc[task], after.loc[task]
    scores = " | ".join(f"{100 * runs.score.mean():.2f}" for runs in (old, new))
    ranks = " | ".join(f"{runs.trained_rank.mean():.2f}" for runs in (old, new))
    return f"| {(LABELS | PAIRS)[task]} | {scores} | {in_points(new.score - old.score)} | {ranks} |"


def test_the_page_says_what_the_test_of_a_whole_update_brought() -> None:
    now, before = scores_of(SHIPPED), scores_of("shorter-starts")
    assert f"SST-2 {now.sst2:.2f} instead of {before.sst2:.2f} ({gained('sst2', 'shorter-starts')})" in TEXT
    assert f"`noisy` {now.noisy:.1f} % instead of {before.noisy:.1f} % ({gained('noisy', 'shorter-starts')})" in TEXT
    assert f"`graded` loses {gained('graded', 'longer-starts').removeprefix('−')}" in TEXT
    trec = f"TREC {gained('trec', 'longer-starts')} (at a head rate of 0.002, not 0.006)"
    assert f"{trec}, BANKING77 {gained('banking77', 'longer-starts')}" in TEXT
    assert f"nothing is planted, {grown(SHIPPED)} of 60 matrices" in TEXT
    assert f"they cost 0.{gained('graded', SHIPPED, 'no-cut-off').partition('.')[2]}" in TEXT
    assert of_evidence("no-cut-off").groupby("task").seed.count().to_dict() == {"graded": 4, "sst2": 2}


def test_the_page_says_of_what_was_tried_what_the_runs_say() -> None:
    for name in ("longer-starts", "single-directions", "benjamini-hochberg"):
        assert set(of_evidence(name).groupby("task").seed.count()) == {5}
    before, single, pooled = map(scores_of, ("longer-starts", "single-directions", "benjamini-hochberg"))
    assert f"{grown('single-directions')} of 60 matrices grow instead of {grown('longer-starts')}" in TEXT
    assert f"`noisy` it explains {single.noisy:.1f} % ({before.noisy:.1f} %)" in TEXT
    rank = of_evidence("single-directions").groupby("task").trained_rank.mean()
    assert (
        f"TREC has {single.trec:.2f} ({before.trec:.2f}, at a head rate of 0.006, not 0.002) at {rank.trec:.2f} "
        in TEXT
    )
    assert f"BANKING77 {single.banking77:.2f} ({before.banking77:.2f}) at {rank.banking77:.2f}" in TEXT
    assert (
        f"{grown('benjamini-hochberg')} of 60 matrices grow, `noisy` {pooled.noisy:.1f} %, TREC {pooled.trec:.2f}"
        in TEXT
    )


def test_the_page_says_of_smaller_updates_what_the_runs_say() -> None:
    ranks = {name: of_evidence(name).groupby("task").trained_rank.mean() for name in ("four-slots", "less-credit")}
    for name, task, label in (
        ("four-slots", "trec", "TREC"),
        ("four-slots", "banking77", "BANKING77"),
        ("four-slots", "sst2", "SST-2"),
        ("less-credit", "trec", "TREC"),
        ("less-credit", "banking77", "BANKING77"),
    ):
        assert of_evidence(name).groupby("task").seed.count()[task] == 3
        assert f"{label} {gained(task, SHIPPED, name)} at {ranks[name][task]:.2f}" in TEXT, name
    assert f"SST-2 {gained('sst2', SHIPPED, 'half-the-trial')} (two seeds)" in TEXT
    assert f"SST-2 {gained('sst2', SHIPPED, 'fitted-averages')}, three seeds" in TEXT
    assert f"SST-2 {gained('sst2', SHIPPED, 'balanced-split')}, three seeds" in TEXT


def test_the_page_says_of_moves_what_the_runs_say() -> None:
    tasks = json.loads((RESULTS / "tried" / "moves.json").read_text(encoding="utf-8"))["tasks"]
    first = {task: int(100 * found["downhill"][0]["downhill"]) for task, found in tasks.items()}
    assert f"On TREC it does on {first['trec']} % of the 32 batches" in TEXT
    assert f"on BANKING77 on {first['banking77']} %" in TEXT
    assert all(abs(found["downhill"][-1]["downhill"] - 0.5) < 0.05 for found in tasks.values())
    (trec, trec_end), (banking, banking_end) = (
        (dict(tasks[task]["loss"])[40], dict(tasks[task]["loss"])[320]) for task in ("trec", "banking77")
    )
    assert f"falls from {trec:.2f} to {trec_end:.2f}, and from {banking:.2f} to {banking_end:.2f}." in TEXT


def test_the_page_says_of_shorter_starts_what_the_runs_say() -> None:
    tried = json.loads((RESULTS / "tried" / "shorter-starts.json").read_text(encoding="utf-8"))
    now, before = scores_of("shorter-starts"), scores_of("longer-starts")
    seeds = of_evidence("shorter-starts").groupby("task").seed.count()
    assert seeds[["noisy", "nothing", "sst2"]].tolist() == [5, 5, 5]
    assert f"SST-2 {now.sst2:.2f} (before {before.sst2:.2f})" in TEXT
    assert f"`noisy` {now.noisy:.1f} % ({before.noisy:.1f} %)" in TEXT
    assert f"nothing is planted {grown('shorter-starts')} of 60 matrices have a component" in TEXT
    assert f"(at a rate of 0.01; before {grown('longer-starts')}, at 0.0005)" in TEXT
    old, new, *_ = tried["loss saved on held-out batches by the trial's updates"].values()
    worst, best = (pick(one["saved"] for one in old) for pick in (min, max))
    assert f"between {-worst:.2f} higher and {best:.2f} lower" in TEXT
    assert f"now it is {min(one['saved'] for one in new):.2f} to {max(one['saved'] for one in new):.2f} lower" in TEXT
    assert [len(old), len(new)] == [4, 5]


def test_the_page_says_of_the_mean_of_the_trial_what_the_runs_say() -> None:
    tried = of_evidence("mean-of-the-trial")
    shipped = with_sixteen_questions()
    whole = tried[tried["of"] == "mean, a sixteenth, 32 questions"].set_index(["task", "seed"])
    complete = [task for task, runs in whole.groupby("task") if len(runs) == 5 and task != "nothing"]
    assert {*complete} == {*LABELS} - {"mrpc", "minilm"}
    assert {*whole.loc["bbc-news"].learning_rate} == {0.01}
    for task in complete:
        assert compared(task, shipped, whole) in TEXT

    def found(runs: pd.DataFrame) -> float:
        return sum(map(sum, runs.loc["uniform"].ranks)) / 60

    assert f"ends with {found(whole):.2f} components where 2 are planted, not {found(shipped):.2f})" in TEXT
    of_rates = [
        json.loads((RESULTS / "tried" / f"{name}.json").read_text(encoding="utf-8"))["choosing"]["graded-b4"]
        for name in ("mean-of-the-trial", "sixteen-questions")
    ]
    at = [{values["training.learning_rate"]: score for values, score in found} for found in of_rates]
    assert f"at 0.03 `graded-b4` explains {100 * at[0][0.03]:.1f} % in place of nothing at all" in TEXT
    assert at[1][0.03] < 0
    scores = 100 * tried.groupby(["of", "task", "method"]).score.mean()
    kept, ninety, eighth, sixteenth = (
        scores[f"mean, {of}"].xs("aroma-evidence", level="method")
        for of in ("99 %", "90 %", "an eighth", "a sixteenth")
    )
    assert f"99 % of the credit explain {kept.graded:.1f} % of `graded` and {kept.noisy:.1f} % of `noisy`" in TEXT
    assert f"TREC {kept.trec:.1f}. 90 %: {ninety.graded:.1f} %, {ninety.noisy:.1f} %, TREC {ninety.trec:.1f}" in TEXT
    assert f"SST-2 {ninety.sst2:.1f}. An eighth: {eighth.graded:.1f} %, {eighth.noisy:.1f} %" in TEXT
    assert f"TREC {eighth.trec:.1f}. A sixteenth: {sixteenth.graded:.1f} %, {sixteenth.noisy:.1f} %" in TEXT
    assert f"TREC {sixteenth.trec:.1f}. Where every matrix needs rank 8" in TEXT
    more = tried[tried["of"] == "mean, an eighth, 37 questions"].groupby("task")[["score", "trained_rank"]].mean()
    assert (
        f"{100 * more.score['graded-b4']:.2f} % of `graded-b4` at {more.trained_rank['graded-b4']:.2f} trained "
        f"components, and {100 * more.score['noisy-b4']:.2f} % of `noisy-b4`" in TEXT
    )
    flat = scores.xs("flat8", level="task")
    one, other = (flat[f"mean, {of}", "aroma-evidence"] for of in ("an eighth", "a sixteenth"))
    old, lora = (flat["before the mean", method] for method in ("aroma-evidence", "lora-r8"))
    assert (
        f"an eighth explains {one:.1f} %, a sixteenth {other:.1f} %, the shipped rule {old:.1f} % (one seed)" in TEXT
    )
    assert f"LoRA r = 8 {lora:.1f} %." in TEXT


def test_the_page_says_of_more_questions_what_the_runs_say() -> None:
    then = of_evidence("sixteen-questions").set_index(["task", "seed"])
    now = without_floor()
    tasks = [task for task in LABELS if task in then.index]
    assert {*tasks} == {"graded", "noisy", "graded-b4", "noisy-b4", "uniform", "bbc-news"}
    for task in tasks:
        assert len(then.loc[task]) == len(now.loc[task]) == 5
        assert compared(task, then, now) in TEXT


def test_the_page_says_of_a_review_what_the_runs_say() -> None:
    tried = of_evidence("review")
    before = with_sixteen_questions()

    def gains(of: str) -> pd.DataFrame:
        runs = tried[tried["of"] == of].set_index(["task", "seed"])
        gain, fewer = runs.score - before.score, before.trained_rank - runs.trained_rank
        return pd.DataFrame({"gain": gain, "fewer": fewer}).dropna()

    def said(of: str, task: str) -> str:
        return in_points(gains(of).gain[task])

    review, fewer = gains("costs loss"), gains("costs loss").fewer.astype(float).groupby("task").mean()
    assert review.groupby("task").gain.count()[["graded", "noisy", "nothing"]].tolist() == [5, 5, 5]
    assert f"`graded` {said('costs loss', 'graded')}, `noisy` {said('costs loss', 'noisy')}" in TEXT
    grew = tried[(tried["of"] == "costs loss") & (tried.task == "nothing")].grew.sum()
    assert f"where nothing is planted {grew:.0f} of 60 matrices grow" in TEXT
    for task, label in (("trec", "TREC"), ("banking77", "BANKING77"), ("sst2", "SST-2")):
        assert review.gain[task].count() == 3
        assert f"{label} {said('costs loss', task)}" in TEXT
    assert f"with {fewer.trec:.2f}, {fewer.banking77:.2f} and {fewer.sst2:.2f} fewer" in TEXT
    assert f"as at the end of the trial, TREC {said('again', 'trec')}" in TEXT
    assert f"`graded` {said('two looks', 'graded')}" in TEXT
    found = gains("two looks").gain["sst2"]
    assert f"SST-2 {signed_points(found[0])} and {signed_points(found[1])} (one seed each)" in TEXT
    assert all(
        run["of"] != "two looks" or run["grew"] == 0 for run in tried.to_dict("records") if run["task"] == "nothing"
    )


def test_the_page_says_of_scaled_updates_what_the_runs_say() -> None:
    tried = of_evidence("scaled-updates")
    planted = 100 * tried[tried.task == "minilm"].set_index("of").score
    assert f"{planted['scaled']:.2f} % is explained in place of {planted['short rows']:.2f} % (one seed" in TEXT
    before = with_sixteen_questions().score

    def gain(task: str, rate: float) -> str:
        runs = tried[(tried["of"] == "scaled") & (tried.learning_rate == rate) & (tried.task == task)]
        return in_points(runs.set_index(["task", "seed"]).score - before)

    assert f"at 0.02 `graded` {gain('graded', 0.02)} and `noisy` {gain('noisy', 0.02)} (two seeds)" in TEXT
    assert f"`noisy` {gain('noisy', 0.01)} and {gain('noisy', 0.03)}." in TEXT
    assert f"SST-2 {gain('sst2', 0.003)}, TREC {gain('trec', 0.003)} (three seeds)" in TEXT
    assert f"BBC News {gain('bbc-news', 0.003)} (two)" in TEXT

    rows = tried[tried["of"] == "slow rows"].set_index(["task", "seed"])
    gains = {task: in_points(runs.score - before) for task, runs in rows.groupby("task")}
    assert (
        f"TREC {gains['trec']}, BBC News {gains['bbc-news']}, SST-2 {gains['sst2']}, BANKING77 {gains['banking77']}."
        in TEXT
    )
    lora = runs_of(RESULTS / "planted-minilm").of("lora-r8")
    two_seeds = without_floor().loc["minilm"].loc[:1]
    slow = rows.groupby("task")[["score", "trained_rank"]].mean()
    assert f"{100 * slow.score.minilm:.2f} % at {slow.trained_rank.minilm:.2f} trained components (two seeds" in TEXT
    assert f"{100 * two_seeds.score.mean():.2f} % at {two_seeds.trained_rank.mean():.2f} there" in TEXT
    assert f"LoRA r = 8 {100 * lora[lora.seed < 2].score.mean():.2f} %" in TEXT
    few = [f"{100 * slow.score[task]:.2f} % of `{task}`" for task in ("graded-b4", "noisy-b4")]
    assert f"at 0.01, {few[0]} and {few[1]} (two seeds)" in TEXT


def with_the_table(tried: pd.DataFrame) -> pd.DataFrame:
    """Return runs by task and seed; beside each are score, trained rank and rank correlation without the floor."""
    table = without_floor()[["score", "trained_rank", "spearman"]]
    return tried.set_index(["task", "seed"]).join(table, rsuffix="_of_table")


def said(scores: pd.Series) -> str:
    return " and ".join(", ".join(f"{100 * score:.1f}" for score in scores).rsplit(", ", 1))


def above_the_table(runs: pd.DataFrame) -> str:
    return in_points(runs.score - runs.score_of_table)


def test_the_page_says_of_a_trial_that_goes_on_what_the_runs_say() -> None:
    tried = of_evidence("trial-that-goes-on")
    mrpc = tried[tried.task == "mrpc"]
    assert {*mrpc.learning_rate} == {0.001}
    late, shipped = (mrpc[mrpc["of"] == name].sort_values("seed") for name in ("doubled", "shipped"))
    assert [*late.seed] == [*shipped.seed] == [0, 1, 2]
    right = f"{said(late.score)} % of the test set are right after that"
    assert f"{right}, and {said(shipped.score)} % by the shipped rule" in TEXT
    left = sorted(map(sum, shipped.ranks))
    assert f"{left[0]} to {left[-1]} components are left" in TEXT
    beside = with_the_table(tried[tried["of"] == "doubled"])
    assert f"it takes away {above_the_table(beside.loc['bbc-news']).removeprefix('−')} (five seeds)" in TEXT
    assert f"SST-2 {above_the_table(beside.loc['sst2'])} (two seeds)" in TEXT
    assert f"`noisy-b4` they decide, too: {above_the_table(beside.loc['noisy-b4'])} (three seeds)" in TEXT
    seeds = beside.groupby("task").score.count()
    assert seeds[["bbc-news", "nothing", "noisy-b4", "sst2"]].tolist() == [5, 5, 3, 2]
    grew = sum(rank > 0 for ranks in beside.loc["nothing"].ranks for rank in ranks)
    assert f"{grew} of 60 matrices have a component, as before" in TEXT


def the_rule() -> pd.DataFrame:
    """Return runs by task and seed, by the rule as it is; spearman and grew as `with_short_rows`.

    Those of nets, the encoder and MRPC are of the tables, those of other text at the rates of the tables before.
    """
    runs = pd.concat(
        [runs_of(RESULTS / grid).of("aroma-evidence") for grid in ("planted-nets", "planted-minilm", "mrpc")]
    )
    spearman = [(result.get("planted") or {}).get("spearman") for result in runs.result]
    grew = [sum(rank > 0 for rank in result["ranks"].values()) for result in runs.result]
    tables = runs.assign(spearman=spearman, grew=grew).set_index(["task", "seed"])
    return pd.concat([tables, at_half_the_length().loc["aroma-evidence"]]).sort_index()


def squeezed_once() -> pd.DataFrame:
    """Return what `the_rule` does, of the rule before it squeezed early, as it may on nets; images have parameters."""
    columns = ["score", "trained_rank", "average_rank", "spearman", "grew"]
    then = not_doubted()[columns[:3]]
    others = the_rule().drop([*NETS, "nothing", *then.index.unique("task")])[columns]
    return pd.concat([others, then, not_early()]).sort_index()


def asked_again() -> pd.DataFrame:
    """Return the runs of the tables, those of the encoder with eight slots: nothing merges in the others."""
    others = not_squeezed().drop("minilm")
    assert others.most.max() <= 8
    return pd.concat([others, with_eight_slots().loc[["minilm"]]]).sort_index()


@pytest.mark.parametrize(
    ("before", "now", "seeds"),
    [
        (not_again, asked_again, {"mrpc": 10}),
        (with_short_rows, not_again, {"minilm": 3}),
        (with_short_memory, with_short_rows, {"minilm": 3}),
    ],
)
def test_the_page_says_of_a_change_with_rates_of_its_own_what_the_runs_say(
    before: Callable[[], pd.DataFrame], now: Callable[[], pd.DataFrame], seeds: dict[str, int]
) -> None:
    """`seeds`: of how many a task has, where those are not five."""
    old, every = before(), now()
    new = every[every.index.isin(old.index)]  # later tables have more seeds of some tasks
    for task in LABELS:
        assert len(new.loc[task]) == len(old.loc[task]) == seeds.get(task, 5)
        assert compared(task, old, new) in TEXT
    was, found = (runs.spearman.astype(float).groupby("task").mean() for runs in (old, new))
    ranks = [f"{found[task]:.2f} on `{task}`, in place of {was[task]:.2f}" for task in FEW]
    assert f"Rank correlations are {ranks[0]}, and {ranks[1]}" in TEXT


IMAGES = {"digits": "digits", "mnist": "MNIST"}


def ends(task: str, before: pd.DataFrame, after: pd.DataFrame) -> str:
    """Return the line of a table of the page: components at the end and rank correlations by two rules."""
    columns = ("average_rank", "spearman") if task in FOUND else ("average_rank",)
    means = [f"{runs[of][task].astype(float).mean():.2f}" for of in columns for runs in (before, after)]
    row = " | ".join([*means, "", ""][:4])
    return " ".join(f"| {LABELS[task]} | {row} |".split())


def assert_it_compares(tasks: Iterable[str], before: pd.DataFrame, now: pd.DataFrame) -> None:
    """Hold both tables of a section, and what grows where nothing is planted, to the runs by two rules."""
    for task in tasks:
        assert compared(task, before, now) in TEXT
        assert ends(task, before, now) in TEXT
    grew, grew_before = (int(runs.grew["nothing"].sum()) for runs in (now, before))
    assert f"nothing is planted {grew} of 60 matrices have a component, in place of {grew_before}." in TEXT


def images(before: pd.DataFrame, after: pd.DataFrame) -> str:
    """Return what the page says of the two data sets of images by two rules."""
    said = []
    for name, label in IMAGES.items():
        old, new = before.loc[name], after.loc[name]
        smaller = 100 * new.parameters.mean() / old.parameters.mean()
        said.append(f"{label} {in_points(new.score - old.score)} points at {smaller:.0f} % of the parameters")
    return ", ".join(said)


def of_variant(of: str, *tasks: str) -> str:
    """Return what the page says of another way to let stay what is undecided: its difference to the rule before."""
    gain = (each_seed_of("not-undecided").score[of] - not_undecided().score).dropna()
    return ", ".join(f"{LABELS[task]} {in_points(gain[task])}" for task in tasks)


def test_the_page_says_of_what_is_undecided_what_the_runs_say() -> None:
    assert_it_compares(NETS, not_undecided(), not_so_small())
    tried = each_seed_of("not-undecided").loc["now"]
    assert f"nothing is gained: {images(not_undecided(), tried)}." in TEXT
    long = of_evidence("longer-encoder").groupby("of")[["score", "trained_rank"]].mean()
    old, new = (long.loc[of] for of in ("evidence, nothing undecided stays", "evidence, nothing small goes early"))
    assert f"in 1,500 steps leaves {100 - 100 * new.score:.2f} % in place of {100 - 100 * old.score:.2f} %" in TEXT
    assert f"at {new.trained_rank:.2f} trained components in place of {old.trained_rank:.2f}" in TEXT


def test_the_page_says_of_ten_splits_of_images_what_the_runs_say() -> None:
    tried = each_seed_of("not-undecided")
    r8 = each_seed_of("not-so-small").score["LoRA r=8"]
    for name, label in IMAGES.items():
        before, every = tried.loc["before", f"{name}, ten splits"], not_so_small().loc[name]
        assert [*every.index] == [*r8[name].index] == [*before.index, *range(10, 20)]
        now, others = every.loc[:9], every.loc[10:]
        old, new = (in_points(runs.score - r8[name]) for runs in (before, now))
        assert (
            f"{in_points(others.score - r8[name])}{' points on digits' if name == 'digits' else ' on MNIST'}" in TEXT
        )
        assert (
            f"{label} {new} points against r = 8, in place of {old}, at rank {now.average_rank.mean():.2f} in place "
            f"of {before.average_rank.mean():.2f}" in TEXT
        )
    for of, said in (
        ("all stay", "With all eight it was {} on digits."),
        ("what is small goes early, too", "where updates save loss, too, it is {} there."),
    ):
        assert said.format(in_points(tried.score[of, "digits, ten splits"] - r8["digits"])) in TEXT


def test_the_page_says_of_other_ways_to_keep_what_is_undecided_what_the_runs_say() -> None:
    small = "only what is small goes early"
    assert f"All stay, and {small}: {of_variant('all stay', *NETS)}" in TEXT
    said = of_variant(f"in every matrix, and {small}", "graded", "noisy", *FEW)
    assert f"What costs no loss stays in every matrix, and {small}: {said}" in TEXT
    said = of_variant("in every matrix", "noisy", *FEW)
    assert f"It stays in every matrix, and what does not save loss goes early: {said}" in TEXT
    said = of_variant("in every matrix, after a quarter", "noisy", *FEW)
    assert f"after a quarter of growth in place of two fifths: {said}" in TEXT
    said = of_variant("what may save a quarter of the average", "noisy", *FEW)
    assert f"goes early: {said} (five seeds)" in TEXT


def between(numbers: pd.Series) -> str:
    """Return the least and the largest of numbers, as the page has them."""
    return f"{numbers.min():.1f} to {numbers.max():.1f}".replace("-", "−")


def test_the_page_says_of_what_is_known_when_the_trial_ends_what_the_runs_say() -> None:
    found = of_evidence("nothing-is-known")
    t = found[found.at_zero.notna()].set_index("task")
    at_zero = t.at_zero.astype(float)
    known = between(at_zero.drop(["mrpc", "nothing"]))
    assert f"at 0 it is {between(at_zero['mrpc'])} in {len(at_zero['mrpc'])} runs." in TEXT
    assert f"On four other texts, nets and the encoder it is {known}, and where nothing is planted" in TEXT
    nothing = f"planted {between(at_zero['nothing'])}, with {between(t.at_half['nothing'])} at ½."
    assert nothing in TEXT


def test_the_page_says_of_what_stays_where_nothing_is_known_what_the_runs_say() -> None:
    before, now = not_doubted(), the_rule()
    for task in ("mrpc", "trec", "sst2", "bbc-news"):
        assert compared(task, before, now) in TEXT
    found = of_evidence("nothing-is-known")
    runs = found[found.score.notna()].set_index(["of", "task", "learning_rate", "head_learning_rate", "seed"])
    same = runs.score["before, at the same rates", "mrpc", 0.001]
    eight = in_points(runs.score["all stay", "mrpc", 0.001, 0.000667] - same[0.000667])
    assert f"with all eight components it has {eight} points (five seeds, at rates of 0.001 and 0.000667)" in TEXT
    gain = now.score["mrpc"] - same[0.000222]
    assert (
        f"At the same rates MRPC has {in_points(gain)} points (ten seeds, of which three differ, by "
        f"{in_points(gain[gain.abs() > 1e-5])})" in TEXT
    )
    assert f"the rule before has {100 * same[0.000222].mean():.2f} % there" in TEXT
    losses = of_evidence("again-on-mrpc")
    for of in ("before", "now"):
        runs_of_three = losses[losses["of"] == of]
        means = runs_of_three.groupby(["learning_rate", "head_learning_rate"]).held_out_loss.agg(["first", "mean"])
        assert means["mean"].idxmin() == (0.001, 0.000222)
        assert (means["first"].idxmin() == (0.003, 0.000667)) == (of == "before")
    texts = now.score[["trec", "sst2", "bbc-news"]] - before.score
    asked = [("bbc-news", 2), ("bbc-news", 3), ("bbc-news", 4), ("sst2", 1), ("trec", 1)]
    assert {*texts.index[texts.abs() > 1e-6]} <= {*asked}
    assert len(texts.dropna()) == 15
    assert f"differ from what they were, by {in_points(texts[asked])}, as fewer batches are left" in TEXT
    assert f"it had {-100 * texts['sst2', 1]:.2f} points less than without" in page_of("results.md")


def test_the_page_says_of_other_ways_where_nothing_is_known_what_the_runs_say() -> None:
    found = of_evidence("nothing-is-known")
    runs = found[found.score.notna()].set_index(["of", "task", "learning_rate", "head_learning_rate", "seed"])
    score, form = runs.score, "undecided in every matrix"
    same = score["before, at the same rates", "mrpc", 0.001]
    gain = in_points(score[form, "mrpc", 0.001, 0.000667] - same[0.000667])
    assert f"not asked: MRPC has {gain} points at the same rates (five seeds, 0.001 and 0.000667)" in TEXT
    others = runs.loc[form].drop("mrpc").droplevel(["learning_rate", "head_learning_rate"])
    before = not_doubted().loc[others.index]
    assert len(others) == 5
    assert (
        f"they have {in_points(others.score - before.score)}, at {others.trained_rank.mean():.2f} trained components "
        f"in place of {before.trained_rank.mean():.2f}." in TEXT
    )
    not_half = score["not where half is judged", "mrpc", 0.001, 0.000222]
    gains = (not_half - same[0.000222]).dropna()
    assert sorted(gains.abs() < 1e-5) == [False, True, True]
    of_rl = [json.loads((RESULTS.parent / "rl" / f"aroma-{seed}.json").read_text())["after"] for seed in range(3)]
    rewards = [*found[found["of"] == "also where nothing is held out"].score]
    assert [new == pytest.approx(old) for new, old in zip(rewards, of_rl, strict=True)] == [False, True, True]
    assert f"it is right on {100 * rewards[0]:.1f} % of new sums, in place of {100 * of_rl[0]:.1f}." in TEXT
    nothing = found[found["of"] == "nothing planted, at lower rates"].groupby("learning_rate").grew.sum()
    assert f"{nothing[0.001]:.0f} and {nothing[0.003]:.0f} of 36 matrices have a component at the end" in TEXT


def test_the_page_says_of_an_early_squeeze_what_the_runs_say() -> None:
    now, before = not_undecided(), not_early()
    assert_it_compares(NETS, before, now)
    assert f"Images: {images(before, now)}." in TEXT
    tried = each_seed_of("not-early")
    said = []
    for of, name in (("squeezed early alone", "early squeeze alone brings"), ("shortened alone", "shorter end alone")):
        gains = [f"{LABELS[task]} {in_points(tried.score[of, task] - before.score[task])}" for task in ALONE]
        said.append(f"the {name} {', '.join(gains[:-1])} and {gains[-1]}")
    assert f"{said[0].capitalize()[:3]}{said[0][3:]}; {said[1]}." in TEXT
    t = tried.loc["t of all updates halfway"].t.astype(float)
    noise, pictures, graded = (
        f"{t[[*tasks]].min():.1f} to {t[[*tasks]].max():.1f}".replace("-", "−")
        for tasks in (("noisy", "noisy-b4"), IMAGES, ("graded-b4",))
    )
    assert f"with t of {noise}, and not surely on images, where t is {pictures}, nor on `graded-b4` ({graded};" in TEXT
    assert t[["noisy", "noisy-b4"]].max() < -1.86 < t[[*IMAGES, "graded-b4"]].min(), "Student's t at α, 9 batches"


def test_the_page_says_of_the_last_squeeze_what_the_runs_say() -> None:
    now, before = squeezed_once(), not_squeezed()
    assert_it_compares((*NETS, "minilm", *TEXTS), before, now)
    assert images(before, now) in TEXT
    other = each_seed_of("not-squeezed").loc["up to a standard error"].score
    gains = {task: in_points(other[task] - before.score[task]) for task in other.index.unique("task")}
    said = [f"{(LABELS | IMAGES)[task]} {gains[task]}" for task in ("trec", "banking77", "sst2", "bbc-news")]
    assert f"On text that had {', '.join(said[:-1])} and {said[-1]};" in TEXT
    assert f"on digits {gains['digits']} and on MNIST {gains['mnist']} (three seeds)." in TEXT


def halfway(of: str) -> list[str]:
    """Return what the page says of a way to squeeze earlier, too, by task: its difference to the rule as it is."""
    score = each_seed_of("halfway").loc[of].score
    found = (score - squeezed_once().score).dropna()
    return [f"{LABELS[task]} {in_points(found[task])}" for task in ("graded-b4", "noisy", "noisy-b4") if task in found]


def test_the_page_says_of_a_squeeze_halfway_what_the_runs_say() -> None:
    now, tried = squeezed_once(), each_seed_of("halfway").loc["halfway"]
    for task in NETS:
        assert compared(task, now, tried) in TEXT
        assert ends(task, now, tried) in TEXT
    assert images(now, tried) in TEXT
    for of, said in (
        ("after 0.3 and 0.6 of the run", "After 0.3 and 0.6 of the run in place of 0.5:"),
        ("after 0.5 and 0.7 of the run", "After 0.5 and 0.7:"),
    ):
        first, second, third = halfway(of)
        assert f"{said} {first}, {second} and {third}" in TEXT
    first, second = halfway("a third of what is left each time")
    assert f"A third of what is left each time, not a sixth: {first}, {second}." in TEXT


def test_the_page_says_of_quarters_of_a_batch_what_the_runs_say() -> None:
    now, tried = squeezed_once(), each_seed_of("quarters-of-a-batch")
    nets = tried.loc["quarters"]
    gain = {task: in_points(nets.score[task] - now.score[task]) for task in ("graded", "noisy", "uniform")}
    gains = [f"{LABELS[task]} {found}" for task, found in gain.items()]
    assert {*nets.drop("minilm, 1,500 steps").groupby("task").score.count()} == {5}
    grew = int(nets.grew["nothing"].sum())
    assert grew == int(now.grew["nothing"].sum())
    assert f"five seeds: {', '.join(gains)}, and where nothing is planted {grew} of 60" in TEXT
    long = {of: tried.loc[of, "minilm, 1,500 steps", 4] for of in ("quarters", "as it is")}
    born = " in place of ".join(f"{run.births:.0f}" for run in long.values())
    left = " in place of ".join(f"{100 * (1 - run.score):.2f} %" for run in long.values())
    assert f"one seed at 0.003, {born.replace(' in', ' are born in')}, and it leaves {left}." in TEXT


SHOWN = ("minilm", "n1000", "n3000")
MERGES = {
    "as it was": "eight slots: the oldest merges",
    "the smallest merges": "the smallest merges",
    "the smallest of the older half merges": "the smallest of the older half merges",
    "the oldest merges at its average": "the oldest merges, at its average over 32 steps",
    "full, as steep as what trains": "in a full matrix what is born is as steep as what trains",
    "full, twice as steep": "twice as steep",
    "full, four times as steep": "four times as steep",
    "nothing is born in a full matrix": "nothing is born in a full matrix",
    "16 slots": "sixteen slots: the oldest merges",
    "16 slots, nothing is born in a full matrix": "nothing is born in a full matrix",
    "32 slots": "thirty-two slots: the oldest merges",
}


def test_the_page_says_of_sixteen_slots_what_the_runs_say() -> None:
    old = with_eight_slots()
    memory = runs_of(RESULTS / "memory").of("aroma-evidence").set_index(["task", "seed"])
    new = pd.concat([memory, not_squeezed().loc[["minilm"]]])
    for task in ("minilm", *PAIRS):
        assert [*new.loc[task].index] == [*old.loc[task].index] == [*range(5 if task == "minilm" else 3)]
        assert compared(task, old, new) in TEXT
    merged = sorted(old.loc["minilm"].merged)
    assert f"in the encoder {merged[0]:.0f} to {merged[-1]:.0f} components of a run were, on pairs" in TEXT
    assert all(28 * (old.loc[task].average_rank - 8).min() > 150 for task in PAIRS), "hundreds"
    tried = each_seed_of("merges").score
    assert {*tried.index.get_level_values("of")} == {*MERGES}
    for of, line in MERGES.items():
        scores = [f"{100 * tried[of, task].mean():.2f}" if (of, task) in tried else "" for task in SHOWN]
        assert " ".join(f"| {line} | {' | '.join(scores)} |".split()) in TEXT


def test_the_page_says_of_what_is_asked_again_what_the_runs_say() -> None:
    grew, grew_before = (int(runs.grew["nothing"].sum()) for runs in (not_squeezed(), not_again()))
    assert f"where nothing is planted {grew} of 60 matrices grow, in place of {grew_before}." in TEXT
    tried = each_seed_of("asked-again")
    encoder = tried.loc["a quarter of the average, too", "minilm"]
    eight = runs_of(RESULTS / "planted-minilm").of("lora-r8").set_index("seed").score
    size = f"{encoder.trained_rank.mean():.2f} trained components)"
    assert f"the encoder has {in_points(encoder.score - eight)} against r = 8 (two seeds, at {size}" in TEXT
    graded, noisy = (100 * tried.loc["no first questions", task].score.mean() for task in FEW)
    assert f"`graded-b4` explains {graded:.2f} % and `noisy-b4` {noisy:.2f} % (five seeds)." in TEXT


def on_nets(line: str, scores: pd.Series, before: pd.Series) -> str:
    """Return a line of a table of the page: differences of scores on the nets, empty where a task was not run."""
    gains = [in_points(scores[task] - before[task]) if task in scores.index else "" for task in NETS]
    return " ".join(f"| {line} | {' | '.join(gains)} |".split())


ROWS = {
    "√2, 1": "√2 | 1",
    "2, 1/√2": "2 | 1/√2",
    "2, 1": "2 | 1",
    "√8, 1/√8": "√8 | 1/√8",
    "√8, ½": "√8 | ½",
    "√8, 1/√2": "√8 | 1/√2",
    "√8, 1": "√8 | 1",
    "1/√K, 0.01": "√K | 1/√K",
    "1/√K, 0.015": "√K | 1/√K, at 0.015",
    "1/√K, 0.02": "√K | 1/√K, at 0.02",
}


def test_the_page_says_of_rows_and_scales_what_the_runs_say() -> None:
    tried = each_seed_of("longer-rows")
    before = each_seed_of("memory-and-cut").loc["as it is"].score
    for variant, line in ROWS.items():
        assert on_nets(line, tried.loc[variant].score, before) in TEXT
    grew, grew_before = (int(runs.grew["nothing"].sum()) for runs in (not_again(), with_short_rows()))
    assert f"where nothing is planted {grew} of 60 matrices grow, in place of {grew_before}" in TEXT
    table = with_short_rows().score
    encoder = [in_points(tried.loc[variant].score["minilm"] - table["minilm"]) for variant in ("√2, 1", "√8, 1/√8")]
    assert f"encoder, at 0.003, √2 has {encoder[0]} (three seeds), and √8 with 1/√8 {encoder[1]} (two)" in TEXT
    fast = tried.loc["√2, 1"].score
    assert (
        f"SST-2 {in_points(fast['sst2'] - table['sst2'])}, TREC {in_points(fast['trec'] - table['trec'])} (four)"
        in TEXT
    )


VARIANTS = {
    "quarter, 33": "a quarter of the average stays; 33 gradients",
    "half, 33": "a half; 33",
    "quarter, 75": "a quarter; 75",
    "quarter, 150": "a quarter; 150",
    "quarter, 300": "a quarter; 300",
    "eighth, 150": "an eighth; 150",
    "as it is": "a quarter; 28, and 112 in batches of four, as it is",
}


def test_the_page_says_of_memories_and_cuts_what_the_runs_say() -> None:
    tried, before = each_seed_of("memory-and-cut"), at_one_rate().score
    for variant, line in VARIANTS.items():
        assert on_nets(line, tried.loc[variant].score, before) in TEXT
    grew = int(tried.grew["quarter, 150", "nothing"].sum())
    still = int(with_short_rows().grew["nothing"].sum())
    assert f"batches of 16, {grew} of 60 matrices grow where nothing is planted. There 9 batches" in TEXT
    assert f"in batches of four, and {still} of 60 matrices grow." in TEXT
    memories = [AromaConfig.significance ** (1 / (HELD_OUT_INTERVAL * count)) for count in (9, 37)]  # of 16, of four
    few, many = (f"{1 / (1 - memory):.0f}" for memory in memories)
    assert f"That is {few} gradients there, {many} in batches of four" in TEXT
    flat = [f"{100 * tried.score[variant, 'flat8'].mean():.2f}" for variant in ("before", "quarter, 33", "half, 33")]
    assert f"explains {flat[1]} % in place of {flat[0]} %, and a half {flat[2]} %" in TEXT
    texts, then = tried.loc["quarter, 33"], with_short_memory().score
    gained_there = [f"{LABELS[task]} {in_points(texts.score[task] - then[task])}" for task in TEXTS]
    assert f"{', '.join(gained_there)}." in TEXT


def test_the_page_says_of_the_mean_where_components_swing_what_the_runs_say() -> None:
    tried = each_seed_of("swing-mean")
    mean, now = (tried.loc[way, "noisy-b4"] for way in ("mean", "as it is"))
    assert len(mean) == len(now) == 35
    assert (
        f"{100 * mean.score.mean():.2f} % ({in_points(mean.score - now.score)}) at {mean.trained_rank.mean():.2f} "
        f"trained components in place of {now.trained_rank.mean():.2f}, with a rank correlation of "
        f"{mean.spearman.mean():.2f} in place of {now.spearman.mean():.2f}" in TEXT
    )
    graded = [100 * tried.loc[way, "graded-b4"].score.mean() for way in ("mean", "as it is")]
    assert f"`graded-b4` {graded[0]:.2f} % in place of {graded[1]:.2f} % (five seeds)" in TEXT


def test_the_page_says_of_the_end_of_the_trial_what_the_runs_say() -> None:
    then = without_floor()
    now = with_short_memory()
    for task in ("graded", "noisy", "graded-b4", "noisy-b4", "uniform", "trec", "banking77", "sst2"):
        assert len(now.loc[task]) == len(then.loc[task]) == 5
        assert compared(task, then, now) in TEXT
    pairs = [(now.spearman[task].mean(), then.spearman[task].mean()) for task in ("noisy-b4", "graded-b4")]
    (noisy, before), (graded, earlier) = pairs
    assert (
        f"Rank correlations are {noisy:.2f} on `noisy-b4`, in place of {before:.2f}, and {graded:.2f} on `graded-b4`, "
        f"in place of {earlier:.2f}" in TEXT
    )
    mrpc = pairs_then()
    floor = of_evidence("floor").set_index(["task", "seed"]).score["mrpc"]
    assert (
        f"On MRPC {100 * mrpc.mean():.2f} % are right, at rates of 0.003 and 0.000667; trials of a tenth, judged "
        f"whole, have {100 * floor.mean():.2f}." in TEXT
    )
    fast = at_one_rate().loc["graded-b4"]
    assert (
        f"held-out examples choose 0.003; at 0.01 it has {100 * fast.score.mean():.2f} % at "
        f"{fast.trained_rank.mean():.2f} trained components, with a rank correlation of {fast.spearman.mean():.2f} "
        "([runs](../results/lab/tried/rates-on-graded-b4.json))" in TEXT
    )
    costing = of_evidence("overshoot").set_index(["of", "task", "seed"]).loc["costing", "noisy-b4"]
    assert f"`noisy-b4` explains {said(costing.score.sort_index())} % (three seeds, 0.01)" in TEXT


def test_the_page_says_of_35_nets_how_a_trial_ends_best() -> None:
    ways = of_evidence("trial-ends").set_index(["of", "task", "seed"])
    noisy = {way: ways.loc[way, "noisy-b4"] for way in ("a tenth", "half", "goes on")}
    assert [*map(len, noisy.values())] == [35, 35, 35]
    assert {*ways.learning_rate.drop("mrpc", level="task")} == {0.01}
    right = {way: f"{100 * runs.score.mean():.2f} %" for way, runs in noisy.items()}
    found = {way: f"{runs.spearman.mean():.2f}" for way, runs in noisy.items()}
    tenth = f"trials of a tenth explain {right['a tenth']} with a rank correlation of {found['a tenth']}"
    assert f"{tenth}, and the rule as it is {right['half']} with {found['half']}." in TEXT
    less = in_points(noisy["half"].score - noisy["goes on"].score).lstrip("+")
    assert f"it explains {right['goes on']}, {less} less, and finds the ranks better, with {found['goes on']}." in TEXT
    for task, seeds in (("graded-b4", 10), ("mrpc", 6)):
        same = ways.score["half", task] == ways.score["goes on", task]
        assert same.all()
        assert len(same) == seeds


def test_the_page_says_of_a_trial_that_goes_on_sooner_what_the_runs_say() -> None:
    tried = of_evidence("goes-on").set_index(["task", "seed"])
    assert {*tried.groupby("task").score.count()} == {5}
    found = tried.spearman.groupby("task").mean()
    graded = tried.loc["graded-b4"]
    size = f"at {100 * graded.score.mean():.2f} % and {graded.trained_rank.mean():.2f} trained components"
    assert f"{found['graded-b4']:.2f} on `graded-b4`, {size}, and {found['noisy-b4']:.2f} on `noisy-b4`." in TEXT
    texts = with_short_memory().score
    lost = {task: in_points(tried.score[task] - texts[task]) for task in ("trec", "banking77", "sst2", "bbc-news")}
    assert (
        f"TREC {lost['trec']}, BANKING77 {lost['banking77']}, SST-2 {lost['sst2']}, and BBC News {lost['bbc-news']}, "
        "at a head rate of 0.006 in place of 0.000222." in TEXT
    )
    assert {*tried.head_learning_rate["bbc-news"]} == {0.006}


def test_the_page_says_of_the_floor_what_the_runs_say() -> None:
    tried = of_evidence("floor").set_index(["task", "seed"])
    assert {*tried.groupby("task").score.count()} == {5}
    before = without_floor()
    for task, label in (("noisy", "`noisy` gains"), ("trec", "TREC"), ("sst2", "SST-2")):
        assert f"{label} {in_points(tried.score[task] - before.score[task]).lstrip('+')}" in TEXT
        assert tried.learning_rate[task].tolist() == before.learning_rate[task].tolist()
    assert f"BBC News loses {in_points(before.score['bbc-news'] - tried.score['bbc-news']).lstrip('+')}" in TEXT
    assert {*tried.head_learning_rate["bbc-news"]} == {0.006}
    assert {*before.head_learning_rate["bbc-news"]} == {0.002}
    assert f"On MRPC {100 * tried.score['mrpc'].mean():.1f} % of the test set are right" in TEXT
    grew = sum(rank > 0 for ranks in tried.ranks["nothing"] for rank in ranks)
    assert f"nothing is planted {grew} of 60 matrices have a component, as before" in TEXT
    other = of_evidence("other-floors").set_index(["of", "task", "seed"]).score["costs at α", "noisy"]
    assert len(other) == 4
    assert f"`noisy` has {in_points(tried.score['noisy'] - other).lstrip('+')} less (four seeds)" in TEXT


def test_the_page_says_of_a_line_search_what_was_measured() -> None:
    along = json.loads((RESULTS / "tried" / "along-the-trial.json").read_text(encoding="utf-8"))
    assert along["strengths"] == [0, 0.25, 0.5, 0.75, 1]
    rows = pd.DataFrame(along["measurements"]).set_index(["task", "step"])
    best = rows.held_out_loss.map(lambda losses: along["strengths"][losses.index(min(losses))])
    saved = pd.DataFrame(
        rows.held_out_loss.map(lambda losses: [losses[0] - loss for loss in losses]).tolist(), rows.index
    )
    noisy = saved.loc["noisy-b4"]
    assert (noisy[4] > 0).tolist() == [step > 300 for step in noisy.index], "a fifth of 1,500 steps"
    assert (noisy[1] > 0).all()
    assert {*best["bbc-news"][lambda found: found.index >= 24]} == {0.25, 0.5}
    assert {*best["trec"][lambda found: found.index >= 32]} == {0.75}
    tried = of_evidence("line-search").set_index(["of", "task", "seed"])
    assert {*tried.groupby(["of", "task"]).score.count()} == {3}
    assert {*tried.learning_rate} == {0.01} == {*without_floor().learning_rate[["noisy", "graded"]]}
    stay = sorted(tried.directions_that_stay["line search", "noisy-b4"])
    assert f"{stay[0]} to {stay[-1]} directions stay, where 30 are planted" in TEXT
    of_task = 100 * tried.score.groupby(["of", "task"]).mean()
    searched, quarter = (of_task[name, "noisy-b4"] for name in ("line search", "quarter"))
    assert f"explains {searched:.1f} % all the same ({quarter:.1f} % at a quarter)" in TEXT
    before = without_floor().score
    lost = [in_points(before["noisy"] - tried.score[name, "noisy"]) for name in ("line search", "quarter")]
    graded = in_points(tried.score["line search", "graded"] - before["graded"])
    assert f"`noisy` loses {lost[0].lstrip('+')}, as more" in TEXT
    assert f"and {lost[1].lstrip('+')} at a quarter; `graded` {graded} (three seeds each, at 0.01)" in TEXT


def test_the_page_says_of_the_loss_at_every_strength_what_was_measured() -> None:
    runs = json.loads((RESULTS / "tried" / "strengths.json").read_text(encoding="utf-8"))["runs"]
    news = runs[0]
    losses = [*news["held_out_loss_by_strength"].values()]
    assert news["task"] == "bbc-news"
    assert [*news["held_out_loss_by_strength"]] == ["0.0", "0.25", "0.5", "0.75", "1.0"]
    assert f"{', '.join(f'{loss:.3f}' for loss in losses[:-1])} and {losses[-1]:.3f} on 16 held-out" in TEXT
    assert f"They save {losses[0] - losses[-1]:.2f}. The slope in the middle says that they cost" in TEXT
    assert f"that they cost {-news['credit_at_half']:.2f}, and {news['directions_that_stay']} of 288" in TEXT
    for run in runs:
        first, *_, last = run["held_out_loss_by_strength"].values()
        if run["task"] != "bbc-news":
            assert abs(first - last - run["credit_at_half"]) < 0.02


def test_the_page_says_of_a_quarter_of_the_strength_what_the_runs_say() -> None:
    tried = of_evidence("quarter-strength")
    few = tried.task.isin(["mrpc", "trec", "sst2"])
    assert {*tried[few].groupby(["of", "task", "learning_rate"]).seed.count()} == {3}
    assert {*tried[~few].groupby(["of", "task", "learning_rate"]).seed.count()} == {5}
    quarter, both = (tried[tried["of"] == name] for name in ("quarter", "quarter, doubled"))
    chosen = with_the_table(quarter[(quarter.learning_rate == 0.003) | (quarter.task == "nothing")])
    fast = with_the_table(quarter[(quarter.learning_rate == 0.01) & (quarter.task != "nothing")])

    def means(runs: pd.DataFrame, suffix: str = "") -> tuple[float, float, float]:
        score, rank, found = (runs[f"{name}{suffix}"].mean() for name in ("score", "trained_rank", "spearman"))
        return 100 * score, rank, found

    news = chosen.loc["bbc-news"]
    gain = above_the_table(news).removeprefix("+")
    ranks = f"{news.trained_rank.mean():.2f} trained components in place of {news.trained_rank_of_table.mean():.2f}"
    assert f"BBC News gains {gain} at {ranks}" in TEXT
    score, rank, found = means(fast.loc["graded-b4"])
    assert f"explains {score:.1f} % at {rank:.2f} trained components with a rank correlation of {found:.2f};" in TEXT
    score, rank, found = means(fast.loc["graded-b4"], "_of_table")
    assert f"the table has {score:.1f} % at {rank:.2f} and {found:.2f}, at 0.003." in TEXT
    assert f"`noisy-b4` explains {means(fast.loc['noisy-b4'])[0]:.1f} % at 0.01" in TEXT
    beside = with_the_table(both[both.task == "noisy-b4"])
    score, rank, found = means(beside)
    assert f"explains {score:.1f} % at {rank:.2f} with a rank correlation of {found:.2f};" in TEXT
    score, rank, found = means(beside, "_of_table")
    assert f"the table has {score:.1f} % at {rank:.2f} and {found:.2f}. At" in TEXT
    assert f"0.003 and 0.006: {said(both[both.task == 'mrpc'].score)} % (three seeds)" in TEXT
    news = with_the_table(both[both.task == "bbc-news"])
    assert f"Both on BBC News: {above_the_table(news)} at {news.trained_rank.mean():.2f} trained components;" in TEXT
    for task in ("trec", "sst2"):
        runs = with_the_table(both[both.task == task])
        assert f"{LABELS[task]} {above_the_table(runs)} at {runs.trained_rank.mean():.2f}" in TEXT
    assert f"`graded-b4` gains {above_the_table(chosen.loc['graded-b4']).removeprefix('+')}" in TEXT
    assert f"`noisy-b4` loses {above_the_table(chosen.loc['noisy-b4']).removeprefix('−')}." in TEXT
    assert (chosen.loc["nothing"].score == chosen.loc["nothing"].score_of_table.round(6)).all()


def at_one_rate() -> pd.DataFrame:
    """Return the runs on nets by task and seed, with a short memory, all at a rate of 0.01."""
    nets = with_short_memory().loc[["graded", "noisy", "noisy-b4", "uniform"]]
    faster = of_evidence("rates-on-graded-b4").set_index(["task", "seed"])
    assert {*faster.learning_rate} == {0.01}
    return pd.concat([nets, faster])[["score", "trained_rank", "spearman", "ranks"]].sort_index()


def pairs_then() -> pd.Series:
    """Return the scores on MRPC by seed with a short memory, at the rates of what was tried: 0.003 and 0.000667."""
    runs = with_short_memory().loc["mrpc"]
    assert ({*runs.learning_rate}, {*runs.head_learning_rate}) == ({0.003}, {0.000667})
    return runs.score


def test_the_page_says_of_a_trial_of_which_nothing_is_known_what_the_runs_say() -> None:
    tried = of_evidence("nothing-known").set_index(["task", "seed"]).score["mrpc"].sort_index()
    before = pairs_then()[tried.index]
    so, not_so = (" and ".join(f"{100 * score:.1f}" for score in scores) for scores in (tried, before))
    assert f"MRPC has {so} % so, in place of {not_so} (two seeds)" in TEXT


def test_the_page_says_of_random_first_directions_what_the_runs_say() -> None:
    tried = of_evidence("random-starts").set_index(["task", "seed"])
    columns = ["score", "trained_rank"]
    news = of_evidence("nothing-known").set_index(["task", "seed"]).loc[["bbc-news"], columns]
    text = with_short_memory().loc[["trec", "banking77"], columns]
    nets = at_one_rate()
    before = pd.concat([nets[columns], text, news])
    for task in ("graded", "noisy", "graded-b4", "noisy-b4", "uniform", "trec", "banking77", "bbc-news"):
        assert len(tried.loc[task]) == 5
        assert compared(task, before, tried) in TEXT
    found = tried.spearman.groupby("task").mean()
    right = nets.spearman.groupby("task").mean()
    now = {
        task: f"{found[task]:.2f} on `{task}` in place of {right[task]:.2f}"
        for task in ("graded", "graded-b4", "noisy", "noisy-b4")
    }
    listed = f"{now['graded']}, {now['graded-b4']}, {now['noisy']} and {now['noisy-b4']}."
    assert f"Rank correlations are {listed}" in TEXT


WAYS = {
    "no births": "nothing is born after the trial",
    "one direction": "one unused direction, not four",
    "magnitudes": "magnitudes: bets in proportion to z less its rival, over the sum of both",
    "e-BH": "e-BH: births only where all matrices together let them pass",
    "own rivals": "rivals of the own matrix alone",
}


def test_the_page_says_of_births_what_the_runs_say() -> None:
    tried = of_evidence("births").set_index(["of", "task", "seed"])
    now = at_one_rate()
    assert {*tried.learning_rate} == {0.01}
    for way, line in WAYS.items():
        gains = [in_points(tried.score[way, task] - now.score[task]) for task in ("noisy", "graded-b4", "noisy-b4")]
        grew = "" if way == "no births" else f"{tried.grew[way, 'nothing'].sum():.0f} "
        assert f"| {line} | {' | '.join(gains)} | {grew}|" in TEXT
    assert {*tried.groupby(["of", "task"]).score.count()} == {5}
    same = [abs(tried.score["no births", task] - now.score[task]).max() for task in ("graded", "uniform")]
    assert max(same) < 1e-4


def test_the_page_says_of_a_rate_that_falls_what_the_runs_say() -> None:
    tried = of_evidence("cooling").set_index(["task", "seed"])
    nets = at_one_rate()
    lost = {
        task: in_points(tried.score[task] - nets.score[task]) for task in ("noisy", "graded", "graded-b4", "noisy-b4")
    }
    assert f"`noisy` loses {lost['noisy'].removeprefix('−')}, and" in TEXT
    seeds = tried.loc["graded"].index
    found = tried.ranks["graded"], nets.ranks["graded"][seeds]
    ranks = [sum(map(sum, of_runs)) / 12 / len(seeds) for of_runs in found]
    assert f"ends with {ranks[0]:.1f} components in place of {ranks[1]:.1f}, at {lost['graded']}." in TEXT
    assert f"`graded-b4` {lost['graded-b4']}, `noisy-b4` {lost['noisy-b4']}." in TEXT
    news, mrpc = (100 * tried.score[task] for task in ("bbc-news", "mrpc"))
    assert f"BBC News has {news.mean():.2f} % (four seeds" in TEXT
    assert len(news) == 4
    assert f"MRPC {mrpc[0]:.1f} % in place of {100 * pairs_then()[0]:.1f} (one)" in TEXT


def test_the_page_says_of_the_cut_what_the_runs_say() -> None:
    tried = each_seed_of("the-cut").loc["nothing is cut"]
    now = not_again()
    for task in (*NETS, "minilm", *TEXTS[:4]):
        seeds = tried.loc[task].index
        assert len(seeds) == (5 if task in NETS else 3)
        before = now.loc[[(task, seed) for seed in seeds]]
        assert compared(task, before, tried) in TEXT
    eight = runs_of(RESULTS / "planted-minilm").of("lora-r8").set_index("seed").score
    assert f"{in_points(tried.score['minilm'] - eight)} against r = 8" in TEXT
    gain = in_points(tried.score["banking77"] - now.score["banking77"])
    assert f"[brought](tried.md#nothing-is-cut) {gain} points" in page_of("results.md")
    scores = runs_of(RESULTS / "minilm-six").reported.pivot_table("score", "task", "method")
    assert scores.loc["banking77"].filter(regex=r"^lora-r\d+$").idxmax() == "lora-r16"
    mean, error = over_tasks((tried.score - now.score).dropna().loc[[*TEXTS[:4]]])
    assert f"On the average of the four texts it is {signed_points(mean)} ± {100 * error:.2f}" in TEXT


def test_the_page_says_of_overshoots_what_the_runs_say() -> None:
    asked = of_evidence("overshoot-or-by-heart").set_index("task")
    counts = asked[["cost", "directions", "save_on_seen", "cost_on_seen"]].astype(int)
    net, encoder = counts.loc["noisy"], counts.loc["minilm"]
    said = f"{net.cost} of {net.directions} directions on `noisy`, and {encoder.cost} of {encoder.directions} in the"
    assert f"{said} encoder" in TEXT
    assert f"{net.save_on_seen} of the {net.cost} save loss, and none costs any" in TEXT
    assert net.cost_on_seen == 0
    assert f"{encoder.cost_on_seen} of the {encoder.cost} cost loss there, too" in TEXT
    for task, label in (("sst2", "on SST-2"), ("mrpc", "on MRPC"), ("graded-b4", "on `graded-b4`")):
        assert f"{asked.cost_on_seen[task]} of {asked.cost[task]} {label}" in TEXT
    tried = each_seed_of("the-cut").loc["what overshoots stays"]
    now = not_again()
    gains = {task: in_points(tried.score[task] - now.score[task]) for task in (*NETS, "minilm")}
    listed = ", ".join(f"`{task}` {gains[task]}" for task in NETS)
    assert f"In the encoder that is worth {gains['minilm']} (three seeds, " in TEXT
    assert f"On nets: {listed} (five seeds)" in TEXT
    assert f"{tried.grew['nothing'].sum():.0f} of 60 matrices grow where nothing is planted" in TEXT


def test_the_page_says_of_parts_that_stay_what_the_runs_say() -> None:
    ways = [
        each_seed_of("the-cut").loc[of]
        for of in ("what overshoots stays in part", "what costs on trained batches, too, stays in part")
    ]
    now = not_again()
    for task in (*NETS, "minilm", "trec", "banking77", "sst2"):
        cells = []
        for tried in ways:
            if task not in tried.index.get_level_values("task"):
                cells += ["", ""]
                continue
            assert len(tried.loc[task]) == (5 if task in NETS else 3)
            gain = in_points((tried.score - now.score).dropna().loc[task])
            cells += [f" {gain}", f" {tried.trained_rank[task].mean():.2f}"]
        assert f"| {LABELS[task]} |{' |'.join(cells)} |" in TEXT
    first, second = (f"{tried.grew['nothing'].sum():.0f}" for tried in ways)
    assert f"Where nothing is planted {first} and {second} of 60 matrices grow." in TEXT
    eight = runs_of(RESULTS / "planted-minilm").of("lora-r8").set_index("seed").score
    assert f"the first has {in_points(ways[0].score['minilm'] - eight)} against r = 8" in TEXT


def test_the_page_says_of_a_last_squeeze_what_the_runs_say() -> None:
    tried = each_seed_of("the-cut").loc["a last squeeze"]
    now = not_again()
    listed = ", ".join(f"`{task}` {in_points(tried.score[task] - now.score[task])}" for task in NETS)
    assert f"{listed} (five seeds)" in TEXT
    assert {*tried.loc["uniform"]["rank"]} == {2.0}
    found = {task: f"{tried.spearman[task].mean():.2f} on `{task}`" for task in ("graded-b4", "noisy-b4")}
    assert f"{found['graded-b4']} and {found['noisy-b4']}" in TEXT


def test_the_page_says_of_a_longer_trial_what_the_runs_say() -> None:
    tried = of_evidence("longer-trial").set_index("seed")
    now = not_again().loc["mrpc"]
    chosen = runs_of(RESULTS / "mrpc").selection["mrpc"]
    then = not_doubted().loc["mrpc"]
    assert {*tried.learning_rate} == {*then.learning_rate} == {0.003}
    assert {*tried.head_learning_rate} == {*then.head_learning_rate}
    assert chosen["lora-r8"]["chosen"]["training.learning_rate"] == 0.001
    cost = in_points(now.score[tried.index] - tried.score).removeprefix("+")
    assert f"That costs {cost} points, at {tried.trained_rank.mean():.2f} trained components" in TEXT


def as_it_was() -> pd.DataFrame:
    """Return score and trained_rank by task and seed before small ones went early, at the rates of the tables."""
    grids = ("minilm-six", "mrpc")
    texts = pd.concat([runs_of(RESULTS / grid).of("aroma-evidence") for grid in grids]).set_index(["task", "seed"])
    columns = ["score", "trained_rank"]
    others = each_seed_of("split-anew").loc["as it is", columns]
    return pd.concat([texts[columns], others, not_so_small()[columns]]).sort_index()


def changed_by(of: str, task: str) -> pd.Series:
    """Return by how much every run of what was tried differs from the rule as it was."""
    change: pd.Series = each_seed_of("split-anew").score[of, task] - as_it_was().score[task]
    return change.dropna()


def test_the_page_says_of_a_test_for_all_matrices_at_once_what_the_runs_say() -> None:
    of = "known at α / M"
    gains = {task: changed_by(of, task) for task in ("mrpc", "sst2", "trec")}
    assert {len(gain) for gain in gains.values()} == {10}
    runs, now = each_seed_of("split-anew").loc[of, "mrpc"], as_it_was().loc["mrpc"]
    r16 = runs_of(RESULTS / "mrpc").of("lora-r16").set_index("seed").score
    assert (
        f"MRPC {in_points(gains['mrpc'])} points, at {runs.trained_rank.mean():.2f} trained components in place of "
        f"{now.trained_rank[runs.index].mean():.2f}, so that it has {in_points(runs.score - r16)} against r = 16. "
        f"SST-2 {in_points(gains['sst2'])}, TREC {in_points(gains['trec'])}." in TEXT
    )
    sst2, mrpc = (gains[task][gains[task].abs() > 1e-5] for task in ("sst2", "mrpc"))
    assert (len(sst2), len(mrpc)) == (3, 6)
    lost = in_points(-sst2).removeprefix("+")
    assert f"and lose {lost}; six of MRPC differ, by {in_points(mrpc)}." in TEXT


def test_the_page_says_of_small_ones_that_go_early_what_the_runs_say() -> None:
    assert_it_compares(NETS, not_so_small(), the_rule())
    by_seed = of_evidence("longer-encoder").set_index("seed").groupby("of")
    new, old = (by_seed.get_group(of) for of in ("evidence", "evidence, nothing small goes early"))
    left, of_old = (100 - 100 * runs.score.mean() for runs in (new, old))
    assert (
        f"leaves {left:.2f} % in place of {of_old:.2f} % ({in_points(new.score - old.score)}), at "
        f"{new.trained_rank.mean():.2f} trained components in place of {old.trained_rank.mean():.2f}, and finds the "
        f"planted ranks with {new.spearman.mean():.2f} in place of {old.spearman.mean():.2f}." in TEXT
    )
    then = each_seed_of("split-anew").score["as it is"]
    changes = [(runs_of_images(name).accuracy["AROMA"] - then[name]).dropna() for name in ("digits", "mnist")]
    assert [len(change) for change in changes] == [20, 20]
    digits, mnist = (change[change.abs() > 1e-5] for change in changes)
    assert digits.empty
    differ = " and ".join(signed_points(change) for change in sorted(mnist, reverse=True))
    assert f"no run differs on digits, and two on MNIST, by {differ} points:" in TEXT


def test_the_page_says_of_other_ways_to_let_small_ones_go_early_what_the_runs_say() -> None:
    of = "a hundredth goes early"
    long = of_evidence("longer-encoder").set_index(["of", "seed"]).score["evidence"]
    same = {task: the_rule().score[task] for task in NETS} | {"minilm, 1,500 steps": long}
    assert all((each_seed_of("split-anew").score[of, task] - now).abs().max() < 1e-5 for task, now in same.items())
    hundredth, fresh, thousandth, split = (
        " and ".join(in_points(changed_by(of, name).loc[first:last]) for name in IMAGES)
        for of, first, last in (
            (of, 0, 49),
            (of, 20, 49),
            ("a thousandth goes early", 0, 9),
            ("split anew alone", 0, 9),
        )
    )
    assert [len(changed_by(of, name)) for name in IMAGES] == [50, 50]
    assert f"On fifty splits digits and MNIST have {hundredth}, on the last thirty of these {fresh}." in TEXT
    assert f"A thousandth in place of a hundredth has {thousandth} on the first ten." in TEXT
    assert f"and to take nothing away, has {split} there:" in TEXT


def test_the_page_of_images_says_of_a_tenth_held_out_what_the_runs_say() -> None:
    gains = [changed_by("a tenth is held out", name) for name in IMAGES]
    said = " and ".join(f"{in_points(gain)} ({len(gain)} splits)" for gain in gains)
    assert f"With a tenth held out too few decide: {said}, against a fifth." in page_of("vision.md")


def test_the_page_says_of_averages_that_go_on_what_the_runs_say() -> None:
    gains = {
        task: in_points(changed_by("averages are carried over", task)) for task in (*NETS, "sst2", "trec", *IMAGES)
    }
    listed = ", ".join(f"{LABELS[task]} {gains[task]}" for task in (*NETS, "sst2", "trec"))
    assert f"Five seeds: {listed}; on ten splits of images digits {gains['digits']}, MNIST {gains['mnist']}." in TEXT
