"""The style sheet of `report.html`: one column on a phone, two beside each other on a desk, light and dark."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1b2230; --quiet: #5a6475; --rule: #d9dee7; --box: #f4f6fa; --link: #0b57b8;
  --dense: #626c7c; --untrained: #a3338f; --companion: #b45309; --sparse: #0b62c4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161d; --ink: #e6eaf1; --quiet: #a0abbc; --rule: #333c4a; --box: #1b212b; --link: #79b8ff;
    --dense: #a3adbc; --untrained: #ec8fdc; --companion: #f5a34b; --sparse: #62b0ff;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 44px 0 12px; padding-top: 12px; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 0 0 6px; } figure h3 { margin: 0; }
p { max-width: 76ch; margin: 0 0 12px; }
a { color: var(--link); }
.quiet, .note, figcaption, .muted { color: var(--quiet); }
.note, figcaption { font-size: 0.875rem; line-height: 1.45; max-width: 84ch; }
.notice { background: var(--box); border-left: 4px solid var(--companion); padding: 12px 16px; margin: 16px 0 20px; }
.notice p:last-child { margin-bottom: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 0 0 20px; }
.tiles div { background: var(--box); border-radius: 8px; padding: 12px 14px; }
.tiles dt { color: var(--quiet); font-size: 0.875rem; }
.tiles dd { margin: 0; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles dd.muted { font-weight: 400; }
.figures { display: grid; margin: 18px 0; gap: 28px 36px; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 900px) { .figures { grid-template-columns: 1fr 1fr; } }
figure { margin: 0; min-width: 0; max-width: 520px; display: grid;
  grid-row: span 4; grid-template-rows: subgrid; row-gap: 6px; }
.chart { display: block; width: 100%; height: auto; }
svg text { font-size: 13px; fill: var(--ink); font-variant-numeric: tabular-nums; }
svg text.label, svg text.quiet { fill: var(--quiet); }
svg text.value { font-weight: 600; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .tick { stroke: var(--quiet); }
.c-dense { color: var(--dense); } .c-untrained { color: var(--untrained); }
.c-companion { color: var(--companion); } .c-sparse { color: var(--sparse); }
svg .line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
svg circle, svg rect, svg path:not(.line) { fill: currentColor; }
svg circle.hollow { fill: var(--page); stroke: currentColor; stroke-width: 1.8; }
svg .faint { opacity: 0.4; } svg .faint .line { stroke-width: 1; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0; padding: 0;
  align-content: start;
  font-size: 0.875rem; }
.legend li { display: flex; align-items: center; gap: 7px; }
.scroll { overflow-x: auto; margin: 0 0 10px; border: 1px solid var(--rule); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9375rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 10px 12px 6px; }
th, td { padding: 6px 12px; border-top: 1px solid var(--rule); text-align: right; white-space: nowrap; }
thead th { color: var(--quiet); font-weight: 600; border-top: 0; vertical-align: bottom; }
th:first-child, .words th, .words td { text-align: left; }
tbody th { font-weight: 500; }
.numbers th:first-child { position: sticky; left: 0; background: var(--page); }
.words th, .words td { vertical-align: top; white-space: normal; overflow-wrap: anywhere; }
.words tbody th { width: 13rem; color: var(--quiet); }
details caption { position: absolute; clip-path: inset(50%); } /* the summary says the same */
details { margin: 14px 0; } details > :not(summary) { margin-top: 10px; }
summary { cursor: pointer; font-weight: 600; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 16px;
  margin-top: 16px; }
blockquote { margin: 0; padding: 10px 14px; background: var(--box); border-radius: 8px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--box); border-radius: 8px; padding: 12px 14px; font-size: 0.8125rem;
  line-height: 1.45; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media (max-width: 560px) {
  main { padding: 18px 14px 48px; }
  svg text { font-size: 17px; }
  table { font-size: 0.75rem; } th, td { padding: 5px 3px; } thead th { font-weight: 500; }
  th:first-child { padding-left: 8px; } td:last-child, th:last-child { padding-right: 8px; }
  .numbers th:first-child { white-space: normal; overflow-wrap: break-word; }
  .words tbody th { width: 8rem; }
  .tiles { grid-template-columns: 1fr 1fr; } .tiles dd { font-size: 1.25rem; }
}
"""
