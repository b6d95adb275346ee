"""Every estimator on made data whose answer is known."""

import doctest
import itertools
import warnings

import evaluate
import numpy as np
import pandas as pd
import pytest
from metrics.alignment.analysis import align
from metrics.decision_timing.analysis import explain_depth
from metrics.dynamics.analysis import find_phases, fit_peak
from metrics.generalization.analysis import beyond_training, by_size
from scipy import stats

SEED = 7
METRICS = ("alignment", "generalization", "dynamics", "decision_timing")


def made_tokens(examples=150, tokens=6, noise=1.0, effect=1.0, size_effect=1.0):
    """Difficulty varies within sizes; depth = effects + noise."""
    rng = np.random.default_rng(SEED)
    size = np.repeat(rng.integers(3, 11, examples), tokens)
    difficulty = size / 2 + rng.normal(0, 1, examples * tokens)
    depth = size_effect * size + effect * difficulty + rng.normal(0, noise, examples * tokens)
    return pd.DataFrame(
        {
            "example": np.repeat(np.arange(examples), tokens),
            "size": size,
            "difficulty": difficulty,
            "depth": depth,
            "correct": np.repeat(rng.random(examples) < 0.7, tokens),
        }
    )


def test_a_planted_correlation_is_found_with_an_interval_around_it():
    found = align(made_tokens(effect=2.0, noise=0.5), resamples=100)
    for subset in ("correct", "all"):
        estimate = found[subset]["difficulty given size"]
        assert estimate["low"] < estimate["value"] < estimate["high"]
        assert estimate["low"] > 0.8
    assert found["all"]["size"]["value"] > 0.8
    assert found["correct"]["size"]["n"] < found["all"]["size"]["n"] == 900


def test_depth_that_follows_difficulty_exactly_correlates_at_one():
    table = made_tokens(noise=0.0, effect=1.0, size_effect=0.0)
    assert align(table, resamples=20)["all"]["difficulty"]["value"] == pytest.approx(1.0)


def test_a_size_only_effect_vanishes_when_size_is_held_constant():
    """Even one that is not linear."""
    table = made_tokens(effect=0.0, noise=0.3)
    table["depth"] = (table["size"] - 6.0) ** 2 + np.random.default_rng(SEED).normal(0, 0.3, len(table))
    table["difficulty"] = (table["size"] - 6.0) ** 2 + np.random.default_rng(SEED + 1).normal(0, 1, len(table))
    found = align(table, resamples=200)["all"]
    assert found["difficulty"]["low"] > 0.5
    assert found["difficulty given size"]["low"] < 0 < found["difficulty given size"]["high"]


def test_shuffled_depths_give_an_interval_around_zero():
    table = made_tokens(examples=400, effect=2.0)
    table["depth"] = np.random.default_rng(SEED).permutation(table["depth"])
    for estimate in align(table, resamples=200)["all"].values():
        assert estimate["low"] < 0 < estimate["high"]


