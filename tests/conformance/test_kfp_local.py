# ruff: noqa: PTH123, B006  kfp ships a component's body alone, and reads a pipeline's defaults
"""The same compiled graphs under kfp's own local runner and under ours.

Where kfp.local 2.17 does what the IR says, both must agree on what ran and what came out. Where it is known not to,
the test says so, and holds our engine to the IR.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from kfp import dsl

FIXTURES = Path(__file__).parents[1] / "fixtures"
sys.path.insert(0, str(FIXTURES))
from bench import Bench, states

KFP_LOCAL = """
import json, sys
from kfp import components, local
root, path, arguments = sys.argv[1:]
local.init(local.SubprocessRunner(use_venv=False), pipeline_root=root, raise_on_error=False)
task = components.load_component_from_file(path)(**json.loads(arguments))
outputs = {k: v for k, v in task.outputs.items() if not hasattr(v, "uri")}
sys.stdout.write("\\nOUTPUTS " + json.dumps(outputs))  # kfp.local leaves `print` patched after a loop
"""


def light(function):
    return dsl.component(function, base_image="a-python", install_kfp_package=False)


@light
def add(a: int, b: int = 1) -> int:
    import os

    with open(os.environ["JOURNAL"], "a") as file:
        file.write('{"step": "add"}\n')
    return a + b


@light
def save(text: str, out: dsl.Output[dsl.Dataset]) -> float:
    import os

    with open(os.environ["JOURNAL"], "a") as file:
        file.write('{"step": "save"}\n')
    with open(out.path, "w") as file:
        file.write(text)
    out.metadata["length"] = len(text)
    return len(text) / 2


@light
def measure() -> NamedTuple("Measured", [("rate", float)]):
    from collections import namedtuple

    return namedtuple("Measured", "rate")(0.61)


@light
def load(data: dsl.Input[dsl.Dataset], note: str = "") -> str:
    import os

    with open(os.environ["JOURNAL"], "a") as file:
        file.write('{"step": "load"}\n')
    with open(data.path) as file:
        return f"{file.read()}/{data.metadata['length']:g}/{note}"


@light
def total(numbers: list, rows: dsl.Input[list[dsl.Dataset]]) -> str:
    return f"{sum(numbers):g} " + ",".join(open(row.path).read() for row in rows)


@light
def broken() -> int:
    raise ValueError("broken")


@light
def shape(settings: dict, many: list, flag: bool, rate: float, name: str) -> str:
    import json

    return json.dumps([settings, many, flag, rate, name])


@light
def last(status: dsl.PipelineTaskFinalStatus) -> str:
    import json
    import os

    with open(os.environ["JOURNAL"], "a") as file:
        file.write(json.dumps({"step": f"last {status.state}"}) + "\n")
    return status.state


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("JOURNAL", "")
    monkeypatch.setenv("PYTHONPATH", "")
    return Bench(tmp_path)


def under_kfp(bench, path, arguments):
    """Return the outputs and what ran under kfp.local."""
    bench.journal.unlink(missing_ok=True)
    command = [sys.executable, "-c", KFP_LOCAL, str(bench.folder / "root"), str(path), json.dumps(arguments)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, cwd=bench.folder, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("OUTPUTS ")]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[0].removeprefix("OUTPUTS ")), bench.ran()


def both(bench, pipeline, arguments=None):
    path = bench.compile(pipeline)
    theirs = under_kfp(bench, path, arguments or {})
    record = bench.run(path, parameters=arguments or {})
    return record, (record.outputs, bench.ran()), theirs


def test_a_dag_with_values_of_every_type(bench):
    @dsl.pipeline(name="types")
    def pipeline(rate: float = 0.25, name: str = "n", many: list = ["a", 1.5], flag: bool = True) -> str:
        three = add(a=1, b=2)
        saved = save(text=f"{name}-{three.output}")
        load(data=saved.outputs["out"], note="x").after(three)
        return shape(settings={"a": {"b": 1.5}}, many=many, flag=flag, rate=rate, name=f"<{name}>").output

    _, ours, theirs = both(bench, pipeline, {"name": 'quoted "word"'})
    assert ours == theirs
    assert ours[1] == {"add": 1, "save": 1, "load": 1}


def test_branches(bench):
    @dsl.pipeline(name="branches")
    def pipeline(n: int) -> int:
        first = add(a=n)
        with dsl.If(first.output > 10):
            big = add(a=first.output, b=100)
        with dsl.Elif(first.output == 5):
            five = add(a=first.output, b=200)
        with dsl.Else():
            small = add(a=first.output, b=300)
        return dsl.OneOf(big.output, five.output, small.output)

    path = bench.compile(pipeline)
    for n in (10, 4):
        theirs = under_kfp(bench, path, {"n": n})
        record = bench.run(path, parameters={"n": n}, use_cache=False)
        assert (record.outputs, bench.ran()) == theirs


def test_loops_and_collected(bench):
    @dsl.pipeline(name="loops")
    def pipeline(words: list = ["one", "four"]) -> str:
        with dsl.ParallelFor(words) as word:
            saved = save(text=word)
        return total(numbers=dsl.Collected(saved.outputs["Output"]), rows=dsl.Collected(saved.outputs["out"])).output

    _, ours, theirs = both(bench, pipeline)
    assert ours == theirs
    assert ours[0] == {"Output": "3.5 one,four"}


def test_exit_handler_and_nested_pipeline(bench):
    @dsl.pipeline(name="inner")
    def inner(n: int) -> int:
        return add(a=n).output

    @dsl.pipeline(name="outer")
    def pipeline(n: int = 1):
        with dsl.ExitHandler(last()):
            add(a=inner(n=n).output)

    record, ours, theirs = both(bench, pipeline)
    assert ours == theirs
    assert (record.state, ours[1]) == ("SUCCEEDED", {"add": 2, "last SUCCEEDED": 1})


def test_failure_reaches_the_exit_handler(bench):
    @dsl.pipeline(name="failing")
    def pipeline():
        with dsl.ExitHandler(last()):
            add(a=broken().output)

    record, ours, theirs = both(bench, pipeline)
    assert ours == theirs
    assert (record.state, ours[1]) == ("FAILED", {"last FAILED": 1})


def test_importer(bench, tmp_path):
    (tmp_path / "rows.txt").write_text("rows")

    @dsl.pipeline(name="importing")
    def pipeline(uri: str) -> str:
        rows = dsl.importer(artifact_uri=uri, artifact_class=dsl.Dataset, metadata={"length": 7})
        return load(data=rows.output).output

    _, ours, theirs = both(bench, pipeline, {"uri": str(tmp_path / "rows.txt")})
    assert ours == theirs
    assert ours[0] == {"Output": "rows/7/"}


# From here on kfp.local 2.17 is known to be wrong (kubeflow/pipelines pull request 13313 describes the first two).


def test_lone_if_on_a_named_output(bench):
    """kfp.local looks for outputs only under `-Output`: it skips the body and reports success."""

    @dsl.pipeline(name="named")
    def pipeline():
        with dsl.If(measure().outputs["rate"] > 0.55):
            add(a=1)

    _, ours, theirs = both(bench, pipeline)
    assert ours == ({}, {"add": 1})
    assert theirs == ({}, {})


def test_float_against_an_int_literal(bench):
    """The IR says `double(0)`, which kfp.local's `eval` does not know: the exception counts as false."""

    @dsl.pipeline(name="literal")
    def pipeline():
        with dsl.If(save(text="four").outputs["Output"] > 0):
            add(a=1)

    _, ours, theirs = both(bench, pipeline)
    assert ours == ({}, {"save": 1, "add": 1})
    assert theirs == ({}, {"save": 1})


