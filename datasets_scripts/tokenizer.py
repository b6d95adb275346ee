"""The tokenizer of all tasks, as transformers knows it."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from datasets_scripts.vocabulary import ANSWER, BOS, EOS, IDS, PAD, QUERY, UNKNOWN, WORDS


def make_tokenizer(max_length: int | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that adds no token: token i of a text is word i. Pads on the left, as generation needs.

    An unknown word becomes `<unk>`, as stock pipelines expect; `vocabulary.encode` raises instead. `max_length` is that
    of a model, in tokens: longer texts bring a warning, or are cut where a caller asks for that (`truncation=True`).
    """
    words = Tokenizer(WordLevel(dict(IDS), unk_token=WORDS[UNKNOWN]))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=WORDS[PAD],
        unk_token=WORDS[UNKNOWN],
        bos_token=WORDS[BOS],
        eos_token=WORDS[EOS],
        additional_special_tokens=[WORDS[ANSWER], WORDS[QUERY]],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,  # None: as long as there is
    )
