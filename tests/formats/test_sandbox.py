"""Chat templates: rendered as transformers renders them, with the origin of each character."""

import pytest
from jinja2.exceptions import SecurityError, UndefinedError

from cai_runtime.formats.sandbox import ChatTemplateEnvironment, budgeted_range
from cai_runtime.formats.traced_text import content, mask_of, own, plain

MARKS = "ßöÖéÉ🙂"
CALLER = " öim_endö é</think>é ß🙂\nline two 🙂"
SNIPPETS = [
    "<T>{{ c }}</T>",
    "{{ '<T>' + c + '</T>' }}",
    "{{ '<T>' ~ c ~ loop_free ~ '</T>' }}",
    "{{ '<T>%s</T>' % c }}",
    "{{ '<T>%s</T>'|format(c) }}",
    "{{ '<T>{}</T>{x}'.format(c, x=role) }}",
    "{{ '<T>{c}</T>'.format_map({'c': c}) }}",
    "{{ ['<T>', role, c]|join }}",
    "{{ ['<T>', role, c]|join('\\n') }}",
    "{{ '<S>'.join(['<T>', c]) }}",
    "{% set x %}<T>{{ c|trim }}</T>{% endset %}{{ x }}",
    "{% macro m(t, role='<R>') %}<T>{{ t }}{{ role }}{{ caller() if caller }}</T>{% endmacro %}{{ m(c) }}"
    "{% call m(c) %}<C>{{ c }}{% endcall %}",
    "{% filter trim %} <T>{{ c }} {% endfilter %}",
    "{% filter upper %}<t>{{ c }}{% endfilter %}",
    "{% set ns = namespace(x='<T>') %}{% for m in messages %}{% set ns.x = ns.x ~ m.content ~ '<E>' %}{% endfor %}"
    "{{ ns.x }}",
    "{% generation %}<T>{{ c }}{% endgeneration %}",
    "{% for m in messages if m.content %}{{ loop.index }}<T>{{ m['content'] }}{% if not loop.last %}<S>{% endif %}"
    "{% break %}{% endfor %}",
    "{{ c.split('</think>')[-1].lstrip('\\n') }}<T>",
    "{{ c.split('</think>')|join('<T>') }}",
    "{{ c|replace('</think>', '<T>') }}{{ c.replace('i', '<T>') }}",
    "{{ c[:5] ~ '<T>' ~ c[5:]|upper ~ c|length }}",
    "{% if '</think>' in c and c.startswith(' im') %}<T>{% endif %}{{ c.strip() }}",
    "{{ c|list|string }}{{ c|first }}{{ c|reverse }}<T>",
    "{{ messages|map(attribute='content')|join('<S>') }}",
    "{{ (messages|first).content|title|indent(2) }}<T>",
    "{{ messages|tojson(indent=2) }}{{ c|tojson }}<T>",
    "{{ (c if true else '<X>')|default('<D>') }}{{ missing|default('<D>') }}",
    "{{ bos_token }}{{ '<T>' * 2 }}{{ 'a' if c is string else 'b' }}{{ dict(a='<T>').a }}",
    "{{ messages }}{{ 1.5 }}{{ none }}{{ 3 // 2 }}{{ range(3)|list }}<T>",
    "{{ '<T>'|indent }}{{ 'a b'|title|capitalize }}{{ c|wordwrap(5) }}{{ c|center(40) }}{{ c|truncate(9) }}",
    "{{ '<T>' + (c|safe) }}{{ (c|safe) + '<T>' }}{{ ('<T>'|e) ~ c }}{{ '<T>%s' % (c|e) }}{{ c + ('<T>'|safe) }}",
    "{% autoescape true %}<T>{{ c }}{{ '<T>' ~ c }}{% set x %}<T>{{ c }}{% endset %}{{ x }}{% endautoescape %}",
    "{{ c|replace('e', '') }}{{ c|lower|upper|trim('2 ') }}{{ c.split()|list|length }}{{ c.splitlines()|join('<T>') }}",
    "{{ c.partition('</think>')[2] }}{{ c.rsplit('</think>', 1)|last }}{{ c.removeprefix(' ö') ~ c.count('e') }}",
    "{% for x in c.split('</think>') %}{{ loop.index0 ~ x }}{% else %}<T>{% endfor %}{{ c.encode('utf-8')|length }}",
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|map('trim')|list }}<T>",
    "{{ messages[-1]['content'][::-1] }}{{ messages[0:1] }}{{ '%-5s|%3d' % ('<T>', 4) }}{{ '{:>9}'.format('<T>') }}",
    "{% set marks = {'user': '<U>', 'assistant': ('<A>', 1, none, true, [1.5])} %}"
    "{% for m in messages %}{{ marks[m.role] }}{{ m.content }}{% endfor %}",
    "{%- if c %}\n    <T>  \n{%- endif %}\n  {% if c %}  x\n  {% endif %}\n",
]


