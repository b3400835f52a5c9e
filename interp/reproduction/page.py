"""The report: one HTML page that needs nothing from outside, a summary first, then a section for each experiment."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from interp import __version__
from interp.reproduction.experiment import Experiment
from interp.reproduction.measures import RULE, Answer, Check, Estimate, Table, minus
from interp.reproduction.settings import Settings
from interp.stores import Run

STYLE = """
:root { color-scheme: light dark; --ground: #fdfdfc; --ink: #1d1f21; --soft: #5c6166; --rule: #dcdedd; --link: #0b5ea8;
  --yes: #0a6b4b; --part: #8a5a00; --no: #a8331c; --panel: #f4f4f2; }
@media (prefers-color-scheme: dark) { :root { --ground: #17191b; --ink: #e4e5e3; --soft: #9da2a6; --rule: #3a3e42;
  --link: #7db8ee; --yes: #5fc79d; --part: #e2b15a; --no: #ee8a73; --panel: #1f2225; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 17px/1.55 ui-sans-serif, system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
p, li, dd { max-width: 44rem; text-wrap: pretty; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; text-wrap: balance; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 0 0 .2rem; letter-spacing: -.005em; }
section { border-top: 1px solid var(--rule); margin-top: 3.2rem; padding-top: 1.4rem; }
a { color: var(--link); text-underline-offset: .15em; }
.soft, figcaption, caption, dt { color: var(--soft); }
.place { color: var(--soft); font-size: .9rem; margin: 0 0 .8rem; }
.verdict { font-weight: 650; white-space: nowrap; }
.holds, .yes { color: var(--yes); } .partly, .open { color: var(--part); } .does, .no { color: var(--no); }
.out { color: var(--soft); }
dl { display: grid; grid-template-columns: 7rem 1fr; gap: .35rem 1rem; margin: 1rem 0; font-size: .95rem; }
dt { text-align: right; } dd { margin: 0; } dd ul { margin: 0; padding-left: 1.1rem; }
.wide { overflow-x: auto; margin: 1.1rem 0; }
table { border-collapse: collapse; font-size: .92rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .35rem; font-size: .9rem; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; } thead th { border-bottom: 1.5px solid var(--soft); vertical-align: bottom; }
td.number, th.number { text-align: right; padding-left: .9rem; padding-right: .4rem; white-space: nowrap; }
td .interval { color: var(--soft); font-size: .85em; margin-left: .35em; }
figure { margin: 1.2rem 0; } figcaption { font-size: .88rem; max-width: 44rem; }
svg text { fill: currentColor; }
table.pictures th { font-weight: 400; font-size: .8rem; line-height: 1.3; color: var(--soft); border: 0; max-width: 8rem;
  padding: .2rem .5rem .2rem 0; vertical-align: middle; }
table.pictures thead th { vertical-align: bottom; }
table.pictures td { border: 0; padding: .15rem .3rem .15rem 0; } table.pictures img { display: block; border-radius: 3px; }
code { font: .9em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dt { text-align: left; } body { font-size: 16px; } }
@media print { section { break-inside: avoid-page; } }
"""


def write_page(
    path: Path, settings: Settings, experiments: list[Experiment], answers: Mapping[str, Answer], runs: Mapping[str, Run],
    pairs: str,
) -> None:  # fmt: skip
    """Write the report; `runs` are linked by paths relative to it."""
    body = [
        "<h1>The experiments of Yi et al. (2405.15330), run on "
        f"{escape(Path(settings.model).name if settings.model != 'scenes' else 'scenes')}</h1>",
        f'<p class="soft">{escape(_facts(settings, runs))} {escape(pairs)}</p>',
        _summary(experiments, answers),
        f"<p>{escape(RULE)} Intervals are bootstrap 95 % percentile intervals ({settings.resamples:,} resamples) that draw "
        "prompts, or pairs of prompts, anew. All prompts and conditions start from the same noise, so that intervals speak "
        "of prompts, not of seeds.</p>",
        _few(settings),
        "<p>Every number is read from the runs beside this page, by the probes of interp; "
        "<code>numbers.json</code> has them all. The same command again resumes and rebuilds the page.</p>",
        *(_section(e, answers.get(e.key)) for e in experiments),
        _runs(runs),
    ]
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>2405.15330 on {escape(settings.model)}</title><style>{STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n",
        encoding="utf-8",
    )


def _few(settings: Settings) -> str:
    if settings.pairs >= 20:
        return ""
    return (
        f"<p><strong>This is a trial of {settings.pairs} pairs.</strong> A bootstrap over so few prompts gives intervals "
        "that are too narrow: read its verdicts as a demonstration, not as a finding.</p>"
    )


def _facts(settings: Settings, runs: Mapping[str, Run]) -> str:
    attrs = next(iter(runs.values())).attrs if runs else {}
    scale = attrs.get("guidance_scale")
    said = f"{settings.pairs} pairs of prompts, {settings.steps} steps"
    how = f", {attrs['dtype']} on {attrs['device']}" if attrs else ""
    said += f", guidance {scale:g}" if scale is not None else ""
    return f"{said}, seed {settings.seed}{how}; interp {__version__}."


def _summary(experiments: list[Experiment], answers: Mapping[str, Answer]) -> str:
    rows = []
    for e in experiments:
        answer = answers.get(e.key)
        rows.append(
            f'<tr><td><a href="#{e.key}">{e.key}</a></td><td>{escape(e.title)}</td><td>{_verdict(answer)}</td>'
            f"<td>{escape(minus(answer.sentence) if answer else 'not run')}</td></tr>"
        )
    head = "<tr><th></th><th>experiment</th><th>verdict</th><th>main number</th></tr>"
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _verdict(answer: Answer | None) -> str:
    text = "out of reach" if answer is None else answer.verdict
    return f'<span class="verdict {text.split()[0]}">{text}</span>'


def _section(e: Experiment, answer: Answer | None) -> str:
    choices = "".join(f"<li>{escape(c)}</li>" for c in e.choices)
    parts = [
        f'<section id="{e.key}"><h2>{e.key} · {escape(e.title)}</h2>',
        f'<p class="place">{escape(e.place)} · {_verdict(answer)}</p>',
        f"<p>{escape(e.claim)}</p>",
        f"<dl><dt>computed</dt><dd>{escape(e.definition)}</dd>",
        f"<dt>left open</dt><dd><ul>{choices}</ul></dd>" if choices else "",
    ]
    if answer is None:
        return "".join([*parts, "</dl></section>"])
    links = "; ".join(
        f'<a href="{name}.zarr/">{name}.zarr</a> ({len(c)} condition{"s" * (len(c) > 1)})'
        for name, c in answer.runs.items()
    )
    parts += [f"<dt>n</dt><dd>{escape(answer.n)}</dd><dt>runs</dt><dd>{links}</dd></dl>", _checks(answer.checks)]
    parts += [_table(t) for t in answer.tables]
    parts += [
        f"<figure>{f.html}{f'<figcaption>{escape(f.caption)}</figcaption>' if f.caption else ''}</figure>"
        for f in answer.figures
    ]
    return "".join([*parts, "</section>"])


def _checks(checks: list[Check]) -> str:
    rows = "".join(
        f"<tr><td>{escape(c.claim)}{'' if c.decides else ' <span class=soft>(for comparison)</span>'}</td>"
        f'{_number(c.number, c.digits)}<td class="number">{escape(c.rule())}</td>'
        f'<td><span class="{c.state}">{c.state}</span></td></tr>'
        for c in checks
    )
    head = '<tr><th>check</th><th class="number">number</th><th class="number">rule</th><th></th></tr>'
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _table(table: Table) -> str:
    first = table.rows[0] if table.rows else []
    head = "".join(
        f"<th{_class(first[k]) if k < len(first) else ''}>{escape(c)}</th>" for k, c in enumerate(table.columns)
    )
    rows = "".join(f"<tr>{''.join(_number(v, table.digits) for v in row)}</tr>" for row in table.rows)
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _class(value: Any) -> str:
    return "" if isinstance(value, str) else ' class="number"'


def _number(value: Any, digits: int) -> str:
    if isinstance(value, Estimate):
        text, bracket, interval = value.text(digits).partition(" [")
        more = f'<span class="interval">[{interval}</span>' if bracket else ""
        return f'<td class="number">{text}{more}</td>'
    if isinstance(value, float):
        small = 0 < abs(value) < 0.5 * 10**-digits and abs(value) > 1e-12  # would be zeros alone; less is rounding
        shown = "–" if value != value else f"{value:.1e}" if small else f"{value:z.{digits}f}"
        shown = shown.replace("-", "−")
        return f'<td class="number">{shown}</td>'
    return f"<td{_class(value)}>{escape(str(value))}</td>"


def _runs(runs: Mapping[str, Run]) -> str:
    rows = "".join(
        f'<tr><td><a href="{name}.zarr/">{name}.zarr</a></td>'
        f'<td><a href="trimmed/{name}.zarr.zip">{name}.zarr.zip</a></td><td class="number">{len(run):,}</td>'
        f'<td class="number">{len(run.conditions)}</td><td class="number">{run.attrs["steps"]}</td>'
        f'<td class="number">{int(run.nfe.sum()):,}</td></tr>'
        for name, run in runs.items()
    )
    head = "<tr><th>run</th><th>trimmed</th>" + "".join(
        f'<th class="number">{h}</th>' for h in ("samples", "conditions", "steps", "forward passes")
    )
    return (
        "<section id=\"runs\"><h2>Runs</h2><p>Plain Zarr stores that xarray opens: "
        '<code>xr.open_datatree("exchange.zarr", engine="zarr")</code>. The trimmed ones have the table of samples, scores and '
        "passes without pictures, latents and maps.</p>"
        f'<div class="wide"><table><thead>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>'
    )  # fmt: skip
