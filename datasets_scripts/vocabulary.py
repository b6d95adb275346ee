"""The words of all tasks and their ids. The order is part of the data: a trained model depends on it."""

import string
from collections.abc import Sequence

PAD, UNKNOWN, BOS, EOS, ANSWER, QUERY, PLUS, MINUS, TIMES = range(9)
MAX_LENGTH_WORD = 64
NUM_NUMBERS = 256
NUM_LETTERS = 26

_SIGNS = ("<pad>", "<unk>", "<bos>", "<eos>", "<ans>", "<query>", "+", "-", "*")
FIRST_LENGTH = len(_SIGNS)
FIRST_NUMBER = FIRST_LENGTH + MAX_LENGTH_WORD
FIRST_LETTER = FIRST_NUMBER + NUM_NUMBERS
FIRST_LAST_LETTER = FIRST_LETTER + NUM_LETTERS

WORDS: tuple[str, ...] = (
    *_SIGNS,
    *(f"<len_{length}>" for length in range(1, MAX_LENGTH_WORD + 1)),
    *(str(number) for number in range(NUM_NUMBERS)),
    *string.ascii_lowercase,
    *string.ascii_uppercase,
)
IDS: dict[str, int] = {word: identity for identity, word in enumerate(WORDS)}


def encode(text: str) -> list[int]:
    """The ids of whitespace-separated words. Raises a ValueError that names a word that no task knows."""
    try:
        return [IDS[word] for word in text.split()]
    except KeyError as error:
        raise ValueError(f"The text has the word {error.args[0]!r}, which is not in the vocabulary.") from None


def decode(ids: Sequence[int]) -> str:
    """The words of `ids`, separated by one space each. Raises a ValueError that names an id that no word has."""
    for identity in ids:
        if not 0 <= identity < len(WORDS):
            raise ValueError(f"The id {identity} is not in the vocabulary: ids are 0 to {len(WORDS) - 1}.")
    return " ".join(WORDS[identity] for identity in ids)
