// The frontend extension: on each IEC sampler node, the steps that it will correct and what its last run did.
//
// The steps are told by the server (POST /iec/step_plan), so that the grammar of correction_steps has one home. What happens in a
// run is told by the events iec.step and iec.run; nodes/host/events.py says what is in them.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { nodeById, planOf } from "./graph.js";
import { StepView, costOf, textOf } from "./view.js";

const NODES = ["IECKSampler", "IECApply", "IECSampler"];
const KEPT = "iec_run"; // the node's property that holds a run which is saved with the workflow
const LOOK_AGAIN = 300; // milliseconds between two looks at the graph; it has no event that covers every change
const MOST_RUNS = 200; // that are remembered

const strips = new Set();
const runs = new Map(); // "workflow id/execution id of the node": run
const rootGraph = () => app.rootGraph ?? app.graph;

/** Changes the graph so that the frontend notes it: for undo, and for the draft that a reload of the page restores. */
function undoable(change) {
  app.canvas.emitBeforeChange();
  change();
  app.canvas.emitAfterChange();
  app.canvas.setDirty(true, true);
}

class Strip {
  constructor(node) {
    this.node = node;
    this.view = new StepView({ onToggle: (step) => this.toggle(step), onKeep: (isKept) => this.keep(isKept) });
    const options = { serialize: false, hideOnZoom: false, getMinHeight: () => this.view.height };
    this.widget = node.addDOMWidget("iec_steps", "iec_steps", this.view.element, options);
    this.widget.serialize = false;
    this.asked = this.shown = undefined; // the last question, and the last state that was drawn, as JSON
    this.answer = undefined; // until there is one
  }

  get isGone() {
    return this.node.graph?.getNodeById(this.node.id) !== this.node;
  }

  /** Looks whether the graph asks for another plan, or whether there is news of a run; draws it if so. */
  look(run) {
    this.run = run ?? this.node.properties[KEPT];
    if (run && !run.isRunning && this.node.properties[KEPT]) this.remember(run);
    const { question, isCacheOpen } = planOf(this.node);
    const asked = JSON.stringify(question);
    if (asked !== this.asked) {
      this.asked = asked;
      this.ask(asked);
    }
    this.draw(isCacheOpen);
  }

  async ask(asked) {
    let answer = {};
    if (asked) {
      try {
        const response = await api.fetchApi("/iec/step_plan", { method: "POST", body: asked });
        answer = await response.json();
      } catch {
        answer = { error: "The server does not answer." };
      }
    }
    if (asked === this.asked) this.answer = answer; // else the graph has changed meanwhile
  }

  /** What is drawn: the run while it goes on; else the plan, with what only the run could tell of a cache. */
  state(isCacheOpen) {
    const { run, answer } = this;
    const isKept = Boolean(this.node.properties[KEPT]);
    if (!answer) return { run, isKept };
    if (answer.error) return { message: answer.error, isRefused: true, run, isKept };
    const planned = answer.steps === undefined ? undefined : answer;
    if (run && (run.isRunning || !planned)) {
      const { steps, corrected, full } = run;
      const message = run.isRunning || planned ? undefined : "These were the last run's steps; the next run's are known when it runs.";
      const cost = planned && planned.steps === steps ? costOf({ ...planned, full }) : undefined;
      return { plan: { steps, corrected, full }, cost, message, run, isKept };
    }
    if (!planned) return { message: "The steps are known when it runs.", run, isKept };
    const seen = isCacheOpen && run?.steps === planned.steps ? run.full : planned.full;
    const plan = { ...planned, full: seen };
    return { plan, cost: costOf(plan, isCacheOpen && !seen), run, isKept };
  }

  draw(isCacheOpen) {
    const state = this.state(isCacheOpen);
    const shown = JSON.stringify(state);
    if (shown === this.shown) return;
    this.shown = shown;
    this.view.show(state);
    const [width, height] = this.node.size;
    const needed = this.node.computeSize()[1];
    if (needed > height) this.node.setSize([width, needed]);
    app.canvas?.setDirty(true, true);
  }

  toggle(step) {
    const widget = this.node.widgets.find((one) => one.name === "correction_steps");
    const input = this.node.inputs?.find((one) => one.widget?.name === "correction_steps");
    if (!widget || (input && input.link !== null && input.link !== undefined)) return; // it comes over a link
    const steps = new Set(this.answer.corrected);
    if (!steps.delete(step)) steps.add(step);
    undoable(() => {
      const before = widget.value;
      widget.value = textOf([...steps], this.answer.steps);
      widget.callback?.(widget.value, app.canvas, this.node);
      this.node.onWidgetChanged?.(widget.name, widget.value, before, widget);
    });
  }

  keep(isKept) {
    undoable(() => {
      if (!isKept) delete this.node.properties[KEPT];
      else if (this.run) this.remember(this.run);
    });
  }

  remember(run) {
    this.node.properties[KEPT] = JSON.parse(JSON.stringify({ ...run, isRunning: false }));
  }
}

function lookAtAll() {
  if (document.hidden || strips.size === 0) return;
  const graph = rootGraph();
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

/** Forgets a strip whose node is gone. Nodes 2.0 goes on showing its element where undo has put another node in its place. */
function remove(strip) {
  strips.delete(strip);
  const { element } = strip.view;
  const isHeir = (one) => one.node.id === strip.node.id && !one.isGone && !one.view.element.isConnected;
  const heir = element.isConnected && [...strips].find(isHeir);
  if (heir) element.replaceWith(heir.view.element);
}

/** Takes an event of a run into what is known of it. */
function onEvent({ detail }, isRunning) {
  const key = JSON.stringify([detail.workflow, detail.source]);
  const known = runs.get(key);
  const isNew = detail.step === 0 || known?.prompt_id !== detail.prompt_id || known?.node !== detail.node;
  const iterated = { ...(isNew ? {} : known.iterated) };
  for (const one of detail.iterated) iterated[one.step] = one;
  runs.delete(key); // so that it is the youngest
  runs.set(key, { ...detail, step: detail.step ?? detail.steps, iterated, isRunning });
  if (runs.size > MOST_RUNS) runs.delete(runs.keys().next().value);
}

/** Runs that were cut short do not go on. */
function onStopped({ detail }) {
  for (const [key, run] of runs) {
    if (run.isRunning && run.prompt_id === detail.prompt_id) runs.delete(key);
  }
}

app.registerExtension({
  name: "comfyui-iec.steps",
  setup() {
    api.addEventListener("iec.step", (event) => onEvent(event, true));
    api.addEventListener("iec.run", (event) => onEvent(event, false));
    for (const kind of ["execution_error", "execution_interrupted"]) api.addEventListener(kind, onStopped);
    setInterval(lookAtAll, LOOK_AGAIN);
  },
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass)) strips.add(new Strip(node));
  },
});
