import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attention.detokenizer import Detokenizer
from tests.attention.fake_decoder import make_byte_tokenizer

TOKENIZER = make_byte_tokenizer()
TEXTS = st.text(st.sampled_from("ab \néß€漢字😀👩‍👩‍👧�"), max_size=20)


def pieces(token_ids, stop=(), skip_special_tokens=True):
    detokenizer = Detokenizer(TOKENIZER, stop=stop, skip_special_tokens=skip_special_tokens)
    texts = []
    for token_id in token_ids:
        texts.append(detokenizer.push(token_id))
        if detokenizer.matched_stop is not None:
            break
    return [*texts, detokenizer.flush()], detokenizer.matched_stop


@given(TEXTS)
def test_pieces_of_a_text_join_to_the_text_and_never_split_a_character(text):
    texts, _ = pieces(list(text.encode()))
    assert "".join(texts) == text
    if "�" not in text:
        assert all("�" not in piece for piece in texts)


@settings(max_examples=300)
@given(st.lists(st.one_of(st.integers(0, 257), st.sampled_from([0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xFF, 65])), max_size=40))
@example([0xE2, 256, 0x82, 0xAC])
@example([0xFF] * 12 + [0xE2, 0x82, 0xAC])
@example([0xF0, 0x9F, 0x98])
@pytest.mark.parametrize("skips", [True, False])
def test_pieces_of_any_tokens_join_to_what_the_tokenizer_decodes(skips, token_ids):
    texts, _ = pieces(token_ids, skip_special_tokens=skips)
    assert "".join(texts) == TOKENIZER.decode(token_ids, skip_special_tokens=skips)


class LongestDecode:
    """Remembers of how many tokens at once text was made."""

    def __init__(self):
        self.num_token_ids = 0

    def decode(self, token_ids, *, skip_special_tokens):
        self.num_token_ids = max(self.num_token_ids, len(token_ids))
        return TOKENIZER.decode(token_ids, skip_special_tokens=skip_special_tokens)


EOS, UNKNOWN = 257, 299


@pytest.mark.parametrize("repeated", [[EOS], [UNKNOWN], [0xFF], [0x80], [0xEF, 0xBF, 0xBD], [0xF0, 0x9F], [0xE2, EOS]])
@pytest.mark.parametrize("before", [b"", b"a", b"\xe2"])
def test_the_work_for_a_token_is_constant_whatever_is_repeated(repeated, before):
    decoder = LongestDecode()
    detokenizer = Detokenizer(decoder)
    token_ids = [*before, *(repeated * 100), *"€".encode()]
    texts = [detokenizer.push(token_id) for token_id in token_ids]
    assert "".join([*texts, detokenizer.flush()]) == TOKENIZER.decode(token_ids, skip_special_tokens=True)
    assert decoder.num_token_ids <= 32


def test_a_first_token_without_text_of_its_own_still_counts_for_the_next_one():
    class Stripping:
        """As sentencepiece: one space at the beginning of a text is left out; token 0 is special."""

        def decode(self, token_ids, *, skip_special_tokens):
            texts = ["" if skip_special_tokens else "<s>", " ", " word"]
            return "".join(texts[token_id] for token_id in token_ids).removeprefix(" ")

    detokenizer = Detokenizer(Stripping())
    assert [detokenizer.push(token_id) for token_id in (0, 1, 0, 2, 0, 2)] == ["", "", "", " word", "", " word"]


def test_text_comes_as_soon_as_its_character_is_whole():
    texts, _ = pieces(list("a€b".encode()))
    assert texts == ["a", "", "", "€", "b", ""]


def test_special_tokens_are_skipped_unless_wanted():
    assert pieces([65, 257, 66])[0] == ["A", "", "B", ""]
    assert "".join(pieces([65, 257, 66], skip_special_tokens=False)[0]) == "A<eos>B"


def cut_at_first_stop(text, stops):
    """The stop string that ends first counts; of those that end together, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=300)
@given(st.text("ab€", max_size=20), st.lists(st.text("ab€", min_size=1, max_size=5), max_size=4))
@example("aab", ["ab"])
@example("abab", ["bab", "ab"])
def test_text_is_cut_before_the_stop_string_that_ends_first(text, stops):
    texts, matched = pieces(list(text.encode()), stop=stops)
    assert ("".join(texts), matched) == cut_at_first_stop(text, stops)


def test_text_that_may_become_a_stop_string_is_held_back():
    texts, matched = pieces(list(b"xSTOxSTOPy"), stop=["STOP"])
    assert texts == ["x", "", "", "", "STOx", "", "", "", "", ""]
    assert matched == "STOP"


def test_stop_string_inside_a_longer_piece_cuts_the_rest_of_it():
    class Words:
        def decode(self, token_ids, *, skip_special_tokens):
            return "".join(["one ", "two END three", "four"][token_id] for token_id in token_ids)

    detokenizer = Detokenizer(Words(), stop=["END"])
    assert [detokenizer.push(0), detokenizer.push(1), detokenizer.flush()] == ["one ", "two ", ""]
    assert detokenizer.matched_stop == "END"
