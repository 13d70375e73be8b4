// The picture of a run on an IEC sampler node: a strip of steps, its cost, and a chart of what the corrections did.

const STYLE = `
.iec { overflow: hidden; font: 11px/1.35 sans-serif; color: var(--input-text, #ddd); }
.iec-body { display: flex; flex-direction: column; gap: 4px; padding: 2px 4px 4px; }
.iec-body > :empty, .iec-body > [hidden] { display: none; }
.iec-cells { display: grid; gap: 1px; row-gap: 3px; }
.iec-cell { height: 16px; min-width: 0; padding: 0; border: 1px solid var(--descrip-text, #999); border-radius: 2px;
  background: transparent; cursor: pointer; align-self: end; box-sizing: border-box; }
.iec-cell.narrow { border-width: 0 0 1px 0; border-radius: 0; }
.iec-cell.cached { height: 8px; }
.iec-cell.maybe-cached { height: 12px; }
.iec-cell.corrected { background: #56b4e9; border-color: #56b4e9; }
.iec-cell.open { background: repeating-linear-gradient(45deg, #56b4e9 0 2px, transparent 2px 5px); border-color: #56b4e9; }
.iec-cell.done { box-shadow: 0 2px 0 #009e73; }
.iec-cell:hover:not(:disabled) { outline: 1px solid var(--input-text, #ddd); }
.iec-cell:disabled { cursor: default; }
.iec-quiet { color: var(--descrip-text, #999); }
.iec-sentence { border-left: 3px solid #e69f00; padding-left: 5px; }
.iec-sentence.iec-refused { border-color: #d55e00; }
.iec-chart { width: 100%; height: 92px; }
.iec-chart text { font: 9px sans-serif; fill: var(--descrip-text, #999); }
.iec-chart.iec-other { opacity: 0.55; }
.iec-run { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 8px; }
.iec-run label { white-space: nowrap; cursor: pointer; }
.iec-run input { margin: 0 3px 0 0; vertical-align: -2px; }
`;
const CELLS_IN_A_ROW = 50;
const NARROW = 35; // with more cells in a row, they have no frames
const MOST_CELLS = 500;
const LEAST_HEIGHT = 40; // before the first display
const RESIDUAL = "#56b4e9";
const CONTRACTION = "#e69f00";

function make(tag, classes = "", text = "") {
  const element = document.createElement(tag);
  element.className = classes;
  element.textContent = text;
  return element;
}

