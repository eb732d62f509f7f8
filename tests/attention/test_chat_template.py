"""What a published chat template may not do to who serves it."""

import time
from pathlib import Path

import jinja2
import pytest

from attention.chat_template import MAX_CHARS, ChatTemplate
from attention.request import GenerationDefaults
from attention.tokenizer import BadTokenizer, Tokenizer
from tests.attention.test_tokenizer import write_checkpoint

HOSTILE = {
    "attributes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "modules": "{{ self.__init__.__globals__ }}",
    "functions": "{{ raise_exception.__globals__['json'] }}",
    "a long text": "{{ 'x' * 10000000000 }}",
    "a long list": "{{ [0] * 10000000000 }}",
    "a product the other way round": "{{ 10000000000 * 'x' }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a long range": "{% for i in range(10000000000) %}x{% endfor %}",
    "a long output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "changed arguments": "{{ messages.append(1) }}",
    "a wrong type": "{{ 1 + 'x' }}",
    "a division by zero": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_template_is_refused_at_once(case: str) -> None:
    started_s = time.monotonic()
    with pytest.raises(jinja2.TemplateError):
        print(ChatTemplate(HOSTILE[case]).render(messages=[{"role": "user", "content": "x"}]))
    assert time.monotonic() - started_s < 5.0


def test_format_strings_reach_no_attributes() -> None:
    assert "class" not in ChatTemplate("{{ '{0.__class__}'.format(messages) }}").render(messages=[])


def test_a_template_nested_too_deeply_is_none() -> None:
    with pytest.raises(jinja2.TemplateError):
        ChatTemplate("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}")


def test_ordinary_products_are_computed() -> None:
    assert ChatTemplate("{{ '-' * 3 }}{{ 2 * 21 }}").render() == "---42"
    assert len(ChatTemplate("{{ 'x' * n }}").render(n=MAX_CHARS)) == MAX_CHARS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"a":' * 100_000),
        ("tokenizer_config.json", "[" * 1_000_000),
        ("tokenizer_config.json", '{"chat_template": [3, {"name": "default", "template": 4}]}'),
        ("generation_config.json", '{"eos_token_id": [[1]]}'),
        ("generation_config.json", '{"eos_token_id": "' + "1" * 1_000_000 + '"}'),
        ("config.json", "[" * 1_000_000),
    ],
)
def test_tokenizer_files_that_lie_are_named(tmp_path: Path, name: str, content: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(BadTokenizer, match=name.replace(".", r"\.")) as raised:
        Tokenizer.read(tmp_path)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("content", ["[" * 1_000_000, '{"temperature": 1e999}', '{"top_k": "x"}', "[]", "\x00"])
def test_generation_defaults_that_lie_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(BadTokenizer, match=r"generation_config\.json"):
        GenerationDefaults.read(tmp_path)
