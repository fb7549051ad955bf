"""The style sheet of `report.html`: one column on a phone, two beside each other on a desk, light and dark.

Heat maps have nine steps of one hue (`h0` to `h8`, low to high) and nine of two (`d0` below zero to `d8` above). On
each step either ink or the page's colour has a contrast of at least 4.5 to 1, in both themes; `STRONG_STEPS` says
which.
"""

STEPS = 9
STRONG_STEPS = frozenset({"h5", "h6", "h7", "h8", "d0", "d1", "d7", "d8"})
"""Steps on which text takes the page's colour."""

LIGHT = {
    "page": "#ffffff", "ink": "#1b2230", "quiet": "#5a6475", "rule": "#d9dee7", "box": "#f4f6fa", "link": "#0b57b8",
    "alarm": "#b3261e",
    "dense": "#626c7c", "companion": "#b45309", "dense_narrow": "#0f766e", "untrained": "#a3338f", "sparse": "#0b62c4",
    "repaired": "#b4232f",
    "h0": "#ecf4fe", "h1": "#d1e3f9", "h2": "#b5d3f4", "h3": "#9ac2ef", "h4": "#7bade6", "h5": "#3471b1",
    "h6": "#045da7", "h7": "#004a93", "h8": "#00377e",
    "d0": "#0059a8", "d1": "#3878b6", "d2": "#8bb7e5", "d3": "#bcd6f1", "d4": "#eef0f3", "d5": "#eecbb4",
    "d6": "#dda57e", "d7": "#a95f23", "d8": "#953600",
}  # fmt: skip
DARK = {
    "page": "#12161d", "ink": "#e6eaf1", "quiet": "#a0abbc", "rule": "#333c4a", "box": "#1b212b", "link": "#79b8ff",
    "alarm": "#ff8a80",
    "dense": "#a3adbc", "companion": "#f5a34b", "dense_narrow": "#4fd1c0", "untrained": "#ec8fdc", "sparse": "#62b0ff",
    "repaired": "#ff8a8a",
    "h0": "#1a222b", "h1": "#1c2d3f", "h2": "#1d3954", "h3": "#1d456b", "h4": "#1c5284", "h5": "#4789ca",
    "h6": "#61a3e6", "h7": "#87bef7", "h8": "#a2daff",
    "d0": "#6dc3ff", "d1": "#518fcd", "d2": "#285077", "d3": "#23374c", "d4": "#1f2225", "d5": "#472f1d",
    "d6": "#6d411c", "d7": "#be783e", "d8": "#ffa453",
}  # fmt: skip


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


_HUES = ("dense", "companion", "dense_narrow", "untrained", "sparse", "repaired")
_SWATCHES = [f"{hue}{step}" for hue in "hd" for step in range(STEPS)]

