"""The chart's README says what its values are."""

import json
import re

import pytest
import yaml
from helm_charts import CHART, DEFAULT, SHAPES
from helm_docs import rows, with_table

README = (CHART / "README.md").read_text()
VALUES = (CHART / "values.yaml").read_text()


def test_the_table_is_that_of_the_values():
    """Else: `python tests/helm_docs.py`."""
    assert with_table(README, VALUES) == README


def test_a_row_has_the_value_its_default_and_the_comment():
    text = "a:\n  # -- The b.\n  b: 1\n  # -- The c.\n  c: {d: [x]}\n"
    assert rows(text) == [("a.b", "1", "The b."), ("a.c", '{"d": ["x"]}', "The c.")]


def test_a_value_without_a_comment_is_refused():
    with pytest.raises(ValueError, match=r"a\.b has no comment"):
        rows("a:\n  b: 1\n")


def leaves(schema, root, path=()):
    """Paths that a schema names."""
    schema = root["definitions"][schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
    for name, value in schema.get("properties", {}).items():
        yield (*path, name)
        yield from leaves(value, root, (*path, name))


def test_every_value_is_in_the_schema_and_every_closed_map_too():
    schema = json.loads((CHART / "values.schema.json").read_text())
    named = {".".join(path) for path in leaves(schema, schema)}
    assert {path for path, _, _ in rows(VALUES)} <= named

    def walk(part):
        if isinstance(part, dict):
            if "properties" in part and part is not schema["properties"]:
                assert part["additionalProperties"] is False, part
            for value in part.values():
                walk(value)

    walk(schema)


def test_the_examples_in_the_readme_are_values_that_exist():
    """Each block of YAML, by its top-level keys."""
    known = set(yaml.safe_load(VALUES))
    for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL):
        assert set(yaml.safe_load(block)) <= known, block


def test_the_readme_names_every_shape():
    for shape in set(SHAPES) - {DEFAULT}:
        assert f"ci/{shape}-values.yaml" in README
