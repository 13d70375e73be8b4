// Read from the graph on the canvas what a sampling run will do. Nothing here changes the graph.
//
// A search returns undefined if a value is known only when the prompt runs.

const [MUTED, BYPASSED] = [2, 4]; // LiteGraph's modes of a node that does not run, and of one that only passes its inputs on

/** Return the input that a bypassed node passes on as its output of this slot and type, by the frontend's rule. */
function handedOn(node, slot, type) {
  const isOfType = (one) => one?.type === type;
  return isOfType(node.inputs?.[slot]) ? node.inputs[slot] : node.inputs?.find(isOfType);
}

/**
 * Return the node that an input is wired to, past reroutes and bypassed nodes; null if the input is not wired, undefined if the
 * node is elsewhere, such as outside the subgraph.
 */
function sourceOf(node, name) {
  let input = node?.inputs?.find((one) => one.name === name);
  for (let hops = 0; hops < 1000; hops++) {
    if (!isWired(input)) return hops ? undefined : null;
    const link = linkOf(node.graph, input.link);
    const source = link && node.graph.getNodeById(link.origin_id);
    if (!source || source.mode === MUTED) return undefined;
    if (source.mode !== BYPASSED && source.type !== "Reroute") return source;
    const { type } = source.outputs?.[link.origin_slot] ?? {};
    input = source.type === "Reroute" ? source.inputs?.[0] : handedOn(source, link.origin_slot, type);
    node = source;
  }
  return undefined;
}

const isWired = (input) => input?.link !== null && input?.link !== undefined;

/** Return whether a widget's value comes over a link. */
export function isLinked(node, name) {
  return isWired(node.inputs?.find((one) => one.widget?.name === name));
}

function linkOf(graph, id) {
  return graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id];
}

const isIdle = (node) => [MUTED, BYPASSED].includes(node.mode);

/** Return whether a graph is a subgraph that does not run: no active node, in a graph that runs, contains it. */
function isIdleGraph(graph) {
  const root = graph?.rootGraph;
  if (!root || root === graph) return false;
  const nodes = [root, ...(root.subgraphs?.values() ?? [])].flatMap((one) => one.nodes);
  return nodes.every((one) => one.subgraph !== graph || isIdle(one) || isIdleGraph(one.graph));
}

/** Return the value of a widget, or of the primitive node that is wired to it. */
function valueOf(node, name) {
  if (isLinked(node, name)) {
    const source = sourceOf(node, name);
    return source?.type?.startsWith("Primitive") ? source.widgets?.[0]?.value : undefined;
  }
  return node.widgets?.find((widget) => widget.name === name)?.value;
}

function has(node, ...names) {
  const own = new Set([...(node.inputs ?? []), ...(node.widgets ?? [])].map((one) => one.name));
  return names.every((name) => own.has(name));
}

const CACHES = ["IECDeepCache", "IECCacheQuant"];
const OTHER_CACHES = ["EasyCache", "LazyCache"]; // the host's caches, which a plan does not cover
const KSAMPLERS = ["KSampler", "KSamplerAdvanced", "IECKSampler"];
const CUSTOM_SAMPLERS = ["SamplerCustom", "SamplerCustomAdvanced"];

/**
 * Return whether a node's effect is known. It is known for the host's nodes and the pack's, with two exceptions: a switch, which
 * passes on one of several inputs, and a node with several wired MODELs. A merge has several MODELs too, but counts as known: it
 * passes on its first. Other packs' nodes, and nodes of the frontend alone (Set and Get nodes, subgraphs), may pass on anything.
 */
function isKnown(node) {
  const module = node.constructor?.nodeData?.python_module ?? "";
  const isOurs = node.comfyClass?.startsWith("IEC") && module;
  const isOfServer = !node.isVirtualNode && (isOurs || module === "nodes" || module.startsWith("comfy_extras."));
  const models = (node.inputs ?? []).filter((one) => one.type === "MODEL" && isWired(one));
  const isChoice = node.comfyClass?.includes("Switch") || (models.length > 1 && !node.comfyClass?.startsWith("ModelMerge"));
  return isOfServer && !isChoice;
}

const isFirstOfType = (input, node) => node.inputs?.find((one) => one.type === input?.type) === input;

/**
 * Return the samplers that a node's outputs lead to; undefined if they lead to unknown nodes, which may sample, or pass on
 * something else.
 */
function samplersAfter(node) {
  const [seen, queue, samplers] = [new Set([node]), [node], []];
  while (queue.length) {
    const here = queue.shift();
    const isHandedOn = (output) => here.type === "Reroute" || ["MODEL", "GUIDER", "SAMPLER"].includes(output.type);
    for (const id of (here.outputs ?? []).filter(isHandedOn).flatMap((output) => output.links ?? [])) {
      const link = linkOf(here.graph, id);
      const next = here.graph.getNodeById(link?.target_id);
      if (next?.mode === MUTED || seen.has(next)) continue;
      if (!next || !(next.mode === BYPASSED || next.type === "Reroute" || isKnown(next))) return undefined;
      if (!isFirstOfType(next.inputs[link.target_slot], next)) continue; // of its second MODEL, a merge uses only the weights
      seen.add(next);
      const isSampler = next.mode !== BYPASSED && [...KSAMPLERS, ...CUSTOM_SAMPLERS].includes(next.comfyClass);
      (isSampler ? samplers : queue).push(next);
    }
  }
  return samplers;
}