@pytest.mark.parametrize("whole", [True, False])
def test_values_and_intervals_are_those_of_scipy_on_rows_that_are_really_drawn(whole):
    """Rows are not copied in a resample, but counted, by kinds: that must be the same."""
    table = made_tokens(examples=40, tokens=7, effect=0.5)
    table["cell"] = np.tile(np.arange(7) // 3, 40)
    table["size"] = np.repeat(np.arange(40) % 3, 7)
    if whole:
        table[["depth", "difficulty"]] = table[["depth", "difficulty"]].round()

    def plain(rows):
        return stats.spearmanr(rows["depth"], rows["difficulty"]).statistic

    def held(*columns):
        def partial(rows):
            ranks = rows[["depth", "difficulty"]].rank()
            rest = ranks - ranks.groupby([rows[column] for column in columns]).transform("mean")
            return stats.pearsonr(rest["depth"], rest["difficulty"]).statistic

        return partial

    given = (("cell",), ("size", "cell"))
    found = align(table, against=("difficulty",), given=given, resamples=50, seed=SEED)["all"]
    for name, statistic in (
        ("difficulty", plain),
        ("difficulty given cell", held("cell")),
        ("difficulty given size and cell", held("size", "cell")),
    ):
        drawn = stats.bootstrap(
            (np.arange(40),),
            lambda chosen, statistic=statistic: statistic(table.iloc[(chosen[:, None] * 7 + np.arange(7)).ravel()]),
            n_resamples=50,
            vectorized=False,
            method="percentile",
            rng=np.random.default_rng(SEED),
        ).bootstrap_distribution
        expected = [statistic(table), *np.quantile(drawn, [0.025, 0.975])]
        assert [found[name][part] for part in ("value", "low", "high")] == pytest.approx(expected, abs=1e-9)


def test_balanced_is_spearmans_of_rows_repeated_until_each_size_has_as_many():
    """MANO's test rows were nearly all of two sizes, and a depth that rose with every size had a correlation of 0.3."""
    rng = np.random.default_rng(SEED)
    counts = {1: 6, 2: 60, 3: 600, 4: 600}  # the first are too few to weigh as much
    size = np.repeat(list(counts), list(counts.values()))
    depth = (size + rng.normal(0, 1, len(size))).round(1)
    table = pd.DataFrame({"example": range(len(size)), "size": size, "depth": depth, "correct": True})
    found = align(table, against=("size",), resamples=50)["all"]
    known = table[table["size"] > 1]
    equal = known.loc[known.index.repeat(600 // known["size"].map(counts))]
    expected = stats.spearmanr(equal["depth"], equal["size"]).statistic
    assert found["size balanced"]["value"] == pytest.approx(expected, abs=1e-9)
    assert found["size"]["value"] == pytest.approx(stats.spearmanr(depth, size).statistic, abs=1e-9)
    assert expected > found["size"]["value"] + 0.1
    assert found["size balanced"]["n"] == 1260
    few = align(table[table["size"] != 3].query("size < 4"), against=("size",), resamples=20)["all"]["size balanced"]
    assert few["value"] is None
    assert "fewer than two sizes" in few["reason"]
    assert found["size balanced"]["low"] < expected < found["size balanced"]["high"]


def test_tokens_of_one_example_are_no_independent_evidence():
    """The same number of rows in fewer examples: a wider interval."""
    table = made_tokens(examples=40, tokens=25, effect=0.0, noise=0.1)
    table["depth"] = table["example"].map(dict(enumerate(np.random.default_rng(SEED).normal(size=40))))
    wide = align(table, resamples=200)["all"]["size"]
    alone = align(table.assign(example=np.arange(len(table))), resamples=200)["all"]["size"]
    assert wide["high"] - wide["low"] > 3 * (alone["high"] - alone["low"])


def test_what_is_not_defined_is_none_with_a_reason_and_no_warning():
    constant = made_tokens(examples=400).assign(depth=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = align(constant, resamples=20)
        assert all(estimate["value"] is None and "constant" in estimate["reason"] for estimate in found["all"].values())
        wrong = align(made_tokens().assign(correct=False), resamples=20)
        assert wrong["correct"]["size"] == {
            "value": None,
            "low": None,
            "high": None,
            "n": 0,
            "reason": "there are no items",
        }
        few = align(made_tokens(examples=5), resamples=20)["all"]["size"]
        assert few["value"] is not None
        assert few["low"] is None
        assert "no interval" in few["reason"]
        # A third of all resamples leave out the only example whose depth differs.
        table = made_tokens(examples=20)
        single = align(table.assign(depth=table["example"] == 0), resamples=50)["all"]["size"]
        assert single["value"] is not None
        assert "constant in too many resamples" in single["reason"]


def made_examples():
    rng = np.random.default_rng(SEED)
    size = np.repeat(np.arange(3, 21), 60)
    chance = np.where(size <= 10, 0.95, 0.2)
    return pd.DataFrame(
        {"size": size, "correct": rng.random(len(size)) < chance, "depth": size / 4 + rng.normal(0, 0.3, len(size))}
    )


def test_a_planted_failure_beyond_the_limit_is_found():
    found = beyond_training(made_examples(), limit=10)
    assert found["verdict"] == "accuracy falls while depth rises"
    assert found["accuracy_change"]["low"] < -0.75 + 0.05 < found["accuracy_change"]["high"] + 0.1
    assert found["depth_change"]["low"] < 2.25 < found["depth_change"]["high"]
    same = beyond_training(made_examples().assign(correct=True, depth=2.0), limit=10)
    assert same["verdict"] == "accuracy stays while depth stays"
    assert found["depth_slope"]["low"] < 0.25 < found["depth_slope"]["high"]
    assert beyond_training(made_examples(), limit=30)["reason"] == "0 examples beyond the limit"
    assert beyond_training(made_examples(), limit=2)["verdict"] is None


def test_depth_that_is_the_same_everywhere_has_an_exact_slope():
    """scipy's error of it is NaN, which ended a report of a `stability` run in a traceback."""
    found = beyond_training(made_examples().assign(depth=3.0), limit=10)
    assert found["depth_slope"] == found["depth_change"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_by_size_counts_and_covers():
    rows = by_size(made_examples())
    assert [row["size"] for row in rows] == list(range(3, 21))
    for row in rows:
        assert row["n"] == 60
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1
    covered = sum(row["depth_low"] <= row["size"] / 4 <= row["depth_high"] for row in rows)
    assert covered >= 15
    assert by_size(pd.DataFrame({"size": [3], "correct": [True], "depth": [2.0]}))[0]["depth_low"] is None


def made_curve(kind, points=30, noise=0.05, seed=SEED):
    """As depth really goes: it learns to go deep, and is pressed down to a level."""
    t = np.arange(points) / points
    pressed = np.exp(-np.maximum(0, t - 0.4) * 8)
    curve = {
        "rise, then fall": 3.5 + 2.5 * np.minimum(1, 0.2 + 3 * t) * pressed,
        "fall": 3.5 + 2.5 * pressed,
        "rise": 6 - 2 * np.exp(-6 * t),
        "none": np.full(points, 6.0),
    }[kind]
    return (100 * np.arange(points)).tolist(), (curve + np.random.default_rng(seed).normal(0, noise, points)).tolist()


@pytest.mark.parametrize("kind", ["rise, then fall", "fall", "rise", "none"])
@pytest.mark.parametrize("points", [12, 30, 100])
def test_the_phases_of_curves_as_they_are_pressed_are_found(kind, points):
    """Two lines that meet did not fit them: what was left over was taken for drift, and a turn was found in none."""
    accuracy = np.minimum(1.0, np.arange(points) / points / 0.4).tolist()
    found = [find_phases(*made_curve(kind, points, seed=seed), accuracy) for seed in range(20)]
    assert sum(own["phases"] == kind for own in found) >= 18
    for own in found:
        if own["phases"] == kind and "fall" in kind:
            assert 0.3 * 100 * points <= own["turn"] <= 0.5 * 100 * points
            assert own["fall"] == pytest.approx(2.5, abs=0.3)
            assert own["accuracy_change"] == pytest.approx([1.0, 0.0], abs=0.2)
        elif own["phases"] == kind:
            assert own["turn"] is None
            assert own["accuracy_change"] == [pytest.approx(1.0)]


def test_the_fitted_curve_is_the_best_with_one_peak():
    """Against brute force over all curves on a grid."""
    y = np.array([1.0, 3.0, 2.0, 4.0, 1.0, 2.0])
    levels = np.arange(1, 4.01, 0.5)
    best = np.inf
    for curve in itertools.product(levels, repeat=len(y)):
        steps = np.sign(np.diff(curve))
        steps = steps[steps != 0]
        if not (np.diff(steps) > 0).any():
            best = min(best, float(((y - np.array(curve)) ** 2).sum()))
    fitted = fit_peak(y)
    assert ((y - fitted) ** 2).sum() == pytest.approx(best)
    assert fitted == pytest.approx([1, 2.5, 2.5, 4, 1.5, 1.5])


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.8])
def test_pure_noise_seldom_has_phases(alike):
    """Nor noise in which neighbouring steps are alike, as those of training are."""
    found = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        depth = [rng.normal()]
        while len(depth) < 60:
            depth.append(alike * depth[-1] + rng.normal())
        found += find_phases(list(range(60)), depth)["phases"] != "none"
    assert found <= 5


def test_curves_that_say_nothing_have_a_reason():
    assert "constant" in find_phases(list(range(30)), [6.0] * 30)["reason"]
    assert "at least" in find_phases([1, 2], [1.0, 2.0])["reason"]
    assert "noise" in find_phases(*made_curve("none"))["reason"]


def made_features(coefficients, noise=0.5, examples=200, tokens=6):
    rng = np.random.default_rng(SEED)
    n = examples * tokens
    table = pd.DataFrame(
        {
            "example": np.repeat(np.arange(examples), tokens),
            "size": np.repeat(rng.integers(3, 8, examples), tokens),
            "degree_static": rng.integers(0, 5, n),
            "hub_static": np.repeat(rng.integers(1, 5, examples), tokens),
            "frontier_state": rng.integers(0, 6, n),
            "enabled_state": rng.integers(0, 3, n),
        }
    )
    depth = rng.normal(0, noise, n)
    for name, value in coefficients.items():
        depth = depth + value * table[name]
    return table.assign(depth=depth)


def test_a_planted_regression_is_found():
    found = explain_depth(made_features({"frontier_state": 1.0, "degree_static": 0.2}), resamples=50)
    spread = made_features({})["frontier_state"].std(ddof=0)
    coefficient = found["terms"]["frontier_state"]["coefficient"]
    assert coefficient["low"] <= spread <= coefficient["high"]
    assert found["r2"]["value"] > 0.9
    assert found["terms"]["state"]["alone"]["low"] > 0.8
    assert found["terms"]["static"]["alone"]["high"] < 0.1
    assert found["terms"]["frontier_state"]["lost"]["value"] == pytest.approx(
        found["terms"]["state"]["lost"]["value"], abs=0.02
    )
    assert abs(found["terms"]["enabled_state"]["coefficient"]["value"]) < 0.1
    for shares in found["terms"].values():
        for kind in ("alone", "lost"):
            assert -0.05 <= shares[kind]["low"] <= shares[kind]["high"] <= 1.05


def test_size_explains_depth_that_is_size_plus_noise():
    found = explain_depth(made_features({"size": 1.0}), resamples=50)
    assert found["terms"]["size"]["alone"]["low"] > 0.8
    assert found["terms"]["size"]["lost"]["low"] > 0.8
    assert found["terms"]["state"]["lost"]["high"] < 0.02


def test_features_of_noise_explain_nothing():
    table = made_features({"frontier_state": 1.0})
    table["depth"] = np.random.default_rng(SEED).permutation(table["depth"])
    found = explain_depth(table, resamples=100)
    for name in ("state", "static", "size", "size and static"):
        for kind in ("alone", "lost"):
            assert found["terms"][name][kind]["low"] <= 0.003, (name, kind)
    assert found["contrast"]["low"] <= 0 <= found["contrast"]["high"]


def test_the_contrast_counts_what_size_and_static_features_share_for_them():
    """Edges and size say the same: what is lost without either is little, without both all."""
    table = made_features({"size": 1.0})
    table["edges_static"] = 2 * table["size"] + np.random.default_rng(0).normal(0, 0.1, len(table))
    found = explain_depth(table, resamples=50)
    assert found["terms"]["static"]["lost"]["value"] < 0.01
    assert found["contrast"]["high"] < -0.5
    assert explain_depth(made_features({"frontier_state": 1.0}), resamples=50)["contrast"]["low"] > 0.5
    one_size = explain_depth(made_features({"frontier_state": 1.0}).assign(size=3), resamples=10)
    assert "size" not in one_size["terms"]


def test_a_contrast_that_hangs_on_the_last_place_turns_where_places_are_known():
    """Depth is 1 where an answer ends and else follows size. That nothing is enabled says where it ends, so the state
    seems to explain depth. It was published as a finding once."""
    table = made_features({"size": 0.3})
    end = table.groupby("example").cumcount(ascending=False) == 0
    table["depth"] = table["depth"].where(~end, 1) - 4.0 * end
    table["enabled_state"] = np.where(end, 0, 1 + table["enabled_state"].abs())
    table["place"] = np.where(end, "end", "middle")
    found = explain_depth(table, resamples=50)
    assert found["contrast"]["low"] > 0
    assert found["contrast_given_place"]["high"] < 0
    assert explain_depth(table.drop(columns="place"), resamples=10)["contrast_given_place"] is None


def test_features_of_the_token_count_for_neither_side_in_the_last_contrast():
    """Depth follows the degree of the vertex that was read, which the paper's grouping calls static."""
    table = made_features({})
    assert (table.groupby("example")["degree_static"].nunique() > 1).any()
    table["edges_static"] = table["size"] * 2 + table["example"] % 3
    table["depth"] = table["degree_static"] + 0.5 * table["frontier_state"]
    found = explain_depth(table, resamples=50)
    assert found["contrast"]["high"] < 0
    assert found["contrast_given_token"]["low"] > 0
    same = explain_depth(table.assign(degree_static=table["example"] % 5), resamples=10)
    assert same["contrast_given_token"] is None


def test_a_contrast_of_lines_turns_where_a_state_that_is_no_line_is_a_category():
    """Size has a column for each value, so features that count were at a loss unless depth was linear in them."""
    table = made_features({"size": 0.3})
    table["depth"] += 2.0 * (table["frontier_state"] - 2.5).abs()
    found = explain_depth(table, resamples=50)
    assert found["contrast"]["high"] < 0
    assert found["contrast_of_categories"]["low"] > 0.3
    linear = explain_depth(made_features({"frontier_state": 1.0}), resamples=20)
    values = [linear[name]["value"] for name in ("contrast", "contrast_of_categories")]
    assert values[0] == pytest.approx(values[1], abs=0.01)
    # A feature of many values is cut.
    many = table.assign(many_static=np.random.default_rng(SEED).normal(size=len(table)))
    assert explain_depth(many, resamples=10)["contrast_of_categories"]["low"] > 0.3
    assert explain_depth(table.drop(columns=["frontier_state", "enabled_state"]), resamples=10)["contrast"] is None


def test_shares_agree_with_statsmodels():
    import statsmodels.api as sm

    table = made_features({"frontier_state": 0.5, "hub_static": 0.3, "size": 0.2})
    found = explain_depth(table, resamples=10)
    design = pd.get_dummies(table["size"], drop_first=True, dtype=float).rename(columns=str)
    features = table[["degree_static", "hub_static", "frontier_state", "enabled_state"]].astype(float)

    def r2(columns):
        return sm.OLS(table["depth"], sm.add_constant(columns)).fit().rsquared_adj

    assert found["r2"]["value"] == pytest.approx(r2(design.join(features)))
    assert found["terms"]["size"]["alone"]["value"] == pytest.approx(r2(design))
    lost = r2(design.join(features)) - r2(design.join(features.drop(columns=["hub_static"])))
    assert found["terms"]["hub_static"]["lost"]["value"] == pytest.approx(lost)


def test_a_feature_that_says_nothing_new_is_left_out_and_named():
    table = made_features({"frontier_state": 1.0})
    table["copy_state"] = 2 * table["frontier_state"] + 1
    table["same_static"] = 4
    table["size_static"] = table["size"]
    found = explain_depth(table, resamples=10)
    assert found["left_out"] == ["copy_state", "same_static", "size_static"]
    assert explain_depth(table.assign(depth=2.0))["reason"] == "depth is constant"
    assert "at least 30" in explain_depth(table[table["example"] < 3])["reason"]


@pytest.mark.parametrize("name", METRICS)
def test_metrics_load_offline_and_their_examples_hold(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metric = evaluate.load(f"evaluate/metrics/{name}", experiment_id=str(tmp_path.name))
    parser = doctest.DocTestParser()
    example = parser.get_doctest(metric.inputs_description, {"evaluate": evaluate}, name, None, 0)
    assert example.examples
    results = doctest.DocTestRunner(verbose=False).run(example)
    assert results.failed == 0


def test_metrics_take_batches():
    metric = evaluate.load("evaluate/metrics/alignment")
    table = made_tokens(effect=2.0)
    for _, part in table.groupby(table.index // 300):
        metric.add_batch(
            predictions=part["depth"].tolist(),
            references=part["difficulty"].tolist(),
            sizes=part["size"].tolist(),
            examples=part["example"].tolist(),
            correct=part["correct"].tolist(),
        )
    found = metric.compute(resamples=30)
    assert found["all"]["difficulty"]["value"] == pytest.approx(align(table, resamples=1)["all"]["difficulty"]["value"])
