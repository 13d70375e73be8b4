// The frontend extension: on each IEC sampler node, the steps that it will correct and what its last run did.
//
// The server computes the steps (POST /iec/step_plan), so that only one place parses correction_steps. The events iec.step and
// iec.run report a run's progress; nodes/host/correction/progress_events.py documents their contents.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { isLinked, nodeById, planOf } from "./graph.js";
import { StepView, costOf, fullCorrectionsOf, fullOf, textOf } from "./view.js";

const NODES = ["IECKSampler", "IECApply", "IECSampler"];
// Nodes that measure with their seed: a new seed for each queued prompt would measure again, and replace the saved result.
const MEASURING = [
  "IECCalibrateCacheQuant", "IECCalibrateQuantization", "IECCalibrateWeights", "IECContractionProbe", "IECFindSettings",
  "IECQuantizationReport",
];
const KEPT = "iec_run"; // the node's property with the run that is saved with the workflow
const LOOK_AGAIN = 300; // milliseconds between two looks at the graph, because no event covers every change
const ASK_AGAIN = 5000; // milliseconds until the next request after the server has not answered
const ANSWERS_WITHIN = 30000; // milliseconds after which no answer is expected any more
const SOON = 1000; // milliseconds for which a plan of the previous settings is shown unmarked
const MOST_RUNS = 200; // number of runs that are kept
const NO_ID = "00000000-0000-0000-0000-000000000000"; // the id of every workflow that was opened in API form

const strips = new Set();
const runs = new Map(); // "[workflow id, execution id of the node]": run
const rootGraph = () => app.rootGraph ?? app.graph;

/** Change the graph so that the frontend notices: for undo, and for the draft that a reload of the page restores. */
function undoable(change) {
  app.canvas.emitBeforeChange();
  change();
  app.canvas.emitAfterChange();
  app.canvas.setDirty(true, true);
}

/** Return the run in a node's property if it is valid and the node's own: a workflow may be foreign, and a node may be a copy. */
function keptRun(node) {
  const run = node.properties[KEPT];
  const lists = [run?.corrected, run?.warnings, Object.values(run?.iterated ?? [null])];
  const isRun = Number.isInteger(run?.steps) && lists.every(Array.isArray) && lists[2].every((one) => Number.isInteger(one?.step));
  const isOwn = String(run?.source).split(":").pop() === String(node.id);
  return isRun && isOwn ? { ...run, isRunning: false } : undefined;
}

class Strip {
  constructor(node) {
    this.node = node;
    this.view = new StepView({
      onToggle: (step) => this.toggle(step),
      onKeep: (isKept) => this.keep(isKept),
      onHeight: () => this.fit(),
    });
    const getMinHeight = () => this.view.height + 2 * (this.widget?.margin ?? 0); // the canvas subtracts margins
    const options = { serialize: false, hideOnZoom: false, getMinHeight };
    this.widget = node.addDOMWidget("iec_steps", "iec_steps", this.view.element, options);
    this.widget.serialize = false;
    this.now = undefined; // the question for the current settings, as JSON
    this.asked = undefined; // the last question that was sent
    this.answer = undefined; // to `asked`, or the previous answer until it arrives
    this.answered = undefined; // the question to which `answer` belongs
    this.changedAt = 0;
    this.isWaiting = false;
    this.askedAt = 0;
  }

  /** Return whether the node is no longer in the open workflow. */
  get isGone() {
    const { graph, id } = this.node;
    const isOpen = graph === rootGraph() || rootGraph()?.subgraphs?.get?.(graph?.id) === graph;
    return !isOpen || graph.getNodeById(id) !== this.node;
  }

