from analysis.markdown import markdown_table


def test_a_table_has_its_header_a_rule_and_its_rows():
    table = markdown_table(["arm", "return"], [["none", "1,032"], ["injection", "1,635"]])
    assert table == "| arm | return |\n| --- | --- |\n| none | 1,032 |\n| injection | 1,635 |"


def test_a_table_without_rows_has_its_header():
    assert markdown_table(["arm"], []) == "| arm |\n| --- |"
