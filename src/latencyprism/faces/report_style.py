"""The look of a report: one style sheet, light and dark, nothing fetched."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --soft: #5b6570; --line: #dfe3e8; --grid: #e9ecf0;
  --step: #1f6fb8; --band: rgba(31,111,184,.20); --expected: #3d4650; --bad: #c62f3b; --bad-soft: #fdecee;
  --good: #1f7a4d; --act: rgba(90,101,112,.08); --act-bad: rgba(198,47,59,.10);
  --p0: #7b5ea7; --p1: #1f6fb8; --p2: #2a9d8f; --p3: #c58a12; --p4: #8a939c;
  --prefill: #c58a12; --decode: #1f6fb8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1d2126; --ink: #e7eaee; --soft: #a2acb7; --line: #343b43; --grid: #2a3037;
    --step: #6cb0f2; --band: rgba(108,176,242,.22); --expected: #c3cad2; --bad: #ff7a83; --bad-soft: #3a1f23;
    --good: #63c695; --act: rgba(162,172,183,.10); --act-bad: rgba(255,122,131,.13);
    --p0: #b49be0; --p1: #6cb0f2; --p2: #5cc9ba; --p3: #e5b454; --p4: #7d8791;
    --prefill: #e5b454; --decode: #6cb0f2;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
header p { margin: 0; }
.brand { color: var(--soft); font-size: 13px; }
h1 { font-size: 27px; line-height: 1.25; margin: 6px 0 8px; text-wrap: balance; }
h2 { font-size: 17px; margin: 0 0 4px; }
.lead { font-size: 17px; max-width: 78ch; }
.soft, figcaption { color: var(--soft); font-size: 13.5px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin-top: 18px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin-top: 18px; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 10px 14px; }
.facts b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: 13px; }
.facts .bad b { color: var(--bad); }
.note { background: var(--bad-soft); border-color: var(--bad); }
.wide { overflow-x: auto; }
figure { margin: 10px 0 0; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); }
svg .strong { fill: var(--ink); font-weight: 600; }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--line); }
svg .step { stroke: var(--step); fill: none; stroke-width: 1.6; stroke-linejoin: round; }
svg .band { fill: var(--band); } svg .clipped { fill: var(--bad); }
svg .expected { stroke: var(--expected); fill: none; stroke-width: 1.6; stroke-dasharray: 5 4; }
svg .alert { stroke: var(--bad); stroke-width: 1.6; } svg .alert-word { fill: var(--bad); font-weight: 600; }
svg .act { fill: var(--act); } svg .act-bad { fill: var(--act-bad); } svg .act-edge { stroke: var(--line); }
svg .prefill { stroke: var(--prefill); } svg .decode { stroke: var(--decode); }
svg .line { fill: none; stroke-width: 1.6; }
svg .second { stroke: var(--prefill); } svg .hit { fill: transparent; } svg .hit:hover { fill: var(--act); }
svg .p0 { fill: var(--p0); } svg .p1 { fill: var(--p1); } svg .p2 { fill: var(--p2); }
svg .p3 { fill: var(--p3); }
svg .p4 { fill: var(--p4); } svg .spark { stroke: var(--step); fill: none; stroke-width: 1.4; }
.key { display: inline-flex; align-items: center; gap: 6px; margin-right: 16px; }
.key i { width: 16px; height: 3px; border-radius: 2px; display: inline-block; }
.key i.square { width: 11px; height: 11px; }
.key i.dashed { height: 0; border-top: 2px dashed var(--expected); border-radius: 0; }
table { border-collapse: collapse; width: 100%; margin-top: 10px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th.group { padding-top: 16px; }
.n { text-align: right; white-space: nowrap; }
td.spark { width: 200px; padding-right: 0; vertical-align: middle; }
.grew { color: var(--bad); font-weight: 600; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
ol, ul { margin: 8px 0 0; padding-left: 22px; }
@media print { section, .facts div { break-inside: avoid; } }
"""