  /** Check whether the graph needs another plan, or whether a run has progressed; draw the strip if so. */
  look(run) {
    this.run = run ?? keptRun(this.node);
    if (run && !run.isRunning && run !== this.kept && this.node.properties[KEPT]) undoable(() => this.remember());
    const { question, isCacheOpen, why } = planOf(this.node);
    this.why = why;
    this.isCacheOpen = isCacheOpen || Boolean(question?.cache); // a profile may be of another schedule
    const asked = JSON.stringify(question ?? null);
    if (asked !== this.now) this.changedAt = Date.now();
    this.now = asked;
    const isLate = this.answer?.isSilence && Date.now() - this.askedAt > ASK_AGAIN;
    if ((asked !== this.asked || isLate) && !this.isWaiting) this.ask(asked);
    this.draw();
  }

  async ask(asked) {
    this.asked = asked;
    this.askedAt = Date.now();
    this.isWaiting = true;
    try {
      const answer = asked === "null" ? {} : await answerTo(asked);
      if (answer) [this.answer, this.answered] = [answer, asked];
      else this.asked = undefined; // the next look asks again
    } finally {
      this.isWaiting = false;
    }
  }

  /** Return what is drawn: the current run; else the plan, completed with the cached steps of the last run. */
  state() {
    const { run, answer } = this;
    const isKept = Boolean(this.node.properties[KEPT]);
    const fixed = isLinked(this.node, "correction_steps") ? "correction_steps comes over a link" : "";
    const common = { run, isKept, fixed, isOther: this.isOther() };
    if (run?.isRunning) {
      const lines = [answer?.steps === run.steps && costOf(answer), fullOf(run), run.choice];
      return { ...common, plan: { steps: run.steps, corrected: run.corrected, full: run.full }, lines };
    }
    if (this.answered !== this.now && Date.now() - this.changedAt > SOON) return { ...common, ...this.late() };
    if (!answer) return common;
    if (answer.error) return { ...common, ...this.refusal(answer) };
    if (answer.steps === undefined) {
      const message = this.why ?? answer.unknown ?? "The steps are known when the node runs.";
      if (!run) return { ...common, message };
      const plan = { steps: run.steps, corrected: run.corrected, full: run.full };
      return { ...common, plan, lines: [fullOf(run)], message: `${message} These are the steps of the last run.` };
    }
    const isCertain = answer.full && !answer.full_by_model;
    if (isCertain || !this.isCacheOpen) {
      return { ...common, plan: this.decided(), lines: [costOf(answer), fullOf(answer), fullCorrectionsOf(answer), answer.choice] };
    }
    const full = run?.steps === answer.steps ? run.full : null;
    const plan = full ? { ...this.decided(), full, full_open: [] } : answer;
    const ofPlan = answer.full ? fullOf(answer) : "which steps are cached is known when the node runs";
    return { ...common, plan, lines: [costOf(answer), full ? `in the last run: ${fullOf(run)}` : ofPlan, answer.choice] };
  }

  /** Return the plan; the corrections that depend on the model are those of the last run, if it had these settings. */
  decided() {
    const { run, answer } = this;
    const dependsOnModel = answer.open?.length || answer.full_by_model;
    const isDecided = dependsOnModel && run?.steps === answer.steps && !run.isRunning && !this.isOther();
    return isDecided ? { ...answer, corrected: run.corrected, open: [] } : answer;
  }

  /** Return what is drawn while the server makes the plan for the current settings. */
  late() {
    const isPlan = this.answer?.steps !== undefined && !this.answer.error;
    if (!isPlan) return { message: "The server is making the plan." };
    const message = "The server is making the plan; until then, this is the plan of the previous settings.";
    return { plan: this.answer, lines: [costOf(this.answer)], message };
  }

  /**
   * Return whether the last run had other step settings than the current ones. The current settings are compared with the
   * settings at the run's start, which the page has stored, and with the correction that the run reported, because the settings
   * may have changed while the run was queued.
   */
  isOther() {
    const { run, answer, now } = this;
    if (!run || run.isRunning) return false;
    const isOtherNow = run.asked !== undefined && run.asked !== now;
    return isOtherNow || (answer?.correction !== undefined && run.correction !== answer.correction);
  }

