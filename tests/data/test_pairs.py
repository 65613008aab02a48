

def test_a_row_in_place_of_a_pair_is_named():
    with pytest.raises(UserError, match="a pair is a dict, not a PromptPair"):
        batch_pairs(tiny_model("llama"), [{"clean": "a b", "corrupted": "a c", "answer": " d", "counter": " e"}])
