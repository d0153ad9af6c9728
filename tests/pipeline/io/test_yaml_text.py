"""YAML that anybody may have written: what is wrong is one error that names the line, within seconds."""

import subprocess
import sys
import time

import pytest
import yaml

from paracaption.pipeline.io import yaml_text

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 5_000, "nested deeper than 64 levels"),
        ("a: " + "{b: " * 5_000, "nested deeper than 64 levels"),
        ("\n".join(" " * depth + "a:" for depth in range(100)), "nested deeper than 64 levels"),
        (LAUGHS, "more than 100,000 values"),
        (MERGES, "more than 100,000 values"),
        ("a: &a [*a]", "refers to a value that contains it"),
        ("&a k: *a\nb: &b {c: *b}", "refers to a value that contains it"),
        (f"a: {'9' * 400}", "a number with 400 digits"),
        (f"a: {'9' * 5_000}", "a number with 5,000 digits"),
        (f"a: {'1:' * 300_000}1", "a number with 600,001 digits"),
        (f"a: {1 << 63}", "does not fit into 64 bits"),
        (f"a: [{-(1 << 63) - 1}]", "does not fit into 64 bits"),
        ("a: 2001-99-99", "not a value of type timestamp"),
        ("a: !!int x", "'x' is not a value of type int"),
        ("a: !!float x", "'x' is not a value of type float"),
        ("a: !!bool x", "'x' is not a value of type bool"),
        ("a: !!timestamp x", "'x' is not a value of type timestamp"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: 1\na: 2", "`a` is given twice"),
        ("x" * (yaml_text.MAX_BYTES + 1), "longer than 1,048,576 bytes"),
    ],
)
@pytest.mark.soak
def test_what_would_run_forever_or_break_later_is_one_error_at_once(text, told):
    started = time.monotonic()
    with pytest.raises(yaml.YAMLError, match=told.replace("*", r"\*")):
        yaml_text.parse(text)
    assert time.monotonic() - started < 60  # it takes a second or two where nothing else runs


def test_aliases_merges_and_whole_numbers_of_64_bits_are_read():
    text = "base: &base {a: 1, b: [x, y]}\nown: {<<: *base, a: 2}\n"
    text += f"last: {(1 << 63) - 1}\nleast: {-(1 << 63)}"
    assert yaml_text.parse(text) == {
        "base": {"a": 1, "b": ["x", "y"]},
        "own": {"a": 2, "b": ["x", "y"]},
        "last": (1 << 63) - 1,
        "least": -(1 << 63),
    }
    assert yaml_text.parse(b"") is None


def test_the_line_is_named():
    with pytest.raises(yaml.YAMLError, match="line 3, column 4"):
        yaml_text.parse("a: 1\nb: 2\nc: 2001-99-99\n")


def test_what_another_library_does_to_the_loader_changes_nothing():
    program = """if True:
        import yaml
        yaml.SafeLoader.yaml_constructors["tag:yaml.org,2002:timestamp"] = yaml.SafeLoader.construct_yaml_str
        from paracaption.pipeline.io import yaml_text
        yaml.SafeLoader.yaml_constructors["tag:yaml.org,2002:int"] = yaml.SafeLoader.construct_yaml_str
        print(yaml_text.parse("[2001-01-02, 3]"))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[datetime.date(2001, 1, 2), 3]\n"
