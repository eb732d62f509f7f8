"""The training text: three recognisable kinds, and conversations built from them.

`python` is the standard library of the running interpreter, `english` is Python's documentation, `c` is CPython's
headers; all are under the Python Software Foundation licence (PSF-2.0). `chat` holds questions whose answers are
docstrings of the standard library, in the chat template's form. Nothing is downloaded; the order is deterministic.
"""

import ast
import hashlib
import pydoc_data.topics
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Kind(StrEnum):
    PYTHON = "python"
    ENGLISH = "english"
    C = "c"
    CHAT = "chat"


SHARES = {Kind.PYTHON: 0.42, Kind.ENGLISH: 0.40, Kind.C: 0.10, Kind.CHAT: 0.08}  # of the training tokens

_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data", "lib2to3"}
)
_MAX_BYTES = 300_000  # above this a file is a generated table
_HELD_OUT_ONE_IN = 40  # this share of the sources is never trained on

_QUESTIONS = {
    "module": ("Document the module {name}.", "What is the module {name} for?", "What does the module {name} do?"),
    "class": ("What is the class {name}?", "Document the class {name}.", "What does the class {name} do?"),
    "function": (
        "What does the function {name} do?",
        "Document the function {name}.",
        "How do I use the function {name}?",
    ),
}
_MAX_ANSWER_CHARACTERS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    kind: Kind
    source: str  # path relative to its root; conversations have that of their module
    text: str

    @property
    def is_held_out(self) -> bool:
        """Decided by the source alone, so that a module and the conversations about it are held out together."""
        return hashlib.sha256(self.source.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0


def collect(documentation: Path | None = None, seed: int = 0) -> list[Document]:
    """All documents, shuffled.

    documentation: a folder of the documentation's reStructuredText sources (Debian: package python3-doc); by default
    the usual places are tried, and if there are none the topics of `help()` take their place.
    """
    library = Path(sysconfig.get_path("stdlib"))
    documents = list(_read(library, "*.py", Kind.PYTHON))
    documents += _read(Path(sysconfig.get_path("include")), "*.h", Kind.C)
    documents += _english(documentation or _documentation_folder())
    documents += [chat for document in documents if document.kind is Kind.PYTHON for chat in _conversations(document)]
    random.Random(seed).shuffle(documents)
    return documents


def _read(root: Path, pattern: str, kind: Kind) -> Iterator[Document]:
    """Each distinct text below `root`, in the order of the paths."""
    seen = set()
    for path in sorted(root.rglob(pattern)):
        source = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(source.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:
            continue  # a few old modules are in other encodings
        digest = hashlib.sha256(text.encode()).digest()
        if text and len(text) <= _MAX_BYTES and digest not in seen:
            seen.add(digest)
            yield Document(kind=kind, source=str(source), text=text + "\n")


def _documentation_folder() -> Path | None:
    candidates = sorted(Path("/usr/share/doc").glob("python3*/html/_sources"))
    same_version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates.sort(key=lambda folder: same_version not in folder.parts)
    return candidates[0] if candidates else None


def _english(folder: Path | None) -> Iterator[Document]:
    if folder is None:
        for topic, text in sorted(pydoc_data.topics.topics.items()):
            yield Document(kind=Kind.ENGLISH, source=topic, text=text.strip() + "\n")
        return
    for document in _read(folder, "*.rst*", Kind.ENGLISH):
        yield Document(kind=Kind.ENGLISH, source=document.source, text=_plain(document.text))


def _plain(text: str) -> str:
    """reStructuredText with fewer marks: no roles, labels or index entries, so that prose is most of it."""
    text = re.sub(
        r"^\.\. (_[^\n]*:|(module|section)author::.*|index::.*(\n +\S.*)*|versionadded::.*)\n", "", text, flags=re.M
    )
    text = re.sub(r":[a-z:]+:`[~!]?([^`<]+?)(?:\s*<[^`>]*>)?`", r"`\1`", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _conversations(document: Document) -> Iterator[Document]:
    """One conversation for each docstring of a module's public names."""
    module = document.source.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    if module.startswith("_"):
        return
    tree = ast.parse(document.text)
    for noun, name, docstring in _docstrings(tree, module):
        answer = docstring.strip()
        if len(answer) > _MAX_ANSWER_CHARACTERS:
            answer = answer[:_MAX_ANSWER_CHARACTERS].rpartition("\n\n")[0] or answer.partition("\n\n")[0]
        choice = hashlib.sha256(name.encode()).digest()[0]
        question = _QUESTIONS[noun][choice % len(_QUESTIONS[noun])].format(name=name)
        yield Document(kind=Kind.CHAT, source=document.source, text=f"User: {question}\n\nAssistant: {answer.strip()}")


def _docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str, str]]:
    """(noun, qualified name, docstring) of the module and of the public classes, functions and methods in it."""
    if docstring := ast.get_docstring(tree):
        yield "module", module, docstring
    pending = [(node, module) for node in tree.body]
    while pending:
        node, prefix = pending.pop(0)
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if docstring := ast.get_docstring(node):
            yield "class" if isinstance(node, ast.ClassDef) else "function", name, docstring
        if isinstance(node, ast.ClassDef):
            pending += [(child, name) for child in node.body]
