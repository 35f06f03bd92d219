"""A comparison side by side, as one HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, zip_longest

from ..report_text import collapse
from .compare import Comparison, Line

__all__ = ["render"]

TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ titles | join(", ") }}</title>
<style>
:root { color-scheme: light dark; --old: #ffdfd9; --new: #d8f3dc; --moved: #fff3c4; --line: #8883 }
@media (prefers-color-scheme: dark) { :root { --old: #59231c; --new: #1d4a2a; --moved: #51430f } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 110rem; padding: 0 1rem }
h1 { font-size: 1.2rem } summary { cursor: pointer; margin-top: .8rem; font-weight: 600 }
table { border-collapse: collapse; width: 100%; table-layout: fixed; font: 12px/1.5 ui-monospace, monospace }
td { border: 1px solid var(--line); padding: .1rem .5rem; vertical-align: top; overflow-wrap: anywhere }
.old { background: var(--old) } .new { background: var(--new) } .moved { background: var(--moved) }
.same { opacity: .55 } .note { opacity: .7 }
</style>
{% for difference in differences %}
<h1>{{ difference.names[0] }} → {{ difference.names[1] }}</h1>
<p>{{ same(difference) }}</p>
{% for title, rows in sections(difference) %}
<details open><summary>{{ title }}</summary>
<table>{% for left, right, note in rows %}
{% set kind = ["same", "moved"][note != ""] if left and right and left.sign in " ~" else "" %}
<tr{% if kind %} class="{{ kind }}"{% endif %}>
<td{% if left and not kind %} class="old"{% endif %}>{{ left.text_before if left }}</td>
<td{% if right and not kind %} class="new"{% endif %}>{{ right.text_after if right }}
{%- if note %} <span class="note">{{ note }}</span>{% endif %}</td>
</tr>{% endfor %}
</table></details>
{% endfor %}
{% endfor %}
</html>
"""

Row = tuple[Line | None, Line | None, str]


def render(differences: Sequence[Comparison]) -> str:
    """Needs jinja2, of the extra `report`."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    titles = [" → ".join(difference.names) for difference in differences]
    template = environment.from_string(TEMPLATE)
    return template.render(differences=differences, titles=titles, same=_summary, sections=_sections)


def _summary(difference: Comparison) -> str:
    if difference.equal:
        return f"No difference in {difference.same} modules."
    return f"Modules that differ: {sum(len(m.paths) for m in difference.modules)}; the same: {difference.same}."


def _sections(difference: Comparison) -> Iterator[tuple[str, list[Row]]]:
    for module in difference.modules:
        yield collapse(list(module.paths)) or "the model itself", list(_rows(module.lines))
    if difference.inputs:
        yield "inputs", list(_rows(difference.inputs))


def _rows(lines: Sequence[Line]) -> Iterator[Row]:
    """What is gone stands beside what came."""
    for pairs, run in groupby(lines, lambda line: line.sign in " ~"):
        if pairs:
            yield from ((line, line, line.note or "~" * (line.sign == "~")) for line in run)
        else:
            changed = list(run)
            sides = ([line for line in changed if line.sign == sign] for sign in "-+")
            yield from ((left, right, right.note if right else "") for left, right in zip_longest(*sides))
