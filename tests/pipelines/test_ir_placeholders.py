import pytest

from assay.components.contracts.errors import RecipeError
from assay.pipelines.ir.placeholders import check, resolve_command, resolve_constant, resolve_text, run_values, text_of

RUN = {"pipeline_job_name": "run-1", "pipeline_root": "/root", "pipeline_task_name": "train"}
INPUT = {
    "inputs": {
        "parameterValues": {
            "text": "hi {{$.pipeline_job_name}}",
            "n": 3,
            "rate": 0.00001,
            "many": [1, "a"],
            "ok": True,
        },
        "artifacts": {"model": {"artifacts": [{"name": "m", "uri": "/in/model", "metadata": {"rank": 8}}]}},
    },
    "outputs": {
        "parameters": {"size": {"outputFile": "/out/size"}},
        "artifacts": {"out": {"artifacts": [{"name": "out", "uri": "/out/out", "metadata": {}}]}},
        "outputFile": "/out/executor_output.json",
    },
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{$.inputs.parameters['n']}}", "3"),
        ("{{$.inputs.parameters['rate']}}", "0.00001"),
        ("{{$.inputs.parameters['many']}}", '[1, "a"]'),
        ("{{$.inputs.parameters['ok']}}", "true"),
        ("a-{{$.inputs.artifacts['model'].path}}-b", "a-/in/model-b"),
        ("{{$.inputs.artifacts['model'].uri}}", "/in/model"),
        ("{{$.inputs.artifacts['model'].metadata}}", '{"rank": 8}'),
        ("{{$.inputs.artifacts['model'].metadata['rank']}}", "8"),
        ("{{$.outputs.artifacts['out'].path}}", "/out/out"),
        ("{{$.outputs.parameters['size'].output_file}}", "/out/size"),
        ("{{$.outputs.output_file}}", "/out/executor_output.json"),
        ("{{$.pipeline_task_name}} of {{$.pipeline_job_name}}", "train of run-1"),
    ],
)
def test_every_placeholder(text, expected):
    assert resolve_text(text, INPUT, RUN) == expected


def test_a_users_placeholder_is_not_substituted_again():
    assert resolve_text("{{$.inputs.parameters['text']}}", INPUT, RUN) == "hi {{$.pipeline_job_name}}"
    assert "hi {{$.pipeline_job_name}}" in resolve_text("{{$}}", INPUT, RUN)


def test_if_present_and_concat_change_the_length():
    arguments = [
        '{"Concat": ["--text=", "{{$.inputs.parameters[\'n\']}}", "!"]}',
        '{"IfPresent": {"InputName": "model", "Then": ["--m", {"Concat": ["a", "b"]}], "Else": "no"}}',
        '{"IfPresent": {"InputName": "absent", "Then": ["--x"]}}',
        '{"IfPresent": {"InputName": "absent", "Then": ["--x"], "Else": ["no"]}}',
    ]
    assert resolve_command(arguments, INPUT, RUN) == ["--text=3!", "--m", "ab", "no"]


def test_an_unknown_placeholder_is_refused_before_the_run():
    with pytest.raises(RecipeError, match="not known"):
        check(["{{$.inputs.secrets['x']}}"], where="exec-train")


def test_a_placeholder_without_a_value_says_so():
    with pytest.raises(RecipeError, match="has no value"):
        resolve_text("{{$.inputs.parameters['absent']}}", INPUT, RUN)


def test_constants_take_channels_and_leave_a_users_text_alone():
    constant = {"a": ["pre-{{$.inputs.parameters['pipelinechannel--x']}}", 3.0], "b": "{{$.inputs.parameters['x']}}"}
    found = resolve_constant(constant, {"pipelinechannel--x": "{{$.pipeline_job_name}}"}, RUN)
    assert found == {"a": ["pre-{{$.pipeline_job_name}}", 3.0], "b": "{{$.inputs.parameters['x']}}"}
    assert resolve_constant("{{$.pipeline_job_name}}", {}, RUN) == "run-1"


def test_only_the_run_values_a_command_names_count():
    assert run_values(["x", "--run {{$.pipeline_job_name}}"], RUN) == {"pipeline_job_name": "run-1"}


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1"), (0.1, "0.1"), (1e-7, "0.0000001"), ({"a": None}, '{"a": null}')]
)
def test_numbers_are_written_as_the_launcher_does(value, text):
    assert text_of(value) == text
