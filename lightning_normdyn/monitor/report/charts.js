// Draws the charts of the page from its data, and keeps them, the legend, the table and the cards
// together. What is shown follows from `state` alone: a change redraws the charts on screen.
(async () => {
  const state = {
    picked: null,        // {run, layer}: picked out everywhere
    hidden: new Set(),   // "run/layer" and "run/chart/line" that the legend has switched off
    range: null,         // the steps that all charts show; null: all of them
  };
  const narrow = matchMedia("(max-width: 640px)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // Where a finger drags, it scrolls the page.
  const touched = matchMedia("(pointer: coarse)");

  // ---- what the file holds

  async function unpacked(id) {
    // Browsers have it since 2023.
    if (!("DecompressionStream" in self)) throw new Error("this browser is too old to unpack them");
    const text = document.getElementById(id).content.textContent;
    const bytes = Uint8Array.from(atob(text.trim()), character => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }
  const library = document.createElement("script");
  library.textContent = await unpacked("plotly");
  document.head.append(library);
  const data = JSON.parse(await unpacked("data"));

  // ---- colours

  const VIRIDIS = ["#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725"];
  const RUNS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a919a"];
  const channels = colour => [1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16));
  const variable = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function ofDepth(layer, count) {
    const share = count > 1 ? layer / (count - 1) : 0;
    // Without the end that the background swallows.
    const place = 10 * (dark.matches ? 0.25 + 0.75 * share : 0.88 * share);
    const i = Math.min(9, Math.floor(place)), rest = place - i;
    const [from, to] = [channels(VIRIDIS[i]), channels(VIRIDIS[i + 1])];
    return `rgb(${from.map((value, c) => Math.round(value + rest * (to[c] - value))).join(",")})`;
  }
  const faded = (colour, alpha) => `rgba(${channels(colour).join(",")},${alpha})`;

  // Plotly reads a few tags in texts; a name is no markup.
  const literal = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  // ---- charts

  const charts = [];
  for (const figure of document.querySelectorAll(".chart")) {
    const compared = figure.dataset.run === "compared";
    const run = compared ? null : Number(figure.dataset.run);
    const list = compared ? data.compared : data.runs[run].charts;
    const number = Number(figure.dataset.chart);
    charts.push({figure, run, number, chart: list[number], plot: figure.querySelector(".plot"), drawn: false});
  }
  const isPicked = (run, layer) => state.picked?.run === run && state.picked?.layer === layer;

  // Traces of a chart. `layer` is ours: Plotly passes it on.
  function traces({run, number, chart}) {
    if (chart.kind === "map") return [mapTrace(run, chart)];
    if (chart.kind === "bands") return bandTraces(number, chart);
    const {layers} = data.runs[run];
    const someIsPicked = state.picked?.run === run && chart.lines.some(line => isPicked(run, line.layer));
    const few = layers.length <= 8;
    const result = [];
    for (const line of chart.lines) {
      const picked = isPicked(run, line.layer);
      if (state.hidden.has(`${run}/${line.layer}`) && !picked) continue;
      // What belongs to a layer, beside many layers, is shown of the one that is picked.
      if (line.beside && !picked && !few) continue;
      const what = line.beside ? `${literal(chart.title)}, ${literal(line.beside)}` : literal(chart.title);
      result.push({
        x: line.x, y: line.y, layer: line.layer, type: "scatter", mode: line.x.length > 1 ? "lines" : "markers",
        meta: [literal(layers[line.layer]), what],
        hovertemplate: "<b>%{meta[0]}</b><br>%{meta[1]}: %{y:.3g}<br>step %{x}<extra></extra>",
        opacity: someIsPicked && !picked ? 0.18 : 1,
        line: {
          color: ofDepth(line.layer, layers.length),
          width: picked ? 3 : layers.length > 16 || line.beside ? 1 : 1.6,
          dash: !line.beside ? "solid" : line.beside === "equilibrium" ? "dot" : "dash",
        },
      });
    }
    // The picked one on top of all others.
    result.sort((a, b) => isPicked(run, a.layer) - isPicked(run, b.layer));
    chart.medians.forEach((line, i) => {
      if (state.hidden.has(`${run}/${number}/${i}`)) return;
      result.push({
        x: line.x, y: line.y, type: "scatter", mode: "lines", meta: [literal(line.label)],
        hovertemplate: "<b>%{meta[0]}</b>: %{y:.3g}<br>step %{x}<extra></extra>",
        line: {color: medianColour(i), width: 2.5, dash: ["solid", "dash", "dot"][i]},
      });
    });
    return result;
  }
  const medianColour = i => [variable("--accent"), variable("--text"), variable("--expected")][i];

  function bandTraces(number, chart) {
    const result = [];
    chart.bands.forEach((band, i) => {
      if (state.hidden.has(`compared/${number}/${i}`)) return;
      const colour = RUNS[i % RUNS.length];
      const edge = {x: band.x, type: "scatter", mode: "lines", line: {width: 0}, hoverinfo: "skip"};
      // The band of a single layer would lie under its own line.
      if (band.layers > 1) {
        result.push({...edge, y: band.low}, {...edge, y: band.high, fill: "tonexty", fillcolor: faded(colour, 0.15)});
      }
      result.push({
        x: band.x, y: band.middle, type: "scatter", mode: band.x.length > 1 ? "lines" : "markers", meta: [literal(band.label)],
        hovertemplate: `<b>%{meta[0]}</b><br>${literal(chart.title)}: %{y:.3g}<br>step %{x}<extra></extra>`,
        line: {color: colour, width: 2, dash: ["solid", "dash", "dashdot", "dot"][i % 4]},
      });
    });
    return result;
  }

  // The farthest ratio and its inverse are the ends; what lies beyond has colours of its own, a
  // little outside of them.
  const BEYOND = 1.04;
  function ratioColours() {
    const [low, less, none, more, high] = dark.matches
      ? ["#cbbcff", "#6d5aa8", "#20242a", "#a85f14", "#ffbf6b"]
      : ["#2d004b", "#8073ac", "#f7f7f7", "#e08214", "#7f3b08"];
    const [below, above] = dark.matches ? ["#4f7dff", "#ff4d4d"] : ["#1f4fd8", "#d7191c"];
    const at = value => (value + BEYOND) / (2 * BEYOND);
    return [[0, below], [at(-1), below], [at(-1), low], [at(-0.5), less], [0.5, none], [at(0.5), more], [at(1), high], [at(1), above], [1, above]];
  }

  function mapTrace(run, chart) {
    const names = chart.rows.map(layer => literal(data.runs[run].layers[layer]));
    const isRatio = chart.scale === "ratio", isLinear = chart.scale === "linear";
    const beyond = isRatio ? BEYOND * Math.log10(chart.farthest) : null;
    const shown = value => {
      if (value === null) return null;
      if (isLinear) return value;
      // A ratio of 0 lies below everything; another quantity of 0 has no place on a log scale.
      if (value <= 0) return isRatio ? -beyond : null;
      const exponent = Math.log10(value);
      return isRatio ? Math.max(-beyond, Math.min(beyond, exponent)) : exponent;
    };
    const z = chart.cells.map(row => row.map(shown));
    const values = z.flat().filter(value => value !== null);
    let [low, high] = [Math.min(...extent(values, Math.min)), Math.max(...extent(values, Math.max))];
    if (isRatio) [low, high] = [-beyond, beyond];
    else if (isLinear) { high = Math.max(Math.abs(low), Math.abs(high)) || 1; low = -high; }
    else if (chart.limits && chart.limits[0] > 0) [low, high] = chart.limits.map(Math.log10);
    const ticks = [];
    if (!isLinear) for (let e = Math.ceil(low - 0.01); e <= high + 0.01; e++) ticks.push(e);
    return {
      type: "heatmap", x: chart.edges, z, zmin: low, zmax: high, xgap: 0, hoverongaps: false,
      customdata: chart.cells, text: chart.cells.map((row, i) => row.map(() => names[i])),
      hovertemplate: `<b>%{text}</b><br>${literal(chart.title)}: %{customdata:.3g}<br>step %{x}<extra></extra>`,
      colorscale: isRatio || isLinear ? ratioColours() : VIRIDIS.map((colour, i) => [i / 10, colour]),
      colorbar: {
        thickness: 10, outlinewidth: 0, tickfont: {size: 10},
        ...(ticks.length > 1 ? {tickvals: ticks, ticktext: ticks.map(e => String(Number((10 ** e).toPrecision(3))))} : {}),
      },
    };
  }
  // Of many numbers, piecewise: a call with a hundred thousand arguments fails.
  function extent(values, best) {
    const result = [];
    for (let i = 0; i < values.length; i += 10000) result.push(best(...values.slice(i, i + 10000)));
    return result.length ? result : [0];
  }

  function layout({run, chart}) {
    const text = variable("--text"), soft = variable("--soft"), grid = variable("--grid");
    const axis = {gridcolor: grid, linecolor: grid, zerolinecolor: grid, tickfont: {size: 11}};
    const result = {
      margin: {l: 46, r: 8, t: 6, b: 34}, showlegend: false, hovermode: "closest",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: {color: text, size: 12, family: "system-ui, sans-serif"},
      hoverlabel: {bgcolor: variable("--raised"), bordercolor: variable("--line"), font: {color: text}, namelength: -1},
      dragmode: touched.matches ? false : "zoom",
      // Layer and value are of one curve; only steps are zoomed, so that charts stay comparable.
      xaxis: {...axis, title: {text: "step", standoff: 4, font: {size: 11}}, ...stepsShown(run)},
      yaxis: {...axis, fixedrange: true, exponentformat: "power"},
      shapes: [], annotations: [],
    };
    if (chart.kind === "map") {
      result.margin.l = 10;
      result.yaxis = {
        ...axis, fixedrange: true, autorange: "reversed", automargin: true, showgrid: false,
        tickvals: chart.named.map(entry => entry.row),
        ticktext: chart.named.map(entry => entry.abnormal && chart.rows.length > chart.named.length ? `<b>${literal(entry.label)}</b>` : literal(entry.label)),
        tickfont: {size: narrow.matches ? 8 : chart.rows.length > 20 ? 9 : 11},
      };
      result.plot_bgcolor = variable("--line");
      const row = chart.rows.findIndex(layer => isPicked(run, layer));
      if (row >= 0) result.shapes.push({type: "rect", xref: "paper", x0: 0, x1: 1, y0: row - 0.5, y1: row + 0.5, line: {color: variable("--accent"), width: 2}});
      return result;
    }
    if (chart.scale !== "linear") {
      Object.assign(result.yaxis, {type: "log", dtick: chart.scale === "ratio" ? undefined : 1});
    }
    if (chart.limits) {
      const [low, high] = chart.scale === "linear" ? chart.limits : chart.limits.map(Math.log10);
      const margin = 0.04 * (high - low) || 0.3;
      result.yaxis.range = [low - margin, high + margin];
      // One decade or less has no power of ten to show.
      if (chart.scale !== "linear" && high - low < 2) delete result.yaxis.dtick;
    }
    const neutral = {ratio: 1, linear: 0}[chart.scale];
    if (neutral !== undefined) result.shapes.push({type: "line", xref: "paper", x0: 0, x1: 1, y0: neutral, y1: neutral, line: {color: soft, width: 1}});
    if (run !== null) for (const event of data.runs[run].events) mark(event, result, soft);
    return result;
  }

  // All steps of a run, also where a quantity is known of a few.
  function stepsShown(run) {
    const steps = state.range ?? (run === null ? null : data.runs[run].span);
    return steps && steps[0] < steps[1] ? {range: [...steps]} : {autorange: true};
  }

  function mark(event, result, soft) {
    const many = event.steps.length > 40;
    event.steps.forEach((step, i) => {
      result.shapes.push({
        type: "line", yref: "paper", x0: step, x1: step, y0: many ? 0.97 : 0, y1: 1,
        opacity: 0.7, line: {color: soft, width: 1, dash: event.kind === "lr_drop" ? "dash" : "dot"},
      });
      if (event.labels[i] && event.steps.length <= 6) {
        result.annotations.push({
          x: step, xref: "x", yref: "paper", y: 1, yanchor: "top", xanchor: "left", showarrow: false,
          text: literal(event.labels[i]), font: {size: 10, color: soft},
        });
      }
    });
  }

  const config = {
    responsive: true, displaylogo: false, scrollZoom: false,
    modeBarButtonsToRemove: ["toImage", "select2d", "lasso2d", "autoScale2d", "pan2d"],
  };
  async function draw(entry) {
    await Plotly.react(entry.plot, traces(entry), layout(entry), {...config, displayModeBar: touched.matches ? false : undefined});
    if (entry.drawn) return;
    entry.drawn = true;
    entry.plot.on("plotly_relayout", zoomed);
    entry.plot.on("plotly_click", event => {
      const [point] = event.points;
      const layer = entry.chart.kind === "map" ? entry.chart.rows[point.y] : point.data.layer;
      if (layer !== undefined) pick(entry.run, layer);
    });
  }
  function drawAll() {
    return Promise.all(charts.filter(entry => entry.drawn).map(draw));
  }

  // A redraw makes no such event: only a reader's zoom comes here.
  function zoomed(change) {
    if ("xaxis.range[0]" in change) state.range = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    else if ("xaxis.range" in change) state.range = [...change["xaxis.range"]];
    else if (change["xaxis.autorange"]) state.range = null;
    else return;
    drawAll();
  }

  // ---- picking a layer

  const strip = document.getElementById("picked");
  function pick(run, layer) {
    state.picked = isPicked(run, layer) ? null : {run, layer};
    for (const element of document.querySelectorAll("[data-layer]")) {
      const chosen = isPicked(Number(element.dataset.run), Number(element.dataset.layer));
      element.classList.toggle("chosen", chosen);
      if (chosen && element.matches("tr")) reveal(element);
    }
    strip.hidden = !state.picked;
    if (state.picked) strip.querySelector("span").textContent = data.runs[run].layers[layer];
    drawAll();
  }
  // Within the table's own box: the page stays where the reader is.
  function reveal(row) {
    const box = row.closest(".wide"), head = box.querySelector("thead").offsetHeight;
    const above = row.offsetTop - head, below = row.offsetTop + row.offsetHeight - box.clientHeight;
    if (box.scrollTop > above) box.scrollTop = above;
    else if (box.scrollTop < below) box.scrollTop = below;
  }
  for (const element of document.querySelectorAll("[data-layer]")) {
    element.addEventListener("click", () => pick(Number(element.dataset.run), Number(element.dataset.layer)));
  }
  strip.querySelector("button").addEventListener("click", () => state.picked && pick(state.picked.run, state.picked.layer));
  document.addEventListener("keydown", event => event.key === "Escape" && state.picked && pick(state.picked.run, state.picked.layer));

  // ---- legends

  function switchFor(place, label, colour, keys) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.setAttribute("aria-pressed", "true");
    const paint = () => button.style.setProperty("--swatch", colour());
    paint();
    dark.addEventListener("change", paint);
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") === "false";
      button.setAttribute("aria-pressed", String(on));
      keys.forEach(key => on ? state.hidden.delete(key) : state.hidden.add(key));
      drawAll();
    });
    place.append(button);
  }
  for (const legend of document.querySelectorAll(".legend")) {
    const run = Number(legend.dataset.run), {groups, layers} = data.runs[run];
    for (const group of groups) {
      const middle = group.layers[Math.floor(group.layers.length / 2)];
      switchFor(legend, group.label, () => ofDepth(middle, layers.length), group.layers.map(layer => `${run}/${layer}`));
    }
  }
  for (const {figure, run, number, chart} of charts) {
    const place = figure.querySelector(".switches");
    (chart.medians ?? []).forEach((line, i) => switchFor(place, line.label, () => medianColour(i), [`${run}/${number}/${i}`]));
    (chart.bands ?? []).forEach((band, i) => switchFor(place, band.label, () => RUNS[i % RUNS.length], [`compared/${number}/${i}`]));
  }

  // ---- drawing when a chart comes near the screen: dozens at once would block the page

  const near = new IntersectionObserver(entries => {
    for (const {isIntersecting, target} of entries) {
      const entry = charts.find(each => each.figure === target);
      if (isIntersecting && !entry.drawn) {
        near.unobserve(target);
        draw(entry);
      }
    }
  }, {rootMargin: "800px"});
  charts.forEach(entry => near.observe(entry.figure));
  addEventListener("beforeprint", () => charts.forEach(entry => entry.drawn || draw(entry)));
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
})().catch(error => {
  const trouble = document.getElementById("trouble");
  trouble.hidden = false;
  trouble.textContent += ` (${error})`;
});
