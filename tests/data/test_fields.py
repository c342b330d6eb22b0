"""Where a row's text is: keys, paths into nested values, templates."""

import pytest

from lmjax.data.fields import NoText, parse_template, text_of

pytestmark = pytest.mark.fast
ROW = {
    "title": "A title",
    "message": {"content": "some words", "size": 3},
    "turns": [{"text": "first"}, {"text": "second"}],
    "a.b": "a key with a dot",
    "a": {"b": "not this one"},
    "none": None,
}


@pytest.mark.parametrize(
    ("text_field", "text"),
    [
        ("title", "A title"),
        ("message.content", "some words"),
        ("turns.1.text", "second"),
        ("a.b", "a key with a dot"),
        ("{title}", "A title"),
        ("{title}\n\n{message.content}", "A title\n\nsome words"),
        ("{{{title}}}: {turns.0.text}{title}!", "{A title}: firstA title!"),
    ],
)
def test_a_text_is_found(text_field, text):
    assert text_of(ROW, parse_template(text_field)) == text


@pytest.mark.parametrize(
    ("text_field", "reason"),
    [
        ("body", "no object with the key 'body'"),
        ("{title}{body}", "no object with the key 'body'"),
        ("message.text", "nothing under 'message.text'"),
        ("title.inner", "nothing under 'title.inner'"),
        ("turns.2.text", "nothing under 'turns.2.text'"),
        ("turns.text", "nothing under 'turns.text'"),
        ("message", "the value of 'message' is not text"),
        ("message.size", "the value of 'message.size' is not text"),
        ("none", "the value of 'none' is not text"),
    ],
)
def test_why_there_is_no_text_is_told(text_field, reason):
    with pytest.raises(NoText) as error:
        text_of(ROW, parse_template(text_field))
    assert str(error.value) == reason


@pytest.mark.parametrize("row", [None, [1], "text", 3])
def test_what_is_no_object_has_no_text(row):
    with pytest.raises(NoText, match="no object with the key"):
        text_of(row, parse_template("title"))


@pytest.mark.parametrize(
    ("text_field", "message"),
    [
        ("{title", "a brace of the text is written twice"),
        ("title}", "a brace of the text is written twice"),
        ("{{title}}", "which names no field"),
        ("{}", "a field is written as"),
        ("{title:>3}", "a field is written as"),
        ("{title!r}", "a field is written as"),
    ],
)
def test_a_template_that_makes_no_sense_is_refused(text_field, message):
    with pytest.raises(ValueError, match=message):
        parse_template(text_field)
