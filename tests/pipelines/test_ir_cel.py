import pytest

from assay.pipelines.ir import cel
from assay.pipelines.ir.cel import parse

PARAMETERS = {"n": 3, "rate": 0.61, "text": "it's", "back": 'b "q" \\ back', "good": True, "empty": ""}


def value(text: str) -> bool:
    return parse(text.replace("$", "inputs.parameter_values")).evaluate(PARAMETERS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$['rate'] > 0.55", True),
        ("$['rate'] > double(0)", True),
        ("$['rate'] > double(-0.5)", True),
        ("$['rate'] < 1e-05", False),
        ("$['rate'] >= double(int($['n']))", False),
        ("int($['n']) == 3", True),
        ("int($['n']) != 3", False),
        ("int($['n']) > -1", True),
        ("$['good'] == true", True),
        ("$['good'] == false", False),
        ("$['text'] == 'it's'", True),
        ("$['text'] != 'it's'", False),
        ("$['text'] == 'its'", False),
        ("$['back'] == 'b \"q\" \\ back'", True),
        ("$['empty'] == ''", True),
        ("!(int($['n']) > 1) && int($['n']) == 0", False),
        ("!(int($['n']) > 5) && !(int($['n']) == 0)", True),
        ("!($['text'] == 'it's') && $['n'] == 'x'", False),  # the second half is never looked at
        ("int($['n']) == 0 || $['good'] == true", True),
    ],
)
def test_conditions_that_kfp_writes(text, expected):
    assert value(text) is expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "$['n'] >",
        "$['n'] = 3",
        "$['n'] > 3 extra",
        "(int($['n']) > 3",
        "size($['n']) > 3",
        "$['n'] in [1, 2]",
        "$['n'] > 1 > 2",
        "inputs.artifacts['x'] == 1",
        "$['text'] == 'open",
        "&& true",
    ],
)
def test_what_does_not_parse_is_an_error(text):
    with pytest.raises(ValueError, match="cannot be parsed"):
        value(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$['text'] > 3", "compares"),
        ("$['good'] == 1", "compares"),
        ("$['text'] == 0.61", "compares"),
        ("int($['n'])", "needs a bool"),
        ("!int($['n'])", "needs a bool"),
        ("int($['text']) == 1", "cannot take int"),
        ("$['missing'] == 1", "has no value"),
    ],
)
def test_a_gate_is_never_decided_by_a_guess(text, message):
    with pytest.raises(ValueError, match=message):
        value(text)


def test_the_names_it_reads():
    assert parse("!(inputs.parameter_values['a'] > 1) && inputs.parameter_values['b'] == 'x'").names == {"a", "b"}


def test_a_condition_is_a_tree_that_another_engine_can_translate():
    parsed = cel.parse("!(inputs.parameter_values['a'] == 'x') && int(inputs.parameter_values['b']) > -1")
    assert parsed.tree == cel.Every(
        (
            cel.Not(cel.Compare("==", cel.Input("a"), cel.Literal("x"))),
            cel.Compare(">", cel.Convert("int", cel.Input("b")), cel.Minus(cel.Literal(1))),
        )
    )
