"""Which tokens of an example are learnt."""

from collections.abc import Sequence

IGNORED = -100


def make_labels(input_ids: Sequence[int], answer_start: int, loss_on: str, never: Sequence[int] = ()) -> list[int]:
    """The labels of one example, one a token (models shift them themselves): -100 where nothing is to be learnt.

    Args:
        input_ids: Ids of prompt and answer.
        answer_start: Index of the answer's first token.
        loss_on: "completion": the answer alone. "all": the prompt as well.
        never: Ids that are no target under "all". The tasks' `<ans>` only says where the prompt ends, which in LANO
            nobody could know.
    """
    if loss_on == "completion":
        return [IGNORED] * answer_start + list(input_ids[answer_start:])
    return [IGNORED if token in never else token for token in input_ids]