def variables(wrap, mark):
    text = wrap(CALLER)
    return {
        "messages": [{"role": mark("user"), "content": text}, {"role": mark("assistant"), "content": wrap("yes")}],
        "c": text, "role": mark("user"), "bos_token": mark("<s>"), "tools": None, "documents": None,
        "add_generation_prompt": True,
    }  # fmt: skip


@pytest.mark.parametrize("source", SNIPPETS)
def test_renders_as_transformers(source):
    from transformers.utils.chat_template_utils import render_jinja_template

    given = variables(str, str)
    want, _ = render_jinja_template([given.pop("messages")], chat_template=source, **given)
    found = ChatTemplateEnvironment().from_string(source).render(**variables(content, own))
    assert plain(found) == want[0]


@pytest.mark.parametrize("source", SNIPPETS)
def test_content_is_never_the_templates_own(source):
    """Characters that no template here writes come from the content, whatever was done to it."""
    found = ChatTemplateEnvironment().from_string(source).render(**variables(content, own))
    assert not any(mark for character, mark in zip(found, mask_of(found), strict=True) if character in MARKS)


@pytest.mark.parametrize(
    "source",
    ["{{ '<T>' ~ role }}", "{{ '<%s>' % role }}", "{{ '<{}>'.format(role) }}", "{{ ['<', role, '>']|join }}",
     "{% set x %}<T>{% endset %}{{ x|trim|upper }}", "{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m(role) }}",
     "{{ '<t>'|upper|indent|title }}", "{{ ('<' ~ role ~ '>').split('u')|join('u') }}", "{{ {'a': '<T>'}['a'] }}",
     "{% set ns = namespace(x='<') %}{% set ns.x = ns.x + role + '>' %}{{ ns.x }}", "{{ role|replace('u', '<U>') }}",
     "{{ {'a': ['<T>', role]}|tojson }}", "{{ '<T>' + (role|safe) + '</T>' }}{{ role|safe ~ '<T>' }}",
     "{% set marks = {'user': '<U>', 'x': ['<X>']} %}{{ marks[role] }}{{ marks.get('user') }}{{ marks['x']|join }}",
     "{% for mark in [('<A>', {'<k>': '<v>'}), ('<B>',)] %}{{ mark[0] }}{% endfor %}",
     "{{ ['<T>']|map('trim')|join }}{% for key, item in {'<a>': '<b>'}.items() %}{{ key ~ item }}{% endfor %}"],
)  # fmt: skip
def test_what_the_template_writes_is_its_own(source):
    found = ChatTemplateEnvironment().from_string(source).render(role=own("user"))
    assert found and set(mask_of(found)) == {1}


@pytest.mark.parametrize(
    "source", ["{{ [c, d]|tojson }}", "{{ c|safe|upper }}", "{{ c|escape }}", "{{ [c] }}", "{{ c|pprint }}"]
)
def test_origin_that_is_lost_counts_as_a_callers(source):
    found = ChatTemplateEnvironment().from_string(source).render(c=own("<|im_end|>"), d="x")
    assert not any(mask_of(found))


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__ }}", "{{ c.__class__ }}", "{{ c._mask }}", "{{ '{0._mask}'.format(c) }}",
     "{{ messages.append(1) }}", "{% set ns = namespace(_x=1) %}", "{{ dict.mro() }}", "{{ namespace.__init__ }}"],
)  # fmt: skip
def test_sandbox(source):
    template = ChatTemplateEnvironment().from_string(source)
    try:
        found = template.render(c=content("x"), messages=[])
    except (SecurityError, UndefinedError):
        return
    assert found == ""  # an attribute that is not to be had


def test_loops_have_a_budget():
    template = ChatTemplateEnvironment().from_string(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(OverflowError, match="rounds"):
        template.render(range=budgeted_range())
