import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention.detokenizer import Detokenizer
from attention.sequence import FinishReason
from tests.attention.fake_decoder import make_byte_tokenizer, make_sequence

TOKENIZER = make_byte_tokenizer()


@given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9)), st.data())
def test_token_ids_are_those_of_prompt_and_output_joined(prompt, output, data):
    sequence = make_sequence(prompt)
    sequence.output_token_ids += output
    start = data.draw(st.integers(0, sequence.num_tokens))
    stop = data.draw(st.integers(start, sequence.num_tokens))
    assert sequence.token_ids(start, stop) == [*prompt, *output][start:stop]


def test_generation_ends_with_max_tokens():
    sequence = make_sequence(max_tokens=2)
    assert sequence.advance(5).finish_reason is None
    assert sequence.advance(6).finish_reason is FinishReason.LENGTH


def test_generation_ends_with_the_context():
    sequence = make_sequence(prompt=[1, 2, 3], max_tokens=9, max_num_tokens=4)
    assert sequence.advance(5).finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(("ignore_eos", "reason"), [(False, FinishReason.STOP), (True, None)])
def test_end_of_sequence_token_ends_unless_ignored(ignore_eos, reason):
    sequence = make_sequence(eos_token_ids=frozenset({257}), ignore_eos=ignore_eos)
    output = sequence.advance(257)
    assert (output.finish_reason, output.matched_stop, output.token_ids) == (reason, None, (257,))


def test_stop_token_is_reported_and_gives_no_text():
    decoder = Detokenizer(TOKENIZER)
    sequence = make_sequence(stop_token_ids=(65,), text_decoder=decoder, ignore_eos=True)
    assert sequence.advance(66).text == "B"
    output = sequence.advance(65)
    assert (output.finish_reason, output.matched_stop, output.token_ids, output.text) == (
        FinishReason.STOP,
        65,
        (65,),
        "",
    )


def test_stop_string_ends_even_with_the_last_allowed_token():
    decoder = Detokenizer(TOKENIZER, stop=["bc"])
    sequence = make_sequence(max_tokens=3, text_decoder=decoder)
    texts = [sequence.advance(byte) for byte in b"abc"]
    assert "".join(output.text for output in texts) == "a"
    assert (texts[-1].finish_reason, texts[-1].matched_stop) == (FinishReason.STOP, "bc")


def test_text_held_back_for_a_stop_string_comes_with_the_last_output():
    decoder = Detokenizer(TOKENIZER, stop=["bcd"])
    sequence = make_sequence(max_tokens=3, text_decoder=decoder)
    outputs = [sequence.advance(byte) for byte in b"abc"]
    assert [output.text for output in outputs] == ["a", "", "bc"]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