function makeSvg(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** Return the cost of corrections, in words, for an answer of POST /iec/step_plan. */
export function costOf({ evaluations, nfe, corrected }) {
  const share = evaluations ? Math.round((100 * (nfe - evaluations)) / evaluations) : 0;
  if (!corrected.length) return plural(nfe, "evaluation");
  return `${evaluations} → ${nfe} evaluations${nfe === evaluations ? "" : `, +${share} %`}`;
}

/** Return how many steps a cache evaluates in full, in words; "" without a cache. */
export function fullOf({ full, full_open: open = [], steps }) {
  if (!full) return "";
  if (!open.length) return `${full.length} of ${plural(steps, "step")} in full, the others cached`;
  return `${full.length} of ${plural(steps, "step")} in full with most models, ${open.length} in full or cached, depending on the model`;
}

/** Return a run's settings, in words. */
function settingsOf({ steps, correction, full }) {
  return [plural(steps, "step"), correction, full && `${full.length} in full`].filter(Boolean).join(", ");
}

/** Return how many corrections are evaluated in full like a full step, in words; "" without a cache or added evaluations. */
export function fullCorrectionsOf({ full, full_corrections, evaluations, nfe }) {
  return full && nfe > evaluations ? `${full_corrections} of ${plural(nfe - evaluations, "correction")} also in full` : "";
}

/** Return the text of correction_steps for these corrected steps, in a run of `steps` steps. */
export function textOf(corrected, steps) {
  if (corrected.length === 0) return "none";
  return corrected.length === steps ? "all" : `steps:${[...corrected].sort((a, b) => a - b).join(",")}`;
}

export class StepView {
  /** onToggle(step): a cell was clicked. onKeep(isKept): the box was ticked or unticked. onHeight(): the height has changed. */
  constructor({ onToggle, onKeep, onHeight }) {
    if (!document.getElementById("iec-style")) {
      const style = make("style", "", STYLE);
      style.id = "iec-style";
      document.head.append(style);
    }
    this.onToggle = onToggle;
    this.element = make("div", "iec");
    this.body = make("div", "iec-body");
    this.cells = make("div", "iec-cells");
    this.cells.setAttribute("role", "group");
    this.cells.setAttribute("aria-label", "Steps of the run");
    this.lines = make("div", "iec-cost");
    this.message = make("div", "iec-sentence iec-message");
    this.summary = make("span");
    this.box = make("input", "iec-keep");
    this.box.type = "checkbox";
    this.box.addEventListener("change", () => onKeep(this.box.checked));
    this.run = make("div", "iec-run iec-quiet");
    const label = make("label", "", "keep with workflow");
    label.title = "Save the chart of this run in the workflow, so that it is shown when the workflow is opened again.";
    label.prepend(this.box);
    this.run.append(this.summary, label);
    this.caption = make("div", "iec-sentence iec-quiet iec-caption");
    this.chart = makeSvg("svg", { class: "iec-chart", role: "img" });
    this.warnings = make("div");
    this.warnings.setAttribute("aria-live", "polite");
    this.body.append(this.cells, this.lines, this.message, this.run, this.caption, this.chart, this.warnings);
    this.element.append(this.body);
    new ResizeObserver(() => {
      this.drawChart();
      onHeight();
    }).observe(this.body);
  }

  /** The height of all contents, in pixels. */
  get height() {
    return this.body.offsetHeight || LEAST_HEIGHT;
  }

  /**
   * Draw the plan and the last run. plan: the steps, undefined if they are not known. lines: its cost, its full steps with a
   * cache, and what `auto` chose. message: a sentence.
   * isRefused: whether the message is a refusal. fixed: why no step can be chosen by a click. run: the last run, from the events,
   * or undefined. isKept: whether the run is saved with the workflow. isOther: whether the run had other settings.
   */
  show({ plan, lines = [], message = "", isRefused, fixed, run, isKept, isOther }) {
    this.last = run;
    this.drawCells(plan && plan.steps <= MOST_CELLS ? plan : { steps: 0 }, run?.isRunning ? run.step : 0, fixed);
    this.lines.replaceChildren(...lines.filter(Boolean).map((line) => make("div", "", line)));
    this.message.textContent = message;
    this.message.classList.toggle("iec-refused", Boolean(isRefused));
    this.message.classList.toggle("iec-quiet", !isRefused);
    this.run.hidden = !run;
    this.chart.toggleAttribute("hidden", !run?.corrected.length);
    if (run) {
      const state = run.isRunning ? `step ${run.step} of ${run.steps}` : `${Number(run.seconds).toFixed(1)} s`;
      this.summary.textContent = `${run.isRunning ? "running" : "last run"}: NFE ${run.nfe}, ${state}`;
      this.box.checked = isKept;
      this.box.disabled = run.isRunning;
    }
    this.caption.textContent = isOther ? `This run had ${settingsOf(run)}; the strip above shows the current settings.` : "";
    this.chart.classList.toggle("iec-other", Boolean(isOther));
    const warnings = (run?.warnings ?? []).map((text) => `⚠ ${text}`);
    const shown = [...this.warnings.children].map((one) => one.textContent);
    if (JSON.stringify(warnings) !== JSON.stringify(shown)) {
      this.warnings.replaceChildren(...warnings.map((text) => make("div", "iec-sentence iec-warning", text)));
    }
    this.drawChart();
  }

  /** Draw the cells. Existing cells are reused, so that the one with the keyboard's focus keeps it. */
  drawCells({ steps, corrected, full, full_open: fullOpen, correctable, open }, done, fixed) {
    const rows = Math.ceil(steps / CELLS_IN_A_ROW) || 1;
    this.cells.style.gridTemplateColumns = `repeat(${Math.ceil(steps / rows)}, 1fr)`;
    while (this.cells.children.length > steps) this.cells.lastChild.remove();
    while (this.cells.children.length < steps) this.cells.append(this.cell(this.cells.children.length));
    const lists = [corrected, full ?? [], fullOpen ?? [], correctable ?? [], open ?? []];
    const [isCorrected, isFull, mayBeFull, canBe, isOpen] = lists.map((list) => new Set(list));
    for (const [step, cell] of [...this.cells.children].entries()) {
      const whether = isCorrected.has(step) ? "corrected" : "not corrected";
      const words = [`step ${step}`, isOpen.has(step) ? "corrected or not, depending on the model" : whether];
      const whetherFull = isFull.has(step) ? "in full" : "cached";
      if (full) words.push(mayBeFull.has(step) ? "in full or cached, depending on the model" : whetherFull);
      cell.classList.toggle("corrected", isCorrected.has(step));
      cell.classList.toggle("open", isOpen.has(step));
      cell.classList.toggle("cached", Boolean(full) && !isFull.has(step) && !mayBeFull.has(step));
      cell.classList.toggle("maybe-cached", mayBeFull.has(step));
      cell.classList.toggle("done", step < done);
      cell.classList.toggle("narrow", steps / rows > NARROW);
      cell.disabled = Boolean(fixed) || !canBe.has(step);
      cell.title = `${words.join(", ")}; ${fixed || (cell.disabled ? "this cannot be changed" : "click to change")}`;
      cell.setAttribute("aria-label", words.join(", "));
      cell.setAttribute("aria-pressed", String(isCorrected.has(step)));
    }
  }

  cell(step) {
    const cell = make("button", "iec-cell");
    cell.type = "button";
    cell.addEventListener("click", () => this.onToggle(step));
    return cell;
  }

  drawChart() {
    if (this.last?.corrected.length) drawChart(this.chart, this.last, Math.max(this.body.clientWidth - 8, 160));
  }
}

const last = (list) => list?.[list.length - 1];
const shown = (value) => (typeof value === "number" ? value.toPrecision(3) : "unknown");

/** Draw residual (log, left) and contraction (right) of the last iteration of each corrected step, means over the batch. */
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
    shapes.push(makeSvg(tag, attributes, text));
    return shapes[shapes.length - 1];
  };
  const line = { stroke: "var(--border-color, #666)", "stroke-width": 1 };
  add("rect", { x: left, y: top, width: width - left - right, height: inside, fill: "none", ...line });
  add("line", { x1: left, x2: width - right, y1: yContraction(1), y2: yContraction(1), ...line, "stroke-dasharray": "3 3" });
  add("circle", { cx: left + 3, cy: 6, r: 2.6, fill: RESIDUAL });
  add("text", { x: left + 9, y: 9 }, "residual (log)");
  add("rect", { x: width - right - 68, y: 3.7, width: 4.6, height: 4.6, fill: CONTRACTION });
  add("text", { x: width - right, y: 9, "text-anchor": "end" }, "contraction");
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
      add("rect", band).append(makeSvg("title", {}, `step ${one.step} fell back to its best iterate`));
    }
    if (residual > 0) {
      const dot = { cx: x(one.step), cy: yResidual(residual), r: 2.6, fill: RESIDUAL, class: "iec-residual" };
      add("circle", dot).append(makeSvg("title", {}, words));
    }
    if (typeof contraction === "number") {
      const place = { x: x(one.step) - 2.3, y: yContraction(contraction) - 2.3, width: 4.6, height: 4.6 };
      add("rect", { ...place, fill: CONTRACTION, class: "iec-contraction" }).append(makeSvg("title", {}, words));
    }
  }
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-label", `Residual and contraction of ${plural(known.length, "corrected step")}`);
  svg.replaceChildren(...shapes);
}
