"""What depth is decided by: a regression on features of the instance and of the state (ANIRA section 6.4)."""

from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm

STATIC, STATE = "_static", "_state"

# The paper's own, and those in which more is known.
CONTRASTS = ("contrast", "contrast_given_place", "contrast_given_token", "contrast_of_categories")
# A feature of more values is cut into so many parts of about as many rows, where features are categories.
_CATEGORIES = 20


def explain_depth(table: pd.DataFrame, depth: str = "depth", resamples: int = 200, seed: int = 0) -> dict[str, Any]:
    """Least squares of depth on standardised features, with size as categories.

    Args:
        table: One row a token: `example`, `size`, depth, and features whose names end in `_static` or `_state`; and, if
            it has one, `place`, a category: where in the answer a token stands.
        depth: Column of the depths, expected or allocated, in iterations.
        resamples: Of the bootstrap over examples.

    Returns:
        `r2` of the whole; for `size`, every feature, and the groups `static`, `state` and `size and static`:
        `coefficient` (iterations per standard deviation, standard errors clustered by example; features alone), `alone`
        (share of the variance that it explains by itself) and `lost` (what the whole loses without it), each with
        `value`, `low`, `high`. `contrast`: what is lost without the state, less what is lost without size and static
        features. It hangs on what else is known, so it has companions: `contrast_given_place`, in a regression that
        knows the place too; `contrast_given_token`, which also leaves alone static features that change from token
        to token, such as the degree of the vertex that was read last; and `contrast_of_categories`, the first with all
        features as categories, as the size is: lines favour what is linear. None where there is nothing more to be
        known. All shares are adjusted for the number of columns, by that of tokens: with few examples, whose tokens are
        alike, those of features of the example come out too large. `left_out`: features that are constant, or say the
        same as others. `reason` where nothing can be said.
    """
    features = [name for name in table.columns if name.endswith((STATIC, STATE))]
    table = table.dropna(subset=[depth, *features])
    if table["example"].nunique() < 30:
        return _nothing(f"{table['example'].nunique()} examples; at least 30 are needed")
    if table[depth].nunique() < 2:
        return _nothing("depth is constant")
    sizes = pd.get_dummies(table["size"], prefix="size", drop_first=True, dtype=float)
    design, left_out = _drop_dependent(table[features].astype(float), sizes)
    features = [name for name in features if name in design.columns]
    of_tokens = [name for name in features if name.endswith(STATIC) and _varies_within(table, name)]
    groups = {
        "size": list(sizes.columns),
        **{name: [name] for name in features},
        "static": [name for name in features if name.endswith(STATIC)],
        "state": [name for name in features if name.endswith(STATE)],
        "size and static": [*sizes.columns, *(name for name in features if name.endswith(STATIC))],
    }
    groups = {name: columns for name, columns in groups.items() if columns}
    y = table[depth].astype(float)
    fit = sm.OLS(y, sm.add_constant(design)).fit(
        cov_type="cluster", cov_kwds={"groups": pd.factorize(table["example"])[0]}
    )
    places = pd.get_dummies(table["place"], prefix="place", drop_first=True, dtype=float) if "place" in table else None
    shares = _bootstrap_shares(design, places, of_tokens, y, table["example"], groups, resamples, seed)
    contrasts = {name: shares.get((name, "state less static")) for name in CONTRASTS}
    if contrasts["contrast"] is not None:
        contrasts["contrast_of_categories"] = _contrast_categories(table, features, sizes, y, resamples, seed)
    found: dict[str, Any] = {}
    for name in groups:
        found[name] = {"alone": shares[name, "alone"], "lost": shares[name, "lost"]}
        if name in features:
            low, high = fit.conf_int().loc[name]
            found[name]["coefficient"] = {"value": float(fit.params[name]), "low": float(low), "high": float(high)}
    return {
        "r2": shares["all", "r2"],
        "terms": found,
        **contrasts,
        "left_out": left_out,
        "n": len(table),
        "reason": "",
    }


def _contrast_categories(
    table: pd.DataFrame, features: list[str], sizes: pd.DataFrame, y: pd.Series, resamples: int, seed: int
) -> dict[str, float]:
    """The contrast where a column stands for each value of each feature."""
    parts = {"size": sizes}
    for name in features:
        values = table[name]
        if values.nunique() > _CATEGORIES:
            values = pd.qcut(values, _CATEGORIES, labels=False, duplicates="drop")
        parts[name] = pd.get_dummies(values, prefix=name, drop_first=True, dtype=float)
    static = [name for name in parts if name == "size" or name.endswith(STATIC)]
    groups = {
        group: [column for name in names for column in parts[name].columns]
        for group, names in (("size and static", static), ("state", [name for name in parts if name not in static]))
    }
    design = pd.concat(list(parts.values()), axis=1)
    shares = _bootstrap_shares(design, None, [], y, table["example"], groups, resamples, seed)
    return shares[CONTRASTS[0], "state less static"]


