"""The look of the report: one style sheet for both themes, and the script that shows values under the pointer."""

STYLE = """
:root { color-scheme: light dark; --back: #fbfbf9; --card: #fff; --text: #1d2025; --soft: #666c75; --edge: #e4e4df;
  --grid: #ecece8; --series-1: #2b62d9; --series-2: #d4660a; --series-3: #0c8560; --series-4: #8a46bd; }
@media (prefers-color-scheme: dark) { :root { --back: #121418; --card: #1a1d22; --text: #e7e7e3; --soft: #969ca6;
  --edge: #2b2f36; --grid: #262a30; --series-1: #77a5ff; --series-2: #f2a25c; --series-3: #4fc797;
  --series-4: #c693f2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 48px; }
h1 { margin: 0; font-size: 28px; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 40px 0 12px; font-size: 18px; }
.mark { color: var(--series-1); font-weight: 650; letter-spacing: .02em; margin: 0 0 4px; }
.model { color: var(--soft); margin: 6px 0 0; }
.stats { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 12px; }
.stat, .chart, .sample, details { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }
.stat { padding: 12px 16px; }
.stat b { display: block; font-size: 21px; font-weight: 620; line-height: 1.3; letter-spacing: -.01em;
  white-space: nowrap; }
.stat span { color: var(--soft); font-size: 13px; }
.chart { position: relative; margin: 0; padding: 14px 16px 8px; min-width: 0; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 6px; display: flex; flex-wrap: wrap; gap: 4px 16px; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
.trio { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 12px; margin-top: 12px; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; align-items: start; }
@media (max-width: 760px) { .trio, .pair { grid-template-columns: minmax(0, 1fr); }
  main > .chart { overflow-x: auto; } main > .chart svg { min-width: 640px; } }
.grid { stroke: var(--grid); } .cross { stroke: var(--soft); stroke-dasharray: 3 3; }
.tick { fill: var(--soft); font-size: 11.5px; }
polyline { fill: none; stroke: var(--colour); stroke-width: 2; stroke-linejoin: round; }
.trio polyline { stroke-width: 1.5; } polyline.faint { stroke-width: 1; opacity: .45; }
polyline.dashes { stroke-width: 1.5; stroke-dasharray: 4 4; }
.dot { fill: var(--card); stroke: var(--colour); stroke-width: 2; }
.key { font-weight: 400; font-size: 13px; color: var(--soft); }
.key::before { content: ""; display: inline-block; width: 16px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; background: var(--colour); }
.key.faint::before { opacity: .45; }
.key.dots::before { width: 9px; height: 9px; border-radius: 50%; border: 2px solid var(--colour); background: none; }
.tip { position: absolute; pointer-events: none; background: var(--text); color: var(--back); border-radius: 6px;
  padding: 5px 9px; font-size: 12.5px; line-height: 1.45; white-space: nowrap; z-index: 1; }
.none, .note { color: var(--soft); font-size: 13px; margin: 8px 0 6px; }
.bar { display: grid; grid-template-columns: 84px 1fr 52px; gap: 10px; align-items: center; margin: 7px 0;
  font-size: 14px; }
.track { background: var(--grid); border-radius: 4px; overflow: hidden; }
.fill { display: block; height: 14px; background: var(--soft); opacity: .55; }
.own { font-weight: 650; } .own .fill { background: var(--series-1); opacity: 1; }
.bar .value { text-align: right; }
.split { display: flex; height: 22px; border-radius: 5px; overflow: hidden; margin: 4px 0 10px; gap: 1px; }
.piece { min-width: 2px; } .swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin-right: 8px; }
.piece.steps, .swatch.steps { background: var(--series-3); }
.piece.data, .swatch.data { background: color-mix(in srgb, var(--series-3) 45%, var(--card)); }
.piece.save, .swatch.save { background: var(--series-1); }
.piece.evaluation, .swatch.evaluation { background: color-mix(in srgb, var(--series-1) 45%, var(--card)); }
.piece.start, .swatch.start { background: var(--soft); }
.piece.compile, .swatch.compile { background: color-mix(in srgb, var(--soft) 45%, var(--card)); }
.piece.repeated, .swatch.repeated { background: var(--series-2); }
.piece.hang, .swatch.hang { background: var(--series-4); }
.piece.lost, .swatch.lost { background: color-mix(in srgb, var(--series-4) 45%, var(--card)); }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 13px; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--grid); }
tr:last-child td { border-bottom: 0; } .n { text-align: right; padding-right: 0; padding-left: 8px; }
.sample { margin: 0 0 12px; padding: 12px 16px; }
.sample small { color: var(--soft); }
pre { margin: 6px 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.prompt { font-weight: 700; color: var(--series-1); }
details { margin: 0 0 12px; padding: 10px 16px; } summary { cursor: pointer; font-weight: 600; font-size: 14px; }
footer { margin-top: 32px; color: var(--soft); font-size: 13px; }
@media print { details::details-content { display: block; } .tip { display: none; } }
"""

SCRIPT = """
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const svg = figure.querySelector("svg"), cross = svg.querySelector(".cross"), tip = figure.querySelector(".tip");
  const { width, rows } = JSON.parse(figure.querySelector("script").textContent);
  const line = (text, colour) => {
    const row = tip.appendChild(document.createElement("div"));
    row.textContent = text;
    if (colour) row.style.borderLeft = `3px solid var(--series-${colour})`, row.style.paddingLeft = "6px";
  };
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), scale = box.width / width;
    const pointer = (event.clientX - box.left) / scale;
    const [x, step, values] = rows.reduce((a, b) => Math.abs(b[0] - pointer) < Math.abs(a[0] - pointer) ? b : a);
    cross.setAttribute("x1", x);
    cross.setAttribute("x2", x);
    cross.setAttribute("visibility", "visible");
    tip.replaceChildren();
    line(step);
    for (const [name, text, colour] of values) line(`${name}  ${text}`, colour);
    tip.hidden = false;
    const frame = figure.getBoundingClientRect(), at = box.left - frame.left + x * scale;
    const fits = at + 12 + tip.offsetWidth < frame.width;
    tip.style.left = `${fits ? at + 12 : Math.max(4, at - 12 - tip.offsetWidth)}px`;
    tip.style.top = `${box.top - frame.top + 8}px`;
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cross.setAttribute("visibility", "hidden"); });
}
"""
