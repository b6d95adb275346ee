"""The table of releases that were tried."""

import matrix

from datasets_scripts.files import fill_block

REPORT = """<testsuites><testsuite>
<testcase name="a"/><testcase name="b"><skipped message="too old"/></testcase><testcase name="c"><error/></testcase>
</testsuite></testsuites>"""


def test_what_did_not_run_here_keeps_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "OUT", tmp_path)
    new, old, never = (matrix.Combination("transformers", version, (), "note") for version in ("9.1", "9.0", "8.0"))
    new.report.write_text(REPORT)
    kept = "| transformers 9.0 | 7 | 0 | 0 |  |"
    table = matrix.make_table([new, old, never], f"| transformers 9.1 | 1 | 0 | 0 |  |\n{kept}\n")
    assert table.splitlines()[2:] == ["| transformers 9.1 | 1 | 1 | 1 | note; too old |", kept]


def test_the_readme_has_a_line_for_each_release_that_is_named():
    readme = matrix.README.read_text()
    assert readme == fill_block(readme, "matrix", readme.split("<!-- matrix -->\n")[1].split("<!-- /matrix -->")[0])
    named = [("transformers", version) for version in (*matrix.OLDER_TRANSFORMERS, matrix.REFUSED_TRANSFORMERS)]
    for library, version in [*named, ("datasets", matrix.OLDEST_DATASETS)]:
        assert f"\n| {library} {version} | " in readme
    for library in ("transformers", "datasets"):
        assert f"\n| {library} {matrix.pinned(library)} | " in readme
