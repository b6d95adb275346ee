"""What a task is: a config, a generator, labels for every token, and a verifier."""

import dataclasses
import numbers
import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np

from datasets_scripts.randomness import SPLITS, hundredths, stream_key
from datasets_scripts.vocabulary import ANSWER, BOS, EOS, IDS, PAD, UNKNOWN, WORDS


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Refuses the field `name` with its `value` unless `condition` holds."""
    if not condition:
        raise ValueError(f"`{name}` is {value!r}, but must be {allowed}.")


@dataclass(frozen=True)
class TaskConfig:
    """The sizes of a task: `min_size`..`max_size` in train, validation and test, up to `extrapolation_size` beyond."""

    min_size: int
    max_size: int
    extrapolation_size: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type is int:
                value = getattr(self, field.name)
                # Python takes True for 1.
                whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
                require(whole, field.name, value, "a whole number")
        require(self.min_size >= 1, "min_size", self.min_size, "at least 1")
        require(self.max_size >= self.min_size, "max_size", self.max_size, f"at least min_size={self.min_size}")
        allowed = f"at least max_size={self.max_size}"
        require(self.extrapolation_size >= self.max_size, "extrapolation_size", self.extrapolation_size, allowed)

    def size_range(self, split: str) -> tuple[int, int]:
        """The least and the largest size in `split`."""
        require(split in SPLITS, "split", split, f"one of {SPLITS}")
        if split != "extrapolation":
            return self.min_size, self.max_size
        allowed = f"above max_size={self.max_size}, for there are no larger instances to draw"
        require(self.extrapolation_size > self.max_size, "extrapolation_size", self.extrapolation_size, allowed)
        return self.max_size + 1, self.extrapolation_size


@dataclass(frozen=True)
class Batch:
    """Examples one after the other: tokens of example r are `tokens[offsets[r]:offsets[r + 1]]`.

    Args:
        tokens: Ids (total,), int32.
        offsets: (rows + 1,), int64.
        answer_start: Index of the first completion token within its example, (rows,), int32.
        size: (rows,), int32.
        instance: Hash of the canonical form, which decides the split, (rows,), uint64.
        derived: Token features that only the generator knows, each (total,).
    """

    tokens: np.ndarray
    offsets: np.ndarray
    answer_start: np.ndarray
    size: np.ndarray
    instance: np.ndarray
    derived: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.size)


@dataclass(frozen=True)
class Labels:
    """
    Args:
        difficulty: (rows,), int32.
        token_difficulty: (total,), float32.
        features: Each (total,), int32, in the order of the task's `features`.
    """

    difficulty: np.ndarray
    token_difficulty: np.ndarray
    features: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Verdict:
    """Whether a completion is right, and in one sentence why not."""

    correct: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.correct


class MalformedError(ValueError):
    """A prompt or completion that is not of the task's form."""


Tokens = str | Sequence[int]


