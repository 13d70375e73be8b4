// The picture of a run on an IEC sampler node: a strip of steps, its cost, and a chart of what the corrections did.

const STYLE = `
.iec { display: flex; flex-direction: column; gap: 4px; font: 11px/1.35 sans-serif; overflow: hidden;
  color: var(--input-text, #ddd); padding: 2px 4px; box-sizing: border-box; }
.iec-cells { display: grid; gap: 1px; row-gap: 3px; flex: none; }
.iec-cell { height: 16px; min-width: 0; padding: 0; border: 1px solid var(--descrip-text, #999); border-radius: 2px;
  background: transparent; cursor: pointer; align-self: end; box-sizing: border-box; }
.iec-cell.narrow { border-width: 0 0 1px 0; border-radius: 0; }
.iec-cell.cached { height: 8px; }
.iec-cell.corrected { background: #56b4e9; border-color: #56b4e9; }
.iec-cell.done { box-shadow: 0 2px 0 #009e73; }
.iec-cell:hover:not(:disabled) { outline: 1px solid var(--input-text, #ddd); }
.iec-cell:disabled { cursor: default; }
.iec-line { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; flex: none; min-height: 15px; }
.iec-quiet { color: var(--descrip-text, #999); }
.iec-sentence { flex: none; border-left: 3px solid #e69f00; padding-left: 5px; }
.iec-sentence.iec-refused { border-color: #d55e00; }
.iec-chart { width: 100%; height: 92px; flex: none; }
.iec-chart text { font: 9px sans-serif; fill: var(--descrip-text, #999); }
.iec-run { display: flex; justify-content: space-between; gap: 8px; flex: none; }
.iec-run label { white-space: nowrap; cursor: pointer; }
.iec-run input { margin: 0 3px 0 0; vertical-align: -2px; }
`;
const CELLS_IN_A_ROW = 50;
const HEIGHT = { row: 19, line: 19, chart: 96, characters: 46, sentence: 15 };
const RESIDUAL = "#56b4e9";
const CONTRACTION = "#e69f00";

function make(tag, classes = "", text = "") {
  const element = document.createElement(tag);
  element.className = classes;
  element.textContent = text;
  return element;
}

const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** What a run costs, in lines of words. plan: as POST /iec/step_plan answers, with `full`, null without a cache. */
export function costOf(plan, isCacheOpen = false) {
  const { evaluations, nfe } = plan;
  const share = evaluations ? Math.round((100 * (nfe - evaluations)) / evaluations) : 0;
  const cost = nfe === evaluations ? plural(nfe, "evaluation") : `${evaluations} → ${nfe} evaluations, +${share} %`;
  if (plan.full) return [cost, `${plan.full.length} of ${plural(plan.steps, "step")} in full, the others cached`];
  return isCacheOpen ? [cost, "which steps are cached is known when it runs"] : [cost];
}

/** The text of correction_steps that corrects these steps of so many. */
export function textOf(corrected, steps) {
  if (corrected.length === 0) return "none";
  return corrected.length === steps ? "all" : `steps:${[...corrected].sort((a, b) => a - b).join(",")}`;
}

export class StepView {
  /** onToggle(step): a cell was clicked. onKeep(isKept): the box was ticked. */
  constructor({ onToggle, onKeep }) {
    if (!document.getElementById("iec-style")) {
      const style = make("style", "", STYLE);
      style.id = "iec-style";
      document.head.append(style);
    }
    this.element = make("div", "iec");
    this.onToggle = onToggle;
    this.onKeep = onKeep;
    this.height = HEIGHT.row + HEIGHT.line;
    new ResizeObserver(() => this.drawChart()).observe(this.element);
  }

  /**
   * Draws what is known. plan: the steps that will be taken, undefined where they are not known. cost: lines. message: a
   * sentence. isRefused: whether it is a refusal. run: the last run, as the events tell it, or undefined. isKept: whether it is
   * saved with the workflow.
   */
  show({ plan, cost = [], message, isRefused, run, isKept }) {
    this.run = run;
    const parts = [];
    if (plan) parts.push(this.cells(plan, run?.isRunning ? run.step : 0));
    parts.push(...cost.map((line) => make("div", "iec-line iec-cost", line)));
    if (message) parts.push(make("div", `iec-sentence iec-message${isRefused ? " iec-refused" : " iec-quiet"}`, message));
    if (run) parts.push(...this.ofRun(run, isKept));
    this.element.replaceChildren(...parts);
    const sentences = [message ?? "", ...(run?.warnings ?? [])].filter(Boolean);
    const lines = sentences.map((text) => Math.ceil(text.length / HEIGHT.characters) * HEIGHT.sentence + 4);
    this.height =
      Math.ceil((plan?.steps ?? 0) / CELLS_IN_A_ROW) * HEIGHT.row +
      cost.length * HEIGHT.line +
      (run ? HEIGHT.line + (hasChart(run) ? HEIGHT.chart : 0) : 0) +
      lines.reduce((sum, height) => sum + height, 6);
    this.drawChart();
  }

