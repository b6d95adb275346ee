"""The paper's findings beside ours (ANIRA, arXiv 2602.08864). Its figures are known at second hand."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from metrics.decision_timing.analysis import CONTRASTS
from pages import show

# Spearman's correlation that the paper reports on MANO, BREVO and LANO, on correct items.
_ALIGNMENT = (0.6, 0.7)
_SIZE_ALONE_EARLY = 0.28
# What is less is called none, however sure it is: correlations, differences of shares, iterations that depth goes on
# rising or falling by beyond the training sizes.
_LEAST_ALIGNMENT = 0.2
_LEAST_CONTRAST = 0.05
_LEAST_RISE = 0.05
# Accuracy that differs by no more is equal.
_EQUAL_ACCURACY = 0.05


@dataclass(frozen=True)
class Claim:
    """One row of the report's first table; `holds` is "yes", "partly" (weaker), "no" or "unknown" (undecided)."""

    finding: str
    paper: str
    run: str
    ours: str
    holds: str


def judge(name: str, metrics: dict[str, Any]) -> list[Claim]:
    """All findings that a run speaks to: `fixed` to none, deciders that are not the paper's to all but the last.

    `name`: what tables call the run.
    """
    decider = metrics["decider"]
    if decider == "fixed":
        return []
    analyses = metrics["analyses"]
    # A task that knows the exact distribution (LANO) has a difficulty for each token, and none for the whole; and no
    # prompt of it asks for more than training had.
    sampled = "kl" in metrics["given"]
    findings: dict[str, Callable[[str, dict[str, Any]], Claim]] = {
        "alignment": _token_alignment if sampled else _alignment,
        **({} if sampled else {"generalization": partial(_generalization, metrics["size_limit"])}),
        "dynamics": _phases,
    }
    if decider in ("early", "online"):
        findings["decision_timing"] = partial(_decision_timing, decider)
    judged = []
    for part, claim in findings.items():
        own = analyses[part]
        failed = set(own) == {"reason"}
        judged.append(
            Claim(part, "", name, f"not measured: {own['reason']}", "unknown") if failed else claim(name, own)
        )
    return judged


def _alignment(name: str, found: dict[str, Any]) -> Claim:
    value, by_place, but_end = (
        found[unit]["exit_depth"]["correct"]["size"] for unit in ("per_example", "same_place", "but_end")
    )
    ours = f"{show(value)}; by place alone {show(by_place)}; without the answer's end {show(but_end)}"
    holds = _judge_alignment(value, by_place)
    return Claim("Depth follows size (Spearman, correct items)", "0.6 to 0.7; about 0.66 on MANO", name, ours, holds)


def _token_alignment(name: str, found: dict[str, Any]) -> Claim:
    value, by_place = (
        found[unit]["exit_depth"]["correct"]["difficulty"] for unit in ("per_token", "per_token_same_place")
    )
    ours = f"{show(value)}; by place alone {show(by_place)}"
    holds = _judge_alignment(value, by_place)
    return Claim("Depth follows the difficulty of each token (Spearman)", "0.6 to 0.7", name, ours, holds)


def _judge_alignment(value: dict[str, Any], by_place: dict[str, Any]) -> str:
    """Holds if the correlation is as high as the paper's, and higher than what the place in the answer alone gives.

    Not if it is not higher than that, or hardly there.
    """
    if value["value"] is None or value["low"] is None or value["low"] <= 0 <= value["high"]:
        return "unknown"
    beats_place = by_place["high"] is None or value["low"] > by_place["high"]
    if value["value"] < _LEAST_ALIGNMENT or not beats_place:
        return "no"
    return "yes" if value["value"] >= _ALIGNMENT[0] else "partly"


