"""Rollouts as tokens: as the generator saw them, and what is said of cuts."""

from rollout_lines import SEEN, USER, draw


def test_notes_tell_of_unknown_keys_and_cuts(build, tiny_text):
    line = {"messages": USER, "token_ids": [5] * 30, "finish_reson": "length"}
    table = build(tiny_text, line, max_length=20, max_prompt_length=8)
    assert table[0]["problem"] == ""
    prompt = len(tiny_text.apply_chat_template(USER, add_generation_prompt=True)["input_ids"])
    assert table[0]["notes"] == [
        "unknown key 'finish_reson'; did you mean 'finish_reason'?",
        "it counts as ended by itself, but its last token, 5, is no end of sequence",
        f"prompt of {prompt} tokens truncated to its last 8",
        "completion of 30 tokens is longer than the limit, its last 18 are left out (labels keep the whole length)",
    ]
    assert (table[0]["prompt_length"], table[0]["length"], len(table[0]["input_ids"])) == (8, 30, 20)


def test_images_for_a_text_model_are_refused(build, tiny_text, tmp_path):
    draw(tmp_path / "a.png")
    table = build(tiny_text, {"messages": SEEN, "images": ["a.png"], "completion": "a"})
    assert table[0]["problem"].endswith("the model reads text only: use datamodules.VisionRollouts")


def test_text_is_tokenised_as_the_generator_saw_it(build, tiny_text):
    stopped = {"messages": USER, "completion": " So 7."}
    table = build(tiny_text, stopped, {**stopped, "finish_reason": "length"})
    prompt = tiny_text("<|im_start|>user\nAdd 3 and 4, please.<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    answer = tiny_text(" So 7.")["input_ids"]
    assert table[0]["input_ids"] == [*prompt, *answer, tiny_text.eos_token_id]
    assert table[1]["input_ids"] == [*prompt, *answer]  # it was truncated: nobody generated an EOS
    assert table["censored"] == [False, True]
    assert table["length"] == [len(answer) + 1, len(answer)]


def test_token_ids_are_kept_as_they_were_generated(build, tiny_text):
    ids = [tiny_text.convert_tokens_to_ids(c) for c in "Three"] + [tiny_text.eos_token_id]
    assert ids[:-1] != tiny_text("Three")["input_ids"]  # the tokenizer would write it shorter
    row = build(tiny_text, {"messages": USER, "completion": "Three", "token_ids": ids})[0]
    assert row["input_ids"][row["prompt_length"] :] == ids
    assert row["length"] == len(ids)


def test_a_segment_is_labelled_to_the_token_that_completes_its_text(build, tiny_text):
    """The text inside a token, at the end of one, not there, and cut before and after it."""

    def ids(text):
        return tiny_text(text, add_special_tokens=False)["input_ids"]

    end = tiny_text.eos_token_id
    first, both, rest = ids("So it is 7."), ids("\n\n"), ids("The answer is 7.")
    assert len(both) == 1  # a token that holds more than one end of a line
    whole = {"messages": USER, "completion": "", "token_ids": [*first, *both, *rest, end]}
    none = {**whole, "token_ids": [*first, *rest, end]}
    cut_behind = {**whole, "token_ids": [*first, *both, *rest], "finish_reason": "length"}
    cut_before = {**whole, "token_ids": first[:-1], "finish_reason": "length"}
    for until in ("\n", "\n\n"):
        table = build(tiny_text, whole, none, cut_behind, cut_before, until=until)
        found = [row["input_ids"][row["prompt_length"] :] for row in table]
        # States behind the text are not in the row, so that none of them is supervised.
        assert found == [[*first, *both], [*first, *rest, end], [*first, *both], first[:-1]]
        assert table["length"] == [len(row) for row in found]
        assert table["censored"] == [False, False, False, True]
        assert not any(any("no end of sequence" in note for note in row["notes"]) for row in table)


def test_a_segment_longer_than_a_row_keeps_its_length(build, tiny_text):
    line = {"messages": USER, "token_ids": [5] * 30 + tiny_text("\n\n")["input_ids"] + [6] * 9}
    row = build(tiny_text, line, max_length=20, max_prompt_length=8, until="\n\n")[0]
    assert (row["length"], len(row["input_ids"]), row["censored"]) == (31, 20, False)


def test_segments_of_rows_with_images(build, tiny_vl, tmp_path):
    draw(tmp_path / "a.png")
    ids = tiny_vl.tokenizer("Red.\nTwo.", add_special_tokens=False)["input_ids"]
    line = {
        "messages": SEEN,
        "images": ["a.png"],
        "completion": "",
        "token_ids": [*ids, tiny_vl.tokenizer.eos_token_id],
    }
    row = build(tiny_vl, line, until="\n")[0]
    written = row["input_ids"][row["prompt_length"] :]
    assert tiny_vl.tokenizer.decode(written) == "Red.\n"
    assert row["length"] == len(written)
    assert row["images"]
