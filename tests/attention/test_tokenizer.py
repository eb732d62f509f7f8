import json

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from attention.tokenizer import BadTokenizer, ChatTemplateRefused, NoChatTemplate, Tokenizer
from tests.attention.fake_decoder import make_byte_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system text must come first') }}{% endif %}"
    "{{ message['role'] }}: {{ message['content'] }}\n\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [
    {"role": "user", "content": "héllo 😀"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "?"},
]


def write_checkpoint(folder, *, template=TEMPLATE, adds_bos_itself=True, **config):
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<bos>", "<eos>")])
    tokenizer.train_from_iterator(
        ["hello"] * 3,
        tokenizers.trainers.BpeTrainer(
            special_tokens=["<bos>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    if adds_bos_itself:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", "add_bos_token": True, **config}
    if template is not None:
        values["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("adds_bos_itself", [True, False])
def test_text_gets_one_bos_whoever_adds_it(tmp_path, adds_bos_itself):
    tokenizer = Tokenizer.read(write_checkpoint(tmp_path, adds_bos_itself=adds_bos_itself))
    ids = tokenizer.encode_text("hello")
    assert ids[0] == 0
    assert ids.count(0) == 1
    assert tokenizer.encode_text("<bos>hello") == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"


def test_chat_is_what_transformers_makes_of_it_and_has_one_bos(tmp_path):
    tokenizer = Tokenizer.read(write_checkpoint(tmp_path))
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<bos>", eos_token="<eos>", chat_template=TEMPLATE
    )
    ids = tokenizer.encode_chat(CHAT)
    assert tokenizer.render_chat(CHAT) == oracle.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ids == oracle.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ids.count(0) == 1


def test_template_that_refuses_the_messages_says_why(tmp_path):
    tokenizer = Tokenizer.read(write_checkpoint(tmp_path))
    with pytest.raises(ChatTemplateRefused, match="system text must come first"):
        tokenizer.encode_chat([*CHAT, {"role": "system", "content": "late"}])


def test_template_cannot_leave_its_sandbox(tmp_path):
    tokenizer = Tokenizer.read(write_checkpoint(tmp_path, template="{{ messages.__class__.__mro__ }}"))
    with pytest.raises(ChatTemplateRefused):
        tokenizer.encode_chat(CHAT)


def test_chat_without_a_template_is_refused(tmp_path):
    tokenizer = Tokenizer.read(write_checkpoint(tmp_path, template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(NoChatTemplate, match="send text"):
        tokenizer.encode_chat(CHAT)


def test_template_may_be_a_file_or_one_of_a_list(tmp_path):
    listed = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "listed"}]
    write_checkpoint(tmp_path, template=listed)
    assert Tokenizer.read(tmp_path).render_chat(CHAT) == "listed"
    (tmp_path / "chat_template.jinja").write_text("from a file")
    assert Tokenizer.read(tmp_path).render_chat(CHAT) == "from a file"


def test_end_of_sequence_tokens_are_all_that_any_file_names(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    assert Tokenizer.read(tmp_path).eos_token_ids == {1, 7, 8, 9}


def test_an_end_token_outside_the_models_vocabulary_ends_nothing_and_is_told_with_its_file(tmp_path, caplog):
    write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 100001]}')  # the vocabulary was pruned
    (tmp_path / "config.json").write_text('{"eos_token_id": 320}')
    assert Tokenizer.read(tmp_path, vocab_size=320).eos_token_ids == {1}
    for name, token_id in (("generation_config.json", 100001), ("config.json", 320)):
        assert f"{tmp_path / name}: end token {token_id} is outside the vocabulary of 320 tokens" in caplog.text
    assert Tokenizer.read(tmp_path, vocab_size=1).eos_token_ids == set()
    assert f"{tmp_path / 'tokenizer.json'}: end token 1 is outside" in caplog.text


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ('"x"', "'x'"),
        ('"1"', "'1'"),
        ("[1, -1]", r"\[1, -1\]"),
        (str(2**32), str(2**32)),
        ("true", "True"),
        ("{}", "{}"),
    ],
)
def test_end_tokens_that_are_none_are_refused_with_their_file(tmp_path, name, value, shown):
    write_checkpoint(tmp_path)
    (tmp_path / name).write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(BadTokenizer, match=rf"/{name}: eos_token_id is {shown}, must be a token id or a list of them"):
        Tokenizer.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}'),
        ("tokenizer_config.json", '{"chat_template": 3}'),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content):
    write_checkpoint(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(BadTokenizer):
        Tokenizer.read(tmp_path)


def test_byte_tokenizer_of_the_tests_is_one_token_a_byte():
    tokenizer = make_byte_tokenizer()
    assert tokenizer.encode_text("aé<eos>") == [97, 195, 169, 257]
    assert tokenizer.token_texts([97, 195, 257]) == ["a", "�", "<eos>"]
    assert tokenizer.vocab_size == 258