def _generalization(limit: int, name: str, found: dict[str, Any]) -> Claim:
    """Holds if, beyond the limit, accuracy is lower by half of what it was, and depth is higher and goes on rising.

    Not if depth surely falls there or stays, or accuracy surely stays, to 0.05; else it is undecided.
    """
    beyond = found["beyond"]
    finding = "Beyond the training sizes accuracy falls sharply while depth keeps rising"
    if beyond["verdict"] is None:
        return Claim(finding, "no figures known", name, f"not measured: {beyond['reason']}", "unknown")
    accuracy, depth, slope = beyond["accuracy_change"], beyond["depth_change"], beyond["depth_slope"]
    sizes = [row["size"] for row in found["by_size"] if row["size"] > limit]
    span = max(sizes) - min(sizes)
    across = slope and {bound: slope[bound] * span for bound in ("value", "low", "high")}
    ours = (
        f"accuracy {show(accuracy)}, depth {show(depth)} beyond against within; "
        f"depth from the least to the largest beyond, by a line, {show(across)}"
    )
    sharply = accuracy["high"] < -0.5 * beyond["accuracy_within"]
    goes_on = 0 if across is None or abs(across["value"]) < _LEAST_RISE else _sign(across)
    higher = depth["low"] > 0
    if sharply and higher and goes_on > 0:
        holds = "yes"
    elif accuracy["high"] < 0 and higher and goes_on >= 0:
        holds = "partly"
    else:
        against = goes_on < 0 or depth["high"] < _LEAST_RISE or accuracy["low"] > -_EQUAL_ACCURACY
        holds = "no" if against else "unknown"
    return Claim(finding, "no figures known", name, ours, holds)


def _sign(estimate: dict[str, Any]) -> int:
    """1 or -1 where the interval is on one side of 0, else 0."""
    return int(estimate["low"] > 0) - int(estimate["high"] < 0)


def _phases(name: str, found: dict[str, Any]) -> Claim:
    """Holds if depth and accuracy rise in the first phase, and depth falls in the second at equal accuracy, to 0.05.

    Partly if depth falls in the end, and accuracy stays; a fall that goes with learning is none of it. A curve in which
    no turn was found decides nothing: one may be there that its few points do not show.
    """
    finding = "Two phases: depth rises while the task is learnt, then falls at equal accuracy"
    if found["phases"] is None:
        return Claim(finding, "turn near step 50,000", name, f"not measured: {found['reason']}", "unknown")
    ours, changes = found["phases"], found["accuracy_change"] or []
    if found["turn"]:
        turn = found["turn"]
        ours += f"; turn at step {turn['value']:.0f} ({turn['low']:.0f} to {turn['high']:.0f})"
    if changes:
        ours += "; accuracy " + ", then ".join(f"{change:+.2f}" for change in changes)
    falls_at_equal = found["phases"].endswith("fall") and bool(changes) and abs(changes[-1]) <= _EQUAL_ACCURACY
    learnt_first = len(changes) == 2 and changes[0] > _EQUAL_ACCURACY
    if found["phases"] == "rise, then fall" and learnt_first and falls_at_equal:
        holds = "yes"
    elif falls_at_equal:
        holds = "partly"
    else:
        holds = "no" if found["turn"] else "unknown"
    return Claim(finding, "turn near step 50,000", name, ours, holds)


def _decision_timing(decider: str, name: str, found: dict[str, Any]) -> Claim:
    """Holds by the sign of what is lost without the state, less what is lost without size and static features.

    Only where it is one sign, and no trifle, for depth as allocated and as expected, and whatever else the regression
    knows.
    """
    whole, early = found["expected_depth"], decider == "early"
    finding = (
        "Early depth is explained by size and static features"
        if early
        else "Online depth is explained by the state of the execution"
    )
    paper = (
        f"size alone {_SIZE_ALONE_EARLY:.0%} of the variance" if early else "the three state features, whatever size"
    )
    if whole["r2"] is None:
        return Claim(finding, paper, name, f"not measured: {whole['reason']}", "unknown")
    terms = whole["terms"]
    shares = {group: show(terms[group]["lost"]) for group in ("state", "size and static") if group in terms}
    size = f"size alone {show(terms['size']['alone'])}; " if "size" in terms else ""
    ours = size + "; ".join(f"lost without {group} {share}" for group, share in shares.items())
    contrasts = [own[name] for own in found.values() for name in CONTRASTS if own.get(name) is not None]
    if contrasts:
        values = [contrast["value"] for contrast in contrasts]
        ours += f"; difference {min(values):.2f} to {max(values):.2f}, by depth and by what else is known"
    signs = {0 if abs(contrast["value"]) < _LEAST_CONTRAST else _sign(contrast) for contrast in contrasts}
    if signs not in ({1}, {-1}):
        return Claim(finding, paper, name, ours, "unknown")
    return Claim(finding, paper, name, ours, "yes" if (signs == {1}) != early else "no")
