"""Every Python example of the README runs as it is written."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number):
    names: dict = {}
    exec(compile(EXAMPLES[number], f"README example {number + 1}", "exec"), names)
    assert len(names["images"]) == 4
