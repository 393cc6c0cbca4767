// What a page shows, as text with marks where elements can be acted on. Runs in a world of its own
// beside the page's scripts, which cannot change what it calls.
(limits) => {
  const begin = performance.now();
  const lines = [];
  const elements = [];
  const labels = [];
  const frames = [];
  let line = "";
  let length = 0;
  let cells = 0;
  let lists = 0;
  let pre = 0;
  let visited = 0;
  let isCut = false;
  let isMarked = false;

  const clean = (text) => text.replace(/[\uE000-\uE003]/g, " ");
  const short = (text, most) => {
    const flat = clean(String(text || "")).replace(/\s+/g, " ").trim();
    return flat.length > most ? flat.slice(0, most - 1) + "…" : flat;
  };
  const inline = (text) => {
    if (isMarked && /^[\w"([\uE000]/.test(text)) line += " ";
    if (text) isMarked = false;
    if (line === "" || line.endsWith(" ")) text = text.replace(/^ +/, "");
    line += text;
    if (line.length > 20000) flush();
  };
  const flush = () => {
    const text = pre ? line.trimEnd() : line.trim();
    if (text && !/^[-#|\s]+$/.test(text)) {
      lines.push(pre ? text : line.trimEnd());
      length += text.length + 1;
    }
    line = "";
    isMarked = false;
  };
  const block = () => {
    if (cells) inline(" ");
    else flush();
  };
  const mark = (element, label) => {
    inline(`\uE000${elements.length}\uE001${label}`);
    isMarked = true;
    elements.push(element);
    labels.push(label);
  };

  const INPUTS = new Set(["input", "textarea", "select"]);
  const SKIPPED = new Set(["script", "style", "noscript", "template", "head", "meta", "link", "svg", "object", "embed", "canvas", "audio", "video", "map", "source", "track", "option", "datalist"]);
  const ROLES = new Set(["button", "link", "checkbox", "radio", "tab", "menuitem", "menuitemcheckbox", "menuitemradio", "option", "switch", "combobox", "textbox", "searchbox", "slider", "spinbutton", "treeitem"]);
  const BLOCKS = new Set(["block", "flex", "grid", "list-item", "table", "flow-root", "table-caption"]);

  const nameOf = (element) => {
    const said = element.getAttribute("aria-label");
    if (said && said.trim()) return short(said, 120);
    const by = element.getAttribute("aria-labelledby");
    if (by) {
      const root = element.getRootNode();
      const texts = by.split(/\s+/).slice(0, 4).map((id) => root.getElementById?.(id)?.textContent || "");
      if (texts.join("").trim()) return short(texts.join(" "), 120);
    }
    if (INPUTS.has(element.localName)) {
      const label = element.labels?.[0];
      const value = /^(button|submit|reset)$/.test(element.type) ? element.value || element.type : "";
      const said = [...(label?.childNodes || [])].filter((each) => !each.contains(element));
      const text = said.map((each) => each.textContent.slice(0, 300)).join(" ").trim();
      return short(value || text || element.placeholder || element.alt || element.title || element.name, 80);
    }
    const content = element.textContent;
    const text = content.length > 2000 ? content.slice(0, 400) : element.innerText ?? content;
    const image = element.querySelector("img[alt], [aria-label], svg title");
    return short(text || image?.alt || image?.getAttribute("aria-label") || image?.textContent || element.title, 120);
  };
  const stateOf = (element) => {
    const found = [];
    if (element.disabled || element.getAttribute("aria-disabled") === "true") found.push("disabled");
    if (element.checked || element.getAttribute("aria-checked") === "true") found.push("checked");
    if (element.getAttribute("aria-selected") === "true") found.push("selected");
    const expanded = element.getAttribute("aria-expanded");
    if (expanded) found.push(expanded === "true" ? "expanded" : "collapsed");
    return found.length ? ` (${found.join(", ")})` : "";
  };
  const inputLabel = (element) => {
    const name = nameOf(element);
    const tail = stateOf(element);
    if (element.localName === "select") {
      const all = [...element.options];
      const chosen = all.filter((each) => each.selected).map((each) => short(each.label, 40));
      const shown = all.slice(0, 20).map((each) => `"${short(each.label, 40)}"`).join(", ");
      const more = all.length > 20 ? ` and ${all.length - 20} more` : "";
      return `select "${name}" = "${chosen.join('", "')}" of ${shown}${more}${tail}`;
    }
    const type = element.localName === "textarea" ? "textarea" : element.type;
    if (/^(button|submit|reset|image)$/.test(type)) return `button "${name}"${tail}`;
    if (/^(checkbox|radio)$/.test(type)) return `${type} "${name}"${tail}`;
    const kind = /^(text|email|search|tel|url|number)$/.test(type) ? "input" : type === "textarea" ? type : `${type} input`;
    const value = type === "password" ? (element.value ? "•••" : "") : short(element.value, 80);
    return `${kind} "${name}"${value ? ` = "${value}"` : ""}${tail}`;
  };
  const kindOf = (element, style) => {
    const role = (element.getAttribute("role") || "").trim().split(" ")[0];
    if (ROLES.has(role)) return role;
    const tag = element.localName;
    if (tag === "a" && element.hasAttribute("href")) return "link";
    if (tag === "button" || tag === "summary") return "button";
    if (element.isContentEditable && !element.parentElement?.isContentEditable) return "input";
    if (tag === "label" || tag === "body" || tag === "html") return "";
    if (element.hasAttribute("onclick")) return "clickable";
    const above = element.parentElement;
    if (style.cursor === "pointer" && !(above && getComputedStyle(above).cursor === "pointer") && !element.querySelector("a[href], button, input, select")) return "clickable";
    return "";
  };
  const whereTo = (element) => {
    const href = element.getAttribute("href") || "";
    if (!href || href.startsWith("#") || href.startsWith("javascript:")) return "";
    let shown = element.href;
    if (typeof shown !== "string") return "";
    if (shown.startsWith(location.origin + "/")) shown = shown.slice(location.origin.length);
    return ` (${short(shown, 120)})`;
  };

  const stack = [];
  const push = (nodes) => {
    for (let index = nodes.length - 1; index >= 0; index--) stack.push(nodes[index]);
  };
  const childrenOf = (element) => {
    if (element.localName === "slot") {
      const assigned = element.assignedNodes({ flatten: true });
      if (assigned.length) return assigned;
    }
    return (element.shadowRoot || element).childNodes;
  };
  const around = (element, before, after) => {
    before();
    stack.push(after);
    push(childrenOf(element));
  };

  const act = (element, kind, style) => {
    const name = nameOf(element);
    const tail = (kind === "link" ? whereTo(element) : "") + stateOf(element);
    const isWhole = element.textContent.length <= 200 && !element.querySelector("a, button, input, select, textarea, iframe, h1, h2, h3, h4, table, li");
    const isBlock = BLOCKS.has(style.display) || /^h[1-6]$/.test(element.localName);
    if (isBlock) block();
    mark(element, `${kind}${name ? ` "${isWhole ? name : short(name, 60)}"` : ""}${tail}`);
    if (isWhole) {
      if (isBlock) block();
      return;
    }
    around(element, () => {}, block);
  };
  const special = (element) => {
    switch (element.localName) {
      case "br":
        block();
        return true;
      case "hr":
        block();
        return true;
      case "img":
        if (element.alt && element.alt.trim()) inline(` (image: ${short(element.alt, 100)}) `);
        return true;
      case "iframe":
      case "frame":
        flush();
        lines.push(`\uE002${frames.length}\uE003`);
        frames.push(element);
        return true;
    }
    return false;
  };
  const structure = (element, style) => {
    const tag = element.localName;
    if (/^h[1-6]$/.test(tag)) {
      around(element, () => { block(); if (!cells) line = "#".repeat(+tag[1]) + " "; }, block);
    } else if (tag === "ul" || tag === "ol" || tag === "menu") {
      around(element, () => { block(); lists++; }, () => { block(); lists--; });
    } else if (tag === "li") {
      around(element, () => { block(); if (!cells) line = "  ".repeat(Math.max(0, Math.min(lists, 6) - 1)) + "- "; }, block);
    } else if (style.display === "table-row") {
      around(element, () => { block(); if (!cells) line = "|"; }, block);
    } else if (style.display === "table-cell") {
      around(element, () => { inline(" "); cells++; }, () => { cells--; inline(" |"); });
    } else if (tag === "pre") {
      around(element, () => { block(); pre++; }, () => { block(); pre--; });
    } else if (tag === "dialog" || element.getAttribute("role") === "dialog") {
      around(element, () => { block(); inline("(dialog)"); block(); }, block);
    } else if (BLOCKS.has(style.display)) {
      around(element, block, block);
    } else {
      push(childrenOf(element));
    }
  };
  const visitText = (node) => {
    if (!pre || cells) return inline(clean(node.data).replace(/\s+/g, " "));
    const parts = clean(node.data).split("\n");
    parts.forEach((part, index) => {
      line += part;
      if (index < parts.length - 1) flush();
    });
  };
  const visit = (element) => {
    if (SKIPPED.has(element.localName) || (element.localName === "input" && element.type === "hidden")) return;
    const style = getComputedStyle(element);
    if (style.display === "none") return;
    if (style.display === "contents") return push(childrenOf(element));
    if (!element.checkVisibility()) return;
    if (style.visibility !== "visible") return push([...childrenOf(element)].filter((child) => child.nodeType === 1));
    if (special(element)) return;
    if (INPUTS.has(element.localName)) {
      if (!/^(file|checkbox|radio)$/.test(element.type) && !element.getClientRects().length) return;
      return mark(element, inputLabel(element));
    }
    const kind = kindOf(element, style);
    if (kind) act(element, kind, style);
    else structure(element, style);
  };

  if (document.body) stack.push(document.body);
  while (stack.length) {
    const item = stack.pop();
    if (typeof item === "function") {
      item();
      continue;
    }
    if (++visited % 200 === 0 && performance.now() - begin > limits.ms) isCut = true;
    if (length > limits.chars || elements.length >= limits.elements) isCut = true;
    if (isCut) break;
    if (item.nodeType === 3) visitText(item);
    else if (item.nodeType === 1) visit(item);
  }
  pre = 0;
  flush();
  const navigation = performance.getEntriesByType("navigation")[0];
  const scroller = document.scrollingElement || document.documentElement;
  return {
    elements,
    frames,
    json: JSON.stringify({
      text: lines.join("\n"),
      labels,
      frames: frames.map((frame) => short(frame.title || frame.name || frame.src, 100)),
      title: short(document.title, 200),
      url: document.URL.slice(0, 2000),
      status: navigation?.responseStatus || 0,
      is_cut: isCut,
      is_loading: document.readyState === "loading",
      view: [Math.round(scrollY), innerHeight, scroller ? scroller.scrollHeight : innerHeight],
    }),
  };
}