  /** Return what is drawn for settings that would be refused; if the steps are known, a click can still choose them. */
  refusal({ error, ...plan }) {
    if (plan.steps === undefined) return { message: error, isRefused: true };
    const canMend = plan.correctable.length && !isLinked(this.node, "correction_steps");
    return { plan, message: canMend ? `${error} A click on a step writes a valid list.` : error, isRefused: true };
  }

  draw() {
    const state = this.state();
    const shown = JSON.stringify(state);
    if (shown === this.shown) return;
    this.shown = shown;
    this.view.show(state);
    this.fit();
  }

  /** Give the node the height that it needs; a height that was added earlier is removed again. */
  fit() {
    const [width, height] = this.node.size;
    const needed = this.node.computeSize()[1];
    if (needed > height || (height === this.fitted && needed < height)) {
      this.node.setSize([width, needed]);
      this.fitted = this.node.size[1];
      app.canvas?.setDirty(true, true);
    }
  }

  /** Add or remove a corrected step. The choice of `auto` becomes explicit, including its evaluation point. */
  toggle(step) {
    if (!this.inputWidget("correction_steps") || this.answer?.steps === undefined) return;
    const steps = new Set(this.decided().corrected);
    if (!steps.delete(step)) steps.add(step);
    this.answer = { ...this.answer, corrected: [...steps], open: [] }; // the next click may come before the server's answer
    undoable(() => {
      if (this.answer.choice) this.set("evaluation_point", this.answer.evaluation_point);
      this.set("correction_steps", textOf([...steps], this.answer.steps));
    });
    this.draw();
  }

  inputWidget(name) {
    return this.node.widgets.find((one) => one.name === name);
  }

  set(name, value) {
    const widget = this.inputWidget(name);
    if (!widget || widget.value === value) return;
    const before = widget.value;
    widget.value = value;
    widget.callback?.(value, app.canvas, this.node);
    this.node.onWidgetChanged?.(name, value, before, widget);
  }

  keep(isKept) {
    undoable(() => {
      if (!isKept) delete this.node.properties[KEPT];
      else if (this.run && !this.run.isRunning) this.remember();
    });
  }

  remember() {
    this.kept = this.run;
    this.node.properties[KEPT] = JSON.parse(JSON.stringify(this.run));
  }
}

let lastAsked = Promise.resolve();

/** Return the server's answer to a question for a step plan, as JSON. One question is sent at a time for all strips. */
function answerTo(question) {
  lastAsked = lastAsked.then(() => ask(question));
  return lastAsked;
}

/**
 * Return the same, but ask at once. isSilence is set if the server gave no usable answer. The result is undefined if the server is
 * busy with another page's question.
 */
async function ask(question) {
  try {
    const signal = AbortSignal.timeout(ANSWERS_WITHIN);
    const response = await api.fetchApi("/iec/step_plan", { method: "POST", body: question, signal });
    if (response.status === 429) return undefined;
    if (response.ok || response.status === 400) return await response.json();
    return { unknown: `The server cannot determine the steps (status ${response.status}).`, isSilence: true };
  } catch {
    return { unknown: "The server does not answer.", isSilence: true };
  }
}

const tabs = new Map(); // workflow id: the frontend's workflow (a tab) with this id
const ids = new WeakMap(); // tab: {from, to}, the original id of its workflow, and its replacement
let [tabBefore, idBefore] = []; // at the previous look

/**
 * Give the open workflow a unique id; otherwise its runs would be shown in other workflows. All workflows in API form have the
 * same id, NO_ID, and a copy in another tab has the id of its original. The frontend may lose the id when it shows another tab,
 * so it is set again.
 */
