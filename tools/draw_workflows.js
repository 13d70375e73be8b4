// The part of draw_workflows.py that runs in the page. Places and sizes are LiteGraph's: a node's place is below its title.

window.iecDraw = (() => {
  const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
  const isOfPack = (node) => node.constructor.nodeData?.python_module.startsWith("custom_nodes.");
  const node = (title) => app.graph.nodes.find((node) => node.title === title);

  const strips = () => app.graph.nodes.flatMap((node) => (node.widgets ?? []).filter((widget) => widget.name === "iec_steps"));
  const CHART = 120; // the height that a run's chart adds to a strip of steps

  /** Wait until the strips of steps show their plans, on which the height of their nodes depends. */
  async function planned() {
    while (!strips().every((widget) => widget.element.innerText)) await pause(100);
    await pause(400);
  }

  /**
   * Return by how much a node grows: by the chart of a run, and by the difference of Nodes 2.0 to the canvas, where rows are
   * further apart and custom nodes have a badge below.
   */
  function room(node) {
    const widgets = node.widgets ?? [];
    const texts = widgets.filter((widget) => widget.type === "text" || widget.type === "string");
    const chart = widgets.some((widget) => widget.name === "iec_steps") ? CHART : 0;
    return 8 + 3 * widgets.length + 12 * texts.length + (isOfPack(node) ? 32 : 0) + chart;
  }

  /**
   * Give every node the size of its type, at least the minimum of its widgets. Return {title: [width, height, room]}; room is the
   * free height to leave below it.
   */
  async function measure(sizes, least) {
    await planned();
    for (const node of app.graph.nodes) {
      for (const widget of node.widgets ?? []) if (widget.name === "control_after_generate") widget.value = "fixed";
      const [width, height] = node.computeSize();
      const [w, h] = sizes[node.title] ?? sizes[node.type] ?? [least, 0];
      node.setSize([Math.ceil(Math.max(width, w)), Math.ceil(Math.max(height, h))]);
    }
    return Object.fromEntries(app.graph.nodes.map((node) => [node.title, [...node.size, room(node)]]));
  }

  /** Place the nodes, {title: [x, y, width, height]}, and record the pack of each node. */
  function place(nodes, pack) {
    for (const [title, [x, y, width, height]] of Object.entries(nodes)) {
      node(title).pos = [x, y];
      node(title).setSize([width, height]);
    }
    for (const node of app.graph.nodes) node.properties.cnr_id = isOfPack(node) ? pack : "comfy-core";
  }

  function addGroup(title, color, [x, y, width, height]) {
    const group = new LiteGraph.LGraphGroup(title);
    Object.assign(group, { color, pos: [x, y], size: [width, height] });
    app.graph.add(group);
  }

  /** Add a Markdown note to the left of the rest, as high as its text. */
  async function addNote(title, markdown, width, gap) {
    const note = LiteGraph.createNode("MarkdownNote");
    app.graph.add(note);
    Object.assign(note, { title, color: "#432", bgcolor: "#653", pos: [-width - gap, LiteGraph.NODE_TITLE_HEIGHT] });
    note.widgets[0].value = markdown;
    note.setSize([width, 400]);
    await show(note.pos[0] - gap, 0, width + 2 * gap, 400, 1);
    const text = note.widgets[0].element.firstElementChild;
    const height = text.lastElementChild.getBoundingClientRect().bottom - text.firstElementChild.getBoundingClientRect().top;
    note.setSize([width, Math.ceil(height) + 60]);
  }

  /** Return [x, y, width, height] of the groups of these titles together. */
  function area(titles) {
    const groups = app.graph.groups.filter((group) => titles.includes(group.title));
    const from = [0, 1].map((i) => Math.min(...groups.map((group) => group.pos[i])));
    const to = [0, 1].map((i) => Math.max(...groups.map((group) => group.pos[i] + group.size[i])));
    return [...from, to[0] - from[0], to[1] - from[1]];
  }

  /** Return when the pictures of the visible nodes have been loaded and drawn. */
  async function loaded() {
    const waits = (node) => app.nodeOutputs[node.id]?.images?.length && !node.imgs?.every((image) => image.complete);
    for (let tries = 0; app.canvas.visible_nodes.some(waits); tries++) {
      if (tries === 300) throw new Error("a node's pictures were not loaded within a minute");
      app.canvas.setDirty(true, true);
      await pause(200);
    }
    await pause(300);
  }

  /** Show a part of the graph as large as the window allows, at most at a scale; return its place in the page, in pixels. */
  async function show(x, y, width, height, mostScale) {
    const canvas = app.canvas.canvas.getBoundingClientRect();
    const scale = Math.min(mostScale, canvas.width / width, canvas.height / height);
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [-x, -y];
    app.canvas.background_image = null; // the grid
    app.canvas.deselectAll?.();
    app.canvas.setDirty(true, true);
    await pause(700);
    return { x: canvas.x, y: canvas.y, width: Math.floor(width * scale), height: Math.floor(height * scale) };
  }

  /** Run the workflow; return null when its results are there, else the error. */
  async function run() {
    const ended = new Promise((done) => {
      app.api.addEventListener("execution_success", () => done(null), { once: true });
      app.api.addEventListener("execution_error", (event) => done(event.detail.exception_message), { once: true });
    });
    await app.queuePrompt(0);
    const refused = Object.keys(app.lastNodeErrors ?? {}).length > 0;
    return refused ? JSON.stringify(app.lastNodeErrors) : ended;
  }

  /** Show one node of a type, with its default widgets; return its size. */
  async function only(type, leastWidth) {
    app.graph.clear();
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    await planned();
    node.pos = [0, 0];
    node.setSize([Math.max(node.computeSize()[0], leastWidth), node.size[1]]);
    await pause(400); // a strip of steps has its final height once it is drawn
    node.setSize([node.size[0], node.computeSize()[1]]);
    return [...node.size];
  }

  return { measure, place, addGroup, addNote, area, show, loaded, run, only };
})();
