"""One tokenizer for all tasks, loaded by the stock class, whose token i is word i of the text."""

import pytest
from transformers import AutoTokenizer

from datasets_scripts import get_task, make_tokenizer
from datasets_scripts.columns import make_table
from datasets_scripts.vocabulary import WORDS, decode, encode


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize("name", ["mano-paper", "brevo-paper", "brevo-paper-words", "lano-mini"])
def test_text_to_ids_to_text_is_the_identity(tokenizer, name):
    task = get_task(name)
    batch = task.generate("extrapolation", range(20))
    for number, row in enumerate(make_table(task, batch).to_pylist()):
        ids = tokenizer(row["text"])["input_ids"]
        assert ids == batch.tokens[batch.offsets[number] : batch.offsets[number + 1]].tolist() == encode(row["text"])
        assert len(ids) == row["num_tokens"] == len(row["token_difficulty"])
        assert tokenizer.decode(ids) == row["text"] == decode(ids)
        assert row["text"] == f"{row['prompt']} {row['completion']}"
        assert tokenizer(row["prompt"])["input_ids"] == ids[: row["answer_start"]]


def test_padding_is_on_the_left_and_is_not_the_end(tokenizer):
    batch = tokenizer(["<bos> 1", "<bos> 1 2 3"], padding=True)
    assert batch["input_ids"][0][:2] == [tokenizer.pad_token_id] * 2
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == len(WORDS) == len(set(WORDS))


def test_texts_longer_than_a_model_can_be_cut():
    """Trained models had tokenizers without a length: `truncation=True` cut nothing, and the model raised."""
    cut = make_tokenizer(3)
    assert cut("<bos> 1 2 3", truncation=True)["input_ids"] == cut("<bos> 1 2")["input_ids"]


def test_unknown_words_are_an_error_in_our_own_code(tokenizer):
    assert tokenizer("<bos> 999")["input_ids"] == [tokenizer.bos_token_id, tokenizer.unk_token_id]
    with pytest.raises(ValueError, match="'999', which is not in the vocabulary"):
        encode("<bos> 999")
    with pytest.raises(ValueError, match="id 9999 is not in the vocabulary"):
        decode([9999])
