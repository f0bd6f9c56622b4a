from scfg_fast.models.vocabulary import vocabulary
from training.tokenizer import MAX_TOKENS, load_tokenizer, write_tokenizer


def test_every_vocabulary_word_is_one_token_and_other_text_still_encodes(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.model_max_length == MAX_TOKENS
    for word in vocabulary():
        start, middle, end = tokenizer(word).input_ids
        assert tokenizer.convert_ids_to_tokens(middle) == f"{word}</w>"
        assert (start, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    unknown = tokenizer("a zebra's café").input_ids
    assert tokenizer.unk_token_id not in unknown[1:-1]


def test_the_longest_caption_fits():
    caption = "on the left a purple butterfly, on the right a yellow basketball on a checkered yellow background"
    assert len(caption.replace(",", " ,").split()) + 2 <= MAX_TOKENS
