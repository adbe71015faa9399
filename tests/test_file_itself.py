# SPDX-License-Identifier: Apache-2.0
"""gpart.py is one file that is read and copied: how much there is to read, how dense it
is, what it needs. The counter is this file's own."""

import ast
import collections
import doctest
import io
import pathlib
import sys
import tokenize

import pytest

import gpart

# What the design allows; where it is not met yet, what the file has, rounded up.
TOKENS = 4840  # the design: 4000
TOKENS_PER_LINE = 10.6
LINES_OF_CODE = 490  # the design: 385
LINES_OF_PART_I = 140
LINES = 765  # the design: 550
COLUMNS = 88
COMPLEXITY = 9

PATH = pathlib.Path(gpart.__file__)
SOURCE = PATH.read_text(encoding="utf-8")
NO_CODE = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}


def docstring_lines(source):
    """The lines of all strings that stand alone."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        value = getattr(node, "value", None)
        if isinstance(node, ast.Expr) and isinstance(value, ast.Constant):
            lines.update(range(node.lineno, node.end_lineno + 1))
    return lines


def tokens_by_line(source):
    """{line of code: how many tokens begin there}, without comments and docstrings. An
    f-string is one token, as it was before Python 3.12."""
    docstrings, counts, inside = docstring_lines(source), collections.Counter(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind, line = tokenize.tok_name[token.type], token.start[0]
        if kind not in NO_CODE and line not in docstrings and not inside:
            counts[line] += 1
        inside += (kind == "FSTRING_START") - (kind == "FSTRING_END")
    return counts


def test_the_counter_counts():
    """A program of which the numbers are known."""
    source = '"""Doc\nstring"""\n\nx = f(  # why\n    f"{a + f\'{b}\'}",\n)\n"""."""\n'
    assert tokens_by_line(source) == {4: 4, 5: 2, 6: 1}


def test_gpart_is_short_and_not_dense():
    """Tokens, tokens a line, lines of code, lines in all and columns have a ceiling."""
    counts, lines = tokens_by_line(SOURCE), SOURCE.splitlines()
    assert counts.total() <= TOKENS
    assert counts.total() / len(counts) <= TOKENS_PER_LINE
    assert len(counts) <= LINES_OF_CODE
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS


def test_part_I_is_shorter():
    """What a reader of the paper reads."""
    before = SOURCE.index("# ------------------------------ Part I: ")
    after = SOURCE.index("# ------------------------------ Part II: ")
    counts = tokens_by_line(SOURCE[before:after])
    assert 100 < len(counts) <= LINES_OF_PART_I


def test_no_function_is_complex():
    """By cognitive complexity (Campbell 2018), which counts nesting and turns."""
    complexipy = pytest.importorskip("complexipy")
    functions = complexipy.file_complexity(str(PATH)).functions
    assert {f.name for f in functions} >= {
        "permute",
        "attach",
        "AdaptedLinear::forward",
    }
    assert max(f.complexity for f in functions) <= COMPLEXITY


def test_gpart_needs_only_torch_and_safetensors():
    """It can be copied anywhere: the standard library, torch and safetensors."""
    names = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
    roots = {name.split(".")[0] for name in names}
    assert roots - sys.stdlib_module_names == {"torch", "safetensors"}


def test_a_copy_says_where_it_is_from():
    """The head of the file has the licence, the version and the paper; the version is
    the package's."""
    head = SOURCE[:500]
    assert head.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert f"gpart.py {gpart.__version__}" in head
    assert "arXiv 2605.14841" in head
    project = PATH.with_name("pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{gpart.__version__}"' in project


def test_the_examples_are_true():
    """The doctests pass."""
    failed, attempted = doctest.testmod(gpart)
    assert failed == 0
    assert attempted > 5
