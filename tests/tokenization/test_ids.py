"""Token ids and sizes of vocabularies in configs."""

from hf_merge.tokenization.ids import ends_of, lost, renumbered, with_vocab_size

CONFIG = {
    "vocab_size": 10,
    "eos_token_id": [1, 2],
    "pad_token_id": None,
    "image_token_index": 3,
    "decoder_start_token_id": 9,
    "forced_bos_token_id": -1,
    "hidden_size": 1,
    "suppress_tokens": [1, 9, 3],
    "text_config": {"model_type": "x", "bos_token_id": 2, "vocab_size": 10},
    "vision_config": {"vocab_size": 7, "num_token_ids": 4},
}


def test_ids_move_and_other_numbers_stay():
    moved = renumbered(CONFIG, {1: 5, 2: 6, 3: 7}, {})
    assert moved["eos_token_id"] == [5, 6] and moved["pad_token_id"] is None and moved["image_token_index"] == 7
    assert moved["decoder_start_token_id"] is None and moved["forced_bos_token_id"] == -1
    assert moved["suppress_tokens"] == [5, 7] and moved["hidden_size"] == 1 and moved["vocab_size"] == 10
    assert moved["text_config"] == {"model_type": "x", "bos_token_id": 6, "vocab_size": 10}
    assert lost(CONFIG, moved) == ("decoder_start_token_id", "num_token_ids")


def test_ends_of_the_tokenizers_own_model_win():
    own = ends_of({"eos_token_id": 4, "text_config": {"pad_token_id": 0, "eos_token_id": 8}})
    assert own == {"eos_token_id": 4, "pad_token_id": 0}
    moved = renumbered(CONFIG, {}, own)
    assert moved["eos_token_id"] == 4 and moved["pad_token_id"] == 0 and moved["text_config"]["bos_token_id"] is None


def test_size_is_changed_wherever_it_is_that_of_the_rows():
    sized = with_vocab_size(CONFIG, {10: 12, 12: 14})
    assert sized["vocab_size"] == sized["text_config"]["vocab_size"] == 12 and sized["vision_config"]["vocab_size"] == 7