def _drop_dependent(features: pd.DataFrame, sizes: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """(standardised features after the sizes, those left out since the columns before them say the same)."""
    design, left_out = sizes, []
    for name, values in features.items():
        if np.ptp(values) < 1e-9:
            left_out.append(str(name))
            continue
        column = (values - values.mean()) / values.std(ddof=0)
        known = np.column_stack([np.ones(len(design)), design])
        rest = column - known @ np.linalg.lstsq(known, column, rcond=None)[0]
        if float((rest**2).mean()) < 1e-8:
            left_out.append(str(name))
        else:
            design = design.assign(**{str(name): column})
    return design, left_out


def _varies_within(table: pd.DataFrame, name: str) -> bool:
    """Whether a feature differs between tokens of one example."""
    return bool((table.groupby("example")[name].nunique() > 1).any())


def _bootstrap_shares(
    design: pd.DataFrame,
    places: pd.DataFrame | None,
    of_tokens: list[str],
    y: pd.Series,
    examples: pd.Series,
    groups: dict[str, list[str]],
    resamples: int,
    seed: int,
) -> dict[tuple[str, str], dict[str, float]]:
    """Shares of variance with 95 % intervals over resampled examples.

    A resample's regressions need only its sums of products, and those are sums over its examples.
    """
    known = pd.DataFrame(index=design.index) if places is None else places
    columns = np.column_stack([np.ones(len(design)), design, known, y])
    codes, _ = pd.factorize(examples)
    order = np.argsort(codes, kind="stable")
    parts = np.split(columns[order], np.flatnonzero(np.diff(codes[order])) + 1)
    products = np.stack([part.T @ part for part in parts])
    rng = np.random.default_rng(seed)
    names = [*design.columns, *known.columns]
    where = {
        name: [1 + names.index(column) for column in own]
        for name, own in {**groups, "place": list(known.columns), "of tokens": of_tokens}.items()
    }
    whole = _shares(products.sum(0), where)
    drawn: dict[tuple[str, str], list[float]] = {key: [] for key in whole}
    for _ in range(resamples):
        weights = np.bincount(rng.integers(len(products), size=len(products)), minlength=len(products))
        for key, value in _shares(np.tensordot(weights, products, 1), where).items():
            drawn[key].append(value)
    found = {}
    for key, value in whole.items():
        # Reflected at the value (the basic interval): resampling repeats rows, which raises every R^2 a little more.
        low, high = 2 * value - np.quantile(drawn[key], [0.975, 0.025])
        found[key] = {"value": value, "low": float(low), "high": float(high)}
    return found


def _shares(products: np.ndarray, where: dict[str, list[int]]) -> dict[tuple[str, str], float]:
    """R^2 of the whole, of each group alone, and the loss without it; and the contrasts.

    `products`: sums of products of (1, columns, y). `where`: the columns of each group; "place" and "of tokens" are
    known beside them in the contrasts alone.
    """
    groups = {name: own for name, own in where.items() if name not in ("place", "of tokens")}
    every = [column for column in range(1, len(products) - 1) if column not in where["place"]]
    full = _r2(products, every)
    found = {("all", "r2"): full}
    for name, own in groups.items():
        found[name, "alone"] = _r2(products, own)
        found[name, "lost"] = full - _r2(products, [column for column in every if column not in own])
    if "size and static" in groups and "state" in groups:
        found[CONTRASTS[0], "state less static"] = found["state", "lost"] - found["size and static", "lost"]
        everything = [*every, *where["place"]]
        of_instance = [column for column in groups["size and static"] if column not in where["of tokens"]]
        if where["place"]:
            found[CONTRASTS[1], "state less static"] = _contrast(
                products, everything, groups["state"], groups["size and static"]
            )
        if where["of tokens"] and of_instance:
            found[CONTRASTS[2], "state less static"] = _contrast(products, everything, groups["state"], of_instance)
    return found


def _contrast(products: np.ndarray, every: list[int], state: list[int], static: list[int]) -> float:
    """What R^2 loses without `state`, less what it loses without `static`: the R^2 of all but each, the other way."""
    without_state, without_static = (
        _r2(products, [column for column in every if column not in own]) for own in (state, static)
    )
    return without_static - without_state


def _r2(products: np.ndarray, places: list[int]) -> float:
    chosen = [0, *places]
    normal, right = products[np.ix_(chosen, chosen)], products[chosen, -1]
    explained = right @ np.linalg.lstsq(normal, right, rcond=1e-10)[0]
    mean = products[0, -1] ** 2 / products[0, 0]
    total = products[-1, -1] - mean
    if total < 1e-12:
        return 0.0
    # Adjusted: columns of noise explain nothing on average.
    count, used = products[0, 0], len(places)
    unexplained = max(0.0, 1 - (explained - mean) / total)
    return float(1 - unexplained * (count - 1) / max(1.0, count - 1 - used))


def _nothing(reason: str) -> dict[str, Any]:
    return {"r2": None, "terms": {}, **dict.fromkeys(CONTRASTS), "left_out": [], "n": 0, "reason": reason}