function nameApart(graph) {
  if (graph?.id === NO_ID) graph.id = LiteGraph.uuidv4(); // immediately, because it may be queued before the next look
  const { activeWorkflow: tab, openWorkflows = [] } = app.extensionManager?.workflow ?? {};
  const isSettled = tab === tabBefore && graph?.id === idBefore; // while a tab is being opened, the graph may be another tab's
  [tabBefore, idBefore] = [tab, graph?.id];
  const from = tab?.activeState?.id;
  if (!graph || !from || !isSettled) return;
  for (const [id, owner] of tabs) if (!openWorkflows.includes(owner)) tabs.delete(id);
  if (ids.get(tab)?.from !== from) {
    if (from !== NO_ID && graph.id !== from) return;
    const isTaken = from !== NO_ID && (tabs.get(from) ?? tab) !== tab;
    ids.set(tab, { from, to: isTaken ? LiteGraph.uuidv4() : graph.id });
  }
  graph.id = ids.get(tab).to;
  tabs.set(graph.id, tab);
}

function lookAtAll() {
  if (document.hidden || strips.size === 0) return;
  const graph = rootGraph();
  nameApart(graph);
  const current = new Map();
  for (const [key, run] of runs) {
    const [workflow, id] = JSON.parse(key);
    const node = workflow === graph?.id && nodeById(graph, id);
    if (node) current.set(node, run);
  }
  for (const strip of strips) {
    if (strip.isGone) remove(strip);
    else strip.look(current.get(strip.node));
  }
}

/**
 * Remove a strip whose node is gone. After an undo, Nodes 2.0 shows the removed strip's element on the new node that replaces the
 * removed one; the new node's element is put there instead.
 */
function remove(strip) {
  strips.delete(strip);
  const { element } = strip.view;
  const isHeir = (one) => one.node.id === strip.node.id && !one.isGone && !one.view.element.isConnected;
  const heir = element.isConnected && [...strips].find(isHeir);
  if (heir) element.replaceWith(heir.view.element);
}

/** Return the question for the current settings of an event's node; undefined if the node is not in the graph. */
function askedNow({ workflow, source }) {
  const graph = rootGraph();
  const node = workflow === graph?.id && nodeById(graph, source);
  return node ? JSON.stringify(planOf(node).question ?? null) : undefined;
}

/** Add an event to the data of its run. */
function onEvent({ detail }, isRunning) {
  const key = JSON.stringify([detail.workflow, detail.source]);
  const known = runs.get(key);
  const isNew = detail.step === 0 || known?.prompt_id !== detail.prompt_id || known?.node !== detail.node;
  const iterated = { ...(isNew ? {} : known.iterated) };
  const asked = isNew ? askedNow(detail) : known.asked;
  for (const one of detail.iterated) iterated[one.step] = one;
  runs.delete(key); // makes it the newest
  const before = isNew ? { corrected: [], full: null } : known; // events between a run's first and last do not contain these
  runs.set(key, { ...before, ...detail, step: detail.step ?? detail.steps, asked, iterated, isRunning });
  if (runs.size > MOST_RUNS) runs.delete(runs.keys().next().value);
}

/** Remove runs that ended early. */
function dropRunning(isMeant = () => true) {
  for (const [key, run] of runs) if (run.isRunning && isMeant(run)) runs.delete(key);
}

/** Keep the seed of a newly added node fixed after each queued prompt; a saved workflow sets its own choice later. */
function fixSeed(node) {
  const seed = node.widgets?.find((one) => one.name === "seed");
  for (const control of seed?.linkedWidgets ?? []) control.value = "fixed";
}

app.registerExtension({
  name: "comfyui-iec.steps",
  setup() {
    api.addEventListener("iec.step", (event) => onEvent(event, true));
    api.addEventListener("iec.run", (event) => onEvent(event, false));
    for (const kind of ["execution_error", "execution_interrupted", "execution_success"]) {
      api.addEventListener(kind, ({ detail }) => dropRunning((run) => run.prompt_id === detail.prompt_id));
    }
    api.addEventListener("reconnected", () => dropRunning());
    setInterval(lookAtAll, LOOK_AGAIN);
  },
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass)) strips.add(new Strip(node));
    if (MEASURING.includes(node.comfyClass)) fixSeed(node);
  },
});