/**
 * Follow inputs of one type upstream, and return the first node for which found(node) is true; null if there is none, undefined
 * if the graph does not show it.
 */
function upstream(node, name, type, found) {
  const seen = new Set();
  let here = sourceOf(node, name);
  while (here && !seen.has(here)) {
    if (!isKnown(here)) return undefined;
    if (found(here)) return here;
    seen.add(here);
    const input = here.inputs?.find((one) => one.type === type);
    if (!input) return here.inputs?.some((one) => isWired(one) && !one.widget) ? undefined : null; // a loader has no such input
    here = sourceOf(here, input.name);
  }
  return undefined; // not wired: it cannot run, or another extension wires it when it is queued
}

/** Return the sampling inputs of a step plan: steps, sampler_name and so on. */
function samplingOf(sampler) {
  if (KSAMPLERS.includes(sampler.comfyClass)) {
    const plain = () => ({ denoise: valueOf(sampler, "denoise") });
    const part = () => ({
      start_step: valueOf(sampler, "start_at_step"),
      last_step: valueOf(sampler, "end_at_step"),
      force_full_denoise: valueOf(sampler, "return_with_leftover_noise") === "disable",
    });
    const more = sampler.comfyClass === "KSamplerAdvanced" ? part() : plain();
    return { ...values(sampler, ["steps", "sampler_name", "scheduler"]), ...more };
  }
  const schedule = sourceOf(sampler, "sigmas");
  const named = upstream(sampler, "sampler", "SAMPLER", (node) => node.comfyClass === "KSamplerSelect");
  if (schedule?.comfyClass !== "BasicScheduler" || !named) return undefined; // other schedulers have their own rules
  const ofSchedule = values(schedule, ["steps", "scheduler", "denoise"]);
  return { ...ofSchedule, sampler_name: valueOf(named, "sampler_name"), is_custom: true };
}

const values = (node, names) => Object.fromEntries(names.map((name) => [name, valueOf(node, name)]));

/** Return the cache inputs of a step plan; null without a cache, undefined if the graph does not show them. */
function cacheOf(sampler) {
  const isCache = (node) => [...CACHES, ...OTHER_CACHES].includes(node.comfyClass);
  const from = has(sampler, "guider") ? sourceOf(sampler, "guider") : sampler;
  const input = from && isKnown(from) && from.inputs?.find((one) => one.type === "MODEL");
  const cache = input ? upstream(from, input.name, "MODEL", isCache) : undefined;
  if (!cache || OTHER_CACHES.includes(cache.comfyClass)) return cache ? undefined : cache;
  const pass = values(cache, ["correction_pass"]);
  const names = ["interval", "schedule", "start_percent", "end_percent", "speed"];
  if (cache.comfyClass === "IECDeepCache") return { ...pass, ...values(cache, names) };
  const profile = sourceOf(cache, "profile");
  if (profile?.comfyClass !== "IECLoadCacheProfile") return undefined;
  return { ...pass, profile_name: valueOf(profile, "profile_name") };
}

const CORRECTION = ["correction_steps", "lambda_", "max_iterations", "tolerance", "evaluation_point", "lambda_mode"];
const OPEN = { question: undefined, isCacheOpen: false };

/**
 * Return {question, isCacheOpen, why} for an IEC sampler node. question: for POST /iec/step_plan; undefined if the steps are
 * known only when the prompt runs, for example if the node leads to several different runs. why: the reason why question is undefined, if known.
 * isCacheOpen: whether there is a cache whose steps are not known.
 */
export function planOf(node) {
  if (node.mode === MUTED) return { ...OPEN, why: "The node is muted: it does not run." };
  if (node.mode === BYPASSED) return { ...OPEN, why: "The node is bypassed: it corrects nothing." };
  if (isIdleGraph(node.graph)) return { ...OPEN, why: "The subgraph is muted or bypassed: the node does not run." };
  const samplers = node.comfyClass === "IECKSampler" ? [node] : (samplersAfter(node) ?? []);
  const plans = new Map(samplers.map((sampler) => planAt(node, sampler)).map((plan) => [JSON.stringify(plan), plan]));
  return plans.size === 1 ? [...plans.values()][0] : OPEN;
}

/** Return the same as planOf, for the run of one sampler. */
function planAt(node, sampler) {
  const sampling = samplingOf(sampler);
  const correction = values(node, CORRECTION);
  if (!sampling || [...Object.values(sampling), ...Object.values(correction)].includes(undefined)) return OPEN;
  const cache = cacheOf(sampler);
  const isCacheOpen = cache === undefined || Object.values(cache ?? {}).includes(undefined);
  if (isCacheOpen || !cache) {
    return { question: { correction, sampling, cache: null, is_cache_open: isCacheOpen }, isCacheOpen };
  }
  const { correction_pass, ...of } = cache;
  return { question: { correction, sampling, cache: of, correction_pass }, isCacheOpen };
}

/** Return the node with an execution id such as "12", or "5:12" in a subgraph. */
export function nodeById(graph, id) {
  const [first, ...rest] = String(id).split(":");
  const node = graph?.getNodeById(/^\d+$/.test(first) ? Number(first) : first);
  return rest.length && node ? nodeById(node.subgraph, rest.join(":")) : node;
}