STYLE = (
    f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
{" ".join(f".c-{hue} {{ color: var(--{hue}); }}" for hue in _HUES)}
{" ".join(f"svg rect.{name} {{ fill: var(--{name}); }}" for name in _SWATCHES)}
"""
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 44px 0 12px; padding-top: 12px; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 18px 0 6px; } h2, h3, nav a { overflow-wrap: anywhere; } figure h3 { margin: 0; }
p { max-width: 76ch; margin: 0 0 12px; overflow-wrap: break-word; }
a { color: var(--link); }
.quiet, .note, figcaption, .muted, .grey { color: var(--quiet); }
.note, figcaption, .scale, summary { overflow-wrap: anywhere; }
.note, figcaption { font-size: 0.875rem; line-height: 1.45; max-width: 84ch; }
.notice { background: var(--box); border-left: 4px solid var(--companion); padding: 12px 16px; margin: 16px 0 20px;
  overflow-wrap: anywhere; }
.notice.alarm { border: 2px solid var(--alarm); border-left-width: 8px; }
.notice p:last-child { margin-bottom: 0; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0 0 20px; padding: 0; }
nav a { display: inline-block; padding: 4px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 0 0 20px; }
.tiles div { background: var(--box); border-radius: 8px; padding: 12px 14px; }
.tiles dt { color: var(--quiet); font-size: 0.875rem; overflow-wrap: anywhere; }
.tiles dd { margin: 0; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles dd.muted { font-weight: 400; }
.figures { display: grid; margin: 18px 0; gap: 28px 36px; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 900px) { .figures { grid-template-columns: 1fr 1fr; } }
figure { margin: 0; min-width: 0; max-width: 560px; display: grid;
  grid-row: span 4; grid-template: subgrid / minmax(0, 1fr); row-gap: 6px; }
figure.wide figcaption { margin-top: 8px; }
figure.wide { display: block; grid-column: 1 / -1; max-width: none; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 14px 36px; }
.panels > div { max-width: 560px; min-width: 0; }
.panel { margin: 8px 0 2px; font-weight: 600; font-size: 0.9375rem; overflow-wrap: anywhere; }
.scale { font-size: 0.875rem; margin: 2px 0; } .scale svg { vertical-align: -2px; }
.chart { display: block; width: 100%; height: auto; }
svg text { font-size: 13px; fill: var(--ink); font-variant-numeric: tabular-nums; }
svg text.label, svg text.quiet { fill: var(--quiet); }
svg text.value { font-weight: 600; }
svg text.on-strong { fill: var(--page); }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .tick { stroke: var(--quiet); }
svg .line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
svg .line.thin { stroke-width: 1.4; }
svg circle, svg rect, svg path:not(.line) { fill: currentColor; }
svg circle.hollow { fill: var(--page); stroke: currentColor; stroke-width: 1.8; }
svg rect.gap { fill: none; stroke: var(--rule); stroke-dasharray: 3 3; }
svg .faint { opacity: 0.4; } svg .faint .line { stroke-width: 1; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0; padding: 0;
  align-content: start;
  font-size: 0.875rem; }
.legend li { overflow-wrap: anywhere; display: flex; align-items: center; gap: 7px; }
.scroll.long { max-height: 85vh; }
.scroll { position: relative; overflow: auto; margin: 0 0 10px; border: 1px solid var(--rule); border-radius: 8px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.9375rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 10px 12px 6px; }
th, td { padding: 6px 12px; border-top: 1px solid var(--rule); text-align: right; white-space: nowrap;
  vertical-align: top; }
td small, th small { display: block; font-size: 0.75rem; line-height: 1.4; color: var(--quiet); font-weight: 400; }
thead th { color: var(--quiet); font-weight: 600; border-top: 0; vertical-align: bottom; }
th:first-child, .words th, .words td { text-align: left; }
tbody th { font-weight: 500; }
.numbers thead th { position: sticky; top: 0; background: var(--page); z-index: 1; }
.broad thead th { white-space: normal; min-width: 7rem; max-width: 14rem; }
.numbers th:first-child { position: sticky; left: 0; background: var(--page); }
.numbers thead th:first-child { z-index: 2; }
.numbers.broad tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; max-width: 15rem; }
.words th, .words td { white-space: normal; overflow-wrap: anywhere; }
.words.broad th, .words.broad td { min-width: 6.5rem; overflow-wrap: normal; }
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
@media print { .scroll.long { max-height: none; overflow: visible; } }
@media (max-width: 560px) {
  main { padding: 18px 14px 48px; }
  svg text { font-size: 17px; }
  table { font-size: 0.75rem; } th, td { padding: 5px 3px; } thead th { font-weight: 500; }
  .broad th, .broad td { padding: 5px 6px; }
  td small, th small { font-size: 0.6875rem; }
  th:first-child { padding-left: 8px; } td:last-child, th:last-child { padding-right: 8px; }
  .numbers th:first-child { white-space: normal; overflow-wrap: break-word; }
  .broad thead th { min-width: 5.5rem; } .numbers.broad tbody th { min-width: 7rem; max-width: 8rem; }
  .words tbody th { width: 8rem; }
  .tiles { grid-template-columns: 1fr 1fr; } .tiles dd { font-size: 1.25rem; }
}
"""
)
