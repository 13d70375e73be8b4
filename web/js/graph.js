// What the graph on the canvas says of a sampling run before it runs. Nothing here changes the graph.
//
// A walk ends in undefined where a value is known only when the prompt is run.

const [MUTED, BYPASSED] = [2, 4]; // LiteGraph's modes of a node that does nothing, and of one that hands its inputs on

/**
 * The node that an input is wired to, past reroutes and bypassed nodes; null if to none, undefined if to one elsewhere, such as
 * outside the subgraph.
 */
function sourceOf(node, name) {
  let input = node?.inputs?.find((one) => one.name === name);
  for (let hops = 0; hops < 1000; hops++) {
    if (!isWired(input)) return null;
    const link = linkOf(node.graph, input.link);
    const source = link && node.graph.getNodeById(link.origin_id);
    if (!source || source.mode === MUTED) return undefined;
    if (source.mode !== BYPASSED && source.type !== "Reroute") return source;
    input = source.inputs?.find((one) => one.type === link.type || source.type === "Reroute");
    node = source;
  }
  return undefined;
}

const isWired = (input) => input?.link !== null && input?.link !== undefined;

/** Whether a widget's value comes over a link. */
export function isLinked(node, name) {
  return isWired(node.inputs?.find((one) => one.widget?.name === name));
}

function linkOf(graph, id) {
  return graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id];
}

/** The value of a widget, or of the primitive node that is wired to it. */
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

const isAdvanced = (node) => has(node, "start_at_step", "end_at_step", "return_with_leftover_noise");
const isKSampler = (node) => has(node, "steps", "sampler_name", "scheduler") && (has(node, "denoise") || isAdvanced(node));
const isCustomSampler = (node) => has(node, "sampler", "sigmas");

/** The first sampler that what a node gives out leads to. */
function samplerAfter(node) {
  const seen = new Set([node]);
  const queue = [node];
  while (queue.length) {
    const here = queue.shift();
    const outputs = (here.outputs ?? []).filter((output) => ["MODEL", "GUIDER", "SAMPLER"].includes(output.type));
    for (const id of outputs.flatMap((output) => output.links ?? [])) {
      const next = here.graph.getNodeById(linkOf(here.graph, id)?.target_id);
      if (!next || next.mode === MUTED || seen.has(next)) continue;
      if (isKSampler(next) || isCustomSampler(next)) return next;
      seen.add(next);
      queue.push(next);
    }
  }
  return undefined;
}

/**
 * Goes up from an input along inputs of one type, and returns the first node for which found(node) is true; null if there is
 * none, undefined if that cannot be told.
 */
function upstream(node, name, type, found) {
  const seen = new Set();
  let here = sourceOf(node, name);
  while (here && !seen.has(here)) {
    if (found(here)) return here;
    seen.add(here);
    const input = here.inputs?.find((one) => one.type === type);
    here = input ? sourceOf(here, input.name) : null;
  }
  return here ? undefined : here;
}

/** The sampling inputs of a step plan: steps, sampler_name and so on. */
function samplingOf(sampler) {
  if (isKSampler(sampler)) {
    const plain = () => ({ denoise: valueOf(sampler, "denoise") });
    const part = () => ({
      start_step: valueOf(sampler, "start_at_step"),
      last_step: valueOf(sampler, "end_at_step"),
      force_full_denoise: valueOf(sampler, "return_with_leftover_noise") === "disable",
    });
    const more = isAdvanced(sampler) ? part() : plain();
    return { ...values(sampler, ["steps", "sampler_name", "scheduler"]), ...more };
  }
  const schedule = sourceOf(sampler, "sigmas");
  const named = upstream(sampler, "sampler", "SAMPLER", (node) => node.comfyClass === "KSamplerSelect");
  if (schedule?.comfyClass !== "BasicScheduler" || !named) return undefined; // others have rules of their own
  const ofSchedule = values(schedule, ["steps", "scheduler", "denoise"]);
  return { ...ofSchedule, sampler_name: valueOf(named, "sampler_name"), is_custom: true };
}

const values = (node, names) => Object.fromEntries(names.map((name) => [name, valueOf(node, name)]));

/** The cache inputs of a step plan; null without a cache, undefined where the graph does not tell. */
function cacheOf(sampler) {
  const isCache = (node) => ["IECDeepCache", "IECCacheQuant"].includes(node.comfyClass);
  const from = has(sampler, "guider") ? sourceOf(sampler, "guider") : sampler;
  const input = from?.inputs?.find((one) => one.type === "MODEL");
  const cache = input ? upstream(from, input.name, "MODEL", isCache) : undefined;
  if (!cache) return cache;
  const pass = values(cache, ["correction_pass"]);
  const names = ["interval", "schedule", "start_percent", "end_percent"];
  if (cache.comfyClass === "IECDeepCache") return { ...pass, ...values(cache, names) };
  const profile = sourceOf(cache, "profile");
  if (profile?.comfyClass !== "IECLoadCacheProfile") return undefined;
  return { ...pass, profile_name: valueOf(profile, "profile_name") };
}

const CORRECTION = ["correction_steps", "lambda_", "max_iterations", "tolerance", "evaluation_point", "lambda_mode"];

/**
 * The question for POST /iec/step_plan that belongs to an IEC sampler node, and whether a cache is there whose steps cannot be
 * told: {question, isCacheOpen}. question is undefined where the steps are known only when the prompt is run.
 */
export function planOf(node) {
  const sampler = node.comfyClass === "IECKSampler" ? node : samplerAfter(node);
  const sampling = sampler && samplingOf(sampler);
  const correction = values(node, CORRECTION);
  if (!sampling || [...Object.values(sampling), ...Object.values(correction)].includes(undefined)) {
    return { question: undefined, isCacheOpen: false };
  }
  const cache = cacheOf(sampler);
  const isCacheOpen = cache === undefined || Object.values(cache ?? {}).includes(undefined);
  if (isCacheOpen || !cache) {
    return { question: { correction, sampling, cache: null, is_cache_open: isCacheOpen }, isCacheOpen };
  }
  const { correction_pass, ...of } = cache;
  return { question: { correction, sampling, cache: of, correction_pass }, isCacheOpen };
}

/** The node that an execution id such as "12", or "5:12" in a subgraph, is the id of. */
export function nodeById(graph, id) {
  const [first, ...rest] = String(id).split(":");
  const node = graph?.getNodeById(/^\d+$/.test(first) ? Number(first) : first);
  return rest.length && node ? nodeById(node.subgraph, rest.join(":")) : node;
}