  cells(plan, done) {
    const rows = Math.ceil(plan.steps / CELLS_IN_A_ROW) || 1;
    const grid = make("div", "iec-cells");
    grid.style.gridTemplateColumns = `repeat(${Math.ceil(plan.steps / rows)}, 1fr)`;
    const corrected = new Set(plan.corrected);
    const full = plan.full && new Set(plan.full);
    const correctable = new Set(plan.correctable ?? []);
    for (let step = 0; step < plan.steps; step++) {
      const isCached = full && !full.has(step);
      const words = [`step ${step}`, corrected.has(step) ? "corrected" : "not corrected"];
      if (full) words.push(isCached ? "cached" : "in full");
      const cell = make("button", "iec-cell");
      cell.type = "button";
      cell.classList.toggle("corrected", corrected.has(step));
      cell.classList.toggle("cached", Boolean(isCached));
      cell.classList.toggle("done", step < done);
      cell.classList.toggle("narrow", plan.steps / rows > 35);
      cell.disabled = !correctable.has(step);
      cell.title = words.join(", ") + (cell.disabled ? "" : "; click to change");
      cell.setAttribute("aria-label", words.join(", "));
      cell.setAttribute("aria-pressed", String(corrected.has(step)));
      cell.addEventListener("click", () => this.onToggle(step));
      grid.append(cell);
    }
    return grid;
  }

  ofRun(run, isKept) {
    const state = run.isRunning ? `step ${run.step} of ${run.steps}` : `${run.seconds?.toFixed(1)} s`;
    const line = make("div", "iec-run iec-quiet");
    const words = make("span", "iec-line", `${run.isRunning ? "running" : "last run"}: NFE ${run.nfe}, ${state}`);
    const label = make("label", "", "keep");
    label.title = "Save this run's chart with the workflow.";
    const box = make("input", "iec-keep");
    box.type = "checkbox";
    box.checked = isKept;
    box.addEventListener("change", () => this.onKeep(box.checked));
    label.prepend(box);
    line.append(words, label);
    const chart = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    chart.setAttribute("class", "iec-chart");
    const sentences = (run.warnings ?? []).map((text) => {
      const sentence = make("div", "iec-sentence iec-warning", `⚠ ${text}`);
      sentence.setAttribute("role", "alert");
      return sentence;
    });
    return [line, ...(hasChart(run) ? [chart] : []), ...sentences];
  }

  drawChart() {
    const svg = this.element.querySelector("svg");
    if (svg && this.run) drawChart(svg, this.run, Math.max(this.element.clientWidth - 8, 160));
  }
}

const hasChart = (run) => run.corrected.length > 0;
const last = (list) => list?.[list.length - 1];

/** Residual (log, left) and contraction (right) of the last iteration of each corrected step, means over the batch. */
function drawChart(svg, run, width) {
  const [left, right, top, bottom, height] = [30, 26, 14, 13, 92];
  const known = Object.values(run.iterated).sort((a, b) => a.step - b.step);
  const positive = known.map((one) => last(one.residuals)).filter((value) => value > 0);
  const low = Math.floor(Math.log10(Math.min(...positive, 1)));
  const high = Math.max(Math.ceil(Math.log10(Math.max(...positive, 10 ** low))), low + 1);
  const most = Math.max(1.2, ...known.map((one) => last(one.contraction) ?? 0));
  const x = (step) => left + ((step + 0.5) / run.steps) * (width - left - right);
  const inside = height - top - bottom;
  const yResidual = (value) => top + ((high - Math.log10(value)) / (high - low)) * inside;
  const yContraction = (value) => top + (1 - value / most) * inside;

  const shapes = [];
  const add = (tag, attributes, text) => {
    const shape = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
    if (text !== undefined) shape.textContent = text;
    shapes.push(shape);
    return shape;
  };
  const line = { stroke: "var(--border-color, #666)", "stroke-width": 1 };
  add("rect", { x: left, y: top, width: width - left - right, height: inside, fill: "none", ...line });
  add("line", { x1: left, x2: width - right, y1: yContraction(1), y2: yContraction(1), ...line, "stroke-dasharray": "3 3" });
  add("text", { x: left, y: 9, style: `fill: ${RESIDUAL}` }, "● residual (log)");
  add("text", { x: width - right, y: 9, "text-anchor": "end", style: `fill: ${CONTRACTION}` }, "■ contraction");
  for (const power of [low, high]) {
    add("text", { x: left - 3, y: yResidual(10 ** power) + 3, "text-anchor": "end" }, `1e${power}`);
  }
  for (const value of [0, 1]) add("text", { x: width - right + 3, y: yContraction(value) + 3 }, value);
  add("text", { x: left, y: height - 3 }, "0");
  add("text", { x: width - right, y: height - 3, "text-anchor": "end" }, `step ${run.steps - 1}`);
  for (const one of known) {
    const [residual, contraction] = [last(one.residuals), last(one.contraction)];
    const words = `step ${one.step}: residual ${shown(residual)}, contraction ${shown(contraction)}`;
    if (one.fell_back) {
      const band = { x: x(one.step) - 3, y: top, width: 6, height: inside, fill: "#d55e00", opacity: 0.5, class: "iec-fell-back" };
      add("rect", band).append(titled(`step ${one.step} fell back to its best iterate`));
    }
    if (residual > 0) {
      const dot = { cx: x(one.step), cy: yResidual(residual), r: 2.6, fill: RESIDUAL, class: "iec-residual" };
      add("circle", dot).append(titled(words));
    }
    if (contraction !== null && contraction !== undefined) {
      const place = { x: x(one.step) - 2.3, y: yContraction(contraction) - 2.3, width: 4.6, height: 4.6 };
      add("rect", { ...place, fill: CONTRACTION, class: "iec-contraction" }).append(titled(words));
    }
  }
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(...shapes);
}

const shown = (value) => (typeof value === "number" ? value.toPrecision(3) : "unknown");

function titled(text) {
  const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
  title.textContent = text;
  return title;
}
