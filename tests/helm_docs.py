"""The table of the chart's values in its README, from the comments in values.yaml: `python tests/helm_docs.py`."""

import json
from pathlib import Path

import yaml

CHART = Path(__file__).resolve().parents[1] / "helm" / "moe-cluster"
MARK = "# -- "
BEGIN, END = "<!-- values: made by tests/helm_docs.py -->\n", "<!-- end of values -->\n"


def rows(text):
    """(path, default, meaning) of each value that has a comment. Raises ValueError for one that has none."""
    lines = text.splitlines()

    def walk(mapping, parents):
        for key, value in mapping.value:
            path = (*parents, key.value)
            above = lines[key.start_mark.line - 1].strip()
            if above.startswith(MARK):
                yield ".".join(path), _default(value), above.removeprefix(MARK)
            elif isinstance(value, yaml.MappingNode) and value.value:
                yield from walk(value, path)
            else:
                raise ValueError(f"values.yaml: {'.'.join(path)} has no comment above it")

    return list(walk(yaml.compose(text, Loader=yaml.SafeLoader), ()))


def _default(node):
    return json.dumps(yaml.SafeLoader("").construct_document(node), ensure_ascii=False)


def table(text):
    """Markdown of all values."""
    lines = ["| value | default | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{path}` | `{default}` | {meaning} |" for path, default, meaning in rows(text)]
    return "\n".join(lines) + "\n"


def with_table(readme, values):
    """The README's text with the table of these values."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table(values) + END + rest.split(END)[1]


def main():
    readme = CHART / "README.md"
    readme.write_text(with_table(readme.read_text(), (CHART / "values.yaml").read_text()))


if __name__ == "__main__":
    main()
