"""Tasks made from CPython's library: answers stand in their questions, labels fit their texts."""

import io
import tokenize

import pytest

from moe_hf import MoEError, library_tasks
from moe_hf.library_tasks import LIBRARY_TASKS, TOKEN_CLASSES, library_task


@pytest.fixture(scope="module", autouse=True)
def few_files():
    code = library_tasks.builtin_corpus()
    few = code.select([i for i, name in enumerate(code["document"]) if name.split("/")[0] in ("json", "logging")])
    patch = pytest.MonkeyPatch()
    patch.setattr(library_tasks, "builtin_corpus", lambda: few)
    library_tasks.library_functions.cache_clear()
    yield
    patch.undo()
    library_tasks.library_functions.cache_clear()


@pytest.mark.parametrize("name", LIBRARY_TASKS)
def test_every_row_has_a_document_and_a_domain(name):
    rows = library_task(name)
    assert len(rows) > 20
    assert {document.split("/")[0] for document in rows["document"]} == {"json", "logging"}
    assert all(rows["domain"])


def test_answers_stand_in_their_context():
    for row in library_task("builtin_questions"):
        request, answer = (message["content"] for message in row["messages"])
        assert answer == row["answer"]
        assert answer in request.rsplit("\n\n", 1)[0]


def test_a_rejected_docstring_is_another_function_s():
    for row in library_task("builtin_preferences"):
        assert row["chosen"][0]["content"] != row["rejected"][0]["content"]
        assert row["prompt"][0]["role"] == "user"


def test_word_classes_are_python_s():
    for row in library_task("builtin_tokens").select(range(20)):
        assert len(row["tokens"]) == len(row["tags"]) and set(row["tags"]) <= set(TOKEN_CLASSES)
        assert row["tokens"][0] == "def" and row["tags"][0] == "keyword"
        assert all(tag == "operator" for word, tag in zip(row["tokens"], row["tags"], strict=True) if word in "():,")


def test_labelled_functions_are_python():
    for row in library_task("builtin_functions").select(range(20)):
        assert row["label"] == row["document"].split("/")[0]
        assert list(tokenize.generate_tokens(io.StringIO(row["text"]).readline))


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(MoEError, match="builtin_questions"):
        library_task("builtin_answers")
