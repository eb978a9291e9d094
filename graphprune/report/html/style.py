"""How pages look: light or dark as the reader has it, and on paper."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5c6670; --paper: #ffffff;
  --line: #d8dde2; --shade: #f4f6f8; --a: #1f6feb; --b: #c2410c; --c: #15803d; --d: #7c3aed;
  --e: #b45309; --f: #0e7490; --heat: 31, 111, 235; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b1; --paper: #14181c;
  --line: #333b44; --shade: #1d2329; --a: #6ea8fe; --b: #fb923c; --c: #4ade80; --d: #c4a7ff;
  --e: #fbbf24; --f: #67e8f9; --heat: 110, 168, 254; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 66rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: .4rem 0; overflow-wrap: anywhere; }
li { overflow-wrap: anywhere; }
.note { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0; }
.card { background: var(--shade); border-radius: .5rem; padding: .7rem .85rem; }
.card b { display: block; font-size: 1.35rem; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; min-width: 50%; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { background: var(--shade); border-radius: .5rem; padding: .8rem; overflow-x: auto;
  font: .82rem/1.45 ui-monospace, monospace; }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .75rem; }
.pair div { background: var(--shade); border-radius: .5rem; padding: .7rem .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.pair i { color: var(--soft); font-style: normal; font-size: .8rem; display: block; }
svg { display: block; max-width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg text.strong { fill: var(--ink); }
svg .axis { stroke: var(--line); stroke-width: 1; }
svg .curve { fill: none; stroke-width: 2; }
.chart { max-width: 40rem; }
.scroll { overflow-x: auto; }
.scroll svg { max-width: none; }
.a { stroke: var(--a); fill: var(--a); } .b { stroke: var(--b); fill: var(--b); }
.c { stroke: var(--c); fill: var(--c); } .d { stroke: var(--d); fill: var(--d); }
.e { stroke: var(--e); fill: var(--e); } .f { stroke: var(--f); fill: var(--f); }
.cell { fill: rgb(var(--heat)); stroke: var(--line); stroke-width: .5; }
.blank { fill: none; stroke: var(--line); stroke-width: .5; }
@media print { :root { --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --shade: #f4f4f4;
  --a: #1f4fb0; --b: #b03a0c; --c: #15702d; --d: #5b21b6; --e: #92400e; --f: #155e75;
  --heat: 31, 79, 176; }
  body { font-size: 11pt; max-width: none; padding: 0; }
  section, .pair, figure { break-inside: avoid; } h2 { break-after: avoid; }
  pre { white-space: pre-wrap; } * { print-color-adjust: exact; } }
"""
