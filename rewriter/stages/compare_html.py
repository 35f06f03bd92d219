"""A comparison side by side, as one HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence

from ..report_text import collapse
from .compare import Comparison

__all__ = ["render"]

TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ titles | join(", ") }}</title>
<style>
:root { color-scheme: light dark; --old: #ffdfd9; --new: #d8f3dc; --moved: #fff3c4; --line: #8884 }
@media (prefers-color-scheme: dark) { :root { --old: #59231c; --new: #1d4a2a; --moved: #51430f } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 110rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; table-layout: fixed; font: 12px/1.6 ui-monospace, monospace }
td { border: 1px solid var(--line); padding: .1rem .5rem; vertical-align: top; overflow-wrap: anywhere }
.old { background: var(--old) } .new { background: var(--new) } .moved { background: var(--moved) }
.note { opacity: .7 } summary { cursor: pointer; margin-top: .8rem; font-weight: 600 }
</style>
{% for difference in differences %}
<h1>{{ difference.names[0] }} → {{ difference.names[1] }}</h1>
<p>{% if difference.equal %}No difference{% else %}{{ difference.modules | length }} kinds of modules differ{% endif %};
{{ difference.same }} modules are the same.</p>
{% for module in difference.modules %}
<details open><summary>{{ place(module) }}</summary>
<table>{% for line in module.lines %}
<tr{% if line.sign == "~" %} class="moved"{% endif %}>
<td{% if line.sign == "-" %} class="old"{% endif %}>{{ line.text_before }}</td>
<td{% if line.sign == "+" %} class="new"{% endif %}>{{ line.text_after }} <span class="note">{{ line.note }}</span></td>
</tr>{% endfor %}
</table></details>
{% endfor %}
{% if difference.inputs %}
<details open><summary>inputs</summary><table>{% for line in difference.inputs %}
<tr><td{% if line.sign == "-" %} class="old"{% endif %}>{{ line.text_before }}</td
><td{% if line.sign == "+" %} class="new"{% endif %}>{{ line.text_after }}</td></tr>{% endfor %}
</table></details>
{% endif %}
{% endfor %}
</html>
"""


def render(differences: Sequence[Comparison]) -> str:
    """Needs jinja2, of the extra `report`."""
    import jinja2

    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE)
    titles = [" → ".join(difference.names) for difference in differences]
    return template.render(
        differences=differences,
        titles=titles,
        place=lambda module: collapse(list(module.paths)) or "the model itself",
    )
