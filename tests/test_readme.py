"""Every Python example of the README and of docs/ runs as it is written."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {
    f"{path.relative_to(ROOT)} {number + 1}": code
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name):
    names: dict = {}
    exec(compile(EXAMPLES[name], name, "exec"), names)
    assert len(names["images"]) == 4
