"""A checkpoint's chat template: a program in the jinja language that somebody published, so it runs in a sandbox.

It reaches no attributes, files or modules, and what it makes is bounded. It may still loop for long: who serves a
checkpoint runs its template.
"""

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2.exceptions import SecurityError

MAX_CHARS = 16 * 1024 * 1024  # of a rendered chat, and of what a multiplication in a template makes


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str) -> None:
        """Raises jinja2.TemplateError."""
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_template_error
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except RecursionError as error:
            raise jinja2.TemplateError("it is nested too deeply") from error

    def render(self, **values: Any) -> str:
        """Raises jinja2.TemplateError."""
        parts, num_chars = [], 0
        try:
            for part in self._template.generate(**values):
                num_chars += len(part)
                if num_chars > MAX_CHARS:
                    raise jinja2.TemplateError(f"it makes more than {MAX_CHARS} characters")
                parts.append(part)
        except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:  # the template's own
            raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error
        return "".join(parts)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The rules of transformers, whose templates are written for them, and bounds on what grows fastest."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("powers are not allowed in chat templates")
        for sequence, count in ((left, right), (right, left)):
            is_repeated = isinstance(sequence, str | bytes | list | tuple) and isinstance(count, int)
            if is_repeated and len(sequence) * count > MAX_CHARS:
                raise SecurityError(f"a product of {len(sequence)} and {count} is too long")
        return super().call_binop(context, operator, left, right)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_template_error(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(time_format: str) -> str:
    return datetime.now().strftime(time_format)  # the server's local time, as transformers gives it
