"""The paper's findings beside ours (ANIRA, arXiv 2602.08864). Its figures are known at second hand."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from metrics.decision_timing.analysis import CONTRASTS
from metrics.dynamics.analysis import LEAST_CHANGE
from pages import show

# Spearman's correlation that the paper reports on MANO, BREVO and LANO, on correct items.
ALIGNMENT = (0.6, 0.7)
_SIZE_ALONE_EARLY = 0.28
# What is less is called none, however sure it is: correlations, what is left of them, differences of shares, iterations
# that depth goes on rising or falling by beyond the training sizes.
LEAST_ALIGNMENT = 0.2
_LEAST_BESIDE = 0.1
_LEAST_CONTRAST = 0.05
_LEAST_RISE = 0.05
# Accuracy that differs by no more is equal.
_EQUAL_ACCURACY = 0.05


@dataclass(frozen=True)
class Claim:
    """One row of the report's first table; `holds` is "yes", "partly" (weaker), "no" or "unknown" (undecided).

    `part` names the analysis that it is read from.
    """

    finding: str
    paper: str
    run: str
    ours: str
    holds: str
    part: str = ""


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
        **(
            {} if sampled else {"generalization": partial(_generalization, metrics["size_limit"], metrics["max_depth"])}
        ),
        "dynamics": _phases,
    }
    if decider in ("early", "online"):
        findings["decision_timing"] = partial(_decision_timing, decider)
    judged = []
    for part, claim in findings.items():
        own = analyses[part]
        failed = set(own) == {"reason"}
        found = Claim(part, "", name, f"not measured: {own['reason']}", "unknown") if failed else claim(name, own)
        judged.append(replace(found, part=part))
    return judged


def _alignment(name: str, found: dict[str, Any]) -> Claim:
    whole, without_end = (found[unit]["exit_depth"]["correct"] for unit in ("per_example", "but_end"))
    value, beside = whole["size balanced"], whole["size given length"]
    ours = (
        f"{show(value)}, each size weighing the same; as rows come {show(whole['size'])}; given the answer's length "
        f"{show(beside)}; without the answer's end {show(without_end['size balanced'])}"
    )
    holds = _judge_alignment(value, beside)
    return Claim("Depth follows size (Spearman, correct items)", "0.6 to 0.7; about 0.66 on MANO", name, ours, holds)


def _token_alignment(name: str, found: dict[str, Any]) -> Claim:
    own = found["per_token"]["exit_depth"]["correct"]
    value, beside = own["difficulty"], own["difficulty given cell"]
    ours = f"{show(value)}; given the place in the answer {show(beside)}"
    holds = _judge_alignment(value, beside)
    return Claim("Depth follows the difficulty of each token (Spearman)", "0.6 to 0.7", name, ours, holds)


def _judge_alignment(value: dict[str, Any], beside: dict[str, Any]) -> str:
    """Holds if the correlation is surely as high as the paper's, and something is left given the place or the length.

    Not if it, or what is left, is surely hardly there; what the intervals leave open is unknown.
    """
    if value["low"] is None or beside["low"] is None:
        return "unknown"
    if value["high"] < LEAST_ALIGNMENT or beside["high"] < _LEAST_BESIDE:
        return "no"
    if value["low"] < LEAST_ALIGNMENT or beside["low"] <= 0:
        return "unknown"
    return "yes" if value["low"] >= ALIGNMENT[0] else "partly"


def _generalization(limit: int, deepest: int, name: str, found: dict[str, Any]) -> Claim:
    """Holds if, beyond the limit, accuracy is lower by half of what it was, and depth is higher and goes on rising.

    Partly if accuracy is surely lower and depth higher, but may or may not go on rising. Not if depth surely falls
    there or stays, to 0.05 from the least size to the largest, or accuracy surely stays, to 0.05; else it is undecided.
    Depth must do so without the answer's end, over all answers and over those that end, and at `<ans>`, or it is
    undecided too; and where prompts say their size, both must do so with known words for it.
    """
    parts = [found[part] for part in ("beyond", "beyond_ended", "beyond_first") if part in found]
    beyond, known = parts[0], found.get("beyond_known_words")
    finding = "Beyond the training sizes accuracy falls sharply while depth keeps rising"
    if beyond["verdict"] is None:
        return Claim(finding, "no figures known", name, f"not measured: {beyond['reason']}", "unknown")
    sizes = [row["size"] for row in found["by_size"] if row["size"] > limit]
    span = max(sizes) - min(sizes)
    across = [show(_across(part, span)) for part in parts]
    ours = (
        f"accuracy {show(beyond['accuracy_change'])}, depth without the answer's end {show(beyond['depth_change'])} "
        f"beyond against within; from the least to the largest beyond, by a line, {across[0]}"
    )
    if len(parts) == 3:
        ours += f", of answers that end {across[1]}, at <ans> {across[2]}"
    verdicts = {_judge_beyond(beyond, part, span, deepest) for part in parts}
    if known is not None:
        ours += (
            f"; with a known word for the size, accuracy {show(known['accuracy_change'])}, depth "
            f"{show(known['depth_change'])} and {show(_across(known, span))}"
        )
        verdicts.add(_judge_beyond(known, known, span, deepest))
    return Claim(finding, "no figures known", name, ours, verdicts.pop() if len(verdicts) == 1 else "unknown")


def _across(beyond: dict[str, Any], span: int) -> dict[str, float] | None:
    """By how much depth changes beyond the limit, from the least size to the largest, by the line through it."""
    slope = beyond.get("depth_slope")
    return slope and {bound: slope[bound] * span for bound in ("value", "low", "high")}


def _judge_beyond(whole: dict[str, Any], own: dict[str, Any], span: int, deepest: int) -> str:
    """The verdict by the accuracy of all answers, `whole`, and the depth of some, `own`."""
    if own["verdict"] is None or own["depth_beyond"] > deepest - _LEAST_RISE:
        return "unknown"  # nothing is known, or nothing can rise
    accuracy, depth, across = whole["accuracy_change"], own["depth_change"], _across(own, span)
    sharply = accuracy["high"] < -0.5 * whole["accuracy_within"]
    goes_on = 0 if across is None or abs(across["value"]) < _LEAST_RISE else _sign(across)
    stays = across is not None and max(abs(across["low"]), abs(across["high"])) < _LEAST_RISE
    higher = depth["low"] > 0
    if sharply and higher and goes_on > 0:
        return "yes"
    if accuracy["high"] < 0 and higher and goes_on >= 0 and not stays:
        return "partly"
    against = goes_on < 0 or stays or depth["high"] < _LEAST_RISE or accuracy["low"] > -_EQUAL_ACCURACY
    return "no" if against else "unknown"


def _sign(estimate: dict[str, Any]) -> int:
    """1 or -1 where the interval is on one side of 0, else 0."""
    return int(estimate["low"] > 0) - int(estimate["high"] < 0)


def _phases(name: str, found: dict[str, Any]) -> Claim:
    """Holds if depth rises while most is learnt, and then falls at equal accuracy, to 0.05.

    Partly if it then falls at no loss, having risen or not; not if it falls while most is learnt, or accuracy is lost,
    or it does not fall. Unknown if it falls by no more than noise would make it.
    """
    finding = "Two phases: depth rises while the task is learnt, then falls at equal accuracy"
    paper = "turn near step 50,000"
    if found["phases"] is None:
        return Claim(finding, paper, name, f"not measured: {found['reason']}", "unknown")
    changes = found["accuracy_change"] or []
    ours = f"up {found['rise']:.2f} iterations, then down {found['fall']:.2f}"
    if found["turn"] is not None:
        ours += f" from step {found['turn']:.0f} on"
    if changes:
        ours += "; accuracy " + ", then ".join(f"{change:+.2f}" for change in changes)
    if len(changes) < 2:
        return Claim(finding, paper, name, ours, "no" if changes and found["fall"] < LEAST_CHANGE else "unknown")
    learnt_first = changes[0] > max(_EQUAL_ACCURACY, changes[1])
    holds = "no"
    if learnt_first and changes[1] >= -_EQUAL_ACCURACY:
        equal = changes[1] <= _EQUAL_ACCURACY
        holds = "yes" if found["phases"] == "rise, then fall" and equal else "partly"
    return Claim(finding, paper, name, ours, holds)


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
        ours += (
            f"; the first less the second {min(values):.2f} to {max(values):.2f}, by depth and by what else is known"
        )
    signs = {0 if abs(contrast["value"]) < _LEAST_CONTRAST else _sign(contrast) for contrast in contrasts}
    if signs not in ({1}, {-1}):
        return Claim(finding, paper, name, ours, "unknown")
    return Claim(finding, paper, name, ours, "yes" if (signs == {1}) != early else "no")