def test_one_of_artifacts(bench):
    """kfp.local refuses two artifact selectors; the IR takes the one whose branch ran."""

    @dsl.pipeline(name="artifacts")
    def pipeline(n: int = 1) -> str:
        with dsl.If(n > 0):
            one = save(text="one")
        with dsl.Else():
            other = save(text="other")
        return load(data=dsl.OneOf(one.outputs["out"], other.outputs["out"])).output

    record = bench.run(pipeline)
    assert record.outputs == {"Output": "one/3/"}


def test_an_edited_input_is_not_a_cache_hit(bench, tmp_path):
    """kfp.local keys its cache by URI, so it would answer with the old content."""
    rows = tmp_path / "rows.txt"

    @dsl.pipeline(name="edited")
    def pipeline(uri: str) -> str:
        rows = dsl.importer(artifact_uri=uri, artifact_class=dsl.Dataset, metadata={"length": 7})
        return load(data=rows.output).output

    path = bench.compile(pipeline)
    for text, state in [("v1", "SUCCEEDED"), ("v1", "CACHED"), ("v2", "SUCCEEDED")]:
        rows.write_text(text)
        record = bench.run(path, parameters={"uri": str(rows)})
        assert record.outputs == {"Output": f"{text}/7/"}
        assert states(record)["load"] == state