class Task(ABC):
    """A task with its config. Label i describes position i: what is needed, having read tokens 0..i, to predict i+1."""

    name: ClassVar[str]
    config_class: ClassVar[type[TaskConfig]]
    features: ClassVar[dict[str, str]]
    size_meaning: ClassVar[str]
    difficulty_meaning: ClassVar[str]
    token_difficulty_meaning: ClassVar[str]
    scoring: ClassVar[str]
    sampled: ClassVar[bool] = False
    """Whether answers are sampled at temperature 1; else they are greedy."""

    def __init__(self, config: TaskConfig) -> None:
        self.config = config

    @abstractmethod
    def draw(
        self, key: np.uint64, sizes: tuple[int, int], part: tuple[int, int], weighted: bool, indices: np.ndarray
    ) -> Batch:
        """Draws examples; each depends on `key` and its index alone.

        Args:
            key: Of the stream.
            sizes: The least and the largest.
            part: The first hundredth, and one past the last, to which an instance's hash modulo 100 must belong.
            weighted: Whether sizes follow the task's weights; else they are uniform.
            indices: (rows,), int64.

        Raises:
            ValueError: If no such instance can be found; see `refuse_empty`.
        """

    @abstractmethod
    def label(self, batch: Batch) -> Labels:
        """The labels of a batch, from its tokens (and, where it has any, from `derived`)."""

    @abstractmethod
    def check(self, prompt: list[int], completion: list[int]) -> str:
        """Why the completion (ids, without `<eos>`) of a prompt (with `<bos>` and `<ans>`) is wrong; "" if right."""

    @abstractmethod
    def longest_example(self, size: int) -> int:
        """Tokens that an example of `size` has at most."""

    @abstractmethod
    def longest_answer(self, size: int) -> int:
        """Tokens that the completion of an example of `size` has at most, `<eos>` included."""

    def written_size(self, tokens: list[int], size: int) -> int:
        """Size of the example that a model wrote to a prompt of an example of `size`: the prompt mostly settles it."""
        return size

    def size_word(self, size: int) -> int | None:
        """Id of the word by which prompts say their size; None where they do not say it."""
        return None

    def exact_distribution(self, tokens: np.ndarray) -> tuple[list[int], np.ndarray] | None:
        """(ids that can follow, their exact probabilities at every position (n, ids)), where the task knows them."""
        return None

    def num_instances(self, split: str) -> int | None:
        """How many instances have the sizes of `split`, over all splits of the same sizes; None if not known."""
        return None

    def settings(self) -> dict[str, Any]:
        """The config as plain values: with the split, the seed and the index, all that an example depends on."""
        return dataclasses.asdict(self.config)

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "Task":
        """The task with the config that `settings()` gave."""
        return cls(cls.config_class(**settings))

    def generate(self, split: str, indices: Sequence[int] | np.ndarray, seed: int = 0) -> Batch:
        """Draws examples. Sizes in `train` follow the task's weights; the other splits draw them uniformly."""
        sizes = self.config.size_range(split)
        key = stream_key(self.name, self.settings(), split, operator.index(seed))
        indices = np.asarray(indices, dtype=np.int64)
        require(bool((indices >= 0).all()), "indices", indices.tolist()[:5], "at least 0")
        return self.draw(key, sizes, hundredths(split), split == "train", indices)

    def verify(self, prompt: Tokens, completion: Tokens) -> Verdict:
        """Whether `completion` answers `prompt`, both as text or as ids; never raises on what they hold.

        Words after `<eos>` must be `<pad>`: a batch that was generated is as long as its longest answer.
        """
        try:
            question = read_ids(prompt, "prompt")
            if question[:1] != [BOS] or question[-1:] != [ANSWER] or question.count(ANSWER) != 1:
                raise MalformedError("The prompt does not begin with <bos> and end with its only <ans>.")
            reason = self.check(question, until_end(read_ids(completion, "completion")))
        except MalformedError as error:
            reason = str(error)
        return Verdict(not reason, reason)


def read_ids(tokens: Tokens, name: str) -> list[int]:
    """Text or ids as ids; raises a MalformedError that names a word or id that no task knows."""
    if isinstance(tokens, str):
        ids = [IDS.get(word, UNKNOWN) for word in tokens.split()]
        if UNKNOWN in ids:
            malformed(f"The {name} has the word {tokens.split()[ids.index(UNKNOWN)]!r}, which no task knows.")
        return ids
    ids = []
    for identity in tokens:
        whole = isinstance(identity, numbers.Integral) and not isinstance(identity, bool)
        if not whole or not 0 <= identity < len(WORDS) or identity == UNKNOWN:
            malformed(f"The {name} has the id {identity!r}, which no task knows.")
        ids.append(int(identity))
    return ids


def until_end(completion: list[int]) -> list[int]:
    """The tokens before `<eos>`; raises a MalformedError if there is no end, or more than padding after it."""
    if EOS not in completion:
        malformed("The completion does not end with <eos>.")
    end = completion.index(EOS)
    if any(identity != PAD for identity in completion[end + 1 :]):
        malformed("The completion goes on after <eos>.")
    return completion[:end]


def malformed(reason: str) -> NoReturn:
    """Raises a MalformedError."""
    raise MalformedError(reason)


def refuse_empty(task: Task, sizes: tuple[int, int], part: tuple[int, int]) -> NoReturn:
    """Raises the ValueError for a split in which no instance could be found."""
    raise ValueError(
        f"`{task.name}` found no instance of sizes {sizes[0]} to {sizes[1]} in hundredths {part[0]} to {part[1] - 1} "
        "that the split has of all instances: there are too few. Allow larger sizes."
    )
