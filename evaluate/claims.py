"""The paper's findings beside ours (ANIRA, arXiv 2602.08864). Its figures are known at second hand."""

from dataclasses import dataclass
from typing import Any

# Spearman's correlation that the paper reports on MANO, BREVO and LANO, on correct items.
_ALIGNMENT = (0.6, 0.7)
_SIZE_ALONE_EARLY = 0.28


@dataclass(frozen=True)
class Claim:
    """One row of the report's first table; `holds` is "yes", "partly", "no" or "unknown"."""

    finding: str
    paper: str
    run: str
    ours: str
    holds: str


def judge(name: str, metrics: dict[str, Any]) -> list[Claim]:
    """All findings that a run speaks to. `name`: what tables call it."""
    analyses = metrics["analyses"]
    if "alignment" not in analyses:
        return [Claim("all", "", name, f"not measured: {analyses.get('reason', 'no analyses')}", "unknown")]
    judged = []
    if metrics["decider"] in ("early", "online"):
        judged += [_alignment(name, analyses), _generalization(name, analyses), _phases(name, analyses)]
        judged.append(_timing(name, metrics["decider"], analyses))
    else:
        judged.append(_generalization(name, analyses))
    return judged


def show(estimate: dict[str, Any] | None, digits: int = 2) -> str:
    """An estimate as text: value and interval, or the reason why there is none."""
    if not estimate or estimate.get("value") is None:
        return f"not defined: {(estimate or {}).get('reason', 'nothing measured')}"
    value = f"{estimate['value']:.{digits}f}"
    if estimate.get("low") is None:
        return value
    return f"{value} ({estimate['low']:.{digits}f} to {estimate['high']:.{digits}f})"


def _alignment(name: str, analyses: dict[str, Any]) -> Claim:
    found = analyses["alignment"]["per_example"]["exit_depth"]["correct"]["size"]
    if found["value"] is None:
        holds = "unknown"
    elif found["low"] is not None and found["low"] <= 0:
        holds = "no"
    else:
        holds = "yes" if (found["high"] or found["value"]) >= _ALIGNMENT[0] else "partly"
    return Claim(
        "Depth follows size (Spearman, correct items)", "0.6 to 0.7; about 0.66 on MANO", name, show(found), holds
    )


def _generalization(name: str, analyses: dict[str, Any]) -> Claim:
    found = analyses["generalization"]["beyond"]
    finding = "Beyond the training sizes accuracy falls sharply while depth keeps rising"
    if found["verdict"] is None:
        return Claim(finding, "no figures known", name, f"not measured: {found['reason']}", "unknown")
    accuracy, depth = found["accuracy_change"], found["depth_change"]
    ours = f"accuracy {show(accuracy)}, depth {show(depth)} beyond against within"
    falls, rises = accuracy["high"] < 0, depth["low"] > 0
    return Claim(finding, "no figures known", name, ours, "yes" if falls and rises else "partly" if falls else "no")


def _phases(name: str, analyses: dict[str, Any]) -> Claim:
    found = analyses["dynamics"]
    finding = "Two phases: depth rises while the task is learnt, then falls at equal accuracy"
    if found["phases"] is None:
        return Claim(finding, "turn near step 50,000", name, f"not measured: {found['reason']}", "unknown")
    ours = found["phases"] if found["phases"] != "none" else f"none: {found['reason']}"
    if found.get("turn"):
        turn = found["turn"]
        ours += f"; turn at step {turn['value']:.0f} ({turn['low']:.0f} to {turn['high']:.0f})"
    if found.get("accuracy_change"):
        ours += "; accuracy " + ", then ".join(f"{change:+.2f}" for change in found["accuracy_change"])
    holds = {"rise, then fall": "yes", "flat, then fall": "partly", "fall": "partly"}.get(found["phases"], "no")
    return Claim(finding, "turn near step 50,000", name, ours, holds)


def _timing(name: str, decider: str, analyses: dict[str, Any]) -> Claim:
    found = analyses["timing"]["expected_depth"]
    early = decider == "early"
    finding = (
        "Early depth is explained by size and static features"
        if early
        else "Online depth is explained by the state of the execution"
    )
    paper = (
        f"size alone {_SIZE_ALONE_EARLY:.0%} of the variance" if early else "coefficients on the three state features"
    )
    if found["r2"] is None:
        return Claim(finding, paper, name, f"not measured: {found['reason']}", "unknown")
    terms = found["terms"]
    static, state = (terms.get(group, {}).get("lost") for group in ("static", "state"))
    size = terms["size"]
    ours = f"size alone {show(size['alone'])}; lost without state {show(state)}, without static {show(static)}"
    if not static or not state:
        return Claim(finding, paper, name, ours, "unknown")
    # What each group adds that the other does not have; size counts with the static ones.
    static_low, static_high = static["low"] + size["lost"]["low"], static["high"] + size["lost"]["high"]
    if early:
        clear, against = static_low > state["high"], static_high < state["low"]
    else:
        clear, against = state["low"] > static_high, state["high"] < static_low
    return Claim(finding, paper, name, ours, "yes" if clear else "no" if against else "partly")
