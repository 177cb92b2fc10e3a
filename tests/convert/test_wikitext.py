"""Markup to plain text: each construct, and the whole sample."""

from __future__ import annotations

import bz2
import re

import pytest

from cai_runtime.convert.texts import read_dump, split_articles, wikipedia_articles
from cai_runtime.convert.wikitext import plain_text
from cai_runtime.errors import SourceError


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Bold''' and ''italic'' and '''''both'''''.", "Bold and italic and both."),
        (
            "A [[cat]], two [[cat]]s, [[Felis|a kind]] of [[:Category:Cats]].",
            "A cat, two cats, a kind of Category:Cats.",
        ),
        ("[[File:A.jpg|thumb|A [[cat]] by {{small|x}}]]Text.[[Category:Cats]][[fr:Chat]]", "Text."),
        ('One<ref>{{cite|a=[b]}}</ref>, two<ref name=x />, three<ref name="x">y</ref>.', "One, two, three."),
        ("{{Infobox\n| a = {{b|c}}\n| d = [[e|f]]\n}}\nText{{citation needed|date=May}}.", "Text."),
        ("About {{convert|5|km|mi}} or {{convert|3|-|4|ft|m}}.", "About 5 km or 3–4 ft."),
        ("The word {{lang|fr|chat}} ({{lang-de|Katze}}; {{IPA-fr|x}}).", "The word chat (Katze)."),
        ("Name ({{IPAc-en|n|eɪ|m}}) and ( , old) here.", "Name and (old) here."),
        ("{|\n! a\n|-\n| b {{c|}} [[d]]\n{| \n| inner\n|}\n|}\nAfter.", "After."),
        ("{{quote|{{a|}}Words|Author}}", "Words"),
        ("See [http://x.org the site] and [http://y.org].", "See the site and."),
        ("<!-- no -->Yes<br/>and <small>more</small> <math>x^2</math>&nbsp;&amp; less.", "Yes\n\nand more & less."),
        ("* one\n** two\n# three\n: four", "one\n\ntwo\n\nthree\n\nfour"),
        ("{{unclosed [[link]] text", "unclosed link text"),
        ("closed}} too ]] often |}", "closed too often |}"),
        ("5 < 6 and a{{nbsp}}b{{ndash}}c {{=}} d", "5 < 6 and a b–c = d"),
        ("H<sub>2</sub>O, {{chem|C|O|2}}", "H2O, CO2"),
        ("{{disambiguation}}", ""),
    ],
)
def test_markup(markup, text):
    assert plain_text(markup) == text


def test_headings_stay_where_text_follows():
    markup = (
        "Intro.\n== A ==\n=== B ===\nText.\n== Empty ==\n== C ==\nMore.\n== References ==\nx\n=== Sub ===\ny\n== Z =="
    )
    assert plain_text(markup) == "Intro.\n\nA\n\nB\n\nText.\n\nC\n\nMore."


def test_the_sample_reads_as_text(wikipedia_texts):
    assert len(wikipedia_texts) == 106
    assert wikipedia_texts[0].startswith("Anarchism is a political philosophy that advocates self-governed societies")
    whole = "\n".join(wikipedia_texts)
    assert 2_500_000 < len(whole) < 3_500_000
    brackets = r"\{\{|\}\}|\[\[|\]\]|\{\||''|\(\s*\)"
    left_over = rf"{brackets}|</?(?:ref|br|small|sub|div)\b|&[a-z]+;|https?://|^==|thumb\||[ ]{{2}}|\ue000"
    assert re.findall(left_over, whole, re.MULTILINE) == []
    assert wikipedia_articles() == wikipedia_texts


def test_splits_are_half_a_quarter_and_a_quarter_in_order():
    splits = split_articles([str(i) for i in range(106)])
    assert [len(splits.calibration), len(splits.tune), len(splits.test)] == [53, 26, 27]
    assert splits.calibration + splits.tune + splits.test == [str(i) for i in range(106)]


def test_dump_skips_redirects_and_other_namespaces(tmp_path):
    page = "<page><title>{}</title><ns>{}</ns>{}<revision><text>{}</text></revision></page>"
    pages = [
        ("A", 0, "", "&lt;b&gt;x"),
        ("B", 0, '<redirect title="A" />', "y"),
        ("Talk:A", 1, "", "z"),
        ("C", 0, "", "w"),
    ]
    dump = f'<mediawiki xmlns="http://x/export-9/">{"".join(page.format(*p) for p in pages)}</mediawiki>'
    path = tmp_path / "d.xml.bz2"
    path.write_bytes(bz2.compress(dump.encode()))
    assert list(read_dump(path)) == [("A", "<b>x"), ("C", "w")]
    for broken in (bz2.compress(dump.encode())[:-20], bz2.compress(dump[:-30].encode()), b"no bz2 file"):
        path.write_bytes(broken)
        with pytest.raises(SourceError, match=r"d\.xml\.bz2"):
            list(read_dump(path))
